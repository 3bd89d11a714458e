"""Incidents as they are told: what was recorded, put into words; what is not recorded is not said."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from monitors.taxonomy import TAINTING
from orchestrator.journal import Journal
from orchestrator.logbook.model import Attempt, Curve, IncidentFacts, Panel, Series, Worst
from orchestrator.logbook.read import Fates, updates_between
from orchestrator.logbook.signals import PANELS, Curves, Update, number, panel_of, values
from orchestrator.logbook.thin import Thinner, rounded
from orchestrator.policy.model import Rule
from orchestrator.report.explain import evidence_lines, rule_lines, then_lines
from orchestrator.report.incidents import after_text, cost_text

Incident = Mapping[str, Any]
Kind = Literal["bad", "warn", "good", "info"]

_BEFORE, _AFTER, _MOST_BOX = 200, 40, 320  # steps of the black box
_WORST = 10
_BRANCH_POINTS = 300
_IN_OTHER_WORDS = frozenset({"samples", "sample_losses", "sample_steps"})  # evidence that the worst sequences show
_BOX = ("loss", "grad_norm", "lr", "update_ratio", "grad_norms", "clip_factor")
_OUTCOMES = {
    "came_back": "it came back by itself",
    "worked": "what was done worked: the run went on past it, healthy",
    "relapsed": "what was done did not hold: the same came again",
    "notice": "it was noted, and asked for nothing",
    "halted": "the run was halted for a person",
    "refuted": "an evaluation refuted it",
    "superseded": "a later incident took its place",
    "not_recovered": "the run did not recover",
}
_KINDS: dict[str, Kind] = {
    "came_back": "good", "worked": "good", "notice": "info", "refuted": "info", "superseded": "info",
    "halted": "bad", "not_recovered": "bad", "relapsed": "warn",
}  # fmt: skip


def told(
    journal: Journal, incident: Incident, known: Sequence[Attempt], fate: Fates, rules: tuple[Rule, ...]
) -> IncidentFacts:
    """One incident with its black box and its branches."""
    box = list(_box_updates(journal, incident, fate))
    return IncidentFacts(
        id=incident["id"],
        cls=incident["class"],
        kind=_KINDS.get(incident["outcome"], "warn"),
        of_training=incident["class"] in TAINTING,
        onset_step=incident["onset_step"],
        detected_step=incident["detected_step"],
        end_step=incident["end_step"],
        at_s=incident["opened_at_s"],
        attempt=incident["attempt"],
        outcome=incident["outcome"].replace("_", " ") or incident["state"],
        cause=_cause(incident),
        seen=incident["why"],
        numbers=list(evidence_lines({"evidence": _numbers(incident)})),
        sure=list(_sure(incident)),
        considered=list(rule_lines(incident, rules)),
        done=_done(incident),
        cost=cost_text(incident["cost"]),
        after=list(_after(incident)),
        worst=_worst(incident, box),
        box=_box(box),
        branches=_branches(journal, incident, known, fate),
    )


def _numbers(incident: Incident) -> dict[str, Any]:
    return {name: value for name, value in incident["evidence"].items() if name not in _IN_OTHER_WORDS}


def _cause(incident: Incident) -> str:
    """What the record speaks for: the process's own cause, a verdict of replays, shards; else it is not known."""
    if incident["cause"] or incident["phase"]:
        return str(incident["cause"] or f"in {incident['phase']}")
    if incident["verdict"] not in (None, "inconclusive"):
        return f"{incident['verdict'].replace('_', ' ')}, by replays of the same steps"
    if incident["shards"]:
        return f"data of shard {', '.join(map(str, incident['shards']))}"
    return "unknown"


def _sure(incident: Incident) -> Iterator[str]:
    """How far the numbers stand out, and what else spoke for it or against it."""
    evidence = incident["evidence"]
    if (z := evidence.get("z")) is not None and (threshold := evidence.get("threshold_sigma")) is not None:
        yield f"the loss stood {number(z):.1f} sigma above its trend when it was classed; the limit is {threshold:g}"
    if (z := evidence.get("grad_norm_z")) is not None:
        yield f"the gradient norm stood {number(z):.1f} sigma from its own"
    late = incident["detected_step"] - incident["onset_step"]
    yield f"it was classed {late} step{'' if late == 1 else 's'} after its onset" if late else "it was classed at once"
    yield from evidence_lines({name: incident[name] for name in ("validation", "verdict")})
    if incident["validation"] is None and incident["verdict"] is None:
        yield "no evaluation and no replay was asked about it"


