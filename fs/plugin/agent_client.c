/* agent_client.c - see agent_client.h. Owns nothing: every request opens and closes its connection. */
#include "agent_client.h"

#include "fs/base/msg.h"
#include "supervisor.h"

#include <sodium.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECT_RETRY_MS 5000 /* a keyd that has died is back after one second */

int agent_connect(void)
{
    struct timeval tv = {.tv_sec = 5};
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd, rc;

    if (strlen(plugin_config.keyd_socket) >= sizeof(a.sun_path))
        return -ENAMETOOLONG;
    memcpy(a.sun_path, plugin_config.keyd_socket, strlen(plugin_config.keyd_socket));
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    /* Bounds connect() too, which waits while the backlog of a keyd that hangs is full. */
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv)) < 0 ||
        connect(fd, (struct sockaddr *)&a, sizeof(a)) < 0) {
        rc = -errno;
        close_quiet(fd);
        return rc;
    }
    return fd;
}

static int connect_patiently(void)
{
    int64_t end = mono_ns() + (int64_t)CONNECT_RETRY_MS * 1000000;
    int fd;

    while ((fd = agent_connect()) == -ECONNREFUSED || fd == -ENOENT) {
        if (mono_ns() > end)
            break;
        sleep_ms(50);
    }
    return fd;
}

static int no_answer(int rc, struct why *why)
{
    const char *damage = supervisor_damage();

    if (damage)
        return why_set(why, -EHOSTDOWN, "%s", damage);
    return why_set(why, -EHOSTDOWN, "coffer-keyd does not answer (%s): look at cofferd's log", strerror(-rc));
}

/* A text that came over a socket, made fit for one line. */
static int take_reply(const struct agent_reply *r, uint32_t len, struct why *why)
{
    if (len != sizeof(*r) || r->err > 0 || !memchr(r->text, 0, sizeof(r->text)))
        return why_set(why, -EPROTO, "coffer-keyd sent an answer that is not understood");
    if (r->err == 0)
        return why_set(why, 0, "%s", r->text);
    return why_set(why, r->err, "%s", r->text[0] ? r->text : strerror(-r->err));
}

int agent_call(uint16_t type, const void *body, uint32_t len, const int *fds, int nfds, uint16_t want, void *ret,
               uint32_t ret_len, int timeout_ms, struct why *why)
{
    struct msg_head head = {.type = type, .len = len, .id = 1};
    union {
        struct agent_reply reply;
        uint8_t bytes[4096];
    } in;
    int sock = -1, rc;

    sock = connect_patiently();
    if (sock < 0)
        return no_answer(sock, why);
    rc = msg_send(sock, &head, body, fds, nfds);
    if (rc == 0)
        rc = msg_recv(sock, &head, in.bytes, sizeof(in.bytes), NULL, NULL, timeout_ms);
    if (rc < 0) {
        rc = no_answer(rc, why);
    } else if (head.id != 1) {
        rc = why_set(why, -EPROTO, "coffer-keyd sent an answer that is not understood");
    } else if (head.type == AGENT_REPLY) {
        rc = take_reply(&in.reply, head.len, why);
        if (rc == 0 && want != AGENT_REPLY)
            rc = why_set(why, -EPROTO, "coffer-keyd sent an answer that is not understood");
    } else if (head.type != want || head.len != ret_len) {
        rc = why_set(why, -EPROTO, "coffer-keyd sent an answer that is not understood");
    } else {
        memcpy(ret, in.bytes, ret_len);
    }
    close_quiet(sock);
    return rc;
}

void agent_set_name(char out[AGENT_NAME_MAX], const char *name)
{
    snprintf(out, AGENT_NAME_MAX, "%.*s", (int)strcspn(name, "@"), name);
}

static int call_reply(uint16_t type, const void *body, uint32_t len, struct why *why)
{
    return agent_call(type, body, len, NULL, 0, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS, why);
}

int agent_status(struct agent_status *ret, struct why *why)
{
    int rc = agent_call(AGENT_STATUS, NULL, 0, NULL, 0, AGENT_STATUS, ret, sizeof(*ret), AGENT_WAIT_MS, why);

    if (rc == 0)
        ret->driver[sizeof(ret->driver) - 1] = 0;
    return rc;
}

int agent_need_unlocked(struct why *why)
{
    struct agent_status st;
    int rc = agent_status(&st, why);

    if (rc < 0)
        return rc;
    if (!st.initialised)
        return why_set(why, -ENOKEY, "there is no keystore yet: run coffer init");
    if (!st.unlocked)
        return why_set(why, -ENOKEY, "keystore is locked: run coffer unlock");
    return 0;
}

