/* test_policy.c - the text of rules, what each selector holds for, deny before allow, and the reasons. */
#include "fs/base/base.h"
#include "keystore/policy.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#define ID_HEX   "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define IMAGE_ID "sha256:" ID_HEX

/* --- helpers --- */

/* Reasons go to terminals and into the log: one line of printable ASCII, never empty. */
static void check_line(const char *s)
{
    assert_true(*s != 0);
    for (; *s; s++)
        assert_true(*s >= 0x20 && *s < 0x7f);
}

static struct policy_rule parse(const char *text, bool deny)
{
    struct policy_rule r;
    char why[256] = "";
    int rc = policy_parse(text, deny, &r, why, sizeof(why));

    if (rc < 0)
        print_error("%s: %s\n", text, why);
    assert_int_equal(rc, 0);
    assert_true(r.deny == deny);
    return r;
}

/* Refused, with a reason that has part in it, and *ret left alone. */
static void refused(const char *text, bool deny, const char *part)
{
    struct policy_rule r, before;
    char why[256] = "";

    memset(&r, 0x5a, sizeof(r));
    before = r;
    if (policy_parse(text, deny, &r, why, sizeof(why)) != -EINVAL)
        fail_msg("\"%s\" is taken, must be refused", text);
    if (!strstr(why, part))
        fail_msg("\"%s\" gives \"%s\", must say \"%s\"", text, why, part);
    check_line(why);
    assert_memory_equal(&r, &before, sizeof(r));
    assert_int_equal(policy_check(text, deny, why, sizeof(why)), -EINVAL);
}

static struct policy_caller container(void)
{
    return (struct policy_caller){.container = true,
                                  .container_shaped_cgroup = true,
                                  .attached = true,
                                  .name = "db",
                                  .image = "postgres:16",
                                  .image_id = IMAGE_ID,
                                  .nlabels = 2,
                                  .label_keys = {"tier", "empty"},
                                  .label_values = {"data", ""}};
}

static struct policy_verdict evaluate(const struct policy_rule *rules, size_t n, bool attached_volume,
                                      const struct policy_caller *c, bool write)
{
    struct policy_verdict v;

    memset(&v, 0x5a, sizeof(v));
    policy_evaluate(rules, n, attached_volume, c, write, &v);
    assert_non_null(memchr(v.reason, 0, sizeof(v.reason)));
    check_line(v.reason);
    assert_true(v.rule_index >= -1 && v.rule_index < (int)n);
    return v;
}

static struct policy_verdict evaluate_one(const char *text, bool attached_volume, const struct policy_caller *c)
{
    struct policy_rule r = parse(text, false);

    return evaluate(&r, 1, attached_volume, c, false);
}

/* --- the text --- */

static void test_good(void **state)
{
    static const struct {
        const char *text;
        unsigned n;
        bool read_only;
    } cases[] = {
        {"attached", 1, false},
        {"attached,ro", 1, true},
        {"ro,attached", 1, true},
        {"container:db", 1, false},
        {"container:a_B.9-x", 1, false},
        {"image:registry.example:5000/team/pg:16@" IMAGE_ID, 1, false},
        {"image-id:" IMAGE_ID, 1, false},
        {"label:tier=data", 1, false},
        {"label:com.example.tier=a=b", 1, false},
        {"label:empty=", 1, false},
        {"label:team=two words", 1, false},
        {"label:team=\xc3\xa4\xe2\x82\xac", 1, false},
        {"label:a=1,label:b=1", 2, false},
        {"uid:0", 1, false},
        {"uid:4294967294,ro", 1, true},
        {"attached,container:db,image:i,image-id:" IMAGE_ID ",label:k=v,ro", 5, true},
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        struct policy_rule r = parse(cases[i].text, false);

        assert_int_equal(r.n, cases[i].n);
        assert_true(r.read_only == cases[i].read_only);
        if (!r.read_only)
            parse(cases[i].text, true);
    }
}

