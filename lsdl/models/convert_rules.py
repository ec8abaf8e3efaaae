"""What a table of Hugging Face's names is made of: rules that are read in both directions.

Shape letters of the operations: I and O the inputs and outputs of a layer, HW a filter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lsdl.errors import UserError


class Op(NamedTuple):
    """`read(*theirs) -> ours` and its inverse, both between tuples of arrays."""

    read: Callable[..., tuple]
    write: Callable[..., tuple]


def _one(read: Callable, write: Callable) -> Op:
    return Op(lambda x: (read(x),), lambda x: (write(x),))


SAME = _one(lambda x: x, lambda x: x)
DENSE = _one(np.transpose, np.transpose)  # OI <-> IO
CONV = _one(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
POINT = _one(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])  # OI11 <-> IO
LEADING = _one(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])  # 1... <-> ...
SPLIT = Op(lambda x: np.split(x, 3, axis=-1), lambda *x: (np.concatenate(x, axis=-1),))
JOIN = Op(lambda *x: (np.concatenate(x, axis=1)[0],), lambda x: tuple(x[:, None, None]))
# Of the batches that a normalisation has seen, which lsdl does not count.
COUNT = Op(lambda x: (), lambda: (np.zeros((), np.int64),))


def rows(size: int, padded: int) -> Op:
    """A table of `size` rows, of which lsdl has `padded`."""

    def read(x):
        if len(x) != size:
            raise ValueError(f"{len(x)} rows are not {size}")
        return np.pad(x, ((0, padded - size), *((0, 0),) * (x.ndim - 1)))

    return _one(read, lambda x: x[:size])


class Rule(NamedTuple):
    """Arrays of lsdl's, their counterparts, and how the ones are made of the others."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    op: Op


def rule(ours: str, theirs: str, op: Op = SAME) -> Rule:
    return Rule((ours,), (theirs,), op)


def dense(ours: str, theirs: str, *, op: Op = DENSE, bias: bool = True) -> Iterator[Rule]:
    yield rule(f"params/{ours}/kernel", f"{theirs}.weight", op)
    if bias:
        yield rule(f"params/{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str, *, bias: bool = True) -> Iterator[Rule]:
    yield rule(f"params/{ours}/scale", f"{theirs}.weight")
    if bias:
        yield rule(f"params/{ours}/bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> Iterator[Rule]:
    yield from norm(ours, theirs)
    for statistic in ("mean", "var"):
        path = f"model_state/batch_stats/{ours}/{statistic}"
        yield rule(path, f"{theirs}.running_{statistic}")
    yield Rule((), (f"{theirs}.num_batches_tracked",), COUNT)


class Field(NamedTuple):
    """A field of their config.json, and what of ours has to agree with it."""

    theirs: str  # dotted where it is nested
    ours: str  # as an error message calls it
    value: Any  # ours, in their words
    default: Any  # theirs, where config.json is silent


@dataclass(frozen=True)
class Counterpart:
    """A model of lsdl's as Hugging Face has it."""

    architecture: str
    model_type: str
    rules: tuple[Rule, ...]
    fields: tuple[Field, ...]
    prefix: str = ""  # of the tensors but the head's; files of a model without a head lack it
    # Buffers that follow from the sizes, and parts that lsdl's model does not have (a regex).
    ignored: str = r"position_ids$"
    tied: Mapping[str, str] = field(default_factory=dict)  # {a second name: the first}
    extra: Mapping[str, Any] = field(default_factory=dict)  # written to config.json, never compared


# By lsdl's names; by their synonyms.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
SYNONYMS = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
}


def activation(name: str) -> str:
    """Their name of lsdl's activation."""
    require(name in ACTIVATIONS, "activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def require(holds: bool, name: str, value: Any, allowed) -> None:
    """Raise `UserError` unless a field of the model allows it a counterpart."""
    if not holds:
        raise UserError(
            f"model.{name}={value!r} has no counterpart at Hugging Face, which has "
            f"{', '.join(map(str, allowed))}."
        )


def labels(classes: int) -> dict[str, str]:
    """The names of classes that have none, as their config.json has them."""
    return {str(i): f"LABEL_{i}" for i in range(classes)}
