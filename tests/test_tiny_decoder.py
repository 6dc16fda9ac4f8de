"""Small decoders: the published layouts, streams equal to whole decoding, and frames where the full VAE has them."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save

from liveavatar_core.encoders.tiny_decoder import LATENT_MEAN, LATENT_STD, TinyStreamDecoder, is_tiny, load_tiny
from liveavatar_core.encoders.vae import StreamDecoder, load_vae
from liveavatar_core.errors import WeightsError
from liveavatar_core.geometry import FRAMES_PER_BLOCK, PRIME_LATENTS
from liveavatar_core.pipeline.stream import frame_chunks

DATA = Path(__file__).parent / "data"
LATENTS = 9
SPLITS = ([9], [1, 8], [1] * 9, [2, 7], [3, 3, 3], [7, 1, 1], [4, 5])
PUBLISHED_BYTES = {"taew2_1_keys.txt": 45_274_004, "lightvaew2_1_keys.txt": 32_160_476}


def published_shapes(name):
    lines = (line.split() for line in (DATA / name).read_text().splitlines() if not line.startswith("#"))
    return {key: tuple(map(int, shape.split("x"))) for key, shape in lines}


@pytest.fixture(scope="module")
def state():
    """The layout of taew2_1, every width a 32nd."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        name: tuple(size // 32 if size >= 64 else size for size in shape)
        for name, shape in published_shapes("taew2_1_keys.txt").items()
    }
    return {name: torch.randn(shape, generator=generator) * 0.25 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def vae(state):
    # float64: kernels may sum in another order for another number of frames, which must not move a byte here.
    return load_tiny(state, normalised=True, dtype=torch.float64, device="cpu")


@pytest.fixture(scope="module")
def latents():
    return torch.randn(16, LATENTS, 2, 2, generator=torch.Generator().manual_seed(1))


def decode_all(stream, latents, split):
    return torch.cat([stream.decode(piece) for piece in latents.split(split, 1)])


@pytest.mark.parametrize(("name", "nbytes"), PUBLISHED_BYTES.items())
def test_the_key_lists_are_those_of_the_published_files(name, nbytes):
    assert len(save({key: torch.zeros(shape) for key, shape in published_shapes(name).items()})) == nbytes


def test_the_published_layouts_load():
    tiny = {name: torch.zeros(shape) for name, shape in published_shapes("taew2_1_keys.txt").items()}
    stream = TinyStreamDecoder(load_tiny(tiny, normalised=True, dtype=torch.bfloat16, device="cpu"))
    assert stream.decode(torch.zeros(16, 1, 2, 2)).shape == (1, 16, 16, 3)
    held = sum(tensor.nbytes for tensor in stream._past.values())
    assert held * (704 // 16) * (384 // 16) == pytest.approx(45e6, rel=0.01)  # as the class says
    pruned = {name: torch.zeros(shape) for name, shape in published_shapes("lightvaew2_1_keys.txt").items()}
    assert not is_tiny(pruned)
    full = load_vae(pruned, dtype=torch.float32, device="cpu")
    assert StreamDecoder(full).decode(torch.zeros(16, 1, 2, 2)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_stream_equals_whole(vae, latents, split):
    whole = vae.decode(latents, {})[3:].float()
    assert whole.min() < 0 and whole.max() > 1, "nothing is clamped"
    as_bytes = (whole.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(decode_all(TinyStreamDecoder(vae), latents, split), as_bytes)


def test_frames_are_those_of_the_full_vae(vae, latents):
    torch.manual_seed(0)
    full = StreamDecoder(load_vae(AutoencoderKLWan(base_dim=2).state_dict(), dtype=torch.float32, device="cpu"))
    tiny = TinyStreamDecoder(vae)
    for piece in latents.split([1, 3, 2, 3], 1):
        got, want = tiny.decode(piece), full.decode(piece)
        assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    # As in the full VAE, latent k is first seen in frame 4 k - 3.
    base = decode_all(TinyStreamDecoder(vae), latents, LATENTS)
    for k in range(1, LATENTS):
        changed = latents.clone()
        changed[:, k] *= -1
        moved = (decode_all(TinyStreamDecoder(vae), changed, LATENTS) != base).flatten(1).any(1)
        assert not moved[: 4 * k - 3].any() and moved[4 * k - 3 : 4 * k + 1].all()


def test_blocks_of_a_video(vae):
    generator = torch.Generator().manual_seed(2)
    blocks = [(block, torch.randn(16, 3, 2, 2, generator=generator)) for block in range(3)]
    motion = torch.randn(16, 19, 2, 2, generator=generator)
    chunks = list(frame_chunks(iter(blocks), TinyStreamDecoder(vae), motion, 3 * FRAMES_PER_BLOCK - 5))
    assert [(chunk.first_frame, len(chunk.frames)) for chunk in chunks] == [(0, 9), (9, 12), (21, 10)]
    whole = decode_all(TinyStreamDecoder(vae), torch.cat([motion[:, :PRIME_LATENTS], *(b for _, b in blocks)], 1), 16)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), whole[-33:][:-2])


def test_memory_does_not_grow(vae, latents, monkeypatch):
    groups, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda part, past: (groups.append(part.shape[1]), decode(part, past))[1])
    stream = TinyStreamDecoder(vae)
    for piece in latents.split(4, 1):
        stream.decode(piece)
        kept = stream._past.values()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes and len(tensor) == 1 for tensor in kept)
    assert groups == [3, 1, 3, 1, 1]


