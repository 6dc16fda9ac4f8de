"""The decoder's kernels against their plain forms; the streaming decoder on a GPU, alone and beside other work."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from liveavatar_core.encoders import maps
from liveavatar_core.encoders.decoder import decode
from liveavatar_core.encoders.maps import Sum, causal, double, twice
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHANNELS = 96  # three times a power of two, as in the published model
BF16 = 6e-3  # relative L2 of one rounding of the input, one of the kernel and one of the result


@pytest.fixture(autouse=True)
def _exact():
    with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
        yield


@pytest.fixture
def plain(monkeypatch):
    """Switch the kernels off."""

    def switch() -> None:
        monkeypatch.setattr(maps, "_kernels", lambda device: None)
        monkeypatch.setattr(maps, "_convolves", lambda device: False)

    return switch


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda")


CASES = {  # function of (Sum, past, kernel, gamma), and the kernel's shape
    "causal": (lambda s, past, w, g: causal(s, past, w, g, keep=True), (192, CHANNELS, 3, 3, 3)),
    "same width": (lambda s, past, w, g: causal(s, past, w, g), (CHANNELS, CHANNELS, 3, 3, 3)),
    "without norm": (lambda s, past, w, g: causal(s, past, w, keep=True), (384, CHANNELS, 3, 3, 3)),
    "to pixels": (lambda s, past, w, g: causal(s, past, w, g), (3, CHANNELS, 3, 3, 3)),
    "twice": (
        lambda s, past, w, g: twice(s, past, w, w.flatten(1)[:, 0].contiguous()),
        (2 * CHANNELS, CHANNELS, 3, 1, 1),
    ),
    "double": (lambda s, past, w, g: double(s, w), (CHANNELS, CHANNELS, 3, 3)),
}


def results(function, given, past, weight, gamma, dtype: torch.dtype) -> list[torch.Tensor]:
    """All that the function returns, and the past as it leaves it."""
    held, copies = past.to(dtype, copy=True), (x.to(dtype, copy=True) for x in given)
    result = function(Sum(*copies), held, weight.to(dtype), gamma.to(dtype))
    result = result if isinstance(result, tuple) else (result,)
    return [x for x in (*result, held) if x is not None]


@pytest.mark.parametrize("parts", [1, 2, 3], ids=["x", "x + bias", "x + bias + skip"])
@pytest.mark.parametrize("size", [(3, 8, 12), (2, 5, 7), (1, 6, 10), (6, 48, 40)], ids=str)
def test_kernels_agree_with_the_plain_form(size, parts):
    """In bf16 with kernels, against the plain form in float32 of the same numbers."""
    assert maps._kernels(torch.device("cuda", 0)) is not None
    torch.manual_seed(0)
    for name, (function, shape) in CASES.items():
        weight = draw(*shape) / (shape[1] * 9) ** 0.5
        given = [draw(*size, CHANNELS), draw(CHANNELS), draw(*size, CHANNELS)][:parts]
        past, gamma = draw(2, *size[1:], CHANNELS), 1 + 0.2 * draw(CHANNELS)
        given = [x.bfloat16() for x in given]
        weight, past, gamma = weight.bfloat16(), past.bfloat16(), gamma.bfloat16()
        got = results(function, given, past, weight, gamma, torch.bfloat16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maps, "_kernels", lambda device: None)
            want = results(function, given, past, weight, gamma, torch.float32)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape and a.dtype == torch.bfloat16, name
            assert distance(a, b) < BF16, f"{name}: {distance(a, b):.1e}"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AutoencoderKLWan().cuda()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def test_no_further_from_float32_than_the_plain_decoder(model, plain):
    """The published sizes. Both round to bf16 on the way; ours at fewer places."""
    parts = draw(16, 7, 8, 12).split([1, 3, 3], 1)

    def walked(decoder: torch.nn.Module) -> torch.Tensor:
        past, dtype = {}, decoder.conv_in.weight.dtype
        return torch.cat([decode(decoder, z.permute(1, 2, 3, 0).to(dtype).contiguous(), past) for z in parts])

    def theirs(decoder: torch.nn.Module) -> torch.Tensor:
        caches, dtype = [None] * 64, decoder.conv_in.weight.dtype
        frames = [decoder(z[None].to(dtype), feat_cache=caches, feat_idx=[0])[0] for z in parts]
        return torch.cat(frames, 1).permute(1, 2, 3, 0)

    want = theirs(model.decoder)
    assert distance(walked(model.decoder), want) < 1e-4  # float32: norms and sums between convolutions are fused
    model.decoder.bfloat16()
    try:
        fused, by_diffusers = walked(model.decoder), theirs(model.decoder)
        plain()
        unfused = walked(model.decoder)
    finally:
        model.decoder.float()
    errors = [distance(x, want) for x in (fused, unfused, by_diffusers)]
    print("relative L2 to float32 of kernels, plain form, diffusers:", *(f"{error:.2e}" for error in errors))
    assert errors[0] < 1.1 * errors[2] and errors[1] < 1.1 * errors[2]


def test_frames_do_not_depend_on_what_runs_beside():
    """Pixels arrive in host memory while another stream keeps the device busy, and are the same bits."""
    vae = WanVAE(AutoencoderKLWan(base_dim=32).cuda().bfloat16())
    blocks = [block.cpu() for block in draw(16, 10, 8, 12).split([1, 3, 3, 3], 1)]

    def decoded() -> torch.Tensor:
        stream = StreamDecoder(vae)
        stream.prime(blocks[0])
        return torch.cat([stream.decode(block) for block in blocks[1:]])

    alone = decoded()
    assert alone.device.type == "cpu" and alone.is_contiguous() and alone.shape == (36, 64, 96, 3)
    other, x = torch.cuda.Stream(), draw(4096, 4096)
    with torch.cuda.stream(other):
        for _ in range(200):
            x = F.normalize(x @ x)
    beside = decoded()
    busy = not other.query()
    assert torch.equal(beside, alone)
    other.synchronize()
    assert busy, "the other stream was done too early to show anything"


def test_latents_may_be_freed_at_once():
    """Those on the device, made on the caller's stream and dropped while the decoder still reads them."""
    vae = WanVAE(AutoencoderKLWan(base_dim=32).cuda().bfloat16())
    latents = draw(16, 4, 8, 12)
    stream = StreamDecoder(vae)
    want = stream.decode(latents)
    stream.reset()
    for _ in range(3):
        given = latents.clone()
        stream.prime(given)
        del given
        torch.full_like(latents, torch.nan)  # where it was
        stream.reset()
    given = latents[:, :1].clone()
    stream.prime(given)
    del given
    torch.full_like(latents[:, :1], torch.nan)
    assert torch.equal(stream.decode(latents[:, 1:]), want[1:])


def test_latents_of_a_gpu_are_decoded_on_a_cpu():
    vae = WanVAE(AutoencoderKLWan(base_dim=32))
    latents = draw(16, 2, 8, 12)
    assert torch.equal(StreamDecoder(vae).decode(latents), StreamDecoder(vae).decode(latents.cpu()))