static void test_fields(void **state)
{
    struct policy_rule r = parse("attached,label:tier=da=ta,container:db,ro", false), copy = r;

    (void)state;
    memset(&r, 0xff, sizeof(r)); /* a copy stands on its own */
    assert_int_equal(copy.n, 3);
    assert_int_equal(copy.selectors[0].kind, POLICY_ATTACHED);
    assert_string_equal(copy.words + copy.selectors[0].text, "attached");
    assert_string_equal(copy.words + copy.selectors[0].value, "");
    assert_int_equal(copy.selectors[1].kind, POLICY_LABEL);
    assert_string_equal(copy.words + copy.selectors[1].text, "label:tier=da=ta");
    assert_string_equal(copy.words + copy.selectors[1].key, "tier");
    assert_string_equal(copy.words + copy.selectors[1].value, "da=ta");
    assert_int_equal(copy.selectors[2].kind, POLICY_CONTAINER);
    assert_string_equal(copy.words + copy.selectors[2].value, "db");
    r = parse("uid:4294967294", true);
    assert_int_equal(r.selectors[0].kind, POLICY_UID);
    assert_true(r.selectors[0].uid == 4294967294u);
}

static void test_refused(void **state)
{
    static const struct {
        const char *text, *part;
    } cases[] = {
        {"", "empty"},
        {",", ""},
        {"attached,", ""},
        {",attached", ""},
        {"attached,,ro", ""},
        {"nonsense:x", "nonsense"},
        {"Attached", "unknown"},
        {"attached:", ""},
        {"attached:x", ""},
        {"ro:x", ""},
        {"container", ""},
        {"container:", ""},
        {"image:", ""},
        {"label:", ""},
        {"label:tier", "label"},
        {"label:=data", "label"},
        {"image-id:", ""},
        {"image-id:" ID_HEX, "image-id"},
        {"image-id:sha512:" ID_HEX, "image-id"},
        {"image-id:sha256:0123456789ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef", "image-id"},
        {"image-id:" IMAGE_ID "0", "image-id"},
        {"image-id:sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde", "image-id"},
        {"uid:", ""},
        {"uid:-1", "uid"},
        {"uid:+1", "uid"},
        {"uid:0x10", "uid"},
        {"uid:00", "uid"},
        {"uid:007", "uid"},
        {"uid:1000 ", ""},
        {"uid:root", "uid"},
        {"uid:4294967295", "uid"},
        {"uid:4294967296", "uid"},
        {"uid:18446744073709551616", "uid"},
        {"unit:db.service", "unit"},
        {"cgroup:/x", "cgroup"},
        {"attached,unit:db.service", "unit"},
        {"ro", "ro"},
        {"ro,ro", "ro"},
        {"attached,ro,ro", "twice"},
        {"attached,attached", "twice"},
        {"container:db,container:db", "twice"},
        {"label:a=1,ro,label:a=1", "twice"},
        {" attached", ""},
        {"attached ,ro", ""},
        {"attached, ro", ""},
        {"attached\n", "control"},
        {"label:k=\x1b[2J", "control"},
        {"label:k=\x7f", "control"},
        {"\x1b]0;x\x07", "control"},
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++) {
        refused(cases[i].text, false, cases[i].part);
        if (!strstr(cases[i].text, "ro"))
            refused(cases[i].text, true, cases[i].part);
    }
    refused("attached,ro", true, "ro");
    refused("ro", true, "ro");
}

/* What parses but could never hold would look like a rule that protects. */
static void test_never_holds(void **state)
{
    static const char *const cases[] = {
        "container:a,container:b",
        "image:a,image:b",
        "uid:0,uid:1",
        "label:a=1,label:a=2",
        "uid:0,attached",
        "container:db,uid:0",
        "container:/db",
        "container:two words",
        "container:-x",
        "container: db",
        "image:a b",
        "label:k=v ",
        "label:k=\xc3",
        "label:k=\xed\xa0\x80",
        "label:k=\xc2\x9b",
        "label:a b=c",
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_LEN(cases); i++)
        for (int deny = 0; deny < 2; deny++)
            refused(cases[i], deny, "");
}

