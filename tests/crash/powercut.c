/*
 * powercut.c - cuts the power below the engine at every write, and makes its I/O fail.
 *
 * A round runs a seeded workload on a small volume over recording stores (recstore.h), with deaths of the process and
 * reopenings in it, and keeps what the tree looked like after each operation. Then, for every event of the recording,
 * the states that a cut there may leave are built and opened:
 *   1. the volume opens by itself and reports no damage
 *   2. the tree is exactly that after some operation k: not before the last one that a completed fsync, sync or
 * checkpoint covered (after the death of the process alone: the last acknowledged), not after the one under way
 *   3. nameless inodes are gone, and the check, which reads all content, finds nothing
 *   4. the volume works on: changes, close, open, check
 *   5. cut again at every write of that recovery, it comes to the same tree
 * In every fourth round `data` is so full that it grows under the workload. In another it may not grow, so that what is
 * freed is soon used again, and a second thread checkpoints and syncs all the time (then a seed does not say all). A
 * fault round lets a write, sync or grow fail instead, and looks that nothing is acknowledged that is not so, also when
 * the volume is opened again while the page cache still shows what a failed flush did not write. Formatting is cut,
 * too: there is an empty volume after it or none.
 *
 *     powercut [--seed N] [--ops N] [--states N] [--seconds N] [--distinct N] [--workers N] [--mode cut|fault|both]
 * [--cut N]
 *
 * --states: random states per cut besides the systematic ones. --cut with --seed repeats one cut of one round.
 * --distinct: ends after so many different states, and fails when --seconds do not suffice for them. --workers:
 * processes side by side, one a processor without it; each takes every n-th seed.
 */
#include "fs/base/secmem.h"
#include "tests/model/fsmodel.h"

#include <getopt.h>
#include <signal.h>
#include <malloc.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE_LIMIT (96ull << 20)

enum round_kind { ROUND_PLAIN, ROUND_GROWS, ROUND_TIGHT };

static uint64_t arg_seed = 1, arg_ops = 150, arg_states = 4, arg_seconds = 60, arg_distinct, arg_workers;
static int64_t arg_cut = -1;
static bool arg_cuts = true, arg_faults = true;

static struct key *volume_key;
static const uint8_t volume_id[VOLUME_ID_BYTES] = "powercut-volume";
static char repro[700] = "setup"; /* what is under way: for signals and failures */
static uint64_t states, skipped, distinct, failures, opens, recoveries, recovery_cuts, grown, cuts, events;
static uint64_t rounds, fault_rounds, format_cuts;
/* What a worker reports. */
static uint64_t *const counters[] = {&states,     &skipped,       &distinct,   &failures, &opens,
                                     &recoveries, &recovery_cuts, &grown,      &cuts,     &events,
                                     &rounds,     &fault_rounds,  &format_cuts};

/* --- reporting --- */

__attribute__((format(printf, 1, 2))) static void failed(const char *fmt, ...)
{
    va_list ap;

    failures++;
    printf("FAIL %s: ", repro);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n");
    fflush(stdout);
}

static void on_signal(int sig)
{
    static const char text[] = "\nFAIL crash or hang (signal) in: ";
    ssize_t n = write(STDOUT_FILENO, text, sizeof(text) - 1);

    n += write(STDOUT_FILENO, repro, strlen(repro));
    n += write(STDOUT_FILENO, "\n", 1);
    (void)n;
    signal(sig, SIG_DFL);
    raise(sig == SIGALRM ? SIGABRT : sig);
}

static void on_damage(void *ctx, const char *what)
{
    char *text = ctx;

    if (text && !text[0])
        snprintf(text, 300, "%s", what);
}

static void on_finding(void *ctx, const char *text)
{
    unsigned *n = ctx;

    if ((*n)++ < 8)
        printf("    check: %s\n", text);
}

/* --- a set of 64-bit numbers --- */

struct set {
    uint64_t *slot;
    size_t n, cap;
};

/* True when x was not in the set. */
static bool set_add(struct set *s, uint64_t x)
{
    size_t at;

    x += x == 0;
    if (2 * s->n >= s->cap) {
        struct set bigger = {.cap = s->cap ? 2 * s->cap : 4096};

        bigger.slot = xcalloc(bigger.cap, sizeof(uint64_t));
        for (size_t k = 0; k < s->cap; k++)
            if (s->slot[k])
                set_add(&bigger, s->slot[k]);
        free(s->slot);
        *s = bigger;
    }
    for (at = x % s->cap; s->slot[at]; at = (at + 1) % s->cap)
        if (s->slot[at] == x)
            return false;
    s->slot[at] = x;
    s->n++;
    return true;
}

/* --- a round's workload --- */

struct mark {
    size_t start, end;    /* events recorded before and after the operation */
    struct snap *snap;    /* the tree after it */
    struct middle middle; /* what it may show between its transactions */
    char *text;
};

/* From event `at` on the state of `mark` is durable. */
struct cover {
    size_t mark, at;
};

struct round {
    uint64_t seed;
    struct image *base[2]; /* the fresh volume */
    struct image *live[2];
    struct recorder rec;
    struct faults faults;
    struct model *model;
    struct world w;
    struct mark *mark; /* mark[0]: before the first operation */
    size_t marks, marks_cap;
    struct cover *cover;
    size_t covers, covers_cap;
    pthread_mutex_t mutex; /* covers */
    pthread_mutex_t mount; /* w.v, against the second thread */
    pthread_t thread;
    atomic_size_t done; /* the last mark */
    atomic_bool stop;
    bool threaded, disturbed; /* the second thread runs, has run */
    uint32_t block;
    uint64_t root;   /* the directory that the model stands for */
    uint64_t beside; /* inodes beside it */
};

static struct volume_options round_options(char *damage)
{
    return (struct volume_options){.cache_bytes = 256 << 10, .mount_id = 77, .on_damage = on_damage, .ctx = damage};
}

