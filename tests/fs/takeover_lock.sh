#!/bin/bash
# A mount that is locked after its server was taken over: what was written and not synced before is written, what the kernel
# had in its cache is gone from it, and only what it can have is invalidated, not every inode of the volume. Then the profile
# database is taken over under load; and a mount that no server can take over is given up after --takeover-timeout.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
FILES=5000
mkdir "$T/bin" "$T/m" "$T/d"
cp "$BUILD/coffer" "$BUILD/cofferd" "$BUILD/coffer-keyd" "$BUILD/coffer-fs" "$T/bin/"
gone() { ! kill -0 "$1" 2>/dev/null; }
next() { local now; now=$(server_pid "$1"); [ -n "$now" ] && [ "$now" != "$pid" ]; }
takeover() {
    pid=$(server_pid "$1")
    kill -9 "$pid"
    wait_for 20 next "$1"
}
cached() { python3 "$(dirname "$0")/cached.py" "$@"; }

step "$FILES files, some of them open, read or dirty; then the server dies"
coffer volume create t --size 512M --allow uid:0 >/dev/null
coffer mount t "$T/m" >/dev/null || fail "mount"
python3 - "$T/m" $FILES <<'P' || fail "making files"
import os, sys
d, n = sys.argv[1], int(sys.argv[2])
for i in range(n):
    if i % 500 == 0: os.mkdir(f"{d}/{i // 500}")
    os.close(os.open(f"{d}/{i // 500}/{i}", os.O_CREAT | os.O_WRONLY))
open(f"{d}/read", "w").write("r" * 100000)
os.sync()
P
echo 2 >/proc/sys/vm/drop_caches # forgotten: nothing of these is anywhere
cat "$T/m/read" >/dev/null
exec 8>"$T/m/dirty" 7<"$T/m/read"
head -c 300000 /dev/zero | tr '\0' d >&8
expect "25 0" "$(cached 7 100000) $(dd if="$T/m/0/0" 2>/dev/null | wc -c)" "pages in the cache"
takeover t
head -c 50000 /dev/zero | tr '\0' e >&8

step "locked: few notifications, everything is written, nothing is left in the cache"
pid=$(server_pid t)
strace -qq -f -p "$pid" -e trace=writev -o "$T/trace" &
tracer=$!
traced() { grep -q '^TracerPid:.*[1-9]' "/proc/$pid/status"; }
wait_for 10 traced
coffer lock >/dev/null || fail "lock"
kill -INT $tracer && wait $tracer || true
n=$(grep -c 'writev(7' "$T/trace")
step "$n answers and notifications of a volume of $FILES files"
[ "$n" -gt 2 ] && [ "$n" -lt 500 ] || fail "as many notifications as that: $n"
expect 0 "$(cached 7 100000)" "pages in the cache of a locked volume"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
exec 7<&- 8>&-
expect 350000 "$(stat -c %s "$T/m/dirty")" "the size of what was dirty"
expect "$( (head -c 300000 /dev/zero | tr '\0' d; head -c 50000 /dev/zero | tr '\0' e) | md5sum)" "$(md5sum <"$T/m/dirty")" "what was dirty"

step "what one server has left is handed on by the next"
takeover t
takeover t
cat "$T/m/read" >/dev/null
coffer lock >/dev/null || fail "lock"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
expect 100000 "$(wc -c <"$T/m/read")" "a file after all that"

step "locked in the midst of a change, before the next server goes on: it waits for no unlocking, and nothing is left"
servers() { for p in $(pgrep -f '^coffer-fs serve t( |$)'); do [ -z "$(find "/proc/$p/fd" -lname "$T/*" -print -quit 2>/dev/null)" ] || echo "$p"; done; }
two() { [ "$(servers | wc -l)" = 2 ]; }
none() { [ "$(cached 7 100000)" = 0 ]; }
exec 7<"$T/m/read"
cat "$T/m/read" >/dev/null
old=$(server_pid t)
kill -STOP "$old"
coffer volume restart-server t >/dev/null & change=$!
wait_for 10 two
sleep 0.5
next=$(servers | grep -v "^$old\$")
kill -STOP "$next"
kill -CONT "$old"
wait_for 10 gone "$old"
wait $change || fail "restart-server"
expect 25 "$(cached 7 100000)" "pages in the cache"
coffer lock >/dev/null 2>&1 && fail "the volume was locked by a server that stood still"
kill -CONT "$next"
wait_for 5 none
timeout 5 stat "$T/m/read" >/dev/null 2>&1 && fail "stat on a locked volume"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
expect 100000 "$(wc -c <"$T/m/read")" "a file after that"
exec 7<&-

step "profile database is taken over under load"
coffer volume create d --size 512M --profile database --allow uid:0 >/dev/null
coffer mount d "$T/d" >/dev/null || fail "mount"
python3 "$(dirname "$0")/takeover.py" "$T/d" 20 >"$T/out" 2>&1 &
load=$!
for i in 1 2 3 4; do
    sleep "3.$((RANDOM % 900 + 100))"
    kill -0 $load 2>/dev/null || fail "the load ended at kill $i: $(cat "$T/out")"
    takeover d
done
wait $load || fail "$(cat "$T/out")"
step "$(cat "$T/out")"
coffer umount "$T/d" >/dev/null || fail "umount"
coffer volume check d --data >"$T/out" || fail "check: $(head -n 5 "$T/out")"

step "no server can take over: after the time that is given for it an error, not a hang"
status=0
"$BUILD/cofferd" --takeover-timeout 0 >/dev/null 2>&1 || status=$?
expect 2 $status "cofferd --takeover-timeout 0"
kill "$(cofferd_pid)"
ended() { [ -z "$(cofferd_pid)" ]; }
wait_for 10 ended
OLD=$BUILD
BUILD=$T/bin
(setsid bash -c "exec -a cofferd '$BUILD/cofferd' --root '$T/c' --takeover-timeout 4" >>"$T/c/cofferd.log" 2>&1 </dev/null &)
up() { coffer status; }
wait_for 10 up
touch "$T/m/before" || fail "the mount after cofferd's restart"
printf '#!/bin/false\n' >"$T/bin/coffer-fs"
start=$(date +%s%N)
kill -9 "$(server_pid t)"
status=0
timeout 30 touch "$T/m/during" 2>"$T/err" || status=$?
ms=$((($(date +%s%N) - start) / 1000000))
expect 1 $status "a change on the mount that was given up (124: it hangs)"
step "$(cat "$T/err") after $ms ms"
[ $ms -gt 3500 ] && [ $ms -lt 12000 ] || fail "given up after $ms ms, not 4 s"
cp "$OLD/coffer-fs" "$T/bin/coffer-fs.new" && mv "$T/bin/coffer-fs.new" "$T/bin/coffer-fs"
anew() { [ -e "$T/m/before" ]; }
wait_for 40 anew
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check t --data >"$T/out" || fail "check at the end: $(head -n 5 "$T/out")"
