/*
 * export.c - see coffer/export.h and EXPORT.md. Owns the stream: frames of a fixed size outside, records inside.
 *
 * 1. A reader believes nothing that has not authenticated: a frame is opened before its bytes are looked at.
 * 2. The stream ends with a FINAL frame that holds END; anything less is a cut stream.
 * 3. An import is checked as a whole (volume_check) before it counts.
 */
#include "coffer/export.h"

#include "fs/volume/names.h"
#include "fs/volume/view.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>

#define U(x)       ((unsigned long long)(x))
#define RECORD_MAX (EXTENT_BYTES + 64)

enum record { REC_PARAMS = 1, REC_INODE, REC_XATTR, REC_INLINE, REC_DATA, REC_LOST, REC_DIRENT, REC_DONE, REC_END };

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
    h->version = le32_make(EXPORT_VERSION);
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
    if (le32_get(h->version) != EXPORT_VERSION || le64_get(h->ops) > EXPORT_OPS_MAX ||
        le64_get(h->mem) > EXPORT_MEM_MAX)
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
    struct view view;
    uint64_t ino, done, inodes;
    struct inode inode;
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

static int out_range(void *ctx, const struct tree_iter *it)
{
    const struct disk_range *d = (const struct disk_range *)it->value;
    uint64_t block = it->key.b, count = le16_get(d->count), end;
    struct out *o = ctx;
    struct volume *v = o->view.v;
    struct extent e;
    int rc;

    if (it->key.a != o->ino || it->key.kind != ITEM_RANGE)
        return 1;
    /* What lies behind the size is being freed. */
    end = (o->inode.size + v->block - 1) / v->block;
    if (block >= end)
        return 0;
    count = MIN(count, end - block);
    if (le64_get(d->extent) == EXTENT_LOST)
        return out_lost(o, block, count);
    rc = view_extent(&o->view, le64_get(d->extent), &e);
    if (rc == 0 && le16_get(d->first) + count > e.chunks)
        rc = -EIO;
    if (rc == 0)
        rc = extent_read(v->keys, v->data, &e, v->block, le16_get(d->first), (unsigned)count, o->data);
    if (rc < 0 && view_stale(&o->view))
        return -EBUSY;
    o->done += count * v->block;
    volume_report_progress(o->report, o->done, MAX(o->view.used_units * UNIT_BYTES, o->done));
    if (rc == 0)
        return out_record(o, REC_DATA, o->ino, block * v->block, o->data,
                          MIN(count * v->block, o->inode.size - block * v->block));
    for (uint64_t i = 0; i < count; i++) {
        rc = extent_read(v->keys, v->data, &e, v->block, le16_get(d->first) + (unsigned)i, 1, o->data);
        rc = rc < 0 ? out_lost(o, block + i, 1)
                    : out_record(o, REC_DATA, o->ino, (block + i) * v->block, o->data,
                                 MIN(v->block, o->inode.size - (block + i) * v->block));
        if (rc < 0)
            return rc;
    }
    return 0;
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

    view_lock(&o->view);
    rc = view_walk(&o->view, &(struct tree_key){.kind = (uint8_t)kind, .a = o->ino}, fn, o);
    view_unlock(&o->view);
    return rc;
}

static int out_inode(struct out *o)
{
    struct disk_inode d;
    int rc;

    if (o->inode.nlink == 0)
        return 0; /* it has no name any more */
    inode_encode(&o->inode, &d);
    o->inodes++;
    rc = out_record(o, REC_INODE, o->ino, 0, &d, sizeof(d));
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
    randombytes_buf(key, sizeof(key));
    randombytes_buf(o->head.nonce, sizeof(o->head.nonce));
    crypto_aead_xchacha20poly1305_ietf_encrypt(o->head.wrapped, NULL, key, sizeof(key), (const uint8_t *)&o->head,
                                               offsetof(struct export_head, wrapped), NULL, o->head.nonce, s->key);
    crypto_secretstream_xchacha20poly1305_init_push(&o->state, o->head.stream, key);
    sodium_memzero(key, sizeof(key));
    o->first = true;
    return o->io->write(o->io->ctx, &o->head, sizeof(o->head));
}

