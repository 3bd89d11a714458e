"""`python -m orchestrator.logbook RUN_DIR`: write all three forms into a run directory, behind everything else."""

import os
import sys
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.logbook.gather import gather
from orchestrator.logbook.render import FORMATS, write
from trainer.contract.paths import RunPaths

_NICE = 15  # training comes first


def main(run_dir: Path) -> int:
    """Returns the exit code."""
    os.nice(_NICE)
    try:
        book = gather(RunPaths(run_dir))
        for form in FORMATS:
            write(book, form, run_dir / f"report.{form}")
    except (OrchestratorError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
