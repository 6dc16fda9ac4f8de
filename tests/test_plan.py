"""Plans as data: every cell of the grid once, balanced cuts, and the choice among them by figures of a machine."""

import re
from itertools import product

import pytest

from liveavatar_core.config import LIVE_AVATAR_14B, ModelConfig, RuntimeSpec
from liveavatar_core.errors import PlanError
from liveavatar_core.geometry import Geometry
from liveavatar_core.pipeline.costs import rate, work
from liveavatar_core.pipeline.plan import Machine, Plan, Work, choose, grid
from liveavatar_core.runtime.choice import Choice, choose_plan

GIB = 1024**3
FULL = Geometry(384, 704)
MODEL = ModelConfig(dim=64, heads=2, ffn_dim=96, layers=8, audio_layers=(0, 1, 2))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{i}" for i in range(count))


def loads(plan: Plan, todo: Work, machine: Machine) -> dict[str, float]:
    found = rate(plan, todo, machine)
    return {device: share * found.block for device, share in found.busy.items()}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_every_cell_belongs_to_one_stage_and_every_route_passes_it(steps):
    for name in ("single", "tpp", "ring", "2x2", "1x3", "3x1"):
        devices = names(4 if name == "2x2" else 3)
        if (name in ("tpp", "3x1") and steps < 3) or (name == "2x2" and steps < 2):
            with pytest.raises(PlanError, match=f"{steps} steps cannot be shared by"):
                choose(name, steps, 7, devices)
            continue
        plan = choose(name, steps, 7, devices)
        owned = [cell for stage in plan.stages for cell in product(stage.steps, stage.layers)]
        assert sorted(owned) == list(product(range(steps), range(7))), name
        assert [stage.index for stage in plan.stages] == list(range(len(plan.stages)))
        passed = [(step, layer) for index, step in plan.route() for layer in plan.stages[index].layers]
        assert passed == list(product(range(steps), range(7))), name


def test_without_figures_all_are_as_even_as_can_be():
    sizes = [len(stage.layers) for stage in choose("ring", 4, 40, names(3)).stages]
    assert sizes == [13, 13, 14]
    assert [len(stage.steps) for stage in choose("tpp", 4, 40, names(3)).stages] == [1, 1, 2]


def test_dear_layers_and_the_decoder_make_their_stages_shorter():
    todo = Work((2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), embed=1.0)
    assert [len(s.layers) for s in choose("ring", 4, 9, names(2), work=todo).stages] == [3, 6]
    with_decoder = Work(todo.layers, embed=1.0, decode=12.0)
    cuts = {
        decoder: [len(s.layers) for s in choose("ring", 4, 9, names(2), work=with_decoder, decoder=decoder).stages]
        for decoder in ("cuda:0", "cuda:1", "cuda:2")
    }
    assert cuts == {"cuda:0": [2, 7], "cuda:1": [4, 5], "cuda:2": [3, 6]}


def test_a_cut_is_the_best_there_is():
    """Against all cuts, with uneven layers, uneven devices and the decoder on one of them."""
    todo = Work((3.0, 1.0, 2.0, 2.0, 1.0, 4.0, 1.0), embed=0.5, head=1.5, decode=6.0)
    machine = Machine({"cuda:0": 1.0, "cuda:1": 2.5, "cuda:2": 1.5})
    for decoder in names(3):
        found = choose("ring", 3, 7, names(3), work=todo, machine=machine, decoder=decoder)
        slowest = []
        for a in range(1, 6):
            for b in range(a + 1, 7):
                ranges = (range(a), range(a, b), range(b, 7))
                times = []
                for device, layers in zip(names(3), ranges, strict=True):
                    cost = 3 * (sum(todo.layers[i] for i in layers) + 0.5 * (0 in layers) + 1.5 * (6 in layers))
                    times.append((cost + todo.decode * (device == decoder)) / machine.speed(device))
                slowest.append(max(times))
        assert rate(found, todo, machine).block == pytest.approx(min(slowest))


def test_slower_devices_get_less():
    machine = Machine({"cuda:0": 3.0, "cuda:1": 1.0})
    assert [len(s.layers) for s in choose("ring", 4, 40, names(2), machine=machine).stages] == [30, 10]
    assert [len(s.steps) for s in choose("tpp", 4, 40, names(2), machine=machine).stages] == [3, 1]


def test_room_limits_a_cut():
    def room(device: str, steps: int) -> int:
        return 6 if device == "cuda:0" else 40

    assert [len(s.layers) for s in choose("ring", 4, 40, names(2), machine=Machine(room=room)).stages] == [6, 34]
    with pytest.raises(PlanError, match="cannot hold the model between them"):
        choose("ring", 4, 40, names(2), machine=Machine(room=lambda device, steps: 19))


