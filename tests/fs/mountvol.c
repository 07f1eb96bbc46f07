/*
 * mountvol.c - mounts a volume without daemons, for tests and benchmarks.
 *
 *     mountvol DATA_DIR MOUNTPOINT [--format SIZE [--block SIZE]] [--database] [--strict] [--key FILE] [--server PATH]
 *              [--uid N]
 *
 * As root. DATA_DIR holds `data`, `log` and (unless --key names another) `key`: the volume's key and id in hex, one a
 * line, made by --format. Plays both cofferd (mounts, starts coffer-fs with its descriptors as user --uid, 65534 if not
 * said) and the agent (says ALLOW to everybody). Says "mounted" on stdout when requests are served, stays in the
 * foreground, and unmounts on SIGTERM, SIGINT or `quit`. Exit status: coffer-fs's; 1 when something else failed, 2
 * usage.
 *
 * Lines on standard input change the agent's mind; each is answered by one line:
 *
 *     allow | readonly | deny | placeholder | locked   what AGENT_FS_AUTH is answered from now on (locked: -ENOKEY)
 *     away             it is not answered at all
 *     revoke           AGENT_FS_GRANT_END of the grant in use; the next verdict is another grant's
 *     lock             AGENT_FS_LOCK; answered when the server says that it is locked
 *     stat             unlocked, and struct volume_stat's fields
 *     check            findings, one a line, then their number
 *     asked            how often the agent was asked so far
 *     quit
 *
 *  1. One thread, which never touches the mountpoint: whoever does waits for it to answer.
 *  2. Grants and cacheability are as the agent's: a verdict holds for a thread (pidfd) until its grant ends.
 */
#include "coffer/server.h"
#include "fs/base/base.h"
#include "fs/base/msg.h"
#include "fs/base/secmem.h"

#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PIDFD_THREAD
#define PIDFD_THREAD O_EXCL
#endif

#define READY_MS 15000
#define STOP_MS  60000

enum mind { ALLOW, READONLY, DENY, PLACEHOLDER, LOCKED, AWAY };
static const char *const minds[] = {"allow", "readonly", "deny", "placeholder", "locked", "away"};

static struct {
    const char *dir, *mountpoint, *key_file, *server;
    uint64_t format, block;
    bool database, strict;
    uid_t uid;
} arg = {.block = 4096, .uid = 65534};

