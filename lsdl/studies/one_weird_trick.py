"""One weird trick: convolutions see less of the batch, dense layers less of the kernel.

A model of what each device sends in a step, held against the collectives that XLA compiles for our
rule table on 8 devices, and against the speed-ups that Krizhevsky measured. The devices are virtual
ones of a process of its own: `python -m lsdl.studies.one_weird_trick FILE` writes what it found.

Letters: K GPUs, B the global batch, F features that the dense layers see, H what they pass on.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsdl import plots
from lsdl.experiment import opened
from lsdl.models.alexnet import AlexNet
from lsdl.planner import collectives, count, hlo
from lsdl.state import TrainState
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Convolutions want data parallelism and dense layers model parallelism: together they give the "
    "result of one device, and send less than either alone."
)
KRIZHEVSKY = "Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks"
SOURCE = f"Lecture: distributed training, data x model parallelism; {KRIZHEVSKY} (arXiv:1404.5997)"
_ALEXNET = "AlexNet of 2012 at 227 pixels: "
EXPECTED = {
    "compute": Expected(
        _ALEXNET + "the convolutions' part of the FLOPs", f"{KRIZHEVSKY}: 90-95%", 0.90, 0.95
    ),
    "parameters": Expected(
        _ALEXNET + "the convolutions' part of the parameters", f"{KRIZHEVSKY}: 5%", 0.04, 0.07
    ),
    "bytes": Expected(
        "bytes on the wire, counted over predicted for XLA's form, the worst of 4 programs and "
        "their collectives of more than 1 KiB: 8 virtual devices, a thin AlexNet on digits",
        "traffic of a ring",
        0.99,
        1.01,
    ),
    "least": Expected(
        "bytes on the wire, counted over the least that the layout has to send (the features' "
        "gradient reduced and scattered, where XLA on CPU reduces all of it), the worst program",
        "traffic of a ring",
        high=1.05,
    ),
    "same": Expected(
        "largest relative distance of a parameter from one device's after 20 steps on digits, "
        "8 devices as 2 x 4 and as 1 x 8",
        "the same step",
        high=1e-5,
    ),
    "less": Expected(
        "the dense layers' bytes, trick over data parallelism, where B (F + H) is about half of "
        "the dense parameters: counted",
        "B (F + H) < dense parameters",
        high=0.75,
    ),
    "more": Expected(
        "the same where B (F + H) is about twice the dense parameters",
        "B (F + H) < dense parameters",
        low=1.5,
    ),
    "links": Expected(
        "of the time that 8 GPUs lost to a perfect speed-up, the part that the trick's traffic "
        "explains if each K20 had its 16 lanes of PCIe 2 to itself and nothing were hidden",
        f"{KRIZHEVSKY}, table 1: 6.25 times",
        high=0.5,
    ),
    "shared": Expected(
        "predicted over measured speed-up of 2, 4 and 8 GPUs, the farthest from 1, if all of them "
        "up to 4 share one root port and nothing is hidden",
        f"{KRIZHEVSKY}, table 1: 1.95, 3.74, 6.25 times",
        0.9,
        1.1,
    ),
    "pays": Expected(
        "predicted speed-up of 8 GPUs on shared root ports, trick over data parallelism alone",
        KRIZHEVSKY,
        low=1.1,
    ),
}

# Krizhevsky 2014, table 1: GPUs -> (hours of 90 epochs, top-1 error in %), batch of 128 for each.
HOURS = {1: (98.05, 42.33), 2: (50.24, 42.63), 4: (26.20, 42.59), 8: (15.68, 43.28)}
EPOCHS, IMAGES, OWN_BATCH = 90, 1_281_167, 128
STEP_S = HOURS[1][0] * 3600 * OWN_BATCH / (EPOCHS * IMAGES)
# PCI Express base specification 2.0: 16 lanes of 5 GT/s, 8 bits in 10: one way.
LANES_BYTES_PER_S = 8e9
PER_ROOT_PORT = 4

CONFIG = "configs/imagenet_alexnet.py:smoke"
THIN = {"widths": (16, 32, 48, 48, 32), "hidden": (512, 512)}
FIELDS = {
    "data.source": "digits",
    "data.train_split": "train",
    "data.valid_split": "valid",
    "data.test_split": "test",
    "data.transforms": ("resize:64",),
    "data.eval_transforms": ("resize:64",),
    **{f"model.{name}": value for name, value in THIN.items()},
    "model.dropout": 0.0,
    "optim.schedule.name": "constant",
    "optim.schedule.peak": 0.05,
}
DEVICES, STEPS, LEAST_BYTES = 8, 20, 1024
TRICK = {"rules": "one_weird_trick"}
# Layouts and batches: the dense layers' 284 k parameters are B (F + H) at 522.
PROGRAMS = {
    "grid": (TRICK | {"mesh": "data=2,tensor=4"}, 256),
    "small": (TRICK | {"mesh": "tensor=8"}, 256),
    "large": (TRICK | {"mesh": "tensor=8"}, 1024),
    "data": ({"rules": "dp", "mesh": "data=8"}, 256),
}
SAME_BATCH = 64


def cells(scale: str, seeds: int) -> list[Cell]:
    """The counted programs and the equal steps; at full scale Krizhevsky's table."""
    if scale == "full":
        return [
            Cell(
                f"gpus-{k}",
                {"gpus": k},
                "configs/imagenet_alexnet.py",
                {"batch_size": OWN_BATCH * k, "optim.schedule.peak": 0.01 * k, "total_epochs": 90.0}
                | (TRICK | {"mesh": f"tensor={k}"} if k > 1 else {}),
                f"{error} % top-1 error, {hours} h on K20: {HOURS[1][0] / hours:.2f} times as fast",
            )
            for k, (hours, error) in HOURS.items()
        ]
    return [Cell("programs", {"devices": DEVICES}), Cell("alexnet", {"side": 227})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    if "side" in cell.settings:
        return _shares(cell.settings["side"])
    return on_devices("lsdl.studies.one_weird_trick", folder / "found.json")


def on_devices(module: str, file: Path) -> dict[str, Any]:
    """What `python -m module file` writes there, in a process with `DEVICES` virtual devices."""
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    command = [sys.executable, "-m", module, str(file)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} left with {done.returncode}: {done.stderr}")
    return json.loads(file.read_text())


def _shares(side: int) -> dict[str, Any]:
    """FLOPs of one image forward and parameters: the convolutions', the dense layers'."""
    image, model = jnp.zeros((1, side, side, 3)), AlexNet(1000)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    traced = jax.jit(lambda v: model.apply(v, image, train=False)).trace(variables)
    flops = Counter()
    for scopes, number in count.count(traced.jaxpr.jaxpr).items():
        flops["layer_" in " ".join(scopes)] += number
    return {
        "conv_flops": flops[True],
        "dense_flops": flops[False],
        **asdict(sizes_of(variables["params"])),
    }


@dataclass(frozen=True)
class Sizes:
    """What AlexNet's traffic depends on; float32."""

    conv_bytes: int
    dense_bytes: int
    split_bytes: int  # of the dense ones those that tensor parallelism splits
    features: int
    hidden: int

    def sent(
        self, batch: int, *, data: int, tensor: int, scattered: bool
    ) -> Counter[tuple[str, str]]:
        """{(collective, axis): bytes that a device sends in a step} on `data` x `tensor` devices.

        All of them split the convolutions' batch, `tensor` the dense kernels: the first by its
        columns, the second by its rows. `scattered`: the features' gradient is reduced and
        scattered, and not reduced on all devices.
        """
        found, n, own = Counter(), data * tensor, 4 * batch // data
        everyone = "+".join(a for a, size in (("data", data), ("tensor", tensor)) if size > 1)

        def add(kind, axis, nbytes, n):
            if n > 1:
                found[kind, axis] += hlo.WIRE[kind](nbytes, n)

        add("all-reduce", everyone, self.conv_bytes, n)
        local = self.split_bytes / tensor + self.dense_bytes - self.split_bytes
        add("all-reduce", "data", local, data)
        add("all-gather", "tensor", own * self.features, tensor)
        add("all-reduce", "tensor", own * self.hidden, tensor)
        if scattered:
            add("reduce-scatter", "tensor", own * self.features / tensor, tensor)
        else:
            add("all-reduce", "tensor", own * self.features, tensor)
        return found

    def dense(self, sent: Mapping[Any, float], n: int) -> float:
        """Of all that is `sent`, what is not the convolutions' gradient."""
        return sum(sent.values()) - hlo.WIRE["all-reduce"](self.conv_bytes, n)


def sizes_of(params: Mapping[str, Any]) -> Sizes:
    """From AlexNet's parameters, or their shapes."""
    nbytes = lambda tree: sum(4 * leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    conv = nbytes({name: part for name, part in params.items() if name.startswith("layer_")})
    first, second = params["dense_0"], params["dense_1"]["kernel"]
    (first_FH,), (second_HH,) = jax.tree.leaves(first["kernel"]), jax.tree.leaves(second)
    return Sizes(
        conv_bytes=conv,
        dense_bytes=nbytes(params) - conv,
        split_bytes=nbytes((first, second)),
        features=first_FH.shape[0],
        hidden=second_HH.shape[1],
    )


def find() -> dict[str, Any]:
    """Of each program what is counted and predicted, and how far the steps are from one device's.

    On 8 devices.
    """
    rows = [counted(name, *program) for name, program in PROGRAMS.items()]
    found = {key: [row[key] for row in rows] for key in rows[0]}
    experiment = opened(CONFIG, FIELDS | {"batch_size": SAME_BATCH})
    start = experiment.init.lower().compile(collectives.QUICK)()
    alone = trained(start, {"mesh": "data=1"}, devices=1)
    away = []
    for mesh in ("data=2,tensor=4", "tensor=8"):
        own = trained(start, TRICK | {"mesh": mesh}, devices=DEVICES)
        apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), own, alone)
        away.append(float(max(jax.tree.leaves(apart))))
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), alone, start.params)
    return found | {"distances": away, "moved": float(max(jax.tree.leaves(moved)))}


