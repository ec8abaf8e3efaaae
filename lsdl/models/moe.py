"""A mixture of experts: which experts a token goes to, and its way there and back.

Each sequence is routed by itself, its tokens in their order. So no layout and no microbatch changes
a number, and no token takes another's place that came before it.

Shape letters: B batch, L length, D embed, F mlp, E experts, k experts of a token, N the L x k
choices, C capacity of an expert, S the E x C slots of all experts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lsdl.models.layers import Dtype


@dataclass(frozen=True)
class Experts:
    """How many experts there are, how many a token goes to, and how many tokens each takes."""

    number: int
    per_token: int
    capacity_factor: float  # slots there are, for each that even routing would fill

    def capacity(self, length: int) -> int:
        """Tokens of a sequence that an expert takes. Source: Fedus et al. 2021, eq. 3."""
        even = self.per_token * length / self.number
        return min(length, math.ceil(even * self.capacity_factor))


class Routing(NamedTuple):
    """Where the choices of a sequence go; `route` is for one, `Router` adds a leading B to all."""

    slot_N: jax.Array  # the slot of each choice, S if it has none
    choice_S: jax.Array  # the choice in each slot, N if it is empty
    gate_Lk: jax.Array  # what each choice counts, float32
    balance: jax.Array  # 1 if the experts are chosen evenly, at most E
    dropped: jax.Array  # share of the choices that found no slot


def route(logits_LE: jax.Array, real_L: jax.Array, experts: Experts) -> Routing:
    """The routing of one sequence, whose `real_L` tokens take slots in their order.

    Each goes to the experts that it finds most probable; their probabilities, summing to one if
    they are several, are the gates. A choice whose expert is full is dropped.
    `balance` is E times the sum over experts of (share of the choices) x (mean probability).
    Source: Fedus et al. 2021, eq. 2 and 4 to 6, for one expert of a token; Jiang et al. 2024,
    section 2.1, for several. Lepikhin et al. 2021 let second choices wait for all first ones, so
    that a later token displaces an earlier one; here a token's choices come one after another.
    """
    length, number, k = *logits_LE.shape, experts.per_token
    capacity = experts.capacity(length)
    probability_LE = jax.nn.softmax(logits_LE)
    # Not lax.top_k: XLA's partitioner (jax 0.10.2) gathers the whole batch for it.
    expert_Lk = jnp.argsort(probability_LE, axis=1, descending=True)[:, :k]
    gate_Lk = jnp.take_along_axis(probability_LE, expert_Lk, axis=1)
    if k > 1:
        gate_Lk /= gate_Lk.sum(-1, keepdims=True)

    chosen_LE = jax.nn.one_hot(expert_Lk, number, dtype=jnp.int32).sum(1) * real_L[:, None]
    before_LE = jnp.cumsum(chosen_LE, axis=0) - chosen_LE
    place_Lk = jnp.take_along_axis(before_LE, expert_Lk, axis=1)
    kept_Lk = (place_Lk < capacity) & real_L[:, None]
    slot_N = jnp.where(kept_Lk, expert_Lk * capacity + place_Lk, number * capacity).reshape(-1)
    empty_S = jnp.full(number * capacity, length * k)
    choice_S = empty_S.at[slot_N].set(jnp.arange(length * k), mode="drop")

    tokens = jnp.maximum(real_L.sum(), 1)
    share_E = chosen_LE.sum(0) / (k * tokens)
    mean_E = (probability_LE * real_L[:, None]).sum(0) / tokens
    dropped = (chosen_LE.sum() - kept_Lk.sum()) / (k * tokens)
    return Routing(slot_N, choice_S, gate_Lk, number * (share_E * mean_E).sum(), dropped)


class Router(nn.Module):
    """`(B, L, D)[, segment (B, L)] -> Routing` of each sequence, computed in float32.

    Padding, which is segment 0, goes nowhere and takes no slot.
    """

    experts: Experts
    kernel_init: Callable

    @nn.compact
    def __call__(self, x_BLD, segment_BL=None) -> Routing:
        init = nn.with_logical_partitioning(self.kernel_init, ("embed", None))
        dense = nn.Dense(
            self.experts.number,
            use_bias=False,
            dtype=jnp.float32,
            precision=lax.Precision.HIGHEST,
            kernel_init=init,
            name="logits",
        )
        real_BL = jnp.ones(x_BLD.shape[:2], bool) if segment_BL is None else segment_BL > 0
        one = functools.partial(route, experts=self.experts)
        return jax.vmap(one)(dense(x_BLD), real_BL)


class ExpertDense(nn.Module):
    """`(B, E, C, D) -> (B, E, C, F)`: a dense layer of each expert's own."""

    features: int
    axes: Sequence[str]
    bias: bool
    dtype: Dtype
    kernel_init: Callable

    @nn.compact
    def __call__(self, x_BECD):
        _, number, _, width = x_BECD.shape

        def make(name, init, *axes, shape):
            boxed = nn.with_logical_partitioning(init, ("experts", *axes))
            return self.param(name, boxed, (number, *shape)).astype(self.dtype)

        def init(key, shape, dtype=jnp.float32):
            keys_E = jax.random.split(key, number)
            return jax.vmap(lambda key: self.kernel_init(key, shape[1:], dtype))(keys_E)

        kernel_EDF = make("kernel", init, *self.axes, shape=(width, self.features))
        y_BECF = jnp.einsum("BECD,EDF->BECF", x_BECD.astype(self.dtype), kernel_EDF)
        if not self.bias:
            return y_BECF
        bias_EF = make("bias", nn.initializers.zeros, *self.axes[1:], shape=(self.features,))
        return y_BECF + bias_EF[None, :, None]


