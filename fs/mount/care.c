/*
 * care.c - looking after the volume: tasks that cofferd gives the server of a mounted one, and runs of coffer-fs for
 * one that is not mounted.
 *
 * A task may bring a channel to the agent: with it a volume that nobody has used yet is opened, and closed afterwards.
 *
 * A task uses the engine like any request (life_enter_any), but for minutes: so it looks whether the volume is being
 * locked, and gives way at once. The scrub enters anew for each of its small steps.
 */
#include "mount.h"

#include "coffer/export.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "fs/base/msg.h"

#define EXIT_DAMAGE    3
#define PROGRESS_NS    250000000
#define SCRUB_STEP_MS  250
#define SCRUB_RATE_MIN (64u << 10)

struct run {
    uint64_t id; /* 0: not a task */
    int64_t said;
    struct server_task task;
    int fds[MSG_FDS_MAX];
    int nfds;
    int agent;                  /* of a task: opens the volume; or -1 */
    struct export_secret *next; /* of an import, in locked memory */
};

static pthread_mutex_t care_lock = PTHREAD_MUTEX_INITIALIZER; /* what follows */
static bool task_busy, scrubbing;
static bool opened; /* by a task: the last one closes it */
static struct volume_scrub scrub_at;
static _Atomic uint64_t stopped; /* the id of a task that shall end, or 0 */

/* --- reports --- */

static void on_line(void *ctx, const char *text)
{
    control_send(SERVER_LINE, ((struct run *)ctx)->id, 0, text);
}

static void on_progress(void *ctx, uint64_t done, uint64_t total)
{
    struct run *r = ctx;

    if (done < total && mono_ns() - r->said < PROGRESS_NS)
        return;
    r->said = mono_ns();
    control_progress(r->id, done, total);
}

static bool on_stop(void *ctx)
{
    uint64_t id = ((struct run *)ctx)->id;

    return id && (id == stopped || !life_is_open());
}

static struct volume_report report_of(struct run *r)
{
    return (struct volume_report){on_line, on_progress, on_stop, r};
}

/* --- streams --- */

#define PIECE   4096 /* what a pipe that polls writable takes without waiting */
#define POLL_MS 100

/* Waits until fd is ready, or the task is to stop. */
static int wait_fd(struct run *r, int fd, short events)
{
    struct pollfd p = {.fd = fd, .events = events};

    for (;;) {
        if (on_stop(r))
            return -ECANCELED;
        if (poll(&p, 1, POLL_MS) > 0)
            return 0;
    }
}

static int write_stream(void *ctx, const void *buf, size_t n)
{
    struct run *r = ctx;

    while (n) {
        int rc = wait_fd(r, r->fds[1], POLLOUT);
        ssize_t k = rc < 0 ? rc : write(r->fds[1], buf, MIN(n, PIECE));

        if (rc < 0)
            return rc;
        if (k < 0 && errno != EINTR && errno != EAGAIN)
            return -errno;
        buf = (const uint8_t *)buf + MAX(k, 0);
        n -= (size_t)MAX(k, 0);
    }
    return 0;
}

static int read_stream(void *ctx, void *buf, size_t n)
{
    struct run *r = ctx;

    while (n) {
        int rc = wait_fd(r, r->fds[1], POLLIN);
        ssize_t k = rc < 0 ? rc : read(r->fds[1], buf, n);

        if (rc < 0)
            return rc;
        if (k == 0)
            return -ENODATA;
        if (k < 0 && errno != EINTR && errno != EAGAIN)
            return -errno;
        buf = (uint8_t *)buf + MAX(k, 0);
        n -= (size_t)MAX(k, 0);
    }
    return 0;
}

static int take_secret(struct run *r, struct export_secret **ret)
{
    struct export_secret *s = secmem_alloc(sizeof(*s));

    if (!s)
        return -ENOMEM;
    if (read_upto(r->fds[0], s, sizeof(*s)) != (ssize_t)sizeof(*s)) {
        secmem_free(s);
        return -EPROTO;
    }
    *ret = s;
    return 0;
}

