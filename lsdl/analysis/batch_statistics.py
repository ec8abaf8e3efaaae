"""BatchNorm's statistics of a whole data set, in place of a run's moving averages.

After few steps a moving average remembers its start; and parameters that were interpolated or
averaged have no averages of their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recalibrated(apply: Callable, variables: dict[str, Any], inputs: tuple) -> dict[str, Any]:
    """`variables` with the means and variances of `inputs`, which go through the net as one batch.

    `apply(variables, *inputs, train=, mutable=)` is a Linen module's whose collection `batch_stats`
    holds moving averages, `new = m old + (1 - m) found`. Started from 0 and from 1 they tell the
    momentum m as well: `found = new_0 / (1 - (new_1 - new_0))`.
    """
    averages = variables["batch_stats"]

    def moved(start: float) -> Any:
        started = variables | {"batch_stats": jax.tree.map(lambda x: 0 * x + start, averages)}
        return apply(started, *inputs, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    found = jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), moved(0.0), moved(1.0))
    return variables | {"batch_stats": jax.tree.map(jnp.asarray, found)}
