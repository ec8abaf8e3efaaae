"""What runs measured of themselves by `log.measure`: layers and gradient noise.

Shape letters: L layers, R rows of `metrics.jsonl`, W windows of steps.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lsdl import page, plots
from lsdl.analysis import noise
from lsdl.page import Markup, element
from lsdl.runs import Group, Run, curve

# Metrics of the whole step, beside those of each layer, whose names have a slash.
OF_STEP = ("signal", "noise", "grad_square", "grad_square_micro", "micro_angle_deg")
KINDS = {
    "param_norm": ("Parameters", "|w|"),
    "grad_norm": ("Gradient", "|g|"),
    "update_ratio": ("Update ratio", "|dw| / |w|"),
    "trust_ratio": ("Trust ratio", "|w| / |g|"),
}
MOST_LINES = 8  # of a figure of layers; more are rows of colours
MOST_COLUMNS = 100
MOST_GROUPS = 6  # whose layers are drawn
LONGEST = 34  # letters of a layer's name
MOST_WINDOWS, LEAST_ROWS = 12, 8  # of the noise; rows of one window
HOW = (
    "--config.log.measure=\"('norms','noise','angle')\" with --config.accum=4 measures the layers' "
    "norms, and the noise and the angles of the microbatches' gradients."
)


@dataclass(frozen=True)
class Window:
    """The noise scale, in examples, over some steps with batches of one size."""

    first_step: int
    last_step: int
    batch_size: int
    loss: float
    scale: float  # at least so large, if it is a bound
    error: float  # one standard error
    bound: bool  # the gradient is not told from zero


def layer_figures(groups: Sequence[Group]) -> Iterator[plots.Figure]:
    """For each kind of number, all layers over the steps: lines of few, colours of many."""
    shown = [group for group in groups if _layers(group)]
    for group in shown[:MOST_GROUPS]:
        for kind, names in _layers(group).items():
            steps, values_LW = _windows(group, [f"{kind}/{name}" for name in names])
            title, sign = KINDS.get(kind, (kind, kind))
            title = f"{title} by layer{f', {group.label}' if len(groups) > 1 else ''}"
            alt = f"{title}: {sign} of {len(names)} layers by step"
            labels = _short(names)
            if len(names) <= MOST_LINES:
                series = {label: (steps, y) for label, y in zip(labels, values_LW, strict=True)}
                positive = values_LW[np.isfinite(values_LW) & (values_LW > 0)]
                log = bool(len(positive)) and positive.max() > 5 * positive.min()
                yield plots.lines(series, title=title, x="step", y=sign, logy=log, alt=alt)
            else:  # the first layer on top
                given = dict(rows=labels[::-1], columns=steps, logz=True, numbers=False)
                given |= dict(title=title, x="step", y="", z=sign, alt=alt)
                yield plots.heatmap(values_LW[::-1], **given)


def extremes(groups: Sequence[Group]) -> Markup:
    """A table of the lowest and the highest layer of each kind, in the newest steps."""
    rows = []
    for group in groups:
        for kind, names in _layers(group).items():
            steps, values_LW = _windows(group, [f"{kind}/{name}" for name in names])
            last = {n: y for n, y in zip(names, values_LW[:, -1], strict=True) if 0 < y < math.inf}
            if last:
                low, high = min(last, key=last.get), max(last, key=last.get)
                middle = plots.word(float(np.median(list(last.values()))))
                ends = (plots.word(last[low]), low, middle, plots.word(last[high]), high)
                told = " ".join(KINDS.get(kind, (kind,))).replace(" ", "\u00a0")
                rows.append((group.label, told, f"{steps[-1]:,}", *ends))
    if not rows:
        return Markup("")
    head = ("group", "of each layer", "step", "lowest", "layer", "median", "highest", "layer")
    first = 0 if len(groups) > 1 else 1  # the only group needs no name
    table = page.table(head[first:], [row[first:] for row in rows])
    more = len([group for group in groups if _layers(group)]) - MOST_GROUPS
    if more <= 0:
        return table
    told = f"The figures are those of the first {MOST_GROUPS} groups: report the other {more} apart"
    return Markup(element("p", f"{told}.", class_="quiet") + table)


def noise_figures(groups: Sequence[Group]) -> Iterator[plots.Figure]:
    """The angle between microbatches, and the noise scale by step and by loss."""
    angles = {group.label: curve(group, "train", "micro_angle_deg") for group in groups}
    angles = {label: table for label, table in angles.items() if table}
    if angles:
        alone = next(iter(angles.values())) if len(groups) == 1 else None
        yield plots.lines(
            {"": alone} if alone else angles,
            title="Angle between microbatches",
            x="step",
            y="degrees",
            levels={"right angle": 90},
            alt="The angle between two microbatches' gradients by step; 90 degrees is noise alone",
        )
    found = {group.label: windows for group in groups if (windows := noise_windows(group))}
    if not found:
        return
    sizes = {w.batch_size for windows in found.values() for w in windows}
    levels = {f"batch of {size:,}": size for size in sorted(sizes)}
    alone, alt = len(groups) == 1, "The gradient noise scale and the batch size, in examples, by"
    given = dict(y="examples", logy=True, levels=levels)
    series, bounds = _points(found, lambda w: w.last_step, alone=alone)
    told = dict(title="Noise scale", x="step", alt=f"{alt} step")
    yield plots.lines(series, published=bounds, **told, **given)
    series, bounds = _points(found, lambda w: w.loss, alone=alone)
    losses = [w.loss for windows in found.values() for w in windows]
    told = dict(title="Noise scale by loss", x="training loss (falling to the left)")
    told |= dict(alt=f"{alt} training loss", logx=0 < 5 * min(losses) < max(losses))
    yield plots.scatter(series, published=bounds, **told, **given)


def noise_text(groups: Sequence[Group]) -> Markup:
    """What the noise scale is, and its numbers; or why it is not measured."""
    found = {group.label: noise_windows(group) for group in groups}
    if not any(found.values()):
        return element("p", _not_measured(groups))
    rows = []
    for label, windows in found.items():
        for w in windows:
            scale = f"> {plots.word(w.scale)}" if w.bound else _with_error(w.scale, w.error)
            span = f"{w.first_step:,} to {w.last_step:,}"
            rows.append((label, span, f"{w.loss:.4g}", f"{w.batch_size:,}", scale))
    head = ("group", "steps", "training loss", "batch size", "noise scale")
    first = 0 if len(groups) > 1 else 1
    told = (
        "The noise scale is the batch size, in examples, at which a batch's noise is as large as "
        "the gradient: trace of the covariance over squared gradient, each a mean over the rows of "
        "a window, from the microbatches and the batch (McCandlish et al. 2018, appendix A.1). ± "
        "and bars: one standard error. >, hollow: in that window the gradient is not told from "
        "zero by two standard errors, and the number is a lower bound."
    )
    table = page.table(head[first:], [row[first:] for row in rows])
    numbers = table if len(rows) <= 2 * MOST_WINDOWS else page.details("The numbers", table)
    return Markup(element("p", told, class_="quiet") + numbers)


def noise_windows(group: Group) -> list[Window]:
    """The noise scale over the course of the runs, all seeds together; [] if it is not measured."""
    rows = sorted((row for run in group.runs for row in _noisy(run)), key=lambda row: row[0])
    windows = []
    for batch_size, alike in itertools.groupby(rows, key=lambda row: row[1]):
        part = list(alike)
        steps = [row[0] for row in part]
        numbers_R = np.array([row[2:] for row in part], float)
        most = round(MOST_WINDOWS * len(part) / len(rows))
        count = max(1, min(most, len(part) // LEAST_ROWS))
        for places in np.array_split(np.arange(len(part)), count):
            if len(places) >= LEAST_ROWS:
                span = (steps[places[0]], steps[places[-1]])
                windows.append(_window(*span, batch_size, *numbers_R[places].T))
    return [window for window in windows if window]


def _window(first, last, batch_size, micro_R, loss_R, small_R, big_R) -> Window | None:
    micro_size = int(micro_R[0])
    trace_R, square_R = noise.two_batch(small_R, big_R, micro_size, batch_size)
    signal, spread = square_R.mean(), square_R.std(ddof=1) / math.sqrt(len(square_R))
    loss = float(loss_R[np.isfinite(loss_R)].mean()) if np.isfinite(loss_R).any() else math.nan
    told = (first, last, batch_size, loss)
    if signal > 2 * spread:
        return Window(*told, *noise.noise_scale(small_R, big_R, micro_size, batch_size), False)
    highest = max(signal, 0) + 2 * spread
    return Window(*told, float(trace_R.mean() / highest), math.nan, True) if highest else None


def _noisy(run: Run) -> Iterator[tuple[int, int, int, float, float, float]]:
    """(step, batch size, microbatch size, loss, their squared gradients) of each row that tells."""
    size, accum = run.fields.get("batch_size"), run.fields.get("accum")
    if not (isinstance(size, int) and isinstance(accum, int) and 1 < accum <= size):
        return
    micro, rows = size // accum, run.rows.get("train", ())
    sizes = _ramped(rows) if run.fields.get("batch_ramp") else [size] * len(rows)
    for row, batch_size in zip(rows, sizes, strict=True):
        squares = [_number(row.get(name)) for name in ("grad_square_micro", "grad_square")]
        if batch_size and np.isfinite(squares).all():
            yield row["step"], batch_size, micro, _number(row.get("loss")), *squares


def _ramped(rows: Sequence[Mapping]) -> list[int | None]:
    """The batch size of each row; None where it changed since the row before, as means tell."""
    places = [(0, 0), *((row["step"], row.get("examples_seen", 0)) for row in rows)]
    steps = list(itertools.pairwise(places))
    sizes = [(b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else math.nan for a, b in steps]
    beside = [math.nan, *sizes, math.nan]
    alike = [size in (beside[i], beside[i + 2]) for i, size in enumerate(sizes)]
    return [int(size) if good else None for size, good in zip(sizes, alike, strict=True)]


def _not_measured(groups: Sequence[Group]) -> str:
    rows = [row for g in groups for run in g.runs for row in run.rows.get("train", ())]
    if not any("grad_square_micro" in row for row in rows):
        return f"Not measured: {HOW}"
    runs = [run for group in groups for run in group.runs]
    if not any(True for run in runs for _ in _noisy(run)):
        return "The noise scale is not measured: config.json tells no batch_size and accum."
    return f"The noise scale is not measured yet: it takes {LEAST_ROWS} logged steps or more."


def _points(found: Mapping[str, Sequence[Window]], x: Callable, *, alone: bool):
    """Series with bars of one standard error, of the logarithm as the axis is; and the bounds."""
    series, bounds = {}, {}
    for label, windows in found.items():
        sure = [w for w in windows if not w.bound and w.scale > 0]
        lost = [w for w in windows if w.bound]
        if sure:
            y, e = np.array([(w.scale, w.error / w.scale) for w in sure]).T
            places = [x(w) for w in sure]
            series["" if alone else label] = (places, y, y * np.exp(-e), y * np.exp(e))
        if lost:
            points = ([x(w) for w in lost], [w.scale for w in lost])
            bounds["at least" if alone else f"{label}, at least"] = points
    return series, bounds


def _layers(group: Group) -> dict[str, list[str]]:
    """The layers that have a number, by kind; block_10 comes after block_9."""
    rows = [row for run in group.runs for row in run.rows.get("train", ())]
    kinds = defaultdict(list)
    for name in {name for row in rows for name in row if "/" in name}:
        kind, _, layer = name.partition("/")
        kinds[kind].append(layer)
    order = lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]  # noqa: E731
    known = [*KINDS, *sorted(kinds.keys() - KINDS)]
    return {kind: sorted(kinds[kind], key=order) for kind in known if kind in kinds}


def _windows(group: Group, names: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """The last step of each of at most `MOST_COLUMNS` windows, and the finite values' means."""
    rows = [row for run in group.runs for row in run.rows.get("train", ())]
    steps = np.unique([row["step"] for row in rows])
    ends = [int(part[-1]) for part in np.array_split(steps, min(len(steps), MOST_COLUMNS))]
    place_R = np.searchsorted(ends, [row["step"] for row in rows])
    values_LR = np.array([[_number(row.get(name)) for row in rows] for name in names])
    means_LW = np.full((len(names), len(ends)), math.nan)
    for w in range(len(ends)):
        part = values_LR[:, place_R == w]
        good = np.isfinite(part)
        some = good.any(1)
        means_LW[some, w] = np.where(good, part, 0)[some].sum(1) / good[some].sum(1)
    return ends, means_LW


def _short(names: Sequence[str]) -> list[str]:
    """Names without their first parts if they are too long; whole if two became the same."""
    cut = []
    for name in names:
        parts = name.split("/")
        while len("/".join(parts)) > LONGEST and len(parts) > 1:
            parts = parts[1:]
        rest = "/".join(parts)
        cut.append(rest if rest == name else f"…/{rest}")
    return cut if len(set(cut)) == len(cut) else list(names)


def _with_error(value: float, error: float) -> str:
    """As 123 ± 45."""
    digits = min(3, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 1
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
