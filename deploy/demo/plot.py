"""A line plot as a PNG file from numpy and zlib alone: the training machine need not have a plotting library."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Letters of 5 x 7 pixels and two rows for tails, drawn side by side: a row of names, then nine rows of pixels.
_GLYPHS = """
0     1     2     3     4     5     6     7     8     9     .     ,     -     (     )     /     :     =
 ###    #    ###   ###     #  #####  ###  #####  ###   ###                       #   #
#   #  ##   #   # #   #   ##  #     #         # #   # #   #                     #     #      #   #
#  ##   #       #     #  # #  ####  ####     #  #   # #   #                    #       #    #
# # #   #      #    ##  #  #      # #   #   #    ###   ####             #####  #       #   #          #####
##  #   #     #       # #####     # #   #  #    #   #     #                    #       #   #     #
#   #   #    #    #   #    #  #   # #   #  #    #   #     #   ##    ##          #     #   #      #    #####
 ###   ###  #####  ###     #   ###   ###   #     ###   ###    ##     #           #   #   #
                                                                    #

a     b     c     d     e     f     g     h     i     j     k     l     m     n     o     p     q     r
      #               #         ##        #       #      #  #      ##
      #               #        #  #       #                 #       #
 ###  # ##   ###   ## #  ###   #     ## # # ##   ##     ##  #  #    #   ## #  # ##   ###  # ##   ## # # ##
    # ##  # #     #  ## #   # ####  #  ## ##  #   #      #  # #     #   # # # ##  # #   # ##  # #  ## ##  #
 #### #   # #     #   # #####  #    #   # #   #   #      #  ##      #   # # # #   # #   # #   # #   # #
#   # ##  # #   # #  ## #      #    #  ## #   #   #      #  # #     #   # # # #   # #   # ##  # #  ## #
 #### # ##   ###   ## #  ###   #     ## # #   #  ###     #  #  #   ###  # # # #   #  ###  # ##   ## # #
                                        #             #  #                                #         #
                                     ###               ##                                 #         #
s     t     u     v     w     x     y     z
       #
       #
 #### ####  #   # #   # #   # #   # #   # #####
#      #    #   # #   # # # #  # #  #   #    #
 ###   #    #   # #   # # # #   #   #   #   #
    #  #  # #  ##  # #  # # #  # #   ####  #
####    ##   ## #   #    # #  #   #     # #####
                                        #
                                     ###
