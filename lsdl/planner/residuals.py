"""What a layer keeps for its backward pass, read from the jaxpr, and what a stack of them keeps."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from lsdl.models import remat


def saved(function: Callable, *args: Any) -> int:
    """The bytes that `function`'s backward pass has from its forward pass, beside `args`.

    `args` are abstract. What is an argument or does not depend on one is left out: inputs and
    parameters are in memory anyway, and constants are once for all layers.
    """
    return kept_bytes(jax.make_jaxpr(lambda *args: jax.vjp(function, *args)[1])(*args).jaxpr)


def kept_bytes(program: Jaxpr) -> int:
    """The bytes of what `program` returns, without what it was given and what hangs on none of it.

    Nor are keys of random numbers counted.
    """
    depends = set(program.invars)
    for eqn in program.eqns:
        if any(not isinstance(v, Literal) and v in depends for v in eqn.invars):
            depends.update(eqn.outvars)
    kept = {v for v in program.outvars if not isinstance(v, Literal)}
    made = [v.aval for v in kept & depends - {*program.invars}]
    is_key = lambda aval: jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key)  # noqa: E731
    return sum(one.size * one.dtype.itemsize for one in made if not is_key(one))


def scan_bytes(
    policy: str, n: int, *, carry_bytes: float, residual_bytes: float, kept_bytes: float = 0
) -> float:
    """The most that the backward pass of a scan over `n` layers has of them at once.

    `carry_bytes`: of what one layer hands to the next. `residual_bytes`: what one layer keeps
    without a policy, `kept_bytes` with it: `saved` of the layer, and of `jax.checkpoint` of it.
    Gradients and the layer at work come on top: a few carries. With the last segment of no more
    layers than the others, `every:k` needs n / k carries and k layers: the least is at
    k = sqrt(n carry / (carry + residual)), which is sqrt(n) only where nothing but carries is kept.
    """
    segment, inside, tail, _ = remat.cut(policy, n)
    one = dict(carry_bytes=carry_bytes, residual_bytes=residual_bytes)
    if not segment:
        return n * (carry_bytes + residual_bytes)
    inputs = (n - tail) // segment * (carry_bytes + kept_bytes)
    most = max(scan_bytes(inside, segment, **one), scan_bytes(inside, tail, **one))
    return inputs + most - kept_bytes  # the layer at work has its own already
