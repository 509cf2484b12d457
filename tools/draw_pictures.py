"""The documentation's pictures, as SVG that follows the reader's light or dark setting and loads nothing.

In: nothing. Out: ``docs/pictures/*.svg``, the same bytes every time: ``python -m tools.draw_pictures``.
"""

from __future__ import annotations

import math
import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"

_STYLE = """
svg { font-family: system-ui, sans-serif; font-size: 14px; }
.paper { fill: #ffffff; } .ink { fill: #1f2328; } .soft { fill: #57606a; font-size: 12px; }
.box { fill: #eef4fb; stroke: #4a7ab5; } .disk { fill: #fdf3e1; stroke: #b7791f; }
.end { fill: #eaf6ec; stroke: #3f8f4f; }
.line { stroke: #57606a; fill: none; } .tip { fill: #57606a; }
.head { fill: #4a7ab5; } .tail { fill: #c9d1d9; } .curve { stroke: #b7791f; fill: none; stroke-width: 2.5; }
@media (prefers-color-scheme: dark) {
.paper { fill: #16191d; } .ink { fill: #e6edf3; } .soft { fill: #9aa4ae; }
.box { fill: #1b2a3d; stroke: #6ea0dd; } .disk { fill: #37290f; stroke: #d8a24a; }
.end { fill: #16301b; stroke: #63b873; }
.line { stroke: #9aa4ae; } .tip { fill: #9aa4ae; }
.head { fill: #6ea0dd; } .tail { fill: #444c56; } .curve { stroke: #d8a24a; }
}
"""


def _picture(width: int, height: int, title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<rect class="paper" width="{width}" height="{height}" rx="8"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, lines: list[str], kind: str = "box") -> str:
    middle, top = x + width / 2, y + height / 2 + 5 - 9 * (len(lines) - 1)
    words = [_text(middle, top + 18 * n, line, "ink" if n == 0 else "soft") for n, line in enumerate(lines)]
    shape = f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    return "\n".join([shape, *words])


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    angle = math.atan2(y2 - y1, x2 - x1)
    tip = [(x2 - 8 * math.cos(angle + turn), y2 - 8 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x2, y2), *tip])
    return (
        f'<line class="line" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/><polygon class="tip" points="{points}"/>'
    )


def flow() -> str:
    """From text to students, with the disk between the two halves."""
    parts = [
        _box(20, 90, 110, 60, ["text", "files, data sets"]),
        _arrow(130, 120, 160, 120),
        _box(160, 90, 110, 60, ["blocks", "1,024 tokens"]),
        _arrow(270, 120, 300, 120),
        _box(300, 90, 110, 60, ["teacher", "runs once"]),
        _arrow(410, 120, 440, 120),
        _box(440, 70, 130, 100, ["cache on disk", "about 30 bytes", "a token"], "disk"),
        _text(505, 200, "the teacher stops here", "soft"),
    ]
    for n, (name, says) in enumerate((("student", "6 layers"), ("student", "narrower"), ("student", "another start"))):
        y = 20 + 75 * n
        parts += [_arrow(570, 120, 610, y + 25), _box(610, y, 110, 50, [name, says])]
        parts += [_arrow(720, y + 25, 760, 120)]
    parts += [_box(760, 85, 120, 70, ["evaluation", "loss, KL,", "calibration"], "end")]
    return _picture(900, 240, "Text runs through the teacher once; students are trained from the cache", parts)


def token() -> str:
    """What the default encoding keeps of one position: a head, the tail's mass, the tail's shape."""
    base, scale, left, width = 210.0, 165.0, 40.0, 10.0
    heights = [scale * 0.9 ** (2.2 * n) for n in range(16)]
    bars = [
        f'<rect class="head" x="{left + width * n:g}" y="{base - height:.1f}" width="8" height="{height:.1f}"/>'
        for n, height in enumerate(heights)
    ]
    rough = [5 + 9 * abs(math.sin(1.7 * n) * math.cos(0.31 * n)) * math.exp(-n / 25) for n in range(56)]
    bars += [
        f'<rect class="tail" x="{left + width * (16 + n):g}" y="{base - height:.1f}" width="8" height="{height:.1f}"/>'
        for n, height in enumerate(rough)
    ]
    points = " ".join(
        f"{left + width * (16 + n) + 4:g},{base - 7 - 8 * math.exp(-n / 25):.1f}" for n in range(0, 56, 3)
    )
    parts = [
        *bars,
        f'<polyline class="curve" points="{points}"/>',
        f'<line class="line" x1="36" y1="{base:g}" x2="770" y2="{base:g}"/>',
        _text(left, 24, "probability", "soft", "start"),
        _text(left, 234, "head: the 16 most probable tokens", "ink", "start"),
        _text(left, 252, "which, and how probable: 26 bytes", "soft", "start"),
        _text(490, 234, "tail: all other tokens of the vocabulary", "ink"),
        _text(490, 252, "their mass, exact: 2 bytes. Their shape, one of 256 shared ones: 1 byte", "soft"),
        _text(490, 150, "the curve: the shared distribution that this position's tail follows", "soft"),
        _arrow(490, 158, 460, 198),
    ]
    return _picture(800, 270, "What is kept of one position: head, mass of the tail, shape of the tail", parts)


def shard() -> str:
    """How a shard is committed, and what a kill costs at each step."""
    steps = [
        ("write", "temporary name"),
        ("sync", "to the disk"),
        ("read back", "and compare"),
        ("publish", "never overwrites"),
        ("receipt", "sizes, digests"),
    ]
    parts = []
    for n, (name, says) in enumerate(steps):
        x = 20 + 145 * n
        parts.append(_box(x, 50, 115, 55, [name, says], "end" if name == "receipt" else "box"))
        if n:
            parts.append(_arrow(x - 30, 77, x, 77))
    parts += [
        _arrow(715, 77, 745, 77),
        _box(745, 50, 115, 55, ["next shard", "256 blocks"]),
        _text(300, 140, "killed here: this shard is made again, nothing else is lost", "soft"),
        _text(660, 140, "from here on it is never lost, nor made again", "soft"),
        _text(440, 28, "one shard of a cache", "ink"),
        _text(440, 172, "after the last receipt comes the seal: only a sealed cache is trained from", "soft"),
    ]
    return _picture(880, 190, "A shard is written, synced, read back, published, and then gets its receipt", parts)


PICTURES = {"flow": flow, "token": token, "shard": shard}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
