/*
 * request.c - one request to cofferd over its control socket, and the printing of what it answers.
 *
 * 1. One request a connection; the answer that has "ok" is the last one.
 * 2. Whatever comes from the socket is escaped before it reaches a terminal.
 */
#include "fs/cli/cli.h"

#include "fs/base/msg.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define PING_MS 2000

/* --- the socket --- */

json_t *cli_request_new(const struct cli *c)
{
    json_t *req = json_pack("{s:s}", "cmd", c->command->words);

    if (!req)
        abort();
    if (!strncmp(c->command->operands, "NAME", 4))
        json_object_set_new(req, "name", json_string(c->operand[0]));
    return req;
}

static int connect_control(struct cli *c)
{
    char *path = xasprintf("%s/cofferd.sock", c->run);
    int fd = unix_connect(path, SOCK_STREAM);

    free(path);
    return fd;
}

static int say_no_connection(int err)
{
    if (err == -EACCES || err == -EPERM)
        return cli_fail("only root may talk to cofferd: run this with sudo");
    if (err == -ENAMETOOLONG)
        return cli_fail("the path of the control socket is longer than 107 bytes: choose a shorter --root");
    if (err == -ENOENT || err == -ECONNREFUSED || err == -ENOTDIR)
        return cli_fail("cofferd is not running: run `coffer up`");
    return cli_fail("cannot reach cofferd: %s", strerror(-err));
}

int cli_require(struct cli *c)
{
    int fd = connect_control(c);

    if (fd < 0)
        return say_no_connection(fd);
    close(fd);
    return CLI_OK;
}

int cli_request_send(struct cli *c, json_t *req, const int *fds, int nfds)
{
    char *text = json_dumps(req, JSON_COMPACT);
    int fd = connect_control(c), rc = 0;

    if (fd < 0) {
        say_no_connection(fd);
    } else if (!text) {
        rc = -EINVAL;
        cli_fail("an argument is not valid UTF-8: give it as plain text");
    } else {
        rc = frame_send(fd, text, strlen(text), fds, nfds);
        if (rc < 0)
            cli_fail("cannot send to cofferd: %s: look into %s/cofferd.log", strerror(-rc), c->state);
    }
    free(text);
    json_decref(req);
    if (rc < 0) {
        close_quiet(fd);
        return -1;
    }
    return fd;
}

static void take_line(struct cli *c, json_t *lines, const char *text)
{
    char out[2048];

    if (c->json)
        json_array_append_new(lines, json_string(text));
    else
        puts(escape_text(text, out, sizeof(out)));
}

/* --- progress --- */

void cli_want_progress(struct cli *c, json_t *req)
{
    if (!c->json && isatty(STDERR_FILENO))
        json_object_set_new(req, "progress", json_true());
}

static void clear_progress(void)
{
    if (isatty(STDERR_FILENO))
        fputs("\r\033[K", stderr);
}

/* Percent, rate and time left, over the line before. began: mono_ns of the first. */
static void show_progress(const json_t *at, int64_t began)
{
    uint64_t done = (uint64_t)json_integer_value(json_object_get(at, "done"));
    uint64_t total = (uint64_t)json_integer_value(json_object_get(at, "total"));
    double seconds = (double)(mono_ns() - began) / 1e9, rate = seconds > 0.5 ? (double)done / seconds : 0;
    char *speed = cli_size_text((uint64_t)rate);
    uint64_t left = rate > 0 && total > done ? (uint64_t)((double)(total - done) / rate) : 0;

    if (total)
        fprintf(stderr, "\r\033[K%3u %%  %s/s  %" PRIu64 ":%02u left", (unsigned)((double)done * 100 / (double)total),
                speed, left / 60, (unsigned)(left % 60));
    fflush(stderr);
    free(speed);
}

