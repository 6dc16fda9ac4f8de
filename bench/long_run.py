"""Peak memory of long runs: the demo model's video of 1 and of 10 minutes, each in a process of its own.

    python bench/long_run.py [MINUTES ...]

Prints one JSON line per length and the ratio of the peaks. The weights are random; memory does not depend on them.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def measure(minutes: float) -> dict:
    import torch

    from liveavatar_core.config import LoraSpec, ModelSpec, RuntimeSpec, SamplingConfig
    from liveavatar_core.demo.random_model import write_demo
    from liveavatar_core.encoders.audio_features import FeatureStream, load_speech_encoder
    from liveavatar_core.encoders.vae import StreamDecoder, read_vae
    from liveavatar_core.geometry import FRAMES_DROPPED, blocks_for, frames_for, sample_at
    from liveavatar_core.io.video import VideoWriter
    from liveavatar_core.pipeline.spool import Spool
    from liveavatar_core.pipeline.stream import frame_chunks
    from liveavatar_core.runtime.runtime import Runtime
    from liveavatar_core.runtime.stream import LatentStream, StreamRequest

    torch.set_num_threads(1)
    fps, rate, size = 25, 16_000, 64
    frames = frames_for(minutes * 60, fps)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        demo = write_demo(Path(folder) / "demo")
        speech = load_speech_encoder(demo.speech_encoder, dtype=torch.float32, device="cpu")
        sound = torch.randn(round(minutes * 60 * rate), generator=torch.Generator().manual_seed(0)).mul_(0.1)
        request = StreamRequest(
            model=ModelSpec(demo.shards, (LoraSpec(demo.lora),)),
            runtime=RuntimeSpec(("cpu",)),
            sampling=SamplingConfig(),
            picture=torch.zeros(3, size, size),
            text=torch.zeros(5, demo.config.text_dim),
            features=FeatureStream(sound, speech, fps=fps, lead_frames=FRAMES_DROPPED),
            vae=read_vae(demo.vae, dtype=torch.float32, device="cpu"),
            frames=frames,
        )
        stream = LatentStream(Runtime(), request, Spool(Path(folder) / "spool", blocks_for(frames)))
        decoder = StreamDecoder(request.vae)
        path = Path(folder) / "video.mp4"
        with VideoWriter(path, width=size, height=size, fps=fps, sample_rate=rate, channels=1) as video:
            for chunk in frame_chunks(stream.latents(), decoder, stream.portrait[1], frames):
                first, last = (
                    sample_at(n, fps, rate) for n in (chunk.first_frame, chunk.first_frame + len(chunk.frames))
                )
                video.write(chunk.frames, sound[None, first:last])
        megabytes = path.stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    return {
        "minutes": minutes,
        "frames": frames,
        "peak_MiB": round(peak, 1),
        "sound_MiB": round(sound.nbytes / 2**20, 1),
        "file_MB": round(megabytes, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


def main(lengths: list[float]) -> None:
    peaks = []
    for minutes in lengths:
        command = [sys.executable, __file__, "--one", str(minutes)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(json.dumps(result), flush=True)
        peaks.append(result["peak_MiB"])
    print(f"peak of the longest over peak of the shortest: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(float(sys.argv[2]))))
    else:
        main([float(value) for value in sys.argv[1:]] or [1.0, 10.0])
