"""Speed, memory and accuracy of Live Avatar on this machine, at full size, with random weights or real files.

    python -m liveavatar_core.bench                                     fp8, 704x384, 4 steps, one GPU
    python -m liveavatar_core.bench --attention exact int8 --skip-last-step both --output results.json
    python -m liveavatar_core.bench --vram 24 --blocks 200
    python -m liveavatar_core.bench --errors                            distance of each shortcut from bf16
    python -m liveavatar_core.bench --tiny                              a toy model, anywhere

Of several values of an option all combinations are measured, with the card's own ceilings measured in the same run.
Prints tables and, last, one JSON line per configuration.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from liveavatar_core.bench import report
from liveavatar_core.bench.ceilings import GIB, measure_ceilings
from liveavatar_core.bench.clock import cuda_devices
from liveavatar_core.bench.errors import compare, random_inputs
from liveavatar_core.bench.measure import BLOCKS, Case, Say, measure, settings
from liveavatar_core.bench.stand_ins import RandomWeights, random_speech, random_vae
from liveavatar_core.config import (
    ATTENTIONS,
    KV_CACHES,
    LIVE_AVATAR_14B,
    LoraSpec,
    ModelConfig,
    ModelSpec,
    RuntimeSpec,
    SamplingConfig,
)
from liveavatar_core.demo.random_model import DEMO_CONFIG
from liveavatar_core.encoders.audio_features import Wav2Vec2Speech
from liveavatar_core.encoders.vae import StreamDecoder
from liveavatar_core.errors import ConfigError, LiveAvatarError
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.runtime.memory import WAN_VAE
from liveavatar_core.runtime.runtime import Runtime, inspect_model
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.reader import WeightReader, open_weights

CONTEXT = GIB // 2
TINY_VAE = 4  # channels at full resolution
RANDOM = Path("random weights")
SKIPPING = {"no": [False], "yes": [True], "both": [False, True]}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m liveavatar_core.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", help="width x height; 704x384")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", nargs="+", choices=["fp8", "bf16", "fp32"], help="fp8, on a CPU fp32")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["exact"])
    parser.add_argument("--kv-cache", nargs="+", choices=KV_CACHES, default=["full"])
    parser.add_argument("--skip-last-step", nargs="?", choices=SKIPPING, const="yes", default="no")
    parser.add_argument("--plan", default="auto", help="auto, single, tpp or ring")
    parser.add_argument("--devices", nargs="+", help="cuda:0; one named more often holds several stages")
    parser.add_argument("--vram", type=float, help="GiB of each GPU that may be used; all that is free")
    parser.add_argument("--blocks", type=int, help="blocks of 12 frames in the stream, 20; with --errors 12")
    parser.add_argument("--checkpoint", type=Path, help="real files in place of random weights")
    parser.add_argument("--lora", type=Path, nargs="*", default=[])
    parser.add_argument("--errors", action="store_true", help="measure accuracy in place of time")
    parser.add_argument("--tiny", action="store_true", help="a toy model at 64x64")
    parser.add_argument("--output", type=Path, help="file to which the JSON lines are appended")
    parser.add_argument("--commit", help="of this code, where it lies in no git clone")
    return parser.parse_args(arguments)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all configurations of a run share."""

    config: ModelConfig
    model: ModelSpec
    geometry: Geometry
    devices: tuple[str, ...]
    about: dict  # of every JSON line

    @property
    def device(self) -> str:
        return self.devices[0]

    @property
    def cards(self) -> list[torch.device]:
        return cuda_devices(self.devices)

    def open(self, checkpoint: Path, *, outliers: bool = False) -> WeightReader:
        random = checkpoint == RANDOM
        return RandomWeights(self.config, self.device, outliers=outliers) if random else open_weights(checkpoint)


def set_up(options: argparse.Namespace, command: str) -> Setup:
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.tiny or options.devices):
        raise ConfigError("no CUDA device was found; --tiny measures a toy model here, --devices cpu insists")
    devices = tuple(options.devices or ["cuda:0" if on_gpu else "cpu"])
    size = options.size or ("64x64" if options.tiny else "704x384")
    try:
        width, height = (int(side) for side in size.split("x"))
    except ValueError:
        raise ConfigError(f"--size is {size!r}; give width x height, like 704x384") from None
    model = ModelSpec(options.checkpoint or RANDOM, tuple(map(LoraSpec, options.lora)))
    if options.checkpoint:
        config = inspect_model(model)
    else:
        config = DEMO_CONFIG if options.tiny else LIVE_AVATAR_14B
    cards = cuda_devices(devices)
    about = {
        "command": command,
        "commit": options.commit or report.commit(),
        "gpu": torch.cuda.get_device_name(cards[0]) if cards else "none",
        "gpus": len(cards),
        "torch": torch.__version__,
        "size": size,
        "steps": options.steps,
        "weights": "random" if options.checkpoint is None else options.checkpoint.name,
    }
    return Setup(config, model, Geometry(height, width), devices, about)


