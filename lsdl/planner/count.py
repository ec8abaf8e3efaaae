"""FLOPs, counted in the program itself: the jaxpr of whatever is to be run.

Two for each multiply-add of a matrix product or a convolution; all else (elementwise work, norms,
softmax, the optimiser) is left out, as in the published tables. A loop's body counts once for each
trip, the larger branch of a condition counts, and what rematerialisation computes again counts
again, below the scope `REMATTED`. Masks save nothing: causal attention counts in full, also in
blocks that leave out what no query sees. What an attention kernel computes again inside itself
does not count; what it fills lengths up with does.
A convolution's taps on padding count, as they do in published tables; those on the zeros with which
a stride spreads the gradient of its output do not.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from lsdl.errors import UserError
from lsdl.models.attention import IN_BLOCKS, SCORED

REMATTED = "rematted_computation"  # jax's name for the second computation of a checkpointed part
OPAQUE = ("pallas_call", "ffi_call", "ragged_dot", "dot_product_attention")
# cuDNN's kernels, and how many products of all pairs of queries and keys each stands for.
ATTENTION = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 4}
SPLASH = {"fwd": 2, "dkv": 3, "dq": 1}  # and jax's for TPUs, by the third words of their names
OUTSIDE = ("(task)",)  # what the task computes around the model: inputs and loss

Path = tuple[str, ...]


def count(jaxpr: Jaxpr) -> Counter[Path]:
    """{named scopes, outermost first: FLOPs of the products there} in one call of `jaxpr`.

    All scopes are there, also those without products, in the program's order. Raises `UserError`
    for a product whose number the program does not tell: in a loop of unknown length or a kernel.
    """
    flops, in_blocks = Counter(), Counter()
    for eqn in jaxpr.eqns:
        scopes = tuple(scope.name for scope in eqn.source_info.name_stack.stack)
        part = in_blocks if IN_BLOCKS in scopes else flops
        scopes = tuple(scope for scope in scopes if scope != IN_BLOCKS)
        for inner, number in _inside(eqn).items():
            flops[scopes + inner] += 0  # in the program's order
            part[scopes + inner] += number
    for scopes, number in in_blocks.items():
        flops[scopes] += round(number / SCORED)  # exact: all blocks of an attention are here
    return flops


def _inside(eqn: JaxprEqn) -> Counter[Path]:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return Counter({(): _dot_general(eqn)})
    if name == "conv_general_dilated":
        return Counter({(): _convolution(eqn)})
    if products := ATTENTION.get(name.removesuffix("_wrapper")):
        return Counter({(): products * _pairs(eqn)})
    if name == "pallas_call" and (params["name"] or "").startswith("splash_"):
        return Counter({(): _splash(eqn)})
    bodies = [count(body) for body in jaxprs_in_params(params)]
    if name == "cond":
        return max(bodies, key=Counter.total)
    flops = Counter({(): 0})
    for body in bodies:
        flops.update(body)
    if name.startswith(OPAQUE) or (name == "while" and flops.total()):
        raise UserError(
            f"The FLOPs of {eqn.source_info.name_stack} cannot be counted: there is a product in a "
            f"{name}, which does not say how often; use lax.scan, or a plain product."
        )
    times = params["length"] if name == "scan" else 1
    if (
        name == "shard_map"
    ):  # its body is what one device does; devices of the same rows do the same
        axes = {axis for spec in params["in_specs"] for axis in _axes(spec)}
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    return Counter({scopes: times * number for scopes, number in flops.items()})


def _axes(spec: Iterable) -> Iterator[str]:
    """The mesh axes that a partition spec names."""
    for part in spec:
        yield from (part,) if isinstance(part, str) else part or ()


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[dim] for dim in contracted)


def _pairs(eqn: JaxprEqn) -> int:
    """Of one product of queries (B, L, H, K) with keys (B, M, G, K)."""
    query, key = (var.aval.shape for var in eqn.invars[:2])
    return 2 * math.prod(query) * key[1]


def _splash(eqn: JaxprEqn) -> int:
    """Of the products of queries (..., H, L, K) and keys (..., G, M, K), which masks precede."""
    query, key, *_ = (v.aval for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating))
    products = SPLASH[eqn.params["name"].split("_")[2]]
    return products * 2 * query.size * key.shape[-2]


def _convolution(eqn: JaxprEqn) -> int:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    (_, inputs, *kernel) = (eqn.invars[1].aval.shape[dim] for dim in numbers.rhs_spec)
    (batch, outputs, *image) = (eqn.outvars[0].aval.shape[dim] for dim in numbers.out_spec)
    flops = 2 * batch * outputs * inputs  # `inputs` are those of one group already
    for i, (size, taps) in enumerate(zip(image, kernel, strict=True)):
        start_O = np.arange(size) * params["window_strides"][i] - params["padding"][i][0]
        tap_K = np.arange(taps) * params["rhs_dilation"][i]
        flops *= int((np.add.outer(start_O, tap_K) % params["lhs_dilation"][i] == 0).sum())
    return flops


def by_module(flops: Mapping[Path, int], modules: Collection[Path], *, root: str) -> Counter[Path]:
    """The FLOPs by scope that `count` gave, as FLOPs by module: {path: FLOPs of its own}.

    `root` is the outermost module's class, `modules` the paths below it. Flax puts each module's
    name into the scopes; other names (of transformations, of methods) lie between them. What is
    not in the outermost module goes to `OUTSIDE`. The modules keep the program's order.
    """
    result = Counter()
    for scopes, number in flops.items():
        names = [scope.partition(".")[0] for scope in scopes]  # module.method
        path = () if root in names else OUTSIDE
        for name in names:
            if (*path, name) in modules:
                path = (*path, name)
                result.setdefault(path, 0)
        result[path] += number
    return result


def recomputed(flops: Mapping[Path, int]) -> int:
    """Those of the FLOPs that rematerialisation adds."""
    return sum(number for scopes, number in flops.items() if REMATTED in scopes)
