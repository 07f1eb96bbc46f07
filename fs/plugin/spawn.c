/*
 * spawn.c - see spawn.h.
 *
 * Invariants:
 *  1. Between fork and exec the child makes only system calls: other threads may have held any lock at the fork.
 *  2. The child's descriptors are 0 and 1 (/dev/null), 2 (ours), and those it is given; nothing else. It waits for us only
 *     once that is so: two children that held the write ends of each other's pipes would wait for ever, with our locks.
 *  3. The program is opened by cofferd, so that the child's user needs no way to its path.
 */
#include "spawn.h"

#include <dirent.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define FIRST_FD 3

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd >= 0) {
        (void)!write(fd, text, strlen(text));
        close(fd);
    }
}

/*
 * Moves the descriptors to their numbers; by way of high ones, so that none is overwritten before it is moved. exe and gate
 * come after them, until the exec.
 */
static int child_fds(const struct spawn *s, int exe, int gate, int devnull)
{
    int high[SPAWN_FDS_MAX + 2], last = FIRST_FD + s->nfds + 1;

    for (int i = 0; i < s->nfds + 2; i++) {
        high[i] = fcntl(i < s->nfds ? s->fds[i] : i == s->nfds ? exe : gate, F_DUPFD, 64);
        if (high[i] < 0)
            return -1;
    }
    if (dup2(devnull, 0) < 0 || dup2(devnull, 1) < 0)
        return -1;
    for (int i = 0; i < s->nfds + 2; i++) {
        if (dup2(high[i], FIRST_FD + i) < 0)
            return -1;
    }
    if (syscall(SYS_close_range, last + 1, ~0U, 0) < 0 || fcntl(last, F_SETFD, FD_CLOEXEC) < 0)
        return -1;
    return fcntl(last - 1, F_SETFD, FD_CLOEXEC) < 0 ? -1 : last - 1;
}

static void child(const struct spawn *s, int exe, int gate, int devnull) __attribute__((noreturn));
static void child(const struct spawn *s, int exe, int gate, int devnull)
{
    char known;
    static char *const env[] = {NULL};
    struct sigaction dfl = {.sa_handler = SIG_DFL};
    sigset_t none;

    /* Its own session: a terminal's ^C is for us, and our end is not its end. */
    setsid();
    for (int sig = 1; sig < NSIG; sig++)
        sigaction(sig, &dfl, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(077);
    if (chdir("/") < 0)
        _exit(126);
    exe = child_fds(s, exe, gate, devnull);
    /* Nothing comes from a parent that has died. */
    if (exe < 0 || read(exe + 1, &known, 1) != 1)
        _exit(126);
    if (s->io_flusher) {
        prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        write_file("/proc/self/oom_score_adj", "-1000");
    }
    /* Raw calls: glibc's wrappers would signal threads that the child does not have. */
    if (syscall(SYS_setgroups, 0, NULL) < 0 || syscall(SYS_setresgid, s->gid, s->gid, s->gid) < 0 ||
        syscall(SYS_setresuid, s->uid, s->uid, s->uid) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        _exit(126);
    syscall(SYS_execveat, exe, "", s->argv, env, AT_EMPTY_PATH);
    _exit(127);
}

int spawn_start(const struct spawn *s, struct process *ret_process, int *ret_pidfd)
{
    int exe = -1, devnull = -1, pidfd = -1, gate[2] = {-1, -1}, rc = 0;
    struct process p;
    pid_t pid;

    exe = openat(plugin_config.programs_fd, s->program, O_PATH | O_CLOEXEC);
    if (exe < 0) {
        rc = -errno;
        goto out;
    }
    devnull = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (devnull < 0 || pipe2(gate, O_CLOEXEC) < 0) {
        rc = -errno;
        goto out;
    }
    pid = fork();
    if (pid < 0) {
        rc = -errno;
        goto out;
    }
    if (pid == 0)
        child(s, exe, gate[0], devnull);
    /* The child is a zombie at worst until we reap it, so its number is its own. */
    pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0 || process_identify(pid, &p) < 0) {
        rc = pidfd < 0 ? -errno : -ESRCH;
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        close_quiet(pidfd);
        goto out;
    }
    if (s->known)
        s->known(s->ctx, &p);
    (void)!write(gate[1], "", 1);
    *ret_process = p;
    *ret_pidfd = pidfd;
out:
    close_quiet(exe);
    close_quiet(devnull);
    close_quiet(gate[0]);
    close_quiet(gate[1]);
    return rc;
}

int spawn_reap(int pidfd)
{
    siginfo_t info = {0};
    int r;

    do
        r = waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED);
    while (r < 0 && errno == EINTR);
    if (r < 0)
        return -errno;
    return info.si_code == CLD_EXITED ? info.si_status : 128 + info.si_status;
}

int spawn_wait_end(int pidfd, int ms)
{
    int64_t end = mono_ns() + (int64_t)ms * 1000000;
    struct pollfd p = {.fd = pidfd, .events = POLLIN};

    for (;;) {
        int left = ms < 0 ? -1 : (int)MAX((end - mono_ns()) / 1000000, 0);
        int r = poll(&p, 1, left);

        if (r > 0)
            return 0;
        if (r == 0)
            return -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

int spawn_fetch_fd(int pidfd, int fd)
{
    int got = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);

    return got < 0 ? -errno : got;
}

/* A small file of a thread. False: it cannot be read. */
static bool read_task(pid_t pid, const char *tid, const char *name, char *buf, size_t n)
{
    char path[96];
    ssize_t got;
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/task/%.16s/%s", (int)pid, tid, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    got = fd < 0 ? -1 : read_upto(fd, buf, n - 1);
    close_quiet(fd);
    buf[MAX(got, 0)] = 0;
    return got > 0;
}

#define PF_EXITING 0x4 /* linux/sched.h: it is past its last system call */

static bool task_only_writes(pid_t pid, const char *tid, int fd)
{
    unsigned long flags, pending, at;
    char buf[2048], state, *s;
    long call;

    if (!read_task(pid, tid, "stat", buf, sizeof(buf)) || !(s = strrchr(buf, ')')) ||
        sscanf(s, ") %c %*d %*d %*d %*d %*d %lu", &state, &flags) != 2)
        return false;
    if (state == 'Z' || state == 'X' || (flags & PF_EXITING))
        return true;
    if (!read_task(pid, tid, "status", buf, sizeof(buf)) || !(s = strstr(buf, "\nSigPnd:")) ||
        sscanf(s, "\nSigPnd: %lx", &pending) != 1 || !(pending & 1ul << (SIGKILL - 1)))
        return false;
    return read_task(pid, tid, "syscall", buf, sizeof(buf)) && sscanf(buf, "%ld 0x%lx", &call, &at) == 2 &&
           (call == SYS_write || call == SYS_writev) && at == (unsigned long)fd;
}

bool spawn_only_writes(const struct process *p, int fd)
{
    struct dirent *d;
    bool only = true;
    char path[64];
    DIR *list;

    if (p->pid == 0 || process_alive(p))
        return false;
    snprintf(path, sizeof(path), "/proc/%d/task", (int)p->pid);
    list = opendir(path);
    if (!list)
        return false;
    while (only && (d = readdir(list)))
        only = d->d_name[0] == '.' || task_only_writes(p->pid, d->d_name, fd);
    closedir(list);
    return only;
}

void spawn_signal(int pidfd, int sig)
{
    syscall(SYS_pidfd_send_signal, pidfd, sig, NULL, 0);
}
