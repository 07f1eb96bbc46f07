/*
 * treeworld.h - for tests of the tree: a disk in memory that is strict about the protocol of tree.h, a plain model (a
 * sorted array), and operations that do the same to both and compare. A difference ends the program with a line that
 * repeats the case (tw_repro).
 *
 * The disk has places for nodes: free -> live (alloc) -> released -> free (once the checkpoint that contains the
 * release is written). What is not live any more is overwritten, and what a seal handed out cannot be read until it is
 * written: so a tree that reads a stale or unwritten place, releases twice or leaks is seen.
 */
#ifndef TESTS_TREEWORLD_H
#define TESTS_TREEWORLD_H

#include "fs/volume/tree.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

static char tw_repro[120] = "";

static __attribute__((format(printf, 1, 2), noreturn)) void tw_die(const char *fmt, ...)
{
    va_list ap;

    fprintf(stderr, "FAIL tree %s: ", tw_repro);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    abort();
}

#define TW_MUST(cond)                                                                                                  \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            tw_die("line %d: %s", __LINE__, #cond);                                                                    \
    } while (0)

/* --- numbers --- */

static inline uint64_t tw_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline uint64_t tw_next(uint64_t *rng)
{
    return tw_mix(++*rng);
}

static inline uint64_t tw_below(uint64_t *rng, uint64_t n)
{
    TW_MUST(n > 0);
    return tw_next(rng) % n;
}

/* --- the disk --- */

enum place { PLACE_FREE, PLACE_LIVE, PLACE_RELEASED };

struct tdisk {
    unsigned places, hint;
    uint8_t *state;     /* enum place */
    uint8_t **cipher;   /* NULL: not written */
    int64_t alloc_left; /* allocations until they fail; negative: never */
    uint64_t nonces, allocs;
    atomic_bool fail;   /* all reads fail */
    uint64_t fail_addr; /* reads of this place fail */
    _Atomic uint64_t reads;
};

static inline unsigned tdisk_place(const struct tdisk *d, uint64_t addr)
{
    uint64_t k = addr / NODE_UNITS - 1;

    if (addr % NODE_UNITS || k >= d->places)
        tw_die("address %llu is none", (unsigned long long)addr);
    return (unsigned)k;
}

static inline uint64_t tdisk_word(const uint8_t nonce[NONCE_BYTES], uint64_t addr, uint64_t birth, unsigned level)
{
    uint64_t n;

    memcpy(&n, nonce, 8);
    return tw_mix(n ^ tw_mix(addr ^ tw_mix(birth ^ tw_mix(level))));
}

/* A toy cipher: enough to see a wrong place, birth, level, nonce or byte. */
static inline void tdisk_crypt(uint64_t seed, const uint8_t *in, uint8_t *out)
{
    for (size_t i = 0; i < NODE_BYTES; i += 8) {
        uint64_t x;

        memcpy(&x, in + i, 8);
        x ^= tw_mix(seed + i);
        memcpy(out + i, &x, 8);
    }
}

static inline void tdisk_mac(uint64_t seed, const uint8_t *cipher, uint8_t ret_mac[MAC_BYTES])
{
    uint64_t h = tw_mix(seed), x;

    for (size_t i = 0; i < NODE_BYTES; i += 8) {
        memcpy(&x, cipher + i, 8);
        h = (h ^ x) * 0x9e3779b97f4a7c15ull;
        h ^= h >> 29;
    }
    memcpy(ret_mac, &h, 8);
    memcpy(ret_mac + 8, &seed, 8);
}

