"""What a converted file says about itself: from which files it was made and for which precision."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from liveavatar_core.errors import WeightsError

KEY = "live_avatar"  # of the safetensors metadata
VERSION = 1  # raise it when a file of today could be misread


@dataclass(frozen=True, slots=True)
class Source:
    """One file that went in; `strength` of LoRAs only."""

    name: str
    sha256: str
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    precision: str  # "fp8" or "bf16"
    checkpoint: tuple[Source, ...]
    loras: tuple[Source, ...]

    def to_metadata(self) -> dict[str, str]:
        return {KEY: json.dumps({"version": VERSION, **asdict(self)})}

    def check(self, path: Path, loras: Sequence[object], precision: str | None = None) -> None:
        """Raise WeightsError if the file cannot serve with these LoRAs, or not in this precision (None: any)."""
        if loras:
            within = ", ".join(lora.name for lora in self.loras) or "no LoRA"
            raise WeightsError(
                f"{path} was converted with {within} merged and takes no other LoRA; "
                "convert the original files again with all of them, or remove the LoRA"
            )
        if precision not in (None, self.precision):
            raise WeightsError(
                f"{path} was converted for precision {self.precision} and cannot run in {precision}; "
                f"choose {self.precision} or auto, or use the original files"
            )


def read_record(metadata: Mapping[str, str], path: Path) -> Record | None:
    """The record in a file's metadata; None if it is no converted file. Raises WeightsError if it cannot be read."""
    if KEY not in metadata:
        return None
    try:
        stated = json.loads(metadata[KEY])
        if stated.pop("version") != VERSION:
            raise WeightsError(f"{path} was converted by another version of Live Avatar; convert the original again")
        sources = {part: tuple(Source(**source) for source in stated.pop(part)) for part in ("checkpoint", "loras")}
        return Record(**stated, **sources)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged record of its conversion; convert the original again") from error
