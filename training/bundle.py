"""Pack what a machine without a network lacks: diffusers without its pipelines, and espeak-ng with a few languages.

    python -m training.bundle diffusers-*.whl importlib_metadata-*.whl espeakng_loader-*.whl --out .train/lib.zip

Unpack it anywhere and put that folder into PYTHONPATH, its espeakng_loader into LD_LIBRARY_PATH, and
espeakng_loader/espeak-ng-data into ESPEAK_DATA_PATH.
"""

import argparse
import zipfile
from pathlib import Path

from training.speech.voices import LANGUAGES

_SPOKEN = {language[:2] for language in LANGUAGES}


def is_wanted(name: str) -> bool:
    path = Path(name)
    if path.parts[:2] == ("diffusers", "pipelines"):
        return len(path.parts) == 3  # its list of names, without the pipelines themselves
    if path.name.endswith("_dict"):
        return path.name.removesuffix("_dict") in _SPOKEN
    return not path.name.startswith("libespeak-ng") or path.name == "libespeak-ng.so.1"  # one of three equal copies


def pack(wheels: list[Path], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in filter(is_wanted, archive.namelist()):
                    packed.writestr(name, archive.read(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pack(options.wheels, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
