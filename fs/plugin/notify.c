/*
 * notify.c - see notify.h. The protocol of sd_notify(3): datagrams of text, descriptors beside it. Owns what came along until
 * it is taken.
 */
#include "notify.h"

#include "fs/base/base.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FIRST_FD   3 /* SD_LISTEN_FDS_START */
#define STORED_MAX 4096

static struct stored {
    char *name;
    int fd; /* -1: taken */
} * stored;
static size_t nstored;

/* One datagram, if somebody asked for it; fd or -1. */
static void send_text(const char *text, int fd)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct iovec iov = {.iov_base = (char *)text, .iov_len = strlen(text)};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct msghdr m = {.msg_name = &a, .msg_iov = &iov, .msg_iovlen = 1};
    int sock;

    if (!path || strlen(path) < 2 || strlen(path) >= sizeof(a.sun_path))
        return;
    memcpy(a.sun_path, path, strlen(path));
    if (a.sun_path[0] == '@')
        a.sun_path[0] = 0;
    m.msg_namelen = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (fd >= 0) {
        struct cmsghdr *c;

        m.msg_control = control;
        m.msg_controllen = sizeof(control);
        c = CMSG_FIRSTHDR(&m);
        *c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    }
    sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || sendmsg(sock, &m, MSG_NOSIGNAL) < 0)
        log_info("the service manager is not told: %s", strerror(errno));
    close_quiet(sock);
}

void notify_begin(void)
{
    const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS"), *names = getenv("LISTEN_FDNAMES");
    long n = pid && fds && atol(pid) == getpid() ? atol(fds) : 0;

    stored = xcalloc((size_t)MAX(MIN(n, STORED_MAX), 1), sizeof(*stored));
    for (long i = 0; i < MIN(n, STORED_MAX); i++) {
        size_t len = names ? strcspn(names, ":") : 0;

        fcntl(FIRST_FD + (int)i, F_SETFD, FD_CLOEXEC);
        stored[nstored++] = (struct stored){xasprintf("%.*s", (int)len, names ? names : ""), FIRST_FD + (int)i};
        names = names && names[len] ? names + len + 1 : NULL;
    }
    unsetenv("LISTEN_PID");
    unsetenv("LISTEN_FDS");
    unsetenv("LISTEN_FDNAMES");
}

int notify_take(const char *prefix, const char *name)
{
    char *full = xasprintf("%s-%s", prefix, name);
    int fd = -1;

    for (size_t i = 0; i < nstored && fd < 0; i++) {
        if (stored[i].fd < 0 || strcmp(stored[i].name, full) != 0)
            continue;
        fd = stored[i].fd;
        stored[i].fd = -1;
    }
    free(full);
    return fd;
}

void notify_store(const char *prefix, const char *name, int fd)
{
    char *text = xasprintf("FDSTORE=1\nFDNAME=%s-%s", prefix, name);

    send_text(text, fd);
    free(text);
}

void notify_remove(const char *prefix, const char *name)
{
    char *text = xasprintf("FDSTOREREMOVE=1\nFDNAME=%s-%s", prefix, name);

    send_text(text, -1);
    free(text);
}

void notify_ready(void)
{
    for (size_t i = 0; i < nstored; i++) {
        if (stored[i].fd >= 0) {
            char *text = xasprintf("FDSTOREREMOVE=1\nFDNAME=%s", stored[i].name);

            send_text(text, -1);
            free(text);
            close_quiet(stored[i].fd);
        }
        free(stored[i].name);
    }
    free(stored);
    stored = NULL;
    nstored = 0;
    send_text("READY=1", -1);
}
