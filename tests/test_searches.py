"""Searches: stages that build on each other, trials that are made once, and none that reads the test images."""

import json

import pytest

from ff_research.recipes import RECIPES
from ff_research.results import read_rows
from ff_research.searches import publish_trials, stages, trials, tune, validation_error

QUIET = dict(progress=False, device="cpu", precision="fp32")
RIDGE = RECIPES["digits"].vary(
    name="ridge", widths=(30, 30), full_gradient=False, objective="hinton", probes="ridge", epochs=1, search=()
)


def test_a_stage_starts_from_the_best_so_far(tmp_path):
    search = dict(lr=(1e-3, 1e-2)), dict(options=((("theta", 30),), (("theta", 120),)))
    ridge = RIDGE.vary(search=search)
    rows = list(tune(ridge, folder=tmp_path, **QUIET))
    first, second = [row["trial"] for row in rows[:2]], [row["trial"] for row in rows[2:]]
    best = min(rows[:2], key=validation_error)["trial"]["lr"]
    assert first == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert second == [{"lr": best, "options": [["theta", theta]]} for theta in (30, 120)]
    assert all(row["config"]["options"] == row["trial"].get("options", []) for row in rows)
    assert all(
        set(row["errors"]["validation"]) == {"per_label", "ridge"} and "test" not in row["errors"] for row in rows
    )
    assert list(tune(ridge, folder=tmp_path, **QUIET)) == rows, "a second call makes nothing again"


def test_stages_of_a_recipe_without_a_search():
    with pytest.raises(ValueError, match="unknown search 'random'"):
        stages("random")
    with pytest.raises(ValueError, match="unknown search 'ridge'"):
        list(tune(RIDGE))


def test_stages_of_the_book():
    assert stages("symba") == [[dict(lr=lr) for lr in (0.1, 0.3, 1.0, 3.0, 10.0)]]
    assert len(stages("loewe")) == 1 and stages("loewe")[0][0] == dict(epochs=100, weight_decay=3e-4)
    first, second = stages("scff-mnist")
    assert len(first) == 9 and len(second) == 26 and all(setting["epochs"] in (20, 29) for setting in first + second)


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if r.search])
def test_every_setting_of_every_search_makes_a_recipe(name):
    "Each setting with the first of every earlier stage, as one that was found there."
    best = {}
    for stage in stages(name):
        for setting in stage:
            RECIPES[name].vary(**best | setting)
        best |= stage[0]


def test_a_search_in_a_table_that_is_passed(tmp_path):
    book = {"ridge": RIDGE.vary(search=[{"lr": [0.1, 0.01]}])}
    rows = list(tune("ridge", recipes=book, folder=tmp_path, **QUIET))
    assert [row["trial"] for row in rows] == [{"lr": 0.1}, {"lr": 0.01}] and stages("ridge", book) == [
        [{"lr": 0.1}, {"lr": 0.01}]
    ]
    assert trials("ridge", tmp_path, recipes=book) == sorted(rows, key=validation_error)


def test_trials_under_an_old_name_are_not_made_again(tmp_path):
    old = RIDGE.vary(search=[{"lr": [0.1, 0.01]}])
    rows, now = list(tune(old, folder=tmp_path, **QUIET)), old.vary(name="renamed", alias=("ridge",))
    assert list(tune(now, folder=tmp_path, **QUIET)) == rows
    assert not (tmp_path / "trials" / "renamed.jsonl").exists()
    assert [publish_trials(now, tmp_path, target=tmp_path / "shipped") for _ in range(2)] == [2, 0]
    assert len(read_rows(tmp_path / "shipped" / "trials" / "ridge.jsonl")) == 2


def test_a_trial_that_diverges_is_a_trial(tmp_path):
    wild = RIDGE.vary(search=[{"lr": [1e29, 0.01]}])
    rows = list(tune(wild, folder=tmp_path, **QUIET))
    assert "diverged" in rows[0] and validation_error(rows[0]) == 100 and validation_error(rows[1]) < 100
    assert json.loads(json.dumps(rows)) == rows and list(tune(wild, folder=tmp_path, **QUIET)) == rows
