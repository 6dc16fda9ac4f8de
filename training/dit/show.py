"""What the DiT has learned, through the engine that everybody uses: unseen faces and voices, pictures and figures.

python -m training.dit.show --models .train --folder .train --scenes 6
"""

import argparse
import logging
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from liveavatar_core.config import SamplingConfig
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE
from liveavatar_core.geometry import FRAMES_PER_BLOCK, PRIME_LATENTS, Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import PREFILL, StageSpec
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Payload
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.reader import open_weights
from training.dit.clips import Encoders, draw_scene
from training.dit.train import load_encoders
from training.export import export_dit
from training.lips import read_opening
from training.sizes import DEMO, SIDE
from training.speech.sounds import sound
from training.world.motion import perform
from training.world.painter import paint
from training.world.pose import Pose
from training.world.sheet import contact_sheet

log = logging.getLogger(__name__)


def video(
    model: CausalDiT,
    vae: WanVAE,
    picture: Tensor,
    features: Tensor,
    text: Tensor,
    sampling: SamplingConfig,
    device: torch.device | str,
) -> Tensor:
    """picture (3, H, W) in [-1, 1], features (N, states, width, 12), text (length, width) -> (12 N, 3, H, W) in 0..1.

    The three frames that a stream drops are kept here.
    """
    reference, motion = portrait_latents(vae, picture)
    layers = range(model.config.layers)
    stage = Stage(
        StageSpec(0, 0, 0, range(sampling.evaluations), layers, str(device)),
        model,
        Geometry(*picture.shape[1:]),
        sampling,
        levels(sampling),
        text,
        graphs=False,
    )
    stage.run(Payload(0, PREFILL, 0, condition=(reference, motion)))
    decoder = StreamDecoder(vae)
    decoder.prime(motion[:, :PRIME_LATENTS])
    frames = []
    for block, heard in enumerate(features):
        sink = int(sampling.reanchor_block is not None and block >= sampling.reanchor_block)
        payload = Payload(block, 0, sink, request=BlockRequest(block, heard[None], sink))
        while payload.step < sampling.evaluations:
            payload = stage.run(payload)
        if block == 0:
            stage.run(Payload(0, PREFILL, 1, condition=(payload.latent[:, :1], motion)))
        frames.append(decoder.decode(payload.latent.float()))
    return torch.cat(frames).permute(0, 3, 1, 2).float() / 255


def decibels(a: Tensor, b: Tensor) -> float:
    return -10 * (a - b).square().mean().log10().item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = load_encoders(options.models, options.side, device)
    with tempfile.TemporaryDirectory() as scratch:
        reader = open_weights(export_dit(options.folder, Path(scratch) / "dit.safetensors"))
        model = load_dit(reader, DEMO, dtype=work_dtype("auto", device), device=device)
    rows = []
    for seed in range(options.scenes):
        rows += _compare(seed, options.blocks, model, known)
    contact_sheet(torch.cat(rows), 12).save(options.folder / "dit_show.jpg", quality=90)


def _compare(seed: int, blocks: int, model: CausalDiT, known: Encoders) -> list[Tensor]:
    """Twelve frames as they should be and as they are; the figures go to the log."""
    scene, spoken = draw_scene(seed, held_out=True), sound(seed, 0.5 + blocks * 0.48, held_out=True)
    side, device = known.side, known.device
    picture = paint(scene.picture, Pose.still(**scene.ajar), side, side, device)[0]
    (stream,) = known.listen([spoken])
    features = torch.stack([stream.block(block) for block in range(blocks)])
    text = known.read([scene.prompt])[0]
    sampling = SamplingConfig(seed=random.Random(seed).randrange(1 << 30))
    made = video(model, known.vae, (picture * 255).round() / 127.5 - 1, features, text, sampling, device)
    poses = perform(spoken.mouth, scene.action, 0, blocks * FRAMES_PER_BLOCK, 0)
    truth = paint(scene.video, poses, side, side, device)
    said, seen = poses.open.flatten().cpu(), read_opening(made, scene.video, poses).cpu()
    fits = {lag: _fit(said[3:-3], seen[3 + lag : len(seen) - 3 + lag]) for lag in range(-3, 4)}
    best = max(fits, key=fits.get)
    log.info(
        "show %d %s: lips %.3f (best %.3f at %+d frames), PSNR %.1f dB, last block %.1f; %r",
        seed,
        scene.video.kind,
        fits[0],
        fits[best],
        best,
        decibels(made, truth),
        decibels(made[-FRAMES_PER_BLOCK:], truth[-FRAMES_PER_BLOCK:]),
        scene.prompt,
    )
    chosen = torch.linspace(0, len(made) - 1, 12).round().long().to(device)
    return [truth[chosen].cpu(), made[chosen].cpu()]


def _fit(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item()


if __name__ == "__main__":
    main()
