"""A whole stream on a GPU: threads, graphs, plans that share one card, and the streaming decoder beside them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, vae_shapes, write_dit
from liveavatar_core.encoders.audio_features import FeatureStream
from liveavatar_core.encoders.vae import StreamDecoder, load_vae
from liveavatar_core.geometry import FRAMES_DROPPED, blocks_for
from liveavatar_core.pipeline.spool import Spool
from liveavatar_core.pipeline.stream import frame_chunks
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.runtime.stream import LatentStream, StreamRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FRAMES = 120  # eleven blocks: the window fills, the sink switches, graphs are replayed


def speech_encoder(samples: torch.Tensor) -> torch.Tensor:
    """Stands in for wav2vec2, which is not what is tested: windows of the sound, projected."""
    windows = samples.unfold(0, 400, 320)
    states = torch.randn(
        DEMO_CONFIG.audio_states, 400, DEMO_CONFIG.audio_dim, generator=torch.Generator().manual_seed(1)
    )
    return windows @ states / 20


@pytest.fixture(scope="module")
def request_(tmp_path_factory) -> StreamRequest:
    demo = DemoFiles(tmp_path_factory.mktemp("demo"))
    write_dit(demo, seed=0)  # the tokenizer of the whole demo needs a package that a bare GPU machine may lack
    generator = torch.Generator().manual_seed(9)
    vae = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in vae_shapes(8).items()}
    return StreamRequest(
        model=ModelSpec(demo.shards),
        runtime=RuntimeSpec(("cuda:0",), precision="fp32"),
        sampling=SamplingConfig(seed=3),
        picture=torch.rand((3, 64, 96), generator=generator) * 2 - 1,
        text=torch.randn((7, DEMO_CONFIG.text_dim), generator=generator),
        features=FeatureStream(
            torch.randn(80_000, generator=generator), speech_encoder, fps=25, lead_frames=FRAMES_DROPPED
        ),
        vae=load_vae(vae, dtype=torch.float32, device="cuda:0"),
        frames=FRAMES,
    )


def latents_of(request: StreamRequest, folder: Path) -> torch.Tensor:
    stream = LatentStream(Runtime(), request, Spool(folder / "spool", blocks_for(FRAMES)))
    return torch.stack([latent.float().cpu() for _, latent in stream.latents()])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_plans_on_one_card_give_the_same_bits(request_, tmp_path, precision):
    runtime = RuntimeSpec(("cuda:0",), precision=precision)
    want = latents_of(replace(request_, runtime=runtime), tmp_path / "single")
    assert torch.isfinite(want).all() and want.std() > 0.1
    for plan, devices in (("ring", 3), ("tpp", 4)):
        runtime = RuntimeSpec(("cuda:0",) * devices, plan, precision)
        got = latents_of(replace(request_, runtime=runtime), tmp_path / plan)
        differing = [n for n in range(len(want)) if not torch.equal(got[n], want[n])]
        assert not differing, f"{plan}: blocks {differing} differ from the single plan"


def test_the_gpu_agrees_with_the_cpu(request_, tmp_path):
    with torch.backends.cudnn.flags(allow_tf32=False):
        want = latents_of(replace(request_, runtime=RuntimeSpec(("cpu",))), tmp_path / "cpu")
        got = latents_of(request_, tmp_path / "cuda")
    error = (got - want).norm() / want.norm()
    print(f"relative L2 of {len(want)} blocks, float32: {error:.1e}")
    assert error < 1e-3  # both are float32; the errors of four steps and eleven blocks add up


def test_frames_are_decoded_while_the_stream_runs(request_, tmp_path):
    stream = LatentStream(Runtime(), request_, Spool(tmp_path / "spool", blocks_for(FRAMES)))
    decoder = StreamDecoder(request_.vae)
    chunks = list(frame_chunks(stream.latents(), decoder, stream.portrait[1], FRAMES))
    assert sum(len(chunk.frames) for chunk in chunks) == FRAMES
    again = StreamDecoder(request_.vae)
    replayed = frame_chunks(stream.latents(), again, stream.portrait[1], FRAMES)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(chunks, replayed, strict=True))


def test_unload_returns_the_memory(request_, tmp_path):
    def run_and_unload() -> int:
        runtime = Runtime()
        stream = LatentStream(runtime, request_, Spool(tmp_path / "spool", blocks_for(FRAMES)))
        for _ in stream.latents():
            pass
        assert stream.spool.complete
        stream.spool.discard()
        runtime.unload()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    run_and_unload()  # the matrix library's workspaces stay with the process
    before = run_and_unload()
    assert run_and_unload() == before
