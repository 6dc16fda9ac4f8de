"""Skull, eyes, nose, beard and mouth. Three classes share one anatomy, so that the truth is known for all of them."""

import torch
from torch import Tensor

from training.world.brush import Brush, rgb
from training.world.pose import MOUTH_PLACE, Pose
from training.world.shapes import box, common, cover, ellipse, over, ramp, spot, strands, stroke, turn, union

HEIGHT = 1.02  # half height of a head in units of its size


def skull(brush: Brush, v: Tensor, opening: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the head's outline, and how it leans. An opening mouth lowers the chin."""
    look, u = brush.look, brush.u
    v = v / (1 + 0.07 * opening * ramp(v, 0.0, 0.8))
    p, q = u / (look.width * (1 - look.jaw * ramp(v, 0.10, 1.10))), v / HEIGHT
    power = 2.5 if look.kind == "game" else 2.0
    level = (p.abs().clamp(min=1e-4) ** power + q.abs().clamp(min=1e-4) ** power) ** (1 / power)
    return (level - 1) * look.width, p, q


def head(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    skin = brush.colour("skin")
    outside = u.abs() - look.width
    ears = ellipse(outside - 0.01, v - 0.10, 0.12, 0.22)
    if look.pointed_ears:
        thin = 0.07 - 0.05 * (outside / 0.4).clamp(0, 1)
        ears = union(ears, stroke(u.abs(), v, (look.width, 0.14), (look.width + 0.40, -0.22), thin))
    if look.pointed_ears or look.hair_style not in ("bob", "long"):
        image = brush.fill(image, ears, skin * 0.94, (outside * u.sign() * 3, (v - 0.1) * 2))

    outline, nx, ny = skull(brush, v, pose.open)
    drawn = look.kind == "anime"
    cheek = spot(u.abs() - 0.46, v - 0.30, 0.22, 0.18)
    flush = skin * rgb((1.0, 0.55, 0.50), u)
    if not drawn:
        socket = spot(u.abs() - look.eye_gap, v + 0.02, 0.24, 0.16)
        chin = spot(u - 0.16 * pose.yaw, v - 0.66, 0.20, 0.07)
        skin = skin * (1 + 0.05 * cheek - 0.11 * socket - 0.10 * chin)
    skin = skin + (flush - skin) * cheek * (0.36 if drawn else 0.16)
    relief = 0.65 if drawn else 0.92
    return brush.fill(image, outline, skin, (nx * relief, ny * relief * 0.88))


def eyes(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look = brush.look
    drawn = look.kind == "anime"
    size, shut = look.eye, pose.blink
    tall = 1.18 if drawn else 0.56
    height = (1 - shut) * size * tall + 0.004
    hair, skin, iris = brush.colour("hair"), brush.colour("skin"), brush.colour("iris")
    ink = hair * (0.15 if drawn else 0.25)
    for side in (-1, 1):
        u = brush.u - side * look.eye_gap - 0.16 * pose.yaw
        # a shut lid lies where the lower lid is
        v = brush.v - 0.02 - 0.10 * pose.pitch - shut * size * tall * 0.45
        if not drawn:
            v = v + 0.05 * size * (side * u / size).clamp(-1, 1)
        a = size * (0.88 if drawn else 1.0)
        white = ellipse(u, v, a, height)
        image = brush.fill(image, white, rgb("f5f5f5", u), (u * 0.6, v * 0.8), outline=0.0)
        image = image * (1 - 0.35 * cover(white, brush.pixel) * ramp(v, -height * 0.2, -height))

        iu = u - 0.03 * pose.yaw
        ia = size * (0.70 if drawn else 0.50)
        ib = ia * (1.42 if drawn else 1.0)
        circle = ellipse(iu, v, ia, ib)
        depth = 1.05 + (0.70 if drawn else 0.15) * (v / ib).clamp(-1, 1)
        image = brush.fill(image, common(circle, white), iris * depth, outline=0.0)
        image = brush.flat(image, common(circle.abs() - size * 0.05, white), iris * 0.35, 1.0 if drawn else 0.7)
        image = brush.flat(image, common(ellipse(iu, v, ia * 0.45, ib * 0.45), white), iris * 0.12)
        spark = ellipse(iu + ia * 0.36, v + ib * 0.40, ia * 0.26, ib * 0.24)
        if drawn:
            spark = union(spark, ellipse(iu - ia * 0.38, v - ib * 0.42, ia * 0.15, ib * 0.13))
        image = brush.flat(image, common(spark, white + 0.01), rgb("ffffff", u))

        upper = cover(v - height * 0.15, size * 0.25)
        lash = ellipse(u, v, a * 1.04, height + size * 0.03).abs() - size * (0.10 if drawn else 0.045)
        image = brush.flat(image, lash, ink, upper)
        image = brush.flat(image, white.abs() - size * 0.02, ink, (1 - upper) * (0.35 + 0.45 * shut))
        if not drawn:
            crease = ellipse(u, v + size * 0.14, a * 1.05, height + size * 0.10).abs() - size * 0.025
            image = brush.flat(image, crease, skin * 0.55, cover(v + height * 0.6, size * 0.2) * 0.5)

        lifted = v + shut * size * tall * 0.45 + size * (tall + (0.37 if drawn else 0.55)) + 0.10 * pose.brow
        bu, bv = turn(u, lifted, side * (look.brow_tilt - 0.10 * pose.brow))
        half = size * 1.15
        thick = look.brow * (1.1 - 0.45 * (side * bu / half).clamp(-1, 1))
        brow = common((bv - 0.8 * bu * bu).abs() - thick, bu.abs() - half)
        image = over(image, hair * 0.55, cover(brow, brush.pixel * 1.6) * (0.72 if drawn else 0.92))
    return image


def nose(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look = brush.look
    u, v = brush.u - 0.22 * pose.yaw, brush.v - 0.24 - 0.13 * pose.pitch
    size, skin = 0.11 * look.nose, brush.colour("skin")
    away = 1 if brush.light.direction[0] > 0 else -1
    p, q = u / size, v / size
    if look.kind == "anime":
        return brush.flat(image, stroke(p * away, q, (-0.05, 0.05), (-0.22, 0.42), 0.10) * size, skin * 0.62)
    if look.kind == "game":
        bulb = union(ellipse(p, q - 0.1, 0.85, 0.72), ellipse(p.abs() - 0.72, q - 0.25, 0.45, 0.42)) * size
        image = brush.fill(image, bulb, skin * rgb((1.0, 0.86, 0.82), u), (p * 0.6, q * 0.7), outline=0.45)
    else:
        lit = 0.07 * spot(p, q + 1.2, 0.32, 2.4) + 0.10 * spot(p - 0.15 * away, q - 0.1, 0.6, 0.5)
        flank = 0.12 * spot(p + away * 0.85, q + 0.9, 0.55, 2.3) + 0.10 * spot(p.abs() - 0.95, q - 0.35, 0.3, 0.5)
        image = image * (1 + lit - flank - 0.24 * spot(p, q - 0.85, 1.1, 0.32))
    return brush.flat(image, ellipse(p.abs() - 0.50, q - 0.62, 0.26, 0.14) * size, skin * 0.42, 0.8)


def beard(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    if not look.beard:
        return image
    outline, nx, ny = skull(brush, v, pose.open)
    long = 0.42 * look.beard if look.kind == "game" else 0.0
    mu, mv = u - 0.16 * pose.yaw, v - MOUTH_PLACE - 0.10 * pose.pitch
    below = union(outline - 0.03, ellipse(u, v - 0.80, 0.62, 0.42 + long))
    gap = ellipse(mu, mv - 0.05 * pose.open - 0.02, look.mouth * 1.12, look.mouth * (0.42 + 0.62 * pose.open))
    whiskers = common(below, 0.46 - v - 0.34 * (u / look.width) ** 2, -gap)
    lip = ellipse(mu.abs() - look.mouth * 0.55, mv + 0.135 - 0.10 * mu.abs(), look.mouth * 0.75, 0.062)
    fibres = strands(u, v, look.seed)
    alpha = 0.85 if look.kind == "portrait" else 1.0
    whiskers = union(whiskers, lip) + 0.012 * fibres
    colour = brush.colour("hair") * (0.92 + 0.16 * fibres)
    return brush.fill(image, whiskers, colour, (nx * 0.7, ny * 0.6), outline=0.7, alpha=alpha, soft=0.02)


def mouth(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look = brush.look
    drawn = look.kind == "anime"
    u = brush.u - 0.16 * pose.yaw
    v = brush.v - MOUTH_PLACE - 0.10 * pose.pitch - 0.05 * pose.open
    half = look.mouth
    a = half * (1 + 0.24 * pose.wide - 0.46 * pose.round + 0.14 * pose.smile)
    b = half * (0.035 + 0.62 * pose.open)
    bend = (0.10 + 0.30 * pose.smile) * half * (1 - pose.round)
    v = v + bend * ((u / a).clamp(-1.3, 1.3) ** 2 - 0.5)
    lip = brush.colour("lip")
    if not drawn:
        plump = half * (0.15 + 0.20 * pose.round) * (0.8 if look.kind == "game" else 1.0)
        bow = 0.25 * plump * (spot(u.abs() - 0.28 * a, 0 * v, 0.22 * a, 1.0) - spot(u, 0 * v, 0.16 * a, 1.0))
        wide = a + plump * 0.55
        lips = torch.where(v < 0, ellipse(u, v + bow, wide, b + plump), ellipse(u, v, wide, b + plump * 1.35))
        shine = 0.22 * spot(u + 0.1 * a, v - b - plump * 0.75, 0.45 * a, plump * 0.5) - 0.16 * cover(v, plump * 0.3)
        image = brush.fill(image, lips, lip * (1 + shine), (u / a * 0.3, 0.0), outline=0.0, soft=0.006)

    inner = ellipse(u, v, a, b)
    shut = ramp(pose.open, 0.10, 0.0)
    dark = rgb((0.26, 0.06, 0.08), u) * (1.5 if drawn else 1.0)
    image = brush.flat(image, inner, dark + (lip * 0.42 - dark) * shut)
    daylight = brush.light.on().clamp(max=1.0)
    teeth = common(inner + 0.012, v + b - 0.42 * b * (1 - 0.7 * pose.round) - 0.010)
    image = brush.flat(image, teeth, rgb("ededed", u) * daylight, ramp(pose.open, 0.10, 0.28) * (1 - 0.8 * pose.round))
    tongue = common(inner + 0.008, ellipse(u, v - b * 0.95, a * 0.68, b * 0.75))
    image = brush.flat(image, tongue, rgb((0.82, 0.36, 0.38), u) * daylight, ramp(pose.open, 0.18, 0.40))
    if drawn:
        image = brush.flat(image, inner.abs() - 0.011 - 0.006 * shut, brush.colour("hair") * 0.12 + lip * 0.18)
    return image


def glasses(image: Tensor, brush: Brush, pose: Pose) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    if not look.glasses:
        return image
    su, sv = u - 0.18 * pose.yaw, v - 0.10 * pose.pitch
    a = look.eye * 1.35
    frame = box(su.abs() - look.eye_gap, sv - 0.03, a, look.eye * (1.35 if look.kind == "anime" else 1.08), 0.09)
    bar = (sv + 0.02).abs() - 0.014
    bridge = common(bar, su.abs() - look.eye_gap + a)
    temples = common(bar, look.eye_gap + a - su.abs(), u.abs() - look.width)
    return brush.flat(image, union(frame.abs() - 0.016, bridge, temples), brush.colour("trim") * 0.25)
