"""Callbacks, early stopping, Ctrl-C, longer runs, and warnings of runs that learn nothing."""

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from ff_research.backprop import train_backprop
from ff_research.callbacks import EarlyStopping, own_error
from ff_research.checkpoints import History
from ff_research.data import hold_out, load
from ff_research.loops import Event, Pause
from ff_research.network import Network, activities
from ff_research.objectives import Objective, hinton, symba
from ff_research.readout import head_error, per_label_goodness, scores_errors
from ff_research.recipes import RECIPES
from ff_research.runs import fit, images_of, network_of
from ff_research.strategies import STRATEGIES
from ff_research.streams import Streams
from ff_research.training import Diverged, train

CPU = dict(precision="fp32", device="cpu")
QUIET = CPU | dict(progress=False)
LABELS = STRATEGIES["label_embedding"]
NAMES = [name for name, cls in STRATEGIES.items() if cls.__module__ == "ff_research.strategies"]


def small():
    return Network([64, 30, 30])


def weights(network):
    return torch.cat([t.detach().flatten().float() for t in network.state_dict().values()])


def learn(network, images, callbacks=(), epochs=3, method="ff", strategy=None, **options):
    "Train by either method."
    options = QUIET | dict(epochs=epochs, callbacks=callbacks) | options
    if method == "backprop":
        return train_backprop(network, images, **options)
    return train(network, images, strategy or LABELS(10), **options)


each_method = pytest.mark.parametrize("method", ["ff", "backprop"])


class Seen:
    "Keeps what it is told."

    def __init__(self):
        self.events, self.ends, self.begun = [], [], 0

    def on_train_begin(self, network, images):
        self.begun += 1

    def on_epoch_end(self, event):
        self.events.append(copy.copy(event))
        assert not any(module.training for module in event.network.modules())
        assert event.losses is event.history.epochs[-1]["loss"] and len(event.history) == event.epoch

    def on_train_end(self, event):
        self.ends.append(event)


# What a callback is told


@each_method
def test_events(digits, method):
    seen, network = Seen(), small()
    history = learn(network, digits, [seen], method=method)
    assert [(e.epoch, e.epochs) for e in seen.events] == [(1, 3), (2, 3), (3, 3)]
    assert all(e.network is network and e.images is not None and e.precision == "fp32" for e in seen.events)
    assert seen.begun == len(seen.ends) == 1 and seen.ends[0].epoch == 3
    layers = [1, 2] if method == "ff" else [1]
    assert all(e.layers == layers and len(e.separation) == len(layers) for e in seen.events)
    assert not history.stopped and not history.interrupted and history.whole() is history


def test_layers_of_an_event_follow_the_schedule(digits):
    seen = Seen()
    learn(small(), digits, [seen], epochs=(1, 2), schedule="greedy")
    assert [e.layers for e in seen.events] == [[1], [2], [2]] and all(len(e.g_pos) == 1 for e in seen.events)


@each_method
def test_callbacks_and_after_epoch_in_order(digits, method):
    told = []

    class One:
        def on_epoch_end(self, event):
            told.append(("callback", event.epoch))

    learn(small(), digits, [One()], method=method, after_epoch=lambda e, n: told.append(("after", e)), epochs=2)
    assert told == [("callback", 1), ("after", 0), ("callback", 2), ("after", 1)]


@each_method
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_draws_and_modes_of_callbacks_are_their_own(digits, method, precision):
    class Nosy:
        def on_epoch_end(self, event):
            torch.rand(7)
            np.random.rand(3)
            event.network.train()
            activities(event.network, digits.x_test[:5])

    networks = small(), small()
    for network, callbacks in zip(networks, ([], [Nosy()])):
        learn(network, digits, callbacks, method=method, precision=precision, after_epoch=lambda e, n: torch.rand(2))
    assert torch.equal(*map(weights, networks))


@each_method
def test_stop_ends_the_run(digits, method, tmp_path):
    class Stop:
        def on_epoch_end(self, event):
            event.stop() if event.epoch == 2 else None

    networks, path = (small(), small(), small()), tmp_path / "run.safetensors"
    history = learn(networks[0], digits, [Stop()], epochs=9, method=method, lr_schedule="constant", checkpoint=path)
    assert len(history) == 2 and history.stopped
    learn(networks[1], digits, epochs=2, method=method, lr_schedule="constant")
    assert torch.equal(weights(networks[0]), weights(networks[1]))
    before = path.read_bytes()
    again = learn(networks[2], digits, [], epochs=9, method=method, lr_schedule="constant", checkpoint=path)
    assert again.stopped and len(again) == 2 and path.read_bytes() == before, "a run that was stopped stays stopped"
    assert torch.equal(weights(networks[0]), weights(networks[2]))


