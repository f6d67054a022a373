"""Whole runs as arrays, the same alone and side by side; studies cut off go on; pages say what the numbers say."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nested import plain

from proxmo_jax import cli
from proxmo_jax.ablation import runner as ablation
from proxmo_jax.ablation.runner import Config
from proxmo_jax.ablation.study import Cell, Results, Study, bootstrap, measures, write
from proxmo_jax.ablation.vector_agent import (
    Knobs,
    Rollout,
    Seen,
    Spec,
    bag_of,
    choose,
    embed,
    estimate,
    make_run,
    merged,
    paraphrased,
)
from proxmo_jax.estimator.embeddings import tfidf
from proxmo_jax.estimator.presets import dr_grpo, gigpo, proxmo
from proxmo_jax.estimator.words import WordCounts

ROOT = Path(__file__).parents[2]

SPEC = Spec(groups=4, members=4, turns=16, iterations=5, eval_every=1, hidden=8)
SMALL = Study(
    "small", "Does it run?", [Cell("a", dr_grpo(), groups=4, turns=16), Cell("b", dr_grpo(), groups=4, turns=16)]
)


@pytest.fixture(scope="module")
def houses():
    return ablation.make_houses("easy", 30)


@pytest.fixture(scope="module")
def program():
    """Runs of two estimators side by side, as a study has them."""
    config = Config(seeds=3, houses=30, chunk=1)
    return ablation.compiled(config, "easy", SPEC, [ablation.choices_of(s) for s in (dr_grpo(), proxmo())])


def test_a_run_is_the_same_alone_and_beside_others(program):
    """Also that one program for all estimators gives each its own: the same as a program that knows no other.

    Before the first update all is equal to rounding. After it parameters whose gradient is all rounding are up to two
    of Adam's steps apart, and once in a million commands a rounding decides which is drawn: one seed in a hundred.
    """
    houses = ablation.make_houses("easy", 30, paraphrases=False)
    temperatures = [0.05, 0.1, 0.5, 0.05, 0.1, 0.5, 0.05, 0.1]
    knobs = [Knobs(ablation.numbers_of(proxmo(temperature=t)), 0.03) for t in temperatures]
    stacked = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *knobs)
    keys = jax.random.split(jax.random.key(0), 8)
    other, many = (program(stacked, keys, jnp.int32(kind)) for kind in (0, 1))
    run, same = jax.jit(make_run(*houses, SPEC, [proxmo()])), []
    for i in range(3):
        alone = run(jax.tree.map(lambda x, i=i: x[i], stacked), keys[i], 0)
        before = max(abs(float(many[n][i, 0] - alone[n][0])) for n in ("eval", "success", "turns", "log_prob"))
        after = abs(float(many["log_prob"][i, -1] - alone["log_prob"][-1]))
        same.append(before < 1e-5 and after < 1e-3)
    assert sum(same) >= 2
    assert len(set(np.asarray(many["log_prob"][:, 0]).tolist())) == 8  # every seed plays its own games
    assert np.abs(other["log_prob"][:, -1] - many["log_prob"][:, -1]).max() > 1e-2
    assert many["eval"].shape == (8, 6)


def test_an_agent_learns_from_nothing(houses):
    """Sixty iterations took eight seeds from 9% to 54% on average; single ones differ, from machine to machine too."""
    spec = Spec(iterations=60, eval_every=10)
    run = jax.jit(jax.vmap(make_run(*houses, spec, [gigpo()]), (None, 0)))
    found = run(Knobs(gigpo(), learning_rate=0.02), jax.random.split(jax.random.key(0), 8))
    success = found["success"].mean(0)
    assert success[-1] > success[0] + 0.2


def test_embeddings_are_tfidf_of_the_words(houses):
    _, _, texts = houses
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(texts.pieces), (2, 3, 4, 9))
    mask = rng.random((2, 3, 4)) < 0.7
    found = embed(bag_of(jnp.asarray(rows), len(texts.pieces)), jnp.asarray(mask), jnp.asarray(texts.words))
    counts = texts.words[rows].sum(-2)
    ids = np.broadcast_to(np.arange(counts.shape[-1]), counts.shape)
    expected, _ = tfidf(WordCounts(ids, counts, np.arange(counts.shape[-1], dtype=np.int32)), mask)
    np.testing.assert_allclose(np.where(mask[..., None], found, 0), expected, atol=1e-5)


def test_words_that_are_always_said_together_can_be_one(houses):
    _, _, texts = houses
    few = merged(texts.words)
    assert few.shape[1] < texts.words.shape[1]
    rows = jnp.asarray(np.random.default_rng(0).integers(0, len(texts.pieces), (2, 3, 4, 9)))
    bag, mask = bag_of(rows, len(texts.pieces)), jnp.ones((2, 3, 4), bool)
    one, other = (embed(bag, mask, jnp.asarray(w)).reshape(24, -1) for w in (texts.words, few))
    np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-5)


def test_commands_are_drawn_as_often_as_they_are_likely():
    logits = jnp.array([-1e9, 0.0, 1.0, -1e9, 2.0, -1.0, -1e9])
    log_probs = jax.nn.log_softmax(logits)
    uniform = jnp.concatenate([jnp.linspace(0, 1, 20_001)[:-1], jnp.array([np.float32(1 - 2**-24)])])
    drawn = jax.vmap(choose, (None, 0))(log_probs, uniform)
    share = np.bincount(np.asarray(drawn), minlength=7) / len(uniform)
    np.testing.assert_allclose(share, jnp.exp(log_probs), atol=2e-4)
    assert set(np.unique(drawn).tolist()) == {1, 2, 4, 5}


def test_equal_texts_share_an_anchor_and_others_do_not(houses):
    """Exact matching in the array runs is exact matching of texts."""
    _, _, texts = houses
    rng = np.random.default_rng(1)
    some = rng.integers(0, len(texts.pieces), (5, 9))
    number = rng.integers(0, 5, (1, 4, 6))
    rows = some[number]
    won = np.zeros((1, 4, 6), bool)
    won[0, :2, -1] = True
    like = jnp.zeros((1, 4, 6))
    seen = Seen(jnp.asarray(rows), *[like] * 7)
    rollout = Rollout(seen, like, like, jnp.ones((1, 4, 6), bool), jnp.asarray(won))
    found = estimate(rollout, gigpo(), jnp.asarray(texts.words), 10.0)
    returns = 10.0 * won.any(-1, keepdims=True) * 0.95 ** np.arange(5, -1, -1)
    episode = 10.0 * won.any(-1, keepdims=True) - 5.0
    for m in range(4):
        for t in range(6):
            same = number[0] == number[0, m, t]
            step = returns[0, m, t] - returns[0][same].mean() if same.sum() > 1 else 0.0
            np.testing.assert_allclose(found[0, m, t], episode[0, m, 0] + step, rtol=1e-4, atol=1e-4)


def test_paraphrases_happen_as_often_as_asked(houses):
    _, _, texts = houses
    table = jnp.asarray(texts.paraphrases)
    text = jnp.full(4000, texts.pieces.index("You arrive at "))
    assert (paraphrased(text, table, jnp.float32(0.0), jax.random.key(0)) == text).all()
    changed = paraphrased(text, table, jnp.float32(0.3), jax.random.key(0))
    assert abs(float((changed != text).mean()) - 0.3) < 0.03
    said = {texts.pieces[int(i)] for i in np.unique(changed)}
    assert said == {"You arrive at ", "You reach ", "You come to ", "You now stand before "}
    plain = jnp.full(50, texts.pieces.index("."))
    assert (paraphrased(plain, table, jnp.float32(1.0), jax.random.key(1)) == plain).all()


def test_a_study_of_several_chunks_is_the_study_in_one(tmp_path, monkeypatch, program):
    """Also that finished chunks are read back and not run again."""
    monkeypatch.setattr(ablation, "spec_of", lambda config, study, cell: SPEC)
    monkeypatch.setattr(ablation, "remember_programs", lambda folder: None)
    monkeypatch.setattr(ablation, "compiled", lambda config, level, spec, kinds: program)  # dr_grpo is its first kind
    config = Config(seeds=3, houses=30, chunk=1)
    one = ablation.train_all(config, SMALL, tmp_path / "one", ablation.Console(quiet=True))
    np.testing.assert_array_equal(one.curves["log_prob"][0], one.curves["log_prob"][1])  # equal cells, equal seeds
    assert not np.array_equal(one.curves["log_prob"][0, 0], one.curves["log_prob"][0, 1])
    monkeypatch.setattr(ablation, "run_chunk", lambda *_: pytest.fail("a finished chunk is run again"))
    again = ablation.train_all(config, SMALL, tmp_path / "one", ablation.Console(quiet=True))
    np.testing.assert_array_equal(one.curves["log_prob"], again.curves["log_prob"])


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on(tmp_path):
    """A process killed after its first chunk leaves it whole; the next one ends the study with it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "proxmo_jax", "ablate", "train", "--study", "modulation", "--quick"]
    command += ["--out", str(out), "--chunk", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    chunks, deadline = out / "modulation_quick" / "chunks", time.time() + 240
    while not list(chunks.glob("????????????????.npz")) and time.time() < deadline and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in chunks.glob("????????????????.npz")}
    assert kept
    assert not (out / "modulation_quick" / "report.md").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    folder = out / "modulation_quick"
    for name in ("results.csv", "summary.csv", "curves.png", "report.md"):
        assert (folder / name).stat().st_size > 0
    assert "A quick run: too short for any conclusion." in (folder / "report.md").read_text(encoding="utf-8")