static void fill(char *out, const char *head, size_t n, const char *tail)
{
    size_t h = strlen(head);

    memcpy(out, head, h);
    memset(out + h, 'x', n);
    strcpy(out + h + n, tail);
}

static void test_limits(void **state)
{
    char text[2048] = "", why[2];
    struct policy_rule r;

    (void)state;
    for (int i = 0; i < POLICY_SELECTORS_MAX; i++)
        sprintf(text + strlen(text), "%slabel:k%d=v", i ? "," : "", i);
    assert_int_equal(parse(text, false).n, POLICY_SELECTORS_MAX);
    strcat(text, ",attached");
    refused(text, false, "selectors");
    fill(text, "label:", POLICY_KEY_MAX, "=v");
    parse(text, false);
    fill(text, "label:", POLICY_KEY_MAX + 1, "=v");
    refused(text, false, "");
    fill(text, "label:k=", POLICY_VALUE_MAX, "");
    assert_int_equal(strlen(parse(text, false).words + parse(text, false).selectors[0].value), POLICY_VALUE_MAX);
    fill(text, "label:k=", POLICY_VALUE_MAX + 1, "");
    refused(text, false, "");
    fill(text, "container:", POLICY_VALUE_MAX, "");
    parse(text, false);
    fill(text, "container:", POLICY_VALUE_MAX + 1, "");
    refused(text, false, "");
    /* a rule as long as the record can hold, and one more */
    fill(text, "container:", 240, ",image:");
    fill(text + strlen(text), "", AGENT_RULE_MAX - 1 - strlen(text), "");
    assert_int_equal(strlen(text), AGENT_RULE_MAX - 1);
    r = parse(text, false);
    assert_int_equal(strlen(r.words + r.selectors[0].value), 240);
    assert_int_equal(strlen(r.words + r.selectors[1].text), AGENT_RULE_MAX - 1 - 251);
    strcat(text, "x");
    refused(text, false, "");
    /* a reason that has no room */
    assert_int_equal(policy_check("x", false, why, sizeof(why)), -EINVAL);
    assert_int_equal(strlen(why), 1);
    assert_int_equal(policy_check("x", false, NULL, 0), -EINVAL);
}

/* --- every selector with every caller, against a second writing-down of what policy.h says --- */

enum {
    CALLER_CONTAINER = 1 << 0,
    CALLER_ATTACHED = 1 << 1,
    CALLER_NAME = 1 << 2,
    CALLER_IMAGE = 1 << 3,
    CALLER_IMAGE_ID = 1 << 4,
    CALLER_LABEL = 1 << 5,
    CALLER_UID = 1 << 6,
    CALLER_OWN_NS = 1 << 7,
    CALLER_SHAPED = 1 << 8,
    CALLER_FOREIGN = 1 << 9,
    CALLERS = 1 << 10,
};

/* A rule as bits of enum policy_kind. */
#define BIT(kind) (1u << (kind))
#define CONTAINERS                                                                                                     \
    (BIT(POLICY_ATTACHED) | BIT(POLICY_CONTAINER) | BIT(POLICY_IMAGE) | BIT(POLICY_IMAGE_ID) | BIT(POLICY_LABEL))

static struct policy_caller caller_of(unsigned bits)
{
    struct policy_caller c = {.container = bits & CALLER_CONTAINER,
                              .foreign_ns = (bits & CALLER_FOREIGN) && (bits & CALLER_CONTAINER),
                              .container_shaped_cgroup = bits & CALLER_SHAPED,
                              .own_pid_ns = bits & CALLER_OWN_NS,
                              .attached = bits & CALLER_ATTACHED,
                              .uid = bits & CALLER_UID ? 7 : 8,
                              .name = bits & CALLER_NAME ? "db" : "dB",
                              .image = bits & CALLER_IMAGE ? "pg" : "pg:latest",
                              .image_id = bits & CALLER_IMAGE_ID ? IMAGE_ID : ID_HEX,
                              .nlabels = 2,
                              .label_keys = {"other", "tier"},
                              .label_values = {"data", bits & CALLER_LABEL ? "data" : "dat"}};
    return c;
}

