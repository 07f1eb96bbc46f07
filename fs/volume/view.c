/* view.c - see view.h. */
#include "fs/volume/view.h"

#include "fs/volume/checkpoint.h"
#include "fs/volume/space.h"

#include <stdio.h>

#define CACHE_BYTES (2u << 20)
#define TRIM_ITEMS  4096 /* items between looks at the cache */

static int read_node(void *ctx, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    struct view *w = ctx;
    int rc = volume_read_node(w->v, ptr, level, page);

    w->reads++;
    /* A node that another one was written over is no damage. */
    if (rc < 0 && !w->quiet && !view_stale(w))
        volume_damage(w->v, "data: tree node at unit %llu (level %u) %s", (unsigned long long)le64_get(ptr->addr),
                      level, rc == -EBADMSG ? "does not authenticate" : "cannot be read");
    return rc < 0 ? -EIO : 0;
}

int view_read_node(struct view *w, const struct disk_ptr *ptr, unsigned level, uint8_t *page)
{
    char why[160];
    int rc = read_node(w, ptr, level, page);

    if (rc == 0 && tree_check_page(page, le64_get(ptr->addr), le64_get(ptr->birth), level, why, sizeof(why)) < 0)
        rc = -EIO;
    return rc;
}

static int open_live(struct volume *v, struct view *w)
{
    pthread_rwlock_rdlock(&v->state);
    w->live = true;
    w->tree = v->tree;
    w->exact = tree_dirty_nodes(v->tree) == 0 && !space_has_pending(v->space) && !v->space_lost;
    w->regions = space_regions(v->space);
    w->used_units = space_used(v->space);
    w->inodes = v->inodes;
    w->next_inode = v->next_inode;
    w->next_extent = atomic_load(&v->next_extent);
    w->generation = v->generation;
    /* Of a failed volume nobody knows what is on the disk. */
    if (!v->failed && tree_dirty_nodes(v->tree) == 0) {
        w->generation = le64_get(v->super.generation);
        w->root = v->super.root;
        w->root_level = le32_get(v->super.root_level);
    }
    pthread_rwlock_unlock(&v->state);
    return 0;
}

/* The tree of w->super. */
static int load(struct view *w)
{
    struct tree_io io = {read_node, w};
    int rc;

    w->exact = true;
    w->generation = le64_get(w->super.generation);
    w->root = w->super.root;
    w->root_level = le32_get(w->super.root_level);
    w->regions = MIN(le64_get(w->super.data_units) / REGION_UNITS, space_regions(w->v->space));
    w->used_units = le64_get(w->super.used_units);
    w->inodes = le64_get(w->super.inodes);
    w->next_inode = le64_get(w->super.next_inode);
    w->next_extent = le64_get(w->super.next_extent);
    rc = tree_load(&io, CACHE_BYTES, &w->root, w->root_level, &w->tree);
    if (rc < 0)
        view_close(w);
    return rc;
}

int view_open(struct volume *v, bool fresh, struct view *ret_view)
{
    struct view *w = ret_view;

    *w = (struct view){.v = v};
    if (volume_changes(v) == 0 && fresh)
        checkpoint_run(v, 0);
    if (volume_changes(v) < 0)
        return open_live(v, w);
    /* Between checkpoints everything freed before the newest superblock is free already: the hold keeps the rest. */
    pthread_mutex_lock(&v->checkpoint_mutex);
    w->super = v->super;
    w->slot = v->super_slot;
    w->hold = space_hold(v->space);
    pthread_mutex_unlock(&v->checkpoint_mutex);
    return load(w);
}

/* [snapshot_mutex] */
static int note_reader(struct volume *v, uint64_t generation)
{
    for (unsigned i = 0; i < SNAPSHOT_VIEWS; i++) {
        if (v->reading[i])
            continue;
        v->reading[i] = generation;
        return 0;
    }
    return -EMFILE;
}

/* name NULL: the one of that generation. */
static int open_snapshot(struct volume *v, const char *name, uint64_t generation, struct view *w)
{
    struct snapshot s;
    int rc;

    *w = (struct view){.v = v};
    pthread_mutex_lock(&v->snapshot_mutex);
    pthread_rwlock_rdlock(&v->state);
    rc = name ? snapshot_find(v->tree, name, &s) : snapshot_next(v->tree, generation, &s);
    if (rc == 0 && !name && s.generation != generation)
        rc = -ENOENT;
    pthread_rwlock_unlock(&v->state);
    if (rc == 0)
        rc = note_reader(v, s.generation);
    pthread_mutex_unlock(&v->snapshot_mutex);
    if (rc < 0)
        return rc;
    w->snapshot = s.generation;
    pthread_mutex_lock(&v->checkpoint_mutex);
    w->super = v->super;
    pthread_mutex_unlock(&v->checkpoint_mutex);
    snapshot_super(&s, &w->super);
    return load(w);
}

