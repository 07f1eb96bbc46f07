#!/bin/bash
# Snapshots mounted: what they show while the volume goes on, who may read them, what is refused meanwhile, and that a death
# of any process is a pause for them, too.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m" "$T/a" "$T/b" "$T/e"
snapshot() { coffer volume snapshot "$@" >"$T/out" || fail "snapshot $*: $(cat "$T/out")"; }
# state DIR: everything that a tree shows.
state() { (cd "$1" && find . -printf '%p %m %u %s %T@ %l %n\n' | sort && find . -type f -exec sha256sum {} + | sort); }

step "under load, two of them, and each shows its own state"
coffer volume create v --size 512M --allow uid:0 >/dev/null
coffer mount v "$T/m" >/dev/null
mkdir "$T/m/tree"
for k in $(seq 100); do head -c $((k * 3000)) /dev/urandom >"$T/m/tree/$k"; done
ln "$T/m/tree/7" "$T/m/tree/hard"
ln -s 7 "$T/m/tree/soft"
mkdir "$T/m/busy"
(while :; do for k in 1 2 3 4 5 6 7 8; do head -c 300000 /dev/urandom >"$T/m/busy/$k"; done; rm -f "$T/m"/busy/*; done) 2>"$T/load" &
load=$!
sync -f "$T/m"
state "$T/m/tree" >"$T/first"
snapshot create v first
rm "$T/m"/tree/1*
for k in 2 3 4; do head -c 100000 /dev/urandom >"$T/m/tree/$k"; done
mv "$T/m/tree/5" "$T/m/tree/moved"
sync -f "$T/m"
state "$T/m/tree" >"$T/second"
snapshot create v second
rm -r "$T/m/tree"
snapshot mount v first "$T/a"
expect "v@first is mounted at $T/a" "$(cat "$T/out")" "what is said"
coffer volume snapshot mount v second "$T/b" --json | grep -q '"mountpoint"' || fail "JSON"
both() { state "$T/a/tree" | diff "$T/first" - || fail "first, $1"; state "$T/b/tree" | diff "$T/second" - || fail "second, $1"; }
both "at first"
grep -q " $T/a .*\bro\b" /proc/mounts || fail "not read-only: $(grep " $T/a " /proc/mounts)"
one_line 1 'Read-only' touch "$T/a/new"
one_line 1 'Read-only' rm "$T/a/tree/7"
mount -i -o remount,rw "$T/a" || true # whoever is root may do that to the kernel's side of it, not to the server's
for what in "touch $T/a/new" "rm $T/a/tree/7" "chmod 0 $T/a/tree/7" "truncate -s 1 $T/a/tree/7" "mkdir $T/a/d"; do
    one_line 1 'Read-only' $what
done
{ echo x >>"$T/a/tree/7"; } 2>/dev/null && fail "something was appended: nothing may get into the kernel's cache"
snapshot ls v
grep -Eq '^first .* yes$' "$T/out" || fail "ls: $(cat "$T/out")"
coffer volume ls | grep -q '@' && fail "a snapshot is listed as a volume"

step "what is refused while they are mounted"
one_line 1 'v@first is mounted: unmount it' coffer volume snapshot rm v first
one_line 1 'is a mount already' coffer volume snapshot mount v first "$T/a"
one_line 1 'volume v: there is no snapshot of that name' coffer volume snapshot mount v third "$T/a"
one_line 1 'no such volume' coffer volume snapshot mount w first "$T/a"
one_line 1 'letter or digit' coffer volume snapshot mount v ../first "$T/a"
one_line 1 'make the directory first' coffer volume snapshot mount v first "$T/nowhere"
one_line 1 'give an empty directory' coffer volume snapshot mount v first "$T"
one_line 2 'operand|missing|needs' coffer volume snapshot mount v first
# Names of mounted snapshots are not names of volumes.
one_line 1 'letter or digit|no such volume' coffer mount v@first "$T/e"
one_line 1 'letter or digit|no such volume' coffer volume rm v@first
one_line 1 'letter or digit|no such volume' coffer volume snapshot create v@first x
one_line 1 'letter or digit|no such volume' coffer volume export v@first --key-file "$T/key"

step "only those read them who may read the volume"
as() { setpriv --reuid "$1" --regid "$1" --clear-groups "${@:2}"; }
chmod 755 "$T" "$T/m" # the tree is open to all; the grant is not
as 12345 ls "$T/a" >/dev/null 2>&1 && fail "uid 12345 reads the snapshot"
audited '"refuse".*uid 12345' "the refusal"
coffer policy allow v uid:12345,ro >/dev/null
as 12345 cat "$T/a/tree/7" | cmp - "$T/b/tree/7" || fail "a new rule of the volume does not hold for the snapshot"

step "a server's death is a pause"
for k in 1 2 3; do
    (state "$T/a/tree" >"$T/through-$k") &
    reader=$!
    kill -9 "$(server_pid v@first)" || fail "no server of the snapshot"
    wait $reader || fail "a reader failed: round $k"
    diff "$T/first" "$T/through-$k" || fail "content, round $k"
done
exec 5<"$T/a/tree/7"
coffer volume restart-server v@first >/dev/null || fail "restart-server of a snapshot"
coffer volume restart-server --all >"$T/out" || fail "restart-server --all"
cmp - "$T/a/tree/7" <&5 || fail "an open file after restart-server"
exec 5<&-
one_line 1 'no such volume, or snapshot that is mounted: v@third' coffer volume restart-server v@third
both "after its servers' deaths"

step "cofferd and the key agent die"
old=$(server_pid v@second)
kill -9 "$(cofferd_pid)"
cofferd_start
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
expect "$old" "$(server_pid v@second)" "the server, which a new cofferd finds again"
both "with a new cofferd"
kill -9 "$(cofferd_pid)" "$(server_pid v@first)"
cofferd_start
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
both "with a new cofferd and a new server"
many=$(seq 6)
for k in $many; do
    mkdir -p "$T/many-$k"
    snapshot create v "many-$k"
    snapshot mount v "many-$k" "$T/many-$k"
    ls "$T/many-$k" >/dev/null
done
# Children that it had started, and that are nothing yet, do not outlive it.
forks_gone() { [ -z "$(pgrep -f "^cofferd --root $T/c( |\$)" | grep -vx "$1")" ]; }
for round in $(seq 5); do
    for k in $many; do kill -9 "$(server_pid "v@many-$k")"; done
    sleep "0.0$((10 + RANDOM % 90))"
    old=$(cofferd_pid)
    kill -9 "$old" # while it starts the next ones
    wait_for 5 forks_gone "$old"
    cofferd_start
    coffer unlock --key-file "$T/key" >/dev/null || fail "unlock, round $round"
    for k in $many; do wait_for 20 ls "$T/many-$k/busy"; done
done
for k in $many; do
    coffer umount "$T/many-$k" >/dev/null || fail "umount"
    snapshot rm v "many-$k"
done
both "after all that"
kill $load || fail "the load has ended: a death was not a pause for the volume"
wait $load 2>/dev/null || true
coffer lock >/dev/null
ls "$T/a" >/dev/null 2>&1 && fail "a locked volume's snapshot is listed"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
both "after lock and unlock"

step "the volume goes on without them, and they without the volume"
kill -9 "$(server_pid v)"
ls "$T/m/busy" >/dev/null || fail "the volume after its server's death"
coffer volume check v --data >"$T/out" || fail "check beside mounted snapshots: $(cat "$T/out")"
coffer umount "$T/m" >/dev/null
both "of a volume that is not mounted"
one_line 1 'snapshot of volume v is mounted: unmount it' coffer volume rm v
one_line 1 'snapshot of volume v is mounted: unmount it' coffer volume check v --repair
coffer mount v "$T/m" >/dev/null
rm -rf "$T/m"/*
for k in 1 2 3 4; do head -c 40000000 /dev/urandom >"$T/m/more-$k" && sync -f "$T/m" && rm "$T/m/more-$k"; done
both "after the volume was written over"
kill -9 "$(server_pid v@first)" "$(server_pid v@second)"
both "and opened again"
coffer umount "$T/m" >/dev/null

step "unmounted, they can go"

snapshot mount v first "$T/e"
coffer umount "$T/a" >/dev/null
state "$T/e/tree" | diff "$T/first" - || fail "mounted twice, unmounted once"
coffer umount "$T/e" >/dev/null
coffer umount "$T/b" >/dev/null
wait_for 5 test -z "$(server_pid v@first)$(server_pid v@second)"
snapshot ls v
grep -q 'yes$' "$T/out" && fail "ls: $(cat "$T/out")"
grep -q '@' "$T/c/cofferd.json" && fail "cofferd.json: $(cat "$T/c/cofferd.json")"
snapshot rm v first
one_line 1 'there is no snapshot of that name' coffer volume snapshot mount v first "$T/a"
coffer volume check v --data | grep -qx 'v: clean' || fail "check"

step "a volume that was put back is not shown by its snapshots either"
data=$(echo "$T"/c/volumes/*/data)
cp -a "$(dirname "$data")" "$T/older"
coffer mount v "$T/m" >/dev/null
for k in 1 2 3; do echo "$k" >"$T/m/f" && sync -f "$T/m"; coffer volume check v >/dev/null; done
coffer umount "$T/m" >/dev/null
snapshot mount v second "$T/e"
for f in data log; do cat "$T/older/$f" >"$(dirname "$data")/$f"; done
one_line 2 'Input/output error' ls "$T/e" # mounted before, opened now
audited '"damage".*snapshot second: rollback: the files are of generation' "the rollback"
one_line 1 'older state.*accept-rollback' coffer volume snapshot mount v second "$T/b"
coffer umount "$T/e" >/dev/null
coffer volume accept-rollback v >/dev/null || fail "accept-rollback"
snapshot mount v second "$T/b"
state "$T/b/tree" | diff "$T/second" - || fail "after accept-rollback"
coffer umount "$T/b" >/dev/null

step "damage is EIO and a record"
snapshot mount v second "$T/b"
size=$(stat -c %s "$data")
python3 - "$data" "$size" <<'P'
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for at in range(1 << 20, int(sys.argv[2]) - 8, 4096):  # behind the superblocks
    b = os.pread(fd, 8, at)
    if b != bytes(8):
        os.pwrite(fd, bytes(x ^ 0x55 for x in b), at)
P
one_line 2 'Input/output error' ls "$T/b"
coffer umount "$T/b" >/dev/null
audited '"damage".*snapshot second: ' "the damage"

step "who mounted them is in the audit log"
audited '"mount".*snapshot first: at ' "a mount"
coffer volume rm v >/dev/null
