"""The page: its numbers are the estimator's, nothing of its texts is executed, and what cannot be shown is said."""

import base64
import gzip
import json
import re
import shutil

import numpy as np
import pytest
from browser import Browser, chromium
from nested import config_with, plain

from proxmo_jax import cli
from proxmo_jax.agent.curves import curves
from proxmo_jax.agent.page_file import methods_of
from proxmo_jax.errors import UserError
from proxmo_jax.estimator.presets import PRESETS
from proxmo_jax.estimator.steps_file import steps_advantages, write_steps
from proxmo_jax.page.build import Parts, page
from proxmo_jax.page.estimates import estimate, selection, taken

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> \ud83d & \0"
METHODS = {name: PRESETS[name]() for name in ("proxmo", "grpo", "gigpo_similarity", "graphgpo", "empg")}


def make_steps() -> dict:
    """Three groups of three attempts, at most nine turns each, in a random order: mixed, all failed, all solved."""
    rng = np.random.default_rng(0)
    seen = ["you see a red lamp", "you see a blue lamp and a desk", "a drawer is closed", HOSTILE]
    rows = []
    for g in range(3):
        for m in range(3):
            won, turns = g == 2 or (g == 0 and m == 1), 3 if m == 1 else 2 + (g + m) % 2
            for t in range(turns):
                text, after = (seen[int(rng.integers(4))] for _ in range(2))
                rows.append((f"task {g}", f"{g}-{m}", t, 10.0 * (won and t == turns - 1), won, rng.random() < 0.8, text,
                             after, f"find {HOSTILE}" if g == 0 else f"task {g}", f"prompt {g} {m} {t}\nlook",
                             HOSTILE if g == 0 else f"go {m}", f"go {m}"))  # fmt: skip
    order = rng.permutation(len(rows))
    names = ("group trajectory step reward success action_valid texts next_texts task prompt response command").split()
    columns = zip(*(rows[i] for i in order), strict=True)
    return {
        name: list(values) if isinstance(values[0], str) else np.array(values)
        for name, values in zip(names, columns, strict=True)
    }


@pytest.fixture(scope="module")
def steps() -> dict:
    return make_steps()


@pytest.fixture(scope="module")
def found(steps):
    return estimate(steps, METHODS)


@pytest.fixture(scope="module")
def html(steps, found) -> str:
    parts = Parts()
    parts.add("10", steps, found, "proxmo")
    parts.add("20", steps, found, "grpo", "Only some are shown.")
    row = {"iteration": 1, "train/success_rate": 0.5, "eval/success_rate": 0.25, "eval/games": 8, "time/rollout": 2.0,
           "eval/success_rate/heat": 0.5, "loss/kl": float("nan")}  # fmt: skip
    return page(parts, HOSTILE, ["grpo"], [HOSTILE], curves([row, {**row, "iteration": 20}]), METHODS)


def stored(html: str, name: str) -> dict:
    text = re.search(f'<script type="text/plain" id="{name}">(.*?)</script>', html, re.S).group(1)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_every_method_gives_what_the_estimator_gives(steps, found):
    assert set(found.results) == {"proxmo", "grpo", "gigpo_similarity", "graphgpo"}
    assert found.left_out == {"empg": "needs entropy"}
    for name, own in found.results.items():
        expected = steps_advantages(steps, METHODS[name])
        for ours, theirs in {"joint": "advantage", "episode": "episode_advantage", "step": "step_advantage"}.items():
            np.testing.assert_allclose(own[ours], expected[theirs], atol=2e-5, err_msg=f"{name} {ours}")


def test_the_weights_of_near_turns_make_the_baseline(found):
    """Groups are so small that all other turns are near: with the turn's own they are the whole softmax."""
    score, baseline = (found.results["proxmo"][name] for name in ("step_score", "step_baseline"))
    others = (found.near_weight * np.where(found.near < 0, 0.0, score[found.near])).sum(1)
    own = 1 - found.near_weight.sum(1)
    assert (own > 0).all()
    np.testing.assert_allclose(others + own * score, baseline, atol=1e-4)
    assert (found.near[np.arange(len(score)), 0] != np.arange(len(score))).all()


def test_the_page_holds_the_numbers_and_no_text_as_it_is(steps, found, html):
    assert "window.hacked" not in html
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", html)
    overview, order = stored(html, "overview"), np.lexsort(found.place[::-1])
    joint = overview["iterations"][0]["joint"]["proxmo"]
    np.testing.assert_allclose(joint, found.results["proxmo"]["joint"][order], rtol=1e-5)
    group, block = overview["iterations"][0]["groups"][0], stored(html, "b0")
    assert [m["turns"] for m in group["members"]] == np.bincount(found.place[1][found.place[0] == 0]).tolist()
    lines = ["\n".join(block["lines"][k] for k in row) for row in block["texts"]["response"]]
    assert lines == [steps["response"][row] for row in order[: len(lines)]]
    assert overview["title"] == HOSTILE
    assert overview["curves"]["more"] == {}


