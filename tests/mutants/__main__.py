"""`python -m tests.mutants [--only TEXT]`: plant each bug in a copy, and see a test fail. `make mutants`."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant

_ROOT = Path(__file__).parents[2]
_RESULT = _ROOT / "benchmarks" / "results" / "mutants.md"
_WITHIN_S = 600.0
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def _copy(into: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (_ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, into / name)


def _run(copy: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails, None if all pass. A run that takes too long has been noticed, too."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not long", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "none came to its end in time"
    if done.returncode == 0:
        return None
    found = _FAILED.search(done.stdout)
    return found[1] if found is not None else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"


def _caught(copy: Path, mutant: Mutant) -> str | None:
    path = copy / mutant.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return _run(copy, mutant.tests)
    finally:
        path.write_text(sound, encoding="utf-8")


def main() -> int:
    """Plant one after the other; the last line counts those that were caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this text")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.name]
    lines, survived = ["# Seeded bugs", "", "| bug | what it breaks | caught by |", "|---|---|---|"], 0
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        _copy(copy)
        for mutant in chosen:
            by = _caught(copy, mutant)
            survived += by is None
            print(f"{mutant.name}: {by or 'SURVIVED'}", flush=True)
            lines.append(f"| {mutant.name} | {mutant.breaks} | {by or '**nothing**'} |")
    if len(chosen) == len(MUTANTS):
        _RESULT.write_text("\n".join(lines) + "\n")
    print(f"{len(chosen) - survived} passed, {survived} failed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
