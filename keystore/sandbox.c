/*
 * sandbox.c - see sandbox.h.
 *
 * 1. The lists allow; what is not on them kills the process (the facts processes) or fails with EPERM (coffer-keyd, so
 *    that a library's harmless attempt at something new does not lock every volume of the host).
 * 2. coffer-keyd opens nothing for writing outside its keystore directory; paths are Landlock's, calls are seccomp's.
 */
#include "keystore/sandbox.h"

#include "fs/base/base.h"

#include <fcntl.h>
#include <linux/landlock.h>
#include <seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

bool sandbox_active(void)
{
    return !SANITIZED;
}

void sandbox_limit_memory(size_t bytes)
{
    struct rlimit r = {bytes, bytes};

    if (!SANITIZED)
        setrlimit(RLIMIT_AS, &r);
}

/* --- seccomp --- */

/* Memory, locks, clocks, ending: what every process needs. */
#define CALLS_COMMON                                                                                                   \
    SCMP_SYS(read), SCMP_SYS(write), SCMP_SYS(close), SCMP_SYS(lseek), SCMP_SYS(sendmsg), SCMP_SYS(recvmsg),           \
        SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise), SCMP_SYS(brk), SCMP_SYS(futex), SCMP_SYS(exit),         \
        SCMP_SYS(exit_group), SCMP_SYS(rt_sigreturn), SCMP_SYS(clock_gettime), SCMP_SYS(gettimeofday), SCMP_SYS(time), \
        SCMP_SYS(getrandom), SCMP_SYS(restart_syscall)

static const int child_calls[] = {CALLS_COMMON};

static const int helper_calls[] = {
    CALLS_COMMON,        SCMP_SYS(clone),          SCMP_SYS(fork),         SCMP_SYS(alarm),   SCMP_SYS(setitimer),
    SCMP_SYS(setrlimit), SCMP_SYS(prlimit64),      SCMP_SYS(prctl),        SCMP_SYS(seccomp), SCMP_SYS(set_robust_list),
    SCMP_SYS(rseq),      SCMP_SYS(rt_sigprocmask), SCMP_SYS(rt_sigaction), SCMP_SYS(poll),    SCMP_SYS(ppoll),
    SCMP_SYS(gettid),    SCMP_SYS(getpid),         SCMP_SYS(mprotect)};

static const int keyd_calls[] = {
    CALLS_COMMON,
    /* its sockets and the pipes of secrets */
    SCMP_SYS(accept4), SCMP_SYS(accept), SCMP_SYS(socketpair), SCMP_SYS(getsockopt), SCMP_SYS(sendto),
    SCMP_SYS(recvfrom), SCMP_SYS(shutdown), SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(fcntl), SCMP_SYS(dup),
    SCMP_SYS(dup3),
    /* the keystore and the audit log */
    SCMP_SYS(open), SCMP_SYS(openat), SCMP_SYS(unlink), SCMP_SYS(unlinkat), SCMP_SYS(rename), SCMP_SYS(renameat),
    SCMP_SYS(renameat2), SCMP_SYS(linkat), SCMP_SYS(pread64), SCMP_SYS(pwrite64), SCMP_SYS(readv), SCMP_SYS(writev),
    SCMP_SYS(preadv), SCMP_SYS(pwritev), SCMP_SYS(fsync), SCMP_SYS(fdatasync), SCMP_SYS(ftruncate), SCMP_SYS(fallocate),
    SCMP_SYS(fchmod), SCMP_SYS(flock), SCMP_SYS(fstatfs), SCMP_SYS(getdents64), SCMP_SYS(faccessat),
    SCMP_SYS(faccessat2), SCMP_SYS(access),
    /* looking at callers and their cgroups */
    SCMP_SYS(pidfd_open), SCMP_SYS(pidfd_send_signal), SCMP_SYS(stat), SCMP_SYS(lstat), SCMP_SYS(fstat),
    SCMP_SYS(newfstatat), SCMP_SYS(statx), SCMP_SYS(inotify_init1), SCMP_SYS(inotify_add_watch), SCMP_SYS(readlink),
    SCMP_SYS(readlinkat),
    /* memory for keys; itself */
    SCMP_SYS(mprotect), SCMP_SYS(mlock), SCMP_SYS(mlock2), SCMP_SYS(munlock), SCMP_SYS(getpid), SCMP_SYS(gettid),
    SCMP_SYS(getuid), SCMP_SYS(geteuid), SCMP_SYS(rt_sigaction), SCMP_SYS(rt_sigprocmask), SCMP_SYS(tgkill),
    SCMP_SYS(wait4), SCMP_SYS(sched_yield), SCMP_SYS(getrlimit), SCMP_SYS(clock_nanosleep), SCMP_SYS(nanosleep),
    SCMP_SYS(uname), SCMP_SYS(sysinfo)};

