/*
 * secret.c - init and unlock: what a person types, or a key file holds, on its way to the agent.
 *
 * 1. A secret is only ever in guarded memory here (secmem.h) and in a pipe; stdio never sees it. It is wiped on every
 *    way out.
 * 2. The terminal's echo is back on before this returns, also after a signal.
 * 3. The recovery key is printed once, from guarded memory, and nowhere else.
 */
#include "fs/cli/cli.h"

#include "coffer/agent.h"
#include "fs/base/secmem.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

/* --- reading --- */

static volatile sig_atomic_t interrupted;

static void on_signal(int sig)
{
    interrupted = sig;
}

/* Reads one line of at most max bytes from fd, without its newline. The count, or -EFBIG, -EINTR, -ENODATA. */
static ssize_t read_line(int fd, char *buf, size_t max)
{
    size_t n = 0;

    for (;;) {
        char ch;
        ssize_t r = read(fd, &ch, 1);

        if (r < 0 && errno == EINTR && !interrupted)
            continue;
        if (r < 0)
            return -errno;
        if (r == 0 && n == 0)
            return -ENODATA;
        if (r == 0 || ch == '\n')
            break;
        if (n == max)
            return -EFBIG;
        buf[n++] = ch;
    }
    return (ssize_t)n;
}

/* The same from a terminal, with the echo off and a prompt on it. */
static ssize_t read_tty(const char *prompt, char *buf, size_t max)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP};
    struct sigaction act = {.sa_handler = on_signal}, old[ARRAY_LEN(signals)];
    struct termios before, quiet;
    ssize_t n;

    if (tcgetattr(STDIN_FILENO, &before) < 0)
        return -errno;
    for (size_t i = 0; i < ARRAY_LEN(signals); i++)
        sigaction(signals[i], &act, &old[i]);
    quiet = before;
    quiet.c_lflag &= ~(tcflag_t)(ECHO | ECHOE | ECHOK);
    quiet.c_lflag |= ICANON | ECHONL;
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &quiet);
    fputs(prompt, stderr);
    n = read_line(STDIN_FILENO, buf, max);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &before);
    for (size_t i = 0; i < ARRAY_LEN(signals); i++)
        sigaction(signals[i], &old[i], NULL);
    return n;
}

static int say_line(ssize_t err, const char *what)
{
    if (err == -EINTR)
        return cli_fail("interrupted: nothing was done");
    if (err == -EFBIG)
        return cli_fail("the %s is longer than %d bytes", what, AGENT_SECRET_MAX);
    if (err == -ENODATA || err == 0)
        return cli_fail("no %s was given: type it, or pipe it in as the first line of standard input", what);
    return cli_fail("cannot read the %s: %s", what, strerror((int)-err));
}

static int read_typed(enum cli_secret how, const char *what, char *buf, size_t *ret_n)
{
    char *again = NULL;
    char prompt[64];
    ssize_t n;
    int rc = CLI_OK;

    if (!isatty(STDIN_FILENO)) {
        n = read_line(STDIN_FILENO, buf, AGENT_SECRET_MAX);
    } else {
        snprintf(prompt, sizeof(prompt), "%s%s: ", how == CLI_SECRET_NEW ? "New " : "", what);
        n = read_tty(prompt, buf, AGENT_SECRET_MAX);
        if (n > 0 && how == CLI_SECRET_NEW) {
            ssize_t m;

            again = secmem_alloc(AGENT_SECRET_MAX);
            if (!again)
                return cli_fail("cannot lock memory for the %s: raise `ulimit -l`", what);
            m = read_tty("The same again: ", again, AGENT_SECRET_MAX);
            if (m != n || memcmp(buf, again, (size_t)n))
                rc = m < 0 ? say_line(m, what) : cli_fail("the two are not the same: try again");
        }
    }
    secmem_free(again);
    if (n <= 0)
        return say_line(n, what);
    *ret_n = (size_t)n;
    return rc;
}

static int read_key_file(const char *path, char *buf, size_t *ret_n)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    ssize_t n = 0;
    int rc = CLI_OK;

    if (fd < 0)
        return cli_fail("cannot open the key file %.200s: %s", path, strerror(errno));
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode))
        rc = cli_fail("the key file %.200s is not a regular file", path);
    else if (st.st_mode & 077)
        rc = cli_fail("others may read the key file: run `chmod 600 %.200s`", path);
    else if (st.st_size > AGENT_SECRET_MAX)
        rc = cli_fail("the key file %.200s is longer than %d bytes", path, AGENT_SECRET_MAX);
    else if ((n = read_upto(fd, buf, AGENT_SECRET_MAX)) < 0)
        rc = cli_fail("cannot read the key file %.200s: %s", path, strerror((int)-n));
    else if (n == 0)
        rc = cli_fail("the key file %.200s is empty: make one with `head -c 64 /dev/urandom`", path);
    close(fd);
    *ret_n = (size_t)n;
    return rc;
}