def test_streams_do_not_meet(vae, latents):
    alone = decode_all(TinyStreamDecoder(vae), latents, 3)
    ours, theirs = TinyStreamDecoder(vae), TinyStreamDecoder(vae)
    got = []
    for piece in latents.split(3, 1):
        got.append(ours.decode(piece))
        theirs.decode(-piece)
    assert torch.equal(torch.cat(got), alone)


def test_reset_starts_a_new_sequence(vae, latents, monkeypatch):
    stream = TinyStreamDecoder(vae)
    first = stream.decode(latents[:, :3])
    assert len(stream.decode(latents[:, :1])) == 4  # without a reset the old sequence goes on
    stream.reset()
    assert torch.equal(stream.decode(latents[:, :3]), first)
    with monkeypatch.context() as patch:
        patch.setattr(vae, "_grow", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            stream.decode(latents[:, 3:6])
    assert torch.equal(stream.decode(latents[:, :3]), first), "half a block is remembered"


def test_latents_are_scaled_as_the_file_wants_them(state, latents):
    config = AutoencoderKLWan(base_dim=2).config
    assert list(LATENT_MEAN) == config.latents_mean and list(LATENT_STD) == config.latents_std
    mean, std = (torch.tensor(values).reshape(-1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    raw = load_tiny(state, normalised=False, dtype=torch.float32, device="cpu")
    plain = load_tiny(state, normalised=True, dtype=torch.float32, device="cpu")
    assert torch.equal(raw.decode(latents, {}), plain.decode(latents * std + mean, {}))


def test_wrong_shapes(vae):
    for shape in ((16, 0, 2, 2), (1, 1, 2, 2), (16, 2, 2)):
        with pytest.raises(ValueError, match="latents are"):
            TinyStreamDecoder(vae).decode(torch.zeros(shape))


def test_wrong_files(state):
    def refusal(tensors):
        assert is_tiny(tensors)
        with pytest.raises(WeightsError) as caught:
            load_tiny(tensors, normalised=True, dtype=torch.float32, device="cpu")
        assert "\n" not in str(caught.value) and str(caught.value).endswith("choose taew2_1 or lighttaew2_1")
        return str(caught.value)

    for_wan_22 = state | {"decoder.1.weight": torch.zeros(8, 48, 3, 3), "decoder.22.weight": torch.zeros(12, 2, 3, 3)}
    assert "decoder.1.weight is (8, 48, 3, 3) where (8, 16, 3, 3) is needed (2 such" in refusal(for_wan_22)
    assert "decoder.5.conv.2.bias is missing" in refusal(
        {name: tensor for name, tensor in state.items() if name != "decoder.5.conv.2.bias"}
    )
    extra = state | {"decoder.23.weight": torch.zeros(1)}
    assert "decoder.23.weight is (1,) where no such tensor is needed" in refusal(extra)
    assert not is_tiny(AutoencoderKLWan(base_dim=2).state_dict())
