"""The Wan 2.1 VAE in normalised latent space: encode, whole decode, and a decoder that streams.

Encoding and whole decoding are diffusers'; a stream walks the same modules in its own way (`decoder`). What a sequence
remembers lies outside the model, so that any number of streams share one set of weights. Does not know blocks of the
DiT, clips, or where pixels go.
"""

import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import safetensors
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from liveavatar_core.encoders.decoder import Past, decode
from liveavatar_core.errors import WeightsError
from liveavatar_core.geometry import FRAMES_PER_LATENT, LATENTS_PER_BLOCK

LEVELS = 4  # resolutions of encoder and decoder; the names in every published file assume four
BLOCKS_PER_LEVEL = 2  # residual blocks of one encoder level, followed by its down-sampling
FIRST, BESIDE = -1, 0  # priorities: somebody waits for frames, and they need little; nobody waits for priming


class WanVAE:
    """Weights of one VAE. Latents are normalised: (mean of the posterior - latent_mean) / latent_std."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model.eval().requires_grad_(False)
        _channels_last(model.decoder)
        shape = (-1, 1, 1, 1)
        self.latent_mean = torch.tensor(model.config.latents_mean, device=self.device).reshape(shape)
        self.latent_std = torch.tensor(model.config.latents_std, device=self.device).reshape(shape)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "WanVAE":
        """Move the weights, in place; streams that are running do not follow and must be reset."""
        self.model.to(device=device or self.device, dtype=dtype or self.dtype)
        self.latent_mean, self.latent_std = self.latent_mean.to(self.device), self.latent_std.to(self.device)
        return self

    def encode(self, frames: Tensor) -> Tensor:
        """(3, T, H, W) in [-1, 1] -> (16, 1 + (T-1)//4, H/8, W/8) float32; frames beyond 1 + 4n are ignored."""
        if frames.dim() != 4 or frames.shape[1] < 1:
            raise ValueError(f"frames are {tuple(frames.shape)}; (3, 1 or more, H, W) is needed")
        caches = _empty_caches(self.model.encoder)
        last = 1 + (frames.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        bounds = [0, *range(1, last + 1, FRAMES_PER_LATENT)]
        parts = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            part = frames[None, :, start:end].to(self.device, self.dtype)
            parts.append(self.model.encoder(part, feat_cache=caches, feat_idx=[0]))
        mean, _ = self.model.quant_conv(torch.cat(parts, 2))[0].float().chunk(2)
        return (mean - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """(16, t, h, w), a sequence from its beginning -> (3, 4t - 3, H, W) float32, in [-1, 1] if `clamp`."""
        caches = _empty_caches(self.model.decoder)
        # The first latent gives one frame and must be alone; groups of a block bound the memory.
        parts = self.denormalise(latents).tensor_split([*range(1, latents.shape[1], LATENTS_PER_BLOCK)], 2)
        frames = torch.cat([self.model.decoder(part, feat_cache=caches, feat_idx=[0])[0].float() for part in parts], 1)
        return frames.clamp_(-1, 1) if clamp else frames

    def denormalise(self, latents: Tensor) -> Tensor:
        """(16, t, h, w) -> (1, 16, t, h, w) as the decoder takes them, on the VAE's device."""
        channels = len(self.latent_mean)
        if latents.dim() != 4 or latents.shape[0] != channels or latents.shape[1] < 1:
            raise ValueError(f"latents are {tuple(latents.shape)}; ({channels}, 1 or more, h, w) is needed")
        latents = latents.to(self.device, torch.float32) * self.latent_std + self.latent_mean
        return self.model.post_quant_conv(latents.to(self.dtype)[None])


class StreamDecoder:
    """One video being decoded piece by piece; equal to decoding it whole, however it is cut.

    On a GPU it works on a stream of its own, beside whatever else the device is doing. Memory is two feature frames per
    convolution: 1.3 GB in bfloat16 at 704x384.
    """

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae
        self._priming: Future | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the past and free its memory; the next latent starts a new sequence."""
        self._primed()
        self._past: Past = {}

    def prime(self, motion: Tensor) -> None:
        """Feed (16, n, h, w) past latents whose pixels nobody needs.

        Does not wait for the device, nor for itself: on a GPU a thread of its own launches it, behind what the caller
        has queued so far and beside whatever comes next. Its errors are raised by the next call.
        """
        self._primed()
        device = self.vae.device
        if device.type == "cuda":
            self._priming = _thread(device).submit(
                self._prime, motion, torch.cuda.current_stream(device).record_event()
            )
        else:
            self._feed(motion)

    def _prime(self, motion: Tensor, queued: torch.cuda.Event) -> None:
        device = self.vae.device
        aside, stream = _stream(device, BESIDE), _stream(device, FIRST)
        with torch.cuda.stream(aside):
            aside.wait_event(queued)
            if motion.is_cuda:
                motion.record_stream(aside)
            self._feed(motion)
        stream.wait_stream(aside)
        for frames in self._past.values():
            frames.record_stream(stream)

    def _feed(self, motion: Tensor) -> None:
        with torch.inference_mode():
            for _ in self._parts(motion):
                pass

    def _primed(self) -> None:
        """Wait until all of it is queued."""
        priming, self._priming = self._priming, None
        if priming is not None:
            priming.result()

    def decode(self, latents: Tensor) -> Tensor:
        """(16, F, h, w), the next latents -> (n, H, W, 3) uint8 in host memory.

        n is 4 F, or 4 F - 3 where the sequence begins. An error while decoding resets the stream.
        """
        self._primed()
        with self._aside(latents) as stream:
            frames = torch.cat([_to_bytes(part) for part in self._parts(latents)])
            frames = frames.to("cpu", non_blocking=True)  # into pinned memory
        if stream is not None:
            stream.synchronize()
        return frames

    @contextmanager
    def _aside(self, given: Tensor) -> Iterator[torch.cuda.Stream | None]:
        """What is queued inside runs on the decoder's stream, after what the caller has queued so far."""
        device = self.vae.device
        stream = _stream(device, FIRST) if device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
            if given.is_cuda:
                given.record_stream(stream)
        # Always in this mode: what was made in it cannot be written to outside.
        with torch.inference_mode(), torch.cuda.stream(stream):
            yield stream

    def _parts(self, latents: Tensor) -> Iterator[Tensor]:
        """(n, H, W, 3) of groups as long as a block, which bound the memory of a long call."""
        hidden = self.vae.denormalise(latents)[0].permute(1, 2, 3, 0).contiguous()
        try:
            while len(hidden):
                count = LATENTS_PER_BLOCK if self._past else 1  # a sequence's first latent is one frame, not four
                yield decode(self.vae.model.decoder, hidden[:count], self._past)
                hidden = hidden[count:]
        except BaseException:
            # Some convolutions have moved on and some have not: no later frame could be right.
            self._past = {}
            raise


@cache
def _stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """The same ones for the life of the process."""
    return torch.cuda.Stream(device, priority=priority)


@cache
def _thread(device: torch.device) -> ThreadPoolExecutor:
    """Likewise: cuDNN keeps what it has planned per thread."""
    return ThreadPoolExecutor(1, "liveavatar-decoder")


def _to_bytes(frames: Tensor) -> Tensor:
    """Values in [-1, 1] -> uint8, rounded to the nearest."""
    return frames.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def _channels_last(model: nn.Module) -> None:
    """The layout that convolutions are fastest in; the values stay."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)


def _empty_caches(coder: nn.Module) -> list:
    """One slot for every 3d convolution, as diffusers counts them; it fills them in order of execution."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


def load_vae(state: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """Build the VAE from official, ComfyUI or diffusers names; all sizes follow from the tensors.

    Raises WeightsError if the tensors are those of another model or are not complete.
    """
    if "decoder.conv1.weight" in state:
        state = convert_wan_vae_to_diffusers(dict(state))
    try:
        config = _read_config(state)
    except KeyError as missing:
        raise WeightsError(
            f"the VAE file has {len(state)} tensors but no {missing}; choose the VAE of Wan 2.1 (Wan2.1_VAE)"
        ) from None
    with torch.device("meta"):
        model = AutoencoderKLWan(**config)
    if config["z_dim"] != len(model.config.latents_mean):
        raise WeightsError(
            f"the VAE has {config['z_dim']} latent channels where {len(model.config.latents_mean)} are needed; "
            "choose the VAE of Wan 2.1, not that of Wan 2.2"
        )
    _check_complete(model, state)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    return WanVAE(model)


def _read_config(state: Mapping[str, Tensor]) -> dict:
    """Arguments of AutoencoderKLWan, read off tensors with diffusers' names; KeyError if one is absent."""
    base = state["encoder.conv_in.weight"].shape[0]
    stride = BLOCKS_PER_LEVEL + 1
    return {
        "base_dim": base,
        "decoder_base_dim": state["decoder.conv_out.weight"].shape[1],
        "z_dim": state["post_quant_conv.weight"].shape[0],
        "dim_mult": [state[f"encoder.down_blocks.{i * stride}.conv2.weight"].shape[0] // base for i in range(LEVELS)],
        "num_res_blocks": BLOCKS_PER_LEVEL,
        "temperal_downsample": [
            f"encoder.down_blocks.{i * stride + BLOCKS_PER_LEVEL}.time_conv.weight" in state for i in range(LEVELS - 1)
        ],
    }


def _check_complete(model: AutoencoderKLWan, state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless names and shapes are exactly the model's."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for problem, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has the unknown", found.keys() - expected.keys()),
        ("has a wrong shape of", {name for name in expected.keys() & found.keys() if expected[name] != found[name]}),
    ):
        if names:
            raise WeightsError(
                f"the VAE file {problem} {min(names)} ({len(names)} such tensors); "
                "download the VAE of Wan 2.1 (Wan2.1_VAE) again"
            )


def read_vae(path: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """`load_vae` from a .safetensors or .pth file. Raises WeightsError if it cannot be read."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise WeightsError(f"the VAE file {path} cannot be read ({error}); download it again") from error
    return load_vae(state, dtype=dtype, device=device)