static inline int tdisk_read(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct tdisk *d = ctx;
    uint64_t addr = le64_get(ptr->addr), seed = tdisk_word(ptr->nonce, addr, le64_get(ptr->birth), level);
    const uint8_t *cipher;
    uint8_t mac[MAC_BYTES];

    d->reads++;
    if (d->fail || addr == d->fail_addr)
        return -EIO;
    cipher = d->cipher[tdisk_place(d, addr)];
    if (!cipher)
        tw_die("place %llu is read and was never written", (unsigned long long)addr);
    tdisk_mac(seed, cipher, mac);
    if (memcmp(mac, ptr->mac, MAC_BYTES) != 0)
        tw_die("place %llu does not hold what the pointer names", (unsigned long long)addr);
    tdisk_crypt(seed, cipher, page);
    return 0;
}

static inline int tdisk_alloc(void *ctx, uint64_t *ret_addr)
{
    struct tdisk *d = ctx;

    if (d->alloc_left == 0)
        return -ENOSPC;
    if (d->alloc_left > 0)
        d->alloc_left--;
    for (unsigned k = 0; k < d->places; k++) {
        unsigned at = (d->hint + k) % d->places;

        if (d->state[at] != PLACE_FREE)
            continue;
        d->state[at] = PLACE_LIVE;
        d->hint = at + 1;
        d->allocs++;
        *ret_addr = ((uint64_t)at + 1) * NODE_UNITS;
        return 0;
    }
    tw_die("the disk is full");
}

static inline void tdisk_release(void *ctx, uint64_t addr)
{
    struct tdisk *d = ctx;
    unsigned k = tdisk_place(d, addr);

    if (d->state[k] != PLACE_LIVE)
        tw_die("place %llu is released and is not in use", (unsigned long long)addr);
    d->state[k] = PLACE_RELEASED;
}

static inline void tdisk_seal(void *ctx, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain,
                              uint8_t *ret_cipher, uint8_t ret_nonce[NONCE_BYTES], uint8_t ret_mac[MAC_BYTES])
{
    struct tdisk *d = ctx;
    uint64_t nonce = tw_mix(++d->nonces), seed;

    memset(ret_nonce, 0, NONCE_BYTES);
    memcpy(ret_nonce, &nonce, 8);
    seed = tdisk_word(ret_nonce, addr, birth, level);
    tdisk_crypt(seed, plain, ret_cipher);
    tdisk_mac(seed, ret_cipher, ret_mac);
}

/* --- items: every kind, values that the checker accepts --- */

/* The value that (kind, seed) stands for. */
static inline size_t tw_value(uint8_t kind, uint32_t seed, uint8_t value[ITEM_VALUE_MAX])
{
    uint64_t r = seed;
    size_t len = 0;

    switch (kind) {
    case ITEM_INODE:
        len = sizeof(struct disk_inode);
        break;
    case ITEM_DIRENT:
        len = sizeof(struct disk_dirent) + 1 + tw_below(&r, 255);
        break;
    case ITEM_XATTR:
        len = sizeof(struct disk_xattr) + 1 + tw_below(&r, seed % 4 ? 200 : ITEM_VALUE_MAX - sizeof(struct disk_xattr));
        break;
    case ITEM_INLINE:
        len = tw_below(&r, seed % 4 ? 100 : SYMLINK_MAX + 1);
        break;
    case ITEM_RANGE:
        len = sizeof(struct disk_range);
        break;
    case ITEM_TRIM:
        len = sizeof(le64);
        break;
    case ITEM_EXTENT:
        len =
            sizeof(struct disk_extent) + (1 + seed % 16) * (sizeof(struct disk_chunk) + (seed & 64 ? sizeof(le16) : 0));
        break;
    case ITEM_SPACE:
        len = REGION_UNITS / 8;
        break;
    }
    for (size_t i = 0; i < len; i++)
        value[i] = (uint8_t)('a' + (i * 7 + seed) % 23);
    if (kind == ITEM_INODE) {
        struct disk_inode *d = (struct disk_inode *)value;

        d->mode = le32_make(S_IFREG | (seed & 0777));
        d->flags = le32_make(seed & INODE_INLINE);
    } else if (kind == ITEM_DIRENT) {
        struct disk_dirent *d = (struct disk_dirent *)value;

        d->type = S_IFREG >> 12;
        d->namelen = (uint8_t)(len - sizeof(*d));
    } else if (kind == ITEM_XATTR) {
        struct disk_xattr *d = (struct disk_xattr *)value;
        size_t rest = len - sizeof(*d);

        d->reserved = 0;
        d->namelen = (uint8_t)MIN(rest, 1 + seed % 255);
        d->valuelen = le16_make((uint16_t)(rest - d->namelen));
    } else if (kind == ITEM_RANGE) {
        struct disk_range *d = (struct disk_range *)value;

        d->first = le16_make((uint16_t)(seed % 16));
        d->count = le16_make((uint16_t)(1 + seed / 16 % (16 - seed % 16)));
    } else if (kind == ITEM_EXTENT) {
        struct disk_extent *d = (struct disk_extent *)value;

        d->suite = SUITE_XCHACHA20;
        d->chunks = (uint8_t)(1 + seed % 16);
        d->refs = seed & 64 ? 1 : 0;
        d->epoch = 0;
    }
    return len;
}

