"""The benchmark: what it counts against known figures, and the whole command on the toy model."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from liveavatar_core.bench import report
from liveavatar_core.bench.__main__ import RANDOM, main
from liveavatar_core.bench.ceilings import Ceilings, attention_flops, product_flops, product_shapes
from liveavatar_core.bench.clock import kind_of
from liveavatar_core.bench.errors import _record, _Recording, compare, random_inputs
from liveavatar_core.bench.measure import SETTLED, Case, _idle, measure
from liveavatar_core.bench.stand_ins import RandomWeights, outlier_factors, random_speech, random_vae
from liveavatar_core.config import LIVE_AVATAR_14B, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.random_model import DEMO_CONFIG
from liveavatar_core.encoders.vae import StreamDecoder
from liveavatar_core.errors import ConfigError
from liveavatar_core.geometry import Geometry
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.weights.build import load_dit

FULL, SMALL = Geometry(384, 704), Geometry(64, 64)
ISSUE_KEYS = (
    "command commit gpu gpus plan size steps weights attention forward_ms forward_floor_ms gpu_idle vae_ms fps ttff_ms "
    "peak_gib planned_gib vram_cap_gib skip_last_step"
).split()


def test_work_of_a_forward_is_that_of_the_specification():
    """SPEC 8.2, TFLOP at 704x384: self 26.6, cross 13.3, FFN 35.9, audio 4.0; attention 39.7 and 1.3."""
    assert product_flops(LIVE_AVATAR_14B, FULL) / 1e12 == pytest.approx(26.6 + 13.3 + 35.9 + 4.0, abs=0.15)
    assert attention_flops(LIVE_AVATAR_14B, FULL) / 1e12 == pytest.approx(39.7 + 1.3, abs=0.1)


def test_the_floor_of_the_original_card():
    """With the rates that were measured beside the original, hot, the floors that were derived from them."""
    shapes = list(product_shapes(LIVE_AVATAR_14B))
    plain, fp8 = (dict(zip(shapes, ms, strict=True)) for ms in ((0.240, 0.637, 0.667), (0.127, 0.336, 0.330)))
    ceilings = Ceilings(3020.0, 55.0, plain, fp8, fp8, {"exact": 1.84, "int8": 1.42}, 0.066)

    def floor(fp8: bool, attention: str) -> float:
        return ceilings.forward_floor_ms(LIVE_AVATAR_14B, FULL, fp8=fp8, attention=attention)

    assert floor(False, "exact") == pytest.approx(203, abs=3)
    assert floor(True, "exact") == pytest.approx(147, abs=3)
    assert floor(True, "int8") == pytest.approx(131, abs=3)
    slow = replace(ceilings, attention={"exact": 1.84, "int8": 2.4})
    assert slow.forward_floor_ms(LIVE_AVATAR_14B, FULL, fp8=True, attention="int8") == floor(True, "exact")


def test_idle_is_what_kernels_leave_of_a_period():
    assert _idle(156.0, 160.0) == pytest.approx(0.025)
    assert _idle(None, 160.0) is None, "without a GPU nobody knows"
    assert _idle(170.0, 160.0) == 0, "kernels beside each other"


def test_kernels_have_kinds():
    assert kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == "attention"
    assert kind_of("nvjet_qqtst_128x256_128x6_2x1_v_bz_coopA_TNT") == "products"
    assert kind_of("Memcpy HtoD (Pinned -> Device)") == "host copies"
    assert kind_of("Memcpy DtoD (Device -> Device)") == "copies"
    assert kind_of("void at::native::vectorized_elementwise_kernel") == "other pointwise"


def test_random_weights_are_the_same_numbers_every_time():
    with RandomWeights(DEMO_CONFIG, "cpu") as a, RandomWeights(DEMO_CONFIG, "cpu") as b:
        names = list(a.infos())
        assert all(torch.equal(a.get(name), b.get(name)) for name in reversed(names))
        assert not torch.equal(a.get("blocks.0.self_attn.q.weight"), a.get("blocks.1.self_attn.q.weight"))
        assert {a.get(name).dtype for name in names} == {torch.bfloat16}


def test_outliers_are_few_and_the_same_in_all_layers():
    factors = outlier_factors(5120)
    large = factors[factors > 1]
    assert len(large) == 8 and large.max().item() == pytest.approx(50) and large.min().item() == pytest.approx(10)
    assert outlier_factors(64).max() > 1
    with RandomWeights(DEMO_CONFIG, "cpu") as plain, RandomWeights(DEMO_CONFIG, "cpu", outliers=True) as outlying:
        different = {name for name in plain.infos() if not torch.equal(plain.get(name), outlying.get(name))}
        parts = {name.removeprefix(f"blocks.{name.split('.')[1]}.") for name in different}
        assert parts == {"modulation", "norm3.weight", "self_attn.v.weight", "cross_attn.v.weight", "ffn.0.weight"}
        ratio = outlying.get("blocks.1.norm3.weight").float() / plain.get("blocks.1.norm3.weight").float()
        assert torch.allclose(ratio, outlier_factors(DEMO_CONFIG.dim), rtol=0.01)  # two roundings to bf16


def test_the_whole_command(tmp_path, capsys):
    output = tmp_path / "results.json"
    arguments = ["--tiny", "--blocks", str(SETTLED + 4), "--steps", "2", "--attention", "int8", "--kv-cache", "fp8"]
    assert main([*arguments, "--devices", "cpu", "--output", str(output)]) == 0
    (line,) = (json.loads(line) for line in output.read_text().splitlines())
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == line
    assert set(ISSUE_KEYS) <= line.keys()
    assert line["command"].startswith("python -m liveavatar_core.bench --tiny") and line["weights"] == "random"
    assert (line["plan"], line["size"], line["steps"], line["attention"]) == ("single", "64x64", 2, "int8")
    assert min(line[key] for key in ("forward_ms", "vae_ms", "fps", "ttff_ms", "forward_floor_ms")) > 0
    assert line["peak_gib"] is None and line["gpu_idle"] is None and line["planned_gib"] > 0
    assert any(row.startswith("forward, one step of one block ms") for row in printed)


def test_lines_side_by_side():
    first = {
        "precision": "fp8",
        "attention": "exact",
        "kv_cache": "full",
        "skip_last_step": False,
        "vram_cap_gib": None,
    }
    first |= {"forward_ms": 160.0, "gpu_idle": None, "held_gib": {"weights": [15.6, 15.5]}}
    rows = report.table([first, {**first, "attention": "int8", "forward_ms": 128.0}]).splitlines()
    assert rows[0].split() == ["fp8", "exact", "fp8", "int8"]
    assert any(row.split()[-4:] == ["x", "1.00", "x", "1.25"] for row in rows)
    assert any(row.split() == ["weights", "GiB", *("15.5", "of", "15.6") * 2] for row in rows)
    assert not any("idle" in row for row in rows), "nobody measured it"


def test_what_cannot_run_is_said_in_its_line(capsys):
    assert main(["--tiny", "--blocks", "13", "--devices", "cpu", "--plan", "mesh"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["error"].startswith("plan is 'mesh'")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--size", "704"], "give width x height"),
        (["--blocks", "5"], "blocks is 5"),
        (["--steps", "1", "--skip-last-step"], "skip_last_step leaves nothing to do"),
        (["--checkpoint", "nowhere.safetensors"], "does not exist"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, words, capsys):
    assert main(["--tiny", "--devices", "cpu", *arguments]) == 1
    told = capsys.readouterr()
    assert words in told.err + told.out


def test_whoever_is_told_may_stop_it():
    class Enough(Exception):
        pass

    def say(text: str) -> None:
        if text.startswith("timing the stream: block 1"):
            raise Enough

    vae = random_vae(4, "cpu")
    runtime = Runtime(open_model=lambda path: RandomWeights(DEMO_CONFIG, "cpu"))
    case = Case(
        model=ModelSpec(RANDOM),
        config=DEMO_CONFIG,
        runtime=RuntimeSpec(("cpu",), precision="fp32", decoder="cpu"),
        sampling=SamplingConfig(steps=2, seed=1),
        geometry=SMALL,
        vae=vae,
        decoder=partial(StreamDecoder, vae),
        speech=random_speech(DEMO_CONFIG, "cpu"),
    )
    square = dict.fromkeys(product_shapes(DEMO_CONFIG), 1.0)
    with pytest.raises(Enough) as stopped:
        measure(runtime, case, Ceilings(1.0, None, square, {}, {}, {"exact": 1.0}, 1.0), say)
    assert not runtime.is_streaming, f"although {stopped.type.__name__} and its frames live on"
    runtime.unload()


def load(precision: str):
    with RandomWeights(DEMO_CONFIG, "cpu") as reader:
        return load_dit(reader, DEMO_CONFIG, dtype=torch.bfloat16, device="cpu", fp8=precision == "fp8")


def test_a_model_fed_its_own_latents_gives_its_own_velocities():
    """Feeding changes nothing but where latents come from: errors are those of the variant alone."""
    inputs = random_inputs(DEMO_CONFIG, SMALL, steps=2, blocks=3)
    model = load("bf16")
    with torch.inference_mode():
        free = _record(model, inputs, "cpu", "exact", "full", None)
        fed = _record(model, inputs, "cpu", "exact", "full", free)
        other = _Recording([[-latent for latent in row] for row in free.latents], free.velocities)
        misfed = _record(model, inputs, "cpu", "exact", "full", other)
    assert [len(row) for row in free.velocities] == [3, 3]
    for got, want in zip(sum(fed.velocities, []), sum(free.velocities, []), strict=True):
        assert torch.equal(got, want) and want.std() > 0.01
    assert torch.equal(misfed.velocities[0][0], free.velocities[0][0]), "the first step starts from noise"
    assert not torch.equal(misfed.velocities[1][0], free.velocities[1][0])


def test_errors_of_the_variants():
    inputs = random_inputs(DEMO_CONFIG, SMALL, steps=2, blocks=2)
    lines = {line["variant"]: line for line in compare(load, inputs, "cpu", say=lambda text: None)}
    assert {"fp8 by row", "fp8 per tensor (original)", "bf16, int8 attention"} < lines.keys()
    for line in lines.values():
        # e4m3 keeps 3 bits: 2.6% rms for each factor of a product, through four layers
        assert 0 <= line["relative_l2"] <= line["relative_l2_max"] < 0.3
        assert len(line["relative_l2_by_step"]) == 2
        # of vectors of about the same length: 1 - cosine = half the square of their distance
        assert line["cosine_error"] == pytest.approx(line["relative_l2"] ** 2 / 2, rel=0.5, abs=1e-6)
    assert lines["fp8 by row"]["relative_l2"] > 0.01
    assert lines["bf16, int8 attention"]["relative_l2"] > 1e-3 and lines["bf16, fp8 KV cache"]["relative_l2"] > 1e-3


def test_the_commit_is_read_from_the_clone(tmp_path: Path):
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert report.commit(tmp_path) == "unknown"
    (git / "packed-refs").write_text("# pack-refs\n0123456789abcdef refs/heads/main\n")
    assert report.commit(tmp_path) == "0123456"
    (git / "refs" / "heads" / "main").write_text("fedcba9876543210\n")
    assert report.commit(tmp_path) == "fedcba9"
    (git / "HEAD").write_text("abcdef0123456789\n")
    assert report.commit(tmp_path) == "abcdef0"
    assert report.commit(tmp_path / "elsewhere") == "unknown"


def test_too_few_blocks():
    with pytest.raises(ConfigError, match="blocks is 5"):
        Case(
            model=ModelSpec(RANDOM),
            config=DEMO_CONFIG,
            runtime=RuntimeSpec(("cpu",)),
            sampling=SamplingConfig(),
            geometry=SMALL,
            vae=None,
            decoder=None,
            speech=None,
            blocks=5,
        )
