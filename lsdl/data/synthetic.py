"""Generated data: spirals, modular arithmetic and teachers, the same on every machine.

Shape letters: N examples, F features, K targets.
"""

import math

import numpy as np

from lsdl.data.readers import Table
from lsdl.errors import UserError, nearest

OPERATIONS = ("add", "sub", "mul", "div")


def spirals() -> Table:
    """Two interleaved spiral arms of 1.5 turns, without noise; points spread over the disc.

    Besides train, valid and test there is `poison`, whose labels a study may flip.
    Source: after Huang et al. 2019, "Understanding generalization through visualizations".
    """
    draw = np.random.RandomState(0)  # its streams are frozen for good, unlike Generator's
    splits = {}
    for split, count in {"train": 130, "valid": 1000, "test": 1000, "poison": 260}.items():
        label_N = np.arange(count, dtype=np.int32) % 2
        radius_N = np.sqrt(draw.uniform(0.02, 1, count))
        angle_N = 2 * np.pi * 1.5 * radius_N + np.pi * label_N
        point_NF = radius_N[:, None] * np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1)
        splits[split] = {"features": point_NF.astype(np.float32), "label": label_N}
    return Table(splits, class_names=("one", "other"))


def modular(modulus: str, operation: str) -> Table:
    """All equations `a op b = c (mod p)` in one fixed random order, as the split `pairs`.

    Tokens a, op, b, =, c: the numbers are 0..p-1, op is p and = is p + 1. The answer alone counts.
    Division leaves out b = 0 and needs a prime p.
    Source: Power et al. 2022, "Grokking", appendix A.1.
    """
    p = _number(f"modular:{modulus}:{operation}", modulus, least=2)
    if operation not in OPERATIONS:
        raise UserError(
            f"modular:{modulus}:{operation} has an unknown operation; "
            f"{nearest(operation, OPERATIONS)}"
        )
    if operation == "div" and any(p % d == 0 for d in range(2, math.isqrt(p) + 1)):
        raise UserError(f"modular:{modulus}:div needs a prime modulus: {p} is none.")
    a_N, b_N = (grid.ravel() for grid in np.meshgrid(np.arange(p), np.arange(p), indexing="ij"))
    if operation == "div":
        a_N, b_N = a_N[b_N > 0], b_N[b_N > 0]
        inverse = np.array([0, *(pow(b, -1, p) for b in range(1, p))])
        c_N = a_N * inverse[b_N] % p
    else:
        c_N = {"add": a_N + b_N, "sub": a_N - b_N, "mul": a_N * b_N}[operation] % p
    count = len(a_N)
    token = np.stack([a_N, np.full(count, p), b_N, np.full(count, p + 1), c_N], axis=1)
    order = np.random.RandomState(0).permutation(count)
    pairs = {
        "token": token[order].astype(np.int32),
        "loss_weight": np.tile(np.array([0, 0, 0, 1], np.float32), (count, 1)),
    }
    return Table({"pairs": pairs}, vocab_size=p + 2)


def teacher(features: str, targets: str, hidden: str) -> Table:
    """Targets of a fixed random tanh network with one hidden layer, on normal inputs.

    teacher:FEATURES:TARGETS:HIDDEN; 8,000 train, 1,000 valid and 1,000 test examples, no noise.
    """
    source = f"teacher:{features}:{targets}:{hidden}"
    sizes = (_number(source, number, least=1) for number in (features, targets, hidden))
    num_features, num_targets, width = sizes
    draw = np.random.RandomState(0)
    first = draw.normal(size=(num_features, width)) / np.sqrt(num_features)
    second = draw.normal(size=(width, num_targets)) / np.sqrt(width)
    splits = {}
    for split, count in {"train": 8000, "valid": 1000, "test": 1000}.items():
        x_NF = draw.normal(size=(count, num_features))
        target_NK = np.tanh(x_NF @ first) @ second
        splits[split] = {
            "features": x_NF.astype(np.float32),
            "target": target_NK.astype(np.float32),
        }
    return Table(splits)


def _number(source: str, text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"data.source={source!r}: {text!r} must be a whole number from {least} on.")
    return int(text)