static int open_images(struct image *const image[2], struct recorder *rec, struct faults *faults, char *damage,
                       struct volume **ret_v)
{
    struct volume_options o = round_options(damage);

    opens++;
    return volume_open(mstore_new(image[0], rec, faults, 0), mstore_new(image[1], rec, faults, 1), volume_key,
                       volume_id, &o, ret_v);
}

static void round_cover(struct round *r, size_t mark)
{
    pthread_mutex_lock(&r->mutex);
    if (r->covers == r->covers_cap) {
        r->covers_cap = r->covers_cap ? 2 * r->covers_cap : 64;
        r->cover = xrealloc(r->cover, r->covers_cap * sizeof(*r->cover));
    }
    r->cover[r->covers++] = (struct cover){mark, recorder_count(&r->rec)};
    pthread_mutex_unlock(&r->mutex);
}

static void round_mark(struct round *r, size_t start, bool synced, const char *text)
{
    if (r->marks == r->marks_cap) {
        r->marks_cap = r->marks_cap ? 2 * r->marks_cap : 256;
        r->mark = xrealloc(r->mark, r->marks_cap * sizeof(*r->mark));
    }
    r->mark[r->marks++] = (struct mark){.start = start,
                                        .end = recorder_count(&r->rec),
                                        .snap = snap_model(r->model),
                                        .middle = r->w.middle,
                                        .text = xstrdup(text)};
    r->w.middle = (struct middle){.kind = MIDDLE_NONE}; /* the mark's now */
    atomic_store(&r->done, r->marks - 1);
    if (synced)
        round_cover(r, r->marks - 1);
}

/* The second thread. */
static void *disturb(void *arg)
{
    struct round *r = arg;
    struct rng rng = {hash_mix(r->seed, 4)};

    while (!atomic_load(&r->stop)) {
        size_t mark;
        int rc;

        usleep((useconds_t)rng_below(&rng, 500));
        pthread_mutex_lock(&r->mount);
        mark = atomic_load(&r->done);
        rc = rng_chance(&rng, 2) ? volume_checkpoint(r->w.v) : vol_sync(r->w.v);
        if (rc == 0)
            round_cover(r, mark);
        else
            failed("checkpoint or sync beside the workload: %s", strerror(-rc));
        pthread_mutex_unlock(&r->mount);
    }
    return NULL;
}

static void disturb_begin(struct round *r)
{
    r->rec.sync_us = 300;
    atomic_store(&r->stop, false);
    r->disturbed = r->threaded = pthread_create(&r->thread, NULL, disturb, r) == 0;
}

static void disturb_end(struct round *r)
{
    if (!r->threaded)
        return;
    atomic_store(&r->stop, true);
    pthread_join(r->thread, NULL);
    r->threaded = false;
    r->rec.sync_us = 0;
}

/* Fills the first region, but for what is kept and `left` bytes, with a file beside a directory for the workload. */
static int round_fill(struct round *r, uint64_t left, struct vattr *ret_root)
{
    struct volume *v = NULL;
    struct volume_stat st;
    uint8_t *buf = xcalloc(1, 1 << 20);
    struct vattr a;
    int rc = open_images(r->base, NULL, NULL, NULL, &v);

    if (rc == 0)
        rc = vol_mknod(v, VOLUME_ROOT_INO, "w", S_IFDIR | 0755, 0, 0, 0, ret_root);
    if (rc == 0)
        rc = vol_mknod(v, VOLUME_ROOT_INO, "filler", S_IFREG | 0600, 0, 0, 0, &a);
    for (uint64_t off = 0; rc == 0; off += 1 << 18) {
        volume_stat(v, &st);
        if (st.used + left > REGION_BYTES)
            break;
        rc = vol_write(v, a.ino, off, buf, 1 << 18) == 1 << 18 ? 0 : -ENOSPC;
    }
    if (rc == 0)
        rc = volume_close(v);
    else if (v)
        volume_abandon(v);
    if (rc == 0 && r->base[0]->size != REGION_BYTES)
        rc = -EFBIG;
    free(buf);
    return rc;
}

/* Makes the fresh volume and opens it. */
static bool round_begin(struct round *r, uint64_t seed, enum round_kind kind)
{
    struct vattr root = {.ino = VOLUME_ROOT_INO, .mode = S_IFDIR | 0755};
    static const uint32_t blocks[] = {4096, 4096, 8192, 16384};
    struct volume_params p = {.size_limit = SIZE_LIMIT, .log_segment = 256 << 10, .root_mode = 0755};
    struct store *data, *log;
    struct volume *v = NULL;
    int rc;

    memset(r, 0, sizeof(*r));
    r->seed = seed;
    r->block = blocks[seed % ARRAY_LEN(blocks)];
    pthread_mutex_init(&r->rec.mutex, NULL);
    pthread_mutex_init(&r->mutex, NULL);
    pthread_mutex_init(&r->mount, NULL);
    memcpy(p.id, volume_id, sizeof(p.id));
    if (kind == ROUND_TIGHT)
        p.size_limit = REGION_BYTES;
    p.block_size = r->block;
    for (int s = 0; s < 2; s++)
        r->base[s] = image_new(NULL);
    data = mstore_new(r->base[0], NULL, NULL, 0);
    log = mstore_new(r->base[1], NULL, NULL, 1);
    rc = volume_format(data, log, volume_key, &p);
    data->ops->close(data);
    log->ops->close(log);
    /* Reserves are 6 and 4 MiB and a quarter more. */
    if (rc == 0 && kind != ROUND_PLAIN)
        rc = round_fill(r, kind == ROUND_GROWS ? 8ull << 20 : 7ull << 20, &root);
    r->root = root.ino;
    r->beside = kind == ROUND_PLAIN ? 0 : 2;
    for (int s = 0; s < 2; s++)
        r->live[s] = image_new(r->base[s]);
    if (rc == 0)
        rc = open_images(r->live, &r->rec, &r->faults, NULL, &v);
    if (rc < 0) {
        failed("a fresh volume does not open: %s", strerror(-rc));
        return false;
    }
    r->model = model_new(root.ino, root.mode, 0, 0);
    world_init(&r->w, v, r->model, seed);
    r->w.middles = true;
    r->w.block = r->block;
    r->w.size_limit = p.size_limit;
    r->w.max_pages = 200 + rng_below(&r->w.rng, 400);
    r->w.max_file = 300 << 10;
    r->w.max_inodes = 40 + rng_below(&r->w.rng, 60);
    if (kind == ROUND_GROWS)
        r->w.max_pages += 1500;
    world_adopt(&r->w, r->model->root);
    round_mark(r, 0, true, "start");
    return true;
}

