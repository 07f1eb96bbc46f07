#!/bin/bash
# The promise to databases, as postgres.sh: MariaDB's InnoDB with its doublewrite buffer off and its 16 KiB pages on a volume
# of 16 KiB blocks, power cuts under load. What was acknowledged is there, the sums add up, CHECK TABLE finds nothing.
#
#     mariadb.sh [ROUNDS [SECONDS]]
#     mariadb.sh --control       on a disk that lies about flushes: acknowledged transactions must be missed
source "$(dirname "$0")/lib.sh"
[ "${1:-}" != --control ] || control "acknowledged" bash "$0" 3 4
rounds=${1:-3} seconds=${2:-6} clients=6
power_fixture

db=$T/mnt/db
sql() { mariadb --no-defaults -S "$T/sock/s" -u root -N -B -q "$@"; }

start() {
    local try # (the log begins anew: before the end, while nothing could be read, it complained rightly)
    own_session mariadbd --no-defaults --user=mysql --datadir="$db" --socket="$T/sock/s" --skip-networking \
        --pid-file="$T/sock/pid" --innodb-doublewrite=OFF --innodb-buffer-pool-size=6M --innodb-log-file-size=16M \
        --innodb-flush-log-at-trx-commit=1 --innodb-max-dirty-pages-pct=10 --innodb-max-dirty-pages-pct-lwm=1 \
        --innodb-io-capacity=4000 --innodb-use-native-aio=0 --skip-log-bin >"$T/mariadb.log" 2>&1
    database=$!
    for try in $(seq 900); do
        if mariadb-admin --no-defaults -S "$T/sock/s" -u root ping >/dev/null 2>&1; then return 0; fi
        kill -0 $database 2>/dev/null || break
        sleep 0.1
    done
    fail "round $round: MariaDB does not start (${try:-0}): $(tail -n 15 "$T/mariadb.log")"
}

# One client: transfers between two accounts, and a line of the ledger that says so, in one transaction; then its number is
# printed: it is acknowledged.
transactions() {
    local client=$1
    awk -v c="$client" -v s="$RANDOM$client" 'BEGIN {
        srand(s)
        for (n = 1; n <= 100000; n++) {
            a = int(rand() * 20000); b = int(rand() * 20000); d = int(rand() * 1000)
            printf "BEGIN; UPDATE account SET balance = balance - %d WHERE id = %d;", d, a
            printf "UPDATE account SET balance = balance + %d WHERE id = %d;", d, b
            printf "INSERT INTO ledger VALUES (%d, %d, REPEAT(MD5(%d), 6)); COMMIT; SELECT %d;\n", c, n, n, n
        }
    }'
}

verify() {
    local lost client
    acked=0
    for client in $(seq $clients); do
        grep '^[0-9]\+$' "$T/acked.$client" | sort >"$T/want" || true
        sql t -e "SELECT n FROM ledger WHERE client = $client" | sort >"$T/have"
        lost=$(comm -23 "$T/want" "$T/have" | wc -l)
        [ "$lost" = 0 ] || fail "round $round: $lost acknowledged transactions of client $client are lost"
        acked=$((acked + $(wc -l <"$T/want")))
    done
    [ "$(sql t -e 'SELECT SUM(balance), COUNT(*) FROM account')" = "$(printf '0\t20000')" ] ||
        fail "round $round: the balances do not add up"
    [ "$(sql t -e 'SELECT COUNT(*) FROM ledger WHERE filler <> REPEAT(MD5(n), 6)')" = 0 ] || fail "round $round: a row is wrong"
    sql t -e 'CHECK TABLE account EXTENDED; CHECK TABLE ledger EXTENDED' >"$T/check"
    [ "$(grep -c 'status.OK$' "$T/check")" = 2 ] || fail "round $round: $(cat "$T/check")"
    if grep -i "corrupt\|checksum mismatch" "$T/mariadb.log"; then fail "round $round: MariaDB found damage"; fi
}

mkdir -m 700 "$T/sock"
chown mysql "$T/sock"
round=0
power_on --format 768M --block 16k
install -d -m 700 -o mysql -g mysql "$db"
mariadb-install-db --no-defaults --user=mysql --datadir="$db" --auth-root-authentication-method=normal --skip-test-db \
    --innodb-doublewrite=OFF >"$T/install.log" 2>&1 || fail "mariadb-install-db: $(tail -n 5 "$T/install.log")"
start
sql -e "CREATE DATABASE t; USE t;
    CREATE TABLE account (id INT PRIMARY KEY, balance BIGINT NOT NULL, filler CHAR(200) NOT NULL) ENGINE=InnoDB;
    CREATE TABLE ledger (client INT, n INT, filler CHAR(200), PRIMARY KEY (client, n), KEY (filler)) ENGINE=InnoDB;
    INSERT INTO account SELECT seq, 0, MD5(seq) FROM seq_0_to_19999"

all=0
for round in $(seq "$rounds"); do
    sql t -e 'TRUNCATE ledger'
    jobs=()
    for client in $(seq $clients); do
        transactions "$client" | sql -n t >"$T/acked.$client" 2>/dev/null &
        jobs+=($!)
    done
    sleep "$(random_seconds "$seconds")"
    power_cut
    kill_session "$database"
    wait "${jobs[@]}" 2>/dev/null || true
    power_off
    power_on
    start
    verify
    all=$((all + acked))
    step "round $round: $(cat "$T/cut"); $acked transactions acknowledged, all there"
done
kill "$database"
wait_gone "$database"
[ "$all" -gt $((rounds * 20)) ] || fail "only $all transactions in $rounds rounds"
volume_clean