static uint8_t volume_key[KEY_BYTES], volume_id[VOLUME_ID_BYTES];
static int agent_fd = -1, control_fd = -1, fuse_fd = -1;
static pid_t server;
static enum mind mind;
static uint64_t grant, last_id, asked;
static bool mounted, stopping;

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *fmt, ...)
{
    va_list ap;

    fputs("mountvol: ", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    if (mounted)
        umount2(arg.mountpoint, MNT_DETACH);
    if (server > 0)
        kill(server, SIGKILL);
    exit(1);
}

static void answer(const char *text)
{
    puts(text);
    fflush(stdout);
}

/* --- the backing files --- */

static char *in_dir(const char *name)
{
    return xasprintf("%s/%s", arg.dir, name);
}

static int open_backing(const char *name, int flags)
{
    char *path = in_dir(name);
    int fd = open(path, O_RDWR | O_CLOEXEC | flags, 0600);

    if (fd < 0)
        die("cannot open %s: %s%s", path, strerror(errno), errno == ENOENT ? ": --format SIZE makes it" : "");
    free(path);
    return fd;
}

/* Two servers would destroy the volume. The lock is the open file's, so it lasts as long as the server has it, too. */
static int open_log(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open_backing("log", 0);

    if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
        die("%s is in use", arg.dir);
    return fd;
}

static void make_key(void)
{
    char key[2 * KEY_BYTES + 1], id[2 * VOLUME_ID_BYTES + 1];
    FILE *f = fopen(arg.key_file, "wx");

    randombytes_buf(volume_key, sizeof(volume_key));
    randombytes_buf(volume_id, sizeof(volume_id));
    hex_encode(volume_key, sizeof(volume_key), key);
    hex_encode(volume_id, sizeof(volume_id), id);
    if (!f || fprintf(f, "%s\n%s\n", key, id) < 0 || fclose(f))
        die("cannot make %s: %s", arg.key_file, strerror(errno));
}

static void load_key(void)
{
    char key[2 * KEY_BYTES + 2], id[2 * VOLUME_ID_BYTES + 2];
    FILE *f = fopen(arg.key_file, "r");

    if (!f)
        die("cannot open %s: %s", arg.key_file, strerror(errno));
    if (!fgets(key, sizeof(key), f) || !fgets(id, sizeof(id), f))
        die("%s is not a key and an id in hex, one a line", arg.key_file);
    key[strcspn(key, "\n")] = id[strcspn(id, "\n")] = 0;
    if (hex_decode(key, volume_key, sizeof(volume_key)) || hex_decode(id, volume_id, sizeof(volume_id)))
        die("%s is not a key and an id in hex, one a line", arg.key_file);
    fclose(f);
}

static struct volume_params params(void)
{
    struct volume_params p = {.block_size = (uint32_t)arg.block,
                              .profile = arg.database ? VOLUME_PROFILE_DATABASE : VOLUME_PROFILE_GENERAL,
                              .size_limit = arg.format,
                              .root_mode = 0755};

    memcpy(p.id, volume_id, sizeof(p.id));
    return p;
}

static void format(void)
{
    struct store *data = store_fd_take(open_backing("data", O_CREAT | O_EXCL));
    struct store *log = store_fd_take(open_backing("log", O_CREAT | O_EXCL));
    struct volume_params p;
    struct key *key = key_new();
    int rc;

    make_key();
    p = params();
    if (!key)
        die("no memory for a key: %s", strerror(errno));
    memcpy(key->b, volume_key, sizeof(volume_key));
    rc = volume_format(data, log, key, &p);
    key_free(&key);
    if (rc < 0)
        die("formatting failed: %s", strerror(-rc));
    data->ops->close(data);
    log->ops->close(log);
}

/* --- cofferd's part --- */

/* As cofferd mounts. Asks the kernel for the device's number without asking the server, which is not there yet. */
static void mount_fuse(void)
{
    char options[160], path[64];
    struct statx sx;
    int fd;

    fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fuse_fd < 0)
        die("cannot open /dev/fuse: %s", strerror(errno));
    snprintf(options, sizeof(options),
             "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576", fuse_fd);
    if (mount("coffer", arg.mountpoint, "fuse.coffer", 0, options) < 0)
        die("cannot mount %s: %s", arg.mountpoint, strerror(errno));
    mounted = true;
    /* parse() has set it. NOLINTNEXTLINE(clang-analyzer-core.NonNullParamChecker) */
    if (statx(AT_FDCWD, arg.mountpoint, AT_STATX_DONT_SYNC, 0, &sx) < 0)
        return;
    snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", sx.stx_dev_major, sx.stx_dev_minor);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0)
        (void)!write(fd, "1024", 4);
    close_quiet(fd);
}

__attribute__((noreturn)) static void exec_server(int exe, const int fds[5], char *const argv[])
{
    int high[6];
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    for (int i = 0; i < 6; i++)
        high[i] = fcntl(i < 5 ? fds[i] : exe, F_DUPFD, 64);
    for (int i = 0; i < 6; i++)
        dup2(high[i], SERVER_FD_CONTROL + i);
    dup2(STDERR_FILENO, STDOUT_FILENO);
    syscall(SYS_close_range, SERVER_FD_CONTROL + 6, ~0u, 0);
    fcntl(SERVER_FD_CONTROL + 5, F_SETFD, FD_CLOEXEC);
    if (setgroups(0, NULL) || setresgid(arg.uid, arg.uid, arg.uid) || setresuid(arg.uid, arg.uid, arg.uid))
        _exit(126);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    /* The environment is kept: sanitizers read theirs. */
    execveat(SERVER_FD_CONTROL + 5, "", argv, environ, AT_EMPTY_PATH);
    _exit(127);
}

