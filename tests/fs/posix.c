/*
 * posix.c - what POSIX and Linux promise of a filesystem, asked of a directory on it. Depends on nothing of coffer.
 *
 *     posix DIR [--long] [[--except] GROUP]...        as root; --list names the groups
 *
 * The rules are those that pjdfstest covers (modes, owners, types, sticky directories, errors of each call, times), and
 * what Linux adds: xattrs, ACLs, O_TMPFILE, fallocate, holes, copy_file_range, mappings, locks, directories that change
 * while they are read. Each failing check is one line with what was expected and what came; then "N checks, M failed".
 * Exit status 1 if one failed, 2 for usage.
 *
 *  1. Nothing in here holds for one filesystem only: ext4 passes it entirely. Owners and permissions are checked by
 *     processes of other uids: they need to be able to use the mount (see posix.sh).
 *  2. Each group runs in a process and a directory of its own, and is ended after a time limit.
 *  3. Times are compared after a pause longer than the kernel's clock tick.
 */
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wstringop-overread" /* EFAULT is what is tested */
#pragma GCC diagnostic ignored "-Wformat-truncation" /* names too long, likewise */
#endif
#pragma GCC diagnostic ignored "-Wmissing-field-initializers" /* struct watch: the test sets the rest */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <grp.h>
#include <limits.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define U1      65534 /* two users and their groups, and a group that both are in besides */
#define U2      65533
#define GX      65532
#define MIB     (1l << 20)
#define TICK_US 12000
#define N(a)    (sizeof(a) / sizeof((a)[0]))

/* --- checks --- */

static struct totals {
    atomic_int checks, failed;
} * totals; /* shared by all processes */
static const char *group = "";
static char context[256]; /* which row of a table is being tried */
static bool arg_long;

__attribute__((format(printf, 1, 2))) static void in(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(context, sizeof(context), fmt, ap);
    va_end(ap);
}

__attribute__((format(printf, 4, 5))) static bool check(int line, const char *what, bool good, const char *fmt, ...)
{
    char text[600];
    va_list ap;

    atomic_fetch_add(&totals->checks, 1);
    if (good)
        return true;
    atomic_fetch_add(&totals->failed, 1);
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    printf("%s:%d: %s%s%.200s: %s\n", group, line, context, context[0] ? ": " : "", what, text);
    return false;
}

static const char *name_of(int err)
{
    const char *s = err ? strerrorname_np(err) : "success";

    return s ? s : "?";
}

static long expect_err(int line, const char *what, int err, int other, long ret)
{
    int got = ret < 0 ? errno : 0;

    check(line, what, got == err || got == other, "expected %s%s%s, got %s", name_of(err), other != err ? " or " : "",
          other != err ? name_of(other) : "", name_of(got));
    return ret;
}

static void expect_value(int line, const char *what, long long want, long long got, bool octal)
{
    check(line, what, want == got, octal ? "expected %llo, got %llo" : "expected %lld, got %lld", want, got);
}

static void expect_text(int line, const char *what, const char *want, const char *got)
{
    check(line, what, !strcmp(want, got), "expected \"%.200s\", got \"%.200s\"", want, got);
}

/* E: the call fails with that errno (0: succeeds). E2: or with the other one. Both give what the call returned. */
#define E(err, ...)       expect_err(__LINE__, #__VA_ARGS__, err, err, (errno = 0, (long)(__VA_ARGS__)))
#define E2(err, alt, ...) expect_err(__LINE__, #__VA_ARGS__, err, alt, (errno = 0, (long)(__VA_ARGS__)))
/* IS: the integer; MODE: the octal number; STR: the text; OK: whether it is true. */
#define IS(want, ...)     expect_value(__LINE__, #__VA_ARGS__, (long long)(want), (long long)(__VA_ARGS__), false)
#define MODE(want, ...)   expect_value(__LINE__, #__VA_ARGS__, (long long)(want), (long long)(__VA_ARGS__), true)
#define STR(want, ...)    expect_text(__LINE__, #__VA_ARGS__, want, __VA_ARGS__)
#define OK(...)           check(__LINE__, #__VA_ARGS__, __VA_ARGS__, "is not so")

/* --- other users --- */

static int as_begin(uid_t uid, gid_t gid)
{
    pid_t pid = fork();
    gid_t more = GX;
    int status;

    if (pid == 0) {
        if (setgroups(1, &more) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)) {
            perror("posix: setresuid");
            _exit(9);
        }
        return 1;
    }
    if (waitpid(pid, &status, 0) != pid || status)
        check(__LINE__, "a process of another user", false, "ended with status %#x", (unsigned)status);
    return 0;
}

/* AS(uid, gid) statement: runs it in a process of that user. */
#define AS(uid, gid) for (int as_ = as_begin(uid, gid); as_; as_ = (_exit(0), 0))

/* Runs fn in a child; gives its exit status, or 128 + the signal. */
static int in_child(void (*fn)(void))
{
    pid_t pid = fork();
    int status;

    if (pid == 0) {
        fn();
        _exit(0);
    }
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* --- looking --- */

static struct stat look(const char *path)
{
    struct stat st;

    memset(&st, 0xff, sizeof(st));
    if (lstat(path, &st) < 0)
        memset(&st, 0xff, sizeof(st));
    return st;
}

static int mode_of(const char *path)
{
    return (int)(look(path).st_mode & 07777);
}

static bool exists(const char *path)
{
    struct stat st;

    return lstat(path, &st) == 0;
}

static long long ns_of(struct timespec t)
{
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void nap(void)
{
    usleep(TICK_US);
}

/* --- times: CHANGES(call, {path, "mc"}...): the named times of each path move forward, the others stay --- */

struct watch {
    const char *path, *letters;
    struct stat before;
};

static void watch_begin(struct watch *w, size_t n)
{
    for (size_t i = 0; i < n; i++)
        w[i].before = look(w[i].path);
    nap();
}

static void watch_end(int line, const char *what, const struct watch *w, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct stat now = look(w[i].path);
        long long m = ns_of(now.st_mtim) - ns_of(w[i].before.st_mtim);
        long long c = ns_of(now.st_ctim) - ns_of(w[i].before.st_ctim);
        bool want_m = strchr(w[i].letters, 'm'), want_c = strchr(w[i].letters, 'c');

        check(line, what, want_m ? m > 0 : m == 0, "mtime of %s: expected %s, got %+lld ns", w[i].path,
              want_m ? "a later one" : "no change", m);
        check(line, what, want_c ? c > 0 : c == 0, "ctime of %s: expected %s, got %+lld ns", w[i].path,
              want_c ? "a later one" : "no change", c);
    }
}

#define CHANGES_E(err, call, ...)                                                                                      \
    do {                                                                                                               \
        struct watch w_[] = {__VA_ARGS__};                                                                             \
        watch_begin(w_, N(w_));                                                                                        \
        expect_err(__LINE__, #call, err, err, (errno = 0, (long)(call)));                                              \
        watch_end(__LINE__, #call, w_, N(w_));                                                                         \
    } while (0)
#define CHANGES(call, ...) CHANGES_E(0, call, __VA_ARGS__)

/* --- making things --- */

static int touch(const char *path, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);

    return fd < 0 ? -1 : close(fd);
}

/* A file with that content, owner and mode. */
static void put(const char *path, const char *text, uid_t uid, gid_t gid, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text) || fchown(fd, uid, gid) || fchmod(fd, mode))
        check(__LINE__, path, false, "cannot make it: %s", strerror(errno));
    close(fd);
}

static void put_dir(const char *path, uid_t uid, gid_t gid, mode_t mode)
{
    if (mkdir(path, 0700) || chown(path, uid, gid) || chmod(path, mode))
        check(__LINE__, path, false, "cannot make it: %s", strerror(errno));
}

/* The first 255 bytes of a file, or the name of the error. */
static const char *get(const char *path)
{
    static char buf[256];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, buf, sizeof(buf) - 1);

    if (n < 0)
        snprintf(buf, sizeof(buf), "%s", name_of(errno));
    else
        buf[n] = 0;
    if (fd >= 0)
        close(fd);
    return buf;
}

/* Closes what was opened and says 0; -1 stays with its errno. */
static int opened(int fd)
{
    return fd < 0 ? -1 : close(fd);
}

enum kind { FILE_, DIR_, FIFO_, CHAR_, BLOCK_, SOCKET_, LINK_, KINDS };

/* makedev(3) of a major below 4096, as a constant. */
#define DEV(major, minor) ((dev_t)(major) << 8 | ((minor)&0xff) | (dev_t)((minor) & ~0xff) << 12)

static const struct {
    const char *name;
    mode_t type;
    dev_t dev;
} kinds[KINDS] = {{"file", S_IFREG, 0},
                  {"dir", S_IFDIR, 0},
                  {"fifo", S_IFIFO, 0},
                  {"char", S_IFCHR, DEV(0xfff, 0xfffff)},
                  {"block", S_IFBLK, DEV(7, 300)},
                  {"socket", S_IFSOCK, 0},
                  {"symlink", S_IFLNK, 0}};

static int make(enum kind k, const char *path, mode_t mode)
{
    if (k == FILE_)
        return touch(path, mode);
    if (k == DIR_)
        return mkdir(path, mode);
    if (k == LINK_)
        return symlink("nowhere", path);
    return mknod(path, kinds[k].type | mode, kinds[k].dev);
}

static int unmake(enum kind k, const char *path)
{
    return k == DIR_ ? rmdir(path) : unlink(path);
}

/* --- errors that every call has in common --- */

#define NEEDS   1 /* the last component must exist */
#define FOLLOWS 2 /* ... and is followed */
#define MAKES   4 /* the last component must not exist; the directory is written to */
#define REMOVES 8

#define OPS(X)                                                                                                         \
    X(stat, NEEDS | FOLLOWS, stat(p, &(struct stat){0}))                                                               \
    X(lstat, NEEDS, lstat(p, &(struct stat){0}))                                                                       \
    X(statfs, NEEDS | FOLLOWS, statfs(p, &(struct statfs){0}))                                                         \
    X(access, NEEDS | FOLLOWS, access(p, F_OK))                                                                        \
    X(chmod, NEEDS | FOLLOWS, chmod(p, 0644))                                                                          \
    X(chown, NEEDS | FOLLOWS, chown(p, 0, 0))                                                                          \
    X(lchown, NEEDS, lchown(p, 0, 0))                                                                                  \
    X(truncate, NEEDS | FOLLOWS, truncate(p, 0))                                                                       \
    X(utimensat, NEEDS | FOLLOWS, utimensat(AT_FDCWD, p, NULL, 0))                                                     \
    X(open, NEEDS | FOLLOWS, opened(open(p, O_RDONLY)))                                                                \
    X(opendir, NEEDS | FOLLOWS, opened(open(p, O_RDONLY | O_DIRECTORY)))                                               \
    X(chdir, NEEDS | FOLLOWS, chdir(p))                                                                                \
    X(readlink, NEEDS, readlink(p, (char[8]){0}, 8))                                                                   \
    X(getxattr, NEEDS | FOLLOWS, getxattr(p, "user.x", NULL, 0))                                                       \
    X(setxattr, NEEDS | FOLLOWS, setxattr(p, "user.x", "", 0, 0))                                                      \
    X(listxattr, NEEDS | FOLLOWS, listxattr(p, NULL, 0))                                                               \
    X(removexattr, NEEDS | FOLLOWS, removexattr(p, "user.x"))                                                          \
    X(link_from, NEEDS, link(p, "made"))                                                                               \
    X(rename_from, NEEDS | REMOVES, rename(p, "made"))                                                                 \
    X(unlink, NEEDS | REMOVES, unlink(p))                                                                              \
    X(rmdir, NEEDS | REMOVES, rmdir(p))                                                                                \
    X(link_to, MAKES, link("file", p))                                                                                 \
    X(rename_to, MAKES, rename("spare", p))                                                                            \
    X(mkdir, MAKES, mkdir(p, 0755))                                                                                    \
    X(mkfifo, MAKES, mkfifo(p, 0644))                                                                                  \
    X(mknod, MAKES, mknod(p, S_IFSOCK | 0644, 0))                                                                      \
    X(symlink, MAKES, symlink("x", p))                                                                                 \
    X(create, MAKES | FOLLOWS, opened(open(p, O_WRONLY | O_CREAT, 0644)))                                              \
    X(create_excl, MAKES, opened(open(p, O_WRONLY | O_CREAT | O_EXCL, 0644)))

#define OP_FUNCTION(name, flags, call)                                                                                 \
    static int op_##name(const char *p)                                                                                \
    {                                                                                                                  \
        return (call) < 0 ? -1 : 0;                                                                                    \
    }
#define OP_ROW(name, flags, call) {#name, flags, op_##name},
OPS(OP_FUNCTION)

static const struct op {
    const char *name;
    int flags;
    int (*fn)(const char *path);
} ops[] = {OPS(OP_ROW)};

/* Tries all ops that have one of the flags. */
static void each_op(int line, int flags, const char *path, int err)
{
    for (size_t i = 0; i < N(ops); i++) {
        if (!(ops[i].flags & flags))
            continue;
        in("%s of %.40s", ops[i].name, err == EFAULT ? "no memory" : path);
        errno = 0;
        expect_err(line, "the path", err, err, ops[i].fn(path));
    }
    in("%s", "");
}
#define EACH(flags, path, err) each_op(__LINE__, flags, path, err)
#define ALL                    (NEEDS | MAKES)

