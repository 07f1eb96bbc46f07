/*
 * coffer-keyd - the key agent. Started by cofferd as `coffer-keyd --driver NAME` with two descriptors:
 *
 *   3  the listening socket (SOCK_SEQPACKET), mode 0600 root, bound by cofferd
 *   4  the keystore's directory, 0700 of this process's user
 *
 * as its own user, without capabilities; stderr is the log. Order of reading: coffer/agent.h (the protocol) - server.c
 * (connections and requests) - authorise.c (decisions) - attest.c (who calls) - facts.c (what the engine says) -
 * policy.c (the rules) - grants.c - keystore.c - audit.c - sandbox.c.
 *
 * Order of starting: memory is made safe for keys; the helper that parses JSON is forked while there is no key and no
 * way to one; everything is opened that must be; then the sandbox closes. Only then can a key come to be.
 */
#include "fs/base/base.h"
#include "fs/base/secmem.h"
#include "keystore/facts.h"
#include "keystore/sandbox.h"
#include "keystore/server.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FD_LISTEN = 3, FD_KEYSTORE = 4 };

static int usage(void)
{
    fprintf(stderr, "usage: coffer-keyd --driver NAME, started by cofferd\n");
    return 2;
}

/* Whether the two descriptors are what they must be; the rest of the process is as its starter made it. */
static bool descriptors_ok(void)
{
    struct stat st;
    int type = 0, listening = 0;
    socklen_t n = sizeof(int), m = sizeof(int);

    if (getsockopt(FD_LISTEN, SOL_SOCKET, SO_TYPE, &type, &n) < 0 || type != SOCK_SEQPACKET ||
        getsockopt(FD_LISTEN, SOL_SOCKET, SO_ACCEPTCONN, &listening, &m) < 0 || !listening) {
        log_err("descriptor 3 is not a listening packet socket: start cofferd, not coffer-keyd");
        return false;
    }
    if (fstat(FD_KEYSTORE, &st) < 0 || !S_ISDIR(st.st_mode)) {
        log_err("descriptor 4 is not the keystore's directory: start cofferd, not coffer-keyd");
        return false;
    }
    if (st.st_uid != geteuid() || (st.st_mode & 077)) {
        log_err("the keystore's directory must be mode 0700 and belong to uid %u", geteuid());
        return false;
    }
    fcntl(FD_LISTEN, F_SETFD, FD_CLOEXEC);
    fcntl(FD_KEYSTORE, F_SETFD, FD_CLOEXEC);
    close_range(5, ~0u, 0);
    return true;
}

/* SIGTERM and SIGINT as a descriptor; a write to a peer that is gone is an error, not a death. */
static int signals(void)
{
    sigset_t set;
    int fd;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    if (sigprocmask(SIG_BLOCK, &set, NULL) < 0)
        return -errno;
    fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

static void raise_nofile(void)
{
    struct rlimit r;

    if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
        r.rlim_cur = r.rlim_max;
        setrlimit(RLIMIT_NOFILE, &r);
    }
}

static int cage(void)
{
    bool landlock = false;
    int rc = sandbox_keyd(FD_KEYSTORE, &landlock);

    if (rc < 0)
        log_err("the sandbox cannot be put on: %s", strerror(-rc));
    else if (!landlock)
        log_info("this kernel has no Landlock: paths are not restricted");
    return rc;
}

/* Two at one keystore would each write over what the other has written. The descriptor stays open. */
static int be_alone(void)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = openat(FD_KEYSTORE, KEYD_LOCK_FILE, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    int rc = fd < 0 || fcntl(fd, F_SETLK, &fl) < 0 ? -errno : 0;

    if (fd >= 0 && (rc == -EAGAIN || rc == -EACCES))
        log_err("another coffer-keyd works with this keystore (pid %d): end it",
                fcntl(fd, F_GETLK, &fl) == 0 ? (int)fl.l_pid : 0);
    else if (rc < 0)
        log_err("the keystore's file \"%s\" cannot be locked: %s", KEYD_LOCK_FILE, strerror(-rc));
    return rc;
}

static int run(const char *driver)
{
    struct server_config config = {.listen_fd = FD_LISTEN, .dir_fd = FD_KEYSTORE, .helper_fd = -1, .driver = driver};
    struct server *s = NULL;
    pid_t helper;
    int rc = secmem_init();

    if (rc < 0) {
        log_err("memory cannot be made safe for keys: %s", strerror(-rc));
        return rc;
    }
    raise_nofile();
    umask(077);
    rc = be_alone();
    if (rc < 0)
        return rc;
    rc = facts_start(&config.helper_fd, &helper);
    if (rc == 0)
        rc = config.signal_fd = signals();
    if (rc < 0) {
        log_err("cannot start: %s", strerror(-rc));
        return rc;
    }
    rc = server_new(&config, &s);
    if (rc == 0)
        rc = cage();
    if (rc == 0)
        rc = server_run(s);
    server_free(s);
    return rc;
}

int main(int argc, char **argv)
{
    int rc;

    log_program = "coffer-keyd";
    if (argc != 3 || strcmp(argv[1], "--driver") || !argv[2][0] || strlen(argv[2]) >= 64)
        return usage();
    if (!descriptors_ok())
        return 1;
    rc = run(argv[2]);
    return rc == -EBADMSG ? KEYD_EXIT_DAMAGED : rc == -EUCLEAN ? KEYD_EXIT_AUDIT : rc < 0 ? 1 : 0;
}
