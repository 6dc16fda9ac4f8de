"""The videos of a set, made by a running ComfyUI. What is there is not made again."""

from collections.abc import Callable, Sequence

from liveavatar_core.client.workflow import patch
from liveavatar_core.errors import LiveAvatarError
from liveavatar_core.evaluate.cases import Case


async def make(cases: Sequence[Case], server: str, say: Callable[[str], None]) -> None:
    missing = [case for case in cases if not case.video.is_file()]
    if not missing:
        return
    from liveavatar_core.client.connection import Client, WorkflowFailed

    async with Client(server) as client:
        for number, case in enumerate(missing, 1):
            say(f"making {number} of {len(missing)}: {case.video.name}")
            values = {
                ("LoadImage", "image"): await client.upload(case.picture),
                ("LoadAudio", "audio"): await client.upload(case.sound),
            }
            try:
                outputs = await client.run(patch(case.workflow, values))
            except WorkflowFailed as error:
                say(f"failed: {error}")
                continue
            case.video.parent.mkdir(parents=True, exist_ok=True)
            part = case.video.with_suffix(".part")
            part.write_bytes(await client.fetch(_video(outputs)))
            part.replace(case.video)


def _video(outputs: dict[str, dict]) -> dict:
    for output in outputs.values():
        for file in output.get("images", []):  # under which ComfyUI reports videos too
            if file["filename"].endswith(".mp4"):
                return file
    raise LiveAvatarError("the workflow ended without an mp4 file; it needs Live Avatar Online VAE Decode")
