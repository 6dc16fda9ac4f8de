"""The pictures and the sound that the workflows start from, where ComfyUI's Load Image and Load Audio look for them."""

import logging
import shutil
from pathlib import Path

import folder_paths

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent.parent / "assets"
NAMES = ("portrait.png", "anime.jpg", "game_character.jpg", "speech.wav")


def provide() -> None:
    """Put them into the input folder; a file that has such a name already stays."""
    inputs = Path(folder_paths.get_input_directory())
    for name in NAMES:
        try:
            if not (inputs / name).exists():
                shutil.copyfile(ASSETS / name, inputs / name)
        except OSError as error:
            log.warning("Live Avatar: %s cannot be put into %s, where its workflows look: %s", name, inputs, error)
