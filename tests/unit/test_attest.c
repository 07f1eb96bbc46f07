/* test_attest.c - the strict reading of /proc, and which container a set of cgroup paths names. */
#include "fs/base/base.h"
#include "keystore/attest.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define A "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define B "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

static struct attest *parse(const char *text, int want)
{
    struct attest *a = xcalloc(1, sizeof(*a));

    a->pidfd = -1;
    assert_int_equal(attest_parse_cgroups(a, text, strlen(text)), want);
    return a;
}

/* Parses, lets the engine know the ids that stand in known, and returns the container's id or "" or "refused". */
static const char *container_of(const char *text, const char *known)
{
    static char id[ATTEST_ID_SIZE];
    struct attest *a = parse(text, 0);
    bool k[ATTEST_IDS] = {false};
    const char *reason = NULL;
    int index, rc;

    for (unsigned i = 0; i < a->nids; i++)
        k[i] = strstr(known, a->ids[i]) != NULL;
    rc = attest_container(a, k, &index, &reason);
    if (rc < 0)
        assert_non_null(reason);
    snprintf(id, sizeof(id), "%s", rc < 0 ? "refused" : index < 0 ? "" : a->ids[index]);
    attest_free(a);
    return id;
}

static void test_cgroups_wellformed(void **state)
{
    struct attest *a = parse("4:cpu,cpuacct:/docker/" A "\n1:name=systemd:/docker/" A "/x:y\n0::/\n", 0);

    (void)state;
    assert_int_equal(a->ncgroups, 3);
    assert_string_equal(a->cgroups[0].hierarchy, "cpu,cpuacct");
    assert_string_equal(a->cgroups[1].path, "/docker/" A "/x:y");
    assert_string_equal(a->cgroups[2].hierarchy, "");
    assert_int_equal(a->nids, 1);
    assert_true(a->shaped);
    attest_free(a);
}

static void test_cgroups_malformed(void **state)
{
    static const char *const bad[] = {
        "",
        "\n",
        "0::/", /* no newline at the end */
        "0::/\n\n",
        "0:/\n",
        "::/\n",
        "x::/\n",
        "0::x\n",
        "0::/../x\n",
        "0::/..\n",
        "0::/a/../b\n",
        "0::/a/./b\n",
        "0::/a//b\n",
        "0::/a/\n",
        "0::/a (deleted)\n",
        "0::/a\n0::/b\n", /* twice */
        "0:cpu:/a\n",     /* hierarchy 0 has no controllers */
        "1::/a\n",
        "1:cpu:/a\n2:cpu:/b\n",
        "1234567890:cpu:/a\n",
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(bad); i++)
        attest_free(parse(bad[i], -EACCES));
}

static void test_cgroups_bounds(void **state)
{
    char *text = xcalloc(1, 80000);
    size_t n = 0;

    (void)state;
    for (int i = 1; i <= ATTEST_CGROUPS + 1; i++)
        n += (size_t)sprintf(text + n, "%d:c%d:/\n", i, i);
    attest_free(parse(text, -EACCES));
    n = (size_t)sprintf(text, "0::");
    for (int i = 0; i < ATTEST_IDS + 1; i++)
        n += (size_t)sprintf(text + n, "/%064x", i + 1);
    text[n] = '\n';
    text[n + 1] = 0;
    attest_free(parse(text, -EACCES));
    memset(text, 'a', 70000);
    memcpy(text, "0::/", 4);
    text[69999] = '\n';
    text[70000] = 0;
    attest_free(parse(text, -EACCES));
    free(text);
}

static void test_shapes(void **state)
{
    static const struct {
        const char *component;
        unsigned ids;
        bool shaped;
    } cases[] = {
        {A, 1, true},
        {"docker-" A ".scope", 1, true},
        {"libpod-" A ".scope", 1, true},
        {"cri-containerd-" A ".scope", 1, true},
        {"libpod-conmon-" A ".scope", 0, true},
        {"docker-" A ".service", 0, true},
        {"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", 0, true},
        {A "0", 0, true},
        {"session-1.scope", 0, false},
        {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 0, false}, /* 63 */
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        char *text = xasprintf("0::/x/%s\n", cases[i].component);
        struct attest *a = parse(text, 0);

        assert_int_equal(a->nids, cases[i].ids);
        assert_int_equal(a->shaped, cases[i].shaped);
        attest_free(a);
        free(text);
    }
}

