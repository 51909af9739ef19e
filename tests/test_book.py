"""The book's own invariants: package and notebooks agree, every chapter is listed and fit to print, links are right."""

import ast
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("ff_research/configs/*.toml"))
NOTEBOOKS = [path for path in sorted(ROOT.glob("nbs/*.ipynb")) if not path.name.startswith("_")]
MODULES = sorted(path for path in ROOT.glob("ff_research/*.py") if path.stem != "_modidx")

parser = ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]
BLOB = f"github.com/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def words(text):
    "How many words a text has; brackets that a formatter sets on lines of their own are none."
    return sum(any(c.isalnum() for c in word) for word in text.split())


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(markdown):
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.S)


# Package and notebooks


@pytest.fixture
def copy(tmp_path):
    "A copy of the notebooks and the settings, where a command may write without touching the working tree."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    return tmp_path


def run(command, cwd):
    subprocess.run([Path(sys.executable).parent / command], cwd=cwd, check=True, capture_output=True, text=True)


def python_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}


def test_package_is_what_the_notebooks_export(copy):
    "Exported into an empty folder, so that a module whose notebook is gone shows up as well."
    run("nbdev_export", copy)
    fresh, here = python_files(copy / "ff_research"), python_files(ROOT / "ff_research")
    assert fresh.pop("__init__.py").strip() in here.pop("__init__.py")  # the version; the names are written by hand
    assert sorted(here.keys() - fresh.keys()) == [], "modules without a notebook"
    assert sorted(name for name in fresh if here.get(name) != fresh[name]) == [], "run `make export`"


def test_notebooks_are_clean(copy):
    run("nbdev_clean", copy)
    assert [path.name for path in NOTEBOOKS if path.read_bytes() != (copy / "nbs" / path.name).read_bytes()] == [], (
        "run `nbdev_clean`"
    )


# Chapters


def test_every_notebook_is_a_chapter_in_order():
    book = yaml.safe_load(read("_quarto.yml"))["book"]
    listed = re.findall(r"nbs/[\w./-]+\.ipynb", json.dumps([book["chapters"], book["appendices"]]))
    assert listed == [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS]


@each_notebook
def test_outputs_are_stored_and_free_of_errors(path):
    for cell in cells(path, "code"):
        assert all(output["output_type"] != "error" for output in cell["outputs"]), source(cell)
        if re.search(r"^#\| *label: *(fig|tbl)-", source(cell), re.M):
            assert cell["outputs"], source(cell)


@each_notebook
def test_figures_and_tables_have_captions(path):
    for cell in cells(path, "code"):
        if label := re.search(r"^#\| *label: *(fig|tbl)-\S+", source(cell), re.M):
            assert re.search(rf"^#\| *{label[1]}-cap: *\S", source(cell), re.M), label[0]


UNSEEN = re.compile(r"^#\| *(export|hide|code-fold: *true)\b", re.M)  # left out, folded, or shown as an API table


@each_notebook
def test_prose_leads(path):
    if path.stem.startswith("9"):
        pytest.skip("a reference page of the workshop")
    shown = [cell for cell in cells(path, "code") if not UNSEEN.search(source(cell))]
    prose, code = (sum(words(source(cell)) for cell in found) for found in (cells(path, "markdown"), shown))
    assert prose >= 0.8 * code


@each_notebook
def test_no_text_has_slipped_into_code(path):
    assert [source(cell)[:80] for cell in cells(path, "code") if re.search(r"^# #+ ", source(cell), re.M)] == []


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size < 500_000


@each_notebook
def test_title_section_label_and_badge(path):
    title = next((source(cell) for cell in cells(path, "markdown")), "")
    assert re.match(r"# \S.* \{#sec-[\w-]+\}\n", title), title[:80]
    assert re.findall(r"https://colab\.research\.google\.com/(github[^)\s]+)", title) == [
        f"{BLOB}/nbs/{path.name}".replace(".com", "", 1)
    ]


@each_notebook
def test_colab_installs_what_exists(path):
    "The hidden cell that prepares Colab installs from the repository; there is no package of this name elsewhere."
    found = [source(cell) for cell in cells(path, "code") if "/content" in source(cell)]
    command = f"! [ -e /content ] && pip install -Uqq git+{SETTINGS['git_url']}"
    assert found == [f"#| hide\n#| eval: false\n{command}"]


DIRECTIVES = {
    "default_exp",
    "export",
    "exports",
    "hide",
    "slow",
    "eval: false",
    "echo: false",
    "label",
    "fig-cap",
    "fig-alt",
    "tbl-cap",
    "code-fold",
}


@each_notebook
def test_directives_are_the_agreed_ones(path):
    for cell in cells(path, "code"):
        for line in re.findall(r"^#\|\s*(.+?)\s*$", source(cell), re.M):
            assert line in DIRECTIVES or re.split(r":|\s", line)[0] in DIRECTIVES - {
                "export",
                "exports",
                "hide",
                "slow",
            }, line


