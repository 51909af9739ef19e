"""The book's first part: the leaderboard says what the rows say, the front page what the leaderboard says, links exist."""

import base64
import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest

from ff_research import leaderboard
from ff_research.cli import main
from ff_research.leaderboard import (
    COLUMNS,
    CONVOLUTIONS,
    CSV,
    SAME,
    hardware_of,
    has_line,
    kind_of,
    line_of,
    loss_of,
    method_of,
    name_of,
    paper_of,
    read_outs,
    to_csv,
    to_html,
)
from ff_research.recipes import RECIPES, recipe
from ff_research.results import published
from ff_research.statistics import interval_or_one
from ff_research.strategies import STRATEGIES, LabelEmbeddingStrategy

ROOT = Path(__file__).resolve().parents[1]
START = ("001_ten_minutes", "002_leaderboard", "003_which", "004_key_findings", "005_glossary")
PICTURE = ROOT / "nbs" / "images" / "ff-beside-backprop.svg"
needs_book = pytest.mark.skipif(not (find_spec("itables") and find_spec("polars")), reason="needs the extra: book")


@pytest.fixture(scope="module")
def lines():
    return leaderboard.leaderboard()


def cells(stem, kind):
    found = json.loads((ROOT / "nbs" / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


# The leaderboard


def test_each_line_says_what_its_rows_say(lines):
    for line in lines:
        rows = published(line["recipe"])
        assert line["n"] == len(rows) >= (1 if RECIPES[line["recipe"]].network.name in CONVOLUTIONS else 5)
        for letter, key in zip("ab", read_outs(rows[0])):
            if key is None:
                assert line[letter] is line[f"{letter}_low"] is None
                continue
            values = [errors_at(row, key) for row in rows]
            assert line[letter] == pytest.approx(sum(values) / len(values))
            found = interval_or_one(rows, key)
            assert (line[f"{letter}_low"], line[f"{letter}_high"]) == pytest.approx((found["low"], found["high"]))
            assert line[f"{letter}_low"] <= line[letter] <= line[f"{letter}_high"]


def errors_at(row, key):
    for part in key.split("."):
        row = row[part]
    return row


def test_seconds_are_those_of_one_kind_of_hardware(lines):
    for line in lines:
        kind = line["hardware"].split(" (")[0].split(",")[0]
        timed = [row["seconds"] for row in published(line["recipe"]) if hardware_of(row) == kind]
        assert timed and line["seconds"] == pytest.approx(median(timed))


def test_cost_is_against_backprop_of_the_same_group(lines):
    priced = [line for line in lines if line["cost"] is not None]
    assert len(priced) > 20 and {line["cost"] for line in lines if line["method"] == "Backprop"} == {1.0}
    for line in priced:
        (other,) = [x for x in lines if x["method"] == "Backprop" and all(x[key] == line[key] for key in SAME)]
        mine, theirs = (published(x["recipe"]) for x in (line, other))
        kinds = [kind for kind in map(hardware_of, mine) if kind in map(hardware_of, theirs)]
        ratios = {
            kind: median(row["seconds"] for row in mine if hardware_of(row) == kind)
            / median(row["seconds"] for row in theirs if hardware_of(row) == kind)
            for kind in kinds
        }
        assert any(line["cost"] == pytest.approx(ratio) for ratio in ratios.values())


def test_what_has_a_line_and_what_has_not(lines):
    there = {line["recipe"] for line in lines}
    assert {"hinton-supervised", "mnist-backprop", "cifar10-all-labels", "mnist-random", "scff-mnist"} <= there
    assert not there & {
        "mnist-rotation-ff",  # a pretext task
        "scff-mnist-readings",  # the same networks read in other ways
        "mnist-talk-alone-8layers",  # two seeds, no search
        "mnist-talk-layer-wise-gentle",  # a setting carried over
        "pixels",  # one row
    }
    rows = published("mnist-backprop")
    assert has_line(RECIPES["mnist-backprop"], rows) and not has_line(RECIPES["mnist-backprop"], rows[:4])
    assert not has_line(RECIPES["mnist-backprop"].vary(lr=0.5), rows), "rows of another setting"


def test_own_rows_and_recipes():
    mine = RECIPES["mnist-backprop"].vary(name="mine")
    rows = [row | {"recipe": "mine"} for row in published("mnist-backprop")]
    (line,) = leaderboard.leaderboard(rows, {"mine": mine})
    expected = line_of(mine, rows) | {"cost": 1.0}
    del expected["times"]
    assert line == expected
    assert leaderboard.leaderboard(rows, {}) == []


def test_readers_see_names_and_no_ids(lines):
    assert not {line["method"] for line in lines} & RECIPES.keys()
    assert not [line["method"] for line in lines if "_" in line["method"]]
    named = {(line["data"], *(line[k] for k in ("network", "images", "epochs", "method", "loss"))) for line in lines}
    assert len(named) == len(lines), "two lines that a reader cannot tell apart"


@pytest.mark.parametrize(
    "name, method, loss, paper, kind",
    [
        ("mnist-label-embedding", "FF, uniform labels", "Hinton's", "Hinton (2022)", "FF with labels"),
        ("swish-symba", "FF, hard labels, swish-SymBa", "swish-SymBa", "Hinton (2022); dah33 (2023)", "FF with labels"),
        ("mnist-mono-forward", "Local classifier", "cross-entropy", "Gong et al. (2025)", "local classifier"),
        ("mnist-backprop", "Backprop", "cross-entropy", "", "backprop"),
        ("mnist-random", "Untrained network", "", "", "no training"),
        (
            "mnist-talk-previous-greedy",
            "FF, uniform labels, collaboration (previous), layer after layer",
            "Hinton's",
            "Hinton (2022); Lorberbom et al. (2024)",
            "FF with labels",
        ),
        (
            "mnist-mixing-swish-rates",
            "FF without labels, hybrid images, swish-SymBa, a rate for each layer",
            "swish-SymBa",
            "Hinton (2022); dah33 (2023)",
            "FF without labels",
        ),
    ],
)
def test_names(name, method, loss, paper, kind):
    r = recipe(name)
    assert (name_of(r), loss_of(r), paper_of(r), kind_of(r)) == (method, loss, paper, kind)


def test_a_strategy_of_ones_own_is_named_by_its_class(monkeypatch):
    class UpsideDown(LabelEmbeddingStrategy):
        name = "upside_down"

    monkeypatch.setitem(STRATEGIES, "upside_down", UpsideDown)
    r = RECIPES["mnist-label-embedding"].vary(strategy="upside_down", name="mine")
    assert method_of(r) == leaderboard.Method("upside down", "contrasted", "?")
    assert name_of(r) == "upside down" and kind_of(r) == "FF with labels"


def test_csv_holds_every_number(lines, tmp_path):
    to_csv(lines, tmp_path / "new" / "board.csv")
    with open(tmp_path / "new" / "board.csv", encoding="utf-8", newline="") as f:
        found = list(csv.DictReader(f))
    assert len(found) == len(lines) and tuple(found[0]) == CSV
    for there, line in zip(found, lines):
        for key in ("a", "a_low", "a_high", "b", "b_low", "b_high", "cost", "seconds"):
            assert float(there[key]) == line[key] if there[key] else line[key] is None
        assert all(there[key] == line[key] for key in ("method", "target", "recipe", "hardware"))


@needs_book
def test_the_page_needs_no_network(lines, tmp_path):
    to_html(lines[:30], tmp_path / "board.html")
    page = (tmp_path / "board.html").read_text(encoding="utf-8")
    assert len(page) < 1_500_000
    assert not re.search(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=", page)
    assert "injectModule(" in page and "unpkg.com" not in re.sub(r"[\"'][A-Za-z0-9+/=]{1000,}[\"']", "", page)
    shown = [line for line in lines[:30] if line["method"] in page]
    assert len(shown) == 30 and all(heading in page for heading in COLUMNS.values())
    packed = max(re.findall(r"[A-Za-z0-9+/=]{1000,}", page), key=len)
    assert b"DataTable" in base64.b64decode(packed), "the library itself is in the page"


def shell(line, capsys):
    try:
        main(line)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell(["leaderboard", "--grep", "CIFAR-10"], capsys)
    assert code == 0 and out.count("\n") == 2 + sum("CIFAR-10" in line.values() for line in lines)
    assert "| Backprop " in out and " n/a " in out and "None" not in out
    code, out, _ = shell(["leaderboard", "--csv", "board.csv"], capsys)
    assert (code, out) == (0, f"{len(lines)} methods: board.csv\n")
    assert (tmp_path / "board.csv").read_text(encoding="utf-8").count("\n") == 1 + len(lines)
    code, out, err = shell(["leaderboard", "--grep", "nothing like it"], capsys)
    assert (code, out) == (2, "") and "no published method has 'nothing like it'" in err and err.count("\n") == 1


# The animation


def test_the_picture_moves_alone_and_stands_still_where_wanted():
    text = PICTURE.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and root[0].tag.endswith("title") and PICTURE.stat().st_size < 300_000
    assert not re.search(r"<script|<foreignObject|@import|url\(https?:|href=\"https?:", text)
    css = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    still, moving = css.split("@media (prefers-reduced-motion:no-preference)")
    assert "animation" not in still and moving.count("@keyframes") > 20
    names = set(re.findall(r"@keyframes ([\w-]+)", moving))
    assert names == set(re.findall(r'class="([pfr](?:-\d)+)"', text)), "each mark has its artist"
    assert not re.search(r'id="[pfr]-\d', text)


def test_the_chapter_shows_the_same_picture():
    shown = [
        "".join(output["data"]["image/svg+xml"])
        for cell in cells("001_ten_minutes", "code")
        for output in cell["outputs"]
        if "image/svg+xml" in output.get("data", {})
    ]
    assert shown[0] == PICTURE.read_text(encoding="utf-8")  # what follows are the chapter's own plots


@pytest.mark.parametrize("name", ["README.md", "index.qmd"])
def test_pictures_have_words_beside_them(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    (alt, link, more) = next(iter(re.findall(r"!\[([^\]]+)\]\(([^)\s]*ff-beside-backprop\.svg)\)(\{.*?\})?", text)))
    assert (ROOT / link[link.index("nbs/") :]).exists()
    assert len((re.search(r'fig-alt="(.+?)"', more) or ["", alt])[1]) > 100


# The front page


@pytest.fixture(scope="module")
def front():
    return (ROOT / "index.qmd").read_text(encoding="utf-8")


def test_front_page_has_one_title_and_four_buttons(front):
    outside = re.sub(r"```.*?```", "", front, flags=re.S)
    assert len(re.findall(r"^# ", outside, re.M)) == 1
    assert len(re.findall(r"\]\([^)]+\)\{\.btn ", front)) == 4


@pytest.mark.parametrize("place", ["index.qmd", *(f"nbs/{stem}.ipynb" for stem in START)])
def test_links_inside_the_book_exist(place):
    path = ROOT / place
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(source(cell) for cell in cells(path.stem, "markdown"))
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    made = {"leaderboard.html"}  # `make book` writes it
    assert [link for link in links if not (path.parent / link).exists() and link not in made] == []
    into = [link.split("/blob/main/")[1] for link in re.findall(r"\]\((https://[^)\s]+)\)", text) if "/blob/" in link]
    assert [name for name in into if not (ROOT / name).exists()] == []


TABLE = {
    "FF, uniform labels, Hinton's loss": "label-embedding",
    "FF, hard labels, swish-SymBa": "hard-swish",
    "FF without labels, hybrid images": "image-mixing",
    "Local classifier": "mono-forward",
    "Backprop": "backprop",
    "Untrained network": "random",
}


def told(line, letter):
    if line[letter] is None:
        return f"{letter.upper()} n/a"
    return f"{letter.upper()} {line[letter]:.2f} ({line[f'{letter}_low']:.2f} to {line[f'{letter}_high']:.2f})"


def test_each_number_of_the_front_pages_table_is_the_leaderboards(front, lines):
    by_recipe = {line["recipe"]: line for line in lines}
    rows = dict(re.findall(r"^\| \[([^\]]+)\]\([^)]+\) \| (.+) \|$", front, re.M))
    assert rows.keys() == TABLE.keys()
    for name, what in TABLE.items():
        of = [by_recipe[f"centred-{data}-{what}"] for data in ("mnist", "fashion", "cifar10")]
        assert rows[name].split(" | ") == [f"{told(line, 'a')}<br>{told(line, 'b')}" for line in of]
        assert {(line["network"], line["images"], line["n"]) for line in of} == {("3 x 500", "centred", 5)}
        assert {line["epochs"] for line in of} == {"0" if what == "random" else "8"}
        assert {line["trials"] for line in of} == {None if what == "random" else 8}
        assert name.startswith(of[0]["method"]) and {line["covers"] for line in of} == {"seeds and images"}
        assert [line["hardware"].split()[-1] for line in of] == ["bf16", "bf16", "fp32"]


def test_the_front_pages_code_and_output_are_those_of_the_first_chapter(front):
    (cell,) = [cell for cell in cells("001_ten_minutes", "code") if 'ff.load("digits")' in source(cell)]
    (code,) = re.findall(r"```python\n(.*?)```", front, re.S)
    assert code.split("\n\n", 1) == ["import ff_research as ff", source(cell).replace(", progress=False", "") + "\n"]
    assert len([line for line in code.splitlines() if line]) <= 8
    (out,) = re.findall(r"```\n(A .*?)```", front, re.S)
    assert out == "".join(cell["outputs"][0]["text"])


# The chapters


def test_key_findings_are_at_most_eight_and_each_leads_somewhere():
    text = "\n\n".join(source(cell) for cell in cells("004_key_findings", "markdown"))
    found = re.search(r"^## Findings\n(.*?)(?=^## )", text, re.S | re.M)[1]
    parts = re.split(r"^### \d\. ", found, flags=re.M)[1:]
    assert 0 < len(parts) <= 8
    for part in parts:
        assert re.search(r"→ @sec-[\w-]+", part) and re.search(r"\(.?\d+\.\d+ to .?\d+\.\d+", part), part
    assert "## Open questions" in text


def test_a_number_that_no_claim_explains_is_found_on_both_pages(tmp_path):
    import shutil

    from ff_research.claims import finding_texts, read_claims, uncovered

    book = read_claims()
    places = finding_texts(book, ROOT)
    for name, heading in (("index.qmd", "Three findings"), ("nbs/004_key_findings.ipynb", "Findings")):
        file, text = places[f"{name}, {heading}"]
        words = [words for claim in book.claims.values() for words in claim.texts.get(file, ())]
        assert len(text) > 500 and uncovered(text, words) == []
        assert uncovered(text + " It gains 7.77 pp.", words) == ["7.77"]
    (tmp_path / "nbs").mkdir()
    for name in ("README.md", "index.qmd", "nbs/004_key_findings.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    alone = replace(book, findings={"index.qmd": "No such heading"})
    assert finding_texts(alone, tmp_path)["index.qmd, No such heading"] == ("index.qmd", "")


def test_every_term_of_the_style_guide_is_in_the_glossary():
    text = "\n".join(source(cell) for cell in cells("005_glossary", "markdown"))
    terms = re.findall(r"^\| \*\*(.+?)\*\*(?:[^|(]*\(([^)|]*)\))?[^|]*\|(.*)\| @([\w-]+) \|$", text, re.M)
    named = {name.strip(" `") for term, also, *_ in terms for name in (term, *also.split(","))}
    assert {
        "baseline", "representation", "hyperparameter", "learning rate", "ablation", "read-out", "linear probe",
        "goodness", "threshold", "activity", "positive", "negative", "neutral label", "hard negative",
        "peer normalisation", "layer collaboration", "frozen", "fine-tuning", "dead unit", "effective rank", "seed",
        "confidence interval", "percentage point", "pp",
    } <= named  # fmt: skip
    assert len(terms) == len({term for term, *_ in terms}), "a term stands there twice"
    assert [term for term, _, meaning, _ in terms if not 1 <= len(re.findall(r"[.]( |$)", meaning.strip())) <= 3] == []


def test_every_term_and_symbol_stands_in_the_chapter_that_it_links_to():
    own = "\n".join(source(cell) for cell in cells("005_glossary", "markdown"))
    home = {}
    for path in ROOT.glob("nbs/[0-9]*.ipynb"):
        if path.stem != "005_glossary":
            text = "\n".join(map(source, json.loads(path.read_text(encoding="utf-8"))["cells"]))
            home |= dict.fromkeys(re.findall(r"^# .*\{#(sec-[\w-]+)\}", text, re.M), text)
    terms = re.findall(r"^\| \*\*(.+?)\*\*(?:[^|(]*\(([^)|]*)\))?[^|]*\|.*\| @([\w-]+) \|$", own, re.M)
    symbols = re.findall(r"^\| (\$.+?) \| (`.+?`) \|.*\| @([\w-]+) \|$", own, re.M)
    for term, also, chapter in terms:
        names = [name.strip(" `").lower() for name in (term, *also.split(",")) if name.strip()]
        assert any(name in home[chapter].lower() for name in names), (chapter, names)
    for written, code, chapter in symbols:
        names = re.findall(r"`(.+?)`", code) + re.findall(r"\$(.+?)\$", written)
        assert any(name in home[chapter] for name in names), (chapter, names)
    rows = [line for line in own.splitlines() if line.startswith("| ") and "@sec-" in line]
    assert len(terms) + len(symbols) == len(rows)


def test_the_part_comes_first():
    import yaml

    book = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    part = next(entry for entry in book["book"]["chapters"] if isinstance(entry, dict))
    assert part["part"] == "Start" and part["chapters"] == [f"nbs/{stem}.ipynb" for stem in START]
    assert "nbs/leaderboard.html" in book["project"]["resources"]


def test_the_leaderboard_knows_every_strategy_and_reads_class_scores():
    from ff_research.leaderboard import METHODS, OWN_LOSSES, loss_of, network_of, read_outs
    from ff_research.recipes import RECIPES
    from ff_research.strategies import STRATEGIES

    ours = {name for name, cls in STRATEGIES.items() if cls.__module__.startswith("ff_research.")}
    assert ours == set(METHODS) and set(OWN_LOSSES) <= ours
    for name, cls in STRATEGIES.items():
        if name in METHODS:
            assert (METHODS[name].labels == "contrasted") == cls.contrasts_labels, name
            assert (METHODS[name].negatives == "none") == (not cls.has_negatives or name == "softhebb"), name
    conv = RECIPES["cifar10-conv-channels"]
    assert network_of(conv) == "conv, 60-130-260-510, batch norm behind ReLU" and "channels" in loss_of(conv)
    errors = dict(scores=dict(layer_1=50.0, sum=30.0), ridge=dict(layer_1=40.0, layers_2_to_4=28.0))
    assert read_outs(dict(errors=dict(test=errors))) == ("errors.test.scores.sum", "errors.test.ridge.layers_2_to_4")
