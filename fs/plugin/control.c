/*
 * control.c - see control.h. Owns the control socket.
 *
 * Invariants:
 *  1. Only uid 0 is answered, whatever the socket's mode.
 *  2. Descriptors that carry secrets are passed on to coffer-keyd and never read here.
 *  3. Each command is a row of the table: its name, its handler, how many descriptors come along. Anything else is
 * refused.
 */
#include "control.h"

#include "agent_client.h"
#include "fsproc.h"
#include "mounts.h"
#include "registry.h"
#include "supervisor.h"
#include "volumes.h"
#include "fs/base/msg.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define REQUEST_MS      10000
#define SEND_S          10
#define CONNECTIONS_MAX 64
#define STATUS_MS       1500
#define SCRUB_RATE      (20ull << 20) /* bytes a second */
#define SCRUB_RATE_MIN  (64ull << 10)

struct request {
    int sock;
    json_t *in;
    int fds[MSG_FDS_MAX];
    int nfds;
    json_t *out; /* members of the last answer besides "ok" */
    struct why why;
};

static pthread_mutex_t count_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned connections; /* (count_lock) */
static int listener = -1;
static void (*on_quit)(void);

static void send_json(int sock, json_t *v)
{
    char *text = json_dumps(v, JSON_COMPACT);

    /* One that does not read is waited for once: what follows a line that it did not get is worth nothing. */
    if (text && frame_send(sock, text, strlen(text), NULL, 0) < 0)
        shutdown(sock, SHUT_RDWR);
    free(text);
    json_decref(v);
}

static void send_line(void *ctx, const char *text)
{
    struct request *r = ctx;

    send_json(r->sock, json_pack("{s:s}", "line", text));
}

static bool client_gone(void *ctx)
{
    struct pollfd p = {.fd = ((struct request *)ctx)->sock};

    return poll(&p, 1, 0) > 0 && p.revents & (POLLHUP | POLLERR);
}

#define MEMBERS(r, list) json_members((r)->in, list, ARRAY_LEN(list), &(r)->why)

/* Requests with a name and nothing else. */
static int take_name(struct request *r, const char **ret)
{
    json_t *name;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}};
    int rc = MEMBERS(r, members);

    if (rc == 0)
        *ret = json_string_value(name);
    return rc;
}

static int no_members(struct request *r)
{
    return json_members(r->in, NULL, 0, &r->why);
}

static int take_volume(struct request *r, json_t *name, struct plugin_volume **ret)
{
    const char *s = json_string_value(name);

    *ret = volume_name_ok(s) ? registry_find_ref(s) : NULL;
    return *ret ? 0 : why_set(&r->why, -ENOENT, "no such volume: %.140s", s);
}

/* --- the keystore --- */

static int take_kind(struct request *r, bool recovery, struct agent_slot *ret)
{
    json_t *kind;
    const struct json_member members[] = {{"kind", JSON_STRING, true, &kind}};
    const char *s;
    int rc = MEMBERS(r, members);

    if (rc < 0)
        return rc;
    s = json_string_value(kind);
    *ret = (struct agent_slot){0};
    if (!strcmp(s, "passphrase"))
        ret->kind = AGENT_SLOT_PASSPHRASE;
    else if (!strcmp(s, "key-file"))
        ret->kind = AGENT_SLOT_KEY_FILE;
    else if (recovery && !strcmp(s, "recovery"))
        ret->kind = AGENT_SLOT_RECOVERY;
    else
        return why_set(&r->why, -EINVAL, "unknown kind of slot: %.64s", s);
    return 0;
}

static size_t count_volumes(size_t *ret_mounted)
{
    struct plugin_volume **all;
    size_t n;

    *ret_mounted = 0;
    registry_all_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        *ret_mounted += mounts_busy(all[i]);
        registry_unref(all[i]);
    }
    free(all);
    return n;
}

/* Where the agent has no keystore. rc, or -ENOKEY if volumes are listed: they had one. */
static int keystore_missing(int rc, struct why *why)
{
    size_t mounted, n = count_volumes(&mounted);

    return n ? why_set(why, -ENOKEY,
                       "the keystore file is missing, and with it the keys of %zu volume%s: restore it from a backup",
                       n, n == 1 ? "" : "s")
             : rc;
}

