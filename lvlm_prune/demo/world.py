"""The world: scenes of coloured shapes and a written number on a 3 x 3 grid, drawn with Pillow.

    144 x 144 pixels = 12 x 12 patches of 12 pixels = 3 x 3 cells of 48 pixels

    +-----------+-----------+-----------+
    | top left  |    top    | top right |      at most four things and one number, each in a cell of its own;
    +-----------+-----------+-----------+      the digits of the number lie on the patch grid, one per patch
    |   left    |  center   |   right   |
    +-----------+-----------+-----------+
    |bottom left|  bottom   |bottom right
    +-----------+-----------+-----------+

A scene is a function of (split, seed, index); scenes of different splits never have the same layout (`splits`).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvlm_prune.demo.splits import Split, random_for, split_of

IMAGE_SIZE = 144
PATCH_SIZE = 12
PATCHES = IMAGE_SIZE // PATCH_SIZE
CELL_SIZE = IMAGE_SIZE // 3

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "silver": (200, 200, 205),
    "gray": (120, 120, 125),
    "black": (40, 40, 45),
    "pale": (225, 235, 215),
    "dark": (60, 70, 60),
}
PLACES: tuple[str, ...] = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)

#: Range of the radius in pixels.
RADII: dict[str, tuple[float, float]] = {"small": (7.0, 8.5), "large": (10.5, 12.0)}

# Standard deviation 8 of 255, as a table: 256 quantiles looked up by random bytes.
_NOISE = np.array([round(8 * NormalDist().inv_cdf((byte + 0.5) / 256)) for byte in range(256)], dtype=np.int16)


@dataclass(frozen=True)
class Thing:
    """A coloured shape in one of the nine cells (row-major, 0 to 8)."""

    color: str
    shape: str
    size: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What an image shows. ``number`` (10 to 99) is None where nothing is written."""

    things: tuple[Thing, ...]
    background: str
    number: int | None = None
    number_cell: int | None = None

    @property
    def key(self) -> str:
        """Layout of the scene in words; its hash decides the split."""
        things = sorted(f"{thing.size} {thing.color} {thing.shape} {thing.cell}" for thing in self.things)
        return "; ".join([*things, f"{self.number} {self.number_cell}"])


def random_scene(rng: Random) -> Scene:
    """A scene of one to four things, with a number in two of three cases."""
    cells = rng.sample(range(9), 5)
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    colors = [rng.choice(list(COLORS)) for _ in range(count)]
    kind = rng.random()  # some scenes repeat a shape or a color, otherwise counting would nearly always be "one"
    if kind < 0.2:
        shapes = [shapes[0]] * count
    elif kind < 0.4:
        colors = [colors[0]] * count
    things = tuple(
        Thing(color, shape, rng.choice(("small", "large")), cell) for color, shape, cell in zip(colors, shapes, cells)
    )
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() < 0.65:
        return Scene(things, background, number=rng.randint(10, 99), number_cell=cells[count])
    return Scene(things, background)


def scene(split: Split, seed: int, index: int) -> Scene:
    """The scene of (split, seed, index): the first random one whose layout belongs to the split.

    Example:
        >>> [thing.name for thing in scene("test", 0, 0).things]
        ['yellow triangle']
    """
    rng = random_for("scene", split, seed, index)
    while True:
        candidate = random_scene(rng)
        if split_of(candidate.key) == split:
            return candidate


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(15)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, int, int]
) -> None:
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.88
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "triangle":
        bottom = y + radius * 0.8
        canvas.polygon([(x, y - radius), (x + radius, bottom), (x - radius, bottom)], fill=fill)
    elif shape == "diamond":
        half = radius * 0.8
        canvas.polygon([(x, y - radius), (x + half, y), (x, y + radius), (x - half, y)], fill=fill)
    elif shape == "cross":
        arm = radius * 0.36
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        corners = []
        for corner in range(10):
            angle = -math.pi / 2 + corner * math.pi / 5
            length = radius if corner % 2 == 0 else radius * 0.42
            corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        canvas.polygon(corners, fill=fill)


def draw(scene: Scene, rng: Random) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene; positions, radii, shades and noise come from ``rng``.

    Returns:
        The RGB image of 144 x 144 pixels, and int64 labels of its patches, shape (3, 12, 12): shape (0 is none, else
        1 + index into ``SHAPES``), color (likewise), digit (0 is none, 1 to 10 a tens digit, 11 to 20 a ones digit).
        The labels supervise the vision tower in training and are used nowhere else.
    """
    background = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), background)
    canvas = ImageDraw.Draw(image)
    labels = np.zeros((3, PATCHES, PATCHES), dtype=np.int64)
    for thing in scene.things:
        radius = rng.uniform(*RADII[thing.size])
        # centers lie near corners of the patch grid: each patch then sees a typical part of the shape
        shift = PATCH_SIZE if thing.size == "small" else 0
        x = (thing.cell % 3 + 0.5) * CELL_SIZE + rng.choice((-shift, 0, shift)) + rng.uniform(-1, 1)
        y = (thing.cell // 3 + 0.5) * CELL_SIZE + rng.choice((-shift, 0, shift)) + rng.uniform(-1, 1)
        red, green, blue = (min(255, max(0, level + rng.randint(-16, 16))) for level in COLORS[thing.color])
        _draw_shape(canvas, thing.shape, x, y, radius, (red, green, blue))
        left, right, top, bottom = (
            int(edge // PATCH_SIZE) for edge in (x - 0.8 * radius, x + 0.8 * radius, y - 0.8 * radius, y + 0.8 * radius)
        )
        labels[0, top : bottom + 1, left : right + 1] = 1 + SHAPES.index(thing.shape)
        labels[1, top : bottom + 1, left : right + 1] = 1 + list(COLORS).index(thing.color)
    if scene.number is not None and scene.number_cell is not None:
        ink = (10, 10, 10) if sum(background) > 330 else (250, 250, 250)
        column = 4 * (scene.number_cell % 3) + 1
        row = 4 * (scene.number_cell // 3) + rng.randint(1, 2)
        shift_x, shift_y = rng.uniform(-0.5, 1.5), rng.uniform(-1, 1)
        for place, digit in enumerate(str(scene.number)):
            corner = ((column + place) * PATCH_SIZE + shift_x, (row + 1) * PATCH_SIZE - 1 + shift_y)
            canvas.text(corner, digit, font=_font(), fill=ink, anchor="ls")
            labels[2, row, column + place] = 1 + int(digit) + 10 * place
    noise = _NOISE[np.frombuffer(rng.randbytes(IMAGE_SIZE * IMAGE_SIZE), dtype=np.uint8)]
    pixels = np.asarray(image, dtype=np.int16) + noise.reshape(IMAGE_SIZE, IMAGE_SIZE, 1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), labels


def draw_indexed(split: Split, seed: int, index: int) -> tuple[Scene, Image.Image, np.ndarray]:
    """Scene, image and patch labels of (split, seed, index); see :func:`draw`."""
    described = scene(split, seed, index)
    image, labels = draw(described, random_for("drawing", split, seed, index))
    return described, image, labels
