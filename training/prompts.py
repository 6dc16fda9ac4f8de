"""Sentences that say of a scene what they say, and the words a small text encoder has to know.

A prompt names any of background, light, grade and action; what it does not name stays as the reference picture has it.
"""

import random
from dataclasses import dataclass

from training.speech.sounds import WORDS

_SUBJECTS = {
    "portrait": ("a person", "a woman", "a man", "a presenter", "a friendly person", "somebody"),
    "anime": ("an anime girl", "an anime character", "a manga hero", "a cartoon girl", "a cartoon character"),
    "game": ("a dwarf", "a game character", "a knight", "a cheerful dwarf", "an elf", "a blacksmith", "a warrior"),
}
_BACKGROUNDS = {
    "studio": ("in a studio", "in front of a plain wall", "before a plain background"),
    "office": ("in an office", "in a room with books", "in a library", "in a quiet room", "at a desk in an office"),
    "forest": ("in a forest", "in the woods", "among green trees"),
    "city": ("in a city at night", "in front of skyscrapers at night", "in a dark city"),
    "beach": ("on the beach", "by the sea", "at the sea under a blue sky"),
    "forge": ("in a forge", "in a smithy", "in front of a fire"),
}
_LIGHTS = {
    "neutral": ("even light", "neutral light"),
    "studio": ("soft studio lighting", "soft light"),
    "warm": ("warm lighting", "warm light"),
    "daylight": ("natural daylight", "cool daylight"),
    "golden": ("golden hour light", "evening sun"),
    "side": ("dramatic side light", "hard light from the side"),
    "neon": ("neon light", "neon lights"),
    "candle": ("candlelight", "light of a candle"),
}
_GRADES = {
    "film": ("black and white film", "black and white"),
    "oil": ("oil painting", "an old painting"),
    "vivid": ("Pixar style", "Disney style", "vivid colours"),
    "pastel": ("Studio Ghibli style", "pastel colours", "watercolour"),
}
_ACTIONS = {
    "talk": ("is talking to the camera", "is speaking", "talking", "talking to the camera"),
    "calm": ("speaking calmly", "is speaking calmly", "talking calmly"),
    "lively": ("speaking with enthusiasm", "explaining with small gestures", "talking with energy"),
    "smile": ("smiling warmly", "is smiling", "talking with a smile"),
    "laugh": ("laughing heartily", "laughing gently", "is laughing"),
    "nod": ("nodding slowly", "is nodding", "talking and nodding"),
}
# Said of somebody, whom the picture shows anyway; they change nothing, whatever else their words may mean.
_DETAILS = (
    *(f"with {colour} hair" for colour in ("brown", "green", "red", "golden", "black", "dark", "long")),
    *(f"with a {colour} beard" for colour in ("red", "white", "warm brown")),
    *(f"in a {thing}" for thing in ("green dress", "blue shirt", "white coat", "black suit")),
    *(f"with {thing}" for thing in ("a horned helmet", "a hammer", "glasses", "blue eyes", "a book", "headphones")),
)
# Said of a class of pictures, which the picture shows anyway; they change nothing.
_STYLES = {
    "portrait": ("photorealistic portrait", "a photo", "realistic"),
    "anime": ("anime style", "flat colours"),
    "game": ("Blizzard cinematics style", "game art", "claymation"),
}
_IDLE = ("high quality", "sharp", "4k", "steady lips", "detailed", "the camera does not move", "frontal")
_STRANGERS = WORDS["en"].split()  # people write more than the model knows

NAMED = {"background": _BACKGROUNDS, "light": _LIGHTS, "grade": _GRADES, "action": _ACTIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a prompt asks for; None is not named."""

    kind: str
    background: str | None = None
    light: str | None = None
    grade: str | None = None
    action: str | None = None


def draw_wish(generator: random.Random, kind: str) -> Wish:
    shares = {"background": 0.5, "light": 0.5, "grade": 0.25, "action": 0.7}
    chosen = {
        name: generator.choice(list(NAMED[name])) if generator.random() < share else None
        for name, share in shares.items()
    }
    return Wish(kind=kind, **chosen)


def write(wish: Wish, generator: random.Random) -> str:
    """One of many ways to say it."""

    def one(words: dict[str, tuple[str, ...]], key: str | None) -> str:
        return generator.choice(words[key]) if key is not None else ""

    subject = generator.choice(_SUBJECTS[wish.kind]) if generator.random() < 0.85 else ""
    if subject and generator.random() < 0.4:
        subject += " " + generator.choice(_DETAILS)
    action, background = one(_ACTIONS, wish.action), one(_BACKGROUNDS, wish.background)
    rest = [one(_LIGHTS, wish.light), one(_GRADES, wish.grade)]
    if wish.action not in (None, "talk") and generator.random() < 0.4:  # as the nodes write it
        rest.append(action)
        action = one(_ACTIONS, "talk")
    sentence = " ".join(part for part in (subject, action, background) if part)
    if generator.random() < 0.3 and background:
        sentence = ", ".join(part for part in (" ".join(p for p in (subject, background) if p), action) if part)
    if generator.random() < 0.4:
        rest.append(generator.choice(_STYLES[wish.kind]))
    if generator.random() < 0.3:
        rest.append(generator.choice(_IDLE))
    generator.shuffle(rest)
    prompt = ", ".join(part for part in (sentence, *rest) if part)
    if generator.random() < 0.5:
        prompt = prompt[:1].upper() + prompt[1:]
    return prompt + generator.choice(("", "", "."))


def among_strangers(prompt: str, generator: random.Random) -> str:
    """With words here and there that mean nothing to the model."""
    words = prompt.split()
    for _ in range(generator.choice((0, 0, 1, 3))):
        words.insert(generator.randrange(len(words) + 1), generator.choice(_STRANGERS))
    return " ".join(words)


def vocabulary() -> list[str]:
    """Sentences that hold every word above in every ending it is written with, for a tokenizer to learn from."""
    generator = random.Random(0)
    return [write(draw_wish(generator, kind), generator) for _ in range(2000) for kind in _SUBJECTS]
