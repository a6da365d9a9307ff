"""What a notebook, a network or a package from elsewhere cannot do here."""

import base64
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from alphaprune import plots
from alphaprune.provenance import read

sys.path.insert(0, str(ROOT / "notebooks"))
from export import export

HOSTILE = """<p onclick="alert(1)">text</p><script>alert("script")</script><img src=x onerror="alert(2)">
<a href="javascript:alert(3)">a</a><a href="data:text/html,<script>alert(4)</script>">b</a><img src="https://elsewhere.example/spy.png">
<img src="//elsewhere.example/spy.png"><iframe src="https://elsewhere.example"></iframe><link rel=stylesheet href="https://elsewhere.example/x.css">
<style>@import "https://elsewhere.example/y.css"; p { background: url(https://elsewhere.example/z.png) }</style>
<div style="background-image: url(https://elsewhere.example/w.png)">c</div><form action="https://elsewhere.example"><input name=q></form>
<svg onload="alert(5)"><script>alert(6)</script></svg><meta http-equiv=refresh content="0; url=https://elsewhere.example"><base href="https://elsewhere.example/">
<math><mtext><table><mglyph><style><img src=x onerror=alert(7)></style></table></math><object data="https://elsewhere.example/a.swf"></object>"""
# Ends the page's own <main> early and hides the real end in an attribute that never closes.
BREAK_OUT = (
    '</main></body><script>alert("out")</script><img src="https://elsewhere.example/out.png"><img alt="'
)


def run(*arguments, **more):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **more)


def page_of(cells, tmp_path, metadata=None):
    notebook, page = tmp_path / "in.ipynb", tmp_path / "out.html"
    nbformat.write(new_notebook(cells=cells, metadata=metadata or {}), notebook)
    export(notebook, page)
    return page


def shown(data, **more):
    return new_code_cell("1", outputs=[new_output("display_data", data=data, **more)])


@pytest.mark.parametrize(
    "cells",
    [
        [new_markdown_cell(f"# Title\n\n{HOSTILE}")],
        [
            new_markdown_cell(
                "[a](javascript:alert(1)) ![b](https://elsewhere.example/spy.png)\n\n" + BREAK_OUT
            )
        ],
        [shown({"text/html": HOSTILE})],
        [shown({"text/html": BREAK_OUT})],
        [shown({"text/html": "<!-- " + BREAK_OUT}), shown({"text/html": "<textarea>" + BREAK_OUT})],
        [shown({"text/markdown": f"## {HOSTILE}"})],
        [shown({"application/javascript": "alert(1)"}), shown({"text/latex": HOSTILE})],
        [shown({"text/vnd.mermaid": HOSTILE}), shown({"image/svg+xml": f"<svg>{HOSTILE}</svg>"})],
        [
            shown(
                {"image/png": "QQ=="},
                metadata={"filenames": {"image/png": "https://elsewhere.example/spy.png"}},
            )
        ],
        [new_code_cell("1", outputs=[new_output("stream", text=HOSTILE)]), new_code_cell(HOSTILE)],
    ],
    ids=[
        "markdown",
        "links",
        "html",
        "break-out",
        "unclosed",
        "title",
        "script",
        "drawings",
        "file-names",
        "text",
    ],
)
def test_nothing_hostile_survives_in_a_page(tmp_path, cells):
    widgets = {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}}
    text = page_of(cells, tmp_path, widgets).read_text()
    markup = "".join(re.findall(r"<[a-zA-Z/!][^>]*>", re.sub(r"(?s)<style.*?</style>", "", text)))
    assert not re.search(r"<(script|iframe|object|embed|form|input|base|link|svg|textarea)\b", markup, re.I)
    assert not re.search(r"\son\w+\s*=|javascript:|data:text|refresh", markup, re.I)
    assert "elsewhere.example" not in markup
    assert text.count("<style") == len(re.findall(r"<style", text.partition("<main>")[0]))
    assert "default-src 'none'" in text and text.rstrip().endswith("</html>")


