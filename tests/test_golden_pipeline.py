"""Whole runs of the original's three pipelines, with their encoders replaced by a recorded linear stand-in.

Latents come from the engine's own block loop. The original's offline decoding (92 re-encoded motion latents before
every clip) is not offered by the engine; it is replayed here on the engine's latents to meet the recorded video.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from liveavatar_core.config import SamplingConfig
from liveavatar_core.encoders.audio_features import bucket, to_feature_rate
from liveavatar_core.geometry import (
    BLOCKS_PER_CLIP,
    FRAMES_DROPPED,
    FRAMES_PER_BLOCK,
    FRAMES_PER_CLIP,
    FRAMES_PER_LATENT,
    LATENTS_PER_BLOCK,
    MOTION_LATENTS,
    PIXELS_PER_LATENT,
    Geometry,
    reference_size,
)
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import layer_ring, single, tpp
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise, frame_chunks
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning

TOLERANCE = 5e-6
HISTORY_FRAMES = 365


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class StandIn:
    """The recorded VAE stand-in. One pixel stands for a constant 8 x 8 block; decoding keeps its state."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self._last: Tensor | None = None

    def decode(self, latents: Tensor) -> Tensor:
        """(16, F, h, w) -> (frames, 3, h, w), time first."""
        frames = []
        for latent in latents.unbind(1):
            if self._last is None:
                smooth, steps = latent, [latent]
            else:
                smooth = (self._last + latent) / 2
                steps = [self._last + (smooth - self._last) * j / FRAMES_PER_LATENT for j in range(1, 5)]
            frames += [torch.einsum("cz,zhw->chw", self.a, step) for step in steps]
            self._last = smooth
        return torch.stack(frames).clamp(-1, 1)

    def prime(self, motion: Tensor) -> None:
        self.decode(motion)

    def encode(self, frames: Tensor) -> Tensor:
        """(n, 3, h, w) -> (16, latents, h, w)"""
        rest = frames[1:].unflatten(0, (-1, FRAMES_PER_LATENT)).mean(1)
        return torch.einsum("zc,tchw->zthw", self.b, torch.cat((frames[:1], rest)))


@dataclass
class Recording:
    """Inputs that all three pipelines share, and a stage that notes every step's latent."""

    model: CausalDiT
    tensors: dict[str, Tensor]
    geometry: Geometry
    features: Tensor  # (1, states, width, frames)

    @property
    def blocks(self) -> int:
        return self.tensors["clip_noise"].shape[0] * BLOCKS_PER_CLIP

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.tensors["context"], self.tensors["ref_latent"], self.tensors["motion_latents"])

    def sampling(self, reanchor: int | None) -> SamplingConfig:
        table = self.tensors["relative_dist"].flatten(0, 1).tolist()
        return SamplingConfig(
            steps=len(self.tensors["timesteps"]), distance=tuple(map(tuple, table)), reanchor_block=reanchor
        )

    def request(self, block: int, sink: int = 0) -> BlockRequest:
        clip, place = divmod(block, BLOCKS_PER_CLIP)
        noise = self.tensors["clip_noise"][clip, :, place * LATENTS_PER_BLOCK : (place + 1) * LATENTS_PER_BLOCK]
        frames = slice(block * FRAMES_PER_BLOCK, (block + 1) * FRAMES_PER_BLOCK)
        return BlockRequest(block, self.features[..., frames], sink, noise)

    def stages(self, plan, sampling: SamplingConfig) -> list["Noting"]:
        return [
            Noting(Stage(spec, self.model, self.geometry, sampling, levels(sampling), self.tensors["context"]))
            for spec in plan.stages
        ]


