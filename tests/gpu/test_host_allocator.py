"""PyTorch's other allocator, ComfyUI's default: a process has one for life, so the test has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STREAM = Path(__file__).with_name("test_stream_on_gpu.py")


def test_a_stream_is_decoded_and_unloaded_with_the_hosts_allocator() -> None:
    variables = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    cases = [f"{STREAM}::test_frames_are_decoded_while_the_stream_runs", f"{STREAM}::test_unload_returns_the_memory"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        env=variables,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
