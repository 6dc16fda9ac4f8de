"""Hair behind and in front of the head, and what is worn on it."""

import torch
from torch import Tensor

from training.world.brush import Brush, rgb
from training.world.head import skull
from training.world.pose import Pose
from training.world.shapes import box, common, cover, ellipse, ramp, spot, strands, union, zigzag

GOLD, BONE, EAR = "edb840", "e6dbbd", "f2adb3"


def _colour(brush: Brush, u: Tensor, v: Tensor) -> Tensor:
    """Strands and shine; drawings have a jagged ring of light instead."""
    hair = brush.colour("hair")
    if brush.look.kind == "anime":
        shine = spot(0 * u, v + 0.62 + 0.12 * zigzag(u * 5), 1.0, 0.07) * cover(u.abs() - 0.6, 0.4) * 0.40
    else:
        shine = spot(u + 0.25, v + 0.75, 0.55, 0.22) * 0.18
        hair = hair * (1 + 0.11 * strands(u, v, brush.look.seed))
    return hair + shine * (0.35 + 0.65 * brush.colour("hair"))


def hair_behind(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u - 0.04 * pose.yaw, brush.v
    wave = 0.03 * torch.sin(v * 9 + look.seed % 7)
    wide = look.width + 0.21
    lean = (u * 0.45, (v - 0.2) * 0.2)
    top = ellipse(u, v + 0.1, wide, 1.08)
    if look.hair_style == "bob":
        shape = torch.where(v < -0.1, top, box(u + wave, v - 0.25, wide, 0.55, 0.2))
    elif look.hair_style == "long":
        shape = torch.where(v < -0.1, top, box(u + wave, v - 0.9, wide + 0.08 * v, 1.3, 0.3))
    elif look.hair_style == "tails":
        tail = ellipse(u.abs() - look.width - 0.34, v - 0.35, 0.26, 0.95)
        shape = union(tail, ellipse(u.abs() - look.width - 0.12, v + 0.42, 0.16, 0.16))
    elif look.hair_style == "bun":
        shape, lean = ellipse(u, v + 1.18, 0.36, 0.32), (u * 2, (v + 1.18) * 2)
    elif look.hair_style == "spikes":
        star = 0.30 * zigzag(torch.atan2(u, -v) * 2.1 + look.parting) * cover(v - 0.5, 0.3)
        shape = torch.hypot(u, v + 0.08) - 1.02 - star
    else:
        return image
    return brush.fill(image, shape, _colour(brush, u, v + 0.5) * 0.72, lean)


def hair_in_front(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u + 0.03 * pose.yaw, brush.v
    if look.hair_style == "bald":
        return image
    drawn = look.kind == "anime"
    cap, nx, ny = skull(brush, v + 0.05, pose.open)
    parted = u - look.parting * 0.5
    if drawn:
        line = -0.36 + look.fringe * (zigzag(parted * look.fringe_count) - 0.35)
    else:
        soft = 0.5 - 0.5 * torch.cos(parted * look.fringe_count * 6.283)
        line = -0.64 + look.fringe * (soft - 0.35) + 0.16 * ramp(parted.abs(), 0.0, 0.55)
    line = line + 0.38 * (u.abs() / look.width) ** 4
    front = common(cap - (0.15 if drawn else 0.10), (v - line) * 0.75)
    if drawn and look.hair_style in ("bob", "long", "tails"):  # locks beside the face
        length = {"bob": 0.75, "long": 1.30, "tails": 0.60}[look.hair_style]
        taper = 0.19 * (1 - ((v + 0.1) / length).clamp(0, 1) ** 3)
        edge = u.abs() - look.width - 0.02 + 0.06 * torch.sin(v * 3.0)
        front = union(front, common(edge.abs() - taper, (v - (length - 0.5) / 2).abs() - (length + 0.3) / 2))
    return brush.fill(image, front, _colour(brush, u, v), (nx * 0.65, ny * 0.7))


def worn(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    return _WORN[brush.look.worn](image, brush, pose) if brush.look.worn else image


def _band(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    top, nx, ny = skull(brush, v + 0.06, pose.open)
    raised = 0.04 if look.hair_style == "bald" else 0.16
    band = common((v + 0.60 + 0.12 * (u / look.width) ** 2).abs() - 0.055, top - raised)
    return brush.fill(image, band, brush.colour("trim") * 0.8 + 0.15, (nx * 0.6, ny * 0.2))


def _ribbon(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    image = _band(image, brush, pose)
    u, v = brush.u - 0.57, brush.v + 0.80
    bow = union(ellipse(u + 0.15, v + 0.06, 0.20, 0.14), ellipse(u - 0.15, v - 0.08, 0.20, 0.14))
    return brush.fill(image, bow, brush.colour("trim") * 0.8 + 0.15, (u * 1.5, v * 1.5))


def _headphones(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    top, nx, ny = skull(brush, v + 0.06, pose.open)
    arc = common((top - 0.20).abs() - 0.045, v + 0.05)
    image = brush.fill(image, arc, brush.colour("trim") * 0.5 + 0.1, (nx * 0.5, ny * 0.5))
    cu, cv = u.abs() - look.width - 0.14, v - 0.10
    return brush.fill(image, box(cu, cv, 0.13, 0.26, 0.11), brush.colour("trim"), (cu * u.sign() * 3, cv * 2))


def _cat_ears(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    u, v = brush.u.abs() - 0.52, brush.v + 1.12
    ear = common(u.abs() * 1.25 - v * 0.62 - 0.22, v - 0.22)
    image = brush.fill(image, ear, brush.colour("hair"), (u * 0.5, v))
    return brush.fill(image, ear + 0.085, rgb(EAR, u), outline=0.0)


def _helmet(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    top, nx, ny = skull(brush, v + 0.06, pose.open)
    steel, trim = brush.colour("trim") * 0.30 + 0.45, brush.colour("trim") * 0.6 + 0.2
    hu, hv = u.abs() - look.width - 0.12, v + 0.72
    horn = common(ellipse(hu - 0.02, hv + 0.18, 0.34, 0.46), -ellipse(hu + 0.14, hv + 0.34, 0.34, 0.46))
    image = brush.fill(image, horn, rgb(BONE, u), (hu * u.sign() * 2, hv))
    edge = v + 0.52 - 0.10 * u * u
    image = brush.fill(image, common(top - 0.17, edge), steel, (nx * 0.95, ny * 0.95))
    image = brush.fill(image, common(edge.abs() - 0.075, top - 0.20), trim, (nx * 0.9, 0.0))
    return brush.fill(image, box(u - 0.1 * pose.yaw, v + 0.38, 0.065, 0.24, 0.05), steel * 0.95)


def _crown(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    round_ = 0.10 * u * u
    points = -(v + 1.02 + 0.20 * zigzag(u * 2.2 + 0.5) - round_)
    crown = common(v + 0.78 - round_, points, u.abs() - look.width * 0.80)
    image = brush.fill(image, crown, rgb(GOLD, u), (u * 0.9, 0.0))
    gem = ellipse(u, v + 0.90, 0.07, 0.07)
    return brush.fill(image, gem, brush.colour("trim") * 0.6 + 0.2, (u * 8, (v + 0.9) * 8), outline=0.5)


def _hood(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    top, nx, ny = skull(brush, v + 0.06, pose.open * 0)
    side = common(u.abs() - look.width - 0.30 - 0.16 * v, v - 1.35)
    outer = torch.where(v < 0, top - 0.30, side)
    face = ellipse(u, v - 0.12, look.width * 0.99, 1.02)
    return brush.fill(image, common(outer, -face), brush.colour("cloth") * 0.8, (nx * 0.5, ny * 0.4))


def _cap(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    top, nx, ny = skull(brush, v + 0.06, pose.open)
    image = brush.fill(image, common(top - 0.15, v + 0.52 + 0.06 * u * u), brush.colour("trim"), (nx * 0.8, ny * 0.7))
    peak = common(ellipse(u - 0.10 * pose.yaw, v + 0.50, look.width * 0.86, 0.17), -(v + 0.56))
    return brush.fill(image, peak, brush.colour("trim") * 0.7, (u * 0.4, (v + 0.5) * 1.5))


_WORN = {
    "band": _band,
    "ribbon": _ribbon,
    "headphones": _headphones,
    "cat ears": _cat_ears,
    "horned helmet": _helmet,
    "crown": _crown,
    "hood": _hood,
    "cap": _cap,
}
