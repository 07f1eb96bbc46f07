/*
 * fsmodel.h - a plain filesystem in memory, random operations that go to it and to the engine with every result
 * compared, and listings (struct snap) of either side that can be told apart by one number.
 *
 * A world is one model and the engine's directory that it stands for (the root, or one of its own in a test with
 * several threads). Times are taken over from the engine after each operation and must then survive whatever comes.
 */
#ifndef TESTS_FSMODEL_H
#define TESTS_FSMODEL_H

#include "coffer/volume.h"
#include "tests/crash/recstore.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <sys/xattr.h>

#ifndef RENAME_NOREPLACE
#define RENAME_NOREPLACE 1
#define RENAME_EXCHANGE  2
#define RENAME_WHITEOUT  4
#endif

/* --- the model --- */

#define M_PAGE 4096u

struct m_page {
    uint64_t no;
    uint8_t *b;
};

struct m_xattr {
    char *name;
    uint8_t *value;
    size_t len;
};

struct m_inode;
struct m_entry {
    char *name;
    struct m_inode *i;
};

struct m_inode {
    uint64_t ino, size;
    uint32_t mode, uid, gid, nlink, rdev;
    int64_t atime, mtime, ctime;
    struct m_page *page; /* sorted; absent: zeroes */
    size_t pages, pages_cap;
    struct m_entry *entry;
    size_t entries, entries_cap;
    struct m_xattr *x;
    size_t xs;
    char *target;
    struct m_inode *parent; /* of a directory that has a name */
    uint64_t refs;          /* references that we hold in the engine */
    bool tmpfile;           /* has never had a name */
    bool hashed;
    uint64_t hash; /* of the content, if hashed */
};

struct model {
    struct m_inode *root;
    struct m_inode **inode; /* all that live, the root first */
    size_t n, cap;
    uint64_t pages; /* of all files */
};

UNUSED static struct m_inode *m_inode_new(struct model *m, uint64_t ino, uint32_t mode, uint32_t uid, uint32_t gid)
{
    struct m_inode *i = xcalloc(1, sizeof(*i));

    i->ino = ino;
    i->mode = mode;
    i->uid = uid;
    i->gid = gid;
    i->nlink = S_ISDIR(mode) ? 2 : 1;
    if (m->n == m->cap) {
        m->cap = m->cap ? 2 * m->cap : 64;
        m->inode = xrealloc(m->inode, m->cap * sizeof(struct m_inode *));
    }
    m->inode[m->n++] = i;
    return i;
}

static void m_inode_free(struct model *m, struct m_inode *i)
{
    m->pages -= i->pages;
    for (size_t k = 0; k < i->pages; k++)
        free(i->page[k].b);
    for (size_t k = 0; k < i->entries; k++)
        free(i->entry[k].name);
    for (size_t k = 0; k < i->xs; k++) {
        free(i->x[k].name);
        free(i->x[k].value);
    }
    free(i->page);
    free(i->entry);
    free(i->x);
    free(i->target);
    free(i);
}

UNUSED static struct model *model_new(uint64_t root_ino, uint32_t mode, uint32_t uid, uint32_t gid)
{
    struct model *m = xcalloc(1, sizeof(*m));

    m->root = m_inode_new(m, root_ino, mode, uid, gid);
    return m;
}

UNUSED static void model_free(struct model *m)
{
    if (!m)
        return;
    for (size_t k = 0; k < m->n; k++)
        m_inode_free(m, m->inode[k]);
    free(m->inode);
    free(m);
}

/* Frees the inode if neither names nor references hold it. */
UNUSED static void m_settle(struct model *m, struct m_inode *i)
{
    if (i->nlink != 0 || i->refs != 0 || i == m->root)
        return;
    for (size_t k = 0; k < m->n; k++)
        if (m->inode[k] == i) {
            m->inode[k] = m->inode[--m->n];
            break;
        }
    m_inode_free(m, i);
}

/* What the end of a mount does: no references are left. */
UNUSED static void model_forget_all(struct model *m)
{
    for (size_t k = m->n; k-- > 0;) {
        m->inode[k]->refs = 0;
        m_settle(m, m->inode[k]);
    }
}

