"""A safetensors file written tensor by tensor, so that nobody has to hold all of them. It appears whole or not at all.

The library's own writer wants a dictionary of everything. The format is a length, a JSON header and bytes; all offsets
follow from shapes and dtypes, so tensors may arrive in any order.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.errors import OutputError
from liveavatar_core.weights.file import DTYPES, TensorInfo

GIB = 1024**3
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write exactly the tensors of `infos`. Raises OutputError where that is not possible; then nothing is left."""
    header, places = _layout(infos, metadata)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for name, tensor in tensors:
                if (tuple(tensor.shape), tensor.dtype) != (infos[name].shape, infos[name].dtype):
                    raise RuntimeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {infos[name]}")
                file.seek(places.pop(name))
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            if places:
                raise RuntimeError(f"{len(places)} tensors were announced and never came, {next(iter(places))} first")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_space(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Raise OutputError unless the folder of `path` can be made and its disk has room for these tensors."""
    needed = sum(info.nbytes for info in infos.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be used ({error.strerror}); choose another folder") from error
    if needed > free:
        raise OutputError(
            f"{path} needs {needed / GIB:.1f} GiB of disk and {free / GIB:.1f} GiB are free; "
            "free some space or choose another folder"
        )


def _layout(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where in it each tensor begins."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # Wide numbers first, as the library does it, so that every tensor begins at a multiple of its own width.
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name], end = end, end + info.nbytes
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": (starts[name], end)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
