import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nested import plain

from proxmo_jax.cli import main
from proxmo_jax.estimator.presets import PRESETS, proxmo
from proxmo_jax.estimator.steps_file import NEEDED, RESULTS, read_steps, steps_advantages, write_steps

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = Path(__file__).parents[1] / "cases" / "steps"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))


def steps() -> dict:
    return {
        "group": np.array(["a", "a", "b", "a"]), "trajectory": np.array([1, 2, 3, 1]), "step": np.array([1, 0, 0, 0]),
        "reward": np.array([10.0, 0, 0, 0]), "success": np.array([True, False, False, True]),
        "action_valid": np.array([True, True, False, True]),
        "texts": np.array(["You see a desk.", "You see a shelf.", "Nothing happens.", "You see a desk and a shelf."]),
        "next_texts": np.array(["You won.", "The end.", "The end.", "You see a desk."]),
        "entropy": np.array([0.5, 0.25, 1.0, 0.0]),
    }  # fmt: skip


def write_lines(path: Path, data: dict) -> None:
    rows = [{name: values[i].tolist() for name, values in data.items()} for i in range(len(data["step"]))]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.mark.parametrize("name", ["alf_soft_psc", "alf_soft_scale10_invalid", "many_groups"])
def test_the_command_gives_the_official_answers(name, tmp_path):
    """From the file of recorded steps to a file of advantages, under the official rules."""
    case = CASES[name]
    span = case["beta"] * (1 / (1 + np.exp(-1)) - 0.5) * case["modulation"]
    options = ["--discount", case["gamma"], "--invalid-penalty", case["invalid_penalty"], "--alpha", case["alpha"]]
    options += ["--modulation-range", span, "--temperature", case["temperature"], "--step-weight", case["omega"]]
    target = tmp_path / "out.npz"
    assert (
        main(["advantages", str(GOLDEN / f"{name}.npz"), str(target), "--preset", "official", *map(str, options)]) == 0
    )
    answer, wanted = np.load(target), np.load(GOLDEN / f"{name}.npz")
    for key in RESULTS:
        np.testing.assert_allclose(answer[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lines_and_arrays_give_the_same(preset, tmp_path):
    np.savez(tmp_path / "in.npz", **steps())
    write_lines(tmp_path / "in.jsonl", steps())
    for suffix in ("npz", "jsonl"):
        source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
        assert main(["advantages", str(source), str(target), "--preset", preset]) == 0
    arrays = np.load(tmp_path / "out.npz")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    direct = steps_advantages(steps(), PRESETS[preset]())
    for name in RESULTS:
        np.testing.assert_allclose(arrays[name], direct[name])
        np.testing.assert_allclose([line[name] for line in lines], arrays[name], rtol=1e-6)


def test_a_response_mask_spreads_the_answers_over_tokens(tmp_path):
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    write_lines(tmp_path / "in.jsonl", {**steps(), "response_mask": mask})
    assert main(["advantages", str(tmp_path / "in.jsonl"), str(tmp_path / "out.npz")]) == 0
    answer, plain = np.load(tmp_path / "out.npz"), steps_advantages(steps(), proxmo())
    np.testing.assert_allclose(answer["advantage"], plain["advantage"][:, None] * mask)
    assert answer["discounted_return"].shape == (4,)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"reward": np.array([0, np.nan, 0, 0])}, [], "reward: row 1 has nan"),
        ({"group": np.array(["a", "b", "b", "b"])}, [], "trajectory: 1 stands in two groups"),
        ({"step": np.array([0, 0, 0, 0])}, [], "step: trajectory 1 has step 0 twice"),
        ({"success": np.array([True])}, [], "success: got shape (1,), need 4 rows"),
        ({"texts": None}, [], "texts is missing"),
        ({"response_mask": np.ones(3)}, [], "response_mask: got shape (3,), need (4, L)"),
        ({"response_mask": np.ones((3, 2))}, [], "response_mask: got shape (3, 2), need (4, L)"),
        (
            {"response_mask": np.array([[1, 0], [1, 0], [1, np.nan], [1, 1]])},
            [],
            "response_mask: row 2 has nan at place 1, need 0 or 1",
        ),
        ({"response_mask": np.full((4, 2), "1")}, [], "response_mask: row 0 has '1' at place 0, need 0 or 1"),
        ({"group": np.array([np.nan, np.nan, 1, np.nan])}, [], "group: row 0 has nan, need an int or a string"),
        ({"reward": np.array([0, 0, 1e300, 0])}, [], "reward: row 2 has 1e+300, need numbers from -3.4e+38 to 3.4e+38"),
        ({"reward": np.array([3e38, 0, 0, 3e38])}, [], "discounted_return: row 3 is inf; the rewards of group 'a' are"),
        ({}, ["--epsilon", "-1"], "epsilon must be at least 0, got -1.0"),
        ({}, ["--discount", "nan"], "discount must be a finite number (float32), got nan"),
        ({}, ["--similarity-threshold", "0.9"], "similarity_threshold: aggregation 'soft' has no anchors"),
        ({}, ["--preset", "gigpo_similarity", "--similarity-threshold", "2"], "similarity_threshold must be above 0"),
        ({name: np.array([]) for name in (*NEEDED, "texts")}, [], "group: need a non-empty array"),
        ({}, ["--temperature", "0"], "temperature must be > 0, got 0"),
        ({}, ["--preset", "best"], "--preset must be one of grpo"),
        ({}, ["--aggregation", "soggy"], "invalid choice 'soggy' for argument '--aggregation'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_target_alone(change, options, message, tmp_path, capsys):
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    target.write_text("what was here before")
    np.savez(source, **{name: value for name, value in {**steps(), **change}.items() if value is not None})
    assert main(["advantages", str(source), str(target), *options]) == 2
    said = capsys.readouterr().err
    assert message in plain(said)
    assert said.startswith("proxmo: ") == (said.count("\n") == 1)  # otherwise tyro's box
    assert target.read_text(encoding="utf-8") == "what was here before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "out.npz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "line 1 is not JSON"),
        ("{\n", "line 1 is not JSON"),
        ("3\n", "line 1 is int, need an object"),
        ('{"group": 1}\n{"step": 1}\n', "line 2 and the first differ in group, step"),
        ("\n", "holds no step"),
        ('{"reward": "x"}\n{"reward": 1}\n', "group is missing"),
    ],
)
def test_bad_lines_are_named(content, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    assert main(["advantages", str(tmp_path / "in.jsonl"), str(tmp_path / "out.npz")]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "in.npz").write_text("no zip")
    for source in ("in.npz", "absent.npz", "in.txt"):
        assert main(["advantages", str(tmp_path / source), str(tmp_path / "out.npz")]) == 2
        assert source in capsys.readouterr().err
    np.savez(tmp_path / "objects.npz", group=np.array([{}], object))
    assert main(["advantages", str(tmp_path / "objects.npz"), str(tmp_path / "out.npz")]) == 2
    assert "holds Python objects" in capsys.readouterr().err
    np.savez(tmp_path / "good.npz", **steps())
    assert main(["advantages", str(tmp_path / "good.npz"), str(tmp_path / "missing" / "out.npz")]) == 2
    assert main(["advantages", str(tmp_path / "good.npz"), str(tmp_path / "out.txt")]) == 2
    (tmp_path / "array.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:100])
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "latin.jsonl").write_bytes('{"group": "Küche"}\n'.encode("latin-1"))
    for source, message in (("array", "not a readable"), ("one", "holds one array"), ("latin", "line 1 is not JSON")):
        path = next(tmp_path.glob(f"{source}.*z")) if source != "latin" else tmp_path / "latin.jsonl"
        assert main(["advantages", str(path), str(tmp_path / "out.npz")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("float_min_reward", [], "reward: row 3 has -1.7976931348623157e+308, need numbers from -3.4e+38 to 3.4e+38"),
        ("null_group_two_tasks", [], "group: row 0 has None, need an int or a string that is not empty"),
        ("mask_null", [], "response_mask: row 0 has None at place 1, need 0 or 1"),
    ],
)
def test_files_of_other_trainers_that_cannot_be_used(name, options, message, tmp_path, capsys):
    assert main(["advantages", str(STEPS / f"{name}.jsonl"), str(tmp_path / "out.jsonl"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("constant", ["--preset", "grpo", "--epsilon", "0"]),
        ("epoch_seconds", []),
        ("group_of_one_turn", ["--preset", "gigpo"]),
    ],
)
def test_files_of_other_trainers_that_can(name, options, tmp_path):
    source, target = STEPS / f"{name}.jsonl", tmp_path / "out.jsonl"
    assert main(["advantages", str(source), str(target), *options]) == 0
    found = [json.loads(line, parse_constant=pytest.fail) for line in target.read_text(encoding="utf-8").splitlines()]
    if name == "epoch_seconds":
        steps = read_steps(source)
        numbered = {**steps, "step": [step - min(steps["step"]) for step in steps["step"]]}
        wanted = steps_advantages(numbered, proxmo())["advantage"]
        np.testing.assert_allclose([row["advantage"] for row in found], wanted)
        assert abs(wanted).max() > 1
    else:
        assert [row["advantage"] for row in found] == [0.0] * len(found)


def test_masks_of_different_lengths_keep_theirs(tmp_path):
    """In lines each answer is as long as its mask; an array is as wide as the longest."""
    masks = [[1, 1, 0], [1], [], [True, 0.0]]
    rows = [{name: values[i].tolist() for name, values in steps().items()} for i in range(4)]
    lines = [json.dumps({**row, "response_mask": mask, "other": [{}]}) for row, mask in zip(rows, masks, strict=True)]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    plain = steps_advantages(steps(), proxmo())["advantage"]
    for suffix in ("jsonl", "npz"):
        assert main(["advantages", str(tmp_path / "in.jsonl"), str(tmp_path / f"out.{suffix}")]) == 0
    found = [
        json.loads(line)["advantage"] for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for row, mask, value in zip(found, masks, plain, strict=True):
        np.testing.assert_allclose(row, value * np.array(mask, float), rtol=1e-6)
    wide = np.load(tmp_path / "out.npz")["advantage"]
    np.testing.assert_allclose(wide, plain[:, None] * [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]])


@pytest.mark.parametrize("bad", [3, "101", [1, "0"], [1, [0]], [0, float("nan")], [2], None])
def test_masks_that_are_none_are_named(bad):
    from proxmo_jax.errors import UserError
    from proxmo_jax.estimator.steps_file import _per_token

    with pytest.raises(UserError, match=r"^response_mask: row 1 has .*, need (a list of 0 and 1|0 or 1)$"):
        _per_token({"advantage": np.zeros(2)}, [[1, 0], bad])


TEXTS = ["You see a desk.", "", "half an emoji \ud83d", "ends in \0", "Küche 厨房", "You see a desk."]


def test_texts_are_stored_as_they_are_and_not_as_wide_as_the_longest(tmp_path):
    path = tmp_path / "rollout.npz"
    write_steps(path, {"texts": [*TEXTS, "w " * 100_000], "step": np.arange(7)})
    assert path.stat().st_size < 300_000
    with np.load(path, allow_pickle=False) as data:
        assert {name: data[name].dtype.kind for name in data.files} == {"texts.json": "u", "step": "i"}
        assert json.loads(data["texts.json"].tobytes())[:6] == TEXTS
    found = read_steps(path)
    assert found["texts"] == [*TEXTS, "w " * 100_000]
    assert found["step"].tolist() == list(range(7))


def test_files_with_arrays_of_strings_are_read_as_before(tmp_path):
    np.savez(tmp_path / "old.npz", **steps())
    write_steps(tmp_path / "new.npz", {**steps(), "texts": steps()["texts"].tolist()})
    old, new = (steps_advantages(read_steps(tmp_path / f"{age}.npz"), proxmo()) for age in ("old", "new"))
    for name in RESULTS:
        np.testing.assert_array_equal(old[name], new[name])


def test_what_is_not_a_number_is_never_written_to_lines(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_steps(tmp_path / "out.jsonl", {"advantage": np.array([np.nan])})
    assert not list(tmp_path.iterdir())


MEMORY = """
import re, sys
from proxmo_jax.cli import main
for source in sys.argv[1:]:
    for preset in ("gigpo", "proxmo"):
        assert main(["advantages", source, source.replace(".jsonl", ".npz"), "--preset", preset]) == 0
# Not getrusage: its peak includes that of the process which started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def test_one_long_text_or_attempt_does_not_cost_as_if_all_were(tmp_path):
    """Megabytes of one text, of few words or of many, among 1,000 steps; one attempt of 1,000 turns among 128 of one.
    Gigabytes if every text were as wide, every text had as many words or every pair of places were compared."""
    text = {2: "word " * 200_000, 700: " ".join(f"w{i}" for i in range(150_000))}
    rows = {
        "texts": [(i // 100, i // 10, i, text.get(i, f"place {i % 300} room")) for i in range(1000)],
        "turns": [(0, max(0, i - 999), i, f"place {i % 300} room") for i in range(1127)],
    }
    for name, steps in rows.items():
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for group, trajectory, step, seen in steps:
                row = {"group": group, "trajectory": trajectory, "step": step, "reward": 1.0 * (step % 7 == 0)}
                file.write(json.dumps({**row, "success": False, "action_valid": True, "texts": seen}) + "\n")
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / f"{name}.jsonl") for name in rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 0.6 * 2**30
