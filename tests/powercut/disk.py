"""What a disk may hold after a power cut: all that was synced, and of the rest any part, in sectors."""

import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tests.powercut.recorder import Op

SECTOR_BYTES = 512


@dataclass
class _File:
    """Content as synced, and what was done to it since. `content` None: it is not in the directory."""

    content: bytearray | None = None
    since: list[Op] = field(default_factory=list)

    def reach_disk(self, count: int) -> None:
        """The first so many of what is pending."""
        for op in self.since[:count]:
            self.content = _applied(self.content, op)
        del self.since[:count]


@dataclass
class Disk:
    """Follows the operations; at any moment it can be asked for an image as a cut would leave it.

    Each sector of an unsynced write is there or not by itself, as disks and page caches reorder and tear them;
    unsynced truncations and deletions have happened or not.
    """

    _files: dict[str, _File] = field(default_factory=dict)

    def do(self, op: Op) -> None:
        """One operation reaches the page cache, or with a sync everything before it the disk."""
        match op.kind:
            case "sync":
                file = self._files.setdefault(op.name, _File())
                file.reach_disk(len(file.since))
            case "sync_directory":
                for file in self._files.values():
                    deletions = [number for number, one in enumerate(file.since, 1) if one.kind == "delete"]
                    file.reach_disk(max(deletions, default=0))
            case "write" | "truncate" | "delete":
                self._files.setdefault(op.name, _File()).since.append(op)
            case "acknowledged":
                pass  # nothing of the disk's

    def cut(self, chance: random.Random, into: Path) -> None:
        """Write an image of the disk into an empty directory."""
        kept = chance.choice((0.0, 0.5, 0.9, 1.0))
        for name, file in self._files.items():
            content = None if file.content is None else bytearray(file.content)
            for op in file.since:
                for part in _parts(op):
                    if chance.random() < kept:
                        content = _applied(content, part)
            if content is not None:
                (into / name).write_bytes(content)


def _parts(op: Op) -> list[Op]:
    if op.kind != "write":
        return [op]
    cuts = [0, *range(SECTOR_BYTES - op.offset % SECTOR_BYTES, len(op.data), SECTOR_BYTES), len(op.data)]
    pieces = [(start, end) for start, end in pairwise(cuts) if start < end]
    return [Op("write", op.name, op.offset + start, op.data[start:end]) for start, end in pieces]


def _applied(content: bytearray | None, op: Op) -> bytearray | None:
    if op.kind == "delete":
        return None
    content = bytearray() if content is None else content
    if op.kind == "truncate":
        return content[: op.offset].ljust(op.offset, b"\0")
    if len(content) < op.offset:
        content.extend(bytes(op.offset - len(content)))
    content[op.offset : op.offset + len(op.data)] = op.data
    return content
