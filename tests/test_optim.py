"""Optimisers against their formulas, written out in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lsdl.config import template
from lsdl.errors import UserError
from lsdl.models.mlp import Mlp
from lsdl.models.resnet import ResNet, cifar
from lsdl.models.vit import Vit
from lsdl.optim import chain, groups

# --- optimisers -----------------------------------------------------------------------------------

MASK = ((r".*/(bias|scale)", False), (r".*", True))


def make_optimizer(name, schedule=lambda step: 0.1 / (1 + step), **kwargs):
    given = dict(name=name, b1=0.8, b2=0.95, eps=1e-3, trust_coefficient=0.02)
    around = {word: kwargs.pop(word) for word in ("plateau", "switch") if word in kwargs}
    fields = chain.fields_of({**template().optim, **given, **kwargs})
    return chain.make_optimizer(fields, schedule, **around)


def tree(seed):
    """Two dense layers; the first bias starts at 0, where trust ratios are not defined."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"dense_0": (3, 4), "head": (4, 2)}
    made = {name: {"kernel": draw(s), "bias": draw(s[1:])} for name, s in shapes.items()}
    if seed == 0:
        made["dense_0"]["bias"] *= 0
    return made


def leaves(tree):
    return {f"{layer}/{name}": value for layer in tree for name, value in tree[layer].items()}


class Reference:
    """One optimiser in float64, over {path: array}; `decayed`, `trusted` say which leaves are."""

    def __init__(self, name, *, clip_norm=0.0, weight_decay=0.0, momentum=0.9, nesterov=False,
                 decayed=lambda path: path.endswith("kernel"),
                 trusted=lambda path: path.endswith("kernel")):  # fmt: skip
        self.rule = getattr(self, name)
        self.clip_norm, self.weight_decay = clip_norm, weight_decay
        self.momentum, self.nesterov = momentum, nesterov
        self.decayed, self.trusted = decayed, trusted
        self.m, self.v = {}, {}

    def step(self, count, params, grads):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, self.clip_norm / norm) if self.clip_norm else 1.0
        rate = 0.1 / (1 + count)
        return {
            path: p + self.rule(path, p, grads[path] * scale, rate, count + 1)
            for path, p in params.items()
        }

    def decay(self, path, p):
        return self.weight_decay * p if self.decayed(path) else 0.0

    def heavy_ball(self, path, u):
        self.m[path] = u + self.momentum * self.m.get(path, 0.0)
        return u + self.momentum * self.m[path] if self.nesterov else self.m[path]

    def moments(self, path, g, t):
        """Bias-corrected, eq. 1 of Kingma and Ba 2015."""
        self.m[path] = 0.8 * self.m.get(path, 0.0) + 0.2 * g
        self.v[path] = 0.95 * self.v.get(path, 0.0) + 0.05 * g**2
        return self.m[path] / (1 - 0.8**t) / (np.sqrt(self.v[path] / (1 - 0.95**t)) + 1e-3)

    @staticmethod
    def ratio(p, u, coefficient):
        norms = np.linalg.norm(p), np.linalg.norm(u)
        return coefficient * norms[0] / norms[1] if all(norms) else 1.0

    def sgd(self, path, p, g, rate, t):
        return -rate * self.heavy_ball(path, g + self.decay(path, p))

    def adam(self, path, p, g, rate, t):
        return -rate * self.moments(path, g, t)

    def adamw(self, path, p, g, rate, t):
        return -rate * (self.moments(path, g, t) + self.decay(path, p))

    def lamb(self, path, p, g, rate, t):
        u = self.moments(path, g, t) + self.decay(path, p)
        return -rate * (self.ratio(p, u, 1.0) if self.trusted(path) else 1.0) * u

    def lars(self, path, p, g, rate, t):
        """The rate is inside the momentum (You et al. 2017, algorithm 1)."""
        norms = np.linalg.norm(p), np.linalg.norm(g)
        below = norms[1] + np.linalg.norm(self.decay(path, p))
        ratio = 0.02 * norms[0] / below if self.trusted(path) and all(norms) else 1.0
        return self.heavy_ball(path, -rate * ratio * (g + self.decay(path, p)))


def agree(name, *, reference=None, steps=4, **kwargs):
    tx, expected = make_optimizer(name, **kwargs), Reference(name, **(reference or kwargs))
    params = jax.tree.map(jnp.float32, tree(0))
    truth, state = leaves(tree(0)), tx.init(params)
    for count in range(steps):
        grads = jax.tree.map(jnp.float32, tree(count + 1))
        updates, state = tx.update(grads, state, params, value=jnp.float32(0))
        params = jax.tree.map(jnp.add, params, updates)
        truth = expected.step(count, truth, leaves(tree(count + 1)))
    for path, p in leaves(params).items():
        np.testing.assert_allclose(p, truth[path], rtol=1e-5, atol=1e-6, err_msg=path)
        assert not np.allclose(p, leaves(tree(0))[path], atol=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("sgd", dict(momentum=0.0)),
        ("sgd", dict(momentum=0.0, weight_decay=0.3)),
        ("sgd", dict(momentum=0.9)),
        ("sgd", dict(momentum=0.5, nesterov=True)),
        ("sgd", dict(momentum=0.9, nesterov=True, weight_decay=0.3)),
        ("adam", {}),
        ("adamw", {}),
        ("adamw", dict(weight_decay=0.3)),
        ("lars", {}),
        ("lars", dict(weight_decay=0.3)),
        ("lars", dict(weight_decay=0.3, momentum=0.5, nesterov=True)),
        ("lamb", {}),
        ("lamb", dict(weight_decay=0.3)),
    ],
    ids=str,
)
def test_optimiser_is_its_formula(name, kwargs, clip_norm):
    agree(name, clip_norm=clip_norm, **kwargs)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
