"""Diagnosis by replay (DESIGN 6): the bad stretch is run again to tell hardware, data, state and optimisation apart.

Pure. Two plain replays first. They differ where the device is deterministic, or are healthy where the record was not:
hardware. Both are bad as the record was: once more without the suspect data. If that is clean, without an equal
innocent window as control: the data is convicted only if the control is bad, else it was data x state. If it is bad,
with the learning rate lowered to almost nothing from shortly before the onset: clean is optimisation, bad is the state.
What falls between healthy and bad, or beyond the budget of steps, is inconclusive: nothing is skipped on a suspicion.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from statistics import median
from typing import Literal

from monitors.window import MAD_TO_SIGMA
from orchestrator.policy.model import Diagnose
from orchestrator.policy.rows import each_step, up_to
from orchestrator.policy.state import (
    Commit,
    DiagnosisByReplay,
    EngineState,
    HistoryRow,
    Incident,
    ReplayRow,
    Verdict,
)
from trainer.contract.plan import Overlay, ReplaySpec, ResumePlan, SkipRange

Arm = Literal["plain", "again", "without_suspect", "without_innocent", "lowered_lr"]
Judgement = Literal["bad", "clean", "unclear"]

_SAID: dict[Arm, str] = {
    "plain": "plain replay 1 of 2",
    "again": "plain replay 2 of 2",
    "without_suspect": "without the suspect data",
    "without_innocent": "without an innocent window",
    "lowered_lr": "with the learning rate lowered",
}
_HEALTHY_ROWS = 64  # before the onset, whose median is what the loss should have been
_SMOOTH_ROWS = 8  # a lone hard batch is no relapse
_BAD_SHARE, _CLEAN_SHARE = 0.5, 0.25  # of the recorded excess
_PROOF_STEPS = 3  # equal to the last bit over so many: deterministic; one atomic addition would show in the first
_OUTLIER = 20.0  # times the usual difference of two replays, where they are not deterministic
_SAME_SHARE = 1e-2  # and at least so much: accumulation order moves a bf16 loss by less
_LEAD_STEPS = 32  # before the onset, from which on the LR is lowered: what it does shows a little later


def begin(
    state: EngineState, incident: Incident, candidates: Sequence[Commit], suspect: tuple[int, int], settings: Diagnose
) -> DiagnosisByReplay:
    """Plan the replays from the first candidate to the detection."""
    target = candidates[0]
    recorded = {row.step: _replayed(row) for row in each_step(state.history, after=target.step)}
    before = (row for row in reversed(up_to(state.history, incident.onset_step - 1)) if _is_sound(row))
    healthy = [loss for row in islice(before, _HEALTHY_ROWS) for loss in repeat(row.loss, row.steps)][:_HEALTHY_ROWS]
    size = suspect[1] - suspect[0]
    control = (suspect[0] - size, suspect[0])
    level = median(healthy) if healthy else None
    return DiagnosisByReplay(
        incident=incident.id,
        candidates=[commit.id for commit in candidates],
        from_step=target.step,
        onset_step=incident.onset_step,
        to_step=max(incident.detected_step, incident.onset_step, target.step + 1),
        max_steps=settings.max_steps,
        lr_factor=settings.lr_factor,
        suspect=suspect,
        control=control if control[0] >= target.position else None,
        level=level,
        sigma=MAD_TO_SIGMA * median(abs(loss - level) for loss in healthy) if level is not None else 0.0,
        recorded=recorded,
    )


def next_arm(replay: DiagnosisByReplay) -> Arm:
    """What the next replay is for."""
    begin: tuple[Arm, ...] = ("plain", "again", "without_suspect")
    if len(replay.runs) < len(begin):
        return begin[len(replay.runs)]
    return "without_innocent" if judge(replay, replay.runs[2]) == "clean" else "lowered_lr"


def said(replay: DiagnosisByReplay) -> str:
    """The same in words."""
    return _SAID[next_arm(replay)]


def planned(replay: DiagnosisByReplay, plan: ResumePlan) -> ResumePlan:
    """The plan of the next replay, from that of a plain restart."""
    arm = next_arm(replay)
    skips, overlays = plan.skips, plan.overlays
    window = {"without_suspect": replay.suspect, "without_innocent": replay.control}.get(arm)
    if window is not None:
        skips = (*skips, SkipRange(begin=window[0], end=window[1], then="drop"))
    if arm == "lowered_lr":
        begin_step = max(replay.from_step + 1, replay.onset_step - _LEAD_STEPS)
        overlays = (*overlays, Overlay(from_step=begin_step, factor=replay.lr_factor, hold_until_step=replay.to_step))
    spec = ReplaySpec(to_step=replay.to_step, capture=True)
    return plan.model_copy(update={"skips": skips, "overlays": overlays, "replay": spec})


def on_replay_step(state: EngineState, step: int, row: ReplayRow) -> None:
    """Keep what a replayed step gave."""
    if state.replay is not None and state.replay.runs:
        state.replay.runs[-1][step] = row


def affordable(replay: DiagnosisByReplay) -> bool:
    """Whether the next replay is within the budget of steps; the two plain ones are wanted both or not at all."""
    each = replay.to_step - replay.from_step
    return max(2, len(replay.runs) + 1) * each <= replay.max_steps


def conclude(state: EngineState, *, completed: bool) -> None:
    """A replay has ended: settle the incident's verdict if it can be settled."""
    replay = state.replay
    assert replay is not None
    incident = state.incident(replay.incident)
    assert incident is not None
    if not completed or not replay.runs or not replay.runs[-1]:
        incident.verdict = "inconclusive"
        incident.why += "; a replay did not come to its end"
        return
    verdict = _verdict(replay)
    if verdict is None and not affordable(replay):
        verdict = "inconclusive", f"{said(replay)} would take more than the {replay.max_steps} steps allowed"
    if verdict is None:
        return
    incident.verdict, reason = verdict
    incident.why += f"; replays say {incident.verdict}: {reason}"
    incident.evidence["replays"] = [str(judge(replay, run)) for run in replay.runs]
    incident.evidence["replayed_steps"] = sum(len(run) for run in replay.runs)
    named = incident.evidence.get("shards")
    if incident.verdict == "data" and isinstance(named, list) and len(named) == 1:
        incident.shards = sorted({*incident.shards, int(named[0])})


