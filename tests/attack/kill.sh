#!/bin/bash
# kill -9 of cofferd or of the agent while volumes are made, removed and unlocked: after the next start and unlock every
# volume that is listed has its content, and no directory is left that belongs to none.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m"

# pick NAME...: one of them.
pick() {
    local all=("$@")
    echo "${all[RANDOM % $#]}"
}

start_again() {
    coffer status >"$T/out" 2>&1 || cofferd_start
    opened() { coffer unlock --key-file "$T/key"; }
    wait_for 20 opened
}

# listed MEMBER: that of each volume, in order.
listed() {
    coffer volume ls --json | python3 -c '
import json, sys
print("\n".join(sorted(v[sys.argv[1]] for v in json.load(sys.stdin)["volumes"])))' "$1"
}

whole() {
    local names v dirs
    names=$(listed name)
    for v in $names; do
        # One whose removal was broken off after its key was gone can only be removed.
        if ! coffer mount "$v" "$T/m" >/dev/null 2>"$T/err"; then
            coffer volume rm "$v" >/dev/null || fail "$v can be neither mounted nor removed: $(cat "$T/err")"
            continue
        fi
        if ! echo "$v" >"$T/m/name" 2>"$T/err"; then
            coffer umount "$T/m" >/dev/null
            coffer policy show "$v" >/dev/null 2>&1 && fail "$v cannot be written: $(cat "$T/err")"
            coffer volume rm "$v" >/dev/null || fail "$v can be neither used nor removed"
            continue
        fi
        expect "$v" "$(cat "$T/m/name")" "what was written into $v"
        coffer umount "$T/m" >/dev/null || fail "umount of $v"
    done
    names=$(listed id)
    dirs=$(find "$T/c/volumes" -mindepth 1 -maxdepth 1 -printf '%f\n' | sort)
    expect "$names" "$dirs" "the directories below volumes"
}

step "what a create left that was broken off goes at the next unlock"
python3 - "$T/c/run/keyd.sock" "$T/c/volumes" "$(dirname "$0")" <<'END' || fail "cannot make a record"
import os, socket, sys
sys.path.insert(0, sys.argv[3])
from keyd_test import Chan, Params, VOLUME_ADD, VOLUME_GET, Volume
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
for name in b"left1", b"left2", b"left3":
    kind, body, _ = Chan(sock).call(VOLUME_ADD, Volume(name=name, params=Params(block_size=4096, size_limit=64 << 20)))
    assert kind == VOLUME_GET
    dir = sys.argv[2] + "/" + bytes(Volume.from_buffer_copy(body).params.id).hex()
    os.mkdir(dir, 0o700)
    open(dir + "/data", "w").close()
END
expect 3 "$(find "$T/c/volumes" -mindepth 1 -maxdepth 1 | wc -l)" "directories"
coffer lock >/dev/null
coffer unlock --key-file "$T/key" >/dev/null
whole

step "kill -9 at any moment"
for round in $(seq "${1:-40}"); do
    v=$(pick a b c)
    { coffer volume create "$v" --size 64M --allow uid:0 || coffer volume rm "$v"; } >"$T/out" 2>&1 &
    sleep "0.0$((RANDOM % 90 + 10))"
    pid=$(pick "$(cofferd_pid)" "$(agent_pid)")
    [ -n "$pid" ] && kill -9 "$pid" 2>/dev/null
    wait $! || true
    start_again
    whole
done
coffer audit verify >/dev/null || fail "the audit log does not verify"
step "$round rounds"
exit 0
