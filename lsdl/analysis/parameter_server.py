"""Asynchronous training with a parameter server, simulated step by step: a study tool.

lsdl itself trains synchronously. This is DistBelief's Downpour SGD as one deterministic program:
replicas read their own shards and take turns, so that how stale a gradient is can be chosen, and
is measured, where on a cluster it would be an accident of timing.

Time goes in rounds, in which every replica computes one gradient. Within a round the server takes
the gradients in the replicas' order, `joined` of them at a time, and averages those:

joined=1                      each gradient as it comes: asynchronous. Replicas of equal speed have
                              staleness=replicas - 1, a network adds to it
joined=replicas, staleness=0  synchronous: plain SGD on the union of the replicas' batches

Source: Dean et al. 2012, "Large Scale Distributed Deep Networks", section 4.1 and its appendix.

Shape letters: R rounds, N replicas, J joined replicas, G = N / J groups of them, T = R G turns,
B batch, E epochs, M examples of a shard.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lsdl.errors import UserError
from lsdl.state import stream

map_ = jax.tree.map


class Run(NamedTuple):
    """What `simulate` returns."""

    params: Any  # the server's, after the last update
    opt_state: Any
    loss_RN: jax.Array  # of each gradient's batch, at the parameters it was computed on
    staleness_RN: jax.Array  # server updates between those parameters and the gradient's own update


class _Server(NamedTuple):
    params: Any
    opt_state: Any
    history: Any  # version v of the parameters is at v % the leading dim
    version: jax.Array


class _Replicas(NamedTuple):
    params: Any  # their copies
    version: jax.Array  # of the server's parameters that were fetched last
    gradient: Any  # what was accrued since the last push, a mean over the joined


def make_shards(
    key: jax.Array, num_examples: int, *, replicas: int, batch_size: int, epochs: int
) -> jax.Array:
    """Ids of the examples in each batch, `(R, N, B)`: R = epochs x examples / (replicas x batch).

    The examples are dealt out once; every epoch each replica reads all of its own in a new order.
    """
    if num_examples % (replicas * batch_size):
        raise UserError(
            f"{num_examples} examples are no multiple of {replicas} replicas x batches of "
            f"{batch_size}: use {num_examples - num_examples % (replicas * batch_size)} of them."
        )
    shard_NM = jax.random.permutation(stream(key, "shards"), num_examples).reshape(replicas, -1)

    def epoch(i):
        order = stream(key, "epoch", i)
        return jax.random.permutation(order, shard_NM, axis=1, independent=True)

    id_ENRB = jax.vmap(epoch)(jnp.arange(epochs)).reshape(epochs, replicas, -1, batch_size)
    return id_ENRB.swapaxes(1, 2).reshape(-1, replicas, batch_size)


@functools.partial(
    jax.jit,
    static_argnames=("loss", "optimizer", "joined", "staleness", "fetch_every", "push_every"),
)
def simulate(
    params: Any,
    batches: Any,
    *,
    loss: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    joined: int,
    staleness: int,
    key: jax.Array | None = None,
    lag: jax.Array | None = None,
    fetch_every: int = 1,
    push_every: int = 1,
    local_rate: float | jax.Array = 0.0,
    opt_state: Any = None,
) -> Run:
    """Train `params` with `optimizer` on the server; one jitted program.

    `loss(params, batch)` is a batch's mean; the leaves of `batches` are `(R, N, ...)`, those of a
    batch `(...)`: the examples, or the ids that `loss` looks up. A turn's gradients are of the
    parameters of `staleness` updates ago (of the first ones if there were fewer), or with a `key`
    of 0 to `staleness` ago, drawn for each turn; or of `lag` ago, a number of at most `staleness`,
    over which a program can be vmapped. `staleness + 1` versions are kept.

    A replica fetches before every `fetch_every`-th batch, in between steps its copy by `local_rate`
    times its gradient, and pushes the sum of its gradients after every `push_every`-th batch: the
    paper's n_fetch, learning rate of the client, and n_push. For the paper's warm start give the
    `params` and `opt_state` of a synchronous run. Raises `UserError` for counts that do not fit.

    Source: Dean et al. 2012, section 4.1 and the appendix's client; the server's Adagrad there is
    `optax.adagrad(rate, initial_accumulator_value=0.0, eps=0.0)`.
    """
    rounds, replicas = jax.tree.leaves(batches)[0].shape[:2]
    _check(rounds, replicas, joined, staleness, fetch_every, push_every)
    groups = replicas // joined
    turns = rounds * groups
    if key is None:
        lag_T = jnp.full(turns, staleness if lag is None else lag)
    else:
        lag_T = jax.random.randint(stream(key, "staleness"), (turns,), 0, staleness + 1)
    if opt_state is None:
        opt_state = optimizer.init(params)
    turn = functools.partial(
        _turn,
        loss=loss,
        optimizer=optimizer,
        fetch_every=fetch_every,
        push_every=push_every,
        local_rate=local_rate,
    )
    batch_TJ = map_(lambda x: x.reshape(turns, joined, *x.shape[2:]), batches)
    (server, _), (loss_TJ, fetched_T, version_T) = lax.scan(
        turn,
        _start(params, opt_state, groups=groups, joined=joined, versions=staleness + 1),
        (jnp.arange(turns), lag_T, batch_TJ),
    )
    # A gradient waits for its replica's next push, and is then an update of the version there.
    fetched, version = (x.reshape(-1, push_every, groups) for x in (fetched_T, version_T))
    staleness_RG = (version[:, -1:] - fetched).reshape(rounds, groups)
    return Run(
        server.params,
        server.opt_state,
        loss_TJ.reshape(rounds, replicas),
        jnp.repeat(staleness_RG, joined, axis=1),
    )


def _check(rounds, replicas, joined, staleness, fetch_every, push_every) -> None:
    if joined < 1 or replicas % joined:
        raise UserError(f"joined={joined} does not divide the {replicas} replicas: take a divisor.")
    if staleness < 0:
        raise UserError(f"staleness={staleness} is negative: 0 is a fresh gradient.")
    if min(fetch_every, push_every) < 1:
        raise UserError(
            f"fetch_every={fetch_every} and push_every={push_every} count batches: 1 or more."
        )
    if rounds % push_every:
        raise UserError(
            f"{rounds} rounds are no multiple of push_every={push_every}, and the last gradients "
            f"would never be pushed: use {rounds - rounds % push_every} rounds of batches."
        )


def _start(params, opt_state, *, groups: int, joined: int, versions: int):
    def copies(*shape):
        return map_(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), params)

    zeros = map_(jnp.zeros_like, copies(groups))
    server = _Server(params, opt_state, copies(versions), jnp.array(0))
    return server, _Replicas(copies(groups, joined), jnp.zeros(groups, int), zeros)


def _turn(state, inputs, *, loss, optimizer, fetch_every, push_every, local_rate):
    """One group's batches: fetch if it is due, compute, accrue, push if that is due."""
    server, replicas = state
    turn, lag, batch_J = inputs
    groups = replicas.version.size
    group, batches_done = turn % groups, turn // groups
    own = map_(lambda x: x[group], replicas)

    version = jnp.maximum(server.version - lag, 0)
    fetch = batches_done % fetch_every == 0
    fetched = map_(lambda x: x[version % len(x)][None], server.history)
    params_J = map_(functools.partial(jnp.where, fetch), fetched, own.params)
    version = jnp.where(fetch, version, own.version)

    loss_J, gradient_J = jax.vmap(jax.value_and_grad(loss))(params_J, batch_J)
    gradient = map_(lambda sum_, x: sum_ + x.mean(0), own.gradient, gradient_J)
    params_J = map_(lambda x, step: (x - local_rate * step).astype(x.dtype), params_J, gradient_J)

    push = (batches_done + 1) % push_every == 0
    update = functools.partial(_update, optimizer)
    new_server = lax.cond(push, update, lambda server, _: server, server, gradient)
    gradient = map_(lambda x: jnp.where(push, jnp.zeros_like(x), x), gradient)
    own = _Replicas(params_J, version, gradient)
    replicas = map_(lambda all_, x: all_.at[group].set(x), replicas, own)
    return (new_server, replicas), (loss_J, version, server.version)


def _update(optimizer, server: _Server, gradient: Any) -> _Server:
    updates, opt_state = optimizer.update(gradient, server.opt_state, server.params)
    params = optax.apply_updates(server.params, updates)
    version = server.version + 1
    history = map_(lambda old, x: old.at[version % len(old)].set(x), server.history, params)
    return _Server(params, opt_state, history, version)
