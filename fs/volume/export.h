/* export.h - exports of a view, whole or what changed since another one (EXPORT.md). coffer/export.h has the rest. */
#ifndef COFFER_VOLUME_EXPORT_H
#define COFFER_VOLUME_EXPORT_H

#include "coffer/export.h"
#include "fs/volume/view.h"

/*
 * Writes what the view has: as a whole stream (since NULL), or as an increment, which takes a copy of the state `since`
 * to that of the view. Both views are of one volume, `since` of an earlier state of it, and stay open.
 * As volume_export; -EINVAL: other volumes, or since is the newer one; -ENOTSUP: no increment, as a view has no root on
 * the disk (view.h).
 */
int export_view(struct view *view, struct view *since, const struct export_secret *s, const struct export_io *io,
                const struct volume_report *report);

#endif
