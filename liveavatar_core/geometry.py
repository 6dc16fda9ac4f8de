"""Pixels, latents, tokens, frames and samples: every fixed ratio of the model and the sizes that follow from it.

No torch here: planners and nodes ask this file before anything is allocated.
"""

import math
from dataclasses import dataclass

from liveavatar_core.errors import InputError

SAMPLE_RATE = 16_000  # what wav2vec2 hears
DEFAULT_FPS = 25

PIXELS_PER_LATENT = 8  # VAE stride in height and width
FRAMES_PER_LATENT = 4  # VAE stride in time, after the first latent of a sequence
PATCH = 2  # latent pixels per token side
PIXELS_PER_TOKEN = PIXELS_PER_LATENT * PATCH

LATENTS_PER_BLOCK = 3
FRAMES_PER_BLOCK = LATENTS_PER_BLOCK * FRAMES_PER_LATENT
BLOCKS_PER_CLIP = 4
FRAMES_PER_CLIP = BLOCKS_PER_CLIP * FRAMES_PER_BLOCK
WINDOW_BLOCKS = 4  # blocks a query sees, its own included

MOTION_LATENTS = 19
MOTION_FRAMES = 73
PRIME_LATENTS = 7  # motion latents that prime the stream decoder
FRAMES_DROPPED = 3  # of the first block: the model draws three frames before audio frame 0 is on screen

MIN_SIDE, MAX_ASPECT = 64, 5.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one stream. `height` and `width` in pixels, multiples of 16."""

    height: int
    width: int

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if side < PIXELS_PER_TOKEN or side % PIXELS_PER_TOKEN:
                raise InputError(f"{name} is {side} px; it must be a multiple of {PIXELS_PER_TOKEN}")

    @property
    def latent_height(self) -> int:
        return self.height // PIXELS_PER_LATENT

    @property
    def latent_width(self) -> int:
        return self.width // PIXELS_PER_LATENT

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one latent frame."""
        return self.latent_height // PATCH, self.latent_width // PATCH

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens_per_block(self) -> int:
        return LATENTS_PER_BLOCK * self.tokens_per_frame

    @property
    def motion_grids(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Token grids of the frame packer's three buckets: newest latent, two before it, sixteen before those."""
        return self.grid, *((self.latent_height // k, self.latent_width // k) for k in (4, 8))

    @property
    def motion_tokens(self) -> int:
        near, middle, far = (rows * columns for rows, columns in self.motion_grids)
        return near + 2 // 2 * middle + 16 // 4 * far

    @property
    def sink_tokens(self) -> int:
        """Tokens of the attention sink: one reference frame and the packed motion."""
        return self.tokens_per_frame + self.motion_tokens


def frames_for(seconds: float, fps: int) -> int:
    """Frames whose picture covers `seconds` of sound; the last one may outlast it by less than a frame."""
    return max(1, math.ceil(seconds * fps - 1e-6))


def blocks_for(frames: int) -> int:
    """Blocks that give `frames` frames after the first block has lost its first three."""
    return math.ceil((frames + FRAMES_DROPPED) / FRAMES_PER_BLOCK)


def sample_at(frame: int, fps: int, sample_rate: int) -> int:
    """First sound sample of a frame. A function of the frame index alone, so sound and picture cannot drift."""
    return round(frame * sample_rate / fps)


def check_picture(height: int, width: int) -> None:
    """Raise InputError for pictures no portrait can be made from."""
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"the picture is {width}x{height} px; its shorter side must have at least {MIN_SIDE} px: use a larger one"
        )
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise InputError(
            f"the picture is {width}x{height} px; its longer side may be at most {MAX_ASPECT:g} times the shorter: "
            "crop it around the face"
        )


def fit_size(height: int, width: int, area: int, multiple: int = PIXELS_PER_TOKEN) -> tuple[int, int]:
    """(height, width), multiples of `multiple`, of about this shape and at most `area` px; small pictures grow.

    Of all candidates the one that loses least: a tenth of shape (cropped away) weighs as much as a fifth of area.
    """
    check_picture(height, width)
    candidates = []
    for rows in range(MIN_SIDE, area // MIN_SIDE + 1, multiple):
        exact = rows * width / height / multiple
        for columns in (math.floor(exact) * multiple, math.ceil(exact) * multiple):
            if columns >= MIN_SIDE and rows * columns <= area:
                distortion = abs(math.log(columns * height / (rows * width)))
                candidates.append((distortion + 0.5 * math.log(area / (rows * columns)), rows, columns))
    return min(candidates)[1:]


def reference_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) as the original code chooses it from an area budget (SPEC 1.2): multiples of 64."""

    def up(value: int) -> int:
        return -(-value // 64) * 64

    if height * width <= area:
        low, high = 0.1, 1.0
    else:
        a, b, c = height * width, 63 * (height + width), 63 * 63 - area
        low, high = (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a), math.sqrt(area / (height * width))
    for i in range(100):
        scale = high - (high - low) * i / 100
        rows, columns = up(int(height * scale)), up(int(width * scale))
        if rows * columns <= area:
            return rows, columns
    ratio = width / height
    rows, columns = int(math.sqrt(area / ratio)) // 64 * 64, int(math.sqrt(area * ratio)) // 64 * 64
    if columns >= width or rows >= height:
        rows, columns = height // 64 * 64, width // 64 * 64
    return rows, columns
