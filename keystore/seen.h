/*
 * seen.h - what the agent remembers of each volume's newest checkpoint, in `generations`: so that the backing files put
 * back to an older state are noticed, as long as this directory is beyond the tamperer's reach. KEYSTORE.md has the
 * format.
 *
 * The file is sealed with a key from the root key. Without it (before the first seen_unlock, after seen_lock) nothing
 * is known and nothing is taken. One thread.
 */
#ifndef COFFER_KEYSTORE_SEEN_H
#define COFFER_KEYSTORE_SEEN_H

#include "coffer/volume.h"
#include "fs/base/secmem.h"

#define SEEN_FILE "generations"

struct seen;

/* dirfd is duplicated. NULL: no descriptor. */
struct seen *seen_new(int dirfd);
/* NULL is fine. */
void seen_free(struct seen *s);

/* Reads the file. 0; 1: there is none; -EBADMSG: it does not authenticate; errors of I/O: then nothing is known. The
 * key is copied. */
int seen_unlock(struct seen *s, const struct key *key);
/* Wipes the key and forgets what the file says. */
void seen_lock(struct seen *s);
bool seen_unlocked(const struct seen *s);
/* For a new keystore: the file of an older one goes. */
int seen_reset(struct seen *s);

/* What is remembered of the volume (generation 0: nothing), and whether its next opening accepts an older state. */
void seen_get(const struct seen *s, const uint8_t id[VOLUME_ID_BYTES], struct volume_seen *ret, bool *ret_accept);
/*
 * Remembers a checkpoint; durable when 0 is returned. A newer one of the same branch, any where nothing is remembered,
 * and after seen_accept one of another branch, which ends the acceptance. -ESTALE: any other; -ENOKEY; -ENOSPC.
 */
int seen_put(struct seen *s, const uint8_t id[VOLUME_ID_BYTES], const struct volume_seen *now);
/* The volume's next opening accepts an older state. Durable when 0 is returned. -ENOKEY. */
int seen_accept(struct seen *s, const uint8_t id[VOLUME_ID_BYTES]);
/* The volume is gone; written with the next seen_put. */
void seen_forget(struct seen *s, const uint8_t id[VOLUME_ID_BYTES]);

#endif
