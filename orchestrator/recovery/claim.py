"""An epoch is claimed: the fence is written that says from which commit an attempt goes on, and what it builds on."""

import hashlib
import os
import socket

from trainer.contract import fence
from trainer.contract.manifest import parse_commit_id
from trainer.contract.plan import ResumePlan
from trainer.contract.store import Store


def claim_nonce(run: str, epoch: int, secret: str) -> str:
    """The same whenever this run directory claims this epoch, so that a fence of its own is known again."""
    return hashlib.sha256(f"{run}/{epoch}/{secret}".encode()).hexdigest()[:32]


def claim_epoch(store: Store, plan: ResumePlan, nonce: str, journal_from: int | None) -> None:
    """Claim the plan's epoch on what the plan builds on; again with the same nonce is no error.

    Raises:
        FenceError: it is somebody else's, or the newest fence is damaged.
        StoreError: the store could not be asked.
    """
    present = fence.lineage(store)
    if plan.candidates:
        fence.ensure_ours(store, max(parse_commit_id(one).epoch for one in plan.candidates), present.epoch)
    else:
        store.make_place()
    if present.epoch == plan.epoch and fence.read_fence(store, plan.epoch).nonce == nonce:
        return  # claimed by us before we died
    if plan.replay is not None:  # commits nothing, so the lineage stays what it was
        base = present.commits[-1] if present.commits else None
    else:
        base = plan.candidates[0] if plan.candidates else None
    inherited = present.up_to(base) if base else ()
    ancestry = tuple(dict.fromkeys((*inherited, *(c for c in plan.candidates if c != base))))
    fence.claim(
        store,
        fence.Fence(
            run_id=plan.run_id,
            epoch=plan.epoch,
            nonce=nonce,
            host=socket.gethostname(),
            pid=os.getpid(),
            base=base,
            ancestry=ancestry,
            plan=plan.model_dump(mode="json"),
            journal_from=journal_from,
        ),
    )
