/*
 * coffer.c - the command line: the table of commands, which also makes the usage texts, and main().
 *
 * 1. A command is found by its words alone; options may stand anywhere after them, --root, --json and --help anywhere.
 * 2. What the table does not name is refused before anything is done.
 * 3. coffer holds no key: a passphrase or key file passes through it in guarded memory, into a pipe (secret.c).
 */
#include "fs/cli/cli.h"

#include "fs/base/secmem.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const struct cli_command commands[] = {
    {"init",
     "",
     "make the keystore; prints the recovery key once",
     cli_init,
     {{"--key-file", "F", false}, {"--passphrase", NULL, false}}},
    {"up",
     "",
     "start the daemons by hand (where no systemd units do)",
     cli_up,
     {{"--plugin-socket", "PATH", false}, {"--engine-root", "DIR", false}, {"--engine-socket", "PATH", false}}},
    {"down", "", "unmount what nobody uses and stop the daemons", cli_down, {{"--force", NULL, false}}},
    {"unlock",
     "",
     "open the keystore",
     cli_unlock,
     {{"--key-file", "F", false}, {"--passphrase", NULL, false}, {"--recovery", NULL, false}}},
    {"lock", "", "wipe all keys; mounted volumes refuse until unlocked", cli_simple, {{0}}},
    {"status", "", "what runs and what is open", cli_status, {{0}}},
    {"volume create",
     "NAME",
     "make a volume",
     cli_volume_create,
     {{"--size", "10G", false},
      {"--block", "4k|8k|16k", false},
      {"--profile", "general|database", false},
      {"--allow", "RULE", true},
      {"--deny", "RULE", true},
      {"--uid", "N", false},
      {"--gid", "N", false},
      {"--mode", "M", false},
      {"--strict", NULL, false}}},
    {"volume ls", "", "all volumes", cli_volume_ls, {{0}}},
    {"volume inspect", "NAME", "everything about one volume", cli_volume_inspect, {{0}}},
    {"volume rm", "NAME", "destroy a volume's key and its files", cli_simple, {{0}}},
    {"volume check",
     "NAME",
     "walk the whole volume and report damage; --data reads all content; --repair (unmounted) drops what is damaged",
     cli_volume_check,
     {{"--data", NULL, false}, {"--repair", NULL, false}}},
    {"volume scrub",
     "NAME",
     "read and authenticate all of a mounted volume, slowly, in the background; damage goes to the audit log",
     cli_volume_scrub,
     {{"--rate", "20M", false}}},
    {"volume restart-server",
     "[NAME]",
     "have a newly started server go on with a mount in use, or with all of them: after an upgrade",
     cli_volume_restart_server,
     {{"--all", NULL, false}}},
    {"volume export",
     "NAME",
     "write a volume, in use or not, or a snapshot of it, as one sealed stream to standard output; with --since only "
     "what "
     "changed after that snapshot",
     cli_volume_export,
     {{"--key-file", "F", false},
      {"--passphrase", NULL, false},
      {"--snapshot", "SNAPSHOT", false},
      {"--since", "SNAPSHOT", false}}},
    {"volume import",
     "NAME",
     "make a new volume of an export on standard input, and of increments of it, the oldest first",
     cli_volume_import,
     {{"--key-file", "F", false},
      {"--passphrase", NULL, false},
      {"--increment", "FILE", true},
      {"--size", "10G", false},
      {"--block", "4k|8k|16k", false},
      {"--allow", "RULE", true},
      {"--deny", "RULE", true}}},
    {"volume verify",
     "",
     "read an export on standard input to its end and authenticate all of it (needs no daemon)",
     cli_volume_verify,
     {{"--key-file", "F", false}, {"--passphrase", NULL, false}, {"--increment", "FILE", true}}},
    {"volume resize", "NAME SIZE", "change how large a volume may grow", cli_volume_resize, {{0}}},
    {"volume snapshot create", "NAME SNAPSHOT", "keep the state of now, while the volume goes on", cli_snapshot, {{0}}},
    {"volume snapshot ls", "NAME", "list what is kept", cli_snapshot_ls, {{0}}},
    {"volume snapshot mount",
     "NAME SNAPSHOT DIR",
     "mount a state that is kept, read-only, for whom the volume's rules allow; `coffer umount DIR` undoes it",
     cli_snapshot_mount,
     {{0}}},
    {"volume snapshot rm", "NAME SNAPSHOT", "forget a state; its space becomes free", cli_snapshot, {{0}}},
    {"volume accept-rollback",
     "NAME",
     "let the next mount take the files as they are, though they are older than what was seen",
     cli_simple,
     {{0}}},
    {"mount", "NAME DIR", "mount without Docker; needs a rule that fits, such as uid:0", cli_mount, {{0}}},
    {"umount", "DIR", "undo mount", cli_umount, {{0}}},
    {"policy show", "NAME", "a volume's rules", cli_policy_show, {{0}}},
    {"policy allow", "NAME RULE", "add a rule that allows", cli_policy_rule, {{0}}},
    {"policy deny", "NAME RULE", "add a rule that denies (deny wins)", cli_policy_rule, {{0}}},
    {"policy remove", "NAME allow|deny RULE", "take a rule away", cli_policy_remove, {{0}}},
    {"why",
     "NAME",
     "explain what process N may do with a volume",
     cli_why,
     {{"--pid", "N", false}, {"--write", NULL, false}}},
    {"audit", "", "print the audit log", cli_audit, {{"--follow", NULL, false}, {"--since", "T", false}}},
    {"audit verify", "", "check the audit log's chain of hashes", cli_audit_verify, {{0}}},
};

