"""Streamed decoding equals whole decoding for any cut, streams do not meet, and wrong files are named."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from liveavatar_core.encoders import vae as vae_module
from liveavatar_core.encoders.decoder import decode
from liveavatar_core.encoders.vae import StreamDecoder, WanVAE, load_vae, read_vae
from liveavatar_core.errors import WeightsError

LATENTS = 9
SPLITS = ([9], [1, 8], [1] * 9, [2, 7], [3, 3, 3], [7, 1, 1], [1, 2, 1, 3, 2], [4, 5])


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16).state_dict()


@pytest.fixture(scope="module")
def vae(state):
    return load_vae(state, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(16, LATENTS, 2, 2, generator=torch.Generator().manual_seed(1))


def decode_all(stream, latents, split):
    return torch.cat([stream.decode(piece) for piece in latents.split(split, 1)])


def as_bytes(frames):
    return ((frames + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@torch.inference_mode()
def test_stream_equals_whole(state, latents, split):
    # float64: kernels may sum in another order for another number of frames, which must not move a byte here.
    vae = load_vae(state, dtype=torch.float64, device="cpu")
    assert torch.equal(decode_all(StreamDecoder(vae), latents, split), as_bytes(vae.decode(latents)))


@torch.inference_mode()
def test_stream_equals_diffusers(vae, latents):
    plain = latents * vae.latent_std + vae.latent_mean
    theirs = vae.model.decode(plain[None]).sample[0]
    # One latent at a time against three, and another layout of the weights: sums in another order.
    torch.testing.assert_close(vae.decode(latents), theirs, rtol=0, atol=2e-5)
    assert torch.equal(vae.decode(latents[:, :7]), vae.decode(latents)[:, :25])


@torch.inference_mode()
def test_prime_is_decode_without_pixels(vae, latents):
    stream = StreamDecoder(vae)
    stream.prime(latents[:, :7])
    got = stream.decode(latents[:, 7:])
    assert got.shape == (8, 16, 16, 3) and got.dtype == torch.uint8 and got.is_contiguous()
    difference = (got.int() - as_bytes(vae.decode(latents)).int()[25:]).abs().max()
    assert difference <= 1  # groups of 1+3+3+2 against 1+3+3+3: a float32 sum may round the other way


@torch.inference_mode()
def test_later_calls_run_the_decoder_once(vae, latents, monkeypatch):
    calls = []
    monkeypatch.setattr(vae_module, "decode", lambda model, z, past: (calls.append(len(z)), decode(model, z, past))[1])
    stream = StreamDecoder(vae)
    stream.decode(latents[:, :3])
    stream.decode(latents[:, 3:6])
    assert calls == [1, 2, 3]


@torch.inference_mode()
def test_streams_and_encodes_do_not_meet(vae, latents):
    alone = decode_all(StreamDecoder(vae), latents, 3)
    ours, theirs = StreamDecoder(vae), StreamDecoder(vae)
    got = []
    for piece in latents.split(3, 1):
        got.append(ours.decode(piece))
        theirs.decode(-piece)
        vae.encode(torch.zeros(3, 5, 16, 16))
        vae.decode(piece)
    assert torch.equal(torch.cat(got), alone)


@torch.inference_mode()
def test_reset_starts_a_new_session(vae, latents):
    stream = StreamDecoder(vae)
    first = decode_all(stream, latents, 3)
    assert len(stream.decode(latents[:, :1])) == 4  # without a reset the old sequence goes on
    stream.reset()
    assert torch.equal(decode_all(stream, latents, 3), first)


@torch.inference_mode()
def test_an_error_resets_the_stream(vae, latents, monkeypatch):
    stream = StreamDecoder(vae)
    first = stream.decode(latents[:, :3])
    with monkeypatch.context() as patch:
        patch.setitem(vae.model.decoder.conv_out._parameters, "weight", torch.zeros(3, 1, 3, 3, 3))
        with pytest.raises(RuntimeError):  # after all convolutions but the last have moved on
            stream.decode(latents[:, 3:6])
    assert torch.equal(stream.decode(latents[:, :3]), first)


@torch.inference_mode()
def test_encode(vae):
    frames = torch.rand(3, 12, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    got = vae.encode(frames)
    assert got.shape == (16, 3, 2, 2) and got.dtype == torch.float32
    assert torch.equal(got, vae.encode(frames[:, :9]))  # frames beyond 1 + 4n do not count
    theirs = vae.model.encode(frames[None]).latent_dist.mean[0]
    torch.testing.assert_close(got, (theirs - vae.latent_mean) / vae.latent_std)
    assert vae.encode(frames[:, :1]).shape == (16, 1, 2, 2)


def test_wrong_shapes(vae):
    with pytest.raises(ValueError, match="frames are"):
        vae.encode(torch.zeros(3, 0, 16, 16))
    for shape in ((16, 0, 2, 2), (1, 1, 2, 2), (16, 2, 2)):
        with pytest.raises(ValueError, match="latents are"):
            vae.decode(torch.zeros(shape))


def test_files(state, vae, latents, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        read = read_vae(tmp_path / name, dtype=torch.bfloat16, device="cpu").to(dtype=torch.float32)
        assert isinstance(read, WanVAE) and read.dtype == torch.float32 and read.device.type == "cpu"
        assert read.decode(latents[:, :1]).shape == (3, 1, 16, 16)


def test_sizes_come_from_the_tensors(state):
    torch.manual_seed(0)
    other = AutoencoderKLWan(base_dim=2, dim_mult=[1, 2, 2, 3], temperal_downsample=[True, False, True])
    model = load_vae(other.state_dict(), dtype=torch.float32, device="cpu").model
    assert model.config.dim_mult == [1, 2, 2, 3] and model.config.temperal_downsample == [True, False, True]


def test_wrong_files(state, tmp_path):
    def load(tensors):
        load_vae(tensors, dtype=torch.float32, device="cpu")

    name = "decoder.mid_block.resnets.0.conv1.weight"
    with pytest.raises(WeightsError, match=f"lacks {name} .*again$"):
        load({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(WeightsError, match="unknown more.weight"):
        load(state | {"more.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=f"wrong shape of {name}"):
        load(state | {name: torch.zeros(1)})
    with pytest.raises(WeightsError, match="has 1 tensors .*Wan 2.1"):
        load({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="48 latent channels"):
        load(AutoencoderKLWan(base_dim=2, z_dim=48).state_dict())
    for suffix in ("safetensors", "pth"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"not a checkpoint")
        for path in (tmp_path / f"broken.{suffix}", tmp_path / f"absent.{suffix}"):
            with pytest.raises(WeightsError, match="cannot be read"):
                read_vae(path, dtype=torch.float32, device="cpu")
