"""The facts of a real run that diverged, against its records and its journal."""

import json

import pytest

from orchestrator.logbook.model import Curve, Logbook, Panel
from orchestrator.logbook.render import FORMATS, rendered
from tests.runs import Run

pytestmark = pytest.mark.training


def _panel(panels: list[Panel], key: str) -> Panel:
    return next(panel for panel in panels if panel.key == key)


def _curves(book: Logbook, key: str) -> list[Curve]:
    return _panel(book.panels, key).series[0].curves


def _incident(book: Logbook, cls: str) -> int:
    return next(place for place, one in enumerate(book.incidents) if one.cls == cls)


def test_the_verdict_is_what_the_run_came_to(diverged: Run, book: Logbook) -> None:
    """State, step, tokens, rollbacks and lost steps in one line, and nothing for a person."""
    verdict = book.verdict
    assert (verdict.state, verdict.step, verdict.total_steps) == ("finished", 150, 150)
    assert verdict.rollbacks == 1
    assert verdict.needs == []
    assert verdict.goodput is not None
    assert 0.0 < verdict.goodput < 1.0
    rolled_back = sum(len(diverged.records(n, "step")) for n in (1, 2)) - len(diverged.surviving_steps())
    assert verdict.lost_steps == rolled_back > 0
    assert verdict.sentence.startswith("Finished at step 150 of 150")


def test_curves_are_the_records_told_apart_by_attempt_and_fate(diverged: Run, book: Logbook) -> None:
    """A short run is not thinned out: every surviving loss is there, and the lost branch is one of its own."""
    kept = {
        step: value for c in _curves(book, "loss") if c.survives for step, value in zip(c.steps, c.values, strict=True)
    }
    assert kept == {step: pytest.approx(row["loss"], rel=1e-5) for step, row in diverged.surviving_steps().items()}
    (lost,) = [curve for curve in _curves(book, "loss") if not curve.survives]
    assert lost.attempt == 1
    assert lost.steps[0] == diverged.records(2, "started")[0]["step"] + 1
    assert len(_panel(book.panels, "update_ratio").series) == 4
    evaluated = {row["step"] for row in diverged.records(1, "eval") + diverged.records(2, "eval")}
    assert {step for curve in _curves(book, "evaluation") for step in curve.steps} == evaluated


def test_the_incident_is_told_from_what_was_recorded(diverged: Run, book: Logbook) -> None:
    """What was seen, how sure, what was considered, done, what it cost and whether it worked."""
    told = book.incidents[_incident(book, "unrecovered_spike")]
    recorded = diverged.incident("unrecovered_spike")
    assert told.seen == recorded["why"]
    assert told.done[0] == "evaluate, roll back, skip data, lower lr"
    assert any("confirmed" in text for text in told.sure)
    assert any(text.startswith("chosen 1 of") for text in told.considered)
    assert any(text.startswith("not ") for text in told.considered)
    assert f"{recorded['cost']['steps']:,} steps run again" in told.cost
    assert told.after[0].startswith("what was done worked")
    assert told.cause == "unknown"  # nothing recorded speaks for one: no verdict, no shard
    assert told.worst[0].loss == max(one.loss for one in told.worst if one.loss is not None)
    assert len(told.worst) == 10


def test_the_black_box_holds_every_update_around_the_onset(diverged: Run, book: Logbook) -> None:
    """At full detail, by layer group, of the attempt that had it."""
    told = book.incidents[_incident(book, "unrecovered_spike")]
    (curve, *rest) = _panel(told.box, "loss").series[0].curves
    steps = [step for one in (curve, *rest) for step in one.steps]
    assert steps == [row["step"] for row in diverged.records(1, "step")]
    assert {series.name for series in _panel(told.box, "update_ratio").series} == {"embed", "early", "mid", "head"}


def test_branches_are_laid_over_each_other_by_data(diverged: Run, book: Logbook) -> None:
    """The old branch ends where it was left, the new one passes over the skipped range."""
    branches = book.incidents[_incident(book, "unrecovered_spike")].branches
    assert branches is not None
    old, new = (series.curves[0] for series in branches.series)
    assert (old.attempt, new.attempt) == (1, 2)
    (skip,) = diverged.plan(2)["skips"]
    assert any(skip["begin"] < position <= skip["end"] for position in old.steps)
    assert not any(skip["begin"] + 8 < position < skip["end"] for position in new.steps)
    assert max(old.values) > max(new.values)


def test_data_goodput_and_configuration_add_up(diverged: Run, book: Logbook) -> None:
    """Tokens by source are the lineage's, the buckets are the wall time, the skip is there with its incident."""
    assert sum(one.tokens for one in book.sources) == book.verdict.tokens
    assert sum(one.seconds for one in book.goodput) == pytest.approx(book.verdict.wall_s)
    (skipped,) = book.skipped
    assert skipped.incident == diverged.incident("unrecovered_spike")["id"]
    assert skipped.tokens == 12 * 8 * 32
    assert book.configuration.config["steps"] == 150
    assert [one.changed for one in book.configuration.openings] == [[]]
    assert {one.step for one in book.checkpoints} >= {150, 140}


def test_launch_leaves_all_three_forms(diverged: Run, book: Logbook) -> None:
    """Written at the end by a process of its own: the same facts in each."""
    written = {form: diverged.paths.root / f"report.{form}" for form in FORMATS}
    assert Logbook.model_validate_json(written["json"].read_text()).incidents == book.incidents
    assert book.verdict.sentence in written["md"].read_text()
    assert book.verdict.sentence in written["html"].read_text()
    assert (diverged.paths.root / "logs" / "logbook.out").read_text() == ""
    assert [path.name for path in diverged.paths.root.glob(".report*")] == []


def test_every_form_tells_of_every_incident(book: Logbook) -> None:
    """One model, three forms."""
    for form in ("md", "html"):
        text = rendered(book, "md" if form == "md" else "html")
        assert all(f"#{one.id} {one.cls.replace('_', ' ')}" in text for one in book.incidents)
    assert json.loads(rendered(book, "json"))["version"] == 1


def test_a_run_whose_incidents_have_no_other_branch_has_a_page(book: Logbook) -> None:
    """Nothing to overlay is no error."""
    alone = [one.model_copy(update={"branches": None}) for one in book.incidents]
    for form in ("md", "html"):
        assert rendered(book.model_copy(update={"incidents": alone}), "md" if form == "md" else "html")


def test_text_from_the_run_can_not_become_markup(book: Logbook) -> None:
    """Names and messages are shown, never obeyed; JSON in the page can't end its element."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>|"
    verdict = book.verdict.model_copy(update={"because": evil, "needs": [evil]})
    incident = book.incidents[0].model_copy(update={"seen": evil, "cause": evil})
    told = book.model_copy(update={"run": evil, "verdict": verdict, "incidents": [incident]})
    page = rendered(told, "html")
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 3
    assert "<script>alert" not in rendered(told, "md").partition("## Incidents")[2]
