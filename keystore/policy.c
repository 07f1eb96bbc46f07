/*
 * policy.c - see policy.h. Pure: text in, decision out.
 *
 * Invariants:
 *  1. A rule that parses can be enforced; everything else is refused when it is given.
 *  2. Nothing allows by default but `attached`, on an attached volume without allow rules.
 *  3. A deny rule that holds decides, wherever it stands.
 */
#include "keystore/policy.h"

#include "fs/base/base.h"

#include <stdio.h>
#include <stdlib.h>

/* --- parsing --- */

static const struct {
    const char *name; /* with its colon where it takes a value */
    uint8_t kind;     /* enum policy_kind */
} selectors[] = {
    {"attached", POLICY_ATTACHED},
    {"container:", POLICY_CONTAINER},
    {"image:", POLICY_IMAGE},
    {"image-id:", POLICY_IMAGE_ID},
    {"label:", POLICY_LABEL},
    {"uid:", POLICY_UID},
    {"ro", POLICY_RO},
};

#define KNOWN "attached, container:NAME, image:REF, image-id:sha256:HEX, label:KEY=VALUE, uid:N, ro"

/* The reason into why[n], for `return`. */
#define refuse(why, n, ...) (snprintf(why, n, __VA_ARGS__), -EINVAL)

/* What is printed of a text that may hold anything. */
static const char *shown(const char *text, char buf[64])
{
    escape_text(text, buf, 64);
    return buf;
}

/* The length of the well-formed UTF-8 sequence at s that is no control character (C0, DEL, C1), or 0. */
static size_t char_len(const uint8_t *s)
{
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;

    if (n == 1)
        return s[0] >= 0x20 && s[0] != 0x7f;
    if (s[0] < 0xc2 || s[0] > 0xf4 || (s[0] == 0xc2 && s[1] < 0xa0) || (s[0] == 0xe0 && s[1] < 0xa0) ||
        (s[0] == 0xed && s[1] >= 0xa0) || (s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] >= 0x90))
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) /* the NUL at the end is none either */
            return 0;
    return n;
}

static bool printable(const char *text)
{
    for (size_t n; *text; text += n)
        if (!(n = char_len((const uint8_t *)text)))
            return false;
    return true;
}

/* As Docker and Podman name containers; a slash before it is the API's, not the name's. */
static bool container_name(const char *s)
{
    for (size_t i = 0; s[i]; i++) {
        bool alnum = (s[i] >= 'a' && s[i] <= 'z') || (s[i] >= 'A' && s[i] <= 'Z') || (s[i] >= '0' && s[i] <= '9');

        if (!alnum && (i == 0 || !strchr("_.-", s[i])))
            return false;
    }
    return s[0] != 0;
}

static bool graphic(const char *s)
{
    for (; *s; s++)
        if (*s <= 0x20 || *s >= 0x7f)
            return false;
    return true;
}

static bool hex64(const char *s)
{
    size_t n = strspn(s, "0123456789abcdef");

    return n == 64 && s[n] == 0;
}

static int parse_uid(const char *value, uint32_t *ret)
{
    unsigned long n;

    if (!*value || strspn(value, "0123456789") != strlen(value) || strlen(value) > 10 || (value[0] == '0' && value[1]))
        return -EINVAL;
    n = strtoul(value, NULL, 10);
    if (n >= UINT32_MAX) /* (uid_t)-1 is nobody's */
        return -EINVAL;
    *ret = (uint32_t)n;
    return 0;
}