def counted(
    name: str, layout: Mapping[str, str], batch: int, *, fields: Mapping[str, Any] = FIELDS
) -> dict[str, Any]:
    """The bytes that a device sends in a step of the thin net, counted and predicted."""
    fields = fields | layout | {"batch_size": batch}
    experiment = opened(CONFIG, fields, devices=DEVICES)
    rows = collectives.of_experiment(experiment)
    found = {f"{r['kind']} {r['axis']}": r["wire_bytes"] for r in rows if r["kind"] != "all"}
    sizes, axes = sizes_of(experiment.abstract_state.params), experiment.mesh.shape
    split = dict(data=axes["data"], tensor=axes["tensor"])
    as_compiled = sizes.sent(batch, **split, scattered=False)
    least = sizes.sent(batch, **split, scattered=True)
    return {
        "program": name,
        "batch": batch,
        "counted": {key: nbytes for key, nbytes in found.items() if nbytes > LEAST_BYTES},
        "predicted": {" ".join(key): nbytes for key, nbytes in as_compiled.items()},
        "least_bytes": least.total(),
        "counted_dense_bytes": sizes.dense(found, DEVICES),
        "dense_bytes": sizes.dense_bytes,
        "sent_width": sizes.features + sizes.hidden,
    }


def trained(
    start: TrainState,
    layout: Mapping[str, str],
    *,
    devices: int,
    fields: Mapping[str, Any] = FIELDS,
) -> Any:
    """The parameters `STEPS` steps after `start`, on the host."""
    experiment = opened(CONFIG, fields | layout | {"batch_size": SAME_BATCH}, devices=devices)
    step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    step = step.compile(collectives.QUICK)
    # A copy: the steps reuse their state's memory.
    state = jax.device_put(jax.tree.map(jnp.copy, start), experiment.shardings)
    for batch in experiment.train_loader().batches(0, STEPS):
        state, _ = step(state, batch)
    return jax.tree.map(np.array, state.params)