def filtered(path):
    "A notebook's text behind the book's filter, which is fed as Quarto feeds it when it renders the book."
    sys.path.insert(0, str(ROOT / "scripts"))
    import book_filter

    os.chdir(path.parent)
    sys.stdin, out = io.StringIO(path.read_text(encoding="utf-8")), io.StringIO()
    with contextlib.redirect_stdout(out):
        book_filter.main()
    return out.getvalue()


@pytest.fixture(scope="module")
def fresh():
    "Runs each call in a process of its own, forked from one that has imported what chapters import."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdev.cli", "matplotlib.pyplot", "sklearn.linear_model", "ff_research.recipes"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


@each_notebook
def test_the_books_filter_takes_it(path, fresh):
    "It executes exported cells and any other that holds an import, which must therefore not need the cells between."
    book = json.loads(fresh.submit(filtered, path).result(timeout=300))
    shown = [source(cell) for cell in book["cells"]]
    assert any(re.match(r"# \S.* \{#sec-", text) for text in shown) and (book["nbformat"], book["nbformat_minor"]) >= (
        4,
        0,
    )
    assert not any(re.search(r"^#\| *(export|hide)\b", text, re.M) for text in shown)
    assert yaml.safe_load(shown[0].strip("-\n"))["description"], "no line `> …` under the title"
    assert all(cell["cell_type"] in ("markdown", "code", "raw") and "metadata" in cell for cell in book["cells"])


@each_notebook
def test_citations_are_in_the_bibliography(path):
    known = set(re.findall(r"^@\w+\{([^,\s]+),", read("references.bib"), re.M))
    cited = set(
        re.findall(r"(?<![\w.])@([\w-]+)", without_code("\n".join(source(cell) for cell in cells(path, "markdown"))))
    )
    assert {key for key in cited if not re.match(r"(sec|fig|tbl|eq)-", key)} <= known


def test_cross_references_lead_somewhere():
    text = "\n".join(source(cell) for path in NOTEBOOKS for kind in ("markdown", "code") for cell in cells(path, kind))
    targets = re.findall(r"\{#((?:sec|fig|tbl|eq)-[\w-]+)", text) + re.findall(r"^#\| *label: *(\S+)", text, re.M)
    assert len(targets) == len(set(targets)), "a label is used twice"
    assert set(re.findall(r"(?<!\w)@((?:sec|fig|tbl|eq)-[\w-]+)", text)) <= set(targets)


# The package

# Imports run down this list, never up. `results`, `statistics`, `claims` and `plots` know nothing of networks.
ORDER = [
    "cli",
    "benchmark",
    "leaderboard",
    "cost",
    "measures",
    "searches",
    "automata",
    "jax_ff",
    "sequences",
    "continual",
    "graphs",
    "graphlayers",
    "jobs",
    "runs",
    "recipes",
    "speed",
    "pipeline",
    "stacked",
    "memory",
    "reach",
    "transfer",
    "pretext",
    "diagnostics",
    "cka",
    "entropy",
    "collaboration",
    "callbacks",
    "estimator",
    "models",
    "modelfiles",
    "forms",
    "patterns",
    "generator",
    "recurrent",
    "sleep",
    "blackbox",
    "localclassifiers",
    "channelwise",
    "selfcontrast",
    "distance",
    "convolution",
    "predictions",
    "architecture",
    "readout",
    "backprop",
    "training",
    "loops",
    "schedules",
    "checkpoints",
    "learners",
    "optimisers",
    "strategies",
    "network",
    "layers",
    "objectives",
    "labels",
    "streams",
    "goodness",
    "data",
    "converters",
    "splits",
    "files",
    "checks",
]
APART = {
    "results": {"data"},
    "plots": {"data", "results"},
    "statistics": {"results"},
    "claims": {"results", "statistics"},
}


