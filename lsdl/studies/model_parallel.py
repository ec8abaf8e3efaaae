"""PH-25: a grid of 4 x 2 devices, data by model, on a net of convolutions and dense layers.

Convolutions split the batch over all 8 devices; the dense layers' kernels are split in two, each
half on 4 devices. A thin AlexNet on digits, 8 virtual devices of a process of their own.
Letters: B the global batch, W what the dense layers see and pass on, in numbers for an example.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Data and model parallelism are two axes of one grid: the result is that of one device, and "
    "splitting the dense layers pays as long as a batch's activations are fewer than parameters."
)
SOURCE = (
    "Lectures: synchronous SGD, data x model parallelism; Krizhevsky 2014, One weird trick for "
    "parallelizing convolutional neural networks (arXiv:1404.5997)"
)
_GRID = "lecture on distributed training: data x model"
EXPECTED = {
    "same": Expected(
        "largest distance of a parameter from one device's after 20 steps, 4 x 2 devices, thin "
        "AlexNet on digits, no dropout",
        "lectures: synchronous SGD equals the large batch",
        high=1e-5,
    ),
    "moved": Expected(
        "the largest way that a parameter went in these 20 steps, to compare", "the same", low=1e-3
    ),
    "predicted": Expected(
        "bytes on the wire, counted in the compiled step over predicted, the farthest from 1 of "
        "grids of 8 x 1, 4 x 2, 2 x 4 and 1 x 8",
        "traffic of a ring",
        0.99,
        1.01,
    ),
    "less": Expected(
        "bytes that a device of 4 x 2 sends over one of 8 x 1, counted, where B W of a data "
        "shard's batch is a quarter of the dense parameters",
        "B x width < dense parameters",
        high=0.95,
    ),
    "more": Expected(
        "the same where B W of a data shard's batch is four times the dense parameters",
        "B x width > dense parameters",
        low=1.05,
    ),
    "crossing": Expected(
        "the batch from which 8 x 1 sends less than 4 x 2, counted, over that of the formula",
        "B x width = dense parameters",
        0.95,
        1.05,
    ),
    "memory": Expected(
        "bytes of parameters on a device of 4 x 2 over those of 8 x 1",
        "lecture on distributed training: very large models need model parallelism",
        high=0.6,
    ),
}