@pytest.mark.parametrize(
    ("rules", "decayed"),
    [
        (((r".*", True),), lambda path: True),
        (((r".*", False),), lambda path: False),
        (((r"head/.*", False), (r".*", True)), lambda path: path.startswith("dense_0")),
    ],
    ids=["all", "none", "all but the head"],
)
def test_decay_follows_the_mask(name, rules, decayed):
    reference = dict(weight_decay=0.3, decayed=decayed)
    agree(name, reference=reference, weight_decay=0.3, decay_mask=rules)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_trust_ratio_follows_the_mask(name):
    agree(
        name,
        reference=dict(trusted=lambda path: path.startswith("head")),
        trust_mask=((r"head/.*", True), (r".*", False)),
    )


@pytest.mark.parametrize(("clip_norm", "norm"), [(0.0, 5.0), (10.0, 5.0), (5.0, 5.0), (2.0, 2.0)])
def test_clipping_bounds_the_norm_of_the_whole_tree(clip_norm, norm):
    tx = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, clip_norm=clip_norm)
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"kernel": jnp.array([-4.0])}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], [-3 * norm / 5, 0], rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["kernel"], [4 * norm / 5], rtol=1e-6)


def test_clipping_leaves_weight_decay_alone():
    tx = make_optimizer("sgd", lambda step: 1.0, momentum=0.0, clip_norm=1e-3, weight_decay=0.5)
    params = {"a": {"kernel": jnp.full(3, 8.0)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -4.0, rtol=1e-6)


@pytest.mark.parametrize("name", chain.LINEAR)
def test_rate_is_the_schedules_at_this_step(name):
    """The first update has `schedule(0)`, not `schedule(1)`."""
    tx = make_optimizer(name, lambda step: jnp.where(step == 1, 1.0, 0.0), momentum=0.0)
    params = jax.tree.map(jnp.float32, tree(1))
    state, moved = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        moved.append(float(jnp.abs(updates["head"]["kernel"]).max()) > 0)
    assert moved == [False, True, False]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("adm", {}, "did you mean 'adam'"),
    ],
)
def test_bad_optimisers_are_errors(name, given, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(name, **given)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("a/bias", False), ("a/kernel", True), ("a/b/scale", False), ("a/bias/kernel", True)],
)
def test_first_match_wins(name, value):
    assert groups.first_match(name, MASK) is value
    assert groups.first_match(name, ((r".*", not value), *MASK)) is not value


@pytest.mark.parametrize("pattern", ["kernel", "a/kern", r"/kernel", r".*/kernel/.*"])
def test_a_pattern_matches_the_whole_path(pattern):
    assert groups.first_match("a/kernel", ((pattern, True), (r".*", False))) is False


def test_an_uncovered_parameter_is_an_error():
    with pytest.raises(UserError, match=r"'a/kernel'.*end the list with"):
        groups.first_match("a/kernel", ((r".*/bias", False),))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("sgd", "decay_mask"),
        ("adamw", "decay_mask"),
        ("lars", "decay_mask"),
        ("lamb", "decay_mask"),
        ("lars", "trust_mask"),
    ],
)
def test_an_optimiser_refuses_an_uncovered_parameter(name, field):
    rules = ((r".*/bias", False), (r"head/kernel", True))
    tx = make_optimizer(name, weight_decay=0.1, **{field: rules})
    with pytest.raises(UserError, match="'dense_0/kernel'"):
        tx.init(jax.tree.map(jnp.float32, tree(0)))


vit = functools.partial(
    Vit, patch=2, width=8, num_layers=2, num_heads=2, mlp_dim=16, num_classes=10
)
MODELS = {
    "mlp": lambda: Mlp(hidden=(8, 8), num_classes=10),
    "vit": vit,
    "vit, stem": lambda: vit(stem=2),
    "vit, scanned": lambda: vit(scan_layers=True),
    "resnet": lambda: ResNet(num_classes=10, **cifar(20)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("boxed", [True, False])
def test_kernels_and_positions_alone_are_decayed(model, boxed):
    """By the rules that every config starts from, on the parameters that models really have."""
    image = jnp.zeros((1, 8, 8, 1))
    init = lambda: MODELS[model]().init(jax.random.key(0), image, train=False)  # noqa: E731
    params = jax.eval_shape(init)["params"]
    params = params if boxed else nn.unbox(params)
    decays = groups.mask(template().optim.decay_mask)(params)
    decays = {groups.path(keys): v for keys, v in jax.tree_util.tree_flatten_with_path(decays)[0]}
    assert len(decays) == len(jax.tree.leaves(params))
    last = {name: name.split("/")[-1] for name in decays}
    assert {name for name, decayed in decays.items() if decayed} == {
        name for name in decays if last[name] in ("kernel", "position", "class")
    }
    assert {last[name] for name, decayed in decays.items() if not decayed} <= {"bias", "scale"}
    assert {"kernel", "bias"} <= set(last.values())
    assert ("position" in last.values()) == model.startswith("vit")
