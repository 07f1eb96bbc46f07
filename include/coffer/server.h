/*
 * server.h - between cofferd and the coffer-fs processes it starts, over msg.h packets on a socketpair (the control
 * channel), and how coffer-fs is started:
 *
 *   coffer-fs serve NAME [--mount-id HEX] [--takeover HEX --patience MS] [--strict] [--profile database]
 *                        [--snapshot NAME]     (then NAME is VOLUME@SNAPSHOT, and nothing is ever written)
 *   coffer-fs format|check|repair|resize|export|import|snapshot-create|snapshot-remove|snapshot-list NAME ...
 *
 * with the descriptors below at fixed numbers, everything else closed, as its own user without any capability and with
 * no_new_privs; stderr goes to the log. coffer-fs opens no file of its own and then puts on seccomp and Landlock.
 * Exit status: 0 done (unmounted, formatted, checked clean), 1 failed (a line on stderr and SERVER_FAILED says why),
 * 2 usage, 3 check or repair found damage, or export could not read all.
 */
#ifndef COFFER_SERVER_H
#define COFFER_SERVER_H

#include "agent.h"

#include <errno.h>

enum server_fd {
    SERVER_FD_CONTROL = 3, /* this protocol */
    SERVER_FD_AGENT = 4,   /* the volume channel (agent.h) */
    SERVER_FD_DATA = 5,    /* the backing files, open read-write; to serve a snapshot, read-only */
    SERVER_FD_LOG = 6,
    SERVER_FD_FUSE = 7,   /* /dev/fuse, mounted by cofferd; only for serve, as what follows */
    SERVER_FD_PAGE = 8,   /* struct server_page */
    SERVER_FD_PEER = 9,   /* cofferd's end of the control channel: not to be used, only kept for the next cofferd */
    SERVER_FD_SECRET = 7, /* for export and import: a pipe with struct export_secret (export.h), one for each stream */
    SERVER_FD_STREAM =
        8, /* for export and import: where the stream goes to, or the streams come from, one after the other, each without its head */
};

enum server_type {
    SERVER_READY =
        1, /* coffer-fs -> cofferd: FUSE_INIT is answered, requests are served. struct server_init, or no body where
                         the kernel cannot send requests again: then no other server can take over */
    SERVER_FAILED,   /* coffer-fs -> cofferd: struct agent_reply; it exits then */
    SERVER_DAMAGE,   /* coffer-fs -> cofferd: struct agent_reply; goes to the audit log */
    SERVER_LINE,     /* coffer-fs -> cofferd: struct agent_reply, text is one finding of a check */
    SERVER_STOP,     /* cofferd -> coffer-fs: the mount is gone or going: flush, wipe, exit. No body */
    SERVER_TASK,     /* cofferd -> coffer-fs: struct server_task on the mounted volume, one at a time (-EBUSY) besides a
                         scrub; fds: as the task says. SERVER_LINEs and SERVER_PROGRESSes, then SERVER_REPLY (err: number of
                         findings or -errno; -ENOKEY: it is locked), all with the request's id */
    SERVER_STAT,     /* cofferd -> coffer-fs; answered by SERVER_STAT with struct server_stat */
    SERVER_AGENT,    /* cofferd -> coffer-fs: fds: [a new volume channel]; the old one is dead. No body */
    SERVER_REPLY,    /* struct agent_reply */
    SERVER_PROGRESS, /* struct server_progress, of a task or of a run to its end */
    SERVER_NOTE,     /* coffer-fs -> cofferd: struct agent_reply; the end of a scrub, for the audit log */
    SERVER_HANDOVER, /* cofferd -> coffer-fs: another server stands ready: checkpoint, read no more requests, finish those that
                        were read, close the volume, exit; the mount goes on. No body */
    SERVER_GO, /* cofferd -> coffer-fs, to one with --takeover: the last server has ended, go on with its mount. The
                        second one is ignored. No body */
    SERVER_TASK_STOP, /* cofferd -> coffer-fs: who asked for the task of that id is gone: it shall end. No body */
};

