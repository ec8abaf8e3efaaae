"""Optimisers: an optax chain from names and numbers."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import optax
from optax import contrib

from lsdl.errors import UserError, nearest
from lsdl.optim import groups, links, solvers, wrappers
from lsdl.optim.groups import Factors, Rules, mask

LINEAR = (
    *("sgd", "adam", "adamw", "lars", "lamb", "adagrad", "adafactor", "lion", "muon"),
    "sign_sgd",
)  # from the gradient alone, and half the update is half the step
FIRST_ORDER = (*LINEAR, "schedule_free")
SOLVERS = ("newton", "newton_cg", "ggn_cg", "coordinate_descent")  # on one device alone
NAMES = (*FIRST_ORDER, "lbfgs", *SOLVERS)
DECAYED = ("sgd", "adamw", "lars", "lamb", "adafactor", "lion", "muon", "schedule_free")
CHOICES = {
    "momentum_form": ("accumulator", "velocity", "corrected"),
    "second_moment": ("elementwise", "norm"),
    "lars_form": ("paper", "lecture"),
    "schedule_free_base": ("sgd", "adamw"),
    "clip_form": ("global_norm", "block_rms", "adaptive"),
}
# What a field means nothing for is refused where the field is set: {field: optimisers it is for}.
MEANT_FOR = {
    "momentum_form": ("sgd",),
    "eps_root": ("adam", "adamw", "lamb"),
    "second_moment": ("adam", "adamw"),
    "lars_form": ("lars",),
    "initial_accumulator": ("adagrad",),
    "factored_dim": ("adafactor",),
    "parameter_scale": ("adafactor",),
    "muon_mask": ("muon",),
    "muon_rms": ("muon",),
    "schedule_free_base": ("schedule_free",),
    "lbfgs_memory": ("lbfgs",),
    "linesearch_steps": ("lbfgs",),
    "damping": SOLVERS,
    "newton_limit": ("newton",),
    "cg_steps": ("newton_cg", "ggn_cg"),
    "weight_decay": DECAYED,
    "clip_norm": FIRST_ORDER,
    "rate_rules": FIRST_ORDER,
    "sam_rho": FIRST_ORDER,
    "ema_decay": (*LINEAR, "lbfgs", *SOLVERS),
}


@dataclass(frozen=True)
class Fields:
    """The numbers of an optimiser, by the names that the config has for them (`schema.py`)."""

    name: str
    momentum: float
    momentum_form: str
    nesterov: bool
    b1: float
    b2: float
    eps: float
    eps_root: float
    second_moment: str
    trust_coefficient: float
    lars_form: str
    initial_accumulator: float
    factored_dim: int
    parameter_scale: bool
    muon_mask: Rules
    muon_rms: float
    schedule_free_base: str
    lbfgs_memory: int
    linesearch_steps: int
    damping: float
    newton_limit: int
    cg_steps: int
    weight_decay: float
    clip_norm: float
    clip_form: str
    decay_mask: Rules
    trust_mask: Rules
    rate_rules: Factors
    sam_rho: float
    ema_decay: float


def make_optimizer(
    f: Fields,
    schedule: optax.Schedule,
    *,
    plateau: wrappers.Plateau | None = None,
    switch: wrappers.Switch | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clip (0: not at all), the optimiser `f.name`, and around it what `f` asks for.

    Weight decay is decoupled in adamw (Loshchilov and Hutter 2019), lamb, lion, muon and adafactor,
    part of the gradient in sgd, lars and schedule_free's sgd, and not offered by the others. Masks
    are `groups.first_match` rules. The state's `update` needs the arguments `value`, `grad`,
    `value_fn` and `grad_fn` of `step.make_update`.
    """
    check(f, plateau, switch)
    core = CORES[f.name](f, schedule)
    if switch:
        later = CORES[switch.name](f, lambda step: switch.rate_factor * schedule(step))
        core = [wrappers.switched(optax.chain(*core), optax.chain(*later), switch)]
    frozen = groups.frozen(f.rate_rules)
    parts = [*frozen, *_clip(f), *core]
    if f.name != "schedule_free":  # whose own update is no step of a parameter's
        parts += groups.scaled(f.rate_rules)
    if f.sam_rho:
        inner = optax.with_extra_args_support(optax.chain(*parts))
        parts = [wrappers.sam(inner, f.sam_rho, frozen)]
    parts += [plateau.link()] if plateau else []
    parts += frozen
    parts += [wrappers.ema(f.ema_decay)] if f.ema_decay else []
    return optax.with_extra_args_support(optax.chain(*parts))


