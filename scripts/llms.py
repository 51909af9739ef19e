"""Write llms.txt beside the rendered site: what the project is, and every page with its address and first sentence.

Quarto runs this after rendering (`post-render` in _quarto.yml); `python scripts/llms.py` alone prints the list.
"""

import json
import os
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def about(path):
    "Title and first sentence of a chapter."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "markdown"))
    title = re.match(r"# (.+?)\s*(?:\{#.*\})?\n", text)
    lead = re.search(r"^> (.+(?:\n> .+)*)", text, re.M)
    return title[1] if title else path.stem, re.sub(r"\n> ", " ", lead[1]) if lead else ""


def listed(chapters, site):
    "Lines of a list of chapters, a heading for each part."
    for entry in chapters:
        if isinstance(entry, dict):
            yield from ["", f"## {entry['part']}", "", *listed(entry["chapters"], site)]
        elif entry.endswith(".ipynb"):
            title, lead = about(ROOT / entry)
            yield f"- [{title}]({site}/{entry.removesuffix('.ipynb')}.html): {lead}"


def text(root=ROOT):
    "The whole file."
    config = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    book, readme = config["book"], (root / "README.md").read_text(encoding="utf-8")
    summary = re.search(r"^\*\*(.+?)\*\*$", readme, re.M | re.S)
    lines = ["# ff_research", "", f"> {re.sub(chr(10), ' ', summary[1])}" if summary else ""]
    lines += ["", f"- [Source]({book['repo-url']}): notebooks, package, published rows"]
    lines += listed(book["chapters"], book["site-url"])
    lines += ["", f"## {config['language']['section-title-appendices']}", ""]
    lines += listed(book["appendices"], book["site-url"])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if folder := os.environ.get("QUARTO_PROJECT_OUTPUT_DIR"):
        (Path(folder) / "llms.txt").write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")
