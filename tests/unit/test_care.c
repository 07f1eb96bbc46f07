/*
 * test_care.c - looking after a volume: check and scrub while it is written, repair, resize. (tests/attack/tamper
 * repairs every damaged image.)
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "coffer/export.h"
#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "tests/crash/recstore.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOT VOLUME_ROOT_INO
#define MIB  (1u << 20)

static const uint8_t volume_id[VOLUME_ID_BYTES] = "care";

struct fixture {
    struct key *key;
    struct image *image[2];
    struct volume *v;
    atomic_uint damage;
    unsigned lines;
    char last[300];
    atomic_bool stop;
};

static void on_damage(void *ctx, const char *what)
{
    struct fixture *f = ctx;

    (void)what;
    f->damage++;
}

static void on_line(void *ctx, const char *text)
{
    struct fixture *f = ctx;

    f->lines++;
    snprintf(f->last, sizeof(f->last), "%s", text);
}

static int try_open(struct fixture *f)
{
    struct volume_options o = {.cache_bytes = 1 << 20, .mount_id = 1, .on_damage = on_damage, .ctx = f};

    return volume_open(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key,
                       volume_id, &o, &f->v);
}

static int setup(void **state)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 64 << 20, .log_segment = 256 << 10, .root_mode = 0755};
    struct fixture *f = calloc(1, sizeof(*f));
    struct store *data, *log;

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    memset(f->key->b, 0x21, sizeof(f->key->b));
    memcpy(p.id, volume_id, sizeof(p.id));
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    data = mstore_new(f->image[0], NULL, NULL, 0);
    log = mstore_new(f->image[1], NULL, NULL, 1);
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    assert_int_equal(try_open(f), 0);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    if (f->v)
        volume_abandon(f->v);
    image_free(f->image[0]);
    image_free(f->image[1]);
    key_free(&f->key);
    free(f);
    return 0;
}

static uint64_t make(struct fixture *f, const char *name, int fill, size_t n)
{
    uint8_t *buf = malloc(n + 1);
    struct vattr a;

    memset(buf, fill, n);
    assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a), 0);
    assert_int_equal(vol_write(f->v, a.ino, 0, buf, n), (ssize_t)n);
    free(buf);
    return a.ino;
}

/* The address in `data` of the last chunk before byte `to` that a flipped bit in makes fail. Finds the content by
 * trying: flips a byte of each unit until reading the file fails. */
static uint64_t find_unit(struct fixture *f, uint64_t ino, uint64_t off)
{
    uint8_t byte, buf[4096];

    for (uint64_t unit = 2; unit < 16384; unit++) {
        ssize_t n;

        image_read(f->image[0], unit * 4096, &byte, 1);
        byte ^= 1;
        image_write(f->image[0], unit * 4096, &byte, 1);
        n = vol_read(f->v, ino, off, buf, sizeof(buf));
        byte ^= 1;
        image_write(f->image[0], unit * 4096, &byte, 1);
        if (n == -EIO)
            return unit;
    }
    fail();
    return 0;
}

static void flip(struct fixture *f, uint64_t unit)
{
    uint8_t byte;

    image_read(f->image[0], unit * 4096 + 7, &byte, 1);
    byte ^= 4;
    image_write(f->image[0], unit * 4096 + 7, &byte, 1);
}

/* --- in use --- */

static void *writer(void *arg)
{
    static uint8_t buf[256 << 10];
    struct fixture *f = arg;
    struct vattr a;

    for (unsigned k = 0; !f->stop; k++) {
        char name[24];

        snprintf(name, sizeof(name), "w%u", k % 40);
        vol_unlink(f->v, ROOT, name);
        if (vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a) < 0)
            continue;
        memset(buf, (int)k, sizeof(buf));
        assert_true(vol_write(f->v, a.ino, 0, buf, k % 7 ? sizeof(buf) : 700) > 0);
        vol_forget(f->v, a.ino, 1);
    }
    return NULL;
}