static void round_end(struct round *r)
{
    disturb_end(r);
    if (r->w.v)
        volume_abandon(r->w.v);
    for (size_t k = 0; k < r->marks; k++) {
        snap_free(r->mark[k].snap);
        middle_clear(&r->mark[k].middle);
        free(r->mark[k].text);
    }
    free(r->mark);
    free(r->cover);
    recorder_reset(&r->rec);
    free(r->rec.ev);
    for (int s = 0; s < 2; s++) {
        image_free(r->live[s]);
        image_free(r->base[s]);
    }
    model_free(r->model);
    world_free(&r->w);
}

static bool round_reopen_held(struct round *r, bool die)
{
    size_t start = recorder_count(&r->rec);
    char damage[300] = "";
    int rc = 0;

    if (die)
        volume_abandon(r->w.v);
    else
        rc = volume_close(r->w.v);
    r->w.v = NULL;
    model_forget_all(r->model);
    if (rc < 0) {
        failed("close: %s", strerror(-rc));
        return false;
    }
    if (!die)
        round_mark(r, start, true, "close");
    start = recorder_count(&r->rec);
    rc = open_images(r->live, &r->rec, &r->faults, damage, &r->w.v);
    round_mark(r, start, false, die ? "reopen after death" : "reopen");
    if (rc < 0 || damage[0]) {
        failed("reopen (died %d): %s, damage: %s", die, strerror(-rc), damage);
        return false;
    }
    world_op(&r->w, "reopen");
    return true;
}

/* Ends the mount, by death or in good order, and opens it again. */
static bool round_reopen(struct round *r, bool die)
{
    bool ok;

    pthread_mutex_lock(&r->mount);
    ok = round_reopen_held(r, die);
    pthread_mutex_unlock(&r->mount);
    return ok;
}

static bool round_run(struct round *r)
{
    for (uint64_t n = 0; n < arg_ops; n++) {
        size_t start = recorder_count(&r->rec);
        uint64_t dice = rng_below(&r->w.rng, 160);

        snprintf(repro, sizeof(repro), "--seed %llu --ops %llu (workload, op %llu)", (unsigned long long)r->seed,
                 (unsigned long long)arg_ops, (unsigned long long)n);
        if (dice < 3 && !r->w.faults) {
            if (!round_reopen(r, dice < 2) || !world_compare(&r->w))
                break;
            continue;
        }
        world_step(&r->w, true);
        if (r->w.fail[0])
            break;
        round_mark(r, start, r->w.synced, r->w.op);
        if (r->w.in_doubt)
            return true;
    }
    if (r->w.fail[0])
        failed("%s", r->w.fail);
    return r->w.fail[0] == 0 && r->w.v;
}

/* --- one state after the cut --- */

/* Prints which operation the tree is nearest to. */
static void explain(struct round *r, struct snap *have, size_t from, size_t to, bool loose)
{
    size_t best = from;
    unsigned least = UINT32_MAX;

    for (size_t k = 0; k < r->marks; k++) {
        unsigned d = snap_diff(have, r->mark[k].snap, loose, NULL);
        bool in = k >= from && k <= to;

        if (d < least || (d == least && in)) {
            least = d;
            best = k;
        }
    }
    printf("    nearest: operation %zu (%s), %u differences, allowed %zu (%s) .. %zu (%s)\n", best, r->mark[best].text,
           least, from, r->mark[from].text, to, r->mark[to].text);
    if (best + 1 < r->marks)
        printf("    the next was: %s\n", r->mark[best + 1].text);
    snap_diff(have, r->mark[best].snap, loose, stdout);
}

/* Nothing nameless is left: the number of inodes is that of the distinct ones in the walk. */
static bool inodes_match(struct volume *v, const struct snap *s, uint64_t beside)
{
    struct volume_stat st;
    struct set seen = {0};
    size_t n;

    for (size_t k = 0; k < s->n; k++)
        set_add(&seen, s->e[k].ino);
    n = seen.n + beside;
    free(seen.slot);
    volume_stat(v, &st);
    if (st.inodes == n)
        return true;
    failed("%llu inodes, %zu have names", (unsigned long long)st.inodes, n);
    return false;
}

/* content: that of all files, too. */
static bool check_clean(struct volume *v, bool content, const char *when)
{
    unsigned lines = 0;
    int rc = volume_check(v, content, on_finding, &lines);

    if (rc == 0 && lines == 0)
        return true;
    failed("check %s: %d, %u findings", when, rc, lines);
    return false;
}

