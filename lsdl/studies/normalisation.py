"""PH-26: normalisation layers at batches of 32, 4 and 2, and BatchNorm at a batch of one.

A 64-64-64-64-10 ReLU net on digits, a norm before each activation, SGD with momentum at a rate in
proportion to the batch, 15 epochs. BatchNorm is evaluated with its moving averages.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "BatchNorm fails at tiny batches, where two examples give no statistics; GroupNorm and "
    "LayerNorm never look at other examples and do not."
)
WU = "Wu and He 2018, Group normalization"
_LECTURE = "lectures: batch, layer and group normalisation; "
SOURCE = f"Lectures: conditioning, B = 1 breaks BatchNorm; {WU} (arXiv:1803.08494)"
EXPECTED = {
    "batch_2": Expected(
        "points of valid accuracy that BatchNorm loses from a batch of 32 to 2, 3 x 64 net on "
        "digits, rate in proportion to the batch, 15 epochs, moving averages",
        f"{_LECTURE}{WU}",
        low=20,
    ),
    "batch_4": Expected("points that BatchNorm loses from 32 to 4", f"{_LECTURE}{WU}", high=3),
    "group_2": Expected(
        "points that GroupNorm (4 groups) loses from 32 to 2", f"{_LECTURE}{WU}", high=2
    ),
    "layer_2": Expected("points that LayerNorm loses from 32 to 2", _LECTURE.strip("; "), high=2),
    "none_2": Expected(
        "points that the net without a norm loses from 32 to 2", _LECTURE.strip("; "), high=2
    ),
    "group_over_batch": Expected(
        "points that GroupNorm is ahead of BatchNorm at a batch of 2",
        f"{WU}: 10.6 on ImageNet at 2 images for each GPU",
        low=10.6,
    ),
    "batch_1": Expected(
        "BatchNorm on a batch of one example is refused (1: yes)",
        "lecture on batch size: one example breaks BatchNorm",
        low=1,
        high=1,
    ),
}
