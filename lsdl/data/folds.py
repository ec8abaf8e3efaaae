"""Cross-validation: folds that hold every example out once.

Source: Kohavi 1995, "A study of cross-validation and bootstrap for accuracy estimation".

Shape letters: N examples.
"""

import numpy as np

from lsdl.errors import UserError


def folds(label_N: np.ndarray, count: int, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids to train on, ids held out) of each fold, the classes in the same proportion in all."""
    label_N = np.asarray(label_N)
    if not 2 <= count <= len(label_N):
        raise UserError(f"{count} folds of {len(label_N)} examples: 2 or more, and no fold empty.")
    draw = np.random.default_rng(seed)
    # Classes one after the other, each in a random order, are dealt to the folds in turn.
    order_N = np.lexsort((draw.permutation(len(label_N)), label_N))
    fold_N = np.empty(len(label_N), np.int64)
    fold_N[order_N] = np.arange(len(label_N)) % count
    return [(np.flatnonzero(fold_N != i), np.flatnonzero(fold_N == i)) for i in range(count)]