static bool oracle_holds(unsigned rule, bool deny, bool attached_volume, unsigned c)
{
    static const unsigned needs[] = {
        [POLICY_ATTACHED] = CALLER_CONTAINER | CALLER_ATTACHED, [POLICY_CONTAINER] = CALLER_CONTAINER | CALLER_NAME,
        [POLICY_IMAGE] = CALLER_CONTAINER | CALLER_IMAGE,       [POLICY_IMAGE_ID] = CALLER_CONTAINER | CALLER_IMAGE_ID,
        [POLICY_LABEL] = CALLER_CONTAINER | CALLER_LABEL,       [POLICY_UID] = CALLER_UID | CALLER_OWN_NS,
    };

    for (unsigned k = 0; k < ARRAY_LEN(needs); k++)
        if ((rule & BIT(k)) && (c & needs[k]) != needs[k])
            return false;
    if ((rule & BIT(POLICY_UID)) && (c & (CALLER_CONTAINER | CALLER_SHAPED)))
        return false;
    return deny || !attached_volume || !(rule & CONTAINERS) || (c & CALLER_ATTACHED);
}

static struct policy_rule rule_of(unsigned bits, bool deny)
{
    static const char *const words[] = {"attached",        "container:db", "image:pg", "image-id:" IMAGE_ID,
                                        "label:tier=data", "uid:7",        "ro"};
    char text[AGENT_RULE_MAX] = "";

    for (unsigned k = 0; k < ARRAY_LEN(words); k++)
        if (bits & BIT(k))
            sprintf(text + strlen(text), "%s%s", *text ? "," : "", words[k]);
    return parse(text, deny);
}

/* The i-th of the 32 sets of selectors that one rule may have; every container selector's set, then uid. */
static unsigned set_of(unsigned i)
{
    return i < 31 ? i + 1 : BIT(POLICY_UID);
}

static bool foreign(unsigned c)
{
    return (c & CALLER_FOREIGN) && (c & CALLER_CONTAINER);
}

static void test_one_rule(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 64; i++) {
        bool ro = i >= 32;
        unsigned bits = set_of(i % 32);
        struct policy_rule r = rule_of(bits | (ro ? BIT(POLICY_RO) : 0), false);

        for (unsigned c = 0; c < CALLERS; c++) {
            struct policy_caller caller = caller_of(c);

            for (unsigned how = 0; how < 4; how++) {
                bool attached_volume = how & 1, write = how & 2;
                struct policy_verdict v;
                bool want = !foreign(c) && oracle_holds(bits, false, attached_volume, c) && !(ro && write);

                policy_evaluate(&r, 1, attached_volume, &caller, write, &v);
                if (v.allow != want || (want && (v.read_only != ro || v.rule_index != 0)))
                    fail_msg("rule %x ro %d caller %x attached %d write %d: %s", bits, ro, c, attached_volume, write,
                             v.reason);
            }
        }
    }
}

/* Deny wins, before or after the allow rule, and names itself. */
static void test_deny_wins(void **state)
{
    struct policy_rule deny[32], allow[32];

    (void)state;
    for (unsigned i = 0; i < 32; i++) {
        deny[i] = rule_of(set_of(i), true);
        allow[i] = rule_of(set_of(i), false);
    }
    /* 5 is prime to 32 * 32 * 1024 * 4: a fifth of all, spread evenly */
    for (uint64_t n = 0; n < 32ull * 32 * CALLERS * 4; n += 5) {
        unsigned d = n % 32, a = n / 32 % 32, c = n / 1024 % CALLERS, first = n >> 20 & 1, attached = n >> 21 & 1;
        struct policy_rule rules[2];
        struct policy_caller caller = caller_of(c);
        struct policy_verdict v;
        bool denied = oracle_holds(set_of(d), true, attached, c), want;

        rules[first] = deny[d];
        rules[!first] = allow[a];
        want = !foreign(c) && !denied && oracle_holds(set_of(a), false, attached, c);
        policy_evaluate(rules, 2, attached, &caller, false, &v);
        if (v.allow != want || (want && v.rule_index != !first) ||
            (denied && !foreign(c) && v.rule_index != (int)first))
            fail_msg("deny %x allow %x caller %x: %s", set_of(d), set_of(a), c, v.reason);
    }
}

