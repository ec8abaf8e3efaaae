"""PH-08, the large-batch laboratory: batch x scaling rule x warm-up x optimiser, on digits.

A deep BatchNorm MLP (8 layers of 64), 12 epochs, cosine schedule, weight decay 1e-4, evaluated on
valid with BatchNorm's statistics of the whole training split. 628 is half of the training split:
24 updates in the whole run. The base rates (SGD, Nesterov and LARS 0.1, LAMB 0.01, AdamW 0.003, at
a batch of 32) were chosen on valid once, and are the same for every cell.
"""

import itertools

import numpy as np

from lsdl import plots, sweep
from lsdl.studies.claim import Cell, Expected, judged

CLAIM = (
    "With a fixed number of epochs a large batch loses accuracy; scaling the rate with the batch "
    "and warming up wins it back to a point, and LARS goes further."
)
LECTURE = "Lecture on optimisation and regularisation, large batches: "
GOYAL = LECTURE + "linear scaling and warm-up; Goyal et al. 2017"
YOU = LECTURE + "LARS; You, Gitman and Ginsburg 2017"
SOURCE = LECTURE + "Goyal et al. 2017; You, Gitman and Ginsburg 2017; Nado et al. 2021"

BASE = 32
BATCHES = (256, 628)
RATES = {"sgd": 0.1, "nesterov": 0.1, "lars": 0.1, "lamb": 0.01, "adamw": 0.003}
SCALINGS = ("none", "sqrt", "linear")
WARMUPS = ("none", "constant", "gradual")
CONFIG = "configs/digits_bn_mlp.py"
TUNED = {"nesterov": (0.4, 0.8, 1.6, 3.2), "lars": (0.2, 0.4, 0.8, 1.6)}
TUNED_MOMENTA = (0.8, 0.9)
PLAIN_BATCH = 512

EXPECTED = {
    "same_rate_256": Expected(
        "points of valid accuracy that SGD loses from a batch of 32 to 256 at the same rate",
        GOYAL,
        low=1.5,
    ),
    "recipe_256": Expected(
        "points lost at 256 with linear scaling and gradual warm-up", GOYAL, high=1.0
    ),
    "same_rate_628": Expected(
        "points that SGD loses from a batch of 32 to 628 at the same rate", GOYAL, low=5.0
    ),
    "recipe_628": Expected(
        "points lost at 628 with linear scaling and gradual warm-up: fewer, and some",
        GOYAL,
        low=0.5,
        high=4.0,
    ),
    "lars_628": Expected(
        "points between SGD at 32 and LARS (trust 0.02, linear scaling, warm-up) at 628",
        YOU,
        low=-1.0,
        high=1.0,
    ),
    "linear_over_sqrt": Expected(
        "points that linear scaling is ahead of square-root scaling at 256, gradual warm-up",
        GOYAL,
        low=0.0,
    ),
    "gradual_over_constant": Expected(
        "points that gradual warm-up is ahead of constant warm-up at 628, linear scaling",
        GOYAL,
        low=0.0,
    ),
    "nesterov_as_sgd": Expected(
        "points between Nesterov and heavy-ball momentum at 256, linear scaling, gradual warm-up",
        LECTURE + "optimiser type; Goyal et al. 2017, section 5.1",
        low=-1.0,
        high=1.0,
    ),
    "tuned_nesterov": Expected(
        "points that LARS is ahead of the best of 8 settings of Nesterov at 628",
        "Nado et al. 2021, which found none once the rival is tuned",
        high=1.0,
    ),
    "tuned_lars": Expected(
        "points between SGD at 32 and the best of 8 settings of LARS at 628 (added after a first "
        "run, in which LARS at the linear rate lost 4)",
        YOU,
        low=-1.0,
        high=1.0,
    ),
    "tuned_both": Expected(
        "points that the best of 8 settings of LARS is ahead of the best of 8 of Nesterov (added "
        "after a first run)",
        "Nado et al. 2021",
        low=-1.0,
        high=1.0,
    ),
    "equal_updates": Expected(
        "points lost at 628 when it gets as many updates as 32 had, at the same rate",
        "Hoffer et al. 2017 and Shallue et al. 2019: the number of updates explains the gap",
        high=1.0,
    ),
    "plain_recipe": Expected(
        "without BatchNorm: points that linear scaling and warm-up lose at 512 (a negative result)",
        GOYAL,
        low=5.0,
    ),
    "plain_lars": Expected(
        "without BatchNorm: points lost by LARS at 512", YOU, low=-1.5, high=1.5
    ),
}