def test_rows_may_differ_in_length():
    plan = grid("mixed", 4, 8, [names(3), ["cuda:3"]])
    assert [(len(s.steps), len(s.layers)) for s in plan.stages] == [(3, 2), (3, 3), (3, 3), (1, 8)]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("fast", 2, "plan is 'fast'; it must be auto, single, tpp, ring, or rows x columns like 2x2"),
        ("2x2", 3, "plan 2x2 is for 4 devices, 3 are named"),
        ("0x2", 2, "plan is '0x2'"),
        ("ring", 9, "8 layers cannot be shared by 9 devices; use at most 8"),
        ("tpp", 5, "4 steps cannot be shared by 5 devices; use at most 4"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(name, count, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        choose(name, 4, 8, names(count))


def test_costs_of_the_published_model():
    """SPEC 8.2: 2.98 TFLOP a layer and 0.33 an injection; attention weighs more than plain products, fp8 less."""
    bf16, fp8 = work(LIVE_AVATAR_14B, FULL, "bf16"), work(LIVE_AVATAR_14B, FULL, "fp8")
    assert bf16.layers[0] - bf16.layers[1] == pytest.approx(0.332, rel=0.01)
    assert 2.98 < bf16.layers[1] < 1.3 * 2.98 and fp8.layers[1] < 0.8 * bf16.layers[1]
    assert bf16.hidden == 3168 * 5120 * 2
    assert sum(cost > bf16.layers[1] for cost in bf16.layers) == len(LIVE_AVATAR_14B.audio_layers)


def machine(speeds: dict[str, float], link: float = 100e9) -> Machine:
    return Machine(speeds, {(a, b): link for a in speeds for b in speeds if a != b}, bus=25e9)


def chosen(count: int, gib: float, plan: str = "auto", decoder: str = "auto", link: float = 100e9) -> Choice:
    """Of `count` cards of `gib` GiB, as fast as an H100."""
    rates = dict.fromkeys(names(count), 760.0)
    spec = RuntimeSpec(names(count), plan, decoder=decoder)
    rooms = {name: int(gib * GIB) for name in names(count)}
    return choose_plan(LIVE_AVATAR_14B, FULL, spec, "fp8", 4, rooms, machine(rates, link))


def test_auto_takes_the_fastest_that_fits():
    two, four = chosen(2, 140), chosen(4, 140)
    single = chosen(1, 140)
    assert (single.plan.name, two.plan.name, four.plan.name) == ("single", "ring", "ring")
    assert two.rate.fps > 1.95 * single.rate.fps and four.rate.fps > 3.9 * single.rate.fps
    assert min(two.rate.busy.values()) > 0.95, "the VAE's card has fewer layers"
    small = chosen(4, 23)
    assert small.memory.fits(dict.fromkeys(names(4), 23 * GIB)) and not any(s.offload for s in small.plan.stages)
    assert small.why.startswith("auto chose ring: stages on cuda:0, cuda:1, cuda:2, cuda:3, VAE on cuda:")


def test_slow_links_speak_for_tpp():
    assert chosen(4, 140, link=100e9).plan.name == "ring"
    assert chosen(4, 140, link=0.3e9).plan.name == "tpp"


def test_a_card_may_be_left_to_the_vae():
    original = chosen(5, 140, "tpp")
    assert [s.device for s in original.plan.stages] == list(names(4)) and original.plan.decoder == "cuda:4"
    assert chosen(3, 140, "ring", "cuda:1").plan.decoder == "cuda:1"
    assert len(chosen(3, 140, "ring", "cuda:1").plan.stages) == 3


def test_unequal_cards_get_unequal_shares():
    speeds, rooms = {"cuda:0": 760.0, "cuda:1": 165.0}, {"cuda:0": 79 * GIB, "cuda:1": 23 * GIB}
    spec = RuntimeSpec(names(2), "ring")
    found = choose_plan(LIVE_AVATAR_14B, FULL, spec, "fp8", 4, rooms, machine(speeds))
    assert found.memory.fits(rooms) and len(found.plan.stages[0].layers) > 2 * len(found.plan.stages[1].layers)


def test_what_does_not_fit_is_streamed_and_said():
    found = chosen(1, 23)
    assert found.plan.stages[0].offload and "a part in host memory because no plan fits" in found.why
    assert found.rate.fps < chosen(1, 140).rate.fps / 2


def test_without_figures_the_reason_speaks_of_shares():
    found = choose_plan(MODEL, Geometry(64, 64), RuntimeSpec(names(2)), "bf16", 4, {}, Machine())
    assert "frames a second" not in found.why and "the best rate expected" in found.why
