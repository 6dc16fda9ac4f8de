"""Minutes of one voice saying nonsense with pauses, silence, and music; each with the mouth that belongs to it."""

import random
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy.signal import butter, resample_poly, sosfilt

from liveavatar_core.geometry import SAMPLE_RATE
from training.speech.mouths import RATE, mouth_track
from training.speech.voices import LANGUAGES, VARIANTS, Voice, say

HELD_OUT_VOICES = {("en-gb-scotland", "f5"), ("en-us", "m7"), ("de", "f2"), ("es", "m5")}  # never trained on

WORDS = {
    "en": "the of and we you they see say make find over under every never people water moon papa mama baby window "
    "butter movie family beautiful problem question purple summer animal remember yellow open quiet five seven maybe "
    "hello goodbye welcome thank please story village mountain river music voice picture paper apple money morning "
    "evening father mother brother because between through around about above before after always often very much "
    "small great warm cold quick slow happy funny clever brave humble sharp smooth round wide speak listen follow "
    "believe borrow imagine wonder discover explain forget improve protect visit travel whisper shout laugh smile",
    "de": "der die das und wir ihr sie haben machen sehen immer niemals Wasser Mond Mutter Vater Bruder Fenster Butter "
    "Familie Problem Frage Sommer Tiere gelb offen ruhig fünf sieben vielleicht hallo bitte danke Geschichte Dorf Berg "
    "Fluss Musik Stimme Bild Papier Apfel Geld Morgen Abend weil zwischen durch herum oben vorher nachher oft sehr",
    "es": "el la los y nosotros ustedes ver hacer siempre nunca agua luna mama papa ventana mantequilla familia "
    "problema pregunta verano animales amarillo abierto tranquilo cinco quizas hola gracias historia pueblo rio "
    "montaña musica voz imagen papel manzana dinero mañana tarde porque entre alrededor antes despues muy pequeño",
    "fr": "le la les et nous vous voir faire toujours jamais eau lune maman papa frère fenêtre beurre famille problème "
    "question été animaux jaune ouvert tranquille cinq sept bonjour merci histoire village montagne rivière musique "
    "voix image papier pomme argent matin soir parce entre autour avant après très petit grand chaud froid heureux",
    "it": "il la gli e noi voi vedere fare sempre mai acqua luna mamma papà fratello finestra burro famiglia problema "
    "domanda estate animali giallo aperto tranquillo cinque sette ciao grazie storia villaggio montagna fiume musica "
    "voce immagine carta mela soldi mattina sera perché tra intorno prima dopo molto piccolo grande caldo freddo",
}


@dataclass(frozen=True, slots=True)
class Sound:
    samples: NDArray[numpy.float32]  # 16 kHz mono
    mouth: NDArray[numpy.float32]  # (3, 100 a second)


def sound(seed: int, seconds: float, *, held_out: bool = False) -> Sound:
    """Mostly speech; one in eight is music or noise with a closed mouth. `held_out`: a voice no other sound has.

    Words and voice are the seed's; espeak-ng varies their timing a little from call to call.
    """
    generator = random.Random(f"{seed} {held_out}")
    if generator.random() < 0.125 and not held_out:
        return music(seed, seconds)
    spoken = speech(generator, seconds, held_out)
    loudness = 10 ** generator.uniform(-1.0, -0.1) / max(1e-4, float(numpy.abs(spoken.samples).max()))
    samples = _colour(generator, spoken.samples * loudness)
    if generator.random() < 0.3:
        samples = samples + _hiss(generator, len(samples))
    return Sound(samples.clip(-1, 1).astype(numpy.float32), spoken.mouth)


def speech(generator: random.Random, seconds: float, held_out: bool) -> Sound:
    """One voice, sentences and pauses, until the time is full."""
    voice = _voice(generator, held_out)
    samples = numpy.zeros(round(seconds * SAMPLE_RATE), numpy.float32)
    phonemes = []
    time = generator.choice((0.0, generator.uniform(0, 1.5)))
    while time < seconds:
        said = say(_sentence(generator, voice.language[:2]), voice)
        wave = resample_poly(said.samples, SAMPLE_RATE // 50, said.rate // 50)
        start = round(time * SAMPLE_RATE)
        wave = wave[: len(samples) - start]
        samples[start : start + len(wave)] = wave
        phonemes += [type(p)(p.name, p.start + time, p.end + time) for p in said.phonemes]
        time += len(said.samples) / said.rate + generator.choice((0.05, 0.3, generator.uniform(0.3, 2.5)))
    return Sound(samples, mouth_track(phonemes, seconds))


def music(seed: int, seconds: float) -> Sound:
    """Chords, beats or noise; nobody speaks."""
    generator = numpy.random.default_rng(seed)
    time = numpy.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = numpy.zeros_like(time)
    beat = generator.uniform(0.25, 0.7)
    phase = time % beat / beat
    for _ in range(generator.integers(0, 5)):
        note = 110 * 2 ** (generator.integers(0, 36) / 12)
        wobble = generator.uniform(0, 3) * numpy.sin(2 * numpy.pi * 5 * time)
        tone = sum(numpy.sin(2 * numpy.pi * k * (note * time + wobble / note)) / k for k in range(1, 5))
        samples += tone * numpy.exp(-phase * generator.choice([0.0, 2.0, 5.0])) * generator.uniform(0.1, 0.4)
    if generator.random() < 0.5:
        samples += generator.normal(size=len(time)) * numpy.exp(-phase * 25) * generator.uniform(0, 0.5)
    samples += generator.normal(size=len(time)) * 10 ** generator.uniform(-5, -2)
    samples *= 10 ** generator.uniform(-1.0, -0.1) / max(1e-3, numpy.abs(samples).max())
    if generator.random() < 0.25:
        samples *= 1e-3  # as good as silence
    return Sound(samples.astype(numpy.float32), numpy.zeros((3, round(seconds * RATE)), numpy.float32))


def _voice(generator: random.Random, held_out: bool) -> Voice:
    while True:
        name = generator.choice(LANGUAGES), generator.choice(VARIANTS)
        if (name in HELD_OUT_VOICES) == held_out:
            break
    rate, pitch = generator.randint(110, 210), generator.randint(20, 80)
    return Voice(*name, rate=rate, pitch=pitch, range=generator.randint(20, 80))


def _sentence(generator: random.Random, language: str) -> str:
    words = WORDS[language].split()
    chosen = [generator.choice(words) for _ in range(generator.randint(2, 11))]
    for i in range(3, len(chosen) - 1, 4):
        chosen[i] += generator.choice(("", ","))
    return " ".join(chosen) + generator.choice((".", "?", "!"))


def _colour(generator: random.Random, samples: NDArray) -> NDArray:
    """A microphone: sometimes no depth, sometimes no height."""
    if generator.random() < 0.2:
        samples = sosfilt(butter(2, generator.uniform(100, 350), "high", fs=SAMPLE_RATE, output="sos"), samples)
    if generator.random() < 0.2:
        samples = sosfilt(butter(2, generator.uniform(2800, 6500), "low", fs=SAMPLE_RATE, output="sos"), samples)
    return samples


def _hiss(generator: random.Random, length: int) -> NDArray:
    noise = numpy.random.default_rng(generator.randrange(1 << 30)).normal(size=length)
    return noise * 10 ** generator.uniform(-4.0, -2.2)
