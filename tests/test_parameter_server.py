"""The simulated parameter server against plain SGD, the delayed recursion and a client in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsdl.analysis.parameter_server import make_shards, simulate
from lsdl.errors import UserError
from lsdl.state import stream

EXAMPLES, WIDTH = 24, 5
DRAW = np.random.default_rng(0)
X_ED = DRAW.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
Y_E = DRAW.normal(size=EXAMPLES).astype(np.float32)
PARAMS = {"w": jnp.array(DRAW.normal(size=WIDTH), jnp.float32), "b": jnp.array(0.3)}
PAPER_ADAGRAD = optax.adagrad(0.2, initial_accumulator_value=0.0, eps=0.0)


def regression(params, ids):
    """Half the mean squared error; `ids` of the examples: `(B,)`."""
    error = jnp.array(X_ED)[ids] @ params["w"] + params["b"] - jnp.array(Y_E)[ids]
    return (error**2).mean() / 2


def square(params, curvature):
    return curvature * params**2 / 2


def reading(params, ids):
    """Shows which batch was read, and moves nothing."""
    return ids.astype(jnp.float32) @ 100.0 ** jnp.arange(len(ids)) + 0 * params


def delayed(rate, *, staleness, updates, start=1.0, **options):
    return simulate(
        jnp.array(start),
        jnp.ones((updates, 1)),
        loss=square,
        optimizer=optax.sgd(rate),
        joined=1,
        staleness=staleness,
        **options,
    )


def shards(replicas, *, batch_size=2, epochs=3):
    options = dict(replicas=replicas, batch_size=batch_size, epochs=epochs)
    return make_shards(jax.random.key(1), EXAMPLES, **options)


def plain(optimizer, batches):
    """Parameters and losses of optax alone, one update for each batch."""
    params, opt_state, losses = PARAMS, optimizer.init(PARAMS), []
    step = jax.jit(jax.value_and_grad(regression))
    for ids in batches:
        loss, gradient = step(params, ids)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, opt_state, np.array(losses)


def assert_close(actual, expected, tolerance=1e-6):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- fresh gradients: plain SGD -------------------------------------------------------------------

OPTIMIZERS = {"sgd": optax.sgd(0.1), "momentum": optax.sgd(0.05, 0.9), "adagrad": PAPER_ADAGRAD}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_one_replica_without_staleness_is_plain_sgd(optimizer):
    id_RNB = shards(1)
    run = simulate(PARAMS, id_RNB, loss=regression, optimizer=optimizer, joined=1, staleness=0)
    params, opt_state, losses = plain(optimizer, id_RNB[:, 0])
    assert_close((run.params, run.opt_state, run.loss_RN[:, 0]), (params, opt_state, losses))
    assert not run.staleness_RN.any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_synchronous_replicas_are_one_with_their_batches_in_one(optimizer):
    id_RNB = shards(4)
    run = simulate(PARAMS, id_RNB, loss=regression, optimizer=optimizer, joined=4, staleness=0)
    params, opt_state, losses = plain(optimizer, id_RNB.reshape(len(id_RNB), -1))
    assert_close((run.params, run.opt_state, run.loss_RN.mean(1)), (params, opt_state, losses))
    assert not run.staleness_RN.any()


def test_fresh_gradients_in_turn_are_plain_sgd_on_the_batches_in_turn():
    id_RNB = shards(4)
    run = simulate(PARAMS, id_RNB, loss=regression, optimizer=PAPER_ADAGRAD, joined=1, staleness=0)
    params, opt_state, losses = plain(PAPER_ADAGRAD, id_RNB.reshape(-1, id_RNB.shape[-1]))
    assert_close((run.params, run.opt_state, run.loss_RN.ravel()), (params, opt_state, losses))


def test_adagrad_divides_by_the_root_of_all_squares_so_far():
    """Dean et al. 2012, section 4.1: rate_i = gamma / sqrt(sum of the squared gradients)."""
    run = simulate(
        jnp.array([2.0, -3.0]),
        jnp.ones((4, 1)),
        loss=lambda x, scale: (scale * x**2 * jnp.array([1.0, 50.0])).sum() / 2,
        optimizer=PAPER_ADAGRAD,
        joined=1,
        staleness=1,
    )
    x, squares = [np.array([2.0, -3.0])] * 2, np.zeros(2)  # of the last step and of this one
    for _ in range(4):
        gradient = x[-2] * [1.0, 50.0]
        squares = squares + gradient**2
        x.append(x[-1] - 0.2 * gradient / np.sqrt(squares))
    assert_close(run.params, x[-1])


# --- stale gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("staleness", "trajectory"),
    [
        # x' = x - x_of_tau_ago / 2, from 1, by hand
        (1, [1, 1 / 2, 0, -1 / 4, -1 / 4, -1 / 8, 0]),
        (2, [1, 1 / 2, 0, -1 / 2, -3 / 4, -3 / 4, -1 / 2]),
    ],
)
def test_the_delayed_trajectory_on_a_parabola(staleness, trajectory):
    for updates in (3, 6):
        run = delayed(0.5, staleness=staleness, updates=updates)
        assert_close(run.params, trajectory[updates])
    waits = np.minimum(np.arange(6), staleness)
    assert run.staleness_RN[:, 0].tolist() == waits.tolist()
    assert_close(run.loss_RN[:, 0], np.array(trajectory)[np.arange(6) - waits] ** 2 / 2)


@pytest.mark.parametrize("staleness", [0, 1, 2, 5, 16])
def test_the_largest_stable_rate_of_a_delayed_gradient(staleness):
    """x_{t+1} = x_t - c x_{t-tau} has the modes z^{tau+1} - z^tau + c = 0.

    On the unit circle, z = e^{iw}, the moduli give c = 2 sin(w/2), the phases tau w + (pi + w)/2 =
    pi at the smallest w: the limit is c = 2 sin(pi / (2 (2 tau + 1))).
    """
    limit = 2 * np.sin(np.pi / (2 * (2 * staleness + 1)))

    def radius(rate):
        modes = np.zeros(staleness + 2)
        modes[0], modes[1] = 1, -1
        modes[-1] += rate
        return np.abs(np.roots(modes)).max()

    assert radius(limit) == pytest.approx(1)
    assert radius(0.95 * limit) < 1 < radius(1.05 * limit)
    assert abs(delayed(0.95 * limit, staleness=staleness, updates=4000).params) < 1e-3
    assert not abs(delayed(1.05 * limit, staleness=staleness, updates=4000).params) < 1e3


def test_drawn_staleness_stays_within_its_bound_and_follows_the_key():
    run = functools.partial(delayed, 0.1, staleness=3, updates=200)
    stale = np.array(run(key=jax.random.key(0)).staleness_RN)
    assert set(stale[3:, 0].tolist()) == {0, 1, 2, 3}
    assert (stale[:3, 0] <= np.arange(3)).all()
    assert_close(run(key=jax.random.key(0)), run(key=jax.random.key(0)), 0)
    assert (stale != run(key=jax.random.key(1)).staleness_RN).any()


# --- the client's periods -------------------------------------------------------------------------


def client(id_RNB, *, joined, lags, fetch_every, push_every, rate, local_rate):
    """The server and the paper's client with lists and loops, in float64."""
    x_ED, y_E = np.c_[X_ED, np.ones(EXAMPLES)].astype(float), Y_E.astype(float)
    versions = [np.append(np.array(PARAMS["w"], float), float(PARAMS["b"]))]
    replicas = id_RNB.shape[1]
    copy, origin, accrued = ([None] * replicas for _ in range(3))
    waiting, losses, stale = [[] for _ in range(replicas)], [], {}
    lags = iter(lags)
    for i, id_NB in enumerate(id_RNB):
        for first in range(0, replicas, joined):
            lag, group = int(next(lags)), range(first, first + joined)
            for n in group:
                if i % fetch_every == 0:
                    origin[n] = max(len(versions) - 1 - lag, 0)
                    copy[n] = versions[origin[n]]
                x_BD = x_ED[id_NB[n]]
                error_B = x_BD @ copy[n] - y_E[id_NB[n]]
                losses.append((error_B**2).mean() / 2)
                gradient = x_BD.T @ error_B / len(error_B)
                accrued[n] = gradient + (accrued[n] if waiting[n] else 0)
                waiting[n].append((i, origin[n]))
                copy[n] = copy[n] - local_rate * gradient
            if (i + 1) % push_every == 0:
                for n in group:
                    stale |= {(j, n): len(versions) - 1 - version for j, version in waiting[n]}
                    waiting[n] = []
                versions.append(versions[-1] - rate * np.mean([accrued[n] for n in group], axis=0))
    stale_RN = np.array([[stale[i, n] for n in range(replicas)] for i in range(len(id_RNB))])
    return versions[-1], np.array(losses).reshape(-1, replicas), stale_RN


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(
    ("joined", "staleness", "fetch_every", "push_every"),
    [(1, 3, 1, 1), (1, 2, 3, 1), (1, 2, 1, 3), (2, 1, 3, 2), (2, 3, 2, 3), (4, 2, 2, 2)],
)
def test_the_program_is_the_papers_client(joined, staleness, fetch_every, push_every, drawn):
    id_RNB = shards(4, batch_size=1, epochs=2)
    key = jax.random.key(5)
    turns = len(id_RNB) * 4 // joined
    periods = dict(joined=joined, fetch_every=fetch_every, push_every=push_every, local_rate=0.07)
    run = simulate(
        PARAMS,
        id_RNB,
        loss=regression,
        optimizer=optax.sgd(0.03),
        staleness=staleness,
        key=key if drawn else None,
        **periods,
    )
    lags = np.full(turns, staleness)
    if drawn:
        lags = jax.random.randint(stream(key, "staleness"), (turns,), 0, staleness + 1)
    last, losses, stale = client(np.array(id_RNB), lags=lags, rate=0.03, **periods)
    assert_close(np.append(run.params["w"], run.params["b"]), last, 1e-5)
    assert_close(run.loss_RN, losses, 1e-5)
    assert run.staleness_RN.tolist() == stale.tolist()


