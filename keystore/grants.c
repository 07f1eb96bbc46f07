/*
 * grants.c - see grants.h. Owns the list; used by the server's event loop only.
 *
 * 1. A grant that is marked ended is found by nobody any more; the loop takes it out, tells the volume's channels, and
 *    frees it, before it waits again.
 * 2. A grant holds no pidfd: whom it was first given to may be long gone.
 */
#include "keystore/grants.h"

#include "fs/base/base.h"

#include <sodium.h>
#include <stdlib.h>

struct grants {
    struct grant *first;
    int inotify_fd;
};

struct grants *grants_new(int inotify_fd)
{
    struct grants *gs = xcalloc(1, sizeof(*gs));

    gs->inotify_fd = inotify_fd;
    return gs;
}

void grant_free(struct grant *g)
{
    if (!g)
        return;
    attest_free(g->caller);
    free(g->job);
    free(g->facts);
    attest_identity_free(&g->identity);
    free(g);
}

void grants_free(struct grants *gs)
{
    if (!gs)
        return;
    while (gs->first) {
        struct grant *g = gs->first;

        gs->first = g->next;
        grant_free(g);
    }
    free(gs);
}

static bool id_taken(const struct grants *gs, uint64_t id)
{
    for (const struct grant *g = gs->first; g; g = g->next)
        if (g->id == id)
            return true;
    return id == 0;
}

struct grant *grants_add_take(struct grants *gs, struct grant *g)
{
    while (id_taken(gs, g->id))
        randombytes_buf(&g->id, sizeof(g->id));
    if (g->caller) {
        close_quiet(g->caller->pidfd);
        g->caller->pidfd = -1;
    }
    if (g->identity.n && gs->inotify_fd >= 0)
        attest_identity_watch(&g->identity, gs->inotify_fd);
    g->next = gs->first;
    gs->first = g;
    return g;
}

struct grant *grants_first(struct grants *gs)
{
    return gs->first;
}

unsigned grants_count(const struct grants *gs, const char *volume)
{
    unsigned n = 0;

    for (const struct grant *g = gs->first; g; g = g->next)
        n += !g->ended && (!volume || !strcmp(g->volume, volume));
    return n;
}

struct grant *grants_container(struct grants *gs, const char *volume, const char *container,
                               const struct attest_identity *identity)
{
    for (struct grant *g = gs->first; g; g = g->next)
        if (!g->ended && g->kind == GRANT_CONTAINER && !strcmp(g->volume, volume) && !strcmp(g->container, container) &&
            attest_identity_equal(&g->identity, identity))
            return g;
    return NULL;
}

struct grant *grants_local(struct grants *gs, const char *volume, uid_t uid, const struct attest_identity *identity)
{
    for (struct grant *g = gs->first; g; g = g->next)
        if (!g->ended && g->kind == GRANT_LOCAL && !strcmp(g->volume, volume) && g->caller->uid == uid &&
            attest_identity_equal(&g->identity, identity))
            return g;
    return NULL;
}

struct grant *grants_engine(struct grants *gs, const char *volume, pid_t tgid)
{
    for (struct grant *g = gs->first; g; g = g->next)
        if (!g->ended && g->kind == GRANT_ENGINE && !strcmp(g->volume, volume) && g->engine == tgid)
            return g;
    return NULL;
}

void grant_end(struct grant *g, const char *why)
{
    if (!g->ended)
        g->why_ended = why;
    g->ended = true;
}

void grants_end(struct grants *gs, const char *volume, int kind, const char *why)
{
    for (struct grant *g = gs->first; g; g = g->next)
        if ((!volume || !strcmp(g->volume, volume)) && (kind < 0 || g->kind == (enum grant_kind)kind))
            grant_end(g, why);
}

void grants_check(struct grants *gs)
{
    for (struct grant *g = gs->first; g; g = g->next)
        if (g->identity.n && !attest_identity_alive(&g->identity))
            grant_end(g, "its cgroup is gone");
}

struct grant *grants_take_ended(struct grants *gs)
{
    for (struct grant **p = &gs->first; *p; p = &(*p)->next) {
        struct grant *g = *p;

        if (!g->ended)
            continue;
        *p = g->next;
        g->next = NULL;
        return g;
    }
    return NULL;
}

bool grants_any_ended(const struct grants *gs)
{
    for (const struct grant *g = gs->first; g; g = g->next)
        if (g->ended)
            return true;
    return false;
}
