/*
 * audit.c - `coffer audit` and `coffer audit verify`: the log is read from the state directory, without cofferd.
 *
 * 1. What is in the log was said by others: it is escaped before it reaches a terminal. With --json into a file or pipe
 *    the lines go out byte for byte, so that their chain can be checked elsewhere.
 * 2. Only whole lines are taken; a torn one is read again until it is whole or gone.
 */
#include "fs/cli/cli.h"

#include "keystore/audit.h"

#include <ctype.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FOLLOW_MS 300

static int say_no_log(int err)
{
    if (err == -EACCES || err == -EPERM)
        return cli_fail("only root may read the audit log: run this with sudo");
    if (err == -ENOENT)
        return cli_fail("there is no audit log yet: run `coffer up`, or name the directory with --root");
    return cli_fail("cannot read the audit log: %s", strerror(-err));
}

/* The directory of the log, or -errno. */
static int open_dir(const struct cli *c)
{
    char *path = xasprintf("%s/keystore", c->state);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    free(path);
    return fd < 0 ? -errno : fd;
}

static int open_log(const struct cli *c)
{
    int dir = open_dir(c), fd;
    struct stat st;

    if (dir < 0)
        return dir;
    fd = openat(dir, AUDIT_FILE, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        fd = -errno;
    close(dir);
    if (fd >= 0 && (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))) {
        close(fd);
        return -EBADMSG;
    }
    return fd;
}

/* --- since when --- */

/* "90s", "10m", "2h", "7d" ago, or the beginning of a UTC time as the log has it, from the day on. What no record's
 * time before it compares as less than goes into out. */
static int parse_since(const char *s, char *out, size_t size)
{
    static const char form[] = "0000-00-00T00:00:00.000000000";
    static const struct {
        char unit;
        int64_t s;
    } units[] = {{'s', 1}, {'m', 60}, {'h', 3600}, {'d', 86400}};
    size_t n = strlen(s);
    struct tm tm;
    char *end;

    for (size_t i = 0; i < ARRAY_LEN(units); i++)
        if (n >= 2 && n <= 7 && s[n - 1] == units[i].unit && isdigit((unsigned char)*s)) {
            time_t t = (time_t)(now_ns() / 1000000000 - strtol(s, &end, 10) * units[i].s);

            if (end != s + n - 1 || !gmtime_r(&t, &tm))
                return -EINVAL;
            return strftime(out, size, "%Y-%m-%dT%H:%M:%S", &tm) ? 0 : -EINVAL;
        }
    if (n > 11 && s[n - 1] == 'Z')
        n--;
    if (n >= size || (n != 10 && n != 16 && n != 19 && (n < 21 || n > 29)))
        return -EINVAL;
    for (size_t i = 0; i < n; i++)
        if (form[i] == '0' ? !isdigit((unsigned char)s[i]) : s[i] != form[i])
            return -EINVAL;
    memcpy(out, s, n);
    out[n] = 0;
    return 0;
}

/* --- printing --- */

static void print_text(const json_t *record)
{
    static const char *const known[] = {"time", "event", "volume", "who", "text", "seq", "prev"};
    char *time = cli_text(record, "time"), *event = cli_text(record, "event"), *volume = cli_text(record, "volume");
    const char *key;
    json_t *v;

    printf("%.19sZ  %-14s  %s", time, event, volume);
    free(time), free(event), free(volume);
    for (size_t i = 3; i < 5; i++)
        if (json_object_get(record, known[i])) {
            char *text = cli_text(record, known[i]);

            printf("  %s", text);
            free(text);
        }
    json_object_foreach((json_t *)record, key, v)
    {
        char name[64], *text;
        bool shown = false;

        for (size_t i = 0; i < ARRAY_LEN(known); i++)
            shown |= !strcmp(key, known[i]);
        if (shown)
            continue;
        text = cli_text(record, key);
        printf("  %s=%s", escape_text(key, name, sizeof(name)), text);
        free(text);
    }
    putchar('\n');
}

/* jansson leaves DEL as it is. */
static void print_ascii(const json_t *record)
{
    char *text = json_dumps(record, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENSURE_ASCII);

    for (const char *p = text ? text : "{}"; *p; p++)
        if (*p == 0x7f)
            fputs("\\u007f", stdout);
        else
            putchar(*p);
    putchar('\n');
    free(text);
}

/* False when the line is no record. */
static bool print_line(const struct cli *c, const char *line, size_t n, const char *since)
{
    json_t *record = json_loadb(line, n, JSON_REJECT_DUPLICATES, NULL);
    const char *time = json_string_value(json_object_get(record, "time"));
    bool ok = json_is_object(record) && time;

    if (ok && strcmp(time, since) >= 0) {
        if (!c->json)
            print_text(record);
        else if (isatty(STDOUT_FILENO))
            print_ascii(record);
        else
            fwrite(line, 1, n, stdout), putchar('\n');
    }
    json_decref(record);
    return ok;
}

