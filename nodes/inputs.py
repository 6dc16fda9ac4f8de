"""Nodes that prepare what the model is given: picture, speech, prompt."""

import hashlib
import os

import folder_paths
from comfy_api.latest import io, ui

from liveavatar_core.errors import InputError
from liveavatar_core.geometry import DEFAULT_FPS, MIN_SIDE, PIXELS_PER_TOKEN, Geometry, frames_for

from . import host
from .preset import DEFAULT_SIZE, SIZES, sides
from .types import CATEGORY, Speech, SpeechSocket

CONNECTED = "use the connected image"


class ImageLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = folder_paths.get_input_directory()
        files = [name for name in os.listdir(inputs) if os.path.isfile(os.path.join(inputs, name))]
        return io.Schema(
            node_id="LiveAvatar_ImageLoader",
            display_name="Live Avatar Image Loader",
            category=CATEGORY,
            description="Fits the speaker's picture to the size of the video, and says what that size is. Best: one "
            "person, frontal, centred, eyes and mouth free, one consistent style, good light.",
            search_aliases=["portrait", "reference image", "resize", "crop", "talking head", "digital human"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[CONNECTED, *sorted(folder_paths.filter_files_content_types(files, ["image"]))],
                    default=CONNECTED,
                    tooltip="A picture from the input folder, or the connected image (Load Image can upload one).",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=DEFAULT_SIZE,
                    tooltip="How many pixels the video may have; the shape is the picture's own. Larger is slower and "
                    "takes more memory.",
                ),
                io.Image.Input("image", optional=True, tooltip="The speaker. Used while file says so."),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=2048,
                    step=PIXELS_PER_TOKEN,
                    advanced=True,
                    tooltip="0: from size. Set both for an exact size; the picture is cropped to it.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=2048,
                    step=PIXELS_PER_TOKEN,
                    advanced=True,
                    tooltip="0: from size. Set both for an exact size; the picture is cropped to it.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["cover", "original"],
                    default="cover",
                    advanced=True,
                    tooltip="cover: fill the frame and crop. original: size and black bars of the original code.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    display_name="image",
                    tooltip="The picture at the video's size. To the Chunked Sampler, Memory Plan, Benchmark.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, size, width, height, fit, image=None):
        if file == CONNECTED:
            return ""
        with open(folder_paths.get_annotated_filepath(file), "rb") as handle:
            return (
                hashlib.file_digest(handle, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else (hashlib.sha256(handle.read()).hexdigest())
            )

    @classmethod
    def validate_inputs(cls, file):
        if file != CONNECTED and not folder_paths.exists_annotated_filepath(file):
            return f"picture {file!r} is not in the input folder; upload it or choose another"
        return True

    @classmethod
    def execute(cls, file, size, width, height, fit, image=None) -> io.NodeOutput:
        from liveavatar_core.encoders.picture import cover, picture_warnings, reference_crop
        from liveavatar_core.geometry import fit_size, reference_size

        picture = _first(image) if file == CONNECTED else _read(folder_paths.get_annotated_filepath(file))
        warnings = picture_warnings(picture)
        across, down = sides(size)
        rows, columns = picture.shape[:2]
        if bool(width) != bool(height):
            raise InputError(f"width is {width} and height is {height}; set both, or neither to follow size")
        if width and min(width, height) < MIN_SIDE:
            raise InputError(f"the size is {width}x{height} px; each side must have at least {MIN_SIDE} px")
        if fit == "original":
            target = reference_size(rows, columns, across * down)
            pixels = reference_crop(picture, *target)
        else:
            target = (height, width) if width else fit_size(rows, columns, across * down)
            pixels = cover(picture, *target)
        geometry = Geometry(*target)
        prepared = ((pixels + 1) / 2).permute(1, 2, 0).unsqueeze(0)
        lines = [
            f"video: {geometry.width} x {geometry.height} px, {geometry.tokens_per_block} tokens a block",
            *warnings,
        ]
        host.say(cls.hidden.unique_id, "\n".join(lines))
        return io.NodeOutput(prepared, ui=ui.PreviewImage(prepared, cls=cls))


def _first(image):
    if image is None:
        raise InputError("no picture was given; choose a file or connect an image")
    return image[0].float().cpu()


def _read(path: str):
    """A picture file with its transparency, (H, W, 3 or 4) in 0..1."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            has_alpha = "A" in picture.getbands() or "transparency" in picture.info
            pixels = np.asarray(picture.convert("RGBA" if has_alpha else "RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{os.path.basename(path)} cannot be read as a picture ({error}); use a PNG or JPEG"
        ) from error
    return torch.from_numpy(pixels.copy()).float() / 255


class AudioEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_AudioEncoder",
            display_name="Live Avatar Audio Encoder",
            category=CATEGORY,
            description="Speech for the avatar. It is encoded while the video is made, so hours are no problem.",
            search_aliases=["speech", "voice", "wav2vec", "lip sync", "fps"],
            inputs=[
                io.Audio.Input(
                    "audio", tooltip="Speech; the video is as long as it is. Music behind it disturbs the lips."
                ),
                io.AudioEncoder.Input(
                    "audio_encoder", tooltip="wav2vec2-large-xlsr-53-english, from Load Audio Encoder."
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=86400.0,
                    step=0.5,
                    tooltip="Use only the beginning. 0: all of it.",
                ),
                io.Int.Input(
                    "fps",
                    default=DEFAULT_FPS,
                    min=8,
                    max=60,
                    advanced=True,
                    tooltip="Frames a second. 25 as released; the model was trained at 16.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[SpeechSocket.Output("LIVEAVATAR_AUDIO", display_name="speech", tooltip="To the Chunked Sampler.")],
        )

    @classmethod
    def execute(cls, audio, audio_encoder, seconds, fps) -> io.NodeOutput:
        from liveavatar_core.io.sound import check_sound

        rate = audio["sample_rate"]
        waveform = audio["waveform"][0].float().cpu()
        if seconds:
            waveform = waveform[:, : round(seconds * rate)]
        warnings = check_sound(waveform, rate)
        speech = Speech(waveform, rate, audio_encoder, fps)
        length = f"{speech.seconds:.2f} s of sound, {frames_for(speech.seconds, fps)} frames"
        host.say(cls.hidden.unique_id, "\n".join([length, *warnings]))
        return io.NodeOutput(speech)


NONE = "none"
STYLES = [
    NONE,
    "photorealistic portrait",
    "Pixar style",
    "Studio Ghibli style",
    "anime style",
    "Disney style",
    "Blizzard cinematics style",
    "oil painting",
    "claymation",
]
LIGHTS = [
    NONE,
    "soft studio lighting",
    "warm lighting",
    "natural daylight",
    "golden hour light",
    "dramatic side light",
    "neon light",
    "candlelight",
]
ACTIONS = [
    NONE,
    "speaking calmly",
    "laughing gently",
    "laughing heartily",
    "nodding slowly",
    "speaking with enthusiasm",
    "smiling warmly",
    "explaining with small gestures",
]


class PromptConditioner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_PromptConditioner",
            display_name="Live Avatar Prompt Conditioner",
            category=CATEGORY,
            description="Encodes the prompt. Say who speaks, where, how; a named style, light and action help clearly. "
            "Shows the words it sends.",
            search_aliases=["prompt", "text", "style", "clip text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="umT5-XXL, from Load CLIP with type wan."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="A person is talking to the camera",
                    tooltip="Example: a cheerful dwarf in a forge, laughing heartily, warm lighting.",
                ),
                io.Combo.Input(
                    "style", options=STYLES, default=NONE, tooltip="The picture's style, added to the prompt."
                ),
                io.Combo.Input(
                    "lighting", options=LIGHTS, default=NONE, tooltip="The light in the picture, added to the prompt."
                ),
                io.Combo.Input(
                    "action", options=ACTIONS, default=NONE, tooltip="What the speaker does, added to the prompt."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Conditioning.Output("CONDITIONING", display_name="positive", tooltip="To the Chunked Sampler."),
                io.String.Output("STRING", display_name="prompt", tooltip="The words as they were sent."),
            ],
        )

    @classmethod
    def execute(cls, clip, text, style, lighting, action) -> io.NodeOutput:
        prompt = compose_prompt(text, style, lighting, action)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        host.say(cls.hidden.unique_id, prompt or "(empty prompt)")
        return io.NodeOutput(conditioning, prompt)


def compose_prompt(text: str, style: str = NONE, lighting: str = NONE, action: str = NONE) -> str:
    """What is sent to the text encoder: the text, then action, light and style, each once."""
    parts = [text.strip().rstrip(".,;")]
    for helper in (action, lighting, style):
        if helper != NONE and helper.lower() not in text.lower():
            parts.append(helper)
    return ", ".join(part for part in parts if part)
