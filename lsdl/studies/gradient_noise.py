"""How far a minibatch's gradient is from the full one, and what batch size that asks for."""

from lsdl.studies.claim import Expected

CLAIM = (
    "A minibatch's gradient is the full gradient plus noise whose variance falls like 1/B; as the "
    "loss falls the examples' gradients stop agreeing, and ever larger batches pay."
)
SOURCE = (
    "Lectures: stochastic gradients, batch size, data redundancy; "
    "McCandlish et al. 2018, An empirical model of large-batch training (arXiv:1812.06162)"
)
_NOISE = "McCandlish et al. 2018, section 2.2"
EXPECTED = {
    "variance": Expected(
        "slope of log variance of a minibatch gradient against log B, drawn with replacement, at "
        "initialisation",
        "lecture on stochastic gradients: the variance of a mean",
        low=-1.05,
        high=-0.95,
    ),
    "without_replacement": Expected(
        "variance of half the examples' mean gradient, drawn without replacement over with, at "
        "initialisation: (N - B) / (N - 1)",
        "lectures on batch size: reshuffled epochs against independent subsets",
        low=0.45,
        high=0.55,
    ),
    "right_angle": Expected(
        "share of minibatches of 32 within 90 degrees of the full gradient, at initialisation",
        "lecture on batch size: the 90-degree rule",
        low=0.99,
    ),
    "angle": Expected(
        "largest distance, over B, of the mean cosine from 1 / sqrt(1 + B_simple / B), at "
        "initialisation",
        f"{_NOISE}: E|g_B|^2 = |G|^2 + tr Sigma / B",
        high=0.05,
    ),
    "two_batches": Expected(
        "B_simple from the norms at two batch sizes over B_simple from per-example gradients, at "
        "initialisation",
        "McCandlish et al. 2018, appendix A.1",
        low=0.8,
        high=1.25,
    ),
    "growth": Expected(
        "B_simple after 12 epochs over B_simple at initialisation",
        f"{_NOISE}: the noise scale grows as the loss falls",
        low=10.0,
    ),
    "redundancy": Expected(
        "mean cosine between two examples' gradients, after 12 epochs over at initialisation",
        "lecture on optimisation, part 2: data redundancy, correlated and decorrelated gradients",
        high=0.5,
    ),
}
