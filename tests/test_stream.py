"""Streams from files to latents: laziness, replay, cut-short and paused runs, residency, and what is refused."""

import threading
from dataclasses import replace

import pytest
import torch

from liveavatar_core.config import LoraSpec, ModelSpec, RuntimeSpec, SamplingConfig
from liveavatar_core.demo.files import DemoFiles
from liveavatar_core.demo.random_model import write_demo
from liveavatar_core.encoders.audio_features import FeatureStream, load_speech_encoder
from liveavatar_core.encoders.vae import StreamDecoder, read_vae
from liveavatar_core.errors import Cancelled, InputError, PlanError, WeightsError
from liveavatar_core.geometry import FRAMES_DROPPED, Geometry, frames_for
from liveavatar_core.pipeline.hold import Hold
from liveavatar_core.pipeline.spool import Spool
from liveavatar_core.pipeline.stream import frame_chunks
from liveavatar_core.runtime.runtime import Runtime
from liveavatar_core.runtime.stream import LatentStream, StreamRequest

SECONDS = 2.3  # five blocks and a part of the sixth


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> DemoFiles:
    return write_demo(tmp_path_factory.mktemp("demo") / "models")


@pytest.fixture(scope="module")
def request_(demo) -> StreamRequest:
    generator = torch.Generator().manual_seed(9)
    speech = load_speech_encoder(demo.speech_encoder, dtype=torch.float32, device="cpu")
    samples = torch.randn(round(SECONDS * 16_000), generator=generator)
    return StreamRequest(
        model=ModelSpec(demo.shards, (LoraSpec(demo.lora),)),
        runtime=RuntimeSpec(("cpu",)),
        sampling=SamplingConfig(seed=3),
        picture=torch.rand((3, 64, 96), generator=generator) * 2 - 1,
        text=torch.randn((7, demo.config.text_dim), generator=generator),
        features=FeatureStream(samples, speech, fps=25, lead_frames=FRAMES_DROPPED),
        vae=read_vae(demo.vae, dtype=torch.float32, device="cpu"),
        frames=frames_for(SECONDS, 25),
    )


def stream_of(request: StreamRequest, folder, runtime: Runtime | None = None) -> LatentStream:
    spool = Spool(folder / "stream.latents", blocks=6)
    return LatentStream(runtime or Runtime(), request, spool)


def all_latents(stream: LatentStream) -> torch.Tensor:
    return torch.stack([latent for _, latent in stream.latents()])