def check(f: Fields, plateau: wrappers.Plateau | None, switch: wrappers.Switch | None) -> None:
    """Whether the parts go together; raises `UserError`."""
    if f.name not in NAMES:
        hint = nearest(f.name, NAMES)
        raise UserError(
            f"optim.name={f.name!r} is unknown; {hint} docs/howto/optimiser.md adds one."
        )
    for field, choices in CHOICES.items():
        if getattr(f, field) not in choices:
            hint = nearest(getattr(f, field), choices)
            raise UserError(f"optim.{field}={getattr(f, field)!r} is unknown; {hint}")
    if plateau and f.name not in (*LINEAR, *SOLVERS):
        raise UserError(
            f"optim.schedule.name=plateau cannot slow {f.name} down, whose steps are no multiple "
            "of the rate: use another schedule."
        )
    if switch:
        for field, name in (("name", f.name), ("switch.name", switch.name)):
            if name not in LINEAR:
                raise UserError(
                    f"optim.{field}={name!r} cannot be switched: choose from {', '.join(LINEAR)}."
                )
    if f.name == "schedule_free" and not f.b1:
        raise UserError("optim.b1=0.0 must be positive for schedule_free, which divides by it.")


def check_meaning(f: Fields, defaults: Fields, names: tuple[str, ...]) -> None:
    """Refuse what is set, differs from `defaults` and means nothing to the optimisers `names`."""
    for field, users in MEANT_FOR.items():
        value = getattr(f, field)
        if not value or value == getattr(defaults, field) or set(users) & set(names):
            continue
        if field == "weight_decay" and names == ("adam",):
            raise UserError(f"adam takes no weight_decay (got {value}): use adamw.")
        raise UserError(
            f"optim.{field}={value} has no meaning for optim.name={f.name}, only for "
            f"{', '.join(users)}: leave it at {getattr(defaults, field)}, or choose one of them."
        )
    if names == ("lars",) and f.lars_form == "lecture":
        for field in ("weight_decay", "momentum"):
            if getattr(f, field) not in (0, getattr(defaults, field)):
                raise UserError(
                    f"optim.{field}={getattr(f, field)} has no meaning for optim.lars_form=lecture,"
                    " which has neither decay nor momentum: use lars_form=paper."
                )


def _clip(f: Fields) -> list:
    forms = {
        "global_norm": optax.clip_by_global_norm,
        "block_rms": optax.clip_by_block_rms,
        "adaptive": links.clip_adaptively,
    }
    return [forms[f.clip_form](f.clip_norm)] if f.clip_norm else []


def _decay(f: Fields) -> list:
    """The link that adds the decayed weights to what comes by."""
    return [optax.add_decayed_weights(f.weight_decay, mask(f.decay_mask))] if f.weight_decay else []


def _sgd(f: Fields, schedule: optax.Schedule) -> list:
    """V <- m v + g, w <- w - eta v; velocity: v <- m v - eta g, w <- w + v.

    Equal under a constant rate alone; corrected is equal to the first under any.
    """
    if f.momentum_form == "accumulator" or not f.momentum:
        return [*_decay(f), optax.sgd(schedule, f.momentum or None, f.nesterov)]
    if f.momentum_form == "velocity":
        trace = optax.trace(f.momentum, f.nesterov)
        return [*_decay(f), optax.scale_by_learning_rate(schedule), trace]
    return [*_decay(f), links.corrected_momentum(schedule, f.momentum, f.nesterov)]


