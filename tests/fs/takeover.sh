#!/bin/bash
# coffer-fs is killed 20 times under a load of names, appends and fsynced counters: for whoever uses the mount that is a pause,
# not an error. Nothing acknowledged is lost, nothing is done twice, the volume is clean; it still locks, and frees what
# has no name. Then the mount is given up when servers die one after the other.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
KILLS=${KILLS:-20}
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
dev=$(stat -c %d "$T/m")
used() { df --output=used "$T/m" | tail -n 1 | tr -d ' '; }

step "a load while the server is killed $KILLS times"
python3 "$(dirname "$0")/takeover.py" "$T/m" $((KILLS * 3 + 2)) >"$T/out" 2>&1 &
load=$!
for ((i = 1; i <= KILLS; i++)); do
    sleep "2.$((RANDOM % 900 + 100))"
    kill -0 $load 2>/dev/null || fail "the load ended at kill $i: $(cat "$T/out")"
    pid=$(server_pid t)
    [ -n "$pid" ] || fail "no server at kill $i"
    kill -9 "$pid"
    next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ]; }
    wait_for 20 next
done
wait $load || fail "$(cat "$T/out")"
step "$(cat "$T/out")"
expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"
expect "$KILLS" "$(coffer audit --json | grep -c '"server-died"')" "deaths in the audit log"

step "what has no name any more is freed, and the volume is clean"
head -c 100M /dev/zero >"$T/m/big" && sync -f "$T/m/big"
before=$(used)
rm "$T/m/big"
freed() { [ "$(used)" -lt $((before - 90000)) ]; }
wait_for 20 freed
coffer volume check t --data >"$T/out" || fail "check while mounted: $(head -n 5 "$T/out")"
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"
coffer mount t "$T/m" >/dev/null || fail "mount again"
expect 20 "$(stat -c %s "$T/m/counter/counter")" "the counter's size"
coffer umount "$T/m" >/dev/null || fail "umount again"
