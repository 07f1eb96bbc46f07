#!/bin/bash
# cofferd is stopped or killed under a mount with a load, and started again: it finds the mount's descriptors in the living
# coffer-fs, so that, when that dies afterwards, the next one goes on: for whoever uses the mount a pause, no error.
# Then cofferd and coffer-fs die both: there is an error, not a hang, and a new mount at the same place.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
dev=$(stat -c %d "$T/m")
gone() { ! kill -0 "$1"; }
cofferd_end() {
    local pid
    pid=$(cofferd_pid)
    kill "-$1" "$pid"
    wait_for 10 gone "$pid"
}
next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ]; }

step "cofferd stopped or killed, then coffer-fs killed, under load"
python3 "$(dirname "$0")/takeover.py" "$T/m" 300 >"$T/out" 2>&1 &
load=$!
for how in TERM KILL; do
    sleep 1
    cofferd_end $how
    sleep 1
    kill -0 $load 2>/dev/null || fail "the load ended without cofferd: $(cat "$T/out")"
    cofferd_start
    coffer volume inspect t --json | grep -q '"unlocked":true' || fail "the server does not answer the new cofferd"
    pid=$(server_pid t)
    kill -9 "$pid"
    wait_for 20 next
    sleep 1
    kill -0 $load 2>/dev/null || fail "the load ended: $(cat "$T/out")"
    sleep 3
    pid=$(server_pid t)
    kill -9 "$pid" # the one that the new cofferd has started
    wait_for 20 next
    sleep 3
done
kill $load
wait $load || fail "$(cat "$T/out")"
step "$(cat "$T/out")"
expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"
expect 4 "$(coffer audit --json | grep -c '"server-died"')" "deaths in the audit log"

step "what needs the channel works after a restart"
cofferd_end KILL
cofferd_start
coffer volume check t --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"
coffer volume resize t 768M >/dev/null || fail "resize"
coffer volume restart-server t >/dev/null || fail "restart-server"
expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"

step "the state file cannot be written for a while, a server follows, cofferd is killed"
exec 9<>"$T/m/counter/counter"
mv "$T/c/cofferd.json" "$T/cofferd.json"
mkdir -p "$T/c/cofferd.json/in the way"
one_line 1 'cannot be written: .*: nothing is changed' coffer volume restart-server t
pid=$(server_pid t)
kill -9 "$pid"
wait_for 20 next
head -c 20 <&9 >/dev/null || fail "what was open is lost"
rmdir "$T/c/cofferd.json/in the way" "$T/c/cofferd.json"
written() { [ -s "$T/c/cofferd.json" ]; }
wait_for 5 written
pid=$(server_pid t)
cofferd_end KILL
cofferd_start
coffer volume check t >"$T/out" || fail "check: $(head -n 5 "$T/out")"
expect "$pid" "$(server_pid t)" "the server"
expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"
head -c 1 <&9 >/dev/null || fail "what was open is lost"
exec 9>&-

step "both are killed: an error, then a new mount"
sync -f "$T/m"
exec 9>"$T/m/held" && echo x >&9
pid=$(server_pid t)
kill -9 "$(cofferd_pid)" "$pid"
wait_for 10 gone "$pid"
status=0
timeout 10 stat "$T/m/counter" >/dev/null 2>"$T/err" || status=$?
expect 1 $status "stat on the dead mount (124: it hangs)"
grep -qE 'not connected|abort' "$T/err" || fail "another error: $(cat "$T/err")"
cofferd_start
anew() { [ "$(stat -c %s "$T/m/counter/counter")" = 20 ]; }
wait_for 40 anew
status=0
timeout 10 cat "/proc/$$/fd/9" >/dev/null 2>&1 || status=$?
expect 1 $status "opening a file of the mount that is gone (124: it hangs)"
exec 9>&-
expect 1 "$(awk -v m="$T/m" '$5 == m' /proc/self/mountinfo | wc -l)" "mounts at the directory"
expect 1 "$(awk -v m="$T/c/run/mnt/t" '$5 == m' /proc/self/mountinfo | wc -l)" "mounts at the mountpoint"
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check at the end: $(head -n 5 "$T/out")"

step "the state file is lost: the agent is found, goes on, and is ended by down"
keyd() { for p in $(pgrep -x coffer-keyd); do [ -n "$(find "/proc/$p/fd" -lname "$T/*" 2>/dev/null)" ] && echo "$p"; done; }
cofferd_end KILL
mv "$T/c/cofferd.json" "$T/cofferd.json"
pid=$(keyd)
[ -n "$pid" ] || fail "no agent"
cofferd_start
coffer status | grep -q '^keystore  unlocked' || fail "status: $(coffer status)"
expect "$pid" "$(keyd)" "the agent"
coffer down >/dev/null || fail "down"
wait_for 5 gone "$pid"
