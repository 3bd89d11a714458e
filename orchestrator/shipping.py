"""The journal's way to the store: what is new since the last time is cut into a segment and laid into the outbox.

A segment is gzipped JSON lines: a header, then rows of the journal's tables as they are. Rows may come twice, in
overlapping segments or with a newer status; applied in order they give the journal again (`orchestrator.moving`).
Cutting needs no store, so an outage only fills the outbox; the uploader sends it.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel

from monitors.records import CommitFailedRecord, CommitRecord
from orchestrator.files import replace_file
from orchestrator.journal import Batch, Folded, Journal
from orchestrator.policy.decisions import EndRun
from orchestrator.policy.events import AttemptExited, AttemptSpawned, RecordReceived, RunOpened
from trainer.contract.paths import RunPaths
from trainer.contract.segments import JOURNAL, Segment

SHIPPED = "shipped"  # keys of the journal's meta table
MOVED = "moved"  # set in a journal that was built from the store, until this machine has claimed an epoch
SHIPPED_META = ("status", "totals")
_MOST_EVENTS = 500  # of one segment: no long stretch without a checkpoint leaves much behind
_LOG = structlog.get_logger(__name__)


class Shipped(BaseModel):
    """What has been cut so far, kept in the journal."""

    epoch: int | None = None
    begin: int = 1
    upto: int = 0
    snapshot: int = 0
    unsettled_from: int = 0
    attempt: int = 0
    files: str = ""


def shipped_files(paths: RunPaths) -> dict[str, Path]:
    """What beside the journal a replacement needs: the resolved configuration and policy, the shards by number."""
    return {"run.yaml": paths.run_yaml, "policy.yaml": paths.policy_yaml, "data.json": paths.data_book}


class Shipper:
    """Cuts segments of one run's journal."""

    def __init__(self, journal: Journal, paths: RunPaths) -> None:
        self._journal = journal
        self._paths = paths
        self._done = Shipped.model_validate_json(journal.meta(SHIPPED) or "{}")
        self._incidents: dict[int, str] = {}
        self._files = _digest(_read(paths))

    def begins(self, epoch: int) -> int:
        """The first event that will be cut under an epoch, for its fence; the same whenever it is asked."""
        if self._done.epoch != epoch:
            self._done = self._done.model_copy(update={"epoch": epoch, "begin": self._done.upto + 1})
            self._journal.commit(Batch(meta={SHIPPED: self._done.model_dump_json()}))
        return self._done.begin

    def claimed(self) -> None:
        """An epoch is ours: from now on this journal is the run's."""
        if self._journal.meta(MOVED):
            self._journal.commit(Batch(meta={MOVED: ""}))
        self.cut()

    def committed(self, folded: Sequence[Folded], *, incidents_changed: bool) -> None:
        """A batch is durable: cut a segment if it holds what must not be forgotten, or much has gathered."""
        if self._done.epoch is None:
            return
        matters = incidents_changed or any(_matters(one) for one in folded)
        if matters or self._journal.last_event() - self._done.upto >= _MOST_EVENTS:
            self.cut()

    def cut(self) -> None:
        """Lay everything that is new into the outbox. On a full disk it stays for the next time."""
        done = self._done
        last = self._journal.last_event()
        if done.epoch is None or last <= done.upto:
            return
        segment = Segment(done.upto + 1, last, done.epoch)
        incidents = {row["id"]: row["json"] for row in self._journal.select("SELECT * FROM incidents")}
        lines = [json.dumps({"version": 1, "epoch": segment.epoch, "first": segment.first, "last": last})]
        for table, row in self._rows(incidents):
            lines.append(json.dumps({"table": table, "row": row}))
        body = gzip.compress("\n".join(lines).encode(), compresslevel=6, mtime=0)
        try:
            replace_file(self._paths.outbox / segment.key.removeprefix(JOURNAL), body)
        except OSError as error:
            _LOG.warning("journal_segment_not_cut", why=str(error))
            return
        self._incidents = incidents
        self._done = Shipped(
            epoch=done.epoch, begin=done.begin, upto=last, snapshot=self._journal.newest_snapshot()[0],
            unsettled_from=self._journal.first_unsettled(), attempt=self._journal.newest_attempt(),
            files=self._files,
        )  # fmt: skip
        self._journal.commit(Batch(meta={SHIPPED: self._done.model_dump_json()}))

    def _rows(self, incidents: Mapping[int, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        done, select = self._done, self._journal.select
        for table, query, since in (
            ("events", "SELECT * FROM events WHERE seq > ? ORDER BY seq", done.upto),
            ("decisions", "SELECT * FROM decisions WHERE id >= ?", done.unsettled_from),
            ("notifications", "SELECT * FROM notifications WHERE decision >= ?", done.unsettled_from),
            ("attempts", "SELECT * FROM attempts WHERE attempt >= ?", done.attempt),
        ):
            for row in select(query, since):
                yield table, dict(row)
        for number, text in incidents.items():
            if self._incidents.get(number) != text:
                yield "incidents", {"id": number, "json": text}
        for row in select("SELECT * FROM meta"):
            if row["key"] in SHIPPED_META:
                yield "meta", dict(row)
        seq, snapshot = self._journal.newest_snapshot()
        if snapshot is not None and seq > done.snapshot:
            yield "snapshots", {"event_seq": seq, "json": snapshot.decode()}
        if self._files != done.files:
            yield from (("files", {"name": name, "text": text}) for name, text in _read(self._paths).items())


def _matters(folded: Folded) -> bool:
    match folded.event:
        case RecordReceived(record=CommitRecord() | CommitFailedRecord()):
            return True
        case AttemptSpawned() | AttemptExited() | RunOpened():
            return True
        case _:
            return any(isinstance(decision, EndRun) for decision in folded.decisions)


def _read(paths: RunPaths) -> dict[str, str]:
    """They are replaced at a launch only, before its supervisor begins."""
    return {name: path.read_text(encoding="utf-8") for name, path in shipped_files(paths).items() if path.exists()}


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
