"""Memory against recomputation in backpropagation: counted in a pass, and in compiled programs.

Shape letters: N nodes, B batch, D width.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Vanilla backpropagation evaluates n nodes and stores n, a memory-poor one n^2 / 2 and 1, and "
    "one with checkpoints 2n and 2 sqrt(n)."
)
SOURCE = (
    "Lecture: stories from modern machine learning, automatic differentiation; "
    "Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv:1604.06174)"
)
_CHEN = "Chen et al. 2016: sqrt(n) segments"
_SLIDE = "lecture: vanilla, memory-poor and checkpointed backpropagation"
_GRIEWANK = "Griewank and Walther 2000, algorithm 799"
_AWAY = "largest distance of evaluations and of stored activations from "
_AT = ", n = 16, 36, 64, 100, 144"
_TEMPORARY = "compiled temporary bytes, in activations, "
_LENGTHS = " activations, largest relative distance, L = 16, 64, 256"
_PROGRAM = "counted from a program: residuals of the chain, batch much larger than width"
EXPECTED = {
    "vanilla": Expected(f"{_AWAY}n and n{_AT}", _SLIDE, low=0, high=0),
    "memory_poor": Expected(f"{_AWAY}n (n + 1) / 2 and 1{_AT}", _SLIDE, low=0, high=0),
    "checkpointed": Expected(f"{_AWAY}2n - sqrt(n) and 2 sqrt(n) - 1{_AT}", _CHEN, low=0, high=0),
    "kept_last": Expected(
        "evaluations of 64 nodes, if the forward pass keeps the last segment", _CHEN, 113, 113
    ),
    "thousand_evaluations": Expected("evaluations of 1,000 nodes, checkpointed", _CHEN, 1968, 1968),
    "thousand_stored": Expected("stored of 1,000 nodes, checkpointed", _CHEN, low=62, high=62),
    "shrinking_stored": Expected(
        "stored of 1,000 nodes, if each segment is shorter by one than the one before: sqrt(2n)",
        "counted: checkpoints behind the segment in hand are gone",
        low=45,
        high=45,
    ),
    "shrinking_evaluations": Expected(
        "evaluations of 1,000 nodes with these segments", "no node more often than twice", high=1968
    ),
    "binomial_stored": Expected(
        "stored of 1,000 nodes, binomial: log2(n) at the most", _GRIEWANK, high=9.97
    ),
    "binomial_evaluations": Expected(
        "evaluations of 1,000 nodes, binomial: n log2(n) at the most", _GRIEWANK, high=9966
    ),
    "gradients": Expected(
        "largest relative distance of a pass's gradients from jax.grad's, float64, n = 16 to 144",
        _SLIDE,
        high=1e-6,
    ),
    "bytes_none": Expected(
        f"{_TEMPORARY}from the r L + 3{_LENGTHS}; r is read from the jaxpr: 2, what a layer takes "
        "in and its slope (jax 0.10 keeps two arrays of the slope, r = 3)",
        _PROGRAM,
        high=0.05,
    ),
    "bytes_full": Expected(f"{_TEMPORARY}from L + 3{_LENGTHS}", _PROGRAM, high=0.05),
    "bytes_sqrt": Expected(f"{_TEMPORARY}from 2 sqrt(L) + 4{_LENGTHS}", _CHEN, high=0.05),
    "bytes_every": Expected(
        f"{_TEMPORARY}from the (1 + r) sqrt(L) + 4 of sqrt(L) segments that keep all when they are "
        f"made again,{_LENGTHS}",
        _PROGRAM,
        high=0.1,
    ),
    "bytes_poor": Expected(
        "compiled temporary bytes, in activations, of the memory-poor form, the most of L = 16, 64",
        _SLIDE,
        high=8,
    ),
    "bytes_binomial": Expected(
        "compiled temporary bytes of the binomial form over those of sqrt, the most of L = 64, 256",
        _GRIEWANK,
        high=0.999,
    ),
    "spacing": Expected(
        "compiled temporary bytes of segments of k layers over L / k + r k + 4 activations, L = 64, "
        "largest relative distance, every k that divides L",
        "counted: L / k checkpoints, and r arrays for each layer of one segment",
        high=0.1,
    ),
    "again_full": Expected(
        "products made again, over L: each layer's checkpointed, L = 16, 64, 256", _CHEN, 1, 1
    ),
    "again_every": Expected(
        "products made again, over L: sqrt(L) segments, L = 16, 64, 256", _CHEN, 1, 1
    ),
    "again_sqrt": Expected(
        "products made again, over L: sqrt(L) segments of which each layer is checkpointed too",
        "a scan keeps input and slope or the input alone: the third evaluation is for the slope",
        low=2,
        high=2,
    ),
    "policies": Expected(
        "largest relative distance of gradients with a policy from those with none, L = 16",
        _SLIDE,
        high=1e-6,
    ),
    "time": Expected(
        "time of a gradient with sqrt(L) segments over that without, L = 64; of each seed the "
        "median of interleaved pairs",
        "pilot: extra time at most 60% on CPU; Chen et al. 2016: 30%",
        high=1.6,
    ),
}
