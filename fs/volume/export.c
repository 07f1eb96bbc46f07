/*
 * export.c - see coffer/export.h and EXPORT.md. Owns the stream: frames of a fixed size outside, records inside.
 *
 * 1. A reader believes nothing that has not authenticated: a frame is opened before its bytes are looked at.
 * 2. The stream ends with a FINAL frame that holds END; anything less is a cut stream.
 * 3. An import is checked as a whole (volume_check) before it counts.
 * 4. A stream, and each increment after it, makes what has a name in its state, no more: so nothing has to be known
 *    later of a file without one, which is exported whole when it gets one.
 */
#include "fs/volume/export.h"

#include "fs/volume/diff.h"
#include "fs/volume/names.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>

#define U(x)       ((unsigned long long)(x))
#define RECORD_MAX (EXTENT_BYTES + 64)

enum record {
    REC_PARAMS = 1,
    REC_INODE,
    REC_XATTR,
    REC_INLINE,
    REC_DATA,
    REC_LOST,
    REC_DIRENT,
    REC_DONE,
    REC_END,
    /* Of increments only. */
    REC_GONE,
    REC_NODIRENT,
    REC_NOXATTR,
    REC_NOINLINE,
    REC_HOLE,
};

struct record_head {
    uint8_t type;
    uint8_t reserved[3];
    le32 len;  /* of the payload */
    le64 a, b; /* inode or directory; offset, block */
};
_Static_assert(sizeof(struct record_head) == 24, "record_head");

struct params_payload {
    le32 block_size, profile;
    le64 size_limit;
};
_Static_assert(sizeof(struct params_payload) == 16, "params_payload");

/* Names a state of a volume for good: the MAC is of its tree's root. Generation 0: a state that no increment follows. */
struct state_payload {
    uint8_t volume[VOLUME_ID_BYTES];
    le64 generation;
    uint8_t root_mac[MAC_BYTES];
};
_Static_assert(sizeof(struct state_payload) == 40, "state_payload");

/* PARAMS of an increment. */
struct increment_payload {
    struct params_payload params;
    struct state_payload now, since;
};
_Static_assert(sizeof(struct increment_payload) == 96, "increment_payload");

/* --- keys --- */

static int derive(const struct export_head *h, const void *secret, size_t n, uint8_t key[32])
{
    if (h->kind == EXPORT_KEY_FILE)
        return crypto_generichash(key, 32, secret, n, h->salt, sizeof(h->salt)) ? -EINVAL : 0;
    return crypto_pwhash(key, 32, secret, n, h->salt, le64_get(h->ops), (size_t)le64_get(h->mem),
                         crypto_pwhash_ALG_ARGON2ID13)
               ? -ENOMEM
               : 0;
}

int export_secret_new(enum export_kind kind, const void *secret, size_t n, struct export_secret *ret)
{
    struct export_head *h = &ret->head;

    *ret = (struct export_secret){0};
    h->magic = le64_make(EXPORT_MAGIC);
    h->version = le32_make(EXPORT_WHOLE);
    h->kind = (uint8_t)kind;
    randombytes_buf(h->salt, sizeof(h->salt));
    if (kind == EXPORT_PASSPHRASE) {
        h->ops = le64_make(crypto_pwhash_OPSLIMIT_MODERATE);
        h->mem = le64_make(crypto_pwhash_MEMLIMIT_MODERATE);
    }
    return derive(h, secret, n, ret->key);
}

static int unwrap(const struct export_secret *s, uint8_t key[32])
{
    return crypto_aead_xchacha20poly1305_ietf_decrypt(key, NULL, NULL, s->head.wrapped, sizeof(s->head.wrapped),
                                                      (const uint8_t *)&s->head, offsetof(struct export_head, wrapped),
                                                      s->head.nonce, s->key)
               ? -EKEYREJECTED
               : 0;
}

int export_secret_open(const void *secret, size_t n, struct export_secret *s)
{
    const struct export_head *h = &s->head;
    uint8_t key[32];
    int rc;

    if (le64_get(h->magic) != EXPORT_MAGIC || (h->kind != EXPORT_PASSPHRASE && h->kind != EXPORT_KEY_FILE) ||
        !sodium_is_zero(h->reserved, sizeof(h->reserved)))
        return -EINVAL;
    if ((le32_get(h->version) != EXPORT_WHOLE && le32_get(h->version) != EXPORT_INCREMENT) ||
        le64_get(h->ops) > EXPORT_OPS_MAX || le64_get(h->mem) > EXPORT_MEM_MAX)
        return -ENOTSUP;
    rc = derive(h, secret, n, s->key);
    if (rc == 0)
        rc = unwrap(s, key);
    sodium_memzero(key, sizeof(key));
    return rc;
}

/* --- writing --- */

struct out {
    const struct export_io *io;
    const struct volume_report *report;
    crypto_secretstream_xchacha20poly1305_state state;
    struct export_head head;
    bool first;
    size_t n;
    uint8_t plain[EXPORT_FRAME_PLAIN], cipher[EXPORT_FRAME_BYTES];
    struct view *view, *since; /* since NULL: a whole export */
    uint64_t ino, done, inodes;
    struct inode inode;
    uint64_t hole, hole_end; /* blocks that a HOLE must still say */
    uint8_t data[EXTENT_BYTES];
    int lines;
};

static int out_frame(struct out *o, uint8_t tag)
{
    memset(o->plain + o->n, 0, EXPORT_FRAME_PLAIN - o->n);
    crypto_secretstream_xchacha20poly1305_push(&o->state, o->cipher, NULL, o->plain, EXPORT_FRAME_PLAIN,
                                               o->first ? (const uint8_t *)&o->head : NULL,
                                               o->first ? sizeof(o->head) : 0, tag);
    o->first = false;
    o->n = 0;
    return o->io->write(o->io->ctx, o->cipher, EXPORT_FRAME_BYTES);
}

