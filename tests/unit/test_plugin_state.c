/* test_plugin_state.c - cofferd's table of volumes and its state file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/plugin/registry.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static struct plugin_volume *add(const char *name)
{
    struct plugin_volume *v = registry_reserve_ref(name);

    memset(v->id, 0xab, sizeof(v->id));
    v->params.size_limit = 1ull << 30;
    v->params.block_size = 8192;
    v->params.root_mode = 0750;
    v->created_ns = 1700000000123456789;
    v->strict = true;
    v->kind = AGENT_VOLUME_FRESH;
    v->spec.block = 8192;
    v->spec.mode = 0750;
    v->spec.allow[v->spec.nallow++] = xstrdup("label:a=b,ro");
    registry_set_listed(v, true);
    return v;
}

static int set_up(void **state)
{
    (void)state;
    strcpy(plugin_config.boot_id, "boot-1");
    registry_clear();
    return 0;
}

static void test_round_trip(void **state)
{
    struct plugin_volume *v = add("beta"), *w = add("alpha");
    struct why why;
    struct holder *h;
    char *first, *second;

    (void)state;
    h = holder_add(v, "an opaque \"id\"", false);
    h->count = 3;
    h->engine = (struct process){1234, 99};
    h->refs = xcalloc(2, sizeof(*h->refs));
    h->refs[h->nrefs++] = 0x3fffffffffffffff;
    h = holder_add(v, "/srv/x", true);
    h->count = 1;
    v->mount = MOUNT_SERVING;
    v->server = (struct process){77, 88};
    v->successor = (struct process){78, 89};
    v->has_init = true;
    v->init = (struct server_init){7, 45, 1 << 20, 0x1234, 0x80, {0}};
    v->mount_id = 0xfedcba9876543210;
    first = registry_dump();
    registry_unref(v);
    registry_unref(w);
    registry_clear();
    assert_null(registry_find_ref("beta"));
    assert_int_equal(registry_parse(first, strlen(first), &why), 0);
    v = registry_find_ref("beta");
    assert_non_null(v);
    assert_int_equal(v->params.size_limit, 1ull << 30);
    assert_int_equal(v->created_ns, 1700000000123456789);
    assert_int_equal(v->id[15], 0xab);
    assert_true(v->strict);
    assert_int_equal(v->spec.nallow, 1);
    assert_string_equal(v->spec.allow[0], "label:a=b,ro");
    assert_int_equal(v->mount, MOUNT_FAILED); /* until its server is found */
    assert_int_equal(v->server.pid, 77);
    assert_int_equal(v->successor.pid, 78);
    assert_int_equal(v->successor.start, 89);
    assert_true(v->has_init);
    assert_int_equal(v->init.flags2, 0x80);
    assert_true(v->mount_id == 0xfedcba9876543210);
    assert_int_equal(holder_total(v), 4);
    h = holder_find(v, "an opaque \"id\"", false);
    assert_non_null(h);
    assert_int_equal(h->engine.start, 99);
    assert_int_equal(h->refs[0], 0x3fffffffffffffff);
    assert_null(holder_find(v, "/srv/x", false));
    assert_non_null(holder_find(v, "/srv/x", true));
    v->mount = MOUNT_SERVING;
    second = registry_dump();
    assert_string_equal(first, second);
    registry_unref(v);
    free(first);
    free(second);
}

static void test_another_boot(void **state)
{
    struct plugin_volume *v = add("a");
    struct why why;
    char *text;

    (void)state;
    holder_add(v, "x", false)->count = 1;
    v->mount = MOUNT_SERVING;
    v->server = (struct process){77, 88};
    registry_unref(v);
    text = registry_dump();
    registry_clear();
    strcpy(plugin_config.boot_id, "boot-2");
    assert_int_equal(registry_parse(text, strlen(text), &why), 0);
    v = registry_find_ref("a");
    assert_non_null(v);
    assert_int_equal(v->nholders, 0);
    assert_int_equal(v->mount, MOUNT_IDLE);
    assert_int_equal(v->server.pid, 0);
    registry_unref(v);
    free(text);
}