static void start_server(int log_fd)
{
    char *argv[7] = {"coffer-fs", "serve", "mountvol"};
    int control[2], agent[2], n = 3, exe = open(arg.server, O_PATH | O_CLOEXEC);

    if (arg.database) {
        argv[n++] = "--profile";
        argv[n++] = "database";
    }
    if (arg.strict)
        argv[n++] = "--strict";
    if (exe < 0)
        die("cannot open %s: %s", arg.server, strerror(errno));
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control) ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, agent))
        die("socketpair: %s", strerror(errno));
    int fds[5] = {control[1], agent[1], open_backing("data", 0), log_fd, fuse_fd};

    server = fork();
    if (server < 0)
        die("fork: %s", strerror(errno));
    if (server == 0)
        exec_server(exe, fds, argv);
    control_fd = control[0];
    agent_fd = agent[0];
    for (int i = 0; i < 5; i++)
        close_quiet(fds[i]);
    close_quiet(exe);
    fuse_fd = -1;
}

static void send_control(uint16_t type)
{
    struct msg_head head = {.type = type, .id = ++last_id};

    msg_send(control_fd, &head, NULL, NULL, 0);
}

static void send_check(void)
{
    struct server_task task = {.kind = TASK_CHECK, .value = 1};
    struct msg_head head = {.type = SERVER_TASK, .id = ++last_id, .len = sizeof(task)};

    msg_send(control_fd, &head, &task, NULL, 0);
}

static void print_stat(const struct server_stat *s)
{
    printf("unlocked %u size_limit %llu used %llu data_bytes %llu inodes %llu generation %llu sequence %llu "
           "dirty_nodes %llu cached_nodes %llu failed %d\n",
           s->unlocked, (unsigned long long)s->stat.size_limit, (unsigned long long)s->stat.used,
           (unsigned long long)s->stat.data_bytes, (unsigned long long)s->stat.inodes,
           (unsigned long long)s->stat.generation, (unsigned long long)s->stat.sequence,
           (unsigned long long)s->stat.dirty_nodes, (unsigned long long)s->stat.cached_nodes, s->stat.failed);
    fflush(stdout);
}

/* One message of the server; false at its end. */
static bool read_control(void)
{
    union {
        struct agent_reply reply;
        struct server_stat stat;
        struct server_progress progress;
    } body;
    struct msg_head head;
    int rc = msg_recv(control_fd, &head, &body, sizeof(body), NULL, NULL, 0);

    if (rc == -ETIMEDOUT || rc == -EAGAIN)
        return true;
    if (rc < 0)
        return false;
    switch (head.type) {
    case SERVER_READY:
        answer("mounted");
        break;
    case SERVER_STAT:
        print_stat(&body.stat);
        break;
    case SERVER_LINE:
        answer(body.reply.text);
        break;
    case SERVER_REPLY:
        printf("%d\n", body.reply.err);
        fflush(stdout);
        break;
    case SERVER_PROGRESS:
        break;
    case SERVER_FAILED:
    case SERVER_DAMAGE:
        fprintf(stderr, "mountvol: %s: %s\n", head.type == SERVER_FAILED ? "failed" : "damage", body.reply.text);
        break;
    default:
        die("the server sends control message %u", head.type);
    }
    return true;
}

/* --- the agent's part --- */

static void new_grant(void)
{
    randombytes_buf(&grant, sizeof(grant));
    grant |= 1;
}

