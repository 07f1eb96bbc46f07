/*
 * tree.c - see tree.h. Owns the loaded nodes.
 *
 * Invariants:
 *  1. A loaded node's parent is loaded; parent->kid[i] is the node of slot i, or NULL when that is not loaded.
 *  2. A dirty node's parent is dirty.
 *  3. A node that was never sealed (no ptr) is dirty.
 *  4. A node's first key is not above any key below it; on each level's left edge it is the lowest key there is.
 *  5. What is below a loaded leaf's range stays below a loaded leaf until tree_trim: nodes are merged with, and leave
 * their range to, loaded ones only. This is what tree_prefetch promises.
 *
 * Under the shared lock nodes are only added (load_mutex; a kid pointer is published with release order); they change
 * and go only under the exclusive lock.
 */
#include "fs/volume/node.h"

#include <assert.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define KIDS_MAX 256 /* more than an inner node has slots */

_Static_assert((NODE_BYTES - sizeof(struct disk_node)) /
                       (sizeof(struct disk_slot) + sizeof(struct disk_key) + sizeof(struct disk_ptr)) <
                   KIDS_MAX,
               "KIDS_MAX");

struct node {
    struct node *parent;
    struct node *prev, *next; /* all loaded nodes, a ring for the clock */
    _Atomic(struct node *) *kid;
    _Atomic unsigned kids_loaded;
    struct disk_ptr ptr; /* of the sealed version */
    bool sealed;         /* there is one */
    bool dirty, assigned;
    _Atomic bool referenced;
    uint64_t new_addr; /* when assigned */
    unsigned last;     /* slot of the last insert, and how many before it were made side by side: */
    int run;           /* positive: rising, negative: falling. A hint for splitting, no more */
    uint8_t page[NODE_BYTES];
};

struct tree {
    struct tree_io io;
    struct node *root;
    pthread_mutex_t load_mutex;
    struct node *clock; /* hand; any loaded node */
    _Atomic size_t nodes, dirty;
    size_t cache_nodes;     /* clean nodes wanted at most */
    _Atomic size_t trim_at; /* clean nodes from which trimming is worth trying */
    uint64_t unwritten;     /* birth of nodes that tree_written has not confirmed, or 0 */
    uint64_t *dropped;      /* addresses of nodes that are not in the tree any more */
    size_t ndropped, dropped_cap;
};

/* --- nodes in memory --- */

static struct node *node_alloc(unsigned level)
{
    struct node *n = xcalloc(1, sizeof(*n));

    if (level)
        n->kid = xcalloc(KIDS_MAX, sizeof(*n->kid));
    return n;
}

static void node_dispose(struct node *n)
{
    if (!n)
        return;
    free((void *)n->kid);
    explicit_bzero(n->page, sizeof(n->page));
    free(n);
}

/* [X or load_mutex] */
static void ring_add(struct tree *t, struct node *n)
{
    if (!t->clock) {
        n->prev = n->next = n;
        t->clock = n;
    } else {
        n->next = t->clock;
        n->prev = t->clock->prev;
        n->prev->next = n;
        n->next->prev = n;
    }
    t->nodes++;
}

static void ring_remove(struct tree *t, struct node *n)
{
    if (t->clock == n)
        t->clock = n->next == n ? NULL : n->next;
    n->prev->next = n->next;
    n->next->prev = n->prev;
    t->nodes--;
}

static struct node *kid_of(const struct node *n, unsigned i)
{
    return atomic_load_explicit(&n->kid[i], memory_order_acquire);
}

static void set_kid(struct node *n, unsigned i, struct node *kid)
{
    atomic_store_explicit(&n->kid[i], kid, memory_order_release);
}

static unsigned slot_of(const struct node *kid)
{
    unsigned i = 0;

    while (kid_of(kid->parent, i) != kid)
        i++;
    return i;
}

static struct tree *tree_alloc(const struct tree_io *io, size_t cache_bytes)
{
    struct tree *t = xcalloc(1, sizeof(*t));

    t->io = *io;
    t->cache_nodes = MAX(cache_bytes / sizeof(struct node), 8);
    t->trim_at = t->cache_nodes;
    pthread_mutex_init(&t->load_mutex, NULL);
    return t;
}

static struct node *new_node(struct tree *t, unsigned level)
{
    struct node *n = node_alloc(level);

