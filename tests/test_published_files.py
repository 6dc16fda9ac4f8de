"""The published files: their lengths, and that what reads them takes exactly their tensors.

No file is here; the lists in tests/data say where each is known from. Files made of the lists have the real header and
zeros that take no space.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench.published_files import header, tensors_of, write_empty
from liveavatar_core.config import LIVE_AVATAR_14B
from liveavatar_core.demo.random_model import vae_shapes
from liveavatar_core.encoders.vae import load_vae
from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.build import planned_dit, prepared
from liveavatar_core.weights.file import TensorInfo
from liveavatar_core.weights.layout import infer_config
from liveavatar_core.weights.lora import open_lora
from liveavatar_core.weights.quant import Fp8Linear
from liveavatar_core.weights.reader import open_weights

BYTES = {  # as their publishers' pages state them
    "wan2.2_s2v_14B_fp8_scaled": 16_394_832_474,
    "umt5_xxl_fp8_e4m3fn_scaled": 6_735_906_897,
    "umt5_xxl_fp16": 11_366_399_385,
    "wav2vec2_large_english_fp16": 630_997_322,
}


@pytest.mark.parametrize("name", BYTES)
def test_a_file_of_these_tensors_has_the_published_length(name: str) -> None:
    infos = tensors_of(name)
    assert len(header(infos)[0]) + sum(info.nbytes for info in infos.values()) == BYTES[name]


def test_the_library_reads_our_header(tmp_path: Path) -> None:
    infos = tensors_of("wan_2.1_vae")
    write_empty(tmp_path / "vae.safetensors", infos)
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:
        assert set(file.keys()) == infos.keys()
        assert all(tuple(file.get_slice(name).get_shape()) == info.shape for name, info in infos.items())


@pytest.mark.parametrize("name", ["wan2.2_s2v_14B", "wan2.2_s2v_14B_fp8_scaled"])
def test_a_published_model_is_taken_whole(tmp_path: Path, name: str) -> None:
    infos = tensors_of(name)
    with made(tmp_path, infos) as reader:
        assert infer_config(reader.infos(), reader.config) == LIVE_AVATAR_14B
        begin(reader)
        stored = {name for name in reader.infos() if reader.infos()[name].dtype == torch.float8_e4m3fn}
    linears = {name for name, module in planned().named_modules() if isinstance(module, Fp8Linear)}
    assert not stored or {f"{name}.weight" for name in linears} <= stored, "kept without a second rounding"


@pytest.mark.parametrize("lost", ["blocks.7.norm3.bias", "blocks.7.ffn.0.weight", "blocks.7.ffn.0.scale_weight"])
def test_a_tensor_more_or_less_is_refused(tmp_path: Path, lost: str) -> None:
    infos = tensors_of("wan2.2_s2v_14B_fp8_scaled")
    extra = infos | {"blocks.7.extra": TensorInfo((1,), torch.bfloat16)}
    with made(tmp_path, extra) as reader, pytest.raises(WeightsError, match=r"1 unexpected \(blocks.7.extra\)"):
        begin(reader)
    del infos[lost]
    if lost.endswith("scale_weight"):  # fp8 numbers may stand for themselves; nothing tells that they do not
        return
    with pytest.raises(WeightsError, match="1 missing|beside no weight"), made(tmp_path, infos) as reader:
        begin(reader)


def test_the_published_lora_fits(tmp_path: Path) -> None:
    write_empty(tmp_path / "lora.safetensors", tensors_of("liveavatar"))
    with open_lora(tmp_path / "lora.safetensors") as lora:
        lora.check(LIVE_AVATAR_14B)


def test_the_published_vae_is_taken_whole() -> None:
    infos = tensors_of("wan_2.1_vae")
    assert {name: info.shape for name, info in infos.items()} == vae_shapes(96)
    state = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
    vae = load_vae(state, dtype=torch.bfloat16, device="meta")
    assert sum(parameter.numel() for parameter in vae.model.parameters()) == 126_892_531


def made(folder: Path, infos: dict[str, TensorInfo]):
    path = folder / "model.safetensors"
    write_empty(path, infos)
    return open_weights(path)


def planned():
    return planned_dit(LIVE_AVATAR_14B, dtype=torch.bfloat16, fp8=True)


def begin(reader) -> None:
    """As far as the first tensor: everything has been checked by then."""
    next(prepared(reader, planned(), device="cpu"))