def step_s(sizes: Sizes, gpus: int, *, trick: bool, shared: bool) -> float:
    """Seconds of a step of 128 images for each K20: one GPU's, and the traffic, nothing hidden."""
    if trick:
        sent = sizes.sent(OWN_BATCH * gpus, data=1, tensor=gpus, scattered=True).total()
    else:
        sent = hlo.WIRE["all-reduce"](sizes.conv_bytes + sizes.dense_bytes, gpus)
    return STEP_S + sent / LANES_BYTES_PER_S * (min(gpus, PER_ROOT_PORT) if shared else 1)


def speedup(sizes: Sizes, gpus: int, **how: bool) -> float:
    """How many times as fast as one GPU; `how` as in `step_s`."""
    return gpus * STEP_S / step_s(sizes, gpus, **how)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    programs, alexnet = _rows(table)
    sizes = Sizes(**{name: alexnet[name] for name in Sizes.__dataclass_fields__})
    published = {k: HOURS[1][0] / hours for k, (hours, _) in HOURS.items() if k > 1}
    ratios = [
        counted.get(key, 0) / predicted.get(key, np.nan)
        for counted, predicted in zip(programs["counted"], programs["predicted"], strict=True)
        for key in counted | predicted
    ]
    over_least = np.divide([sum(c.values()) for c in programs["counted"]], programs["least_bytes"])
    dense = dict(zip(programs["program"], programs["counted_dense_bytes"], strict=True))
    lost_s = STEP_S * (8 / published[8] - 1)
    shared = [speedup(sizes, k, trick=True, shared=True) / p for k, p in published.items()]
    links = (step_s(sizes, 8, trick=True, shared=False) - STEP_S) / lost_s
    pays = [speedup(sizes, 8, trick=trick, shared=True) for trick in (True, False)]
    flops = alexnet["conv_flops"] + alexnet["dense_flops"]
    return judged(
        EXPECTED,
        {
            "compute": alexnet["conv_flops"] / flops,
            "parameters": sizes.conv_bytes / (sizes.conv_bytes + sizes.dense_bytes),
            "bytes": _farthest(ratios),
            "least": max(over_least),
            "same": max(programs["distances"]),
            "less": dense["small"] / dense["data"],
            "more": dense["large"] / dense["data"],
            "links": links,
            "shared": _farthest(shared),
            "pays": pays[0] / pays[1],
        },
    )


