/*
 * file.c - the content of regular files: ranges of blocks, extents, small files inline, truncation, holes.
 *
 * Invariants:
 *  1. Content changes only under the inode's stripe lock held exclusively; so a reader, who holds it shared, can read
 * and open extents without the state lock: their units stay as they are.
 *  2. Bytes of the last block past the end of the file are zero, in the extent and in INLINE items (which may also be
 *     shorter than the file: the rest is zeroes). So a file that grows needs no zeroing.
 *  3. An extent is written to `data` before the record that names it is logged.
 *  4. A transaction frees at most STEP_RANGES ranges; what is larger is done in several, under a TRIM item where a
 * crash between them would show (blocks past the end of the file).
 */
#include "fs/volume/log.h"
#include "fs/volume/space.h"
#include "fs/volume/tx.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <unistd.h>

#define WRITE_MAX   (1u << 20)
#define STEP_RANGES 128 /* such a transaction fits the smallest log's largest record */

static uint64_t blocks_of(const struct volume *v, uint64_t bytes)
{
    return (bytes + v->block - 1) / v->block;
}

/* --- the map from blocks to extents --- */

struct range {
    uint64_t block, count; /* of the file */
    uint64_t extent;
    unsigned first;
};

static int range_decode(const struct tree_key *key, const uint8_t *value, struct range *ret)
{
    const struct disk_range *d = (const struct disk_range *)value;

    *ret = (struct range){
        .block = key->b, .count = le16_get(d->count), .extent = le64_get(d->extent), .first = le16_get(d->first)};
    return 0;
}

/* [state] The first range of ino that ends above block. -ENOENT. */
static int range_at(struct volume *v, uint64_t ino, uint64_t block, struct range *ret)
{
    struct tree_key key = tree_key(ITEM_RANGE, ino, block), found;
    const uint8_t *value;
    size_t len;
    int rc;

    rc = tree_le(v->tree, &key, &found, &value, &len);
    if (rc == 0 && found.kind == ITEM_RANGE && found.a == ino) {
        range_decode(&found, value, ret);
        if (ret->block + ret->count > block)
            return 0;
    } else if (rc < 0 && rc != -ENOENT) {
        return rc;
    }
    rc = tree_ge(v->tree, &key, &found, &value, &len);
    if (rc < 0)
        return rc;
    if (found.kind != ITEM_RANGE || found.a != ino)
        return -ENOENT;
    return range_decode(&found, value, ret);
}

static int extent_lookup(struct volume *v, uint64_t id, struct extent *ret)
{
    struct tree_key key = tree_key(ITEM_EXTENT, id, 0);
    const uint8_t *value;
    size_t len;
    int rc;

    if (id == EXTENT_LOST)
        return -EIO; /* was reported by the repair */
    rc = tree_get(v->tree, &key, &value, &len);
    if (rc == -ENOENT || (rc == 0 && extent_decode(id, value, len, ret) < 0)) {
        volume_damage(v, "corrupt extent: %llu, missing or malformed record", (unsigned long long)id);
        return -EIO;
    }
    return rc;
}

static int tx_extent(struct tx *tx, uint64_t id, struct extent *ret)
{
    struct tree_key key = tree_key(ITEM_EXTENT, id, 0);
    uint8_t value[EXTENT_ITEM_MAX];
    ssize_t len = tx_get(tx, &key, value, sizeof(value));

    if (len < 0 && len != -ENOENT && len != -ERANGE)
        return (int)len;
    return len < 0 || extent_decode(id, value, (size_t)len, ret) < 0 ? -EIO : 0;
}

static int tx_put_range(struct tx *tx, uint64_t ino, const struct range *r)
{
    struct tree_key key = tree_key(ITEM_RANGE, ino, r->block);
    struct disk_range d = {.extent = le64_make(r->extent),
                           .first = le16_make(r->extent == EXTENT_LOST ? 0 : (uint16_t)r->first),
                           .count = le16_make((uint16_t)r->count)};

    return tx_put(tx, &key, &d, sizeof(d));
}

static int tx_put_extent(struct tx *tx, const struct extent *e)
{
    struct tree_key key = tree_key(ITEM_EXTENT, e->id, 0);
    uint8_t value[EXTENT_ITEM_MAX];

    return tx_put(tx, &key, value, extent_encode(e, value));
}

/* Drops one reference on each of count chunks; frees those that have none left, and the record with the last of them.
 */
static int tx_unref(struct tx *tx, uint64_t id, unsigned first, unsigned count)
{
    unsigned units = tx->v->block_units;
    bool any = false;
    struct extent e;
    int rc;

    if (id == EXTENT_LOST)
        return 0;
    rc = tx_extent(tx, id, &e);
    if (rc < 0)
        return rc;
    if (first + count > e.chunks)
        return -EIO;
    for (unsigned i = first, run = 0; i < first + count; i++) {
        if (!e.ref[i])
            return -EIO;
        run = --e.ref[i] == 0 ? run + 1 : 0;
        if (run && (i + 1 == first + count || e.ref[i + 1] != 1)) {
            tx_free(tx, e.addr + (uint64_t)(i + 1 - run) * units, (uint64_t)run * units);
            run = 0;
        }
    }
    e.has_refs = true;
    for (unsigned i = 0; i < e.chunks; i++)
        any |= e.ref[i] != 0;
    if (any)
        return tx_put_extent(tx, &e);
    return tx_del(tx, &(struct tree_key){.kind = ITEM_EXTENT, .a = id});
}

/*
 * Takes blocks lo .. hi - 1 out of the file's map, at most max ranges of it. Adds the number of blocks taken to *freed.
 * Returns 1 when all are out, 0 when max was reached, or an error.
 */
