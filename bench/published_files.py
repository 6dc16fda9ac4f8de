"""The tensors of the published files, from the lists in tests/data, and files of exactly that form without numbers.

A line of a list is a name, a number type and a shape ("-": no axes). Braces in a name stand for all alternatives in
them, `{0..39}` for all numbers between. The header written here is the one of the safetensors library, to the byte, so
that a file's length proves its list.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from liveavatar_core.weights.file import DTYPES, TensorInfo

LISTS = Path(__file__).parent.parent / "tests" / "data"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = ("F64", "F32", "BF16", "F16", "F8_E4M3", "U8")  # of the library: the larger number types first


def tensors_of(name: str) -> dict[str, TensorInfo]:
    """Name -> shape and number type of every tensor of the file whose list is `name`.txt."""
    infos = {}
    for line in (LISTS / f"{name}.txt").read_text().splitlines():
        if not line.startswith("#"):
            pattern, dtype, shape = line.split()
            axes = () if shape == "-" else tuple(map(int, shape.split("x")))
            infos |= {tensor: TensorInfo(axes, DTYPES[dtype]) for tensor in _expand(pattern)}
    return infos


def _expand(pattern: str) -> Iterator[str]:
    braces = re.search(r"\{(.*?)\}", pattern)
    if braces is None:
        yield pattern
        return
    first, dots, last = braces[1].partition("..")
    for choice in range(int(first), int(last) + 1) if dots else first.split(","):
        yield from _expand(f"{pattern[: braces.start()]}{choice}{pattern[braces.end() :]}")


def header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file of these tensors, and where in the file each begins."""
    entries, end = {}, 0
    for name in sorted(infos, key=lambda name: (_ORDER.index(_NAMES[infos[name].dtype]), name)):
        info = infos[name]
        offsets = (end, end + info.nbytes)
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + entry["data_offsets"][0] for name, entry in entries.items()}


def write_empty(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """A file of the right length whose numbers are all zero; where the file system can, it takes no space."""
    first, _ = header(infos)
    path.write_bytes(first)
    os.truncate(path, len(first) + sum(info.nbytes for info in infos.values()))
