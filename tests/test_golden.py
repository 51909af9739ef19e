"""Settings that published rows were made with: the `config` of every recipe and the stages of every search, as they were."""

import json
from pathlib import Path

import pytest

from ff_research import recipes

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden" / "recipes.jsonl").read_text().splitlines()]


def test_golden_file_holds_every_recipe_of_its_time():
    assert (len(GOLDEN), sum("stages" in row for row in GOLDEN)) == (220, 173)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["name"])
def test_config_and_search_are_those_of_the_published_rows(row):
    chosen = recipes.recipe(row["name"])
    assert recipes._config(chosen) == row["config"]
    assert chosen.target == row["target"]
    if "stages" in row:
        assert json.loads(json.dumps(recipes.stages(row["name"]))) == row["stages"]
