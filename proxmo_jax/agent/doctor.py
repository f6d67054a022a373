"""Check this machine: one line for each thing that runs need, with the command that fixes it.

    proxmo doctor
    proxmo doctor --data DIR --python PY --webshop DIR    # ALFWorld's or a shop's files, the workers' interpreter

The exit status is 1 if a line says FAIL; lines that begin with `-` are about what is optional. JAX is imported in a
process of its own, so that a broken installation is found, too.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from envs_bridge.errors import UserError
from envs_bridge.household.dataset import SPLITS, data_folder
from envs_bridge.pool import Pool

NEEDS_DEVICE = False
ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
OLDEST = (3, 11)
ROOM = 2.0  # GiB that a run needs: checkpoints of the small policy take 0.1, those of a language model many
PROBE = """
import json, jax
first, *others = jax.devices()
print(json.dumps([f"{1 + len(others)} x {first.platform} ({first.device_kind})", jax.__version__]))
"""
# Optional packages: the module, the extra that has it, what it is for.
EXTRAS = (
    ("libtpu", "tpu", "TPUs, and proxmo plan, which compiles for them"),
    ("gguf", "gguf", "convert-gguf and fetch-model"),
    ("wandb", "wandb", "--report-to wandb"),
    ("pyarrow", "trl", "proxmo steps trl"),
    ("tunix", "tunix", "Tunix's agentic GRPO with our advantages"),
    ("textworld", "alfworld", "ALFWorld's own engine"),
)


@dataclass(frozen=True)
class Config:
    """What to check beside the installation."""

    data: Path | None = None
    """ALFWorld's data folder, or a shop's files; default: $ALFWORLD_DATA, if it is set."""
    python: str = sys.executable
    """Interpreter of the worker processes."""
    webshop: Path | None = None
    """Checkout of WebShop."""
    out: Path = Path("runs")
    """Where runs are to be written."""
    timeout: float = 120.0
    """Seconds after which a device or an interpreter that does not answer is given up."""


class Line(NamedTuple):
    """What was found of a thing, and the command that fixes it."""

    state: Literal["ok", "-", "FAIL"]
    name: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        found = " ".join(self.found.split())
        return f"{self.state:<5} {self.name:<13} {found}" + (f"  -> {self.fix}" if self.fix else "")


def main(config: Config) -> bool:
    """Print a line for each thing as it is checked; whether nothing failed."""
    failed = 0
    for line in check(config):
        print(line, flush=True)
        failed += line.state == "FAIL"
    print(f"{failed} to fix" if failed else "all is well")
    return not failed


def check(config: Config) -> Iterator[Line]:
    """Every line, in order. A check that breaks down is a line, too, not the end of the others."""
    checks: tuple[Callable[[Config], Iterator[Line]], ...] = (
        python_version, packages, devices, compilation_cache, disk, alfworld, catalogues, workers, webshop, extras,
    )  # fmt: skip
    for one in checks:
        try:
            yield from one(config)
        except Exception as error:  # what is broken here is what the user wants to know
            yield Line("FAIL", one.__name__.replace("_", " "), f"{type(error).__name__}: {error}")


def python_version(config: Config) -> Iterator[Line]:
    version = sys.version.split()[0]
    if sys.version_info < OLDEST:
        yield Line("FAIL", "python", f"{version}, need 3.11 or newer", "make train PYTHON=python3.11")
    else:
        yield Line("ok", "python", f"{version}, {sys.executable}")


def packages(config: Config) -> Iterator[Line]:
    """Required packages, against requirements.lock where it is beside the package."""
    pinned = read_lock(LOCK.read_text(encoding="utf-8")) if LOCK.is_file() else {}
    try:
        declared = importlib.metadata.requires("proxmo-jax") or []
    except importlib.metadata.PackageNotFoundError:
        yield Line("FAIL", "packages", "proxmo-jax is not installed in this interpreter", install())
        return
    required = [re.split(r"[^\w.-]", line)[0] for line in declared if "extra ==" not in line]
    have = {name: installed(name) for name in {*required, *pinned}}
    missing = [name for name in required if have[name] is None]
    different = [f"{name} {have[name]}, need {want}" for name, want in pinned.items() if have[name] not in (None, want)]
    if missing:
        yield Line("FAIL", "packages", f"missing: {', '.join(missing)}", install())
    if different:
        yield Line("FAIL", "packages", f"not as in requirements.lock: {'; '.join(different)}", install())
    if not missing and not different:
        versions = "versions as in requirements.lock" if pinned else "no requirements.lock to compare with"
        yield Line("ok", "packages", f"all {len(required)} required are there; {versions}")


def install(extra: str = "") -> str:
    """The command that installs this package, from the checkout if this is one."""
    chosen = f"[{extra}]" if extra else ""
    if LOCK.is_file():
        return f"{sys.executable} -m pip install -c {LOCK} -e '{ROOT}{chosen}'"
    return f"{sys.executable} -m pip install --upgrade 'proxmo-jax{chosen}'"


def read_lock(text: str) -> dict[str, str]:
    """The versions of `name==version` lines."""
    found = (line.partition("#")[0].split(";")[0].strip().partition("==") for line in text.splitlines())
    return {name: version for name, _, version in found if version}


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices(config: Config) -> Iterator[Line]:
    """JAX in a process of its own, which may crash or hang."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, encoding="utf-8", errors="replace",
            timeout=config.timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        hint = "JAX_PLATFORMS=cpu proxmo doctor"
        yield Line("FAIL", "devices", f"JAX finds none within {config.timeout:g} s; is another process using it?", hint)
        return
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit status {done.returncode}"]
        broken = not platforms or re.match(r"(ImportError|ModuleNotFoundError|SyntaxError)\b", last[0])
        fix = f"{install()} --force-reinstall" if broken else "unset JAX_PLATFORMS"
        named = f"JAX_PLATFORMS={platforms}: " if platforms and not broken else ""
        yield Line("FAIL", "devices", f"{named}{last[0][:200]}", fix)
        return
    found, version = json.loads(done.stdout.splitlines()[-1])
    yield Line("ok", "devices", f"{found}, jax {version}, {os.cpu_count()} CPU cores")
    if " cpu " in found and shutil.which("nvidia-smi"):
        yield Line(
            "-", "devices", "there is an NVIDIA GPU that JAX does not see",
            f"{sys.executable} -m pip install 'jax[cuda13]=={version}'",
        )  # fmt: skip