static void decide(const struct agent_auth *ask, struct agent_verdict *v, int *ret_pidfd)
{
    *v = (struct agent_verdict){.err = -EACCES, .strict = arg.strict};
    *ret_pidfd = -1;
    if (mind == LOCKED)
        v->err = -ENOKEY;
    if (mind == PLACEHOLDER)
        *v = (struct agent_verdict){.kind = AGENT_PLACEHOLDER};
    if ((mind != ALLOW && mind != READONLY) || ask->tid <= 0)
        return;
    *v = (struct agent_verdict){.kind = AGENT_ALLOW, .grant = grant, .read_only = mind == READONLY, .params = params()};
    *ret_pidfd = (int)syscall(SYS_pidfd_open, ask->tid, PIDFD_THREAD);
    v->cacheable = *ret_pidfd >= 0;
    if (ask->flags & AGENT_AUTH_WANT_KEY) {
        v->has_key = 1;
        memcpy(v->key, volume_key, sizeof(v->key));
    }
}

static bool read_agent(void)
{
    struct agent_auth ask;
    struct agent_verdict v;
    struct msg_head head;
    uint8_t body[sizeof(ask) + sizeof(struct volume_seen)];
    int pidfd, rc = msg_recv(agent_fd, &head, body, sizeof(body), NULL, NULL, 0);

    if (rc == -ETIMEDOUT || rc == -EAGAIN)
        return true;
    if (rc < 0)
        return false;
    if (head.type == AGENT_FS_LOCKED && head.len == 0) {
        answer("locked");
        return true;
    }
    if (head.type == AGENT_FS_SEEN && head.len == sizeof(struct volume_seen)) {
        head.len = sizeof(struct agent_seen_done);
        return msg_send(agent_fd, &head, &(struct agent_seen_done){0}, NULL, 0) == 0;
    }
    memcpy(&ask, body, sizeof(ask));
    if (head.type != AGENT_FS_AUTH || head.len != sizeof(ask))
        die("the server sends agent message %u of %u bytes", head.type, head.len);
    asked++;
    if (mind == AWAY)
        return true;
    decide(&ask, &v, &pidfd);
    head.len = sizeof(v);
    if (msg_send(agent_fd, &head, &v, &pidfd, pidfd >= 0) < 0)
        return false;
    close_quiet(pidfd);
    return true;
}

static void send_agent(uint16_t type, const struct agent_grant *body)
{
    struct msg_head head = {.type = type, .len = body ? sizeof(*body) : 0, .id = ++last_id};

    msg_send(agent_fd, &head, body, NULL, 0);
}

/* --- orders --- */

static void stop(void)
{
    if (stopping)
        return;
    stopping = true;
    if (umount2(arg.mountpoint, 0) < 0) {
        fprintf(stderr, "mountvol: %s: %s; detached\n", arg.mountpoint, strerror(errno));
        umount2(arg.mountpoint, MNT_DETACH);
        send_control(SERVER_STOP);
    }
    mounted = false;
    alarm(STOP_MS / 1000); /* a server that does not end ends us */
}

static void order(const char *line)
{
    char text[32];

    for (size_t i = 0; i < ARRAY_LEN(minds); i++) {
        if (strcmp(line, minds[i]) == 0) {
            mind = (enum mind)i;
            answer(line);
            return;
        }
    }
    if (strcmp(line, "revoke") == 0) {
        send_agent(AGENT_FS_GRANT_END, &(struct agent_grant){grant});
        new_grant();
        answer(line);
    } else if (strcmp(line, "lock") == 0) {
        send_agent(AGENT_FS_LOCK, NULL);
        new_grant();
    } else if (strcmp(line, "stat") == 0) {
        send_control(SERVER_STAT);
    } else if (strcmp(line, "check") == 0) {
        send_check();
    } else if (strcmp(line, "asked") == 0) {
        snprintf(text, sizeof(text), "%llu", (unsigned long long)asked);
        answer(text);
    } else if (strcmp(line, "quit") == 0) {
        stop();
    } else {
        answer("?");
    }
}

