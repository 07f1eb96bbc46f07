/*
 * model.c - random operations against the engine and a plain model, every result compared (fsmodel.h).
 *
 * Rounds: each thread runs operations on its own directory, and after a share of them all threads stop and the volume
 * is checkpointed, checked, closed and opened, or left as a killed process would leave it and opened: then all that was
 * acknowledged must be there. The stores are in memory, or with --dir files. With --threads the background thread runs.
 *
 *     model [--seed N] [--ops N] [--threads N] [--block N] [--dir DIR]
 *
 * --block 0 (the default): the block size is chosen by the seed, and the rounds go through all of them.
 */
#include "fs/base/secmem.h"
#include "tests/model/fsmodel.h"

#include <getopt.h>
#include <signal.h>
#include <unistd.h>

#define THREADS_MAX 16

static uint64_t arg_seed = 1, arg_ops = 300000, arg_threads = 1, arg_block;
static const char *arg_dir;

static struct key *volume_key;
static const uint8_t volume_id[VOLUME_ID_BYTES] = "model-volume";
static char repro[200] = "setup";

struct run {
    struct volume *v;
    struct image *image[2];
    struct world w[THREADS_MAX];
    uint64_t seed;
    uint32_t block;
    uint64_t reopens, deaths, checks, mounts;
    struct rng rng;
};

static int report(const char *what, const char *detail)
{
    printf("FAIL model %s: %s: %s\n", repro, what, detail);
    fflush(stdout);
    return -1;
}

static void on_signal(int sig)
{
    static const char text[] = "\nFAIL crash or hang (signal) in: model ";
    ssize_t n = write(STDOUT_FILENO, text, sizeof(text) - 1);

    n += write(STDOUT_FILENO, repro, strlen(repro));
    n += write(STDOUT_FILENO, "\n", 1);
    (void)n;
    signal(sig, SIG_DFL);
    raise(sig == SIGALRM ? SIGABRT : sig);
}

static void on_damage(void *ctx, const char *what)
{
    (void)ctx;
    printf("    damage: %s\n", what);
}

static void on_finding(void *ctx, const char *text)
{
    unsigned *n = ctx;

    if ((*n)++ < 8)
        printf("    check: %s\n", text);
}

static int open_file(const char *name, bool fresh)
{
    char *path = xasprintf("%s/%s", arg_dir, name);
    int fd = open(path, O_RDWR | O_CLOEXEC | (fresh ? O_CREAT | O_TRUNC : 0), 0600);

    free(path);
    return fd;
}

static struct store *run_store(struct run *r, int which, bool fresh)
{
    int fd;

    if (!arg_dir)
        return mstore_new(r->image[which], NULL, NULL, which);
    fd = open_file(which ? "log" : "data", fresh);
    if (fd < 0) {
        perror(arg_dir);
        exit(2);
    }
    return store_fd_take(fd);
}

static int run_open(struct run *r)
{
    struct volume_options o = {
        .background = arg_threads > 1, .cache_bytes = 128 << 10, .mount_id = ++r->mounts, .on_damage = on_damage};
    int rc = volume_open(run_store(r, 0, false), run_store(r, 1, false), volume_key, volume_id, &o, &r->v);

    if (rc < 0)
        return report("open", strerror(-rc));
    for (uint64_t t = 0; t < arg_threads; t++)
        r->w[t].v = r->v;
    return 0;
}

static int run_format(struct run *r)
{
    struct volume_params p = {.block_size = r->block,
                              .size_limit = 256ull << 20,
                              .log_segment = rng_chance(&r->rng, 2) ? 256 << 10 : 1 << 20,
                              .root_mode = 0755};
    struct store *data, *log;
    int rc;

    memcpy(p.id, volume_id, sizeof(p.id));
    for (int s = 0; s < 2; s++)
        r->image[s] = image_new(NULL);
    data = run_store(r, 0, true);
    log = run_store(r, 1, true);
    rc = volume_format(data, log, volume_key, &p);
    data->ops->close(data);
    log->ops->close(log);
    return rc < 0 ? report("format", strerror(-rc)) : 0;
}

