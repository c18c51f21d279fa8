"""Pieces of the report's page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any


def text(value: Any) -> str:
    """Any value of a JSON file, escaped; no thousands separators, it may be an id."""
    return escape(value if isinstance(value, str) else json.dumps(value)) or "(empty)"


def missing(what: str) -> str:
    return f'<p class="missing">{escape(what)}</p>'


def section(title: str, lead: str, body: str) -> str:
    """`title` and `lead` are text, `body` is HTML."""
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def pairs(values: Mapping[str, Any]) -> str:
    rows = (f"<div><dt>{text(k)}</dt><dd>{text(values[k])}</dd></div>" for k in values)
    return f'<dl class="pairs">{"".join(rows)}</dl>'
