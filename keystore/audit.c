/*
 * audit.c - see audit.h.
 *
 * 1. The file's end is kept here (size, seq, hash of the last line); a record is written there and flushed, and only
 * then do they move on. A write that fails is cut off again; where that or the flush fails nobody knows what is on the
 * disk, and nothing more is written.
 * 2. A torn tail is what follows the last newline, or a last line with NUL bytes (its newline reached the disk before
 * the rest). It goes into `audit.torn-<seq>`, seq being that of the `recovered` record; only then is it cut off. A
 * crash before that record leaves the file, by which the next audit_open knows to write it.
 */
#include "keystore/audit.h"

#include "fs/base/base.h"

#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define HASH_BYTES 32
#define HASH_HEX   (2 * HASH_BYTES + 1)
#define RESERVE_NS 60000000000ll /* between tries to have a reserve again */
#define LIMIT_KEYS 256           /* counted at one time; those beyond share one count */

struct limit {
    char *key;      /* NULL: free; of the shared one "(others)" */
    char *of;       /* the event that was not written first */
    int64_t until;  /* the window's end */
    unsigned lines; /* written in it */
    unsigned more;  /* not written */
};

struct audit {
    int dirfd, fd;
    uint64_t size; /* of the file: the end of the last record */
    uint64_t seq;  /* of the last record, 0: none */
    char prev[HASH_HEX];
    bool reserve;         /* is there to be given up */
    int64_t reserve_next; /* by mono: when to try again to have one */
    bool broken;
    int64_t (*mono)(void);
    struct limit limits[LIMIT_KEYS + 1]; /* the last one is shared */
};

/* --- records --- */

static void hash_line(const char *line, size_t n, char *hex)
{
    uint8_t hash[HASH_BYTES];

    crypto_generichash(hash, sizeof(hash), (const uint8_t *)line, n, NULL, 0);
    hex_encode(hash, sizeof(hash), hex);
}

static void hash_none(char *hex)
{
    memset(hex, '0', HASH_HEX - 1);
    hex[HASH_HEX - 1] = 0;
}

/* The length of the well-formed UTF-8 sequence at s, or 0. */
static size_t utf8_len(const uint8_t *s)
{
    uint32_t c;
    size_t n;

    if (s[0] < 0x80)
        return 1;
    n = s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    if (s[0] < 0xc2 || s[0] > 0xf4)
        return 0;
    c = s[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80) /* the NUL at the end is none either */
            return 0;
        c = c << 6 | (s[i] & 0x3f);
    }
    if ((n == 3 && c < 0x800) || (n == 4 && (c < 0x10000 || c > 0x10ffff)) || (c >= 0xd800 && c < 0xe000))
        return 0;
    return n;
}

/* A JSON string of any bytes, at most AUDIT_TEXT_BYTES of UTF-8. jansson escapes the control characters below a space;
 * DEL and those of U+0080 to U+009F, which terminals obey too, become the text \\u and four digits. */
static json_t *text_json(const char *text)
{
    const uint8_t *s = (const uint8_t *)text;
    char out[AUDIT_TEXT_BYTES + 4], code[8];
    size_t o = 0, cut = 0;

    while (*s) {
        size_t n = utf8_len(s), put = n ? n : 3;
        const char *from = n ? (const char *)s : "\xef\xbf\xbd";

        if (*s == 0x7f || (n == 2 && *s == 0xc2 && s[1] < 0xa0)) {
            put = (size_t)snprintf(code, sizeof(code), "\\u00%02x", s[n - 1]);
            from = code;
        }
        if (o + put > AUDIT_TEXT_BYTES) {
            memcpy(out + cut, "...", 3);
            o = cut + 3;
            break;
        }
        memcpy(out + o, from, put);
        o += put;
        s += n ? n : 1;
        if (o <= AUDIT_TEXT_BYTES - 3)
            cut = o;
    }
    return json_stringn(out, o);
}

static bool key_ok(const char *key)
{
    static const char *const own[] = {"event", "prev", "seq", "time"};
    size_t n = key ? strspn(key, "abcdefghijklmnopqrstuvwxyz_") : 0;

    if (n == 0 || n > 32 || key[n])
        return false;
    for (size_t i = 0; i < ARRAY_LEN(own); i++)
        if (!strcmp(key, own[i]))
            return false;
    return true;
}

static bool fields_ok(const char *event, const struct audit_field *fields, size_t n)
{
    if (!event || n > AUDIT_FIELDS_MAX)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!key_ok(fields[i].key))
            return false;
        for (size_t j = 0; j < i; j++)
            if (!strcmp(fields[i].key, fields[j].key))
                return false;
    }
    return true;
}

