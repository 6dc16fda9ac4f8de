"""A finished demo model at work: its files through the engine's loaders and streams, as in ComfyUI but without it."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from liveavatar_core.config import RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.encoders.audio_features import FeatureStream, SpeechEncoder, load_speech_encoder
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE, read_vae
from liveavatar_core.geometry import DEFAULT_FPS, FRAMES_DROPPED, FRAMES_PER_LATENT, blocks_for
from liveavatar_core.pipeline.spool import Spool
from liveavatar_core.pipeline.stream import frame_chunks
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.runtime.stream import LatentStream, StreamRequest
from liveavatar_core.weights.build import work_dtype
from training.dit.clips import STILLS
from training.text import encode_prompts

TOKENIZER = "spiece_model"
PRIMING = 4  # blocks after which a decoder hardly sees where it began


class BriefStills:
    """The VAE, to which a picture that holds still is the same once its latents have settled: twice as fast."""

    def __init__(self, vae: WanVAE) -> None:
        self._vae = vae

    def encode(self, frames: Tensor) -> Tensor:
        latents = self._vae.encode(frames[:, :STILLS])
        more = 1 + (frames.shape[1] - 1) // FRAMES_PER_LATENT - latents.shape[1]
        return torch.cat((latents, latents[:, -1:].expand(-1, more, -1, -1)), 1)


@dataclass(frozen=True, slots=True)
class Speaker:
    files: DemoFiles
    vae: WanVAE
    speech: SpeechEncoder
    read: Callable[[list[str]], Tensor]  # prompts -> (B, length, width)
    device: str

    @classmethod
    def load(cls, files: DemoFiles, device: str) -> "Speaker":
        dtype = work_dtype("auto", device)
        return cls(
            files,
            read_vae(files.vae, dtype=dtype, device=device),
            load_speech_encoder(files.speech_encoder, dtype=torch.float32, device=device),
            read_text_encoder(files),
            device,
        )

    def stream(
        self,
        folder: Path,
        picture: Tensor,
        samples: Tensor,
        prompt: str,
        frames: int,
        *,
        sampling: SamplingConfig | None = None,
        runtime: RuntimeSpec | None = None,
    ) -> LatentStream:
        """`picture` (3, H, W) in 0..1, `samples` (N,) at 16 kHz; finished latents go to `folder`."""
        request = StreamRequest(
            model=self.files.model,
            runtime=runtime or RuntimeSpec((self.device,)),
            sampling=sampling or SamplingConfig(),
            picture=(picture * 255).round() / 127.5 - 1,
            text=self.read([prompt])[0],
            features=FeatureStream(samples, self.speech, fps=DEFAULT_FPS, lead_frames=FRAMES_DROPPED),
            vae=BriefStills(self.vae),
            frames=frames,
        )
        return LatentStream(Runtime(), request, Spool(folder / "latents", blocks_for(frames)))

    def film(self, picture: Tensor, samples: Tensor, prompt: str, frames: int, **settings: object) -> Tensor:
        """(frames, H, W, 3) in 8 bits; the rest as `stream` takes it."""
        with tempfile.TemporaryDirectory() as folder:
            return self.shown(self.stream(Path(folder), picture, samples, prompt, frames, **settings))

    def shown(self, stream: LatentStream) -> Tensor:
        with torch.inference_mode():
            chunks = frame_chunks(stream.latents(), StreamDecoder(self.vae), stream.portrait[1], stream.request.frames)
            return torch.cat([chunk.frames for chunk in chunks])

    def excerpts(self, stream: LatentStream, wanted: Sequence[range]) -> Iterator[Tensor]:
        """(frames, H, W, 3) of ranges of blocks from block 4 on; what lies between is not decoded."""
        latents: deque[Tensor] = deque(maxlen=PRIMING + max(map(len, wanted)))
        with torch.inference_mode():
            for block, latent in stream.latents():
                latents.append(latent)
                for blocks in wanted:
                    if block == blocks[-1]:
                        seen = list(latents)[-PRIMING - len(blocks) :]
                        decoder = StreamDecoder(self.vae)
                        decoder.prime(torch.cat(seen[:PRIMING], 1))
                        yield torch.cat([decoder.decode(latent) for latent in seen[PRIMING:]])


def read_text_encoder(files: DemoFiles) -> Callable[[list[str]], Tensor]:
    """What ComfyUI's Load CLIP makes of the file: prompts -> (B, length, width), zeros after the end of each."""
    state = load_file(files.text_encoder)
    tokenizer = SentencePieceProcessor(model_proto=state.pop(TOKENIZER).numpy().tobytes())
    encoder = UMT5EncoderModel(UMT5Config(**files.text_config, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    encoder.eval()
    return lambda prompts: encode_prompts(encoder, tokenizer, prompts)
