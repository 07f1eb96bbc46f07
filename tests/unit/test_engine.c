/*
 * test_engine.c - what needs a certain moment or a certain state of the backing files: threads held up between two steps,
 * a sync that fails beside another, a volume that is full of single blocks, damage met by recovery.
 *
 * Volumes in memory (recstore.h) below stores that call a hook before each write, sync and drop.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "tests/crash/recstore.h"

#include <semaphore.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOT VOLUME_ROOT_INO

static const uint8_t volume_id[VOLUME_ID_BYTES] = "engine";

/* --- the volume under test --- */

struct fixture;
/* Called before the call goes on; negative: it fails so. */
typedef int (*hook_fn)(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len);

struct fixture {
    struct key *key;
    struct image *image[2];
    struct volume *v;
    hook_fn hook;
    unsigned damage;
    unsigned lines;
    /* For hooks. */
    atomic_bool armed;
    atomic_uint supers;
    sem_t entered, go_on;
    uint64_t last_off; /* of the last write to data */
    int log_writes;    /* that succeed before they fail; below 0: all do */
};

struct hooked {
    struct store s;
    struct store *below;
    struct fixture *f;
    int id;
};

static int hooked_readv(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    struct store *below = ((struct hooked *)s)->below;

    return below->ops->readv(below, iov, niov, off);
}

static int call_hook(struct store *s, enum event_kind kind, uint64_t off, uint64_t len)
{
    struct hooked *h = (struct hooked *)s;

    return h->f->hook ? h->f->hook(h->f, kind, h->id, off, len) : 0;
}

static int hooked_writev(struct store *s, struct iovec *iov, int niov, uint64_t off)
{
    struct store *below = ((struct hooked *)s)->below;
    uint64_t len = 0;
    int rc;

    for (int i = 0; i < niov; i++)
        len += iov[i].iov_len;
    rc = call_hook(s, EVENT_WRITE, off, len);
    return rc < 0 ? rc : below->ops->writev(below, iov, niov, off);
}

static int hooked_sync(struct store *s)
{
    return call_hook(s, EVENT_SYNC, 0, 0);
}

static void hooked_writeback(struct store *s, uint64_t off, uint64_t len)
{
    (void)s, (void)off, (void)len;
}

static int hooked_grow(struct store *s, uint64_t size)
{
    struct store *below = ((struct hooked *)s)->below;
    int rc = call_hook(s, EVENT_GROW, 0, size);

    return rc < 0 ? rc : below->ops->grow(below, size);
}

static int64_t hooked_size(struct store *s)
{
    struct store *below = ((struct hooked *)s)->below;

    return below->ops->size(below);
}

static void hooked_close(struct store *s)
{
    struct store *below = ((struct hooked *)s)->below;

    below->ops->close(below);
    free(s);
}

static struct store *hooked_new(struct fixture *f, int id)
{
    static const struct store_ops ops = {
        .readv = hooked_readv,
        .writev = hooked_writev,
        .sync = hooked_sync,
        .writeback = hooked_writeback,
        .grow = hooked_grow,
        .size = hooked_size,
        .close = hooked_close,
    };
    struct hooked *h = xcalloc(1, sizeof(*h));

    *h = (struct hooked){.s = {&ops}, .below = mstore_new(f->image[id], NULL, NULL, id), .f = f, .id = id};
    return &h->s;
}

static void on_damage(void *ctx, const char *what)
{
    (void)what;
    ((struct fixture *)ctx)->damage++;
}

static void on_line(void *ctx, const char *text)
{
    if (((struct fixture *)ctx)->lines++ < 5)
        print_message("check: %s\n", text);
}

static int try_open(struct fixture *f)
{
    struct volume_options o = {.cache_bytes = 1 << 20, .mount_id = 1, .on_damage = on_damage, .ctx = f};

    f->damage = 0;
    return volume_open(hooked_new(f, 0), hooked_new(f, 1), f->key, volume_id, &o, &f->v);
}

/* As after kill -9. */
static void reopen(struct fixture *f)
{
    volume_abandon(f->v);
    assert_int_equal(try_open(f), 0);
}

static void check_clean(struct fixture *f)
{
    f->lines = 0;
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    assert_int_equal(f->lines, 0);
}