def _adam(f: Fields, schedule: optax.Schedule) -> list:
    """Eta m^ / (sqrt(v^ + eps_root) + eps) (Kingma and Ba 2015, whose eps_root is 0)."""
    if f.second_moment == "norm":
        scale = links.scale_by_gradient_norm(f.b1, f.b2, f.eps, f.eps_root)
        return [scale, optax.scale_by_learning_rate(schedule)]
    return [optax.adam(schedule, f.b1, f.b2, f.eps, f.eps_root)]


def _adamw(f: Fields, schedule: optax.Schedule) -> list:
    if f.second_moment == "norm":
        scale, by_rate = _adam(f, schedule)
        return [scale, *_decay(f), by_rate]
    decay = dict(weight_decay=f.weight_decay, mask=mask(f.decay_mask))
    return [optax.adamw(schedule, f.b1, f.b2, f.eps, f.eps_root, **decay)]


def _lars(f: Fields, schedule: optax.Schedule) -> list:
    """Paper: the rate inside the momentum (You, Gitman and Ginsburg 2017, algorithm 1).

    Lecture: w <- w - eta g ||w|| / ||g||, so that each update is eta times as long as its weights.
    """
    if f.lars_form == "lecture":
        ratio = optax.masked(optax.scale_by_trust_ratio(), mask(f.trust_mask))
        return [ratio, optax.scale_by_learning_rate(schedule)]
    masks = mask(f.decay_mask), mask(f.trust_mask)
    scale = links.scale_by_lars(f.trust_coefficient, f.weight_decay, *masks)
    trace = optax.trace(f.momentum, f.nesterov)
    return [scale, optax.scale_by_learning_rate(schedule), trace]


def _lamb(f: Fields, schedule: optax.Schedule) -> list:
    """You et al. 2020, algorithm 2: optax's, which has no mask for the trust ratio."""
    return [
        optax.scale_by_adam(f.b1, f.b2, f.eps, f.eps_root),
        optax.add_decayed_weights(f.weight_decay, mask(f.decay_mask)),
        optax.masked(optax.scale_by_trust_ratio(), mask(f.trust_mask)),
        optax.scale_by_learning_rate(schedule),
    ]


def _adagrad(f: Fields, schedule: optax.Schedule) -> list:
    """Eta g / sqrt(a + sum of g^2 + eps) (Duchi et al. 2011)."""
    return [optax.adagrad(schedule, f.initial_accumulator, f.eps)]


def _adafactor(f: Fields, schedule: optax.Schedule) -> list:
    """Shazeer and Stern 2018, algorithm 4: optax's, but for a decay that the rate multiplies."""
    scale = [optax.scale_by_param_block_rms()] if f.parameter_scale else []
    return [
        optax.scale_by_factored_rms(min_dim_size_to_factor=f.factored_dim),
        optax.clip_by_block_rms(1.0),
        *scale,
        *_decay(f),
        optax.scale_by_learning_rate(schedule),
    ]


def _lion(f: Fields, schedule: optax.Schedule) -> list:
    """Chen et al. 2023, algorithm 2."""
    decay = dict(weight_decay=f.weight_decay, mask=mask(f.decay_mask))
    return [optax.lion(schedule, f.b1, f.b2, **decay)]


def _muon(f: Fields, schedule: optax.Schedule) -> list:
    """Jordan et al. 2024 for the matrices of `muon_mask`, Adam for all else, one rate for both.

    `muon_rms` (0: sqrt(max(1, out / in))) is the root mean square of an update's elements, as in
    Liu et al. 2025, where it is Adam's.
    """
    dims = _muon_dims(f)
    # A rate of -1 leaves the direction: optax's decay of what Adam has knows no mask.
    direction = contrib.muon(
        -1.0,
        beta=f.momentum,
        eps=f.eps,
        nesterov=f.nesterov,
        adam_b1=f.b1,
        adam_b2=f.b2,
        muon_weight_dimension_numbers=dims,
        consistent_rms=f.muon_rms or None,
    )
    return [direction, *_decay(f), optax.scale_by_learning_rate(schedule)]


