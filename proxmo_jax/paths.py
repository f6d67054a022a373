"""Files written whole, and paths of plain characters for libraries that do not take every name that a system does."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from proxmo_jax.errors import UserError

LINK = "folder"


def free_target(target: Path) -> None:
    """Raise UserError if a folder to be written holds something already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use; name a new folder")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: whoever reads it finds what was there before, or all of the text.

    Args:
        path: of the file.
        text: written as UTF-8.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def linked(folder: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder with a link to `folder` in it, named LINK, whose path has plain characters alone.

    Orbax and TensorStore read some characters of a path as patterns, separators or schemes: in a folder `lr[1e-4]`
    they merge nothing, and `a*b` also means other folders. Tokenizers and safetensors take UTF-8 alone.
    """
    holder = tempfile.TemporaryDirectory(prefix="proxmo-")
    (Path(holder.name) / LINK).symlink_to(folder.resolve(), target_is_directory=True)
    return holder


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """`linked`, as the path itself."""
    with linked(Path(folder)) as holder:
        yield Path(holder) / LINK