static int do_init(struct request *r)
{
    struct agent_status st;
    struct agent_slot slot;
    int rc = take_kind(r, false, &slot);

    if (rc == 0)
        rc = agent_status(&st, &r->why);
    if (rc == 0 && !st.initialised)
        rc = keystore_missing(0, &r->why);
    return rc < 0 ? rc
                  : agent_call(AGENT_INIT, &slot, sizeof(slot), r->fds, r->nfds, AGENT_REPLY, NULL, 0, AGENT_SLOW_MS,
                               &r->why);
}

static int do_unlock(struct request *r)
{
    struct agent_slot slot;
    int rc = take_kind(r, true, &slot);

    if (rc == 0)
        rc = agent_call(AGENT_UNLOCK, &slot, sizeof(slot), r->fds, r->nfds, AGENT_REPLY, NULL, 0, AGENT_SLOW_MS,
                        &r->why);
    if (rc == -ENOENT)
        rc = keystore_missing(rc, &r->why);
    if (rc == 0) {
        volumes_reconcile();
        mounts_agent_up();
    }
    return rc;
}

static int do_lock(struct request *r)
{
    int rc = no_members(r);

    return rc < 0 ? rc
                  : agent_call(AGENT_LOCK, NULL, 0, NULL, 0, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS + AGENT_TIMEOUT_MS,
                               &r->why);
}

/* It may have come up a moment ago, so that its supervisor does not know yet. */
static bool agent_listens(void)
{
    int sock = agent_connect();

    close_quiet(sock);
    return sock >= 0;
}

static int do_status(struct request *r)
{
    struct agent_status st = {0};
    size_t n, mounted;
    struct why ignored;
    bool agent;
    int rc = no_members(r);

    if (rc < 0)
        return rc;
    /* Bounded: `coffer up` waits for this answer, not for coffer-keyd. */
    agent = (supervisor_is_up() || agent_listens()) &&
            agent_call(AGENT_STATUS, NULL, 0, NULL, 0, AGENT_STATUS, &st, sizeof(st), STATUS_MS, &ignored) == 0;
    n = count_volumes(&mounted);
    r->out =
        json_pack("{s:s*, s:b, s:b, s:I, s:I, s:I, s:s, s:s, s:b, s:s}", "damaged", agent ? NULL : supervisor_damage(),
                  "initialised", (int)st.initialised, "unlocked", (int)st.unlocked, "slots", (json_int_t)st.slots,
                  "volumes", (json_int_t)n, "mounted", (json_int_t)mounted, "driver", plugin_config.driver,
                  "plugin_socket", plugin_config.plugin_socket, "agent", (int)agent, "version", COFFERD_VERSION);
    return 0;
}

/* --- volumes --- */

static int take_number(struct request *r, json_t *v, const char *key, uint64_t max, uint64_t *ret)
{
    if (!v)
        return 0;
    if (json_integer_value(v) < 0 || (uint64_t)json_integer_value(v) > max)
        return why_set(&r->why, -EINVAL, "\"%s\" is out of range", key);
    *ret = (uint64_t)json_integer_value(v);
    return 0;
}

static int take_u32(struct request *r, json_t *v, const char *key, uint32_t max, uint32_t *ret)
{
    uint64_t x = *ret;
    int rc = take_number(r, v, key, max, &x);

    *ret = (uint32_t)x;
    return rc;
}

static int take_rules(struct request *r, json_t *list, bool deny, struct volume_spec *s)
{
    json_t *v;
    size_t i;

    json_array_foreach(list, i, v)
    {
        int rc = json_is_string(v)
                     ? volumes_spec_add_rule(s, deny, json_string_value(v), json_string_length(v), &r->why)
                     : why_set(&r->why, -EINVAL, "a rule is not a text");

        if (rc < 0)
            return rc;
    }
    return 0;
}