def _rows(table: Sequence[Mapping[str, Any]]) -> tuple[Mapping, Mapping]:
    return next(r for r in table if "program" in r), next(r for r in table if "side" in r)


def _farthest(ratios: Sequence[float]) -> float:
    """The one that is farthest from 1; NaN if there is one."""
    return float(max(ratios, key=lambda r: abs(np.log(r)) if r > 0 else np.inf))


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The dense layers' traffic by batch, and the speed-ups."""
    programs, alexnet = _rows(table)
    sizes = Sizes(**{name: alexnet[name] for name in Sizes.__dataclass_fields__})
    thin = {name: i for i, name in enumerate(programs["program"])}
    width, dense = programs["sent_width"][0], programs["dense_bytes"][0]
    batches = np.geomspace(64, 2048, 6)
    of_ring = 2 * (DEVICES - 1) / DEVICES / 1e6
    counted = {
        f"counted, {name}": ([programs["batch"][thin[key]]], [mb])
        for name, key in (("trick", "small"), ("trick, large", "large"), ("data parallel", "data"))
        for mb in [programs["counted_dense_bytes"][thin[key]] / 1e6]
    }
    traffic = plots.lines(
        {
            "trick": (batches, of_ring * 4 * batches * width),
            "data parallel": (batches, np.full(6, of_ring * dense)),
        },
        published=counted,
        title="Dense layers: a thin AlexNet on 8 devices",
        x="global batch",
        y="MB sent by a device in a step",
        logx=True,
        logy=True,
    )
    gpus = sorted(HOURS)
    series = {
        name: (gpus, [speedup(sizes, k, **how) for k in gpus])
        for name, how in {
            "trick, own links": dict(trick=True, shared=False),
            "trick, shared ports": dict(trick=True, shared=True),
            "data parallel, shared": dict(trick=False, shared=True),
        }.items()
    }
    speed = plots.lines(
        series,
        published={"Krizhevsky 2014": (gpus, [HOURS[1][0] / HOURS[k][0] for k in gpus])},
        title="AlexNet on K20: speed-up",
        x="GPUs",
        y="times as fast as one",
        alt="Predicted speed-ups of 1 to 8 GPUs, and the four that were measured.",
    )
    return {"traffic": traffic, "speedup": speed}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(find()))
