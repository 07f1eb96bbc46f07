#!/bin/bash
# PostgreSQL in a container on a volume of 8 KiB blocks, with full_page_writes off: pgbench with 8 clients and four more
# that count what was acknowledged to them; docker kill in the middle, twice; all that was acknowledged is there, the
# balances add up, pg_amcheck finds nothing.
source "$(dirname "$0")/lib.sh"
fixture
rootfs_postgres "$T/image"
image_import "$T/image" coffer-postgres

cat >"$T/start.sh" <<'SH'
cd /var/lib/postgresql && export LC_ALL=C
[ -e data/PG_VERSION ] || /usr/lib/postgresql/15/bin/initdb -D data -U postgres --locale=C -E UTF8 >/dev/null || exit 1
exec /usr/lib/postgresql/15/bin/postgres -D data -c listen_addresses= -c unix_socket_directories=/tmp \
    -c full_page_writes=off -c max_wal_size=256MB -c checkpoint_timeout=30s -c shared_buffers=64MB
SH

volume pg block=8k profile=database
run_bg pg --user postgres -v pg:/var/lib/postgresql coffer-postgres sh -c "$(cat "$T/start.sh")"
in_pg() { docker exec -u postgres -e PGHOST=/tmp "$@"; }
ready() { in_pg pg pg_isready -q && in_pg pg psql -qAtc 'SELECT 1'; }
wait_for 90 ready
expect "from the image" "$(docker exec pg cat /var/lib/postgresql/README)" "the image's content in the fresh volume"
in_pg pg psql -qc 'CREATE TABLE ack (client int, n int, PRIMARY KEY (client, n)); CREATE EXTENSION amcheck'
in_pg pg pgbench -q -i -s 10 2>"$T/err" || fail "pgbench -i: $(tail -n 3 "$T/err")"

for round in 1 2; do
    in_pg -w /tmp pg sh -c "rm -f /tmp/pgbench_log.*; exec pgbench -n -c 8 -j 2 -T 300 -l" >/dev/null 2>&1 &
    for client in 1 2 3 4; do
        seq 1 200000 | sed "s/.*/INSERT INTO ack VALUES ($round$client, &) RETURNING n;/" |
            in_pg -i pg psql -qAt >"$T/acked.$client" 2>/dev/null &
    done
    sleep 8
    docker kill -s KILL pg >/dev/null || fail "docker kill"
    wait || true
    docker cp pg:/tmp "$T/log$round" >/dev/null 2>&1 || true
    logged=$({ cat "$T/log$round"/pgbench_log.* 2>/dev/null || true; } | wc -l)
    docker start pg >/dev/null
    wait_for 90 ready
    for client in 1 2 3 4; do
        sed -n '/^[0-9]\+$/p' "$T/acked.$client" | sed '$d' | sort >"$T/want"
        in_pg pg psql -qAtc "SELECT n FROM ack WHERE client = $round$client" | sort >"$T/have"
        lost=$(comm -23 "$T/want" "$T/have" | wc -l)
        step "round $round, client $client: $(wc -l <"$T/want") acknowledged, $(wc -l <"$T/have") there, $lost lost"
        [ -s "$T/want" ] || fail "no transaction was acknowledged"
        [ "$lost" = 0 ] || fail "$lost acknowledged transactions are lost"
    done
    total=$(in_pg pg psql -qAtc 'SELECT count(*) FROM pgbench_history')
    step "round $round: pgbench logged $logged transactions, $total are there"
    [ "$logged" -gt 0 ] || fail "pgbench did nothing"
    [ "$total" -ge $((logged + ${before:-0})) ] || fail "pgbench's acknowledged transactions are lost"
    before=$total
    in_pg pg psql -qAtc 'SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)
        AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)' >"$T/out"
    expect t "$(cat "$T/out")" "the balances add up"
done
in_pg pg pg_amcheck --heapallindexed --parent-check -d postgres >"$T/out" 2>&1 || fail "pg_amcheck: $(tail -n 5 "$T/out")"
expect "" "$(cat "$T/out")" "pg_amcheck"
docker stop -t 30 pg >/dev/null
docker rm pg >/dev/null
