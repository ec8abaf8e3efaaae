"""The examples that a run is worst at: mislabelled, unlike the others, or not learnt yet.

Shape letters: B batch, N examples, C classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lsdl import page, plots
from lsdl.data.text import tokenizer
from lsdl.findings.found import Findings, progress
from lsdl.page import Markup, element
from lsdl.specimen import Specimen

MOST = 24  # examples, unless --top says how many
LONGEST = 240  # letters of a text
_tokenizer = functools.cache(tokenizer)  # a file, read once


def outliers(specimen: Specimen, arguments: Any) -> Findings:
    """Examples ranked by their loss, the worst first."""
    specimen.apart("outliers")
    found = _each(specimen)
    loss_N = found["loss"] / np.maximum(found["weight"], 1e-30)
    order = np.argsort(-np.nan_to_num(loss_N, nan=np.inf), kind="stable")
    worst = [
        _entry(specimen, int(n), {name: values[n] for name, values in found.items()}, loss_N[n])
        for n in order[: arguments.top or MOST]
    ]
    head = ["rank", "example", "loss", *(n for n in ("label", "found", "share") if n in worst[0])]
    rows = [(rank, *(_cell(entry[n]) for n in head[1:])) for rank, entry in enumerate(worst, 1)]
    sorted_N, count = loss_N[order], len(order)
    tenth = float(sorted_N[: max(1, count // 10)].sum() / max(float(sorted_N.sum()), 1e-30))
    figure = plots.lines(
        {"": (np.arange(1, count + 1), sorted_N)},
        title="Loss of each example, the worst first",
        x="rank",
        y="loss",
        logx=True,
        alt=f"Sorted losses of {count} examples, from {sorted_N[0]:.3g} to {sorted_N[-1]:.3g}",
    )
    values = {"loss": float(found["loss"].sum() / found["weight"].sum()), "worst": worst}
    values |= {"median": float(np.median(loss_N)), "share_of_worst_tenth": tenth}
    lead = f"The worst {len(worst)}: a tenth of the examples has {tenth:.0%} of the loss"
    gallery = page.section("The examples", page.gallery(_pictures(specimen, worst)))
    return Findings(lead, head, rows, [figure], values, more=[gallery])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _each(specimen: Specimen) -> dict[str, np.ndarray]:
    """Evaluation's sums of each example, and of a classifier what it takes it for."""
    step, parts = specimen.program(_of_batch(specimen)), []
    with progress("outliers", len(specimen.batches)) as bar:
        for batch in specimen.batches:
            found = jax.device_get(step(specimen.params, batch))
            kept = np.asarray(batch["weight"]) > 0
            parts.append({name: np.asarray(values)[kept] for name, values in found.items()})
            bar.advance()
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _of_batch(specimen: Specimen) -> Callable:
    def of_batch(params, batch):
        found = specimen.each(params, batch)
        if specimen.run.fields["task"] == "classification":
            outputs = specimen.outputs(params, batch)
            logits_BC = outputs[0] if isinstance(outputs, tuple) else outputs
            share_BC = jax.nn.softmax(logits_BC)
            found |= {"found": share_BC.argmax(1), "share": share_BC.max(1)}
        names = ("loss", "weight", "found", "share")
        return {name: found[name] for name in names if name in found}

    return of_batch


def _entry(specimen: Specimen, n: int, found: dict[str, Any], loss: float) -> dict[str, Any]:
    """What is told of an example: `share` is what the classifier is sure of, of 1."""
    batch, row = _place(specimen, n)
    entry = {"example": n, "loss": float(loss)}
    if "label" in batch and np.ndim(batch["label"]) == 1:
        entry["label"] = int(np.asarray(batch["label"][row]))
    if "found" in found:
        entry |= {"found": int(found["found"]), "share": float(found["share"])}
    if "token" in batch:
        entry["text"] = _text(specimen, np.asarray(batch["token"][row]))
    return entry


def _place(specimen: Specimen, n: int) -> tuple[Any, int]:
    which, row = divmod(n, specimen.experiment.batch_size)
    return specimen.batches[which], row


def _text(specimen: Specimen, token_L: np.ndarray) -> str:
    """The words, or where there are none the numbers of the tokens."""
    if not specimen.tokenizer:
        return " ".join(map(str, token_L[:LONGEST]))
    text = _tokenizer(specimen.tokenizer).decode(token_L.tolist())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _pictures(specimen: Specimen, worst: list[dict]) -> list[tuple[Markup, str]]:
    return [(_picture(specimen, entry), _told(entry)) for entry in worst]


def _picture(specimen: Specimen, entry: dict) -> Markup:
    batch, row = _place(specimen, entry["example"])
    if "image" in batch:
        pixels_HWC = np.asarray(batch["image"][row])
        if pixels_HWC.shape[-1] not in (1, 3):
            pixels_HWC = pixels_HWC[..., :1]
        return page.picture(pixels_HWC, f"example {entry['example']}")
    if "text" in entry:
        return element("pre", entry["text"], style="white-space:pre-wrap")
    values = np.asarray(batch["features"][row])
    shown = ", ".join(f"{value:.4g}" for value in values[:12])
    return element("code", shown + (", …" if len(values) > 12 else ""))


def _told(entry: dict) -> str:
    told = f"#{entry['example']}: loss {entry['loss']:.3g}"
    if "label" in entry:
        told += f", label {entry['label']}"
    if "found" in entry:
        told += f", found {entry['found']} ({entry['share']:.0%})"
    return told
