#!/bin/bash
# The promise to databases: PostgreSQL with full_page_writes off, on a volume of the profile database with 8 KiB blocks, on a
# disk that loses at a power cut what was not flushed (lossyfs). In each round the power is cut under pgbench with 8
# clients and four more that write down what was acknowledged to them; the volume opens from what is left, PostgreSQL
# recovers, all that was acknowledged is there, the balances add up, and neither pg_amcheck nor pg_checksums finds anything.
#
#     postgres.sh [ROUNDS [SECONDS]]     rounds (4) of at most so many seconds of load (6); on one database throughout
#     postgres.sh --control              on a disk that lies about flushes: acknowledged transactions must be missed
source "$(dirname "$0")/lib.sh"
[ "${1:-}" != --control ] || control "acknowledged" bash "$0" 4 4
rounds=${1:-4} seconds=${2:-6}
power_fixture postgres

db=$T/mnt/db
sql() { setpriv --reuid postgres --regid postgres --clear-groups psql -h "$T/sock" -U postgres -qAtX "$@" postgres; }

start() {
    own_session setpriv --reuid postgres --regid postgres --clear-groups $PG/bin/postgres -D "$db" -c listen_addresses= \
        -c unix_socket_directories="$T/sock" -c full_page_writes=off -c max_wal_size=64MB -c min_wal_size=48MB \
        -c checkpoint_timeout=30s -c shared_buffers=2MB -c bgwriter_delay=10ms -c checkpoint_flush_after=0 \
        -c bgwriter_flush_after=0 -c backend_flush_after=0 >>"$T/postgres.log" 2>&1
    database=$!
    for _ in $(seq 600); do
        if $PG/bin/pg_isready -q -h "$T/sock"; then return 0; fi
        kill -0 $database 2>/dev/null || break
        sleep 0.1
    done
    fail "PostgreSQL does not start: $(tail -n 15 "$T/postgres.log")"
}

verify() {
    local lost total
    for client in 1 2 3 4; do
        [ -e "$T/acked.$client" ] || continue
        sed -n '/^[0-9]\+$/p' "$T/acked.$client" | sort >"$T/want"
        sql -c "SELECT n FROM ack WHERE client = $client" | sort >"$T/have"
        lost=$(comm -23 "$T/want" "$T/have" | wc -l)
        [ "$lost" = 0 ] || fail "round $round: $lost acknowledged inserts of client $client are lost"
        acked=$((acked + $(wc -l <"$T/want")))
    done
    total=$(sql -c 'SELECT count(*) FROM pgbench_history')
    [ "$total" -ge $((logged + before)) ] || fail "round $round: pgbench had $((logged + before)) acknowledged, $total are there"
    before=$total
    [ "$(sql -c 'SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
        AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)')" = t ] ||
        fail "round $round: the balances do not add up"
    setpriv --reuid postgres --regid postgres --clear-groups $PG/bin/pg_amcheck -h "$T/sock" -U postgres --heapallindexed \
        --parent-check -d postgres >"$T/amcheck" 2>&1 || fail "round $round: pg_amcheck: $(tail -n 5 "$T/amcheck")"
    [ ! -s "$T/amcheck" ] || fail "round $round: pg_amcheck: $(tail -n 5 "$T/amcheck")"
}

stop_and_check() {
    kill -INT $database
    wait_gone $database
    setpriv --reuid postgres --regid postgres --clear-groups $PG/bin/pg_checksums --check -D "$db" >"$T/checksums" 2>&1 ||
        fail "round $round: pg_checksums: $(tail -n 5 "$T/checksums")"
}

mkdir -m 700 "$T/sock"
chown postgres "$T/sock"
power_on --format 768M --block 8k
install -d -m 700 -o postgres -g postgres "$db"
setpriv --reuid postgres --regid postgres --clear-groups $PG/bin/initdb -D "$db" -U postgres --locale=C -E UTF8 \
    --data-checksums --wal-segsize=4 >"$T/initdb.log" 2>&1 || fail "initdb: $(tail -n 3 "$T/initdb.log")"
round=0 before=0 logged=0 acked=0
start
sql -c 'CREATE TABLE ack (client int, n int, PRIMARY KEY (client, n)); CREATE EXTENSION amcheck'
bench() {
    (cd "$T/bench" && exec setpriv --reuid postgres --regid postgres --clear-groups $PG/bin/pgbench -h "$T/sock" \
        -U postgres "$@" postgres)
}
install -d -o postgres "$T/bench"
bench -q -i -s 3 2>"$T/err" || fail "pgbench -i: $(tail -n 3 "$T/err")"

cuts_logged=0
for round in $(seq "$rounds"); do
    rm -f "$T"/bench/pgbench_log.* "$T"/acked.*
    sql -c 'TRUNCATE ack'
    bench -n -c 8 -j 2 -T 300 -l >/dev/null 2>&1 &
    jobs=($!)
    for client in 1 2 3 4; do
        seq 1 200000 | sed "s/.*/INSERT INTO ack VALUES ($client, &) RETURNING n;/" | sql >"$T/acked.$client" 2>/dev/null &
        jobs+=($!)
    done
    sleep "$(random_seconds "$seconds")"
    power_cut
    kill_session $database
    wait "${jobs[@]}" 2>/dev/null || true
    power_off
    logged=$({ cat "$T"/bench/pgbench_log.* 2>/dev/null || true; } | wc -l) # none when the cut came early
    power_on
    start
    acked=0
    verify
    stop_and_check
    cuts_logged=$((cuts_logged + logged + acked))
    step "round $round: $(cat "$T/cut"); pgbench $logged, inserts $acked acknowledged, all there"
    [ "$round" = "$rounds" ] || start
done
[ "$cuts_logged" -gt $((rounds * 20)) ] || fail "only $cuts_logged transactions in $rounds rounds"
volume_clean
