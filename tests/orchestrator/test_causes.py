"""Why an attempt ended: every row of the table, its order, and what it is read from."""

import re
import signal
from pathlib import Path

import pytest

from orchestrator.process.causes import CAUSES, TABLE, ErrorFacts, Evidence, classify, output_tail, read_exit_file
from orchestrator.process.kernel import xids_of

_ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
_NCCL = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)"

EXAMPLES: list[tuple[str, Evidence]] = [
    ("hang", Evidence(signum=signal.SIGKILL, sent=frozenset({signal.SIGKILL}), hang_confirmed=True)),
    ("hang", Evidence(hang_confirmed=True)),
    ("finished", Evidence(code=0)),
    ("finished", Evidence(code=0, tail="CUDA out of memory")),
    ("preempted", Evidence(code=75)),
    ("left", Evidence(code=76)),
    ("replay_done", Evidence(code=71)),
    ("orphaned", Evidence(code=79)),
    ("config", Evidence(code=2, tail="usage: trainer")),
    ("data", Evidence(code=65)),
    ("data_unreachable", Evidence(code=68)),
    ("checkpoint", Evidence(code=66)),
    ("disk_full", Evidence(code=74)),
    ("disk_full", Evidence(code=1, tail="OSError: [Errno 28] No space left on device")),
    ("store", Evidence(code=69)),
    ("cuda_oom", Evidence(code=1, tail="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")),
    ("cuda_oom", Evidence(code=70, error=ErrorFacts(type="OutOfMemoryError", message="CUDA out of memory."))),
    ("host_oom", Evidence(signum=signal.SIGKILL, oom_kills=1)),
    ("host_oom", Evidence(code=70, error=ErrorFacts(type="OutOfMemoryError", message="DefaultCPUAllocator"))),
    ("host_oom", Evidence(code=1, tail="MemoryError")),
    ("nccl", Evidence(signum=signal.SIGABRT, tail=_NCCL)),
    ("gpu", Evidence(code=1, tail=_ECC)),
    ("gpu_needs_reset", Evidence(signum=signal.SIGABRT, tail="NVRM: Xid (PCI:0000:01:00): 79, off the bus")),
    ("gpu_needs_reset", Evidence(signum=signal.SIGKILL, xids=(13, 95))),
    ("gpu", Evidence(signum=signal.SIGABRT, xids=(31,))),
    ("native_crash", Evidence(signum=signal.SIGSEGV)),
    ("native_crash", Evidence(signum=signal.SIGABRT)),
    ("killed", Evidence(signum=signal.SIGKILL)),
    ("killed", Evidence(signum=signal.SIGKILL, sent=frozenset({signal.SIGKILL}), oom_kills=1)),
    ("killed", Evidence(signum=signal.SIGTERM)),
    ("user_error", Evidence(code=1, tail="Traceback ...\nTypeError: f() missing 1 argument")),
    ("user_error", Evidence(code=70, error=ErrorFacts(type="ModuleNotFoundError", message="No module named 'x'"))),
    ("error", Evidence(code=1, step=5, tail="TypeError: only after step 5")),
    ("error", Evidence(code=70, error=ErrorFacts(type="RuntimeError", message="boom"))),
    ("error", Evidence(code=37)),
    ("error", Evidence(code=1, hang_confirmed=True)),
    ("host_lost", Evidence(host_lost=True)),
    ("host_lost", Evidence(host_lost=True, hang_confirmed=False, tail="step 9")),
    ("preempted", Evidence(host_lost=True, code=75)),
    ("unknown", Evidence()),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "evidence"), EXAMPLES)
def test_evidence_leads_to_its_cause(cause: str, evidence: Evidence) -> None:
    """The first row that fits."""
    assert classify(evidence).cause == cause


def test_every_row_has_an_example_and_a_name_of_its_own() -> None:
    """No row is dead, and each says where it comes from."""
    assert {cause for cause, _ in EXAMPLES} == set(CAUSES)
    assert len(set(CAUSES)) == len(TABLE)
    assert all(row.source for row in TABLE)


def test_whose_signal_it_was_is_told() -> None:
    """A person reads the difference at once."""
    ours = classify(Evidence(signum=signal.SIGKILL, sent=frozenset({signal.SIGKILL})))
    theirs = classify(Evidence(signum=signal.SIGKILL))
    assert ours.detail == "SIGKILL, sent by the supervisor"
    assert theirs.detail == "SIGKILL, sent by somebody else"


def test_the_error_record_is_detail_and_frames() -> None:
    """By the frames the same failure is recognised twice."""
    error = ErrorFacts(type="RuntimeError", message="boom", frames=("loop.py:run",))
    cause = classify(Evidence(code=70, error=error, tail="noise"))
    assert (cause.detail, cause.frames) == ("RuntimeError: boom", ("loop.py:run",))


def test_without_an_error_record_the_last_line_is_the_detail() -> None:
    """What a user's own trainer printed last."""
    assert classify(Evidence(code=3, tail="a\nlast words\n\n")).detail == "exit code 3: last words"


def test_an_exit_file_that_is_torn_or_missing_says_nothing(tmp_path: Path) -> None:
    """Only a whole one counts; unknown keys are left out."""
    path = tmp_path / "exit.json"
    assert read_exit_file(path) is None
    path.write_text('{"code": 75, "reas')
    assert read_exit_file(path) is None
    path.write_text('{"code": 70, "reason": "error", "error": {"type": "E", "message": "m", "code": 70}, "new": 1}')
    said = read_exit_file(path)
    assert said is not None
    assert said.error == ErrorFacts(type="E", message="m")


def test_only_the_end_of_the_output_is_read(tmp_path: Path) -> None:
    """A log of gigabytes costs nothing, and what is not text does no harm."""
    path = tmp_path / "out"
    path.write_bytes(b"CUDA out of memory\n" + b"\xff" * 100_000 + b"\nend\n")
    tail = output_tail(path)
    assert tail.endswith("end\n")
    assert "CUDA" not in tail
    assert output_tail(tmp_path / "none") == ""


def test_xids_are_read_from_the_kernels_records() -> None:
    """Only those of the driver, and only from a moment on."""
    lines = (
        "4,1200,900000,-;NVRM: Xid (PCI:0000:65:00): 79, pid=1, GPU has fallen off the bus.\n"
        "6,1201,1500000,-;usb 1-1: new device\n"
        "4,1202,2000000,-;NVRM: Xid (PCI:0000:65:00): 31, pid=77, name=python, MMU fault\n"
        " SUBSYSTEM=pci\n"
    )
    assert xids_of(lines, 0) == (79, 31)
    assert xids_of(lines, 1_000_000) == (31,)
    assert xids_of("", 0) == ()


def test_the_page_on_the_policy_has_every_cause() -> None:
    """A table of causes that lacks one, or has one that is none, misleads whoever writes rules."""
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    table = page.split("## Causes of a crash")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(CAUSES)
