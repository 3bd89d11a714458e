"""Labelled runs through Longwatch's diagnosis and the published rules: who is right, how late, at what cost.

`python -m benchmarks.diagnosis [--runs N] [--healthy-steps N] [--injected N] [--seed S]`. Curves that were made here
(with gradient norms, and with the loss alone), tiny models that were really trained with faults put in, and runs that
were recorded by others are reported apart. The last line has the figures; the HTML page beside them shows every curve.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common import RESULTS, report
from benchmarks.diagnosis import synthetic
from benchmarks.diagnosis.injected import injected_runs
from benchmarks.diagnosis.page import write_page
from benchmarks.diagnosis.recorded import Recorded, is_large, recorded_runs, residuals
from benchmarks.diagnosis.score import Score, wilson
from benchmarks.diagnosis.synthetic import CLASSES, NAN_CLASSES, Floats, Run
from benchmarks.diagnosis.watch import OURS, Prediction, harmful_classes, longwatch, others
from monitors.diagnosis import Diagnosis
from monitors.records import StepRecord
from monitors.taxonomy import IncidentClass

_DRAWN = 40
_RUN_STEPS = 20_000
_REACH_STEPS = 20
_TARGETS = {
    "macro_f1": 0.95,
    "recall": 0.98,
    "false_rollbacks_per_million": 1.0,
    "slow_divergences_in_time": 0.98,
    "recorded_rollbacks": 0,
    "recorded_false_incidents_per_million": 50.0,
    "recorded_large_events": 0.7,
    "steps_per_s": 50_000,
}


def made(runs: int, healthy_steps: int, seed: int, noise: Floats | None) -> Iterator[Run]:
    """`runs` of each class, and healthy ones of so many steps in all."""
    for cls in CLASSES:
        for number in range(runs):
            yield synthetic.with_incident(cls, seed + number, noise)
    steps, number = 0, 0
    while steps < healthy_steps:
        run = synthetic.healthy(seed + number, _RUN_STEPS, noise)
        steps, number = steps + run.steps, number + 1
        yield run


def loss_alone(run: Run) -> Run:
    """The same run as a log without gradient norms would have it."""
    bare = [one.model_copy(update={"grad_norm": None}) if isinstance(one, StepRecord) else one for one in run.records]
    return replace(run, records=bare)


class Corpus:
    """Scores of every detector over one set of runs, and what is drawn of them."""

    def __init__(self, name: str, *, beside: bool) -> None:
        self.name = name
        self.scores: dict[str, Score] = defaultdict(Score)
        self.drawn: list[tuple[Run, list[Prediction]]] = []
        self._harmful = harmful_classes()
        self._beside = beside

    def add(self, run: Run) -> list[Prediction]:
        """Take one run in; what Longwatch found is returned."""
        found = longwatch(run)
        self.scores[OURS].add(run, found, self._harmful)
        if self._beside:
            for name, alarms in others(run).items():
                self.scores[name].add(run, alarms, self._harmful)
        if len(self.drawn) < _DRAWN:
            self.drawn.append((run, found))
        return found


def large_events(recorded: Iterable[tuple[Recorded, list[Prediction]]]) -> tuple[int, int]:
    """(seen and named right, all) of the labelled events of half a nat and more in averaged losses."""
    hits = total = 0
    for one, found in recorded:
        for truth in one.run.truths:
            if not one.averaged or truth.cls is not IncidentClass.TRANSIENT_SPIKE or not is_large(truth):
                continue
            total += 1
            hits += any(
                p.cls is truth.cls
                and p.onset_step <= truth.end_step + _REACH_STEPS
                and (p.end_step is None or p.end_step >= truth.onset_step - _REACH_STEPS)
                for p in found
            )
    return hits, total


def speed(run: Run) -> float:
    """Recorded steps a second through the diagnosis, on one core."""
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    diagnosis = Diagnosis()
    begun_s = time.perf_counter()
    for record in steps:
        diagnosis.observe(record)
    return len(steps) / (time.perf_counter() - begun_s)


def figures_of(corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Every detector over every set of runs."""
    return {corpus.name: {name: score.figures() for name, score in corpus.scores.items()} for corpus in corpora}


