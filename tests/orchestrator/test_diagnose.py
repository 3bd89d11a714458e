"""Diagnosis by replay as a pure decision: which replay comes next, what they say together, and what is skipped then."""

import math
import random
from collections.abc import Callable

import pytest

from monitors.taxonomy import IncidentClass
from orchestrator.documents import ConfigError, parse_document, validate
from orchestrator.policy import diagnose
from orchestrator.policy.model import Diagnose, Policy, policy_schema
from orchestrator.policy.rules import choose
from orchestrator.policy.shipped import in_force
from orchestrator.policy.state import DiagnosisByReplay, EngineState, Incident, ReplayRow
from tests.orchestrator.simulated import BATCH, World, healthy
from trainer.contract.plan import ResumePlan

_ONSET, _FROM, _TO = 60, 40, 72
Losses = Callable[[int], float]


def _noise(step: int, seed: int = 0) -> float:
    return 2.0 + random.Random(step * 1000 + seed).gauss(0, 0.01)


def _spiked(step: int) -> float:
    return _noise(step) + (1.0 if step >= _ONSET else 0.0)


def _broken(step: int) -> float:
    return math.nan if step >= _ONSET else _noise(step)


def _as_long(share: float) -> Losses:
    """A spike of so much of the recorded one."""
    return lambda step: _noise(step) + (share if step >= _ONSET else 0.0)


def _shaky(base: Losses, seed: int) -> Losses:
    """A device that is not deterministic: every step a little else."""
    return lambda step: base(step) + random.Random(step * 7 + seed).gauss(0, 1e-4)


def _rows(losses: Losses) -> dict[int, ReplayRow]:
    found = {step: losses(step) for step in range(_FROM + 1, _TO + 1)}
    return {step: ReplayRow(loss=loss, grad_norm=0.5, skipped=math.isnan(loss)) for step, loss in found.items()}


def _diagnosis(recorded: Losses, max_steps: int = 8000, *, control: bool = True) -> EngineState:
    state = EngineState()
    cls = IncidentClass.SUDDEN_NAN
    incident = Incident(id=1, cls=cls, onset_step=_ONSET, detected_step=_TO, why="x", evidence={"shards": [7]})
    state.incidents = [incident]
    state.replay = DiagnosisByReplay(
        incident=1, candidates=["c"], from_step=_FROM, onset_step=_ONSET, to_step=_TO, max_steps=max_steps,
        lr_factor=0.01, suspect=(464, 600), control=(328, 464) if control else None, level=2.0, sigma=0.01,
        recorded=_rows(recorded),
    )  # fmt: skip
    return state


def _settle(state: EngineState, *runs: Losses) -> tuple[str | None, list[str]]:
    """The verdict, and the arms that were run for it."""
    assert state.replay is not None
    arms: list[str] = []
    for run in runs:
        arms.append(diagnose.next_arm(state.replay))
        state.replay.runs.append({})
        for step, row in _rows(run).items():
            diagnose.on_replay_step(state, step, row)
        diagnose.conclude(state, completed=True)
        if state.incidents[0].verdict is not None:
            break
    return state.incidents[0].verdict, arms


