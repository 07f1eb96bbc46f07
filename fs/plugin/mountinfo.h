/*
 * mountinfo.h - which mounts exist, read from /proc. Never looks at a mounted FUSE directory itself: a stat() of one
 * asks its server, and may wait for it.
 */
#ifndef COFFER_PLUGIN_MOUNTINFO_H
#define COFFER_PLUGIN_MOUNTINFO_H

#include <stdbool.h>
#include <stddef.h>

#define MOUNT_DEV_MAX 32 /* "major:minor" */

/* Undoes mountinfo's \ooo escapes in place. */
void mountinfo_unescape(char *s);
/* The device of the topmost mount at path in our own namespace. 0, or -ENOENT. */
int mountinfo_device(const char *path, char ret_dev[MOUNT_DEV_MAX]);
/*
 * True when the filesystem dev is mounted, in any mount namespace, anywhere but at our_paths: a container lives with
 * it. A mount point in another namespace that ends with one of our_paths is a copy that came along when the namespace
 * was made; nobody asked for it there.
 */
bool mountinfo_used_elsewhere(const char *dev, const char *const *our_paths, size_t n);

#endif
