"""What a person has set for this pack on the host's settings page; web/settings.mjs puts it there and says what it is.

The host keeps settings per user and runs do not know their user: with several users, the defaults hold.
"""

import json
from pathlib import Path

import folder_paths

DEFAULTS = {
    "LiveAvatar.PreviewPictures": "full size",
    "LiveAvatar.CacheGiB": 4,
    "LiveAvatar.Devices": "auto",
}
PREVIEW_SIDES = {"full size": None, "small": 256, "none": 0}  # px; None: as it is


def preview_side() -> int | None:
    """The longer side of the picture shown after each block, 0 for no picture, None for the video's own size."""
    return PREVIEW_SIDES.get(_stored("LiveAvatar.PreviewPictures"))


def cache_bytes() -> float:
    """How much of finished latents is kept for decoding again, in all."""
    return _stored("LiveAvatar.CacheGiB") * 1024**3


def default_devices() -> str:
    """What the device `auto` is: names as in the Runtime node; `auto` itself is ComfyUI's own device."""
    return _stored("LiveAvatar.Devices").strip() or "auto"


def _stored(name: str) -> str | float:
    """A setting's value, or its default where there is none of its kind."""
    file = Path(folder_paths.get_public_user_directory("default")) / "comfy.settings.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        value = None
    kind = str if isinstance(DEFAULTS[name], str) else (int, float)
    return value if isinstance(value, kind) else DEFAULTS[name]
