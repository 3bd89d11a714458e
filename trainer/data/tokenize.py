"""Text to token ids: bytes as they are, or a Hugging Face `tokenizers` file. Torch-free."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.errors import PrepareError

Ids = npt.NDArray[Any]

BYTE_EOT = 256
_EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(Protocol):
    """What preparation needs to know of a tokenizer. `eot` opens each document, as in llm.c."""

    name: str
    vocab_size: int
    eot: int
    dtype: str

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        """The ids of each text, in `dtype`."""


class ByteTokenizer:
    """Each byte is its own id; 256 opens a document."""

    name = "bytes"
    vocab_size = 257
    eot = BYTE_EOT
    dtype = "<u2"

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        """No byte is changed, whatever its encoding."""
        return [np.frombuffer(text, dtype=np.uint8).astype(self.dtype) for text in texts]


class FileTokenizer:
    """A `tokenizer.json`. Bytes that are no UTF-8 become the replacement character."""

    def __init__(self, path: str, eot: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as HfTokenizer
        except ImportError as error:
            remedy = "install it: pip install 'longwatch[tokenizers]'"
            raise PrepareError("the package `tokenizers` is not installed", remedy) from error
        try:
            with open(path, "rb") as file:
                content = file.read()
            self._tokenizer = HfTokenizer.from_str(content.decode())
        except OSError as error:
            raise PrepareError(f"{path}: cannot be read ({error.strerror})", "name a tokenizer.json") from error
        except Exception as error:  # what the library raises on a file that it cannot parse
            raise PrepareError(f"{path}: is no tokenizer ({error})", "name a tokenizer.json") from error
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = (eot,) if eot is not None else _EOT_NAMES
        found = next((vocabulary[name] for name in names if name in vocabulary), None)
        if found is None:
            what = f"{path}: has none of {', '.join(names)} to open a document with"
            raise PrepareError(what, "name a token of its vocabulary with --eot")
        self.eot = found
        self.vocab_size = max(vocabulary.values()) + 1
        self.dtype = "<u2" if self.vocab_size <= 1 << 16 else "<u4"
        self.name = f"tokenizers:{hashlib.sha256(content).hexdigest()[:16]}"

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        """All texts at once, on all cores; the result does not depend on how many."""
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        encoded = self._tokenizer.encode_batch(decoded, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=self.dtype) for one in encoded]


def open_tokenizer(path: str | None, eot: str | None = None) -> Tokenizer:
    """The byte tokenizer, or the one in a file.

    Raises:
        PrepareError: the file holds none that can be used.
    """
    return ByteTokenizer() if path is None else FileTokenizer(path, eot)
