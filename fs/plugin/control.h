/* control.h - the control socket <run>/cofferd.sock (coffer/CONTROL.md). */
#ifndef COFFER_PLUGIN_CONTROL_H
#define COFFER_PLUGIN_CONTROL_H

#include "common.h"

/* Serves the socket with a thread for each request. quit() is called after `down` has been answered. 0 or -errno with
 * the reason. */
int control_serve_start(void (*quit)(void), struct why *why);

#endif