def test_on_train_begin_may_hold_images_out(digits):
    class Fewer:
        def on_train_begin(self, network, images):
            return hold_out(images, 400)

        def on_epoch_end(self, event):
            assert len(event.images.y_train) == len(digits.y_train) - 400

    networks = small(), small()
    learn(networks[0], digits, [Fewer()])
    learn(networks[1], hold_out(digits, 400))
    assert torch.equal(*map(weights, networks))


@pytest.mark.parametrize(
    "callbacks, said",
    [
        (EarlyStopping(), r"expected a list, \[EarlyStopping"),
        ([EarlyStopping], "holds the class EarlyStopping: make one"),
        ([print], "has no on_epoch_end.*goes into after_epoch"),
        ([3], "holds 3, which has no on_epoch_end"),
        ("abc", "expected a list"),
    ],
)
@each_method
def test_what_is_no_callback(digits, callbacks, said, method):
    network = small()
    before = weights(network)
    with pytest.raises(ValueError, match=said):
        learn(network, digits, callbacks, method=method)
    assert torch.equal(before, weights(network))


def test_an_error_of_a_callback_is_not_swallowed(digits, tmp_path):
    class Faulty:
        def on_epoch_end(self, event):
            if event.epoch == 2:
                raise KeyError("mine")

    network, path = small(), tmp_path / "run.safetensors"
    with pytest.raises(KeyError, match="mine"):
        learn(network, digits, [Faulty()], checkpoint=path)
    assert not network.training
    networks = small(), small()
    learn(networks[0], digits, checkpoint=path)
    learn(networks[1], digits)
    assert torch.equal(*map(weights, networks)), "the epoch it stumbled in is repeated"


# The error on held-out images


@pytest.mark.parametrize("name", sorted(NAMES))
def test_own_error_is_the_readout_that_the_network_brings(digits, name):
    network, strategy = small(), STRATEGIES[name](10)
    learn(network, digits, strategy=strategy, epochs=1)
    error = own_error(network, digits, **CPU)
    if strategy.contrasts_labels:
        assert error == per_label_goodness(network, digits, **CPU)
    elif name in ("mono_forward", "local_classifier", "channel_competition"):  # layers with class scores of their own
        assert error == scores_errors(network, digits, **CPU)["sum"]
    else:
        assert 5 < error < 60, "a ridge probe of the second layer"


def test_own_error_of_a_head_and_of_its_precision(digits):
    network = small()
    learn(network, digits, method="backprop")
    assert own_error(network, digits, **CPU) == head_error(network, digits, **CPU)
    learn(network, digits)  # a head is still there, but it is no longer what training was about
    assert own_error(network, digits, **CPU) == per_label_goodness(network, digits, **CPU)
    pairwise = small()
    learn(pairwise, digits, method="backprop", strategy=None, epochs=1)
    assert own_error(pairwise, digits, **CPU) == head_error(pairwise, digits, **CPU)


def test_a_probe_of_few_images_keeps_all_classes_of_a_sorted_set(digits):
    order = digits.y_train.argsort()
    sorted_ = replace(digits, x_train=digits.x_train[order], y_train=digits.y_train[order])
    network = small()
    learn(network, digits, strategy=STRATEGIES["image_mixing"](10), epochs=2)
    seen = []

    class Spied:
        def __getattr__(self, name):
            return getattr(network, name)

    from ff_research import callbacks

    usual = callbacks.linear_probe
    try:
        callbacks.linear_probe = lambda n, few, **o: seen.append(few.y_train.unique().tolist()) or usual(n, few, **o)
        own_error(network, sorted_, most=300, **CPU)
    finally:
        callbacks.linear_probe = usual
    assert seen == [list(range(10))]


# Early stopping


def reading(*errors):
    "A stand-in for a read-out: these errors, one a call."
    left = iter(errors)

    def read(network, images):
        return next(left)

    return read


