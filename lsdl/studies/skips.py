"""PH-16, skip connections: the loss surface of deep nets with and without them."""

from lsdl.studies.claim import Expected

CLAIM = (
    "A deep net without skip connections ends in a rough, sharp and worse minimum; with them its "
    "surface stays smooth and wide."
)
SOURCE = (
    "Lecture on loss surfaces: ResNet-56 with and without skip connections; Li et al. 2018, "
    "Visualizing the loss landscape of neural nets (arXiv:1712.09913)"
)
_LI = "Li et al. 2018, section 5: the effect of network depth and of shortcuts"
EXPECTED = {
    "width_54": Expected(
        "length of the part of a slice around the minimum where the training loss is less than 1 "
        "nat higher, with skips over without, depth 54, mean of 12 filter-normalised slices",
        _LI,
        low=5,
    ),
    "concave_54_skip": Expected(
        "share of a slice's points where it bends down, with skips, depth 54", _LI, high=0.05
    ),
    "concave_54_plain": Expected("the same without skips, depth 54", _LI, low=0.1),
    "gap_54": Expected(
        "points of valid accuracy that skips are ahead, depth 54, digits", _LI, low=5
    ),
    "gap_30": Expected("the same, depth 30", _LI, low=5),
    "gap_10": Expected("the same, depth 10: few layers train without skips", _LI, low=-4, high=4),
    "width_30": Expected(
        "length of the slices' low part with skips over without, depth 30", _LI, low=3
    ),
}
