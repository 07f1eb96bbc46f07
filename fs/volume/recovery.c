/*
 * recovery.c - newest valid superblock + the log's valid records = the state.
 *
 * A record is valid if and only if it authenticates at its sector in the segment of its generation, and its sequence
 * number follows that of the valid record before it. The records of the superblock's generation come first, then those
 * of the next generation (written while the next checkpoint was under way).
 *
 * Where the row breaks off, all sectors behind are searched too. If any record found says that the missing sequence was
 * durable, the log was damaged, not cut by a power loss, and the volume is refused. Otherwise what follows the gap is
 * dropped: it was never acknowledged as durable, and the state is a prefix of history.
 *
 * Extents named by records above the highest sequence whose extents are known to be durable are read; the row ends before the
 * first record that has a bad one. A bad extent below is damage: it stays, and reads of it give EIO. Extents that ride in
 * their record's payload are taken from there and written to their place again: `data` need not have them.
 */
#include "fs/volume/recovery.h"

#include "fs/volume/log.h"
#include "fs/volume/repair.h"
#include "fs/volume/requests.h"
#include "fs/volume/space.h"
#include "fs/volume/tx.h"

#include <sodium.h>
#include <stdlib.h>

/* --- superblock --- */

/* No counter comes near it: whatever counts on from the superblock does not wrap around. */
#define COUNTER_MAX (1ull << 62)

static bool super_sane(const struct disk_super *s)
{
    uint32_t block = le32_get(s->block_size);
    uint64_t limit = le64_get(s->size_limit), segment = le64_get(s->log_segment), units = le64_get(s->data_units);

    return le64_get(s->magic) == SUPER_MAGIC && (block == 4096 || block == 8192 || block == 16384) &&
           limit >= VOLUME_SIZE_MIN && limit <= VOLUME_SIZE_MAX && segment >= (256u << 10) && segment <= (1ull << 30) &&
           segment % (64u << 10) == 0 && units > 0 && units % REGION_UNITS == 0 &&
           units <= VOLUME_SIZE_MAX / UNIT_BYTES && le32_get(s->root_level) <= NODE_LEVEL_MAX &&
           le32_get(s->log_segments) == LOG_SEGMENTS && le64_get(s->next_inode) > VOLUME_ROOT_INO &&
           le64_get(s->next_inode) < COUNTER_MAX && le64_get(s->next_extent) < COUNTER_MAX &&
           le64_get(s->generation) < COUNTER_MAX && le64_get(s->sequence) < COUNTER_MAX;
}

/* Is this state at least as new as the one that was last seen? */
static int check_seen(struct volume *v, const struct disk_super *s)
{
    const struct volume_seen *seen = &v->options.seen;
    uint64_t generation = le64_get(s->generation);

    if (!seen->generation || v->options.new_branch)
        return 0;
    if (memcmp(s->branch, seen->branch, sizeof(s->branch)))
        volume_damage(v, "rollback: the files are of a branch of the volume that was given up");
    else if (generation < seen->generation)
        volume_damage(v, "rollback: the files are of generation %llu, and %llu was seen",
                      (unsigned long long)generation, (unsigned long long)seen->generation);
    else if (generation == seen->generation && memcmp(s->root.mac, seen->root_mac, sizeof(seen->root_mac)))
        volume_damage(v, "rollback: the files are of another generation %llu than the one that was seen",
                      (unsigned long long)generation);
    else
        return 0;
    return -ESTALE;
}

int recovery_super(struct volume *v)
{
    struct disk_super best = {0};
    bool found = false;
    int rc;

    for (unsigned i = 0; i < SUPER_SLOTS * SUPER_COPIES; i++) {
        unsigned slot = i % SUPER_SLOTS;
        struct disk_super s;
        uint8_t buf[UNIT_BYTES];
        struct iovec iov = {buf, sizeof(buf)};

        if (v->data->ops->readv(v->data, &iov, 1, SUPER_UNIT(slot, i / SUPER_SLOTS) * UNIT_BYTES) < 0 ||
            super_open(v->keys, slot, buf, &s) < 0)
            continue;
        if (found && le64_get(s.generation) <= le64_get(best.generation))
            continue;
        best = s;
        v->super_slot = slot;
        found = true;
    }
    if (!found)
        return -EKEYREJECTED;
    if (le32_get(best.version) != FORMAT_VERSION || (le32_get(best.incompat) & ~FEATURES_INCOMPAT))
        return -ENOTSUP;
    if (!super_sane(&best)) {
        volume_damage(v, "corrupt superblock: generation %llu, impossible field",
                      (unsigned long long)le64_get(best.generation));
        return -EIO;
    }
    rc = check_seen(v, &best);
    if (rc < 0)
        return rc;
    if (v->options.new_branch)
        randombytes_buf(best.branch, sizeof(best.branch));
    if (le32_get(best.ro_compat) & ~FEATURES_RO_COMPAT)
        v->read_only = true;
    v->super = best;
    return 0;
}

/* --- the row of records --- */

struct record {
    struct disk_record head;
    uint64_t sequence;
    uint8_t *body;
    const uint8_t *payload; /* in a segment */
    uint32_t bad;           /* bit i: the payload's i-th extent does not authenticate */
};