/* The place of page no, or where it would go. */
static size_t m_page_at(const struct m_inode *i, uint64_t no)
{
    size_t lo = 0, hi = i->pages;

    while (lo < hi) {
        size_t mid = (lo + hi) / 2;

        if (i->page[mid].no < no)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

UNUSED static void m_read(const struct m_inode *i, uint64_t off, void *buf, size_t n)
{
    uint8_t *out = buf;

    while (n > 0) {
        size_t in = off % M_PAGE, k = MIN(n, M_PAGE - in), at = m_page_at(i, off / M_PAGE);

        if (at < i->pages && i->page[at].no == off / M_PAGE)
            memcpy(out, i->page[at].b + in, k);
        else
            memset(out, 0, k);
        out += k;
        off += k;
        n -= k;
    }
}

/* Puts bytes without changing the size. */
UNUSED static void m_put(struct model *m, struct m_inode *i, uint64_t off, const void *buf, size_t n)
{
    const uint8_t *p = buf;

    i->hashed = false;
    while (n > 0) {
        size_t in = off % M_PAGE, k = MIN(n, M_PAGE - in), at = m_page_at(i, off / M_PAGE);

        if (at == i->pages || i->page[at].no != off / M_PAGE) {
            if (i->pages == i->pages_cap) {
                i->pages_cap = i->pages_cap ? 2 * i->pages_cap : 8;
                i->page = xrealloc(i->page, i->pages_cap * sizeof(*i->page));
            }
            memmove(i->page + at + 1, i->page + at, (i->pages - at) * sizeof(*i->page));
            i->page[at] = (struct m_page){.no = off / M_PAGE, .b = xcalloc(1, M_PAGE)};
            i->pages++;
            m->pages++;
        }
        memcpy(i->page[at].b + in, p, k);
        p += k;
        off += k;
        n -= k;
    }
}

/* Zeroes [off, end). */
UNUSED static void m_zero(struct model *m, struct m_inode *i, uint64_t off, uint64_t end)
{
    size_t from = m_page_at(i, off / M_PAGE), to = from;

    i->hashed = false;
    for (size_t k = from; k < i->pages && i->page[k].no * M_PAGE < end; k++) {
        uint64_t start = i->page[k].no * M_PAGE, a = MAX(start, off), b = MIN(start + M_PAGE, end);

        if (b > a)
            memset(i->page[k].b + (a - start), 0, b - a);
    }
    for (size_t k = from; k < i->pages; k++) {
        uint64_t start = i->page[k].no * M_PAGE;

        if (start >= off && start + M_PAGE <= end) {
            free(i->page[k].b);
            m->pages--;
        } else {
            i->page[to++] = i->page[k];
        }
    }
    if (from < i->pages)
        i->pages = to;
}

UNUSED static void m_truncate(struct model *m, struct m_inode *i, uint64_t size)
{
    if (size < i->size)
        m_zero(m, i, size, UINT64_MAX / M_PAGE * M_PAGE);
    i->size = size;
}

static struct m_entry *m_find(const struct m_inode *dir, const char *name)
{
    for (size_t k = 0; k < dir->entries; k++)
        if (strcmp(dir->entry[k].name, name) == 0)
            return &dir->entry[k];
    return NULL;
}

/* Adds the entry and what a subdirectory means for links. */
UNUSED static void m_enter(struct m_inode *dir, const char *name, struct m_inode *i)
{
    if (dir->entries == dir->entries_cap) {
        dir->entries_cap = dir->entries_cap ? 2 * dir->entries_cap : 8;
        dir->entry = xrealloc(dir->entry, dir->entries_cap * sizeof(*dir->entry));
    }
    dir->entry[dir->entries++] = (struct m_entry){xstrdup(name), i};
    if (S_ISDIR(i->mode)) {
        dir->nlink++;
        i->parent = dir;
    }
}

UNUSED static struct m_inode *m_leave(struct m_inode *dir, const char *name)
{
    struct m_entry *e = m_find(dir, name);
    struct m_inode *i = e->i;

    free(e->name);
    *e = dir->entry[--dir->entries];
    if (S_ISDIR(i->mode)) {
        dir->nlink--;
        i->parent = NULL;
    }
    return i;
}

UNUSED static bool m_is_below(const struct m_inode *i, const struct m_inode *top)
{
    for (; i; i = i->parent)
        if (i == top)
            return true;
    return false;
}

static struct m_xattr *m_xattr(struct m_inode *i, const char *name)
{
    for (size_t k = 0; k < i->xs; k++)
        if (strcmp(i->x[k].name, name) == 0)
            return &i->x[k];
    return NULL;
}

/* --- listings --- */

struct snap_entry {
    char *path;
    uint64_t ino, size, content, xattrs, loose, full;
    uint32_t mode, uid, gid, nlink, rdev;
    int64_t atime, mtime, ctime;
};

struct snap {
    struct snap_entry *e;
    size_t n, cap;
    uint64_t full;  /* tells states apart */
    uint64_t loose; /* the same without inode numbers and times */
    int err;        /* of a walk of the engine; where: */
    char why[600];
};

UNUSED static void snap_free(struct snap *s)
{
    if (!s)
        return;
    for (size_t k = 0; k < s->n; k++)
        free(s->e[k].path);
    free(s->e);
    free(s);
}

/* Takes path. */
static void snap_add(struct snap *s, struct snap_entry e)
{
    uint64_t h;

    if (S_ISDIR(e.mode))
        e.size = 0; /* a directory's size is the engine's own business */
    h = hash_bytes(e.path, strlen(e.path), 1);
    h = hash_mix(hash_mix(hash_mix(h, e.size), e.content), e.xattrs);
    h = hash_mix(h ^ e.mode, hash_mix(e.uid, e.gid));
    e.loose = hash_mix(h ^ e.nlink, e.rdev);
    h = hash_mix(e.loose ^ e.ino, (uint64_t)e.atime);
    e.full = hash_mix(h ^ (uint64_t)e.mtime, (uint64_t)e.ctime);
    s->full += e.full;
    s->loose += e.loose;
    if (s->n == s->cap) {
        s->cap = s->cap ? 2 * s->cap : 64;
        s->e = xrealloc(s->e, s->cap * sizeof(*s->e));
    }
    s->e[s->n++] = e;
}

static uint64_t hash_page(uint64_t no, const uint8_t *page)
{
    return memcmp(page, image_zero, M_PAGE) == 0 ? 0 : hash_bytes(page, M_PAGE, no);
}

static uint64_t hash_xattr(const char *name, const void *value, size_t n)
{
    return hash_bytes(name, strlen(name), hash_bytes(value, n, 7));
}

static uint64_t m_content(struct m_inode *i)
{
    if (i->target)
        return hash_bytes(i->target, strlen(i->target), 9);
    if (!i->hashed) {
        i->hash = 0;
        for (size_t k = 0; k < i->pages; k++)
            i->hash += hash_page(i->page[k].no, i->page[k].b);
        i->hashed = true;
    }
    return i->hash;
}

static void snap_model_at(struct snap *s, struct m_inode *i, const char *path)
{
    struct snap_entry e = {.path = xstrdup(path),
                           .ino = i->ino,
                           .size = i->size,
                           .content = m_content(i),
                           .mode = i->mode,
                           .uid = i->uid,
                           .gid = i->gid,
                           .nlink = i->nlink,
                           .rdev = i->rdev,
                           .atime = i->atime,
                           .mtime = i->mtime,
                           .ctime = i->ctime};

    for (size_t k = 0; k < i->xs; k++)
        e.xattrs += hash_xattr(i->x[k].name, i->x[k].value, i->x[k].len);
    snap_add(s, e);
    for (size_t k = 0; k < i->entries; k++) {
        char *sub = xasprintf("%s/%s", path, i->entry[k].name);

        snap_model_at(s, i->entry[k].i, sub);
        free(sub);
    }
}

UNUSED static struct snap *snap_model(struct model *m)
{
    struct snap *s = xcalloc(1, sizeof(*s));

    snap_model_at(s, m->root, "");
    return s;
}

static int snap_error(struct snap *s, int err, const char *path, const char *what)
{
    if (s->err == 0) {
        s->err = err;
        snprintf(s->why, sizeof(s->why), "%s of %.400s: %s", what, path, strerror(-err));
    }
    return err;
}

/* The content of a file as m_content has it. */
static int vol_content(struct volume *v, uint64_t ino, uint64_t size, uint64_t *ret_hash)
{
    const size_t piece = 256 << 10;
    uint8_t *buf = xmalloc(piece);
    uint64_t h = 0;
    int rc = 0;

    for (uint64_t off = 0; off < size;) {
        size_t want;
        ssize_t n;

        if (size > (16 << 20)) {
            rc = vol_seek(v, ino, off, SEEK_DATA, &off);
            if (rc < 0)
                break;
            off -= off % M_PAGE;
        }
        want = MIN(piece, size - off);
        n = vol_read(v, ino, off, buf, want);
        if (n < 0 || (size_t)n != want) {
            rc = n < 0 ? (int)n : -ERANGE;
            break;
        }
        memset(buf + want, 0, piece - want);
        for (size_t at = 0; at < want; at += M_PAGE)
            h += hash_page((off + at) / M_PAGE, buf + at);
        off += want;
    }
    free(buf);
    *ret_hash = h;
    return rc == -ENXIO ? 0 : rc;
}

static int vol_xattrs(struct volume *v, uint64_t ino, uint64_t *ret_hash)
{
    ssize_t n = vol_listxattr(v, ino, NULL, 0), k;
    char *list = NULL;
    uint8_t value[VOLUME_XATTR_MAX];
    uint64_t h = 0;

    if (n > 0) {
        list = xmalloc((size_t)n);
        n = vol_listxattr(v, ino, list, (size_t)n);
    }
    for (char *p = list; n > 0 && p < list + n; p += strlen(p) + 1) {
        k = vol_getxattr(v, ino, p, value, sizeof(value));
        if (k < 0) {
            n = k;
            break;
        }
        h += hash_xattr(p, value, (size_t)k);
    }
    free(list);
    *ret_hash = h;
    return n < 0 ? (int)n : 0;
}

struct listed {
    char **name;
    uint64_t *ino, *cookie;
    uint32_t *type;
    size_t n, cap, stop; /* takes no more than stop */
    const char *bad;
};

static int listed_entry(void *ctx, const char *name, uint64_t ino, uint32_t type, uint64_t cookie,
                        const struct vattr *attr)
{
    struct listed *l = ctx;

    if (l->n == l->stop)
        return 1;
    if (attr && (attr->ino != ino || (attr->mode & S_IFMT) != (type & S_IFMT)))
        l->bad = "readdir: attributes of another inode";
    if (l->n == l->cap) {
        l->cap = l->cap ? 2 * l->cap : 64;
        l->name = xrealloc(l->name, l->cap * sizeof(*l->name));
        l->ino = xrealloc(l->ino, l->cap * sizeof(*l->ino));
        l->cookie = xrealloc(l->cookie, l->cap * sizeof(*l->cookie));
        l->type = xrealloc(l->type, l->cap * sizeof(*l->type));
    }
    l->name[l->n] = xstrdup(name);
    l->ino[l->n] = ino;
    l->type[l->n] = type;
    l->cookie[l->n++] = cookie;
    return 0;
}

static void listed_free(struct listed *l)
{
    for (size_t k = 0; k < l->n; k++)
        free(l->name[k]);
    free(l->name);
    free(l->ino);
    free(l->cookie);
    free(l->type);
}

static int snap_volume_at(struct snap *s, struct volume *v, uint64_t ino, const char *path, unsigned depth)
{
    struct listed l = {.stop = SIZE_MAX};
    struct snap_entry e = {0};
    char target[SYMLINK_MAX + 1];
    struct vattr a;
    ssize_t n;
    int rc = vol_getattr(v, ino, &a);

    if (rc < 0)
        return snap_error(s, rc, path, "getattr");
    if (depth > 200 || s->n > 100000)
        return snap_error(s, -ELOOP, path, "walk");
    e = (struct snap_entry){.ino = ino,
                            .size = a.size,
                            .mode = a.mode,
                            .uid = a.uid,
                            .gid = a.gid,
                            .nlink = a.nlink,
                            .rdev = a.rdev,
                            .atime = a.atime,
                            .mtime = a.mtime,
                            .ctime = a.ctime};
    if (a.ino != ino)
        return snap_error(s, -EUCLEAN, path, "ino");
    if (S_ISREG(a.mode)) {
        rc = vol_content(v, ino, a.size, &e.content);
        if (rc < 0)
            return snap_error(s, rc, path, "read");
    } else if (S_ISLNK(a.mode)) {
        n = vol_readlink(v, ino, target, sizeof(target));
        if (n < 0)
            return snap_error(s, (int)n, path, "readlink");
        e.content = hash_bytes(target, (size_t)n, 9);
    }
    rc = vol_xattrs(v, ino, &e.xattrs);
    if (rc < 0)
        return snap_error(s, rc, path, "xattrs");
    e.path = xstrdup(path);
    snap_add(s, e);
    if (!S_ISDIR(a.mode))
        return 0;
    rc = vol_readdir(v, ino, 0, depth % 2 == 0, listed_entry, &l);
    if (rc < 0)
        snap_error(s, rc, path, "readdir");
    for (size_t k = 0; k < l.n && rc >= 0; k++) {
        char *sub = xasprintf("%s/%s", path, l.name[k]);

        if (strcmp(l.name[k], ".") != 0 && strcmp(l.name[k], "..") != 0) {
            rc = vol_lookup(v, ino, l.name[k], &a);
            if (rc < 0)
                snap_error(s, rc, sub, "lookup");
            else if (a.ino != l.ino[k])
                rc = snap_error(s, -EUCLEAN, sub, "lookup (another inode than readdir's)");
            else
                rc = snap_volume_at(s, v, a.ino, sub, depth + 1);
            if (rc >= 0)
                vol_forget(v, a.ino, 1);
        }
        free(sub);
    }
    listed_free(&l);
    return rc < 0 ? rc : 0;
}

/* Walks the engine from ino. An error is in err and why. */
UNUSED static struct snap *snap_volume(struct volume *v, uint64_t ino)
{
    struct snap *s = xcalloc(1, sizeof(*s));

    snap_volume_at(s, v, ino, "", 0);
    return s;
}

static int snap_entry_cmp(const void *a, const void *b)
{
    return strcmp(((const struct snap_entry *)a)->path, ((const struct snap_entry *)b)->path);
}

/* Prints at most 12 differences. Returns their number. */
UNUSED static unsigned snap_diff(struct snap *have, struct snap *want, bool loose, FILE *out)
{
    size_t i = 0, j = 0;
    unsigned diffs = 0;

    qsort(have->e, have->n, sizeof(*have->e), snap_entry_cmp);
    qsort(want->e, want->n, sizeof(*want->e), snap_entry_cmp);
    while (i < have->n || j < want->n) {
        const struct snap_entry *h = &have->e[i], *w = &want->e[j];
        int c = i == have->n ? 1 : j == want->n ? -1 : strcmp(h->path, w->path);

        i += c <= 0;
        j += c >= 0;
        if (c == 0 && (loose ? h->loose == w->loose : h->full == w->full))
            continue;
        if (++diffs > 12 || !out)
            continue;
        if (c < 0)
            fprintf(out, "    %s: should not be there (ino %llu)\n", h->path, (unsigned long long)h->ino);
        else if (c > 0)
            fprintf(out, "    %s: missing (ino %llu)\n", w->path, (unsigned long long)w->ino);
        else
            fprintf(out, "    %s: ino %llu/%llu mode %o/%o owner %u:%u/%u:%u nlink %u/%u size %llu/%llu%s%s%s\n",
                    h->path, (unsigned long long)h->ino, (unsigned long long)w->ino, h->mode, w->mode, h->uid, h->gid,
                    w->uid, w->gid, h->nlink, w->nlink, (unsigned long long)h->size, (unsigned long long)w->size,
                    h->content != w->content ? " CONTENT" : "", h->xattrs != w->xattrs ? " XATTRS" : "",
                    h->atime != w->atime || h->mtime != w->mtime || h->ctime != w->ctime ? " TIMES" : "");
    }
    return diffs;
}

/*
 * What one inode may show while an operation of several transactions is under way. All else is as before the operation
 * and, between transactions, nothing is torn: a block of the volume is old or new, and the size too.
 */
enum middle_kind {
    MIDDLE_NONE,   /* one transaction: before or after it */
    MIDDLE_SIZED,  /* setattr: first the size (`snap`, with other times of the inode), then the rest */
    MIDDLE_BLOCKS, /* a hole that is being made: each block old or new, the size old or new, other times */
};

struct middle {
    enum middle_kind kind;
    uint64_t ino;
    struct snap *snap;
    uint8_t *was, *is; /* contents, with zeroes up to bytes */
    uint64_t was_size, is_size, bytes;
};

UNUSED static void middle_clear(struct middle *m)
{
    snap_free(m->snap);
    free(m->was);
    free(m->is);
    *m = (struct middle){.kind = MIDDLE_NONE};
}

/* Do the listings agree, but for times of inode ino, and, with content, its size and content? loose as everywhere: no
 * inode numbers but ino's, no times. */
UNUSED static bool snap_equal_but(struct snap *have, struct snap *want, uint64_t ino, bool content, bool loose)
{
    if (have->n != want->n)
        return false;
    qsort(have->e, have->n, sizeof(*have->e), snap_entry_cmp);
    qsort(want->e, want->n, sizeof(*want->e), snap_entry_cmp);
    for (size_t k = 0; k < have->n; k++) {
        const struct snap_entry *h = &have->e[k], *w = &want->e[k];

        if (strcmp(h->path, w->path) != 0)
            return false;
        if (loose ? h->loose == w->loose : h->full == w->full)
            continue;
        if (w->ino != ino || h->ino != ino || h->mode != w->mode || h->uid != w->uid || h->gid != w->gid ||
            h->nlink != w->nlink || h->rdev != w->rdev || h->xattrs != w->xattrs || h->atime != w->atime)
            return false;
        if (!content && (h->size != w->size || h->content != w->content))
            return false;
    }
    return true;
}

/* Is each block of the file old or new, and the size? */
static bool blocks_old_or_new(struct volume *v, const struct middle *m, uint32_t block)
{
    struct vattr a;
    uint8_t *now = xcalloc(1, m->bytes);
    bool ok;

    ok = vol_getattr(v, m->ino, &a) == 0 && (a.size == m->was_size || a.size == m->is_size) &&
         vol_read(v, m->ino, 0, now, m->bytes) == (ssize_t)a.size;
    for (uint64_t at = 0; at < m->bytes && ok; at += block)
        ok = memcmp(now + at, m->was + at, block) == 0 || memcmp(now + at, m->is + at, block) == 0;
    free(now);
    return ok;
}

/* Is `have`, the listing of v, what an operation under way after `before` may show? */
UNUSED static bool middle_fair(struct volume *v, struct snap *have, struct snap *before, const struct middle *m,
                               uint32_t block, bool loose)
{
    switch (m->kind) {
    case MIDDLE_NONE:
        break;
    case MIDDLE_SIZED:
        return snap_equal_but(have, m->snap, m->ino, false, loose);
    case MIDDLE_BLOCKS:
        return snap_equal_but(have, before, m->ino, true, loose) && blocks_old_or_new(v, m, block);
    }
    return false;
}

/* --- the world --- */

struct world {
    struct volume *v;
    struct model *m;
    struct rng rng;
    uint64_t max_pages; /* of content, about */
    uint64_t max_file;  /* highest end of a write */
    size_t max_inodes;
    uint64_t size_limit; /* ENOSPC is fair when the volume is used to more than three quarters of it */
    uint32_t block;
    bool faults;   /* EIO, EROFS and ENOSPC may come */
    bool in_doubt; /* the operation failed by a fault: applied to the model, may be there or not */
    bool synced;   /* the operation made all before it durable */
    bool middles;  /* keep what an operation under way may show, in middle */
    struct middle middle;
    uint64_t ops, nospc, errors; /* errors: operations that both sides refused */
    char op[400];                /* the operation under way */
    char fail[900];              /* the first difference, or "" */
    uint64_t serial;
    uint8_t *buf, *buf2; /* 1 MiB each */
};

UNUSED static void world_init(struct world *w, struct volume *v, struct model *m, uint64_t seed)
{
    memset(w, 0, sizeof(*w));
    w->v = v;
    w->m = m;
    w->rng.s = seed;
    w->max_pages = 512;
    w->max_file = 1 << 20;
    w->max_inodes = 80;
    w->block = 4096;
    w->buf = xmalloc(1 << 20);
    w->buf2 = xmalloc(1 << 20);
}

UNUSED static void world_free(struct world *w)
{
    middle_clear(&w->middle);
    free(w->buf);
    free(w->buf2);
}

__attribute__((format(printf, 2, 3))) static void world_fail(struct world *w, const char *fmt, ...)
{
    char text[400];
    va_list ap;

    if (w->fail[0])
        return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(w->fail, sizeof(w->fail), "op %llu: %s: %s", (unsigned long long)w->ops, w->op, text);
}

__attribute__((format(printf, 2, 3))) static void world_op(struct world *w, const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(w->op, sizeof(w->op), fmt, ap);
    va_end(ap);
}

static bool world_full(struct world *w)
{
    struct volume_stat st;

    volume_stat(w->v, &st);
    return w->size_limit && st.used > w->size_limit / 2;
}

/* Compares a result with the one wanted (alt: another that is as good, or 0). True: apply it to the model. */
static bool expect_alt(struct world *w, ssize_t rc, ssize_t want, ssize_t alt)
{
    if (rc == want || (alt != 0 && rc == alt)) {
        w->errors += rc < 0;
        return rc >= 0;
    }
    if (w->faults && (rc == -EIO || rc == -EROFS)) {
        w->in_doubt = true;
        return want >= 0;
    }
    if (rc == -ENOSPC && want >= 0 && (w->faults || world_full(w))) {
        w->nospc++;
        return false;
    }
    world_fail(w, "returned %zd (%s), expected %zd (%s)", rc, rc < 0 ? strerror((int)-rc) : "ok", want,
               want < 0 ? strerror((int)-want) : "ok");
    return false;
}

static bool expect(struct world *w, ssize_t rc, ssize_t want)
{
    return expect_alt(w, rc, want, 0);
}

static void expect_attr(struct world *w, const struct m_inode *i, const struct vattr *a)
{
    uint64_t most = (i->size + w->block - 1) / w->block * (w->block / 512);

    if (a->ino != i->ino || a->mode != i->mode || a->uid != i->uid || a->gid != i->gid || a->nlink != i->nlink ||
        a->rdev != i->rdev || (!S_ISDIR(i->mode) && a->size != i->size))
        world_fail(w,
                   "attributes differ (engine/model): ino %llu/%llu mode %o/%o uid %u/%u gid %u/%u nlink %u/%u rdev "
                   "%x/%x size %llu/%llu",
                   (unsigned long long)a->ino, (unsigned long long)i->ino, a->mode, i->mode, a->uid, i->uid, a->gid,
                   i->gid, a->nlink, i->nlink, a->rdev, i->rdev, (unsigned long long)a->size,
                   (unsigned long long)i->size);
    else if (S_ISREG(i->mode) && a->blocks > most)
        world_fail(w, "blocks %llu of 512 for size %llu", (unsigned long long)a->blocks, (unsigned long long)i->size);
}

/* Compares the inode's attributes and takes over its times. */
static void world_adopt(struct world *w, struct m_inode *i)
{
    struct vattr a;
    int rc;

    if (w->in_doubt || w->fail[0] || !i)
        return;
    rc = vol_getattr(w->v, i->ino, &a);
    if (rc < 0) {
        world_fail(w, "getattr of inode %llu: %s", (unsigned long long)i->ino, strerror(-rc));
        return;
    }
    expect_attr(w, i, &a);
    if (a.ctime < i->ctime && i->ctime < now_ns())
        world_fail(w, "ctime of inode %llu went back", (unsigned long long)i->ino);
    i->atime = a.atime;
    i->mtime = a.mtime;
    i->ctime = a.ctime;
}

enum pick_kind { PICK_FILE = 1, PICK_DIR = 2, PICK_LINK = 4, PICK_OTHER = 8, PICK_ANY = 15, PICK_DEAD = 16 };

static unsigned pick_kind_of(const struct m_inode *i)
{
    return S_ISREG(i->mode) ? PICK_FILE : S_ISDIR(i->mode) ? PICK_DIR : S_ISLNK(i->mode) ? PICK_LINK : PICK_OTHER;
}

/* An inode of one of the kinds, or the root. Removed directories only with PICK_DEAD. */
static struct m_inode *pick(struct world *w, unsigned kinds)
{
    for (unsigned tries = 0; tries < 24; tries++) {
        struct m_inode *i = w->m->inode[rng_below(&w->rng, w->m->n)];

        if ((pick_kind_of(i) & kinds) && (i->nlink != 0 || !S_ISDIR(i->mode) || (kinds & PICK_DEAD)))
            return i;
    }
    return w->m->root;
}

/* One of few names, seldom a long one, of 255 or 256 bytes. */
static const char *pick_name(struct world *w, char buf[300])
{
    uint64_t r = rng_below(&w->rng, 400);
    size_t n = r < 2 ? 256 : r < 8 ? 255 : r < 20 ? 100 : 0;

    if (n) {
        memset(buf, 'A' + (int)rng_below(&w->rng, 4), n);
        buf[n] = 0;
    } else if (r < 30) {
        snprintf(buf, 300, "n\xc3\xa4me\n\x01\xff%u", (unsigned)rng_below(&w->rng, 3));
    } else {
        snprintf(buf, 300, "n%u", (unsigned)rng_below(&w->rng, 24));
    }
    return buf;
}

/* An existing name of the directory three times of four. */
static const char *pick_entry(struct world *w, const struct m_inode *dir, char buf[300])
{
    if (dir->entries == 0 || rng_chance(&w->rng, 6))
        return pick_name(w, buf);
    snprintf(buf, 300, "%s", dir->entry[rng_below(&w->rng, dir->entries)].name);
    return buf;
}

/* What making a name gives: 0 or the error. */
static int want_new_name(const struct m_inode *dir, const char *name)
{
    if (!S_ISDIR(dir->mode))
        return -ENOTDIR;
    if (strlen(name) > VOLUME_NAME_BYTES)
        return -ENAMETOOLONG;
    if (dir->nlink == 0)
        return -ENOENT;
    return m_find(dir, name) ? -EEXIST : 0;
}

/* What finding a name gives. */
static int want_old_name(const struct m_inode *dir, const char *name)
{
    int rc = want_new_name(dir, name);

    return rc == -EEXIST ? 0 : rc == 0 ? -ENOENT : rc;
}

/* --- operations: names --- */

/* A made inode: compared with what was asked, entered under the name if there is one. */
static void made(struct world *w, struct m_inode *dir, const char *name, uint32_t mode, uint32_t rdev, uint32_t uid,
                 uint32_t gid, const char *target, const struct vattr *a)
{
    struct m_inode *i;

    if (dir->mode & S_ISGID) {
        gid = dir->gid;
        mode |= S_ISDIR(mode) ? S_ISGID : 0;
    }
    i = m_inode_new(w->m, w->in_doubt ? UINT64_MAX - ++w->serial : a->ino, mode, uid, gid);
    for (size_t k = 0; k + 1 < w->m->n; k++)
        if (w->m->inode[k]->ino == i->ino)
            world_fail(w, "inode number %llu is in use", (unsigned long long)i->ino);
    i->rdev = rdev;
    i->refs = 1;
    if (target) {
        i->target = xstrdup(target);
        i->size = strlen(target);
    }
    if (name) {
        m_enter(dir, name, i);
    } else {
        i->nlink = 0;
        i->tmpfile = true;
    }
    if (!w->in_doubt)
        expect_attr(w, i, a);
    world_adopt(w, i);
    world_adopt(w, dir);
    if (name && !rng_chance(&w->rng, 4) && !w->in_doubt) {
        vol_forget(w->v, i->ino, 1);
        i->refs = 0;
    }
}

static uint32_t random_mode(struct world *w)
{
    return (uint32_t)rng_below(&w->rng, 010000) & (rng_chance(&w->rng, 4) ? 07777 : 0777);
}

static void op_mknod(struct world *w)
{
    struct m_inode *dir = pick(w, rng_chance(&w->rng, 30) ? PICK_ANY | PICK_DEAD : PICK_DIR);
    static const uint32_t kinds[] = {S_IFREG, S_IFREG, S_IFREG,  S_IFREG, S_IFDIR,
                                     S_IFDIR, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK};
    uint32_t type = kinds[rng_below(&w->rng, ARRAY_LEN(kinds))], mode = type | random_mode(w);
    uint32_t rdev = type == S_IFCHR || type == S_IFBLK ? (uint32_t)rng_below(&w->rng, 1 << 20) : 0;
    uint32_t uid = (uint32_t)rng_below(&w->rng, 3), gid = (uint32_t)rng_below(&w->rng, 3);
    struct vattr a;
    char name[300];

    if (w->m->n >= w->max_inodes)
        return;
    pick_name(w, name);
    world_op(w, "mknod %o in %llu name %.40s", mode, (unsigned long long)dir->ino, name);
    if (expect(w, vol_mknod(w->v, dir->ino, name, mode, rdev, uid, gid, &a), want_new_name(dir, name)))
        made(w, dir, name, mode, rdev, uid, gid, NULL, &a);
}

static void op_tmpfile(struct world *w)
{
    struct m_inode *dir = pick(w, PICK_DIR);
    uint32_t mode = S_IFREG | random_mode(w);
    struct vattr a;

    if (w->m->n >= w->max_inodes)
        return;
    world_op(w, "tmpfile in %llu", (unsigned long long)dir->ino);
    if (expect(w, vol_tmpfile(w->v, dir->ino, mode, 1, 2, &a), 0))
        made(w, dir, NULL, mode, 0, 1, 2, NULL, &a);
}

static void op_symlink(struct world *w)
{
    struct m_inode *dir = pick(w, PICK_DIR);
    char name[300], target[SYMLINK_MAX + 2];
    size_t n = rng_chance(&w->rng, 6) ? SYMLINK_MAX - rng_below(&w->rng, 3) : 1 + rng_below(&w->rng, 90);
    struct vattr a;

    if (w->m->n >= w->max_inodes)
        return;
    for (size_t k = 0; k < n; k++)
        target[k] = (char)('a' + rng_below(&w->rng, 26));
    target[n] = 0;
    pick_name(w, name);
    world_op(w, "symlink %zu bytes in %llu name %.40s", n, (unsigned long long)dir->ino, name);
    if (expect(w, vol_symlink(w->v, dir->ino, name, target, 1, 1, &a), want_new_name(dir, name)))
        made(w, dir, name, S_IFLNK | 0777, 0, 1, 1, target, &a);
}

static void op_readlink(struct world *w)
{
    struct m_inode *i = pick(w, rng_chance(&w->rng, 8) ? PICK_ANY : PICK_LINK);
    char buf[SYMLINK_MAX + 1];

    world_op(w, "readlink %llu", (unsigned long long)i->ino);
    if (expect(w, vol_readlink(w->v, i->ino, buf, sizeof(buf)), i->target ? (ssize_t)i->size : -EINVAL) &&
        memcmp(buf, i->target, i->size) != 0)
        world_fail(w, "another target");
}

static void op_link(struct world *w)
{
    struct m_inode *i = pick(w, rng_chance(&w->rng, 10) ? PICK_ANY : PICK_FILE | PICK_LINK | PICK_OTHER);
    struct m_inode *dir = pick(w, PICK_DIR);
    int want, alt = 0;
    struct vattr a;
    char name[300];

    pick_name(w, name);
    world_op(w, "link %llu in %llu name %.40s", (unsigned long long)i->ino, (unsigned long long)dir->ino, name);
    want = want_new_name(dir, name);
    if (S_ISDIR(i->mode)) {
        alt = want;
        want = -EPERM;
    } else if (i->nlink == 0 && !i->tmpfile && want == 0) {
        alt = -ENOENT;
    }
    if (!expect_alt(w, vol_link(w->v, i->ino, dir->ino, name, &a), want, alt))
        return;
    i->nlink++;
    i->tmpfile = false;
    i->refs++;
    m_enter(dir, name, i);
    if (!w->in_doubt)
        expect_attr(w, i, &a);
    world_adopt(w, i);
    world_adopt(w, dir);
    if (!rng_chance(&w->rng, 4) && !w->in_doubt) {
        vol_forget(w->v, i->ino, 1);
        i->refs--;
    }
}

/* The name is gone from the model. */
static void unnamed(struct world *w, struct m_inode *i, bool adopt)
{
    i->nlink = S_ISDIR(i->mode) ? 0 : i->nlink - 1;
    if (adopt && (i->nlink || i->refs))
        world_adopt(w, i);
    m_settle(w->m, i);
}

static void op_unlink(struct world *w)
{
    struct m_inode *dir = pick(w, PICK_DIR);
    struct m_entry *e;
    int want, alt = 0;
    char name[300];

    pick_entry(w, dir, name);
    want = want_old_name(dir, name);
    e = m_find(dir, name);
    if (want == 0 && S_ISDIR(e->i->mode)) {
        want = -EISDIR;
        alt = -EPERM;
    }
    world_op(w, "unlink in %llu name %.40s", (unsigned long long)dir->ino, name);
    if (!expect_alt(w, vol_unlink(w->v, dir->ino, name), want, alt))
        return;
    unnamed(w, m_leave(dir, name), true);
    world_adopt(w, dir);
}

static void op_rmdir(struct world *w)
{
    struct m_inode *dir = pick(w, PICK_DIR);
    struct m_entry *e;
    char name[300];
    int want;

    pick_entry(w, dir, name);
    want = want_old_name(dir, name);
    e = m_find(dir, name);
    if (want == 0)
        want = !S_ISDIR(e->i->mode) ? -ENOTDIR : e->i->entries ? -ENOTEMPTY : 0;
    world_op(w, "rmdir in %llu name %.40s", (unsigned long long)dir->ino, name);
    if (!expect(w, vol_rmdir(w->v, dir->ino, name), want))
        return;
    unnamed(w, m_leave(dir, name), true);
    world_adopt(w, dir);
}

/* What rename gives by the model; *ret_alt: another error that is as good. */
static int want_rename(const struct m_inode *dir, const char *name, const struct m_inode *newdir, const char *newname,
                       unsigned flags, int *ret_alt)
{
    const struct m_entry *from, *to;
    int rc = want_old_name(dir, name), to_rc = want_new_name(newdir, newname);

    if (flags & RENAME_WHITEOUT || flags == (RENAME_EXCHANGE | RENAME_NOREPLACE)) {
        *ret_alt = -EINVAL;
        return -EINVAL;
    }
    if (rc < 0 || (to_rc < 0 && to_rc != -EEXIST)) {
        *ret_alt = to_rc;
        return rc < 0 ? rc : to_rc;
    }
    from = m_find(dir, name);
    to = m_find(newdir, newname);
    if (S_ISDIR(from->i->mode) && m_is_below(newdir, from->i)) {
        *ret_alt = to ? -EEXIST : -ENOENT;
        return -EINVAL;
    }
    if (flags & RENAME_EXCHANGE) {
        if (!to)
            return -ENOENT;
        return S_ISDIR(to->i->mode) && m_is_below(dir, to->i) ? -EINVAL : 0;
    }
    if (!to)
        return 0;
    if (flags & RENAME_NOREPLACE)
        return -EEXIST;
    if (from->i == to->i)
        return 0;
    if (S_ISDIR(to->i->mode) && m_is_below(dir, to->i)) {
        *ret_alt = S_ISDIR(from->i->mode) ? -EINVAL : -EISDIR;
        return -ENOTEMPTY;
    }
    if (S_ISDIR(from->i->mode) != S_ISDIR(to->i->mode))
        return S_ISDIR(to->i->mode) ? -EISDIR : -ENOTDIR;
    return S_ISDIR(to->i->mode) && to->i->entries ? -ENOTEMPTY : 0;
}

static void op_rename(struct world *w)
{
    struct m_inode *dir = pick(w, PICK_DIR), *newdir = rng_chance(&w->rng, 3) ? dir : pick(w, PICK_DIR);
    static const unsigned all_flags[] = {0,
                                         0,
                                         0,
                                         0,
                                         RENAME_NOREPLACE,
                                         RENAME_EXCHANGE,
                                         RENAME_EXCHANGE,
                                         RENAME_NOREPLACE | RENAME_EXCHANGE,
                                         RENAME_WHITEOUT};
    unsigned flags = all_flags[rng_below(&w->rng, ARRAY_LEN(all_flags))];
    char name[300], newname[300];
    struct m_inode *i, *over = NULL;
    int want, alt = 0;

    pick_entry(w, dir, name);
    if (rng_chance(&w->rng, 2) || (flags & RENAME_EXCHANGE))
        pick_entry(w, newdir, newname);
    else
        pick_name(w, newname);
    world_op(w, "rename %u in %llu name %.40s to %llu name %.40s", flags, (unsigned long long)dir->ino, name,
             (unsigned long long)newdir->ino, newname);
    want = want_rename(dir, name, newdir, newname, flags, &alt);
    if (!expect_alt(w, vol_rename(w->v, dir->ino, name, newdir->ino, newname, flags), want, alt))
        return;
    if (m_find(newdir, newname) && m_find(dir, name)->i == m_find(newdir, newname)->i)
        return;
    i = m_leave(dir, name);
    if (m_find(newdir, newname))
        over = m_leave(newdir, newname);
    m_enter(newdir, newname, i);
    if (over && (flags & RENAME_EXCHANGE))
        m_enter(dir, name, over);
    world_adopt(w, i);
    if (over && (flags & RENAME_EXCHANGE))
        world_adopt(w, over);
    else if (over)
        unnamed(w, over, true);
    world_adopt(w, dir);
    world_adopt(w, newdir);
}

static void op_lookup(struct world *w)
{
    struct m_inode *dir = pick(w, rng_chance(&w->rng, 20) ? PICK_ANY | PICK_DEAD : PICK_DIR), *i;
    struct vattr a;
    char name[300];

    pick_entry(w, dir, name);
    world_op(w, "lookup in %llu name %.40s", (unsigned long long)dir->ino, name);
    if (!expect(w, vol_lookup(w->v, dir->ino, name, &a), want_old_name(dir, name)) || w->in_doubt)
        return;
    i = m_find(dir, name)->i;
    expect_attr(w, i, &a);
    if (a.mtime != i->mtime || a.ctime != i->ctime || a.atime != i->atime)
        world_fail(w, "times differ");
    if (rng_chance(&w->rng, 4))
        i->refs++;
    else
        vol_forget(w->v, i->ino, 1);
}

static void op_forget(struct world *w)
{
    for (unsigned tries = 0; tries < 16; tries++) {
        struct m_inode *i = w->m->inode[rng_below(&w->rng, w->m->n)];
        uint64_t n = i->refs;

        if (n == 0 || i == w->m->root)
            continue;
        if (n > 1 && rng_chance(&w->rng, 2))
            n = 1 + rng_below(&w->rng, n - 1);
        world_op(w, "forget %llu of %llu (nlink %u)", (unsigned long long)n, (unsigned long long)i->ino, i->nlink);
        vol_forget(w->v, i->ino, n);
        i->refs -= n;
        if (i->refs == 0 && i->nlink == 0) {
            struct vattr a;
            int rc = vol_getattr(w->v, i->ino, &a);

            if (rc != -ENOENT && !(w->faults && rc == -EIO) && !w->faults)
                world_fail(w, "inode still there: %s", rc ? strerror(-rc) : "ok");
        }
        m_settle(w->m, i);
        return;
    }
}

static void op_readdir(struct world *w)
{
    struct m_inode *dir = pick(w, rng_chance(&w->rng, 30) ? PICK_ANY : PICK_DIR);
    struct listed l = {.stop = 0};
    size_t dots = 0;
    int rc;

    world_op(w, "readdir %llu", (unsigned long long)dir->ino);
    do {
        l.stop = l.n + 1 + rng_below(&w->rng, 20);
        rc = vol_readdir(w->v, dir->ino, l.n ? l.cookie[l.n - 1] : 0, rng_chance(&w->rng, 2), listed_entry, &l);
    } while (rc == 0 && l.n == l.stop);
    if (!expect(w, rc, S_ISDIR(dir->mode) ? 0 : -ENOTDIR) || w->in_doubt)
        goto out;
    for (size_t k = 0; k < l.n; k++) {
        struct m_entry *e = m_find(dir, l.name[k]);
        bool dot = strcmp(l.name[k], ".") == 0 || strcmp(l.name[k], "..") == 0;

        dots += dot;
        if (dot ? (l.cookie[k] != strlen(l.name[k]) || (!l.name[k][1] && l.ino[k] != dir->ino) ||
                   (l.name[k][1] && dir->parent && l.ino[k] != dir->parent->ino))
                : (!e || e->i->ino != l.ino[k] || (l.type[k] & S_IFMT) != (e->i->mode & S_IFMT)))
            world_fail(w, "entry %.60s: wrong inode, type or cookie, or should not be there", l.name[k]);
    }
    if (l.n != dir->entries + dots || dots != 2)
        world_fail(w, "%zu entries (%zu dots), expected %zu", l.n, dots, dir->entries);
    if (l.bad)
        world_fail(w, "%s", l.bad);
out:
    listed_free(&l);
}

/* --- operations: inodes --- */

static void op_getattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY | PICK_DEAD);
    struct vattr a;

    world_op(w, "getattr %llu", (unsigned long long)i->ino);
    if (!expect(w, vol_getattr(w->v, i->ino, &a), 0) || w->in_doubt)
        return;
    expect_attr(w, i, &a);
    if (a.mtime != i->mtime || a.ctime != i->ctime || a.atime != i->atime)
        world_fail(w, "times differ");
}

