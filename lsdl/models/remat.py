"""Rematerialisation: what layers keep for their backward pass. Changes memory, never numbers.

none              everything is kept, nothing computed again
full              each layer's input is kept, and the layer computed again
dots              ... and the results of its matrix products are kept too
dots_no_batch     ... of those without a batch dim alone: products with weights, not of attention
names:a,b         ... and the activations of these names (`NAMES`) are kept too
offload:a,b       ... and these are kept in the host's memory, where a device has another (on CPU it
                  is names:a,b)
every:k           each k-th layer's input is kept, and k layers are computed again, then kept
sqrt              about sqrt(n) inputs are kept; from each as many again, each layer as in full
binomial          and so on: O(log n) inputs are kept, each layer is computed O(log n) times
poor              nothing but the first input is kept, and n (n + 1) / 2 layers are computed; as
                  many are compiled, so this is for teaching

What is checkpointed are ranges of layers, one in the other; `cut` says which. The layers are those
of a scan (`scan`), or modules one after another (`chain`). XLA's compiler for CPU merges what is
computed again with what was computed before, unless a loop lies between: there layers one after
another, and poor, take about as much memory as without a policy.
Sources: Chen et al. 2016, sections 3 and 4; binomial has the order of treeverse (Griewank 1992) and
not its optimal schedule, whose segments are of all lengths and so no loops.
"""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lsdl.errors import UserError, nearest

# auto and auto:g stand for one of the others, which is chosen before a model is made: the one with
# the least to compute again that fits into a device's memory, or into g GiB.
POLICIES = (
    *("none", "full", "dots", "dots_no_batch", "names:a,b", "offload:a,b"),
    *("sqrt", "every:k", "poor", "binomial", "auto", "auto:g"),
)
# The activations that blocks name, for names: and offload:. To keep one for which the backward
# pass has no use saves no work.
NAMES = {
    "query": "attention's queries, after the rotary embedding",
    "key": "attention's keys, after the rotary embedding",
    "value": "attention's values",
    "attn_out": "attention's weighted sum of the values, before the output projection",
    "attn_proj": "what attention adds to the residual stream: the next norm's input is made of it",
    "mlp_gate": "the gate of a gated MLP, before the activation",
    "mlp_up": "the MLP's wide product, before the activation",
    "mlp_hidden": "what the MLP's last product sees",
    "mlp_out": "what the MLP adds to the residual stream; a norm after it (BERT) needs it again",
    "conv": "a convolution's result, before its norm and activation",
    "dense": "a hidden dense layer's result, before its norm and activation",
}

_seen: contextvars.ContextVar = contextvars.ContextVar("seen", default=None)


def check(policy: str) -> str:
    """`policy`, if it is one. Raises `UserError`."""
    word, _, rest = policy.partition(":")
    if policy == "auto" or re.fullmatch(r"auto:\d+(\.\d+)?", policy):
        return policy
    forms = dict(form.split(":") if ":" in form else (form, "") for form in POLICIES)
    if word not in forms:
        raise UserError(f"remat={policy!r} is unknown; {nearest(policy, POLICIES)}")
    if bool(rest) != bool(forms[word]) or (":" in policy) != bool(forms[word]):
        form = f"{word}:{forms[word]}" if forms[word] else word
        raise UserError(f"remat={policy!r} must be written {form}.")
    if word == "every" and not (rest.isdecimal() and int(rest)):
        raise UserError(f"remat={policy!r} must have a number of layers, as every:4.")
    if forms[word] == "a,b" and not all(rest.split(",")):
        raise UserError(f"remat={policy!r} must list names with commas, as {word}:attn_out,mlp_up.")
    return policy


def name(x: jax.Array, label: str) -> jax.Array:
    """`x`, which names: and offload: know as `label`."""
    if (seen := _seen.get()) is not None:
        seen.add(label)
    return checkpoint_name(x, label)


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
    """The labels of all that is named while a model is traced."""
    token = _seen.set(set())
    try:
        yield _seen.get()
    finally:
        _seen.reset(token)


def names_of(policy: str) -> tuple[str, ...]:
    """The names that `policy` lists."""
    word, _, rest = policy.partition(":")
    return tuple(rest.split(",")) if word in ("names", "offload") else ()


def check_names(policy: str, there: set[str]) -> None:
    """Raises `UserError` for a name that the model, which has those that are `there`, has not."""
    for label in names_of(policy):
        if label not in there:
            raise UserError(
                f"remat={policy!r} names the activation {label!r}, and the model's are "
                f"{', '.join(sorted(there)) or 'none'}."
            )