def test_what_is_beyond_the_limit_is_left_out_in_whole_groups(steps):
    assert selection(steps, len(steps["step"])) is None
    rows = selection(steps, 17)
    kept = taken(steps, rows)
    assert set(kept["group"]) == {"task 0", "task 2"} or len(set(kept["group"])) == 2
    assert len(rows) == sum(steps["group"].count(name) for name in set(kept["group"])) <= 17
    alone = taken(steps, selection(steps, 5))
    assert 0 < len(alone["step"]) <= 5
    for name in set(alone["trajectory"]):
        assert alone["trajectory"].count(name) == steps["trajectory"].count(name)
    with pytest.raises(UserError, match=r"trajectory: one has \d steps, need at most 1"):
        selection(steps, 1)


def test_a_file_of_another_trainers_steps(tmp_path, capsys, steps):
    """Without texts there are the methods that compare none, and the others say what they need."""
    few = {name: values for name, values in steps.items() if name not in ("texts", "next_texts")}
    write_steps(tmp_path / "steps.jsonl", few)
    assert cli.main(["report", str(tmp_path / "steps.jsonl"), "--preset", "grpo", "--max-turns", "18"]) == 0
    assert "of 3 groups" in plain(capsys.readouterr().out)
    overview = stored((tmp_path / "steps.html").read_text(encoding="utf-8"), "overview")
    assert set(overview["iterations"][0]["joint"]) == {"grpo", "dr_grpo", "rloo"}
    assert overview["iterations"][0]["left_out"]["graphgpo"] == "needs texts and next_texts"


