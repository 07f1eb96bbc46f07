/*
 * volume.c - the commands that are one request to cofferd and something to show: status, volumes, mounts, policy, why.
 * Numbers are parsed here, before anything is sent; names and rules are judged by who keeps them.
 */
#include "fs/cli/cli.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* --- numbers --- */

static int parse_number(const char *s, int base, uint64_t max, uint64_t *ret)
{
    char *end;

    if (*s < '0' || *s > '9')
        return -EINVAL;
    errno = 0;
    *ret = strtoull(s, &end, base);
    return errno || *end || *ret > max ? -EINVAL : 0;
}

enum number_kind { NUMBER_SIZE, NUMBER_DECIMAL, NUMBER_OCTAL };

/* Puts an option's number into req as member key. CLI_OK also when the option is not given. */
static int add_number(struct cli *c, json_t *req, const char *option, const char *key, enum number_kind kind,
                      uint64_t max)
{
    const char *s = cli_get(c, option);
    uint64_t v = 0;
    int rc;

    if (!s)
        return CLI_OK;
    if (kind == NUMBER_SIZE)
        rc = size_parse(s, &v);
    else
        rc = parse_number(s, kind == NUMBER_OCTAL ? 8 : 10, max, &v);
    if (rc < 0 || v > max)
        return cli_usage(c, "%s %.64s is not a %s", option, s,
                         kind == NUMBER_SIZE    ? "size such as 512M or 10G"
                         : kind == NUMBER_OCTAL ? "mode such as 0750"
                                                : "number");
    json_object_set_new(req, key, json_integer((json_int_t)v));
    return CLI_OK;
}

/* --- one request, one line --- */

static const struct {
    const char *words, *done;
} simple_done[] = {{"lock", "locked"},
                   {"volume rm", "removed"},
                   {"volume accept-rollback", "accepted: the next mount takes the files as they are"},
                   {"umount", "unmounted"}};

static int finish(struct cli *c, json_t *req, const char *done)
{
    json_t *answer = NULL;
    int rc = cli_request(c, req, NULL, 0, &answer);

    if (rc == CLI_OK && !cli_print_json(c, answer) && done)
        puts(done);
    json_decref(answer);
    return rc;
}

int cli_simple(struct cli *c)
{
    const char *done = NULL;

    for (size_t i = 0; i < ARRAY_LEN(simple_done); i++)
        if (!strcmp(simple_done[i].words, c->command->words))
            done = simple_done[i].done;
    return finish(c, cli_request_new(c), done);
}

/* --- status --- */

int cli_status(struct cli *c)
{
    json_t *a = NULL;
    int rc = cli_request(c, cli_request_new(c), NULL, 0, &a);

    if (rc == CLI_OK && !cli_print_json(c, a)) {
        char *slots = cli_text(a, "slots"), *volumes = cli_text(a, "volumes"), *mounted = cli_text(a, "mounted");
        char *driver = cli_text(a, "driver"), *sock = cli_text(a, "plugin_socket"), *version = cli_text(a, "version");
        char *damaged = json_object_get(a, "damaged") ? cli_text(a, "damaged") : NULL;

        if (damaged)
            printf("keystore  %s\n", damaged);
        else if (!cli_flag(a, "agent"))
            puts("keystore  the key agent is down: cofferd starts it again, then run `coffer unlock`");
        else if (!cli_flag(a, "initialised"))
            puts(strcmp(volumes, "0") ? "keystore  missing: restore its file from a backup"
                                      : "keystore  none yet: run `coffer init`");
        else
            printf("keystore  %s, %s slots\n", cli_flag(a, "unlocked") ? "unlocked" : "locked: run `coffer unlock`",
                   slots);
        printf("volumes   %s, %s mounted\n", volumes, mounted);
        printf("driver    %s at %s\n", driver, sock);
        printf("version   %s\n", version);
        free(slots), free(volumes), free(mounted), free(driver), free(sock), free(version), free(damaged);
    }
    json_decref(a);
    return rc;
}

/* --- volumes --- */

static int add_rules(struct cli *c, json_t *req, const char *option, const char *key)
{
    json_t *rules = json_array();

    for (size_t i = 0; i < c->ngiven; i++)
        if (!strcmp(c->given[i].option->name, option)) {
            json_t *rule = json_string(c->given[i].value);

            if (!rule) {
                json_decref(rules);
                return cli_usage(c, "%s holds bytes that are not UTF-8", option);
            }
            json_array_append_new(rules, rule);
        }
    if (json_array_size(rules))
        json_object_set(req, key, rules);
    json_decref(rules);
    return CLI_OK;
}