int agent_volume_get(const char *name, struct agent_volume *ret, struct why *why)
{
    struct agent_name ask = {0};
    int rc;

    agent_set_name(ask.name, name);
    rc = agent_call(AGENT_VOLUME_GET, &ask, sizeof(ask), NULL, 0, AGENT_VOLUME_GET, ret, sizeof(*ret), AGENT_WAIT_MS,
                    why);
    if (rc == 0 && (!memchr(ret->name, 0, sizeof(ret->name)) || !volume_name_ok(ret->name)))
        rc = why_set(why, -EPROTO, "coffer-keyd sent a volume without a proper name");
    return rc;
}

static int call_name(uint16_t type, const char *name, struct why *why)
{
    struct agent_name ask = {0};

    agent_set_name(ask.name, name);
    return call_reply(type, &ask, sizeof(ask), why);
}

int agent_volume_rm(const char *name, struct why *why)
{
    return call_name(AGENT_VOLUME_RM, name, why);
}

int agent_accept_rollback(const char *name, struct why *why)
{
    return call_name(AGENT_ACCEPT_ROLLBACK, name, why);
}

int agent_volume_set_state(const char *name, uint32_t state, struct why *why)
{
    struct agent_volume_state ask = {.state = state};

    agent_set_name(ask.name, name);
    return call_reply(AGENT_VOLUME_STATE, &ask, sizeof(ask), why);
}

int agent_volume_set_size(const char *name, uint64_t size_limit, struct why *why)
{
    struct agent_volume_size ask = {.size_limit = size_limit};

    agent_set_name(ask.name, name);
    return call_reply(AGENT_VOLUME_SIZE, &ask, sizeof(ask), why);
}

int agent_rule(uint16_t type, const char *name, bool deny, const char *rule, struct why *why)
{
    struct agent_rule ask = {.deny = deny};

    if (strlen(rule) >= sizeof(ask.rule))
        return why_set(why, -EINVAL, "a rule has at most %zu characters", sizeof(ask.rule) - 1);
    agent_set_name(ask.name, name);
    memcpy(ask.rule, rule, strlen(rule));
    return call_reply(type, &ask, sizeof(ask), why);
}

int agent_rules_get(const char *name, json_t **ret_rules, struct why *why)
{
    json_t *rules = json_array();
    int rc = 0;

    for (uint32_t i = 0; i < 2 * AGENT_RULES_MAX; i++) {
        struct agent_index ask = {.index = i};
        struct agent_rule rule = {0};

        agent_set_name(ask.name, name);
        rc = agent_call(AGENT_RULE_GET, &ask, sizeof(ask), NULL, 0, AGENT_RULE_GET, &rule, sizeof(rule), AGENT_WAIT_MS,
                        why);
        if (rc < 0)
            break;
        rule.rule[sizeof(rule.rule) - 1] = 0;
        json_array_append_new(rules,
                              json_pack("{s:s, s:s}", "effect", rule.deny ? "deny" : "allow", "rule", rule.rule));
    }
    if (rc < 0 && (rc != -ENOENT || json_array_size(rules) == 0)) {
        struct agent_volume v;

        /* No rules at all and no such volume both end in -ENOENT. */
        if (rc != -ENOENT || (rc = agent_volume_get(name, &v, why)) < 0) {
            json_decref(rules);
            return rc;
        }
    }
    *ret_rules = rules;
    return 0;
}

int agent_bind(const char *name, uint32_t purpose, int *ret_fd, struct why *why)
{
    struct agent_bind ask = {.purpose = purpose};
    int pair[2], rc;

    agent_set_name(ask.name, name);
    randombytes_buf(&ask.mount_id, sizeof(ask.mount_id));
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return why_set(why, -errno, "socketpair: %s", strerror(errno));
    rc = agent_call(AGENT_BIND, &ask, sizeof(ask), &pair[0], 1, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS, why);
    close_quiet(pair[0]);
    if (rc < 0)
        close_quiet(pair[1]);
    else
        *ret_fd = pair[1];
    return rc;
}

int agent_engine(const char *name, uint32_t kind, pid_t tgid, int pidfd, uint64_t ref, struct why *why)
{
    struct agent_engine ask = {.kind = kind, .tgid = tgid, .mount_ref = ref};

    agent_set_name(ask.name, name);
    return agent_call(AGENT_ENGINE, &ask, sizeof(ask), &pidfd, pidfd >= 0 ? 1 : 0, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS,
                      why);
}

void agent_note(const char *name, const char *event, const char *text)
{
    struct agent_note note = {0};
    struct why why;

    agent_set_name(note.name, name);
    snprintf(note.event, sizeof(note.event), "%s", event);
    if (strchr(name, '@'))
        snprintf(note.text, sizeof(note.text), "snapshot %s%s%s", strchr(name, '@') + 1, *text ? ": " : "", text);
    else
        snprintf(note.text, sizeof(note.text), "%s", text);
    if (call_reply(AGENT_NOTE, &note, sizeof(note), &why) < 0)
        log_err("volume %s: %s is not in the audit log: %s", name, event, why.text);
}
