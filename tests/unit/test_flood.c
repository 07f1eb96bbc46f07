/* test_flood.c - refusals are written once a window, counted exactly, and never lost. */
#include "fs/base/base.h"
#include "keystore/flood.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

static struct flood_kind kind(int n)
{
    struct flood_kind k = {.volume = "vol", .event = "refuse", .reason = "no rule"};

    snprintf(k.subject, sizeof(k.subject), "container %d", n);
    return k;
}

static void test_window(void **state)
{
    struct flood *f = flood_new();
    struct flood_kind a = kind(1), b = kind(2);
    struct flood_sum sum;

    (void)state;
    assert_true(flood_pass(f, &a, 1));
    assert_true(flood_pass(f, &b, 1));
    assert_true(flood_deadline(f) == INT64_MAX);
    for (int i = 0; i < 10; i++)
        assert_false(flood_pass(f, &a, 2));
    assert_true(flood_deadline(f) == 1 + FLOOD_WINDOW_NS);
    assert_false(flood_take(f, 3, false, &sum));
    assert_true(flood_take(f, 1 + FLOOD_WINDOW_NS, false, &sum));
    assert_int_equal(sum.more, 10);
    assert_string_equal(sum.kind.subject, "container 1");
    assert_false(flood_take(f, 1 + FLOOD_WINDOW_NS, false, &sum));
    assert_true(flood_pass(f, &a, 2 + FLOOD_WINDOW_NS));
    flood_free(f);
}

static void test_full(void **state)
{
    unsigned written = 0, counted = 0, all = 0;
    struct flood *f = flood_new();
    struct flood_sum sum;

    (void)state;
    for (int64_t t = 1; t < 50; t++)
        for (int i = 0; i < 3 * FLOOD_KINDS; i++) {
            struct flood_kind k = kind(i);

            written += flood_pass(f, &k, t);
            all++;
        }
    while (flood_take(f, 50, true, &sum))
        counted += sum.more;
    assert_int_equal(written + counted, all);
    assert_true(counted > 0);
    flood_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_window), cmocka_unit_test(test_full)};

    return cmocka_run_group_tests_name("flood", tests, NULL, NULL);
}
