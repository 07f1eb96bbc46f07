#!/bin/bash
# Snapshots on the command line: made under load and of a volume that nobody uses, listed, removed; what they keep and give back.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m" "$T/n"
names() { coffer volume snapshot ls "$1" --json | python3 -c 'import json, sys; print(*[s["name"] for s in json.load(sys.stdin)["snapshots"]])'; }
used() { coffer volume inspect "$1" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["volume"]["used"])'; }

step "names and errors"
coffer volume create snap --size 256M --allow uid:0 >/dev/null
one_line 1 'no such volume' coffer volume snapshot create none a
one_line 1 'letter or digit' coffer volume snapshot create snap ../x
one_line 1 'letter or digit' coffer volume snapshot create snap ''
one_line 1 'no snapshot of that name' coffer volume snapshot rm snap a
one_line 2 'operand|missing|needs' coffer volume snapshot create snap
expect "" "$(names snap)" "snapshots of a new volume"

step "of a volume that nobody uses"
coffer volume snapshot create snap empty | grep -qx created || fail "create"
one_line 1 'there is a snapshot of that name' coffer volume snapshot create snap empty
expect empty "$(names snap)" "snapshots"

step "of a volume in use, under load"
coffer mount snap "$T/m" >/dev/null
head -c 30000000 /dev/urandom >"$T/big"
cp "$T/big" "$T/m/big"
sync -f "$T/m"
(while :; do for k in 1 2 3 4 5 6 7 8; do head -c 300000 /dev/urandom >"$T/m/load-$k"; done; rm -f "$T/m"/load-*; done) &
load=$!
for k in 1 2 3 4 5; do
    coffer volume snapshot create snap "busy-$k" >/dev/null || fail "create $k under load"
done
kill $load
wait $load 2>/dev/null || true
one_line 1 'there is a snapshot of that name' coffer volume snapshot create snap busy-1
one_line 1 'no snapshot of that name' coffer volume snapshot rm snap busy
expect "busy-1 busy-2 busy-3 busy-4 busy-5 empty" "$(names snap)" "snapshots"
coffer volume snapshot ls snap | grep -Eq '^busy-3 +20[0-9]{2}-[0-9-]*T[0-9:]*Z +[0-9.]+[KMG]' || fail "ls: $(coffer volume snapshot ls snap)"
coffer volume check snap --data | grep -qx 'snap: clean' || fail "check with snapshots in use"

step "space comes back when they go"
rm -f "$T/m"/*
sync -f "$T/m"
coffer volume check snap >/dev/null # a checkpoint
[ "$(used snap)" -gt 30000000 ] || fail "the snapshots keep nothing: $(used snap)"
kill -9 "$(server_pid snap)" # the next server knows them
ls "$T/m" >/dev/null
for k in 1 2 3 4 5; do coffer volume snapshot rm snap "busy-$k" | grep -qx removed || fail "rm $k"; done
[ "$(used snap)" -lt 10000000 ] || fail "nothing came back: $(used snap)"
coffer umount "$T/m" >/dev/null
expect empty "$(names snap)" "snapshots"
coffer volume check snap --data | grep -qx 'snap: clean' || fail "check"
coffer volume snapshot rm snap empty | grep -qx removed || fail "rm"
expect "" "$(names snap)" "snapshots"

step "a full volume says so, and a removed snapshot makes room"
coffer mount snap "$T/m" >/dev/null
cp "$T/big" "$T/m/keep"
sync -f "$T/m"
coffer volume snapshot create snap full >/dev/null || fail "create"
head -c 300000000 /dev/zero >"$T/m/fill" 2>/dev/null && sync -f "$T/m" 2>/dev/null && sync "$T/m/fill" 2>/dev/null && fail "the volume has no limit"
sync -f "$T/m" 2>/dev/null || true
rm -f "$T/m/fill" "$T/m/keep"
cmp -s "$T/big" "$T/m/keep" && fail "it is still there"
coffer volume snapshot rm snap full | grep -qx removed || fail "rm when it is full"
cp "$T/big" "$T/m/again" && sync -f "$T/m" && cmp "$T/big" "$T/m/again" || fail "no room"
coffer umount "$T/m" >/dev/null

step "who made them is in the audit log"
coffer audit | grep -q 'made the snapshot busy-3' || fail "no audit record of the making"
coffer audit | grep -q 'removed the snapshot busy-3' || fail "no audit record of the removal"
coffer volume rm snap >/dev/null
