"""A real ComfyUI on one GPU: the workflow for the real files, at full size with random weights, between other work.

    LIVEAVATAR_COMFYUI=TREE python bench/comfy_gpu.py MODELS [--out FOLDER] [--without-dynamic-vram] [--tiny]

For each way to run the host: start it; other work that fills the card; our workflow, its video checked; other work
again, which must get the room; our workflow again; everything given back on request. Prints one JSON line per step.
MODELS has the files that `full_size_files.py` writes. `--tiny` does the same with the demo's model, to test this file.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import threading
import time
import wave
from collections.abc import Callable
from pathlib import Path

import aiohttp
import av
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from launch.comfy import PACK, Comfy  # noqa: E402
from launch.demo import patch  # noqa: E402
from liveavatar_core.client.connection import Client  # noqa: E402

WORKFLOW = ROOT / "workflows" / "api" / "low_memory.json"
GIB = 2**30
CAPTURED = 10  # blocks until the window is full and every graph is there; what comes after is the steady state
VAE, CLIP = "wan_2.1_vae.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"


class HostMemory:
    """Peak of what ComfyUI's process allocated itself, mapped files not counted."""

    def __init__(self, pid: int) -> None:
        self._process, self._ended, self.peak = psutil.Process(pid), threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            for line in status.splitlines():  # without this one when the process has just ended
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.peak


def ours(model: str, lora: str, seconds: float, seed: int, side: int) -> dict:
    """`side`: of a square video in pixels; 0: 704x384."""
    return patch(
        json.loads(WORKFLOW.read_text()),
        {
            ("LiveAvatar_ModelLoader", "model_name"): model,
            ("LiveAvatar_ModelLoader", "lora_name"): lora,
            ("LiveAvatar_Runtime", "precision"): "fp8",
            ("LiveAvatar_Runtime", "kv_cache"): "full",
            ("LiveAvatar_ImageLoader", "size"): "704*384",
            ("LiveAvatar_Sampler", "steps"): 4,
            ("LiveAvatar_AudioEncoder", "seconds"): seconds,
            ("LiveAvatar_ImageLoader", "width"): side,
            ("LiveAvatar_ImageLoader", "height"): side,
            ("LiveAvatar_Sampler", "seed"): seed,
        },
    )


def other_work(text: str, width: int, height: int, frames: int) -> dict:
    """Stock nodes only: a prompt through umT5, and a large video through the VAE; the first picture is kept."""
    latent = {"width": width, "height": height, "length": frames, "batch_size": 1}
    return {
        "clip": {"class_type": "CLIPLoader", "inputs": {"clip_name": CLIP, "type": "wan", "device": "default"}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": text}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": VAE}},
        "latent": {"class_type": "EmptyHunyuanLatentVideo", "inputs": latent},
        "frames": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["vae", 0]}},
        "first": {"class_type": "ImageFromBatch", "inputs": {"image": ["frames", 0], "batch_index": 0, "length": 1}},
        "kept": {"class_type": "PreviewImage", "inputs": {"images": ["first", 0]}},
    }


class Progress:
    """When each block was there, and when each node began."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.blocks: list[float] = []
        self.nodes: list[tuple[str, float]] = []

    def __call__(self, kind: str, data: dict) -> None:
        now = time.perf_counter() - self.started
        if kind == "executing" and data.get("node"):
            self.nodes.append((data["node"], round(now, 2)))
        if kind == "progress_state":
            for state in data["nodes"].values():
                if state["max"] > 1 and state["value"] > len(self.blocks):
                    self.blocks.append(now)


def write_speech(path: Path, seconds: float) -> None:
    """The demo's speech, said again until it is long enough."""
    with wave.open(str(ROOT / "assets" / "speech.wav")) as file:
        form, sound = file.getparams(), file.readframes(file.getnframes())
    times = math.ceil(seconds * form.framerate / form.nframes)
    with wave.open(str(path), "wb") as file:
        file.setparams(form)
        file.writeframes(sound * times)


def describe(content: Path) -> dict:
    with av.open(str(content)) as file:
        picture, sound = file.streams.video[0], file.streams.audio[0]
        frames, contrast = 0, 0.0
        for frame in file.decode(picture):
            frames += 1
            contrast = max(contrast, float(frame.to_ndarray(format="gray").std()) if frames % 12 == 1 else 0.0)
        rate = float(picture.average_rate)
        return {
            "size": f"{picture.width}x{picture.height}",
            "frames": frames,
            "fps": rate,
            "contrast": round(contrast, 1),  # 0 where numbers have become NaN
            "sound_s": round(float(sound.duration * sound.time_base), 2),
            "bytes": content.stat().st_size,
        }


