"""Processes: how one becomes one of many, and what they tell one another before they compute."""

import contextlib
import faulthandler
import itertools
import json
import math
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed

from lsdl.errors import (
    STUCK,
    UNREACHABLE,
    DisagreeError,
    UnreachableError,
    UserError,
    end,
)
from lsdl.interruption import StopRequest, current
from lsdl.launcher import end_with_launcher
from lsdl.peers import Peers
from lsdl.rendezvous import meeting, place, run_token, split_address
from lsdl.rollcall import Call, Hearing, farewell, joined, listening, roll_call

SLOWEST_S = 3600  # that one process may take longer than another for the same piece of work

_peers: Peers | None = None  # the others, once they have met
_turns = itertools.count(1)  # of what all processes do in the same order


def initialise(
    mode: str = "off",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_s: float = 300,
    heartbeat_s: float = 30,
) -> None:
    """Join the other processes. Must come before anything else touches a device.

    off: this process is alone. on: the launcher says where the others are (Slurm, Open MPI, Cloud
    TPU, Kubernetes). auto: the same, but alone where there is no launcher. The three explicit
    arguments, all or none of them, work everywhere.

    Raises `UnreachableError` if the others are not there within `wait_s` seconds, under Slurm and
    with explicit arguments: elsewhere jax waits for them, as long, and aborts. From here on a
    process of which nothing comes for `heartbeat_s` seconds ends all others, by `UNREACHABLE`.
    """
    end_with_launcher(os.environ)
    for flag, value in (("--wait", wait_s), ("--heartbeat", heartbeat_s)):
        if not 0 < value < 2**31:
            raise UserError(f"{flag}={value:g} must be positive, in seconds.")
    here = place(os.environ)
    given = coordinator, num_processes, process_id
    coordinator, num_processes, process_id = meeting(here, mode, *given)
    if mode == "off" and coordinator is None:
        return
    stop = current() or StopRequest()
    sockets: dict[int, socket.socket] = {}
    _own_stdout()
    # jax does not say how many there are before they have met.
    others = 0 if not coordinator else 1 if process_id else num_processes - 1
    stop.farewell = lambda code: farewell(sockets, code=code, others=others)
    stop.wait_if_leaving()
    # jax's own heartbeat is slower than the lines', which tell the cause.
    limits = {
        "initialization_timeout": math.ceil(max(wait_s, 10)),
        "heartbeat_timeout_seconds": math.ceil(heartbeat_s) + 15,
        "shutdown_timeout_seconds": 30,
    }
    if coordinator:
        told = dict(wait_s=wait_s, token=run_token(os.environ), sockets=sockets)
        met = roll_call(coordinator, num_processes, process_id, **told)
        _join(process_id, num_processes, stop, sockets, heartbeat_s)
        with met.reserved or contextlib.nullcontext():
            _initialise_jax(
                stop,
                coordinator_address=met.service,
                num_processes=num_processes,
                process_id=process_id,
                local_device_ids=here.local_device_ids,
                coordinator_bind_address=met.bind,
                **limits,
            )
    elif _initialise_by_jax(mode, stop, limits):
        _meet_by_jax(stop, sockets, wait_s=wait_s, heartbeat_s=heartbeat_s)