static uint64_t random_size(struct world *w, const struct m_inode *i)
{
    uint64_t size = rng_below(&w->rng, i->size * 2 + 5000);

    if (rng_chance(&w->rng, 3))
        size = size / w->block * w->block;
    if (rng_chance(&w->rng, 5))
        size = rng_below(&w->rng, w->max_file);
    if (rng_chance(&w->rng, 6))
        size = rng_below(&w->rng, 3000);
    return rng_chance(&w->rng, 8) ? 0 : MIN(size, w->max_file);
}

static void op_setattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY);
    unsigned set = (unsigned)rng_below(&w->rng, 128) & (unsigned)rng_below(&w->rng, 128);
    struct vattr in = {0}, a;
    int want = 0;

    if (S_ISREG(i->mode) && rng_chance(&w->rng, 2))
        set = VOL_SET_SIZE;
    if (!S_ISREG(i->mode))
        set &= ~(unsigned)VOL_SET_SIZE;
    in.mode = (i->mode & S_IFMT) | random_mode(w);
    in.uid = (uint32_t)rng_below(&w->rng, 100000);
    in.gid = (uint32_t)rng_below(&w->rng, 100000);
    in.size = random_size(w, i);
    if ((set & VOL_SET_SIZE) && rng_chance(&w->rng, 60)) {
        in.size = VOLUME_FILE_MAX + 1 + rng_below(&w->rng, 100);
        want = -EFBIG;
    }
    in.atime = (int64_t)rng_below(&w->rng, 4000000000000000000ull) - 1000000000000000000ll;
    in.mtime = (int64_t)rng_below(&w->rng, 1700000000000000000ull);
    in.ctime = (int64_t)rng_below(&w->rng, 1700000000000000000ull);
    world_op(w, "setattr %llu set %x size %llu -> %llu", (unsigned long long)i->ino, set, (unsigned long long)i->size,
             (unsigned long long)in.size);
    if (!expect(w, vol_setattr(w->v, i->ino, set, &in, &a), want))
        return;
    if (set & VOL_SET_SIZE)
        m_truncate(w->m, i, in.size);
    if (w->middles && (set & VOL_SET_SIZE) && set != VOL_SET_SIZE)
        w->middle = (struct middle){.kind = MIDDLE_SIZED, .ino = i->ino, .snap = snap_model(w->m)};
    if (set & VOL_SET_MODE)
        i->mode = in.mode;
    if (set & VOL_SET_UID)
        i->uid = in.uid;
    if (set & VOL_SET_GID)
        i->gid = in.gid;
    if (w->in_doubt)
        return;
    expect_attr(w, i, &a);
    if (((set & VOL_SET_ATIME) && a.atime != in.atime) || ((set & VOL_SET_MTIME) && a.mtime != in.mtime) ||
        ((set & VOL_SET_CTIME) && a.ctime != in.ctime))
        world_fail(w, "times were not set");
    if (set & VOL_SET_CTIME)
        i->ctime = in.ctime;
    world_adopt(w, i);
}

