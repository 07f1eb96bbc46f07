/* test_msg.c - frames from a peer that is slow, cut off or lies about lengths. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "fs/base/base.h"
#include "fs/base/msg.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static atomic_bool stop;

static void *drip(void *arg)
{
    int sock = *(int *)arg;
    uint8_t head[4] = {200, 0, 0, 0};

    (void)!write(sock, head, sizeof(head));
    for (int i = 0; i < 190 && !stop; i++) {
        usleep(20000);
        (void)!write(sock, "x", 1);
    }
    return NULL;
}

/* A byte every 20 ms does not hold the reader for longer than it agreed to. */
static void test_slow(void **state)
{
    int pair[2];
    int64_t began = mono_ns();
    pthread_t t;
    char *buf;
    size_t n;

    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    assert_int_equal(pthread_create(&t, NULL, drip, &pair[0]), 0);
    assert_int_equal(frame_recv(pair[1], &buf, &n, NULL, NULL, 300), -ETIMEDOUT);
    assert_true(mono_ns() - began < 2000000000);
    stop = true;
    pthread_join(t, NULL);
    close(pair[0]);
    close(pair[1]);
}

static void test_frames(void **state)
{
    static const uint8_t cut[] = {9, 0, 0, 0, 'a', 'b'}, huge[] = {255, 255, 255, 127};
    int pair[2];
    char *buf;
    size_t n;

    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    assert_int_equal(frame_send(pair[0], "hello", 5, NULL, 0), 0);
    assert_int_equal(frame_recv(pair[1], &buf, &n, NULL, NULL, 1000), 0);
    assert_int_equal(n, 5);
    assert_string_equal(buf, "hello");
    free(buf);
    assert_int_equal(write(pair[0], huge, sizeof(huge)), sizeof(huge));
    assert_int_equal(frame_recv(pair[1], &buf, &n, NULL, NULL, 1000), -EPROTO);
    assert_int_equal(write(pair[0], cut, sizeof(cut)), sizeof(cut));
    close(pair[0]);
    assert_int_equal(frame_recv(pair[1], &buf, &n, NULL, NULL, 1000), -ECONNRESET);
    close(pair[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_slow), cmocka_unit_test(test_frames)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
