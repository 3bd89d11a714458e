"""What the shell needs of the policy engine, and what a launch is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.journal import Folded
from orchestrator.policy.decisions import Decision
from orchestrator.policy.events import Event
from orchestrator.policy.state import Incident, RunStatus
from trainer.contract.config import RunConfig
from trainer.contract.paths import RunPaths
from trainer.contract.plan import OrderSpec
from trainer.contract.store import Store


class Core(Protocol):
    """The policy engine: events in, decisions out."""

    def fold(self, event: Event) -> list[Decision]:
        """Take one event in."""
        ...

    def snapshot(self) -> bytes:
        """The whole state as JSON."""
        ...

    def incidents(self) -> list[Incident]:
        """Every incident, oldest first."""
        ...

    def status(self) -> RunStatus:
        """The run as it stands."""
        ...

    def needed(self) -> tuple[str, ...]:
        """Commits that must not leave the local disk before they are in the store."""
        ...


MakeCore = Callable[[bytes | None], Core]
"""An engine: new (None), or as it was in a snapshot."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything about a launch, checked before. `config` has the secrets unmasked and all paths absolute."""

    paths: RunPaths
    config: RunConfig
    store: Store
    config_digest: str
    policy_digest: str
    code_version: str
    fresh: bool = False
    resume_because: str | None = None
    order: OrderSpec | None = None
    tick_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Update:
    """What a display is told whenever something has happened; a tick alone counts too."""

    status: RunStatus
    folded: tuple[Folded, ...]
    metrics_url: str | None