/* A few changes, close or death, open: all is there and clean. Takes v. */
static void works_on(struct round *r, struct image *const image[2], struct volume *v, struct rng *rng)
{
    struct vattr root, a;
    struct model *m;
    struct world w;
    struct snap *s;
    char damage[300] = "";
    int rc = 0;

    (void)a;
    if (vol_getattr(v, r->root, &root) < 0) {
        failed("getattr of the root");
        volume_abandon(v);
        return;
    }
    /* A directory of its own, so that a model of it starts empty. */
    rc = vol_mknod(v, r->root, "after-the-cut", S_IFDIR | 0700, 0, 0, 0, &a);
    if (rc < 0) {
        failed("mkdir after recovery: %s", strerror(-rc));
        volume_abandon(v);
        return;
    }
    m = model_new(a.ino, a.mode, a.uid, a.gid);
    world_init(&w, v, m, rng_u64(rng));
    w.block = r->block;
    w.size_limit = r->w.size_limit;
    world_adopt(&w, m->root);
    /* A few, too, so that records of before the cut still stand behind the new ones in the log. */
    for (uint64_t k = rng_chance(rng, 2) ? 25 : rng_below(rng, 4); k > 0 && !w.fail[0]; k--)
        world_step(&w, true);
    model_forget_all(m);
    if (!w.fail[0] && rng_chance(rng, 3))
        rc = volume_close(v);
    else
        volume_abandon(v);
    w.v = NULL;
    if (rc == 0 && !w.fail[0])
        rc = open_images(image, NULL, NULL, damage, &w.v);
    if (rc < 0 || damage[0]) {
        failed("close and open again after recovery: %s %s", strerror(-rc), damage);
    } else if (w.v) {
        s = snap_volume(w.v, r->root);
        if (s->err)
            failed("walk after working on: %s", s->why);
        else if (world_compare(&w) && inodes_match(w.v, s, r->beside))
            check_clean(w.v, !r->beside, "after working on");
        snap_free(s);
    }
    if (w.fail[0])
        failed("after recovery: %s", w.fail);
    if (w.v)
        volume_abandon(w.v);
    model_free(m);
    world_free(&w);
}

/* Is the tree that after one of the operations from .. to, or between the transactions of one of those after `from`? */
static bool is_in_history(struct round *r, struct volume *v, struct snap *s, size_t from, size_t to)
{
    bool loose = r->w.faults;

    for (size_t k = to + 1; k-- > from;)
        if (loose ? s->loose == r->mark[k].snap->loose : s->full == r->mark[k].snap->full)
            return true;
    for (size_t k = to; k > from; k--)
        if (middle_fair(v, s, r->mark[k - 1].snap, &r->mark[k].middle, r->block, loose))
            return true;
    return false;
}

static void images_free(struct image *const image[2])
{
    image_free(image[0]);
    image_free(image[1]);
}

/*
 * Cuts the recovery of a state, too: opens it once more, recorded, and then from what a cut at each event may leave.
 * (What the first cut left is on the disk.) want: the listing that the first recovery showed.
 */
static void cut_recovery(struct round *r, struct image *const state[2], const struct snap *want, struct set *ever,
                         uint64_t hash, struct rng *rng)
{
    static const enum crash_mode modes[] = {CRASH_NONE, CRASH_ALL, CRASH_LAST_TORN, CRASH_TORN, CRASH_SUBSET};
    struct recorder rec = {.mutex = PTHREAD_MUTEX_INITIALIZER};
    struct image *image[2] = {image_new(state[0]), image_new(state[1])};
    struct crash c = {.rec = &rec, .rng = *rng};
    struct volume *v = NULL;

    recoveries++;
    set_add(ever, hash_mix(hash_mix(0, 0), hash)); /* nothing written: the state itself, which is counted */
    if (open_images(image, &rec, NULL, NULL, &v) < 0) {
        failed("the same state does not open twice");
        images_free(image);
        return;
    }
    volume_abandon(v);
    images_free(image);
    for (int s = 0; s < 2; s++)
        c.durable[s] = image_new(state[s]);
    for (size_t cut = 0; cut <= rec.n && failures < 20; cut++) {
        crash_advance(&c, cut);
        for (unsigned k = 0; k < ARRAY_LEN(modes); k++) {
            char damage[300] = "";
            struct snap *s = NULL;

            alarm(60);
            if (crash_pending(&c, cut) == 0 && k)
                break; /* all the same */
            recovery_cuts++;
            distinct += set_add(ever, hash_mix(crash_build(&c, cut, modes[k], 0, image), hash));
            if (open_images(image, NULL, NULL, damage, &v) < 0) {
                failed("recovery cut at its event %zu of %zu (mode %d): does not open: %s", cut, rec.n, (int)modes[k],
                       damage);
            } else {
                s = snap_volume(v, r->root);
                if (s->err || damage[0] || s->full != want->full)
                    failed("recovery cut at its event %zu of %zu (mode %d): another tree: %s %s", cut, rec.n,
                           (int)modes[k], s->why, damage);
                else if (inodes_match(v, s, r->beside))
                    check_clean(v, !r->beside, "after a cut recovery");
                volume_abandon(v);
                snap_free(s);
            }
            images_free(image);
        }
    }
    images_free(c.durable);
    recorder_reset(&rec);
    free(rec.ev);
}

/* Opens one state and checks all of it. from, to: operations that the tree may show. hash: what tells it apart in ever.
 */
static void check_state(struct round *r, struct image *const image[2], size_t from, size_t to, struct set *ever,
                        uint64_t hash, struct rng *rng)
{
    bool loose = r->w.faults;
    uint64_t before = failures;
    struct image *again[2] = {NULL, NULL};
    struct volume *v = NULL;
    struct snap *s = NULL;
    char damage[300] = "";
    int rc;

    alarm(60);
    states++;
    if (rng_chance(rng, 30)) {
        again[0] = image_new(image[0]->parent);
        again[1] = image_new(image[1]->parent);
        image_add(again[0], image[0]);
        image_add(again[1], image[1]);
    }
    rc = open_images(image, NULL, NULL, damage, &v);
    if (rc < 0) {
        failed("does not open: %s, damage: %s", strerror(-rc), damage);
        images_free(again);
        return;
    }
    s = snap_volume(v, r->root);
    if (s->err)
        failed("walk: %s", s->why);
    if (!s->err && !is_in_history(r, v, s, from, to)) {
        failed("the tree is not a prefix of history that holds all that was made durable");
        explain(r, s, from, to, loose);
    }
    if (damage[0])
        failed("damage reported: %s", damage);
    if (failures == before && inodes_match(v, s, r->beside) && check_clean(v, !r->beside, "after recovery") &&
        rng_chance(rng, r->disturbed ? 2 : 5))
        works_on(r, image, v, rng);
    else
        volume_abandon(v);
    if (again[0] && failures == before)
        cut_recovery(r, again, s, ever, hash_mix(hash, 5), rng);
    images_free(again);
    snap_free(s);
}

