/* msg.c - see msg.h. */
#include "msg.h"

#include "base.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

union fd_control {
    struct cmsghdr align;
    char buf[CMSG_SPACE(sizeof(int) * MSG_FDS_MAX)];
};

static int send_iov(int sock, struct iovec *iov, int niov, const int *fds, int nfds, int flags)
{
    union fd_control control;
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = (size_t)niov};
    size_t total = 0;
    ssize_t sent;

    if (nfds < 0 || nfds > MSG_FDS_MAX)
        return -EINVAL;
    if (nfds) {
        struct cmsghdr *c;

        memset(&control, 0, sizeof(control));
        m.msg_control = control.buf;
        m.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
        c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)nfds);
    }
    for (int i = 0; i < niov; i++)
        total += iov[i].iov_len;
    do
        sent = sendmsg(sock, &m, MSG_NOSIGNAL | flags);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        return -errno;
    return (size_t)sent == total ? 0 : (int)sent;
}

int msg_send(int sock, const struct msg_head *head, const void *body, const int *fds, int nfds)
{
    struct iovec iov[2] = {{(void *)(uintptr_t)head, sizeof(*head)}, {(void *)(uintptr_t)body, head->len}};
    int rc;

    if (sizeof(*head) + head->len > MSG_PACKET_MAX)
        return -EMSGSIZE;
    rc = send_iov(sock, iov, head->len ? 2 : 1, fds, nfds, MSG_DONTWAIT);
    return rc > 0 ? -EIO : rc;
}

/* Takes the descriptors out of m into got[]; returns their number. */
static int take_fds(struct msghdr *m, int *got)
{
    int n = 0;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        size_t k;

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        k = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < k; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (n < MSG_FDS_MAX)
                got[n++] = fd;
            else
                close_quiet(fd);
        }
    }
    return n;
}

static int64_t end_of(int timeout_ms)
{
    return mono_ns() + (int64_t)timeout_ms * 1000000;
}