static int out_bytes(struct out *o, const void *buf, size_t n)
{
    int rc = 0;

    while (n && rc == 0) {
        size_t k = MIN(n, EXPORT_FRAME_PLAIN - o->n);

        memcpy(o->plain + o->n, buf, k);
        o->n += k;
        buf = (const uint8_t *)buf + k;
        n -= k;
        if (o->n == EXPORT_FRAME_PLAIN)
            rc = out_frame(o, crypto_secretstream_xchacha20poly1305_TAG_MESSAGE);
    }
    return rc;
}

static int out_record(struct out *o, enum record type, uint64_t a, uint64_t b, const void *payload, size_t n)
{
    struct record_head h = {.type = (uint8_t)type, .len = le32_make((uint32_t)n), .a = le64_make(a), .b = le64_make(b)};
    int rc = out_bytes(o, &h, sizeof(h));

    if (rc == 0)
        rc = out_bytes(o, payload, n);
    if (rc == 0 && volume_report_stop(o->report))
        rc = -ECANCELED;
    return rc;
}

static int out_item(void *ctx, const struct tree_iter *it)
{
    struct out *o = ctx;

    if (it->key.a != o->ino ||
        (it->key.kind != ITEM_XATTR && it->key.kind != ITEM_INLINE && it->key.kind != ITEM_DIRENT))
        return 1;
    return out_record(o,
                      it->key.kind == ITEM_XATTR    ? REC_XATTR
                      : it->key.kind == ITEM_INLINE ? REC_INLINE
                                                    : REC_DIRENT,
                      o->ino, 0, it->value, it->len);
}

static int out_lost(struct out *o, uint64_t block, uint64_t count)
{
    le32 n = le32_make((uint32_t)count);
    char text[160];

    snprintf(text, sizeof(text), "lost: inode %llu, blocks %llu to %llu cannot be read; the export says so", U(o->ino),
             U(block), U(block + count - 1));
    o->report->line(o->report->ctx, text);
    o->lines++;
    return out_record(o, REC_LOST, o->ino, block, &n, sizeof(n));
}

