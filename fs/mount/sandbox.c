/*
 * sandbox.c - what coffer-fs gives up before it holds a key: every file and socket that it was not handed.
 *
 * Landlock with no rights at all (where the kernel has it), then a list of calls; what is not on it ends the process. Opening
 * a file fails instead (EACCES), for libraries that look for something optional. AddressSanitizer and ThreadSanitizer
 * builds have no list: their runtimes need more.
 */
#include "mount.h"

#include <linux/landlock.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static const int calls[] = {
    /* the device, the sockets, the backing files */
    SCMP_SYS(read), SCMP_SYS(write), SCMP_SYS(readv), SCMP_SYS(writev), SCMP_SYS(pread64), SCMP_SYS(pwrite64),
    SCMP_SYS(preadv), SCMP_SYS(pwritev), SCMP_SYS(preadv2), SCMP_SYS(pwritev2), SCMP_SYS(fdatasync), SCMP_SYS(fsync),
    SCMP_SYS(sync_file_range), SCMP_SYS(fadvise64), SCMP_SYS(fallocate), SCMP_SYS(ftruncate), SCMP_SYS(fstat),
    SCMP_SYS(lseek), SCMP_SYS(sendmsg), SCMP_SYS(recvmsg), SCMP_SYS(sendto), SCMP_SYS(recvfrom), SCMP_SYS(shutdown),
    SCMP_SYS(poll), SCMP_SYS(ppoll), SCMP_SYS(close), SCMP_SYS(fcntl), SCMP_SYS(dup), SCMP_SYS(eventfd2),
    /* memory */
    SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise), SCMP_SYS(brk), SCMP_SYS(mlock), SCMP_SYS(mlock2),
    SCMP_SYS(munlock),
    /* threads, clocks, itself */
    SCMP_SYS(futex), SCMP_SYS(clone), SCMP_SYS(clone3), SCMP_SYS(set_robust_list), SCMP_SYS(rseq),
    SCMP_SYS(sched_yield), SCMP_SYS(sched_getaffinity), SCMP_SYS(exit), SCMP_SYS(exit_group), SCMP_SYS(rt_sigreturn),
    SCMP_SYS(rt_sigprocmask), SCMP_SYS(rt_sigaction), SCMP_SYS(clock_gettime), SCMP_SYS(clock_nanosleep),
    SCMP_SYS(nanosleep), SCMP_SYS(gettimeofday), SCMP_SYS(time), SCMP_SYS(getrandom), SCMP_SYS(restart_syscall),
    SCMP_SYS(pause), SCMP_SYS(gettid), SCMP_SYS(getpid), SCMP_SYS(tgkill), SCMP_SYS(getuid), SCMP_SYS(geteuid),
    SCMP_SYS(getgid), SCMP_SYS(getegid), SCMP_SYS(sysinfo), SCMP_SYS(uname), SCMP_SYS(prlimit64)};

static const int refused[] = {SCMP_SYS(open),     SCMP_SYS(openat), SCMP_SYS(newfstatat), SCMP_SYS(statx),
                              SCMP_SYS(readlink), SCMP_SYS(access), SCMP_SYS(prctl),      SCMP_SYS(ioctl)};

static int filter(void)
{
    scmp_filter_ctx ctx = seccomp_init(SCMP_ACT_KILL_PROCESS);
    int rc = ctx ? 0 : -ENOMEM;

    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(calls); i++)
        if (calls[i] >= 0)
            rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, calls[i], 0);
    for (size_t i = 0; rc == 0 && i < ARRAY_LEN(refused); i++)
        if (refused[i] >= 0 && refused[i] != SCMP_SYS(newfstatat))
            rc = seccomp_rule_add(ctx, SCMP_ACT_ERRNO(EACCES), refused[i], 0);
    /* glibc's fstat(fd) is newfstatat(fd, "", AT_EMPTY_PATH); other paths end at Landlock and this user's rights. */
    if (rc == 0)
        rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, SCMP_SYS(newfstatat), 0);
    /* Memory may be mapped and protected, but never to be executed. */
    if (rc == 0)
        rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1, SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    if (rc == 0)
        rc = seccomp_rule_add(ctx, SCMP_ACT_ALLOW, SCMP_SYS(mprotect), 1, SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
    if (rc == 0)
        rc = seccomp_load(ctx);
    seccomp_release(ctx);
    return rc;
}

/* -ENOSYS, -EOPNOTSUPP: a kernel without it. */
static int landlock_nothing(void)
{
    struct landlock_ruleset_attr attr = {.handled_access_fs = (1ull << 13) - 1};
    int abi = (int)syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION), ruleset, rc = 0;

    if (abi < 1)
        return abi < 0 ? -errno : -ENOSYS;
    if (abi >= 2)
        attr.handled_access_fs |= 1ull << 13; /* REFER */
    if (abi >= 3)
        attr.handled_access_fs |= 1ull << 14; /* TRUNCATE */
    ruleset = (int)syscall(SYS_landlock_create_ruleset, &attr, sizeof(attr.handled_access_fs), 0);
    if (ruleset < 0)
        return -errno;
    if (syscall(SYS_landlock_restrict_self, ruleset, 0) < 0)
        rc = -errno;
    close_quiet(ruleset);
    return rc;
}

int sandbox_enter(void)
{
    const struct rlimit none = {0, 0};
    int rc;

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 ||
        setrlimit(RLIMIT_CORE, &none) < 0)
        return -errno;
    if (SANITIZED)
        return 0;
    rc = landlock_nothing();
    if (rc == -ENOSYS || rc == -EOPNOTSUPP)
        log_info("volume %s: this kernel has no Landlock; seccomp alone confines the server", mount_config.name);
    else if (rc < 0)
        return rc;
    return filter();
}
