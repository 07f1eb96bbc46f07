/*
 * checkpoint.c - writes the whole state as a new generation and frees the older log segment.
 *
 *   freeze   [state exclusive]  give every dirty node an address, write the bitmaps into their items, seal all dirty
 * nodes into buffers, switch to the next log segment write    (operations go on) nodes to free space, sync `data`, wait
 * for records that the older segment still awaits, superblock twice to the slot that does not hold the newest, sync
 * `data` tell                        who remembers the newest generation outside the files
 * (volume_options.on_checkpoint) thaw                        space freed before the freeze becomes free
 *
 * Giving addresses changes bitmaps, whose items are in nodes, which then need addresses: freeze repeats until nothing
 * new is dirty. It ends, because nodes are placed in regions that are dirty already as long as these have room.
 *
 * A failure after the freeze leaves the old generation and both its log segments as they are on disk: the volume is
 * failed, and recovery starts from there.
 */
#include "fs/volume/checkpoint.h"

#include "fs/volume/log.h"
#include "fs/volume/requests.h"
#include "fs/volume/space.h"

#include <stdlib.h>

struct frozen {
    struct tree_page *pages;
    size_t n;
    struct disk_super super;
    struct requests_carried requests;
};

/* --- freeze --- */

static int alloc_node(void *ctx, uint64_t *ret_addr)
{
    return space_alloc_node(((struct volume *)ctx)->space, ret_addr);
}

static void release_node(void *ctx, uint64_t addr)
{
    struct volume *v = ctx;

    if (space_release(v->space, addr, NODE_UNITS) < 0)
        volume_fail(v, "releasing a tree node's units", -EUCLEAN);
}

static void seal_node(void *ctx, uint64_t addr, uint64_t birth, unsigned level, const uint8_t *plain, uint8_t *cipher,
                      uint8_t nonce[NONCE_BYTES], uint8_t mac[MAC_BYTES])
{
    struct volume *v = ctx;

    node_seal(v->keys, addr, birth, level, plain, cipher, nonce, mac);
}

/* Makes the leaf of every dirty region's SPACE item dirty; new regions get their item. Returns how many were not yet.
 */
static int touch_regions(struct volume *v, uint8_t **touched, uint64_t *regions)
{
    static const uint8_t empty[REGION_UNITS / 8];
    uint64_t now = space_regions(v->space);
    int count = 0;

    if (now > *regions) {
        *touched = xrealloc(*touched, now);
        memset(*touched + *regions, 0, now - *regions);
        *regions = now;
    }
    for (int64_t k = space_next_dirty(v->space, 0); k >= 0; k = space_next_dirty(v->space, (uint64_t)k + 1)) {
        struct tree_key key = tree_key(ITEM_SPACE, (uint64_t)k, 0);
        int rc;

        if ((uint64_t)k >= *regions || (*touched)[k])
            continue;
        rc = tree_touch(v->tree, &key);
        if (rc == -ENOENT)
            rc = tree_put(v->tree, &key, empty, sizeof(empty));
        if (rc < 0)
            return rc;
        (*touched)[k] = 1;
        count++;
    }
    return count;
}