static int parse_value(struct policy_rule *r, struct policy_selector *s, char *why, size_t n)
{
    char *value = r->words + s->value, buf[64], *equal;

    if (!*value)
        return refuse(why, n, "selector %s has no value", shown(r->words + s->text, buf));
    if (strlen(value) > POLICY_VALUE_MAX + POLICY_KEY_MAX)
        return refuse(why, n, "selector %s is too long", shown(r->words + s->text, buf));
    if (s->kind == POLICY_CONTAINER && !container_name(value))
        return refuse(why, n, "container: wants a name of letters, digits, _ . and -, have %s", shown(value, buf));
    if (s->kind == POLICY_IMAGE && !graphic(value))
        return refuse(why, n, "image: wants the reference given at creation, without spaces, have %s",
                      shown(value, buf));
    if (s->kind == POLICY_UID && parse_uid(value, &s->uid) < 0)
        return refuse(why, n, "uid:%s is not a user's number", shown(value, buf));
    if (s->kind == POLICY_IMAGE_ID && (strncmp(value, "sha256:", 7) != 0 || !hex64(value + 7)))
        return refuse(why, n, "image-id: wants sha256: and 64 lower-case hex digits");
    if (s->kind == POLICY_LABEL) {
        equal = strchr(value, '=');
        if (!equal || equal == value || equal - value > POLICY_KEY_MAX || memchr(value, ' ', (size_t)(equal - value)))
            return refuse(why, n, "label: wants KEY=VALUE, have %s", shown(value, buf));
        s->key = s->value;
        *equal = 0;
        s->value = (uint16_t)(s->value + (equal - value) + 1);
        value = equal + 1;
    }
    if (strlen(value) > POLICY_VALUE_MAX)
        return refuse(why, n, "the value in %s is too long", shown(r->words + s->text, buf));
    return 0;
}

/* Appends a word (its NUL too) to the rule's words: twice as long as a rule, as each selector stands there twice. */
static uint16_t add_word(struct policy_rule *r, size_t *used, const char *text, size_t len)
{
    uint16_t at = (uint16_t)*used;

    memcpy(r->words + at, text, len);
    r->words[at + len] = 0;
    *used += len + 1;
    return at;
}

/* Of each kind there is one, of labels one for each key. */
static bool stands_already(const struct policy_rule *r, const struct policy_selector *s)
{
    for (unsigned i = 0; i < r->n; i++)
        if (r->selectors[i].kind == s->kind &&
            (s->kind != POLICY_LABEL || !strcmp(r->words + r->selectors[i].key, r->words + s->key)))
            return true;
    return false;
}

static bool never_holds_with(const struct policy_rule *r, uint8_t kind)
{
    for (unsigned i = 0; i < r->n; i++)
        if ((r->selectors[i].kind == POLICY_UID) != (kind == POLICY_UID))
            return true;
    return false;
}

static int parse_selector(struct policy_rule *r, size_t *used, const char *text, size_t len, char *why, size_t n)
{
    struct policy_selector s = {.text = add_word(r, used, text, len)};
    const char *word = r->words + s.text;
    char buf[64];

    if (len && (word[0] == ' ' || word[len - 1] == ' '))
        return refuse(why, n, "no spaces stand around selectors: %s", shown(word, buf));
    for (size_t i = 0; i < ARRAY_LEN(selectors); i++) {
        size_t name = strlen(selectors[i].name);
        bool valued = selectors[i].name[name - 1] == ':';

        if (valued ? strncmp(word, selectors[i].name, name) != 0 : strcmp(word, selectors[i].name) != 0)
            continue;
        s.kind = selectors[i].kind;
        s.value = s.key = (uint16_t)(s.text + len);
        if (s.kind == POLICY_RO) {
            if (r->deny)
                return refuse(why, n, "ro cannot stand in a deny rule: it would refuse nobody");
            if (r->read_only)
                return refuse(why, n, "selector ro stands twice");
            r->read_only = true;
            return 0;
        }
        if (valued) {
            int rc;

            s.value = add_word(r, used, text + name, len - name);
            rc = parse_value(r, &s, why, n);
            if (rc < 0)
                return rc;
        }
        if (stands_already(r, &s))
            return refuse(why, n, "selector %s stands twice, with another value it never holds: give two rules",
                          shown(word, buf));
        if (never_holds_with(r, s.kind))
            return refuse(why, n, "uid: is of processes outside containers, so with %s it never holds: give two rules",
                          shown(s.kind == POLICY_UID ? r->words + r->selectors[0].text : word, buf));
        r->selectors[r->n++] = s;
        return 0;
    }
    if (strncmp(word, "unit:", 5) == 0 || strncmp(word, "cgroup:", 7) == 0)
        return refuse(why, n, "selector %s cannot be enforced by this version", shown(word, buf));
    return refuse(why, n, "unknown selector %s: known are " KNOWN, len ? shown(word, buf) : "\"\"");
}