/*
 * The kernel's FUSE_INIT with the flags that were agreed on, which --takeover tells the next server of the same mount when
 * this one has ended: the kernel sends no other. --mount-id is one number for all servers of a mount. One with --takeover is
 * SERVER_READY as soon as it can go on, and waits for SERVER_GO: so a planned change is begun only when the next server stands.
 * Where the keystore is locked it waits for it, up to --patience, before it has the kernel send its requests again.
 *
 * A cofferd that ends takes nothing along: coffer-fs holds, besides its own, cofferd's end of the control channel, and
 * the next cofferd fetches that, the mount's descriptor and the page with pidfd_getfd(2) from the process that the state
 * file names. What was not read stays in the channel.
 */
struct server_init {
    uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};

/*
 * What a server leaves to the next one of the same mount: a sealed memfd (its size is fixed) that cofferd keeps and does not
 * read. Only one server at a time writes it, and it may die at every instant: inode[] holds at least what it must. Who
 * reads it bounds every number: the last server may have been taken over.
 */
#define SERVER_PAGE_INODES (1u << 20)

struct server_page_head {
    uint32_t version; /* SERVER_PAGE_VERSION; 0: nothing was written yet */
    uint32_t all;     /* not 0: inode[] does not hold all (there was no room, or it is not known) */
    uint32_t inodes;  /* used places of inode[] */
    uint32_t open;    /* not 0: the volume was open */
    uint32_t reserved[1020];
};

/* A thread that was given a grant, in case that the agent ends with the server: struct agent_renew asks for it. */
struct server_witness {
    uint64_t grant; /* 0: none here */
    uint64_t agent; /* that gave it (struct agent_unlocked) */
    uint64_t pidfd_ino;
    int32_t tid;
    uint32_t write;
};
#define SERVER_PAGE_WITNESSES 1024

struct server_page {
    struct server_page_head head;
    struct server_witness witness[SERVER_PAGE_WITNESSES];
    uint64_t inode[SERVER_PAGE_INODES]; /* whose content the kernel may have in its cache */
};
#define SERVER_PAGE_VERSION 1u

enum server_task_kind {
    TASK_CHECK = 1, /* value: 1 reads all content too */
    TASK_SCRUB, /* value: bytes a second; answered when it has begun (-EALREADY: one is running); it goes on by itself */
    TASK_RESIZE, /* value: bytes */
    TASK_EXPORT, /* fds: [secret, stream]; name: of a snapshot, or nothing; since: of an earlier one, or nothing */
    TASK_SNAPSHOT_CREATE, /* name */
    TASK_SNAPSHOT_REMOVE, /* name */
    TASK_SNAPSHOT_LIST,   /* a SERVER_LINE each: "NAME CREATED USED", ns since 1970 and bytes */
};

struct server_task {
    uint32_t kind; /* enum server_task_kind */
    /* 1: one more descriptor comes last, a channel to the agent of purpose CHECK, to open the volume with. 0: -ENOKEY where it
     * is not open. */
    uint32_t agent;
    uint64_t value;
    char name[72], since[72]; /* of snapshots, then NULs; else NULs */
};

/* What went wrong with a snapshot, for one line; NULL: something else. */
static inline const char *server_snapshot_error(int rc)
{
    switch (rc) {
    case -EEXIST:
        return "there is a snapshot of that name: choose another one";
    case -ENOENT:
        return "there is no snapshot of that name: `coffer volume snapshot ls` lists them";
    case -EINVAL:
        return "the snapshot to begin with is not the older one";
    case -EMFILE:
        return "there are 256 snapshots: remove one";
    case -EBUSY:
        return "the snapshot is being read, or the volume is too full: try again";
    case -ENOSPC:
        return "the volume is full: remove something, or an older snapshot";
    default:
        return NULL;
    }
}

struct server_progress {
    uint64_t done, total; /* bytes */
};

struct server_stat {
    uint8_t unlocked;
    uint8_t scrubbing;
    uint8_t reserved[2];
    uint32_t scrub_findings;          /* of the scrub that is running, or the last one of this server */
    uint64_t scrub_done, scrub_total; /* bytes; 0, 0: there was none */
    struct volume_stat stat;          /* zeroes while locked */
};

#endif
