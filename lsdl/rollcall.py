"""The roll call: all processes of a job call process 0, before jax is asked for anything.

Where a process is missing, jax waits and then aborts; the roll call says which. A call names the
job's run token, so that what is left of another job finds no way in. Its sockets stay open, as the
job's lines; what jax's own service listens on is chosen here and told in the answer.
"""

import contextlib
import hmac
import os
import selectors
import socket
import time
from dataclasses import dataclass

from lsdl.errors import UNREACHABLE, UnreachableError, UserError
from lsdl.rendezvous import split_address

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LISTENER = "LSDL_LISTENER"  # the number of an inherited socket that listens for process 0
SLOW_S = 2  # that a caller may take to say its line
SERVICE_S = 30  # that jax's service may take to listen, once all have met
EXCUSE_S = 5  # that a process which leaves before the roll call tries to tell the others


@dataclass(frozen=True)
class Meeting:
    """What a roll call leaves to a process."""

    service: str  # HOST:PORT of jax's service
    bind: str | None  # what that is to bind to, in process 0; None: all interfaces
    sockets: dict[int, socket.socket]  # to all others in process 0, to process 0 in the others
    reserved: socket.socket | None  # keeps the service's port until jax has it, in process 0


def roll_call(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    wait_s: float,
    token: str = "",
    sockets: dict[int, socket.socket] | None = None,
) -> Meeting:
    """Return on all processes once all of them have called process 0 at `coordinator`.

    `sockets` is filled while the others call: who leaves meanwhile can say so (`farewell`).
    Raises `UnreachableError` after `wait_s` seconds: in process 0 with the numbers of those that
    did not call, in another that did not get through with the reason.
    """
    host, port = split_address(coordinator)
    sockets = {} if sockets is None else sockets
    if process_id:
        call = Call(coordinator, num_processes, process_id, token, sockets)
        return Meeting(joined(host, call.through(wait_s)), None, sockets, None)
    with listening(host, port) as server:
        hearing = Hearing(server, host, num_processes, token, sockets)
        hearing.all(wait_s)
        address = server.getsockname()[0]
        reserved = _reserved(server.family, address)
    port = reserved.getsockname()[1]
    hearing.answer(f"go {port}")
    bind = None if address in ("::", "0.0.0.0") else joined(address, port)
    return Meeting(joined(host, port), bind, sockets, reserved)


def excuse(
    coordinator: str, num_processes: int, process_id: int, *, code: int, token: str = ""
) -> None:
    """Tell the others, before they have met, that this process leaves with `code`: they do too.

    Process 0 tells those that call within `EXCUSE_S` seconds. Another one tells process 0, if that
    listens within as many.
    """
    host, port = split_address(coordinator)
    if process_id == 0:
        with contextlib.suppress(UserError), listening(host, port) as server:
            Hearing(server, host, num_processes, token, {}).dismiss(f"leave {code}")
        return
    deadline = time.monotonic() + EXCUSE_S
    words = f"lsdl {process_id} {num_processes} {token}\nleave {code}\n".encode()
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            with socket.create_connection((host, port), timeout=left) as line:
                line.sendall(words)
            return
        time.sleep(0.1)


def farewell(sockets: dict[int, socket.socket], *, code: int, others: int) -> None:
    """Tell the others, in the roll call that fills `sockets`, that this process leaves with `code`.

    Its roll call goes on meanwhile: `others` are waited for, but no longer than `EXCUSE_S` seconds.
    """
    deadline, told = time.monotonic() + EXCUSE_S, set()
    while True:
        for line in set(sockets.copy().values()) - told:
            told.add(line)
            with contextlib.suppress(OSError):
                line.sendall(f"leave {code}\n".encode())
        if len(told) >= others or time.monotonic() > deadline:
            return
        time.sleep(0.05)


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_address(host: str) -> tuple[socket.AddressFamily, str] | None:
    """The address of this machine that `host` names; None if it tells none that others reach.

    A machine's own name may lead to loopback on itself alone, or to what stands before it.
    """
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            loopback = address[0].startswith("127.") or address[0] == "::1"
            if loopback and host not in LOOPBACK:
                continue
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.bind((address[0], 0))
                return family, address[0]
    return None


def listening(host: str, port: int = 0) -> socket.socket:
    """Process 0's: the one that its launcher gave it, or on its own address alone."""
    if inherited := os.environ.pop(LISTENER, ""):
        server = socket.socket(fileno=int(inherited))
        server.set_inheritable(False)
        return server
    own = own_address(host)
    try:
        if own:
            return socket.create_server((own[1], port), family=own[0], backlog=1024)
        if socket.has_dualstack_ipv6():
            every = dict(family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=1024, **every)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UnreachableError(
            f"Process 0 cannot listen on port {port}: {error.strerror}; "
            "end the job that has it, or choose another --coordinator."
        ) from error


def _reserved(family: int, address: str) -> socket.socket:
    """A port that nobody else gets while this is open, and that jax's service may bind as well."""
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6 and address == "::":
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind((address, 0))
    return held


