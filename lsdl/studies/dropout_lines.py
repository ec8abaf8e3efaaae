"""PHN-05 and PHN-06, line projections with and without dropout, and what a slice proves.

The lectures' text allows the initial or the trained parameters as the centre, their formula the
initial ones alone: both are measured.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "A slope at the centre of a slice proves that it is no minimum, and a slice that bends down "
    "that the surface is not convex; the converses prove nothing."
)
SOURCE = (
    "Lecture on loss surfaces: line projection, with and without dropout; Li et al. 2018, "
    "Visualizing the loss landscape of neural nets (arXiv:1712.09913)"
)
_LINE = "lecture on loss surfaces: visualising the loss surface by line projection"
_LI = "Li et al. 2018, section 6: convexity of a random slice proves nothing"
_NET = "ReLU net 64-64-64-10 on digits, 12 random directions with each tensor's own length"
EXPECTED = {
    "slope": Expected(
        f"mean slope at the centre without its sign, initial over trained parameters, {_NET}, no "
        "dropout",
        f"{_LINE}: a slope there means no minimum",
        low=5,
    ),
    "flat_slices": Expected(
        "largest cosine of the gradient and a slice at the initial parameters, without its sign: "
        "even far from a minimum a random slice sees little of the gradient",
        f"{_LINE}: the converse proves nothing",
        high=0.15,
    ),
    "convex_slices": Expected(
        "share of slices through the trained parameters that bend down nowhere (31 points, up to "
        "0.3), no dropout",
        _LI,
        low=0.9,
    ),
    "negative_curvature": Expected(
        "smallest eigenvalue of the Hessian over the largest, there: below zero, though the slices "
        "are convex",
        _LI,
        high=-1e-6,
    ),
    "width": Expected(
        "rise of the training loss at the ends of the slices through the trained parameters, "
        "dropout 0.2 over none, both evaluated without dropout",
        "lecture on loss surfaces: the two figures, with and without dropout",
        high=1 - 1e-6,
    ),
    "gap": Expected(
        "valid minus training loss at the centre, dropout 0.2 over none, trained parameters",
        "lecture on loss surfaces: the two figures, with and without dropout",
        high=1 - 1e-6,
    ),
    "noisy_slices": Expected(
        "share of slices that bend down somewhere where each point draws its own dropout: the "
        "noise of the masks, of which nothing follows",
        f"{_LINE}: a slice is one function's",
        low=0.9,
    ),
}
