#!/bin/bash
# Looking after volumes on the command line: check and repair of damaged files, scrub, resize, export and import.
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m" "$T/n"
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
# damage FILE OFFSET: changes 64 bytes there.
damage() { head -c 64 /dev/urandom | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }
# content_unit DATA [BEFORE]: a unit amid the longest row of those that are not what they were (zero).
content_unit() {
    python3 - "$1" "${2:-/dev/zero}" <<'P'
import sys
a, b = open(sys.argv[2], "rb"), open(sys.argv[1], "rb")
run, best, n = 0, (0, 0), 0
while True:
    x, y = a.read(4096), b.read(4096)
    if not y: break
    run = run + 1 if x != y else 0
    best = max(best, (run, n))
    n += 1
assert best[0] > 300
print(best[1] - best[0] // 2)
P
}
backing() { echo "$T/c/volumes/$(field id volume inspect "$1")"; }

step "check, repair"
coffer volume create care-v --size 256M --allow uid:0 >/dev/null
coffer mount care-v "$T/m" >/dev/null
for k in $(seq 200); do echo "small $k" >"$T/m/small-$k"; done
sync
cp "$(backing care-v)/data" "$T/before"
head -c 8000000 /dev/urandom >"$T/big"
cp "$T/big" "$T/m/big"
coffer volume check care-v --data | grep -qx 'care-v: clean' || fail "check in use"
coffer umount "$T/m" >/dev/null
coffer volume check care-v --data | grep -qx 'care-v: clean' || fail "check"
coffer volume check care-v --repair | grep -qx 'care-v: clean' || fail "repair of what is whole"
damage "$(backing care-v)/data" $(($(content_unit "$(backing care-v)/data" "$T/before") * 4096 + 100))
coffer volume check care-v >/dev/null || fail "structure alone has no damage"
coffer volume check care-v --data >"$T/out" 2>"$T/err" && fail "check finds nothing"
grep -q "does not authenticate" "$T/out" || fail "check: $(cat "$T/out")"
grep -q 'coffer volume check --repair care-v' "$T/err" || fail "check: $(cat "$T/err")"
coffer mount care-v "$T/m" >/dev/null
ls "$T/m" >/dev/null
one_line 1 'is mounted' coffer volume check care-v --repair
coffer umount "$T/m" >/dev/null
coffer volume check care-v --repair >"$T/out" 2>"$T/err" && fail "repair said nothing was lost"
grep -Eq '^lost: inode [0-9]+, blocks [0-9]+ to [0-9]+' "$T/out" || fail "repair: $(cat "$T/out")"
expect 1 "$(wc -l <"$T/out")" "lines of the repair"
coffer volume check care-v --data | grep -qx 'care-v: clean' || fail "check after repair"
coffer mount care-v "$T/m" >/dev/null
expect "small 77" "$(cat "$T/m/small-77")" "a small file"
cat "$T/m/big" >/dev/null 2>&1 && fail "the lost block reads"
cp "$T/big" "$T/m/big" && cmp "$T/big" "$T/m/big" || fail "writing over lost blocks"
grep -q repair <<<"$(coffer audit)" || fail "no audit record of the repair"

step "scrub"
one_line 2 'not a' coffer volume scrub care-v --rate fast
one_line 1 '64K' coffer volume scrub care-v --rate 10
coffer volume scrub care-v --rate 1G | grep -q '^started' || fail "scrub"
for _ in $(seq 100); do [ "$(field running volume inspect care-v)" = false ] && break; sleep 0.1; done
expect 0 "$(field findings volume inspect care-v)" "findings of the scrub"
grep -q 'scrub ended: [0-9]* bytes read, 0 findings' <<<"$(coffer audit)" || fail "no audit record of the scrub"
coffer volume scrub care-v --rate 64K >/dev/null
one_line 1 'is running' coffer volume scrub care-v
expect true "$(field running volume inspect care-v)" "a slow scrub"
# It holds nothing up.
coffer volume check care-v --data | grep -qx 'care-v: clean' || fail "check beside a scrub"
coffer umount "$T/m" >/dev/null
one_line 1 'not mounted' coffer volume scrub care-v
coffer volume rm care-v >/dev/null
coffer volume create care-v --size 256M --allow uid:0 >/dev/null
coffer mount care-v "$T/m" >/dev/null
cp "$T/big" "$T/m/big"
sync
damage "$(backing care-v)/data" $(($(content_unit "$(backing care-v)/data") * 4096 + 9))
coffer volume scrub care-v --rate 1G >/dev/null
for _ in $(seq 100); do [ "$(field running volume inspect care-v)" = false ] && break; sleep 0.1; done
[ "$(field findings volume inspect care-v)" -gt 0 ] || fail "the scrub found nothing"
grep -Eq 'scrub: inode [0-9]+, blocks [0-9]+ to [0-9]+, extent [0-9]+: does not authenticate' <<<"$(coffer audit)" || fail "no audit record of what and where"
coffer umount "$T/m" >/dev/null
coffer volume rm care-v >/dev/null

step "resize"
coffer volume create care-r --size 64M --allow uid:0 >/dev/null
coffer mount care-r "$T/m" >/dev/null
head -c 80000000 /dev/zero >"$T/m/f" 2>/dev/null && fail "more than the limit"
one_line 2 'not a size' coffer volume resize care-r much
one_line 1 '64M to 16T' coffer volume resize care-r 1M
coffer volume resize care-r 200M | grep -qx resized || fail "resize in use"
expect $((200 << 20)) "$(field size volume inspect care-r)" "size"
head -c 120000000 /dev/urandom >"$T/m/f" || fail "no room after resize"
one_line 1 'in use' coffer volume resize care-r 100M
coffer umount "$T/m" >/dev/null
one_line 1 'in use' coffer volume resize care-r 100M
coffer volume resize care-r 300M >/dev/null || fail "resize"
coffer mount care-r "$T/m" >/dev/null
[ "$(df --output=size -k "$T/m" | tail -1)" -gt 250000 ] || fail "df: $(df -k "$T/m")"
expect 120000000 "$(stat -c %s "$T/m/f")" "the file"
coffer umount "$T/m" >/dev/null
coffer volume rm care-r >/dev/null

step "export, verify, import"
head -c 64 /dev/urandom >"$T/backup-key"
head -c 64 /dev/urandom >"$T/other-key"
chmod 600 "$T/backup-key" "$T/other-key"
coffer volume create care-x --size 256M --allow uid:0 >/dev/null
coffer mount care-x "$T/m" >/dev/null
cp "$T/big" "$T/m/big"
mkdir "$T/m/dir"
for k in $(seq 300); do echo "file $k" >"$T/m/dir/f$k"; done
ln "$T/m/big" "$T/m/dir/hard"
ln -s ../big "$T/m/dir/soft"
touch -d '2001-02-03 04:05:06' "$T/m/dir"
(cd "$T/m" && find . -printf '%p %m %u %s %T@ %l %n\n' | sort) >"$T/list"
coffer volume export care-x --key-file "$T/backup-key" >"$T/x1" || fail "export in use"
coffer volume verify --key-file "$T/backup-key" <"$T/x1" | grep -qx 'the export is whole' || fail "verify"
one_line 1 'another passphrase or key file' coffer volume verify --key-file "$T/other-key" <"$T/x1"
cp "$T/x1" "$T/altered"
damage "$T/altered" $((144 + 3 * 65553 + 5000))
one_line 1 'its frame at byte 196803 does not authenticate' coffer volume verify --key-file "$T/backup-key" <"$T/altered"
head -c 500000 "$T/x1" >"$T/cut"
one_line 1 'cut off in its frame at byte 459015' coffer volume verify --key-file "$T/backup-key" <"$T/cut"
one_line 1 'exists already' coffer volume import care-x --key-file "$T/backup-key" <"$T/x1"
for f in altered cut; do
    coffer volume import care-y --allow uid:0 --size 256M --key-file "$T/backup-key" <"$T/$f" >"$T/out" 2>"$T/err" && fail "import of $f"
    grep -q 'frame at byte' "$T/out" || fail "import of $f: $(cat "$T/out" "$T/err")"
    coffer volume ls | grep -q care-y && fail "an import of $f left a volume"
done
coffer volume import care-y --allow uid:0 --size 256M --key-file "$T/backup-key" <"$T/x1" | grep -qx 'imported care-y' || fail "import"
coffer mount care-y "$T/n" >/dev/null
(cd "$T/n" && find . -printf '%p %m %u %s %T@ %l %n\n' | sort) >"$T/list2"
cmp "$T/list" "$T/list2" || fail "names, modes, times: $(diff "$T/list" "$T/list2" | head -5)"
diff -r "$T/m" "$T/n" || fail "content"
coffer umount "$T/m" >/dev/null
coffer volume check care-y --data | grep -qx 'care-y: clean' || fail "check of the import"
# A pipe whose reader is slow, and one whose reader goes away.
coffer volume export care-y --key-file "$T/backup-key" | { sleep 1; cat; } | coffer volume verify --key-file "$T/backup-key" | grep -qx 'the export is whole' || fail "export through a pipe"
coffer volume export care-y --key-file "$T/backup-key" 2>"$T/err" | head -c 100000 >/dev/null || true
[ "$(wc -l <"$T/err")" = 1 ] || fail "a reader that goes away: $(cat "$T/err")"
coffer umount "$T/n" >/dev/null
coffer volume export care-x --key-file "$T/backup-key" | coffer volume import care-z --allow uid:0 --size 256M --key-file "$T/backup-key" >/dev/null || fail "from one to the other"
coffer volume check care-z --data | grep -qx 'care-z: clean' || fail "check of the copy"

step "a mounted volume that nobody has used yet is opened for the task, and closed after it"
shut() { [ "$(field unlocked volume inspect care-x)" = false ]; }
scrubs() { coffer audit | grep -c 'scrub ended: [1-9]' || true; } # that have read something
scrubbed() { [ "$(scrubs)" -gt "$before" ]; }
coffer mount care-x "$T/m" >/dev/null
for round in mounted unlocked; do
    coffer volume snapshot create care-x "$round" >/dev/null || fail "$round: snapshot create"
    shut || fail "$round: it stays open"
    coffer volume snapshot ls care-x | grep -q "^$round " || fail "$round: snapshot ls"
    coffer volume check care-x --data | grep -qx 'care-x: clean' || fail "$round: check"
    coffer volume resize care-x 300M >/dev/null || fail "$round: resize"
    coffer volume export care-x --key-file "$T/backup-key" | coffer volume verify --key-file "$T/backup-key" >/dev/null || fail "$round: export"
    before=$(scrubs)
    coffer volume scrub care-x >/dev/null || fail "$round: scrub"
    wait_for 20 scrubbed || fail "$round: the scrub has read nothing"
    coffer volume snapshot rm care-x "$round" >/dev/null || fail "$round: snapshot rm"
    wait_for 5 shut || fail "$round: it stays open after the scrub"
    coffer lock >/dev/null
    one_line 1 'run coffer unlock' coffer volume check care-x
    coffer unlock --key-file "$T/key" >/dev/null
done
step "the same beside locking"
(while [ ! -e "$T/enough" ]; do coffer volume check care-x >/dev/null 2>&1 || true; done) &
for _ in $(seq 20); do
    sleep "0.0$((RANDOM % 10))"
    coffer lock >/dev/null || fail "lock"
    shut || fail "open while the keystore is locked"
    coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
done
touch "$T/enough"
wait
coffer volume scrub care-x --rate 64K >/dev/null || fail "scrub"
coffer lock >/dev/null || fail "lock"
coffer unlock --key-file "$T/key" >/dev/null || fail "unlock"
broken_off() { coffer audit | grep 'scrub broken off'; }
wait_for 10 broken_off # nobody might ever open it again for it
coffer volume scrub care-x >/dev/null || fail "scrub again"
wait_for 10 shut
coffer volume check care-x --data | grep -qx 'care-x: clean' || fail "check at the end"
coffer umount "$T/m" >/dev/null

step "an operator who goes away takes the work along"
mkfifo "$T/fifo" "$T/fifo2"
# abandoned WHAT COMMAND...: its process is ended amid its work: that takes no longer than a moment.
abandoned() {
    local what=$1 pid
    shift
    "$BUILD/coffer" --root "$T/c" "$@" <&0 2>"$T/out" &
    pid=$!
    sleep 1
    kill -0 $pid 2>/dev/null || fail "$what is over already: $(cat "$T/out")"
    kill $pid
    wait $pid 2>/dev/null && fail "$what: the client has ended well"
    care_free() { [ -z "$(pgrep -f "^coffer-fs (import|export|check) care-")" ] && coffer volume check care-x; }
    wait_for 5 care_free
}
coffer volume export care-y --key-file "$T/backup-key" >"$T/x2"
exec 7<>"$T/fifo"
for round in unmounted mounted; do
    abandoned "$round: export" volume export care-x --key-file "$T/backup-key" >"$T/fifo"
    [ "$round" = mounted ] || coffer mount care-x "$T/m" >/dev/null
done
coffer umount "$T/m" >/dev/null
exec 7<>"$T/fifo2"
head -c 30000 "$T/x2" >&7
abandoned import volume import care-w --allow uid:0 --size 256M --key-file "$T/backup-key" <"$T/fifo2"
exec 7>&-
coffer volume ls | grep -q care-w && fail "an import that was broken off left a volume"
[ "$(find "$T/c/volumes" -mindepth 1 -maxdepth 1 | wc -l)" = "$(coffer volume ls | tail -n +2 | wc -l)" ] || fail "an import that was broken off left files"
