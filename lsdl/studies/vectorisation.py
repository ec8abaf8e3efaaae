"""One layer by neurons, by vectors, by vmap and by a matrix product; and in blocks.

Shape letters: B batch, D inputs, H neurons, L layers.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "A layer as one matrix product is the same numbers as neuron by neuron and far faster, forward "
    "and backward, and its blocks are best where they fit the caches."
)
SOURCE = (
    "Lecture on optimisation in deep learning: matrix-vector form, decomposition into blocks; "
    "lecture on systems: vectorised implementations"
)
_FORM = "lecture: a_j = g(sum_i a_i w_ij + b_j) = layer form g(W a + b)"
_SYSTEMS = "lecture: cuBLAS and cuDNN, forward and backward both fast"
_BLOCKS = "lecture: computations decomposed into blocks that match cache and GPU block sizes"
_LAYER = "layer of 256 -> 256 on 256 examples, float32"
EXPECTED = {
    "equal": Expected(
        "largest difference of any form's activations and gradients from the matrix product's, "
        f"over its largest entry: {_LAYER}",
        _FORM,
        high=1e-5,
    ),
    "forward": Expected(
        "time of a loop over neurons and examples, an inner product each, over that of the matrix "
        f"product, numpy: {_LAYER}",
        _FORM,
        low=20,
    ),
    "backward": Expected("the same for the gradients of weights and inputs", _SYSTEMS, low=20),
    "vectors": Expected(
        "time of the faster of two loops, over neurons or over examples, a matrix-vector product "
        "each, over that of the matrix product, numpy",
        _FORM,
        low=2,
    ),
    "vmap_products": Expected(
        "products in the program that vmap makes of one neuron and one example", _FORM, 1, 1
    ),
    "vmap": Expected(
        "time of that program over that of the matrix product, both by jax.jit", _FORM, 0.67, 1.5
    ),
    "backward_rate": Expected(
        "FLOP/s of the gradients over those of the activations, jax.jit", _SYSTEMS, low=0.5
    ),
    "batch": Expected(
        "examples/s at a batch over those at half of it, the least for batches 2 to 256, jax.jit",
        "lecture: mini-batches use vectorisation; non-decreasing within 10%",
        low=0.9,
    ),
    "batch_gradient": Expected("the same for the gradients", _SYSTEMS, low=0.9),
    "batch_gain": Expected(
        "examples/s at batch 256 over those at batch 1, jax.jit: weights are read once", _FORM, 4
    ),
    "blocks": Expected(
        "FLOP/s of a matrix product of 256 x 256 x 256 in blocks of 256 over blocks of 8, numpy: "
        "most of a small block's time is its call's",
        _BLOCKS,
        low=10,
    ),
    "rows_whole": Expected(
        "time of 4 layers of 64 neurons on 262,144 examples, the whole batch layer by layer, over "
        "that of the best block of rows, each through all layers; numpy",
        _BLOCKS,
        low=1.2,
    ),
    "rows_small": Expected("time of blocks of 16 rows over that of the best", _BLOCKS, low=1.2),
}
