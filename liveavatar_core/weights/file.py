"""One safetensors file: its header is read at once, its numbers are mapped and take no memory of the process.

The format's own library has the system reserve memory for a copy of the whole file, in case somebody writes to it,
which is refused for a file larger than the memory: a machine of 24 GB could not open the 32.6 GB of the bf16 model.
"""

import json
import mmap
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.errors import WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class SafetensorsFile:
    """`infos` and `metadata` as the header has them. The file stays mapped while a tensor of it lives."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError for a damaged file and for numbers of an unknown type."""
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        try:
            with path.open("rb") as file:
                self._bytes = torch.frombuffer(_map(file.fileno()), dtype=torch.uint8)
            self.metadata = self._read_header()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(f"{path} is not a complete safetensors file ({error}); download it again") from error

    def _read_header(self) -> dict[str, str]:
        """Metadata; fills the rest. Raises ValueError, or whatever comes of JSON of another form."""
        start = 8 + int.from_bytes(bytes(self._bytes[:8].tolist()), "little")
        if start > len(self._bytes):
            raise ValueError(f"its header would end at byte {start} of {len(self._bytes)}")
        entries = json.loads(bytes(self._bytes[8:start].numpy()))
        metadata = entries.pop("__metadata__", {})
        end = start
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise WeightsError(f"{self.path} holds numbers of type {entry['dtype']}; use the bf16 checkpoint")
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            first, last = (start + offset for offset in entry["data_offsets"])
            if first < start or last - first != info.nbytes:
                raise ValueError(f"{name} is said to lie at bytes {first} to {last}")
            self.infos[name], self._starts[name] = info, first
            end = max(end, last)
        if end != len(self._bytes):
            raise ValueError(f"it has {len(self._bytes)} bytes, its header says {end}")
        return metadata

    def get(self, name: str) -> Tensor:
        """One tensor; the disk is read when its numbers are. KeyError for an unknown name."""
        info, start = self.infos[name], self._starts[name]
        stored = self._bytes[start : start + info.nbytes]
        if start % info.dtype.itemsize:  # old writers did not align
            stored = stored.clone()
        return stored.view(info.dtype).view(info.shape)


def _map(file: int) -> mmap.mmap:
    """A file's bytes. Who writes to them gets pages of their own; nothing is reserved for that."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python names since 3.13
    return mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
