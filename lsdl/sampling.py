"""Text from a language model, token by token.

Shape letters: B batch, L length, D embed, V vocabulary (padded).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sample(
    apply: Callable,
    variables: Any,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    max_length: int,
    vocab_size: int,
    temperature: float,
    top_k: int,
    key: jax.Array,
) -> Iterator[int]:
    """`num_tokens` tokens that follow `prompt`, each drawn from the model's distribution.

    `temperature` divides the logits; 0 takes the most probable token. `top_k` leaves only the k
    most probable ones; 0 leaves all. The model sees the last `max_length` tokens; their whole
    window is computed again for each new one.
    """

    @jax.jit
    def draw(variables, token_L, count, key):
        hidden_BLD, table_VD, *_ = apply(variables, token_L[None], train=False)
        logits_V = table_VD.astype(jnp.float32) @ hidden_BLD[0, count - 1].astype(jnp.float32)
        logits_V = jnp.where(jnp.arange(len(logits_V)) < vocab_size, logits_V, -jnp.inf)
        if top_k:
            least = jax.lax.top_k(logits_V, min(top_k, vocab_size))[0][-1]
            logits_V = jnp.where(logits_V < least, -jnp.inf, logits_V)
        if not temperature:
            return logits_V.argmax()
        return jax.random.categorical(key, logits_V / temperature)

    tokens = list(prompt)
    for i in range(num_tokens):
        window = tokens[-max_length:]
        token_L = np.zeros(max_length, np.int32)
        token_L[: len(window)] = window
        tokens.append(int(draw(variables, token_L, len(window), jax.random.fold_in(key, i))))
        yield tokens[-1]
