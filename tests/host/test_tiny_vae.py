"""Small VAEs, loaded by ComfyUI's own Load VAE: taew2_1, lighttaew2_1 and lightvaew2_1 decode what the sampler made."""

import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hostile import fails, small
from test_running import node_of, pictures, the_video

from liveavatar_core.encoders.tiny_decoder import load_tiny

DATA = Path(__file__).parent.parent / "data"


def random_weights(keys: str) -> dict[str, torch.Tensor]:
    """In the published layout; matrices keep the size of what they are applied to."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for line in (DATA / keys).read_text().splitlines():
        if not line.startswith("#"):
            name, shape = line.split()[0], [int(size) for size in line.split()[1].split("x")]
            spread = 1.4 / prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.1
            weights[name] = torch.randn(shape, generator=generator) * spread
    return weights


def showing(channel: int) -> dict[str, torch.Tensor]:
    """A tiny VAE whose picture is one channel of the latents it gets: black at -3, grey at 0, white at 3."""
    weights = {name: torch.zeros_like(tensor) for name, tensor in random_weights("taew2_1_keys.txt").items()}
    weights["decoder.1.weight"][0, channel, 1, 1] = 1
    weights["decoder.1.bias"][0] = 3
    for grow, following in ((7, 8), (13, 14), (19, 20)):
        made = weights[f"decoder.{grow}.conv.weight"]
        made[:: made.shape[1], 0] = 1
        weights[f"decoder.{following}.weight"][0, 0, 1, 1] = 1
    weights["decoder.22.weight"][:, 0, 1, 1] = 1 / 6
    return weights


@pytest.fixture(scope="module")
def models(server) -> Path:
    """Files where Load VAE of ComfyUI 0.30 looks for them: it takes two of the names for vae_approx, and no others."""
    models, tiny = server.base / "models", showing(channel=7)
    for_wan_22 = tiny | {"decoder.1.weight": torch.zeros(256, 48, 3, 3), "encoder.17.weight": torch.zeros(48, 64, 3, 3)}
    for_wan_22 |= {"decoder.22.weight": torch.zeros(12, 64, 3, 3), "decoder.22.bias": torch.zeros(12)}
    for_wan_22 |= {"encoder.0.weight": torch.zeros(64, 12, 3, 3), "encoder.17.bias": torch.zeros(48)}
    for name, weights in {
        "vae/taew2_1.safetensors": {name: tensor.half() for name, tensor in tiny.items()},
        "vae_approx/lighttaew2_1.safetensors": tiny,
        "vae/lightvaew2_1.safetensors": random_weights("lightvaew2_1_keys.txt"),
        "vae_approx/lighttaew2_2.safetensors": for_wan_22,
    }.items():
        (models / name).parent.mkdir(exist_ok=True)
        save_file(weights, models / name)
    return models


def with_vae(name: str, node: str) -> dict:
    """The demo's workflow with this file at the VAE of one of our nodes."""
    workflow = small(Sampler__seed=130)
    workflow[node_of(workflow, node)]["inputs"]["vae"] = ["small vae", 0]
    return workflow | {"small vae": {"class_type": "VAELoader", "inputs": {"vae_name": f"{name}.safetensors"}}}


def test_the_arithmetic_is_comfyuis(server, tmp_path):
    tiny = random_weights("taew2_1_keys.txt")
    weights, given, made = (tmp_path / name for name in ("weights", "given", "made"))
    save_file(tiny, weights)
    latents = torch.randn(16, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    save_file({"latents": latents}, given)
    script = Path(__file__).parent / "comfy_taehv.py"
    command = [sys.executable, script, server.tree, weights, given, made]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    want = load_file(made)["frames"]
    ours = load_tiny(tiny, normalised=True, dtype=torch.float64, device="cpu").decode(latents, {})[3:]
    assert want.shape == (13, 3, 24, 40) and want.std() > 0.1
    # float64 on both sides; the first step, which ours does in float32, is all that differs.
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


def test_small_vaes_decode_a_stream(run_workflow, models):
    whole = pictures(the_video(run_workflow(small(Sampler__seed=130))))
    brightness = {}
    for name in ("taew2_1", "lighttaew2_1", "lightvaew2_1"):
        video = pictures(the_video(run_workflow(with_vae(name, "Decode"))))
        assert video.shape == whole.shape and video.std() > 1
        brightness[name] = video.mean() / 255
    # Normalised, the channel is about 0 on average; as the full VAE has it, about 1.55.
    assert abs(brightness["taew2_1"] - 0.5) < 0.05
    assert abs(brightness["lighttaew2_1"] - 0.7) < 0.05


def test_a_tiny_vae_cannot_encode_the_portrait(run_workflow, models):
    fails(run_workflow, with_vae("taew2_1", "Sampler"), r"only decode here: connect the VAE of Wan 2\.1")


def test_a_tiny_vae_for_another_model(run_workflow, models):
    fails(run_workflow, with_vae("lighttaew2_2", "Decode"), r"not one for Wan 2\.1: .*choose taew2_1 or lighttaew2_1")
