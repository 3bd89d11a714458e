"""YAML files into checked models, with all mistakes at once and each at its line, column and key.

Owns the reading of every YAML document a user writes. Nothing is constructed but text, numbers, booleans, null,
lists and mappings; size, depth and what aliases expand to are bounded. Values are checked strictly: `"100"` is no
number and `true` no 1. Lines and columns count from 1.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from orchestrator.errors import OrchestratorError
from orchestrator.schema_paths import KeyPath, SchemaPaths, nearest, schema_paths

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 1 << 20  # a configuration is a few kilobytes; what is larger is not one
MAX_VALUES = 20_000  # after aliases are expanded: ten nested aliases of ten make 10^10
MAX_DEPTH = 40
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a file with line and column, or an option of the command line."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where, at which key, what is wrong and what would be right."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.message) if part)


class ConfigError(OrchestratorError):
    """A document that cannot be used, with every problem found in it."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


@dataclass(slots=True)
class Document:
    """A document as it was written: plain values, and the place of every key and item."""

    source: str
    data: Any
    places: dict[KeyPath, Place]
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Where the value at this path was written, or the nearest one above it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.source, 1, 1)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem at this path."""
        return Problem(self.place(path), dotted(path), message)


def dotted(path: KeyPath) -> str:
    """`rules.0.when` for ("rules", 0, "when")."""
    return ".".join(str(part) for part in path)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_document(path: Path, shown_as: str | None = None) -> Document:
    """Read a YAML file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not YAML.
    """
    source = shown_as or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check the path, or write a new one with `longwatch init`"
        raise ConfigError([Problem(Place(source), "", message)]) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError([Problem(Place(source), "", f"is larger than {MAX_BYTES} bytes; this is no configuration")])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(Place(source, line, 1), "", "is not UTF-8 text; save it as UTF-8")]) from error
    return parse_document(text, source)


def parse_document(text: str, source: str) -> Document:
    """Read a YAML text. Mistakes that leave the rest readable (a key given twice) are kept as problems.

    Raises:
        ConfigError: it is not YAML.
    """
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1, mark.column + 1) if mark is not None else Place(source)
        raise ConfigError([Problem(place, "", f"not valid YAML: {error.problem or error.context}")]) from error
    except YAMLError as error:
        raise ConfigError([Problem(Place(source), "", f"not valid YAML: {error}")]) from error
    except RecursionError as error:
        raise ConfigError([Problem(Place(source), "", f"is nested more than {MAX_DEPTH} deep")]) from error
    reader = _Reader(source)
    data = reader.value(node, ()) if node is not None else None
    return Document(source, data, reader.places, reader.problems)


class _Reader:
    """Turns a graph of YAML nodes into plain values, within bounds."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[Problem] = []
        self._values = 0

    def value(self, node: Node, path: KeyPath) -> Any:
        """The value of a node; every value below it is counted."""
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(node, (), f"more than {MAX_VALUES} values once aliases are expanded; write less")
        if len(path) > MAX_DEPTH:
            self._refuse(node, (), f"is nested more than {MAX_DEPTH} deep, or an alias contains itself")
        self.places.setdefault(path, self._place(node))
        match node:
            case MappingNode():
                return self._mapping(node, path)
            case SequenceNode():
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            case ScalarNode():
                return self._scalar(node, path)
        raise AssertionError(f"no such node: {node!r}")

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else None
            if key is None:
                self._note(key_node, path, "a key must be text")
                continue
            where = (*path, str(key))
            if str(key_node.tag) == f"{_TAG}merge":
                self._note(key_node, where, "merge keys (<<) are not read here; write the keys out")
            elif key in result:
                self._note(key_node, where, f"is given twice, first at line {self.places[where].line}; remove one")
            else:
                self.places[where] = self._place(key_node)
                result[str(key)] = self.value(value_node, where)
        return result

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text, tag = str(node.value), str(node.tag).removeprefix(_TAG)
        match tag:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                try:
                    return _integer(text)
                except ValueError:
                    self._note(node, path, "a number of so many digits cannot be read")
                    return None
            case "float":
                number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
                if not math.isfinite(number):
                    self._note(node, path, f"{text} is not a finite number")
                    return None
                return number
            case "str" | "timestamp":
                return text
        self._note(node, path, f"the tag {str(node.tag)!r} is not allowed; only plain values are read")
        return None

    def _place(self, node: Node) -> Place:
        return Place(self.source, node.start_mark.line + 1, node.start_mark.column + 1)

    def _note(self, node: Node, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(self._place(node), dotted(path), message))

    def _refuse(self, node: Node, path: KeyPath, message: str) -> None:
        raise ConfigError([Problem(self._place(node), dotted(path), message)])


def _integer(text: str) -> int:
    """Raises ValueError beyond the number of digits that Python converts."""
    digits = text.replace("_", "")
    return int(digits, 0) if re.match(r"[-+]?0[xob]", digits) else int(digits, 10)


# -- overrides --------------------------------------------------------------------------------------------------------


