"""Turn executed notebooks into HTML that asks no other host for anything: pictures inside, formulas as MathML.

python notebooks/export.py OUT.ipynb OUT.html [--no-code]
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL)


def as_mathml(markdown: str) -> str:
    """`$...$` and `$$...$$` in Markdown -> MathML, which browsers draw without a script."""

    def replace(match: re.Match) -> str:
        block = match["block"]
        return convert(" ".join((block or match["inline"]).split()), display="block" if block else "inline")

    return FORMULA.sub(replace, markdown)


def export(notebook: Path, page: Path, code: bool = True) -> None:
    """Write one executed notebook as a page; `code=False` leaves the cells' source out."""
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
    body, _ = exporter.from_notebook_node(content, {"metadata": {"name": (titles or [notebook.stem])[0]}})
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(f".{page.name}.{os.getpid()}.tmp")
    temporary.write_text(body, encoding="utf-8")
    os.replace(temporary, page)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Executed notebook -> self-contained HTML.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--no-code", action="store_true")
    args = parser.parse_args()
    export(args.notebook, args.page, code=not args.no_code)
