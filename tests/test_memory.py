"""Memory: what a step holds, against closed forms; and training from disk, killed and resumed, against `train`."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from ff_research.convolution import conv
from ff_research.layers import FFLinear
from ff_research.memory import backprop_step, ff_step, mapped, on_disk, peak_bytes, train_on_disk
from ff_research.network import Network
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged, train

WIDTHS = [64, 50, 40, 30]
SETTINGS = dict(epochs=2, seed=3, batch_size=128, progress=False)


def deep(folder=None, widths=WIDTHS):
    "The layers of `Network(widths, seed=1)`, in memory or in a folder."
    generator = torch.Generator().manual_seed(1)
    layers = (FFLinear(a, b, generator=generator) for a, b in zip(widths, widths[1:]))
    return Network(list(layers if folder is None else on_disk(layers, folder)))


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def told(history):
    return repr([{key: v for key, v in epoch.items() if key != "seconds"} for epoch in history.epochs])  # NaN is NaN


# What a step holds


def test_peak_is_what_was_held_at_once():
    w = torch.zeros(300, 500)

    def work():
        a = torch.zeros(1000)
        b = torch.zeros(2000)
        del a, b
        c = [torch.zeros(300, 500), torch.zeros(2500)]
        del c

    assert peak_bytes(work, [w]) == {"activity": 4 * 3000, "gradients": 4 * 300 * 500}
    with pytest.raises(ValueError, match="no memory"):
        peak_bytes(lambda: None)


@pytest.fixture(scope="module")
def peaks():
    "Peaks of each way to train, at two depths."

    def measured(depth):
        x, y = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
        ways = {
            "ff": lambda n: ff_step(n, STRATEGIES["label_embedding"](10), x, y),
            "ff, micro-batches": lambda n: ff_step(n, STRATEGIES["label_embedding"](10), x, y, micro_batch=10),
            "backprop": lambda n: backprop_step(n, x, y),
            "segments": lambda n: backprop_step(n, x, y, segments=4),
            "micro-batches": lambda n: backprop_step(n, x, y, micro_batch=10),
        }
        found = {}
        for way, step in ways.items():
            network = Network([64] + [300] * depth, seed=1)
            work = step(network)
            found[way] = peak_bytes(work, [p for layer in network.layers for p in layer.parameters()])
        return found

    return measured(4), measured(16)


def test_forward_forward_is_flat_in_depth_and_backprop_is_not(peaks):
    shallow, deep = peaks
    rows = 100 * 300 * 4
    assert deep["ff"]["activity"] < 1.05 * shallow["ff"]["activity"]
    assert deep["ff"]["gradients"] <= 300 * 4  # a bias
    assert deep["backprop"]["activity"] - shallow["backprop"]["activity"] >= 12 * 2 * rows  # h, and h brought to scale
    assert deep["backprop"]["gradients"] >= 15 * 300 * 300 * 4
    assert deep["segments"]["activity"] < 0.6 * deep["backprop"]["activity"]
    assert deep["micro-batches"]["activity"] < 0.2 * deep["backprop"]["activity"]
    assert deep["ff, micro-batches"]["activity"] < deep["ff"]["activity"]


@pytest.mark.parametrize("options", [dict(segments=3), dict(micro_batch=30), dict(segments=2, micro_batch=50)])
def test_cheaper_steps_move_the_weights_alike(options):
    x, y = torch.rand(100, 1, 8, 8), torch.arange(100) % 10
    one, two = deep(), deep()
    for network, how in ((one, {}), (two, options)):
        torch.manual_seed(0)  # of the head
        for step in [backprop_step(network, x, y, **how)] * 3:
            step()
    start = deep()
    for a, b, c in zip(one.layers.parameters(), two.layers.parameters(), start.layers.parameters()):
        assert (a - b).abs().max() < 1e-3 * (a - c).abs().max()


# From disk


def test_a_mapped_tensor_is_its_file(tmp_path):
    mapped(tmp_path / "t", (3, 4)).copy_(torch.arange(12.0).view(3, 4))
    assert torch.equal(mapped(tmp_path / "t", (3, 4)), torch.arange(12.0).view(3, 4))
    with pytest.raises(ValueError, match="48 bytes"):
        mapped(tmp_path / "t", (4, 4))


CASES = {
    "labels": ("label_embedding", {}),
    "peers, adamw": ("image_mixing", dict(peer=0.03, optimizer="adamw", epochs=[2, 1, 1])),
    "heads, no negatives": ("mono_forward", dict(lr_schedule="constant")),
    "a head on the network": ("hard_mining", dict(epochs=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_greedy_schedule_in_memory(name, digits, tmp_path):
    strategy, options = CASES[name]
    one, other = deep(), deep(tmp_path)
    expected = train(
        one, digits, STRATEGIES[strategy](10), schedule="greedy", precision="fp32", device="cpu", **SETTINGS | options
    )
    found = train_on_disk(other, digits, STRATEGIES[strategy](10), folder=tmp_path, **SETTINGS | options)
    assert same(one, other) and told(found) == told(expected) and not other.training
    again = deep(tmp_path)
    assert told(train_on_disk(again, digits, STRATEGIES[strategy](10), folder=tmp_path, **SETTINGS | options)) == told(
        found
    )
    assert same(one, again) and not (tmp_path / "activities").exists()


def test_convolutions_with_their_statistics(digits, tmp_path):
    one, plain = conv((1, 8, 8), (8, 16), seed=1), conv((1, 8, 8), (8, 16), seed=1)
    other = Network(list(on_disk(plain.layers, tmp_path)), **plain.options())
    train(one, digits, STRATEGIES["mono_forward"](10), schedule="greedy", precision="fp32", device="cpu", **SETTINGS)
    train_on_disk(other, digits, STRATEGIES["mono_forward"](10), folder=tmp_path, **SETTINGS)
    assert same(one, other)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_memory import SETTINGS, STRATEGIES, deep, train_on_disk
from ff_research import memory
from ff_research.data import load

calls = 0

def killing(function):
    def counted(*arguments):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted

memory.Meter.add, memory.Kept.negative = killing(memory.Meter.add), killing(memory.Kept.negative)
labels = STRATEGIES["label_embedding"](10)
train_on_disk(deep({folder!r}), load("digits"), labels, folder={folder!r}, **SETTINGS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(5, 30)])  # in the first epoch; later, in the middle of the second layer
def test_a_killed_run_goes_on_to_the_same_bits(calls, digits, tmp_path):
    one = deep()
    train(one, digits, STRATEGIES["label_embedding"](10), schedule="greedy", precision="fp32", device="cpu", **SETTINGS)
    for call in calls:
        program = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path), call=call)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    other = deep(tmp_path)
    train_on_disk(other, digits, STRATEGIES["label_embedding"](10), folder=tmp_path, **SETTINGS)
    assert same(one, other)


LARGER = """
import os, resource, sys
sys.path.insert(0, {tests!r})
import torch
from dataclasses import replace
from test_memory import STRATEGIES, deep, train, train_on_disk
from ff_research.data import load

