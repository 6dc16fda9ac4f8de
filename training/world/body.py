"""What stands still while the head moves: shoulders, clothes, neck, and things beside the face."""

import torch
from torch import Tensor

from training.world.brush import Brush, rgb
from training.world.shapes import box, common, ellipse, noise, ramp, stroke, turn, union

WOOD, CLAY, LEAF = "734a29", "b86b4c", "387a38"
_SHOULDERS = {"portrait": 1.28, "anime": 1.14, "game": 1.50}
_NECK = {"portrait": 0.36, "anime": 0.31, "game": 0.46}


def body(image: Tensor, brush: Brush) -> Tensor:
    look, u, v = brush.look, brush.u, brush.v
    wide = _SHOULDERS[look.kind]
    torso = union(box(u, v - 2.05, wide, 0.86, 0.52), stroke(u.abs(), v, (0.0, 1.26), (wide * 0.55, 1.42), 0.17))
    lean = (u * (0.7 / wide), (v - 2.2).clamp(-0.8, 0.8) * 0.45)
    cloth = brush.colour("cloth")
    if look.kind != "anime":
        cloth = cloth * (1 + 0.25 * (noise(u * 5, v * 3, look.seed) - 0.5))
    image = brush.fill(image, torso, cloth, lean)
    image = _CLOTHES[look.clothes](image, brush, torso, lean)
    neck_width = _NECK[look.kind]
    neck = union(box(u, v - 0.95, neck_width, 0.42, 0.10), ellipse(u, v - 1.24, neck_width * 1.18, 0.20))
    shadow = 0.92 - 0.28 * ramp(v, 1.35, 0.85)
    return brush.fill(image, neck, brush.colour("skin") * shadow, (u * (0.75 / neck_width), 0.0))


