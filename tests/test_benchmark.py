"""The benchmark: pairs in turn, the same answers from both of a pair, peers from a clone."""

import json

import pytest
import torch

from ff_research import benchmark, speed
from ff_research.data import load
from ff_research.network import Network
from ff_research.readout import label_goodness
from ff_research.strategies import STRATEGIES

PAIR = dict(ours=0.02, other=0.01, ratio=0.5, low=0.4, high=0.6, runs=3)


def test_compared_takes_medians_of_pairs_and_leaves_the_first_out():
    ours, other = iter([100.0, 1.0, 2.0, 4.0]), iter([1.0, 2.0, 2.0, 2.0])
    found = benchmark.compared(lambda: next(ours), lambda: next(other), runs=3)
    assert found == dict(ours=2.0, other=2.0, ratio=1.0, low=0.5, high=2.0, runs=3)


@pytest.mark.parametrize("classes", [3, 10])
def test_the_loop_over_labels_gives_what_the_library_gives(classes):
    x, network = benchmark.noise(30, 64, classes).x_train, Network([64, 20, 20, 20])
    options = dict(strategy=STRATEGIES["label_embedding"](classes), precision="fp32", device="cpu")
    ours = label_goodness(network, x, classes, **options)
    assert torch.allclose(ours, benchmark.by_a_loop(network, x, classes), rtol=1e-4)


def test_small_rows():
    rows = [
        *benchmark.prediction("fp32", 1, 40, (20, 20), (10,)),
        *benchmark.against_backprop("fp32", 1, ((20, 20),), 200),
        *benchmark.batches(runs=1, samples=200),
    ]
    assert [row["against"] for row in rows] == ["a loop over labels", "backprop", "DataLoader", "DataLoader"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    text = benchmark.table([row | {"precision": "fp32"} for row in rows])
    assert len(text.splitlines()) == 6 and "40 images, 10 classes" in text


def test_steps_are_those_of_speed(monkeypatch):
    timed = dict(share=0.5, low=0.4, high=0.6, step_ms=20.0, products_ms=10.0)
    for name in ("step_against_products", "step_against_convolutions"):
        monkeypatch.setattr(benchmark, name, lambda *given, **options: timed)
    rows = list(benchmark.steps("fp32", 3))
    assert len(rows) == 4 and all(row | PAIR == row for row in rows)
    assert speed.step_against_products((20, 20), 4, "fp32", runs=1, steps=1)["share"] > 0


@pytest.fixture
def small(monkeypatch):
    "Recipes with one that learns digits in a moment."
    from ff_research.recipes import RECIPES, recipe

    tiny = recipe("loewe").vary(data="digits", widths=(60, 60), epochs=8, lr=0.003)
    return RECIPES | {"loewe": tiny}


def test_time_to_an_error(small):
    found = benchmark.time_to("loewe", (60.0, 0.0), precision="fp32", recipes=small)
    assert found[60.0] > 0 and found[0.0] is None
    assert set(benchmark.time_to("loewe", (60.0,), precision="fp32", recipes=small)) == {60.0}


def test_idx_files_are_what_torchvision_reads(tmp_path):
    from torchvision.datasets import MNIST

    images = load("digits")
    benchmark.write_idx(images, tmp_path)
    theirs = MNIST(tmp_path, train=True)
    assert torch.equal(theirs.data, (images.x_train.flatten(0, 1)).to(torch.uint8))
    assert torch.equal(theirs.targets, images.y_train)


PROGRAM = """
import torch

class Layer(torch.nn.Linear):
    def train(self, x, y):
        for i in tqdm(range(self.num_epochs)):
            assert x.shape == y.shape == (30, 784)
        return x, y

class Net:
    def __init__(self, dims):
        self.layers = [Layer(dims[0], dims[1]).cuda()]

def overlay_y_on_x(x, y):
    return x.clone()
"""


def test_a_full_batch_program_is_timed_from_its_clone(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text(PROGRAM)
    monkeypatch.setattr(benchmark, "load", lambda name: benchmark.noise(30))
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    monkeypatch.setattr(torch.nn.Module, "cuda", torch.nn.Module.cuda)
    times = benchmark._full_batch(str(tmp_path), str(tmp_path), 2)
    assert len(times) == 3 and all(t > 0 for t in times)


def test_peers_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'loewe'"):
        benchmark.peer_times("lowe", tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a clone"):
        benchmark.peer_times("loewe", tmp_path)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    from ff_research.cli import main

    row = benchmark.line("step", "3 x 1000", "its bare products", PAIR)
    monkeypatch.setattr(benchmark, "BENCHES", {"steps": lambda precision, runs: [row], "batches": None})
    out = tmp_path / "bench.jsonl"
    assert main(["bench", "steps", "--precision", "fp32", "--out", str(out)]) in (0, None)
    assert "0.50 (0.40 to 0.60)" in capsys.readouterr().out
    kept = json.loads(out.read_text())
    assert kept["ratio"] == 0.5 and kept["precision"] == "fp32" and "device" in kept
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "step"])
    assert "did you mean 'steps'" in capsys.readouterr().err
