/*
 * policy.h - the rules of a volume: their text, and the decision. Pure: no I/O, no allocation, nothing kept.
 *
 *   rule      selector { "," selector }         all must hold; no spaces around them, at most POLICY_SELECTORS_MAX
 *   selector  attached                          the caller's container has this volume among its mounts
 *             container:NAME  image:REF         as the engine says of the caller's container
 *             image-id:sha256:HEX64  label:KEY=VALUE
 *             uid:N                             the caller's real uid; it is in no container, in the agent's own pid
 *                                               namespace, and nothing in its cgroup paths looks like a container
 *             ro                                (allow only) the access granted is read-only
 *
 * `unit:` and `cgroup:` are refused in this version. Default deny; deny wins; access is read-write if any allow that
 * holds lacks `ro`. On an attached volume (agent_volume.attached) each container selector of an allow implies
 * `attached`, and without any allow rule the default rule `attached` stands.
 */
#ifndef COFFER_KEYSTORE_POLICY_H
#define COFFER_KEYSTORE_POLICY_H

#include "coffer/agent.h"

#define POLICY_SELECTORS_MAX 16
#define POLICY_VALUE_MAX     255 /* bytes of a name, reference or label value; a label's key: 127 */
#define POLICY_KEY_MAX       127
#define POLICY_LABELS_MAX    32 /* distinct label keys of one volume's rules */
#define POLICY_CGROUPS_MAX   40

enum policy_kind {
    POLICY_ATTACHED,
    POLICY_CONTAINER,
    POLICY_IMAGE,
    POLICY_IMAGE_ID,
    POLICY_LABEL,
    POLICY_UID,
    POLICY_RO,
};

struct policy_selector {
    uint8_t kind;   /* enum policy_kind */
    uint16_t text;  /* offsets into the rule's words: the selector, ... */
    uint16_t key;   /* ... a label's key, ... */
    uint16_t value; /* ... the value ("" for attached and ro) */
    uint32_t uid;
};

/* A parsed rule. It may be copied. */
struct policy_rule {
    bool deny;
    bool read_only; /* `ro` is among its selectors */
    uint8_t n;
    struct policy_selector selectors[POLICY_SELECTORS_MAX]; /* without `ro` */
    char words[2 * AGENT_RULE_MAX];
};

/* Who asks. Pointers are the caller's; NULL is a value that is not known and equals nothing. */
struct policy_caller {
    bool container;               /* in a container that the engine knows: the fields below speak of it */
    bool foreign_ns;              /* in its cgroup, but with the host's pid and mount namespaces: refused */
    bool container_shaped_cgroup; /* some component of its cgroup paths looks like a container's */
    bool own_pid_ns;              /* in the agent's own pid namespace */
    bool attached;
    uint32_t uid;
    const char *name; /* without the slash */
    const char *image;
    const char *image_id;
    unsigned nlabels;
    const char *label_keys[POLICY_LABELS_MAX]; /* of the keys asked for, those that the container has */
    const char *label_values[POLICY_LABELS_MAX];
    unsigned ncgroups; /* for unit: and cgroup: of a later version; not looked at */
    const char *cgroups[POLICY_CGROUPS_MAX];
    const char *hierarchies[POLICY_CGROUPS_MAX];
};

struct policy_verdict {
    bool allow;
    bool read_only;              /* allowed, but not for writing */
    int rule_index;              /* that decided, or (refused) came nearest, from 0; -1: none, or the default rule */
    char reason[AGENT_TEXT_MAX]; /* one line of printable ASCII; counts rules from 1 */
};

/* Parses a rule. 0, or -EINVAL with one line that says why in why (n bytes). */
int policy_parse(const char *text, bool deny, struct policy_rule *ret, char *why, size_t n);
/* Only checks it. */
int policy_check(const char *rule, bool deny, char *why, size_t n);

/* The decision. write: the caller asks to write, so a rule with `ro` is not enough. Sets *ret wholly. */
void policy_evaluate(const struct policy_rule *rules, size_t n, bool attached_volume,
                     const struct policy_caller *caller, bool write, struct policy_verdict *ret);
/* The same upon the texts that the keystore holds, not for writing: whoever asks to write looks at read_only. A text
 * that does not parse (an older or newer version took it) refuses everything: what it meant to deny is not known. */
void policy_decide(const struct agent_rule *rules, unsigned n, bool attached_volume, const struct policy_caller *caller,
                   struct policy_verdict *ret);

/* The distinct label keys that the rules ask about; the pointers are the rules'. Returns their number; where it is more
 * than POLICY_LABELS_MAX, only those first ones are set: such a set of rules must be refused. */
size_t policy_labels(const struct policy_rule *rules, size_t n, const char *keys[POLICY_LABELS_MAX]);
/* Whether an allow rule names a selector that no container can meet (uid:): the volume is a local one, not `attached`.
 */
bool policy_local(const struct policy_rule *rules, size_t n);

#endif
