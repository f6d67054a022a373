"""The shop: equal to the upstream engine on recorded episodes, robust against any action, and clear about bad
data."""

import copy
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs_bridge.pool import Pool
from envs_bridge.shop import catalogue as shop
from envs_bridge.shop.catalogue import Catalogue, CatalogueError, prepare, read_array
from envs_bridge.shop.engine import Shop, Shopping
from envs_bridge.shop.expert import demonstrate
from envs_bridge.shop.generate import FILES, generate_catalogue
from envs_bridge.shop.notes import ShopNotes
from envs_bridge.shop.reward import colour_of, options_met, score, word_nouns
from envs_bridge.shop.search import lossy_length, stem, terms
from envs_bridge.shop.verify import verify
from envs_bridge.text import load_json
from envs_bridge.turn import SEARCH_COMMAND, Goal, clicks
from proxmo_jax import cli

GOLDEN = Path(__file__).parents[1] / "golden" / "webshop"
CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Catalogue:
    """The recorded episodes' own."""
    return Catalogue(prepare(GOLDEN, cache=tmp_path_factory.mktemp("shop")))


@pytest.fixture(scope="module")
def invented(tmp_path_factory) -> Catalogue:
    folder = tmp_path_factory.mktemp("invented")
    return Catalogue(prepare(generate_catalogue(folder, count=400, seed=3), cache=folder))


@pytest.mark.parametrize(("name", "steps"), [("traces.json", 184), ("lucene_traces.json", 103)])
def test_recorded_episodes_of_the_upstream_engine_are_replayed_without_a_difference(name, steps):
    found = verify(GOLDEN, GOLDEN / name)
    assert found.differences == []
    assert found.steps == steps


def test_differences_are_found_and_said(tmp_path, capsys):
    traces = json.loads((GOLDEN / "traces.json").read_text(encoding="utf-8"))[:2]
    traces[0]["steps"][0]["observation"] += " [SEP] more"
    traces[1]["steps"][-1]["reward"] -= 1e-6
    traces[1]["verbose"]["title_score"] = 0.5
    (tmp_path / "traces.json").write_text(json.dumps(traces))
    options = ["verify-env", "shop", "--catalogue", str(GOLDEN), "--traces", str(tmp_path / "traces.json")]
    assert cli.main(options) == 1
    said = capsys.readouterr().out
    assert "2 episodes, 8 steps, 3 differences" in said
    for part in ("episode 0 (text), step 0", "observation: ours", "reward: ours", "reward parts: ours"):
        assert part in said
    (tmp_path / "traces.json").write_text('[{"steps"')
    assert cli.main(options) == 2
    assert "cut off or not JSON" in capsys.readouterr().err