/* --- reading --- */

struct reader {
    int fd;
    uint64_t off;  /* of the first line that is not printed */
    uint64_t line; /* its number, from 1 */
    uint64_t bad;  /* the first line that is no record, 0: none */
    char *buf;
};

#define READ_BYTES (2 * (AUDIT_LINE_MAX + 2))

/* Prints the whole lines from off on. 0 or -errno. */
static int read_lines(const struct cli *c, struct reader *r, const char *since)
{
    for (;;) {
        ssize_t got = pread(r->fd, r->buf, READ_BYTES, (off_t)r->off);
        size_t pos = 0;
        char *nl;

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        while ((nl = memchr(r->buf + pos, '\n', (size_t)got - pos))) {
            size_t n = (size_t)(nl - (r->buf + pos));

            if (!print_line(c, r->buf + pos, n, since) && !r->bad)
                r->bad = r->line;
            pos += n + 1;
            r->line++;
        }
        if (!pos)
            return got == READ_BYTES ? -EBADMSG : 0;
        r->off += pos;
        if (ferror(stdout))
            return 0;
    }
}

/* The log was moved away and there is another of its name: that one from its beginning. What came into the old one was
 * read before. 0 or -errno; nothing of that name yet is no error. */
static int follow_name(const struct cli *c, struct reader *r, const char *since)
{
    int fd = open_log(c), rc = 0;
    struct stat old, new;

    if (fd < 0)
        return fd == -ENOENT ? 0 : fd;
    if (fstat(r->fd, &old) < 0 || fstat(fd, &new) < 0) {
        rc = -errno;
    } else if (old.st_ino != new.st_ino || old.st_dev != new.st_dev) {
        rc = read_lines(c, r, since);
        close(r->fd);
        *r = (struct reader){.fd = fd, .line = 1, .bad = r->bad, .buf = r->buf};
        return rc;
    }
    close(fd);
    return rc;
}

static int follow(const struct cli *c, struct reader *r, const char *since)
{
    struct pollfd out = {.fd = STDOUT_FILENO};
    struct stat st;
    int rc = 0;

    while (rc == 0 && !fflush(stdout) && !ferror(stdout)) {
        if (poll(&out, 1, FOLLOW_MS) > 0)
            return 0; /* who read has gone: without this it would only show at the next record */
        if (fstat(r->fd, &st) < 0)
            return -errno;
        if ((uint64_t)st.st_size < r->off || !st.st_nlink)
            return -ESTALE; /* cut or deleted, which nothing of ours does */
        rc = read_lines(c, r, since);
        if (rc == 0)
            rc = follow_name(c, r, since);
    }
    return rc;
}

int cli_audit(struct cli *c)
{
    const char *s = cli_get(c, "--since");
    struct reader r = {.line = 1};
    char since[64] = "";
    int rc;

    if (s && parse_since(s, since, sizeof(since)) < 0)
        return cli_usage(
            c, "--since %.64s is neither a UTC time such as 2025-01-31T12:00 nor an age such as 90s, 2h or 7d", s);
    r.fd = open_log(c);
    if (r.fd < 0)
        return say_no_log(r.fd);
    r.buf = xmalloc(READ_BYTES);
    rc = read_lines(c, &r, since);
    if (rc == 0 && cli_get(c, "--follow"))
        rc = follow(c, &r, since);
    free(r.buf);
    close(r.fd);
    if (rc == -ESTALE)
        return cli_fail("the audit log was cut or taken away: run `coffer audit verify`");
    if (rc < 0 && rc != -EBADMSG)
        return say_no_log(rc);
    if (rc < 0 || r.bad)
        return cli_fail("line %llu of the audit log is no record: run `coffer audit verify`",
                        (unsigned long long)(r.bad ? r.bad : r.line));
    return CLI_OK;
}

int cli_audit_verify(struct cli *c)
{
    int dir = open_dir(c), rc;
    json_t *answer;
    char why[512];

    if (dir < 0)
        return say_no_log(dir);
    rc = audit_verify(dir, why, sizeof(why));
    close(dir);
    if (rc == -EBADMSG)
        return cli_fail("the audit log is damaged: %s: keep a copy, and find out who wrote to it", why);
    if (rc < 0)
        return say_no_log(rc);
    answer = json_pack("{s:s}", "summary", why);
    if (!cli_print_json(c, answer))
        printf("whole: %s\n", why);
    json_decref(answer);
    return CLI_OK;
}
