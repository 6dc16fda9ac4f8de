"""Stage 1: a Wan 2.1 VAE of small width learns to draw the world; then its decoder alone learns to keep on.

    python -m training.vae --folder .train --minutes 9
    python -m training.vae --folder .train --minutes 5 --late

What the causal convolutions see of the past settles over some twenty frames. Short clips end before that, and a
decoder that knows only them turns every stream pink; long ones would cost several times as much for all else.
"""

import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, WanUpsample
from torch import Tensor, nn

from liveavatar_core.geometry import FRAMES_PER_LATENT, LATENTS_PER_BLOCK, PRIME_LATENTS
from training.ahead import ahead
from training.graphs import Gradients
from training.pool import Pool
from training.run import minimise, read_log, read_weights, stage_parser
from training.sizes import SIDE, VAE_DIM
from training.world.light import turned
from training.world.looks import GRADES, KINDS, LIGHTS, draw_look
from training.world.painter import paint
from training.world.pose import Pose
from training.world.sheet import contact_sheet

log = logging.getLogger(__name__)

FRAMES = 9  # a first frame and two latents of four
SETTLED = PRIME_LATENTS  # latents of a held picture, as the engine primes its decoder
LATE = 4 * LATENTS_PER_BLOCK  # latents after them
LEARNED = LATE // 2  # the first or the last so many are what a step learns from
POOL, OLD = 2048, 2  # clips kept, and steps until there is a new one
KL, EDGES, COLOURS = 1e-3, 0.5, 2.0
CELL = 16  # px of the squares whose colours are compared
WHITE, COARSE = 0.15, 0.12  # errors of a DiT, of every number and of whole parts of a picture: as large, about
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


def lighten(coder: nn.Module, *, fused: bool) -> None:
    """The same numbers with less to move, in place: a step is mostly what lies between the convolutions.

    Under autocast the norms' parameters make float32 of all that follows, which the next convolution takes back.
    `fused`: norms are compiled, each a kernel or two.
    """
    norm = torch.compile(rms_norm, dynamic=True) if fused else rms_norm
    for module in coder.modules():
        if isinstance(module, WanRMS_norm):
            module.forward = partial(_over_channels, norm, module)
        elif isinstance(module, WanUpsample):  # copies pixels, which needs no float32
            module.forward = partial(F.interpolate, scale_factor=module.scale_factor, mode=module.mode)


