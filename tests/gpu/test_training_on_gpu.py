"""A training step as a CUDA graph: the losses and gradients of one that is launched kernel by kernel."""

import queue
from functools import partial

import pytest
import torch

from liveavatar_core.config import ModelConfig
from liveavatar_core.encoders.audio_features import hidden_length
from liveavatar_core.geometry import Geometry
from training.dit.clips import Group
from training.dit.forward import gradients
from training.dit.train import draw_batch, losses, new_dit
from training.front import losses as front_losses
from training.front import new_front
from training.graphs import Gradients
from training.pool import Pool
from training.sizes import DEMO
from training.vae import LEARNED, SETTLED, late_losses, lighten, new_vae
from training.vae import losses as vae_losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIDE, CLIPS, BLOCKS = 64, 2, 8


def group(config: ModelConfig, seed: int) -> Group:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = SIDE // 8

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(CLIPS, *shape, generator=generator, device="cuda")

    return Group(
        4 * seed,
        latents=draw(BLOCKS, 16, 3, size, size),
        reference=draw(16, 1, size, size),
        anchor=draw(16, 1, size, size),
        motion=draw(16, 19, size, size),
        features=draw(BLOCKS, config.audio_states, config.audio_dim, 12),
        text=draw(config.text_len, config.text_dim),
        weight=torch.ones(CLIPS, BLOCKS, 1, 3, size, size, device="cuda"),
    )


def learn(learned, model: torch.nn.Module, batch) -> tuple[dict, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    values = learned(*batch)
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("teach", [True, False])
def test_the_dit_step_by_step(teach):
    torch.manual_seed(0)
    model = new_dit().cuda()
    of_batch = partial(losses, model, Geometry(SIDE, SIDE), teach)
    captured = Gradients(model, of_batch)

    def launched(*batch: torch.Tensor) -> dict:
        values = of_batch(*batch)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}

    for seed in range(5):  # rollouts of 3, 4 and 5 steps among them
        batch = draw_batch(DEMO, group(DEMO, seed), seed, clips=CLIPS, blocks=BLOCKS, teach=teach)
        with gradients(fused=True):
            got, mine = learn(captured, model, batch)
        with gradients():
            want, theirs = learn(launched, model, batch)
        for name, value in want.items():  # bfloat16; gradients may be summed in another order
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=2e-2, atol=1e-2 * gradient.abs().max().item())


def test_the_front_learns_from_a_graph():
    torch.manual_seed(0)
    model = new_front().cuda().train()
    learned = Gradients(model, partial(front_losses, model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    waveforms, mouths = torch.randn(2, 16_000, device="cuda"), torch.rand(2, hidden_length(16_000), 4, device="cuda")
    seen = []
    for _ in range(20):
        seen.append(learned(waveforms, mouths)["loss"].item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert sum(seen[-3:]) < 0.8 * sum(seen[:3])


def test_the_vae_learns_from_graphs_of_two_shapes():
    torch.manual_seed(0)
    model = new_vae(8).cuda()
    learned = Gradients(model, partial(vae_losses, model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    plain = torch.tensor([0.9, -0.7, 0.3], device="cuda").view(1, 3, 1, 1, 1)
    clips = [plain.expand(n, 3, 9, side, side).clone() for n, side in ((1, 64), (4, 32))]
    seen = []
    for step in range(30):
        seen.append(learned(clips[step % 2])["loss"].item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])


def test_the_decoder_with_compiled_norms():
    torch.manual_seed(0)
    model = new_vae(8).cuda()
    latents = torch.randn(1, 16, SETTLED + LEARNED, 8, 8, device="cuda")
    frames = torch.rand(1, 3, 4 * LEARNED, SIDE, SIDE, device="cuda")
    for part in (model.encoder, model.quant_conv, model.post_quant_conv):
        part.requires_grad_(False)
    of_batch = partial(late_losses, model)
    want, theirs = learn(Gradients(model, of_batch), model, (latents, frames))
    lighten(model.decoder, fused=True)
    got, mine = learn(Gradients(model, of_batch), model, (latents, frames))
    for name, value in want.items():  # what was float32 between convolutions is bfloat16
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=0)
    assert mine.keys() == theirs.keys()
    flat, wanted = (torch.cat([gradient.flatten() for gradient in found.values()]) for found in (mine, theirs))
    assert torch.cosine_similarity(flat, wanted, dim=0) > 0.98


def test_graphs_are_captured_while_threads_fill_a_pool():
    made = queue.SimpleQueue()

    def make(seed: int) -> torch.Tensor:
        torch.cuda.synchronize()  # refused while a graph is captured, as is what cuDNN does when it measures
        made.put(seed)
        return torch.full((), float(seed), device="cuda")

    pool = Pool(64, make, first_seed=0, begin_with=1, beside=True)
    model = torch.nn.Linear(8, 8).cuda()
    learned = Gradients(model, lambda x: {"loss": model(x).square().mean()})
    for size in range(1, 20):
        pool.refresh(100)
        x = torch.randn(size, 8, device="cuda")
        assert torch.allclose(learned(x)["loss"], model(x).square().mean())
    for _ in range(1901):
        made.get(timeout=60)  # or a thread has ended
