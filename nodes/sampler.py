"""The node that says what video to make. It returns a stream; the work is done when somebody pulls it."""

from comfy_api.latest import io

from liveavatar_core.config import MAX_STEPS, SamplingConfig
from liveavatar_core.errors import InputError
from liveavatar_core.geometry import FRAMES_DROPPED, PIXELS_PER_TOKEN, Geometry, fit_size, frames_for

from . import host
from .loaders import runtime_spec, stamps
from .settings import default_devices
from .types import CATEGORY, Avatar, ModelSocket, RuntimeSocket, Speech, SpeechSocket, StreamSocket

REFERENCE_SWITCH = {"block 4 (original)": 4, "block 1 (paper)": 1, "never": None}
NOISE = {"per block": "block", "per clip (original)": "clip"}
TIMING = {"in sync": FRAMES_DROPPED, "original (picture 3 frames early)": 0}
REFERENCE_LATENT = {"first frame (original, many GPUs)": False, "mid sequence (original, one GPU)": True}

STANDARD_AREA = 704 * 384  # what a picture of any other size is fitted to
LARGEST_AREA = 1280 * 720


class ChunkedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Sampler",
            display_name="Live Avatar Chunked Sampler",
            category=CATEGORY,
            description="A stream of video latents, block by block (12 frames each), as long as the speech. It starts "
            "when a decoder pulls it, and finished latents are kept for decoding again.",
            search_aliases=["ksampler", "talking head", "digital human", "lip sync", "s2v", "live"],
            inputs=[
                ModelSocket.Input("model", tooltip="From a Model Loader or the Demo Model."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, from the Prompt Conditioner or CLIP Text Encode. There is no negative one.",
                ),
                io.Image.Input(
                    "image", tooltip="The speaker, best from the Live Avatar Image Loader. The video has its size."
                ),
                io.Vae.Input("vae", tooltip="Wan 2.1 VAE; encodes the picture. Small decoders cannot."),
                SpeechSocket.Input("speech", tooltip="From the Audio Encoder. The video is as long."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="Denoising steps. The model was distilled for 4; each takes time and memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=420,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Start of the noise. Same seed and same settings: same video.",
                ),
                RuntimeSocket.Input(
                    "runtime",
                    optional=True,
                    tooltip="Devices and precision, from a Runtime node. Without it: ComfyUI's own device.",
                ),
                io.Combo.Input(
                    "reference_switch",
                    options=list(REFERENCE_SWITCH),
                    advanced=True,
                    tooltip="When the reference becomes the first generated latent, which keeps long videos stable.",
                ),
                io.Int.Input(
                    "reference_distance",
                    default=0,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip="How far ahead the reference sits, in latents. 0: drawn from the seed, 4..30.",
                ),
                io.Combo.Input(
                    "timing",
                    options=list(TIMING),
                    advanced=True,
                    tooltip="The original shows each frame 3 frames before its sound; in sync corrects that.",
                ),
                io.Combo.Input(
                    "noise",
                    options=list(NOISE),
                    advanced=True,
                    tooltip="per block: the same on every device. per clip: drawn for four blocks at once on the "
                    "device, as in the original.",
                ),
                io.Combo.Input(
                    "reference_latent",
                    options=list(REFERENCE_LATENT),
                    advanced=True,
                    tooltip="How the picture is encoded: as the first frame, or as one in the middle, which the "
                    "original does on one GPU.",
                ),
                io.Float.Input(
                    "shift",
                    default=3.0,
                    min=0.1,
                    max=20.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Of the noise schedule: higher spends more of the steps on layout, lower on detail.",
                ),
                io.Boolean.Input(
                    "skip_last_step",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out the last step, which is almost null: a quarter faster at 4 steps, slightly "
                    "other pictures. Not the same as one step less.",
                ),
            ],
            outputs=[
                StreamSocket.Output(
                    "LIVEAVATAR_STREAM", display_name="stream", tooltip="To Online VAE Decode, which pulls it."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return default_devices()

    @classmethod
    def execute(
        cls,
        model,
        positive,
        image,
        vae,
        speech: Speech,
        steps,
        seed,
        runtime=None,
        reference_switch="block 4 (original)",
        reference_distance=0,
        timing="in sync",
        noise="per block",
        reference_latent="first frame (original, many GPUs)",
        shift=3.0,
        skip_last_step=False,
    ) -> io.NodeOutput:
        from liveavatar_core.encoders.audio_features import FeatureStream
        from liveavatar_core.io.sound import to_speech
        from liveavatar_core.runtime.runtime import inspect_model
        from liveavatar_core.runtime.stream import StreamRequest

        sampling = SamplingConfig(
            steps=steps,
            shift=shift,
            seed=seed,
            noise=NOISE[noise],
            distance=reference_distance or None,
            reanchor_block=REFERENCE_SWITCH[reference_switch],
            skip_last_step=skip_last_step,
        )
        picture = fitted(image)
        spec = runtime if runtime is not None else runtime_spec()
        geometry = Geometry(*picture.shape[1:])
        spec = host.runtime().placed(model, inspect_model(model), spec, sampling.evaluations, geometry)
        text = positive[0][0][0].detach().float().cpu()
        lead = TIMING[timing]
        mid_sequence = REFERENCE_LATENT[reference_latent]
        frames = frames_for(speech.seconds, speech.fps)
        weights = (host.fingerprint(vae.get_sd().values()), host.fingerprint(speech.encoder.get_sd().values()))
        key = host.content_key(
            model,
            stamps([model.checkpoint, *(lora.path for lora in model.loras)]),
            spec,
            sampling,
            picture,
            text,
            speech.waveform,
            speech.sample_rate,
            speech.fps,
            lead,
            mid_sequence,
            weights,
        )
        request = StreamRequest(
            model=model,
            runtime=spec,
            sampling=sampling,
            picture=picture,
            text=text,
            features=FeatureStream(
                to_speech(speech.waveform, speech.sample_rate),
                host.HostSpeechEncoder(speech.encoder),
                fps=speech.fps,
                lead_frames=lead,
            ),
            vae=host.HostVAE(vae, spec.decoder),
            frames=frames,
            mid_sequence=mid_sequence,
        )
        return io.NodeOutput(Avatar(host.stream(key, request), speech, frames))


def fitted(image):
    """An IMAGE as the model takes it, (3, H, W) in [-1, 1]. One from the Image Loader keeps its size exactly."""
    from liveavatar_core.encoders.picture import cover

    if image.ndim != 4 or not image.numel():
        raise InputError(
            f"the image has shape {tuple(image.shape)}; connect one picture (batch, height, width, channels)"
        )
    picture = image[0].float().cpu()
    rows, columns = picture.shape[:2]
    if rows % PIXELS_PER_TOKEN or columns % PIXELS_PER_TOKEN or rows * columns > LARGEST_AREA:
        rows, columns = fit_size(rows, columns, STANDARD_AREA)
    return cover(picture, rows, columns)
