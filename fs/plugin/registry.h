/*
 * registry.h - the table of volumes, and the state file <state>/cofferd.json that survives a restart.
 *
 * A mounted snapshot has an entry of its own, with a server of its own, for as long as it is mounted; what is said of
 * volumes below holds for it, too. An entry is reference-counted. Locks, in the order in which they are taken:
 *   volume->op_lock   one operation (create, mount, unmount, remove, check) at a time on a volume; held for long; a
 *                     snapshot's before its volume's
 *   save lock         (inside) one writer of the state file
 *   registry_lock     the table, and the fields marked (R); held for instants only, never across I/O
 */
#ifndef COFFER_PLUGIN_REGISTRY_H
#define COFFER_PLUGIN_REGISTRY_H

#include "common.h"
#include "coffer/server.h"

struct fsproc;

/* One who holds a volume mounted: an engine's mount ID, or a directory of `coffer mount`. */
struct holder {
    char *id;              /* the engine's ID, opaque; or the directory */
    bool local;            /* a directory */
    unsigned count;        /* Mounts less Unmounts of this ID */
    struct process engine; /* who made them; pid 0: unknown */
    uint64_t *refs;        /* AGENT_ENGINE windows that are open, the newest last */
    size_t nrefs;
};

/* What a volume was asked to be. Two creates are the same if and only if their specs are equal. */
struct volume_spec {
    uint64_t size;  /* bytes; 0: not given */
    uint32_t block; /* bytes */
    uint32_t profile;
    uint32_t uid, gid, mode;
    bool strict;
    char *allow[AGENT_RULES_MAX], *deny[AGENT_RULES_MAX];
    size_t nallow, ndeny;
};

enum mount_state {
    MOUNT_IDLE = 0,  /* not mounted */
    MOUNT_SERVING,   /* mounted, a coffer-fs serves it */
    MOUNT_LINGERING, /* serving; nobody holds it, but a mount namespace still has it */
    MOUNT_STOPPING,  /* unmounted; its coffer-fs has not ended yet */
    MOUNT_FAILED,    /* held, but its coffer-fs is dead and no new one could be started */
};

struct plugin_volume {
    char name[ENTRY_NAME_MAX]; /* the volume's, or VOLUME@SNAPSHOT: no name has a '@' */
    const char *snapshot;      /* its name, within `name`; NULL: the volume itself */
    pthread_mutex_t op_lock;
    int fuse_fd;   /* (op_lock) the mount's /dev/fuse, or -1 */
    int page_fd;   /* (op_lock) the mount's struct server_page, or -1 */
    bool has_init; /* (op_lock and R, as what follows) init is known: another server can take over */
    struct server_init init;
    uint64_t mount_id;      /* random, of the mount */
    int64_t death_ns[5];    /* (op_lock) mono_ns of its last servers' deaths, the oldest first; 0: none */
    unsigned deaths;        /* (op_lock) of mounts with their servers, one soon after the other */
    int64_t started_ns;     /* (op_lock) mono_ns of the last server's start */
    int64_t engine_dead_ns; /* (op_lock) since when a holder's engine is seen dead, mono_ns, or 0 */
    unsigned refs;          /* (R) */
    bool listed;            /* (R) it exists; otherwise being made, or gone */
    /* Set before listed, then only read: */
    uint8_t id[VOLUME_ID_BYTES];
    struct volume_params params;
    int64_t created_ns;
    bool strict, attached;
    struct volume_spec spec;
    /* (R): */
    uint32_t kind; /* enum agent_volume_state_kind, as last seen */
    json_t *rules; /* as last seen: array of {"effect", "rule"} */
    struct holder *holders;
    size_t nholders;
    enum mount_state mount;
    struct fsproc *fs;        /* with a reference; not NULL while SERVING, LINGERING, STOPPING */
    struct process server;    /* of fs, for the state file */
    struct process successor; /* so is this: started to follow it, or one that died; pid 0: none */
    bool restarting;          /* its server is being changed as the operator asked */
    bool unlocked;            /* as fs last said */
    struct plugin_volume *next;
};

extern pthread_mutex_t registry_lock;

/* --- the table --- */

/* The entry of a volume that exists, with a reference; NULL when there is none. */
struct plugin_volume *registry_find_ref(const char *name);
/* The entry of that name, made (not listed) when there is none, with a reference. */
struct plugin_volume *registry_reserve_ref(const char *name);
void registry_unref(struct plugin_volume *v);
/* The entry of that snapshot of a volume, as registry_reserve_ref. */
struct plugin_volume *registry_reserve_snapshot_ref(const struct plugin_volume *v, const char *snapshot);
/* Makes it listed; what a server needs to know is the volume's, which exists and whose op_lock is held. */
void registry_list_snapshot(struct plugin_volume *v, const struct plugin_volume *of);
/* The listed entry of that name, VOLUME or VOLUME@SNAPSHOT; NULL when there is none. */
struct plugin_volume *registry_find_mount_ref(const char *name);
/* One more reference of an entry that exists. */
struct plugin_volume *registry_ref(struct plugin_volume *v);
/* All listed volumes in order of name, each with a reference; *ret (free it) has *ret_n. */
void registry_all_ref(struct plugin_volume ***ret, size_t *ret_n);
/* The same, and mounted snapshots. */
void registry_mounts_ref(struct plugin_volume ***ret, size_t *ret_n);
/* Is one of the volume's snapshots mounted? */
bool registry_has_snapshots(const struct plugin_volume *v);
/* Makes it listed / not listed any more (the entry goes with its last reference). */
void registry_set_listed(struct plugin_volume *v, bool listed);
bool registry_is_listed(struct plugin_volume *v);

/* --- holders; registry_lock held --- */

struct holder *holder_find(struct plugin_volume *v, const char *id, bool local);
struct holder *holder_add(struct plugin_volume *v, const char *id, bool local);
void holder_remove(struct plugin_volume *v, struct holder *h);
/* Sum of all counts. */
unsigned holder_total(const struct plugin_volume *v);

/* --- specs --- */

/* Frees what it points to. */
void volume_spec_clear(struct volume_spec *s);
bool volume_spec_equal(const struct volume_spec *a, const struct volume_spec *b);

/* --- the state file --- */

/* Writes it. 0 or -errno (logged): then it is tried again until it is written. */
int registry_save(void);
/* Reads it into the empty table; a missing file is an empty table. Another boot's holders and servers are dropped.
 * -EINVAL for a file that is not understood, with the reason. */
int registry_load(struct why *why);
/* coffer-keyd's process as the file knows it. */
void registry_set_keyd(const struct process *p);
struct process registry_get_keyd(void);

/* For tests: the file's text (free it), and reading one. */
char *registry_dump(void);
int registry_parse(const char *text, size_t n, struct why *why);
/* Drops all entries. */
void registry_clear(void);

#endif
