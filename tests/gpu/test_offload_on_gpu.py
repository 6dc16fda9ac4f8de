"""Weights and rings in host memory on a GPU: the same bits as on the device, and all of it given back."""

import gc

import pytest
import torch
from test_offload import BLOCKS, GEOMETRY, SPLITS, offloaded, run

from liveavatar_core.config import ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, write_dit
from liveavatar_core.errors import PlanError
from liveavatar_core.model.host_memory import HostMemory
from liveavatar_core.pipeline.plan import layer_ring, single, tpp
from liveavatar_core.runtime.fitting import fit
from liveavatar_core.runtime.memory import HOST, plan_memory
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.types import BlockRequest, Conditioning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS = DEMO_CONFIG.layers


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> DemoFiles:
    demo = DemoFiles(tmp_path_factory.mktemp("demo"))
    write_dit(demo, seed=0)
    return demo


@pytest.mark.parametrize(("precision", "kv_cache"), [("bf16", "full"), ("fp8", "full"), ("fp8", "fp8")])
def test_streaming_changes_no_bit(files, precision, kv_cache):
    plan = single(4, LAYERS, ["cuda:0"])
    want = run(files, plan, precision, kv_cache=kv_cache)
    assert torch.isfinite(want).all() and want.std() > 0.1
    for name in ("an odd number of rings", "some of both", "all"):
        got = run(files, offloaded(plan, *SPLITS[name]), precision, kv_cache=kv_cache)
        assert torch.equal(got, want), name


def test_several_stages(files):
    want = run(files, single(4, LAYERS, ["cuda:0"]), "bf16")
    for plan in (layer_ring(4, LAYERS, ["cuda:0"] * 2), tpp(4, LAYERS, ["cuda:0"] * 4)):
        assert torch.equal(run(files, offloaded(plan, 2, slice(None)), "bf16", depth=4), want), plan.name


def test_locked_memory_goes_back():
    device = torch.device("cuda", 0)
    memory = HostMemory(device)
    tensor = memory.empty((1000, 1000), torch.float32)
    assert tensor.is_pinned() and memory.nbytes == 4_000_000
    memory.rewind()
    assert memory.empty((1000, 1000), torch.float32).data_ptr() == tensor.data_ptr()
    del memory
    gc.collect()
    assert not tensor.is_pinned()


def test_more_than_there_is():
    with pytest.raises(PlanError, match=r"^main memory gives 0\.0 GiB to stream from and no more \("):
        HostMemory(torch.device("cuda", 0)).empty((2**48,), torch.uint8)
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_a_runtime_without_room_streams(files):
    """The same bits, what was planned in host memory, the same split for the next stream, and all of it given back."""
    spec, model, sampling = RuntimeSpec(("cuda:0",), precision="bf16"), ModelSpec(files.shards), SamplingConfig(seed=1)
    memory = plan_memory(DEMO_CONFIG, GEOMETRY, single(4, LAYERS, ["cuda:0"]), "bf16", decoder="cuda:0")
    tight = fit(memory, {"cuda:0": 0})
    assert tight.plan.stages[0].offload
    hw = (GEOMETRY.latent_height, GEOMETRY.latent_width)
    conditioning = Conditioning(torch.randn(5, DEMO_CONFIG.text_dim), torch.randn(16, 1, *hw), torch.randn(16, 19, *hw))
    features = torch.randn(BLOCKS, 1, DEMO_CONFIG.audio_states, DEMO_CONFIG.audio_dim, 12)

    def stream(runtime: Runtime) -> torch.Tensor:
        plan = runtime.ensure(model, DEMO_CONFIG, spec, 4, geometry=GEOMETRY)
        made = runtime.latents(
            plan,
            GEOMETRY,
            sampling,
            conditioning,
            lambda block: BlockRequest(block, features[block]),
            BLOCKS,
            lambda: False,
        )
        return torch.stack([latent.cpu() for _, latent in made])

    want = stream(Runtime(free=lambda devices: {}))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    free = {"cuda:0": tight.on("cuda:0")}
    runtime = Runtime(free=lambda devices: free)
    assert torch.equal(stream(runtime), want)
    held = runtime.nbytes
    assert held[HOST] == tight.on(HOST)
    free["cuda:0"] += 1000  # less free than was found before: what the runtime holds counts as free
    free["cuda:0"] -= held["cuda:0"]
    free[HOST] = 0
    assert torch.equal(stream(runtime), want)
    assert runtime.nbytes == held
    runtime.unload()
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert runtime.nbytes == {}