/* --- what is not in the table --- */

static void test_default(void **state)
{
    struct policy_rule deny = parse("container:other", true), local = parse("uid:7", false);
    struct policy_caller c = container(), host = {.own_pid_ns = true, .uid = 0};
    struct policy_verdict v;

    (void)state;
    v = evaluate(NULL, 0, true, &c, true);
    assert_true(v.allow && !v.read_only && v.rule_index == -1);
    assert_false(evaluate(NULL, 0, true, &host, false).allow);
    assert_false(evaluate(NULL, 0, false, &c, false).allow);
    assert_false(evaluate(NULL, 0, false, &host, false).allow);
    /* deny rules leave the default standing, any allow rule replaces it */
    v = evaluate(&deny, 1, true, &c, true);
    assert_true(v.allow && v.rule_index == -1);
    assert_false(evaluate(&deny, 1, false, &c, false).allow);
    assert_false(evaluate(&local, 1, true, &c, false).allow);
    c.attached = false;
    assert_false(evaluate(NULL, 0, true, &c, false).allow);
    c.attached = true;
    c.foreign_ns = true;
    assert_false(evaluate(NULL, 0, true, &c, false).allow);
    c = container();
    c.name = "other";
    v = evaluate(&deny, 1, true, &c, false);
    assert_true(!v.allow && v.rule_index == 0);
}

static void test_read_only(void **state)
{
    struct policy_rule rules[2] = {parse("container:db,ro", false), parse("label:tier=data", false)}, swapped[2];
    struct policy_caller c = container();
    struct policy_verdict v;

    (void)state;
    swapped[0] = rules[1];
    swapped[1] = rules[0];
    v = evaluate(rules, 1, true, &c, false);
    assert_true(v.allow && v.read_only);
    v = evaluate(rules, 1, true, &c, true);
    assert_true(!v.allow && v.rule_index == 0);
    assert_non_null(strstr(v.reason, "read"));
    for (int write = 0; write < 2; write++) {
        v = evaluate(rules, 2, true, &c, write);
        assert_true(v.allow && !v.read_only && v.rule_index == 1);
        v = evaluate(swapped, 2, true, &c, write);
        assert_true(v.allow && !v.read_only && v.rule_index == 0);
    }
    c.label_values[0] = "other";
    v = evaluate(rules, 2, true, &c, false);
    assert_true(v.allow && v.read_only && v.rule_index == 0);
    assert_false(evaluate(rules, 2, true, &c, true).allow);
}

/* A value that is not known equals nothing, not even the empty one. */
static void test_unknown_values(void **state)
{
    static const char *const rules[] = {"container:db", "image:postgres:16", "image-id:" IMAGE_ID, "label:tier=data",
                                        "label:tier="};
    struct policy_caller c = container();

    (void)state;
    for (size_t i = 0; i < 4; i++)
        assert_true(evaluate_one(rules[i], false, &c).allow);
    assert_true(evaluate_one("label:empty=", false, &c).allow);
    assert_false(evaluate_one("label:none=", false, &c).allow);
    c.name = c.image = c.image_id = NULL;
    c.label_values[0] = NULL;
    for (size_t i = 0; i < ARRAY_LEN(rules); i++)
        assert_false(evaluate_one(rules[i], false, &c).allow);
    c.label_keys[0] = NULL;
    c.nlabels = 0;
    assert_false(evaluate_one("label:empty=", false, &c).allow);
    /* names are compared whole and as they stand */
    c = container();
    for (size_t i = 0; i < 4; i++)
        c.name = ((const char *const[]){"d", "db2", "DB", ""})[i],
        assert_false(evaluate_one("container:db", false, &c).allow);
}