def test_a_warm_start_goes_on_from_synchronous_steps():
    id_RNB = shards(4)
    run = functools.partial(simulate, loss=regression, optimizer=PAPER_ADAGRAD)
    warm = run(PARAMS, id_RNB[:4], joined=4, staleness=0)
    both = run(warm.params, id_RNB[4:], joined=4, staleness=0, opt_state=warm.opt_state)
    whole = run(PARAMS, id_RNB, joined=4, staleness=0)
    assert_close((both.params, both.opt_state), (whole.params, whole.opt_state))
    stale = run(warm.params, id_RNB[4:], joined=1, staleness=3, opt_state=warm.opt_state)
    assert stale.staleness_RN.tolist() == [[0, 1, 2, 3], *[[3] * 4] * (len(id_RNB) - 5)]


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_replica_reads_its_own_shard_and_every_example_once_an_epoch(replicas):
    id_RNB = np.array(shards(replicas))
    epoch_ENM = id_RNB.reshape(3, -1, replicas, 2).swapaxes(1, 2).reshape(3, replicas, -1)
    for shard_NM in epoch_ENM:
        assert sorted(shard_NM.ravel().tolist()) == list(range(EXAMPLES))
        for n in range(replicas):
            assert set(shard_NM[n].tolist()) == set(epoch_ENM[0, n].tolist())
    assert (epoch_ENM[0] != epoch_ENM[1]).any()
    assert (id_RNB == shards(replicas)).all()
    for joined in {1, replicas}:
        run = simulate(
            jnp.array(0.0),
            id_RNB,
            loss=reading,
            optimizer=optax.sgd(1.0),
            joined=joined,
            staleness=2,
        )
        assert run.loss_RN.tolist() == (id_RNB @ [1, 100]).tolist()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(joined=3), "joined=3 does not divide the 4 replicas"),
        (dict(joined=0), "joined=0 does not divide"),
        (dict(staleness=-1), "staleness=-1 is negative"),
        (dict(fetch_every=0), "fetch_every=0"),
        (dict(push_every=0), "push_every=0"),
        (dict(push_every=5), "9 rounds are no multiple of push_every=5.*use 5 rounds"),
    ],
)
def test_counts_that_do_not_fit_are_refused(options, sentence):
    options = dict(joined=1, staleness=0) | options
    with pytest.raises(UserError, match=sentence):
        simulate(PARAMS, shards(4), loss=regression, optimizer=optax.sgd(0.1), **options)


def test_shards_of_unequal_size_are_refused():
    with pytest.raises(UserError, match=r"24 examples are no multiple of 5 replicas .* use 20"):
        shards(5)
