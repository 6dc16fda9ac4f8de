"""A node that measures a finished video against the picture it was made from."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.model_management
import folder_paths
from comfy_api.latest import io, ui

from . import host
from .types import CATEGORY


class Evaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Evaluate",
            display_name="Live Avatar Evaluate",
            category=CATEGORY,
            description="Measures a finished video over its time: do lips and sound agree, does it stay like the "
            "picture, is it sharp, does it flicker, drift or grow. A table, and a page with pictures and plots in the "
            "output folder.",
            search_aliases=["quality", "lip sync", "identity", "drift", "report", "metrics"],
            inputs=[
                io.Video.Input("video", tooltip="The finished video, from Online VAE Decode or Load Video."),
                io.Image.Input("image", tooltip="The picture it was made from, with closed lips."),
                io.String.Input(
                    "mouth",
                    default="",
                    optional=True,
                    tooltip="Where the closed mouth is in the picture: left, top, right, bottom in its pixels. Empty: "
                    "it is looked for with mediapipe, where one is installed that can; else lips are not measured.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="evaluate/LiveAvatar",
                    optional=True,
                    advanced=True,
                    tooltip="Folder and beginning of the page's name, below ComfyUI's output folder.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            outputs=[io.String.Output("STRING", display_name="table", tooltip="The figures over time, as text.")],
        )

    @classmethod
    def execute(cls, video, image, mouth="", filename_prefix="evaluate/LiveAvatar") -> io.NodeOutput:
        from liveavatar_core.evaluate.measure import measure_video
        from liveavatar_core.evaluate.places import Places, as_box, find_mouth
        from liveavatar_core.evaluate.report import Film, as_page, as_text, differences

        picture = image[0]
        numbers = re.split(r"[,\s]+", mouth.strip(" []()"))
        box = as_box(numbers, "mouth") if mouth.strip() else find_mouth(picture)

        def say(start: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            host.say(cls.hidden.unique_id, f"measuring at {start:g} s")

        with TemporaryDirectory() as folder:
            source = video.get_stream_source()
            if not isinstance(source, str):
                source = str(Path(folder) / "video.mp4")
                video.save_to(source)
            measured = measure_video(Path(source), picture, Places(box), on_window=say)
        film = Film("video", *measured)
        where, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        page = f"{name}_{counter:05}_.html"
        (Path(where) / page).write_text(as_page(f"{name} {counter}", [film]), encoding="utf-8")
        lines = [as_text([film]), *differences([film]), f"{Path(subfolder) / page} in the output folder has plots"]
        if box is None:
            lines.append("Lips are not measured: say in mouth where it is, as left, top, right, bottom.")
        text = "\n".join(lines)
        host.say(cls.hidden.unique_id, "measured")
        saved = ui.SavedResult(page, subfolder, io.FolderType.output)
        return io.NodeOutput(text, ui={**ui.PreviewText(text).as_dict(), "report": [saved]})
