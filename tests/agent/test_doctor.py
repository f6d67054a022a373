"""The doctor finds what is broken and says what fixes it, even where JAX is what is broken."""

import os
import subprocess
import sys
from pathlib import Path

from envs_bridge.household.generate import generate_games
from proxmo_jax.agent import doctor
from proxmo_jax.agent.doctor import Config, Line, check, read_lock

ROOT = Path(__file__).parents[2]


def lines(config: Config, *names: str) -> dict[str, Line]:
    """The lines of a few checks, by name."""
    return {line.name: line for name in names for line in getattr(doctor, name)(config)}


def test_a_broken_jax_and_missing_data_are_told_apart(tmp_path):
    """In a process of its own: JAX cannot be imported, the data folder is empty, the interpreter is none."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "jax.py").write_text("raise ImportError('libdevice.so.9 is not here')")
    path = f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, "ALFWORLD_DATA": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "proxmo_jax", "doctor", "--python", "/nowhere/python"],
        cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert any("devices" in line and "libdevice.so.9 is not here" in line and "pip install" in line for line in failed)
    assert any("alfworld" in line and "holds none of the folders train" in line for line in failed)
    assert any("workers" in line and "/nowhere/python" in line for line in failed)
    assert all(" -> " in line for line in failed)
    assert done.stdout.splitlines()[-1] == f"{len(failed)} to fix"
    assert "ok    python" in done.stdout


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "warp")
    line = lines(Config(), "devices")["devices"]
    assert line.state == "FAIL"
    assert line.found.startswith("JAX_PLATFORMS=warp: ")
    assert line.fix == "unset JAX_PLATFORMS"


def test_versions_are_compared_with_the_lock(monkeypatch, tmp_path):
    lock = tmp_path / "requirements.lock"
    monkeypatch.setattr(doctor, "LOCK", lock)
    lock.write_text(f"# pinned\nnumpy==0.1  # old\nno-such-package==1\nflax=={doctor.installed('flax')}\n")
    assert read_lock(lock.read_text())["numpy"] == "0.1"
    line = lines(Config(), "packages")["packages"]
    assert line.state == "FAIL"
    assert line.found == f"not as in requirements.lock: numpy {doctor.installed('numpy')}, need 0.1"
    assert f"-c {lock}" in line.fix
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["no-such-package>=1", "x; extra == 'dev'"])
    assert "missing: no-such-package" in next(doctor.packages(Config())).found


def test_data_disk_and_cache_are_looked_at(monkeypatch, tmp_path):
    generate_games(tmp_path / "data", split="train", count=1, seed=1)
    for split in ("valid_seen", "valid_unseen"):
        generate_games(tmp_path / "data", split=split, count=2, seed=1)
    assert lines(Config(data=tmp_path / "data"), "alfworld")["alfworld"].found.endswith(
        "train 1, valid_seen 2, valid_unseen 2"
    )
    (tmp_path / "items_shuffle_1000.json").write_text("[]")
    shop = lines(Config(data=tmp_path), "catalogues")["shop"]
    assert "items_ins_v2_1000.json and items_human_ins.json not" in shop.found
    assert not lines(Config(data=tmp_path), "alfworld")
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(file / "x"))
    assert "is a file" in lines(Config(), "compilation_cache")["compile cache"].found
    monkeypatch.setattr(doctor, "ROOM", 1e9)
    assert lines(Config(out=tmp_path), "disk")["disk"].state == "FAIL"
    assert lines(Config(webshop=tmp_path), "webshop")["webshop"].fix.startswith("git clone")


def test_a_check_that_breaks_down_is_a_line(monkeypatch):
    def broken(config):
        raise RuntimeError("odd")
        yield

    for name in ("devices", "workers", "extras", "disk"):
        monkeypatch.setattr(doctor, name, broken)
    found = list(check(Config()))
    assert sum(line.found == "RuntimeError: odd" for line in found) == 4
    assert found[-1].state == "FAIL"


def test_a_worker_is_started():
    assert lines(Config(), "workers")["workers"].state == "ok"
