"""A second embedded stream, of what took no part in any choice; nothing is downloaded.

Settings of learners are chosen on the packaged stream. Here they meet other domains, drawn from
seeds that the packaged stream does not use, or cut from other pictures of scikit-image, with
splits of the same sizes. The embedded CLIP has seen none of these pictures. Of `numerals`,
`fabrics`, `minuscules`, `figures` and `grounds` it knows some in another form, such as handwritten
digits; of `arrows`, `clocks` and `pictures` hardly anything.
"""

import numpy as np
from PIL import Image, ImageDraw

from vlm_prune.continual.streams import drawing, patterns
from vlm_prune.continual.streams.base import StreamTask
from vlm_prune.continual.streams.drawing import Style
from vlm_prune.continual.streams.packaged import DIGITS, Domain, by_seed, cropped, drawn_task
from vlm_prune.continual.streams.patterns import SIDE, SUPERSAMPLE
from vlm_prune.vlm.common.registry import Registry

HOURS = (*DIGITS[1:], "ten", "eleven", "twelve")
DIRECTIONS = (
    "right", "down right", "down", "down left", "left", "up left", "up", "up right",
)  # fmt: skip
FIGURES = tuple(
    f"{color} {shape}" for color in tuple(drawing.COLORS)[:4] for shape in patterns.SHAPES[6:9]
)
PICTURES = {
    "cameraman": "camera.png",
    "rocket": "rocket.jpg",
    "page": "page.png",
    "handwriting": "text.png",
    "color wheel": "color.png",
    "horse": "horse.png",
    "chessboard": "chessboard_RGB.png",
    "cell": "cell.png",
}
FABRICS: dict[str, patterns.Tone] = {
    **{name: patterns.TEXTURES[name] for name in tuple(patterns.TEXTURES)[:6]},
    "rays": lambda y, x, p, _: (_angle(y, x) * np.round(40 / p) % 1 < 0.5) * 1.0,
    "spiral": lambda y, x, p, _: ((_radius(y, x) / p + _angle(y, x)) % 1 < 0.5) * 1.0,
    "plaid": lambda y, x, p, _: ((y % p < p / 2) * 1.0 + (x % p < p / 2)) / 2,
    "crosses": lambda y, x, p, _: _crosses(y % p / p - 0.5, x % p / p - 0.5),
}


def redrawn() -> tuple[StreamTask, ...]:
    """Returns the eight tasks in the stream's order."""
    return tuple(drawn_task(domain) for domain in REDRAWN.values())


