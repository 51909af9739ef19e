"""The book's claims hold; and each way in which a claim can be wrong is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ff_research import claims
from ff_research.claims import (
    comparisons,
    derive,
    finding_texts,
    main,
    problems,
    read_claims,
    text_of,
    totals,
    uncovered,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def book():
    return read_claims()


@pytest.fixture(scope="module")
def derived(book):
    return derive(book)


def test_every_claim_of_the_book_holds(book, derived):
    assert problems(book, derived, ROOT) == [], "`make claims` shows what the rows say"


def test_every_claim_says_under_what_conditions(book):
    assert [claim.name for claim in book.claims.values() if not (claim.conditions and claim.overturned)] == []


def test_the_lists_of_findings_are_found(book):
    places = finding_texts(book, ROOT)
    assert len(places["README.md, What came out so far"][1]) > 1000
    assert "908_statistics.ipynb, in short" in places and "702_own.ipynb, in short" in places


def test_two_claims_about_the_same_rows_count_once(book, derived):
    labels = [derived["collaboration", "`all`, MNIST"], derived["collaboration-readouts", "labels"]]
    assert labels[0]["q"] == labels[1]["q"]
    assert totals(derived)["differences"] < sum("q" in found for found in derived.values())


@pytest.fixture
def alone(book):
    "A function that checks one claim by itself, altered."

    def check(name, root=None, **change):
        small = replace(book, claims={name: replace(book.claims[name], texts={}, won=None)}, totals={}, findings={})
        small.claims[name] = replace(small.claims[name], **change)
        return problems(small, derive(small), root)

    return check


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(number=1.39), "number is claimed as 1.39, the rows say 1.38"),
        (dict(low=1.30), "low is claimed as 1.3"),
        (dict(high=1.50), "high is claimed as 1.5"),
        (dict(n=6), "n is claimed as 6, the rows say 5"),
        (dict(made="fp32 on CPU"), "made is claimed as 'fp32 on CPU'"),
        (dict(a="no-such-recipe"), "no published row of 'no-such-recipe'"),
        (dict(key="errors.test.nothing"), "0 seeds with a number"),
        (dict(number=[1.38, 1.38]), "2 values of number for 1 comparisons"),
    ],
)
def test_a_mean_that_does_not_hold(alone, change, said):
    assert alone("hinton-supervised") == []
    (line,) = alone("hinton-supervised", **change)
    assert line.startswith("[hinton-supervised] ") and said in line


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(verdict="unresolved"), "verdict is claimed as unresolved, the rows say resolved"),
        (dict(with_images="unresolved"), "with_images is claimed as unresolved, the rows say resolved"),
        (dict(number=[-0.62, -4.51, 21.53]), "CIFAR-10: number is claimed as 21.53"),
        (dict(won=2), "won is claimed as 2, the rows say 3"),
        (dict(b="parts/{0}-no-such-recipe"), "no published row of 'parts/mnist-no-such-recipe'"),
    ],
)
def test_a_difference_that_does_not_hold(alone, change, said):
    assert alone("centring", won=3) == []
    assert any(said in line for line in alone("centring", **change))


def test_wordings_are_looked_up_and_their_numbers_explained(alone, tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "README.md").write_text("It reaches 1.38 %\n(1.33 to 1.43; paper 1.36).")

    def check(*words):
        return alone("hinton-supervised", tmp_path, texts={"README.md": list(words)})

    assert check("reaches 1.38 % (1.33 to 1.43; paper 1.36)") == []
    assert "does not say 'reaches 1.37 %'" in check("reaches 1.37 %")[0]
    assert "1.37 in 'reaches 1.37 %' is neither claimed nor given" in check("reaches 1.37 %")[1]


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("a gain of 0.31 pp", ["0.31"]),
        ("wins 4 of 6 pairs", ["4"]),
        ("at 12 % and 3 pp", ["12", "3"]),
        ("a 95 % interval over 5 seeds", []),
        ("the gain is 0.53\npp here", []),
        ("the gain is −0.53 pp here, and 0.54", ["0.54"]),
    ],
)
def test_numbers_that_no_claim_explains(text, numbers):
    assert uncovered(text, ["is 0.53 pp", "is -0.53 pp"]) == numbers


def test_a_new_number_among_the_findings_fails(book, derived, tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "index.qmd", tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    heading = "## What came out so far\n"
    (tmp_path / "README.md").write_text(readme.replace(heading, heading + "\n- A new one gains 7.77 pp.\n"))
    notebook = tmp_path / "nbs" / "908_statistics.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))
    short = next(cell for cell in cells["cells"] if "In short" in "".join(cell["source"]))
    short["source"] = ["::: {.callout-note}\n", "## In short\n", "\n", "- It is 33 % better.\n", ":::\n"]
    notebook.write_text(json.dumps(cells))
    assert problems(book, derived, tmp_path) == [
        "README.md, What came out so far: no claim explains '7.77'",
        "908_statistics.ipynb, in short: no claim explains '33'",
    ]
    words = f"{book.totals['resolved']} are *resolved*"
    assert words in readme
    (tmp_path / "README.md").write_text(readme.replace(words, "9 are *resolved*"))
    assert f"[about.totals] README.md does not say {words!r}" in problems(book, derived, tmp_path)


def test_totals_are_compared(book, derived):
    (line,) = problems(replace(book, totals=dict(differences=1, resolved=1, with_images=1)), derived)
    assert line.startswith("[about.totals] claims") and "the rows say" in line


ENTRY = """
[cases.data]
MNIST = ["mnist"]
[one]
claim = "c"
section = "s"
chapter = "@sec-x"
a = "loewe"
key = "k"
number = 1.0
conditions = "x"
made = "fp32 on CPU"
"""


@pytest.mark.parametrize(
    "text, said",
    [
        (ENTRY + 'colour = "red"\n', r"mine.toml, \[one\]: unknown field 'colour'; known: a, "),
        (ENTRY.replace('made = "fp32 on CPU"\n', ""), r"mine.toml, \[one\]: missing .*'made'"),
        (ENTRY + 'cases = "dates"\n', r"mine.toml, \[one\]: unknown cases 'dates'; known: data"),
    ],
)
def test_a_file_with_a_mistake(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_claims(tmp_path / "mine.toml")


def test_cases_and_baselines_are_written_out(tmp_path):
    (tmp_path / "mine.toml").write_text(
        ENTRY.replace('"loewe"', '"{0}-x"') + 'b = ["{0}-y", "z"]\nagainst = ["y", "z"]\ncases = "data"\n'
    )
    book = read_claims(tmp_path / "mine.toml")
    assert comparisons(book.claims["one"], book) == {
        "MNIST, against y": dict(a="mnist-x", b="mnist-y", key="k", other="k"),
        "MNIST, against z": dict(a="mnist-x", b="z", key="k", other="k"),
    }


def test_the_command_says_what_does_not_hold(tmp_path, monkeypatch, capsys, book):
    monkeypatch.chdir(tmp_path)  # no README here, as for an installed package: rows are compared all the same
    assert main() == 0 and "hinton-supervised" in capsys.readouterr().out
    wrong = replace(book.claims["hinton-supervised"], number=9.99)
    monkeypatch.setattr(claims, "read_claims", lambda: replace(book, claims={wrong.name: wrong}, totals={}))
    assert main() == 1 and "claimed as 9.99" in capsys.readouterr().err


def test_text_of_a_notebook_is_its_markdown(tmp_path):
    cells = [dict(cell_type="markdown", source=["a\n", "b"]), dict(cell_type="code", source=["c"])]
    (tmp_path / "x.ipynb").write_text(json.dumps(dict(cells=cells)))
    assert text_of(tmp_path / "x.ipynb") == "a b"
