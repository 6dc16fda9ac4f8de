"""Merge the LoRAs, quantise once, keep the result in one file, so that later starts only read.

    python -m liveavatar_core.weights.convert MODEL --lora LORA[=STRENGTH] --precision fp8 --out FILE

Tensors go from source to file one by one, by the path that loading takes: the file gives the same bits as loading its
sources on the same kind of device. (A LoRA's product is summed in another order on another device.)
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.config import LoraSpec, ModelSpec
from liveavatar_core.errors import ConfigError, LiveAvatarError, OutputError
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.weights.build import Progress, planned_dit, prepared
from liveavatar_core.weights.file import TensorInfo
from liveavatar_core.weights.layout import infer_config, official_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import WeightReader, open_weights
from liveavatar_core.weights.record import Record, Source
from liveavatar_core.weights.writer import check_space, write_tensors

log = logging.getLogger(__name__)

PRECISIONS = ("fp8", "bf16")
_CHUNK = 1 << 22


def convert(
    model: ModelSpec,
    out: Path,
    *,
    precision: str = "fp8",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ModelSpec:
    """Write the model with its LoRAs merged to `out`, and return what to load instead of it.

    A file that was made of the same sources in the same way is kept. Raises WeightsError for sources that do not fit,
    OutputError where the file cannot be written; `out` then is as it was.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; a file can be made for {' or '.join(PRECISIONS)}")
    with ExitStack() as files:
        reader = files.enter_context(open_weights(model.checkpoint))
        loras = [files.enter_context(open_lora(spec.path, spec.strength)) for spec in model.loras]
        for source in (*reader.files, *(lora.path for lora in loras)):
            if out.exists() and out.samefile(source):
                raise OutputError(f"{out} is one of the files to convert; choose another name")
        config = infer_config(reader.infos(), reader.config)
        planned = planned_dit(config, dtype=torch.bfloat16, fp8=precision == "fp8")
        infos = _infos(reader, planned)
        check_space(out, infos)

        report = _Report(progress, [*reader.files, *(spec.path for spec in model.loras)], reader)
        tensors = prepared(reader, planned, loras=loras, device=device, progress=report.tensors)
        first = next(tensors)  # refuses what does not fit before minutes are spent on hashes
        record = Record(
            precision,
            tuple(Source(path.name, report.sha256(path)) for path in reader.files),
            tuple(Source(spec.path.name, report.sha256(spec.path), spec.strength) for spec in model.loras),
        )
        if _holds(out, record):
            log.info("%s was made of the same files already", out)
            return ModelSpec(out)
        metadata = record.to_metadata() | {"config": json.dumps({"transformer": official_config(config)})}
        write_tensors(out, infos, metadata, _narrowed(infos, first, tensors))
    log.info("%s holds %s with %d LoRAs merged, for %s", out, model.checkpoint.name, len(model.loras), precision)
    return ModelSpec(out)


def _infos(reader: WeightReader, planned: CausalDiT) -> dict[str, TensorInfo]:
    """Every tensor of the file. What is float32 only to compute so is kept as narrow as its source."""
    infos = {}
    for name, tensor in planned.state_dict().items():
        source = reader.infos().get(name)
        widened = tensor.dtype == torch.float32 and source is not None and source.dtype == torch.bfloat16
        infos[name] = TensorInfo(tuple(tensor.shape), torch.bfloat16 if widened else tensor.dtype)
    return infos


def _narrowed(
    infos: dict[str, TensorInfo], first: tuple[str, Tensor], rest: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    name, tensor = first
    yield name, tensor.to(infos[name].dtype)
    for name, tensor in rest:
        yield name, tensor.to(infos[name].dtype)


def _holds(out: Path, record: Record) -> bool:
    if not out.is_file():
        return False
    try:
        with open_weights(out) as reader:
            return reader.record == record
    except LiveAvatarError:  # whatever it is, it will be replaced
        return False


class _Report:
    """One count of bytes over both passes through the sources: hashing, then reading tensors."""

    def __init__(self, progress: Progress | None, files: Sequence[Path], reader: WeightReader) -> None:
        self._progress = progress
        self._hashed, self._read = 0, 0
        self._total = sum(file.stat().st_size for file in files)
        self._total += sum(info.nbytes for info in reader.infos().values())

    def tensors(self, done: int, total: int) -> None:
        self._read = done
        self._say()

    def sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                self._hashed += len(chunk)
                self._say()
        return digest.hexdigest()

    def _say(self) -> None:
        if self._progress is not None:
            self._progress(self._hashed + self._read, self._total)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m liveavatar_core.weights.convert",
        description="Merge LoRAs into a checkpoint, quantise it, and save it as one file that loads in seconds.",
    )
    parser.add_argument("model", type=Path, help="folder of shards, or one safetensors file")
    parser.add_argument("--lora", type=_lora, action="append", default=[], metavar="FILE[=STRENGTH]")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--device", default="cpu", help="where to merge and quantise; best the one it will run on")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        model = ModelSpec(given.model, tuple(given.lora))
        convert(model, given.out, precision=given.precision, device=given.device, progress=_percent)
    except LiveAvatarError as error:
        sys.exit(f"\n{error}")
    sys.stderr.write(f"\n{given.out} is ready\n")


def _lora(text: str) -> LoraSpec:
    path, _, strength = text.rpartition("=")
    try:
        return LoraSpec(Path(path), float(strength))
    except ValueError:  # no strength; a path may have a = of its own
        return LoraSpec(Path(text))


def _percent(done: int, total: int) -> None:
    sys.stderr.write(f"\r{done * 100 // total:3} %")


if __name__ == "__main__":
    main()
