"""What can be wrong with token data. Every error says which shard, states the fact, then the remedy.

The trainer leaves with exit code DATA on any of them, DATA_UNREACHABLE where waiting may help; preflight collects
them, so that all are told at once.
"""

from trainer.contract.exit_codes import ExitCode


class DataError(Exception):
    """The data cannot be used as it is. `shard` names the file, if one is to blame; `remedy` says what to do."""

    def __init__(self, what: str, remedy: str, shard: str | None = None) -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what
        self.remedy = remedy
        self.shard = shard


class DataUnreachableError(DataError):
    """The place of the data gave no answer, or none that could be used; the data itself may be sound."""

    code = ExitCode.DATA_UNREACHABLE


class TokenRangeError(DataError):
    """A token lies outside the vocabulary: the shard was made with another tokenizer, or read with a wrong dtype."""

    def __init__(self, shard: str, sample: int | None, token: int, vocab_size: int) -> None:
        where = f"shard {shard}" if sample is None else f"shard {shard}, sample {sample}"
        super().__init__(
            f"{where}: token {token} is outside the vocabulary of {vocab_size}",
            "check the shard's dtype and tokenizer (data.format, data.vocab_size), prepare it again, or quarantine it",
            shard,
        )
        self.sample = sample
        self.token = token
        self.vocab_size = vocab_size


class ExhaustedError(DataError):
    """Skips and quarantines leave nothing to read."""


class PrepareError(DataError):
    """Sources cannot be turned into shards as asked."""
