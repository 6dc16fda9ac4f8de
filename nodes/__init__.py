"""The ComfyUI nodes. They translate between sockets and the engine; they compute nothing."""

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import bench, convert, decode, demo, inputs, live, loaders, memory, preset, sampler, timeline, tools


class LiveAvatarExtension(ComfyExtension):
    async def on_load(self) -> None:
        folder_paths.add_model_folder_path("liveavatar", os.path.join(folder_paths.models_dir, "liveavatar"))
        live.add_routes(PromptServer.instance.routes)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            loaders.ModelLoader,
            loaders.RuntimeSettings,
            preset.Preset,
            demo.DemoLoader,
            inputs.ImageLoader,
            inputs.AudioEncoder,
            inputs.PromptConditioner,
            sampler.ChunkedSampler,
            decode.OnlineDecode,
            decode.OnlineDecodeFrames,
            memory.MemoryPlan,
            timeline.TimeLine,
            bench.Benchmark,
            convert.ConvertAndSave,
            tools.Unload,
        ]