    node_init(n->page, level);
    n->dirty = true;
    t->dirty++;
    ring_add(t, n);
    return n;
}

struct tree *tree_new(const struct tree_io *io, size_t cache_bytes)
{
    struct tree *t = tree_alloc(io, cache_bytes);

    t->root = new_node(t, 0);
    return t;
}

void tree_free(struct tree *t)
{
    if (!t)
        return;
    while (t->clock) {
        struct node *n = t->clock;

        ring_remove(t, n);
        node_dispose(n);
    }
    pthread_mutex_destroy(&t->load_mutex);
    free(t->dropped);
    free(t);
}

/* --- loading --- */

/* Reads and checks the node at ptr; not in the tree yet. */
static int read_node(struct tree *t, const struct disk_ptr *ptr, unsigned level, struct node **ret)
{
    struct node *n;
    char why[160];
    int rc;

    if (level > NODE_LEVEL_MAX)
        return -EIO;
    n = node_alloc(level);
    rc = t->io.read_node(t->io.ctx, ptr, level, n->page);
    if (rc == 0 && tree_check_page(n->page, le64_get(ptr->addr), le64_get(ptr->birth), level, why, sizeof(why)) < 0)
        rc = -EIO;
    if (rc < 0) {
        node_dispose(n);
        return rc;
    }
    n->ptr = *ptr;
    n->sealed = true;
    *ret = n;
    return 0;
}

/* Are all keys of kid between the key of slot i and the next one's? */
static bool kid_in_place(const struct node *parent, unsigned i, const struct node *kid)
{
    unsigned count = node_count(kid->page);

    if (count == 0)
        return node_level(kid->page) == 0; /* an only leaf of its parent stays, empty */
    if (memcmp(node_key(kid->page, 0), node_key(parent->page, i), sizeof(struct disk_key)) < 0)
        return false;
    return i + 1 == node_count(parent->page) ||
           memcmp(node_key(kid->page, count - 1), node_key(parent->page, i + 1), sizeof(struct disk_key)) < 0;
}

static int read_kid(struct tree *t, struct node *parent, unsigned i, struct node **ret)
{
    struct disk_ptr ptr;
    size_t len;
    int rc;

    memcpy(&ptr, node_value(parent->page, i, &len), sizeof(ptr));
    rc = read_node(t, &ptr, node_level(parent->page) - 1, ret);
    if (rc == 0 && !kid_in_place(parent, i, *ret)) {
        node_dispose(*ret);
        rc = -EIO;
    }
    return rc;
}

/* [S] The node of slot i, loaded. */
static int get_kid(struct tree *t, struct node *parent, unsigned i, struct node **ret)
{
    struct node *n = kid_of(parent, i);
    int rc = 0;

    if (!n) {
        pthread_mutex_lock(&t->load_mutex);
        n = kid_of(parent, i);
        if (!n)
            rc = read_kid(t, parent, i, &n);
        if (rc == 0 && !n->parent) {
            n->parent = parent;
            parent->kids_loaded++;
            ring_add(t, n);
            set_kid(parent, i, n);
        }
        pthread_mutex_unlock(&t->load_mutex);
    }
    if (rc == 0) {
        if (!atomic_load_explicit(&n->referenced, memory_order_relaxed))
            atomic_store_explicit(&n->referenced, true, memory_order_relaxed);
        *ret = n;
    }
    return rc;
}

int tree_load(const struct tree_io *io, size_t cache_bytes, const struct disk_ptr *ptr, unsigned level,
              struct tree **ret_tree)
{
    struct tree *t = tree_alloc(io, cache_bytes);
    int rc = read_node(t, ptr, level, &t->root);

    if (rc < 0) {
        tree_free(t);
        return rc;
    }
    ring_add(t, t->root);
    *ret_tree = t;
    return 0;
}

/* --- finding --- */

/* The slot of an inner node below which key is. */
static unsigned inner_slot(const struct node *n, const struct disk_key *key)
{
    bool exact;
    unsigned i = node_search(n->page, key, &exact);

    return exact || i == 0 ? i : i - 1;
}

