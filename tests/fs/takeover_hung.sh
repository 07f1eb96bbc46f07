#!/bin/bash
# A server is killed while one of its threads waits in the kernel, in a notification, for a lock that is held by who waits for an
# answer of that server: such a process does not end before another one answers. So that takes over without waiting for the end.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
# Where this fails somebody waits unkillably: the connection's end frees him.
conn=
test_cleanup() { [ -e "/sys/fs/fuse/connections/$conn/abort" ] && echo 1 >"/sys/fs/fuse/connections/$conn/abort"; }
coffer volume create t --size 512M --allow uid:0 >/dev/null
mkdir "$T/m"
coffer mount t "$T/m" >/dev/null || fail "mount"
mountpoint -q /sys/fs/fuse/connections || mount -t fusectl fusectl /sys/fs/fuse/connections
dev=$(stat -c %d "$T/m") && conn=$((dev & 255 | dev >> 12 & 1048320))
[ -d "/sys/fs/fuse/connections/$conn" ] || fail "there is no connection $conn"
mkdir "$T/m/d"
for i in 1 2 3; do echo kept >"$T/m/f$i"; done
sync -f "$T/m/f1"
pid=$(server_pid t)

step "answers are held up, all but notifications; a process makes a directory, and so holds the root's lock"
# Which thread notifies is told by who does when the volume is locked: the others are held up.
strace -qq -f -p "$pid" -e trace=writev -e signal=none -o "$T/trace" &
tracer=$!
traced() { grep -q '^TracerPid:.*[1-9]' "/proc/$pid/status"; }
wait_for 10 traced
coffer lock >/dev/null || fail "lock"
kill -INT $tracer && wait $tracer || true
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
notifier=$(awk '/writev\(7, .*error=2|writev\(7.*iov_len=16/ {print $1}' "$T/trace" | sort | uniq -c | sort -rn | awk 'NR == 1 {print $2}')
[ -n "$notifier" ] || { head -n 3 "$T/trace"; fail "nobody has notified"; }
ls "$T/m" >/dev/null || fail "ls"
tracers=()
for t in /proc/"$pid"/task/*; do
    t=${t##*/}
    [ "$t" = "$notifier" ] && continue
    strace -qq -p "$t" -e trace=writev -e inject=writev:delay_enter=60s -o /dev/null 2>/dev/null &
    tracers+=($!)
done
sleep 1
mkdir "$T/m/new" 2>"$T/err" &
maker=$!
sleep 1
coffer lock >/dev/null 2>&1 &
locker=$!
hung() { grep -q '^State:.*D' "/proc/$pid/task/$notifier/status"; }
wait_for 20 hung

step "the server is killed, and does not end"
start=$(date +%s%N)
kill -9 "$pid"
kill -9 "${tracers[@]}" 2>/dev/null || true
wait "${tracers[@]}" 2>/dev/null || true
sleep 1
[ -d "/proc/$pid" ] || fail "it has ended: this shows nothing"
grep -q '^State:.*D' "/proc/$pid/task/$notifier/status" || fail "its thread does not hang"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
next() { local now; now=$(server_pid t); [ -n "$now" ] && [ "$now" != "$pid" ]; }
wait_for 20 next
status=0
timeout 20 tail --pid=$maker -f /dev/null || fail "the process still waits for its directory"
wait $maker || status=$?
expect 0 $status "making a directory ($(cat "$T/err"))"
step "the directory is there after $((($(date +%s%N) - start) / 1000000)) ms"
[ -d "$T/m/new" ] || fail "it is not there"
ended() { [ ! -d "/proc/$pid" ]; }
wait_for 10 ended
wait $locker || true # the old server has not said that it locked the volume
expect kept "$(cat "$T/m/f2")" "a file"
audited 'waits in the kernel'
coffer lock >/dev/null || fail "lock"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"