/* The operations that a cut before event `cut` may show. */
static void cut_range(const struct round *r, size_t cut, bool death_only, size_t *ret_from, size_t *ret_to)
{
    size_t from = 0, to = 0;

    for (size_t k = 0; k < r->covers; k++)
        if (r->cover[k].at <= cut)
            from = MAX(from, r->cover[k].mark);
    for (size_t k = 0; k < r->marks; k++) {
        if (r->mark[k].end <= cut && death_only)
            from = k;
        if (r->mark[k].start < cut || r->mark[k].end <= cut)
            to = k;
    }
    *ret_from = from;
    *ret_to = MAX(from, to);
}

static void cut_at(struct round *r, struct crash *c, size_t cut, struct set *seen, struct set *ever)
{
    size_t pending = crash_pending(c, cut), singles = MIN(pending, arg_states), from, to;
    size_t jobs = CRASH_ONE_LOST + singles + 2 * arg_states;

    for (size_t job = 0; job < jobs; job++) {
        enum crash_mode mode = job < CRASH_ONE_LOST             ? (enum crash_mode)job
                               : job < CRASH_ONE_LOST + singles ? CRASH_ONE_LOST
                               : job % 2                        ? CRASH_SUBSET
                                                                : CRASH_TORN;
        size_t which =
            mode == CRASH_ONE_LOST ? (pending <= arg_states ? job - CRASH_ONE_LOST : rng_below(&c->rng, pending)) : 0;
        struct image *image[2];
        uint64_t h = crash_build(c, cut, mode, which, image);

        cut_range(r, cut, mode == CRASH_ALL, &from, &to);
        snprintf(repro, sizeof(repro), "--seed %llu --ops %llu --states %llu --cut %zu (mode %d, op %zu %.100s)",
                 (unsigned long long)r->seed, (unsigned long long)arg_ops, (unsigned long long)arg_states, cut,
                 (int)mode, to, r->mark[to].text);
        if (set_add(seen, hash_mix(h, from))) {
            distinct += set_add(ever, hash_mix(h, r->seed));
            check_state(r, image, from, to, ever, hash_mix(h, r->seed), &c->rng);
        } else
            skipped++;
        image_free(image[0]);
        image_free(image[1]);
    }
}

static bool enough(void)
{
    return arg_distinct && distinct >= arg_distinct;
}

/* Cuts at every event of the recording: in several passes, so that a deadline leaves cuts from all of it done. */
static void round_cuts(struct round *r, struct set *ever, int64_t deadline)
{
    static const unsigned passes[] = {0, 4, 2, 6, 1, 5, 3, 7};
    struct set seen = {0};
    size_t events = r->rec.n;

    for (size_t p = 0; p < ARRAY_LEN(passes); p++) {
        struct crash c = {.rec = &r->rec, .durable = {image_new(r->base[0]), image_new(r->base[1])}};

        for (size_t cut = passes[p]; cut <= events && failures < 20; cut += ARRAY_LEN(passes)) {
            if (arg_cut < 0 && (mono_ns() > deadline || enough()))
                break;
            crash_advance(&c, cut);
            c.rng.s = hash_mix(r->seed, cut);
            cuts++;
            if (arg_cut < 0 || (size_t)arg_cut == cut)
                cut_at(r, &c, cut, &seen, ever);
        }
        images_free(c.durable);
    }
    free(seen.slot);
}

/* --- faults --- */

/* After a failed write or flush nothing changes any more and no fsync succeeds. */
static void fault_refuses(struct round *r)
{
    struct vattr a, in = {.mode = S_IFDIR | 0700};
    int rc;

    rc = vol_fsync(r->w.v, VOLUME_ROOT_INO, false);
    if (rc == 0)
        failed("fsync succeeds after a failed write or flush");
    rc = vol_sync(r->w.v);
    if (rc == 0)
        failed("sync succeeds after a failed write or flush");
    rc = volume_checkpoint(r->w.v);
    if (rc == 0)
        failed("checkpoint succeeds after a failed write or flush");
    rc = vol_setattr(r->w.v, r->root, VOL_SET_MODE, &in, &a);
    if (rc != -EIO && rc != -EROFS)
        failed("setattr after a failed write or flush: %d", rc);
    rc = vol_mknod(r->w.v, VOLUME_ROOT_INO, "no", S_IFREG | 0600, 0, 0, 0, &a);
    if (rc != -EIO && rc != -EROFS)
        failed("mknod after a failed write or flush: %d", rc);
}

/*
 * The process ends after a failed write or flush, and the volume is opened again before any power cut: what it reads
 * comes from the page cache, which shows the failed writes as if they were on the disk. Then it is closed in good order
 * and the power is cut: what was seen must be there.
 */
