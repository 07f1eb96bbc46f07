/*
 * base.h - what every part of coffer shares: little-endian disk integers, byte-exact I/O, atomic file
 * replacement, logging.
 *
 * Errors are negative errno values; 0 or a count is success. Nothing here allocates secrets (see secmem.h).
 * Programs log, libraries return: only code in a program's own directory calls log_*().
 */
#ifndef COFFER_BASE_H
#define COFFER_BASE_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define MIN(a, b)    ((a) < (b) ? (a) : (b))
#define MAX(a, b)    ((a) > (b) ? (a) : (b))

/* --- little-endian integers of the disk format: a raw read of one does not compile --- */

typedef struct {
    uint8_t b[2];
} le16;
typedef struct {
    uint8_t b[4];
} le32;
typedef struct {
    uint8_t b[8];
} le64;

static inline uint16_t le16_get(le16 v)
{
    return (uint16_t)(v.b[0] | v.b[1] << 8);
}

static inline uint32_t le32_get(le32 v)
{
    return (uint32_t)v.b[0] | (uint32_t)v.b[1] << 8 | (uint32_t)v.b[2] << 16 | (uint32_t)v.b[3] << 24;
}

static inline uint64_t le64_get(le64 v)
{
    uint64_t x;

    memcpy(&x, v.b, 8);
    return x;
}

static inline le16 le16_make(uint16_t x)
{
    return (le16){{(uint8_t)x, (uint8_t)(x >> 8)}};
}

static inline le32 le32_make(uint32_t x)
{
    return (le32){{(uint8_t)x, (uint8_t)(x >> 8), (uint8_t)(x >> 16), (uint8_t)(x >> 24)}};
}

static inline le64 le64_make(uint64_t x)
{
    le64 v;

    memcpy(v.b, &x, 8);
    return v;
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "le64_get and le64_make copy host order");

/* --- memory --- */

/*
 * Allocation that cannot fail: on exhaustion the process ends at once (abort). A server may die at every instant
 * without loss, and half-done work in memory must not go on. Free with free().
 */
void *xmalloc(size_t n);
void *xcalloc(size_t n, size_t size);
void *xrealloc(void *p, size_t n);
char *xstrdup(const char *s);
char *xasprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* --- byte-exact I/O: EINTR and short transfers are gone through --- */

/* Reads exactly n bytes at off. 0, -EIO at the end of the file, or -errno. */
int pread_full(int fd, void *buf, size_t n, uint64_t off);
/* Writes exactly n bytes at off. 0 or -errno. */
int pwrite_full(int fd, const void *buf, size_t n, uint64_t off);
/* Writes exactly n bytes. 0 or -errno. */
int write_full(int fd, const void *buf, size_t n);
/* Reads until n bytes or the end. Returns the count or -errno. */
ssize_t read_upto(int fd, void *buf, size_t n);

/*
 * Replaces dirfd/name by the n bytes at buf: temporary file beside it, written, fsynced, renamed, directory fsynced.
 * After a failure the old file is whole. 0 or -errno. mode is that of the new file.
 */
int file_replace(int dirfd, const char *name, const void *buf, size_t n, mode_t mode);
/* Reads all of dirfd/name, at most max bytes, into *ret_buf (free() it; a NUL follows the last byte). -EFBIG past max. */
int file_read_all(int dirfd, const char *name, size_t max, char **ret_buf, size_t *ret_n);
/* close() that keeps errno; ignores fd < 0. */
void close_quiet(int fd);

/* --- names and numbers --- */

/* A volume name: [a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}. */
#define VOLUME_NAME_MAX 128
bool volume_name_ok(const char *name);
#define SNAPSHOT_NAME_MAX 64
/* A snapshot's name, n bytes without a NUL: 1 to 64 of letters, digits, '.', '_', '-', the first one a letter or digit. */
bool snapshot_name_ok(const char *name, size_t n);
/* "10G", "512M", "4096", with K M G T (powers of 1024), to bytes. 0 or -EINVAL, -ERANGE. */
int size_parse(const char *s, uint64_t *ret_bytes);
/* Lower-case hex; out has 2n+1 bytes. */
void hex_encode(const uint8_t *in, size_t n, char *out);
/* Exactly n bytes from 2n hex digits. 0 or -EINVAL. */
int hex_decode(const char *s, uint8_t *out, size_t n);
/* Wall clock, ns since 1970. */
int64_t now_ns(void);
/* Monotonic clock, ns. */
int64_t mono_ns(void);

/* --- log lines to stderr: "<program>: <text>", one line a call, control characters of %s arguments are the caller's
 *     to escape (see escape_text) --- */

extern const char *log_program;
void log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void log_err(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Copies s into out (size n), control and non-ASCII bytes as \xHH, cut with "..." at the end. Returns out. */
char *escape_text(const char *s, char *out, size_t n);

#endif
