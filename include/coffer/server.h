/*
 * server.h - between cofferd and the coffer-fs processes it starts, over msg.h packets on a socketpair (the control
 * channel), and how coffer-fs is started:
 *
 *   coffer-fs serve|format|check NAME
 *
 * with the descriptors below at fixed numbers, everything else closed, as its own user without any capability and with
 * no_new_privs; stderr goes to the log. coffer-fs opens no file of its own and then puts on seccomp and Landlock.
 * Exit status: 0 done (unmounted, formatted, checked clean), 1 failed (a line on stderr and SERVER_FAILED says why),
 * 2 usage, 3 check found damage.
 */
#ifndef COFFER_SERVER_H
#define COFFER_SERVER_H

#include "agent.h"

enum server_fd {
    SERVER_FD_CONTROL = 3, /* this protocol */
    SERVER_FD_AGENT = 4,   /* the volume channel (agent.h) */
    SERVER_FD_DATA = 5,    /* the backing files, open read-write */
    SERVER_FD_LOG = 6,
    SERVER_FD_FUSE = 7,    /* /dev/fuse, mounted by cofferd; only for serve */
    SERVER_FD_DIRECT = 8,  /* `data` again, O_DIRECT; only for serve, and only where its filesystem can */
};

enum server_type {
    SERVER_READY = 1, /* coffer-fs -> cofferd: FUSE_INIT is answered, requests are served. No body */
    SERVER_FAILED,    /* coffer-fs -> cofferd: struct agent_reply; it exits then */
    SERVER_DAMAGE,    /* coffer-fs -> cofferd: struct agent_reply; goes to the audit log */
    SERVER_LINE,      /* coffer-fs -> cofferd: struct agent_reply, text is one finding of a check */
    SERVER_STOP,      /* cofferd -> coffer-fs: the mount is gone or going: flush, wipe, exit. No body */
    SERVER_CHECK,     /* cofferd -> coffer-fs: check the mounted volume; SERVER_LINEs, then SERVER_REPLY (err: number of
                         findings or -errno; -ENOKEY: it is locked) with the request's id */
    SERVER_STAT,      /* cofferd -> coffer-fs; answered by SERVER_STAT with struct server_stat */
    SERVER_AGENT,     /* cofferd -> coffer-fs: fds: [a new volume channel]; the old one is dead. No body */
    SERVER_REPLY,     /* struct agent_reply */
};

struct server_stat {
    uint8_t unlocked;
    uint8_t reserved[7];
    struct volume_stat stat; /* zeroes while locked */
};

#endif