/* [S] The leaf for key, with the path to it in it->node and it->slot (of inner nodes). */
static int descend(struct tree *t, const struct disk_key *key, struct tree_iter *it)
{
    struct node *n = t->root;

    it->tree = t;
    it->levels = 0;
    for (;;) {
        unsigned d = it->levels++;
        int rc;

        it->node[d] = n;
        if (node_level(n->page) == 0)
            return 0;
        it->slot[d] = inner_slot(n, key);
        rc = get_kid(t, n, it->slot[d], &n);
        if (rc < 0)
            return rc;
    }
}

static void take_item(struct tree_iter *it)
{
    struct node *leaf = it->node[it->levels - 1];
    unsigned i = it->slot[it->levels - 1];

    tree_key_decode(node_key(leaf->page, i), &it->key);
    it->value = node_value(leaf->page, i, &it->len);
}

/* Goes down to the first (or last) leaf below depth d's current slot. */
static int descend_edge(struct tree_iter *it, unsigned d, bool last)
{
    struct node *n = it->node[d];

    it->levels = d + 1;
    while (node_level(n->page)) {
        int rc = get_kid(it->tree, n, it->slot[it->levels - 1], &n);

        if (rc < 0)
            return rc;
        it->node[it->levels] = n;
        it->slot[it->levels] = last && node_count(n->page) ? node_count(n->page) - 1 : 0;
        it->levels++;
    }
    return 0;
}

/* Moves to the first item of the next leaves while the place is behind the leaf's end. */
static int skip_forward(struct tree_iter *it)
{
    while (it->slot[it->levels - 1] >= node_count(((struct node *)it->node[it->levels - 1])->page)) {
        unsigned d = it->levels - 1;
        int rc;

        do {
            if (d-- == 0)
                return -ENOENT;
        } while (it->slot[d] + 1 >= node_count(((struct node *)it->node[d])->page));
        it->slot[d]++;
        rc = descend_edge(it, d, false);
        if (rc < 0)
            return rc;
    }
    take_item(it);
    return 0;
}

int tree_iter_seek(struct tree *t, const struct tree_key *key, struct tree_iter *it)
{
    struct disk_key k;
    bool exact;
    int rc;

    tree_key_encode(key, &k);
    rc = descend(t, &k, it);
    if (rc < 0)
        return rc;
    it->slot[it->levels - 1] = node_search(((struct node *)it->node[it->levels - 1])->page, &k, &exact);
    return skip_forward(it);
}

int tree_iter_next(struct tree_iter *it)
{
    it->slot[it->levels - 1]++;
    return skip_forward(it);
}

int tree_get(struct tree *t, const struct tree_key *key, const uint8_t **ret_value, size_t *ret_len)
{
    struct tree_iter it;
    struct disk_key k;
    struct node *leaf;
    bool exact;
    unsigned i;
    int rc;

    tree_key_encode(key, &k);
    rc = descend(t, &k, &it);
    if (rc < 0)
        return rc;
    leaf = it.node[it.levels - 1];
    i = node_search(leaf->page, &k, &exact);
    if (!exact)
        return -ENOENT;
    *ret_value = node_value(leaf->page, i, ret_len);
    return 0;
}

int tree_ge(struct tree *t, const struct tree_key *key, struct tree_key *ret_key, const uint8_t **ret_value,
            size_t *ret_len)
{
    struct tree_iter it;
    int rc = tree_iter_seek(t, key, &it);

    if (rc < 0)
        return rc;
    *ret_key = it.key;
    *ret_value = it.value;
    *ret_len = it.len;
    return 0;
}

int tree_le(struct tree *t, const struct tree_key *key, struct tree_key *ret_key, const uint8_t **ret_value,
            size_t *ret_len)
{
    struct tree_iter it;
    struct disk_key k;
    bool exact;
    unsigned i;
    int rc;

    tree_key_encode(key, &k);
    rc = descend(t, &k, &it);
    if (rc < 0)
        return rc;
    i = node_search(((struct node *)it.node[it.levels - 1])->page, &k, &exact);
    while (!exact && i == 0) {
        unsigned d = it.levels - 1;

        do {
            if (d-- == 0)
                return -ENOENT;
        } while (it.slot[d] == 0);
        it.slot[d]--;
        rc = descend_edge(&it, d, true);
        if (rc < 0)
            return rc;
        i = node_count(((struct node *)it.node[it.levels - 1])->page);
    }
    it.slot[it.levels - 1] = exact ? i : i - 1;
    take_item(&it);
    *ret_key = it.key;
    *ret_value = it.value;
    *ret_len = it.len;
    return 0;
}

