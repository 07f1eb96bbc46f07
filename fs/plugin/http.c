/*
 * http.c - see http.h. Owns the plugin socket and its connections.
 *
 * What engines do, which this keeps to:
 *  1. Errors are status 500 with {"Err": "one line"}: Podman understands nothing else. Only 200 is success.
 *  2. Any error answered to Get means "no such volume" to Docker, which then forgets the volume's labels and references.
 *     Get, List, Path need the table in memory and nothing else, and each connection has a thread: they are answered while
 *     a Mount hangs.
 *  3. Docker's client repeats a request whose connection broke with an empty body: that is an error where a name is needed,
 *     and nothing else happens.
 *  4. A client that hung up while its Mount was worked on will not Unmount: its count is taken back. One that hangs up as
 *     soon as it has read the answer (Podman ends then) keeps it. libmicrohttpd's termination code cannot tell the two
 *     apart, so the answer's last byte is handed over by itself: see give_answer().
 *  5. The engine's API is never called from here.
 */
#include "http.h"

#include "fsproc.h"
#include "mounts.h"
#include "registry.h"
#include "volumes.h"
#include "fs/base/msg.h"

#include <microhttpd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BODY_MAX        (1u << 20)
#define CONNECTIONS_MAX 512
#define REQUEST_S       10u /* without a byte, until a request is there */
#define ID_MAX          1024
#define CONTENT_TYPE    "application/vnd.docker.plugins.v1.1+json"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* --- the calls; each returns 0 with *ret (a new object, or NULL for {"Err":""}), or -errno with the reason --- */

struct call {
    json_t *request;
    const struct engine_peer *peer;
    json_t *ret;
    struct why why;
    char *mounted_name, *mounted_id;
};

static int take_text(struct call *c, const char *key, size_t max, const char **ret)
{
    json_t *v = json_object_get(c->request, key);

    if (!json_is_string(v))
        return why_set(&c->why, -EINVAL, "the request lacks \"%s\"", key);
    if (json_string_length(v) > max)
        return why_set(&c->why, -EINVAL, "\"%s\" is longer than %zu bytes", key, max);
    *ret = json_string_value(v);
    return 0;
}

/* The volume that the request names, with a reference. */
static int take_volume(struct call *c, struct plugin_volume **ret)
{
    const char *name = NULL;
    int rc = take_text(c, "Name", BODY_MAX, &name);

    if (rc < 0)
        return rc;
    *ret = volume_name_ok(name) ? registry_find_ref(name) : NULL;
    return *ret ? 0 : why_set(&c->why, -ENOENT, "no such volume: %.140s", name);
}

static int call_activate(struct call *c)
{
    c->ret = json_pack("{s:[s]}", "Implements", "VolumeDriver");
    return 0;
}

static int call_capabilities(struct call *c)
{
    c->ret = json_pack("{s:{s:s}}", "Capabilities", "Scope", "local");
    return 0;
}

static int call_create(struct call *c)
{
    struct volume_spec spec;
    const char *name = NULL;
    int rc = take_text(c, "Name", BODY_MAX, &name);

    if (rc < 0)
        return rc;
    rc = volumes_spec_from_options(json_object_get(c->request, "Opts"), &spec, &c->why);
    if (rc == 0)
        rc = volumes_create(name, &spec, true, NULL, &c->why);
    volume_spec_clear(&spec);
    return rc;
}

static int call_remove(struct call *c)
{
    const char *name = NULL;
    int rc = take_text(c, "Name", BODY_MAX, &name);

    return rc < 0 ? rc : volumes_remove(name, &c->why);
}

static int call_mount(struct call *c)
{
    struct plugin_volume *v = NULL;
    const char *id = NULL;
    int rc = take_text(c, "ID", ID_MAX, &id);

    if (rc == 0)
        rc = take_volume(c, &v);
    if (rc == 0)
        rc = mounts_engine_mount(v, id, c->peer, &c->why);
    if (rc == 0) {
        char *path = mounts_path(v);

        c->ret = json_pack("{s:s}", "Mountpoint", path);
        c->mounted_name = xstrdup(v->name);
        c->mounted_id = xstrdup(id);
        free(path);
    }
    registry_unref(v);
    return rc;
}

static int call_unmount(struct call *c)
{
    struct plugin_volume *v = NULL;
    const char *id = NULL;
    int rc = take_text(c, "ID", ID_MAX, &id);

    if (rc == 0)
        rc = take_volume(c, &v);
    if (rc == -ENOENT)
        return 0;
    if (rc == 0)
        rc = mounts_engine_unmount(v, id, &c->why);
    registry_unref(v);
    return rc;
}

static int call_path(struct call *c)
{
    struct plugin_volume *v = NULL;
    char *path = NULL;
    int rc = take_volume(c, &v);

    if (rc < 0)
        return rc;
    path = mounts_path(v);
    c->ret = json_pack("{s:s}", "Mountpoint", path);
    free(path);
    registry_unref(v);
    return 0;
}

