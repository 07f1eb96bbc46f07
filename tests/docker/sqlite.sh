#!/bin/bash
# SQLite (WAL, synchronous=FULL) in a container on a volume, killed in the middle of its transactions, three times: every
# acknowledged one is there, and the database is whole.
source "$(dirname "$0")/lib.sh"
fixture
rootfs_sqlite "$T/image"
image_import "$T/image" coffer-sqlite

volume data profile=database
run make -v data:/data coffer-sqlite sqlite3 /data/db \
    'PRAGMA journal_mode=WAL; CREATE TABLE t(n INTEGER PRIMARY KEY, pad TEXT);' >/dev/null || fail "cannot make the database"
for round in 1 2 3; do
    first=$((round * 1000000))
    # SELECT prints the number only after the INSERT's transaction is committed.
    { echo 'PRAGMA synchronous=FULL;'
      seq "$first" $((first + 200000)) | sed "s/.*/INSERT INTO t VALUES(&, hex(randomblob(200))); SELECT &;/"; } >"$T/sql"
    docker run -i --name writer --network none -v data:/data coffer-sqlite stdbuf -oL sqlite3 /data/db <"$T/sql" >"$T/acked" 2>"$T/err" &
    enough() { [ "$(wc -l <"$T/acked")" -gt 200 ]; }
    wait_for 60 enough
    sleep 1
    docker kill -s KILL writer >/dev/null || fail "docker kill"
    wait $! || true
    docker rm -f writer >/dev/null
    # A last line without its newline is not an acknowledgement.
    sed -n '/^[0-9]\{7\}$/p' "$T/acked" | sort >"$T/want"
    run check -v data:/data coffer-sqlite sqlite3 /data/db 'PRAGMA integrity_check;' >"$T/out" || fail "the database does not open"
    expect ok "$(cat "$T/out")" "integrity_check"
    run check -v data:/data coffer-sqlite sqlite3 /data/db "SELECT n FROM t WHERE n >= $first ORDER BY n;" | sort >"$T/have"
    lost=$(comm -23 "$T/want" "$T/have" | wc -l)
    step "round $round: $(wc -l <"$T/want") acknowledged, $(wc -l <"$T/have") there, $lost lost"
    [ "$lost" = 0 ] || fail "$lost acknowledged transactions are lost"
done
