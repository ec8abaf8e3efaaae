"""PH-27: a small transformer on the bytes of Python's standard library, against n-grams.

The valid files' first 2,000 windows of 128 bytes, by models of the train files: a 2-layer GPT of
width 128, one seed, and interpolated n-grams (Witten and Bell 1991) of order 0 to 5, where order k
sees k bytes. zlib and xz compress these bytes by themselves, with no model of the train files.
"""

from lsdl.studies.claim import Expected

CLAIM = "A decoder-only transformer that sees 128 bytes predicts the next better than n-grams."
SOURCE = (
    "Lectures: GPT, decoder-only transformers; Radford et al. 2019, Language models are "
    "unsupervised multitask learners; Chen and Goodman 1999, An empirical study of smoothing"
)
_PILOT = "pilot: 4.659, 3.529, 2.659, 2.166, 2.036, 2.028 bits for orders 0 to 5"
EXPECTED = {
    "order_2": Expected(
        "bits per byte of the transformer (2 layers of 128, context 128, 1,200 steps) over those "
        "of interpolated order 2",
        "lectures: the transformer beats n-grams",
        high=1 - 1e-6,
    ),
    "absolute": Expected(
        "bits per byte of the transformer: the pilot's order 2",
        "lectures: the transformer beats n-grams",
        high=2.66,
    ),
    "order_5": Expected(
        "bits per byte of the transformer over those of interpolated order 5: the stretch",
        "lectures: the transformer beats n-grams",
        high=1 - 1e-6,
    ),
    "ladder": Expected(
        "the largest ratio of an order's bits to those of the order below, orders 1 to 5",
        _PILOT,
        high=1,
    ),
    "ngram_2": Expected("bits per byte of interpolated order 2", _PILOT, 2.4, 2.9),
    "ngram_5": Expected("bits per byte of interpolated order 5", _PILOT, 1.8, 2.3),
    "zlib": Expected("bits per byte of zlib at level 9", "pilot: 1.916", 1.7, 2.2),
    "xz": Expected("bits per byte of xz at preset 9", "pilot: 1.590", 1.4, 1.9),
}
