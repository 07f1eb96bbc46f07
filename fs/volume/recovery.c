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
 * Extents named by records above the highest sequence whose extents are known to be durable are read; the row ends
 * before the first record that has a bad one. A bad extent below is damage: it stays, and reads of it give EIO.
 */
#include "fs/volume/recovery.h"

#include "fs/volume/log.h"
#include "fs/volume/repair.h"
#include "fs/volume/space.h"
#include "fs/volume/tx.h"

#include <stdlib.h>

/* --- superblock --- */

static bool super_sane(const struct disk_super *s)
{
    uint32_t block = le32_get(s->block_size);
    uint64_t limit = le64_get(s->size_limit), segment = le64_get(s->log_segment), units = le64_get(s->data_units);

    return le64_get(s->magic) == SUPER_MAGIC && (block == 4096 || block == 8192 || block == 16384) &&
           limit >= VOLUME_SIZE_MIN && limit <= VOLUME_SIZE_MAX && segment >= (256u << 10) && segment <= (1ull << 30) &&
           segment % (64u << 10) == 0 && units > 0 && units % REGION_UNITS == 0 &&
           units <= VOLUME_SIZE_MAX / UNIT_BYTES && le32_get(s->root_level) <= NODE_LEVEL_MAX &&
           le32_get(s->log_segments) == LOG_SEGMENTS && le64_get(s->next_inode) > VOLUME_ROOT_INO;
}

int recovery_super(struct volume *v)
{
    struct disk_super best = {0};
    bool found = false;

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
};

struct row {
    struct record *record;
    size_t n, cap;
    bool next_generation; /* some are of the generation after the superblock's */
};

static void row_free(struct row *r)
{
    for (size_t i = 0; i < r->n; i++)
        free(r->record[i].body);
    free(r->record);
}

/* Collects every record of a generation that authenticates, in order of place. */
static int scan_segment(struct volume *v, uint64_t generation, struct row *row, bool *ret_any)
{
    uint64_t bytes = le64_get(v->super.log_segment);
    uint8_t *segment = xmalloc(bytes);
    struct iovec iov = {segment, bytes};
    int rc;

    *ret_any = false;
    rc = v->logstore->ops->readv(v->logstore, &iov, 1, generation % LOG_SEGMENTS * bytes);
    if (rc < 0) {
        volume_damage(v, "log: segment %llu cannot be read (%s)", (unsigned long long)(generation % LOG_SEGMENTS),
                      strerror(-rc));
        rc = v->repair ? 0 : -EIO; /* then it holds no record */
        goto out;
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
        *ret_any = true;
        if (row->n == row->cap) {
            row->cap = row->cap ? row->cap * 2 : 256;
            row->record = xrealloc(row->record, row->cap * sizeof(*row->record));
        }
        row->record[row->n++] = r;
    }
    rc = 0;
out:
    free(segment);
    return rc;
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

/* Are all extents that this record brings readable? A record brings an extent when it also allocates its units. */
static bool record_readable(struct volume *v, const uint8_t *body, size_t len)
{
    uint64_t allocated[EXTENT_CHUNKS_MAX * 32];
    size_t n = 0;

    for (size_t at = 0; at + sizeof(struct disk_change) <= len;) {
        const struct disk_change *c = (const struct disk_change *)(body + at);

        if (c->op == CHANGE_ALLOC && n < ARRAY_LEN(allocated))
            allocated[n++] = be64_get(c->key.a);
        at += sizeof(*c) + le16_get(c->len);
    }
    for (size_t at = 0; at + sizeof(struct disk_change) <= len;) {
        const struct disk_change *c = (const struct disk_change *)(body + at);
        size_t vlen = le16_get(c->len);
        struct extent e;
        bool fresh = false;

        at += sizeof(*c) + vlen;
        if (c->op != CHANGE_PUT || c->key.kind != ITEM_EXTENT || at > len)
            continue;
        if (extent_decode(be64_get(c->key.a), (const uint8_t *)(c + 1), vlen, &e) < 0)
            return false;
        for (size_t i = 0; i < n && !fresh; i++)
            fresh = allocated[i] == e.addr;
        if (fresh && !extent_readable(v, &e))
            return false;
    }
    return true;
}

static size_t cut_unreadable(struct volume *v, const struct row *row, size_t n)
{
    uint64_t data_flushed = le64_get(v->super.sequence);

    for (size_t i = 0; i < row->n; i++)
        data_flushed = MAX(data_flushed, le64_get(row->record[i].head.data_flushed));
    for (size_t i = 0; i < n; i++) {
        const struct record *r = &row->record[i];

        if (r->sequence > data_flushed && !record_readable(v, r->body, le32_get(r->head.body_bytes)))
            return i;
    }
    return n;
}

/* --- the whole --- */

int recovery_replay(struct volume *v)
{
    uint64_t generation = le64_get(v->super.generation), last = le64_get(v->super.sequence);
    struct row row = {0};
    bool any = false;
    int64_t n = 0;
    int rc = 0;

    v->generation = generation + 1; /* so that the checkpoint after this is newer than any record */
    if (le32_get(v->super.flags) & SUPER_CLEAN)
        goto done;
    rc = scan_segment(v, generation, &row, &any);
    if (rc == 0)
        rc = scan_segment(v, generation + 1, &row, &any);
    if (rc == 0) {
        n = find_end(v, &row, last);
        rc = n < 0 ? (int)n : 0;
    }
    if (rc < 0)
        goto out;
    n = (int64_t)cut_unreadable(v, &row, (size_t)n);
    for (int64_t i = 0; i < n && rc == 0; i++) {
        const struct record *r = &row.record[i];

        if (le16_get(r->head.type) == RECORD_CHANGES)
            rc = tx_replay(v, r->body, le32_get(r->head.body_bytes));
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
    for (ino = 0; next_of_kind(v, ITEM_ORPHAN, ino, &ino) == 0; ino++)
        file_destroy(v, ino);
}
