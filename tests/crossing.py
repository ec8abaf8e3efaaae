"""`python -m tests.crossing FOLDER MESH DCN_MESH --coordinator=...`: who stands where in a mesh.

Each process writes FOLDER/ID.json.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl import processes
from lsdl.sharding import mesh as meshes


def main():
    parser = argparse.ArgumentParser()
    for name in ("folder", "mesh", "dcn", "--coordinator"):
        parser.add_argument(name)
    for name in ("--num-processes", "--process-id"):
        parser.add_argument(name, type=int)
    a = parser.parse_args()
    processes.initialise(
        coordinator=a.coordinator, num_processes=a.num_processes, process_id=a.process_id
    )
    sizes = meshes.parse_mesh(a.mesh, jax.device_count())
    mesh = meshes.make_mesh(sizes, dcn=meshes.parse_dcn(a.dcn, sizes))
    grid = mesh.devices.squeeze((3, 4, 5))
    rows = NamedSharding(mesh, P("data"))
    mine = jnp.full((1, 4), 1.0 + 2 * jax.process_index())
    x = jax.make_array_from_process_local_data(rows, mine, (2, 4))
    sums = jax.jit(lambda x: x.sum(1), out_shardings=NamedSharding(mesh, P()))(x)
    found = {
        "shape": mesh.devices.shape,
        "processes": [[[d.process_index for d in line] for line in page] for page in grid],
        "sums": sums.tolist(),
    }
    Path(a.folder, f"{a.process_id}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