int cli_secret_read(struct cli *c, enum cli_secret how, const char **ret_kind, char **ret_secret, size_t *ret_n)
{
    const char *file = cli_get(c, "--key-file");
    bool recovery = cli_get(c, "--recovery") != NULL;
    char *buf;
    int rc;

    if (!!file + recovery + !!cli_get(c, "--passphrase") > 1)
        return cli_usage(c, "give one of --key-file, --passphrase, --recovery");
    buf = secmem_alloc(AGENT_SECRET_MAX);
    if (!buf)
        return cli_fail("cannot lock memory for the secret: raise `ulimit -l`");
    *ret_kind = file ? "key-file" : recovery ? "recovery" : "passphrase";
    if (file)
        rc = read_key_file(file, buf, ret_n);
    else
        rc = read_typed(how, recovery ? "recovery key" : "passphrase", buf, ret_n);
    if (rc) {
        secmem_free(buf);
        return rc;
    }
    *ret_secret = buf;
    return CLI_OK;
}

/* --- init, unlock --- */

/* A pipe holds 64 KiB, so the write does not block. */
int cli_secret_pipe(const void *secret, size_t n, int *ret_read)
{
    int p[2], rc;

    if (pipe2(p, O_CLOEXEC) < 0)
        return -errno;
    rc = write_full(p[1], secret, n);
    close(p[1]);
    if (rc < 0)
        close(p[0]);
    else
        *ret_read = p[0];
    return rc;
}

static void print_recovery(struct cli *c, const char *key, size_t n)
{
    static const char head[] = "Recovery key (shown only now; keep it on paper, away from this host):\n\n    ";
    static const char tail[] = "\n\nIt opens the keystore when the passphrase or key file is lost. Keep a backup of\n";

    while (n && (key[n - 1] == '\n' || key[n - 1] == '\r'))
        n--;
    fflush(stdout);
    (void)!write(STDOUT_FILENO, c->json ? "{\"recovery_key\":\"" : head, c->json ? 17 : sizeof(head) - 1);
    for (size_t i = 0; i < n; i++) {
        /* One write a byte would be slow for a book; this is a line. A newline inside becomes JSON's escape. */
        if (key[i] == '\n')
            (void)!write(STDOUT_FILENO, c->json ? "\\n" : "\n    ", c->json ? 2 : 5);
        else if (key[i] >= 0x20 && key[i] < 0x7f && key[i] != '"' && key[i] != '\\')
            (void)!write(STDOUT_FILENO, key + i, 1);
    }
    if (c->json) {
        (void)!write(STDOUT_FILENO, "\"}\n", 3);
        return;
    }
    (void)!write(STDOUT_FILENO, tail, sizeof(tail) - 1);
    printf("%s/keystore/keystore too: without it no volume can be read.\n", c->state);
}

int cli_init(struct cli *c)
{
    int fds[2] = {-1, -1}, out[2] = {-1, -1}, sock = -1, rc;
    char *secret = NULL, *recovery = NULL;
    const char *kind = NULL;
    json_t *req = NULL, *answer = NULL;
    size_t n = 0;
    ssize_t got;

    rc = cli_require(c);
    if (rc == CLI_OK)
        rc = cli_secret_read(c, CLI_SECRET_NEW, &kind, &secret, &n);
    if (rc)
        return rc;
    recovery = secmem_alloc(AGENT_SECRET_MAX);
    if (!recovery || cli_secret_pipe(secret, n, &fds[0]) < 0 || pipe2(out, O_CLOEXEC) < 0) {
        rc = cli_fail("cannot make a pipe or lock memory: %s", strerror(errno));
        goto out;
    }
    fds[1] = out[1];
    req = cli_request_new(c);
    json_object_set_new(req, "kind", json_string(kind));
    sock = cli_request_send(c, req, fds, 2);
    close(out[1]);
    if (sock < 0) {
        rc = CLI_FAILED;
        goto out;
    }
    rc = cli_request_answer(c, sock, &answer);
    if (rc)
        goto out;
    got = read_upto(out[0], recovery, AGENT_SECRET_MAX);
    if (got <= 0) {
        rc = cli_fail("the keystore is made, but its recovery key did not arrive: remove %s/keystore/keystore, which "
                      "holds nothing yet, and run this again",
                      c->state);
        goto out;
    }
    print_recovery(c, recovery, (size_t)got);
out:
    secmem_free(secret);
    secmem_free(recovery);
    close_quiet(fds[0]);
    close_quiet(out[0]);
    close_quiet(sock);
    json_decref(answer);
    return rc;
}

int cli_unlock(struct cli *c)
{
    char *secret = NULL;
    const char *kind = NULL;
    json_t *req, *answer = NULL;
    int in = -1, rc;
    size_t n = 0;

    rc = cli_require(c);
    if (rc == CLI_OK)
        rc = cli_secret_read(c, CLI_SECRET_ASK, &kind, &secret, &n);
    if (rc)
        return rc;
    if (cli_secret_pipe(secret, n, &in) < 0) {
        secmem_free(secret);
        return cli_fail("cannot make a pipe: %s", strerror(errno));
    }
    secmem_free(secret);
    req = cli_request_new(c);
    json_object_set_new(req, "kind", json_string(kind));
    rc = cli_request(c, req, &in, 1, &answer);
    close(in);
    if (rc == CLI_OK && !cli_print_json(c, answer))
        puts("unlocked");
    json_decref(answer);
    return rc;
}