int cli_volume_options(struct cli *c, json_t *req)
{
    int rc;

    if ((rc = add_number(c, req, "--size", "size", NUMBER_SIZE, INT64_MAX)) ||
        (rc = add_number(c, req, "--block", "block", NUMBER_SIZE, UINT32_MAX)) ||
        (rc = add_rules(c, req, "--allow", "allow")) || (rc = add_rules(c, req, "--deny", "deny")))
        return rc;
    return CLI_OK;
}

int cli_volume_create(struct cli *c)
{
    const char *profile = cli_get(c, "--profile");
    json_t *req = cli_request_new(c), *answer = NULL;
    int rc;

    if ((rc = cli_volume_options(c, req)) ||
        (rc = add_number(c, req, "--uid", "uid", NUMBER_DECIMAL, UINT32_MAX - 1)) ||
        (rc = add_number(c, req, "--gid", "gid", NUMBER_DECIMAL, UINT32_MAX - 1)) ||
        (rc = add_number(c, req, "--mode", "mode", NUMBER_OCTAL, 07777))) {
        json_decref(req);
        return rc;
    }
    if (profile)
        json_object_set_new(req, "profile", json_string(profile));
    if (cli_get(c, "--strict"))
        json_object_set_new(req, "strict", json_true());
    rc = cli_request(c, req, NULL, 0, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer))
        printf("created %s\n", c->operand[0]);
    json_decref(answer);
    return rc;
}

/* A number of bytes as text; "-" when it is null or absent. */
static char *bytes_text(const json_t *v, const char *key)
{
    const json_t *n = json_object_get(v, key);

    return json_is_integer(n) ? cli_size_text((uint64_t)json_integer_value(n)) : xstrdup("-");
}

int cli_volume_ls(struct cli *c)
{
    json_t *answer = NULL, *v;
    int rc = cli_request(c, cli_request_new(c), NULL, 0, &answer);
    int width = 4;
    size_t i;

    if (rc || cli_print_json(c, answer))
        goto out;
    json_array_foreach(json_object_get(answer, "volumes"), i, v)
    {
        char *name = cli_text(v, "name");

        width = MAX(width, (int)strlen(name));
        free(name);
    }
    printf("%-*s  %8s  %8s  %-5s  %-7s  %-8s  %s\n", width, "NAME", "SIZE", "USED", "STATE", "MOUNTED", "UNLOCKED",
           "FOR");
    json_array_foreach(json_object_get(answer, "volumes"), i, v)
    {
        char *name = cli_text(v, "name"), *state = cli_text(v, "state");
        char *size = bytes_text(v, "size"), *used = bytes_text(v, "used");

        printf("%-*s  %8s  %8s  %-5s  %-7s  %-8s  %s\n", width, name, size, used, state,
               cli_flag(v, "mounted") ? "yes" : "no", cli_flag(v, "unlocked") ? "yes" : "no",
               cli_flag(v, "attached") ? "containers" : "this host");
        free(name), free(state), free(size), free(used);
    }
out:
    json_decref(answer);
    return rc;
}

int cli_volume_inspect(struct cli *c)
{
    static const char *const keys[] = {"name",  "id",      "created",  "size",       "block", "profile",  "strict",
                                       "state", "mounted", "unlocked", "mountpoint", "used",  "attached", "holders"};
    json_t *answer = NULL, *v;
    int rc = cli_request(c, cli_request_new(c), NULL, 0, &answer);

    if (rc || cli_print_json(c, answer))
        goto out;
    v = json_object_get(answer, "volume");
    for (size_t i = 0; i < ARRAY_LEN(keys); i++) {
        bool bytes = !strcmp(keys[i], "size") || !strcmp(keys[i], "used") || !strcmp(keys[i], "block");
        char *text = bytes ? bytes_text(v, keys[i]) : cli_text(v, keys[i]);

        printf("%-11s %s\n", keys[i], text);
        free(text);
    }
    v = json_object_get(v, "scrub");
    if (v) {
        char *done = bytes_text(v, "done"), *total = bytes_text(v, "total"), *found = cli_text(v, "findings");

        printf("%-11s %s, %s of %s, %s findings\n", "scrub", cli_flag(v, "running") ? "running" : "ended", done, total,
               found);
        free(done), free(total), free(found);
    }
out:
    json_decref(answer);
    return rc;
}

