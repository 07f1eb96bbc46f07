/*
 * up.c - starts cofferd by hand and stops it.
 *
 * cofferd gets a session of its own, / as its working directory, standard input from nowhere and its log appended to
 * <state>/cofferd.log. It is our grandchild; as its subreaper we notice when it ends while we still wait for it.
 */
#include "fs/cli/cli.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define UP_WAIT_MS   10000
#define DOWN_WAIT_MS 30000
#define STEP_MS      20

/* What was done: text, or an empty object in JSON mode. */
static void say_done(const struct cli *c, const char *text)
{
    puts(c->json ? "{}" : text);
}

static void pause_ms(int ms)
{
    usleep((useconds_t)ms * 1000);
}

/* mkdir -p; what is made gets mode. */
static int make_directories(const char *path, mode_t mode)
{
    char *copy = xstrdup(path);
    int rc = 0;

    for (char *p = copy + 1; rc == 0; p++) {
        char ch = *p;

        if (ch != '/' && ch)
            continue;
        *p = 0;
        if (mkdir(copy, ch ? 0755 : mode) < 0 && errno != EEXIST)
            rc = -errno;
        *p = ch;
        if (!ch)
            break;
    }
    free(copy);
    return rc;
}

/* The path of cofferd: beside our own executable, or in ../libexec/coffer from it. NULL when it is in neither. */
static char *find_cofferd(void)
{
    char self[4096], *path;
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);

    if (n <= 0)
        return NULL;
    self[n] = 0;
    *strrchr(self, '/') = 0;
    path = xasprintf("%s/cofferd", self);
    if (access(path, X_OK) == 0)
        return path;
    free(path);
    path = xasprintf("%s/../libexec/coffer/cofferd", self);
    if (access(path, X_OK) == 0)
        return path;
    free(path);
    return NULL;
}

/* Both generations of children: never returns. */
static void become_cofferd(const char *path, char **argv, int log_fd)
{
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    pid_t pid;

    if (setsid() < 0)
        _exit(127);
    pid = fork();
    if (pid)
        _exit(pid < 0 ? 127 : 0);
    if (null_fd < 0 || dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 || dup2(log_fd, 2) < 0 || chdir("/") < 0)
        _exit(127);
    close_range(3, ~0u, 0);
    umask(077);
    execv(path, argv);
    _exit(127);
}

/* The last line that cofferd logged after offset start, in buf. */
static char *last_line(int log_fd, off_t start, char *buf, size_t n)
{
    off_t end = lseek(log_fd, 0, SEEK_END), from = MAX(start, end - (off_t)n + 1);
    ssize_t got = end > start ? pread(log_fd, buf, (size_t)(end - from), from) : 0;
    char *line;

    got = MAX(got, 0);
    while (got && buf[got - 1] == '\n')
        got--;
    buf[got] = 0;
    line = strrchr(buf, '\n');
    line = line ? line + 1 : buf;
    return strncmp(line, "cofferd: ", 9) ? line : line + 9;
}

static int wait_up(struct cli *c, int log_fd, off_t log_start)
{
    char line[512], text[600];
    int64_t end = mono_ns() + UP_WAIT_MS * 1000000ll;
    bool gone = false;

    while (mono_ns() < end && !gone) {
        int status;
        pid_t pid;

        if (cli_ping(c) == 0)
            return CLI_OK;
        while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
            ;
        gone = pid < 0; /* no child and no adopted grandchild is left */
        pause_ms(STEP_MS);
    }
    if (!gone)
        return cli_fail("cofferd does not answer after %d s: look into %s/cofferd.log", UP_WAIT_MS / 1000, c->state);
    escape_text(last_line(log_fd, log_start, line, sizeof(line)), text, sizeof(text));
    return cli_fail("cofferd did not start: %s", *text ? text : "it ended without a word");
}

static int start(struct cli *c, const char *path, int log_fd)
{
    static const char *const options[] = {"--plugin-socket", "--engine-root", "--engine-socket"};
    char *argv[2 + 2 + 2 * ARRAY_LEN(options)];
    off_t log_start = lseek(log_fd, 0, SEEK_END);
    int argc = 0, status;
    pid_t pid;

    argv[argc++] = (char *)(uintptr_t) "cofferd";
    if (!c->plain) {
        argv[argc++] = (char *)(uintptr_t) "--root";
        argv[argc++] = c->state;
    }
    for (size_t i = 0; i < ARRAY_LEN(options); i++)
        if (cli_get(c, options[i])) {
            argv[argc++] = (char *)(uintptr_t)options[i];
            argv[argc++] = (char *)(uintptr_t)cli_get(c, options[i]);
        }
    argv[argc] = NULL;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid = fork();
    if (pid == 0)
        become_cofferd(path, argv, log_fd);
    if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
        return cli_fail("cannot start a process: %s", strerror(errno));
    return wait_up(c, log_fd, log_start);
}

int cli_up(struct cli *c)
{
    char *path = NULL, *log_path = NULL;
    int log_fd = -1, rc;

    if (cli_ping(c) == 0) {
        say_done(c, "cofferd is already running");
        return CLI_OK;
    }
    if (geteuid() != 0)
        return cli_fail("cofferd needs root: run this with sudo");
    rc = make_directories(c->state, 0700);
    if (rc < 0)
        return cli_fail("cannot make %s: %s", c->state, strerror(-rc));
    path = find_cofferd();
    if (!path)
        return cli_fail("cofferd is neither beside coffer nor in ../libexec/coffer: run `make` or `make install`");
    log_path = xasprintf("%s/cofferd.log", c->state);
    log_fd = open(log_path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (log_fd < 0)
        rc = cli_fail("cannot open %s: %s", log_path, strerror(errno));
    else
        rc = start(c, path, log_fd);
    if (rc == CLI_OK)
        say_done(c, "cofferd is running");
    close_quiet(log_fd);
    free(path);
    free(log_path);
    return rc;
}

int cli_down(struct cli *c)
{
    int64_t end = mono_ns() + DOWN_WAIT_MS * 1000000ll;
    json_t *req, *answer = NULL;
    int rc = cli_ping(c);

    if (rc == -ENOENT || rc == -ECONNREFUSED) {
        say_done(c, "cofferd is not running");
        return CLI_OK;
    }
    req = cli_request_new(c);
    if (cli_get(c, "--force"))
        json_object_set_new(req, "force", json_true());
    rc = cli_request(c, req, NULL, 0, &answer);
    while (rc == CLI_OK && (cli_ping(c) == 0)) {
        if (mono_ns() > end)
            rc = cli_fail("cofferd still answers after %d s: look into %s/cofferd.log", DOWN_WAIT_MS / 1000, c->state);
        pause_ms(STEP_MS);
    }
    if (rc == CLI_OK)
        say_done(c, "cofferd is stopped");
    json_decref(answer);
    return rc;
}
