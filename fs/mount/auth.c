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
 *  5. Each remembered verdict has its place in the page's witness[] (server.h), which ends with it: so who was given a grant
 *     is known to the next agent and the next server. Such a thread is decided upon anew; what an agent has ended, it has
 *     ended: its verdicts are forgotten at once.
 */
#include "mount.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>

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
    uint64_t epoch; /* of the agent's channel */
    struct grant *grant;
    bool read_only;
};

static pthread_mutex_t auth_lock = PTHREAD_MUTEX_INITIALIZER; /* all below, and every struct grant */
static struct grant *grants[GRANT_BUCKETS];
static struct cached cache[CACHE_SETS][CACHE_WAYS];
static uint64_t cache_clock;
static uint64_t epoch_now;
static uint64_t agent_now; /* the process, once its keystore is open */

_Static_assert(CACHE_SETS *CACHE_WAYS == SERVER_PAGE_WITNESSES, "a place for each");

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

/* grant 0: nobody. A server that dies between the stores leaves none. */
static void witness_set(const struct cached *c, const struct server_witness *w)
{
    struct server_witness *at = mount_page ? &mount_page->witness[c - &cache[0][0]] : NULL;

    if (!at)
        return;
    atomic_store((_Atomic uint64_t *)&at->grant, 0);
    at->agent = w->agent;
    at->pidfd_ino = w->pidfd_ino;
    at->tid = w->tid;
    at->write = w->write;
    atomic_store((_Atomic uint64_t *)&at->grant, w->grant);
}

/* All of a grant, or of all with 0: also those that a server of before has left. */
static void witness_forget(uint64_t grant)
{
    for (unsigned i = 0; mount_page && i < SERVER_PAGE_WITNESSES; i++) {
        if (!grant || mount_page->witness[i].grant == grant)
            atomic_store((_Atomic uint64_t *)&mount_page->witness[i].grant, 0);
    }
}

static void cached_drop(struct cached *c)
{
    if (c->tid == 0)
        return;
    witness_set(c, &(struct server_witness){0});
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
    g->epoch = MAX(g->epoch, epoch); /* that agent knows it */
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
        } else if (set[k].epoch == epoch_now && !(write && set[k].read_only)) {
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

/* The place of a set that is the least loss for tid: a free one, one where only a server of before has left a witness, or the
 * one that was used longest ago. */
static uint64_t place_rank(const struct cached *c, pid_t tid)
{
    const struct server_witness *w = mount_page ? &mount_page->witness[c - &cache[0][0]] : NULL;

    return c->tid ? c->used + 1 : w && w->grant && w->tid != tid;
}

void auth_remember(pid_t tid, uid_t uid, const struct auth *a, int pidfd_take)
{
    struct cached *set = cache[(unsigned)tid % CACHE_SETS], *place = &set[0];
    struct server_witness w = {.tid = tid, .write = !a->read_only};
    struct stat st;

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
        /* A thread that has ended is no witness any more. */
        if (set[k].tid && !thread_alive(set[k].pidfd))
            cached_drop(&set[k]);
        if (place_rank(&set[k], tid) < place_rank(place, tid))
            place = &set[k];
    }
    a->grant->refs++;
    cached_drop(place);
    *place = (struct cached){.tid = tid,
                             .uid = uid,
                             .pidfd = pidfd_take,
                             .used = ++cache_clock,
                             .epoch = epoch_now,
                             .grant = a->grant,
                             .read_only = a->read_only};
    if (fstat(pidfd_take, &st) == 0) {
        w.grant = a->grant->fh;
        w.agent = agent_now;
        w.pidfd_ino = st.st_ino;
        witness_set(place, &w);
    }
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

void auth_end_grant(uint64_t number)
{
    struct grant *g;

    pthread_mutex_lock(&auth_lock);
    g = grant_find(number);
    if (g) { /* of whichever channel: numbers do not repeat */
        g->ended = true;
        cache_purge(g);
    }
    witness_forget(number);
    pthread_mutex_unlock(&auth_lock);
}

void auth_stop(void)
{
    pthread_mutex_lock(&auth_lock);
    for (size_t i = 0; i < GRANT_BUCKETS; i++) {
        for (struct grant *g = grants[i]; g; g = g->next)
            g->ended = true;
    }
    pthread_mutex_unlock(&auth_lock);
}

void auth_end_all(void)
{
    auth_stop();
    pthread_mutex_lock(&auth_lock);
    cache_purge(NULL);
    witness_forget(0);
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
    pthread_mutex_unlock(&auth_lock);
}

void auth_agent_is(uint64_t agent)
{
    pthread_mutex_lock(&auth_lock);
    agent_now = agent;
    pthread_mutex_unlock(&auth_lock);
}

/* --- grants of an agent that has ended --- */

bool auth_next_lost(bool all, unsigned *at, struct agent_renew *ret)
{
    bool found = false;

    pthread_mutex_lock(&auth_lock);
    for (; mount_page && !found && *at < SERVER_PAGE_WITNESSES; ++*at) {
        const struct server_witness w = mount_page->witness[*at];
        const struct grant *g = grant_find(w.grant);

        if (!w.grant || w.grant == UINT64_MAX || w.tid <= 0 || w.agent == agent_now)
            continue;
        if (g ? g->ended || g->epoch == epoch_now : !all)
            continue;
        *ret = (struct agent_renew){.grant = w.grant, .pidfd_ino = w.pidfd_ino, .tid = w.tid, .write = w.write != 0};
        found = true;
    }
    pthread_mutex_unlock(&auth_lock);
    return found;
}

void auth_found(const struct agent_renew *q, bool found)
{
    pthread_mutex_lock(&auth_lock);
    for (unsigned i = 0; mount_page && i < SERVER_PAGE_WITNESSES; i++) {
        struct server_witness *w = &mount_page->witness[i];

        if (w->grant != q->grant)
            continue;
        if (found)
            w->agent = agent_now;
        else if (w->tid == q->tid)
            atomic_store((_Atomic uint64_t *)&w->grant, 0);
    }
    pthread_mutex_unlock(&auth_lock);
}
