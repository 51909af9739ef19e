"""Checkpoints: a killed run resumes to the bits of an unbroken one; unusable ones are refused and lose nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ff_research.backprop import train_backprop
from ff_research.checkpoints import History, read_checkpoint, save_checkpoint
from ff_research.data import centred, hold_out, load
from ff_research.layers import Layer
from ff_research.network import Network
from ff_research.objectives import symba
from ff_research.strategies import STRATEGIES
from ff_research.streams import written_out
from ff_research.training import identity, train

LABELS = STRATEGIES["label_embedding"]
EPOCHS, BATCHES = 4, 15  # of digits, in batches of 100

RUNS = {
    "together": dict(method="train", seed=7, objective=None),
    "greedy": dict(method="train", seed=7, schedule="greedy", optimizer="adamw"),
    "redrawn": dict(
        method="train", seed=7, schedule="greedy", optimizer="adamw", epochs=(1, 3), strategy="self_contrastive"
    ),
    "bf16": dict(method="train", seed=7, precision="bf16", optimizer="adamw"),
    "backprop": dict(method="train_backprop", seed=7),
}


def run(name, checkpoint=None, strategy=None):
    "One of the runs above: its weights, what objectives and strategy remember, and its history without the seconds."
    options = dict(epochs=EPOCHS, checkpoint=checkpoint, progress=False, device="cpu", precision="fp32") | RUNS[name]
    forward, strategy = (
        options.pop("method") == "train",
        strategy or STRATEGIES[options.pop("strategy", "label_embedding")](10),
    )
    network = Network([64, 40, 40], full_gradient=forward)
    if forward:
        history = train(network, load("digits"), strategy, peer=0.03, **options)
    else:
        history = train_backprop(network, load("digits"), **options)
    return network.state_dict(), [epoch | dict(seconds=0) for epoch in history.epochs]


# What the child process does: the same run, and an end without warning at the given moment.
CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv[4]))
sys.path.insert(0, sys.argv[5])
import test_resume
name, where, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def die_at(function):
    def counted(*arguments, **options):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted
strategy = None
if where == "write":            # in the middle of writing a checkpoint
    os.fsync = die_at(os.fsync)
elif name == "backprop":        # in the middle of an epoch
    from ff_research.backprop import EndToEnd
    EndToEnd.learn = die_at(EndToEnd.learn)
else:                           # between two layers of a batch
    from ff_research.learners import FusedLearner
    FusedLearner.learn = die_at(FusedLearner.learn)
test_resume.run(name, sys.argv[6])
"""


def killed(name, where, count, checkpoint):
    "Run in a process of its own until it is killed."
    arguments = [name, where, count, torch.get_num_threads(), os.path.dirname(__file__), checkpoint]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1] == b[1]


@pytest.fixture(scope="module")
def unbroken():
    return {name: run(name) for name in RUNS}


@pytest.mark.parametrize(
    "name, where, count, stored",
    [
        pytest.param("together", "step", 5, 0, marks=pytest.mark.slow),  # in the first epoch
        ("together", "step", 2 * (3 * BATCHES + 4) + 1, 3),  # in the last, between two layers of one batch
        pytest.param("together", "write", 2, 1, marks=pytest.mark.slow),  # while the second epoch is being written
        ("greedy", "step", EPOCHS * BATCHES + 2 * BATCHES + 3, EPOCHS + 2),  # in the second layer
        pytest.param("redrawn", "step", 2 * BATCHES + 3, 2, marks=pytest.mark.slow),
        ("bf16", "step", 2 * (2 * BATCHES + 9), 2),
        ("backprop", "step", 2 * BATCHES + 1, 2),
    ],
)
def test_killed_and_resumed_equals_unbroken(unbroken, tmp_path, name, where, count, stored):
    path = tmp_path / "run.safetensors"
    killed(name, where, count, path)
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    assert int(header["__metadata__"]["epoch"]) == stored
    assert same(run(name, path), unbroken[name])


@pytest.mark.slow
def test_killed_twice(unbroken, tmp_path):
    path = tmp_path / "run.safetensors"
    killed("together", "step", 2 * (BATCHES + 3), path)
    killed("together", "step", 2 * (BATCHES + 8), path)
    assert same(run("together", path), unbroken["together"])


def test_finished_run_comes_back_at_once(unbroken, tmp_path):
    path = tmp_path / "run.safetensors"
    run("together", path)
    before = path.read_bytes()
    assert same(run("together", path), unbroken["together"]) and path.read_bytes() == before


