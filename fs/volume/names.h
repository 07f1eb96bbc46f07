/* names.h - items found by a hashed name: directory entries and extended attributes share the probing. */
#ifndef COFFER_NAMES_H
#define COFFER_NAMES_H

#include "fs/volume/tx.h"

/* Does this item's value carry the name? */
typedef bool (*names_match_fn)(const uint8_t *value, size_t len, const char *name, size_t n);

/* [state] The item of kind and inode `a` that carries name. Copies its value (cap bytes at most). Returns the length, -ENOENT,
 * -EIO, -ERANGE. */
ssize_t names_find(struct volume *v, enum item_kind kind, uint64_t a, const char *name, size_t n, names_match_fn match,
                   struct tree_key *ret_key, void *buf, size_t cap);
/* [state] The first free key for name. -ENOSPC when all PROBE_MAX are taken, -EIO. */
int names_free_key(struct volume *v, enum item_kind kind, uint64_t a, const char *name, size_t n,
                   struct tree_key *ret_key);

#endif