/* end: on mono_ns()'s clock. */
static int wait_readable(int sock, int64_t end)
{
    struct pollfd p = {.fd = sock, .events = POLLIN};

    for (;;) {
        int64_t left = (end - mono_ns() + 999999) / 1000000;
        int r = poll(&p, 1, (int)MAX(left, 0));

        if (r > 0)
            return 0;
        if (r == 0)
            return -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

/* Receives into iov; hands over descriptors, or closes them where the caller wants none or the message is cut. */
static ssize_t recv_iov(int sock, struct iovec *iov, int niov, int *fds, int *ret_nfds, int flags)
{
    union fd_control control;
    struct msghdr m = {
        .msg_iov = iov, .msg_iovlen = (size_t)niov, .msg_control = control.buf, .msg_controllen = sizeof(control.buf)};
    int got[MSG_FDS_MAX], n;
    ssize_t r;

    do
        r = recvmsg(sock, &m, MSG_CMSG_CLOEXEC | flags);
    while (r < 0 && errno == EINTR);
    if (r < 0)
        return -errno;
    n = take_fds(&m, got);
    if (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        r = -EPROTO;
    if (r > 0 && fds && ret_nfds) {
        memcpy(fds, got, sizeof(int) * (size_t)n);
        *ret_nfds = n;
        return r;
    }
    for (int i = 0; i < n; i++)
        close_quiet(got[i]);
    return r;
}

int msg_recv(int sock, struct msg_head *head, void *body, size_t cap, int *fds, int *ret_nfds, int timeout_ms)
{
    struct iovec iov[2] = {{head, sizeof(*head)}, {body, cap}};
    ssize_t r;
    int rc;

    if (ret_nfds)
        *ret_nfds = 0;
    if (timeout_ms >= 0 && (rc = wait_readable(sock, end_of(timeout_ms))) < 0)
        return rc;
    r = recv_iov(sock, iov, cap ? 2 : 1, fds, ret_nfds, timeout_ms < 0 ? 0 : MSG_DONTWAIT);
    if (r < 0)
        return (int)r;
    if (r == 0)
        return -ECONNRESET;
    if ((size_t)r < sizeof(*head) || head->len != (size_t)r - sizeof(*head)) {
        for (int i = 0; ret_nfds && fds && i < *ret_nfds; i++)
            close_quiet(fds[i]);
        if (ret_nfds)
            *ret_nfds = 0;
        return -EPROTO;
    }
    return 0;
}

int frame_send(int sock, const void *buf, size_t n, const int *fds, int nfds)
{
    le32 len = le32_make((uint32_t)n);
    struct iovec iov[2] = {{&len, sizeof(len)}, {(void *)(uintptr_t)buf, n}};
    int rc;

    if (n > MSG_FRAME_MAX)
        return -EMSGSIZE;
    rc = send_iov(sock, iov, 2, fds, nfds, 0);
    /* A short send: the descriptors went with the first byte, the rest follows. */
    while (rc > 0 && (size_t)rc < n + sizeof(len)) {
        size_t sent = (size_t)rc;
        struct iovec rest[2];
        int k = 0, more;

        if (sent < sizeof(len))
            rest[k++] = (struct iovec){(uint8_t *)&len + sent, sizeof(len) - sent};
        sent = sent > sizeof(len) ? sent - sizeof(len) : 0;
        rest[k++] = (struct iovec){(uint8_t *)(uintptr_t)buf + sent, n - sent};
        more = send_iov(sock, rest, k, NULL, 0, 0);
        if (more <= 0)
            return more;
        rc += more;
    }
    return rc < 0 ? rc : 0;
}

/* end 0: there is none. */
static int recv_exact(int sock, void *buf, size_t n, int *fds, int *ret_nfds, int64_t end)
{
    size_t got = 0;

    while (got < n) {
        struct iovec iov = {(uint8_t *)buf + got, n - got};
        ssize_t r;
        int rc;

        if (end && (rc = wait_readable(sock, end)) < 0)
            return rc;
        r = recv_iov(sock, &iov, 1, got == 0 ? fds : NULL, got == 0 ? ret_nfds : NULL, 0);
        if (r < 0)
            return (int)r;
        if (r == 0)
            return -ECONNRESET;
        got += (size_t)r;
    }
    return 0;
}

int frame_recv(int sock, char **ret_buf, size_t *ret_n, int *fds, int *ret_nfds, int timeout_ms)
{
    char *buf = NULL;
    size_t n = 0;
    le32 len;
    /* Of the whole frame: a byte now and then does not buy time. */
    int64_t end = timeout_ms < 0 ? 0 : end_of(timeout_ms);
    int rc;

    if (ret_nfds)
        *ret_nfds = 0;
    rc = recv_exact(sock, &len, sizeof(len), fds, ret_nfds, end);
    if (rc == 0 && le32_get(len) > MSG_FRAME_MAX)
        rc = -EPROTO;
    if (rc == 0) {
        n = le32_get(len);
        buf = xmalloc(n + 1);
        buf[n] = 0;
        rc = recv_exact(sock, buf, n, NULL, NULL, end);
    }
    if (rc < 0) {
        for (int i = 0; ret_nfds && i < *ret_nfds; i++)
            close_quiet(fds[i]);
        if (ret_nfds)
            *ret_nfds = 0;
        free(buf);
        return rc;
    }
    *ret_buf = buf;
    *ret_n = n;
    return 0;
}

static int unix_address(const char *path, struct sockaddr_un *a)
{
    *a = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(a->sun_path))
        return -ENAMETOOLONG;
    memcpy(a->sun_path, path, strlen(path));
    return 0;
}

int unix_listen(const char *path, int type, mode_t mode)
{
    struct sockaddr_un a;
    struct stat st;
    int fd, rc;

    rc = unix_address(path, &a);
    if (rc < 0)
        return rc;
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return -EEXIST;
        if (unlink(path) < 0)
            return -errno;
    }
    fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    /* The mode is set on the socket before it is bound, so that there is no instant at which others may connect. */
    if (fchmod(fd, mode) < 0 || bind(fd, (struct sockaddr *)&a, sizeof(a)) < 0 || chmod(path, mode) < 0 ||
        listen(fd, 128) < 0) {
        rc = -errno;
        close_quiet(fd);
        return rc;
    }
    return fd;
}

int unix_connect(const char *path, int type)
{
    struct sockaddr_un a;
    int fd, rc;

    rc = unix_address(path, &a);
    if (rc < 0)
        return rc;
    fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        rc = -errno;
        close_quiet(fd);
        return rc;
    }
    return fd;
}
