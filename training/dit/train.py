"""Stage 4: the causal DiT learns the flow from noise to the one right video.

    python -m training.dit.train --models .train --folder .train --minutes 9 --blocks 2 --teach
    python -m training.dit.train --models .train --folder .train --minutes 9

With --teach the history of a block is the truth with noise; without, it is what the model itself made of it at the
same level, as at inference. The world leaves nothing to chance, so that there is a right answer for either.
"""

import logging
import random
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from liveavatar_core.config import DISTANCE_RANGE, ModelConfig, SamplingConfig
from liveavatar_core.encoders.audio_features import Wav2Vec2Speech
from liveavatar_core.encoders.vae import read_vae
from liveavatar_core.geometry import PIXELS_PER_LATENT, Geometry
from liveavatar_core.model.dit import CausalDiT, waves
from liveavatar_core.sampling import timestep
from liveavatar_core.schedule import levels
from training.ahead import ahead
from training.dit.clips import BLOCKS, EYES, Encoders, Group, make_group
from training.dit.forward import (
    blocks_factors,
    conditions,
    gradients,
    references_factors,
    sink_factors,
    velocities,
)
from training.export import VAE_FILE
from training.front import make_sounds, new_front
from training.graphs import Gradients
from training.parallel import join, place
from training.pool import Pool
from training.run import minimise, read_log, read_weights, stage_parser
from training.sizes import DEMO, SIDE
from training.text import encode_prompts, new_text_encoder, read_tokenizer

log = logging.getLogger(__name__)

REANCHOR = SamplingConfig().reanchor_block
STEPS = (4, 4, 4, 3, 5)  # of the rollouts; four is what is used
SOUND_SECONDS = 12.0
COARSE, CELL = 8.0, 4  # what a block's mean error costs in cells of 4 x 4: the VAE makes three times as much of it


def new_dit() -> CausalDiT:
    """Layers begin as the identity: gates and all that is added to the stream are 0."""
    model = CausalDiT(DEMO)
    for linear in (
        model.time_projection[1],
        model.head.head,
        *(layer.cross_attn.o for layer in model.blocks.values()),
        *(injector.o for injector in model.audio_injector.injector.values()),
    ):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    for embedding in (model.trainable_cond_mask.weight, model.text_embedding[2].weight):
        torch.nn.init.normal_(embedding, std=0.02)
    return model


class Batch(NamedTuple):
    """All that a step learns from, on the device: N blocks of B clips at L noise levels."""

    wanted: Tensor  # (N, B, C, F, h, w)
    weight: Tensor  # (N, B, 1, F, h, w)
    noise: Tensor  # (L, N, B, C, F, h, w), of the first level alone if the model makes its own way
    levels: Tensor  # (L + 1,); the last is 0
    waves: Tensor  # (L + 1, width), of the prefill's timestep and of the levels'
    references: Tensor  # (L, N, T, K/2, 2) as forward.references_factors
    factors: Tensor  # (N, T, K/2, 2)
    sink: Tensor  # (T, K/2, 2)
    versions: Tensor  # (N,)
    text: Tensor  # (B, length, width)
    features: Tensor  # (B, N, states, width, 12)
    references_latents: Tensor  # (2, B, C, 1, h, w)
    motion: Tensor  # (B, C, 19, h, w)


def draw_batch(config: ModelConfig, group: Group, seed: int, *, clips: int, blocks: int, teach: bool) -> Batch:
    """`blocks` of some of a group's clips."""
    generator = random.Random(seed)
    group = group.some(generator.sample(range(len(group.latents)), clips))
    start = generator.randrange(BLOCKS - blocks + 1)
    first, chosen, device = group.first_block + start, slice(start, start + blocks), group.latents.device
    reanchored = generator.random() < 0.75
    visited = _levels_to_teach(generator) if teach else levels(SamplingConfig(steps=generator.choice(STEPS)))[:-2]
    distances = [[generator.randint(*DISTANCE_RANGE) for _ in range(blocks)] for _ in visited]
    geometry, head_dim = _geometry(group), config.head_dim
    wanted = group.latents[:, chosen].transpose(0, 1).float()
    noise = torch.Generator(device).manual_seed(seed)
    steps = [timestep(level) for level in visited]
    versions = [int(reanchored and block >= REANCHOR) for block in range(first, first + blocks)]
    references = torch.stack([references_factors(geometry, head_dim, first, far) for far in distances])
    return Batch(
        wanted,
        group.weight[:, chosen].transpose(0, 1).float(),
        torch.randn(len(visited) if teach else 1, *wanted.shape, generator=noise, device=device),
        torch.tensor([*visited, 0.0]).to(device),
        torch.stack([waves(step, config.freq_dim) for step in (0.0, *steps)]).to(device),
        references.to(device),
        blocks_factors(geometry, head_dim, first, blocks).to(device),
        sink_factors(geometry, head_dim).to(device),
        torch.tensor(versions).to(device),
        group.text,
        group.features[:, chosen].float(),
        torch.stack((group.reference, group.anchor)).float(),
        group.motion.float(),
    )


def _geometry(group: Group) -> Geometry:
    height, width = group.latents.shape[-2:]
    return Geometry(height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT)