static void test_snapshots(void **state)
{
    struct plugin_volume *v = add("a"), *w = add("ab"), *s, **all;
    struct why why;
    char *first, *second;
    size_t n;

    (void)state;
    s = registry_reserve_snapshot_ref(v, "monday");
    assert_string_equal(s->name, "a@monday");
    assert_null(registry_find_mount_ref("a@monday"));
    assert_false(registry_has_snapshots(v));
    registry_list_snapshot(s, v);
    assert_true(registry_has_snapshots(v));
    assert_false(registry_has_snapshots(w));
    holder_add(s, "/srv/x", true)->count = 1;
    s->mount = MOUNT_SERVING;
    s->server = (struct process){77, 88};
    first = registry_dump();
    registry_unref(v), registry_unref(w), registry_unref(s);
    registry_clear();
    assert_int_equal(registry_parse(first, strlen(first), &why), 0);
    assert_null(registry_find_ref("a@monday")); /* not a volume */
    s = registry_find_mount_ref("a@monday");
    assert_non_null(s);
    assert_string_equal(s->snapshot, "monday");
    assert_int_equal(s->params.size_limit, 1ull << 30);
    assert_int_equal(s->id[15], 0xab);
    assert_int_equal(s->mount, MOUNT_FAILED); /* until its server is found */
    assert_int_equal(s->server.pid, 77);
    assert_int_equal(holder_total(s), 1);
    registry_all_ref(&all, &n);
    assert_int_equal(n, 2);
    registry_unref(all[0]), registry_unref(all[1]);
    free(all);
    registry_mounts_ref(&all, &n);
    assert_int_equal(n, 3);
    assert_ptr_equal(all[1], s);
    for (size_t i = 0; i < n; i++)
        registry_unref(all[i]);
    free(all);
    s->mount = MOUNT_SERVING;
    second = registry_dump();
    assert_string_equal(first, second);
    registry_unref(s);
    free(second);
    /* Another boot has no mounts. */
    registry_clear();
    strcpy(plugin_config.boot_id, "boot-2");
    assert_int_equal(registry_parse(first, strlen(first), &why), 0);
    assert_null(registry_find_mount_ref("a@monday"));
    free(first);
    /* One that nothing lists is gone with its last reference. */
    v = registry_find_ref("a");
    registry_unref(registry_reserve_snapshot_ref(v, "tuesday"));
    registry_mounts_ref(&all, &n);
    assert_int_equal(n, 2);
    registry_unref(all[0]), registry_unref(all[1]), registry_unref(v);
    free(all);
}

static void test_only_listed_is_saved(void **state)
{
    struct plugin_volume *v = registry_reserve_ref("unfinished");
    struct plugin_volume **all;
    char *text = registry_dump();
    size_t n;

    (void)state;
    assert_null(strstr(text, "unfinished"));
    assert_null(registry_find_ref("unfinished"));
    registry_all_ref(&all, &n);
    assert_int_equal(n, 0);
    free(all);
    assert_ptr_equal(registry_reserve_ref("unfinished"), v);
    registry_unref(v);
    registry_unref(v);
    free(text);
}

static void test_removed_lives_while_referenced(void **state)
{
    struct plugin_volume *v = add("a"), *again;

    (void)state;
    registry_set_listed(v, false);
    assert_null(registry_find_ref("a"));
    again = registry_reserve_ref("a");
    assert_ptr_equal(again, v);
    registry_unref(again);
    assert_string_equal(v->name, "a");
    registry_unref(v);
}

static void test_order_of_names(void **state)
{
    static const char *const names[] = {"m", "z", "a", "b10", "b2"};
    struct plugin_volume **all;
    size_t n;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(names); i++)
        registry_unref(add(names[i]));
    registry_all_ref(&all, &n);
    assert_int_equal(n, 5);
    for (size_t i = 0; i < n; i++) {
        if (i)
            assert_true(strcmp(all[i - 1]->name, all[i]->name) < 0);
        registry_unref(all[i]);
    }
    free(all);
}