int policy_parse(const char *text, bool deny, struct policy_rule *ret, char *why, size_t n)
{
    struct policy_rule r = {.deny = deny};
    unsigned count = 0;
    size_t used = 0;

    if (strnlen(text, AGENT_RULE_MAX) >= AGENT_RULE_MAX)
        return refuse(why, n, "a rule has at most %d bytes", AGENT_RULE_MAX - 1);
    if (!*text)
        return refuse(why, n, "the rule is empty: known selectors are " KNOWN);
    if (!printable(text))
        return refuse(why, n, "a rule is one line of UTF-8 without control characters");
    for (const char *at = text;; at++) {
        size_t len = strcspn(at, ",");
        int rc;

        if (count++ == POLICY_SELECTORS_MAX)
            return refuse(why, n, "a rule has at most %d selectors", POLICY_SELECTORS_MAX);
        if (used + 2 * (len + 1) > sizeof(r.words))
            return refuse(why, n, "the rule is too long");
        rc = parse_selector(&r, &used, at, len, why, n);
        if (rc < 0)
            return rc;
        at += len;
        if (!*at)
            break;
    }
    if (r.n == 0)
        return refuse(why, n, "ro alone names nobody: add who may read, as in attached,ro");
    *ret = r;
    return 0;
}

int policy_check(const char *rule, bool deny, char *why, size_t n)
{
    struct policy_rule r;

    return policy_parse(rule, deny, &r, why, n);
}

/* --- deciding --- */

static bool equal(const char *have, const char *want)
{
    return have && strcmp(have, want) == 0;
}

static const char *label_of(const struct policy_caller *c, const char *key)
{
    for (unsigned i = 0; i < c->nlabels; i++)
        if (equal(c->label_keys[i], key))
            return c->label_values[i];
    return NULL;
}

static const char another_user[] = "another user"; /* its number is told where the reason is made */

/* Does it hold? *ret_have: what the caller has instead, or why it cannot. */
static bool holds(const struct policy_rule *r, const struct policy_selector *s, const struct policy_caller *c,
                  const char **ret_have)
{
    const char *value = r->words + s->value;

    *ret_have = NULL;
    if (s->kind == POLICY_UID) {
        *ret_have = c->container || c->container_shaped_cgroup ? "a process in a container"
                    : !c->own_pid_ns                           ? "a process of another pid namespace"
                                                               : another_user;
        return !c->container && !c->container_shaped_cgroup && c->own_pid_ns && c->uid == s->uid;
    }
    if (!c->container) {
        *ret_have = "a process outside all containers";
        return false;
    }
    switch (s->kind) {
    case POLICY_ATTACHED:
        *ret_have = "a container without this volume";
        return c->attached;
    case POLICY_CONTAINER:
        *ret_have = c->name;
        return equal(c->name, value);
    case POLICY_IMAGE:
        *ret_have = c->image;
        return equal(c->image, value);
    case POLICY_IMAGE_ID:
        *ret_have = c->image_id;
        return equal(c->image_id, value);
    case POLICY_LABEL:
        *ret_have = label_of(c, r->words + s->key);
        return equal(*ret_have, value);
    default:
        return false;
    }
}

/* How many selectors hold; all: the rule does. The first that fails goes to *ret_failed with what the caller has. */
static unsigned count_holding(const struct policy_rule *r, bool attached_volume, const struct policy_caller *c,
                              const char **ret_failed, const char **ret_have)
{
    unsigned count = 0;

    *ret_failed = NULL;
    if (!r->n && !r->deny) { /* nobody has parsed it: it says nothing, which must not allow */
        *ret_failed = "(empty)";
        *ret_have = "none";
    }
    for (unsigned i = 0; i < r->n; i++) {
        const struct policy_selector *s = &r->selectors[i];
        const char *have;
        bool ok = holds(r, s, c, &have);

        count += ok;
        /* On an attached volume every container selector of an allow implies `attached`. */
        if (ok && !r->deny && attached_volume && s->kind != POLICY_UID && !c->attached) {
            if (!*ret_failed) {
                *ret_failed = "attached";
                *ret_have = "a container without this volume";
            }
        } else if (!ok && !*ret_failed) {
            *ret_failed = r->words + s->text;
            *ret_have = have ? have : "none";
        }
    }
    return count;
}

__attribute__((format(printf, 5, 6))) static void verdict(struct policy_verdict *ret, bool allow, bool read_only,
                                                          int index, const char *fmt, ...)
{
    char line[2 * AGENT_TEXT_MAX];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    *ret = (struct policy_verdict){.allow = allow, .read_only = read_only, .rule_index = index};
    escape_text(line, ret->reason, sizeof(ret->reason));
}

