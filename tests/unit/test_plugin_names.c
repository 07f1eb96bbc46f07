/* test_plugin_names.c - what the plugin and the broker do with names, options and rubbish, without any daemon. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/plugin/broker.h"
#include "fs/plugin/http.h"
#include "fs/plugin/mountinfo.h"
#include "fs/plugin/mounts.h"
#include "fs/plugin/volumes.h"
#include "fs/base/msg.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned ask(const char *path, const char *body, size_t n, char **ret_text)
{
    struct engine_peer nobody = {.pidfd = -1};
    char *name, *id;
    unsigned status = plugin_http_answer(path, body, n, &nobody, ret_text, &name, &id);

    assert_null(name);
    assert_null(id);
    return status;
}

static void expect(const char *path, const char *body, unsigned want, const char *part)
{
    char *text;
    unsigned status = ask(path, body, strlen(body), &text);
    json_t *v = json_loads(text, 0, NULL);

    assert_int_equal(status, want);
    assert_non_null(v);
    assert_true(json_is_string(json_object_get(v, "Err")));
    assert_int_equal(want == 200, json_string_length(json_object_get(v, "Err")) == 0);
    if (part)
        assert_non_null(strstr(text, part));
    json_decref(v);
    free(text);
}

static void test_calls_without_volume(void **state)
{
    (void)state;
    expect("/Plugin.Activate", "", 200, "VolumeDriver");
    expect("/Plugin.Activate", "rubbish", 200, "VolumeDriver");
    expect("/VolumeDriver.Capabilities", "", 200, "\"Scope\":\"local\"");
    expect("/VolumeDriver.List", "", 200, "\"Volumes\":[]");
    expect("/VolumeDriver.Get", "{\"Name\":\"x\"}", 500, "no such volume");
    expect("/VolumeDriver.Path", "{\"Name\":\"x\"}", 500, "no such volume");
    expect("/VolumeDriver.Mount", "{\"Name\":\"x\",\"ID\":\"1\"}", 500, "no such volume");
    expect("/VolumeDriver.Unmount", "{\"Name\":\"x\",\"ID\":\"1\"}", 200, NULL);
    expect("/VolumeDriver.Nothing", "", 404, NULL);
    expect("/", "", 404, NULL);
}

static void test_rubbish(void **state)
{
    static const char *const bodies[] = {"",
                                         "{",
                                         "[]",
                                         "null",
                                         "\"x\"",
                                         "{}",
                                         "{\"Name\":1,\"ID\":\"x\"}",
                                         "{\"Name\":null,\"ID\":\"x\"}",
                                         "{\"Name\":{},\"ID\":\"x\"}",
                                         "{\"Name\":\"a\",\"Name\":\"b\",\"ID\":\"x\"}",
                                         "{\"Name\":\"a\\u0000b\",\"ID\":\"x\"}",
                                         "{\"Name\":\"\xff\xfe\",\"ID\":\"x\"}",
                                         "{\"Name\":\"a\",\"ID\":\"x\"} trailing"};
    static const char *const paths[] = {"/VolumeDriver.Create", "/VolumeDriver.Remove", "/VolumeDriver.Get",
                                        "/VolumeDriver.Path",   "/VolumeDriver.Mount",  "/VolumeDriver.Unmount"};

    (void)state;
    for (size_t p = 0; p < ARRAY_LEN(paths); p++) {
        for (size_t b = 0; b < ARRAY_LEN(bodies); b++)
            expect(paths[p], bodies[b], 500, NULL);
    }
}

static void test_deep_json(void **state)
{
    size_t n = 900000;
    char *body = xmalloc(n), *text;
    struct why why;
    json_t *v;

    (void)state;
    memset(body, '[', n);
    assert_int_equal(ask("/VolumeDriver.Get", body, n, &text), 500);
    free(text);
    assert_int_equal(json_parse("{\"a\":\"[[[[[[[[[[[[\\\"[[[[[[[[\"}", 30, &v, &why), 0);
    json_decref(v);
    free(body);
}

static void test_bad_names(void **state)
{
    static const char *const names[] = {"", ".", "..", "../x", "a/b", "/", "-x", ".x", "a b", "\xc3\xa4", "a\\nb"};
    char *long_name, *body, *text;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(names); i++) {
        body = xasprintf("{\"Name\":\"%s\",\"Opts\":{}}", names[i]);
        expect("/VolumeDriver.Create", body, 500, "a volume's name");
        expect("/VolumeDriver.Remove", body, 500, "a volume's name");
        expect("/VolumeDriver.Get", body, 500, "no such volume");
        free(body);
    }
    long_name = xcalloc(65537, 1);
    memset(long_name, 'a', 65536);
    body = xasprintf("{\"Name\":\"%s\"}", long_name);
    assert_int_equal(ask("/VolumeDriver.Create", body, strlen(body), &text), 500);
    assert_true(strlen(text) < 600);
    free(text);
    assert_int_equal(ask("/VolumeDriver.Get", body, strlen(body), &text), 500);
    assert_true(strlen(text) < 600);
    free(text);
    free(body);
    free(long_name);
}

static int parse_options(const char *json, struct volume_spec *s, struct why *why)
{
    json_t *o = json_loads(json, 0, NULL);
    int rc;

    assert_non_null(o);
    rc = volumes_spec_from_options(o, s, why);
    json_decref(o);
    return rc;
}

static void test_options(void **state)
{
    static const char *const bad[] = {
        "{\"colour\":\"red\"}",     "{\"size\":\"1\"}",    "{\"size\":\"0\"}",
        "{\"size\":\"17T\"}",       "{\"size\":\"-1\"}",   "{\"size\":10}",
        "{\"block\":\"5k\"}",       "{\"block\":\"32k\"}", "{\"profile\":\"fast\"}",
        "{\"uid\":\"-1\"}",         "{\"uid\":\"root\"}",  "{\"uid\":\"4294967295\"}",
        "{\"gid\":\"1x\"}",         "{\"mode\":\"0999\"}", "{\"mode\":\"10000\"}",
        "{\"strict\":\"perhaps\"}", "{\"allow\":\"\"}",    "{\"allow\":\"a:b;;c:d\"}",
        "{\"deny\":\" ; \"}",
    };
    struct volume_spec s, t;
    struct why why;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
        assert_int_equal(parse_options(bad[i], &s, &why), -EINVAL);
        assert_true(strlen(why.text) > 0);
        volume_spec_clear(&s);
    }
    parse_options("{\"colour\":\"red\"}", &s, &why);
    assert_non_null(strstr(why.text, "colour"));
    volume_spec_clear(&s);
    assert_int_equal(
        parse_options("{\"size\":\"10G\",\"block\":\"8k\",\"profile\":\"database\",\"allow\":\"label:a=b,ro; "
                      "image:x\",\"deny\":\"container:y\",\"uid\":\"7\",\"gid\":\"8\",\"mode\":\"0700\","
                      "\"strict\":\"\"}",
                      &s, &why),
        0);
    assert_int_equal(s.size, 10ull << 30);
    assert_int_equal(s.block, 8192);
    assert_int_equal(s.profile, VOLUME_PROFILE_DATABASE);
    assert_int_equal(s.nallow, 2);
    assert_string_equal(s.allow[1], "image:x");
    assert_int_equal(s.ndeny, 1);
    assert_int_equal(s.uid, 7);
    assert_int_equal(s.mode, 0700);
    assert_true(s.strict);
    /* The order of rules does not matter, their number does. */
    assert_int_equal(
        parse_options("{\"size\":\"10240M\",\"block\":\"8192\",\"profile\":\"database\",\"allow\":\"image:x;"
                      "label:a=b,ro\",\"deny\":\"container:y\",\"uid\":\"7\",\"gid\":\"8\",\"mode\":\"700\","
                      "\"strict\":\"true\"}",
                      &t, &why),
        0);
    assert_true(volume_spec_equal(&s, &t));
    free(t.deny[--t.ndeny]);
    assert_false(volume_spec_equal(&s, &t));
    volume_spec_clear(&s);
    volume_spec_clear(&t);
    assert_int_equal(volumes_spec_from_options(NULL, &s, &why), 0);
    assert_int_equal(s.mode, 0755);
}

