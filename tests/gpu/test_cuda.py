"""The recorded causal loop on a GPU: float32 against the recording, bfloat16 within its own rounding."""

import pytest
import torch

from liveavatar_core import schedule
from liveavatar_core.config import SamplingConfig
from liveavatar_core.geometry import LATENTS_PER_BLOCK, PIXELS_PER_LATENT, Geometry
from liveavatar_core.model.dit import CausalDiT, unpatchify
from liveavatar_core.pipeline.plan import PREFILL, single
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.types import BlockRequest, Payload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLOAT32 = 2e-5  # other kernels, other orders of sums, through all layers, steps and blocks
BF16_RMS = 1e-2  # relative; a bf16 forward of this depth on the same inputs
BF16_LARGEST = 2e-2


@pytest.fixture(autouse=True)
def _exact():
    with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
        yield


def velocities(golden, golden_config, dtype: torch.dtype, *, teacher: bool):
    """(block, step, velocity) of the recorded loop; with `teacher` every step starts from the recorded latent."""
    tensors, manifest = golden("dit_causal")
    model = CausalDiT(golden_config)
    model.load_state_dict(golden("dit_weights")[0], strict=True)
    for name, parameter in model.named_parameters():
        keeps32 = name.startswith(("time_", "head.", "casual_audio_encoder.")) or name.endswith("modulation")
        parameter.data = parameter.data.to("cuda", torch.float32 if keeps32 else dtype)
    geometry = Geometry(*(side * PIXELS_PER_LATENT for side in manifest["latent_hw"]))
    steps = len(tensors["timesteps"])
    sampling = SamplingConfig(
        steps=steps, distance=tuple(map(tuple, tensors["relative_dist"].tolist())), reanchor_block=None
    )
    plan = single(steps, golden_config.layers, ["cuda"])
    stage = Stage(plan.stages[0], model.eval(), geometry, sampling, schedule.levels(sampling), tensors["context"])
    condition = (tensors["ref_latents"][0], tensors["motion_latents"][0])
    stage.run(Payload(block=PREFILL, step=PREFILL, sink=0, condition=condition))
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    for block in range(manifest["blocks"]):
        latents = slice(LATENTS_PER_BLOCK * block, LATENTS_PER_BLOCK * (block + 1))
        request = BlockRequest(
            block=block,
            features=tensors["audio"][..., 12 * block : 12 * (block + 1)],
            noise=tensors["noise"][:, latents],
            pose=tensors["pose_latents"][0, :, latents],
        )
        payload = Payload(block=block, step=0, sink=0, request=request)
        for step in range(steps):
            payload = stage.run(payload)
            velocity = unpatchify(seen.pop(), geometry.grid, golden_config.channels)
            yield block, step, velocity.float().cpu()
            if not teacher:
                continue
            levels = stage.levels
            want = tensors["model_out"][block, step]
            error = (levels[step + 1] - levels[step]) * (want - velocity.float().cpu())
            exact = payload.latent.float() + error.to(payload.latent.device)
            payload = Payload(**{**fields(payload), "latent": exact.to(payload.latent.dtype)})


def fields(payload: Payload) -> dict:
    return {name: getattr(payload, name) for name in Payload.__slots__}


def test_float32(golden, golden_config, agree):
    tensors, _ = golden("dit_causal")
    for block, step, velocity in velocities(golden, golden_config, torch.float32, teacher=False):
        agree("dit_causal", "cuda float32", velocity, tensors["model_out"][block, step], FLOAT32)


def test_bfloat16(golden, golden_config, agree):
    tensors, _ = golden("dit_causal")
    for block, step, velocity in velocities(golden, golden_config, torch.bfloat16, teacher=True):
        want = tensors["model_out"][block, step]
        agree("dit_causal", "cuda bfloat16", velocity, want, BF16_LARGEST)
        assert ((velocity - want).norm() / want.norm()).item() < BF16_RMS, (block, step)
