"""Housekeeping nodes."""

from comfy_api.latest import io

from . import host
from .types import CATEGORY


class Unload(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Unload",
            display_name="Live Avatar Unload",
            category=CATEGORY,
            description="Frees the memory that Live Avatar holds on all devices. Connect the video to wait for it.",
            search_aliases=["free memory", "clear vram", "release"],
            inputs=[
                io.AnyType.Input("after", optional=True, tooltip="The video, say: unloading waits until it is there.")
            ],
            outputs=[io.AnyType.Output("ANY", display_name="after", tooltip="What was connected, passed on.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, after=None):
        return float("nan")  # must run every time

    @classmethod
    def execute(cls, after=None) -> io.NodeOutput:
        host.unload()
        return io.NodeOutput(after)