def compilation_cache(config: Config) -> Iterator[Line]:
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not named:
        fix = "export JAX_COMPILATION_CACHE_DIR=~/.cache/proxmo/jax"
        yield Line("-", "compile cache", "off: every run compiles its programs anew", fix)
        return
    if fault := unwritable(Path(named)):
        yield Line("FAIL", "compile cache", f"{named}: {fault}", f"mkdir -p {named} && chmod u+rwx {named}")
        return
    sizes = [path.stat().st_size for path in Path(named).rglob("*") if path.is_file()] if Path(named).is_dir() else []
    yield Line("ok", "compile cache", f"{named}: {len(sizes)} files, {sum(sizes) / 2**20:.0f} MiB")


def disk(config: Config) -> Iterator[Line]:
    """Room for runs, prepared catalogues and temporary files."""
    places = (
        ("runs", config.out, "--out DIR, on another disk"),
        ("catalogues", catalogue_folder(), "export PROXMO_CACHE=DIR"),
        ("temporary files", Path(tempfile.gettempdir()), "export TMPDIR=DIR"),
    )
    for name, folder, fix in places:
        if fault := unwritable(folder):
            yield Line("FAIL", "disk", f"{name}: {folder}: {fault}", fix)
            continue
        free = shutil.disk_usage(existing(folder)).free / 2**30
        found = f"{name}: {free:.1f} GiB free at {folder}"
        yield Line("ok", "disk", found) if free >= ROOM else Line("FAIL", "disk", f"{found}, need {ROOM:g}", fix)


