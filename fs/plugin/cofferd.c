/*
 * cofferd.c - the root daemon's beginning and end: arguments, directories, users, and the order in which the parts start.
 *
 *   cofferd [--root DIR] [--plugin-socket PATH] [--engine-root DIR] [--engine-socket PATH]
 *           [--takeover-timeout SECONDS] [--foreground]
 *
 * Order of reading: registry (what is known) - supervisor (coffer-keyd) - broker - fsproc (one coffer-fs) - mounts -
 * volumes - http (the engine's side) - control (the operator's side).
 *
 * Invariants:
 *  1. One cofferd per run directory: it holds a lock on <run>/cofferd.lock as long as it lives.
 *  2. It holds no key and reads no secret; descriptors that carry one are passed on.
 *  3. Its end by SIGTERM or kill ends nothing else: mounts, coffer-fs and coffer-keyd go on, and the next cofferd finds
 *     them again. Only the control command `down` stops everything.
 *  4. The mounts are known again before a socket answers.
 */
#include "common.h"

#include "control.h"
#include "http.h"
#include "mounts.h"
#include "notify.h"
#include "registry.h"
#include "supervisor.h"
#include "volumes.h"
#include "fs/base/secmem.h"

#include <curl/curl.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define TAKEOVER_S     60 /* DESIGN section 5 */
#define TAKEOVER_S_MAX 3600

static int usage(FILE *to)
{
    fputs("usage: cofferd [--root DIR] [--plugin-socket PATH] [--engine-root DIR] [--engine-socket PATH]\n"
          "               [--takeover-timeout SECONDS] [--foreground]\n"
          "\n"
          "The root daemon of coffer; `coffer up` starts it. It logs to standard error.\n"
          "  --root DIR            state in DIR, sockets and mounts in DIR/run (default /var/lib/coffer, /run/coffer)\n"
          "  --plugin-socket PATH  where container engines find the volume driver\n"
          "  --engine-root DIR     the engine's data (default /var/lib/docker)\n"
          "  --engine-socket PATH  the engine's API (default /var/run/docker.sock)\n"
          "  --takeover-timeout S  a mount whose server died, and that no other takes over in that time, is aborted "
          "(60)\n"
          "  --foreground          stay in the terminal's session\n",
          to);
    return to == stdout ? 0 : 2;
}

/* --- directories --- */

static int make_parents(const char *path, mode_t mode)
{
    char *copy = xstrdup(path);
    int rc = 0;

    for (char *p = copy + 1; *p && rc == 0; p++) {
        if (*p != '/')
            continue;
        *p = 0;
        if (mkdir(copy, mode) < 0 && errno != EEXIST)
            rc = -errno;
        *p = '/';
    }
    free(copy);
    return rc;
}

/* A directory, made with mode when it is missing, of owner and writable by nobody else. */
static int open_directory(const char *path, mode_t mode, uid_t uid, gid_t gid, struct why *why)
{
    struct stat st;
    bool made;
    int fd;

    if (make_parents(path, 0755) < 0)
        return why_set(why, -errno, "cannot make %s: %s", path, strerror(errno));
    made = mkdir(path, mode) == 0;
    fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return why_set(why, -errno, "cannot open %s: %s", path, strerror(errno));
    if (made && (fchown(fd, uid, gid) < 0 || fchmod(fd, mode) < 0)) {
        int rc = why_set(why, -errno, "cannot set owner and mode of %s: %s", path, strerror(errno));

        close_quiet(fd);
        return rc;
    }
    if (fstat(fd, &st) < 0 || st.st_uid != uid || (st.st_mode & 022)) {
        close_quiet(fd);
        return why_set(why, -EPERM, "%s must belong to uid %u and be writable by nobody else", path, (unsigned)uid);
    }
    return fd;
}

static int open_directories(struct why *why)
{
    struct plugin_config *c = &plugin_config;
    char *keystore = xasprintf("%s/keystore", c->state_dir), *volumes = xasprintf("%s/volumes", c->state_dir);
    int run, rc = 0;

    c->state_fd = open_directory(c->state_dir, 0700, 0, 0, why);
    run = c->state_fd < 0 ? -1 : open_directory(c->run_dir, 0700, 0, 0, why);
    c->mnt_fd = run < 0 ? -1 : open_directory(c->mnt_dir, 0700, 0, 0, why);
    c->volumes_fd = c->mnt_fd < 0 ? -1 : open_directory(volumes, 0700, 0, 0, why);
    c->keystore_fd = c->volumes_fd < 0 ? -1 : open_directory(keystore, 0700, c->keyd_uid, c->keyd_gid, why);
    if (c->keystore_fd < 0)
        rc = -EPERM;
    /* Whatever its mode was: nobody but root passes through to the mounts. */
    else if (fchmod(c->mnt_fd, 0700) < 0)
        rc = why_set(why, -errno, "cannot set the mode of %s: %s", c->mnt_dir, strerror(errno));
    close_quiet(run);
    free(keystore);
    free(volumes);
    return rc;
}