static int tx_unmap(struct tx *tx, uint64_t ino, uint64_t lo, uint64_t hi, unsigned max, uint64_t *freed)
{
    struct volume *v = tx->v;
    struct range r;
    int rc;

    for (; lo < hi; max--) {
        uint64_t from, to;

        rc = range_at(v, ino, lo, &r);
        if (rc == -ENOENT || (rc == 0 && r.block >= hi))
            return 1;
        if (rc < 0)
            return rc;
        if (max == 0)
            return 0;
        from = MAX(lo, r.block);
        to = MIN(hi, r.block + r.count);
        rc = tx_unref(tx, r.extent, r.first + (unsigned)(from - r.block), (unsigned)(to - from));
        if (rc == 0 && r.block < from)
            rc = tx_put_range(tx, ino, &(struct range){r.block, from - r.block, r.extent, r.first});
        else if (rc == 0)
            rc = tx_del(tx, &(struct tree_key){.kind = ITEM_RANGE, .a = ino, .b = r.block});
        if (rc == 0 && r.block + r.count > to)
            rc = tx_put_range(
                tx, ino, &(struct range){to, r.block + r.count - to, r.extent, r.first + (unsigned)(to - r.block)});
        if (rc < 0)
            return rc;
        *freed += to - from;
        lo = to;
    }
    return 1;
}

/* --- reading --- */

/* A row of chunks of one extent that is wanted. */
struct piece {
    uint64_t block, count;
    unsigned first;
    struct extent extent;
};

/* [state shared] What blocks lo .. hi - 1 are made of; the rest is holes. *ret_pieces is malloc'ed. */
static int map_pieces(struct volume *v, uint64_t ino, uint64_t lo, uint64_t hi, struct piece **ret_pieces,
                      size_t *ret_n)
{
    struct piece *p = NULL;
    size_t n = 0;
    int rc = 0;

    while (lo < hi) {
        struct range r;
        uint64_t from, to;

        rc = range_at(v, ino, lo, &r);
        if (rc == -ENOENT || (rc == 0 && r.block >= hi)) {
            rc = 0;
            break;
        }
        if (rc < 0)
            break;
        from = MAX(lo, r.block);
        to = MIN(hi, r.block + r.count);
        if (n % 16 == 0)
            p = xrealloc(p, (n + 16) * sizeof(*p));
        p[n] = (struct piece){.block = from, .count = to - from, .first = r.first + (unsigned)(from - r.block)};
        rc = extent_lookup(v, r.extent, &p[n].extent);
        if (rc == 0 && p[n].first + p[n].count > p[n].extent.chunks)
            rc = -EIO;
        if (rc < 0)
            break;
        n++;
        lo = to;
    }
    if (rc < 0) {
        free(p);
        return rc;
    }
    *ret_pieces = p;
    *ret_n = n;
    return 0;
}

static void piece_damaged(struct volume *v, uint64_t ino, const struct piece *p, const char *what)
{
    volume_damage(v, "data: inode %llu, blocks %llu to %llu, extent %llu at unit %llu: %s", (unsigned long long)ino,
                  (unsigned long long)p->block, (unsigned long long)(p->block + p->count - 1),
                  (unsigned long long)p->extent.id, (unsigned long long)p->extent.addr, what);
}

static uint64_t piece_off(const struct volume *v, const struct piece *p)
{
    return p->extent.addr * UNIT_BYTES + (uint64_t)p->first * v->block;
}

static size_t piece_bytes(const struct volume *v, const struct piece *p)
{
    return (size_t)p->count * v->block;
}

/* How many of the n pieces lie in a row in `data`, up to IO_BUFFER_BYTES. */
static size_t pieces_in_row(const struct volume *v, const struct piece *p, size_t n)
{
    size_t bytes = piece_bytes(v, p), k = 1;

    while (k < n && piece_off(v, &p[k]) == piece_off(v, p) + bytes && bytes + piece_bytes(v, &p[k]) <= IO_BUFFER_BYTES)
        bytes += piece_bytes(v, &p[k++]);
    return k;
}

/* The wanted part of a file: n bytes from off into buf. */
struct wanted {
    uint64_t off;
    size_t n;
    uint8_t *buf;
};

/* Opens a piece whose ciphertext is there, and puts what is wanted of it into its place. */
static int open_piece(struct volume *v, uint64_t ino, const struct piece *p, uint8_t *cipher, const struct wanted *w)
{
    uint64_t start = p->block * v->block, end = start + piece_bytes(v, p);
    uint64_t from = MAX(start, w->off), to = MIN(end, w->off + w->n);
    uint8_t *plain = w->buf + (from - w->off), *bounce = NULL;
    int rc;

    if (from != start || to != end)
        plain = bounce = xmalloc(end - start);
    rc = extent_open(v->keys, &p->extent, v->block, p->first, (unsigned)p->count, cipher, plain);
    if (bounce) {
        if (rc == 0)
            memcpy(w->buf + (from - w->off), bounce + (from - start), to - from);
        explicit_bzero(bounce, end - start);
        free(bounce);
    }
    if (rc < 0)
        piece_damaged(v, ino, p, "does not authenticate");
    return rc < 0 ? -EIO : 0;
}

/* Pieces that lie in a row: one read. */
static int read_row(struct volume *v, uint64_t ino, const struct piece *p, size_t n, uint8_t *cipher,
                    const struct wanted *w)
{
    struct iovec iov = {cipher, piece_off(v, &p[n - 1]) + piece_bytes(v, &p[n - 1]) - piece_off(v, p)};
    int rc = v->data->ops->readv(v->data, &iov, 1, piece_off(v, p));

    if (rc < 0) {
        piece_damaged(v, ino, p, "cannot be read");
        return -EIO;
    }
    for (size_t i = 0; i < n && rc == 0; i++) {
        rc = open_piece(v, ino, &p[i], cipher, w);
        cipher += piece_bytes(v, &p[i]);
    }
    return rc;
}

/* Zeroes what is wanted and in no piece. */
static void zero_holes(struct volume *v, const struct piece *p, size_t n, const struct wanted *w)
{
    uint64_t at = w->off;

    for (size_t i = 0; i < n; i++) {
        uint64_t start = p[i].block * v->block;

        if (start > at)
            memset(w->buf + (at - w->off), 0, start - at);
        at = start + piece_bytes(v, &p[i]);
    }
    if (at < w->off + w->n)
        memset(w->buf + (at - w->off), 0, w->off + w->n - at);
}

