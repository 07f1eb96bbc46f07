/* test_facts.c - the engine's JSON, good and hostile, and the helper that parses it in children. */
#include "fs/base/base.h"
#include "fs/base/secmem.h"
#include "keystore/facts.h"

#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define A "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define B "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

static const char file_json[] =
    "{\"ID\":\"" A "\",\"Name\":\"/db\",\"Image\":\"sha256:11\",\"Config\":{\"Image\":\"postgres:16\",\"Labels\":"
    "{\"tier\":\"data\"}},\"MountPoints\":{\"/d\":{\"Name\":\"vol\",\"Driver\":\"coffer\",\"Type\":\"volume\"}}}";
static const char api_json[] =
    "[{\"Id\":\"" A "\",\"Names\":[\"/web/db\",\"/db\"],\"Image\":\"postgres:16\",\"ImageID\":\"sha256:11\",\"Labels\":"
    "{\"tier\":\"data\"},\"Mounts\":[{\"Type\":\"volume\",\"Name\":\"vol\",\"Driver\":\"coffer\"}]}]";

static struct facts_job job_of(uint32_t source)
{
    struct facts_job j = {.source = source, .nlabels = 2, .container = A, .volume = "vol", .driver = "coffer"};

    strcpy(j.labels[0], "tier");
    strcpy(j.labels[1], "none");
    return j;
}

static int parse(const char *json, uint32_t source, struct facts *f)
{
    struct facts_job j = job_of(source);
    int rc = facts_parse(json, strlen(json), &j, f);

    if (rc == 0)
        assert_true(facts_valid(f, &j));
    return rc;
}

static void check_good(const struct facts *f)
{
    assert_string_equal(f->id, A);
    assert_string_equal(f->name, "db");
    assert_string_equal(f->image, "postgres:16");
    assert_string_equal(f->image_id, "sha256:11");
    assert_int_equal(f->attached, 1);
    assert_int_equal(f->present[0], 1);
    assert_string_equal(f->values[0], "data");
    assert_int_equal(f->present[1], 0);
}

static void test_good(void **state)
{
    struct facts f;

    (void)state;
    assert_int_equal(parse(file_json, AGENT_FACTS_FILE, &f), 0);
    check_good(&f);
    assert_int_equal(parse(api_json, AGENT_FACTS_API, &f), 0);
    check_good(&f);
}

static void test_refused(void **state)
{
    static const struct {
        const char *json;
        uint32_t source;
        int err;
    } cases[] = {
        {"", AGENT_FACTS_FILE, -EINVAL},
        {"{", AGENT_FACTS_FILE, -EINVAL},
        {"[]", AGENT_FACTS_API, -EINVAL},
        {"{}", AGENT_FACTS_FILE, -EINVAL},
        {api_json, AGENT_FACTS_FILE, -EINVAL},
        {file_json, AGENT_FACTS_API, -EINVAL},
        {file_json, AGENT_FACTS_NONE, -EINVAL},
        /* another container's file */
        {"{\"ID\":\"" B "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"}}", AGENT_FACTS_FILE, -ENOENT},
        /* two keys of one name */
        {"{\"ID\":\"" A "\",\"ID\":\"" A "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"}}",
         AGENT_FACTS_FILE, -EINVAL},
        {"{\"ID\":\"" A "\",\"Name\":\"x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"}}", AGENT_FACTS_FILE, -EINVAL},
        {"{\"ID\":\"" A "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\",\"Labels\":{\"a\":1}}}",
         AGENT_FACTS_FILE, -EINVAL},
        {"{\"ID\":\"" A "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"},\"MountPoints\":[]}",
         AGENT_FACTS_FILE, -EINVAL},
        {"{\"ID\":\"" A "\",\"Name\":\"/x\\u0000y\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"}}", AGENT_FACTS_FILE,
         -EINVAL},
    };
    struct facts f;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        assert_int_equal(parse(cases[i].json, cases[i].source, &f), cases[i].err);
}

static void test_two_results(void **state)
{
    char *two =
        xasprintf("[%.*s,%.*s]", (int)strlen(api_json) - 2, api_json + 1, (int)strlen(api_json) - 2, api_json + 1);
    struct facts f;

    (void)state;
    assert_int_equal(parse(two, AGENT_FACTS_API, &f), -EINVAL);
    free(two);
}

static void test_attached(void **state)
{
    static const char *const mounts[] = {
        "{\"Name\":\"vol\",\"Driver\":\"local\",\"Type\":\"volume\"}",
        "{\"Name\":\"vol2\",\"Driver\":\"coffer\",\"Type\":\"volume\"}",
        "{\"Name\":\"vol\",\"Driver\":\"coffer\",\"Type\":\"bind\"}",
        "\"vol\"",
        "null",
    };
    struct facts f;

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(mounts); i++) {
        char *json = xasprintf("{\"ID\":\"" A "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"},"
                               "\"MountPoints\":{\"/d\":%s}}",
                               mounts[i]);

        assert_int_equal(parse(json, AGENT_FACTS_FILE, &f), 0);
        assert_int_equal(f.attached, 0);
        free(json);
    }
}

