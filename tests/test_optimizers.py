"""Every optimiser against its formula in float64, and what goes around it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lsdl.config import template
from lsdl.errors import UserError
from lsdl.optim import chain, groups, links, solvers, wrappers

MASK = ((r".*/(bias|scale)", False), (r".*", True))
SHAPES = {"a": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,)}}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def fields(name, **given):
    given = dict(name=name, b1=0.8, b2=0.95, eps=1e-3, trust_coefficient=0.02) | given
    return chain.fields_of({**template().optim, **given})


def decaying(step):
    return 0.1 / (1 + step)


def make(name, schedule=decaying, *, plateau=None, switch=None, **given):
    return chain.make_optimizer(fields(name, **given), schedule, plateau=plateau, switch=switch)


def tree(seed):
    draw = np.random.default_rng(seed).standard_normal
    return {a: {b: draw(shape) for b, shape in inner.items()} for a, inner in SHAPES.items()}


def flat(tree):
    return {f"{a}/{b}": np.asarray(leaf) for a, inner in tree.items() for b, leaf in inner.items()}


def run(tx, *, steps=5, start=None, grads=lambda t, w: tree(t + 1), values=lambda t: 1.0):
    """The parameters before each step and after the last, as {path: array}."""
    params = jax.tree.map(jnp.asarray, tree(0) if start is None else start)
    state, seen = tx.init(params), [flat(params)]
    update = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v, grad_fn=lambda p, i=0: g))
    for t in range(steps):
        g = jax.tree.map(jnp.asarray, grads(t, params))
        updates, state = update(g, state, params, jnp.asarray(values(t)))
        params = optax.apply_updates(params, updates)
        seen.append(flat(params))
    return seen, state


def assert_rule(tx, rule, *, steps=5, rtol=1e-6):
    """`rule(t, path, w, g, memory, gradients) -> w` in numpy, a memory for each parameter."""
    seen, _ = run(tx, steps=steps)
    truth, memory = flat(tree(0)), {path: {} for path in flat(tree(0))}
    for t in range(steps):
        grads = flat(tree(t + 1))
        truth = {p: rule(t, p, w, grads[p], memory[p], grads) for p, w in truth.items()}
        for path, w in truth.items():
            np.testing.assert_allclose(seen[t + 1][path], w, rtol=rtol, atol=1e-12, err_msg=path)


def norm(x):
    return np.sqrt((np.asarray(x) ** 2).sum())


def decayed(path):
    return path.endswith("kernel")


def adam_moments(t, g, memory, square):
    m = memory["m"] = 0.8 * memory.get("m", 0.0) + 0.2 * g
    v = memory["v"] = 0.95 * memory.get("v", 0.0) + 0.05 * square
    return m / (1 - 0.8 ** (t + 1)), v / (1 - 0.95 ** (t + 1))


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["accumulator", "velocity", "corrected"])
def test_momentum_is_its_form(form, nesterov):
    def rule(t, path, w, g, memory, grads):
        g = g + 0.3 * w * decayed(path)
        rate, before = decaying(t), decaying(t - 1) if t else 1.0
        if form == "accumulator":
            v = memory["v"] = 0.9 * memory.get("v", 0.0) + g
            return w - rate * (g + 0.9 * v if nesterov else v)
        history = 0.9 * (rate / before if form == "corrected" else 1.0)
        v = memory["v"] = history * memory.get("v", 0.0) - rate * g
        return w + (0.9 * v - rate * g if nesterov else v)

    assert_rule(make("sgd", momentum_form=form, nesterov=nesterov, weight_decay=0.3), rule)


@pytest.mark.parametrize(("eps", "eps_root"), [(1e-3, 0.0), (0.0, 1e-2), (1e-3, 1e-2)])
@pytest.mark.parametrize("second", ["elementwise", "norm"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_both_its_forms(name, second, eps, eps_root):
    """D-16: eps inside and outside the root, the second moment of elements and of the norm."""
    decay = 0.3 if name == "adamw" else 0.0

    def rule(t, path, w, g, memory, grads):
        square = g**2 if second == "elementwise" else sum((x**2).sum() for x in grads.values())
        m, v = adam_moments(t, g, memory, square)
        return w - decaying(t) * (m / (np.sqrt(v + eps_root) + eps) + decay * w * decayed(path))

    given = dict(second_moment=second, eps=eps, eps_root=eps_root, weight_decay=decay)
    assert_rule(make(name, **given), rule)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_the_papers(nesterov):
    def rule(t, path, w, g, memory, grads):
        beta = 0.3 * decayed(path)
        ratio = 0.02 * norm(w) / (norm(g) + beta * norm(w)) if decayed(path) else 1.0
        step = decaying(t) * ratio * (g + beta * w)
        v = memory["v"] = 0.9 * memory.get("v", 0.0) + step
        return w - (0.9 * v + step if nesterov else v)

    assert_rule(make("lars", weight_decay=0.3, nesterov=nesterov), rule)


def test_lars_without_decay_is_optaxs_and_with_it_is_not():
    for decay, same in ((0.0, True), (0.3, False)):
        other = optax.lars(
            decaying,
            decay,
            weight_decay_mask=groups.mask(MASK),
            trust_coefficient=0.02,
            trust_ratio_mask=groups.mask(MASK),
            momentum=0.9,
        )
        ours, _ = run(make("lars", weight_decay=decay))
        theirs, _ = run(optax.with_extra_args_support(other))
        close = [np.allclose(ours[-1][p], theirs[-1][p], rtol=1e-9) for p in ours[-1]]
        assert all(close) == same


def test_lars_of_the_lecture_moves_each_layer_by_the_rate():
    """D-17: |dw| / |w| is eta, whatever the gradient."""
    tx = make("lars", lars_form="lecture", trust_mask=((r".*", True),))
    seen, _ = run(tx)
    for t in range(5):
        for path, w in seen[t].items():
            step = norm(seen[t + 1][path] - w) / norm(w)
            np.testing.assert_allclose(step, decaying(t), rtol=1e-12)


def test_lamb_adagrad_lion_and_sign_are_their_formulas():
    def lamb(t, path, w, g, memory, grads):
        m, v = adam_moments(t, g, memory, g**2)
        u = m / (np.sqrt(v + 1e-2) + 1e-3) + 0.3 * w * decayed(path)
        return w - decaying(t) * (norm(w) / norm(u) if decayed(path) else 1.0) * u

    def adagrad(t, path, w, g, memory, grads):
        total = memory["a"] = memory.get("a", 0.5) + g**2
        return w - decaying(t) * g / np.sqrt(total + 1e-3)

    def lion(t, path, w, g, memory, grads):
        m = memory.get("m", 0.0)
        memory["m"] = 0.95 * m + 0.05 * g
        return w - decaying(t) * (np.sign(0.8 * m + 0.2 * g) + 0.3 * w * decayed(path))

    def sign(t, path, w, g, memory, grads):
        return w - decaying(t) * np.sign(g)

    assert_rule(make("lamb", weight_decay=0.3, eps_root=1e-2), lamb)
    assert_rule(make("adagrad", initial_accumulator=0.5), adagrad)
    assert_rule(make("lion", weight_decay=0.3), lion)
    assert_rule(make("sign_sgd"), sign)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("least", [2, 128])
def test_adafactor_is_its_formula(least, relative):
    def rule(t, path, w, g, memory, grads):
        rho = 1 - (t + 1.0) ** -0.8
        square = g**2 + 1e-30
        if g.ndim == 2 and least == 2:
            row = memory["r"] = rho * memory.get("r", 0.0) + (1 - rho) * square.mean(1)
            col = memory["c"] = rho * memory.get("c", 0.0) + (1 - rho) * square.mean(0)
            v = row[:, None] * col[None] / row.mean()
        else:
            v = memory["v"] = rho * memory.get("v", 0.0) + (1 - rho) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        size = max(1e-3, np.sqrt((w**2).mean())) if relative else 1.0
        return w - decaying(t) * (size * u + 0.3 * w * decayed(path))

    given = dict(factored_dim=least, parameter_scale=relative, weight_decay=0.3)
    assert_rule(make("adafactor", **given), rule)


def newton_schulz(x):
    x = x / (norm(x) + 1e-3)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("rms", [0.0, 0.2])
def test_muon_is_its_formula(rms):
    def rule(t, path, w, g, memory, grads):
        if path == "a/kernel":
            m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
            u = newton_schulz(m / (1 - 0.9 ** (t + 1)))
            u = u * (rms * np.sqrt(max(u.shape)) if rms else np.sqrt(max(1, u.shape[1] / len(u))))
        else:
            m, v = adam_moments(t, g, memory, g**2)
            u = m / (np.sqrt(v) + 1e-3)
        return w - decaying(t) * (u + 0.3 * w * decayed(path))

    assert_rule(make("muon", muon_rms=rms, weight_decay=0.3), rule)


def test_muon_takes_stacks_and_convolutions_apart():
    draw = np.random.default_rng(0).standard_normal
    params = {
        "blocks": {"up": {"kernel": draw((3, 4, 6)), "bias": draw((3, 6))}},
        "experts": {"kernel": draw((2, 4, 6))},
        "stem": {"kernel": draw((2, 2, 3, 5))},
        "position": draw((7, 4)),
    }
    tx = make("muon", lambda t: 1.0, muon_rms=0.0)
    updates, _ = tx.update(params, tx.init(params), params)
    direction = lambda g: newton_schulz(g) * np.sqrt(max(1, g.shape[1] / g.shape[0]))  # noqa: E731
    for name, number in (("blocks", 3), ("experts", 2)):
        layer = params[name].get("up", params[name])["kernel"]
        found = updates[name].get("up", updates[name])["kernel"]
        for i in range(number):
            np.testing.assert_allclose(found[i], -direction(layer[i]), rtol=1e-9)
    # A tall matrix is turned over before: the same product.
    tall = params["stem"]["kernel"].reshape(12, 5)
    np.testing.assert_allclose(
        updates["stem"]["kernel"].reshape(12, 5), -newton_schulz(tall.T).T, rtol=1e-9
    )
    first = params["position"] / (abs(params["position"]) + 1e-3)  # Adam's first step
    np.testing.assert_allclose(updates["position"], -first, rtol=1e-9)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_schedule_free_is_its_three_sequences(base):
    schedule = lambda t: 0.1 * jnp.minimum(t / 2, 1.0)  # noqa: E731  (0 at the start)
    tx = make("schedule_free", schedule, schedule_free_base=base, weight_decay=0.3)
    seen, state = run(tx)
    y = z = x = flat(tree(0))
    v, total, most = dict.fromkeys(y, 0.0), 0.0, 0.0
    for t in range(5):
        rate, g = float(schedule(t)), flat(tree(t + 1))
        most = max(most, rate)
        total += most**2
        part = most**2 / total if total else 0.0
        u = g
        if base == "adamw":
            v = {p: 0.95 * v[p] + 0.05 * g[p] ** 2 for p in y}
            u = {p: g[p] / (np.sqrt(v[p] / (1 - 0.95 ** (t + 1))) + 1e-3) for p in y}
        z = {p: z[p] - rate * (u[p] + 0.3 * y[p] * decayed(p)) for p in y}
        x = {p: (1 - part) * x[p] + part * z[p] for p in y}
        y = {p: 0.8 * x[p] + 0.2 * z[p] for p in y}
        for p in y:
            np.testing.assert_allclose(seen[t + 1][p], y[p], rtol=1e-6)
    params = jax.tree.unflatten(jax.tree.structure(tree(0)), jax.tree.leaves(seen[-1]))
    for p, found in flat(wrappers.evaluated(state, params)).items():
        np.testing.assert_allclose(found, x[p], rtol=1e-6)


# --- what the lectures' numbers say ---------------------------------------------------------------

ONE = {"a": {"kernel": np.zeros((1, 1))}}


def constant(value):
    return lambda t, w: {"a": {"kernel": np.full((1, 1), value)}}


@pytest.mark.parametrize(
    ("g", "outside", "inside"),
    [(1e-4, 1 / 1.0001, 1 / np.sqrt(2)), (1e-8, 0.5, 1 / np.sqrt(1e8 + 1))],
)
def test_the_first_step_of_adam_has_the_size_that_eps_leaves(g, outside, inside):
    """D-16: 0.9999 against 0.7071 at 1e-4, and 0.5 against 1e-4 at 1e-8."""
    for given, expected in ((dict(eps=1e-8), outside), (dict(eps=0.0, eps_root=1e-8), inside)):
        seen, _ = run(make("adam", lambda t: 1.0, **given), steps=1, start=ONE, grads=constant(g))
        np.testing.assert_allclose(-seen[1]["a/kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_momentum_has_its_effective_rate_and_is_no_average(momentum):
    """D-14: constant gradients move by eta / (1 - m) a step: 10 and 100 times the rate."""
    tx = make("sgd", lambda t: 0.1, momentum=momentum)
    seen, _ = run(tx, steps=3000, start=ONE, grads=constant(1.0))
    last = (seen[-2]["a/kernel"] - seen[-1]["a/kernel"]).item()
    np.testing.assert_allclose(last, 0.1 / (1 - momentum), rtol=1e-6)


def cosine(t):
    return 0.05 * (1 + jnp.cos(t / 5 * jnp.pi))


WARMUP = functools.partial(jnp.interp, xp=jnp.array([0.0, 2.0]), fp=jnp.array([0.0, 0.1]))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("schedule", "velocity_agrees"),
    [(lambda t: 0.1, True), (decaying, False), (cosine, False), (WARMUP, False)],
    ids=["constant", "decay", "cosine", "warm-up from 0"],
)
def test_momentum_forms_agree_where_they_should(schedule, velocity_agrees, nesterov):
    """D-15: velocity does at a constant rate alone, corrected under any schedule, 0 included."""
    ends = {}
    for form in ("accumulator", "velocity", "corrected"):
        seen, _ = run(make("sgd", schedule, momentum_form=form, nesterov=nesterov), steps=8)
        ends[form] = np.concatenate([x.ravel() for x in seen[-1].values()])
    np.testing.assert_allclose(ends["corrected"], ends["accumulator"], rtol=1e-9)
    assert np.allclose(ends["velocity"], ends["accumulator"], rtol=1e-6) == velocity_agrees


def test_the_rate_is_nowhere_but_in_the_step_where_it_is_0():
    seen, _ = run(make("sgd", WARMUP, momentum_form="corrected"), steps=1)
    for path, w in seen[0].items():
        np.testing.assert_array_equal(seen[1][path], w)


# --- around the optimiser -------------------------------------------------------------------------


def plateau(window=3, patience=2):
    return wrappers.Plateau(0.5, 0.1, window, patience)


def test_a_plateau_halves_the_rate_after_its_patience():
    losses = [5, 5, 5, 4, 4, 4, 3.95, 3.95, 3.95, 3.95, 3.95, 3.95, 1, 1, 1]
    tx = make("sgd", lambda t: 1.0, momentum=0.0, plateau=plateau())
    seen, state = run(
        tx, steps=15, start=ONE, grads=constant(1.0), values=lambda t: float(losses[t])
    )
    steps = -np.diff([w["a/kernel"].item() for w in seen])
    np.testing.assert_allclose(steps, [1.0] * 11 + [0.5] * 4)  # two means within 0.1 of the best
    assert float(wrappers.rate(state, 1.0)) == 0.5


@pytest.mark.parametrize("at", [3, 0])
def test_a_switch_goes_from_adam_to_sgd(at):
    """At the step that it is told, or where the loss stops to fall, SGD starts from rest."""
    detector = None if at else plateau(window=1, patience=2)
    switch = wrappers.Switch("sgd", 0.5, at, detector)
    seen, state = run(make("adam", switch=switch), steps=6, values=lambda t: 1.0 if t else 2.0)
    adam, _ = run(make("adam"), steps=3)
    for path in adam[0]:
        np.testing.assert_allclose(seen[3][path], adam[3][path], rtol=1e-12)
    velocity = dict.fromkeys(adam[0], 0.0)
    for t in range(3, 6):
        grads = flat(tree(t + 1))
        for path, g in grads.items():
            velocity[path] = 0.9 * velocity[path] + g
            expected = seen[t][path] - 0.5 * decaying(t) * velocity[path]
            np.testing.assert_allclose(seen[t + 1][path], expected, rtol=1e-6)
    assert float(wrappers.rate(state, 1.0)) == 0.5


@pytest.mark.parametrize(("first", "second"), [("adam", "adamw"), ("adamw", "adam")])
def test_of_a_switch_adamw_alone_decays(first, second):
    given = dict(weight_decay=0.3, second_moment="norm")
    seen, _ = run(make(first, switch=wrappers.Switch(second, 1.0, 2, None), **given), steps=3)
    for name, (before, after) in {first: seen[:2], second: seen[2:]}.items():
        decay = 0.3 if name == "adamw" else 0.0
        t = 0 if name == first else 2
        g = flat(tree(t + 1))
        size = np.sqrt(sum(norm(x) ** 2 for x in g.values())) + 1e-3
        for path, w in before.items():
            step = g[path] / size + decay * w * decayed(path)
            np.testing.assert_allclose(after[path], w - decaying(t) * step, rtol=1e-6)


def test_sam_takes_the_gradient_uphill():
    curvature = jax.tree.map(lambda x: jnp.abs(x), tree(3))
    gradient = lambda w, i=0: jax.tree.map(jnp.multiply, curvature, w)  # noqa: E731
    tx = make("sgd", momentum=0.9, sam_rho=0.5)
    params = jax.tree.map(jnp.asarray, tree(0))
    state, truth, velocity = tx.init(params), flat(tree(0)), dict.fromkeys(flat(tree(0)), 0.0)
    for t in range(4):
        g = gradient(params)
        updates, state = tx.update(g, state, params, value=jnp.ones(()), grad_fn=gradient)
        params = optax.apply_updates(params, updates)
        slope = {p: c * truth[p] for p, c in flat(curvature).items()}
        size = np.sqrt(sum((s**2).sum() for s in slope.values()))
        for p, c in flat(curvature).items():
            above = c * (truth[p] + 0.5 * slope[p] / size)
            velocity[p] = 0.9 * velocity[p] + above
            truth[p] = truth[p] - decaying(t) * velocity[p]
            np.testing.assert_allclose(flat(params)[p], truth[p], rtol=1e-9)


def test_sam_at_a_flat_point_stays_a_number():
    zeros = lambda w, i=0: jax.tree.map(lambda x: 0 * x, w)  # noqa: E731
    tx, params = make("sgd", sam_rho=0.5), jax.tree.map(jnp.asarray, tree(0))
    extra = dict(value=jnp.ones(()), grad_fn=zeros)
    updates, _ = tx.update(zeros(params), tx.init(params), params, **extra)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_ema_averages_the_parameters_after_each_step():
    seen, state = run(make("adamw", ema_decay=0.7))
    average = seen[0]
    for after in seen[1:]:
        average = {p: 0.7 * average[p] + 0.3 * after[p] for p in after}
    for path, found in flat(wrappers.evaluated(state, None)).items():
        np.testing.assert_allclose(found, average[path], rtol=1e-12)
    plain, _ = run(make("adamw"))
    for path, w in plain[-1].items():
        np.testing.assert_array_equal(seen[-1][path], w)  # training does not see it


RULES = ((r"head/bias", 0), (r"head/.*", 0.25))


@pytest.mark.parametrize("name", chain.FIRST_ORDER)
def test_rate_rules_freeze_and_slow_down(name):
    decay = 0.3 if name in chain.DECAYED else 0.0
    given = dict(weight_decay=decay, decay_mask=((r".*", True),), factored_dim=2)
    seen, _ = run(make(name, rate_rules=RULES, **given), steps=3)
    plain, _ = run(make(name, **given), steps=3)
    for t in range(4):
        np.testing.assert_array_equal(seen[t]["head/bias"], seen[0]["head/bias"])
    first = [run[1]["head/kernel"] - run[0]["head/kernel"] for run in (seen, plain)]
    np.testing.assert_allclose(first[0], 0.25 * first[1], rtol=1e-9)
    np.testing.assert_allclose(seen[-1]["a/kernel"], plain[-1]["a/kernel"], rtol=1e-12)


def test_a_rule_for_no_parameter_is_refused():
    with pytest.raises(UserError, match=r"rate_rules\[1\] matches no parameter: 'hed/.*'"):
        make("sgd", rate_rules=((r".*/bias", 0.5), (r"hed/.*", 0.0))).init(tree(0))


def test_clipping_has_three_forms():
    params, grads = tree(0), tree(1)
    clipped = {}
    for form in chain.CHOICES["clip_form"]:
        tx = make("sgd", lambda t: 1.0, momentum=0.0, clip_norm=0.3, clip_form=form)
        updates, _ = tx.update(grads, tx.init(params), params)
        clipped[form] = {p: -u for p, u in flat(updates).items()}
    total = np.sqrt(sum(norm(g) ** 2 for g in flat(grads).values()))
    for path, g in flat(grads).items():
        w = flat(params)[path]
        rms = np.sqrt((g**2).mean())
        units = [np.sqrt((x**2).sum(0, keepdims=True)) for x in (w, g)]
        factor = np.minimum(1, 0.3 * np.maximum(units[0], 1e-3) / units[1])
        np.testing.assert_allclose(clipped["global_norm"][path], g * 0.3 / total, rtol=1e-6)
        np.testing.assert_allclose(clipped["block_rms"][path], g * min(1, 0.3 / rms), rtol=1e-6)
        np.testing.assert_allclose(clipped["adaptive"][path], g * factor, rtol=1e-6)


def test_adaptive_clipping_sees_the_layers_of_a_stack():
    draw = np.random.default_rng(0).standard_normal
    stack = {"blocks": {"up": {"kernel": draw((3, 4, 6)), "bias": draw((3, 6))}}}
    params = jax.tree.map(lambda x: 0.1 * draw(x.shape), stack)
    clip = links.clip_adaptively(0.5)
    whole, _ = clip.update(stack, clip.init(params), params)
    for i in range(3):
        one = lambda tree, i=i: {"block": jax.tree.map(lambda x: x[i], tree["blocks"])}  # noqa: E731
        alone, _ = clip.update(one(stack), clip.init(None), one(params))
        jax.tree.map(np.testing.assert_allclose, one(whole), alone)


# --- solvers --------------------------------------------------------------------------------------


def quadratic(seed=0, *, least=0.5):
    """`(f, minimum)` of a convex quadratic over the parameters of `tree`."""
    minimum = jax.tree.map(jnp.asarray, tree(seed + 7))
    size = sum(leaf.size for leaf in jax.tree.leaves(minimum))
    root = np.random.default_rng(seed).standard_normal((size, size)) / np.sqrt(size)
    hessian = jnp.asarray(root @ root.T + least * np.eye(size))

    def value(params):
        away = jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves(jax.tree.map(jnp.subtract, params, minimum))]
        )
        return away @ hessian @ away / 2

    return value, minimum, hessian


def raveled(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def solve(name, value, steps, **given):
    tx = make(name, lambda t: 1.0, **given)
    grad_fn = lambda params, i=0: jax.grad(value)(params)  # noqa: E731
    products = lambda params, v: jax.jvp(grad_fn, (params,), (v,))[1]  # noqa: E731

    @jax.jit
    def step(params, state):
        gradient = grad_fn(params)
        updates, state = tx.update(
            gradient,
            state,
            params,
            value=value(params),
            grad=gradient,
            value_fn=value,
            grad_fn=grad_fn,
            gauss_newton_fn=products,
        )
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, tree(0))
    state, seen = tx.init(params), [params]
    for _ in range(steps):
        params, state = step(params, state)
        seen.append(params)
    return seen


def close(a, b, **kwargs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **kwargs), a, b)


@pytest.mark.parametrize("name", ["newton", "newton_cg", "ggn_cg"])
def test_newton_solves_a_quadratic_in_one_step(name):
    value, minimum, _ = quadratic()
    close(solve(name, value, 1)[1], minimum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["newton", "newton_cg", "ggn_cg"])
def test_damping_is_added_to_the_diagonal(name):
    value, _, hessian = quadratic()
    start, after = solve(name, value, 1, damping=3.0)
    gradient = raveled(jax.grad(value)(start))
    step = np.linalg.solve(hessian + 3 * np.eye(len(hessian)), gradient)
    np.testing.assert_allclose(raveled(start) - raveled(after), step, rtol=1e-4, atol=1e-6)


def test_newton_refuses_what_would_not_fit():
    with pytest.raises(UserError, match="26 x 26 numbers of the Hessian"):
        make("newton", newton_limit=25).init(tree(0))


def test_newton_cg_goes_downhill_where_the_loss_curves_down():
    value = lambda params: -optax.tree.norm(params, squared=True) / 2  # noqa: E731
    start, after = solve("newton_cg", value, 1)
    close(after, jax.tree.map(lambda x: 2 * x, start))  # the gradient itself


def test_coordinate_descent_is_exact_along_one_coordinate_after_another():
    value, minimum, _ = quadratic(least=3.0)
    seen = solve("coordinate_descent", value, 26 * 8)
    for t in range(26):
        before, after = (
            jnp.concatenate([x.ravel() for x in jax.tree.leaves(p)]) for p in seen[t : t + 2]
        )
        assert np.flatnonzero(before != after).tolist() == [t]
        if t < 3:
            assert abs(raveled(jax.grad(value)(seen[t + 1]))[t]) < 1e-9
    close(seen[-1], minimum, rtol=1e-2, atol=1e-2)


def test_lbfgs_minimises_a_quadratic():
    value, minimum, _ = quadratic()
    close(solve("lbfgs", value, 25)[-1], minimum, rtol=1e-3, atol=1e-3)


def test_conjugate_gradients_stop_when_told():
    gradient = {"x": jnp.arange(1.0, 6.0)}
    scale = lambda v: {"x": v["x"] * jnp.arange(1.0, 6.0)}  # noqa: E731
    one = solvers.conjugate_gradients(scale, gradient, 1)["x"]
    np.testing.assert_allclose(one, gradient["x"] * 55 / 225)
    np.testing.assert_allclose(solvers.conjugate_gradients(scale, gradient, 5)["x"], 1, rtol=1e-6)


# --- bad input, and the table ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(name="adm"), "did you mean 'adam'"),
        (dict(name="sgd", momentum_form="velocty"), "optim.momentum_form='velocty'.*'velocity'"),
        (dict(name="schedule_free", b1=0.0), "b1=0.0 must be positive"),
    ],
)
def test_bad_optimisers_are_errors(given, words):
    with pytest.raises(UserError, match=words):
        make(**given)


@pytest.mark.parametrize("name", ["lbfgs", "schedule_free"])
def test_a_plateau_needs_a_rate_to_change(name):
    with pytest.raises(UserError, match=f"plateau cannot slow {name} down"):
        make(name, plateau=plateau())


@pytest.mark.parametrize(("first", "second"), [("lbfgs", "sgd"), ("adam", "newton")])
def test_only_first_order_optimisers_are_switched(first, second):
    with pytest.raises(UserError, match="cannot be switched: choose from sgd"):
        make(first, switch=wrappers.Switch(second, 1.0, 3, None))


@pytest.mark.parametrize("field", sorted(chain.MEANT_FOR))
def test_a_field_without_meaning_is_refused(field):
    """Where it is set; fields that any config sets for its own optimiser are let be."""
    default = getattr(fields("sgd"), field)
    other = {str: "other", tuple: ((r".*", 0.5),), bool: False}.get(type(default), 2)
    for name in chain.NAMES:
        given = fields(name, **{field: other})
        if name in chain.MEANT_FOR[field] or not other:
            chain.check_meaning(given, fields(name), (name,))
        else:
            adam = "adam takes no weight_decay (got 2): use adamw."
            words = adam if (name, field) == ("adam", "weight_decay") else f"optim.{field}={other}"
            with pytest.raises(UserError, match=re.escape(words)):
                chain.check_meaning(given, fields(name), (name,))
    chain.check_meaning(fields(name), fields(name), (name,))


@pytest.mark.parametrize("field", ["momentum", "weight_decay"])
def test_lars_of_the_lecture_has_neither_momentum_nor_decay(field):
    given = fields("lars", lars_form="lecture", **{field: 0.5})
    with pytest.raises(UserError, match=f"optim.{field}=0.5 has no meaning"):
        chain.check_meaning(given, fields("lars"), ("lars",))


def test_the_table_says_how_each_parameter_is_treated():
    given = fields("muon", weight_decay=0.1, rate_rules=RULES)
    rows = {row.pop("path"): row for row in chain.parameter_table(given, tree(0))}
    assert {path: row["optimiser"] for path, row in rows.items()} == {
        **dict.fromkeys(("a/bias", "head/bias", "head/kernel"), "adam"),
        "a/kernel": "muon",
    }
    assert rows["head/bias"] == dict(shape=(2,), optimiser="adam", rate=0, decay=False, trust=False)
    assert [rows[path]["rate"] for path in ("a/kernel", "head/kernel")] == [1.0, 0.25]
    assert [path for path, row in rows.items() if row["decay"]] == ["a/kernel", "head/kernel"]


@pytest.mark.parametrize("name", chain.NAMES)
def test_the_state_starts_from_parameters_in_their_boxes(name):
    box = lambda x: nn.LogicallyPartitioned(x, ("embed",) * x.ndim)  # noqa: E731
    boxed = jax.tree.map(box, jax.tree.map(jnp.asarray, tree(0)))
    tx = make(name, factored_dim=2, rate_rules=() if name not in chain.FIRST_ORDER else RULES)
    close(nn.unbox(tx.init(boxed)), tx.init(jax.tree.map(jnp.asarray, tree(0))))
