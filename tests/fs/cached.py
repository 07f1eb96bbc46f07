"""How many pages of a file are in the kernel's cache: python3 cached.py FD BYTES, of an inherited descriptor, so that nobody is
asked anything."""
import ctypes
import mmap
import os
import sys

fd, size = int(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
seen = (ctypes.c_ubyte * pages)()
if at == ctypes.c_void_p(-1).value or libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), seen):
    sys.exit(os.strerror(ctypes.get_errno()))
print(sum(b & 1 for b in seen))
