#!/bin/bash
# coffer without a container engine: what the commands say and do, mounting in several places, rules by uid, locking
# under a mount, busy mounts, restarts. (Errors in one line: tests/docker/errors.sh.)
source "$(dirname "$0")/../docker/lib.sh"
fixture none
chmod 711 "$T"
mkdir "$T/a" "$T/b" "$T/full"
touch "$T/full/x" "$T/file"
nobody() { setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; }
# field KEY COMMAND...: a member of what --json prints, found at any depth.
field() {
    local key=$1
    shift
    coffer "$@" --json | python3 -c '
import json, sys
def find(o):
    if isinstance(o, dict):
        if sys.argv[1] in o: return o[sys.argv[1]]
        o = list(o.values())
    for x in o if isinstance(o, list) else []:
        r = find(x)
        if r is not None: return r
print(json.dumps(find(json.load(sys.stdin))).strip("\""))' "$key"
}
is() { expect "$1" "$(field "${@:2}")" "${*:3}: $2"; }

step "what a person sees"
coffer status | grep -q '^keystore  unlocked' || fail "status: $(coffer status)"
coffer up | grep -q 'already running' || fail "up, a second time"
coffer volume create v --size 256M --allow uid:0 --mode 0755 >/dev/null
coffer volume ls | grep -q '^v  *256M .* new\|^v  *256M .*fresh.* this host$' || fail "ls: $(coffer volume ls)"
is v name volume inspect v
is 268435456 size volume inspect v
is fresh state volume inspect v
is false mounted volume inspect v
is false attached volume inspect v
coffer policy show v | grep -qx 'allow uid:0' || fail "policy show: $(coffer policy show v)"
[ -z "$(coffer volume rm v 2>&1 >/dev/null)" ] || fail "volume rm says something on stderr"
expect '{"volumes":[]}' "$(coffer volume ls --json)" "an empty list"
(cd "$T" && COFFER_ROOT=c "$BUILD/coffer" status >/dev/null && "$BUILD/coffer" --root=c/ volume ls >/dev/null) || fail "a relative root"
one_line 1 'root' nobody "$BUILD/coffer" --root "$T/c" status
for c in "" "volume create" mount audit; do
    # shellcheck disable=SC2086
    coffer $c --help | grep -q '^usage: coffer' || fail "$c --help"
done

step "mounting, in two places"
coffer volume create v --size 256M --allow uid:0 >/dev/null
one_line 1 'not empty' coffer mount v "$T/full"
one_line 1 'Not a directory' coffer mount v "$T/file"
one_line 1 'no volume is mounted' coffer umount "$T/a"
coffer mount v "$T/a" | grep -q "^v is mounted at $T/a" || fail "mount"
one_line 1 'mount already' coffer mount v "$T/a"
(cd "$T" && coffer mount v b >/dev/null) || fail "mount at a relative path"
is 2 holders volume inspect v
is true mounted volume inspect v
is 1 mounted status
head -c 3000000 /dev/urandom >"$T/data"
cp "$T/data" "$T/a/data" && touch -d '2001-02-03 04:05:06.789' "$T/a/data" && mkdir "$T/a/dir" && ln "$T/a/data" "$T/a/dir/hard"
cmp "$T/data" "$T/b/dir/hard" || fail "the other place shows something else"
is true unlocked volume inspect v
one_line 1 'in use' coffer volume rm v
coffer volume check v | grep -q '^v: clean' || fail "check of a mounted volume"
coffer umount "$T/a" >/dev/null
mountpoint -q "$T/a" && fail "$T/a is still mounted"
cmp "$T/data" "$T/b/data" || fail "the second place went with the first"
exec 7<"$T/b/data"
one_line 1 'busy' coffer umount "$T/b"
exec 7<&-
coffer umount "$T/b/" >/dev/null
is 0 holders volume inspect v
server_gone() { [ -z "$(server_pid v)" ]; }
wait_for 5 server_gone # it checkpoints first
coffer volume check v --data >/dev/null || fail "check"
coffer mount v "$T/a" >/dev/null
cmp "$T/data" "$T/a/dir/hard" || fail "after a new mount"
expect "2001-02-03 04:05:06.789000000 2" "$(stat -c '%y %h' "$T/a/data" | sed 's/ [+-][0-9]* / /')" "time and links"

