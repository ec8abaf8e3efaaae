"""`python -m tests.faults.broken BUG FLAGS`: lsdl.train with a bug that the kill loop has to find.

early: the step has its name before its files are there; greedy: old steps go before the new one is
there; skipping: a start goes on one step too late; rotten: a step is committed with other bytes.
"""

import os
import sys
import time

from lsdl import commits, loop, saving
from lsdl.train import main


def early():
    def commit(folder, manifest, *, fence):
        final = folder.parent / str(manifest.step)
        os.rename(folder, final)
        time.sleep(0.05)
        os.rename(final, folder)
        whole(folder, manifest, fence=fence)

    whole = commits.commit
    commits.commit = commit


def greedy():
    commit = saving.Saver._commit

    def first_delete(self):
        for step in commits.steps(self._root):
            commits.discard(self._root, step)
        commit(self)

    saving.Saver._commit = first_delete


def skipping():
    train = loop._train

    def late(course, state, first, *others):
        return train(course, state, first + bool(first), *others)

    loop._train = late


def rotten():
    commit = commits.commit

    def commit_and_rot(folder, manifest, *, fence):
        commit(folder, manifest, fence=fence)
        inner = folder.parent / str(manifest.step) / "state" / "ocdbt.process_0" / "d"
        path = max(inner.iterdir(), key=lambda path: path.stat().st_size)
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    commits.commit = commit_and_rot


BUGS = {"early": early, "greedy": greedy, "skipping": skipping, "rotten": rotten}


if __name__ == "__main__":
    BUGS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
