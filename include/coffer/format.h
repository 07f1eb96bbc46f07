/*
 * format.h - every structure on the disk of a coffer volume, format version 1. FORMAT.md (fs/volume) is the document; this
 * header is the same in C.
 *
 * A volume is two files.
 *
 *   data:  | super slot 0 | super slot 1 | ...space... | second copies of both at 32 MiB | ...space... |
 *          Space is counted in units of 4 KiB; a region is 64 MiB of them; `data` is a whole number of regions.
 *          Units hold tree nodes (4 each) or extents' chunks, all ciphertext.
 *   log:   | segment 0 | segment 1 |, each a row of records in 512-byte sectors, ciphertext or random bytes.
 *
 * One copy-on-write B+tree holds all state. The superblock's pointer to its root authenticates everything but the log;
 * each log record authenticates itself at its place.
 *
 * All integers are little-endian, but for those in item keys, which are big-endian so that memcmp() orders keys.
 */
#ifndef COFFER_FORMAT_H
#define COFFER_FORMAT_H

#include "fs/base/base.h"

#define FORMAT_VERSION 1

#define UNIT_BYTES     4096u
#define REGION_UNITS   16384u /* 64 MiB */
#define REGION_BYTES   ((uint64_t)REGION_UNITS * UNIT_BYTES)
#define NODE_BYTES     16384u
#define NODE_UNITS     (NODE_BYTES / UNIT_BYTES)
#define NODE_LEVEL_MAX 12
#define SECTOR_BYTES   512u

#define MAC_BYTES   16
#define NONCE_BYTES 24

/* --- item keys: (kind, a, b) --- */

#define ITEM_KINDS(X)                                                                                                  \
    X(INODE, 1)     /* a: inode                                   disk_inode */                                        \
    X(DIRENT, 2)    /* a: directory, b: name's hash + probe       disk_dirent, name */                                 \
    X(XATTR, 3)     /* a: inode, b: name's hash + probe           disk_xattr, name, value */                           \
    X(INLINE, 4)    /* a: inode                                   the file's bytes, or the symlink's target */         \
    X(RANGE, 5)     /* a: inode, b: first block                   disk_range */                                        \
    X(ORPHAN, 6)    /* a: inode without a name                    nothing */                                           \
    X(TRIM, 7)      /* a: inode                                   le64: blocks from here on are being freed */         \
    X(EXTENT, 8)    /* a: extent                                  disk_extent, chunks, refs */                         \
    X(SPACE, 9)     /* a: region                                  bitmap, REGION_UNITS bits, 1 = used */               \
    X(SNAPSHOT, 10) /* a: generation that it keeps             disk_snapshot, name */

enum item_kind {
#define X(name, number) ITEM_##name = (number),
    ITEM_KINDS(X)
#undef X
};

typedef struct {
    uint8_t b[8];
} be64;

static inline be64 be64_make(uint64_t x)
{
    be64 v;

    x = __builtin_bswap64(x);
    memcpy(v.b, &x, 8);
    return v;
}

static inline uint64_t be64_get(be64 v)
{
    uint64_t x;

    memcpy(&x, v.b, 8);
    return __builtin_bswap64(x);
}

struct disk_key {
    uint8_t kind;
    be64 a;
    be64 b;
};
_Static_assert(sizeof(struct disk_key) == 17, "disk_key");

/* --- tree nodes --- */

/* Names a node and authenticates it. */
struct disk_ptr {
    le64 addr;  /* first unit */
    le64 birth; /* generation of the checkpoint that wrote it */
    uint8_t nonce[NONCE_BYTES];
    uint8_t mac[MAC_BYTES];
};
_Static_assert(sizeof(struct disk_ptr) == 56, "disk_ptr");

#define NODE_MAGIC 0x444e4643u /* "CFND" */

/* A node's plaintext: this, then count slots, free space, items packed against the end in any order. */
struct disk_node {
    le32 magic;
    uint8_t level; /* 0: leaf */
    uint8_t reserved;
    le16 count;       /* of slots */
    le64 birth;       /* as in the pointer */
    le64 addr;        /* as in the pointer */
    le16 items_start; /* lowest offset of an item; NODE_BYTES when there is none */
    le16 items_bytes; /* sum of the items' lengths */
    uint8_t reserved2[4];
};
_Static_assert(sizeof(struct disk_node) == 32, "disk_node");

/* Slots are sorted by key. An item is a disk_key and the value: of a leaf as the kind says, of an inner node a disk_ptr.
 * An inner node's first key is not above any key below it. */
