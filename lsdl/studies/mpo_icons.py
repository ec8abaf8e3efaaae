"""A plane through the parameters whose loss shows an icon, found by training three points.

The net is a 64-64-32-10 ReLU net on digits, the icon a heart of 16 x 16 cells.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "The loss surface is rich enough that a plane can be found in which the loss shows any icon, "
    "also on examples that were not trained on."
)
SOURCE = (
    "Lecture on phenomena: icon-shaped loss planes; Skorokhodov and Burtsev 2019, Loss landscape "
    "sightseeing with multi-point optimization (arXiv:1910.03867)"
)
_ICONS = "Skorokhodov and Burtsev 2019, section 3"
EXPECTED = {
    "inside": Expected(
        "mean validation cross-entropy in nats over the heart's cells, after 4,000 steps of Adam "
        "at 2e-3 with 24 cells of each kind a step",
        _ICONS,
        high=0.5,
    ),
    "outside": Expected(
        "mean validation cross-entropy in nats over the other cells", _ICONS, low=2.5
    ),
    "accuracy": Expected("mean validation accuracy inside less outside, in points", _ICONS, low=40),
    "overlap": Expected(
        "intersection over union of the heart and the cells whose validation cross-entropy is "
        "below 1.25 nats, half of what outside is trained to",
        _ICONS,
        low=0.7,
    ),
}