/* One answer frame as an object. 0 or -errno. */
static int receive(int sock, int timeout_ms, json_t **ret)
{
    char *buf = NULL;
    size_t n;
    int rc = frame_recv(sock, &buf, &n, NULL, NULL, timeout_ms);

    if (rc < 0)
        return rc;
    *ret = json_loadb(buf, n, JSON_REJECT_DUPLICATES, NULL);
    free(buf);
    if (!*ret || !json_is_object(*ret)) {
        json_decref(*ret);
        return -EPROTO;
    }
    return 0;
}

int cli_request_answer(struct cli *c, int sock, json_t **ret_answer)
{
    json_t *lines = json_array();
    int64_t began = mono_ns();
    bool shown = false;

    for (;;) {
        json_t *answer = NULL;
        char text[1024];
        int rc = receive(sock, -1, &answer);

        if (rc < 0) {
            json_decref(lines);
            return cli_fail("cofferd broke off (%s): look into %s/cofferd.log", strerror(-rc), c->state);
        }
        if (json_object_get(answer, "progress")) {
            show_progress(json_object_get(answer, "progress"), began);
            shown = true;
            json_decref(answer);
            continue;
        }
        if (shown)
            clear_progress();
        shown = false;
        if (json_string_value(json_object_get(answer, "line"))) {
            take_line(c, lines, json_string_value(json_object_get(answer, "line")));
            json_decref(answer);
            continue;
        }
        if (cli_flag(answer, "ok")) {
            if (json_array_size(lines))
                json_object_set(answer, "lines", lines);
            json_decref(lines);
            *ret_answer = answer;
            return CLI_OK;
        }
        const char *error = json_string_value(json_object_get(answer, "error"));
        rc = cli_fail("%s", escape_text(error ? error : "cofferd refused without a reason", text, sizeof(text)));
        json_decref(answer);
        json_decref(lines);
        return rc;
    }
}

int cli_request(struct cli *c, json_t *req, const int *fds, int nfds, json_t **ret_answer)
{
    int sock = cli_request_send(c, req, fds, nfds), rc;

    if (sock < 0)
        return CLI_FAILED;
    rc = cli_request_answer(c, sock, ret_answer);
    close(sock);
    return rc;
}

int cli_ping(struct cli *c)
{
    static const char text[] = "{\"cmd\":\"status\"}";
    json_t *answer = NULL;
    int fd = connect_control(c), rc;

    if (fd < 0)
        return fd;
    rc = frame_send(fd, text, sizeof(text) - 1, NULL, 0);
    if (rc == 0)
        rc = receive(fd, PING_MS, &answer);
    json_decref(answer);
    close(fd);
    return rc;
}

/* --- printing --- */

bool cli_flag(const json_t *obj, const char *key)
{
    return json_is_true(json_object_get(obj, key));
}

bool cli_print_json(const struct cli *c, json_t *answer)
{
    char *text;

    if (!c->json)
        return false;
    json_object_del(answer, "ok");
    text = json_dumps(answer, JSON_COMPACT);
    puts(text ? text : "{}");
    free(text);
    return true;
}

char *cli_text(const json_t *obj, const char *key)
{
    const json_t *v = json_object_get(obj, key);
    const char *s = json_string_value(v);
    char out[1024];

    if (s)
        return xstrdup(*s ? escape_text(s, out, sizeof(out)) : "-");
    if (json_is_integer(v))
        return xasprintf("%" JSON_INTEGER_FORMAT, json_integer_value(v));
    if (json_is_boolean(v))
        return xstrdup(json_is_true(v) ? "yes" : "no");
    return xstrdup("-");
}

char *cli_size_text(uint64_t bytes)
{
    static const char units[] = "BKMGTPE";
    uint64_t tenths = bytes * 10;
    int u = 0;

    if (bytes > UINT64_MAX / 10)
        return xasprintf("%" PRIu64, bytes);
    while (tenths >= 10240) {
        tenths = (tenths + 512) / 1024;
        u++;
    }
    if (tenths % 10 == 0 || u == 0)
        return u ? xasprintf("%" PRIu64 "%c", tenths / 10, units[u]) : xasprintf("%" PRIu64, bytes);
    return xasprintf("%" PRIu64 ".%" PRIu64 "%c", tenths / 10, tenths % 10, units[u]);
}