def numeral(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a printed digit of 8 x 8 pixels, enlarged.

    Args:
        name: of the digit, in English.
        rng: draws face, place, size and colors.
        style: plain or varied.
    """
    faces = drawing.FACES[style]
    font = drawing.font(faces[int(rng.integers(len(faces)))], 64)
    digit = str(DIGITS.index(name))
    left, top, right, bottom = font.getbbox(digit)
    canvas = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), digit, 255, font)
    pixels = np.asarray(canvas.resize((8, 8), Image.Resampling.BOX), np.float64) * (16 / 255)
    return drawing.digit_image(pixels, rng, style)


def minuscule(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a printed small letter.

    Args:
        name: the capital.
        rng: draws face, place, size and colors.
        style: plain or varied.
    """
    return drawing.printed(name.lower(), drawing.FACES[style], 0.6, 0.9, rng, style)


def ground(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a shape, whichever, on paper in a color.

    Args:
        name: of the color.
        rng: draws shape, place, size, angle and tones.
        style: plain or varied.
    """
    shape = patterns.SHAPES[int(rng.integers(len(patterns.SHAPES)))]
    mask = patterns.shape_mask(shape, round(SIDE * SUPERSAMPLE * rng.uniform(0.4, 0.6)), False)
    if style == "varied":
        mask = mask.rotate(float(rng.uniform(-180, 180)), Image.Resampling.BILINEAR)
    paper = np.array(drawing.COLORS[name]) + rng.normal(0, 12, 3)
    return drawing.on_paper(mask, rng, style, paper=paper)


def figure(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a shape in a color, such as `red ring`; varied ones are turned by up to 20 degrees.

    Args:
        name: color and shape.
        rng: draws place, size, angle and tones.
        style: plain or varied.
    """
    color, shape = name.split(" ")
    ink = np.array(drawing.COLORS[color]) + rng.normal(0, 12, 3)
    mask = patterns.shape_mask(shape, round(SIDE * SUPERSAMPLE * rng.uniform(0.5, 0.75)), False)
    if style == "varied":
        mask = mask.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)
    return drawing.on_paper(mask, rng, style, ink)


def arrow(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns an arrow, filled or outlined; varied ones are up to 12 degrees off their direction.

    Args:
        name: of the direction.
        rng: draws place, size, angle and colors.
        style: plain or varied.
    """
    outline = style == "varied" and rng.random() < 0.5
    mask = patterns.shape_mask("arrow", round(SIDE * SUPERSAMPLE * rng.uniform(0.5, 0.8)), outline)
    turn = -45.0 * DIRECTIONS.index(name)
    turn += rng.uniform(-12, 12) if style == "varied" else 0
    return drawing.on_paper(mask.rotate(turn, Image.Resampling.BILINEAR), rng, style)


def clock_face(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a clock at a full hour; varied ones are turned by up to 8 degrees.

    Args:
        name: of the hour.
        rng: draws place, size, angle and colors.
        style: plain or varied.
    """
    side = SIDE * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    radius = side * rng.uniform(0.36, 0.46)
    width = round(radius * rng.uniform(0.07, 0.13))

    def line(hour: int, start: float, end: float, thick: int) -> None:
        turn = 2 * np.pi * hour / 12
        across, up = float(np.sin(turn)), float(np.cos(turn))
        ends = [(side / 2 + across * r * radius, side / 2 - up * r * radius) for r in (start, end)]
        draw.line(ends, 255, thick)

    box = (side / 2 - radius, side / 2 - radius, side / 2 + radius, side / 2 + radius)
    draw.ellipse(box, None, 255, width)
    for hour in range(12):
        line(hour, 0.85, 1, width)
    line(HOURS.index(name) + 1, -0.1, 0.5, 2 * width)
    line(0, -0.1, 0.8, width)
    if style == "varied":
        canvas = canvas.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
    return drawing.on_paper(canvas, rng, style)


def fabric(name: str, rng: np.random.Generator, style: Style) -> Image.Image:
    """Returns a pattern of two colors.

    Args:
        name: of the pattern.
        rng: draws colors, phase and scale.
        style: plain or varied, which is turned by up to 25 degrees and warped.
    """
    return drawing.pattern(FABRICS[name], rng, style, colored=True)


def _radius(y: patterns.Pattern, x: patterns.Pattern) -> patterns.Pattern:
    """Returns the distance from the center."""
    radius: patterns.Pattern = np.hypot(y - y.mean(), x - x.mean())
    return radius


def _angle(y: patterns.Pattern, x: patterns.Pattern) -> patterns.Pattern:
    """Returns the angle around the center in turns, from -0.5 to 0.5."""
    angle: patterns.Pattern = np.arctan2(y - y.mean(), x - x.mean()) / (2 * np.pi)
    return angle


def _crosses(y: patterns.Pattern, x: patterns.Pattern) -> patterns.Pattern:
    """Returns a cross in each cell, whose rows and columns go from -0.5 to 0.5."""
    near, far = np.minimum(abs(y), abs(x)), np.maximum(abs(y), abs(x))
    return ((near < 0.1) & (far < 0.4)) * 1.0


REDRAWN: Registry[Domain] = Registry(
    "domain",
    {
        domain.name: domain
        for domain in (
            Domain(
                9, "arrows", DIRECTIONS, (),
                ("an arrow that points {}.", "the direction {}."), by_seed(arrow),
            ),
            Domain(
                10, "numerals", DIGITS, (),
                ("the digit {}.", "a printed {}."), by_seed(numeral),
            ),
            Domain(
                11, "fabrics", tuple(FABRICS), (),
                ("a pattern of {}.", "a fabric with {}."), by_seed(fabric),
            ),
            Domain(
                12, "clocks", HOURS, (),
                ("a clock at {}.", "the time is {}."), by_seed(clock_face),
            ),
            Domain(
                13, "minuscules", tuple("CKMNOPSUVXYZ"), (),
                ("the letter {}.", "a printed small {}."), by_seed(minuscule),
            ),
            Domain(
                14, "pictures", tuple(PICTURES), (),
                ("a photo of {}.", "a close-up photo of {}."), cropped(PICTURES, 100),
            ),
            Domain(
                15, "figures", FIGURES, (),
                ("a picture of a {}.", "a drawing of a {}."), by_seed(figure),
            ),
            Domain(
                16, "grounds", tuple(drawing.COLORS), (),
                ("a {} surface.", "a {} background."), by_seed(ground),
            ),
        )
    },
)  # fmt: skip
