"""Cellular automata: the rule against a plain reading of it, learning that passes no step, and that they grow and agree."""

import pytest
import torch
from torch.nn import functional as F

from ff_research import automata
from ff_research.automata import (
    Automaton,
    DigitAutomaton,
    animate,
    cell_goodness,
    damaged,
    errors_by_step,
    flower,
    growing_row,
    learn_digits,
    learn_to_grow,
    naming_row,
    seeds,
    target_of,
    trial,
)
from ff_research.data import as_float


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def target():
    return target_of(flower())


def test_the_picture_and_its_code(target):
    assert target.shape == (16, 16, 16) and torch.equal(target[:4], flower()) and target.abs().max() <= 1
    empty = flower()[3] == 0
    assert 100 < empty.sum() < 220 and not target[:, empty].any()
    assert torch.equal(target, target_of(flower())) and not torch.equal(target, target_of(flower(), seed=1))


def test_a_step_is_what_the_text_says():
    "Cell by cell, in plain loops."
    rule = Automaton(channels=5, hidden=7)
    torch.nn.init.normal_(rule.second, std=0.3, generator=seeded(1))
    x = torch.rand(1, 5, 4, 4, generator=seeded(2))
    x[0, 3, :2] = 0
    found, part = rule(x, seeded(3)), torch.rand(1, 1, 4, 4, generator=seeded(3)) < 0.5
    padded = F.pad(x, (1, 1, 1, 1))
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    curved = torch.tensor([[1.0, 2, 1], [2, -12, 2], [1, 2, 1]]) / 16
    for i in range(4):
        for j in range(4):
            near = padded[0, :, i : i + 3, j : j + 3]
            seen = torch.stack(
                [near[:, 1, 1], *((near * k).sum((1, 2)) for k in (slope, slope.T, curved))], 1
            ).flatten()
            change = rule.second[..., 0, 0] @ (rule.first[..., 0, 0] @ seen + rule.bias).relu()
            expected = (x[0, :, i, j] + change * part[0, 0, i, j]).clamp(-2, 2) * (near[3].max() > 0.1)
            torch.testing.assert_close(found[0, :, i, j], expected, rtol=1e-4, atol=1e-5)


def test_life_spreads_by_one_cell_a_step(target):
    rule, x = Automaton(), seeds(1, target)
    torch.nn.init.normal_(rule.second, std=1.0, generator=seeded(1))
    for step in range(1, 4):
        x = rule(x, seeded(step))
        far = x[0].abs().sum(0) > 0
        far[8 - step : 9 + step, 8 - step : 9 + step] = False
        assert not far.any()


