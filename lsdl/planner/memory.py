"""The bytes of one device that an experiment's layout makes: closed forms, from its shapes alone.

State, gradients and batch are exact, their shardings being known. Activations are those of the
float32 program with scanned layers that XLA compiles for CPUs: of GPT-3's sizes from 125M to 13B
under four layouts, at their own batch and length, within 15% (jax 0.10.2). At a quarter of the
length, where gradients are a larger part, 125M is up to 27% off. Bfloat16 programs of 1.3B for
H100, A100 and v5p take up to 18% less, and layers that are not scanned up to a fifth, since more of
them is fused.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from lsdl.models import attention
from lsdl.models.bert import Bert
from lsdl.models.gpt import Gpt
from lsdl.models.vit import CLASS_TOKENS, Vit
from lsdl.planner import activations, architecture, hardware, tree
from lsdl.sharding import splash
from lsdl.sharding.rules import axes_of, parts, resolve

MODEL_AXES = {"tensor", "stage", "expert"}  # they split a parameter for good


def split_of(experiment: Any, b: activations.Block, length: int) -> activations.Split:
    """Into how many parts the experiment's rules split each role's tensors on its mesh."""
    rows = experiment.batch_size // experiment.accum

    def split(names: Sequence[str], *shape: int) -> int:
        spec, *_ = resolve(names, shape, experiment.rules, experiment.mesh)
        return math.prod(parts(axes, experiment.mesh) for axes in spec)

    def heads(number: int) -> int:
        names = ("batch", "length", "heads", "head_dim")
        return split(names, rows, length, number, b.width // b.num_heads)

    vocab = getattr(experiment.module, "vocab_padded", 1)
    logits = split(("batch", "length", "vocab"), rows, length, vocab)
    whole, stored = _kernels(experiment)
    return activations.Split(
        residual=split(("batch", "residual_length", "embed"), rows, length, b.width),
        whole=split(("batch", "length", "embed"), rows, length, b.width),
        heads=heads(b.num_heads),
        kv_heads=heads(b.kv_heads or b.num_heads),
        mlp=split(("batch", "length", "mlp"), rows, length, b.mlp_dim),
        vocab=logits,
        table=logits // split(("batch", "length"), rows, length),
        kernels=whole / stored,
    )


def _kernels(experiment: Any) -> tuple[int, float]:
    """(numbers in the kernels of the stack, those that one device stores)."""
    found = [one for one in experiment.placements if "/stack/" in one.path]
    found = [one for one in found if one.path.startswith("params/") and one.path.endswith("kernel")]
    stored = sum(
        math.prod(one.shape) / math.prod(parts(axes, experiment.mesh) for axes in one.spec)
        for one in found
    )
    return sum(math.prod(one.shape) for one in found), stored


def stack_of(experiment: Any, target: hardware.Target) -> tuple[activations.Block, int] | None:
    """(block, length) of a module whose layers are one stack of dense blocks on whole sequences.

    The attention is the one that the target's devices have.
    """
    module, sizes = experiment.module, experiment.mesh.shape
    if not isinstance(module, Gpt | Bert | Vit) or getattr(module, "num_experts", 0):
        return None
    if sizes.get("sequence", 1) > 1 or sizes.get("stage", 1) > 1:
        return None
    b = architecture.block_of(module)
    if isinstance(module, Vit):
        _, height, wide, _ = experiment.abstract_batch["image"].shape
        length = height // module.patch * (wide // module.patch) + CLASS_TOKENS[module.pool]
    else:
        length = experiment.task.units_per_example
    device, dtype = target.device, jnp.dtype(module.dtype)
    capability = float("{}.{}".format(*device.compiler.get("compute_capability", (0, 0))))
    kernel = attention.has_kernel(device.kind, device.name, dtype, capability)
    kernel &= device.kind != "tpu" or splash.takes(length, b.width // b.num_heads)
    causal = isinstance(module, Gpt)
    blocks = device.kind == "cpu" and attention.takes_blocks(length, causal=causal)
    return replace(b, kernel=kernel, scored=attention.SCORED if blocks else 1.0), length


def activation_moments(
    experiment: Any, target: hardware.Target
) -> tuple[activations.Moments, activations.Block] | None:
    """What one device's activations take; None: no closed form here."""
    stack = stack_of(experiment, target)
    if stack is None or experiment.remat not in ("none", "full"):
        return None
    b, length = stack
    task = experiment.task
    language = task.unit == "tokens"
    return activations.moments(
        b,
        layers=experiment.module.num_layers,
        length=length,
        tokens=experiment.batch_size // experiment.accum * length,
        itemsize=jnp.dtype(experiment.module.dtype).itemsize,
        remat=experiment.remat,
        split=split_of(experiment, b, length),
        vocab=experiment.module.vocab_padded if language else 0,
        chunk=task.chunk if language else 0,
    ), b


def whole_parameter_bytes(experiment: Any, itemsize: int) -> float:
    """Of the parameters that one device multiplies by: what the batch's axes split is gathered."""
    total = 0.0
    for one in experiment.placements:
        if one.path.startswith("params/"):
            own = {axis for axes in one.spec for axis in axes_of(axes)} & MODEL_AXES
            number = math.prod(one.shape) / math.prod(experiment.mesh.shape[axis] for axis in own)
            total += number * itemsize
    return total


def moved_bytes(experiment: Any, target: hardware.Target) -> float:
    """The least that one device's memory reads and writes in a step.

    State is read and written, gradients written and read; each microbatch reads the parameters for
    its forward pass and twice for its backward pass, and once more where that computes again; and
    what a layer keeps is written and read.
    """
    itemsize = jnp.dtype(experiment.module.dtype).itemsize
    full = experiment.remat == "full"
    moved = 2 * tree.device_bytes(experiment.abstract_state)
    moved += 2 * tree.device_bytes(experiment.abstract_gradients)
    moved += (4 if full else 3) * experiment.accum * whole_parameter_bytes(experiment, itemsize)
    stack = stack_of(experiment, target)
    if stack:
        b, length = stack
        tokens = experiment.batch_size // experiment.accum * length
        split = split_of(experiment, b, length)
        kept = sum(line.nbytes(tokens, split) for line in activations.block(b, length, itemsize))
        kept += full * tokens * b.width * itemsize / split.residual
        moved += 2 * experiment.accum * experiment.module.num_layers * kept
    return moved