struct row {
    struct record *record;
    size_t n, cap;
    uint8_t *segment[LOG_SEGMENTS];
};

static void row_free(struct row *r)
{
    for (size_t i = 0; i < r->n; i++)
        free(r->record[i].body);
    free(r->record);
    for (size_t i = 0; i < LOG_SEGMENTS; i++)
        free(r->segment[i]);
}

/* Collects every record of a generation that authenticates, in order of place. */
static int scan_segment(struct volume *v, uint64_t generation, struct row *row)
{
    uint64_t bytes = le64_get(v->super.log_segment), off = generation % LOG_SEGMENTS * bytes;
    int64_t size = v->logstore->ops->size(v->logstore);
    uint8_t *segment = NULL;
    struct iovec iov;
    int rc = -EIO;

    if (size >= 0 && (uint64_t)size >= off + bytes) {
        row->segment[generation % LOG_SEGMENTS] = segment = xmalloc(bytes);
        iov = (struct iovec){segment, bytes};
        rc = v->logstore->ops->readv(v->logstore, &iov, 1, off);
    }
    if (rc < 0) {
        volume_damage(v, "log: segment %llu cannot be read (%s)", (unsigned long long)(generation % LOG_SEGMENTS),
                      strerror(-rc));
        return v->repair ? 0 : -EIO; /* then it holds no record */
    }
    for (uint64_t sector = 0; sector < bytes / SECTOR_BYTES;) {
        struct record r = {0};

        rc = record_open(v->keys, generation, sector, segment + sector * SECTOR_BYTES, bytes - sector * SECTOR_BYTES,
                         &r.head, &r.body);
        if (rc < 0) {
            sector++;
            continue;
        }
        r.sequence = le64_get(r.head.sequence);
        sector += le32_get(r.head.sectors);
        r.payload = segment + (sector - le32_get(r.head.payload_sectors)) * SECTOR_BYTES;
        if (row->n == row->cap) {
            row->cap = row->cap ? row->cap * 2 : 256;
            row->record = xrealloc(row->record, row->cap * sizeof(*row->record));
        }
        row->record[row->n++] = r;
    }
    return 0;
}

/* The number of records that follow each other from sequence `last` on. -EIO when a durable one is missing. */
static int64_t find_end(struct volume *v, const struct row *row, uint64_t last)
{
    uint64_t flushed = last;
    size_t n = 0;

    while (n < row->n && row->record[n].sequence == last + n + 1)
        n++;
    for (size_t i = 0; i < row->n; i++)
        flushed = MAX(flushed, le64_get(row->record[i].head.flushed));
    if (flushed >= last + n + 1 && v->repair) {
        repair_log_cut(v->repair, last + n + 1, row->n - n);
    } else if (flushed >= last + n + 1) {
        volume_damage(v, "log: record %llu was durable and is damaged", (unsigned long long)(last + n + 1));
        return -EIO;
    }
    return (int64_t)n;
}

/* --- extents that may not have reached the disk --- */

static bool extent_readable(struct volume *v, const struct extent *e)
{
    size_t bytes = (size_t)e->chunks * v->block;
    uint8_t *plain = xmalloc(bytes);
    int rc;

    /* After a failed flush the page cache may still show what is not on the disk. */
    if (v->data->ops->drop)
        v->data->ops->drop(v->data, e->addr * UNIT_BYTES, bytes);
    rc = extent_read(v->keys, v->data, e, v->block, 0, e->chunks, plain);

    free(plain);
    return rc == 0;
}

/* The extents that a record brings: those whose units it also allocates. Calls visit for each, until it returns nonzero, which is
 * returned; -EUCLEAN when one is malformed. */
typedef int (*fresh_fn)(struct volume *v, struct record *r, unsigned index, size_t payload_off, const struct extent *e);

static int for_each_fresh(struct volume *v, struct record *r, fresh_fn visit)
{
    size_t len = le32_get(r->head.body_bytes), n = 0, off = 0;
    uint64_t allocated[EXTENT_CHUNKS_MAX * 32];
    unsigned index = 0;

    for (size_t at = 0; at + sizeof(struct disk_change) <= len;) {
        const struct disk_change *c = (const struct disk_change *)(r->body + at);

        if (c->op == CHANGE_ALLOC && n < ARRAY_LEN(allocated))
            allocated[n++] = be64_get(c->key.a);
        at += sizeof(*c) + le16_get(c->len);
    }
    for (size_t at = 0; at + sizeof(struct disk_change) <= len;) {
        const struct disk_change *c = (const struct disk_change *)(r->body + at);
        size_t vlen = le16_get(c->len);
        struct extent e;
        bool fresh = false;
        int rc;

        at += sizeof(*c) + vlen;
        if (c->op != CHANGE_PUT || c->key.kind != ITEM_EXTENT || at > len)
            continue;
        if (extent_decode(be64_get(c->key.a), (const uint8_t *)(c + 1), vlen, &e) < 0)
            return -EUCLEAN;
        for (size_t i = 0; i < n && !fresh; i++)
            fresh = allocated[i] == e.addr;
        rc = fresh ? visit(v, r, index++, off, &e) : 0;
        if (rc)
            return rc;
        off += fresh ? (size_t)e.chunks * v->block : 0;
    }
    return 0;
}

