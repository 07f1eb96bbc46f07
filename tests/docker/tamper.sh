#!/bin/bash
# 4 KiB of `data` or `log` flipped, zeroed, swapped or put back to older content between two mounts: reads through the
# mount give the right content or an error, never wrong content, and nothing crashes. (The engine's own test,
# tests/attack/tamper, goes through every block; this is the way through the whole program.)
source "$(dirname "$0")/lib.sh"
fixture none

coffer volume create v --size 256M --allow uid:0 >/dev/null
mkdir "$T/mnt" "$T/good" "$T/older" "$T/newer"
files=$(dirname "$(find "$T/c/volumes" -name data)")
head -c 3000000 /dev/urandom >"$T/good/big"
for i in $(seq 60); do head -c $((i * 700)) /dev/urandom >"$T/good/f$i"; done
coffer mount v "$T/mnt" >/dev/null
cp "$T/good/f1" "$T/good/f2" "$T/mnt/"
sync "$T/mnt/f1"
coffer umount "$T/mnt" >/dev/null
cp --sparse=always "$files/data" "$files/log" "$T/older/"
coffer mount v "$T/mnt" >/dev/null
cp "$T"/good/* "$T/mnt/"
coffer umount "$T/mnt" >/dev/null
cp --sparse=always "$files/data" "$files/log" "$T/newer/"

cat >"$T/damage.py" <<'PY'
import os, random, sys
files, older, kind, seed = sys.argv[1:]
r = random.Random(int(seed))
name = r.choice(["data", "data", "log"])
fd = os.open(os.path.join(files, name), os.O_RDWR)
B = 4096
n = os.fstat(fd).st_size // B
# Half of the time somewhere in what is in use, near the beginning.
pick = lambda: r.randrange(n) if r.random() < 0.5 else r.randrange(min(n, 1500))
a, b = pick(), pick()
get = lambda k: os.pread(fd, B, k * B)
if kind == "flip":
    blk = bytearray(get(a)); blk[r.randrange(B)] ^= 1 << r.randrange(8); os.pwrite(fd, blk, a * B)
elif kind == "zero":
    os.pwrite(fd, bytes(B), a * B)
elif kind == "swap":
    x, y = get(a), get(b); os.pwrite(fd, y, a * B); os.pwrite(fd, x, b * B)
elif kind == "older":
    with open(os.path.join(older, name), "rb") as f:
        f.seek(a * B); old = f.read(B)
    os.pwrite(fd, old.ljust(B, b"\0"), a * B)
elif kind == "cut":
    os.ftruncate(fd, a * B)
PY
# Reads everything that should be there: how many files are right, how many give an error; wrong content ends it.
cat >"$T/look.py" <<'PY'
import os, signal, sys
good, mnt = sys.argv[1:]
signal.alarm(60)
right = errors = 0
for name in sorted(os.listdir(good)):
    want = open(os.path.join(good, name), "rb").read()
    try:
        have = open(os.path.join(mnt, name), "rb").read()
    except OSError:
        errors += 1
        continue
    if have != want:
        sys.exit("wrong content in " + name)
    right += 1
print(right, errors)
PY
good=0 errors=0 refusals=0
for seed in $(seq 16); do
    for kind in flip zero swap older cut; do
        [ $((seed % 3)) = 0 ] || [ $kind != cut ] || continue
        cp --sparse=always "$T/newer/data" "$T/newer/log" "$files/"
        coffer volume accept-rollback v >/dev/null || fail "accept-rollback"
        python3 "$T/damage.py" "$files" "$T/older" $kind "$seed"
        if ! coffer mount v "$T/mnt" >/dev/null 2>"$T/err"; then
            expect 1 "$(grep -c '' "$T/err")" "lines of the refusal to mount"
            refusals=$((refusals + 1))
            continue
        fi
        python3 "$T/look.py" "$T/good" "$T/mnt" >"$T/out" 2>"$T/err" || fail "$kind, seed $seed: status $? (142: it hangs): $(cat "$T/err")"
        read -r g e <"$T/out"
        good=$((good + g)) errors=$((errors + e))
        server_pid v | grep -q . || fail "$kind, seed $seed: coffer-fs died"
        coffer umount "$T/mnt" >/dev/null || fail "$kind, seed $seed: umount"
    done
done
step "$good files right, $errors refused, $refusals volumes refused at the mount"
grep -q "died\|signal" "$T/c/cofferd.log" && fail "something of ours died: $(grep -m1 'died\|signal' "$T/c/cofferd.log")"
[ $((errors + refusals)) -gt 0 ] || fail "no damage was noticed at all"
[ "$good" -gt 0 ] || fail "nothing was readable"
cp --sparse=always "$T/newer/data" "$T/newer/log" "$files/"
coffer volume accept-rollback v >/dev/null
coffer volume check v --data >/dev/null || fail "the undamaged volume does not check clean"