int volume_export(struct volume *v, const struct export_secret *s, const struct export_io *io,
                  const struct volume_report *report)
{
    struct out *o = xcalloc(1, sizeof(*o));
    struct params_payload p;
    int rc;

    o->io = io;
    o->report = report;
    rc = view_open(v, true, &o->view);
    if (rc < 0) {
        free(o);
        return rc;
    }
    p = (struct params_payload){le32_make(v->params.block_size), le32_make(v->params.profile),
                                le64_make(v->params.size_limit)};
    rc = out_begin(o, s);
    if (rc == 0)
        rc = out_record(o, REC_PARAMS, 0, 0, &p, sizeof(p));
    while (rc == 0) {
        rc = walk(o, ITEM_INODE, first_inode);
        if (rc != 1)
            break;
        rc = out_inode(o);
        o->ino++;
    }
    rc = rc < 0 ? rc : 0;
    if (rc == -EIO && view_stale(&o->view))
        rc = -EBUSY;
    if (rc == 0)
        rc = out_record(o, REC_END, o->inodes, o->done, NULL, 0);
    if (rc == 0)
        rc = out_frame(o, crypto_secretstream_xchacha20poly1305_TAG_FINAL);
    rc = rc < 0 ? rc : o->lines;
    view_close(&o->view);
    sodium_memzero(o, sizeof(*o));
    free(o);
    volume_trim(v);
    return rc;
}

/* --- reading --- */

struct in {
    const struct export_io *io;
    const struct volume_report *report;
    crypto_secretstream_xchacha20poly1305_state state;
    const struct export_head *head;
    uint64_t frames;
    bool final;
    size_t at;
    uint8_t plain[EXPORT_FRAME_PLAIN], cipher[EXPORT_FRAME_BYTES];
    uint8_t payload[RECORD_MAX];
    struct record_head h;
    size_t len;
    /* import */
    struct volume *v;
    struct inode inode;
    uint64_t inodes;
};

__attribute__((format(printf, 3, 4))) static int bad(struct in *in, int err, const char *fmt, ...)
{
    char text[200];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    in->report->line(in->report->ctx, text);
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
    if (crypto_secretstream_xchacha20poly1305_pull(&in->state, in->plain, NULL, &tag, in->cipher, EXPORT_FRAME_BYTES,
                                                   in->frames ? NULL : (const uint8_t *)in->head,
                                                   in->frames ? 0 : sizeof(*in->head)))
        return bad(in, -EBADMSG, "the stream was altered: its frame at byte %llu does not authenticate", U(where));
    in->final = tag == crypto_secretstream_xchacha20poly1305_TAG_FINAL;
    in->frames++;
    in->at = 0;
    volume_report_progress(in->report, in->frames * EXPORT_FRAME_BYTES, 0);
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
    if (in->h.type < REC_PARAMS || in->h.type > REC_END || in->len > RECORD_MAX)
        return bad(in, -EUCLEAN, "an impossible record in the frame before byte %llu",
                   U(sizeof(*in->head) + in->frames * EXPORT_FRAME_BYTES));
    return in_bytes(in, in->payload, in->len);
}

static int in_begin(struct in **ret, const struct export_secret *s, const struct export_io *io,
                    const struct volume_report *report, struct volume_params *p)
{
    struct in *in = *ret = xcalloc(1, sizeof(*in));
    const struct params_payload *pp = (const struct params_payload *)in->payload;
    uint8_t key[32];
    int rc;

    in->io = io;
    in->report = report;
    in->head = &s->head;
    rc = unwrap(s, key);
    if (rc == 0 && crypto_secretstream_xchacha20poly1305_init_pull(&in->state, s->head.stream, key))
        rc = -EBADMSG;
    sodium_memzero(key, sizeof(key));
    if (rc == 0)
        rc = in_record(in);
    if (rc < 0)
        return rc;
    if (in->h.type != REC_PARAMS || in->len != sizeof(*pp))
        return -EUCLEAN;
    p->block_size = le32_get(pp->block_size);
    p->profile = le32_get(pp->profile);
    p->size_limit = le64_get(pp->size_limit);
    return 0;
}

static void in_end(struct in *in)
{
    sodium_memzero(in, sizeof(*in));
    free(in);
}