static void test_long_values(void **state)
{
    char big[FACTS_TEXT_SIZE + 1], *json;
    struct facts f;

    (void)state;
    memset(big, 'v', sizeof(big) - 1);
    big[sizeof(big) - 1] = 0;
    json = xasprintf("{\"ID\":\"" A "\",\"Name\":\"/x\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\",\"Labels\":"
                     "{\"tier\":\"%s\"}}}",
                     big);
    assert_int_equal(parse(json, AGENT_FACTS_FILE, &f), 0);
    assert_int_equal(f.present[0], 0);
    free(json);
    json = xasprintf("{\"ID\":\"" A "\",\"Name\":\"/%s\",\"Image\":\"i\",\"Config\":{\"Image\":\"y\"}}", big);
    assert_int_equal(parse(json, AGENT_FACTS_FILE, &f), -EINVAL);
    free(json);
}

static void test_valid_checks_every_field(void **state)
{
    struct facts_job j = job_of(AGENT_FACTS_FILE);
    struct facts good, f;

    (void)state;
    assert_int_equal(parse(file_json, AGENT_FACTS_FILE, &good), 0);
#define BREAK(change)                                                                                                  \
    do {                                                                                                               \
        f = good;                                                                                                      \
        change;                                                                                                        \
        assert_false(facts_valid(&f, &j));                                                                             \
    } while (0)
    BREAK(f.err = 1);
    BREAK(f.nlabels = 3);
    BREAK(f.attached = 2);
    BREAK(memset(f.id, 'a', sizeof(f.id)));
    BREAK(f.id[3] = 'b');
    BREAK(memset(f.name, 'a', sizeof(f.name)));
    BREAK(memset(f.image, 'a', sizeof(f.image)));
    BREAK(memset(f.image_id, 'a', sizeof(f.image_id)));
    BREAK(f.present[1] = 2);
    BREAK(f.present[2] = 1);
    BREAK(memset(f.values[31], 'a', sizeof(f.values[31])));
}

/* --- the helper --- */

static int memory_file(const void *buf, size_t n)
{
    int fd = memfd_create("facts", MFD_CLOEXEC);

    assert_true(fd >= 0);
    assert_int_equal(write_full(fd, buf, n), 0);
    return fd;
}

static int ask(int helper, int fd, struct facts *f)
{
    struct facts_job j = job_of(AGENT_FACTS_FILE);
    struct pollfd p = {.events = POLLIN};
    int rc = facts_ask(helper, &j, fd, &p.fd);

    if (rc < 0)
        return rc;
    assert_int_equal(poll(&p, 1, FACTS_TIMEOUT_MS + 3000), 1);
    rc = facts_take(p.fd, &j, f);
    close(p.fd);
    return rc;
}

__attribute__((unused)) static void test_helper(void **state)
{
    int helper, fd, pipefd[2];
    struct facts f = {0};
    char *big;
    pid_t pid;

    (void)state;
    assert_int_equal(secmem_init(), 0);
    assert_int_equal(facts_start(&helper, &pid), 0);
    fd = memory_file(file_json, strlen(file_json));
    for (int i = 0; i < 20; i++) {
        assert_int_equal(ask(helper, fd, &f), 0);
        check_good(&f);
    }
    close(fd);
    big = xcalloc(1, AGENT_FACTS_MAX + 2);
    memset(big, ' ', AGENT_FACTS_MAX + 1);
    fd = memory_file(big, AGENT_FACTS_MAX + 1);
    assert_int_equal(ask(helper, fd, &f), -EFBIG);
    close(fd);
    memset(big, '[', AGENT_FACTS_MAX);
    fd = memory_file(big, AGENT_FACTS_MAX);
    assert_int_equal(ask(helper, fd, &f), -EINVAL);
    close(fd);
    free(big);
    /* a descriptor that never ends: the child's alarm ends it, the next job is served */
    assert_int_equal(pipe(pipefd), 0);
    assert_int_equal(ask(helper, pipefd[0], &f), -EIO);
    fd = memory_file(file_json, strlen(file_json));
    assert_int_equal(ask(helper, fd, &f), 0);
    close(fd);
    close(helper);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_two_results), cmocka_unit_test(test_attached),
        cmocka_unit_test(test_long_values), cmocka_unit_test(test_valid_checks_every_field),
#ifndef __SANITIZE_ADDRESS__ /* the helper's memory limit leaves AddressSanitizer no room for its shadow */
        cmocka_unit_test(test_helper),
#endif
    };

    return cmocka_run_group_tests_name("facts", tests, NULL, NULL);
}