struct disk_slot {
    le16 off; /* of the item in the node */
    le16 len; /* key and value */
};
_Static_assert(sizeof(struct disk_slot) == 4, "disk_slot");

#define ITEM_VALUE_MAX 4800u /* so that three items and their slots fit a node */
#define INLINE_MAX     2048u /* bytes of a regular file kept in the tree */
#define SYMLINK_MAX    4095u

/* --- items --- */

struct disk_inode {
    le32 mode;
    le32 uid;
    le32 gid;
    le32 nlink;
    le64 size;
    le64 blocks; /* of the volume's block size, in RANGE items */
    le64 atime;  /* ns since 1970, signed */
    le64 mtime;
    le64 ctime;
    le64 btime;
    le32 rdev;
    le32 flags;      /* INODE_* */
    le64 parent;     /* of a directory, its parent; else 0 */
    le64 generation; /* of the volume at its making */
    le64 entries;    /* of a directory */
    le32 xattrs;     /* number of XATTR items */
    le32 reserved[3];
};
_Static_assert(sizeof(struct disk_inode) == 112, "disk_inode");

#define INODE_INLINE 1u /* content is in the INLINE item (absent: empty), there are no ranges */

#define COOKIE_FIRST 3ull                  /* hashes below are raised: 0 start, 1 ".", 2 ".." */
#define COOKIE_LAST  0x7fffffffffffffefull /* hashes above are lowered, so that probing stays below 2^63 */
#define PROBE_MAX    16                    /* a name is at one of hash .. hash + 15 */

struct disk_dirent {
    le64 ino;
    uint8_t type; /* S_IFMT >> 12 of the inode */
    uint8_t namelen;
};
_Static_assert(sizeof(struct disk_dirent) == 10, "disk_dirent");

struct disk_xattr {
    le16 valuelen;
    uint8_t namelen;
    uint8_t reserved;
};
_Static_assert(sizeof(struct disk_xattr) == 4, "disk_xattr");

/* Blocks b .. b + count - 1 of the file are chunks first .. first + count - 1 of the extent. What no range covers is a
 * hole. Blocks of extent EXTENT_LOST were lost: repair put the range there, and reading gives an error. */
struct disk_range {
    le64 extent;
    le16 first;
    le16 count;
};
_Static_assert(sizeof(struct disk_range) == 12, "disk_range");

#define EXTENT_LOST       0ull /* first is 0, count up to RANGE_LOST_MAX */
#define RANGE_LOST_MAX    65535u
#define EXTENT_BYTES      65536u /* most plaintext of one extent */
#define EXTENT_CHUNKS_MAX 16
#define EXTENT_HEADER     24 /* of crypto_secretstream_xchacha20poly1305 */
#define SUITE_XCHACHA20   1  /* crypto_secretstream_xchacha20poly1305 */

struct disk_extent {
    le64 addr;      /* first unit; chunks follow each other */
    le64 birth;     /* generation of the log that recorded it */
    uint8_t suite;  /* SUITE_* */
    uint8_t chunks; /* 1 .. EXTENT_CHUNKS_MAX */
    uint8_t refs;   /* 1: chunks le16 reference counts follow the chunks; 0: all are 1 */
    uint8_t epoch;  /* of the data key; 0 */
    uint8_t header[EXTENT_HEADER];
    /* struct disk_chunk chunk[chunks]; le16 ref[chunks] if refs */
};
_Static_assert(sizeof(struct disk_extent) == 44, "disk_extent");

/* What a secretstream message has besides the ciphertext that lies in `data`. */
struct disk_chunk {
    uint8_t tag; /* encrypted */
    uint8_t mac[MAC_BYTES];
};
_Static_assert(sizeof(struct disk_chunk) == 17, "disk_chunk");

/* The tree of a generation that is kept. Its own SPACE items say which units it needs. */
struct disk_snapshot {
    struct disk_ptr root;
    le32 root_level;
    uint8_t reserved[3];
    uint8_t namelen; /* 1 .. SNAPSHOT_NAME_MAX */
    le64 created;    /* ns since 1970 */
    le64 data_units; /* as in the superblock of that generation */
    le64 used_units;
    le64 next_inode;
    le64 next_extent;
    le64 inodes;
};
_Static_assert(sizeof(struct disk_snapshot) == 112, "disk_snapshot");

/* --- superblock: 4096 bytes = nonce, sealed struct disk_super, MAC --- */

