/* fuzz_policy.c - the text of a rule: the first byte chooses allow or deny, the rest is the rule. What is accepted must
 * be canonical enough to be used: every word ends inside the rule, each selector stands in the text, callers of every
 * sort get a decision, and nobody without a value is let in. What is refused has a reason of one printable line. */
#include "keystore/policy.h"

#include <stdlib.h>
#include <string.h>

static void must(bool ok)
{
    if (!ok)
        abort();
}

static void check_line(const char *s, size_t n)
{
    must(memchr(s, 0, n) && *s);
    for (; *s; s++)
        must(*s >= 0x20 && *s < 0x7f);
}

static void check_rule(const struct policy_rule *r, const char *text)
{
    const char *end = r->words + sizeof(r->words);

    must(r->n >= 1 && r->n <= POLICY_SELECTORS_MAX && !(r->deny && r->read_only));
    for (unsigned i = 0; i < r->n; i++) {
        const struct policy_selector *s = &r->selectors[i];

        must(s->kind < POLICY_RO && s->text < sizeof(r->words) && s->key < sizeof(r->words) &&
             s->value < sizeof(r->words));
        must(memchr(r->words + s->text, 0, (size_t)(end - (r->words + s->text))) != NULL);
        must(memchr(r->words + s->key, 0, (size_t)(end - (r->words + s->key))) != NULL);
        must(memchr(r->words + s->value, 0, (size_t)(end - (r->words + s->value))) != NULL);
        must(strstr(text, r->words + s->text) && strlen(r->words + s->value) <= POLICY_VALUE_MAX);
        must(s->kind != POLICY_LABEL || (*(r->words + s->key) && strlen(r->words + s->key) <= POLICY_KEY_MAX));
    }
}

/* A caller whose values are the rule's own is let in by it, one that nothing is known of is not. */
static void check_decisions(const struct policy_rule *r)
{
    struct policy_caller nobody = {.uid = UINT32_MAX}, fits = {.attached = true, .own_pid_ns = true};
    struct policy_verdict v;

    fits.container = r->selectors[0].kind != POLICY_UID;
    for (unsigned i = 0; i < r->n; i++) {
        const struct policy_selector *s = &r->selectors[i];
        const char *value = r->words + s->value;

        if (s->kind == POLICY_CONTAINER)
            fits.name = value;
        else if (s->kind == POLICY_IMAGE)
            fits.image = value;
        else if (s->kind == POLICY_IMAGE_ID)
            fits.image_id = value;
        else if (s->kind == POLICY_UID)
            fits.uid = s->uid;
        if (s->kind != POLICY_LABEL)
            continue;
        fits.label_keys[fits.nlabels] = r->words + s->key;
        fits.label_values[fits.nlabels++] = value;
    }
    for (int how = 0; how < 4; how++) {
        policy_evaluate(r, 1, how & 1, &nobody, how & 2, &v);
        check_line(v.reason, sizeof(v.reason));
        must(!v.allow);
        policy_evaluate(r, 1, how & 1, &fits, how & 2, &v);
        check_line(v.reason, sizeof(v.reason));
        must(v.allow == (!r->deny && !(r->read_only && (how & 2))) && v.rule_index == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct agent_rule stored = {0};
    struct policy_rule r;
    struct policy_caller nobody = {0};
    struct policy_verdict v;
    char *text, why[128];

    if (n < 1)
        return 0;
    text = malloc(n); /* exactly, so that one byte too far is seen */
    must(text != NULL);
    memcpy(text, data + 1, n - 1);
    text[n - 1] = 0;
    if (policy_parse(text, data[0] & 1, &r, why, sizeof(why)) < 0) {
        check_line(why, sizeof(why));
    } else {
        check_rule(&r, text);
        check_decisions(&r);
    }
    /* the record of the keystore, with or without its NUL */
    stored.deny = data[0] & 1;
    memcpy(stored.rule, data + 1, n - 1 < sizeof(stored.rule) ? n - 1 : sizeof(stored.rule));
    policy_decide(&stored, 1, false, &nobody, &v);
    must(!v.allow);
    check_line(v.reason, sizeof(v.reason));
    free(text);
    return 0;
}
