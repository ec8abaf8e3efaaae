"""Goodput: what failures and checkpoints leave of a run's time, and how often to save.

Failures come one by one, as rare and as likely at any moment, while the run computes, saves or
restarts. A save stops the run for `checkpoint_s`; written behind the run's back, it counts
`write_s` after that. A failure throws away what came after the last save that counts, and takes
`restart_s`: to be seen, to be scheduled, to load.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lsdl.errors import UserError
from lsdl.planner import tree

DAY_S, HOUR_S = 86_400.0, 3_600.0
# Grattafiori et al. 2024, section 3.3.1: the storage behind 16,384 H100, sustained.
STORAGE_BYTES_PER_S = 2e12
# What a device copies to its host: PCIe 5 with 16 lanes moves 32 GB/s in theory. A floor.
COPY_BYTES_PER_S = 32e9
# Jiang et al. 2024 (MegaScale), section 6: a failure is found and diagnosed within 10 minutes.
RESTART_S = 600.0
# Grattafiori et al. 2024, section 3.3.4 and table 5: the 405 B model, a window of 54 days.
LLAMA3 = {
    "devices": 16_384,
    "days": 54,
    "failures": 419,
    "parameters": 405_000_000_000,
    "least_goodput": 0.9,
}
MODEL_BYTES = 12  # of a parameter in a checkpoint: itself and Adam's two moments, in float32


def young(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between two saves. Source: Young 1974: sqrt(2 d M)."""
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_first(checkpoint_s: float, mtbf_s: float, restart_s: float) -> float:
    """Seconds of work between two saves. Source: Daly 2006, first order: sqrt(2 d (M + R))."""
    return math.sqrt(2 * checkpoint_s * (mtbf_s + restart_s))


