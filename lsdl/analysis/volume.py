"""How wide a minimum is: radii in random directions, and the logarithm of its volume.

The basin is what lies around the parameters with a loss below a cut. Its radius along a direction d
is the smallest r > 0 at which the loss at w + r d reaches the cut, in units of d's length. Along
directions of length 1 (`curvature.unit`) the volume is the ball's times the mean of r^D; along
filter-normalised ones (`landscape.filter_normalised`) nets whose filters have different scales
compare, and differences of D log r stand for ratios of volumes.

`radii` knows nothing of the net: it asks for the losses at one radius for each direction.
`stacked_losses` answers with one program, `drawn_losses` with one direction at a time, over any
batches and on any mesh. So, for a run:

    draw = lambda i: filter_normalised(random_like(params, fold_in(key, i)), params, dims)
    found = radii(drawn_losses(at, params, draw), 200, cut=0.1)
    volume(found.radius_K, size(params))

Shape letters: K directions, D parameters.
Source: Huang et al. 2020, Understanding generalization through visualizations, section 4
(arXiv:1906.03291).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsdl.errors import UserError

map_ = jax.tree.map
Losses = Callable[[np.ndarray], np.ndarray]  # radius_K -> loss_K


class Radii(NamedTuple):
    """The radius along each direction; where the search ended at a limit, that limit."""

    radius_K: np.ndarray
    floored_K: np.ndarray  # at the cut already at the smallest radius: the true one is smaller
    open_K: np.ndarray  # below the cut up to the largest radius: the true one is larger


def radii(
    losses: Losses,
    count: int,
    *,
    cut: float,
    low: float = 1e-3,
    high: float = 1e2,
    factor: float = 1.5,
    tolerance: float = 1e-3,
) -> Radii:
    """The radius along each of `count` directions, to a relative `tolerance`.

    From `low` on, the radius grows by `factor` until the loss has reached `cut` (or is not finite),
    at most to `high`; then log r is bisected. A wall that is thinner than a step may be missed.
    `losses` is called with all directions each time, those that are done included.
    """
    if not 0 < low < high or factor <= 1 or tolerance <= 0:
        raise ValueError(
            f"low={low}, high={high}, factor={factor} and tolerance={tolerance} make no search: "
            "0 < low < high, factor > 1 and tolerance > 0 are needed."
        )
    outside = lambda radius_K: ~(np.asarray(losses(radius_K)) < cut)  # noqa: E731
    if outside(np.zeros(count)).any():
        raise UserError(f"The loss at the parameters is not below {cut=}: there is no basin.")
    inner_K, outer_K = np.zeros(count), np.full(count, np.inf)
    radius = low
    while True:
        out_K = outside(np.where(np.isinf(outer_K), radius, inner_K))
        growing_K = np.isinf(outer_K)
        outer_K = np.where(growing_K & out_K, radius, outer_K)
        inner_K = np.where(growing_K & ~out_K, radius, inner_K)
        if np.isfinite(outer_K).all() or radius >= high:
            break
        radius = min(radius * factor, high)
    floored_K, open_K = inner_K == 0, np.isinf(outer_K)
    found_K = ~(floored_K | open_K)
    below_K, above_K = np.where(found_K, inner_K, 1.0), np.where(found_K, outer_K, 1.0)
    while (above_K > (1 + tolerance) * below_K).any():
        middle_K = np.sqrt(below_K * above_K)
        out_K = outside(np.where(found_K, middle_K, 0.0))
        above_K = np.where(found_K & out_K, middle_K, above_K)
        below_K = np.where(found_K & ~out_K, middle_K, below_K)
    radius_K = np.where(floored_K, low, np.where(open_K, high, np.sqrt(below_K * above_K)))
    return Radii(radius_K, floored_K, open_K)


def stacked_losses(
    loss: Callable[[Any], jax.Array], params: Any, directions: Any, *, at_a_time: int = 16
) -> Losses:
    """Of `loss(params)`, one number: all directions in one program, `at_a_time` together.

    `directions` is a tree like the parameters, the directions' number the first dim of each leaf.
    The program is compiled once for one `loss`, at any parameters.
    """

    def losses(radius_K):
        radius_K = jnp.asarray(radius_K, jnp.float32)
        return np.asarray(_along(loss, at_a_time, params, directions, radius_K))

    return losses


@functools.partial(jax.jit, static_argnums=(0, 1))
def _along(loss: Callable, at_a_time: int, params: Any, directions: Any, radius_K: jax.Array):
    def one(pair):
        direction, radius = pair
        return loss(map_(lambda w, d: w + radius * d, params, direction))

    return jax.lax.map(one, (directions, radius_K), batch_size=at_a_time)


def drawn_losses(
    at: Callable[[Any], float], params: Any, draw: Callable[[int], Any], *, program=jax.jit
) -> Losses:
    """Of `at(params)`, a mean over any batches: one direction `draw(i)` at a time, none kept."""
    moved = program(lambda params, d, radius: map_(lambda w, d: w + radius * d, params, d))

    def losses(radius_K):
        found = [at(moved(params, draw(i), np.float32(r))) for i, r in enumerate(radius_K)]
        return np.array([float(value) for value in found])

    return losses


class Volume(NamedTuple):
    """Decimal logarithms of a basin's volume, for radii along directions of length 1."""

    typical: float  # the ball with the mean log radius: a lower bound of the mean's, by Jensen
    error: float  # standard error of `typical`
    mean: float  # of r^D, the unbiased one: in many dims the longest radius alone decides it


def volume(radius_K: np.ndarray, dims: int) -> Volume:
    """The volume of a star-shaped basin in `dims` dims: the unit ball's times the mean of r^D."""
    log_K = dims * np.log10(np.asarray(radius_K, np.float64))
    ball = (dims / 2 * math.log(math.pi) - math.lgamma(dims / 2 + 1)) / math.log(10)
    count = len(log_K)
    error = float(log_K.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    highest = log_K.max()
    mean = highest + math.log10(np.mean(10.0 ** (log_K - highest)))
    return Volume(ball + float(log_K.mean()), error, float(ball + mean))


def orders_between(wide_K: np.ndarray, narrow_K: np.ndarray, dims: int) -> tuple[float, float]:
    """(By how many decimal orders the typical volume is larger, the standard error of that).

    D times the difference of the mean log10 radii. A radius at the search's lower limit makes the
    difference too small, one at its upper limit of the wide basin likewise.
    """
    wide, narrow = volume(wide_K, dims), volume(narrow_K, dims)
    return wide.typical - narrow.typical, math.hypot(wide.error, narrow.error)
