/* test_inodes.c - what a server leaves to the next one of its mount (struct server_page), honest and hostile. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/mount/mount.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct mount_config mount_config; /* main is not here */
static struct server_page *page;

static int set_up(void **state)
{
    int fd = memfd_create("page", MFD_ALLOW_SEALING);

    (void)state;
    if (fd < 0 || ftruncate(fd, sizeof(*page)) < 0 || (fd != SERVER_FD_PAGE && dup2(fd, SERVER_FD_PAGE) < 0))
        return -1;
    page = mmap(NULL, sizeof(*page), PROT_READ | PROT_WRITE, MAP_SHARED, SERVER_FD_PAGE, 0);
    mount_config.page = true;
    return page == MAP_FAILED ? -1 : 0;
}

static int tear_down(void **state)
{
    (void)state;
    munmap(page, sizeof(*page));
    close(SERVER_FD_PAGE);
    return 0;
}

/* Each server is a process of its own, as in life; what fails in it fails here. */
static void server(bool takeover, void (*work)(void))
{
    pid_t pid = fork();
    int status;

    assert_true(pid >= 0);
    if (pid == 0) {
        mount_config.takeover = takeover;
        page_begin();
        inodes_begin();
        work();
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

static size_t count(enum inodes_which which)
{
    uint64_t *ino;
    size_t n = inodes_list(which, &ino, NULL);

    free(ino);
    return n;
}

static bool has(uint64_t want)
{
    uint64_t *ino;
    size_t n = inodes_list(INODES_OPENED, &ino, NULL), found = 0;

    for (size_t i = 0; i < n; i++)
        found += ino[i] == want;
    free(ino);
    return found == 1;
}

static void require(bool ok)
{
    if (!ok)
        _exit(1);
}

static void first(void)
{
    for (uint64_t ino = 2; ino < 1002; ino++) {
        inodes_ref(ino);
        inodes_opened(ino, ino % 2);
    }
    for (uint64_t ino = 2; ino < 502; ino++) {
        inodes_closed(ino, ino % 2);
        if (ino < 302)
            inodes_forget(ino, 1);
    }
    inodes_ref(2000);
    inodes_cached(2000);
    inodes_ref(2001);
    require(count(INODES_OPENED) == 701 && !inodes_unknown());
}

static void second(void)
{
    require(count(INODES_OPENED) == 701 && !inodes_unknown());
    require(!has(301) && has(302) && has(2000) && !has(2001));
    /* A handle of its own comes and goes: the kernel's content of before stays. */
    inodes_opened(302, true);
    inodes_closed(302, true);
    require(has(302));
    inodes_forget(303, 5);
    require(!has(303));
}

static void third(void)
{
    require(count(INODES_OPENED) == 700 && has(302) && !has(303));
}

static void test_handed_on(void **state)
{
    (void)state;
    server(false, first);
    assert_int_equal(page->head.inodes, 701);
    server(true, second);
    server(true, third);
    assert_int_equal(page->head.all, 0);
}

static void overflow(void)
{
    for (uint64_t ino = 2; ino < SERVER_PAGE_INODES + 10; ino++)
        inodes_cached(ino);
    require(count(INODES_OPENED) == SERVER_PAGE_INODES + 8 && !inodes_unknown());
}

static void after_overflow(void)
{
    require(count(INODES_OPENED) == SERVER_PAGE_INODES && inodes_unknown());
}

static void test_overflow(void **state)
{
    (void)state;
    server(false, overflow);
    server(true, after_overflow);
}

static void hostile(void)
{
    require(count(INODES_OPENED) == 2 && has(7) && has(9));
    require(!has(0) && !has(UINT64_MAX) && !has(1ull << 48));
    for (uint64_t ino = 100; ino < 200; ino++)
        inodes_cached(ino);
    inodes_forget(7, 1);
    require(count(INODES_OPENED) == 101);
}

static void test_hostile(void **state)
{
    (void)state;
    page->head.version = SERVER_PAGE_VERSION;
    page->head.inodes = UINT32_MAX;
    page->inode[0] = UINT64_MAX;
    page->inode[1] = 7;
    page->inode[2] = 7;
    page->inode[3] = 1ull << 48;
    page->inode[SERVER_PAGE_INODES - 1] = 9;
    server(true, hostile);
    assert_int_equal(page->head.inodes, 101);
}

static void of_another_program(void)
{
    require(inodes_unknown() && count(INODES_OPENED) == 0);
}

static void test_other_version(void **state)
{
    (void)state;
    page->head.version = SERVER_PAGE_VERSION + 1;
    page->inode[0] = 7;
    page->head.inodes = 1;
    server(true, of_another_program);
    assert_int_equal(page->head.all, 1);
    server(true, of_another_program); /* what is not known stays so */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_handed_on, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_overflow, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_hostile, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_other_version, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
