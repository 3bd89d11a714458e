"""run.yaml as a run uses it: file, `--set` overrides and policy together, every path made absolute.

Owns what is relative to what (everything to the directory of run.yaml), where a run lives, and which keys may change
when a run goes on. Creates nothing but the resolved copies in the run directory.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.documents import (
    ConfigError,
    Document,
    Model,
    Place,
    Problem,
    override,
    read_document,
    validate,
)
from orchestrator.files import replace_file
from orchestrator.policy.model import Policy
from orchestrator.policy.shipped import DEFAULT_POLICY, in_force
from orchestrator.schema_paths import KeyPath
from trainer.contract.config import DataConfig, RunConfig, SourceConfig
from trainer.contract.paths import RunPaths

SOURCE_FILE = "source.json"

#: Keys that may not change when a run goes on, and why. A prefix stands for everything below it.
FROZEN: dict[str, str] = {
    "version": "the file format of the run",
    "name": "it names the run in the store",
    "seed": "it is part of every random state that was saved",
    "model.layers": "the checkpoints have this shape",
    "model.heads": "the checkpoints have this shape",
    "model.width": "the checkpoints have this shape",
    "model.vocab_size": "the checkpoints have this shape",
    "model.bias": "the checkpoints have this shape",
    "model.qk_norm": "the checkpoints have this shape",
    "batch.sequence_tokens": "positions in the data count samples of this length",
    "data.vocab_size": "the checkpoints have this shape",
    "data.seed": "the order of the data follows from it",
    "data.block_samples": "the order of the data follows from it",
    "data.window_blocks": "the order of the data follows from it",
    "store.url": "the run's checkpoints lie there",
}


@dataclass(frozen=True, slots=True)
class ResolvedRun:
    """Everything a launch needs to know, checked. `policy` has the shipped rules behind its own."""

    config: RunConfig
    policy: Policy
    policy_text: str
    paths: RunPaths
    source: Path
    sets: tuple[str, ...]
    document: Document

    @property
    def config_json(self) -> bytes:
        """The resolved configuration as JSON, which is YAML; secrets are masked."""
        return self.config.model_dump_json(by_alias=True, indent=1).encode() + b"\n"

    @property
    def config_digest(self) -> str:
        """SHA-256 of the resolved configuration."""
        return hashlib.sha256(self.config_json).hexdigest()

    @property
    def policy_digest(self) -> str:
        """SHA-256 of the policy in force."""
        return hashlib.sha256(self.policy.model_dump_json().encode()).hexdigest()


def resolve(source: Path, sets: Sequence[str] = ()) -> ResolvedRun:
    """Read run.yaml and its policy, apply overrides, make paths absolute.

    Raises:
        ConfigError: with every problem of both files.
    """
    document = read_document(source, _shown(source))
    problems: list[Problem] = []
    for assignment in sets:
        try:
            _refuse_secret(assignment)
            override(document, assignment)
        except ConfigError as error:
            problems.extend(error.problems)
    config = _collect(document, RunConfig, problems)
    policy, policy_text = _policy(document, source, problems)
    if problems or config is None:
        raise ConfigError(problems)
    base = source.resolve().parent
    config = absolute(config, base)
    assert config.run_dir is not None
    return ResolvedRun(
        config, in_force(policy), policy_text, RunPaths(Path(config.run_dir)), source.resolve(), tuple(sets), document
    )


def read_policy(path: Path) -> Policy:
    """A user's policy file, as it is; `in_force` puts the shipped rules behind it.

    Raises:
        ConfigError: with every problem.
    """
    return validate(read_document(path, _shown(path)), Policy)


def absolute(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration with every path made absolute; relative ones start at `base`."""
    data = config.data.model_copy(
        update={
            "train": _absolute_train(config.data, base),
            "validation": config.data.validation and _absolute_url(config.data.validation, base),
        }
    )
    changes: dict[str, Any] = {
        "data": data,
        "run_dir": os.path.normpath(base / (config.run_dir or f"runs/{config.name}")),
        "policy": config.policy and os.path.normpath(base / config.policy),
        "store": config.store.model_copy(update={"url": _absolute_url(config.store.url, base)}),
    }
    return config.model_copy(update=changes)


def write_resolved(run: ResolvedRun) -> None:
    """Keep the resolved configuration and policy in the run directory, and from where they came."""
    run.paths.create()
    origin = {"source": str(run.source), "sets": list(run.sets)}
    replace_file(run.paths.run_yaml, run.config_json)
    replace_file(run.paths.policy_yaml, run.policy_text.encode())
    replace_file(run.paths.root / SOURCE_FILE, json.dumps(origin).encode())


