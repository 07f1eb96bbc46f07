/* snapshot.c - see snapshot.h. */
#include "fs/volume/snapshot.h"

#include "fs/volume/checkpoint.h"
#include "fs/volume/node.h"
#include "fs/volume/space.h"
#include "fs/volume/tx.h"
#include "fs/volume/view.h"

#include <stdlib.h>

#define CACHE_BYTES (256u << 10) /* of a snapshot's tree, while its bitmaps are read */

bool volume_snapshot_name_ok(const char *name)
{
    return snapshot_name_ok(name, strnlen(name, VOLUME_SNAPSHOT_NAME + 1));
}

/* --- items --- */

static void decode(uint64_t generation, const uint8_t *value, struct snapshot *ret)
{
    const struct disk_snapshot *d = (const struct disk_snapshot *)value;

    *ret = (struct snapshot){.generation = generation,
                             .created = (int64_t)le64_get(d->created),
                             .root = d->root,
                             .root_level = le32_get(d->root_level),
                             .data_units = le64_get(d->data_units),
                             .used_units = le64_get(d->used_units),
                             .next_inode = le64_get(d->next_inode),
                             .next_extent = le64_get(d->next_extent),
                             .inodes = le64_get(d->inodes)};
    memcpy(ret->name, d + 1, d->namelen); /* the node's check has looked at it */
}

/* The state of a superblock. */
static size_t encode(const struct disk_super *s, const char *name, int64_t now, uint8_t *out)
{
    struct disk_snapshot d = {.root = s->root,
                              .root_level = s->root_level,
                              .namelen = (uint8_t)strlen(name),
                              .created = le64_make((uint64_t)now),
                              .data_units = s->data_units,
                              .used_units = s->used_units,
                              .next_inode = s->next_inode,
                              .next_extent = s->next_extent,
                              .inodes = s->inodes};

    memcpy(out, &d, sizeof(d));
    memcpy(out + sizeof(d), name, d.namelen);
    return sizeof(d) + d.namelen;
}

void snapshot_super(const struct snapshot *s, struct disk_super *super)
{
    super->root = s->root;
    super->root_level = le32_make(s->root_level);
    super->generation = le64_make(s->generation);
    super->data_units = le64_make(s->data_units);
    super->used_units = le64_make(s->used_units);
    super->next_inode = le64_make(s->next_inode);
    super->next_extent = le64_make(s->next_extent);
    super->inodes = le64_make(s->inodes);
}

/* What a lookup came to. */
static int found(int rc, const struct tree_key *key, const uint8_t *value, struct snapshot *ret)
{
    if (rc < 0)
        return rc;
    if (key->kind != ITEM_SNAPSHOT)
        return -ENOENT;
    decode(key->a, value, ret);
    return 0;
}

int snapshot_next(struct tree *t, uint64_t from, struct snapshot *ret)
{
    struct tree_key at = tree_key(ITEM_SNAPSHOT, from, 0), key;
    const uint8_t *value;
    size_t len;
    int rc = tree_ge(t, &at, &key, &value, &len);

    return found(rc, &key, value, ret);
}

int snapshot_before(struct tree *t, uint64_t below, struct snapshot *ret)
{
    struct tree_key at = tree_key(ITEM_SNAPSHOT, below - 1, UINT64_MAX), key;
    const uint8_t *value;
    size_t len;
    int rc = tree_le(t, &at, &key, &value, &len);

    return found(rc, &key, value, ret);
}

int snapshot_find(struct tree *t, const char *name, struct snapshot *ret)
{
    int rc;

    for (rc = snapshot_next(t, 0, ret); rc == 0; rc = snapshot_next(t, ret->generation + 1, ret))
        if (strcmp(ret->name, name) == 0)
            return 0;
    return rc;
}

/* --- what they hold --- */

struct kept_tree {
    struct volume *v;
    struct tree *tree; /* NULL: its root cannot be read */
    uint64_t regions;
    char name[SNAPSHOT_NAME_MAX + 1];
    uint8_t *found; /* where SPACE items cannot be read: bitmap of the units of all that can */
    bool unread;    /* the disk did not say what is there: it may tomorrow */
};

static int read_node(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct kept_tree *t = ctx;
    int rc = volume_read_node(t->v, ptr, level, page);

    t->unread |= rc < 0 && rc != -EBADMSG;
    return rc < 0 ? -EIO : 0;
}

static void close_all(struct kept_tree *trees, int n)
{
    for (int i = 0; i < n; i++) {
        tree_free(trees[i].tree);
        free(trees[i].found);
    }
    free(trees);
}

