/*
 * log.h - the log: sequence numbers, records, flushes.
 *
 * A record's life: log_reserve (under the state lock, so that sequence order is the order of application) gives sequence and
 * sectors; log_write seals it and writes it at its place, outside that lock, and returns when all lower sequences are written
 * too: then the operation may be acknowledged. log_flush makes it durable; flushes are shared.
 *
 * written and flushed only grow; flushed <= data_flushed and flushed <= written <= sequence. A segment is written again only
 * when all records of its older generation are written: checkpoints wait for them (log_wait), or a thread that was held up
 * between log_reserve and log_write would overwrite a record of the newer generation.
 */
#ifndef COFFER_LOG_H
#define COFFER_LOG_H

#include "fs/volume/state.h"

struct log_slot {
    uint64_t generation, sequence, sector;
    size_t bytes, payload; /* of the sealed part, and of what is behind it */
};

/* A log whose last record was `sequence`, that goes on in the segment of `generation` at its start. */
struct log *log_new(uint64_t segment_bytes, uint64_t generation, uint64_t sequence);
void log_free(struct log *l);

/* The largest body of a record, payload included (RECORD_BODY_MAX, less where segments are small). */
size_t log_body_max(const struct log *l);
/* [state exclusive] Is there room for a record of the largest size, and for FLUSH records beside it? If so it is kept until
 * the next log_reserve. */
bool log_has_room(struct log *l);
/* More than half full: time for a checkpoint. */
bool log_wants_checkpoint(struct log *l);

/* [state exclusive] For a record of a body and a payload of so many bytes. with_data: it names extents that are written but
 * perhaps not flushed, and not in its payload. */
void log_reserve(struct log *l, size_t body, size_t payload, bool with_data, struct log_slot *ret_slot);
/* payload: slot->payload bytes. 0 or -EIO (the volume has failed). */
int log_write(struct volume *v, const struct log_slot *slot, enum record_type type, const uint8_t *body, size_t n,
              const uint8_t *payload);

/* Waits until all records up to sequence are written (not: durable). 0 or -EIO. */
int log_wait(struct volume *v, uint64_t sequence);
/* The last reserved sequence: all that was acknowledged until now is at or below it. */
uint64_t log_sequence(struct log *l);
/* Makes everything at or below sequence durable. 0 or -EIO. */
int log_flush(struct volume *v, uint64_t sequence);
/* Is there anything to flush? */
bool log_unflushed(struct log *l);
void log_stat(struct log *l, uint64_t *ret_sequence, uint64_t *ret_flushed);

/* [state exclusive] Goes on in the segment of the next generation. Returns the last reserved sequence. */
uint64_t log_switch(struct log *l, uint64_t generation);
/* A superblock that contains all records up to sequence is durable. */
void log_checkpointed(struct log *l, uint64_t sequence);
/* Wakes everybody who waits, after v->failed was set. */
void log_wake(struct log *l);

#endif
