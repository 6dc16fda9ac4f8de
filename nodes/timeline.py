"""A node that draws what the devices did while a video was made."""

import numpy
import torch
from comfy_api.latest import io, ui

from liveavatar_core.errors import InputError

from . import host
from .types import CATEGORY, Avatar, StreamSocket


class TimeLine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_TimeLine",
            display_name="Live Avatar Time Line",
            category=CATEGORY,
            description="Draws which stage worked on which block when, and what it would look like if nothing were "
            "ever late. Connect the video, so that it is drawn after the run.",
            search_aliases=["profile", "gantt", "pipeline", "monitor"],
            inputs=[
                StreamSocket.Input("stream", tooltip="From the Chunked Sampler, the same as the decoder's."),
                io.AnyType.Input("after", optional=True, tooltip="The decoded video: drawing waits until it is there."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[
                io.Image.Output("IMAGE", display_name="picture", tooltip="Stages down, time across."),
                io.String.Output("STRING", display_name="figures", tooltip="Blocks, frames a second, times per stage."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, stream=None, after=None):
        return float("nan")  # another run, another line

    @classmethod
    def execute(cls, stream: Avatar, after=None) -> io.NodeOutput:
        from liveavatar_core.pipeline.timeline import Timeline

        latents = stream.stream
        if latents.plan is None:
            raise InputError(
                "nothing has run that could be drawn: connect the decoded video to `after`; a stream whose latents "
                "were kept from an earlier run is only decoded again"
            )
        plan, sampling = latents.plan, latents.request.sampling
        title = f"{plan.name}, {len(plan.stages)} stages"
        line = Timeline.of(latents.monitor, plan, title, depth=plan.depth, reanchor=sampling.reanchor_block)
        picture = torch.from_numpy(numpy.array(line.picture())).float().div(255).unsqueeze(0)
        text = "\n".join(_figures(latents.monitor))
        host.say(cls.hidden.unique_id, text)
        return io.NodeOutput(picture, text, ui=ui.PreviewImage(picture, cls=cls))


def _figures(monitor) -> list[str]:
    seen = monitor.snapshot()
    rate = "" if seen.fps is None else f", {seen.fps:.1f} frames a second at the end"
    lines = [f"{seen.blocks} blocks{rate}; {seen.late} later than they would have been shown"]
    for stage in seen.stages:
        lines.append(
            f"stage {stage.stage}: {stage.hop_ms:.1f} ms a hop, {stage.wait_ms:.1f} ms between two, "
            f"{stage.copy_ms:.2f} ms a copy, {stage.host_ms:.1f} ms of the host"
        )
    return lines