static int setup_size(void **state, uint64_t limit)
{
    struct volume_params p = {.block_size = 4096, .size_limit = limit, .log_segment = 256 << 10, .root_mode = 0755};
    struct fixture *f = calloc(1, sizeof(*f));
    struct store *data, *log;

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    memset(f->key->b, 0x17, sizeof(f->key->b));
    memcpy(p.id, volume_id, sizeof(p.id));
    sem_init(&f->entered, 0, 0);
    sem_init(&f->go_on, 0, 0);
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    data = hooked_new(f, 0);
    log = hooked_new(f, 1);
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    assert_int_equal(try_open(f), 0);
    return 0;
}

static int setup(void **state)
{
    return setup_size(state, 64ull << 20);
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    if (f->v)
        volume_abandon(f->v);
    image_free(f->image[0]);
    image_free(f->image[1]);
    sem_destroy(&f->entered);
    sem_destroy(&f->go_on);
    key_free(&f->key);
    free(f);
    return 0;
}

/* --- operations, some in threads of their own --- */

static int make(struct fixture *f, const char *name, const void *buf, size_t n, uint64_t *ret_ino)
{
    struct vattr a;
    int rc = vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a);
    ssize_t w;

    if (rc < 0)
        return rc;
    vol_forget(f->v, a.ino, 1);
    if (ret_ino)
        *ret_ino = a.ino;
    w = n ? vol_write(f->v, a.ino, 0, buf, n) : 0;
    return w < 0 ? (int)w : 0;
}

static bool exists(struct fixture *f, const char *name)
{
    struct vattr a;

    if (vol_lookup(f->v, ROOT, name, &a) < 0)
        return false;
    vol_forget(f->v, a.ino, 1);
    return true;
}

struct job {
    pthread_t thread;
    struct fixture *f;
    const char *name; /* NULL: a checkpoint */
    uint64_t sync;    /* not 0: fsync of this inode */
    size_t n;
    int rc;
};

static void *run_job(void *arg)
{
    static const uint8_t zero[1 << 20];
    struct job *j = arg;

    if (j->sync)
        j->rc = vol_fsync(j->f->v, j->sync, false);
    else
        j->rc = j->name ? make(j->f, j->name, zero, j->n, NULL) : volume_checkpoint(j->f->v);
    return NULL;
}

/* Starts a job and gives it the time to end or to be held up. */
static void start(struct job *j)
{
    assert_int_equal(pthread_create(&j->thread, NULL, run_job, j), 0);
    usleep(50000);
}

/* --- threads that are held up --- */

static int hold_log_write(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    (void)off, (void)len;
    if (store == 1 && kind == EVENT_WRITE && atomic_exchange(&f->armed, false)) {
        sem_post(&f->entered);
        sem_wait(&f->go_on);
    }
    return 0;
}

/* A thread that sleeps between log_reserve and its write, while two checkpoints pass: its record must not be written over
 * one of the generation that has the segment then. */
static void test_late_record(void **state)
{
    struct fixture *f = *state;
    struct job late = {.f = f, .name = "late"}, first = {.f = f}, between = {.f = f, .name = "between"};
    struct job second = {.f = f}, last = {.f = f, .name = "last"};

    f->hook = hold_log_write;
    f->armed = true;
    start(&late);
    sem_wait(&f->entered);
    start(&first);
    start(&between);
    start(&second);
    start(&last);
    sem_post(&f->go_on);
    pthread_join(late.thread, NULL);
    pthread_join(first.thread, NULL);
    pthread_join(between.thread, NULL);
    pthread_join(second.thread, NULL);
    pthread_join(last.thread, NULL);
    assert_int_equal(late.rc | first.rc | between.rc | second.rc | last.rc, 0);
    assert_int_equal(vol_sync(f->v), 0);
    reopen(f);
    assert_true(exists(f, "late"));
    assert_true(exists(f, "between"));
    assert_true(exists(f, "last"));
    check_clean(f);
}

static int fail_first_sync(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    (void)len;
    if (store == 0 && kind == EVENT_WRITE && off % (32u << 20) <= UNIT_BYTES)
        f->supers++;
    if (store == 0 && kind == EVENT_SYNC && atomic_exchange(&f->armed, false)) {
        sem_post(&f->entered);
        sem_wait(&f->go_on);
        return -EIO;
    }
    return 0;
}

