#!/bin/bash
# Where a service manager stores descriptors (systemd's FD store; here fdstore.py stands for it), cofferd and coffer-fs may be killed
# both at once: for whoever uses the mount that is a pause, no error. What is unmounted does not stay in the store.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m"
kill "$(cofferd_pid)"
ended() { [ -z "$(cofferd_pid)" ]; }
wait_for 10 ended
python3 "$(dirname "$0")/fdstore.py" "$T/notify" "$BUILD/cofferd" --root "$T/c" >"$T/store" 2>>"$T/c/cofferd.log" </dev/null &
up() { coffer status | grep -q unlocked; }
wait_for 20 up
coffer volume create t --size 512M --allow uid:0 >/dev/null
coffer mount t "$T/m" >/dev/null || fail "mount"
stored() { tail -n 1 "$T/store" | grep -qE -- "-> $1\$"; }
wait_for 5 stored 'fuse-t page-t'
dev=$(stat -c %d "$T/m")
step "both are killed, 5 times under load"
python3 "$(dirname "$0")/takeover.py" "$T/m" 24 >"$T/out" 2>&1 &
load=$!
for ((i = 1; i <= 5; i++)); do
    sleep "3.$((RANDOM % 900 + 100))"
    kill -0 $load 2>/dev/null || fail "the load ended at kill $i: $(cat "$T/out")"
    pid=$(server_pid t) daemon=$(cofferd_pid)
    kill -9 "$daemon" "$pid"
    next() { local now d; now=$(server_pid t) d=$(cofferd_pid); [ -n "$now" ] && [ "$now" != "$pid" ] && [ -n "$d" ] && [ "$d" != "$daemon" ]; }
    wait_for 20 next
done
wait $load || fail "$(cat "$T/out")"
step "$(cat "$T/out")"
expect "$dev" "$(stat -c %d "$T/m")" "the mount is another one"
wait_for 10 up
coffer umount "$T/m" >/dev/null || fail "umount"
wait_for 5 stored nothing
coffer volume check t --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"

step "a mount that ended while no cofferd ran is mounted anew, and not taken over"
coffer mount t "$T/m" >/dev/null || fail "mount"
pid=$(server_pid t)
conn=$(awk -v m="$T/m" '$5 == m {print $3}' /proc/self/mountinfo)
kill -9 "$(cofferd_pid)" "$pid"
echo 1 >"/sys/fs/fuse/connections/${conn#*:}/abort" 2>/dev/null || true
wait_for 20 up
usable() { touch "$T/m/usable"; }
wait_for 20 usable
coffer umount "$T/m" >/dev/null || fail "umount at the end"