def test_recordings_that_stop_before_a_purchase_are_replayed_too(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("items_shuffle_1000.json", "items_ins_v2_1000.json"):  # nor is there a file of human instructions
        (tmp_path / "data" / name).write_bytes((GOLDEN / name).read_bytes())
    episode = json.loads((GOLDEN / "traces.json").read_text(encoding="utf-8"))[0]
    episode["steps"].pop()
    episode |= dict.fromkeys(("verbose", "purchased", "purchased_price", "chosen_options"))
    (tmp_path / "traces.json").write_text(json.dumps([episode]))
    assert str(verify(tmp_path / "data", tmp_path / "traces.json")).endswith("3 steps, 0 differences")


def test_goals_are_the_recorded_ones_but_for_what_was_drawn(tmp_path):
    """Prices of a range and the limits are chance; everything else, and how many there are, is not."""
    recorded = json.loads((GOLDEN / "lucene_traces.json").read_text(encoding="utf-8"))
    for name, content in recorded["catalogue"].items():
        (tmp_path / name).write_text(json.dumps(content))
    for kind in ("human", "synthetic"):
        ours = Catalogue(prepare(tmp_path, kind, cache=tmp_path / "prepared"))
        theirs = recorded[f"goals_{kind}"]

        def fixed(goal: dict) -> str:
            goal = copy.deepcopy(goal)
            said = goal.pop("instruction_text").partition(", and price lower")[0]
            options = goal.pop("goal_options")
            options = [list(pair) for pair in (options.items() if isinstance(options, dict) else options)]
            goal["weight"] = round(goal["weight"], 9)
            goal.pop("price_upper")
            return json.dumps([goal, said, options], sort_keys=True)

        assert Counter(fixed(ours.goal(i)) for i in range(ours.goal_count)) == Counter(map(fixed, theirs))
        assert [fixed(ours.goal(i)) for i in range(5)] != sorted(fixed(ours.goal(i)) for i in range(5))


@given(actions=st.lists(st.text(max_size=20) | st.sampled_from([
    "search[serum]", "click[next >]", "click[< prev]", "click[back to search]", "click[description]", "click[0]",
    "search[]", "search[ ]", "search[<r>]", "search[<a> x]", "search[<c>]", "search[<q> face serum]", "click[search]",
    "search[item_page search_results]", "click[a[b]]", "click[]", "search[é ü 漢字]", "click[buy now]", "click[1]",
]), max_size=25), seed=st.integers(0, 100))  # fmt: skip
def test_nothing_an_agent_says_breaks_a_session(catalogue, actions, seed):
    session = Shop(catalogue, catalogue.goal(seed % catalogue.goal_count), mode="text_rich" if seed % 2 else "text")
    rng = random.Random(seed)
    for action in actions:
        labels = session.available()["clickables"]
        if action in ("click[0]", "click[1]") and labels:
            action = f"click[{rng.choice(labels)}]"
        over = session.done
        before = session.observation()
        said, reward, done = session.step(action)
        assert 0.0 <= reward <= 1.0
        if over:
            assert (said, reward, done) == (before, 0.0, True)


def test_an_action_of_a_megabyte_is_a_search_like_another(catalogue):
    session = Shop(catalogue, catalogue.goal(0))
    said, reward, done = session.step(f"search[{'serum ' * 200_000}]")
    assert "Page 1 (Total results: " in said
    assert (reward, done) == (0.0, False)
    assert "Total results: 0" in session.step(f"search[{'q' * 1_000_000}]")[0]


def test_what_is_no_action_changes_nothing(catalogue):
    session = Shop(catalogue, catalogue.goal(0))
    first = session.observation()
    for action in (
        "",
        "search[]",
        "SEARCH[serum]",
        "click[buy now]",
        "click[search]",
        "click[a[b]]",
        "search\n[serum]",
    ):
        assert session.step(action) == (first, 0.0, False)
    assert session.step("search[serum] and more")[0] != first  # as the upstream engine reads it


def slow_search(texts: list[str], asins: list[str], query: str) -> list[int]:
    """BM25 by its formula, document by document."""

    def norm(length: int) -> int:  # Lucene's SmallFloat.intToByte4 and back
        excess = length - 24
        if excess < 8:
            return length
        shift = excess.bit_length() - 4
        return 24 + (excess >> shift << shift)

    documents = [Counter(terms(text)) for text in texts]
    average = sum(d.total() for d in documents) / len(documents)
    scores = []
    for d in documents:
        total = 0.0
        for term in terms(query):
            n = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * d[term] / (d[term] + 0.9 * (0.6 + 0.4 * norm(d.total()) / average))
        scores.append(total)
    order = sorted(range(len(texts)), key=lambda i: (-np.float32(scores[i]).round(5), asins[i]))
    return [i for i in order if scores[i] > 0][:50]


def test_search_is_bm25(invented):
    products = [invented.at(row) for row in range(invented.count)]
    texts, asins = [shop.indexed_text(p) for p in products], [p["asin"] for p in products]
    for query in ("argan oil shampoo", "gluten free bars in vanilla", "running shoes large navy large", "xyzzy", "the"):
        ours = list(invented.search(query))
        theirs = slow_search(texts, asins, query)
        assert len(ours) == len(theirs)
        values = {row: rank for rank, row in enumerate(theirs)}
        assert len(set(ours) - set(theirs)) <= 1  # the last of 50 may be one of several that are worth the same
        assert all(abs(values[row] - rank) <= 1 for rank, row in enumerate(ours) if row in values)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("shampoos", "shampoo"), ("technology", "technolog"), ("possibly", "possibl"), ("is", "is"), ("cables", "cabl"),
     ("relational", "relat"), ("hopping", "hop"), ("generously", "gener"), ("probably", "probabl")],
)  # fmt: skip
def test_stems(word, expected):
    assert stem(word) == expected


def test_what_is_indexed_of_a_text():
    assert terms("The men's U.S.A. shirt, size 1.5-oz & 3,000 Wi-Fi") == [
        "men", "u.s.a", "shirt", "size", "1.5", "oz", "3,000", "wi", "fi",
    ]  # fmt: skip
    assert lossy_length(np.array([5, 39, 40, 41, 57, 90, 1000])).tolist() == [5, 39, 40, 40, 56, 88, 984]