/* --- errors and usage --- */

static int say(int code, const char *hint, const char *fmt, va_list ap)
{
    char line[1024];

    vsnprintf(line, sizeof(line), fmt, ap);
    for (char *p = line; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7f)
            *p = '?'; /* an argument's newline: a failure is told in one line */
    }
    fflush(stdout);
    fprintf(stderr, "coffer: %s%s\n", line, hint);
    return code;
}

int cli_fail(const char *fmt, ...)
{
    va_list ap;
    int rc;

    va_start(ap, fmt);
    rc = say(CLI_FAILED, "", fmt, ap);
    va_end(ap);
    return rc;
}

int cli_usage(const struct cli *c, const char *fmt, ...)
{
    char *hint =
        c->command ? xasprintf(": see `coffer %s --help`", c->command->words) : xstrdup(": see `coffer --help`");
    va_list ap;
    int rc;

    va_start(ap, fmt);
    rc = say(CLI_USAGE, hint, fmt, ap);
    va_end(ap);
    free(hint);
    return rc;
}

static void print_usage(const struct cli_command *cmd)
{
    printf("coffer %s%s%s", cmd->words, *cmd->operands ? " " : "", cmd->operands);
    for (const struct cli_option *o = cmd->options; o < cmd->options + CLI_OPTIONS_MAX && o->name; o++)
        printf(" [%s%s%s]%s", o->name, o->arg ? " " : "", o->arg ? o->arg : "", o->many ? "..." : "");
    putchar('\n');
}

static int print_help(const struct cli_command *cmd)
{
    if (cmd) {
        printf("usage: ");
        print_usage(cmd);
        printf("  %s\n", cmd->help);
        return CLI_OK;
    }
    printf("usage: coffer COMMAND ... [--json] [--root DIR]\n\n");
    for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
        printf("  ");
        print_usage(&commands[i]);
        printf("      %s\n", commands[i].help);
    }
    printf("\nRULE: selectors joined by commas: attached, container:NAME, image:REF, image-id:sha256:..., "
           "label:KEY=VALUE,\n"
           "uid:N, ro. Sizes: 512M, 10G, 1T. T: 10m, 2h, 3d, 2025-01-31[T12:00:00[Z]].\n"
           "--root DIR, or COFFER_ROOT, moves state and sockets below DIR; else /var/lib/coffer and /run/coffer.\n"
           "Exit status: 0 done, 1 refused or failed, 2 usage.\n");
    return CLI_OK;
}

/* --- parsing --- */

/* How many of argv's words name this command: all of its words, or 0. */
static int words_match(const struct cli_command *cmd, char **argv, int argc)
{
    const char *w = cmd->words;
    int n = 0;

    while (*w) {
        size_t len = strcspn(w, " ");

        if (n >= argc || strlen(argv[n]) != len || strncmp(argv[n], w, len))
            return 0;
        w += len + (w[len] == ' ');
        n++;
    }
    return n;
}

/* The command with the most words that match. */
static int find_command(struct cli *c, char **argv, int argc)
{
    int best = 0;

    for (size_t i = 0; i < ARRAY_LEN(commands); i++) {
        int n = words_match(&commands[i], argv, argc);

        if (n > best) {
            best = n;
            c->command = &commands[i];
        }
    }
    return best;
}

static int count_words(const char *s)
{
    int n = *s != 0;

    for (; *s; s++)
        n += *s == ' ';
    return n;
}

const char *cli_get(const struct cli *c, const char *name)
{
    for (size_t i = 0; i < c->ngiven; i++)
        if (!strcmp(c->given[i].option->name, name))
            return c->given[i].value ? c->given[i].value : "";
    return NULL;
}

static const struct cli_option *find_option(const struct cli_command *cmd, const char *arg, size_t len)
{
    for (const struct cli_option *o = cmd->options; o < cmd->options + CLI_OPTIONS_MAX && o->name; o++)
        if (strlen(o->name) == len && !strncmp(o->name, arg, len))
            return o;
    return NULL;
}

