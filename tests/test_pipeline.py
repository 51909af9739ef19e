"""Layers in processes of their own: the weights of one process, bit for bit, and errors that say what is wrong."""

import pytest
import torch

from ff_research.convolution import conv
from ff_research.data import load
from ff_research.layers import FFLinear, Layer
from ff_research.network import Network
from ff_research.objectives import GoodnessObjective, symba
from ff_research.pipeline import in_processes, split, train_in_processes, train_pipeline
from ff_research.readout import per_label_goodness
from ff_research.strategies import STRATEGIES
from ff_research.training import Diverged, train

SETTINGS = dict(epochs=2, seed=3, batch_size=128, precision="fp32", device="cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def told(history):
    epochs = [{key: v for key, v in epoch.items() if key not in ("seconds", "busy", "cpu")} for epoch in history.epochs]
    return repr(epochs)  # NaN is NaN


def deep():
    return Network([64, 60, 50, 40, 30], seed=1)


CASES = {
    "label_embedding": (deep, "label_embedding", {}),
    "peers and collaboration": (deep, "label_embedding", dict(peer=0.03, collaboration="previous", lr=3e-3)),
    "another objective, adamw": (deep, "class_confusion", dict(objective=symba(), optimizer="adamw")),
    "all labels": (deep, "all_labels", dict(lr_schedule="constant")),
    "class scores": (deep, "mono_forward", {}),
    "no labels": (deep, "masking", {}),
    "triangle": (lambda: Network([64, 60, 50, 40], triangle=True), "image_mixing", {}),
    "bf16": (deep, "label_embedding", dict(precision="bf16")),
    "convolutions": (lambda: conv((1, 8, 8), (8, 16), seed=1), "mono_forward", dict(epochs=1)),
}


MISTAKES = [
    (deep, "hard_mining", {}, "reads the network's"),
    (deep, "layer_wise", {}, "drawn anew"),
    (deep, "label_embedding", dict(collaboration="all"), "goodness travels up only"),
    (deep, "label_embedding", dict(blocks=[(0, 2)]), "one for each process"),
    (deep, "label_embedding", dict(blocks=[(0, 2), (3, 4)]), "follow each other"),
    (deep, "label_embedding", dict(lr_schedule="step"), "lr_schedule"),
    (lambda: Network([FFLinear(64, 64), FFLinear(64, 40, reads=(-2,))]), "label_embedding", {}, "the layer below"),
    (
        lambda: Network([FFLinear(64, 40), Plain()]),
        "label_embedding",
        dict(blocks=[(0, 1), (1, 2)]),
        "no weights to learn",
    ),
]


class Plain(Layer):
    "No weights to learn."

    def forward(self, x):
        return x


def in_a_group(names):
    "In one process of a group: each case trained, each mistake met; in one group, since processes take long to start."
    digits, made, said = load("digits"), {}, []
    for name in names:
        build, strategy, options = CASES[name]
        network = build()
        history = train_pipeline(network, digits, STRATEGIES[strategy](10), **SETTINGS | options)
        made[name] = network.state_dict(), history, network.training
    for build, strategy, options, _ in MISTAKES if len(names) > 1 else []:
        try:
            train_pipeline(build(), digits, STRATEGIES[strategy](10), **SETTINGS | options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return made, said, torch.get_num_threads()


def expected(name, digits):
    build, strategy, options = CASES[name]
    network = build()
    history = train(network, digits, STRATEGIES[strategy](10), progress=False, **SETTINGS | options)
    return network, history


def test_two_processes_give_the_weights_of_one(digits):
    groups = in_processes(2, in_a_group, list(CASES))
    for name in CASES:
        network, history = expected(name, digits)
        for made, _, threads in groups:  # each process has the whole network
            state, found, training = made[name]
            assert same(network.state_dict(), state), name
            assert told(found) == told(history) and not training and threads == 1
            assert [len(epoch["busy"]) for epoch in found.epochs] == [2] * len(found)
    for _, said, _ in groups:  # and says what is wrong, instead of waiting for the others
        assert [text for text, (*_, wanted) in zip(said, MISTAKES) if wanted not in text] == []


@pytest.mark.slow
def test_three_processes_and_read_outs(digits):
    network, history = expected("label_embedding", digits)
    many = deep()
    options = SETTINGS | dict(ahead=1, blocks=[(0, 1), (1, 3), (3, 4)])
    found = train_in_processes(many, digits, STRATEGIES["label_embedding"](10), 3, **options)
    assert same(network.state_dict(), many.state_dict()) and told(found) == told(history)
    assert per_label_goodness(many, digits, precision="fp32") == per_label_goodness(network, digits, precision="fp32")


def test_without_a_group_the_error_says_how_to_make_one(digits):
    with pytest.raises(ValueError, match="init_process_group"):
        train_pipeline(deep(), digits, STRATEGIES["label_embedding"](10), **SETTINGS)


class Wild(GoodnessObjective):
    "A loss that is not a number."

    def loss(self, g, s):
        return super().loss(g, s) * float("nan")


@pytest.mark.slow
def test_a_run_that_diverges_says_so_and_ends_in_every_process(digits):
    with pytest.raises(Diverged, match="layer 3"):
        lr = dict(lr=1e-3, objective=[None, None, Wild(theta="units"), None])
        train_in_processes(deep(), digits, STRATEGIES["label_embedding"](10), **SETTINGS | lr)


def test_blocks_are_as_even_as_they_can_be():
    assert split([4, 1, 1, 1, 1], 2) == [(0, 1), (1, 5)]
    assert split([1, 1, 1, 3], 2) == [(0, 3), (3, 4)]
    assert split([5], 1) == [(0, 1)]
    costs = [3, 1, 4, 1, 5, 9, 2, 6]
    cuts = split(costs, 3)
    assert max(sum(costs[a:b]) for a, b in cuts) == 14 and [a for a, _ in cuts[1:]] == [b for _, b in cuts[:-1]]
    with pytest.raises(ValueError, match="at least one layer a stage"):
        split([1, 1], 3)
