#!/bin/bash
# A coffer-fs that has been taken over (hostile.c) cannot bring cofferd down.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m" "$T/d" "$T/bin"
cp "$BUILD/coffer" "$BUILD/cofferd" "$BUILD/coffer-keyd" "$T/bin"
cp "$BUILD/tests/attack/hostile" "$T/bin/coffer-fs"
coffer volume create v --size 64M --allow uid:0 >/dev/null
coffer volume create deaf --size 64M --allow uid:0 >/dev/null
coffer down >/dev/null
BUILD=$T/bin
cofferd_start
coffer unlock --key-file "$T/key" >/dev/null
pid=$(cofferd_pid)
lives() {
    coffer status --json | grep -q '"agent":true' || fail "cofferd does not answer after $1"
    expect "$pid" "$(cofferd_pid)" "cofferd's process after $1"
}

step "volumes that are not mounted"
for command in "resize v 128M" "check v" "check v --repair"; do
    # shellcheck disable=SC2086
    coffer volume $command >"$T/out" 2>&1 || true
    lives "$command"
done

step "its server"
coffer mount v "$T/m" >/dev/null
for command in "scrub v" "resize v 256M" "check v" "inspect v" ls; do
    # shellcheck disable=SC2086
    coffer volume $command >"$T/out" 2>&1 || true
    lives "$command, mounted"
done

step "a client that reads nothing of many lines holds up nobody else"
python3 - "$T/c/run/cofferd.sock" <<'END' || fail "others waited"
import json, socket, struct, sys, time
def ask(request, read=True):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    s.settimeout(8)
    s.connect(sys.argv[1])
    text = json.dumps(request).encode()
    s.sendall(struct.pack("<I", len(text)) + text)
    return s.recv(1000) if read else s
deaf = ask({"cmd": "volume check", "name": "v"}, read=False)
time.sleep(1)
for _ in range(4):
    start = time.monotonic()
    ask({"cmd": "volume ls"})
    assert time.monotonic() - start < 4, time.monotonic() - start
END
n=$(coffer audit --json | grep -c 'a note')
[ "$n" -le 20 ] || fail "$n notes are in the audit log"

step "one that reads nothing, on a channel that it made to block, holds up nobody else"
coffer mount deaf "$T/d" >/dev/null
for i in 1 2 3; do
    timeout 15 "$BUILD/coffer" --root "$T/c" volume inspect deaf >"$T/out" 2>&1 || true
    timeout 5 "$BUILD/coffer" --root "$T/c" volume ls >"$T/out" 2>&1 || fail "coffer volume ls: $(cat "$T/out")"
done
lives "a deaf server"
kill -9 "$(server_pid deaf)" || true
coffer umount "$T/d" >"$T/out" 2>&1 || true

grep -q $'\033' "$T/c/cofferd.log" && fail "its control characters are in the log"
coffer umount "$T/m" >"$T/out" 2>&1 || true
lives umount
exit 0
