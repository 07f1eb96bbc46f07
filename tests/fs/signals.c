/*
 * signals.c - programs with a fast timer (signals DIR SECONDS): processes, one after the other, each of which does operations
 * on files while a signal comes every 200 us, from its first one on, for which the key agent is asked. On a local disk none
 * of them fails with EINTR, and on a volume none may, whatever happens to its servers meanwhile. Exit status 1 at the first
 * error, with a line.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t signals;

static void on_alarm(int sig)
{
    (void)sig;
    signals++;
}

static void check(int rc, const char *what, unsigned round)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "round %u: %s: %s\n", round, what, strerror(errno));
    exit(1);
}

static void one_round(unsigned k)
{
    char dir[32], file[48], other[48], text[512], got[sizeof(text)];
    struct stat st;
    int fd;

    snprintf(dir, sizeof(dir), "d%u-%d", k % 7, (int)getpid());
    snprintf(file, sizeof(file), "%s/file", dir);
    snprintf(other, sizeof(other), "%s/other", dir);
    memset(text, (int)('a' + k % 26), sizeof(text));
    check(mkdir(dir, 0700), "mkdir", k);
    fd = open(file, O_RDWR | O_CREAT | O_EXCL, 0600);
    check(fd, "open", k);
    check(write(fd, text, sizeof(text)) == sizeof(text) ? 0 : -1, "write", k);
    check(fsync(fd), "fsync", k);
    check(fchmod(fd, 0640), "fchmod", k);
    check(pread(fd, got, sizeof(got), 0) == sizeof(got) && !memcmp(got, text, sizeof(got)) ? 0 : -1, "pread", k);
    check(close(fd), "close", k);
    check(rename(file, other), "rename", k);
    check(link(other, file), "link", k);
    check(stat(file, &st), "stat", k);
    if (st.st_nlink != 2 || st.st_size != sizeof(text) || (st.st_mode & 07777) != 0640) {
        errno = EUCLEAN;
        check(-1, "what stat says", k);
    }
    check(unlink(other), "unlink", k);
    check(symlink("file", other), "symlink", k);
    check(stat(other, &st), "stat through a link", k);
    check(unlink(other), "unlink of a link", k);
    check(unlink(file), "unlink", k);
    check(rmdir(dir), "rmdir", k);
}

static _Noreturn void one_process(unsigned round)
{
    const struct itimerval every = {{0, 200}, {0, 200}}, never = {0};
    const struct sigaction sa = {.sa_handler = on_alarm}; /* no SA_RESTART */

    sigaction(SIGALRM, &sa, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
    one_round(round);
    setitimer(ITIMER_REAL, &never, NULL);
    if (!signals)
        fprintf(stderr, "round %u: no signal came\n", round);
    exit(!signals);
}

int main(int argc, char **argv)
{
    unsigned rounds = 0;
    time_t end;

    if (argc != 3 || chdir(argv[1]) < 0) {
        fprintf(stderr, "usage: signals DIR SECONDS\n");
        return 2;
    }
    for (end = time(NULL) + atoi(argv[2]); time(NULL) < end; rounds++) {
        int status = 1;
        pid_t pid = fork();

        if (pid == 0)
            one_process(rounds);
        if (pid < 0 || waitpid(pid, &status, 0) < 0 || status)
            return 1;
    }
    printf("%u rounds\n", rounds);
    return rounds ? 0 : 1;
}
