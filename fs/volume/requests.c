/* requests.c - see requests.h. Owns what each thread works for, and the volume's table of recovered requests. */
#include "fs/volume/requests.h"

#include <stdlib.h>

#define THREADS_MAX 64            /* that call vol_request() */
#define CARRIED_MAX 8192          /* a body of half the smallest log's largest record */
#define ANSWERED_NS 60000000000ll /* the kernel sends again at once */

static _Thread_local uint64_t request_now;
static _Thread_local unsigned slot; /* in `committed`, plus 1; 0: none yet */
static _Atomic unsigned slots;
/* Each thread's request that has a record, until it is at work for another: it may not be answered yet. */
static _Atomic uint64_t committed[THREADS_MAX];

void vol_request(uint64_t id)
{
    if (!slot)
        slot = atomic_fetch_add(&slots, 1) + 1;
    if (slot > THREADS_MAX)
        abort();
    request_now = id;
    atomic_store(&committed[slot - 1], 0);
}

uint64_t request_id(void)
{
    return request_now;
}

void request_committed(void)
{
    if (request_now)
        atomic_store(&committed[slot - 1], request_now);
}

static void remember(struct volume *v, uint64_t id)
{
    if (!id || (v->nanswered && v->answered[v->nanswered - 1] == id))
        return;
    /* Doubled at each power of two. */
    if ((v->nanswered & (v->nanswered - 1)) == 0)
        v->answered = xrealloc(v->answered, MAX(v->nanswered * 2, (size_t)1) * sizeof(*v->answered));
    v->answered[v->nanswered++] = id;
    v->answered_ns = mono_ns();
}

void requests_recover(struct volume *v, const struct disk_record *head, const uint8_t *body)
{
    size_t n = le16_get(head->type) == RECORD_REQUESTS ? le32_get(head->body_bytes) / sizeof(le64) : 0;

    for (size_t i = 0; i < n; i++) {
        le64 id;

        memcpy(&id, body + i * sizeof(id), sizeof(id));
        remember(v, le64_get(id));
    }
    remember(v, le64_get(head->request));
}

bool vol_request_done(struct volume *v)
{
    bool done = false;

    pthread_rwlock_rdlock(&v->state);
    for (size_t i = v->nanswered; i-- > 0 && !done;)
        done = v->answered[i] == request_now;
    pthread_rwlock_unlock(&v->state);
    return done;
}

void requests_carry(struct volume *v, struct requests_carried *ret)
{
    size_t first;

    if (v->nanswered && mono_ns() - v->answered_ns > ANSWERED_NS)
        v->nanswered = 0;
    first = v->nanswered > CARRIED_MAX ? v->nanswered - CARRIED_MAX : 0;
    *ret = (struct requests_carried){.body = xcalloc(v->nanswered - first + THREADS_MAX, sizeof(*ret->body))};
    for (size_t i = first; i < v->nanswered; i++)
        ret->body[ret->n++] = le64_make(v->answered[i]);
    for (unsigned i = 0; i < THREADS_MAX; i++) {
        uint64_t id = atomic_load(&committed[i]);

        if (id)
            ret->body[ret->n++] = le64_make(id);
    }
    if (ret->n)
        log_reserve(v->log, ret->n * sizeof(*ret->body), 0, false, &ret->slot);
}

int requests_write(struct volume *v, struct requests_carried *c)
{
    int rc = 0;

    if (c->n)
        rc = log_write(v, &c->slot, RECORD_REQUESTS, (const uint8_t *)c->body, c->n * sizeof(*c->body), NULL);
    free(c->body);
    *c = (struct requests_carried){0};
    return rc;
}
