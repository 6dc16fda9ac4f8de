"""A node that measures what a video costs on this machine, with the user's own model and settings."""

import json
import logging
from dataclasses import replace
from functools import partial

import comfy.model_management
from comfy_api.latest import io, ui

from liveavatar_core.config import SamplingConfig

from . import host
from .loaders import runtime_spec
from .memory import geometry_of
from .preset import size_input, steps_input
from .types import CATEGORY, ModelSocket, RuntimeSocket

log = logging.getLogger(__name__)

CEILING_BYTES = 2 * 1024**3  # of products and copies at the model's shapes


class Benchmark(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiveAvatar_Benchmark",
            display_name="Live Avatar Benchmark",
            category=CATEGORY,
            description="Loads the model and measures, in a minute or two: one denoising step against what this card "
            "can do, the decoder, frames a second of a whole stream, time to the first frame, and memory. Picture, "
            "prompt and sound are random; no video comes out.",
            search_aliases=["speed", "fps", "measure", "performance"],
            inputs=[
                ModelSocket.Input("model", tooltip="From a Model Loader or the Demo Model."),
                io.Vae.Input("vae", tooltip="The VAE you decode with."),
                io.AudioEncoder.Input("audio_encoder", tooltip="From Load Audio Encoder."),
                size_input(),
                steps_input(),
                io.Image.Input("image", optional=True, tooltip="The picture the video will be made of; for its size."),
                RuntimeSocket.Input(
                    "runtime", optional=True, tooltip="Devices and precision to measure, from a Runtime node."
                ),
                io.Boolean.Input(
                    "skip_last_step",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="As in the sampler: one step less to do.",
                ),
                io.Int.Input(
                    "blocks",
                    default=20,
                    min=13,
                    max=10_000,
                    optional=True,
                    advanced=True,
                    tooltip="Length of the stream, in blocks of 12 frames; long ones show whether memory grows.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[io.String.Output("STRING", display_name="table", tooltip="What was measured, as text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")  # must run every time

    @classmethod
    def execute(
        cls, model, vae, audio_encoder, size, steps, image=None, runtime=None, skip_last_step=False, blocks=20
    ) -> io.NodeOutput:
        from liveavatar_core.bench.ceilings import measure_ceilings
        from liveavatar_core.bench.measure import Case, measure
        from liveavatar_core.bench.report import ceilings_table, table
        from liveavatar_core.runtime.runtime import choose_precision, inspect_model
        from liveavatar_core.weights.build import work_dtype

        spec = runtime if runtime is not None else runtime_spec()
        spec = replace(spec, precision=choose_precision(model, spec.precision))
        config, geometry = inspect_model(model), geometry_of(size, image)
        sampling = SamplingConfig(steps=steps, seed=1, skip_last_step=skip_last_step)
        spec = host.runtime().placed(model, config, spec, sampling.evaluations, geometry)
        case = Case(
            model=model,
            config=config,
            runtime=spec,
            sampling=sampling,
            geometry=geometry,
            vae=host.HostVAE(vae, spec.decoder),
            decoder=partial(host.stream_decoder, vae, spec.decoder),
            speech=host.HostSpeechEncoder(audio_encoder),
            blocks=blocks,
        )

        def say(text: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            host.say(cls.hidden.unique_id, text)

        with host.settling():
            say("measuring what the card can do")
            first = spec.devices[0]
            host.reserve(first, CEILING_BYTES)
            ceilings = measure_ceilings(config, geometry, first, work_dtype(spec.precision, first), [spec.attention])
            line = measure(host.runtime(), case, ceilings, say)
        rates = ceilings.rates(config, geometry)
        about = {"size": f"{geometry.width}x{geometry.height}", "steps": steps}
        log.info("benchmark %s", json.dumps(about | line | {"ceilings": rates}))
        text = f"{table([line])}\n\nThis card at its best, hot:\n{ceilings_table(rates)}"
        host.say(cls.hidden.unique_id, "measured")
        return io.NodeOutput(text, ui=ui.PreviewText(text))