static void fault_same_boot(struct round *r, struct rng *rng)
{
    struct crash c = {.rec = &r->rec, .rng = {rng_u64(rng)}}, later;
    struct recorder rec = {.mutex = PTHREAD_MUTEX_INITIALIZER};
    struct image *disk[2], *cache[2], *after[2];
    struct volume_options o;
    struct store *store[2];
    struct snap *seen = NULL, *s;
    char damage[300] = "";
    struct volume *v = NULL;
    size_t from, to;
    int rc;

    for (int k = 0; k < 2; k++) {
        c.durable[k] = image_new(r->base[k]);
        cache[k] = image_new(r->live[k]);
    }
    crash_advance(&c, r->rec.n);
    crash_build(&c, r->rec.n, CRASH_ALL, 0, disk); /* all but what failed, or was pending then */
    for (int k = 0; k < 2; k++) {
        store[k] = mstore_new(cache[k], &rec, NULL, k);
        ((struct mstore *)store[k])->disk = disk[k];
    }
    o = round_options(damage);
    opens++;
    rc = volume_open(store[0], store[1], volume_key, volume_id, &o, &v);
    cut_range(r, r->rec.n, false, &from, &to);
    if (rc == 0) {
        seen = snap_volume(v, r->root);
        if (seen->err || !is_in_history(r, v, seen, from, to))
            failed("opened in the same boot: %s", seen->err ? seen->why : "not a prefix of history");
        rc = volume_close(v);
    }
    if (rc) {
        failed("open and close in the same boot: %s, damage: %s", strerror(-rc), damage);
        goto out;
    }
    later = (struct crash){.rec = &rec, .durable = {image_new(disk[0]), image_new(disk[1])}};
    crash_advance(&later, rec.n);
    crash_build(&later, rec.n, CRASH_NONE, 0, after);
    rc = open_images(after, NULL, NULL, damage, &v);
    if (rc < 0) {
        failed("power cut after a reopening in the same boot: %s, damage: %s", strerror(-rc), damage);
    } else {
        s = snap_volume(v, r->root);
        if (s->err || s->full != seen->full)
            failed("what a reopening in the same boot showed is lost: %s %s", s->why, damage);
        else
            check_clean(v, true, "after a reopening in the same boot");
        snap_free(s);
        volume_abandon(v);
    }
    images_free(after);
    images_free(later.durable);
out:
    snap_free(seen);
    images_free(disk);
    images_free(cache);
    images_free(c.durable);
    recorder_reset(&rec);
    free(rec.ev);
}

static void round_fault(struct round *r, struct set *ever)
{
    struct rng rng = {hash_mix(r->seed, 99)};
    struct volume_stat st;
    size_t events;

    r->faults.kind = rng_chance(&rng, 2) ? FAULT_WRITE : FAULT_SYNC;
    r->faults.err = rng_chance(&rng, 3) ? ENOSPC : EIO;
    r->faults.sticky = rng_chance(&rng, 2);
    r->faults.countdown = 1 + (int64_t)rng_below(&rng, r->faults.kind == FAULT_WRITE ? arg_ops * 2 : arg_ops / 4);
    r->w.faults = true;
    if (!round_run(r))
        return;
    snprintf(repro, sizeof(repro), "--mode fault --seed %llu --ops %llu (fault kind %d, error %s, sticky %d, op %s)",
             (unsigned long long)r->seed, (unsigned long long)arg_ops, r->faults.kind, strerror(r->faults.err),
             r->faults.sticky, r->w.op);
    volume_stat(r->w.v, &st);
    if (st.failed) {
        fault_refuses(r);
    } else if (r->w.in_doubt) {
        failed("an operation failed but the volume is not in its error state");
    } else if (r->faults.hits && (r->faults.kind != FAULT_WRITE || r->faults.err != ENOSPC)) {
        /* (No room for content that no record names yet: that may be answered, and the volume goes on.) */
        failed("a write or flush failed, and the volume goes on");
    }
    for (unsigned k = 0; k < 6 && failures < 20; k++) {
        /* crash_advance chooses anew what the failed calls left. */
        struct crash c = {.rec = &r->rec, .rng = {rng_u64(&rng)}};
        static const enum crash_mode modes[] = {CRASH_ALL,    CRASH_NONE, CRASH_TORN,
                                                CRASH_SUBSET, CRASH_TORN, CRASH_LOG_ONLY};
        struct image *image[2];
        size_t from, to;
        uint64_t h;

        events = r->rec.n;
        for (int s = 0; s < 2; s++)
            c.durable[s] = image_new(r->base[s]);
        crash_advance(&c, events);
        h = crash_build(&c, events, modes[k], 0, image);
        cut_range(r, events, false, &from, &to);
        h = hash_mix(h, r->seed ^ 0xfa);
        distinct += set_add(ever, h);
        check_state(r, image, from, to, ever, h, &rng);
        for (int s = 0; s < 2; s++) {
            image_free(image[s]);
            image_free(c.durable[s]);
        }
    }
    fault_same_boot(r, &rng);
}

/* Writes files of 1 MiB until it fails. Returns the number of good ones; *ret_rc: the error. */
static unsigned fill(struct round *r, unsigned from, unsigned most, int *ret_rc)
{
    struct vattr a;
    char name[32];
    unsigned n;
    int rc = 0;

    for (n = from; n < from + most; n++) {
        snprintf(name, sizeof(name), "fill%u", n);
        rc = vol_mknod(r->w.v, VOLUME_ROOT_INO, name, S_IFREG | 0600, 0, 0, 0, &a);
        if (rc < 0)
            break;
        vol_forget(r->w.v, a.ino, 1);
        memset(r->w.buf, 'a' + (int)(n % 26), 1 << 20);
        rc = (int)vol_write(r->w.v, a.ino, 0, r->w.buf, 1 << 20);
        if (rc < 0) {
            int err = vol_unlink(r->w.v, VOLUME_ROOT_INO, name);

            if (err < 0)
                failed("unlink on a full filesystem: %s", strerror(-err));
            break;
        }
    }
    *ret_rc = rc;
    return n - from;
}

/* Reads the files of fill. */
static void fill_verify(struct round *r, unsigned from, unsigned n)
{
    struct vattr a;
    char name[32];

    for (unsigned k = from; k < from + n; k++) {
        snprintf(name, sizeof(name), "fill%u", k);
        memset(r->w.buf2, 'a' + (int)(k % 26), 1 << 20);
        if (vol_lookup(r->w.v, VOLUME_ROOT_INO, name, &a) < 0 ||
            vol_read(r->w.v, a.ino, 0, r->w.buf, 1 << 20) != 1 << 20 || memcmp(r->w.buf, r->w.buf2, 1 << 20) != 0)
            failed("%s cannot be read back on a full filesystem", name);
        else
            vol_forget(r->w.v, a.ino, 1);
    }
}

