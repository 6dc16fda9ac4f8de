"""What a reader gets: JSON lines to keep, and tables with a column per configuration."""

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

ROWS = (  # key of a line, words, unit
    ("forward_ms", "forward, one step of one block", "ms"),
    ("forward_floor_ms", "  its floor at the rates below", "ms"),
    ("of_floor", "  floor / measured", ""),
    ("tflops", "  TFLOP/s of products and attention", ""),
    ("kernels_ms", "  kernels", "ms"),
    ("streamed_gib", "  from host memory", "GiB"),
    ("bus_ms", "  what that takes by itself", "ms"),
    ("of_bound", "  max(kernels, that) / measured", ""),
    ("forward_idle", "  GPU idle", ""),
    ("host_ms", "  host", "ms"),
    ("sink_ms", "new stream, until the attention sink is there", "ms"),
    ("first_block_ms", "  block 0 after it", "ms"),
    ("vae_ms", "decoder, one block, pixels on the host", "ms"),
    ("vae_kernels_ms", "  kernels", "ms"),
    ("fps", "frames a second, decoder included", ""),
    ("block_ms", "  one block of 12 frames", "ms"),
    ("block_ms_first_quarter", "  first quarter of the settled blocks", "ms"),
    ("block_ms_last_quarter", "  last quarter", "ms"),
    ("growth_mib", "  growth of allocated memory", "MiB"),
    ("gpu_idle", "  GPU idle", ""),
    ("ttff_ms", "time to first frames, warm, from sound in", "ms"),
    ("features_ms", "  until the first speech features are there", "ms"),
    ("first_latents_ms", "  until the first latents are there", "ms"),
    ("portrait_ms", "portrait to latents, before that", "ms"),
    ("load_s", "model loaded in", "s"),
    ("planned_gib", "memory planned", "GiB"),
    ("peak_gib", "memory at the peak", "GiB"),
    ("reserved_gib", "  taken from the card", "GiB"),
)


def table(lines: Sequence[dict]) -> str:
    """Lines of one run side by side; with several, how many times as fast as the first each is."""
    rows = [("", [heading(line) for line in lines])]
    for key, words, unit in ROWS:
        if any(line.get(key) is not None for line in lines):
            rows.append((f"{words} {unit}".rstrip(), [_cell(line.get(key)) for line in lines]))
    for name in ("forward_ms", "block_ms"):
        if len(lines) > 1 and all(line.get(name) for line in lines):
            ratios = [f"x {lines[0][name] / line[name]:.2f}" for line in lines]
            rows.append((f"speed against the first, by {name.removesuffix('_ms')}", ratios))
    kinds = {kind: None for line in lines for kind in line.get("breakdown_ms", {})}
    rows += [(f"  {kind} ms", [_cell(line.get("breakdown_ms", {}).get(kind)) for line in lines]) for kind in kinds]
    parts = {part: None for line in lines for part in line.get("held_gib", {})}
    rows += [(f"  {part} GiB", [_held(line, part) for line in lines]) for part in parts]
    return _columns(rows)


def errors_table(lines: Sequence[dict]) -> str:
    rows = [("velocity against bf16 exact", ["rel. L2 mean", "largest", "1 - cosine mean", "largest"])]
    for line in lines:
        numbers = [line[key] for key in ("relative_l2", "relative_l2_max", "cosine_error", "cosine_error_max")]
        rows.append((line["variant"], [f"{number:.2e}" for number in numbers]))
    return _columns(rows)


def ceilings_table(rates: dict) -> str:
    rows = []
    for key, value in rates.items():
        if isinstance(value, dict):
            rows += [(f"{key} {shape}", [_cell(rate)]) for shape, rate in value.items()]
        else:
            rows.append((key, [_cell(value)]))
    return _columns(rows)


def commit(root: Path = ROOT) -> str:
    """Of the git clone this code lies in, read from its files; "unknown" elsewhere."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:7]
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()[:7]
        packed = (git / "packed-refs").read_text().splitlines()
        return next(line[:7] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"


def heading(line: dict) -> str:
    words = [line["precision"], line["attention"]]
    words += ["kv fp8"] if line["kv_cache"] == "fp8" else []
    words += ["skip"] if line["skip_last_step"] else []
    words += [f"{line['vram_cap_gib']:g} GiB"] if line["vram_cap_gib"] else []
    return " ".join(words)


def _held(line: dict, part: str) -> str:
    """Measured of planned."""
    held = line.get("held_gib", {}).get(part)
    return "-" if held is None else f"{_cell(held[1])} of {_cell(held[0])}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"


def _columns(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    first = max(len(label) for label, _ in rows)
    width = 2 + max(len(cell) for _, cells in rows for cell in cells)
    return "\n".join(label.ljust(first) + "".join(cell.rjust(width) for cell in cells) for label, cells in rows)