/* [stripe] Reads bytes off .. off + n - 1 of a file that is not inline. */
static int read_blocks(struct volume *v, uint64_t ino, uint64_t off, uint8_t *buf, size_t n)
{
    struct wanted w = {off, n, buf};
    struct piece *pieces = NULL;
    uint8_t *cipher = NULL;
    size_t count = 0;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = map_pieces(v, ino, off / v->block, blocks_of(v, off + n), &pieces, &count);
    pthread_rwlock_unlock(&v->state);
    if (rc < 0)
        return rc;
    zero_holes(v, pieces, count, &w);
    if (count)
        cipher = io_buffer_get(v);
    for (size_t i = 0; i < count && rc == 0;) {
        size_t k = pieces_in_row(v, pieces + i, count - i);

        rc = read_row(v, ino, pieces + i, k, cipher, &w);
        i += k;
    }
    io_buffer_put(v, cipher);
    free(pieces);
    return rc;
}

/* [state] Bytes of an inline file into buf (zeroes past what is stored). */
static int read_inline(struct volume *v, uint64_t ino, uint64_t off, uint8_t *buf, size_t n)
{
    struct tree_key key = tree_key(ITEM_INLINE, ino, 0);
    const uint8_t *value;
    size_t len = 0;
    int rc = tree_get(v->tree, &key, &value, &len);

    if (rc < 0 && rc != -ENOENT)
        return rc;
    if (rc == -ENOENT)
        len = 0;
    memset(buf, 0, n);
    if (off < len)
        memcpy(buf, value + off, MIN(n, len - off));
    return 0;
}

static int regular(const struct inode *i)
{
    if (S_ISDIR(i->mode))
        return -EISDIR;
    return S_ISREG(i->mode) ? 0 : -EINVAL;
}

ssize_t vol_read(struct volume *v, uint64_t ino, uint64_t off, void *buf, size_t n)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct inode inode;
    int rc;

    pthread_rwlock_rdlock(stripe);
    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &inode);
    if (rc == 0)
        rc = regular(&inode);
    if (rc == 0) {
        n = off >= inode.size ? 0 : MIN(n, inode.size - off);
        if (inode.flags & INODE_INLINE)
            rc = read_inline(v, ino, off, buf, n);
    }
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && n && !(inode.flags & INODE_INLINE))
        rc = read_blocks(v, ino, off, buf, n);
    pthread_rwlock_unlock(stripe);
    volume_trim(v);
    return rc < 0 ? rc : (ssize_t)n;
}

/* --- writing --- */

/* Extents that are written to `data` but not yet logged. */
struct batch {
    struct extent extent[WRITE_MAX / 4096 + 2];
    uint64_t block[WRITE_MAX / 4096 + 2];
    size_t n;
    uint8_t *cipher; /* theirs, in a row, after PAGE bytes; from io_buffer_get */
    bool ride;       /* they ride in their log record: PAYLOAD_MAX bytes at most */
};

static struct batch *batch_new(void)
{
    struct batch *b = xmalloc(sizeof(*b));

    b->n = 0;
    b->cipher = NULL;
    b->ride = false;
    return b;
}

static void batch_free(struct volume *v, struct batch *b)
{
    io_buffer_put(v, b->cipher);
    free(b);
}

static void batch_cancel(struct volume *v, struct batch *b)
{
    for (size_t i = 0; i < b->n; i++)
        space_cancel(v->space, b->extent[i].addr, (uint64_t)b->extent[i].chunks * v->block_units);
    b->n = 0;
}

/* Large writes start on their way to the disk at once: the flush that comes finds less to do. */
#define WRITEBACK_BYTES (64u << 10)

/* Seals extents first .. n - 1 of the batch, which lie in a row, and writes them with one call. */
static int batch_put(struct volume *v, struct batch *b, size_t first, uint8_t *cipher, const uint8_t *plain)
{
    uint64_t off = b->extent[first].addr * UNIT_BYTES, bytes = 0;
    struct iovec iov;
    int rc;

    for (size_t i = first; i < b->n; i++) {
        extent_seal(v->keys, &b->extent[i], v->block, plain + bytes, cipher + bytes);
        bytes += (uint64_t)b->extent[i].chunks * v->block;
    }
    iov = (struct iovec){cipher, bytes};
    rc = v->data->ops->writev(v->data, &iov, 1, off);
    if (rc == 0 && bytes >= WRITEBACK_BYTES)
        v->data->ops->writeback(v->data, off, bytes);
    return rc;
}

/* Cuts count blocks at addr into extents that begin at multiples of their size in the file, so that overwriting in
 * pieces of it frees whole ones. */
static void batch_cut(struct volume *v, struct batch *b, uint64_t block, uint64_t count, uint64_t addr)
{
    unsigned most = EXTENT_BYTES / v->block;

    while (count) {
        struct extent *e = &b->extent[b->n];

        e->id = atomic_fetch_add(&v->next_extent, 1);
        e->addr = addr;
        e->birth = 0;
        e->chunks = (uint8_t)MIN(count, most - block % most);
        b->block[b->n++] = block;
        block += e->chunks;
        count -= e->chunks;
        addr += (uint64_t)e->chunks * v->block_units;
    }
}

/* Seals and writes count blocks of plain as extents for the file's blocks from `block` on. On failure nothing is held.
 */
static int batch_write(struct volume *v, struct batch *b, uint64_t block, uint64_t count, const uint8_t *plain,
                       bool grows)
{
    unsigned most = EXTENT_BYTES / v->block;
    uint8_t *cipher;
    int rc = 0;

    b->n = 0;
    if (!b->cipher)
        b->cipher = io_buffer_get(v);
    cipher = b->cipher;
    while (count && rc == 0) {
        size_t first = b->n;
        uint64_t addr, want = MIN(count, most - block % most);
        int64_t got =
            space_alloc(v->space, count * v->block_units, want * v->block_units, v->block_units, !grows, &addr);

        if (got < 0) {
            rc = (int)got;
            break;
        }
        got /= v->block_units;
        batch_cut(v, b, block, (uint64_t)got, addr);
        rc = batch_put(v, b, first, cipher, plain);
        if (rc < 0 && rc != -ENOSPC)
            rc = volume_fail(v, "writing data", rc);
        block += (uint64_t)got;
        count -= (uint64_t)got;
        plain += (size_t)got * v->block;
        cipher += (size_t)got * v->block;
    }
    if (rc < 0)
        batch_cancel(v, b);
    return rc;
}

/* The same, with a checkpoint when space is short: it may set some free. */
static int batch_write_hard(struct volume *v, struct batch *b, uint64_t block, uint64_t count, const uint8_t *plain,
                            bool grows)
{
    int rc = batch_write(v, b, block, count, plain, grows);

    if (rc == -ENOSPC && space_has_pending(v->space)) {
        rc = volume_checkpoint(v);
        if (rc == 0)
            rc = batch_write(v, b, block, count, plain, grows);
    }
    return rc;
}

