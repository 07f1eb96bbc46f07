/*
 * agent.h - the key agent's protocol (coffer-keyd), over msg.h packets on one host.
 *
 * Three kinds of connection:
 *   control  cofferd -> keyd, on the listening socket <run>/keyd.sock (mode 0600 root; peers other than uid 0 are hung
 *            up on). cofferd passes on what the operator and the engine ask for. One request, one reply with the same id.
 *   broker   a control connection on which cofferd said AGENT_BROKER: from then on keyd asks and cofferd answers.
 *   volume   coffer-fs -> keyd, one end of a socketpair that cofferd gave keyd with AGENT_BIND: bound to one volume and
 *            one purpose for ever. The only channel on which a key leaves.
 *
 * Bodies are the fixed structs below, exactly; a packet of another length, an unknown type, a text field without its
 * NUL or a nonzero reserved field ends the connection. Secrets that people type (passphrases, key files) and the recovery
 * key travel only through pipes passed as descriptors, never in a body that cofferd sees. Texts are one line of UTF-8.
 */
#ifndef COFFER_AGENT_H
#define COFFER_AGENT_H

#include "volume.h"

#include <stdint.h>

#define AGENT_TEXT_MAX   512
#define AGENT_NAME_MAX   (128 + 1)
#define AGENT_RULE_MAX   512   /* one rule's text with its NUL */
#define AGENT_RULES_MAX  32    /* per volume */
#define AGENT_SECRET_MAX 4096  /* a passphrase, or a key file's bytes */
#define AGENT_TIMEOUT_MS 10000 /* nobody waits longer on the agent, nor the agent on the broker */

enum agent_type {
    /* control; every request is answered by AGENT_REPLY unless another type is named */
    AGENT_REPLY = 1,
    AGENT_STATUS,       /* -> AGENT_STATUS with struct agent_status */
    AGENT_INIT,         /* struct agent_slot; fds: [secret in, recovery out]. Makes the keystore; leaves it unlocked */
    AGENT_UNLOCK,       /* struct agent_slot; fds: [secret in] */
    AGENT_LOCK,         /* wipes the root key; every volume channel gets AGENT_FS_LOCK and is waited for (10 s) */
    AGENT_VOLUME_ADD,   /* struct agent_volume (id ignored) -> AGENT_VOLUME_GET's answer with the new id. -EEXIST */
    AGENT_VOLUME_GET,   /* struct agent_name -> AGENT_VOLUME_GET with struct agent_volume, or AGENT_REPLY -ENOENT */
    AGENT_VOLUME_LIST,  /* struct agent_index -> the index-th volume in order of name, as AGENT_VOLUME_GET */
    AGENT_VOLUME_STATE, /* struct agent_volume_state: sets its state */
    AGENT_VOLUME_SIZE,  /* struct agent_volume_size: sets what its record says of its limit (coffer volume resize) */
    AGENT_VOLUME_RM,    /* struct agent_name: destroys the key. -EBUSY while a serving channel is bound */
    AGENT_RULE_ADD,     /* struct agent_rule. -EINVAL with the reason; -EEXIST */
    AGENT_RULE_RM,      /* struct agent_rule. -ENOENT */
    AGENT_RULE_GET, /* struct agent_index with name -> AGENT_RULE_GET with struct agent_rule; -ENOENT past the end */
    AGENT_BIND,     /* struct agent_bind; fds: [keyd's end of the socketpair] */
    AGENT_ENGINE,   /* struct agent_engine; fds: [pidfd of the engine's process], none for AGENT_ENGINE_END */
    AGENT_WHY,      /* struct agent_why -> AGENT_REPLY, err 0 allowed or -EACCES, text explains */
    AGENT_NOTE,     /* struct agent_note: an audit record by cofferd (damage, crash, mount, umount) */
    AGENT_BROKER,   /* turns this connection into the broker (the newest wins) */
    /* broker: keyd -> cofferd and the answer */
    AGENT_FACTS, /* struct agent_facts_ask -> AGENT_FACTS with struct agent_facts; fds: [readable JSON] if found */
    /* volume: coffer-fs -> keyd and the answer */
    AGENT_FS_AUTH, /* struct agent_auth -> AGENT_FS_AUTH with struct agent_verdict; fds: [thread pidfd] if cacheable */
    AGENT_FS_LOCKED, /* answers AGENT_FS_LOCK: coffer-fs has flushed and wiped, or serves a younger grant; no body, no reply */
    /* volume: keyd -> coffer-fs, no reply except where said */
    AGENT_FS_GRANT_END, /* struct agent_grant: requests under it are refused from now on (-EKEYREVOKED) */
    AGENT_FS_LOCK, /* flush, invalidate, wipe; then send AGENT_FS_LOCKED. The next authorised request unlocks anew */
    AGENT_ACCEPT_ROLLBACK, /* control: struct agent_name: the volume's next opening accepts an older state */
    AGENT_FS_SEEN,         /* volume: struct volume_seen of a checkpoint that is durable -> AGENT_FS_SEEN with struct
                            agent_seen_done */
    AGENT_FS_GRANT,        /* volume: keyd -> coffer-fs: struct agent_grant, one that lives; comes before the verdict on
                            AGENT_AUTH_RESUME */
    AGENT_FS_UNLOCKED, /* volume (SERVE): keyd -> coffer-fs: struct agent_unlocked: the keystore is open; when the channel
                            is bound, else when it is unlocked */
    AGENT_FS_RENEW, /* volume (SERVE): struct agent_renew -> AGENT_FS_AUTH as if the thread had asked, but its grant has
                            that number (and is a new one, which ends by itself) */
};

