/*
 * mount.h - the parts of coffer-fs, the FUSE server of one volume.
 *
 *   coffer-fs.c  main: arguments, descriptors, the control thread
 *   care.c       check, repair, scrub, resize, export, import, format
 *   channel.c    the two sockets: agent (verdicts, orders) and control (cofferd)
 *   auth.c       verdicts: who may, remembered per thread; grants and the handles opened under them
 *   life.c       the state of the volume: locked, opening, open, locking
 *   inodes.c     which inodes the kernel knows, which are open
 *   page.c       what is left to the next server of the mount
 *   loop.c       reading requests from the device
 *   adapter.c    the FUSE operations, with adapter_attr.c and adapter_file.c
 *   acl.c        POSIX ACLs, for the adapter
 *   sandbox.c    seccomp, Landlock
 *
 * Order of locks: engine_lock (life.c), state_lock (life.c), the locks of inodes.c, auth.c and channel.c. Nothing of
 * another module is called with a module's own lock held, except that life.c calls inodes.c under engine_lock and looks
 * for grants under state_lock, and channel.c makes grants in auth.c under its own lock.
 */
#ifndef COFFER_MOUNT_H
#define COFFER_MOUNT_H

#include "coffer/server.h"
#include "fs/base/base.h"
#include "fs/base/secmem.h"

#include <fuse3/fuse_lowlevel.h>

#define MOUNT_IO_MAX    (1u << 20) /* bytes of one READ or WRITE */
#define MOUNT_WAIT_MS   AGENT_TIMEOUT_MS
#define MOUNT_PATIENCE  1000000000LL /* ns that a request goes on waiting although a signal has come */
#define MOUNT_TIMEOUT_S 1e9 /* "without end": one server has the volume, so nothing changes behind the kernel's back */

struct mount_config {
    const char *name;     /* of the volume, or VOLUME@SNAPSHOT */
    const char *snapshot; /* this snapshot is served, read-only; NULL: the volume itself */
    bool database;        /* write-through */
    bool strict;          /* attributes are asked for at every use */
    bool page;            /* so is SERVER_FD_PAGE */
    bool takeover;        /* another server of this mount ended: init is what it had agreed on with the kernel */
    struct server_init init;
    int patience_ms; /* with takeover: how long to wait for a keystore that is locked */
    uint64_t mount_id;
};
extern struct mount_config mount_config;

/* --- auth.c --- */

/*
 * A grant as long as something refers to it: a remembered verdict, a request at work, a handle. Its handle number (fh)
 * is the agent's number of the grant, which is random: a new agent's grants are others.
 */
struct grant;

/* A verdict in use. kind ALLOW comes with a reference on its grant, for auth_put(). */
struct auth {
    uint32_t kind; /* enum agent_verdict_kind */
    bool read_only;
    struct grant *grant; /* or NULL */
};

/* A remembered verdict for the thread as this user, when it is still alive and (write) not read-only. */
bool auth_cached(pid_t tid, uid_t uid, bool write, struct auth *ret);
/* Remembers it while the thread of pidfd (taken) lives. */
void auth_remember(pid_t tid, uid_t uid, const struct auth *a, int pidfd_take);
/* Drops the reference; *a is empty then. */
void auth_put(struct auth *a);
/* False once the grant has ended. */
bool auth_live(const struct auth *a);
/* A reference on the grant; called by channel.c in the order of the agent's messages. NULL for number 0. */
struct grant *auth_grant_ref(uint64_t epoch, uint64_t number);
void auth_grant_unref(struct grant *g);
/* A live grant of before this server: handles that it does not know were opened under it. */
void auth_grant_resumed(uint64_t epoch, uint64_t number);

/* Handles: fh of a new one (0: the grant has ended meanwhile), whether it may still be used, and its end. */
uint64_t auth_handle_open(const struct auth *a);
int auth_handle_check(uint64_t fh); /* 0 or -EKEYREVOKED */
void auth_handle_close(uint64_t fh);

/* The agent's orders. */
void auth_end_grant(uint64_t number);
void auth_end_all(void);
/* No grant holds here any more; the agent has not ended them: who was given one stands in the page for the next server. */
void auth_stop(void);
/* Does anything refer to a grant that has not ended? */
bool auth_any_live(void);
/* Another agent's channel is used from now on: verdicts of older ones are not used any more. */
void auth_new_agent(uint64_t epoch);
/* It is that process, and the keystore is open: grants of others are lost to it. */
void auth_agent_is(uint64_t agent);
/*
 * The next thread that was given a grant that the agent does not know; all: also one that nothing here refers to. Begin with
 * *at 0. False: there is no more.
 */
bool auth_next_lost(bool all, unsigned *at, struct agent_renew *ret);
/* The agent's answer about it: it knows the grant now, or the thread is no use. */
void auth_found(const struct agent_renew *q, bool found);

/* --- channel.c --- */