static int take_spec(struct request *r, const char **ret_name, struct volume_spec *s, bool *ret_progress)
{
    json_t *progress, *name, *size, *block, *profile, *allow, *deny, *uid, *gid, *mode, *strict;
    const struct json_member members[] = {
        {"name", JSON_STRING, true, &name},        {"size", JSON_INTEGER, false, &size},
        {"block", JSON_INTEGER, false, &block},    {"profile", JSON_STRING, false, &profile},
        {"allow", JSON_ARRAY, false, &allow},      {"deny", JSON_ARRAY, false, &deny},
        {"uid", JSON_INTEGER, false, &uid},        {"gid", JSON_INTEGER, false, &gid},
        {"mode", JSON_INTEGER, false, &mode},      {"strict", JSON_TRUE, false, &strict},
        {"progress", JSON_TRUE, false, &progress},
    };
    int rc = MEMBERS(r, members);

    if (rc < 0)
        return rc;
    *ret_name = json_string_value(name);
    s->strict = json_is_true(strict);
    *ret_progress = json_is_true(progress);
    if (profile && !strcmp(json_string_value(profile), "database"))
        s->profile = VOLUME_PROFILE_DATABASE;
    else if (profile && strcmp(json_string_value(profile), "general") != 0)
        return why_set(&r->why, -EINVAL, "profile: give general or database");
    if ((rc = take_number(r, size, "size", INT64_MAX, &s->size)) < 0 ||
        (rc = take_u32(r, block, "block", UINT32_MAX, &s->block)) < 0 ||
        (rc = take_u32(r, uid, "uid", UINT32_MAX - 1, &s->uid)) < 0 ||
        (rc = take_u32(r, gid, "gid", UINT32_MAX - 1, &s->gid)) < 0 ||
        (rc = take_u32(r, mode, "mode", 07777, &s->mode)) < 0 || (rc = take_rules(r, allow, false, s)) < 0 ||
        (rc = take_rules(r, deny, true, s)) < 0)
        return rc;
    if (size && s->size == 0)
        return why_set(&r->why, -EINVAL, "size: give 64M to 16T");
    return volumes_spec_check(s, &r->why);
}

static int put_volume(struct request *r, const char *name)
{
    struct plugin_volume *v = registry_find_ref(name);

    if (!v)
        return why_set(&r->why, -ENOENT, "no such volume: %.140s", name);
    r->out = json_pack("{s:o}", "volume", volumes_inspect(v, supervisor_is_up()));
    registry_unref(v);
    return 0;
}

static void send_progress(void *ctx, uint64_t done, uint64_t total)
{
    send_json(((struct request *)ctx)->sock,
              json_pack("{s:{s:I, s:I}}", "progress", "done", (json_int_t)done, "total", (json_int_t)total));
}

static int create(struct request *r, bool from_import)
{
    struct fsproc_sink sink = {send_line, NULL, r, client_gone};
    const struct volume_import import = {.fds = {r->fds[0], r->fds[1]}, .sink = &sink};
    struct volume_spec spec;
    const char *name = NULL;
    bool progress = false;
    int rc;

    volumes_spec_init(&spec);
    rc = take_spec(r, &name, &spec, &progress);
    if (progress)
        sink.progress = send_progress;
    if (rc == 0)
        rc = volumes_create(name, &spec, false, from_import ? &import : NULL, &r->why);
    if (rc == 0)
        rc = put_volume(r, name);
    volume_spec_clear(&spec);
    return rc;
}

static int do_create(struct request *r)
{
    return create(r, false);
}

static int do_import(struct request *r)
{
    return create(r, true);
}

static int do_ls(struct request *r)
{
    struct plugin_volume **all;
    json_t *list = json_array();
    struct why ignored;
    bool ask;
    size_t n;
    int rc = no_members(r);

    if (rc < 0) {
        json_decref(list);
        return rc;
    }
    ask = supervisor_is_up() && agent_need_unlocked(&ignored) == 0;
    registry_all_ref(&all, &n);
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(list, volumes_inspect(all[i], ask));
        registry_unref(all[i]);
    }
    free(all);
    r->out = json_pack("{s:o}", "volumes", list);
    return 0;
}

