/*
 * authorise.c - decides upon requests of coffer-fs (server_internal.h). Owns the parked requests.
 *
 * A parked request (struct pending) and its questions, one for each container-shaped id in the caller's cgroup paths:
 *
 *   WANTED --ask_broker--> ASKED --authorise_facts--> PARSING --answer_taken--> KNOWN | UNKNOWN
 *                                                   (not found) -----------------> UNKNOWN
 *   any failure, the deadline, the broker's end ------------------------------> the request is refused
 *   all KNOWN or UNKNOWN --> conclude --> decide --> answer
 *   CHAINED: an identical request is being asked about already; begins anew when that one is concluded.
 *
 * 1. Every path out of here that allows goes through decide() or engine_request(), and every release or refusal is in
 *    the audit log before it is answered; if it cannot be written the answer is a refusal.
 * 2. What the engine does not say in time is a refusal, never a guess.
 * 3. A caller that is no longer alive when the decision falls gets nothing, no grant is made for it.
 * 4. AGENT_WHY takes the same path as a request and changes nothing.
 */
#include "keystore/server_internal.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define NS_PER_MS          1000000ll
#define RENEW_GRANTS_MAX   1024 /* of a volume: a server that was taken over may ask with any number */
#define PENDING_TIMEOUT_MS (AGENT_TIMEOUT_MS - 500) /* so that our refusal comes before the server gives up */

enum ask_state { ASK_WANTED, ASK_ASKED, ASK_PARSING, ASK_KNOWN, ASK_UNKNOWN };

struct ask {
    enum ask_state state;
    char id[FACTS_ID_SIZE];
    uint64_t question; /* the broker's message id while ASKED */
    int answer_fd;     /* the facts child's while PARSING */
    int64_t deadline_ns;
    struct facts *facts; /* when KNOWN */
};

enum pending_kind { PENDING_AUTH, PENDING_WHY, PENDING_AGAIN };

struct pending {
    struct pending *next;
    enum pending_kind kind;
    uint64_t conn_id, msg_id;
    char volume[AGENT_NAME_MAX];
    struct agent_auth auth; /* PENDING_WHY: tid and flags only */
    struct attest *caller;  /* NULL for PENDING_AGAIN */
    uint64_t grant;         /* PENDING_AGAIN: which. PENDING_AUTH: the number that it shall have; 0: any */
    int64_t deadline_ns;
    bool chained;
    bool host_ns;          /* the engine's side says: pid and mount namespace are the host's */
    const char *refused;   /* static: why it cannot be allowed whatever the rules say */
    struct facts_job *job; /* but for its container */
    unsigned nasks;
    struct ask asks[ATTEST_IDS];
};

/* What a decision came to. */
struct outcome {
    bool allowed;
    bool read_only;
    int err;        /* when refused: -EACCES, -ENOKEY */
    int container;  /* index of the asks; -1: a local caller */
    bool by_cgroup; /* the volume's rules name units or cgroups */
    struct agent_volume volume;
    struct attest_identity identity; /* when allowed */
    char reason[AGENT_TEXT_MAX];
};

/* --- parked requests --- */

static void ask_clear(struct ask *k)
{
    close_quiet(k->answer_fd);
    free(k->facts);
    k->facts = NULL;
    k->answer_fd = -1;
}

static void pending_free(struct pending *p)
{
    if (!p)
        return;
    attest_free(p->caller);
    free(p->job);
    for (unsigned i = 0; i < p->nasks; i++)
        ask_clear(&p->asks[i]);
    free(p);
}

static struct pending *pending_new(enum pending_kind kind, uint64_t conn_id, uint64_t msg_id, const char *volume)
{
    struct pending *p = xcalloc(1, sizeof(*p));

    p->kind = kind;
    p->conn_id = conn_id;
    p->msg_id = msg_id;
    snprintf(p->volume, sizeof(p->volume), "%s", volume);
    p->deadline_ns = mono_ns() + PENDING_TIMEOUT_MS * NS_PER_MS;
    return p;
}

static void pending_add(struct server *s, struct pending *p)
{
    struct pending **end = &s->pending;

    while (*end)
        end = &(*end)->next;
    *end = p;
}

static void pending_unlink(struct server *s, struct pending *p)
{
    for (struct pending **q = &s->pending; *q; q = &(*q)->next) {
        if (*q != p)
            continue;
        *q = p->next;
        p->next = NULL;
        return;
    }
}

static void ask_add(struct pending *p, const char *id)
{
    struct ask *k = &p->asks[p->nasks++];

    k->answer_fd = -1;
    snprintf(k->id, sizeof(k->id), "%s", id);
}

/* Whether the engine has been asked about everything, or it does not matter any more. */
static bool pending_ripe(const struct pending *p)
{
    if (p->refused)
        return true;
    for (unsigned i = 0; i < p->nasks; i++)
        if (p->asks[i].state < ASK_KNOWN)
            return false;
    return true;
}

/* --- the audit record --- */

/* comm, names and the like are the caller's own words: escaped, and never the start of the text. caller, container and
 * facts may be NULL. */
static void describe(const struct attest *a, pid_t tid, const char *container, const struct facts *facts, char *out,
                     size_t size)
{
    char comm[64], name[128] = "";
    int n;

    if (!a) {
        snprintf(out, size, "tid %d", tid);
        return;
    }
    escape_text(a->comm, comm, sizeof(comm));
    n = snprintf(out, size, "tid %d of process %d (%s), uid %u", a->tid, a->tgid, comm, a->uid);
    if (!container || n < 0 || (size_t)n >= size)
        return;
    if (facts)
        escape_text(facts->name, name, sizeof(name));
    snprintf(out + n, size - (size_t)n, ", container %s (%.12s)", name, container);
}

