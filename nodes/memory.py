"""A node that says how much memory a video will take, before anything is loaded."""

import comfy.model_management
from comfy_api.latest import io, ui

from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry

from . import host
from .loaders import runtime_spec
from .preset import sides, size_input, steps_input
from .sampler import fitted
from .types import CATEGORY, ModelSocket, RuntimeSocket


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_MemoryPlan",
            display_name="Live Avatar Memory Plan",
            category=CATEGORY,
            description="How much memory each device needs for a video, part by part, what of it is streamed from main "
            "memory, and what to change where even that does not fit. Loads nothing; devices that are not here can be "
            "planned for, too.",
            search_aliases=["vram", "out of memory", "oom", "gpu"],
            inputs=[
                ModelSocket.Input("model", tooltip="From a Model Loader. Its files are looked at, not loaded."),
                size_input(),
                steps_input(),
                io.Image.Input(
                    "image", optional=True, tooltip="The picture the video will be made of; its size then counts."
                ),
                RuntimeSocket.Input(
                    "runtime", optional=True, tooltip="Devices and precision to plan for, from a Runtime node."
                ),
            ],
            is_output_node=True,
            not_idempotent=True,
            outputs=[io.String.Output("STRING", display_name="plan", tooltip="The table as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, size=None, steps=None, image=None, runtime=None):
        return float("nan")  # free memory is another each time

    @classmethod
    def execute(cls, model, size, steps, image=None, runtime=None) -> io.NodeOutput:
        from liveavatar_core.pipeline.plan import Machine
        from liveavatar_core.runtime.choice import choose_plan
        from liveavatar_core.runtime.fitting import check, fit, room
        from liveavatar_core.runtime.memory import HOST, table
        from liveavatar_core.runtime.probe import measure
        from liveavatar_core.runtime.runtime import as_device, choose_precision, free_memory, inspect_model

        spec = runtime if runtime is not None else runtime_spec()
        for name in spec.devices:
            as_device(name)
        config = inspect_model(model)
        free = {name: nbytes for name in spec.devices if (nbytes := _free(name)) is not None}
        machine = measure(spec.devices) if all(name in free for name in spec.devices) else Machine()
        own = host.runtime().nbytes.get(HOST, 0)
        free |= {name: nbytes + own for name, nbytes in free_memory([HOST]).items()}
        free = room(free, spec.vram)
        choice = choose_plan(
            config,
            geometry_of(size, image),
            spec,
            choose_precision(model, spec.precision),
            steps,
            free,
            machine,
        )
        memory = fit(choice.memory, free)
        text = f"{choice.why}\n{table(memory, free)}"
        try:
            check(memory, free)
        except PlanError as error:
            text += f"\n{error}"
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def geometry_of(size: str, image) -> Geometry:
    """Of a video of this IMAGE, or, without one, of this entry of SIZES."""
    if image is not None:
        return Geometry(*fitted(image).shape[1:])
    width, height = sides(size)
    return Geometry(height, width)


def _free(name: str) -> int | None:
    """Bytes there are once ComfyUI has made room: what is free and what this process holds. None: not a card here."""
    import torch

    device = torch.device(name)
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    return comfy.model_management.get_free_memory(device) + torch.cuda.memory_allocated(device)
