"""The project's command line. Makes what it needs on first use; everything goes to the cache folder and out/.

    python run.py demo [--image FILE] [--audio FILE] [--prompt TEXT] [--seconds N] [--open]
    python run.py test [arguments of pytest, with paths as seen from this folder]

`demo` starts a headless ComfyUI and makes a talking video of the pictures and sounds in assets/, or of your own.
COMFYUI_PATH and COMFYUI_PYTHON use an existing ComfyUI and interpreter; LIVEAVATAR_CACHE moves the cache folder.
"""

import sys
from collections.abc import Sequence

if sys.version_info < (3, 10):  # noqa: UP036 - said here in words, before an older Python meets newer syntax
    sys.exit(f"Python 3.10 or later is needed; this is {sys.version.split()[0]}.")

from launch import LaunchError, demo, environment


def with_values_joined(arguments: Sequence[str]) -> list[str]:
    """`--golden DIR` as `--golden=DIR`.

    pytest looks for its settings before it knows our option, and would take DIR for a folder of tests.
    """
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--golden":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def main(command: str, *arguments: str) -> int:
    if command == "demo":
        options = demo.parse(arguments)  # before the set-up, so that a wrong path is not found out minutes later
        return environment.enter(environment.prepare(), "-m", "launch.demo", *demo.as_arguments(options))
    if command == "test":
        return environment.enter(environment.prepare(), "-m", "pytest", *with_values_joined(arguments))
    print(__doc__)
    return 0 if command in ("-h", "--help", "help") else 2


if __name__ == "__main__":
    try:
        sys.exit(main(*(sys.argv[1:] or ["help"])))
    except LaunchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
