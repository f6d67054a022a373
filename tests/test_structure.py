"""Who may import whom: arrows between rooms run one way, without circles, and workers and `--help` stay light."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from proxmo_jax import cli

ROOT = Path(__file__).parents[1]
COMMON = {"proxmo_jax.errors", "proxmo_jax.paths"}
# A room may import these rooms, and itself.
ALLOWED = {
    "proxmo_jax.errors": set(),
    "proxmo_jax.paths": {"proxmo_jax.errors"},
    "proxmo_jax.estimator": {"proxmo_jax.errors"},
    "proxmo_jax.policy": COMMON,
    "proxmo_jax.integrations": {"proxmo_jax.errors", "proxmo_jax.estimator"},
    "proxmo_jax.training": COMMON | {"proxmo_jax.estimator", "proxmo_jax.policy"},
    "proxmo_jax.page": {"proxmo_jax.errors", "proxmo_jax.estimator"},
    "proxmo_jax.agent": COMMON
    | {"proxmo_jax.estimator", "proxmo_jax.page", "proxmo_jax.policy", "proxmo_jax.training", "envs_bridge"},
    "proxmo_jax.ablation": COMMON
    | {"proxmo_jax.estimator", "proxmo_jax.policy", "proxmo_jax.training", "proxmo_jax.agent", "envs_bridge"},
    "proxmo_jax.plan": COMMON
    | {"proxmo_jax.estimator", "proxmo_jax.policy", "proxmo_jax.training", "proxmo_jax.agent", "envs_bridge"},
    "envs_bridge": set(),
}
ESTIMATOR_MAY_USE = {"jax", "numpy", "chex"}


def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package in ("proxmo_jax", "envs_bridge"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, names: set[str] = frozenset()) -> set[str]:
    """What a file imports, inside functions too; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in names else node.module)
    return found


def room(name: str) -> str | None:
    """The room a module belongs to; None for the front (`proxmo_jax`, `cli`, `__main__`) and for other packages."""
    return next((r for r in ALLOWED if name == r or name.startswith(r + ".")), None)


def test_every_module_is_in_a_room_or_at_the_front():
    assert {name for name in modules() if room(name) is None} == {"proxmo_jax", "proxmo_jax.cli", "proxmo_jax.__main__"}


@pytest.mark.parametrize("owner", ALLOWED)
def test_arrows_run_one_way(owner):
    all_modules = modules()
    for name, path in all_modules.items():
        if room(name) != owner:
            continue
        for other in imports(path, set(all_modules)):
            if other.split(".")[0] in ("proxmo_jax", "envs_bridge", "experiments", "tests"):
                assert room(other) in {owner, *ALLOWED[owner]}, f"{name} imports {other}"


def test_there_is_no_circle_between_modules():
    all_modules = modules()
    arrows = {name: imports(path, set(all_modules)) & set(all_modules) for name, path in all_modules.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in arrows:
        visit(name)


def test_the_estimator_needs_only_jax_numpy_and_chex():
    for name, path in modules().items():
        if room(name) == "proxmo_jax.estimator":
            others = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"proxmo_jax"}
            assert others <= ESTIMATOR_MAY_USE, name


def test_the_bridge_does_not_need_jax():
    for name, path in modules().items():
        if room(name) == "envs_bridge":
            assert not imports(path) & {"jax", "flax", "optax", "proxmo_jax", "tyro", "rich"}, name


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has imported after running `code`."""
    script = (
        "import contextlib, io, sys\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    {code}\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_help_does_not_wait_for_jax():
    loaded = loaded_by("from proxmo_jax.cli import main; main(['--help'])")
    assert not loaded & {"jax", "flax", "numpy", "transformers", "matplotlib"}


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["proxmo-jax", version("proxmo-jax")]


def test_a_reader_that_goes_away_is_no_mistake():
    """`proxmo --help | head -1` ends without a word; the status is that of SIGPIPE."""
    command = [sys.executable, "-m", "proxmo_jax", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_library_does_not_load_the_trainer():
    """`import proxmo_jax as pj` and its public names need JAX alone."""
    loaded = loaded_by("import proxmo_jax as pj; pj.proxmo(); pj.batch_advantages")
    assert "jax" in loaded
    assert not loaded & {"flax", "optax", "orbax", "transformers", "rich", "tyro", "matplotlib", "envs_bridge"}


def test_every_public_name_is_there():
    import proxmo_jax

    assert sorted(proxmo_jax.__all__) == sorted(set(proxmo_jax.__all__))
    for name in proxmo_jax.__all__:
        assert getattr(proxmo_jax, name) is not None
    assert set(proxmo_jax.__all__) <= set(dir(proxmo_jax))
    with pytest.raises(AttributeError, match="no attribute 'proxmu'"):
        proxmo_jax.proxmu  # noqa: B018
