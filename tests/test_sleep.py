"Phases apart in time: each alone is half of Hinton's loss, a running threshold moves by its own phase, runs resume in phase."

from unittest import mock

import pytest
import torch

import ff_research as ff
from ff_research.goodness import hinton_loss
from ff_research.labels import overlay, wrong_labels
from ff_research.layers import prepare
from ff_research.objectives import hinton
from ff_research.readout import per_label_goodness
from ff_research.sleep import OnePhase, SleepStrategy, missed, one_layer, one_phase_loss, row_of
from ff_research.statistics import unpack
from ff_research.streams import Streams
from ff_research.training import train

QUIET = dict(progress=False, device="cpu", precision="fp32")
SGD = dict(lr=0.01, optimizer="plain_sgd", weight_decay=0.0, lr_schedule="constant")


def goodness(rows=40, seed=0):
    return 3 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))


def of_phase(sign, h):
    return Streams(h, None, (len(h),), {"sign": torch.full((len(h), 1), float(sign))})


def test_both_phases_together_are_hintons_loss():
    g = goodness()
    day, night = (one_phase_loss(part, sign, 1.3, 2.0) for part, sign in zip(g.chunk(2), (1.0, -1.0)))
    torch.testing.assert_close((day + night) / 2, hinton_loss(*g.chunk(2), 1.3, 2.0))


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_a_phase_has_the_gradient_of_its_half(form):
    h = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own, whole = OnePhase(6, form), hinton() if form == "sum" else hinton(1.0, 1.0, ff.goodness.mean_of_squares)
    day = torch.autograd.grad(own(h, of_phase(1, h))[0], h)[0]
    both = torch.autograd.grad(whole(torch.cat([h, h.detach()]))[0], h)[0]
    torch.testing.assert_close(day, 2 * both)


def test_a_running_threshold_moves_by_its_own_phase_only():
    own = OnePhase(6, "mean", "running")
    h = torch.ones(5, 6) * 2
    own(h, of_phase(1, h))
    torch.testing.assert_close(own.means, torch.tensor([1.0, 0.9 + 0.4]))
    own(h, of_phase(-1, h))
    torch.testing.assert_close(own.means, torch.tensor([1.3, 1.3]))
    fixed = OnePhase(6, "mean")
    fixed(h, of_phase(1, h))
    assert fixed.means.tolist() == [1, 1]


def test_the_phases_follow_each_other_and_carry_their_labels(digits):
    strategy, x, y = SleepStrategy(10, k=2), digits.x_train[:30], digits.y_train[:30]
    days = []
    for _ in range(8):
        s = strategy.streams(x, y.long(), generator=torch.Generator().manual_seed(0))
        rows = torch.as_tensor(s.x.dense() if hasattr(s.x, "dense") else s.x).flatten(1)
        right = rows[torch.arange(30), y.long()] > 0.99
        days.append(bool(right.all()))
        assert right.all() or not right.any()
        assert s.sizes == (30,) and set(s.side["sign"].flatten().tolist()) == {1.0 if days[-1] else -1.0}
    assert days == [True, True, False, False] * 2


@pytest.mark.parametrize("options", [dict(), dict(form="mean"), dict(threshold="running")])
def test_it_learns_one_step_at_a_time(options, digits):
    network = ff.Network([64, 100], inputs="centred")
    how = SGD | dict(lr=0.3 if "form" in options else 0.01)
    train(network, digits, SleepStrategy(10, **options), 12, batch_size=20, **QUIET | how)
    assert per_label_goodness(network, digits, first=1, device="cpu") < 30


@pytest.mark.parametrize("k", [1, 3])
def test_layers_that_learn_one_after_another_have_their_phases(k, digits):
    network = ff.Network([64, 30, 30])
    train(network, digits, SleepStrategy(10, k=k), 2, schedule="greedy", batch_size=100, **SGD, **QUIET)
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_layers_stay_local(digits):
    states = []
    for widths in ([64, 20], [64, 20, 20]):
        network = ff.Network(widths)
        train(network, digits, SleepStrategy(10, k=5, threshold="running"), 1, **QUIET | SGD)
        states.append([*network.layers[0].parameters(), network.objectives[0].means])
    assert all(map(torch.equal, *states))