/* A decision in the log. Returns 0 or -errno (logged): then nothing may be released. */
static int audit_decision(struct server *s, const char *event, const struct pending *p, const char *container,
                          const struct facts *facts, const char *reason)
{
    char who[400];
    int rc;

    describe(p->caller, p->auth.tid, container, facts, who, sizeof(who));
    rc = audit_append(s->audit, event, p->volume, who, reason);
    if (rc < 0)
        log_err("the audit log cannot be written: %s; requests are refused", strerror(-rc));
    return rc;
}

/* Whose refusals are counted together. */
static void subject_of(const struct attest *a, const char *container, char *out, size_t size)
{
    if (container || (a && a->nids))
        snprintf(out, size, "container %s", container ? container : a->ids[0]);
    else if (a)
        snprintf(out, size, "uid %u", a->uid);
    else
        snprintf(out, size, "unknown");
}

/* A refusal in the log, or counted where it is one of many alike: who is refused shall not be able to fill the log, nor
 * to keep the agent waiting for the disk. */
static void audit_refusal(struct server *s, const char *event, const struct pending *p, const char *container,
                          const struct facts *facts, const char *reason)
{
    struct flood_kind kind = {0};

    snprintf(kind.volume, sizeof(kind.volume), "%s", p->volume);
    snprintf(kind.event, sizeof(kind.event), "%s", event);
    snprintf(kind.reason, sizeof(kind.reason), "%s", reason);
    subject_of(p->caller, container, kind.subject, sizeof(kind.subject));
    if (flood_pass(s->flood, &kind, mono_ns()))
        audit_decision(s, event, p, container, facts, reason);
}

void authorise_audit_floods(struct server *s, bool all)
{
    struct flood_sum sum;
    char who[160];

    while (flood_take(s->flood, mono_ns(), all, &sum)) {
        snprintf(who, sizeof(who), "%u more of %s", sum.more, sum.kind.subject);
        if (audit_append(s->audit, sum.kind.event, sum.kind.volume, who, sum.kind.reason) < 0)
            log_err("the audit log cannot be written");
    }
}

void authorise_audit_end(struct server *s, const struct grant *g)
{
    char who[400] = "the engine";
    int rc;

    if (g->caller)
        describe(g->caller, g->caller->tid, g->container[0] ? g->container : NULL, g->facts, who, sizeof(who));
    rc = audit_append(s->audit, "end", g->volume, who, g->why_ended);
    if (rc < 0)
        log_err("the audit log cannot be written: %s", strerror(-rc));
}

/* --- the rules --- */

/* The volume's rules; returns their number. */
static unsigned load_rules(struct server *s, const char *volume, struct agent_rule *rules)
{
    unsigned n = 0;

    while (n < AGENT_RULES_MAX && keystore_rule_at(s->keystore, volume, n, &rules[n]) == 0)
        n++;
    return n;
}

/* The selectors of a rule that begin with prefix, one after the other: *pos walks. NULL at the end. */
static const char *next_selector(const char **pos, const char *prefix, size_t *ret_len)
{
    while (*pos && **pos) {
        const char *at = *pos;
        size_t n = strcspn(at, ",");

        *pos = at[n] ? at + n + 1 : at + n;
        if (n >= strlen(prefix) && !strncmp(at, prefix, strlen(prefix))) {
            *ret_len = n - strlen(prefix);
            return at + strlen(prefix);
        }
    }
    return NULL;
}

/* Adds the keys of a rule's label selectors. Rules that name too many are refused when they are given. */
static bool job_add_labels(struct facts_job *job, const char *rule)
{
    const char *pos = rule, *label;
    size_t n;

    while ((label = next_selector(&pos, "label:", &n))) {
        size_t len = MIN(strcspn(label, "="), n);
        uint32_t i = 0;

        while (i < job->nlabels && (strlen(job->labels[i]) != len || memcmp(job->labels[i], label, len)))
            i++;
        if (i < job->nlabels)
            continue;
        if (job->nlabels == FACTS_LABELS_MAX || len >= FACTS_TEXT_SIZE)
            return false;
        memcpy(job->labels[job->nlabels++], label, len);
    }
    return true;
}

static bool rules_by_cgroup(const struct agent_rule *rules, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        const char *a = rules[i].rule, *b = rules[i].rule;
        size_t len;

        if (next_selector(&a, "unit:", &len) || next_selector(&b, "cgroup:", &len))
            return true;
    }
    return false;
}

/* What the facts child is to look for: everything but the container and the source. */
static struct facts_job *new_job(struct server *s, const char *volume)
{
    struct agent_rule *rules = xcalloc(AGENT_RULES_MAX, sizeof(*rules));
    struct facts_job *job = xcalloc(1, sizeof(*job));
    unsigned n = load_rules(s, volume, rules);

    snprintf(job->volume, sizeof(job->volume), "%s", volume);
    snprintf(job->driver, sizeof(job->driver), "%s", s->driver);
    for (unsigned i = 0; i < n; i++)
        job_add_labels(job, rules[i].rule);
    free(rules);
    return job;
}

