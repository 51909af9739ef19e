"""Settings that published rows were made with: the `config` of every recipe and the stages of every search, as they were."""

import json
from pathlib import Path

import pytest

from ff_research.recipes import RECIPES, recipe
from ff_research.searches import stages

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden" / "recipes.jsonl").read_text().splitlines()]


def test_golden_file_holds_every_recipe_of_its_time():
    assert (len(GOLDEN), sum("stages" in row for row in GOLDEN)) == (220, 173)
    assert {row["name"] for row in GOLDEN} <= {name for r in RECIPES.values() for name in (r.name, *r.alias)}


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["name"])
def test_config_and_search_are_those_of_the_published_rows(row):
    chosen = recipe(row["name"])
    assert json.dumps(chosen.identity()) == json.dumps(row["config"]), "the same text: files of weights carry it"
    assert chosen.target == row["target"]
    assert json.loads(json.dumps(stages(chosen) if chosen.search else [])) == row.get("stages", [])
