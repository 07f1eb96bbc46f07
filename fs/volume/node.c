/* node.c - see node.h; and tree_check_page, the one checker of nodes. */
#include "fs/volume/node.h"

#include "coffer/volume.h"

#include <stdio.h>

static struct disk_node *head(uint8_t *page)
{
    return (struct disk_node *)page;
}

static const struct disk_node *chead(const uint8_t *page)
{
    return (const struct disk_node *)page;
}

static struct disk_slot *slots(uint8_t *page)
{
    return (struct disk_slot *)(page + sizeof(struct disk_node));
}

static const struct disk_slot *cslots(const uint8_t *page)
{
    return (const struct disk_slot *)(page + sizeof(struct disk_node));
}

/* --- keys --- */

int tree_key_cmp(const struct tree_key *x, const struct tree_key *y)
{
    if (x->kind != y->kind)
        return x->kind < y->kind ? -1 : 1;
    if (x->a != y->a)
        return x->a < y->a ? -1 : 1;
    return x->b < y->b ? -1 : x->b > y->b;
}

void tree_key_encode(const struct tree_key *k, struct disk_key *ret)
{
    *ret = (struct disk_key){.kind = k->kind, .a = be64_make(k->a), .b = be64_make(k->b)};
}

void tree_key_decode(const struct disk_key *k, struct tree_key *ret)
{
    *ret = (struct tree_key){.kind = k->kind, .a = be64_get(k->a), .b = be64_get(k->b)};
}

/* --- the page --- */

void node_init(uint8_t *page, unsigned level)
{
    memset(page, 0, NODE_BYTES);
    head(page)->magic = le32_make(NODE_MAGIC);
    head(page)->level = (uint8_t)level;
    head(page)->items_start = le16_make(NODE_BYTES);
}

unsigned node_count(const uint8_t *page)
{
    return le16_get(chead(page)->count);
}

unsigned node_level(const uint8_t *page)
{
    return chead(page)->level;
}

const struct disk_key *node_key(const uint8_t *page, unsigned i)
{
    return (const struct disk_key *)(page + le16_get(cslots(page)[i].off));
}

uint8_t *node_value(uint8_t *page, unsigned i, size_t *ret_len)
{
    *ret_len = le16_get(slots(page)[i].len) - sizeof(struct disk_key);
    return page + le16_get(slots(page)[i].off) + sizeof(struct disk_key);
}

