"""Real processes on loopback: the same curve as one, one voice, one end; where they meet."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lsdl import rendezvous, rollcall
from lsdl.errors import UnreachableError, UserError
from lsdl.launcher import LAUNCHER, spawn_local, watch
from lsdl.metrics import read_rows
from lsdl.rendezvous import Place, place
from lsdl.rollcall import roll_call
from tests.conftest import CONFIGS, ROOT
from tests.curves import curve

MESH = "--config.mesh=data=2,fsdp=2,tensor=2"
RUN = (
    "lsdl.train",
    f"--config={CONFIGS / 'digits_vit.py'}:smoke",
    "--config.model.num_layers=1",
    "--config.total_steps=6",
    "--config.optim.schedule.warmup_steps=2",
    "--config.log.tensorboard=false",
    MESH,
)


def run(workdir, num_processes, *more, during=None):
    processes = spawn_local(
        (*RUN, f"--workdir={workdir}", *more),
        num_processes=num_processes,
        devices_per_process=8 // num_processes,
        env={"PYTHONPATH": str(ROOT)},
        capture=True,
    )
    try:
        if during:
            during(processes)
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def losses(workdir):
    rows = [r for r in read_rows(workdir / "metrics.jsonl") if r["split"] == "train"]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("processes") / "two"
    codes, outputs = run(workdir, 2)
    assert codes == [0, 0], outputs
    return workdir, outputs


def test_two_processes_give_the_curve_of_one(load, two):
    assert_curve_of_one(load, two[0])


@pytest.mark.slow
def test_a_mesh_axis_that_crosses_processes_gives_the_curve_of_one(load, tmp_path):
    codes, outputs = run(tmp_path / "run", 2, "--config.dcn_mesh=tensor=2")
    assert codes == [0, 0], outputs
    assert_curve_of_one(load, tmp_path / "run")


def assert_curve_of_one(load, workdir):
    overrides = [o.removeprefix("--config.") for o in RUN if o.startswith("--config.")]
    expected, _ = curve(load("digits_vit:smoke", *overrides), steps=6)
    for (loss, norm), one, one_norm in zip(
        losses(workdir), expected["loss"], expected["grad_norm"], strict=True
    ):
        assert loss == pytest.approx(one, rel=1e-5)
        assert norm == pytest.approx(one_norm, rel=1e-5)


@pytest.mark.threat(43)
def test_only_process_0_prints(two):
    outputs = two[1]
    assert "lowest valid loss" in outputs[0][0]
    assert "Gloo" not in outputs[0][0]  # which tells of each connection
    assert outputs[1][0] == ""
    assert "step" not in outputs[1][1]


@pytest.mark.threat(14)
@pytest.mark.slow
def test_four_processes_give_the_bits_of_two(two, tmp_path):
    codes, outputs = run(tmp_path / "four", 4)
    assert codes == [0] * 4, outputs
    assert losses(tmp_path / "four") == losses(two[0])


@pytest.mark.threat(1)
@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    def terminate(processes):
        deadline = time.monotonic() + 120
        while not losses(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)

    long = ("--config.total_steps=2000", "--config.checkpoint.every_steps=1000")
    codes, outputs = run(tmp_path / "run", 2, *long, during=terminate)
    assert codes == [75, 75], outputs
    assert "saved. The same command goes on from there." in outputs[0][0]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert saved[0] == len(losses(tmp_path / "run"))


def test_what_one_process_cannot_do_ends_them_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    codes, outputs = run(file / "run", 2)
    assert codes == [2, 2], outputs
    assert "choose another --workdir" in outputs[0][1]
    assert "choose another --workdir" not in outputs[1][1]


def test_what_no_process_can_do_is_said_once(tmp_path):
    pmap = ("--config.partitioner=pmap", "--config.mesh=data=8")
    codes, outputs = run(tmp_path / "run", 2, *pmap)
    assert codes == [2, 2], outputs
    assert ["runs in one process alone" in error for _, error in outputs] == [True, False]
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_is_not_there_is_missed(tmp_path):
    command = [sys.executable, "-m", *RUN, f"--workdir={tmp_path / 'run'}", "--distributed=on"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("lsdl: --distributed=on finds no launcher here")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.threat(30, 44)
def test_a_process_without_the_others_leaves_with_a_sentence():
    """And never with the abort in which jax ends."""
    alone = lambda i: subprocess.Popen(  # noqa: E731
        (
            *(sys.executable, "-m", "lsdl.doctor", f"--coordinator=127.0.0.1:{free_port()}"),
            *("--num-processes=2", f"--process-id={i}", "--wait=1"),
        ),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    running = [alone(0), alone(1)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [69, 69]
    assert errors[0].startswith("lsdl: Only 1 of 2 processes have met at 127.0.0.1:")
    assert "without 1" in errors[0]
    assert errors[1].startswith("lsdl: Process 1 of 2 has not reached process 0 at 127.0.0.1:")
    assert [len(error.splitlines()) for error in errors] == [1, 1]


@pytest.mark.threat(30, 44)
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_coordinator_that_is_not_there_is_given_up_in_time(host):
    place, began = f"{host}:{free_port()}", time.monotonic()
    with pytest.raises(UnreachableError, match=f"has not reached process 0 at {place} within 1 s"):
        roll_call(place, 2, 1, wait_s=1)
    assert time.monotonic() - began < 3


def called(port, numbers, *, num_processes, wait_s, told=None, tokens=None):
    """{process: how its roll call ended}, all of them at once."""
    ends, meetings = {}, []

    def call(i):
        number = (told or {}).get(i, num_processes)
        token = (tokens or {}).get(i, "token")
        try:
            meetings.append(roll_call(f"127.0.0.1:{port}", number, i, wait_s=wait_s, token=token))
            ends[i] = None
        except (UserError, SystemExit) as error:
            ends[i] = error
        if i == 0 and ends[0] is None:  # what jax's service is: something that listens there
            meetings[-1].reserved.listen()

    threads = [threading.Thread(target=call, args=(i,)) for i in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for meeting in meetings:
        for line in (*meeting.sockets.values(), meeting.reserved):
            if line:
                line.close()
    return ends


def test_a_roll_call_ends_when_all_have_called():
    assert called(free_port(), [2, 1, 0], num_processes=3, wait_s=20) == dict.fromkeys([0, 1, 2])


@pytest.mark.threat(30)
def test_a_roll_call_names_who_is_missing():
    ends = called(free_port(), [2, 0], num_processes=5, wait_s=1.5)
    assert isinstance(ends[0], UnreachableError)
    assert "Only 2 of 5 processes" in str(ends[0])
    assert "without 1, 3, 4:" in str(ends[0])
    assert ends[2].code == 69  # without a word: process 0 has said it


@pytest.mark.threat(31)
def test_a_roll_call_lets_no_process_of_another_job_in():
    """Which leaves at once; the right one is heard all the same."""
    ends = called(
        free_port(), [2, 1, 0], num_processes=3, wait_s=1.5, tokens={2: "stale", 0: "a", 1: "a"}
    )
    assert str(ends[2]).startswith("Process 2 has another run token than process 0 at 127.0.0.1:")
    assert "without 2 (a process with another run token called from 127.0.0.1):" in str(ends[0])
    assert ends[1].code == 69


def test_a_roll_call_finds_two_processes_of_one_number():
    ends = called(free_port(), [1, 1, 0], num_processes=3, wait_s=20)
    assert str(ends[0]) == "Two processes have --process-id=1: give each its own number."
    assert ends[1].code == 69


@pytest.mark.threat(1)
@pytest.mark.parametrize("leaver", [0, 1])
def test_who_is_told_to_stop_before_a_roll_call_takes_the_others_along(leaver):
    """Whichever of them comes first, and be there two others."""
    port, ends = free_port(), {}

    def call(i):
        if i == leaver:
            rollcall.excuse(f"127.0.0.1:{port}", 3, i, code=75, token="token")
            return
        with pytest.raises((SystemExit, UserError)) as end:
            roll_call(f"127.0.0.1:{port}", 3, i, wait_s=4, token="token")
        ends[i] = end.value

    threads = [threading.Thread(target=call, args=(i,)) for i in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert {i: getattr(end, "code", end) for i, end in ends.items()} == {
        i: 75 for i in (0, 1, 2) if i != leaver
    }


def test_an_excuse_that_nobody_hears_keeps_nobody(monkeypatch):
    monkeypatch.setattr(rollcall, "EXCUSE_S", 0.5)
    began = time.monotonic()
    for process in (0, 1):
        rollcall.excuse(f"127.0.0.1:{free_port()}", 2, process, code=75)
    assert time.monotonic() - began < 5


@pytest.mark.threat(1)
@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize("pause", [0, 0.3])
def test_who_is_told_to_stop_in_a_roll_call_takes_the_others_along(leaver, pause):
    """As early as before it has called anybody, and later."""
    port, ends, sockets = free_port(), {}, {}

    def call(i):
        known = sockets if i == leaver else {}
        with pytest.raises((SystemExit, UserError)) as end:
            roll_call(f"127.0.0.1:{port}", 3, i, wait_s=3, sockets=known)
        ends[i] = end.value

    others = 1 if leaver else 2
    leave = threading.Thread(
        target=rollcall.farewell, args=(sockets,), kwargs=dict(code=75, others=others), daemon=True
    )
    if not pause:
        leave.start()
        time.sleep(0.1)
    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    if pause:
        time.sleep(pause)
        leave.start()
    for thread in threads:
        thread.join()
    assert ends[1 - leaver].code == 75


def test_a_process_says_who_it_is_before_it_can_say_that_it_leaves(monkeypatch):
    """Else process 0 takes it for a stranger, and the others wait for it in vain."""
    port, sockets = free_port(), {}
    said = []

    class Line:
        def sendall(self, words):
            said.append((words.split(b" ")[0], bool(sockets)))

        def settimeout(self, seconds):
            pass

        def recv(self, size):
            return b""

        def close(self):
            pass

    monkeypatch.setattr(rollcall.socket, "create_connection", lambda *_, **__: Line())
    with pytest.raises(UnreachableError):
        roll_call(f"127.0.0.1:{port}", 2, 1, wait_s=0.2, sockets=sockets)
    assert (b"lsdl", False) in said
    assert (b"lsdl", True) not in said


def found(*addresses):
    return lambda *_, **__: [
        (socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, 0)) for a in addresses
    ]


@pytest.mark.threat(41)
@pytest.mark.parametrize(
    ("host", "addresses", "own"),
    [
        ("localhost", ("127.0.0.1",), "127.0.0.1"),
        ("127.0.0.1", ("127.0.0.1",), "127.0.0.1"),
        ("node1", ("127.0.1.1",), None),  # its own name, in /etc/hosts: others have another
        ("node1", ("203.0.113.1",), None),  # of something before it
        ("node1", ("203.0.113.1", "0.0.0.0"), "0.0.0.0"),  # the first that is this machine's
        ("node1", (), None),
    ],
)
def test_process_0_listens_on_its_own_address(host, addresses, own, monkeypatch):
    monkeypatch.setattr(rollcall.socket, "getaddrinfo", found(*addresses))
    assert (rollcall.own_address(host) or (None, None))[1] == own


def listening(pid):
    """The IPv4 and IPv6 addresses on which a process listens, by the kernel's tables."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(fd))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            word = line.split()
            if word[3] == "0A" and f"socket:[{word[9]}]" in sockets:
                found.append(word[1].split(":")[0])
    return found