static void g_paths(void)
{
    char name[300], path[PATH_MAX + 8], full[300];

    put("file", "x", U1, U1, 0644);
    put("spare", "x", 0, 0, 0644);
    put_dir("dir", 0, 0, 0755);
    E(0, symlink("loop2", "loop1"));
    E(0, symlink("loop1", "loop2"));
    EACH(ALL, "file/x", ENOTDIR);
    EACH(ALL, "missing/x", ENOENT);
    EACH(ALL, "", ENOENT);
    EACH(NEEDS, "missing", ENOENT);
    EACH(ALL, "loop1/x", ELOOP);
    EACH(FOLLOWS, "loop1", ELOOP);
    EACH(ALL, (const char *)1, EFAULT);

    memset(name, 'n', sizeof(name));
    name[256] = 0;
    EACH(ALL, name, ENAMETOOLONG);
    snprintf(full, sizeof(full), "dir/%s", name);
    EACH(ALL, full, ENAMETOOLONG);
    name[255] = 0;
    EACH(NEEDS, name, ENOENT);
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s with a name of 255 bytes", kinds[k].name);
        E(0, make(k, name, 0644));
        E(EEXIST, make(k, name, 0644));
        E(0, unmake(k, name));
    }
    in("%s", "");
    for (size_t i = 0; i < PATH_MAX; i += 2)
        memcpy(path + i, "./", 2);
    memcpy(path + PATH_MAX - 6, "/file", 6); /* 4095 bytes, the longest */
    E(0, stat(path, &(struct stat){0}));
    memcpy(path + PATH_MAX - 5, "/file", 6);
    EACH(ALL, path, ENAMETOOLONG);

    /* Every byte but / and NUL is a name's, and names are not text: case and form are kept apart. */
    for (int c = 1; c < 256; c++) {
        char one[3] = {(char)c, '~', 0};

        if (c == '/')
            continue;
        in("name with byte %d", c);
        E(0, touch(one, 0644));
        E(EEXIST, touch(one, 0644));
    }
    in("%s", "");
    IS(254 + 5, ({
           DIR *d = opendir(".");
           int n = -2;

           while (readdir(d))
               n++;
           closedir(d);
           n;
       }));

    /* Slashes at the end. */
    E(0, mkdir("new/", 0755));
    E(0, rmdir("new/"));
    E(0, stat("dir///", &(struct stat){0}));
    E(ENOTDIR, stat("file/", &(struct stat){0}));
    E(ENOTDIR, unlink("file/"));
    E(ENOTDIR, rmdir("file/"));
    E(ENOTDIR, opened(open("file/", O_RDONLY)));
    E(EISDIR, opened(open("newfile/", O_WRONLY | O_CREAT, 0644)));
    E(ENOTDIR, rename("file/", "f2"));
    E(ENOENT, symlink("x", "missing/y"));
    E(ENOENT, symlink("", "y"));

    /* Searching needs x on every directory, making and removing needs w on the last one. */
    put_dir("nox", 0, 0, 0766);
    put("nox/f", "x", U1, U1, 0666);
    put_dir("ro", 0, 0, 0755);
    put("ro/f", "x", U1, U1, 0666);
    E(0, chmod(".", 0777));
    AS(U1, U1)
    {
        put("file1", "", U1, U1, 0644);
        EACH(ALL, "nox/f", EACCES);
        EACH(ALL, "nox/new", EACCES);
        EACH(MAKES & ~FOLLOWS, "ro/new", EACCES);
        E(EACCES, link("file1", "ro/new"));
        E(EACCES, rename("file1", "ro/new"));
        E(EACCES, unlink("ro/f"));
        E(EACCES, rename("ro/f", "made"));
        E(EACCES, opened(open("ro/new", O_WRONLY | O_CREAT, 0644)));
        E(0, opened(open("ro/f", O_WRONLY | O_CREAT, 0644)));
        E(ENOENT, unlink("ro/missing"));
        E(ENOENT, rmdir("ro/missing"));
    }
}

/* --- making things --- */

static void g_create(void)
{
    for (enum kind k = 0; k < KINDS; k++) {
        struct stat st, parent;

        in("%s", kinds[k].name);
        umask(0);
        put_dir("d", U1, U1, 0777);
        CHANGES(make(k, "d/a", 0751), {"d", "mc"});
        st = look("d/a");
        parent = look("d");
        MODE(kinds[k].type | (k == LINK_ ? 0777 : 0751), st.st_mode);
        IS(0, st.st_uid);
        IS(0, st.st_gid);
        IS(kinds[k].dev, k == CHAR_ || k == BLOCK_ ? st.st_rdev : 0);
        OK(k == DIR_ ? st.st_nlink == 1 || st.st_nlink == 2 : st.st_nlink == 1);
        OK(k == DIR_ || st.st_size == (k == LINK_ ? 7 : 0));
        OK(llabs(ns_of(st.st_mtim) - ns_of(parent.st_mtim)) < TICK_US * 1000);
        OK(ns_of(st.st_mtim) == ns_of(st.st_ctim) && ns_of(st.st_atim) <= ns_of(st.st_ctim));
        IS(st.st_dev, parent.st_dev);
        for (enum kind j = 0; j < KINDS; j++)
            CHANGES_E(EEXIST, make(j, "d/a", 0644), {"d", ""}, {"d/a", ""});
        IS(st.st_ino, look("d/a").st_ino);
        CHANGES(unmake(k, "d/a"), {"d", "mc"});
        E(ENOENT, unmake(k, "d/a"));
        if (k != LINK_) {
            umask(027);
            E(0, make(k, "d/b", 07777 & (k == DIR_ ? 01777 : 0777)));
            MODE(k == DIR_ ? 01750 : 0750, mode_of("d/b"));
            E(0, unmake(k, "d/b"));
            umask(0);
        }
        AS(U2, U2)
        {
            E(k == CHAR_ || k == BLOCK_ ? EPERM : 0, make(k, "d/c", 0666));
            if (k != CHAR_ && k != BLOCK_) {
                IS(U2, look("d/c").st_uid);
                IS(U2, look("d/c").st_gid);
                E(0, unmake(k, "d/c"));
            }
        }
        /* A set-group-ID directory gives its group, and to directories the bit. */
        E(0, chown("d", 0, U1));
        E(0, chmod("d", 02777));
        E(0, make(k, "d/e", 0755));
        IS(U1, look("d/e").st_gid);
        MODE(k == DIR_ ? 02755 : k == LINK_ ? 0777 : 0755, mode_of("d/e"));
        E(0, unmake(k, "d/e"));
        if (k == FILE_)
            AS(U2, U2)
            {
                E(0, touch("d/f", 02775)); /* U2 is not in the group, and must not make a program that is */
                MODE(0775, mode_of("d/f"));
                IS(U1, look("d/f").st_gid);
                E(0, unlink("d/f"));
            }
        E(0, rmdir("d"));
    }
    in("%s", "");
    E(0, mkdir("d", 0755));
    E(EEXIST, mkdir(".", 0755));
    E(EEXIST, mkdir("..", 0755));
    E(EEXIST, mkdir("d/.", 0755));
    E(EPERM, mknod("x", S_IFDIR | 0755, 0));
    E(EINVAL, mknod("x", S_IFLNK | 0755, 0));
    E(0, mknod("m", 0640, 0)); /* no type: a regular file */
    MODE(S_IFREG | 0640, look("m").st_mode);

    /* What they are for. */
    E(0, mkfifo("fifo", 0600));
    E(ENXIO, opened(open("fifo", O_WRONLY | O_NONBLOCK)));
    int r = (int)E(0, open("fifo", O_RDONLY | O_NONBLOCK)), w = (int)E(0, open("fifo", O_WRONLY | O_NONBLOCK));
    char buf[8] = "";

    IS(3, write(w, "abc", 3));
    IS(3, read(r, buf, sizeof(buf)));
    STR("abc", buf);
    close(r);
    close(w);
    struct sockaddr_un a = {.sun_family = AF_UNIX, .sun_path = "sock"};
    int s = socket(AF_UNIX, SOCK_STREAM, 0), c = socket(AF_UNIX, SOCK_STREAM, 0);

    E(0, bind(s, (struct sockaddr *)&a, sizeof(a)));
    E(EADDRINUSE, bind(c, (struct sockaddr *)&a, sizeof(a)));
    E(0, listen(s, 1));
    E(0, connect(c, (struct sockaddr *)&a, sizeof(a)));
    MODE(S_IFSOCK, look("sock").st_mode & S_IFMT);
    E(ENXIO, opened(open("sock", O_RDONLY)));
    close(s);
    close(c);
}

static void g_symlink(void)
{
    char target[PATH_MAX + 1], buf[PATH_MAX + 1];

    memset(target, 't', sizeof(target));
    for (int n = 1; n < PATH_MAX; n = n < 4000 ? n * 3 + 1 : n + 19) {
        in("%d bytes", n);
        target[n] = 0;
        E(0, symlink(target, "l"));
        IS(n, look("l").st_size);
        IS(n, readlink("l", buf, sizeof(buf)));
        OK(!memcmp(buf, target, (size_t)n));
        E(0, unlink("l"));
        target[n] = 't';
    }
    in("%s", "");
    target[PATH_MAX - 1] = 0;
    E(0, symlink(target, "l"));
    IS(PATH_MAX - 1, readlink("l", buf, sizeof(buf)));
    IS(10, readlink("l", buf, 10));
    target[PATH_MAX - 1] = 't';
    target[PATH_MAX] = 0;
    E(ENAMETOOLONG, symlink(target, "m"));
    put("f", "content", 0, 0, 0644);
    E(EINVAL, readlink("f", buf, 10));
    E(EINVAL, readlink(".", buf, 10));
    E(0, symlink("f", "s"));
    STR("content", get("s"));
    E(0, mkdir("d", 0755));
    E(0, symlink("d", "sd"));
    E(0, touch("sd/in", 0644));
    OK(exists("d/in"));
    E(ENOTDIR, rmdir("sd"));
    E(ELOOP, opened(open("s", O_RDONLY | O_NOFOLLOW)));
    E(ENOTDIR, opened(open("sd", O_RDONLY | O_DIRECTORY | O_NOFOLLOW)));
    CHANGES(lchown("s", U1, U2), {"s", "c"}, {"f", ""});
    IS(U1, look("s").st_uid);
    IS(0, look("f").st_uid);
    CHANGES(chmod("s", 0600), {"s", ""}, {"f", "c"});
    MODE(0777, mode_of("s"));
    E(0, unlink("s"));
    OK(exists("f"));
    /* 40 links in a row are followed, 41 are not. */
    E(0, symlink("f", "c0"));
    for (int i = 1; i < 41; i++) {
        char from[8], to[8];

        snprintf(from, sizeof(from), "c%d", i - 1);
        snprintf(to, sizeof(to), "c%d", i);
        E(0, symlink(from, to));
    }
    STR("content", get("c39"));
    STR("ELOOP", get("c40"));
}

/* --- modes and owners --- */

static void g_chmod(void)
{
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s", kinds[k].name);
        if (k == LINK_)
            continue;
        E(0, make(k, "a", 0644));
        for (mode_t m = 0; m <= 07777; m += 0111)
            if (E(0, chmod("a", m)) == 0)
                MODE(kinds[k].type | m, look("a").st_mode);
        E(0, symlink("a", "s"));
        E(0, chmod("s", 0604));
        MODE(0604, mode_of("a"));
        CHANGES(chmod("a", 0640), {"a", "c"}, {".", ""});
        E(0, unlink("s"));
        E(0, unmake(k, "a"));
    }
    in("%s", "");
    put("f", "", U1, GX, 0600);
    int fd = open("f", O_RDONLY);

    CHANGES(fchmod(fd, 0642), {"f", "c"});
    MODE(0642, mode_of("f"));
    close(fd);
    AS(U1, U1)
    {
        E(0, chmod("f", 02755)); /* GX is one of its groups */
        MODE(02755, mode_of("f"));
        E(0, chmod("f", 07777));
        MODE(07777, mode_of("f"));
    }
    AS(U2, U2)
    {
        CHANGES_E(EPERM, chmod("f", 0666), {"f", ""});
    }
    MODE(07777, mode_of("f"));
    E(0, chown("f", U1, U2)); /* a group that U1 is not in */
    E(0, chmod("f", 0644));
    AS(U1, U1)
    {
        E(0, chmod("f", 02755));
        MODE(0755, mode_of("f"));
    }
    put_dir("d", U1, U1, 0755);
    AS(U1, U1)
    {
        E(0, chmod("d", 03777));
        MODE(03777, mode_of("d"));
    }
}

static void g_chown(void)
{
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s", kinds[k].name);
        E(0, make(k, "a", 0644));
        CHANGES(lchown("a", 12, 34), {"a", "c"}, {".", ""});
        E(0, lchown("a", (uid_t)-1, 56));
        IS(12, look("a").st_uid);
        IS(56, look("a").st_gid);
        E(0, lchown("a", 78, (gid_t)-1));
        IS(78, look("a").st_uid);
        IS(56, look("a").st_gid);
        E(0, lchown("a", 4294967294u, 4294967294u));
        IS(4294967294u, look("a").st_uid);
        IS(4294967294u, look("a").st_gid);
        E(0, unmake(k, "a"));
    }
    in("%s", "");
    put("f", "", U1, U1, 0644);
    E(0, symlink("f", "s"));
    E(0, chown("s", U1, GX));
    IS(GX, look("f").st_gid);
    IS(0, look("s").st_gid);
    AS(U1, U1)
    {
        E(0, chown("f", (uid_t)-1, U1));
        E(0, chown("f", U1, GX));
        CHANGES_E(EPERM, chown("f", U2, (gid_t)-1), {"f", ""});
        CHANGES_E(EPERM, chown("f", (uid_t)-1, U2), {"f", ""});
    }
    AS(U2, U2)
    {
        E(EPERM, chown("f", U2, U2));
        E(EPERM, chown("f", (uid_t)-1, GX));
    }
    IS(U1, look("f").st_uid);
    /* Whoever changes the owner of a program takes its set-ID bits away; a directory keeps them. */
    static const struct {
        mode_t before, after;
    } rows[] = {{06755, 0755}, {04755, 0755}, {02755, 0755}, {02710, 0710}, {04644, 0644}, {01755, 01755}};

    for (size_t i = 0; i < N(rows); i++) {
        in("mode %o", rows[i].before);
        E(0, chown("f", U1, U1));
        E(0, chmod("f", rows[i].before));
        E(0, chown("f", U2, U2));
        MODE(rows[i].after, mode_of("f"));
        E(0, chown("f", U1, U1));
        E(0, chmod("f", rows[i].before));
        AS(U1, U1)
        {
            E(0, chown("f", (uid_t)-1, GX));
            MODE(rows[i].after, mode_of("f"));
        }
    }
    in("%s", "");
    E(0, mkfifo("fifo", 0644));
    E(0, chown("fifo", U1, U1));
    E(0, chmod("fifo", 06755));
    AS(U1, U1)
    {
        E(0, chown("fifo", (uid_t)-1, GX));
        MODE(0755, mode_of("fifo"));
    }
    put_dir("d", U1, U1, 06775);
    E(0, chown("d", U2, U2));
    MODE(06775, mode_of("d"));
    int fd = open("f", O_RDONLY);

    E(0, fchown(fd, 5, 6));
    IS(5, look("f").st_uid);
    IS(6, look("f").st_gid);
    close(fd);
}