/* False when no more orders can come. */
static bool read_orders(void)
{
    static char buf[256];
    static size_t have;
    ssize_t n = read(STDIN_FILENO, buf + have, sizeof(buf) - 1 - have);
    char *end;

    if (n <= 0)
        return false;
    have += (size_t)n;
    while ((end = memchr(buf, '\n', have))) {
        *end = 0;
        order(buf);
        have -= (size_t)(end + 1 - buf);
        memmove(buf, end + 1, have);
    }
    return have < sizeof(buf) - 1;
}

/* --- main --- */

static int serve(int signals)
{
    enum { CONTROL, AGENT, SIGNALS, ORDERS };
    struct pollfd p[] = {
        {control_fd, POLLIN, 0}, {agent_fd, POLLIN, 0}, {signals, POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}};
    struct signalfd_siginfo info;
    int status;

    for (;;) {
        if (poll(p, ARRAY_LEN(p), -1) < 0 && errno != EINTR)
            die("poll: %s", strerror(errno));
        if (p[CONTROL].revents && !read_control())
            p[CONTROL].fd = -1;
        if (p[AGENT].revents && !read_agent())
            p[AGENT].fd = -1;
        if (p[ORDERS].revents && !read_orders())
            p[ORDERS].fd = -1;
        if (!p[SIGNALS].revents || read(signals, &info, sizeof(info)) != sizeof(info))
            continue;
        if (info.ssi_signo != SIGCHLD)
            stop();
        else if (waitpid(server, &status, WNOHANG) == server)
            break;
    }
    server = 0;
    if (mounted) {
        fprintf(stderr, "mountvol: the server is gone\n");
        umount2(arg.mountpoint, MNT_DETACH);
    }
    if (WIFSIGNALED(status))
        fprintf(stderr, "mountvol: the server ended by signal %d\n", WTERMSIG(status));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static int block_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC);
}

static int usage(void)
{
    fprintf(stderr, "usage: mountvol DATA_DIR MOUNTPOINT [--format SIZE [--block SIZE]] [--database] [--strict] "
                    "[--key FILE] [--server PATH] [--uid N]\n");
    return 2;
}

static int parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"format", required_argument, NULL, 'f'}, {"block", required_argument, NULL, 'b'},
        {"database", no_argument, NULL, 'd'},     {"strict", no_argument, NULL, 's'},
        {"key", required_argument, NULL, 'k'},    {"server", required_argument, NULL, 'p'},
        {"uid", required_argument, NULL, 'u'},    {NULL, 0, NULL, 0}};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if ((c == 'f' && size_parse(optarg, &arg.format)) || (c == 'b' && size_parse(optarg, &arg.block)))
            return -EINVAL;
        if (c == 'd')
            arg.database = true;
        else if (c == 's')
            arg.strict = true;
        else if (c == 'k')
            arg.key_file = optarg;
        else if (c == 'p')
            arg.server = optarg;
        else if (c == 'u')
            arg.uid = (uid_t)strtoul(optarg, NULL, 10);
        else if (c == '?')
            return -EINVAL;
    }
    if (argc - optind != 2)
        return -EINVAL;
    arg.dir = argv[optind];
    arg.mountpoint = argv[optind + 1];
    if (!arg.key_file)
        arg.key_file = in_dir("key");
    return 0;
}

/* BUILD/tests/fs/mountvol finds BUILD/coffer-fs. */
static char *beside(void)
{
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);

    for (int up = 0; up < 3 && n > 0; up++) {
        while (n > 0 && exe[--n] != '/')
            ;
    }
    return xasprintf("%.*s/coffer-fs", (int)MAX(n, 0), exe);
}

int main(int argc, char **argv)
{
    int signals, log_fd, rc;

    log_program = "mountvol";
    if (parse(argc, argv) < 0)
        return usage();
    rc = secmem_init();
    if (rc < 0)
        die("sodium: %s", strerror(-rc));
    if (!arg.server)
        arg.server = beside();
    if (arg.format)
        format();
    else
        load_key();
    new_grant();
    signals = block_signals();
    log_fd = open_log();
    mount_fuse();
    start_server(log_fd);
    return serve(signals);
}
