/*
 * export.c - export, import, verify. The passphrase or key file makes the key here, and only that key and the stream's
 * head go on, through a pipe; the stream itself goes between our standard input or output and coffer-fs directly.
 */
#include "coffer/export.h"

#include "fs/base/secmem.h"
#include "fs/cli/cli.h"

#include <fcntl.h>
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
        return "standard input is no export of a volume";
    case -ENOTSUP:
        return "the export is of a newer version, or its passphrase too dear to try";
    case -EKEYREJECTED:
        return "another passphrase or key file made this export, or its head was altered";
    default:
        return "not enough memory to make the export's key";
    }
}

/* The stream's head from standard input, and its key. */
static int open_stream(struct cli *c, struct export_secret **ret)
{
    struct export_secret *s = secmem_alloc(sizeof(*s));
    char *secret = NULL;
    const char *kind;
    size_t n = 0;
    int rc, err;

    if (!s)
        return cli_fail("cannot lock memory for the key: raise `ulimit -l`");
    if (isatty(STDIN_FILENO))
        rc = cli_usage(c, "the export comes in on standard input");
    else if (read_upto(STDIN_FILENO, &s->head, sizeof(s->head)) != (ssize_t)sizeof(s->head))
        rc = cli_fail("standard input is no export: it ends within its head");
    else
        rc = read_secret(c, CLI_SECRET_ASK, &kind, &secret, &n);
    if (rc == CLI_OK) {
        err = export_secret_open(secret, n, s);
        if (err < 0)
            rc = cli_fail("%s", why_not_open(err));
    }
    secmem_free(secret);
    if (rc)
        secmem_free(s);
    else
        *ret = s;
    return rc;
}

int cli_volume_import(struct cli *c)
{
    int fds[2] = {-1, STDIN_FILENO}, rc = cli_require(c);
    struct export_secret *s = NULL;
    json_t *req, *answer = NULL;

    if (rc == CLI_OK)
        rc = open_stream(c, &s);
    if (rc)
        return rc;
    req = cli_request_new(c);
    rc = cli_volume_options(c, req);
    if (rc == CLI_OK && cli_secret_pipe(s, sizeof(*s), &fds[0]) < 0)
        rc = cli_fail("cannot make a pipe");
    secmem_free(s);
    if (rc) {
        json_decref(req);
        return rc;
    }
    cli_want_progress(c, req);
    rc = cli_request(c, req, fds, 2, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer))
        printf("imported %s\n", c->operand[0]);
    json_decref(answer);
    close_quiet(fds[0]);
    return rc;
}

static int read_stdin(void *ctx, void *buf, size_t n)
{
    ssize_t k = read_upto(STDIN_FILENO, buf, n);

    (void)ctx;
    return k < 0 ? (int)k : (size_t)k < n ? -ENODATA : 0;
}

static void last_line(void *ctx, const char *text)
{
    snprintf(ctx, 256, "%s", text);
}

int cli_volume_verify(struct cli *c)
{
    char why[256] = "it cannot be read";
    struct export_io io = {.read = read_stdin};
    struct volume_report report = {.line = last_line, .ctx = why};
    struct export_secret *s = NULL;
    struct volume_params p;
    int rc = open_stream(c, &s);

    if (rc)
        return rc;
    if (export_verify(s, &io, &p, &report) < 0)
        rc = cli_fail("the export is not whole: %s", why);
    else
        puts(c->json ? "{\"whole\":true}" : "the export is whole");
    secmem_free(s);
    return rc;
}