static const char *pick_xattr_name(struct world *w, char buf[300])
{
    static const char *const names[] = {"user.a",
                                        "user.b",
                                        "user.c",
                                        "security.capability",
                                        "trusted.overlay.opaque",
                                        "user.a_longer_name_than_the_others"};
    if (rng_chance(&w->rng, 20)) {
        memset(buf, 'x', 255);
        memcpy(buf, "user.", 5);
        buf[255] = 0;
    } else {
        snprintf(buf, 300, "%s", names[rng_below(&w->rng, ARRAY_LEN(names))]);
    }
    return buf;
}

static void op_setxattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY);
    size_t n = rng_chance(&w->rng, 12)  ? VOLUME_XATTR_MAX + rng_below(&w->rng, 2)
               : rng_chance(&w->rng, 4) ? rng_below(&w->rng, 2000)
                                        : rng_below(&w->rng, 60);
    int flags = rng_chance(&w->rng, 4) ? XATTR_CREATE : rng_chance(&w->rng, 4) ? XATTR_REPLACE : 0;
    struct m_xattr *x;
    char name[300];
    int want = 0, alt = 0;

    pick_xattr_name(w, name);
    x = m_xattr(i, name);
    rng_fill(&w->rng, w->buf, n);
    if (n > VOLUME_XATTR_MAX)
        want = -E2BIG;
    else if (x && flags == XATTR_CREATE)
        want = -EEXIST;
    else if (!x && flags == XATTR_REPLACE)
        want = -ENODATA;
    world_op(w, "setxattr %llu %.40s %zu bytes flags %d", (unsigned long long)i->ino, name, n, flags);
    if (!expect_alt(w, vol_setxattr(w->v, i->ino, name, w->buf, n, flags), want, alt))
        return;
    if (!x) {
        i->x = xrealloc(i->x, (i->xs + 1) * sizeof(*i->x));
        x = &i->x[i->xs++];
        *x = (struct m_xattr){.name = xstrdup(name)};
    }
    free(x->value);
    x->value = xmalloc(n ? n : 1);
    memcpy(x->value, w->buf, n);
    x->len = n;
    world_adopt(w, i);
}