/* The rules' word on a caller (facts NULL: in no container) into *o. */
static void ask_policy(struct server *s, const struct agent_volume *volume, const struct attest *a,
                       const struct facts *facts, const struct facts_job *job, struct outcome *o)
{
    struct agent_rule *rules = xcalloc(AGENT_RULES_MAX, sizeof(*rules));
    unsigned n = load_rules(s, volume->name, rules);
    struct policy_caller c = {.container = facts != NULL,
                              .container_shaped_cgroup = a->shaped,
                              .own_pid_ns = a->own_pid_ns,
                              .uid = a->uid,
                              .ncgroups = a->ncgroups};
    struct policy_verdict v;

    for (unsigned i = 0; i < a->ncgroups; i++) {
        c.hierarchies[i] = a->cgroups[i].hierarchy;
        c.cgroups[i] = a->cgroups[i].path;
    }
    if (facts) {
        c.attached = facts->attached;
        c.name = facts->name;
        c.image = facts->image;
        c.image_id = facts->image_id;
    }
    for (uint32_t i = 0; facts && i < job->nlabels; i++) {
        if (!facts->present[i])
            continue;
        c.label_keys[c.nlabels] = job->labels[i];
        c.label_values[c.nlabels++] = facts->values[i];
    }
    policy_decide(rules, n, volume->attached, &c, &v);
    o->allowed = v.allow;
    o->read_only = v.read_only;
    o->by_cgroup = rules_by_cgroup(rules, n);
    snprintf(o->reason, sizeof(o->reason), "%s", v.reason);
    free(rules);
}

bool authorise_labels_fit(struct server *s, const char *volume, const char *rule)
{
    struct facts_job *job = new_job(s, volume);
    bool fit = job_add_labels(job, rule);

    free(job);
    return fit;
}

/* --- decisions --- */

static void refuse(struct outcome *o, int err, const char *reason)
{
    o->allowed = false;
    o->err = err;
    snprintf(o->reason, sizeof(o->reason), "%s", reason);
}

/* Which of the asks is the caller's container. Returns whether nothing speaks against it so far. */
static bool find_container(const struct pending *p, struct outcome *o)
{
    bool known[ATTEST_IDS] = {false};
    const char *reason = NULL;

    for (unsigned i = 0; i < p->nasks; i++)
        known[i] = p->asks[i].state == ASK_KNOWN;
    if (attest_container(p->caller, known, &o->container, &reason) < 0) {
        o->container = -1;
        refuse(o, -EACCES, reason);
        return false;
    }
    if (o->container >= 0 && p->host_ns) {
        refuse(o, -EACCES, "the caller is in the container's cgroup, but its pid and mount namespaces are the host's");
        return false;
    }
    return true;
}

/* What the grant will be of: the container's cgroups, the caller's own, or nothing that ends. */
static bool find_identity(struct server *s, const struct pending *p, struct outcome *o)
{
    const char *container = o->container >= 0 ? p->asks[o->container].id : NULL;

    if (o->container < 0 && !o->by_cgroup)
        return true;
    if (attest_identify(s->mounts, p->caller, container, &o->identity) == 0)
        return true;
    refuse(o, -EACCES, "the caller's cgroup cannot be found below /sys/fs/cgroup");
    return false;
}

/*
 * The decision. Changes nothing; *o->identity is the caller's to free when allowed. Order: what makes a decision
 * impossible, who it is, the rules, and at last that the caller still lives (attest.h).
 */
static void decide(struct server *s, const struct pending *p, struct outcome *o)
{
    *o = (struct outcome){.err = -EACCES, .container = -1};
    if (!keystore_unlocked(s->keystore)) {
        refuse(o, -ENOKEY, "the keystore is locked: coffer unlock");
        return;
    }
    if (keystore_volume_get(s->keystore, p->volume, &o->volume) < 0) {
        refuse(o, -EACCES, "there is no such volume");
        return;
    }
    if (p->refused) {
        refuse(o, -EACCES, p->refused);
        return;
    }
    if (!find_container(p, o))
        return;
    ask_policy(s, &o->volume, p->caller, o->container >= 0 ? p->asks[o->container].facts : NULL, p->job, o);
    if (o->allowed && (p->auth.flags & AGENT_AUTH_WRITE) && o->read_only)
        refuse(o, -EACCES, "the rule that allows it is read-only (ro)");
    if (o->allowed && !find_identity(s, p, o))
        return;
    if (o->allowed && !attest_alive(p->caller)) {
        attest_identity_free(&o->identity);
        refuse(o, -EACCES, "the calling process is gone");
    }
}

/* --- answers --- */

static const char *container_id(const struct pending *p, int i)
{
    return i >= 0 ? p->asks[i].id : NULL;
}

/* NULL also where a live grant has answered for the engine. */
static const struct facts *container_facts(const struct pending *p, int i)
{
    return i >= 0 ? p->asks[i].facts : NULL;
}

/* Sends and wipes; grant may be NULL. caller's pidfd goes along where the answer may be kept for it. */
static void send_verdict(struct conn *c, uint64_t id, struct agent_verdict *v, const struct attest *caller)
{
    bool cacheable = v->err == 0 && v->kind == AGENT_ALLOW && v->grant && caller && caller->thread_pidfd;

    v->cacheable = cacheable;
    server_send(c, AGENT_FS_AUTH, id, v, sizeof(*v), cacheable ? &caller->pidfd : NULL, cacheable);
    sodium_memzero(v, sizeof(*v));
}

static void send_refusal(struct conn *c, uint64_t id, int err)
{
    struct agent_verdict v = {.err = err, .kind = AGENT_DENY};

    send_verdict(c, id, &v, NULL);
}