static uint64_t batch_end(const struct batch *b)
{
    return b->block[b->n - 1] + b->extent[b->n - 1].chunks;
}

/* Puts a batch into the file's map. What was there was taken out before, with one tx_unmap: that sees the committed
 * map, not what this transaction has put. */
static int tx_map(struct tx *tx, struct inode *inode, const struct batch *b)
{
    struct volume *v = tx->v;

    for (size_t i = 0; i < b->n; i++) {
        struct extent e = b->extent[i];
        struct range r = {.block = b->block[i], .count = e.chunks, .extent = e.id};
        int rc;

        e.birth = v->generation;
        tx_alloc(tx, e.addr, (uint64_t)e.chunks * v->block_units);
        rc = tx_put_extent(tx, &e);
        if (rc == 0)
            rc = tx_put_range(tx, inode->ino, &r);
        if (rc < 0)
            return rc;
        inode->blocks += r.count;
    }
    return 0;
}

static int tx_drop_inline(struct tx *tx, struct inode *inode)
{
    struct tree_key key = tree_key(ITEM_INLINE, inode->ino, 0);
    uint8_t value[ITEM_VALUE_MAX];
    ssize_t len = tx_get(tx, &key, value, sizeof(value));

    inode->flags &= ~INODE_INLINE;
    if (len == -ENOENT)
        return 0;
    return len < 0 ? (int)len : tx_del(tx, &key);
}

/* What a change of content makes of the inode. */
struct change {
    uint64_t size;
    bool clear_inline;
    bool grows; /* not allowed to use the reserve */
    bool quiet; /* no new times. Where only the form changes, a crash, or an error, right after it shows nothing */
};

/* Logs a batch (which may be empty) and the inode's new size in one transaction. */
static int commit_batch(struct volume *v, uint64_t ino, struct batch *b, const struct change *c)
{
    struct inode inode;
    uint64_t freed = 0;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, c->grows ? TX_GROWS : TX_CHANGES);
    if (rc < 0) {
        batch_cancel(v, b);
        return rc;
    }
    rc = tx_inode(&tx, ino, &inode);
    if (rc == 0 && b->n)
        rc = tx_unmap(&tx, ino, b->block[0], batch_end(b), UINT32_MAX, &freed);
    if (rc >= 0) {
        inode.blocks -= freed;
        rc = tx_map(&tx, &inode, b);
    }
    if (rc == 0 && c->clear_inline && (inode.flags & INODE_INLINE))
        rc = tx_drop_inline(&tx, &inode);
    if (rc == 0) {
        inode.size = c->size;
        if (!c->quiet)
            inode.mtime = inode.ctime = tx.now;
        rc = tx_inode_put(&tx, &inode);
    }
    if (rc == 0 && tx_size(&tx) > log_body_max(v->log))
        rc = -EIO;
    if (rc < 0) {
        tx_abort(&tx, rc);
        batch_cancel(v, b);
        return rc;
    }
    if (b->ride && b->n) {
        tx.payload = b->cipher;
        for (size_t i = 0; i < b->n; i++)
            tx.payload_bytes += (size_t)b->extent[i].chunks * v->block;
    }
    return tx_commit(&tx);
}

/* [stripe] Bytes off .. off + n - 1 of the file as it is; zeroes past its end. */
static int read_old(struct volume *v, const struct inode *inode, uint64_t off, uint8_t *buf, size_t n)
{
    size_t have = off >= inode->size ? 0 : MIN(n, inode->size - off);
    int rc = 0;

    memset(buf + have, 0, n - have);
    if (!have)
        return 0;
    if (!(inode->flags & INODE_INLINE))
        return read_blocks(v, inode->ino, off, buf, have);
    pthread_rwlock_rdlock(&v->state);
    rc = read_inline(v, inode->ino, off, buf, have);
    pthread_rwlock_unlock(&v->state);
    return rc;
}

/* How a write is done. */
struct way {
    bool ride;  /* in the log, see note_write */
    bool quiet; /* the file's times stay */
};

/* [stripe exclusive] A write that leaves the file inline. buf NULL writes zeroes. */
static int write_inline(struct volume *v, const struct inode *old, uint64_t off, const void *buf, size_t n,
                        uint64_t size, struct way way)
{
    struct tree_key key = tree_key(ITEM_INLINE, old->ino, 0);
    uint8_t content[INLINE_MAX] = {0};
    struct inode inode;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, size > old->size || n ? TX_GROWS : TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, old->ino, &inode);
    if (rc == 0)
        rc = read_inline(v, old->ino, 0, content, sizeof(content));
    if (rc < 0)
        return tx_abort(&tx, rc);
    if (n && buf)
        memcpy(content + off, buf, n);
    else if (n)
        memset(content + off, 0, n);
    inode.size = size;
    if (!way.quiet)
        inode.mtime = inode.ctime = tx.now;
    /* Truncated bytes are not in the item any more: invariant 2. */
    rc = tx_put(&tx, &key, content, size);
    if (rc == 0)
        rc = tx_inode_put(&tx, &inode);
    explicit_bzero(content, sizeof(content));
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

/* [stripe exclusive] The content of an inline file of blocks-to-be goes into its first block. */
static int convert_inline(struct volume *v, const struct inode *inode)
{
    uint8_t *plain = xcalloc(1, v->block);
    struct batch *b = batch_new();
    int rc = read_old(v, inode, 0, plain, v->block);

    if (rc == 0)
        rc = batch_write_hard(v, b, 0, 1, plain, true);
    if (rc == 0)
        rc = commit_batch(v, inode->ino, b, &(struct change){inode->size, true, true, true});
    batch_free(v, b);
    free(plain);
    return rc;
}

/* [stripe exclusive] Writes n <= WRITE_MAX bytes into blocks; an inline file becomes one of blocks. buf NULL: zeroes,
 * at the edge of a hole that is being made; that may use the reserve. */