static void test_check_in_use(void **state)
{
    struct fixture *f = *state;
    unsigned whole = 0;
    pthread_t t;

    for (unsigned k = 0; k < 20; k++) {
        char name[24];

        snprintf(name, sizeof(name), "old%u", k);
        make(f, name, (int)k, 200000);
    }
    assert_int_equal(pthread_create(&t, NULL, writer, f), 0);
    for (unsigned k = 0; k < 30; k++) {
        int rc = volume_check(f->v, true, on_line, f);

        if (rc != 0 && rc != -EBUSY)
            print_message("check: %d: %s\n", rc, f->last);
        assert_true(rc == 0 || rc == -EBUSY);
        whole += rc == 0;
    }
    f->stop = true;
    pthread_join(t, NULL);
    assert_true(whole > 0);
    assert_int_equal(f->damage, 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
}

/* A generation that is held does not fail the volume when it fills up: the hold goes. */
static void test_hold_gives_way(void **state)
{
    struct fixture *f = *state;
    struct volume_scrub at = {0};
    static uint8_t buf[MIB];
    uint64_t ino = make(f, "big", 1, 1);
    pthread_t t;

    assert_int_equal(pthread_create(&t, NULL, writer, f), 0);
    for (unsigned k = 0; k < 60; k++) {
        ssize_t n = vol_write(f->v, ino, (uint64_t)(k % 30) * MIB, buf, sizeof(buf));
        int rc;

        assert_true(n == (ssize_t)sizeof(buf) || n == -ENOSPC);
        rc = volume_check(f->v, k % 8 == 0, on_line, f);
        assert_true(rc == 0 || rc == -EBUSY);
        rc = volume_scrub_step(f->v, &at, 4 << 20);
        if (rc == 0)
            at = (struct volume_scrub){0};
    }
    f->stop = true;
    pthread_join(t, NULL);
    assert_int_equal(f->damage, 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
}

static unsigned scrub(struct fixture *f, uint64_t step)
{
    struct volume_scrub at = {0};

    for (unsigned n = 0; volume_scrub_step(f->v, &at, step); n++)
        assert_true(n < 1000000 && at.done <= at.total);
    assert_true(at.done == at.total && at.total > 0);
    return at.findings;
}

static void test_scrub(void **state)
{
    struct fixture *f = *state;
    uint64_t ino = make(f, "file", 3, 300000), unit;

    for (unsigned k = 0; k < 2000; k++) {
        char name[24];
        struct vattr a;

        snprintf(name, sizeof(name), "n%u", k);
        assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a), 0);
        vol_forget(f->v, a.ino, 1);
    }
    assert_int_equal(volume_checkpoint(f->v), 0);
    assert_int_equal(scrub(f, 100000), 0);
    assert_int_equal(scrub(f, 1u << 30), 0);
    assert_int_equal(f->damage, 0);
    unit = find_unit(f, ino, 100000);
    f->damage = 0;
    flip(f, unit);
    assert_int_equal(scrub(f, 100000), 1);
    assert_int_equal(f->damage, 1);
    flip(f, unit);
    /* Each unit in use but for the superblock's older copies: damage of it is found, and a scrub ends all the same. */
    for (unit = 2; unit < 200; unit++) {
        unsigned found;

        flip(f, unit);
        found = scrub(f, 1u << 30);
        f->lines = 0;
        assert_int_equal(volume_check(f->v, true, on_line, f) > 0, found > 0);
        flip(f, unit);
    }
    assert_int_equal(scrub(f, 100000), 0);
}

/* --- repair --- */

static int repair(struct fixture *f)
{
    struct volume_report r = {.line = on_line, .ctx = f};
    int rc;

    f->lines = 0;
    rc = volume_repair(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key,
                       volume_id, &(struct volume_options){0}, &r);
    assert_int_equal(rc, f->lines);
    assert_int_equal(try_open(f), 0);
    f->lines = 0;
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    return rc;
}

