"""The memory plan: against the published model's figures, and against every byte that a real stage holds."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from liveavatar_core.config import LIVE_AVATAR_14B, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import DEMO_CONFIG, vae_shapes, write_demo
from liveavatar_core.encoders.vae import StreamDecoder, read_vae
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry, fit_size
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.pipeline.plan import PREFILL, Offload, Plan, choose
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.runtime.fitting import AREAS, GAPS, OUTSIDE, alternatives, asked, check, fit, room
from liveavatar_core.runtime.memory import (
    ESTIMATED,
    GIB,
    HOST,
    WAN_VAE,
    MemoryPlan,
    VaeSize,
    plan_memory,
    streamed_bytes,
    table,
)
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.schedule import levels
from liveavatar_core.types import BlockRequest, Payload
from liveavatar_core.weights.build import load_dit, work_dtype
from liveavatar_core.weights.reader import open_weights

GB = 1e9  # the specification counts in these
FULL = Geometry(384, 704)
SMALL = Geometry(64, 96)
# Of time embedding, time projection, audio encoder, head and modulation: these compute in float32 (SPEC 7.2).
FLOAT32_PARAMETERS = 27_535_360 + 157_317_120 + 95_051_545 + (64 * 5121 + 2 * 5120) + 40 * 6 * 5120
FP8_WEIGHTS = 15_938_355_200
FP8_ROWS = 40 * (8 * 5120 + 13824 + 5120) + 12 * (4 * 5120 + 2 * 5120)  # a scale for each


def planned(precision: str = "bf16", plan: str = "single", devices: int = 1, geometry: Geometry = FULL) -> MemoryPlan:
    names = [f"cuda:{i}" for i in range(devices)]
    cut = choose(plan, 4, LIVE_AVATAR_14B.layers, names)
    return plan_memory(LIVE_AVATAR_14B, geometry, cut, precision, decoder=names[-1])


def part(memory: MemoryPlan, name: str, stage: int | None = 0) -> int:
    return sum(part.nbytes for part in memory.parts if (part.name, part.stage) == (name, stage))


def test_weights_of_the_published_model():
    bf16, fp8 = part(planned("bf16"), "weights"), part(planned("fp8"), "weights")
    assert bf16 == 2 * 16_295_755_609 + 2 * FLOAT32_PARAMETERS
    assert fp8 == bf16 - FP8_WEIGHTS + 4 * FP8_ROWS
    assert (bf16 - 2 * FLOAT32_PARAMETERS) / GB == pytest.approx(32.592, rel=1e-4)
    assert (fp8 - 2 * FLOAT32_PARAMETERS) / GB == pytest.approx(16.65, rel=1e-3)


def test_caches_of_the_published_model():
    """SPEC 4.9 and 8.1: 10.38 GB per step, condition 2.16 GB, which every step's cache begins with."""
    memory = planned()
    assert part(memory, "block caches") / 4 / GB == pytest.approx(10.38 + 2.16, rel=1e-3)
    assert part(memory, "attention sink") / GB == pytest.approx(2.16 + 0.43, rel=5e-3)  # and 1056 old reference keys
    assert part(memory, "text and tables") / GB == pytest.approx(0.42, rel=0.01)
    assert part(planned(plan="tpp", devices=4), "block caches", 2) == part(memory, "block caches") / 4


@pytest.mark.parametrize(("devices", "bf16", "fp8"), [(2, 39, 31), (4, 19.5, 15.5), (8, 10, 8)])
def test_layer_ring_sums(devices: int, bf16: float, fp8: float):
    """SPEC 8.4's sums per card, with its two condition versions; ours hold a copy of the sink per step instead."""
    for precision, want in (("bf16", bf16), ("fp8", fp8)):
        memory = planned(precision, "ring", devices)
        own = 2 * FLOAT32_PARAMETERS + 4 * 2.16 * GB  # over all cards
        held = sum(
            sum(part(memory, name, i) for name in ("weights", "block caches", "attention sink")) for i in range(devices)
        )
        assert (held - own) / devices / GB == pytest.approx(want, rel=0.05), precision


def test_vae_of_the_published_model():
    memory = planned()
    assert part(memory, "VAE weights", None) / GB == pytest.approx(0.25, rel=0.02)
    assert part(memory, "VAE caches", None) / GB == pytest.approx(1.28, rel=2e-3)  # SPEC 6.2
    assert WAN_VAE.parameters == sum(torch.Size(shape).numel() for shape in vae_shapes(WAN_VAE.width).values())