/* The trees of all snapshots; *ret is malloc'ed. Returns their number or -EIO. */
static int open_all(struct volume *v, struct kept_tree **ret)
{
    struct kept_tree *trees = xcalloc(VOLUME_SNAPSHOTS_MAX, sizeof(*trees));
    struct snapshot s;
    int n = 0, rc;

    pthread_rwlock_rdlock(&v->state);
    for (rc = snapshot_next(v->tree, 0, &s); rc == 0 && n < VOLUME_SNAPSHOTS_MAX;
         rc = snapshot_next(v->tree, s.generation + 1, &s)) {
        struct kept_tree *t = &trees[n++];
        struct tree_io io = {read_node, t};

        t->v = v;
        /* Not more than there is, so that what an item says takes no memory. */
        t->regions = MIN(s.data_units / REGION_UNITS, space_regions(v->space));
        memcpy(t->name, s.name, sizeof(t->name));
        if (tree_load(&io, CACHE_BYTES, &s.root, s.root_level, &t->tree) < 0)
            t->tree = NULL;
    }
    pthread_rwlock_unlock(&v->state);
    *ret = trees;
    if (rc == -ENOENT)
        return n;
    close_all(trees, n);
    *ret = NULL;
    return -EIO;
}

static void mark(struct kept_tree *t, uint64_t addr, uint64_t units)
{
    for (uint64_t u = addr; u < addr + units && u < t->regions * REGION_UNITS; u++)
        t->found[u / 8] |= (uint8_t)(1u << (u % 8));
}

static int mark_node(void *ctx, uint64_t addr, unsigned level, int err)
{
    (void)level, (void)err;
    mark(ctx, addr, NODE_UNITS);
    return 0;
}

/* All that can be read of a damaged snapshot is what needs to be kept of it. */
static void find_needs(struct kept_tree *t)
{
    struct tree_key at = tree_key(ITEM_EXTENT, 0, 0);
    struct tree_iter it;
    struct extent e;
    int rc = 0;

    volume_damage(t->v, "data: the snapshot %s is damaged: check says where", t->name);
    t->found = xcalloc(t->regions, REGION_UNITS / 8);
    if (!t->tree)
        return;
    tree_visit(t->tree, mark_node, t);
    while (rc == 0) {
        for (rc = tree_iter_seek(t->tree, &at, &it); rc == 0 && it.key.kind == ITEM_EXTENT; rc = tree_iter_next(&it)) {
            at = it.key;
            at.b++;
            if (extent_decode(it.key.a, it.value, it.len, &e) < 0)
                continue;
            for (unsigned i = 0; i < e.chunks; i++)
                if (e.ref[i])
                    mark(t, e.addr + (uint64_t)i * t->v->block_units, t->v->block_units);
        }
        if (rc == 0)
            break;
        rc = rc == -EIO ? tree_behind(t->tree, &at, &at) : rc;
        if (tree_wants_trim(t->tree))
            tree_trim(t->tree);
    }
}

/* The bitmap of a region, in the tree or found; NULL: that is not known. */
static const uint8_t *needs_of(struct kept_tree *t, uint64_t region)
{
    struct tree_key key = tree_key(ITEM_SPACE, region, 0);
    const uint8_t *bitmap;
    size_t len;

    if (!t->found) {
        if (t->tree && tree_get(t->tree, &key, &bitmap, &len) == 0)
            return bitmap;
        find_needs(t);
    }
    return t->unread ? NULL : t->found + region * (REGION_UNITS / 8);
}

/* The units of a region that any of them needs. -EIO: that is not known. */
static int region_needs(struct kept_tree *trees, int n, uint64_t region, uint8_t needs[REGION_UNITS / 8])
{
    memset(needs, 0, REGION_UNITS / 8);
    for (int i = 0; i < n; i++) {
        struct kept_tree *t = &trees[i];
        const uint8_t *bitmap;

        if (region >= t->regions)
            continue;
        bitmap = needs_of(t, region);
        if (!bitmap)
            return -EIO;
        for (unsigned k = 0; k < REGION_UNITS / 8; k++)
            needs[k] |= bitmap[k];
        if (t->tree && tree_wants_trim(t->tree))
            tree_trim(t->tree);
    }
    return 0;
}

/* [snapshot_mutex] Makes space.c hold just what the snapshots need: more (when a volume is opened), or less. -EIO: not known. */
static int hold_all(struct volume *v, void (*hold)(struct space *s, uint64_t region, const uint8_t *bitmap))
{
    struct kept_tree *trees;
    uint8_t needs[REGION_UNITS / 8];
    int n = open_all(v, &trees), rc = MIN(n, 0);

    for (uint64_t k = 0; rc == 0 && k < space_regions(v->space); k++) {
        rc = region_needs(trees, n, k, needs);
        if (rc == 0)
            hold(v->space, k, needs);
    }
    close_all(trees, MAX(n, 0));
    return rc;
}

int snapshots_hold(struct volume *v)
{
    int rc = hold_all(v, space_keep);

    if (rc < 0) {
        volume_damage(v, "data: what the snapshots need cannot be read: the volume is read-only");
        v->read_only = true;
    }
    return 0;
}

/* --- making and removing --- */