/* One option at argv[*i], perhaps with its value after it. */
static int take_option(struct cli *c, char **argv, int argc, int *i)
{
    const char *arg = argv[*i], *value = strchr(arg, '=');
    size_t len = value ? (size_t)(value - arg) : strlen(arg);
    const struct cli_option *o = find_option(c->command, arg, len);

    if (!o)
        return cli_usage(c, "unknown option %.*s", (int)MIN(len, 64), arg);
    if (!o->many && cli_get(c, o->name))
        return cli_usage(c, "%s is given twice", o->name);
    if (value && !o->arg)
        return cli_usage(c, "%s takes no value", o->name);
    if (value)
        value++;
    else if (o->arg && ++*i >= argc)
        return cli_usage(c, "%s needs a value (%s)", o->name, o->arg);
    else if (o->arg)
        value = argv[*i];
    if (c->ngiven == CLI_VALUES_MAX)
        return cli_usage(c, "too many options");
    c->given[c->ngiven++] = (struct cli_value){o, value};
    return CLI_OK;
}

static int take_arguments(struct cli *c, char **argv, int argc)
{
    int want = count_words(c->command->operands), need = want - (strchr(c->command->operands, '[') != NULL);
    bool only_operands = false;

    for (int i = 0; i < argc; i++) {
        int rc = CLI_OK;

        if (!only_operands && !strcmp(argv[i], "--"))
            only_operands = true;
        else if (!only_operands && argv[i][0] == '-' && argv[i][1])
            rc = take_option(c, argv, argc, &i);
        else if (c->operands == want)
            rc = cli_usage(c, "unexpected argument \"%.64s\"", argv[i]);
        else
            c->operand[c->operands++] = argv[i];
        if (rc)
            return rc;
    }
    if (c->operands < need)
        return cli_usage(c, "missing argument (%s)", c->command->operands);
    return CLI_OK;
}

/* Takes --root, --json, --help and --version out of argv, wherever they stand before a "--". */
static int take_global(struct cli *c, char **argv, int *argc, const char **ret_root, bool *ret_help)
{
    int out = 0;

    for (int i = 0; i < *argc; i++) {
        if (!strcmp(argv[i], "--")) {
            while (i < *argc)
                argv[out++] = argv[i++];
        } else if (!strcmp(argv[i], "--json")) {
            c->json = true;
        } else if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            *ret_help = true;
        } else if (!strncmp(argv[i], "--root=", 7)) {
            *ret_root = argv[i] + 7;
        } else if (!strcmp(argv[i], "--root")) {
            if (++i >= *argc)
                return cli_usage(c, "--root needs a value (DIR)");
            *ret_root = argv[i];
        } else {
            argv[out++] = argv[i];
        }
    }
    *argc = out;
    return CLI_OK;
}

static int set_directories(struct cli *c, const char *root)
{
    char *cwd = NULL;

    c->plain = !root || !*root;
    if (c->plain) {
        c->state = xstrdup("/var/lib/coffer");
        c->run = xstrdup("/run/coffer");
        return CLI_OK;
    }
    if (*root != '/') {
        cwd = getcwd(NULL, 0);
        if (!cwd)
            return cli_fail("the working directory is gone: give --root as an absolute path");
    }
    c->state = cwd ? xasprintf("%s/%s", cwd, root) : xstrdup(root);
    for (size_t n = strlen(c->state); n > 1 && c->state[n - 1] == '/'; n--)
        c->state[n - 1] = 0;
    c->run = xasprintf("%s/run", c->state);
    free(cwd);
    return CLI_OK;
}

int main(int argc, char **argv)
{
    struct cli c = {0};
    const char *root = getenv("COFFER_ROOT");
    bool help = false;
    int rc, words;

    argc--, argv++;
    signal(SIGPIPE, SIG_IGN);
    if (secmem_init() < 0)
        return cli_fail("cannot protect this process's memory (sodium_init, RLIMIT_CORE or PR_SET_DUMPABLE failed)");
    rc = take_global(&c, argv, &argc, &root, &help);
    if (rc)
        return rc;
    words = find_command(&c, argv, argc);
    if (help || (argc == 1 && !strcmp(argv[0], "help")))
        return print_help(c.command);
    if (!words)
        return argc ? cli_usage(&c, "unknown command \"%.64s\"", argv[0]) : cli_usage(&c, "a command is needed");
    rc = take_arguments(&c, argv + words, argc - words);
    if (rc == CLI_OK)
        rc = set_directories(&c, root);
    if (rc == CLI_OK)
        rc = c.command->run(&c);
    if (rc == CLI_OK && (fflush(stdout) || ferror(stdout)))
        rc = cli_fail("cannot write to standard output: %s", strerror(errno));
    free(c.state);
    free(c.run);
    return rc;
}