@pytest.mark.threat(41)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's tables")
def test_a_job_on_one_machine_is_closed_to_all_others():
    program = """import sys, time
from lsdl import processes
address = sys.argv[1]
processes.initialise(coordinator=address, num_processes=1, process_id=0)
print("up", flush=True)
time.sleep(60)"""
    with subprocess.Popen(
        (sys.executable, "-c", program, f"127.0.0.1:{free_port()}"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "up\n"
            # 127.0.0.1, or what it is in IPv6; all interfaces would be 0.
            assert {address[-8:] for address in listening(process.pid)} == {"0100007F"}
        finally:
            process.kill()


def test_a_roll_call_finds_two_numbers_of_processes():
    ends = called(free_port(), [1, 0], num_processes=2, told={1: 3}, wait_s=20)
    assert str(ends[0]).startswith("Process 1 was told that there are 3 processes and process 0")
    assert ends[1].code == 69


BY_JAX = """import os, sys, time
import jax
from lsdl import processes
port, number, victim = map(int, sys.argv[1:])
address, found = f"127.0.0.1:{port}", jax.distributed.initialize
jax.distributed.initialize = lambda **limits: found(
    address, 2, number, coordinator_bind_address=address, **limits
)
processes.initialise("on", heartbeat_s=5)
processes.barrier("all-are-here")
time.sleep(2 if number == victim else 60)  # until the other has heard of the barrier's end
os.kill(os.getpid(), 9)"""


@pytest.mark.threat(28)
@pytest.mark.parametrize("victim", [0, 1])
def test_processes_that_jax_has_found_watch_one_another_too(victim):
    """As on a TPU pod or under Kubernetes, where only jax knows where process 0 is."""
    port = free_port()
    running = [
        subprocess.Popen(
            (sys.executable, "-c", BY_JAX, str(port), str(i), str(victim)),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    errors = [process.communicate(timeout=50)[1] for process in running]
    assert [process.returncode for process in running][1 - victim] == 69, errors
    assert f"lsdl: Process {victim} of 2 is lost: its connection has closed." in errors[1 - victim]


@pytest.mark.threat(31)
def test_a_roll_call_hears_no_stranger():
    port = free_port()
    ends = {}
    zero = threading.Thread(
        target=lambda: ends.update(called(port, [0], num_processes=2, wait_s=2))
    )
    zero.start()
    time.sleep(0.3)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"other 1 2\n")
    zero.join()
    assert "without 1" in str(ends[0])


@pytest.mark.threat(31)
def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"cannot listen on port {port}"):
            roll_call(f"127.0.0.1:{port}", 2, 0, wait_s=5)


@pytest.mark.parametrize("coordinator", ["node", "node:", ":80", "node:x", "node:70000"])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        roll_call(coordinator, 2, 1, wait_s=1)


SLURM = {
    **{"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "jwb[0021-0022,0100]"},
    **{"SLURM_NTASKS": "3", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}


def environment(tasks, local, *, visible=None, on_node=None):
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_LOCALID": str(local)}
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    if on_node is not None:
        environ["SLURM_GPUS_ON_NODE"] = str(on_node)
    return environ


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place()),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": ""},
            Place("slurm", 3, 1, "jwb0021:61441", token="slurm-4097"),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, Place("slurm", 4)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, Place("tpu", 4, 2)),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
            | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"},
            Place("tpu", 6, 5),
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
            Place("kubernetes", None, 3),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Place()),  # a notebook's
    ],
)
def test_the_place_of_a_process_follows_from_its_environment(environ, expected):
    assert place(environ) == expected


