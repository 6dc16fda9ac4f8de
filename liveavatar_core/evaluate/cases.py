"""A set: every picture with every sound and prompt, in every variant, each with the file its video goes to."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from liveavatar_core.client.workflow import Workflow, find, patch
from liveavatar_core.errors import InputError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
SOUNDS = {".wav", ".mp3", ".flac", ".ogg", ".m4a"}
SIZES, STEPS = ("384*256", "688*368", "704*384"), (3, 4, 5)  # that the article compares
ABLATIONS = ("prompt", "size", "steps")


@dataclass(frozen=True, slots=True)
class Case:
    kind: str  # the folder of the picture
    picture: Path
    sound: Path
    prompt: str
    variant: str
    workflow: Workflow  # but for picture and sound, which a server has to be given first
    video: Path


def cases(
    workflow: Workflow,
    pictures: Path,
    sounds: Path,
    prompts: Path,
    out: Path,
    ablation: str | None = None,
) -> list[Case]:
    kinds = sorted(folder.name for folder in pictures.iterdir() if folder.is_dir()) if pictures.is_dir() else []
    faces = [(kind, picture) for kind in kinds for picture in _files(pictures / kind, PICTURES)]
    if not faces:
        raise InputError(f"{pictures} has no pictures in folders; put each in a folder named as its class")
    spoken = _files(sounds, SOUNDS)
    if not spoken:
        raise InputError(f"{sounds} has no sounds; {', '.join(sorted(SOUNDS))} are known")
    said = read_prompts(prompts, kinds)
    made = []
    for kind, picture in faces:
        for sound in spoken:
            for prompt in said[kind]:
                for variant, words, values in variants(ablation, prompt):
                    changed = patch(with_prompt(workflow, words), values)
                    mark = _digest(changed, picture, sound)
                    name = re.sub(r"[^\w.-]+", "-", f"{picture.stem} {sound.stem} {variant} {mark}")
                    made.append(Case(kind, picture, sound, words, variant, changed, out / kind / f"{name}.mp4"))
    return made


def read_prompts(path: Path, kinds: Sequence[str]) -> dict[str, list[str]]:
    """By class. A line is a prompt, for all classes or, as in "anime: A girl talks", for one."""
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"the prompts {path} cannot be read ({error}); give a text file, a prompt a line") from error
    for line in filter(None, map(str.strip, lines)):
        kind, colon, text = line.partition(":")
        named = colon and kind in found
        for each in [kind] if named else kinds:
            found[each].append(text.strip() if named else line)
    for kind, prompts in found.items():
        if not prompts:
            raise InputError(f"{path} has no prompt for {kind}; add a line, or one that begins with '{kind}:'")
    return found


def variants(ablation: str | None, prompt: str) -> Iterator[tuple[str, str, dict[tuple[str, str], object]]]:
    """Name, prompt, and what to set in the workflow."""
    if ablation is None:
        yield "", prompt, {}
    elif ablation == "prompt":
        bare, comma, _ = prompt.partition(",")
        if not comma:
            raise InputError(f"the prompt {prompt!r} has nothing to leave out; add details after a comma")
        yield "bare", bare, {}
        yield "detailed", prompt, {}
    elif ablation == "size":
        for size in SIZES:
            sizes = {"width": 0, "height": 0, "size": size}
            yield size, prompt, {("LiveAvatar_ImageLoader", name): value for name, value in sizes.items()}
    elif ablation == "steps":
        for steps in STEPS:
            yield f"{steps} steps", prompt, {("LiveAvatar_Sampler", "steps"): steps}


def with_prompt(workflow: Workflow, text: str) -> Workflow:
    """With these words and no others."""
    if any(node["class_type"] == "LiveAvatar_PromptConditioner" for node in workflow.values()):
        words = {"text": text, "style": "none", "lighting": "none", "action": "none"}
        return patch(workflow, {("LiveAvatar_PromptConditioner", name): value for name, value in words.items()})
    (encoder,) = find(workflow, "CLIPTextEncode")[:1]
    return patch(workflow, {(encoder, "text"): text})


def _files(folder: Path, endings: Iterable[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings) if folder.is_dir() else []


def _digest(workflow: Workflow, *files: Path) -> str:
    """Of all that decides what a video becomes, so that another workflow or picture makes another video."""
    told = hashlib.sha256(json.dumps(workflow, sort_keys=True).encode())
    for path in files:
        told.update(path.read_bytes())
    return told.hexdigest()[:8]
