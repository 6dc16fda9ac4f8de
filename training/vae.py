"""Stage 1: a Wan 2.1 VAE of small width learns to draw the world.

python -m training.vae --folder .train --minutes 9
"""

import argparse
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from liveavatar_core.geometry import FRAMES_PER_LATENT, LATENTS_PER_BLOCK
from training.graphs import Gradients
from training.pool import Pool
from training.run import minimise, read_log, read_weights
from training.sizes import SIDE, VAE_DIM
from training.world.looks import GRADES, KINDS, LIGHTS, draw_look
from training.world.painter import paint
from training.world.pose import Pose
from training.world.sheet import contact_sheet

log = logging.getLogger(__name__)

FRAMES = 9  # a first frame and two latents of four
POOL, OLD = 2048, 2  # clips kept, and steps until there is a new one
KL, EDGES = 1e-3, 0.5
QUIET = -4.0  # log variance of the latents at first


def new_vae(dim: int = VAE_DIM) -> AutoencoderKLWan:
    model = AutoencoderKLWan(
        base_dim=dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
    )
    with torch.no_grad():  # noise as large as the latents would hide them for the first hundreds of steps
        model.quant_conv.weight[16:] = 0
        model.quant_conv.bias[16:] = QUIET
    return model


def encode(model: AutoencoderKLWan, frames: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, 1 + 4n, H, W) in [-1, 1] -> mean and log variance (B, 16, 1 + n, h, w), not yet normalised.

    Like WanVAE.encode, but many at once and with gradients.
    """
    caches = _caches(model.encoder)
    bounds = [0, *range(1, frames.shape[2] + 1, FRAMES_PER_LATENT)]
    parts = [
        model.encoder(frames[:, :, a:b], feat_cache=caches, feat_idx=[0])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    mean, log_variance = model.quant_conv(torch.cat(parts, 2)).float().chunk(2, 1)
    return mean, log_variance.clamp(-12, 4)


def decode(model: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """(B, 16, t, h, w) as `encode` gives them -> (B, 3, 4t - 3, H, W) float32."""
    caches = _caches(model.decoder)
    hidden = model.post_quant_conv(latents)
    bounds = [0, *range(1, hidden.shape[2], LATENTS_PER_BLOCK), hidden.shape[2]]
    parts = [
        model.decoder(hidden[:, :, a:b], feat_cache=caches, feat_idx=[0])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(parts, 2).float()


def _caches(coder: nn.Module) -> list:
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


def losses(model: AutoencoderKLWan, frames: Tensor) -> dict[str, Tensor]:
    """frames (B, 3, T, H, W) in [-1, 1]."""
    # no cache: it would outlive a graph's memory
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda, cache_enabled=False):
        mean, log_variance = encode(model, frames)
        drawn = decode(model, mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    pixels = (drawn - frames).abs().mean()
    edges = sum((drawn.diff(dim=d) - frames.diff(dim=d)).abs().mean() for d in (2, 3, 4))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return {"loss": pixels + EDGES * edges + KL * kl, "pixels": pixels, "edges": edges, "kl": kl}


def draw_clip(seed: int, side: int, device: torch.device | str, *, held_out: bool = False) -> Tensor:
    """(3, FRAMES, side, side) uint8: any look in any light, moving faster than anybody does; sometimes a cut."""
    generator = random.Random(f"vae {seed} {held_out}")
    look = draw_look(seed, generator.choice(KINDS), held_out=held_out)
    look = replace(look, light=generator.choice(LIGHTS), grade=generator.choice(GRADES + ("none",) * 4))
    pose = Pose.of(_moves(seed))
    frames = paint(look, pose, side, side, device)
    if generator.random() < 0.15:  # the first picture is a portrait, the others what a prompt made of it
        still = paint(replace(look, light="neutral", grade="none"), Pose.still(), side, side, device)
        frames = torch.cat((still, frames[1:]))
    return (frames * 255).round().to(torch.uint8).transpose(0, 1)


def _moves(seed: int) -> Tensor:
    """(FRAMES, 9): every number of a pose wanders between knots two frames apart."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.rand(9, 2 + FRAMES // 2, generator=generator)
    track = F.interpolate(knots[None], FRAMES, mode="linear", align_corners=True)[0]
    opening, wide, rounding, smile, blink, brow, yaw, pitch, roll = track
    still = torch.rand(9, generator=generator)
    yaw, pitch, roll = ((part * 0.3 + 0.7 * s) * 2 - 1 for part, s in zip((yaw, pitch, roll), still[6:], strict=True))
    rows = (
        (opening * 1.6 - 0.5).clamp(0, 1),
        wide * 2 - 0.6,
        (rounding * 2 - 1).clamp(0, 1),
        still[3] * smile,
        (blink * 3 - 2).clamp(0, 1),
        brow,
        yaw,
        pitch,
        roll * 0.08,
    )
    return torch.stack(rows, 1)