/* Gives each thread its model: of the root for one, of a directory of its own for several. */
static int run_models(struct run *r)
{
    for (uint64_t t = 0; t < arg_threads; t++) {
        struct vattr a = {.ino = VOLUME_ROOT_INO, .mode = S_IFDIR | 0755};
        char name[32];
        int rc = 0;

        snprintf(name, sizeof(name), "thread%llu", (unsigned long long)t);
        if (arg_threads > 1)
            rc = vol_mknod(r->v, VOLUME_ROOT_INO, name, S_IFDIR | 0755, 0, 0, 0, &a);
        if (rc < 0)
            return report("mkdir", strerror(-rc));
        world_init(&r->w[t], r->v, model_new(a.ino, a.mode, a.uid, a.gid), hash_mix(r->seed, t));
        r->w[t].block = r->block;
        r->w[t].size_limit = 256ull << 20;
        r->w[t].max_pages = 4096 / arg_threads;
        r->w[t].max_inodes = 300;
        r->w[t].max_file = 2 << 20;
        world_adopt(&r->w[t], r->w[t].m->root);
    }
    return 0;
}

struct share {
    struct world *w;
    uint64_t ops;
};

static void *run_share(void *arg)
{
    struct share *s = arg;

    for (uint64_t n = 0; n < s->ops && !s->w->fail[0]; n++)
        world_step(s->w, false);
    return NULL;
}

static int run_step(struct run *r, uint64_t ops)
{
    struct share s[THREADS_MAX];
    pthread_t thread[THREADS_MAX];

    for (uint64_t t = 0; t < arg_threads; t++) {
        s[t] = (struct share){&r->w[t], ops / arg_threads + 1};
        if (arg_threads > 1)
            pthread_create(&thread[t], NULL, run_share, &s[t]);
        else
            run_share(&s[t]);
    }
    for (uint64_t t = 0; t < arg_threads && arg_threads > 1; t++)
        pthread_join(thread[t], NULL);
    for (uint64_t t = 0; t < arg_threads; t++)
        if (r->w[t].fail[0])
            return report("difference", r->w[t].fail);
    return 0;
}

static int run_compare(struct run *r, const char *when)
{
    for (uint64_t t = 0; t < arg_threads; t++)
        if (!world_compare(&r->w[t]))
            return report(when, r->w[t].fail);
    return 0;
}

static int run_check(struct run *r, const char *when)
{
    unsigned lines = 0;
    int rc = volume_check(r->v, true, on_finding, &lines);

    r->checks++;
    return rc != 0 || lines != 0 ? report(when, rc < 0 ? strerror(-rc) : "check has findings") : 0;
}

/* Ends the mount and opens it again. */
static int run_reopen(struct run *r, bool die)
{
    int rc = 0;

    if (die)
        volume_abandon(r->v);
    else
        rc = volume_close(r->v);
    r->v = NULL;
    r->deaths += die;
    r->reopens += !die;
    for (uint64_t t = 0; t < arg_threads; t++)
        model_forget_all(r->w[t].m);
    if (rc < 0)
        return report("close", strerror(-rc));
    rc = run_open(r);
    if (rc == 0)
        rc = run_compare(r, die ? "after death and reopening" : "after close and reopening");
    return rc;
}

