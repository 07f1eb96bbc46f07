/*
 * cli.h - what the parts of the command line share: the parsed command, the request to cofferd, printing.
 *
 * Exit codes: 0 done, 1 refused or failed, 2 usage. Whoever returns 1 or 2 has printed exactly one line on stderr
 * (cli_fail, cli_usage), which says what to do about it.
 */
#ifndef COFFER_CLI_H
#define COFFER_CLI_H

#include "fs/base/base.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum cli_exit { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2 };

#define CLI_OPTIONS_MAX  10 /* kinds of options of one command */
#define CLI_VALUES_MAX   80 /* options given in one call */
#define CLI_OPERANDS_MAX 3

struct cli_option {
    const char *name; /* "--size" */
    const char *arg;  /* "SIZE" as the usage text shows it; NULL: a flag */
    bool many;        /* may be given more than once */
};

struct cli;

struct cli_command {
    const char *words;    /* "volume create" */
    const char *operands; /* "NAME DIR", one word each, "" for none; the last may be "[NAME]": not needed */
    const char *help;     /* half a line */
    int (*run)(struct cli *c);
    struct cli_option options[CLI_OPTIONS_MAX]; /* ends with a NULL name */
};

struct cli_value {
    const struct cli_option *option;
    const char *value; /* NULL for a flag */
};

struct cli {
    const struct cli_command *command;
    const char *operand[CLI_OPERANDS_MAX];
    int operands;
    struct cli_value given[CLI_VALUES_MAX];
    size_t ngiven;
    bool json;
    bool plain;        /* no --root and no COFFER_ROOT: the default directories */
    char *state, *run; /* absolute directories */
};

/* --- coffer.c: the parsed command --- */

/* The value of an option, "" for a flag that is given, NULL when it is not given. */
const char *cli_get(const struct cli *c, const char *name);
/* Prints "coffer: <text>" on stderr and returns CLI_FAILED. */
int cli_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The same with the hint to --help; returns CLI_USAGE. */
int cli_usage(const struct cli *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- request.c: cofferd's control socket (include/coffer/CONTROL.md) --- */

/* {"cmd": <the command's words>}, with "name" when there is an operand for it; a new reference. */
json_t *cli_request_new(const struct cli *c);
/*
 * Sends req (taken) with nfds descriptors (which stay the caller's), prints the findings that come before the answer
 * (in JSON mode they become its member "lines"). CLI_OK and a new reference to the answer, or CLI_FAILED, said.
 */
int cli_request(struct cli *c, json_t *req, const int *fds, int nfds, json_t **ret_answer);
/* The same in two halves, for who hands something over in between: the first returns the socket or -1, said. */
int cli_request_send(struct cli *c, json_t *req, const int *fds, int nfds);
int cli_request_answer(struct cli *c, int sock, json_t **ret_answer);
/* Does someone answer `status`? 0, or a negative errno; no output. */
int cli_ping(struct cli *c);
/* Is there a person to show progress to? Then it is put into req, and cli_request_answer shows what comes. */
void cli_want_progress(struct cli *c, json_t *req);
/* Can cofferd be reached? CLI_OK, or said. For who asks a person for something first. */
int cli_require(struct cli *c);

/* --- request.c: printing --- */

/* In JSON mode prints the answer (without "ok") on one line and returns true. */
bool cli_print_json(const struct cli *c, json_t *answer);
/* A member as text for a terminal, escaped; "-" when absent or null. The caller frees it. */
char *cli_text(const json_t *obj, const char *key);
/* 1536 -> "1.5K". The caller frees it. */
char *cli_size_text(uint64_t bytes);
/* True when the boolean member is there and true. */
bool cli_flag(const json_t *obj, const char *key);

/* --- secret.c --- */

enum cli_secret { CLI_SECRET_NEW, CLI_SECRET_ASK }; /* a new passphrase is asked twice */

/* By the options --key-file F, --passphrase, --recovery: *ret_kind is the protocol's word, *ret_secret (secmem_free it)
 * has *ret_n bytes. CLI_OK, or said. */
int cli_secret_read(struct cli *c, enum cli_secret how, const char **ret_kind, char **ret_secret, size_t *ret_n);

/* A pipe with the secret in it; *ret_read is its other end. 0 or -errno. */
int cli_secret_pipe(const void *secret, size_t n, int *ret_read);

/* --- volume.c --- */

/* Puts --size, --block, --allow and --deny into req. CLI_OK, or said. */
int cli_volume_options(struct cli *c, json_t *req);

/* --- the handlers --- */

int cli_init(struct cli *c);
int cli_unlock(struct cli *c);
int cli_simple(
    struct cli *c); /* lock, volume rm, accept-rollback, policy allow and deny: the request and nothing to show */
int cli_status(struct cli *c);
int cli_up(struct cli *c);
int cli_down(struct cli *c);
int cli_volume_create(struct cli *c);
int cli_volume_ls(struct cli *c);
int cli_volume_inspect(struct cli *c);
int cli_volume_check(struct cli *c);
int cli_volume_scrub(struct cli *c);
int cli_volume_resize(struct cli *c);
int cli_snapshot(struct cli *c);
int cli_snapshot_mount(struct cli *c);
int cli_snapshot_ls(struct cli *c);
int cli_volume_restart_server(struct cli *c);
int cli_volume_export(struct cli *c); /* export.c */
int cli_volume_import(struct cli *c);
int cli_volume_verify(struct cli *c);
int cli_mount(struct cli *c);
int cli_umount(struct cli *c);
int cli_policy_show(struct cli *c);
int cli_policy_rule(struct cli *c);
int cli_policy_remove(struct cli *c);
int cli_why(struct cli *c);
int cli_audit(struct cli *c);
int cli_audit_verify(struct cli *c);

#endif
