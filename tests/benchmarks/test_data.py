"""The benchmark of the data stream, in a size that takes a moment, and what all benchmarks share."""

import json
from pathlib import Path

import pytest

from benchmarks import common, data
from benchmarks.common import Stats, measure


def test_cases_take_turns() -> None:
    """Each once a round, and none is always the first; a figure is of all rounds."""
    calls: list[str] = []

    def case(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = measure({name: lambda name=name: case(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(calls) == "abcbcacab"
    assert found["a"] == Stats(min=1.0, median=6.0, max=8.0, rounds=3)


def test_it_runs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is the result, which lies in a file too, with a table beside it."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    data.main(["--megatokens", "0.4", "--rounds", "1", "--batches", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"bench", "figures", "targets", "met", "machine", "commit"}
    assert set(result["figures"]) == set(result["targets"]) == {"32x1024", "8x256"}
    for figures in result["figures"].values():
        assert len(figures["cases"]) == 4
        assert all(0 < case["min"] <= case["median"] <= case["max"] for case in figures["cases"].values())
    (file,) = tmp_path.glob("data-*.json")
    assert json.loads(file.read_text()) == result
    assert "| longwatch |" in file.with_suffix(".md").read_text()