static int hold_region(void *ctx, const struct tree_iter *it)
{
    struct volume *v = ctx;

    if (it->key.kind != ITEM_SPACE)
        return 1;
    space_keep(v->space, it->key.a, it->value);
    return 0;
}

/* [snapshot_mutex] -EEXIST, -EMFILE, -EIO. */
static int check_new(struct volume *v, const char *name)
{
    struct snapshot s;
    unsigned n = 0;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    for (rc = snapshot_next(v->tree, 0, &s); rc == 0 && strcmp(s.name, name) != 0; n++)
        rc = snapshot_next(v->tree, s.generation + 1, &s);
    pthread_rwlock_unlock(&v->state);
    if (rc != -ENOENT)
        return rc < 0 ? rc : -EEXIST;
    return n < VOLUME_SNAPSHOTS_MAX ? 0 : -EMFILE;
}

/* [snapshot_mutex] The view's generation gets the name. */
static int put_item(struct volume *v, const struct view *w, const char *name)
{
    struct tree_key key = tree_key(ITEM_SNAPSHOT, w->generation, 0);
    uint8_t value[sizeof(struct disk_snapshot) + SNAPSHOT_NAME_MAX];
    struct tx tx;
    int rc = tx_begin(v, &tx, TX_GROWS);

    if (rc < 0)
        return rc;
    rc = tx_put(&tx, &key, value, encode(&w->super, name, tx.now, value));
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

int volume_snapshot_create(struct volume *v, const char *name)
{
    struct view w;
    int rc;

    if (!volume_snapshot_name_ok(name))
        return -EINVAL;
    if (v->read_only)
        return -EROFS;
    pthread_mutex_lock(&v->snapshot_mutex);
    rc = check_new(v, name);
    if (rc < 0)
        goto out;
    /* Before the item can be in any superblock. */
    pthread_mutex_lock(&v->checkpoint_mutex);
    v->super.incompat = le32_make(le32_get(v->super.incompat) | FEATURE_SNAPSHOTS);
    pthread_mutex_unlock(&v->checkpoint_mutex);
    rc = view_open(v, true, &w);
    if (rc < 0)
        goto out;
    if (w.live)
        rc = -EIO; /* it has failed meanwhile */
    if (rc == 0)
        rc = view_walk(&w, &(struct tree_key){.kind = ITEM_SPACE}, hold_region, v);
    if (rc >= 0)
        rc = view_stale(&w) ? -EBUSY : put_item(v, &w, name);
    view_close(&w);
    if (rc < 0 && !v->failed)
        hold_all(v, space_keep_only);
    if (rc == 0)
        rc = checkpoint_run(v, CHECKPOINT_FORCE);
out:
    pthread_mutex_unlock(&v->snapshot_mutex);
    return rc;
}

static bool is_read(const struct volume *v, uint64_t generation)
{
    for (unsigned i = 0; i < SNAPSHOT_VIEWS; i++)
        if (v->reading[i] == generation)
            return true;
    return false;
}

int volume_snapshot_remove(struct volume *v, const char *name)
{
    struct snapshot s;
    struct tx tx;
    int rc;

    if (v->read_only)
        return -EROFS;
    pthread_mutex_lock(&v->snapshot_mutex);
    pthread_rwlock_rdlock(&v->state);
    rc = snapshot_find(v->tree, name, &s);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && is_read(v, s.generation))
        rc = -EBUSY;
    if (rc == 0)
        rc = tx_begin(v, &tx, TX_LAST);
    if (rc == 0) {
        rc = tx_del(&tx, &(struct tree_key){.kind = ITEM_SNAPSHOT, .a = s.generation});
        rc = rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
    }
    if (rc == 0)
        rc = hold_all(v, space_keep_only);
    /* Its space is free after this. */
    if (rc == 0)
        rc = checkpoint_run(v, CHECKPOINT_FORCE);
    pthread_mutex_unlock(&v->snapshot_mutex);
    return rc;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct volume_snapshot *)a)->name, ((const struct volume_snapshot *)b)->name);
}

int volume_snapshot_list(struct volume *v, int (*fn)(void *ctx, const struct volume_snapshot *s), void *ctx)
{
    struct volume_snapshot *list = xcalloc(VOLUME_SNAPSHOTS_MAX, sizeof(*list));
    struct snapshot s;
    size_t n = 0;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    for (rc = snapshot_next(v->tree, 0, &s); rc == 0 && n < VOLUME_SNAPSHOTS_MAX; n++) {
        list[n] = (struct volume_snapshot){
            .created = s.created, .generation = s.generation, .used = s.used_units * UNIT_BYTES};
        memcpy(list[n].name, s.name, sizeof(s.name));
        rc = snapshot_next(v->tree, s.generation + 1, &s);
    }
    pthread_rwlock_unlock(&v->state);
    rc = rc == -ENOENT || rc == 0 ? 0 : rc;
    qsort(list, n, sizeof(*list), by_name);
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = fn(ctx, &list[i]);
    free(list);
    return rc;
}
