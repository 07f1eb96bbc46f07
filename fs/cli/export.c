/*
 * export.c - export, import, verify. The passphrase or key file makes the key here, and only that key and the stream's
 * head go on, through a pipe; the stream itself goes between our standard input or output and coffer-fs directly.
 */
#include "coffer/export.h"

#include "fs/base/secmem.h"
#include "fs/cli/cli.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

/* Standard input may be the stream: then a passphrase is typed at the terminal. */
static int read_secret(struct cli *c, enum cli_secret how, const char **ret_kind, char **ret_secret, size_t *ret_n)
{
    int in, tty, rc;

    if (how == CLI_SECRET_NEW || cli_get(c, "--key-file"))
        return cli_secret_read(c, how, ret_kind, ret_secret, ret_n);
    in = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
    tty = open("/dev/tty", O_RDWR | O_CLOEXEC);
    if (in < 0 || tty < 0 || dup2(tty, STDIN_FILENO) < 0) {
        close_quiet(in);
        close_quiet(tty);
        return cli_fail("there is no terminal to type the passphrase at: give --key-file");
    }
    rc = cli_secret_read(c, how, ret_kind, ret_secret, ret_n);
    if (dup2(in, STDIN_FILENO) < 0 && rc == CLI_OK)
        rc = cli_fail("standard input is lost: %s", strerror(errno));
    close(in);
    close(tty);
    return rc;
}

static int add_name(json_t *req, const char *key, const char *name)
{
    return name ? json_object_set_new(req, key, json_string(name)) : 0;
}

int cli_volume_export(struct cli *c)
{
    int fds[2] = {-1, STDOUT_FILENO}, rc;
    struct export_secret *s = NULL;
    json_t *req, *answer = NULL;
    char *secret = NULL;
    json_int_t findings;
    const char *kind;
    size_t n;

    if (isatty(STDOUT_FILENO))
        return cli_usage(c, "the stream goes to standard output: send it to a file");
    rc = cli_require(c);
    if (rc == CLI_OK)
        rc = read_secret(c, CLI_SECRET_NEW, &kind, &secret, &n);
    if (rc)
        return rc;
    s = secmem_alloc(sizeof(*s));
    if (!s || export_secret_new(*kind == 'k' ? EXPORT_KEY_FILE : EXPORT_PASSPHRASE, secret, n, s) < 0 ||
        cli_secret_pipe(s, sizeof(*s), &fds[0]) < 0) {
        rc = cli_fail("not enough memory to make the export's key");
        goto out;
    }
    req = cli_request_new(c);
    if (add_name(req, "snapshot", cli_get(c, "--snapshot")) < 0 || add_name(req, "since", cli_get(c, "--since")) < 0) {
        json_decref(req);
        rc = cli_usage(c, "a snapshot's name holds bytes that are not UTF-8");
        goto out;
    }
    cli_want_progress(c, req);
    c->json = true; /* standard output is the stream's: findings stay in the answer */
    rc = cli_request(c, req, fds, 2, &answer);
    findings = json_integer_value(json_object_get(answer, "findings"));
    if (rc == CLI_OK && findings)
        rc = cli_fail("%s: exported, but for %" JSON_INTEGER_FORMAT
                      " places that cannot be read: run `coffer volume check --data %s`",
                      c->operand[0], findings, c->operand[0]);
out:
    json_decref(answer);
    secmem_free(secret);
    secmem_free(s);
    close_quiet(fds[0]);
    return rc;
}

static const char *why_not_open(int err)
{
    switch (err) {
    case -EINVAL:
        return "it is no export of a volume";
    case -ENOTSUP:
        return "it is of a newer version, or its passphrase too dear to try";
    case -EKEYREJECTED:
        return "another passphrase or key file made it, or its head was altered";
    default:
        return "not enough memory to make its key";
    }
}

#define STREAMS_MAX 257 /* their secrets fit a pipe */

/* An export on standard input, and the increments of --increment. */
struct streams {
    struct export_secret *secrets; /* n of them, in locked memory */
    int fd[STREAMS_MAX];           /* behind the heads; 0: standard input */
    int n;
    int out;    /* where a thread writes all of them to, for the reader of `in` */
    int in;     /* what is read; standard input where it is the only one */
    int passed; /* given to a reader */
    pthread_t thread;
};

static int open_one(struct cli *c, struct streams *s, const char *path, const char *secret, size_t n)
{
    struct export_secret *e = &s->secrets[s->n];
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : STDIN_FILENO, err;
    const char *what = path ? path : "standard input";

    (void)c;
    if (fd < 0)
        return cli_fail("%.200s: %s", what, strerror(errno));
    s->fd[s->n++] = fd;
    if (path && read_upto(fd, &e->head, sizeof(e->head)) != (ssize_t)sizeof(e->head))
        return cli_fail("%.200s: it is no export of a volume: it ends within its head", what);
    err = export_secret_open(secret, n, e);
    return err < 0 ? cli_fail("%.200s: %s", what, why_not_open(err)) : CLI_OK;
}