step "rules by uid"
chmod 755 "$T/a"
chmod 666 "$T/a/data"
refused 'permission denied' nobody cat "$T/a/data"
refused 'permission denied' nobody ls "$T/a"
audited '65534' "the refusal of nobody"
# Whoever was root when it was let in is asked about anew as another user.
python3 - "$T/a/data" <<'END' || fail "a process that has become nobody is still let in"
import os, sys
open(sys.argv[1]).close()
os.setresuid(0, 65534, 0)
open(sys.argv[1]).close()  # the real user is still root; not to be remembered for nobody
os.setresuid(0, 0, 0)
os.setresuid(65534, 65534, 65534)
try:
    open(sys.argv[1])
    sys.exit(1)
except PermissionError:
    pass
END
coffer why v --pid $$ | grep -q '^allowed' || fail "why: $(coffer why v --pid $$)"
setpriv --reuid 65534 --clear-groups sleep 100 >/dev/null &
is_nobody() { [ "$(awk '/^Uid/{print $2}' "/proc/$!/status")" = 65534 ]; }
wait_for 5 is_nobody
coffer why v --pid $! | grep -q '^refused.*uid' || fail "why nobody: $(coffer why v --pid $!)"
kill $!
coffer policy allow v uid:65534,ro >/dev/null
cmp "$T/data" <(nobody cat "$T/a/data") || fail "nobody cannot read under its rule"
refused 'read-only|permission denied' nobody dd if=/dev/zero of="$T/a/data" conv=notrunc count=1 status=none
coffer policy deny v uid:65534 >/dev/null
refused 'permission denied' nobody cat "$T/a/data"
coffer policy remove v deny uid:65534 >/dev/null
coffer policy remove v allow uid:65534,ro >/dev/null
refused 'permission denied' nobody cat "$T/a/data"
one_line 1 'no such|not' coffer policy remove v allow uid:65534,ro

step "who is refused looks at the root while its owner works"
coffer volume create own --size 64M --allow uid:65534 --uid 65534 --mode 0700 --strict >/dev/null
mkdir "$T/own"
coffer mount own "$T/own" >/dev/null
others=()
for _ in 1 2; do
    python3 -c 'import os, sys
while True: os.stat(sys.argv[1])' "$T/own" &
    others+=($!)
done
timeout 60 setpriv --reuid 65534 --regid 65534 --clear-groups python3 - "$T/own" <<'END' || fail "the owner was hindered"
import os, sys, time
end = time.monotonic() + 4
while time.monotonic() < end:
    os.close(os.open(sys.argv[1] + "/x", os.O_CREAT | os.O_WRONLY, 0o600))
    os.unlink(sys.argv[1] + "/x")
END
kill "${others[@]}"
refused 'permission denied' ls "$T/own"
nobody ln -s the-target "$T/own/link" && expect the-target "$(nobody readlink "$T/own/link")" "the owner's link"
expect "" "$(readlink "$T/own/link")" "a strict volume's link, as others see it"
expect "700 65534" "$(stat -c '%a %u' "$T/own")" "mode and owner of the root, as others see it"
coffer umount "$T/own" >/dev/null && coffer volume rm own >/dev/null || fail "umount and rm own"

coffer volume create ruled --size 64M >/dev/null
for uid in $(seq 32); do coffer policy allow ruled "uid:$uid" >/dev/null || fail "rule $uid"; done
one_line 1 'at most 32 rules' coffer policy allow ruled uid:33
coffer volume rm ruled >/dev/null

step "locking under a mount"
echo "written before" >"$T/a/before"
exec 8<"$T/a/before"
coffer lock >/dev/null
is false unlocked status
cat "$T/a/before" >"$T/out" 2>&1 && fail "a locked volume is read"
ls "$T/a" >"$T/out" 2>&1 && fail "a locked volume is listed"
touch "$T/a/new" 2>/dev/null && fail "a locked volume is written"
cat <&8 >"$T/out" 2>&1 && fail "an open file of a locked volume is read"
mountpoint -q "$T/a" || fail "locking has unmounted it"
coffer unlock --key-file "$T/key" >/dev/null
expect "written before" "$(cat "$T/a/before")" "after unlock"
[ ! -e "$T/a/new" ] || fail "a refused write was done"
exec 8<&-