/* Names that are empty or NULL: none. */
static int export_volume(struct run *r, struct volume *v, const char *snapshot, const char *since)
{
    struct export_io io = {.write = write_stream, .ctx = r};
    struct volume_report report = report_of(r);
    struct export_secret *s = NULL;
    int rc = take_secret(r, &s);

    if (rc == 0)
        rc = volume_export(v, snapshot && *snapshot ? snapshot : NULL, since && *since ? since : NULL, s, &io, &report);
    secmem_free(s);
    return rc;
}

/* --- snapshots --- */

static int snapshot_line(void *ctx, const struct volume_snapshot *s)
{
    char text[SNAPSHOT_NAME_MAX + 64];

    snprintf(text, sizeof(text), "%s %lld %llu", s->name, (long long)s->created, (unsigned long long)s->used);
    on_line(ctx, text);
    return 0;
}

/* --- begin and end of tasks --- */

static int task_begin(struct run *r)
{
    int rc;

    if (r->agent < 0)
        return life_is_open() ? 0 : -ENOKEY;
    pthread_mutex_lock(&care_lock);
    opened = true;
    pthread_mutex_unlock(&care_lock);
    rc = life_open(r->agent);
    close_quiet(r->agent);
    return rc;
}

/* busy: its own flag. */
static void task_end(bool *busy)
{
    pthread_mutex_lock(&care_lock);
    while (opened && task_busy + scrubbing == 1) { /* again, if another has come and gone meanwhile */
        opened = false;
        pthread_mutex_unlock(&care_lock);
        server_close_unused();
        pthread_mutex_lock(&care_lock);
    }
    *busy = false;
    pthread_mutex_unlock(&care_lock);
}

/* --- the scrub --- */

static void sleep_ns(int64_t ns)
{
    struct timespec t = {ns / 1000000000, ns % 1000000000};

    nanosleep(&t, NULL);
}

/* Waits while the volume is locked; but where nobody else may ever open it, it ends. */
static void *scrub_thread(void *arg)
{
    struct run *r = arg;
    uint64_t rate = r->task.value, step = MAX(rate * SCRUB_STEP_MS / 1000, 1);
    struct volume_scrub at = {0};
    char text[128];
    bool own = r->agent >= 0;
    int more = 1, rc = task_begin(r);

    control_send(SERVER_REPLY, r->id, rc, "");
    free(r);
    if (rc < 0) {
        task_end(&scrubbing);
        return NULL;
    }
    while (more > 0) {
        int64_t began = mono_ns(), take;
        struct volume *v;

        life_enter_any(&v);
        if (v)
            more = volume_scrub_step(v, &at, step);
        else if (own)
            more = -ECANCELED;
        life_leave();
        pthread_mutex_lock(&care_lock);
        scrub_at = at;
        pthread_mutex_unlock(&care_lock);
        take = mono_ns() - began;
        if (more > 0 && take < (int64_t)SCRUB_STEP_MS * 1000000)
            sleep_ns((int64_t)SCRUB_STEP_MS * 1000000 - take);
    }
    snprintf(text, sizeof(text), "scrub %s: %llu bytes read, %u findings",
             more < 0 ? "broken off, since the volume was locked" : "ended", (unsigned long long)at.done, at.findings);
    control_send(SERVER_NOTE, 0, 0, text);
    task_end(&scrubbing);
    return NULL;
}

void care_stat(struct server_stat *st)
{
    pthread_mutex_lock(&care_lock);
    st->scrubbing = scrubbing;
    st->scrub_findings = scrub_at.findings;
    st->scrub_done = scrub_at.done;
    st->scrub_total = scrub_at.total;
    pthread_mutex_unlock(&care_lock);
}

/* --- tasks --- */

static int do_task(struct run *r)
{
    struct volume_report report = report_of(r);
    struct volume *v;
    int rc = -ENOKEY;

    life_enter_any(&v);
    if (v && r->task.kind == TASK_CHECK)
        rc = volume_check_report(v, r->task.value != 0, &report);
    else if (v && r->task.kind == TASK_RESIZE)
        rc = volume_resize(v, r->task.value);
    else if (v && r->task.kind == TASK_EXPORT)
        rc = export_volume(r, v, r->task.name, r->task.since);
    else if (v && r->task.kind == TASK_SNAPSHOT_CREATE)
        rc = volume_snapshot_create(v, r->task.name);
    else if (v && r->task.kind == TASK_SNAPSHOT_REMOVE)
        rc = volume_snapshot_remove(v, r->task.name);
    else if (v && r->task.kind == TASK_SNAPSHOT_LIST)
        rc = volume_snapshot_list(v, snapshot_line, r);
    life_leave();
    return rc;
}

