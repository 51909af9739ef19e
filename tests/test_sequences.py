"""Sequences: text to windows and back, own predictions against closed forms, locality, learning, empty texts."""

import json

import pytest
import torch
from torch.nn import functional as F

import ff_research as ff
from ff_research.network import Network
from ff_research.readout import linear_probe
from ff_research.results import published
from ff_research.sequences import (
    ALPHABET,
    TEXT_RUNS,
    OwnPredictions,
    TextRun,
    count_missed,
    decode,
    encode,
    fables,
    go_on,
    run_text,
    text_images,
    windows,
)
from ff_research.strategies import STRATEGIES
from ff_research.training import train

QUIET = dict(progress=False, precision="fp32", device="cpu")
ADAM = dict(optimizer="adamw", lr=3e-3, lr_schedule="constant", weight_decay=0.0, batch_size=50)
VERSE = "the cat sat on the mat, and the rat ran to the hat. "


@pytest.fixture(scope="module")
def verse():
    return text_images(VERSE * 12, train=4, test=2)


def made(images, widths=(20, 20), seed=0):
    return Network([images.num_pixels, *widths], seed=seed)


# Text


def test_a_network_that_wrote_its_own_negatives_comes_back(verse, tmp_path):
    network = made(verse)
    train(
        network,
        verse,
        OwnPredictions(verse.num_classes),
        1,
        batch_size=50,
        progress=False,
        device="cpu",
        precision="fp32",
    )
    ff.save(network, tmp_path / "a.safetensors")
    again = ff.load_network(tmp_path / "a.safetensors")
    assert torch.equal(again.strategy.weight, network.strategy.weight)


@pytest.mark.parametrize("wrong", [dict(method="backprob"), dict(method="ff", source="techer")])
def test_a_misspelt_run_is_refused(wrong):
    with pytest.raises(ValueError, match="did you mean"):
        TextRun("mine", **wrong)


def test_there_and_back():
    assert decode(encode("It's a Dog\n\nAnd -- a  cat; 7 of them.")) == "its a dog and a cat; of them."
    assert len(ALPHABET) == 30 and encode("a.").tolist() == [0, 29]


@pytest.mark.parametrize("text", ["", "   \n", "123, 456."])
def test_an_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="holds no letter"):
        encode(text)
    with pytest.raises(ValueError, match="expected a text to learn from"):
        text_images(text)


def test_windows_hold_ten_characters_and_the_next():
    codes = encode(VERSE * 4)
    x, y = windows(codes)
    assert list(x.shape) == [2 * 90, 1, 10, 30] and x.sum((2, 3)).unique() == 10 * 255 % 256 or x.float().sum() > 0
    text = decode(codes)
    for place in (0, 89, 90):
        start = place // 90 * 100 + place % 90
        assert decode(x[place, 0].argmax(1)) == text[start : start + 10] and ALPHABET[y[place]] == text[start + 10]
    assert (x.float().sum((1, 3)) == 255).all()


def test_texts_that_are_too_short_are_refused(verse):
    with pytest.raises(ValueError, match="expected 49600 for 248 strings of 100"):
        text_images(VERSE)
    with pytest.raises(ValueError, match="at least one string of 100"):
        windows(encode(VERSE))
    assert len(verse.y_train) == 360 and len(verse.y_test) == 180 and verse.num_classes == 30


def test_the_book_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="gutenberg.org/ebooks/21"):
        fables(tmp_path)
    (tmp_path / "aesop.txt").write_text("The Fox\n\nA fox.\nRan.\n\n\nThe Hen\n\nSlept.", encoding="utf-8")
    assert decode(encode(fables(tmp_path))) == "a fox. ran. slept."


# Counts


def test_counts_are_counted(verse):
    most = verse.y_train.bincount().argmax()
    assert torch.equal(count_missed(verse, 0), verse.y_test != most)
    assert (
        count_missed(verse, 9).float().mean()
        < count_missed(verse, 1).float().mean()
        < count_missed(verse, 0).float().mean()
    )
    with pytest.raises(ValueError, match="0 to 10"):
        count_missed(verse, 11)


# Negatives