step "down and up"
one_line 1 'busy' coffer down
coffer down --force >/dev/null || fail "down --force"
mountpoint -q "$T/a" && fail "down left a mount"
pgrep -f "$T/c" >/dev/null && fail "down left a process: $(pgrep -af "$T/c")"
coffer down | grep -q 'not running' || fail "down, a second time"
# Nobody waits for the other end of a FIFO.
mv "$T/c/cofferd.json" "$T/kept" && mkfifo "$T/c/cofferd.json"
one_line 1 'cofferd.json.*mend it' timeout 9 "$BUILD/coffer" --root "$T/c" up
rm "$T/c/cofferd.json" && mv "$T/kept" "$T/c/cofferd.json"
mv "$T/c/keystore/generations" "$T/kept" && mkfifo "$T/c/keystore/generations" && chown coffer-keyd "$T/c/keystore/generations"
cofferd_start
is false unlocked status
one_line 1 'generations' coffer unlock --key-file "$T/key"
rm "$T/c/keystore/generations" && mv "$T/kept" "$T/c/keystore/generations"
one_line 1 'coffer unlock' coffer mount v "$T/a"
coffer unlock --key-file "$T/key" >/dev/null
coffer mount v "$T/a" >/dev/null
cmp "$T/data" "$T/a/data" || fail "after down and up"
coffer umount "$T/a" >/dev/null

step "a damaged keystore is called so"
coffer down >/dev/null
cp -p "$T/c/keystore/keystore" "$T/keystore.whole"
truncate -s 10 "$T/c/keystore/keystore"
cofferd_start
for _ in $(seq 50); do
    coffer status | grep -q '^keystore  the keystore file is damaged: restore' && break
    sleep 0.1
done
coffer status | grep -q '^keystore  the keystore file is damaged: restore' || fail "status: $(coffer status)"
one_line 1 'keystore file is damaged: restore' coffer unlock --key-file "$T/key"
one_line 1 'keystore file is damaged: restore' coffer init --key-file "$T/key"
cp -p "$T/keystore.whole" "$T/c/keystore/keystore"
for _ in $(seq 100); do
    coffer unlock --key-file "$T/key" >/dev/null 2>&1
    coffer status | grep -q '^keystore  unlocked' && break
    sleep 0.1
done
coffer status | grep -q '^keystore  unlocked' || fail "status after the restore: $(coffer status)"

step "a missing keystore is called so, where volumes had their keys in it"
coffer down >/dev/null
mv "$T/c/keystore/keystore" "$T/keystore.whole"
cofferd_start
coffer status | grep -q '^keystore  missing: restore' || fail "status: $(coffer status)"
one_line 1 'keystore file is missing, .* restore it' coffer unlock --key-file "$T/key"
one_line 1 'keystore file is missing, .* restore it' coffer init --key-file "$T/key"
mv "$T/keystore.whole" "$T/c/keystore/keystore"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock when it is back"
coffer down >/dev/null

step "a damaged audit log is called so, and nothing is released without one"
for how in garbage binary directory symlink; do
    mv "$T/c/keystore/audit.log" "$T/audit.whole"
    case $how in
    garbage) (cat "$T/audit.whole" && echo garbage) >"$T/c/keystore/audit.log" ;;
    binary) (cat "$T/audit.whole" && head -c 70000 /dev/urandom) >"$T/c/keystore/audit.log" ;;
    directory) mkdir "$T/c/keystore/audit.log" ;;
    symlink) ln -s "$T/audit.whole" "$T/c/keystore/audit.log" ;;
    esac
    [ "$how" != binary ] && [ "$how" != garbage ] || chown --reference="$T/audit.whole" "$T/c/keystore/audit.log"
    cofferd_start
    called_so() { coffer status | grep '^keystore  the audit log is damaged: move keystore/audit.log away'; }
    wait_for 5 called_so
    one_line 1 'the audit log is damaged: move' coffer unlock --key-file "$T/key"
    rm -rf "$T/c/keystore/audit.log"
    mv "$T/audit.whole" "$T/c/keystore/audit.log"
    unlocks() { coffer unlock --key-file "$T/key"; }
    wait_for 10 unlocks
    coffer down >/dev/null