static void time_text(char *out, size_t size)
{
    int64_t now = now_ns();
    time_t s = (time_t)(now / 1000000000);
    struct tm tm;
    size_t n;

    gmtime_r(&s, &tm);
    n = strftime(out, size, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out + n, size - n, ".%09dZ", (int)(now % 1000000000));
}

/* The line without its newline, or NULL. free() it. */
static char *make_line(const struct audit *a, const char *event, const struct audit_field *fields, size_t n)
{
    json_t *o = json_object();
    char time[64], *line = NULL;
    int bad;

    time_text(time, sizeof(time));
    bad = json_object_set_new(o, "event", text_json(event));
    bad |= json_object_set_new(o, "prev", json_string(a->prev));
    bad |= json_object_set_new(o, "seq", json_integer((json_int_t)(a->seq + 1)));
    bad |= json_object_set_new(o, "time", json_string(time));
    for (size_t i = 0; i < n; i++)
        bad |= json_object_set_new(o, fields[i].key,
                                   fields[i].text ? text_json(fields[i].text) : json_integer(fields[i].number));
    if (!bad)
        line = json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(o);
    return line;
}

static bool time_ok(const char *t)
{
    static const char form[] = "0000-00-00T00:00:00.000000000Z";
    size_t i = 0;

    if (!t)
        return false;
    for (; form[i]; i++)
        if (form[i] == '0' ? t[i] < '0' || t[i] > '9' : t[i] != form[i])
            return false;
    return !t[i];
}

/* Is this a record in its canonical form? NULL and its seq and prev, or what is wrong. */
static const char *parse_line(const char *line, size_t n, uint64_t *ret_seq, char *ret_prev)
{
    json_t *o = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL), *v;
    const char *prev = json_string_value(json_object_get(o, "prev")), *wrong = NULL, *key;
    json_int_t seq = json_integer_value(json_object_get(o, "seq"));
    uint8_t hash[HASH_BYTES];
    char *again = NULL;

    if (!json_is_object(o))
        wrong = "is no record";
    else if (!json_is_string(json_object_get(o, "event")) || seq < 1 || !prev || strlen(prev) != HASH_HEX - 1 ||
             hex_decode(prev, hash, sizeof(hash)) < 0 || !time_ok(json_string_value(json_object_get(o, "time"))))
        wrong = "lacks event, prev, seq or time";
    if (!wrong)
        json_object_foreach(o, key, v) if (!json_is_string(v) && !json_is_integer(v)) wrong =
            "has a value that is neither text nor an integer";
    if (!wrong) {
        again = json_dumps(o, JSON_COMPACT | JSON_SORT_KEYS);
        if (!again || strlen(again) != n || memcmp(again, line, n))
            wrong = "is not in the form it was written in";
    }
    if (!wrong) {
        *ret_seq = (uint64_t)seq;
        memcpy(ret_prev, prev, HASH_HEX);
    }
    free(again);
    json_decref(o);
    return wrong;
}

/* --- the file --- */

static int sync_dir(int dirfd)
{
    int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = fd < 0 || fsync(fd) < 0 ? -errno : 0;

    close_quiet(fd);
    return rc;
}

static bool disk_full(int rc)
{
    return rc == -ENOSPC || rc == -EDQUOT;
}

/* A reserve that cannot be had for want of room is none; that is no error. */
static int reserve_make(struct audit *a)
{
    int fd = openat(a->dirfd, AUDIT_RESERVE_FILE, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600), rc;

    if (fd < 0)
        return disk_full(-errno) ? 0 : -errno;
    rc = -posix_fallocate(fd, 0, AUDIT_RESERVE_BYTES);
    if (rc == 0 && fsync(fd) < 0)
        rc = -errno;
    close_quiet(fd);
    a->reserve = rc == 0;
    if (rc < 0)
        unlinkat(a->dirfd, AUDIT_RESERVE_FILE, 0);
    return disk_full(rc) ? 0 : rc;
}

/* True when there is room now that was not there before. */
static bool reserve_give_up(struct audit *a)
{
    if (!a->reserve)
        return false;
    a->reserve = false;
    a->reserve_next = a->mono() + RESERVE_NS;
    if (unlinkat(a->dirfd, AUDIT_RESERVE_FILE, 0) < 0)
        return false;
    sync_dir(a->dirfd); /* some filesystems free the blocks only then */
    /* Whatever fills the disk shall not take them first; a torn tail needs the rest. At worst the retry fails. */
    (void)!fallocate(a->fd, FALLOC_FL_KEEP_SIZE, (off_t)a->size, AUDIT_RESERVE_BYTES - 2 * AUDIT_LINE_MAX);
    return true;
}