@pytest.mark.parametrize(
    "errors, patience, every, ends, best",
    [
        ((5, 4, 4, 4), 2, 1, 4, 2),  # equal is no progress
        ((5, 4, 3, 2, 1), 1, 1, 5, 5),
        ((1, 2, 3), 2, 1, 3, 1),
        ((9, 8, 9, 7, 8, 9), 2, 1, 6, 4),
        ((5, 6), 1, 3, 6, 3),
        ((math.inf, 5, 6), 1, 1, 3, 2),
    ],
)
def test_patience(digits, errors, patience, every, ends, best):
    stopping, kept, network = EarlyStopping(patience, every, reading(*errors)), {}, small()
    options = dict(epochs=ends, lr_schedule="constant", after_epoch=lambda e, n: kept.update({e + 1: weights(n)}))
    history = learn(network, digits, [stopping], **options)
    assert len(history) == ends and stopping.best_epoch == best and stopping.best == min(errors)
    assert torch.equal(weights(network), kept[best]) and list(stopping.errors.values()) == list(errors)
    assert history.stopped == (max(stopping.errors) - best >= patience * every)


def test_held_out_images_are_not_trained_on(digits):
    networks, held = (small(), small()), hold_out(digits, 300)
    stopping = EarlyStopping(9)
    learn(networks[0], digits, [stopping], epochs=3)
    kept = []
    learn(networks[1], held, after_epoch=lambda e, n: kept.append(per_label_goodness(n, held, **CPU)))
    assert list(stopping.errors.values()) == kept
    given = EarlyStopping(9, images=held)
    learn(small(), held, [given])
    assert given.errors == stopping.errors, "images of one's own: nothing more is held out"


def test_the_test_images_are_never_read(digits):
    spoiled = replace(digits, x_test=digits.x_test * 0, y_test=digits.y_test * 0)
    seen = [EarlyStopping(9), EarlyStopping(9)]
    for images, stopping in zip((digits, spoiled), seen):
        learn(small(), images, [stopping])
    assert seen[0].errors == seen[1].errors


@pytest.mark.parametrize("patience, every", [(0, 1), (1, 0)])
def test_impossible_patience(patience, every):
    with pytest.raises(ValueError, match="expected at least 1"):
        EarlyStopping(patience, every)


def test_nan_cannot_be_compared(digits):
    with pytest.raises(ValueError, match="after epoch 1 is NaN"):
        learn(small(), digits, [EarlyStopping(read=lambda network, images: math.nan)])


def test_a_callback_can_be_used_again(digits):
    stopping = EarlyStopping(9)
    learn(small(), digits, [stopping])
    first = dict(stopping.errors)
    learn(small(), digits, [stopping])
    assert stopping.errors == first


@pytest.mark.parametrize("name", ["hard_mining", "mono_forward", "image_mixing"])
def test_everything_that_was_learned_comes_back(digits, name):
    "Weights, an objective's projection, the strategy's head."
    stopping, kept, network = EarlyStopping(1, read=reading(2, 1, 3)), {}, small()
    keep = lambda e, n: kept.update({e + 1: copy.deepcopy(n.state_dict())})  # noqa: E731
    learn(network, digits, [stopping], strategy=STRATEGIES[name](10), epochs=9, after_epoch=keep)
    found = network.state_dict()
    assert found.keys() == kept[2].keys() and all(torch.equal(found[key], t) for key, t in kept[2].items())
    assert any(not torch.equal(found[key], t) for key, t in kept[3].items())


# Killed and resumed

STOPPED = {
    "ff": dict(method="ff", lr=0.01, lr_schedule="constant", epochs=12),
    "mixing": dict(method="ff", lr=0.01, lr_schedule="constant", epochs=12, name="image_mixing"),
    "greedy": dict(method="ff", schedule="greedy", lr=0.01, epochs=(4, 6)),
    "backprop": dict(method="backprop", lr=0.1, lr_schedule="constant", epochs=12),
}


def stopped_run(name, checkpoint=None):
    "A run that stops early: its weights, the errors, its history, and the best epoch."
    options = dict(STOPPED[name])
    strategy = STRATEGIES[options.pop("name", "label_embedding")](10)
    network, stopping = small(), EarlyStopping(patience=1, every=2)
    images = load("digits")
    few = replace(images, name="few", x_train=images.x_train[:300], y_train=images.y_train[:300])
    history = learn(network, few, [stopping], strategy=strategy, checkpoint=checkpoint, **options)
    return weights(network), stopping.errors, [epoch | dict(seconds=0) for epoch in history.epochs], history.stopped


CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_callbacks
name, where, count, path = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
def die_at(function):
    def counted(*arguments, **options):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted
if where == "write":
    os.fsync = die_at(os.fsync)
