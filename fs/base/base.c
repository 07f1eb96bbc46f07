/* base.c - see base.h. Owns nothing but the name of the program. */
#include "base.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

const char *log_program = "coffer";

/* --- memory --- */

static void *or_abort(void *p)
{
    if (!p)
        abort();
    return p;
}

void *xmalloc(size_t n)
{
    return or_abort(malloc(n ? n : 1));
}

void *xcalloc(size_t n, size_t size)
{
    return or_abort(calloc(n ? n : 1, size ? size : 1));
}

void *xrealloc(void *p, size_t n)
{
    return or_abort(realloc(p, n ? n : 1));
}

char *xstrdup(const char *s)
{
    return or_abort(strdup(s));
}

char *xasprintf(const char *fmt, ...)
{
    va_list ap;
    char *s = NULL;
    int n;

    va_start(ap, fmt);
    n = vasprintf(&s, fmt, ap);
    va_end(ap);
    return or_abort(n < 0 ? NULL : s);
}

/* --- I/O --- */

int pread_full(int fd, void *buf, size_t n, uint64_t off)
{
    uint8_t *p = buf;

    while (n) {
        ssize_t r = pread(fd, p, n, (off_t)off);

        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return -errno;
        if (r == 0)
            return -EIO;
        p += r, off += (uint64_t)r, n -= (size_t)r;
    }
    return 0;
}

int pwrite_full(int fd, const void *buf, size_t n, uint64_t off)
{
    const uint8_t *p = buf;

    while (n) {
        ssize_t r = pwrite(fd, p, n, (off_t)off);

        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -EIO;
        p += r, off += (uint64_t)r, n -= (size_t)r;
    }
    return 0;
}

int write_full(int fd, const void *buf, size_t n)
{
    const uint8_t *p = buf;

    while (n) {
        ssize_t r = write(fd, p, n);

        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return r < 0 ? -errno : -EIO;
        p += r, n -= (size_t)r;
    }
    return 0;
}

ssize_t read_upto(int fd, void *buf, size_t n)
{
    size_t got = 0;

    while (got < n) {
        ssize_t r = read(fd, (uint8_t *)buf + got, n - got);

        if (r < 0 && errno == EINTR)
            continue;
        if (r < 0)
            return -errno;
        if (r == 0)
            break;
        got += (size_t)r;
    }
    return (ssize_t)got;
}

void close_quiet(int fd)
{
    int saved = errno;

    if (fd >= 0)
        close(fd);
    errno = saved;
}

int file_replace(int dirfd, const char *name, const void *buf, size_t n, mode_t mode)
{
    char *tmp = xasprintf(".%s.new", name);
    int fd = -1, rc;

    /* A leftover of a killed predecessor is nobody's: writers of one file are serialised by its owner. */
    if (unlinkat(dirfd, tmp, 0) < 0 && errno != ENOENT) {
        rc = -errno;
        goto out;
    }
    fd = openat(dirfd, tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, mode);
    if (fd < 0) {
        rc = -errno;
        goto out;
    }
    rc = write_full(fd, buf, n);
    if (rc == 0 && fsync(fd) < 0)
        rc = -errno;
    if (close(fd) < 0 && rc == 0)
        rc = -errno;
    if (rc == 0 && renameat(dirfd, tmp, dirfd, name) < 0)
        rc = -errno;
    if (rc < 0) {
        unlinkat(dirfd, tmp, 0);
        goto out;
    }
    if (dirfd == AT_FDCWD)
        fd = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    else
        fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0)
        rc = -errno;
    close_quiet(fd);
out:
    free(tmp);
    return rc;
}