/* Writes n bytes at the end and flushes them; moves nothing on. */
static int put_bytes(struct audit *a, const char *buf, size_t n)
{
    int rc = pwrite_full(a->fd, buf, n, a->size);

    if (rc < 0 && ftruncate(a->fd, (off_t)a->size) < 0) {
        a->broken = true;
        return -EIO;
    }
    if (disk_full(rc))
        return reserve_give_up(a) ? put_bytes(a, buf, n) : -ENOSPC;
    if (rc == 0 && fdatasync(a->fd) < 0) {
        a->broken = true;
        return -EIO;
    }
    return rc;
}

static int put_record(struct audit *a, const char *event, const struct audit_field *fields, size_t n)
{
    char *line;
    size_t len;
    int rc;

    if (a->broken)
        return -EIO;
    line = make_line(a, event, fields, n);
    if (!line)
        return -ENOMEM;
    len = strlen(line);
    line[len] = '\n'; /* in the place of the NUL: from here on it is bytes */
    rc = put_bytes(a, line, len + 1);
    if (rc == 0) {
        a->size += len + 1;
        a->seq++;
        hash_line(line, len, a->prev);
    }
    free(line);
    if (rc == 0 && !a->reserve && a->mono() >= a->reserve_next) {
        a->reserve_next = a->mono() + RESERVE_NS;
        reserve_make(a); /* the record is written whatever comes of it */
    }
    return rc;
}

/* --- opening, and what a crash left --- */

/* Appends the torn bytes to the file of that name, so that a second crash loses nothing of the first one. */
static int torn_append(struct audit *a, const char *name, const char *buf, size_t n)
{
    int fd = openat(a->dirfd, name, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0640);
    struct stat st;
    int rc = 0;

    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) < 0)
        rc = -errno;
    if (rc == 0)
        rc = write_full(fd, buf, n);
    if (rc < 0 && disk_full(rc) && ftruncate(fd, st.st_size) < 0)
        rc = -errno;
    if (rc == 0 && fsync(fd) < 0)
        rc = -errno;
    close_quiet(fd);
    return rc < 0 ? rc : sync_dir(a->dirfd);
}