@pytest.mark.parametrize(("attention", "peak"), [("exact", 70.23), ("int8", 58.90)])
def test_peaks_measured_on_a_card(attention: str, peak: float):
    """A whole stream on an H100, 704x384, fp8, decoder included; in GiB."""
    plan = choose("single", 4, LIVE_AVATAR_14B.layers, ["cuda:0"])
    memory = plan_memory(LIVE_AVATAR_14B, FULL, plan, "fp8", attention=attention, decoder="cuda:0")
    assert memory.on("cuda:0") / GIB == pytest.approx(peak, rel=0.02)


def test_parts_are_where_the_plan_puts_them():
    memory = planned("bf16", "tpp", 2)
    assert memory.devices == ("cuda:0", "cuda:1")
    assert memory.on("cuda:0", "VAE weights") == 0 < memory.on("cuda:1", "VAE weights")
    assert memory.total == memory.on("cuda:0") + memory.on("cuda:1")
    shared = plan_memory(LIVE_AVATAR_14B, FULL, choose("tpp", 4, 40, ["cuda:0"] * 4), "bf16", decoder="cuda:0")
    assert shared.on("cuda:0", "weights") == memory.on("cuda:0", "weights"), "stages with equal layers share them"
    assert shared.on("cuda:0", "block caches") == part(planned(), "block caches")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("models") / "demo")


def tensors(owner: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object keeps alive, models apart."""
    if id(owner) in seen or isinstance(owner, nn.Module | type | str | int | float):
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        if not owner.is_meta:
            yield owner
    elif isinstance(owner, dict):
        for value in owner.values():
            yield from tensors(value, seen)
    elif isinstance(owner, list | tuple):
        for value in owner:
            yield from tensors(value, seen)
    else:
        slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
        for name in {*slots, *getattr(owner, "__dict__", {})}:
            yield from tensors(getattr(owner, name, None), seen)


def held_bytes(owner: object, apart_from: object = None) -> int:
    """Bytes of memory kept alive by an object: each storage once, in full, however small the view of it."""
    seen: set[int] = set()
    skipped = {tensor.untyped_storage().data_ptr() for tensor in tensors(apart_from, seen)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(owner, seen)}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in skipped)


def run_until_two_sinks(plan: Plan, stages: list[Stage], config=DEMO_CONFIG) -> None:
    """Prefill, block 0 through every step, and the prefill of its successor's sink: the most a stage ever holds."""

    def travel(payload: Payload, index: int) -> None:
        payload = stages[index].run(payload)
        target = plan.next_stage(plan.stages[index], payload.step)
        if target is not None:
            travel(payload, target.index)

    size = (SMALL.latent_height, SMALL.latent_width)
    condition = (torch.zeros(16, 1, *size), torch.zeros(16, 19, *size))
    request = BlockRequest(0, torch.zeros(1, config.audio_states, config.audio_dim, 12))
    for payload in (
        Payload(PREFILL, PREFILL, 0, condition=condition),
        Payload(0, 0, 0, request=request),
        Payload(PREFILL, PREFILL, 1, condition=condition),
    ):
        for row in plan.rows if payload.step == PREFILL else plan.rows[:1]:
            travel(payload, row[0].index)


def offloaded(plan: Plan) -> Plan:
    """Two layers' weights and all rings but one of every stage in host memory, where it has so many."""

    def of(stage):
        rings = tuple((step, layer) for step in stage.steps for layer in stage.layers)[1:]
        weights = tuple(stage.layers)[:2] if len(stage.layers) > 1 else ()
        return replace(stage, offload=Offload(weights, rings if len(rings) > 1 else ()))

    return replace(plan, rows=tuple(tuple(of(stage) for stage in row) for row in plan.rows))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("name", "devices", "streams"),
    [("single", 1, False), ("tpp", 3, False), ("ring", 3, False), ("single", 1, True), ("ring", 3, True)],
)
def test_a_real_stage_holds_exactly_what_was_planned(
    demo: DemoFiles, precision: str, name: str, devices: int, streams: bool
):
    plan = choose(name, 4, DEMO_CONFIG.layers, ["cpu"] * devices)
    plan = offloaded(plan) if streams else plan
    memory = plan_memory(DEMO_CONFIG, SMALL, plan, precision, decoder="cpu")
    dtype = work_dtype(precision, "cpu")
    models: dict[range, CausalDiT] = {}
    with open_weights(demo.shards) as reader:
        for spec in plan.stages:
            fp8, hosted = precision == "fp8", spec.offload.weights
            models[spec.layers] = load_dit(
                reader, DEMO_CONFIG, layers=spec.layers, dtype=dtype, device="cpu", fp8=fp8, hosted=hosted
            )
    assert memory.on("cpu", "weights") + memory.on("cpu", "buffers for weights") == sum(
        model.nbytes for model in models.values()
    )
    assert memory.on(HOST, "weights") == sum(model.hosted.host_bytes for model in models.values() if model.hosted)
    assert bool(memory.on(HOST)) == streams

    with torch.inference_mode():
        sampling, text = SamplingConfig(), torch.zeros(5, DEMO_CONFIG.text_dim)
        stages = [Stage(spec, models[spec.layers], SMALL, sampling, levels(sampling), text) for spec in plan.stages]
        fresh = [held_bytes(stage) for stage in stages]
        run_until_two_sinks(plan, stages)
    for i, stage in enumerate(stages):
        # Both in host memory and on the device, which is the same here.
        constant = sum(part(memory, name, i) for name in ("block caches", "buffers for rings", "text and tables"))
        sink = part(memory, "attention sink", i)
        assert fresh[i] == constant + (sink if stage.spec.offload else 0), f"stage {i} before the first prefill"
        assert held_bytes(stage) == constant + sink, f"stage {i} with two sinks"


