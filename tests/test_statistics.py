"""Intervals over seeds and images, differences, corrections: against SciPy, closed forms and hand examples; bad input."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ff_research.statistics import (
    MEAN_COLUMNS,
    corrected,
    difference,
    difference_lines,
    interval,
    interval_or_one,
    mean_lines,
    number_of,
    pack,
    rank_correlation,
    two_way,
    unpack,
    verdict_of,
    wrong_images,
)

LABELS, JOINED = "errors.test.per_label", "errors.test.ridge.layers_2_to_3"


def rows_of(errors, recipe="r", images=10_000, **more):
    return [
        dict(
            recipe=recipe, seed=seed, errors=dict(test=dict(per_label=error)), data=dict(name="d", test=images), **more
        )
        for seed, error in enumerate(errors)
    ]


def with_masks(masks, recipe="r"):
    rows = rows_of([100 * float(np.mean(mask)) for mask in masks], recipe, len(masks[0]))
    return [row | dict(wrong=dict(labels=pack(mask))) for row, mask in zip(rows, masks)]


def test_the_standard_librarys_statistics_is_still_found():
    code = "import ff_research.speed as s, statistics; assert s.statistics is statistics; print(statistics.__file__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "ff_research" not in out


# Masks


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_masks_come_back(mask):
    mask = np.array(mask)
    assert np.array_equal(unpack(pack(mask), len(mask)), mask) and pack(mask).startswith(f"{len(mask)}:")


def test_a_mask_at_half_of_ten_thousand_images_is_small():
    assert len(pack(np.random.default_rng(0).random(10_000) < 0.5)) < 3000


@pytest.mark.parametrize("mask", [[], [0, 1], [[True]], np.array(True), np.zeros(3)])
def test_what_is_no_mask(mask):
    with pytest.raises(ValueError, match="expected booleans"):
        pack(mask)


GOOD = pack(np.arange(100) % 3 == 0)


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no packed mask"),
        ("", "no packed mask"),
        ("0:AAAA", "no packed mask"),
        (GOOD.split(":")[1], "no packed mask"),
        ("99" + GOOD[3:], "expected 100"),
        (GOOD[:-4], "damaged"),
        (GOOD[:-5], "damaged"),
        ("100:AAAA", "damaged"),
        ("100:" + pack(np.zeros(10_000, bool)).split(":")[1], "damaged"),
        (GOOD + "\n", "no packed mask"),
    ],
)
def test_text_that_pack_did_not_write(text, said):
    with pytest.raises(ValueError, match=said):
        unpack(text, 100)
    assert unpack(GOOD, 100).sum() == 34


def test_a_mask_that_would_fill_the_memory_is_cut_off():
    import base64
    import zlib

    bomb = "16:" + base64.b64encode(zlib.compress(bytes(10**7))).decode()
    with pytest.raises(ValueError, match="does not hold 2 bytes"):
        unpack(bomb)


def test_which_mask_belongs_to_a_key():
    wrong = np.arange(1000) < 30
    errors = dict(per_label=3.0, head=4.0, ridge=dict(layer_1=5.0, layer_2=3.0, layers_2_to_3=3.0))
    row = dict(recipe="r", seed=0, errors=dict(test=errors), wrong=dict(labels=pack(wrong), probe=pack(wrong)))
    assert wrong_images([row], LABELS).sum() == wrong_images([row], JOINED).sum() == 30
    for key in ("errors.test.ridge.layer_2", "errors.test.smooth.layers_2_to_3", "errors.validation.per_label"):
        assert wrong_images([row], key) is None
    assert wrong_images([row | dict(wrong=dict(labels=pack(wrong)))], JOINED) is None
    pixels = dict(recipe="p", seed=0, errors=dict(test=dict(ridge=dict(pixels=3.0))), wrong=dict(probe=pack(wrong)))
    assert wrong_images([pixels], "errors.test.ridge.pixels").sum() == 30
    assert wrong_images([row], "errors.test.head") is None  # rows from before the head's mask was kept
    scores = dict(layer_1=9.0, layer_2=8.0, sum=3.0)
    masks = dict(head=pack(np.arange(1000) < 40), scores=pack(wrong))
    named = row | dict(errors=dict(test=dict(head=4.0, scores=scores)), wrong=masks)
    assert wrong_images([named], "errors.test.head").sum() == 40
    assert wrong_images([named], "errors.test.scores.sum").sum() == 30
    assert wrong_images([named], "errors.test.scores.layer_2") is None
    with pytest.raises(ValueError, match="seed 0: errors.test.per_label is 3.50 %, but its mask .* says 3.00 %"):
        wrong_images([row | dict(errors=dict(test=dict(per_label=3.5)))], LABELS)
    other = with_masks([np.arange(100) < 3])[0] | dict(seed=1)
    with pytest.raises(ValueError, match="expected one test set"):
        wrong_images([row, other], LABELS)


# One mean


def test_formula_and_scipy():
    x = [1.4, 1.5, 1.3, 1.6, 1.2]
    t = stats.t.interval(0.95, 4, np.mean(x), stats.sem(x))
    seeds = interval(rows_of(x), LABELS, images=0)
    assert np.allclose((seeds["low"], seeds["high"]), t) and seeds["covers"] == "seeds"
    both, wilson = interval(rows_of(x), LABELS), stats.binomtest(140, 10_000).proportion_ci(method="wilson")
    assert both["covers"] == "seeds, images by formula" and both["n"] == 5
    assert both["mean"] - both["low"] == pytest.approx(math.hypot(1.4 - t[0], 1.4 - 100 * wilson.low))
    assert both["high"] - both["mean"] == pytest.approx(math.hypot(t[1] - 1.4, 100 * wilson.high - 1.4))
    none = interval(rows_of([0.0, 0.0]), LABELS)
    assert none["low"] == 0 and none["high"] == pytest.approx(
        100 * stats.binomtest(0, 10_000).proportion_ci(method="wilson").high
    )


def test_two_way_against_its_closed_forms():
    rng = np.random.default_rng(0)
    alike = np.tile(rng.random(4000) < 0.1, (5, 1))  # seeds all alike: the binomial is left
    p = alike.mean()
    assert two_way([alike], 4000).std() == pytest.approx(math.sqrt(p * (1 - p) / 4000), rel=0.05)
    offset = np.linspace(-0.02, 0.02, 5)[:, None] * 4000  # images all alike but for whole blocks: Student's is left
    blocks = (np.arange(4000) < 400 + offset).astype(int) - (np.arange(4000) < 400)
    spread = blocks.mean(1).std(ddof=1) / math.sqrt(5) * stats.t.isf(0.025, 4) / stats.norm.isf(0.025)
    assert two_way([blocks - blocks.mean(0)], 4000).std() < spread  # no seed, no image
    seeds_only = np.repeat(blocks.mean(1), 4000).reshape(5, 4000)
    assert two_way([seeds_only], 4000).std() == pytest.approx(spread, rel=0.05)
    assert np.array_equal(two_way([alike], 50), two_way([alike], 50))
    assert not np.array_equal(two_way([alike], 50), two_way([alike], 50, seed=1))


def test_coverage_of_the_two_way_interval():
    rng, bar, hits = np.random.default_rng(3), stats.norm.isf(0.1), []
    for _ in range(150):
        own = math.sqrt(1 - 0.8**2 - 0.05**2) * rng.standard_normal((4, 1000))
        masks = 0.05 * rng.standard_normal((4, 1)) + 0.8 * rng.standard_normal(1000) + own > bar
        found = interval(with_masks(masks), LABELS, draws=499)
        assert found["covers"] == "seeds and images"
        hits.append(found["low"] <= 10 <= found["high"])
    assert 0.89 < np.mean(hits) < 0.995


@pytest.mark.parametrize(
    "rows, options, said",
    [
        ([], {}, "0 seeds"),
        (rows_of([1.0]), {}, "1 seeds"),
        (rows_of([1.0, 101.0]), {}, "101 is no error"),
        (rows_of([1.0, -0.1]), {}, "-0.1 is no error"),
        (rows_of([1.0, 2.0], images=None), {}, "pass images"),
        (rows_of([1.0, 2.0]), dict(images=-1), "images=-1"),
        (rows_of([1.0, 2.0]), dict(images=0.5), "images=0.5"),
        (rows_of([1.0]) + rows_of([2.0]), {}, "two rows have seed 0"),
        (rows_of([1.0, 2.0]), dict(key="seconds"), "0 seeds"),
    ],
)
def test_no_interval_without_grounds(rows, options, said):
    with pytest.raises(ValueError, match=said):
        interval(rows, **dict(key=LABELS) | options)


def test_one_seed_has_the_interval_of_its_test_images():
    found = interval_or_one(rows_of([1.4]), LABELS, images=10_000)
    wilson = stats.binomtest(140, 10_000).proportion_ci(method="wilson")
    assert np.allclose((found["low"], found["high"]), (100 * wilson.low, 100 * wilson.high))
    assert (found["n"], found["covers"]) == (1, "images")
    assert interval_or_one(rows_of([1.0, 2.0]), LABELS) == interval(rows_of([1.0, 2.0]), LABELS)
    for rows, images, said in [([], None, "0 seeds"), (rows_of([1.4]), 0, "one seed and no test images")]:
        with pytest.raises(ValueError, match=said):
            interval_or_one(rows, LABELS, images)


# Differences


def test_difference_over_seeds_is_welchs_test():
    x, y = [1.4, 1.5, 1.3, 1.6, 1.2], [1.1, 1.2, 1.0]
    d, w = difference(rows_of(x), rows_of(y), LABELS, images=0), stats.ttest_ind(x, y, equal_var=False)
    assert d["p"] == pytest.approx(w.pvalue) and np.allclose((d["low"], d["high"]), w.confidence_interval())
    assert (d["n"], d["covers"], d["paired"]) == (3, "seeds", [])
    mirrored = difference(rows_of(y), rows_of(x), LABELS, images=0)
    assert np.allclose((mirrored["low"], mirrored["high"]), (-d["high"], -d["low"])) and mirrored["p"] == d["p"]


def test_the_same_networks_are_paired_by_seed():
    x, y = np.array([1.4, 1.5, 1.3, 1.6]), np.array([1.3, 1.45, 1.2, 1.55])
    a, b = ([row | dict(weights=f"w{row['seed']}") for row in rows_of(e)] for e in (x, y))
    d = difference(a, b, LABELS, images=0)
    assert d["paired"] == ["seeds"] and d["p"] == pytest.approx(stats.ttest_rel(x, y).pvalue)
    b[0]["weights"] = "another"
    assert difference(a, b, LABELS, images=0)["paired"] == []
    read_twice = [row | dict(second=row["errors"]["test"]["per_label"] - 0.1) for row in a]
    assert difference(read_twice, read_twice, LABELS, "second", images=0)["paired"] == ["seeds"]
    del read_twice[1]["second"]
    with pytest.raises(ValueError, match="not there for the same seeds"):
        difference(read_twice, read_twice, LABELS, "second", images=0)


def test_images_by_formula_add_the_binomial():
    a, b = rows_of([2.0, 2.0]), rows_of([1.0, 1.0])
    d = difference(a, b, LABELS)
    shares = [(201 / 10_002), (101 / 10_002)]
    half = stats.norm.isf(0.025) * 100 * math.sqrt(sum(s * (1 - s) / 10_000 for s in shares))
    assert d["high"] - 1 == pytest.approx(half, rel=1e-4) and d["covers"] == "seeds, images by formula"
    assert difference(a, b, LABELS, images=0)["p"] == 0  # no scatter, and images left out
    assert (
        difference(a, a, LABELS, images=0)["p"] == 1 and difference(a, a, LABELS, images=0)["verdict"] == "unresolved"
    )


def test_masks_pair_the_images():
    rng = np.random.default_rng(1)
    hard = rng.random(5000) < 0.05
    a, b = (with_masks([hard ^ (rng.random(5000) < flip) for _ in range(5)]) for flip in (0.001, 0.004))
    d, formula = difference(b, a, LABELS), difference(b, a, LABELS, images=5000)
    assert (
        d["paired"] == ["images"] and d["covers"] == "seeds and images" and d["mean"] == pytest.approx(formula["mean"])
    )
    assert d["high"] - d["low"] < 0.5 * (formula["high"] - formula["low"])
    assert d["verdict"] == "resolved" and formula["verdict"] == "unresolved"
    assert difference(b, a, LABELS) == d, "seeded"


def test_masks_of_different_images_are_refused():
    a, b = with_masks([np.arange(50) < 5] * 2), with_masks([np.arange(60) < 6] * 2)
    with pytest.raises(ValueError, match="50 and 60 images"):
        difference(a, b, LABELS)
    b = [row | dict(data=dict(name="e, centred to 10", test=50)) for row in a]
    with pytest.raises(ValueError, match="different test images: d, e"):
        difference(a, b, LABELS)
    b = [row | dict(data=dict(name="d, centred to 10", test=50)) for row in a]
    assert difference(a, b, LABELS)["paired"] == ["images"], "centring leaves the images in place"


@pytest.mark.parametrize("margin", [0, -1, math.inf, math.nan])
def test_a_margin_is_a_width(margin):
    with pytest.raises(ValueError, match="margin"):
        difference(rows_of([1.0, 2.0]), rows_of([1.0, 2.0]), LABELS, margin=margin)


def test_verdicts():
    assert verdict_of(0.1, 0.2) == verdict_of(-0.2, -0.1) == "resolved"
    assert verdict_of(-0.1, 0.2) == verdict_of(0.0, 0.2) == "unresolved"
    assert verdict_of(-0.1, 0.2, margin=0.3) == verdict_of(0.1, 0.2, margin=0.3) == "equivalent"
    assert verdict_of(-0.1, 0.2, margin=0.2) == "unresolved" and verdict_of(0.3, 0.5, margin=0.4) == "resolved"


# Tables


def test_benjamini_hochberg_by_hand():
    ps = dict(zip("abcde", (0.035, 0.001, 0.6, 0.012, 0.028)))
    table = corrected({name: dict(p=p, verdict="resolved" if p < 0.05 else "unresolved") for name, p in ps.items()})
    assert [round(table[name]["q"], 5) for name in "abcde"] == [0.04375, 0.005, 0.6, 0.03, 0.04375]
    assert [table[name]["verdict"] for name in "abcde"] == [
        "resolved",
        "resolved",
        "unresolved",
        "resolved",
        "resolved",
    ]
    assert corrected({"a": dict(p=0.04, verdict="resolved"), "b": dict(p=0.9, verdict="unresolved")})["a"] == dict(
        p=0.04, q=0.08, verdict="unresolved"
    )
    assert corrected({"a": dict(p=0.9, verdict="equivalent")})["a"]["verdict"] == "equivalent"


@pytest.mark.parametrize(
    "table, rate", [({}, 0.05), ({"a": dict(p=math.nan)}, 0.05), ({"a": {}}, 0.05), ({"a": dict(p=0.1)}, 1.0)]
)
def test_no_correction_without_p(table, rate):
    with pytest.raises(ValueError, match="expected at least one difference"):
        corrected(table, rate)


def test_rank_correlation_against_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 1, 9))
    assert rank_correlation(x, y)["mean"] == pytest.approx(stats.spearmanr(x[0], y[0]).statistic)
    groups = np.stack([x[0], 100 + x[0]])  # what separates groups does not count
    assert rank_correlation(groups, np.stack([y[0], y[0]]))["mean"] == pytest.approx(rank_correlation(x, y)["mean"])
    for bad in (x[0], x[:, :2], np.full((1, 9), math.nan)):
        with pytest.raises(ValueError, match="expected"):
            rank_correlation(bad, bad)


def test_lines_of_a_table_are_the_numbers_of_the_functions():
    draw = np.random.default_rng(0)
    a, b = (rows_of([float(e) for e in mean + 0.05 * draw.normal(size=5)]) for mean in (2.0, 3.0))
    (line,) = difference_lines({"a - b": (a, b, LABELS)})
    assert line["difference"] == number_of(difference(a, b, LABELS, images=0)) and line["difference"].startswith("-")
    assert line["verdict"] == line["images"] == "resolved" and line["n"] == 5
    (line,) = mean_lines({"a": (a, LABELS, "1.9")})
    assert line["seeds"] == number_of(interval(a, LABELS, images=0)) and line["paper"] == "1.9"
    assert set(line) == set(MEAN_COLUMNS)
