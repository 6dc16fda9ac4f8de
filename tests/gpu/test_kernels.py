"""Each fused kernel on a GPU against its plain form on the CPU, on widths with and without a ragged end."""

import pytest
import torch
from torch import Tensor

from liveavatar_core.model import pointwise
from liveavatar_core.model.attention import attend
from liveavatar_core.model.pointwise import Rows, add_norm, gated, gelu, norm, quantise_rows, rms_norm, rotate
from liveavatar_core.model.rope import block_factors, reference_factors
from liveavatar_core.weights import quant
from liveavatar_core.weights.quant import Fp8Linear, has_fp8, scaled_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {  # relative L2: another order of sums, which flips a rounding of the result here and there
    torch.float32: 2e-6,
    torch.bfloat16: 1e-3,
    torch.float8_e4m3fn: 1e-2,
}
HEAD = 32


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def flat(result) -> list[Tensor]:
    if isinstance(result, Rows):
        return [result.values.float() * result.scale]
    return [part for item in result for part in flat(item)] if isinstance(result, tuple) else [result]


def cases(dtype: torch.dtype, width: int, rows: bool) -> dict:
    """Name -> (function, tensors)."""
    generator = torch.Generator().manual_seed(width)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, y, frames = draw(1, 9, width, dtype=dtype), draw(1, 9, width, dtype=dtype), draw(3, 3, width, dtype=dtype)
    gate, weight, bias = draw(3, width)
    pair = draw(3, 1, 2 * width).chunk(2, dim=-1)
    turned = draw(1, width, 9, dtype=dtype).transpose(1, 2)
    heads, factors = draw(1, 9, width // HEAD, HEAD, dtype=dtype), draw(9, HEAD // 2, 2)
    return {
        "norm": (lambda *a: norm(*a, rounded=True, rows=rows), (x, weight, bias)),
        "norm of a transposed tensor": (lambda *a: norm(*a, rows=rows), (turned, weight, bias)),
        "norm per frame": (lambda *a: norm(*a, eps=1e-5, rows=rows), (frames, *pair)),
        "norm in float32": (lambda *a: norm(*a, dtype=torch.float32), (x, weight, bias)),
        "add, gate, norm": (lambda *a: add_norm(*a, dtype=dtype, rounded=True, rows=rows), (x, y, gate, weight, bias)),
        "add, norm": (lambda *a: add_norm(*a, dtype=dtype, rounded=False, rows=rows), (x.float(), y, None, gate, bias)),
        "gate": (lambda *a: gated(*a, dtype), (x.float(), y, gate)),
        "rms norm": (rms_norm, (x, weight.to(dtype))),
        "rotate": (rotate, (heads, factors)),
        "norm, rotate": (lambda *a: rotate(*a[:2], norm_D=a[2]), (heads, factors, weight.to(dtype))),
        "gelu": (lambda x: gelu(x, rows=rows), (x,)),
        "quantise": (quantise_rows, (x,)),
    }


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("width", [64, 160, 5120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_plain_form(dtype, width, rows):
    assert pointwise._kernels(torch.device("cuda", 0)) is not None
    for name, (function, tensors) in cases(dtype, width, rows).items():
        want = function(*tensors)
        got = function(*(None if tensor is None else tensor.cuda() for tensor in tensors))
        for a, b in zip(flat(got), flat(want), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, name
            error = ((a.cpu().float() - b.float()).norm() / b.float().norm()).item()
            quantised = rows or name == "quantise"
            assert error < TOLERANCE[torch.float8_e4m3fn if quantised else dtype], f"{name}: {error:.1e}"


def test_rotation_into_a_part_of_a_buffer():
    x, factors = torch.randn(1, 4, 2, HEAD, device="cuda"), torch.randn(4, HEAD // 2, 2, device="cuda")
    buffer = torch.zeros(1, 12, 2, HEAD, device="cuda")
    rotate(x, factors, out=buffer[:, 4:8])
    assert torch.equal(buffer[:, 4:8], rotate(x, factors))
    assert not buffer[:, :4].any() and not buffer[:, 8:].any()


def test_rotary_factors_are_the_same_on_every_device():
    from liveavatar_core.geometry import Geometry

    geometry = Geometry(384, 704)
    for table, where in ((block_factors, 0), (block_factors, 1_000_000), (reference_factors, 77)):
        want = table(where, geometry, 128, True)
        assert torch.equal(table(where, geometry, 128, True, "cuda").cpu(), want), (table.__name__, where)


def test_attention():
    q, k, v = (torch.randn(1, tokens, 4, 128, device="cuda") for tokens in (100, 700, 700))
    got = attend(*(x.bfloat16() for x in (q, k, v))).float()
    want = attend(q, k, v)
    assert ((got - want).norm() / want.norm()).item() < 5e-3  # bfloat16


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("tokens", [3, 15, 512])
def test_fp8_product(tokens, by_row):
    if not has_fp8(torch.device("cuda")):
        pytest.skip("the card has no fp8")
    torch.manual_seed(0)
    linear = Fp8Linear(256, 128, by_row=by_row)
    linear.store(torch.randn(128, 256) / 16)
    linear.bias.data = torch.randn(128).bfloat16()
    x = torch.randn(1, tokens, 256).bfloat16()
    want = linear(x).float()
    got = linear.cuda()(x.cuda()).cpu().float()
    assert ((got - want).norm() / want.norm()).item() < 5e-3  # bf16 results, fast accumulation


def test_weights_alone_in_fp8(monkeypatch):
    """What a card without fp8 does, against the same on the CPU in float32."""
    torch.manual_seed(0)
    linear = Fp8Linear(256, 128)
    linear.store(torch.randn(128, 256) / 16)
    linear.bias.data = torch.randn(128).bfloat16()
    x = torch.randn(1, 50, 256).bfloat16()
    want = scaled_linear(x.float(), linear.weight, linear.weight_scale, linear.bias.float())
    monkeypatch.setattr(quant, "has_fp8", lambda device: False)
    linear = linear.cuda()
    assert not linear.takes_rows
    got = linear(x.cuda()).cpu().float()
    assert ((got - want).norm() / want.norm()).item() < 5e-3  # bf16
