/*
 * test_snapshot.c - a state that is kept stays readable, byte for byte, whatever happens to the volume after it: changes,
 * deletes, a full volume, crashes, other snapshots made and removed; and its space comes back when it goes.
 * (tests/crash/powercut and tests/model make snapshots, too.)
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "fs/volume/view.h"
#include "tests/crash/recstore.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>

#define ROOT  VOLUME_ROOT_INO
#define FILES 24
#define SNAPS 8

static const uint8_t volume_id[VOLUME_ID_BYTES] = "snapshot";

/* Contents are a function of these two; size 0: there is no such file. */
struct content {
    uint32_t seed, size;
};

struct fixture {
    struct key *key;
    struct image *image[2];
    struct volume *v;
    unsigned damage, lines;
    char last[400];
    struct content now[FILES];
    struct kept {
        char name[16]; /* "": free */
        struct content was[FILES];
    } kept[SNAPS];
    uint64_t random;
    atomic_bool stop;
};

static void on_damage(void *ctx, const char *what)
{
    struct fixture *f = ctx;

    f->damage++;
    snprintf(f->last, sizeof(f->last), "%s", what);
}

static void on_line(void *ctx, const char *text)
{
    struct fixture *f = ctx;

    f->lines++;
    snprintf(f->last, sizeof(f->last), "%s", text);
}

static void open_volume(struct fixture *f)
{
    struct volume_options o = {.cache_bytes = 1 << 20, .mount_id = 1, .on_damage = on_damage, .ctx = f};

    assert_int_equal(volume_open(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key,
                                 volume_id, &o, &f->v),
                     0);
}

static int open_snapshot(struct fixture *f, const char *name, struct volume **ret)
{
    struct volume_options o = {.cache_bytes = 1 << 20, .on_damage = on_damage, .ctx = f};

    return volume_snapshot_open(mstore_new(f->image[0], NULL, NULL, 0), f->key, volume_id, name, &o, ret);
}

static int setup(void **state)
{
    struct volume_params p = {.block_size = 4096, .size_limit = 64 << 20, .log_segment = 256 << 10, .root_mode = 0755};
    struct fixture *f = calloc(1, sizeof(*f));
    struct store *data, *log;

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    memset(f->key->b, 0x53, sizeof(f->key->b));
    memcpy(p.id, volume_id, sizeof(p.id));
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    f->random = 20261127;
    data = mstore_new(f->image[0], NULL, NULL, 0);
    log = mstore_new(f->image[1], NULL, NULL, 1);
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    open_volume(f);
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

static uint32_t rnd(struct fixture *f, uint32_t below)
{
    f->random ^= f->random << 13;
    f->random ^= f->random >> 7;
    f->random ^= f->random << 17;
    return (uint32_t)(f->random >> 16) % below;
}

static void fill(const struct content *c, uint8_t *buf)
{
    uint64_t x = c->seed * 0x9e3779b97f4a7c15ull + 1;

    for (uint32_t i = 0; i < c->size; i++) {
        if (i % 8 == 0)
            x = x * 6364136223846793005ull + 1442695040888963407ull;
        buf[i] = (uint8_t)(x >> (i % 8 * 8));
    }
}

static void name_of(unsigned i, char name[16])
{
    snprintf(name, 16, "f%u", i);
}

/* The file has another content, all of it, or goes (size 0). -ENOSPC: it may have either. */
static int set_file(struct fixture *f, unsigned i, uint32_t size)
{
    struct content c = {rnd(f, UINT32_MAX), size};
    uint8_t *buf = malloc(size + 1);
    struct vattr a;
    char name[16];
    int rc = 0;

    name_of(i, name);
    if (f->now[i].size)
        rc = vol_unlink(f->v, ROOT, name);
    if (rc == 0) {
        f->now[i] = (struct content){0};
        if (size)
            rc = vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a);
    }
    if (rc == 0 && size) {
        ssize_t n;

        fill(&c, buf);
        n = vol_write(f->v, a.ino, 0, buf, size);
        if (n == (ssize_t)size)
            f->now[i] = c;
        else
            rc = (int)n;
        vol_forget(f->v, a.ino, 1);
        if (rc < 0 && vol_unlink(f->v, ROOT, name) < 0)
            fail_msg("an empty file cannot be taken back");
    }
    free(buf);
    return rc;
}

