"""The order of an epoch: record indices of many positions at once, without a permutation in memory.

A block cipher permutes the numbers below a power of two; applied again and again until it falls on
a record, it permutes the records (cycle walking: Black and Rogaway 2002). The cipher is a Feistel
network of 4 rounds with the round function of Simon (Beaulieu et al. 2013). This is the order of
Grain's `index_shuffle`, which takes 4 to 100 microseconds for one position and holds the
interpreter meanwhile.
"""

import functools
import threading
import zlib

import numpy as np

ROUNDS = 4
SMALLEST = 16  # bits of a block: fewer leave a pattern
WORD = 2**32
_MAKING = threading.Lock()


def permuted(positions: np.ndarray, *, examples: int, seed: int, epoch: int) -> np.ndarray:
    """Record index of each of the epoch's `positions`, under the epoch's own permutation.

    `positions`: integers in [0, examples), of any shape. Returns int64 of that shape.
    """
    # Mixed properly: a sum would make epoch 1 of seed 0 the same order as epoch 0 of seed 1.
    mixed = zlib.crc32(np.array([seed, epoch], np.uint64).tobytes())
    if examples <= 2**SMALLEST:
        with _MAKING:  # batches ahead are made in several threads, at an epoch's end too
            return _whole(examples, mixed)[positions]
    bits = (examples - 1).bit_length()
    found, keys = np.asarray(positions).ravel().astype(np.uint64), _round_keys(mixed)
    outside = np.arange(found.size)
    while outside.size:
        found[outside] = _encrypted(found[outside], bits + bits % 2, keys)
        outside = outside[found[outside] >= examples]
    return found.astype(np.int64).reshape(np.shape(positions))


@functools.lru_cache(maxsize=4)
def _whole(examples: int, seed: int) -> np.ndarray:
    """The record indices of a whole epoch; the walk is as long as few of the numbers are records.

    So its length is doubled each time: `walk` goes 1, 2, 4, ... steps, and stays on a record.
    """
    numbers = np.arange(2**SMALLEST)
    walk = _encrypted(numbers.astype(np.uint16), SMALLEST, _round_keys(seed)).astype(np.int64)
    found = walk[:examples]
    walk = np.where(numbers < examples, numbers, walk)
    while (found >= examples).any():
        found, walk = walk[found], walk[walk]
    found.flags.writeable = False
    return found


def _encrypted(numbers: np.ndarray, bits: int, keys: tuple[int, ...]) -> np.ndarray:
    """Another of the numbers below 2**bits for each of `numbers`, unsigned; `bits` is even."""
    word = numbers.dtype.type
    width, mask = bits // 2, 2 ** (bits // 2) - 1

    def rotated(half, by):
        return (half << word(by)) | (half >> word(width - by))

    left, right = numbers >> word(width), numbers & word(mask)
    for key in keys:
        mixed = (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2)
        left, right = right, (left ^ mixed ^ word(key & mask)) & word(mask)
    return (left << word(width)) | right


def _round_keys(seed: int) -> tuple[int, ...]:
    """What C++'s std::seed_seq (ISO C++11, 26.5.7.1) generates from one 32-bit number."""
    n = ROUNDS
    state = [0x8B8B8B8B] * n
    for k in range(2 * n):
        a, b, c = k % n, (k + 1) % n, (k + 2) % n
        if k < n:
            drawn = state[a] ^ state[b] ^ state[a - 1]
            drawn = 1664525 * (drawn ^ drawn >> 27) % WORD
            more = 1 if k == 0 else a + seed if k == 1 else a
            first, second = state[b] + drawn, state[c] + drawn + more
            state[a] = (drawn + more) % WORD
        else:
            drawn = (state[a] + state[b] + state[a - 1]) % WORD
            drawn = 1566083941 * (drawn ^ drawn >> 27) % WORD
            first, second = state[b] ^ drawn, state[c] ^ (drawn - a) % WORD
            state[a] = (drawn - a) % WORD
        state[b], state[c] = first % WORD, second % WORD
    return tuple(state)
