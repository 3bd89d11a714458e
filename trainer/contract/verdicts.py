"""Facts about commits that are written once: verified, good, bad; and pins, which a person sets. Torch-free.

One small create-only object for each fact, so that nobody ever overwrites anybody's and one listing shows them all.
Bad outranks good, whichever was written first.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from trainer.contract.manifest import CommitIdText, parse_commit_id
from trainer.contract.plan import Contract
from trainer.contract.store import ObjectExists, Store

Verdict = Literal["verified", "good", "bad"]
State = Literal["committed", "verified", "good", "bad"]

_VERDICT_KEY = re.compile(r"verdicts/(\d{12}-e\d{1,10}-\d{1,10})\.(verified|good|bad)\.json")
_PIN_KEY = re.compile(r"pins/(\d{12}-e\d{1,10}-\d{1,10})\.json")


class VerdictBody(Contract):
    """What lies in the object of a verdict or a pin."""

    version: Literal[1] = 1
    commit: CommitIdText
    fact: Literal["verified", "good", "bad", "pinned"]
    because: str
    incident: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """All facts about one commit."""

    verified: bool = False
    good: bool = False
    bad: bool = False
    pinned: bool = False

    @property
    def state(self) -> State:
        """The rung of the ladder; bad outranks everything."""
        if self.bad:
            return "bad"
        if self.good:
            return "good"
        return "verified" if self.verified else "committed"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The facts about all commits of a store."""

    facts: dict[str, frozenset[str]]

    def of(self, commit: str) -> Standing:
        """The standing of one commit; nothing known is `committed`."""
        facts = self.facts.get(commit, frozenset())
        return Standing("verified" in facts, "good" in facts, "bad" in facts, "pinned" in facts)


def verdict_key(commit: str, verdict: Verdict) -> str:
    """Where a verdict lies."""
    parse_commit_id(commit)
    return f"verdicts/{commit}.{verdict}.json"


def pin_key(commit: str) -> str:
    """Where a pin lies."""
    parse_commit_id(commit)
    return f"pins/{commit}.json"


def write_verdict(store: Store, commit: str, verdict: Verdict, because: str, incident: int | None = None) -> bool:
    """Record a fact; returns False if it was there already (its first reason stands)."""
    body = VerdictBody(commit=commit, fact=verdict, because=because, incident=incident)
    return _create_once(store, verdict_key(commit, verdict), body)


def pin(store: Store, commit: str, because: str) -> bool:
    """Keep a commit from retention; returns False if it was pinned already."""
    return _create_once(store, pin_key(commit), VerdictBody(commit=commit, fact="pinned", because=because))


def unpin(store: Store, commit: str) -> None:
    """Give a commit back to retention."""
    store.delete(pin_key(commit))


def is_pinned(store: Store, commit: str) -> bool:
    """Whether a person keeps it, as it is at this moment."""
    return any(item.key == pin_key(commit) for item in store.list("pins/"))


def read_verdicts(store: Store) -> Verdicts:
    """All facts, from two listings; nothing is opened."""
    facts: dict[str, set[str]] = {}
    for item in store.list("verdicts/"):
        if match := _VERDICT_KEY.fullmatch(item.key):
            facts.setdefault(match[1], set()).add(match[2])
    for item in store.list("pins/"):
        if match := _PIN_KEY.fullmatch(item.key):
            facts.setdefault(match[1], set()).add("pinned")
    return Verdicts({commit: frozenset(found) for commit, found in facts.items()})


def facts_keys(commit: str) -> tuple[str, ...]:
    """Every key under which a fact about this commit may lie."""
    return (*(verdict_key(commit, verdict) for verdict in get_args(Verdict)), pin_key(commit))


def _create_once(store: Store, key: str, body: VerdictBody) -> bool:
    try:
        store.create(key, body.model_dump_json().encode())
    except ObjectExists:
        return False
    return True