/* --- the model --- */

struct titem {
    struct tree_key key;
    uint32_t seed;
};

struct tmodel {
    struct titem *item;
    size_t n, cap;
};

/* The first item at or above key. */
static inline size_t tmodel_find(const struct tmodel *m, const struct tree_key *key, bool *ret_exact)
{
    size_t lo = 0, hi = m->n;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;

        if (tree_key_cmp(&m->item[mid].key, key) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    *ret_exact = lo < m->n && tree_key_cmp(&m->item[lo].key, key) == 0;
    return lo;
}

static inline void tmodel_put(struct tmodel *m, const struct tree_key *key, uint32_t seed)
{
    bool exact;
    size_t i = tmodel_find(m, key, &exact);

    if (!exact) {
        if (m->n == m->cap) {
            m->cap = m->cap ? m->cap * 2 : 256;
            m->item = xrealloc(m->item, m->cap * sizeof(*m->item));
        }
        memmove(&m->item[i + 1], &m->item[i], (m->n - i) * sizeof(*m->item));
        m->n++;
    }
    m->item[i] = (struct titem){*key, seed};
}

static inline bool tmodel_del(struct tmodel *m, const struct tree_key *key)
{
    bool exact;
    size_t i = tmodel_find(m, key, &exact);

    if (exact) {
        memmove(&m->item[i], &m->item[i + 1], (m->n - i - 1) * sizeof(*m->item));
        m->n--;
    }
    return exact;
}

static inline void tmodel_copy(struct tmodel *to, const struct tmodel *from)
{
    to->item = xrealloc(to->item, (from->n + 1) * sizeof(*to->item));
    to->cap = from->n + 1;
    to->n = from->n;
    if (from->n)
        memcpy(to->item, from->item, from->n * sizeof(*to->item));
}

/* --- both --- */

struct tworld {
    struct tdisk disk;
    struct tree *tree;
    struct tmodel model;
    uint64_t rng, generation;
    size_t cache_bytes;
    struct tree_page *page; /* sealed, not yet written */
    size_t pages;
    bool sealed;
    uint8_t *freed; /* places that become free when that is written */
    struct disk_ptr sealed_root;
    unsigned sealed_level;
    /* The newest written state. */
    bool written;
    struct disk_ptr root;
    unsigned level;
    struct tmodel sealed_model, written_model;
    size_t leaves, leaf_bytes, empty_leaves, nodes; /* of the last tw_verify */
};

static inline struct tree_io tw_io(struct tworld *w)
{
    return (struct tree_io){tdisk_read, &w->disk};
}

static inline void tw_init(struct tworld *w, uint64_t seed, size_t cache_bytes, unsigned places)
{
    struct tree_io io;

    *w = (struct tworld){.rng = tw_mix(seed), .generation = 1, .cache_bytes = cache_bytes};
    w->disk.places = places;
    w->disk.alloc_left = -1;
    w->disk.state = xcalloc(places, 1);
    w->freed = xcalloc(places, 1);
    w->disk.cipher = xcalloc(places, sizeof(*w->disk.cipher));
    io = tw_io(w);
    w->tree = tree_new(&io, cache_bytes);
}

static inline void tw_free(struct tworld *w)
{
    tree_free(w->tree);
    tree_pages_free(w->page, w->pages);
    for (unsigned k = 0; k < w->disk.places; k++)
        free(w->disk.cipher[k]);
    free(w->disk.cipher);
    free(w->disk.state);
    free(w->freed);
    free(w->model.item);
    free(w->sealed_model.item);
    free(w->written_model.item);
    *w = (struct tworld){0};
}

static inline bool tw_same(const struct titem *item, const struct tree_key *key, const uint8_t *value, size_t len)
{
    uint8_t expect[ITEM_VALUE_MAX];
    size_t n = tw_value(item->key.kind, item->seed, expect);

    return tree_key_cmp(&item->key, key) == 0 && n == len && (n == 0 || memcmp(expect, value, n) == 0);
}

/* Is rc what a reading call may return? True when the result is there to be compared. */
static inline bool tw_readable(struct tworld *w, int rc)
{
    if (rc != -EIO)
        return true;
    TW_MUST(w->disk.fail || w->disk.fail_addr);
    return false;
}

static inline void tw_put(struct tworld *w, const struct tree_key *key, uint32_t seed)
{
    uint8_t value[ITEM_VALUE_MAX];
    size_t len = tw_value(key->kind, seed, value);
    int rc = tree_put(w->tree, key, value, len);

    if (!tw_readable(w, rc))
        return;
    TW_MUST(rc == 0);
    tmodel_put(&w->model, key, seed);
}

static inline void tw_del(struct tworld *w, const struct tree_key *key)
{
    int rc = tree_del(w->tree, key);

    if (!tw_readable(w, rc))
        return;
    TW_MUST(rc == (tmodel_del(&w->model, key) ? 0 : -ENOENT));
}

static inline void tw_get(struct tworld *w, const struct tree_key *key)
{
    const uint8_t *value;
    size_t len, i;
    bool exact;
    int rc = tree_get(w->tree, key, &value, &len);

    if (!tw_readable(w, rc))
        return;
    i = tmodel_find(&w->model, key, &exact);
    TW_MUST(rc == (exact ? 0 : -ENOENT));
    TW_MUST(!exact || tw_same(&w->model.item[i], key, value, len));
}

static inline void tw_ge(struct tworld *w, const struct tree_key *key)
{
    struct tree_key found;
    const uint8_t *value;
    size_t len, i;
    bool exact;
    int rc = tree_ge(w->tree, key, &found, &value, &len);

    if (!tw_readable(w, rc))
        return;
    i = tmodel_find(&w->model, key, &exact);
    TW_MUST(rc == (i < w->model.n ? 0 : -ENOENT));
    TW_MUST(rc < 0 || tw_same(&w->model.item[i], &found, value, len));
}

static inline void tw_le(struct tworld *w, const struct tree_key *key)
{
    struct tree_key found;
    const uint8_t *value;
    size_t len, i;
    bool exact;
    int rc = tree_le(w->tree, key, &found, &value, &len);

    if (!tw_readable(w, rc))
        return;
    i = tmodel_find(&w->model, key, &exact);
    TW_MUST(rc == (exact || i > 0 ? 0 : -ENOENT));
    TW_MUST(rc < 0 || tw_same(&w->model.item[exact ? i : i - 1], &found, value, len));
}

/* Walks at most max items from key on. */
static inline void tw_walk(struct tworld *w, const struct tree_key *key, size_t max)
{
    struct tree_iter it;
    bool exact;
    size_t i = tmodel_find(&w->model, key, &exact);
    int rc = tree_iter_seek(w->tree, key, &it);

    for (; rc == 0 && max; rc = tree_iter_next(&it), max--, i++)
        TW_MUST(i < w->model.n && tw_same(&w->model.item[i], &it.key, it.value, it.len));
    if (!tw_readable(w, rc))
        return;
    TW_MUST(rc == 0 || (rc == -ENOENT && i == w->model.n));
}

static inline void tw_compare(struct tworld *w)
{
    tw_walk(w, &(struct tree_key){0}, SIZE_MAX);
}

/* --- checkpoints --- */

static inline struct tree_space tw_space(struct tworld *w)
{
    return (struct tree_space){tdisk_alloc, tdisk_release, &w->disk};
}

/* Gives addresses; now and then allocation fails on the way. */
static inline void tw_assign(struct tworld *w)
{
    struct tree_space space = tw_space(w);
    uint64_t before;
    int rc;

    if (tw_below(&w->rng, 4) == 0) {
        w->disk.alloc_left = (int64_t)tw_below(&w->rng, 20);
        rc = tree_assign(w->tree, &space);
        TW_MUST(rc >= 0 || rc == -ENOSPC);
        w->disk.alloc_left = -1;
    }
    before = w->disk.allocs;
    rc = tree_assign(w->tree, &space);
    TW_MUST(rc >= 0 && (uint64_t)rc == w->disk.allocs - before);
    TW_MUST(tree_assign(w->tree, &space) == 0 && w->disk.allocs == before + (uint64_t)rc);
}

/* All dirty nodes have addresses. */
static inline void tw_seal(struct tworld *w)
{
    TW_MUST(!w->sealed);
    TW_MUST(tree_seal(w->tree, w->generation, tdisk_seal, &w->disk, &w->page, &w->pages, &w->sealed_root,
                      &w->sealed_level) == 0);
    TW_MUST(tree_dirty_nodes(w->tree) == 0);
    w->generation++;
    w->sealed = true;
    for (unsigned k = 0; k < w->disk.places; k++)
        w->freed[k] = w->disk.state[k] == PLACE_RELEASED;
    tmodel_copy(&w->sealed_model, &w->model);
}

static inline void tw_write(struct tworld *w)
{
    TW_MUST(w->sealed);
    for (size_t i = 0; i < w->pages; i++) {
        unsigned k = tdisk_place(&w->disk, w->page[i].addr);

        TW_MUST(w->disk.state[k] != PLACE_FREE && !w->disk.cipher[k]);
        w->disk.cipher[k] = xmalloc(NODE_BYTES);
        memcpy(w->disk.cipher[k], w->page[i].cipher, NODE_BYTES);
    }
    tree_pages_free(w->page, w->pages);
    w->page = NULL;
    w->pages = 0;
    for (unsigned k = 0; k < w->disk.places; k++) {
        if (!w->freed[k])
            continue;
        w->disk.state[k] = PLACE_FREE;
        free(w->disk.cipher[k]);
        w->disk.cipher[k] = NULL;
    }
    tree_written(w->tree);
    w->sealed = false;
    w->written = true;
    w->root = w->sealed_root;
    w->level = w->sealed_level;
    tmodel_copy(&w->written_model, &w->sealed_model);
}

/* --- the written state, read without the tree's code --- */

struct tverify {
    struct tworld *w;
    uint8_t *seen;
    size_t i; /* of the model */
};

static inline void tverify_leaf(struct tverify *v, const uint8_t *page, unsigned count)
{
    const struct disk_slot *slot = (const struct disk_slot *)(page + sizeof(struct disk_node));

    for (unsigned s = 0; s < count; s++) {
        const uint8_t *item = page + le16_get(slot[s].off);
        struct tree_key key;

        tree_key_decode((const struct disk_key *)item, &key);
        TW_MUST(v->i < v->w->written_model.n);
        TW_MUST(tw_same(&v->w->written_model.item[v->i], &key, item + sizeof(struct disk_key),
                        le16_get(slot[s].len) - sizeof(struct disk_key)));
        v->i++;
    }
}

/* low: no key below the node is less; leftmost: of its level. */
static inline void tverify_node(struct tverify *v, const struct disk_ptr *ptr, unsigned level,
                                const struct disk_key *low, const struct disk_key *high, bool leftmost)
{
    static const struct disk_key lowest;
    unsigned place = tdisk_place(&v->w->disk, le64_get(ptr->addr)), count;
    uint8_t *page = xmalloc(NODE_BYTES);
    const struct disk_node *head = (const struct disk_node *)page;
    const struct disk_slot *slot = (const struct disk_slot *)(page + sizeof(*head));
    char why[200];

    TW_MUST(!v->seen[place] && v->w->disk.state[place] == PLACE_LIVE);
    v->seen[place] = 1;
    v->w->nodes++;
    TW_MUST(tdisk_read(&v->w->disk, ptr, level, page) == 0);
    if (tree_check_page(page, le64_get(ptr->addr), le64_get(ptr->birth), level, why, sizeof(why)) < 0)
        tw_die("a written node: %s", why);
    count = le16_get(head->count);
    TW_MUST(le16_get(head->items_start) == NODE_BYTES - le16_get(head->items_bytes));
    for (size_t k = sizeof(*head) + count * sizeof(*slot); k < le16_get(head->items_start); k++)
        TW_MUST(page[k] == 0);
    for (unsigned s = 0; s < count; s++) {
        const struct disk_key *key = (const struct disk_key *)(page + le16_get(slot[s].off));

        TW_MUST(memcmp(key, low, sizeof(*key)) >= 0 && (!high || memcmp(key, high, sizeof(*key)) < 0));
    }
    if (level == 0) {
        v->w->leaves++;
        v->w->leaf_bytes += le16_get(head->items_bytes) + count * sizeof(*slot);
        v->w->empty_leaves += count == 0;
        tverify_leaf(v, page, count);
    }
    for (unsigned s = 0; level && s < count; s++) {
        const struct disk_key *key = (const struct disk_key *)(page + le16_get(slot[s].off));
        const struct disk_key *next =
            s + 1 < count ? (const struct disk_key *)(page + le16_get(slot[s + 1].off)) : high;

        TW_MUST(s || !leftmost || memcmp(key, &lowest, sizeof(lowest)) == 0);
        tverify_node(v, (const struct disk_ptr *)(key + 1), level - 1, key, next, leftmost && s == 0);
    }
    free(page);
}

/* The newest written state is well formed, holds what the model held, and no other place is live. */
static inline void tw_verify(struct tworld *w)
{
    static const struct disk_key lowest;
    struct tverify v = {.w = w, .seen = xcalloc(w->disk.places, 1)};

    TW_MUST(w->written && !w->sealed);
    w->leaves = w->leaf_bytes = w->empty_leaves = w->nodes = 0;
    tverify_node(&v, &w->root, w->level, &lowest, NULL, true);
    TW_MUST(v.i == w->written_model.n);
    for (unsigned k = 0; k < w->disk.places; k++)
        TW_MUST(v.seen[k] == (w->disk.state[k] == PLACE_LIVE));
    free(v.seen);
}

static inline void tw_checkpoint(struct tworld *w)
{
    tw_assign(w);
    tw_seal(w);
    tw_write(w);
}

/* Forgets memory: opens the newest written state, which must be the whole one (nothing changed since). */
static inline void tw_reopen(struct tworld *w)
{
    struct tree_io io = tw_io(w);

    TW_MUST(w->written && !w->sealed && tree_dirty_nodes(w->tree) == 0);
    tree_free(w->tree);
    w->tree = NULL;
    TW_MUST(tree_load(&io, w->cache_bytes, &w->root, w->level, &w->tree) == 0);
    tmodel_copy(&w->model, &w->written_model);
}

#endif