static int call_get(struct call *c)
{
    struct plugin_volume *v = NULL;
    int rc = take_volume(c, &v);

    if (rc < 0)
        return rc;
    c->ret = json_pack("{s:o}", "Volume", volumes_engine_json(v));
    registry_unref(v);
    return 0;
}

static int call_list(struct call *c)
{
    struct plugin_volume **all;
    json_t *list = json_array();
    size_t n;

    registry_all_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(list, volumes_engine_json(all[i]));
        registry_unref(all[i]);
    }
    free(all);
    c->ret = json_pack("{s:o}", "Volumes", list);
    return 0;
}

static const struct endpoint {
    const char *path;
    int (*call)(struct call *c);
    bool bodyless; /* whatever the body is, it says nothing */
} endpoints[] = {
    {"/Plugin.Activate", call_activate, true},
    {"/VolumeDriver.Create", call_create, false},
    {"/VolumeDriver.Remove", call_remove, false},
    {"/VolumeDriver.Mount", call_mount, false},
    {"/VolumeDriver.Unmount", call_unmount, false},
    {"/VolumeDriver.Path", call_path, false},
    {"/VolumeDriver.Get", call_get, false},
    {"/VolumeDriver.List", call_list, true},
    {"/VolumeDriver.Capabilities", call_capabilities, true},
};

static int run(const struct endpoint *e, struct call *c, const char *body, size_t n)
{
    int rc = 0;

    if (e->bodyless)
        return e->call(c);
    rc = n ? json_parse(body, n, &c->request, &c->why) : why_set(&c->why, -EINVAL, "the request has no body");
    return rc < 0 ? rc : e->call(c);
}

unsigned plugin_http_answer(const char *path, const char *body, size_t n, const struct engine_peer *peer,
                            char **ret_text, char **ret_mounted_name, char **ret_mounted_id)
{
    struct call c = {.peer = peer};
    const struct endpoint *e = NULL;
    unsigned status = MHD_HTTP_OK;
    int rc;

    for (size_t i = 0; i < ARRAY_LEN(endpoints) && !e; i++) {
        if (!strcmp(path, endpoints[i].path))
            e = &endpoints[i];
    }
    rc = e ? run(e, &c, body, n) : why_set(&c.why, -ENOENT, "no such call");
    if (rc < 0) {
        status = e ? MHD_HTTP_INTERNAL_SERVER_ERROR : MHD_HTTP_NOT_FOUND;
        json_decref(c.ret);
        c.ret = json_object();
    } else if (!c.ret) {
        c.ret = json_object();
    }
    json_object_set_new(c.ret, "Err", json_string(rc < 0 ? c.why.text : ""));
    *ret_text = json_dumps(c.ret, JSON_COMPACT);
    if (!*ret_text) /* a reason that is not UTF-8 cannot be */
        *ret_text = xstrdup("{\"Err\":\"internal error\"}");
    *ret_mounted_name = c.mounted_name;
    *ret_mounted_id = c.mounted_id;
    json_decref(c.ret);
    json_decref(c.request);
    return status;
}

/* --- HTTP --- */

struct request {
    char *body;
    size_t n, cap;
    bool too_big;
    bool delivered;                  /* the answer to Mount is with the client but for its last byte */
    char *mounted_name, *mounted_id; /* to be taken back if the answer does not arrive */
};

static void identify_peer(int sock, struct engine_peer *ret)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);

    *ret = (struct engine_peer){.pidfd = -1};
    if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0 || cred.pid <= 0)
        return;
    /* The kernel's own pidfd of the peer cannot be of a later process with its number; else the start time tells. */
    len = sizeof(ret->pidfd);
    if (getsockopt(sock, SOL_SOCKET, SO_PEERPIDFD, &ret->pidfd, &len) < 0)
        ret->pidfd = (int)syscall(SYS_pidfd_open, cred.pid, 0);
    if (ret->pidfd < 0 || process_identify(cred.pid, &ret->process) < 0) {
        close_quiet(ret->pidfd);
        *ret = (struct engine_peer){.pidfd = -1};
    }
}

static void take_back(struct request *r)
{
    struct plugin_volume *v = r->mounted_name ? registry_find_ref(r->mounted_name) : NULL;
    struct why why;

    if (!v)
        return;
    log_info("volume %s: the engine hung up during Mount: taken back", v->name);
    if (mounts_engine_unmount(v, r->mounted_id, &why) < 0)
        log_err("volume %s: %s", v->name, why.text);
    registry_unref(v);
    free(r->mounted_name);
    r->mounted_name = NULL;
}

static bool hung_up(int sock)
{
    struct pollfd p = {.fd = sock, .events = 0};

    return poll(&p, 1, 0) > 0 && (p.revents & (POLLHUP | POLLERR));
}

/* A client that closed its end with the answer unread. */
static bool left_unread(int sock)
{
    int err = 0;
    socklen_t len = sizeof(err);

    return getsockopt(sock, SOL_SOCKET, SO_ERROR, &err, &len) == 0 && err == ECONNRESET;
}