/* --- reasons --- */

static void test_why(void **state)
{
    struct policy_rule rules[4] = {parse("container:web", true), parse("image:mysql", false),
                                   parse("container:web,label:tier=data", false), parse("uid:7", false)};
    struct policy_caller c = container(), host = {.own_pid_ns = true, .uid = 1234};
    struct policy_verdict v = evaluate(rules, 4, true, &c, false);

    (void)state;
    /* the nearest one: the selector that failed, and both values */
    assert_true(!v.allow && v.rule_index == 2);
    assert_non_null(strstr(v.reason, "rule 3"));
    assert_non_null(strstr(v.reason, "container:web"));
    assert_non_null(strstr(v.reason, "db"));
    c.name = "web";
    v = evaluate(rules, 4, true, &c, false);
    assert_true(!v.allow && v.rule_index == 0);
    assert_non_null(strstr(v.reason, "rule 1"));
    v = evaluate(rules + 1, 3, true, &c, false);
    assert_true(v.allow && v.rule_index == 1);
    assert_non_null(strstr(v.reason, "rule 2"));
    /* the implied `attached` */
    c.attached = false;
    v = evaluate(rules + 2, 1, true, &c, false);
    assert_true(!v.allow && v.rule_index == 0);
    assert_non_null(strstr(v.reason, "attached"));
    v = evaluate(rules + 3, 1, false, &host, false);
    assert_true(!v.allow && v.rule_index == 0);
    assert_non_null(strstr(v.reason, "uid:7"));
    assert_non_null(strstr(v.reason, "1234"));
    host.uid = 7;
    host.own_pid_ns = false;
    assert_non_null(strstr(evaluate(rules + 3, 1, false, &host, false).reason, "namespace"));
    assert_non_null(strstr(evaluate_one("container:web", true, &host).reason, "container:web"));
}

/* What containers and rules say reaches a reason escaped, and however long it is the reason ends in time. */
static void test_hostile(void **state)
{
    struct policy_caller c = container();
    struct policy_verdict v;
    char big[4096], text[AGENT_RULE_MAX];

    (void)state;
    c.name = "x\n\x1b[2J\x9b\xe2\x80\xae\"";
    v = evaluate_one("container:web", true, &c);
    assert_false(v.allow);
    assert_non_null(strstr(v.reason, "\\x1b[2J"));
    fill(big, "", sizeof(big) - 1, "");
    c.name = c.image = c.image_id = c.label_values[0] = big;
    fill(text, "container:", 240, ",label:tier=y");
    evaluate_one(text, true, &c);
    evaluate_one("label:tier=\xc3\xa4", true, &c);
    evaluate_one("image:x", true, &c);
    evaluate_one("image-id:" IMAGE_ID, true, &c);
}

/* --- sets of rules --- */

static struct agent_rule stored(const char *text, bool deny)
{
    struct agent_rule r = {.deny = deny};

    snprintf(r.rule, sizeof(r.rule), "%s", text);
    return r;
}

