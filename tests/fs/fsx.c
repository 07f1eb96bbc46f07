/*
 * fsx.c - random operations on one file, against a copy in memory.
 *
 *     fsx FILE [--ops N] [--seconds N] [--seed N] [--size BYTES]       until either is reached; 0: without end
 *
 * Reads, writes, maps (both ways), truncates, punches, zeroes, allocates, copies within the file, seeks data and holes,
 * syncs, closes and reopens, drops the page cache. Whatever is read is compared, the whole file after each reopening.
 * At the first difference the last operations are printed, with the seed; exit status 1. FILE is made, and removed at a
 * good end.
 *
 * What the file may do beyond POSIX: report data where it has a hole. What it must not: report a hole where there are
 * bytes that are not zero.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOG_OPS 64
#define PIECE   (160 * 1024) /* more than an extent, and than a log record takes */
#define PAGE    4096

static const char *path;
static int fd = -1;
static uint64_t max_size = 1 << 20, size, ops;
static unsigned long seed = 1;
static uint64_t state;
static uint8_t *model, *buf;

static struct {
    const char *what;
    uint64_t off, n, extra;
} history[LOG_OPS];

static void die(const char *what)
{
    fprintf(stderr, "fsx: %s: %s (errno %s), seed %lu, operation %llu, size %llu. The last ones:\n", path, what,
            strerrorname_np(errno), seed, (unsigned long long)ops, (unsigned long long)size);
    for (uint64_t i = ops > LOG_OPS ? ops - LOG_OPS : 0; i < ops; i++)
        fprintf(stderr, "%8llu %-12s off 0x%llx n 0x%llx %llu\n", (unsigned long long)i + 1, history[i % LOG_OPS].what,
                (unsigned long long)history[i % LOG_OPS].off, (unsigned long long)history[i % LOG_OPS].n,
                (unsigned long long)history[i % LOG_OPS].extra);
    exit(1);
}

static void note(const char *what, uint64_t off, uint64_t n, uint64_t extra)
{
    history[ops % LOG_OPS].what = what;
    history[ops % LOG_OPS].off = off;
    history[ops % LOG_OPS].n = n;
    history[ops % LOG_OPS].extra = extra;
    ops++;
}

/* splitmix64 */
static uint64_t rnd(uint64_t below)
{
    uint64_t z = state += 0x9e3779b97f4a7c15;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return below ? (z ^ z >> 31) % below : 0;
}

