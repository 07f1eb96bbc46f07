"""Works with what it holds open, and names nothing: python3 held.py DIR STOPFILE. Writes, fsyncs and reads back by handles that
it opens at the beginning; prints rounds and the longest pause in ms once STOPFILE is there. At the end it names something.
Exit status 1 with a line at the first error."""
import os
import sys
import time

d, stop = sys.argv[1], sys.argv[2]
fds = [os.open(f"{d}/held{i}", os.O_RDWR | os.O_CREAT, 0o600) for i in range(4)]
gone = os.open(f"{d}/gone", os.O_RDWR | os.O_CREAT, 0o600)
os.unlink(f"{d}/gone")
print("ready", flush=True)
i = slow = 0
try:
    while not os.path.exists(stop):
        t = time.monotonic()
        for fd in [*fds, gone]:
            os.pwrite(fd, b"%20d" % i, 0)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(fd, 20, 0) != b"%20d" % i:
                raise AssertionError("read back something else")
        slow = max(slow, time.monotonic() - t)
        i += 1
        time.sleep(0.01)
except Exception as e:  # noqa: any error at all is what this is for
    print(f"round {i}: {e!r}")
    sys.exit(1)
with open(f"{d}/named", "w") as f:
    f.write("named")
print(f"{i} rounds, longest pause {slow * 1000:.0f} ms")