def test_the_comparison_would_notice(unbroken):
    "Runs that differ in the seed alone are told apart."
    other = dict(RUNS["together"])
    RUNS["other seed"] = other | dict(seed=8)
    try:
        assert not same(run("other seed"), unbroken["together"])
    finally:
        del RUNS["other seed"]


# Unusable checkpoints

QUIET = dict(epochs=2, precision="fp32", device="cpu", progress=False)


@pytest.fixture
def path(tmp_path, digits):
    "A good checkpoint of a run of two epochs."
    path = tmp_path / "run.safetensors"
    train(Network([64, 20, 20]), digits, LABELS(10), checkpoint=path, **QUIET)
    return path


def refused(path, digits, network=None, images=None, **changes):
    "What `train` says to this checkpoint; neither the file nor the network may change."
    network = network or Network([64, 20, 20])
    bits, weights = path.read_bytes(), [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError) as error:
        train(network, images or digits, changes.pop("strategy", LABELS(10)), checkpoint=path, **QUIET | changes)
    assert path.read_bytes() == bits and all(torch.equal(p, w) for p, w in zip(network.parameters(), weights))
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda bits: b"",
        lambda bits: bits[:5],
        lambda bits: bits[:-1],
        lambda bits: bits[: len(bits) // 2],
        lambda bits: bits + b"more",
        lambda bits: b"\xff" * 8 + bits[8:],
        lambda bits: b"PK\x03\x04" + bits[4:],
        lambda bits: os.urandom(1000),
    ],
    ids=["empty", "5 bytes", "one byte short", "half", "too long", "huge header", "zip", "noise"],
)
def test_damaged(path, digits, damage):
    path.write_bytes(damage(path.read_bytes()))
    assert "damaged, or no checkpoint of ff_research" in refused(path, digits)


def test_safetensors_of_another_program(path, digits):
    save_file({"weight": torch.zeros(3)}, path)
    assert "no checkpoint of ff_research" in refused(path, digits)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr=0.5), "lr is 0.001 there, 0.5 here"),
        (dict(seed=1), "seed is 0 there, 1 here"),
        (dict(epochs=1), "epochs is 2 there, 1 here"),
        (dict(optimizer="adamw"), "optimizer is 'sgd' there, 'adamw' here"),
        (dict(schedule="greedy"), "schedule is 'together' there, 'greedy' here"),
        (dict(precision="bf16"), "precision is 'fp32' there, 'bf16' here"),
        (dict(objective=symba()), "symba_loss"),
    ],
)
def test_of_another_run(path, digits, changes, message):
    said = refused(path, digits, **changes)
    assert "belongs to another run" in said and message in said and len(said) < 600


def test_of_another_network(path, digits):
    others = (Network([64, 30, 20]), {}), (Network([64, 20, 20]), dict(peer=0.1)), (Network([64, 20, 20, 20]), {})
    for network, options in others:
        said = refused(path, digits, network, **options)
        assert "belongs to another run: network is" in said and "\\n" not in said


