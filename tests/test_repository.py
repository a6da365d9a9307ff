"""The repository itself: what notebooks may hold, which files must agree, how imports run."""

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT / "lib" / "alphaprune").glob("*.py") if p.stem != "__init__")


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_store_no_outputs_have_parameters_and_short_cells(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    assert all(len("".join(c["source"]).splitlines()) <= 25 for c in code)
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    assert re.match(r"\d\d_", path.name)


def test_no_absolute_path_of_a_machine_stands_anywhere():
    pattern = re.compile(r"(?<![\w.:/}])/(?:home|root|Users|work|tmp|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in tracked()
        if path.suffix in {".py", ".ipynb", ".md", ".yaml", ".yml", ".toml", ".json", ".csv", ".in", ""}
        and "sample" not in path.parts
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def names(requirements):
    return {re.split(r"[<>=\[; ]", r, maxsplit=1)[0].lower() for r in requirements}


def test_lock_environment_and_pyproject_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set(project["dependencies"]).union(*project["optional-dependencies"].values())
    lock = (ROOT / "requirements.lock").read_text()
    locked: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE):
        locked.setdefault(name, set()).add(version)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pins = dict(
        line.split("==") for line in next(d["pip"] for d in conda if isinstance(d, dict)) if "==" in line
    )
    assert names(wanted) == set(pins)
    assert all(pins[name] in locked[name] for name in pins)
    for requirement in wanted:
        name, minimum = re.fullmatch(r"([a-z0-9-]+)>=([\d.]+)", requirement).groups()
        assert all(
            tuple(map(int, v.split("."))) >= tuple(map(int, minimum.split("."))) for v in locked[name]
        ), name
    for line in (ROOT / "requirements.in").read_text().split():
        name, version = line.split("==")
        assert locked[name] == {version}
    assert not any("lightning" in name for name in locked)
    blocks = re.split(r"\n(?=[a-z0-9])", lock)
    assert all("--hash=sha256:" in b for b in blocks if re.match(r"[a-z0-9-]+==", b))


def test_imports_run_one_way():
    """The library's modules form no cycle, and none knows of notebooks, make or papermill."""
    imports = {}
    for name in MODULES:
        tree = ast.parse((ROOT / "lib" / "alphaprune" / f"{name}.py").read_text())
        modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        modules += [
            f"alphaprune.{a.name}"
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module == "alphaprune"
            for a in n.names
        ]
        modules += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not any(
            m.split(".")[0] in {"papermill", "IPython", "nbformat", "nbconvert"} for m in modules
        ), name
        imports[name] = {m.removeprefix("alphaprune.") for m in modules if m.startswith("alphaprune.")} & set(
            MODULES
        )
    order: list[str] = []
    while len(order) < len(imports):
        ready = [n for n in imports if n not in order and imports[n] <= set(order)]
        assert ready, f"a cycle among {sorted(set(imports) - set(order))}"
        order += ready
    assert not {"train", "experiment", "data"} & (
        imports["plots"] | imports["measure"] | imports["fold"] | imports["parallel"]
    )


@pytest.mark.parametrize("name", MODULES)
def test_modules_explain_themselves_and_their_examples_run(name):
    module = importlib.import_module(f"alphaprune.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0
    public = [
        o
        for n, o in vars(module).items()
        if not n.startswith("_") and getattr(o, "__module__", None) == module.__name__ and callable(o)
    ]
    undocumented = [o.__name__ for o in public if not o.__doc__]
    assert undocumented in ([], ["main"])


def test_pages_name_only_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    pages = [ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")]
    said = "\n".join(page.read_text() for page in pages)
    targets = set(re.findall(r"(?:^    |`)make ([a-z][a-z0-9-]+)", said, re.MULTILINE))
    assert len(targets) > 10
    for target in targets:
        listed = re.findall(r"^(?:EXPERIMENTS :=|\.PHONY:) (.*)", makefile, re.MULTILINE)
        assert target in " ".join(listed).split(), target


def test_links_of_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_map_names_every_module():
    said = (ROOT / "docs" / "map.md").read_text()
    modules = [p.name for p in (ROOT / "lib" / "alphaprune").glob("*.py") if p.name != "__init__.py"]
    assert [m for m in modules if m not in said] == []


def test_tables_of_pages_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import controls

    tables = controls.blocks()
    used = []
    for page in (ROOT / "README.md", ROOT / "docs" / "controls.md"):
        text = page.read_text()
        assert controls.written(text, tables) == text, "run python docs/controls.py"
        used += re.findall("<!-- table: (.*) -->", text)
    assert sorted(used) == sorted(tables)


def test_figures_and_report_are_drawn_from_records_without_torch():
    """It takes seconds to load, and they come last, when nothing else is left to do."""
    drawn = (
        "import sys\n"
        "from alphaprune.plots import stage_curves\n"
        "from alphaprune.results import Results\n"
        "results = Results('gpu')\n"
        "stage_curves(results.experiments['fig4'].curves(), 'Figure 4', fold_now=True)\n"
        "assert results.provenance() and results.pruned and len(results.summaries()) > 20\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", drawn], cwd=ROOT, check=True)
