"""What is cheap to test on: small programs, random variables and random batches."""

import functools

import jax
import numpy as np
from flax import linen as nn

# Small programs: compiling them costs more than running them.
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
FULL = {  # what users have, whatever `make test` says
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
if jax.__version_info__ < (0, 11):  # an option that later compilers do not have
    FAST["xla_cpu_use_fusion_emitters"] = False
    FULL["xla_cpu_use_fusion_emitters"] = True
jit = functools.partial(jax.jit, compiler_options=FAST)


def images(batch, shape=(8, 8, 3)):
    return np.float32(np.random.default_rng(7).standard_normal((batch, *shape)))


def boxed(model, *inputs, **kwargs):
    """The model's variables as shapes, parameters in the boxes that carry their logical axes."""
    return jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs)


def drawn(shapes):
    """Variables with random values everywhere: no zero bias or unit scale hides its product.

    By numpy, which needs no compilation as `init` does.
    """
    draw = np.random.default_rng(1).standard_normal

    def make(keys, leaf):
        name, noise = keys[-1].key, np.float32(draw(leaf.shape))
        if name == "kernel":
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[-3:-1])))
        return 1 + abs(noise) / 4 if name in ("scale", "var") else noise / 4

    return jax.tree_util.tree_map_with_path(make, shapes)


def values(model, *inputs, **kwargs):
    return drawn(nn.unbox(boxed(model, *inputs, **kwargs)))


def applied(model, **kwargs):
    return jit(functools.partial(model.apply, **kwargs))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def paths(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in flat}


def close(a, b, **kwargs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **kwargs), a, b)


def stacked(stack):
    """The parameters of an unrolled stack as those of the scanned one."""
    blocks = [stack[f"block_{i}"] for i in range(len(stack))]
    return {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)}


def random_batch(task, size, *, seed=0, padding=0):
    """A batch of `task` whose leaves are noise, its last `padding` rows of weight 0."""
    draw = np.random.default_rng(seed)

    def make(name, leaf):
        if name == "weight":
            return (np.arange(size) < size - padding).astype(leaf.dtype)
        if name == "segment":
            starts = draw.random(leaf.shape) < 0.3
            ended = np.arange(leaf.shape[1]) >= leaf.shape[1] - 2
            return np.where(ended[None], 0, 1 + starts.cumsum(1)).astype(leaf.dtype)
        if name == "caption":
            end = draw.integers(1, leaf.shape[1], (size, 1))
            place = np.arange(leaf.shape[1])[None]
            words = draw.integers(1, 250, leaf.shape)
            words = np.where(place == end, 256, np.where(place < end, words, 0))
            return words.astype(leaf.dtype)
        if name == "loss_weight":
            return (draw.random(leaf.shape) < 0.6).astype(leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer):
            most = {"image": 256, "label": getattr(task, "num_classes", 10)}
            most = most.get(name) or task.vocab_size
            return draw.integers(most, size=leaf.shape).astype(leaf.dtype)
        return draw.standard_normal(leaf.shape).astype(leaf.dtype)

    return {name: make(name, leaf) for name, leaf in task.spec(size).items()}
