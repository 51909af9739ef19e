"""Rows under stress: many writers, kills, full disks, files cut at every byte; and the statistics against SciPy."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ff_research import results
from ff_research.results import (
    DamagedRow,
    append_row,
    as_table,
    column,
    keep_rows,
    latest,
    paired_difference,
    publish,
    published,
    read_rows,
    same_run,
    spread,
    summary,
    value,
)


def start(code, *arguments, **options):
    "A process of its own that has `append_row` and `path`."
    head = (
        "import sys\nfrom pathlib import Path\n"
        "from ff_research.results import append_row, read_rows, same_run\npath = Path(sys.argv[1])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def rows_of(numbers, recipe="r"):
    return [dict(recipe=recipe, seed=seed, e=number) for seed, number in enumerate(numbers)]


# Files


def test_many_writers_lose_and_double_nothing(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    code = "for i in range(40): append_row(path, dict(writer=sys.argv[2], i=i, filler='x' * 3000))"
    writers = [start(code, path, name) for name in "abcd"]
    assert [writer.communicate()[1] for writer in writers] == [""] * 4
    rows = read_rows(path)
    assert sorted((row["writer"], row["i"]) for row in rows) == [(name, i) for name in "abcd" for i in range(40)]
    assert all([row["i"] for row in rows if row["writer"] == name] == list(range(40)) for name in "abcd")


def test_writers_of_the_same_runs_leave_one_row_each(tmp_path):
    path = tmp_path / "r.jsonl"
    code = "print(sum(append_row(path, dict(recipe='r', config={}, seed=i), same=same_run) for i in range(25)))"
    new = [int(writer.communicate()[0]) for writer in [start(code, path) for _ in range(3)]]
    assert sum(new) == 25 and sorted(row["seed"] for row in read_rows(path)) == list(range(25))


def test_killed_writer_loses_no_row_it_has_reported(tmp_path):
    path = tmp_path / "r.jsonl"
    writer = start(
        "for i in range(10**6):\n    append_row(path, dict(i=i, filler='x' * 5000))\n    print(i, flush=True)", path
    )
    for _ in range(20):
        reported = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    rest = writer.communicate()[0].split()
    reported = int(rest[-1]) if rest else reported
    append_row(path, dict(i="after"))  # the dead process holds no lock
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert [row["i"] for row in rows[: reported + 1]] == list(range(reported + 1)) and rows[-1] == dict(i="after")


def test_a_full_disk_takes_nothing_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "r.jsonl"
    append_row(path, dict(seed=0, filler="x" * 3000))
    before = path.read_bytes()
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    append_row(path, dict(seed=1, filler="y" * 3000))
except OSError as error:
    print(error)
append_row(path, dict(seed=2))
"""
    out, err = start(code, path).communicate()
    assert "cannot write a row" in out and "r.jsonl" in out and err == ""
    assert path.read_bytes()[: len(before)] == before and [row["seed"] for row in read_rows(path)] == [0, 2]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        append_row(tmp_path / "file" / "r.jsonl", {})
    with pytest.raises(OSError, match="r.jsonl"):
        (tmp_path / "r.jsonl").mkdir()
        append_row(tmp_path / "r.jsonl", {})
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(OSError, match="closed"):
            append_row(tmp_path / "closed" / "r.jsonl", {})


def test_a_file_cut_at_any_byte_loses_only_the_cut_row(tmp_path):
    path, rows = tmp_path / "r.jsonl", [dict(seed=seed, note="ä|\u2028\n") for seed in range(3)]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        last = whole[:size].rpartition(b"\n")[2]
        if not last or last.endswith(b"}"):
            assert read_rows(path) == rows[: kept + bool(last)]
        else:
            with pytest.raises(DamagedRow, match=f"r.jsonl, line {kept + 1}: damaged"):
                read_rows(path)
        append_row(path, dict(seed="new"))
        lines = path.read_bytes().split(b"\n")
        assert [json.loads(line) for line in lines[:kept]] == rows[:kept] and lines[-2:] == [b'{"seed": "new"}', b""]