def results(*ends: float) -> Results:
    """Four evaluations of five seeds, each cell at its own level but for a little that belongs to the seed."""
    level = np.array(ends)[:, None, None] + 0.01 * np.arange(5)[None, :, None] + np.zeros(4)
    curves = {"turns": 20.0 - level[:, :, 1:]}
    return Results(
        [f"cell {i}" for i in range(len(ends))], np.arange(4) * 10, level, np.zeros((len(ends), 5, 6)), curves
    )


def test_pages_say_what_the_numbers_say(tmp_path):
    study = Study("made", "What differs?", [Cell(f"cell {i}", dr_grpo()) for i in range(3)])
    write(tmp_path, study, results(0.5, 0.7, 0.5), houses=(240, 128), quick=False, seconds=1.0)
    table = (tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()
    assert table[:3] == [
        "cell,seed,iteration,eval_success,train_turns", "cell 0,0,0,0.5000,", "cell 0,0,10,0.5000,19.5000",
    ]  # fmt: skip
    assert len(table) == 1 + 3 * 5 * 4
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "cell 1 against cell 0: significantly better over the whole run (+20.0%" in text
    assert "cell 2 against cell 0: not significantly different over the whole run (+0.0%" in text
    write(tmp_path, study, results(0.5, 0.2, 0.9), houses=(240, 128), quick=False, seconds=1.0)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "cell 1 against cell 0: significantly worse over the whole run (-30.0%" in text
    few = results(0.5, 0.7, 0.5)
    few.eval, few.by_kind, few.curves = few.eval[:, :4], few.by_kind[:, :4], {"turns": few.curves["turns"][:, :4]}
    write(tmp_path, study, few, houses=(240, 128), quick=False, seconds=1.0)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "significantly" not in text
    assert "4 of at least 5 seeds: too few" in text
    found = measures(results(0.5, 0.9))
    assert (found["to_80"] == [[30] * 5, [0] * 5]).all()


def test_bootstrap_intervals_cover_the_mean_and_shrink():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        middle, low, high = bootstrap(rng.normal(size=16), 2000)
        covered += low < 0 < high
        assert low < middle < high
    assert covered >= 50
    wide, narrow = (np.ptp(bootstrap(rng.normal(size=n), 2000)[1:]) for n in (8, 200))
    assert narrow < wide / 2


@pytest.mark.parametrize("name", ablation.STUDIES)
def test_every_study_can_be_loaded_and_has_what_it_compares_with(name):
    study = ablation.load(name)
    assert study.name == name
    labels = [cell.label for cell in study.cells]
    assert {cell.baseline for cell in study.cells} - {""} <= set(labels)
    ablation.check(Config(), study)
    for cell in study.cells:
        assert set(cell.level.split("+")) <= {"easy", "medium", "hard"}
        assert cell.groups * cell.members == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--study", "weather"], "--study must be one of components, temperature"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--houses", "3"], "--houses must be at least 30, got 3"),
        (["--chunk", "0"], "--chunk must be at least 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be above 0, got 0"),
        (["--entropy", "-1"], "--entropy must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, capsys, options, message):
    assert cli.main(["ablate", "train", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["ablate", "nothing"]) == 2
    assert "Available subcommands: estimator, train" in plain(capsys.readouterr().err)


def test_chunks_are_neither_many_nor_full_of_repeated_runs():
    """On the tests' eight devices."""
    assert ablation.chunk_size([16, 32, 32], 16) == 32
    assert ablation.chunk_size([144], 16) == 72
    assert ablation.chunk_size([129], 16) == 72
    assert ablation.chunk_size([2, 4], 16) == 8
    assert ablation.chunk_size([160, 160], 1) == 8


def test_cells_that_differ_in_numbers_are_of_one_kind():
    study = ablation.load("modulation")
    assert len({ablation.choices_of(cell.settings) for cell in study.cells}) == 1
    assert ablation.choices_of(gigpo()) != ablation.choices_of(proxmo())
    numbers = ablation.numbers_of(gigpo(temperature=0.3))
    assert (numbers.temperature, numbers.aggregation) == (0.3, "soft")


def test_a_chunk_is_named_after_the_files_its_results_depend_on(tmp_path, monkeypatch):
    """A changed file of the estimator, the agent or the household gives another name."""
    files = [ablation.source_file(name) for name in ablation.SOURCES]
    assert {"estimator.py", "proximity.py", "types.py", "losses.py", "vector_agent.py"} <= {f.name for f in files}
    assert all(f.is_relative_to(ROOT) for f in files)
    copies = [tmp_path / f"{i}.py" for i in range(len(files))]
    for copy, file in zip(copies, files, strict=True):
        copy.write_bytes(file.read_bytes())
    assert ablation.hash_of(copies) == ablation.source()

    def name() -> str:
        monkeypatch.setattr(ablation, "source", lambda: ablation.hash_of(copies))
        return ablation.fingerprint(Config(), SMALL, SPEC, [(0, 0)])

    names = [name()]
    for copy in copies:
        copy.write_text(copy.read_text(encoding="utf-8") + "\n")
        names.append(name())
    assert len(set(names)) == len(names)
