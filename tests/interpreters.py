"""Interpreters of this machine that workers may run under."""

import shutil
import subprocess
import sys
from pathlib import Path


def other_pythons() -> list[str]:
    """Those between 3.8 and 3.12 that start: the oldest and the newest, and this one."""
    found = {sys.version_info[:2]: sys.executable}
    folders = Path.home() / ".pyenv" / "versions"
    candidates = [*folders.glob("3.*/bin/python3"), *(shutil.which(f"python3.{minor}") for minor in range(8, 13))]
    for path in filter(None, candidates):
        done = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            version = tuple(map(int, done.stdout.split()))
            if (3, 8) <= version <= (3, 12):
                found.setdefault(version, str(path))
    return [found[version] for version in sorted({min(found), max(found), sys.version_info[:2]})]
