"""What injected faults do to the process: hang, dawdle, ask for too much memory."""

import ctypes
import os
import signal
import time

import torch

from trainer.contract.config import FaultConfig

_TOO_MUCH_BYTES = 1 << 60
_LONG_S = 1 << 20


def hang(fault: FaultConfig) -> None:
    """Never return: in C with the GIL held, in C without it (as NCCL hangs), or stopped by the kernel.

    A signal interrupts the sleep but not the loop: a hung trainer does not save, it must be killed.
    """
    if fault.mode == "sigstop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    library = ctypes.PyDLL(None) if fault.mode == "gil_held" else ctypes.CDLL(None)
    while True:
        library.sleep(_LONG_S)


def dawdle(fault: FaultConfig) -> None:
    """Lose `factor` seconds."""
    time.sleep(fault.factor)


def exhaust_memory(device: torch.device) -> None:
    """Ask the device for more than any has.

    Raises:
        torch.OutOfMemoryError: on a GPU; on a CPU it is torch's RuntimeError about its allocator.
    """
    torch.empty(_TOO_MUCH_BYTES, dtype=torch.uint8, device=device)