/*
 * Shall the request, which waits since `since` (mono_ns) for the agent or for the volume, end with -EINTR? A program with
 * a timer does not expect that of mkdir(2), so not while the wait is a short one. req NULL: what waits is
 * no request.
 */
static inline bool mount_interrupted(fuse_req_t req, int64_t since)
{
    return req && mono_ns() - since > MOUNT_PATIENCE && fuse_req_interrupted(req);
}

/* What comes with a key. */
struct channel_volume {
    struct volume_params params;
    struct volume_seen seen;
    bool accept_rollback;
};

/* Sends what stands in struct agent_auth's fields and waits for the verdict: until 10 s are over, or the request is
 * interrupted (req may be NULL). flags: enum agent_auth_flags. With AGENT_AUTH_WANT_KEY and a verdict that carries one,
 * *ret_key is the caller's. ret_volume may be NULL. 0 with *ret filled; -EACCES, -ENOKEY, -EINTR. */
int channel_ask(fuse_req_t req, const struct agent_auth *ask, struct auth *ret, struct key **ret_key,
                struct channel_volume *ret_volume);
/* Asks for a grant of before for one of its threads; ret as above. */
int channel_ask_again(const struct agent_renew *q, struct auth *ret);
/* Asks for the key on the operator's word, by a channel of its own (purpose CHECK) that stays the caller's: until that is
 * closed the agent waits with locking. 0, and *ret_key is the caller's; -EACCES, -ENOKEY, -ETIMEDOUT, -ECONNRESET. */
int channel_ask_once(int fd, struct key **ret_key, struct channel_volume *ret_volume);
/* How often the agent has ordered to lock. */
unsigned channel_lock_orders(void);
/* Is the keystore open? */
bool channel_unlocked(void);
/* Waits until the agent says that the keystore is open, or orders to lock. False: neither in that time. */
bool channel_wait_word(int ms);
/* volume_options.on_checkpoint: tells the agent and waits until it remembers, at most 10 s; not at all where none is there:
 * the next one is told when it comes. */
void channel_seen(void *ctx, const struct volume_seen *now);
/* Starts the thread that reads the agent's channel (SERVER_FD_AGENT). on_lock is called for AGENT_FS_LOCK, on_unlocked for
 * AGENT_FS_UNLOCKED. */
int channel_start(void (*on_lock)(void), void (*on_unlocked)(void));
/* Replaces the channel (fd taken): SERVER_AGENT. */
void channel_renew(int fd_take);
/* AGENT_FS_LOCKED. */
void channel_locked(void);