class Session:
    """One running server: every step told in a line, with memory before and after."""

    def __init__(self, server: Comfy, client: Client, tell: Callable[[dict], None]) -> None:
        self.server, self.client, self.tell = server, client, tell
        self.pid = server._process.pid

    async def memory(self) -> dict:
        try:
            async with self.client._session.get("/memory") as answer:
                return await answer.json()
        except aiohttp.ClientError as error:
            raise RuntimeError(f"the server has ended:\n{self.server.last_lines()}") from error

    async def step(self, name: str, workflow: dict, seconds: float) -> dict[str, dict] | None:
        before, host, progress = await self.memory(), HostMemory(self.pid), Progress()
        line: dict = {"step": name}
        outputs = None
        try:
            outputs = await asyncio.wait_for(self.client.run(workflow, progress), seconds)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:600]
            with contextlib.suppress(aiohttp.ClientError):
                await self.client.interrupt()
        line["seconds"] = round(time.perf_counter() - progress.started, 2)
        line["nodes"] = progress.nodes
        if len(progress.blocks) > 1:
            times = progress.blocks
            steady = [b - a for a, b in zip(times, times[1:], strict=False)][CAPTURED:]
            line |= {"blocks": len(times), "blocks_at_s": [round(at, 2) for at in times]}
            if steady:
                line["block_ms"] = round(1000 * statistics.median(steady), 1)
                line["fps"] = round(12 / statistics.median(steady), 2)
        after = await self.memory()
        line |= {"before": before, "after": after, "host_anon_peak_gib": round(host.stop() / GIB, 2)}
        for node, output in (outputs or {}).items():
            for file in output.get("images", []):
                if file["filename"].endswith(".mp4"):
                    line[f"video of node {node}"] = describe(self.server.base / file["type"] / self._place(file))
        self.tell(line)
        return outputs

    @staticmethod
    def _place(file: dict) -> str:
        return f"{file['subfolder']}/{file['filename']}"

    async def give_back(self) -> None:
        before = await self.memory()
        async with self.client._session.post("/free", json={"unload_models": True, "free_memory": True}) as answer:
            answer.raise_for_status()
        for _ in range(30):  # the host's worker sees the request within a second, and collects garbage after it
            await asyncio.sleep(0.5)
            after = await self.memory()
            if not after or after["allocated"] < 64 << 20:
                break
        await asyncio.sleep(1)
        self.tell({"step": "free", "before": before, "after": await self.memory()})


async def visit(server: Comfy, tell: Callable[[dict], None], options: argparse.Namespace) -> None:
    # The host counts on 13 GB for the first video and on 66 GB for the second, which is more than is left beside ours.
    side, other, larger = (0, (1280, 720, 33), (2880, 1632, 17))
    if options.tiny:
        side, other, larger = 64, (64, 64, 5), (128, 64, 5)
    async with Client(server.url) as client:
        session = Session(server, client, tell)
        tell({"step": "idle", **await session.memory()})
        if not options.short:
            await session.step("other work", other_work("a woman smiles", *other), 60)
        await session.step("ours", ours(options.model, options.lora, options.seconds, 1, side), 150)
        await session.step("other work after ours", other_work("a man reads", *larger), 60)
        if options.again:
            await session.step("ours again", ours(options.model, options.lora, options.seconds, 2, side), 120)
        await session.give_back()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--model", default="wan2.2_s2v_14B_bf16.safetensors")
    parser.add_argument("--lora", default="liveavatar.safetensors", help="none: no LoRA")
    parser.add_argument("--seconds", type=float, default=9.6, help="of speech; 0.48 are a block")
    parser.add_argument("--without-dynamic-vram", action="store_true")
    parser.add_argument("--short", action="store_true", help="no other work before ours")
    parser.add_argument("--again", action="store_true", help="our workflow once more, after the other work")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    base = options.out / "comfy"
    shutil.rmtree(base, ignore_errors=True)
    (base / "input").mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "portrait.png", base / "input")
    write_speech(base / "input" / "speech.wav", options.seconds)
    (options.out / "front").mkdir(exist_ok=True)  # no page is opened
    arguments = ["--front-end-root", str(options.out / "front")]
    arguments += ["--disable-dynamic-vram"] if options.without_dynamic_vram else []
    packs, variables = {PACK: ROOT, "MemoryProbe": ROOT / "bench" / "memory_probe"}, {}
    if options.tiny:
        sys.path.insert(0, str(ROOT / "tests" / "host"))
        from real_names import furnish_models

        (base / "tiny_host.json").write_text(json.dumps(furnish_models(options.models, ROOT / "workflows" / "api")))
        packs["TinyHost"] = ROOT / "tests" / "host" / "tiny_host"
        variables["LIVEAVATAR_TINY_HOST"] = str((base / "tiny_host.json").resolve())
    (base / "models").symlink_to(options.models.resolve(), target_is_directory=True)
    mode = "without dynamic VRAM" if options.without_dynamic_vram else "dynamic VRAM"

    def tell(line: dict) -> None:
        print(json.dumps({"host": mode, **line}), flush=True)

    started = time.perf_counter()
    log = options.out / f"comfyui, {mode}.log".replace(", ", "_").replace(" ", "_")
    tree = Path(os.environ["LIVEAVATAR_COMFYUI"])
    with Comfy(tree, base=base, log=log, packs=packs, arguments=arguments, variables=variables) as server:
        tell({"step": "server is up", "seconds": round(time.perf_counter() - started, 1)})
        asyncio.run(visit(server, tell, options))
        tell({"log": [line for line in server.log.read_text(errors="replace").splitlines() if _notable(line)][:40]})


def _notable(line: str) -> bool:
    return any(word in line for word in ("DynamicVRAM", "gave back", "Error", "OutOfMemory", "WARNING", "cudaMalloc"))


if __name__ == "__main__":
    main()
