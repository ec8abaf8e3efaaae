"""lsdl: the train step that `lsdl.train` runs, on batches that are on the device already."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.matches import Match
from lsdl import prediction
from lsdl.errors import UserError
from lsdl.models import convert
from lsdl.rundir import commit
from lsdl.source import Source
from lsdl.step import variables_of
from lsdl.weights import write

BATCHES = 4


class Player:
    """Takes steps; the state is its own."""

    def __init__(self, match: Match, folder: Path):
        flags = tuple(f"--config.{flag}" for flag in match.overrides)
        experiment = Source(match.config, flags).build()
        self._experiment = experiment
        phase, batch = experiment.phases[0], experiment.abstract_batch
        self._step = phase.train_step.lower(experiment.abstract_state, batch).compile()
        plan = prediction.make(experiment, {phase.first_step: self._step})
        causal = plan.get("analytic", {}).get("model_flops_causal_per_example")
        self.told = {
            "version": commit(),
            "parameters": plan["parameters"],
            "flops_per_step": plan["batch_size"] * plan["model_flops_per_example"],
            "causal_flops_per_step": causal and plan["batch_size"] * causal,
            "peak_flops_per_s": plan.get("peak_flops_per_s"),
            "planned_bytes": plan["compiled"]["needed_bytes"],
            "versions": plan["versions"],
        }
        self._state = experiment.init()
        self._batches = [
            jax.device_put(each, jax.tree.map(lambda x: x.sharding, dict(batch)))
            for each in self._write(folder, dict(batch))
        ]
        self._taken, self._loss = 0, None

    def _write(self, folder: Path, batch: dict) -> list[dict]:
        """The batches, and the initial parameters in the form that Hugging Face's files have."""
        random = np.random.default_rng(0)
        made = [
            {name: _random(random, name, x, self._experiment) for name, x in batch.items()}
            for _ in range(BATCHES)
        ]
        variables = variables_of(self._state)
        weights = {
            "params": variables.pop("params"),
            "model_state": variables,
        }
        weights = jax.device_get(weights)
        try:
            tensors = convert.to_hf(weights, self._experiment.module)
            settings = convert.fields(self._experiment.module, weights)
            write(folder / "weights", tensors, settings)
        except UserError:  # Hugging Face has none of this form
            flat = flatten_dict(weights["params"], sep="/")
            np.savez(folder / "parameters.npz", **flat)
        stacked = {name: np.stack([each[name] for each in made]) for name in batch}
        np.savez(folder / "batches.npz", **stacked)
        (folder / "ready").touch()
        return made

    def steps(self, number: int) -> None:
        """So many steps are sent to the device."""
        for _ in range(number):
            batch = self._batches[self._taken % BATCHES]
            self._state, metrics = self._step(self._state, batch)
            self._loss, self._taken = metrics["loss"], self._taken + 1

    def loss(self) -> float:
        """Of the last step, once all is done."""
        jax.block_until_ready(self._state)
        return float(self._loss)

    def peak_bytes(self) -> int | None:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _random(random: np.random.Generator, name: str, leaf: jax.ShapeDtypeStruct, experiment):
    if name == "weight":
        return np.ones(leaf.shape, leaf.dtype)
    most = {"token": getattr(experiment.task, "vocab_size", 0), "image": 256}
    most |= {"label": getattr(experiment.task, "num_classes", 0)}
    return random.integers(0, most[name], leaf.shape).astype(leaf.dtype)
