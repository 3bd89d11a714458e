"""What people and grep read: lines of a launch, incidents with their cost, the state of a run."""

import io
import math

import pytest
from rich.console import Console

from monitors.records import DataRange, EvalRecord, StartedRecord, StepRecord, StepTime
from monitors.taxonomy import IncidentClass
from orchestrator.policy.decisions import EndRun, StartAttempt
from orchestrator.policy.events import AttemptExited, RecordReceived, Ticked
from orchestrator.policy.state import Cost, Incident, RunStatus
from orchestrator.report.incidents import cost_text, incident_lines, total_cost
from orchestrator.report.lines import decision_line, event_line, incident_line, line
from orchestrator.report.live import LiveDisplay, PlainDisplay, display_for
from orchestrator.report.numbers import loss_text, short
from orchestrator.report.status import status_lines
from trainer.contract.plan import ResumePlan


class _Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _step(step: int, loss: float = 2.5, *, skipped: bool = False) -> RecordReceived:
    record = StepRecord(
        seq=step, attempt=1, at_s=0.0, step=step, loss=loss, grad_norm=0.5, clipped=False, lr=1e-3, tokens=100,
        step_time_s=StepTime(data=0, compute=1, other=0), data=DataRange(begin=0, end=8), skipped=skipped,
    )  # fmt: skip
    return RecordReceived(at_s=0.0, record=record)


def _status(**changes: object) -> RunStatus:
    facts: dict[str, object] = {
        "state": "running", "step": 120, "total_steps": 500, "attempt": 2, "loss": 2.5, "lr": 1e-3, "tokens": 12_345,
        "tokens_per_s": 4567.0, "validation": (100, 2.4), "last_good_step": 80, "last_commit_step": 100,
        "rollbacks_left": 5, "restarts_left": 9, "open_incidents": 1, "incidents": 2, "lr_factor": 0.5,
        "quarantined_shards": ["shard-005"],
    }  # fmt: skip
    return RunStatus.model_validate(facts | changes)


def _incident(**changes: object) -> Incident:
    facts: dict[str, object] = {
        "id": 3, "cls": IncidentClass.UNRECOVERED_SPIKE, "onset_step": 100, "detected_step": 104, "end_step": None,
        "decision": ["evaluate", "roll_back"], "why": "loss left its band", "state": "recovering",
    }  # fmt: skip
    return Incident.model_validate(facts | changes)


def _plain() -> tuple[PlainDisplay, io.StringIO, _Clock]:
    output, clock = io.StringIO(), _Clock()
    return PlainDisplay(Console(file=output, width=60), clock), output, clock


def test_line_is_word_and_pairs() -> None:
    """Unknown values are left out, text with spaces is quoted, numbers are short."""
    assert line("x", a=1, b=None, c=0.123456789, d="two words", e='say "so"') == (
        'x a=1 c=0.12346 d="two words" e="say \\"so\\""'
    )


def test_plain_lines_have_no_newline_inside_whatever_the_text() -> None:
    """A message over several lines stays one line of a log, and is not wrapped at the console's width."""
    display, output, _ = _plain()

    display.folded(AttemptExited(at_s=0, attempt=1, cause="error", code=70, detail="first\nsecond " + "x" * 200), ())

    (only,) = output.getvalue().splitlines()
    assert only.startswith("exit attempt=1 cause=error code=70 detail=")


def test_steps_are_shown_on_a_clock_and_bad_ones_at_once() -> None:
    """Five seconds between steps in a log; a skipped update is never left out."""
    display, output, clock = _plain()

    for step in range(1, 8):
        display.folded(_step(step, math.nan if step == 3 else 2.5, skipped=step == 3), ())
        clock.now_s += 1.0

    shown = [row.split()[1] for row in output.getvalue().splitlines()]
    assert shown == ["step=1", "step=3"]
    assert "loss=nan" in output.getvalue()
    clock.now_s += 10
    display.folded(_step(99), ())
    assert "step=99" in output.getvalue()


def test_launch_says_what_it_resumes_and_why() -> None:
    """The first candidate and the reason are in the line of the decision."""
    fresh = ResumePlan(run_id="x", attempt=1, epoch=1, fresh=True, because="first launch")
    again = ResumePlan(run_id="x", attempt=2, epoch=2, candidates=("000000000100-e1-1",), because="killed")

    assert decision_line(StartAttempt(plan=fresh)) == 'start attempt=1 resume=fresh because="first launch"'
    assert decision_line(StartAttempt(plan=again)) == "start attempt=2 resume=000000000100-e1-1 because=killed"


def test_end_of_run_has_state_and_exit_code() -> None:
    """The last line says how it ended."""
    decision = EndRun(state="halted", exit_code=3, because="halted: longwatch resume RUN --because TEXT")

    assert decision_line(decision) == (
        'end state=halted exit_code=3 because="halted: longwatch resume RUN --because TEXT"'
    )


def test_events_without_a_line_stay_silent() -> None:
    """A tick is nothing to read, and records have the line of their kind."""
    evaluation = EvalRecord(seq=1, attempt=1, at_s=0, step=50, loss=2.25, perplexity=9.4877, seconds=1)

    assert event_line(Ticked(at_s=1)) is None
    assert event_line(RecordReceived(at_s=1, record=evaluation)) == "eval step=50 loss=2.25 perplexity=9.488"


