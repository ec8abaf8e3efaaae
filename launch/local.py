"""Several processes on this machine: `python launch/local.py -n 4 -- --config FILE ...`.

What stands behind `--` goes to lsdl.doctor, and if that is content to lsdl.train. The processes
have virtual CPU devices: a pod to try a mesh on, in the memory of one machine.
"""

import argparse
import sys

from lsdl.launcher import spawn_local, watch


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python launch/local.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("-n", "--num-processes", type=int, default=2, metavar="N", help="(default: 2)")
    add("--devices-per-process", type=int, default=1, metavar="D", help="(default: 1)")
    add("--no-doctor", action="store_true", help="train without a check of the set-up first")
    add("flags", nargs="*", metavar="-- FLAGS", help="of lsdl.train")
    arguments = parser.parse_args()
    if min(arguments.num_processes, arguments.devices_per_process) < 1:
        parser.error("-n and --devices-per-process must be at least 1.")
    for entry in ("lsdl.train",) if arguments.no_doctor else ("lsdl.doctor", "lsdl.train"):
        children = spawn_local(
            (entry, *arguments.flags),
            num_processes=arguments.num_processes,
            devices_per_process=arguments.devices_per_process,
        )
        if code := watch(children):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
