"Recurrence: a label on top reaches every layer, learning is local in space and time, files and killed runs come back."

import pytest
import torch

import ff_research as ff
from ff_research.objectives import swish_symba
from ff_research.readout import linear_probe, per_label_goodness
from ff_research.recipes import RECIPES
from ff_research.recurrent import ClampedLabelStrategy, TopDownLayer, error_by_iteration, top_down, update
from ff_research.runs import run
from ff_research.training import train

QUIET = dict(progress=False, device="cpu", precision="fp32")
WHERE = dict(device="cpu", precision="fp32")
ADAM = dict(objective=swish_symba(), lr=3e-3, optimizer="adamw", weight_decay=0.0, batch_size=50)


def made(**options):
    return top_down((1, 8, 8), (30, 20), inputs="centred", **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_read_in_any_precision(precision, digits):
    where = dict(device="cpu", precision=precision)
    network, strategy = made(), ClampedLabelStrategy(10)
    train(network, digits, strategy, 1, progress=False, **ADAM, **where)
    assert ff.predict(network, digits.x_test[:20], **where).shape == (20,)
    assert 0 <= per_label_goodness(network, digits, **where) <= 100
    assert linear_probe(network, digits, **where)["test"]["layer_2"] < 60


def test_an_update_keeps_its_share_and_the_way_up_reads_nothing_above():
    g = torch.Generator().manual_seed(0)
    own, below, above, up, down = (
        torch.randn(*shape, generator=g) for shape in ((3, 4), (3, 5), (3, 6), (4, 5), (4, 6))
    )
    bias = torch.randn(4, generator=g)
    expected = 0.3 * own + 0.7 * (below @ up.T + above @ down.T + bias).relu()
    torch.testing.assert_close(update(own, below, above, up, down, bias), expected)
    torch.testing.assert_close(update(None, below, None, up, down, bias), (below @ up.T + bias).relu())


def test_the_label_reaches_layer_1_at_iteration_2_and_not_before(digits):
    network, strategy = made(), ClampedLabelStrategy(10)
    network.centre_on(digits)
    x, y = digits.x_test[:5], digits.y_test[:5].long()
    pair = strategy.write(x, torch.stack([y, (y + 1) % 10]))
    for t, differs in ((1, [False, True]), (2, [True, True])):
        network.iterations, network.read_at = t, (t,)
        found = ff.network.activities(network, pair, normalised=False)
        assert [not torch.equal(*h.chunk(2)) for h in found] == differs


@pytest.mark.parametrize("learns", [0, 1])
def test_a_layer_that_does_not_learn_keeps_every_bit(learns, digits):
    network = made()
    before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in network.layers]
    only = lambda layers, epochs: torch.eye(layers, dtype=torch.bool)[[learns] * epochs]  # noqa: E731
    train(network, digits, ClampedLabelStrategy(10), 1, schedule=only, **QUIET | ADAM)
    changed = [any(not torch.equal(old[k], v) for k, v in layer.state_dict().items())
               for old, layer in zip(before, network.layers)]  # fmt: skip
    assert changed == [i == learns for i in range(2)]


def test_no_gradient_comes_from_the_iteration_before(digits):
    network, seen = made(), []
    for layer in network.layers:
        plain = layer.forward
        layer.forward = lambda *xs, plain=plain: (
            seen.append([x.requires_grad for x in xs if x is not None]),
            plain(*xs),
        )[1]
    train(network, digits, ClampedLabelStrategy(10, "uniform"), 1, **QUIET | ADAM)
    assert any(len(one) == 3 for one in seen) and not any(map(any, seen))


def test_it_learns_with_either_kind_of_negatives_and_a_probe_reads_it(digits):
    for negatives in ("hard", "uniform"):
        network = top_down(digits.shape, (80, 80), inputs="centred")
        train(network, digits, ClampedLabelStrategy(10, negatives), 8, **QUIET | ADAM)
        assert per_label_goodness(network, digits, first=1, **WHERE) < 14
    assert linear_probe(network, digits, neutral_label=None, **WHERE)["test"]["layer_2"] < 14
    by_iteration = error_by_iteration(network, digits, 5, first=1, **WHERE)
    assert list(by_iteration) == [1, 2, 3, 4, 5] and by_iteration[4] < 14
    assert (network.iterations, network.read_at) == (5, (3, 4, 5))


def test_iterations_after_the_last_that_counts_change_nothing(digits):
    found = []
    for iterations in (5, 8):
        network = made(iterations=iterations)
        train(network, digits, ClampedLabelStrategy(10), 1, **QUIET | ADAM)
        found.append((*network.parameters(), network.strategy.weight))
    assert all(map(torch.equal, *found))


def test_a_saved_network_comes_back_and_predicts_the_same(digits, tmp_path):
    network = made()
    train(network, digits, ClampedLabelStrategy(10), 1, **QUIET | ADAM)
    ff.save(network, tmp_path / "a.safetensors")
    again = ff.load_network(tmp_path / "a.safetensors")
    assert repr(again) == repr(network) and repr(again.strategy) == repr(network.strategy)
    assert torch.equal(ff.predict(again, digits.x_test, **WHERE), ff.predict(network, digits.x_test, **WHERE))


def test_a_run_that_was_stopped_goes_on_bit_for_bit(digits, tmp_path):
    def die(epoch, network):
        raise InterruptedError

    whole, first, second = made(), made(), made()
    how = QUIET | ADAM | dict(epochs=2)
    train(whole, digits, ClampedLabelStrategy(10), **how)
    with pytest.raises(InterruptedError):
        train(first, digits, ClampedLabelStrategy(10), checkpoint=tmp_path / "c", after_epoch=die, **how)
    train(second, digits, ClampedLabelStrategy(10), checkpoint=tmp_path / "c", **how)
    a, b = whole.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_recipes_change_one_part_at_a_time_and_run():
    base = RECIPES["recurrent"]
    for name, changed in {"threshold": {"objective"}, "uniform": {"strategy"}}.items():
        other = RECIPES[f"recurrent-{name}"]
        assert {field for field, value in base if value != getattr(other, field)} - {"name", "target"} == changed
    small = base.vary(data="digits", widths=(60, 60), epochs=6, lr=3e-3, batch_size=50)
    errors = run(small, 0, **QUIET)["errors"]["test"]
    assert errors["per_label"] < 18 and errors["ridge"]["layers_1_to_2"] < 15


def test_bad_input_is_named(digits):
    with pytest.raises(ValueError, match="no layer reads"):
        train(ff.Network([64, 10]), digits, ClampedLabelStrategy(10), 1, **QUIET)
    with pytest.raises(ValueError, match="keep=1"):
        TopDownLayer(5, 4, 3, keep=1)
    with pytest.raises(ValueError, match="kind of negatives"):
        ClampedLabelStrategy(10, negatives="soft")
    with pytest.raises(ValueError, match="no iterations"):
        error_by_iteration(ff.Network([64, 10]), digits)
