#!/bin/bash
# The times of files that the kernel caches are those of the writes, not those of the moment when the cache was written
# back: they stay through that, through a forgetting kernel, a server that dies, a lock and an unmounting.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m"
coffer volume create v --size 256M --profile general --allow uid:0 >/dev/null || fail "volume create"
coffer mount v "$T/m" >/dev/null || fail "mount"
times() { stat -c '%n %s %y' "$T"/m/[fgo]*; }
forget() { sync -f "$T/m" && echo 3 >/proc/sys/vm/drop_caches; }
# same WHAT: the times are those of $T/times
same() { times | diff "$T/times" - >"$T/diff" || fail "$1: $(grep -c '^>' "$T/diff") files have other times: $(head -n 4 "$T/diff")"; }

# twice NAME [PID]: files written again within the clock's tick, after the kernel has sent the time; then PID is killed.
twice() {
    python3 - "$T/m/$1" "${2:-0}" <<'P'
import os, sys, time
fds = [os.open(f"{sys.argv[1]}{i}", os.O_CREAT | os.O_RDWR, 0o644) for i in range(100)]
for i, fd in enumerate(fds):
    size = 100 if i % 2 else 70000  # in the inode's item, in blocks
    os.pwrite(fd, b"a" * size, 0)
    os.fsync(fd)
    os.pwrite(fd, b"b" * size, 0)
time.sleep(0.05)
if int(sys.argv[2]):
    os.kill(int(sys.argv[2]), 9)
for fd in fds:
    os.fsync(fd)
P
    times >"$T/times"
    forget
}
step "written back after the time was sent"
twice f
same "written back"
step "the same by a server that has taken over"
twice g "$(server_pid v)"
same "written back after a takeover"

step "set by hand, with written data in the cache"
python3 - "$T/m/old" <<'P'
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o644)
os.pwrite(fd, b"a" * 100000, 0)
os.utime(fd, (10**9, 10**9))
P
forget
expect 1000000000 "$(stat -c %Y "$T/m/old")" "the time that was set"

step "a lock that comes before the kernel sends the time, which is then refused"
touch -d 2001-01-01 "$T/m/f1"
sync -f "$T/m"
before=$(date +%s)
# Nothing else than the lock writes it back: a close would send the time, too.
coproc holder { exec python3 -c 'import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(fd, b"c" * 5000, 0)
print("written", flush=True)
sys.stdin.read()' "$T/m/f1"; }
read -r -t 10 -u "${holder[0]}" || fail "nothing was written"
coffer lock >/dev/null || fail "lock"
holder_pid=$! to=${holder[1]}
exec {to}>&-
wait "$holder_pid" || fail "what held the file open"
sync # of the volume, too; nobody is told that it fails
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
forget
[ "$(stat -c %Y "$T/m/f1")" -ge "$before" ] || fail "the time of what was written before the lock is lost: $(stat -c %y "$T/m/f1")"

times >"$T/times"
coffer umount "$T/m" >/dev/null || fail "umount"
coffer mount v "$T/m" >/dev/null || fail "mount"
same "after an unmounting"
coffer umount "$T/m" >/dev/null || fail "umount"
coffer volume check v --data >"$T/out" || fail "volume check: $(head -n 3 "$T/out")"
