"""Weights and rings in host memory on a GPU: the same bits as on the device, inside CUDA graphs and without them."""

import gc

import pytest
import torch
from test_offload import SPLITS, offloaded, run

from liveavatar_core.demo import DEMO_CONFIG, DemoFiles, write_dit
from liveavatar_core.errors import PlanError
from liveavatar_core.model.host_memory import HostMemory
from liveavatar_core.pipeline.plan import layer_ring, single, tpp

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


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("kv_cache", ["full", "fp8"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_streaming_changes_no_bit(files, precision, kv_cache, graphs):
    plan = single(4, LAYERS, ["cuda:0"])
    want = run(files, plan, precision, kv_cache=kv_cache, graphs=False)
    assert torch.isfinite(want).all() and want.std() > 0.1
    for name, split in SPLITS.items():
        got = run(files, offloaded(plan, *split), precision, kv_cache=kv_cache, graphs=graphs)
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
        HostMemory(torch.device("cuda", 0)).empty((2**46,), torch.uint8)
    assert torch.ones(3, device="cuda").sum().item() == 3
