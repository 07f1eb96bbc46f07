/* store.c - a byte store on a file descriptor; see coffer/store.h. */
#include "coffer/store.h"

#include "fs/base/base.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct fd_store {
    struct store store;
    int fd;
};

static int fd_of(struct store *s)
{
    return ((struct fd_store *)s)->fd;
}

/* Moves the iovecs over n bytes that are done. */
static void advance(struct iovec **iov, int *niov, size_t n)
{
    while (*niov && n >= (*iov)->iov_len) {
        n -= (*iov)->iov_len;
        (*iov)++, (*niov)--;
    }
    if (*niov) {
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
    }
}

_Thread_local void (*store_before_wait)(void);

static void before_wait(void)
{
    void (*f)(void) = store_before_wait;

    store_before_wait = NULL;
    if (f)
        f();
}

/* Reads what the page cache has: all (then true), or the iovecs and *off stand where it ends. */
static bool read_cached(int fd, struct iovec **iov, int *niov, uint64_t *off)
{
    ssize_t r;

    while (*niov && (r = preadv2(fd, *iov, MIN(*niov, IOV_MAX), (off_t)*off, RWF_NOWAIT)) > 0) {
        *off += (uint64_t)r;
        advance(iov, niov, (size_t)r);
    }
    return *niov == 0;
}

static int transfer(int fd, bool writing, struct iovec *iov, int niov, uint64_t off)
{
    advance(&iov, &niov, 0);
    if (store_before_wait && !writing && !read_cached(fd, &iov, &niov, &off))
        before_wait();
    while (niov) {
        int k = MIN(niov, IOV_MAX);
        ssize_t r = writing ? pwritev(fd, iov, k, (off_t)off) : preadv(fd, iov, k, (off_t)off);

        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -EIO;
        off += (uint64_t)r;
        advance(&iov, &niov, (size_t)r);
    }
    return 0;
}

static int fd_readv(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    return transfer(fd_of(s), false, iov, niov, off);
}

static int fd_writev(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    return transfer(fd_of(s), true, iov, niov, off);
}

static int fd_sync(struct store *s)
{
    int r;

    do
        r = fdatasync(fd_of(s));
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

static void fd_writeback(struct store *s, uint64_t off, uint64_t len)
{
    (void)sync_file_range(fd_of(s), (off_t)off, (off_t)len, SYNC_FILE_RANGE_WRITE);
}

static int fd_punch(struct store *s, uint64_t off, uint64_t len)
{
    int r;

    do
        r = fallocate(fd_of(s), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

static int fd_allocate(struct store *s, uint64_t off, uint64_t len)
{
    int r;

    do
        r = fallocate(fd_of(s), FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

static int64_t fd_size(struct store *s)
{
    struct stat st;

    return fstat(fd_of(s), &st) < 0 ? -errno : st.st_size;
}

static int write_zeroes(int fd, uint64_t from, uint64_t to)
{
    static const uint8_t zeroes[65536];

    while (from < to) {
        size_t n = MIN(sizeof(zeroes), to - from);
        int rc = pwrite_full(fd, zeroes, n, from);

        if (rc < 0)
            return rc;
        from += n;
    }
    return 0;
}

static int fd_grow(struct store *s, uint64_t size)
{
    int64_t old = fd_size(s);
    int r, rc = 0;

    if (old < 0)
        return (int)old;
    if ((uint64_t)old >= size)
        return 0;
    do
        r = fallocate(fd_of(s), 0, old, (off_t)size - old);
    while (r < 0 && errno == EINTR);
    if (r < 0)
        rc = errno == EOPNOTSUPP ? write_zeroes(fd_of(s), (uint64_t)old, size) : -errno;
    if (rc < 0 && ftruncate(fd_of(s), old) < 0)
        return rc; /* a longer file than wanted does no harm: what lies behind is free space */
    return rc;
}

static void fd_drop(struct store *s, uint64_t off, uint64_t len)
{
    (void)posix_fadvise(fd_of(s), (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
}

static void fd_close(struct store *s)
{
    close_quiet(fd_of(s));
    free(s);
}

static const struct store_ops fd_ops = {
    .readv = fd_readv,
    .writev = fd_writev,
    .sync = fd_sync,
    .writeback = fd_writeback,
    .punch = fd_punch,
    .allocate = fd_allocate,
    .grow = fd_grow,
    .size = fd_size,
    .drop = fd_drop,
    .close = fd_close,
};

struct store *store_fd_take(int fd)
{
    struct fd_store *s = xmalloc(sizeof(*s));

    *s = (struct fd_store){.store = {&fd_ops}, .fd = fd};
    return &s->store;
}