def test_rewards_by_hand():
    product = {
        "title": "Lumeo Desk Lamp",
        "query": "desk lamps", "product_category": "Home › Light › Lamps", "price_tag": "$5",
        "attributes": ["energy saving"], "bullets": ["easy assemble"], "description": "A lamp.", "options": {},
    }  # fmt: skip
    goal = {
        "name": "Halden Desk Lamp", "query": "desk lamps", "product_category": "Home › Light › Lamps",
        "attributes": ["energy saving", "easy assemble", "solid wood"], "goal_options": ["navy blue", "2 feet"],
        "price_upper": 20.0,
    }  # fmt: skip
    reward, parts = score(product, goal, 5.0, {"color": "light navy"}, word_nouns)
    assert reward == pytest.approx((2 + 0 + 1) / 6)  # `blue` stands before `light` and `navy` among the colours
    assert parts["title_score"] == pytest.approx(2 / 3)
    reward, _ = score(product, goal, 20.01, {"color": "sky blue", "length": "2 feet"}, word_nouns)
    assert reward == pytest.approx((2 + 2 + 0) / 6)
    other = goal | {"query": "rugs", "product_category": "Home › Rugs", "name": "Woven Rug"}
    assert score(product, other, 5.0, {}, word_nouns)[0] == 0.0
    assert options_met(["medium"], [["size", "medium"]]) == 1
    assert (colour_of(["color", "black"]), colour_of(["color", "matte black"])) == ("black", ("color", "matte black"))