@pytest.mark.parametrize("fits", [16, 4])
def test_one_local_update_is_the_gradient_of_one_step(fits, target):
    "Adam's first step by autograd, from a state that is taken as given."
    rule, other = Automaton(), Automaton()
    for r in (rule, other):
        torch.nn.init.normal_(r.second, std=0.1, generator=seeded(1))
    learn_to_grow(rule, target[:fits], rounds=1, steps=1, seed=4)
    generator = seeded(4)
    chosen = torch.randperm(16, generator=generator)[:4]
    whole = F.pad(target[:fits], (0, 0, 0, 0, 0, 16 - fits))
    states = seeds(16, whole)
    x = torch.cat([seeds(1, whole), damaged(states[chosen[1:2]], generator), states[chosen[2:]]])
    h = other(x, generator)
    living = F.max_pool2d(h[:, 3:4], 3, 1, 1)[:, 0] > 0.1
    loss = -(cell_goodness(h, target[:fits]) * living).sum() / living.sum()
    for p, d in zip(other.parameters(), torch.autograd.grad(loss, list(other.parameters()))):
        d = d / (d.norm() + 1e-8)
        p.data -= 2e-3 * d / (d.abs() + 1e-8)
    for a, b in zip(rule.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_no_gradient_leaves_a_step(target, monkeypatch):
    "Every state that a local update starts from is cut off; with a longer reach all but the first of a window are not."
    cut = []
    plain = Automaton.forward

    def watched(self, x, generator=None):
        cut.append(x.grad_fn is None and not x.requires_grad)
        return plain(self, x, generator)

    monkeypatch.setattr(Automaton, "forward", watched)
    learn_to_grow(Automaton(), target, rounds=2, steps=6)
    assert all(cut) and len(cut) == 12
    cut.clear()
    learn_to_grow(Automaton(), target, rounds=1, steps=6, reach=3)
    assert cut == [True, False, False] * 2


def test_hidden_channels_need_a_goodness_of_their_own(target):
    rule = Automaton()
    learn_to_grow(rule, target[:4], rounds=3, steps=5)
    assert rule.second[:4].any() and not rule.second[4:].any()
    learn_to_grow(rule, target, rounds=1, steps=5)
    assert rule.second[4:].any()


def test_what_does_not_fit_is_said(target):
    for call, words in (
        (lambda: Automaton()(torch.zeros(1, 4, 8, 8)), r"expected \[n, 16, side, side\]"),
        (lambda: learn_to_grow(Automaton(), target, steps=10, reach=3), "divides steps=10"),
        (
            lambda: learn_digits(DigitAutomaton(), torch.zeros(2, 1, 8, 8), torch.zeros(2), reach=2),
            "reach=2: expected 1 or",
        ),
        (lambda: growing_row("automata-locl"), "did you mean 'automata-local'"),
        (lambda: naming_row("automata-digits"), "automata-digits-local"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_same_seed_gives_the_same_rule(target):
    rules = [Automaton() for _ in range(2)]
    for rule in rules:
        learn_to_grow(rule, target, rounds=2, steps=4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(*(rule.parameters() for rule in rules)))


def test_it_grows_and_mends_and_backprop_through_time_does_what_it_says(target, tmp_path):
    rule, untrained = Automaton(), Automaton()
    history = learn_to_grow(rule, target, rounds=25)
    errors, blank = trial(rule, target, n=2)[0], trial(untrained, target, n=2)[0]
    assert errors["grown"] < 0.65 * blank["grown"] and errors["mended"] < errors["cut"], errors
    assert history[-1] > history[0]
    animate(rule, target, tmp_path / "a.gif", steps=6)
    assert 0 < (tmp_path / "a.gif").stat().st_size < 300_000


# Digits


def test_scores_and_loss_of_cells_are_those_of_channel_groups(digits):
    rule, x = DigitAutomaton(groups=2), as_float(digits.x_train[:5])
    h = rule(x, rule.begin(x))
    g = h.square().unflatten(1, (10, 2)).mean(2)
    torch.testing.assert_close(rule.scores(h), g)
    y, ink = digits.y_train[:5], (x > 0.1)[:, 0]
    every = F.cross_entropy(g, y.view(-1, 1, 1).expand(-1, 8, 8), reduction="none")
    torch.testing.assert_close(rule.loss(h, x, y), every[ink].mean())
    out = rule.hand_on(h)
    rms = out.square().mean(1).sqrt()
    torch.testing.assert_close(rms[ink], torch.ones(int(ink.sum())), rtol=1e-3, atol=1e-3)
    assert not h[~ink[:, None].expand_as(h)].any()


@pytest.mark.parametrize("reach", [1, 4])
def test_updates_of_digits_pass_a_step_or_all(reach, digits, monkeypatch):
    cut = []
    plain = DigitAutomaton.forward

    def watched(self, x, h):
        cut.append(h.grad_fn is None)
        return plain(self, x, h)

    monkeypatch.setattr(DigitAutomaton, "forward", watched)
    learn_digits(DigitAutomaton(), as_float(digits.x_train[:20]), digits.y_train[:20], 1, steps=4, reach=reach)
    assert cut == ([True] * 4 if reach == 1 else [True, False, False, False])


def test_cells_come_to_name_their_digit(digits):
    rule = DigitAutomaton()
    before = errors_by_step(rule, as_float(digits.x_test), digits.y_test, steps=5)
    learn_digits(rule, as_float(digits.x_train), digits.y_train, epochs=1, steps=5)
    after = errors_by_step(rule, as_float(digits.x_test), digits.y_test, steps=5)
    assert min(after["vote"]) < 0.8 * min(before["vote"]) and min(after["vote"]) < after["vote"][0] - 15, after
    assert set(after) == {"cells", "vote", "split"} and len(after["split"]) == 5


def test_rows_tell_what_was_done():
    row = growing_row("automata-untrained")
    assert row["errors"].keys() == {"grown", "cut", "mended", "later"} and row["config"]["rounds"] == 0
    row = naming_row("automata-digits-untrained")
    assert row["errors"]["test"]["vote"] > 70 and len(row["by_step"]["vote"]) == 20
    assert set(automata.GROWING) & set(automata.NAMING) == set()
