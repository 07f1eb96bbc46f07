/*
 * grants.h - the live grants: who may go on using which volume without being decided upon anew, and when that ends.
 *
 * A grant is of a container (id and the inodes of its cgroup directories), of a local caller (real uid; where the
 * volume's rules name units or cgroups, also its cgroups), or of the engine while it may fill a volume.
 */
#ifndef COFFER_KEYSTORE_GRANTS_H
#define COFFER_KEYSTORE_GRANTS_H

#include "keystore/attest.h"
#include "keystore/facts.h"

enum grant_kind { GRANT_LOCAL, GRANT_CONTAINER, GRANT_ENGINE };

struct grant {
    struct grant *next;
    uint64_t id; /* random, not 0 */
    enum grant_kind kind;
    bool read_only;
    bool ended; /* to be reported and freed by grants_sweep */
    const char *why_ended;
    int64_t unserved_ns; /* since when (mono_ns) the volume has no server, or 0; not of GRANT_CONTAINER */
    char volume[AGENT_NAME_MAX];
    char container[FACTS_ID_SIZE]; /* "" unless GRANT_CONTAINER */
    struct attest *caller;         /* the first that it was given to (its pidfd is closed); the grant's */
    struct facts_job *job;         /* what was asked of the engine, and what it said; NULL unless GRANT_CONTAINER */
    struct facts *facts;
    struct attest_identity identity; /* n 0: the grant does not end with a cgroup */
    pid_t engine;                    /* GRANT_ENGINE */
};

struct grants;

/* watch: an inotify descriptor, or -1. */
struct grants *grants_new(int inotify_fd);
void grants_free(struct grants *g);

/* Adds *g (what it points to becomes the grants'), gives it an id unless it has one that is free, and watches its end. */
struct grant *grants_add_take(struct grants *gs, struct grant *g);
struct grant *grants_first(struct grants *gs);
unsigned grants_count(const struct grants *gs, const char *volume); /* NULL: all volumes */

/* The live grant of this kind, or NULL. */
struct grant *grants_container(struct grants *gs, const char *volume, const char *container,
                               const struct attest_identity *identity);
struct grant *grants_local(struct grants *gs, const char *volume, uid_t uid, const struct attest_identity *identity);
struct grant *grants_engine(struct grants *gs, const char *volume, pid_t tgid);

/* Marks for the next sweep; why is static. */
void grant_end(struct grant *g, const char *why);
/* Ends all of a volume (NULL: all volumes) of one kind (-1: any). */
void grants_end(struct grants *gs, const char *volume, int kind, const char *why);
/* Ends those whose cgroup is gone. */
void grants_check(struct grants *gs);
/* Takes out one ended grant, the caller's now (grant_free); NULL when there is none. */
struct grant *grants_take_ended(struct grants *gs);
bool grants_any_ended(const struct grants *gs);
void grant_free(struct grant *g);

#endif
