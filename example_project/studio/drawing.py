"""Posters, drawn with Pillow: the same title and style make the same picture.

A sheet is 1200 units wide and 1600 high. Pictures are drawn at twice the requested size
and made smaller, because the edges of Pillow's shapes are not smooth.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 1200, 1600
OVERSAMPLING = 2
MARGIN = 90
TURN = 2 * math.pi


class Sheet:
    """A picture in the making, measured in units of 1/1200 of its width."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        large = (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING)
        self.scale = large[0] / WIDTH
        self.image = Image.new("RGB", large)
        self.pen = ImageDraw.Draw(self.image)

    def fade(self, top: str, bottom: str) -> None:
        """Fill the sheet from one colour at the top to another at the bottom."""
        grey = Image.linear_gradient("L").resize(self.image.size)
        self.image.paste(ImageOps.colorize(grey, top, bottom))

    def box(self, x: float, y: float, width: float, height: float, ink: str) -> None:
        self.pen.rectangle(self._scaled(x, y, x + width, y + height), fill=ink)

    def disc(self, x: float, y: float, radius: float, ink: str) -> None:
        corners = self._scaled(x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse(corners, fill=ink)

    def slice(
        self, x: float, y: float, radius: float, start: float, extent: float, ink: str
    ) -> None:
        """Fill a piece of a disc; angles in degrees, clockwise from the right."""
        corners = self._scaled(x - radius, y - radius, x + radius, y + radius)
        self.pen.pieslice(corners, start, start + extent, fill=ink)

    def below(self, height_at: Callable[[float], float], ink: str) -> None:
        """Fill everything below a curve."""
        points = [(x, height_at(x)) for x in range(0, WIDTH + 1, 6)]
        outline = [*points, (WIDTH, HEIGHT), (0, HEIGHT)]
        self.pen.polygon([self._scaled(*point) for point in outline], fill=ink)

    def letter(self, text: str, x: float, y: float, size: float, ink: str) -> None:
        """Write *text* with its middle at a point."""
        font = _font(round(size * self.scale))
        weight = round(size * self.scale / 36)
        self.pen.text(
            self._scaled(x, y),
            text,
            fill=ink,
            font=font,
            anchor="mm",
            stroke_width=weight,
            stroke_fill=ink,
        )

    def title(
        self, text: str, ink: str, *, top: float | None = None, height: float = 420
    ) -> None:
        """Set the title as large as fits, from *top* down or else from below up."""
        size, lines = _typeset(_drawable(text), WIDTH - 2 * MARGIN, height)
        leading = size * 1.08
        font = _font(round(size * self.scale))
        first = HEIGHT - MARGIN - 60 - leading * len(lines) if top is None else top
        for number, line in enumerate(lines):
            self.pen.text(
                self._scaled(MARGIN, first + number * leading),
                line,
                fill=ink,
                font=font,
                stroke_width=round(size * self.scale / 52),
                stroke_fill=ink,
            )
        self.pen.text(
            self._scaled(MARGIN, HEIGHT - MARGIN),
            "POSTER STUDIO",
            fill=ink,
            font=_font(round(24 * self.scale)),
            anchor="ls",
        )

    def finished(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def _scaled(self, *numbers: float) -> tuple[float, ...]:
        return tuple(number * self.scale for number in numbers)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _drawable(text: str) -> str:
    """Return *text* without the accents, which Pillow's own font does not have."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c))


def _width(text: str, size: float) -> float:
    return _font(100).getlength(text) * size / 100


def _typeset(text: str, width: float, height: float) -> tuple[float, list[str]]:
    """Return the largest size at which *text* fits the room, and its lines."""
    words = text.split()
    for size in range(190, 40, -4):
        lines = _wrapped(words, width, size)
        if len(lines) * size * 1.08 <= height and all(
            _width(line, size) <= width for line in lines
        ):
            return size, lines
    # A word longer than a line: cut it where the line ends.
    size = 60
    lines = [""]
    for character in " ".join(words):
        if _width(lines[-1] + character, size) > width:
            lines.append("")
        lines[-1] += character
    return size, lines


def _wrapped(words: Sequence[str], width: float, size: float) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and _width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _blend(first: str, second: str, share: float) -> str:
    """Return the colour that is *share* of the way from *first* to *second*."""
    mixed = (
        round(
            int(first[i : i + 2], 16) * (1 - share) + int(second[i : i + 2], 16) * share
        )
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _suns(sheet: Sheet, title: str, chance: random.Random, phase: float) -> None:
    sky, glow, sun, sea, paper = chance.choice(
        [
            ("#2b1b4d", "#f2765d", "#ffd27a", "#1d1238", "#fff3e0"),
            ("#0f3b4c", "#f0a35e", "#ffe3a3", "#08242f", "#fdf6e6"),
            ("#5b1f3a", "#f4a08a", "#ffe0b8", "#34101f", "#fff1e6"),
        ]
    )
    sheet.fade(sky, glow)
    x, horizon, rings = chance.choice([440, 600, 760]), 1010, 7
    for ring in range(rings):
        breath = 10 * math.sin(TURN * (phase - ring / rings))
        ink = _blend(_blend(sky, glow, 0.55), sun, (ring + 1) / rings)
        sheet.disc(x, 620, 470 - ring * 58 + breath, ink)
    sheet.box(0, horizon, WIDTH, HEIGHT - horizon, sea)
    for bar in range(9):
        sway = 26 * math.sin(TURN * (phase + bar / 5))
        half = 330 - bar * 30 + chance.randint(-24, 24)
        y = horizon + 14 + bar * 19
        sheet.box(x - half + sway, y, 2 * half, 8, _blend(sun, sea, bar / 10))
    sheet.title(title, paper, height=280)


def _waves(sheet: Sheet, title: str, chance: random.Random, phase: float) -> None:
    top, bottom, far, near, ink = chance.choice(
        [
            ("#f7ead3", "#f4c9a4", "#f08a5d", "#23395b", "#23395b"),
            ("#e6f0ee", "#bfe0dc", "#5fb3b3", "#123c4a", "#123c4a"),
            ("#f6e7ec", "#f3c7cf", "#d96c8a", "#3a1d4f", "#3a1d4f"),
        ]
    )
    sheet.fade(top, bottom)
    sheet.disc(chance.randint(700, 980), 640, 150, _blend(far, top, 0.25))
    layers = 9
    for layer in range(layers):
        periods, start = chance.randint(1, 2), chance.random()
        height = 34 + 5 * layer
        # A whole number of periods a loop, so that its end meets its beginning.
        drift = phase * chance.choice([-1, 1])
        sheet.below(
            lambda x, y=690 + layer * 92, tall=height, n=periods, s=start, d=drift: (
                y
                + tall * math.sin(TURN * (n * x / WIDTH + s + d))
                + tall / 3 * math.sin(TURN * (3 * x / WIDTH + 2 * s - d))
            ),
            _blend(far, near, layer / (layers - 1)),
        )
    sheet.title(title, ink, top=MARGIN, height=420)


def _shapes(sheet: Sheet, title: str, chance: random.Random, phase: float) -> None:
    paper, *inks = chance.choice(
        [
            ("#f3ead8", "#d8412f", "#1f4e79", "#f0b429", "#22223b"),
            ("#eef0ea", "#e4572e", "#17616b", "#f3c969", "#1b2a33"),
            ("#f5eee6", "#c8553d", "#588b8b", "#ffd5a1", "#2d3142"),
        ]
    )
    sheet.box(0, 0, WIDTH, HEIGHT, paper)
    tile = 300
    for place in range(16):
        x, y = place % 4 * tile, place // 4 * tile
        ground, ink, other = chance.sample([paper, *inks], 3)
        sheet.box(x, y, tile, tile, ground)
        quarter = chance.randrange(4)
        way = chance.choice([-1, 1])
        middle = (x + tile / 2, y + tile / 2)
        match chance.randrange(6):
            case 0:
                corner = (x + tile * (quarter % 2), y + tile * (quarter // 2))
                start = {0: 0, 1: 90, 3: 180, 2: 270}[quarter]
                sheet.slice(*corner, tile, start, 90, ink)
                sheet.slice(*corner, tile / 2, start, 90, other)
            case 1:
                sheet.slice(
                    *middle, tile / 2, quarter * 90 + way * 360 * phase, 180, ink
                )
            case 2:
                sheet.disc(*middle, tile / 2, ink)
                sheet.disc(*middle, 75 + 30 * math.sin(TURN * phase * way), other)
            case 3:
                sheet.slice(
                    *middle, tile / 2, quarter * 90 + way * 360 * phase, 270, ink
                )
            case 4:
                for bar in range(3):
                    sheet.box(x, y + bar * 100, tile, 50, ink)
            case 5:
                for dot in range(9):
                    beat = 4 * math.sin(TURN * (phase + dot / 9))
                    sheet.disc(
                        x + 50 + dot % 3 * 100, y + 50 + dot // 3 * 100, 26 + beat, ink
                    )
    sheet.box(0, 4 * tile, WIDTH, HEIGHT, paper)
    sheet.title(title, inks[-1], top=4 * tile + 50, height=200)


def _letters(sheet: Sheet, title: str, chance: random.Random, phase: float) -> None:
    paper, ink, accent, quiet = chance.choice(
        [
            ("#f4f1ea", "#141414", "#e63322", "#d9d3c7"),
            ("#ffdd3c", "#161616", "#1d3fbb", "#ecc61c"),
            ("#12355b", "#f5efe0", "#ff7f51", "#2a4f78"),
        ]
    )
    sheet.box(0, 0, WIDTH, HEIGHT, paper)
    characters = [
        character for character in _drawable(title) if not character.isspace()
    ] or ["·"]
    columns, rows, cell = 4, 4, (WIDTH - 2 * MARGIN) / 4
    accented = chance.randrange(columns * rows)
    wandering = (accented + int(phase * columns * rows)) % (columns * rows)
    for place in range(columns * rows):
        x = MARGIN + (place % columns + 0.5) * cell
        y = MARGIN + (place // columns + 0.5) * cell
        if place == wandering:
            sheet.disc(x, y, cell * 0.46, accent)
        character = characters[place % len(characters)]
        loud = place == wandering or place < len(characters)
        shade = paper if place == wandering else ink if loud else quiet
        sheet.letter(character.upper()[:1], x, y, 190, shade)
    sheet.box(MARGIN, 1160, WIDTH - 2 * MARGIN, 10, ink)
    sheet.title(title, ink, top=1200, height=220)


def _moon(sheet: Sheet, title: str, chance: random.Random, phase: float) -> None:
    night, dawn, near, light = chance.choice(
        [
            ("#0d1b3e", "#c9728a", "#0a1128", "#fdf0d5"),
            ("#102a43", "#e8a87c", "#0b1d2e", "#fff4e0"),
            ("#1a1440", "#7ec8c9", "#0d0b26", "#f4f9e9"),
        ]
    )
    sheet.fade(night, dawn)
    for _ in range(110):
        x, y, offset = chance.randrange(WIDTH), chance.randrange(900), chance.random()
        size = 1.5 + 2.5 * chance.random() ** 3
        twinkle = 1 + 0.5 * math.sin(TURN * (phase + offset))
        sheet.disc(x, y, size * twinkle, _blend(light, dawn, y / 1300))
    x, halo = chance.randint(300, 900), 12 * math.sin(TURN * phase)
    haze = _blend(night, dawn, 0.48)
    sheet.disc(x, 760, 240 + halo, _blend(haze, light, 0.12))
    sheet.disc(x, 760, 195 + halo / 2, _blend(haze, light, 0.3))
    sheet.disc(x, 760, 150, light)
    ridges = 5
    for ridge in range(ridges):
        jags = [
            (chance.randint(2, 9) + ridge, chance.random(), chance.uniform(0.5, 1))
            for _ in range(7)
        ]
        sheet.below(
            lambda x, level=880 + ridge * 105, jags=jags: (
                level
                - sum(
                    loud * 130 / n * abs(2 * ((n * x / WIDTH / 2 + s) % 1) - 1)
                    for n, s, loud in jags
                )
            ),
            _blend(_blend(dawn, night, 0.35), near, (ridge + 0.4) / (ridges - 0.6)),
        )
    sheet.title(title, light, top=MARGIN, height=380)


@dataclass(frozen=True)
class Style:
    label: str
    paint: Callable[[Sheet, str, random.Random, float], None]


STYLES = {
    "suns": Style("Suns", _suns),
    "waves": Style("Waves", _waves),
    "shapes": Style("Shapes", _shapes),
    "letters": Style("Letters", _letters),
    "moon": Style("Moon", _moon),
}


def draw(
    title: str, style: str, size: tuple[int, int], *, phase: float = 0.0
) -> Image.Image:
    """Return a poster; *phase* (0 to 1) is the moment in the loop of an animation."""
    seed = hashlib.sha256(f"{style}:{title}".encode()).digest()
    sheet = Sheet(size)
    chance = random.Random(seed)  # noqa: S311
    STYLES[style].paint(sheet, title, chance, phase)
    return sheet.finished()
