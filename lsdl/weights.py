"""Weights in the files of other libraries: safetensors, one file or a folder of them.

model.safetensors config.json, or model.safetensors.index.json and the files that it names
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from lsdl.errors import UserError
from lsdl.files import write_json

FILE = "model.safetensors"


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """The tensors of a file or a folder, and the config.json beside them, if there is one.

    Raises `UserError` for what is not there or cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in _files(path):
        try:
            with safetensors.safe_open(file, "np") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read as safetensors in float32, float16 or bfloat16: {error}"
            ) from error
    settings = (path if path.is_dir() else path.parent) / "config.json"
    return tensors, _json(settings) if settings.exists() else None


def write(folder: Path, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Make `folder` what transformers' `from_pretrained` reads."""
    folder.mkdir(parents=True)
    # Without the format it refuses the file.
    save_file(dict(tensors), folder / FILE, metadata={"format": "pt"})
    write_json(folder / "config.json", dict(settings))


def _files(path: Path) -> list[Path]:
    index = path / f"{FILE}.index.json"
    if path.is_file():
        return [path]
    if (path / FILE).exists():
        return [path / FILE]
    if not index.exists():
        raise UserError(
            f"{path} is neither a safetensors file nor a folder with {FILE} or {index.name}: "
            "save the model with transformers' save_pretrained."
        )
    shards = _json(index).get("weight_map", {})
    return [path / name for name in sorted(set(shards.values()))]


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): copy it once more.") from error
