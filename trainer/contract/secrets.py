"""Options that must not lie in plain text: named by the environment variable that holds them. Pure; torch-free.

What run.yaml says ends up in the run directory, so `secret: {env: NAME}` stands there, and the value is looked up by
the process that needs it, at the moment at which it does.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SECRET = re.compile(r"(^|_)(key|secret|token|password|passphrase|credentials?|sas)$|connection_string", re.IGNORECASE)


class SecretMissingError(Exception):
    """The environment variable that an option names is not set."""

    def __init__(self, variable: str) -> None:
        self.variable = variable
        super().__init__(f"environment variable {variable} is not set")


def plain_secrets(options: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted names of the options that hold a secret as text, judged by their names."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from plain_secrets(value, (*path, name))
        elif isinstance(value, str) and value and _SECRET.search(name):
            yield ".".join((*path, name))


def with_secrets(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The options with every `{env: NAME}` replaced by what NAME holds.

    Raises:
        SecretMissingError: it holds nothing.
    """
    return {name: _value(value, environment) for name, value in options.items()}


def _value(value: Any, environment: Mapping[str, str]) -> Any:
    match value:
        case {"env": str(variable), **rest} if not rest:
            if not environment.get(variable):
                raise SecretMissingError(variable)
            return environment[variable]
        case Mapping():
            return with_secrets(value, environment)
    return value
