"""Weights and rings in host memory: the same bits as on the device, however much and however the grid is cut."""

from dataclasses import replace

import pytest
import torch

from liveavatar_core.config import SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_dit
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.plan import Offload, Plan, grid, layer_ring, single, tpp
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.pipeline.stream import denoise
from liveavatar_core.pipeline.threads import ThreadedPipeline
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Conditioning
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.reader import open_weights

GEOMETRY = Geometry(64, 80)
BLOCKS = 10  # the window fills, the sink changes at block 4, rings go round
LAYERS = DEMO_CONFIG.layers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    demo = DemoFiles(tmp_path_factory.mktemp("demo"))
    write_dit(demo, seed=0)
    return demo


def run(files: DemoFiles, plan: Plan, precision: str, *, depth: int = 1, **settings) -> torch.Tensor:
    """All latents of one stream; `settings` are the stages'."""
    generator = torch.Generator().manual_seed(5)
    size = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    shapes = ((5, DEMO_CONFIG.text_dim), (16, 1, *size), (16, 19, *size))
    conditioning = Conditioning(*(torch.randn(shape, generator=generator) for shape in shapes))
    features = torch.randn(BLOCKS, 1, DEMO_CONFIG.audio_states, DEMO_CONFIG.audio_dim, 12, generator=generator)
    sampling = SamplingConfig(seed=11)
    stages = []
    for spec in plan.stages:
        with open_weights(files.shards) as reader:
            model = load_dit(
                reader,
                DEMO_CONFIG,
                layers=spec.layers,
                dtype=work_dtype(precision, spec.device),
                device=spec.device,
                fp8=precision == "fp8",
                hosted=spec.offload.weights,
            )
        with torch.inference_mode():
            stages.append(Stage(spec, model, GEOMETRY, sampling, levels(sampling), conditioning.text, **settings))
    with torch.inference_mode(), ThreadedPipeline(plan, stages) as pipeline:
        latents = denoise(pipeline, conditioning, sampling, lambda n: BlockRequest(n, features[n]), BLOCKS, depth=depth)
        return torch.stack([latent.cpu() for _, latent in latents])


def offloaded(plan: Plan, weights: int, rings: slice) -> Plan:
    """Of every stage, the first `weights` layers' weights and these of its rings in host memory."""

    def of(stage):
        units = tuple((step, layer) for step in stage.steps for layer in stage.layers)
        return replace(stage, offload=Offload(tuple(stage.layers)[:weights], units[rings]))

    return replace(plan, rows=tuple(tuple(of(stage) for stage in row) for row in plan.rows))


EVERYTHING = (2, slice(None))
SPLITS = {
    "rings": (0, slice(None)),
    "an odd number of rings": (0, slice(1, 12)),
    "two rings": (0, slice(2, 12, 9)),
    "weights": (4, slice(0)),
    "some of both": (2, slice(0, None, 3)),
    "all": (4, slice(None)),
}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_one_stage(files, precision):
    plan = single(4, LAYERS, ["cpu"])
    want = run(files, plan, precision)
    assert torch.isfinite(want).all() and want.std() > 0.1
    for name, split in SPLITS.items():
        got = run(files, offloaded(plan, *split), precision)
        differing = [n for n in range(BLOCKS) if not torch.equal(got[n], want[n])]
        assert not differing, f"{name}: blocks {differing} differ"


@pytest.mark.parametrize(
    ("plan", "depth"),
    [
        (layer_ring(4, LAYERS, ["cpu"] * 2), 3),  # blocks overtake each other: the next visit is seldom the expected
        (tpp(4, LAYERS, ["cpu"] * 4), 4),  # one step each: the next visit is the next block's
        (grid("2 x 2", 4, LAYERS, [["cpu"] * 2] * 2), 5),
    ],
    ids=["ring", "tpp", "2 x 2"],
)
@pytest.mark.parametrize("rings", [slice(None), slice(0, None, 2)], ids=["all rings", "every other ring"])
def test_several_stages(files, plan, depth, rings):
    want = run(files, single(4, LAYERS, ["cpu"]), "bf16")
    got = run(files, offloaded(plan, 2, rings), "bf16", depth=depth)
    assert torch.equal(got, want)
