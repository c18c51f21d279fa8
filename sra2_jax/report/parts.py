"""Pieces of the report's page, as HTML."""

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import Any

from etils import epath
from PIL import Image


def text(value: Any) -> str:
    """Any value of a JSON file, escaped; no thousands separators, it may be an id."""
    return escape(value if isinstance(value, str) else json.dumps(value)) or "(empty)"


def missing(what: str) -> str:
    return f'<p class="missing">{escape(what)}</p>'


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Those of nested sections with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def pairs(values: Mapping[str, Any]) -> str:
    """A table of keys and values."""
    row = "<div><dt>{}</dt><dd>{}</dd></div>"
    rows = (row.format(text(key), text(value)) for key, value in flat(values).items())
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def figure(path: epath.Path, label: str, what: str, side: int) -> str:
    """The picture in a file, at most `side` pixels wide; "" where none can be read."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    except (OSError, SyntaxError, ValueError):  # Pillow's for a half-written PNG
        return ""
    # small pictures are enlarged by the page: show their pixels, do not blur them
    look = ' class="pixels"' if image.width <= 400 else ""
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img{look} width="{image.width}" height="{image.height}" '
        f'alt="{label} {what}" src="data:image/png;base64,{source}">'
        f"<figcaption><b>{label}</b> {what}</figcaption></figure>"
    )
