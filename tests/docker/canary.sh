#!/bin/bash
# Content, file names, directory names, xattrs and symlink targets appear nowhere in the backing files, the state files
# and the logs, and a process of ours that dies leaves no core file.
ulimit -c unlimited 2>/dev/null || true
source "$(dirname "$0")/lib.sh"
fixture

canary=CANARY$RANDOM$RANDOM$RANDOM
touch "$T/since"
volume data
run_bg owner -e C=$canary -v data:/data coffer-test sleep 1000
docker exec owner sh -c '
    cd /data && mkdir "dir-$C" && cd "dir-$C" &&
    echo "content-$C" >"file-$C" && ln -s "target-$C" link && echo small-$C >s &&
    i=0; while [ $i -lt 20000 ]; do echo "line $i of content-$C"; i=$((i + 1)); done >big-$C &&
    mv "file-$C" "renamed-$C" && ln "renamed-$C" "hard-$C" && sync && cat no-such-$C' >/dev/null 2>&1 || true
docker exec owner sh -c 'ls "/data/dir-$C/renamed-$C" "/data/dir-$C/big-$C"' >/dev/null || fail "the files are not there"
mnt=$T/c/run/mnt/data
cat "$mnt/dir-$canary/renamed-$canary" 2>/dev/null && fail "host root has read it"
setpriv --reuid 65534 --clear-groups cat "$mnt/dir-$canary/x-$canary" 2>/dev/null || true

# A local volume takes the xattrs, which busybox cannot set.
coffer volume create local --size 100M --allow uid:0 >/dev/null
mkdir "$T/mnt"
coffer mount local "$T/mnt" >/dev/null
python3 - "$T/mnt" $canary <<'PY' || fail "xattrs"
import os, sys
d, c = sys.argv[1:]
p = os.path.join(d, "x-" + c)
open(p, "w").write("content-" + c)
os.setxattr(p, "user.name-" + c, ("value-" + c).encode())
os.symlink("long-target-" + c * 30, os.path.join(d, "l-" + c))
os.sync()
PY
sleep 6   # a background checkpoint

look() {
    local found
    found=$(grep -rlaF "$canary" --exclude-dir=mnt --exclude-dir=engine "$T/c" 2>/dev/null || true)
    [ -z "$found" ] || fail "$1: the canary is in $found"
}
look "while mounted"

step "no core file, whoever dies"
cores() { find / /var/lib/systemd/coredump /var/crash -xdev -maxdepth 1 -name '*core*' -newer "$T/since" -type f 2>/dev/null; find "$T" -xdev -name 'core*' -type f -newer "$T/since" -not -path '*/engine/*' -not -path '*/image/*'; }
victims="$(server_pid data) $(server_pid local) $(agent_pid)"
for pid in $victims; do
    grep -q "^Max core file size *0 *0" "/proc/$pid/limits" || fail "process $pid may dump core"
    kill -ABRT "$pid"
done
sleep 2
for pid in $victims; do [ ! -d "/proc/$pid" ] || [ "$(awk '/^State/{print $2}' "/proc/$pid/status")" = Z ] || fail "$pid still lives"; done
expect "" "$(cores)" "core files"
umount -l "$T/mnt" 2>/dev/null || true
look "after the deaths"
docker rm -f owner >/dev/null
coffer down --force >/dev/null 2>&1 || true
look "after down"
# The container's own command lines and environment are the engine's business; what coffer passed to it is not there.
grep -rlaF "content-$canary" "$T/engine" 2>/dev/null | grep . && fail "the content is in the engine's files"
exit 0