def test_a_real_decoder_holds_exactly_what_was_planned(demo: DemoFiles):
    vae = read_vae(demo.vae, dtype=torch.float32, device="cpu")
    parameters = sum(tensor.numel() for tensor in vae.model.state_dict().values())
    decoder = StreamDecoder(vae)
    with torch.inference_mode():
        decoder.prime(torch.zeros(16, 7, SMALL.latent_height, SMALL.latent_width))
    memory = plan_memory(
        DEMO_CONFIG, SMALL, choose("single", 4, 4, ["cpu"]), "bf16", decoder="cpu", vae=VaeSize(parameters, 8)
    )
    assert memory.on("cpu", "VAE caches") == held_bytes(decoder, apart_from=vae)
    assert memory.on("cpu", "VAE weights") == sum(tensor.nbytes for tensor in vae.model.state_dict().values())


def test_the_table_adds_up():
    memory = planned("fp8", "ring", 2)
    lines = table(memory, {"cuda:0": 80 * GIB}).splitlines()
    assert lines[0].startswith("704x384, 4 steps, precision fp8, plan ring, ")
    assert lines[1].split() == ["GiB", "cuda:0", "cuda:1"]
    rows = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    assert [name for name in rows if name.endswith("(estimate)")] == [f"{name} (estimate)" for name in ESTIMATED]
    assert rows.pop("free") == ["80.0", "?"]
    needed = rows.pop("needed")
    for column in (0, 1):
        cells = [float(cells[column].replace("-", "0")) for cells in rows.values()]
        assert sum(cells) == pytest.approx(float(needed[column]), abs=0.5)
    assert rows["VAE weights"] == ["-", "0.2"]


def test_what_fits_is_not_complained_about():
    memory = planned("fp8")
    check(memory, {"cuda:0": memory.on("cuda:0")})
    check(memory, {})
    with pytest.raises(PlanError):
        check(memory, {"cuda:0": memory.on("cuda:0") - 1})


CUTS = [("bf16", "single", 1), ("fp8", "single", 1), ("bf16", "tpp", 4), ("auto", "ring", 2)]


@pytest.mark.parametrize("card", [80, 40, 24, 16, 12])
@pytest.mark.parametrize(("precision", "plan", "devices"), CUTS)
def test_no_more_than_needed_is_streamed(card: int, precision: str, plan: str, devices: int):
    memory = planned(precision, plan, devices)
    free = {device: card * GIB for device in memory.devices}
    fitted = fit(memory, free)
    assert fit(memory, {device: memory.on(device) for device in memory.devices}) == memory
    for before, stage in zip(memory.plan.stages, fitted.plan.stages, strict=True):
        rings, weights = stage.offload.rings, stage.offload.weights
        assert replace(stage, offload=Offload()) == before
        assert bool(stage.offload) == (memory.on(stage.device) > free[stage.device])
        assert not weights or len(rings) == len(stage.steps) * len(stage.layers), "rings first"
        assert len(weights) % 2 == 0 and len(rings) != 1
        if fitted.on(stage.device) < free[stage.device] and len(weights) > 2:
            pair = 2 * 351e6 + 157e6  # parameters: two layers, at most one audio injector
            assert fitted.on(stage.device) + pair * (1 if precision == "fp8" else 2) * 1.01 > free[stage.device]


