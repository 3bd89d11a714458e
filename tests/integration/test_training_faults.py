"""Every training class of the taxonomy on a real tiny run: fault injected, response asserted, end seen."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run, tiny_config, write_corpus

pytestmark = pytest.mark.training

_GUARDS = {"max_skipped_share": 0.5, "max_discarded_share": 1.0, "max_quarantined_share": 0.3, "relapse_steps": 60}
_CUT = {"factor": 0.5, "hold_steps": 15, "ramp_steps": 20}
_ROLL_BACK: dict[str, Any] = {"roll_back": {"margin_steps": 10}, "skip_data": "12 batches", "lower_lr": _CUT}


def _policy(*rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The shipped policy with its horizons scaled to runs of a hundred steps."""
    spike = {"on": "unrecovered_spike", "when": {"validation_confirms": True}, "ladder": [_ROLL_BACK, {"halt": {}}]}
    detect = {"recover_steps": 10, "recover_steps_max": 20}
    return {"version": 1, "detect": detect, "guards": _GUARDS, "rules": [*rules, spike], **changes}


def _classes(run: Run) -> list[str]:
    return [str(incident["class"]) for incident in run.incidents()]


def test_transient_spike_is_recorded_and_nothing_else(tmp_path: Path, corpus: Path) -> None:
    """One batch of garbage: the loss comes back by itself and the run is left alone."""
    faults = [{"kind": "bad_shard", "steps": [60, 60], "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=100, faults=faults), _policy())

    run.launch()

    incident = run.incident("transient_spike")
    assert incident["onset_step"] == 60
    assert incident["decision"] == ["record"]
    assert len(run.attempts()) == 1


def test_unrecovered_spike_is_rolled_back_skipped_and_cut(tmp_path: Path, corpus: Path) -> None:
    """A learning-rate bomb damages the model for good: evaluated, rolled back, skipped, LR lowered and restored."""
    faults = [{"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0}]
    run = Run(tmp_path, tiny_config(corpus, steps=180, faults=faults), _policy())

    run.launch()

    incident = run.incident("unrecovered_spike")
    assert incident["decision"] == ["evaluate", "roll_back", "skip_data", "lower_lr"]
    assert incident["validation"] == "confirmed"
    assert 80 <= incident["onset_step"] <= 84
    assert incident["outcome"] == "worked"
    plan, target = run.plan(2), incident["target_step"]
    assert target <= incident["onset_step"] - 10
    assert run.records(2, "started")[0]["step"] == target
    (skip,) = plan["skips"]
    begin = (incident["onset_step"] - 10) * 8
    assert (skip["begin"], skip["end"]) == (begin, begin + 12 * 8)
    lrs = {step: row["lr"] for step, row in run.surviving_steps().items() if step > target}
    hold = incident["detected_step"] + 15
    assert lrs[target + 1] == pytest.approx(0.5 * 3e-3)
    assert lrs[hold] == pytest.approx(0.5 * 3e-3)
    assert lrs[min(hold + 10, 180)] == pytest.approx(0.75 * 3e-3)
    assert lrs[180] == pytest.approx(3e-3)
    assert _untouched(run, skip)


def _untouched(run: Run, skip: dict[str, Any]) -> bool:
    """Surviving ranges tile, and those after the load jump over the skipped range."""
    rows = sorted(run.surviving_steps().values(), key=lambda row: int(row["step"]))
    assert all(one["data"]["end"] == two["data"]["begin"] for one, two in itertools.pairwise(rows))
    trained = sum(row["tokens"] for row in rows) // 32
    return bool(trained == rows[-1]["data"]["end"] - rows[0]["data"]["begin"] - (skip["end"] - skip["begin"]))


def test_sustained_high_lr_relapses_and_halts(tmp_path: Path, corpus: Path) -> None:
    """A fault that every attempt meets again: the ladder is climbed, then a person is asked."""
    faults = [{"kind": "lr_bomb", "steps": [80, 110], "factor": 300.0, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=180, faults=faults), _policy())

    run.launch(expect=3)

    first, second = (i for i in run.incidents() if i["class"] == "unrecovered_spike")
    assert first["outcome"] == "relapsed"
    assert second["relapse_of"] == first["id"]
    assert second["decision"][-1] == "halt"


@pytest.mark.long
def test_persistent_damage_is_not_cured_by_restarting(tmp_path: Path, corpus: Path) -> None:
    """Weights thrown far away once: a policy that only writes it down keeps the damage, the rollback ends below it."""
    fault = {"kind": "lr_bomb", "steps": [80, 83], "factor": 300.0}
    wrong = _policy({"on": "unrecovered_spike", "do": ["record"]})
    left = Run(tmp_path / "left", tiny_config(corpus, steps=120, faults=[fault]), wrong)
    right = Run(tmp_path / "right", tiny_config(corpus, steps=120, faults=[fault]), _policy())

    left.launch()
    right.launch()

    final = [run.records(len(run.attempts()), "eval")[-1]["loss"] for run in (left, right)]
    assert right.incident("unrecovered_spike")["outcome"] == "worked"
    assert final[1] < final[0]


def test_immediate_nan_halts_with_a_diagnosis(tmp_path: Path, corpus: Path) -> None:
    """Non-finite in the first steps: stop before burning a night."""
    faults = [{"kind": "nan_loss", "steps": [1, 60], "once": False}]
    hook = ["sh", "-c", f"cat >> {tmp_path / 'told'}"]
    policy = _policy(notify={"command": hook, "level": "page"})
    run = Run(tmp_path, tiny_config(corpus, steps=60, faults=faults), policy)

    run.launch(expect=3)

    (told,) = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert (told["run"], told["level"], told["title"]) == ("tiny", "page", "immediate_nan at step 1")
    assert run.incident("immediate_nan")["decision"][-1] == "halt"
    assert {row["step"] for row in run.records(1, "commit")} == {0}


def test_bad_shard_is_quarantined_and_no_other(tmp_path: Path, corpus: Path) -> None:
    """A shard of garbage spikes whenever it is read: exactly that shard is left out from there on."""
    faults = [{"kind": "bad_shard", "shard": 5, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=360, faults=faults), _policy())

    run.launch()

    incident = run.incident("repeated_spikes_by_shards")
    assert incident["shards"] == [5]
    assert "quarantine_shards" in incident["decision"]
    applied = run.records(1, "plan_applied")[0]
    after = [row for row in run.records(1, "step") if row["data"]["begin"] >= applied["position"]]
    assert after
    assert not any("5" in row["shards"] for row in after)
    assert len(run.attempts()) == 1


@pytest.mark.long
@pytest.mark.parametrize(("tied_to_data", "verdict"), [(False, "hardware"), (True, "data")])
def test_sudden_nan_is_told_apart_by_replay(tmp_path: Path, corpus: Path, tied_to_data: bool, verdict: str) -> None:
    """Fires once: replays are healthy, so nothing is skipped. Tied to data: convicted by a control, and skipped."""
    when = {"data": [60 * 8, 63 * 8], "once": False} if tied_to_data else {"steps": [60, 64], "once": True}
    rules = [
        {"on": "sudden_nan", "when": {"verdict": "hardware"}, "do": [{"roll_back": {"margin_steps": 0}}]},
        {
            "on": "sudden_nan",
            "when": {"verdict": "data"},
            "do": [{"roll_back": {"margin_steps": 0}, "skip_data": "20 batches"}],
        },
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=100, faults=[{"kind": "nan_loss", **when}]), _policy(*rules))

    run.launch()

    incident = run.incident("sudden_nan")
    assert incident["verdict"] == verdict, incident["why"]
    assert incident["outcome"] == "worked"
    assert bool(run.plan(len(run.attempts()))["skips"]) == tied_to_data
    assert not any(row["skipped"] for row in run.surviving_steps().values())


def test_nan_right_after_a_load(tmp_path: Path, corpus: Path) -> None:
    """Non-finite within a few steps of a restore: an older state and other data are tried."""
    faults = [
        {"kind": "sigkill", "steps": [55, 55]},
        {"kind": "nan_loss", "attempt": 2, "once": False},
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=90, faults=faults), _policy())

    run.launch()

    incident = run.incident("nan_after_load")
    assert "roll_back" in incident["decision"]
    assert run.records(3, "started")[0]["step"] < 50
    assert all(math.isfinite(float(row["loss"])) for row in run.surviving_steps().values())


def test_plateau_then_nan_halts(tmp_path: Path, corpus: Path) -> None:
    """Dead layers, a flat loss, then NaN: evidence is kept and a person is asked."""
    faults = [
        {"kind": "zero_layer", "steps": [30, 140], "once": False},
        {"kind": "nan_loss", "steps": [120, 140], "once": False},
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=140, faults=faults, optimizer={"peak_lr": 1e-5}), _policy())

    run.launch(expect=3)

    assert run.incident("plateau_then_nan")["decision"] == ["capture", "notify", "halt"]


def test_leaked_targets_are_implausibly_low_and_nothing_becomes_good(tmp_path: Path, corpus: Path) -> None:
    """Too good to be true: a person is paged and no checkpoint from there on is promoted."""
    faults = [{"kind": "leak_targets", "steps": [70, 150], "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=150, faults=faults), _policy())

    run.launch()

    incident = run.incident("loss_implausibly_low")
    assert "notify" in incident["decision"]
    late = [row for row in run.cli("checkpoints")["checkpoints"] if row["step"] > 80]
    assert late
    assert all(row["state"] != "good" for row in late)


def test_slow_divergence_lowers_the_lr_in_place(tmp_path: Path, corpus: Path) -> None:
    """A rise without a jump: the LR is cut where it stands, no restart."""
    slow = {"on": "slow_divergence", "ladder": [{"lower_lr": _CUT}, {"halt": {}}]}
    faults = [{"kind": "loss_drift", "steps": [120, 300], "factor": 0.01, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=260, faults=faults), _policy(slow))

    process = run.start()
    process.communicate()

    found = [i for i in run.incidents() if i["class"] == "slow_divergence"]
    assert found, _classes(run)
    assert found[0]["decision"] == ["lower_lr"]
    assert run.records(1, "plan_applied")


@pytest.mark.parametrize(("once", "code"), [(True, 0), (False, 3)])
def test_lr_mismatch_restarts_once_then_halts(tmp_path: Path, corpus: Path, once: bool, code: int) -> None:
    """The LR applied is not the LR planned."""
    faults = [{"kind": "lr_override", "steps": [40, 60], "factor": 3.0, "once": once}]
    run = Run(tmp_path, tiny_config(corpus, steps=80, faults=faults), _policy())

    run.launch(expect=code)

    assert "restart" in next(i for i in run.incidents() if i["class"] == "lr_mismatch")["decision"]


@pytest.mark.long
def test_lost_optimizer_state_is_a_loss_discontinuity(tmp_path: Path, corpus: Path) -> None:
    """After a resume the same data gives other losses: restarted once, and then it is as it was."""
    faults = [
        {"kind": "sigkill", "steps": [57, 57]},
        {"kind": "drop_optimizer_state", "attempt": 2, "once": False},
    ]
    run = Run(tmp_path, tiny_config(corpus, steps=90, faults=faults), _policy())

    run.launch()

    assert "restart" in run.incident("loss_discontinuity")["decision"]
    assert len(run.attempts()) == 3


def test_planned_change_is_never_rolled_back(tmp_path: Path, corpus: Path) -> None:
    """A level shift that was announced is re-baselined."""
    faults = [{"kind": "bad_shard", "steps": [60, 110], "once": False}]
    changes = [{"step": 60, "what": "another mix"}]
    run = Run(tmp_path, tiny_config(corpus, steps=110, faults=faults, planned_changes=changes), _policy())

    run.launch()

    assert len(run.attempts()) == 1
    assert "unrecovered_spike" not in _classes(run)


@pytest.mark.long
def test_slow_steps_are_a_throughput_drop(tmp_path: Path, corpus: Path) -> None:
    """Slowness is reported and nothing is restarted."""
    faults = [{"kind": "slow", "steps": [120, 200], "factor": 0.15, "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=160, faults=faults), _policy())

    run.launch()

    assert "throughput_drop" in _classes(run)
    assert len(run.attempts()) == 1


@pytest.mark.long
def test_overfitting_is_a_validation_divergence(tmp_path: Path, corpus: Path) -> None:
    """Training loss falls on data seen many times while held-out loss turns up."""
    small = write_corpus(tmp_path / "small", num_shards=1, seed=99)
    data = {
        "train": str(small),
        "validation": str(write_corpus(tmp_path / "other", num_shards=1, seed=100)),
        "vocab_size": 64,
        "block_samples": 16,
    }
    run = Run(tmp_path / "run", tiny_config(corpus, steps=150, data=data), _policy())

    run.launch()

    assert "validation_divergence" in _classes(run)
    assert len(run.attempts()) == 1


def test_saturated_layer_is_seen_in_the_activations(tmp_path: Path, corpus: Path) -> None:
    """Weights blown up in one layer: an activation explosion, and updates that hardly move such weights."""
    faults = [{"kind": "saturate_layer", "steps": [80, 80], "factor": 100.0}]
    run = Run(tmp_path, tiny_config(corpus, steps=120, faults=faults, monitor={"details_every": 2}), _policy())

    process = run.start()
    process.communicate()

    assert {"activation_explosion", "update_ratio_low"} <= set(_classes(run))
    assert all(i["decision"] == ["record", "notify"] for i in run.incidents() if i["class"] == "update_ratio_low")


def test_zeroed_layer_is_seen_in_the_activations(tmp_path: Path, corpus: Path) -> None:
    """Weights zeroed in one layer: vanishing activations are reported."""
    faults = [{"kind": "zero_layer", "steps": [80, 119], "once": False}]
    run = Run(tmp_path, tiny_config(corpus, steps=120, faults=faults, monitor={"details_every": 2}), _policy())

    process = run.start()
    process.communicate()

    assert "activation_vanishing" in _classes(run)


def test_shrunken_weights_are_a_high_update_ratio(tmp_path: Path, corpus: Path) -> None:
    """A layer at a twentieth of its size: updates of the usual size are large for it."""
    faults = [{"kind": "saturate_layer", "steps": [80, 80], "factor": 0.05}]
    detect = {"recover_steps": 10, "recover_steps_max": 20, "ratio_factor": 1.5}
    run = Run(tmp_path, tiny_config(corpus, steps=110, faults=faults), _policy(detect=detect))

    process = run.start()
    process.communicate()

    incident = next(incident for incident in run.incidents() if incident["class"] == "update_ratio_high")
    assert 80 <= incident["onset_step"] <= 85
    assert incident["decision"] == ["record", "notify"]


@pytest.mark.long
def test_more_and_more_spikes_tied_to_no_shard_are_noticed(tmp_path: Path, corpus: Path) -> None:
    """Garbage in whole batches, three times: notified, never rolled back on the count."""
    faults = [{"kind": "bad_shard", "steps": [step, step + 1], "once": False} for step in (60, 75, 90)]
    detect = {"recover_steps": 10, "recover_steps_max": 20, "repeated_window_steps": 60}
    run = Run(tmp_path, tiny_config(corpus, steps=110, faults=faults), _policy(detect=detect))

    run.launch()

    assert _classes(run).count("transient_spike") == 3
    incident = run.incident("repeated_spikes_by_state")
    assert incident["decision"] == ["record", "notify"]
    assert len(run.attempts()) == 1
