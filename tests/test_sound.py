"""Sound files of any rate and channels, and the sentences for those that cannot be used."""

import numpy
import pytest
import soundfile
import torch

from liveavatar_core.errors import InputError
from liveavatar_core.io.sound import check_sound, load_sound, to_speech


def tone(rate, seconds=0.5, channels=1, hertz=440):
    wave = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(rate * seconds)) / rate)
    return torch.stack([wave / (i + 1) for i in range(channels)])


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8_000, 1), (48_000, 6)])
def test_load_keeps_rate_and_channels(tmp_path, rate, channels):
    wave = tone(rate, channels=channels)
    soundfile.write(tmp_path / "a.wav", wave.T.numpy(), rate, subtype="FLOAT")
    got, got_rate = load_sound(tmp_path / "a.wav")
    assert got_rate == rate and got.dtype == torch.float32 and torch.equal(got, wave)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000, 12_345])
def test_speech_keeps_pitch_level_and_length(rate):
    got = to_speech(tone(rate, channels=2), rate)
    assert got.dtype == torch.float32
    samples = round(rate * 0.5)
    assert len(got) == -(-samples * 16_000 // rate)
    want = 0.75 * tone(16_000)[0]  # the mean of a tone and its half
    middle = slice(1000, 7000)  # away from the edges, where the filter rings
    assert (got[middle] - want[middle]).abs().max() < 2e-3


def test_speech_at_the_right_rate_is_not_copied():
    wave = tone(16_000)
    assert to_speech(wave, 16_000).data_ptr() == wave.data_ptr()


def test_nothing_audible_above_the_band():
    assert to_speech(tone(48_000, hertz=9_000), 48_000)[1000:7000].abs().max() < 1e-3


@pytest.mark.parametrize(
    "waveform, rate, words",
    [
        (torch.zeros(1, 0), 16_000, "empty"),
        (torch.zeros(0, 16_000), 16_000, "empty"),
        (torch.zeros(16_000), 16_000, "shape is"),
        (torch.zeros(1, 1_599), 16_000, "lasts 0.100 s; at least 0.1"),
        (torch.zeros(1, 800), 48_000, "lasts 0.017 s"),
        (torch.zeros(1, 800), 0, "rate is 0"),
        (torch.tensor([[0.0, float("nan")] * 8_000]), 16_000, "not finite"),
        (torch.tensor([[0.0, float("inf")] * 8_000]), 16_000, "not finite"),
        (torch.tensor([[0.0, -float("inf")] * 8_000]), 16_000, "not finite"),
    ],
)
def test_refusals(waveform, rate, words):
    with pytest.raises(InputError, match=words):
        check_sound(waveform, rate)


def test_usable_sound():
    assert check_sound(tone(44_100, channels=2), 44_100) == []
    assert check_sound(torch.zeros(1, 1_600), 16_000) != []
    (warning,) = check_sound(tone(44_100) * 1e-4, 44_100)
    assert "silent" in warning


def test_unreadable_files(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF but nothing else")
    for path in (tmp_path / "a.wav", tmp_path / "absent.wav"):
        with pytest.raises(InputError, match="cannot be read .*convert it"):
            load_sound(path)


def test_a_file_without_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", numpy.zeros((0, 2)), 16_000)
    with pytest.raises(InputError, match="empty"):
        check_sound(*load_sound(tmp_path / "a.wav"))
