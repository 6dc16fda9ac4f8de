"""A talking video that has not been made yet: everything it depends on, and the latents when somebody pulls them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.encoders.audio_features import FeatureStream
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import WanVAE
from liveavatar_core.errors import InputError
from liveavatar_core.geometry import Geometry, blocks_for
from liveavatar_core.pipeline.hold import Hold
from liveavatar_core.pipeline.monitor import Monitor
from liveavatar_core.pipeline.plan import Plan
from liveavatar_core.pipeline.spool import Spool
from liveavatar_core.pipeline.stream import held
from liveavatar_core.runtime.runtime import Progress, Runtime, inspect_model
from liveavatar_core.types import BlockRequest, Conditioning


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """All that decides the picture; nothing here has run yet."""

    model: ModelSpec
    runtime: RuntimeSpec
    sampling: SamplingConfig
    picture: Tensor  # (3, H, W) in [-1, 1], sides multiples of 16
    text: Tensor  # (length, text_dim)
    features: FeatureStream
    vae: WanVAE  # or whatever encodes frames like one
    frames: int
    mid_sequence: bool = False  # which of the original's two conventions makes the reference latent


class LatentStream:
    """Work starts with the first pull. Finished latents are kept on disk and replayed to whoever pulls again."""

    def __init__(self, runtime: Runtime, request: StreamRequest, spool: Spool) -> None:
        """Checks what can be checked without loading; raises WeightsError or InputError."""
        self.request, self.spool, self._runtime = request, spool, runtime
        self.monitor: Monitor = Monitor()  # of the last run
        self.plan: Plan | None = None  # of the last run; None before, and after a replay
        self.geometry = Geometry(*request.picture.shape[1:])
        self.blocks = blocks_for(request.frames)
        self.config = inspect_model(request.model)
        width = request.text.shape[-1]
        if width != self.config.text_dim:
            raise InputError(
                f"the prompt was encoded with {width} channels, the model takes {self.config.text_dim}: "
                "load the text encoder that belongs to it (umT5-XXL, type wan)"
            )

    @cached_property
    def portrait(self) -> tuple[Tensor, Tensor]:
        """Reference and motion latents, encoded when first asked for; in host memory, since streams are kept long."""
        request = self.request
        with torch.inference_mode():
            reference, motion = portrait_latents(request.vae, request.picture, mid_sequence=request.mid_sequence)
            return reference.cpu(), motion.cpu()

    def share_portrait(self, other: "LatentStream") -> None:
        """Take over what another stream has encoded, if its picture is the same: new speech starts a second earlier."""
        mine, theirs = self.request, other.request
        if (
            "portrait" in vars(other)
            and (mine.vae, mine.mid_sequence) == (theirs.vae, theirs.mid_sequence)
            and torch.equal(mine.picture, theirs.picture)
        ):
            self.portrait = other.portrait

    def latents(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        hold: Hold | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(block, latent (16, 3, h, w)) in order. A stream that was cut short starts over; the seed makes it equal.

        `should_stop` ends it with Cancelled, at once; `hold` pauses and ends it between two blocks.
        """
        self.monitor, self.plan = Monitor(), None
        source = self.spool.read() if self.spool.complete else self._make(should_stop, progress)
        return self._held(source, hold or Hold(), should_stop)

    def _held(
        self, source: Iterator[tuple[int, Tensor]], hold: Hold, should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Tensor]]:
        with closing(source):
            yield from held(source, hold, self.monitor, self.blocks, should_stop)

    def _make(self, should_stop: Callable[[], bool], progress: Progress | None) -> Iterator[tuple[int, Tensor]]:
        request = self.request
        self.plan = plan = self._runtime.ensure(
            request.model, self.config, request.runtime, request.sampling.evaluations, progress, geometry=self.geometry
        )
        conditioning = Conditioning(request.text, *self.portrait)
        latents = self._runtime.latents(
            plan, self.geometry, request.sampling, conditioning, self._block, self.blocks, should_stop, self.monitor
        )
        with closing(latents):
            for block, latent in latents:
                self.spool.write(block, latent)
                yield block, latent

    def _block(self, block: int) -> BlockRequest:
        features = self.request.features.block(block)
        states, width = features.shape[:2]
        if (states, width) != (self.config.audio_states, self.config.audio_dim):
            raise InputError(
                f"the audio encoder gives {states} hidden states of width {width}, the model takes "
                f"{self.config.audio_states} of {self.config.audio_dim}: load wav2vec2-large-xlsr-53-english"
            )
        return BlockRequest(block, features.unsqueeze(0))
