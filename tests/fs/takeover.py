"""The load of takeover.sh: python3 takeover.py DIR SECONDS; SIGTERM ends it sooner. Every answer is checked against what must
be: an operation that was lost, or done twice, is seen by the next line. Prints what was done; exit status 1 with a line at the first error."""
import os
import signal
import sys
import threading
import time

base, seconds = sys.argv[1], float(sys.argv[2])
end = time.monotonic() + seconds
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
failures = []
counts = {}
slowest = {}


def expect(have, want, what):
    if have != want:
        raise AssertionError(f"{what}: have {have!r}, expect {want!r}")


def sub(name):
    path = os.path.join(base, name)
    os.mkdir(path)
    return path


def counter(d, i):
    """fsync'd: what was acknowledged must be there; read back by a new descriptor."""
    path = f"{d}/counter"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.pwrite(fd, b"%20d" % i, 0)
    os.fsync(fd)
    os.close(fd)
    with open(path, "rb") as f:
        expect(f.read(), b"%20d" % i, "the counter")


appended = {}


def append(d, i):
    """A handle that outlives all servers."""
    if d not in appended:
        appended[d] = os.open(f"{d}/log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(appended[d], b"%9d\n" % i)
    expect(os.fstat(appended[d]).st_size, (i + 1) * 10, "the size of the log")
    if i % 50 == 0:
        os.posix_fadvise(appended[d], 0, 0, os.POSIX_FADV_DONTNEED)
        expect(os.pread(appended[d], 10, i * 10), b"%9d\n" % i, "the log's last line")


def create(d, i):
    fd = os.open(f"{d}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, b"x" * (i % 9000))
    os.close(fd)
    expect(os.stat(f"{d}/new").st_size, i % 9000, "a new file's size")
    os.unlink(f"{d}/new")
    expect(os.path.exists(f"{d}/new"), False, "unlinked")


def rename(d, i):
    a, b = f"{d}/{i}", f"{d}/{i + 1}"
    if i == 0:
        open(a, "w").close()
        os.setxattr(a, "user.n", b"0")
    os.rename(a, b)
    expect(os.listdir(d), [str(i + 1)], "the names after a rename")


def mkdir(d, i):
    os.mkdir(f"{d}/d")
    os.symlink("d", f"{d}/s")
    expect(os.readlink(f"{d}/s"), "d", "a symlink")
    os.unlink(f"{d}/s")
    os.rmdir(f"{d}/d")


def link(d, i):
    a, b = f"{d}/a", f"{d}/b"
    if i == 0:
        open(a, "w").close()
    os.link(a, b)
    expect(os.stat(a).st_nlink, 2, "links")
    os.unlink(b)
    expect(os.stat(a).st_nlink, 1, "links")


def xattr(d, i):
    os.setxattr(d, "user.x", b"%d" % i, os.XATTR_CREATE)
    expect(os.getxattr(d, "user.x"), b"%d" % i, "an attribute")
    os.removexattr(d, "user.x")


orphans = {}


def orphan(d, i):
    """Open without a name while servers die."""
    if i % 100 == 0:
        if d in orphans:
            os.close(orphans[d])
        orphans[d] = os.open(f"{d}/gone", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(f"{d}/gone")
    os.pwrite(orphans[d], b"%8d" % i, i % 100 * 4096)
    os.posix_fadvise(orphans[d], 0, 0, os.POSIX_FADV_DONTNEED)
    expect(os.pread(orphans[d], 8, i % 100 * 4096), b"%8d" % i, "a file without a name")
    time.sleep(0.02)


def worker(fn):
    d, i, slow = sub(fn.__name__), 0, 0
    try:
        while time.monotonic() < end and not stop.is_set() and not failures:
            t = time.monotonic()
            fn(d, i)
            slow = max(slow, time.monotonic() - t)
            i += 1
    except Exception as e:  # noqa: any error at all is what this test is for
        failures.append(f"{fn.__name__}, round {i}: {e!r}")
    counts[fn.__name__], slowest[fn.__name__] = i, slow


threads = [threading.Thread(target=worker, args=(fn,)) for fn in
           (counter, append, create, rename, mkdir, link, xattr, orphan)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(" ".join(f"{k} {v}" for k, v in counts.items()), f"longest pause {max(slowest.values()) * 1000:.0f} ms")
for f in failures:
    print(f)
sys.exit(1 if failures else 0)