def is_met(figures: dict[str, Any]) -> bool:
    """Whether every target is."""
    ours = figures["made"][OURS]
    vital = (IncidentClass.UNRECOVERED_SPIKE, IncidentClass.SLOW_DIVERGENCE, *NAN_CLASSES)
    good = (
        ours["macro_f1"] >= _TARGETS["macro_f1"]
        and all(ours["classes"][cls.value]["recall"] >= _TARGETS["recall"] for cls in vital)
        and ours["false_rollbacks_per_million"] <= _TARGETS["false_rollbacks_per_million"]
        and ours["slow_divergences_in_time"] >= _TARGETS["slow_divergences_in_time"]
        and figures["steps_per_s"] >= _TARGETS["steps_per_s"]
    )
    if "recorded" not in figures:
        return good
    found = figures["recorded"]
    return (
        good
        and found["rollbacks"] <= _TARGETS["recorded_rollbacks"]
        and found["false_incidents_per_million"] <= _TARGETS["recorded_false_incidents_per_million"]
        and found["large_events"] >= _TARGETS["recorded_large_events"]
    )


def recorded_figures(averaged: Corpus, single: Corpus, large: tuple[int, int]) -> dict[str, Any]:
    """What the targets for recorded runs are held against."""
    ours = (averaged.scores[OURS], single.scores[OURS])
    return {
        "rollbacks": sum(score.false_rollbacks for score in ours),
        "false_incidents_per_million": ours[0].figures()["false_incidents_per_million"],
        "large_events": round(large[0] / max(1, large[1]), 4),
        "large_events_of": large[1],
        "large_events_interval": [round(bound, 4) for bound in wilson(*large)],
    }


def table_of(corpora: Sequence[Corpus]) -> str:
    """Markdown: one row for each detector and set of runs."""
    names = ("runs", "detector", "macro-F1", "false incidents / M", "false rollbacks / M", "cost, steps")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for corpus in corpora:
        for name, score in corpus.scores.items():
            f = score.figures()
            rows.append(
                f"| {corpus.name} | {name} | {f['macro_f1']} | {f['false_incidents_per_million']} "
                f"| {f['false_rollbacks_per_million']} | {f['cost_of_wrong_decisions_steps']} |"
            )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Judge and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60, help="of each class")
    parser.add_argument("--healthy-steps", type=int, default=3_000_000)
    parser.add_argument("--injected", type=int, default=3, help="seeds of which every cause is really trained")
    parser.add_argument("--seed", type=int, default=1_000_000, help="not one that thresholds were chosen on")
    arguments = parser.parse_args(argv)
    recorded = recorded_runs()
    noise = residuals(recorded)
    ours, alone = Corpus("made", beside=True), Corpus("made, loss alone", beside=False)
    for run in made(arguments.runs, arguments.healthy_steps, arguments.seed, noise):
        ours.add(run)
        alone.add(loss_alone(run))
    trained = Corpus("injected", beside=True)
    for run in injected_runs(range(arguments.seed, arguments.seed + arguments.injected)):
        trained.add(run)
    corpora = [ours, alone, trained]
    figures: dict[str, Any] = {"steps_per_s": round(speed(synthetic.with_incident(CLASSES[-1], 0)))}
    if recorded:
        averaged, single = Corpus("recorded, averaged", beside=True), Corpus("recorded, one rank", beside=True)
        found = [(one, (averaged if one.averaged else single).add(one.run)) for one in recorded]
        figures["recorded"] = recorded_figures(averaged, single, large_events(found))
        corpora += [averaged, single]
    figures |= figures_of(corpora)
    RESULTS.mkdir(exist_ok=True)
    tables = [(corpus.name, name, score) for corpus in corpora for name, score in corpus.scores.items()]
    write_page(RESULTS / "diagnosis.html", tables, [drawn for corpus in reversed(corpora) for drawn in corpus.drawn])
    report("diagnosis", figures, _TARGETS, is_met(figures), table_of(corpora))


if __name__ == "__main__":
    main()
