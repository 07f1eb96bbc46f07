/*
 * lossyfs.c - a directory with the files `data` and `log`, on a disk that loses at a power cut what was not flushed.
 *
 *     lossyfs DIR MOUNTPOINT [--seed N] [--sync-us N] [--lie N]
 *
 * Serves DIR/data and DIR/log at MOUNTPOINT from memory (FUSE, nothing cached by the kernel), so that a real coffer-fs,
 * in whatever it does, can be run on it. SIGUSR1 is the power cut: from then on every call fails; of what was not
 * flushed a random part is lost or torn at 512 bytes (recstore.h); what is left is written back into DIR, one line
 * tells what was lost, and the process ends. SIGTERM: the same, but nothing is lost.
 *
 * --lie: a disk that says it has flushed while the last N writes are in its cache: the cut leaves what an honest one would have
 * left N writes ago. What is built on it must lose what it acknowledged: so it is seen that a test would notice.
 *
 * A call that was answered before the cut was answered before the state was taken: `power` is held shared by every
 * call.
 */
#include "tests/crash/recstore.h"

#include <fcntl.h>
#include <fuse.h>
#include <getopt.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>

static const char *const names[2] = {"data", "log"};

static const char *dir, *mountpoint;
static struct image *live[2];
static struct store *store[2];
static struct recorder rec = {.mutex = PTHREAD_MUTEX_INITIALIZER};
static struct crash crash = {.rec = &rec};
static pthread_rwlock_t power = PTHREAD_RWLOCK_INITIALIZER;
static bool off;
static size_t lie;     /* writes */
static bool exists[2]; /* was there, or was made since */

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *fmt, ...)
{
    va_list ap;

    fputs("lossyfs: ", stderr);
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fputc('\n', stderr);
    exit(1);
}

/* --- the backing files --- */

static void load(int s)
{
    char *path = xasprintf("%s/%s", dir, names[s]);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t page[IMAGE_PAGE];
    struct stat st;

    exists[s] = fd >= 0;
    if (fd < 0)
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || fstat(fd, &st) < 0)
        die("%s: %s", path, strerror(errno));
    crash.durable[s] = image_new(NULL);
    crash.durable[s]->size = (uint64_t)st.st_size;
    /* Only what is there: most of data is a hole. */
    for (off_t at = lseek(fd, 0, SEEK_DATA), end; at >= 0; at = lseek(fd, end, SEEK_DATA)) {
        end = lseek(fd, at, SEEK_HOLE);
        for (at -= at % IMAGE_PAGE; at < end; at += IMAGE_PAGE) {
            ssize_t n = pread(fd, page, sizeof(page), at);

            if (n <= 0 || !image_write(crash.durable[s], (uint64_t)at, page, (size_t)n))
                die("%s: cannot be read, or larger than 1 GiB", path);
        }
    }
    close(fd);
    free(path);
    live[s] = image_copy(crash.durable[s]);
    store[s] = mstore_new(live[s], &rec, NULL, s);
}

static void save(int s, const struct image *m)
{
    char *path = xasprintf("%s/%s", dir, names[s]);
    int fd = open(path, O_RDWR | O_TRUNC | O_CLOEXEC);

    if (fd < 0 || ftruncate(fd, (off_t)m->size) < 0)
        die("%s: %s", path, strerror(errno));
    for (uint64_t at = 0; at < m->size; at += IMAGE_PAGE) {
        const uint8_t *p = image_page(m, at / IMAGE_PAGE);
        size_t n = MIN(IMAGE_PAGE, m->size - at);

        if (memcmp(p, image_zero, n) != 0 && pwrite(fd, p, n, (off_t)at) != (ssize_t)n)
            die("%s: %s", path, strerror(errno));
    }
    close(fd);
    free(path);
}

/* --- the power --- */

/* Moves what is flushed out of the recording, so that only what a cut may lose is kept. [power exclusive] */
static void settle(void)
{
    size_t done, kept = 0;

    crash_advance(&crash, rec.n > lie ? rec.n - lie : 0);
    done = MIN(crash.upto[0], crash.upto[1]);
    for (size_t i = 0; i < rec.n; i++) {
        if (i < done)
            free(rec.ev[i].bytes);
        else
            rec.ev[kept++] = rec.ev[i];
    }
    rec.n = kept;
    for (size_t i = 0; i < kept; i++)
        rec.ev[i].upto -= rec.ev[i].upto == SIZE_MAX ? 0 : MIN(rec.ev[i].upto, done);
    for (int s = 0; s < 2; s++)
        crash.upto[s] -= done;
}

static void cut(bool lossy)
{
    /* Tearing and subsets are what finds faults; the other modes have the engine's own test. */
    static const enum crash_mode modes[] = {CRASH_TORN, CRASH_TORN,      CRASH_SUBSET,
                                            CRASH_NONE, CRASH_LAST_TORN, CRASH_LOG_ONLY};
    enum crash_mode mode = lossy && lie ? CRASH_NONE
                           : lossy      ? modes[rng_below(&crash.rng, ARRAY_LEN(modes))]
                                        : CRASH_ALL;
    struct image *image[2];
    size_t pending;

    pthread_rwlock_wrlock(&power);
    off = true;
    settle();
    pending = crash_pending(&crash, rec.n);
    crash_build(&crash, rec.n, mode, 0, image);
    for (int s = 0; s < 2; s++)
        save(s, image[s]);
    printf("cut: mode %d, %zu writes were not flushed\n", (int)mode, pending);
    fflush(stdout);
    umount2(mountpoint, MNT_DETACH);
    _exit(0);
}