else:
    from ff_research.callbacks import EarlyStopping
    setattr(EarlyStopping, where, die_at(getattr(EarlyStopping, where)))
test_callbacks.stopped_run(name, path)
"""


@pytest.fixture(scope="module")
def unbroken():
    torch.set_num_threads(1)
    found = {name: stopped_run(name) for name in STOPPED}
    assert any(stopped for *_, stopped in found.values()), "some of them stop early"
    return found


@pytest.mark.parametrize(
    "name, where, count",
    [
        pytest.param("ff", "on_epoch_end", 2, marks=pytest.mark.slow),
        pytest.param("ff", "state_dict", 3, marks=pytest.mark.slow),
        ("ff", "write", 3),
        pytest.param("ff", "on_train_end", 0, marks=pytest.mark.slow),
        pytest.param("mixing", "on_epoch_end", 3, marks=pytest.mark.slow),
        ("greedy", "on_epoch_end", 3),
        pytest.param("backprop", "write", 3, marks=pytest.mark.slow),
        pytest.param("backprop", "on_epoch_end", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_stops_at_the_same_epoch(unbroken, tmp_path, name, where, count):
    path = tmp_path / "run.safetensors"
    arguments = [os.path.dirname(__file__), name, where, str(count), str(path)]
    child = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    for _ in range(2):  # resumed, and then found complete
        found = stopped_run(name, path)
        assert torch.equal(found[0], unbroken[name][0]) and found[1:] == unbroken[name][1:]


@pytest.mark.parametrize(
    "callbacks",
    [[], [EarlyStopping(3)], [EarlyStopping(2, every=2)], [EarlyStopping(2, read=reading(1))], 2 * [EarlyStopping(2)]],
    ids=["none", "patience", "every", "read", "two"],
)
def test_another_early_stopping_is_another_run(digits, tmp_path, callbacks):
    path = tmp_path / "run.safetensors"
    learn(small(), digits, [EarlyStopping(2)], epochs=2, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to another run.*(callbacks|data) is"):
        learn(small(), digits, callbacks, epochs=2, checkpoint=path)
    assert path.read_bytes() == before


def test_other_held_out_images_are_another_run(digits, tmp_path):
    path, held = tmp_path / "run.safetensors", hold_out(digits, 100)
    learn(small(), held, [EarlyStopping(2, images=held)], epochs=2, checkpoint=path)
    other = replace(held, y_test=held.y_test.flip(0))
    with pytest.raises(ValueError, match="callbacks is"):
        learn(small(), held, [EarlyStopping(2, images=other)], epochs=2, checkpoint=path)


def test_a_logger_may_come_and_go(digits, tmp_path):
    path, seen = tmp_path / "run.safetensors", Seen()
    learn(small(), digits, [Seen()], epochs=2, checkpoint=path)
    learn(small(), digits, [], epochs=2, checkpoint=path)
    learn(small(), digits, [seen], epochs=2, checkpoint=path)
    assert seen.events == [] and len(seen.ends) == 1


def test_a_checkpoint_without_callbacks_is_what_it_was(digits, tmp_path):
    path = tmp_path / "run.safetensors"
    learn(small(), digits, epochs=1, checkpoint=path)
    header = header_of(path)
    assert set(header["__metadata__"]) == {"epoch", "settings", "history", "crc"}
    assert "callbacks" not in json.loads(header["__metadata__"]["settings"])


def header_of(path):
    with open(path, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))


@pytest.mark.parametrize(
    "told",
    [
        "no JSON",
        "[]",
        '{"stopped": 1, "states": [{}]}',
        '{"stopped": false}',
        '{"stopped": false, "states": []}',
        '{"stopped": false, "states": [{"errors": 3}]}',
        '{"stopped": false, "states": [{"errors": [[1, "x"]]}]}',
        '{"stopped": false, "states": [{"errors": []}]}',
        '{"stopped": false, "states": [[]]}',
        '{"stopped": false, "states": [{}, {}]}',
    ],
)
def test_a_damaged_state_is_refused(digits, tmp_path, told):
    path = tmp_path / "run.safetensors"
    learn(small(), digits, [EarlyStopping(5)], epochs=2, checkpoint=path)
    bits = path.read_bytes()
    size = int.from_bytes(bits[:8], "little")
    header = json.loads(bits[8 : 8 + size])
    header["__metadata__"]["callbacks"] = told
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits[8 + size :])
    network = small()
    before = weights(network)
    with pytest.raises(ValueError, match="run.safetensors.*damaged"):
        learn(network, digits, [EarlyStopping(5)], epochs=2, checkpoint=path)
    assert torch.equal(weights(network)[: len(before)], before)


# Ctrl-C


class Interrupting:
    "A strategy's streams that are interrupted at a batch, by a signal or by an exception."

    def __init__(self, at, how="signal"):
        self.left, self.how, self.kind = itertools.count(at, -1), how, LABELS(10)
        self.usual, self.kind.streams = self.kind.streams, self.streams

    def streams(self, *arguments):
        if next(self.left) == 0:
            if self.how == "exception":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return self.usual(*arguments)


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_ctrl_c_leaves_a_usable_network_and_the_history(digits, how):
    network, seen, unbroken = small(), Seen(), small()
    before = signal.getsignal(signal.SIGINT)
    kind = Interrupting(2 * 15 + 4, how).kind
    with pytest.warns(UserWarning, match="interrupted after 2 of 9 epochs.*last complete step"):
        history = learn(network, digits, [seen], epochs=9, strategy=kind, lr_schedule="constant")
    assert history.interrupted and len(history) == 2 and len(seen.ends) == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert not any(module.training for module in network.modules())
    whole = learn(unbroken, digits, epochs=3, lr_schedule="constant")
    assert [e | dict(seconds=0) for e in history.epochs] == [e | dict(seconds=0) for e in whole.epochs[:2]]
    assert 0 <= per_label_goodness(network, digits, **CPU) <= 100
    with pytest.raises(KeyboardInterrupt):
        history.whole()


def test_the_weights_are_those_of_the_last_complete_step(digits):
    "The signal comes within a step; it ends before the run does."
    found = []
    for steps in (15 + 5, None):
        network, kind, count = small(), LABELS(10), itertools.count(1)
        usual = kind.streams

        def streams(*arguments, usual=usual, count=count, steps=steps):
            n = next(count)
            if steps is None and n == 15 + 6:
                raise KeyboardInterrupt  # between steps
            return usual(*arguments)

        kind.streams = streams
        if steps:
            from ff_research.learners import FusedLearner

            calls, learned = itertools.count(1), FusedLearner.learn

            def interrupted(self, *arguments, learned=learned, calls=calls, steps=steps):
                if next(calls) == 2 * steps - 1:  # the first of two layers, in the middle of a step
                    signal.raise_signal(signal.SIGINT)
                return learned(self, *arguments)

            FusedLearner.learn = interrupted
        try:
            with pytest.warns(UserWarning, match="interrupted"):
                learn(network, digits, epochs=4, strategy=kind)
        finally:
            if steps:
                FusedLearner.learn = learned
        found.append(weights(network))
    assert torch.equal(*found)


@each_method
def test_ctrl_c_before_an_epoch_is_complete_passes(digits, method):
    network = small()

    class First:
        def on_epoch_end(self, event):
            raise AssertionError("no epoch is complete")

    kind = Interrupting(3).kind
    if method == "backprop":
        from ff_research.backprop import EndToEnd

        usual, calls = EndToEnd.learn, itertools.count()

        def learned(self, *arguments):
            if next(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            return usual(self, *arguments)

        EndToEnd.learn = learned
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(network, digits, [First()], method=method, strategy=kind)
    finally:
        if method == "backprop":
            EndToEnd.learn = usual
    assert not network.training


def test_ctrl_c_in_a_callback_and_a_resumed_run(digits, tmp_path):
    class Pressed:
        def on_epoch_end(self, event):
            if event.epoch == 3 and not event.history.interrupted and self.on:
                raise KeyboardInterrupt

    pressed, path, networks = Pressed(), tmp_path / "run.safetensors", (small(), small())
    pressed.on = True
    with pytest.warns(UserWarning, match="interrupted after 3 of 5"):
        assert len(learn(networks[0], digits, [pressed], epochs=5, checkpoint=path)) == 3
    pressed.on = False
    assert len(learn(networks[0], digits, [pressed], epochs=5, checkpoint=path)) == 5
    learn(networks[1], digits, epochs=5)
    assert torch.equal(*map(weights, networks))


def test_best_weights_come_back_after_ctrl_c(digits):
    stopping, network, kept = EarlyStopping(9, read=reading(1, 2)), small(), []
    kind = Interrupting(2 * 12 + 3).kind  # 1,137 images are left: 12 batches
    with pytest.warns(UserWarning, match="interrupted after 2"):
        learn(network, digits, [stopping], epochs=9, strategy=kind, after_epoch=lambda e, n: kept.append(weights(n)))
    assert torch.equal(weights(network), kept[0])


def test_a_second_ctrl_c_does_not_wait():
    passed = []
    with pytest.raises(KeyboardInterrupt):
        with Pause():
            signal.raise_signal(signal.SIGINT)
            passed.append(1)
            signal.raise_signal(signal.SIGINT)
            passed.append(2)
    assert passed == [1]


def test_ctrl_c_is_left_alone_where_it_is_ignored_or_in_other_threads(digits):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Pause() as pause:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            pause()
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    thread = threading.Thread(target=lambda: found.append(learn(small(), digits, epochs=1)))
    thread.start()
    thread.join()
    assert len(found[0]) == 1


def test_no_row_comes_from_an_interrupted_run(monkeypatch, digits):
    recipe = RECIPES["digits"].vary(widths=(20, 20), epochs=4)
    calls = itertools.count()

    def after(epoch, network):
        if next(calls) == 1:
            raise KeyboardInterrupt

    images = images_of(recipe)
    with pytest.warns(UserWarning, match="interrupted"), pytest.raises(KeyboardInterrupt):
        fit(recipe, network_of(recipe, images), images, 0, after_epoch=after, progress=False, **CPU)


# Longer than planned


@pytest.mark.parametrize(
    "method, short, long, options",
    [
        ("ff", 2, 5, dict(lr_schedule="constant")),
        ("ff", 2, 5, dict(lr_schedule="constant", optimizer="adamw", strategy="hard_mining")),
        ("ff", 2, 6, {}),  # cool_down has not begun to fall
        ("ff", (2, 1), (2, 3), dict(schedule="greedy", lr_schedule="constant")),
        ("ff", 2, 4, dict(schedule="own", lr_schedule="constant")),
        ("backprop", 2, 5, dict(lr_schedule="constant")),
        ("pairwise", 2, 5, dict(lr_schedule="constant")),
    ],
)
def test_a_longer_run_has_the_bits_of_one_planned_so_long(digits, tmp_path, method, short, long, options):
    options, found = dict(options), []
    name = options.pop("strategy", "label_embedding")
    if options.get("schedule") == "own":
        options["schedule"] = lambda layers, epochs: torch.ones(epochs, layers, dtype=torch.bool)

    def go(epochs, checkpoint=None):
        network, strategy = small(), STRATEGIES[name](10)
        if method == "ff":
            history = learn(network, digits, epochs=epochs, strategy=strategy, checkpoint=checkpoint, **options)
        else:
            more = dict(strategy=strategy) if method == "pairwise" else {}
            history = train_backprop(network, digits, epochs, checkpoint=checkpoint, **more, **options, **QUIET)
        return weights(network), [epoch | dict(seconds=0) for epoch in history.epochs]

    path = tmp_path / "run.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(short, path)
        found = [go(long, path), go(long)]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    again = go(long, path)
    assert torch.equal(again[0], found[0][0]) and again[1] == found[0][1]


def test_early_stopping_goes_on_in_a_longer_run(digits, tmp_path):
    path, seen = tmp_path / "run.safetensors", [EarlyStopping(9), EarlyStopping(9), EarlyStopping(9)]
    networks = small(), small(), small()
    constant = dict(lr_schedule="constant")
    learn(networks[0], digits, [seen[0]], epochs=2, checkpoint=path, **constant)
    learn(networks[1], digits, [seen[1]], epochs=5, checkpoint=path, **constant)
    learn(networks[2], digits, [seen[2]], epochs=5, **constant)
    assert seen[1].errors == seen[2].errors and torch.equal(weights(networks[1]), weights(networks[2]))


@pytest.mark.parametrize(
    "method, short, long, options, said",
    [
        ("ff", 3, 6, {}, "epochs is 3 there, 6 here.*lr_schedule='cool_down'"),
        ("ff", 2, 4, dict(lr_schedule="exponential"), "epochs is 2 there, 4 here.*lr_schedule='exponential'"),
        ("backprop", 3, 6, {}, "epochs is 3 there, 6 here"),
    ],
)
def test_a_run_that_would_be_another_asks_for_extend(digits, tmp_path, method, short, long, options, said):
    path, network = tmp_path / "run.safetensors", small()
    learn(network, digits, epochs=short, method=method, checkpoint=path, **options)
    bits, before = path.read_bytes(), weights(network)
    with pytest.raises(ValueError, match=f"run.safetensors belongs to another run: {said}.*extend=True") as error:
        learn(network, digits, epochs=long, method=method, checkpoint=path, **options)
    assert "lr_schedule='constant'" in str(error.value) and len(str(error.value)) < 700
    assert path.read_bytes() == bits and torch.equal(before, weights(network))
    with pytest.warns(UserWarning, match=f"a run of {short} epochs goes on after {short} as one of {long}"):
        history = learn(network, digits, epochs=long, method=method, checkpoint=path, extend=True, **options)
    assert len(history) == long and not torch.equal(weights(network), before)
    with pytest.raises(ValueError, match=rf"extended is \[{short}\] there"):  # not the run of so many epochs
        learn(small(), digits, epochs=long, method=method, checkpoint=path, **options)
    again = small()
    learn(again, digits, epochs=long, method=method, checkpoint=path, extend=True, **options)
    assert torch.equal(weights(again), weights(network))


@pytest.mark.parametrize("extend", [False, True])
def test_what_cannot_be_made_longer(digits, tmp_path, extend):
    path, constant = tmp_path / "run.safetensors", dict(lr_schedule="constant")
    learn(small(), digits, epochs=2, checkpoint=path, schedule="greedy", **constant)
    for options in (
        dict(epochs=3, schedule="greedy", **constant),  # layer 1 would have had a third epoch before layer 2
        dict(epochs=1, schedule="greedy", **constant),
        dict(epochs=3, schedule="greedy", lr=0.5, **constant),
        dict(epochs=4, schedule="together", **constant),
    ):
        with pytest.raises(ValueError, match="belongs to another run: "):
            learn(small(), digits, checkpoint=path, extend=extend, **options)


class Annealed(Objective):
    "A threshold that rises with the share of the epochs that are over."

    def goodness(self, h, s):
        return h.square().sum(1, keepdim=True)

    def loss(self, g, s):
        theta = 30 * (0.5 + self.progress)
        return torch.nn.functional.softplus(torch.cat([theta - g[: s.sizes[0]], g[s.sizes[0] :] - theta])).mean()


def test_an_objective_that_reads_its_progress_depends_on_the_end(digits, tmp_path):
    path, options = tmp_path / "run.safetensors", dict(lr_schedule="constant", objective=Annealed())
    learn(small(), digits, epochs=2, checkpoint=path, **options)
    with pytest.raises(ValueError, match="extend=True"):
        learn(small(), digits, epochs=4, checkpoint=path, **options)


@pytest.mark.parametrize("epochs", [10**12, -1, "3", None, [10**9, 1], {}])
def test_a_checkpoint_that_claims_strange_epochs(digits, tmp_path, epochs):
    path = tmp_path / "run.safetensors"
    learn(small(), digits, epochs=2, checkpoint=path, lr_schedule="constant")
    bits = path.read_bytes()
    size = int.from_bytes(bits[:8], "little")
    header = json.loads(bits[8 : 8 + size])
    settings = json.loads(header["__metadata__"]["settings"]) | dict(epochs=epochs)
    header["__metadata__"]["settings"] = json.dumps(settings)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits[8 + size :])
    with pytest.raises(ValueError, match="belongs to another run: epochs is"):
        learn(small(), digits, epochs=4, checkpoint=path, lr_schedule="constant", extend=True)


# A network that learns nothing


def said(digits, images=None, widths=(64, 100, 100), name="label_embedding", method="ff", **options):
    "The warnings of a run."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            network, strategy = Network(list(widths)), STRATEGIES[name](10)
            learn(network, images or digits, method=method, strategy=strategy, **options)
        except Diverged as error:
            return [str(error)]
    assert all(w.filename == __file__ for w in found), "a warning points at the caller"
    return [str(w.message) for w in found]


@pytest.mark.parametrize(
    "options, about",
    [
        (dict(objective=hinton(theta=1e6), lr=1e-9, epochs=5), "no layer's goodness has moved"),
        (dict(lr=0.1, epochs=20), "layer 1 is nearly silent"),
        (dict(lr=1e-9, name="masking", epochs=4), "no layer's goodness has moved"),
        (dict(lr=1e-9, name="mono_forward", epochs=3), "no layer has named classes better"),
        (dict(lr=0.0, method="backprop", epochs=3), "no layer has named classes better"),
        (dict(weight_decay=100.0, epochs=6), "layer 1 is nearly silent"),
    ],
)
def test_a_run_that_learns_nothing_says_so_once(digits, options, about):
    found = said(digits, **options)
    assert len(found) == 1 and about in found[0]
    assert all(word in found[0] for word in ("lr", "theta", "centred")), "the remedies"


@pytest.mark.parametrize("shade", [0, 1, 255])
def test_blank_images(digits, shade):
    blank = replace(digits, x_train=digits.x_train * 0 + shade)
    assert any("no layer has told positives from negatives" in text for text in said(digits, blank, epochs=3))


def test_labels_of_other_images(digits):
    order = torch.randperm(len(digits.y_train), generator=torch.Generator().manual_seed(0))
    found = said(digits, replace(digits, y_train=digits.y_train[order]), epochs=4)
    assert len(found) == 1 and "no layer has told positives from negatives" in found[0]


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("epochs", [1, 3])
def test_ordinary_runs_are_quiet(digits, name, epochs):
    assert said(digits, name=name, epochs=epochs) == []


@pytest.mark.parametrize("name", [r.name for r in RECIPES.values() if r.data == "digits" and r.schedule.epochs])
def test_published_recipes_on_digits_are_quiet(name):
    recipe = RECIPES[name]
    images = images_of(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(recipe, network_of(recipe, images), images, 0, progress=False, **CPU)


def test_curves_of_published_runs_are_above_chance():
    "What the warning would say of them, were they run again: their separations are published."
    from ff_research.results import published

    for row in published():
        separation = row.get("curves", {}).get("separation") or []
        values = [v for epoch in separation for v in epoch if v is not None]
        if row["config"]["method"] == "ff" and values and row["config"]["strategy"] != "adversarial":
            named = "scores" in row["errors"].get("test", {})  # the share of right answers, among ten classes
            assert max(values) > (0.14 if named else 0.53), row["recipe"]


# What is no strategy, network or objective


@pytest.mark.parametrize(
    "strategy, message",
    [
        ("label_embedding", r"is a name; pass STRATEGIES\['label_embedding'\]\(num_classes\)"),
        ("label_embeding", "unknown strategy 'label_embeding'; did you mean 'label_embedding'"),
        (LABELS, r"is a class; make one of it, LabelEmbeddingStrategy\(num_classes\)"),
        (None, "expected a Strategy"),
        (lambda x, y: x, "a class of your own derives from ff_research.Strategy"),
        (object(), "defines create_positive"),
    ],
)
def test_what_is_no_strategy(digits, strategy, message):
    network = small()
    before = weights(network)
    with pytest.raises(ValueError, match=message):
        train(network, digits, strategy, epochs=1, **QUIET)
    assert torch.equal(before, weights(network))
    if strategy is not None:
        with pytest.raises(ValueError, match=message):
            train_backprop(network, digits, 1, strategy=strategy, **QUIET)


@pytest.mark.parametrize(
    "network, objective, message",
    [
        ([64, 30], None, r"expected a Network, such as Network\(\[784"),
        (torch.nn.Linear(64, 3), None, "expected a Network"),
        (None, symba, r"objective=symba: expected an Objective; call it, symba\(\)"),
        (None, "hinton", "expected an Objective"),
        (None, [hinton(), symba], r"call it, symba\(\)"),
    ],
)
def test_what_is_no_network_or_objective(digits, network, objective, message):
    with pytest.raises(ValueError, match=message):
        train(network or small(), digits, LABELS(10), 1, objective=objective, **QUIET)


def test_numbers_of_numpy_are_numbers(digits, tmp_path):
    given = dict(epochs=np.int64(2), seed=np.int32(1), lr=np.float64(1e-3), batch_size=np.int64(100))
    for i, method in enumerate(("ff", "backprop")):
        networks, path = (Network(np.array([64, 30, 30])), small()), tmp_path / str(i)
        learn(networks[0], digits, method=method, checkpoint=path, **given)
        plain = dict(epochs=2, seed=1, lr=1e-3, batch_size=100)
        learn(networks[1], digits, method=method, checkpoint=path, **plain)
        assert torch.equal(*map(weights, networks)), "and one goes on from the other's checkpoint"


def test_event_and_history_stand_alone():
    event = Event(
        1, 2, None, None, History([dict(loss=[1.0], separation=[0.5], g_pos=[2.0], g_neg=[1.0], seconds=0.1)])
    )
    assert (event.losses, event.g_neg, event.seconds) == ([1.0], [1.0], 0.1) and not event.stopped
    event.stop()
    assert event.stopped and Streams is not None
