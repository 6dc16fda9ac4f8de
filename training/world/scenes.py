"""Backgrounds. They are still; what differs between seeds is where things stand and their colours."""

import torch
from torch import Tensor

from training.world.brush import rgb
from training.world.looks import Look
from training.world.shapes import box, chance, common, cover, ellipse, noise, over, ramp, union, zigzag


def background(x: Tensor, y: Tensor, look: Look, pixel: float) -> Tensor:
    """(1, 3, H, W), unlit."""
    # A portrait's background is out of focus, a drawing's is sharp.
    soft = 0.07 if look.kind == "portrait" else pixel
    return _PAINTERS[look.background](x, y, look, soft)


def _pick(look: Look, number: int) -> float:
    """0..1: what a scene leaves open."""
    return chance(torch.tensor(number), 0, look.seed).item()


def _fade(share: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return low + (high - low) * share


def _studio(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    hue = _pick(look, 1)
    base = rgb((0.45 + 0.3 * hue, 0.52 + 0.1 * _pick(look, 2), 0.75 - 0.3 * hue), x)
    image = _fade(ramp(torch.hypot(x - 0.2, y + 0.2), 0.0, 1.6), base * 1.25, base * 0.55)
    if look.kind == "portrait":
        return image
    stripes = zigzag(x * 2.2 + y * 1.2 + 5 * _pick(look, 3))
    return over(image, base * 0.95, cover(stripes - 0.5, 0.06) * 0.35)


def _office(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    wall = rgb((0.80 - 0.15 * _pick(look, 1), 0.76, 0.66 + 0.16 * _pick(look, 2)), x)
    frame = rgb((0.45, 0.36, 0.30), x)
    image = _fade(ramp(y, -1.2, 1.4), wall * 1.05, wall * 0.8)
    side = 1 if _pick(look, 3) > 0.5 else -1
    wx, wy = x - side * 0.62, y + 0.35
    window = box(wx, wy, 0.30, 0.46)
    image = over(image, frame, cover(window - 0.05, soft))
    sky = _fade(ramp(y, -0.8, 0.2), rgb((0.62, 0.82, 0.98), x), rgb((0.92, 0.95, 0.9), x))
    image = over(image, sky, cover(window, soft))
    image = over(image, frame, cover(common(union(wx.abs(), wy.abs()) - 0.02, window), soft))
    u = x + side * 0.62
    number = (u * 12).floor()
    for row in range(3):
        v = y + 0.62 - 0.42 * row
        height = 0.10 + 0.06 * chance(number, row, look.seed)
        books = common(u.abs() - 0.32, v - 0.14, 0.14 - 2 * height - v)
        tone = chance(number, row + 7, look.seed)
        image = over(image, torch.cat((0.30 + 0.5 * tone, 0.55 - 0.2 * tone, 0.62 - 0.4 * tone), 1), cover(books, soft))
        image = over(image, frame * 0.85, cover(box(u, v - 0.16, 0.38, 0.022), soft))
    return image


def _forest(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    image = _fade(ramp(y, -1.1, 0.9), rgb((0.72, 0.88, 0.70), x), rgb((0.30, 0.48, 0.26), x))
    for layer, (green, count) in enumerate(((0.55, 3.2), (0.38, 2.2))):
        place = x * count + 3.1 * layer + 4 * _pick(look, layer)
        lane = place.floor()
        width = (0.10 + 0.10 * chance(lane, layer, look.seed)) * (1 + 0.25 * y)
        trunk = ((place - lane - 0.5).abs() - width) / count
        image = over(image, rgb((0.42 * green + 0.14, 0.30 * green + 0.12, 0.20 * green + 0.08), x), cover(trunk, soft))
        fine = 4 * (1 + layer)
        leaves = noise(x * fine, y * fine, look.seed + layer) + 0.45 * noise(x * 11, y * 11, look.seed)
        crown = y + 0.55 - 0.75 * leaves + 0.12 * layer
        image = over(image, rgb((0.22 * green + 0.08, green, 0.22 * green + 0.08), x), cover(crown, soft + 0.03))
    grass = 0.62 - y + 0.10 * noise(x * 9, y * 0, look.seed)
    return over(image, rgb((0.26, 0.40, 0.18), x), cover(grass, soft + 0.02))


def _city(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    image = _fade(ramp(y, -1.0, 0.8), rgb((0.05, 0.06, 0.16), x), rgb((0.34, 0.22, 0.42), x))
    moon = ellipse(x - 1.2 * _pick(look, 1) + 0.6, y + 0.72, 0.12, 0.12)
    image = over(image, rgb((0.95, 0.93, 0.80), x), cover(moon, soft))
    for layer, (count, tone) in enumerate(((4.0, 0.24), (2.6, 0.13))):
        place = x * count + 7 * _pick(look, 2 + layer)
        lane = place.floor()
        top = -0.65 + 0.35 * layer + 0.75 * chance(lane, layer, look.seed)
        house = common(((place - lane - 0.5).abs() - 0.47) / count, top - y)
        image = over(image, rgb((tone, tone * 0.95, tone * 1.7), x), cover(house, soft))
        lit = (chance((place * 5).floor(), (y * 9).floor(), look.seed + layer) > 0.55).float()
        pane = common(0.45 - zigzag(place * 5), 0.4 - zigzag(y * 9))
        blurred = look.kind == "portrait"
        image = over(
            image,
            rgb((0.98, 0.80, 0.42), x),
            lit * cover(house + 0.02, soft) * (0.45 if blurred else cover(pane, 0.25)) * 0.9,
        )
    return image


def _beach(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    horizon = 0.12 + 0.12 * _pick(look, 1)
    image = _fade(ramp(y, -1.0, 0.25), rgb((0.36, 0.66, 0.94), x), rgb((0.86, 0.94, 0.96), x))
    sun = ellipse(x - 1.3 * _pick(look, 2) + 0.65, y + 0.62, 0.13, 0.13)
    image = over(image, rgb((1.0, 0.95, 0.72), x), cover(sun, soft))
    clouds = noise(x * 2.4 + 9 * _pick(look, 3), y * 7, look.seed) + 0.5 * noise(x * 6, y * 14, look.seed)
    image = over(image, rgb("ffffff", x), ramp(clouds, 0.85, 1.05) * cover(y - horizon + 0.15, 0.3) * 0.9)
    wave = 0.5 + 0.5 * torch.sin(y * 70 + 2 * torch.sin(x * 5 + look.seed % 11))
    sea = _fade(wave, rgb((0.10, 0.48, 0.66), x), rgb((0.18, 0.60, 0.76), x))
    image = over(image, sea, cover(horizon - y, soft))
    shore = horizon + 0.34 + 0.05 * torch.sin(x * 3 + look.seed % 7) - y
    image = over(image, rgb((0.95, 0.97, 0.95), x), cover(shore - 0.03, soft))
    return over(image, rgb((0.90, 0.80, 0.60), x), cover(shore, soft))


def _forge(x: Tensor, y: Tensor, look: Look, soft: float) -> Tensor:
    row = (y * 5).floor()
    place = x * 3 + 0.5 * row
    column = place.floor()
    joint = torch.minimum(0.5 - (place - column - 0.5).abs(), 0.3 - 0.6 * (y * 5 - row - 0.5).abs())
    image = rgb((0.40, 0.25, 0.20), x) * (0.75 + 0.4 * chance(column, row, look.seed))
    image = over(image, rgb((0.16, 0.11, 0.10), x), cover(joint - 0.045, soft + 0.03))
    side = 1 if _pick(look, 1) > 0.5 else -1
    u, v = x - side * 0.68, y - 0.15
    arch = torch.where(v < 0, ellipse(u, v, 0.30, 0.36), box(u, v - 0.4, 0.30, 0.45))
    image = over(image, rgb((0.24, 0.20, 0.20), x), cover(arch - 0.07, soft))
    image = over(image, rgb((0.12, 0.05, 0.04), x), cover(arch, soft))
    flames = noise(u * 7 + 20, v * 4, look.seed) * 0.5 + 0.5
    fire = _fade(ramp(v, -0.35, 0.40), rgb((0.85, 0.30, 0.06), x), rgb((1.0, 0.85, 0.35), x))
    image = over(image, fire, cover(arch + 0.02, soft) * ramp(v + 0.5 - 0.75 * (1 - flames), 0.0, 0.15))
    image = (image + torch.exp(-2.2 * torch.hypot(u, v)) * rgb((0.55, 0.24, 0.06), x)).clamp(0, 1)
    tools = union(
        box(x + side * 0.55, y + 0.35, 0.015, 0.30),
        box(x + side * 0.72, y + 0.42, 0.015, 0.26),
        box(x + side * 0.55, y + 0.10, 0.08, 0.05),
    )
    return over(image, rgb((0.12, 0.12, 0.14), x), cover(tools, soft))


_PAINTERS = {
    "studio": _studio,
    "office": _office,
    "forest": _forest,
    "city": _city,
    "beach": _beach,
    "forge": _forge,
}
