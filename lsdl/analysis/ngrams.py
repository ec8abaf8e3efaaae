"""Interpolated n-grams of bytes: counts, and what they make of another text.

Shape letters: N bytes to learn from, M bytes to predict, U different contexts with their bytes,
K orders.
"""

import numpy as np

MOST = 7  # bytes of a context that fit in 64 bits with the byte after it


def bits(train_N: np.ndarray, text_M: np.ndarray, *, order: int) -> np.ndarray:
    """`(order + 1, M)`: -log2 of the probability of each byte, by orders 0 to `order`.

    Order k sees the k bytes before, and gives a context h that was seen n(h) times, before T(h)
    different bytes, p_k(c | h) = (n(h, c) + T(h) p_{k-1}(c)) / (n(h) + T(h)); below order 0 all 256
    bytes are equally probable. What comes before a text counts as zeros.
    Source: Witten and Bell 1991, method C, interpolated as in Chen and Goodman 1999, eq. 7 and 8.
    """
    if not 0 <= order <= MOST:
        raise ValueError(f"order={order} must be from 0 to {MOST}")
    p_M = np.full(len(text_M), 1 / 256)
    found_KM = np.empty((order + 1, len(text_M)))
    for k in range(order + 1):
        key_U, count_U = np.unique(_with_context(train_N, k), return_counts=True)
        context_U = key_U >> np.uint64(8)
        first = np.flatnonzero(np.append(True, context_U[1:] != context_U[:-1]))
        total, different = np.add.reduceat(count_U, first), np.diff(np.append(first, len(key_U)))
        key_M = _with_context(text_M, k)
        seen_M = _looked_up(key_U, count_U, key_M)
        total_M = _looked_up(context_U[first], total, key_M >> np.uint64(8))
        different_M = _looked_up(context_U[first], different, key_M >> np.uint64(8))
        mixed_M = (seen_M + different_M * p_M) / np.maximum(total_M + different_M, 1)
        p_M = np.where(total_M > 0, mixed_M, p_M)
        found_KM[k] = -np.log2(p_M)
    return found_KM


def _with_context(text_N: np.ndarray, k: int) -> np.ndarray:
    """Each byte with the `k` before it, as one number whose lowest eight bits are the byte."""
    padded = np.concatenate([np.zeros(k, np.uint64), text_N.astype(np.uint64)])
    key_N = np.zeros(len(text_N), np.uint64)
    for i in range(k + 1):
        key_N = key_N << np.uint64(8) | padded[i : i + len(text_N)]
    return key_N


def _looked_up(key_U: np.ndarray, value_U: np.ndarray, key_M: np.ndarray) -> np.ndarray:
    """The value of each key of `key_M` in the sorted `key_U`; 0 where there is none."""
    place_M = np.minimum(np.searchsorted(key_U, key_M), len(key_U) - 1)
    return np.where(key_U[place_M] == key_M, value_U[place_M], 0)