/* The kernel reports a failed writeback to one fdatasync: a checkpoint whose own sync of `data` returns 0 while an fsync's
 * fails must not make a superblock. */
static void test_shared_sync_error(void **state)
{
    static const uint8_t buf[8192] = {1};
    struct fixture *f = *state;
    struct job fsync = {.f = f}, checkpoint = {.f = f};

    assert_int_equal(make(f, "file", buf, sizeof(buf), &fsync.sync), 0);
    f->hook = fail_first_sync;
    f->armed = true;
    start(&fsync);
    sem_wait(&f->entered);
    start(&checkpoint);
    sem_post(&f->go_on);
    pthread_join(fsync.thread, NULL);
    pthread_join(checkpoint.thread, NULL);
    assert_int_equal(fsync.rc, -EIO);
    assert_int_equal(checkpoint.rc, -EIO);
    assert_int_equal(f->supers, 0);
    assert_int_equal(vol_sync(f->v), -EIO);
    f->hook = NULL;
    reopen(f);
    check_clean(f);
}

/* --- a full volume --- */

static void name_of(char name[32], const char *what, unsigned k)
{
    snprintf(name, 32, "%s%u", what, k);
}

/* Makes files of n bytes until there is no room. */
static unsigned fill(struct fixture *f, const char *what, unsigned n)
{
    static const uint8_t buf[1 << 20] = {7};
    char name[32];
    unsigned k;
    int rc = 0;

    for (k = 0; rc == 0; k++) {
        name_of(name, what, k);
        rc = make(f, name, buf, n, NULL);
    }
    if (rc != -ENOSPC)
        print_message("%s: file %u: %s\n", what, k, strerror(-rc));
    assert_int_equal(rc, -ENOSPC);
    return k;
}

static void remove_every(struct fixture *f, const char *what, unsigned n, unsigned step)
{
    char name[32];

    for (unsigned k = 0; k < n; k += step) {
        int rc;

        name_of(name, what, k);
        rc = vol_unlink(f->v, ROOT, name);
        if (rc < 0 && rc != -ENOENT)
            print_message("unlink of %s: %s\n", name, strerror(-rc));
        assert_true(rc == 0 || rc == -ENOENT);
    }
}

/* Free space in pieces smaller than a node, all over the volume: checkpoints and deletes must go on. */
static void test_fragmented(void **state)
{
    struct fixture *f = *state;
    struct volume_stat st;
    char what[16];
    unsigned n = fill(f, "a", 3000), made;

    for (unsigned round = 0; round < 4; round++) {
        remove_every(f, round ? what : "a", n, round % 2 ? 3 : 2);
        assert_int_equal(volume_checkpoint(f->v), 0);
        snprintf(what, sizeof(what), "r%u-", round);
        made = fill(f, what, 3000);
        assert_int_equal(volume_checkpoint(f->v), 0);
        if (round == 0 && made < n / 4)
            print_message("only %u of %u files fit where %u were removed\n", made, n, n / 2);
        n = MAX(n, made);
    }
    volume_stat(f->v, &st);
    assert_false(st.failed);
    reopen(f);
    check_clean(f);
    for (unsigned round = 0; round < 4; round++) {
        snprintf(what, sizeof(what), "r%u-", round);
        remove_every(f, what, n, 1);
    }
    remove_every(f, "a", n, 1);
    assert_int_equal(volume_checkpoint(f->v), 0);
    n = fill(f, "big", 1 << 20);
    assert_true(n >= 55);
    check_clean(f);
    assert_int_equal(f->damage, 0);
}

static int hold_super_sync(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    (void)len;
    if (store == 0 && kind == EVENT_WRITE && off % (32u << 20) <= UNIT_BYTES)
        f->supers++;
    if (store == 0 && kind == EVENT_SYNC && f->supers == 2 && atomic_exchange(&f->armed, false)) {
        sem_post(&f->entered);
        sem_wait(&f->go_on);
    }
    return 0;
}

