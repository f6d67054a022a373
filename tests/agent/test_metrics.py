"""Metrics in TensorBoard's event files, read back, and in Weights & Biases: a stand-in for it that records the calls,
and itself, offline, where it is installed."""

import io
import json
import struct
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from nested import config_with
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from proxmo_jax.agent.metrics import Trackers
from proxmo_jax.agent.report import learning_curve, write_episodes
from proxmo_jax.agent.run_files import open_folder, resumed

ROWS = [
    {"iteration": 0, "eval/success_rate": 0.25, "eval/games": 8, "time/eval": 2.0},
    {"iteration": 1, "train/success_rate": 0.5, "train/reward": 5.0, "loss/approx_kl": 0.01, "time/rollout": 3.0},
    {"iteration": 2, "train/success_rate": 0.75, "train/reward": 7.5, "loss/approx_kl": 0.02, "time/rollout": 3.5},
]


def events(folder):
    """The events of a folder's event files, in the order of the files' names, by TensorFlow's record format."""
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(folder):
    """Value by name and iteration."""
    values = [(value.tag, event.step, value) for event in events(folder) for value in event.summary.value]
    return {
        (tag, step): value.simple_value for tag, step, value in values if value.WhichOneof("value") == "simple_value"
    }


def report(config, kept=None):
    """Report a run; what was said."""
    folder, said = config.output.dir, io.StringIO()
    trackers = Trackers(config, kept, Console(file=said, width=400, markup=False))
    for row in ROWS:
        if kept is None or row["iteration"] > kept:
            trackers.write(row)
    write_episodes(folder / "episodes_after.txt", ["task"], [[("a <b>room</b> \ud83d", "go **on**")]], [True])
    trackers.episodes(folder / "episodes_after.txt", 2)
    learning_curve(folder / "learning_curve.png", [("proxmo", ROWS)], "a run")
    trackers.curve(folder / "learning_curve.png", 2)
    trackers.close()
    return said.getvalue()


def config_of(folder, *report_to, **changes):
    config = config_with(output__dir=folder / "run", output__report_to=report_to, **changes)
    if not config.resume:
        open_folder(config)
    return config


def test_tensorboard_has_the_metrics_and_media(tmp_path):
    config = config_of(tmp_path, "tensorboard")
    assert report(config) == ""
    found = scalars(config.output.dir)
    assert found["critic/score/mean", 2] == 7.5
    assert found["actor/ppo_kl", 1] == pytest.approx(0.01)
    assert found["timing_s/gen", 2] == 3.5
    assert found["timing_s/testing", 0] == 2
    assert found["train/success_rate", 2] == 0.75
    assert not {tag for tag, _ in found} & {"iteration", "train/reward", "time/rollout"}
    media = {value.tag: value for event in events(config.output.dir) for value in event.summary.value}
    text = media["episodes_after/text_summary"].tensor.string_val[0].decode()
    assert "    " + "> go **on**" in text.splitlines()  # a block of code: neither Markdown nor HTML
    assert all(line.startswith("    ") for line in text.splitlines())
    settings = media["config/text_summary"].tensor.string_val[0].decode()
    assert json.loads(settings)["estimator"]["temperature"] == config.estimator.temperature
    image = media["learning_curve"].image
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.width, image.height) == (1200, 675)


@pytest.mark.parametrize("kept", [0, 1])  # 0: stopped in the evaluation of iteration 1
def test_a_resumed_run_hides_what_comes_after_its_checkpoint(tmp_path, kept):
    config = config_of(tmp_path, "tensorboard")
    report(config)
    report(replace(config, resume=True), kept=kept)
    starts = [event.step for event in events(config.output.dir) if event.WhichOneof("what") == "session_log"]
    assert starts == [kept + 1]


def test_none_writes_nothing(tmp_path):
    config = config_of(tmp_path)
    assert report(config) == ""
    assert not (config.output.dir / "tensorboard").exists()


def test_resuming_takes_another_place_to_report_to(tmp_path):
    config = config_of(tmp_path, "tensorboard")
    asked = replace(config, resume=True, output=replace(config.output, report_to=()))
    taken, ignored = resumed(asked)
    assert taken.output.report_to == ()
    assert ignored == []


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb 0.31 that records what is asked of it."""
    module = ModuleType("wandb")
    calls = SimpleNamespace(init=[], log=[], metrics=[], finished=0, key=True, fault=None)

    class Fault(Exception):
        pass

    class Run:
        id, url = "abc", None

        def log(self, row):
            calls.log.append(row)

        def define_metric(self, name, step_metric=None):
            calls.metrics.append((name, step_metric))

        def finish(self):
            calls.finished += 1

    def init(**options):
        calls.init.append(options)
        if calls.fault:
            raise Fault(calls.fault)
        return Run()

    module.init, module.login = init, lambda prompt: calls.key or prompt
    module.errors, module.Settings = SimpleNamespace(Error=Fault), SimpleNamespace
    module.Table = lambda columns, data: (columns, data)
    module.Image = lambda path: path
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_wandb_has_the_same(tmp_path, wandb):
    config = config_of(tmp_path, "wandb")
    assert report(config) == ""
    (options,) = wandb.init
    assert options["config"]["estimator"]["temperature"] == config.estimator.temperature
    json.dumps(options["config"])
    assert options["mode"] is None
    assert ("*", "iteration") in wandb.metrics
    assert wandb.log[2] == {
        "train/success_rate": 0.75, "critic/score/mean": 7.5, "actor/ppo_kl": 0.02, "timing_s/gen": 3.5, "iteration": 2
    }  # fmt: skip
    assert "go **on**" in wandb.log[3]["episodes_after"][1][0][0]
    assert wandb.log[4]["learning_curve"].endswith("learning_curve.png")
    assert wandb.finished == 1
    report(replace(config, resume=True), kept=1)
    assert (wandb.init[1]["id"], wandb.init[1]["resume"]) == ("abc", "allow")


def test_wandb_without_a_key_records_offline_and_says_so_once(tmp_path, wandb):
    wandb.key = False
    said = report(config_of(tmp_path, "wandb"))
    assert said.count("no API key (WANDB_API_KEY, or wandb login); recording offline") == 1
    assert wandb.init[0]["mode"] == "offline"
    assert len(wandb.log) == 5


def test_wandb_that_fails_is_said_once_and_the_run_goes_on(tmp_path, wandb):
    wandb.fault = "no\nnetwork"
    config = config_of(tmp_path, "tensorboard", "wandb")
    assert report(config) == "--report-to wandb: no network; going on without\n"
    assert scalars(config.output.dir)["critic/score/mean", 2] == 7.5


def test_wandb_that_is_not_installed_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = report(config_of(tmp_path, "wandb"))
    assert said == "--report-to wandb: the package is not installed (pip install 'proxmo-jax[wandb]'); going on\n"


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path, "wandb")
    assert report(config) == ""
    (recorded,) = config.output.dir.glob("wandb/offline-run-*/run-*.wandb")
    data = recorded.read_bytes()
    assert b"critic/score/mean" in data
    assert np.frombuffer(data, np.uint8).size > 1000
