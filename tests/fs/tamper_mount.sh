#!/bin/bash
# Somebody changes the backing files, during a mount and between two: what was changed reads as EIO, exactly that, with an audit
# record that names it; all else reads as it was; nothing is wrong any more when the bytes are put back. (tests/attack/tamper
# does it to every unit and record, on the engine.)
source "$(dirname "$0")/../docker/lib.sh"
fixture none
mkdir "$T/m" "$T/orig"
data_of() { echo "$T/c/volumes/$(coffer volume inspect "$1" --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["volume"]["id"])')/data"; }

cat >"$T/tool.py" <<'P'
import os, sys
U = 4096
def changed(before, after):  # units that differ, in order
    a, b, n, out = open(before, "rb"), open(after, "rb"), 0, []
    while True:
        x, y = a.read(1 << 20), b.read(1 << 20)
        if not y: return out
        if x != y:
            out += [n + k for k in range(len(y) // U) if x[k * U:k * U + U] != y[k * U:k * U + U]]
        n += len(y) // U
def middle(before, after):  # a unit amid the longest row of changed ones
    best, run, last = [], [], None
    for u in changed(before, after):
        run = run + [u] if last is not None and u == last + 1 else [u]
        last = u
        if len(run) > len(best): best = run
    assert len(best) > 64, len(best)
    return best[len(best) // 2]
def get(path, u):
    with open(path, "rb") as f: return os.pread(f.fileno(), U, u * U)
def put(path, u, b):
    fd = os.open(path, os.O_WRONLY); os.pwrite(fd, b, u * U); os.fsync(fd); os.close(fd)
def bad_blocks(path, orig):  # blocks that give EIO; any other difference fails
    bad, fd, want = [], os.open(path, os.O_RDONLY), open(orig, "rb").read()
    assert os.fstat(fd).st_size == len(want), path
    for k in range((len(want) + U - 1) // U):
        try: have = os.pread(fd, U, k * U)
        except OSError as e:
            assert e.errno == 5, e
            bad.append(k)
            continue
        assert have == want[k * U:k * U + U], "%s: block %d reads as something else" % (path, k)
    os.close(fd)
    return bad
what, args = sys.argv[1], sys.argv[2:]
if what == "middle": print(middle(*args))
elif what == "save": open(args[2], "wb").write(get(args[0], int(args[1])))
elif what == "put": put(args[0], int(args[1]), open(args[2], "rb").read())
elif what == "flip": b = bytearray(get(args[0], int(args[1]))); b[1234] ^= 16; put(args[0], int(args[1]), bytes(b))
elif what == "zero": put(args[0], int(args[1]), bytes(U))
elif what == "tear": put(args[0], int(args[1]), get(args[0], int(args[1]))[:512] + os.urandom(U - 512))
elif what == "swap":
    u, w = int(args[1]), int(args[2]); x, y = get(args[0], u), get(args[0], w); put(args[0], u, y); put(args[0], w, x)
elif what == "bad": print(*bad_blocks(*args))
else: sys.exit("what?")
P
tool() { python3 "$T/tool.py" "$@"; }
fresh() { sync -f "$T/m" && coffer volume check tm >/dev/null && echo 3 >/proc/sys/vm/drop_caches; }
remount() {
    coffer umount "$T/m" >/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    coffer mount tm "$T/m" >/dev/null
    ls "$T/m" >/dev/null
}
damages() { coffer audit --json | grep '"event":"damage"' || true; }

step "files, and where they lie"
coffer volume create tm --size 256M --allow uid:0 >/dev/null
coffer volume create other --size 256M --allow uid:0 >/dev/null
for v in other tm; do
    coffer mount "$v" "$T/m" >/dev/null
    head -c 3000000 /dev/urandom >"$T/m/first"
    sync -f "$T/m"
    [ $v = tm ] || coffer umount "$T/m" >/dev/null
done
data=$(data_of tm)
cp "$T/m/first" "$T/orig/first"
declare -A unit
for f in a b c d; do
    fresh
    cp --sparse=always "$data" "$T/before"
    head -c 2000000 /dev/urandom >"$T/orig/$f"
    cp "$T/orig/$f" "$T/m/$f"
    fresh
    unit[$f]=$(tool middle "$T/before" "$data")
done
for k in $(seq 50); do echo "small $k" >"$T/orig/s$k"; done
cp "$T/orig"/s* "$T/m"
# An older version of a file's middle block: the ciphertext that was there, and where the new one lies.
tool save "$data" "${unit[d]}" "$T/older"
cp --sparse=always "$data" "$T/before"
head -c 2000000 /dev/urandom >"$T/orig/d"
cp "$T/orig/d" "$T/m/d"
fresh
unit[d]=$(tool middle "$T/before" "$data")
other=$(data_of other)
tool save "$other" "${unit[a]}" "$T/foreign"
for f in "$T/orig"/*; do expect "" "$(tool bad "$T/m/${f##*/}" "$f")" "bad blocks of ${f##*/}"; done
expect "" "$(damages)" "damage records before anything was done"

# tampered NAME BLOCKS FILE: the others are whole, this one has so many bad blocks, and the audit log names them and only them.
tampered() {
    local name=$1 want=$2 file=$3 f bad ino b lines
    ino=$(stat -c %i "$T/m/$file")
    for f in "$T/orig"/*; do
        [ "${f##*/}" = "$file" ] || expect "" "$(tool bad "$T/m/${f##*/}" "$f")" "$name: bad blocks of ${f##*/}"
    done
    bad=$(tool bad "$T/m/$file" "$T/orig/$file")
    expect "$want" "$(wc -w <<<"$bad")" "$name: number of bad blocks of $file ($bad)"
    lines=$(damages | tail -n +$((seen + 1)))
    [ -n "$lines" ] || fail "$name: no audit record"
    grep -v "data: inode $ino, blocks " <<<"$lines" && fail "$name: a record of something else"
    for b in $bad; do
        grep -q "inode $ino, blocks $b to $b, extent [0-9]* at unit [0-9]*: does not authenticate" <<<"$lines" || fail "$name: no record of block $b: $lines"
    done
    python3 - "$bad" "$lines" <<'P' || fail "$name: a record without a bad block: $lines"
import re, sys
bad = [int(x) for x in sys.argv[1].split()]
for lo, hi in re.findall(r"blocks (\d+) to (\d+)", sys.argv[2]):
    assert any(int(lo) <= b <= int(hi) for b in bad), (lo, hi)
P
    seen=$(damages | wc -l)
}
# kind NAME BLOCKS FILE TOOL...: during a mount, and between two; each time put back.
kind() {
    local name=$1 blocks=$2 file=$3 u=${unit[$3]}
    shift 3
    step "$name"
    tool save "$data" "$u" "$T/saved"
    tool save "$data" $((u + 1)) "$T/saved2"
    for when in during between; do
        [ $when = during ] || coffer umount "$T/m" >/dev/null
        tool "$@"
        echo 3 >/proc/sys/vm/drop_caches
        [ $when = during ] || { coffer mount tm "$T/m" >/dev/null && ls "$T/m" >/dev/null; }
        tampered "$name, $when" "$blocks" "$file"
        tool put "$data" "$u" "$T/saved"
        tool put "$data" $((u + 1)) "$T/saved2"
        remount
        expect "" "$(tool bad "$T/m/$file" "$T/orig/$file")" "$name, $when: bad blocks when it was put back"
        expect "$seen" "$(damages | wc -l)" "$name, $when: records when it was put back"
    done
}
seen=0
remount
kind "a bit" 1 a flip "$data" "${unit[a]}"
kind "zeroes" 1 b zero "$data" "${unit[b]}"
kind "torn at 512 bytes" 1 c tear "$data" "${unit[c]}"
kind "two units in each other's place" 2 a swap "$data" "${unit[a]}" $((unit[a] + 1))
kind "an older version of the file's block" 1 d put "$data" "${unit[d]}" "$T/older"
kind "a unit of another volume" 1 a put "$data" "${unit[a]}" "$T/foreign"
coffer umount "$T/m" >/dev/null

step "one of each superblock's two copies"
for u in 0 1 8192 8193; do tool save "$data" $u "$T/super$u"; done
for u in 0 1; do
    tool zero "$data" $u
    tool zero "$data" $((8193 - u)) # and the other slot's second one
    coffer mount tm "$T/m" >/dev/null
    for f in a s7; do expect "" "$(tool bad "$T/m/$f" "$T/orig/$f")" "bad blocks of $f"; done
    coffer umount "$T/m" >/dev/null
done
coffer volume check tm --data | grep -qx 'tm: clean' || fail "check"
expect "$seen" "$(damages | wc -l)" "records"

step "a log record that was durable, after server and cofferd died at once"
log=${data%/data}/log
coffer mount tm "$T/m" >/dev/null
ls "$T/m" >/dev/null
cp "$log" "$T/before"
for k in $(seq 60); do
    echo "logged $k" >"$T/m/l$k"
    sync "$T/m/l$k"
done
unit_of_log=$(python3 - "$T/before" "$log" <<'P'
import sys
a, b = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read()
used = [k for k in range(len(b) // 512) if a[k * 512:k * 512 + 512] != b[k * 512:k * 512 + 512]]
assert len(used) > 60, len(used)
print(used[len(used) // 2])
P
)
died() {
    local server
    server=$(server_pid tm)
    kill -9 "$(cofferd_pid)"
    kill -9 "$server"
    sleep 0.3
    umount -l "$T/m" 2>/dev/null || true
}
flip_log() { python3 -c 'import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); o = int(sys.argv[2]) * 512 + 99; b = os.pread(fd, 1, o)[0] ^ 1; os.pwrite(fd, bytes([b]), o); os.fsync(fd)' "$log" "$unit_of_log"; }
died
flip_log
cofferd_start
for _ in $(seq 50); do coffer unlock --key-file "$T/key" >/dev/null 2>&1; coffer status | grep -c '^keystore  unlocked' >/dev/null && break; sleep 0.1; done
mountpoint -q "$T/m" || coffer mount tm "$T/m" >/dev/null 2>&1 || true
ls "$T/m/l1" >/dev/null 2>&1 && fail "the volume opens without a record that was durable"
grep -q 'log: record [0-9]* was durable and is damaged' <<<"$(damages | tail -n +$((seen + 1)))" || fail "no audit record of it: $(damages | tail -n 3)"
coffer umount "$T/m" >/dev/null 2>&1 || umount -l "$T/m" 2>/dev/null || true
flip_log
mountpoint -q "$T/m" || coffer mount tm "$T/m" >/dev/null || fail "mount after it was put back"
for k in $(seq 60); do expect "logged $k" "$(cat "$T/m/l$k")" "l$k after the record was put back"; done
for f in "$T/orig"/*; do expect "" "$(tool bad "$T/m/${f##*/}" "$f")" "bad blocks of ${f##*/}"; done
