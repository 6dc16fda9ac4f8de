"""CUDA graphs of the layers: the same bits as without, through a change of the attention sink, in several stages."""

import threading
from contextlib import contextmanager

import pytest
import torch

from liveavatar_core.config import ModelConfig, SamplingConfig
from liveavatar_core.geometry import Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import Plan, layer_ring, single, tpp
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = ModelConfig(
    dim=256,
    heads=2,
    ffn_dim=512,
    layers=4,
    audio_layers=(0, 2),
    audio_dim=12,
    audio_states=3,
    text_dim=16,
    text_len=8,
    freq_dim=32,
)
GEOMETRY = Geometry(64, 80)
BLOCKS = 14


def part_of(layers: range, device: str) -> CausalDiT:
    generator = torch.Generator().manual_seed(3)
    whole = CausalDiT(CONFIG)
    state = {name: 0.1 * torch.randn(like.shape, generator=generator) for name, like in whole.state_dict().items()}
    part = CausalDiT(CONFIG, layers)
    part.load_state_dict({name: state[name] for name in part.state_dict()})
    for name, parameter in part.named_parameters():
        keeps32 = name.startswith(("time_", "head.", "casual_audio_encoder.")) or name.endswith("modulation")
        parameter.data = parameter.data.to(device, torch.float32 if keeps32 else torch.bfloat16)
    return part.eval()


def run(plan: Plan, *, graphs: bool, reanchor: int | None, **formats: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    size = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    text, reference, motion = (
        torch.randn(shape, generator=generator) for shape in ((5, 16), (16, 1, *size), (16, 19, *size))
    )
    features = torch.randn(BLOCKS, 1, CONFIG.audio_states, CONFIG.audio_dim, 12, generator=generator)
    sampling = SamplingConfig(seed=1, reanchor_block=reanchor)
    with torch.inference_mode():
        stages = [
            Stage(
                spec,
                part_of(spec.layers, spec.device),
                GEOMETRY,
                sampling,
                levels(sampling),
                text,
                graphs=graphs,
                **formats,
            )
            for spec in plan.stages
        ]
        with ThreadedPipeline(plan, stages) as pipeline:
            latents = denoise(
                pipeline,
                Conditioning(text, reference, motion),
                sampling,
                lambda block: BlockRequest(block, features[block]),
                BLOCKS,
                depth=3,
            )
            return torch.stack([latent.cpu() for _, latent in latents])


@pytest.mark.parametrize("reanchor", [None, 4, 9])
def test_graphs_change_no_bit(reanchor):
    want = run(single(4, CONFIG.layers, ["cuda:0"]), graphs=False, reanchor=reanchor)
    assert torch.isfinite(want).all() and want.std() > 0.1
    for plan in (single(4, CONFIG.layers, ["cuda:0"]), layer_ring(4, CONFIG.layers, ["cuda:0"] * 2)):
        assert torch.equal(run(plan, graphs=True, reanchor=reanchor), want), plan.name
    for stages in (2, 4):  # a stage of one step drops all its graphs at once
        assert torch.equal(run(tpp(4, CONFIG.layers, ["cuda:0"] * stages), graphs=True, reanchor=reanchor), want)


@pytest.mark.parametrize(("attention", "kv_cache"), [("int8", "full"), ("exact", "fp8"), ("int8", "fp8")])
def test_graphs_change_no_bit_in_eight_bits(attention, kv_cache):
    formats = {"attention": attention, "kv_cache": kv_cache}
    plan = single(4, CONFIG.layers, ["cuda:0"])
    want = run(plan, graphs=False, reanchor=4, **formats)
    assert torch.isfinite(want).all() and want.std() > 0.1
    assert torch.equal(run(plan, graphs=True, reanchor=4, **formats), want)
    assert not torch.equal(run(plan, graphs=True, reanchor=4), want)


@contextmanager
def restless_neighbour():
    """Another thread of the process that never leaves the device alone. Two things it must not do, since whoever does
    them while a stream is captured is refused: wait for the whole device, draw random numbers on it."""
    ended, failed = threading.Event(), []

    def work() -> None:
        try:
            while not ended.is_set():
                x = torch.ones(512, 512, device="cuda")
                torch.empty(2**20, pin_memory=True).copy_((x @ x).flatten()[:1])
                torch.cuda.current_stream().synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not failed, failed


def test_graphs_are_made_beside_other_work():
    plan = tpp(4, CONFIG.layers, ["cuda:0"] * 2)
    want = run(plan, graphs=False, reanchor=4)
    with restless_neighbour():
        assert torch.equal(run(plan, graphs=True, reanchor=4), want)
