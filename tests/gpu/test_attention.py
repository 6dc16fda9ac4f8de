"""Attention's kernels on a GPU against attention written out in float32, heads in 8 bits against their plain form."""

import pytest
import torch
from torch import Tensor

from liveavatar_core.model import attention
from liveavatar_core.model.pointwise import FP8, Heads, dequantise_heads, quantise_heads, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16 = 3e-3  # relative L2: weights and results are rounded to bfloat16
SIZES = [(1, 1, 1), (64, 100, 2), (65, 128, 1), (200, 300, 3), (500, 7, 5), (257, 1025, 40)]  # queries, keys, heads


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def kernel(name: str):
    try:
        loaded = {"gluon": attention._gluon, "triton": attention._triton}[name]()
    except ImportError as error:
        pytest.skip(str(error))
    if name == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper")
    return loaded


def draw(queries: int, keys: int, heads: int, sharpness: float = 1.0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(queries + keys)
    q, k, v = (
        torch.randn(1, n, heads, 128, generator=generator, device="cuda").bfloat16() for n in (queries, keys, keys)
    )
    return [q * sharpness, k, v]


def written_out(*heads: Tensor | Heads) -> Tensor:
    q, k, v = (dequantise_heads(x, torch.float32) if isinstance(x, Heads) else x.float() for x in heads)
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["gluon", "triton"])
def test_kernel_agrees_at_odd_sizes(name, size):
    q, k, v = draw(*size)
    q, k = quantise_heads(q), quantise_heads(k)
    assert error(kernel(name)(q, k, v), written_out(q, k, v)) < BF16


def test_a_kernel_with_a_fixed_shift_does_very_sharp_tiles_again():
    """Logits some 300 above those of the first tile seen: e to that is no float32."""
    q, k, v = draw(300, 1000, 3, sharpness=60)
    q[:, 150:] /= 60  # tiles that need no second time are beside those that do
    logits = q.float().transpose(1, 2) @ k.float().transpose(1, 2).mT / 128**0.5
    assert (logits.amax(-1) - logits[..., 896:].amax(-1)).max() > 100
    q, k = quantise_heads(q), quantise_heads(k)
    assert error(kernel("gluon")(q, k, v), written_out(q, k, v)) < BF16


def test_scales_may_lie_in_any_order():
    q, k, v = draw(200, 300, 3)
    q, k = quantise_heads(q), quantise_heads(k)
    turned = Heads(k.values, k.scale.transpose(1, 2).contiguous().transpose(1, 2))
    assert turned.scale.stride() != k.scale.stride()
    for name in ("gluon", "triton"):
        assert torch.equal(kernel(name)(q, k, v), kernel(name)(q, turned, v))


@pytest.mark.parametrize("shape", [(3, 50, 2, 128), (1, 50, 2, 64), (1, 50, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_some_kernel_does_every_shape(dtype, shape):
    q, k, v = torch.randn((3, *shape), device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    assert error(attention.attend(q, k, v), written_out(q, k, v)) < BF16
    if shape[0] == 1:
        q, k = quantise_heads(q), quantise_heads(k)
        assert error(attention.attend(q, k, v), written_out(q, k, v)) < BF16


def test_a_wrong_or_broken_kernel_is_passed_over(caplog):
    def broken() -> attention.Kernel:
        raise RuntimeError("no such instruction")

    samples = attention._samples(torch.device("cuda"), torch.bfloat16, 1, 128)
    known = {
        "broken": broken,
        "wrong": lambda: lambda q, k, v: torch.zeros_like(q),
        "right": lambda: attention._torch,
    }
    with caplog.at_level("INFO"):
        assert attention._first(known, samples) is attention._torch
    assert [record.getMessage().split(" ")[1] for record in caplog.records] == ["broken", "wrong", "right"]


@pytest.mark.parametrize("kind", [torch.int8, FP8])
@pytest.mark.parametrize("width", [64, 128, 96])
def test_heads_in_eight_bits_agree_with_the_plain_form(kind, width):
    generator = torch.Generator().manual_seed(width)
    x, norm = torch.randn(1, 9, 5, width, generator=generator).bfloat16(), torch.rand(5 * width, generator=generator)
    factors = torch.randn(9, width // 2, 2, generator=generator)
    for given in ((), (factors,)):
        options = {"norm_D": norm.bfloat16()} if given else {}
        want = quantise_heads(x, *given, kind=kind, **options)
        moved = {name: tensor.cuda() for name, tensor in options.items()}
        got = quantise_heads(x.cuda(), *(table.cuda() for table in given), kind=kind, **moved)
        # Another order of sums: a value beside a boundary may fall to the other side, by one step.
        differing = got.values.cpu().float() != want.values.float()
        assert differing.float().mean() < 2e-2
        assert ((got.scale.cpu() - want.scale).abs() / want.scale).max() < 5e-3  # a bfloat16 rounding before
        back = dequantise_heads(got, torch.bfloat16)
        assert torch.equal(back.cpu(), dequantise_heads(Heads(got.values.cpu(), got.scale.cpu()), torch.bfloat16))
        exact = rotate(x.cuda(), factors.cuda(), norm_D=norm.bfloat16().cuda()) if given else x.cuda()
        fused_too = quantise_heads(exact, kind=kind).values.float() == got.values.float()
        assert fused_too.float().mean() > 0.998, "fused with the rotation or not"