/* [view_lock] Blocks that are chunks `first` .. of an extent, or lost. */
static int out_blocks(struct out *o, uint64_t block, uint64_t count, uint64_t extent, unsigned first)
{
    struct volume *v = o->view->v;
    /* What lies behind the size is being freed. */
    uint64_t end = (o->inode.size + v->block - 1) / v->block;
    struct extent e = {0};
    int rc;

    if (block >= end)
        return 0;
    count = MIN(count, end - block);
    if (extent == EXTENT_LOST)
        return out_lost(o, block, count);
    rc = view_extent(o->view, extent, &e);
    if (rc == 0 && (first + count > e.chunks || count * v->block > EXTENT_BYTES))
        rc = -EIO;
    if (rc < 0)
        return view_stale(o->view) ? -EBUSY : out_lost(o, block, count);
    rc = extent_read(v->keys, v->data, &e, v->block, first, (unsigned)count, o->data);
    if (rc < 0 && view_stale(o->view))
        return -EBUSY;
    o->done += count * v->block;
    volume_report_progress(o->report, o->done, o->since ? 0 : MAX(o->view->used_units * UNIT_BYTES, o->done));
    if (rc == 0)
        return out_record(o, REC_DATA, o->ino, block * v->block, o->data,
                          MIN(count * v->block, o->inode.size - block * v->block));
    for (uint64_t i = 0; i < count; i++) {
        rc = extent_read(v->keys, v->data, &e, v->block, first + (unsigned)i, 1, o->data);
        rc = rc < 0 ? out_lost(o, block + i, 1)
                    : out_record(o, REC_DATA, o->ino, (block + i) * v->block, o->data,
                                 MIN(v->block, o->inode.size - (block + i) * v->block));
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int out_range(void *ctx, const struct tree_iter *it)
{
    const struct disk_range *d = (const struct disk_range *)it->value;
    struct out *o = ctx;

    if (it->key.a != o->ino || it->key.kind != ITEM_RANGE)
        return 1;
    return out_blocks(o, it->key.b, le16_get(d->count), le64_get(d->extent), le16_get(d->first));
}

static int first_inode(void *ctx, const struct tree_iter *it)
{
    struct out *o = ctx;

    if (it->key.kind != ITEM_INODE)
        return 2;
    o->ino = it->key.a;
    return inode_decode(it->key.a, it->value, it->len, &o->inode) < 0 ? -EIO : 1;
}

static int walk(struct out *o, enum item_kind kind, view_fn fn)
{
    int rc;

    view_lock(o->view);
    rc = view_walk(o->view, &(struct tree_key){.kind = (uint8_t)kind, .a = o->ino}, fn, o);
    view_unlock(o->view);
    return rc;
}

static int out_attributes(struct out *o)
{
    struct disk_inode d;

    inode_encode(&o->inode, &d);
    o->inodes++;
    return out_record(o, REC_INODE, o->ino, 0, &d, sizeof(d));
}

static int out_inode(struct out *o)
{
    int rc;

    if (o->inode.nlink == 0)
        return 0; /* it has no name any more */
    rc = out_attributes(o);
    if (rc >= 0)
        rc = walk(o, ITEM_XATTR, out_item);
    if (rc >= 0)
        rc = walk(o, ITEM_INLINE, out_item);
    if (rc >= 0 && S_ISREG(o->inode.mode))
        rc = walk(o, ITEM_RANGE, out_range);
    if (rc >= 0 && S_ISDIR(o->inode.mode))
        rc = walk(o, ITEM_DIRENT, out_item);
    return rc < 0 ? rc : out_record(o, REC_DONE, o->ino, 0, NULL, 0);
}

static int out_begin(struct out *o, const struct export_secret *s)
{
    uint8_t key[32];

    o->head = s->head;
    o->head.version = le32_make(o->since ? EXPORT_INCREMENT : EXPORT_WHOLE);
    randombytes_buf(key, sizeof(key));
    randombytes_buf(o->head.nonce, sizeof(o->head.nonce));
    crypto_aead_xchacha20poly1305_ietf_encrypt(o->head.wrapped, NULL, key, sizeof(key), (const uint8_t *)&o->head,
                                               offsetof(struct export_head, wrapped), NULL, o->head.nonce, s->key);
    crypto_secretstream_xchacha20poly1305_init_push(&o->state, o->head.stream, key);
    sodium_memzero(key, sizeof(key));
    o->first = true;
    return o->io->write(o->io->ctx, &o->head, sizeof(o->head));
}

static int out_whole(struct out *o)
{
    int rc;

    do {
        rc = walk(o, ITEM_INODE, first_inode);
        if (rc != 1)
            break;
        rc = out_inode(o);
        o->ino++;
    } while (rc == 0);
    return rc < 0 ? rc : 0;
}

/* --- what changed --- */

/* The kinds that are exported, in the order of an inode's records. */
static const enum item_kind exported[] = {ITEM_INODE, ITEM_XATTR, ITEM_INLINE, ITEM_RANGE, ITEM_DIRENT};

/* The changes of one kind, in order of inodes. */
struct changes {
    struct view_diff *diff;
    struct view_change now;
    bool more; /* now is one that was not looked at yet */
};

static int changes_next(struct changes *c)
{
    int rc = view_diff_next(c->diff, &c->now);

    c->more = rc == 1;
    return rc < 0 ? rc : 0;
}

/* A row of blocks of a file: chunks of an extent. Empty: block is UINT64_MAX. */
struct run {
    uint64_t block, end, extent;
    unsigned first;
};

static struct run run_of(uint64_t block, const uint8_t *value)
{
    const struct disk_range *d = (const struct disk_range *)value;

    if (!value)
        return (struct run){.block = UINT64_MAX};
    return (struct run){block, block + le16_get(d->count), le64_get(d->extent), le16_get(d->first)};
}

static void run_cut(struct run *r, uint64_t to)
{
    if (r->extent != EXTENT_LOST)
        r->first += (unsigned)(to - r->block);
    r->block = to < r->end ? to : UINT64_MAX;
}

static int out_hole_end(struct out *o)
{
    le64 n = le64_make(o->hole_end - o->hole);
    int rc = o->hole_end > o->hole ? out_record(o, REC_HOLE, o->ino, o->hole, &n, sizeof(n)) : 0;

    o->hole = o->hole_end = 0;
    return rc;
}

/* What lies behind the size goes with the INODE record. */
static int out_hole(struct out *o, uint64_t block, uint64_t end)
{
    uint64_t blocks = (o->inode.size + o->view->v->block - 1) / o->view->v->block;
    int rc = 0;

    end = MIN(end, blocks);
    if (block >= end)
        return 0;
    if (block != o->hole_end) {
        rc = out_hole_end(o);
        o->hole = block;
    }
    o->hole_end = end;
    return rc;
}

/* The runs' blocks below `to`: what is another chunk now, and what is none any more. Ranges that are only cut in another
 * way are the same. */
static int out_runs(struct out *o, struct run *old, struct run *new, uint64_t to)
{
    int rc = 0;

    while (rc == 0) {
        uint64_t block = MIN(old->block, new->block), end = to;
        bool in_old = old->block == block, in_new = new->block == block;

        if (block >= to)
            break;
        end = MIN(end, in_old ? old->end : old->block);
        end = MIN(end, in_new ? new->end : new->block);
        if (in_old && !in_new) {
            rc = out_hole(o, block, end);
        } else if (!in_old || old->extent != new->extent || old->first != new->first) {
            view_lock(o->view);
            rc = out_blocks(o, block, end - block, new->extent, new->first);
            view_unlock(o->view);
            view_trim(o->view);
        }
        if (in_old)
            run_cut(old, end);
        if (in_new)
            run_cut(new, end);
    }
    return rc;
}

static bool blocky(const struct inode *i)
{
    return S_ISREG(i->mode) && !(i->flags & INODE_INLINE);
}

static int out_changed_ranges(struct out *o, struct changes *c)
{
    struct run old = {.block = UINT64_MAX}, new = old;
    int rc = 0;

    while (rc == 0 && c->more && c->now.key.a == o->ino && blocky(&o->inode)) {
        /* Ranges of one side do not overlap: what comes is behind what there was of that side. */
        rc = out_runs(o, &old, &new, c->now.key.b);
        if (rc == 0 && c->now.old)
            old = run_of(c->now.key.b, c->now.old);
        if (rc == 0 && c->now.new)
            new = run_of(c->now.key.b, c->now.new);
        if (rc == 0)
            rc = changes_next(c);
    }
    if (rc == 0)
        rc = out_runs(o, &old, &new, UINT64_MAX);
    return rc < 0 ? rc : out_hole_end(o);
}

/* The name in a DIRENT or XATTR item, which the node's check has found well formed. */
static const char *name_in(enum item_kind kind, const uint8_t *value, size_t *ret_len)
{
    if (kind == ITEM_DIRENT) {
        *ret_len = ((const struct disk_dirent *)value)->namelen;
        return (const char *)value + sizeof(struct disk_dirent);
    }
    *ret_len = ((const struct disk_xattr *)value)->namelen;
    return (const char *)value + sizeof(struct disk_xattr);
}

/* 1 when the view has an item with this name, 0, or -EIO. */
static int has_name(struct view *w, enum item_kind kind, uint64_t ino, const char *name, size_t n)
{
    uint64_t hash = name_hash(w->v->keys, ino, name, n);
    struct tree_key key = tree_key(kind, ino, hash);
    struct tree_iter it;
    bool found = false;
    int rc;

    view_lock(w);
    for (rc = tree_iter_seek(w->tree, &key, &it); rc == 0 && !found; rc = tree_iter_next(&it)) {
        const char *have;
        size_t len;

        if (it.key.kind != kind || it.key.a != ino || it.key.b >= hash + PROBE_MAX)
            break;
        have = name_in(kind, it.value, &len);
        found = len == n && memcmp(have, name, n) == 0;
    }
    view_unlock(w);
    view_trim(w);
    return found ? 1 : rc == -ENOENT ? 0 : rc;
}

/* A name that went may be at another place now: then it is not gone. */
static int out_changed_name(struct out *o, enum item_kind kind, const struct view_change *c)
{
    int rc = 0;

    if (c->old) {
        size_t n;
        const char *name = name_in(kind, c->old, &n);

        rc = has_name(o->view, kind, o->ino, name, n);
        if (rc == 0)
            rc = out_record(o, kind == ITEM_DIRENT ? REC_NODIRENT : REC_NOXATTR, o->ino, 0, name, n);
    }
    if (rc >= 0 && c->new)
        rc = out_record(o, kind == ITEM_DIRENT ? REC_DIRENT : REC_XATTR, o->ino, 0, c->new, c->new_len);
    return rc < 0 ? rc : 0;
}

static int out_changed_item(struct out *o, enum item_kind kind, const struct view_change *c)
{
    if (kind == ITEM_XATTR || kind == ITEM_DIRENT)
        return out_changed_name(o, kind, c);
    if (kind == ITEM_INLINE)
        return c->new ? out_record(o, REC_INLINE, o->ino, 0, c->new, c->new_len)
                      : out_record(o, REC_NOINLINE, o->ino, 0, NULL, 0);
    return 0; /* the inode itself is said already */
}

/* o->inode is in both states, with names. */
static int out_changed(struct out *o, struct changes *c)
{
    int rc = out_attributes(o);

    for (size_t k = 0; k < ARRAY_LEN(exported) && rc == 0; k++) {
        if (exported[k] == ITEM_RANGE)
            rc = out_changed_ranges(o, &c[k]);
        while (rc == 0 && c[k].more && c[k].now.key.a == o->ino) {
            rc = out_changed_item(o, exported[k], &c[k].now);
            if (rc == 0)
                rc = changes_next(&c[k]);
        }
    }
    return rc < 0 ? rc : out_record(o, REC_DONE, o->ino, 0, NULL, 0);
}

/* 1: it is there, and has a name; 0, or -EIO. */
static int named(struct view *w, uint64_t ino, struct inode *ret)
{
    int rc;

    view_lock(w);
    rc = view_inode(w, ino, ret);
    view_unlock(w);
    view_trim(w);
    if (rc == -ENOENT)
        return 0;
    return rc < 0 ? rc : ret->nlink > 0;
}

static int out_change(struct out *o, struct changes *c)
{
    struct inode old;
    int was = named(o->since, o->ino, &old), is = was < 0 ? was : named(o->view, o->ino, &o->inode), rc = 0;

    if (is < 0)
        return is;
    /* The number may have come to another file. */
    if (was && is && old.generation == o->inode.generation && (old.mode & S_IFMT) == (o->inode.mode & S_IFMT)) {
        rc = out_changed(o, c);
    } else {
        if (was)
            rc = out_record(o, REC_GONE, o->ino, 0, NULL, 0);
        if (rc == 0 && is)
            rc = out_inode(o);
    }
    for (size_t k = 0; k < ARRAY_LEN(exported); k++)
        while (rc == 0 && c[k].more && c[k].now.key.a == o->ino)
            rc = changes_next(&c[k]);
    return rc;
}

static int out_changes(struct out *o)
{
    struct changes c[ARRAY_LEN(exported)] = {0};
    bool more = true;
    int rc = 0;

    for (size_t k = 0; k < ARRAY_LEN(exported) && rc == 0; k++) {
        struct tree_key from = {.kind = (uint8_t)exported[k]}, to = {.kind = (uint8_t)(exported[k] + 1)};

        rc = view_diff_open(o->since, o->view, &from, &to, &c[k].diff);
        if (rc == 0)
            rc = changes_next(&c[k]);
    }
    while (rc == 0) {
        more = false;
        for (size_t k = 0; k < ARRAY_LEN(exported); k++) {
            if (c[k].more && (!more || c[k].now.key.a < o->ino))
                o->ino = c[k].now.key.a;
            more |= c[k].more;
        }
        if (!more)
            break;
        rc = out_change(o, c);
    }
    for (size_t k = 0; k < ARRAY_LEN(exported); k++)
        view_diff_close(c[k].diff);
    return rc;
}

/* --- the whole stream --- */

static struct state_payload state_of(const struct view *w)
{
    struct state_payload s = {0};

    memcpy(s.volume, w->v->params.id, sizeof(s.volume));
    if (!le64_get(w->root.addr))
        return s;
    s.generation = le64_make(w->generation);
    memcpy(s.root_mac, w->root.mac, sizeof(s.root_mac));
    return s;
}

static int out_stream(struct out *o, const struct export_secret *s)
{
    const struct volume_params *p = &o->view->v->params;
    struct increment_payload i = {
        .params = {le32_make(p->block_size), le32_make(p->profile), le64_make(p->size_limit)},
        .now = state_of(o->view),
    };
    int rc;

    if (o->since)
        i.since = state_of(o->since);
    if (o->since && (!le64_get(i.now.generation) || !le64_get(i.since.generation)))
        return -ENOTSUP;
    if (o->since && (memcmp(i.now.volume, i.since.volume, sizeof(i.now.volume)) != 0 ||
                     o->since->generation > o->view->generation || o->since->next_extent > o->view->next_extent))
        return -EINVAL;
    rc = out_begin(o, s);
    if (rc == 0)
        rc = out_record(o, REC_PARAMS, 0, 0, &i, o->since ? sizeof(i) : sizeof(i.params));
    if (rc == 0)
        rc = o->since ? out_changes(o) : out_whole(o);
    if (rc == -EIO && (view_stale(o->view) || (o->since && view_stale(o->since))))
        rc = -EBUSY;
    if (rc == 0)
        rc = out_record(o, REC_END, o->inodes, o->done, &i.now, sizeof(i.now));
    if (rc == 0)
        rc = out_frame(o, crypto_secretstream_xchacha20poly1305_TAG_FINAL);
    return rc < 0 ? rc : o->lines;
}

int export_view(struct view *view, struct view *since, const struct export_secret *s, const struct export_io *io,
                const struct volume_report *report)
{
    struct out *o = xcalloc(1, sizeof(*o));
    int rc;

    o->io = io;
    o->report = report;
    o->view = view;
    o->since = since;
    rc = out_stream(o, s);
    sodium_memzero(o, sizeof(*o));
    free(o);
    return rc;
}

int volume_export(struct volume *v, const char *snapshot, const char *since, const struct export_secret *s,
                  const struct export_io *io, const struct volume_report *report)
{
    struct view view, old;
    int rc = snapshot ? view_open_snapshot(v, snapshot, &view) : view_open(v, true, &view);

    if (rc < 0)
        return rc;
    rc = since ? view_open_snapshot(v, since, &old) : 0;
    if (rc == 0) {
        rc = export_view(&view, since ? &old : NULL, s, io, report);
        if (since)
            view_close(&old);
    }
    view_close(&view);
    volume_trim(v);
    return rc;
}

/* --- reading --- */

struct in {
    const struct export_io *io;
    const struct volume_report *report;
    crypto_secretstream_xchacha20poly1305_state pull;
    const struct export_head *head;
    unsigned streams; /* before this one */
    uint64_t frames, frames_before;
    bool final, increment;
    struct state_payload state; /* reached by the streams before; of this one in the end */
    struct increment_payload params;
    size_t at;
    uint8_t plain[EXPORT_FRAME_PLAIN], cipher[EXPORT_FRAME_BYTES];
    uint8_t payload[RECORD_MAX];
    struct record_head h;
    size_t len;
    uint64_t inodes;
    /* import */
    struct volume *v;
    struct inode inode; /* whose records these are; ino 0: none */
    uint64_t next_ino;  /* inodes of this stream below are done */
};

__attribute__((format(printf, 3, 4))) static int bad(struct in *in, int err, const char *fmt, ...)
{
    char text[200], line[230];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (in->streams)
        snprintf(line, sizeof(line), "increment %u: %s", in->streams, text);
    in->report->line(in->report->ctx, in->streams ? line : text);
    return err;
}

static int in_frame(struct in *in)
{
    uint64_t where = sizeof(*in->head) + in->frames * EXPORT_FRAME_BYTES;
    uint8_t tag;
    int rc = in->final ? -ENODATA : in->io->read(in->io->ctx, in->cipher, EXPORT_FRAME_BYTES);

    if (rc == -ENODATA)
        return bad(in, -EBADMSG, "the stream is cut off in its frame at byte %llu", U(where));
    if (rc < 0)
        return rc;
    if (crypto_secretstream_xchacha20poly1305_pull(&in->pull, in->plain, NULL, &tag, in->cipher, EXPORT_FRAME_BYTES,
                                                   in->frames ? NULL : (const uint8_t *)in->head,
                                                   in->frames ? 0 : sizeof(*in->head)))
        return bad(in, -EBADMSG, "the stream was altered: its frame at byte %llu does not authenticate", U(where));
    in->final = tag == crypto_secretstream_xchacha20poly1305_TAG_FINAL;
    in->frames++;
    in->at = 0;
    volume_report_progress(in->report, (in->frames_before + in->frames) * EXPORT_FRAME_BYTES, 0);
    return volume_report_stop(in->report) ? -ECANCELED : 0;
}

static int in_bytes(struct in *in, void *buf, size_t n)
{
    while (n) {
        size_t k;

        if (in->at == EXPORT_FRAME_PLAIN || in->frames == 0) {
            int rc = in_frame(in);

            if (rc < 0)
                return rc;
        }
        k = MIN(n, EXPORT_FRAME_PLAIN - in->at);
        memcpy(buf, in->plain + in->at, k);
        in->at += k;
        buf = (uint8_t *)buf + k;
        n -= k;
    }
    return 0;
}

static int in_record(struct in *in)
{
    int rc = in_bytes(in, &in->h, sizeof(in->h));

    if (rc < 0)
        return rc;
    in->len = le32_get(in->h.len);
    if (in->h.type < REC_PARAMS || in->h.type > (in->increment ? REC_HOLE : REC_END) || in->len > RECORD_MAX)
        return bad(in, -EUCLEAN, "an impossible record in the frame before byte %llu",
                   U(sizeof(*in->head) + in->frames * EXPORT_FRAME_BYTES));
    return in_bytes(in, in->payload, in->len);
}

/* Begins to read a stream whose head was opened, up to its PARAMS. */
static int in_open(struct in *in, const struct export_secret *s)
{
    uint8_t key[32];
    int rc;

    in->head = &s->head;
    in->increment = le32_get(s->head.version) == EXPORT_INCREMENT;
    in->frames_before += in->frames;
    in->frames = in->inodes = in->next_ino = 0;
    in->final = false;
    rc = unwrap(s, key);
    if (rc == 0 && crypto_secretstream_xchacha20poly1305_init_pull(&in->pull, s->head.stream, key))
        rc = -EBADMSG;
    sodium_memzero(key, sizeof(key));
    if (rc == 0)
        rc = in_record(in);
    if (rc < 0)
        return rc;
    if (in->h.type != REC_PARAMS || in->len != (in->increment ? sizeof(in->params) : sizeof(in->params.params)))
        return bad(in, -EUCLEAN, "the stream does not begin as it should");
    in->params = (struct increment_payload){0};
    memcpy(&in->params, in->payload, in->len);
    return 0;
}

static int in_begin(struct in **ret, const struct export_secret *s, const struct export_io *io,
                    const struct volume_report *report, struct volume_params *p)
{
    struct in *in = *ret = xcalloc(1, sizeof(*in));
    int rc;

    in->io = io;
    in->report = report;
    rc = in_open(in, s);
    if (rc < 0)
        return rc;
    p->block_size = le32_get(in->params.params.block_size);
    p->profile = le32_get(in->params.params.profile);
    p->size_limit = le64_get(in->params.params.size_limit);
    return 0;
}

/* The increment after a stream that ended as it should: 1, and it is based on that one's state; 0: there is none. */
static int in_next(struct in *in)
{
    const struct export_secret *s = NULL;
    uint32_t block_size = le32_get(in->params.params.block_size);
    uint8_t more;
    int rc = in->io->next ? in->io->next(in->io->ctx, &s) : 0;

    if (rc == 0 && in->io->read(in->io->ctx, &more, 1) != -ENODATA)
        return bad(in, -EBADMSG, "something follows the stream's end at byte %llu",
                   U(sizeof(*in->head) + in->frames * EXPORT_FRAME_BYTES));
    if (rc <= 0)
        return rc;
    in->streams++;
    rc = in_open(in, s);
    if (rc < 0)
        return rc;
    if (!in->increment)
        return bad(in, -EINVAL, "is a whole export");
    if (!le64_get(in->state.generation))
        return bad(in, -EINVAL, "the export before it does not say which state it is of");
    if (memcmp(in->params.since.volume, in->state.volume, sizeof(in->state.volume)) != 0)
        return bad(in, -EINVAL, "is of another volume");
    if (memcmp(&in->params.since, &in->state, sizeof(in->state)) != 0)
        return bad(in, -EINVAL, "is based on generation %llu, not on what comes before it, generation %llu",
                   U(le64_get(in->params.since.generation)), U(le64_get(in->state.generation)));
    if (le32_get(in->params.params.block_size) != block_size)
        return bad(in, -EUCLEAN, "has another block size");
    return 1;
}

static void in_end(struct in *in)
{
    sodium_memzero(in, sizeof(*in));
    free(in);
}

/* END is the last record, in the last frame. */
static int in_finish(struct in *in)
{
    struct state_payload state = {0}; /* writers of before increments did not say it */
    int rc;

    if (in->len && in->len != sizeof(state))
        return bad(in, -EUCLEAN, "the stream does not end as it should");
    memcpy(&state, in->payload, in->len);
    rc = in->at == EXPORT_FRAME_PLAIN && !in->final ? in_frame(in) : 0;

    if (rc < 0)
        return rc;
    if (!in->final || le64_get(in->h.a) != in->inodes ||
        !sodium_is_zero(in->plain + in->at, EXPORT_FRAME_PLAIN - in->at))
        return bad(in, -EUCLEAN, "the stream does not end as it should");
    if (in->increment && memcmp(&state, &in->params.now, sizeof(state)) != 0)
        return bad(in, -EUCLEAN, "the stream's end is of another state than its beginning");
    in->state = state;
    return 0;
}

static int verify_one(struct in *in)
{
    int rc;

    do {
        rc = in_record(in);
        in->inodes += rc == 0 && in->h.type == REC_INODE;
    } while (rc == 0 && in->h.type != REC_END);
    return rc < 0 ? rc : in_finish(in);
}

int export_verify(const struct export_secret *s, const struct export_io *io, struct volume_params *ret_params,
                  const struct volume_report *report)
{
    struct volume_params p = {0};
    struct in *in;
    int rc = in_begin(&in, s, io, report, &p), more = 1;

    while (rc == 0 && more == 1) {
        rc = verify_one(in);
        if (rc == 0)
            more = in_next(in);
    }
    rc = more < 0 ? more : rc;
    if (rc == 0)
        *ret_params = p;
    in_end(in);
    return rc;
}

/* --- import --- */

static int inode_now(struct in *in, uint64_t ino, struct inode *ret)
{
    int rc;

    pthread_rwlock_rdlock(&in->v->state);
    rc = inode_get(in->v, ino, ret);
    pthread_rwlock_unlock(&in->v->state);
    return rc;
}

static uint64_t blocks_of(const struct in *in, uint64_t bytes)
{
    return (bytes + in->v->block - 1) / in->v->block;
}

static int import_inode(struct in *in)
{
    uint64_t ino = le64_get(in->h.a);
    struct inode i, old = {0};
    bool fresh;
    struct tx tx;
    int rc;

    if (in->inode.ino || !ino || ino < in->next_ino || ino >> 48 ||
        (!in->increment && !in->inodes && ino != VOLUME_ROOT_INO) || inode_decode(ino, in->payload, in->len, &i) < 0)
        return -EUCLEAN;
    rc = inode_now(in, ino, &old);
    if (rc < 0 && rc != -ENOENT)
        return rc;
    fresh = rc == -ENOENT;
    if (!fresh && (i.mode & S_IFMT) != (old.mode & S_IFMT))
        return -EUCLEAN;
    /* It was cut: nobody says which blocks there were behind its end. */
    if (old.blocks)
        rc = file_free_blocks(in->v, ino, blocky(&i) ? blocks_of(in, i.size) : 0, UINT64_MAX);
    if (rc == 0)
        rc = inode_now(in, ino, &old);
    if (rc < 0 && !fresh)
        return rc;
    in->inode = i;
    in->inodes++;
    in->next_ino = ino + 1;
    i.blocks = old.blocks;
    rc = tx_begin(in->v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    /* A number below the next one counts as one that is there already: but a file may get its first name late. */
    if (fresh && ino < in->v->next_inode)
        in->v->inodes++;
    rc = tx_inode_put(&tx, &i);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

#define GONE_STEP 128 /* items in one transaction: it fits the smallest log */

/* Removes some of what a gone inode has; 1: all is gone, and itself. */
static int gone_step(struct in *in, uint64_t ino)
{
    static const enum item_kind kinds[] = {ITEM_DIRENT, ITEM_XATTR, ITEM_INLINE};
    unsigned n = 0;
    struct tx tx;
    int rc = tx_begin(in->v, &tx, TX_CHANGES);

    if (rc < 0)
        return rc;
    for (size_t k = 0; k < ARRAY_LEN(kinds) && rc == 0; k++) {
        struct tree_key key = tree_key(kinds[k], ino, 0), found;
        const uint8_t *value;
        size_t len;

        while (rc == 0 && n < GONE_STEP) {
            rc = tree_ge(in->v->tree, &key, &found, &value, &len);
            if (rc == -ENOENT || (rc == 0 && (found.kind != kinds[k] || found.a != ino))) {
                rc = 0;
                break;
            }
            if (rc == 0)
                rc = tx_del(&tx, &found);
            key.b = found.b + 1;
            n++;
        }
    }
    if (rc == 0 && n < GONE_STEP)
        rc = tx_del(&tx, &(struct tree_key){.kind = ITEM_INODE, .a = ino});
    if (rc < 0)
        return tx_abort(&tx, rc);
    rc = tx_commit(&tx);
    return rc < 0 ? rc : n < GONE_STEP;
}

static int import_gone(struct in *in)
{
    uint64_t ino = le64_get(in->h.a);
    struct inode old;
    int rc;

    if (in->inode.ino || ino <= VOLUME_ROOT_INO || ino < in->next_ino || in->len)
        return -EUCLEAN;
    in->next_ino = ino;
    rc = inode_now(in, ino, &old);
    if (rc < 0)
        return rc == -ENOENT ? -EUCLEAN : rc;
    if (old.blocks)
        rc = file_free_blocks(in->v, ino, 0, UINT64_MAX);
    while (rc == 0)
        rc = gone_step(in, ino);
    return rc < 0 ? rc : 0;
}

static bool dirent_match(const uint8_t *value, size_t len, const char *name, size_t n)
{
    size_t have;

    return len == sizeof(struct disk_dirent) + n && memcmp(name_in(ITEM_DIRENT, value, &have), name, n) == 0;
}

static bool xattr_match(const uint8_t *value, size_t len, const char *name, size_t n)
{
    size_t have;

    return len >= sizeof(struct disk_xattr) + n && memcmp(name_in(ITEM_XATTR, value, &have), name, n) == 0 && have == n;
}

/* [state] The item of the inode that carries this name. -ENOENT, -EIO. */
static int find_name(struct in *in, enum item_kind kind, const char *name, size_t n, struct tree_key *ret_key)
{
    uint8_t value[ITEM_VALUE_MAX];
    ssize_t len = names_find(in->v, kind, in->inode.ino, name, n, kind == ITEM_DIRENT ? dirent_match : xattr_match,
                             ret_key, value, sizeof(value));

    return len < 0 ? (int)len : 0;
}

static int import_item(struct in *in, enum item_kind kind)
{
    size_t name_at = kind == ITEM_DIRENT ? sizeof(struct disk_dirent) : sizeof(struct disk_xattr), name_len = 0;
    struct tree_key key = tree_key(ITEM_INLINE, in->inode.ino, 0);
    struct tx tx;
    int rc;

    if (kind != ITEM_INLINE) {
        if (in->len < name_at)
            return -EUCLEAN;
        name_len = kind == ITEM_DIRENT ? ((const struct disk_dirent *)in->payload)->namelen
                                       : ((const struct disk_xattr *)in->payload)->namelen;
        if (!name_len || name_at + name_len > in->len)
            return -EUCLEAN;
    }
    if (in->len > ITEM_VALUE_MAX)
        return -EUCLEAN;
    rc = tx_begin(in->v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    if (kind != ITEM_INLINE) {
        const char *name = (const char *)in->payload + name_at;

        rc = find_name(in, kind, name, name_len, &key);
        if (rc == -ENOENT)
            rc = names_free_key(in->v, kind, in->inode.ino, name, name_len, &key);
    }
    if (rc == 0)
        rc = tx_put(&tx, &key, in->payload, in->len);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

/* Of a name, or of the inline content. */
static int import_no_item(struct in *in, enum item_kind kind)
{
    struct tree_key key = tree_key(ITEM_INLINE, in->inode.ino, 0);
    uint8_t value[ITEM_VALUE_MAX];
    struct tx tx;
    int rc;

    if (kind == ITEM_INLINE ? in->len != 0 : !in->len || in->len > VOLUME_NAME_BYTES)
        return -EUCLEAN;
    rc = tx_begin(in->v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    if (kind == ITEM_INLINE)
        rc = tx_get(&tx, &key, value, sizeof(value)) < 0 ? -ENOENT : 0;
    else
        rc = find_name(in, kind, (const char *)in->payload, in->len, &key);
    if (rc == 0)
        rc = tx_del(&tx, &key);
    else if (rc == -ENOENT)
        rc = -EUCLEAN;
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

static int import_data(struct in *in)
{
    uint64_t off = le64_get(in->h.b);
    size_t len = in->len, part = len % in->v->block;
    ssize_t n;

    if (!blocky(&in->inode) || !len || len > in->inode.size || off > in->inode.size - len)
        return -EUCLEAN;
    /* Whole blocks: so nothing is read of what was there before, which may be lost, and none of it stays. */
    if (in->increment) {
        if (off % in->v->block || len > EXTENT_BYTES || (part && off + len != in->inode.size))
            return -EUCLEAN;
        if (part) {
            memset(in->payload + len, 0, in->v->block - part);
            len += in->v->block - part;
        }
    }
    n = vol_write(in->v, in->inode.ino, off, in->payload, len);
    return n < 0 ? (int)n : 0;
}

static int import_hole(struct in *in)
{
    uint64_t block = le64_get(in->h.b), blocks = blocks_of(in, in->inode.size), count;
    le64 n;

    if (!blocky(&in->inode) || in->len != sizeof(n))
        return -EUCLEAN;
    memcpy(&n, in->payload, sizeof(n));
    count = le64_get(n);
    if (!count || count > blocks || block > blocks - count)
        return -EUCLEAN;
    return file_free_blocks(in->v, in->inode.ino, block, block + count);
}

static int import_lost(struct in *in)
{
    uint64_t block = le64_get(in->h.b), blocks = blocks_of(in, in->inode.size), count;
    struct tree_key key = tree_key(ITEM_RANGE, in->inode.ino, block);
    struct disk_range d = {.extent = le64_make(EXTENT_LOST)};
    struct inode now;
    struct tx tx;
    le32 n;
    int rc;

    if (!blocky(&in->inode) || in->len != sizeof(n))
        return -EUCLEAN;
    memcpy(&n, in->payload, sizeof(n));
    count = le32_get(n);
    if (!count || count > RANGE_LOST_MAX || count > blocks || block > blocks - count)
        return -EUCLEAN;
    d.count = le16_make((uint16_t)count);
    if (in->increment) {
        rc = file_free_blocks(in->v, in->inode.ino, block, block + count);
        if (rc < 0)
            return rc;
    }
    rc = tx_begin(in->v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, in->inode.ino, &now);
    now.blocks += count;
    if (rc == 0)
        rc = tx_put(&tx, &key, &d, sizeof(d));
    if (rc == 0)
        rc = tx_inode_put(&tx, &now);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

/* Writing has moved the times. */
static int import_done(struct in *in)
{
    struct inode now;
    struct tx tx;
    int rc = tx_begin(in->v, &tx, TX_GROWS);

    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, in->inode.ino, &now);
    if (rc == 0) {
        in->inode.blocks = now.blocks;
        rc = tx_inode_put(&tx, &in->inode);
    }
    in->inode.ino = 0;
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

static int import_record(struct in *in)
{
    if (in->h.type == REC_INODE)
        return import_inode(in);
    if (in->h.type == REC_GONE)
        return import_gone(in);
    if (le64_get(in->h.a) != in->inode.ino || !in->inode.ino)
        return -EUCLEAN;
    switch (in->h.type) {
    case REC_XATTR:
        return import_item(in, ITEM_XATTR);
    case REC_INLINE:
        return import_item(in, ITEM_INLINE);
    case REC_DIRENT:
        return import_item(in, ITEM_DIRENT);
    case REC_DATA:
        return import_data(in);
    case REC_LOST:
        return import_lost(in);
    case REC_DONE:
        return import_done(in);
    case REC_NODIRENT:
        return import_no_item(in, ITEM_DIRENT);
    case REC_NOXATTR:
        return import_no_item(in, ITEM_XATTR);
    case REC_NOINLINE:
        return import_no_item(in, ITEM_INLINE);
    case REC_HOLE:
        return import_hole(in);
    default:
        return -EUCLEAN;
    }
}

static void first_finding(void *ctx, const char *text)
{
    struct in *in = ctx;

    in->report->line(in->report->ctx, text);
}

static int import_one(struct in *in)
{
    int rc = 0;

    while (rc == 0) {
        rc = in_record(in);
        if (rc == 0 && in->h.type == REC_END)
            break;
        if (rc == 0)
            rc = import_record(in);
        if (rc == -EUCLEAN)
            bad(in, rc, "the stream holds an impossible record, type %u of inode %llu", in->h.type,
                U(le64_get(in->h.a)));
    }
    if (rc == 0 && in->inode.ino)
        rc = bad(in, -EUCLEAN, "the stream ends within inode %llu", U(in->inode.ino));
    return rc < 0 ? rc : in_finish(in);
}

/* follow: the volume's limit becomes that of each increment. It grows before what needs it, and shrinks after. */
static int import_increment(struct in *in, bool follow)
{
    uint64_t limit = le64_get(in->params.params.size_limit);
    struct volume_params now;
    int rc = 0;

    volume_get_params(in->v, &now);
    if (follow && (limit < VOLUME_SIZE_MIN || limit > VOLUME_SIZE_MAX))
        return bad(in, -EUCLEAN, "its volume's size is impossible");
    if (follow && limit > now.size_limit)
        rc = volume_resize(in->v, limit);
    if (rc == 0)
        rc = import_one(in);
    if (rc == 0 && follow && limit < now.size_limit)
        rc = volume_resize(in->v, limit);
    return rc;
}

static int import_all(struct in *in, bool follow)
{
    int rc = import_one(in), more = 1;

    while (rc == 0 && more == 1) {
        more = in_next(in);
        if (more == 1)
            rc = import_increment(in, follow);
    }
    rc = more < 0 ? more : rc;
    if (rc == 0 && volume_check(in->v, false, first_finding, in) != 0)
        rc = -EUCLEAN;
    return rc;
}

int volume_import(struct store *data, struct store *log, const struct key *key, const struct volume_params *params,
                  const struct export_secret *s, const struct export_io *io, const struct volume_report *report)
{
    struct volume_params p = *params;
    struct volume_options o = {.background = false};
    struct in *in;
    int rc = in_begin(&in, s, io, report, &p), closed;

    p.root_mode = 0700;
    p.log_segment = params->log_segment;
    if (rc == 0 && in->increment)
        rc = bad(in, -EINVAL, "this is an increment: the whole export that it is based on comes first");
    if (rc == 0 && params->size_limit)
        p.size_limit = params->size_limit;
    if (rc == 0 && params->block_size && params->block_size != p.block_size)
        rc = bad(in, -EINVAL, "the export has blocks of %uk: give --block %uk", p.block_size / 1024,
                 p.block_size / 1024);
    if (rc == 0 && params->block_size)
        p.profile = params->profile;
    if (rc == 0)
        rc = volume_format(data, log, key, &p);
    if (rc < 0) {
        data->ops->close(data);
        log->ops->close(log);
    } else {
        rc = volume_open(data, log, key, p.id, &o, &in->v);
        if (rc == 0) {
            rc = import_all(in, !params->size_limit);
            closed = volume_close(in->v);
            rc = rc < 0 ? rc : closed;
        }
    }
    in_end(in);
    return rc;
}