@pytest.mark.parametrize("nodes", ["jwb0021", "jwb0021,other7", "jwb[0021-0022]", "jwb[0021,3-4]"])
def test_the_first_node_is_the_coordinator(nodes):
    assert place(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == "jwb0021:61441"


def test_slurm_is_read_as_jax_reads_it(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    here = place(os.environ)
    assert SlurmCluster.get_coordinator_address(None, None) == here.coordinator
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (3, 1)


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        (environment(1, 0, on_node=4), (0, 1, 2, 3)),  # jax alone would take one of four
        (environment(1, 0, visible="0,1,2,3", on_node=4), (0, 1, 2, 3)),
        (environment(4, 3, visible="0,1,2,3", on_node=4), (3,)),
        (environment(2, 1, visible="0,1,2,3", on_node=4), (2, 3)),
        (environment(4, 3, visible="2", on_node=4), (0,)),  # --gpus-per-task=1: numbered anew
        (environment(4, 3, visible="2"), (0,)),
        (environment(2, 1, visible="2,3", on_node=4), (0, 1)),
        (environment("4(x2),1", 3, visible="0,1,2,3") | {"SLURM_NODEID": "1"}, (3,)),
        (environment(1, 0, visible="GPU-8a,GPU-b1"), (0, 1)),
        (environment("2,1", 0, visible="0,1", on_node=2), (0,)),
        (environment("2,1", 0, visible="0,1", on_node=2) | {"SLURM_NODEID": "1"}, (0, 1)),
        (environment(4, 3, visible=""), None),
        (environment(1, 0, on_node=4) | {"JAX_LOCAL_DEVICE_IDS": "0"}, None),  # jax reads it
    ],
)
def test_each_task_takes_its_share_of_the_nodes_gpus(environ, gpus):
    assert place(environ).local_device_ids == gpus


