"""A node that sets what belongs together, as one choice; the sizes that it and others choose from."""

from dataclasses import dataclass

from comfy_api.latest import io

from liveavatar_core.config import MAX_STEPS
from liveavatar_core.errors import InputError

from .types import CATEGORY

SIZES = ("384*256", "688*368", "704*384")  # width*height; a picture of another shape gets as many pixels
DEFAULT_SIZE = "704*384"


@dataclass(frozen=True, slots=True)
class Settings:
    size: str
    steps: int
    seconds: float  # of speech at most; 0: all of it


PRESETS = {
    "quick preview: 384*256, 3 steps, first 19.2 s": Settings("384*256", 3, 19.2),
    "standard: 688*368, 4 steps, first 192 s": Settings("688*368", 4, 192.0),
    "long video: 688*368, 4 steps, all of the speech": Settings("688*368", 4, 0.0),
    "high quality: 704*384, 5 steps, first 96 s": Settings("704*384", 5, 96.0),
}


def size_input() -> io.Combo.Input:
    """For nodes that plan for a video: its size."""
    return io.Combo.Input(
        "size",
        options=list(SIZES),
        default=DEFAULT_SIZE,
        tooltip="Size of the video, where no image is connected. May come from a Preset.",
    )


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=4,
        min=1,
        max=MAX_STEPS,
        tooltip="Denoising steps, as in the sampler. May come from a Preset.",
    )


def sides(size: str) -> tuple[int, int]:
    """(width, height) of an entry of SIZES. Raises InputError: what is connected may be anything."""
    if size not in SIZES:
        raise InputError(f"size is {size!r}; choose one of {', '.join(SIZES)}, or connect the size of a Preset")
    width, height = size.split("*")
    return int(width), int(height)


class Preset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Preset",
            display_name="Live Avatar Preset",
            category=CATEGORY,
            description="Size, denoising steps and length as one choice. Connect size to the Image Loader, steps to "
            "the Chunked Sampler and seconds to the Audio Encoder; Memory Plan and Benchmark take size and steps, too. "
            "Without this node each is set where it is used.",
            search_aliases=["quality", "quick preview", "standard", "long video", "settings"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=list(PRESETS)[1],
                    tooltip="What it sets stands beside its name. Memory grows with size and steps, time with length, "
                    "too.",
                )
            ],
            outputs=[
                io.Combo.Output("SIZE", display_name="size", tooltip="To size of the Image Loader."),
                io.Int.Output("STEPS", display_name="steps", tooltip="To steps of the Chunked Sampler."),
                io.Float.Output(
                    "SECONDS",
                    display_name="seconds",
                    tooltip="To seconds of the Audio Encoder; 0: all.",
                ),
            ],
        )

    @classmethod
    def execute(cls, preset) -> io.NodeOutput:
        chosen = PRESETS[preset]
        return io.NodeOutput(chosen.size, chosen.steps, chosen.seconds)