int view_open_snapshot(struct volume *v, const char *name, struct view *ret_view)
{
    return open_snapshot(v, name, 0, ret_view);
}

int view_open_kept(struct volume *v, uint64_t generation, struct view *ret_view)
{
    return open_snapshot(v, NULL, generation, ret_view);
}

void view_close(struct view *w)
{
    if (w->live)
        return;
    tree_free(w->tree);
    w->tree = NULL;
    if (!w->snapshot) {
        space_unhold(w->v->space, w->hold);
        return;
    }
    pthread_mutex_lock(&w->v->snapshot_mutex);
    for (unsigned i = 0; i < SNAPSHOT_VIEWS; i++) {
        if (w->v->reading[i] == w->snapshot) {
            w->v->reading[i] = 0;
            break;
        }
    }
    pthread_mutex_unlock(&w->v->snapshot_mutex);
}

bool view_stale(const struct view *w)
{
    return !w->live && !w->snapshot && !space_held(w->v->space, w->hold);
}

void view_lock(struct view *w)
{
    if (w->live)
        pthread_rwlock_rdlock(&w->v->state);
}

void view_unlock(struct view *w)
{
    if (w->live)
        pthread_rwlock_unlock(&w->v->state);
}

void view_trim(struct view *w)
{
    if (!w->live && tree_wants_trim(w->tree))
        tree_trim(w->tree);
}

static void key_step(struct tree_key *k)
{
    if (++k->b == 0 && ++k->a == 0)
        k->kind++;
}

int view_walk(struct view *w, const struct tree_key *from, view_fn fn, void *ctx)
{
    struct tree_key at = *from;
    struct tree_iter it;
    int rc;

    for (;;) {
        unsigned n = 0;

        for (rc = tree_iter_seek(w->tree, &at, &it); rc == 0 && n < TRIM_ITEMS; rc = tree_iter_next(&it), n++) {
            at = it.key;
            rc = fn(ctx, &it);
            if (rc)
                return rc;
        }
        if (rc < 0)
            return rc == -ENOENT ? 0 : rc;
        key_step(&at);
        view_trim(w);
    }
}

int view_inode(struct view *w, uint64_t ino, struct inode *ret)
{
    struct tree_key key = tree_key(ITEM_INODE, ino, 0);
    const uint8_t *value;
    size_t len;
    int rc = tree_get(w->tree, &key, &value, &len);

    if (rc < 0)
        return rc;
    return inode_decode(ino, value, len, ret) < 0 ? -EIO : 0;
}

int view_extent(struct view *w, uint64_t id, struct extent *ret)
{
    struct tree_key key = tree_key(ITEM_EXTENT, id, 0);
    const uint8_t *value;
    size_t len;
    int rc = tree_get(w->tree, &key, &value, &len);

    if (rc < 0)
        return rc;
    return extent_decode(id, value, len, ret) < 0 ? -EIO : 0;
}

int view_check_super(struct view *w, void (*line)(void *ctx, const char *text), void *ctx)
{
    struct volume *v = w->v;
    int findings = 0;

    if (w->live || w->snapshot)
        return 0;
    pthread_mutex_lock(&v->checkpoint_mutex);
    for (unsigned copy = 0; copy < SUPER_COPIES; copy++) {
        uint64_t unit = SUPER_UNIT(v->super_slot, copy);
        uint8_t buf[UNIT_BYTES];
        struct iovec iov = {buf, sizeof(buf)};
        struct disk_super s;
        char text[128];

        if (v->data->ops->readv(v->data, &iov, 1, unit * UNIT_BYTES) == 0 &&
            super_open(v->keys, v->super_slot, buf, &s) == 0 && le64_get(s.generation) == le64_get(v->super.generation))
            continue;
        snprintf(text, sizeof(text), "corrupt superblock: copy %u at unit %llu does not authenticate", copy,
                 (unsigned long long)unit);
        line(ctx, text);
        findings++;
    }
    pthread_mutex_unlock(&v->checkpoint_mutex);
    return findings;
}
