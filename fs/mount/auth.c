/*
 * auth.c - what the agent has decided, as far as it may be used again.
 *
 * Owns the table of grants and the table of remembered verdicts. Called by life.c (verdicts), adapter.c (handles) and
 * channel.c (grants, the agent's orders).
 *
 * Invariants:
 *  1. A grant is in the table exactly as long as something refers to it. A handle whose grant is not there is refused.
 *  2. A grant that has ended never lives again: the agent does not repeat numbers, a new agent has another epoch.
 *  3. A verdict is remembered only against a thread pidfd, and used only while that says that the thread is alive: the
 *     number of a dead thread, given to another one, finds nothing; nor does a thread that has changed its user, whom
 *     a rule may name. Refusals are never remembered.
 *  4. No verdict of an older agent is used once a newer one is there. (Handles are: they were decided when opened.)
 */
#include "mount.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>

#define GRANT_BUCKETS   256u
#define CACHE_SETS      256u
#define CACHE_WAYS      4
#define HANDLES_UNKNOWN (1ull << 48) /* references of handles whose number nobody knows: never used up */

struct grant {
    struct grant *next;
    uint64_t fh;    /* the agent's number of the grant: random, so that those of different agents differ */
    uint64_t epoch; /* of the agent's channel */
    uint64_t refs;
    bool ended;
};

struct cached {
    pid_t tid; /* 0: free */
    uid_t uid; /* that it had: who changes it is asked about again */
    int pidfd;
    uint64_t used;
    struct grant *grant;
    bool read_only;
};

static pthread_mutex_t auth_lock = PTHREAD_MUTEX_INITIALIZER; /* all below, and every struct grant */
static struct grant *grants[GRANT_BUCKETS];
static struct cached cache[CACHE_SETS][CACHE_WAYS];
static uint64_t cache_clock;
static uint64_t epoch_now;

/* --- grants; auth_lock held --- */

static struct grant **grant_bucket(uint64_t fh)
{
    return &grants[fh % GRANT_BUCKETS];
}

static struct grant *grant_find(uint64_t fh)
{
    struct grant *g = *grant_bucket(fh);

    while (g && g->fh != fh)
        g = g->next;
    return g;
}

static void grant_drop(struct grant *g)
{
    struct grant **p;

    if (!g || --g->refs > 0)
        return;
    for (p = grant_bucket(g->fh); *p != g; p = &(*p)->next)
        ;
    *p = g->next;
    free(g);
}

static void cached_drop(struct cached *c)
{
    if (c->tid == 0)
        return;
    close_quiet(c->pidfd);
    grant_drop(c->grant);
    *c = (struct cached){.pidfd = -1};
}

/* Drops the verdicts under g, or all with NULL. */
static void cache_purge(const struct grant *g)
{
    for (size_t i = 0; i < CACHE_SETS; i++) {
        for (size_t k = 0; k < CACHE_WAYS; k++) {
            if (!g || cache[i][k].grant == g)
                cached_drop(&cache[i][k]);
        }
    }
}

/* --- references --- */

struct grant *auth_grant_ref(uint64_t epoch, uint64_t number)
{
    struct grant *g;

    if (number == 0 || number == UINT64_MAX) /* the adapter's placeholder */
        return NULL;
    pthread_mutex_lock(&auth_lock);
    g = grant_find(number);
    if (!g) {
        g = xcalloc(1, sizeof(*g));
        g->fh = number;
        g->epoch = epoch;
        g->next = *grant_bucket(number);
        *grant_bucket(number) = g;
    }
    g->refs++;
    pthread_mutex_unlock(&auth_lock);
    return g;
}

void auth_grant_unref(struct grant *g)
{
    pthread_mutex_lock(&auth_lock);
    grant_drop(g);
    pthread_mutex_unlock(&auth_lock);
}

void auth_grant_resumed(uint64_t epoch, uint64_t number)
{
    struct grant *g = auth_grant_ref(epoch, number);

    pthread_mutex_lock(&auth_lock);
    if (g)
        g->refs += HANDLES_UNKNOWN;
    pthread_mutex_unlock(&auth_lock);
}

void auth_put(struct auth *a)
{
    if (a->grant)
        auth_grant_unref(a->grant);
    *a = (struct auth){.kind = AGENT_DENY};
}

