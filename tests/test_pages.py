"""What a reader meets: words, lengths, figures, exercises, links, and how the site looks.

The chapters' form is checked from their sources in seconds. The last part opens the rendered book in a browser where
there is one.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [path for path in sorted(ROOT.glob("nbs/*.ipynb")) if not path.name.startswith("_")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*.qmd")), *NOTEBOOKS]
WORKSHOP, NOTES = "9", "8"  # first digits of the reference pages and of the notes on the literature

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@lru_cache
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def markdown(path):
    "The Markdown of a page, cells of a notebook as paragraphs."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")


def captions(path):
    "What cells say under and about their figures and tables."
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    return [text.strip('"') for text in re.findall(r"^#\| *(?:fig|tbl)-(?:cap|alt): *(.+)$", "\n".join(code), re.M)]


def prose(text):
    "Markdown without code, formulas, comments, addresses and labels."
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->|^---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "x", text, flags=re.S)
    text = re.sub(r"`[^`\n]*`", "x", text)
    text = re.sub(r"\]\([^)\s]*\)", "]", text)
    return re.sub(r"\{[#.][^}]*\}", "", text)


def words(text):
    return sum(any(c.isalnum() for c in word) for word in text.split())


def paragraphs(text):
    "Paragraphs and items of lists, without headings, tables and the fences of boxes."
    for block in re.split(r"\n\s*\n", prose(text)):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||:::|#)", line)]
        yield from re.split(r"\n(?=\s*(?:[-*+]|\d+\.) )", "\n".join(lines))


# Words

# Private words that have no other use in these texts; beside each what the field says. STYLE lists more of them, but a
# word such as "card" or "picture" is right in other sentences, and no pattern can tell.
PRIVATE = {
    r"\b(?:on|from|to|and) (?:the )?clothes\b": "Fashion-MNIST",
    r"\b(?:on|from|to) (?:the )?photographs\b": "CIFAR-10",
    r"\babroad\b": "on the target",
    r"\bat home\b": "on the source",
    r"\bjourneys?\b": "source→target pair",
    r"\b(?:layers?|networks?|they|it) (?:that )?(?:talks?|hears?)\b|\btalk-\w+|\bhears? (?:the|its|their) (?:others?|goodness|gamma)": (
        "layer collaboration; receive γ"
    ),
    r"\brungs?\b|\bladders?\b": "grid values",
    r"\bgentle\b": "the setting itself: lr 0.001, θ 1000",
    r"\bprocessors?\b|\b(?:on|by|of|than) the card\b|\bgraphics cards?\b": "CPU; GPU",
    r"\brivals?\b|\bsisters?\b|\bnamesakes?\b|\bnext of kin\b": "baseline; another seed",
    r"\bcom(?:es?|ing) to (?:x|\d)": "reaches",
    r"\b(?:tenths?|thirds?|quarters?|half|halves|hundredths?) of a (?:percentage )?point\b": "0.4 pp",
    r"\bin the place of\b": "instead of",
    r"\bwhoever wants\b": "to choose …, pass …",
    r"\bnot to be told from\b|\bcan ?not be told from\b|\breal differences?\b|\bdifferences? (?:is|are) real\b": (
        "resolved / unresolved (95 %, n)"
    ),
    r"\b(?:two|three|four|five|one|a|tenth of a|\d) points? (?:better|worse|lower|higher|more|less)\b": "pp",
}


@each_page
def test_words_are_the_fields(path):
    if path.name == "CONTRIBUTING.md":
        pytest.skip("for contributors")
    text = prose(markdown(path)) + "\n" + "\n".join(captions(path) if path.suffix == ".ipynb" else [])
    found = [
        f"{hit[0]!r} (write: {instead})"
        for pattern, instead in PRIVATE.items()
        for hit in re.finditer(pattern, text, re.I)
    ]
    assert found == []


# Lengths


@each_notebook
def test_a_chapter_is_short(path):
    if path.stem.startswith(WORKSHOP):
        pytest.skip("a reference page of the workshop")
    assert words(prose(markdown(path))) <= (1500 if path.stem.startswith(NOTES) else 3500)


@each_page
def test_paragraphs_are_short(path):
    if path.name == "CONTRIBUTING.md":
        pytest.skip("for contributors")
    long = {" ".join(p.split()[:8]): words(p) for p in paragraphs(markdown(path)) if words(p) > 120}
    assert long == {}


@each_notebook
def test_cells_are_few_and_short(path):
    "Cells that a reader of the page sees open: exported classes stand in one piece, hidden and folded ones are aside."
    aside = re.compile(r"^#\| *(export|hide|echo: *false|code-fold: *true)", re.M)
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code" and not aside.search(source(cell))]
    long = [
        text[:60] for text in code if sum(bool(x.strip()) and not x.startswith("#|") for x in text.splitlines()) > 25
    ]
    assert len(cells(path)) <= 60 and long == []


# Parts of a chapter


@each_notebook
def test_headings_go_down_by_one(path):
    text = re.sub(r"^(```|~~~).*?^\1", "", markdown(path), flags=re.S | re.M)
    boxes = re.sub(r"^:::+ *\{.*?^:::+ *$", "", text, flags=re.S | re.M)  # a box has headings of its own
    levels = [len(marks) for marks in re.findall(r"^(#+) \S", boxes, re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:])), levels


@each_notebook
def test_the_answer_stands_first(path):
    "In short: three bullets, before any other heading."
    if path.stem.startswith(WORKSHOP) or path.stem.startswith("00"):
        pytest.skip("a page of reference, or of the start")
    text = markdown(path)
    found = re.search(r"(?:^## In short|^\*\*In short\*\*).*?\n(.*?)(?=^:::|^## |^\S(?<![-*]))", text, re.S | re.M)
    assert found, "no 'In short'"
    assert len(re.findall(r"^[-*] ", found[1], re.M)) == 3
    assert re.findall(r"^##+ (.+)$", text[: found.start()], re.M) == []


@each_notebook
def test_it_says_how_long_it_runs(path):
    assert re.search(r"Runs in about \d+ s on two cores|No code runs here", markdown(path))


def exercises(path):
    """Exercises, and solutions that say something, of the section of that name."""
    text = "\n\n".join(source(cell) for cell in cells(path))
    section = re.search(r"^## Exercises?\b.*?\n(.*?)(?=^## (?!Solution)|\Z)", text, re.S | re.M)
    if not section:
        return 0, 0
    boxes = re.findall(r"^(:::+) *\{([^}\n]*callout[^}\n]*)\}\n(.*?)^\1 *$", section[1], re.S | re.M)
    rest = re.sub(r"^(:::+) *\{[^}\n]*callout[^}\n]*\}\n.*?^\1 *$", "", section[1], flags=re.S | re.M)
    asked = len(re.findall(r"^(?:\d+\.|\*\*(?:Exercise )?\d+|### )\s*\S", rest, re.M)) or (words(prose(rest)) > 5)
    solved = 0
    for _, attributes, body in boxes:
        folded = 'collapse="true"' in attributes
        named = re.search(r"Solutions?\b", attributes) or re.match(r"\s*#+ Solutions?\b", body)
        if folded and named and words(re.sub(r"^\s*#+ .*", "", body)) >= 3:
            solved += max(1, len(re.findall(r"^\d+\. ", body, re.M)) if "Solutions" in named[0] else 1)
    return int(asked), solved


@each_notebook
def test_each_exercise_has_a_solution(path):
    asked, solved = exercises(path)
    assert asked <= solved, f"{asked} exercises, {solved} solutions in folded callouts"


# Figures


def drawn(cell):
    return any(
        kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})
    ) and not re.search(r"^#\| *hide\b", source(cell), re.M)


@each_notebook
def test_figures_are_labelled_and_described(path):
    "A caption says what to see, the description what is there."
    missing = [
        f"{want} in {source(cell)[:50]!r}"
        for cell in cells(path)
        if drawn(cell)
        for want in ("label: *fig-", "fig-cap:", "fig-alt:")
        if not re.search(rf"^#\| *{want} *\S", source(cell), re.M)
    ]
    assert missing == []


@each_notebook
def test_figures_speak_the_readers_words(path):
    "A description is a sentence or more, and not the caption again."
    for cell in cells(path):
        text = {key: v.strip('"') for key, v in re.findall(r"^#\| *(fig-\w+): *(.+)$", source(cell), re.M)}
        if "fig-alt" in text:
            assert words(text["fig-alt"]) >= 6 and text["fig-alt"] != text.get("fig-cap"), text["fig-alt"]


@each_notebook
def test_letters_in_figures_are_large_enough(path):
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    sizes = re.findall(r"\b(?:fontsize|labelsize|\w*title_?fontsize)\s*=\s*(\d+(?:\.\d+)?)", "\n".join(code))
    assert [size for size in sizes if float(size) < 8] == []
    assert re.findall(r"\bfont(?:size)?=[\"'](?:x+-small|small|x-small)", "\n".join(code)) == []


@each_notebook
def test_imports_have_cells_of_their_own(path):
    "The book's filter runs a cell with an import whole, and whatever else it holds with it."
    for cell in cells(path):
        text = source(cell)
        if cell["cell_type"] != "code" or re.search(r"^#\| *(export|hide|eval: *false)|^[!%]", text, re.M):
            continue
        kinds = {type(node) in (ast.Import, ast.ImportFrom) for node in ast.parse(text).body}
        assert kinds != {True, False}, text[:80]


# Links


@lru_cache
def targets():
    text = "\n".join(source(cell) for path in NOTEBOOKS for cell in cells(path))
    text += "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.qmd"))
    return set(re.findall(r"\{#([\w-]+)", text)) | set(re.findall(r"^#\| *label: *(\S+)", text, re.M))


@pytest.fixture(scope="module")
def known():
    return targets() | {f"@{key}" for key in re.findall(r"^@\w+\{([^,\s]+),", read("references.bib"), re.M)}


@each_page
def test_references_and_citations_resolve(path, known):
    text = prose(markdown(path)) + "\n" + "\n".join(captions(path) if path.suffix == ".ipynb" else [])
    cited = set(re.findall(r"(?<![\w.@/])@([A-Za-z][\w-]*)", text))
    cross = {key for key in cited if re.match(r"(sec|fig|tbl|eq|lst)-", key)}
    assert cross - known == set(), "cross-references"
    assert {key for key in cited - cross if f"@{key}" not in known} == set(), "citations"


def lead_nowhere(path):
    "Links and images of a page into this book or repository whose file is not there."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    site, made = settings["doc_host"] + settings["doc_baseurl"], read("_quarto.yml")
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown(path), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
        link = link.strip("<>").replace("https://colab.research.google.com/github/", "https://github.com/")
        file, _, anchor = link.partition("#")
        for kind in ("blob", "tree"):
            file = file.replace(f"{settings['git_url']}/{kind}/{settings['branch']}/", "/")
        if file.startswith(site):
            file = file.removeprefix(site) or "/"
            if file.endswith(".html") and file.lstrip("/") not in made:
                file = file.removesuffix(".html") + ".ipynb"
            elif file.lstrip("/") in made or file == "/":
                continue
        if file.startswith(("http://", "https://", "mailto:")):
            continue
        here = ROOT / file.lstrip("/") if file.startswith("/") else path.parent / file
        generated = here.relative_to(ROOT).as_posix() in made if here.is_relative_to(ROOT) else False
        if not (here.exists() or generated or here.with_suffix(".ipynb").exists() and here.suffix == ".html"):
            yield link
        elif not file and anchor and anchor not in targets():
            yield link


@each_page
def test_links_into_the_book_lead_somewhere(path):
    assert list(lead_nowhere(path)) == []


# The site


def hexes(name):
    "Colours of a theme's variables."
    return dict(re.findall(r"^\$([\w-]+): *(#[0-9a-f]{6}) !default;", read(name), re.M))


def contrast(a, b):
    "WCAG's contrast of two colours."

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_measured_right():
    assert round(contrast("#000000", "#ffffff"), 2) == 21 and round(contrast("#767676", "#ffffff"), 2) == 4.54


def test_themes_are_readable():
    light, dark = hexes("theme.scss"), hexes("theme-dark.scss")
    assert {"link-color", "text-muted", "code-color"} <= light.keys()
    for name, colour in light.items():
        assert contrast(colour, "#ffffff") >= 4.5, name
    for name in ("body-color", "link-color", "text-muted", "code-color", "toc-color"):
        assert all(contrast(dark[name], dark[ground]) >= 4.5 for ground in ("body-bg", "sidebar-bg")), name
    assert contrast(dark["code-color"], dark["code-bg"]) >= 4.5
    assert contrast(dark["sidebar-fg"], dark["sidebar-bg"]) >= 4.5


def test_pages_fetch_nothing_from_elsewhere():
    html = yaml.safe_load(read("_quarto.yml"))["format"]["html"]
    assert html["html-math-method"] == "mathml" and "$web-font-path: false" in read("theme.scss")
    for name in [html["css"], *html["theme"]["light"][1:], *html["theme"]["dark"][1:]]:
        assert re.findall(r"https?:|@import", read(name)) == [], name


def test_what_the_site_names_is_there():
    config = yaml.safe_load(read("_quarto.yml"))
    book, html = config["book"], config["format"]["html"]
    names = [book["favicon"], book["image"], html["css"], config["project"]["post-render"]]
    names += [name for theme in html["theme"].values() for name in theme[1:]]
    assert [name for name in names if not (ROOT / name).is_file()] == []
    assert (ROOT / "nbs" / config["ipynb-filters"][0]).resolve().is_file()  # seen from a notebook's folder
    png = (ROOT / book["image"]).read_bytes()
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [1200, 630] and len(png) < 300_000
    assert "description" not in book, "it would take the place of each page's own"


def test_citation_file():
    citation, settings = yaml.safe_load(read("CITATION.cff")), read("settings.ini")
    assert {"cff-version", "message", "title", "authors", "version", "license", "repository-code"} <= citation.keys()
    assert f"\nversion = {citation['version']}\n" in settings
    assert f"\ngit_url = {citation['repository-code']}\n" in settings
    assert citation["license"].lower() in settings and citation["cff-version"] == "1.2.0"


def script(name):
    "A module from scripts/."
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


def test_llms_txt_lists_every_chapter():
    text = script("llms").text()
    for path in NOTEBOOKS:
        assert re.search(rf"^- \[\S.*\]\(https://\S+/nbs/{path.stem}\.html\): \S", text, re.M), path.name
    assert text.startswith("# ff_research\n\n> ")


def test_arguments_become_a_table():
    split = script("book_filter").split_arguments
    doc = "Does it.\n\nx: rows `[n]`, or None; the latter is slow; y, z: labels. Raises ValueError for others."
    assert split(doc, ["x", "y", "z"]) == (
        {"x": "rows `[n]`, or None; the latter is slow", "y": "labels", "z": "labels"},
        "Does it.\n\nRaises ValueError for others.",
    )
    assert split("Note: nothing.", ["x"]) == ({}, "Note: nothing.") and split("Plain.", []) == ({}, "Plain.")


def test_a_page_has_a_description_and_no_badge_from_elsewhere():
    text = "# Data {#sec-data}\n\n[![Open](https://x.org/colab-badge.svg)](https://colab.research.google.com/a)\n\n> What `x`\n> is [@a].\n\nMore."
    notebook = dict(cells=[dict(cell_type="markdown", source=[text])])
    front, first = script("book_filter").page(notebook)["cells"]
    assert front["cell_type"] == "raw" and yaml.safe_load(front["source"].strip("-\n"))["description"] == "What x is."
    assert first["source"] == (
        "# Data {#sec-data}\n\n[What `x` is [@a].]{.lead}\n\n"
        "[Open in Colab](https://colab.research.google.com/a){.colab}\n\nMore.\n"
    )


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STAND_IN = """<!doctype html><html><head><meta name=viewport content="width=device-width"><style>body{margin:0}pre{white-space:pre}
%s</style></head><body><main><h2>A_heading_%s</h2><p><code>%s</code> and <a href="#">%s</a></p>
<table><tr>%s</tr></table><pre>%s</pre><img src="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='900' height='90'/>">
<p><math display="block"><mrow>%s</mrow></math></p><p><span class="math display">\\[%s\\]</span></p>
</main><output></output><script>document.querySelector("output").textContent =
"width " + document.documentElement.scrollWidth + " of " + innerWidth</script></body></html>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_styles_keep_wide_things_in_their_box(tmp_path):
    "Everything that is wider than a phone on one page, with the rules of styles.css and theme.scss."
    css = read("styles.css") + re.sub(r"//.*|\$[\w-]+", "", read("theme.scss").split("scss:rules --*/")[1])
    wide, page = "x" * 200, tmp_path / "page.html"
    parts = [css, wide, wide, wide, "<td>a_long_word_in_a_cell</td>" * 20, wide, "<mi>x</mi><mo>+</mo>" * 120, wide]

    def width(rules):
        page.write_text(STAND_IN % (rules, *parts[1:]), encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        # a window is at least 500 wide; the frame is what is measured
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<iframe width=390 height=800 srcdoc="{page.read_text().replace(chr(34), "&quot;")}"></iframe>'
            '<output id=o></output><script>onload=()=>{const d=document.querySelector("iframe")'
            '.contentDocument;o.textContent="measured "+d.documentElement.scrollWidth}</script>'
        )
        done = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=60)
        found = re.search(r"measured (\d+)", done.stdout)
        if not found:
            pytest.skip(f"Chromium gave no page: {done.stderr[-200:]}")
        return int(found[1])

    assert width("") > 1000, "the page is not wide without the rules"
    assert width(css) <= 390