static int copy_all(int from, int to)
{
    char buf[1 << 16];
    ssize_t n;

    while ((n = read_upto(from, buf, sizeof(buf))) > 0) {
        int rc = write_full(to, buf, (size_t)n);

        if (rc < 0)
            return rc;
    }
    return (int)n;
}

/* Where a stream cannot be read to its end, its reader sees that it is cut off. */
static void *pump(void *arg)
{
    struct streams *s = arg;
    int rc = 0;

    for (int i = 0; i < s->n && rc == 0; i++)
        rc = copy_all(s->fd[i], s->out);
    close(s->out);
    return NULL;
}

static void streams_end(struct streams *s)
{
    if (s->in > STDIN_FILENO) {
        close(s->in); /* whoever has not read all: the thread's next write fails */
        pthread_join(s->thread, NULL);
    }
    for (int i = 0; i < s->n; i++)
        if (s->fd[i] != STDIN_FILENO)
            close(s->fd[i]);
    secmem_free(s->secrets);
}

/* Reads the heads, and derives the keys. After CLI_OK streams_end is due. */
static int streams_begin(struct cli *c, struct streams *s)
{
    size_t n = 0, count = 1;
    char *secret = NULL;
    const char *kind;
    int rc, p[2];

    *s = (struct streams){.in = STDIN_FILENO};
    for (size_t i = 0; i < c->ngiven; i++)
        count += !strcmp(c->given[i].option->name, "--increment");
    if (count > STREAMS_MAX)
        return cli_usage(c, "at most %d increments at once", STREAMS_MAX - 1);
    s->secrets = secmem_alloc(count * sizeof(*s->secrets));
    if (!s->secrets)
        return cli_fail("cannot lock memory for the key: raise `ulimit -l`");
    if (isatty(STDIN_FILENO))
        rc = cli_usage(c, "the export comes in on standard input");
    else if (read_upto(STDIN_FILENO, &s->secrets->head, sizeof(s->secrets->head)) != (ssize_t)sizeof(s->secrets->head))
        rc = cli_fail("standard input is no export: it ends within its head");
    else
        rc = read_secret(c, CLI_SECRET_ASK, &kind, &secret, &n);
    if (rc == CLI_OK)
        rc = open_one(c, s, NULL, secret, n);
    for (size_t i = 0; rc == CLI_OK && i < c->ngiven; i++)
        if (!strcmp(c->given[i].option->name, "--increment"))
            rc = open_one(c, s, c->given[i].value, secret, n);
    secmem_free(secret);
    if (rc == CLI_OK && count > 1) {
        signal(SIGPIPE, SIG_IGN);
        if (pipe2(p, O_CLOEXEC) < 0) {
            rc = cli_fail("cannot make a pipe: %s", strerror(errno));
        } else {
            s->out = p[1];
            if (pthread_create(&s->thread, NULL, pump, s)) {
                close(p[0]);
                close(p[1]);
                rc = cli_fail("cannot start a thread");
            } else {
                s->in = p[0];
            }
        }
    }
    if (rc)
        streams_end(s);
    return rc;
}

int cli_volume_import(struct cli *c)
{
    int fds[2] = {-1, -1}, rc = cli_require(c);
    json_t *req, *answer = NULL;
    struct streams s;

    if (rc == CLI_OK)
        rc = streams_begin(c, &s);
    if (rc)
        return rc;
    fds[1] = s.in;
    req = cli_request_new(c);
    rc = cli_volume_options(c, req);
    if (rc == CLI_OK && cli_secret_pipe(s.secrets, (size_t)s.n * sizeof(*s.secrets), &fds[0]) < 0)
        rc = cli_fail("cannot make a pipe");
    if (rc) {
        json_decref(req);
        goto out;
    }
    cli_want_progress(c, req);
    rc = cli_request(c, req, fds, 2, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer))
        printf("imported %s\n", c->operand[0]);
    json_decref(answer);
out:
    close_quiet(fds[0]);
    streams_end(&s);
    return rc;
}

static int read_streams(void *ctx, void *buf, size_t n)
{
    ssize_t k = read_upto(((struct streams *)ctx)->in, buf, n);

    return k < 0 ? (int)k : (size_t)k < n ? -ENODATA : 0;
}

static int next_stream(void *ctx, const struct export_secret **ret)
{
    struct streams *s = ctx;

    if (++s->passed == s->n)
        return 0;
    *ret = &s->secrets[s->passed];
    return 1;
}

static void last_line(void *ctx, const char *text)
{
    snprintf(ctx, 256, "%s", text);
}

int cli_volume_verify(struct cli *c)
{
    char why[256] = "it cannot be read";
    struct volume_report report = {.line = last_line, .ctx = why};
    struct streams s;
    struct export_io io = {.read = read_streams, .next = next_stream, .ctx = &s};
    struct volume_params p;
    int rc = streams_begin(c, &s);

    if (rc)
        return rc;
    if (export_verify(s.secrets, &io, &p, &report) < 0)
        rc = cli_fail("the export is not whole: %s", why);
    else
        puts(c->json ? "{\"whole\":true}" : "the export is whole");
    streams_end(&s);
    return rc;
}
