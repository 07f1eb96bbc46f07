/*
 * requests.h - which of the kernel's requests have changed the volume, so that one that is sent again to a new server
 * (volume_options.resumed) is answered and not done twice.
 */
#ifndef COFFER_REQUESTS_H
#define COFFER_REQUESTS_H

#include "fs/volume/log.h"

/* The calling thread's request, for the head of a record of its changes; 0: none. */
uint64_t request_id(void);
/* [state exclusive] Its record is reserved. */
void request_committed(void);
/* A record of this mount that recovery has found. */
void requests_recover(struct volume *v, const struct disk_record *head, const uint8_t *body);

/* What a checkpoint carries over into the log segment that it begins. */
struct requests_carried {
    le64 *body;
    size_t n;
    struct log_slot slot;
};
/* [state exclusive] Collects what may be sent again, and reserves a record for it, if there is anything. */
void requests_carry(struct volume *v, struct requests_carried *ret);
/* Writes it: before the superblock, since then the older segment is no longer read. Frees it. 0, -EIO. */
int requests_write(struct volume *v, struct requests_carried *c);

#endif
