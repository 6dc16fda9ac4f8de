"""Checkpoints on disk as a lazy mapping from official names to tensors (SPEC 7.1, 7.2).

Owns paths, shards and prefixes. Opening reads headers only; tensors are read one by one; fp8 weights with factors
beside them are read as the numbers they stand for. It knows no model beyond the one name that marks a speech-to-video
checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.file import SafetensorsFile, TensorInfo
from liveavatar_core.weights.record import Record, read_record
from liveavatar_core.weights.scaled import dequantise, find_factors, is_weight

MARKER = "casual_audio_encoder.encoder.final_linear.weight"  # only speech-to-video models have it
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")  # official names, then ComfyUI's single files


class WeightReader:
    """Named tensors of one or several safetensors files; a context manager. `path` is what the user named."""

    def __init__(
        self,
        path: Path,
        files: list[Path],
        config: dict | None = None,
        prefix: str = "",
        factors: Mapping[str, str] | None = None,
        record: Record | None = None,
    ) -> None:
        """`prefix` is removed from names; names without it are ignored. Raises WeightsError for damaged files.

        `factors`: as `find_factors` gives them; None reads the file as it is, factors as tensors of their own.
        `record`: of a converted file, for whoever wants to load it.
        """
        self.path, self.files = path, tuple(files)
        self.config, self.record = config, record
        self._factors = factors or {}
        self._sources: dict[str, tuple[SafetensorsFile, str]] = {}  # official name -> (file, name in the file)
        self._infos: dict[str, TensorInfo] = {}
        for source in map(SafetensorsFile, files):
            for stored, info in source.infos.items():
                if stored.startswith(prefix):
                    name = stored[len(prefix) :]
                    self._sources[name], self._infos[name] = (source, stored), info
        if factors is not None:
            self._infos = {name: info for name, info in self._infos.items() if is_weight(name)}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes as stored; of fp8 weights, too."""
        return self._infos

    def get(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as stored; float32 if it is fp8 with a factor, made on `device`. KeyError for an unknown name."""
        tensor = self._stored(name).to(device)
        if name not in self._factors:
            return tensor
        return dequantise(tensor, self._stored(self._factors[name]).to(device))

    def fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(e4m3 values, factor float32 (1,) or (out,)) of a tensor that is stored so; None for any other.

        Values without a factor stand for themselves.
        """
        if self._infos[name].dtype != torch.float8_e4m3fn:
            return None
        factor = self._stored(self._factors[name]).float().flatten() if name in self._factors else torch.ones(1)
        return self._stored(name), factor

    def _stored(self, name: str) -> Tensor:
        file, stored = self._sources[name]
        return file.get(stored)

    def close(self) -> None:
        """Lets go of the files; tensors that live stay valid."""
        self._sources.clear()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_file(path: Path) -> WeightReader:
    """Any single safetensors file under its stored names. Raises WeightsError when missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; check the path or download the file")
    return WeightReader(path, [path])


def open_weights(path: Path | str) -> WeightReader:
    """Open a speech-to-video checkpoint: a folder of shards, a folder with one file, or one file.

    Raises WeightsError when something is missing, damaged, quantised in an unknown way, or of another model.
    """
    path = Path(path)
    if path.is_dir():
        files, config = _shards(path), _read_config(path / "config.json")
    elif path.is_file():
        files, config = [path], None
    else:
        raise WeightsError(f"{path} does not exist; check the path or download Wan2.2-S2V-14B")
    with WeightReader(path, files) as raw:
        infos = raw.infos()
        prefix = next((prefix for prefix in _PREFIXES if prefix + MARKER in infos), None)
        if prefix is None:
            raise WeightsError(f"{path} is not a speech-to-video model: it has no {MARKER}; use Wan2.2-S2V-14B")
        own = {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
        factors = find_factors(path, own)
    record = None
    if len(files) == 1:
        metadata = SafetensorsFile(files[0]).metadata
        record = read_record(metadata, path)
        config = config or _embedded_config(metadata, files[0])
    return WeightReader(path, files, config, prefix, factors, record)


def _shards(folder: Path) -> list[Path]:
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise WeightsError(
                f"{folder} has no *.safetensors.index.json and {len(files)} safetensors files; "
                "it must have an index or exactly one file"
            )
        return files
    weight_map = (_read_config(index) or {}).get("weight_map")
    if not weight_map:
        raise WeightsError(f"{index} has no weight_map; download it again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} is named in {index.name} but missing; download it")
    return files


def _read_config(path: Path) -> dict | None:
    if not path.is_file():
        return None
    return _parse(path.read_text(encoding="utf-8", errors="replace"), path)


def _embedded_config(metadata: Mapping[str, str], path: Path) -> dict | None:
    """ComfyUI keeps a model's settings as JSON under "transformer" of the metadata entry "config"."""
    if "config" not in metadata:
        return None
    config = _parse(metadata["config"], path)
    return config.get("transformer", config)


def _parse(text: str, path: Path) -> dict:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} holds JSON that cannot be read ({error}); download it again") from error
    if not isinstance(parsed, dict):
        raise WeightsError(f"{path} holds a JSON {type(parsed).__name__}, not an object; download it again")
    return parsed