@pytest.mark.parametrize("bad", [_spiked, _broken], ids=["finite", "non-finite"])
@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        (["fine", "fine"], "hardware"),
        (["bad", "fine"], "hardware"),
        (["bad", "bad", "fine", "bad"], "data"),
        (["bad", "bad", "fine", "fine"], "data_and_state"),
        (["bad", "bad", "bad", "fine"], "optimisation"),
        (["bad", "bad", "bad", "bad"], "state"),
    ],
)
def test_what_the_replays_say_together(bad: Losses, runs: list[str], verdict: str) -> None:
    """Each cause has its own pattern, whether the loss left the numbers or only its band; the fewest runs are made."""
    state = _diagnosis(bad)

    found, arms = _settle(state, *({"bad": bad, "fine": _noise}[name] for name in runs))

    assert found == verdict, state.incidents[0].why
    assert len(arms) == len(runs)
    assert arms[3:] == (["without_innocent" if runs[2] == "fine" else "lowered_lr"] if runs[3:] else [])
    assert state.incidents[0].shards == ([7] if verdict == "data" else [])
    assert len(state.incidents[0].evidence["replays"]) == len(runs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "runs",
    [
        [_shaky(_noise, 1), _shaky(_noise, 2)],
        [_shaky(_noise, 1), _shaky(_spiked, 2)],
        [_as_long(0.4), _as_long(0.4)],
        [_spiked, _spiked, _as_long(0.4)],
        [_spiked, _spiked, _noise, _as_long(0.4)],
        [_spiked, _spiked, _spiked, _as_long(0.4)],
    ],
    ids=["no determinism", "no determinism, one bad", "in between", "without", "control", "lowered"],
)
def test_what_is_not_clear_convicts_nobody(runs: list[Losses]) -> None:
    """A device that gives other numbers each time, or a loss between healthy and as bad as before."""
    state = _diagnosis(_spiked if len(runs) > 2 or runs[0](70) - 2.0 > 0.3 else _shaky(_spiked, 3))

    assert _settle(state, *runs)[0] == "inconclusive", state.incidents[0].why


def test_one_replay_far_off_before_the_onset_is_the_device_even_without_determinism() -> None:
    """Beyond the noise of the healthy stretch by far."""
    state = _diagnosis(_shaky(_spiked, 3))

    one, other = _shaky(_spiked, 1), _shaky(_spiked, 2)
    verdict, _ = _settle(state, one, lambda step: other(step) + (0.5 if step == 50 else 0.0))

    assert verdict == "hardware"


def test_without_room_for_a_control_no_data_is_convicted() -> None:
    """The window is skipped, nothing is quarantined."""
    assert _settle(_diagnosis(_broken, control=False), _broken, _broken, _noise)[0] == "data_and_state"


@pytest.mark.parametrize(("steps", "runs"), [(2, 2), (3, 3), (4, 4)])
def test_replays_stay_within_their_budget(steps: int, runs: int) -> None:
    """Of the four that a verdict would take only so many fit; the rest is not known, and nothing is skipped for it."""
    state = _diagnosis(_broken, max_steps=steps * (_TO - _FROM))
    assert state.replay is not None
    assert diagnose.affordable(state.replay)

    verdict, arms = _settle(state, _broken, _broken, _noise, _broken)

    assert len(arms) == runs
    assert verdict == ("data" if runs == 4 else "inconclusive")
    nothing_done = state.replay.model_copy(update={"runs": [], "max_steps": 2 * (_TO - _FROM) - 1})
    assert not diagnose.affordable(nothing_done)


def test_each_replay_changes_one_thing() -> None:
    """Nothing twice, then the suspect window, then an equal one before it; or the LR from shortly before the onset."""
    plan = ResumePlan(run_id="r", attempt=2, epoch=2, candidates=("c",))
    state = _diagnosis(_broken)
    assert state.replay is not None
    assert diagnose.planned(state.replay, plan).skips == ()
    state.replay.runs = [_rows(_broken), _rows(_broken)]
    (skip,) = diagnose.planned(state.replay, plan).skips
    assert (skip.begin, skip.end, skip.then) == (464, 600, "drop")
    state.replay.runs.append(_rows(_noise))
    (skip,) = diagnose.planned(state.replay, plan).skips
    assert (skip.begin, skip.end) == (328, 464)
    state.replay.runs[2] = _rows(_broken)
    lowered = diagnose.planned(state.replay, plan)
    assert lowered.skips == ()
    assert [overlay.at(_ONSET) for overlay in lowered.overlays] == [0.01]
    assert lowered.replay is not None
    assert lowered.replay.to_step == _TO


