/*
 * broker.c - see broker.h. Owns the broker connection while it lives.
 *
 * Invariants:
 *  1. Each question is answered by a thread of its own: one that waits for the engine holds up no other, and none of
 *     these threads ever answers the engine.
 *  2. cofferd never parses what it passes on: coffer-keyd does, in a child without a key.
 *  3. What cannot be found out is answered so that the caller is refused.
 */
#include "broker.h"

#include "fs/base/msg.h"

#include <curl/curl.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ENGINE_TIMEOUT_MS 5000
#define WORKERS_MAX       64
#define CONTAINER_HEX     64

/* The connection, shared with the workers. */
struct broker {
    int sock;
    pthread_mutex_t lock; /* sending, and what follows */
    unsigned refs, workers;
};

struct question {
    struct broker *broker;
    uint64_t id;
    struct agent_facts_ask ask;
};

static void broker_unref(struct broker *b)
{
    unsigned left;

    pthread_mutex_lock(&b->lock);
    left = --b->refs;
    pthread_mutex_unlock(&b->lock);
    if (left)
        return;
    close_quiet(b->sock);
    pthread_mutex_destroy(&b->lock);
    free(b);
}

/* --- the engine's file --- */

static int facts_file(const char *id, int *ret_fd)
{
    char *path = xasprintf("%s/containers/%s/config.v2.json", plugin_config.engine_root, id);
    struct stat st;
    int fd;

    fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    free(path);
    if (fd < 0)
        return -errno;
    /* dockerd replaces the file by rename, so an open descriptor is a stable snapshot. */
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size == 0 || st.st_size > AGENT_FACTS_MAX) {
        close_quiet(fd);
        return -EINVAL;
    }
    *ret_fd = fd;
    return 0;
}

/* --- the engine's API --- */

struct body {
    char *buf;
    size_t n;
};

static size_t take_body(char *data, size_t size, size_t n, void *ctx)
{
    struct body *b = ctx;

    if (n > AGENT_FACTS_MAX - b->n)
        return 0; /* ends the transfer with CURLE_WRITE_ERROR */
    memcpy(b->buf + b->n, data, size * n);
    b->n += n;
    return n;
}

/* [] with white space anywhere. */
static bool empty_array(const struct body *b)
{
    char seen[3] = "";
    size_t k = 0;

    for (size_t i = 0; i < b->n; i++) {
        if (strchr(" \t\r\n", b->buf[i]))
            continue;
        if (k == 2)
            return false;
        seen[k++] = b->buf[i];
    }
    return !strcmp(seen, "[]");
}

static int engine_error(CURLcode code)
{
    if (code == CURLE_OPERATION_TIMEDOUT)
        return -ETIMEDOUT;
    /* Nobody listens: then no engine vouches for the container. */
    if (code == CURLE_COULDNT_CONNECT)
        return -ENOENT;
    return code == CURLE_WRITE_ERROR ? -EFBIG : -EIO;
}

static int engine_get(const char *id, struct body *body)
{
    CURL *curl = curl_easy_init();
    long status = 0;
    CURLcode code;
    char url[256];

    if (!curl)
        return -ENOMEM;
    snprintf(url, sizeof(url),
             "http://localhost/containers/json?all=1&filters=%%7B%%22id%%22%%3A%%5B%%22%s%%22%%5D%%7D", id);
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_UNIX_SOCKET_PATH, plugin_config.engine_socket);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http");
    curl_easy_setopt(curl, CURLOPT_PROXY, "");
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)ENGINE_TIMEOUT_MS);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, take_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, body);
    code = curl_easy_perform(curl);
    if (code == CURLE_OK)
        curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    curl_easy_cleanup(curl);
    if (code != CURLE_OK)
        return engine_error(code);
    if (status != 200)
        return -EIO;
    return empty_array(body) ? -ENOENT : 0;
}

/* A read-only descriptor on the bytes, with an offset of its own. */
static int memory_file(const struct body *body, int *ret_fd)
{
    char path[64];
    int fd, rd, rc;

    fd = memfd_create("facts", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    rc = write_full(fd, body->buf, body->n);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    rd = rc < 0 ? rc : open(path, O_RDONLY | O_CLOEXEC);
    if (rc == 0 && rd < 0)
        rc = -errno;
    close_quiet(fd);
    if (rc == 0)
        *ret_fd = rd;
    return rc;
}

static int facts_api(const char *id, int *ret_fd)
{
    struct body body = {.buf = xmalloc(AGENT_FACTS_MAX)};
    int rc = engine_get(id, &body);

    if (rc == 0)
        rc = memory_file(&body, ret_fd);
    free(body.buf);
    return rc;
}

static bool container_id_ok(const char *id)
{
    return strnlen(id, CONTAINER_HEX + 1) == CONTAINER_HEX && strspn(id, "0123456789abcdef") == CONTAINER_HEX;
}

int broker_container_facts(const char *id, int *ret_fd, uint32_t *ret_source)
{
    int rc;

    if (!container_id_ok(id))
        return -EINVAL;
    rc = facts_file(id, ret_fd);
    *ret_source = AGENT_FACTS_FILE;
    if (rc == -ENOENT || rc == -ENOTDIR) {
        rc = facts_api(id, ret_fd);
        *ret_source = AGENT_FACTS_API;
    }
    return rc;
}

/* --- answering --- */

/* Whether the thread is in the namespace that ours (readlink text) names; true also when that cannot be read: a
 * caller foreign to its container in both namespaces is refused. */
static uint8_t same_namespace(pid_t tid, const char *kind, const char *ours)
{
    char path[64], link[64];
    ssize_t n;

    snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)tid, kind);
    n = readlink(path, link, sizeof(link) - 1);
    if (n <= 0)
        return 1;
    link[n] = 0;
    return !strcmp(link, ours);
}

