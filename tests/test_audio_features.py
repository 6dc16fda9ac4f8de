"""Rates and indices as published, windows that agree with the whole, and wav2vec2's last hidden state."""

import weakref

import numpy
import pytest
import torch
from torch import nn

from liveavatar_core.encoders import audio_features as features
from liveavatar_core.encoders.audio_features import FeatureStream, load_speech_encoder
from liveavatar_core.errors import InputError, WeightsError

FIELD, STRIDE = features.HIDDEN_FIELD, features.HIDDEN_STRIDE


class Local:
    """A speech encoder without context: every hidden state is a function of its own 400 samples."""

    def __init__(self, states=2, width=3, dtype=torch.float32):
        self.mix = torch.randn(states, FIELD, width, generator=torch.Generator().manual_seed(0)) / FIELD**0.5
        self.dtype, self.lengths = dtype, []

    def __call__(self, samples):
        self.lengths.append(len(samples))
        return torch.einsum("tn,snd->std", samples.unfold(0, FIELD, STRIDE), self.mix).to(self.dtype)


def sound(seconds, seed=0):
    noise = torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed))
    return noise * 0.1 + 0.03


def whole(samples, encoder, fps, lead=0):
    """The original's way: all of the sound at once."""
    samples = torch.cat([torch.zeros(lead), samples])
    normal = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    hidden = encoder(normal)
    rated = nn.functional.interpolate(
        hidden.float().transpose(1, 2), size=int(hidden.shape[1] / 50 * 30), mode="linear", align_corners=True
    )
    return features.bucket(rated.transpose(1, 2).to(hidden.dtype).float(), fps)[0]


def blocks(stream, count):
    return torch.cat([stream.block(n) for n in range(count)], -1)


def test_published_numbers():
    assert [features.hidden_length(n) for n in (399, 400, 7680, 8000, 30720)] == [0, 1, 23, 24, 95]
    assert [features.feature_length(n) for n in (1, 2, 23, 24, 95, 885, 805)] == [0, 1, 13, 14, 57, 531, 483]
    assert [features.clip_count(n, 25) for n in (531, 347, 383, 483, 348)] == [10, 7, 7, 9, 7]
    assert features.frame_index(range(20), 1000, 25).tolist() == [
        0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 22, 23,
    ]  # fmt: skip
    assert features.feature_of_frame(4, 16) == 8 and features.feature_of_frame(12, 16) == 22  # half to even
    assert features.frame_index(range(12), 13, 25).tolist()[-2:] == [12, -1]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 51, 1000])
def test_interpolation_is_torchs(length):
    hidden = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(length))
    target = features.feature_length(length)
    got = features.to_feature_rate(hidden)
    assert got.shape == (2, target, 3)
    if target:
        want = nn.functional.interpolate(hidden.transpose(1, 2), target, mode="linear", align_corners=True)
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fps", [25, 16, 24, 30, 50])
@pytest.mark.parametrize("lead", [0, 3])
def test_short_sound_is_encoded_whole(fps, lead):
    encoder, samples = Local(), sound(2.3)
    stream = FeatureStream(samples, encoder, fps=fps, lead_frames=lead)
    want = whole(samples, Local(), fps, round(lead * 16_000 / fps))
    got = blocks(stream, want.shape[-1] // 12)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert len(encoder.lengths) == 1 and encoder.lengths[0] == len(samples) + round(lead * 16_000 / fps)
    assert (got[..., : stream.frames].abs().amax((0, 1)) > 0).all()
    assert (got[..., stream.frames :] == 0).all()
    assert (stream.block(10_000) == 0).all()


def test_states_in_bfloat16_are_rounded_after_interpolation():
    got = FeatureStream(sound(1), Local(dtype=torch.bfloat16), fps=25).block(0)
    assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())
    want = whole(sound(1), Local(dtype=torch.bfloat16), 25)[..., :12]
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    assert (got == want).float().mean() > 0.95  # one step of bfloat16 where float32 sums differ