def test_our_own_tables_formulas_and_pictures_stay(tmp_path):
    source = {"command": ["make it"], "parameters": [], "runs": []}
    picture = plots.save(Figure(), tmp_path / "figure", "A figure of nothing, for a test of pages.", source)
    table = pd.DataFrame({"claim": ["<b>one</b> & more"], "verdict": ["reproduced"], "value": [0.5]})
    styled = (
        table.style.map(lambda v: "background-color: #dff2e1", subset=["verdict"])
        .format({"value": "{:.1%}"}, escape="html")
        .set_properties(subset=["claim"], **{"text-align": "left"})
        .hide(axis="index")
    )
    svg = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
    page = page_of(
        [
            new_markdown_cell(
                "# Title\n\nWith $\\alpha = 0$ and `a < b`, a [page](html/fig4.html) and\n\n$$\\frac{1}{2}$$"
            ),
            shown({"text/html": styled.to_html()}),
            shown({"text/html": table._repr_html_()}),
            shown({"text/html": picture._repr_html_()}),
            shown({"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'/>"}),
            shown({"text/html": f'<img alt="drawn" src="data:image/svg+xml;base64,{svg}">'}),
        ],
        tmp_path,
    )
    text = page.read_text()
    assert re.search(r'<td [^>]*style="[^"]*background-color: #dff2e1[^>]*>reproduced</td>', text)
    assert re.search(r'<td [^>]*style="text-align: left[^>]*>', text) and ">50.0%</td>" in text
    assert "<math" in text and "<mfrac>" in text and "a &lt; b" in text and 'href="html/fig4.html"' in text
    png = base64.b64encode((tmp_path / "figure.png").read_bytes()).decode()
    assert f"data:image/png;base64,{png}" in text and "A figure of nothing" in text
    assert text.count("data:image/svg+xml;base64,") >= 2
    assert "command: make it" in text.rpartition("<footer")[2]
    assert read(page) == source


def test_jupyterlab_wants_its_token_and_listens_on_this_machine_alone(tmp_path):
    line = next(
        x for x in (ROOT / "Makefile").read_text().splitlines() if "jupyter lab" in x and x.startswith("\t")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shlex.split(line.replace("$(BIN)/", f"{ROOT}/.venv/bin/").replace("$(LAB)", "--allow-root"))
    command += ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    folders = {f"JUPYTER_{n}_DIR": str(tmp_path / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, env=os.environ | folders)
        try:
            for _ in range(1200):
                told = list((tmp_path / "runtime").glob("jpserver-*.json"))
                with socket.socket() as asked:
                    if told and asked.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            info = json.loads(told[0].read_text())
            assert info["hostname"] == "127.0.0.1" and len(info["token"]) >= 32
            contents = f"http://127.0.0.1:{port}/api/contents"
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(contents, timeout=30)
            assert refused.value.code == 403
            assert urllib.request.urlopen(f"{contents}?token={info['token']}", timeout=30).status == 200
            with socket.socket() as other:  # another address of this machine's
                assert other.connect_ex(("127.0.0.2", port)) != 0
        finally:
            server.terminate()
            server.wait(30)


def test_a_changed_hash_in_the_lock_is_refused(tmp_path):
    """By the very options the environment is made with, with a package made here."""
    makefile = (ROOT / "Makefile").read_text()
    (install,) = re.findall(r"uv pip install (.*) -r requirements\.lock", makefile)
    assert "--require-hashes" in install
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "requirements.lock"
    options = [o for o in shlex.split(install) if o.startswith("--") and o != "--python"]
    command = [
        f"{ROOT}/.venv/bin/uv",
        "pip",
        "install",
        *options,
        "--python",
        sys.executable,
        "--no-cache",
        "--offline",
    ]
    command += ["--no-index", "--find-links", str(tmp_path), "-r", str(lock)]
    for hashed, expected in ((digest, True), (digest[::-1], False), (None, False)):
        lock.write_text("tiny==1.0" + (f" \\\n    --hash=sha256:{hashed}\n" if hashed else "\n"))
        target = tmp_path / f"installed-{hashed}"
        done = subprocess.run([*command, "--target", str(target)], capture_output=True, text=True)
        assert (done.returncode == 0) == expected == (target / "tiny.py").is_file(), done.stderr
        assert expected or "hash" in done.stderr.lower()


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "0 known vulnerabilities"),
        (
            '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}]}',
            1,
            "a 1: PYSEC-1, mended in 2",
        ),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', 2, "no answer for 1 packages"),
        ("", 2, "cannot be asked"),
    ],
)
def test_the_audit_never_takes_silence_for_safety(tmp_path, answer, code, said):
    """pip-audit is replaced by one that gives a fixed answer; the real one reports what it could not look up as harmless."""
    (tmp_path / "pip_audit.py").write_text(f"print({answer!r})")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("notebooks/audit.py", "requirements.lock", env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == code and said in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (code == 2)
