"""What the DiT learns from: clips of the world as the encoders of inference give them.

A clip is eight blocks of a stream that began with a picture. The picture may be lit and placed otherwise than the
prompt wants it; the video is as the prompt wants it. Clips come in groups that begin at the same block of their
streams, because the rotary positions of a batch are common.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from liveavatar_core.encoders.audio_features import FeatureStream, SpeechEncoder
from liveavatar_core.encoders.vae import WanVAE
from liveavatar_core.geometry import (
    DEFAULT_FPS,
    FRAMES_PER_BLOCK,
    FRAMES_PER_LATENT,
    LATENTS_PER_BLOCK,
    MOTION_LATENTS,
    PIXELS_PER_LATENT,
)
from training.prompts import Wish, among_strangers, draw_wish, write
from training.speech.sounds import Sound
from training.vae import encode
from training.world.light import turned
from training.world.looks import BACKGROUNDS, KINDS, LIGHTS, Look, draw_look
from training.world.motion import perform
from training.world.painter import paint
from training.world.pose import Pose, eyes_box, mouth_box
from training.world.shapes import grid

BLOCKS = 8
STILLS = 29  # copies of the picture before the video: what the encoder remembers has settled then, as at inference
LATEST = 4096  # block at which a clip may begin: half an hour
MOUTH, EYES = 5.0, 2.0  # what a wrong latent costs more there


@dataclass(frozen=True, slots=True)
class Scene:
    """What is said, shown and asked for."""

    picture: Look
    video: Look
    action: str
    prompt: str
    ajar: dict[str, float]  # the mouth in the picture
    hue: float = 0.0  # by which all colours are turned, radians


@dataclass(frozen=True, slots=True)
class Group:
    """B clips, N blocks of F latents."""

    first_block: int
    latents: Tensor  # (B, N, C, F, h, w)
    reference: Tensor  # (B, C, 1, h, w)
    anchor: Tensor  # (B, C, 1, h, w): first latent of the video's beginning
    motion: Tensor  # (B, C, 19, h, w)
    features: Tensor  # (B, N, states, width, 12)
    text: Tensor  # (B, length, width)
    weight: Tensor  # (B, N, 1, F, h, w)

    def some(self, rows: Sequence[int]) -> "Group":
        """These of its clips."""
        tensors = (getattr(self, field.name) for field in fields(self)[1:])
        return Group(self.first_block, *(tensor[list(rows)] for tensor in tensors))


@dataclass(frozen=True, slots=True)
class Encoders:
    """Finished models of the other stages, on one device."""

    vae: WanVAE
    speech: SpeechEncoder
    read: Callable[[list[str]], Tensor]  # prompts -> (B, length, width)
    side: int  # of the pictures, px
    device: torch.device | str

    def listen(self, sounds: Sequence[Sound]) -> list[FeatureStream]:
        heard = [FeatureStream(spoken.samples, self.speech, fps=DEFAULT_FPS) for spoken in sounds]
        for stream in heard:
            stream.block(0)  # encodes it; of what is encoded several threads may take blocks
        return heard


def draw_scene(seed: int, *, held_out: bool = False) -> Scene:
    generator = random.Random(f"scene {seed} {held_out}")
    kind = generator.choice(KINDS)
    look = draw_look(seed, kind, held_out=held_out)
    wish = draw_wish(generator, kind)
    if wish.background is not None:
        # mostly a prompt says what is there
        same = generator.random() < 0.5
        wish = replace(wish, background=look.background if same else generator.choice(BACKGROUNDS))
    plain = wish.light is not None or wish.grade is not None
    light = "neutral" if plain or generator.random() < 0.5 else generator.choice(LIGHTS)
    picture = replace(look, light=light)
    ajar = {}
    if generator.random() < 0.25:
        ajar = {"open": generator.random() * 0.7, "wide": generator.random(), "smile": generator.random()}
    prompt = among_strangers(write(wish, generator), generator) if generator.random() < 0.95 else ""
    wish = wish if prompt else Wish(kind=kind)
    video = replace(
        look,
        background=wish.background or look.background,
        light=wish.light or light,
        grade=wish.grade or look.grade,
    )
    # Colours that nothing has in this world: they can only be taken from the picture. A light has its own.
    strange = picture == video and light == "neutral" and video.grade == "none" and generator.random() < 0.8
    hue = generator.uniform(-math.pi, math.pi) if strange else 0.0
    return Scene(picture, video, wish.action or "talk", prompt, ajar, hue)


def make_group(seed: int, size: int, known: Encoders, sounds: Sequence[Sound], heard: Sequence[FeatureStream]) -> Group:
    """`heard`: the sounds, as `listen` gives them."""
    generator = random.Random(f"group {seed}")
    first = 0 if generator.random() < 0.5 else generator.randrange(1, LATEST)
    scenes = [draw_scene(seed * size + i) for i in range(size)]
    pixels, features, heavy = [], [], []
    for scene in scenes:
        number = generator.randrange(len(sounds))
        spoken, stream = sounds[number], heard[number]
        begin = generator.randrange(max(1, stream.frames // FRAMES_PER_BLOCK - BLOCKS + 1))
        poses = perform(
            spoken.mouth, scene.action, begin * FRAMES_PER_BLOCK, BLOCKS * FRAMES_PER_BLOCK, first * FRAMES_PER_BLOCK
        )
        start = None
        if first:  # the beginning of this stream, of which the model keeps one latent
            frame = generator.randrange(max(1, stream.frames - FRAMES_PER_LATENT))
            start = perform(spoken.mouth, scene.action, frame, FRAMES_PER_LATENT, 0)
        pixels.append(_draw(scene, start, poses, known))
        features.append(torch.stack([stream.block(begin + i) for i in range(BLOCKS)]))
        heavy.append(weights(scene.video, poses, known.side))
    latents = _encode(known.vae, torch.stack(pixels))
    stills = 1 + (STILLS - 1) // FRAMES_PER_LATENT
    video = latents[:, :, -BLOCKS * LATENTS_PER_BLOCK :]
    return Group(
        first,
        latents=video.unflatten(2, (BLOCKS, LATENTS_PER_BLOCK)).transpose(1, 2),
        reference=latents[:, :, :1],
        anchor=latents[:, :, stills : stills + 1],
        # a picture that holds still gives the same latent again and again
        motion=latents[:, :, [min(i, stills - 1) for i in range(MOTION_LATENTS)]],
        features=torch.stack(features).to(known.device, torch.bfloat16),
        text=known.read([scene.prompt for scene in scenes]),
        weight=torch.stack(heavy).to(known.device, torch.bfloat16),
    )


def _draw(scene: Scene, start: Pose | None, poses: Pose, known: Encoders) -> Tensor:
    """(3, frames, side, side) uint8: the picture, the beginning of its stream if this is not it, the clip."""

    def draw(look: Look, rows: Tensor) -> Tensor:
        frames = paint(look, Pose.of(rows), known.side, known.side, known.device)
        return (turned(frames, scene.hue) * 255).round().to(torch.uint8)

    still = Pose.still(**scene.ajar).rows()
    shown = poses.rows() if start is None else torch.cat((start.rows(), poses.rows()))
    if scene.picture == scene.video:  # painting takes as many kernels however many frames there are
        first, video = draw(scene.video, torch.cat((still, shown))).split((1, len(shown)))
    else:
        first, video = draw(scene.picture, still), draw(scene.video, shown)
    return torch.cat((first.expand(STILLS, -1, -1, -1), video)).transpose(0, 1)


def _encode(vae: WanVAE, pixels_B3THW: Tensor) -> Tensor:
    """(B, C, T', h, w) bfloat16, as WanVAE.encode gives them one by one."""
    mean, _ = encode(vae.model, (pixels_B3THW.float() / 127.5 - 1).to(vae.dtype))
    return ((mean - vae.latent_mean) / vae.latent_std).bfloat16()


def weights(look: Look, pose: Pose, side: int) -> Tensor:
    """(N, 1, F, h, w): 1, and more where lips or lids move in any frame of a latent."""
    cells = side // PIXELS_PER_LATENT
    x, y = (axis[0, 0] for axis in grid(cells, cells, "cpu"))

    def inside(boxes: Tensor) -> Tensor:
        cx, cy, a, b = boxes[:, :, None, None].unbind(1)
        edge = 1.0 / cells
        return (((x - cx).abs() < a + edge) & ((y - cy).abs() < b + edge)).float()

    heavy = torch.maximum(MOUTH * inside(mouth_box(look, pose)), EYES * inside(eyes_box(look, pose)))
    return 1 + heavy.view(BLOCKS, 1, LATENTS_PER_BLOCK, FRAMES_PER_LATENT, cells, cells).amax(3)
