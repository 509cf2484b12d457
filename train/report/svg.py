"""A drawn figure as SVG for a page: its colours are the page's, its text is text, it asks for nothing.

In: a matplotlib figure that is drawn in the colours below. Out: an ``<svg>`` element whose colours are CSS variables,
with a title and a description for those who do not see it, and no style that a strict policy of the page would refuse.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

# Colours that stand for variables of the page's style sheet.
INK, FAINT = "#000001", "#000002"
SERIES = tuple(f"#0001{number:02d}" for number in range(1, 7))
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}
_FONT = re.compile(r"(?:(bold|\d00)\s+)?([\d.]+)px\b.*")
_POINTERS = re.compile(r"url\(#([^)]+)\)")
_KEPT = {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect"}


def inline_svg(figure: Any, *, key: str, title: str, description: str) -> Markup:
    """The figure as one element; ``key`` is in front of every id, so that figures of a page do not share any."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Text stays text: whether matplotlib's own font has each of its characters does not matter.
        warnings.simplefilter("ignore")
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    # Made by matplotlib a line above, not by a stranger.
    root = ElementTree.fromstring(stream.getvalue())
    _clean(root, key)
    width, height = (float(root.attrib.pop(name).removesuffix("pt")) for name in ("width", "height"))
    root.attrib |= {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-text",
        "class": "plot",
    }
    for at, (name, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(name, {"id": f"{key}-{'text' if at else name}"})
        element.text = text
        root.insert(at, element)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(element: ElementTree.Element, key: str) -> None:
    """Names without their namespaces, attributes in place of styles, ids of this figure's own."""
    element.tag = _local(element.tag)
    attributes: dict[str, str] = {}
    for name, value in element.attrib.items():
        if _local(name) == "style":
            for part in filter(None, value.split(";")):
                attributes |= _presentation(*(side.strip() for side in part.split(":", 1)))
        elif _local(name) == "id":
            attributes["id"] = f"{key}-{value}"
        elif _local(name) == "href":
            attributes["href"] = f"#{key}-{value.removeprefix('#')}"
        elif not name.startswith("{") and name not in ("version", "xmlns"):
            attributes[name] = value
    element.attrib.clear()
    element.attrib.update({name: _POINTERS.sub(rf"url(#{key}-\1)", value) for name, value in attributes.items()})
    for child in list(element):
        if _local(child.tag) in _KEPT:
            _clean(child, key)
        else:
            element.remove(child)


def _local(name: Any) -> str:
    return str(name).rpartition("}")[2]


def _presentation(name: str, value: str) -> dict[str, str]:
    """One declaration of a style as attributes."""
    if name == "font":
        match = _FONT.fullmatch(value)
        return {} if match is None else {"font-size": match[2]} | ({"font-weight": match[1]} if match[1] else {})
    if name in ("font-family", "-inkscape-stroke"):
        return {}
    return {name: _VARIABLES.get(value, value.removesuffix("px") if name == "font-size" else value)}
