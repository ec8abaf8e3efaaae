"""The compilers for TPUs and NVIDIA GPUs: where they lie, what is missing, how they come there.

`make plan-tools` runs this module. What it installs lies in a folder of its own and not in the
environment, where jax would load it whenever it starts.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lsdl.errors import FINISHED, INTERRUPTED, NoCompilerError, UserError, refuse

# By jax's version, those that the tests run with. For another it is what that jax asks for.
LIBTPU = {"0.10.2": "0.0.42.1", "0.12.0.1": "0.0.50.1"}
NVCC = "12.9.86"  # ptxas, and libdevice; the next major version's ptxas does not know the V100
NEEDED = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"), "cpu": ()}
FILES = {
    "libtpu": "libtpu/libtpu.so",
    "jax-cuda12-pjrt": "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
    "nvidia-cuda-nvcc-cu12": "nvidia/cuda_nvcc/bin/ptxas",
}


def folder() -> Path:
    """Where the compilers for the installed jax lie, or would: a folder for each of its versions.

    In $LSDL_PLAN_TOOLS, or else `lsdl/plan-tools` of the user's cache.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("LSDL_PLAN_TOOLS") or f"{cache}/lsdl/plan-tools"
    name = f"jax-{importlib.metadata.version('jax')}"
    return Path(root).expanduser().absolute() / name


def wanted() -> dict[str, str]:
    """{package: the versions that fit the installed jax}, as pip reads them."""
    jax = importlib.metadata.version("jax")
    return {
        "libtpu": f"=={LIBTPU[jax]}" if jax in LIBTPU else _asked_for(),
        "jax-cuda12-pjrt": f"=={importlib.metadata.version('jaxlib')}",
        "nvidia-cuda-nvcc-cu12": f"=={NVCC}",
    }


def _asked_for() -> str:
    """`==0.0.42.*`: the libtpu that the installed jax's own extra `tpu` has."""
    for requirement in importlib.metadata.requires("jax") or ():
        name, _, rest = requirement.partition("==")
        if name.strip() == "libtpu":
            return f"=={rest.partition(';')[0].strip()}"
    return ""


def installed(place: Path) -> dict[str, str]:
    """{package: version} of what lies in `place` with its files."""
    found = {}
    for package in importlib.metadata.distributions(path=[str(place)]):
        name = package.metadata["Name"].lower().replace("_", "-")
        if name in FILES and (place / FILES[name]).is_file():
            found[name] = package.version
    return found


def missing(kind: str) -> str:
    """Why nothing can be compiled for devices of `kind`, tpu, gpu or cpu; "" if it can."""
    place = folder()
    there = installed(place)
    if lacking := [name for name in NEEDED[kind] if name not in there]:
        return f"{place} has no {' and no '.join(lacking)}"
    plugin, jaxlib = there.get("jax-cuda12-pjrt"), importlib.metadata.version("jaxlib")
    if kind == "gpu" and plugin != jaxlib:  # it would abort the process
        return f"{place} has jax-cuda12-pjrt {plugin}, which must be jaxlib's version, {jaxlib}"
    return ""


def check(kind: str) -> None:
    """Raise `NoCompilerError` where nothing can be compiled for devices of `kind`."""
    if why := missing(kind):
        raise NoCompilerError(
            f"There is no compiler for a {kind} target: {why}; run `make plan-tools`, or plan "
            "without it by --analytic."
        )


def environment(kind: str, *, devices: int, given: Mapping[str, str], dump: Path) -> dict[str, str]:
    """`given`, and what a process needs to compile for `devices` devices of `kind`.

    It sees CPUs alone, whatever there is, so that it neither takes nor waits for a device. Into the
    folder `dump` a TPU's compiler writes the train step: of one that it refuses there is no more.
    """
    place, flags = folder(), [given["XLA_FLAGS"]] if given.get("XLA_FLAGS") else []
    more = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is compiled for others cannot be kept
    }
    if kind == "cpu":
        more["JAX_NUM_CPU_DEVICES"] = str(devices)
    if kind == "tpu":
        more |= {
            "TPU_LIBRARY_PATH": str(place / FILES["libtpu"]),
            "TPU_SKIP_MDS_QUERY": "1",  # it would ask the cloud what machine this is, and wait
            # The program that runs is scheduled with more care and takes several times as long to
            # compile. Its memory is this within a tenth.
            "JAX_OPTIMIZATION_LEVEL": "O0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process refuses to start
        }
        flags.append(f"--xla_dump_to={dump} --xla_dump_hlo_as_text")
        flags.append("--xla_dump_hlo_module_re=jit_train_step")
    if kind == "gpu":
        # Without a GPU nothing can be timed; and no toolkit of this machine is looked for.
        flags.append("--xla_gpu_autotune_level=0")
        flags.append(f"--xla_gpu_cuda_data_dir={place / 'nvidia/cuda_nvcc'}")
        more["PJRT_NAMES_AND_LIBRARY_PATHS"] = f"cuda:{place / FILES['jax-cuda12-pjrt']}"
    return {**given, **more, "XLA_FLAGS": " ".join(flags)}


def install() -> None:
    """Install what `wanted` names, unless it is there; the folder is whole or absent.

    Raises `UserError` where pip cannot.
    """
    place, versions = folder(), wanted()
    if all(not missing(kind) for kind in NEEDED):
        print(f"{place} is complete.")
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    print(f"Installing the planner's compilers into {place}, 0.4 GB to fetch ...", flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
        new = Path(scratch) / "new"
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-compile", "--target", str(new)]
        command += [name + version for name, version in versions.items()]
        if subprocess.run(command).returncode:
            raise UserError("pip could not install the planner's compilers: see its words above.")
        if place.exists():  # of another version, or what is left of it
            place.rename(Path(scratch) / "old")
        try:
            new.rename(place)
        except OSError:  # another process was first
            if not place.exists():
                raise
        shutil.rmtree(new, ignore_errors=True)


def main() -> int:
    """Install; returns the exit code."""
    try:
        install()
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
