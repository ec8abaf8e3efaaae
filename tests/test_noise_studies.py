"""The studies of noisy, stale and uneven gradients: laws, and claims on made-up tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsdl.analysis.parameter_server import simulate
from lsdl.models.alexnet import AlexNet
from lsdl.optim.groups import path
from lsdl.studies import digits, gradient_noise, lars_norms, stale_gradients, staleness
from tests.judging import judged

# --- digits ---------------------------------------------------------------------------------------


def test_an_epoch_has_every_digit_once_and_its_own_order():
    id_TB = digits.batches(0, 12, size=5, steps=5)  # two batches an epoch, two digits left over
    assert id_TB.shape == (5, 5)
    assert all(len(set(id_TB[t : t + 2].ravel())) == 10 for t in (0, 2))
    assert (id_TB[:2] != id_TB[2:4]).any()
    assert (id_TB == digits.batches(0, 12, size=5, steps=5)).all()


def test_digits_are_standardised_by_the_train_split():
    train, valid = digits.load()
    assert (train.x_ND.shape, valid.x_ND.shape) == ((1257, 64), (270, 64))
    np.testing.assert_allclose(train.x_ND.mean(0), 0, atol=1e-4)
    assert np.median(train.x_ND.std(0)) == pytest.approx(1, abs=0.01)


# --- LARS norms -----------------------------------------------------------------------------------


def test_the_printed_norms_follow_from_the_initialisation_alone():
    """E|w|^2 = count std^2: what the printed columns are, with their labels put right."""
    shapes = jax.eval_shape(
        lambda: AlexNet(1000).init(jax.random.key(0), jnp.zeros((1, 227, 227, 3)), train=False)
    )["params"]
    size = {path(keys): x.size for keys, x in jax.tree_util.tree_leaves_with_path(shapes)}
    printed = lars_norms.printed("norm")
    for (layer, module), (weights, biases) in zip(lars_norms.MODULES.items(), printed, strict=True):
        std, bias = (0.005, 0.1) if layer in ("fc6", "fc7") else (0.01, 0.01)
        assert weights == pytest.approx(std * size[f"{module}/kernel"] ** 0.5, rel=5e-3)
        assert biases == pytest.approx(bias * size[f"{module}/bias"] ** 0.5, rel=5e-3)


def test_the_printed_ratios_follow_but_for_one():
    norm, gradient, ratio = (lars_norms.printed(n) for n in ("norm", "gradient", "ratio"))
    off = np.argwhere(np.abs(norm / gradient / ratio - 1) > 0.05)
    assert off.tolist() == [[list(lars_norms.TABLE).index("conv5"), 1]]


def test_claims_of_the_norms():
    norm = lars_norms.printed("norm")
    row = {"draws": 2, "weights": np.stack([norm[:, 0]] * 2, 1), "biases": norm[:, 1:] * [[1, 1]]}
    assert all(claim.holds for claim in judged(lars_norms, [row]).values())
    row["weights"][3] *= [1.02, 1.0]
    found = judged(lars_norms, [row])["weights"]
    assert (found.measured, found.n, found.holds) == (pytest.approx(0.01), 2, False)
    row["weights"], row["biases"] = row["biases"], row["weights"]
    assert judged(lars_norms, [row])["labels"].measured == pytest.approx(0, abs=0.01)


# --- gradient noise -------------------------------------------------------------------------------


def noise_row(**changes):
    sizes = np.array(gradient_noise.BATCH_SIZES)
    return {
        "epochs": 12,
        "noise_scale": [[30.0, 300.0, 900.0]] * 2,
        "cosine": [[0.04, 0.03, 0.01]] * 2,
        "loss": [[2.3, 0.1, 0.01]] * 2,
        "variance_init": [(5 / sizes).tolist()] * 2,
        "cosine_init": [gradient_noise.predicted(30.0, sizes).tolist()] * 2,
        "within_90_init": [[1.0] * len(sizes)] * 2,
        "half_ratio_init": [0.5, 0.5],
        "two_batch_init": [30.0, 31.0],
    } | changes


def test_claims_of_the_noise():
    found = judged(gradient_noise, [noise_row()])
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert found["variance"].measured == pytest.approx(-1)
    assert found["growth"].measured == pytest.approx(30)
    assert found["redundancy"].measured == pytest.approx(0.25)
    assert found["two_batches"].measured == pytest.approx(61 / 60)
    found = judged(gradient_noise, [noise_row(noise_scale=[[30.0, 60.0, 90.0]] * 2)])
    assert not found["growth"].holds


# --- batches whose gradients are old --------------------------------------------------------------


def test_passes_are_counted_between_their_ends():
    assert stale_gradients.passes_to([1.0, 0.4, 0.1], 0.2) == pytest.approx(1.5)
    assert stale_gradients.passes_to([1.0, 0.1], 0.1) == pytest.approx(1)
    assert stale_gradients.passes_to([1.0, 1e3], 0.1) == np.inf


def test_claims_of_the_passes():
    def curve(passes):  # 10^(-p / passes): 0.1 after `passes`
        return (10.0 ** (-np.arange(20) / passes)).tolist()

    rates = stale_gradients.RATES
    table = []
    for i, (size, passes) in enumerate({1: 2, 8: 2.5, 64: 3, 1257: 8}.items()):
        slow = [curve(50)] * len(rates)
        slow[2 * i] = curve(passes)
        table.append({"batch_size": size, "loss": [slow, slow]})
    small = np.array(stale_gradients.STEP_RATES)
    table.append({"rates": small.tolist(), "distance": [(3 * small**2).tolist()] * 2})
    found = judged(stale_gradients, table[::-1])
    assert found["full_batch"].measured == pytest.approx(4)
    assert found["order"].measured == pytest.approx(0.5)
    assert found["second_order"].measured == pytest.approx(2)
    assert found["sublinear"].measured == pytest.approx(0.58, abs=0.02)


# --- the parameter server -------------------------------------------------------------------------


def test_claims_of_the_server():
    chance = {("SGD 0.2", 16), ("momentum 0.02", 16), ("SGD 0.05", 64)}
    table = [
        {
            "optimizer": name,
            "hidden": [128],
            "staleness": list(staleness.STALENESS),
            "accuracy": [
                [10.0, 12.0] if (name, s) in chance else [97.0 - s / 16, 95.0 - s / 16]
                for s in staleness.STALENESS
            ],
        }
        for name in staleness.OPTIMIZERS
    ]
    table.append(table[0] | {"hidden": [128, 128], "accuracy": [[0.0, 0.0]] * 5})  # of no claim
    found = judged(staleness, table)
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert found["mild"].measured == pytest.approx(0.25)
    assert found["adagrad_16"].measured == pytest.approx(1)
    assert found["sgd_16"].measured == pytest.approx(11)
    assert found["adagrad_64"].measured == pytest.approx(81)


def test_a_lag_is_a_staleness_that_a_program_can_be_mapped_over():
    def run(staleness, lag=None):
        return simulate(
            jnp.array(1.0),
            jnp.ones((6, 1)),
            loss=lambda x, curvature: curvature * x**2 / 2,
            optimizer=optax.sgd(0.5),
            joined=1,
            staleness=staleness,
            lag=lag,
        )

    lags = [0, 1, 3]
    mapped = jax.vmap(lambda lag: run(3, lag))(jnp.array(lags))
    for i, lag in enumerate(lags):
        alone = run(lag)
        np.testing.assert_allclose(mapped.params[i], alone.params, rtol=1e-6)
        assert mapped.staleness_RN[i].tolist() == alone.staleness_RN.tolist()