def _muon_dims(f: Fields) -> Callable[[Any], Any]:
    def dims(name, leaf):
        found = groups.matrix_dims(name, leaf.shape)
        if found is None or not groups.first_match(name, f.muon_mask):
            return None
        return contrib.MuonDimensionNumbers(*found)

    return groups.by_path(dims)


def _schedule_free(f: Fields, schedule: optax.Schedule) -> list:
    """Defazio et al. 2024, with b1 as the interpolation; the base has no momentum of its own."""
    adam = optax.scale_by_rms(f.b2, f.eps, eps_in_sqrt=False, bias_correction=True)
    base = optax.chain(
        *([adam] if f.schedule_free_base == "adamw" else []),
        *_decay(f),
        optax.scale_by_learning_rate(schedule),
        *groups.scaled(f.rate_rules),
    )
    # optax counts the steps of its own rate, which weighs the average, from 1.
    return [contrib.schedule_free(base, lambda count: schedule(count - 1), b1=f.b1)]


def _lbfgs(f: Fields, schedule: optax.Schedule) -> list:
    """Liu and Nocedal 1989. The rate is what a line search finds, or without one the schedule's."""
    if not f.linesearch_steps:
        return [optax.lbfgs(schedule, f.lbfgs_memory, linesearch=None)]
    search = optax.scale_by_zoom_linesearch(
        f.linesearch_steps, initial_guess_strategy="one", stepsize_precision=1e-5
    )
    return [
        wrappers.given(
            optax.lbfgs(None, f.lbfgs_memory, linesearch=search), "value", "grad", "value_fn"
        )
    ]


def _solver(make: Callable[[Fields], Any]) -> Callable[[Fields, optax.Schedule], list]:
    return lambda f, schedule: [make(f), optax.scale_by_learning_rate(schedule)]


CORES = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "lars": _lars,
    "lamb": _lamb,
    "adagrad": _adagrad,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sign_sgd": lambda f, schedule: [optax.sign_sgd(schedule)],
    "schedule_free": _schedule_free,
    "lbfgs": _lbfgs,
    "newton": _solver(lambda f: solvers.newton(f.damping, f.newton_limit)),
    "newton_cg": _solver(lambda f: solvers.newton_cg(f.damping, f.cg_steps)),
    "ggn_cg": _solver(lambda f: solvers.gauss_newton(f.damping, f.cg_steps)),
    "coordinate_descent": _solver(lambda f: solvers.coordinate_descent(f.damping)),
}


def parameter_table(f: Fields, params: Any) -> list[dict[str, Any]]:
    """A row of each parameter: path, shape, optimiser, rate factor, and whether decay and trust."""
    rows = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = groups.path(keys)
        matrix = f.name == "muon" and groups.matrix_dims(name, leaf.shape) is not None
        muon = matrix and groups.first_match(name, f.muon_mask)
        decay = bool(f.weight_decay) and groups.first_match(name, f.decay_mask)
        trust = f.name in ("lars", "lamb") and groups.first_match(name, f.trust_mask)
        optimiser = "adam" if f.name == "muon" and not muon else f.name
        rate = groups.factor(name, f.rate_rules)
        row = dict(optimiser=optimiser, rate=rate, decay=decay and rate != 0, trust=trust)
        rows.append(dict(path=name, shape=tuple(leaf.shape)) | row)
    return rows


def fields_of(values: Any) -> Fields:
    """`Fields` from a mapping that may hold more."""
    return Fields(**{field.name: values[field.name] for field in fields(Fields)})