/* Puts the key into the verdict where it was asked for and can be had. */
static void add_key(struct server *s, const char *volume, uint32_t flags, struct agent_verdict *v)
{
    struct key *key = NULL;

    if (!(flags & AGENT_AUTH_WANT_KEY))
        return;
    if (keystore_volume_key(s->keystore, volume, &key) == 0) {
        memcpy(v->key, key->b, sizeof(v->key));
        v->has_key = 1;
    }
    if (v->has_key) {
        bool accept;

        seen_get(s->seen, v->params.id, &v->seen, &accept);
        v->accept_rollback = accept;
    }
    key_free(&key);
}

static struct grant *live_grant(struct server *s, const struct pending *p, const struct outcome *o)
{
    if (o->container >= 0)
        return grants_container(s->grants, p->volume, p->asks[o->container].id, &o->identity);
    return grants_local(s->grants, p->volume, p->caller->uid, &o->identity);
}

/* A new grant out of what was decided; takes the caller, the facts and the identity out of p and o. */
static struct grant *grant_take(struct server *s, struct pending *p, struct outcome *o)
{
    struct grant *g = xcalloc(1, sizeof(*g));

    g->kind = o->container >= 0 ? GRANT_CONTAINER : GRANT_LOCAL;
    g->read_only = o->read_only;
    memcpy(g->volume, p->volume, sizeof(g->volume));
    g->identity = o->identity;
    o->identity.n = 0;
    if (o->container >= 0) {
        struct ask *k = &p->asks[o->container];

        memcpy(g->container, k->id, sizeof(g->container));
        g->facts = k->facts;
        k->facts = NULL;
        g->job = p->job;
        p->job = NULL;
    }
    g->caller = p->caller;
    p->caller = NULL;
    g->id = p->grant;
    return grants_add_take(s->grants, g);
}

/* The first container or local user on a fresh volume: from now on the engine may fill nothing, nor read what they
 * write. */
static int mark_used(struct server *s, const struct outcome *o)
{
    int rc;

    if (o->volume.state != AGENT_VOLUME_FRESH)
        return 0;
    rc = keystore_volume_set_state(s->keystore, o->volume.name, AGENT_VOLUME_USED);
    if (rc == 0)
        grants_end(s->grants, o->volume.name, GRANT_ENGINE, "the volume is in use");
    return rc;
}

static void answer_allowed(struct server *s, struct conn *c, struct pending *p, struct outcome *o)
{
    struct agent_verdict v = {
        .kind = AGENT_ALLOW, .read_only = o->read_only, .params = o->volume.params, .strict = o->volume.strict};
    struct grant *g = p->grant ? NULL : live_grant(s, p, o);
    struct attest alive = {.pidfd = -1};
    int rc = 0;

    add_key(s, p->volume, p->auth.flags, &v);
    /* A process of the host's pid namespace may be the host's root in the container's cgroup: each leaves a record. */
    if (!g || v.has_key || (o->container >= 0 && p->caller->own_pid_ns))
        rc = audit_decision(s, p->grant ? "renew" : "release", p, container_id(p, o->container),
                            g ? g->facts : container_facts(p, o->container), o->reason);
    if (rc == 0)
        rc = mark_used(s, o);
    if (rc < 0) {
        sodium_memzero(&v, sizeof(v));
        send_refusal(c, p->msg_id, -EACCES);
        return;
    }
    /* The grant takes the caller and closes its pidfd, of which this answer needs one. The server keeps the answer for
     * the thread as FUSE's user, the effective one: where a rule named the real one and they differ, for nobody. */
    alive.thread_pidfd = p->caller->thread_pidfd && (o->container >= 0 || p->caller->one_uid);
    alive.pidfd = p->caller->pidfd;
    if (!g) {
        p->caller->pidfd = -1;
        g = grant_take(s, p, o);
    } else {
        p->caller->pidfd = -1;
        g->read_only = o->read_only;
    }
    v.grant = g->id;
    server_end_grants(s);
    send_verdict(c, p->msg_id, &v, &alive);
    close_quiet(alive.pidfd);
}

static void answer_auth(struct server *s, struct pending *p, struct outcome *o)
{
    struct conn *c = server_conn(s, p->conn_id);

    if (c && o->allowed) {
        answer_allowed(s, c, p, o);
    } else if (c) {
        /* A refusal of a stat of the root is what every container start brings: not news. */
        if (!(p->auth.flags & AGENT_AUTH_PROBE))
            audit_refusal(s, "refuse", p, container_id(p, o->container), container_facts(p, o->container), o->reason);
        send_refusal(c, p->msg_id, o->err);
    }
}

static void answer_why(struct server *s, struct pending *p, const struct outcome *o)
{
    struct conn *c = server_conn(s, p->conn_id);
    char who[400];

    if (!c)
        return;
    describe(p->caller, p->auth.tid, container_id(p, o->container), container_facts(p, o->container), who, sizeof(who));
    server_reply(c, p->msg_id, o->allowed ? 0 : o->err, "%s%s: %s: %s", o->allowed ? "allowed" : "refused",
                 o->allowed && o->read_only ? " read-only" : "", who, o->reason);
}

/* --- rules have changed --- */

static void ask_broker(struct server *s);

static struct grant *grant_by_id(struct server *s, uint64_t id)
{
    for (struct grant *g = grants_first(s->grants); g; g = g->next)
        if (g->id == id && !g->ended)
            return g;
    return NULL;
}

