"""The stages of training at toy sizes: they learn, they resume, and what they see is what inference will see."""

import os
import random
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from liveavatar_core.config import ModelConfig, ModelSpec
from liveavatar_core.demo.files import SHIPPED, DemoFiles
from liveavatar_core.encoders.audio_features import Wav2Vec2Speech, hidden_length, load_speech_encoder
from liveavatar_core.encoders.portrait import portrait_latents
from liveavatar_core.encoders.vae import WanVAE, load_vae, read_vae
from liveavatar_core.geometry import FRAMES_PER_BLOCK, Geometry
from liveavatar_core.model.dit import CausalDiT
from liveavatar_core.weights.build import load_dit
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.reader import open_weights
from training import muon, parallel, run, vae
from training.dit import clips
from training.dit.clips import Encoders, draw_scene, make_group
from training.dit.forward import gradients
from training.dit.train import draw_batch, losses, new_dit
from training.export import export_all, export_vae, official_vae_names
from training.front import mouth_at_states, new_front, normalised
from training.graphs import Gradients
from training.lips import read_opening
from training.prompts import NAMED, among_strangers, draw_wish, write
from training.sizes import DEMO, TEXT
from training.speaker import read_text_encoder
from training.speech.sounds import Sound, music
from training.text import Reader, encode_prompts, labels, read_tokenizer, tokenize
from training.world.light import turned
from training.world.looks import KINDS, draw_look, is_held_out
from training.world.painter import paint
from training.world.pose import Pose

SIDE = 32
CLIP_SIDE = 64  # the least that has tokens for old motion


@pytest.fixture(scope="module")
def small_vae():
    torch.manual_seed(0)
    return vae.new_vae(8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def moving():
    return torch.stack([vae.draw_clip(seed, SIDE, "cpu") for seed in range(3)]).float() / 127.5 - 1


def test_many_clips_are_coded_as_the_engine_codes_one(small_vae, moving):
    engine = WanVAE(small_vae)
    mean, _ = vae.encode(small_vae, moving)
    drawn = vae.decode(small_vae, mean)
    shape = (-1, 1, 1, 1)
    for one, latent, frames in zip(moving, mean, drawn, strict=True):
        normal = (latent - engine.latent_mean.view(shape)) / engine.latent_std.view(shape)
        torch.testing.assert_close(engine.encode(one), normal, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(engine.decode(normal, clamp=False), frames, rtol=1e-4, atol=1e-4)


def test_published_names_and_scaled_latents(small_vae, moving):
    scaled = vae.new_vae(8)
    scaled.load_state_dict(small_vae.state_dict())
    vae.normalise(scaled, moving)
    engine = load_vae(official_vae_names(scaled.state_dict(), 8), dtype=torch.float32, device="cpu")
    latents = torch.stack([engine.encode(clip) for clip in moving])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), rtol=1e-3, atol=0)
    before = vae.decode(small_vae, vae.encode(small_vae, moving)[0])
    torch.testing.assert_close(engine.decode(latents[0], clamp=False), before[0], rtol=1e-3, atol=1e-3)


def test_the_vae_learns_and_its_next_slice_goes_on(tmp_path, moving):
    torch.manual_seed(0)
    model = vae.new_vae(8)

    def learn(model, steps):
        learned = Gradients(model, partial(vae.losses, model))
        return run.minimise(
            "vae",
            model,
            lambda step: learned(moving[:1, :, :5]),
            tmp_path,
            minutes=2,
            whole=None,
            steps=steps,
            rate=2e-3,
        )

    assert learn(model, 8) == 8
    resumed = vae.new_vae(8)
    resumed.load_state_dict(run.read_weights(tmp_path, "vae"))
    for a, b in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())
    assert learn(resumed, 16) == 16
    steps = [entry["step"] for entry in run.read_log(tmp_path, "vae")]
    pixels = [entry["pixels"] for entry in run.read_log(tmp_path, "vae")]
    assert steps == [8, 16] and pixels[1] < pixels[0]
    assert (tmp_path / "vae.png").stat().st_size > 1000