/* --- changing --- */

static void make_dirty(struct tree *t, struct node *n)
{
    for (; n && !n->dirty; n = n->parent) {
        n->dirty = true;
        t->dirty++;
    }
}

static void drop_address(struct tree *t, uint64_t addr)
{
    if (t->ndropped == t->dropped_cap) {
        t->dropped_cap = t->dropped_cap ? t->dropped_cap * 2 : 64;
        t->dropped = xrealloc(t->dropped, t->dropped_cap * sizeof(*t->dropped));
    }
    t->dropped[t->ndropped++] = addr;
}

/* A node that is not in the tree any more. Its sealed version's address was released already if it was assigned a new
 * one. */
static void discard(struct tree *t, struct node *n)
{
    if (n->assigned)
        drop_address(t, n->new_addr);
    else if (n->sealed)
        drop_address(t, le64_get(n->ptr.addr));
    if (n->dirty)
        t->dirty--;
    ring_remove(t, n);
    node_dispose(n);
}

/* Opens (or closes) a place in the row of kids, beside the same change of the page's slots. count: slots before. */
static void kids_open(struct node *n, unsigned i, unsigned count, struct node *kid)
{
    for (unsigned k = count; k > i; k--)
        set_kid(n, k, kid_of(n, k - 1));
    set_kid(n, i, kid);
    kid->parent = n;
    n->kids_loaded++;
}

static void kids_close(struct node *n, unsigned i, unsigned count)
{
    if (kid_of(n, i))
        n->kids_loaded--;
    for (unsigned k = i; k + 1 < count; k++)
        set_kid(n, k, kid_of(n, k + 1));
    set_kid(n, count - 1, NULL);
}

/* Moves slots from .. of n, and their kids, behind those of to. */
static void move_slots(struct node *n, unsigned from, struct node *to)
{
    unsigned count = node_count(n->page), at = node_count(to->page);

    if (n->kid) {
        for (unsigned i = from; i < count; i++) {
            struct node *kid = kid_of(n, i);

            set_kid(to, at + i - from, kid);
            set_kid(n, i, NULL);
            if (!kid)
                continue;
            kid->parent = to;
            n->kids_loaded--;
            to->kids_loaded++;
        }
    }
    node_move(n->page, from, to->page);
}

/* The slot from which on the upper half by bytes begins; n has two at least. */
static unsigned middle(const struct node *n)
{
    size_t half = (NODE_BYTES - node_room(n->page)) / 2, sum = 0;
    unsigned i = 0, count = node_count(n->page);

    for (; i + 1 < count && sum < half; i++) {
        size_t len;

        node_value((uint8_t *)(uintptr_t)n->page, i, &len);
        sum += node_item_bytes(len);
    }
    return MAX(i, 1u);
}

static bool rightmost(const struct node *n)
{
    for (; n->parent; n = n->parent)
        if (slot_of(n) + 1 < node_count(n->parent->page))
            return false;
    return true;
}

#define RUN_MIN 3
#define RUN_MAX 1000

static void note_insert(struct node *n, unsigned i)
{
    if (i == n->last + 1)
        n->run = MIN(MAX(n->run, 0) + 1, RUN_MAX);
    else if (i == n->last)
        n->run = MAX(MIN(n->run, 0) - 1, -RUN_MAX);
    else
        n->run = 0;
    n->last = i;
}

/*
 * Where to split n, which is too full for an item at slot i: keys that rise or fall should leave full nodes behind. The
 * slot count splits off an empty node. That is only for a rising run or the tree's end: keys that fall towards a full
 * node would get a node each.
 */
static unsigned split_place(const struct node *n, unsigned i)
{
    unsigned count = node_count(n->page), mid = middle(n);

    if (i == count && (n->run >= RUN_MIN || rightmost(n)))
        return count;
    if (n->run >= RUN_MIN && i > mid)
        return i;
    if (n->run <= -RUN_MIN && i < mid)
        return i;
    return mid;
}

static void insert_item(struct tree *t, struct node *n, const struct disk_key *key, const void *value, size_t len,
                        struct node *kid);

/* A new root above the old one. Returns it. */
static struct node *grow_root(struct tree *t)
{
    static const struct disk_key lowest;
    static const struct disk_ptr none;
    struct node *root = new_node(t, node_level(t->root->page) + 1);