void control_send(uint16_t type, uint64_t id, int err, const char *text); /* a message with struct agent_reply */
void control_ready(const struct server_init *init);                       /* NULL: nobody can take over */
void control_progress(uint64_t id, uint64_t done, uint64_t total);
void control_stat(uint64_t id, const struct server_stat *stat);
/* For struct volume_options: logs and reports. */
void control_damage(void *ctx, const char *what);
/* Logs, SERVER_FAILED. */
void control_failed(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* --- life.c --- */

enum life_flags {
    LIFE_WRITE = 1 << 0, /* the request changes something */
    LIFE_PROBE = 1 << 1, /* a stat of the root */
};

/*
 * Enters the engine on behalf of the request's caller: asks who it is, opens the volume if need be, waits while it is
 * opened or closed, at most 10 s. 0 with *ret_volume, and *ret for auth_put(): then life_leave() must follow, even where
 * the verdict is AGENT_PLACEHOLDER (then *ret_volume is NULL). Or -EACCES, -EROFS, -ENOKEY, -EINTR, -EIO.
 */
int life_enter(fuse_req_t req, uint32_t opcode, unsigned flags, struct auth *ret, struct volume **ret_volume);
/* Enters by a handle's grant: 0 or -EKEYREVOKED. */
int life_enter_handle(uint64_t fh, struct volume **ret_volume);
/* Enters for what the kernel does by itself, also while locking: 0 or -EIO. */
int life_enter_kernel(struct volume **ret_volume);
/* Enters whatever the state is; *ret_volume is NULL where it is not open. */
void life_enter_any(struct volume **ret_volume);
void life_leave(void);
/* The volume is open and nothing stands in the way of requests. */
bool life_is_open(void);
/* Opens it for the operator, who has no grant, unless it is open: channel_ask_once(). Then server_close_unused() must follow.
 * 0, or -ENOKEY, -ECANCELED (it was locked meanwhile), -EACCES, -EIO, ... */
int life_open(int agent_fd);

/* Flushes, invalidates and wipes, after all grants have ended. Where the agent has let somebody in since, the volume stays
 * open instead. One that is not open is left as it is, but what the kernel still has of when it was goes. notify false: the
 * mount is gone. Never from a thread that serves requests. 0, or the error of volume_close. */
int life_lock(struct fuse_session *se, bool notify);
/* Opens the volume on the strength of the grants that live on from the mount's last server, if there are any; waits while
 * the keystore is locked. */
void life_resume(void);
/* It was open in the last server and is not in this one: nobody has locked it. */
bool life_left_open(void);
/* Has the agent take up grants that another one gave (auth_next_lost). */
void life_renew(bool all);
/* Checkpoints, while requests go on: closing takes less time then. */
void life_checkpoint(void);
/* Ends all grants; nothing is opened from now on. */
void life_stop(void);

/* --- coffer-fs.c --- */

/* Closes the volume if no grant lives; waits until that is done. */
void server_close_unused(void);

/* --- inodes.c: the kernel's references, each also one in the engine while a volume is open --- */

/* Reads what the mount's last server has left, if there was one. After page_begin. */
void inodes_begin(void);
/* The kernel may have content of any inode, also of those that are not listed. */
bool inodes_unknown(void);
void inodes_ref(uint64_t ino);
/* Returns how many of n references there were. */
uint64_t inodes_forget(uint64_t ino, uint64_t n);
/* It has pages in the kernel's cache from now on; write: one handle more that may write. */
void inodes_opened(uint64_t ino, bool write);
void inodes_closed(uint64_t ino, bool write);
/* Content of it goes to the kernel without a handle (a symbolic link's). */
void inodes_cached(uint64_t ino);
/* The kernel has written content at ns, and may still have to send the times that belong to it; ns 0: it has sent them. */
void inodes_set_due(uint64_t ino, int64_t ns);
struct inode_due {
    uint64_t ino;
    int64_t ns;
};
/* All that are due (free it), which are not any more then. */
size_t inodes_take_due(struct inode_due **ret);
/* Is there a handle that may write? */
bool inodes_written(uint64_t ino);
enum inodes_which { INODES_WRITTEN, INODES_OPENED, INODES_ALL };
/* A list of inodes (free it): open for writing, ever opened, all. *ret_refs (or NULL) gets their references. */
size_t inodes_list(enum inodes_which which, uint64_t **ret_ino, uint64_t **ret_refs);

/* --- page.c --- */

extern struct server_page *mount_page; /* NULL: there is none */
/* Maps it. The last server must have ended. */
void page_begin(void);
/* Was the volume open when the last server ended (or is that not known)? */
bool page_was_open(void);
void page_set_open(bool open);

/* --- loop.c --- */

struct fuse_session *loop_session(void);
/* Answers FUSE_INIT; *ret_init is what was agreed on, or NULL where the kernel cannot send requests again. */
int loop_init(struct fuse_session *se, const struct server_init **ret_init);
/* Has the kernel send again what the mount's last server had not answered. */
int loop_resend(void);
/* Starts the threads on SERVER_FD_FUSE. on_end is called once, when the mount is gone. */
int loop_start(void (*on_end)(void));
/* Do they run? */
bool loop_serves(void);
/* Nothing more is read; waits until what was read is answered, at most ms. 0, -ETIMEDOUT: something is still at work. */
int loop_stop(int ms);

/* What a thread's request is, beyond what libfuse tells an operation. */
struct loop_request {
    uint8_t *out;      /* MOUNT_IO_MAX bytes for the answer, page-aligned; the request's own bytes are elsewhere */
    uint32_t opcode;   /* the kernel's */
    bool kill_suidgid; /* WRITE, SETATTR, OPEN: the change of content ends set-id bits */
    bool tmpfile;      /* CREATE is really TMPFILE */
    bool resent;       /* a server that died may have done it */
};
struct loop_request *loop_request(void);
/* Has the kernel left it to us to end set-id bits (FUSE_HANDLE_KILLPRIV_V2)? */
bool loop_kills_suidgid(void);

/* --- adapter.c --- */

extern const struct fuse_lowlevel_ops adapter_ops;
/* No thread of the adapter's notifies the kernel any more, and what would need it is left unanswered: for the next server.
 * Waits ms at most. 0 or -ETIMEDOUT. */
int adapter_quiesce(int ms);
/* May a request be served at once, without waiting for the agent or the volume: one by a thread tid of uid, or
 * decided before? */
bool adapter_ready(pid_t tid, uid_t uid, bool by_handle);

/* --- sandbox.c --- */

/* Gives up what coffer-fs does not need, for all threads to come. 0 or -errno (a line is logged). */
int sandbox_enter(void);

/* --- care.c --- */

struct care_args {
    bool data;
    uint64_t size;                /* bytes, or 0 */
    const char *snapshot, *since; /* names, or NULL */
};

/* A task of cofferd's on the mounted volume, in a thread of its own, which answers. Takes the descriptors. */
void care_task(uint64_t id, const struct server_task *task, const int *fds_take, int nfds);
/* SERVER_TASK_STOP. */
void care_stop(uint64_t id);
/* Fills in what is said of the scrub. */
void care_stat(struct server_stat *st);
/* Does the verb to its end. The exit status, or -EINVAL: unknown verb. */
int care_run(const char *verb, const struct care_args *args);

#endif
