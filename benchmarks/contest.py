"""A contest of lsdl with the peers of a match: in turn, on one machine, from the same parameters.

All players are started and compiled first and wait for their turn; one of them works at a time. A
round in which others took more than `FOREIGN` of the machine's cores is dropped and told. Nothing
is compared that does not compute the same: the losses of the first steps are laid over each other.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.matches import MATCHES, Match
from lsdl.rundir import commit, now, versions

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = 0.15  # cores
PEERS_PYTHON = "LSDL_PEERS_PYTHON"  # the interpreter that has the peers' packages
TICKS = os.sysconf("SC_CLK_TCK")


class Unable(Exception):
    """A player that cannot be there, and why."""


class Worker:
    """A player in its own process."""

    def __init__(self, match: str, player: str, folder: Path, log: Path):
        kind, python = MATCHES[match].kind, sys.executable
        env = dict(os.environ, PYTHONPATH=os.pathsep.join((str(ROOT), *_paths())))
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all share one device
        env["JAX_DEFAULT_PRNG_IMPL"] = "unsafe_rbg"  # the initial values compile in no time
        if kind == "cpu":
            env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
            # Steps free what they need in between, and get it again page by page: in large pages.
            env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        if player != "ours":
            python = os.environ.get(PEERS_PYTHON, python)
        self.player = player
        self._log = log / f"{match}-{player}.log"
        command = [python, "-m", "benchmarks.worker", match, player, str(folder)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(command, **pipes, stderr=errors, env=env, cwd=ROOT)

    def hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text().strip().splitlines()
            raise Unable(f"{self.player} ended: {words[-1] if words else 'without a word'}")
        return json.loads(line)

    def say(self, verb: str, number: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(verb, number, file=self._process.stdin, flush=True)

    def ask(self, verb: str, number: int) -> dict[str, Any]:
        self.say(verb, number)
        return self.hear()

    def cpu_s(self) -> float:
        return cpu_s(self._process.pid)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def cpu_s(pid: int) -> float:
    """That the process has had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def busy_s() -> float:
    """That all cores of the machine have worked so far."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / TICKS


def play(name: str, *, rounds: int, log: Path, say=print) -> list[dict[str, Any]]:
    """The JSON of each peer's match against lsdl. Raises `Unable` where it cannot be played."""
    match = MATCHES[name]
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        try:
            for player in ("ours", *match.peers):
                workers.append(Worker(name, player, Path(folder), log))
                if player == "ours":  # what the others read is written by it
                    told = {player: workers[0].hear()}
                    say(f"{name}: {player} is ready after {told[player]['ready_s']:.0f} s")
            there = workers[:1]
            for worker in workers[1:]:
                try:
                    told[worker.player] = worker.hear()
                    there.append(worker)
                except Unable as error:
                    say(f"{name}: {error}")
            if len(there) == 1 and match.peers:
                say(f"{name}: no peer is there, lsdl is timed alone")
            return _played(name, match, there, told, rounds, say)
        finally:
            for worker in workers:
                worker.end()


def _played(name, match: Match, workers: Sequence[Worker], told, rounds: int, say) -> list[dict]:
    for worker in workers:  # all at once: they compile
        worker.say("compare", match.compared)
    curves = {}
    for worker in workers:
        answer = worker.hear()
        curves[worker.player] = answer["losses"]
        say(f"{name}: {worker.player} {[round(loss, 4) for loss in answer['losses'][:4]]} ...")
    apart = {
        player: float(np.abs(np.subtract(curve, curves["ours"])).max())
        for player, curve in curves.items()
    }
    for player, most in apart.items():
        if not most <= match.close:
            raise Unable(f"{player} computes something else: losses are {most:.3g} apart")
    for worker in workers:
        worker.ask("time", match.steps)  # warm
    times: list[dict[str, float]] = []
    peaks, dropped = {}, 0
    while len(times) < rounds and dropped < 3 * rounds:
        found, foreign = {}, 0.0
        for worker in workers if len(times) % 2 else workers[::-1]:
            busy, own = busy_s(), worker.cpu_s()
            answer = worker.ask("time", match.steps)
            busy, own = busy_s() - busy, worker.cpu_s() - own
            foreign = max(foreign, (busy - own) / answer["wall_s"])
            found[worker.player] = answer["wall_s"] / match.steps
            peaks[worker.player] = answer["peak"]
        if foreign > FOREIGN and match.kind == "cpu":
            dropped += 1
            continue
        times.append(found)
    if len(times) < rounds:
        raise Unable(f"only {len(times)} of {rounds} rounds were quiet")
    return [
        _told(name, match, player, told, times, apart, peaks, dropped)
        for player in [worker.player for worker in workers[1:]] or [None]
    ]


def _told(
    name: str,
    match: Match,
    peer: str | None,
    told: Mapping[str, Any],
    times: Sequence[Mapping[str, float]],
    apart: Mapping[str, float],
    peaks: Mapping[str, int | None],
    dropped: int,
) -> dict[str, Any]:
    units = match.fixed["batch"] * match.fixed.get("length", 1)
    own = statistics.median(round["ours"] for round in times)
    found = {
        "match": match.title,
        "device": record.machine(match.kind),
        "peer": peer,
        "peer_commit": peer and told[peer]["version"],
        "lsdl": {
            "step_s": own,
            f"{match.unit}_per_s": units / own,
            "model_flops_per_s": told["ours"]["flops_per_step"] / own,
            **mfu(told["ours"], own),
            "planned_bytes": told["ours"]["planned_bytes"],
            "peak_bytes": peaks["ours"],
            "ready_s": told["ours"]["ready_s"],
        },
        "n": len(times),
        "dropped": dropped,
        "versions": versions(),
        "command": f"python -m benchmarks.run {name} --rounds {len(times)}",
        "commit": os.environ.get("LSDL_COMMIT") or commit(),
        "date": now(),
    }
    if peer:
        theirs = statistics.median(round[peer] for round in times)
        found["theirs"] = {
            "step_s": theirs,
            f"{match.unit}_per_s": units / theirs,
            "peak_bytes": peaks[peer],
            "ready_s": told[peer]["ready_s"],
            "parameters": told[peer]["parameters"],
        }
        found["losses_apart"] = apart[peer]
        found["ratio"] = record.spread([round["ours"] / round[peer] for round in times])
        found["versions"] |= told[peer]["versions"]
    return found


def mfu(told: Mapping[str, Any], step_s: float) -> dict[str, float]:
    """Shares of the peak, causal attention counted whole (as in PaLM) or half; {}: unknown."""
    counts = {"mfu": told["flops_per_step"], "mfu_causal": told["causal_flops_per_step"]}
    peak = told["peak_flops_per_s"]
    return {name: flops / step_s / peak for name, flops in counts.items() if peak and flops}
