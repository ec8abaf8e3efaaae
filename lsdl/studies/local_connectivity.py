"""Nets of the size that the task asks for: block-diagonal layers, the smallest width, and the error
of an estimate from folds.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Where inputs interact within groups alone, block-diagonal layers do the work of dense ones "
    "for a fraction of the products, and where groups interact they cannot; a task has a width "
    "that is enough."
)
SOURCE = "Lectures: local connectivity, right-sized networks, cross-validation"
_LOCAL = "lecture on efficiency: local connectivity, W = blockdiag(W_A, W_B)"
_SIZE = "lecture on efficiency: right-sized networks"
_FOLDS = "first lecture: cross-validation; Kohavi 1995"
EXPECTED = {
    "dense_products": Expected(
        "multiply-adds of a dense layer of 8 inputs and 4 units, counted in its program",
        _LOCAL,
        low=32,
        high=32,
    ),
    "block_products": Expected(
        "multiply-adds of two blocks of 4 inputs and 2 units, counted in the program",
        _LOCAL,
        low=16,
        high=16,
    ),
    "equality": Expected(
        "largest distance between the outputs of the blocks, concatenated (the lecture adds them), "
        "and of the dense layer with zeros outside the blocks, float64",
        _LOCAL,
        high=1e-12,
    ),
    "local_task": Expected(
        "validation error of the dense net less the block-diagonal one, share of the targets' "
        "variance, where the target is a sum over two groups of inputs",
        _LOCAL,
        low=-0.02,
    ),
    "long_range_task": Expected(
        "validation error of the block-diagonal net, share of the targets' variance, where the "
        "target is the product of one input of each group",
        _LOCAL,
        low=0.5,
    ),
    "long_range_dense": Expected(
        "validation error of the dense net on that target", _LOCAL, high=0.2
    ),
    "enough": Expected(
        "smallest width of 1, 2, 4, ... 128 whose net reaches 95% on the validation digits "
        "(none as 1,024)",
        _SIZE,
        high=32,
    ),
    "more": Expected(
        "validation accuracy in points of width 128 less that of the smallest that is enough",
        _SIZE,
        high=3,
    ),
    "folds": Expected(
        "examples that are not held out exactly once, over 10 folds of the training digits",
        _FOLDS,
        low=0,
        high=0,
    ),
    "spread": Expected(
        "standard deviation over 5 partitions of the mean of 10 folds' accuracy, over that of a "
        "single fold's",
        _FOLDS,
        high=0.7,
    ),
    "cost": Expected(
        "examples seen in training for a 10-fold estimate over those for one held-out fold",
        "first lecture: cross-validation is expensive",
        low=10,
        high=10,
    ),
}