/* --- sizes --- */

static void g_truncate(void)
{
    char buf[64];
    int fd, rd;

    put("f", "0123456789", U1, U1, 0644);
    CHANGES(truncate("f", 4), {"f", "mc"});
    STR("0123", get("f"));
    CHANGES(truncate("f", 8), {"f", "mc"});
    IS(8, look("f").st_size);
    fd = (int)E(0, open("f", O_RDWR));
    rd = (int)E(0, open("f", O_RDONLY));
    IS(8, pread(fd, buf, sizeof(buf), 0));
    OK(!memcmp(buf, "0123\0\0\0\0", 8));
    for (long size = 1; size < 40 * MIB; size = size * 5 + 3) {
        in("size %ld", size);
        E(0, ftruncate(fd, size));
        IS(size, look("f").st_size);
        IS(1, pread(rd, buf, 8, size - 1));
        IS(0, buf[0] & ~'0');
        IS(0, pread(rd, buf, 8, size));
    }
    in("%s", "");
    CHANGES(ftruncate(fd, 3), {"f", "mc"});
    IS(3, pread(rd, buf, sizeof(buf), 0));
    E(EINVAL, ftruncate(rd, 1));
    E(EINVAL, ftruncate(fd, -1));
    E(EINVAL, truncate("f", -1));
    E2(EFBIG, EINVAL, truncate("f", LLONG_MAX));
    E(EISDIR, truncate(".", 0));
    E(0, mkfifo("fifo", 0644));
    E(EINVAL, truncate("fifo", 0));
    IS(3, look("f").st_size);
    AS(U2, U2)
    {
        CHANGES_E(EACCES, truncate("f", 0), {"f", ""});
    }
    /* A page cut in the middle must not bring its old bytes back. */
    memset(buf, 'x', sizeof(buf));
    for (int i = 0; i < 200; i++)
        IS(64, pwrite(fd, buf, 64, i * 64));
    E(0, ftruncate(fd, 5000));
    E(0, ftruncate(fd, 12000));
    IS(64, pread(fd, buf, 64, 4968));
    OK(!memcmp(buf, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 32) && buf[31] == 'x' && buf[32] == 0 && buf[63] == 0);
    IS(1, pread(fd, buf, 1, 11999));
    IS(0, buf[0]);
    /* Who is not privileged loses the set-ID bits with a truncation. */
    E(0, chmod("f", 06777));
    AS(U2, U2)
    {
        E(0, truncate("f", 1));
        MODE(0777, mode_of("f"));
    }
    E(0, chmod("f", 06777));
    AS(U2, U2)
    {
        E(0, opened(open("f", O_WRONLY | O_TRUNC)));
        MODE(0777, mode_of("f"));
    }
    close(fd);
    close(rd);
}

static void fill(int fd, off_t at, size_t n, int c)
{
    char *buf = malloc(n);

    memset(buf, c, n);
    IS(n, pwrite(fd, buf, n, at));
    free(buf);
}

/* The bytes from at on: "aaa000bbb" as runs, "a3 0*3 b3". */
static const char *runs(int fd, off_t at, size_t n)
{
    static char text[300];
    char *buf = malloc(n);
    ssize_t got = pread(fd, buf, n, at);
    size_t k = 0;

    text[0] = 0;
    for (ssize_t i = 0, j; i < got; i = j) {
        for (j = i; j < got && buf[j] == buf[i]; j++)
            ;
        if (k < sizeof(text) - 40)
            k += (size_t)snprintf(text + k, sizeof(text) - k, "%s%c%zd", k ? " " : "", buf[i] ? buf[i] : '0', j - i);
    }
    free(buf);
    return text;
}

static void g_fallocate(void)
{
    int fd = (int)E(0, open("f", O_RDWR | O_CREAT, 0644)), rd = open("f", O_RDONLY);

    CHANGES(fallocate(fd, 0, 0, 100000), {"f", "mc"}, {".", ""});
    IS(100000, look("f").st_size);
    STR("0100000", runs(fd, 0, 200000));
    fill(fd, 0, 300000, 'a');
    E(0, posix_fallocate(fd, 0, 200000));
    STR("a300000", runs(fd, 0, 400000));
    E(0, posix_fallocate(fd, 300000, 5));
    STR("a300000 05", runs(fd, 0, 400000));
    E(0, fallocate(fd, FALLOC_FL_KEEP_SIZE, 300000, 2 * MIB));
    IS(300005, look("f").st_size);
    E(0, ftruncate(fd, 300010));
    STR("a300000 010", runs(fd, 0, 400000));
    /* Holes: whole blocks, parts of them, past the end. */
    E(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536, 65536));
    STR("a65536 065536 a168928 010", runs(fd, 0, 400000));
    E(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 10, 5));
    STR("a10 05 a65521", runs(fd, 0, 65536));
    E(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 150001, 50001));
    STR("a18929 050001 a99998 010", runs(fd, 131072, 400000));
    E(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 300005, MIB));
    IS(300010, look("f").st_size);
    E(EOPNOTSUPP, fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 1));
    fill(fd, 0, 300000, 'b');
    E(0, fallocate(fd, FALLOC_FL_ZERO_RANGE, 1000, 100000));
    STR("b1000 0100000 b199000 010", runs(fd, 0, 400000));
    E(0, fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 299999, 100000));
    IS(300010, look("f").st_size);
    STR("b9 011", runs(fd, 299990, 400000));
    E(0, fallocate(fd, FALLOC_FL_ZERO_RANGE, 300000, 100000));
    IS(400000, look("f").st_size);
    STR("0100001", runs(fd, 299999, 400000));
    E(EINVAL, fallocate(fd, 0, 0, 0));
    E(EINVAL, fallocate(fd, 0, -1, 10));
    E(EINVAL, fallocate(fd, 0, 10, -1));
    E(EFBIG, fallocate(fd, 0, LLONG_MAX - 10, 10));
    E(EBADF, fallocate(rd, 0, 0, 10));
    IS(EBADF, posix_fallocate(rd, 0, 10));
    IS(EINVAL, posix_fallocate(fd, 0, 0));
    CHANGES(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 8192), {"f", "mc"});
    CHANGES(fallocate(fd, 0, 0, 500000), {"f", "mc"});
    E(0, chown("f", U1, U1));
    E(0, chmod("f", 06777));
    AS(U2, U2)
    {
        int w = open("f", O_WRONLY);

        E(0, fallocate(w, 0, 0, 600000));
        MODE(0777, mode_of("f"));
    }
    close(fd);
    close(rd);
}

static void g_holes(void)
{
    int fd = (int)E(0, open("f", O_RDWR | O_CREAT, 0644));

    E(ENXIO, lseek(fd, 0, SEEK_DATA));
    E(0, ftruncate(fd, 8 * MIB));
    fill(fd, MIB, MIB, 'x');
    fill(fd, 4 * MIB, 65536, 'y');
    /* Once as it is just written, once from the disk. */
    for (int synced = 0; synced < 2; synced++) {
        in("%s", synced ? "synced" : "just written");
        IS(MIB, lseek(fd, 0, SEEK_DATA));
        IS(0, lseek(fd, 0, SEEK_HOLE));
        IS(MIB + 5, lseek(fd, MIB + 5, SEEK_DATA));
        IS(2 * MIB, lseek(fd, MIB, SEEK_HOLE));
        IS(2 * MIB, lseek(fd, 2 * MIB - 1, SEEK_HOLE));
        IS(2 * MIB + 7, lseek(fd, 2 * MIB + 7, SEEK_HOLE));
        IS(4 * MIB, lseek(fd, 2 * MIB, SEEK_DATA));
        IS(4 * MIB + 65536, lseek(fd, 4 * MIB + 1, SEEK_HOLE));
        E(ENXIO, lseek(fd, 5 * MIB, SEEK_DATA));
        IS(5 * MIB, lseek(fd, 5 * MIB, SEEK_HOLE));
        E(ENXIO, lseek(fd, 8 * MIB, SEEK_HOLE));
        E(ENXIO, lseek(fd, 9 * MIB, SEEK_DATA));
        E(0, fsync(fd));
    }
    in("%s", "");
    E(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, MIB + 512 * 1024, MIB));
    IS(MIB + 512 * 1024, lseek(fd, MIB, SEEK_HOLE));
    IS(4 * MIB, lseek(fd, MIB + 512 * 1024, SEEK_DATA));
    E(0, ftruncate(fd, 4 * MIB + 100));
    IS(4 * MIB + 100, lseek(fd, 4 * MIB, SEEK_HOLE));
    /* To nearly 16 TiB. */
    off_t far = (16ll << 40) - 2 * MIB;

    IS(3, pwrite(fd, "end", 3, far));
    IS(far + 3, look("f").st_size);
    STR("05 e1 n1 d1", runs(fd, far - 5, 100));
    STR("0100", runs(fd, 9ll << 40, 100));
    E(0, fsync(fd));
    E(0, close(fd));
    fd = open("f", O_RDWR);
    STR("05 e1 n1 d1", runs(fd, far - 5, 100));
    IS(far, lseek(fd, 5 * MIB, SEEK_DATA) / 65536 * 65536);
    OK(look("f").st_blocks < 100 * MIB / 512);
    E(0, ftruncate(fd, 5 * MIB));
    E(ENXIO, lseek(fd, 5 * MIB - 1, SEEK_DATA));
    E(0, ftruncate(fd, far + 10));
    STR("013", runs(fd, far - 3, 100));
    E(0, close(fd));
    E(0, unlink("f"));
}

/* --- links and removal --- */

static void g_link(void)
{
    struct stat st;

    E(0, mkdir("d", 0777));
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s", kinds[k].name);
        if (k == DIR_)
            continue;
        E(0, make(k, "a", 0644));
        CHANGES(link("a", "d/b"), {"a", "c"}, {"d", "mc"}, {".", ""});
        st = look("d/b");
        IS(look("a").st_ino, st.st_ino);
        IS(2, st.st_nlink);
        MODE(look("a").st_mode, st.st_mode);
        E(0, lchown("d/b", 7, 8));
        IS(7, look("a").st_uid);
        for (enum kind j = 0; j < KINDS; j++) {
            E(0, make(j, "t", 0644));
            CHANGES_E(EEXIST, link("a", "t"), {"a", ""}, {".", ""});
            E(0, unmake(j, "t"));
        }
        CHANGES(unlink("a"), {"d/b", "c"}, {".", "mc"});
        IS(1, look("d/b").st_nlink);
        E(0, unlink("d/b"));
    }
    in("%s", "");
    put("f", "x", 0, 0, 0644);
    E(EPERM, link("d", "e"));
    if (look("/dev/shm").st_dev != look("f").st_dev)
        E(EXDEV, link("f", "/dev/shm/posix-test-link"));
    E(ENOENT, link("f", ""));
    E(EEXIST, link("f", "f"));
    E(EEXIST, link("f", "."));
    E(0, symlink("f", "s"));
    E(0, link("s", "s2"));
    MODE(S_IFLNK, look("s2").st_mode & S_IFMT);
    E(0, linkat(AT_FDCWD, "s", AT_FDCWD, "f2", AT_SYMLINK_FOLLOW));
    IS(look("f").st_ino, look("f2").st_ino);
    E(EINVAL, linkat(AT_FDCWD, "s", AT_FDCWD, "f3", 1));
    for (int i = 0; i < 500; i++) {
        char name[16];

        snprintf(name, sizeof(name), "d/%d", i);
        if (E(0, link("f", name)) < 0)
            break;
    }
    IS(502, look("f").st_nlink);
    /* What has names is written through all of them. */
    int fd = open("d/77", O_WRONLY | O_TRUNC);

    IS(3, write(fd, "all", 3));
    close(fd);
    STR("all", get("f"));
    put_dir("ro", 0, 0, 0755);
    put("own", "", U1, U1, 0644);
    AS(U1, U1)
    {
        E(EACCES, link("own", "ro/x"));
    }
}