def judge(replay: DiagnosisByReplay, run: dict[int, ReplayRow]) -> Judgement:
    """Whether it went wrong as the record did: non-finite where that was, else by how far the loss left its level."""
    onset = [row for step, row in replay.recorded.items() if step >= replay.onset_step]
    broken = any(not _is_sound(row) for row in run.values())
    if broken or any(not _is_sound(row) for row in onset):
        return "bad" if broken else "clean"
    rows = min(_SMOOTH_ROWS, max(1, len(onset)))
    recorded = _excess(replay, {s: row for s, row in replay.recorded.items() if s >= replay.onset_step}, rows)
    if recorded is None or recorded <= 0 or (found := _excess(replay, run, rows)) is None:
        return "unclear"
    if found >= _BAD_SHARE * recorded:
        return "bad"
    return "clean" if found <= _CLEAN_SHARE * recorded else "unclear"


# -- verdict ----------------------------------------------------------------------------------------------------------


def _verdict(replay: DiagnosisByReplay) -> tuple[Verdict, str] | None:
    runs = replay.runs
    if len(runs) < 2:
        return None
    judged = [judge(replay, run) for run in runs]
    settled = _plain(replay, judged[0], judged[1])
    if settled is not None or len(runs) == 2:
        return settled
    if "unclear" in judged[2:]:
        return "inconclusive", f"{_SAID['without_suspect']} or after it, it was neither healthy nor as bad as before"
    if judged[2] == "bad":
        if len(runs) == 3:
            return None
        if judged[3] == "bad":
            return "state", "it happens without the suspect data and at a lowered learning rate too"
        return "optimisation", "it happens without the suspect data, and not at a lowered learning rate"
    if len(runs) == 3:
        if replay.control is None:
            return "data_and_state", "clean without the suspect data; no room for a control"
        return None
    if judged[3] == "bad":
        return "data", "clean without the suspect data, bad without an innocent window"
    return "data_and_state", "leaving out either window cures it"


