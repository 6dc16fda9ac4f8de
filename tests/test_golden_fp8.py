"""The recorded fp8 linear: bytes, scales and outputs, and which linears are converted."""

import torch
from torch import Tensor

from liveavatar_core.model.pointwise import Rows, quantise_rows
from liveavatar_core.weights.build import empty_dit
from liveavatar_core.weights.quant import Fp8Linear, dequantised_linear, quantise_fp8, quantise_linears, scaled_linear

SCALE = 1e-6
EXACT = 0.0
FLOAT32 = 5e-6  # another order of sums in the product
BF16_STEP = 2.0**-7  # where such a sum falls to the other side of a rounding: one step of the largest value


def cases(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]


def codes(x: Tensor) -> Tensor:
    return x.view(torch.uint8).int()


def test_every_recorded_tensor_is_compared(golden) -> None:
    tensors, _ = golden("fp8")
    fed = {"weight", "bias", "x"}
    compared = {"weight_fp8", "weight_scale", "x_fp8", "x_scale", "y", "y_f32"}
    other = {"weight_fp8_fused", "x_fp8_fused", "y_fused", "x_fp8_scale_in_x_dtype"}
    assert cases(tensors)
    assert {name.rpartition(".")[2] for name in tensors} == fed | compared | other


def test_bytes_and_scales(golden, agree) -> None:
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        for part in ("weight", "x"):
            values, factor = quantise_fp8(tensors[f"{case}.{part}"])
            want = tensors[f"{case}.{part}_fp8"].int()
            agree("fp8", f"{case} {part} bytes", codes(values).reshape(want.shape), want, EXACT)
            agree("fp8", f"{case} {part} scale", factor, tensors[f"{case}.{part}_scale"], SCALE)


def test_fused_kernels_stay_within_one_code(golden) -> None:
    """Not our arithmetic but what a card may do: pins how far two right answers may be apart."""
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        for part in ("weight", "x"):
            values, _ = quantise_fp8(tensors[f"{case}.{part}"])
            fused = tensors[f"{case}.{part}_fp8_fused"].int()
            difference = (codes(values).reshape(fused.shape) - fused).abs()
            assert difference.max() <= 1 and difference.bool().float().mean() <= 0.05, case


def test_outputs(golden, agree) -> None:
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        weight, x = tensors[f"{case}.weight"], tensors[f"{case}.x"]
        linear = Fp8Linear(weight.shape[1], weight.shape[0], by_row=False)
        linear.store(weight)
        linear.bias = torch.nn.Parameter(tensors[f"{case}.bias"], requires_grad=False)
        y, want = linear(x), tensors[f"{case}.y"]
        assert y.dtype == want.dtype
        agree("fp8", f"{case} y", y, want, BF16_STEP)
        assert bf16_steps(y, want) <= 1, case
        assert torch.equal(y, y.bfloat16().to(y.dtype)), f"{case}: not rounded to bf16"


def bf16_steps(a: Tensor, b: Tensor) -> int:
    """Largest distance in representable values."""

    def ordinal(x: Tensor) -> Tensor:
        bits = x.bfloat16().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordinal(a) - ordinal(b)).abs().max())


def test_product_before_rounding(golden, agree) -> None:
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        values, scale = quantise_fp8(tensors[f"{case}.x"].flatten(0, -2))
        weight, weight_scale = quantise_fp8(tensors[f"{case}.weight"])
        y = dequantised_linear(values, scale, weight, weight_scale, tensors[f"{case}.bias"])
        agree("fp8", f"{case} y_f32", y, tensors[f"{case}.y_f32"], FLOAT32)


def test_scales_by_row_are_closer(golden) -> None:
    """Against the product in full precision, on the recorded weights with one loud token among quiet ones."""
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        weight, bias = tensors[f"{case}.weight"], tensors[f"{case}.bias"]
        x = tensors[f"{case}.x"].flatten(0, -2).unsqueeze(0).clone()
        x[:, 0] *= 100
        want = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        errors = []
        for by_row in (True, False):
            linear = Fp8Linear(weight.shape[1], weight.shape[0], by_row=by_row)
            linear.store(weight)
            linear.bias = torch.nn.Parameter(bias, requires_grad=False)
            y = linear(x)
            errors.append(((y.float() - want).norm(dim=-1) / want.norm(dim=-1)).mean().item())
            if by_row:
                rows = quantise_rows(x)
                assert isinstance(rows, Rows) and torch.equal(linear(rows), y.to(bias.dtype)), case
        assert errors[0] < 0.05 and errors[0] < errors[1], f"{case}: {errors}"


def test_weights_alone_in_fp8(golden) -> None:
    """The way of cards without fp8: as close as the rounding of the weights allows."""
    tensors, _ = golden("fp8")
    for case in cases(tensors):
        weight, bias, x = (tensors[f"{case}.{part}"].float() for part in ("weight", "bias", "x"))
        linear = Fp8Linear(weight.shape[1], weight.shape[0])
        linear.store(weight)
        want = torch.nn.functional.linear(x, weight)
        got = scaled_linear(x, linear.weight, linear.weight_scale, bias) - bias
        assert (got - want).norm() < 0.04 * want.norm(), case


def test_zeros_stay_zeros(golden) -> None:
    _, manifest = golden("fp8")
    values, factor = quantise_fp8(torch.zeros(3, 16))
    assert codes(values).count_nonzero() == manifest["all_zero_input"]["nonzero_bytes"]
    assert abs(1 / factor.item() - manifest["all_zero_input"]["scale"]) < 1e-3


def test_converted_linears(golden, golden_config) -> None:
    _, manifest = golden("fp8")
    model = empty_dit(golden_config)
    assert sorted(quantise_linears(model)) == sorted(manifest["converted"])
    left = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert sorted(left) == sorted(manifest["not_converted"])
    packed = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert sorted(packed) == sorted(manifest["converted"])
