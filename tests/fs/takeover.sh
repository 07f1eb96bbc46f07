#!/bin/bash
# coffer-fs is killed 20 times (half of them just before an answer, by strace) under a load of names, appends and fsynced
# counters: for whoever uses the mount that is a pause, not an error. Nothing acknowledged is lost, nothing is done twice, the volume is clean; it still locks, and frees what
# has no name. Then the mount is given up when servers die one after the other.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
KILLS=${KILLS:-14}
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
dev=$(stat -c %d "$T/m")
used() { df --output=used "$T/m" | tail -n 1 | tr -d ' '; }

step "a load while the server is killed $KILLS times"
python3 "$(dirname "$0")/takeover.py" "$T/m" $((KILLS * 60)) >"$T/out" 2>&1 &
load=$!
for ((i = 1; i <= KILLS; i++)); do
    # Two at a time: the second one is hit while it opens the volume, or has just begun. (Five in 10 s would be given up.)
    if ((i % 2)); then sleep "5.$((RANDOM % 900 + 100))"; fi
    kill -0 $load 2>/dev/null || fail "the load ended at kill $i: $(cat "$T/out")"
    pid=$(server_pid t)
    [ -n "$pid" ] || fail "no server at kill $i"
    if ((i % 2)); then
        # Before one of its answers, the n-th of a thread: what is done and not answered must not be done again.
        timeout 20 strace -qq -f -p "$pid" -e trace=writev -e inject=writev:signal=KILL:when=$((RANDOM % 100 + 20)) >/dev/null 2>&1 || true
        ended() { ! kill -0 "$pid"; }
        wait_for 10 ended
    else
        kill -9 "$pid"
    fi
    next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ]; }
    wait_for 20 next
done
kill $load # it ends after its round
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

step "a server that dies again and again is given up: an error, not a hang; then there is a new mount"
exec 9>"$T/m/held" && echo x >&9
pid=
for i in 1 2 3 4 5; do
    next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ] && pid=$now; }
    wait_for 20 next
    kill -9 "$pid"
done
anew() { [ "$(stat -c %s "$T/m/counter/counter")" = 20 ]; }
wait_for 40 anew
status=0
timeout 10 cat "/proc/$$/fd/9" >/dev/null 2>&1 || status=$?
expect 1 $status "opening a file of the mount that was given up (124: it hangs)"
exec 9>&-
grep -q 'given up' "$T/c/cofferd.log" || fail "cofferd did not say that it gave up"
coffer umount "$T/m" >/dev/null || fail "umount at the end"
