#!/bin/bash
# Who must be refused is refused, with a reason in the audit log: the host's root, a container that has the mount's path
# bound in, a container that has the volume but fails the rule, a container that makes a child cgroup named after the
# authorised one. The authorised container and `docker exec` into it work, in every cgroup namespace mode.
source "$(dirname "$0")/lib.sh"
fixture

volume data
run_bg owner -v data:/data coffer-test sleep 1000
id=$(docker inspect -f '{{.Id}}' owner)
docker exec owner sh -c 'mkdir /data/dir; echo the-secret >/data/dir/file' || fail "the container cannot write to its volume"
expect the-secret "$(docker exec owner cat /data/dir/file)" "docker exec into the authorised container"
mnt=$T/c/run/mnt/data
mountpoint -q "$mnt" || mnt=$(coffer volume inspect data --json | sed 's/.*"mountpoint":"\([^"]*\)".*/\1/')
audited '"release"|"grant"|"event":"allow' "the release of the key"

step "host root"
refused 'permission denied' cat "$mnt/dir/file"
refused 'permission denied' ls "$mnt"
refused 'permission denied' ls "$mnt/dir"
refused 'permission denied' dd if=/dev/zero of="$mnt/dir/file" conv=notrunc count=1
refused 'permission denied' touch "$mnt/new"
refused 'permission denied' rm -f "$mnt/dir/file"
refused 'permission denied' mv "$mnt/dir" "$mnt/dir2"
audited 'refus|deny|denied' "the refusal of host root"
before=$(coffer audit --json | grep -cE 'refus|deny|denied' || true)

step "host root that joins the container's cgroup, with a mount namespace of its own: not stopped, but written down"
before=$(coffer audit --json | grep -c '"event":"release"' || true)
docker exec owner cat /data/dir/file >/dev/null # the container has a live grant
expect "$before" "$(coffer audit --json | grep -c '"event":"release"' || true)" "records of the container's own processes"
unshare -m bash -c '
    pid=$1 file=$2
    while IFS=: read -r _ controllers path; do
        case $controllers in
            "") dir=/sys/fs/cgroup/unified$path; [ -d "$dir" ] || dir=/sys/fs/cgroup$path ;;
            name=*) dir=/sys/fs/cgroup/${controllers#name=}$path ;;
            *) dir=/sys/fs/cgroup/$controllers$path ;;
        esac
        if [ -d "$dir" ]; then echo $$ >"$dir/cgroup.procs" || exit 9; fi
    done </proc/$pid/cgroup
    exec cat "$file"' - "$(docker inspect -f '{{.State.Pid}}' owner)" "$mnt/dir/file" >"$T/out" 2>"$T/err" || true
grep -q 'Permission denied' "$T/err" || expect the-secret "$(cat "$T/out")" "what it got ($(cat "$T/err"))"
[ "$(coffer audit --json | grep -c '"event":"release"')" -gt "$before" ] || fail "it left no record: $(coffer audit | tail -3)"

step "a container with the host's / bound in"
run thief -v /:/host coffer-test cat "/host$mnt/dir/file" >"$T/out" 2>"$T/err" && fail "the thief has read it"
grep -qi 'permission denied' "$T/err" || fail "refused with another reason: $(cat "$T/err")"
run thief -v /:/host coffer-test ls "/host$mnt" >"$T/out" 2>"$T/err" && fail "the thief has listed it"
run thief -v "$mnt:/in" coffer-test ls /in >"$T/out" 2>"$T/err" && fail "the thief has listed a bind of the mount"
[ "$(coffer audit --json | grep -cE 'refus|deny|denied')" -gt "$before" ] || fail "the thief is not in the audit log"

step "docker exec still works"
expect the-secret "$(docker exec owner cat /data/dir/file)" "docker exec after the refusals"
expect the-secret "$(docker exec -u 0 owner sh -c 'sh -c "cat /data/dir/file"')" "a grandchild in the container"

