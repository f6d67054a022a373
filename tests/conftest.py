"""Eight devices are there even on a laptop, random tests draw the same examples every time, and the processes that
tests start share their compiled programs."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="proxmo-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
sys.path.extend(str(Path(__file__).parent / room) for room in (".", "policy", "agent", "ablation"))  # shared helpers

import jax
import pytest
from hypothesis import settings

from proxmo_jax.policy.sharding import enough_threads

# Not by XLA_FLAGS: those stay the user's, and processes that tests start have one device and its threads.
jax.config.update("jax_num_cpu_devices", 8)
if "NPROC" not in os.environ:
    enough_threads()
    jax.devices()
    del os.environ["NPROC"]

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("repeatable")

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
ALFWORLD = REFERENCE / "alfworld"


SLOWEST = (
    "train language_model update runner batch sharding decoder rollout weights grid attention estimator bench golden"
    " model_files proximity bench_estimator methods dynamic_sampling settings importance throughput vector_agent"
    " adapters bench_ablation vector_household embeddings steps_file"
).split()


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no process is left with one at the end."""
    rank = {f"test_{name}": at for at, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# Files that compare two ways to compute the same, or whole runs with each other: XLA compiles their programs with few
# optimisations (as JAX's own tests have it), also in the processes that they start: a third less time. Recorded
# outputs, the run of the installed package, the one that is killed and everything else are compiled as users compile.
COMPARED = (
    "sharding update decoder adapters importance batch methods dynamic_sampling rollout overlong grid language_model"
    " train hosts throughput skipped_turns vector_agent estimator proximity weights attention panel steps_file losses"
).split()


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled(request):
    """Compile the programs of these files with few optimisations."""
    quickly = request.path.stem.removeprefix("test_") in COMPARED
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quickly)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quickly)))
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs that are kept map memory, ten thousand maps a module here, and Linux allows a process 65,530: a
    compilation past them is a segmentation fault. What the next module needs again is in the cache on disk."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def official() -> Path:
    """Further outputs of the official code, which are not part of this repository."""
    if not (REFERENCE / "official").is_dir():
        pytest.skip("the official code's further outputs are not beside this checkout")
    return REFERENCE / "official"


@pytest.fixture(scope="session")
def upstream_games() -> list[Path]:
    """Game files of the public ALFWorld data set, in the current wording; they are not part of this repository."""
    games = sorted(ALFWORLD.glob("current/json_2.1.1/*/*/*/game.tw-pddl"))
    if not games:
        pytest.skip("ALFWorld's games are not beside this checkout")
    return games


@pytest.fixture(scope="session")
def games(tmp_path_factory) -> list[str]:
    """Twelve generated games, two of each task type."""
    from envs_bridge.household.generate import generate_games

    folder = tmp_path_factory.mktemp("games")
    return [str(path) for path in generate_games(folder, split="train", count=12, seed=7)]
