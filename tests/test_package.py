"""What users install: the sdist holds what building takes, the wheel package, recipes and published rows."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.package


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def build(kind, folder, out):
    "Call setuptools as pip does, without the network; give the archive's path."
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(out)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist of a copy of the tree, and the wheel built from the unpacked sdist, as on a user's machine."
    tmp = tmp_path_factory.mktemp("build")
    tree = tmp / "tree"
    tree.mkdir()
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "ff_research", tree / "ff_research", ignore=shutil.ignore_patterns("__pycache__"))
    published = tree / "ff_research" / "published"
    published.mkdir(exist_ok=True)
    (published / "probe.jsonl").write_text(json.dumps({"recipe": "probe"}) + "\n")
    sdist = build("sdist", tree, tmp)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (tmp / "unpacked").iterdir()
    return tree, source, build("wheel", source, tmp)


def test_sdist_holds_what_building_needs(built):
    tree, source, _ = built
    names = ["settings.ini", "setup.py", "README.md", "LICENSE", "constraints.txt"]
    assert [name for name in names if (source / name).read_bytes() != (tree / name).read_bytes()] == []


def test_wheel_holds_the_package_its_recipes_and_the_published_rows(built):
    tree, _, wheel = built
    files = {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for pattern in ("*.py", "py.typed", "claims.toml", "configs/*.toml", "published/*.jsonl", "published/*/*.jsonl")
        for path in (tree / "ff_research").glob(pattern)
    }
    assert {"ff_research/published/probe.jsonl", "ff_research/configs/papers.toml"} <= files.keys()
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if name.startswith("ff_research/")}
    assert inside == files


def test_metadata_follows_settings(built):
    cfg = settings()
    with zipfile.ZipFile(built[2]) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(info).decode())
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert (metadata["Name"].replace("-", "_"), metadata["Version"], metadata["Requires-Python"]) == (
        cfg["lib_name"],
        cfg["version"],
        ">=" + cfg["min_python"],
    )
    assert "MIT" in (metadata["License-Expression"] or metadata["License"])
    needs = metadata.get_all("Requires-Dist")
    plain = [need for need in needs if "extra ==" not in need]
    assert sorted(need.split(">")[0].replace("_", "-") for need in plain) == sorted(
        need.split(">")[0] for need in cfg["requirements"].split()
    )
    assert set(metadata.get_all("Provides-Extra")) == {"book", "onnx", "graph", "jax", "ray", "dev"}
    assert "ff-research = ff_research.cli:main" in entry_points


TRAIN = """
import ff_research as ff
images = ff.load("digits")
network = ff.Network([images.num_pixels, 60, 60])
strategy = ff.STRATEGIES["all_labels"](num_classes=images.num_classes)
ff.train(network, images, strategy, epochs=5, lr=3e-3, optimizer="adamw", progress=False)
ff.save(network, "digits.safetensors")
print(ff.__file__, ff.predict(network, images.x_test).tolist())
"""
PREDICT = """
import ff_research as ff
images = ff.load("digits")
network = ff.load_network("digits.safetensors")
print(ff.__file__, ff.predict(network, images.x_test).tolist())
"""


def test_from_the_wheel_a_model_is_trained_saved_and_used_elsewhere(built, tmp_path, digits):
    "In an empty folder, as in Colab: ten lines, then a fresh process that has nothing but the file."
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(built[2]) as archive:
        archive.extractall(site)
    said = []
    for program in (TRAIN, PREDICT):
        assert len(program.strip().splitlines()) <= 10
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] and said[0].startswith(str(site))
    guess = json.loads(said[1].split(" ", 1)[1])
    assert sum(g != y for g, y in zip(guess, digits.y_test.tolist())) < 0.15 * len(guess)


def test_lazy_names_are_the_modules_own():
    "Each name that a type checker sees is there, and is what its module calls so."
    import ff_research

    tree = ast.parse((ROOT / "ff_research" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    typed = {name: module for name, module in typed.items() if module.startswith("ff_research.")}
    assert sorted(typed) == sorted(ff_research.__all__) and set(typed) < set(dir(ff_research))
    for name, module in typed.items():
        assert getattr(ff_research, name) is getattr(importlib.import_module(module), name), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ff_research.trian  # noqa: B018


def test_versions_agree():
    import ff_research

    assert ff_research.__version__ == settings()["version"]