struct agent_reply {
    int32_t err;               /* 0 or a negative errno */
    char text[AGENT_TEXT_MAX]; /* "" or one line for the operator */
};

struct agent_name {
    char name[AGENT_NAME_MAX];
};

struct agent_index {
    char name[AGENT_NAME_MAX]; /* the volume, where one is meant, else "" */
    uint32_t index;
};

/* coffer-keyd's exit status: the keystore file is damaged; the audit log is; 1: something else. */
#define KEYD_EXIT_DAMAGED 3
#define KEYD_EXIT_AUDIT   4

/* In the keystore's directory: coffer-keyd holds a POSIX lock of it as long as it lives, so that it is alone and F_GETLK tells
 * who it is. */
#define KEYD_LOCK_FILE "lock"

struct agent_status {
    uint8_t initialised, unlocked, reserved[2];
    uint32_t slots, volumes, channels, grants;
    char driver[64]; /* the engine's name for this volume driver, as cofferd was told */
};

enum agent_slot_kind { AGENT_SLOT_PASSPHRASE = 1, AGENT_SLOT_KEY_FILE = 2, AGENT_SLOT_RECOVERY = 3 };

struct agent_slot {
    uint32_t kind; /* enum agent_slot_kind */
    uint32_t reserved;
};

enum agent_volume_state_kind {
    AGENT_VOLUME_NEW = 0,   /* recorded, not yet formatted */
    AGENT_VOLUME_FRESH = 1, /* formatted, nobody has used it: the engine may fill it */
    AGENT_VOLUME_USED = 2,
};

struct agent_volume {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    uint32_t state; /* enum agent_volume_state_kind */
    int64_t created_ns;
    struct volume_params params;
    uint32_t strict;   /* 0 or 1 */
    uint32_t attached; /* 1: made by a container engine: every container selector implies `attached`, and `attached`
                          alone is allowed when no allow rule is given */
};

struct agent_volume_state {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    uint32_t state;
};

struct agent_volume_size {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[7];
    uint64_t size_limit; /* bytes */
};

struct agent_rule {
    char name[AGENT_NAME_MAX]; /* the volume */
    uint8_t deny;              /* 0 allow, 1 deny */
    uint8_t reserved[2];
    uint32_t index;
    char rule[AGENT_RULE_MAX]; /* DESIGN section 6: comma-separated selectors */
};

enum agent_purpose {
    AGENT_PURPOSE_SERVE = 0,
    AGENT_PURPOSE_FORMAT = 1, /* key released once to this channel, on the operator's word; audited */
    AGENT_PURPOSE_CHECK = 2,
};

struct agent_bind {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    uint32_t purpose;
    uint64_t mount_id; /* random */
};

enum agent_engine_kind { AGENT_ENGINE_BEGIN = 0, AGENT_ENGINE_END = 1 };

/* The engine's Mount (BEGIN) and Unmount (END) of a volume, by its process tgid: between the two that process may fill a
 * FRESH volume, and otherwise gets the placeholder listing. The volume stays FRESH until the first grant of a
 * container or a local user. */
struct agent_engine {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    uint32_t kind;
    int32_t tgid;
    uint32_t pad;
    uint64_t mount_ref; /* pairs END with BEGIN */
};