/* Decides on a live grant by the rules of now. Whom it lets do less than before begins anew, too. */
static void decide_again(struct server *s, struct grant *g)
{
    struct outcome o = {.err = -EACCES, .container = g->kind == GRANT_CONTAINER ? 0 : -1};

    if (keystore_volume_get(s->keystore, g->volume, &o.volume) < 0) {
        grant_end(g, "the volume is gone");
        return;
    }
    ask_policy(s, &o.volume, g->caller, g->facts, g->job, &o);
    if (!o.allowed)
        grant_end(g, "no rule allows it any more");
    else if (o.read_only && !g->read_only)
        grant_end(g, "the rules have become read-only");
    else if (g->kind == GRANT_LOCAL && o.by_cgroup && !g->identity.n)
        grant_end(g, "the rules now go by cgroup");
    else
        g->read_only = o.read_only;
}

/* The engine has said anew what a granted container is (a rule names a label that was not asked for before). */
static void conclude_again(struct server *s, struct pending *p)
{
    struct grant *g = grant_by_id(s, p->grant);

    if (!g)
        return;
    if (p->refused || p->asks[0].state != ASK_KNOWN) {
        grant_end(g, "the rules have changed and the engine could not be asked");
        return;
    }
    free(g->facts);
    free(g->job);
    g->facts = p->asks[0].facts;
    p->asks[0].facts = NULL;
    g->job = p->job;
    p->job = NULL;
    decide_again(s, g);
}

static bool labels_covered(const struct facts_job *want, const struct facts_job *have)
{
    for (uint32_t i = 0; i < want->nlabels; i++) {
        bool found = false;

        for (uint32_t j = 0; j < have->nlabels && !found; j++)
            found = !strcmp(want->labels[i], have->labels[j]);
        if (!found)
            return false;
    }
    return true;
}

void authorise_again(struct server *s, const char *volume)
{
    for (struct grant *g = grants_first(s->grants); g; g = g->next) {
        struct facts_job *job = NULL;
        struct pending *p;

        if (g->ended || g->kind == GRANT_ENGINE || strcmp(g->volume, volume))
            continue;
        job = new_job(s, volume);
        if (g->kind == GRANT_LOCAL || labels_covered(job, g->job)) {
            free(job);
            decide_again(s, g);
            continue;
        }
        p = pending_new(PENDING_AGAIN, 0, 0, volume);
        p->grant = g->id;
        p->job = job;
        p->auth.tid = g->caller->tid;
        ask_add(p, g->container);
        pending_add(s, p);
    }
    ask_broker(s);
}

/* --- asking the engine --- */

static struct conn *broker(struct server *s)
{
    for (struct conn *c = s->conns; c; c = c->next)
        if (!c->dead && c->kind == CONN_BROKER)
            return c;
    return NULL;
}

static void ask_one(struct server *s, struct conn *c, struct pending *p, struct ask *k)
{
    struct agent_facts_ask q = {.tid = p->auth.tid};

    memcpy(q.container, k->id, sizeof(q.container));
    k->question = s->next_id++;
    k->state = ASK_ASKED;
    server_send(c, AGENT_FACTS, k->question, &q, sizeof(q), NULL, 0);
}

/* Asks what is to be asked, SERVER_ASKS_MAX at a time. */
static void ask_broker(struct server *s)
{
    unsigned busy = 0;

    for (struct pending *p = s->pending; p; p = p->next)
        for (unsigned i = 0; i < p->nasks; i++)
            busy += p->asks[i].state == ASK_ASKED || p->asks[i].state == ASK_PARSING;
    for (struct pending *p = s->pending; p; p = p->next) {
        for (unsigned i = 0; i < p->nasks && !p->chained && !p->refused; i++) {
            struct conn *c = broker(s);

            if (p->asks[i].state != ASK_WANTED)
                continue;
            if (!c)
                p->refused = "the engine could not be asked: cofferd is not connected";
            else if (busy < SERVER_ASKS_MAX && ++busy)
                ask_one(s, c, p, &p->asks[i]);
        }
    }
}

static struct ask *ask_by_question(struct server *s, uint64_t question, struct pending **ret)
{
    for (struct pending *p = s->pending; p; p = p->next)
        for (unsigned i = 0; i < p->nasks; i++)
            if (p->asks[i].state == ASK_ASKED && p->asks[i].question == question) {
                *ret = p;
                return &p->asks[i];
            }
    return NULL;
}

void authorise_facts(struct server *s, uint64_t id, const struct agent_facts *facts, int *fd)
{
    struct pending *p = NULL;
    struct ask *k = ask_by_question(s, id, &p);
    struct facts_job job;
    int rc;

    if (!k)
        return; /* given up on */
    p->host_ns |= facts->host_pid_ns && facts->host_mnt_ns;
    if (facts->err == -ENOENT) {
        k->state = ASK_UNKNOWN;
        return;
    }
    if (facts->err < 0 || *fd < 0) {
        p->refused = facts->err == -ETIMEDOUT ? "the engine did not answer in time" : "the engine could not be asked";
        return;
    }
    job = *p->job;
    job.source = facts->source;
    memcpy(job.container, k->id, sizeof(job.container));
    rc = facts_ask(s->helper_fd, &job, *fd, &k->answer_fd);
    if (rc < 0) {
        log_err("what the engine says cannot be given to the process that reads it: %s", strerror(-rc));
        p->refused = "what the engine says cannot be read: restart coffer-keyd";
        return;
    }
    k->state = ASK_PARSING;
    k->deadline_ns = mono_ns() + FACTS_TIMEOUT_MS * NS_PER_MS;
}