    node_insert(root->page, 0, &lowest, &none, sizeof(none));
    kids_open(root, 0, 0, t->root);
    t->root = root;
    return root;
}

/* Splits n before slot `at` (its count: the new node is empty, for an item of `key`, and takes over a rising run).
 * Returns the upper part. */
static struct node *split(struct tree *t, struct node *n, unsigned at, const struct disk_key *key)
{
    static const struct disk_ptr none;
    struct node *upper = new_node(t, node_level(n->page));
    struct disk_key first = at < node_count(n->page) ? *node_key(n->page, at) : *key;

    if (at == node_count(n->page)) {
        upper->run = n->run;
        upper->last = UINT_MAX; /* before slot 0 */
        n->run = 0;
    }
    move_slots(n, at, upper);
    insert_item(t, n->parent ? n->parent : grow_root(t), &first, &none, sizeof(none), upper);
    return upper;
}

/* Inserts an item that is not there into the dirty node n, or into one that splits off it. */
static void insert_item(struct tree *t, struct node *n, const struct disk_key *key, const void *value, size_t len,
                        struct node *kid)
{
    bool exact;
    unsigned i;

    while (node_room(n->page) < node_item_bytes(len)) {
        struct node *upper = split(t, n, split_place(n, node_search(n->page, key, &exact)), key);

        if (node_count(upper->page) == 0 || memcmp(key, node_key(upper->page, 0), sizeof(*key)) >= 0)
            n = upper;
    }
    i = node_search(n->page, key, &exact);
    node_insert(n->page, i, key, value, len);
    note_insert(n, i);
    if (kid)
        kids_open(n, i, node_count(n->page) - 1, kid);
}

int tree_prefetch(struct tree *t, const struct tree_key *key)
{
    struct tree_iter it;
    struct disk_key k;

    tree_key_encode(key, &k);
    return descend(t, &k, &it);
}

/* The inner nodes of the path, dirty, get a first key that is not above key. (Nodes written here have one; the format
 * asks only that it is not above what is below.) */
static void lower_path(struct tree_iter *it, const struct disk_key *key)
{
    for (unsigned d = 0; d + 1 < it->levels; d++) {
        struct node *n = it->node[d];

        if (memcmp(node_key(n->page, 0), key, sizeof(*key)) > 0)
            node_set_key(n->page, 0, key);
    }
}

int tree_put(struct tree *t, const struct tree_key *key, const void *value, size_t len)
{
    struct tree_iter it;
    struct disk_key k;
    struct node *leaf;
    bool exact;
    unsigned i;
    int rc;

    if (len > ITEM_VALUE_MAX)
        return -EINVAL;
    tree_key_encode(key, &k);
    rc = descend(t, &k, &it);
    if (rc < 0)
        return rc;
    leaf = it.node[it.levels - 1];
    make_dirty(t, leaf);
    i = node_search(leaf->page, &k, &exact);
    if (exact) {
        size_t old;
        uint8_t *place = node_value(leaf->page, i, &old);

        if (old == len) {
            if (len)
                memcpy(place, value, len);
            return 0;
        }
        node_remove(leaf->page, i);
        leaf->run = 0;
    }
    lower_path(&it, &k);
    insert_item(t, leaf, &k, value, len, NULL);
    return 0;
}

int tree_touch(struct tree *t, const struct tree_key *key)
{
    struct tree_iter it;
    struct disk_key k;
    struct node *leaf;
    bool exact;
    int rc;

    tree_key_encode(key, &k);
    rc = descend(t, &k, &it);
    if (rc < 0)
        return rc;
    leaf = it.node[it.levels - 1];
    node_search(leaf->page, &k, &exact);
    if (!exact)
        return -ENOENT;
    make_dirty(t, leaf);
    return 0;
}

/* Takes slot i out of the dirty inner node n; the node below it is discarded by the caller. */
static void remove_slot(struct node *n, unsigned i)
{
    unsigned count = node_count(n->page);

    node_remove(n->page, i);
    kids_close(n, i, count);
}

/* Bytes in use above which two neighbours are not merged. */
#define MERGE_MAX (NODE_BYTES * 3 / 4)
#define MERGE_LOW (NODE_BYTES / 4)

static size_t node_used(const struct node *n)
{
    return NODE_BYTES - sizeof(struct disk_node) - node_room(n->page);
}

