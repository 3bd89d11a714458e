"""YAML documents: every mistake at once, at its line, column and key, with what would be right."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.documents import MAX_BYTES, ConfigError, Document, override, parse_document, read_document, validate
from orchestrator.policy.model import Policy
from trainer.contract.config import RunConfig

_GOOD = "name: x\nsteps: 5000\ndata: {train: tokens}\n"


def _problems(text: str, *sets: str, model: type[RunConfig] | type[Policy] = RunConfig) -> list[str]:
    """Every problem of a text, as it is shown."""
    try:
        document = parse_document(text, "run.yaml")
        for assignment in sets:
            override(document, assignment)
        validate(document, model)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


def _only(text: str, *sets: str, model: type[RunConfig] | type[Policy] = RunConfig) -> str:
    """The one problem of a text."""
    (problem,) = _problems(text, *sets, model=model)
    return problem


def test_good_document_becomes_the_model() -> None:
    """Values arrive with their types, defaults are filled in, and an int is a float where one is wanted."""
    document = parse_document(_GOOD + "optimizer: {peak_lr: 1, betas: [0.9, 0.99]}\nprecision: bf16\n", "run.yaml")

    config = validate(document, RunConfig)

    assert (config.name, config.steps, config.precision) == ("x", 5000, "bf16")
    assert config.optimizer.peak_lr == 1.0
    assert config.optimizer.betas == (0.9, 0.99)


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    """Five mistakes, five lines, each with line, column and key."""
    text = (
        "name: x\nstepz: 3\nmodel: {layers: 2.5}\ndata: {train: x}\nprecision: b16\nfaults:\n  - {kind: lr_bom}\n"
        "planned_changes:\n  - step: 3\n"
    )

    places = [problem.split(" ", 1)[0] for problem in _problems(text)]

    assert places == [
        "run.yaml:1:1:",  # steps is required and missing
        "run.yaml:2:1:",
        "run.yaml:3:9:",
        "run.yaml:5:1:",
        "run.yaml:7:6:",
        "run.yaml:9:5:",
    ]


def test_unknown_key_names_the_nearest_and_the_allowed_ones() -> None:
    """A typo is answered with what was probably meant."""
    problem = _only(_GOOD + "checkpoint: {evry_steps: 3}\n")

    assert problem.startswith("run.yaml:4:14: checkpoint.evry_steps: unknown key; did you mean 'every_steps'?")
    assert problem.endswith("allowed: every_steps, good_after_steps, keep_good, keep_for, patience_s, keep_local")


def test_value_of_a_closed_list_names_the_nearest_and_the_allowed_ones() -> None:
    """The same for values, also inside the unions of the policy grammar."""
    run = _only(_GOOD + "schedule: {kind: cosin}\n")
    policy = _only("version: 1\nrules:\n  - on: [crash, hangg]\n    do: [record]\n", model=Policy)

    assert "schedule.kind: not an allowed value (got 'cosin'); did you mean 'cosine'?" in run
    assert "(got 0); allowed: auto, a whole number of at least 1" in _only(_GOOD + "checkpoint: {every_steps: 0}\n")
    assert policy.startswith("run.yaml:3:17: rules.0.on.1: not an allowed value (got 'hangg'); did you mean 'hang'?")


def test_rules_of_the_model_itself_are_placed_at_their_section() -> None:
    """A rule over two keys points at the section that breaks it."""
    problem = _only(_GOOD + "model:\n  width: 30\n  heads: 4\n")

    assert problem == "run.yaml:4:1: model: width 30 must be a multiple of heads 4"


def test_missing_key_is_placed_at_what_lacks_it() -> None:
    """The section is where the key would have to be written."""
    problem = _only("name: x\nsteps: 5000\ndata:\n  seed: 3\n")

    assert problem == "run.yaml:3:1: data.train: is required and missing"


@pytest.mark.parametrize("value", ["'100'", "true", "1.5", "[1]"])
def test_types_are_strict(value: str) -> None:
    """Text is no number and true no 1."""
    assert "steps" in _only(f"name: x\nsteps: {value}\ndata: {{train: x}}\n")


def test_key_given_twice_is_refused() -> None:
    """YAML readers that take the last one hide a mistake."""
    problem = _only(_GOOD + "seed: 1\nseed: 2\n")

    assert problem == "run.yaml:5:1: seed: is given twice, first at line 4; remove one"


def test_number_that_is_not_finite_is_refused_once() -> None:
    """`.inf` passes every lower bound."""
    assert _only(_GOOD + "optimizer: {peak_lr: .inf}\n") == (
        "run.yaml:4:22: optimizer.peak_lr: .inf is not a finite number"
    )


def test_aliases_are_followed_within_bounds() -> None:
    """An anchor may be used again; one that explodes or contains itself is refused."""
    bomb = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + chr(ord(name) - 1)] * 8)}]\n" for name in "bcdefgh"
    )

    assert parse_document("a: &a {x: 1}\nb: *a\n", "f").data == {"a": {"x": 1}, "b": {"x": 1}}
    assert "once aliases are expanded" in _only(bomb)
    assert "contains itself" in _only("a: &a [*a]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2", "run.yaml:2:2: not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "must be"),
        ("[" * 5000, "nested"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("? [1]\n: 2", "a key must be text"),
        ("<<: {name: x}", "merge keys"),
    ],
)
def test_what_is_no_document_is_said_and_placed(text: str, said: str) -> None:
    """Broken syntax, several documents, code, deep nesting: one clear line, never a traceback."""
    problems = _problems(text)

    assert problems
    assert any(said in problem for problem in problems) or "unknown key" in problems[0]


def test_tags_construct_nothing() -> None:
    """A tag that would call Python is a problem, and its value is not made."""
    document = parse_document("name: !!python/name:os.system x\n", "run.yaml")

    assert document.data == {"name": None}
    assert "is not allowed" in str(document.problems[0])


def test_unreadable_and_oversized_files(tmp_path: Path) -> None:
    """A missing, a huge and a binary file are named with the reason."""
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    binary.write_bytes(b"a: 1\nb: \xff\xfe\n")

    with pytest.raises(ConfigError, match="No such file"):
        read_document(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is larger than"):
        read_document(large)
    with pytest.raises(ConfigError, match=r"binary\.yaml:2:1: is not UTF-8"):
        read_document(binary)


def test_secrets_are_not_repeated_in_a_message() -> None:
    """A value below launch.env is never shown, whatever is wrong with it."""
    problem = _only(_GOOD + "launch: {env: {TOKEN: 31337}}\n")

    assert problem.startswith("run.yaml:4:16: launch.env.TOKEN")
    assert "31337" not in problem


# -- --set ------------------------------------------------------------------------------------------------------------


def _set(text: str, *sets: str) -> RunConfig:
    document = parse_document(text, "run.yaml")
    for assignment in sets:
        override(document, assignment)
    return validate(document, RunConfig)


def test_set_overrides_values_at_any_depth() -> None:
    """Scalars, lists, sections that are not in the file, and items of lists by number."""
    config = _set(
        _GOOD + "faults: [{kind: sigkill}]\n",
        "steps=9000",
        "optimizer.betas=[0.8, 0.9]",
        "store.url=s3://b/p?x=1",
        "faults.0.kind=oom",
        "data.validation=null",
    )

    assert (config.steps, config.optimizer.betas, config.store.url) == (9000, (0.8, 0.9), "s3://b/p?x=1")
    assert config.faults[0].kind == "oom"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("steps=ten", "--set steps: steps: input should be a valid integer (got 'ten')"),
        ("model.layer=3", "--set model.layer: model.layer: unknown key; did you mean 'layers'?"),
        ("steps", "--set steps: write it as --set key.path=value"),
        ("name.first=x", "name has no such key"),
        ("faults.3.kind=oom", "does not exist"),
        ("a..b=1", "write it as"),
        ("steps=[1", "not valid YAML"),
        ("precision=b16", "did you mean 'bf16'?"),
    ],
)
def test_set_is_checked_like_the_file(assignment: str, said: str) -> None:
    """The option is named as the place, with the same kind of message."""
    (problem,) = _problems(_GOOD + "faults: []\n", assignment)

    assert said in problem


# -- properties -------------------------------------------------------------------------------------------------------

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=20),
)  # fmt: skip
_KEYS = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
_TREES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(_KEYS, _TREES, max_size=5))
def test_what_json_says_is_read_back_the_same(tree: dict[str, Any]) -> None:
    """JSON is YAML: any tree that JSON can say is read as it was, and every key has a place."""
    document: Document = parse_document(json.dumps(tree, ensure_ascii=False), "f")

    assert document.problems == []
    assert document.data == tree
    assert all((key,) in document.places for key in tree)


@given(st.text(max_size=60))
def test_no_text_makes_it_raise_anything_else(text: str) -> None:
    """Any text that is no policy is refused with its problems, and with nothing but them."""
    assert _problems(text, model=Policy) or "version" in text