static void op_removexattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY);
    struct m_xattr *x;
    char name[300];

    pick_xattr_name(w, name);
    if (i->xs && rng_chance(&w->rng, 2))
        snprintf(name, sizeof(name), "%s", i->x[0].name);
    x = m_xattr(i, name);
    world_op(w, "removexattr %llu %.40s", (unsigned long long)i->ino, name);
    if (!expect(w, vol_removexattr(w->v, i->ino, name), x ? 0 : -ENODATA))
        return;
    free(x->name);
    free(x->value);
    *x = i->x[--i->xs];
    world_adopt(w, i);
}

static void op_getxattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY);
    size_t cap = rng_chance(&w->rng, 4) ? rng_below(&w->rng, 100) : VOLUME_XATTR_MAX;
    struct m_xattr *x;
    char name[300];
    ssize_t want;

    pick_xattr_name(w, name);
    x = m_xattr(i, name);
    want = !x ? -ENODATA : cap != 0 && cap < x->len ? -ERANGE : (ssize_t)x->len;
    world_op(w, "getxattr %llu %.40s cap %zu", (unsigned long long)i->ino, name, cap);
    if (expect(w, vol_getxattr(w->v, i->ino, name, w->buf, cap), want) && cap && !w->in_doubt &&
        memcmp(w->buf, x->value, x->len) != 0)
        world_fail(w, "another value");
}