/* Space is freed by a checkpoint that is under way: that is worth waiting for before ENOSPC is answered. */
static void test_room_is_coming(void **state)
{
    struct fixture *f = *state;
    struct job checkpoint = {.f = f}, writer = {.f = f, .name = "writer", .n = 1 << 20};
    unsigned n = fill(f, "a", 1 << 20);

    assert_int_equal(volume_checkpoint(f->v), 0);
    remove_every(f, "a", n, 4);
    f->hook = hold_super_sync;
    f->armed = true;
    start(&checkpoint);
    sem_wait(&f->entered);
    start(&writer);
    sem_post(&f->go_on);
    pthread_join(checkpoint.thread, NULL);
    pthread_join(writer.thread, NULL);
    f->hook = NULL;
    assert_int_equal(checkpoint.rc, 0);
    assert_int_equal(writer.rc, 0);
}

/* fallocate, too, answers ENOSPC only after a checkpoint. */
static void test_fallocate_room(void **state)
{
    struct fixture *f = *state;
    unsigned n = fill(f, "a", 1 << 20);
    uint64_t ino = 0;

    assert_int_equal(volume_checkpoint(f->v), 0);
    assert_int_equal(vol_unlink(f->v, ROOT, "a0"), 0);
    assert_int_equal(make(f, "file", NULL, 0, &ino), 0);
    assert_int_equal(volume_checkpoint(f->v), 0);
    remove_every(f, "a", n, 2);
    assert_int_equal(vol_fallocate(f->v, ino, 0, 0, 10 << 20), 0);
    assert_int_equal(vol_fallocate(f->v, ino, 0, 0, 63 << 20), -ENOSPC);
}

/* --- damage that recovery meets --- */

/* Records follow the superblock, and one unit of `data` is damaged: only the root and what has no second copy is worth
 * refusing the volume for; the rest is readable. */
static void test_recovery_with_damage(void **state)
{
    static const uint8_t buf[5000] = {3};
    struct fixture *f = *state;
    struct image *was[2];
    unsigned refused = 0, read_only = 0, opened = 0;
    char name[32];

    for (unsigned k = 0; k < 600; k++) {
        name_of(name, "file", k);
        assert_int_equal(make(f, name, buf, k % 3 ? 100 : sizeof(buf), NULL), 0);
    }
    assert_int_equal(volume_checkpoint(f->v), 0);
    for (unsigned k = 0; k < 600; k += 20) {
        name_of(name, "file", k);
        assert_int_equal(vol_unlink(f->v, ROOT, name), 0);
        name_of(name, "new", k);
        assert_int_equal(make(f, name, buf, sizeof(buf), NULL), 0);
    }
    assert_int_equal(vol_sync(f->v), 0);
    volume_abandon(f->v);
    f->v = NULL;
    was[0] = f->image[0];
    was[1] = f->image[1];
    for (uint64_t u = 0; u < 2000; u++) {
        uint8_t byte;

        if (image_page(was[0], u) == image_zero)
            continue;
        f->image[0] = image_new(was[0]);
        f->image[1] = image_new(was[1]);
        image_read(was[0], u * UNIT_BYTES + 77, &byte, 1);
        byte ^= 4;
        image_write(f->image[0], u * UNIT_BYTES + 77, &byte, 1);
        if (try_open(f) < 0) {
            refused++;
        } else {
            struct vattr a, in = {.mode = 0700};
            int rc = vol_setattr(f->v, ROOT, VOL_SET_MODE, &in, &a);

            opened++;
            read_only += rc == -EROFS;
            assert_true(rc != -EROFS || f->damage > 0);
            volume_abandon(f->v);
        }
        f->v = NULL;
        image_free(f->image[0]);
        image_free(f->image[1]);
    }
    f->image[0] = was[0];
    f->image[1] = was[1];
    print_message("one unit damaged: %u opened, %u of them read-only, %u refused\n", opened, read_only, refused);
    assert_true(refused <= NODE_UNITS);
    assert_true(read_only > 0);
}

static int hold_first_sync(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    (void)off, (void)len;
    if (store == 0 && kind == EVENT_SYNC && atomic_exchange(&f->armed, false)) {
        sem_post(&f->entered);
        sem_wait(&f->go_on);
    }
    return 0;
}

/*
 * Records a, b and c are written while a checkpoint is under way, then the power is cut, and a is lost: all three are
 * dropped. b and c still stand in the log behind the place where the next record goes, with the sequence numbers that would
 * follow it: they must never be believed again.
 */
