"""The ComfyUI nodes. They translate between sockets and the engine; they compute nothing."""

import os

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import bench, convert, decode, demo, inputs, loaders, memory, sampler, timeline, tools


class LiveAvatarExtension(ComfyExtension):
    async def on_load(self) -> None:
        folder_paths.add_model_folder_path("liveavatar", os.path.join(folder_paths.models_dir, "liveavatar"))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            loaders.ModelLoader,
            loaders.RuntimeSettings,
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