static int do_inspect(struct request *r)
{
    const char *name = NULL;
    int rc = take_name(r, &name);

    return rc < 0 ? rc : put_volume(r, name);
}

static int do_rm(struct request *r)
{
    const char *name = NULL;
    int rc = take_name(r, &name);

    return rc < 0 ? rc : volumes_remove(name, &r->why);
}

static int do_accept_rollback(struct request *r)
{
    const char *name = NULL;
    int rc = take_name(r, &name);
    struct plugin_volume *v;

    if (rc < 0)
        return rc;
    v = registry_find_ref(name);
    if (v) /* the branch that is given up would be written over beneath a mounted snapshot */
        rc = mounts_need_no_snapshots(v, &r->why);
    registry_unref(v);
    return rc < 0 ? rc : agent_accept_rollback(name, &r->why);
}

/* --- looking after volumes --- */

static int do_check(struct request *r)
{
    json_t *name, *data, *mend, *progress;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name},
                                          {"data", JSON_TRUE, false, &data},
                                          {"repair", JSON_TRUE, false, &mend},
                                          {"progress", JSON_TRUE, false, &progress}};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);
    struct fsproc_sink sink = {send_line, NULL, r, client_gone};

    if (rc < 0)
        return rc;
    if (json_is_true(progress))
        sink.progress = send_progress;
    rc = take_volume(r, name, &v);
    if (json_is_true(mend))
        sink.gone = NULL; /* what was begun is brought to its end */
    if (rc == 0)
        rc = json_is_true(mend) ? volumes_repair(v, &sink, &r->why)
                                : volumes_check(v, json_is_true(data), &sink, &r->why);
    registry_unref(v);
    if (rc >= 0)
        r->out = json_pack("{s:i}", "findings", rc);
    return rc;
}

static int do_export(struct request *r)
{
    json_t *name, *snapshot, *since, *progress;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name},
                                          {"snapshot", JSON_STRING, false, &snapshot},
                                          {"since", JSON_STRING, false, &since},
                                          {"progress", JSON_TRUE, false, &progress}};
    struct fsproc_sink sink = {send_line, NULL, r, client_gone};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);

    if (rc < 0)
        return rc;
    if (json_is_true(progress))
        sink.progress = send_progress;
    rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = volumes_export(v, json_string_value(snapshot), json_string_value(since), r->fds, &sink, &r->why);
    registry_unref(v);
    if (rc >= 0)
        r->out = json_pack("{s:i}", "findings", rc);
    return rc;
}

static int do_scrub(struct request *r)
{
    json_t *name, *rate;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}, {"rate", JSON_INTEGER, false, &rate}};
    struct plugin_volume *v = NULL;
    uint64_t n = SCRUB_RATE;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_number(r, rate, "rate", INT64_MAX, &n);
    if (rc == 0 && n < SCRUB_RATE_MIN)
        rc = why_set(&r->why, -EINVAL, "rate: give 64K or more a second");
    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = volumes_scrub(v, n, &r->why);
    registry_unref(v);
    return rc;
}

static int do_resize(struct request *r)
{
    json_t *name, *size;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}, {"size", JSON_INTEGER, true, &size}};
    struct plugin_volume *v = NULL;
    uint64_t n = 0;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_number(r, size, "size", INT64_MAX, &n);
    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = volumes_resize(v, n, &r->why);
    registry_unref(v);
    return rc;
}

/* --- snapshots --- */

static int change_snapshots(struct request *r,
                            int (*change)(struct plugin_volume *v, const char *snapshot, struct why *why))
{
    json_t *name, *snapshot;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name},
                                          {"snapshot", JSON_STRING, true, &snapshot}};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = change(v, json_string_value(snapshot), &r->why);
    registry_unref(v);
    return rc;
}

static int do_snapshot_create(struct request *r)
{
    return change_snapshots(r, volumes_snapshot_create);
}

static int do_snapshot_rm(struct request *r)
{
    return change_snapshots(r, volumes_snapshot_remove);
}

