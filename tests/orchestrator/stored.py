"""A run that is not running, with real checkpoints in its store and their records in its journal."""

from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from monitors.records import CommitRecord
from orchestrator.config import resolve, write_resolved
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.policy.decisions import StartAttempt
from orchestrator.policy.events import RecordReceived, Ticked
from tests.orchestrator.clirun import write_journal, write_run
from tests.trainer import saving
from trainer.contract import fence
from trainer.contract.manifest import commit_id
from trainer.contract.paths import RunPaths
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store, open_store
from trainer.contract.verdicts import write_verdict


class StoredRun:
    """One run. Epoch N is attempt N."""

    def __init__(self, here: Path, **changes: object) -> None:
        resolved = resolve(write_run(here, **changes))
        write_resolved(resolved)
        write_journal(resolved.paths, "stopped")
        self.here = here
        self.config = resolved.config
        self.paths: RunPaths = resolved.paths
        self.store: Store = open_store(self.config.store, here, self.config.name)
        self.store.make_place()

    def claim(self, epoch: int, base: str | None = None, ancestry: tuple[str, ...] = ()) -> None:
        """An attempt began to write: its fence, and the decision in the journal."""
        name = self.config.name
        nonce = f"{epoch:016d}"
        body = fence.Fence(run_id=name, epoch=epoch, nonce=nonce, host="h", pid=1, base=base, ancestry=ancestry)
        fence.claim(self.store, body)
        candidates = (base,) if base else ()
        plan = ResumePlan(run_id=name, attempt=epoch, epoch=epoch, candidates=candidates, fresh=not base)
        self.journal(Folded(Ticked(at_s=1.0), (StartAttempt(plan=plan),)))

    def save(
        self,
        step: int,
        epoch: int = 1,
        *,
        good: bool = True,
        at_s: float = 1.0,
        tensors: dict[str, Tensor] | None = None,
    ) -> str:
        """Save a small state, journal its record, and find it good."""
        state = tensors or {"model.w": torch.full((100,), float(step))}
        commit = saving.save(self.store, self.here / f"e{epoch}", state, step, epoch=epoch).manifest.commit
        if good:
            write_verdict(self.store, commit, "good", "healthy")
        record = CommitRecord(
            seq=1, attempt=epoch, at_s=0.0, step=step, commit=commit, position=step, tokens=step, bytes=1,
            seconds=0.1,
        )  # fmt: skip
        self.journal(Folded(RecordReceived(at_s=at_s, record=record)))
        return commit

    def journal(self, *folded: Folded, snapshot: bytes | None = None) -> None:
        """Write into the journal, as a supervisor would."""
        with closing(Journal.open(self.paths.database)) as journal:
            journal.commit(Batch(folded=folded, snapshot=snapshot))

    def damage(self, commit: str) -> None:
        """Flip a bit of the last object."""
        path = self.store.local_path(self.store.list(f"data/{commit}/")[-1].key)
        assert path is not None
        raw = path.read_bytes()
        path.unlink()  # it may be linked to something
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def step_of(commit: str) -> int:
    """The step that a commit's name says."""
    return int(commit.split("-")[0])


__all__ = ["StoredRun", "commit_id", "step_of"]
