"""The DiT against the recorded tensors: rotary factors, motion packer, audio encoder, one layer, the causal loop."""

from dataclasses import replace

import pytest
import torch

from liveavatar_core.config import SamplingConfig
from liveavatar_core.geometry import LATENTS_PER_BLOCK, PIXELS_PER_LATENT, WINDOW_BLOCKS, Geometry
from liveavatar_core.model.audio import AudioTokens
from liveavatar_core.model.cache import BlockCache, SinkLayer
from liveavatar_core.model.dit import CausalDiT, unpatchify
from liveavatar_core.model.pointwise import EPS, layer_norm, rms_norm, rotate
from liveavatar_core.model.rope import (
    REFERENCE_POSITION,
    block_factors,
    motion_factors,
    reference_factors,
    reference_position,
)
from liveavatar_core.pipeline.plan import PREFILL, single
from liveavatar_core.pipeline.stage import Stage
from liveavatar_core.sampling import euler, timestep
from liveavatar_core.schedule import levels, sigmas
from liveavatar_core.types import BlockRequest, Payload

FORWARD = 5e-6  # float32 against float32 with other kernels; the recording's own noise floor is 5e-7
ROTATED = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(golden, golden_config) -> CausalDiT:
    dit = CausalDiT(golden_config)
    dit.load_state_dict(golden("dit_weights")[0], strict=True)
    return dit.eval()


def geometry_of(latent_hw: list[int]) -> Geometry:
    return Geometry(*(side * PIXELS_PER_LATENT for side in latent_hw))


def as_table(factors: torch.Tensor) -> torch.Tensor:
    """A recorded factor tensor, float16 with singleton axes -> (T, K/2, 2) float32."""
    return factors.float().reshape(-1, *factors.shape[-2:])


