"""The train step, compiled for devices that are not here: memory, fit and collectives.

`ask` is for whoever plans: it starts `python -m lsdl.plan --worker FILE`, a process of its own, for
the compilers disturb the process that they are in and may end it. `work` is what that one does.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lsdl.errors import UserError
from lsdl.planner import collectives, hardware, largest, oom, toolchain, topology

Variant = tuple[str, Sequence[str]]  # FILE[:VARIANT] of a config, --config.FIELD=VALUE flags
Answer = dict[str, Any]  # of one experiment: {"compiled", "collectives"}, or {"refused": sentence}

# The program that runs is scheduled with more care. Its memory and collectives are these within a
# few percent, and it takes seven times as long to compile.
HASTE = {
    "cpu": collectives.QUICK,
    "gpu": {},
    "tpu": {"exec_time_optimization_effort": -1.0},
}
# For a TPU's program that was refused: compiled for more memory it can be read.
ROOMY = {"xla_tpu_max_hbm_size_mib": str(2**24)}


def compiled(experiment, target: hardware.Target) -> Answer:
    """The train step of `experiment`, which was built on the target's devices, compiled for them.

    "compiled": bytes of one device. `limit_bytes` and `fits` are None where the device's memory is
    unknown. Where the compiler fails it has `error` in their place; that the program is too large
    is no failure, and the bytes are then those that it would have with enough memory.
    "collectives": the bill, or None where the program's text cannot be had: "unread" says why.
    """
    kind = target.device.kind
    state, batch = experiment.abstract_state, experiment.abstract_batch
    lowered = experiment.train_step.lower(state, batch, platforms=(topology.PLATFORMS[kind],))
    head = {"target": target.text, "device_count": target.count}
    limit, refused, start = target.memory_bytes, False, time.perf_counter()
    try:
        try:
            program = lowered.compile(HASTE[kind])
        except jax.errors.JaxRuntimeError as error:
            if kind != "tpu" or not (over := oom.parse(str(error))):
                raise
            refused, limit = True, over[1]
            program = lowered.compile({**HASTE[kind], **ROOMY})
    except jax.errors.JaxRuntimeError as error:
        why = "\n".join(str(error).splitlines()[:3])
        return {"compiled": {**head, "error": why}, "collectives": None, "unread": why}
    numbers = _bytes(program, limit, refused)
    numbers["compile_s"] = time.perf_counter() - start
    rows = largest.arguments(state, batch)
    try:
        text = program.as_text()
        rows += largest.temporaries(text)
        mesh = experiment.mesh.shape
        bill = collectives.bill(text, mesh, bounds=collectives.lower_bounds(experiment))
        told = {"collectives": bill}
    except (jax.errors.JaxRuntimeError, UserError) as error:
        told = {"collectives": None, "unread": str(error).splitlines()[0]}
    return {"compiled": {**head, **numbers, "largest": largest.top(rows)}, **told}


def _bytes(program: jax.stages.Compiled, limit: int | None, refused: bool) -> dict[str, Any]:
    found = program.memory_analysis()
    argument, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    output, aliased = found.output_size_in_bytes, found.alias_size_in_bytes
    needed = argument + temporary + output - aliased
    return {
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        "output_bytes": output,
        "aliased_bytes": aliased,
        "needed_bytes": needed,
        "limit_bytes": limit,
        "fits": None if limit is None else needed <= limit and not refused,
    }


def work(path: Path, build: Callable[[str, Sequence[str], Sequence[jax.Device]], Any]) -> None:
    """Answer the request in the file `path`, which `ask_all` wrote; each answer as it is there.

    `build(source, flags, devices)` makes the experiment.
    """
    request = json.loads(path.read_text())
    target = hardware.parse(request["target"], request["hardware"] and Path(request["hardware"]))
    with Path(request["answers"]).open("a") as file:
        for source, flags in request["variants"]:
            try:
                answer = compiled(build(source, flags, topology.devices(target)), target)
            except UserError as error:
                answer = {"refused": str(error)}
            print(json.dumps(answer), file=file, flush=True)
            jax.clear_caches()


def ask(source: str, flags: Sequence[str], target: str, *, file: Path | None = None) -> Answer:
    """What `compiled` says of the config `source` with `flags` for `target`.

    `source`: FILE[:VARIANT], `flags`: --config.FIELD=VALUE, `file`: the user's own hardware. The
    compiler's crash is an answer too, an `error`. Raises `UserError` where the experiment or the
    target cannot be, `NoCompilerError` where nothing is installed that compiles for the target.
    """
    (answer,) = ask_all([(source, flags)], target, file=file)
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer


def ask_all(
    variants: Sequence[Variant],
    target: str,
    *,
    file: Path | None = None,
    told: Callable[[int, Answer], None] = lambda i, answer: None,
) -> list[Answer]:
    """`ask` for several experiments, one after the other in one process.

    An experiment that cannot be is answered by {"refused": why}. `told(i, answer)` is called as
    soon as the answer to the i-th is there.
    """
    parsed = hardware.parse(target, file)
    toolchain.check(parsed.device.kind)
    answers: list[Answer] = []
    while len(answers) < len(variants):
        for answer in _process(variants[len(answers) :], parsed, file):
            told(len(answers), answer)
            answers.append(answer)
    return answers


def _process(
    variants: Sequence[Variant], target: hardware.Target, file: Path | None
) -> Iterator[Answer]:
    """The answers of one process; where it dies, that is its last one."""
    given = toolchain.environment(target.device.kind, devices=target.count, given=os.environ)
    with tempfile.TemporaryDirectory(prefix="lsdl-plan-") as folder:
        request, answers, log = (Path(folder) / name for name in ("request", "answers", "log"))
        answers.touch()
        question = {
            "target": target.text,
            "hardware": file and str(file),
            "answers": str(answers),
            "variants": [(source, list(flags)) for source, flags in variants],
        }
        request.write_text(json.dumps(question))
        command = [sys.executable, "-m", "lsdl.plan", "--worker", str(request)]
        with log.open("w") as noise:
            process = subprocess.Popen(command, env=given, stdout=noise, stderr=noise)
        read, start = 0, time.monotonic()
        try:
            while True:
                ended = process.poll() is not None
                for line in answers.read_text().split("\n")[read:-1]:
                    yield json.loads(line)
                    read += 1
                if ended:
                    break
                _say(f"compiling for {target.text}, {read + 1} of {len(variants)}", start)
                time.sleep(0.2)
        finally:  # on Ctrl-C too
            _say("", start)
            process.kill()
            process.wait()
        if read < len(variants):
            why = f"the compiler {_end(process.returncode)}: {_last(log.read_text())}"
            head = {"target": target.text, "device_count": target.count}
            yield {"compiled": {**head, "error": why}, "collectives": None, "unread": why}


def _say(text: str, start: float) -> None:
    """`text` on the line of a terminal that was said last; nothing where nobody looks."""
    if sys.stderr.isatty():
        line = f"{text}, {time.monotonic() - start:.0f} s" if text else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _end(code: int) -> str:
    """How a process ended, from its exit code."""
    number = -code if code < 0 else code - 128  # a shell's way to say it
    try:
        return f"crashed ({signal.Signals(number).name})"
    except ValueError:
        return f"ended with {code}"


def _last(log: str, lines: int = 3) -> str:
    """The last words of a process."""
    return " / ".join([line.strip() for line in log.splitlines() if line.strip()][-lines:])