/* torn: the n bytes after the last record, which are in the file still. */
static int recover(struct audit *a, const char *torn, size_t n)
{
    char *name = xasprintf("audit.torn-%" PRIu64, a->seq + 1);
    struct stat st;
    int rc = 0;

    if (n) {
        rc = torn_append(a, name, torn, n);
        if (disk_full(rc) && reserve_give_up(a))
            rc = torn_append(a, name, torn, n);
        if (rc == 0 && (ftruncate(a->fd, (off_t)a->size) < 0 || fdatasync(a->fd) < 0))
            rc = -errno;
    }
    if (rc == 0 && fstatat(a->dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        rc = errno == ENOENT ? 1 : -errno; /* nothing was torn */
    if (rc == 0) {
        struct audit_field f[] = {{"text", "a line that a crash tore was put out of the way", 0},
                                  {"file", name, 0},
                                  {"bytes", NULL, st.st_size}};

        rc = put_record(a, "recovered", f, ARRAY_LEN(f));
    }
    free(name);
    return MIN(rc, 0);
}

/* Where in buf (n bytes, the end of the log) the torn tail begins; n: there is none. */
static size_t torn_start(const char *buf, size_t n)
{
    const char *nl = memrchr(buf, '\n', n), *before;
    size_t end = nl ? (size_t)(nl - buf) + 1 : 0, start;

    if (end < n || !end)
        return end;
    before = memrchr(buf, '\n', end - 1);
    start = before ? (size_t)(before - buf) + 1 : 0;
    return memchr(buf + start, 0, end - start) ? start : n;
}

/* Finds the last record; what follows it is left in buf at *ret_torn. */
static int find_end(struct audit *a, uint64_t size, char *buf, size_t n, size_t *ret_torn)
{
    size_t torn = torn_start(buf, n), start;
    char prev[HASH_HEX];
    const char *before;

    *ret_torn = torn;
    if (n - torn > AUDIT_LINE_MAX + 1)
        return -EBADMSG;
    a->size = size - (n - torn);
    hash_none(a->prev);
    if (!a->size)
        return 0;
    before = torn > 1 ? memrchr(buf, '\n', torn - 1) : NULL;
    start = before ? (size_t)(before - buf) + 1 : 0;
    if (torn < 2 || (!before && n < size) || torn - 1 - start > AUDIT_LINE_MAX ||
        parse_line(buf + start, torn - 1 - start, &a->seq, prev))
        return -EBADMSG;
    hash_line(buf + start, torn - 1 - start, a->prev);
    return 0;
}

static int load(struct audit *a)
{
    struct stat st;
    char *buf;
    size_t n, torn;
    int rc;

    if (fstat(a->fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode))
        return -EBADMSG;
    n = (size_t)MIN((uint64_t)st.st_size, 2ull * (AUDIT_LINE_MAX + 2));
    buf = xmalloc(n);
    rc = pread_full(a->fd, buf, n, (uint64_t)st.st_size - n);
    if (rc == 0)
        rc = find_end(a, (uint64_t)st.st_size, buf, n, &torn);
    if (rc == 0)
        rc = reserve_make(a);
    if (rc == 0)
        rc = recover(a, buf + torn, n - torn);
    free(buf);
    return rc;
}

int audit_open(int dirfd, struct audit **ret)
{
    struct audit *a = xcalloc(1, sizeof(*a));
    int rc = 0;

    a->mono = mono_ns;
    a->fd = -1;
    a->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 0);
    if (a->dirfd < 0)
        rc = -errno;
    else if ((a->fd = openat(a->dirfd, AUDIT_FILE, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0640)) < 0)
        rc = errno == ELOOP || errno == EISDIR || errno == ENXIO ? -EBADMSG : -errno; /* no plain file */
    if (rc == 0 && fchmod(a->fd, 0640) < 0)
        rc = -errno;
    if (rc == 0)
        rc = sync_dir(a->dirfd);
    if (rc == 0)
        rc = load(a);
    if (rc < 0) {
        audit_close(a);
        return rc;
    }
    *ret = a;
    return 0;
}

/* --- writing --- */

/* Writes the sums whose time has come (all: every one) and frees their slots. */
static int write_sums(struct audit *a, bool all)
{
    int64_t now = a->mono();

    for (size_t i = 0; i < ARRAY_LEN(a->limits); i++) {
        struct limit *l = &a->limits[i];

        if (!l->key || (!all && l->until > now))
            continue;
        if (l->more) {
            struct audit_field f[] = {{"key", l->key, 0}, {"of", l->of, 0}, {"count", NULL, l->more}};
            int rc = put_record(a, "suppressed", f, ARRAY_LEN(f));

            if (rc < 0)
                return rc;
        }
        free(l->key);
        free(l->of);
        *l = (struct limit){0};
    }
    return 0;
}

void audit_close(struct audit *a)
{
    if (!a)
        return;
    write_sums(a, true); /* there is nobody left to tell of a failure */
    for (size_t i = 0; i < ARRAY_LEN(a->limits); i++) {
        free(a->limits[i].key);
        free(a->limits[i].of);
    }
    close_quiet(a->fd);
    close_quiet(a->dirfd);
    free(a);
}

int audit_write(struct audit *a, const char *event, const struct audit_field *fields, size_t n)
{
    int rc;

    if (!fields_ok(event, fields, n))
        return -EINVAL;
    rc = write_sums(a, false);
    return rc < 0 ? rc : put_record(a, event, fields, n);
}

int audit_append(struct audit *a, const char *event, const char *volume, const char *who, const char *text)
{
    const struct audit_field all[] = {{"volume", volume, 0}, {"who", who, 0}, {"text", text, 0}};
    struct audit_field f[ARRAY_LEN(all)];
    size_t n = 0;

    for (size_t i = 0; i < ARRAY_LEN(all); i++)
        if (all[i].text && *all[i].text)
            f[n++] = all[i];
    return audit_write(a, event, f, n);
}

/* The count of a key: its own, a free one, or the one that all share who come when the table is full. */
static struct limit *limit_of(struct audit *a, const char *key)
{
    struct limit *l = NULL;

    for (size_t i = 0; i < LIMIT_KEYS; i++) {
        if (a->limits[i].key && !strcmp(a->limits[i].key, key))
            return &a->limits[i];
        if (!a->limits[i].key && !l)
            l = &a->limits[i];
    }
    if (!l) {
        l = &a->limits[LIMIT_KEYS];
        key = "(others)";
    }
    if (!l->key) {
        l->key = xstrdup(key);
        l->until = a->mono() + AUDIT_LIMIT_NS;
    }
    return l;
}

int audit_write_limited(struct audit *a, const char *event, const char *flood_key, const struct audit_field *fields,
                        size_t n)
{
    struct limit *l;
    int rc;

    if (!flood_key || !fields_ok(event, fields, n))
        return -EINVAL;
    rc = write_sums(a, false);
    if (rc < 0)
        return rc;
    if (a->broken)
        return -EIO;
    l = limit_of(a, flood_key);
    if (l->lines >= AUDIT_LIMIT_LINES) {
        if (!l->of)
            l->of = xstrdup(event);
        l->more++;
        return 0;
    }
    rc = put_record(a, event, fields, n);
    if (rc == 0)
        l->lines++;
    return rc;
}

void audit_set_clock(struct audit *a, int64_t (*mono)(void))
{
    a->mono = mono;
}

/* --- verifying --- */

struct check {
    int fd;
    char *buf; /* 2 lines of the greatest length */
    size_t pos, len;
    bool end; /* of the file is in buf */
    uint64_t seq;
    char prev[HASH_HEX];
};

/* Fills buf from the file, keeping what is unread. */
static int check_fill(struct check *c)
{
    size_t room;
    ssize_t got;

    memmove(c->buf, c->buf + c->pos, c->len - c->pos);
    c->len -= c->pos;
    c->pos = 0;
    room = 2 * (AUDIT_LINE_MAX + 2) - c->len;
    got = read_upto(c->fd, c->buf + c->len, room);
    if (got < 0)
        return (int)got;
    c->end = (size_t)got < room;
    c->len += (size_t)got;
    return 0;
}

/* Takes one line. 1, 0 at the end (what is left from pos is the torn tail), or -errno with why. */
static int check_line(struct check *c, char *why, size_t n)
{
    const char *wrong, *line, *nl;
    char prev[HASH_HEX];
    uint64_t seq;
    size_t len;
    int rc;

    if (!c->end && c->len - c->pos < AUDIT_LINE_MAX + 2 && (rc = check_fill(c)) < 0) {
        snprintf(why, n, "the log cannot be read: %s", strerror(-rc));
        return rc;
    }
    line = c->buf + c->pos;
    nl = memchr(line, '\n', c->len - c->pos);
    len = nl ? (size_t)(nl - line) : c->len - c->pos;
    if (len > AUDIT_LINE_MAX) {
        snprintf(why, n, "line %" PRIu64 " is longer than a record can be", c->seq + 1);
        return -EBADMSG;
    }
    if (!nl || (c->end && c->pos + len + 1 == c->len && memchr(line, 0, len)))
        return 0;
    wrong = parse_line(line, len, &seq, prev);
    if (!wrong && strcmp(prev, c->prev))
        wrong = c->seq ? "does not continue the line before: that one was changed, or lines between them are missing"
                       : "is not the first one of a log: lines before it are missing";
    if (!wrong && seq != c->seq + 1)
        wrong = "has the wrong number";
    if (wrong) {
        snprintf(why, n, "line %" PRIu64 " %s", c->seq + 1, wrong);
        return -EBADMSG;
    }
    hash_line(line, len, c->prev);
    c->seq++;
    c->pos += len + 1;
    return 1;
}

int audit_verify(int dirfd, char *why, size_t n)
{
    struct check c = {.fd = openat(dirfd, AUDIT_FILE, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)};
    struct stat st;
    int rc;

    if (c.fd < 0 || fstat(c.fd, &st) < 0) {
        rc = -errno;
        snprintf(why, n, "the log cannot be opened: %s", strerror(-rc));
        close_quiet(c.fd);
        return rc;
    }
    if (!S_ISREG(st.st_mode)) {
        snprintf(why, n, "the log is no regular file");
        close_quiet(c.fd);
        return -EBADMSG;
    }
    c.buf = xmalloc(2 * (AUDIT_LINE_MAX + 2));
    hash_none(c.prev);
    while ((rc = check_line(&c, why, n)) > 0)
        ;
    if (rc == 0 && c.len > c.pos)
        snprintf(why, n, "%" PRIu64 " records, the last one's hash is %s; a torn line of %zu bytes follows", c.seq,
                 c.prev, c.len - c.pos);
    else if (rc == 0)
        snprintf(why, n, "%" PRIu64 " records, the last one's hash is %s", c.seq, c.prev);
    free(c.buf);
    close_quiet(c.fd);
    return rc;
}
