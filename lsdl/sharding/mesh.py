"""The mesh: the named grid of devices. Parsed and made here and nowhere else.

data      splits the batch                     parameters replicated
fsdp      splits the batch and the parameters  parameters gathered at use
tensor    splits heads, MLP and channels       activations reduced after each pair of products
sequence  splits the length of activations     attention meets the other parts of the sequence
expert    splits the experts of an MLP         tokens travel to their experts
stage     splits the layers                    activations travel from stage to stage
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from lsdl.errors import UserError, nearest

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
BATCH_AXES = ("data", "fsdp", "expert")


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """`data=2,fsdp=-1,tensor=2` -> {axis: size}, in the order given; axes left out have size 1.

    One size may be -1: it takes the devices that are left. Raises `UserError` unless the sizes'
    product is `num_devices`, so that no device is dropped silently.
    """
    sizes = _sizes(text)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        there = "1 device there is" if num_devices == 1 else f"{num_devices} devices there are"
        raise UserError(
            f"mesh={text!r} does not fill the {there}: the sizes' product "
            f"is {fixed}{' times any number' if free else ''}; "
            + (f"choose one that divides {num_devices}" if free else f"make it {num_devices}")
            + (f", or export JAX_NUM_CPU_DEVICES={fixed}." if _are_cpus(num_devices) else ".")
        )
    return sizes | {axis: 1 for axis in AXES if axis not in sizes}


def _are_cpus(num_devices: int) -> bool:
    """Whether so many devices are all this machine's, and of a kind it can have more of."""
    here = jax.process_count() == 1 and num_devices == jax.device_count()
    return here and jax.default_backend() == "cpu"


def parse_dcn(text: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """`data=2` -> {axis: the part of its size that crosses slices or nodes}; "" crosses nothing.

    `sizes` are those of `parse_mesh`: totals, that the parts have to divide.
    """
    if not text:
        return {}
    parts = _sizes(text, field="dcn_mesh")
    for axis, part in parts.items():
        if part == -1:
            raise UserError(f"dcn_mesh={text!r} has {axis}=-1: give the number itself.")
        if sizes[axis] % part:
            raise UserError(
                f"dcn_mesh={text!r} has {axis}={part}, which must divide the {sizes[axis]} that "
                f"mesh gives {axis} in all."
            )
    return parts


def num_devices(text: str) -> int:
    """How many devices the mesh `text` is for: the sizes' product, or with a -1 all there are."""
    sizes = _sizes(text).values()
    return jax.device_count() if -1 in sizes else math.prod(sizes)


def _sizes(text: str, *, field: str = "mesh") -> dict[str, int]:
    form = "write axis=size pairs such as data=2,fsdp=-1,tensor=2."
    given = f"{field}={text!r}"
    if not text.strip():
        raise UserError(f"{field} is empty: {form}")
    sizes = {}
    for part in text.split(","):
        axis, equals, digits = (word.strip() for word in part.partition("="))
        if not equals or not (digits == "-1" or (digits.isascii() and digits.isdigit())):
            raise UserError(f"{given} has the part {part!r}: {form}")
        if axis not in AXES:
            raise UserError(f"{given} has no such axis as {axis!r}; {nearest(axis, AXES)}")
        if axis in sizes:
            raise UserError(f"{given} names the axis {axis!r} twice.")
        sizes[axis] = int(digits) if len(digits) < 10 else 0
        if sizes[axis] == 0:
            raise UserError(f"{given} gives {axis} the size {digits}: use 1 or more, or -1.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"{given} has -1 for {' and '.join(free)}: only one axis may.")
    return sizes


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | int | None = None,
    *,
    dcn: Mapping[str, int] | None = None,
) -> Mesh | AbstractMesh:
    """The mesh of `sizes` over all devices, axes in that order, the last one varying fastest.

    A number in place of devices makes a mesh of none: programs can be traced on it, not run.
    With `dcn` the devices of a slice (TPU) or node (GPU; on CPU a process) stay together, and of
    each axis that many neighbours lie in different ones.
    """
    types = (AxisType.Auto,) * len(sizes)
    if isinstance(devices, int):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), types)
    devices = jax.devices() if devices is None else devices
    if math.prod((dcn or {}).values()) == 1:
        shape = tuple(sizes.values())
        # jax.make_mesh would refuse to give a part of a torus' dim to an axis, as of 8 chips 4.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = _hybrid(sizes, devices, dcn)
    return Mesh(grid, tuple(sizes), types)


def _hybrid(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], dcn: Mapping[str, int]
) -> np.ndarray:
    slices = {getattr(device, "slice_index", 0) for device in devices}
    processes = {device.process_index for device in devices}
    by_process = len(slices) == 1
    granules = len(processes if by_process else slices)
    if math.prod(dcn.values()) != granules:
        text = ",".join(f"{axis}={part}" for axis, part in dcn.items())
        raise UserError(
            f"dcn_mesh={text!r} is for {math.prod(dcn.values())} slices or nodes and there "
            f"{'is' if granules == 1 else 'are'} {granules}: make the product of its sizes "
            f"{granules}, or leave it empty."
        )
    across = [dcn.get(axis, 1) for axis in sizes]
    within = [size // part for size, part in zip(sizes.values(), across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
    )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many pieces the global batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