static void without_rules(bool attached_volume, const struct policy_caller *c, struct policy_verdict *ret)
{
    if (attached_volume && c->container && c->attached)
        verdict(ret, true, false, -1, "default rule: the container has this volume attached");
    else if (attached_volume)
        verdict(ret, false, false, -1, "default rule attached: the caller is %s",
                c->container ? "a container without this volume" : "a process outside all containers");
    else
        verdict(ret, false, false, -1, "no rule allows anybody");
}

void policy_evaluate(const struct policy_rule *rules, size_t n, bool attached_volume,
                     const struct policy_caller *caller, bool write, struct policy_verdict *ret)
{
    const char *failed, *have, *near_failed = NULL, *near_have = NULL;
    int best = -1, nearest = -1;
    unsigned near_count = 0;
    const char *keys[POLICY_LABELS_MAX];
    bool any_allow = false;

    if (policy_labels(rules, n, keys) > POLICY_LABELS_MAX) { /* some were not asked for: what they deny is not known */
        verdict(ret, false, false, -1, "the rules name more than %d labels, so nobody is let in", POLICY_LABELS_MAX);
        return;
    }
    if (caller->container && caller->foreign_ns) {
        verdict(ret, false, false, -1, "in the container's cgroup, but with the host's pid and mount namespaces");
        return;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned count = count_holding(&rules[i], attached_volume, caller, &failed, &have);

        if (rules[i].deny) {
            if (!failed) {
                verdict(ret, false, false, (int)i, "rule %zu denies it", i + 1);
                return;
            }
            continue;
        }
        any_allow = true;
        if (!failed && (best < 0 || (rules[best].read_only && !rules[i].read_only)))
            best = (int)i;
        if (failed && (nearest < 0 || count > near_count)) {
            nearest = (int)i;
            near_count = count;
            near_failed = failed;
            near_have = have;
        }
    }
    if (!any_allow)
        without_rules(attached_volume, caller, ret);
    else if (best >= 0 && write && rules[best].read_only)
        verdict(ret, false, false, best, "rule %d allows reading only", best + 1);
    else if (best >= 0)
        verdict(ret, true, rules[best].read_only, best, "rule %d allows it%s", best + 1,
                rules[best].read_only ? ", read-only" : "");
    else if (near_have == another_user)
        verdict(ret, false, false, nearest,
                "no rule allows it; nearest is rule %d, whose %s does not hold: have uid:%u", nearest + 1, near_failed,
                caller->uid);
    else
        verdict(ret, false, false, nearest, "no rule allows it; nearest is rule %d, whose %s does not hold: have %s",
                nearest + 1, near_failed, near_have);
}

void policy_decide(const struct agent_rule *rules, unsigned n, bool attached_volume, const struct policy_caller *caller,
                   struct policy_verdict *ret)
{
    struct policy_rule parsed[AGENT_RULES_MAX];
    char why[256];

    if (n > AGENT_RULES_MAX) {
        verdict(ret, false, false, -1, "more than %d rules", AGENT_RULES_MAX);
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        if (policy_parse(rules[i].rule, rules[i].deny, &parsed[i], why, sizeof(why)) < 0) {
            verdict(ret, false, false, (int)i, "rule %u cannot be understood, so nobody is let in: %s", i + 1, why);
            return;
        }
    }
    policy_evaluate(parsed, n, attached_volume, caller, false, ret);
}

/* --- questions about a set of rules --- */

size_t policy_labels(const struct policy_rule *rules, size_t n, const char *keys[POLICY_LABELS_MAX])
{
    size_t count = 0;

    for (size_t i = 0; i < n; i++) {
        for (unsigned k = 0; k < rules[i].n; k++) {
            const char *key = rules[i].words + rules[i].selectors[k].key;
            bool seen = rules[i].selectors[k].kind != POLICY_LABEL;

            for (size_t j = 0; j < MIN(count, (size_t)POLICY_LABELS_MAX) && !seen; j++)
                seen = strcmp(keys[j], key) == 0;
            if (!seen && count < POLICY_LABELS_MAX)
                keys[count] = key;
            count += !seen;
        }
    }
    return count;
}

bool policy_local(const struct policy_rule *rules, size_t n)
{
    for (size_t i = 0; i < n; i++)
        for (unsigned k = 0; k < rules[i].n && !rules[i].deny; k++)
            if (rules[i].selectors[k].kind == POLICY_UID)
                return true;
    return false;
}