def imports(path):
    "Modules that a file imports anywhere in it: `ff_research.x` for the package's own, the top name for others."
    for node in ast.walk(
        ast.parse(path.read_text(encoding="utf-8"), feature_version=tuple(map(int, SETTINGS["min_python"].split("."))))
    ):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = (
                [f"ff_research.{node.module}"] if node.module else [f"ff_research.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.ImportFrom):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "ff_research"
                else [node.module]
            )
        else:
            continue
        yield from (
            ".".join(name.split(".")[:2]) if name.startswith("ff_research.") else name.split(".")[0] for name in names
        )


@each_module
def test_development_tools_are_not_imported(path):
    assert not {"nbdev", "fastcore", "execnb", "IPython"} & set(imports(path))


@each_module
def test_imports_run_one_way(path):
    mine, modules = path.stem, {module.stem for module in MODULES}
    own = {name.split(".")[1] for name in imports(path) if name.startswith("ff_research.")} & modules
    if mine == "__init__":  # names for type checkers; nothing is loaded before it is used
        loaded = "import sys, ff_research; print([m for m in sys.modules if m.startswith(('ff_research.', 'torch'))])"
        assert subprocess.check_output([sys.executable, "-c", loaded], cwd=ROOT, text=True) == "[]\n"
    elif mine in APART:
        assert own <= APART[mine]
    else:
        assert mine in ORDER, f"{mine} has no place in ORDER (tests/test_book.py) yet"
        assert own <= {*ORDER[ORDER.index(mine) + 1 :], *(APART if ORDER.index(mine) < ORDER.index("readout") else ())}


def private_names(path):
    "Private names of the package's modules that a file imports."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ff_research"):
            yield from (alias.name for alias in node.names if re.match(r"_[a-z]", alias.name))


@each_module
def test_no_private_name_crosses_a_module(path):
    "Neither imported nor reached through a module that is."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {module.stem for module in MODULES}
    reached = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if re.match(r"_[a-z]", node.attr)
    ]
    assert [*private_names(path), *reached] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/*.py")), ids=lambda path: path.stem)
def test_tests_import_no_private_name(path):
    assert list(private_names(path)) == []


@each_module
def test_public_definitions_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# Links and text


def test_links_follow_settings():
    book = yaml.safe_load(read("_quarto.yml"))["book"]
    assert SETTINGS["git_url"] == f"https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}"
    assert (book["repo-url"], book["repo-branch"]) == (SETTINGS["git_url"], SETTINGS["branch"])
    assert book["site-url"] == SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]
    for name in ("README.md", "CONTRIBUTING.md"):
        links = [
            link
            for link in re.findall(r"https://(?:[\w-]+\.)?github\.(?:com|io)/[^\s)>\]]+", read(name))
            if SETTINGS["repo"] in link
        ]
        assert all(link.startswith((SETTINGS["git_url"], book["site-url"])) for link in links), links
    assert f"{SETTINGS['git_url']}/actions/workflows/test.yml/badge.svg" in read("README.md")


def test_readme_links_work_everywhere():
    "GitHub and package indexes show the README, so its links are absolute; those into the repository lead to files."
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(read("README.md")))
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    into = [
        link.split(f"/{kind}/{SETTINGS['branch']}/")[1]
        for link in links
        for kind in ("blob", "tree")
        if f"/{kind}/{SETTINGS['branch']}/" in link
    ]
    assert into and [name for name in into if not (ROOT / name).exists()] == []


def test_readme_example_gives_what_it_shows(tmp_path):
    "Up to one point, since a machine may round otherwise."
    ((code, shown),) = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", read("README.md"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    number = r"\d+\.\d+"
    assert re.sub(number, "", done.stdout) == re.sub(number, "", shown)
    pairs = zip(re.findall(number, done.stdout), re.findall(number, shown))
    assert all(abs(float(a) - float(b)) <= 1 for a, b in pairs), done.stdout


def test_the_chapter_on_recipes_says_what_each_file_holds():
    chapter = "".join(map(source, cells(ROOT / "nbs" / "901_recipes.ipynb", "markdown")))
    missing = [path.name for path in CONFIGS if f"**{path.name}.**" not in chapter]
    assert CONFIGS and not missing


def test_commands_that_the_texts_name_exist():
    pytest.importorskip("ff_research.cli", reason="no command line yet")
    texts = [read(name) for name in ("README.md", "CONTRIBUTING.md", "Makefile")] + [
        source(cell) for path in NOTEBOOKS for cell in cells(path, "markdown")
    ]
    named = set(re.findall(r"ff-research ([a-z]+)(?=[ `\n])", "\n".join(texts)))
    shown = subprocess.run(
        [sys.executable, "-c", "from ff_research.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", shown)] == []


MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|Users|root|tmp|work|mnt|var)/\w+")
LEFTOVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b")


def texts():
    """What is tracked, or would be: a file's text, and of a notebook its sources and the text of its outputs (pictures
    are noise).
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in sorted(set(listed.stdout.split("\0")) - {""}):
        path = ROOT / name
        if not path.is_file():
            continue
        if path.suffix != ".ipynb":
            yield name, path.read_text(encoding="utf-8", errors="ignore")
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield name, source(cell)
            for output in cell.get("outputs", []):
                for text in (
                    output.get("text", ""),
                    output.get("data", {}).get("text/plain", ""),
                    output.get("traceback", ""),
                ):
                    yield name, "".join(text)


def test_no_machine_paths_and_no_leftovers():
    assert [
        (name, hit[0])
        for name, text in texts()
        for pattern in (MACHINE_PATH, LEFTOVER)
        for hit in [pattern.search(text)]
        if hit
    ] == []
