"""Which checkpoint a recovery loads. Pure; candidates are listed best first, the first that verifies is loaded."""

from collections.abc import Iterable

from orchestrator.policy.state import Commit

_MAX_CANDIDATES = 8  # enough to walk past a few condemned ones; more would only lengthen the plan file


def training_candidates(commits: Iterable[Commit], onset_step: int, margin_steps: int) -> list[Commit]:
    """The newest *good* commit at or before `onset_step - margin_steps`, then older ones (DESIGN 8.1).

    Step 0 is good by definition, so the list is only empty when nothing was ever committed or all is condemned.
    """
    latest = max(0, onset_step - max(margin_steps, 1))  # checkpoint N-1 is the last that update N did not touch
    eligible = [c for c in commits if _is_good(c) and c.step <= latest]
    return _newest_first(eligible)


def process_candidates(commits: Iterable[Commit], tainted_from_step: int | None) -> list[Commit]:
    """The newest verified commit; where an incident is open or suspected, only what lies before its reach.

    Args:
        commits: the current lineage.
        tainted_from_step: first step that may be damaged, None if nothing is suspected.
    """
    eligible = [c for c in commits if c.standing != "bad" and not c.tainted]
    if tainted_from_step is not None:
        eligible = [c for c in eligible if _is_good(c) and c.step < max(1, tainted_from_step)]
    return _newest_first(eligible)


def needed(commits: Iterable[Commit], tainted_from_step: int | None, awaited: Iterable[str]) -> tuple[str, ...]:
    """What a restart and a rollback of this moment would load, and what one that is under way waits for (`awaited`)."""
    known = list(commits)
    restart = process_candidates(known, tainted_from_step)[:1]
    rollback = _newest_first([c for c in known if _is_good(c)])[:1]
    return tuple(dict.fromkeys([*awaited, *(commit.id for commit in (*restart, *rollback))]))


def _is_good(commit: Commit) -> bool:
    return commit.standing != "bad" and not commit.tainted and (commit.standing == "good" or commit.step == 0)


def _newest_first(commits: list[Commit]) -> list[Commit]:
    return sorted(commits, key=lambda commit: commit.step, reverse=True)[:_MAX_CANDIDATES]