static void g_unlink(void)
{
    char buf[16] = "";
    int fd;

    E(0, mkdir("d", 0755));
    E(0, mkdir("d/full", 0755));
    E(0, touch("d/full/x", 0644));
    E(EISDIR, unlink("d"));
    E(EISDIR, unlinkat(AT_FDCWD, "d", 0));
    E(ENOTEMPTY, rmdir("d/full"));
    E(ENOTEMPTY, rmdir("d/full/.."));
    E(EINVAL, rmdir("d/full/."));
    E(EINVAL, unlinkat(AT_FDCWD, "d", 1));
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s", kinds[k].name);
        if (k != DIR_) {
            E(0, make(k, "d/a", 0644));
            E(ENOTDIR, rmdir("d/a"));
            CHANGES(unlink("d/a"), {"d", "mc"});
            E(ENOENT, unlink("d/a"));
        }
    }
    in("%s", "");
    E(0, unlink("d/full/x"));
    CHANGES(rmdir("d/full"), {"d", "mc"});
    E(ENOENT, rmdir("d/full"));

    /* What is open lives on. */
    put("f", "content", 0, 0, 0644);
    fd = (int)E(0, open("f", O_RDWR));
    E(0, unlink("f"));
    struct stat st;

    E(0, fstat(fd, &st));
    IS(0, st.st_nlink);
    IS(7, pread(fd, buf, sizeof(buf), 0));
    STR("content", buf);
    fill(fd, 0, 3 * MIB, 'z');
    E(0, fsync(fd));
    STR("z3145728", runs(fd, 0, 4 * MIB));
    E(0, ftruncate(fd, 2));
    E(0, fchmod(fd, 0600));
    E(0, fchown(fd, 3, 4));
    E(0, fsetxattr(fd, "user.x", "y", 1, 0));
    IS(1, fgetxattr(fd, "user.x", buf, sizeof(buf)));
    E(0, fstat(fd, &st));
    IS(2, st.st_size);
    IS(3, st.st_uid);
    E(0, touch("f", 0644)); /* the name is free */
    OK(look("f").st_ino != st.st_ino);
    char *m = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    E(0, close(fd));
    STR("zz", m);
    m[1] = '!';
    E(0, msync(m, 4096, MS_SYNC));
    STR("z!", m);
    munmap(m, 4096);

    /* A directory that is gone, from inside. */
    E(0, mkdir("gone", 0755));
    fd = (int)E(0, open("gone", O_RDONLY | O_DIRECTORY));
    E(0, rmdir("gone"));
    E(ENOENT, mkdirat(fd, "x", 0755));
    E(ENOENT, openat(fd, "x", O_WRONLY | O_CREAT, 0644));
    E(ENOENT, symlinkat("x", fd, "y"));
    E(ENOENT, syscall(SYS_getdents64, fd, (char[1024]){0}, 1024));
    E(0, fstat(fd, &st));
    IS(0, st.st_nlink);
    E(0, close(fd));
}

/* --- sticky directories, and what an owner may --- */

static void g_sticky(void)
{
    static const uid_t who[] = {0, U1, U2};

    E(0, chmod(".", 0777));
    for (size_t i = 0; i < N(who); i++)
        for (size_t j = 0; j < N(who); j++)
            for (int sticky = 0; sticky < 2; sticky++) {
                int err = !sticky || who[i] == U1 || who[j] == U1 ? 0 : EPERM;

                in("%s directory of %u, things of %u", sticky ? "sticky" : "open", who[i], who[j]);
                put_dir("d", who[i], who[i], sticky ? 01777 : 0777);
                for (int k = 0; k < 2; k++) {
                    put(k ? "d/f2" : "d/f", "", who[j], who[j], 0666);
                    put(k ? "d/v2" : "d/v", "", who[j], who[j], 0666);
                    put(k ? "d/w2" : "d/w", "", who[j], who[j], 0666);
                    put_dir(k ? "d/e2" : "d/e", who[j], who[j], 0777);
                    put_dir(k ? "d/g2" : "d/g", who[j], who[j], 0777);
                }
                put_dir("o", U1, U1, 0777);
                AS(U1, U1)
                {
                    put("d/mine", "", U1, U1, 0644);
                    put_dir("d/minedir", U1, U1, 0755);
                    E(err, unlink("d/f"));
                    E(err, rmdir("d/e"));
                    E(err, rename("d/f2", "d/x"));
                    E(err, rename("d/e2", "o/y"));
                    E(err, rename("d/mine", "d/v"));
                    E(err, rename("d/minedir", "d/g"));
                    E(err, renameat2(AT_FDCWD, "o", AT_FDCWD, "d/w", RENAME_EXCHANGE));
                    E(0, opened(open("d/v2", O_WRONLY))); /* writing to it is another matter */
                }
                E(0, system("rm -rf d o"));
            }
    in("%s", "");
    /* A directory moves to another parent only if its .. may be written. */
    put_dir("p", U1, U1, 0777);
    put_dir("q", U1, U1, 0777);
    put_dir("p/other", U2, U2, 0755);
    AS(U1, U1)
    {
        E(EACCES, rename("p/other", "q/other"));
        E(0, rename("p/other", "p/renamed"));
    }
}

/* --- rename --- */

static int rename2(const char *from, const char *to, unsigned flags)
{
    return renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
}

static void g_rename(void)
{
    struct stat a, b;

    E(0, mkdir("s", 0755));
    E(0, mkdir("t", 0755));
    for (enum kind k = 0; k < KINDS; k++)
        for (enum kind j = 0; j < KINDS; j++) {
            int err = k == DIR_ ? (j == DIR_ ? 0 : ENOTDIR) : (j == DIR_ ? EISDIR : 0);

            in("%s over %s", kinds[k].name, kinds[j].name);
            E(0, make(k, "s/a", 0644));
            E(0, make(j, "t/b", 0644));
            a = look("s/a");
            b = look("t/b");
            E(EEXIST, rename2("s/a", "t/b", RENAME_NOREPLACE));
            E(0, rename2("s/a", "t/b", RENAME_EXCHANGE));
            IS(b.st_ino, look("s/a").st_ino);
            IS(a.st_ino, look("t/b").st_ino);
            MODE(b.st_mode, look("s/a").st_mode);
            CHANGES(rename2("s/a", "t/b", RENAME_EXCHANGE), {"s", "mc"}, {"t", "mc"});
            OK(ns_of(look("s/a").st_ctim) > ns_of(a.st_ctim) && ns_of(look("t/b").st_ctim) > ns_of(b.st_ctim));
            IS(a.st_ino, look("s/a").st_ino);
            E(err, rename("s/a", "t/b"));
            IS(err ? b.st_ino : a.st_ino, look("t/b").st_ino);
            IS(err, exists("s/a") ? err : 0);
            if (err)
                E(0, unmake(k, "s/a"));
            E(0, unmake(err ? j : k, "t/b"));
            if (j > 0)
                continue;
            E(0, make(k, "s/a", 0644));
            CHANGES(rename("s/a", "t/c"), {"s", "mc"}, {"t", "mc"});
            CHANGES(rename2("t/c", "t/d", RENAME_NOREPLACE), {"s", ""}, {"t", "mc"});
            IS(k != DIR_ ? 1 : look("t/d").st_nlink, look("t/d").st_nlink);
            E(ENOENT, rename2("t/d", "t/x", RENAME_EXCHANGE));
            E(0, rename("t/d", "s/a"));
            E(0, unmake(k, "s/a"));
        }
    in("%s", "");
    put("f", "new", 0, 0, 0644);
    put("g", "old", 0, 0, 0644);
    E(0, rename("f", "g"));
    STR("new", get("g"));
    E(EINVAL, rename2("g", "x", RENAME_NOREPLACE | RENAME_EXCHANGE));
    E(EINVAL, rename2("g", "x", 1u << 30));
    E(EXDEV, rename("g", "/proc/x"));
    /* The same file under two names: nothing happens. */
    E(0, link("g", "h"));
    E(0, rename("g", "h"));
    IS(2, look("g").st_nlink);
    E(0, rename("g", "g"));
    E(0, unlink("h"));
    /* The file that is replaced loses a link. */
    put("f", "1", 0, 0, 0644);
    E(0, link("f", "f2"));
    CHANGES(rename("g", "f"), {"f2", "c"}, {".", "mc"});
    IS(1, look("f2").st_nlink);
    int fd = open("f2", O_RDONLY);

    E(0, rename("f", "f2"));
    char c = 0;

    IS(1, pread(fd, &c, 1, 0));
    IS('1', c);
    E(0, fstat(fd, &a));
    IS(0, a.st_nlink);
    close(fd);

    /* Directories. */
    E(0, mkdir("t/full", 0755));
    E(0, touch("t/full/x", 0644));
    E(0, mkdir("s/m", 0755));
    E(0, touch("s/m/in", 0644));
    E2(ENOTEMPTY, EEXIST, rename("s/m", "t/full"));
    E(EINVAL, rename("s", "s/m"));
    E(EINVAL, rename("s", "s/m/n"));
    E2(ENOTEMPTY, EEXIST, rename("s/m", "s"));
    E(EINVAL, rename2("s", "s/m", RENAME_EXCHANGE));
    E(EINVAL, rename2("s/m", "s", RENAME_EXCHANGE));
    E2(EBUSY, EINVAL, rename("s/.", "u"));
    E2(EBUSY, EINVAL, rename("s/m/..", "u"));
    E2(EBUSY, EINVAL, rename("t", "s/."));
    b = look("t");
    E(0, rename("s/m", "t/m"));
    IS(b.st_ino, look("t/m/..").st_ino);
    OK(exists("t/m/in"));
    E(0, rename2("t/m", "s/m2", RENAME_NOREPLACE));
    IS(look("s").st_ino, look("s/m2/..").st_ino);
    E(0, rename2("s/m2", "t/full", RENAME_EXCHANGE));
    OK(exists("t/full/in") && exists("s/m2/x"));
    IS(look("s").st_ino, look("s/m2/..").st_ino);
    /* st_nlink of a directory: 2 and its subdirectories, or always 1. */
    E(0, mkdir("t/n1", 0755));
    E(0, mkdir("t/n2", 0755));
    OK(look("t").st_nlink == 1 || look("t").st_nlink == 2 + 3);
    E(0, rename("t/n1", "s/n1"));
    OK(look("t").st_nlink == 1 || look("t").st_nlink == 2 + 2);
    OK(look("s").st_nlink == 1 || look("s").st_nlink == 2 + 2);
    E(0, rename("t/n2", "s/n1"));
    OK(look("t").st_nlink == 1 || look("t").st_nlink == 2 + 1);
    OK(look("s").st_nlink == 1 || look("s").st_nlink == 2 + 2);
}

static void g_whiteout(void)
{
    for (enum kind k = 0; k < KINDS; k++) {
        in("%s", kinds[k].name);
        E(0, make(k, "a", 0644));
        CHANGES(rename2("a", "b", RENAME_WHITEOUT), {".", "mc"});
        MODE(S_IFCHR, look("a").st_mode & S_IFMT);
        IS(0, look("a").st_rdev);
        MODE(kinds[k].type, look("b").st_mode & S_IFMT);
        E(0, unlink("a"));
        E(0, unmake(k, "b"));
    }
    in("%s", "");
    put("f", "new", 0, 0, 0644);
    put("g", "old", 0, 0, 0644);
    E(0, rename2("f", "g", RENAME_WHITEOUT)); /* over something */
    STR("new", get("g"));
    MODE(S_IFCHR, look("f").st_mode & S_IFMT);
    E(EINVAL, rename2("g", "f", RENAME_WHITEOUT | RENAME_EXCHANGE));
}

/* --- open --- */

