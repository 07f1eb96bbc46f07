/* fuzz_facts.c - the engine's JSON: the first byte chooses the source, the rest is the document. What is accepted must
 * pass the check that the agent makes of a child's answer. */
#include "keystore/facts.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct facts_job job = {
        .nlabels = 2,
        .container = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        .volume = "vol",
        .driver = "coffer",
        .labels = {"tier", "none"},
    };
    struct facts f;

    if (n < 1)
        return 0;
    job.source = data[0] & 1 ? AGENT_FACTS_FILE : AGENT_FACTS_API;
    facts_parse((const char *)data + 1, n - 1, &job, &f);
    if (!facts_valid(&f, &job))
        abort();
    return 0;
}
