#!/bin/bash
# scripts/quickstart twice, then --down: it shows what it promises, and leaves nothing.
source "$(dirname "$0")/../../scripts/lib.sh"
need_root
T=$(mktemp -d /tmp/coffer-test.XXXXXX)
export COFFER_ROOT=$T/c BUILD
finish() {
    local status=$?
    trap - EXIT
    [ $status = 0 ] || { tail -n 20 "$T"/out* "$T/c/cofferd.log" 2>/dev/null || true; }
    "$TOP/scripts/quickstart" --down >/dev/null 2>&1 || true
    unmount_below "$T"
    rm -rf --one-file-system "$T"
    exit $status
}
trap finish EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }
sockets() { ls /run/docker/plugins 2>/dev/null | grep "^coffer-quickstart" || true; }
before=$(sockets)
for n in 1 2; do
    "$TOP/scripts/quickstart" >"$T/out$n" 2>&1 </dev/null || fail "quickstart, run $n"
    grep -q 'Permission denied' "$T/out$n" || fail "run $n shows no refusal"
    grep -q 'not in the backing files' "$T/out$n" || fail "run $n does not look into the backing files"
done
mkdir "$T/nobody"
setpriv --reuid 65534 --clear-groups "$TOP/scripts/quickstart" >"$T/user" 2>&1 && fail "quickstart ran without root"
[ "$(wc -l <"$T/user")" = 1 ] && grep -q sudo "$T/user" || fail "unclear refusal: $(cat "$T/user")"
"$TOP/scripts/quickstart" --down >"$T/down" 2>&1 || fail "--down: $(cat "$T/down")"
[ ! -e "$T/c" ] || fail "--down left $(find "$T/c" | head -n 5)"
grep -q " $T/" /proc/self/mountinfo && fail "--down left a mount"
pgrep -f "$T/c" >/dev/null && fail "--down left a process: $(pgrep -af "$T/c")"
[ "$before" = "$(sockets)" ] || fail "--down left its plugin socket: $(sockets)"
"$TOP/scripts/quickstart" --down >"$T/down" 2>&1 || fail "--down a second time: $(cat "$T/down")"
