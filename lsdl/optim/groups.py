"""Which parameters are treated how: masks, factors and dims, from rules over their paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from lsdl.errors import UserError

Rules = Sequence[tuple[str, bool]]
Factors = Sequence[tuple[str, float]]
STACK = "blocks"  # the name of layers that are stacked for a scan, of which each leaf is one array


def mask(rules: Rules) -> Callable:
    """A function from a parameter tree to the tree of what `first_match` says of each leaf."""
    return by_path(lambda name, _: first_match(name, rules))


def by_path(of: Callable[[str, Any], Any]) -> Callable:
    """A function from a parameter tree to the tree of `of(path, leaf)`."""

    def tree(params):
        return jax.tree_util.tree_map_with_path(lambda keys, leaf: of(path(keys), leaf), params)

    return tree


def first_match(name: str, rules: Rules) -> bool:
    """The value of the first rule whose pattern matches the whole of `name`."""
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise UserError(f"No rule matches the parameter {name!r}: end the list with ('.*', value).")


def path(keys: tuple) -> str:
    """`block_0/mlp/up/kernel`: a leaf's place in the parameter tree, boxed or not."""
    return "/".join(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))


def factor(name: str, rules: Factors) -> float:
    """What the rate of the parameter `name` is multiplied by; 1 without a rule for it."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, name)), 1.0)


def check_factors(rules: Factors, params: Any) -> None:
    """Each rule must match a parameter: one that is mistyped would change nothing, in silence."""
    names = [path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for i, (pattern, _) in enumerate(rules):
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"optim.rate_rules[{i}] matches no parameter: {pattern!r} must match a whole path "
                f"such as {names[0]!r}."
            )


def scaled(rules: Factors) -> list[optax.GradientTransformation]:
    """The link that multiplies each update by its parameter's factor; none without rules."""
    if not rules:
        return []
    multiply = by_path(lambda name, update: factor(name, rules) * update)

    def init(params):
        check_factors(rules, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        return multiply(updates), state

    return [optax.GradientTransformation(init, update)]


def frozen(rules: Factors) -> list[optax.GradientTransformation]:
    """The link that zeroes what belongs to parameters of factor 0; none where no rule has it."""
    if all(value for _, value in rules):
        return []
    return [optax.masked(optax.set_to_zero(), by_path(lambda name, _: factor(name, rules) == 0))]


def stacked_dims(name: str, ndim: int) -> int:
    """How many leading dims of a leaf count layers or experts, and are no part of its matrix."""
    *parents, last = name.split("/")
    if last in ("bias", "scale"):
        return max(ndim - 1, 0)
    if last == "kernel" and (STACK in parents or ndim == 3):
        return ndim - 2
    return 0


def matrix_dims(name: str, shape: Sequence[int]) -> tuple[tuple[int, ...], int] | None:
    """The (input dims, output dim) of the matrices that a parameter holds; None: it holds none.

    (..., D, F) is a stack of D x F; a convolution's (H, W, I, O) is one of HWI x O.
    """
    first = stacked_dims(name, len(shape))
    if len(shape) - first not in (2, 4):
        return None
    return tuple(range(first, len(shape) - 1)), len(shape) - 1


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `chain.parameter_table`, one line each: `rate` is the factor of the schedule's."""
    width = max(len("parameter"), *(len(row["path"]) for row in rows))
    names = f"{'optimiser':>20}{'rate':>8}{'decay':>7}{'trust':>7}"
    lines = [f"{'parameter':{width}}  {'shape':>20}{names}"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        yes = ["yes" if row[name] else "-" for name in ("decay", "trust")]
        line = f"{row['path']:{width}}  {shape:>20}{row['optimiser']:>20}{row['rate']:>8g}"
        lines.append(f"{line}{yes[0]:>7}{yes[1]:>7}")
    return "\n".join(lines)