static void test_decide(void **state)
{
    struct agent_rule rules[AGENT_RULES_MAX + 1] = {stored("container:db,ro", false), stored("container:web", true)};
    struct policy_caller c = container();
    struct policy_verdict v;

    (void)state;
    policy_decide(rules, 2, true, &c, &v);
    assert_true(v.allow && v.read_only && v.rule_index == 0);
    policy_decide(rules, 0, true, &c, &v);
    assert_true(v.allow && !v.read_only && v.rule_index == -1);
    /* what is not understood might deny: nobody is let in */
    rules[1] = stored("unit:db.service", true);
    policy_decide(rules, 2, true, &c, &v);
    assert_true(!v.allow && v.rule_index == 1);
    assert_non_null(strstr(v.reason, "rule 2"));
    check_line(v.reason);
    rules[1] = stored("", false);
    policy_decide(rules, 2, true, &c, &v);
    assert_false(v.allow);
    memset(rules[1].rule, 'x', sizeof(rules[1].rule)); /* no NUL */
    policy_decide(rules, 2, true, &c, &v);
    assert_false(v.allow);
    for (size_t i = 0; i < ARRAY_LEN(rules); i++)
        rules[i] = stored("attached", false);
    policy_decide(rules, AGENT_RULES_MAX, true, &c, &v);
    assert_true(v.allow);
    policy_decide(rules, AGENT_RULES_MAX + 1, true, &c, &v);
    assert_false(v.allow);
}

static void test_labels(void **state)
{
    struct policy_rule rules[4] = {parse("label:a=1,label:b=1", false), parse("label:b=2,attached", false),
                                   parse("label:c=1", true), parse("uid:7", false)};
    const char *keys[POLICY_LABELS_MAX];

    (void)state;
    assert_int_equal(policy_labels(rules, 4, keys), 3);
    assert_string_equal(keys[0], "a");
    assert_string_equal(keys[1], "b");
    assert_string_equal(keys[2], "c");
    assert_int_equal(policy_labels(NULL, 0, keys), 0);
    assert_true(policy_local(rules, 4));
    assert_false(policy_local(rules, 3));
    rules[3] = parse("uid:7", true);
    assert_false(policy_local(rules, 4));
}

static void many_labels(struct agent_rule rules[3], int n)
{
    char text[AGENT_RULE_MAX];

    for (int i = 0, k = 0; i < 3; i++) {
        *text = 0;
        for (int j = 0; j < 11 && k < n; j++, k++)
            sprintf(text + strlen(text), "%slabel:k%d=v", j ? "," : "", k);
        rules[i] = stored(text, true);
    }
}

static void test_too_many_labels(void **state)
{
    struct agent_rule rules[4];
    struct policy_rule parsed[3];
    const char *keys[POLICY_LABELS_MAX + 1];
    struct policy_caller c = container();
    struct policy_verdict v;

    (void)state;
    rules[3] = stored("attached", false);
    many_labels(rules, POLICY_LABELS_MAX);
    policy_decide(rules, 4, true, &c, &v);
    assert_true(v.allow);
    many_labels(rules, POLICY_LABELS_MAX + 1);
    for (int i = 0; i < 3; i++)
        parsed[i] = parse(rules[i].rule, true);
    keys[POLICY_LABELS_MAX] = "untouched";
    assert_int_equal(policy_labels(parsed, 3, keys), POLICY_LABELS_MAX + 1);
    assert_string_equal(keys[POLICY_LABELS_MAX], "untouched");
    /* one of the deny rules' labels was not asked for */
    policy_decide(rules, 4, true, &c, &v);
    assert_false(v.allow);
}

/* A struct that nobody parsed allows nothing. */
static void test_empty_rule(void **state)
{
    struct policy_rule r = {0};
    struct policy_caller c = container();

    (void)state;
    assert_false(evaluate(&r, 1, true, &c, false).allow);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),           cmocka_unit_test(test_fields),  cmocka_unit_test(test_refused),
        cmocka_unit_test(test_never_holds),    cmocka_unit_test(test_limits),  cmocka_unit_test(test_one_rule),
        cmocka_unit_test(test_deny_wins),      cmocka_unit_test(test_default), cmocka_unit_test(test_read_only),
        cmocka_unit_test(test_unknown_values), cmocka_unit_test(test_why),     cmocka_unit_test(test_hostile),
        cmocka_unit_test(test_decide),         cmocka_unit_test(test_labels),  cmocka_unit_test(test_too_many_labels),
        cmocka_unit_test(test_empty_rule),
    };

    return cmocka_run_group_tests_name("policy", tests, NULL, NULL);
}