/* END is the last record, in the last frame, and nothing follows. */
static int in_finish(struct in *in, uint64_t inodes)
{
    uint8_t more;
    int rc = in->at == EXPORT_FRAME_PLAIN && !in->final ? in_frame(in) : 0;

    if (rc < 0)
        return rc;
    if (!in->final || le64_get(in->h.a) != inodes || !sodium_is_zero(in->plain + in->at, EXPORT_FRAME_PLAIN - in->at))
        return bad(in, -EUCLEAN, "the stream does not end as it should");
    if (in->io->read(in->io->ctx, &more, 1) != -ENODATA)
        return bad(in, -EBADMSG, "something follows the stream's end at byte %llu",
                   U(sizeof(*in->head) + in->frames * EXPORT_FRAME_BYTES));
    return 0;
}

int export_verify(const struct export_secret *s, const struct export_io *io, struct volume_params *ret_params,
                  const struct volume_report *report)
{
    struct volume_params p = {0};
    uint64_t inodes = 0;
    struct in *in;
    int rc = in_begin(&in, s, io, report, &p);

    while (rc == 0) {
        rc = in_record(in);
        if (rc == 0 && in->h.type == REC_END)
            break;
        inodes += rc == 0 && in->h.type == REC_INODE;
    }
    if (rc == 0)
        rc = in_finish(in, inodes);
    if (rc == 0)
        *ret_params = p;
    in_end(in);
    return rc;
}

/* --- import --- */

static int import_inode(struct in *in)
{
    uint64_t ino = le64_get(in->h.a);
    struct inode i;
    struct tx tx;
    int rc;

    if (ino <= in->inode.ino || ino >> 48 || (in->inode.ino == 0 && ino != VOLUME_ROOT_INO) ||
        inode_decode(ino, in->payload, in->len, &i) < 0)
        return -EUCLEAN;
    in->inode = i;
    in->inodes++;
    i.blocks = 0;
    rc = tx_begin(in->v, &tx, TX_GROWS);
    if (rc < 0)
        return rc;
    rc = tx_inode_put(&tx, &i);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
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
    if (kind != ITEM_INLINE)
        rc = names_free_key(in->v, kind, in->inode.ino, (const char *)in->payload + name_at, name_len, &key);
    if (rc == 0)
        rc = tx_put(&tx, &key, in->payload, in->len);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

static bool blocky(const struct in *in)
{
    return S_ISREG(in->inode.mode) && !(in->inode.flags & INODE_INLINE);
}

static int import_data(struct in *in)
{
    uint64_t off = le64_get(in->h.b);
    ssize_t n;

    if (!blocky(in) || !in->len || in->len > in->inode.size || off > in->inode.size - in->len)
        return -EUCLEAN;
    n = vol_write(in->v, in->inode.ino, off, in->payload, in->len);
    return n < 0 ? (int)n : 0;
}

static int import_lost(struct in *in)
{
    uint64_t block = le64_get(in->h.b), blocks = (in->inode.size + in->v->block - 1) / in->v->block, count;
    struct tree_key key = tree_key(ITEM_RANGE, in->inode.ino, block);
    struct disk_range d = {.extent = le64_make(EXTENT_LOST)};
    struct inode now;
    struct tx tx;
    le32 n;
    int rc;

    if (!blocky(in) || in->len != sizeof(n))
        return -EUCLEAN;
    memcpy(&n, in->payload, sizeof(n));
    count = le32_get(n);
    if (!count || count > RANGE_LOST_MAX || count > blocks || block > blocks - count)
        return -EUCLEAN;
    d.count = le16_make((uint16_t)count);
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
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

static int import_record(struct in *in)
{
    if (in->h.type == REC_INODE)
        return import_inode(in);
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
    default:
        return -EUCLEAN;
    }
}

static void first_finding(void *ctx, const char *text)
{
    struct in *in = ctx;

    in->report->line(in->report->ctx, text);
}

static int import_all(struct in *in)
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
    if (rc == 0)
        rc = in_finish(in, in->inodes);
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
            rc = import_all(in);
            closed = volume_close(in->v);
            rc = rc < 0 ? rc : closed;
        }
    }
    in_end(in);
    return rc;
}