static int do_snapshot_mount(struct request *r)
{
    json_t *name, *snapshot, *dir;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name},
                                          {"snapshot", JSON_STRING, true, &snapshot},
                                          {"dir", JSON_STRING, true, &dir}};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = volumes_snapshot_mount(v, json_string_value(snapshot), json_string_value(dir), &r->why);
    if (rc == 0)
        r->out = json_pack("{s:s}", "mountpoint", json_string_value(dir));
    registry_unref(v);
    return rc;
}

static int do_snapshot_ls(struct request *r)
{
    json_t *name, *list;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = volumes_snapshot_list(v, &list, &r->why);
    registry_unref(v);
    if (rc == 0)
        r->out = json_pack("{s:o}", "snapshots", list);
    return rc;
}

/* --- mounts --- */

static int do_mount(struct request *r)
{
    json_t *name, *dir;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}, {"dir", JSON_STRING, true, &dir}};
    struct plugin_volume *v = NULL;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = mounts_local_mount(v, json_string_value(dir), &r->why);
    if (rc == 0)
        r->out = json_pack("{s:s}", "mountpoint", json_string_value(dir));
    registry_unref(v);
    return rc;
}

static int do_umount(struct request *r)
{
    json_t *dir;
    const struct json_member members[] = {{"dir", JSON_STRING, true, &dir}};
    int rc = MEMBERS(r, members);

    return rc < 0 ? rc : mounts_local_umount(json_string_value(dir), &r->why);
}

/* --- changing servers --- */

/* The volumes that are meant: the one, or all that have a server. *ret (free it) has *ret_n, each with a reference. */
static int restart_which(struct request *r, json_t *name, bool all, struct plugin_volume ***ret, size_t *ret_n)
{
    struct plugin_volume **list, *v = NULL;
    size_t n = 0, total;

    if (!name == !all)
        return why_set(&r->why, -EINVAL, "give a volume's name, or \"all\"");
    if (name) {
        v = registry_find_mount_ref(json_string_value(name));
        if (!v)
            return why_set(&r->why, -ENOENT, "no such volume, or snapshot that is mounted: %.200s",
                           json_string_value(name));
        list = xcalloc(1, sizeof(*list));
        list[n++] = v;
    } else {
        registry_mounts_ref(&list, &total);
        for (size_t i = 0; i < total; i++) {
            struct fsproc *fs = mounts_server_ref(list[i]);

            if (fs)
                list[n++] = list[i];
            else
                registry_unref(list[i]);
            fsproc_unref(fs);
        }
    }
    *ret = list;
    *ret_n = n;
    return 0;
}

static int do_restart_server(struct request *r)
{
    json_t *name, *all, *done = json_array();
    const struct json_member members[] = {{"name", JSON_STRING, false, &name}, {"all", JSON_TRUE, false, &all}};
    struct plugin_volume **list = NULL;
    int rc = MEMBERS(r, members), failed = 0;
    size_t n = 0;

    if (rc == 0)
        rc = restart_which(r, name, json_is_true(all), &list, &n);
    for (size_t i = 0; i < n; i++) {
        struct mounts_restarted m;
        int64_t start = mono_ns();

        rc = mounts_restart_server(list[i], &m, &r->why);
        if (rc == 0)
            json_array_append_new(done,
                                  json_pack("{s:s, s:i, s:i, s:I}", "name", list[i]->name, "old_pid", (int)m.old_pid,
                                            "pid", (int)m.pid, "ms", (json_int_t)((mono_ns() - start) / 1000000)));
        else if (!name)
            send_line(r, r->why.text);
        failed += rc < 0;
        registry_unref(list[i]);
    }
    free(list);
    if (failed && !name)
        rc = why_set(&r->why, -EIO, "%d of %zu servers were not changed, as listed: they serve on", failed, n);
    if (rc == 0)
        r->out = json_pack("{s:O}", "restarted", done);
    json_decref(done);
    return rc;
}

/* --- policy --- */