def test_a_stopped_run_wakes_up_in_its_phase(digits, tmp_path):
    def die(epoch, network):
        raise InterruptedError

    make = lambda: ff.Network([64, 20])  # noqa: E731
    strategy = lambda: SleepStrategy(10, k=7, threshold="running")  # noqa: E731
    whole, first, second = make(), make(), make()
    train(whole, digits, strategy(), 2, **QUIET | SGD)
    with pytest.raises(InterruptedError):
        train(first, digits, strategy(), 2, checkpoint=tmp_path / "c", after_epoch=die, **QUIET | SGD)
    train(second, digits, strategy(), 2, checkpoint=tmp_path / "c", **QUIET | SGD)
    a, b = whole.state_dict(), second.state_dict()
    assert int(whole.strategy.steps) > 0 and all(torch.equal(a[k], b[k]) for k in a)


def test_it_comes_back_from_its_file(digits, tmp_path):
    network = ff.Network([64, 20])
    train(network, digits, SleepStrategy(10, k=3), 1, **QUIET | SGD)
    ff.save(network, tmp_path / "a.safetensors")
    again = ff.load_network(tmp_path / "a.safetensors")
    assert torch.equal(ff.predict(again, digits.x_test), ff.predict(network, digits.x_test))


def test_the_written_out_layer_is_the_strategy_s(digits):
    "Both phases in one step from the same rows: the gradient of autograd."
    layer = one_layer(digits, 0, units=30, steps=1, batch_size=20, lr=0.01, seed=3)
    g = torch.Generator().manual_seed(3)
    own = ff.FFLinear(64, 30, generator=g)
    i = torch.randint(len(digits.y_train), (10,), generator=g)
    y = digits.y_train[i].long()
    labels = torch.cat([y, wrong_labels(y, 10, g)])
    x = prepare(overlay(digits.x_train[i].repeat(2, 1, 1, 1), labels, 10), 64)
    h = own(x)
    loss = one_phase_loss(h.square().sum(1, keepdim=True), torch.tensor([[1.0]] * 10 + [[-1.0]] * 10), 30.0)
    for p, grad, new in zip(own.parameters(), torch.autograd.grad(loss, list(own.parameters())), layer.parameters()):
        torch.testing.assert_close(new, p - 0.01 * grad)


@pytest.mark.parametrize("options", [dict(), dict(form="mean"), dict(threshold="running")])
def test_a_layer_learns_from_phases_of_one_step_and_no_graph_is_made(options, digits):
    with (
        mock.patch("torch.autograd.grad", side_effect=AssertionError),
        mock.patch("torch.Tensor.backward", side_effect=AssertionError),
    ):
        layer = one_layer(digits, 1, units=60, steps=1500, lr=0.01, **options)
    assert missed(layer, digits).float().mean() < 0.3


def test_centred_images_let_phases_be_far_apart(digits):
    errors = [
        missed(one_layer(digits, 100, centred=centred, units=60, steps=2400, lr=0.003), digits, centred).float().mean()
        for centred in (True, False)
    ]
    assert errors[0] < 0.25 < errors[1] - 0.1


def test_a_row_says_what_was_run(digits):
    row = row_of(digits, 1, "sleep-sum-3", dict(device="here"), k=3, units=20, steps=20)
    assert row["config"] == dict(k=3, units=20, steps=20) and row["device"] == "here" and row["data"]["test"] == 360
    assert unpack(row["wrong"]["labels"]).mean() * 100 == pytest.approx(row["errors"]["test"]["per_label"])


def test_bad_input_is_named():
    for options in (dict(k=0), dict(k=1.5), dict(form="max"), dict(threshold="none")):
        with pytest.raises(ValueError):
            SleepStrategy(10, **options)