static int filter(uint32_t refuse, const int *calls, size_t n)
{
    scmp_filter_ctx ctx = seccomp_init(refuse);
    int rc = ctx ? 0 : -ENOMEM;

    if (ctx && refuse == SCMP_ACT_KILL_PROCESS)
        rc = seccomp_attr_set(ctx, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);
    for (size_t i = 0; rc == 0 && i < n; i++)
        if (calls[i] >= 0) /* a pseudo number: this architecture has no such call */
            rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, calls[i], 0);
    /* Memory may be mapped, but never to be executed. */
    if (rc == 0)
        rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1, SCMP_A2(SCMP_CMP_MASKED_EQ, 4, 0));
    if (rc == 0)
        rc = seccomp_load(ctx);
    seccomp_release(ctx);
    return rc;
}

int sandbox_facts_child(void)
{
    return SANITIZED ? 0 : filter(SCMP_ACT_KILL_PROCESS, child_calls, ARRAY_LEN(child_calls));
}

int sandbox_facts_helper(void)
{
    if (SANITIZED)
        return 0;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    return filter(SCMP_ACT_KILL_PROCESS, helper_calls, ARRAY_LEN(helper_calls));
}

/* --- Landlock --- */

#define LL_READ  (LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR)
#define LL_WRITE (LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REMOVE_FILE | LANDLOCK_ACCESS_FS_MAKE_REG)
#define LL_ABI1  ((1ull << 13) - 1) /* every right of the first version */

static int landlock_allow(int ruleset, int dir, uint64_t access)
{
    struct landlock_path_beneath_attr rule = {.allowed_access = access, .parent_fd = dir};

    return syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) < 0 ? -errno : 0;
}

static int landlock_allow_path(int ruleset, const char *path)
{
    int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC), rc;

    if (fd < 0)
        return errno == ENOENT ? 0 : -errno;
    rc = landlock_allow(ruleset, fd, LL_READ);
    close_quiet(fd);
    return rc;
}

/* -ENOSYS, -EOPNOTSUPP: a kernel without it. */
static int landlock_keyd(int keystore_dir)
{
    struct landlock_ruleset_attr attr = {.handled_access_fs = LL_ABI1};
    int abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION), ruleset, rc;

    if (abi < 1)
        return abi < 0 ? -errno : -ENOSYS;
    if (abi >= 2)
        attr.handled_access_fs |= 1ull << 13; /* REFER */
    if (abi >= 3)
        attr.handled_access_fs |= 1ull << 14; /* TRUNCATE */
    ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof(attr.handled_access_fs), 0);
    if (ruleset < 0)
        return -errno;
    rc = landlock_allow(ruleset, keystore_dir, LL_READ | LL_WRITE | (abi >= 3 ? 1ull << 14 : 0));
    if (rc == 0)
        rc = landlock_allow_path(ruleset, "/proc");
    if (rc == 0)
        rc = landlock_allow_path(ruleset, "/sys/fs/cgroup");
    if (rc == 0 && syscall(SYS_landlock_restrict_self, ruleset, 0) < 0)
        rc = -errno;
    close_quiet(ruleset);
    return rc;
}

int sandbox_keyd(int keystore_dir, bool *ret_landlock)
{
    int rc;

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    rc = landlock_keyd(keystore_dir);
    if (rc < 0 && rc != -ENOSYS && rc != -EOPNOTSUPP)
        return rc;
    *ret_landlock = rc == 0;
    return SANITIZED ? 0 : filter(SCMP_ACT_ERRNO(EPERM), keyd_calls, ARRAY_LEN(keyd_calls));
}
