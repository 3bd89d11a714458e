"""`longwatch replay`: what would have been seen and done in recorded runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from monitors.tables import NAMES
from monitors.trace import TraceError
from orchestrator.cli.find import JsonOption
from orchestrator.cli.output import out, remark, say, say_json, show
from orchestrator.config import read_policy
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import in_force
from orchestrator.policy.state import Incident
from orchestrator.replay import Recording, Replayed, as_json, by_class, differences, read_recording
from orchestrator.replay import replay as fold
from orchestrator.report.curves import write_page
from orchestrator.report.incidents import incident_lines


def replay(
    traces: Annotated[
        list[Path], typer.Argument(help="Run directories, CSV or JSON lines, TensorBoard event files or directories.")
    ],
    policy: Annotated[Path | None, typer.Option(help="Policy file; default: the shipped one.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another policy, to compare with.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=NAME", help="Where a value stands, if guessing is wrong.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with the curves and what was found.")] = None,
    json: JsonOption = False,
) -> None:
    """Run recorded runs through the core that runs live, and show what Longwatch would have seen and done.

    Values: step, loss; where recorded also grad_norm, lr, tokens_per_sec, update_ratio, val_loss, loss_scale. An empty
    cell is not recorded; nan or inf is non-finite. Columns are guessed from the names that trainers and trackers use.
    """
    rules = in_force(read_policy(policy) if policy is not None else None)
    recordings = _read(traces, _columns(column or ()))
    found = [fold(recording, rules) for recording in recordings]
    other = _others(against, recordings)
    if html is not None:
        write_page(html, found)
    if json:
        say_json(_document(found, other))
        return
    for one in found:
        _tell(one, titled=len(found) > 1)
    if other is not None:
        _compare(found, other)


def _others(against: Path | None, recordings: Sequence[Recording]) -> list[Replayed] | None:
    if against is None:
        return None
    rules: Policy = in_force(read_policy(against))
    return [fold(recording, rules) for recording in recordings]


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns = dict(text.partition("=")[::2] for text in given)
    for field, name in columns.items():
        if field not in NAMES or not name:
            remark(f"--column {field}={name}: give FIELD=NAME, where FIELD is one of {', '.join(NAMES)}")
            raise typer.Exit(2)
    return columns


def _read(traces: Sequence[Path], columns: dict[str, str]) -> list[Recording]:
    found = []
    for trace in traces:
        try:
            found.append(read_recording(trace, columns))
        except (TraceError, OSError) as error:
            remark(f"{trace}: {error}" if isinstance(error, OSError) else str(error))
            raise typer.Exit(2) from error
    return found


def _document(found: Sequence[Replayed], other: Sequence[Replayed] | None) -> dict[str, object]:
    if len(found) == 1 and other is None:
        return as_json(found[0])
    runs: dict[str, object] = {"runs": [as_json(one) for one in found]}
    return runs if other is None else {**runs, "against": [as_json(one) for one in other]}


def _tell(one: Replayed, *, titled: bool) -> None:
    if titled:
        say(one.recording.name, style="bold")
    for line in incident_lines(as_json(one)["incidents"]):
        out().print(line)
    attempts = len(one.recording.attempts)
    resumed = f", resumed {attempts - 1} times" if attempts > 1 else ""
    cost = f"; {one.rollbacks} rollbacks, {one.steps_lost} steps" if one.rollbacks else ""
    say(f"{len(one.incidents)} incidents in {one.recording.steps} steps{resumed}{cost}")


def _compare(ours: Sequence[Replayed], theirs: Sequence[Replayed]) -> None:
    table = Table("under", "--policy", "--against", title="side by side", title_justify="left")
    counts = [by_class(i for one in side for i in one.incidents) for side in (ours, theirs)]
    for cls in dict.fromkeys([*counts[0], *counts[1]]):
        table.add_row(cls, *(str(count.get(cls, 0)) for count in counts))
    for name in ("rollbacks", "halts", "steps_lost"):
        table.add_row(
            name.replace("_", " "), *(str(sum(getattr(one, name) for one in side)) for side in (ours, theirs))
        )
    show(table)
    for name, a, b in differences(ours, theirs):
        one = a or b
        assert one is not None, "a difference has a side"
        say(f"{name}: {one.cls} at step {one.onset_step}: {_done(a)} / {_done(b)}")


def _done(incident: Incident | None) -> str:
    return "not seen" if incident is None else ", ".join(incident.decision) or "nothing"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: longwatch replay trace.csv --policy a.yaml --against b.yaml --html replay.html")(
        replay
    )
