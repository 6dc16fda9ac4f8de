"""Nodes that name what to use: model files, devices, precision. They load nothing, so a cached node holds no memory."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from liveavatar_core.config import ATTENTIONS, KV_CACHES, PRECISIONS, LoraSpec, ModelSpec, RuntimeSpec

from .settings import default_devices
from .types import CATEGORY, ModelSocket, RuntimeSocket

NO_LORA = "none"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def _folder_models() -> dict[str, Path]:
    """Checkpoints that are folders of shards, in the official layout; the host lists only files."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusion_models") + folder_paths.get_folder_paths("liveavatar"):
        for index in sorted(Path(root).glob(f"*/{INDEX}")):
            found.setdefault(f"{index.parent.name}/", index.parent)
    return found


def _resolve(name: str) -> Path:
    folders = _folder_models()
    return folders[name] if name in folders else Path(folder_paths.get_full_path_or_raise("diffusion_models", name))


class ModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_ModelLoader",
            display_name="Live Avatar Model Loader",
            category=CATEGORY,
            description="Names the Wan2.2-S2V-14B checkpoint and the Live Avatar LoRA; they load when a video is made.",
            search_aliases=["wan s2v", "load checkpoint", "lora", "talking head", "digital human"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*_folder_models(), *folder_paths.get_filename_list("diffusion_models")],
                    tooltip="Wan2.2-S2V-14B: a folder with the official shards (ends with /), or one safetensors file.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_LORA, *folder_paths.get_filename_list("loras")],
                    default=NO_LORA,
                    tooltip="liveavatar.safetensors. Without it the model was not trained for four steps.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How strongly the LoRA is merged. The Live Avatar LoRA is meant for 1.",
                ),
                ModelSocket.Input(
                    "base",
                    optional=True,
                    tooltip="Another Model Loader whose LoRAs are merged before this one.",
                    advanced=True,
                ),
            ],
            outputs=[
                ModelSocket.Output(
                    "LIVEAVATAR_MODEL",
                    display_name="model",
                    tooltip="To the Chunked Sampler, Memory Plan, Benchmark, or Convert and Save.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, lora_name, strength, base=None):
        """Files that were replaced under the same name must run again."""
        paths = [_resolve(model_name)]
        if lora_name != NO_LORA:
            paths.append(Path(folder_paths.get_full_path_or_raise("loras", lora_name)))
        return stamps(paths)

    @classmethod
    def execute(cls, model_name, lora_name, strength, base=None) -> io.NodeOutput:
        loras = () if base is None else base.loras
        if lora_name != NO_LORA:
            loras += (LoraSpec(Path(folder_paths.get_full_path_or_raise("loras", lora_name)), strength),)
        return io.NodeOutput(ModelSpec(_resolve(model_name), loras))


def stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What changes when files are replaced under the same name; folders stand for the files in them."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


class RuntimeSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Runtime",
            display_name="Live Avatar Runtime",
            category=CATEGORY,
            description="Where and how the model runs. Without this node: ComfyUI's own device, automatic precision.",
            search_aliases=["multi gpu", "devices", "fp8", "low vram", "offload", "attention", "cluster"],
            inputs=[
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="auto: ComfyUI's own. all: every GPU. Or names separated by commas: cuda:0, cuda:1; one "
                    "may be named more than once.",
                ),
                io.Combo.Input(
                    "plan",
                    options=["auto", "single", "tpp", "ring", "2x2", "2x4", "4x2"],
                    default="auto",
                    tooltip="single: one device. tpp: a share of the denoising steps per device, each holds the whole "
                    "model. ring: a share of the layers per device, least memory. 2x2: two rings that share the steps. "
                    "auto: the fastest that fits. All give the same pictures.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="auto: bf16 on GPUs, fp32 on a CPU. fp8: linear layers in 8 bits, half the memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    optional=True,
                    default="exact",
                    advanced=True,
                    tooltip="int8: queries times keys in 8 bits, faster; slightly other pictures.",
                ),
                io.Combo.Input(
                    "kv_cache",
                    options=list(KV_CACHES),
                    optional=True,
                    default="full",
                    advanced=True,
                    tooltip="fp8: what the model remembers of past blocks in 8 bits, half that memory; slightly other "
                    "pictures.",
                ),
                io.Float.Input(
                    "vram",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    advanced=True,
                    tooltip="GiB of each GPU that may be used. 0: all that is free. What does not fit is streamed from "
                    "main memory, same pictures.",
                ),
                io.String.Input(
                    "vae_device",
                    optional=True,
                    default="auto",
                    advanced=True,
                    tooltip="Device that decodes. auto: the one where it disturbs least, or one of its own.",
                ),
                io.String.Input(
                    "cluster",
                    optional=True,
                    default="",
                    advanced=True,
                    tooltip="Empty: all in ComfyUI's own process. Address of a Ray cluster (host:port), or local: "
                    "every device is a process of its own, on any of the cluster's machines.",
                ),
            ],
            outputs=[
                RuntimeSocket.Output(
                    "LIVEAVATAR_RUNTIME",
                    display_name="runtime",
                    tooltip="To the Chunked Sampler; Memory Plan and Benchmark take the same.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return default_devices()

    @classmethod
    def execute(
        cls, devices, plan, precision, attention="exact", kv_cache="full", vram=0.0, vae_device="auto", cluster=""
    ) -> io.NodeOutput:
        return io.NodeOutput(
            runtime_spec(
                devices,
                plan=plan,
                precision=precision,
                attention=attention,
                kv_cache=kv_cache,
                vram=vram or None,
                decoder=vae_device.strip(),
                cluster=cluster.strip() or None,
            )
        )


def runtime_spec(devices: str = "auto", **settings) -> RuntimeSpec:
    """With further settings of RuntimeSpec by name. The device `auto` is what the settings page says, `all` are all."""
    import comfy.model_management

    own = [str(comfy.model_management.get_torch_device())]
    all_here = [str(device) for device in comfy.model_management.get_all_torch_devices()]
    named = _replaced(_names(devices), {"auto": _names(default_devices())})
    return RuntimeSpec(tuple(_replaced(named, {"auto": own, "all": all_here})), **settings)


def _replaced(names: list[str], meant: dict[str, list[str]]) -> list[str]:
    return [device for name in names for device in meant.get(name, [name])]


def _names(devices: str) -> list[str]:
    return [name.strip() for name in devices.split(",") if name.strip()]