/* The backing filesystem fills up: ENOSPC, and all else goes on; deleting makes room again. */
static void round_full(struct round *r)
{
    unsigned n, k;
    char name[32];
    int rc;

    snprintf(repro, sizeof(repro), "full backing filesystem, seed %llu", (unsigned long long)r->seed);
    r->faults.kind = FAULT_GROW;
    r->faults.err = ENOSPC;
    r->faults.sticky = true;
    r->faults.countdown = 1;
    n = fill(r, 0, 200, &rc);
    if (rc != -ENOSPC || n < 10 || r->faults.hits == 0)
        failed("%u MiB written, then %s, %llu grows refused", n, strerror(-rc), (unsigned long long)r->faults.hits);
    rc = vol_sync(r->w.v);
    if (rc < 0)
        failed("sync on a full filesystem: %s", strerror(-rc));
    fill_verify(r, 0, n);
    for (k = 0; k < n / 2; k++) {
        snprintf(name, sizeof(name), "fill%u", k);
        rc = vol_unlink(r->w.v, VOLUME_ROOT_INO, name);
        if (rc < 0)
            failed("unlink on a full filesystem: %s", strerror(-rc));
    }
    k = fill(r, n, n / 3, &rc);
    if (rc < 0)
        failed("after deleting %u MiB only %u MiB fit: %s", n / 2, k, strerror(-rc));
    check_clean(r->w.v, true, "on a full filesystem");
    model_forget_all(r->model);
    volume_abandon(r->w.v);
    r->w.v = NULL;
    rc = open_images(r->live, NULL, &r->faults, NULL, &r->w.v);
    if (rc < 0) {
        failed("a full volume does not open: %s", strerror(-rc));
        return;
    }
    fill_verify(r, n / 2, n - n / 2);
    fill_verify(r, n, k);
    r->faults.kind = FAULT_NONE;
    k = fill(r, 1000, 200, &rc);
    if (rc != -ENOSPC)
        failed("the size limit does not hold: %u MiB more written", k);
    fill_verify(r, 1000, k);
    rc = volume_close(r->w.v);
    r->w.v = NULL;
    if (rc < 0)
        failed("close of a full volume: %s", strerror(-rc));
    rc = open_images(r->live, NULL, NULL, NULL, &r->w.v);
    if (rc < 0) {
        failed("a full volume does not open: %s", strerror(-rc));
        return;
    }
    check_clean(r->w.v, true, "of a full volume");
    fill_verify(r, 1000, k);
}

/* --- format --- */

/* After a cut there is a volume, whole and empty, or none: no superblock opens. After its return there is one. */
static void format_state(struct image *const image[2], bool done)
{
    char damage[300] = "";
    struct volume *v = NULL;
    struct snap *s;
    int rc = open_images(image, NULL, NULL, damage, &v);

    alarm(60);
    if (rc < 0) {
        if (done || rc != -EKEYREJECTED || damage[0])
            failed("format %s: open: %s, damage: %s", done ? "done" : "cut", strerror(-rc), damage);
        return;
    }
    s = snap_volume(v, VOLUME_ROOT_INO);
    if (s->err || s->n != 1 || damage[0])
        failed("format cut: the volume is not an empty one: %zu entries, %s %s", s->n, s->why, damage);
    else
        check_clean(v, true, "after a cut format");
    snap_free(s);
    volume_abandon(v);
}

static void cut_format(uint64_t seed, uint32_t block, struct set *ever)
{
    struct volume_params p = {
        .block_size = block, .size_limit = SIZE_LIMIT, .log_segment = 256 << 10, .root_mode = 0755};
    struct recorder rec = {.mutex = PTHREAD_MUTEX_INITIALIZER};
    struct crash c = {.rec = &rec, .rng = {hash_mix(seed, 8)}};
    struct image *empty[2], *image[2];
    struct store *store[2];
    int rc;

    snprintf(repro, sizeof(repro), "format, seed %llu", (unsigned long long)seed);
    memcpy(p.id, volume_id, sizeof(p.id));
    for (int k = 0; k < 2; k++) {
        empty[k] = image_new(NULL);
        image[k] = image_new(empty[k]);
        c.durable[k] = image_new(empty[k]);
        store[k] = mstore_new(image[k], &rec, NULL, k);
    }
    rc = volume_format(store[0], store[1], volume_key, &p);
    if (rc < 0)
        failed("format: %s", strerror(-rc));
    for (int k = 0; k < 2; k++)
        store[k]->ops->close(store[k]);
    images_free(image);
    for (size_t cut = 0; cut <= rec.n && rc == 0; cut++) {
        crash_advance(&c, cut);
        for (unsigned k = 0; k < CRASH_MODES + 2 * arg_states; k++) {
            enum crash_mode mode = k < CRASH_MODES ? (enum crash_mode)k : CRASH_TORN;
            uint64_t h = crash_build(&c, cut, mode, rng_below(&c.rng, MAX(crash_pending(&c, cut), 1)), image);

            format_cuts++;
            distinct += set_add(ever, hash_mix(h, hash_mix(seed, 6)));
            format_state(image, cut == rec.n);
            images_free(image);
        }
    }
    images_free(c.durable);
    images_free(empty);
    recorder_reset(&rec);
    free(rec.ev);
}

/* --- main --- */

static int usage(void)
{
    fprintf(stderr, "usage: powercut [--seed N] [--ops N] [--states N] [--seconds N] [--distinct N] [--workers N]\n"
                    "                [--mode cut|fault|both] [--cut N]\n");
    return 2;
}

static bool parse(int argc, char **argv)
{
    static const struct option options[] = {{"seed", 1, 0, 's'},    {"ops", 1, 0, 'o'},      {"states", 1, 0, 't'},
                                            {"seconds", 1, 0, 'S'}, {"distinct", 1, 0, 'd'}, {"workers", 1, 0, 'w'},
                                            {"mode", 1, 0, 'm'},    {"cut", 1, 0, 'c'},      {0, 0, 0, 0}};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 's':
            arg_seed = strtoull(optarg, NULL, 0);
            break;
        case 'o':
            arg_ops = MAX(strtoull(optarg, NULL, 0), 8);
            break;
        case 't':
            arg_states = MAX(strtoull(optarg, NULL, 0), 1);
            break;
        case 'S':
            arg_seconds = strtoull(optarg, NULL, 0);
            break;
        case 'd':
            arg_distinct = strtoull(optarg, NULL, 0);
            break;
        case 'w':
            arg_workers = strtoull(optarg, NULL, 0);
            break;
        case 'm':
            arg_cuts = strcmp(optarg, "fault") != 0;
            arg_faults = strcmp(optarg, "cut") != 0;
            break;
        case 'c':
            arg_cut = strtoll(optarg, NULL, 0);
            arg_faults = false;
            break;
        default:
            return false;
        }
    }
    return optind == argc;
}

