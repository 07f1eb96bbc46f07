/*
 * fsproc.h - one coffer-fs process that serves a volume (coffer/server.h), watched by a thread of its own; and
 * coffer-fs run to its end to format or check one.
 */
#ifndef COFFER_PLUGIN_FSPROC_H
#define COFFER_PLUGIN_FSPROC_H

#include "common.h"
#include "coffer/server.h"

struct fsproc;

/* What its thread tells the owner of a volume; called without any lock held. */
struct fsproc_owner {
    void (*started)(void *ctx,
                    const struct process *process); /* fsproc_start's own thread: it shall take over; it begins
                                                                  when this has returned */
    void (*died)(void *ctx, struct fsproc *p, const char *how); /* while it should have been serving */
    void (*ended)(void *ctx, struct fsproc *p);                 /* after fsproc_stop() */
    void (*tick)(void *ctx, struct fsproc *p);                  /* about every FSPROC_TICK_MS while it serves */
    void (*unlocked)(void *ctx, bool unlocked);                 /* it answered SERVER_STAT */
    void (*free)(void *ctx);                                    /* the thread is done with ctx */
};

#define FSPROC_TICK_MS 5000

/* The descriptors that a new server gets; they stay the caller's. */
struct fsproc_fds {
    int agent, data, log, fuse, page;
    const char *snapshot;      /* of the volume: it is served, read-only; NULL: the volume itself */
    uint64_t agent_generation; /* supervisor_generation() from before `agent` was made */
    uint64_t mount_id;
    int patience_ms;                    /* with takeover: how long it may wait for the keystore */
    const struct server_init *takeover; /* of the mount's last server; NULL: a new mount */
};

/*
 * name: of the volume, or VOLUME@SNAPSHOT. Starts `coffer-fs serve` and waits until it is ready (10 s); one that takes over serves only after fsproc_go(). 0 with a reference in *ret; from then on owner is called,
 * with ctx, until owner->free. After an error (reason in *why) it is dead and ctx is still the caller's.
 */
int fsproc_start(const char *name, bool database, bool strict, const struct fsproc_fds *fds,
                 const struct fsproc_owner *owner, void *ctx, struct fsproc **ret, struct why *why);
/* Watches a server that an earlier cofferd started. Its channel is fetched from it; where that is not allowed there is none.
 * log: of its volume, or -1. 0 or -ESRCH. */
int fsproc_adopt(const char *name, const struct process *process, int log, const struct fsproc_owner *owner, void *ctx,
                 struct fsproc **ret);
struct fsproc *fsproc_ref(struct fsproc *p);
void fsproc_unref(struct fsproc *p);

/* False for one that an earlier cofferd started and that kept no channel: it cannot be asked or told anything. */
bool fsproc_has_channel(const struct fsproc *p);
struct process fsproc_process(const struct fsproc *p);
/* What another server needs to take over the mount. False: it cannot be. */
bool fsproc_init(struct fsproc *p, struct server_init *ret);
/* A duplicate of one of its descriptors (the caller's), as it says: to be checked. -errno. */
int fsproc_fetch(struct fsproc *p, enum server_fd fd);
/* A duplicate of its `log`, the open file that carries the lock; -1: not known, or it has ended. */
int fsproc_log(struct fsproc *p);
/* The mount's last server has ended: p goes on with it. 0 or -errno. */
int fsproc_go(struct fsproc *p);
/* Has it stop for another that stands ready, and waits until it has ended: ms at most, then it is killed. 0, or
 * -ETIMEDOUT: it was killed (its log is whole all the same). */
int fsproc_hand_over(struct fsproc *p, int ms);
/* Kills it, and waits a while until it has ended. */
void fsproc_kill(struct fsproc *p);
/* Is a task under way? */
bool fsproc_busy(struct fsproc *p);
/* The end is expected from now on: it is not `died` any more. */
void fsproc_expect_end(struct fsproc *p);
/* Tells it to flush and exit (SIGTERM where there is no channel). */
void fsproc_stop(struct fsproc *p);
/* Waits until it has ended. 0 or -ETIMEDOUT. */
int fsproc_wait_end(struct fsproc *p, int ms);
/* Asks for its figures and waits at most ms for them. 0, -ETIMEDOUT, or -ENOTCONN without a channel. */
int fsproc_stat(struct fsproc *p, int ms, struct server_stat *ret);
/* Asks for its figures without waiting: the owner's unlocked() hears. At most every half second. */
void fsproc_refresh(struct fsproc *p);
/* Where the findings of what takes long go, and how far it is. */
struct fsproc_sink {
    void (*line)(void *ctx, const char *text);                  /* NULL as well */
    void (*progress)(void *ctx, uint64_t done, uint64_t total); /* bytes; NULL: nobody asks */
    void *ctx;
    bool (*gone)(void *ctx); /* who asked has gone away: it is broken off; NULL: it never is */
};

/* A task on the mounted volume, with the task's descriptors, which stay the caller's. The number of findings, or -errno with
 * the reason. */
int fsproc_task(struct fsproc *p, const struct server_task *task, const int *fds, int nfds,
                const struct fsproc_sink *sink, struct why *why);
/* Hands it a volume channel made with the agent's generation-th process, unless it has one. 0 or -errno. */
int fsproc_renew_agent(struct fsproc *p, const char *name, uint64_t generation);

#define FSPROC_OPTIONS_MAX 4

/*
 * Runs `coffer-fs VERB NAME OPTIONS` (NULL at their end, at most FSPROC_OPTIONS_MAX; NULL: none) to its end; fds become 3 + 1, ...
 * (server.h). Returns 0 or the number of findings (at least 1 when the volume is
 * damaged), or -errno with the reason.
 */
int fsproc_run(const char *verb, const char *name, const char *const *options, const int *fds, int nfds,
               const struct fsproc_sink *sink, struct why *why);

#endif
