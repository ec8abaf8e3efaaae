"""Spoilers: to each exercise the right answers, and wrong ones that its check must not let pass."""

SOLUTIONS = {
    "02_sharding": {
        "split": (
            # Split in 2 x 2 along the first dim; tensor, which is not named, has the copies.
            {
                "bytes of a device": 128 * 2048 * 4 // 4,
                "bytes of all devices": 8 * 128 * 2048 * 4 // 4,
                "copies of a block": 2,
            },
            {
                "bytes of a device": 128 * 2048 * 4 // 8,
                "bytes of all devices": 128 * 2048 * 4,
                "copies of a block": 4,
            },
        ),
        "hybrid": (
            # Within each of the two groups FSDP as on 4 devices; then each device sums its quarter
            # of the gradients with the one device of the other group that has the same.
            {"all-gather, fsdp": 1, "reduce-scatter, fsdp": 1 / 4, "all-reduce, data": 1 / 4},
            {"all-gather, fsdp": 1 / 4, "reduce-scatter, fsdp": 1, "all-reduce, data": 1},
        ),
        "factors": (
            # The gradient of what is copied is summed by autodiff: 8 means are summed, 8 too many.
            # That sum is the same everywhere: its mean changes nothing, its sum is 8 times itself.
            {"nothing": 8, "pmean gradient": 8, "psum gradient": 64, "pmean loss": 1},
            {"nothing": 1, "pmean gradient": 1, "psum gradient": 8, "pmean loss": 1 / 8},
        ),
    },
}
