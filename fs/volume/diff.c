/*
 * diff.c - see diff.h.
 *
 * Each side has a place: an item of a leaf, or a slot of an inner node whose node below is not entered yet (at first the
 * root itself). Nothing at or behind the place was looked at.
 *
 * 1. Two places at the same pointer (address, birth, nonce and MAC) have the same items below them: both go on behind.
 *    Which keys the parents give the node does not matter for that: all before it is done on both sides.
 * 2. A node is entered only when what is below it may come before the other side's place, or overlaps with it; the
 *    higher one first. So a side does not go down past a node that the other one will arrive at.
 */
#include "fs/volume/diff.h"

#include "fs/volume/node.h"

#include <stdlib.h>

struct side {
    struct view *view;
    uint8_t *page[NODE_LEVEL_MAX + 1]; /* by level; allocated at first use */
    unsigned slot[NODE_LEVEL_MAX + 1];
    struct disk_key hi[NODE_LEVEL_MAX + 1]; /* all keys of the page are below */
    unsigned at; /* level of the node whose slot is the place; above the root's: the root is not entered */
    bool over;
};

struct view_diff {
    struct side side[2]; /* old, new */
    struct disk_key from, to;
    bool given[2]; /* the place was handed out: go on before the next one */
};

static const struct disk_key key_lowest,
    key_highest = {UINT8_MAX, {{255, 255, 255, 255, 255, 255, 255, 255}}, {{255, 255, 255, 255, 255, 255, 255, 255}}};

static int key_cmp(const struct disk_key *x, const struct disk_key *y)
{
    return memcmp(x, y, sizeof(*x));
}

static bool at_root(const struct side *s)
{
    return s->at > s->view->root_level;
}

/* Of an item its key; of a node not entered a key that is not above those below it. */
static const struct disk_key *place_lo(const struct side *s)
{
    return at_root(s) ? &key_lowest : node_key(s->page[s->at], s->slot[s->at]);
}

/* All keys below the node not entered are below this. */
static const struct disk_key *place_hi(const struct side *s)
{
    if (at_root(s))
        return &key_highest;
    return s->slot[s->at] + 1 < node_count(s->page[s->at]) ? node_key(s->page[s->at], s->slot[s->at] + 1)
                                                           : &s->hi[s->at];
}

static struct disk_ptr place_ptr(const struct side *s)
{
    struct disk_ptr ptr = s->view->root;
    size_t len;

    if (!at_root(s))
        memcpy(&ptr, node_value(s->page[s->at], s->slot[s->at], &len), sizeof(ptr));
    return ptr;
}

static void step(struct side *s)
{
    if (at_root(s))
        s->over = true;
    else
        s->slot[s->at]++;
}

/* Behind the ends of nodes, and what is before `from`. */
static void settle(const struct view_diff *d, struct side *s)
{
    while (!s->over && !at_root(s)) {
        if (s->slot[s->at] >= node_count(s->page[s->at])) {
            s->at++;
            step(s);
        } else if (s->at ? key_cmp(place_hi(s), &d->from) <= 0 : key_cmp(place_lo(s), &d->from) < 0) {
            step(s);
        } else {
            s->over = key_cmp(place_lo(s), &d->to) >= 0;
            return;
        }
    }
}

static int enter(struct side *s)
{
    const struct disk_key lo = *place_lo(s), hi = *place_hi(s);
    const struct disk_ptr ptr = place_ptr(s);
    unsigned level = s->at - 1, count;
    uint8_t *page;
    int rc;

    if (!s->page[level])
        s->page[level] = xmalloc(NODE_BYTES);
    page = s->page[level];
    rc = view_read_node(s->view, &ptr, level, page);
    if (rc < 0)
        return rc;
    count = node_count(page);
    if (count && (key_cmp(node_key(page, 0), &lo) < 0 || key_cmp(node_key(page, count - 1), &hi) >= 0))
        return -EIO;
    s->hi[level] = hi;
    s->slot[level] = 0;
    s->at = level;
    return 0;
}

/* Which of two nodes that are not the same is entered first. */
static struct side *choose(struct side *a, struct side *b)
{
    if (key_cmp(place_hi(a), place_lo(b)) <= 0)
        return a;
    if (key_cmp(place_hi(b), place_lo(a)) <= 0)
        return b;
    if (a->at != b->at)
        return a->at > b->at ? a : b;
    return key_cmp(place_lo(a), place_lo(b)) <= 0 ? a : b;
}

