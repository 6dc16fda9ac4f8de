"""What a demo model has to show, line by line: each gives rows of a table, and what it has filmed."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy
import torch
from torch import Tensor

from liveavatar_core.config import RuntimeSpec, SamplingConfig
from liveavatar_core.evaluate.footage import Window
from liveavatar_core.evaluate.measure import SECONDS, Moment, measure
from liveavatar_core.evaluate.places import Places, Reference
from liveavatar_core.evaluate.report import Film
from liveavatar_core.evaluate.speech import agreement
from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_DROPPED, FRAMES_PER_BLOCK, SAMPLE_RATE, blocks_for, sample_at
from training.judge.role import Role, Take, plain_role
from training.sizes import SIDE
from training.speaker import Speaker
from training.speech.mouths import RATE
from training.speech.sounds import Sound, sound
from training.world.cases import boxes
from training.world.looks import KINDS

LIPS, LAG, FOREIGN, CLOSED = 0.8, 1, 0.2, 0.1
LASTING, COLOURS = 0.95, 4.0  # share of the likeness that is left; 8-bit steps
FIRST_LOOK = 5  # s
LOOKS = (60, 180, 600)  # s, beside the end
ASKED, BESIDE = 0.7, 1.5  # share of a change that must come; how much larger the error may be with it
SAME_LIPS, SAME_FACE = 0.05, 0.02
WISHES = {  # words, and what the right video then has
    "background": ("in a forest", {"background": "forest"}),
    "light": ("candlelight", {"light": "candle"}),
    "manner": ("black and white film", {"grade": "film"}),
    "action": ("nodding slowly", {"action": "nod"}),
}


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is filmed."""

    faces: int  # of each class
    voices: int  # for each face
    blocks: int
    minutes: float
    kinds: tuple[str, ...]  # of lines 2 to 4

    @property
    def frames(self) -> int:
        return self.blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED


WHOLE, QUICK = Extent(4, 2, 12, 10.0, KINDS), Extent(1, 1, 4, 0.25, KINDS[:1])


@dataclass(frozen=True, slots=True)
class Row:
    line: str
    what: str
    value: float
    wanted: str  # in words
    right: bool


def below(line: str, what: str, value: float, limit: float) -> Row:
    return Row(line, what, value, f"at most {limit:g}", value <= limit)


def above(line: str, what: str, value: float, limit: float) -> Row:
    return Row(line, what, value, f"at least {limit:g}", value >= limit)


def film(speaker: Speaker, role: Role, frames: int, **settings: object) -> Take:
    samples = role.samples()[: round(frames / DEFAULT_FPS * SAMPLE_RATE)]
    made = speaker.film(role.still(), samples, role.prompt, frames, **settings)
    return Take(role, made.to(speaker.device))


def voices() -> Iterator[Sound]:
    """Unheard ones, who say something from the beginning on."""
    for seed in itertools.count():
        spoken = sound(seed, 0.5 + WHOLE.frames / DEFAULT_FPS, held_out=True)
        if spoken.mouth[0, :RATE].std() > 0.15:
            yield spoken


def kept(speaker: Speaker, extent: Extent) -> list[Row]:
    """Line 0: what the VAE alone leaves of the right film. The DiT cannot do better."""
    line, rows = "0 VAE", []
    for kind, spoken in zip(KINDS, voices(), strict=False):
        role = plain_role(kind, 0, spoken)
        pixels = role.truth(0, extent.frames).permute(3, 0, 1, 2) / 127.5 - 1
        with torch.inference_mode():
            again = speaker.vae.decode(speaker.vae.encode(pixels)).permute(1, 2, 3, 0)
        take = Take(role, ((again + 1) * 127.5).round().to(torch.uint8))
        rows.append(above(line, f"{kind}: correlation", take.lips().correlation, LIPS))
        rows.append(above(line, f"{kind}: identity", take.identity(), LASTING))
    return rows


