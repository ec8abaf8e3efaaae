"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, a SentencePiece `.model`.

Each has `vocab_size`, `separator` (the id that begins a document and ends a caption),
`token_bytes` (bytes of text each id stands for, 0 for special ones), `fingerprint`, and `encode`,
`encode_batch` and `decode`. Text that spells a special token is text.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lsdl.errors import UserError

# What tokenizer files call the token between documents, in the order of preference.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


def tokenizer(name: str):
    """The tokenizer `bytes` or that of the file `name`; with an empty name, a stand-in.

    Raises `UserError` if there is none of that name.
    """
    if name == "bytes":
        return Bytes()
    if not name:
        return Later()
    kinds = {".json": HuggingFace, ".model": SentencePiece}
    path = Path(name).expanduser()
    if path.suffix not in kinds or not path.is_file():
        raise UserError(
            f"data.tokenizer={name!r} is no tokenizer: use 'bytes', or the path of a Hugging Face "
            "tokenizer.json or of a SentencePiece .model."
        )
    kind = kinds[path.suffix]
    try:
        return kind(path)
    except ImportError as error:
        raise UserError(
            f"data.tokenizer={name!r} needs the package {error.name}: pip install -e '.[text]'"
        ) from error
    except UserError:
        raise
    except Exception as error:  # both packages raise bare Exceptions
        raise UserError(f"data.tokenizer={name!r} could not be read: {error}") from error


class Later:
    """No tokenizer yet: enough to build and trace an experiment whose file is elsewhere."""

    vocab_size = separator = 0  # unknown

    @property
    def fingerprint(self) -> str:
        """What whoever tokenises asks for first."""
        raise UserError(
            "data.tokenizer='' is to be given: set it to the path of a Hugging Face tokenizer.json "
            "or of a SentencePiece .model with the model's vocabulary, or to 'bytes'."
        )

    def encode(self, text: bytes | str) -> list[int]:
        return self.fingerprint  # raises

    encode_batch = decode = encode


class Bytes:
    """Ids 0 to 255 are bytes, 256 is the separator."""

    vocab_size = 257
    separator = 256
    fingerprint = "bytes"

    def __init__(self):
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[np.ndarray]:
        data = (text.encode() if isinstance(text, str) else text for text in texts)
        return [np.frombuffer(d, np.uint8) for d in data]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class HuggingFace:
    """A `tokenizer.json`. Sizes in bytes are exact for byte-level vocabularies."""

    def __init__(self, path: Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = _separator(vocabulary, path)
        self.fingerprint = _fingerprint(path)
        decoder = json.dumps(json.loads(path.read_text())["decoder"])
        added = self._tokenizer.get_added_tokens_decoder()
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for piece, i in vocabulary.items():
            if i in added:
                size = 0 if added[i].special else len(added[i].content.encode())
            elif "ByteLevel" in decoder:
                size = len(piece)  # a character for each byte
            else:
                size = _piece_bytes(piece.removeprefix("##"))
            self.token_bytes[i] = size

    def encode(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(_string(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[np.ndarray]:
        strings = [_string(text) for text in texts]
        found = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


class SentencePiece:
    """A SentencePiece `.model`. Sizes in bytes leave out what its normaliser changes."""

    def __init__(self, path: Path):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._model.vocab_size()
        self.separator = next(
            (i for i in (self._model.eos_id(), self._model.bos_id()) if i >= 0), None
        )
        if self.separator is None:
            raise UserError(f"{path} has neither an end nor a begin token to separate documents.")
        self.fingerprint = _fingerprint(path)
        special = lambda i: self._model.is_control(i) or self._model.is_unknown(i)  # noqa: E731
        self.token_bytes = np.array(
            [
                0 if special(i) else _piece_bytes(self._model.id_to_piece(i))
                for i in range(self.vocab_size)
            ],
            np.int32,
        )

    def encode(self, text: bytes | str) -> list[int]:
        return self._model.encode(_string(text))

    def encode_batch(self, texts: Sequence[bytes | str]) -> list[np.ndarray]:
        return [np.array(ids, np.uint32) for ids in self._model.encode([_string(t) for t in texts])]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


def _piece_bytes(piece: str) -> int:
    """Bytes of a SentencePiece piece: a byte by its number, U+2581 for a space."""
    is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return 1 if is_byte else len(piece.replace("\u2581", " ").encode())


def _separator(vocabulary: dict[str, int], path: Path) -> int:
    for token in SEPARATORS:
        if token in vocabulary:
            return vocabulary[token]
    raise UserError(
        f"{path} has no token to separate documents: it needs {SEPARATORS[0]} or alike."
    )


def _fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _string(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode(errors="replace")
