"""Evolution: optimisers that see the loss of candidates and no gradient.

Both take `loss(x_D, batch)` and one batch for each generation, and return the course of `record`,
which is called on the generation's answer.

Shape letters: D parameters, M parents, P population, G generations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Loss = Callable[[jax.Array, Any], jax.Array]


def evolution_strategy(
    loss: Loss,
    x_D: jax.Array,
    key: jax.Array,
    batches: Any,
    *,
    parents: int,
    offspring: int,
    deviation: float,
    record: Callable[[jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """A (mu/mu, lambda) strategy: the best of `offspring` are averaged, their step sizes too.

    Every offspring has a step size of its own, which is inherited with what it led to: it adapts
    itself. A generation takes `offspring` evaluations.
    Source: Beyer and Schwefel 2002.
    """
    learning = 1 / math.sqrt(2 * x_D.size)

    def generation(carry, batch):
        x_D, log_deviation, key = carry
        key, for_size, for_step = jax.random.split(key, 3)
        log_P = log_deviation + learning * jax.random.normal(for_size, (offspring,))
        step_PD = jax.random.normal(for_step, (offspring, x_D.size))
        x_PD = x_D[None] + jnp.exp(log_P)[:, None] * step_PD
        loss_P = jax.vmap(loss, (0, None))(x_PD, batch)
        _, best_M = lax.top_k(-loss_P, parents)
        x_D = x_PD[best_M].mean(0)
        return (x_D, log_P[best_M].mean(), key), record(x_D)

    (x_D, _, _), course_G = lax.scan(generation, (x_D, jnp.log(deviation), key), batches)
    return x_D, course_G


def genetic_algorithm(
    loss: Loss,
    x_PD: jax.Array,
    key: jax.Array,
    batches: Any,
    *,
    elite: int,
    mutation: float,
    deviation: float,
    record: Callable[[jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """Tournaments of two, uniform crossover, and normal mutation of a share of the genes.

    The best `elite` go on unchanged. A generation takes as many evaluations as `x_PD` has rows; its
    answer is the best of them.
    Source: Eiben and Smith 2015.
    """
    population = len(x_PD)

    def generation(carry, batch):
        x_PD, key = carry
        key, *keys = jax.random.split(key, 5)
        loss_P = jax.vmap(loss, (0, None))(x_PD, batch)
        rivals = jax.random.randint(keys[0], (2, population, 2), 0, population)
        winner_2P = jnp.where(
            loss_P[rivals[..., 0]] <= loss_P[rivals[..., 1]], rivals[..., 0], rivals[..., 1]
        )
        mother_PD, father_PD = x_PD[winner_2P]
        child_PD = jnp.where(jax.random.bernoulli(keys[1], 0.5, x_PD.shape), mother_PD, father_PD)
        mutated_PD = jax.random.bernoulli(keys[2], mutation, x_PD.shape)
        child_PD += mutated_PD * deviation * jax.random.normal(keys[3], x_PD.shape)
        order_P = jnp.argsort(loss_P)
        child_PD = child_PD.at[:elite].set(x_PD[order_P[:elite]])
        return (child_PD, key), record(x_PD[order_P[0]])

    (x_PD, _), course_G = lax.scan(generation, (x_PD, key), batches)
    return x_PD, course_G