def daly(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between two saves. Source: Daly 2006; M for d >= 2 M."""
    half = checkpoint_s / (2 * mtbf_s)
    if half >= 1:
        return mtbf_s
    return young(checkpoint_s, mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - checkpoint_s


def best(checkpoint_s: float, mtbf_s: float) -> float:
    """The interval at which `goodput` is largest, exactly: neither R nor what is written matters.

    Where 1 - t/M = exp(-(t + d)/M), by Newton's steps from t = M, which never pass it.
    """
    t, d = 1.0, checkpoint_s / mtbf_s
    for _ in range(64):
        failing = math.exp(-t - d)
        t += (1 - t - failing) / (1 - failing)
    return t * mtbf_s


def goodput(
    interval_s: float,
    *,
    checkpoint_s: float,
    mtbf_s: float,
    restart_s: float,
    write_s: float = 0.0,
) -> float:
    """The part of the time that ends up in the result, in expectation over a long run.

    t exp(-(R + w)/M) / (M (exp((t + d)/M) - 1)). Between two failures the run restarts, over and
    over until nothing fails for R, and then makes k saves that count if it lives for
    w + k (t + d). Source: Daly 2006, for w = 0.
    """
    useful = interval_s / mtbf_s * math.exp(-(restart_s + write_s) / mtbf_s)
    return useful / math.expm1((interval_s + checkpoint_s) / mtbf_s)


def shares(interval_s: float, **costs: float) -> dict[str, float]:
    """Parts of the time, adding up to 1: useful work, saves of it, restarts, and work lost.

    `costs`: those of `goodput`.
    """
    useful = goodput(interval_s, **costs)
    saving = useful * costs["checkpoint_s"] / interval_s
    alive = math.exp(-costs["restart_s"] / costs["mtbf_s"])
    return {
        "useful": useful,
        "saving": saving,
        "restart": 1 - alive,
        "lost": alive - useful - saving,
    }


def simulate(
    interval_s: float,
    *,
    checkpoint_s: float,
    mtbf_s: float,
    restart_s: float,
    write_s: float = 0.0,
    seed: int = 0,
    runs: int = 256,
    failures: int = 128,
) -> tuple[float, float]:
    """`goodput` by playing `runs` runs event by event, of so many failures each on average.

    Returns the mean over the runs, and its standard error. An event is the end of a piece of work,
    of a stop to save, of a write or of a restart, or a failure. `write_s` is at most the time from
    one save to the next: one is under way at a time.
    """
    random = np.random.default_rng(seed)
    horizon_s = failures * mtbf_s
    work, save, restart = 0, 1, 2
    after = np.array([save, work, work])
    lasts_s = np.array([interval_s, checkpoint_s, restart_s])
    phase, kept, alive = np.full(runs, work), np.zeros(runs), np.ones(runs, bool)
    ends_s, fails_s = np.full(runs, interval_s), random.exponential(mtbf_s, runs)
    written_s = np.full(runs, math.inf)  # when the save under way counts
    while alive.any():
        now_s = np.minimum(np.minimum(ends_s, fails_s), written_s)
        alive &= now_s < horizon_s
        failed, stored = alive & (fails_s == now_s), alive & (written_s == now_s)
        ended = alive & (ends_s == now_s) & ~failed
        kept += stored
        written_s[stored | failed] = math.inf
        saved = ended & (phase == save)
        kept += saved & np.isfinite(written_s)  # written just now: sums of seconds are rounded
        written_s[saved] = now_s[saved] + write_s
        phase = np.where(failed, restart, np.where(ended, after[phase], phase))
        ends_s = np.where(failed | ended, now_s + lasts_s[phase], ends_s)
        fails_s[failed] = now_s[failed] + random.exponential(mtbf_s, failed.sum())
    found = kept * interval_s / horizon_s
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(runs))


def make(
    *,
    devices: int,
    mtbf_device_hours: float,
    state_bytes: int = 0,
    checkpoint_s: float | None = None,
    write_s: float | None = None,
    restart_s: float = RESTART_S,
    storage_bytes_per_s: float = STORAGE_BYTES_PER_S,
    copy_bytes_per_s: float = COPY_BYTES_PER_S,
    asynchronous: bool = True,
    step_s: float | None = None,
) -> dict[str, Any]:
    """Failures a day, the best interval between saves, and the goodput, as JSON values.

    `mtbf_device_hours`: hours that one device lives on average, its share of host and network
    included; `state_bytes`: of the whole checkpoint, split over all devices. From them, where they
    are not given: `checkpoint_s`, what stops the run: the copy to the hosts, or with
    `asynchronous=False` the write to storage; `write_s`, the write behind the run's back.
    `step_s` adds the interval in steps. Raises `UserError` for what is not positive.
    """
    _check_positive(devices=devices, mtbf_device_hours=mtbf_device_hours, restart_s=restart_s)
    _check_positive(storage_bytes_per_s=storage_bytes_per_s, copy_bytes_per_s=copy_bytes_per_s)
    if checkpoint_s is None:
        _check_positive(state_bytes=state_bytes)
        stored_s, copied_s = state_bytes / storage_bytes_per_s, state_bytes / devices
        checkpoint_s = copied_s / copy_bytes_per_s if asynchronous else stored_s
        write_s = stored_s if asynchronous and write_s is None else write_s
    write_s = write_s or 0.0
    _check_positive(checkpoint_s=checkpoint_s)
    mtbf_s = mtbf_device_hours * HOUR_S / devices
    costs = dict(checkpoint_s=checkpoint_s, mtbf_s=mtbf_s, restart_s=restart_s, write_s=write_s)
    # One save at a time: the next waits until this one is written.
    interval_s = max(best(checkpoint_s, mtbf_s), write_s - checkpoint_s)
    rules = {
        "young": young(checkpoint_s, mtbf_s),
        "daly_first": daly_first(checkpoint_s, mtbf_s, restart_s),
        "daly": daly(checkpoint_s, mtbf_s),
        "exact": interval_s,
    }
    found = {"devices": devices, "mtbf_device_hours": mtbf_device_hours, **costs}
    found |= {"state_bytes": state_bytes, "failures_per_day": DAY_S / mtbf_s}
    found |= {"intervals_s": rules, "interval_s": interval_s}
    found["goodputs"] = {name: goodput(rule, **costs) for name, rule in rules.items()}
    found |= {"shares": shares(interval_s, **costs), "goodput": found["goodputs"]["exact"]}
    if step_s is not None:
        _check_positive(step_s=step_s)
        found["interval_steps"] = max(1, round(interval_s / step_s))
    return found


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name}={value!r} must be a positive number.")


def llama3() -> dict[str, Any]:
    """`make` for Llama 3's report, and what its failures and its goodput say of restarts."""
    hours = LLAMA3["devices"] * LLAMA3["days"] * 24
    state_bytes = MODEL_BYTES * LLAMA3["parameters"]
    found = make(
        devices=LLAMA3["devices"],
        mtbf_device_hours=hours / LLAMA3["failures"],
        state_bytes=state_bytes,
        asynchronous=False,
    )
    free = {**{k: found[k] for k in ("checkpoint_s", "mtbf_s", "write_s")}, "restart_s": 0.0}
    ceiling = goodput(found["interval_s"], **free)
    # goodput = ceiling exp(-R/M)
    longest_s = found["mtbf_s"] * math.log(ceiling / LLAMA3["least_goodput"])
    return found | {"goodput_without_restarts": ceiling, "longest_restart_s": longest_s}


def table(found: Mapping[str, Any]) -> str:
    """`found` of `make`, for people."""
    mtbf_s, parts = found["mtbf_s"], found["shares"]
    each = found["mtbf_device_hours"]
    steps = f" = {found['interval_steps']:,} steps" if "interval_steps" in found else ""
    lines = [
        f"failures      {found['failures_per_day']:.3g} a day: {found['devices']:,} devices, one "
        f"failure in {each:,.0f} device-hours, every {_time(mtbf_s)}",
        f"a save        stops the run for {_time(found['checkpoint_s'])}, and counts "
        f"{_time(found['write_s'])} later{_size(found)}",
        f"a restart     takes {_time(found['restart_s'])}",
        f"save every    {_time(found['interval_s'])}{steps}",
        f"goodput       {found['goodput']:.2%}; saving takes {parts['saving']:.2%}, restarts "
        f"{parts['restart']:.2%}, work done twice {parts['lost']:.2%}",
    ]
    names = {"young": "Young 1974", "daly_first": "Daly 2006, first order"}
    names |= {"daly": "Daly 2006, higher order", "exact": "exact, or what a write allows"}
    for key, name in names.items():
        interval_s, part = found["intervals_s"][key], found["goodputs"][key]
        lines.append(f"  {name:31} {_time(interval_s):>8}  {part:.2%}")
    return "\n".join(lines)


def llama3_table() -> str:
    """Llama 3's report beside what this module makes of it."""
    found = llama3()
    head = (
        f"Llama 3 (Grattafiori et al. 2024): {LLAMA3['failures']} unexpected interruptions in "
        f"{LLAMA3['days']} days on {LLAMA3['devices']:,} H100; effective training time above "
        f"{LLAMA3['least_goodput']:.0%}"
    )
    tail = (
        f"without restarts {found['goodput_without_restarts']:.2%} would be left: the reported "
        f"{LLAMA3['least_goodput']:.0%} allow each of them "
        f"{_time(found['longest_restart_s'])} at most"
    )
    return "\n".join([head, table(found), tail])


def _size(found: Mapping[str, Any]) -> str:
    return f": {tree.binary(found['state_bytes'])}" if found["state_bytes"] else ""


def _time(seconds: float) -> str:
    """1.5 -> '1.5 s', 120 -> '2.0 min', 7200 -> '2.0 h'."""
    for unit, size in (("d", 2 * DAY_S), ("h", 2 * HOUR_S), ("min", 120.0)):
        if seconds >= size:
            return f"{seconds / {'d': DAY_S, 'h': HOUR_S, 'min': 60.0}[unit]:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.3f} s"