class Cut(NamedTuple):
    """How n layers are cut: equal segments, each checkpointed, and a tail, which is not.

    The tail needs no checkpoint: the backward pass comes to it at once.
    """

    segment: int  # layers; 0: no checkpoint
    inside: str  # the policy of a segment's layers and of the tail's
    tail: int = 0  # layers
    keep: Callable | None = None  # what is kept of a segment, a policy of `jax.checkpoint`


def cut(policy: str, n: int) -> Cut:
    """How `policy` cuts `n` layers."""
    word, _, rest = policy.partition(":")
    if word == "none" or n == 0:
        return Cut(0, "none")
    if word == "every":
        segment = min(int(rest), n)
        return Cut(segment, "none", n % segment)
    if word == "sqrt":
        # The fewest inputs, outside and inside. A tail counts as two more: it is compiled apart,
        # and cuts the stacked parameters in two.
        segment = min(range(1, n + 1), key=lambda k: (n // k + k + 2 * (n % k > 0), n % k))
        return Cut(segment, "full" if segment > 1 else "none", n % segment)
    if word == "binomial":
        return _binomial(n)
    if word == "poor":
        return Cut(n - 1, "poor", 1)
    return Cut(1, "none", keep=_keep(policy))


def _binomial(n: int) -> Cut:
    """Up to 4 segments, each cut likewise: 4 inputs a level, of which there are log4(n)."""
    if n <= 4:
        return Cut(1 if n > 1 else 0, "none", 1 if n > 1 else 0)
    number = next((g for g in (4, 3) if n % g == 0), 4)
    segment = -(-n // number)
    return Cut(segment, "binomial", n % segment)


def _keep(policy: str) -> Callable | None:
    kept, names = jax.checkpoint_policies, names_of(policy)
    if policy.startswith("names:"):
        return kept.save_only_these_names(*names)
    if policy.startswith("offload:"):
        return kept.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return {
        "full": None,
        "dots": kept.dots_saveable,
        "dots_no_batch": kept.dots_with_no_batch_dims_saveable,
    }[policy]


def scan(body: Callable, carry: Any, xs: Any, *, policy: str = "none") -> tuple[Any, Any]:
    """`jax.lax.scan(body, carry, xs)`, whose backward pass computes again what `policy` says."""
    (n,) = {len(x) for x in jax.tree.leaves(xs)}
    segment, inside, tail, keep = cut(policy, n)
    if not segment:
        return lax.scan(body, carry, xs, unroll=n == 1)
    whole = n - tail
    alone, single = segment == whole, segment == 1

    def run(carry, xs):
        return body(carry, xs) if single else scan(body, carry, xs, policy=inside)

    def segments(x):
        x = x[:whole] if tail else x
        return x if single else x.reshape(-1, segment, *x.shape[1:])

    # A loop keeps XLA from merging what is computed again with what was computed before.
    again = jax.checkpoint(run, policy=keep, prevent_cse=alone)
    carry, ys = lax.scan(again, carry, jax.tree.map(segments, xs), unroll=alone)
    ys = ys if single else jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)
    if not tail:
        return carry, ys
    carry, more = scan(body, carry, jax.tree.map(lambda x: x[whole:], xs), policy=inside)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, more)


def evaluations(policy: str, n: int) -> int:
    """How often a layer is computed in a step with n layers, the forward pass included.

    Of scanned layers. Of layers one after another the compiler may leave out a segment's last.
    """
    segment, inside, tail, _ = cut(policy, n)
    if not segment:
        return n
    whole = n - tail
    return whole + whole // segment * evaluations(inside, segment) + evaluations(inside, tail)


def unneeded(policy: str, n: int) -> int:
    """Those of the evaluations for which no layer waits: what is last in them is not computed."""
    segment, inside, tail, _ = cut(policy, n)
    if not segment:
        return 0
    whole = n - tail
    each = 1 if segment == 1 else unneeded(inside, segment)
    return whole // segment * each + unneeded(inside, tail)


def chain(
    module: nn.Module, layers: Sequence[Callable], carry: Any, *, policy: str = "none"
) -> Any:
    """What `layers`, one after another, make of `carry`; for use in a compact method of `module`.

    `layer(parent=module)` makes the submodule, with a name of its own, and that takes the carry:
    a `functools.partial` of a class of modules will do. The policy changes no parameter's name.
    """
    segment, inside, tail, keep = cut(policy, len(layers))
    if not segment:
        for layer in layers:
            carry = layer(parent=module)(carry)
        return carry
    whole = len(layers) - tail

    def again(first: int) -> Callable:
        part = layers[first : first + segment]
        run = lambda module, carry: chain(module, part, carry, policy=inside)  # noqa: E731
        return nn.remat(run, policy=keep)

    for first in range(0, whole, segment):
        carry = again(first)(module, carry)
    return chain(module, layers[whole:], carry, policy=inside)