int cli_volume_check(struct cli *c)
{
    json_t *req = cli_request_new(c), *answer = NULL;
    bool repair = cli_get(c, "--repair") != NULL;
    json_int_t findings;
    int rc;

    if (cli_get(c, "--data"))
        json_object_set_new(req, "data", json_true());
    if (repair)
        json_object_set_new(req, "repair", json_true());
    cli_want_progress(c, req);
    rc = cli_request(c, req, NULL, 0, &answer);
    if (rc)
        return rc;
    findings = json_integer_value(json_object_get(answer, "findings"));
    if (!cli_print_json(c, answer) && !findings)
        printf("%s: clean\n", c->operand[0]);
    json_decref(answer);
    if (findings && repair)
        return cli_fail("%s: repaired; %" JSON_INTEGER_FORMAT
                        " things were lost or mended, as listed: restore them from a backup",
                        c->operand[0], findings);
    if (findings)
        return cli_fail("%s: %" JSON_INTEGER_FORMAT
                        " findings: restore a backup, or unmount it and run `coffer volume check --repair %s`",
                        c->operand[0], findings, c->operand[0]);
    return CLI_OK;
}

int cli_volume_scrub(struct cli *c)
{
    json_t *req = cli_request_new(c), *answer = NULL;
    int rc = add_number(c, req, "--rate", "rate", NUMBER_SIZE, INT64_MAX);

    if (rc) {
        json_decref(req);
        return rc;
    }
    rc = cli_request(c, req, NULL, 0, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer))
        printf("started: `coffer volume inspect %s` shows how far it is, `coffer audit` what it finds\n",
               c->operand[0]);
    json_decref(answer);
    return rc;
}

int cli_volume_resize(struct cli *c)
{
    json_t *req = cli_request_new(c);
    uint64_t size;

    if (size_parse(c->operand[1], &size) < 0 || size > INT64_MAX) {
        json_decref(req);
        return cli_usage(c, "%.64s is not a size such as 512M or 10G", c->operand[1]);
    }
    json_object_set_new(req, "size", json_integer((json_int_t)size));
    return finish(c, req, "resized");
}

/* --- snapshots --- */

/* req is gone after an error. */
static int add_snapshot(struct cli *c, json_t *req, const char *snapshot)
{
    json_t *text = json_string(snapshot);

    if (!text) {
        json_decref(req);
        return cli_usage(c, "the snapshot's name holds bytes that are not UTF-8");
    }
    json_object_set_new(req, "snapshot", text);
    return CLI_OK;
}

int cli_snapshot(struct cli *c)
{
    json_t *req = cli_request_new(c);
    int rc = add_snapshot(c, req, c->operand[1]);

    return rc ? rc : finish(c, req, strstr(c->command->words, "create") ? "created" : "removed");
}

int cli_snapshot_ls(struct cli *c)
{
    json_t *answer = NULL, *s;
    int rc = cli_request(c, cli_request_new(c), NULL, 0, &answer);
    int width = 4;
    size_t i;

    if (rc || cli_print_json(c, answer))
        goto out;
    json_array_foreach(json_object_get(answer, "snapshots"), i, s) width =
        MAX(width, (int)json_string_length(json_object_get(s, "name")));
    printf("%-*s  %-20s  %8s  %s\n", width, "NAME", "CREATED", "SIZE", "MOUNTED");
    json_array_foreach(json_object_get(answer, "snapshots"), i, s)
    {
        char *name = cli_text(s, "name"), *created = cli_text(s, "created"), *used = bytes_text(s, "used");

        printf("%-*s  %-20s  %8s  %s\n", width, name, created, used, cli_flag(s, "mounted") ? "yes" : "no");
        free(name), free(created), free(used);
    }
out:
    json_decref(answer);
    return rc;
}

int cli_volume_restart_server(struct cli *c)
{
    json_t *req, *answer = NULL, *one;
    size_t i;
    int rc;

    if (!c->operand[0] == !cli_get(c, "--all"))
        return cli_usage(c, "give a volume's name, or --all");
    req = cli_request_new(c);
    if (c->operand[0])
        json_object_set_new(req, "name", json_string(c->operand[0]));
    else
        json_object_set_new(req, "all", json_true());
    rc = cli_request(c, req, NULL, 0, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer)) {
        json_array_foreach(json_object_get(answer, "restarted"), i, one)
        {
            char *name = cli_text(one, "name"), *pid = cli_text(one, "pid"), *old = cli_text(one, "old_pid");

            printf("%s: process %s has followed %s\n", name, pid, old);
            free(name), free(pid), free(old);
        }
        if (!json_array_size(json_object_get(answer, "restarted")))
            puts("no volume is mounted");
    }
    json_decref(answer);
    return rc;
}

/* --- mounts --- */

static int add_directory(json_t *req, const char *dir)
{
    char *path = realpath(dir, NULL);
    json_t *text;

    if (!path) {
        int err = errno;

        json_decref(req);
        return cli_fail("%.200s: %s%s", dir, strerror(err), err == ENOENT ? ": make the directory first" : "");
    }
    text = json_string(path);
    free(path);
    if (!text) {
        json_decref(req);
        return cli_fail("the directory's name is not UTF-8: choose another one");
    }
    json_object_set_new(req, "dir", text);
    return CLI_OK;
}