/* The facts child has answered, or ended. */
static void answer_taken(struct pending *p, struct ask *k)
{
    struct facts_job job = *p->job;
    int rc;

    memcpy(job.container, k->id, sizeof(job.container));
    k->facts = xcalloc(1, sizeof(*k->facts));
    rc = facts_take(k->answer_fd, &job, k->facts);
    close_quiet(k->answer_fd);
    k->answer_fd = -1;
    if (rc == 0) {
        k->state = ASK_KNOWN;
        return;
    }
    free(k->facts);
    k->facts = NULL;
    p->refused = "what the engine says of the container is not understood";
}

int authorise_poll(struct server *s, struct pollfd *pfd, int max)
{
    int n = 0;

    for (struct pending *p = s->pending; p; p = p->next)
        for (unsigned i = 0; i < p->nasks && n < max; i++)
            if (p->asks[i].state == ASK_PARSING)
                pfd[n++] = (struct pollfd){.fd = p->asks[i].answer_fd, .events = POLLIN};
    return n;
}

static void take_answers(struct server *s, const struct pollfd *pfd, int n)
{
    for (struct pending *p = s->pending; p; p = p->next)
        for (unsigned i = 0; i < p->nasks; i++)
            for (int j = 0; j < n; j++)
                if (p->asks[i].state == ASK_PARSING && p->asks[i].answer_fd == pfd[j].fd && pfd[j].revents)
                    answer_taken(p, &p->asks[i]);
}

static void check_deadlines(struct server *s)
{
    int64_t now = mono_ns();

    for (struct pending *p = s->pending; p; p = p->next) {
        if (now >= p->deadline_ns && !p->refused)
            p->refused = "the engine did not answer in time";
        for (unsigned i = 0; i < p->nasks && !p->refused; i++)
            if (p->asks[i].state == ASK_PARSING && now >= p->asks[i].deadline_ns)
                p->refused = "what the engine says could not be read in time";
    }
}

int64_t authorise_deadline(const struct server *s)
{
    int64_t first = flood_deadline(s->flood);

    for (const struct pending *p = s->pending; p; p = p->next) {
        first = MIN(first, pending_ripe(p) ? 0 : p->deadline_ns);
        for (unsigned i = 0; i < p->nasks; i++)
            if (p->asks[i].state == ASK_PARSING)
                first = MIN(first, p->asks[i].deadline_ns);
    }
    return first;
}

void authorise_ask_anew(struct server *s)
{
    for (struct pending *p = s->pending; p; p = p->next)
        for (unsigned i = 0; i < p->nasks; i++)
            if (p->asks[i].state == ASK_ASKED)
                p->asks[i].state = ASK_WANTED;
}

void authorise_refuse_all(struct server *s, const char *why)
{
    for (struct pending *p = s->pending; p; p = p->next)
        if (!p->refused)
            p->refused = why;
}

void authorise_drop(struct server *s, uint64_t conn_id)
{
    for (struct pending **q = &s->pending; *q;) {
        struct pending *p = *q;

        if (p->conn_id != conn_id) {
            q = &p->next;
            continue;
        }
        *q = p->next;
        pending_free(p);
    }
}

/* --- a request's way --- */

/*
 * A live grant of the caller's container answers without the engine: the caller's one container-shaped component names
 * it, and its directories are the same inodes. A caller in the host's pid namespace is asked about every time
 * (host_ns).
 */
static bool answer_by_grant(struct server *s, struct pending *p)
{
    const struct attest *a = p->caller;
    struct outcome o = {.err = -EACCES};
    const bool known[ATTEST_IDS] = {true};
    const char *reason;
    struct grant *g = NULL;

    if (p->kind != PENDING_AUTH || a->nids != 1 || a->own_pid_ns || !keystore_unlocked(s->keystore))
        return false;
    if (attest_container(a, known, &o.container, &reason) < 0 || o.container != 0 ||
        attest_identify(s->mounts, a, a->ids[0], &o.identity) < 0)
        return false;
    g = grants_container(s->grants, p->volume, a->ids[0], &o.identity);
    if (g && keystore_volume_get(s->keystore, p->volume, &o.volume) == 0 && attest_alive(a)) {
        o.allowed = true;
        o.read_only = g->read_only;
        snprintf(o.reason, sizeof(o.reason), "a live grant");
        if (o.read_only && (p->auth.flags & AGENT_AUTH_WRITE))
            refuse(&o, -EACCES, "the rule that allows it is read-only (ro)");
        answer_auth(s, p, &o);
    } else {
        g = NULL;
    }
    attest_identity_free(&o.identity);
    return g != NULL;
}

/* An earlier request that asks the same about the same container, so that this one may wait for what it comes to. */
static bool same_question(const struct server *s, const struct pending *p)
{
    for (const struct pending *q = s->pending; q; q = q->next)
        if (q != p && q->kind == PENDING_AUTH && !q->chained && !q->grant && q->nasks == 1 && !q->refused &&
            !strcmp(q->volume, p->volume) && !strcmp(q->asks[0].id, p->asks[0].id))
            return true;
    return false;
}

static void conclude(struct server *s, struct pending *p)
{
    struct outcome o;

    if (p->kind == PENDING_AGAIN) {
        conclude_again(s, p);
        return;
    }
    decide(s, p, &o);
    if (p->kind == PENDING_AUTH)
        answer_auth(s, p, &o);
    else
        answer_why(s, p, &o);
    attest_identity_free(&o.identity);
}

