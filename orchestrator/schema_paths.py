"""Looks things up in a JSON Schema by the path of a value: which keys and values are allowed there, what is secret.

pydantic knows this but says it only by type; people need the names, and the nearest one to what they wrote.
"""

import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

KeyPath = tuple[str | int, ...]
_Schema = dict[str, Any]
_NUMBERS = {"integer": "a whole number", "number": "a number"}


class SchemaPaths:
    """The schema of one model."""

    def __init__(self, model: type[BaseModel]) -> None:
        self._root = model.model_json_schema(mode="validation")
        self._definitions: dict[str, _Schema] = self._root.get("$defs", {})

    def allowed_keys(self, path: KeyPath) -> list[str]:
        """Keys that a mapping at this path may have, in the order of the schema; empty if any or none may."""
        return list(dict.fromkeys(key for schema in self._at(path) for key in schema.get("properties", {})))

    def allowed_values(self, path: KeyPath) -> list[str]:
        """What may stand at this path, if it is one of a closed list; a number that may stand there too, in words."""
        named: list[str] = []
        numbers: list[str] = []
        for schema in self._at(path):
            values = schema.get("enum", [schema["const"]] if "const" in schema else [])
            named.extend(str(value) for value in values if value is not None)
            if not values and schema.get("type") in _NUMBERS:
                least = f" of at least {schema['minimum']}" if "minimum" in schema else ""
                numbers.append(_NUMBERS[schema["type"]] + least)
        return list(dict.fromkeys([*named, *numbers])) if named else []

    def is_secret(self, path: KeyPath) -> bool:
        """Whether the value at this path, or one above it, must not be shown."""
        prefixes = [path[:length] for length in range(len(path) + 1)]
        return any(schema.get("format") == "password" for prefix in prefixes for schema in self._at(prefix))

    def _at(self, path: KeyPath) -> list[_Schema]:
        schemas = list(self._branches(self._root))
        for key in path:
            children = [child for schema in schemas for child in _children(schema, key)]
            schemas = [branch for child in children for branch in self._branches(child)]
        return schemas

    def _branches(self, schema: _Schema) -> Iterator[_Schema]:
        """The alternatives of a schema, references and unions resolved."""
        if "$ref" in schema:
            yield from self._branches(self._definitions[schema["$ref"].rsplit("/", 1)[1]])
            return
        unions = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
        if not unions:
            yield schema
        for branch in unions:
            yield from self._branches(branch)


def _children(schema: _Schema, key: str | int) -> Iterator[_Schema]:
    if isinstance(key, int):
        prefix = schema.get("prefixItems", [])
        if key < len(prefix):
            yield prefix[key]
        elif isinstance(schema.get("items"), dict):
            yield schema["items"]
        return
    if key in schema.get("properties", {}):
        yield schema["properties"][key]
    elif isinstance(schema.get("additionalProperties"), dict):
        yield schema["additionalProperties"]


@cache
def schema_paths(model: type[BaseModel]) -> SchemaPaths:
    """The look-up for a model; made once."""
    return SchemaPaths(model)


def nearest(word: str, choices: list[str]) -> str | None:
    """The choice that was probably meant, None if nothing is close."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return close[0] if close else None