static void verify(struct volume *v, const struct content *want)
{
    for (unsigned i = 0; i < FILES; i++) {
        uint8_t *expect = malloc(want[i].size + 1), *have = malloc(want[i].size + 1);
        struct vattr a;
        char name[16];
        int rc;

        name_of(i, name);
        rc = vol_lookup(v, ROOT, name, &a);
        assert_int_equal(rc, want[i].size ? 0 : -ENOENT);
        if (rc == 0) {
            assert_int_equal(a.size, want[i].size);
            fill(&want[i], expect);
            assert_int_equal(vol_read(v, a.ino, 0, have, want[i].size), want[i].size);
            assert_memory_equal(have, expect, want[i].size);
            vol_forget(v, a.ino, 1);
        }
        free(expect);
        free(have);
    }
}

static void verify_snapshot(struct fixture *f, const char *name, const struct content *want)
{
    struct volume *s;

    assert_int_equal(open_snapshot(f, name, &s), 0);
    verify(s, want);
    assert_int_equal(volume_close(s), 0);
}

static void check(struct fixture *f)
{
    int rc = volume_check(f->v, true, on_line, f);

    if (rc != 0)
        fail_msg("check: %d: %s", rc, f->last);
}

static uint64_t used(struct fixture *f)
{
    struct volume_stat s;

    volume_stat(f->v, &s);
    return s.used;
}

/* --- one --- */

static void test_kept(void **state)
{
    struct fixture *f = *state;
    struct content was[FILES];
    struct volume *s;
    struct vattr a;
    uint64_t before, full;
    char name[16];

    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 1 + i * 20000), 0);
    memcpy(was, f->now, sizeof(was));
    before = used(f);
    assert_int_equal(volume_snapshot_create(f->v, "one"), 0);
    assert_true(used(f) < before + (1 << 20)); /* nothing is copied */
    verify_snapshot(f, "one", was);
    /* Everything goes, and the volume is filled until there is no room. */
    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 0), 0);
    assert_int_equal(volume_checkpoint(f->v), 0);
    assert_true(used(f) > before - (1 << 20)); /* nothing is given back */
    for (unsigned round = 0; round < 3; round++) {
        assert_int_equal(vol_mknod(f->v, ROOT, "big", S_IFREG | 0600, 0, 0, 0, &a), 0);
        for (unsigned k = 0;; k++) {
            static uint8_t buf[256 << 10];
            ssize_t n;

            memset(buf, (int)k, sizeof(buf));
            n = vol_write(f->v, a.ino, (uint64_t)k * sizeof(buf), buf, sizeof(buf));
            if (n == -ENOSPC)
                break;
            assert_int_equal(n, sizeof(buf));
        }
        vol_forget(f->v, a.ino, 1);
        check(f);
        verify_snapshot(f, "one", was);
        assert_int_equal(vol_unlink(f->v, ROOT, "big"), 0);
        volume_abandon(f->v);
        open_volume(f);
    }
    verify(f->v, f->now);
    verify_snapshot(f, "one", was);
    /* It cannot be changed. */
    assert_int_equal(open_snapshot(f, "one", &s), 0);
    assert_int_equal(vol_mknod(s, ROOT, "x", S_IFREG | 0600, 0, 0, 0, &a), -EROFS);
    name_of(1, name);
    assert_int_equal(vol_unlink(s, ROOT, name), -EROFS);
    assert_int_equal(vol_lookup(s, ROOT, name, &a), 0);
    for (uint64_t size = 1; size < 10000000; size *= 100) {
        struct vattr to = {.size = size};

        assert_int_equal(vol_setattr(s, a.ino, VOL_SET_SIZE, &to, &to), -EROFS);
        assert_int_equal(vol_fallocate(s, a.ino, 0, 0, size), -EROFS);
        assert_int_equal(vol_write(s, a.ino, size, "x", 1), -EROFS);
        assert_int_equal(vol_copy(s, a.ino, 0, a.ino, size, 1), -EROFS);
    }
    vol_forget(s, a.ino, 1);
    assert_int_equal(volume_snapshot_create(s, "x"), -EROFS);
    assert_int_equal(volume_snapshot_remove(s, "one"), -EROFS);
    assert_int_equal(volume_close(s), 0);
    full = used(f);
    assert_int_equal(volume_snapshot_remove(f->v, "one"), 0);
    assert_true(used(f) < full - 5000000);
    assert_int_equal(open_snapshot(f, "one", &s), -ENOENT);
    check(f);
    assert_int_equal(f->damage, 0);
}