def override(document: Document, assignment: str) -> None:
    """Apply one `--set a.b=c`: the value is read as YAML, the key may name list items by number.

    Raises:
        ConfigError: it is not an assignment, or leads through a value that has no keys.
    """
    key, equals, text = assignment.partition("=")
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    option = Place(f"--set {key.strip()}")
    if not equals or "" in path:
        raise ConfigError([Problem(Place(f"--set {assignment}"), "", "write it as --set key.path=value")])
    value = parse_document(text, option.source)
    document.problems.extend(Problem(option, dotted(path), problem.message) for problem in value.problems)
    holder = document.data if document.data is not None else {}
    document.data = holder
    for index, part in enumerate(path[:-1]):
        if isinstance(holder, dict) and isinstance(part, str):
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            holder = holder[part]
        else:
            raise ConfigError([Problem(option, dotted(path), f"{dotted(path[: index + 1])} does not exist")])
    _assign(holder, path, value.data, option)
    document.places = {known: place for known, place in document.places.items() if known[: len(path)] != path}
    document.places[path] = option


def _assign(holder: Any, path: KeyPath, value: Any, option: Place) -> None:
    last = path[-1]
    if isinstance(holder, dict) and isinstance(last, str):
        holder[last] = value
    elif isinstance(holder, list) and isinstance(last, int) and last <= len(holder):
        holder[last : last + 1] = [value]
    else:
        raise ConfigError([Problem(option, dotted(path), f"{dotted(path[:-1]) or 'this'} has no such key")])


# -- checking ---------------------------------------------------------------------------------------------------------


def validate(document: Document, model: type[Model]) -> Model:
    """Check a document against a model.

    Raises:
        ConfigError: with every problem, in the order of the file.
    """
    problems = list(document.problems)
    checked: Model | None = None
    if not isinstance(document.data, dict):
        problems.append(document.problem((), "must be a mapping of keys to values"))
    else:
        try:
            checked = model.model_validate_json(json.dumps(document.data), strict=True)
        except ValidationError as error:
            problems.extend(_problems(document, schema_paths(model), error))
    if checked is None or problems:
        known = {problem.key for problem in document.problems if problem.key}  # said once is enough
        rest = [problem for problem in problems[len(document.problems) :] if problem.key not in known]
        raise ConfigError(sorted([*document.problems, *rest], key=_in_file_order))
    return checked


def _in_file_order(problem: Problem) -> tuple[str, int, int, str]:
    place = problem.place
    return (place.source, place.line or 0, place.column or 0, problem.key)


@dataclass(frozen=True, slots=True)
class _Found:
    """One pydantic error with the part of its location that exists in the document."""

    path: KeyPath
    branch: KeyPath | None  # where pydantic began to try the alternatives of a union
    details: ErrorDetails


def _problems(document: Document, paths: SchemaPaths, error: ValidationError) -> Iterator[Problem]:
    errors = error.errors(include_url=False)
    for found in _best_of_unions([_locate(document.data, details) for details in errors]):
        yield document.problem(found.path, _message(found, paths))


def _locate(data: Any, details: ErrorDetails) -> _Found:
    """Walk as far as the document goes; what it does not have is a tag of a union, or the missing key at the end."""
    node, path, branch = data, (), None  # type: Any, KeyPath, KeyPath | None
    location = details["loc"]
    for index, part in enumerate(location):
        if _has(node, part):
            node, path = node[part], (*path, part)
        elif details["type"] == "missing" and index == len(location) - 1:
            path = (*path, part)
        elif branch is None:
            branch = path
    return _Found(path, branch, details)


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node


def _best_of_unions(found: list[_Found]) -> list[_Found]:
    """Of the errors of a union's branches keep those of the branch that came furthest; one error for one place."""
    kept: dict[KeyPath, _Found] = {}
    for one in found:
        rivals = [other for other in found if one.branch is not None and other.branch == one.branch]
        deepest = max((len(other.path) for other in rivals), default=0)
        if one.branch is not None and len(one.path) < deepest:
            continue
        known = kept.get(one.path)
        if known is None or (known.details["type"].endswith("_type") and not one.details["type"].endswith("_type")):
            kept[one.path] = one
    return list(kept.values())


def _message(found: _Found, paths: SchemaPaths) -> str:
    details, path = found.details, found.path
    match details["type"]:
        case "missing":
            return "is required and missing"
        case "extra_forbidden":
            allowed = paths.allowed_keys(path[:-1])
            return f"unknown key{_meant(str(path[-1]), allowed)}; allowed: {', '.join(allowed)}"
        case "value_error" | "assertion_error":
            return details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if paths.is_secret(path) else _shown(details["input"])
    if values := paths.allowed_values(path):
        meant = _meant(str(details["input"]), values) if shown else ""
        return f"not an allowed value{shown}{meant}; allowed: {', '.join(values)}"
    return f"{details['msg'][0].lower()}{details['msg'][1:]}{shown}"


def _meant(word: str, choices: list[str]) -> str:
    guess = nearest(word, choices)
    return f"; did you mean {guess!r}?" if guess else ""


def _shown(value: Any) -> str:
    return f" (got {value!r})" if value is None or isinstance(value, str | int | float | bool) else ""
