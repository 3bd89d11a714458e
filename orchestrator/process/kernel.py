"""What the kernel says of the GPUs: Xid messages of NVIDIA's driver, where /dev/kmsg may be read."""

import os
import re
from pathlib import Path

_KMSG = Path("/dev/kmsg")
_LINE = re.compile(r"^\d+,\d+,(\d+),[^;]*;.*?NVRM: Xid \([^)]*\): (\d+)")
_RECORD_BYTES = 8192  # the kernel gives one record for each read
#: After these the device is no good to anybody before a reset or a reboot: NVIDIA's catalogue of Xids, column
#: "immediate action" (RESET_GPU, RESTART_BM): ECC that cannot be contained, off the bus, NVLink, the system processor.
NEEDS_RESET = frozenset({48, 64, 74, 79, 95, 119, 120, 121, 140})


def xids_of(lines: str, since_us: int) -> tuple[int, ...]:
    """Numbers of the Xids in the kernel's records, from a moment on (microseconds since the boot). Pure."""
    found = (_LINE.match(line) for line in lines.splitlines())
    return tuple(int(match[2]) for match in found if match is not None and int(match[1]) >= since_us)


def xids_since(monotonic_s: float) -> tuple[int, ...]:
    """Xids since a moment of CLOCK_MONOTONIC; empty also where the kernel's messages may not be read.

    So no cause is ever concluded from their absence.
    """
    try:
        descriptor = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ()
    records = []
    try:
        while True:
            records.append(os.read(descriptor, _RECORD_BYTES).decode(errors="replace"))
    except OSError:
        pass  # EAGAIN: that was the newest; EPIPE: overwritten while it was read
    finally:
        os.close(descriptor)
    return xids_of("\n".join(records), int(monotonic_s * 1e6))