@jax.custom_vjp
def _move(x_BnD, from_Bm, to_Bn):
    """`(B, m, D)`: row j is x's row `from[j]`, 0 if there is none; x's row i goes to `to[i]`."""
    return _take(x_BnD, from_Bm)


def _take(x_BnD, from_Bm):
    take = lambda x, index: x.at[index].get(mode="fill", fill_value=0)  # noqa: E731
    return jax.vmap(take)(x_BnD, from_Bm)


# Each row goes to one place at most, so its gradient is fetched from there: nothing is scattered.
# Both in plain jax: a Hessian goes forward through them.
_move.defvjp(
    lambda x_BnD, from_Bm, to_Bn: (_take(x_BnD, from_Bm), (from_Bm, to_Bn)),
    lambda places, g_BmD: (_take(g_BmD, places[1]), None, None),
)


def dispatch(x_BLD: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """`(B, E, C, D)`: the tokens that each expert takes, 0 in the slots that stay empty."""
    batch, _, width = x_BLD.shape
    x_BND = jnp.repeat(x_BLD, experts.per_token, axis=1)
    x_BSD = _move(x_BND, routing.choice_S, routing.slot_N)
    x_BECD = x_BSD.reshape(batch, experts.number, -1, width)
    # Split on the batch, then on the experts: between the two the tokens travel.
    x_BECD = nn.with_logical_constraint(x_BECD, ("batch", None, None, None))
    return nn.with_logical_constraint(x_BECD, ("batch", "experts", None, None))


def collect(y_BECD: jax.Array, routing: Routing) -> jax.Array:
    """`(B, L, D)`: of each token the sum of its experts' answers, each times its gate."""
    y_BECD = nn.with_logical_constraint(y_BECD, ("batch", "experts", None, None))
    y_BECD = nn.with_logical_constraint(y_BECD, ("batch", None, None, None))
    batch, *_, width = y_BECD.shape
    y_BND = _move(y_BECD.reshape(batch, -1, width), routing.slot_N, routing.choice_S)
    gate_BLk = routing.gate_Lk.astype(y_BECD.dtype)
    return (y_BND.reshape(*gate_BLk.shape, width) * gate_BLk[..., None]).sum(2)