def talking(speaker: Speaker, extent: Extent) -> tuple[list[Row], list[Take]]:
    """Line 1: lips follow what is said, and nothing else."""
    line, heard, rows, takes = "1 lips", voices(), [], []
    for kind in KINDS:
        roles = [plain_role(kind, seed, next(heard)) for seed in range(extent.faces) for _ in range(extent.voices)]
        made = [film(speaker, role, extent.frames) for role in roles]
        synced = [take.lips() for take in made]
        rows.append(above(line, f"{kind}: correlation", fmean(sync.correlation for sync in synced), LIPS))
        rows.append(below(line, f"{kind}: frames away, at worst", max(abs(sync.lag) for sync in synced), LAG))
        takes += made
    openings = [take.opening() for take in takes]
    pairs = [(a, b) for a in range(len(takes)) for b in range(len(takes)) if a != b]
    foreign = fmean(agreement(openings[a], takes[b].said()).correlation for a, b in pairs)
    rows.append(below(line, "correlation with another voice", foreign, FOREIGN))
    for kind in KINDS:
        silence = Sound(numpy.zeros(WHOLE.frames * SAMPLE_RATE // DEFAULT_FPS, numpy.float32), numpy.zeros((3, 1)))
        opened = film(speaker, plain_role(kind, 0, silence), extent.frames).opening().mean().item()
        rows.append(below(line, f"{kind}: opening in silence", opened, CLOSED))
    return rows, takes


def lasting(speaker: Speaker, extent: Extent) -> tuple[list[Row], list[Film]]:
    """Line 2: minutes later it is the same face in the same colours, and still talks."""
    line, rows, films = "2 time", [], []
    end = extent.minutes * 60
    starts = [FIRST_LOOK, *(time for time in LOOKS if time < end - 2 * SECONDS), end - SECONDS]
    for number, kind in enumerate(extent.kinds):
        role = plain_role(kind, 0, sound(1000 + number, end, held_out=True))
        takes = looks(speaker, role, round(end * DEFAULT_FPS), starts)
        moments = [look(take, start) for take, start in zip(takes, starts, strict=True)]
        early, late = moments[0].figures, moments[-1].figures
        later = f"{kind}: {end:g} s against {FIRST_LOOK} s"
        rows.append(above(line, f"{later}, likeness", late["likeness"] / early["likeness"], LASTING))
        rows.append(below(line, f"{later}, colours", abs(late["colour shift"] - early["colour shift"]), COLOURS))
        rows.append(above(line, f"{kind}: correlation at {end:g} s", takes[-1].lips().correlation, LIPS))
        films.append(Film(f"{kind} for {end:g} s", reference(role), moments, kind))
    return rows, films


def looks(speaker: Speaker, role: Role, frames: int, starts: Sequence[float]) -> list[Take]:
    """Windows of a long film."""
    wanted = [blocks_at(start, frames) for start in starts]
    with TemporaryDirectory() as folder:
        stream = speaker.stream(Path(folder), role.still(), role.samples(), role.prompt, frames)
        seen = list(speaker.excerpts(stream, wanted))
    firsts = [blocks[0] * FRAMES_PER_BLOCK - FRAMES_DROPPED for blocks in wanted]
    return [Take(role, made.to(speaker.device), first) for made, first in zip(seen, firsts, strict=True)]


def blocks_at(start: float, frames: int) -> range:
    """The blocks of a window that begins at `start`, or as late as a film of so many frames allows."""
    count = -(-round(SECONDS * DEFAULT_FPS) // FRAMES_PER_BLOCK)
    begin = min(int(start * DEFAULT_FPS + FRAMES_DROPPED) // FRAMES_PER_BLOCK, blocks_for(frames) - count)
    return range(begin, begin + count)


def reference(role: Role) -> Reference:
    said = boxes(role.picture, SIDE)
    picture = (role.still() * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Reference(picture, Places(tuple(said["mouth"]), {name: tuple(box) for name, box in said["parts"].items()}))


def look(take: Take, start: float = 0.0) -> Moment:
    frames = take.frames.cpu()
    first, last = (sample_at(frame, DEFAULT_FPS, SAMPLE_RATE) for frame in (take.first, take.first + len(frames)))
    heard = take.role.samples()[first:last]
    return measure(Window(start, DEFAULT_FPS, frames, heard, SAMPLE_RATE), reference(take.role))


def prompted(speaker: Speaker, extent: Extent) -> list[Row]:
    """Line 3: what a prompt asks for comes, and the film is as right as without."""
    line, heard, rows = "3 prompt", voices(), []
    for kind in extent.kinds:
        plain = plain_role(kind, 1, next(heard))
        without = film(speaker, plain, extent.frames)
        for name, (words, wish) in WISHES.items():
            asked = with_wish(plain, words, wish)
            take = film(speaker, asked, extent.frames)
            share = came((take.small() - without.small()), (take.right() - without.right()))
            rows.append(above(line, f"{kind}: {name}, share that came", share, ASKED))
            rows.append(below(line, f"{kind}: {name}, error over that without", take.error() / without.error(), BESIDE))
            moved = abs(take.lips().correlation - without.lips().correlation)
            rows.append(below(line, f"{kind}: {name}, change of the lips' correlation", moved, SAME_LIPS))
    return rows


def with_wish(role: Role, words: str, wish: dict[str, str]) -> Role:
    shown = {name: value for name, value in wish.items() if name != "action"}
    prompt = f"{role.prompt}, {words}"
    return replace(role, prompt=prompt, video=replace(role.video, **shown), action=wish.get("action", role.action))


def came(made: Tensor, right: Tensor) -> float:
    """How much of the right change there is in the change that was made."""
    return ((made * right).sum() / right.square().sum()).item()


def variants(speaker: Speaker, extent: Extent) -> list[Row]:
    """Line 4: steps, precision and plan make no difference."""
    line, device, rows = "4 same", speaker.device, []
    settings = {
        "3 steps": {"sampling": SamplingConfig(steps=3)},
        "5 steps": {"sampling": SamplingConfig(steps=5)},
        "fp32": {"runtime": RuntimeSpec((device,), precision="fp32")},
        "bf16": {"runtime": RuntimeSpec((device,), precision="bf16")},
        "tpp": {"runtime": RuntimeSpec((device,) * 4, plan="tpp")},
        "ring": {"runtime": RuntimeSpec((device,) * 2, plan="ring")},
    }
    for kind, spoken in zip(extent.kinds, voices(), strict=False):
        role = plain_role(kind, 2, spoken)
        usual = film(speaker, role, extent.frames)
        lips, face = usual.lips().correlation, usual.identity()
        for name, changed in settings.items():
            take = film(speaker, role, extent.frames, **changed)
            rows.append(below(line, f"{kind}: {name}, lips", abs(take.lips().correlation - lips), SAME_LIPS))
            rows.append(below(line, f"{kind}: {name}, identity", abs(take.identity() - face), SAME_FACE))
    return rows