def _over_channels(norm: Callable[[Tensor, Tensor], Tensor], module: WanRMS_norm, x: Tensor) -> Tensor:
    pixels = x.movedim(1, -1)
    # as rows, and with a product for a parameter: else every shape and order in memory would be compiled for itself
    drawn = norm(pixels.reshape(-1, pixels.shape[-1]), module.scale * module.gamma.flatten())
    return drawn.view(pixels.shape).movedim(-1, 1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' WanRMS_norm of rows (N, C), in x's precision."""
    length = x.float().square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    return (x.float() / length * weight).to(x.dtype)


def encode(model: AutoencoderKLWan, frames: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, 1 + 4n, H, W) in [-1, 1] -> mean and log variance (B, 16, 1 + n, h, w), not yet normalised.

    Like WanVAE.encode, but many at once and with gradients.
    """
    caches = _caches(model.encoder)
    bounds = [0, *range(1, frames.shape[2] + 1, FRAMES_PER_LATENT)]
    parts = [model.encoder(frames[:, :, a:b], feat_cache=caches, feat_idx=[0]) for a, b in pairwise(bounds)]
    mean, log_variance = model.quant_conv(torch.cat(parts, 2)).float().chunk(2, 1)
    return mean, log_variance.clamp(-12, 4)


def decode(model: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """(B, 16, t, h, w) as `encode` gives them -> (B, 3, 4t - 3, H, W) float32."""
    caches = _caches(model.decoder)
    hidden = model.post_quant_conv(latents)
    calls = _decoder_calls(hidden.shape[2])
    return torch.cat([model.decoder(hidden[:, :, a:b], feat_cache=caches, feat_idx=[0]) for a, b in calls], 2).float()


def _decoder_calls(latents: int) -> list[tuple[int, int]]:
    bounds = [0, *range(1, latents, LATENTS_PER_BLOCK), latents]
    return list(pairwise(bounds))


def _caches(coder: nn.Module) -> list:
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


def losses(model: AutoencoderKLWan, frames: Tensor) -> dict[str, Tensor]:
    """frames (B, 3, T, H, W) in [-1, 1]."""
    # no cache: it would outlive a graph's memory
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda, cache_enabled=False):
        mean, log_variance = encode(model, frames)
        drawn = decode(model, mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
    pixels, edges = differences(drawn, frames)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return {"loss": pixels + EDGES * edges + KL * kl, "pixels": pixels, "edges": edges, "kl": kl}


def differences(drawn: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Of pixels, and of how they change from one to the next in time, down and across."""
    edges = sum((drawn.diff(dim=d) - frames.diff(dim=d)).abs().mean() for d in (2, 3, 4))
    return (drawn - frames).abs().mean(), edges


class Late(NamedTuple):
    """What a stream looks like after its beginning."""

    latents: Tensor  # (16, SETTLED + LATE, h, w) as `encode` gives them
    frames: Tensor  # (3, 4 LATE, H, W) uint8


def late_losses(model: AutoencoderKLWan, latents: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """latents (B, 16, T, h, w) of a stream from its beginning, frames (B, 3, 4t, H, W) in [-1, 1] of its last t
    latents. For the decoder alone."""
    first = latents.shape[2] - frames.shape[2] // FRAMES_PER_LATENT
    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda, cache_enabled=False):
        hidden, caches = model.post_quant_conv(latents), _caches(model.decoder)
        parts = []
        for a, b in _decoder_calls(hidden.shape[2]):
            with torch.set_grad_enabled(a >= first):
                parts.append(model.decoder(hidden[:, :, a:b], feat_cache=caches, feat_idx=[0]))
    drawn = torch.cat(parts, 2)[:, :, -frames.shape[2] :].float()
    pixels, edges = differences(drawn, frames)
    colours = F.avg_pool3d(drawn - frames, (1, CELL, CELL)).abs().mean()
    loss = pixels + EDGES * edges + COLOURS * colours
    return {"loss": loss, "pixels": pixels, "edges": edges, "colours": colours}


def errors_like_a_dits(latents: Tensor, seed: int) -> Tensor:
    """For latents (B, 16, T, h, w) of variance 1: each number's own, and what is common to near places and times."""
    generator = torch.Generator(latents.device).manual_seed(seed)
    sides = latents.shape[2:]
    knots = [-(-side // every) for side, every in zip(sides, (LATENTS_PER_BLOCK, 4, 4), strict=True)]

    def draw(*sides: int) -> Tensor:
        return torch.randn(*latents.shape[:2], *sides, generator=generator, device=latents.device)

    return WHITE * draw(*sides) + COARSE * F.interpolate(draw(*knots), sides, mode="trilinear")


def draw_clip(
    seed: int,
    side: int,
    device: torch.device | str,
    *,
    held_out: bool = False,
    frames: int = FRAMES,
    calm: bool = False,
) -> Tensor:
    """(3, frames, side, side) uint8: any look in any light, moving faster than anybody does; sometimes a cut.

    `calm`: some move as people do, and half of them have their colours turned to what the world lacks."""
    generator = random.Random(f"vae {seed} {held_out}")
    look = draw_look(seed, generator.choice(KINDS), held_out=held_out)
    look = replace(look, light=generator.choice(LIGHTS), grade=generator.choice(GRADES + ("none",) * 4))
    pose = Pose.of(_moves(seed, frames, generator.choice((2, 4, 8)) if calm else 2))
    clip = paint(look, pose, side, side, device)
    # the first picture is a portrait, the others what a prompt made of it
    if generator.random() < (0.3 if calm else 0.15):
        still = paint(replace(look, light="neutral", grade="none"), Pose.still(), side, side, device)
        clip = torch.cat((still, clip[1:]))
    if calm and generator.random() < 0.5:
        clip = turned(clip, generator.uniform(-math.pi, math.pi))
    return (clip * 255).round().to(torch.uint8).transpose(0, 1)


@torch.no_grad()
def draw_late(
    model: AutoencoderKLWan, seed: int, side: int, crop: int, device: torch.device | str, *, held_out: bool = False
) -> Late:
    """A square of `crop` px out of a clip whose first picture was held for a while."""
    count = FRAMES_PER_LATENT * LATE
    clip = draw_clip(seed, side, device, held_out=held_out, frames=1 + count, calm=True)
    generator = random.Random(seed)
    y, x = (generator.randrange(side - crop + 1) for _ in range(2))
    clip = clip[..., y : y + crop, x : x + crop]
    held = clip[:, :1].expand(-1, 1 + FRAMES_PER_LATENT * (SETTLED - 1), -1, -1)
    seen = torch.cat((held, clip[:, 1:]), 1)[None].float() / 127.5 - 1
    with torch.autocast(seen.device.type, torch.bfloat16, enabled=seen.is_cuda):
        return Late(encode(model, seen)[0][0], clip[:, 1:].clone())


def _moves(seed: int, frames: int, pace: int) -> Tensor:
    """(frames, 9): every number of a pose wanders between knots `pace` frames apart."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.rand(9, 2 + frames // pace, generator=generator)
    track = F.interpolate(knots[None], frames, mode="linear", align_corners=True)[0]
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
) -> Callable[[int], tuple[Tensor]]:
    """step -> (B, 3, FRAMES, H, W) in [-1, 1]: `size` whole pictures, or four times as many quarters of them."""

    def make(seed: int) -> Tensor:
        return draw_clip(seed, side, device)

    pool = Pool(POOL, make, first_seed=first_seed, begin_with=begin_with, beside=torch.device(device).type == "cuda")

    def batch(step: int) -> tuple[Tensor]:
        pool.refresh(int(step % OLD == 0))
        generator = random.Random(step)
        close = step % 2 == 0
        frames = torch.stack(pool.draw(4 * size if close else size, generator)).float() / 127.5 - 1
        if close:
            y, x = (generator.randrange(side // 2 + 1) for _ in range(2))
            frames = frames[..., y : y + side // 2, x : x + side // 2]
        return (frames.flip(-1) if generator.random() < 0.5 else frames,)

    return batch


def late_batches(
    model: AutoencoderKLWan,
    device: torch.device | str,
    *,
    side: int,
    crop: int,
    size: int,
    first_seed: int,
    begin_with: int,
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> latents, with errors as a DiT makes them, and frames for `late_losses`."""

    def make(seed: int) -> Late:
        return draw_late(model, seed, side, crop, device)

    deviation = torch.tensor(model.config.latents_std, device=device).view(-1, 1, 1, 1)
    pool = Pool(POOL, make, first_seed=first_seed, begin_with=begin_with, beside=torch.device(device).type == "cuda")

    def batch(step: int) -> tuple[Tensor, Tensor]:
        pool.refresh(int(step % OLD == 0))
        latents, frames = (torch.stack(x) for x in zip(*pool.draw(size, random.Random(step)), strict=True))
        end = LEARNED if step % 2 else LATE
        latents = latents[:, :, : SETTLED + end]
        shown = frames[:, :, FRAMES_PER_LATENT * (end - LEARNED) : FRAMES_PER_LATENT * end]
        return latents + deviation * errors_like_a_dits(latents, step), shown.float() / 127.5 - 1

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
    parser = stage_parser(__doc__, minutes=9)
    parser.add_argument("--late", action="store_true", help="the decoder alone, on what comes late in a stream")
    parser.add_argument("--crop", type=int, help="px of a picture that --late learns from; all")
    parser.add_argument("--batch", type=int, default=2)
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
    drawn = {"side": options.side, "size": options.batch, "first_seed": seed, "begin_with": options.begin}
    if options.late:
        for part in (model.encoder, model.quant_conv, model.post_quant_conv):  # latents stay what they are
            part.requires_grad_(False)
        lighten(model.decoder, fused=device == "cuda")
        draw = late_batches(model, device, crop=options.crop or options.side, **drawn)
        of_batch, rate = late_losses, 1e-3
    else:
        draw = batches(device, **drawn)
        of_batch, rate = losses, 2e-3
    batch, learned = ahead(draw, device), Gradients(model, partial(of_batch, model))
    minimise(
        "vae",
        model,
        lambda step: learned(*batch(step)),
        options.folder,
        minutes=options.minutes,
        whole=options.whole,
        rate=rate,
    )
    report(model, options.folder, options.side, device)


@torch.no_grad()
def report(model: AutoencoderKLWan, folder: Path, side: int, device: str) -> None:
    """What late pictures of unseen streams lose, in words and as a sheet: drawn, through the VAE, difference times
    four."""
    rows, errors = [], []
    for seed in range(12):
        late = draw_late(model, seed, side, side, device, held_out=True)
        wanted = late.frames.float() / 127.5 - 1
        again = decode(model, late.latents[None].float())[0, :, -wanted.shape[1] :].clamp(-1, 1)
        errors.append(((again - wanted) / 2).square().mean())
        rows.append(torch.stack((wanted, again, (again - wanted) * 4))[:, :, -1])
    error = torch.stack(errors)
    log.info(
        "vae: PSNR late in unseen streams %.2f dB, worst %.2f", *(-10 * e.log10() for e in (error.mean(), error.max()))
    )
    contact_sheet(torch.stack(rows, 1).flatten(0, 1) / 2 + 0.5, len(rows)).save(folder / "vae_report.jpg", quality=90)


if __name__ == "__main__":
    main()