static int count(void *ctx, const struct volume_snapshot *s)
{
    unsigned *n = ctx;

    assert_true(volume_snapshot_name_ok(s->name) && s->generation > 0 && s->used > 0 && s->created > 0);
    ++*n;
    return 0;
}

static void test_names(void **state)
{
    static const char *const bad[] = {
        "",    ".",        "..",
        "-x",  "a/b",      "a b",
        "a\n", "\xc3\xa4", "a2345678901234567890123456789012345678901234567890123456789012345"};
    struct fixture *f = *state;
    unsigned n = 0;
    struct view w;

    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        assert_false(volume_snapshot_name_ok(bad[i]));
        assert_int_equal(volume_snapshot_create(f->v, bad[i]), -EINVAL);
    }
    assert_int_equal(volume_snapshot_remove(f->v, "a"), -ENOENT);
    assert_int_equal(view_open_snapshot(f->v, "a", &w), -ENOENT);
    assert_int_equal(volume_snapshot_create(f->v, "a"), 0);
    assert_int_equal(volume_snapshot_create(f->v, "a"), -EEXIST);
    assert_int_equal(volume_snapshot_create(f->v, "2026-11-27_a.b"), 0);
    assert_int_equal(view_open_snapshot(f->v, "a", &w), 0);
    assert_int_equal(volume_snapshot_remove(f->v, "a"), -EBUSY);
    view_close(&w);
    assert_int_equal(volume_snapshot_remove(f->v, "a"), 0);
    for (unsigned i = 1; i < VOLUME_SNAPSHOTS_MAX; i++) {
        char name[16];

        name_of(i, name);
        assert_int_equal(volume_snapshot_create(f->v, name), 0);
    }
    assert_int_equal(volume_snapshot_create(f->v, "more"), -EMFILE);
    assert_int_equal(volume_snapshot_list(f->v, count, &n), 0);
    assert_int_equal(n, VOLUME_SNAPSHOTS_MAX);
    assert_int_equal(volume_close(f->v), 0);
    open_volume(f);
    n = 0;
    assert_int_equal(volume_snapshot_list(f->v, count, &n), 0);
    assert_int_equal(n, VOLUME_SNAPSHOTS_MAX);
    check(f);
}

/* --- many, at random, with deaths --- */

static void test_random(void **state)
{
    struct fixture *f = *state;
    unsigned made = 0, removed = 0, full = 0;

    for (unsigned step = 0; step < 3000; step++) {
        struct kept *k = &f->kept[rnd(f, SNAPS)];
        uint32_t what = rnd(f, 100);
        int rc = 0;

        if (what < 70) {
            rc = set_file(f, rnd(f, FILES), rnd(f, 4) ? rnd(f, 1000000) : rnd(f, 1500));
        } else if (what < 76 && !k->name[0]) {
            snprintf(k->name, sizeof(k->name), "s%u", step);
            rc = volume_snapshot_create(f->v, k->name);
            memcpy(k->was, f->now, sizeof(k->was));
            made += rc == 0;
            if (rc < 0)
                k->name[0] = 0;
        } else if (what >= 76 && what < 78 && k->name[0]) {
            rc = volume_snapshot_remove(f->v, k->name);
            assert_int_equal(rc, 0);
            k->name[0] = 0;
            removed++;
        } else if (what < 85) {
            rc = volume_checkpoint(f->v);
        } else if (what < 88) {
            volume_abandon(f->v);
            open_volume(f);
        } else if (what < 90) {
            assert_int_equal(volume_close(f->v), 0);
            open_volume(f);
        } else if (what < 96 && k->name[0]) {
            verify_snapshot(f, k->name, k->was);
        }
        if (rc == -ENOSPC || rc == -EBUSY) { /* room is made by removing what keeps it */
            full++;
            for (unsigned i = 0; i < SNAPS; i++) {
                if (!f->kept[i].name[0])
                    continue;
                assert_int_equal(volume_snapshot_remove(f->v, f->kept[i].name), 0);
                f->kept[i].name[0] = 0;
            }
            rc = 0;
        }
        assert_int_equal(rc, 0);
        if (step % 300 == 0) {
            check(f);
            verify(f->v, f->now);
        }
    }
    for (unsigned i = 0; i < SNAPS; i++)
        if (f->kept[i].name[0])
            verify_snapshot(f, f->kept[i].name, f->kept[i].was);
    check(f);
    assert_int_equal(f->damage, 0);
    print_message("%u made, %u removed, %u times full\n", made, removed, full);
    assert_true(made > 50 && removed > 10 && full > 0);
}