/* Every cut, and many damages, of a good file are refused or read, never a crash. */
static void test_hostile_files(void **state)
{
    static const char *const bad[] = {
        "",
        "{",
        "[]",
        "{\"version\":2,\"boot\":\"boot-1\",\"volumes\":[]}",
        "{\"version\":1,\"boot\":\"boot-1\",\"volumes\":[]}",
        "{\"version\":1,\"volumes\":[]}",
        "{\"version\":1,\"version\":1,\"boot\":\"x\",\"volumes\":[]}",
        "{\"version\":1,\"boot\":\"x\",\"volumes\":[{}]}",
        "{\"version\":1,\"boot\":\"x\",\"volumes\":[1]}",
        "{\"version\":1,\"boot\":\"x\",\"volumes\":[],\"snapshots\":{}}",
        "{\"version\":1,\"boot\":\"x\",\"volumes\":[{\"name\":\"../x\",\"id\":\"00\",\"rules\":[]}]}",
    };
    struct plugin_volume *v = add("a");
    struct why why;
    char *text, *copy;
    size_t n;

    (void)state;
    holder_add(v, "x", false)->count = 1;
    registry_unref(v);
    text = registry_dump();
    n = strlen(text);
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        registry_clear();
        assert_int_equal(registry_parse(bad[i], strlen(bad[i]), &why), -EINVAL);
        assert_true(strlen(why.text) > 0);
    }
    for (size_t i = 0; i < n; i++) {
        registry_clear();
        assert_int_equal(registry_parse(text, i, &why), -EINVAL);
        copy = xstrdup(text);
        copy[i] = copy[i] == '1' ? '-' : '1';
        registry_clear();
        registry_parse(copy, n, &why);
        free(copy);
    }
    free(text);
}

static void test_same_name_twice(void **state)
{
    struct why why;
    char *text, *twice, *start, *end;

    (void)state;
    registry_unref(add("a"));
    text = registry_dump();
    start = strchr(strchr(text, '['), '{');
    end = strrchr(text, ']');
    twice = xasprintf("%.*s,%.*s%s", (int)(end - text), text, (int)(end - start), start, end);
    registry_clear();
    assert_int_equal(registry_parse(twice, strlen(twice), &why), -EINVAL);
    free(twice);
    free(text);
}

static void test_saved_file(void **state)
{
    char dir[] = "/tmp/coffer-state-XXXXXX", *path;
    struct stat st;
    struct why why;

    (void)state;
    assert_non_null(mkdtemp(dir));
    plugin_config.state_dir = dir;
    plugin_config.state_fd = open(dir, O_RDONLY | O_DIRECTORY);
    assert_int_equal(registry_load(&why), 0); /* none yet */
    registry_unref(add("a"));
    assert_int_equal(registry_save(), 0);
    registry_clear();
    assert_int_equal(registry_load(&why), 0);
    assert_int_equal(fstatat(plugin_config.state_fd, "cofferd.json", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    registry_clear();
    path = xasprintf("%s/cofferd.json", dir);
    unlink(path);
    free(path);
    close(plugin_config.state_fd);
    rmdir(dir);
}

static void test_processes(void **state)
{
    struct process self, other;
    int fd;

    (void)state;
    assert_int_equal(process_identify(getpid(), &self), 0);
    assert_true(process_alive(&self));
    other = self;
    other.start++;
    assert_false(process_alive(&other));
    assert_false(process_same(&self, &other));
    assert_int_equal(process_pidfd(&other), -ESRCH);
    fd = process_pidfd(&self);
    assert_true(fd >= 0);
    close(fd);
    assert_true(process_alive(&(struct process){0, 0})); /* unknown */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_round_trip, set_up),
        cmocka_unit_test_setup(test_another_boot, set_up),
        cmocka_unit_test_setup(test_snapshots, set_up),
        cmocka_unit_test_setup(test_only_listed_is_saved, set_up),
        cmocka_unit_test_setup(test_removed_lives_while_referenced, set_up),
        cmocka_unit_test_setup(test_order_of_names, set_up),
        cmocka_unit_test_setup(test_hostile_files, set_up),
        cmocka_unit_test_setup(test_same_name_twice, set_up),
        cmocka_unit_test_setup(test_saved_file, set_up),
        cmocka_unit_test_setup(test_processes, set_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
