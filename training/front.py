"""Stage 2: a small wav2vec2 learns to hear mouths: opening, width, rounding, and how open they have been lately.

python -m training.front --folder .train --minutes 4
"""

import logging
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy
import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from liveavatar_core.encoders.audio_features import HIDDEN_FIELD, HIDDEN_STRIDE, hidden_length
from liveavatar_core.geometry import SAMPLE_RATE
from training.ahead import ahead
from training.graphs import Gradients
from training.run import minimise, read_log, read_weights, stage_parser
from training.sizes import SPEECH_DIM, SPEECH_HEADS, SPEECH_LAYERS
from training.speech.mouths import RATE
from training.speech.sounds import Sound, sound
from training.world.motion import lately_open

log = logging.getLogger(__name__)

SECONDS, PART = 12.0, 5.0  # of a sound, and of what a batch hears of it
LETTERS = 32  # outputs of the letter head; the first of them are trained to be mouths
CONV = 512  # ComfyUI fixes this width
SPREAD = {"open": 0.08, "wide": 0.05, "round": 0.06, "lately": 0.05}  # what moves least would be learned last


def new_front() -> Wav2Vec2ForCTC:
    """wav2vec2-large-xlsr-53-english but for its sizes."""
    config = Wav2Vec2Config(
        hidden_size=SPEECH_DIM,
        intermediate_size=4 * SPEECH_DIM,
        num_hidden_layers=SPEECH_LAYERS,
        num_attention_heads=SPEECH_HEADS,
        vocab_size=LETTERS,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
        conv_dim=(CONV,) * 7,
        apply_spec_augment=False,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
    )
    return Wav2Vec2ForCTC(config)


def make_sounds(seeds: range, seconds: float, *, held_out: bool = False) -> Iterator[Sound]:
    """In as many processes as there are cores: espeak-ng speaks one sentence at a time."""
    workers = min(os.cpu_count() or 1, len(seeds))
    if workers == 1:
        yield from (sound(seed, seconds, held_out=held_out) for seed in seeds)
        return
    with ProcessPoolExecutor(workers) as executor:
        yield from executor.map(_sound, ((seed, seconds, held_out) for seed in seeds), chunksize=4)


def _sound(arguments: tuple[int, float, bool]) -> Sound:
    seed, seconds, held_out = arguments
    return sound(seed, seconds, held_out=held_out)


def normalised(samples: numpy.ndarray) -> Tensor:
    """As the engine gives a whole sound to wav2vec2."""
    waveform = torch.from_numpy(samples).float()
    return (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()


def mouth_at_states(spoken: Sound, first: int, count: int) -> Tensor:
    """(count, 4): open, wide, round, lately open, where each hidden state listens."""
    track = numpy.concatenate((spoken.mouth, lately_open(spoken.mouth)[None]))
    centres = (numpy.arange(first, first + count) * HIDDEN_STRIDE + HIDDEN_FIELD / 2) * (RATE / SAMPLE_RATE) - 0.5
    places = numpy.arange(track.shape[1])
    return torch.from_numpy(numpy.stack([numpy.interp(centres, places, row) for row in track], 1)).float()


def losses(model: Wav2Vec2ForCTC, waveforms: Tensor, mouths: Tensor) -> dict[str, Tensor]:
    """waveforms (B, N), mouths (B, hidden states, 4)."""
    # no cache: it would outlive a graph's memory
    with torch.autocast(waveforms.device.type, torch.bfloat16, enabled=waveforms.is_cuda, cache_enabled=False):
        heard = model(waveforms).logits[..., : mouths.shape[-1]].float()
    error = (heard - mouths).square().mean((0, 1))
    parts = dict(zip(SPREAD, error, strict=True))
    return {"loss": sum(part / SPREAD[name] for name, part in parts.items()) / len(parts), **parts}


def batches(sounds: list[Sound], size: int, device: str) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> parts of random sounds and their mouths."""
    waves = [normalised(spoken.samples) for spoken in sounds]
    length = round(PART * SAMPLE_RATE)
    count = hidden_length(length)
    mouths = [mouth_at_states(spoken, 0, hidden_length(len(spoken.samples))) for spoken in sounds]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = random.Random(step)
        chosen = generator.choices(range(len(waves)), k=size)
        starts = [generator.randrange((len(waves[i]) - length) // HIDDEN_STRIDE + 1) for i in chosen]
        heard = [waves[i][s * HIDDEN_STRIDE :][:length] for i, s in zip(chosen, starts, strict=True)]
        seen = [mouths[i][s : s + count] for i, s in zip(chosen, starts, strict=True)]
        return torch.stack(heard).to(device), torch.stack(seen).to(device)

    return batch


def main() -> None:
    parser = stage_parser(__doc__, minutes=4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--sounds", type=int, default=1500)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reached = read_log(options.folder, "front")
    first = (reached[-1]["step"] if reached else 0) * 1000
    sounds = list(make_sounds(range(first, first + options.sounds), SECONDS))
    log.info("front: %d sounds, %.0f minutes", len(sounds), len(sounds) * SECONDS / 60)
    torch.manual_seed(0)
    model = new_front()
    if weights := read_weights(options.folder, "front"):
        model.load_state_dict(weights)
    model.to(device).train()
    batch = ahead(batches(sounds, options.batch, device), device)
    gradients = Gradients(model, partial(losses, model))
    minimise(
        "front",
        model,
        lambda step: gradients(*batch(step)),
        options.folder,
        minutes=options.minutes,
        whole=options.whole,
        rate=1e-3,
    )
    report(model.eval(), device)


@torch.no_grad()
def report(model: Wav2Vec2ForCTC, device: str) -> None:
    """How well voices that were never heard before are understood."""
    said, heard = [], []
    for spoken in make_sounds(range(8), SECONDS, held_out=True):
        states = hidden_length(len(spoken.samples))
        said.append(mouth_at_states(spoken, 0, states))
        heard.append(model(normalised(spoken.samples)[None].to(device)).logits[0, :, :4].float().cpu())
    pairs = zip(torch.cat(said).T, torch.cat(heard).T, strict=True)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    log.info("front: correlation on unheard voices: open %.3f wide %.3f round %.3f lately %.3f", *correlations)


if __name__ == "__main__":
    main()