def test_started_line_names_what_was_condemned() -> None:
    """A checkpoint that failed its verification is not passed over in silence."""
    record = StartedRecord.model_validate(
        {
            "seq": 1, "attempt": 2, "at_s": 0, "step": 20, "position": 160, "tokens": 1, "loaded": "000000000020-e1-1",
            "condemned": [{"commit": "000000000030-e1-1", "why": "crc"}], "precision": "fp32", "device": "cpu",
            "parameters": 10, "vocab_size": 64, "batch_samples": 8, "sample_tokens": 32, "total_steps": 60,
            "total_samples": 100, "shards": ["a"], "peak_lr": 1e-3, "warmup_steps": 1,
        }
    )  # fmt: skip

    text = event_line(RecordReceived(at_s=0, record=record))

    assert text is not None
    assert "loaded=000000000020-e1-1 condemned=000000000030-e1-1" in text


def test_incidents_are_shown_once_and_again_when_they_change() -> None:
    """The same facts twice give one line, a changed outcome another."""
    display, output, _ = _plain()

    display.refresh(_status(), [_incident()])
    display.refresh(_status(), [_incident()])
    display.refresh(_status(), [_incident(outcome="worked", state="closed")])

    rows = output.getvalue().splitlines()
    closed = _incident(outcome="worked", state="closed")
    assert rows == [incident_line(_incident()), incident_line(closed, told=_incident().why)]
    assert "why=" not in rows[1]  # nothing new is said of it


def test_incidents_of_earlier_launches_are_not_told_again() -> None:
    """What was closed before is left out; what is still open when the run goes on is shown."""
    display, output, _ = _plain()

    display.refresh(_status(), [_incident(id=1, state="closed"), _incident(id=2)])

    assert output.getvalue().splitlines() == [incident_line(_incident(id=2))]


def test_terminal_gets_the_live_display_and_a_file_plain_lines() -> None:
    """Colours and cursor movement only where somebody can see them."""
    assert isinstance(display_for(Console(file=io.StringIO())), PlainDisplay)
    live = display_for(Console(file=io.StringIO(), force_terminal=True))
    live.close()
    assert isinstance(live, LiveDisplay)


def test_live_display_draws_the_run_and_keeps_event_lines() -> None:
    """Step, loss, LR with its factor, speed, budget and open incidents are in the picture."""
    output, clock = io.StringIO(), _Clock()
    display = LiveDisplay(Console(file=output, force_terminal=True, width=160, color_system=None), clock)

    display.folded(_step(120), ())
    display.refresh(_status(), [_incident()])
    display.close()

    text = output.getvalue()
    for part in ("step 120 of 500", "2.5000", "0.001 x0.5", "4.57k", "5 rollbacks, 9 restarts", "unrecovered_spike"):
        assert part in text


def test_cost_in_words_leaves_out_what_is_zero() -> None:
    """Nothing is nothing, one is singular, and costs add up."""
    one = {"cost": Cost(steps=1, tokens=4096, restart_s=2.34).model_dump()}
    two = {"cost": Cost(steps=24, skipped_samples=100).model_dump()}

    assert cost_text(Cost().model_dump()) == "nothing"
    assert cost_text(one["cost"]) == "1 step run again, 4,096 tokens trained again, 2.3 s to restart"
    assert cost_text(total_cost([one, two])).startswith("25 steps run again, 4,096 tokens trained again, 100 samples")


def test_incident_text_says_what_why_did_and_cost() -> None:
    """The published form is all that is needed."""
    facts = _incident(cost=Cost(steps=4), shards=[5], end_step=110, outcome="worked").model_dump(
        mode="json", by_alias=True
    )

    text = "\n".join(row.plain for row in incident_lines([facts]))

    assert "#3 unrecovered_spike  steps 100 to 110, detected at 104  worked" in text
    assert "why   loss left its band" in text
    assert "did   evaluate, roll_back" in text
    assert "shard 5" in text
    assert "cost  4 steps run again" in text


def test_status_text_leaves_out_what_is_not_known() -> None:
    """No validation, no speed, no checkpoint: no such lines, and never a 0 in their place."""
    full = "\n".join(row.plain for row in status_lines({"run_dir": "/r", **_status().model_dump(mode="json")}))
    unknown = _status(validation=None, tokens_per_s=None, last_commit_step=None, loss=None, lr=None)
    bare = "\n".join(row.plain for row in status_lines({"run_dir": "/r", **unknown.model_dump(mode="json")}))

    assert "lowered to 50% of the schedule" in full
    assert "step 100, last good one step 80" in full
    assert not any(word in bare for word in ("validation", "a second", "checkpoint", "loss"))


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (4.5e6, "4.5M"), (2e12, "2T")])
def test_short_numbers(number: float, text: str) -> None:
    """Three digits and a unit."""
    assert short(number) == text


def test_losses_that_are_not_finite_are_said() -> None:
    """NaN arrives as text in JSON and is shown as what it is."""
    assert (loss_text(None), loss_text(2.0), loss_text("NaN"), loss_text(math.inf)) == ("", "2.0000", "nan", "inf")
