"""The state of a run as text, and as the facts that `longwatch status --json` prints."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from orchestrator.report.numbers import duration, loss_text, short
from orchestrator.report.progress import Trend

_STATE_STYLES = {"running": "green", "finished": "green", "halted": "red", "failed": "red", "recovering": "yellow"}


def status_lines(facts: Mapping[str, Any]) -> list[Text]:
    """One screen's worth of text. What is not known is left out."""
    state = Text(f"{'state':<12}")
    state.append(str(facts["state"]), style=_STATE_STYLES.get(str(facts["state"]), ""))
    if facts.get("mode") == "observe":
        state.append(", observing only")
    if facts.get("because"):
        state.append(f" ({facts['because']})")
    lines = [Text(f"{'run':<12}{facts['run_dir']}"), state]
    return lines + [Text(f"{name:<12}{value}") for name, value in _rows(facts) if value]


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    validation = facts.get("validation")
    factor = facts.get("lr_factor") or 1.0
    return [
        ("step", f"{facts['step']:,} of {facts['total_steps']:,}{_left(facts.get('seconds_left'))}"),
        ("attempt", str(facts.get("attempt") or "")),
        ("loss", f"{loss_text(facts.get('loss'))}{_trend(facts.get('trend'))}"),
        ("validation", f"{loss_text(validation[1])} at step {validation[0]:,}" if validation else ""),
        ("lr", _lr(facts.get("lr"), factor)),
        ("tokens", f"{short(facts.get('tokens') or 0)}{_speed(facts.get('tokens_per_s'))}"),
        ("checkpoint", _checkpoints(facts)),
        ("interval", facts.get("checkpoint_interval") or ""),
        ("goodput", _goodput(facts)),
        ("incidents", f"{facts.get('incidents', 0)}, {facts.get('open_incidents', 0)} open"),
        ("the last", _incident(facts.get("last_incident"))),
        ("budget", f"{facts.get('rollbacks_left')} rollbacks, {facts.get('restarts_left')} restarts left"),
        ("quarantine", ", ".join(facts.get("quarantined_shards") or ())),
        ("next", next_step(facts)),
    ]


def next_step(facts: Mapping[str, Any]) -> str:
    """What is going on about a trouble, or what a person may do; empty if neither."""
    match facts["state"]:
        case "halted":
            return "look at the last incident, then: longwatch resume --because TEXT"
        case "stopped" | "failed":
            return "longwatch launch goes on from the last checkpoint"
        case "recovering":
            state = (facts.get("last_incident") or {}).get("state", "recovering")
            return {"evaluating": "an evaluation decides", "diagnosing": "a replay looks for the cause"}.get(
                state, "going back to a good checkpoint"
            )
    factor = facts.get("lr_factor") or 1.0
    return f"the learning rate goes back from {factor:.0%} of its schedule by itself" if factor != 1.0 else ""


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


def _trend(moves: Mapping[str, Any] | None) -> str:
    return "" if moves is None else f", {Trend(**moves)}"


def _goodput(facts: Mapping[str, Any]) -> str:
    share, spent = facts.get("goodput"), facts.get("seconds_spent")
    if share is None or spent is None:
        return ""
    others = sorted(((seconds, name) for name, seconds in spent.items() if name != "training"), reverse=True)
    worst = ", ".join(f"{name} {duration(seconds)}" for seconds, name in others[:3] if seconds >= 1.0)
    return f"{share:.1%} of {duration(sum(spent.values()))}" + (f"; {worst}" if worst else "")


def _incident(incident: Mapping[str, Any] | None) -> str:
    if incident is None:
        return ""
    did = ", ".join(incident["decision"]) or "nothing"
    outcome = (incident.get("outcome") or incident["state"]).replace("_", " ")
    return f"#{incident['id']} {incident['class']} at step {incident['onset_step']:,}: {did} ({outcome})"


def _lr(lr: float | None, factor: float) -> str:
    if lr is None:
        return ""
    return f"{lr:.3g}" if factor == 1.0 else f"{lr:.3g} (lowered to {factor:.0%} of the schedule)"


def _speed(tokens_per_s: float | None) -> str:
    return f", {short(tokens_per_s)} a second" if tokens_per_s else ""


def _checkpoints(facts: Mapping[str, Any]) -> str:
    last, good = facts.get("last_commit_step"), facts.get("last_good_step")
    if last is None:
        return ""
    stored = facts.get("last_stored_step")
    there = "" if stored in (None, last) else f", in the store step {stored:,}"
    return f"step {last:,}{there}, " + (f"last good one step {good:,}" if good is not None else "none good yet")
