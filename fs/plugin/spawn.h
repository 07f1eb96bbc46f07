/* spawn.h - starts coffer-keyd and coffer-fs: other user, no privilege to gain, only the descriptors they are meant
 * to have. */
#ifndef COFFER_PLUGIN_SPAWN_H
#define COFFER_PLUGIN_SPAWN_H

#include "common.h"

#define SPAWN_FDS_MAX 10

struct spawn {
    const char *program;     /* beside our own executable */
    const char *const *argv; /* NULL-terminated */
    int fds[SPAWN_FDS_MAX];  /* become 3, 4, ... in the child; stay the caller's */
    int nfds;
    uid_t uid;
    gid_t gid;
    bool io_flusher; /* serves writeback: PR_SET_IO_FLUSHER and oom_score_adj -1000, best effort */
    /* Called with the process before it runs the program: one whose starter died before this returned ends without. Or NULL. */
    void (*known)(void *ctx, const struct process *p);
    void *ctx;
};

/* Starts it. 0 with the process and a pidfd of it (the caller's), or -errno. The child must be reaped through the pidfd
 * with spawn_reap(). */
int spawn_start(const struct spawn *s, struct process *ret_process, int *ret_pidfd);
/* Waits for a child that has ended. Returns its exit status, 128 + signal, or -errno (-ECHILD: not ours). */
int spawn_reap(int pidfd);
/* Waits until the process of pidfd has ended, ms < 0: for ever. 0 or -ETIMEDOUT. */
int spawn_wait_end(int pidfd, int ms);
/* A duplicate of the process's descriptor fd, the caller's; -errno (-EPERM without CAP_SYS_PTRACE). Who answers for the
 * process must check what it is. */
int spawn_fetch_fd(int pidfd, int fd);
/*
 * True when the process was killed and does not end, but will never do anything any more: its first thread has ended, and each
 * other one has, or is ending, or is in a write to its descriptor fd, with a SIGKILL that it takes before it returns from there.
 */
bool spawn_only_writes(const struct process *p, int fd);
/* Sends a signal. */
void spawn_signal(int pidfd, int sig);

#endif
