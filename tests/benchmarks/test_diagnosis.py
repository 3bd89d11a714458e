"""Floors under the diagnosis, on a small part of its benchmark: seeds of their own, made runs and recorded ones."""

from pathlib import Path

import pytest

from benchmarks.diagnosis.__main__ import Corpus, large_events, made, recorded_figures
from benchmarks.diagnosis.page import write_page
from benchmarks.diagnosis.recorded import recorded_runs
from benchmarks.diagnosis.rules import KillLossSpike, SkipStep, SpikyLoss, UnexpectedlyLarge, ZClip
from benchmarks.diagnosis.score import Score, wilson
from benchmarks.diagnosis.synthetic import NAN_CLASSES, Run, Truth
from benchmarks.diagnosis.watch import OURS, Prediction, harmful_classes
from monitors.taxonomy import IncidentClass


def test_made_runs() -> None:
    """Every class is named right, and nothing healthy is rolled back."""
    corpus = Corpus("made", beside=False)
    for run in made(runs=3, healthy_steps=60_000, seed=40_000, noise=None):
        corpus.add(run)
    score = corpus.scores[OURS]

    assert score.false_rollbacks == 0
    assert all(score.per_class(cls.value)["recall"] == 1.0 for cls in NAN_CLASSES)
    assert score.per_class("unrecovered_spike")["recall"] == 1.0
    assert score.figures()["macro_f1"] >= 0.9


def test_false_incidents_are_few() -> None:
    """In recorded runs: nothing rolled back, few false incidents where the loss is an average, large events seen."""
    recorded = recorded_runs()
    if not recorded:
        pytest.skip("the recorded runs are not at hand")
    averaged, single = Corpus("averaged", beside=False), Corpus("one rank", beside=False)
    found = [(one, (averaged if one.averaged else single).add(one.run)) for one in recorded]
    figures = recorded_figures(averaged, single, large_events(found))

    assert figures["rollbacks"] == 0
    assert figures["false_incidents_per_million"] <= 50
    assert figures["large_events"] >= 0.8


def test_published_rules_fire_where_their_definitions_say() -> None:
    """Each on a level curve with one jump that its own threshold admits, and not below it."""
    level = [2.0 + 0.01 * (row % 7) for row in range(300)]

    assert [rule.observe(loss, None) for rule in [SkipStep()] for loss in [*level, 2.3]][-1]
    assert not any(rule.observe(loss, None) for rule in [SkipStep()] for loss in level)
    assert [rule.observe(loss, None) for rule in [SpikyLoss()] for loss in [2.0, 2.39, 2.87]] == [False, False, True]
    assert [rule.observe(loss, None) for rule in [UnexpectedlyLarge()] for loss in [*level, 19.0, 21.0]][-2:] == [
        False, True,
    ]  # fmt: skip
    kill = [rule.observe(loss, None) for rule in [KillLossSpike(300)] for loss in [*level, *[9.0] * 5]]
    assert kill[-5:] == [False, False, False, False, True]
    assert [rule.observe(2.0, norm) for rule in [ZClip()] for norm in [*level, 2.2]][-1]


def test_what_being_wrong_costs() -> None:
    """A false rollback costs what is run again and skipped; a divergence that was missed costs the rest of the run."""
    harmful, steps = harmful_classes(), 1000
    missed = Truth(IncidentClass.UNRECOVERED_SPIKE, 400, steps, 1.0)
    wrong = Prediction(IncidentClass.UNRECOVERED_SPIKE, 500, 550, None, acts=True)
    score = Score()

    score.add(Run("healthy", [], (), steps=steps, healthy_steps=steps), [wrong], harmful)
    assert (score.false_rollbacks, score.cost_steps) == (1, 450)

    score.add(Run("missed", [], (missed,), steps=steps, healthy_steps=400), [], harmful)
    assert score.cost_steps == 450 + 600
    assert score.confusion["unrecovered_spike", "healthy"] == 1


def test_wilson() -> None:
    """Against a published value: 10 of 10 has a lower bound of 0.7225."""
    low, high = wilson(10, 10)

    assert (round(low, 4), round(high, 4)) == (0.7225, 1.0)


def test_page_shows_every_run(tmp_path: Path) -> None:
    """Its name, its curve and its incident."""
    run = next(iter(made(runs=1, healthy_steps=0, seed=1, noise=None)))
    corpus = Corpus("made", beside=False)
    corpus.add(run)
    page = tmp_path / "page.html"
    write_page(page, [("made", OURS, corpus.scores[OURS])], corpus.drawn)

    text = page.read_text()
    assert run.name in text
    assert text.count("<svg") == 1
    assert "transient_spike" in text