/* Takes p: answers at once, or leaves it in the list. */
static void begin_take(struct server *s, struct pending *p)
{
    pending_unlink(s, p);
    p->chained = false;
    if (!p->refused && p->nasks && !p->grant && answer_by_grant(s, p)) {
        pending_free(p);
        return;
    }
    if (p->nasks && !p->refused) {
        p->chained =
            p->kind == PENDING_AUTH && !p->grant && p->nasks == 1 && !p->caller->own_pid_ns && same_question(s, p);
        pending_add(s, p);
        return;
    }
    conclude(s, p);
    pending_free(p);
}

static struct pending *next_ripe(struct server *s)
{
    for (struct pending *p = s->pending; p; p = p->next)
        if (pending_ripe(p))
            return p;
    return NULL;
}

static struct pending *next_unchained(struct server *s)
{
    for (struct pending *p = s->pending; p; p = p->next)
        if (p->chained && !same_question(s, p))
            return p;
    return NULL;
}

void authorise_step(struct server *s, const struct pollfd *pfd, int n)
{
    struct pending *p;

    take_answers(s, pfd, n);
    check_deadlines(s);
    authorise_audit_floods(s, false);
    ask_broker(s);
    while ((p = next_ripe(s))) {
        pending_unlink(s, p);
        conclude(s, p);
        pending_free(p);
    }
    while ((p = next_unchained(s)))
        begin_take(s, p);
    ask_broker(s);
}

/* --- the engine --- */

/* The engine's process behind a thread, if it is one that has the volume mounted or had. */
static struct window *window_of(struct server *s, const char *volume, pid_t tid)
{
    struct attest *a = NULL;
    struct window *found = NULL;
    const char *reason;
    bool any = false;

    for (struct window *w = s->windows; w; w = w->next)
        any |= !strcmp(w->volume, volume) && attest_pidfd_alive(w->pidfd);
    if (!any || attest_process(tid, &a, &reason) < 0)
        return NULL;
    for (struct window *w = s->windows; w; w = w->next)
        if (!strcmp(w->volume, volume) && w->tgid == a->tgid && attest_pidfd_alive(w->pidfd) && (!found || w->open))
            found = w;
    attest_free(a);
    return found;
}

static struct grant *engine_grant(struct server *s, const struct window *w)
{
    struct grant *g = grants_engine(s->grants, w->volume, w->tgid);

    if (g)
        return g;
    g = xcalloc(1, sizeof(*g));
    g->kind = GRANT_ENGINE;
    g->engine = w->tgid;
    memcpy(g->volume, w->volume, sizeof(g->volume));
    return grants_add_take(s->grants, g);
}

/* The engine itself: fills a fresh volume between its Mount and Unmount, otherwise sees the placeholder. */
static void engine_request(struct server *s, struct conn *c, struct pending *p, const struct window *w)
{
    struct agent_verdict v = {.kind = AGENT_PLACEHOLDER};
    struct agent_volume volume;

    if (!keystore_unlocked(s->keystore)) {
        audit_refusal(s, "refuse", p, NULL, NULL, "the keystore is locked: coffer unlock");
        send_refusal(c, p->msg_id, -ENOKEY);
        return;
    }
    if (keystore_volume_get(s->keystore, p->volume, &volume) < 0 ||
        attest_caller(p->auth.tid, &p->caller, &p->refused) < 0 || p->caller->tgid != w->tgid) {
        send_refusal(c, p->msg_id, -EACCES);
        return;
    }
    v.params = volume.params;
    v.strict = volume.strict;
    if (!w->open || volume.state != AGENT_VOLUME_FRESH) {
        if (!(p->auth.flags & AGENT_AUTH_PROBE))
            audit_refusal(s, "placeholder", p, NULL, NULL, "the engine itself sees nothing of a volume that is in use");
        send_verdict(c, p->msg_id, &v, NULL);
        return;
    }
    add_key(s, p->volume, p->auth.flags, &v);
    if ((v.has_key || !grants_engine(s->grants, w->volume, w->tgid)) &&
        audit_decision(s, "fill", p, NULL, NULL, "the engine fills a fresh volume") < 0) {
        sodium_memzero(&v, sizeof(v));
        send_refusal(c, p->msg_id, -EACCES);
        return;
    }
    v.kind = AGENT_ALLOW;
    v.grant = engine_grant(s, w)->id;
    send_verdict(c, p->msg_id, &v, p->caller);
}

/* --- entries --- */

/* FORMAT and CHECK: the operator's word, once for a channel. */
static void maintenance_request(struct server *s, struct conn *c, struct pending *p)
{
    struct agent_verdict v = {.kind = AGENT_ALLOW};
    struct agent_volume volume;
    int err = -EACCES;

    if (!(p->auth.flags & AGENT_AUTH_MAINTENANCE) || p->auth.tid || c->key_given)
        goto refused;
    if (!keystore_unlocked(s->keystore))
        err = -ENOKEY;
    if (err == -ENOKEY || keystore_volume_get(s->keystore, p->volume, &volume) < 0)
        goto refused;
    v.params = volume.params;
    v.strict = volume.strict;
    add_key(s, p->volume, p->auth.flags, &v);
    if (audit_decision(s, "release", p, NULL, NULL,
                       c->purpose == AGENT_PURPOSE_FORMAT ? "the operator formats the volume"
                                                          : "the operator checks the volume") < 0) {
        sodium_memzero(&v, sizeof(v));
        goto refused;
    }
    c->key_given = v.has_key;
    send_verdict(c, p->msg_id, &v, NULL);
    return;
refused:
    audit_refusal(s, "refuse", p, NULL, NULL,
                  err == -ENOKEY ? "the keystore is locked: coffer unlock" : "not what this channel is for");
    send_refusal(c, p->msg_id, err);
}