static void test_repair_content(void **state)
{
    struct fixture *f = *state;
    uint64_t ino = make(f, "file", 5, 300000), other = make(f, "other", 6, 100000), unit;
    struct volume_stat before, after;
    uint8_t buf[4096];
    struct vattr a;

    assert_int_equal(volume_close(f->v), 0);
    assert_int_equal(repair(f), 0);
    unit = find_unit(f, ino, 8192);
    volume_stat(f->v, &before);
    volume_abandon(f->v);
    flip(f, unit);
    assert_int_equal(repair(f), 1);
    assert_non_null(strstr(f->last, "blocks 2 to 2"));
    volume_stat(f->v, &after);
    assert_int_equal(after.used, before.used - 4096);
    assert_int_equal(vol_read(f->v, ino, 8192, buf, 4096), -EIO);
    assert_int_equal(vol_read(f->v, ino, 4096, buf, 4096), 4096);
    assert_int_equal(vol_read(f->v, ino, 12288, buf, 4096), 4096);
    assert_int_equal(buf[0], 5);
    assert_int_equal(vol_read(f->v, other, 0, buf, 4096), 4096);
    assert_int_equal(vol_write(f->v, ino, 8200, "x", 1), -EIO); /* the rest of the block is not known */
    memset(buf, 9, sizeof(buf));
    assert_int_equal(vol_write(f->v, ino, 8192, buf, 4096), 4096);
    assert_int_equal(vol_read(f->v, ino, 8192, buf, 4096), 4096);
    assert_int_equal(buf[100], 9);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    /* A second repair finds nothing; lost blocks can be cut off, too. */
    volume_abandon(f->v);
    assert_int_equal(repair(f), 0);
    unit = find_unit(f, ino, 200000);
    volume_abandon(f->v);
    flip(f, unit);
    assert_int_equal(repair(f), 1);
    a.size = 5000;
    assert_int_equal(vol_setattr(f->v, ino, VOL_SET_SIZE, &a, &a), 0);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
}

static int find_numbered(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie,
                         const struct vattr *a)
{
    (void)ino, (void)type, (void)cookie, (void)a;
    *(unsigned *)ctx += name[0] == '#';
    return 0;
}

/* Every node in turn: what is kept is listed, names that are lost are in lost+found, and the other repair finds
 * nothing. */
static void test_repair_names(void **state)
{
    struct fixture *f = *state;
    struct image *saved[2];
    unsigned found_names = 0, repairs = 0;

    for (unsigned k = 0; k < 1500; k++) {
        char name[40];
        struct vattr a;

        snprintf(name, sizeof(name), "a-name-that-fills-leaves-%u", k);
        assert_int_equal(vol_mknod(f->v, ROOT, name, k % 10 ? S_IFREG | 0600 : S_IFDIR | 0700, 0, 0, 0, &a), 0);
        if (k % 10)
            assert_int_equal(vol_write(f->v, a.ino, 0, name, 20), 20);
        vol_forget(f->v, a.ino, 1);
    }
    assert_int_equal(volume_close(f->v), 0);
    saved[0] = f->image[0];
    saved[1] = f->image[1];
    for (uint64_t unit = 2; unit < 400; unit += 3) {
        struct vattr a;

        f->image[0] = image_copy(saved[0]);
        f->image[1] = image_copy(saved[1]);
        f->v = NULL;
        flip(f, unit);
        if (try_open(f) < 0) {
            image_free(f->image[0]);
            image_free(f->image[1]);
            continue; /* the root */
        }
        volume_abandon(f->v);
        repairs += repair(f) > 0;
        if (vol_lookup(f->v, ROOT, "lost+found", &a) == 0)
            assert_int_equal(vol_readdir(f->v, a.ino, 0, false, find_numbered, &found_names), 0);
        volume_abandon(f->v);
        assert_int_equal(repair(f), 0);
        volume_abandon(f->v);
        image_free(f->image[0]);
        image_free(f->image[1]);
    }
    f->image[0] = saved[0];
    f->image[1] = saved[1];
    f->v = NULL;
    assert_true(repairs > 10 && found_names > 1000);
}

/* --- resize --- */