class Hearing:
    """Process 0's side."""

    def __init__(self, server, host, num_processes, token, callers):
        self._server, self._host, self._total = server, host, num_processes
        self._token, self._callers = token, callers
        self._strangers: set[str] = set()

    def all(self, wait_s: float) -> None:
        """Until all have called. Raises `UnreachableError` after `wait_s` seconds."""
        deadline = time.monotonic() + wait_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while len(self._callers) < self._total - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._miss(wait_s)
                for key, _ in selector.select(left):
                    if key.data is None:
                        number = self._accept()
                        if number:
                            selector.register(self._callers[number], selectors.EVENT_READ, number)
                    elif not self._listen_to(key.data):
                        selector.unregister(key.fileobj)

    def dismiss(self, word: str) -> None:
        """Tell all `word`, those too that call within `EXCUSE_S` seconds."""
        deadline, called = time.monotonic() + EXCUSE_S, set(self._callers)
        self.answer(word)
        while len(called) < self._total - 1 and (left := deadline - time.monotonic()) > 0:
            self._server.settimeout(left)
            with contextlib.suppress(TimeoutError, UserError):
                called |= {self._accept()} - {0}
                self.answer(word)

    def answer(self, word: str) -> None:
        """Tell all that have called: go PORT (0: jax listens already), no, or leave CODE."""
        for caller in self._callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{word}\n".encode())
        if not word.startswith("go "):
            while self._callers:
                self._callers.popitem()[1].close()

    def _accept(self) -> int:
        """The number of a new caller; 0 if it is none of this job's."""
        caller, address = self._server.accept()
        called = _read_call(caller)
        if called and not hmac.compare_digest(called[2].encode(), self._token.encode()):
            self._strangers.add(address[0])
            with contextlib.suppress(OSError):
                caller.sendall(b"token\n")
            called = None
        if not called or called[0] < 1:
            caller.close()
            return 0
        number, told, _ = called
        if told != self._total:
            self._refuse(
                caller,
                f"Process {number} was told that there are {told} processes and process 0 that "
                f"there are {self._total}: give all of them the same number.",
            )
        if number in self._callers or number >= self._total:
            self._refuse(
                caller, f"Two processes have --process-id={number}: give each its own number."
            )
        self._callers[number] = caller
        return number

    def _refuse(self, caller: socket.socket, sentence: str) -> None:
        with contextlib.suppress(OSError):
            caller.sendall(b"no\n")
        caller.close()
        self.answer("no")
        raise UserError(sentence)

    def _listen_to(self, number: int) -> bool:
        """Whether a caller that has spoken still waits; leaves with it if it says so."""
        word = _line(self._callers[number])
        if word.startswith("leave "):
            self.dismiss(word)
            raise SystemExit(int(word.split()[1]))
        if not word:
            self._callers.pop(number).close()
        return bool(word)

    def _miss(self, wait_s: float) -> None:
        missing = sorted(set(range(1, self._total)) - set(self._callers))
        met = 1 + len(self._callers)
        self.answer("no")
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        place = joined(self._host, self._server.getsockname()[1])
        others = ""
        if self._strangers:
            others = f" (a process with another run token called from {min(self._strangers)})"
        raise UnreachableError(
            f"Only {met} of {self._total} processes have met at {place} "
            f"within {wait_s:g} s, without {named}{others}: see that these run and can reach "
            "process 0."
        )


def _read_call(caller: socket.socket) -> tuple[int, int, str] | None:
    """(process, number of processes, run token) of a call; None if no process of lsdl's calls."""
    caller.settimeout(SLOW_S)
    with contextlib.suppress(ValueError):
        name, number, told, token = _line(caller).split(" ")
        return (int(number), int(told), token) if name == "lsdl" else None
    return None


def _line(of: socket.socket) -> str:
    """The next line, byte by byte: what comes behind it is for the lines. "": there is none."""
    text = b""
    with contextlib.suppress(OSError):
        while len(text) < 200 and (byte := of.recv(1)):
            if byte == b"\n":
                return text.decode(errors="replace")
            text += byte
    return ""


class Call:
    """The side of the others."""

    def __init__(self, coordinator, num_processes, process_id, token, sockets):
        self._address, self._total = split_address(coordinator), num_processes
        self._id, self._token, self._sockets = process_id, token, sockets

    def through(self, wait_s: float) -> int:
        """The port of jax's service, once all have called and it listens there."""
        deadline = time.monotonic() + wait_s
        place = joined(*self._address)
        pause, why = 0.05, "no time to try"
        while (left := deadline - time.monotonic()) > 0:
            answer, why = self._try(left)
            if answer == "no":
                raise SystemExit(UNREACHABLE)  # process 0 says why
            if answer.startswith("leave "):
                raise SystemExit(int(answer.split()[1]))
            if answer == "token":
                raise UnreachableError(
                    f"Process {self._id} has another run token than process 0 at {place}: that is "
                    "of another job; end what is left of it, or choose another --coordinator."
                )
            if answer.startswith("go "):
                return self._await(int(answer.split()[1]))
            time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
            pause = min(2 * pause, 1)
        raise UnreachableError(
            f"Process {self._id} of {self._total} has not reached process 0 at {place} within "
            f"{wait_s:g} s ({why}): see that process 0 runs there and that nothing between them "
            "closes the port."
        )

    def _try(self, left: float) -> tuple[str, str]:
        """(the answer to a call, or "", and why there is none)."""
        try:
            line = socket.create_connection(self._address, timeout=min(left, 5))
        except OSError as error:
            return "", error.strerror or str(error)
        line.settimeout(left + 5)  # process 0 began to wait at another time
        with contextlib.suppress(OSError):
            line.sendall(f"lsdl {self._id} {self._total} {self._token}\n".encode())
        self._sockets[0] = line  # not before: whoever leaves speaks over it, from another thread
        answer = _line(line)
        if not answer.startswith("go "):
            del self._sockets[0]
            line.close()
        return answer, "what answers there is not process 0 of this job" if answer else "no answer"

    def _await(self, port: int) -> int:
        """Until jax listens: its client waits a second after a refusal."""
        address = self._address[0], port
        until = time.monotonic() + (SERVICE_S if port else 0)
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
                return port
            time.sleep(0.05)
        if port:
            raise UnreachableError(
                f"Process {self._id} of {self._total} has met process 0 and cannot reach jax's "
                f"service at {joined(*address)}: see that nothing between them closes its ports."
            )
        return port