def catalogue_folder() -> Path:
    """Where prepared catalogues are kept. The shop needs NumPy, which may be what is missing here."""
    from envs_bridge.shop.catalogue import cache_folder

    return cache_folder()


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def unwritable(folder: Path) -> str:
    """Why nothing can be written there; empty if it can."""
    place = existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def alfworld(config: Config) -> Iterator[Line]:
    data = config.data
    if data is None and not os.environ.get("ALFWORLD_DATA"):
        yield Line("-", "alfworld", "$ALFWORLD_DATA is not set", "alfworld-download && export ALFWORLD_DATA=DIR")
        return
    if data is not None and is_shop(data):
        return
    try:
        folder = data_folder(data)
    except UserError as error:
        yield Line("FAIL", "alfworld", str(error), "alfworld-download --data-dir DIR")
        return
    counts = {split: sum(1 for _ in (folder / split).glob("*/*/game.tw-pddl")) for split in SPLITS}
    found = f"{folder}: " + ", ".join(f"{split} {count}" for split, count in counts.items())
    if not all(counts.values()):
        yield Line(
            "FAIL", "alfworld", f"{found}; need games in each", f"alfworld-download --data-dir {folder.parent} -f"
        )
    else:
        yield Line("ok", "alfworld", found)


def is_shop(data: Path) -> bool:
    return data.is_file() or any(data.glob("items_shuffle*.json"))


def catalogues(config: Config) -> Iterator[Line]:
    """A shop's files that were named, and the prepared catalogues."""
    from envs_bridge.shop.catalogue import product_file

    if config.data is not None and is_shop(config.data):
        path = product_file(config.data)
        needed = path.name.replace("items_shuffle", "items_ins_v2"), "items_human_ins.json"
        missing = [name for name in needed if not path.with_name(name).is_file()]
        if missing:
            fix = "./setup.sh -d all, in a checkout of WebShop"
            yield Line("FAIL", "shop", f"{path} is there, {' and '.join(missing)} not", fix)
        else:
            yield Line("ok", "shop", f"{path}, {path.stat().st_size / 2**20:.0f} MiB")
    if prepared := sorted(catalogue_folder().glob("shop-*")):
        yield Line("ok", "shop", f"{len(prepared)} prepared catalogues in {catalogue_folder()}")


def workers(config: Config) -> Iterator[Line]:
    """An actual worker process under the interpreter, which speaks its protocol version."""
    try:
        with Pool(1, python=config.python, timeout=config.timeout):
            yield Line("ok", "workers", f"{config.python} starts one")
    except UserError as error:
        fix = "--python PY, an interpreter of Python 3.8 or newer"
        yield Line("FAIL", "workers", str(error), fix)


def webshop(config: Config) -> Iterator[Line]:
    if config.webshop is None:
        return
    if not (config.webshop / "web_agent_site").is_dir():
        fix = "git clone https://github.com/princeton-nlp/WebShop"
        yield Line("FAIL", "webshop", f"{config.webshop} holds no web_agent_site", fix)
        return
    missing = [name for name in ("gym", "pyserini", "spacy", "thefuzz") if not imports(config.python, name)]
    if missing:
        fix = f"{config.python} -m pip install -r {config.webshop}/requirements.txt"
        yield Line("FAIL", "webshop", f"{config.python} has no {', '.join(missing)}", fix)
    else:
        yield Line("ok", "webshop", f"{config.webshop}, {config.python}")


def extras(config: Config) -> Iterator[Line]:
    for module, extra, purpose in EXTRAS:
        python = config.python if module == "textworld" else sys.executable
        if imports(python, module):
            yield Line("ok", f"[{extra}]", f"{module}: {purpose}")
        else:
            fix = install(extra).replace(sys.executable, python, 1)
            yield Line("-", f"[{extra}]", f"no {module}: {purpose}", fix)


def imports(python: str, module: str) -> bool:
    """Whether an interpreter is there and finds a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