static void test_too_many_rules(void **state)
{
    struct volume_spec s;
    struct why why;
    int rc = 0;

    (void)state;
    volumes_spec_init(&s);
    for (int i = 0; i < AGENT_RULES_MAX; i++)
        assert_int_equal(volumes_spec_add_rule(&s, i & 1, " uid:1 ", 7, &why), 0);
    assert_string_equal(s.deny[0], "uid:1");
    rc = volumes_spec_add_rule(&s, false, "uid:1", 5, &why);
    assert_int_equal(rc, -E2BIG);
    volume_spec_clear(&s);
}

static void test_mountinfo(void **state)
{
    char s[] = "/a\\040b\\134c\\011", dev[MOUNT_DEV_MAX];

    (void)state;
    mountinfo_unescape(s);
    assert_string_equal(s, "/a b\\c\t");
    assert_int_equal(mountinfo_device("/proc", dev), 0);
    assert_non_null(strchr(dev, ':'));
    assert_int_equal(mountinfo_device("/no/such/mount", dev), -ENOENT);
}

/* --- what the engine knows --- */

#define ID_FILE "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define ID_NONE "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"

struct engine {
    int listener;
    const char *answer;
    char asked[2048];
};

static void *engine_once(void *arg)
{
    struct engine *e = arg;
    int c = accept(e->listener, NULL, NULL);
    ssize_t n = read(c, e->asked, sizeof(e->asked) - 1);

    e->asked[n > 0 ? n : 0] = 0;
    write_full(c, e->answer, strlen(e->answer));
    close(c);
    return NULL;
}

