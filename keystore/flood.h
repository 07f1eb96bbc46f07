/*
 * flood.h - repeated refusals are counted, not written one by one: the first of a kind goes into the audit log, those
 * that follow within FLOOD_WINDOW_NS are summed up in one record at its end.
 */
#ifndef COFFER_KEYSTORE_FLOOD_H
#define COFFER_KEYSTORE_FLOOD_H

#include "coffer/agent.h"

#include <stdbool.h>
#include <stdint.h>

#define FLOOD_WINDOW_NS 10000000000ll
#define FLOOD_KINDS     64 /* counted at one time */

/* What is the same about two refusals. */
struct flood_kind {
    char volume[AGENT_NAME_MAX];
    char event[24];
    char subject[80]; /* the container, or the user */
    char reason[AGENT_TEXT_MAX];
};

struct flood_sum {
    struct flood_kind kind;
    unsigned more; /* how many were not written */
};

struct flood;

struct flood *flood_new(void);
void flood_free(struct flood *f);
/* Whether this one is to be written. now: monotonic ns. */
bool flood_pass(struct flood *f, const struct flood_kind *kind, int64_t now);
/* Takes out one sum whose time has come (all: any sum). False when there is none. */
bool flood_take(struct flood *f, int64_t now, bool all, struct flood_sum *ret);
/* When flood_take will have something, or INT64_MAX. */
int64_t flood_deadline(const struct flood *f);

#endif
