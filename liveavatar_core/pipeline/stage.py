"""A stage: one rectangle of the grid with its weights and caches. The only place where the model meets a block.

It knows neither threads nor links nor its neighbours; `run` takes a payload and returns the next one.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from liveavatar_core.config import SamplingConfig
from liveavatar_core.geometry import LATENTS_PER_BLOCK, WINDOW_BLOCKS, Geometry
from liveavatar_core.model.audio import Heard
from liveavatar_core.model.cache import BlockCache, SinkLayer
from liveavatar_core.model.dit import CausalDiT, TimeTable
from liveavatar_core.model.host_memory import HostMemory
from liveavatar_core.model.layers import KeyValue, See, Values
from liveavatar_core.model.pointwise import rms_norm, rotate
from liveavatar_core.model.rope import (
    REFERENCE_POSITION,
    block_factors,
    motion_factors,
    reference_factors,
    reference_position,
)
from liveavatar_core.pipeline.graphs import LayerGraphs, can_capture
from liveavatar_core.pipeline.hosted import HostedRings, HostedSinks
from liveavatar_core.pipeline.links import upload
from liveavatar_core.pipeline.plan import PREFILL, StageSpec
from liveavatar_core.sampling import block_noise, clip_noise, euler, reference_distance, timestep
from liveavatar_core.types import Payload


class Stage:
    """State of one stream on one device. Build a new one for a new stream; the model is shared and read-only."""

    def __init__(
        self,
        spec: StageSpec,
        model: CausalDiT,
        geometry: Geometry,
        sampling: SamplingConfig,
        levels: tuple[float, ...],
        text: Tensor,
        *,
        graphs: bool = True,
        host: HostMemory | None = None,
        attention: str = "exact",
        kv_cache: str = "full",
    ) -> None:
        """`text` (length, text_dim); `levels`: the noise levels of `sampling`. Everything constant over the stream is
        computed here, once.

        `graphs`: run the layers as CUDA graphs once the window is full, where that can be and nothing is streamed from
        host memory. Same numbers. `host`: memory for what `spec.offload` keeps there, that of an earlier stage with
        this spec and geometry; new memory if None.
        `attention` and `kv_cache` as in RuntimeSpec.
        """
        self.spec, self.model, self.geometry, self.sampling = spec, model, geometry, sampling
        self.device = torch.device(spec.device)
        self.levels = levels
        config = model.config
        self._text = model.embed_text(text.to(self.device))
        self._times: dict[int, TimeTable] = {PREFILL: model.time_table(0.0)}
        for step in spec.steps:
            self._times[step] = model.time_table(timestep(self.levels[step]))
        shape, rings = (config.heads, config.head_dim), set(spec.offload.rings)
        self._caches = {
            step: [
                BlockCache(
                    geometry,
                    *shape,
                    device="meta" if (step, layer) in rings else self.device,
                    dtype=model.dtype,
                    attention=attention,
                    kv_cache=kv_cache,
                )
                for layer in spec.layers
            ]
            for step in spec.steps
        }
        self._sinks: dict[int, dict[int, SinkLayer]] = {}  # version -> layer -> sink, until every step has it
        self._hosted_sinks: HostedSinks | None = None
        self._rings: HostedRings | None = None
        if spec.offload:
            self._host = host = host or HostMemory(self.device)  # its memory lives as long as it does
            host.rewind()
            self._hosted_sinks = HostedSinks(
                spec.layers, geometry, *shape, host=host, device=self.device, dtype=model.dtype
            )
            if rings:
                caches = {
                    (step, layer): cache
                    for step in spec.steps
                    for layer, cache in zip(spec.layers, self._caches[step], strict=True)
                    if (step, layer) in rings
                }
                self._rings = HostedRings(caches, host, self.device)
        self._injections = tuple(i for i, layer in enumerate(config.audio_layers) if layer in spec.layers)
        self._heard: dict[int, dict[int, Heard]] = {}  # block -> injection, while the block is here
        self._installed = dict.fromkeys(spec.steps, PREFILL)
        self._motion = self._factors(motion_factors)
        graphs = graphs and not spec.offload and can_capture(self.device)
        self._graphs = LayerGraphs(self.device) if graphs else None

    def _factors(self, table, *args: int) -> Tensor:
        return table(*args, self.geometry, self.model.config.head_dim, self.sampling.rope_rounding, self.device)

    def ready(self, payload: Payload) -> bool:
        """Whether the sink version this payload looks at has been computed here."""
        return payload.step == PREFILL or payload.sink in self._sinks or self._installed[payload.step] == payload.sink

    def run(self, payload: Payload) -> Payload:
        """Do this stage's part of one step (or of a prefill); tensors come back on this stage's device."""
        try:
            return self._prefill(payload) if payload.step == PREFILL else self._denoise(payload)
        except BaseException:
            self._join_copies()
            raise

    def _join_copies(self) -> None:
        """Memory that something is being copied into may change hands only after that."""
        if self.model.hosted is not None:
            self.model.hosted.leave()
        if self._rings is not None:
            self._rings.join()

    def _prefill(self, payload: Payload) -> Payload:
        hidden = payload.hidden
        if hidden is None:
            hidden = self.model.embed_condition(*(x.to(self.device, self.model.dtype) for x in payload.condition))
        reference = self._factors(reference_factors, REFERENCE_POSITION)
        factors = torch.cat((reference, self._motion))
        hosted = self._hosted_sinks
        sink: dict[int, SinkLayer] = {} if hosted is None else hosted.shown

        def see(layer: int) -> See:
            def store(k: Tensor, norm: Tensor, values: Values) -> KeyValue:
                k, v = rms_norm(k.flatten(2), norm).view_as(k), values(None)
                if hosted is not None:
                    hosted.keep(payload.sink, layer, k, v)
                    return rotate(k, factors), v
                # Copies, so that a sink outlives neither more nor less than its own rows.
                frame = self.geometry.tokens_per_frame
                sink[layer] = SinkLayer(k[:, :frame].clone(), k[:, frame:].clone(), v.clone())
                return rotate(k, factors), v

            return store

        hidden = self.model.run_layers(
            hidden.to(self.device), self._times[PREFILL].modulation, factors, self._text, see, hear=None
        )
        self._sinks[payload.sink] = sink
        return replace(payload, hidden=hidden, condition=None)

    def _denoise(self, payload: Payload) -> Payload:
        model, step, block = self.model, payload.step, payload.block
        if payload.request is not None:
            payload = self._admit(payload)
        latent = payload.latent.to(self.device)
        audio = payload.audio.to(self.device)
        hidden = payload.hidden.to(self.device) if payload.hidden is not None else self._embed(latent, payload)
        self._install(step, payload.sink)
        distance = reference_distance(self.sampling, block, step)
        position = reference_position(LATENTS_PER_BLOCK * block, distance)
        reference = self._factors(reference_factors, position)
        factors = self._factors(block_factors, block)
        caches = dict(zip(self.spec.layers, self._caches[step], strict=True))
        for cache in caches.values():
            cache.advance(block)
        time, rings = self._times[step], self._rings
        if rings is not None:
            rings.begin(step, block)
        heard = self._heard.setdefault(block, {})

        def hear(injection: int) -> Heard:
            if injection not in heard:  # at the block's first step here
                heard[injection] = model.audio_injector.hear(injection, audio)
            return heard[injection]

        def layers(hidden: Tensor, factors: Tensor, reference: Tensor, hear: Callable[[int], Heard]) -> Tensor:
            def see(layer: int) -> See:
                cache, key = caches[layer], (step, layer)
                if rings is None or key not in rings:
                    cache.roll(reference)
                    return lambda k, norm, values: cache.update(block, k, norm, values, factors)
                rings.expect(key, block)

                def store(k: Tensor, norm: Tensor, values: Values) -> KeyValue:
                    rings.arrive(key, block)
                    cache.install(self._hosted_sinks.shown[layer], self._motion)
                    cache.roll(reference)
                    seen = cache.update(block, k, norm, values, factors)
                    rings.leave(key, block)
                    return seen

                return store

            hidden = model.run_layers(hidden, time.modulation, factors, self._text, see, hear, audio.mask)
            if rings is not None:
                rings.end(step)
            return hidden

        def captured(hidden: Tensor, factors: Tensor, reference: Tensor, *heard: Tensor) -> Tensor:
            every = {injection: Heard(*(x[i] for x in heard)) for i, injection in enumerate(self._injections)}
            return layers(hidden, factors, reference, every.__getitem__)

        # The block before this one had a full window too, and has run the same shapes outside a graph.
        if self._graphs is not None and block >= WINDOW_BLOCKS and audio.mask is None:
            every = [hear(injection) for injection in self._injections]
            parts = ([h.k for h in every], [h.v for h in every], [h.modulation for h in every])
            inputs = (hidden, factors, reference, *(torch.stack(part) for part in parts if part))
            hidden = self._graphs.run((step, block % WINDOW_BLOCKS), captured, inputs)
        else:
            hidden = layers(hidden, factors, reference, hear)
        if step == self.spec.steps[-1]:
            del self._heard[block]
        if not model.has_head:
            # A graph's result is overwritten by the next one.
            return replace(payload, latent=latent, hidden=hidden.clone(), audio=audio)
        velocity = model.velocity(hidden, time, self.geometry.grid)
        latent = euler(latent, velocity, step, self.levels)
        return replace(payload, step=step + 1, latent=latent, hidden=None, audio=audio)

    def _admit(self, payload: Payload) -> Payload:
        """Turn a request into what travels: noise and audio tokens, both computed once per block."""
        request, model = payload.request, self.model
        features = request.features.to(self.device)
        audio = model.casual_audio_encoder.block(features, model.dtype)
        if request.mask is not None:
            audio = replace(audio, mask=request.mask.to(self.device, model.dtype))
        noise = request.noise if request.noise is not None else self._noise(request.block)
        latent = upload(noise.to(model.dtype), self.device)
        return replace(payload, latent=latent, audio=audio, pose=request.pose, request=None)

    def _embed(self, latent: Tensor, payload: Payload) -> Tensor:
        pose = payload.pose
        return self.model.embed_block(latent, None if pose is None else pose.to(self.device, self.model.dtype))

    def _noise(self, block: int) -> Tensor:
        geometry = self.geometry
        shape = (
            self.model.config.channels,
            LATENTS_PER_BLOCK,
            geometry.latent_height,
            geometry.latent_width,
        )
        if self.sampling.noise == "clip":
            return clip_noise(self.sampling.seed, block, shape, self.device, self.model.dtype)
        return block_noise(self.sampling.seed, block, shape)

    def _install(self, step: int, version: int) -> None:
        hosted = self._hosted_sinks
        moved = hosted is not None and hosted.show(version)
        if self._installed[step] == version and not moved:
            return
        if self._graphs is not None:
            self._graphs.forget(step)
        for layer, cache in zip(self.spec.layers, self._caches[step], strict=True):
            if self._rings is None or (step, layer) not in self._rings:
                cache.install(self._sinks[version][layer], self._motion)
        self._installed[step] = version
        # A version is kept until every step has moved on to it; older ones are then never asked for again. Where only
        # one can be on the device, the one that all steps have may have to come back.
        oldest = min(self._installed.values()) + (hosted is None)
        for old in [v for v in self._sinks if v < oldest]:
            del self._sinks[old]
