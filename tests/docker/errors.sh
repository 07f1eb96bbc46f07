#!/bin/bash
# What goes wrong says so in one clear line, with the right exit status, and loses nothing: wrong and missing passphrase,
# locked keystore, unknown options, bad names, a full backing filesystem, the size limit, rubbish at the plugin.
source "$(dirname "$0")/lib.sh"
need_root
ensure_users >/dev/null
T=$(mktemp -d /tmp/coffer-test.XXXXXX)
DRIVER=coffer-test-${T##*.}
DRIVER=${DRIVER,,}
trap fixture_end EXIT
trap 'exit 1' INT TERM HUP
test_cleanup() { umount "$T/mnt" 2>/dev/null; }

step "usage"
one_line 2 'command' "$BUILD/coffer"
one_line 2 'unknown command' coffer nonsense
one_line 2 'unknown option' coffer status --nonsense
one_line 2 'missing argument' coffer volume create
one_line 2 'unexpected argument' coffer status extra
one_line 2 'needs a value' coffer volume create v --size
one_line 2 'size' coffer volume create v --size 10Q
one_line 2 'twice' coffer volume create v --size 1G --size 2G
one_line 2 'pid' coffer why v

step "cofferd is not running"
for c in init unlock lock status "volume ls" "volume create v" "policy show v" "umount /tmp"; do
    # shellcheck disable=SC2086
    one_line 1 'cofferd is not running: run `coffer up`' coffer $c </dev/null
done

# The volumes lie on a small filesystem, which can be filled.
mkdir -p "$T/c/volumes"
chmod 700 "$T/c"
mount -t tmpfs -o size=320m,mode=700 tmpfs "$T/c/volumes"
cofferd_start
one_line 1 'init' coffer unlock <<<"$PASSPHRASE"
one_line 1 'init|keystore' coffer volume create early
one_line 1 'passphrase' coffer init </dev/null
coffer init <<<"$PASSPHRASE" >"$T/recovery"
grep -q . "$T/recovery" || fail "no recovery key"
one_line 1 'already|exists' coffer init <<<"$PASSPHRASE"

step "passphrases"
coffer lock >/dev/null
one_line 1 'passphrase|slot|wrong|open' coffer unlock <<<"wrong"
one_line 1 'passphrase' coffer unlock </dev/null
echo x >"$T/badkey"
chmod 600 "$T/badkey"
one_line 1 'key' coffer unlock --key-file "$T/badkey"
one_line 1 'No such file' coffer unlock --key-file "$T/nokey"
chmod 644 "$T/badkey"
one_line 1 'chmod 600' coffer unlock --key-file "$T/badkey"
one_line 1 'lock' coffer volume create locked
coffer unlock <<<"$PASSPHRASE" >/dev/null || fail "the right passphrase"
coffer lock >/dev/null
sed -n 's/^ \{4\}\([A-Za-z0-9-]\{20,\}\)$/\1/p' "$T/recovery" | head -n 1 | coffer unlock --recovery >/dev/null ||
    fail "the recovery key does not unlock"

step "names and options"
for n in ../x a/b .x "" "$(printf 'a%.0s' $(seq 200))" "a b"; do one_line 1 'name' coffer volume create "$n"; done
one_line 1 'size|least|between' coffer volume create v --size 4k
one_line 1 'block' coffer volume create v --block 5k
one_line 1 'profile' coffer volume create v --profile fast
one_line 1 'selector|rule|unknown' coffer volume create v --allow colour:blue
one_line 1 'no volume|no such|not' coffer volume inspect nobody
one_line 2 'unexpected argument "a.b"' coffer volume inspect v $'a\nb'
one_line 1 'no volume|no such|not' coffer volume rm nobody
one_line 1 'no such|no volume|not' coffer mount nobody "$T"

step "the volume's size limit"
mkdir "$T/mnt"
coffer volume create v --size 80M --allow uid:0 >/dev/null
one_line 1 'exists' coffer volume create v --size 90M --allow uid:0
one_line 1 'No such file' coffer mount v "$T/nodir"
coffer mount v "$T/mnt" >/dev/null
echo precious >"$T/mnt/precious"
sync "$T/mnt/precious"
fill() { dd if=/dev/zero of="$T/mnt/$1" bs=1M count="$2" conv=fsync; }
refused 'No space left' fill big 200
expect precious "$(cat "$T/mnt/precious")" "after ENOSPC"
rm "$T/mnt/big"
again() { fill small 10; }
wait_for 15 again
coffer umount "$T/mnt" >/dev/null
coffer volume check v --data >"$T/out" || fail "check after the size limit: $(head -n 3 "$T/out")"

step "the backing filesystem is full"
coffer volume create w --size 1G --allow uid:0 >/dev/null || fail "cannot make w"
coffer mount w "$T/mnt" >/dev/null
echo precious >"$T/mnt/precious"
sync "$T/mnt/precious"
dd if=/dev/zero of="$T/c/volumes/filler" bs=64k >/dev/null 2>&1 || true
fill big 300 >/dev/null 2>&1 && fail "300 MB fit where there is no room"
expect precious "$(cat "$T/mnt/precious")" "on a full filesystem"
one_line 1 '.' coffer volume create x --size 100M
rm "$T/c/volumes/filler"
rm -f "$T/mnt/big" 2>/dev/null || true
coffer umount "$T/mnt" >/dev/null || fail "umount"
coffer volume check w --data >"$T/out" || fail "check after the full filesystem: $(head -n 3 "$T/out")"
coffer mount w "$T/mnt" >/dev/null
expect precious "$(cat "$T/mnt/precious")" "after the filesystem was full"
echo more >"$T/mnt/more" || fail "cannot write after the filesystem was full"

step "busy, and down"
one_line 1 'busy|in use|mounted' coffer volume rm w
one_line 1 'busy|held|mounted|in use' coffer down
coffer umount "$T/mnt" >/dev/null

step "rubbish at the plugin and at the control socket"
plugin=/run/docker/plugins/$DRIVER.sock
call() { curl -s -m 10 --unix-socket "$plugin" "$@"; }
long=$(head -c 65536 /dev/zero | tr '\0' a)
for body in '{' '[]' '{"Name":1}' '{"Name":"../x"}' "{\"Name\":\"$long\"}" '{"Name":"a\u0000b"}' $'{"Name":"\xff"}'; do
    for method in Create Mount Path Get; do
        code=$(call -o "$T/out" -w '%{http_code}' --data-binary "$body" "http://x/VolumeDriver.$method") || code=000
        case $code in
        000) ;; # hung up: allowed where an answer would be taken as "does not exist"
        500) grep -q '"Err": *"[^"]' "$T/out" || fail "$method: no reason in $(head -c 200 "$T/out")" ;;
        *) fail "$method accepted ${body:0:40} with status $code: $(head -c 200 "$T/out")" ;;
        esac
    done
done
python3 - "$plugin" "$T/c/run/cofferd.sock" <<'PY' || fail "rubbish on the sockets"
import socket, sys
for path in sys.argv[1:]:
    for junk in (b"\xff\xff\xff\x7f" + b"x" * 1000, b"\x02\0\0\0{]", b"\0\0\0\0", b"\x05", bytes(range(256)) * 40):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(3)
        s.connect(path)
        try:
            s.sendall(junk)
            s.shutdown(socket.SHUT_WR)
            s.recv(1000)
        except OSError:
            pass
        s.close()
PY
expect 404 "$(call -o /dev/null -w '%{http_code}' -d '{}' http://x/VolumeDriver.Nonsense)" "an unknown path"
coffer status >/dev/null || fail "cofferd does not answer any more"
coffer mount v "$T/mnt" >/dev/null
expect precious "$(cat "$T/mnt/precious")" "at the end"
coffer umount "$T/mnt" >/dev/null
coffer volume rm v >/dev/null
coffer audit verify >/dev/null || fail "audit verify"
coffer down >/dev/null || fail "down"