static void answer(struct broker *b, uint64_t id, const struct agent_facts *facts, int fd)
{
    struct msg_head head = {.type = AGENT_FACTS, .len = sizeof(*facts), .id = id};

    pthread_mutex_lock(&b->lock);
    msg_send(b->sock, &head, facts, &fd, fd >= 0 ? 1 : 0);
    pthread_mutex_unlock(&b->lock);
}

static void *work(void *arg)
{
    struct question *q = arg;
    struct broker *b = q->broker;
    struct agent_facts facts = {0};
    int fd = -1;

    snprintf(facts.driver, sizeof(facts.driver), "%s", plugin_config.driver);
    facts.err = broker_container_facts(q->ask.container, &fd, &facts.source);
    if (facts.err < 0)
        facts.source = AGENT_FACTS_NONE;
    facts.host_pid_ns = same_namespace(q->ask.tid, "pid", plugin_config.pid_ns);
    facts.host_mnt_ns = same_namespace(q->ask.tid, "mnt", plugin_config.mnt_ns);
    answer(b, q->id, &facts, fd);
    close_quiet(fd);
    pthread_mutex_lock(&b->lock);
    b->workers--;
    pthread_mutex_unlock(&b->lock);
    broker_unref(b);
    free(q);
    return NULL;
}

static void refuse(struct broker *b, uint64_t id, int err)
{
    struct agent_facts facts = {.err = err, .host_pid_ns = 1, .host_mnt_ns = 1};

    snprintf(facts.driver, sizeof(facts.driver), "%s", plugin_config.driver);
    answer(b, id, &facts, -1);
}

static void dispatch(struct broker *b, uint64_t id, const struct agent_facts_ask *ask)
{
    struct question *q = NULL;
    bool room;

    pthread_mutex_lock(&b->lock);
    room = b->workers < WORKERS_MAX;
    if (room) {
        b->workers++;
        b->refs++;
    }
    pthread_mutex_unlock(&b->lock);
    if (!room) {
        refuse(b, id, -EAGAIN);
        return;
    }
    q = xcalloc(1, sizeof(*q));
    *q = (struct question){.broker = b, .id = id, .ask = *ask};
    if (thread_start(work, q) == 0)
        return;
    pthread_mutex_lock(&b->lock);
    b->workers--;
    b->refs--; /* not the last: our caller has one */
    pthread_mutex_unlock(&b->lock);
    free(q);
    refuse(b, id, -EAGAIN);
}

static int become_broker(int sock)
{
    struct msg_head head = {.type = AGENT_BROKER, .id = 1};
    struct agent_reply reply;
    int rc = msg_send(sock, &head, NULL, NULL, 0);

    if (rc == 0)
        rc = msg_recv(sock, &head, &reply, sizeof(reply), NULL, NULL, AGENT_TIMEOUT_MS);
    if (rc < 0)
        return rc;
    return head.type == AGENT_REPLY && head.len == sizeof(reply) ? reply.err : -EPROTO;
}

int broker_serve_take(int sock, int *live, pthread_mutex_t *lock)
{
    struct broker *b = xcalloc(1, sizeof(*b));
    int rc;

    b->sock = sock;
    b->refs = 1;
    pthread_mutex_init(&b->lock, NULL);
    rc = become_broker(sock);
    pthread_mutex_lock(lock);
    *live = sock;
    pthread_mutex_unlock(lock);
    while (rc == 0) {
        struct agent_facts_ask ask;
        struct msg_head head;

        rc = msg_recv(sock, &head, &ask, sizeof(ask), NULL, NULL, -1);
        if (rc < 0)
            break;
        if (head.type != AGENT_FACTS || head.len != sizeof(ask) || !memchr(ask.container, 0, sizeof(ask.container)))
            rc = -EPROTO;
        else
            dispatch(b, head.id, &ask);
    }
    pthread_mutex_lock(lock);
    *live = -1;
    pthread_mutex_unlock(lock);
    shutdown(sock, SHUT_RDWR);
    broker_unref(b);
    return rc;
}
