#!/bin/bash
# The engine copies an image's files into a fresh volume, with owner and mode; afterwards it sees a placeholder only, and
# docker cp fails with a clear refusal. A second container sees the content. Options of `docker volume create`.
source "$(dirname "$0")/lib.sh"
fixture

mkdir -p "$T/image/seed/sub"
echo "from the image" >"$T/image/seed/sub/file"
ln -s sub/file "$T/image/seed/link"
chmod 750 "$T/image/seed" "$T/image/seed/sub"
chown -R 1234:4321 "$T/image/seed"
image_import "$T/image" coffer-seed

volume seeded
run first -v seeded:/seed coffer-seed sh -c 'cat /seed/sub/file /seed/link; stat -c "%u:%g %a" /seed /seed/sub' >"$T/out" ||
    fail "the first container"
expect "from the image
from the image
1234:4321 750
1234:4321 750" "$(cat "$T/out")" "what the first container sees"
run second -v seeded:/elsewhere coffer-test sh -c 'echo more >/elsewhere/new; cat /elsewhere/sub/file' | grep -q "from the image" ||
    fail "the second container"

step "a used volume is not filled again, and the engine sees no content"
run_bg third -v seeded:/seed coffer-seed sleep 1000
expect more "$(docker exec third cat /seed/new)" "the third container"
if docker cp third:/seed/sub/file "$T/copied" >"$T/out" 2>&1; then fail "docker cp has read the volume"; fi
grep -qi 'permission denied' "$T/out" || fail "docker cp is refused with another reason: $(cat "$T/out")"
if docker cp "$T/key" third:/seed/put >"$T/out" 2>&1; then fail "docker cp has written to the volume"; fi
docker exec third test ! -e /seed/put || fail "docker cp left a file"
expect "from the image" "$(docker exec third cat /seed/sub/file)" "after docker cp"

step "options"
volume opts size=100M block=8k uid=77 gid=88 mode=0711 profile=database
expect "77:88 711" "$(run opts -v opts:/not-in-the-image coffer-test stat -c '%u:%g %a' /not-in-the-image)" "uid, gid and mode"
run opts -v opts:/data coffer-test df -k /data | tail -n 1 | awk '{exit !($2 > 60000 && $2 <= 102400)}' || fail "df does not show the size"
docker volume create -d "$DRIVER" -o size=100M -o block=8k -o uid=77 -o gid=88 -o mode=0711 -o profile=database opts >/dev/null ||
    fail "creating it again with the same options"
refused '.' docker volume create -d "$DRIVER" -o size=200M other --label x=1 -o nonsense=1
refused 'nonsense' docker volume create -d "$DRIVER" -o nonsense=1 other2
for bad in ../x a/b .hidden; do refused '.' docker volume create -d "$DRIVER" "$bad"; done

step "removal"
refused 'in use' docker volume rm seeded
docker rm -f third >/dev/null
docker volume rm seeded >/dev/null || fail "docker volume rm"
[ "$(find "$T/c/volumes" -mindepth 1 -maxdepth 1 -type d | wc -l)" = 1 ] || fail "the removed volume's files are still there"
docker volume ls -q | grep -qx opts || fail "docker volume ls"
