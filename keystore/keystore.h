/*
 * keystore.h - the sealed keystore: one file, `keystore`, that holds the volumes' records, rules and wrapped keys, and
 * the slots that open it. The format is in KEYSTORE.md.
 *
 * A keystore is locked after keystore_open and keystore_lock: then only its slots are known, and everything about
 * volumes fails with -ENOKEY. Every change is written (a new file in the old one's place, made durable) before it holds
 * in memory: after an error memory is as it was. One thread uses a keystore.
 *
 * Errors besides those named: -ENOKEY locked; -EBADMSG something in the file does not authenticate or is not well
 * formed; -ENOMEM no locked memory; errors of I/O.
 */
#ifndef COFFER_KEYSTORE_KEYSTORE_H
#define COFFER_KEYSTORE_KEYSTORE_H

#include "coffer/agent.h"
#include "fs/base/secmem.h"

#define KEYSTORE_FILE         "keystore"
#define KEYSTORE_FILE_MAX     (16u << 20) /* bytes; a bigger file is refused unread */
#define KEYSTORE_SLOTS_MAX    8
#define KEYSTORE_VOLUMES_MAX  4096
#define KEYSTORE_ARGON_OPS    16u           /* at most, checked before any work */
#define KEYSTORE_ARGON_MEM    (1024u << 20) /* bytes, likewise */
#define KEYSTORE_KEY_FILE_MIN 16            /* bytes; at most AGENT_SECRET_MAX */
#define KEYSTORE_RECOVERY_MAX 160           /* the recovery text with its NUL fits into this */

struct keystore;

/* --- life --- */

/*
 * The keystore in dirfd (duplicated; a directory that only we may enter), locked. Reads and checks the header and the
 * slots alone. No file is fine: it is not initialised then. -EBADMSG: not a keystore, or a cost or count out of bounds;
 * -ENOTSUP: a newer version; -EFBIG.
 */
int keystore_open(int dirfd, struct keystore **ret);
/* Locks and frees; NULL is fine. */
void keystore_close(struct keystore *k);

bool keystore_initialised(const struct keystore *k);
bool keystore_unlocked(const struct keystore *k);
unsigned keystore_slots(const struct keystore *k);
/* 0 while locked. */
unsigned keystore_volumes(const struct keystore *k);

/*
 * Makes the keystore, with a slot of this kind for the secret (a passphrase of at least 1 byte, or a key file) and one
 * for a fresh recovery key, and leaves it unlocked. The recovery key's text (one line, no newline) goes to recovery,
 * size bytes in the caller's secure memory; it exists nowhere else. -EEXIST; -EINVAL: the kind, or a secret too short
 * or too long; -ENOSPC: size is below KEYSTORE_RECOVERY_MAX. After a failure there is no keystore and recovery is
 * wiped.
 * deliver (or NULL) is called with the text when the file is written, but not in its place yet: so that no keystore
 * comes to be whose text nobody was given. An error of it is returned, and there is no keystore.
 */
int keystore_init(struct keystore *k, uint32_t kind, const uint8_t *secret, size_t n, char *recovery, size_t size,
                  int (*deliver)(void *ctx, const char *recovery), void *ctx);
/*
 * Opens it with a secret of this kind (for AGENT_SLOT_RECOVERY: the recovery text). -EKEYREJECTED: no slot of the kind
 * opens with it; -ENOENT: no slot of the kind, or not initialised; -EBADMSG: the secret fits, but the file was changed.
 * A failure on an unlocked keystore leaves it unlocked. Takes as long as Argon2 takes, and its memory.
 */
int keystore_unlock(struct keystore *k, uint32_t kind, const uint8_t *secret, size_t n);
/* Wipes every key. */
void keystore_lock(struct keystore *k);

/* Argon2id's cost (passes, bytes) for passphrase slots made from now on in this process: tests make it small. */
void keystore_set_argon_cost_for_new_slots(uint64_t ops, uint64_t mem);

/* --- volumes --- */

/* Records a volume under v->name with a new random key; v->params.id and v->created_ns are set. -EEXIST; -EINVAL: a
 * field out of its range; -ENOSPC: KEYSTORE_VOLUMES_MAX or KEYSTORE_FILE_MAX. */
int keystore_volume_add(struct keystore *k, struct agent_volume *v);
/* -ENOENT. */
int keystore_volume_get(struct keystore *k, const char *name, struct agent_volume *v);
/* The index-th in order of name (bytes). -ENOENT past the end. */
int keystore_volume_at(struct keystore *k, uint32_t index, struct agent_volume *v);
/* -ENOENT, -EINVAL. */
int keystore_volume_set_state(struct keystore *k, const char *name, uint32_t state);
/* -ENOENT, -EINVAL. */
int keystore_volume_set_size(struct keystore *k, const char *name, uint64_t size_limit);
/* Removes the record and with it the key. The old file's blocks are overwritten, best effort. -ENOENT. */
int keystore_volume_rm(struct keystore *k, const char *name);
/* The volume's key, the caller's (key_free). -ENOENT. */
int keystore_volume_key(struct keystore *k, const char *name, struct key **ret);

/* The key of what is remembered of volumes (seen.h), the caller's (key_free). -ENOKEY, -ENOMEM. */
int keystore_seen_key(const struct keystore *k, struct key **ret);

/* --- rules: texts here, in the order in which they were given; policy.h says what they mean --- */

/* Adds r->rule to volume r->name (r->index is ignored). -EEXIST: it has this one; -E2BIG: AGENT_RULES_MAX; -EINVAL: no
 * text; -ENOENT: no such volume. The caller has checked the rule (policy_check). */
int keystore_rule_add(struct keystore *k, const struct agent_rule *r);
/* Removes the rule with this text and effect; the others keep their order. -ENOENT. */
int keystore_rule_rm(struct keystore *k, const struct agent_rule *r);
/* Sets *r wholly. -ENOENT past the end. */
int keystore_rule_at(struct keystore *k, const char *name, uint32_t index, struct agent_rule *r);

/* --- the checkers, pure: for keystore.c itself and for fuzzing --- */

/* Header and slots in the first n bytes of a file of size bytes. 0, -EBADMSG, -ENOTSUP, -EFBIG. */
int keystore_check_head(const uint8_t *head, size_t n, uint64_t size);
/* The opened body. 0 or -EBADMSG. */
int keystore_check_body(const uint8_t *body, size_t n);

#endif
