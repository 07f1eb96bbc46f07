/* care.c - scrubbing a volume in use, and changing its limit. */
#include "fs/volume/checkpoint.h"
#include "fs/volume/space.h"
#include "fs/volume/view.h"

#include <stdlib.h>

/* --- scrub --- */

struct step {
    struct view view;
    struct view *newer; /* the state that was read before, or NULL */
    struct volume_scrub *at;
    uint64_t left; /* bytes to read in this step */
    uint8_t *plain;
};

#define U(x) ((unsigned long long)(x))

/* An extent of the state before that is still this one's: none comes back after it has gone. */
static bool read_before(struct step *s, const struct extent *e, unsigned first, unsigned count)
{
    struct extent now;
    bool same;

    if (!s->newer)
        return false;
    view_lock(s->newer);
    same = view_extent(s->newer, e->id, &now) == 0 && now.addr == e->addr && first + count <= now.chunks;
    view_unlock(s->newer);
    for (unsigned i = first; same && i < first + count; i++)
        same = now.ref[i] > 0;
    return same;
}

static void scrub_range(struct step *s, const struct tree_iter *it)
{
    const struct disk_range *d = (const struct disk_range *)it->value;
    unsigned first = le16_get(d->first), count = le16_get(d->count);
    struct volume *v = s->view.v;
    struct extent e;
    int rc;

    if (le64_get(d->extent) == EXTENT_LOST)
        return;
    rc = view_extent(&s->view, le64_get(d->extent), &e);
    if (rc == 0 && read_before(s, &e, first, count)) {
        s->left -= MIN(s->left, 1);
        return;
    }
    if (rc == 0 && first + count > e.chunks)
        rc = -EUCLEAN;
    if (rc == 0)
        rc = extent_read(v->keys, v->data, &e, v->block, first, count, s->plain);
    if (rc < 0 && !view_stale(&s->view)) {
        s->at->findings++;
        volume_damage(v, "scrub: %sinode %llu, blocks %llu to %llu, extent %llu: %s",
                      s->at->snapshot ? "of a snapshot, " : "", U(it->key.a), U(it->key.b), U(it->key.b + count - 1),
                      U(le64_get(d->extent)), rc == -EBADMSG ? "does not authenticate" : "cannot be read");
    }
    s->at->done += (uint64_t)count * v->block;
    s->left -= MIN(s->left, (uint64_t)count * v->block);
}

/* An item costs a byte at least, and a share of its node. */
static int scrub_item(void *ctx, const struct tree_iter *it)
{
    struct step *s = ctx;

    if (!s->left)
        return 1;
    s->left -= MIN(s->left, it->len + 1);
    if (it->key.kind == ITEM_RANGE)
        scrub_range(s, it);
    s->at->kind = it->key.kind;
    s->at->a = it->key.a;
    s->at->b = it->key.b + 1;
    return 0;
}

static void scrub_super(void *ctx, const char *text)
{
    volume_damage(ctx, "scrub: %s", text);
}

/* The next state to read, an older snapshot; false: there is none. */
static bool next_state(struct volume *v, struct volume_scrub *at)
{
    struct snapshot older;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = snapshot_before(v->tree, at->snapshot ? at->snapshot : UINT64_MAX, &older);
    pthread_rwlock_unlock(&v->state);
    if (rc < 0)
        return false;
    at->snapshot = older.generation;
    at->kind = ITEM_INODE;
    at->a = at->b = 0;
    return true;
}

/* The state that came before a snapshot's. */
static int open_newer(struct volume *v, uint64_t snapshot, struct view *ret)
{
    struct snapshot newer;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = snapshot_next(v->tree, snapshot + 1, &newer);
    pthread_rwlock_unlock(&v->state);
    return rc == 0 ? view_open_kept(v, newer.generation, ret) : view_open(v, false, ret);
}

/* [view_lock] true: all of this state is read. */
static bool scrub_state(struct step *s)
{
    struct volume_scrub *at = s->at;
    struct tree_key from = {.kind = at->kind, .a = at->a, .b = at->b}, next;
    int rc = view_walk(&s->view, &from, scrub_item, s);

    if (rc == 0)
        return true;
    if (rc > 0 || view_stale(&s->view))
        return false;
    /* A damaged node, which the view has reported: on behind it. */
    at->findings++;
    from = (struct tree_key){.kind = at->kind, .a = at->a, .b = at->b};
    s->view.quiet = true;
    if (tree_behind(s->view.tree, &from, &next) < 0)
        return true;
    at->kind = next.kind;
    at->a = next.a;
    at->b = next.b;
    return false;
}

int volume_scrub_step(struct volume *v, struct volume_scrub *at, uint64_t bytes)
{
    struct step s = {.at = at, .left = bytes};
    uint64_t used, limit, reserve;
    struct view newer;
    bool done;
    int rc;

    if (at->over)
        return 0;
    rc = at->snapshot ? view_open_kept(v, at->snapshot, &s.view) : view_open(v, at->kind == 0, &s.view);
    if (rc < 0) {
        at->findings += rc == -EIO; /* the root: said by the view. Else the snapshot is gone. */
        done = true;
        goto out;
    }
    if (at->kind == 0) {
        at->findings += (unsigned)view_check_super(&s.view, scrub_super, v);
        at->kind = ITEM_INODE;
    }
    if (at->snapshot && open_newer(v, at->snapshot, &newer) == 0)
        s.newer = &newer;
    s.plain = xmalloc(EXTENT_BYTES);
    space_stat(v->space, &used, &limit, &reserve);
    at->total = MAX(MAX(used, s.view.used_units) * UNIT_BYTES, at->done);
    view_lock(&s.view);
    done = scrub_state(&s);
    view_unlock(&s.view);
    if (s.newer)
        view_close(s.newer);
    view_close(&s.view);
    explicit_bzero(s.plain, EXTENT_BYTES);
    free(s.plain);
out:
    at->over = done && !next_state(v, at);
    if (at->over)
        at->total = at->done = MAX(at->total, 1);
    volume_trim(v);
    return !at->over;
}

/* --- resize --- */

int volume_resize(struct volume *v, uint64_t size_limit)
{
    uint64_t limit = size_limit / UNIT_BYTES;
    int rc;

    if (size_limit < VOLUME_SIZE_MIN || size_limit > VOLUME_SIZE_MAX)
        return -EINVAL;
    if (v->read_only)
        return -EROFS;
    rc = checkpoint_run(v, 0); /* what was freed counts as free */
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&v->checkpoint_mutex);
    pthread_rwlock_wrlock(&v->state);
    rc = space_set_limit(v->space, limit, volume_reserve(limit));
    if (rc == 0) {
        v->super.size_limit = le64_make(size_limit);
        v->params.size_limit = size_limit;
        v->dirty_max = volume_dirty_max(limit);
    }
    pthread_rwlock_unlock(&v->state);
    pthread_mutex_unlock(&v->checkpoint_mutex);
    return rc < 0 ? rc : checkpoint_run(v, CHECKPOINT_FORCE);
}