def test_the_decoder_learns_what_comes_late_and_latents_stay(small_vae, moving, tmp_path):
    model = vae.new_vae(8)
    model.load_state_dict(small_vae.state_dict())
    late = vae.draw_late(model, 3, SIDE, 16, "cpu")
    seen = vae.draw_clip(3, SIDE, "cpu", frames=1 + 4 * vae.LATE, calm=True)
    places = [(y, x) for y in range(SIDE - 15) for x in range(SIDE - 15)]
    assert any(torch.equal(late.frames, seen[:, 1:, y : y + 16, x : x + 16]) for y, x in places)
    latents, frames = late.latents[None], late.frames[None].float() / 127.5 - 1
    assert latents.shape == (1, 16, vae.SETTLED + vae.LATE, 2, 2)

    for part in (model.encoder, model.quant_conv, model.post_quant_conv):
        part.requires_grad_(False)
    values = vae.late_losses(model, latents, frames)
    with torch.no_grad():
        pixels, _ = vae.differences(vae.decode(model, latents)[:, :, -frames.shape[2] :], frames)
    torch.testing.assert_close(values["pixels"], pixels)
    vae.lighten(model.decoder, fused=False)
    torch.testing.assert_close(vae.late_losses(model, latents, frames), values)
    learned = Gradients(model, partial(vae.late_losses, model))
    run.minimise("late", model, lambda _: learned(latents, frames), tmp_path, minutes=2, whole=None, steps=6, rate=1e-2)
    with torch.no_grad():
        assert vae.late_losses(model, latents, frames)["pixels"] < 0.95 * pixels
        assert torch.equal(vae.encode(model, moving)[0], vae.encode(small_vae, moving)[0])


def test_a_slice_stops_in_time_and_keeps_what_it_has(tmp_path):
    model = torch.nn.Linear(2, 2)

    def lose(step):
        return {"loss": model.weight.sum()}

    assert run.minimise("x", model, lose, tmp_path, minutes=0, whole=None, steps=9, rate=1) == 0
    assert run.read_weights(tmp_path, "x").keys() == {"weight", "bias"} and run.read_weights(tmp_path, "y") is None


