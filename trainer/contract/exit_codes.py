"""Exit codes of the trainer process: its side of the contract with the supervisor.

Codes follow sysexits.h where one fits. Anything else (a signal, an unknown code) is classified by the
supervisor from the evidence in `orchestrator.process.causes`.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a trainer process says why it ended."""

    FINISHED = 0  # the last planned step is done and its checkpoint is committed
    CONFIG = 2  # the configuration cannot work here; nothing was changed
    DATA = 65  # a shard is missing, truncated or holds a token outside the vocabulary
    CHECKPOINT = 66  # none of the plan's candidate checkpoints could be loaded and verified
    DATA_UNREACHABLE = 68  # the storage of the data gave no answer for data.timeout_s; a checkpoint is committed
    STORE = 69  # the checkpoint store could not be reached before training began
    ERROR = 70  # an exception; the exit file holds the error record
    REPLAY_DONE = 71  # a diagnosis replay came to its end; nothing was committed
    DISK_FULL = 74  # ENOSPC or EDQUOT where the run's own files are written
    PREEMPTED = 75  # asked to leave; a checkpoint of the last step is committed
    LEFT = 76  # asked to leave without saving
    ORPHANED = 79  # no supervisor for the bounded time; a checkpoint is committed