int file_read_all(int dirfd, const char *name, size_t max, char **ret_buf, size_t *ret_n)
{
    char *buf = NULL;
    struct stat st;
    ssize_t got;
    int fd, rc = 0;

    /* Nobody shall wait for the other end of a FIFO. */
    fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode)) {
        close_quiet(fd);
        return -EINVAL;
    }
    buf = xmalloc(max + 2);
    got = read_upto(fd, buf, max + 1);
    if (got < 0)
        rc = (int)got;
    else if ((size_t)got > max)
        rc = -EFBIG;
    close_quiet(fd);
    if (rc < 0) {
        free(buf);
        return rc;
    }
    buf[got] = 0;
    *ret_buf = buf;
    *ret_n = (size_t)got;
    return 0;
}

/* --- names and numbers --- */

static bool name_ok(const char *name, size_t n, size_t max)
{
    if (n == 0 || n > max)
        return false;
    for (size_t i = 0; i < n; i++) {
        char c = name[i];
        bool alnum = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');

        if (!alnum && (i == 0 || !c || !strchr("_.-", c)))
            return false;
    }
    return true;
}

bool volume_name_ok(const char *name)
{
    return name_ok(name, strnlen(name, VOLUME_NAME_MAX + 1), VOLUME_NAME_MAX);
}

bool snapshot_name_ok(const char *name, size_t n)
{
    return name_ok(name, n, SNAPSHOT_NAME_MAX);
}

int size_parse(const char *s, uint64_t *ret_bytes)
{
    uint64_t v = 0;
    int shift = 0;

    if (*s < '0' || *s > '9')
        return -EINVAL;
    for (; *s >= '0' && *s <= '9'; s++) {
        if (v > (UINT64_MAX - 9) / 10)
            return -ERANGE;
        v = v * 10 + (uint64_t)(*s - '0');
    }
    if (*s) {
        static const char units[] = "KMGT";
        const char *u = strchr(units, *s >= 'a' ? *s - 32 : *s);

        if (!u || s[1])
            return -EINVAL;
        shift = (int)(u - units + 1) * 10;
    }
    if (v > (UINT64_MAX >> shift))
        return -ERANGE;
    *ret_bytes = v << shift;
    return 0;
}

void hex_encode(const uint8_t *in, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digits[in[i] >> 4];
        out[2 * i + 1] = digits[in[i] & 15];
    }
    out[2 * n] = 0;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

int hex_decode(const char *s, uint8_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int hi = hex_digit(s[2 * i]);
        int lo = hi < 0 ? -1 : hex_digit(s[2 * i + 1]);

        if (lo < 0)
            return -EINVAL;
        out[i] = (uint8_t)(hi << 4 | lo);
    }
    return s[2 * n] ? -EINVAL : 0;
}

static int64_t clock_ns(clockid_t id)
{
    struct timespec ts;

    clock_gettime(id, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

int64_t now_ns(void)
{
    return clock_ns(CLOCK_REALTIME);
}

int64_t mono_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

/* --- log --- */

static void log_line(const char *fmt, va_list ap)
{
    char line[2048];
    int n = snprintf(line, sizeof(line), "%s: ", log_program);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);

    n += MIN(MAX(m, 0), (int)sizeof(line) - n - 2);
    line[n++] = '\n';
    (void)!write(STDERR_FILENO, line, (size_t)n);
}

void log_info(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    log_line(fmt, ap);
    va_end(ap);
}

void log_err(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    log_line(fmt, ap);
    va_end(ap);
}

char *escape_text(const char *s, char *out, size_t n)
{
    static const char digits[] = "0123456789abcdef";
    size_t o = 0;

    for (; *s; s++) {
        uint8_t c = (uint8_t)*s;
        bool plain = c >= 0x20 && c < 0x7f && c != '\\';

        if (o + (plain ? 1 : 4) + 4 > n) {
            memcpy(out + o, "...", 3);
            o += 3;
            break;
        }
        if (plain) {
            out[o++] = (char)c;
        } else {
            out[o++] = '\\';
            out[o++] = 'x';
            out[o++] = digits[c >> 4];
            out[o++] = digits[c & 15];
        }
    }
    out[o] = 0;
    return out;
}
