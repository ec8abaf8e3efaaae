"""Images with captions: of digits, written here; of TFDS sets, several for each image."""

import zlib

import numpy as np

DIGIT_NAMES = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
DIGIT_PROMPT = "a handwritten {}"
DIGIT_TEMPLATES = (
    DIGIT_PROMPT,
    "the digit {}",
    "a {} in ink",
    "a small picture of a {}",
    "somebody wrote {}",
    "the number {} by hand",
)


class CaptionedDigits:
    """The digits, each with a caption that names it; which of the templates, its id decides."""

    def __init__(self, reader):
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> dict:
        example = self._reader[i]
        template = DIGIT_TEMPLATES[zlib.crc32(b"%d" % example["id"]) % len(DIGIT_TEMPLATES)]
        caption = template.format(DIGIT_NAMES[int(example["label"])])
        return example | {"captions": {"text": [caption]}}


class Tokenised:
    """Images with one tokenised caption, each image `per_image` times in a row.

    `caption` (T,) int32: the text's first T - 1 tokens, the separator, and 0 where it has ended.
    """

    def __init__(self, reader, tokenizer, *, length: int, per_image: int):
        self._reader, self._tokenizer = reader, tokenizer
        self._length, self._per_image = length, per_image

    def __len__(self) -> int:
        return len(self._reader) * self._per_image

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        example = dict(self._reader[int(i) // self._per_image])
        texts = example.pop("captions")["text"]
        text = texts[int(i) % self._per_image % len(texts)]
        return example | {"caption": padded(self._tokenizer, text, length=self._length)}


def padded(tokenizer, text: bytes | str, *, length: int) -> np.ndarray:
    """`text` as `length` tokens: cut to leave room for the separator, then filled with 0."""
    tokens = [*tokenizer.encode(text)[: length - 1], tokenizer.separator]
    return np.array(tokens + [0] * (length - len(tokens)), np.int32)