static void test_resize(void **state)
{
    static uint8_t buf[MIB];
    struct fixture *f = *state;
    struct volume_params p;
    uint64_t ino = make(f, "file", 1, 1);
    unsigned n = 0;

    while (vol_write(f->v, ino, (uint64_t)n * MIB, buf, sizeof(buf)) > 0)
        n++;
    assert_true(n > 40 && n < 64);
    assert_int_equal(volume_resize(f->v, 32 << 20), -EINVAL);
    assert_int_equal(volume_resize(f->v, 200 << 20), 0);
    while (vol_write(f->v, ino, (uint64_t)n * MIB, buf, sizeof(buf)) > 0)
        n++;
    assert_true(n > 170 && n < 200);
    assert_int_equal(volume_resize(f->v, 100 << 20), -ENOSPC);
    volume_get_params(f->v, &p);
    assert_int_equal(p.size_limit, 200 << 20);
    assert_int_equal(vol_unlink(f->v, ROOT, "file"), 0);
    vol_forget(f->v, ino, 1);
    assert_int_equal(volume_resize(f->v, 64 << 20), 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    volume_abandon(f->v);
    assert_int_equal(try_open(f), 0);
    volume_get_params(f->v, &p);
    assert_int_equal(p.size_limit, 64 << 20);
    ino = make(f, "again", 1, 1);
    for (n = 0; vol_write(f->v, ino, (uint64_t)n * MIB, buf, sizeof(buf)) > 0;)
        n++;
    assert_true(n > 40 && n < 64);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
}

/* --- giving space back --- */

static uint64_t blocks_of(int fd)
{
    struct stat st;

    assert_int_equal(fstat(fd, &st), 0);
    return (uint64_t)st.st_blocks * 512;
}

/* On real files: what a removed file held leaves the backing file, and comes back when it is needed. */
static void test_give_back(void **state)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 256 << 20, .log_segment = 256 << 10, .root_mode = 0755};
    char path[] = "care-XXXXXX", logpath[] = "care-XXXXXX";
    int fd = mkstemp(path), logfd = mkstemp(logpath);
    struct fixture *f = *state;
    struct volume_options o = {.on_damage = on_damage, .ctx = f};
    static uint8_t buf[MIB], have[MIB];
    struct store *data, *log;
    uint64_t full, less;

    assert_true(fd >= 0 && logfd >= 0);
    unlink(path);
    unlink(logpath);
    memcpy(p.id, volume_id, sizeof(p.id));
    volume_abandon(f->v);
    f->v = NULL;
    data = store_fd_take(dup(fd));
    log = store_fd_take(dup(logfd));
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    for (int life = 0; life < 3; life++) {
        uint64_t ino, keep;

        assert_int_equal(volume_open(store_fd_take(dup(fd)), store_fd_take(dup(logfd)), f->key, volume_id, &o, &f->v),
                         0);
        keep = make(f, life == 0 ? "keep0" : life == 1 ? "keep1" : "keep2", life, MIB);
        ino = make(f, "big", 1, 1);
        for (unsigned k = 0; k < 180; k++) {
            memset(buf, (int)k, sizeof(buf));
            assert_int_equal(vol_write(f->v, ino, (uint64_t)k * MIB, buf, sizeof(buf)), sizeof(buf));
        }
        full = blocks_of(fd);
        assert_true(full > 180u * MIB);
        for (unsigned k = 0; k < 180; k += 31) {
            memset(buf, (int)k, sizeof(buf));
            assert_int_equal(vol_read(f->v, ino, (uint64_t)k * MIB, have, sizeof(have)), sizeof(have));
            assert_memory_equal(buf, have, sizeof(have));
        }
        assert_int_equal(vol_unlink(f->v, ROOT, "big"), 0);
        vol_forget(f->v, ino, 1);
        assert_int_equal(volume_checkpoint(f->v), 0);
        assert_int_equal(volume_checkpoint(f->v), 0);
        less = blocks_of(fd);
        if (less + 100u * MIB > full)
            print_message("life %d: %llu, then %llu\n", life, (unsigned long long)full, (unsigned long long)less);
        assert_true(less + 100u * MIB < full);
        assert_int_equal(vol_read(f->v, keep, 0, have, MIB), MIB);
        assert_int_equal(have[77], life);
        assert_int_equal(volume_check(f->v, true, on_line, f), 0);
        if (life == 1)
            volume_abandon(f->v);
        else
            assert_int_equal(volume_close(f->v), 0);
        f->v = NULL;
    }
    close(fd);
    close(logfd);
}

/* --- export and import --- */

struct stream {
    uint8_t *at;
    size_t n, cap, read, end;
};

static int stream_write(void *ctx, const void *buf, size_t n)
{
    struct stream *s = ctx;

    if (s->n + n > s->cap) {
        s->cap = (s->n + n) * 2;
        s->at = realloc(s->at, s->cap);
    }
    memcpy(s->at + s->n, buf, n);
    s->n += n;
    return 0;
}