def test_rope(golden, agree):
    tensors, manifest = golden("rope")
    rows, columns = manifest["tokens_hw"]
    geometry = Geometry(rows * 16, columns * 16)
    width = manifest["head_dim"]
    for start in tensors["block_start_frames"].tolist():
        factors = block_factors(start // LATENTS_PER_BLOCK, geometry, width, rounding=True)
        agree("rope", "factor_block_*", factors, as_table(tensors[f"factor_block_{start}"]), 0)
        rotated = rotate(tensors["q"], factors)
        agree("rope", "q_rot_block_*", rotated, tensors[f"q_rot_block_{start}"], ROTATED)
    motion = motion_factors(geometry, width, rounding=True)
    agree("rope", "factor_motion_prefill", motion, as_table(tensors["factor_motion_prefill"]), 0)
    for start, distance, shift in tensors["cond_cases"].tolist():
        position = reference_position(start, distance)
        assert position == REFERENCE_POSITION + shift
        factors = torch.cat((reference_factors(position, geometry, width, rounding=True), motion))
        agree("rope", "factor_cond_*", factors, as_table(tensors[f"factor_cond_{start}_{distance}"]), 0)
        rotated = rotate(tensors["k_cond"], factors)
        agree("rope", "k_rot_cond_*", rotated, tensors[f"k_rot_cond_{start}_{distance}"], ROTATED)


def test_rope_has_no_last_position():
    geometry = Geometry(64, 64)
    factors = block_factors(10_000_000, geometry, 128, rounding=False)
    assert torch.isfinite(factors).all()
    assert not torch.equal(factors, block_factors(10_000_001, geometry, 128, rounding=False))


def test_motion_packer(golden, agree, model):
    tensors, manifest = golden("motioner")
    # in_alm belongs to two modes of the packer that no pipeline uses
    for key in [key for key in tensors if key.startswith("in_") and key != "in_alm"]:
        count = key.removeprefix("in_")
        agree("motioner", "tokens_*", model.frame_packer(tensors[key]), tensors[f"tokens_{count}"], FORWARD)
    geometry = geometry_of(manifest["latent_hw"])
    factors = motion_factors(geometry, model.config.head_dim, rounding=True)
    agree("motioner", "factors", factors, as_table(tensors["factors"]), 0)


def test_audio_encoder(golden, agree, model):
    tensors, _ = golden("audio_encoder")
    encoder = model.casual_audio_encoder
    agree("audio_encoder", "enc_mixed", encoder.mix(tensors["enc_in"]), tensors["enc_mixed"], FORWARD)
    local, pooled = encoder(tensors["enc_in"])
    agree("audio_encoder", "enc_out_*", local, tensors["enc_out_local"], FORWARD)
    agree("audio_encoder", "enc_out_*", pooled, tensors["enc_out_global"], FORWARD)
    for key in [key for key in tensors if key.startswith("block_") and key.endswith("_in")]:
        name = key.removesuffix("_in")
        tokens = encoder.block(tensors[key], torch.float32)
        agree("audio_encoder", "block_*", tokens.local, tensors[f"{name}_local"], FORWARD)
        agree("audio_encoder", "block_*", tokens.pooled, tensors[f"{name}_global"], FORWARD)
    agree("audio_encoder", "layer_weights", encoder.weights, tensors["layer_weights"], 0)


def test_sampler(golden, agree):
    tensors, manifest = golden("sampler")
    for steps in sorted(int(key.removeprefix("sigmas_")) for key in tensors if key.startswith("sigmas_")):
        levels = sigmas(steps, manifest["shift"])
        agree("sampler", "sigmas_*", torch.tensor(levels), tensors[f"sigmas_{steps}"], 1e-6)
        times = torch.tensor([timestep(sigma) for sigma in levels[:-1]])
        agree("sampler", "timesteps_*", times, tensors[f"timesteps_{steps}"], 1e-6)
        for step in range(steps):
            got = euler(tensors[f"x_{steps}_{step}"], tensors[f"v_{steps}_{step}"], step, levels)
            agree("sampler", "x_*", got, tensors[f"x_{steps}_{step + 1}"], 1e-6)
        half = euler(tensors[f"bf16_x_{steps}"], tensors[f"bf16_v_{steps}"], 0, levels)
        agree("sampler", "bf16_*", half.float(), tensors[f"bf16_x_next_{steps}"].float(), 0)


# ---- one layer -----------------------------------------------------------------------------------------------------


def recorded_layer(model: CausalDiT, layer: int) -> tuple[dict[str, torch.Tensor], list]:
    """Hooks that note what goes in and out of a layer's parts, under the recording's names."""
    seen: dict[str, torch.Tensor] = {}
    block = model.blocks[str(layer)]
    injection = str(model.config.audio_layers.index(layer)) if layer in model.config.audio_layers else None
    outputs = {
        "self_attn.q": block.self_attn.q,
        "self_attn.k": block.self_attn.k,
        "self_attn.v.out": block.self_attn.v,
        "self_attn.out": block.self_attn,
        "cross_attn.out": block.cross_attn,
        "ffn.out": block.ffn,
        "block_out": block,
    }
    if injection is not None:
        outputs["inject.adain.out"] = model.audio_injector.injector_adain_layers[injection]
        outputs["inject.attn.out"] = model.audio_injector.injector[injection]
    inputs = {
        "self_attn.in": block.self_attn,
        "self_attn.o.in": block.self_attn.o,
        "cross_attn.in": block.cross_attn,
        "ffn.in": block.ffn,
    }

    def keep_output(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    def keep_input(name):
        return lambda module, args: seen.__setitem__(name, args[0])

    handles = [module.register_forward_hook(keep_output(name)) for name, module in outputs.items()]
    handles += [module.register_forward_pre_hook(keep_input(name)) for name, module in inputs.items()]
    return seen, handles


def test_one_layer(golden, agree, model):
    tensors, manifest = golden("dit_block")
    layer, config = manifest["layer"], model.config
    latent_hw = golden("dit_causal")[1]["latent_hw"]
    geometry = geometry_of(latent_hw)
    frame = geometry.tokens_per_frame
    for case in manifest["cases"]:
        given = {key.removeprefix(case + "."): value for key, value in tensors.items() if key.startswith(case + ".")}
        prefill = case == "prefill"
        factors = as_table(given["factors"])
        text = model.blocks[str(layer)].cross_attn.key_value(given["context"])
        after: dict[str, torch.Tensor] = {}
        cache = None
        if not prefill:
            cache = BlockCache(geometry, config.heads, config.head_dim, device="cpu", dtype=torch.float32)
            cond_k = given.get("cache_before.cond_k", tensors["prefill.cache_after.cond_k"])
            cond_v = given.get("cache_before.cond_v", tensors["prefill.cache_after.cond_v"])
            cond_factors = as_table(given["factors_cond"])
            cache.install(SinkLayer(cond_k[:, :frame], cond_k[:, frame:], cond_v), cond_factors[frame:])
            cache.roll(cond_factors[:frame])
            block = int(case.split("_")[0].removeprefix("block"))
            cache.next_block = block
            if "cache_before.k" in given:
                cache.k_BSHK[:, cache.sink_tokens :] = given["cache_before.k"]
                cache.v_BSHK[:, cache.sink_tokens :] = given["cache_before.v"]

        def see(k, norm, values, cache=cache, after=after, factors=factors, block=None if prefill else block):
            if cache is None:
                k, v = rms_norm(k.flatten(2), norm).view_as(k), values(None)
                after["cond_k"], after["cond_v"] = k, v
                return rotate(k, factors), v
            return cache.update(block, k, norm, values, factors)

        seen, handles = recorded_layer(model, layer)
        time = given["e0"][0, 0, :, 1 if prefill else 0]
        x = model.blocks[str(layer)](given["x_in"], time, factors, text, see)
        if not prefill:
            audio = AudioTokens(given["audio_emb"], given["audio_emb_global"])
            injection = config.audio_layers.index(layer)
            x = model.audio_injector(x, injection, model.audio_injector.hear(injection, audio))
            start = cache.sink_tokens + block % WINDOW_BLOCKS * cache.block_tokens
            slot = slice(start, start + cache.block_tokens)
            after["slot.k"], after["slot.v"] = cache.k_BSHK[:, slot], cache.v_BSHK[:, slot]
        for handle in handles:
            handle.remove()
        for part in ("q", "k"):  # norm and rotation are one operation inside the layer
            norm = getattr(model.blocks[str(layer)].self_attn, f"norm_{part}")
            seen[f"self_attn.norm_{part}.out"] = norm(seen[f"self_attn.{part}"])
        agree("dit_block", f"{case}.after_injection", x, given["after_injection"], FORWARD)
        wanted = set(given) - {"x_in", "e0", "factors", "factors_cond", "context", "audio_emb", "audio_emb_global"}
        wanted -= {"after_injection"} | {key for key in given if key.startswith("cache_before")}
        for name in sorted(wanted):
            got = after[name.removeprefix("cache_after.")] if name.startswith("cache_after") else seen[name]
            agree("dit_block", f"{case}.{name.split('.')[0]}.*", got, given[name], FORWARD)


def test_epsilons(golden, agree, model):
    tensors, manifest = golden("dit_block")
    x = tensors["eps.x"]
    block = model.blocks[str(manifest["layer"])]
    injection = str(model.config.audio_layers.index(manifest["layer"]))
    injector = model.audio_injector.injector[injection]
    adain = model.audio_injector.injector_adain_layers[injection]
    norm3 = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm3.weight, block.norm3.bias, EPS)
    quarter, half = x.shape[-1] // 4, x.shape[-1] // 2
    got = {
        "norm1": layer_norm(x),
        "norm2": layer_norm(x),
        "norm3": norm3,
        "self_attn.norm_q": block.self_attn.norm_q(x),
        "self_attn.norm_k": block.self_attn.norm_k(x),
        "cross_attn.norm_q": block.cross_attn.norm_q(x),
        "cross_attn.norm_k": block.cross_attn.norm_k(x),
        "inject.norm_q": injector.norm_q(x),
        "inject.norm_k": injector.norm_k(x),
        "head.norm": layer_norm(x),
        "audio_encoder.norm3": layer_norm(x),
        "audio_encoder.norm1": layer_norm(x[..., :quarter]),
        "audio_encoder.norm2": layer_norm(x[..., :half]),
        "inject.adain": adain(x, adain.modulation(tensors["eps.temb"].unsqueeze(0))),
    }
    for name, value in got.items():
        agree("dit_block", "eps.*", value, tensors[f"eps.{name}"], FORWARD)


# ---- the causal loop -----------------------------------------------------------------------------------------------


class Loop:
    """One stage that owns everything, fed by hand, so that every velocity can be seen."""

    def __init__(self, model: CausalDiT, tensors: dict, manifest: dict, *, rounding: bool = True) -> None:
        self.model, self.tensors = model, tensors
        self.geometry = geometry_of(manifest["latent_hw"])
        sampling = SamplingConfig(
            steps=len(tensors["timesteps"]),
            distance=tuple(map(tuple, tensors["relative_dist"].tolist())),
            reanchor_block=None,
            rope_rounding=rounding,
        )
        plan = single(sampling.steps, model.config.layers, ["cpu"])
        self.stage = Stage(plan.stages[0], model, self.geometry, sampling, levels(sampling), tensors["context"])
        condition = (tensors["ref_latents"][0], tensors["motion_latents"][0])
        self.stage.run(Payload(block=PREFILL, step=PREFILL, sink=0, condition=condition))

    def request(self, block: int) -> BlockRequest:
        latents = slice(LATENTS_PER_BLOCK * block, LATENTS_PER_BLOCK * (block + 1))
        return BlockRequest(
            block=block,
            features=self.tensors["audio"][..., 12 * block : 12 * (block + 1)],
            noise=self.tensors["noise"][:, latents],
            pose=self.tensors["pose_latents"][0, :, latents],
        )

    def forward(self, payload: Payload) -> tuple[Payload, torch.Tensor]:
        """One step; (what travels on, velocity)."""
        seen = []
        handle = self.model.head.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            payload = self.stage.run(payload)
        finally:
            handle.remove()
        return payload, unpatchify(seen[0], self.geometry.grid, self.model.config.channels)


def run_blocks(loop: Loop, blocks: int):
    for block in range(blocks):
        payload = Payload(block=block, step=0, sink=0, request=loop.request(block))
        for step in range(loop.stage.sampling.steps):
            payload, velocity = loop.forward(payload)
            yield block, step, velocity, payload.latent


def statistics(slot: torch.Tensor) -> torch.Tensor:
    flat = slot.flatten()
    return torch.stack((flat.mean(), flat.square().mean().sqrt(), flat.abs().max(), flat[::97].sum()))


def test_causal_loop(golden, agree, model):
    tensors, manifest = golden("dit_causal")
    loop = Loop(model, tensors, manifest)
    sink = dict(loop.stage._sinks[0])
    steps = len(tensors["timesteps"])
    levels = torch.tensor(loop.stage.levels)
    agree("dit_causal", "sigmas", levels, tensors["sigmas"], 1e-6)
    for layer, part in [(layer, part) for layer in sink for part in "kv"]:
        name = f"cache_end.layer{layer}.cond_{part}"
        if name in tensors:
            keys = torch.cat((sink[layer].reference_k, sink[layer].motion_k), dim=1)
            agree("dit_causal", "cache_end.*.cond_*", keys if part == "k" else sink[layer].v, tensors[name], FORWARD)
    for block, step, velocity, latent in run_blocks(loop, manifest["blocks"]):
        agree("dit_causal", "model_out", velocity, tensors["model_out"][block, step], FORWARD)
        if step == steps - 1:
            agree("dit_causal", "latents_final", latent, tensors["latents_final"][block], FORWARD)
    _check_rings(loop.stage, tensors, agree)
    for (block, distance), want in zip(tensors["far_blocks"].tolist(), tensors["far_model_out"], strict=True):
        velocity = _far(loop, manifest["blocks"] - 1, block, distance)
        agree("dit_causal", "far_model_out", velocity, want, FORWARD)


def _check_rings(stage: Stage, tensors: dict, agree) -> None:
    stats = tensors["cache_end_stats"]
    for step, caches in stage._caches.items():
        for layer, cache in enumerate(caches):
            rings = {"k": cache.k_BSHK[:, cache.sink_tokens :], "v": cache.v_BSHK[:, cache.sink_tokens :]}
            for index, (part, ring) in enumerate(rings.items()):
                name = f"cache_end.step{step}.layer{layer}.{part}"
                if name in tensors:
                    agree("dit_causal", "cache_end.step*", ring, tensors[name], FORWARD)
                for slot, stored in enumerate(ring.unflatten(1, (WINDOW_BLOCKS, -1)).unbind(1)):
                    got, want = statistics(stored), stats[step, layer, slot, index]
                    # mean and sum nearly cancel: their error is judged on the scale of what was added up
                    scale = want[1]
                    agree("dit_causal", "cache_end_stats", got[:3] / scale, want[:3] / scale, FORWARD)
                    count = stored.numel() / 97
                    agree(
                        "dit_causal",
                        "cache_end_stats",
                        got[3:] / (scale * count) + 1,
                        want[3:] / (scale * count) + 1,
                        FORWARD,
                    )


def _far(loop: Loop, inputs_of: int, block: int, distance: int) -> torch.Tensor:
    """A step-1 forward of a far block on the rings as they are, with the inputs of an earlier block."""
    step = 1
    request = replace(loop.request(inputs_of), block=block)
    loop.stage.sampling = replace(loop.stage.sampling, distance=distance)
    for cache in loop.stage._caches[step]:
        cache.next_block = block
    payload = loop.stage._admit(Payload(block=block, step=step, sink=0, request=request))
    return loop.forward(payload)[1]


def test_exact_rotary_factors(golden, agree, model):
    tensors, manifest = golden("dit_causal")
    loop = Loop(model, tensors, manifest, rounding=False)
    last = len(tensors["timesteps"]) - 1
    for block, step, _, latent in run_blocks(loop, manifest["blocks"]):
        if step == last:
            want = tensors["latents_final_exact_rope"][block]
            agree("dit_causal", "latents_final_exact_rope", latent, want, FORWARD)


def test_two_speakers(golden, agree, model):
    tensors, manifest = golden("dit_causal")
    loop = Loop(model, tensors, manifest)
    request = replace(loop.request(0), features=tensors["two_actors.audio"], mask=tensors["two_actors.mask"])
    _, velocity = loop.forward(Payload(block=0, step=0, sink=0, request=request))
    agree("dit_causal", "two_actors.model_out", velocity, tensors["two_actors.model_out"], FORWARD)
