"""`proxmo`: the command line. The only room that opens the experiments' doors."""

import dataclasses
import os
import sys
import tomllib
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("PROXMO_TRACEBACK"):
            raise
        print(f"proxmo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("proxmo: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: proxmo train [options]\n\n  train   train an agent on household games (proxmo train --help)")
        return 0
    command, *rest = arguments
    if command == "train":
        return _train(rest)
    raise ValueError(f"unknown command {command!r}; need train")


def _train(arguments: list[str]) -> int:
    from proxmo_jax.sharding import keep_freed_memory

    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would note that there is no PyTorch
    import tyro

    from experiments import train

    default = _defaults(arguments, train.Config)
    config = tyro.cli(train.Config, args=arguments, default=default, prog="proxmo train", description=train.__doc__)
    if config.resume and not any(word.startswith("--iterations") for word in arguments):
        config = dataclasses.replace(config, iterations=0)  # as many as the run has stored
    train.main(config)
    return 0


def _defaults(arguments: list[str], cls):
    """The settings of the file named by --config, if any. Raises ValueError naming the file and the fault."""
    for i, word in enumerate(arguments):
        if word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
            break
    else:
        return cls()
    try:
        values = tomllib.loads(Path(name).read_text())
    except OSError as error:
        raise ValueError(f"--config: {name} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {name} is not TOML ({error})") from error
    known = {f.name: f for f in cls.__dataclass_fields__.values()}
    values = {k.replace("-", "_"): v for k, v in values.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"--config: {name} sets {', '.join(unknown)}, which is no setting of train")
    for key, value in values.items():
        default = known[key].default
        if isinstance(default, Path):
            values[key] = Path(value)
        elif not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
            raise ValueError(f"--config: {key} must be {type(default).__name__}, got {value!r}")
    return cls(**values)
