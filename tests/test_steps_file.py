import json
from pathlib import Path

import numpy as np
import pytest

from proxmo_jax.advantages import PRESETS, proxmo
from proxmo_jax.cli import main
from proxmo_jax.steps_file import ANSWERS, NEEDED, steps_advantages

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def steps() -> dict:
    return {
        "group": np.array(["a", "a", "b", "a"]), "trajectory": np.array([1, 2, 3, 1]), "step": np.array([1, 0, 0, 0]),
        "reward": np.array([10.0, 0, 0, 0]), "success": np.array([True, False, False, True]),
        "action_valid": np.array([True, True, False, True]),
        "texts": np.array(["You see a desk.", "You see a shelf.", "Nothing happens.", "You see a desk and a shelf."]),
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
    for key in ANSWERS:
        np.testing.assert_allclose(answer[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_lines_and_arrays_give_the_same(preset, tmp_path):
    np.savez(tmp_path / "in.npz", **steps())
    write_lines(tmp_path / "in.jsonl", steps())
    for suffix in ("npz", "jsonl"):
        source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
        assert main(["advantages", str(source), str(target), "--preset", preset]) == 0
    arrays = np.load(tmp_path / "out.npz")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    direct = steps_advantages(steps(), PRESETS[preset]())
    for name in ANSWERS:
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
        ({name: np.array([]) for name in (*NEEDED, "texts")}, [], "group: need a non-empty array"),
        ({}, ["--temperature", "0"], "temperature must be > 0, got 0"),
        ({}, ["--preset", "best"], "--preset must be one of grpo"),
        ({}, ["--aggregation", "soggy"], "aggregation must be one of none, hard, soft"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_target_alone(change, options, message, tmp_path, capsys):
    source, target = tmp_path / "in.npz", tmp_path / "out.npz"
    target.write_text("what was here before")
    np.savez(source, **{name: value for name, value in {**steps(), **change}.items() if value is not None})
    assert main(["advantages", str(source), str(target), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert target.read_text() == "what was here before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npz", "out.npz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
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
