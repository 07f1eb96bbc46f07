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

step "exports of snapshots, and increments"
list() { (cd "$1" && find . -printf '%p %m %u %s %T@ %l %n\n' | sort); }
head -c 64 /dev/urandom >"$T/backup-key"
chmod 600 "$T/backup-key"
export_to() {
    local out=$1
    shift
    coffer volume export snap-x --key-file "$T/backup-key" "$@" >"$out"
}
coffer volume create snap-x --size 256M --allow uid:0 >/dev/null
coffer mount snap-x "$T/m" >/dev/null
cp "$T/big" "$T/m/big"
mkdir "$T/m/dir"
for k in $(seq 200); do echo "file $k" >"$T/m/dir/f$k"; done
ln "$T/m/big" "$T/m/dir/hard"
ln -s ../big "$T/m/dir/soft"
coffer umount "$T/m" >/dev/null
coffer mount snap-x "$T/m" >/dev/null
ls "$T/m" >/dev/null
coffer volume snapshot create snap-x a >/dev/null || fail "create a"
cp -a "$T/m" "$T/state-a"
list "$T/m" >"$T/list-a"
printf 'changed' | dd of="$T/m/big" bs=1 seek=5000000 conv=notrunc status=none
rm "$T/m/dir"/f1*
mv "$T/m/dir/f2" "$T/m/moved"
mkdir "$T/m/more"
head -c 100000 /dev/urandom >"$T/m/more/new"
setfattr -n user.k -v v "$T/m/moved"
truncate -s 3000 "$T/m/dir/f3"
sync -f "$T/m"
coffer volume snapshot create snap-x b >/dev/null || fail "create b"
rm -r "$T/m/more"
echo last >"$T/m/dir/f4"
# The kernel may tell the time of a write before it sends the write: what is compared below is what the volume has.
coffer umount "$T/m" >/dev/null
coffer mount snap-x "$T/m" >/dev/null
ls "$T/m" >/dev/null
export_to "$T/A" --snapshot a || fail "export of a snapshot"
export_to "$T/AB" --since a --snapshot b || fail "an increment"
export_to "$T/BC" --since b || fail "an increment up to now"
[ "$(stat -c %s "$T/AB")" -lt 1500000 ] || fail "an increment of $(stat -c %s "$T/AB") bytes"
one_line 1 'no snapshot of that name' export_to /dev/null --since c
one_line 1 'no snapshot of that name' export_to /dev/null --snapshot c
one_line 1 'not the older one' export_to /dev/null --since b --snapshot a
one_line 1 'letter or digit' export_to /dev/null --since ../b
verify() { coffer volume verify --key-file "$T/backup-key" "$@" <"$T/A"; }
verify --increment "$T/AB" --increment "$T/BC" | grep -qx 'the export is whole' || fail "verify of the chain"
one_line 1 'is based on generation' verify --increment "$T/BC"
one_line 1 'nothing-there: No such file' verify --increment "$T/nothing-there"
cp "$T/AB" "$T/altered"
printf x | dd of="$T/altered" bs=1 seek=70000 conv=notrunc status=none
one_line 1 'does not authenticate' verify --increment "$T/altered"
import() { coffer volume import snap-y --allow uid:0 --size 256M --key-file "$T/backup-key" "$@" <"$T/A"; }
for bad in altered BC; do
    import --increment "$T/$bad" >"$T/out" 2>&1 && fail "import of $bad: $(cat "$T/out")"
    coffer volume ls | grep -q snap-y && fail "an import of $bad left a volume"
done
import >/dev/null || fail "import of the snapshot"
coffer mount snap-y "$T/n" >/dev/null
list "$T/n" | cmp - "$T/list-a" || fail "the snapshot's names, modes, times"
diff -r --no-dereference "$T/state-a" "$T/n" || fail "the snapshot's content"
coffer umount "$T/n" >/dev/null
coffer volume rm snap-y >/dev/null
import --increment "$T/AB" --increment "$T/BC" | grep -qx 'imported snap-y' || fail "import of the chain"
coffer mount snap-y "$T/n" >/dev/null
diff <(list "$T/m") <(list "$T/n") || fail "names, modes, times after the increments"
diff -r --no-dereference "$T/m" "$T/n" || fail "content after the increments"
expect v "$(getfattr --only-values -n user.k "$T/n/moved")" "an attribute"
coffer umount "$T/m" >/dev/null
coffer umount "$T/n" >/dev/null
coffer volume check snap-y --data | grep -qx 'snap-y: clean' || fail "check"
export_to "$T/AB2" --since a --snapshot b || fail "an increment of a volume that nobody uses"
verify --increment "$T/AB2" --increment "$T/BC" | grep -qx 'the export is whole' || fail "verify of the other chain"
coffer volume rm snap-x >/dev/null
coffer volume rm snap-y >/dev/null

step "who made them is in the audit log"
coffer audit >"$T/out" # whole: a grep that has seen enough would end it
grep -q 'made the snapshot busy-3' "$T/out" || fail "no audit record of the making"
grep -q 'removed the snapshot busy-3' "$T/out" || fail "no audit record of the removal"
coffer volume rm snap >/dev/null
