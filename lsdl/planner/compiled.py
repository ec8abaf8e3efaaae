"""The train step, compiled for devices that are not here: memory, fit and collectives.

`ask` is for whoever plans: it starts `python -m lsdl.plan --worker FILE`, a process of its own, for
the compilers disturb the process that they are in and may end it. `work` is what that one does.
"""

import json
import os
import shutil
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
HINTS = {"ALG_DOT_BF16": ": it has no products in bfloat16, use --config.precision=float32"}
Answer = dict[str, Any]  # of one experiment: {"compiled", "collectives"}, or {"refused": sentence}


def compiled(experiment, target: hardware.Target, *, dump: Path | None = None) -> Answer:
    """The train step of `experiment`, which was built on the target's devices, compiled for them.

    "compiled": bytes of one device. `limit_bytes` and `fits` are None where the device's memory is
    unknown. Where the compiler fails it has `error` in place of both; that the program is too large
    is no failure. "collectives": the bill, or None where the program's text cannot be had: "unread"
    says why. `dump` is a folder that the compiler writes its texts to (`toolchain.environment`).
    """
    kind = target.device.kind
    state, batch = experiment.abstract_state, experiment.abstract_batch
    lowered = experiment.train_step.lower(state, batch, platforms=(topology.PLATFORMS[kind],))
    rows = largest.arguments(state, batch)
    head = {"target": target.text, "device_count": target.count}
    program, start = None, time.perf_counter()
    try:
        program = lowered.compile(collectives.QUICK if kind == "cpu" else None)
        head |= memory(program, limit_bytes=target.memory_bytes)
    except jax.errors.JaxRuntimeError as error:
        if not (refusal := oom.parse(str(error))):
            why = " ".join(str(error).split("\n")[0].split())
            why += next((hint for words, hint in HINTS.items() if words in why), "")
            return {"compiled": {**head, "error": why}, "collectives": None, "unread": why}
        head |= oom.numbers(refusal, *map(_argument_bytes, (state, batch)))
    head["compile_s"] = time.perf_counter() - start
    try:
        text = _text(program, dump)
        rows += largest.temporaries(text)
        bounds = collectives.lower_bounds(experiment)
        told = {"collectives": collectives.bill(text, experiment.mesh.shape, bounds=bounds)}
    except (jax.errors.JaxRuntimeError, UserError, FileNotFoundError) as error:
        told = {"collectives": None, "unread": str(error).splitlines()[0]}
    return {"compiled": {**head, "largest": largest.top(rows)}, **told}


def _argument_bytes(tree: Any) -> int:
    return sum(row["bytes"] for row in largest.arguments(tree))


def memory(program: jax.stages.Compiled, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """What a compiled step needs on one device, and whether a device of `limit_bytes` has it."""
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
        "limit_bytes": limit_bytes,
        "fits": None if limit_bytes is None else needed <= limit_bytes,
    }


def _text(program: jax.stages.Compiled | None, dump: Path | None) -> str:
    """The optimised program; also where the compiler refused it, or jax cannot print it."""
    if program is not None:
        try:
            return program.as_text()
        except jax.errors.JaxRuntimeError:
            if not dump:
                raise
    return oom.dumped(dump, "after_optimizations.txt").read_text()


def work(path: Path, build: Callable[[str, Sequence[str], Sequence[jax.Device]], Any]) -> None:
    """Answer the request in the file `path`, which `ask_all` wrote; each answer as it is there.

    `build(source, flags, devices)` makes the experiment.
    """
    request = json.loads(path.read_text())
    target = hardware.parse(request["target"], request["hardware"] and Path(request["hardware"]))
    with Path(request["answers"]).open("a") as file:
        for source, flags in request["variants"]:
            try:
                experiment = build(source, flags, topology.devices(target))
                answer = compiled(experiment, target, dump=Path(request["dump"]))
            except UserError as error:
                answer = {"refused": str(error)}
            print(json.dumps(answer), file=file, flush=True)
            jax.clear_caches()
            shutil.rmtree(request["dump"], ignore_errors=True)


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
    with tempfile.TemporaryDirectory(prefix="lsdl-plan-") as folder:
        names = ("request", "answers", "log", "dump")
        request, answers, log, dump = (Path(folder) / name for name in names)
        given = toolchain.environment(
            target.device.kind, devices=target.count, given=os.environ, dump=dump
        )
        answers.touch()
        question = {
            "target": target.text,
            "hardware": file and str(file),
            "answers": str(answers),
            "dump": str(dump),
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
