"""What a step tells of itself when asked: its layers' norms, its gradient's noise and directions.

All are metrics of the step, so they stand in `metrics.jsonl` beside the loss.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Words of `log.measure`.
NORMS, NOISE, ANGLE = NAMES = ("norms", "noise", "angle")
OF_MICROBATCHES = (NOISE, ANGLE)
SQUARE, UNIT = "square", "unit"


def make(
    words: Sequence[str], *, accum: int, stacked: Collection[str] = ()
) -> Callable[..., dict[str, jax.Array]] | None:
    """`measure(params, gradient, updates, sums, batch_size=) -> metrics` of `words`, None of none.

    `stacked`: the paths of parameters whose first dim is their layers'.
    """
    if not words:
        return None

    def measure(params, gradient, updates, sums, *, batch_size: int):
        found = norms(params, gradient, updates, stacked=stacked) if NORMS in words else {}
        if set(OF_MICROBATCHES) & set(words):
            split = dict(words=words, accum=accum, batch_size=batch_size)
            found |= of_step(sums["measured"], gradient, **split)
        return found

    return measure


def norms(
    params: Any, gradient: Any, updates: Any, *, stacked: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Per layer: |w|, |g|, |dw| / |w| (`update_ratio`) and |w| / |g| (`trust_ratio`).

    A parameter whose path is in `stacked` has its layers as first dim, and a number for each.
    Source: You, Gitman and Ginsburg 2017, section 4.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found: dict[str, jax.Array] = {}
    for (keys, w), g, dw in zip(
        leaves, jax.tree.leaves(gradient), jax.tree.leaves(updates), strict=True
    ):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        layers = range(len(w)) if path in stacked else (None,)
        for i in layers:
            name = path if i is None else f"{path}[{i}]"
            pick = lambda x: x if i is None else x[i]  # noqa: B023, E731
            of_w, of_g, of_dw = (jnp.sqrt(square(pick(x))) for x in (w, g, dw))
            found[f"param_norm/{name}"] = of_w
            found[f"grad_norm/{name}"] = of_g
            found[f"update_ratio/{name}"] = of_dw / of_w
            found[f"trust_ratio/{name}"] = of_w / of_g
    return found


def square(tree: Any) -> jax.Array:
    """The squared Euclidean norm of all leaves together, in float32."""
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))


def of_microbatch(gradient: Any, words: Sequence[str]) -> dict[str, Any]:
    """What is added up over microbatches, from one's mean gradient."""
    found: dict[str, Any] = {}
    if words:
        found[SQUARE] = square(gradient)
    if ANGLE in words:
        length = jnp.sqrt(found[SQUARE])
        found[UNIT] = jax.tree.map(lambda g: g / length.astype(g.dtype), gradient)
    return found


def of_step(
    sums: dict[str, Any], gradient: Any, *, words: Sequence[str], accum: int, batch_size: int
) -> dict[str, jax.Array]:
    """The metrics, from the sums of `of_microbatch` and the whole batch's mean gradient.

    noise: the mean square of a microbatch's gradient and that of the batch's, `grad_square_micro`
    and `grad_square`; from the two, unbiased, the square of the true gradient, `signal`, and the
    trace of the covariance of one example's, `noise`. Their ratio is the noise scale in examples;
    one step's is a rough guess, so take the means over steps first (`analysis.noise`).
    angle: in degrees, between the gradients of two microbatches: of the mean cosine over all pairs.
    Source: McCandlish et al. 2018, appendix A.1.
    """
    found: dict[str, jax.Array] = {}
    if NOISE in words:
        small, big = sums[SQUARE] / accum, square(gradient)
        rows = batch_size // accum
        found["grad_square_micro"], found["grad_square"] = small, big
        found["signal"] = (batch_size * big - rows * small) / (batch_size - rows)
        found["noise"] = (small - big) / (1 / rows - 1 / batch_size)
    if ANGLE in words:
        cosine = (square(sums[UNIT]) - accum) / (accum * (accum - 1))
        found["micro_angle_deg"] = jnp.rad2deg(jnp.arccos(jnp.clip(cosine, -1, 1)))
    return found
