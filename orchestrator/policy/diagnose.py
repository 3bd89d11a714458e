"""Diagnosis by replay (DESIGN 6): the bad stretch is run again to tell hardware from data from state. Pure.

Two plain replays first. They differ: hardware. They agree with each other, but are healthy where the record was not:
hardware again, a transient fault. Both are bad as the record was: once more without the suspect data, and if that is
clean, without an equal innocent window as control. The data is convicted only if the control is bad.
"""

import math

from orchestrator.policy.state import Commit, DiagnosisByReplay, EngineState, Incident, ReplayRow, Verdict
from trainer.contract.plan import SkipRange

_STAGES = ("plain replay 1 of 2", "plain replay 2 of 2", "without the suspect data", "without an innocent window")
# Replays on one device are bit-identical with deterministic kernels; without them, accumulation order moves a bf16
# loss by less than this share, and a fault that matters by more.
_SAME_SHARE = 1e-2


def begin(
    state: EngineState, incident: Incident, candidates: list[str], suspect: tuple[int, int], target: Commit
) -> DiagnosisByReplay:
    """Plan the replays from the target to the detection."""
    recorded = {
        row.step: ReplayRow(loss=row.loss, grad_norm=row.grad_norm, skipped=row.skipped)
        for row in state.history
        if row.step > target.step
    }
    size = suspect[1] - suspect[0]
    control = (suspect[0] - size, suspect[0])
    return DiagnosisByReplay(
        incident=incident.id,
        candidates=candidates,
        to_step=max(incident.detected_step, incident.onset_step, target.step + 1),
        suspect=suspect,
        control=control if control[0] >= target.position else None,
        recorded=recorded,
    )


def stage_name(replay: DiagnosisByReplay) -> str:
    """What the next replay is for."""
    return _STAGES[min(len(replay.runs), len(_STAGES) - 1)]


def extra_skips(replay: DiagnosisByReplay) -> tuple[SkipRange, ...]:
    """What the next replay leaves out."""
    window = {2: replay.suspect, 3: replay.control}.get(len(replay.runs))
    return () if window is None else (SkipRange(begin=window[0], end=window[1], then="drop"),)


def on_replay_step(state: EngineState, step: int, row: ReplayRow) -> None:
    """Keep what a replayed step gave."""
    if state.replay is not None and state.replay.runs:
        state.replay.runs[-1][step] = row


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
    if verdict is not None:
        incident.verdict, reason = verdict
        incident.why += f"; replays say {incident.verdict}: {reason}"


def _verdict(replay: DiagnosisByReplay) -> tuple[Verdict, str] | None:
    runs = replay.runs
    if len(runs) < 2:
        return None
    if not _alike(runs[0], runs[1]):
        return "hardware", "two identical replays differ"
    if not _bad(runs[0]):
        return "hardware", "two replays of the same data are healthy, the record was not"
    if len(runs) == 2:
        return None
    if _bad(runs[2]):
        return "state", "it happens without the suspect data too"
    if len(runs) == 3:
        if replay.control is None:
            return "data_and_state", "clean without the suspect data; no room for a control"
        return None
    if _bad(runs[3]):
        return "data", "clean without the suspect data, bad without an innocent window"
    return "data_and_state", "leaving out either window cures it"


def _bad(run: dict[int, ReplayRow]) -> bool:
    return any(row.skipped or not math.isfinite(row.loss) or not math.isfinite(row.grad_norm) for row in run.values())


def _alike(one: dict[int, ReplayRow], other: dict[int, ReplayRow]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(_same(row, other[step]) for step, row in one.items())


def _same(one: ReplayRow, other: ReplayRow) -> bool:
    if math.isfinite(one.loss) != math.isfinite(other.loss) or one.skipped != other.skipped:
        return False
    return not math.isfinite(one.loss) or abs(one.loss - other.loss) <= _SAME_SHARE * abs(one.loss)