struct agent_why {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    int32_t pid;
    uint32_t write; /* 1: for writing */
};

struct agent_note {
    char name[AGENT_NAME_MAX];
    uint8_t reserved[3];
    char event[32]; /* "damage", "server-died", "mount", ... */
    char text[AGENT_TEXT_MAX];
};

struct agent_facts_ask {
    char container[65]; /* 64 lower-case hex digits */
    uint8_t reserved[3];
    int32_t tid; /* the caller's thread, in the host's pid namespace */
};

#define AGENT_FACTS_MAX (1u << 20)

enum agent_facts_source { AGENT_FACTS_NONE = 0, AGENT_FACTS_FILE = 1, AGENT_FACTS_API = 2 };

struct agent_facts {
    int32_t err;         /* 0; -ENOENT: no such container; -ETIMEDOUT, ...: the engine cannot be asked: refuse */
    uint32_t source;     /* what the descriptor holds: config.v2.json, or the array of GET /containers/json */
    uint8_t host_pid_ns; /* 1: the caller's pid namespace is cofferd's own */
    uint8_t host_mnt_ns; /* 1: so is its mount namespace. Both 1: foreign to the container, refused */
    uint8_t reserved[2];
    char driver[64]; /* this volume driver's name at the engine, for `attached` */
};

enum agent_auth_flags {
    AGENT_AUTH_WANT_KEY = 1 << 0,    /* the volume is locked: the verdict shall carry the key */
    AGENT_AUTH_PROBE = 1 << 1,       /* a stat of the root: a refusal is normal and not audited */
    AGENT_AUTH_WRITE = 1 << 2,       /* the request changes something */
    AGENT_AUTH_MAINTENANCE = 1 << 3, /* purposes FORMAT and CHECK: no calling process; tid 0 */
    AGENT_AUTH_RESUME =
        1 << 4, /* purpose SERVE, tid 0: the mount's last server died. Each live grant of the volume comes as
                                   AGENT_FS_GRANT, then an ALLOW without one; -EACCES where none lives, -ENOKEY while the
                                   keystore is locked */
};

struct agent_auth {
    int32_t tid;     /* FUSE's in.pid; 0 is denied */
    uint32_t flags;  /* enum agent_auth_flags */
    uint32_t uid;    /* FUSE's in.uid: never decided by */
    uint32_t opcode; /* FUSE opcode, for the audit record */
};

enum agent_verdict_kind {
    AGENT_DENY = 0,
    AGENT_ALLOW = 1,
    AGENT_PLACEHOLDER = 2, /* the engine itself, outside the first fill: the placeholder listing, nothing else */
};

/* AGENT_FS_SEEN's answer. 0: remembered durably; -ENOKEY: kept in memory until the keystore is unlocked; -ESTALE: older
 * than what is remembered, not taken; errors of I/O. */
struct agent_seen_done {
    int32_t err;
    uint32_t reserved;
};

struct agent_verdict {
    int32_t err; /* 0, -EACCES; -ENOKEY: allowed, but the keystore is locked */
    uint32_t kind;
    uint64_t grant; /* names the grant; the file handles opened under it carry it. 0: none */
    uint8_t read_only;
    uint8_t cacheable; /* a thread pidfd comes along: while it is alive this verdict holds for that tid, until
                             AGENT_FS_GRANT_END or AGENT_FS_LOCK */
    uint8_t has_key;
    uint8_t reserved[5];
    uint8_t key[32]; /* with has_key; wiped by both sides after use */
    struct volume_params params;
    uint32_t strict;
    uint32_t accept_rollback; /* with has_key: seen binds nobody, a new branch begins (volume_options.new_branch) */
    struct volume_seen seen;  /* with has_key: what is remembered of the volume */
};

struct agent_grant {
    uint64_t grant;
};

struct agent_unlocked {
    uint64_t agent; /* random, of this coffer-keyd process: grants live as long as it does */
};

/*
 * A grant of an agent that has ended, which handles carry, and a thread that it was given to: that thread is decided upon
 * anew. Whose pidfd has another inode number is another thread (Linux 6.9: before, none can be told from another).
 */
struct agent_renew {
    uint64_t grant; /* not 0, not UINT64_MAX */
    uint64_t pidfd_ino;
    int32_t tid;
    uint32_t write; /* 1: it was not read-only: it shall not be now */
};

#endif