static bool mergeable(const struct node *a, const struct node *b)
{
    return a && b && node_used(a) + node_used(b) <= MERGE_MAX;
}

/* Puts the items of parent's slot i + 1 behind those of slot i. Both are loaded; the lower one becomes dirty. */
static void merge(struct tree *t, struct node *parent, unsigned i)
{
    struct node *lower = kid_of(parent, i), *upper = kid_of(parent, i + 1);

    make_dirty(t, lower);
    move_slots(upper, 0, lower);
    remove_slot(parent, i + 1);
    discard(t, upper);
}

static void collapse_root(struct tree *t)
{
    while (node_level(t->root->page) > 0 && node_count(t->root->page) == 1 && kid_of(t->root, 0)) {
        struct node *old = t->root;

        t->root = kid_of(old, 0);
        t->root->parent = NULL;
        discard(t, old);
    }
}

/* The last (or first) leaf below n, if the way to it is loaded; n may be NULL. */
static struct node *edge_leaf(struct node *n, bool last)
{
    while (n && node_level(n->page))
        n = kid_of(n, last ? node_count(n->page) - 1 : 0);
    return n;
}

/* Slot i of parent, loaded down to its first leaf, takes over everything from key on. */
static void lower_slot(struct tree *t, struct node *parent, unsigned i, const struct disk_key *key)
{
    node_set_key(parent->page, i, key);
    for (struct node *n = kid_of(parent, i); node_level(n->page); n = kid_of(n, 0)) {
        make_dirty(t, n);
        node_set_key(n->page, 0, key);
    }
}

/*
 * Takes the empty leaf n out, with the ancestors that hold nothing else, where a loaded neighbour can take over its
 * range (invariant 5; otherwise it stays, empty). Returns the node that has a slot less, or NULL.
 */
static struct node *remove_empty(struct tree *t, struct node *n)
{
    struct node *parent, *kid;
    unsigned i;

    while (n->parent && node_count(n->parent->page) == 1)
        n = n->parent;
    parent = n->parent;
    if (!parent)
        return NULL;
    i = slot_of(n);
    if (i == 0 || !edge_leaf(kid_of(parent, i - 1), true)) {
        struct disk_key key = *node_key(parent->page, i);

        if (i + 1 == node_count(parent->page) || !edge_leaf(kid_of(parent, i + 1), false))
            return NULL;
        lower_slot(t, parent, i + 1, &key);
    }
    remove_slot(parent, i);
    for (; n; n = kid) {
        kid = n->kid ? kid_of(n, 0) : NULL;
        discard(t, n);
    }
    return parent;
}

/* n, which is dirty, has become smaller: takes it out when it is empty, merges it where that costs no reading. */
static void shrink(struct tree *t, struct node *n)
{
    while (n && n->parent && node_used(n) < MERGE_LOW) {
        struct node *parent = n->parent;
        unsigned i = slot_of(n), count = node_count(parent->page);

        if (node_count(n->page) == 0) {
            n = remove_empty(t, n);
            continue;
        }
        if (i > 0 && mergeable(kid_of(parent, i - 1), n))
            merge(t, parent, i - 1);
        else if (i + 1 < count && mergeable(n, kid_of(parent, i + 1)))
            merge(t, parent, i);
        else
            break;
        n = parent;
    }
    collapse_root(t);
}

int tree_del(struct tree *t, const struct tree_key *key)
{
    struct tree_iter it;
    struct disk_key k;
    struct node *leaf;
    bool exact;
    unsigned i;
    int rc;

    tree_key_encode(key, &k);
    rc = descend(t, &k, &it);
    if (rc < 0)
        return rc;
    leaf = it.node[it.levels - 1];
    i = node_search(leaf->page, &k, &exact);
    if (!exact)
        return -ENOENT;
    make_dirty(t, leaf);
    node_remove(leaf->page, i);
    shrink(t, leaf);
    return 0;
}

/* --- the cache --- */

size_t tree_dirty_nodes(struct tree *t)
{
    return t->dirty;
}

size_t tree_cached_nodes(struct tree *t)
{
    return t->nodes;
}

bool tree_wants_trim(struct tree *t)
{
    return t->nodes > t->dirty + t->trim_at;
}

static bool evictable(const struct tree *t, const struct node *n)
{
    return n->parent && !n->dirty && n->kids_loaded == 0 &&
           (t->unwritten == 0 || le64_get(n->ptr.birth) != t->unwritten);
}

