"""PH-27: a small transformer on the bytes of Python's standard library, against n-grams.

The valid files' first 2,000 windows of 128 bytes, by models of the train files: a 2-layer GPT of
width 128, one seed, and interpolated n-grams (Witten and Bell 1991) of order 0 to 5, where order k
sees k bytes. zlib and xz compress these bytes by themselves, with no model of the train files.
"""

import lzma
import math
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsdl import plots
from lsdl.analysis import ngrams
from lsdl.data import stdlib
from lsdl.metrics import read_rows
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = "A decoder-only transformer that sees 128 bytes predicts the next better than n-grams."
SOURCE = (
    "Lectures: GPT, decoder-only transformers; Radford et al. 2019, Language models are "
    "unsupervised multitask learners; Chen and Goodman 1999, An empirical study of smoothing"
)
_PILOT = "pilot: 4.659, 3.529, 2.659, 2.166, 2.036, 2.028 bits for orders 0 to 5"
EXPECTED = {
    "order_2": Expected(
        "bits per byte of the transformer (2 layers of 128, context 128, 1,200 steps) over those "
        "of interpolated order 2",
        "lectures: the transformer beats n-grams",
        high=1 - 1e-6,
    ),
    "absolute": Expected(
        "bits per byte of the transformer: the pilot's order 2",
        "lectures: the transformer beats n-grams",
        high=2.66,
    ),
    "order_5": Expected(
        "bits per byte of the transformer over those of interpolated order 5: the stretch",
        "lectures: the transformer beats n-grams",
        high=1 - 1e-6,
    ),
    "ladder": Expected(
        "the largest ratio of an order's bits to those of the order below, orders 1 to 5",
        _PILOT,
        high=1,
    ),
    "ngram_2": Expected("bits per byte of interpolated order 2", _PILOT, 2.4, 2.9),
    "ngram_5": Expected("bits per byte of interpolated order 5", _PILOT, 1.8, 2.3),
    "zlib": Expected("bits per byte of zlib at level 9", "pilot: 1.916", 1.7, 2.2),
    "xz": Expected("bits per byte of xz at preset 9", "pilot: 1.590", 1.4, 1.9),
}

CONFIG = "configs/stdlib_gpt.py"
LENGTH, WINDOWS, ORDER = 128, 2_000, 5
FIELDS = {
    "model.num_layers": 2,
    "data.valid_examples": WINDOWS,
    "data.test_examples": 64,
    "total_steps": 1_200,
    "eval.every_steps": 300,
    "checkpoint.every_steps": 300,
    "log.every_steps": 10,
    "log.tensorboard": False,
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """The transformer, one seed of it, and the counts; at full scale GPT-2 on C4."""
    if scale == "full":
        published = "none: the original learned from text that was not published"
        return [Cell("gpt2", {}, "configs/lm_gpt2.py:124m", {}, published)]
    return [
        Cell("ngrams", {"kind": "ngrams", "order": ORDER, "windows": WINDOWS}),
        Cell("gpt", {"kind": "gpt"}, CONFIG, FIELDS),
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    if cell.settings["kind"] == "ngrams":
        return counted(cell.settings["order"], cell.settings["windows"])
    return _trained(cell, folder)


def counted(order: int, windows: int) -> dict[str, Any]:
    """Bits per byte of each order and of compressors, on the first windows of the valid files."""
    files = stdlib.files()
    train, valid = (stdlib.Documents(files[split]) for split in ("train", "valid"))
    train_N = np.frombuffer(b"".join(train[i] for i in range(len(train))), np.uint8)
    text = predicted(valid, windows * LENGTH)
    by_order = ngrams.bits(train_N, np.frombuffer(text, np.uint8), order=order).mean(1)
    packed = {"zlib": zlib.compress(text, 9), "xz": lzma.compress(text, preset=9)}
    return {
        "bits": by_order.tolist(),
        **{name: 8 * len(data) / len(text) for name, data in packed.items()},
        "train_files": len(train),
        "train_bytes": len(train_N),
        "valid_bytes": len(text),
    }


def predicted(documents: Sequence[bytes], count: int) -> bytes:
    """The bytes among the first `count` tokens after the first one: a separator and a document,
    and so on. What the transformer is asked for in so many windows.
    """
    text, left = [], count + 1
    for i in range(len(documents)):
        document = documents[i][: max(left - 1, 0)]
        text.append(document)
        left -= 1 + len(document)
        if left <= 0:
            return b"".join(text)
    raise ValueError(f"The documents have {count + 1 - left} tokens, and not {count + 1}.")


def _trained(cell: Cell, folder: Path) -> dict[str, Any]:
    """The rows of a real run; a run that was stopped goes on."""
    given = [f"--config.{field}={value}" for field, value in cell.overrides.items()]
    run = folder / "run"
    command = [sys.executable, "-m", "lsdl.train", "--config", cell.config, "--workdir", str(run)]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} left with {done.returncode}: {done.stderr}")
    rows = read_rows(run / "metrics.jsonl")
    train, valid = ([r for r in rows if r["split"] == split] for split in ("train", "valid"))
    return {
        "steps": [row["step"] for row in train],
        "train_bits": [row["loss"] / math.log(2) for row in train],
        "valid_steps": [row["step"] for row in valid],
        "valid_bits": [row["bits_per_byte"] for row in valid],
    }


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Of one run, and of numbers without chance."""
    counts, gpt = (next(r for r in table if r["kind"] == kind) for kind in ("ngrams", "gpt"))
    bits_K, found = np.array(counts["bits"]), gpt["valid_bits"][-1]
    return judged(
        EXPECTED,
        {
            "order_2": found / bits_K[2],
            "absolute": found,
            "order_5": found / bits_K[5],
            "ladder": float((bits_K[1:] / bits_K[:-1]).max()),
            "ngram_2": bits_K[2],
            "ngram_5": bits_K[5],
            "zlib": counts["zlib"],
            "xz": counts["xz"],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The transformer's course between the lines of what it is compared with."""
    counts, gpt = (next(r for r in table if r["kind"] == kind) for kind in ("ngrams", "gpt"))
    names = {1: "order 1", 2: "order 2", 3: "order 3", 5: "order 5"}
    course = plots.lines(
        {
            "train": (gpt["steps"], gpt["train_bits"]),
            "valid": (gpt["valid_steps"], gpt["valid_bits"]),
        },
        levels={label: counts["bits"][k] for k, label in names.items()},
        title="A transformer on its way through n-grams",
        x="step of 16 x 128 bytes",
        y="bits per byte",
    )
    bars = {f"order {k}": bits for k, bits in enumerate(counts["bits"])}
    bars |= {"transformer": gpt["valid_bits"][-1], "zlib": counts["zlib"], "xz": counts["xz"]}
    last = plots.bars(bars, title="On the same bytes", x="bits per byte")
    alt = "The transformer's bits per byte fall below the n-grams' one after another."
    title = "Python's standard library, byte by byte"
    return {"bits": plots.panels([course, last], title=title, alt=alt)}