def _done(incident: Incident) -> list[str]:
    actions = ", ".join(one.replace("_", " ") for one in incident["decision"]) or "nothing"
    return [f"would have done: {actions}" if incident["observed"] else actions, *then_lines(incident)]


def _after(incident: Incident) -> Iterator[str]:
    yield _OUTCOMES.get(incident["outcome"], f"not judged yet: it is {incident['state']}")
    if seen := after_text(incident):
        yield seen
    if (before := incident["relapse_of"]) is not None:
        yield f"it is a relapse of incident {before}"


def _worst(incident: Incident, box: Sequence[Update]) -> list[Worst]:
    """The ten highest losses of single sequences around it: those of its evidence, and the worst of each update."""
    evidence = incident["evidence"]
    if incident["class"] not in TAINTING:
        return []  # no sequence has a part in it
    named = zip(
        evidence.get("samples", []), evidence.get("sample_losses", []), evidence.get("sample_steps", []), strict=False
    )
    found = {position: (number(loss), step) for position, loss, step in named}
    for update in box:
        if update.record.get("worst") and update.step >= incident["onset_step"]:
            position, loss = update.record["worst"]
            found.setdefault(position, (number(loss), update.step))
    ranked = sorted(found.items(), key=lambda item: (not math.isnan(item[1][0]), -item[1][0]))  # NaN is worse than any
    return [
        Worst(position=position, loss=None if math.isnan(loss) else loss, step=step)
        for position, (loss, step) in ranked[:_WORST]
    ]


def _box_updates(journal: Journal, incident: Incident, fate: Fates) -> Iterator[Update]:
    onset = incident["onset_step"]
    last = max(onset, incident["end_step"] or incident["detected_step"]) + _AFTER
    last = min(last, onset - _BEFORE + _MOST_BOX)
    yield from updates_between(journal, fate, incident["attempt"], onset - _BEFORE, last)


def _box(updates: Sequence[Update]) -> list[Panel]:
    """At full detail: a bucket for each update."""
    if not updates:
        return []
    curves = Curves(updates[0].at_s, len(updates), dict.fromkeys(PANELS, len(updates)))
    for place, update in enumerate(updates):
        curves.add(place, update, (value for value in values(update.record) if value[0] in _BOX))
    return [
        panel.model_copy(update={"series": [_without_times(series) for series in panel.series]})
        for panel in curves.panels()
    ]


def _without_times(series: Series) -> Series:
    """A box is read by step: a third of its bytes can go."""
    return series.model_copy(update={"curves": [curve.model_copy(update={"times_s": []}) for curve in series.curves]})


def _branches(journal: Journal, incident: Incident, known: Sequence[Attempt], fate: Fates) -> Panel | None:
    """Loss by position in the data, of the branch that was left and of the one that went on from its target."""
    target, resume = incident["target_step"], incident["resume_step"]
    after = [one for one in known if one.attempt > incident["attempt"] and not one.replay]
    if target is None or resume is None or not after:
        return None
    length = max(resume - target, 1)
    first, last = max(0, target - length), resume + length
    old = _by_position(updates_between(journal, fate, incident["attempt"], first, resume), last - first)
    new = _by_position(updates_between(journal, fate, after[0].attempt, target, last), last - first)
    return panel_of("branches", {"rolled back": [old], "went on": [new]}) if old and new else None


def _by_position(updates: Iterator[Update], most: int) -> Curve | None:
    thinner, attempt, survives, began_s = Thinner(), 0, True, None
    for place, update in enumerate(updates):
        began_s = update.at_s if began_s is None else began_s
        attempt, survives = update.attempt, update.survives
        if data := update.record.get("data"):
            point = (data["end"], update.at_s - began_s, number(update.record["loss"]))
            thinner.add(place * _BRANCH_POINTS // max(most, _BRANCH_POINTS), point)
    points = thinner.points()
    if not points:
        return None
    return Curve(
        attempt=attempt,
        survives=survives,
        steps=[position for position, _, _ in points],
        times_s=[round(seconds, 2) for _, seconds, _ in points],
        values=[rounded(value) for _, _, value in points],
    )