static void *wait_for_cut(void *arg)
{
    const sigset_t *set = arg;
    int sig;

    while (sigwait(set, &sig) != 0)
        ;
    cut(sig == SIGUSR1);
    return NULL;
}

/* --- the filesystem --- */

static int which(const char *path)
{
    for (int s = 0; s < 2; s++)
        if (path[0] == '/' && strcmp(path + 1, names[s]) == 0)
            return s;
    return -ENOENT;
}

/* Runs a call while the power is on. Returns rc for use in an expression: if (!begin()) return -EIO. */
static bool begin(void)
{
    pthread_rwlock_rdlock(&power);
    if (!off)
        return true;
    pthread_rwlock_unlock(&power);
    return false;
}

static int end(int rc)
{
    pthread_rwlock_unlock(&power);
    return rc;
}

static int op_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
    int s = which(path);

    (void)fi;
    *st = (struct stat){.st_mode = S_IFDIR | 0755, .st_nlink = 2};
    if (strcmp(path, "/") == 0)
        return 0;
    if (s < 0 || !exists[s])
        return -ENOENT;
    if (!begin())
        return -EIO;
    *st = (struct stat){.st_mode = S_IFREG | 0600, .st_nlink = 1, .st_size = store[s]->ops->size(store[s])};
    return end(0);
}

static int op_open(const char *path, struct fuse_file_info *fi)
{
    int s = which(path);

    fi->direct_io = 1;
    fi->fh = (uint64_t)s;
    return s < 0 ? s : 0;
}

static int op_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
    int s = which(path);

    (void)mode;
    if (s < 0)
        return -EPERM;
    exists[s] = true;
    return op_open(path, fi);
}

static int op_read(const char *path, char *buf, size_t n, off_t at, struct fuse_file_info *fi)
{
    struct store *s = store[fi->fh];
    int64_t size;
    int rc;

    (void)path;
    if (!begin())
        return -EIO;
    size = s->ops->size(s);
    n = at >= size ? 0 : MIN(n, (size_t)(size - at));
    rc = s->ops->readv(s, &(struct iovec){buf, n}, 1, (uint64_t)at);
    return end(rc < 0 ? rc : (int)n);
}

static int op_write(const char *path, const char *buf, size_t n, off_t at, struct fuse_file_info *fi)
{
    struct store *s = store[fi->fh];
    int rc;

    (void)path;
    if (!begin())
        return -EIO;
    rc = s->ops->writev(s, &(struct iovec){(void *)buf, n}, 1, (uint64_t)at);
    return end(rc < 0 ? rc : (int)n);
}

static int op_fallocate(const char *path, int mode, off_t at, off_t n, struct fuse_file_info *fi)
{
    struct store *s = store[fi->fh];

    (void)path;
    if (mode & ~(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE))
        return -EOPNOTSUPP;
    if (!begin())
        return -EIO;
    return end(mode & FALLOC_FL_PUNCH_HOLE ? s->ops->punch(s, (uint64_t)at, (uint64_t)n)
                                           : s->ops->grow(s, (uint64_t)(at + n)));
}

static int op_fsync(const char *path, int datasync, struct fuse_file_info *fi)
{
    struct store *s = store[fi->fh];
    int rc;

    (void)path, (void)datasync;
    if (!begin())
        return -EIO;
    rc = s->ops->sync(s);
    end(0);
    /* Between the two the power may go: then it was flushed and nobody was told. */
    pthread_rwlock_wrlock(&power);
    if (off)
        rc = -EIO;
    else
        settle();
    return end(rc);
}

static void *op_init(struct fuse_conn_info *conn, struct fuse_config *config)
{
    (void)conn;
    config->attr_timeout = config->entry_timeout = 0;
    config->kernel_cache = 0;
    return NULL;
}

static const struct fuse_operations ops = {
    .init = op_init,
    .getattr = op_getattr,
    .open = op_open,
    .create = op_create,
    .read = op_read,
    .write = op_write,
    .fallocate = op_fallocate,
    .fsync = op_fsync,
};

/* --- main --- */

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"seed", 1, 0, 's'}, {"sync-us", 1, 0, 'u'}, {"lie", 1, 0, 'l'}, {0, 0, 0, 0}};
    static sigset_t set;
    char *fuse_argv[] = {"lossyfs", "-o", "allow_other", NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, fuse_argv);
    struct fuse_loop_config *config = fuse_loop_cfg_create();
    struct fuse *fuse;
    pthread_t thread;
    int c;

    crash.rng.s = (uint64_t)now_ns();
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (c == 's')
            crash.rng.s = strtoull(optarg, NULL, 0);
        else if (c == 'u')
            rec.sync_us = (unsigned)strtoul(optarg, NULL, 0);
        else if (c == 'l')
            lie = strtoul(optarg, NULL, 0);
        else
            optind = argc;
    }
    if (argc - optind != 2) {
        fprintf(stderr, "usage: lossyfs DIR MOUNTPOINT [--seed N] [--sync-us N] [--lie N]\n");
        return 2;
    }
    dir = argv[optind];
    mountpoint = argv[optind + 1];
    for (int s = 0; s < 2; s++)
        load(s);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    fuse = fuse_new(&args, &ops, sizeof(ops), NULL);
    if (!fuse || fuse_mount(fuse, mountpoint) < 0)
        die("cannot mount %s", mountpoint);
    if (pthread_create(&thread, NULL, wait_for_cut, &set) != 0)
        die("no thread");
    printf("mounted\n");
    fflush(stdout);
    fuse_loop_mt(fuse, config);
    /* Unmounted by somebody else: as a cut. */
    cut(true);
}