@pytest.mark.parametrize("source", ["teacher", "random", "free"])
def test_negatives_are_windows_of_their_kind(verse, source):
    network, strategy = made(verse), OwnPredictions(30, source)
    strategy.begin(network, verse.x_train[:2])
    x, y = verse.x_train[:60], verse.y_train[:60]
    z = strategy.generate(x, y, network, torch.Generator().manual_seed(0))
    real = ff.data.as_float(x)
    assert z.shape == real.shape and (z.sum(3) == 1).all()
    if source == "free":
        assert torch.equal(z[:3, :, :-1], real[:3, :, 1:])  # the first step of each text: nine real characters
    else:
        assert torch.equal(z[:, :, :-1], real[:, :, :-1])
        changed = (z != real).any(3)[:, 0, -1].float().mean()
        assert changed == 1 if source == "random" else changed > 0.5


def test_the_softmax_takes_the_gradient_step_of_cross_entropy(verse):
    network, strategy = made(verse), OwnPredictions(30, rate=2.0)
    strategy.begin(network, verse.x_train[:2])
    x = ff.data.as_float(verse.x_train[:40])
    before = torch.cat([torch.zeros(40, 1, 1, 30), x[:, :, :-1]], 2)
    f, target = strategy.seen(network, before), x[:, 0, -1].argmax(1)
    weight = torch.zeros(20, 30, requires_grad=True)
    step = torch.autograd.grad(F.cross_entropy(f @ weight, target), weight)[0]
    strategy.learn(network, x)
    torch.testing.assert_close(strategy.weight, -2.0 / 20 * step)


def test_sources_have_names():
    with pytest.raises(ValueError, match="did you mean 'teacher'"):
        OwnPredictions(30, "techer")
    assert "own_predictions" not in STRATEGIES  # it reads texts, not any images


# Learning, alone


@pytest.mark.parametrize("source", ["teacher", "free"])
def test_it_learns_and_resumes_to_the_bit(verse, source, tmp_path):
    def weights(epochs, path=None):
        network, strategy = made(verse), OwnPredictions(30, source)
        train(network, verse, strategy, epochs, checkpoint=path, **ADAM, **QUIET)
        return network, torch.cat([p.flatten() for p in network.layers.parameters()])

    network, whole = weights(3)
    weights(1, tmp_path / "run")
    assert torch.equal(weights(3, tmp_path / "run")[1], whole)
    assert go_on(network, VERSE, 5).startswith(decode(encode(VERSE))) and network.strategy.weight.abs().sum() > 0


def test_the_network_learns_what_comes_next(verse):
    "The softmax learns along; many of its draws are right soon, and such pairs separate nothing."
    network, strategy = made(verse, (40, 40)), OwnPredictions(30)
    train(network, verse, strategy, 10, **ADAM, **QUIET)
    x, y = ff.data.as_float(verse.x_test), verse.y_test
    right = (strategy.predicted(network, x).argmax(1) == y).float().mean()
    assert right > 0.1 + (y == y.bincount().argmax()).float().mean()
    error = linear_probe(network, verse, neutral_label=False, precision="fp32", device="cpu")["test"]["layer_2"]
    assert error < 5


def test_no_layer_teaches_the_one_below(verse):
    "The first layer's weights after training do not depend on the second one's being there."

    def first(widths):
        network = made(verse, widths)
        for layer, seed in zip(network.layers, (1, 2)):
            torch.manual_seed(seed)
            torch.nn.init.normal_(layer.weight, std=0.1)
        strategy = OwnPredictions(30, "random")  # predictions of upper layers would choose other negatives
        train(network, verse, strategy, 2, **ADAM, **QUIET)
        return network.layers[0].weight

    assert torch.equal(first((20,)), first((20, 20)))


def test_go_on_needs_a_window(verse):
    network, strategy = made(verse), OwnPredictions(30)
    network.strategy = strategy
    strategy.begin(network, verse.x_train[:2])
    with pytest.raises(ValueError, match="expected 10 or more"):
        go_on(network, "too short"[:5])


# Rows


def test_rows(verse):
    for method in ("ff", "local_classifier", "backprop", "untrained", "window", "counts"):
        row = run_text(TextRun(f"verse-{method}", method, widths=(8, 8), epochs=1), verse)
        assert row["wrong"] and row["errors"]["test"] and row["data"]["train"] == 360
    assert TEXT_RUNS.keys() == {run.name for run in TEXT_RUNS.values()}
    for name, run in TEXT_RUNS.items():
        for row in published(name, part="sequences"):
            assert row["config"] == json.loads(json.dumps(run.identity()))
            assert row["commit"] and "dirty" not in row["commit"]
