"""Who can be drawn: every attribute of a face and its scene, drawn from a seed, and the combinations kept for tests.

A Look is plain numbers and words.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

Colour = tuple[float, float, float]

KINDS = ("portrait", "anime", "game")
BACKGROUNDS = ("studio", "office", "forest", "city", "beach", "forge")
LIGHTS = ("neutral", "studio", "warm", "daylight", "golden", "side", "neon", "candle")
GRADES = ("none", "film", "oil", "vivid", "pastel")
HAIRS = ("short", "bob", "long", "bun", "tails", "spikes", "bald")
CLOTHES = ("shirt", "suit", "hoodie", "sailor", "armour", "apron")

SKINS = ("f6d7c3", "eabf9f", "d9a27c", "b97c56", "8d5a3b", "5f3a28")
FANTASY_SKINS = ("8fa860", "7f9fc0", "b07fb0")
HAIR_COLOURS = ("2a2020", "4b2e20", "7d4b26", "b5762f", "dcb35c", "a8402a", "8e8e96", "e8e4dc")
ANIME_HAIR = ("3b3350", "f08aa8", "7fb8e8", "8fd3a8", "f2c14e", "b58ae0", "e86a4a", "e9e6f2")
IRISES = ("4a2f1d", "6b4423", "3f6f8f", "4f7f4f", "6f6f7f", "8a5aa8")
FABRICS = ("2b3a55", "8c2f39", "2f6b5e", "d9d4c8", "3a3a40", "c98f3a", "6a4c93", "4f86c6", "a3b18a", "e07a5f")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One face in one scene. Lengths in half picture heights or in head sizes, angles in radians, colours in 0..1."""

    kind: str
    seed: int  # of all texture and of where things stand
    x: float
    y: float
    size: float  # of the head, in half picture heights; all below is in head sizes
    width: float
    jaw: float  # how much narrower the chin is
    skin: Colour
    hair: Colour
    iris: Colour
    lip: Colour
    cloth: Colour
    trim: Colour
    hair_style: str
    fringe: float
    fringe_count: float
    parting: float
    eye: float
    eye_gap: float
    brow: float
    brow_tilt: float
    nose: float
    mouth: float
    beard: float = 0.0
    glasses: bool = False
    pointed_ears: bool = False
    clothes: str
    worn: str = ""
    prop: str = ""
    background: str
    light: str = "neutral"
    grade: str = "none"


def draw_look(seed: int, kind: str, *, held_out: bool = False) -> Look:
    """The look of a seed. `held_out` looks have a combination of attributes that no other look has."""
    generator = random.Random(f"{seed} {kind} {held_out}")
    while True:
        look = _draw(generator, kind)
        if is_held_out(look) == held_out:
            return look


def is_held_out(look: Look) -> bool:
    """One in eight combinations of hair, clothes and background is never trained on."""
    hair, clothes = HAIRS.index(look.hair_style), CLOTHES.index(look.clothes)
    return (3 * hair + 5 * clothes + 2 * BACKGROUNDS.index(look.background) + KINDS.index(look.kind)) % 8 == 0


def _draw(generator: random.Random, kind: str) -> Look:
    between = generator.uniform

    def one_of(**weights: float) -> str:
        return generator.choices(list(weights), list(weights.values()))[0].replace("_", " ").strip()

    def some(colours: Sequence[str], spread: float = 0.04) -> Colour:
        colour = generator.choice(colours)
        parts = (int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4))
        return tuple(min(1.0, max(0.0, part + between(-spread, spread))) for part in parts)

    human = kind != "game" or generator.random() < 0.7
    skin = some(SKINS[:3] if kind == "anime" else SKINS if human else FANTASY_SKINS, 0.03)
    shared = {
        "kind": kind,
        "seed": generator.randrange(1 << 16),
        "x": between(-0.08, 0.08),
        "skin": skin,
        "iris": some(IRISES),
        "cloth": some(FABRICS),
        "trim": some(FABRICS),
        "background": generator.choice(BACKGROUNDS),
        "parting": between(-0.5, 0.5),
        "brow_tilt": between(0.0, 0.14),
    }
    if kind == "portrait":
        return Look(
            **shared,
            y=between(-0.06, 0.02),
            size=between(0.50, 0.58),
            width=between(0.74, 0.86),
            jaw=between(0.08, 0.24),
            hair=some(HAIR_COLOURS),
            lip=_mix(skin, (0.72, 0.26, 0.28), between(0.35, 0.75)),
            hair_style=one_of(short=3, bob=2, long=3, bun=1.5, bald=0.7),
            fringe=between(0.0, 0.10),
            fringe_count=between(0.6, 2.0),
            eye=between(0.150, 0.175),
            eye_gap=between(0.33, 0.38),
            brow=between(0.028, 0.05),
            nose=between(0.8, 1.15),
            mouth=between(0.25, 0.31),
            beard=between(0.5, 1.0) * (generator.random() < 0.2),
            glasses=generator.random() < 0.25,
            clothes=one_of(shirt=2, suit=3, hoodie=2, apron=0.5),
            worn=one_of(_=8, band=1, headphones=1, cap=1),
            prop=one_of(_=5, plant=1, mug=1),
        )
    if kind == "anime":
        return Look(
            **shared,
            y=between(-0.04, 0.03),
            size=between(0.52, 0.60),
            width=between(0.84, 0.92),
            jaw=between(0.20, 0.30),
            hair=some(ANIME_HAIR),
            lip=_mix(skin, (0.85, 0.35, 0.38), 0.75),
            hair_style=one_of(short=1, bob=2, long=3, bun=1, tails=2, spikes=2),
            fringe=between(0.20, 0.34),
            fringe_count=between(2.2, 4.0),
            eye=between(0.235, 0.275),
            eye_gap=between(0.40, 0.44),
            brow=between(0.020, 0.03),
            nose=between(0.7, 1.1),
            mouth=between(0.19, 0.24),
            glasses=generator.random() < 0.15,
            clothes=one_of(shirt=1, hoodie=2, sailor=4, suit=1),
            worn=one_of(_=4, ribbon=2, headphones=2, cat_ears=2),
            prop=one_of(_=6, plant=1),
        )
    return Look(
        **shared,
        y=between(-0.02, 0.04),
        size=between(0.50, 0.57),
        width=between(0.86, 0.98),
        jaw=between(0.02, 0.14),
        hair=some(HAIR_COLOURS),
        lip=_mix(skin, (0.55, 0.22, 0.22), between(0.4, 0.6)),
        hair_style=one_of(short=2, bob=1, long=2, tails=1, spikes=1, bald=1),
        fringe=between(0.04, 0.16),
        fringe_count=between(1.0, 2.5),
        eye=between(0.145, 0.18),
        eye_gap=between(0.34, 0.40),
        brow=between(0.05, 0.085),
        nose=between(1.2, 1.7),
        mouth=between(0.26, 0.33),
        beard=between(0.9, 1.3) * (human and generator.random() < 0.6),
        pointed_ears=generator.random() < 0.33,
        clothes=one_of(armour=3, apron=2, hoodie=1, shirt=0.5),
        worn=one_of(_=2, band=1, horned_helmet=2, crown=1.5, hood=1),
        prop=one_of(_=1, hammer=2, staff=2, shield=2),
    )


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(p * (1 - share) + q * share for p, q in zip(a, b, strict=True))
