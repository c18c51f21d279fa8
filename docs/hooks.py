"""For mkdocs: the first page is the README; links to the code become its name."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_path == "index.md":
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = re.sub(r"\]\((?!https?:|docs/)", "](../", text)
        markdown = markdown.replace("](docs/", "](")
    return OUTSIDE.sub(r"\1", markdown)
