"""What a classifier of two inputs says of each point of the plane.

Shape letters: P points, B batch, F features, C classes, N examples.
"""

from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import landscape
from lsdl.errors import UserError
from lsdl.findings.found import Findings, progress
from lsdl.specimen import Specimen

MARGIN = 0.15  # of the examples' extent, around them


def boundary(specimen: Specimen, arguments: Any) -> Findings:
    """The regions of the classes in the plane of a model's two inputs."""
    _check(specimen)
    x_NF, label_N = _examples(specimen)
    number = arguments.resolution
    x, y = (_side(values_N, number) for values_N in x_NF.T)
    share_PC = _shares(specimen, landscape.grid(x, y))
    class_P, classes = share_PC.argmax(1), share_PC.shape[1]
    shown_YX = class_P.reshape(number, number)
    drawn = dict(z="class", title="The classes of the plane")
    if classes == 2:
        shown_YX = (share_PC[:, 1] - share_PC[:, 0]).reshape(number, number)
        drawn = dict(z="share of class 1, less that of class 0", diverging=True)
        drawn["title"] = "The two classes of the plane"
    points = {f"class {c}": x_NF[label_N == c].T for c in range(classes)}
    at = [[float(f"{v:.3g}") for v in side[:, 0]] for side in (x, y)]
    figure = plots.heatmap(
        shown_YX,
        x="input 1",
        y="input 2",
        columns=at[0],
        rows=at[1],
        numbers=False,
        points={name: places for name, places in points.items() if places.size},
        alt=f"The classes on {number} x {number} points, and {len(label_N)} examples",
        **drawn,
    )
    right = float(np.mean(_shares(specimen, x_NF).argmax(1) == label_N))
    area_C = np.bincount(class_P, minlength=classes) / len(class_P)
    crossed = int((np.diff(class_P.reshape(number, number), axis=1) != 0).sum())
    rows = [(f"share of the plane, class {c}", f"{area:.1%}") for c, area in enumerate(area_C)]
    rows += [("accuracy on the examples", f"{right:.4f}")]
    rows += [("boundaries crossed on a line across, mean", plots.word(crossed / number))]
    values = {"x": x[:, 0].tolist(), "y": y[:, 0].tolist(), "accuracy": right}
    values |= {"class": class_P.reshape(number, number).tolist(), "area": area_C.tolist()}
    values["share"] = share_PC.max(1).reshape(number, number).tolist()
    values["crossed"] = crossed / number
    lead = f"{number} x {number} points"
    return Findings(lead, ("quantity", "value"), rows, [figure], values)


def _check(specimen: Specimen) -> None:
    task, fields = specimen.experiment.task, specimen.run.fields
    shapes = {name: leaf.shape for name, leaf in task.features.items()}
    if fields["task"] != "classification" or shapes.get("features") != (2,):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"boundary needs a classifier of 2 inputs, and {fields['data.source']} has {told} with "
            f"task={fields['task']}: train one on data.source=spirals."
        )


def _examples(specimen: Specimen) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for batch in specimen.batches:
        kept = np.asarray(batch["weight"]) > 0
        parts.append([np.asarray(batch[name])[kept] for name in ("features", "label")])
    x_NF, label_N = (np.concatenate(part) for part in zip(*parts, strict=True))
    return x_NF, label_N


def _side(values_N: np.ndarray, number: int) -> np.ndarray:
    low, high = float(values_N.min()), float(values_N.max())
    margin = MARGIN * max(high - low, 1e-3)
    return landscape.line(low - margin, high + margin, number)


def _shares(specimen: Specimen, x_PF: np.ndarray) -> np.ndarray:
    """The classifier's share of each class at each point, `(P, C)`."""
    batch, size = specimen.batches[0], specimen.experiment.batch_size

    def shares(params, features_BF):
        outputs = specimen.outputs(params, batch | {"features": features_BF})
        return jax.nn.softmax(outputs[0] if isinstance(outputs, tuple) else outputs)

    step, parts = specimen.program(shares), []
    starts = range(0, len(x_PF), size)
    with progress("boundary", len(starts)) as bar:
        for start in starts:
            some = x_PF[start : start + size].astype(np.float32)
            padded = np.pad(some, ((0, size - len(some)), (0, 0)))
            features = jax.device_put(padded, batch["features"].sharding)
            parts.append(np.asarray(step(specimen.params, features))[: len(some)])
            bar.advance()
    return np.concatenate(parts)