/* One volume, from format to the last check. */
static int run_volume(struct run *r, uint64_t ops)
{
    uint64_t done = 0;
    int rc = run_format(r);

    if (rc == 0)
        rc = run_open(r);
    if (rc == 0)
        rc = run_models(r);
    while (rc == 0 && done < ops) {
        uint64_t n = MIN(1 + rng_below(&r->rng, ops < 20000 ? 600 : 4000), ops - done);

        alarm(300);
        rc = run_step(r, n);
        done += n;
        if (rc < 0)
            break;
        switch (rng_below(&r->rng, 8)) {
        case 0:
            rc = run_compare(r, "comparing");
            break;
        case 1:
            rc = run_check(r, "check");
            break;
        case 2:
        case 3:
            rc = run_reopen(r, false);
            break;
        case 4:
        case 5:
            rc = run_reopen(r, true);
            break;
        case 6:
            rc = volume_checkpoint(r->v);
            rc = rc < 0 ? report("checkpoint", strerror(-rc)) : 0;
            break;
        default:
            break;
        }
    }
    if (rc == 0)
        rc = run_compare(r, "at the end");
    if (rc == 0)
        rc = run_check(r, "check at the end");
    if (rc == 0)
        rc = run_reopen(r, false);
    if (rc == 0)
        rc = run_check(r, "check after closing");
    if (r->v)
        volume_abandon(r->v);
    return rc;
}

static void run_free(struct run *r)
{
    for (uint64_t t = 0; t < arg_threads; t++) {
        model_free(r->w[t].m);
        world_free(&r->w[t]);
    }
    for (int s = 0; s < 2; s++)
        image_free(r->image[s]);
}

static bool parse(int argc, char **argv)
{
    static const struct option options[] = {{"seed", 1, 0, 's'},  {"ops", 1, 0, 'o'}, {"threads", 1, 0, 't'},
                                            {"block", 1, 0, 'b'}, {"dir", 1, 0, 'd'}, {0, 0, 0, 0}};
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 's':
            arg_seed = strtoull(optarg, NULL, 0);
            break;
        case 'o':
            arg_ops = strtoull(optarg, NULL, 0);
            break;
        case 't':
            arg_threads = MIN(MAX(strtoull(optarg, NULL, 0), 1), THREADS_MAX);
            break;
        case 'b':
            arg_block = strtoull(optarg, NULL, 0);
            break;
        case 'd':
            arg_dir = optarg;
            break;
        default:
            return false;
        }
    }
    return optind == argc;
}

int main(int argc, char **argv)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM};
    static const uint32_t blocks[] = {4096, 8192, 16384};
    uint64_t volumes, ops = 0, errors = 0, nospc = 0, deaths = 0, reopens = 0;
    int rc = 0;

    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: model [--seed N] [--ops N] [--threads N] [--block N] [--dir DIR]\n");
        return 2;
    }
    volumes = arg_block ? 1 : 3;
    if (secmem_init() < 0 || !(volume_key = key_new())) {
        fprintf(stderr, "model: no locked memory\n");
        return 1;
    }
    memset(volume_key->b, 0x3a, sizeof(volume_key->b));
    for (size_t k = 0; k < ARRAY_LEN(signals); k++)
        signal(signals[k], on_signal);
    for (uint64_t k = 0; k < volumes && rc == 0; k++) {
        struct run r = {.seed = arg_seed, .block = (uint32_t)(arg_block ? arg_block : blocks[k])};

        snprintf(repro, sizeof(repro), "--seed %llu --ops %llu --threads %llu --block %u", (unsigned long long)arg_seed,
                 (unsigned long long)(arg_ops / volumes), (unsigned long long)arg_threads, r.block);
        r.rng.s = hash_mix(arg_seed, r.block);
        rc = run_volume(&r, arg_ops / volumes);
        for (uint64_t t = 0; t < arg_threads; t++) {
            ops += r.w[t].ops;
            errors += r.w[t].errors;
            nospc += r.w[t].nospc;
        }
        deaths += r.deaths;
        reopens += r.reopens;
        run_free(&r);
    }
    printf("model: %llu operations (%llu refused by both sides, %llu ENOSPC), %llu closes, %llu deaths, %s\n",
           (unsigned long long)ops, (unsigned long long)errors, (unsigned long long)nospc, (unsigned long long)reopens,
           (unsigned long long)deaths, rc < 0 ? "FAILED" : "no difference");
    key_free(&volume_key);
    return rc < 0 ? 1 : 0;
}
