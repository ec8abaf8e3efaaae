"""Golden curves: 20 steps of each smoke config. Rewrite with `make golden`, and say why."""

import csv
from pathlib import Path

import pytest

from tests.conftest import CONFIGS
from tests.curves import curve

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("loss", "grad_norm", "param_norm")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("digits_*.py")))
def test_the_curve_is_the_golden_one(load, name, request):
    metrics, _ = curve(load(f"{name}:smoke"), devices=1, fast=False)
    file = GOLDEN / f"{name}.csv"
    if request.config.getoption("--rewrite-golden"):
        with open(file, "w", newline="") as out:
            rows = csv.writer(out, lineterminator="\n")
            rows.writerow(("step", *NAMES))
            for step, values in enumerate(zip(*(metrics[n] for n in NAMES), strict=True), start=1):
                rows.writerow((step, *(f"{value:.8g}" for value in values)))
    with open(file) as lines:
        golden = list(csv.DictReader(lines))
    # Other processors and compilers round differently, and the rounding grows with the steps:
    # that of deep nets with BatchNorm many times a step, so that only their start can be compared.
    steps = 4 if name in ("digits_resnet", "digits_bn_mlp") else len(golden)
    for i, row in enumerate(golden[:steps]):
        for field in NAMES:
            assert metrics[field][i] == pytest.approx(float(row[field]), rel=1e-4), (i + 1, field)