/* --- full --- */

/* What snapshots keep cannot be freed: then changes are refused, in the end all of them, and nothing breaks; removing one
 * is always possible. */
static void test_full(void **state)
{
    struct fixture *f = *state;
    unsigned refused = 0;
    struct vattr a;

    for (unsigned i = 0; i < 3000; i++) {
        char name[32];
        int rc;

        snprintf(name, sizeof(name), "a long name of a file %u", i);
        rc = vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a);
        assert_int_equal(rc, 0);
        vol_forget(f->v, a.ino, 1);
    }
    for (unsigned round = 0; round < VOLUME_SNAPSHOTS_MAX && refused < 50; round++) {
        char name[32];

        name_of(round, name);
        if (volume_snapshot_create(f->v, name) == -ENOSPC)
            refused++;
        for (unsigned i = 0; i < 3000; i += 1 + round % 7) {
            struct vattr set = {.mode = 0600 + round % 2};
            int rc;

            snprintf(name, sizeof(name), "a long name of a file %u", i);
            assert_int_equal(vol_lookup(f->v, ROOT, name, &a), 0);
            rc = vol_setattr(f->v, a.ino, VOL_SET_MODE, &set, &a);
            vol_forget(f->v, a.ino, 1);
            assert_true(rc == 0 || rc == -ENOSPC);
            refused += rc == -ENOSPC;
        }
    }
    assert_true(refused >= 50);
    check(f);
    for (unsigned i = 0; i < 4; i++) { /* also when it is opened again and again */
        if (i % 2)
            assert_int_equal(volume_close(f->v), 0);
        else
            volume_abandon(f->v);
        open_volume(f);
    }
    for (unsigned round = 0; round < VOLUME_SNAPSHOTS_MAX; round++) {
        char name[16];
        int rc;

        name_of(round, name);
        rc = volume_snapshot_remove(f->v, name);
        assert_true(rc == 0 || rc == -ENOENT);
    }
    check(f);
    assert_int_equal(vol_mknod(f->v, ROOT, "room again", S_IFREG | 0600, 0, 0, 0, &a), 0);
    assert_int_equal(f->damage, 0);
}

/* --- beside a writer --- */

static void *writer(void *arg)
{
    struct fixture *f = arg;
    static uint8_t buf[64 << 10];
    struct vattr a;

    for (unsigned k = 0; !f->stop; k++) {
        char name[24];

        snprintf(name, sizeof(name), "w%u", k % 20);
        vol_unlink(f->v, ROOT, name);
        if (vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a) < 0)
            continue;
        memset(buf, (int)k, sizeof(buf));
        vol_write(f->v, a.ino, 0, buf, k % 7 ? sizeof(buf) : 700);
        vol_forget(f->v, a.ino, 1);
    }
    return NULL;
}

static void test_in_use(void **state)
{
    struct fixture *f = *state;
    struct content was[FILES];
    unsigned made = 0;
    pthread_t t;

    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 1 + i * 10000), 0);
    memcpy(was, f->now, sizeof(was));
    assert_int_equal(pthread_create(&t, NULL, writer, f), 0);
    for (unsigned k = 0; k < 60; k++) {
        char name[16], old[16];
        int rc;

        name_of(k, name);
        rc = volume_snapshot_create(f->v, name);
        assert_true(rc == 0 || rc == -EBUSY || rc == -ENOSPC);
        made += rc == 0;
        if (rc == 0)
            verify_snapshot(f, name, was);
        name_of(k - 3, old);
        rc = k > 3 ? volume_snapshot_remove(f->v, old) : 0;
        assert_true(rc == 0 || rc == -ENOENT);
        if (k % 10 == 0) {
            rc = volume_check(f->v, true, on_line, f);
            if (rc != 0 && rc != -EBUSY)
                fail_msg("check: %d: %s", rc, f->last);
        }
    }
    f->stop = true;
    pthread_join(t, NULL);
    assert_true(made > 30);
    check(f);
    assert_int_equal(f->damage, 0);
}

/* --- damage --- */