def _optimizer(name: str) -> dict:
    fields = {"optim.name": "sgd" if name == "nesterov" else name}
    if name == "nesterov":
        fields["optim.nesterov"] = True
    if name == "lars":
        fields["optim.trust_coefficient"] = 0.02
    return fields


def _rate(name: str, batch: int, scaling: str, warmup: str, peak: float | None = None) -> dict:
    fields = {"batch_size": batch, "optim.schedule.peak": peak or RATES[name]}
    if scaling != "none":
        fields |= {"optim.schedule.scaling": scaling, "optim.schedule.base_batch": BASE}
    if warmup != "none":
        fields["optim.schedule.warmup_percent"] = 25.0
        fields["optim.schedule.warmup_form"] = {"gradual": "linear"}.get(warmup, warmup)
    return fields


def _cell(
    arm, optimizer, batch, scaling, warmup, seed, *, peak=None, momentum=0.9, more=None
) -> Cell:
    settings = dict(arm=arm, optimizer=optimizer, batch=batch, scaling=scaling, warmup=warmup)
    name = "_".join(map(str, settings.values()))
    settings |= dict(peak=peak or RATES[optimizer], momentum=momentum, seed=seed)
    if arm == "tuned":
        name += f"_{peak}_{momentum}"
    fields = _optimizer(optimizer) | _rate(optimizer, batch, scaling, warmup, peak)
    fields |= {"optim.momentum": momentum, "seed": seed} | (more or {})
    name += f"_s{seed}"
    return Cell(name, settings, CONFIG, fields)


def cells(scale: str, seeds: int) -> list[Cell]:
    """Cells of one program stand next to each other."""
    if scale == "full":
        return _full()
    found = []
    grid = [(s, w) for s in SCALINGS for w in WARMUPS]
    for name in RATES:
        found += [_cell("epochs", name, BASE, "none", "none", seed) for seed in range(seeds)]
        for batch in BATCHES:
            found += [_cell("epochs", name, batch, *g, s) for g in grid for s in range(seeds)]
    updates = {"total_epochs": 234.0}  # 468 updates at 628, as 12 epochs at 32 have
    for name in RATES:
        fixed = (name, BATCHES[-1], "none", "none")
        found += [_cell("updates", *fixed, seed, more=updates) for seed in range(seeds)]
    for name, momentum in itertools.product(TUNED, TUNED_MOMENTA):
        fixed = (name, BATCHES[-1], "none", "gradual")
        found += [
            _cell("tuned", *fixed, seed, peak=rate, momentum=momentum)
            for rate in TUNED[name]
            for seed in range(seeds)
        ]
    plain = {"model.norm": "none", "model.hidden": (64,) * 4}
    for name, batch, *rule in (
        ("sgd", BASE, "none", "none"),
        ("sgd", PLAIN_BATCH, "linear", "none"),
        ("sgd", PLAIN_BATCH, "linear", "gradual"),
        ("lars", PLAIN_BATCH, "linear", "gradual"),
    ):
        found += [_cell("plain", name, batch, *rule, seed, more=plain) for seed in range(seeds)]
    return found


