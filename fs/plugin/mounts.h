/*
 * mounts.h - mounts volumes at <run>/mnt/<name>, counts who holds them, and unmounts them when nobody does.
 *
 * Functions that take a volume lock its op_lock unless they say otherwise; they return 0 or -errno with the reason.
 */
#ifndef COFFER_PLUGIN_MOUNTS_H
#define COFFER_PLUGIN_MOUNTS_H

#include "registry.h"

/* How long an operation waits for another one on the same volume. */
#define MOUNTS_PATIENCE_MS 30000

/* The process at the other end of the plugin socket. pidfd -1 and process.pid 0: unknown. */
struct engine_peer {
    struct process process;
    int pidfd;
};

/* <run>/mnt/<name>; free() it. */
char *mounts_path(const struct plugin_volume *v);

/* The engine's Mount: one more for id. Refused while the keystore is locked. */
int mounts_engine_mount(struct plugin_volume *v, const char *id, const struct engine_peer *peer, struct why *why);
/* The engine's Unmount: one less; an unknown id is none. Data is flushed and the server gone before it returns 0, when
 * it was the last. */
int mounts_engine_unmount(struct plugin_volume *v, const char *id, struct why *why);

/* `coffer mount`: dir is an absolute path of an empty directory. */
int mounts_local_mount(struct plugin_volume *v, const char *dir, struct why *why);
int mounts_local_umount(const char *dir, struct why *why);

/* Starts another coffer-fs for a mounted volume, lets the one that serves it end, and has the new one go on: for who uses
 * the mount that is a pause. -ENOENT; -ENOTCONN: not mounted; -EALREADY: one is under way; -EBUSY, -EOPNOTSUPP. */
struct mounts_restarted {
    pid_t old_pid, pid;
};
int mounts_restart_server(struct plugin_volume *v, struct mounts_restarted *ret, struct why *why);

/* Opens the backing files; v->op_lock held. With the lock on `log` that its server holds as long as it lives, so
 * that two never run (waits 10 s for it). */
int mounts_open_backing(struct plugin_volume *v, int *ret_data, int *ret_log, struct why *why);
/* True while it is mounted, held, or its server lives. Takes registry_lock. */
bool mounts_busy(struct plugin_volume *v);
/* 0, or -EBUSY with the reason: one of the volume's snapshots is mounted. */
int mounts_need_no_snapshots(const struct plugin_volume *v, struct why *why);
/* The server, with a reference, while it serves; else NULL. */
struct fsproc *mounts_server_ref(struct plugin_volume *v);

/* At start: finds the mounts again that the last cofferd left. */
void mounts_adopt(void);
/* A keyd has come up or was unlocked: new volume channels for living servers, and new servers where one is missing. */
void mounts_agent_up(void);
/* Unmounts everything, for the end. -EBUSY when a volume is held, unless force. No mount is made after it returned 0. */
int mounts_down(bool force, struct why *why);

#endif
