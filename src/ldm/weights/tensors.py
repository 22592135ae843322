"""Weights in single files: safetensors in and out, and PyTorch's pickles in, read as data."""

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm import __version__
from ldm.errors import UserError
from ldm.files import file_written_atomically

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def read_weights(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, or of a pickle (`.ckpt`, `.pt`, `.bin`).

    Args:
        path: of the file.
        dtype: None maps the file, and memory is taken as tensors are used. Otherwise tensors of floating point in
            safetensors are read into memory of their own in this dtype, one after the other: then nothing is left of
            the file when a network changes their layout.

    Raises:
        UserError: the file is missing, damaged or no such file; a pickle asks for more than tensors, which is refused
            without running any of it.
    """
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    try:
        return load_file(path) if dtype is None else _read_converted(path, dtype)
    except Exception as error:  # damaged bytes may fail anywhere
        raise _unreadable(path, error) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts beside the tensors of a safetensors file; a pickle has none."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise _unreadable(path, error) from error


def _read_converted(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as checked:  # the header against itself and the file's size
        names = list(checked.keys())
    kinds = {code: kind for kind, code in CODES.items()}
    state = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if any(header[name]["dtype"] not in kinds for name in names):
            return load_file(path)  # whole numbers: no weights of a network
        for name in sorted(names, key=lambda name: header[name]["data_offsets"]):
            tensor = torch.empty(header[name]["shape"], dtype=kinds[header[name]["dtype"]])
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.readinto(tensor.flatten().view(torch.uint8).numpy().data)
            state[name] = tensor.to(dtype)
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Said outright, it holds whatever TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD says. Files of old PyTorch are no zip.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or "add_safe_globals" in str(error):
            raise UserError(
                f"{path} is a pickle that asks Python for {wanted[1] if wanted else 'code'}, not for tensors alone. It "
                "was refused and nothing in it was run. If you trust whom it is from, look for the same weights as "
                ".safetensors, or convert it to safetensors with a tool you trust"
            ) from None
        raise _unreadable(path, error) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds no weights but a {type(content).__name__}")
    tensors = {name: value.detach() for name, value in state.items() if _is_weight(name, value)}
    if not tensors:
        raise UserError(f"{path} holds no weights: there are no tensors at its top level or in its state_dict")
    return tensors


def _is_weight(name: Any, value: Any) -> bool:
    """Tell weights from the counters that stand beside them, and from tensors that hold no numbers."""
    return isinstance(name, str) and isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.is_file():
        return UserError(f"{path} {'is a folder, not a file' if path.is_dir() else 'is missing'}")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return UserError(f"{path} is a pointer of Git LFS, not the file itself: `git lfs pull` fetches that")
    if start.startswith((b"<!doctype", b"<html")):
        return UserError(f"{path} is a web page, not weights: the download gave something else")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "weights_only" in reason:  # PyTorch goes on to say how to run what is in it
        reason = "it is no pickle of tensors alone"
    return UserError(f"{path} cannot be read, it may be cut short or of another kind: {reason}")


def write_weights(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Tensors are converted and written one after the other, so that no second copy of them is held; the same content
    makes the same bytes, by which other tools name a model. (The safetensors library does neither: it wants all tensors
    at once and writes the metadata in any order.)

    Args:
        path: of the file.
        state: tensors of floating point.
        metadata: texts to keep beside them; our version is added.
        dtype: of all tensors in the file; None keeps each as it is.

    Raises:
        OSError: the file cannot be written.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in state.items()}
    names = sorted(state, key=lambda name: (-kinds[name].itemsize, name))  # large first: each stays aligned
    metadata = {"format": "pt", "ldm_version": __version__, **metadata}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        begin, end = end, end + state[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": CODES[kinds[name]], "shape": list(state[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file_written_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = state[name].detach().cpu().to(kinds[name]).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