done
cofferd_start
coffer unlock --key-file "$T/key" >/dev/null
coffer audit verify >/dev/null || fail "the audit log"

step "a mount that cannot be written down is not given"
coffer volume create unwritten --size 64M --allow uid:0 >/dev/null
mkdir "$T/unwritten"
mv "$T/c/cofferd.json" "$T/cofferd.json"
mkdir -p "$T/c/cofferd.json/in the way"
one_line 1 'is not mounted: .*cofferd.json cannot be written' coffer mount unwritten "$T/unwritten"
mountpoint -q "$T/unwritten" && fail "it is mounted all the same"
rmdir "$T/c/cofferd.json/in the way" "$T/c/cofferd.json"
mv "$T/cofferd.json" "$T/c/cofferd.json"
coffer mount unwritten "$T/unwritten" >/dev/null || fail "mount when it can be written"
echo here >"$T/unwritten/f"
coffer umount "$T/unwritten" >/dev/null && coffer volume rm unwritten >/dev/null || fail "umount and rm"

step "every command with --json prints JSON"
mkdir "$T/json"
while read -r command; do
    ls "$T/json" >/dev/null # unlocks it where it is mounted
    # shellcheck disable=SC2086
    coffer $command --json >"$T/out" 2>"$T/err" || fail "$command --json: $(cat "$T/err")"
    python3 -c 'import json, sys; [json.loads(l) for l in open(sys.argv[1]).read().splitlines()] or sys.exit("nothing")' "$T/out" ||
        fail "$command --json: $(cat "$T/out")"
done <<P
status
volume create json --size 64M --allow uid:0
volume ls
mount json $T/json
volume inspect json
volume check json
volume scrub json
volume resize json 80M
volume restart-server json
volume snapshot create json s
volume snapshot ls json
volume snapshot rm json s
policy allow json uid:1
policy show json
policy deny json uid:2
policy remove json allow uid:1
why json --pid $$
umount $T/json
volume accept-rollback json
volume rm json
audit
audit verify
P

step "many volumes"
for i in $(seq 12); do
    coffer volume create "many$i" --size 64M --allow uid:0 >/dev/null
    mkdir "$T/m$i"
    coffer mount "many$i" "$T/m$i" >/dev/null
    echo "$i" >"$T/m$i/number"
done
is 12 mounted status
sleep 1
most=0
for i in $(seq 12); do
    expect "$i" "$(cat "$T/m$i/number")" "volume many$i"
    kb=$(awk '/^VmRSS/{print $2}' "/proc/$(server_pid "many$i")/status")
    if [ "$kb" -gt $most ]; then most=$kb; fi
done
step "the largest coffer-fs has $((most / 1024)) MiB resident"
[ $most -lt 65536 ] || fail "an idle volume takes $most KiB"
for i in $(seq 12); do coffer umount "$T/m$i" >/dev/null && coffer volume rm "many$i" >/dev/null || fail "umount and rm many$i"; done

step "the audit log"
coffer audit >"$T/out"
for word in release refus mount umount policy unlock lock; do grep -q "$word" "$T/out" || fail "coffer audit shows no $word"; done
expect 0 "$(coffer audit --since 2100-01-01 | wc -l)" "records of the next century"
[ "$(coffer audit --since 1h | wc -l)" = "$(wc -l <"$T/out")" ] || fail "--since 1h"
coffer audit --json | python3 -c 'import json, sys; [json.loads(l) for l in sys.stdin]' || fail "audit --json is not JSON lines"
coffer audit verify >/dev/null || fail "audit verify"
coffer volume rm v >/dev/null
[ -z "$(ls -A "$T/c/volumes")" ] || fail "files of removed volumes are left"
coffer down >/dev/null || fail "down"
