"""The state of a run as text, and as the facts that `longwatch status --json` prints."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from orchestrator.report.numbers import loss_text, short

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
        ("step", f"{facts['step']:,} of {facts['total_steps']:,}"),
        ("attempt", str(facts.get("attempt") or "")),
        ("loss", loss_text(facts.get("loss"))),
        ("validation", f"{loss_text(validation[1])} at step {validation[0]:,}" if validation else ""),
        ("lr", _lr(facts.get("lr"), factor)),
        ("tokens", f"{short(facts.get('tokens') or 0)}{_speed(facts.get('tokens_per_s'))}"),
        ("checkpoint", _checkpoints(facts)),
        ("interval", facts.get("checkpoint_interval") or ""),
        ("incidents", f"{facts.get('incidents', 0)}, {facts.get('open_incidents', 0)} open"),
        ("budget", f"{facts.get('rollbacks_left')} rollbacks, {facts.get('restarts_left')} restarts left"),
        ("quarantine", ", ".join(facts.get("quarantined_shards") or ())),
    ]


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