class Noting:
    """A stage that notes the latent after each Euler step."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.latents: dict[tuple[int, int], Tensor] = {}

    def __getattr__(self, name: str):
        return getattr(self._stage, name)

    def run(self, payload):
        done = self._stage.run(payload)
        if done.step > payload.step >= 0:
            self.latents[payload.block, payload.step] = done.latent
        return done


@pytest.fixture(scope="module")
def recording(golden, golden_config) -> Recording:
    model = CausalDiT(golden_config)
    model.load_state_dict(golden("dit_weights")[0], strict=True)
    tensors, _ = golden("pipeline_single")
    height, width = (side * PIXELS_PER_LATENT for side in tensors["ref_latent"].shape[-2:])
    features = bucket(to_feature_rate(tensors["audio_feat_50hz"]), fps=25)
    return Recording(model.eval(), tensors, Geometry(height, width), features)


def noted(stages: list[Noting], recording: Recording) -> Tensor:
    """(clips, blocks, steps, 16, 3, h, w)"""
    found = {key: latent for stage in stages for key, latent in stage.latents.items()}
    steps = len(recording.tensors["timesteps"])
    flat = [torch.stack([found[block, step] for step in range(steps)]) for block in range(recording.blocks)]
    return torch.stack(flat).unflatten(0, (-1, BLOCKS_PER_CLIP))


def offline_video(recording: Recording, latents: Tensor):
    """The original's single-GPU decoding: yields (clip, frames kept, history, re-encoded history)."""
    tensors = recording.tensors
    picture = (tensors["image_blocks"].float() / 255 * 2 - 1).permute(2, 0, 1)
    history = picture.expand(HISTORY_FRAMES, -1, -1, -1)
    still = tensors["motion_latents"][:, :1].expand(-1, 92 - MOTION_LATENTS, -1, -1)
    motion = torch.cat((still, tensors["motion_latents"]), dim=1)
    for clip, latent in enumerate(latents):
        decoded = StandIn(tensors["vae_A"], tensors["vae_B"]).decode(torch.cat((motion, latent), dim=1))
        frames = decoded[-FRAMES_PER_CLIP:][FRAMES_DROPPED if clip == 0 else 0 :]
        history = torch.cat((history, frames))[-HISTORY_FRAMES:]
        motion = StandIn(tensors["vae_A"], tensors["vae_B"]).encode(history)
        yield clip, frames, history, motion


def check_offline_video(file: str, wanted: dict[str, Tensor], recording: Recording, latents: Tensor, agree) -> None:
    frames = []
    for clip, kept, history, motion in offline_video(recording, latents):
        frames.append(kept)
        if f"reencode_{clip}.in_last_frames" in wanted:
            want = wanted[f"reencode_{clip}.in_last_frames"]
            agree(file, "reencode_*.in", history[-want.shape[1] :].transpose(0, 1), want, TOLERANCE)
        if f"reencode_{clip}.out" in wanted:
            agree(file, "reencode_*.out", motion[:, -MOTION_LATENTS:], wanted[f"reencode_{clip}.out"], TOLERANCE)
    agree(file, "video", torch.cat(frames).transpose(0, 1), wanted["video"], TOLERANCE)


def check_rings(file: str, wanted: Tensor, stage: Stage, agree) -> None:
    """Ring statistics (rms, max, sum of every 97th) judged on the scale of what was added up."""
    for step, caches in stage._caches.items():
        for layer, cache in enumerate(caches):
            for part, buffer in enumerate((cache.k_BSHK, cache.v_BSHK)):
                slots = buffer[:, cache.sink_tokens :].unflatten(1, (BLOCKS_PER_CLIP, -1)).unbind(1)
                for slot, stored in enumerate(slots):
                    flat, want = stored.flatten(), wanted[step, layer, slot, part]
                    got = torch.stack((flat.square().mean().sqrt(), flat.abs().max(), flat[::97].sum()))
                    scale = want[0] * torch.tensor([1, 1, flat.numel() / 97])
                    agree(file, "cache_end_stats", got / scale + 1, want / scale + 1, TOLERANCE)


def test_inputs(recording, agree):
    tensors = recording.tensors
    blocks = recording.features[0].unflatten(-1, (-1, FRAMES_PER_BLOCK)).movedim(-2, 0)
    states = slice(None, None, 8)  # the recording keeps every eighth
    want = tensors["audio_blocks"]
    got = blocks[: recording.blocks, states].unflatten(0, (-1, BLOCKS_PER_CLIP))
    agree("pipeline_single", "audio_blocks", got, want, 5e-5)
    starts = tensors["model_starts"].flatten(0, 1)[:, 0]
    assert starts.tolist() == [block * recording.geometry.tokens_per_block for block in range(recording.blocks)]


def test_output_sizes(golden):
    cases = golden("pipeline_single")[1]["output_size_from_image_size"]
    for case in cases:
        rows, columns = (int(side) for side in case["size"].split("*"))
        assert list(reference_size(*case["image_hw"], rows * columns)) == case["result_hw"], case


