/*
 * log.c - see log.h. Owns the sequence counters and the flush in progress.
 *
 * A flush, done by whichever caller finds none going on:
 *
 *   goal = written            nothing at or below goal can need an extent that is not written
 *   sync data                 only if a record above data_flushed names extents
 *   append FLUSH              so that recovery knows: extents up to goal are durable, a bad one is damage
 *   sync log                  goal is durable
 *
 * The generation and sector of the segment change only in log_switch.
 */
#include "fs/volume/log.h"

#include "fs/volume/requests.h"

#include <stdlib.h>

#define INFLIGHT_MAX 1024 /* records reserved and not yet written; more than there can be threads */

struct log {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    uint64_t segment_sectors;
    uint64_t generation;
    uint64_t sector;       /* next free one of the segment */
    uint64_t sequence;     /* last reserved */
    uint64_t written;      /* all at or below are written */
    uint64_t data_needed;  /* highest sequence that names extents */
    uint64_t data_flushed; /* extents of all at or below are durable */
    uint64_t flushed;      /* all at or below are durable */
    bool flushing;
    bool promised;           /* log_has_room said yes, and nothing was reserved since */
    bool done[INFLIGHT_MAX]; /* [sequence % INFLIGHT_MAX]: written, but a lower one is not */
};

struct log *log_new(uint64_t segment_bytes, uint64_t generation, uint64_t sequence)
{
    struct log *l = xcalloc(1, sizeof(*l));

    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->cond, NULL);
    l->segment_sectors = segment_bytes / SECTOR_BYTES;
    l->generation = generation;
    l->sequence = l->written = l->data_needed = l->data_flushed = l->flushed = sequence;
    return l;
}

void log_free(struct log *l)
{
    if (!l)
        return;
    pthread_mutex_destroy(&l->mutex);
    pthread_cond_destroy(&l->cond);
    free(l);
}

size_t log_body_max(const struct log *l)
{
    return MIN(RECORD_BODY_MAX, l->segment_sectors * SECTOR_BYTES / 2 - 4096);
}

/* Sectors that stay free for FLUSH records after the last record that fits. */
#define FLUSH_SECTORS 16

bool log_has_room(struct log *l)
{
    uint64_t need = record_bytes(log_body_max(l)) / SECTOR_BYTES + FLUSH_SECTORS;
    bool ok;

    pthread_mutex_lock(&l->mutex);
    ok = l->sector + need <= l->segment_sectors && l->sequence - l->written < INFLIGHT_MAX - 8;
    l->promised = ok;
    pthread_mutex_unlock(&l->mutex);
    return ok;
}

bool log_wants_checkpoint(struct log *l)
{
    bool wants;

    pthread_mutex_lock(&l->mutex);
    wants = l->sector > l->segment_sectors / 2;
    pthread_mutex_unlock(&l->mutex);
    return wants;
}

static void reserve(struct log *l, size_t body, size_t payload, struct log_slot *ret_slot)
{
    ret_slot->bytes = record_bytes(body);
    ret_slot->payload = payload;
    ret_slot->generation = l->generation;
    ret_slot->sector = l->sector;
    ret_slot->sequence = ++l->sequence;
    l->sector += (ret_slot->bytes + payload) / SECTOR_BYTES;
}

void log_reserve(struct log *l, size_t body, size_t payload, bool with_data, struct log_slot *ret_slot)
{
    pthread_mutex_lock(&l->mutex);
    reserve(l, body, payload, ret_slot);
    l->promised = false;
    if (with_data)
        l->data_needed = ret_slot->sequence;
    pthread_mutex_unlock(&l->mutex);
}

/* [log] Notes that a record is written, and moves `written` over all that are. */
static void mark_written(struct log *l, uint64_t sequence)
{
    l->done[sequence % INFLIGHT_MAX] = true;
    while (l->done[(l->written + 1) % INFLIGHT_MAX]) {
        l->written++;
        l->done[l->written % INFLIGHT_MAX] = false;
    }
    pthread_cond_broadcast(&l->cond);
}

/* [log] */
static int wait_written(struct volume *v, uint64_t sequence)
{
    struct log *l = v->log;

    while (l->written < sequence && !v->failed)
        pthread_cond_wait(&l->cond, &l->mutex);
    return l->written >= sequence ? 0 : -EIO;
}

/* Seals and writes one record at its place. */
static int put_record(struct volume *v, const struct log_slot *slot, enum record_type type, const uint8_t *body,
                      size_t n, const uint8_t *payload, uint64_t flushed, uint64_t data_flushed)
{
    struct disk_record head = {.type = le16_make((uint16_t)type),
                               .sequence = le64_make(slot->sequence),
                               .flushed = le64_make(flushed),
                               .data_flushed = le64_make(data_flushed),
                               .mount_id = le64_make(v->options.mount_id),
                               .request = le64_make(type == RECORD_CHANGES ? request_id() : 0),
                               .payload_sectors = le32_make((uint32_t)(slot->payload / SECTOR_BYTES))};
    uint64_t segment = slot->generation % LOG_SEGMENTS;
    uint8_t *buf = xmalloc(slot->bytes);
    struct iovec iov[2] = {{buf, slot->bytes}, {(uint8_t *)(uintptr_t)payload, slot->payload}};
    int rc;

    record_seal(v->keys, slot->generation, slot->sector, &head, body, n, buf);
    rc = v->logstore->ops->writev(v->logstore, iov, slot->payload ? 2 : 1,
                                  (segment * v->log->segment_sectors + slot->sector) * SECTOR_BYTES);
    free(buf);
    return rc;
}

