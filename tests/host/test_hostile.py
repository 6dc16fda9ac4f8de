"""Input that cannot work, as users really give it: one clear sentence each, and the server goes on."""

import json
import shutil
import struct
import wave
from pathlib import Path

import pytest
from PIL import Image

from launch import ROOT, demo
from liveavatar_core.client.connection import WorkflowFailed
from liveavatar_core.demo.files import DemoFiles

DEMO = ROOT / "workflows" / "api" / "demo.json"


def small(**changes: object) -> dict:
    """The demo at its smallest; changes as Class__input=value."""
    values = {
        ("LiveAvatar_ImageLoader", "width"): 96,
        ("LiveAvatar_ImageLoader", "height"): 64,
        ("LiveAvatar_AudioEncoder", "seconds"): 0.5,
    }
    for key, value in changes.items():
        name, _, field = key.rpartition("__")
        own = name if name.startswith("Load") else f"LiveAvatar_{name}"
        values[own, field] = value
    return demo.patch(json.loads(DEMO.read_text(encoding="utf-8")), values)


def write_sound(path: Path, seconds: float, rate: int = 16_000, channels: int = 1) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\x10\x20" * channels * round(seconds * rate))
    return path.name


def write_nan_sound(path: Path, count: int = 16_000) -> str:
    """A float WAV of zeros after one NaN; the standard library writes only integers."""
    data = struct.pack(f"<{count}f", float("nan"), *([0.0] * (count - 1)))
    form = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path.name


def write_picture(path: Path, size: tuple[int, int], mode: str = "RGB") -> str:
    Image.new(mode, size, (200, 120, 80, 90)[: len(mode)]).save(path)
    return path.name


@pytest.fixture(scope="module")
def inputs(server) -> Path:
    return server.base / "input"


@pytest.fixture(scope="module")
def models(server) -> DemoFiles:
    return DemoFiles(server.base / "models")


def fails(run_workflow, workflow: dict, sentence: str) -> None:
    with pytest.raises(WorkflowFailed, match=sentence) as caught:
        run_workflow(workflow)
    assert "\n" not in str(caught.value).strip(), "one sentence, not a traceback"


def test_empty_sound(run_workflow, inputs):
    # ComfyUI's own Load Audio already refuses a file without a sample
    name = write_sound(inputs / "empty.wav", 0)
    fails(run_workflow, small(LoadAudio__audio=name), "LoadAudio|sound|audio")


def test_sound_of_a_twentieth_second(run_workflow, inputs):
    name = write_sound(inputs / "short.wav", 0.05)
    fails(run_workflow, small(LoadAudio__audio=name), r"LiveAvatar_AudioEncoder \(node \w+\): .*0\.05.* s.*0\.1 s")


def test_sound_with_nan(run_workflow, inputs):
    name = write_nan_sound(inputs / "nan.wav")
    fails(
        run_workflow, small(LoadAudio__audio=name), r"LiveAvatar_AudioEncoder \(node \w+\): .*(NaN|not numbers|finite)"
    )


def test_stereo_at_8_khz_works(run_workflow, inputs):
    name = write_sound(inputs / "telephone.wav", 0.5, rate=8_000, channels=2)
    assert any(file.endswith(".mp4") for file in run_workflow(small(LoadAudio__audio=name)).files)


def test_picture_of_one_pixel(run_workflow, inputs):
    name = write_picture(inputs / "pixel.png", (1, 1))
    fails(
        run_workflow, small(LoadImage__image=name), r"the picture is 1x1 px; its shorter side must have at least 64 px"
    )


def test_picture_twenty_times_as_wide_as_high(run_workflow, inputs):
    name = write_picture(inputs / "banner.png", (2000, 100))
    fails(run_workflow, small(LoadImage__image=name), r"the picture is 2000x100 px; .* crop it around the face")


def test_transparent_picture_works(run_workflow, inputs):
    name = write_picture(inputs / "transparent.png", (96, 64), "RGBA")
    assert run_workflow(small(ImageLoader__file=name)).files


def test_a_file_that_is_no_picture(run_workflow, inputs):
    (inputs / "text.png").write_text("no picture")
    fails(run_workflow, small(ImageLoader__file="text.png"), r"text\.png cannot be read as a picture")


def test_no_steps(run_workflow):
    fails(run_workflow, small(Sampler__steps=0), r"LiveAvatar_Sampler \(node \w+\): Value 0 smaller than min of 1")


def with_model(model_name: str, lora_name: str = "none") -> dict:
    """The small demo, its DiT replaced by the Model Loader's."""
    workflow = small()
    (loader,) = (key for key, node in workflow.items() if node["class_type"] == "LiveAvatar_DemoLoader")
    inputs = {"model_name": model_name, "lora_name": lora_name, "strength": 1.0}
    workflow["model"] = {"class_type": "LiveAvatar_ModelLoader", "inputs": inputs}
    for node in workflow.values():
        if node["inputs"].get("model") == [loader, 0]:
            node["inputs"]["model"] = ["model", 0]
    return workflow


def test_lora_of_another_model(run_workflow, models):
    from safetensors.torch import load_file, save_file

    foreign = {name: tensor[:, :-1].contiguous() for name, tensor in load_file(models.lora).items()}
    save_file(foreign, models.lora.parent / "foreign.safetensors")
    workflow = with_model(models.single_file.name, "foreign.safetensors")
    fails(run_workflow, workflow, r"LiveAvatar_Sampler .*foreign\.safetensors.* another model")


def test_truncated_checkpoint(run_workflow, models):
    path = models.single_file.parent / "truncated.safetensors"
    path.write_bytes(models.single_file.read_bytes()[:-1000])
    fails(run_workflow, with_model(path.name), r"LiveAvatar_Sampler .*truncated\.safetensors")


def test_missing_shard(run_workflow, models):
    folder = models.single_file.parent / "incomplete"
    shutil.copytree(models.shards, folder, dirs_exist_ok=True)
    lost = sorted(folder.glob("*.safetensors"))[-1]
    lost.unlink()
    fails(run_workflow, with_model("incomplete/"), rf"LiveAvatar_Sampler .*{lost.name}")


def test_the_server_still_works(run_workflow, models):
    assert any(file.endswith(".mp4") for file in run_workflow(small()).files)
    files = run_workflow(with_model(models.single_file.name, models.lora.name)).files
    assert any(file.endswith(".mp4") for file in files)
