"""From the reports of a job's processes to what is wrong with it: sentences and a table.

A report is what `checkup.report` makes.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

ROWS = 32  # of the table: more processes are counted only


def findings(reports: Sequence[dict]) -> list[str]:
    """One sentence for each thing that is wrong with a job, from what its processes report."""
    found = []
    for sentence, numbers in grouped((p, r["process"]) for r in reports for p in r["problems"]):
        found.append(sentence + ("" if len(reports) == 1 else f" (process {names(numbers)})"))
    found += filter(None, [_alone(reports[0])])
    for host, numbers in grouped((r["host"], r["process"]) for r in reports):
        found += filter(None, [_idle_gpus(host, [r for r in reports if r["process"] in numbers])])
    kinds = grouped((f"{r['devices']} {r['kind']}", r["process"]) for r in reports)
    if len(kinds) > 1:
        seen = "; ".join(f"{kind} in process {names(numbers)}" for kind, numbers in kinds)
        found.append(f"The processes do not have the same devices: {seen}.")
    for name in reports[0]["versions"]:
        seen = grouped((str(r["versions"][name]), r["process"]) for r in reports)
        if len(seen) > 1:
            said = "; ".join(f"{value} in process {names(numbers)}" for value, numbers in seen)
            found.append(f"{name} differs: {said}: start all from the same environment.")
    return found


def _alone(report: dict) -> str | None:
    """What keeps this process from the others that its launcher has started."""
    launcher, index = report["launcher"], report["expected_id"]
    expected, seen = report["expected_processes"], report["processes"]
    if report["mode"] == "explicit" or seen == expected:
        return None
    if launcher == "kubernetes" and index and seen == 1:  # it does not say how many there are
        return (
            f"Kubernetes has numbered this process {index} and it is alone: give "
            "--distributed=auto, install jax[k8s], and let the service account list pods, as "
            "launch/jobset.yaml does."
        )
    if expected is None:
        return None
    fix = "give --distributed=auto."
    if index is None:
        fix = "put srun before the command."
    elif report["mode"] != "off":
        fix = "see the first lines of their output."
    return f"The {launcher} job has {expected} processes and this one sees {seen}: {fix}"


def _idle_gpus(host: str, reports: Sequence[dict]) -> str | None:
    """The GPUs of a node that no process of the job uses, and why."""
    slurm = reports[0]["launcher"] == "slurm"
    visible = max(r["gpus_visible"] for r in reports)
    gpus = max(r["gpus_on_node"] for r in reports) if slurm else visible
    seen = sum(r["devices"] for r in reports if r["platform"] != "cpu")
    if seen >= gpus or any("cpu" in r["asked_platform"] for r in reports):
        return None
    tasks = f"{len(reports)} process" + ("es" if len(reports) > 1 else "")
    start = f"{host} has {gpus} GPUs, of which the job's {tasks} there see {seen or 'none'}: "
    every = ",".join(map(str, range(gpus)))
    if not seen:
        return start + "install lsdl[cuda], and try nvidia-smi there."
    if visible < gpus:
        return start + (
            f"CUDA_VISIBLE_DEVICES shows {visible} to each. Start one process for each GPU (srun "
            f"--ntasks-per-node={gpus}), or export CUDA_VISIBLE_DEVICES={every} before srun."
        )
    if slurm:
        return start + (
            "under Slurm jax takes one for each process unless it is told otherwise. Start one "
            f"process for each GPU (srun --ntasks-per-node={gpus}), or unset JAX_LOCAL_DEVICE_IDS, "
            "whereupon lsdl gives each process its share (local_device_ids of "
            "jax.distributed.initialize)."
        )
    return start + "unset JAX_LOCAL_DEVICE_IDS, or show each process its own."


def grouped(pairs: Iterable[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    """[(value, the processes that have it)], as first met."""
    groups = defaultdict(list)
    for value, number in pairs:
        groups[value].append(number)
    return list(groups.items())


def names(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def table(reports: Sequence[dict]) -> str:
    """One line for each process: where it runs, what it has."""
    rows = [("process", "host", "devices", "free disk", "")]
    for r in reports[:ROWS]:
        free = "" if r["free"] is None else f"{r['free'] / 1e9:,.1f} GB"
        state = counted(len(r["problems"]), "problem") if r["problems"] else "ok"
        rows.append((str(r["process"]), r["host"], f"{r['devices']} {r['kind']}", free, state))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    if len(reports) > ROWS:
        lines.append(f"... and {len(reports) - ROWS} more")
    devices = sum(r["devices"] for r in reports)
    told = reports[0]["versions"]
    lines += [
        f"processes: {len(reports)}, devices: {devices}",
        ", ".join(f"{name} {told[name]}" for name in ("Python", "jax", "jaxlib", "flax", "lsdl")),
    ]
    return "\n".join(line.rstrip() for line in lines)
