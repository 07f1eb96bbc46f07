/*
 * names.c - see names.h. A name's item is at one of PROBE_MAX keys from its hash on. A lookup looks at all of them, so
 * that a removal needs no tombstone.
 */
#include "fs/volume/names.h"

ssize_t names_find(struct volume *v, enum item_kind kind, uint64_t a, const char *name, size_t n, names_match_fn match,
                   struct tree_key *ret_key, void *buf, size_t cap)
{
    uint64_t hash = name_hash(v->keys, a, name, n);
    struct tree_key key = tree_key(kind, a, hash), found;
    const uint8_t *value;
    size_t len;
    int rc;

    while ((rc = tree_ge(v->tree, &key, &found, &value, &len)) == 0) {
        if (found.kind != kind || found.a != a || found.b >= hash + PROBE_MAX)
            return -ENOENT;
        if (match(value, len, name, n)) {
            *ret_key = found;
            if (len > cap)
                return -ERANGE;
            memcpy(buf, value, len);
            return (ssize_t)len;
        }
        key.b = found.b + 1;
    }
    return rc;
}

int names_free_key(struct volume *v, enum item_kind kind, uint64_t a, const char *name, size_t n,
                   struct tree_key *ret_key)
{
    uint64_t hash = name_hash(v->keys, a, name, n);

    for (unsigned i = 0; i < PROBE_MAX; i++) {
        struct tree_key key = tree_key(kind, a, hash + i);
        const uint8_t *value;
        size_t len;
        int rc = tree_get(v->tree, &key, &value, &len);

        if (rc == -ENOENT) {
            *ret_key = key;
            return 0;
        }
        if (rc < 0)
            return rc;
    }
    return -ENOSPC;
}