/* A server that follows one that died: it gets what its mount's live grants entitle it to. */
static void resume_request(struct server *s, struct conn *c, struct pending *p)
{
    struct agent_verdict v = {.kind = AGENT_ALLOW};
    struct agent_volume volume;

    bool locked = !keystore_unlocked(s->keystore);

    if (p->auth.tid || p->auth.flags != (AGENT_AUTH_RESUME | AGENT_AUTH_WANT_KEY) || locked ||
        !grants_count(s->grants, p->volume) || keystore_volume_get(s->keystore, p->volume, &volume) < 0) {
        send_refusal(c, p->msg_id, locked ? -ENOKEY : -EACCES); /* no news: the next caller is decided upon */
        return;
    }
    v.params = volume.params;
    v.strict = volume.strict;
    add_key(s, p->volume, p->auth.flags, &v);
    if (audit_decision(s, "release", p, NULL, NULL, "a new server follows one that died, and grants are live") < 0) {
        sodium_memzero(&v, sizeof(v));
        send_refusal(c, p->msg_id, -EACCES);
        return;
    }
    for (const struct grant *g = grants_first(s->grants); g; g = g->next) {
        struct agent_grant live = {.grant = g->id};

        if (!g->ended && !strcmp(g->volume, p->volume))
            server_send(c, AGENT_FS_GRANT, 0, &live, sizeof(live), NULL, 0);
    }
    send_verdict(c, p->msg_id, &v, NULL);
}

/* How many wait, of one connection (0: of all). */
static unsigned pending_count(const struct server *s, uint64_t conn_id)
{
    unsigned n = 0;

    for (const struct pending *p = s->pending; p; p = p->next)
        n += !conn_id || p->conn_id == conn_id;
    return n;
}

/* Is the thread still the one whose pidfd had that inode number? */
static bool same_thread(const struct attest *a, uint64_t pidfd_ino)
{
    struct stat st;

    return a->thread_pidfd && fstat(a->pidfd, &st) == 0 && (uint64_t)st.st_ino == pidfd_ino;
}

/* Identifies the caller and begins; takes p. pidfd_ino: that of a renewal. */
static void identify_take(struct server *s, struct conn *c, struct pending *p, uint64_t pidfd_ino)
{
    if (keystore_unlocked(s->keystore) && attest_caller(p->auth.tid, &p->caller, &p->refused) == 0) {
        if (p->grant && !same_thread(p->caller, pidfd_ino))
            p->refused = "the thread that had the grant is gone";
        p->job = new_job(s, p->volume);
        for (unsigned i = 0; i < p->caller->nids; i++)
            ask_add(p, p->caller->ids[i]);
    }
    if (!p->refused && p->nasks &&
        (pending_count(s, 0) >= SERVER_PENDING_MAX || pending_count(s, c->id) >= SERVER_PENDING_CHANNEL))
        p->refused = "too many requests wait for the engine";
    begin_take(s, p);
    ask_broker(s);
}

void authorise_request(struct server *s, struct conn *c, uint64_t id, const struct agent_auth *auth)
{
    struct pending *p = pending_new(PENDING_AUTH, c->id, id, c->volume);
    struct window *w;

    p->auth = *auth;
    if (c->purpose != AGENT_PURPOSE_SERVE) {
        maintenance_request(s, c, p);
    } else if (auth->flags & AGENT_AUTH_RESUME) {
        resume_request(s, c, p);
    } else if (auth->tid <= 0 || (auth->flags & AGENT_AUTH_MAINTENANCE)) {
        if (!(auth->flags & AGENT_AUTH_PROBE))
            audit_refusal(s, "refuse", p, NULL, NULL, "a request without a calling process");
        send_refusal(c, id, -EACCES);
    } else if ((w = window_of(s, c->volume, auth->tid))) {
        engine_request(s, c, p, w);
    } else {
        identify_take(s, c, p, 0);
        return;
    }
    pending_free(p);
}

/*
 * Grants end with the agent that gave them, but handles that were opened under one are still used. A thread that had it is
 * decided upon as any caller is; what it gets is a grant of that number. A coffer-fs that was taken over gains nothing by
 * a number of its choice: it could have asked for the thread at any time.
 */
void authorise_renew(struct server *s, struct conn *c, uint64_t id, const struct agent_renew *q)
{
    struct pending *p = pending_new(PENDING_AUTH, c->id, id, c->volume);

    p->auth.tid = q->tid;
    p->auth.flags = q->write ? AGENT_AUTH_WRITE : 0;
    p->grant = q->grant;
    if (keystore_unlocked(s->keystore) && c->purpose == AGENT_PURPOSE_SERVE && q->tid > 0 &&
        !grant_by_id(s, q->grant) && grants_count(s->grants, c->volume) < RENEW_GRANTS_MAX &&
        !window_of(s, c->volume, q->tid)) {
        identify_take(s, c, p, q->pidfd_ino);
        return;
    }
    send_refusal(c, id, keystore_unlocked(s->keystore) ? -EACCES : -ENOKEY);
    pending_free(p);
}

void authorise_why(struct server *s, struct conn *c, uint64_t id, const struct agent_why *why)
{
    struct pending *p = pending_new(PENDING_WHY, c->id, id, why->name);

    p->auth.tid = why->pid;
    p->auth.flags = why->write ? AGENT_AUTH_WRITE : 0;
    identify_take(s, c, p, 0);
}