static int write_blocks(struct volume *v, const struct inode *inode, uint64_t off, const uint8_t *buf, size_t n,
                        uint64_t size, struct way way)
{
    bool grows = buf || n == 0;
    uint64_t lo = off / v->block, hi = blocks_of(v, off + n);
    struct batch *b = batch_new();
    uint8_t *plain = NULL;
    int rc = 0;

    /* Where the first block is written, an inline file's content is written along. */
    if ((inode->flags & INODE_INLINE) && inode->size > 0 && lo > 0)
        rc = convert_inline(v, inode);
    if (rc < 0)
        goto out;
    b->ride = way.ride;
    if (n && (!buf || off % v->block || (off + n) % v->block)) {
        uint64_t start = lo * v->block, end = hi * v->block;

        plain = xmalloc(end - start);
        if (off > start)
            rc = read_old(v, inode, start, plain, v->block);
        if (rc == 0 && off + n < end && (hi - 1 > lo || off == start))
            rc = read_old(v, inode, end - v->block, plain + (end - start - v->block), v->block);
        if (rc < 0)
            goto out;
        if (buf)
            memcpy(plain + (off - start), buf, n);
        else
            memset(plain + (off - start), 0, n);
        buf = plain;
    }
    if (n)
        rc = batch_write_hard(v, b, lo, hi - lo, buf, grows);
    if (rc == 0)
        rc = commit_batch(v, inode->ino, b, &(struct change){size, true, grows, way.quiet});
out:
    free(plain);
    batch_free(v, b);
    return rc;
}

/* [stripe exclusive] */
static int get_regular(struct volume *v, uint64_t ino, struct inode *ret)
{
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, ret);
    pthread_rwlock_unlock(&v->state);
    return rc < 0 ? rc : regular(ret);
}

/* --- which writes ride in the log --- */

/*
 * A file that is written and synced in turns costs one flush a turn, of the log, if what is written rides there. So:
 * small writes of a file that had few of them before its last sync. (Others are cheaper in `data` alone, where they are
 * in any case.)
 */
#define RIDE_WRITES 8

/* Notes a write; true: let it ride. */
static bool note_write(struct volume *v, uint64_t ino, uint64_t off, size_t n)
{
    struct sync_pattern *p = &v->pattern[ino % SYNC_PATTERNS];
    bool small = blocks_of(v, off + n) - off / v->block <= PAYLOAD_MAX / v->block, ride;

    pthread_mutex_lock(&v->pattern_mutex);
    ride = p->ino == ino && small && p->before <= RIDE_WRITES && p->since < RIDE_WRITES;
    if (p->ino == ino && p->since < UINT32_MAX)
        p->since++;
    pthread_mutex_unlock(&v->pattern_mutex);
    return ride;
}

void file_note_sync(struct volume *v, uint64_t ino)
{
    struct sync_pattern *p = &v->pattern[ino % SYNC_PATTERNS];

    pthread_mutex_lock(&v->pattern_mutex);
    *p = (struct sync_pattern){.ino = ino, .before = p->ino == ino ? p->since : 0};
    pthread_mutex_unlock(&v->pattern_mutex);
}

/* --- vol_write --- */

static ssize_t write_any(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n, struct way way)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct inode inode;
    int rc;

    pthread_rwlock_wrlock(stripe);
    rc = get_regular(v, ino, &inode);
    if (rc == 0) {
        uint64_t size = MAX(inode.size, off + n);

        if ((inode.flags & INODE_INLINE) && size <= INLINE_MAX)
            rc = write_inline(v, &inode, off, buf, n, size, way);
        else
            rc = write_blocks(v, &inode, off, buf, n, size, way);
    }
    pthread_rwlock_unlock(stripe);
    return rc < 0 ? rc : (ssize_t)n;
}

/* Whole blocks need nothing of what the file holds: they are sealed and written before its lock is taken, so that
 * several writes of one file go on side by side. */
static ssize_t write_aligned(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n, struct way way)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct batch *b = batch_new();
    uint64_t lo = off / v->block;
    struct inode inode;
    int rc;

    b->ride = way.ride;
    rc = batch_write_hard(v, b, lo, n / v->block, buf, true);
    if (rc < 0)
        goto out;
    pthread_rwlock_wrlock(stripe);
    rc = get_regular(v, ino, &inode);
    if (rc == 0 && (inode.flags & INODE_INLINE) && inode.size > 0 && lo > 0)
        rc = convert_inline(v, &inode);
    if (rc < 0)
        batch_cancel(v, b);
    else
        rc = commit_batch(v, ino, b, &(struct change){MAX(inode.size, off + n), true, true, way.quiet});
    pthread_rwlock_unlock(stripe);
out:
    batch_free(v, b);
    return rc < 0 ? rc : (ssize_t)n;
}

static ssize_t do_write(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n, bool quiet)
{
    struct way way = {.quiet = quiet};
    int rc;

    if (n > WRITE_MAX)
        return -EINVAL;
    if (off > VOLUME_FILE_MAX || n > VOLUME_FILE_MAX - off)
        return -EFBIG;
    rc = volume_changes(v);
    if (rc < 0 || n == 0)
        return rc;
    way.ride = note_write(v, ino, off, n);
    return off % v->block || n % v->block ? write_any(v, ino, off, buf, n, way)
                                          : write_aligned(v, ino, off, buf, n, way);
}

ssize_t vol_write(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n)
{
    return do_write(v, ino, off, buf, n, false);
}

ssize_t vol_write_back(struct volume *v, uint64_t ino, uint64_t off, const void *buf, size_t n)
{
    return do_write(v, ino, off, buf, n, true);
}

/* --- freeing --- */