def test_of_other_first_weights(tmp_path, digits):
    "The run in the file goes on, and says so; a network of the same seed, or the trained one itself, is no other."
    path = tmp_path / "run.safetensors"
    options = dict(lr_schedule="constant", checkpoint=path, progress=False, device="cpu", precision="fp32")
    network, again, other = Network([64, 20], seed=1), Network([64, 20], seed=1), Network([64, 20], seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(network, digits, LABELS(10), epochs=1, **options)
        train(network, digits, LABELS(10), epochs=2, **options)
        train(again, digits, LABELS(10), epochs=2, **options)
    with pytest.warns(UserWarning, match="began with other weights than this one .another seed.*move the file away"):
        train(other, digits, LABELS(10), epochs=2, **options)
    assert torch.equal(other.layers[0].weight, network.layers[0].weight)


def test_of_another_option_of_ones_own_layer(tmp_path, digits):
    "The layer's class has no extra_repr, so that both networks print alike."

    class Scaled(Layer):
        def __init__(self, units, slope=1.0):
            super().__init__()
            self.units, self.slope = units, slope
            self.weight = torch.nn.Parameter(torch.ones(units, 64) / 64)

        def forward(self, x):
            return (self.slope * written_out(x).flatten(1) @ self.weight.T).relu()

    options = dict(epochs=1, checkpoint=tmp_path / "run.safetensors", progress=False, device="cpu", precision="fp32")
    train(Network([Scaled(8)]), digits, LABELS(10), **options)
    train(Network([Scaled(8)]), digits, LABELS(10), **options)
    with pytest.raises(ValueError, match="belongs to another run: options is .*'slope': 1.0.*'slope': 2.0"):
        train(Network([Scaled(8, slope=2.0)]), digits, LABELS(10), **options)


def test_of_other_images(path, digits):
    "The same data set with fewer training images, as in tuning, is another run."
    said = refused(path, digits, images=hold_out(digits, 300))
    there, here = said.split(" there, ")
    assert "'digits, 1437 training images [1, 8, 8], content " in there
    assert here.startswith("'digits, 1137 training images [1, 8, 8], content ")


def test_of_the_same_images_with_another_content(path, digits):
    "Labels that were repaired, one pixel that differs: the checkpoint knows what it learned from."
    other = digits.x_train.clone()
    other[700, 0, 3, 3] += 1
    for changed in (replace(digits, y_train=digits.y_train.flip(0)), replace(digits, x_train=other)):
        assert "data is 'digits, 1437 training images [1, 8, 8], content " in refused(path, digits, images=changed)
    same = replace(digits, x_train=digits.x_train.clone())
    assert identity(same) == identity(digits)
    middle = centred(digits)  # computed: known by what it was computed from, and by its labels
    assert identity(middle) == identity(replace(middle, x_train=middle.x_train + 1e-7)) != identity(digits)
    assert identity(middle) != identity(replace(middle, y_train=middle.y_train.flip(0)))
    assert identity(middle) != identity(centred(replace(digits, x_train=other)))


def test_of_backpropagation(path, digits):
    with pytest.raises(ValueError, match="method is 'ff' there, 'backprop' here"):
        train_backprop(Network([64, 20, 20]), digits, checkpoint=path, **QUIET)


def test_shapes_that_do_not_match(path, digits):
    "The settings agree, a tensor does not."
    tensors = load_file(path)
    settings = settings_of(path)
    tensors["network.layers.1.weight"] = torch.zeros(3, 3)
    generators = {name: torch.Generator() for name in ("generator", "torch")}
    for name, generator in generators.items():
        generator.set_state(tensors.pop(name))
    save_checkpoint(path, tensors, 0, settings, History(), generators)
    assert "belongs to another network: network.layers.1.weight" in refused(path, digits)


def settings_of(path):
    with open(path, "rb") as f:
        return json.loads(json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]["settings"])


# Places that cannot be written


def test_unwritable_place_is_found_before_training(tmp_path, digits):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    network = Network([64, 20, 20])
    start = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(OSError, match="cannot write the checkpoint .*file/run.safetensors"):
        train(network, digits, LABELS(10), checkpoint=tmp_path / "file" / "run.safetensors", **QUIET)
    with pytest.raises(ValueError, match="folder.safetensors"):
        train(network, digits, LABELS(10), checkpoint=tmp_path / "folder.safetensors", **QUIET)
    assert all(torch.equal(p, w) for p, w in zip(network.parameters(), start))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path, digits):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint"):
            train(Network([64, 20, 20]), digits, LABELS(10), checkpoint=tmp_path / "run.safetensors", **QUIET)
    finally:
        tmp_path.chmod(0o700)


def test_missing_folders_are_made(tmp_path, digits):
    path = tmp_path / "a" / "b" / "run.safetensors"
    train(Network([64, 20]), digits, LABELS(10), checkpoint=path, **QUIET)
    assert [p.name for p in path.parent.iterdir()] == ["run.safetensors"]


def test_full_disk_keeps_the_old_checkpoint(path):
    bits, settings = path.read_bytes(), settings_of(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond this
        with pytest.raises(OSError, match="cannot write the checkpoint"):
            save_checkpoint(path, dict(big=torch.zeros(10_000)), 2, settings, History(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == bits and [p.name for p in path.parent.iterdir()] == [path.name]
    assert read_checkpoint(path, settings, 2)[0] == 2


def test_a_flipped_bit_is_noticed(path, digits):
    "The format checks lengths, not numbers; the checksum in the header does."
    bits = bytearray(path.read_bytes())
    bits[-9] ^= 4
    path.write_bytes(bits)
    assert "its numbers are not those that were written" in refused(path, digits)