def test_a_step_that_is_not_finite_changes_nothing_for_good(tmp_path):
    model = torch.nn.Linear(16, 2)

    def lose(step):
        loss = model(torch.ones(16)).sum() * (float("nan") if step == 3 else 1.0)
        loss.backward()
        return {"loss": loss.detach()}

    run.minimise("x", model, lose, tmp_path, minutes=1, whole=None, steps=6, rate=0.01)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_muon_steps_in_all_directions_at_once():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 16) @ torch.diag(torch.logspace(0, -1, 16))
    made = muon.orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.5
    assert torch.einsum("nrk,nrc,nkc->nk", u, made, v).min() > 0.5  # along the same singular vectors
    torch.testing.assert_close(made[1], muon.orthogonal(matrices[1:2])[0])

    model = torch.nn.Sequential(torch.nn.Conv3d(16, 16, 3), torch.nn.Linear(16, 3), torch.nn.Embedding(20, 20))
    assert [id(w) for w in muon.matrices(model)] == [id(model[0].weight)]
    weight = torch.nn.Parameter(matrices[0].view(24, 4, 4).clone())
    weight.grad = matrices[1].view(24, 4, 4)
    muon.Muon([weight], 0.1, weight_decay=0).step()
    change = (matrices[0] - weight.flatten(1)).detach()
    torch.testing.assert_close(change, made[1] * 0.1 * muon.AS_ADAMW * 24**0.5, rtol=1e-4, atol=1e-5)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def learn_together(number: int, count: int, folder: Path) -> None:
    """One process of several: a toy whose examples depend on who it is."""
    os.environ |= {"LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(count), "RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    parallel.join()
    weights = learn_toy([number], folder)
    torch.save(weights, folder / f"of {number}.pt")


def learn_toy(numbers: list[int], folder: Path) -> torch.Tensor:
    """With the examples of these processes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)

    def losses(*seen: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.stack([(model(x) - x.flip(1)).square().mean() for x in seen]).mean()}

    def learn(step: int) -> dict[str, torch.Tensor]:
        seen = [torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + n)) for n in numbers]
        return Gradients(model, losses)(*seen)

    run.minimise("toy", model, learn, folder, minutes=1, whole=None, steps=30, rate=0.01)
    return model.weight.detach()


def test_two_processes_learn_as_one_with_the_examples_of_both(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    start_processes(learn_together, args=(2, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"of {number}.pt") for number in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, learn_toy([0, 1], tmp_path / "one"))
    assert not torch.allclose(first, learn_toy([0], tmp_path / "half"))


def test_checkpoints_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PART_BYTES", 100)
    state = {f"t{i}": torch.randn(20) for i in range(5)} | {"count": torch.arange(3)}
    for _ in range(2):  # the second time over the first
        run.save_weights(tmp_path, "big", state)
    assert all(sum(t.nbytes for t in load_file(p).values()) <= 100 for p in tmp_path.glob("big.*.safetensors"))
    read = run.read_weights(tmp_path, "big")
    assert read.keys() == state.keys() and torch.equal(read["count"], state["count"])
    assert all(torch.equal(read[n], t.bfloat16().float()) for n, t in state.items() if n != "count")


def test_the_front_is_what_the_engine_takes():
    speech = Wav2Vec2Speech(new_front().wav2vec2)
    wave = normalised(music(1, 1.0).samples)
    with torch.no_grad():
        states = speech(wave)
    assert tuple(states.shape) == (DEMO.audio_states, hidden_length(16_000), DEMO.audio_dim)
    assert wave.mean().abs() < 1e-5 and wave.std().item() == pytest.approx(1, abs=1e-3)


def test_mouths_are_seen_where_states_listen():
    mouth = numpy.zeros((3, 100), numpy.float32)
    mouth[0, 50:] = 1  # opens at 0.5 s
    opened = mouth_at_states(Sound(numpy.zeros(16_000, numpy.float32), mouth), 0, 49)[:, 0]
    # state j hears 400 samples from 320 j on: number 24 ends at 0.505 s, number 25 begins at 0.5 s
    assert opened[23] == 0 and opened[25] == 1


def test_prompts_say_what_is_wished(tmp_path):
    tokenizer = read_tokenizer(tmp_path)
    generator = random.Random(0)
    wishes = [draw_wish(generator, kind) for kind in KINDS for _ in range(30)]
    prompts = [write(wish, generator) for wish in wishes]
    for wish, prompt in zip(wishes, prompts, strict=True):
        for name, words in NAMED.items():
            said = prompt.lower()
            named = {key for key, phrases in words.items() if any(phrase.lower() in said for phrase in phrases)}
            wanted = getattr(wish, name)
            assert wanted is None or wanted in named, (prompt, name, wanted)
        left = iter(among_strangers(prompt, generator).split())
        assert all(word in left for word in prompt.split()), "all words are there, in their order"
    tokens = tokenize(tokenizer, prompts)
    assert tokens.shape[1] <= DEMO.text_len and (tokens == 1).sum(1).eq(1).all()
    assert torch.equal(tokenize(tokenizer, ["An ANIME girl"]), tokenize(tokenizer, ["an anime girl"]))
    wanted = labels(wishes)
    assert [1 + list(NAMED["light"]).index(w.light) if w.light else 0 for w in wishes] == wanted["light"].tolist()
    reader = Reader().eval()
    text = encode_prompts(reader.encoder, tokenizer, prompts[:4])
    assert text.shape == (4, DEMO.text_len, DEMO.text_dim)
    for row, length in zip(text, (tokens[:4] != 0).sum(1), strict=True):
        assert not row[length:].any() and row[:length].any(1).all()
    alone = encode_prompts(reader.encoder, tokenizer, prompts[1:2])
    torch.testing.assert_close(text[1:2], alone, rtol=1e-4, atol=1e-5)  # neighbours in the batch change nothing


def test_scenes_keep_what_is_not_named():
    scenes = [draw_scene(seed) for seed in range(200)]
    assert any(s.picture.background != s.video.background for s in scenes)
    for scene in scenes:
        assert not is_held_out(scene.picture)
        if not scene.prompt:
            assert scene.picture == scene.video and scene.action == "talk"


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(CONFIG.audio_states, 4000, CONFIG.audio_dim, generator=generator)

    def hear(samples):
        return table[:, : hidden_length(len(samples))]

    def read(prompts):
        return torch.randn(len(prompts), CONFIG.text_len, CONFIG.text_dim, generator=generator)

    return Encoders(WanVAE(vae.new_vae(4)), hear, read, CLIP_SIDE, "cpu")


CONFIG = ModelConfig(
    dim=64,
    heads=2,
    ffn_dim=96,
    layers=2,
    audio_layers=(0,),
    audio_dim=16,
    audio_states=3,
    text_dim=16,
    text_len=8,
    freq_dim=32,
)


@pytest.fixture(scope="module")
def heard(known):
    sounds = [music(seed, 6.0) for seed in range(2)]
    return sounds, known.listen(sounds)


@pytest.fixture(scope="module")
def groups(known, heard):
    found = {}
    for seed in range(20):
        if len(found) < 2 and bool(random.Random(f"group {seed}").random() < 0.5) not in found:
            group = make_group(seed, 1, known, *heard)
            found[group.first_block == 0] = group
    return found


def test_a_clip_is_what_inference_would_encode(groups, heard):
    for at_start, group in groups.items():
        assert group.latents.shape == (1, clips.BLOCKS, 16, 3, CLIP_SIDE // 8, CLIP_SIDE // 8)
        assert group.features.shape == (1, clips.BLOCKS, CONFIG.audio_states, CONFIG.audio_dim, FRAMES_PER_BLOCK)
        assert group.motion.shape[2] == 19 and group.weight.amin() == 1 and group.weight.amax() == 1 + clips.MOUTH
        first = group.latents[:, 0, :, :1]
        assert torch.equal(group.anchor, first) == at_start
        blocks = [stream.block(n).bfloat16() for stream in heard[1] for n in range(6)]
        assert any(torch.equal(group.features[0, 0], block) for block in blocks)


def test_the_picture_is_to_a_clip_what_it_is_at_inference(known, heard):
    # a VAE of random numbers remembers for longer
    known = replace(known, vae=read_vae(DemoFiles(SHIPPED).vae, dtype=torch.float32, device="cpu"))
    group, scene = make_group(0, 1, known, *heard), draw_scene(0)
    picture = turned(paint(scene.picture, Pose.still(**scene.ajar), CLIP_SIDE, CLIP_SIDE), scene.hue)[0]
    reference, motion = portrait_latents(known.vae, (picture * 255).round() / 127.5 - 1)
    for got, want in ((group.reference[0], reference), (group.motion[0], motion)):
        errors = (got - want).square().mean((0, 2, 3)) / want.square().mean((0, 2, 3))
        assert errors.sqrt().max() < 0.01, "more than bfloat16 loses"


@pytest.mark.parametrize("teach", [True, False])
def test_the_dit_learns(groups, tmp_path, teach):
    torch.manual_seed(0)
    model = CausalDiT(CONFIG)
    torch.nn.init.zeros_(model.head.head.weight)

    learned = Gradients(model, partial(losses, model, Geometry(CLIP_SIDE, CLIP_SIDE), teach))

    def lose(step):
        return learned(*draw_batch(CONFIG, groups[True], step % 4, clips=1, blocks=2, teach=teach))

    with gradients():
        before = sum(lose(step)["loss"].item() for step in range(4))
        run.minimise("dit", model, lose, tmp_path, minutes=2, whole=None, steps=40, rate=1e-2)
        after = sum(lose(step)["loss"].item() for step in range(4))
    assert after < 0.85 * before


@pytest.mark.parametrize("kind", KINDS)
def test_openings_are_read_off_pictures(kind):
    look = draw_look(11, kind)
    said = torch.tensor([0.0, 0.07, 0.25, 0.5, 0.9])
    rows = Pose.still(wide=0.3).rows().repeat(5, 1)
    rows[:, 0] = said
    pose = Pose.of(rows)
    frames = paint(look, pose, 128, 128)
    torch.testing.assert_close(read_opening(frames, look, pose), said, rtol=0, atol=0.05)
    noisy = (frames + 0.03 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    torch.testing.assert_close(read_opening(noisy, look, pose), said, rtol=0, atol=0.08)
    assert read_opening(frames.flip(0), look, pose)[0] > 0.8  # and not off the pose that is handed over


def test_exported_files_are_read_by_the_engine(tmp_path):
    torch.manual_seed(0)
    made = {"vae": vae.new_vae(4), "front": new_front(), "text": Reader(), "dit": new_dit()}
    for stage, model in made.items():
        run.save_weights(tmp_path, stage, model.state_dict())
    read_tokenizer(tmp_path)
    export_vae(tmp_path, SIDE, clips=2)
    files = export_all(tmp_path, tmp_path / "files")
    assert files.exists and files.model == ModelSpec(files.single_file) and "random" not in files.about
    files.check()
    reader = open_weights(files.single_file)
    assert infer_config(reader.infos(), reader.config) == files.config == DEMO
    dit = load_dit(reader, DEMO, dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(dit[name], t.bfloat16().float()) for name, t in made["dit"].state_dict().items())
    assert read_vae(files.vae, dtype=torch.float32, device="cpu").model.config.base_dim == 4
    speech = load_speech_encoder(files.speech_encoder, dtype=torch.float32, device="cpu")
    made["front"].load_state_dict(run.read_weights(tmp_path, "front"))
    wave = normalised(music(1, 0.5).samples)
    with torch.no_grad():
        assert torch.equal(speech(wave), Wav2Vec2Speech(made["front"].wav2vec2)(wave))
    text = load_file(files.text_encoder)
    assert text["spiece_model"].numpy().tobytes() == (tmp_path / "spiece.model").read_bytes()
    assert files.text_config == TEXT
    encoder = made["text"].eval().bfloat16().float().encoder
    prompt = ["An elf is nodding in a forge, candlelight"]
    expected = encode_prompts(encoder, read_tokenizer(tmp_path), prompt)
    torch.testing.assert_close(read_text_encoder(files)(prompt), expected)