torch.set_num_threads(1)
images = load("digits")
images = replace(images, x_train=images.x_train[:200], y_train=images.y_train[:200])
settings, widths = dict(epochs=1, batch_size=50, progress=False), [64] + [1200] * 12
how = dict(strategy=STRATEGIES["label_embedding"](10), images=images)
train_on_disk(deep({folder!r} + "/warm", [64, 20]), **how, folder={folder!r} + "/warm", **settings)
data = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + 56 * 2**20,) * 2)  # 12 layers of 5.8 MB, twice with momentum
network = deep({folder!r} + "/big", widths)
history = train_on_disk(network, **how, folder={folder!r} + "/big", **settings)
print("from disk:", len(history))
try:
    network = deep(widths=widths)
    train(network, **how, schedule="greedy", precision="fp32", device="cpu", **settings)
    print("fitted")
except (MemoryError, RuntimeError) as error:
    print("in memory:", "can't allocate memory" in str(error), flush=True)
os._exit(0)  # whatever still wants memory on the way out has none
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's RLIMIT_DATA")
def test_a_network_larger_than_memory(tmp_path):
    program = LARGER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory is given back, and not kept for later
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=returned, timeout=200)
    assert done.stdout.splitlines() == ["from disk: 12", "in memory: True"], done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "network, strategy, options, said",
    [
        (deep, "all_labels", {}, "many negatives"),
        (deep, "layer_wise", {}, "draws anew"),
        (lambda: Network([FFLinear(64, 64), FFLinear(64, 40, reads=(-2,))]), "label_embedding", {}, "no iterations"),
        (deep, "label_embedding", dict(epochs=[1, 2]), "one for each of the 3 layers"),
        (deep, "label_embedding", dict(optimizer="adam"), "optimizer"),
    ],
)
def test_what_cannot_be_done_from_disk_is_said(network, strategy, options, said, digits, tmp_path):
    with pytest.raises(ValueError, match=said):
        train_on_disk(network(), digits, STRATEGIES[strategy](10), folder=tmp_path, **SETTINGS | options)


def test_a_folder_belongs_to_one_run(digits, tmp_path):
    train_on_disk(deep(tmp_path), digits, STRATEGIES["label_embedding"](10), folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="seed is 3 there, 4 here"):
        other = SETTINGS | dict(seed=4)
        train_on_disk(deep(tmp_path), digits, STRATEGIES["label_embedding"](10), folder=tmp_path, **other)
    with pytest.raises(ValueError, match="bytes"):
        deep(tmp_path, [64, 51, 40, 30])


def test_a_run_that_diverges_says_where(digits, tmp_path):
    with pytest.raises(Diverged, match="layer 1"):
        train_on_disk(deep(), digits, STRATEGIES["label_embedding"](10), folder=tmp_path, **SETTINGS, lr=1e30)