int log_write(struct volume *v, const struct log_slot *slot, enum record_type type, const uint8_t *body, size_t n,
              const uint8_t *payload)
{
    struct log *l = v->log;
    uint64_t flushed, data_flushed;
    int rc;

    pthread_mutex_lock(&l->mutex);
    flushed = l->flushed;
    data_flushed = l->data_flushed;
    pthread_mutex_unlock(&l->mutex);
    /* After a failure nothing may be written: a later record must not stand behind one that is missing. */
    rc = v->failed ? -EIO : put_record(v, slot, type, body, n, payload, flushed, data_flushed);
    if (rc < 0)
        return volume_fail(v, "writing the log", rc);
    pthread_mutex_lock(&l->mutex);
    mark_written(l, slot->sequence);
    rc = wait_written(v, slot->sequence);
    pthread_mutex_unlock(&l->mutex);
    return rc;
}

int log_wait(struct volume *v, uint64_t sequence)
{
    int rc;

    pthread_mutex_lock(&v->log->mutex);
    rc = wait_written(v, sequence);
    pthread_mutex_unlock(&v->log->mutex);
    return rc;
}

uint64_t log_sequence(struct log *l)
{
    uint64_t sequence;

    pthread_mutex_lock(&l->mutex);
    sequence = l->sequence;
    pthread_mutex_unlock(&l->mutex);
    return sequence;
}

/* Syncs `data` and appends the FLUSH record that says so. Called by the one flusher, without locks. */
static int flush_data(struct volume *v, uint64_t goal)
{
    struct log *l = v->log;
    struct log_slot slot;
    uint64_t flushed, kept;
    bool room;
    int rc;

    rc = volume_sync_data(v);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&l->mutex);
    l->data_flushed = MAX(l->data_flushed, goal);
    goal = l->data_flushed;
    flushed = l->flushed;
    /* Never at the cost of the record for which log_has_room said yes. Without it recovery takes damage of these extents
     * for the end of the log. */
    kept = l->promised ? record_bytes(log_body_max(l)) / SECTOR_BYTES : 0;
    room = l->sector + 1 + kept <= l->segment_sectors && l->sequence - l->written < INFLIGHT_MAX - 4;
    if (room)
        reserve(l, 0, 0, &slot);
    pthread_mutex_unlock(&l->mutex);
    if (!room)
        return 0;
    rc = v->failed ? -EIO : put_record(v, &slot, RECORD_FLUSH, NULL, 0, NULL, flushed, goal);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&l->mutex);
    mark_written(l, slot.sequence);
    pthread_mutex_unlock(&l->mutex);
    return 0;
}

int log_flush(struct volume *v, uint64_t sequence)
{
    struct log *l = v->log;
    uint64_t goal;
    bool with_data;
    int rc;

    pthread_mutex_lock(&l->mutex);
    rc = wait_written(v, sequence);
    while (rc == 0 && l->flushed < sequence && l->flushing && !v->failed)
        pthread_cond_wait(&l->cond, &l->mutex);
    if (rc < 0 || v->failed || l->flushed >= sequence) {
        rc = l->flushed >= sequence ? 0 : -EIO;
        goto out;
    }
    l->flushing = true;
    goal = l->written;
    with_data = l->data_needed > l->data_flushed;
    pthread_mutex_unlock(&l->mutex);

    if (with_data)
        rc = flush_data(v, goal);
    if (rc == 0)
        rc = v->logstore->ops->sync(v->logstore);
    if (rc < 0)
        rc = volume_fail(v, "flushing", rc);

    pthread_mutex_lock(&l->mutex);
    l->flushing = false;
    if (rc == 0) {
        l->flushed = MAX(l->flushed, goal);
        l->data_flushed = MAX(l->data_flushed, l->flushed);
    }
    pthread_cond_broadcast(&l->cond);
out:
    pthread_mutex_unlock(&l->mutex);
    return rc;
}

bool log_unflushed(struct log *l)
{
    bool any;

    pthread_mutex_lock(&l->mutex);
    any = l->flushed < l->written;
    pthread_mutex_unlock(&l->mutex);
    return any;
}

void log_stat(struct log *l, uint64_t *ret_sequence, uint64_t *ret_flushed)
{
    pthread_mutex_lock(&l->mutex);
    *ret_sequence = l->sequence;
    *ret_flushed = l->flushed;
    pthread_mutex_unlock(&l->mutex);
}

uint64_t log_switch(struct log *l, uint64_t generation)
{
    uint64_t sequence;

    pthread_mutex_lock(&l->mutex);
    l->generation = generation;
    l->sector = 0;
    sequence = l->sequence;
    pthread_mutex_unlock(&l->mutex);
    return sequence;
}

void log_checkpointed(struct log *l, uint64_t sequence)
{
    pthread_mutex_lock(&l->mutex);
    l->flushed = MAX(l->flushed, sequence);
    l->data_flushed = MAX(l->data_flushed, sequence);
    pthread_cond_broadcast(&l->cond);
    pthread_mutex_unlock(&l->mutex);
}

void log_wake(struct log *l)
{
    pthread_mutex_lock(&l->mutex);
    pthread_cond_broadcast(&l->cond);
    pthread_mutex_unlock(&l->mutex);
}
