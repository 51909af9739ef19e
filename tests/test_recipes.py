"""Recipes: what a recipe may be, files of recipes, what is inherited, and the one line that a mistake gets."""

import itertools
import json
import pickle
import re
from pathlib import Path

import pytest

import ff_research
from ff_research.pretext import PRETEXTS
from ff_research.recipes import FILES, RECIPES, Recipe, as_stages, as_tuples, load_recipes, recipe

CONFIGS = Path(ff_research.__file__).parent / "configs"


@pytest.fixture
def load(tmp_path):
    "Recipes of a file with the given text."

    def load(text, **options):
        (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
        return load_recipes(tmp_path / "mine.toml", **options)

    return load


# Recipes of the book


@pytest.mark.parametrize("name", RECIPES)
def test_config_survives_json_and_holds_every_setting(name):
    config = RECIPES[name].identity()
    assert json.loads(json.dumps(config)) == config
    bare = Recipe(name=name, data=config["data"]).vary(**{key: as_tuples(v) for key, v in config.items()})
    assert bare == RECIPES[name].vary(target="", search=(), alias=())


def test_names_are_keys_and_make_safe_file_names():
    assert all(name == r.name and re.fullmatch(r"[a-z0-9-]+", name) for name, r in RECIPES.items())


def test_targets_name_their_source():
    assert all(re.search(r"\d.*\(.*\d{4}.*\)", r.target) for r in RECIPES.values() if r.target)


@pytest.mark.parametrize(
    "name, near", [("lowe", "loewe"), ("Backprop", "backprop"), ("hinton", "hinton-supervised"), ("", None), (7, None)]
)
def test_unknown_names(name, near):
    with pytest.raises(
        ValueError,
        match=f"did you mean '{near}'\\? `ff-research list`" if near else "unknown recipe .*; `ff-research list`",
    ):
        recipe(name)


def test_pretext_recipes_differ_from_those_with_true_labels_in_the_task():
    likes = {"ff": "alone", "backprop": "backprop", "pairwise": "pairwise", "last": "pairwise", "no-peers": "alone"}
    assert sum(bool(r.pretext) for r in RECIPES.values()) == 18 and {r.pretext for r in RECIPES.values()} == {
        None,
        *PRETEXTS,
    }
    for name, r in RECIPES.items():
        if r.pretext:
            short, task, what = name.split("-", 2)
            assert task == r.pretext and bool(r.search) == (what != "random")
            if what != "random":
                same = RECIPES[f"{short}-talk-{likes[what]}"]
                searched = dict(
                    lr=same.optimizer.lr,
                    options=same.objective.options,
                    weight_decay=same.optimizer.weight_decay,
                    name=same.name,
                    pretext=None,
                    first=same.readout.first,
                )
                searched |= dict(peer=0.03, full_gradient=True) if what == "no-peers" else {}
                assert r.vary(**searched, search=same.search) == same
                assert r.readout.first == {"ff": 2, "no-peers": 2, "last": 3}.get(what, 1)
                assert sum(map(len, r.search)) == 8


# Recipes in Python


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(strategy_options=(("shfit", 2),)), "has no option 'shfit'; did you mean 'shift'? It has thetas"),
        (dict(strategy_options=("shift",)), "expected (name, value) pairs"),
        (dict(lr=()), "one for each layer"),
        (dict(lr=(0.1, -1.0)), "one for each layer"),
        (dict(lr=(0.1, 0.1)), "needs method = 'ff' and 3 of them"),
        (dict(lr=(0.1, 0.1, 0.1), method="backprop"), "needs method = 'ff'"),
        (dict(joined=0), "readout.joined = 0; expected"),
        (dict(readings="smooth"), "readout.readings = 'smooth'; expected a list"),
        (dict(readings=("shrp",)), "names from smooth, sharp"),
        (dict(readings=([],)), "names from smooth"),
        (dict(readings=("smooth",), method="pixels"), "method = 'pixels' has none"),
        (dict(epochs=()), "a list with one for each layer"),
        (dict(epochs=(1, 1.5, 2)), "a list with one for each layer"),
        (dict(epochs=(1, 1, 1)), "schedule.name = 'greedy'"),
        (dict(epochs=(1, 1), schedule="greedy"), "and 3 of them"),
        (dict(epochs=(1, 1, 1), schedule="greedy", method="backprop"), "need method = 'ff'"),
        *(
            (dict(full_gradient=True, method=method), "the gradient that there is")
            for method in ("backprop", "pairwise")
        ),
    ],
)
def test_bad_options_of_a_recipe(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe(name="own", data="digits").vary(strategy="self_contrastive", **change)


def test_a_recipe_is_a_value_that_cannot_be_changed():
    one = Recipe(name="own", data="digits")
    other = one.vary(lr=0.1)
    assert one.optimizer.lr == 1e-3 and other != one and other.vary(lr=1e-3) == one and hash(one.vary()) == hash(one)
    assert pickle.loads(pickle.dumps(other)) == other, "as workers receive it"
    for field, value in (("data", "mnist"), ("depth", 3)):
        with pytest.raises(ValueError):
            setattr(one, field, value)
    with pytest.raises(ValueError):
        one.optimizer.lr = 0.1


def test_settings_of_one_part_leave_the_others_alone():
    one = Recipe(name="own", data="digits").vary(strategy="self_contrastive", strategy_options=(("shift", 1),), lr=0.1)
    two = one.vary(objective="hinton", options=(("theta", 2),), peer=0.5, widths=(5, 5), readings=("smooth",))
    assert (two.strategy, two.optimizer, two.schedule) == (one.strategy, one.optimizer, one.schedule)
    assert two.identity() | one.identity() | {"readings": []} == one.identity() | {"readings": []}


def test_later_settings_stand_in_a_config_only_where_they_are_used():
    plain = Recipe(name="own", data="digits")
    assert not {"collaboration", "centred", "first", "joined", "pretext", "readings"} & plain.identity().keys()
    assert plain.vary(collaboration="all", first=1).identity() == plain.identity() | dict(collaboration="all", first=1)


@pytest.mark.parametrize(
    "search, said",
    [
        (3, "a list of stages"),
        ([3], "a table of lists or a list of tables"),
        ([[3]], "a table of lists or a list of tables"),
        ([[]], "a table of lists or a list of tables"),
        ([{"lr": 0.1}], "a list of values for each setting"),
        ([{"lr": []}], "a list of values for each setting"),
        ([{"learning_rate": [0.1]}], "unknown setting of a search 'learning_rate'"),
        ([{"lr": [object()]}], "expected numbers, texts"),
        ([dict.fromkeys(("lr", "peer", "centred", "batch_size"), list(range(11)))], "at most 10000 settings"),
    ],
)
def test_what_is_no_search(search, said):
    with pytest.raises(ValueError, match=said):
        Recipe(name="own", data="digits", search=search)


def test_forms_of_a_search():
    options = [{"theta": 1}, {"theta": 2, "scale": 0.5}]
    stages = as_stages([{"lr": [0.1, [0.1, 0.2]], "options": options}, [{"collaboration": "none", "epochs": 2}]])
    assert stages[0][0] == (("lr", 0.1), ("options", (("theta", 1),)))
    assert stages[0][3] == (("lr", (0.1, 0.2)), ("options", (("theta", 2), ("scale", 0.5))))
    assert stages[1] == ((("collaboration", None), ("epochs", 2)),) and as_stages(stages) == stages


# Files


def test_every_recipe_stands_in_one_place():
    texts = {path.stem: path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.toml")}
    assert set(texts) == set(FILES)
    for name in RECIPES:
        found = [theme for theme, text in texts.items() for _ in re.findall(rf"^\[{re.escape(name)}\]$", text, re.M)]
        assert len(found) == 1, name
    bases = sum(len(re.findall(r"^base += true$", text, re.M)) for text in texts.values())
    assert sum(len(re.findall(r"^\[", text, re.M)) for text in texts.values()) - bases == len(RECIPES)
    assert all(text.startswith("# ") for text in texts.values()), "each says on top what it holds"
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= 120


def test_tables_merge_key_by_key_and_lists_replace(load):
    made = load(
        """
[child]
like      = "parent"
optimizer = { batch_size = 7 }
network   = { widths = [5] }

[parent]
data      = "digits"
network   = { widths = [9, 9], triangle = true }
optimizer = { lr = 0.5, lr_schedule = "constant" }
schedule  = { epochs = 2 }
"""
    )
    child, parent = made["child"], made["parent"]
    assert list(made) == ["child", "parent"], "in the order of the file, whatever starts from what"
    assert child == parent.vary(name="child", batch_size=7, widths=(5,))
    assert child.optimizer.lr == 0.5 and child.network.triangle and child.schedule.epochs == 2


def test_options_merge_in_the_order_in_which_they_were_set(load):
    made = load("""
[a]
data = "digits"
objective = { name = "hinton", scale = 0.5, peer = 0.1 }
[b]
like = "a"
objective = { theta = 3, scale = 0.25 }
[c]
like = "b"
objective = { name = "symba", scale = "none", theta = "none" }
strategy = { name = "self_contrastive", thetas = [[4.0, 6.0], [1, 1]] }
""")
    assert made["b"].objective.options == (("scale", 0.25), ("theta", 3)) and made["b"].objective.peer == 0.1
    assert made["c"].objective.options == () and made["c"].objective.name == "symba"
    assert made["c"].strategy.options == (("thetas", ((4.0, 6.0), (1, 1))),)


@pytest.mark.parametrize(
    "text, settings",
    [
        ('objective = "none"', dict(peer=0.0, objective=None, options=())),
        ('objective = { name = "none", scale = "none" }', dict(objective=None, options=())),
        ('objective = { peer = "none" }', dict(peer=0.0)),
        ('optimizer = { lr = "none" }', dict(lr=1e-3)),
        ('centred = "none"', dict(centred=0.0)),
        ('network = "none"', dict(widths=(1000,) * 3, full_gradient=False)),
        ('schedule = { collaboration = "none" }', {}),
    ],
)
def test_none_switches_off_what_the_parent_has_set(text, settings, load):
    made = load(f'[mine]\nlike = "hinton-supervised"\n{text}')["mine"]
    assert made == RECIPES["hinton-supervised"].vary(name="mine", target="", search=(), **settings)


def test_target_alias_and_search_are_not_inherited(load):
    made = load(
        """
[a]
like = "symba"
target = "1 % (A 2020)"
alias = ["a-before"]
search = [{ lr = [0.1] }]
[b]
like = "a"
[c]
like = "a-before"
search = "b2"
[b2]
like = "a"
search = "symba"
""".replace('like = "a-before"', 'like = "a"')
    )
    assert (made["b"].target, made["b"].alias, made["b"].search) == ("", (), ())
    assert made["c"].search == made["b2"].search == RECIPES["symba"].search != made["a"].search != ()


def test_recipes_are_found_by_their_old_names(load):
    made = load('[now]\ndata = "digits"\nalias = ["before", "once"]')
    assert recipe("now", made) is recipe("before", made) is recipe("once", made) is made["now"]
    assert load('[later]\nlike = "once"', recipes=made)["later"].data == "digits"
    with pytest.raises(ValueError, match="did you mean 'now'"):
        recipe("nwo", made)
    assert recipe(made["now"]) is made["now"], "a recipe is its own name"


def test_several_files_that_start_from_each_other(tmp_path):
    (tmp_path / "a.toml").write_text('[a]\nlike = "b"\ncentred = 1.0')
    (tmp_path / "b.toml").write_text('[b]\nlike = "loewe"')
    assert load_recipes(tmp_path / "a.toml", tmp_path / "b.toml")["a"] == RECIPES["loewe"].vary(
        name="a", centred=1.0, target="", search=()
    )
    (tmp_path / "b.toml").write_text('[a]\nlike = "loewe"')
    with pytest.raises(ValueError, match=r"b.toml: recipe 'a': the name 'a' is taken by .*a.toml"):
        load_recipes(tmp_path / "a.toml", tmp_path / "b.toml")


LOEWE = '[mine]\nlike = "loewe"\n'


def test_a_base_is_no_recipe_and_others_start_from_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[common]\nbase = true\ndata = "digits"\nschedule = { epochs = 3 }\n[one]\nlike = "common"\n'
        '[two]\nlike = "one"\noptimizer = { lr = 0.01 }\n'
    )
    made = load_recipes(path)
    assert list(made) == ["one", "two"] and made["two"].schedule.epochs == 3 and made["two"].data == "digits"
    path.write_text('[common]\nbase = "yes"\ndata = "digits"\n')
    with pytest.raises(ValueError, match="recipe 'common'.*base"):
        load_recipes(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ('[mine]\nlikes = "loewe"', "recipe 'mine': likes is unknown; did you mean 'like'? Known: like, name, data"),
        ("[mine]\nepochs = 3", "recipe 'mine': epochs is unknown; did you mean 'schedule.epochs'?"),
        ("[mine]", "recipe 'mine': data is missing"),
        ('[mine]\nlike = "lowe"', "recipe 'mine': like = 'lowe' is no recipe; did you mean 'loewe'?"),
        ('[mine]\nlike = "main"\n[maine]', "like = 'main' is no recipe; did you mean 'maine'?"),
        ("[mine]\nlike = 3", "recipe 'mine': like = 3; expected a recipe's name"),
        ('[mine]\nlike = "mine"', "like goes in a circle, 'mine' -> 'mine'"),
        ('[a]\nlike = "b"\n[b]\nlike = "c"\n[c]\nlike = "b"', "like goes in a circle, 'b' -> 'c' -> 'b'"),
        (
            LOEWE + "network = { width = [1] }",
            "'mine': network.width is unknown; did you mean 'widths'? Known: name, widths,",
        ),
        (LOEWE + "network = { widths = [0] }", "'mine': network.widths = (0,); expected a list of numbers of units"),
        (LOEWE + "network = [1]", "recipe 'mine': network = (1,); expected a table"),
        (LOEWE + 'optimizer = { lr = "fast" }', "optimizer.lr = 'fast'; expected a number >= 0, or a list with one"),
        (LOEWE + "optimizer = { lr = inf }", "optimizer.lr = inf; expected a number >= 0"),
        (LOEWE + "optimizer = { lr = [0.1, 0.1] }", "a rate for each layer needs method = 'ff' and 3 of them"),
        (LOEWE + "optimizer = { batch_size = 1.5 }", "optimizer.batch_size = 1.5; expected a whole number"),
        (LOEWE + 'optimizer = { name = "adam" }', "optimizer.name = 'adam'; did you mean 'adamw'? Known: sgd, adamw"),
        (LOEWE + 'strategy = { name = "hard_minning" }', "strategy.name = 'hard_minning'; did you mean 'hard_mining'?"),
        (LOEWE + 'strategy = "hard_mining"', "strategy = 'hard_mining'; expected a table"),
        (LOEWE + "strategy = { shift = 2 }", "strategy: label_embedding has no option 'shift'. It has none"),
        (LOEWE + 'strategy = { nmae = "x" }', "strategy: label_embedding has no option 'nmae'; did you mean 'name'?"),
        (LOEWE + "strategy = { name = 'self_contrastive', shift = 1979-05-27 }", "option shift = datetime.date(1979"),
        (LOEWE + 'objective = { name = "hintn" }', "objective.name = 'hintn'; did you mean 'hinton'? Known: hinton,"),
        (LOEWE + 'objective = { name = "symba", aplha = 1 }', "symba has no option 'aplha'; did you mean 'alpha'?"),
        (LOEWE + 'objective = { name = "symba", alpha = "x" }', "option alpha = 'x'; expected a finite number >= 0"),
        ('[mine]\nlike = "hinton-supervised"\nobjective = { name = "symba" }', "symba has no option 'scale'"),
        (LOEWE + "schedule = { epochs = -1 }", "schedule.epochs = -1; expected a whole number from 0"),
        (LOEWE + 'schedule = { name = "greddy" }', "schedule.name = 'greddy'; did you mean 'greedy'?"),
        (LOEWE + 'schedule = { collaboration = "al" }', "schedule.collaboration = 'al'; did you mean 'all'?"),
        (LOEWE + 'readout = { probes = "rigde" }', "readout.probes = 'rigde'; did you mean 'ridge'?"),
        (LOEWE + 'pretext = "rotaton"', "recipe 'mine': pretext = 'rotaton'; did you mean 'rotation'?"),
        (LOEWE + 'method = "backprop"', "network.full_gradient = True is for one layer's own loss"),
        (LOEWE + "target = 3", "recipe 'mine': target = 3; expected a text"),
        (LOEWE + 'alias = "old"', "recipe 'mine': alias = 'old'; expected a list of words"),
        (LOEWE + 'alias = ["a/b"]', "recipe 'mine': alias = ('a/b',); expected a list of words"),
        (LOEWE + 'alias = ["symba"]', "recipe 'mine': the name 'symba' is taken by the book"),
        ('[loewe]\ndata = "digits"', "recipe 'loewe': the name 'loewe' is taken by the book"),
        (LOEWE + 'search = "lowe"', "recipe 'mine': search: unknown recipe 'lowe'; did you mean 'loewe'?"),
        (LOEWE + 'search = "mine"', "recipe 'mine': search goes in a circle"),
        (LOEWE + "search = 3", "recipe 'mine': search = 3; expected a list of stages"),
        (LOEWE + "search = [{ lrr = [0.1] }]", "unknown setting of a search 'lrr'; did you mean 'lr'?"),
        ('["../up"]\ndata = "digits"', "name = '../up'; expected a word of letters"),
        ("data = 'digits'", "data = 'digits'; expected a recipe, [data]"),
        ("[mine", "no TOML file ("),
        ("[mine]\n[mine]", "no TOML file (Cannot declare ('mine',) twice"),
        ("[mine]\ndata = " + "[" * 5000 + "]" * 5000, "mine.toml: "),
        ("[mine]\ndata = " + "[" * 100 + "]" * 100, "recipe 'mine': nested too deeply"),
        ("[mine]\ndata = " + "9" * 5000, "no TOML file (Exceeds the limit"),
        ("a" + ".a" * 3000 + " = 1", "recipe 'a': "),
    ],
    ids=itertools.count(),
)
def test_a_mistake_is_one_line_that_names_file_recipe_and_field(text, said, load):
    with pytest.raises(ValueError) as caught:
        load(text)
    assert said in str(caught.value), str(caught.value)
    assert "mine.toml: " in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_no_file_of_recipes(tmp_path):
    (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00")
    for path, said in (
        (tmp_path / "absent.toml", "there is no such file"),
        (tmp_path, "there is no such file"),
        ("/dev/zero", "there is no such file"),
        ("nul\0.toml", "there is no such file"),
        (tmp_path / "large.toml", "at most 1,000,000 bytes"),
        (tmp_path / "binary.toml", "no TOML file"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recipes(path)


def test_a_long_line_of_parents_is_followed(load):
    made = load("".join(f'[r{n}]\nlike = "r{n + 1}"\n' for n in range(3000)) + '[r3000]\ndata = "digits"')
    assert made["r0"].data == "digits" and len(made) == 3001