@pytest.fixture(scope="module")
def first(request_, tmp_path_factory) -> LatentStream:
    return stream_of(request_, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def latents(first) -> torch.Tensor:
    return all_latents(first)


@pytest.fixture
def fresh(request_, first, latents, tmp_path) -> LatentStream:
    """Not run yet; its picture is encoded."""
    stream = stream_of(request_, tmp_path)
    stream.share_portrait(first)
    return stream


def test_nothing_loads_before_the_first_pull(request_, tmp_path):
    runtime = Runtime()
    stream = stream_of(request_, tmp_path, runtime)
    pulled = stream.latents()
    assert runtime.nbytes == {} and not runtime.is_streaming
    next(pulled)
    assert runtime.nbytes["cpu"] > 0 and runtime.is_streaming
    pulled.close()
    assert not runtime.is_streaming


def test_latents_are_sane_and_depend_on_everything(request_, first, latents, tmp_path):
    assert latents.shape == (6, 16, 3, 8, 12)
    assert torch.isfinite(latents).all() and 0.1 < latents.std() < 10
    changes = {
        "seed": replace(request_, sampling=replace(request_.sampling, seed=4)),
        "text": replace(request_, text=request_.text * 2),
        "picture": replace(request_, picture=-request_.picture),
        "lora": replace(request_, model=ModelSpec(request_.model.checkpoint)),
        "reference latent": replace(request_, mid_sequence=True),
    }
    for name, changed in changes.items():
        stream = stream_of(changed, tmp_path)
        stream.share_portrait(first)
        assert not torch.equal(next(stream.latents())[1], latents[0]), name


def test_a_picture_is_encoded_once_for_all_speech(request_, latents, tmp_path):
    first, second = stream_of(request_, tmp_path), stream_of(replace(request_, frames=30), tmp_path)
    second.share_portrait(first)
    assert "portrait" not in vars(second), "nothing has been encoded yet"
    assert torch.equal(all_latents(first), latents)
    second.share_portrait(first)
    assert second.portrait[0] is first.portrait[0] and torch.equal(next(second.latents())[1], latents[0])
    for changed in (replace(request_, picture=-request_.picture), replace(request_, mid_sequence=True)):
        other = stream_of(changed, tmp_path)
        other.share_portrait(first)
        assert "portrait" not in vars(other)


def test_a_finished_stream_replays_without_a_model(request_, latents, tmp_path):
    runtime = Runtime()
    stream = stream_of(request_, tmp_path, runtime)
    assert torch.equal(all_latents(stream), latents)
    runtime.unload()
    assert torch.equal(all_latents(stream), latents)
    assert runtime.nbytes == {}, "a replay must not load anything"


def test_a_stream_cut_short_starts_over_and_ends_equal(fresh, latents):
    pulled = fresh.latents()
    next(pulled), next(pulled)
    pulled.close()
    assert not fresh.spool.complete
    assert torch.equal(all_latents(fresh), latents)
    assert fresh.spool.complete


@pytest.mark.parametrize("devices", [1, 2])
def test_a_pause_changes_nothing_but_the_time(fresh, latents, devices):
    """Another thread pulls, and waits as long as the pause lasts."""
    fresh.request = replace(fresh.request, runtime=RuntimeSpec(("cpu",) * devices))
    hold = Hold()
    pulled = fresh.latents(hold=hold)
    made = [next(pulled)[1]]
    for pause in (1, 2):
        hold.pause()
        rest = threading.Thread(target=lambda: made.append(next(pulled)[1]))
        rest.start()
        rest.join(0.3)
        assert len(made) == pause, "nothing comes during a pause"
        hold.resume()
        rest.join(60)
    made += [latent for _, latent in pulled]
    assert torch.equal(torch.stack(made), latents)
    assert [end - begin > 0.2 for begin, end in fresh.monitor.rests] == [True, True]


def test_a_stop_keeps_what_was_made(fresh, latents):
    hold, made = Hold(), []
    for block, latent in fresh.latents(hold=hold):
        made.append(latent)
        if block == 2:
            hold.pause()
            threading.Timer(0.1, hold.stop).start()
    assert torch.equal(torch.stack(made), latents[:3])
    hold.pause()
    assert not hold.paused, "what is over cannot be paused"
    assert torch.equal(all_latents(fresh), latents), "the next run is whole"


def test_a_cancel_ends_a_pause(fresh):
    hold, cancel = Hold(), threading.Event()
    pulled = fresh.latents(cancel.is_set, hold=hold)
    next(pulled)
    hold.pause()
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(Cancelled):
        next(pulled)


def test_a_replay_can_be_paused_and_stopped_but_not_after_its_end(first, latents):
    hold = Hold()
    for block, _ in first.latents(hold=hold):
        hold.pause()
        threading.Timer(0.05, hold.resume if block == 0 else hold.stop).start()
    assert block == 1 and len(first.monitor.rests) == 2
    hold = Hold()
    for block, _ in first.latents(hold=hold):
        if block == 5:
            hold.pause()
    assert hold.paused and not first.monitor.rests


def test_a_full_disk_costs_the_replay_only(request_, latents, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    stream = LatentStream(Runtime(), request_, Spool(blocked / "stream.latents", blocks=6))
    assert torch.equal(all_latents(stream), latents)
    assert not stream.spool.complete


def test_one_stream_at_a_time(request_, tmp_path):
    runtime = Runtime()
    first = stream_of(request_, tmp_path, runtime).latents()
    next(first)
    with pytest.raises(PlanError, match="another Live Avatar stream is running"):
        next(stream_of(replace(request_, frames=20), tmp_path / "other", runtime).latents())
    with pytest.raises(PlanError, match="in use by a running stream"):
        runtime.unload()
    first.close()
    runtime.unload()


@pytest.mark.parametrize("plan", ["tpp", "ring"])
def test_plans_from_files_give_the_same_bits(fresh, latents, plan):
    fresh.request = replace(fresh.request, runtime=RuntimeSpec(("cpu",) * 4, plan))
    assert torch.equal(all_latents(fresh), latents)


def test_layouts_give_the_same_bits(demo, fresh, latents):
    fresh.request = replace(fresh.request, model=replace(fresh.request.model, checkpoint=demo.single_file))
    assert torch.equal(all_latents(fresh), latents)


@pytest.mark.parametrize(("precision", "allowed"), [("bf16", 0.05), ("fp8", 0.25)])
def test_lower_precisions_stay_close(fresh, latents, precision, allowed):
    """Relative L2 of all latents against float32; bounds are about twice what four random layers showed."""
    fresh.request = replace(fresh.request, runtime=RuntimeSpec(("cpu",), precision=precision))
    got = all_latents(fresh).float()
    assert 0 < (got - latents).norm() / latents.norm() < allowed


def test_only_what_changed_is_loaded_again(demo, request_):
    runtime = Runtime()
    model, config = request_.model, demo.config
    runtime.ensure(model, config, RuntimeSpec(("cpu",)), 4)
    (kept,) = runtime._models.values()
    runtime.ensure(model, config, RuntimeSpec(("cpu",)), 3)
    assert list(runtime._models.values()) == [kept], "steps do not touch weights"
    runtime.ensure(model, config, RuntimeSpec(("cpu",) * 3, "tpp"), 3)
    assert list(runtime._models.values()) == [kept], "stages on one device share its weights"
    runtime.ensure(model, config, RuntimeSpec(("cpu",), precision="bf16"), 4)
    assert list(runtime._models.values()) != [kept]
    runtime.unload()
    assert runtime.nbytes == {}


def test_frames_and_their_count(request_, first, latents):
    _, stillness = first.portrait
    decoder = StreamDecoder(request_.vae)
    chunks = list(frame_chunks(enumerate(latents), decoder, stillness, request_.frames))
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12, 12, 1]
    assert [chunk.first_frame for chunk in chunks] == [0, 9, 21, 33, 45, 57]
    assert chunks[0].frames.dtype == torch.uint8 and chunks[0].frames.shape[1:] == (64, 96, 3)
    whole = request_.vae.decode(torch.cat((stillness[:, :7], *latents), dim=1))
    want = whole[:, 25 + FRAMES_DROPPED :][:, : request_.frames].permute(1, 2, 3, 0)
    got = torch.cat([chunk.frames for chunk in chunks]).float() / 127.5 - 1
    assert (got - want).abs().max() <= 1 / 127.5


def test_wrong_encoders_are_named(demo, request_, tmp_path):
    with pytest.raises(InputError, match="the prompt was encoded with 65 channels, the model takes 64"):
        stream_of(replace(request_, text=torch.zeros(3, 65)), tmp_path)

    def other_encoder(samples: torch.Tensor) -> torch.Tensor:
        return torch.zeros(13, (len(samples) - 400) // 320 + 1, 768)

    features = FeatureStream(torch.randn(16_000), other_encoder, fps=25)
    stream = stream_of(replace(request_, features=features), tmp_path)
    with pytest.raises(InputError, match="13 hidden states of width 768, the model takes 5 of 64"):
        next(stream.latents())


def test_devices_and_files_that_do_not_exist(request_, tmp_path):
    missing = replace(request_, model=ModelSpec(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="nothing"):
        stream_of(missing, tmp_path)
    with pytest.raises(PlanError, match="device cuda:99 does not exist here"):
        next(stream_of(replace(request_, runtime=RuntimeSpec(("cuda:99",))), tmp_path).latents())


@pytest.mark.parametrize("spec", [RuntimeSpec(("cuda:99",)), RuntimeSpec(("cpu",), decoder="cuda:99")])
def test_the_vae_is_not_placed_on_a_device_that_does_not_exist(demo, request_, spec):
    with pytest.raises(PlanError, match="device cuda:99 does not exist here"):
        Runtime().placed(request_.model, demo.config, spec, 4, Geometry(64, 96))