def _shirt(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    image = brush.fill(image, common(ellipse(u, v - 1.22, 0.46, 0.30), torso), brush.colour("cloth") * 0.55, lean)
    buttons = ellipse(u, (v - 1.7) % 0.26 - 0.13, 0.03, 0.03)
    placket = common(union(u.abs() - 0.012, buttons), 1.55 - v, torso)
    return brush.flat(image, placket, brush.colour("cloth") * 0.45)


def _suit(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    opening = u.abs() - (1.95 - v) * 0.52
    image = brush.fill(image, common(opening, 1.15 - v, torso), rgb("ebebeb", u), lean, outline=0.6)
    tie = common(u.abs() - 0.085 - 0.05 * ramp(v, 1.5, 2.1), 1.32 - v, torso)
    image = brush.fill(image, tie, brush.colour("trim"), (u * 4, 0.0), outline=0.5)
    lapel = common((opening - 0.20).abs() - 0.012, torso, 1.3 - v)
    return brush.flat(image, lapel, brush.colour("cloth") * 0.45)


def _hoodie(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    cloth = brush.colour("cloth")
    image = brush.fill(image, common(ellipse(u, v - 1.22, 0.46, 0.40), torso), cloth * 0.55, lean)
    cords = stroke(u.abs(), v, (0.16, 1.45), (0.20, 1.95), 0.022)
    image = brush.fill(image, cords, brush.colour("trim") * 0.4 + 0.5, outline=0.5)
    hood = common(ellipse(u, v - 1.28, 0.70, 0.42).abs() - 0.10, 1.2 - v)
    return brush.fill(image, hood, cloth * 0.85, (u, (v - 1.3).clamp(-0.6, 0.6)))


def _sailor(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    image = brush.fill(image, common(u.abs() - 0.80, v - 1.98, torso), brush.colour("trim"), lean)
    ribbon = common(common(u.abs() - 0.70, v - 1.88).abs() - 0.025, torso)
    image = brush.flat(image, ribbon, rgb("f2f2f2", u))
    knot = union(ellipse(u.abs() - 0.16, v - 1.86, 0.16, 0.10), ellipse(u, v - 1.86, 0.07, 0.07))
    return brush.fill(image, knot, brush.colour("cloth") * 0.6 + 0.2)


def _armour(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    steel = brush.colour("trim") * 0.35 + 0.42
    breast = box(u, v - 2.15, 0.78, 0.62, 0.3)
    image = brush.fill(image, breast, steel * 0.9, (u, (v - 2.0) * 0.6))
    image = brush.flat(image, common(u.abs() - 0.02, breast), steel * 0.5)
    pu, pv = u.abs() - 1.14, v - 1.50
    plate = ellipse(pu, pv, 0.46, 0.36)
    image = brush.fill(image, plate, steel, (pu * u.sign() * 1.8, pv * 2.2))
    image = brush.flat(image, (plate + 0.05).abs() - 0.022, brush.colour("trim") * 0.6 + 0.25)
    rivets = union(ellipse(pu + 0.22, pv + 0.02, 0.04, 0.04), ellipse(pu - 0.18, pv + 0.08, 0.04, 0.04))
    return brush.fill(image, rivets, steel * 1.3, outline=0.6)


def _apron(image: Tensor, brush: Brush, torso: Tensor, lean: tuple) -> Tensor:
    u, v = brush.u, brush.v
    image = _shirt(image, brush, torso, lean)
    leather = brush.colour("trim") * 0.3 + rgb((0.30, 0.19, 0.11), u)
    bib, strap = box(u, v - 2.2, 0.62, 0.62, 0.08), stroke(u.abs(), v, (0.52, 1.66), (0.66, 1.2), 0.075)
    image = brush.fill(image, common(union(bib, strap), torso), leather, lean)
    return brush.fill(image, ellipse(u.abs() - 0.52, v - 1.68, 0.05, 0.05), leather * 0.2 + 0.6, outline=0.5)


_CLOTHES = {
    "shirt": _shirt,
    "suit": _suit,
    "hoodie": _hoodie,
    "sailor": _sailor,
    "armour": _armour,
    "apron": _apron,
}


def behind(image: Tensor, brush: Brush) -> Tensor:
    """A staff or a plant, farther away than the shoulders."""
    look, v = brush.look, brush.v
    side = 1 if look.seed % 2 else -1
    w = brush.u * side
    wood = rgb(WOOD, v)
    if look.prop == "staff":
        image = brush.fill(image, stroke(w, v, (1.36, 2.6), (1.22, -0.75), 0.055), wood)
        glow, ou, ov = brush.colour("trim") * 0.5 + 0.45, w - 1.21, v + 0.95
        image = image + (glow - image) * torch.exp(-(ou**2 + ov**2) * 4) * 0.55
        image = brush.fill(image, ellipse(ou, ov, 0.24, 0.24), glow, (ou * side * 3, ov * 3))
    if look.prop == "plant":
        for lean, high in ((-0.20, 0.55), (0.05, 0.75), (0.28, 0.5)):
            leaf = ellipse(w - 1.35 - lean, v - 1.0 + high * 0.5, 0.11, high * 0.55)
            image = brush.fill(image, leaf, rgb(LEAF, v) * (1 + lean), ((w - 1.35 - lean) * side * 3, 0.0))
        pot = box(w - 1.35, v - 1.25, 0.26 - 0.05 * (v - 1.25), 0.25, 0.03)
        image = brush.fill(image, pot, rgb(CLAY, v), ((w - 1.35) * side * 3, 0.0))
    return image


def held(image: Tensor, brush: Brush) -> Tensor:
    """A hammer, a shield or a mug, in front of everything."""
    look, v = brush.look, brush.v
    side = 1 if look.seed % 2 else -1
    w = brush.u * side
    steel, wood, trim = brush.colour("trim") * 0.15 + 0.50, rgb(WOOD, v), brush.colour("trim")
    if look.prop == "hammer":
        hu, hv = turn(w - 1.22, v - 0.95, -0.22)
        image = brush.fill(image, box(hu, hv - 0.35, 0.065, 0.95, 0.03), wood, (hu * side * 8, 0.0))
        image = brush.fill(image, box(hu, hv + 0.60, 0.36, 0.21, 0.05), steel, (hu * side * 0.8, (hv + 0.6) * 3))
        image = brush.fill(image, box(hu, hv + 0.60, 0.10, 0.24, 0.02), steel * 0.6)
        fist = ellipse(hu, hv - 0.62, 0.20, 0.18)
        image = brush.fill(image, fist, brush.colour("skin") * 0.95, (hu * side * 3, (hv - 0.62) * 3))
    if look.prop == "shield":
        su, sv = w - 1.02, v - 1.80
        shield = torch.where(sv < 0, box(su, sv, 0.56, 0.55, 0.12), ellipse(su, sv, 0.56, 0.85))
        image = brush.fill(image, shield, trim * 0.75 + 0.1, (su * side, (sv * 0.8).clamp(-0.6, 0.6)))
        image = brush.fill(image, (shield + 0.06).abs() - 0.04, steel, outline=0.0)
        cross = common(union(su.abs() - 0.06, (sv + 0.05).abs() - 0.06), shield + 0.12)
        image = brush.fill(image, cross, steel * 1.2, outline=0.0)
    if look.prop == "mug":
        mu, mv = w - 1.15, v - 1.75
        image = brush.fill(image, ellipse(mu - 0.24, mv, 0.17, 0.17).abs() - 0.04, trim)
        image = brush.fill(image, box(mu, mv, 0.24, 0.27, 0.05), trim, (mu * side * 3, 0.0))
        image = brush.fill(image, ellipse(mu, mv + 0.25, 0.22, 0.05), wood * 0.5, outline=0.5)
    return image
