"""Secrets in options: named, never written down."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.contract.config import DataConfig
from trainer.contract.secrets import SecretMissingError, plain_secrets, with_secrets
from trainer.data.errors import DataError
from trainer.data.manifest import Place


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AK"},
        {"secret": "SK"},
        {"client_kwargs": {"aws_secret_access_key": "SK"}},
        {"account_key": "x", "anon": False},
        {"connection_string": "x"},
        {"sas_token": "x"},
        {"PASSWORD": "x"},
    ],
)
def test_secrets_as_text_are_refused(options: dict[str, Any]) -> None:
    """With the way on; the message does not repeat the value."""
    with pytest.raises(ValidationError, match=r"write \{env: NAME\} instead"):
        DataConfig(train="x", storage_options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"anon": True, "endpoint_url": "http://x", "key_filename": "/home/me/.ssh/id"},
        {"key": {"env": "A"}, "secret": {"env": "B"}},
        {"token": None, "use_ssl": False},
    ],
)
def test_names_of_variables_and_other_options_are_taken(options: dict[str, Any]) -> None:
    """What is no secret stands in the file."""
    assert DataConfig(train="x", storage_options=options).storage_options == options


def test_a_password_in_a_url_is_refused() -> None:
    """It would stand in every message about the data; a user alone may."""
    with pytest.raises(ValidationError, match="a password in a URL"):
        DataConfig(train="sftp://me:hunter2@host/data")
    assert DataConfig(train="hdfs://me@host/data").train == "hdfs://me@host/data"


_NAMES = st.sampled_from(["key", "secret", "anon", "client_kwargs", "timeout"])
_OPTIONS = st.recursive(
    st.integers() | st.booleans() | st.just({"env": "HELD"}), lambda inner: st.dictionaries(_NAMES, inner), max_leaves=8
)


@given(st.dictionaries(_NAMES, _OPTIONS))
def test_every_name_is_replaced_wherever_it_stands(options: dict[str, Any]) -> None:
    """Nothing else is changed, nothing is left, and what comes of it would be refused as text."""
    found = with_secrets(options, {"HELD": "the-secret"})
    assert repr(found) == repr(options).replace("{'env': 'HELD'}", "'the-secret'")
    assert list(plain_secrets(options)) == []


def test_a_variable_that_is_not_set_is_named() -> None:
    """For the preflight and for the trainer, with the remedy."""
    with pytest.raises(SecretMissingError, match="NOWHERE_SET"):
        with_secrets({"key": {"env": "NOWHERE_SET"}}, {})
    with pytest.raises(DataError, match=r"NOWHERE_SET is not set; set it, or correct data\.storage_options"):
        Place.of("memory://x", {"key": {"env": "NOWHERE_SET"}})
