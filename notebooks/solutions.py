"""Spoilers: to each exercise the right answers, and wrong ones that its check must not let pass."""

SOLUTIONS = {
    "01_one_step": {
        "momentum": (
            # Parameter and moment, and both again or the gradient; of plain SGD no moment.
            {"one moment, kept": 2 * 8, "one moment, donated": 8 + 4, "none, donated": 4 + 4},
            {"one moment, kept": 8 + 4, "one moment, donated": 8, "none, donated": 4},
        ),
        "uneven": (
            {"mean": 1.1, "mean of means": 1.5, "a": 0.1, "b": 0.9},
            {"mean": 1.5, "mean of means": 1.1, "a": 0.5, "b": 0.5},
        ),
        "traces": (
            # A Python float is a type of its own, and an array's scalar another: both once. Static
            # arguments are compared by value.
            {"four rates": 2, "four batches": 3, "static rates": 2},
            {"four rates": 4, "four batches": 4, "static rates": 1},
        ),
    },
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
    "03_remat": {
        "segments": (
            # 36 evaluations forward, and in each of 6 segments all nodes but the last again; 6
            # checkpoints and the 5 others of a segment. The last segment's 5 need not be repeated.
            {"evaluations": 36 + 6 * 5, "stored": 6 + 5, "evaluations, last kept": 36 + 5 * 5},
            {"evaluations": 2 * 36, "stored": 2 * 6, "evaluations, last kept": 36 + 6 * 5},
        ),
        "ratios": (
            # 1 product forward and 2 back; one more evaluation under full, two under sqrt. With
            # both names queries, keys and values, the scores and what follows attn_out are left.
            {
                "chain, full": 4 / 3,
                "chain, sqrt": 5 / 3,
                "blocks, both names": 1 + (3 + 2 + 1) / 48,
            },
            {"chain, full": 1.5, "chain, sqrt": 4 / 3, "blocks, both names": 1 + (3 + 1) / 48},
        ),
        "best_segment": (
            # The power of two next to sqrt(64 / r), with r = 10 or 11 by the version of jax.
            {"layers of a segment": 2},
            {"layers of a segment": 8},
        ),
    },
    "04_custom_mesh": {
        "layout": (
            # fsdp last: its groups of four lie inside a host. tensor gathers no parameters.
            {"mesh": "tensor=2,fsdp=4", "rules": "fsdp_tp"},
            {"mesh": "fsdp=4,tensor=2", "rules": "fsdp_tp"},
        ),
        "whole": (
            # Attention's 8, the norms' 6, the bias of mlp/down, and the positions.
            {"arrays": 8 + 6 + 1 + 1, "bytes of the largest": 64 * 64 * 4},
            {"arrays": 8 + 6, "bytes of the largest": 256 * 64 * 4},
        ),
        "crossing": (
            # 2 x 1/2 of a quarter over data; 3/4 each of the gather and the scatter over fsdp.
            {"data=2,fsdp=4": 1 / 4, "fsdp=4,data=2": 3 / 2},
            {"data=2,fsdp=4": 3 / 2, "fsdp=4,data=2": 1 / 4},
        ),
    },
    "05_plan_a_pod": {
        "small": (
            # 50,257 and 1,024 rows of 768, 12 blocks of 12 x 768^2 + 13 x 768, one last norm.
            {"parameters": 124_439_808, "without positions": 124_439_808 - 1024 * 768},
            {"parameters": 124_439_808 - 1024 * 768, "without positions": 124_000_000},
        ),
        "room": (
            # 4 bytes each of parameter, gradient and two moments.
            {"parameters": 80 * 2**30 / 16, "devices for GPT-3": 33},
            {"parameters": 80 * 2**30 / 12, "devices for GPT-3": 25},
        ),
        "layout": (
            # The weights are gathered in each microbatch: few of them, and no tensor.
            {"data": 1, "fsdp": 8, "tensor": 1, "accum": 2},
            {"data": 1, "fsdp": 1, "tensor": 8, "accum": 2},
        ),
    },
    "06_large_batch": {
        "tradeoff": (
            # S / S_min = 1 + B_crit / B, and E / E_min = 1 + B / B_crit.
            {"steps at B_crit": 2, "steps at 4 B_crit": 1.25, "examples at 4 B_crit": 5},
            {"steps at B_crit": 1, "steps at 4 B_crit": 1, "examples at 4 B_crit": 4},
        ),
        "rates_of_256": (
            # 8 times 0.1 and the root of 8 times; 4 whole batches an epoch, a quarter of them warm.
            {
                **{"linear": 0.8, "square root": 0.1 * 8**0.5},
                **{"updates": 12 * 4, "of them warm-up": 12},
            },
            {
                **{"linear": 25.6, "square root": 0.4},
                **{"updates": 12 * 5, "of them warm-up": 15},
            },
        ),
        "by_hand": (
            # Rate times trust, whatever the gradient's length; what has no trust ratio follows it.
            {"kernel": 0.032, "kernel, loss x 100": 0.032, "bias, loss x 100": 100},
            {"kernel": 1.6, "kernel, loss x 100": 3.2, "bias, loss x 100": 1},
        ),
    },
    "07_loss_surface": {
        "mean_curvature": (
            # The mean of z z^T is the identity; divided by |z|^2, the identity over p.
            {"normal numbers": 1, "length 1": 1 / 760, "coordinate axes": 1 / 760},
            {"normal numbers": 1 / 760, "length 1": 1, "coordinate axes": 1},
        ),
        "twin_over_net": (
            # The same function of weights that are 10 times as long: a tenth of the slope in each,
            # a hundredth of the curvature. And the other way round.
            {"loss": 1, "first kernel": 1 / 100, "second kernel": 100},
            {"loss": 10, "first kernel": 10, "second kernel": 1 / 10},
        ),
        "largest_rate": (
            # A step multiplies the push by 1 - rate x curvature, and with momentum m the worse root
            # of z^2 - (1 + m - rate x curvature) z + m leaves the unit circle at -1.
            {"plain": 2, "momentum 0.9": 2 * (1 + 0.9)},
            {"plain": 1, "momentum 0.9": 0.2},
        ),
    },
    "08_many_processes": {
        "rows": (
            # Devices 2 and 3 are process 1's. The outer axis is what the processes differ in: by
            # tensor they differ in no row.
            {
                **{"data=2,fsdp=2, first": 4, "data=2,fsdp=2, number": 4},
                **{"fsdp=2,tensor=2, first": 4, "fsdp=2,tensor=2, number": 4},
                **{"tensor=2,fsdp=2, first": 0, "tensor=2,fsdp=2, number": 8},
            },
            {
                **{"data=2,fsdp=2, first": 2, "data=2,fsdp=2, number": 2},
                **{"fsdp=2,tensor=2, first": 0, "fsdp=2,tensor=2, number": 8},
                **{"tensor=2,fsdp=2, first": 4, "tensor=2,fsdp=2, number": 4},
            },
        ),
        "dealt": (
            # On tensor=2,data=2 each has the four rows that it was dealt and believes them to be
            # all; on data=4 they are eight different rows, in another order.
            {"process 0": 7 + 8 + 8 + 9, "process 1": 2 + 9 + 9 + 5, "process 0, data=4": 57},
            {"process 0": 57, "process 1": 57, "process 0, data=4": 32},
        ),
        "verdict": (
            # Nobody else is needed to read one's own part; the sum is the same in both, so that
            # both take the same branch; their parts differ, and one of them goes to meet nobody.
            {"shows its part": 0, "asks the sum": 0, "asks its part": 1},
            {"shows its part": 1, "asks the sum": 1, "asks its part": 0},
        ),
    },
}