void tree_trim(struct tree *t)
{
    size_t goal = t->cache_nodes - t->cache_nodes / 8, clean;

    /* Two rounds a level: the first takes the mark of use away. */
    for (size_t steps = 2 * (node_level(t->root->page) + 1) * t->nodes; steps && t->nodes > t->dirty + goal; steps--) {
        struct node *n = t->clock;

        t->clock = n->next;
        if (!evictable(t, n))
            continue;
        if (n->referenced) {
            n->referenced = false;
            continue;
        }
        set_kid(n->parent, slot_of(n), NULL);
        n->parent->kids_loaded--;
        ring_remove(t, n);
        assert(t->clock); /* the root stays */
        node_dispose(n);
    }
    /* What could not go now is not tried again at every call. */
    clean = t->nodes - t->dirty;
    t->trim_at = clean > t->cache_nodes ? clean + 64 : t->cache_nodes;
}

/* --- checkpoint --- */

static int assign_below(struct tree *t, struct node *n, const struct tree_space *space)
{
    int count = 0, rc;

    if (!n->assigned) {
        rc = space->alloc(space->ctx, &n->new_addr);
        if (rc < 0)
            return rc;
        n->assigned = true;
        if (n->sealed)
            space->release(space->ctx, le64_get(n->ptr.addr));
        count++;
    }
    for (unsigned i = 0; n->kid && i < node_count(n->page); i++) {
        struct node *kid = kid_of(n, i);

        if (!kid || !kid->dirty)
            continue;
        rc = assign_below(t, kid, space);
        if (rc < 0)
            return rc;
        count += rc;
    }
    return count;
}

int tree_assign(struct tree *t, const struct tree_space *space)
{
    while (t->ndropped)
        space->release(space->ctx, t->dropped[--t->ndropped]);
    return t->root->dirty ? assign_below(t, t->root, space) : 0;
}

struct sealing {
    struct tree *tree;
    uint64_t generation;
    tree_seal_fn seal;
    void *ctx;
    struct tree_page *pages;
    size_t n, cap;
};

static int seal_one(struct sealing *s, struct node *n)
{
    unsigned level = node_level(n->page);
    char why[160];
    struct tree_page *p;

    node_set_place(n->page, n->new_addr, s->generation);
    node_compact(n->page);
    if (tree_check_page(n->page, n->new_addr, s->generation, level, why, sizeof(why)) < 0)
        return -EUCLEAN;
    if (s->n == s->cap) {
        s->cap = s->cap ? s->cap * 2 : 64;
        s->pages = xrealloc(s->pages, s->cap * sizeof(*s->pages));
    }
    p = &s->pages[s->n++];
    *p = (struct tree_page){.addr = n->new_addr, .cipher = xmalloc(NODE_BYTES)};
    n->ptr.addr = le64_make(n->new_addr);
    n->ptr.birth = le64_make(s->generation);
    s->seal(s->ctx, n->new_addr, s->generation, level, n->page, p->cipher, n->ptr.nonce, n->ptr.mac);
    n->sealed = true;
    n->dirty = n->assigned = false;
    s->tree->dirty--;
    return 0;
}

static int seal_below(struct sealing *s, struct node *n)
{
    for (unsigned i = 0; n->kid && i < node_count(n->page); i++) {
        struct node *kid = kid_of(n, i);
        size_t len;
        int rc;

        if (!kid || !kid->dirty)
            continue;
        rc = seal_below(s, kid);
        if (rc < 0)
            return rc;
        memcpy(node_value(n->page, i, &len), &kid->ptr, sizeof(kid->ptr));
    }
    return seal_one(s, n);
}

int tree_seal(struct tree *t, uint64_t generation, tree_seal_fn seal, void *ctx, struct tree_page **ret_pages,
              size_t *ret_n, struct disk_ptr *ret_root, unsigned *ret_root_level)
{
    struct sealing s = {.tree = t, .generation = generation, .seal = seal, .ctx = ctx};
    int rc;

    t->unwritten = generation; /* also when it fails: what was sealed before that is in memory only */
    rc = t->root->dirty ? seal_below(&s, t->root) : 0;
    if (rc < 0) {
        tree_pages_free(s.pages, s.n);
        return rc;
    }
    *ret_pages = s.pages;
    *ret_n = s.n;
    *ret_root = t->root->ptr;
    *ret_root_level = node_level(t->root->page);
    return 0;
}