static int do_policy_show(struct request *r)
{
    struct plugin_volume *v = NULL;
    json_t *rules, *name;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}};
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc == 0)
        rc = agent_rules_get(v->name, &rules, &r->why);
    if (rc == 0)
        r->out = json_pack("{s:o}", "rules", rules);
    registry_unref(v);
    return rc;
}

static int change_policy(struct request *r, json_t *name, uint16_t type, bool deny, json_t *rule)
{
    struct plugin_volume *v = NULL;
    int rc = take_volume(r, name, &v);

    if (rc == 0)
        rc = agent_rule(type, v->name, deny, json_string_value(rule), &r->why);
    if (rc == 0)
        volumes_refresh_rules(v);
    registry_unref(v);
    return rc;
}

static int add_rule(struct request *r, bool deny)
{
    json_t *name, *rule;
    const struct json_member members[] = {{"name", JSON_STRING, true, &name}, {"rule", JSON_STRING, true, &rule}};
    int rc = MEMBERS(r, members);

    return rc < 0 ? rc : change_policy(r, name, AGENT_RULE_ADD, deny, rule);
}

static int do_policy_allow(struct request *r)
{
    return add_rule(r, false);
}

static int do_policy_deny(struct request *r)
{
    return add_rule(r, true);
}

static int do_policy_remove(struct request *r)
{
    json_t *name, *rule, *effect;
    const struct json_member members[] = {
        {"name", JSON_STRING, true, &name}, {"rule", JSON_STRING, true, &rule}, {"effect", JSON_STRING, true, &effect}};
    int rc = MEMBERS(r, members);
    const char *e;

    if (rc < 0)
        return rc;
    e = json_string_value(effect);
    if (strcmp(e, "allow") != 0 && strcmp(e, "deny") != 0)
        return why_set(&r->why, -EINVAL, "\"effect\" is allow or deny");
    return change_policy(r, name, AGENT_RULE_RM, !strcmp(e, "deny"), rule);
}

static int do_why(struct request *r)
{
    json_t *name, *pid, *write;
    const struct json_member members[] = {
        {"name", JSON_STRING, true, &name}, {"pid", JSON_INTEGER, true, &pid}, {"write", JSON_TRUE, false, &write}};
    struct plugin_volume *v = NULL;
    struct agent_why ask = {0};
    uint64_t n = 0;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = take_number(r, pid, "pid", INT32_MAX, &n);
    if (rc == 0)
        rc = take_volume(r, name, &v);
    if (rc < 0)
        return rc;
    agent_set_name(ask.name, v->name);
    ask.pid = (int32_t)n;
    ask.write = json_is_true(write);
    registry_unref(v);
    rc = agent_call(AGENT_WHY, &ask, sizeof(ask), NULL, 0, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS, &r->why);
    if (rc < 0 && rc != -EACCES)
        return rc;
    r->out = json_pack("{s:b, s:s}", "allowed", rc == 0, "reason", r->why.text);
    return 0;
}

/* --- the end --- */

static int do_down(struct request *r)
{
    json_t *force;
    const struct json_member members[] = {{"force", JSON_TRUE, false, &force}};
    struct why ignored;
    int rc = MEMBERS(r, members);

    if (rc == 0)
        rc = mounts_down(json_is_true(force), &r->why);
    if (rc < 0)
        return rc;
    if (supervisor_is_up())
        agent_call(AGENT_LOCK, NULL, 0, NULL, 0, AGENT_REPLY, NULL, 0, AGENT_WAIT_MS, &ignored);
    supervisor_stop();
    unlink(plugin_config.plugin_socket);
    unlink(plugin_config.control_socket);
    return 0;
}

/* --- requests --- */