def _own_stdout() -> None:
    """Python prints to where stdout was, and nobody else: gloo tells of each connection there."""
    if sys.stdout is None or sys.stdout is not sys.__stdout__:  # a notebook's
        return
    sys.stdout.flush()
    told = dict(encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, **told)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _initialise_jax(stop: StopRequest, **arguments: Any) -> None:
    """By jax, which takes SIGTERM for itself and never gives it back."""
    before = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(**arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
        if stop is current():
            stop.install()


def _initialise_by_jax(mode: str, stop: StopRequest, limits: dict) -> bool:
    """Whether jax has found a launcher, and the other processes."""
    try:
        _initialise_jax(stop, **limits)
    except ValueError as error:  # jax found no launcher
        if mode == "on":
            raise UserError(
                "--distributed=on finds no launcher here: give --coordinator, --num-processes "
                "and --process-id, or leave it out."
            ) from error
        return False
    return True


def _meet_by_jax(stop: StopRequest, sockets: dict, *, wait_s: float, heartbeat_s: float) -> None:
    """The roll call of processes that jax has brought together: it says where it is."""
    state = distributed.global_state
    if state.num_processes == 1:
        return
    if state.process_id == 0:
        host = split_address(state.coordinator_address)[0]
        with listening(host) as server:
            address = joined(host, server.getsockname()[1])
            token = secrets.token_hex(16)
            state.client.key_value_set("lsdl-roll-call", f"{address} {token}")
            hearing = Hearing(server, host, state.num_processes, token, sockets)
            hearing.all(wait_s)
            hearing.answer("go 0")
    else:
        told = state.client.blocking_key_value_get("lsdl-roll-call", int(1000 * wait_s))
        address, token = told.split()
        Call(address, state.num_processes, state.process_id, token, sockets).through(wait_s)
    _join(state.process_id, state.num_processes, stop, sockets, heartbeat_s)


def _join(process_id: int, total: int, stop: StopRequest, sockets: dict, silence_s: float) -> None:
    global _peers
    if total > 1:
        _peers = Peers(process_id, total, stop)
        _peers.join(sockets, silence_s=silence_s)


def is_main() -> bool:
    """Whether this process speaks for all: prints, writes metrics, owns the run folder."""
    return jax.process_index() == 0


def devices() -> dict:
    """What the job runs on, for the run folder."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"count": jax.device_count(), "kinds": kinds, "processes": jax.process_count()}


def speaks(
    error: UserError,
    *,
    mode: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **_: float,
) -> bool:
    """Whether this process tells the user of `error`: one of those that met it does."""
    if jax.distributed.is_initialized():
        return True  # `together` lets one process alone raise it
    if isinstance(error, UnreachableError):
        return True  # process 0 may not be there to say it
    if coordinator:
        return not 0 < (process_id or 0) < (num_processes or 0)
    return mode == "off" or not place(os.environ).process_id


def leave(code: int) -> None:
    """End this process with `code`, if it is one of many: jax may wait for the others for ever."""
    if _peers:
        _peers.leave(code)


def explain() -> int:
    """Of an exception that no entry foresees: the code to leave with, if it is not raised again.

    Where a process is lost the others' collectives fail: the lines then end this one in words.
    """
    if not _peers:
        raise
    _peers.explain()
    traceback.print_exc()
    return 1


def stuck(sentence: str) -> None:
    """End all processes: this one does not go on, as `sentence` says. All show their stacks."""
    if _peers:
        _peers.stuck(sentence)
        return
    faulthandler.dump_traceback(file=2, all_threads=True)
    end(STUCK, sentence)


def tell_step(step: Callable[[], int]) -> None:
    """Where to ask for the newest step that this process has sent: the others may want to know."""
    if _peers:
        _peers.step = step


def _turn() -> int:
    """The number of the meeting that this process comes to now."""
    turn = next(_turns)
    if _peers:
        _peers.turn = turn
    return turn


def together(work: Callable[[], Any], *, main_alone: bool = False) -> Any:
    """Run `work` on every process, or on process 0 alone; if it fails on one, all of them leave.

    The first process that failed raises what it met, and so speaks; the others exit with its code.
    Returns what `work` returned here. Needs no device: nor need the processes be alike.
    """
    result, error = None, None
    if is_main() or not main_alone:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        code = error.exit_code if isinstance(error, UserError) else 1 if error else 0
        key = f"lsdl-together-{_turn()}"
        codes = to_main(key, str(code), wait_s=SLOWEST_S)
        codes = json.loads(from_main(f"{key}-all", json.dumps(codes), wait_s=SLOWEST_S))
        failed = [i for i, text in enumerate(codes) if int(text)]
        if failed and failed[0] != jax.process_index():
            raise SystemExit(int(codes[failed[0]]))
    if error:
        raise error
    return result


def meet() -> None:
    """Wait for the slowest process without a collective: a CPU's gives up after 30 s."""
    barrier(f"lsdl-meet-{_turn()}", wait_s=SLOWEST_S)


def same_on_all(value: bool) -> bool:
    """Process 0's `value`, so that all processes take the same branch."""
    key = f"lsdl-same-{_turn()}"
    return json.loads(from_main(key, json.dumps(value), wait_s=SLOWEST_S))


def agree(facts: Mapping[str, Any]) -> None:
    """Raise `DisagreeError` in process 0 unless all processes have the same `facts`, as JSON.

    The others leave with its code. Comes before the first collective, which different programs
    would hang in, or worse, complete.
    """
    if jax.process_count() == 1:
        return
    key = f"lsdl-facts-{_turn()}"
    texts = to_main(key, json.dumps(facts), wait_s=SLOWEST_S)
    differences = [_difference(i, json.loads(text), facts) for i, text in enumerate(texts)]
    sentence = from_main(f"{key}-all", " ".join(filter(None, differences))[:2000], wait_s=SLOWEST_S)
    if sentence and is_main():
        raise DisagreeError(sentence + " Start all processes with the same command and code.")
    if sentence:
        raise SystemExit(DisagreeError.exit_code)


def _difference(process: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What a process's facts differ in from process 0's, as a sentence; "": in nothing."""
    ours = json.loads(json.dumps(ours))
    names = [n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n)]
    if not names:
        return ""
    name, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    said = [str(facts.get(name, "nothing"))[:200] for facts in (theirs, ours)]
    return f"Process {process} has {name}={said[0]} and process 0 has {said[1]}{more}."


# Texts by jax's coordination service, which needs no device and no collective. jax has no public
# name for it; orbax uses the same one.
def _service() -> Any:
    return distributed.global_state.client


def from_main(key: str, text: str, *, wait_s: float = 60) -> str:
    """Process 0's `text`, in all processes, which leave if it does not come. A key serves once."""
    if jax.process_count() == 1:
        return text
    if is_main():
        _service().key_value_set(key, text)
    try:
        return _service().blocking_key_value_get(key, int(1000 * wait_s))
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(UNREACHABLE) from error  # process 0 says why, or is gone


def to_main(key: str, text: str, *, wait_s: float = 60) -> list[str]:
    """In process 0 the `text` of all processes, by their number; in the others []."""
    if jax.process_count() == 1:
        return [text]
    if not is_main():
        _service().key_value_set(f"{key}/{jax.process_index()}", text)
        return []
    texts = [text]
    for i in range(1, jax.process_count()):
        try:
            texts.append(_service().blocking_key_value_get(f"{key}/{i}", int(1000 * wait_s)))
        except jax.errors.JaxRuntimeError as error:
            raise UnreachableError(
                f"Process {i} of {jax.process_count()} has not reported within {wait_s:g} s: see "
                "its output."
            ) from error
    return texts


def barrier(key: str, *, wait_s: float = 60) -> None:
    """Wait until all processes have come here. A key serves once."""
    if jax.process_count() > 1:
        _service().wait_at_barrier(key, int(1000 * wait_s))
