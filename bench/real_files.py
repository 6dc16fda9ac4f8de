"""Full-size files in every layout through the path that a run takes: time, host memory, strictness, equality.

    python bench/real_files.py MODELS [--out FILE] [--seconds 300] [--tiny]

Writes the files itself (`full_size_files.py`), one large one at a time, and leaves the bf16 single file, the LoRA and
the converted file in MODELS. Prints one JSON line per step; a step that would start after `--seconds` is left out.
Host memory: `anon` is what the process allocated, `rss` counts the mapped file too, which the system may drop at any
time. `--tiny` does the same with the demo's model, to test this file.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.full_size_files import FILES, write_file  # noqa: E402
from liveavatar_core.config import LoraSpec, ModelSpec, RuntimeSpec  # noqa: E402
from liveavatar_core.errors import WeightsError  # noqa: E402
from liveavatar_core.runtime.runtime import Runtime, inspect_model  # noqa: E402
from liveavatar_core.weights.convert import convert  # noqa: E402
from liveavatar_core.weights.lora import open_lora  # noqa: E402
from liveavatar_core.weights.reader import open_weights  # noqa: E402

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
GB = 1e9


class Cancelled(Exception):
    pass


class OutOfTime(Exception):
    pass


class Report:
    """One JSON line per step: what `measured` adds to it, its seconds and the process's memory."""

    def __init__(self, out: Path | None, seconds: float) -> None:
        self._out, self._end = out, time.monotonic() + seconds

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[dict]:
        """Errors are told in the line and end nothing else."""
        if time.monotonic() > self._end:
            raise OutOfTime(name)
        line: dict = {"step": name}
        gc.collect()
        memory = HostMemory()
        started = time.perf_counter()
        try:
            yield line
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
        _synchronize()
        line["seconds"] = round(time.perf_counter() - started, 2)
        self._tell(line | memory.stop() | _gpu())

    def _tell(self, line: dict) -> None:
        print(json.dumps(line), flush=True)
        if self._out:
            with self._out.open("a") as file:
                file.write(json.dumps(line) + "\n")


class HostMemory:
    """Peak memory of this process from now to `stop`, looked at 200 times a second."""

    def __init__(self) -> None:
        self._peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name in self._peaks:
                self._peaks[name] = max(self._peaks[name], int(status[name].split()[0]) * 1024)

    def stop(self) -> dict:
        self._ended.set()
        self._thread.join()
        return {
            "anon_peak_gb": round(self._peaks["RssAnon"] / GB, 2),
            "rss_peak_gb": round(self._peaks["VmRSS"] / GB, 2),
        }


def _gpu() -> dict:
    if DEVICE == "cpu":
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"gpu_gb": round(torch.cuda.memory_allocated() / GB, 2), "gpu_peak_gb": round(peak / GB, 2)}


def _synchronize() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def load(runtime: Runtime, model: ModelSpec, precision: str, progress: Callable | None = None) -> dict[str, Tensor]:
    """What a run does before its first block; the tensors it then has."""
    config = inspect_model(model)
    runtime.ensure(model, config, RuntimeSpec((DEVICE,), "single", precision), 4, progress)
    (loaded,) = runtime._models.values()
    return loaded.state_dict()


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not _equal(a[name], b[name])]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def merged_otherwise(model: ModelSpec, names: list[str], loaded: dict[str, Tensor]) -> list[str]:
    """Which of these weights are not W + B A / 2, rounded once, by plain arithmetic."""
    wrong = []
    with open_weights(model.checkpoint) as reader, open_lora(model.loras[0].path) as lora:
        for name in names:
            down, up = (
                lora._reader.get(f"{name}.lora_{part}.default.weight").to(DEVICE, torch.float32) for part in "AB"
            )
            weight = reader.get(f"{name}.weight").to(DEVICE)
            want = (weight.float() + (up @ down) * 0.5).to(weight.dtype)
            if not torch.equal(loaded[f"{name}.weight"], want):
                wrong.append(name)
    return wrong


@contextlib.contextmanager
def renamed(file: Path, name: str) -> Iterator[None]:
    """The file with one tensor under another name of the same length, so that one is missing and one too many."""
    with file.open("r+b") as opened:
        text = opened.read(8 + int.from_bytes(opened.read(8), "little"))
        place = 8 + text.index(f'"{name}"'.encode())
        opened.seek(place + len(name))
        letter = opened.read(1)
        opened.seek(place + len(name))
        opened.write(b"_")
    try:
        yield
    finally:
        with file.open("r+b") as opened:
            opened.seek(place + len(name))
            opened.write(letter)


def refusal(model: ModelSpec, file: Path, name: str, precision: str = "fp8") -> str:
    """What is said about a file with one tensor missing and one too many."""
    with renamed(file, name):
        try:
            load(Runtime(), model, precision)
        except WeightsError as error:
            return str(error)
    raise AssertionError("was not refused")


def drop_page_cache() -> bool:
    if DEVICE == "cpu":
        return False
    subprocess.run(["sync"], check=False)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def cut_short(runtime: Runtime, model: ModelSpec, share: float) -> None:
    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise Cancelled

    with contextlib.suppress(Cancelled):
        load(runtime, model, "fp8", stop)
        raise AssertionError("was not cancelled")