def batches(
    device: torch.device | str, *, side: int, size: int, first_seed: int, begin_with: int
) -> Callable[[int], Tensor]:
    """step -> (B, 3, FRAMES, H, W) in [-1, 1]: `size` whole pictures, or four times as many quarters of them."""

    def make(seed: int) -> Tensor:
        return draw_clip(seed, side, device)

    beside = torch.device(device).type == "cuda"
    pool = Pool(POOL, make, first_seed=first_seed, begin_with=begin_with, beside=beside)

    def batch(step: int) -> Tensor:
        pool.refresh(int(step % OLD == 0))
        generator = random.Random(step)
        close = step % 2 == 0
        frames = torch.stack(pool.draw(4 * size if close else size, generator)).float() / 127.5 - 1
        if close:
            y, x = (generator.randrange(side // 2 + 1) for _ in range(2))
            frames = frames[..., y : y + side // 2, x : x + side // 2]
        return frames.flip(-1) if generator.random() < 0.5 else frames

    return batch


@torch.no_grad()
def normalise(model: AutoencoderKLWan, clips: Tensor) -> None:
    """Fold scale and offset of the latents into the model's 1x1x1 convolutions, in place.

    Afterwards latents normalised with the published constants have mean 0 and variance 1 over `clips` (B, 3, T, H, W).
    """
    mean = encode(model, clips)[0]
    found_mean, found_std = mean.mean((0, 2, 3, 4)), mean.std((0, 2, 3, 4))
    want_mean, want_std = (found_mean.new_tensor(v) for v in (model.config.latents_mean, model.config.latents_std))
    scale = want_std / found_std
    conv, back = model.quant_conv, model.post_quant_conv
    conv.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
    conv.bias[:16] = (conv.bias[:16] - found_mean) * scale + want_mean
    conv.bias[16:] += 2 * scale.log()
    back.bias += (back.weight.flatten(1) * (found_mean - want_mean / scale)).sum(1)
    back.weight /= scale.view(1, -1, 1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="weights so far and log; gets the new ones")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--whole", type=float, help="minutes of all slices of this stage; this one's")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--dim", type=int, default=VAE_DIM)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--begin", type=int, default=256, help="clips drawn before the first step")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = new_vae(options.dim)
    if weights := read_weights(options.folder, "vae"):
        model.load_state_dict(weights)
    model = model.to(device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        for parameter in model.parameters():
            if parameter.dim() == 5:  # convolutions of few channels like them side by side
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    reached = read_log(options.folder, "vae")
    seed = (reached[-1]["step"] if reached else 0) + 10_000
    batch = batches(device, side=options.side, size=options.batch, first_seed=seed, begin_with=options.begin)
    gradients = Gradients(model, partial(losses, model))
    minimise(
        "vae",
        model,
        lambda step: gradients(batch(step)),
        options.folder,
        minutes=options.minutes,
        whole=options.whole,
        rate=2e-3,
    )
    report(model, options.folder, options.side, device)


@torch.no_grad()
def report(model: AutoencoderKLWan, folder: Path, side: int, device: str) -> None:
    """What unseen pictures lose, in words and as a sheet: drawn, through the VAE, difference times four."""
    clips = torch.stack([draw_clip(seed, side, device, held_out=True) for seed in range(12)]).float() / 127.5 - 1
    again = torch.cat([decode(model, encode(model, clip[None])[0]).clamp(-1, 1) for clip in clips])
    error = ((again - clips) / 2).square().mean((1, 2, 3, 4))
    log.info("vae: PSNR of unseen clips %.2f dB, worst %.2f", *(-10 * e.log10() for e in (error.mean(), error.max())))
    views = torch.stack((clips, again, (again - clips) * 4), 1)[:, :, :, -1].transpose(0, 1).flatten(0, 1)
    contact_sheet(views / 2 + 0.5, len(clips)).save(folder / "vae_report.jpg", quality=90)


if __name__ == "__main__":
    main()