static void test_stale_records(void **state)
{
    struct fixture *f = *state;
    struct job checkpoint = {.f = f};
    struct image *live[2] = {f->image[0], f->image[1]};
    struct volume *v = f->v;
    struct volume_stat st;

    assert_int_equal(make(f, "before", NULL, 0, NULL), 0);
    f->hook = hold_first_sync;
    f->armed = true;
    start(&checkpoint);
    sem_wait(&f->entered);
    assert_int_equal(make(f, "a", NULL, 0, NULL), 0);
    assert_int_equal(make(f, "b", NULL, 0, NULL), 0);
    assert_int_equal(make(f, "c", NULL, 0, NULL), 0);
    volume_stat(v, &st);
    f->hook = NULL;
    f->image[0] = image_copy(live[0]);
    f->image[1] = image_copy(live[1]);
    image_write(f->image[1], st.generation % 2 * (256 << 10), NULL, SECTOR_BYTES);
    assert_int_equal(try_open(f), 0);
    assert_true(exists(f, "before"));
    assert_false(exists(f, "a"));
    assert_false(exists(f, "b"));
    assert_int_equal(make(f, "x", NULL, 0, NULL), 0);
    reopen(f);
    assert_int_equal(f->damage, 0);
    assert_true(exists(f, "before"));
    assert_true(exists(f, "x"));
    assert_false(exists(f, "b"));
    assert_false(exists(f, "c"));
    check_clean(f);
    volume_abandon(f->v);
    for (int s = 0; s < 2; s++) {
        image_free(f->image[s]);
        f->image[s] = live[s];
    }
    f->v = v;
    sem_post(&f->go_on);
    pthread_join(checkpoint.thread, NULL);
}

static int fail_log_writes(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    (void)off, (void)len;
    if (store == 1 && kind == EVENT_WRITE && f->log_writes >= 0 && f->log_writes-- <= 0) {
        f->log_writes = 0;
        return -EIO;
    }
    return 0;
}

/* A truncation, and the end of a file, of many ranges take several transactions: wherever they are cut off, recovery brings
 * them to their end. */
static void test_long_truncation(void **state)
{
    static const uint8_t block[4096] = {9};
    struct fixture *f = *state;
    struct vattr a, in = {.size = 5000};
    struct volume_stat st;
    unsigned shrunk = 0, gone = 0;

    for (int n = 0; n < 12; n++) {
        bool unlink = n % 2;
        uint64_t ino = 0;
        int rc;

        assert_int_equal(make(f, "file", NULL, 0, &ino), 0);
        for (unsigned k = 0; k < 400; k++)
            assert_int_equal(vol_write(f->v, ino, k * 2 * 4096, block, sizeof(block)), sizeof(block));
        assert_int_equal(volume_checkpoint(f->v), 0);
        f->hook = fail_log_writes;
        f->log_writes = n / 2;
        rc = unlink ? vol_unlink(f->v, ROOT, "file") : vol_setattr(f->v, ino, VOL_SET_SIZE, &in, &a);
        assert_true(rc == -EIO || n / 2 > 0);
        f->hook = NULL;
        f->log_writes = -1;
        reopen(f);
        assert_int_equal(f->damage, 0);
        check_clean(f);
        if (vol_lookup(f->v, ROOT, "file", &a) == 0) {
            vol_forget(f->v, a.ino, 1);
            assert_true(a.size == 5000 || a.size == 799 * 4096);
            assert_int_equal(a.blocks, a.size == 5000 ? 8 : 400 * 8);
            shrunk += a.size == 5000;
            assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
        } else {
            gone++;
        }
        assert_int_equal(volume_checkpoint(f->v), 0);
        volume_stat(f->v, &st);
        assert_int_equal(st.inodes, 1);
        assert_true(st.used < 1 << 20);
    }
    assert_int_equal(shrunk, 5);
    assert_int_equal(gone, 5);
}

/* A write past the first block of a file that is kept in its item first makes blocks of what is there: that shows nothing
 * when the write itself is cut off. */