#define SUPER_MAGIC            0x31726566666f6343ull /* "Coffer1" as bytes */
#define SUPER_SLOTS            2
#define SUPER_COPIES           2
/* The unit of a copy. A new superblock goes to the slot that does not hold the newest one. */
#define SUPER_UNIT(slot, copy) ((uint64_t)(copy) * (REGION_UNITS / 2) + (slot))

/* Incompatible features refuse to open, read-only-compatible ones allow reading, compatible ones are ignored. */
#define FEATURE_SNAPSHOTS  1u /* incompatible: who does not know them would write over what they keep */
#define FEATURES_INCOMPAT  FEATURE_SNAPSHOTS
#define FEATURES_RO_COMPAT 0u

#define SUPER_CLEAN 1u /* closed: no log record follows */

struct disk_super {
    le64 magic;
    le32 version;
    le32 compat, ro_compat, incompat;
    uint8_t volume_id[16];
    uint8_t branch[16]; /* random, made at format and by accept-rollback */
    le64 generation;
    le64 sequence; /* the last record that this state contains */
    struct disk_ptr root;
    le32 root_level;
    le32 block_size;
    le32 profile;
    le32 data_epoch;
    le64 size_limit; /* bytes */
    le64 data_units; /* length of `data` */
    le64 used_units; /* 1 bits of all regions */
    le64 next_inode;
    le64 next_extent;
    le64 inodes;       /* INODE items */
    le64 log_segment;  /* bytes */
    le32 log_segments; /* 2 */
    le32 flags;        /* SUPER_* */
    le64 created;      /* ns */
    uint8_t zero[3840];
};
_Static_assert(sizeof(struct disk_super) == UNIT_BYTES - NONCE_BYTES - MAC_BYTES, "disk_super");

/* --- log records --- */

#define RECORD_TYPES(X)                                                                                                \
    X(CHANGES, 1)  /* body: a row of changes, applied together */                                                      \
    X(FLUSH, 2)    /* no body: `data` and all records before it are flushed as its head says */                        \
    X(REQUESTS, 3) /* body: le64s, requests of before the segment that may be sent again */

enum record_type {
#define X(name, number) RECORD_##name = (number),
    RECORD_TYPES(X)
#undef X
};

/*
 * On disk: 24 bytes secretstream header, the head as first message (17 + 64 bytes), the body padded with zeroes as second
 * and final message. This fills its sectors exactly. Additional data of both: disk_record_ad. Behind it, in sectors of its
 * own, the payload: chunks as they belong into `data`.
 */
struct disk_record {
    le16 type;
    le16 reserved;
    le32 sectors;         /* of the whole record */
    le32 body_bytes;      /* without padding */
    le32 payload_sectors; /* of the sectors: ciphertext of the extents that the body brings */
    le64 sequence;
    le64 flushed;      /* highest sequence known to be durable when this record was sealed */
    le64 data_flushed; /* highest sequence whose extents are known to be durable */
    le64 mount_id;     /* of the mount that asked, random */
    le64 request;      /* FUSE's unique id without bit 63, or 0 */
    le64 reserved3;
};
_Static_assert(sizeof(struct disk_record) == 64, "disk_record");

struct disk_record_ad {
    uint8_t volume_id[16];
    le64 generation; /* of the segment: the checkpoint that switched to it */
    le64 sector;     /* in the segment */
};
_Static_assert(sizeof(struct disk_record_ad) == 32, "disk_record_ad");

#define RECORD_OVERHEAD (24u + 17u + 64u + 17u)
#define RECORD_BODY_MAX (256u << 10)
#define PAYLOAD_MAX     (64u << 10)
#define LOG_SEGMENTS    2

/* One change: this, and after a PUT its value. A, B of ALLOC and FREE: first unit, number of units. */
#define CHANGE_OPS(X)                                                                                                  \
    X(PUT, 1)   /* the item has this value from now on */                                                              \
    X(DEL, 2)   /* the item is gone */                                                                                 \
    X(ALLOC, 3) /* units are used by an extent */                                                                      \
    X(FREE, 4)  /* units are free once a checkpoint contains this */

enum change_op {
#define X(name, number) CHANGE_##name = (number),
    CHANGE_OPS(X)
#undef X
};

struct disk_change {
    uint8_t op;
    struct disk_key key; /* of ALLOC and FREE: kind 0, a, b */
    le16 len;            /* of the value; 0 but for PUT */
};
_Static_assert(sizeof(struct disk_change) == 20, "disk_change");

#endif