@pytest.mark.parametrize(
    "line, said",
    [
        (b"[1, 2]", "found list"),
        (b"null", "found NoneType"),
        (b"3", "found int"),
        (b"{'a': 1}", "damaged"),
        (b'{"a": 1} {"b": 2}', "damaged"),
        (b"\0" * 20, "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"a": "\xff"}', "damaged"),
        (b"text", "damaged"),
    ],
)
def test_lines_that_are_no_rows(line, said, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DamagedRow, match=f"r.jsonl, line 3: .*{said}"):
        read_rows(path)
    path.write_bytes(path.read_bytes().replace(line, b"   "))
    assert read_rows(path) == [dict(a=1), dict(a=2)] and read_rows(tmp_path / "absent.jsonl") == []


def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    with pytest.raises(TypeError):
        append_row(path, dict(a={1, 2}))
    assert not path.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.dictionaries(st.text(), JSON), max_size=4))
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "r.jsonl"
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


def test_a_damaged_file_stops_the_search_for_the_same_run(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"seed": 0}\n{"se')
    with pytest.raises(DamagedRow, match="line 2"):
        append_row(path, dict(seed=1), same=same_run)
    assert path.read_text() == '{"seed": 0}\n{"se'


# Which rows


def test_latest_never_mixes_settings():
    old = [dict(recipe="r", seed=seed, config=dict(lr=1), e=1) for seed in range(5)]
    new = [dict(recipe="r", seed=seed, config=dict(lr=2), e=2) for seed in range(2)]
    other = [dict(recipe="s", seed=0, config=dict(lr=1))]
    assert latest([*old, *other, *new]) == [*other, *new]
    assert latest(iter([*old, *old[::-1]])) == old and latest([]) == []
    assert latest([old[0], old[0] | dict(e=9)]) == [old[0] | dict(e=9)]


def test_same_run_ignores_what_a_rerun_changes():
    row = dict(recipe="r", seed=0, config=dict(lr=1), seconds=1.0)
    assert same_run(row, row | dict(seconds=2.0, time="later"))
    assert not any(same_run(row, row | change) for change in (dict(seed=1), dict(config=dict(lr=2)), dict(recipe="s")))


def test_publish_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "files", lambda package: tmp_path / package)
    assert published() == [] and published("r") == []
    for row in rows_of([1, 2]):
        append_row(tmp_path / "own" / "r.jsonl", row)
    append_row(tmp_path / "own" / "s.jsonl", dict(recipe="s", seed=0))
    assert (
        publish("r", tmp_path / "own") == 2
        and publish("r", tmp_path / "own") == 0
        and publish("absent", tmp_path / "own") == 0
    )
    assert published("r") == published() == rows_of([1, 2])
    assert publish("s", tmp_path / "own") == 1 and len(published()) == 3


# Statistics


def test_rows_of_a_renamed_recipe_are_found_by_both_names(tmp_path, monkeypatch):
    aliases = {"old": "new", "older": "new"}
    made = [dict(recipe="older", seed=0, config={}), dict(recipe="old", seed=1, config={})]
    made += [dict(recipe="new", seed=1, config={}, again=True), dict(recipe="other", seed=0, config={})]
    found = latest(made, aliases)
    assert [(row["recipe"], row["seed"]) for row in found] == [("new", 0), ("new", 1), ("other", 0)]
    assert found[1]["again"], "the row written last"
    assert made[0]["recipe"] == "older", "rows themselves stay as they are"
    assert latest([made[0] | {"config": {"lr": 1}}, made[2]], aliases) == [made[2]], "settings that it has no more"
    monkeypatch.setattr(results, "files", lambda package: tmp_path / package)
    for row in made:
        append_row(tmp_path / "results" / f"{row['recipe']}.jsonl", row)
    assert [publish("old", tmp_path / "results", aliases=aliases) for _ in range(2)] == [3, 0]
    shipped = tmp_path / "ff_research" / "published"
    assert {path.stem for path in shipped.glob("*.jsonl")} == {"older", "old", "new"}, "under their own names"
    for name in ("new", "old", "older", None):
        assert sorted(published(name, aliases=aliases), key=lambda row: row["seed"]) == found[:2]
    assert len(published("old", aliases={})) == 1