step "a second container that has the volume but fails the rule"
coffer policy allow data container:owner >/dev/null
expect the-secret "$(docker exec owner cat /data/dir/file)" "the owner under the rule"
run second -v data:/data coffer-test cat /data/dir/file >"$T/out" 2>"$T/err" && fail "the second container has read it"
grep -qi 'permission denied' "$T/err" || fail "refused with another reason: $(cat "$T/err")"
run_bg third -v data:/data coffer-test sleep 1000
pid=$(docker inspect -f '{{.State.Pid}}' third)
coffer why data --pid "$pid" >"$T/why" || true
grep -q '^refused: .*container' "$T/why" || fail "why: $(cat "$T/why")"
coffer why data --pid "$(docker inspect -f '{{.State.Pid}}' owner)" | grep -q '^allowed' || fail "why: the owner"
coffer policy deny data container:owner >/dev/null
refused 'permission denied' docker exec owner cat /data/dir/file
coffer policy remove data deny container:owner >/dev/null
expect the-secret "$(docker exec owner cat /data/dir/file)" "the owner after the deny rule is gone"

step "a read-only rule"
coffer policy remove data allow container:owner >/dev/null
coffer policy allow data container:owner,ro >/dev/null
docker restart -t 0 owner >/dev/null
expect the-secret "$(docker exec owner cat /data/dir/file)" "reading under ro"
refused 'read-only|permission denied|not permitted' docker exec owner touch /data/new
coffer policy remove data allow container:owner,ro >/dev/null

step "a child cgroup named after the authorised container"
coffer policy allow data container:owner >/dev/null
id=$(docker inspect -f '{{.Id}}' owner)
docker run --rm --name spoof --network none -v /:/host -v /sys/fs/cgroup:/cg coffer-test sh -c '
    owner=$1 file=$2
    self=$(sed -n "s,.*/docker/\([0-9a-f]\{64\}\).*,\1,p" /proc/self/cgroup | head -n 1)
    [ -n "$self" ] || exit 9
    for dir in /cg/*/docker/$self /cg/docker/$self; do
        [ -d $dir ] || continue
        mkdir -p $dir/$owner || exit 8
        # An empty cpuset takes no process.
        for f in cpuset.cpus cpuset.mems; do
            if [ -e $dir/$f ]; then cat $dir/$f >$dir/$owner/$f; fi
        done
        echo $$ >$dir/$owner/cgroup.procs || exit 7
    done
    grep -q "$self/$owner" /proc/self/cgroup || exit 6
    cat "$file" && exit 5
    ls "$(dirname "$file")" && exit 4
    # Leave again, so that the engine can remove the cgroups.
    for dir in /cg/*/docker/$self /cg/docker/$self; do [ -d $dir ] && echo $$ >$dir/cgroup.procs && rmdir $dir/$owner; done
    exit 0' sh "$id" "/host$mnt/dir/file" >"$T/out" 2>"$T/err" || fail "spoof: status $?: $(cat "$T/out" "$T/err")"
grep -qi 'permission denied' "$T/err" || fail "refused with another reason: $(cat "$T/err")"

step "docker cp sees nothing of the content"
docker cp owner:/data/dir/file "$T/copied" >"$T/out" 2>"$T/err" && fail "docker cp has read it"
[ -e "$T/copied" ] && grep -q the-secret "$T/copied" && fail "docker cp has read it"

step "cgroup namespaces"
coffer policy remove data allow container:owner >/dev/null
for mode in host private; do
    expect the-secret "$(run "ns-$mode" --cgroupns=$mode -v data:/data coffer-test cat /data/dir/file)" "--cgroupns=$mode"
done

step "locked"
coffer lock >/dev/null
docker exec owner cat /data/dir/file >"$T/out" 2>&1 && fail "a locked keystore released a key"
coffer unlock --key-file "$T/key" >/dev/null
expect the-secret "$(docker exec owner cat /data/dir/file)" "after unlock"

coffer audit verify >/dev/null || fail "the audit log does not verify"
