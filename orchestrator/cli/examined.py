"""How findings are shown, and what exit code they mean."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from orchestrator.cli.output import say, say_json, show
from orchestrator.findings import Finding

_STYLES = {"pass": "green", "warn": "yellow", "fail": "red"}


def tell(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Show them; returns 1 if any failed, else 0."""
    failed = sum(finding.verdict == "fail" for finding in findings)
    if as_json:
        say_json({"findings": [asdict(finding) for finding in findings]})
    else:
        show(_table(findings))
        warned = sum(finding.verdict == "warn" for finding in findings)
        say(f"{len(findings) - failed - warned} passed, {warned} warned, {failed} failed")
    return 1 if failed else 0


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("", "what", "seen", "remedy"):
        table.add_column(heading)
    for one in findings:
        mark = f"[{_STYLES[one.verdict]}]{one.verdict}[/]"
        table.add_row(mark, escape(one.name), escape(one.seen), escape(one.remedy))
    return table