def write(folder: Path, products, attributes=None, human=None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in zip(FILES, (products, attributes or {}, human or {}), strict=True):
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


PRODUCT = {
    "asin": "B1", "name": "Lamp", "full_description": "x", "small_description": ["y"], "pricing": "$5.00",
    "category": "garden", "query": "Lamps ", "product_category": "Home › Lamps", "customization_options": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("label", "clickable"),
    [("large", True), ("large [eu 42]", False), ("a]b", True), ("a[", True), ("[a]", False), ("a[b", False),
     ("two\nlines", False), ('say "hi"', True), ("café | noir", True), ("100% cotton, soft", True), ("search", False),
     ("", False), ("a\r", True), ("\u2028", True), ("i\u0307", True)],
)  # fmt: skip
def test_what_is_listed_is_what_a_click_does(label, clickable):
    """By WebShop's own pattern for actions, which takes the last bracket that it can."""
    theirs = re.match(r"(.+)\[(.+)\]", f"click[{label}]")
    assert clickable == (theirs is not None and theirs.groups() == ("click", label) and label != "search")
    assert clicks([label]) == ((f"click[{label}]",) if clickable else ())


def test_every_command_that_is_listed_does_something(tmp_path):
    """Options with brackets, quotes, bars, capitals, accents and a line break; every session goes on to its end."""
    folder = prepare(CASES / "shop_brackets", cache=tmp_path)
    with Pool(1, engine="shop") as pool:
        for number in range(Catalogue(folder).goal_count):
            ((seen, _),) = pool.reset([(0, Goal(str(folder), number, "fashion"))])
            seen = pool.step([(0, "search[shirt]")])[0]
            item = next(command for command in seen.admissible if command.startswith("click[b1"))
            seen = pool.step([(0, item)])[0]
            options = seen.admissible[seen.admissible.index("click[buy now]") + 1 :]
            assert {'click[say "hi"]', "click[café  |  noir]", "click[red]", "click[a]b]"} <= set(options)
            assert not any("eu 42" in option or "\n" in option for option in options)
            world = Shopping.load(Goal(str(folder), number, "fashion"))
            for command in ("search[shirt]", item, *options):
                world.step(command)
                if command in options:
                    assert list(world._shop.options.values()) == [command[6:-1]]
            notes = ShopNotes.start("", seen)
            assert list(notes.options()) == ["size"]
            assert len(notes.options()["size"]) == len(options)
            assert pool.step([(0, "click[buy now]")])[0].done
        assert pool.faults == 0
    turns = demonstrate(Shopping.load(Goal(str(folder), 0, "fashion")), random.Random(0), 0.0, max_turns=10)
    assert turns[-1].command == "click[buy now]"


def test_a_demonstrator_searches_without_brackets(invented):
    world = Shopping(invented, {**invented.goal(0), "instruction_text": "i need a [soft] shirt [eu 42] in red"})
    assert demonstrate(world, random.Random(0), 0.0, max_turns=1)[0].command == "search[soft shirt eu 42]"
    first = world.reset()
    assert first.admits("search[soft shirt]")
    assert not first.admits("search[a [b] c]")  # WebShop would look for an action `search[a `


def test_half_a_character_is_replaced_when_it_is_read(tmp_path):
    products = [{**PRODUCT, "name": "Lamp \ud83d!", "customization_options": {"size": [{"value": "a\udc00"}]}}]
    said = {"instruction": "a lamp \ud83c.", "instruction_attributes": ["x"], "instruction_options": ["a\udc00"]}
    data = write(tmp_path / "data", products, {"B1": {"attributes": ["x"]}}, {"B1": [said]})
    found = Catalogue(prepare(data, cache=tmp_path))
    assert (found.product("B1")["title"], found.product("B1")["options"]) == ("Lamp ?!", {"size": ["a?"]})
    assert found.goal(0)["goal_options"] == ["a?"]
    whole = {"name": "Lamp \U0001f34e", "asin": "\ud55c"}
    assert load_json(json.dumps(whole)) == whole  # pairs and Hangul stay


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_names_what_helps(tmp_path, monkeypatch, home):
    monkeypatch.delenv("PROXMO_CACHE", raising=False)
    monkeypatch.setenv("HOME", home)
    data = write(tmp_path / "data", [PRODUCT])
    with pytest.raises(CatalogueError, match="name a folder that can be written with PROXMO_CACHE"):
        prepare(data)
    with pytest.raises(CatalogueError, match="cannot keep the prepared catalogue") as raised:
        prepare(data, cache=Path(home, "x"))
    assert "PROXMO_CACHE" not in str(raised.value)


def test_without_a_home_the_message_names_what_helps(tmp_path, monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PROXMO_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(CatalogueError, match=r"no home folder .* name one with PROXMO_CACHE"):
        prepare(write(tmp_path / "data", [PRODUCT]))


@pytest.mark.parametrize(
    ("products", "message"),
    [
        ('[{"asin": "B1", ', "items_shuffle.json: cut off or not JSON after 0 products"),
        ("{}", "need a JSON array of products, found '{}'"),
        ("[3]", "product 0 is int, need an object"),
        ([{**PRODUCT, "asin": 7}], "product 0 has no asin"),
        ([{**PRODUCT, "asin": "é1"}], "product 0: asin must be of ASCII characters"),
        (b"[\xff]", "is not UTF-8"),
        ([{**PRODUCT, "name": None}], "product B1: name must be a string, got None"),
        ([{**PRODUCT, "pricing": "five"}], "product B1: pricing must be like '$5.00'"),
        ([{**PRODUCT, "pricing": "$1.2.3"}], "product B1: pricing must be like '$5.00'"),
        ([{**PRODUCT, "customization_options": [1]}], "product B1: customization_options must map names to lists"),
        ([{**PRODUCT, "customization_options": {"size": [{"v": 1}]}}], "product B1: customization_options must map"),
    ],
)
def test_bad_data_is_named(tmp_path, products, message):
    with pytest.raises(CatalogueError, match=r"items_shuffle\.json") as raised:
        prepare(write(tmp_path / "data", products), cache=tmp_path / "cache")
    assert message in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_as_the_upstream_engine_takes_it(tmp_path):
    """No price is 100 dollars; no options, no instruction, a second product of an ASIN, a long ASIN: left out."""
    products = [
        {**PRODUCT, "pricing": ""},
        {**PRODUCT, "pricing": "$9"},
        {**PRODUCT, "asin": "B2", "pricing": "$7.50$9.50", "small_description": "one line",
         "customization_options": {"Size": [{"value": " A/B "}], "none": None}},
        {**PRODUCT, "asin": "nan"},
        {**PRODUCT, "asin": "B3456789012"},
    ]  # fmt: skip
    known = {"B2": {"attributes": ["odd"], "instruction": "Find me a lamp", "instruction_attributes": ["odd"]}}
    human = {"B1": [{"asin": "B1", "instruction": "a lamp.", "instruction_attributes": [], "instruction_options": []}]}
    data = write(tmp_path / "data", products, known, human)
    found = Catalogue(prepare(data, "synthetic", cache=tmp_path))
    assert [found.at(row)["asin"] for row in range(found.count)] == ["B1", "B2"]
    assert found.product("B1")["price_tag"] == "$100.0"
    assert found.product("B1")["attributes"] == ["DUMMY_ATTR"]
    assert found.product("B2")["options"] == {"size": ["a | b"]}
    assert found.product("B2")["bullets"] == ["one line"]
    assert 7.5 <= found.prices[found.row("B2")] <= 9.5
    assert found.goal_count == 1
    assert found.goal(0)["instruction_text"].startswith("Find me a lamp with size: a | b, and price lower than ")
    assert Catalogue(prepare(data, "human", cache=tmp_path)).goal_count == 0
    with pytest.raises(KeyError):
        found.row("B3")
    known["B2"]["instruction_attributes"] = []
    with pytest.raises(CatalogueError, match="product B2: its instruction has no instruction_attributes"):
        prepare(write(tmp_path / "other", products, known, human), "synthetic", cache=tmp_path)
    with pytest.raises(CatalogueError, match=r"items_human_ins.json: product B2: need instruction"):
        prepare(write(tmp_path / "third", products, known, {"B2": [{"instruction": 3}]}), cache=tmp_path)
    with pytest.raises(CatalogueError, match="holds no items_shuffle"):
        prepare(tmp_path / "nowhere")


@given(size=st.integers(1, 60), values=st.lists(st.dictionaries(st.text(max_size=5), st.integers()), max_size=6))
def test_a_file_of_any_size_is_read_in_pieces(tmp_path_factory, size, values):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(values, indent=1))
    assert list(read_array(path, size)) == values


def test_one_order_of_goals_and_disjoint_splits(invented, tmp_path):
    again = Catalogue(prepare(generate_catalogue(tmp_path / "d", count=400, seed=3), cache=tmp_path))
    assert [invented.goal(i) for i in range(400)] == [again.goal(i) for i in range(400)]
    assert again.splits == {"train": range(80, 400), "valid": range(40, 80), "test": range(40)}
    assert shop.splits(12_087) == {"train": range(1500, 12_087), "valid": range(500, 1500), "test": range(500)}
    for count in range(4):  # a catalogue may have hardly a goal
        found = shop.splits(count)
        assert sorted(i for part in found.values() for i in part) == list(range(count))
    # Prepared once: the same folder, untouched, the second time.
    folder = prepare(tmp_path / "d", cache=tmp_path)
    when = (folder / "goals.jsonl").stat().st_mtime_ns
    assert prepare(tmp_path / "d", cache=tmp_path) == folder
    assert (folder / "goals.jsonl").stat().st_mtime_ns == when


def test_the_demonstrator_wins_and_careless_ones_do_not(invented):
    def wins(rate: float) -> float:
        won = 0
        for i in range(100):
            world = Shopping(invented, invented.goal(i))
            turns = demonstrate(world, random.Random(i), rate, max_turns=12)
            last = Shopping(invented, invented.goal(i))
            last.reset()
            for turn in turns:
                seen = last.step(turn.command)
            won += seen.won
        return won / 100

    assert wins(0.0) > 0.5
    assert wins(0.6) < wins(0.0) - 0.2


def test_admissible_commands_do_something_and_others_do_not(invented):
    world = Shopping(invented, invented.goal(5))
    seen = world.reset()
    assert seen.admissible == (SEARCH_COMMAND,)
    assert seen.admits("search[lamp]")
    assert not any(seen.admits(command) for command in (SEARCH_COMMAND, "search[]", "click[search]", "look"))
    assert "Instruction" not in seen.text
    results = world.step(f"search[{world.task}]")
    assert not results.admits("search[lamp]")
    assert "click[next >]" in results.admissible
    item = world.step(results.admissible[2])
    assert "click[buy now]" in item.admissible
    bought = world.step("click[buy now]")
    assert bought.done
    assert 0.0 <= bought.reward <= 1.0
    assert bought.admissible == ()


def test_notes_show_what_decides_the_next_click(invented):
    goal = next(invented.goal(i) for i in range(100) if len(invented.goal(i)["goal_options"]) == 2)
    world = Shopping(invented, goal)
    notes = ShopNotes.start(world.task, world.reset())
    assert "page search" in notes.prompt()
    assert world.task in notes.prompt()
    for command in (f"search[{world.task}]", ""):
        command = command or f"click[{notes.rows()[0].split()[0].lower()}]"
        notes.remember(command, world.step(command))
    names = list(notes.options())
    assert len(names) == 2
    assert all(f"open {name} : " in notes.prompt() for name in names)
    value = notes.options()[names[0]][1]
    before = notes.copy()
    notes.remember(f"click[{value}]", world.step(f"click[{value}]"))
    assert notes.chosen == {names[0]: value}
    assert before.chosen == {}
    assert f"open {names[0]}" not in notes.prompt()
    assert f"chosen {value}" in notes.prompt()
    notes.remember("click[dance]", world.step("click[dance]"))
    assert "last click[dance] nothing" in notes.prompt()
    for cut in notes.shortened():
        prompts = [cut.write(n) for n in range(cut.size + 1)]
        assert list(map(len, prompts)) == sorted(map(len, prompts))
        assert (world.task in prompts[0]) == (cut.what != "task")
    notes.remember("click[back to search]", world.step("click[back to search]"))
    assert "page search" in notes.prompt()
