"""The shipped policy, and the one that is in force when a user's own is given. Reads a file of this package only."""

from functools import cache
from importlib.resources import files

from ruamel.yaml import YAML

from orchestrator.policy.model import Policy

DEFAULT_POLICY = files("orchestrator.policy").joinpath("default.yaml")


@cache
def shipped_policy() -> Policy:
    """The policy of default.yaml."""
    return Policy.model_validate(YAML(typ="safe").load(DEFAULT_POLICY.read_text(encoding="utf-8")))


def in_force(own: Policy | None) -> Policy:
    """A user's policy with the shipped rules behind its own, or the shipped one."""
    return shipped_policy() if own is None else own.with_fallback(shipped_policy())
