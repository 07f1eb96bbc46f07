/*
 * server_internal.h - what server.c (connections, control requests) and authorise.c (decisions) share.
 *
 *   a request of coffer-fs:  server.c reads it - authorise_request - [parked: broker, facts child] - decide - answer
 *
 * All of it runs in the one thread of the event loop; nothing here blocks but the keystore's own work (Argon2, fsync).
 */
#ifndef COFFER_KEYSTORE_SERVER_INTERNAL_H
#define COFFER_KEYSTORE_SERVER_INTERNAL_H

#include "coffer/agent.h"
#include "fs/base/base.h"
#include "fs/base/msg.h"
#include "fs/base/secmem.h"
#include "keystore/attest.h"
#include "keystore/audit.h"
#include "keystore/facts.h"
#include "keystore/flood.h"
#include "keystore/grants.h"
#include "keystore/keystore.h"
#include "keystore/policy.h"
#include "keystore/seen.h"
#include "keystore/server.h"

#include <poll.h>

#define SERVER_CONNS_MAX       1024
#define SERVER_PENDING_MAX     512 /* parked requests, and ... */
#define SERVER_PENDING_CHANNEL 128 /* ... of one volume channel */
#define SERVER_ASKS_MAX        32  /* questions that the broker is answering at one time */

enum conn_kind { CONN_CONTROL = 1, CONN_BROKER = 2, CONN_VOLUME = 4 };

struct conn {
    struct conn *next;
    uint64_t id;
    int fd;
    enum conn_kind kind;
    bool dead; /* freed by the loop */
    /* CONN_VOLUME */
    char volume[AGENT_NAME_MAX];
    uint32_t purpose;
    uint64_t mount_id;
    bool key_given;  /* FORMAT, CHECK: the one key is out */
    bool lock_sent;  /* AGENT_FS_LOCKED is awaited */
    bool lock_again; /* and what ended since then is to be locked out, too: coffer-fs may have stayed open for it */
    bool locked;     /* said AGENT_FS_LOCKED, and asked for nothing since */
    bool has_id;     /* volume_id is known: the keystore was unlocked since it was bound */
    uint8_t volume_id[VOLUME_ID_BYTES];
    struct volume_seen pending; /* a checkpoint that could not be remembered yet; generation 0: none */
};

/* The engine's Mount of a volume. It stays after its end for as long as the process lives: that process still gets the
 * placeholder, whichever cgroup it shares with whom. */
struct window {
    struct window *next;
    char volume[AGENT_NAME_MAX];
    pid_t tgid;
    int pidfd;
    uint64_t ref;
    bool open;
};

struct secret_read;
struct lock_wait;
struct pending;

struct server {
    int listen_fd, dir_fd, signal_fd, inotify_fd, helper_fd;
    char driver[64];
    struct keystore *keystore;
    struct audit *audit;
    struct attest_mounts *mounts;
    struct seen *seen;
    struct grants *grants;
    struct flood *flood;
    struct conn *conns;
    struct window *windows;
    struct pending *pending;
    struct secret_read *secrets;
    struct lock_wait *lock_waits;
    uint64_t agent;        /* random: this process */
    bool locked;           /* it was ordered to lock, not only not unlocked yet */
    uint64_t next_id;      /* of connections and of questions to the broker */
    int64_t next_check_ns; /* of the grants' cgroups, by clock */
    int64_t stopping_ns;   /* not 0: SIGTERM came; when to end at the latest */
};

/* --- server.c --- */

struct conn *server_conn(struct server *s, uint64_t id);
/* Sends; a peer that is gone or does not take its packets is hung up on. */
void server_send(struct conn *c, uint16_t type, uint64_t id, const void *body, uint32_t len, const int *fds, int nfds);
void server_reply(struct conn *c, uint64_t id, int err, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
/* An audit record of something that no caller did. 0 or -errno (logged). */
int server_audit(struct server *s, const char *event, const char *volume, const char *text);
/* Reports and frees the grants that have ended, and locks the volumes that have none left. */
void server_end_grants(struct server *s);

/* --- authorise.c --- */

/* Answers an AGENT_FS_AUTH, now or when the engine has been asked. */
void authorise_request(struct server *s, struct conn *c, uint64_t id, const struct agent_auth *auth);
/* Answers an AGENT_FS_RENEW in the same way. */
void authorise_renew(struct server *s, struct conn *c, uint64_t id, const struct agent_renew *q);
void authorise_why(struct server *s, struct conn *c, uint64_t id, const struct agent_why *why);
/* Decides anew upon all live grants of a volume whose rules have changed. */
void authorise_again(struct server *s, const char *volume);
/* Whether the label keys of the volume's rules and of one more are few enough to be asked for. */
bool authorise_labels_fit(struct server *s, const char *volume, const char *rule);
/* The broker's answer; *fd (or -1) is set to -1 when it was taken. */
void authorise_facts(struct server *s, uint64_t id, const struct agent_facts *facts, int *fd);
/* Another broker has taken over: what the old one was being asked goes to it. */
void authorise_ask_anew(struct server *s);
/* The broker is gone, the keystore was locked: what is parked is refused. */
void authorise_refuse_all(struct server *s, const char *why);
/* Forgets what a connection that is gone has asked. */
void authorise_drop(struct server *s, uint64_t conn_id);
/* Adds the descriptors to be polled; returns their number (at most max). */
int authorise_poll(struct server *s, struct pollfd *p, int max);
/* Goes on with what poll has seen and what time has run out for. */
void authorise_step(struct server *s, const struct pollfd *p, int n);
/* When authorise_step must be called at the latest, monotonic ns; INT64_MAX: no need. */
int64_t authorise_deadline(const struct server *s);
/* The sums of refusals that were counted: those whose time has come, or all. */
void authorise_audit_floods(struct server *s, bool all);
/* The audit record of a grant's end. */
void authorise_audit_end(struct server *s, const struct grant *g);

#endif