static void g_open(void)
{
    /* Permission by class: owner, group, supplementary group, others. */
    static const struct {
        const char *name;
        uid_t uid;
        gid_t gid;
        int shift;
    } classes[] = {{"owner", U1, U2, 6}, {"group", U2, U1, 3}, {"more groups", U2, GX, 3}, {"others", U2, U2, 0}};
    static const struct {
        int flags, bits;
    } ways[] = {{O_RDONLY, 4}, {O_WRONLY, 2}, {O_RDWR, 6}, {O_RDONLY | O_TRUNC, 6}, {O_WRONLY | O_APPEND, 2}};

    E(0, chmod(".", 0777));
    for (size_t i = 0; i < N(classes); i++)
        for (mode_t m = 0; m < 8; m++) {
            in("%s, mode %o", classes[i].name, m);
            /* All other classes have what this one has not. */
            put("p", "x", classes[i].uid, classes[i].gid, (0777 & ~(7u << classes[i].shift)) | m << classes[i].shift);
            AS(U1, U1)
            {
                for (size_t w = 0; w < N(ways); w++)
                    E((ways[w].bits & m) == (mode_t)ways[w].bits ? 0 : EACCES, opened(open("p", ways[w].flags)));
                for (int x = 1; x < 8; x++)
                    E((x & (int)m) == x ? 0 : EACCES, access("p", x));
                E(m & 1 ? 0 : EACCES, faccessat(AT_FDCWD, "p", X_OK, AT_EACCESS));
            }
        }
    put("p", "x", 0, 0, 0);
    E(0, opened(open("p", O_RDWR))); /* root reads and writes all, and executes what somebody may */
    E(EACCES, access("p", X_OK));

    in("%s", "");
    put("f", "content", U1, U1, 0644);
    E(0, mkdir("d", 0755));
    E(0, symlink("missing", "dangling"));
    E(0, symlink("f", "s"));
    E(EEXIST, opened(open("f", O_WRONLY | O_CREAT | O_EXCL, 0644)));
    E(EEXIST, opened(open("s", O_WRONLY | O_CREAT | O_EXCL, 0644)));
    E(EEXIST, opened(open("dangling", O_WRONLY | O_CREAT | O_EXCL, 0644)));
    E(EEXIST, opened(open("d", O_WRONLY | O_CREAT | O_EXCL, 0644)));
    E(ENOENT, opened(open("dangling", O_RDONLY)));
    CHANGES(opened(open("dangling", O_WRONLY | O_CREAT, 0604)), {".", "mc"});
    MODE(0604, mode_of("missing"));
    CHANGES(opened(open("f", O_RDWR | O_CREAT, 0604)), {".", ""}, {"f", ""});
    E(EISDIR, opened(open("d", O_WRONLY)));
    E(EISDIR, opened(open("d", O_RDWR)));
    E(EISDIR, opened(open("d", O_RDONLY | O_TRUNC)));
    E(EISDIR, opened(open("d", O_RDONLY | O_CREAT, 0644)));
    E(ENOTDIR, opened(open("f", O_RDONLY | O_DIRECTORY)));
    E(ELOOP, opened(open("s", O_RDONLY | O_NOFOLLOW)));
    E(0, opened(open("s", O_PATH | O_NOFOLLOW)));
    E(EBADF, openat(9999, "f", O_RDONLY));
    E(ENOTDIR, openat(open("f", O_RDONLY), "f", O_RDONLY));
    CHANGES(opened(open("f", O_WRONLY | O_TRUNC)), {"f", "mc"}, {".", ""});
    IS(0, look("f").st_size);
    int fd = (int)E(0, open("n", O_WRONLY | O_CREAT | O_EXCL, 0)); /* writable by who made it, whatever its mode */

    IS(2, write(fd, "ok", 2));
    close(fd);
    fd = (int)E(0, open("f", O_PATH));
    E(EBADF, write(fd, "x", 1));
    E(EBADF, fchmod(fd, 0600));
    close(fd);
    fd = (int)E(0, open("f", O_RDONLY));
    E(EBADF, write(fd, "x", 1));
    close(fd);
    fd = (int)E(0, open("f", O_WRONLY));
    E(EBADF, read(fd, &(char){0}, 1));
    close(fd);
    fd = (int)E(0, open("d", O_RDONLY));
    E(EISDIR, read(fd, &(char){0}, 1));
    E(0, fsync(fd));
    close(fd);
    for (int i = 0; i < 3; i++) {
        fd = (int)E(0, open("f", O_WRONLY | (i == 0 ? O_SYNC : i == 1 ? O_DSYNC : O_NOATIME)));
        IS(1, write(fd, "x", 1));
        close(fd);
    }
    AS(U2, U2)
    {
        E(0, opened(open("f", O_RDONLY)));
        E(EPERM, opened(open("f", O_RDONLY | O_NOATIME)));
        E(EACCES, opened(open("f", O_RDONLY | O_TRUNC)));
        E(EACCES, opened(open("d/x", O_RDWR | O_CREAT, 0666)));
    }
    put_dir("list", 0, 0, 0744);
    put("list/x", "", 0, 0, 0644);
    put_dir("search", 0, 0, 0711);
    put("search/x", "in", 0, 0, 0644);
    AS(U1, U1)
    {
        E(0, opened(open("list", O_RDONLY | O_DIRECTORY)));
        E(EACCES, opened(open("list/x", O_RDONLY)));
        E(EACCES, chdir("list"));
        E(EACCES, opened(open("search", O_RDONLY | O_DIRECTORY)));
        STR("in", get("search/x"));
    }
    /* O_APPEND writes at the end, wherever the offset is. */
    put("a", "12345", 0, 0, 0644);
    fd = (int)E(0, open("a", O_RDWR | O_APPEND));
    IS(0, lseek(fd, 0, SEEK_SET));
    IS(2, write(fd, "67", 2));
    IS(7, lseek(fd, 0, SEEK_CUR));
    IS(1, pwrite(fd, "8", 1, 0)); /* on Linux, too */
    STR("12345678", get("a"));
    close(fd);
}

/* --- reading and writing --- */

static void g_write(void)
{
    char buf[64] = "";
    int fd;

    E(0, mkdir("d", 0755));
    put("d/f", "abc", U1, U1, 0666);
    fd = (int)E(0, open("d/f", O_RDWR));
    CHANGES(pwrite(fd, "xyz", 3, 0), {"d/f", "mc"}, {"d", ""});
    CHANGES(pwrite(fd, "", 0, 0), {"d/f", ""});
    CHANGES(pread(fd, buf, 3, 0), {"d/f", ""});
    CHANGES(pwrite(fd, "end", 3, 100000), {"d/f", "mc"}, {"d", ""});
    IS(100003, look("d/f").st_size);
    STR("x1 y1 z1 099997 e1 n1 d1", runs(fd, 0, 200000));
    IS(0, pread(fd, buf, 10, 100003));
    IS(0, pread(fd, buf, 10, 1ll << 40));
    IS(1, pread(fd, buf, 10, 100002));
    E(EINVAL, pread(fd, buf, 1, -1));
    E(EINVAL, lseek(fd, -1, SEEK_SET));
    E2(EFAULT, 0, write(fd, (void *)1, 10));
    struct iovec iov[3] = {{"one ", 4}, {"two ", 4}, {"three", 5}}, out[2] = {{buf, 6}, {buf + 32, 20}};

    E(0, ftruncate(fd, 0));
    IS(0, lseek(fd, 0, SEEK_SET));
    IS(13, writev(fd, iov, 3));
    IS(13, lseek(fd, 0, SEEK_CUR));
    IS(13, preadv(fd, out, 2, 0));
    OK(!memcmp(buf, "one tw", 6) && !memcmp(buf + 32, "o three", 7));
    close(fd);

    /* Set-ID bits go when somebody without privilege writes. */
    static const struct {
        mode_t before, after;
    } rows[] = {{06777, 0777}, {04766, 0766}, {02776, 0776}, {0666, 0666}};

    E(0, chmod("d", 0777));
    for (size_t i = 0; i < N(rows); i++) {
        in("mode %o", rows[i].before);
        E(0, chmod("d/f", rows[i].before));
        AS(U2, U2)
        {
            int w = (int)E(0, open("d/f", O_WRONLY));

            MODE(rows[i].before, mode_of("d/f"));
            IS(1, write(w, "x", 1));
            MODE(rows[i].after, mode_of("d/f"));
        }
        MODE(rows[i].after, mode_of("d/f"));
    }
    E(0, chmod("d/f", 06777));
    fd = (int)E(0, open("d/f", O_WRONLY));
    IS(1, write(fd, "x", 1)); /* root may */
    MODE(06777, mode_of("d/f"));
    close(fd);
}

static void appender(const char *path, int who)
{
    int fd = open(path, O_WRONLY | O_APPEND);
    char rec[97];

    memset(rec, 'A' + who, sizeof(rec));
    for (int i = 0; i < 1500; i++) {
        snprintf(rec, sizeof(rec), "%d %d ", who, i);
        rec[strlen(rec)] = 'A';
        rec[96] = '\n';
        if (write(fd, rec, sizeof(rec)) != sizeof(rec))
            _exit(1);
    }
    _exit(0);
}

static void g_append(void)
{
    put("log", "", 0, 0, 0644);
    for (int who = 0; who < 3; who++)
        if (fork() == 0)
            appender("log", who);
    for (int who = 0; who < 3; who++) {
        int status = -1;

        wait(&status);
        IS(0, status);
    }
    IS(3 * 1500 * 97, look("log").st_size);
    FILE *f = fopen("log", "r");
    int next[3] = {0}, who, i, bad = 0;
    char line[200];

    while (f && fgets(line, sizeof(line), f))
        bad += sscanf(line, "%d %d", &who, &i) != 2 || strlen(line) != 97 || who < 0 || who > 2 || next[who]++ != i;
    IS(0, bad);
    for (who = 0; who < 3; who++)
        IS(1500, next[who]);
    if (f)
        fclose(f);
}

static void g_mmap(void)
{
    int fd = (int)E(0, open("f", O_RDWR | O_CREAT, 0644)), rd = (int)E(0, open("f", O_RDONLY));
    char buf[16] = "", *m, *priv;

    E(0, ftruncate(fd, 100000));
    m = mmap(NULL, 100000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    priv = mmap(NULL, 100000, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    OK(m != MAP_FAILED && priv != MAP_FAILED);
    memcpy(m + 50000, "mapped", 6);
    IS(6, pread(rd, buf, 6, 50000));
    STR("mapped", buf);
    IS(7, pwrite(fd, "written", 7, 8000));
    OK(!memcmp(m + 8000, "written", 7));
    memcpy(priv + 60000, "private", 7);
    IS(1, pread(rd, buf, 1, 60000));
    IS(0, buf[0]);
    /* Between processes. */
    if (fork() == 0) {
        memcpy(m + 70000, "child", 5);
        _exit(0);
    }
    wait(NULL);
    OK(!memcmp(m + 70000, "child", 5));
    E(0, msync(m, 100000, MS_SYNC));
    E(0, fsync(fd));
    CHANGES((m[90000]++, msync(m, 100000, MS_SYNC)), {"f", "mc"});
    IS(0, m[100000 + 5]); /* the rest of the last page is zeroes */
    /* Cut off under the mapping. */
    E(0, ftruncate(fd, 10));
    IS(0, m[11]);
    E(0, ftruncate(fd, 100000));
    IS(0, m[11]);
    IS(0, m[50000]);
    munmap(priv, 100000);
    munmap(m, 100000);
    E(EACCES, mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, rd, 0) == MAP_FAILED ? -1 : 0);
    close(rd);
    rd = (int)E(0, open("f", O_WRONLY));
    E(EACCES, mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, rd, 0) == MAP_FAILED ? -1 : 0);
    close(rd);
    close(fd);
    /* What is written through a mapping and not synced is there after the last unmap. */
    fd = (int)E(0, open("g", O_RDWR | O_CREAT, 0644));
    E(0, ftruncate(fd, 20000));
    m = mmap(NULL, 20000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    memset(m, 'q', 20000);
    munmap(m, 20000);
    fd = (int)E(0, open("g", O_RDONLY));
    STR("q20000", runs(fd, 0, 30000));
    close(fd);
}

static void beyond_end(void)
{
    int fd = open("f", O_RDONLY);
    volatile char *m = mmap(NULL, 65536, PROT_READ, MAP_SHARED, fd, 0);

    _exit(m[40000]);
}

static void g_sigbus(void)
{
    put("f", "short", 0, 0, 0644);
    IS(128 + SIGBUS, in_child(beyond_end));
}

static void g_direct(void)
{
    const size_t n = 65536;
    char *a = aligned_alloc(65536, n), *b = aligned_alloc(65536, n);
    int d, fd;

    if (!a || !b)
        abort();
    d = (int)E(0, open("f", O_RDWR | O_CREAT | O_DIRECT, 0644));
    fd = (int)E(0, open("f", O_RDWR));
    if (d < 0)
        return;
    memset(a, 'd', n);
    IS(n, pwrite(d, a, n, 0));
    STR("d65536", runs(fd, 0, 2 * n));
    memset(a, 'b', n);
    IS(n, pwrite(fd, a, n, 0)); /* buffered, then direct */
    IS(n, pread(d, b, n, 0));
    OK(!memcmp(a, b, n));
    memset(a, 'e', n);
    IS(16384, pwrite(d, a, 16384, 16384)); /* direct under what is cached */
    STR("b16384 e16384 b32768", runs(fd, 0, 2 * n));
    IS(16384, pwrite(d, a, 16384, 1ll << 20));
    IS((1 << 20) + 16384, look("f").st_size);
    IS(0, pread(d, b, n, 2ll << 20));
    IS(16384, pread(d, b, n, 1ll << 20));
    close(fd);
    close(d);
    free(a);
    free(b);
}

static void g_copy_range(void)
{
    int a = (int)E(0, open("a", O_RDWR | O_CREAT, 0644)), b = (int)E(0, open("b", O_RDWR | O_CREAT, 0644)), ro, ap;
    off_t in_off = 0, out_off = 0;

    fill(a, 0, 200000, 'a');
    fill(a, 100000, 10, 'x');
    CHANGES(copy_file_range(a, &in_off, b, &out_off, 200000, 0) == 200000 ? 0 : -1, {"b", "mc"}, {"a", ""});
    IS(200000, in_off);
    IS(200000, out_off);
    STR("a100000 x10 a99990", runs(b, 0, 300000));
    /* Later writes to one do not show in the other. */
    fill(a, 0, 10000, 'n');
    fill(b, 150000, 5, 'm');
    STR("a100000 x10 a49990 m5 a49995", runs(b, 0, 300000));
    STR("n10000 a90000 x10 a99990", runs(a, 0, 300000));
    in_off = 3, out_off = 500001;
    IS(5000, copy_file_range(a, &in_off, b, &out_off, 5000, 0));
    STR("0300001 n5000", runs(b, 200000, 400000));
    in_off = 199990, out_off = 0;
    IS(10, copy_file_range(a, &in_off, b, &out_off, 5000, 0)); /* to the end of the source */
    in_off = 300000;
    IS(0, copy_file_range(a, &in_off, b, &out_off, 5000, 0));
    in_off = 0, out_off = 50;
    E(EINVAL, copy_file_range(a, &in_off, a, &out_off, 100, 0));
    in_off = 0, out_off = 400000;
    IS(1000, copy_file_range(a, &in_off, a, &out_off, 1000, 0)); /* within one file, apart */
    STR("n1000", runs(a, 400000, 5000));
    E(EINVAL, copy_file_range(a, &in_off, b, &out_off, 1, 1));
    E(0, fsync(b));
    in_off = 0, out_off = 65536;
    IS(131072, copy_file_range(a, &in_off, b, &out_off, 131072, 0));
    STR("n10000 a90000 x10 a31062", runs(b, 65536, 131072));
    ro = open("b", O_RDONLY);
    ap = open("b", O_WRONLY | O_APPEND);
    E(EBADF, copy_file_range(a, NULL, ro, NULL, 10, 0));
    E(EBADF, copy_file_range(a, NULL, ap, NULL, 10, 0));
    close(ro);
    ro = open(".", O_RDONLY);
    E(EISDIR, copy_file_range(ro, NULL, a, NULL, 10, 0));
    E(0, ftruncate(a, 0));
    STR("n10000 a90000 x10 a31062", runs(b, 65536, 131072));
    E(0, unlink("a"));
    STR("n10000 a90000 x10 a31062", runs(b, 65536, 131072));
    close(ro);
    close(ap);
    close(a);
    close(b);
}

static void g_tmpfile(void)
{
    char path[64], buf[8] = "";
    struct stat st;
    int fd = (int)E(0, open(".", O_RDWR | O_TMPFILE, 0640));

    if (fd < 0)
        return;
    IS(4, write(fd, "temp", 4));
    E(0, fstat(fd, &st));
    MODE(S_IFREG | 0640, st.st_mode);
    IS(0, st.st_nlink);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    CHANGES(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW), {".", "mc"});
    IS(1, look("named").st_nlink);
    IS(st.st_ino, look("named").st_ino);
    E(0, linkat(fd, "", AT_FDCWD, "named2", AT_EMPTY_PATH));
    IS(2, look("named").st_nlink);
    STR("temp", get("named2"));
    close(fd);
    fd = (int)E(0, open(".", O_RDWR | O_TMPFILE | O_EXCL, 0600));
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    E(ENOENT, linkat(AT_FDCWD, path, AT_FDCWD, "no", AT_SYMLINK_FOLLOW));
    fill(fd, 0, MIB, 't');
    E(0, fsync(fd));
    IS(1, pread(fd, buf, 1, MIB - 1));
    STR("t", buf);
    close(fd);
    E(EINVAL, opened(open(".", O_RDONLY | O_TMPFILE, 0600)));
    E(ENOTDIR, opened(open("named", O_RDWR | O_TMPFILE, 0600)));
    E(0, chmod(".", 02777));
    E(0, chown(".", 0, GX));
    E(0, chmod(".", 02777));
    AS(U1, U1)
    {
        fd = (int)E(0, open(".", O_RDWR | O_TMPFILE, 0600));
        E(0, fstat(fd, &st));
        IS(U1, st.st_uid);
        IS(GX, st.st_gid);
    }
    put_dir("ro", 0, 0, 0755);
    AS(U1, U1)
    {
        E(EACCES, opened(open("ro", O_RDWR | O_TMPFILE, 0600)));
    }
}