static int stream_read(void *ctx, void *buf, size_t n)
{
    struct stream *s = ctx;

    if (n > s->end - s->read)
        return -ENODATA;
    memcpy(buf, s->at + s->read, n);
    s->read += n;
    return 0;
}

static int verify(struct fixture *f, struct stream *s, size_t end, const char *secret)
{
    struct export_io io = {.read = stream_read, .ctx = s};
    struct volume_report r = {.line = on_line, .ctx = f};
    struct export_secret e = {0};
    struct volume_params p;
    int rc;

    s->read = 0;
    s->end = end;
    rc = stream_read(s, &e.head, sizeof(e.head));
    if (rc == 0)
        rc = export_secret_open(secret, strlen(secret), &e);
    return rc < 0 ? rc : export_verify(&e, &io, &p, &r);
}

static int import(struct fixture *f, struct stream *s, const char *secret)
{
    struct export_io io = {.read = stream_read, .ctx = s};
    struct volume_report r = {.line = on_line, .ctx = f};
    struct volume_params p = {0};
    struct export_secret e = {0};
    int rc;

    s->read = 0;
    s->end = s->n;
    memcpy(p.id, volume_id, sizeof(p.id));
    assert_int_equal(stream_read(s, &e.head, sizeof(e.head)), 0);
    rc = export_secret_open(secret, strlen(secret), &e);
    if (rc < 0)
        return rc;
    volume_abandon(f->v);
    f->v = NULL;
    image_free(f->image[0]);
    image_free(f->image[1]);
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    rc = volume_import(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key, &p, &e,
                       &io, &r);
    return rc < 0 ? rc : try_open(f);
}