bool auth_live(const struct auth *a)
{
    bool live;

    pthread_mutex_lock(&auth_lock);
    live = !a->grant || !a->grant->ended;
    pthread_mutex_unlock(&auth_lock);
    return live;
}

/* --- remembered verdicts --- */

static bool thread_alive(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};

    return poll(&p, 1, 0) == 0;
}

bool auth_cached(pid_t tid, uid_t uid, bool write, struct auth *ret)
{
    struct cached *set = cache[(unsigned)tid % CACHE_SETS];
    bool found = false;

    pthread_mutex_lock(&auth_lock);
    for (size_t k = 0; k < CACHE_WAYS && tid > 0; k++) {
        if (set[k].tid != tid || set[k].uid != uid)
            continue;
        if (!thread_alive(set[k].pidfd)) {
            cached_drop(&set[k]);
        } else if (!(write && set[k].read_only)) {
            set[k].used = ++cache_clock;
            set[k].grant->refs++;
            *ret = (struct auth){.kind = AGENT_ALLOW, .read_only = set[k].read_only, .grant = set[k].grant};
            found = true;
        }
        break;
    }
    pthread_mutex_unlock(&auth_lock);
    return found;
}

void auth_remember(pid_t tid, uid_t uid, const struct auth *a, int pidfd_take)
{
    struct cached *set = cache[(unsigned)tid % CACHE_SETS], *place = &set[0];

    pthread_mutex_lock(&auth_lock);
    if (tid <= 0 || a->kind != AGENT_ALLOW || !a->grant || a->grant->ended || a->grant->epoch != epoch_now) {
        close_quiet(pidfd_take);
        goto out;
    }
    for (size_t k = 0; k < CACHE_WAYS; k++) {
        if (set[k].tid == tid && set[k].uid == uid) {
            place = &set[k];
            break;
        }
        if (set[k].used < place->used)
            place = &set[k];
    }
    a->grant->refs++;
    cached_drop(place);
    *place = (struct cached){.tid = tid,
                             .uid = uid,
                             .pidfd = pidfd_take,
                             .used = ++cache_clock,
                             .grant = a->grant,
                             .read_only = a->read_only};
out:
    pthread_mutex_unlock(&auth_lock);
}

/* --- handles --- */

uint64_t auth_handle_open(const struct auth *a)
{
    uint64_t fh = 0;

    pthread_mutex_lock(&auth_lock);
    if (a->grant && !a->grant->ended) {
        a->grant->refs++;
        fh = a->grant->fh;
    }
    pthread_mutex_unlock(&auth_lock);
    return fh;
}

int auth_handle_check(uint64_t fh)
{
    struct grant *g;
    int rc;

    pthread_mutex_lock(&auth_lock);
    g = grant_find(fh);
    rc = g && !g->ended ? 0 : -EKEYREVOKED;
    pthread_mutex_unlock(&auth_lock);
    return rc;
}

void auth_handle_close(uint64_t fh)
{
    pthread_mutex_lock(&auth_lock);
    grant_drop(grant_find(fh));
    pthread_mutex_unlock(&auth_lock);
}

/* --- the agent's orders --- */

void auth_end_grant(uint64_t epoch, uint64_t number)
{
    struct grant *g;

    pthread_mutex_lock(&auth_lock);
    g = grant_find(number);
    if (g && g->epoch == epoch) {
        g->ended = true;
        cache_purge(g);
    }
    pthread_mutex_unlock(&auth_lock);
}

void auth_end_all(void)
{
    pthread_mutex_lock(&auth_lock);
    for (size_t i = 0; i < GRANT_BUCKETS; i++) {
        for (struct grant *g = grants[i]; g; g = g->next)
            g->ended = true;
    }
    cache_purge(NULL);
    pthread_mutex_unlock(&auth_lock);
}

bool auth_any_live(void)
{
    bool live = false;

    pthread_mutex_lock(&auth_lock);
    for (size_t i = 0; i < GRANT_BUCKETS && !live; i++) {
        for (struct grant *g = grants[i]; g && !live; g = g->next)
            live = !g->ended;
    }
    pthread_mutex_unlock(&auth_lock);
    return live;
}

void auth_new_agent(uint64_t epoch)
{
    pthread_mutex_lock(&auth_lock);
    epoch_now = epoch;
    cache_purge(NULL);
    pthread_mutex_unlock(&auth_lock);
}
