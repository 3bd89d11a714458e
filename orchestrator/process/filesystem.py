"""On what kind of filesystem a directory lies: SQLite's WAL, flock and mmap need a local one."""

import ctypes
import os
from pathlib import Path

from orchestrator.errors import NetworkFilesystemError

#: statfs(2) f_type of filesystems on which locks, fsync or shared memory may lie (statfs(2), linux/magic.h).
NETWORK_FILESYSTEMS = {
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x5346414F: "afs",
    0x6B414653: "kafs",
    0x73757245: "coda",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x7461636F: "ocfs2",
    0x01161970: "gfs2",
    0x20030528: "orangefs",
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_STATFS_BYTES = 256  # larger than struct statfs on every 64-bit Linux; f_type is its first long


def filesystem_magic(path: Path) -> int:
    """f_type of the filesystem that holds `path`."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _LIBC.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def refuse_network_filesystem(path: Path, magic: int | None = None) -> None:
    """Do nothing for a local directory.

    Raises:
        NetworkFilesystemError: it is on a network filesystem.
    """
    name = NETWORK_FILESYSTEMS.get(filesystem_magic(path) if magic is None else magic)
    if name is not None:
        raise NetworkFilesystemError(path, name)
