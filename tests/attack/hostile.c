/*
 * hostile.c - a coffer-fs that has been taken over: stands in the place of the real one (tests/attack/hostile.sh) and says
 * on its control channel what it must not. cofferd, which is root, must live.
 */
#include "coffer/server.h"
#include "fs/base/base.h"
#include "fs/base/msg.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

static void say(uint16_t type, uint64_t id, const void *body, uint32_t len)
{
    struct msg_head head = {.type = type, .len = len, .id = id};
    struct pollfd p = {.fd = SERVER_FD_CONTROL, .events = POLLOUT};

    while (msg_send(SERVER_FD_CONTROL, &head, body, NULL, 0) == -EAGAIN)
        poll(&p, 1, -1);
}

/* cofferd's own end is kept here, and its flags with it: full of orders that nobody reads, whoever sends one more waits. */
static void deaf(void)
{
    struct msg_head head = {.type = 77};

    while (msg_send(SERVER_FD_PEER, &head, NULL, NULL, 0) == 0)
        ;
    fcntl(SERVER_FD_PEER, F_SETFL, 0);
    for (;;)
        pause();
}

/* More than an audit log is to take. */
static void flood_notes(void)
{
    struct agent_reply r = {.text = "a note"};

    for (int i = 0; i < 500; i++)
        say(SERVER_NOTE, 0, &r, sizeof(r));
}

/* A line that nobody asked for, one with control characters, progress and an answer, all of this id. */
static void babble(uint64_t id)
{
    struct agent_reply r = {.err = 1 << 30, .text = "\033[31ma line\nof \xff two"};
    struct server_progress at = {UINT64_MAX, 0};

    say(SERVER_LINE, id, &r, sizeof(r));
    say(SERVER_PROGRESS, id, &at, sizeof(at));
    say(SERVER_NOTE, id, &r, sizeof(r));
    say(SERVER_DAMAGE, id, &r, sizeof(r));
    say(SERVER_REPLY, id, &r, sizeof(r));
    say(SERVER_REPLY, id, &r, sizeof(r));
}

/* More lines than a socket holds that nobody reads. */
static void flood(uint64_t id)
{
    struct agent_reply r = {.text = "a line"};

    for (int i = 0; i < 5000; i++)
        say(SERVER_LINE, id, &r, sizeof(r));
}

int main(int argc, char **argv)
{
    struct server_stat stat;
    struct msg_head head;
    union {
        struct server_task task;
        uint8_t bytes[4096];
    } body;
    int nfds, fds[MSG_FDS_MAX];

    if (argc < 2 || strcmp(argv[1], "serve") != 0) {
        babble(7);
        return 0;
    }
    babble(1);
    say(SERVER_READY, 0, NULL, 0);
    if (argc > 2 && strcmp(argv[2], "deaf") == 0)
        deaf();
    flood_notes();
    memset(&stat, 0xff, sizeof(stat));
    while (msg_recv(SERVER_FD_CONTROL, &head, &body, sizeof(body), fds, &nfds, -1) == 0) {
        if (head.type == SERVER_TASK && body.task.kind == TASK_CHECK)
            flood(head.id);
        if (head.type == SERVER_TASK)
            babble(head.id);
        else
            say(head.type == SERVER_STAT ? SERVER_STAT : 77, head.id, &stat, sizeof(stat));
        if (head.type == SERVER_STOP)
            return 0;
    }
    return 0;
}