def resolve_again(paths: RunPaths) -> ResolvedRun:
    """The configuration that a run directory was last launched with, read again from its source.

    Raises:
        ConfigError: the source is gone or has become invalid.
    """
    try:
        origin = json.loads((paths.root / SOURCE_FILE).read_text())
        run = resolve(Path(origin["source"]), tuple(origin["sets"]))
        if run.paths.root.resolve() != paths.root.resolve():
            message = f"{run.source} runs in {run.paths.root} now; {paths.root} was set aside or moved"
            raise ConfigError([Problem(Place(str(paths.root)), "", message)])
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        place = Place(str(paths.root / SOURCE_FILE))
        message = f"does not say where run.yaml is ({type(error).__name__}); name that file instead of the run"
        raise ConfigError([Problem(place, "", message)]) from error


# -- what may change when a run goes on -------------------------------------------------------------------------------


def changed_keys(old: dict[str, Any], new: dict[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of the values that differ; a list counts as one value."""
    for key in sorted(old.keys() | new.keys()):
        one, two = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            yield from changed_keys(one, two, (*path, key))
        elif one != two:
            yield (*path, key)


def check_changes(run: ResolvedRun) -> list[str]:
    """Compare with the configuration that the run directory holds.

    Returns:
        The keys that have changed and may, dotted.

    Raises:
        ConfigError: a key has changed that may not.
    """
    try:
        old = json.loads(run.paths.run_yaml.read_bytes())
    except (OSError, ValueError) as error:
        what = (
            f"cannot be read ({type(error).__name__}), so it is not known what has changed since the last launch; "
            "bring it back, or start from scratch with --fresh"
        )
        raise ConfigError([Problem(Place(str(run.paths.run_yaml)), "", what)]) from error
    changed = list(changed_keys(old, json.loads(run.config_json)))
    problems = [run.document.problem(path, _frozen_message(path, old, why)) for path, why in _frozen(changed)]
    if problems:
        raise ConfigError(problems)
    return [".".join(str(part) for part in path) for path in changed]


def _frozen(changed: list[KeyPath]) -> Iterator[tuple[KeyPath, str]]:
    for path in changed:
        for length in range(1, len(path) + 1):
            why = FROZEN.get(".".join(str(part) for part in path[:length]))
            if why is not None:
                yield path, why


def _frozen_message(path: KeyPath, old: dict[str, Any], why: str) -> str:
    value: Any = old
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return f"may not change when a run goes on ({why}); it was {value!r}: put it back, or give the run another name"


# -- pieces -----------------------------------------------------------------------------------------------------------


def _policy(document: Document, source: Path, problems: list[Problem]) -> tuple[Policy | None, str]:
    named = document.data.get("policy") if isinstance(document.data, dict) else None
    if not isinstance(named, str):
        return None, DEFAULT_POLICY.read_text(encoding="utf-8")
    path = source.resolve().parent / named
    if not path.is_file():
        message = f"there is no file {_shown(path)}; correct the path, or leave the key out for the shipped policy"
        problems.append(document.problem(("policy",), message))
        return None, ""
    try:
        own = read_document(path, _shown(path))
    except ConfigError as error:
        problems.extend(error.problems)
        return None, ""
    return _collect(own, Policy, problems), path.read_text(encoding="utf-8")


def _collect(document: Document, model: type[Model], problems: list[Problem]) -> Model | None:
    try:
        return validate(document, model)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _refuse_secret(assignment: str) -> None:
    if assignment.strip().startswith("launch.env"):
        message = (
            "cannot be set on the command line, where other users of the machine could read it; write it in the file"
        )
        raise ConfigError([Problem(Place("--set launch.env"), "launch.env", message)])


def _absolute_url(url: str, base: Path) -> str:
    """Paths and file:// URLs made absolute; URLs of other protocols as they are."""
    protocol, separator, rest = url.rpartition("://")
    if protocol not in ("", "file", "local"):
        return url
    return f"{protocol}{separator}{os.path.normpath(base / rest)}"


def _absolute_train(data: DataConfig, base: Path) -> str | tuple[SourceConfig, ...]:
    if isinstance(data.train, str):
        return _absolute_url(data.train, base)
    return tuple(source.model_copy(update={"url": _absolute_url(source.url, base)}) for source in data.train)


def _shown(path: Path) -> str:
    """A path as people want to read it: relative to the working directory where it lies below it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here)) if resolved.is_relative_to(here) else str(path)