/* [stripe exclusive] Frees blocks lo .. hi - 1 in steps; touch: mtime and ctime change. */
static int free_blocks(struct volume *v, uint64_t ino, uint64_t lo, uint64_t hi, bool touch)
{
    int done = 0;

    while (!done) {
        struct inode inode;
        uint64_t freed = 0;
        struct tx tx;
        int rc = tx_begin(v, &tx, TX_CHANGES);

        if (rc < 0)
            return rc;
        rc = tx_inode(&tx, ino, &inode);
        if (rc == 0)
            rc = done = tx_unmap(&tx, ino, lo, hi, STEP_RANGES, &freed);
        if (rc >= 0) {
            inode.blocks -= freed;
            if (touch)
                inode.mtime = inode.ctime = tx.now;
            rc = freed || touch ? tx_inode_put(&tx, &inode) : 0;
        }
        if (rc < 0)
            return tx_abort(&tx, rc);
        rc = tx_commit(&tx);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int file_free_blocks(struct volume *v, uint64_t ino, uint64_t lo, uint64_t hi)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    int rc;

    pthread_rwlock_wrlock(stripe);
    rc = free_blocks(v, ino, lo, hi, false);
    pthread_rwlock_unlock(stripe);
    return rc;
}

/* [stripe exclusive] The TRIM item is there: frees from its block on, then removes it. */
static int finish_trim(struct volume *v, uint64_t ino, uint64_t from)
{
    struct tree_key key = tree_key(ITEM_TRIM, ino, 0);
    struct tx tx;
    int rc;

    rc = free_blocks(v, ino, from, UINT64_MAX, false);
    if (rc < 0)
        return rc;
    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = tx_del(&tx, &key);
    return rc < 0 ? tx_abort(&tx, rc) : tx_commit(&tx);
}

int file_finish_trim(struct volume *v, uint64_t ino)
{
    struct tree_key key = tree_key(ITEM_TRIM, ino, 0);
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    const uint8_t *value;
    uint64_t from = 0;
    size_t len;
    int rc;

    pthread_rwlock_wrlock(stripe);
    pthread_rwlock_rdlock(&v->state);
    rc = tree_get(v->tree, &key, &value, &len);
    if (rc == 0) {
        le64 d;

        memcpy(&d, value, sizeof(d));
        from = le64_get(d);
    }
    pthread_rwlock_unlock(&v->state);
    if (rc == 0)
        rc = finish_trim(v, ino, from);
    pthread_rwlock_unlock(stripe);
    return rc;
}

/* [stripe exclusive] Cuts a file of blocks; the kept part of the last block is rewritten with zeroes behind it. */
static int shrink_blocks(struct volume *v, const struct inode *old, uint64_t size)
{
    struct tree_key key = tree_key(ITEM_TRIM, old->ino, 0);
    uint64_t keep = blocks_of(v, size), freed = 0, tail = size % v->block;
    struct batch *b = batch_new();
    le64 from = le64_make(keep);
    uint8_t *plain = NULL;
    struct inode inode;
    struct range r;
    struct tx tx;
    int rc = 0, done = 0;

    pthread_rwlock_rdlock(&v->state);
    rc = tail ? range_at(v, old->ino, keep - 1, &r) : -ENOENT;
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && r.block <= keep - 1) {
        plain = xmalloc(v->block);
        rc = read_old(v, old, (keep - 1) * v->block, plain, v->block);
        if (rc == 0) {
            memset(plain + tail, 0, v->block - tail);
            rc = batch_write_hard(v, b, keep - 1, 1, plain, false);
        }
    }
    if (rc < 0 && rc != -ENOENT)
        goto out;
    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0) {
        batch_cancel(v, b);
        goto out;
    }
    rc = tx_inode(&tx, old->ino, &inode);
    if (rc == 0)
        rc = done = tx_unmap(&tx, old->ino, b->n ? keep - 1 : keep, UINT64_MAX, STEP_RANGES, &freed);
    if (rc == 0)
        rc = tx_put(&tx, &key, &from, sizeof(from));
    if (rc >= 0) {
        inode.blocks -= freed;
        rc = tx_map(&tx, &inode, b);
    }
    if (rc >= 0) {
        inode.size = size;
        inode.mtime = inode.ctime = tx.now;
        rc = tx_inode_put(&tx, &inode);
    }
    if (rc < 0) {
        tx_abort(&tx, rc);
        batch_cancel(v, b);
        goto out;
    }
    rc = tx_commit(&tx);
    if (rc == 0 && !done)
        rc = finish_trim(v, old->ino, keep);
out:
    free(plain);
    batch_free(v, b);
    return rc;
}

/* [stripe exclusive] */
static int set_size(struct volume *v, const struct inode *inode, uint64_t size)
{
    if ((inode->flags & INODE_INLINE) && size <= INLINE_MAX)
        return write_inline(v, inode, 0, NULL, 0, size, (struct way){0});
    if (size < inode->size)
        return shrink_blocks(v, inode, size);
    /* Growing: an inline file's content goes into its first block, if it has any. */
    if ((inode->flags & INODE_INLINE) && inode->size > 0) {
        uint8_t *content = xcalloc(1, INLINE_MAX);
        int rc = read_old(v, inode, 0, content, inode->size);

        if (rc == 0)
            rc = write_blocks(v, inode, 0, content, inode->size, size, (struct way){0});
        free(content);
        return rc;
    }
    return write_blocks(v, inode, 0, NULL, 0, size, (struct way){0});
}

int file_set_size(struct volume *v, uint64_t ino, uint64_t size)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct inode inode;
    int rc;

    if (size > VOLUME_FILE_MAX)
        return -EFBIG;
    rc = volume_changes(v);
    if (rc < 0)
        return rc;
    pthread_rwlock_wrlock(stripe);
    rc = get_regular(v, ino, &inode);
    if (rc == 0)
        rc = set_size(v, &inode, size);
    pthread_rwlock_unlock(stripe);
    return rc;
}

/* --- holes --- */

/* [stripe exclusive] Makes off .. off + len - 1 read as zeroes, within the file's size; whole blocks become holes. */
static int zero_range(struct volume *v, const struct inode *inode, uint64_t off, uint64_t len)
{
    uint64_t end = MIN(off + len, inode->size);
    uint64_t lo, hi;
    int rc = 0;

    if (off >= end)
        return 0;
    if (inode->flags & INODE_INLINE)
        return write_inline(v, inode, off, NULL, end - off, inode->size, (struct way){0});
    lo = blocks_of(v, off);
    hi = end == inode->size ? blocks_of(v, end) : end / v->block;
    if (lo >= hi)
        return write_blocks(v, inode, off, NULL, end - off, inode->size, (struct way){0});
    if (off < lo * v->block)
        rc = write_blocks(v, inode, off, NULL, lo * v->block - off, inode->size, (struct way){0});
    if (rc == 0 && end > hi * v->block)
        rc = write_blocks(v, inode, hi * v->block, NULL, end - hi * v->block, inode->size, (struct way){0});
    if (rc == 0)
        rc = free_blocks(v, inode->ino, lo, hi, true);
    return rc;
}

