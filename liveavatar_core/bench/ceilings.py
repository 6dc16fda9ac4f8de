"""What this card can do, hot, at the model's own shapes; and what a forward would then cost at the least.

A forward's floor counts the products, the attention and the bytes that no way of computing it can do without
(SPEC 8.2), each at the rate measured here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from liveavatar_core.bench.clock import call_ms
from liveavatar_core.config import ModelConfig
from liveavatar_core.geometry import WINDOW_BLOCKS, Geometry
from liveavatar_core.model.attention import attend
from liveavatar_core.model.pointwise import quantise_heads
from liveavatar_core.weights.quant import has_fp8

GIB = 1024**3
PASSES = 25  # over a layer's activations, read or written, once every stretch between two products is one kernel
HEATING = 1.0  # seconds until the card is hot and limited by its power
SECONDS = 0.15  # for each rate


def product_shapes(config: ModelConfig) -> dict[tuple[int, int], int]:
    """(inputs, outputs) of every product over all tokens in one forward -> how many there are.

    Keys and values of the text are made once per stream, those of the sound have a few rows.
    """
    square = 6 * config.layers + 2 * len(config.audio_layers)
    wide = config.ffn_dim
    return {(config.dim, config.dim): square, (config.dim, wide): config.layers, (wide, config.dim): config.layers}


def product_flops(config: ModelConfig, geometry: Geometry) -> float:
    tokens = geometry.tokens_per_block
    return sum(2.0 * tokens * k * n * count for (k, n), count in product_shapes(config).items())


def attention_flops(config: ModelConfig, geometry: Geometry) -> float:
    """To everything a full window shows, and to the text."""
    keys = visible_tokens(geometry) + config.text_len
    return 4.0 * geometry.tokens_per_block * keys * config.dim * config.layers


def visible_tokens(geometry: Geometry) -> int:
    return geometry.sink_tokens + WINDOW_BLOCKS * geometry.tokens_per_block


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Milliseconds of one call each; bandwidths in GB/s."""

    copy_gbs: float  # read and written
    h2d_gbs: float | None  # from pinned host memory; None without a GPU
    plain: dict[tuple[int, int], float]  # product by (inputs, outputs) in the working dtype
    fp8_tensor: dict[tuple[int, int], float]  # a scale per tensor; empty where the card has no fp8
    fp8_row: dict[tuple[int, int], float]  # a scale per row
    attention: dict[str, float]  # to a full window, by kind as in RuntimeSpec
    cross_attention: float  # to the text

    def forward_floor_ms(self, config: ModelConfig, geometry: Geometry, *, fp8: bool, attention: str) -> float:
        """With the quickest ways there are: 8 bits that are slower than exact products are no floor."""
        attention_ms = min(self.attention["exact"], self.attention[attention])
        products = self.plain
        if fp8 and self.fp8_row:
            products = {shape: min(ms, self.fp8_tensor[shape]) for shape, ms in self.fp8_row.items()}
        layer_bytes = PASSES * geometry.tokens_per_block * config.dim * 2
        per_layer = attention_ms + self.cross_attention + layer_bytes / self.copy_gbs / 1e6
        return config.layers * per_layer + sum(
            count * products[shape] for shape, count in product_shapes(config).items()
        )

    def rates(self, config: ModelConfig, geometry: Geometry) -> dict:
        """For a reader: TFLOP/s by shape."""
        tokens = geometry.tokens_per_block

        def tflops(table: dict[tuple[int, int], float]) -> dict[str, float]:
            return {f"{tokens}x{k}x{n}": round(2 * tokens * k * n / ms / 1e9, 1) for (k, n), ms in table.items()}

        flops = 4 * tokens * visible_tokens(geometry) * config.dim
        return {
            "copy_gbs": round(self.copy_gbs),
            "h2d_gbs": self.h2d_gbs and round(self.h2d_gbs, 1),
            "product_tflops": tflops(self.plain),
            "fp8_tensor_tflops": tflops(self.fp8_tensor),
            "fp8_row_tflops": tflops(self.fp8_row),
            "attention_tflops": {kind: round(flops / ms / 1e9, 1) for kind, ms in self.attention.items()},
            "attention_ms": {kind: round(ms, 3) for kind, ms in self.attention.items()},
        }


@torch.inference_mode()
def measure_ceilings(
    config: ModelConfig, geometry: Geometry, device: str, dtype: torch.dtype, attentions: Iterable[str]
) -> Ceilings:
    """Takes some four seconds on a GPU, and about a GiB."""
    on_gpu = torch.device(device).type == "cuda"
    seconds = SECONDS if on_gpu else SECONDS / 50
    tokens = geometry.tokens_per_block
    shapes = list(product_shapes(config))

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(kind)

    def plain(inputs: int, outputs: int, seconds: float = seconds) -> float:
        x, weight = random(tokens, inputs), random(outputs, inputs)
        return call_ms(device, lambda: F.linear(x, weight), seconds)

    def fp8(inputs: int, outputs: int, *, by_row: bool) -> float:
        x, weight = (random(rows, inputs, kind=torch.float8_e4m3fn) for rows in (tokens, outputs))
        scale_a = torch.ones((tokens, 1) if by_row else (1,), device=device)
        scale_b = torch.ones((1, outputs) if by_row else (1,), device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(x, weight.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

        return call_ms(device, product, seconds)

    def attention_ms(keys: int, kind: str) -> float:
        heads = (config.heads, config.head_dim)
        q, k, v = random(1, tokens, *heads), random(1, keys, *heads), random(1, keys, *heads)
        if kind == "int8":
            q, k = quantise_heads(q), quantise_heads(k)
        return call_ms(device, lambda: attend(q, k, v), seconds)

    if on_gpu:
        plain(*shapes[0], seconds=HEATING)
    has_8bit = has_fp8(torch.device(device)) and not any(size % 16 for shape in shapes for size in shape)
    return Ceilings(
        _copy_gbs(device, seconds),
        _h2d_gbs(device, seconds) if on_gpu else None,
        {shape: plain(*shape) for shape in shapes},
        {shape: fp8(*shape, by_row=False) for shape in shapes} if has_8bit else {},
        {shape: fp8(*shape, by_row=True) for shape in shapes} if has_8bit else {},
        {kind: attention_ms(visible_tokens(geometry), kind) for kind in {"exact": None} | dict.fromkeys(attentions)},
        attention_ms(config.text_len, "exact"),
    )


def _copy_gbs(device: str, seconds: float) -> float:
    nbytes = GIB // 4 if torch.device(device).type == "cuda" else GIB // 64
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / call_ms(device, lambda: target.copy_(source), seconds) / 1e6


def _h2d_gbs(device: str, seconds: float) -> float:
    source = torch.zeros(GIB // 4, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.nbytes / call_ms(device, lambda: target.copy_(source, non_blocking=True), seconds) / 1e6