static void op_listxattr(struct world *w)
{
    struct m_inode *i = pick(w, PICK_ANY);
    size_t total = 0, n = 0;

    for (size_t k = 0; k < i->xs; k++)
        total += strlen(i->x[k].name) + 1;
    world_op(w, "listxattr %llu", (unsigned long long)i->ino);
    if (!expect(w, vol_listxattr(w->v, i->ino, NULL, 0), (ssize_t)total) ||
        !expect(w, vol_listxattr(w->v, i->ino, (char *)w->buf, 1 << 16), (ssize_t)total) || w->in_doubt)
        return;
    for (char *p = (char *)w->buf; p < (char *)w->buf + total; p += strlen(p) + 1, n++)
        if (!m_xattr(i, p))
            world_fail(w, "unknown name %.60s", p);
    if (n != i->xs)
        world_fail(w, "%zu names, expected %zu", n, i->xs);
    if (total > 1)
        expect(w, vol_listxattr(w->v, i->ino, (char *)w->buf, total - 1), -ERANGE);
}

/* --- operations: data --- */

static uint64_t random_offset(struct world *w, const struct m_inode *i)
{
    uint64_t off = rng_below(&w->rng, i->size + 1);

    if (rng_chance(&w->rng, 3))
        off = i->size;
    if (rng_chance(&w->rng, 3))
        off = off / w->block * w->block;
    if (rng_chance(&w->rng, 12))
        off += rng_below(&w->rng, 200000);
    return rng_chance(&w->rng, 5) ? 0 : MIN(off, w->max_file);
}

