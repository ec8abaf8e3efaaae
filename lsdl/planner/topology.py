"""Devices that are not here, for compiling alone: TPU slices, NVIDIA GPUs, more CPUs.

To be called in a process that `toolchain.environment` was made for.
"""

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from lsdl.errors import UserError
from lsdl.planner.hardware import Target

PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}  # as jax lowers for them
# The same on every NVIDIA GPU (CUDA C++ programming guide, table of compute capabilities).
_LIMITS = {
    **{"block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65_535, "block_dim_limit_z": 65_535},
    **{"thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64},
}
# What the compiler is told to find on the target's machine.
_VERSIONS = {"driver_version": "13.0.0", "runtime_version": "12.8.0", "dnn_version": "9.10.0"}
_CUDNN = 91_000  # the last of these, as cuDNN numbers it


def devices(target: Target) -> list[jax.Device]:
    """The target's devices in jax's order; nothing runs on them but the compiler.

    Raises `UserError` where the compiler knows no such devices.
    """
    make = {"tpu": _tpu, "gpu": _gpu, "cpu": lambda _: jax.devices("cpu")}[target.device.kind]
    try:
        found = list(make(target))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"target={target.text!r} is not known to the compiler: {str(error).splitlines()[0]}."
        ) from None
    if len(found) != target.count:
        raise UserError(
            f"target={target.text!r} has {target.count} devices and the compiler makes "
            f"{len(found)} of it: it cannot be planned for by compiling."
        )
    return found


def _tpu(target: Target) -> list[jax.Device]:
    given = target.device.compiler
    hosts = given["chips_per_host"]
    # A slice smaller than a host's chips is a part of one host.
    bounds = [min(size, most) for size, most in zip(target.shape, hosts, strict=True)]
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{given['topology']}:{'x'.join(map(str, target.shape))}",
        chip_config_name=given["chip_config_name"],
        chips_per_host_bounds=(*bounds, 1, 1)[:3],
        num_slices=target.slices,
    ).devices


def _gpu(target: Target) -> list[jax.Device]:
    nodes, each = target.shape
    # jax asks the machine's own cuDNN before it traces a kernel of it, and here there is none.
    fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="gpu",
        topology=f"1x{nodes}x{each}",
        target_config=gpu_config(target),
    ).devices


def gpu_config(target: Target) -> str:
    """The GPU's description that XLA takes, a GpuTargetConfigProto as text.

    Source: XLA, xla/backends/gpu/target_config/specs, 2026.
    """
    given = dict(target.device.compiler)
    name = given.pop("device_description_str")
    major, minor = given.pop("compute_capability")
    # From Hopper on an architecture has instructions of its own (sm_90a).
    own = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    numbers = {**given, **_LIMITS}
    return "\n".join(
        (
            "gpu_device_info {",
            *(f"  {field}: {value}" for field, value in numbers.items()),
            *(f'  {field}: "{value}"' for field, value in _VERSIONS.items()),
            f"  cuda_compute_capability {{ major: {major} minor: {minor}",
            f"    feature_extension: {own} }}",
            f'  name: "{name}" device_vendor: "NVIDIA Corporation"',
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{name}"',
        )
    )
