"""The ComfyUI nodes. They translate between sockets and the engine; they compute nothing."""

import importlib.util
import logging
import os
import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from . import (
    bench,
    convert,
    decode,
    demo,
    evaluate,
    examples,
    inputs,
    live,
    loaders,
    memory,
    preset,
    runs,
    sampler,
    timeline,
    tools,
)

log = logging.getLogger(__name__)
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


class LiveAvatarExtension(ComfyExtension):
    async def on_load(self) -> None:
        missing = [name for name in REQUIREMENTS.read_text().split() if importlib.util.find_spec(name) is None]
        if missing:
            log.warning(
                "Live Avatar: not installed are %s, without which no video can be made; run %s -m pip install -r %s",
                ", ".join(missing),
                sys.executable,
                REQUIREMENTS,
            )
        folder_paths.add_model_folder_path("liveavatar", os.path.join(folder_paths.models_dir, "liveavatar"))
        examples.provide()
        live.add_routes(PromptServer.instance.routes)
        runs.add_routes(PromptServer.instance.routes)

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
            evaluate.Evaluate,
            convert.ConvertAndSave,
            tools.Unload,
        ]
