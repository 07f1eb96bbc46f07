/*
 * tree.h - the copy-on-write B+tree of sealed nodes (FORMAT.md, "The tree"), in memory.
 *
 * Nodes are 16 KiB plaintext pages linked by pointers where loaded. Changing a node makes it dirty in memory; it gets a new
 * address only at a checkpoint, and a dirty node's ancestors are dirty. Locking is the caller's (the volume's state lock):
 * functions marked [S] need it shared or exclusive, [X] exclusive. Concurrent [S] callers may load nodes: the tree
 * serialises that itself. Pointers to values stay good until the next [X] call on the tree.
 *
 * A put or del right after a successful tree_prefetch of the same key (and nothing but other such calls, and no tree_trim,
 * between) cannot fail: all nodes it needs are in memory, and where a sibling that would be merged with is not loaded the
 * merge is left out.
 */
#ifndef COFFER_TREE_H
#define COFFER_TREE_H

#include "coffer/format.h"

struct tree;

struct tree_key {
    uint64_t a, b;
    uint8_t kind;
};

static inline struct tree_key tree_key(enum item_kind kind, uint64_t a, uint64_t b)
{
    return (struct tree_key){.a = a, .b = b, .kind = (uint8_t)kind};
}

int tree_key_cmp(const struct tree_key *x, const struct tree_key *y);
void tree_key_encode(const struct tree_key *k, struct disk_key *ret);
void tree_key_decode(const struct disk_key *k, struct tree_key *ret);

struct tree_io {
    /* Reads and opens the node at ptr into page (NODE_BYTES). 0, -EIO (does not authenticate, or I/O error). */
    int (*read_node)(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page);
    void *ctx;
};

/* An empty tree: one dirty leaf. cache_bytes: clean nodes kept by tree_trim. */
struct tree *tree_new(const struct tree_io *io, size_t cache_bytes);
/* A tree whose root is at ptr; loads the root. -EIO. */
int tree_load(const struct tree_io *io, size_t cache_bytes, const struct disk_ptr *ptr, unsigned level,
              struct tree **ret_tree);
void tree_free(struct tree *t);

/* [S] The value of key. -ENOENT, -EIO. */
int tree_get(struct tree *t, const struct tree_key *key, const uint8_t **ret_value, size_t *ret_len);
/* [S] The first item at or above key. -ENOENT at the end, -EIO. */
int tree_ge(struct tree *t, const struct tree_key *key, struct tree_key *ret_key, const uint8_t **ret_value,
            size_t *ret_len);
/* [S] The last item at or below key. -ENOENT, -EIO. */
int tree_le(struct tree *t, const struct tree_key *key, struct tree_key *ret_key, const uint8_t **ret_value,
            size_t *ret_len);

/* [S] Where the node for key cannot be read: the first key behind it. -ENOENT: there is none, or it and the next can be read. */
int tree_behind(struct tree *t, const struct tree_key *key, struct tree_key *ret_key);

/* [S] A walk in key order that keeps its place in a leaf: first tree_iter_seek (at or above key), then next. The lock is
 * held from seek to the last use. 0, -ENOENT past the last item, -EIO. */
struct tree_iter {
    struct tree *tree;
    void *node[NODE_LEVEL_MAX + 1];
    unsigned slot[NODE_LEVEL_MAX + 1];
    unsigned levels;
    struct tree_key key;
    const uint8_t *value;
    size_t len;
};
int tree_iter_seek(struct tree *t, const struct tree_key *key, struct tree_iter *it);
int tree_iter_next(struct tree_iter *it);

/* [X] Loads what put or del of key needs. -EIO. */
int tree_prefetch(struct tree *t, const struct tree_key *key);
/* [X] Sets the value (len <= ITEM_VALUE_MAX). -EIO only as said above. */
int tree_put(struct tree *t, const struct tree_key *key, const void *value, size_t len);
/* [X] Removes the item. -ENOENT, -EIO. */
int tree_del(struct tree *t, const struct tree_key *key);
/* [X] Makes the leaf of an existing item dirty without changing it. -ENOENT, -EIO. */
int tree_touch(struct tree *t, const struct tree_key *key);

/* [X] Drops clean nodes until the cache is at most its size; nodes that tree_seal handed out and tree_written has not
 * confirmed stay. */
void tree_trim(struct tree *t);
/* [S] Over its size? (cheap) */
bool tree_wants_trim(struct tree *t);
size_t tree_dirty_nodes(struct tree *t);
size_t tree_cached_nodes(struct tree *t);

/* --- checkpoint --- */

/*
 * [X] Gives an address to every dirty node that has none since the last tree_seal: calls alloc for it, and release for
 * the address of its older version, and for those of nodes that were dropped from the tree. Returns the number of nodes that got
 * one, or alloc's error (call again later: what was given stays given). alloc and release must not call the tree.
 */
struct tree_space {
    int (*alloc)(void *ctx, uint64_t *ret_addr); /* NODE_UNITS units */
    void (*release)(void *ctx, uint64_t addr);
    void *ctx;
};
int tree_assign(struct tree *t, const struct tree_space *space);

/*
 * [X] All dirty nodes have addresses: seals them bottom-up and makes them clean. For each: page header filled in (birth =
 * generation, addr), page checked by tree_check_page, compacted, then seal() makes the ciphertext, nonce and MAC; the parent's
 * item takes the pointer. The ciphertext buffers (malloc'ed by the tree, NODE_BYTES) come back as an array that the
 * caller frees with tree_pages_free. -EUCLEAN when a page fails its check (a bug or bad memory: nothing was sealed that
 * will be written).
 */
struct tree_page {
    uint64_t addr;
    uint8_t *cipher;
};
typedef void (*tree_seal_fn)(void *ctx, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain,
                             uint8_t *ret_cipher, uint8_t ret_nonce[NONCE_BYTES], uint8_t ret_mac[MAC_BYTES]);
int tree_seal(struct tree *t, uint64_t generation, tree_seal_fn seal, void *ctx, struct tree_page **ret_pages,
              size_t *ret_n, struct disk_ptr *ret_root, unsigned *ret_root_level);
void tree_pages_free(struct tree_page *pages, size_t n);
/* [S or X] The pages of the last tree_seal are on disk: they may be dropped from the cache. */
void tree_written(struct tree *t);

/*
 * The one checker of nodes (FORMAT.md): every field and item of a plaintext page that should be at addr, birth and level.
 * 0, or -EUCLEAN with a line in why: "corrupt <type>: <where>, <reason>, have X expect Y".
 */
int tree_check_page(const uint8_t *page, uint64_t addr, uint64_t birth, unsigned level, char *why, size_t n);

/* [S] Visits every node's address and level, for volume_check; stops at visit's nonzero, which it returns. Nodes without an
 * address yet are visited with addr 0. An unreadable node is visited with err -EIO and not entered. Loaded nodes that were
 * not in the cache are dropped again. */
typedef int (*tree_visit_fn)(void *ctx, uint64_t addr, unsigned level, int err);
int tree_visit(struct tree *t, tree_visit_fn visit, void *ctx);

/* [X] Puts an empty node in the place of each that cannot be read, and tells lost() where it was and which keys (lo to below
 * hi) it may have held. */
typedef void (*tree_lost_fn)(void *ctx, uint64_t addr, unsigned level, const struct tree_key *lo,
                             const struct tree_key *hi);
int tree_prune(struct tree *t, tree_lost_fn lost, void *ctx);

#endif