def run(models: Path, report: Report, write: Callable[[str], Path], kinds: Sequence[str]) -> None:
    with report.step("write LoRA"):
        lora = write("lora")
    with report.step("write shards"):
        shards = write("shards")
    spec = ModelSpec(shards, (LoraSpec(lora),))
    runtime = Runtime()
    with report.step("first imports, first kernels"):
        cut_short(runtime, spec, 0.02)
    with report.step("cancel half-way: shards + LoRA, fp8") as line:
        before = torch.cuda.memory_allocated() if DEVICE != "cpu" else 0
        cut_short(runtime, spec, 0.5)
        gc.collect()
        line["gpu_bytes_left"] = (torch.cuda.memory_allocated() if DEVICE != "cpu" else 0) - before
    with report.step("load shards + LoRA, bf16") as line:
        loaded = load(runtime, spec, "bf16")
        line["weights_gb"] = round(sum(tensor.nbytes for tensor in loaded.values()) / GB, 2)
        layer = max(int(name.split(".")[1]) for name in loaded if name.startswith("blocks."))
        names = ["blocks.0.self_attn.q", f"blocks.{layer}.ffn.2", "audio_injector.injector.1.o"]
        line["merged_otherwise"] = merged_otherwise(spec, names, loaded)
        del loaded
    made: dict[str, Tensor] = {}
    with report.step("load shards + LoRA, fp8") as line:
        made = load(runtime, spec, "fp8")
        line["weights_gb"] = round(sum(tensor.nbytes for tensor in made.values()) / GB, 2)
    with report.step("refuse shards and LoRA with a name changed") as line:
        file = sorted(shards.glob("*.safetensors"))[1]
        with open_weights(shards) as reader:
            name = next(name for name in reader.infos() if name in _names(file))
        line["shards"] = refusal(spec, file, name)
        line["lora"] = refusal(spec, lora, _names(lora)[7])
    shutil.rmtree(shards)

    if "fp8_scaled" in kinds:
        run_scaled(report, spec.loras, write)
    second = Runtime()
    with report.step("write single file"):
        single = write("single")
    spec = ModelSpec(single, spec.loras)
    with report.step("load single file + LoRA, fp8") as line:
        line["different_from_shards"] = different(made, load(second, spec, "fp8"))[:3]
        second.unload()
    with report.step("convert single file + LoRA to fp8") as line:
        out = models / "diffusion_models" / "live_avatar_14B_fp8.safetensors"
        converted = convert(spec, out, precision="fp8", device=DEVICE)
        line["file_gb"] = round(out.stat().st_size / GB, 2)
    with report.step("load converted file") as line:
        line["different_from_made"] = different(made, load(second, converted, "auto"))[:3]
        second.unload()
    with report.step("refuse converted file with a name changed, other precision, LoRA") as line:
        line["name"] = refusal(converted, out, "blocks.3.norm3.bias", "auto")
        for key, model, precision in (("bf16", converted, "bf16"), ("lora", ModelSpec(out, spec.loras), "fp8")):
            try:
                load(second, model, precision)
            except WeightsError as error:
                line[key] = str(error)
    with report.step("load converted file, page cache dropped") as line:
        line["dropped"] = drop_page_cache()
        started = time.perf_counter()
        load(second, converted, "auto")
        line["load_seconds"] = round(time.perf_counter() - started, 2)
        second.unload()
    with report.step("load single file + LoRA, fp8, page cache dropped") as line:
        line["dropped"] = drop_page_cache()
        started = time.perf_counter()
        load(second, spec, "fp8")
        line["load_seconds"] = round(time.perf_counter() - started, 2)
        second.unload()


def run_scaled(report: Report, loras: tuple[LoraSpec, ...], write: Callable[[str], Path]) -> None:
    runtime = Runtime()
    with report.step("write fp8_scaled"):
        scaled = write("fp8_scaled")
    with report.step("load fp8_scaled, fp8") as line:
        loaded = load(runtime, ModelSpec(scaled), "fp8")
        with open_weights(scaled) as reader:
            stored = reader.fp8("blocks.0.ffn.0.weight")
            line["keeps_its_bytes"] = _equal(loaded["blocks.0.ffn.0.weight"].cpu(), stored[0])
        del loaded
        runtime.unload()
    with report.step("load fp8_scaled + LoRA, fp8"):
        load(runtime, ModelSpec(scaled, loras), "fp8")
        runtime.unload()
    with report.step("refuse fp8_scaled with a name changed") as line:
        line["weight"] = refusal(ModelSpec(scaled), scaled, "blocks.3.norm3.bias")
        line["factor"] = refusal(ModelSpec(scaled), scaled, "blocks.3.ffn.0.scale_weight")
    scaled.unlink(missing_ok=True)


def _names(file: Path) -> list[str]:
    with file.open("rb") as opened:
        entries = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [name for name in entries if name != "__metadata__"]


def tiny_writer(models: Path) -> Callable[[str], Path]:
    """In place of full-size files, the demo's; without fp8_scaled, which the demo does not have."""
    from liveavatar_core.demo.random_model import write_demo

    demo = write_demo(models / "demo")

    def write(kind: str) -> Path:
        path = models / FILES[kind][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "shards":
            shutil.copytree(demo.shards, path, dirs_exist_ok=True)
        else:
            shutil.copyfile({"lora": demo.lora, "single": demo.single_file}[kind], path)
        return path

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    write = tiny_writer(options.models) if options.tiny else lambda kind: write_file(options.models, kind)
    about = {"device": torch.cuda.get_device_name() if DEVICE != "cpu" else "cpu", "cpus": os.cpu_count()}
    print(json.dumps(about | {"torch": torch.__version__, "models": str(options.models)}), flush=True)
    kinds = ("shards", "single") if options.tiny else ("shards", "fp8_scaled", "single")
    try:
        run(options.models, Report(options.out, options.seconds), write, kinds)
    except OutOfTime as step:
        print(f"no time left before: {step}")


if __name__ == "__main__":
    main()