static void *task_thread(void *arg)
{
    struct run *r = arg;
    int rc = task_begin(r);

    if (rc == 0)
        rc = do_task(r);
    for (int i = 0; i < r->nfds; i++)
        close_quiet(r->fds[i]);
    task_end(&task_busy);
    control_send(SERVER_REPLY, r->id, rc, "");
    free(r);
    return NULL;
}

static int start(struct run *r)
{
    bool scrub = r->task.kind == TASK_SCRUB, *busy = scrub ? &scrubbing : &task_busy;
    pthread_t t;
    int rc = 0;

    if (r->task.kind < TASK_CHECK || r->task.kind > TASK_SNAPSHOT_LIST ||
        r->nfds != (r->task.kind == TASK_EXPORT ? 2 : 0) || r->task.agent > 1 ||
        !memchr(r->task.name, 0, sizeof(r->task.name)) || !memchr(r->task.since, 0, sizeof(r->task.since)) ||
        (scrub && r->task.value < SCRUB_RATE_MIN))
        return -EINVAL;
    if (!scrub)
        stopped = 0; /* another cofferd counts anew */
    pthread_mutex_lock(&care_lock);
    if (*busy)
        rc = scrub ? -EALREADY : -EBUSY;
    else
        *busy = true;
    pthread_mutex_unlock(&care_lock);
    if (rc < 0)
        return rc;
    rc = -pthread_create(&t, NULL, scrub ? scrub_thread : task_thread, r);
    if (rc == 0)
        pthread_detach(t);
    else
        *busy = false;
    return rc;
}

void care_task(uint64_t id, const struct server_task *task, const int *fds_take, int nfds)
{
    struct run *r = xcalloc(1, sizeof(*r));
    int rc;

    r->id = id;
    r->task = *task;
    r->agent = task->agent && nfds ? fds_take[--nfds] : -1;
    r->nfds = nfds;
    memcpy(r->fds, fds_take, sizeof(int) * (size_t)nfds);
    rc = start(r);
    if (rc < 0) {
        for (int i = 0; i < nfds; i++)
            close_quiet(fds_take[i]);
        close_quiet(r->agent);
        free(r);
        control_send(SERVER_REPLY, id, rc, "");
    }
}

void care_stop(uint64_t id)
{
    stopped = id;
}

/* --- runs --- */

static int maintenance_key(struct key **ret_key, struct channel_volume *ret_volume)
{
    struct agent_auth ask = {.flags = AGENT_AUTH_MAINTENANCE | AGENT_AUTH_WANT_KEY};
    struct auth a;
    int rc = channel_ask(NULL, &ask, &a, ret_key, ret_volume);

    if (rc == 0)
        auth_put(&a);
    if (rc == 0 && !*ret_key)
        rc = -ENOKEY;
    if (rc < 0)
        control_failed("the key agent gives no key: %s", rc == -ENOKEY ? "run coffer unlock" : strerror(-rc));
    return rc;
}

struct job {
    struct store *data, *log; /* taken by what opens them */
    struct key *key;
    struct channel_volume volume;
    const struct care_args *args;
    struct volume_report report;
    struct run *run;
};

static int run_format(struct job *j)
{
    return volume_format(j->data, j->log, j->key, &j->volume.params);
}

static struct volume_options options_of(const struct job *j)
{
    return (struct volume_options){.on_damage = control_damage,
                                   .seen = j->volume.seen,
                                   .new_branch = j->volume.accept_rollback,
                                   .on_checkpoint = channel_seen};
}

static int run_repair(struct job *j)
{
    struct volume_options o = options_of(j);

    o.on_damage = NULL; /* the report has it */
    return volume_repair(j->data, j->log, j->key, j->volume.params.id, &o, &j->report);
}

static int open_volume(struct job *j, struct volume **ret)
{
    struct volume_options o = options_of(j);

    return volume_open(j->data, j->log, j->key, j->volume.params.id, &o, ret);
}

/* rc, or else the error of closing. */
static int close_volume(struct volume *v, int rc)
{
    int closed = volume_close(v);

    return rc < 0 ? rc : closed < 0 ? closed : rc;
}