def test_old_names_are_those_of_the_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "files", lambda package: tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.toml").write_text('[now]\nalias = ["before", "once"]\n[other]\nlike = "now"')
    assert results.old_names.__wrapped__() == {"before": "now", "once": "now"}


def test_summary_against_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 5, 30):
        x = rng.exponential(size=n)
        s = summary(rows_of(x), "e")
        low, high = stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))
        assert (
            np.allclose([s["mean"], s["std"], s["low"], s["high"]], [x.mean(), x.std(ddof=1), low, high])
            and s["n"] == n
        )
    constant = summary(rows_of([2.0] * 4), "e")
    assert constant == dict(mean=2, std=0, low=2, high=2, n=4)


def test_paired_difference_against_scipy_and_all_resamples():
    d = np.array([0.3, -0.1, 0.8, 0.4, 0.2])
    got = paired_difference(rows_of(d), rows_of(d * 0), "e")
    theirs = stats.bootstrap(
        (d,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(9)
    ).confidence_interval
    exact = np.quantile([np.mean(draw) for draw in product(d, repeat=5)], (0.025, 0.975))
    assert np.allclose((got["low"], got["high"]), theirs, atol=0.03) and np.allclose(
        (got["low"], got["high"]), exact, atol=0.03
    )
    assert got == paired_difference(rows_of(d), rows_of(d * 0), "e")


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=6), st.lists(st.floats(-50, 50), min_size=6, max_size=6))
def test_what_seeds_share_cancels(d, hard):
    hard = np.array(hard[: len(d)])
    plain, shifted = (
        paired_difference(rows_of(d), rows_of(np.zeros(len(d))), "e"),
        paired_difference(rows_of(d + hard), rows_of(hard), "e"),
    )
    assert all(np.isclose(plain[key], shifted[key], atol=1e-9) for key in ("mean", "low", "high"))
    assert min(d) - 1e-9 <= plain["low"] <= plain["high"] <= max(d) + 1e-9


def test_pairs_are_by_seed():
    a, b = rows_of([1.0, 2.0, 3.0]), [dict(seed=2, e=0.0), dict(seed=1, e=0.0), dict(seed=7, e=100.0)]
    assert paired_difference(a, b, "e")["mean"] == 2.5 and paired_difference(a, b, "e")["n"] == 2


def test_too_few_pairs_and_no_scatter():
    for a, common in (([], 0), (rows_of([1.0]), 1)):
        with pytest.raises(ValueError, match=f"{common} common seeds"):
            paired_difference(a, rows_of([1.0, 2.0]), "e")
    assert paired_difference(rows_of([1.0, 2.0]), rows_of([0.5, 1.5]), "e") == dict(
        mean=0.5, low=0.5, high=0.5, t_low=0.5, t_high=0.5, n=2, real=True
    )


def test_a_difference_is_real_only_where_both_intervals_say_so():
    d = np.array([0.05, 0.1, 0.15, 0.6, 0.9])  # the bootstrap leaves out 0, Student's interval does not
    got = paired_difference(rows_of(d), rows_of(np.zeros(5)), "e")
    student = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert np.allclose((got["t_low"], got["t_high"]), (student.low, student.high))
    assert got["low"] > 0 > got["t_low"] and not got["real"]
    assert (
        paired_difference(rows_of(d + 1), rows_of(np.zeros(5)), "e")["real"]
        and paired_difference(rows_of(-d - 1), rows_of(np.zeros(5)), "e")["real"]
    )
    renamed = [dict(seed=seed, f=0.0) for seed in range(2)]
    assert paired_difference(rows_of([1.0, 2.0]), renamed, "e", "f") == paired_difference(
        rows_of([1.0, 2.0]), rows_of([0.0, 0.0]), "e"
    )


