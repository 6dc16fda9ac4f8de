"""Nodes that pull a stream: frames are decoded as blocks arrive, into a growing video file or into an IMAGE batch."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import psutil
import torch
from comfy_api.latest import InputImpl, io, ui
from PIL import Image
from torch import Tensor

from liveavatar_core.errors import Cancelled, InputError
from liveavatar_core.geometry import sample_at

from . import host, live, runs, settings
from .types import CATEGORY, Avatar, StreamSocket

GIB = 1024**3
STREAM_TOOLTIP = "From the Chunked Sampler. It runs while it is decoded here."
VAE_TOOLTIP = "Wan 2.1 VAE, or a smaller and faster decoder for its latents: taew2_1, lighttaew2_1, lightvaew2_1"


class OnlineDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Decode",
            display_name="Live Avatar Online VAE Decode",
            category=CATEGORY,
            description="Makes the video: pulls the stream block by block and writes picture and sound into a file "
            "that can be played at any moment, also when the run is stopped. Memory does not grow with length.",
            search_aliases=["save video", "mp4", "preview", "player", "live", "talking head"],
            inputs=[
                StreamSocket.Input("stream", tooltip=STREAM_TOOLTIP),
                io.Vae.Input("vae", tooltip=VAE_TOOLTIP),
                io.String.Input(
                    "filename_prefix",
                    default="video/LiveAvatar",
                    tooltip="Folder and beginning of the name, below ComfyUI's output folder.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            outputs=[
                io.Video.Output("VIDEO", display_name="video", tooltip="The finished file; it needs no Save Video.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, stream=None, vae=None, filename_prefix=None):
        return runs.cut_short(cls.hidden.unique_id)

    @classmethod
    def execute(cls, stream: Avatar, vae, filename_prefix) -> io.NodeOutput:
        from liveavatar_core.io.video import VideoWriter

        geometry = stream.stream.geometry
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), geometry.width, geometry.height
        )
        file = f"{name}_{counter:05}_.mp4"
        path = Path(folder) / file
        speech, run = stream.speech, runs.Run(cls.hidden.unique_id, stream)
        shown = live.open_stream(run, file, stream.frames / speech.fps, float(speech.fps))
        with (
            run,
            shown,
            VideoWriter(
                path,
                width=geometry.width,
                height=geometry.height,
                fps=speech.fps,
                sample_rate=speech.sample_rate,
                channels=speech.waveform.shape[0],
                watch=shown.append,
            ) as writer,
        ):
            for frames, samples in play(run, vae):
                writer.write(frames, samples)
                now = stream.stream.monitor.snapshot()
                shown.tell(writer.frames / speech.fps, now.fps, now.late)
        saved = ui.SavedResult(file, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), ui=ui.PreviewVideo([saved]))


class OnlineDecodeFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_DecodeFrames",
            display_name="Live Avatar Online VAE Decode (frames)",
            category=CATEGORY,
            description="Makes the video as an IMAGE batch and AUDIO, for other nodes. All frames are held in memory: "
            "for long videos use Online VAE Decode.",
            search_aliases=["vae decode", "images", "frames"],
            inputs=[StreamSocket.Input("stream", tooltip=STREAM_TOOLTIP), io.Vae.Input("vae", tooltip=VAE_TOOLTIP)],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output("IMAGE", display_name="images", tooltip="All frames as one batch."),
                io.Audio.Output("AUDIO", display_name="audio", tooltip="The speech, exactly as long as the frames."),
                io.Float.Output("FLOAT", display_name="fps", tooltip="Frames a second, for Create Video."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, stream=None, vae=None):
        return runs.cut_short(cls.hidden.unique_id)

    @classmethod
    def execute(cls, stream: Avatar, vae) -> io.NodeOutput:
        geometry, speech = stream.stream.geometry, stream.speech
        shape = (stream.frames, geometry.height, geometry.width, 3)
        needed, free = torch.Size(shape).numel() * 4, psutil.virtual_memory().available
        if needed > free * 0.9:
            raise InputError(
                f"{stream.frames} frames of {geometry.width}x{geometry.height} need {needed / GIB:.1f} GiB as IMAGE, "
                f"{free / GIB:.1f} GiB of memory are free: use Live Avatar Online VAE Decode, which writes a file"
            )
        images = torch.empty(shape, dtype=torch.float32)
        done, sound = 0, []
        with runs.Run(cls.hidden.unique_id, stream) as run:
            for frames, samples in play(run, vae):
                images[done : done + len(frames)] = frames.float() / 255
                done += len(frames)
                sound.append(samples)
        audio = {"waveform": torch.cat(sound, dim=1).unsqueeze(0), "sample_rate": speech.sample_rate}
        return io.NodeOutput(images[:done], audio, float(speech.fps))


def play(run: runs.Run, vae) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames (n, H, W, 3) uint8 on the CPU and the sound (channels, samples) that belongs to them, block by block.

    Reports progress with a picture per block, and turns the host's interrupt into the end of the stream.
    """
    from liveavatar_core.pipeline.stream import frame_chunks

    avatar, node_id = run.avatar, run.node or None
    stream, speech = avatar.stream, avatar.speech
    decoder = host.stream_decoder(vae, stream.request.runtime.decoder)
    bar, side = comfy.utils.ProgressBar(stream.blocks, node_id=node_id), settings.preview_side()
    with host.settling(), closing(run.latents):
        try:
            for chunk in frame_chunks(run.latents, decoder, stream.portrait[1], avatar.frames):
                frames = chunk.frames.cpu()
                stream.monitor.decoded(chunk.block)
                run.block()
                last = chunk.first_frame + len(frames)
                span = slice(*(sample_at(frame, speech.fps, speech.sample_rate) for frame in (chunk.first_frame, last)))
                yield frames, _exactly(speech.waveform[:, span], span.stop - span.start)
                # None after the last block: the page loads previews late, and would put it over the finished video.
                ended = chunk.block + 1 == stream.blocks
                preview = None if ended or side == 0 else ("JPEG", Image.fromarray(frames[-1].numpy()), side)
                host.say(node_id, f"block {chunk.block + 1} of {stream.blocks}: {last / speech.fps:.1f} s")
                bar.update_absolute(chunk.block + 1, stream.blocks, preview)
        except Cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise


def _exactly(samples: Tensor, count: int) -> Tensor:
    """The last frame may outlast the sound by less than a frame."""
    return torch.nn.functional.pad(samples, (0, count - samples.shape[1]))
