"""`python -m tests.faults.cycle`, under the shim: save-and-retain cycles, each in its own process.

Reads one JSON object a line, {"do": "save" | "fail" | "recover", "run": folder, ...}, and answers
with one: {"signal": of the kill, or 0; "answer": what the cycle found}.
"""

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

STEPS = (1, 2, 3)


def state_of(step):
    import jax

    draw = np.random.default_rng(step)
    tree = {"kernel": draw.standard_normal((100, 60), np.float32), "step": np.int32(step)}
    return {"params": jax.device_put(tree), "key": jax.random.key_data(jax.random.key(step))}


class Cycle:
    def __init__(self, order):
        from lsdl.checkpoint import Checkpoints
        from lsdl.rundir import RunDir

        self.order, self.folder = order, RunDir(order["run"])
        self.shim = ctypes.CDLL(None)
        if not self.folder.path.exists():
            self.folder.create()
            self.folder.write_config(source="x.py", overrides={}, fields={}, changes={})
        self.folder.acquire()
        self.checkpoints = Checkpoints(self.folder.checkpoints, owner=self.folder)

    def put(self, step):
        self.checkpoints.save(step, state_of(step), metrics={"loss": 1.0}, notes={"n": step})

    def arm(self):
        order, log = self.order, -1
        if order.get("log"):
            log = os.open(order["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        root = os.fsencode(self.folder.checkpoints)
        numbers = (order.get("n", 0), order.get("errno", 0), order.get("sticky", 0), log)
        self.shim.shim_arm(root, ctypes.c_long(numbers[0]), *numbers[1:])

    def fill(self):
        """Two steps, as a run has them."""
        for step in STEPS[:2]:
            self.put(step)
        self.checkpoints.close()

    def save(self):
        """The third step, for which the first goes."""
        state = state_of(STEPS[2])
        self.arm()
        self.checkpoints.save(STEPS[2], state, metrics=None)
        self.checkpoints.close()
        return {"calls": self.shim.shim_disarm()}

    def fail(self):
        """The third step, whose save may fail; then the fourth, of a disk that works again."""
        from lsdl.errors import StorageError

        self.arm()
        said = None
        try:
            self.checkpoints.save(STEPS[2], state_of(STEPS[2]), metrics=None)
            failed = self.checkpoints.check(wait=True)
            if failed and self.order.get("sticky"):
                self.checkpoints.save(4, state_of(4), metrics=None)
                self.checkpoints.check(wait=True)
        except StorageError as error:
            failed, said = True, str(error)
        self.shim.shim_disarm()
        left = sorted(os.listdir(self.folder.checkpoints))
        if said is None:
            self.put(5)
            self.checkpoints.close()
        return {"failed": failed, "said": said, "left": left}

    def recover(self):
        """What a start finds, and that it can go on."""
        step = self.checkpoints.latest_step()
        state = self.checkpoints.restore(step, state_of(0))
        pairs = zip(*map(_leaves, (state, state_of(step))), strict=True)
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        self.put(9)
        self.checkpoints.close()
        return {"step": step, "same": same, "names": sorted(os.listdir(self.folder.checkpoints))}


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def forked(order):
    """Do `order` in a process of its own."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        code = 1
        try:
            answer = getattr(Cycle(order), order["do"])()
            os.write(writer, json.dumps(answer).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": number, "code": status >> 8, "answer": json.loads(text or "null")}


def main():
    import lsdl.checkpoint  # the children need not import it again; no thread is running yet

    assert lsdl.checkpoint
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        Path(order["run"]).parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps(forked(order)), flush=True)


if __name__ == "__main__":
    main()