static int run_check(struct job *j)
{
    struct volume *v;
    int rc = open_volume(j, &v);

    return rc < 0 ? rc : close_volume(v, volume_check_report(v, j->args->data, &j->report));
}

static int run_resize(struct job *j)
{
    struct volume *v;
    int rc = open_volume(j, &v);

    return rc < 0 ? rc : close_volume(v, volume_resize(v, j->args->size));
}

/* Lists too: recovery writes, so that what is listed is what the next opening finds. */
static int run_snapshot(struct job *j, int (*run)(struct job *j, struct volume *v))
{
    struct volume *v;
    int rc = open_volume(j, &v);

    return rc < 0 ? rc : close_volume(v, run(j, v));
}

static int create_in(struct job *j, struct volume *v)
{
    return volume_snapshot_create(v, j->args->snapshot ? j->args->snapshot : "");
}

static int remove_in(struct job *j, struct volume *v)
{
    return volume_snapshot_remove(v, j->args->snapshot ? j->args->snapshot : "");
}

static int list_in(struct job *j, struct volume *v)
{
    return volume_snapshot_list(v, snapshot_line, j->run);
}

static int run_snapshot_create(struct job *j)
{
    return run_snapshot(j, create_in);
}

static int run_snapshot_remove(struct job *j)
{
    return run_snapshot(j, remove_in);
}

static int run_snapshot_list(struct job *j)
{
    return run_snapshot(j, list_in);
}

static int run_export(struct job *j)
{
    struct volume *v;
    int rc = open_volume(j, &v);

    return rc < 0 ? rc : close_volume(v, export_volume(j->run, v, j->args->snapshot, j->args->since));
}

/* Increments' secrets follow each other in the pipe. */
static int next_stream(void *ctx, const struct export_secret **ret)
{
    struct run *r = ctx;
    ssize_t n;

    if (!r->next)
        r->next = secmem_alloc(sizeof(*r->next));
    n = r->next ? read_upto(r->fds[0], r->next, sizeof(*r->next)) : -ENOMEM;
    if (n <= 0)
        return (int)n;
    *ret = r->next;
    return n == (ssize_t)sizeof(*r->next) ? 1 : -EPROTO;
}

static int run_import(struct job *j)
{
    struct export_io io = {.read = read_stream, .next = next_stream, .ctx = j->run};
    struct export_secret *s = NULL;
    int rc = take_secret(j->run, &s);

    if (rc == 0)
        rc = volume_import(j->data, j->log, j->key, &j->volume.params, s, &io, &j->report);
    secmem_free(s);
    secmem_free(j->run->next);
    return rc;
}

static const struct {
    const char *verb;
    int (*run)(struct job *j);
} verbs[] = {{"format", run_format},
             {"check", run_check},
             {"repair", run_repair},
             {"resize", run_resize},
             {"export", run_export},
             {"import", run_import},
             {"snapshot-create", run_snapshot_create},
             {"snapshot-remove", run_snapshot_remove},
             {"snapshot-list", run_snapshot_list}};

int care_run(const char *verb, const struct care_args *args)
{
    struct run r = {.fds = {SERVER_FD_SECRET, SERVER_FD_STREAM}};
    struct job j = {.args = args, .report = report_of(&r), .run = &r};
    int (*run)(struct job * j) = NULL;
    int rc;

    for (size_t i = 0; i < ARRAY_LEN(verbs); i++)
        if (strcmp(verb, verbs[i].verb) == 0)
            run = verbs[i].run;
    if (!run)
        return -EINVAL;
    if (maintenance_key(&j.key, &j.volume) < 0)
        return 1;
    j.data = store_fd_take(SERVER_FD_DATA);
    j.log = store_fd_take(SERVER_FD_LOG);
    rc = run(&j);
    key_free(&j.key);
    if (rc < 0 && (args->snapshot || args->since) && server_snapshot_error(rc))
        control_failed("%s", server_snapshot_error(rc));
    else if (rc < 0)
        control_failed(
            "%s failed: %s", verb,
            rc == -ENOSPC && run == run_resize ? "more than that is in use"
            : rc == -ESTALE
                ? "it was put back to an older state: restore the newer one, or coffer volume accept-rollback"
                : strerror(-rc));
    return rc < 0 ? 1 : rc > 0 ? EXIT_DAMAGE : 0;
}
