"""A whole run of an optimiser as one scan, and the classification data that studies run it on.

Shape letters: N examples, F features, C classes, T steps, B batch, D parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl.data import readers, sources
from lsdl.optim.schedules import Shape, make_schedule

Pair = tuple[np.ndarray, np.ndarray]


def descend(
    tx: optax.GradientTransformation,
    gradient: Callable[[Any, Any], Any],
    params: Any,
    xs: Any,
    *,
    state: Any = None,
    record: Callable[[Any], Any] = lambda params: params,
) -> tuple[tuple[Any, Any], Any]:
    """One step of `tx` for each of `xs`: (last parameters, their state), `record` of every step's.

    `gradient(params, x)` is the gradient at `params` on one of `xs`, such as a key or ids.
    """

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(gradient(params, x), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), record(params)

    state = tx.init(params) if state is None else state
    return lax.scan(step, (params, state), xs)


def shape(**fields: Any) -> Shape:
    """A schedule's shape with the `fields` that it reads."""
    names = [field.name for field in dataclasses.fields(Shape)]
    return Shape(**{name: fields.pop(name, 0.0) for name in names}, **fields)


def schedule(name: str, peak: float, *, steps: int, **fields: Any) -> optax.Schedule:
    """The schedule `name` without a warm-up; `fields` are those of its shape."""
    return make_schedule(
        name,
        peak=peak,
        base=peak,
        total_steps=steps,
        warmup_steps=0,
        warmup_form="linear",
        start_factor=0.0,
        shape=shape(**fields),
    )


def nothing(params: Any) -> None:
    """No record."""


def examples(source: str, split: str) -> Pair:
    """`x_NF` in float64, as stored and flattened, and `label_N` of one of lsdl's data sets."""
    leaf = "image" if source == "digits" else "features"
    reader = sources.open_reader(source, split)
    arrays = readers.in_memory(reader, (leaf, "label")).arrays
    return arrays[leaf].reshape(len(reader), -1).astype(np.float64), arrays["label"]


def digits(split: str) -> Pair:
    """`x_NF`, each pixel standardised with the train split's statistics, and `label_N`."""
    train_NF, _ = examples("digits", "train")
    x_NF, label_N = examples("digits", split)
    # Three pixels are constant: 1e-3 of the range keeps them at zero.
    scale_F = (train_NF.std(0) + 16e-3)[None]
    return (x_NF - train_NF.mean(0)[None]) / scale_F, label_N


def one_hot(label_N: np.ndarray) -> np.ndarray:
    """`y_NC` in float64."""
    return np.eye(int(label_N.max()) + 1)[label_N]


def with_bias(x_NF: np.ndarray) -> np.ndarray:
    """`x_NF` with a last column of ones."""
    return np.concatenate([x_NF, np.ones((len(x_NF), 1))], 1)


def subsets(seed: int, examples: int, *, size: int, steps: int) -> np.ndarray:
    """`id_TB`: at each step a fresh subset of `size` different examples, all equally likely."""
    rng = np.random.default_rng(seed)
    id_TB = rng.integers(examples, size=(steps, size))
    while True:
        sorted_TB = np.sort(id_TB, 1)
        twice_T = (sorted_TB[:, 1:] == sorted_TB[:, :-1]).any(1)
        if not twice_T.any():
            return id_TB
        id_TB[twice_T] = rng.integers(examples, size=(int(twice_T.sum()), size))


def first_below(values: Any, bound: float) -> int:
    """The place of the first value that is at most `bound`; their number if there is none."""
    below = np.flatnonzero(np.asarray(values) <= bound)
    return int(below[0]) if len(below) else len(values)


def largest_eigenvalue(loss: Callable, params: Any, key: jax.Array, *, steps: int = 100) -> Any:
    """Of the Hessian of `loss` at `params`: Rayleigh's quotient after `steps` power iterations."""
    flat_D, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = jax.grad(lambda flat_D: loss(unravel(flat_D)))

    def product(v_D):
        return jax.jvp(gradient, (flat_D,), (v_D,))[1]

    def step(v_D, _):
        next_D = product(v_D)
        return next_D / jnp.linalg.norm(next_D), v_D @ next_D

    v_D = jax.random.normal(key, flat_D.shape, flat_D.dtype)
    _, quotients = lax.scan(step, v_D / jnp.linalg.norm(v_D), length=steps)
    return quotients[-1]