def test_without_slurm_the_gpus_are_left_to_jax(monkeypatch):
    monkeypatch.setattr(rendezvous, "gpus_on_node", lambda environ: 8)
    assert place({"CUDA_VISIBLE_DEVICES": "0,1"}).local_device_ids is None


def children(*programs):
    return [
        subprocess.Popen((sys.executable, "-c", f"import os, sys, time\n{program}"), text=True)
        for program in programs
    ]


SLEEP = "time.sleep(600)"
KILLED = "os.kill(os.getpid(), 9)"


@pytest.mark.threat(28, 44)
@pytest.mark.parametrize(
    ("programs", "code", "said"),
    [
        (["pass", "pass"], 0, ""),
        (["sys.exit(75)"] * 2, 75, ""),
        (["sys.exit(2)"] * 2, 2, ""),  # they have said why
        ([SLEEP, KILLED, SLEEP], 137, "process 1 of 3 was killed by SIGKILL; the others were"),
        ([SLEEP, "sys.exit(3)"], 3, "process 1 of 2 ended with 3; the others were stopped"),
        (
            ["time.sleep(5); sys.exit(4)", "sys.exit(75)", f"time.sleep(0.2); {KILLED}"],
            137,
            "process 2 of 3 was killed by SIGKILL; the others were stopped",
        ),
        # 69 and 71 are another one's fault.
        (["sys.exit(69)"] * 2, 69, ""),
        (["sys.exit(71)", SLEEP], 71, "process 1 of 2 did not end with the others and was stopped"),
        (["time.sleep(1); sys.exit(69)", "pass"], 69, "process 1 of 2 ended before the others"),
        (
            ["sys.exit(69)", "time.sleep(0.3); sys.exit(4)"],
            4,
            "process 1 of 2 ended with 4; the others were stopped",
        ),
    ],
)
def test_a_job_ends_with_the_first_that_failed(programs, code, said, capfd):
    started = children(*programs)
    assert watch(started, grace_s=0.8) == code
    assert all(child.returncode is not None for child in started)
    error = capfd.readouterr().err
    assert error.startswith(f"lsdl: {said}") if said else error == ""