static int ask_engine(struct engine *e, const char *id, const char *answer, char *out, size_t cap)
{
    uint32_t source;
    pthread_t t;
    int fd, rc;

    e->answer = answer;
    pthread_create(&t, NULL, engine_once, e);
    rc = broker_container_facts(id, &fd, &source);
    pthread_join(t, NULL);
    if (rc < 0)
        return rc;
    assert_int_equal(source, AGENT_FACTS_API);
    out[read_upto(fd, out, cap - 1)] = 0;
    assert_int_equal(write(fd, "x", 1), -1);
    close(fd);
    return 0;
}

static void test_facts(void **state)
{
    char dir[] = "/tmp/coffer-engine-XXXXXX", text[256], *sock, *containers, *one, *file;
    struct engine e = {0};
    uint32_t source;
    int fd, w;

    (void)state;
    assert_non_null(mkdtemp(dir));
    sock = xasprintf("%s/docker.sock", dir);
    containers = xasprintf("%s/containers", dir);
    one = xasprintf("%s/%s", containers, ID_FILE);
    file = xasprintf("%s/config.v2.json", one);
    plugin_config.engine_root = dir;
    plugin_config.engine_socket = sock;
    /* No file, nobody listens. */
    assert_int_equal(broker_container_facts(ID_NONE, &fd, &source), -ENOENT);
    assert_int_equal(broker_container_facts("../../etc/shadow", &fd, &source), -EINVAL);
    assert_int_equal(broker_container_facts("ABCDEF", &fd, &source), -EINVAL);
    mkdir(containers, 0700);
    mkdir(one, 0700);
    /* A link, an empty file, one that is too large: not the engine's. */
    assert_int_equal(symlink("/etc/passwd", file), 0);
    assert_int_equal(broker_container_facts(ID_FILE, &fd, &source), -ELOOP);
    unlink(file);
    w = open(file, O_CREAT | O_WRONLY, 0600);
    assert_int_equal(broker_container_facts(ID_FILE, &fd, &source), -EINVAL);
    assert_int_equal(ftruncate(w, AGENT_FACTS_MAX + 1), 0);
    assert_int_equal(broker_container_facts(ID_FILE, &fd, &source), -EINVAL);
    assert_int_equal(ftruncate(w, 0), 0);
    write_full(w, "{\"ID\":1}", 8);
    close(w);
    assert_int_equal(broker_container_facts(ID_FILE, &fd, &source), 0);
    assert_int_equal(source, AGENT_FACTS_FILE);
    assert_int_equal(read_upto(fd, text, sizeof(text)), 8);
    close(fd);
    /* The API, where there is no file. */
    e.listener = unix_listen(sock, SOCK_STREAM, 0600);
    assert_true(e.listener >= 0);
    assert_int_equal(ask_engine(&e, ID_NONE, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[ ]", text, sizeof(text)),
                     -ENOENT);
    assert_non_null(
        strstr(e.asked, "GET /containers/json?all=1&filters=%7B%22id%22%3A%5B%22" ID_NONE "%22%5D%7D HTTP"));
    assert_int_equal(
        ask_engine(&e, ID_NONE, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n[{\"x\"}]", text, sizeof(text)), 0);
    assert_string_equal(text, "[{\"x\"}]");
    assert_int_equal(ask_engine(&e, ID_NONE, "HTTP/1.1 500 no\r\nContent-Length: 2\r\n\r\n[]", text, sizeof(text)),
                     -EIO);
    assert_int_equal(ask_engine(&e, ID_NONE, "HTTP/1.1 302 no\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
                                text, sizeof(text)),
                     -EIO);
    assert_int_equal(ask_engine(&e, ID_NONE, "rubbish", text, sizeof(text)), -EIO);
    close(e.listener);
    unlink(sock);
    unlink(file);
    rmdir(one);
    rmdir(containers);
    rmdir(dir);
    free(sock);
    free(containers);
    free(one);
    free(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls_without_volume),
        cmocka_unit_test(test_rubbish),
        cmocka_unit_test(test_deep_json),
        cmocka_unit_test(test_bad_names),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_too_many_rules),
        cmocka_unit_test(test_mountinfo),
        cmocka_unit_test(test_facts),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
