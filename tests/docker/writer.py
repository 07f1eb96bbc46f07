#!/usr/bin/env python3
"""A write load that knows what was acknowledged, and its check.

    writer.py write DIR ACKS SECONDS   several threads append, overwrite, make and rename files on DIR; each step that
                                       fsync acknowledged is a line in ACKS (outside the volume, fsynced lazily)
    writer.py check DIR ACKS           everything in ACKS is on DIR, and every record that is there is whole

The writers end quietly when the filesystem fails under them: that is the test.
"""
import hashlib, os, sys, threading, time

REC = 512


def record(name, n):
    head = b"%s %d " % (name.encode(), n)
    body = hashlib.sha256(head).hexdigest().encode()
    return (head + body * 8)[: REC - 1] + b"\n"


class Acks:
    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, *words):
        os.write(self.fd, (" ".join(map(str, words)) + "\n").encode())


def fsync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def appender(d, acks, name, end, sync):
    fd = os.open(os.path.join(d, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    n = 0
    while time.time() < end:
        for _ in range(1 + n % 7):
            os.write(fd, record(name, n))
            n += 1
        sync(fd)
        acks.add("append", name, n)


def overwriter(d, acks, name, end):
    """Block-aligned overwrites in place: each block holds a version, only ever newer."""
    fd = os.open(os.path.join(d, name), os.O_RDWR | os.O_CREAT, 0o600)
    n = 0
    while time.time() < end:
        n += 1
        block = (n * 7919) % 256
        os.pwrite(fd, record("%s.%d" % (name, block), n) * 8, block * 4096)
        os.fdatasync(fd)
        acks.add("over", name, block, n)


def maker(d, acks, name, end):
    """Files made under a temporary name, synced, renamed, directory synced; each third one is removed again."""
    sub = os.path.join(d, name)
    os.makedirs(sub, exist_ok=True)
    fsync_dir(d)
    n = 0
    while time.time() < end:
        n += 1
        path = os.path.join(sub, "f%d" % n)
        fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, record(path[len(d):], n) * (1 + n % 40))
        os.fsync(fd)
        os.close(fd)
        os.rename(path + ".tmp", path)
        fsync_dir(sub)
        acks.add("make", name, n)
        if n % 3 == 0:
            acks.add("removing", name, n)
            os.unlink(path)
            fsync_dir(sub)
            acks.add("removed", name, n)


def write(d, path, seconds):
    acks, end = Acks(path), time.time() + seconds
    tag = os.path.basename(path)
    jobs = [(appender, "a-" + tag, os.fsync), (appender, "b-" + tag, os.fdatasync), (overwriter, "o-" + tag), (maker, "m-" + tag)]

    def run(fn, name, *more):
        try:
            fn(d, acks, name, end, *more)
        except OSError as e:
            print("%s: %s" % (name, e), file=sys.stderr)

    threads = [threading.Thread(target=run, args=j) for j in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def check(d, path):
    bad, appended, over, made, gone, going = [], {}, {}, set(), set(), set()
    for line in open(path):
        if not line.endswith("\n"):
            break
        w = line.split()
        if w[0] == "append":
            appended[w[1]] = int(w[2])
        elif w[0] == "over":
            over.setdefault(w[1], {})[int(w[2])] = int(w[3])
        else:
            {"make": made, "removing": going, "removed": gone}[w[0]].add((w[1], int(w[2])))
    for name, n in appended.items():
        data = open(os.path.join(d, name), "rb").read()
        if len(data) < n * REC:
            bad.append("%s: %d bytes, %d records were acknowledged" % (name, len(data), n))
        for i in range(len(data) // REC):
            if data[i * REC:(i + 1) * REC] != record(name, i):
                bad.append("%s: record %d is wrong" % (name, i))
                break
    for name, blocks in over.items():
        data = open(os.path.join(d, name), "rb").read()
        for block, n in blocks.items():
            b = data[block * 4096:(block + 1) * 4096]
            try:
                have = int(b.split()[1])
            except (IndexError, ValueError):
                have = -1
            if have < n or b != record("%s.%d" % (name, block), have) * 8:
                bad.append("%s: block %d has version %d, %d was acknowledged, or is torn" % (name, block, have, n))
    for name, n in made - going:
        p = os.path.join(d, name, "f%d" % n)
        want = record(p[len(d):], n) * (1 + n % 40)
        try:
            if open(p, "rb").read() != want:
                bad.append("%s: wrong content" % p)
        except OSError as e:
            bad.append("%s: %s" % (p, e))
    for name, n in gone:
        if os.path.exists(os.path.join(d, name, "f%d" % n)):
            bad.append("%s/f%d is back" % (name, n))
    for b in bad[:20]:
        print(b)
    print("%d appended, %d blocks, %d files acknowledged; %d wrong" % (
        sum(appended.values()), sum(map(len, over.values())), len(made), len(bad)))
    return 1 if bad or not (appended and over and made) else 0


if sys.argv[1] == "write":
    write(sys.argv[2].rstrip("/"), sys.argv[3], float(sys.argv[4]))
else:
    sys.exit(check(sys.argv[2].rstrip("/"), sys.argv[3]))