/* Is there room for a file of len bytes? */
static int check_room(struct volume *v, const struct inode *inode, uint64_t len)
{
    uint64_t blocks = blocks_of(v, len), units;
    int rc;

    if (blocks <= inode->blocks)
        return 0;
    units = (blocks - inode->blocks) * v->block_units;
    if (space_room(v->space, units, 0))
        return 0;
    if (!space_has_pending(v->space))
        return -ENOSPC;
    rc = volume_checkpoint(v);
    if (rc < 0)
        return rc;
    return space_room(v->space, units, 0) ? 0 : -ENOSPC;
}

int vol_fallocate(struct volume *v, uint64_t ino, int mode, uint64_t off, uint64_t len)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    bool keep = mode & FALLOC_FL_KEEP_SIZE;
    int what = mode & ~FALLOC_FL_KEEP_SIZE;
    struct inode inode;
    int rc;

    if (what != 0 && what != FALLOC_FL_ZERO_RANGE && !(what == FALLOC_FL_PUNCH_HOLE && keep))
        return -EOPNOTSUPP;
    if (len == 0)
        return -EINVAL;
    if (off > VOLUME_FILE_MAX || len > VOLUME_FILE_MAX - off)
        return -EFBIG;
    rc = volume_changes(v);
    if (rc < 0)
        return rc;
    pthread_rwlock_wrlock(stripe);
    rc = get_regular(v, ino, &inode);
    if (rc == 0 && what)
        rc = zero_range(v, &inode, off, len);
    else if (rc == 0)
        rc = check_room(v, &inode, len);
    if (rc == 0 && !keep && off + len > inode.size) {
        rc = get_regular(v, ino, &inode);
        if (rc == 0)
            rc = set_size(v, &inode, off + len);
    }
    pthread_rwlock_unlock(stripe);
    return rc;
}

/* --- copies by reference --- */

#define COPY_RANGES 64 /* of the source, in one transaction */

/* One more reference on each of count chunks. */
static int tx_ref(struct tx *tx, uint64_t id, unsigned first, unsigned count)
{
    struct extent e;
    int rc = tx_extent(tx, id, &e);

    if (rc < 0)
        return rc;
    if (first + count > e.chunks)
        return -EIO;
    for (unsigned i = first; i < first + count; i++) {
        if (!e.ref[i])
            return -EIO;
        if (e.ref[i] == UINT16_MAX)
            return -EOPNOTSUPP;
        e.ref[i]++;
    }
    e.has_refs = true;
    return tx_put_extent(tx, &e);
}

struct copy {
    uint64_t from, to;  /* inodes */
    uint64_t lo, count; /* blocks of `from` */
    uint64_t to_lo;     /* where they go */
    struct range range[COPY_RANGES];
    size_t ranges;
};

/* [state] The source's ranges, at most max of them; c->count becomes what they cover. */
static int copy_collect(struct volume *v, struct copy *c, size_t max)
{
    uint64_t at = c->lo, end = c->lo + c->count;

    for (c->ranges = 0; at < end; c->ranges++) {
        struct range r;
        uint64_t from, to;
        int rc = range_at(v, c->from, at, &r);

        if (rc < 0 && rc != -ENOENT)
            return rc;
        if (rc == -ENOENT || r.block >= end)
            return 0;
        if (c->ranges == max) {
            c->count = at - c->lo;
            return 0;
        }
        if (r.extent == EXTENT_LOST)
            return -EIO;
        from = MAX(at, r.block);
        to = MIN(end, r.block + r.count);
        c->range[c->ranges] = (struct range){from, to - from, r.extent, r.first + (unsigned)(from - r.block)};
        at = to;
    }
    return 0;
}

/* References first: what is taken out of `to` may be the same chunks. Returns 0, or 1 when it is too much for one transaction. */
static int tx_copy(struct tx *tx, struct copy *c, struct inode *to)
{
    uint64_t freed = 0;
    int rc = 0;

    for (size_t i = 0; i < c->ranges && rc == 0; i++)
        rc = tx_ref(tx, c->range[i].extent, c->range[i].first, (unsigned)c->range[i].count);
    if (rc == 0)
        rc = tx_unmap(tx, c->to, c->to_lo, c->to_lo + c->count, STEP_RANGES - COPY_RANGES, &freed);
    if (rc <= 0)
        return rc < 0 ? rc : 1;
    to->blocks -= freed;
    rc = 0;
    for (size_t i = 0; i < c->ranges && rc == 0; i++) {
        struct range r = c->range[i];

        r.block += c->to_lo - c->lo;
        rc = tx_put_range(tx, c->to, &r);
        to->blocks += r.count;
    }
    return rc;
}

/* [both stripes exclusive] */
static int copy_step(struct volume *v, struct copy *c, size_t max, uint64_t size)
{
    struct inode to;
    struct tx tx;
    int rc = tx_begin(v, &tx, TX_GROWS);

    if (rc < 0)
        return rc;
    rc = copy_collect(v, c, max);
    if (rc == 0)
        rc = tx_inode(&tx, c->to, &to);
    if (rc == 0)
        rc = tx_copy(&tx, c, &to);
    if (rc == 0 && (to.flags & INODE_INLINE))
        rc = tx_drop_inline(&tx, &to);
    if (rc == 0) {
        to.size = MAX(to.size, MIN(size, (c->to_lo + c->count) * v->block));
        to.mtime = to.ctime = tx.now;
        rc = tx_inode_put(&tx, &to);
    }
    if (rc == 0 && tx_size(&tx) > log_body_max(v->log))
        rc = 1;
    return rc ? tx_abort(&tx, rc) : tx_commit(&tx);
}

