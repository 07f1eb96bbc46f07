/* lead.h - which of the threads reads the device; see lead.c. self is a thread's number, from 1 on. */
#ifndef COFFER_MOUNT_LEAD_H
#define COFFER_MOUNT_LEAD_H

#include <stdbool.h>

/* Starts the watch. 0 or -errno. */
int lead_start(void);
/* Sleeps until this thread leads. */
void lead_wait(unsigned self);
/* Before something that may block, also in a request, and at the thread's end: another one leads from now on. */
void lead_pass(unsigned self);
/* Around a request that the leader serves itself. */
void lead_serving(void);
/* False: it took so long, or lead_pass was called, that another thread leads. */
bool lead_served(unsigned self);

#endif