/* --- configuration --- */

static int find_user(const char *name, uid_t *ret_uid, gid_t *ret_gid, struct why *why)
{
    struct passwd *pw = getpwnam(name);

    if (!pw)
        return why_set(why, -ENOENT, "there is no user %s: run scripts/install --users", name);
    if (pw->pw_uid == 0)
        return why_set(why, -EPERM, "user %s must not be root", name);
    *ret_uid = pw->pw_uid;
    *ret_gid = pw->pw_gid;
    return 0;
}

static int open_programs(struct why *why)
{
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
    char *slash;

    if (n <= 0)
        return why_set(why, -errno, "cannot find the directory of cofferd: %s", strerror(errno));
    path[n] = 0;
    slash = strrchr(path, '/');
    slash[slash == path] = 0;
    plugin_config.programs_fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (plugin_config.programs_fd < 0)
        return why_set(why, -errno, "cannot open %s: %s", path, strerror(errno));
    return 0;
}

static void read_line(const char *path, char *out, size_t n)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? 0 : read_upto(fd, out, n - 1);

    out[MAX(got, 0)] = 0;
    out[strcspn(out, "\n")] = 0;
    close_quiet(fd);
}

static void read_link(const char *path, char *out, size_t n)
{
    ssize_t got = readlink(path, out, n - 1);

    out[MAX(got, 0)] = 0;
}

static int set_driver(struct why *why)
{
    const char *base = strrchr(plugin_config.plugin_socket, '/');
    size_t n;

    base = base ? base + 1 : plugin_config.plugin_socket;
    n = strlen(base);
    if (n > 5 && !strcmp(base + n - 5, ".sock"))
        n -= 5;
    if (n == 0 || n >= sizeof(plugin_config.driver))
        return why_set(why, -EINVAL,
                       "the plugin socket's file name is the driver's name: 1 to 63 characters and .sock");
    memcpy(plugin_config.driver, base, n);
    plugin_config.driver[n] = 0;
    return volume_name_ok(plugin_config.driver)
               ? 0
               : why_set(why, -EINVAL, "\"%s\" is no name for a volume driver", plugin_config.driver);
}

/* An absolute path; what does not begin with / is taken from here. */
static char *absolute(const char *path)
{
    char cwd[PATH_MAX];

    if (path[0] == '/' || !getcwd(cwd, sizeof(cwd)))
        return xstrdup(path);
    return xasprintf("%s/%s", cwd, path);
}

/* <dir> without symbolic links, made if it is missing: what /proc/self/mountinfo will show. */
static char *resolve_made(const char *dir, struct why *why)
{
    char *path = absolute(dir), *real = NULL;

    if (make_parents(path, 0755) == 0 && (mkdir(path, 0700) == 0 || errno == EEXIST))
        real = realpath(path, NULL);
    if (!real)
        why_set(why, -errno, "cannot make %s: %s", path, strerror(errno));
    free(path);
    return real;
}

static int configure(const char *root, const char *plugin_socket, struct why *why)
{
    struct plugin_config *c = &plugin_config;
    char *run_dir = root ? xasprintf("%s/run", root) : xstrdup("/run/coffer");
    int rc;

    c->state_dir = resolve_made(root ? root : "/var/lib/coffer", why);
    c->run_dir = c->state_dir ? resolve_made(run_dir, why) : NULL;
    free(run_dir);
    if (!c->run_dir)
        return -EINVAL;
    c->mnt_dir = xasprintf("%s/mnt", c->run_dir);
    c->control_socket = xasprintf("%s/cofferd.sock", c->run_dir);
    c->keyd_socket = xasprintf("%s/keyd.sock", c->run_dir);
    c->plugin_socket = plugin_socket ? absolute(plugin_socket)
                       : root        ? xasprintf("%s/plugin.sock", c->run_dir)
                                     : xstrdup("/run/docker/plugins/coffer.sock");
    read_line("/proc/sys/kernel/random/boot_id", c->boot_id, sizeof(c->boot_id));
    read_link("/proc/self/ns/mnt", c->mnt_ns, sizeof(c->mnt_ns));
    read_link("/proc/self/ns/pid", c->pid_ns, sizeof(c->pid_ns));
    if (strlen(c->keyd_socket) >= sizeof(((struct sockaddr_un *)0)->sun_path) - 5)
        return why_set(why, -ENAMETOOLONG,
                       "the paths of the sockets are longer than 107 bytes: choose a shorter --root");
    rc = set_driver(why);
    if (rc == 0)
        rc = find_user("coffer-keyd", &c->keyd_uid, &c->keyd_gid, why);
    if (rc == 0)
        rc = find_user("coffer-fs", &c->fs_uid, &c->fs_gid, why);
    if (rc == 0)
        rc = open_programs(why);
    if (rc == 0)
        rc = open_directories(why);
    if (rc == 0 && make_parents(c->plugin_socket, 0755) < 0)
        rc = why_set(why, -errno, "cannot make the directory of %s: %s", c->plugin_socket, strerror(errno));
    return rc;
}