def test_streamed_layers_are_spread():
    memory = planned("fp8")
    (stage,) = fit(memory, {"cuda:0": int(20.5 * GIB)}).plan.stages
    gaps = [b - a for a, b in zip(stage.offload.weights, stage.offload.weights[1:], strict=False)]
    assert 2 < max(gaps) < 2 * 40 / len(stage.offload.weights)
    (stage,) = fit(memory, {"cuda:0": memory.total - 2 * GIB}).plan.stages
    visits = [40 * step + layer for step, layer in stage.offload.rings]
    gaps = [b - a for a, b in zip(visits, visits[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1 < max(gaps)


def test_bytes_that_come_in_every_step():
    memory = planned("fp8")
    most = fit(memory, {"cuda:0": 0})
    (stage,) = most.plan.stages
    assert len(stage.offload.weights) == 40 and len(stage.offload.rings) == 160
    layers = 40 * (351e6 + 13824 * 6) + 12 * 157e6  # parameters, a byte each
    assert streamed_bytes(most, stage) == pytest.approx(layers + 0.75 * 10.38e9, rel=0.01)
    lines = table(most, {"cuda:0": 10 * GIB}).splitlines()
    assert lines[1].split() == ["GiB", "cuda:0", "host"]
    assert re.fullmatch(
        r"cuda:0 reads 22\.\d GiB from host memory in every step, 0\.9\d s at 25 GB/s: 160 of 160 rings, "
        "weights of 40 of 40 layers",
        lines[-1],
    )


def test_a_card_that_stages_share_streams_nothing():
    plan = choose("tpp", 4, 40, ["cuda:0"] * 4)
    memory = plan_memory(LIVE_AVATAR_14B, FULL, plan, "fp8", decoder="cuda:0")
    assert fit(memory, {"cuda:0": 24 * GIB}) == memory


def test_the_cap_leaves_the_host_alone():
    free = {"cuda:0": 70 * GIB, "cuda:1": 10 * GIB, HOST: 100 * GIB}
    part = 1 - GAPS
    for vram, first in ((None, 70 * GIB), (24, 24 * GIB - OUTSIDE)):
        wanted = {"cuda:0": first * part, "cuda:1": 10 * GIB * part, HOST: 100 * GIB}
        assert room(free, vram) == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("vram", [None, 24])
def test_what_is_asked_of_the_host_is_room_enough(vram):
    memory = planned("fp8")
    wanted = asked(memory, vram)
    assert memory.on("cuda:0") < wanted["cuda:0"] or vram
    whole = fit(memory, room(wanted, vram))
    assert whole.fits(room(wanted, vram)) and bool(whole.plan.stages[0].offload) == (vram is not None)


def rooms(free: dict[str, int], fitting: MemoryPlan) -> dict[str, int]:
    return {device: free.get(device, min(free.values())) for device in fitting.devices}


@pytest.mark.parametrize("card", [24, 12, 10, 8, 6])
@pytest.mark.parametrize(("precision", "plan", "devices"), CUTS)
def test_every_hint_is_itself_feasible(card: int, precision: str, plan: str, devices: int):
    memory = planned(precision, plan, devices)
    free = {device: card * GIB for device in memory.devices}
    memory = fit(memory, free)
    hints = alternatives(memory, free)
    for words, fitting in hints:
        again = plan_memory(
            fitting.config,
            fitting.geometry,
            fitting.plan,
            fitting.precision,
            kv_cache=fitting.kv_cache,
            decoder=fitting.decoder,
        )
        assert again == fitting
        assert all(again.on(device) <= nbytes for device, nbytes in rooms(free, again).items()), words
        cuts = [(plan.name, len(plan.stages)) for plan in (fitting.plan, memory.plan)]
        assert ("precision fp8" in words) == (fitting.precision != precision)
        assert ("kv_cache fp8" in words) == (fitting.kv_cache != "full")
        assert (f"size {fitting.geometry.width}x{fitting.geometry.height}" in words) == (fitting.geometry != FULL)
        assert (f"over {len(fitting.plan.stages)} devices" in words) == (cuts[0] != cuts[1])
        assert words
    if not memory.fits(free):
        with pytest.raises(PlanError) as caught:
            check(memory, free)
        assert all(words in str(caught.value) for words, _ in hints)
        assert "\n" not in str(caught.value)


def most_streamed(precision: str = "bf16", kv_cache: str = "full", geometry: Geometry = FULL) -> int:
    """Bytes on the card that nothing can take away."""
    plan = choose("single", 4, LIVE_AVATAR_14B.layers, ["cuda:0"])
    memory = plan_memory(LIVE_AVATAR_14B, geometry, plan, precision, kv_cache=kv_cache, decoder="cuda:0")
    return fit(memory, {"cuda:0": 0}).on("cuda:0")


def test_the_nearest_setting_is_named():
    """One change is enough, so no two are proposed; of sizes and rings the nearest, not any that fits."""
    free = {"cuda:0": most_streamed("fp8")}
    memory = fit(planned("bf16"), free)
    hints = dict(alternatives(memory, free))
    assert hints["precision fp8"].on("cuda:0") == free["cuda:0"]
    assert not any(" with " in words for words in hints)
    assert "kv_cache fp8" not in hints, "which saves a buffer's half, less than fp8 weights do"
    with pytest.raises(
        PlanError,
        match=r"^cuda:0 needs \d+\.\d GiB for 704x384 with precision bf16, with all in host memory that can be "
        r"streamed, \d+\.\d GiB is free \(short by \d\.\d GiB\)\. Try: precision fp8 \(\d+\.\d GiB\); .*",
    ):
        check(memory, free)
    smaller = Geometry(*fit_size(384, 704, AREAS[1]))
    roomy = {"cuda:0": most_streamed(geometry=smaller)}
    assert f"size {smaller.width}x{smaller.height}" in dict(alternatives(fit(planned("bf16"), roomy), roomy))


def test_a_host_that_is_too_small():
    free = {"cuda:0": 24 * GIB, HOST: 32 * GIB}
    memory = fit(planned("fp8"), free)
    with pytest.raises(PlanError, match=r"^host memory needs \d+\.\d GiB for 704x384 .*Try: kv_cache fp8 \("):
        check(memory, free)


def test_nothing_fits():
    free = {"cuda:0": 2 * GIB}
    with pytest.raises(PlanError, match="No size or precision on offer fits; use a larger card"):
        check(fit(planned("fp8"), free), free)


def test_advice_for_shapes_that_no_picture_has():
    long = Geometry(64, 2048)
    free = {"cuda:0": planned("fp8", geometry=long).total}
    assert list(dict(alternatives(planned("bf16", geometry=long), free)))[0] == "precision fp8"


def test_sizes_proposed_are_those_on_offer():
    source = (Path(__file__).parent.parent / "nodes" / "preset.py").read_text(encoding="utf-8")
    (offered,) = re.findall(r"^SIZES = (.*)$", source, re.MULTILINE)
    names = re.findall(r'"(\d+)\*(\d+)"', offered)
    assert sorted(int(width) * int(height) for width, height in names) == sorted(AREAS)


def test_the_runtime_plans_before_it_loads(demo: DemoFiles, caplog: pytest.LogCaptureFixture):
    reserved: list[tuple[str, int]] = []
    model, spec = ModelSpec(demo.shards), RuntimeSpec(("cpu",))
    runtime = Runtime(lambda *asked: reserved.append(asked), free=lambda devices: {"cpu": 1000})
    with caplog.at_level(logging.INFO), pytest.raises(PlanError, match="cpu needs .* for 96x64"):
        runtime.ensure(model, DEMO_CONFIG, spec, 4, geometry=SMALL)
    assert runtime.nbytes == {}, "nothing may be loaded"
    memory = plan_memory(DEMO_CONFIG, SMALL, choose("auto", 4, 4, ["cpu"]), "auto", decoder="cpu")
    assert reserved == [("cpu", memory.on("cpu"))]
    assert "block caches" in caplog.text and "needed" in caplog.text


def test_weights_already_here_are_not_asked_for_again(demo: DemoFiles):
    memory = plan_memory(DEMO_CONFIG, SMALL, choose("auto", 4, 4, ["cpu"]), "auto", decoder="cpu")
    weights = memory.on("cpu", "weights")
    asked: list[int] = []
    runtime = Runtime(lambda device, nbytes: asked.append(nbytes), free=lambda devices: {"cpu": memory.total - weights})
    model, spec = ModelSpec(demo.shards), RuntimeSpec(("cpu",))
    with pytest.raises(PlanError):
        runtime.ensure(model, DEMO_CONFIG, spec, 4, geometry=SMALL)
    runtime.ensure(model, DEMO_CONFIG, spec, 4)
    assert asked == [memory.total, weights]
    asked.clear()
    runtime.ensure(model, DEMO_CONFIG, spec, 4, geometry=SMALL)
    assert asked == [memory.total - weights]