BROWSER = r"""() => {
  const light = c => {const f = v => {v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4};
    return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2])};
  const parts = s => {const c = s.match(/[\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c};
  const over = (c, b) => [0, 1, 2].map(i => c[i] * c[3] + b[i] * (1 - c[3]));
  const ground = e => {const all = []; for (; e; e = e.parentElement) all.push(parts(getComputedStyle(e).backgroundColor));
    return all.reverse().reduce((b, c) => over(c, b), [255, 255, 255])};
  const faint = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
    if (!text || e.closest("script, style, svg, .visually-hidden") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e); if (style.visibility == "hidden") continue;
    const b = ground(e), [x, y] = [light(over(parts(style.color), b)), light(b)];
    if ((Math.max(x, y) + .05) / (Math.min(x, y) + .05) < 4.49) faint.add(`${e.tagName}.${e.className}: ${text.slice(0, 40)}`);
  }
  return {width: document.documentElement.scrollWidth, faint: [...faint],
          description: document.querySelector("meta[name=description]")?.content};
}"""


@pytest.fixture(scope="module")
def browser():
    if not (ROOT / "_docs" / "index.html").exists():
        why = "" if shutil.which("quarto") else ", which needs Quarto, which is not on the PATH"
        pytest.skip(f"the book is not rendered: `make book` does it{why}")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        try:
            chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(browser, theme, width):
    "The front page and a chapter of each part: nothing scrolls sideways, nothing is faint, nothing comes from elsewhere."
    first = {path.stem[0]: path.stem for path in reversed(NOTEBOOKS)}
    for name in ["index", *(f"nbs/{stem}" for stem in first.values())]:
        asked = []
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=theme)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((ROOT / "_docs" / f"{name}.html").as_uri())
        found = page.evaluate(BROWSER)
        page.close()
        assert found["width"] <= width and found["faint"] == [], (name, found)
        assert found["description"], name
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == [], name
