"""`engine="ray"` on a real cluster of two CPUs: the rows of a sequence, also where a process is killed under way."""

import os
import subprocess
import sys
from concurrent.futures import BrokenExecutor
from functools import partial

import pytest

from ff_research.checks import execute
from ff_research.recipes import RECIPES
from ff_research.results import read_rows
from ff_research.jobs import run_many
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged

ray = pytest.importorskip("ray", reason="ray is not installed: pip install ff_research[ray]")

TINY = RECIPES["digits"].vary(name="tiny", widths=(30, 30), epochs=2, search=())
WHERE = dict(device="cpu", precision="fp32")
MINE = """
[mine]
like = "digits"
network = { widths = [30, 30] }
strategy = { name = "own_on_ray" }
schedule = { epochs = 1 }
"""
METHODS = """
import os
import signal
from pathlib import Path

from ff_research.strategies import LabelEmbeddingStrategy, register

HERE = Path(__file__).parent


@register
class Own(LabelEmbeddingStrategy):
    name, batches = "own_on_ray", 0

    def streams(self, *arguments):
        Own.batches += 1
        with (HERE / "batches").open("a") as f:
            f.write(".")
        if Own.batches == 40 and (HERE / "kill once").exists():
            (HERE / "kill once").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (HERE / "kill always").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().streams(*arguments)
"""


@pytest.fixture
def cluster(monkeypatch):
    "Two CPUs, and the address at which another program finds them. A busy machine may need several tries."
    for name, value in dict(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0").items():
        monkeypatch.setenv(name, value)
    quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=10**8)
    for left in (2, 1, 0):
        try:
            ray.init(num_cpus=2, **quiet)
            break
        except Exception as error:  # Ray has no class of its own for a start that takes longer than 30 s
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if not left:
                pytest.skip("three times Ray did not start within its 30 s; this machine is too busy")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def methods(tmp_path):
    path = tmp_path / "methods.py"
    path.write_text(METHODS)
    yield path
    STRATEGIES.pop("own_on_ray", None)


def of(row):
    "What a run has to give wherever it runs."
    keys = ("recipe", "seed", "config", "errors", "weights", "wrong", "data", "curves", "threads", "numerics")
    return {key: row[key] for key in keys}


def counted(folder):
    "How many batches were made since the last count."
    made = len((folder / "batches").read_text())
    (folder / "batches").unlink()
    return made


def equal_rows(folder, methods):
    "Twenty runs, one of which loses its process in its second epoch."
    jobs = [TINY, TINY.vary(name="own", strategy="own_on_ray")], range(10)
    one = {(name, seed): row for name, seed, row in run_many(*jobs, folder=folder / "one", progress=False, **WHERE)}
    batches = counted(folder)
    (folder / "kill once").touch()
    many = run_many(*jobs, engine="ray", module=methods, folder=folder / "many", **WHERE)
    first = next(many)
    assert len(read_rows(folder / "many" / f"{first[0]}.jsonl")) == 1  # a row is kept when it comes, not at the end
    found = {(name, seed): row for name, seed, row in (first, *many)}
    assert not (folder / "kill once").exists() and len(found) == 20
    assert {job: of(row) for job, row in found.items()} == {job: of(row) for job, row in one.items()}
    assert counted(folder) == batches + 40 - batches // 20  # the killed run went on from its first epoch
    assert [len(read_rows(folder / "many" / f"{name}.jsonl")) for name in ("tiny", "own")] == [10, 10]
    assert list((folder / "many" / "checkpoints").iterdir()) == []
    again = run_many(*jobs, engine="ray", module=methods, folder=folder / "many", **WHERE)
    assert {row for _, _, row in again} == {None} and not (folder / "batches").exists()


def own_errors(folder, methods):
    "An error of a run is raised as it is; a process that dies each time is told of; what was finished is kept."
    jobs = [RECIPES["pixels-digits"], TINY.vary(name="wild", lr=1e29)], [0]
    with pytest.raises(Diverged, match="epoch 1, layer 1") as told:
        list(run_many(*jobs, engine="ray", folder=folder / "wild", **WHERE))
    assert told.value.__cause__ is None and "ray" not in str(told.value)
    (folder / "kill always").touch()
    with pytest.raises(BrokenExecutor, match="lost"):
        own = TINY.vary(name="own", strategy="own_on_ray")
        list(run_many([own], [77], engine="ray", module=methods, folder=folder / "lost", **WHERE))


def from_the_command(folder, address):
    "Another program on the same cluster, with a recipe, a method and images of one's own, beside which it is called."
    (folder / "mine.toml").write_text(MINE)
    (folder / "kill always").unlink()
    images = "import ff_research as ff; from ff_research.data import save_npz as s; s(ff.load('digits'), 'mine.npz')"
    call = partial(subprocess.run, cwd=folder, capture_output=True, text=True, timeout=600)
    environment = os.environ | dict(RAY_ADDRESS=address)
    assert call([sys.executable, "-c", images]).returncode == 0
    command = [
        sys.executable,
        "-c",
        "from ff_research.cli import main; main()",
        "run",
        "mine.toml",
        "--engine",
        "ray",
        "--seeds",
        "2",
    ]
    command += ["--module", "methods.py", "--data", "mine.npz", "--device", "cpu"]
    done = call(command, env=environment)
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 0 and [line.split(":")[0] for line in lines] == [
        f"mine-on-mine, seed {seed}" for seed in (0, 1)
    ], done.stderr
    again = call(command, env=environment)
    assert again.stdout.count("is there already") == 2, again.stderr


@pytest.mark.slow
def test_a_cluster_gives_the_rows_of_a_sequence(cluster, methods, tmp_path):
    "In one test, since a cluster takes its time to start."
    execute(methods)
    equal_rows(tmp_path, methods)
    own_errors(tmp_path, methods)
    from_the_command(tmp_path, cluster)


def test_without_a_cluster_the_error_says_how_to_start_one(monkeypatch, tmp_path):
    def none(**options):
        raise ConnectionError("none")

    monkeypatch.setattr(ray, "init", none)
    with pytest.raises(ConnectionError, match="ray start --head"):
        list(run_many([TINY], [0], engine="ray", folder=tmp_path, **WHERE))


@pytest.mark.parametrize("options", [dict(engine="ray", workers=2), dict(resources=dict(num_cpus=2))])
def test_workers_and_resources_belong_to_one_engine_each(options, tmp_path):
    with pytest.raises(ValueError, match="workers are for engine='local'"):
        list(run_many([TINY], [0], folder=tmp_path, **options))
