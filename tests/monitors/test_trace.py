"""Recorded runs: what a cell means, and errors that name the line and the column."""

import math
from pathlib import Path

import pytest

from monitors.records import EvalRecord, StepRecord
from monitors.trace import TraceError, read_trace


def _trace(folder: Path, text: str) -> Path:
    path = folder / "run.csv"
    path.write_text(text)
    return path


def test_columns_become_records(tmp_path: Path) -> None:
    """In any order; unknown columns are left alone."""
    path = _trace(
        tmp_path,
        "loss,step,note,grad_norm,lr,tokens_per_sec,update_ratio,val_loss\n2.5,7,hi,1.5,0.001,2000,0.002,2.75\n",
    )

    step, evaluation = read_trace(path)

    assert isinstance(step, StepRecord)
    assert (step.step, step.loss, step.grad_norm, step.lr) == (7, 2.5, 1.5, 0.001)
    assert step.update_ratio == {"all": 0.002}
    assert step.step_time_s is not None
    assert step.tokens is not None
    assert step.tokens / step.step_time_s.total == pytest.approx(2000)
    assert isinstance(evaluation, EvalRecord)
    assert (evaluation.step, evaluation.loss) == (7, 2.75)


def test_an_empty_cell_is_not_recorded_and_nan_is_non_finite(tmp_path: Path) -> None:
    """Two facts that must never be taken for each other."""
    path = _trace(tmp_path, "step,loss,grad_norm\n1,2.0,\n2,,1.0\n3,nan,inf\n4,-inf,nan\n")

    first, third, fourth = read_trace(path)

    assert isinstance(first, StepRecord)
    assert isinstance(third, StepRecord)
    assert isinstance(fourth, StepRecord)
    assert first.grad_norm is None
    assert math.isnan(third.loss)
    assert third.grad_norm == math.inf
    assert fourth.loss == -math.inf


@pytest.mark.parametrize(
    ("text", "line", "column", "fact"),
    [
        ("", 1, "step", "missing"),
        ("step,grad_norm\n1,2\n", 1, "loss", "missing"),
        ("step,loss\n1,2.0\ntwo,2.0\n", 3, "step", "'two'"),
        ("step,loss\n1,2.0\n1.5,2.0\n", 3, "step", "'1.5'"),
        ("step,loss\n-1,2.0\n", 2, "step", "'-1'"),
        ("step,loss\nnan,2.0\n", 2, "step", "'nan'"),
        ("step,loss\ninf,2.0\n", 2, "step", "'inf'"),
        ("step,loss\n1,2.0\n1,2.1\n", 3, "step", "comes after"),
        ("step,loss\n5,2.0\n4,2.1\n", 3, "step", "comes after"),
        ("step,loss\n1,high\n", 2, "loss", "'high'"),
        ("step,loss,lr\n1,2.0,1e-3x\n", 2, "lr", "'1e-3x'"),
    ],
)
def test_what_is_no_trace_is_named_by_line_and_column(
    tmp_path: Path, text: str, line: int, column: str, fact: str
) -> None:
    """And the remedy says what a trace is."""
    with pytest.raises(TraceError, match=fact) as caught:
        read_trace(_trace(tmp_path, text))

    assert (caught.value.line, caught.value.column) == (line, column)
    assert "step, loss" in str(caught.value)


def test_a_binary_file_is_no_trace(tmp_path: Path) -> None:
    """A checkpoint given by mistake."""
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)))

    with pytest.raises(TraceError, match="not a text file"):
        read_trace(path)
