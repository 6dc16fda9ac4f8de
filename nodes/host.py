"""What this process has once: the runtime, the streams that can be replayed, and the host's services for them.

Node classes of the V3 API are stateless, so state lives here. Heavy imports happen inside functions: ComfyUI starts
without waiting for them.
"""

import atexit
import hashlib
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import folder_paths
import torch
from server import PromptServer
from torch import Tensor

from liveavatar_core.errors import InputError

from . import settings

if TYPE_CHECKING:
    from liveavatar_core.encoders.tiny_decoder import TinyVAE
    from liveavatar_core.encoders.vae import WanVAE
    from liveavatar_core.pipeline.stream import VideoDecoder
    from liveavatar_core.runtime.runtime import Runtime
    from liveavatar_core.runtime.stream import LatentStream, StreamRequest

    from .footprint import Footprint

MAX_STREAMS = 8  # whose latents stay on disk for decoding again

_lock = threading.Lock()
_runtime: "Runtime | None" = None
_streams: "OrderedDict[str, LatentStream]" = OrderedDict()
_vaes: "OrderedDict[str, WanVAE | TinyVAE]" = OrderedDict()
_footprints: "dict[str, Footprint]" = {}
atexit.register(_footprints.clear)  # they call back when they die; later there would be nobody to answer
_reserving = False


def runtime() -> "Runtime":
    """The one runtime of this process; made when first asked for."""
    from liveavatar_core.runtime.runtime import Runtime

    global _runtime
    with _lock:
        if _runtime is None:
            _runtime = Runtime(reserve)
        return _runtime


def reserve(device: str, nbytes: int) -> None:
    """Have the host move its own models off a device before ours are put there, and show it what we hold."""
    from .footprint import Footprint

    footprint = _footprints.setdefault(device, Footprint(torch.device(device), _release))
    footprint.size = runtime().nbytes.get(device, 0) + nbytes
    _show(footprint)


def _show(footprint: "Footprint") -> None:
    """Put it on the host's list of models; one that is there already is taken off and detached on the way."""
    global _reserving
    _reserving = True
    try:
        comfy.model_management.load_models_gpu([footprint])
    finally:
        _reserving = False


@contextmanager
def settling() -> Iterator[None]:
    """Around a stream: shows the host afterwards what stays on its devices.

    A host that wants memory meanwhile is refused, strikes us off its list of models all the same, and would never ask
    again.
    """
    try:
        yield
    finally:
        for device, footprint in _footprints.items():
            footprint.hold(runtime().nbytes.get(device, 0))
            _show(footprint)


def _release() -> bool:
    """The host wants memory back: give all of it, unless a stream is running or being prepared."""
    if _runtime is not None:
        if _reserving or _runtime.is_streaming:
            return False
        _runtime.unload()
    with _lock:
        _vaes.clear()
    return True


def stream(key: str, request: "StreamRequest") -> "LatentStream":
    """The stream of these inputs: a known one, with its finished latents, or a new one."""
    from liveavatar_core.pipeline.spool import Spool
    from liveavatar_core.runtime.stream import LatentStream

    with _lock:
        known = _streams.get(key)
    if known is None:
        from liveavatar_core.geometry import blocks_for

        spool = Spool(_spool_folder() / f"{key}.latents", blocks_for(request.frames))
        known = LatentStream(runtime(), request, spool)
        with _lock:
            for other in _streams.values():
                known.share_portrait(other)
    with _lock:
        _streams[key] = known
        _streams.move_to_end(key)
        held = sum(stream.spool.nbytes for stream in _streams.values())
        while len(_streams) > 1 and (len(_streams) > MAX_STREAMS or held > settings.cache_bytes()):
            _, oldest = _streams.popitem(last=False)
            held -= oldest.spool.nbytes
            oldest.spool.discard()
    return known


def _spool_folder() -> Path:
    return Path(folder_paths.get_temp_directory()) / "liveavatar"


@atexit.register
def _drop_spools() -> None:
    if _streams:
        shutil.rmtree(_spool_folder(), ignore_errors=True)


def wan_vae(host_vae, device: str) -> "WanVAE":
    """The engine's VAE with the weights of the host's VAE; the same object for the same weights."""
    from liveavatar_core.encoders.tiny_decoder import is_tiny
    from liveavatar_core.encoders.vae import load_vae

    state = host_vae.get_sd()
    if is_tiny(state):
        raise InputError(
            "the VAE is a tiny one, which can only decode here: connect the VAE of Wan 2.1 (Wan2.1_VAE) to this node, "
            "and the tiny one to Live Avatar Online VAE Decode"
        )
    return _loaded(load_vae, state, device, torch.bfloat16)


