"""Curvature, where the whole matrix is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.analysis import curvature
from lsdl.errors import UserError
from lsdl.sharding import mesh as meshes

# Shape letters: B batch, D inputs, H hidden, C classes, N parameters.
D, H, C = 8, 8, 4
KEY = jax.random.key(3)


def outputs(params, batch):
    hidden_BH = jnp.tanh(batch["x"] @ params["in"] + params["bias"][None])
    return hidden_BH @ params["out"]


def loss_of(logits_BC, batch):
    loss_B = -jax.nn.log_softmax(logits_BC)[jnp.arange(len(logits_BC)), batch["y"]]
    return (loss_B * batch["weight"]).sum(), batch["weight"].sum()


def loss(params, batch):
    return loss_of(outputs(params, batch), batch)


def net(scale=1.0):
    draw = np.random.default_rng(0).normal
    make = lambda *shape: jnp.asarray(scale * draw(size=shape), jnp.float32)  # noqa: E731
    return {"in": make(D, H), "bias": make(H), "out": make(H, C)}


def batches(count=3, size=8):
    draw = np.random.default_rng(1)
    found = []
    for i in range(count):
        weight_B = np.ones(size, np.float32)
        weight_B[: 2 * (i == count - 1)] = 0  # rows that only fill the last one
        x_BD = np.float32(draw.normal(size=(size, D)))
        found.append({"x": x_BD, "y": draw.integers(C, size=size), "weight": weight_B})
    return jax.tree.map(jnp.asarray, found)


def one(found):
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


@pytest.fixture(scope="module")
def exact():
    """{kind: the whole matrix}, of all examples at once, in float64."""
    with jax.enable_x64(True):
        wide = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
        params, batch = jax.tree.map(wide, (net(), one(batches())))
        flat, unravel = ravel_pytree(params)
        mean = lambda v: loss(unravel(v), batch)[0] / batch["weight"].sum()  # noqa: E731
        jacobian = jax.jacrev(lambda v: outputs(unravel(v), batch))(flat)
        chance_BC = jax.nn.softmax(outputs(params, batch))
        inner = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(chance_BC)
        inner *= batch["weight"][:, None, None]
        total = batch["weight"].sum()

        @jax.jit
        @jax.grad
        def gradient(v, i):
            return loss(unravel(v), jax.tree.map(lambda x: x[i][None], batch))[0]

        rows = [gradient(flat, i) for i in range(len(batch["y"]))]
        return {
            "hessian": np.asarray(jax.jit(jax.hessian(mean))(flat)),
            "gauss_newton": np.asarray(
                jnp.einsum("bcn,bcd,bdm->nm", jacobian, inner, jacobian) / total
            ),
            "empirical_fisher": np.asarray(sum(jnp.outer(g, g) for g in rows) / total),
        }


def product_of(kind, params=None, **options):
    made = {
        "hessian": curvature.hessian(loss),
        "gauss_newton": curvature.gauss_newton(outputs, loss_of),
        "empirical_fisher": curvature.empirical_fisher(loss),
    }[kind]
    return curvature.mean(made, net() if params is None else params, batches(), **options)


KINDS = ("hessian", "gauss_newton", "empirical_fisher")


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_the_whole_matrixs(kind, exact):
    vector = curvature.random_like(net(), KEY)
    found = ravel_pytree(product_of(kind)(vector))[0]
    wanted = exact[kind] @ np.asarray(ravel_pytree(vector)[0], np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_eigenvalues_are_the_whole_matrixs(kind, exact):
    found = curvature.eigenpairs(product_of(kind), net(), top=3, key=KEY)
    values, vectors = np.linalg.eigh(exact[kind])
    np.testing.assert_allclose(found.values, values[:-4:-1], rtol=1e-4)
    for i, vector in enumerate(found.vectors):
        cosine = np.asarray(ravel_pytree(vector)[0]) @ vectors[:, -1 - i]
        assert abs(cosine) == pytest.approx(1, abs=1e-3)
    assert found.smallest >= values[0] - 1e-4 * values[-1]


def test_residuals_are_what_they_are_called(exact):
    found = curvature.eigenpairs(product_of("hessian"), net(), top=3, key=KEY, tolerance=0.03)
    assert len(found.lanczos.diagonal_K) < 30
    for value, residual, vector in zip(found.values, found.residuals, found.vectors, strict=True):
        flat = np.asarray(ravel_pytree(vector)[0], np.float64)
        actual = np.linalg.norm(exact["hessian"] @ flat - value * flat)
        assert actual == pytest.approx(residual, abs=2e-5)
        assert residual <= 0.03 * found.values[0]


def test_all_steps_find_the_whole_spectrum(exact):
    number = curvature.size(net())
    found = curvature.eigenpairs(product_of("hessian"), net(), top=number, key=KEY, steps=number)
    values = np.linalg.eigvalsh(exact["hessian"])[::-1]
    np.testing.assert_allclose(found.values, values, atol=1e-5 * values[0])
    basis = np.stack([np.asarray(ravel_pytree(v)[0]) for v in found.vectors])
    np.testing.assert_allclose(basis @ basis.T, np.eye(number), atol=1e-5)


def diagonal(values):
    values = jnp.asarray(values, jnp.float32)
    return jax.jit(lambda vector: {"a": values * vector["a"]}), {"a": values}


def test_an_eigenvalue_is_found_as_often_as_it_is_there():
    product, like = diagonal([5, 5, 5, 2, 2, -1, 0, 0])
    found = curvature.eigenpairs(product, like, top=8, key=KEY, steps=8)
    np.testing.assert_allclose(found.values, [5, 5, 5, 2, 2, 0, 0, -1], atol=1e-5)
    flat, like = diagonal([0, 0, 0])
    assert curvature.eigenpairs(flat, like, top=3, key=KEY).values.tolist() == [0, 0, 0]


def test_the_condition_is_exact_at_the_end_and_a_bound_before():
    product, like = diagonal(np.linspace(0.25, 10, 24) * (-1) ** np.arange(24))
    conditions = [
        curvature.lanczos(product, curvature.random_like(like, KEY), steps, key=KEY).condition()
        for steps in (3, 8, 16, 24)
    ]
    assert conditions == sorted(conditions)
    assert conditions[-1] == pytest.approx(40, rel=1e-4)
    singular, like = diagonal([3, 1, 0, 0])
    found = curvature.lanczos(singular, curvature.random_like(like, KEY), 4, key=KEY)
    assert found.condition() > 1e6


def test_the_trace_is_within_its_error_and_the_error_is_hutchinsons(exact):
    number = curvature.size(net())
    matrix = exact["hessian"]
    samples = 60
    mean, error = curvature.trace(product_of("hessian"), net(), samples=samples, key=KEY)
    off = matrix - np.diag(np.diag(matrix))
    assert error == pytest.approx(np.sqrt(2 * (off**2).sum() / samples), rel=0.3)
    assert abs(mean - np.trace(matrix)) < 3.5 * error
    product, like = diagonal(np.arange(number))
    assert curvature.trace(product, like, samples=2, key=KEY)[1] == pytest.approx(0, abs=1e-3)
    with pytest.raises(UserError, match="2 or more"):
        curvature.trace(product, like, samples=1, key=KEY)


def test_the_density_is_the_spectrums(exact):
    values = np.linalg.eigvalsh(exact["hessian"])
    number, width = len(values), 0.05 * values[-1]
    found = curvature.spectrum(product_of("hessian"), net(), starts=12, steps=16, key=KEY)
    at_T = np.linspace(values[0] - 5 * width, values[-1] + 5 * width, 400)
    density_T = found.density(at_T, width)
    step = at_T[1] - at_T[0]
    assert density_T.sum() * step == pytest.approx(1, abs=1e-3)
    away = (at_T[:, None] - values) / width
    wanted_T = np.exp(-(away**2) / 2).sum(1) / (number * width * np.sqrt(2 * np.pi))
    # In total variation; what is left is the spread over random starts.
    assert abs(density_T - wanted_T).sum() * step / 2 < 0.1
    mean, error = found.trace()
    assert abs(mean - np.trace(exact["hessian"])) < 3.5 * error


def test_a_rotation_of_the_parameters_changes_no_eigenvalue(exact):
    flat, unravel = ravel_pytree(net())
    number = flat.size
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(number, number)))[0]
    rotation = jnp.asarray(rotation, jnp.float32)
    rotated = curvature.hessian(lambda v, batch: loss(unravel(rotation @ v), batch))
    product = curvature.mean(rotated, rotation.T @ flat, batches())
    found = curvature.eigenpairs(product, flat, top=3, key=KEY)
    np.testing.assert_allclose(
        found.values, np.linalg.eigvalsh(exact["hessian"])[:-4:-1], rtol=1e-4
    )


SPECS = {"in": P("fsdp", "tensor"), "bias": P("tensor"), "out": P("tensor", "fsdp")}


LAYOUTS = [("hessian", "data=8"), ("hessian", "fsdp=4,data=2")]
LAYOUTS += [(kind, "data=2,fsdp=2,tensor=2") for kind in KINDS]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_every_layout_gives_the_same_curvature(kind, layout, exact):
    mesh = meshes.make_mesh(meshes.parse_mesh(layout, 8), jax.devices())
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    params = {name: place(x, SPECS[name]) for name, x in net().items()}
    split = [{k: place(x, P(("data", "fsdp"))) for k, x in b.items()} for b in batches()]
    made = {
        "hessian": curvature.hessian(loss),
        "gauss_newton": curvature.gauss_newton(outputs, loss_of),
        "empirical_fisher": curvature.empirical_fisher(loss),
    }[kind]
    product = curvature.mean(made, params, split)
    found = curvature.eigenpairs(product, params, top=2, key=KEY)
    alone = curvature.eigenpairs(product_of(kind), net(), top=2, key=KEY)
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-5)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(exact[kind])[:-3:-1], rtol=1e-4)
    for name, leaf in found.lanczos.basis.items():
        wanted = NamedSharding(mesh, P(None, *SPECS[name]))
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name


def test_a_loss_that_is_not_finite_is_told():
    product = product_of("hessian", params=jax.tree.map(lambda x: x * jnp.nan, net()))
    with pytest.raises(UserError, match="not finite"):
        curvature.eigenpairs(product, net(), top=1, key=KEY)
