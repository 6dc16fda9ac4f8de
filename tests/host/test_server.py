"""The pack in a running ComfyUI, driven over HTTP as any program would."""

import io
import json
import urllib.request

import av
import pytest

from launch import demo
from liveavatar_core.client.connection import WorkflowFailed

SECONDS = 1.0


def test_pack_loads(server) -> None:
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        names = {name for name in json.load(answer) if name.startswith("LiveAvatar_")}
    assert {"LiveAvatar_DemoLoader", "LiveAvatar_Sampler", "LiveAvatar_Decode"} <= names
    assert "IMPORT FAILED" not in server.log.read_text(errors="replace")


def test_demo_workflow_makes_a_video_with_sound(run_workflow) -> None:
    workflow = demo.patch(
        json.loads(demo.WORKFLOW.read_text(encoding="utf-8")),
        {
            ("LiveAvatar_AudioEncoder", "seconds"): SECONDS,
            ("LiveAvatar_ImageLoader", "width"): 192,  # the random model is quicker there
            ("LiveAvatar_ImageLoader", "height"): 112,
        },
    )
    run = run_workflow(workflow)
    (content,) = (content for name, content in run.files.items() if name.endswith(".mp4"))
    with av.open(io.BytesIO(content)) as video:
        frames = sum(1 for _ in video.decode(video=0))
        rate = float(video.streams.video[0].average_rate)
        sound = video.streams.audio[0]
        heard = float(sound.duration * sound.time_base)
    assert rate == 25
    assert abs(frames / rate - heard) <= 1 / rate
    assert any(kind == "progress_state" for kind, _ in run.events)


def test_refusal_names_the_node_and_the_reason(run_workflow) -> None:
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "no such.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(WorkflowFailed, match=r"LoadImage \(node 1\): .*no such\.png"):
        run_workflow(workflow)


def test_unknown_node_is_named(run_workflow) -> None:
    with pytest.raises(WorkflowFailed, match="NoSuchNode"):
        run_workflow({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_stock_loaders_read_the_demo_files(run_workflow) -> None:
    """What the workflow for the real files rests on here: ComfyUI's own loaders on files in the real layouts."""
    vae, speech = "live_avatar_demo_vae.safetensors", "live_avatar_demo_wav2vec2/model.safetensors"
    clip = {"clip_name": "live_avatar_demo_umt5.safetensors", "type": "wan"}
    run = run_workflow(
        {
            "clip": {"class_type": "CLIPLoader", "inputs": clip},
            "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a woman smiles"}},
            "encoder": {"class_type": "AudioEncoderLoader", "inputs": {"audio_encoder_name": speech}},
            "sound": {"class_type": "LoadAudio", "inputs": {"audio": "speech.wav"}},
            "heard": {
                "class_type": "AudioEncoderEncode",
                "inputs": {"audio_encoder": ["encoder", 0], "audio": ["sound", 0]},
            },
            "vae": {"class_type": "VAELoader", "inputs": {"vae_name": vae}},
            "picture": {"class_type": "LoadImage", "inputs": {"image": "portrait.png"}},
            "latent": {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["vae", 0]}},
            **{
                f"show {name}": {"class_type": "PreviewAny", "inputs": {"source": [name, 0]}}
                for name in ("text", "heard", "latent")
            },
        }
    )
    assert set(run.outputs) == {"show text", "show heard", "show latent"}
    shown = {name: output["text"][0] for name, output in run.outputs.items()}
    assert "nan" not in "".join(shown.values()).lower()