def stream_decoder(host_vae, device: str) -> "VideoDecoder":
    """A decoder for one video with the weights of the host's VAE, be it the full one, a pruned or a tiny one."""
    from liveavatar_core.encoders.tiny_decoder import TinyStreamDecoder, is_tiny, load_tiny
    from liveavatar_core.encoders.vae import StreamDecoder

    state = host_vae.get_sd()
    if not is_tiny(state):
        return StreamDecoder(wan_vae(host_vae, device))
    # The names of taew2_1 and lighttaew2_1 are the same. The host told them apart when it had the file, and has a
    # format to convert latents to for the one that wants them otherwise than the full VAE.
    normalised = host_vae.first_stage_model.latent_format is not None
    # Frames in [0, 1] need more than the 8 bits of bfloat16, and taew2_1 is stored as float16.
    return TinyStreamDecoder(_loaded(partial(load_tiny, normalised=normalised), state, device, torch.float16))


def _loaded(load: Callable, state: Mapping[str, Tensor], device: str, dtype: torch.dtype):
    """What `load` makes of these weights, the same object for the same weights and device; float32 on a CPU."""
    from liveavatar_core.runtime.runtime import as_device

    if as_device(device).type == "cpu":
        dtype = torch.float32
    key = f"{load} {fingerprint(state.values())} {device} {dtype}"
    with _lock:
        if key not in _vaes:
            _vaes[key] = load(state, dtype=dtype, device=device)
            while len(_vaes) > 2:
                _vaes.popitem(last=False)
        _vaes.move_to_end(key)
        return _vaes[key]


@dataclass(frozen=True)
class HostVAE:
    """The host's VAE as a stream wants it: encodes frames, and holds nothing on a device between runs."""

    host_vae: object
    device: str

    def __post_init__(self) -> None:
        """Raises InputError or WeightsError for a VAE that cannot serve."""
        wan_vae(self.host_vae, self.device)

    def encode(self, frames: Tensor) -> Tensor:
        """As WanVAE.encode."""
        return wan_vae(self.host_vae, self.device).encode(frames)


class HostSpeechEncoder:
    """The host's AUDIO_ENCODER as the engine wants it: normalised samples in, all hidden states out."""

    def __init__(self, encoder) -> None:
        """Raises InputError for another kind of encoder."""
        if not hasattr(encoder.model, "do_normalize"):
            raise InputError(
                f"the audio encoder is a {type(encoder.model).__name__}, whose features the model does not know: load "
                "wav2vec2_large_english_fp16 with Load Audio Encoder"
            )
        self._encoder = encoder

    def __call__(self, samples: Tensor) -> Tensor:
        """(N,) float32 at 16 kHz -> (states, T50, D) float32."""
        model = self._encoder.model
        # The engine has normalised over the whole recording; doing it again per window would change loudness.
        normalises, model.do_normalize = model.do_normalize, False
        try:
            encoded = self._encoder.encode_audio(samples.view(1, 1, -1), 16_000)
        finally:
            model.do_normalize = normalises
        return torch.stack([state[0].float().cpu() for state in encoded["encoded_audio_all_layers"]])


def unload() -> None:
    """Free everything this pack holds on devices. Raises PlanError while a stream is running."""
    runtime().unload()
    _footprints.clear()  # the host forgets them with the last reference
    with _lock:
        _vaes.clear()
    comfy.model_management.soft_empty_cache()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Tells sets of weights apart by shapes and a sample of values of each tensor; cheap even for gigabytes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 64)
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def content_key(*parts: object) -> str:
    """A key of everything given: tensors by all their bytes, other things by repr."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr((tuple(part.shape), part.dtype)).encode())
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def should_stop() -> bool:
    return comfy.model_management.processing_interrupted()


def say(node_id: str | None, text: str) -> None:
    """Show a line of text in a node."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def bytes_progress(show: Callable[[int], None]) -> Callable[[int, int], None]:
    """For (bytes done, bytes in all): calls `show(percent)` when it changes, and lets an interrupt end the work."""
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        comfy.model_management.throw_exception_if_processing_interrupted()
        percent = done * 100 // max(total, 1)
        if percent != last:
            last = percent
            show(percent)

    return report
