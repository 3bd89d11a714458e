"""The manifest of a checkpoint: the one object that makes it exist (DESIGN 4 and 9). Torch-free.

It lists every object with size and CRC32C and every tensor with dtype, shape and norm. The file is one JSON object,
`{"digest": SHA-256 of the bytes of what follows, "manifest": {...}}`, so that not one changed byte goes unnoticed.
Numbers in it are finite by type: state that is not finite is never committed.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import google_crc32c
from pydantic import Field, FiniteFloat, ValidationError

from trainer.contract.plan import Contract

COMMITS = "commits/"
_ID = re.compile(r"(\d{12})-e(\d{1,10})-(\d{1,10})")
_HEAD = b'{"digest":"'
_NECK = b'","manifest":'
_DIGEST_END = len(_HEAD) + 64
_BODY_START = _DIGEST_END + len(_NECK)

CommitIdText = Annotated[str, Field(pattern=r"^\d{12}-e\d{1,10}-\d{1,10}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_DATA_KEY = re.compile(r"data/(\d{12}-e\d{1,10}-\d{1,10})/")
DataKey = Annotated[str, Field(pattern=r"^data/\d{12}-e\d{1,10}-\d{1,10}/[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ManifestError(Exception):
    """Bytes that are no intact manifest."""


@dataclass(frozen=True, slots=True, order=True)
class CommitId:
    """What a commit's name says. Sorted by step; the order of a lineage, never of time."""

    step: int
    epoch: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.step:012d}-e{self.epoch}-{self.attempt}"


def commit_id(step: int, epoch: int, attempt: int) -> str:
    """The name of a commit: step N holds N updates."""
    return str(CommitId(step, epoch, attempt))


def parse_commit_id(text: str) -> CommitId:
    """The parts of a commit's name.

    Raises:
        ValueError: it is not the name of a commit.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not the name of a checkpoint; one looks like {commit_id(1000, 1, 1)}")
    return CommitId(int(found[1]), int(found[2]), int(found[3]))


def manifest_key(commit: str) -> str:
    """Where a commit's manifest lies."""
    parse_commit_id(commit)
    return f"{COMMITS}{commit}.json"


def data_key(commit: str, name: str) -> str:
    """Where one of a commit's objects lies."""
    parse_commit_id(commit)
    return f"data/{commit}/{name}"


def commit_in(key: str) -> str | None:
    """The commit whose object lies under this key; None for a key that is none of ours."""
    found = _DATA_KEY.match(key)
    return None if found is None else found[1]


class ObjectEntry(Contract):
    """One object of a checkpoint."""

    key: DataKey
    size: int = Field(ge=0)
    crc32c: int = Field(ge=0, lt=1 << 32)


class TensorEntry(Contract):
    """One tensor: where it lies and what it must look like."""

    name: str
    dtype: str = Field(description="without the 'torch.' prefix")
    shape: tuple[int, ...]
    object: int = Field(ge=0, description="index into `objects`")
    norm: FiniteFloat | None = Field(None, description="L2 norm, summed in float64; None for integers")


class Health(Contract):
    """How the run looked at the step; what is unknown is None, never 0."""

    loss: FiniteFloat | None = None
    grad_norm: FiniteFloat | None = None
    probe_loss: FiniteFloat | None = Field(None, description="loss on a fixed batch, for the check after a load")


class Parent(Contract):
    """The commit that this one continues, and the digest of its manifest."""

    commit: CommitIdText
    digest: Digest


class Manifest(Contract):
    """Everything about one checkpoint."""

    version: Literal[1] = 1
    run_id: str
    commit: CommitIdText
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    attempt: int = Field(ge=0)
    tokens: int = Field(ge=0, description="trained on so far")
    position: int = Field(ge=0, description="raw cursor: the first position not yet consumed")
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$", description="tells this writer's objects from any other's")
    parent: Parent | None = None
    config_digest: str = ""
    objects: tuple[ObjectEntry, ...]
    tensors: tuple[TensorEntry, ...]
    health: Health = Health()
    extra: dict[str, Any] = Field(default_factory=dict, description="the rest of the training state, as JSON")

    @property
    def bytes(self) -> int:
        """Size of all objects together."""
        return sum(entry.size for entry in self.objects)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A manifest as it lies in the store."""

    manifest: Manifest
    digest: str
    raw: bytes


def seal(manifest: Manifest) -> Sealed:
    """The manifest as bytes, with its digest.

    Raises:
        ValueError: `extra` holds NaN or an infinity, or something that is not JSON.
    """
    try:
        text = json.dumps(manifest.model_dump(), allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(f"the training state's extra part is not JSON: {error}") from error
    body = text.encode()
    digest = hashlib.sha256(body).hexdigest()
    return Sealed(manifest, digest, _HEAD + digest.encode() + _NECK + body + b"}")


def unseal(raw: bytes) -> Sealed:
    """Check and parse the bytes of a manifest.

    Raises:
        ManifestError: they are damaged, or of a version that this program does not know.
    """
    body, digest = raw[_BODY_START:-1], raw[len(_HEAD) : _DIGEST_END]
    framed = raw.startswith(_HEAD) and raw[_DIGEST_END:_BODY_START] == _NECK and raw.endswith(b"}")
    if not framed or hashlib.sha256(body).hexdigest().encode() != digest:
        raise ManifestError("the manifest does not match its digest: it is truncated or changed")
    try:
        manifest = Manifest.model_validate(json.loads(body))
    except (ValueError, ValidationError) as error:
        raise ManifestError(f"the manifest is intact but not understood: {error}") from error
    named = parse_commit_id(manifest.commit)
    if (named.step, named.epoch, named.attempt) != (manifest.step, manifest.epoch, manifest.attempt):
        raise ManifestError(f"the manifest calls itself {manifest.commit} but holds step {manifest.step}")
    if any(tensor.object >= len(manifest.objects) for tensor in manifest.tensors):
        raise ManifestError("the manifest's tensor index names an object that it does not list")
    return Sealed(manifest, digest.decode(), raw)


def crc32c(data: bytes, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of `data`, continuing from `crc`."""
    return int(google_crc32c.extend(crc, data))
