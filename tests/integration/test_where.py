"""`longwatch data where` against what the step records of a real run say: skips, quarantine, a blend, a crash."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.app import run as command_line
from tests.runs import Run, edit_state, tiny_config, write_corpus
from trainer.contract.paths import RunPaths
from trainer.data.history import read_history
from trainer.data.where import position_answer, step_answer

pytestmark = pytest.mark.training

SKIP, SHUT, PLANNED = (200, 216), 1, 400


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Run:
    """24 steps of one source; then a skip, a quarantine and a second source; a crash; on behind the planned end."""
    root = tmp_path_factory.mktemp("where")
    config = tiny_config(corpus, steps=24, evaluate={"every_steps": 1000}, checkpoint={"every_steps": 10})
    Run(root, config).launch()
    more = write_corpus(root / "more", num_shards=2, seed=9)
    sources = [{"source": "train", "url": str(corpus), "weight": 3}, {"source": "more", "url": str(more)}]
    data = {**config["data"], "train": sources}
    faults = [{"kind": "sigkill", "steps": [33, 33]}]
    again = Run(root, {**config, "steps": 60, "data": data, "faults": faults})
    edit_state(
        again,
        skips=[{"begin": SKIP[0], "end": SKIP[1], "then": "defer"}],
        quarantines=[{"shard": SHUT, "from_position": 192}],
        deferred_from=PLANNED,
    )
    again.launch()
    return again


def _ask(root: Path, *question: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "trainer.data.where", "--run-dir", str(root), "--json", *question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _counts(rows: list[dict[str, Any]], shard: int) -> dict[int, int]:
    """Step -> sequences of a shard, by the step records."""
    return {row["step"]: row["shards"][str(shard)][0] for row in rows if str(shard) in row["shards"]}


def _read(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in answer["reads"] if row["fate"] in ("read", "deferred")]


@pytest.mark.parametrize("shard", [0, SHUT, 9])
def test_every_read_of_a_shard_is_in_the_records_and_the_other_way_round(run: Run, shard: int) -> None:
    """Of the surviving history, and of each attempt; of a quarantined shard nothing from then on."""
    reads = _read(_ask(run.paths.root, "--shard", str(shard)))
    survivors = Counter(row["step"] for row in reads if row["survives"])
    assert survivors == _counts(list(run.surviving_steps().values()), shard)
    for attempt in range(1, len(run.attempts()) + 1):
        found = Counter(row["step"] for row in reads if row["attempt"] == attempt)
        assert found == _counts(run.records(attempt, "step"), shard)
    assert shard != SHUT or 1 <= max(row["step"] for row in reads) <= 24


def test_skipped_samples_are_read_at_the_end(run: Run) -> None:
    """Each position of the skip: deferred to a position behind the planned end, but for those of the shut shard."""
    history = read_history(run.paths)
    deferred = []
    for position in range(*SKIP):
        answer = position_answer(history, position)
        if answer["samples"][0]["shard"] != SHUT:
            assert answer["fate"] == "deferred"
            assert position_answer(history, answer["read_at"])["samples"][0]["raw"] == position
            deferred.append(answer["read_at"])
    assert deferred == sorted(set(deferred))
    assert PLANNED <= deferred[0] <= deferred[-1] < PLANNED + 16


@pytest.mark.parametrize("step", [1, 24, 25, 31, 45, 52, 60])
def test_a_steps_samples_are_those_that_it_recorded(run: Run, step: int) -> None:
    """Shards, their counts and the raw range; where two attempts came to it, of both; and back from each position."""
    history = read_history(run.paths)
    answer = step_answer(history, step)
    (found,) = [row for row in answer["ranges"] if row["survives"]]
    recorded = run.surviving_steps()[step]
    assert (found["begin"], found["end"]) == (recorded["data"]["begin"], recorded["data"]["end"])
    shards = Counter(str(sample["shard"]) for sample in found["samples"])
    assert shards == {shard: count for shard, (count, _) in recorded["shards"].items()}
    assert len(answer["ranges"]) == (2 if step == 31 else 1)
    for sample in found["samples"]:
        assert sample["tokens"] == [sample["sample"] * 32, sample["sample"] * 32 + 33]
        back = position_answer(history, sample["position"])
        assert (back["step"], back["samples"]) == (step, [sample])


def test_what_is_ahead_comes_as_foretold(run: Run, tmp_path: Path) -> None:
    """The run as it was at step 40 foretells what the records of its later steps say."""
    root = tmp_path / "then"
    shutil.copytree(run.paths.root, root, ignore=shutil.ignore_patterns("run.db*", "*.sock"))
    last = RunPaths(root).records(len(run.attempts()))
    lines = last.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    cut = next(n for n, row in enumerate(rows) if row["kind"] == "step" and row["step"] == 41)
    last.write_text("".join(lines[:cut]))

    steps = run.surviving_steps()
    for shard in (0, 8):
        answer = _ask(root, "--shard", str(shard))
        assert answer["done"]["step"] == 40
        assert answer["looked_until"]["step"] == 60
        counted = Counter(row["step"] for row in _read(answer) if row["survives"] in (True, None))
        assert counted == _counts(list(steps.values()), shard)
    (ahead,) = _ask(root, "--step", "55")["ranges"]
    assert {"begin": ahead["begin"], "end": ahead["end"]} == steps[55]["data"]


def test_the_command_line_says_it_in_words(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """By name of a shard or source; what is not there is named, with exit code 2."""
    root = str(run.paths.root)
    assert command_line(["data", "where", root, "--shard", "more/shard-000.bin", "--sample", "3"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("more/shard-000.bin (shard 8 of source more): sample 3")
    assert "looked ahead to step 60" in said
    assert command_line(["data", "where", root, "--source", "train", "--sample", "400"]) == 0
    assert capfd.readouterr().out.startswith("train/shard-001.bin (shard 1 of source train): sample 26")
    assert command_line(["data", "where", root, "--step", "31"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 2 * 9
    for question in (["--shard", "x"], ["--shard", "0", "--sample", "9999"], ["--sample", "1"], ["--step", "99"], []):
        assert command_line(["data", "where", root, *question]) == 2
        assert ";" in capfd.readouterr().err


def test_it_needs_no_torch(run: Run) -> None:
    """It answers in a fraction of a second."""
    code = f"""
import sys, trainer.data.where
assert trainer.data.where.main(["--run-dir", {str(run.paths.root)!r}, "--step", "3"]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