def _plain(replay: DiagnosisByReplay, one: Judgement, other: Judgement) -> tuple[Verdict, str] | None:
    """What the two plain replays say by themselves; None where both are bad, so that the record holds."""
    first, second = replay.runs[0], replay.runs[1]
    same = first.keys() == second.keys() and _differences(first, second, first.keys()) == []
    if not same and _is_deterministic(replay):
        return "hardware", "two identical replays differ on a device that is deterministic"
    if not same and _far_apart(replay):
        return "hardware", "two identical replays differ by far more than they usually do"
    if one != other or "unclear" in (one, other):
        return "inconclusive", "the replays are neither both healthy nor both as bad as the record"
    if one == "bad":
        return None
    if same:
        return "hardware", "two replays of the same data are healthy, the record was not"
    return "inconclusive", "two replays are healthy, but the device is not deterministic, so chance may have done it"


def _is_deterministic(replay: DiagnosisByReplay) -> bool:
    """Whether any two of record and replays began with the same bits; only chance in the device keeps all apart."""
    logs = (replay.recorded, *replay.runs[:2])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        common = sorted(logs[one].keys() & logs[other].keys())[:_PROOF_STEPS]
        enough = len(common) == _PROOF_STEPS and common[-1] < replay.onset_step
        if enough and not _differences(logs[one], logs[other], common):
            return True
    return False


def _far_apart(replay: DiagnosisByReplay) -> bool:
    """Before the onset, where nothing amplifies small differences yet."""
    first, second = replay.runs[0], replay.runs[1]
    before = [step for step in first.keys() & second.keys() if step < replay.onset_step]
    if any(_is_sound(first[step]) != _is_sound(second[step]) for step in before):
        return True
    apart = [(abs(first[s].loss - second[s].loss), abs(first[s].loss)) for s in before if _is_sound(first[s])]
    usual = median(far for far, _ in apart) if apart else 0.0
    return any(far > max(_OUTLIER * usual, _SAME_SHARE * loss) for far, loss in apart)


def _differences(one: dict[int, ReplayRow], other: dict[int, ReplayRow], steps: Iterable[int]) -> list[int]:
    return [step for step in steps if not _same(one[step], other[step])]


def _same(one: ReplayRow, other: ReplayRow) -> bool:
    pairs = ((one.loss, other.loss), (one.grad_norm, other.grad_norm))
    return one.skipped == other.skipped and all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def _excess(replay: DiagnosisByReplay, rows: dict[int, ReplayRow], smooth: int) -> float | None:
    """Largest running median of the loss over what it should have been; None where nothing is known of that.

    That is the recorded loss before the onset, since early losses fall fast, and their last level from it on.
    """
    if replay.level is None:
        return None
    before = {s: row.loss for s, row in replay.recorded.items() if s < replay.onset_step and _is_sound(row)}
    excess = [row.loss - before.get(step, replay.level) for step, row in sorted(rows.items())]
    largest = max((median(part) for part in _windows(excess, smooth)), default=None)
    noise = 6.0 * replay.sigma / math.sqrt(smooth)
    return largest if largest is None or largest > noise else min(largest, 0.0)


def _windows(values: Sequence[float], size: int) -> Iterable[Sequence[float]]:
    return (values[end - size : end] for end in range(size, len(values) + 1))


def _is_sound(row: ReplayRow | HistoryRow) -> bool:
    return not row.skipped and math.isfinite(row.loss) and math.isfinite(row.grad_norm)


def _replayed(row: HistoryRow) -> ReplayRow:
    return ReplayRow(loss=row.loss, grad_norm=row.grad_norm, skipped=row.skipped)