def test_watch_numbers_what_the_others_complain_of(capfd):
    child = subprocess.Popen(
        (sys.executable, "-c", "import sys; print('a\\nb', file=sys.stderr)"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch([*children("pass"), child]) == 0
    child.stderr.close()
    assert capfd.readouterr().err == "[1] a\n[1] b\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_passes_signals_on(number, tmp_path):
    ready = [tmp_path / name for name in "ab"]
    program = """import pathlib, signal
signal.signal({number}, lambda *_: sys.exit(75))
pathlib.Path({ready!r}).touch()
time.sleep(60)"""
    before = signal.getsignal(number)
    started = children(*(program.format(number=int(number), ready=str(r)) for r in ready))

    def send():
        while not all(r.exists() for r in ready):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert watch(started) == 75
    sender.join()
    assert signal.getsignal(number) == before


@pytest.mark.threat(24)
def test_a_process_ends_with_the_launcher_that_is_killed():
    program = f"""import os, subprocess, sys, time
child = "from lsdl.processes import initialise; initialise(); print(1, flush=True)"
child += "; import time; time.sleep(60)"
env = os.environ | {{{LAUNCHER!r}: str(os.getpid())}}
process = subprocess.Popen((sys.executable, "-c", child), env=env, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)"""
    with subprocess.Popen(
        (sys.executable, "-c", program),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as launcher:
        orphan = int(launcher.stdout.readline())
        launcher.kill()
    until = time.monotonic() + 10
    while (alive := running(orphan)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