static int put_bitmaps(struct volume *v)
{
    uint8_t bitmap[REGION_UNITS / 8];
    int64_t k;

    while ((k = space_next_dirty(v->space, 0)) >= 0) {
        struct tree_key key = tree_key(ITEM_SPACE, (uint64_t)k, 0);
        int rc;

        space_take_bitmap(v->space, (uint64_t)k, bitmap);
        rc = tree_put(v->tree, &key, bitmap, sizeof(bitmap));
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* [state exclusive] */
static int place_nodes(struct volume *v)
{
    struct tree_space space = {.alloc = alloc_node, .release = release_node, .ctx = v};
    uint8_t *touched = NULL;
    uint64_t regions = 0;
    int placed, dirtied, rc;

    do {
        placed = tree_assign(v->tree, &space);
        dirtied = placed < 0 ? placed : touch_regions(v, &touched, &regions);
    } while (dirtied > 0 || (dirtied == 0 && placed > 0));
    rc = dirtied < 0 ? dirtied : put_bitmaps(v);
    free(touched);
    return rc;
}

/* [state exclusive] */
static int freeze(struct volume *v, unsigned flags, struct frozen *f)
{
    unsigned level;
    int rc;

    rc = place_nodes(v);
    if (rc < 0)
        return rc;
    rc = tree_seal(v->tree, v->generation + 1, seal_node, v, &f->pages, &f->n, &f->super.root, &level);
    if (rc < 0)
        return rc;
    v->generation++;
    f->super.generation = le64_make(v->generation);
    f->super.sequence = le64_make(log_switch(v->log, v->generation));
    if (!(flags & CHECKPOINT_CLEAN))
        requests_carry(v, &f->requests);
    f->super.root_level = le32_make(level);
    f->super.data_units = le64_make(space_regions(v->space) * REGION_UNITS);
    f->super.used_units = le64_make(space_used(v->space));
    f->super.next_inode = le64_make(v->next_inode);
    f->super.next_extent = le64_make(atomic_load(&v->next_extent));
    f->super.inodes = le64_make(v->inodes);
    f->super.flags = le32_make(flags & CHECKPOINT_CLEAN ? SUPER_CLEAN : 0);
    space_freeze(v->space);
    return 0;
}

/* --- write --- */

static int page_order(const void *a, const void *b)
{
    const struct tree_page *x = a, *y = b;

    return x->addr < y->addr ? -1 : x->addr > y->addr;
}

#define PAGES_A_WRITE 16

/* Neighbours go out together, and each write is started at once, so that the sync after it finds little to do. */
static int write_pages(struct volume *v, struct tree_page *pages, size_t n)
{
    if (n)
        qsort(pages, n, sizeof(*pages), page_order);
    for (size_t i = 0; i < n;) {
        struct iovec iov[PAGES_A_WRITE];
        uint64_t off = pages[i].addr * UNIT_BYTES;
        int k = 0, rc;

        while (i < n && k < PAGES_A_WRITE && pages[i].addr * UNIT_BYTES == off + (uint64_t)k * NODE_BYTES)
            iov[k++] = (struct iovec){pages[i++].cipher, NODE_BYTES};
        rc = v->data->ops->writev(v->data, iov, k, off);
        if (rc < 0)
            return rc;
        v->data->ops->writeback(v->data, off, (uint64_t)k * NODE_BYTES);
    }
    return 0;
}

static int write_super(struct volume *v, const struct disk_super *super)
{
    unsigned slot = !v->super_slot;
    uint8_t buf[UNIT_BYTES];

    for (unsigned copy = 0; copy < SUPER_COPIES; copy++) {
        struct iovec iov = {buf, sizeof(buf)};
        int rc;

        super_seal(v->keys, slot, super, buf);
        rc = v->data->ops->writev(v->data, &iov, 1, SUPER_UNIT(slot, copy) * UNIT_BYTES);
        if (rc < 0)
            return rc;
    }
    return volume_sync_data(v);
}

static int write_frozen(struct volume *v, struct frozen *f)
{
    int rc;

    rc = write_pages(v, f->pages, f->n);
    if (rc == 0)
        rc = volume_sync_data(v);
    /* The next generation but one writes over this one's segment: nobody may still be about to write into it. */
    if (rc == 0)
        rc = log_wait(v, le64_get(f->super.sequence));
    if (rc == 0)
        rc = write_super(v, &f->super);
    return rc;
}

static void tell_checkpoint(struct volume *v)
{
    struct volume_seen now = {.generation = le64_get(v->super.generation)};

    if (!v->options.on_checkpoint)
        return;
    memcpy(now.branch, v->super.branch, sizeof(now.branch));
    memcpy(now.root_mac, v->super.root.mac, sizeof(now.root_mac));
    v->options.on_checkpoint(v->options.ctx, &now);
}

/* --- the whole --- */

static bool anything_changed(struct volume *v)
{
    return tree_dirty_nodes(v->tree) > 0 || space_has_pending(v->space) || space_next_dirty(v->space, 0) >= 0;
}

int checkpoint_run(struct volume *v, unsigned flags)
{
    struct frozen f = {0};
    int rc = 0;

    pthread_mutex_lock(&v->checkpoint_mutex);
    pthread_rwlock_wrlock(&v->state);
    if (v->failed || (!(flags & CHECKPOINT_FORCE) && !anything_changed(v))) {
        rc = v->failed ? -EIO : 0;
        pthread_rwlock_unlock(&v->state);
        goto out;
    }
    f.super = v->super;
    rc = freeze(v, flags, &f);
    pthread_rwlock_unlock(&v->state);
    /* At once: other records wait for it. */
    if (rc == 0)
        rc = requests_write(v, &f.requests);
    if (rc == 0 && v->failed)
        rc = -EIO;
    if (rc == 0)
        rc = write_frozen(v, &f);
    if (rc < 0) {
        rc = volume_fail(v, "writing a checkpoint", rc);
        goto out;
    }
    v->super = f.super;
    v->super_slot = !v->super_slot;
    tell_checkpoint(v);
    space_thaw(v->space);
    log_checkpointed(v->log, le64_get(f.super.sequence));
    pthread_rwlock_rdlock(&v->state);
    tree_written(v->tree);
    pthread_rwlock_unlock(&v->state);
out:
    tree_pages_free(f.pages, f.n);
    pthread_mutex_unlock(&v->checkpoint_mutex);
    return rc;
}
