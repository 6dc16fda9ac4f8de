"""Stages on two cards: what passes between them arrives whole, by whichever way, and no plan changes a bit."""

import pytest
import torch
from test_graphs import CONFIG, run

from liveavatar_core.pipeline import links
from liveavatar_core.pipeline.links import Mark, carry, lanes
from liveavatar_core.pipeline.plan import layer_ring, single, tpp
from liveavatar_core.types import Payload

CARDS = ["cuda:0", "cuda:1"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(params=["as the cards allow", "through the host"])
def way(request, monkeypatch):
    if request.param == "through the host":
        monkeypatch.setattr(links, "_reaches", lambda source, target: False)


@pytest.mark.usefixtures("way")
def test_what_is_carried_arrives_whole_and_in_order():
    """While the source goes on to overwrite nothing and both compute; a payload has several tensors."""
    source, target = lanes([torch.device(card) for card in CARDS])
    for turn in range(20):
        with source.active():
            hidden = torch.full((1, 3168, 1024), float(turn), device=CARDS[0], dtype=torch.bfloat16) + 1
            latent = torch.arange(1000.0, device=CARDS[0]) * turn
            ready = source.mark()
        carried, begin, arrived = carry(Payload(turn, 0, 0, latent=latent, hidden=hidden), ready, source, target)
        del hidden, latent  # the copy keeps them
        with source.active():
            torch.full((1, 3168, 1024), -1.0, device=CARDS[0], dtype=torch.bfloat16)
        target.follow(arrived)
        with target.active():
            assert carried.hidden.device == torch.device(CARDS[1])
            assert torch.equal(carried.hidden.cpu(), torch.full((1, 3168, 1024), turn + 1.0, dtype=torch.bfloat16))
            assert torch.equal(carried.latent.cpu(), torch.arange(1000.0) * turn)
        assert arrived.passed and begin.time <= arrived.time


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("graphs", [False, True])
def test_two_cards_give_the_bits_of_one(graphs):
    want = run(single(4, CONFIG.layers, CARDS[:1]), graphs=False, reanchor=4)
    for plan in (layer_ring(4, CONFIG.layers, CARDS), tpp(4, CONFIG.layers, CARDS), tpp(4, CONFIG.layers, CARDS * 2)):
        assert torch.equal(run(plan, graphs=graphs, reanchor=4), want), plan.name


def test_marks_tell_the_hosts_time_on_both_cards():
    here, there = lanes([torch.device(card) for card in CARDS])
    before = Mark().time
    marks = []
    for lane in (here, there):
        with lane.active():
            torch.randn(2048, 2048, device=lane.device).square_()
            marks.append(lane.mark())
        lane.drain()
    after = Mark().time
    assert all(before - 0.001 <= mark.time <= after + 0.001 for mark in marks)