/* The answer to a Mount on its way. */
struct answer {
    struct request *request;
    char *text;
    size_t n;
};

static void free_answer(void *ctx)
{
    struct answer *a = ctx;

    free(a->text);
    free(a);
}

/* Asked for the last byte, all others have been written to the socket, and nobody can have taken this for an answer yet. */
static ssize_t give_answer(void *ctx, uint64_t pos, char *buf, size_t max)
{
    struct answer *a = ctx;
    size_t n = pos + 1 < a->n ? a->n - 1 - (size_t)pos : 1;

    if (pos >= a->n)
        return MHD_CONTENT_READER_END_OF_STREAM;
    if (pos + 1 == a->n)
        a->request->delivered = true;
    n = MIN(n, max);
    memcpy(buf, a->text + pos, n);
    return (ssize_t)n;
}

static struct MHD_Response *response_of_mount(struct request *r, char *text)
{
    struct answer *a = xcalloc(1, sizeof(*a));
    struct MHD_Response *response;

    *a = (struct answer){.request = r, .text = text, .n = strlen(text)};
    response = MHD_create_response_from_callback(a->n, a->n, give_answer, a, free_answer);
    if (!response)
        free_answer(a);
    return response;
}

static struct MHD_Response *response_of(char *text)
{
    struct MHD_Response *response = MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);

    if (!response)
        free(text);
    return response;
}

static enum MHD_Result reply(struct MHD_Connection *c, unsigned status, struct MHD_Response *r)
{
    enum MHD_Result done;

    if (!r)
        return MHD_NO;
    MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, CONTENT_TYPE);
    done = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return done;
}

static void collect(struct request *r, const char *data, size_t n)
{
    if (r->too_big || n > BODY_MAX - r->n) {
        r->too_big = true;
        return;
    }
    if (r->n + n > r->cap) {
        r->cap = MAX(r->n + n, 2 * r->cap);
        r->body = xrealloc(r->body, r->cap);
    }
    memcpy(r->body + r->n, data, n);
    r->n += n;
}

static enum MHD_Result handle(void *ctx, struct MHD_Connection *conn, const char *url, const char *method,
                              const char *version, const char *data, size_t *size, void **state)
{
    const union MHD_ConnectionInfo *info;
    struct request *r = *state;
    struct engine_peer peer;
    unsigned status;
    char *text;

    (void)ctx;
    (void)method; /* engines send POST; what else is sent is answered alike */
    (void)version;
    if (!r) {
        *state = xcalloc(1, sizeof(*r));
        return MHD_YES;
    }
    if (*size) {
        collect(r, data, *size);
        *size = 0;
        return MHD_YES;
    }
    if (r->too_big)
        return reply(conn, MHD_HTTP_INTERNAL_SERVER_ERROR,
                     response_of(xstrdup("{\"Err\":\"the request is larger than 1 MiB\"}")));
    info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_CONNECTION_FD);
    if (!info)
        return MHD_NO;
    /* The request is here: what it asks for may take longer, and engines keep idle connections. */
    MHD_set_connection_option(conn, MHD_CONNECTION_OPTION_TIMEOUT, 0u);
    identify_peer(info->connect_fd, &peer);
    status = plugin_http_answer(url, r->body, r->n, &peer, &text, &r->mounted_name, &r->mounted_id);
    close_quiet(peer.pidfd);
    if (r->mounted_name && hung_up(info->connect_fd)) {
        take_back(r);
        free(text);
        return MHD_NO;
    }
    return reply(conn, status, r->mounted_name ? response_of_mount(r, text) : response_of(text));
}

static void completed(void *ctx, struct MHD_Connection *conn, void **state, enum MHD_RequestTerminationCode how)
{
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct request *r = *state;

    (void)ctx;
    if (!r)
        return;
    if (!r->delivered || (how != MHD_REQUEST_TERMINATED_COMPLETED_OK && info && left_unread(info->connect_fd)))
        take_back(r);
    free(r->mounted_name);
    free(r->mounted_id);
    free(r->body);
    free(r);
    *state = NULL;
}

int plugin_http_start(struct why *why)
{
    struct MHD_Daemon *d;
    int sock = unix_listen(plugin_config.plugin_socket, SOCK_STREAM, 0600);

    if (sock < 0)
        return why_set(why, sock, "cannot listen at %s: %s", plugin_config.plugin_socket, strerror(-sock));
    d = MHD_start_daemon(MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL, 0, NULL, NULL,
                         handle, NULL, MHD_OPTION_LISTEN_SOCKET, sock, MHD_OPTION_CONNECTION_LIMIT, CONNECTIONS_MAX,
                         MHD_OPTION_CONNECTION_TIMEOUT, REQUEST_S, MHD_OPTION_THREAD_STACK_SIZE, (size_t)(512 << 10),
                         MHD_OPTION_NOTIFY_COMPLETED, completed, NULL, MHD_OPTION_END);
    if (!d) {
        close_quiet(sock);
        return why_set(why, -EIO, "cannot serve at %s", plugin_config.plugin_socket);
    }
    return 0;
}