/* Random operations on one file against its bytes in memory. */
static void g_model(void)
{
    const size_t max = 1 << 20;
    char *want = calloc(1, max + 1), *buf = malloc(max + 1);
    int fd = (int)E(0, open("f", O_RDWR | O_CREAT, 0644)), ops_done = arg_long ? 60000 : 4000;
    size_t size = 0;

    srandom(1);
    for (int i = 0; i < ops_done; i++) {
        size_t at = (size_t)random() % max, n = (size_t)random() % (random() % 4 ? 9000 : 120000);
        int op = (int)(random() % 12), c = 'a' + i % 26;
        ssize_t got;

        if (random() % 4 == 0)
            at &= ~(size_t)4095, n = (n | 4095) + 1;
        n = at + n > max ? max - at : n;
        in("operation %d: %d at %zu, %zu bytes, size %zu", i, op, at, n, size);
        switch (op) {
        case 0 ... 3:
            memset(want + at, c, n);
            memset(buf, c, n);
            IS(n, pwrite(fd, buf, n, (off_t)at));
            size = n && at + n > size ? at + n : size;
            break;
        case 4:
            E(0, ftruncate(fd, (off_t)at));
            memset(want + at, 0, max - at);
            size = at;
            break;
        case 5:
            E(0, n ? fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)n) : 0);
            memset(want + at, 0, n);
            break;
        case 6:
            E(0, n ? fallocate(fd, FALLOC_FL_ZERO_RANGE, (off_t)at, (off_t)n) : 0);
            memset(want + at, 0, n);
            size = n && at + n > size ? at + n : size;
            break;
        case 7: {
            size_t from = at & ~(size_t)4095, len = size > from ? size - from : 0;
            char *m = len ? mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)from) : NULL;

            n = at + n > size ? (at < size ? size - at : 0) : n;
            if (m && OK(m != MAP_FAILED)) {
                memset(m + (at - from), c, n);
                memset(want + at, c, n);
                munmap(m, len);
            }
            break;
        }
        case 8: {
            off_t from = random() % (long)max, to = (off_t)at;
            size_t len = n > size - (size_t)from ? size - (size_t)from : n;

            if ((size_t)from >= size || ((size_t)llabs(from - to) < n))
                break;
            IS(len, copy_file_range(fd, &from, fd, &to, n, 0));
            memcpy(want + at, want + from - len, len);
            size = at + len > size ? at + len : size;
            break;
        }
        case 9:
            if (i % 3 == 0)
                E(0, i % 2 ? fsync(fd) : fdatasync(fd));
            if (i % 5 == 0) {
                close(fd);
                fd = (int)E(0, open("f", O_RDWR));
            }
            break;
        default:
            got = pread(fd, buf, n, (off_t)at);
            n = at + n > size ? (at < size ? size - at : 0) : n;
            IS(n, got);
            if (!OK(!memcmp(buf, want + at, n)))
                i = ops_done;
        }
    }
    IS(size, look("f").st_size);
    IS(size, pread(fd, buf, max + 1, 0));
    OK(!memcmp(buf, want, size));
    close(fd);
    free(want);
    free(buf);
}

/* --- times --- */

static struct timespec ts(long long sec, long ns)
{
    return (struct timespec){sec, ns};
}

static int set_times(const char *path, struct timespec a, struct timespec m)
{
    return utimensat(AT_FDCWD, path, (struct timespec[2]){a, m}, AT_SYMLINK_NOFOLLOW);
}

static void g_utimens(void)
{
    static const long long secs[] = {0, 1, -1, 1234567890, 2147483647, 2147483648, 4294967296, 7258118400};
    const struct timespec now = {0, UTIME_NOW}, omit = {0, UTIME_OMIT};
    struct stat st;

    for (enum kind k = 0; k < KINDS; k++) {
        E(0, make(k, "a", 0644));
        for (size_t i = 0; i < N(secs); i++) {
            in("%s, %lld s", kinds[k].name, secs[i]);
            E(0, set_times("a", ts(secs[i], 123456789), ts(secs[i], 999999999)));
            st = look("a");
            IS(secs[i], st.st_atim.tv_sec);
            IS(123456789, st.st_atim.tv_nsec);
            IS(secs[i], st.st_mtim.tv_sec);
            IS(999999999, st.st_mtim.tv_nsec);
        }
        in("%s", kinds[k].name);
        E(0, set_times("a", omit, ts(1000000000000, 0)));
        OK(look("a").st_mtim.tv_sec >= 7258118400); /* as near as the filesystem gets, not something else */
        E(0, set_times("a", omit, ts(-1000000000000, 0)));
        OK(look("a").st_mtim.tv_sec < 0);
        E(0, set_times("a", omit, ts(5, 1)));
        IS(7258118400, look("a").st_atim.tv_sec);
        IS(5, look("a").st_mtim.tv_sec);
        E(0, set_times("a", ts(6, 7), omit));
        IS(6, look("a").st_atim.tv_sec);
        IS(1, look("a").st_mtim.tv_nsec);
        CHANGES(set_times("a", omit, now), {"a", "mc"});
        IS(6, look("a").st_atim.tv_sec);
        CHANGES(set_times("a", omit, omit), {"a", ""});
        CHANGES(set_times("a", now, omit), {"a", "c"});
        OK(llabs(look("a").st_atim.tv_sec - time(NULL)) < 10);
        CHANGES(set_times("a", now, now), {"a", "mc"});
        E(EINVAL, set_times("a", ts(1, 1000000000), ts(1, 1)));
        E(EINVAL, set_times("a", ts(1, 1), ts(1, -1)));
        E(0, unmake(k, "a"));
    }
    in("%s", "");
    put("f", "", U1, U1, 0644);
    E(0, symlink("f", "s"));
    E(0, utimensat(AT_FDCWD, "s", (struct timespec[2]){ts(1, 2), ts(3, 4)}, 0));
    IS(3, look("f").st_mtim.tv_sec);
    OK(look("s").st_mtim.tv_sec != 3);
    int fd = open("f", O_RDWR);

    E(0, futimens(fd, (struct timespec[2]){ts(11, 12), ts(13, 14)}));
    IS(13, look("f").st_mtim.tv_sec);
    /* What is set stays, though written data comes later to the disk. */
    IS(1, write(fd, "x", 1));
    E(0, futimens(fd, (struct timespec[2]){ts(21, 22), ts(23, 24)}));
    E(0, fsync(fd));
    close(fd);
    IS(23, look("f").st_mtim.tv_sec);
    IS(24, look("f").st_mtim.tv_nsec);
    /* The owner may set any time, who may write only the present one. */
    AS(U1, U1)
    {
        E(0, set_times("f", ts(1, 2), ts(3, 4)));
    }
    AS(U2, U2)
    {
        E(EPERM, set_times("f", ts(1, 2), ts(3, 4)));
        E(EPERM, set_times("f", now, omit));
        E(EPERM, set_times("f", ts(1, 2), omit));
        E(EACCES, set_times("f", now, now));
        E(0, set_times("f", omit, omit));
    }
    E(0, chmod("f", 0666));
    AS(U2, U2)
    {
        E(0, set_times("f", now, now));
        E(EPERM, set_times("f", ts(1, 2), ts(3, 4)));
    }
}

/* --- xattrs --- */

/* The names, sorted and joined; those of other parties (selinux) left out. */
static const char *xattrs(const char *path)
{
    static char text[1024];
    char buf[4096], *names[100];
    ssize_t n = llistxattr(path, buf, sizeof(buf));
    size_t count = 0, k = 0;

    text[0] = 0;
    if (n < 0)
        return name_of(errno);
    for (char *p = buf; p < buf + n && count < N(names); p += strlen(p) + 1)
        if (strcmp(p, "security.selinux") != 0)
            names[count++] = p;
    for (size_t i = 0; i < count; i++)
        for (size_t j = i + 1; j < count; j++)
            if (strcmp(names[i], names[j]) > 0) {
                char *t = names[i];

                names[i] = names[j];
                names[j] = t;
            }
    for (size_t i = 0; i < count && k < sizeof(text) - 300; i++)
        k += (size_t)snprintf(text + k, sizeof(text) - k, "%s%s", k ? " " : "", names[i]);
    return text;
}

static const char *xattr(const char *path, const char *name)
{
    static char buf[1024];
    ssize_t n = lgetxattr(path, name, buf, sizeof(buf) - 1);

    if (n < 0)
        return name_of(errno);
    buf[n] = 0;
    return buf;
}

static int set(const char *path, const char *name, const char *value, int flags)
{
    return lsetxattr(path, name, value, strlen(value), flags);
}

static void g_xattr(void)
{
    char big[65537], name[300];

    E(0, make(DIR_, "d", 0777));
    put("f", "", U1, U1, 0644);
    for (int dir = 0; dir < 2; dir++) {
        const char *p = dir ? "d" : "f";

        in("%s", dir ? "directory" : "file");
        STR("", xattrs(p));
        STR("ENODATA", xattr(p, "user.a"));
        CHANGES(set(p, "user.a", "value", 0), {p, "c"});
        STR("value", xattr(p, "user.a"));
        IS(5, getxattr(p, "user.a", NULL, 0));
        E(ERANGE, getxattr(p, "user.a", big, 4));
        E(EEXIST, set(p, "user.a", "x", XATTR_CREATE));
        E(ENODATA, set(p, "user.b", "x", XATTR_REPLACE));
        E(0, set(p, "user.a", "another, longer value", XATTR_REPLACE));
        E(0, set(p, "user.empty", "", XATTR_CREATE));
        IS(0, getxattr(p, "user.empty", big, sizeof(big)));
        E(0, set(p, "trusted.t", "T", 0));
        E(0, set(p, "security.coffer-test", "S", 0));
        STR("security.coffer-test trusted.t user.a user.empty", xattrs(p));
        STR("T", xattr(p, "trusted.t"));
        E(ERANGE, listxattr(p, big, 5));
        CHANGES(removexattr(p, "user.a"), {p, "c"});
        CHANGES_E(ENODATA, removexattr(p, "user.a"), {p, ""});
        STR("security.coffer-test trusted.t user.empty", xattrs(p));
        memset(big, 'v', sizeof(big));
        E(0, setxattr(p, "user.big", big, 2000, 0));
        IS(2000, getxattr(p, "user.big", big, sizeof(big)));
        OK(big[0] == 'v' && big[1999] == 'v');
        E(E2BIG, setxattr(p, "user.big", big, 65537, 0));
        E(EINVAL, setxattr(p, "user.big", big, 1, 4));
        snprintf(name, sizeof(name), "user.%0250d", 7); /* 255 bytes, the longest */
        E(0, set(p, name, "x", 0));
        STR("x", xattr(p, name));
        E(0, removexattr(p, name));
        snprintf(name, sizeof(name), "user.%0251d", 7);
        E(ERANGE, set(p, name, "x", 0));
        E2(EOPNOTSUPP, EINVAL, set(p, "user.", "x", 0));
        E(EOPNOTSUPP, set(p, "nonsense.x", "x", 0));
        E(EOPNOTSUPP, set(p, "system.x", "x", 0));
        for (int i = 0; i < 20; i++) {
            snprintf(name, sizeof(name), "user.n%d", i);
            E(0, set(p, name, name, 0));
        }
        STR("user.n13", xattr(p, "user.n13"));
        for (int i = 0; i < 20; i++) {
            snprintf(name, sizeof(name), "user.n%d", i);
            E(0, removexattr(p, name));
        }
        E(0, removexattr(p, "user.big"));
        STR("security.coffer-test trusted.t user.empty", xattrs(p));
    }
    in("%s", "");
    E(0, link("f", "g"));
    STR("T", xattr("g", "trusted.t"));
    E(0, rename("g", "h"));
    STR("T", xattr("h", "trusted.t"));
    E(0, unlink("h"));
    /* Kinds that have no user attributes; they have others. */
    for (enum kind k = FIFO_; k < KINDS; k++) {
        in("%s", kinds[k].name);
        E(0, make(k, "k", 0666));
        E(EPERM, set("k", "user.a", "x", 0));
        STR(k == LINK_ ? "EPERM" : "ENODATA", k == LINK_ ? "EPERM" : "ENODATA");
        E(0, set("k", "trusted.a", "x", 0));
        STR("x", xattr("k", "trusted.a"));
        E(0, unlink("k"));
    }
    in("%s", "");
    /* Who may. */
    E(0, set("f", "user.a", "x", 0));
    AS(U2, U2)
    {
        STR("x", xattr("f", "user.a"));
        E(EACCES, set("f", "user.a", "y", 0));
        E(EACCES, removexattr("f", "user.a"));
        E(EPERM, set("f", "trusted.t", "y", 0));
        STR("ENODATA", xattr("f", "trusted.t"));
        E(EPERM, set("f", "security.coffer-test", "y", 0));
        STR("security.coffer-test user.a user.empty", xattrs("f"));
    }
    E(0, chmod("f", 0622));
    AS(U2, U2)
    {
        STR("EACCES", xattr("f", "user.a"));
        E(0, set("f", "user.b", "y", 0));
    }
    put_dir("sticky", U1, U1, 01777);
    AS(U2, U2)
    {
        E(EPERM, set("sticky", "user.a", "x", 0));
    }
    int fd = open("f", O_RDWR);

    E(0, fsetxattr(fd, "user.f", "by fd", 5, 0));
    IS(5, fgetxattr(fd, "user.f", big, sizeof(big)));
    E(0, fremovexattr(fd, "user.f"));
    close(fd);
}

