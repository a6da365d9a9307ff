"""Turn executed notebooks into HTML that runs no script and asks no other host for anything: pictures inside, formulas as MathML.

python notebooks/export.py OUT.ipynb OUT.html [--no-code]

A page carries what its figures were made from, as `python -m alphaprune.provenance OUT.html` prints it.
"""

from __future__ import annotations

import without_addresses  # noqa: F401

# isort: split

import argparse
import base64
import html
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import nbformat
import seals
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from sanitise import sanitise

from alphaprune.provenance import in_png, merged, summary_line

FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)
PNG_INSIDE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


def as_mathml(markdown: str) -> str:
    """`$...$` and `$$...$$` in Markdown -> MathML, which browsers draw without a script."""

    def replace(match: re.Match) -> str:
        block = match["block"]
        return convert(" ".join((block or match["inline"]).split()), display="block" if block else "inline")

    return FORMULA.sub(replace, markdown)


def sources(content: nbformat.NotebookNode) -> dict | None:
    """What the figures of an executed notebook say they were made from, together; None if none says anything."""
    shown = [
        str(output.data["text/html"])
        for cell in content.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    found = []
    for png in (png for text in shown for png in PNG_INSIDE.findall(text)):
        with suppress(ValueError):  # not base64 after all
            found.append(in_png(base64.b64decode(png)))
    return merged(source for source in found if source is not None) if any(found) else None


def export(notebook: Path, page: Path, code: bool = True, results: Path | None = None) -> None:
    """Write one executed notebook as a page; `code=False` leaves the cells' source out. `results` is the folder whose seals take it."""
    content = nbformat.read(notebook, 4)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = as_mathml(cell.source)
    exporter = HTMLExporter(
        template_name="offline",
        extra_template_basedirs=[str(Path(__file__).parent)],
        exclude_input=not code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    shown = [  # what an experiment's page is about
        str(output.data["text/markdown"]).removeprefix("## ")
        for cell in content.cells
        for output in cell.get("outputs", [])
        if str(output.get("data", {}).get("text/markdown", "")).startswith("## ")
    ]
    titles = shown[:1] + [
        line[2:] for cell in content.cells for line in cell.source.splitlines()[:1] if line.startswith("# ")
    ]
    made_from = sources(content)
    resources = {"metadata": {"name": (titles or [notebook.stem])[0]}}
    if made_from:
        resources["provenance"] = json.dumps(made_from, sort_keys=True, separators=(",", ":"))
    whole, _ = exporter.from_notebook_node(content, resources)
    # Up to the first <main> all is the template's. What follows may come from the notebook, by whatever way.
    head, main, rest = whole.partition("<main>")
    foot = f'<footer class="made-from">{html.escape(summary_line(made_from))}</footer>' if made_from else ""
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(f".{page.name}.{os.getpid()}.tmp")
    temporary.write_text(f"{head}{main}{sanitise(rest)}</main>{foot}\n</body>\n</html>\n", encoding="utf-8")
    if results:
        seals.finish(results, temporary, page)
    else:
        os.replace(temporary, page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Executed notebook -> self-contained HTML.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--no-code", action="store_true")
    parser.add_argument("--seal", type=Path, metavar="RESULTS", help="folder whose seals take the page")
    args = parser.parse_args()
    export(args.notebook, args.page, not args.no_code, args.seal)
