/*
 * volumes.h - making, removing, describing and checking volumes. All return 0 or -errno with the reason.
 */
#ifndef COFFER_PLUGIN_VOLUMES_H
#define COFFER_PLUGIN_VOLUMES_H

#include "fsproc.h"
#include "registry.h"

/* --- what is asked for --- */

/* The spec of nothing given. */
void volumes_spec_init(struct volume_spec *s);
/* From the engine's options: an object of strings (or NULL): size, block, profile, allow and deny (rules, several
 * separated by ';'), uid, gid, mode, strict. Free with volume_spec_clear(), also after an error. */
int volumes_spec_from_options(json_t *options, struct volume_spec *s, struct why *why);
/* Checks sizes and modes of a spec however made. */
int volumes_spec_check(const struct volume_spec *s, struct why *why);
/* Adds a rule (copied). -E2BIG. */
int volumes_spec_add_rule(struct volume_spec *s, bool deny, const char *rule, size_t n, struct why *why);

/* --- life --- */

struct volume_import {
    int fds[2]; /* secret, stream */
    const struct fsproc_sink *sink;
};

/* Makes the volume, with an import's content where there is one (the spec stays the caller's). engine: asked by a container engine; then a volume that exists with an
 * equal spec is success. -EEXIST. Repairs what a crash in an earlier create left. */
int volumes_create(const char *name, const struct volume_spec *s, bool engine, const struct volume_import *import,
                   struct why *why);
/* Destroys the key, then the files. -EBUSY while it is mounted or held; -ENOENT. */
int volumes_remove(const char *name, struct why *why);
/* Checks it, mounted or not; the sink gets the findings. Returns their number. */
int volumes_check(struct plugin_volume *v, bool data, const struct fsproc_sink *sink, struct why *why);
/* Repairs it; it is not mounted. The sink gets what was lost and mended; its number. */
int volumes_repair(struct plugin_volume *v, const struct fsproc_sink *sink, struct why *why);
/* Starts a scrub in the server of a mounted volume, at so many bytes a second. */
int volumes_scrub(struct plugin_volume *v, uint64_t rate, struct why *why);
/* Writes it into a stream; fds: secret, stream. The sink gets what cannot be read; its number. */
int volumes_export(struct plugin_volume *v, const char *snapshot, const char *since, const int fds[2],
                   const struct fsproc_sink *sink, struct why *why);
int volumes_snapshot_create(struct plugin_volume *v, const char *snapshot, struct why *why);
int volumes_snapshot_remove(struct plugin_volume *v, const char *snapshot, struct why *why);
/* An array of {name, created, used, mounted}, the caller's. */
int volumes_snapshot_list(struct plugin_volume *v, json_t **ret, struct why *why);
/* Mounts it read-only at dir (mounts_local_mount), whether or not the volume is mounted. */
int volumes_snapshot_mount(struct plugin_volume *v, const char *snapshot, const char *dir, struct why *why);
/* Changes its limit, mounted or not. */
int volumes_resize(struct plugin_volume *v, uint64_t size, struct why *why);
/* Takes over from an unlocked keystore: volumes that the table lost, and whether each is fresh or used. */
void volumes_reconcile(void);
/* Reads the volume's rules anew after a change. */
void volumes_refresh_rules(struct plugin_volume *v);

/* --- descriptions --- */

/* As `volume inspect` says; asks the server for at most a second. ask_agent: whether the keystore is unlocked, so that
 * the agent can be asked. */
json_t *volumes_inspect(struct plugin_volume *v, bool ask_agent);
/* As the engine's Get says: from memory, at once. */
json_t *volumes_engine_json(struct plugin_volume *v);

#endif
