/*
 * test_requests.c - requests that a dead server has done and not answered: their ids are in the log, checkpoints carry them
 * over, and the next server of the same mount finds them, and only them. Volumes in memory (recstore.h).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "coffer/volume.h"
#include "fs/base/secmem.h"
#include "tests/crash/recstore.h"

#include <sys/stat.h>
#include <unistd.h>

#define ROOT  VOLUME_ROOT_INO
#define MOUNT 4711

static const uint8_t volume_id[VOLUME_ID_BYTES] = "requests";

struct fixture {
    struct key *key;
    struct image *image[2];
    struct volume *v;
};

static struct store *store_new(struct fixture *f, int id)
{
    return mstore_new(f->image[id], NULL, NULL, id);
}

static void open_as(struct fixture *f, bool resumed, uint64_t mount_id)
{
    struct volume_options o = {.cache_bytes = 1 << 20, .mount_id = mount_id, .resumed = resumed};

    assert_int_equal(volume_open(store_new(f, 0), store_new(f, 1), f->key, volume_id, &o, &f->v), 0);
}

/* As after kill -9: what this thread was working for is no longer known in the process. */
static void die(struct fixture *f)
{
    volume_abandon(f->v);
    f->v = NULL;
    vol_request(0);
}

static void make_as(struct fixture *f, uint64_t request, const char *name)
{
    struct vattr a;

    vol_request(request);
    assert_int_equal(vol_mknod(f->v, ROOT, name, S_IFREG | 0600, 0, 0, 0, &a), 0);
}

static bool done(struct fixture *f, uint64_t request)
{
    vol_request(request);
    return vol_request_done(f->v);
}

static int setup(void **state)
{
    struct volume_params p = {
        .block_size = 4096, .size_limit = 64ull << 20, .log_segment = 256 << 10, .root_mode = 0755};
    struct fixture *f = calloc(1, sizeof(*f));
    struct store *data, *log;

    *state = f;
    if (!f || secmem_init() < 0 || !(f->key = key_new()))
        return -1;
    memset(f->key->b, 0x21, sizeof(f->key->b));
    memcpy(p.id, volume_id, sizeof(p.id));
    f->image[0] = image_new(NULL);
    f->image[1] = image_new(NULL);
    data = store_new(f, 0);
    log = store_new(f, 1);
    assert_int_equal(volume_format(data, log, f->key, &p), 0);
    data->ops->close(data);
    log->ops->close(log);
    open_as(f, false, MOUNT);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    if (f->v)
        volume_abandon(f->v);
    vol_request(0);
    image_free(f->image[0]);
    image_free(f->image[1]);
    key_free(&f->key);
    free(f);
    return 0;
}

static void test_in_the_log(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    make_as(f, 102, "b");
    die(f);
    open_as(f, true, MOUNT);
    assert_true(done(f, 100));
    assert_true(done(f, 102));
    assert_false(done(f, 101)); /* another request */
    assert_false(done(f, 0));
    /* What it has done itself is not what was done before: the kernel sends nothing of that again. */
    make_as(f, 104, "c");
    assert_false(done(f, 104));
}

static void test_of_another_mount(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    die(f);
    open_as(f, true, MOUNT + 1); /* whose kernel counts its requests from the beginning, too */
    assert_false(done(f, 100));
}

static void test_not_resumed(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    die(f);
    open_as(f, false, MOUNT);
    assert_false(done(f, 100));
}

/* The segment that has the record is given up by checkpoints before the request is answered. */
static void test_carried_over(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    for (int i = 0; i < 3; i++)
        assert_int_equal(volume_checkpoint(f->v), 0);
    die(f);
    open_as(f, true, MOUNT);
    assert_true(done(f, 100));
    assert_false(done(f, 101));
}

/* The next server dies before it has answered, too, with the opening's checkpoint, and more of them. */
static void test_carried_over_servers(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    make_as(f, 102, "b");
    for (int server = 0; server < 3; server++) {
        die(f);
        open_as(f, true, MOUNT);
        assert_true(done(f, 100));
        assert_true(done(f, 102));
        vol_request(0);
        for (int i = 0; i < server; i++)
            assert_int_equal(volume_checkpoint(f->v), 0);
    }
}

/* A thread that works for another request has answered the last one: nobody asks for it any more. */
static void test_answered_is_not_carried(void **state)
{
    struct fixture *f = *state;

    make_as(f, 100, "a");
    make_as(f, 102, "b");
    for (int i = 0; i < 2; i++)
        assert_int_equal(volume_checkpoint(f->v), 0);
    die(f);
    open_as(f, true, MOUNT);
    assert_false(done(f, 100));
    assert_true(done(f, 102));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_in_the_log, setup, teardown),
        cmocka_unit_test_setup_teardown(test_of_another_mount, setup, teardown),
        cmocka_unit_test_setup_teardown(test_not_resumed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_carried_over, setup, teardown),
        cmocka_unit_test_setup_teardown(test_carried_over_servers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_answered_is_not_carried, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