@pytest.mark.parametrize("lead", [0, 3, 40])
def test_windows_agree_with_the_whole(lead):
    encoder, samples = Local(), sound(7.77)
    options = {"fps": 25, "lead_frames": lead, "window_seconds": 1.0, "context_seconds": 0.2}
    stream = FeatureStream(samples, encoder, **options)
    want = whole(samples, Local(), 25, lead * 640)
    count = want.shape[-1] // 12
    got = blocks(stream, count)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert len(encoder.lengths) == -(-features.hidden_length(len(samples) + lead * 640) // 50)
    assert max(encoder.lengths) == (70 - 1) * STRIDE + FIELD  # 1 s with 0.2 s on both sides

    shuffled = FeatureStream(samples, Local(), **options)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    found = {n: shuffled.block(n) for n in order}
    assert torch.equal(torch.cat([found[n] for n in range(count)], -1), got)


def test_context_reaches_both_sides():
    """An encoder that averages over half a second gets the same context in a window as in the whole."""

    def smooth(samples, local=Local()):  # noqa: B008
        return nn.functional.avg_pool1d(local(samples).transpose(1, 2), 25, 1, 12).transpose(1, 2)

    samples = sound(6)
    options = {"fps": 25, "window_seconds": 1.0}
    got = blocks(FeatureStream(samples, smooth, context_seconds=0.3, **options), 12)
    want = blocks(FeatureStream(samples, smooth, fps=25), 12)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (blocks(FeatureStream(samples, smooth, context_seconds=0.1, **options), 12) - want).abs().max() > 1e-2


def test_hours_of_sound_in_the_memory_of_one_window():
    samples = numpy.zeros(3 * 3600 * 16_000, numpy.float32)  # pages of zeros cost nothing until written
    samples[-160_000:] = sound(10).numpy()
    given, made = [], []

    def encoder(samples):
        assert not any(hidden() is not None for hidden in made)  # the old window goes before the new one comes
        given.append(len(samples))
        hidden = samples.unfold(0, FIELD, STRIDE).mean(-1)[None, :, None]
        made.append(weakref.ref(hidden))
        return hidden

    stream = FeatureStream(samples, encoder, fps=25, lead_frames=3)
    last = (stream.frames - 1) // 12
    assert last == 22_500
    for block in (0, 1, 41, 42, last // 2, last - 1, 0):  # block 41 lies in two windows
        assert stream.block(block).shape == (1, 1, 12)
    assert len(made) == 5 and max(given) <= 31 * 16_000
    assert stream.block(last - 1).abs().max() > 0 == stream.block(last + 1).abs().max()
    held = [value for value in vars(stream).values() if torch.is_tensor(value)]
    assert [tensor.data_ptr() for tensor in held] == [samples.ctypes.data]  # the samples themselves, not a copy


def test_silence_and_constants_give_numbers():
    for level in (0.0, 0.25, -1.0):
        assert FeatureStream(torch.full((16_000,), level), Local(), fps=25).block(0).isfinite().all()


def test_refusals():
    with pytest.raises(InputError, match="719 samples"):
        FeatureStream(torch.zeros(719), Local(), fps=25)
    assert FeatureStream(torch.zeros(720), Local(), fps=25).frames == 1
    with pytest.raises(ValueError, match="mono"):
        FeatureStream(torch.zeros(2, 16_000), Local(), fps=25)
    with pytest.raises(WeightsError, match="choose a wav2vec2 encoder"):
        FeatureStream(torch.zeros(16_000), lambda samples: samples[None, :5, None], fps=25).block(0)


@pytest.fixture(scope="module")
def wav2vec2():
    """A tiny model of the published kind: layer norm in front, 400 samples of field, 320 of stride."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True,
        feat_extract_norm="layer", conv_bias=True,
    )  # fmt: skip
    model = Wav2Vec2Model(config).eval()
    nn.init.normal_(model.encoder.layer_norm.weight)  # so that the norm can be seen
    nn.init.normal_(model.encoder.layer_norm.bias)
    return model


@pytest.fixture(scope="module")
def folder(wav2vec2, tmp_path_factory):
    path = tmp_path_factory.mktemp("wav2vec2")
    wav2vec2.save_pretrained(path)
    return path


@torch.inference_mode()
def test_wav2vec2_states(wav2vec2, folder):
    encoder = load_speech_encoder(folder, dtype=torch.float32, device="cpu")
    samples = sound(0.5)
    got = encoder(samples)
    assert got.shape == (4, features.hidden_length(len(samples)), 16)

    taken = []
    for layer in wav2vec2.encoder.layers:
        layer.register_forward_hook(lambda _, given, out: taken.extend([given[0], out[0]]))
    last = wav2vec2(samples[None]).last_hidden_state
    want = [taken[0], taken[2], taken[4], last]  # before layers 1, 2, 3; after the final norm
    torch.testing.assert_close(got, torch.stack([state.reshape(-1, 16) for state in want]), rtol=0, atol=1e-5)
    unnormed = taken[5].reshape(-1, 16)
    torch.testing.assert_close(wav2vec2.encoder.layer_norm(unnormed), got[-1], rtol=0, atol=1e-5)
    assert (unnormed - got[-1]).abs().max() > 0.1


def test_wav2vec2_in_bfloat16_and_without_gradients(folder):
    got = load_speech_encoder(folder, dtype=torch.bfloat16, device="cpu")(sound(0.3))
    assert got.dtype == torch.bfloat16 and not got.requires_grad


def test_incomplete_folders(folder, wav2vec2, tmp_path):
    def load():
        load_speech_encoder(tmp_path, dtype=torch.float32, device="cpu")

    with pytest.raises(WeightsError, match="no readable config.json; download"):
        load()
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(WeightsError, match="'whisper'; choose a wav2vec2 folder"):
        load()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match="cannot be read"):
        load()
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(WeightsError, match="cannot be read"):
        load()
    less = {k: v for k, v in wav2vec2.state_dict().items() if not k.startswith("encoder.layers.1.")}
    wav2vec2.save_pretrained(tmp_path, state_dict=less)
    with pytest.raises(WeightsError, match="lacks encoder.layers.1."):
        load()