static size_t random_length(struct world *w)
{
    switch (rng_below(&w->rng, 12)) {
    case 0:
    case 1:
    case 2:
        return 1 + rng_below(&w->rng, 200);
    case 3:
    case 4:
    case 5:
        return w->block * (1 + rng_below(&w->rng, 4));
    case 6:
    case 7:
        return 1 + rng_below(&w->rng, 3000);
    case 8:
        return 1 + rng_below(&w->rng, 70000);
    case 9:
        return w->block;
    case 10:
        return 65536;
    default:
        return 1 + rng_below(&w->rng, rng_chance(&w->rng, 6) ? 1 << 20 : 200000);
    }
}

static bool data_kind_ok(struct world *w, const struct m_inode *i, ssize_t rc)
{
    if (S_ISREG(i->mode))
        return true;
    if (w->faults && (rc == -EIO || rc == -EROFS))
        w->in_doubt = true; /* and not applied */
    else if (rc != -EISDIR && rc != -EINVAL && rc != -EFBIG && !(rc == -ENOSPC && (w->faults || world_full(w))))
        world_fail(w, "on something that is no file: %zd", rc);
    return false;
}

static void op_write(struct world *w)
{
    struct m_inode *i = pick(w, rng_chance(&w->rng, 60) ? PICK_ANY : PICK_FILE);
    uint64_t off = random_offset(w, i);
    size_t n = random_length(w);
    ssize_t want, rc;

    if (S_ISREG(i->mode) && w->m->pages > w->max_pages) {
        struct vattr in = {.size = 0}, a;

        world_op(w, "truncate %llu of %llu to 0", (unsigned long long)i->ino, (unsigned long long)i->size);
        if (expect(w, vol_setattr(w->v, i->ino, VOL_SET_SIZE, &in, &a), 0))
            m_truncate(w->m, i, 0);
        world_adopt(w, i);
        return;
    }
    if (off + n > w->max_file && off < w->max_file && n > 1)
        n = w->max_file - off;
    if (rng_chance(&w->rng, 200))
        off = VOLUME_FILE_MAX - rng_below(&w->rng, n);
    want = off + n > VOLUME_FILE_MAX ? -EFBIG : (ssize_t)n;
    if (rng_chance(&w->rng, 10))
        memset(w->buf, 0, n);
    else
        rng_fill(&w->rng, w->buf, n);
    world_op(w, "write %llu at %llu length %zu (size %llu)", (unsigned long long)i->ino, (unsigned long long)off, n,
             (unsigned long long)i->size);
    rc = vol_write(w->v, i->ino, off, w->buf, n);
    if (!data_kind_ok(w, i, rc) || !expect(w, rc, want))
        return;
    m_put(w->m, i, off, w->buf, n);
    i->size = MAX(i->size, off + n);
    world_adopt(w, i);
}

static void op_copy(struct world *w)
{
    struct m_inode *from = pick(w, PICK_FILE), *to = rng_chance(&w->rng, 4) ? from : pick(w, PICK_FILE);
    uint64_t off, to_off, n = random_length(w) * (rng_chance(&w->rng, 3) ? 8 : 1);
    bool aligned;
    ssize_t rc;

    if (!S_ISREG(from->mode) || !S_ISREG(to->mode) || w->m->pages > w->max_pages)
        return;
    off = random_offset(w, from);
    to_off = random_offset(w, to);
    aligned = !rng_chance(&w->rng, 8);
    if (aligned)
        off -= off % w->block, to_off -= to_off % w->block;
    if (to_off + n > w->max_file)
        return;
    world_op(w, "copy from %llu at %llu to %llu at %llu length %llu (sizes %llu, %llu)", (unsigned long long)from->ino,
             (unsigned long long)off, (unsigned long long)to->ino, (unsigned long long)to_off, (unsigned long long)n,
             (unsigned long long)from->size, (unsigned long long)to->size);
    rc = vol_copy(w->v, from->ino, off, to->ino, to_off, n);
    /* Not by reference: the caller copies. But whole blocks between files of blocks are always done. */
    if (rc == -EOPNOTSUPP &&
        (!aligned || from->size <= 2048 || to->size <= 2048 || n < w->block || from->size - off < w->block))
        return;
    if (rc == -EINVAL && from == to)
        return;
    n = off >= from->size ? 0 : MIN(n, from->size - off);
    if (!expect(w, rc < 0 || rc > (ssize_t)n ? rc : (ssize_t)n, (ssize_t)n) || w->in_doubt)
        return;
    n = (uint64_t)rc;
    if (n == 0 && off < from->size)
        world_fail(w, "nothing was copied");
    for (uint64_t done = 0; done < n;) {
        size_t k = MIN(n - done, 1u << 20);

        m_read(from, off + done, w->buf2, k);
        m_put(w->m, to, to_off + done, w->buf2, k);
        done += k;
    }
    if (n) {
        to->size = MAX(to->size, to_off + n);
        world_adopt(w, to);
    }
}

static void op_read(struct world *w)
{
    struct m_inode *i = pick(w, rng_chance(&w->rng, 60) ? PICK_ANY : PICK_FILE);
    uint64_t off = random_offset(w, i);
    size_t n = random_length(w), want = off >= i->size ? 0 : MIN(n, i->size - off);
    ssize_t rc;

    world_op(w, "read %llu at %llu length %zu (size %llu)", (unsigned long long)i->ino, (unsigned long long)off, n,
             (unsigned long long)i->size);
    memset(w->buf, 0xa5, n);
    rc = vol_read(w->v, i->ino, off, w->buf, n);
    if (!data_kind_ok(w, i, rc) || !expect(w, rc, (ssize_t)want) || w->in_doubt)
        return;
    m_read(i, off, w->buf2, want);
    for (size_t k = 0; k < want; k++)
        if (w->buf[k] != w->buf2[k]) {
            world_fail(w, "content differs from byte %zu on: %02x, expected %02x", k, w->buf[k], w->buf2[k]);
            return;
        }
}

/* Notes a file's content before a hole is made, up to `end` at least, and after. */
static void middle_hole_before(struct world *w, const struct m_inode *i, uint64_t end)
{
    struct middle m = {.kind = MIDDLE_BLOCKS, .ino = i->ino, .was_size = i->size};

    m.bytes = (end + w->block - 1) / w->block * w->block;
    m.was = xcalloc(1, m.bytes);
    m.is = xcalloc(1, m.bytes);
    m_read(i, 0, m.was, m.bytes);
    w->middle = m;
}

