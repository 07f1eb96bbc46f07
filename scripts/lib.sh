# lib.sh - what the scripts and the tests with containers share: packages, users, images, an engine of one's own.
# Sourced by bash scripts; sets TOP (the checkout) and BUILD, and strict mode.
# shellcheck shell=bash

set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
PATH=/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin
umask 022
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
BUILD=${BUILD:-$TOP/build}

BUILD_PACKAGES=(gcc libc6-dev make pkg-config libfuse3-dev libsodium-dev libjansson-dev libmicrohttpd-dev
    libcurl4-openssl-dev libseccomp-dev)
ENGINE_PACKAGES=(docker.io busybox-static)
TEST_PACKAGES=(libcmocka-dev clang llvm libclang-rt-14-dev python3 util-linux procps curl sqlite3 tzdata attr postgresql-15
    mariadb-server strace stress-ng)

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "root is needed: run sudo $0 $*"
}

# --- packages and users ---

package_missing() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" != installed ]
}

# install_packages NAME...: installs what is missing, and touches nothing when nothing is.
install_packages() {
    local missing=() p
    command -v apt-get >/dev/null || die "this script knows Debian's apt-get only; install the packages by hand: $*"
    for p in "$@"; do
        if package_missing "$p"; then missing+=("$p"); fi
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    # PostgreSQL's package would make and start a database of its own, which nobody asked for.
    if [[ " ${missing[*]} " == *" postgresql-15 "* ]] && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        mkdir -p /etc/postgresql-common
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    fi
    # MariaDB's would start one; a policy that says no is the packages' own way to be asked not to.
    local policy=
    if [[ " ${missing[*]} " == *" mariadb-server "* ]] && [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    { apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"; } >/tmp/coffer-apt.$$ 2>&1 ||
        { tail -n 15 /tmp/coffer-apt.$$ >&2; rm -f /tmp/coffer-apt.$$ $policy; die "apt-get could not install ${missing[*]}"; }
    rm -f /tmp/coffer-apt.$$ $policy
}

COFFER_USERS=(coffer-keyd coffer-fs)

# ensure_users: the two users without privilege. Prints the names of those that it made.
ensure_users() {
    local u
    for u in "${COFFER_USERS[@]}"; do
        getent passwd "$u" >/dev/null && continue
        useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$u" ||
            die "cannot make the user $u"
        say "$u"
    done
}

build_programs() {
    make -C "$TOP" BUILD="$BUILD" -j"$(nproc)" all >/tmp/coffer-make.$$ 2>&1 ||
        { tail -n 30 /tmp/coffer-make.$$ >&2; rm -f /tmp/coffer-make.$$; die "the build failed"; }
    rm -f /tmp/coffer-make.$$
}

# --- images, made from the host's own programs: no registry ---

# copy_with_libs ROOT FILE...: copies files, and the shared libraries that they need, to the same paths below ROOT.
copy_with_libs() {
    local root=$1 f
    shift
    for f in "$@"; do
        printf '%s\n' "$f"
        ldd "$f" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\// {print $1}'
    done | sort -u | while IFS= read -r f; do
        mkdir -p "$root$(dirname "$f")"
        cp -Lp --remove-destination "$f" "$root$f"
    done
}

# rootfs_base ROOT: busybox and the few files that a container expects.
rootfs_base() {
    local root=$1 a
    mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/{etc,proc,sys,dev,tmp,root,var/lib,data,host}
    for a in bin sbin lib lib64; do ln -sfn "usr/$a" "$root/$a"; done
    chmod 1777 "$root/tmp"
    cp -L "$(command -v busybox)" "$root/usr/bin/busybox"
    for a in $("$root/usr/bin/busybox" --list); do
        [ "$a" = busybox ] || ln -sfn busybox "$root/usr/bin/$a"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\npostgres:x:999:999::/var/lib/postgresql:/bin/sh\n' >"$root/etc/passwd"
    printf 'root:x:0:\npostgres:x:999:\n' >"$root/etc/group"
}

# rootfs_sqlite ROOT, rootfs_postgres ROOT: the same with a database in it.
rootfs_sqlite() {
    copy_with_libs "$1" "$(command -v sqlite3)" /usr/bin/stdbuf
    mkdir -p "$1/usr/libexec/coreutils"
    cp -L /usr/libexec/coreutils/libstdbuf.so "$1/usr/libexec/coreutils/"
}

PG=/usr/lib/postgresql/15

rootfs_postgres() {
    local root=$1 libs
    libs=$(find $PG/lib -name '*.so' ! -name 'llvmjit*')
    # shellcheck disable=SC2086
    copy_with_libs "$root" $PG/bin/{postgres,initdb,psql,pgbench,pg_amcheck,pg_ctl,pg_isready} $libs
    mkdir -p "$root/usr/share/postgresql" "$root/var/lib/postgresql/data"
    cp -a /usr/share/postgresql/15 "$root/usr/share/postgresql/"
    cp -a /usr/share/zoneinfo "$root/usr/share/"
    # What an image brings in the volume's place is copied into a fresh volume, with owner and mode.
    echo "from the image" >"$root/var/lib/postgresql/README"
    chown -R 999:999 "$root/var/lib/postgresql"
    chmod 700 "$root/var/lib/postgresql/data"
    ln -sfn $PG/bin/{psql,pgbench,pg_amcheck,pg_isready} "$root/usr/bin/"
}

# image_import ROOT NAME:TAG: through the docker function or program in scope.
image_import() {
    tar -C "$1" -c . | docker import - "$2" >/dev/null
}

# --- an engine of one's own ---

# engine_start DIR: starts dockerd with everything below DIR (socket DIR/docker.sock, log DIR/dockerd.log) and waits
# until it answers. Starting again over the same DIR is a restart with the same containers.
engine_start() {
    local dir=$1 pid driver
    mkdir -p "$dir/root" "$dir/exec"
    rm -f "$dir/dockerd.pid"
    # dockerd takes a zombie of an earlier containerd for a living one, and waits for it in vain.
    pid=$(cat "$dir/exec/containerd/containerd.pid" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(awk '/^State/{print $2}' "/proc/$pid/status" 2>/dev/null)" = Z ]; then
        rm -f "$dir/exec/containerd/containerd.pid"
    fi
    for driver in "" vfs; do
        setsid dockerd --data-root "$dir/root" --exec-root "$dir/exec" --pidfile "$dir/dockerd.pid" \
            -H "unix://$dir/docker.sock" --bridge=none --iptables=false --ip6tables=false --ip-forward=false \
            ${driver:+--storage-driver=$driver} >>"$dir/dockerd.log" 2>&1 </dev/null &
        pid=$!
        disown
        for _ in $(seq 300); do
            if command docker -H "unix://$dir/docker.sock" version >/dev/null 2>&1; then return 0; fi
            kill -0 $pid 2>/dev/null || break
            sleep 0.1
        done
        engine_kill_pid "$pid"
        # overlayfs does not work on top of every filesystem; vfs does.
        grep -q "storage-driver\|driver not supported\|error initializing graphdriver" "$dir/dockerd.log" || break
    done
    return 1
}

engine_pid() { cat "$1/dockerd.pid" 2>/dev/null || true; }

# Ends a process by its number and waits; kills it after 20 s.
engine_kill_pid() {
    local pid=$1
    [ -n "$pid" ] && kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 200); do
        [ -d "/proc/$pid" ] && [ "$(awk '/^State/{print $2}' "/proc/$pid/status" 2>/dev/null)" != Z ] || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
}

# engine_stop DIR: ends dockerd (its containerd goes with it) and unmounts what it left mounted.
engine_stop() {
    local dir=$1 m pid
    engine_kill_pid "$(engine_pid "$dir")"
    pid=$(cat "$dir/exec/containerd/containerd.pid" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = containerd ]; then engine_kill_pid "$pid"; fi
    unmount_below "$dir"
}

# unmount_below DIR: whatever is still mounted there, the deepest first.
unmount_below() {
    local m
    awk -v d="$1/" 'index($5, d) == 1 {print $5}' /proc/self/mountinfo | sort -r | while IFS= read -r m; do
        umount "$(printf '%b' "$m")" 2>/dev/null || umount -l "$(printf '%b' "$m")" 2>/dev/null || true
    done
}