static void test_container(void **state)
{
    (void)state;
    assert_string_equal(container_of("0::/docker/" A "\n", A), A);
    assert_string_equal(container_of("0::/system.slice/docker-" A ".scope/init\n", A), A);
    assert_string_equal(container_of("0::/docker/" A "\n", ""), "");
    assert_string_equal(container_of("0::/user.slice\n", A), "");
    /* a child cgroup named after a neighbour, and --cgroup-parent */
    assert_string_equal(container_of("0::/docker/" A "/" B "\n", A B), "refused");
    assert_string_equal(container_of("0::/docker/" A "/docker-" B ".scope\n", A B), "refused");
    assert_string_equal(container_of("0::/docker/" A "/" A "\n", A), "refused");
    /* an engine inside the container: its ids say nothing to the outer one */
    assert_string_equal(container_of("0::/docker/" A "/docker/" B "\n", A), A);
    /* hierarchies must not contradict each other */
    assert_string_equal(container_of("2:pids:/docker/" A "\n1:cpu:/docker/" B "\n0::/\n", A B), "refused");
    assert_string_equal(container_of("2:pids:/docker/" A "\n1:cpu:/docker/" A "/sub\n0::/\n", A B), A);
    assert_string_equal(container_of("2:pids:/docker/" A "\n1:cpu:/docker/" B "\n0::/\n", A), A);
}

static void test_status(void **state)
{
    struct attest a = {.pidfd = -1};

    (void)state;
    assert_int_equal(attest_parse_status(&a, "Name:\tx\\nUid:\nTgid:\t7\nUid:\t1000\t0\t0\t0\nNSpid:\t9\n"), 0);
    assert_int_equal(a.tgid, 7);
    assert_int_equal(a.uid, 1000);
    assert_true(a.own_pid_ns);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t7\nUid:\t0\t0\t0\t0\nNSpid:\t9\t1\n"), 0);
    assert_false(a.own_pid_ns);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t7\nUid:\t0\t0\t0\t0\n"), -EACCES);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t7\nUid:\t0\nNSpid:\t9\n"), -EACCES);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t0\nUid:\t0\t0\t0\t0\nNSpid:\t9\n"), -EACCES);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t-7\nUid:\t0\t0\t0\t0\nNSpid:\t9\n"), -EACCES);
    assert_int_equal(attest_parse_status(&a, "Name:\tx\nTgid:\t7\nUid:\t0\t0\t0\t99999999999\nNSpid:\tz\n"), -EACCES);
}

static void test_mounts_and_identity(void **state)
{
    /* The real ones of this machine: a caller's leaves are found, alive, and equal to themselves. */
    struct attest_identity one, two;
    struct attest_mounts *m = NULL;
    struct attest *a = NULL;
    const char *reason;

    (void)state;
    assert_int_equal(attest_mounts_load(&m), 0);
    assert_int_equal(attest_caller(getpid(), &a, &reason), 0);
    assert_int_equal(a->tgid, getpid());
    assert_int_equal(a->uid, getuid());
    assert_true(attest_alive(a));
    assert_int_equal(attest_identify(m, a, NULL, &one), 0);
    assert_int_equal(attest_identify(m, a, NULL, &two), 0);
    assert_true(attest_identity_equal(&one, &two));
    assert_true(attest_identity_alive(&one));
    one.dirs[0].ino++;
    assert_false(attest_identity_equal(&one, &two));
    assert_false(attest_identity_alive(&one));
    assert_int_equal(attest_identify(m, a, A, &one), -ENOENT);
    attest_identity_free(&one);
    attest_identity_free(&two);
    attest_free(a);
    attest_mounts_free(m);
}

static void test_mounts_strict(void **state)
{
    /* Bound parts, other places and other filesystems do not count as a hierarchy. */
    static const char info[] = "31 23 0:28 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
                               "32 23 0:28 / /sys/fs/cgroupx rw - cgroup2 cgroup2 rw\n"
                               "33 23 0:28 / /home/cgroup rw shared:1 - cgroup2 cgroup2 rw\n"
                               "34 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
                               "35 broken\n";
    struct attest_mounts *m = attest_mounts_parse(info);
    struct attest_identity id;
    struct attest *a = parse("0::/\n", 0);

    (void)state;
    assert_int_equal(attest_identify(m, a, NULL, &id), -ENOENT);
    attest_free(a);
    attest_mounts_free(m);
}

static void test_dead_caller(void **state)
{
    const char *reason = NULL;
    struct attest *a = NULL;
    pid_t pid = fork();

    (void)state;
    if (pid == 0) {
        pause();
        _exit(0);
    }
    assert_int_equal(attest_caller(pid, &a, &reason), 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    assert_false(attest_alive(a));
    attest_free(a);
    assert_int_equal(attest_caller(pid, &a, &reason), -ESRCH);
    assert_non_null(reason);
    assert_int_equal(attest_caller(-1, &a, &reason) < 0, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cgroups_wellformed),  cmocka_unit_test(test_cgroups_malformed),
        cmocka_unit_test(test_cgroups_bounds),      cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_container),           cmocka_unit_test(test_status),
        cmocka_unit_test(test_mounts_and_identity), cmocka_unit_test(test_mounts_strict),
        cmocka_unit_test(test_dead_caller),
    };

    return cmocka_run_group_tests_name("attest", tests, NULL, NULL);
}
