/* supervisor.h - keeps one coffer-keyd alive and cofferd its broker. */
#ifndef COFFER_PLUGIN_SUPERVISOR_H
#define COFFER_PLUGIN_SUPERVISOR_H

#include "common.h"

/* Starts the thread that finds or starts coffer-keyd. agent_up() is called, on a thread of its own, whenever another
 * keyd process than before answers. 0 or -errno. */
int supervisor_start(void (*agent_up)(void));
/* Counts the keyd processes that have come up; 0: none yet. A volume channel belongs to one of them. */
uint64_t supervisor_generation(void);
/* True while a keyd answers. */
bool supervisor_is_up(void);
/* What is damaged and to be done, for one line, where that keeps it from coming up; else NULL. */
const char *supervisor_damage(void);
/* Ends coffer-keyd for good: SIGTERM, and SIGKILL after 10 s. Returns when it is gone. */
void supervisor_stop(void);

#endif