static void middle_hole_after(struct world *w, const struct m_inode *i)
{
    w->middle.is_size = i->size;
    m_read(i, 0, w->middle.is, w->middle.bytes);
}

static void op_fallocate(struct world *w)
{
    struct m_inode *i = pick(w, PICK_FILE);
    static const int modes[] = {0,
                                FALLOC_FL_KEEP_SIZE,
                                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                FALLOC_FL_ZERO_RANGE,
                                FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE};
    int mode = modes[rng_below(&w->rng, ARRAY_LEN(modes))];
    uint64_t off = random_offset(w, i), len = random_length(w), end = off + len;
    bool hole;

    if (!S_ISREG(i->mode))
        return;
    world_op(w, "fallocate %llu mode %x at %llu length %llu (size %llu)", (unsigned long long)i->ino, mode,
             (unsigned long long)off, (unsigned long long)len, (unsigned long long)i->size);
    if (!expect(w, vol_fallocate(w->v, i->ino, mode, off, len), 0))
        return;
    hole = w->middles && (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE));
    if (hole)
        middle_hole_before(w, i, MAX(i->size, end));
    if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        m_zero(w->m, i, off, end);
    if (!(mode & FALLOC_FL_KEEP_SIZE))
        i->size = MAX(i->size, end);
    if (hole)
        middle_hole_after(w, i);
    world_adopt(w, i);
}

/* Is the file zero in [off, end)? */
static bool m_is_zero(const struct m_inode *i, uint64_t off, uint64_t end)
{
    for (size_t k = m_page_at(i, off / M_PAGE); k < i->pages && i->page[k].no * M_PAGE < end; k++) {
        uint64_t start = i->page[k].no * M_PAGE, a = MAX(start, off), b = MIN(start + M_PAGE, end);

        if (b > a && memcmp(i->page[k].b + (a - start), image_zero, b - a) != 0)
            return false;
    }
    return true;
}

static void op_seek(struct world *w)
{
    struct m_inode *i = pick(w, PICK_FILE);
    uint64_t off = rng_below(&w->rng, i->size + 10), at = 0;
    int whence = rng_chance(&w->rng, 2) ? SEEK_DATA : SEEK_HOLE, rc;

    if (!S_ISREG(i->mode))
        return;
    world_op(w, "seek %s of %llu from %llu (size %llu)", whence == SEEK_DATA ? "data" : "hole",
             (unsigned long long)i->ino, (unsigned long long)off, (unsigned long long)i->size);
    rc = vol_seek(w->v, i->ino, off, whence, &at);
    if (off >= i->size) {
        expect(w, rc, -ENXIO);
    } else if (rc == -ENXIO && whence == SEEK_DATA) {
        if (!m_is_zero(i, off, i->size))
            world_fail(w, "no data, but there is");
    } else if (expect(w, rc, 0) && !w->in_doubt) {
        if (at < off || at > i->size || (whence == SEEK_DATA && at == i->size))
            world_fail(w, "returned offset %llu", (unsigned long long)at);
        else if (whence == SEEK_DATA ? !m_is_zero(i, off, at) : at < i->size && !m_is_zero(i, at, at + 1))
            world_fail(w, "offset %llu is wrong", (unsigned long long)at);
    }
}

static void op_fsync(struct world *w)
{
    struct m_inode *i = pick(w, rng_chance(&w->rng, 8) ? PICK_ANY : PICK_FILE);

    world_op(w, "fsync %llu", (unsigned long long)i->ino);
    w->synced = expect(w, vol_fsync(w->v, i->ino, rng_chance(&w->rng, 2)), 0) && !w->in_doubt;
}

/* A database's way: a block written in place, then fsynced, a few times. */
static void op_write_fsync(struct world *w)
{
    struct m_inode *i = pick(w, PICK_FILE);
    uint64_t off;

    if (!S_ISREG(i->mode) || i->size < w->block || w->m->pages > w->max_pages) {
        op_write(w);
        return;
    }
    off = rng_below(&w->rng, i->size / w->block) * w->block;
    rng_fill(&w->rng, w->buf, w->block);
    world_op(w, "write+fsync %llu at %llu", (unsigned long long)i->ino, (unsigned long long)off);
    if (!expect(w, vol_write(w->v, i->ino, off, w->buf, w->block), w->block))
        return;
    m_put(w->m, i, off, w->buf, w->block);
    if (w->in_doubt)
        return;
    world_adopt(w, i);
    w->synced = expect(w, vol_fsync(w->v, i->ino, true), 0) && !w->in_doubt;
}

static void op_sync(struct world *w)
{
    world_op(w, "sync");
    w->synced = expect(w, vol_sync(w->v), 0) && !w->in_doubt;
}

static void op_checkpoint(struct world *w)
{
    world_op(w, "checkpoint");
    w->synced = expect(w, volume_checkpoint(w->v), 0) && !w->in_doubt;
}

struct snapshot_pick {
    char name[VOLUME_SNAPSHOT_NAME + 1];
    unsigned n;
    struct rng *rng;
};

static int pick_snapshot(void *ctx, const struct volume_snapshot *s)
{
    struct snapshot_pick *p = ctx;

    if (rng_below(p->rng, ++p->n) == 0)
        memcpy(p->name, s->name, sizeof(p->name));
    return 0;
}

/* Up to four are there; they hold space, and volume_check holds them to what it holds the volume to. With them a full
 * volume cannot even delete: there none is made, and what there is goes. */
static void op_snapshot(struct world *w)
{
    struct snapshot_pick p = {.rng = &w->rng};

    if (!expect(w, volume_snapshot_list(w->v, pick_snapshot, &p), 0))
        return;
    if (!world_full(w) && p.n < 4 && (p.n == 0 || rng_chance(&w->rng, 2))) {
        snprintf(p.name, sizeof(p.name), "s%llx", (unsigned long long)rng_below(&w->rng, 1ull << 62));
        world_op(w, "snapshot %s", p.name);
        w->synced = expect_alt(w, volume_snapshot_create(w->v, p.name), 0, -EBUSY) && !w->in_doubt;
    } else if (p.n > 0) {
        world_op(w, "remove snapshot %s", p.name);
        w->synced = expect_alt(w, volume_snapshot_remove(w->v, p.name), 0, -ENOENT) && !w->in_doubt;
    }
}

static const struct {
    void (*run)(struct world *w);
    unsigned weight;
    bool changes;
} world_ops[] = {
    {op_mknod, 60, true},     {op_tmpfile, 5, true},    {op_symlink, 12, true},    {op_readlink, 8, false},
    {op_link, 14, true},      {op_unlink, 30, true},    {op_rmdir, 10, true},      {op_rename, 40, true},
    {op_lookup, 25, false},   {op_forget, 20, true},    {op_readdir, 8, false},    {op_getattr, 20, false},
    {op_setattr, 40, true},   {op_setxattr, 20, true},  {op_removexattr, 8, true}, {op_getxattr, 10, false},
    {op_listxattr, 5, false}, {op_write, 130, true},    {op_copy, 25, true},       {op_read, 60, false},
    {op_fallocate, 20, true}, {op_seek, 15, false},     {op_fsync, 12, true},      {op_write_fsync, 15, true},
    {op_sync, 3, true},       {op_checkpoint, 1, true}, {op_snapshot, 6, true},
};

/* Runs one random operation. changes_only: none that only reads (they leave nothing for a crash to lose). */
UNUSED static void world_step(struct world *w, bool changes_only)
{
    unsigned total = 0;
    size_t k;

    for (k = 0; k < ARRAY_LEN(world_ops); k++)
        total += world_ops[k].weight;
    do {
        unsigned r = (unsigned)rng_below(&w->rng, total);

        for (k = 0; k + 1 < ARRAY_LEN(world_ops) && r >= world_ops[k].weight; k++)
            r -= world_ops[k].weight;
    } while (changes_only && !world_ops[k].changes);
    w->synced = false;
    middle_clear(&w->middle);
    w->op[0] = 0;
    world_ops[k].run(w);
    w->ops++;
}

/* Compares the whole tree. False and w->fail on a difference. */
UNUSED static bool world_compare(struct world *w)
{
    struct snap *have = snap_volume(w->v, w->m->root->ino), *want = snap_model(w->m);

    world_op(w, "walk");
    if (have->err)
        world_fail(w, "%s", have->why);
    else if (have->full != want->full) {
        world_fail(w, "the trees differ (%u entries, listed above)", snap_diff(have, want, false, stdout));
    }
    snap_free(have);
    snap_free(want);
    return w->fail[0] == 0;
}

#endif