/* Of a volume, or (snapshot not NULL) of one of its snapshots. */
static int mount_at(struct cli *c, const char *snapshot, const char *dir)
{
    json_t *req = cli_request_new(c), *answer = NULL;
    int rc = snapshot ? add_snapshot(c, req, snapshot) : CLI_OK;

    if (rc == CLI_OK)
        rc = add_directory(req, dir);
    if (rc == CLI_OK)
        rc = cli_request(c, req, NULL, 0, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer)) {
        char *at = cli_text(answer, "mountpoint");

        printf("%s%s%s is mounted at %s\n", c->operand[0], snapshot ? "@" : "", snapshot ? snapshot : "", at);
        free(at);
    }
    json_decref(answer);
    return rc;
}

int cli_mount(struct cli *c)
{
    return mount_at(c, NULL, c->operand[1]);
}

int cli_snapshot_mount(struct cli *c)
{
    return mount_at(c, c->operand[1], c->operand[2]);
}

/* The directory of a mount may refuse to be looked at, so only its parent is resolved. */
static char *absolute_of(const char *dir)
{
    char *copy = xstrdup(dir), *slash, *parent, *path;
    size_t n = strlen(copy);

    while (n > 1 && copy[n - 1] == '/')
        copy[--n] = 0;
    slash = strrchr(copy, '/');
    if (slash && (!slash[1] || !strcmp(slash + 1, ".") || !strcmp(slash + 1, ".."))) {
        path = realpath(copy, NULL);
        free(copy);
        return path;
    }
    if (slash)
        *slash = 0;
    parent = realpath(!slash ? "." : slash == copy ? "/" : copy, NULL);
    path = parent ? xasprintf("%s/%s", strcmp(parent, "/") ? parent : "", slash ? slash + 1 : copy) : NULL;
    free(parent);
    free(copy);
    return path;
}

int cli_umount(struct cli *c)
{
    char *path = absolute_of(c->operand[0]);
    json_t *req = cli_request_new(c), *text = path ? json_string(path) : NULL;

    free(path);
    if (!text) {
        json_decref(req);
        return cli_fail("%.200s: no such directory: `coffer volume ls` names what is mounted", c->operand[0]);
    }
    json_object_set_new(req, "dir", text);
    return finish(c, req, "unmounted");
}

/* --- policy --- */

int cli_policy_show(struct cli *c)
{
    json_t *answer = NULL, *rule;
    int rc = cli_request(c, cli_request_new(c), NULL, 0, &answer);
    size_t i;

    if (rc == CLI_OK && !cli_print_json(c, answer)) {
        if (!json_array_size(json_object_get(answer, "rules")))
            puts("no rules: a container that Docker attached the volume to may use it, nobody else");
        json_array_foreach(json_object_get(answer, "rules"), i, rule)
        {
            char *effect = cli_text(rule, "effect"), *text = cli_text(rule, "rule");

            printf("%-5s %s\n", effect, text);
            free(effect), free(text);
        }
    }
    json_decref(answer);
    return rc;
}

static int send_rule(struct cli *c, const char *effect, const char *rule)
{
    json_t *req = cli_request_new(c), *text = json_string(rule);

    if (!text) {
        json_decref(req);
        return cli_usage(c, "the rule holds bytes that are not UTF-8");
    }
    if (effect)
        json_object_set_new(req, "effect", json_string(effect));
    json_object_set_new(req, "rule", text);
    return finish(c, req, effect ? "removed" : "added");
}

int cli_policy_rule(struct cli *c)
{
    return send_rule(c, NULL, c->operand[1]);
}

int cli_policy_remove(struct cli *c)
{
    if (strcmp(c->operand[1], "allow") && strcmp(c->operand[1], "deny"))
        return cli_usage(c, "\"%.64s\" is neither allow nor deny", c->operand[1]);
    return send_rule(c, c->operand[1], c->operand[2]);
}

int cli_why(struct cli *c)
{
    json_t *req = cli_request_new(c), *answer = NULL;
    int rc = add_number(c, req, "--pid", "pid", NUMBER_DECIMAL, INT32_MAX);

    if (rc == CLI_OK && !json_object_get(req, "pid"))
        rc = cli_usage(c, "--pid N is needed");
    if (rc) {
        json_decref(req);
        return rc;
    }
    if (cli_get(c, "--write"))
        json_object_set_new(req, "write", json_true());
    rc = cli_request(c, req, NULL, 0, &answer);
    if (rc == CLI_OK && !cli_print_json(c, answer)) {
        char *reason = cli_text(answer, "reason");

        puts(reason); /* begins with that */
        free(reason);
    }
    json_decref(answer);
    return rc;
}
