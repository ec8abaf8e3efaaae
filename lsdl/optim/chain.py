"""Optimisers: an optax chain from names and numbers, and masks from ordered rules."""

import re
from collections.abc import Callable, Sequence

import jax
import optax

from lsdl.errors import UserError, nearest

NAMES = ("sgd", "adam", "adamw", "lars", "lamb")
Rules = Sequence[tuple[str, bool]]


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    clip_norm: float,
    weight_decay: float,
    decay_mask: Rules,
    trust_mask: Rules,
    momentum: float,
    nesterov: bool,
    b1: float,
    b2: float,
    eps: float,
    trust_coefficient: float,
) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm (0: not at all), then the optimiser `name`.

    Weight decay is decoupled in adamw (Loshchilov and Hutter 2019) and lamb, part of the gradient
    in sgd and lars, and not offered by adam. `decay_mask` and `trust_mask` are `first_match` rules.
    Sources: Kingma and Ba 2015 (adam), You et al. 2017 (lars), You et al. 2020 (lamb).
    """
    if name not in NAMES:
        raise UserError(f"optim.name={name!r} is unknown; {nearest(name, NAMES)}")
    if name == "adam" and weight_decay:
        raise UserError(f"adam takes no weight_decay (got {weight_decay}): use adamw.")
    decay, trust = mask(decay_mask), mask(trust_mask)
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "sgd":
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, decay))
        parts.append(optax.sgd(schedule, momentum or None, nesterov))
    elif name == "adam":
        parts.append(optax.adam(schedule, b1, b2, eps))
    elif name == "adamw":
        parts.append(optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decay))
    elif name == "lamb":
        # optax.lamb, which has no mask for the trust ratio
        parts += [
            optax.scale_by_adam(b1, b2, eps),
            optax.add_decayed_weights(weight_decay, decay),
            optax.masked(optax.scale_by_trust_ratio(), trust),
            optax.scale_by_learning_rate(schedule),
        ]
    else:
        lars = optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decay,
            trust_coefficient=trust_coefficient,
            trust_ratio_mask=trust,
            momentum=momentum,
            nesterov=nesterov,
        )
        parts.append(lars)
    return optax.with_extra_args_support(optax.chain(*parts))


def mask(rules: Rules) -> Callable:
    """A function from a parameter tree to the tree of what `first_match` says of each leaf."""

    def of(params):
        return jax.tree_util.tree_map_with_path(lambda p, _: first_match(path(p), rules), params)

    return of


def first_match(name: str, rules: Rules) -> bool:
    """The value of the first rule whose pattern matches the whole of `name`."""
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise UserError(f"No rule matches the parameter {name!r}: end the list with ('.*', value).")


def path(keys: tuple) -> str:
    """`block_0/mlp/up/kernel`: a leaf's place in the parameter tree, boxed or not."""
    return "/".join(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))