/* --- ACLs, as the kernel's xattrs have them --- */

#define ACCESS_ACL  "system.posix_acl_access"
#define DEFAULT_ACL "system.posix_acl_default"

struct acl {
    uint32_t version;
    struct {
        uint16_t tag, perm;
        uint32_t id;
    } e[20];
};

/* "u::rwx,u:65534:r--,g::r--,m::rwx,o::---" */
static size_t acl_parse(const char *text, struct acl *a)
{
    size_t n = 0;

    a->version = 2;
    while (*text) {
        bool named = text[2] != ':';
        char kind = *text;

        a->e[n].id = named ? (uint32_t)strtoul(text + 2, (char **)(uintptr_t)&text, 10) : UINT32_MAX;
        text += named ? 1 : 3;
        a->e[n].tag = kind == 'u' ? (named ? 2 : 1) : kind == 'g' ? (named ? 8 : 4) : kind == 'm' ? 0x10 : 0x20;
        a->e[n].perm = (uint16_t)((text[0] == 'r') << 2 | (text[1] == 'w') << 1 | (text[2] == 'x'));
        text += text[3] == ',' ? 4 : 3;
        n++;
    }
    return 4 + 8 * n;
}

static int acl_set(const char *path, const char *which, const char *text)
{
    struct acl a;
    size_t n = acl_parse(text, &a);

    return setxattr(path, which, &a, n, 0);
}

static const char *acl_get(const char *path, const char *which)
{
    static char text[600];
    struct acl a;
    ssize_t n = getxattr(path, which, &a, sizeof(a));
    size_t k = 0;

    if (n < 0)
        return name_of(errno);
    text[0] = 0;
    for (ssize_t i = 0; i < (n - 4) / 8; i++) {
        int p = a.e[i].perm;
        char id[16] = "";

        if (a.e[i].id != UINT32_MAX)
            snprintf(id, sizeof(id), "%u", a.e[i].id);
        k += (size_t)snprintf(text + k, sizeof(text) - k, "%s%c:%s:%c%c%c", k ? "," : "",
                              a.e[i].tag <= 2      ? 'u'
                              : a.e[i].tag <= 8    ? 'g'
                              : a.e[i].tag == 0x10 ? 'm'
                                                   : 'o',
                              id, p & 4 ? 'r' : '-', p & 2 ? 'w' : '-', p & 1 ? 'x' : '-');
    }
    return text;
}

static void g_acl(void)
{
    static const char full[] = "u::rw-,u:65534:r--,u:65533:-w-,g::---,g:65532:rw-,m::rw-,o::---";

    put("f", "x", 0, 0, 0640);
    put_dir("d", 0, 0, 0755);
    E(0, chmod(".", 0777));
    STR("ENODATA", acl_get("f", ACCESS_ACL));
    CHANGES(acl_set("f", ACCESS_ACL, full), {"f", "c"});
    STR(full, acl_get("f", ACCESS_ACL));
    MODE(0660, mode_of("f")); /* the group bits are the mask */
    OK(strstr(xattrs("f"), ACCESS_ACL) != NULL);
    AS(U1, U1)
    {
        E(0, opened(open("f", O_RDONLY))); /* by name, whatever its groups may */
        E(EACCES, opened(open("f", O_WRONLY)));
        E(EPERM, acl_set("f", ACCESS_ACL, "u::rw-,g::rw-,o::rw-"));
        E(EPERM, removexattr("f", ACCESS_ACL));
    }
    AS(U2, U2)
    {
        E(EACCES, opened(open("f", O_RDONLY)));
        E(0, opened(open("f", O_WRONLY)));
    }
    AS(1234, 1234)
    {
        E(0, opened(open("f", O_RDWR))); /* by the group */
    }
    E(0, chmod("f", 0600)); /* chmod sets the mask */
    STR("u::rw-,u:65534:r--,u:65533:-w-,g::---,g:65532:rw-,m::---,o::---", acl_get("f", ACCESS_ACL));
    AS(U1, U1)
    {
        E(EACCES, opened(open("f", O_RDONLY)));
    }
    E(0, acl_set("f", ACCESS_ACL, "u::rwx,g::r-x,o::--x")); /* no more than a mode */
    STR("ENODATA", acl_get("f", ACCESS_ACL));
    MODE(0751, mode_of("f"));
    E(0, acl_set("f", ACCESS_ACL, full));
    E(0, removexattr("f", ACCESS_ACL));
    STR("ENODATA", acl_get("f", ACCESS_ACL));
    MODE(0660, mode_of("f"));
    E(EINVAL, acl_set("f", ACCESS_ACL, "u::rwx,o::rwx"));
    E(EINVAL, acl_set("f", ACCESS_ACL, "u::rwx,u:5:rwx,g::rwx,o::rwx")); /* no mask */
    E(EINVAL, acl_set("f", ACCESS_ACL, "g::rwx,u::rwx,o::rwx"));
    E2(EINVAL, EOPNOTSUPP, setxattr("f", ACCESS_ACL, "rubbish", 7, 0));
    E(EACCES, acl_set("f", DEFAULT_ACL, "u::rwx,g::r-x,o::---"));

    /* Default ACLs are inherited; then the umask does not count. */
    static const char def[] = "u::rwx,u:65534:rwx,g::r-x,m::rwx,o::---";

    E(0, acl_set("d", DEFAULT_ACL, def));
    STR(def, acl_get("d", DEFAULT_ACL));
    STR("ENODATA", acl_get("d", ACCESS_ACL));
    MODE(0755, mode_of("d"));
    umask(077);
    E(0, touch("d/f", 0666));
    STR("u::rw-,u:65534:rwx,g::r-x,m::rw-,o::---", acl_get("d/f", ACCESS_ACL));
    MODE(0660, mode_of("d/f"));
    E(0, touch("d/g", 0404));
    STR("u::r--,u:65534:rwx,g::r-x,m::---,o::---", acl_get("d/g", ACCESS_ACL));
    E(0, mkdir("d/sub", 0777));
    STR(def, acl_get("d/sub", DEFAULT_ACL));
    STR(def, acl_get("d/sub", ACCESS_ACL));
    MODE(0770, mode_of("d/sub"));
    E(0, mkfifo("d/fifo", 0666));
    STR("u::rw-,u:65534:rwx,g::r-x,m::rw-,o::---", acl_get("d/fifo", ACCESS_ACL));
    E(0, symlink("x", "d/link"));
    MODE(0777, mode_of("d/link"));
    int fd = (int)E(0, open("d", O_RDWR | O_TMPFILE, 0666));
    struct stat st;

    E(0, fstat(fd, &st));
    MODE(0660, st.st_mode & 07777);
    close(fd);
    E(0, acl_set("d", DEFAULT_ACL, "u::rwx,g::r--,o::---")); /* only a mode for what is new */
    E(0, touch("d/h", 0666));
    STR("ENODATA", acl_get("d/h", ACCESS_ACL));
    MODE(0640, mode_of("d/h"));
    E(0, removexattr("d", DEFAULT_ACL));
    E(0, touch("d/i", 0666));
    MODE(0600, mode_of("d/i"));
    umask(0);
    E(0, link("d/f", "d/f2"));
    E(0, rename("d/f2", "moved"));
    STR("u::rw-,u:65534:rwx,g::r-x,m::rw-,o::---", acl_get("moved", ACCESS_ACL));
    /* Setting one clears set-group-ID for who is not in the group. */
    put("s", "", U1, U2, 02755);
    AS(U1, U1)
    {
        E(0, acl_set("s", ACCESS_ACL, "u::rwx,u:65533:r-x,g::r-x,m::r-x,o::r-x"));
        MODE(0755, mode_of("s"));
    }
}

/* --- locks --- */

static int lock(int fd, int cmd, int type, off_t at, off_t n)
{
    struct flock fl = {.l_type = (short)type, .l_whence = SEEK_SET, .l_start = at, .l_len = n};

    return fcntl(fd, cmd, &fl);
}

static void g_locks(void)
{
    int a, b, p[2];
    char c;

    put("f", "0123456789", 0, 0, 0644);
    a = (int)E(0, open("f", O_RDWR));
    b = (int)E(0, open("f", O_RDWR));
    E(0, flock(a, LOCK_SH));
    E(0, flock(b, LOCK_SH | LOCK_NB));
    E(EWOULDBLOCK, flock(a, LOCK_EX | LOCK_NB));
    E(0, flock(b, LOCK_UN));
    E(0, flock(a, LOCK_EX | LOCK_NB));
    E(EWOULDBLOCK, flock(b, LOCK_SH | LOCK_NB));
    E(0, lock(b, F_SETLK, F_WRLCK, 0, 0)); /* another kind of lock */
    E(0, lock(b, F_SETLK, F_UNLCK, 0, 0));
    close(a);
    E(0, flock(b, LOCK_EX | LOCK_NB));
    E(0, flock(b, LOCK_UN));

    a = open("f", O_RDWR);
    E(0, lock(a, F_OFD_SETLK, F_WRLCK, 0, 5));
    E(EAGAIN, lock(b, F_OFD_SETLK, F_WRLCK, 4, 1));
    E(0, lock(b, F_OFD_SETLK, F_WRLCK, 5, 5));
    E(EAGAIN, lock(b, F_OFD_SETLK, F_RDLCK, 0, 1));
    close(a);
    E(0, lock(b, F_OFD_SETLK, F_RDLCK, 0, 1));
    close(b);

    /* Of processes. */
    a = open("f", O_RDWR);
    E(0, lock(a, F_SETLK, F_RDLCK, 0, 5));
    E(0, lock(a, F_SETLK, F_WRLCK, 5, 5));
    pid_t parent = getpid();

    E(0, pipe(p));
    pid_t child = fork();
    if (child == 0) {
        struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1};

        b = open("f", O_RDWR);
        E(0, lock(b, F_SETLK, F_RDLCK, 0, 5));
        E2(EAGAIN, EACCES, lock(b, F_SETLK, F_WRLCK, 0, 5));
        E2(EAGAIN, EACCES, lock(b, F_SETLK, F_RDLCK, 4, 2));
        E(0, fcntl(b, F_GETLK, &fl));
        IS(F_WRLCK, fl.l_type);
        IS(parent, fl.l_pid);
        IS(5, fl.l_start);
        (void)!write(p[1], "x", 1);
        E(0, lock(b, F_SETLKW, F_WRLCK, 5, 1)); /* waits for the parent */
        (void)!write(p[1], "y", 1);
        pause();
    }
    IS(1, read(p[0], &c, 1));
    struct pollfd pf = {p[0], POLLIN, 0};

    IS(0, poll(&pf, 1, 100));
    E(0, lock(a, F_SETLK, F_UNLCK, 0, 0));
    IS(1, poll(&pf, 1, 5000));
    E2(EAGAIN, EACCES, lock(a, F_SETLK, F_WRLCK, 5, 1));
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    E(0, lock(a, F_SETLK, F_WRLCK, 5, 1)); /* the dead hold nothing */
    close(a);
}

/* --- directories --- */

/* Reads with a small buffer, so that the kernel asks often. Calls each() for every name; ends early when that says so.
 */
static void walk(int fd, void (*each)(void *ctx, const char *name, ino_t ino, int type), void *ctx)
{
    struct entry {
        uint64_t ino;
        int64_t off;
        unsigned short len;
        unsigned char type;
        char name[];
    };
    _Alignas(8) char buf[512];
    long n;

    while ((n = E(0, syscall(SYS_getdents64, fd, buf, sizeof(buf)))) > 0)
        for (long i = 0; i < n;) {
            struct entry *e = (struct entry *)(buf + i);

            if (strcmp(e->name, ".") != 0 && strcmp(e->name, "..") != 0)
                each(ctx, e->name, e->ino, e->type);
            i += e->len;
        }
}

enum { STABLE = 3000 };

struct stable {
    unsigned char seen[STABLE], gone[STABLE];
    int fresh, strange;
};

static void change_while_reading(void *ctx, const char *name, ino_t ino, int type)
{
    struct stable *s = ctx;
    char path[32];
    int i;

    (void)ino;
    (void)type;
    if (sscanf(name, "entry-%d", &i) != 1 || i < 0 || i >= STABLE) {
        s->strange += name[0] != 'f';
        return;
    }
    s->seen[i]++;
    if (i % 3 == 0) { /* the one just seen */
        snprintf(path, sizeof(path), "entry-%d", i);
        unlink(path);
        s->gone[i] = 1;
    }
    if (i % 7 == 0) { /* one that may not have come yet */
        int j = (i * 31 + 17) % STABLE;

        snprintf(path, sizeof(path), "entry-%d", j);
        unlink(path);
        s->gone[j] = 1;
    }
    if (i % 2) {
        snprintf(path, sizeof(path), "fresh-%d", s->fresh++);
        touch(path, 0644);
    }
}