def speed(options: argparse.Namespace, setup: Setup, say: Say) -> Iterator[dict]:
    """A line for every combination of what was given several values."""
    precisions = options.precision or ["fp8" if setup.cards else "fp32"]
    wanted = [
        (
            RuntimeSpec(
                setup.devices,
                plan=options.plan,
                precision=precision,
                attention=attention,
                kv_cache=kv_cache,
                vram=options.vram,
            ),
            SamplingConfig(steps=options.steps, seed=1, skip_last_step=skip),
        )
        for precision, kv_cache, attention, skip in product(
            precisions, options.kv_cache, options.attention, SKIPPING[options.skip_last_step]
        )
    ]
    say("measuring the ceilings")
    dtype = work_dtype(precisions[0], setup.device)
    ceilings = measure_ceilings(setup.config, setup.geometry, setup.device, dtype, options.attention)
    rates = ceilings.rates(setup.config, setup.geometry)
    print(f"ceilings, hot\n{report.ceilings_table(rates)}\n")
    if options.vram:
        limit(setup, options.vram)
    # A small card has no room for it while a stream runs.
    speech = random_speech(setup.config, "cpu" if options.vram else setup.device)
    vae_on = cache(partial(random_vae, TINY_VAE if options.tiny else WAN_VAE.width))
    runtime = Runtime(open_model=setup.open)
    for spec, sampling in wanted:
        named = settings(spec, sampling)
        say(", ".join(f"{name} {value}" for name, value in named.items() if value))
        try:
            spec = runtime.placed(setup.model, setup.config, spec, sampling.evaluations, setup.geometry)
            vae = vae_on(spec.decoder)
            case = Case(
                model=setup.model,
                config=setup.config,
                runtime=spec,
                sampling=sampling,
                geometry=setup.geometry,
                vae=vae,
                decoder=partial(StreamDecoder, vae),
                speech=speech,
                blocks=options.blocks or BLOCKS,
            )
            line = measure(runtime, case, ceilings, say)
        except LiveAvatarError as error:
            line = {**named, "error": str(error)}
        yield {**setup.about, **line, "ceilings": rates, "notes": notes(setup, speech)}


def limit(setup: Setup, vram: float) -> None:
    """Let torch take no more than it could on cards of this size, where CUDA's context is beside it."""
    for card in setup.cards:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (vram * GIB - CONTEXT) / whole), card)


def errors(options: argparse.Namespace, setup: Setup, say: Say) -> Iterator[dict]:
    inputs = random_inputs(setup.config, setup.geometry, options.steps, options.blocks or 12)
    for outliers in (False, True) if setup.model.checkpoint == RANDOM else (False,):

        def load(precision: str, outliers: bool = outliers) -> CausalDiT:
            dtype = work_dtype("bf16", setup.device)
            with setup.open(setup.model.checkpoint, outliers=outliers) as reader:
                loras = [open_lora(spec.path, spec.strength) for spec in setup.model.loras]
                return load_dit(
                    reader,
                    setup.config,
                    loras=loras,
                    dtype=dtype,
                    device=setup.device,
                    fp8=precision == "fp8",
                )

        lines = []
        for line in compare(load, inputs, setup.device, say):
            lines.append({**setup.about, "outliers": outliers, **line})
        print(
            f"{'weights with outlier channels' if outliers else 'weights as they are'}\n{report.errors_table(lines)}\n"
        )
        yield from lines


def notes(setup: Setup, speech: Wav2Vec2Speech) -> str:
    nbytes = sum(parameter.nbytes for parameter in speech.model.parameters())
    device = speech.model.device.type
    listener = f"the sound is encoded by a random wav2vec2, {nbytes / GIB:.1f} GiB on {device} and in no memory plan"
    if setup.model.checkpoint == RANDOM:
        return f"random weights, prompt, picture and sound; {listener}"
    return f"VAE of random weights; prompt, picture and sound are random; {listener}"


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    say = Progress()
    lines = []
    try:
        setup = set_up(options, " ".join(["python -m liveavatar_core.bench", *arguments]))
        for line in (errors if options.errors else speed)(options, setup, say):
            lines.append(line)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    except LiveAvatarError as error:
        print(error, file=sys.stderr)
        return 1
    measured = [line for line in lines if "forward_ms" in line]
    if measured:
        print(report.table(measured))
    for line in lines:
        if "error" in line:
            print(f"{report.heading(line)}: {line['error']}")
    for line in lines:
        print(json.dumps(line))
    return 0 if measured or options.errors else 1


class Progress:
    """Says on stderr what is going on, once for every new thing."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        topic = text.partition(":")[0]
        if topic != self._last:
            self._last = topic
            print(f".. {topic}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