static bool same_node(const struct side *a, const struct side *b)
{
    struct disk_ptr x = place_ptr(a), y = place_ptr(b);

    return a->at == b->at && memcmp(&x, &y, sizeof(x)) == 0;
}

/* Enters one node, or skips the same one on both sides. */
static int nodes_meet(struct side *a, struct side *b)
{
    if (!same_node(a, b))
        return enter(choose(a, b));
    step(a);
    step(b);
    return 0;
}

static int give(struct view_diff *d, bool old, bool new, struct view_change *ret)
{
    *ret = (struct view_change){0};
    for (unsigned i = 0; i < 2; i++) {
        struct side *s = &d->side[i];
        const uint8_t *value;
        size_t len;

        d->given[i] = i ? new : old;
        if (!d->given[i])
            continue;
        tree_key_decode(place_lo(s), &ret->key);
        value = node_value(s->page[0], s->slot[0], &len);
        *(i ? &ret->new : &ret->old) = value;
        *(i ? &ret->new_len : &ret->old_len) = len;
    }
    return 1;
}

/* Both places are items. 0: they are the same, and done. */
static int items_meet(struct view_diff *d, struct view_change *ret)
{
    struct side *a = &d->side[0], *b = &d->side[1];
    int c = key_cmp(place_lo(a), place_lo(b));

    give(d, c <= 0, c >= 0, ret);
    return c || ret->old_len != ret->new_len || memcmp(ret->old, ret->new, ret->old_len) != 0;
}

int view_diff_next(struct view_diff *d, struct view_change *ret)
{
    struct side *a = &d->side[0], *b = &d->side[1];
    int rc = 0;

    while (rc == 0) {
        for (unsigned i = 0; i < 2; i++) {
            if (d->given[i])
                step(&d->side[i]);
            d->given[i] = false;
            settle(d, &d->side[i]);
        }
        if (a->over && b->over)
            break;
        if (a->over || b->over) {
            struct side *s = a->over ? b : a;

            rc = s->at ? enter(s) : give(d, s == a, s == b, ret);
        } else if (a->at && b->at) {
            rc = nodes_meet(a, b);
        } else if (!a->at && !b->at) {
            rc = items_meet(d, ret);
        } else {
            struct side *node = a->at ? a : b, *item = a->at ? b : a;

            rc = key_cmp(place_lo(node), place_lo(item)) <= 0 ? enter(node) : give(d, item == a, item == b, ret);
        }
    }
    return rc;
}

int view_diff_open(struct view *old, struct view *new, const struct tree_key *from, const struct tree_key *to,
                   struct view_diff **ret_diff)
{
    struct view_diff *d;

    if (!le64_get(old->root.addr) || !le64_get(new->root.addr))
        return -ENOTSUP;
    if (old->root_level > NODE_LEVEL_MAX || new->root_level > NODE_LEVEL_MAX)
        return -EIO;
    d = xcalloc(1, sizeof(*d));
    d->to = key_highest;
    tree_key_encode(from, &d->from);
    if (to)
        tree_key_encode(to, &d->to);
    d->side[0].view = old;
    d->side[1].view = new;
    for (unsigned i = 0; i < 2; i++)
        d->side[i].at = d->side[i].view->root_level + 1;
    *ret_diff = d;
    return 0;
}

void view_diff_close(struct view_diff *d)
{
    if (!d)
        return;
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned level = 0; level <= NODE_LEVEL_MAX; level++) {
            if (d->side[i].page[level])
                explicit_bzero(d->side[i].page[level], NODE_BYTES);
            free(d->side[i].page[level]);
        }
    }
    free(d);
}

int view_diff(struct view *old, struct view *new, view_diff_fn visit, void *ctx)
{
    struct view_change c;
    struct view_diff *d;
    int rc = view_diff_open(old, new, &(struct tree_key){0}, NULL, &d);

    if (rc < 0)
        return rc;
    while ((rc = view_diff_next(d, &c)) == 1) {
        rc = visit(ctx, &c);
        if (rc)
            break;
    }
    view_diff_close(d);
    return rc;
}