static void test_export(void **state)
{
    static uint8_t buf[MIB], have[MIB];
    struct fixture *f = *state;
    struct volume_report r = {.line = on_line, .ctx = f};
    struct stream s = {0};
    struct export_io io = {.write = stream_write, .ctx = &s};
    struct export_secret e;
    uint64_t ino = make(f, "large", 7, MIB), lost, unit;
    struct vattr dir, a, b, was;
    char text[100];
    pthread_t t;
    int rc;

    memset(buf, 7, sizeof(buf));
    /* A hole, an odd size, a directory, links, attributes, small files, times. */
    assert_int_equal(vol_write(f->v, ino, 5 * MIB + 77, "end", 3), 3);
    assert_int_equal(vol_mknod(f->v, ROOT, "dir", S_IFDIR | 01711, 0, 3, 4, &dir), 0);
    assert_int_equal(vol_symlink(f->v, dir.ino, "symlink", "where/to", 1, 2, &a), 0);
    assert_int_equal(vol_mknod(f->v, dir.ino, "fifo", S_IFIFO | 0600, 0, 1, 2, &a), 0);
    assert_int_equal(vol_link(f->v, ino, dir.ino, "hard", &a), 0);
    assert_int_equal(vol_setxattr(f->v, ino, "user.x", "value", 5, 0), 0);
    for (unsigned k = 0; k < 500; k++) {
        snprintf(text, sizeof(text), "small-%u", k);
        assert_int_equal(vol_mknod(f->v, dir.ino, text, S_IFREG | 0640, 0, k, k, &a), 0);
        assert_int_equal(vol_write(f->v, a.ino, 0, text, strlen(text)), (ssize_t)strlen(text));
        vol_forget(f->v, a.ino, 1);
    }
    lost = make(f, "lost", 9, 40000);
    a = (struct vattr){.mtime = 123456789, .atime = -5};
    assert_int_equal(vol_setattr(f->v, ino, VOL_SET_MTIME | VOL_SET_ATIME, &a, &was), 0);
    /* While it is written. */
    assert_int_equal(pthread_create(&t, NULL, writer, f), 0);
    do {
        s.n = 0;
        assert_int_equal(export_secret_new(EXPORT_KEY_FILE, "secret", 6, &e), 0);
        rc = volume_export(f->v, NULL, NULL, &e, &io, &r);
    } while (rc == -EBUSY);
    f->stop = true;
    pthread_join(t, NULL);
    assert_int_equal(rc, 0);
    assert_int_equal(verify(f, &s, s.n, "secret"), 0);
    assert_int_equal(verify(f, &s, s.n, "other"), -EKEYREJECTED);
    /* Every byte of the head, some of every frame, every place to cut. */
    for (size_t i = 0; i < s.n; i += i < 300 ? 1 : 9973) {
        s.at[i] ^= 0x10;
        f->lines = 0;
        rc = verify(f, &s, s.n, "secret");
        assert_true(rc == -EBADMSG || (i < sizeof(e.head) && rc < 0));
        if (i >= sizeof(e.head)) {
            snprintf(text, sizeof(text), "frame at byte %zu does",
                     sizeof(e.head) + (i - sizeof(e.head)) / EXPORT_FRAME_BYTES * EXPORT_FRAME_BYTES);
            assert_non_null(strstr(f->last, text));
        }
        s.at[i] ^= 0x10;
        rc = verify(f, &s, i, "secret");
        assert_true(i < sizeof(e.head) ? rc < 0 : rc == -EBADMSG);
    }
    assert_int_equal(verify(f, &s, s.n - EXPORT_FRAME_BYTES, "secret"), -EBADMSG);
    assert_int_equal(stream_write(&s, "x", 1), 0);
    assert_int_equal(verify(f, &s, s.n, "secret"), -EBADMSG);
    s.n--;
    assert_int_equal(import(f, &s, "secret"), 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    assert_int_equal(vol_lookup(f->v, ROOT, "large", &a), 0);
    assert_true(a.size == was.size && a.mtime == was.mtime && a.atime == was.atime && a.ctime == was.ctime &&
                a.nlink == 2 && a.blocks == was.blocks);
    assert_int_equal(vol_read(f->v, a.ino, 0, have, MIB), MIB);
    assert_memory_equal(buf, have, MIB);
    assert_int_equal(vol_read(f->v, a.ino, 5 * MIB + 70, have, 100), 10);
    assert_memory_equal(have, "\0\0\0\0\0\0\0end", 10);
    assert_int_equal(vol_getxattr(f->v, a.ino, "user.x", have, 100), 5);
    assert_int_equal(vol_lookup(f->v, ROOT, "dir", &b), 0);
    assert_true(b.mode == (S_IFDIR | 01711) && b.uid == 3 && b.nlink == 2);
    assert_int_equal(vol_lookup(f->v, b.ino, "hard", &dir), 0);
    assert_int_equal(dir.ino, a.ino);
    assert_int_equal(vol_lookup(f->v, b.ino, "symlink", &a), 0);
    assert_int_equal(vol_readlink(f->v, a.ino, text, sizeof(text)), 8);
    assert_int_equal(vol_lookup(f->v, b.ino, "small-321", &a), 0);
    assert_int_equal(vol_read(f->v, a.ino, 0, have, 100), 9);
    assert_memory_equal(have, "small-321", 9);
    /* What cannot be read is lost in the copy, too, and said. */
    assert_int_equal(vol_lookup(f->v, ROOT, "lost", &a), 0);
    assert_int_equal(a.ino, lost);
    unit = find_unit(f, lost, 8192);
    flip(f, unit);
    s.n = 0;
    assert_int_equal(export_secret_new(EXPORT_PASSPHRASE, "phrase", 6, &e), 0);
    f->lines = 0;
    assert_int_equal(volume_export(f->v, NULL, NULL, &e, &io, &r), 1);
    assert_int_equal(f->lines, 1);
    assert_int_equal(import(f, &s, "phrase"), 0);
    assert_int_equal(volume_check(f->v, true, on_line, f), 0);
    assert_int_equal(vol_lookup(f->v, ROOT, "lost", &a), 0);
    assert_int_equal(vol_read(f->v, a.ino, 8192, have, 4096), -EIO);
    assert_int_equal(vol_read(f->v, a.ino, 12288, have, 4096), 4096);
    assert_int_equal(have[5], 9);
    free(s.at);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_check_in_use, setup, teardown),
        cmocka_unit_test_setup_teardown(test_hold_gives_way, setup, teardown),
        cmocka_unit_test_setup_teardown(test_scrub, setup, teardown),
        cmocka_unit_test_setup_teardown(test_repair_content, setup, teardown),
        cmocka_unit_test_setup_teardown(test_repair_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resize, setup, teardown),
        cmocka_unit_test_setup_teardown(test_export, setup, teardown),
        cmocka_unit_test_setup_teardown(test_give_back, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