@pytest.mark.parametrize("written", ["diagnose", "{diagnose: replay}", "{diagnose: {max_steps: 50, lr_factor: 0.1}}"])
def test_the_action_is_written_with_or_without_its_budget(written: str) -> None:
    """`diagnose`, `diagnose: replay`, or with its arguments; and the schema for editors knows them."""
    text = f"version: 1\nrules:\n  - on: sudden_nan\n    do: [{written}]\n"

    policy = validate(parse_document(text, "p.yaml"), Policy)

    found = policy.rules[0].rungs()[0].diagnose
    assert found == (Diagnose(max_steps=50, lr_factor=0.1) if "max_steps" in written else Diagnose())
    assert "max_steps" in str(policy_schema()["$defs"]["Diagnose"])


@pytest.mark.parametrize("wrong", ["{diagnose: rerun}", "{diagnose: {max_steps: 1}}", "{diagnose: {lr_factor: 1}}"])
def test_a_wrong_argument_is_named(wrong: str) -> None:
    """Unknown ways, budgets in which nothing fits, and an LR that is not lowered."""
    with pytest.raises(ConfigError, match=r"p\.yaml:4"):
        validate(parse_document(f"version: 1\nrules:\n  - on: sudden_nan\n    do: [{wrong}]\n", "p.yaml"), Policy)


@pytest.mark.parametrize("verdict", ["hardware", "data", "data_and_state", "state", "optimisation", "inconclusive"])
@pytest.mark.parametrize("cls", ["sudden_nan", "unrecovered_spike"])
def test_every_verdict_has_an_answer_and_only_data_is_skipped_for_data(cls: str, verdict: str) -> None:
    """The shipped rules behind a rule that diagnoses: hardware skips and cuts nothing, optimisation cuts only."""
    policy = in_force(Policy.model_validate({"version": 1, "rules": [{"on": cls, "do": ["diagnose"]}]}))
    incident = Incident.model_validate(
        {"id": 1, "cls": cls, "onset_step": 60, "detected_step": 72, "why": "x", "verdict": verdict}
    )

    rule = choose(policy, incident, World().facts)

    assert rule is not None
    first = rule.rungs()[0]
    assert first.diagnose is None
    assert first.roll_back is not None
    assert (first.skip_data is not None) == (verdict in ("data", "data_and_state"))
    assert (first.lower_lr is not None) == (verdict in ("data_and_state", "state", "optimisation"))
    assert first.quarantine_shards is None


@pytest.mark.parametrize(
    ("cause", "verdict"),
    [("hardware", "hardware"), ("data", "data"), ("rate", "optimisation"), ("state", "state"), ("x", "data_and_state")],
)
def test_a_finite_spike_is_diagnosed_and_answered_by_its_cause(cause: str, verdict: str) -> None:
    """Through the engine: the loss leaves its band for good, and what is skipped afterwards is what was convicted."""
    begin = 150 * BATCH

    def loss(world: World, step: int) -> float:
        plan = world.plan
        assert plan is not None
        poisoned = begin in range(world.position - BATCH, world.position) or getattr(world, "met", 0) == plan.attempt
        shifted = any(skip.begin < begin for skip in plan.skips)
        world.met = plan.attempt if poisoned else 0  # type: ignore[attr-defined]
        up = {
            "hardware": plan.attempt == 1 and step >= 151,
            "data": poisoned,
            "rate": step >= 151 and all(overlay.at(step) > 0.4 for overlay in plan.overlays),
            "state": step >= 151 and (plan.attempt == 1 or plan.replay is not None),
            "x": step >= 151 and not shifted,
        }[cause]
        return healthy(world, step) + (2.0 if up else 0.0)

    rules = [{"on": "unrecovered_spike", "do": ["diagnose"]}]
    world = World(policy=Policy.model_validate({"version": 1, "rules": rules}), loss=loss)
    world.open()
    while not any(incident.verdict for incident in world.engine.incidents()):
        world._attempt()

    incident = next(i for i in world.engine.incidents() if i.verdict)
    after = world.plans[-1]
    assert incident.verdict == verdict, incident.why
    assert after.replay is None
    assert bool(after.skips) == (verdict in ("data", "data_and_state"))
    assert bool(after.overlays) == (verdict in ("optimisation", "state", "data_and_state"))
    assert after.quarantines == ()
