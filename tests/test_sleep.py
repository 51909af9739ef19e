"Phases apart in time: each alone is half of Hinton's loss, a running threshold moves by its own phase, runs resume in phase."

import pytest
import torch

import ff_research as ff
from ff_research.goodness import hinton_loss
from ff_research.objectives import hinton
from ff_research.readout import per_label_goodness
from ff_research.recipes import RECIPES
from ff_research.runs import run
from ff_research.sleep import OnePhase, SleepStrategy, one_phase_loss
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


def test_recipes_differ_in_what_their_names_say():
    for kind in ("sum", "mean", "running"):
        base = RECIPES[f"sleep-{kind}-1"]
        for k in (10, 100, 1000):
            other = RECIPES[f"sleep-{kind}-{k}"]
            assert {field for field, value in base if value != getattr(other, field)} - {"name"} == {"strategy"}
            assert dict(other.strategy.options) == dict(base.strategy.options) | {"k": k}
    assert (
        run(RECIPES["sleep-sum-1"].vary(data="digits", epochs=12, batch_size=20), 0, probe=False, **QUIET)["errors"][
            "test"
        ]["per_label"]
        < 30
    )


def test_bad_input_is_named():
    for options in (dict(k=0), dict(k=1.5), dict(form="max"), dict(threshold="none")):
        with pytest.raises(ValueError):
            SleepStrategy(10, **options)