/* Takes the lock for as long as we live (invariant 1). */
static int take_lock(struct why *why)
{
    char *path = xasprintf("%s/cofferd.lock", plugin_config.run_dir);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600), rc = 0;

    if (fd < 0)
        rc = why_set(why, -errno, "cannot open %s: %s", path, strerror(errno));
    else if (flock(fd, LOCK_EX | LOCK_NB) < 0)
        rc = why_set(why, -errno, "another cofferd runs with %s", plugin_config.run_dir);
    free(path);
    return rc;
}

/* --- life --- */

static void agent_up(void)
{
    volumes_reconcile();
    mounts_agent_up();
}

static void quit(void)
{
    kill(getpid(), SIGTERM);
}

static int start(struct why *why)
{
    int rc = registry_load(why);

    if (rc < 0) {
        char text[AGENT_TEXT_MAX];

        memcpy(text, why->text, sizeof(text));
        return why_set(
            why, rc,
            "%s/cofferd.json: %.400s: mend it, or unmount all volumes and move it away (unlock finds them again)",
            plugin_config.state_dir, text);
    }
    mounts_adopt();
    rc = supervisor_start(agent_up);
    if (rc < 0)
        return why_set(why, rc, "cannot start a thread: %s", strerror(-rc));
    rc = plugin_http_start(why);
    return rc < 0 ? rc : control_serve_start(quit, why);
}

static void raise_limits(void)
{
    struct rlimit rl;

    if (getrlimit(RLIMIT_NOFILE, &rl) == 0) {
        rl.rlim_cur = rl.rlim_max;
        setrlimit(RLIMIT_NOFILE, &rl);
    }
}

static int wait_for_end(const sigset_t *set)
{
    int sig;

    while (sigwait(set, &sig) == 0) {
        if (sig == SIGTERM || sig == SIGINT) {
            log_info("ends; mounts and coffer-keyd go on");
            /* Threads may be in the middle of anything; what must survive is on disk already. */
            _exit(0);
        }
    }
    return 1;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"root", required_argument, NULL, 'r'},
                                            {"plugin-socket", required_argument, NULL, 'p'},
                                            {"engine-root", required_argument, NULL, 'e'},
                                            {"engine-socket", required_argument, NULL, 's'},
                                            {"takeover-timeout", required_argument, NULL, 't'},
                                            {"foreground", no_argument, NULL, 'f'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    const char *root = NULL, *plugin_socket = NULL;
    struct why why = {""};
    bool foreground = false;
    sigset_t set;
    int opt;

    log_program = "cofferd";
    notify_begin();
    plugin_config.takeover_s = TAKEOVER_S;
    plugin_config.engine_root = "/var/lib/docker";
    plugin_config.engine_socket = "/var/run/docker.sock";
    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (opt == 'r')
            root = optarg;
        else if (opt == 'p')
            plugin_socket = optarg;
        else if (opt == 'e')
            plugin_config.engine_root = absolute(optarg);
        else if (opt == 's')
            plugin_config.engine_socket = absolute(optarg);
        else if (opt == 't' && (plugin_config.takeover_s = atoi(optarg)) > 0 &&
                 plugin_config.takeover_s <= TAKEOVER_S_MAX)
            continue;
        else if (opt == 'f')
            foreground = true;
        else
            return usage(opt == 'h' ? stdout : stderr);
    }
    if (optind < argc)
        return usage(stderr);
    if (geteuid() != 0) {
        log_err("needs root");
        return 1;
    }
    umask(077);
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    /* Blocked before any thread starts, so that only sigwait() takes them. */
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (!foreground)
        setsid();
    raise_limits();
    if (secmem_init() < 0 || curl_global_init(CURL_GLOBAL_DEFAULT) != 0) {
        log_err("cannot start: libsodium or libcurl fails");
        return 1;
    }
    json_object_seed(0);
    if (configure(root, plugin_socket, &why) < 0 || take_lock(&why) < 0 || start(&why) < 0) {
        log_err("%s", why.text);
        return 1;
    }
    log_info("up; driver %s at %s", plugin_config.driver, plugin_config.plugin_socket);
    notify_ready();
    return wait_for_end(&set);
}
