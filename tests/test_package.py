"""The wheel holds the library and the bridge alone, and a run works from it; the version is stated in one place."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from test_train import SMALL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("proxmo_jax", "envs_bridge", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", target]
    done = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(target.glob("proxmo_jax-*.whl"))


def test_the_wheel_holds_the_two_packages_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "proxmo_jax", "envs_bridge", f"proxmo_jax-{version('proxmo-jax')}.dist-info",
    }  # fmt: skip
    assert "proxmo_jax/agent/recipes/shop.toml" in names
    assert {f"proxmo_jax/page/{name}" for name in ("page.html", "page.css", "charts.js", "panel.js", "page.js")} <= set(
        names
    )
    assert "envs_bridge/household/household.pddl" in names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run `proxmo` as the wheel installs it, in an empty folder, the repository out of sight."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        code = "import proxmo_jax, sys; from proxmo_jax.cli import main; print(proxmo_jax.__file__); sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder, env=environment
        )
        assert done.stdout.startswith(str(site)), done.stderr
        return done

    return run


@pytest.mark.slow
def test_the_installed_package_trains(installed):
    done = installed("train", "--iterations", "1", "--out", "run", *SMALL)  # programs that test_train.py has compiled
    assert done.returncode == 0, done.stderr
    assert "Done in" in done.stdout


def test_benchmarks_need_the_repository(installed):
    done = installed("bench", "shop")
    assert done.returncode == 2
    assert "the benchmarks are not part of the installed package" in done.stderr
