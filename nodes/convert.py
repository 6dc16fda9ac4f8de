"""A node that keeps a merged and quantised model as one file, so that later starts only read."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from liveavatar_core.errors import OutputError

from . import host
from .loaders import runtime_spec
from .types import CATEGORY, ModelSocket

MERGING_BYTES = 2 * 1024**3  # one weight of the largest kind in float32, its LoRA's product and their sum


class ConvertAndSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_ConvertAndSave",
            display_name="Live Avatar Convert and Save",
            category=CATEGORY,
            description="Merges the LoRAs, quantises once and saves one file into models/diffusion_models. It loads in "
            "seconds, alone, and gives the same video. A file made of the same sources is kept.",
            search_aliases=["quantise", "quantize", "fp8", "merge lora", "save model"],
            inputs=[
                ModelSocket.Input("model", tooltip="Checkpoint and LoRAs, from the Model Loader."),
                io.String.Input("filename", default="live_avatar_14B_fp8", tooltip="Below models/diffusion_models."),
                io.Combo.Input(
                    "precision",
                    options=["fp8", "bf16"],
                    default="fp8",
                    tooltip="What the file will run in. fp8: linear layers in 8 bits, half the size.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            outputs=[
                ModelSocket.Output("LIVEAVATAR_MODEL", display_name="model", tooltip="The new file, ready for use.")
            ],
        )

    @classmethod
    def execute(cls, model, filename, precision) -> io.NodeOutput:
        from liveavatar_core.weights.convert import convert

        out = _inside(Path(folder_paths.models_dir) / "diffusion_models", filename)
        device = torch.device(runtime_spec().devices[0])  # where the model would be merged without this node
        comfy.model_management.free_memory(MERGING_BYTES, device)
        bar = comfy.utils.ProgressBar(100, node_id=cls.hidden.unique_id)
        report = host.bytes_progress(lambda percent: bar.update_absolute(percent, 100))
        converted = convert(model, out, precision=precision, device=device, progress=report)
        host.say(cls.hidden.unique_id, f"{out.name}: {out.stat().st_size / 1024**3:.1f} GiB")
        return io.NodeOutput(converted)


def _inside(folder: Path, filename: str) -> Path:
    """The file of this name below the folder. Raises OutputError for names that lead elsewhere."""
    name = filename.strip()
    out = (folder / (name if name.endswith(".safetensors") else f"{name}.safetensors")).resolve()
    if not name or not out.is_relative_to(folder.resolve()):
        raise OutputError(f"filename {filename!r} is not a name below {folder}; give one like live_avatar_14B_fp8")
    return out