def test_single(golden, recording, agree):
    """As shipped: the sink never changes."""
    sampling = recording.sampling(reanchor=None)
    plan = single(sampling.steps, recording.model.config.layers, ["cpu"])
    stages = recording.stages(plan, sampling)
    with ThreadedPipeline(plan, stages) as pipeline:
        stream = denoise(pipeline, recording.conditioning, sampling, recording.request, recording.blocks, depth=1)
        finished = torch.stack([latent for _, latent in stream])
    wanted = golden("pipeline_single")[0]
    agree("pipeline_single", "latents_step", noted(stages, recording), wanted["latents_step"], TOLERANCE)
    clips = finished.unflatten(0, (-1, BLOCKS_PER_CLIP)).movedim(1, 2).flatten(2, 3)
    check_offline_video("pipeline_single", wanted, recording, clips, agree)
    check_rings("pipeline_single", wanted["cache_end_stats"], stages[0], agree)


def test_single_online(golden, recording, agree):
    """After clip 0 reference and motion both come from the finished video; the sink is computed anew."""
    wanted = golden("pipeline_single_online")[0]
    sampling = recording.sampling(reanchor=None)
    plan = single(sampling.steps, recording.model.config.layers, ["cpu"])
    stages = recording.stages(plan, sampling)
    finished = []
    with ThreadedPipeline(plan, stages) as pipeline:
        pipeline.prefill(0, recording.conditioning.reference, recording.conditioning.motion)
        for block in range(recording.blocks):
            if block == BLOCKS_PER_CLIP:
                clip = torch.cat(finished, dim=1)
                _, _, _, motion = next(offline_video(recording, clip.unsqueeze(0)))
                motion, reference = motion[:, -MOTION_LATENTS:], clip[:, :1]
                agree("pipeline_single_online", "ref_latent_clip1", reference, wanted["ref_latent_clip1"], TOLERANCE)
                want = wanted["motion_latents_clip1"]
                agree("pipeline_single_online", "motion_latents_clip1", motion, want, TOLERANCE)
                pipeline.prefill(1, reference, motion)
            pipeline.submit(recording.request(block, sink=int(block >= BLOCKS_PER_CLIP)))
            finished.append(pipeline.result(timeout=60)[1])
    clips = torch.stack(finished).unflatten(0, (-1, BLOCKS_PER_CLIP)).movedim(1, 2).flatten(2, 3)
    agree("pipeline_single_online", "clip_latents", clips, wanted["clip_latents"], TOLERANCE)
    check_offline_video("pipeline_single_online", wanted, recording, clips, agree)
    check_rings("pipeline_single_online", wanted["cache_end_stats"], stages[0], agree)


@pytest.mark.parametrize("cut", ["single", "tpp", "ring"])
def test_tpp(golden, recording, agree, cut):
    """The multi-GPU pipeline, whatever the plan that runs it: sink switch at block 4, streaming decoder."""
    wanted = golden("pipeline_tpp")[0]
    sampling = recording.sampling(reanchor=BLOCKS_PER_CLIP)
    layers = recording.model.config.layers
    devices = {"single": 1, "tpp": sampling.steps, "ring": min(2, layers)}[cut]
    plan = {"single": single, "tpp": tpp, "ring": layer_ring}[cut](sampling.steps, layers, ["cpu"] * devices)
    stages = recording.stages(plan, sampling)
    if cut == "ring":
        stages = _with_parts(recording, plan, sampling)
    decoder = StandIn(recording.tensors["vae_A"], recording.tensors["vae_B"])
    motion = recording.conditioning.motion
    kept = []
    with ThreadedPipeline(plan, stages) as pipeline:
        stream = denoise(pipeline, recording.conditioning, sampling, recording.request, recording.blocks, depth=devices)

        def keeping():
            for block, latent in stream:
                kept.append(latent)
                yield block, latent

        frames = recording.blocks * FRAMES_PER_BLOCK - FRAMES_DROPPED
        video = torch.cat([chunk.frames for chunk in frame_chunks(keeping(), decoder, motion, frames)])
    agree("pipeline_tpp", f"latents_step ({cut})", noted(stages, recording), wanted["latents_step"], TOLERANCE)
    agree("pipeline_tpp", "ref_latent_clip1", kept[0][:, :1], wanted["ref_latent_clip1"], TOLERANCE)
    agree("pipeline_tpp", f"video ({cut})", video.transpose(0, 1), wanted["video"], TOLERANCE)


def _with_parts(recording: Recording, plan, sampling: SamplingConfig) -> list[Noting]:
    """Stages that own only their layers' weights."""
    state = recording.model.state_dict()
    stages = []
    for spec in plan.stages:
        part = CausalDiT(recording.model.config, spec.layers)
        part.load_state_dict({name: state[name] for name in part.state_dict()})
        stages.append(
            Noting(Stage(spec, part, recording.geometry, sampling, levels(sampling), recording.tensors["context"]))
        )
    return stages