/* In mode both, a seed stands for a cut format, ten fault rounds and then its cuts, which get a fifth of the time at
 * most. */
static void run_seed(uint64_t seed, struct set *ever, int64_t deadline)
{
    static const enum round_kind kinds[] = {ROUND_PLAIN, ROUND_GROWS, ROUND_TIGHT, ROUND_PLAIN};
    struct round r;

    if (arg_cuts && arg_cut < 0)
        cut_format(seed, 4096u << seed % 3, ever);
    for (unsigned k = 0; arg_faults && k < (arg_cuts ? 10 : 1); k++) {
        alarm(120);
        if (round_begin(&r, arg_cuts ? seed * 1000 + k : seed, ROUND_PLAIN))
            round_fault(&r, ever);
        round_end(&r);
        fault_rounds++;
    }
    if (arg_cuts) {
        bool ok;

        alarm(120);
        ok = round_begin(&r, seed, kinds[seed % ARRAY_LEN(kinds)]);
        if (ok && kinds[seed % ARRAY_LEN(kinds)] == ROUND_TIGHT)
            disturb_begin(&r);
        ok = ok && round_run(&r);
        disturb_end(&r);
        if (ok) {
            grown += r.live[0]->size > REGION_BYTES;
            events += r.rec.n + 1;
            round_cuts(&r, ever, MIN(deadline, mono_ns() + (int64_t)arg_seconds * 200000000));
        }
        round_end(&r);
        rounds++;
    }
}

static void work(uint64_t first, uint64_t step)
{
    int64_t deadline = mono_ns() + (int64_t)arg_seconds * 1000000000;
    struct set ever = {0};

    if (arg_faults && first == arg_seed) {
        struct round r;

        alarm(120);
        if (round_begin(&r, arg_seed, ROUND_PLAIN))
            round_full(&r);
        round_end(&r);
    }
    for (uint64_t seed = first; failures < 20; seed += step) {
        run_seed(seed, &ever, deadline);
        if (arg_cut >= 0 || mono_ns() > deadline || enough())
            break;
    }
    alarm(0);
    free(ever.slot);
}

/* Runs the workers and adds up what they counted. */
static void work_together(void)
{
    int fd[2], status;
    uint64_t n[ARRAY_LEN(counters)];

    arg_distinct = (arg_distinct + arg_workers - 1) / arg_workers;
    if (pipe2(fd, O_CLOEXEC) < 0) {
        failed("pipe: %s", strerror(errno));
        return;
    }
    for (uint64_t k = 0; k < arg_workers; k++) {
        pid_t pid = fork();

        if (pid < 0)
            failed("fork: %s", strerror(errno));
        if (pid != 0)
            continue;
        work(arg_seed + k, arg_workers);
        for (size_t i = 0; i < ARRAY_LEN(counters); i++)
            n[i] = *counters[i];
        fflush(stdout);
        _exit(write(fd[1], n, sizeof(n)) == sizeof(n) ? 0 : 1); /* less than PIPE_BUF: one piece */
    }
    close(fd[1]);
    while (wait(&status) > 0) {
        if (status != 0)
            failed("a worker ended with status %#x", (unsigned)status);
    }
    while (read(fd[0], n, sizeof(n)) == sizeof(n)) {
        for (size_t i = 0; i < ARRAY_LEN(counters); i++)
            *counters[i] += n[i];
    }
    close(fd[0]);
}

int main(int argc, char **argv)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM};
    uint64_t want;

    if (!parse(argc, argv))
        return usage();
    if (secmem_init() < 0 || !(volume_key = key_new())) {
        fprintf(stderr, "powercut: no locked memory\n");
        return 1;
    }
    memset(volume_key->b, 0x5c, sizeof(volume_key->b));
    for (size_t k = 0; k < ARRAY_LEN(signals); k++)
        signal(signals[k], on_signal);
    /* Segments of the log come and go: not by mmap each time. */
    mallopt(M_MMAP_THRESHOLD, 1 << 28);
    mallopt(M_TRIM_THRESHOLD, 1 << 28);
    want = arg_distinct;
    if (!arg_workers)
        arg_workers = arg_cut >= 0 ? 1 : (uint64_t)MAX(sysconf(_SC_NPROCESSORS_ONLN), 1);
    if (arg_workers > 1)
        work_together();
    else
        work(arg_seed, 1);
    printf("powercut: %llu rounds, %llu fault rounds, %llu opens, %llu repeated states left out\n",
           (unsigned long long)rounds, (unsigned long long)fault_rounds, (unsigned long long)opens,
           (unsigned long long)skipped);
    printf("%llu of %llu prefixes cut; %llu rounds in which data grew; %llu recoveries cut, in %llu states; formats "
           "cut in "
           "%llu\n",
           (unsigned long long)cuts, (unsigned long long)events, (unsigned long long)grown,
           (unsigned long long)recoveries, (unsigned long long)recovery_cuts, (unsigned long long)format_cuts);
    if (!failures && distinct < want)
        failed("only %llu distinct states in %llu s", (unsigned long long)distinct, (unsigned long long)arg_seconds);
    printf("states %llu, distinct %llu, failures %llu\n", (unsigned long long)(states + recovery_cuts + format_cuts),
           (unsigned long long)distinct, (unsigned long long)failures);
    key_free(&volume_key);
    return failures ? 1 : 0;
}