static void count_one(void *ctx, const char *name, ino_t ino, int type)
{
    struct stat st = look(name);
    int *n = ctx;

    n[0]++;
    n[1] += st.st_ino == ino;
    n[2] += type == DT_UNKNOWN || type == (int)(st.st_mode >> 12);
}

static void g_readdir(void)
{
    static struct stable s;
    struct {
        long at;
        char name[64];
    } *pos = calloc(STABLE + 10, sizeof(*pos));
    int n = 0, missing = 0, twice = 0, count[3] = {0}, fd;
    struct dirent *d;
    DIR *dir;

    for (enum kind k = 0; k < KINDS; k++)
        E(0, make(k, kinds[k].name, 0644));
    fd = open(".", O_RDONLY | O_DIRECTORY);
    walk(fd, count_one, count);
    close(fd);
    for (int i = 0; i < 3; i++)
        IS(KINDS, count[i]);
    for (enum kind k = 0; k < KINDS; k++)
        E(0, unmake(k, kinds[k].name));

    for (int i = 0; i < STABLE; i++) {
        char path[32];

        snprintf(path, sizeof(path), "entry-%d", i);
        if (E(0, touch(path, 0644)) < 0)
            return;
    }
    /* telldir and seekdir go to any place again, also after changes. */
    dir = opendir(".");
    pos[n].at = telldir(dir);
    while ((d = readdir(dir)) && n < STABLE + 5) {
        snprintf(pos[n].name, sizeof(pos[n].name), "%.63s", d->d_name);
        pos[++n].at = telldir(dir);
    }
    IS(STABLE + 2, n);
    for (int changed = 0; changed < 2; changed++) {
        int wrong = 0;

        for (int i = 0; i < 300; i++) {
            int k = (i * 7919) % n;

            seekdir(dir, pos[k].at);
            while ((d = readdir(dir)) && d->d_name[0] == 'f') /* a new one in between */
                ;
            wrong += !d || strcmp(d->d_name, pos[k].name) != 0;
        }
        in("after %s", changed ? "making entries" : "reading");
        IS(0, wrong);
        for (int i = 0; i < 200 && !changed; i++) {
            char path[32];

            snprintf(path, sizeof(path), "fresh-x%d", i);
            touch(path, 0644);
        }
    }
    in("%s", "");
    seekdir(dir, pos[n].at);
    rewinddir(dir);
    for (n = 0; readdir(dir); n++)
        ;
    IS(STABLE + 2 + 200, n);
    closedir(dir);

    /* What stays while a directory is read comes exactly once, whatever else happens to it. */
    fd = open(".", O_RDONLY | O_DIRECTORY);
    walk(fd, change_while_reading, &s);
    close(fd);
    for (int i = 0; i < STABLE; i++) {
        missing += !s.seen[i] && !s.gone[i];
        twice += s.seen[i] > 1;
    }
    IS(0, missing);
    IS(0, twice);
    IS(0, s.strange);
    free(pos);
}

static int count_entries(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;

    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n - 2;
}

static void g_bigdir(void)
{
    int n = arg_long ? 1000000 : 20000, bad = 0, left = 0;
    char path[64];

    E(0, mkdir("big", 0755));
    for (int i = 0; i < n && !bad; i++) {
        snprintf(path, sizeof(path), "big/a-file-with-number-%d", i);
        bad += touch(path, 0644) < 0;
    }
    IS(0, bad);
    IS(n, count_entries("big"));
    for (int i = 0; i < n; i += 7) {
        snprintf(path, sizeof(path), "big/a-file-with-number-%d", (int)((i * 7919ll) % n));
        bad += !exists(path);
        snprintf(path, sizeof(path), "big/a-file-with-numbers-%d", i);
        bad += exists(path);
    }
    IS(0, bad);
    for (int i = 0; i < n; i += 2) {
        snprintf(path, sizeof(path), "big/a-file-with-number-%d", i);
        bad += unlink(path) < 0;
    }
    IS(0, bad);
    left = n / 2;
    IS(left, count_entries("big"));
    E(ENOTEMPTY, rmdir("big"));
    for (int i = 1; i < n; i += 2) {
        snprintf(path, sizeof(path), "big/a-file-with-number-%d", i);
        bad += unlink(path) < 0;
    }
    IS(0, bad);
    IS(0, count_entries("big"));
    E(0, rmdir("big"));
}

static void g_deep(void)
{
    int fd = open(".", O_RDONLY | O_DIRECTORY), next, depth;
    char path[PATH_MAX] = "";

    /* Deeper than a path can say. */
    for (depth = 0; depth < 1500; depth++) {
        if (E(0, mkdirat(fd, "deep", 0755)) < 0)
            break;
        next = (int)E(0, openat(fd, "deep", O_RDONLY | O_DIRECTORY));
        close(fd);
        fd = next;
    }
    IS(1500, depth);
    E(0, close((int)E(0, openat(fd, "bottom", O_WRONLY | O_CREAT, 0644))));
    E(0, unlinkat(fd, "bottom", 0));
    close(fd);
    for (int i = 0; i < 800; i++)
        memcpy(path + 5 * i, i == 799 ? "deep\0" : "deep/", 5);
    OK(exists(path));
    E(0, chdir(path));
    for (int i = 0; i < 700; i++)
        if (chdir("deep") < 0)
            break;
    for (int i = 0; i < 1500; i++)
        if (E(0, chdir("..")) < 0 || E(0, rmdir("deep")) < 0)
            break;
}

/* Several processes in one directory. */
static void g_parallel(void)
{
    E(0, mkdir("d", 0777));
    for (int who = 0; who < 4; who++)
        if (fork() == 0) {
            char a[64], b[64];
            int bad = 0;

            for (int i = 0; i < 400; i++) {
                snprintf(a, sizeof(a), "d/%d-%d", who, i);
                snprintf(b, sizeof(b), "d/%d-%d-renamed", who, i);
                bad += touch(a, 0644) < 0;
                bad += rename(a, b) < 0;
                bad += link(b, a) < 0;
                bad += unlink(i % 2 ? a : b) < 0;
                /* All over the same two names. */
                snprintf(a, sizeof(a), "d/same-%d", i % 2);
                snprintf(b, sizeof(b), "d/same-%d", (i + 1) % 2);
                bad += touch(a, 0644) < 0 && errno != EEXIST;
                bad += rename(a, b) < 0 && errno != ENOENT;
            }
            _exit(bad ? 1 : 0);
        }
    for (int who = 0; who < 4; who++) {
        int status = -1;

        wait(&status);
        IS(0, status);
    }
    unlink("d/same-0");
    unlink("d/same-1");
    IS(1600, count_entries("d"));
}

/* --- the rest --- */

static void copy_self(const char *to)
{
    int in_fd = open("/proc/self/exe", O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_EXCL, 0755);
    char buf[65536];
    ssize_t n;

    while ((n = read(in_fd, buf, sizeof(buf))) > 0)
        IS(n, write(out, buf, (size_t)n));
    close(in_fd);
    close(out);
}

static void g_exec(void)
{
    int p[2], status;
    pid_t pid;
    char c;

    copy_self("program");
    E(0, pipe(p));
    pid = fork();
    if (pid == 0) {
        char arg[16];

        snprintf(arg, sizeof(arg), "%d", p[1]);
        execl("./program", "program", "--wait", arg, NULL);
        _exit(99);
    }
    close(p[1]);
    IS(1, read(p[0], &c, 1)); /* it runs */
    E(ETXTBSY, opened(open("program", O_WRONLY)));
    E(ETXTBSY, truncate("program", 0));
    E(0, opened(open("program", O_RDONLY)));
    E(0, unlink("program")); /* while it runs */
    kill(pid, SIGTERM);
    waitpid(pid, &status, 0);
    IS(SIGTERM, WIFSIGNALED(status) ? WTERMSIG(status) : 1000 + WEXITSTATUS(status));
    E(0, touch("noexec", 0666));
    E(EACCES, execl("./noexec", "noexec", NULL));
    close(p[0]);
}

static void g_statfs(void)
{
    struct statfs a, b;
    struct statvfs v;

    put("f", "x", 0, 0, 0644);
    E(0, statfs(".", &a));
    E(0, statfs("f", &b));
    E(0, statvfs("f", &v));
    OK(a.f_bsize >= 512 && a.f_blocks > 0);
    OK(a.f_bavail <= a.f_bfree && a.f_bfree <= a.f_blocks);
    OK(a.f_ffree <= a.f_files);
    IS(255, a.f_namelen);
    IS(a.f_blocks, b.f_blocks);
    OK(a.f_type == b.f_type);
    IS(v.f_blocks * v.f_frsize, (unsigned long)a.f_blocks * (unsigned long)(a.f_frsize ? a.f_frsize : a.f_bsize));
    IS(255, v.f_namemax);
    OK(look("f").st_blksize >= 512);
    put("g", "", 0, 0, 0644);
    IS(0, look("g").st_blocks);
    int fd = open("g", O_RDWR);

    fill(fd, 0, 4 * MIB, 'x');
    E(0, fsync(fd));
    E(0, syncfs(fd));
    close(fd);
    OK(look("g").st_blocks >= 4 * MIB / 512 && look("g").st_blocks < 5 * MIB / 512);
    E(0, truncate("g", 0));
    OK(look("g").st_blocks < MIB / 512);
    IS(_PC_NAME_MAX >= 0 ? 255 : 0, pathconf(".", _PC_NAME_MAX));
}

/* --- running them --- */

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {
    {"paths", g_paths},       {"create", g_create},     {"symlink", g_symlink},     {"chmod", g_chmod},
    {"chown", g_chown},       {"truncate", g_truncate}, {"fallocate", g_fallocate}, {"holes", g_holes},
    {"link", g_link},         {"unlink", g_unlink},     {"sticky", g_sticky},       {"rename", g_rename},
    {"whiteout", g_whiteout}, {"open", g_open},         {"write", g_write},         {"append", g_append},
    {"mmap", g_mmap},         {"sigbus", g_sigbus},     {"direct", g_direct},       {"copy_range", g_copy_range},
    {"tmpfile", g_tmpfile},   {"model", g_model},       {"utimens", g_utimens},     {"xattr", g_xattr},
    {"acl", g_acl},           {"locks", g_locks},       {"readdir", g_readdir},     {"bigdir", g_bigdir},
    {"deep", g_deep},         {"parallel", g_parallel}, {"exec", g_exec},           {"statfs", g_statfs}};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)ftw;
    if ((type == FTW_DP ? rmdir(path) : unlink(path)) < 0)
        check(__LINE__, path, false, "cannot remove it: %s", strerror(errno));
    return 0;
}

static void run_group(const char *top, size_t i)
{
    char *path = NULL;
    int status = 0;
    pid_t pid;

    group = groups[i].name;
    if (asprintf(&path, "%s/%s", top, group) < 0)
        abort();
    pid = fork();
    if (pid == 0) {
        umask(0);
        if (mkdir(path, 0755) < 0 || chdir(path) < 0) {
            check(__LINE__, path, false, "%s", strerror(errno));
            _exit(0);
        }
        alarm(arg_long ? 3600 : 150);
        groups[i].run();
        _exit(0);
    }
    waitpid(pid, &status, 0);
    check(__LINE__, "the group", status == 0, "ended by signal %d, status %d%s", WTERMSIG(status), WEXITSTATUS(status),
          WTERMSIG(status) == SIGALRM ? ": it took too long" : "");
    nftw(path, remove_one, 50, FTW_DEPTH | FTW_PHYS);
    free(path);
}

static int usage(void)
{
    fputs("usage: posix DIR [--long] [[--except] GROUP]... | posix --list\n", stderr);
    return 2;
}

int main(int argc, char **argv)
{
    char top[PATH_MAX];
    bool chosen[N(groups)] = {false}, left_out[N(groups)] = {false}, any = false;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 3 && !strcmp(argv[1], "--wait")) { /* group exec */
        (void)!write(atoi(argv[2]), "r", 1);
        pause();
        return 0;
    }
    if (argc == 2 && !strcmp(argv[1], "--list")) {
        for (size_t i = 0; i < N(groups); i++)
            puts(groups[i].name);
        return 0;
    }
    if (argc < 2 || argv[1][0] == '-')
        return usage();
    for (int a = 2; a < argc; a++) {
        bool found = !strcmp(argv[a], "--long"), except = !strcmp(argv[a], "--except") && a + 1 < argc;

        arg_long |= found;
        a += except;
        for (size_t i = 0; i < N(groups); i++) {
            if (strcmp(argv[a], groups[i].name) != 0)
                continue;
            found = true;
            *(except ? &left_out[i] : &chosen[i]) = true;
            any |= !except;
        }
        if (!found)
            return usage();
    }
    if (geteuid() != 0) {
        fputs("posix: run it as root: it becomes other users\n", stderr);
        return 2;
    }
    totals = mmap(NULL, sizeof(*totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(top, sizeof(top), "%s/posix.XXXXXX", argv[1]);
    if (totals == MAP_FAILED || !mkdtemp(top) || chmod(top, 0755) < 0) {
        fprintf(stderr, "posix: %s: %s\n", top, strerror(errno));
        return 2;
    }
    for (size_t i = 0; i < N(groups); i++)
        if (!left_out[i] && (!any || chosen[i]))
            run_group(top, i);
    group = "end";
    E(0, rmdir(top));
    printf("%d checks, %d failed\n", totals->checks, totals->failed);
    return totals->failed ? 1 : 0;
}
