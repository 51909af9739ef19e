"""Numbers that no run can use are refused by the name of the argument, in every part of the package."""

import pytest
import torch

from ff_research.automata import Automaton, DigitAutomaton, flower, learn_digits, learn_to_grow, target_of, trial
from ff_research.backprop import train_backprop
from ff_research.continual import in_turn, permuted_tasks, split_tasks, with_replay
from ff_research.data import load
from ff_research.graphlayers import block_graph, graph_network
from ff_research.graphs import ClassNodes, train_graph, train_graph_backprop
from ff_research.network import Network
from ff_research.recurrent import error_by_iteration, top_down
from ff_research.sequences import text_images, windows
from ff_research.sleep import one_layer
from ff_research.strategies import STRATEGIES
from ff_research.training import train

QUIET = dict(progress=False, device="cpu")


def fit(**options):
    return train(
        Network([64, 8]), load("digits"), STRATEGIES["label_embedding"](10), **dict(epochs=1) | QUIET | options
    )


def fit_backprop(**options):
    return train_backprop(Network([64, 8]), load("digits"), **dict(epochs=1) | QUIET | options)


def fit_graph(backprop=False, **options):
    graph = block_graph().scaled("unit")
    network = graph_network(graph, [8], backprop=backprop)
    if backprop:
        return train_graph_backprop(network, graph, **options)
    return train_graph(network, graph, ClassNodes(), **options)


def grow(**options):
    return learn_to_grow(Automaton(), target_of(flower(8)), **options)


def name(**options):
    return learn_digits(DigitAutomaton(), torch.rand(4, 1, 8, 8), torch.arange(4), **options)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: fit(weight_decay=-1), "weight_decay=-1: expected a finite number"),
        (lambda: fit(peer=float("nan")), "peer=nan: expected a finite number"),
        (lambda: fit(epochs=1.5), "epochs=1.5"),
        (lambda: fit_backprop(lr=-1), "lr=-1: expected a finite number"),
        (lambda: fit_backprop(lr=[0.1, 0.1]), "expected a finite number"),
        (lambda: fit_backprop(weight_decay=float("inf")), "weight_decay=inf"),
        (lambda: Network([64, 8], read_at=[9]), "9 is none of the 0 iterations"),
        (lambda: Network([64, 8], learn_at=[-1]), "-1 is none of the 0 iterations"),
        (lambda: fit_graph(epochs=-1), "epochs=-1: expected a whole number"),
        (lambda: fit_graph(epochs=1, every=0), "every=0: expected a whole number"),
        (lambda: fit_graph(True, epochs=1, patience=0), "patience=0: expected a whole number"),
        (lambda: windows(torch.zeros(200, dtype=torch.long), length=0, window=-1), "length=0: expected a whole number"),
        (lambda: text_images("a" * 500, train=0), "train=0: expected a whole number"),
        (lambda: grow(steps=0), "steps=0: expected a whole number"),
        (lambda: grow(rounds=-1), "rounds=-1: expected a whole number"),
        (lambda: grow(batch=20, pool=16), "from a pool of no fewer"),
        (lambda: grow(steps=40, reach=3), "divides steps=40"),
        (lambda: name(epochs=-1), "epochs=-1: expected a whole number"),
        (lambda: name(batch=0), "batch=0: expected a whole number"),
        (lambda: trial(Automaton(), target_of(flower(8)), n=0), "n=0: expected a whole number"),
        (lambda: split_tasks(load("digits"), classes=0), "classes=0: expected a whole number"),
        (lambda: permuted_tasks(load("digits"), tasks=0), "tasks=0: expected a whole number"),
        (lambda: with_replay(load("digits"), [load("digits")], stored=0), "stored=0: expected a whole number"),
        (lambda: in_turn("ff", split_tasks(load("digits"), 5), epochs=-1), "epochs=-1: expected a whole number"),
        (lambda: one_layer(load("digits"), 1, steps=-1), "steps=-1: expected a whole number"),
        (lambda: error_by_iteration(top_down((1, 8, 8), [8]), load("digits"), 0), "iterations=0: expected a whole"),
    ],
)
def test_refused_by_name(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