void tree_pages_free(struct tree_page *pages, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(pages[i].cipher);
    free(pages);
}

void tree_written(struct tree *t)
{
    t->unwritten = 0;
}

/* --- visiting --- */

static int visit_below(struct tree *t, struct node *n, tree_visit_fn visit, void *ctx)
{
    unsigned level = node_level(n->page);
    int rc = visit(ctx, n->dirty ? 0 : le64_get(n->ptr.addr), level, 0);

    for (unsigned i = 0; rc == 0 && level && i < node_count(n->page); i++) {
        struct node *kid = kid_of(n, i), *temporary = NULL;

        if (!kid) {
            struct disk_ptr ptr;
            size_t len;

            memcpy(&ptr, node_value(n->page, i, &len), sizeof(ptr));
            if (read_kid(t, n, i, &temporary) < 0) {
                rc = visit(ctx, le64_get(ptr.addr), level - 1, -EIO);
                continue;
            }
            kid = temporary;
        }
        rc = visit_below(t, kid, visit, ctx);
        node_dispose(temporary);
    }
    return rc;
}

int tree_visit(struct tree *t, tree_visit_fn visit, void *ctx)
{
    return visit_below(t, t->root, visit, ctx);
}

/* --- repair --- */

/* A node of that level that holds nothing, with what must be below it. The lowest key of an inner one is key. */
static struct node *empty_node(struct tree *t, unsigned level, const struct disk_key *key)
{
    static const struct disk_ptr none;
    struct node *n = new_node(t, level);

    if (level) {
        node_insert(n->page, 0, key, &none, sizeof(none));
        kids_open(n, 0, 0, empty_node(t, level - 1, key));
    }
    return n;
}

/* The first key behind what is below the path's node d. False: there is none. */
static bool next_separator(const struct tree_iter *it, unsigned d, struct disk_key *ret)
{
    for (;; d--) {
        const struct node *n = it->node[d];

        if (it->slot[d] + 1 < node_count(n->page)) {
            *ret = *node_key(n->page, it->slot[d] + 1);
            return true;
        }
        if (d == 0)
            return false;
    }
}

int tree_behind(struct tree *t, const struct tree_key *key, struct tree_key *ret_key)
{
    struct disk_key k, next;
    struct tree_iter it;

    tree_key_encode(key, &k);
    if (descend(t, &k, &it) == 0) {
        /* The walk stopped at the leaf after this one. */
        if (it.levels < 2 || !next_separator(&it, it.levels - 2, &next) || descend(t, &next, &it) == 0)
            return -ENOENT;
    }
    if (!next_separator(&it, it.levels - 1, &next))
        return -ENOENT;
    tree_key_decode(&next, ret_key);
    return 0;
}

int tree_prune(struct tree *t, tree_lost_fn lost, void *ctx)
{
    struct disk_key key = {0};

    for (;;) {
        struct tree_iter it;
        bool failed = descend(t, &key, &it)<0, more = it.levels>(failed ? 0u : 1u);
        struct disk_key next;

        /* The last node of the path with a slot: of a readable leaf its parent, else the parent of the unreadable one. */
        if (more)
            more = next_separator(&it, it.levels - (failed ? 1 : 2), &next);
        if (failed) {
            struct node *parent = it.node[it.levels - 1];
            unsigned i = it.slot[it.levels - 1], level = node_level(parent->page) - 1;
            struct disk_key lowest = *node_key(parent->page, i);
            struct tree_key lo, hi = {.kind = UINT8_MAX};
            struct disk_ptr ptr;
            size_t len;

            memcpy(&ptr, node_value(parent->page, i, &len), sizeof(ptr));
            tree_key_decode(&lowest, &lo);
            if (more)
                tree_key_decode(&next, &hi);
            make_dirty(t, parent);
            drop_address(t, le64_get(ptr.addr));
            set_kid(parent, i, empty_node(t, level, &lowest));
            kid_of(parent, i)->parent = parent;
            parent->kids_loaded++;
            lost(ctx, le64_get(ptr.addr), level, &lo, &hi);
        }
        if (!more)
            return 0;
        key = next;
        if (tree_wants_trim(t))
            tree_trim(t);
    }
}