static bool in_payload(const struct volume *v, const struct record *r, unsigned index, size_t off,
                       const struct extent *e)
{
    return index < 32 && off + (size_t)e->chunks * v->block <= (size_t)le32_get(r->head.payload_sectors) * SECTOR_BYTES;
}

/* Nonzero when the extent is neither in the payload nor in `data`. */
static int look_for(struct volume *v, struct record *r, unsigned index, size_t off, const struct extent *e)
{
    if (in_payload(v, r, index, off, e)) {
        if (extent_verify(v->keys, e, v->block, r->payload + off) == 0)
            return 0;
        r->bad |= 1u << index;
    }
    return extent_readable(v, e) ? 0 : -EBADMSG;
}

/* Cuts the row before the first record that brings an extent which never reached the disk. What was known to have done so
 * stays, and is damage. */
static size_t cut_unreadable(struct volume *v, struct row *row, size_t n)
{
    uint64_t data_flushed = le64_get(v->super.sequence);

    for (size_t i = 0; i < row->n; i++)
        data_flushed = MAX(data_flushed, le64_get(row->record[i].head.data_flushed));
    for (size_t i = 0; i < n; i++) {
        struct record *r = &row->record[i];
        bool flushed = r->sequence <= data_flushed;

        if (flushed && !le32_get(r->head.payload_sectors))
            continue;
        if (for_each_fresh(v, r, look_for) < 0 && !flushed)
            return i;
    }
    return n;
}

static int put_back(struct volume *v, struct record *r, unsigned index, size_t off, const struct extent *e)
{
    struct iovec iov = {(uint8_t *)(uintptr_t)r->payload + off, (size_t)e->chunks * v->block};

    if (!in_payload(v, r, index, off, e) || (r->bad >> index & 1))
        return 0;
    return v->data->ops->writev(v->data, &iov, 1, e->addr * UNIT_BYTES);
}

/* --- the whole --- */

int recovery_replay(struct volume *v)
{
    uint64_t generation = le64_get(v->super.generation), last = le64_get(v->super.sequence);
    struct row row = {0};
    int64_t n = 0;
    int rc = 0;

    v->generation = generation + 1; /* so that the checkpoint after this is newer than any record */
    /* A new branch takes numbers that the old one never had: its records must not authenticate in this one. An even
     * step, so that the segments stay as they are. */
    if (v->options.new_branch)
        v->generation += (MAX(v->options.seen.generation, generation) - generation + (1ull << 32)) & ~1ull;
    if (le32_get(v->super.flags) & SUPER_CLEAN)
        goto done;
    rc = scan_segment(v, generation, &row);
    if (rc == 0)
        rc = scan_segment(v, generation + 1, &row);
    if (rc == 0) {
        n = find_end(v, &row, last);
        rc = n < 0 ? (int)n : 0;
    }
    if (rc < 0)
        goto out;
    n = (int64_t)cut_unreadable(v, &row, (size_t)n);
    for (int64_t i = 0; i < n && rc == 0; i++) {
        struct record *r = &row.record[i];

        if (le16_get(r->head.type) == RECORD_CHANGES)
            rc = tx_replay(v, r->body, le32_get(r->head.body_bytes));
        if (rc == 0 && le32_get(r->head.payload_sectors))
            rc = for_each_fresh(v, r, put_back);
        if (v->options.resumed && le64_get(r->head.mount_id) == v->options.mount_id)
            requests_recover(v, &r->head, r->body);
        if (rc < 0)
            volume_damage(v, "log: record %llu cannot be applied (%s)", (unsigned long long)r->sequence, strerror(-rc));
    }
    if (rc < 0) {
        rc = -EIO;
        goto out;
    }
done:
    v->log = log_new(le64_get(v->super.log_segment), v->generation, last + (uint64_t)n);
out:
    row_free(&row);
    return rc;
}

/* The first item of a kind at or above inode `from`; its inode. */
static int next_of_kind(struct volume *v, enum item_kind kind, uint64_t from, uint64_t *ret_ino)
{
    struct tree_key key = tree_key(kind, from, 0), found;
    const uint8_t *value;
    size_t len;
    int rc;

    pthread_rwlock_rdlock(&v->state);
    rc = tree_ge(v->tree, &key, &found, &value, &len);
    pthread_rwlock_unlock(&v->state);
    if (rc == 0 && found.kind != kind)
        rc = -ENOENT;
    if (rc == 0)
        *ret_ino = found.a;
    return rc;
}

void recovery_orphans(struct volume *v)
{
    uint64_t ino;

    for (ino = 0; next_of_kind(v, ITEM_TRIM, ino, &ino) == 0; ino++)
        file_finish_trim(v, ino);
    /* The kernel may have them open. */
    for (ino = 0; !v->options.resumed && next_of_kind(v, ITEM_ORPHAN, ino, &ino) == 0; ino++)
        file_destroy(v, ino);
}
