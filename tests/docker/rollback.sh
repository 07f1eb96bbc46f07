#!/bin/bash
# The whole volume put back to an older state (both files) between two mounts, with and without crashes of ours around it:
# refused with one line and an audit record until accept-rollback, and never refused when nobody put anything back.
source "$(dirname "$0")/lib.sh"
fixture none

coffer volume create v --size 64M --allow uid:0 >/dev/null
mkdir "$T/mnt" "$T/old" "$T/new" "$T/older"
files=$(dirname "$(find "$T/c/volumes" -name data)")
keep() { cp --sparse=always "$files/data" "$files/log" "$1/"; }
put_back() { cp --sparse=always "$1/data" "$1/log" "$files/"; }
mnt() { coffer mount v "$T/mnt" >/dev/null; }
umnt() { coffer umount "$T/mnt" >/dev/null || fail "umount"; }
say() { echo "$1" >"$T/mnt/f" && sync "$T/mnt/f"; }
# Mounting opens nothing yet; the first access does, and fails.
old_refused() {
    local before
    before=$(coffer audit --json | grep -c '"event":"damage".*rollback: ' || true)
    mnt || fail "mount"
    refused "Input/output error" cat "$T/mnt/f"
    refused "Input/output error" touch "$T/mnt/g"
    umnt
    grep -q "volume v: cannot be opened: .*accept-rollback" "$T/c/cofferd.log" || fail "no line in the log"
    [ "$(coffer audit --json | grep -c '"event":"damage".*rollback: ')" -gt "$before" ] || fail "no audit record"
    one_line 1 "older state.*accept-rollback" coffer volume check v
}
heard() { expect "$1" "$(cat "$T/mnt/f")" "the file's content"; }

mnt && say one
umnt
keep "$T/older"
mnt && say two
umnt
keep "$T/old"
mnt && heard two && say three
umnt
keep "$T/new"

step "an older state is refused"
for state in older old; do
    put_back "$T/$state"
    old_refused
done
audited '"event":"damage".*rollback: the files are of generation [0-9]+, and [0-9]+ was seen' "the rollback"

step "the newest one is not"
put_back "$T/new"
mnt || fail "the newest state"
heard three && umnt

step "accepted: the older state opens, and the newer one is refused from then on"
put_back "$T/old"
coffer volume accept-rollback v >/dev/null || fail "accept-rollback"
audited '"event":"accept-rollback".*"volume":"v"' "the acceptance"
mnt || fail "the accepted state"
heard two && say four && umnt
keep "$T/older"
mnt || fail "a second mount of the new branch"
heard four && umnt
put_back "$T/new"
old_refused
put_back "$T/old"
old_refused
coffer volume accept-rollback v >/dev/null
mnt || fail "the state accepted a second time"
heard two && umnt
refused "no such volume" coffer volume accept-rollback nobody

step "lock and unlock: the last checkpoint counts, though the keystore is locked by then"
mnt && say five
keep "$T/old" # while it is open: what a snapshot below it would hold
coffer lock >/dev/null || fail "lock"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
cat "$T/mnt/f" >/dev/null && umnt
keep "$T/new"
put_back "$T/old"
old_refused
put_back "$T/new"
mnt || fail "after lock and unlock"
heard five

step "kill -9 of the agent while the volume changes: what it missed it is told later"
exec 9<>"$T/mnt/f"
kill -9 "$(agent_pid)"
echo six >&9
wait_for 20 coffer unlock --key-file "$T/key"
exec 9>&-
heard six && umnt
keep "$T/new"
mnt || fail "after the agent's death"
heard six && say seven
exec 9<>"$T/mnt/f"
kill -9 "$(agent_pid)"
echo eight >&9
exec 9>&-
kill -9 "$(server_pid v)"
wait_for 20 coffer unlock --key-file "$T/key"
coffer umount "$T/mnt" >/dev/null 2>&1 || true
wait_for 20 mnt
heard eight && umnt
put_back "$T/new"
old_refused
coffer volume accept-rollback v >/dev/null
mnt && heard six && umnt
expect 0 "$(coffer audit --json | grep -c generations-missing)" "records of a lost file"

step "kill -9 of everything between any two steps never makes a refusal"
for i in $(seq 12); do
    mnt || fail "round $i: $(tail -n 3 "$T/c/cofferd.log")"
    say "round $i"
    coffer umount "$T/mnt" >/dev/null 2>&1 &
    sleep "0.0$((i * 2 % 10))$((i % 10))"
    for pid in $(server_pid v) $(agent_pid); do kill -9 "$pid" 2>/dev/null || true; done
    wait || true
    coffer umount "$T/mnt" >/dev/null 2>&1 || true
    wait_for 20 coffer unlock --key-file "$T/key"
    wait_for 20 mnt
    heard "round $i" && umnt
done

step "the agent's file: changed, it is noticed; gone, that is in the log"
coffer lock >/dev/null
cp "$T/c/keystore/generations" "$T/g"
printf x | dd of="$T/c/keystore/generations" bs=1 seek=70 conv=notrunc status=none
one_line 1 "generations" coffer unlock --key-file "$T/key"
rm "$T/c/keystore/generations"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock without the file"
audited '"event":"generations-missing"' "the loss"
mnt && heard "round 12" && umnt
