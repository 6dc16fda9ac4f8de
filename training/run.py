"""What every stage shares: a loop with a deadline, checkpoints small enough to carry, and a picture of the loss.

A slice of training starts from the weights the last one left, with a fresh optimiser that warms up: an averaged model
in bfloat16 is a tenth of a full checkpoint and loses a few steps.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.muon import Muon, matrices
from training.parallel import average_over_processes, largest, place

log = logging.getLogger(__name__)

PART_BYTES = 15 << 20  # no file of a checkpoint is larger
WARM_UP = 100  # steps
AVERAGING = 0.999
LARGEST_GRADIENT = 1.0
SAVE_SECONDS = 150
LOG_STEPS = 20

Losses = Mapping[str, Tensor]  # "loss" is minimised; the others are written down beside it


def stage_parser(about: str, *, minutes: float) -> argparse.ArgumentParser:
    """What every stage is told: `minutes` unless the command says otherwise."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="weights so far and log; gets the new ones")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--whole", type=float, help="minutes of all slices of this stage; this one's")
    return parser


def minimise(
    stage: str,
    model: nn.Module,
    learn: Callable[[int], Losses],
    folder: Path,
    *,
    minutes: float,
    whole: float | None,
    rate: float,
    steps: float = math.inf,
    decay: float = 0.01,
) -> int:
    """Train until the minutes are over, or until `steps` in all; returns the step reached.

    `learn(step)` leaves gradients in the parameters and returns the losses (`graphs.Gradients`).
    `folder` has the weights and the log of earlier slices, if any, and gets the new ones. `whole`: minutes of all
    slices together, over which the rate falls along a cosine; None: it falls over this slice alone. The model ends
    with its averaged weights. Of several processes (`parallel`) the first one's losses are written down.
    """
    history = read_log(folder, stage)
    before, whole = (0.0, 60 * minutes) if whole is None else (_seconds(history), 60 * whole)
    begin, spent = time.monotonic(), 0.0
    step = start = history[-1]["step"] if history else 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, parameters, rate, decay)
    average = [p.detach().clone() for p in parameters]
    recent: list[dict[str, Tensor]] = []
    saved = last = time.monotonic()
    while step < steps:
        if place()[1] == 1 or step % LOG_STEPS == 0:  # processes agree on it, and that takes a while
            spent = largest(time.monotonic() - begin)
        if spent >= 60 * minutes:
            break
        current = rate * _warm(step - start) * _cosine((before + spent) / max(whole, 1))
        values = learn(step)
        norm = _tame_gradients(parameters)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = current
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        step += 1
        share = 1 - min(AVERAGING, (step - start) / (step - start + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], share)
        recent.append({name: value.detach() for name, value in values.items()} | {"gradient": norm.detach()})
        if step % LOG_STEPS == 0 or step == steps:
            now = time.monotonic()
            history.append(_entry(step, (now - last) / len(recent), recent))
            recent, last = [], now
            log.info("%s %s", stage, " ".join(f"{name} {value:.5g}" for name, value in history[-1].items()))
            if now - saved > SAVE_SECONDS:
                _save_average(stage, model, parameters, average, history, folder)
                saved = now
    if recent:
        history.append(_entry(step, (time.monotonic() - last) / len(recent), recent))
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    _save_average(stage, model, parameters, average, history, folder)
    return step


def _optimizers(
    model: nn.Module, parameters: list[nn.Parameter], rate: float, decay: float
) -> list[torch.optim.Optimizer]:
    weights = matrices(model)
    known = {id(weight) for weight in weights}
    others = [p for p in parameters if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = []
    if weights:
        optimizers.append(Muon(weights, rate, weight_decay=decay))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=decay))
    return optimizers


def _tame_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Average them over all processes and shorten them, in place; returns their norm. Where it is not finite they
    become 0, on the device: a host that looked would keep the device waiting."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    average_over_processes(flat)
    norm = flat.norm()
    flat = torch.where(norm.isfinite(), flat * (LARGEST_GRADIENT / norm.clamp(min=LARGEST_GRADIENT)), 0)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view(parameter.shape)
    return norm


def _seconds(history: list[dict]) -> float:
    """Spent on what is written there."""
    steps = [0, *(entry["step"] for entry in history)]
    return sum((b - a) * entry["seconds"] for a, b, entry in zip(steps, steps[1:], history, strict=False))


def _entry(step: int, seconds: float, recent: list[dict[str, Tensor]]) -> dict[str, float]:
    means = {name: torch.stack([losses[name].float() for losses in recent]).mean().item() for name in recent[0]}
    return {"step": step, "seconds": round(seconds, 4), **means}


def _warm(steps: int) -> float:
    return min(1.0, (steps + 1) / WARM_UP)


def _cosine(share: float) -> float:
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _save_average(
    stage: str, model: nn.Module, parameters: list[Tensor], average: list[Tensor], history: list[dict], folder: Path
) -> None:
    if place()[0] > 0:
        return
    means = {id(parameter): mean for parameter, mean in zip(parameters, average, strict=True)}
    state = {name: means.get(id(tensor), tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    save_weights(folder, stage, state)
    folder.joinpath(f"{stage}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    draw_curve(history, folder / f"{stage}.png")


def save_weights(folder: Path, stage: str, state: Mapping[str, Tensor]) -> None:
    """bfloat16, in as many files as it takes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        if size + tensor.nbytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    for old in folder.glob(f"{stage}.*.safetensors"):
        old.unlink()
    for number, part in enumerate(parts):
        save_file(part, folder / f"{stage}.{number}.safetensors")


def read_weights(folder: Path, stage: str) -> dict[str, Tensor] | None:
    """float32; None where the stage has not begun."""
    files = sorted(folder.glob(f"{stage}.*.safetensors"))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()} or None


def read_log(folder: Path, stage: str) -> list[dict]:
    path = folder / f"{stage}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


_COLOURS = ("#1f6fb4", "#d0662b", "#3b8f4d", "#8a4fa3", "#a33b4f", "#6b6b6b")


def draw_curve(history: list[dict], path: Path, size: tuple[int, int] = (900, 480)) -> None:
    """All that was written down over the steps, on a logarithmic scale."""
    names = [name for name in history[-1] if name not in ("step", "seconds")] if history else []
    values = [entry[name] for entry in history for name in names if entry.get(name, 0) > 0]
    if not values:
        return
    width, height = size
    left, right, top, bottom = 70, width - 20, 20, height - 40
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    final = max(1, history[-1]["step"])
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)

    def place(step: int, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return left + (right - left) * step / final, bottom - (bottom - top) * share

    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            value = digit * 10.0**power
            if low <= math.log10(value) <= high:
                y = place(0, value)[1]
                draw.line((left, y, right, y), "#e4e4e4")
                draw.text((8, y - 6), f"{value:g}", "#444444")
    draw.line((left, bottom, right, bottom), "#444444")
    draw.text((left, bottom + 8), "step 0", "#444444")
    draw.text((right - 60, bottom + 8), f"{final}", "#444444")
    for number, name in enumerate(names):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [place(entry["step"], entry[name]) for entry in history if entry.get(name, 0) > 0]
        if len(points) > 1:
            draw.line(points, colour, 2)
        draw.text((left + 10 + 130 * number, top - 14), name, colour)
    picture.save(path)
