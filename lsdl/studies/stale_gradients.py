"""Passes over the data to a training loss, by batch size, each at its best rate."""

from lsdl.studies.claim import Expected

CLAIM = (
    "The gradients of a batch are all taken where the batch began: past some size that costs "
    "passes over the data, even at the best learning rate."
)
SOURCE = (
    "Lecture: stochastic gradients, batch size; Wilson and Martinez 2003, The general "
    "inefficiency of batch training for gradient descent learning"
)
EXPECTED = {
    "full_batch": Expected(
        "passes to a training loss of 0.1, the full batch over batches of one, each at its best "
        "rate",
        "Wilson and Martinez 2003",
        low=3.0,
    ),
    "order": Expected(
        "least growth of the passes from one batch size to the next of 1, 8, 64, full",
        "Wilson and Martinez 2003",
        low=0.0,
    ),
    "sublinear": Expected(
        "slope of log best rate against log B, of the mean gradient (1: linear scaling; Wilson "
        "and Martinez suggest 0.5)",
        "Wilson and Martinez 2003, lecture on batch size",
        high=0.75,
    ),
    "second_order": Expected(
        "slope of log distance against log rate, between 8 steps of one example and one step of 8",
        "lecture on large batches: the two assumptions behind linear scaling",
        low=1.8,
        high=2.2,
    ),
}
