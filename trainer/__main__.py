"""`python -m trainer --run-dir DIR --attempt N`: one attempt of a run, as the supervisor starts it.

Torch is imported only after the supervisor has journaled this process and let it go, so that an import that hangs is
seen by the liveness page like any other hang.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.attempt import Attempt
from trainer.contract.exit_codes import ExitCode
from trainer.contract.paths import RunPaths

RELEASE_FD = "LONGWATCH_RELEASE_FD"
LOCK_FD = "LONGWATCH_LOCK_FD"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attempt and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run directory, with run.yaml and the plan")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt, with a plan of its own")
    arguments = parser.parse_args(argv)
    if not is_released():
        return ExitCode.LEFT
    with Attempt(RunPaths(arguments.run_dir.absolute()), arguments.attempt) as attempt:
        return attempt.run()


def is_released() -> bool:
    """Wait for the supervisor's byte; False if it died before it could send one. Without a pipe there is no wait."""
    number = os.environ.pop(RELEASE_FD, None)
    if number is None:
        return True
    with os.fdopen(int(number), "rb", buffering=0) as pipe:
        return len(pipe.read(1) or b"") == 1


def leave(status: int) -> NoReturn:
    """End the process: all is flushed and committed; tearing torch down costs a second, and can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