static const struct command {
    const char *cmd;
    int (*run)(struct request *r);
    int nfds;
} commands[] = {
    {"init", do_init, 2},
    {"unlock", do_unlock, 1},
    {"lock", do_lock, 0},
    {"status", do_status, 0},
    {"volume create", do_create, 0},
    {"volume ls", do_ls, 0},
    {"volume inspect", do_inspect, 0},
    {"volume rm", do_rm, 0},
    {"volume accept-rollback", do_accept_rollback, 0},
    {"volume check", do_check, 0},
    {"volume scrub", do_scrub, 0},
    {"volume resize", do_resize, 0},
    {"volume restart-server", do_restart_server, 0},
    {"volume snapshot create", do_snapshot_create, 0},
    {"volume snapshot ls", do_snapshot_ls, 0},
    {"volume snapshot mount", do_snapshot_mount, 0},
    {"volume snapshot rm", do_snapshot_rm, 0},
    {"volume export", do_export, 2},
    {"volume import", do_import, 2},
    {"mount", do_mount, 0},
    {"umount", do_umount, 0},
    {"policy show", do_policy_show, 0},
    {"policy allow", do_policy_allow, 0},
    {"policy deny", do_policy_deny, 0},
    {"policy remove", do_policy_remove, 0},
    {"why", do_why, 0},
    {"down", do_down, 0},
};

static int dispatch(struct request *r, const struct command **ret_command)
{
    const char *cmd = json_string_value(json_object_get(r->in, "cmd"));

    if (!cmd)
        return why_set(&r->why, -EINVAL, "the request lacks \"cmd\"");
    for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
        if (strcmp(cmd, commands[i].cmd) != 0)
            continue;
        if (r->nfds != commands[i].nfds)
            return why_set(&r->why, -EINVAL, "\"%s\" comes with %d descriptors", cmd, commands[i].nfds);
        *ret_command = &commands[i];
        return commands[i].run(r);
    }
    return why_set(&r->why, -EINVAL, "unknown command \"%.64s\"", cmd);
}

static bool peer_is_root(int sock)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);

    return getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0 && cred.uid == 0;
}

static void answer(struct request *r, int rc)
{
    json_t *out = r->out ? r->out : json_object();

    json_object_set_new(out, "ok", json_boolean(rc >= 0));
    if (rc < 0)
        json_object_set_new(out, "error", json_string(r->why.text));
    send_json(r->sock, out);
}

static void serve(int sock)
{
    const struct command *command = NULL;
    struct request r = {.sock = sock};
    struct timeval tv = {.tv_sec = SEND_S};
    char *buf = NULL;
    size_t n;
    int rc;

    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
    if (!peer_is_root(sock) || frame_recv(sock, &buf, &n, r.fds, &r.nfds, REQUEST_MS) < 0)
        return;
    rc = json_parse(buf, n, &r.in, &r.why);
    if (rc == 0)
        rc = dispatch(&r, &command);
    answer(&r, rc);
    for (int i = 0; i < r.nfds; i++)
        close_quiet(r.fds[i]);
    json_decref(r.in);
    free(buf);
    if (rc == 0 && command && command->run == do_down)
        on_quit();
}

static void *serve_thread(void *arg)
{
    int sock = (int)(intptr_t)arg;

    serve(sock);
    close_quiet(sock);
    pthread_mutex_lock(&count_lock);
    connections--;
    pthread_mutex_unlock(&count_lock);
    return NULL;
}

static bool count_one(void)
{
    bool room;

    pthread_mutex_lock(&count_lock);
    room = connections < CONNECTIONS_MAX;
    connections += room;
    pthread_mutex_unlock(&count_lock);
    return room;
}

static void *accept_thread(void *arg)
{
    (void)arg;
    for (;;) {
        int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

        if (sock < 0) {
            sleep_ms(errno == EMFILE || errno == ENFILE ? 100 : 1);
            continue;
        }
        if (!count_one()) {
            close_quiet(sock);
        } else if (thread_start(serve_thread, (void *)(intptr_t)sock) < 0) {
            close_quiet(sock);
            pthread_mutex_lock(&count_lock);
            connections--;
            pthread_mutex_unlock(&count_lock);
        }
    }
    return NULL;
}

int control_serve_start(void (*quit)(void), struct why *why)
{
    on_quit = quit;
    listener = unix_listen(plugin_config.control_socket, SOCK_STREAM, 0600);
    if (listener < 0)
        return why_set(why, listener, "cannot listen at %s: %s", plugin_config.control_socket, strerror(-listener));
    return thread_start(accept_thread, NULL);
}