unsigned node_search(const uint8_t *page, const struct disk_key *key, bool *ret_exact)
{
    unsigned lo = 0, hi = node_count(page);

    *ret_exact = false;
    while (lo < hi) {
        unsigned mid = (lo + hi) / 2;
        int c = memcmp(node_key(page, mid), key, sizeof(*key));

        if (c == 0) {
            *ret_exact = true;
            return mid;
        }
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static size_t slots_end(const uint8_t *page)
{
    return sizeof(struct disk_node) + node_count(page) * sizeof(struct disk_slot);
}

size_t node_room(const uint8_t *page)
{
    return NODE_BYTES - slots_end(page) - le16_get(chead(page)->items_bytes);
}

size_t node_item_bytes(size_t len)
{
    return sizeof(struct disk_slot) + sizeof(struct disk_key) + len;
}

static void set_counts(uint8_t *page, unsigned count, size_t start, size_t bytes)
{
    head(page)->count = le16_make((uint16_t)count);
    head(page)->items_start = le16_make((uint16_t)start);
    head(page)->items_bytes = le16_make((uint16_t)bytes);
}

void node_compact(uint8_t *page)
{
    uint8_t copy[NODE_BYTES];
    size_t at = NODE_BYTES;

    memcpy(copy, page, NODE_BYTES);
    for (unsigned i = 0; i < node_count(page); i++) {
        size_t len = le16_get(slots(page)[i].len);

        at -= len;
        memcpy(page + at, copy + le16_get(slots(copy)[i].off), len);
        slots(page)[i].off = le16_make((uint16_t)at);
    }
    memset(page + slots_end(page), 0, at - slots_end(page));
    set_counts(page, node_count(page), at, NODE_BYTES - at);
}

void node_insert(uint8_t *page, unsigned i, const struct disk_key *key, const void *value, size_t len)
{
    unsigned count = node_count(page);
    size_t item = sizeof(*key) + len, start;

    if (le16_get(head(page)->items_start) < slots_end(page) + sizeof(struct disk_slot) + item)
        node_compact(page);
    start = le16_get(head(page)->items_start) - item;
    memcpy(page + start, key, sizeof(*key));
    if (len)
        memcpy(page + start + sizeof(*key), value, len);
    memmove(&slots(page)[i + 1], &slots(page)[i], (count - i) * sizeof(struct disk_slot));
    slots(page)[i] = (struct disk_slot){le16_make((uint16_t)start), le16_make((uint16_t)item)};
    set_counts(page, count + 1, start, le16_get(head(page)->items_bytes) + item);
}

void node_remove(uint8_t *page, unsigned i)
{
    unsigned count = node_count(page);
    size_t item = le16_get(slots(page)[i].len), off = le16_get(slots(page)[i].off);
    size_t start = le16_get(head(page)->items_start);

    memmove(&slots(page)[i], &slots(page)[i + 1], (count - i - 1) * sizeof(struct disk_slot));
    if (off == start)
        start += item; /* a lower bound of the items' places all the same */
    if (count == 1)
        start = NODE_BYTES;
    set_counts(page, count - 1, start, le16_get(head(page)->items_bytes) - item);
}

void node_set_key(uint8_t *page, unsigned i, const struct disk_key *key)
{
    memcpy(page + le16_get(slots(page)[i].off), key, sizeof(*key));
}

void node_move(uint8_t *page, unsigned from, uint8_t *to)
{
    while (node_count(page) > from) {
        struct disk_key key = *node_key(page, from);
        size_t len;
        uint8_t *value = node_value(page, from, &len);

        node_insert(to, node_count(to), &key, value, len);
        node_remove(page, from);
    }
}

void node_set_place(uint8_t *page, uint64_t addr, uint64_t birth)
{
    head(page)->addr = le64_make(addr);
    head(page)->birth = le64_make(birth);
}

/* --- the checker --- */

static bool name_bytes_ok(const uint8_t *name, size_t n)
{
    return n > 0 && !memchr(name, 0, n) && !memchr(name, '/', n);
}

static bool mode_ok(uint32_t mode)
{
    uint32_t type = mode >> 12;

    return (type == 1 || type == 2 || type == 4 || type == 6 || type == 8 || type == 10 || type == 12) &&
           mode >> 16 == 0;
}

static const char *check_inode(const uint8_t *v, size_t n)
{
    const struct disk_inode *d = (const struct disk_inode *)v;

    if (n != sizeof(*d))
        return "length";
    if (!mode_ok(le32_get(d->mode)))
        return "mode";
    return le32_get(d->flags) & ~INODE_INLINE ? "flags" : NULL;
}

static const char *check_dirent(const uint8_t *v, size_t n)
{
    const struct disk_dirent *d = (const struct disk_dirent *)v;

    if (n < sizeof(*d) || n != sizeof(*d) + d->namelen)
        return "length";
    if (!mode_ok((uint32_t)d->type << 12) || d->type > 15)
        return "type";
    return name_bytes_ok(v + sizeof(*d), d->namelen) ? NULL : "name";
}

static const char *check_xattr(const uint8_t *v, size_t n)
{
    const struct disk_xattr *d = (const struct disk_xattr *)v;

    if (n < sizeof(*d) || n != sizeof(*d) + d->namelen + le16_get(d->valuelen))
        return "length";
    if (d->reserved)
        return "reserved";
    return d->namelen && !memchr(v + sizeof(*d), 0, d->namelen) ? NULL : "name";
}

static const char *check_range(const uint8_t *v, size_t n)
{
    const struct disk_range *d = (const struct disk_range *)v;

    if (n != sizeof(*d))
        return "length";
    if (le64_get(d->extent) == EXTENT_LOST)
        return le16_get(d->count) < 1 || le16_get(d->first) ? "lost blocks" : NULL;
    if (le16_get(d->count) < 1 || le16_get(d->first) + le16_get(d->count) > EXTENT_CHUNKS_MAX)
        return "chunks";
    return NULL;
}

static const char *check_extent(const uint8_t *v, size_t n)
{
    const struct disk_extent *d = (const struct disk_extent *)v;

    if (n < sizeof(*d))
        return "length";
    if (d->chunks < 1 || d->chunks > EXTENT_CHUNKS_MAX || d->refs > 1 || d->suite != SUITE_XCHACHA20)
        return "chunks, refs or suite";
    return n == sizeof(*d) + d->chunks * (sizeof(struct disk_chunk) + (d->refs ? sizeof(le16) : 0)) ? NULL : "length";
}

static const char *check_snapshot(const uint8_t *v, size_t n)
{
    const struct disk_snapshot *d = (const struct disk_snapshot *)v;
    uint64_t units;

    if (n < sizeof(*d) || d->namelen < 1 || d->namelen > SNAPSHOT_NAME_MAX || n != sizeof(*d) + d->namelen)
        return "length";
    if (d->reserved[0] || d->reserved[1] || d->reserved[2])
        return "reserved";
    units = le64_get(d->data_units);
    if (units == 0 || units % REGION_UNITS || units > VOLUME_SIZE_MAX / UNIT_BYTES ||
        le32_get(d->root_level) > NODE_LEVEL_MAX || le64_get(d->root.addr) == 0)
        return "tree";
    return snapshot_name_ok((const char *)v + sizeof(*d), d->namelen) ? NULL : "name";
}

/* What is wrong with a leaf's value, or NULL. */
static const char *check_value(uint8_t kind, const uint8_t *v, size_t n)
{
    if (n > ITEM_VALUE_MAX)
        return "length";
    switch (kind) {
    case ITEM_INODE:
        return check_inode(v, n);
    case ITEM_DIRENT:
        return check_dirent(v, n);
    case ITEM_XATTR:
        return check_xattr(v, n);
    case ITEM_INLINE:
        return n <= SYMLINK_MAX ? NULL : "length";
    case ITEM_RANGE:
        return check_range(v, n);
    case ITEM_ORPHAN:
        return n == 0 ? NULL : "length";
    case ITEM_TRIM:
        return n == sizeof(le64) ? NULL : "length";
    case ITEM_EXTENT:
        return check_extent(v, n);
    case ITEM_SPACE:
        return n == REGION_UNITS / 8 ? NULL : "length";
    case ITEM_SNAPSHOT:
        return check_snapshot(v, n);
    default:
        return "kind";
    }
}

static const char *check_ptr(const uint8_t *v, size_t n, uint64_t birth)
{
    const struct disk_ptr *p = (const struct disk_ptr *)v;

    if (n != sizeof(*p))
        return "length";
    return le64_get(p->addr) == 0 || le64_get(p->birth) > birth ? "pointer" : NULL;
}

struct complaint {
    char *why;
    size_t n;
    uint64_t addr;
};

static int complain(const struct complaint *c, const char *what, uint64_t have, uint64_t expect)
{
    snprintf(c->why, c->n, "corrupt node: unit %llu, %s, have %llu expect %llu", (unsigned long long)c->addr, what,
             (unsigned long long)have, (unsigned long long)expect);
    return -EUCLEAN;
}

static int check_head(const uint8_t *page, uint64_t birth, unsigned level, const struct complaint *c)
{
    const struct disk_node *h = chead(page);

    if (le32_get(h->magic) != NODE_MAGIC)
        return complain(c, "magic", le32_get(h->magic), NODE_MAGIC);
    if (h->level != level || level > NODE_LEVEL_MAX)
        return complain(c, "level", h->level, level);
    if (le64_get(h->addr) != c->addr)
        return complain(c, "address", le64_get(h->addr), c->addr);
    if (le64_get(h->birth) != birth)
        return complain(c, "birth", le64_get(h->birth), birth);
    if (h->reserved || h->reserved2[0] || h->reserved2[1] || h->reserved2[2] || h->reserved2[3])
        return complain(c, "reserved", 1, 0);
    if (level > 0 && node_count(page) == 0)
        return complain(c, "count", 0, 1);
    if (slots_end(page) > NODE_BYTES)
        return complain(c, "count", node_count(page), 0);
    if (le16_get(h->items_start) + le16_get(h->items_bytes) != NODE_BYTES)
        return complain(c, "items' bytes", le16_get(h->items_bytes), NODE_BYTES - le16_get(h->items_start));
    if (slots_end(page) > le16_get(h->items_start))
        return complain(c, "items start", le16_get(h->items_start), slots_end(page));
    return 0;
}

int tree_check_page(const uint8_t *page, uint64_t addr, uint64_t birth, unsigned level, char *why, size_t n)
{
    struct complaint c = {why, n, addr};
    const struct disk_slot *s = cslots(page);
    uint8_t taken[NODE_BYTES] = {0}; /* a byte each, as memset and memchr are fast */
    size_t sum = 0;
    int rc = check_head(page, birth, level, &c);

    for (unsigned i = 0; rc == 0 && i < node_count(page); i++) {
        size_t off = le16_get(s[i].off), len = le16_get(s[i].len);
        const char *bad;

        if (len < sizeof(struct disk_key) || off < le16_get(chead(page)->items_start) || off + len > NODE_BYTES)
            return complain(&c, "item's place", off, len);
        if (memchr(taken + off, 1, len))
            return complain(&c, "items overlap at", off, 0);
        memset(taken + off, 1, len);
        sum += len;
        if (i && memcmp(node_key(page, i - 1), node_key(page, i), sizeof(struct disk_key)) >= 0)
            return complain(&c, "keys not ascending at slot", i, 0);
        bad = level ? check_ptr(page + off + sizeof(struct disk_key), len - sizeof(struct disk_key), birth)
                    : check_value(node_key(page, i)->kind, page + off + sizeof(struct disk_key),
                                  len - sizeof(struct disk_key));
        if (bad) {
            snprintf(why, n, "corrupt item: unit %llu slot %u kind %u, bad %s", (unsigned long long)addr, i,
                     node_key(page, i)->kind, bad);
            return -EUCLEAN;
        }
    }
    if (rc == 0 && sum != le16_get(chead(page)->items_bytes))
        rc = complain(&c, "items' bytes", le16_get(chead(page)->items_bytes), sum);
    return rc;
}