def measure(cell: Cell, folder) -> dict:
    """Percent, and seconds of the run without its compilation."""
    del folder
    normed = cell.settings["arm"] != "plain"
    run = sweep.train(cell.config, cell.overrides, whole_statistics=normed)
    tail = run.metrics_T["loss"][-max(1, len(run.metrics_T["loss"]) // 12) :]
    return {
        "accuracy": 100 * run.valid["accuracy"],
        "valid_loss": run.valid["loss"],
        "train_loss": float(np.mean(tail)),
        "updates": len(run.metrics_T["loss"]),
        "run_s": run.run_s,
    }


def _pick(table: list[dict], arm: str, optimizer: str, batch: int, *rule: str) -> np.ndarray:
    """Accuracies in the order of seeds."""
    wanted = (arm, optimizer, batch, *rule)
    names = ("arm", "optimizer", "batch", "scaling", "warmup")
    rows = [row for row in table if tuple(row[n] for n in names) == wanted]
    return np.array([row["accuracy"] for row in sorted(rows, key=lambda row: row["seed"])])


def _tuned(table: list[dict], optimizer: str) -> np.ndarray:
    """Accuracies of the setting whose mean is the best."""
    groups: dict = {}
    for row in table:
        if (row["arm"], row["optimizer"]) == ("tuned", optimizer):
            groups.setdefault((row["peak"], row["momentum"]), []).append(row["accuracy"])
    return np.array(max(groups.values(), key=np.mean))


def claims(table: list[dict]):
    recipe = ("linear", "gradual")
    at = lambda *key: _pick(table, "epochs", *key)  # noqa: E731
    base, last = at("sgd", BASE, "none", "none"), BATCHES[-1]
    plain = lambda *key: _pick(table, "plain", *key)  # noqa: E731
    lars = at("lars", last, *recipe)
    return judged(
        EXPECTED,
        {
            "same_rate_256": base - at("sgd", 256, "none", "none"),
            "recipe_256": base - at("sgd", 256, *recipe),
            "same_rate_628": base - at("sgd", last, "none", "none"),
            "recipe_628": base - at("sgd", last, *recipe),
            "lars_628": base - lars,
            "linear_over_sqrt": at("sgd", 256, *recipe) - at("sgd", 256, "sqrt", "gradual"),
            "gradual_over_constant": at("sgd", last, *recipe)
            - at("sgd", last, "linear", "constant"),
            "nesterov_as_sgd": at("nesterov", 256, *recipe) - at("sgd", 256, *recipe),
            "tuned_nesterov": lars - _tuned(table, "nesterov"),
            "tuned_lars": base - _tuned(table, "lars"),
            "tuned_both": _tuned(table, "lars") - _tuned(table, "nesterov"),
            "equal_updates": base - _pick(table, "updates", "sgd", last, "none", "none"),
            "plain_recipe": plain("sgd", BASE, "none", "none") - plain("sgd", PLAIN_BATCH, *recipe),
            "plain_lars": plain("sgd", BASE, "none", "none") - plain("lars", PLAIN_BATCH, *recipe),
        },
    )


# ImageNet, top-1 error in percent. Goyal et al. 2017, table of figure 1: mean and spread of 5 runs.
GOYAL_ERRORS = {
    128: (23.49, 0.12),
    256: (23.60, 0.12),
    512: (23.48, 0.09),
    1024: (23.53, 0.08),
    2048: (23.49, 0.11),
    4096: (23.56, 0.12),
    8192: (23.74, 0.09),
    16384: (24.79, 0.27),
    32768: (27.55, 0.28),
    65536: (33.96, 0.80),
}
# You, Gitman and Ginsburg 2017: accuracy with LARS, ResNet-50 (extended augmentation), AlexNet-BN.
YOU_RESNET = {256: 75.8, 1024: 75.4, 8192: 75.2, 16384: 74.4, 32768: 72.5}
YOU_ALEXNET = {512: 60.2, 4096: 60.4, 8192: 60.1, 16384: 59.3, 32768: 57.8}
# Goyal et al. 2017, section 5.5: minutes for an epoch.
GOYAL_EPOCH_MIN = {256: 16.0, 11264: 0.5}
ABLATIONS = {  # of the batch of 8k, section 5.1 and table 2
    "no warm-up": ({"optim.schedule.warmup_epochs": 0.0}, "24.84 +- 0.37 % error"),
    "constant warm-up": ({"optim.schedule.warmup_form": "constant"}, "25.88 +- 0.56 % error"),
    "sqrt scaling": ({"optim.schedule.scaling": "sqrt"}, "26.22 +- 0.03 % error"),
    "unscaled": (
        {"optim.schedule.scaling": "none", "optim.schedule.base_batch": 0},
        "41.67 +- 0.10 % error",
    ),
}


def _full() -> list[Cell]:
    """The papers' runs; --config.accum=K reaches any batch on fewer devices."""
    resnet, alexnet = "configs/imagenet_resnet50.py", "configs/imagenet_alexnet.py"
    size = lambda batch: f"{batch // 1024}k" if batch >= 1024 else str(batch)  # noqa: E731
    found = [
        Cell(f"goyal_{size(batch)}", {}, f"{resnet}:{size(batch)}", {}, f"{mean} +- {std} % error")
        for batch, (mean, std) in GOYAL_ERRORS.items()
    ]
    found += [
        Cell(f"goyal_8k_{name.replace(' ', '_')}", {}, f"{resnet}:8k", fields, published)
        for name, (fields, published) in ABLATIONS.items()
    ]
    found += [
        Cell(f"lars_resnet50_{size(b)}", {}, f"{resnet}:lars,{size(b)}", {}, f"{acc} % accuracy")
        for b, acc in YOU_RESNET.items()
    ]
    found += [
        Cell(f"lars_alexnet_{size(b)}", {}, f"{alexnet}:bn,lars,{size(b)}", {}, f"{acc} % accuracy")
        for b, acc in YOU_ALEXNET.items()
    ]
    return found


def figure(table: list[dict]) -> dict:
    rules = {
        "same rate": ("none", "none"),
        "sqrt, warm-up": ("sqrt", "gradual"),
        "linear": ("linear", "none"),
        "linear, warm-up": ("linear", "gradual"),
    }
    of_sgd = {name: _errors(table, "sgd", rule) for name, rule in rules.items()}
    of_others = {
        "SGD, linear": _errors(table, "sgd", ("linear", "gradual")),
        "Nesterov, linear": _errors(table, "nesterov", ("linear", "gradual")),
        "LARS, sqrt": _errors(table, "lars", ("sqrt", "gradual")),
        "LAMB, sqrt": _errors(table, "lamb", ("sqrt", "gradual")),
        "AdamW, linear": _errors(table, "adamw", ("linear", "gradual")),
    }
    axes = dict(x="batch size", y="valid error, %", logx=True)
    error = plots.panels(
        [
            plots.lines(of_sgd, title="SGD on digits: the rate's rule", **axes),
            plots.lines(of_others, title="Optimisers, with warm-up", **axes),
        ]
    )
    return {
        "error_against_batch": error,
        "cost_beside_published": _cost(of_sgd),
        "time_against_batch": _time(table),
    }


def _cost(of_sgd: dict) -> plots.Figure:
    """Points of error above the base batch, over the batch in units of the base batch."""
    above = lambda xs, ys: (np.asarray(xs) / xs[0], np.asarray(ys) - ys[0])  # noqa: E731
    goyal = [mean for mean, _ in list(GOYAL_ERRORS.values())[1:]]
    ours = {
        f"digits, SGD, {name}": above(*of_sgd[name][:2])
        for name in ("same rate", "linear, warm-up")
    }
    papers = {
        "ResNet-50, SGD (Goyal et al.)": above(list(GOYAL_ERRORS)[1:], goyal),
        "ResNet-50, LARS (You et al.)": above(*_error_curve(YOU_RESNET)),
        "AlexNet-BN, LARS (You et al.)": above(*_error_curve(YOU_ALEXNET)),
    }
    return plots.lines(
        ours,
        published=papers,
        title="What a large batch costs, beside the published points",
        x="batch size / base batch",
        y="points of error above the base batch",
        logx=True,
    )


def _time(table: list[dict]) -> plots.Figure:
    batches = (BASE, *BATCHES)
    seconds = [
        np.median([r["run_s"] for r in table if (r["arm"], r["batch"]) == ("epochs", b)]) / 12
        for b in batches
    ]
    ours = {"digits on this machine": (np.array(batches) / BASE, np.array(seconds) / seconds[0])}
    minutes = np.array(list(GOYAL_EPOCH_MIN.values()))
    papers = {"8 to 352 GPUs (Goyal et al.)": (np.array(list(GOYAL_EPOCH_MIN)) / 256, minutes / 16)}
    return plots.lines(
        ours,
        published=papers,
        title="Time of an epoch",
        x="batch size / base batch",
        y="time / time at the base batch",
        logx=True,
        logy=True,
    )


def _error_curve(accuracies: dict[int, float]):
    return np.array(list(accuracies)), 100 - np.array(list(accuracies.values()))


def _errors(table: list[dict], optimizer: str, rule: tuple[str, str]):
    """(batches, mean, lowest, highest) of the valid error over seeds."""
    first = _pick(table, "epochs", optimizer, BASE, "none", "none")
    runs = [100 - first, *(100 - _pick(table, "epochs", optimizer, b, *rule) for b in BATCHES)]
    summary = [[f(errors) for errors in runs] for f in (np.mean, np.min, np.max)]
    return (np.array((BASE, *BATCHES)), *map(np.array, summary))
