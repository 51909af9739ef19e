"""Continual learning: tasks, measures against hand-made tables, EWC against autograd, locality, bad input, rows."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ff_research.continual import (
    CONTINUAL_RUNS,
    METHODS,
    TRIALS,
    ContinualRun,
    average_accuracy,
    fisher,
    forgetting,
    in_turn,
    learn_by_backprop,
    learned_accuracy,
    logits_of,
    permuted_tasks,
    run_continual,
    split_tasks,
    with_replay,
)
from ff_research.network import Network
from ff_research.results import published


@pytest.fixture(scope="module")
def tasks(digits):
    return split_tasks(digits, per_task=100, tested=40)


def headed(tasks, widths=(12,), seed=0):
    network = Network([64, *widths], seed=seed)
    network.head = nn.Linear(widths[-1], 10)
    network.strategy = None
    return network


def test_split_tasks_part_the_classes(digits, tasks):
    assert [sorted(t.y_train.unique().tolist()) for t in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert all(len(t.y_train) == 100 and len(t.y_test) <= 40 and t.num_classes == 10 for t in tasks)
    whole = split_tasks(digits)
    assert sum(len(t.y_train) for t in whole) == len(digits.y_train)
    with pytest.raises(ValueError, match="10 classes cannot be shared out"):
        split_tasks(digits, 3)


def test_permuted_tasks_hold_the_same_pixels_in_another_order(digits):
    first, second = permuted_tasks(digits, 2, per_task=200, tested=50)
    assert torch.equal(first.x_train, digits.x_train[:200]) and torch.equal(first.y_test, second.y_test)
    a, b = first.x_test.flatten(1), second.x_test.flatten(1)
    assert not torch.equal(a, b) and torch.equal(a.sort(1).values, b.sort(1).values)
    assert not torch.equal(first.x_train, second.x_train)
    again = permuted_tasks(digits, 2, per_task=200, tested=50)[1]
    other = permuted_tasks(digits, 2, per_task=200, tested=50, seed=1)[1]
    assert torch.equal(again.x_test, second.x_test) and not torch.equal(other.x_test, second.x_test)


def test_replay_gives_every_task_its_share(tasks):
    seen = with_replay(tasks[2], tasks[:2], stored=25)
    assert (seen.y_train // 2).bincount().tolist() == [100, 100, 100]
    assert with_replay(tasks[0], []).y_train.equal(tasks[0].y_train)


def test_measures_of_a_table():
    shares = np.array([[90.0, np.nan, np.nan], [70.0, 80.0, np.nan], [40.0, 85.0, 95.0]])
    assert average_accuracy(shares) == pytest.approx((40 + 85 + 95) / 3)
    assert learned_accuracy(shares) == pytest.approx((90 + 80 + 95) / 3)
    assert forgetting(shares) == pytest.approx(((90 - 40) + (80 - 85)) / 2)


def test_fisher_information_is_the_mean_squared_gradient(tasks):
    network = headed(tasks)
    nn.init.normal_(network.head.weight)
    found = fisher(network, tasks[0], 5)
    expected = torch.zeros_like(network.head.weight)
    for x, y in zip(tasks[0].x_train[:5], tasks[0].y_train[:5]):
        p = logits_of(network, x[None]).log_softmax(1)[0, y]
        expected += torch.autograd.grad(p, network.head.weight)[0].square() / 5
    names = [name for name, _ in network.named_parameters()]
    torch.testing.assert_close(found[names.index("head.weight")], expected)


def test_ewc_holds_weights_where_they_were(tasks):
    "A strong penalty with equal information everywhere leaves the weights; without it they move."
    moved = []
    for strength in (0.0, 100.0):
        network = headed(tasks)
        then = [p.detach().clone() for p in network.parameters()]
        anchors = [(then, [torch.ones_like(p) for p in then])]
        learn_by_backprop(network, tasks[0], 3, 0, anchors=anchors, strength=strength)
        moved.append(sum((p - t).square().sum().item() for p, t in zip(network.parameters(), then)))
    assert moved[1] < moved[0] / 5


def test_fixed_layers_stay(tasks):
    network = headed(tasks)
    before = network.layers[0].weight.clone()
    learn_by_backprop(network, tasks[0], 1, 0, fixed=True)
    assert torch.equal(network.layers[0].weight, before) and network.head.weight.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_and_is_the_same_for_a_seed(tasks, method):
    network, shares = in_turn(method, tasks[:2], (30, 30), epochs=12, lr=1e-2)
    again = in_turn(method, tasks[:2], (30, 30), epochs=12, lr=1e-2)[1]
    assert all(np.array_equal(shares[k], again[k], equal_nan=True) for k in shares)
    assert np.isnan(shares["all"][0, 1]) and shares["within"][0, 0] > 70
    assert (np.nan_to_num(shares["within"]) >= np.nan_to_num(shares["all"]) - 1e-9).all()


def test_replay_forgets_less(tasks):
    options = dict(widths=(30, 30), epochs=8, lr=3e-3)
    lost = [forgetting(in_turn(method, tasks[:3], **options)[1]["all"]) for method in ("backprop", "backprop_replay")]
    assert lost[1] < lost[0]


def test_collaboration_changes_what_is_learned(tasks):
    alone, together = (in_turn(m, tasks[:2], (20, 20), epochs=2)[0] for m in ("ff", "ff_collaboration"))
    assert not torch.equal(alone.layers[0].weight, together.layers[0].weight)


@pytest.mark.parametrize("method", ["ff", "backprop"])
def test_a_layer_teaches_none_below_but_in_backprop(tasks, method):
    "The first layer learns the same whether there is a second one or not, from the same weights and batches."
    short, long = (in_turn(method, tasks[:2], widths, epochs=2)[0] for widths in ((20,), (20, 20)))
    assert torch.equal(short.layers[0].weight, long.layers[0].weight) == (method == "ff")


def test_classes_of_other_tasks_do_not_compete(tasks):
    "With a softmax of a task's own classes the head's rows of other classes stay."
    network = headed(tasks)
    own = torch.isin(torch.arange(10), tasks[0].y_train)
    before = network.head.weight.clone()
    learn_by_backprop(network, tasks[0], 1, 0, own=own)
    moved = (network.head.weight != before).any(1)
    assert moved.tolist() == own.tolist() and torch.isinf(logits_of(network, tasks[0].x_test, own)[:, ~own]).all()


def test_bad_input(tasks):
    with pytest.raises(ValueError, match="did you mean 'backprop'"):
        in_turn("backprob", tasks)
    with pytest.raises(ValueError, match="at least two"):
        in_turn("ff", tasks[:1])
    with pytest.raises(ValueError, match="kind of tasks"):
        run_continual(ContinualRun("x", "ff", "splt"))


def test_trials_are_held_out():
    assert all(trial.held_out for trial in TRIALS) and not any(run.held_out for run in CONTINUAL_RUNS.values())
    assert len({(trial.name, trial.lr, trial.strength) for trial in TRIALS}) == len(TRIALS)


def test_rows():
    row = run_continual(
        ContinualRun("digits", "backprop", data="digits", widths=(8,), epochs=1, per_task=60, tested=20)
    )
    assert row["continual"].keys() == {"all", "within", "probe", "silent"} and json.loads(json.dumps(row)) == row
    assert row["shares"]["all"][0][1] is None
    assert 0 <= row["continual"]["silent"] <= 100
    for name, run in CONTINUAL_RUNS.items():
        for row in published(name, part="continual"):
            assert row["config"] == json.loads(json.dumps(run.identity()))
            assert row["commit"] and "dirty" not in row["commit"]