/* [both stripes exclusive] */
static ssize_t copy_blocks(struct volume *v, uint64_t from, uint64_t from_off, uint64_t to, uint64_t to_off, uint64_t n)
{
    struct inode source, target;
    struct copy c;
    int rc = get_regular(v, from, &source);

    if (rc == 0)
        rc = get_regular(v, to, &target);
    if (rc < 0)
        return rc;
    n = from_off >= source.size ? 0 : MIN(n, source.size - from_off);
    if (to_off > VOLUME_FILE_MAX || n > VOLUME_FILE_MAX - to_off)
        return -EFBIG;
    /* Bytes behind a file's end are zero, in the last block, too: it can be shared where it becomes a last block again. */
    if (from_off + n < source.size || to_off + n < target.size)
        n -= n % v->block;
    if (!n)
        return from_off >= source.size ? 0 : -EOPNOTSUPP;
    if ((source.flags & INODE_INLINE) || ((target.flags & INODE_INLINE) && target.size) || from_off % v->block ||
        to_off % v->block)
        return -EOPNOTSUPP;
    if (from == to && from_off < to_off + n && to_off < from_off + n)
        return -EINVAL;
    rc = 1;
    for (size_t max = COPY_RANGES; rc == 1 && max; max /= 2) {
        c = (struct copy){
            .from = from, .to = to, .lo = from_off / v->block, .count = blocks_of(v, n), .to_lo = to_off / v->block};
        rc = copy_step(v, &c, max, to_off + n);
    }
    if (rc)
        return rc < 0 ? rc : -EOPNOTSUPP;
    return (ssize_t)MIN(n, c.count * v->block);
}

ssize_t vol_copy(struct volume *v, uint64_t from, uint64_t from_off, uint64_t to, uint64_t to_off, uint64_t n)
{
    pthread_rwlock_t *a = inode_lock(v, from), *b = inode_lock(v, to);
    ssize_t rc = volume_changes(v);

    if (rc < 0)
        return rc;
    if (from_off > VOLUME_FILE_MAX || n > SSIZE_MAX)
        return -EINVAL;
    pthread_rwlock_wrlock(MIN(a, b));
    if (a != b)
        pthread_rwlock_wrlock(MAX(a, b));
    rc = copy_blocks(v, from, from_off, to, to_off, n);
    if (a != b)
        pthread_rwlock_unlock(MAX(a, b));
    pthread_rwlock_unlock(MIN(a, b));
    return rc;
}

int vol_seek(struct volume *v, uint64_t ino, uint64_t off, int whence, uint64_t *ret_off)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct inode inode;
    struct range r;
    int rc;

    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return -EINVAL;
    pthread_rwlock_rdlock(stripe);
    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &inode);
    if (rc == 0)
        rc = regular(&inode);
    if (rc == 0 && off >= inode.size)
        rc = -ENXIO;
    if (rc < 0)
        goto out;
    if (inode.flags & INODE_INLINE) {
        *ret_off = whence == SEEK_DATA ? off : inode.size;
        goto out;
    }
    for (uint64_t block = off / v->block;; block = r.block + r.count) {
        rc = range_at(v, ino, block, &r);
        if (rc < 0 && rc != -ENOENT)
            goto out;
        if (whence == SEEK_DATA) {
            *ret_off = MAX(off, rc == 0 ? r.block * v->block : 0);
            rc = rc == 0 && *ret_off < inode.size ? 0 : -ENXIO;
            goto out;
        }
        if (rc == -ENOENT || r.block > block) {
            *ret_off = MIN(MAX(off, block * v->block), inode.size);
            rc = 0;
            goto out;
        }
    }
out:
    pthread_rwlock_unlock(&v->state);
    pthread_rwlock_unlock(stripe);
    volume_trim(v);
    return rc;
}

/* --- the end of an inode --- */

/* Removes up to STEP_RANGES attributes of ino; *ret_done when there are no more. */
static int tx_drop_xattrs(struct tx *tx, uint64_t ino, bool *ret_done)
{
    struct tree_key key = tree_key(ITEM_XATTR, ino, 0), found;
    const uint8_t *value;
    size_t len;

    for (unsigned i = 0; i < STEP_RANGES; i++) {
        int rc = tree_ge(tx->v->tree, &key, &found, &value, &len);

        if (rc == -ENOENT || (rc == 0 && (found.kind != ITEM_XATTR || found.a != ino))) {
            *ret_done = true;
            return 0;
        }
        if (rc == 0)
            rc = tx_del(tx, &found);
        if (rc < 0)
            return rc;
        key.b = found.b + 1;
    }
    *ret_done = false;
    return 0;
}

static int tx_del_if_there(struct tx *tx, const struct tree_key *key)
{
    uint8_t value[ITEM_VALUE_MAX];
    ssize_t len = tx_get(tx, key, value, sizeof(value));

    if (len == -ENOENT)
        return 0;
    return len < 0 ? (int)len : tx_del(tx, key);
}

/* One transaction of the destruction of an inode without content. Returns 1 when the inode is gone. */
static int destroy_step(struct volume *v, uint64_t ino)
{
    static const enum item_kind singles[] = {ITEM_INLINE, ITEM_ORPHAN, ITEM_TRIM, ITEM_INODE};
    struct inode inode;
    bool done = false;
    struct tx tx;
    int rc;

    rc = tx_begin(v, &tx, TX_CHANGES);
    if (rc < 0)
        return rc;
    rc = tx_inode(&tx, ino, &inode);
    /* Linked or referenced again in the meantime: it lives. */
    if (rc == 0 && (inode.nlink > 0 || refs_held(v->refs, ino)))
        rc = -EBUSY;
    if (rc == 0)
        rc = tx_drop_xattrs(&tx, ino, &done);
    for (size_t i = 0; i < ARRAY_LEN(singles) && rc == 0 && done; i++)
        rc = tx_del_if_there(&tx, &(struct tree_key){.kind = (uint8_t)singles[i], .a = ino});
    if (rc < 0)
        return tx_abort(&tx, rc);
    rc = tx_commit(&tx);
    return rc < 0 ? rc : done;
}

int file_destroy(struct volume *v, uint64_t ino)
{
    pthread_rwlock_t *stripe = inode_lock(v, ino);
    struct inode inode;
    int rc;

    pthread_rwlock_wrlock(stripe);
    pthread_rwlock_rdlock(&v->state);
    rc = inode_get(v, ino, &inode);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && (inode.nlink > 0 || refs_held(v->refs, ino)))
        rc = -EBUSY;
    if (rc == 0 && S_ISREG(inode.mode) && !(inode.flags & INODE_INLINE))
        rc = free_blocks(v, ino, 0, UINT64_MAX, false);
    while (rc == 0)
        rc = destroy_step(v, ino);
    pthread_rwlock_unlock(stripe);
    return rc == 1 || rc == -EBUSY || rc == -ENOENT ? 0 : rc;
}