/* A place in 0..limit and a length that fits; often aligned, often short. */
static void range(uint64_t limit, uint64_t *off, uint64_t *n)
{
    *off = rnd(limit + 1);
    *n = rnd(rnd(3) ? 9000 : PIECE) + 1;
    if (rnd(3) == 0) {
        *off &= ~(uint64_t)(PAGE - 1);
        *n = (*n + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    }
    if (*off + *n > limit)
        *n = limit - *off;
}

static void compare(const uint8_t *have, uint64_t off, uint64_t n, const char *what)
{
    char text[120];

    for (uint64_t i = 0; i < n; i++) {
        if (have[i] != model[off + i]) {
            snprintf(text, sizeof(text), "%s: at 0x%llx there is 0x%02x, expect 0x%02x", what,
                     (unsigned long long)(off + i), have[i], model[off + i]);
            errno = 0;
            die(text);
        }
    }
}

static void fill(uint64_t off, uint64_t n)
{
    uint64_t x = rnd(0);

    for (uint64_t i = 0; i < n; i++)
        buf[i] = (uint8_t)(x + ops + i * 7 + (off + i) / 251);
    memcpy(model + off, buf, n);
}

/* Bytes past the end are zero in the model at all times. */
static void grown(uint64_t end)
{
    if (end > size)
        size = end;
}

static void op_read(void)
{
    uint64_t off, n;
    ssize_t got;

    range(max_size, &off, &n);
    note("read", off, n, 0);
    got = pread(fd, buf, n, (off_t)off);
    if (got < 0 || (uint64_t)got != (off >= size ? 0 : off + n > size ? size - off : n))
        die("read: wrong length");
    compare(buf, off, (uint64_t)got, "read");
}

static void op_write(void)
{
    uint64_t off, n;

    range(rnd(2) ? size : max_size, &off, &n);
    note("write", off, n, 0);
    fill(off, n);
    if (pwrite(fd, buf, n, (off_t)off) != (ssize_t)n)
        die("write");
    if (n)
        grown(off + n);
}

static void op_mapped(bool write)
{
    uint64_t off, n, skip;
    uint8_t *m;

    range(size, &off, &n);
    if (n == 0)
        return;
    note(write ? "mapped write" : "mapped read", off, n, 0);
    skip = off % PAGE;
    m = mmap(NULL, n + skip, write ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, (off_t)(off - skip));
    if (m == MAP_FAILED)
        die("mmap");
    if (write) {
        fill(off, n);
        memcpy(m + skip, buf, n);
        if (rnd(4) == 0 && msync(m, n + skip, MS_SYNC) < 0)
            die("msync");
    } else {
        compare(m + skip, off, n, "mapped read");
    }
    munmap(m, n + skip);
}

static void op_truncate(void)
{
    uint64_t to = rnd(3) ? rnd(max_size + 1) : rnd(size + 1);

    note("truncate", to, 0, size);
    if (ftruncate(fd, (off_t)to) < 0)
        die("ftruncate");
    if (to < size)
        memset(model + to, 0, size - to);
    size = to;
}

static void op_fallocate(int mode, const char *what)
{
    uint64_t off, n;

    range(max_size, &off, &n);
    if (n == 0)
        return;
    note(what, off, n, (uint64_t)mode);
    if (fallocate(fd, mode, (off_t)off, (off_t)n) < 0)
        die(what);
    if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        memset(model + off, 0, n);
    if (!(mode & FALLOC_FL_KEEP_SIZE))
        grown(off + n);
}

static void op_copy(void)
{
    uint64_t from, to, n;
    off_t in, out;

    range(size, &from, &n);
    to = rnd(max_size - n + 1);
    if (rnd(2)) {
        from &= ~(uint64_t)(PAGE - 1);
        to &= ~(uint64_t)(PAGE - 1);
    }
    if (n == 0 || (from < to + n && to < from + n))
        return;
    note("copy", from, n, to);
    while (n > 0) {
        in = (off_t)from;
        out = (off_t)to;
        ssize_t got = copy_file_range(fd, &in, fd, &out, n, 0);

        if (got <= 0)
            die("copy_file_range");
        memmove(model + to, model + from, (size_t)got);
        from += (uint64_t)got;
        to += (uint64_t)got;
        n -= (uint64_t)got;
        grown(to);
    }
}

/* A hole must be zeroes; data must not lie before what SEEK_DATA finds. */
static void op_seek(void)
{
    uint64_t off = rnd(size + 1), end;
    off_t got = lseek(fd, (off_t)off, SEEK_DATA);

    note("seek", off, 0, (uint64_t)got);
    if (got < 0 && errno != ENXIO)
        die("SEEK_DATA");
    end = got < 0 ? size : (uint64_t)got;
    if (end < off || end > size)
        die("SEEK_DATA: no such place");
    memset(buf, 0, PIECE);
    for (uint64_t at = off; at < end; at += PIECE)
        compare(buf, at, end - at < PIECE ? end - at : PIECE, "SEEK_DATA has passed data");
    got = lseek(fd, (off_t)off, SEEK_HOLE);
    if (off < size ? got < (off_t)off || (uint64_t)got > size : got >= 0 || errno != ENXIO)
        die("SEEK_HOLE");
}

static void check_all(void)
{
    struct stat st;

    if (fstat(fd, &st) < 0 || (uint64_t)st.st_size != size)
        die("wrong size");
    for (uint64_t at = 0; at < size; at += PIECE) {
        uint64_t n = size - at < PIECE ? size - at : PIECE;

        if (pread(fd, buf, n, (off_t)at) != (ssize_t)n)
            die("read of all");
        compare(buf, at, n, "read of all");
    }
}

static void op_reopen(void)
{
    note("reopen", 0, 0, 0);
    if (close(fd) < 0)
        die("close");
    fd = open(path, O_RDWR);
    if (fd < 0)
        die("open");
    check_all();
}

static void op_sync(bool drop)
{
    note(drop ? "drop caches" : "sync", 0, 0, 0);
    if ((rnd(2) ? fsync(fd) : fdatasync(fd)) < 0)
        die("fsync");
    if (drop) {
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        check_all();
    }
}

static void step(void)
{
    uint64_t k = rnd(100);

    if (k < 25)
        op_write();
    else if (k < 45)
        op_read();
    else if (k < 55)
        op_mapped(true);
    else if (k < 63)
        op_mapped(false);
    else if (k < 70)
        op_truncate();
    else if (k < 76)
        op_fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, "punch");
    else if (k < 80)
        op_fallocate(FALLOC_FL_ZERO_RANGE | (rnd(2) ? FALLOC_FL_KEEP_SIZE : 0), "zero");
    else if (k < 83)
        op_fallocate(rnd(2) ? FALLOC_FL_KEEP_SIZE : 0, "allocate");
    else if (k < 88)
        op_copy();
    else if (k < 92)
        op_seek();
    else if (k < 97)
        op_sync(false);
    else
        rnd(2) ? op_reopen() : op_sync(true);
}

int main(int argc, char **argv)
{
    unsigned long long want_ops = 20000, seconds = 0;
    time_t end;

    for (int i = 2; i + 1 < argc; i += 2) {
        unsigned long long n = strtoull(argv[i + 1], NULL, 0);

        if (!strcmp(argv[i], "--ops"))
            want_ops = n;
        else if (!strcmp(argv[i], "--seconds"))
            seconds = n;
        else if (!strcmp(argv[i], "--seed"))
            seed = n;
        else if (!strcmp(argv[i], "--size") && n > PIECE)
            max_size = n;
        else
            argc = 0;
    }
    if (argc < 2 || argc % 2) {
        fprintf(stderr, "usage: fsx FILE [--ops N] [--seconds N] [--seed N] [--size BYTES]\n");
        return 2;
    }
    path = argv[1];
    state = seed;
    end = time(NULL) + (time_t)seconds;
    model = calloc(1, max_size + PIECE);
    buf = malloc(PIECE + PAGE);
    fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (!model || !buf || fd < 0)
        die("open");
    while ((!want_ops || ops < want_ops) && (!seconds || time(NULL) < end))
        step();
    op_sync(true);
    op_reopen();
    if (close(fd) < 0 || unlink(path) < 0)
        die("the end");
    printf("%llu operations, seed %lu\n", (unsigned long long)ops, seed);
    return 0;
}
