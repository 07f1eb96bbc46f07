#!/usr/bin/env python3
"""bench.py - measures file systems side by side: the workloads, the table, the chart. Called by scripts/bench.

usage: bench.py --dir KIND=PATH... [--runs N] [--size MiB] [--only SUBSTRING]... [--svg FILE] [--json FILE]

The kinds take turns, workload by workload and run by run, so that what else the machine does hits them alike. A figure
is the median of the runs. KIND "raw" and "passthrough" are what the others are compared with.
"""
import argparse
import io
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tarfile
import time

MIB = 1 << 20
PG = "/usr/lib/postgresql/15/bin"


def drop_caches():
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as f:
        f.write("3")


def fsync_path(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Bench:
    def __init__(self, size, work):
        self.size = size * MIB
        self.chunk = os.urandom(MIB)
        self.tar = os.path.join(work, "tree.tar")

    # --- sequential ---

    def write_sequential(self, d):
        path = d + "/sequential"
        start = time.monotonic()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for _ in range(self.size // MIB):
            os.write(fd, self.chunk)
        os.fsync(fd)
        seconds = time.monotonic() - start
        os.close(fd)
        return self.size / 1e6 / seconds

    def read_all(self, path):
        buf = bytearray(MIB)
        start = time.monotonic()
        fd = os.open(path, os.O_RDONLY)
        with open(fd, "rb", buffering=0) as f:
            while f.readinto(buf):
                pass
        return self.size / 1e6 / (time.monotonic() - start)

    def read_cold(self, d):
        if not os.path.exists(d + "/sequential"):
            self.write_sequential(d)
        drop_caches()
        return self.read_all(d + "/sequential")

    def read_cached(self, d):
        if not os.path.exists(d + "/sequential"):
            self.write_sequential(d)
        self.read_all(d + "/sequential")
        return self.read_all(d + "/sequential")

    # --- fio ---

    TIMED = ("--runtime=4", "--time_based")

    def fio(self, d, *args):
        out = subprocess.run(
            ["fio", "--name=b", "--directory=" + d, "--output-format=json", "--group_reporting", "--thread",
             "--fallocate=none", *args],
            check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout
        job = json.loads(out[out.index(b"{"):])["jobs"][0]
        return job["read"]["iops"] + job["write"]["iops"]

    def read_random(self, d):
        path = d + "/random"
        if not os.path.exists(path):
            with open(path, "wb") as f:
                for _ in range(256):
                    f.write(self.chunk)
                os.fsync(f.fileno())
        drop_caches()
        # Each block once: what is read again comes from the page cache.
        return self.fio(d, "--rw=randread", "--bs=4k", "--numjobs=2", "--filename=random", "--size=128m", "--offset_increment=128m",
                        "--invalidate=0")

    def write_growing(self, d):
        path = d + "/growing"
        if os.path.exists(path):
            os.unlink(path)
        block = self.chunk[:4096]
        n = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        start = time.monotonic()
        while time.monotonic() - start < 4:
            os.write(fd, block)
            os.fdatasync(fd)
            n += 1
        seconds = time.monotonic() - start
        os.close(fd)
        os.unlink(path)
        return n / seconds

    def overwrite_sync(self, d):
        for job in range(2):
            path = f"{d}/b.{job}.0"
            if not os.path.exists(path):
                with open(path, "wb") as f:
                    for _ in range(32):
                        f.write(self.chunk)
                    os.fsync(f.fileno())
        return self.fio(d, "--rw=randwrite", *self.TIMED, "--bs=8k", "--fdatasync=1", "--size=32m", "--numjobs=2", "--overwrite=1")

    def write_random(self, d):
        path = d + "/buffered"
        if not os.path.exists(path):
            with open(path, "wb") as f:
                for _ in range(128):
                    f.write(self.chunk)
                os.fsync(f.fileno())
        got = self.fio(d, "--rw=randwrite", *self.TIMED, "--bs=4k", "--size=128m", "--filename=buffered", "--overwrite=1")
        fsync_path(path)
        return got

    # --- names ---

    FILES = 4000

    def create(self, d):
        top = d + "/many"
        shutil.rmtree(top, ignore_errors=True)
        os.mkdir(top)
        block = self.chunk[:4096]
        start = time.monotonic()
        for i in range(self.FILES):
            fd = os.open(f"{top}/{i}", os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(fd, block)
            os.close(fd)
        return self.FILES / (time.monotonic() - start)

    def stat_cold(self, d):
        top = d + "/many"
        if not os.path.exists(top):
            self.create(d)
        drop_caches()
        names = [f"{top}/{i}" for i in range(self.FILES)]
        start = time.monotonic()
        for name in names:
            os.stat(name)
        return self.FILES / (time.monotonic() - start)

    def make_tar(self):
        if os.path.exists(self.tar):
            return
        # 9500 files, 140 MB: the sizes of a source tree, most of them small.
        sizes = [1200, 2500, 4000, 5000, 7000, 9000, 12000, 16000, 24000, 66600]
        with tarfile.open(self.tar, "w") as t:
            for i in range(9500):
                if i % 19 == 0:
                    info = tarfile.TarInfo(f"tree/{i // 380}/{i // 19}")
                    info.type = tarfile.DIRTYPE
                    info.mode = 0o755
                    t.addfile(info)
                n = sizes[i % len(sizes)]
                info = tarfile.TarInfo(f"tree/{i // 380}/{i // 19}/{i}.c")
                info.size = n
                t.addfile(info, io.BytesIO(self.chunk[i:i + n]))

    def untar(self, d):
        self.make_tar()
        shutil.rmtree(d + "/tree", ignore_errors=True)
        with open(self.tar, "rb") as f:
            while f.read(MIB):
                pass
        start = time.monotonic()
        subprocess.run(["tar", "-C", d, "--no-same-owner", "-xf", self.tar], check=True)
        os.sync()
        # sync(2) writes the kernel's pages out, but it asks no FUSE server to flush: this does.
        fsync_path(d + "/tree")
        seconds = time.monotonic() - start
        shutil.rmtree(d + "/tree")
        return seconds

    # --- PostgreSQL ---

    def pgbench(self, d, clients):
        if d.endswith("/passthrough"):
            return None  # it makes every file as root, in which PostgreSQL does not start
        user = pwd.getpwnam("postgres")
        data = d + "/pg"

        def pg(*args, **kw):
            return subprocess.run(["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *args],
                                  check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", text=True, **kw).stdout

        if not os.path.exists(data):
            os.mkdir(data, 0o700)
            os.chown(data, user.pw_uid, user.pw_gid)
            pg(PG + "/initdb", "-D", data, "-A", "trust", "--no-instructions")
        log = subprocess.DEVNULL
        server = subprocess.Popen(
            ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", PG + "/postgres", "-D", data,
             "-c", "listen_addresses=", "-c", "unix_socket_directories=/tmp", "-p", "54329", "-c", "shared_buffers=256MB",
             "-c", "checkpoint_timeout=30min", "-c", "max_wal_size=4GB"],
            stdout=log, stderr=log, cwd="/")
        try:
            for _ in range(300):
                if subprocess.run([PG + "/pg_isready", "-q", "-h", "/tmp", "-p", "54329"]).returncode == 0:
                    break
                time.sleep(0.1)
            at = ["-h", "/tmp", "-p", "54329", "postgres"]
            marker = d + "/pg.ready"
            if not os.path.exists(marker):
                pg(PG + "/pgbench", "-q", "-i", "-s", "10", *at)
                open(marker, "w").close()
            pg(PG + "/psql", "-qc", "checkpoint", *at)
            out = pg(PG + "/pgbench", "-n", "-c", str(clients), "-j", "2", "-T", "10", *at)
            return float([x for x in out.splitlines() if x.startswith("tps")][0].split()[2])
        finally:
            server.terminate()
            server.wait()

    def workloads(self):
        return [
            ("sequential write 1 MiB + fsync, MB/s", self.write_sequential),
            ("sequential read, cold, MB/s", self.read_cold),
            ("sequential read, cached, MB/s", self.read_cached),
            ("random read 4 KiB, cold, 2 jobs, IOPS", self.read_random),
            ("write 4 KiB + fdatasync, grows, IOPS", self.write_growing),
            ("overwrite 8 KiB + fdatasync, 2 jobs, IOPS", self.overwrite_sync),
            ("random write 4 KiB buffered, IOPS", self.write_random),
            ("create 4 KiB files, files/s", self.create),
            ("stat of each, cold, per s", self.stat_cold),
            ("untar 9500 files (140 MB) + sync, s", self.untar),
            ("pgbench, 1 client, tps", lambda d: self.pgbench(d, 1)),
            ("pgbench, 8 clients, tps", lambda d: self.pgbench(d, 8)),
        ]


def lower_is_better(name):
    return name.endswith(", s")


def svg(rows, kinds, path):
    """Bars: each workload relative to raw, so that 1 is the file system underneath."""
    colours = ["#888888", "#4477aa", "#ccbb44", "#228833", "#66ccee"]
    bar, gap, left, width = 11, 14, 300, 420
    height = sum(len(kinds) * bar + gap for _ in rows) + 60
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{height}" '
           'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    x = left
    for i, k in enumerate(kinds):
        out.append(f'<rect x="{x}" y="8" width="10" height="10" fill="{colours[i % 5]}"/><text x="{x + 14}" y="17">{k}</text>')
        x += 100
    y = 34
    for name, medians in rows:
        out.append(f'<text x="{left - 8}" y="{y + len(kinds) * bar / 2 + 4}" text-anchor="end">{name}</text>')
        for i, k in enumerate(kinds):
            base = medians["raw"]
            if k not in medians:
                continue
            ratio = base / medians[k] if lower_is_better(name) else medians[k] / base
            w = min(ratio, 2.0) * width / 2
            out.append(f'<rect x="{left}" y="{y}" width="{w:.1f}" height="{bar - 2}" fill="{colours[i % 5]}"/>'
                       f'<text x="{left + w + 4:.1f}" y="{y + bar - 3}" font-size="9">{ratio:.2f}</text>')
            y += bar
        y += gap
    out.append(f'<line x1="{left + width / 2}" y1="28" x2="{left + width / 2}" y2="{y}" stroke="#000" stroke-dasharray="3,3"/>')
    out.append(f'<text x="{left + width / 2}" y="{y + 14}" text-anchor="middle">speed relative to the file system underneath'
               '</text></svg>')
    with open(path, "w") as f:
        f.write("\n".join(out) + "\n")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--dir", action="append", required=True)
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--only", action="append")
    p.add_argument("--work", required=True)
    p.add_argument("--svg")
    p.add_argument("--json")
    a = p.parse_args()
    dirs = dict(x.split("=", 1) for x in a.dir)
    b = Bench(a.size, a.work)
    rows = []
    print("%-44s" % "workload" + "".join("%13s" % k for k in dirs) + "%8s%8s%8s" % ("/raw", "/pass", "/gocr"))
    for name, f in b.workloads():
        if a.only and not any(o in name for o in a.only):
            continue
        got = {k: [] for k in dirs}
        for _ in range(a.runs):
            for k, d in dirs.items():
                got[k].append(f(d))
        m = {k: statistics.median(v) for k, v in got.items() if None not in v}
        rows.append((name, m))

        def ratio(k):
            return "%8.2f" % (m["coffer"] / m[k]) if k in m and "coffer" in m else "%8s" % "-"
        digits = 2 if lower_is_better(name) else 0
        print("%-44s" % name + "".join("%13.*f" % (digits, m[k]) if k in m else "%13s" % "-" for k in dirs) + ratio("raw") + ratio("passthrough") +
              ratio("gocryptfs"), flush=True)
        if a.svg and "raw" in dirs:
            svg(rows, list(dirs), a.svg)
        if a.json:
            with open(a.json, "w") as out:
                json.dump([{"workload": n, "medians": x} for n, x in rows], out, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