def test_mixed_recipes_are_refused():
    both = rows_of([1.0, 2.0]) + rows_of([3.0], "s")
    for action in (lambda: column(both, "e"), lambda: summary(both, "e"), lambda: paired_difference(both, both, "e")):
        with pytest.raises(ValueError, match="two rows have seed 0"):
            action()


@pytest.mark.parametrize(
    "key, expected", [("a", {"b": 0}), ("a.b", 0), ("a.b.c", None), ("x", None), ("a.x", None), ("n", None)]
)
def test_value(key, expected):
    assert value({"a": {"b": 0}, "n": None}, key) == expected


def test_zero_is_a_number_and_missing_is_not():
    assert column([dict(seed=0, e=0.0), dict(seed=1)], "e") == {0: 0.0}
    assert spread(summary([dict(seed=0, e=0.0)], "e")) == "0.00" and spread(summary([dict(seed=1)], "e")) == "n/a"


# Tables

CELLS = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=2, max_size=2)


@settings(deadline=None, max_examples=60)
@given(st.lists(CELLS, max_size=4))
def test_tables_can_be_read_back(cells):
    rows, columns = [dict(zip("ab", line)) for line in cells], dict(a="first, one", b="second | one")
    assert list(csv.reader(io.StringIO(as_table(rows, columns, "csv")))) == [list(columns.values()), *cells]
    lines = as_table(rows, columns).split("\n")
    assert lines.pop() == "" and len({len(line) for line in lines}) == 1 and set(lines[1]) == {"|", " ", "-"}
    if not any("\\" in cell for line in cells for cell in line):
        back = [[cell.strip(" ").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert back[0] == list(columns.values()) and back[2:] == [[cell.strip(" ") for cell in line] for line in cells]


@pytest.mark.skipif(not (find_spec("great_tables") and find_spec("polars")), reason="needs the extra: book")
def test_html():
    html = as_table([dict(a="1.46 ± 0.05")], dict(a="error"), "html")
    assert "<table" in html and "1.46 ± 0.05" in html and "error" in html


def test_html_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "great_tables", None)
    with pytest.raises(ImportError, match=r"ff_research\[book\]"):
        as_table([dict(a=1)], dict(a="a"), "html")


def test_rows_of_other_data_are_other_runs():
    row = dict(recipe="a", config={}, seed=0, data=dict(name="mine", checksum="1"))
    assert not same_run(row, row | dict(data=dict(name="mine", checksum="2")))
    assert same_run(row, row) and same_run(row, dict(recipe="a", config={}, seed=0))
    assert same_run(row, row | dict(data=dict(name="mine")))  # published before the checksum was kept


def test_rows_that_are_there_are_not_made_again(tmp_path):
    class Run:
        def __init__(self, name, rate):
            self.name, self.rate = name, rate

        def identity(self):
            return dict(rate=self.rate)

    made = []

    def make(run, seed):
        made.append((run.name, seed))
        return dict(recipe=run.name, config=run.identity(), seed=seed)

    a, b = Run("a", 0.1), Run("b", 0.1)
    next(keep_rows("part", iter([a, b]), [0, 1], make, tmp_path))  # stopped after the first
    assert read_rows(tmp_path / "part" / "a.jsonl") == [dict(recipe="a", config=dict(rate=0.1), seed=0)]
    rows = list(keep_rows("part", iter([a, b]), [0, 1], make, tmp_path))
    assert [(row["recipe"], row["seed"]) for row in rows] == [("b", 0), ("a", 1), ("b", 1)]
    assert made == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [row["config"] for row in keep_rows("part", [Run("a", 0.2)], [0], make, tmp_path)] == [dict(rate=0.2)]