"""
_SUPERSAMPLE = 2  # drawn at twice the size, then averaged: smooth lines
_INK, _GREY, _PAPER = (40, 40, 40), (222, 222, 222), (255, 255, 255)
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))

Pixels = NDArray[np.uint8]


class Series(NamedTuple):
    label: str
    points: list[tuple[float, float]]
    marked: bool = False  # a dot at each point


class Mark(NamedTuple):
    """A vertical dashed line with its name."""

    label: str
    x: float


def _glyphs() -> dict[str, NDArray[np.bool_]]:
    lines = _GLYPHS.removeprefix("\n").split("\n")[:-1]
    glyphs = {" ": np.zeros((9, 5), dtype=bool)}
    for row in range(0, len(lines), 10):
        for column in range(0, len(lines[row]), 6):
            cells = [line[column : column + 5].ljust(5) for line in lines[row + 1 : row + 10]]
            glyphs[lines[row][column]] = np.array([[cell == "#" for cell in line] for line in cells])
    return glyphs


class _Canvas:
    """Pixels at the supersampled size; coordinates are in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels: Pixels = np.full((height * _SUPERSAMPLE, width * _SUPERSAMPLE, 3), 255, dtype=np.uint8)
        self._glyphs = _glyphs()

    def fill(self, x: float, y: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        left, top = round(x * _SUPERSAMPLE), round(y * _SUPERSAMPLE)
        right, bottom = max(left + 1, round((x + width) * _SUPERSAMPLE)), max(top + 1, round((y + height) * _SUPERSAMPLE))
        self.pixels[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = colour

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: tuple[int, int, int], width: float) -> None:
        num_dots = int(math.dist(start, end) * _SUPERSAMPLE) + 1
        for share in np.linspace(0.0, 1.0, num_dots + 1):
            x, y = start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share
            self.fill(x - width / 2, y - width / 2, width, width, colour)

    def text(self, x: float, y: float, text: str, scale: int = 2, align: float = 0.0) -> None:
        """align: 0 begins at x, 0.5 centres on it, 1 ends there. Letters without a glyph are left blank."""
        x -= align * text_width(text, scale)
        for letter in text.lower():
            for row, column in np.argwhere(self._glyphs.get(letter, self._glyphs[" "])):
                self.fill(x + column * scale, y + row * scale, scale, scale, _INK)
            x += 6 * scale

    def finish(self) -> Pixels:
        height, width, _ = self.pixels.shape
        blocks = self.pixels.reshape(height // _SUPERSAMPLE, _SUPERSAMPLE, width // _SUPERSAMPLE, _SUPERSAMPLE, 3)
        return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def text_width(text: str, scale: int = 2) -> int:
    return len(text) * 6 * scale


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about as many as wanted."""
    rough = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(title: str, x_label: str, y_label: str, series: list[Series], marks: list[Mark], y_max: float, size: tuple[int, int]) -> Pixels:
    """The picture as [height, width, 3]. Points above y_max are drawn at the upper edge; y starts below the lowest point."""
    width, height = size
    left, right, top, bottom = 92, width - 24, 64, height - 72
    x_max = max(x for line in series for x, _ in line.points)
    lowest = min(y for line in series for _, y in line.points)
    y_min = math.floor(lowest * 4) / 4
    y_max = max(y_max, y_min + 0.5)
    canvas = _Canvas(width, height)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / x_max, bottom - (bottom - top) * (min(y, y_max) - y_min) / (y_max - y_min)

    for y in ticks(y_min, y_max, 8):
        canvas.fill(left, place(0, y)[1], right - left, 1, _GREY)
        canvas.text(left - 10, place(0, y)[1] - 7, f"{y:g}", align=1.0)
    for x in ticks(0, x_max, 8):
        canvas.fill(place(x, y_min)[0], top, 1, bottom - top, _GREY)
        canvas.text(place(x, y_min)[0], bottom + 12, f"{x:g}", align=0.5)
    for row, mark in enumerate(marks):
        x, _ = place(mark.x, y_min)
        for dash in range(top, bottom, 8):
            canvas.fill(x, dash, 1.5, 4, _INK)
        canvas.text(x - 6, top + 14 + 24 * row, mark.label, align=1.0)
    for line, colour in zip(series, _COLOURS, strict=False):
        places = [place(x, y) for x, y in line.points]
        for start, end in itertools.pairwise(places):
            canvas.line(start, end, colour, 1.5)
        for x, y in places if line.marked else []:
            canvas.fill(x - 2.5, y - 2.5, 5, 5, colour)
    _frame(canvas, (left, top, right, bottom))
    canvas.text((left + right) / 2, 18, title, align=0.5)
    canvas.text((left + right) / 2, height - 30, x_label, align=0.5)
    canvas.text(left, top - 20, y_label)
    _legend(canvas, left + round((right - left) * 0.42), top + 24 * len(marks) + 16, series)  # where a falling curve leaves room
    return canvas.finish()


def _frame(canvas: _Canvas, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    canvas.fill(left, bottom, right - left, 2, _INK)
    canvas.fill(left, top, 2, bottom - top, _INK)


def _legend(canvas: _Canvas, left: int, top: int, series: list[Series]) -> None:
    canvas.fill(left, top, max(text_width(line.label) for line in series) + 62, 26 * len(series) + 12, _PAPER)
    for row, (line, colour) in enumerate(zip(series, _COLOURS, strict=False)):
        y = top + 12 + 26 * row
        canvas.fill(left + 10, y + 5, 30, 4, colour)
        canvas.text(left + 48, y, line.label)


def write_png(pixels: Pixels, path: Path) -> None:
    """8-bit RGB, as of the PNG specification (RFC 2083)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), dtype=np.uint8), pixels.reshape(height, width * 3)], axis=1)  # filter 0 for each row

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