def test_a_torn_rollout_is_left_out_with_a_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"iterations": 3}), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1, "train/success_rate": NaN}\n{"ite')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "has kept no rollout" in plain(capsys.readouterr().out)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "000003.npz").write_bytes(b"PK\3\4 torn")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Iteration 3 is left out" in plain(capsys.readouterr().out)
    assert "is left out" in stored((tmp_path / "page.html").read_text(encoding="utf-8"), "overview")["notes"][0]
    before = (tmp_path / "page.html").read_bytes()
    for arguments, message in (
        ([str(tmp_path), "--iteration", "3"], "000003.npz: not a readable .npz file"),
        ([str(tmp_path), "--iteration", "2"], "has kept no rollout of it; it has those of 3"),
        ([str(tmp_path), "--max-turns", "0"], "--max-turns must be at least 1"),
        ([str(tmp_path / "rollouts")], "holds no run"),
        ([str(tmp_path / "metrics.jsonl"), "--iteration", "2"], "is a file of steps"),
        ([str(tmp_path / "metrics.jsonl")], "metrics.jsonl: line 2 and the first differ"),
        ([str(tmp_path / "metrics.jsonl"), "--preset", "sarsa"], "--preset must be one of"),
        ([str(tmp_path / "gone.npz")], "gone.npz"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert message in plain(capsys.readouterr().err)
    assert (tmp_path / "page.html").read_bytes() == before


def test_a_run_is_compared_with_the_presets_as_it_would_train_them():
    run = config_with(preset="gigpo", estimator=PRESETS["gigpo"](invalid_penalty=0.7, discount=0.5))
    methods = methods_of(run)
    assert next(iter(methods)) == "gigpo"
    assert methods["gigpo"].discount == 0.5
    assert methods["proxmo"].invalid_penalty == 0.7
    assert set(methods) == set(PRESETS)


@pytest.fixture(scope="module")
def browser(html, tmp_path_factory):
    program = chromium()
    if program is None:
        pytest.skip("no Chromium is on this machine (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(html, encoding="utf-8")
    with Browser(program, folder / "profile") as browser:
        browser.size(1300, 900)
        browser.open(folder / "page.html", "#g1m2t2")
        yield browser
        shutil.rmtree(folder / "profile", ignore_errors=True)


def selected(browser) -> str:
    return browser.run("document.querySelector('.cell[aria-current]')?.getAttribute('aria-label')?.split(':')[0]")


def opened(browser, name: str) -> None:
    """Wait until the panel shows this turn, with its texts."""
    g, m, t = re.match(r"g(\d+)m(\d+)t(\d+)", name).groups()
    browser.until(
        f"document.querySelector('#panel strong')?.textContent.startsWith('g{g} · m{m} · turn {t} of')"
        " && document.querySelector('#panel .response') !== null"
    )
    assert selected(browser) == name


def test_a_reader_clicks_and_types(browser, steps, found):
    """Links, cells, keys, the switch of methods, filters, the search and the help, in a real browser."""
    opened(browser, "g1m2t2")
    assert browser.run("document.querySelector('#panel .response pre').textContent").startswith("</script><script>")
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.title").startswith("</script>")

    browser.click("section:nth-of-type(2) .row:nth-child(2) .cell:nth-child(1)")
    opened(browser, "g2m2t1")
    assert browser.run("location.hash") == "#g2m2t1"
    row = np.flatnonzero((found.place[0] == 1) & (found.place[1] == 1) & (found.place[2] == 0))[0]
    for method in ("grpo", "proxmo"):
        browser.run(f"document.querySelector('[data-method={method}]').click()")
        browser.until(f"document.querySelector('#sum h2')?.textContent === 'How {method} gets there'")
        shown = browser.run("document.querySelector('#sum .joint td:last-child').textContent").replace("\u2212", "-")
        assert float(shown) == pytest.approx(found.results[method]["joint"][row], rel=2e-3, abs=1e-3)
        assert browser.run("document.querySelector('#method').value") == method

    keys = {"ArrowRight": "g2m2t2", "ArrowDown": "g2m3t2", "ArrowLeft": "g2m3t1", "ArrowUp": "g2m2t1"}
    for key, name in keys.items():
        browser.press(key)
        opened(browser, name)
    browser.click("#near li button")
    browser.until("!document.querySelector('.cell[aria-current]').getAttribute('aria-label').startsWith('g2m2t1')")

    visible = "[...document.querySelectorAll('section.group:not([hidden]) h3')].map(e => e.textContent).join()"
    for kind, groups in (("mixed", "g1"), ("failed", "g2"), ("solved", "g3"), ("all", "g1,g2,g3")):
        browser.run(f"document.querySelector('input[value={kind}]').click()")
        assert browser.run(visible) == groups
    browser.run("document.querySelector('input[value=disagree]').click()")
    browser.press("n")
    first = selected(browser)
    assert browser.run("document.querySelector('#stop').textContent").startswith("1 of ")
    joint = [found.results[name]["joint"] for name in browser.run("[first.value, second.value]")]
    apart = np.abs(np.subtract(*(values / np.sqrt(np.mean(values**2)) for values in joint)))
    at = [int(x) - 1 for x in re.match(r"g(\d+)m(\d+)t(\d+)", first).groups()]
    worst = np.all(np.stack(found.place) == np.array(at)[:, None], axis=0)
    assert apart[worst][0] == pytest.approx(apart.max(), rel=1e-3)

    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.call("Input.insertText", text="prompt: PROMPT 2 1")
    browser.until(f"{visible} === 'g3'")
    assert browser.run("document.querySelectorAll('section:not([hidden]) .cell.hit').length") == 3
    browser.press("Enter")
    opened(browser, "g3m2t1")
    assert browser.run("document.querySelector('.prompt mark').textContent") == "prompt 2 1"
    browser.press("?")
    browser.until("document.querySelector('#help').open")
    browser.press("Escape")
    browser.until("!document.querySelector('#help').open")

    browser.run("search.value = ''; search.dispatchEvent(new Event('input'))")
    browser.until(f"{visible} === 'g1,g2,g3'")
    browser.run("iteration.value = '0'; iteration.dispatchEvent(new Event('change'))")
    browser.press("ArrowRight")
    opened(browser, "g1m1t1")
    assert browser.run("location.hash") == "#i10g1m1t1"
    browser.run("location.hash = '#g3m1t2'")
    opened(browser, "g3m1t2")
    browser.run("location.hash = '#g9m1t1'")
    browser.until("document.querySelector('#status').textContent.startsWith('g9m1t1 is not on this page')")
    assert browser.problems == []


def test_a_narrow_window_has_a_sheet_and_no_sideways_scroll(browser):
    browser.size(390, 800, dark=True)
    browser.run("location.hash = '#g1m1t1'")
    opened(browser, "g1m1t1")
    assert browser.run("getComputedStyle(document.querySelector('#panel')).position") == "fixed"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != "rgb(247, 247, 245)"
    cell = browser.run("document.querySelector('.cell[aria-current]').getBoundingClientRect().bottom")
    assert cell < browser.run("document.querySelector('#panel').getBoundingClientRect().top")
    browser.press("Escape")
    assert browser.run("getComputedStyle(document.querySelector('#panel')).display") == "none"
    assert browser.problems == []