static void test_conversion_is_quiet(void **state)
{
    static const uint8_t buf[4096] = {5};
    struct fixture *f = *state;
    struct vattr before, after;
    uint64_t ino = 0;

    assert_int_equal(make(f, "file", buf, 700, &ino), 0);
    assert_int_equal(vol_getattr(f->v, ino, &before), 0);
    usleep(2000);
    f->hook = fail_log_writes;
    f->log_writes = 1;
    assert_int_equal(vol_write(f->v, ino, 8192, buf, sizeof(buf)), -EIO);
    f->hook = NULL;
    f->log_writes = -1;
    reopen(f);
    assert_int_equal(vol_getattr(f->v, ino, &after), 0);
    assert_int_equal(after.blocks, 8);
    /* Field by field: the struct has padding. */
    assert_int_equal(after.ino, before.ino);
    assert_int_equal(after.mode, before.mode);
    assert_int_equal(after.nlink, before.nlink);
    assert_int_equal(after.size, before.size);
    assert_true(after.atime == before.atime && after.btime == before.btime);
    assert_true(after.mtime == before.mtime && after.ctime == before.ctime);
    check_clean(f);
}

static int note_data_write(struct fixture *f, enum event_kind kind, int store, uint64_t off, uint64_t len)
{
    /* The last extent's; not what a checkpoint writes. */
    if (store == 0 && kind == EVENT_WRITE && len >= 65536)
        f->last_off = off + len - 65536;
    return 0;
}

/* An extent that was synced and is damaged reads EIO after recovery; the records after it, or it, do not vanish, wherever in
 * the log the last sync was. */
static void test_synced_then_damaged(void **state)
{
    static uint8_t buf[1 << 20];
    struct fixture *f = *state;
    uint64_t ino = 0;

    assert_int_equal(make(f, "file", buf, sizeof(buf), &ino), 0);
    for (unsigned k = 1; k < 80; k++) {
        struct image *live[2] = {f->image[0], f->image[1]};
        struct volume *v = f->v;
        uint8_t byte, first = 0;
        ssize_t n;

        /* Single blocks, so that the record of the large write over them is long: it may reach far into what the log
         * keeps free. */
        for (unsigned b = 0; b < 80 + k; b++)
            assert_int_equal(vol_write(v, ino, b * 3 % 256 * 4096, buf, 4096), 4096);
        f->hook = note_data_write;
        memset(buf, (int)k, sizeof(buf));
        assert_int_equal(vol_write(v, ino, 0, buf, sizeof(buf)), sizeof(buf));
        f->hook = NULL;
        assert_int_equal(vol_fsync(v, ino, true), 0);
        f->image[0] = image_copy(live[0]);
        f->image[1] = image_copy(live[1]);
        image_read(live[0], f->last_off + 9, &byte, 1);
        byte ^= 1;
        image_write(f->image[0], f->last_off + 9, &byte, 1);
        assert_int_equal(try_open(f), 0);
        n = vol_read(f->v, ino, 0, &first, 1);
        if (n != 1 || first != k)
            print_message("round %u: %zd, content of round %u\n", k, n, first);
        assert_true(n == 1 && first == k);
        assert_int_equal(vol_read(f->v, ino, sizeof(buf) - 65536, buf, 65536), -EIO);
        volume_abandon(f->v);
        for (int s = 0; s < 2; s++) {
            image_free(f->image[s]);
            f->image[s] = live[s];
        }
        f->v = v;
    }
}

/* --- names --- */

/* An inode that nobody refers to any more, nor names, is not to be had back by its number. */
static void test_link_of_orphan(void **state)
{
    struct fixture *f = *state;
    struct vattr a, b;

    assert_int_equal(vol_tmpfile(f->v, ROOT, S_IFREG | 0600, 0, 0, &a), 0);
    assert_int_equal(vol_link(f->v, a.ino, ROOT, "linked", &b), 0);
    vol_forget(f->v, a.ino, 2);
    assert_true(exists(f, "linked"));
    assert_int_equal(vol_tmpfile(f->v, ROOT, S_IFREG | 0600, 0, 0, &a), 0);
    /* As if the thread that forgot it were between dropping the reference and destroying it. */
    f->hook = NULL;
    vol_forget(f->v, a.ino, 1);
    assert_int_equal(vol_link(f->v, a.ino, ROOT, "again", &b), -ENOENT);
    check_clean(f);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_late_record),         TEST(test_shared_sync_error), TEST(test_fragmented),
        TEST(test_room_is_coming),      TEST(test_fallocate_room),    TEST(test_recovery_with_damage),
        TEST(test_stale_records),       TEST(test_long_truncation),   TEST(test_conversion_is_quiet),
        TEST(test_synced_then_damaged), TEST(test_link_of_orphan),
    };

    alarm(900); /* it may run at the lowest priority */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
