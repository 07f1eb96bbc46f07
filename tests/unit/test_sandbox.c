/* test_sandbox.c - what the cages let through and what not, each tried in a child that puts one on. */
#include "fs/base/base.h"
#include "keystore/sandbox.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* Runs fn in a child; returns its wait status. */
static int in_child(void (*fn)(void))
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        fn();
        _exit(0);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

static void need(bool ok, int code)
{
    if (!ok)
        _exit(code);
}

static char dir[] = "/tmp/coffer-sandbox-XXXXXX";

static void keyd(void)
{
    char *argv[] = {NULL};
    bool landlock = false;
    int fd, d = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    need(d >= 0, 1);
    need(sandbox_keyd(d, &landlock) == 0, 2);
    need(file_replace(d, "keystore", "x", 1, 0600) == 0, 3);
    need((fd = openat(d, "keystore", O_RDWR | O_CLOEXEC)) >= 0 && ftruncate(fd, 0) == 0 && fdatasync(fd) == 0, 4);
    need(unlinkat(d, "keystore", 0) == 0, 5);
    need(open("/proc/self/cgroup", O_RDONLY) >= 0, 6);
    if (landlock) {
        need(open("/etc/passwd", O_RDONLY) < 0 && errno == EACCES, 7);
        need(open("/tmp/coffer-sandbox-no", O_WRONLY | O_CREAT, 0600) < 0, 8);
        need(open("/proc/self/comm", O_WRONLY) < 0 && errno == EACCES, 9);
    }
    if (!sandbox_active())
        return;
    need(socket(AF_INET, SOCK_STREAM, 0) < 0 && errno == EPERM, 10);
    need(fork() < 0 && errno == EPERM, 11);
    need(execve("/bin/true", argv, argv) < 0, 12);
    need(mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, 13);
    need(kill(getppid(), 0) < 0 && errno == EPERM, 14);
}

static void helper_opens(void)
{
    need(sandbox_facts_helper() == 0, 1);
    open("/etc/passwd", O_RDONLY);
}

static void helper_execs(void)
{
    char *argv[] = {NULL};

    need(sandbox_facts_helper() == 0, 1);
    execve("/bin/true", argv, argv);
}

static void helper_forks(void)
{
    need(sandbox_facts_helper() == 0, 1);
    need(fork() >= 0, 2);
}

static void child_works(void)
{
    need(sandbox_facts_helper() == 0 && sandbox_facts_child() == 0, 1);
    free(malloc(1 << 20));
}

static void child_forks(void)
{
    need(sandbox_facts_helper() == 0 && sandbox_facts_child() == 0, 1);
    fork();
}

static void child_resets_alarm(void)
{
    need(sandbox_facts_helper() == 0 && sandbox_facts_child() == 0, 1);
    alarm(0);
}

static void test_keyd(void **state)
{
    int status;

    (void)state;
    assert_non_null(mkdtemp(dir));
    status = in_child(keyd);
    rmdir(dir);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void test_facts(void **state)
{
    void (*const forbidden[])(void) = {helper_opens, helper_execs, child_forks, child_resets_alarm};

    (void)state;
    assert_int_equal(in_child(helper_forks), 0);
    assert_int_equal(in_child(child_works), 0);
    for (size_t i = 0; sandbox_active() && i < ARRAY_LEN(forbidden); i++) {
        int status = in_child(forbidden[i]);

        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_keyd), cmocka_unit_test(test_facts)};

    return cmocka_run_group_tests_name("sandbox", tests, NULL, NULL);
}
