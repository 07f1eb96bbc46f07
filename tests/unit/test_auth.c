/* test_auth.c - grants, and the threads that were given them as the next server and the next agent learn of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/mount/mount.h"

#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

struct mount_config mount_config; /* main is not here */

static uint64_t epoch;

/* What the tests before this one left is forgotten, as by a lock. */
static int set_up(void **state)
{
    (void)state;
    if (!mount_page)
        mount_page = calloc(1, sizeof(*mount_page));
    auth_end_all();
    auth_new_agent(++epoch);
    auth_agent_is(100);
    return mount_page ? 0 : -1;
}

/* A verdict for this thread under that grant, remembered. */
static void given(uint64_t grant, pid_t tid)
{
    struct auth a = {.kind = AGENT_ALLOW, .grant = auth_grant_ref(epoch, grant)};

    auth_remember(tid, 0, &a, (int)syscall(SYS_pidfd_open, getpid(), 0));
    auth_put(&a);
}

static unsigned lost(bool all, uint64_t *ret_grant)
{
    struct agent_renew q;
    unsigned at = 0, n = 0;

    while (auth_next_lost(all, &at, &q)) {
        n++;
        *ret_grant = q.grant;
        assert_true(q.grant != 0 && q.grant != UINT64_MAX && q.tid > 0 && q.write <= 1);
    }
    return n;
}

static void test_next_agent(void **state)
{
    struct agent_renew q;
    uint64_t grant = 0;
    struct auth a;
    unsigned at = 0;

    (void)state;
    given(7, getpid());
    assert_int_equal(lost(true, &grant), 0); /* its agent lives */
    assert_true(auth_cached(getpid(), 0, true, &a));
    auth_put(&a);
    auth_new_agent(++epoch);
    auth_agent_is(101);
    assert_false(auth_cached(getpid(), 0, true, &a)); /* no verdict of the old one is used */
    assert_int_equal(auth_handle_check(7), 0);        /* what is open goes on */
    assert_int_equal(lost(false, &grant), 1);
    assert_int_equal(grant, 7);
    assert_true(auth_next_lost(false, &at, &q));
    assert_int_equal(q.tid, getpid());
    auth_grant_unref(auth_grant_ref(epoch, 7)); /* the agent's answer names it */
    auth_found(&q, true);
    assert_int_equal(lost(true, &grant), 0);
    auth_new_agent(++epoch);
    auth_agent_is(102);
    assert_int_equal(lost(false, &grant), 1); /* to the one after that, too */
    at = 0;
    assert_true(auth_next_lost(false, &at, &q));
    auth_found(&q, false);
    assert_int_equal(lost(true, &grant), 0); /* a thread that is no use is not asked about again */
}

static void test_ended_stays_so(void **state)
{
    uint64_t grant;

    (void)state;
    given(8, getpid());
    auth_end_grant(8);
    auth_new_agent(++epoch);
    auth_agent_is(103);
    assert_int_equal(lost(true, &grant), 0);
    assert_int_equal(auth_handle_check(8), -EKEYREVOKED);
    /* Also of a grant that only a server of before has seen. */
    mount_page->witness[3] = (struct server_witness){.grant = 9, .agent = 1, .pidfd_ino = 1, .tid = 1, .write = 1};
    mount_page->witness[900] = mount_page->witness[3];
    assert_int_equal(lost(true, &grant), 2);
    auth_end_grant(9);
    assert_int_equal(lost(true, &grant), 0);
}

static void test_dead_threads_make_room(void **state)
{
    uint64_t grant = 0;
    pid_t pid = getpid();

    (void)state;
    given(10, pid);
    /* Threads of one set of the table, all dead at once. */
    for (int i = 1; i <= 20; i++) {
        pid_t child = fork();
        struct auth a = {.kind = AGENT_ALLOW, .grant = auth_grant_ref(epoch, 11)};
        int pidfd;

        assert_true(child >= 0);
        if (child == 0)
            _exit(0);
        pidfd = (int)syscall(SYS_pidfd_open, child, 0);
        waitpid(child, NULL, 0);
        auth_remember(pid + 256 * i, 0, &a, pidfd);
        auth_put(&a);
    }
    auth_new_agent(++epoch);
    auth_agent_is(104);
    assert_true(lost(true, &grant) >= 1);
    assert_int_equal(auth_handle_check(10), 0); /* the living one is still there */
}

static unsigned witnesses(uint64_t grant)
{
    unsigned n = 0;

    for (unsigned i = 0; i < SERVER_PAGE_WITNESSES; i++)
        n += mount_page->witness[i].grant == grant;
    return n;
}

/* A server that ends because another one stands ready leaves it who was given what; what the agent has ended it does not. */
static void test_stopped(void **state)
{
    (void)state;
    given(13, getpid());
    auth_stop();
    assert_int_equal(auth_handle_check(13), -EKEYREVOKED);
    assert_int_equal(witnesses(13), 1);
    auth_end_grant(13);
    assert_int_equal(witnesses(13), 0);
    given(14, getpid());
    auth_end_all();
    assert_int_equal(witnesses(14), 0);
}

static void test_hostile_page(void **state)
{
    uint8_t *at = (uint8_t *)mount_page->witness;
    uint64_t grant;

    (void)state;
    srandom(5);
    for (size_t i = 0; i < sizeof(mount_page->witness); i++)
        at[i] = (uint8_t)random();
    for (unsigned i = 0; i < SERVER_PAGE_WITNESSES; i += 4)
        mount_page->witness[i].grant = UINT64_MAX;
    for (unsigned i = 1; i < SERVER_PAGE_WITNESSES; i += 4)
        mount_page->witness[i].tid = -5;
    assert_true(lost(true, &grant) <= SERVER_PAGE_WITNESSES / 2);
    assert_int_equal(lost(false, &grant), 0);
    given(12, getpid());
    auth_end_all();
    assert_int_equal(lost(true, &grant), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_next_agent, set_up),
        cmocka_unit_test_setup(test_ended_stays_so, set_up),
        cmocka_unit_test_setup(test_dead_threads_make_room, set_up),
        cmocka_unit_test_setup(test_stopped, set_up),
        cmocka_unit_test_setup(test_hostile_page, set_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
