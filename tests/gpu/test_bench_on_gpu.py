"""The benchmark on a GPU: what only a GPU can tell it."""

import json

import pytest
import torch

from liveavatar_core.bench.__main__ import main
from liveavatar_core.bench.clock import Marks, call_ms, profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda:0"


def test_marks_and_profile_see_the_same_time():
    x = torch.randn(4096, 4096, device=DEVICE)
    ms = call_ms(DEVICE, lambda: x @ x, seconds=0.05)
    marks = Marks([DEVICE])
    marks.mark()
    seen = profile(lambda: [x @ x for _ in range(20)], [DEVICE], parts=20)
    marks.mark()
    assert seen.kernels_ms == pytest.approx(ms, rel=0.3) and set(seen.kinds) == {"products"}
    assert marks.periods()[0] > 20 * seen.kernels_ms


@pytest.mark.parametrize("arguments", [[], ["--plan", "ring", "--devices", DEVICE, DEVICE]])
def test_the_command(capsys, arguments):
    assert main(["--tiny", "--blocks", "13", "--precision", "bf16", *arguments]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["gpus"] == 1 and line["gpu"] == torch.cuda.get_device_name()
    assert 0 <= line["gpu_idle"] < 1 and 0 <= line["forward_idle"] < 1
    assert line["breakdown_ms"] and 0 < line["kernels_ms"] and line["ceilings"]["h2d_gbs"] > 1
    assert line["growth_mib"] < 1