def losses(model: CausalDiT, geometry: Geometry, teach: bool, *batch: Tensor) -> dict[str, Tensor]:
    """`batch`: the parts of a Batch."""
    b = Batch(*batch)
    device = b.wanted.device.type
    # no cache: it would outlive a graph's memory
    half = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False)
    with half():
        known = conditions(
            model,
            geometry,
            text_BSD=b.text,
            features_BNSDt=b.features,
            references_VBCFhw=b.references_latents,
            motion_BCFhw=b.motion,
            versions_N=b.versions,
            waves_W=b.waves[0],
            sink_TK2=b.sink,
            factors_NTK2=b.factors,
        )
    latents = b.noise[0]
    total, parts = 0.0, {}
    last = len(b.levels) - 2
    for number in range(last + 1):
        level, following = b.levels[number], b.levels[number + 1]
        if teach:
            latents = level * b.noise[number] + (1 - level) * b.wanted
        with half():
            flow = velocities(model, known, latents, b.waves[number + 1], b.references[number]).float()
        # the straight way from here to the truth, however we came here
        errors = flow - (latents - b.wanted) / level
        squares = errors.square()
        coarse = avg_pool2d(errors.mean(3).flatten(0, 1), CELL).square().mean()
        total = total + ((squares * b.weight).mean() / b.weight.mean() + COARSE * coarse) / (last + 1)
        if number == 0:
            parts["first"] = squares.mean() * level**2
        if number == last:
            lips = (b.weight > EYES + 1).float()
            parts["last"] = squares.mean() * level**2
            parts["coarse"] = coarse * level**2
            parts["lips"] = (squares * lips).sum() / lips.expand_as(squares).sum().clamp(min=1) * level**2
        if not teach:
            latents = latents + (following - level) * flow.detach()
    return {"loss": total, **parts}


def _levels_to_teach(generator: random.Random) -> tuple[float, ...]:
    """Where the sampler begins, a level on its way, and the one from which it leaps to the end; rarely the last."""
    middle = generator.choice((0.90, 0.857692, 0.857692, 0.751121))
    leap = generator.choice((0.751121, 0.602151, 0.602151, 0.602151, 0.502985))
    return (1.0, middle, 0.00892857 if generator.random() < 0.05 else leap)


def load_encoders(models: Path, side: int, device: str) -> Encoders:
    """Raises FileNotFoundError where an earlier stage has left nothing."""
    front, reader = new_front(), new_text_encoder()
    heard, read = read_weights(models, "front"), read_weights(models, "text")
    if heard is None or read is None:
        raise FileNotFoundError(f"{models} lacks the weights of front or text; run those stages first")
    front.load_state_dict(heard)
    reader.load_state_dict({n.removeprefix("encoder."): t for n, t in read.items() if n.startswith("encoder.")})
    reader.to(device).eval()
    tokenizer = read_tokenizer(models)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Encoders(
        vae=read_vae(models / VAE_FILE, dtype=dtype, device=device),
        speech=Wav2Vec2Speech(front.wav2vec2.to(device)),
        read=lambda prompts: encode_prompts(reader, tokenizer, prompts),
        side=side,
        device=device,
    )


def main() -> None:
    parser = stage_parser(__doc__, minutes=9)
    parser.add_argument("--models", type=Path, required=True, help="folder with the finished stages")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of a clip that go through the model at once")
    parser.add_argument("--batch", type=int, default=3, help="clips of a step")
    parser.add_argument("--teach", action="store_true")
    parser.add_argument("--sounds", type=int, default=400)
    parser.add_argument("--group", type=int, default=12, help="clips that are encoded at once")
    parser.add_argument("--groups", type=int, default=80, help="kept in memory")
    parser.add_argument("--begin", type=int, default=12, help="groups made before the first step")
    parser.add_argument("--every", type=int, default=6, help="steps between new groups")
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    number, count = place()
    history = read_log(options.folder, "dit")
    done = history[-1]["step"] if history else 0
    # before anything is on the GPU: the processes that speak are forked
    first = 100_000 + done + number * options.sounds
    sounds = list(make_sounds(range(first, first + options.sounds), SOUND_SECONDS))
    device = join()
    known = load_encoders(options.models, options.side, device)
    heard = known.listen(sounds)
    torch.manual_seed(0)
    model = new_dit()
    if weights := read_weights(options.folder, "dit"):
        model.load_state_dict(weights)
    model.to(device)

    @torch.no_grad()
    def make(seed: int) -> Group:
        return make_group(seed, options.group, known, sounds, heard)

    pool = Pool(
        options.groups,
        make,
        first_seed=done * 10 + number * 1_000_000,
        begin_with=options.begin,
        beside=device != "cpu",
    )
    learned = Gradients(model, partial(losses, model, Geometry(options.side, options.side), options.teach))

    def draw(step: int) -> Batch:
        if step % options.every == 0:
            pool.refresh(1)
        seed = step * count + number
        (group,) = pool.draw(1, random.Random(seed))
        return draw_batch(DEMO, group, seed, clips=options.batch, blocks=options.blocks, teach=options.teach)

    batch = ahead(draw, device)
    with gradients(fused=device != "cpu"):
        minimise(
            "dit",
            model,
            lambda step: learned(*batch(step)),
            options.folder,
            minutes=options.minutes,
            whole=options.whole,
            rate=1e-3,
        )
    log.info("dit: learned from %d clips", pool.made * options.group)


if __name__ == "__main__":
    main()
