"""A pack for `comfy_gpu.py` only: GET /memory tells what PyTorch and the card hold, in bytes."""

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}  # ComfyUI takes a folder without it for a broken pack


@PromptServer.instance.routes.get("/memory")
async def memory(request: web.Request) -> web.Response:
    """Peaks are since the last call."""
    if not torch.cuda.is_available():
        return web.json_response({})
    free, total = torch.cuda.mem_get_info()
    held = {
        "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "on_card": total - free,
        "allocator": torch.cuda.get_allocator_backend(),
    }
    torch.cuda.reset_peak_memory_stats()
    return web.json_response(held)