static void flip(struct fixture *f, uint64_t unit)
{
    uint8_t byte;

    image_read(f->image[0], unit * 4096 + 7, &byte, 1);
    byte ^= 4;
    image_write(f->image[0], unit * 4096 + 7, &byte, 1);
}

/* Each unit that only the snapshot uses: its damage is found by check and scrub, and the volume itself goes on, also when it
 * is opened anew (what hung on a damaged node is lost then: nothing says that it is kept). */
static void test_damage(void **state)
{
    struct fixture *f = *state;
    struct image *whole[2];
    struct content now[FILES];
    unsigned found = 0, said = 0;

    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 1 + i * 1000), 0);
    assert_int_equal(volume_snapshot_create(f->v, "old"), 0);
    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 5000), 0);
    assert_int_equal(volume_close(f->v), 0);
    f->v = NULL;
    memcpy(now, f->now, sizeof(now));
    memcpy(whole, f->image, sizeof(whole));
    for (uint64_t unit = 2; unit < 250; unit++) {
        struct volume_scrub at = {0};
        int rc;

        f->image[0] = image_new(whole[0]);
        f->image[1] = image_new(whole[1]);
        memcpy(f->now, now, sizeof(now));
        open_volume(f);
        f->damage = f->lines = 0;
        flip(f, unit);
        rc = volume_check(f->v, true, on_line, f);
        assert_true(rc >= 0);
        if (rc > 0 && strstr(f->last, "snapshot old: ")) {
            found++;
            while (volume_scrub_step(f->v, &at, 1 << 20))
                ;
            assert_true(at.findings > 0);
            f->damage = 0;
            assert_int_equal(volume_close(f->v), 0);
            open_volume(f);
            said += f->damage > 0;
            for (unsigned i = 0; i < FILES; i++)
                assert_int_equal(set_file(f, i, 9000), 0);
            assert_int_equal(volume_checkpoint(f->v), 0);
            verify(f->v, f->now);
            assert_int_equal(volume_snapshot_remove(f->v, "old"), 0);
            check(f);
        }
        volume_abandon(f->v);
        f->v = NULL;
        image_free(f->image[0]);
        image_free(f->image[1]);
    }
    memcpy(f->image, whole, sizeof(whole));
    print_message("%u units of the snapshot alone, %u of them of its space\n", found, said);
    assert_true(found > 20 && said > 0);
}

/* Repair of the volume leaves its snapshots as they are. */
static void test_repair(void **state)
{
    struct fixture *f = *state;
    struct volume_report report = {.line = on_line, .ctx = f};
    struct image *whole[2];
    struct content was[FILES];
    unsigned repaired = 0;

    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 1 + i * 1000), 0);
    memcpy(was, f->now, sizeof(was));
    assert_int_equal(volume_snapshot_create(f->v, "old"), 0);
    for (unsigned i = 0; i < FILES; i++)
        assert_int_equal(set_file(f, i, 5000), 0);
    assert_int_equal(volume_close(f->v), 0);
    f->v = NULL;
    memcpy(whole, f->image, sizeof(whole));
    for (uint64_t unit = 2; unit < 250; unit++) {
        int rc;

        f->image[0] = image_new(whole[0]);
        f->image[1] = image_new(whole[1]);
        flip(f, unit);
        rc = volume_repair(mstore_new(f->image[0], NULL, NULL, 0), mstore_new(f->image[1], NULL, NULL, 1), f->key,
                           volume_id, &(struct volume_options){0}, &report);
        assert_true(rc >= 0 || rc == -EIO); /* the root */
        if (rc > 0) {
            unsigned n = 0;

            repaired++;
            open_volume(f);
            /* The one thing of it that can be lost is the item that names it. */
            assert_int_equal(volume_snapshot_list(f->v, count, &n), 0);
            assert_true(n == 1 || strstr(f->last, "tree node"));
            if (n == 1)
                verify_snapshot(f, "old", was);
            check(f);
            volume_abandon(f->v);
            f->v = NULL;
        }
        image_free(f->image[0]);
        image_free(f->image[1]);
    }
    memcpy(f->image, whole, sizeof(whole));
    print_message("%u repaired\n", repaired);
    assert_true(repaired > 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_kept, setup, teardown),
        cmocka_unit_test_setup_teardown(test_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_random, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full, setup, teardown),
        cmocka_unit_test_setup_teardown(test_in_use, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damage, setup, teardown),
        cmocka_unit_test_setup_teardown(test_repair, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
