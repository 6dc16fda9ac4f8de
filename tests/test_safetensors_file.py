"""Our reading of safetensors files: the library's numbers, and clear words for whatever is damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from liveavatar_core.errors import WeightsError
from liveavatar_core.weights.file import DTYPES, SafetensorsFile


def numbers(dtype: torch.dtype) -> torch.Tensor:
    noise = torch.randn((3, 5), generator=torch.Generator().manual_seed(4)) * 3
    return noise > 0 if dtype == torch.bool else noise.to(dtype)


def written(path: Path, header: dict | bytes, content: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def test_every_number_type_comes_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = {f"a {dtype}": numbers(dtype) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, dtype=torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors", {"who": "me"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"who": "me"}
    assert file.infos.keys() == tensors.keys()
    for name, want in tensors.items():
        got = file.get(name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape) == (file.infos[name].dtype, file.infos[name].shape)
        assert torch.equal(got.contiguous().flatten().view(torch.uint8), want.flatten().view(torch.uint8)), name


def test_a_writer_that_does_not_align_is_read(tmp_path: Path) -> None:
    want = torch.arange(4, dtype=torch.float32)
    header = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    for spaces in range(4):
        text = json.dumps(header).encode() + b" " * spaces
        path = written(tmp_path / f"{spaces}.safetensors", text, want.numpy().tobytes())
        assert torch.equal(SafetensorsFile(path).get("x"), want)


def test_tensors_outlive_the_file_and_may_be_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    x = SafetensorsFile(path).get("x")
    x += 1
    assert x.tolist() == [1, 1, 1]
    assert SafetensorsFile(path).get("x").tolist() == [0, 0, 0], "the file is as it was"


@pytest.mark.parametrize(
    ("header", "content"),
    [
        (b"{", b""),
        (b"[]", b""),
        ({"x": {"dtype": "F32", "shape": [2]}}, b"8 bytes."),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"four"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b""),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"more than 8 bytes"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"less"),
        ({"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, b"8 bytes."),
    ],
)
def test_damage_is_told_in_a_sentence(tmp_path: Path, header: dict | bytes, content: bytes) -> None:
    path = written(tmp_path / "a.safetensors", header, content)
    with pytest.raises(WeightsError, match="is not a complete safetensors file") as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


def test_other_number_types_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(WeightsError, match="holds numbers of type F4"):
        SafetensorsFile(path)
