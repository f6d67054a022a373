"""Where settings come from and go to: recipes (TOML), the run's config.json, the command line's early options."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import tyro

from proxmo_jax.agent.chat import settings_of
from proxmo_jax.agent.settings import Config, need, of_preset, option
from proxmo_jax.errors import UserError
from proxmo_jax.paths import write_whole

RECIPES = Path(__file__).parent / "recipes"
ON_THE_COMMAND_LINE = ("config", "resume")
# What a resumed run takes from the command line: where and how it runs, and none of what it learns.
TAKEN_BY_RESUME = (
    *(
        f"output.{name}"
        for name in ("profile", "report_to", "keep_rollouts", "page", "save_every", "save_minutes", "keep")
    ),
    "output.grace_seconds",
    *("output.watchdog_seconds", "mesh.fsdp", "mesh.tensor", "env.workers", "optimizer.micro_batch_tokens"),
)
# Bytes of file names that are not UTF-8 are lone surrogates in Python, which JSON must not hold: private characters
# stand in for them while settings are validated.
STAND_INS = {0xDC80 + i: 0xF780 + i for i in range(128)}


@dataclass(frozen=True)
class Early:
    """Options that decide what the other options start from."""

    preset: str | None = None
    config: str | None = None
    resume: bool = False
    env: Annotated[str | None, tyro.conf.arg(aliases=["--env.name"])] = None
    out: Annotated[Path, tyro.conf.arg(aliases=["--output.dir"])] = Config().output.dir


def default(arguments: list[str]) -> Config:
    """The settings that the command line's options start from.

    They are those of the preset and of the recipe: the one that --config names, or else the one called like the
    environment. With --resume they are those of the run, and of a recipe that is named.

    Raises:
        UserError: for a preset, recipe or run that is not there or cannot be read.
    """
    early, _ = tyro.cli(Early, args=arguments, return_unknown_args=True, add_help=False)
    named = early.config is not None
    recipe = early.config if named else early.env if (RECIPES / f"{early.env}.toml").is_file() else None
    values = {} if recipe is None else read_recipe(recipe)
    if early.resume:
        values.pop("iterations", None)  # only the command line makes a run longer
        return with_values(stored_config(early.out), values if named else {}, f"--config {recipe}")
    preset = early.preset or values.get("preset", "proxmo")
    need(isinstance(preset, str), f"--config {recipe}: preset must be a string, got {preset!r}")
    return with_values(of_preset(preset), {**values, "preset": preset}, f"--config {recipe}")


def read_recipe(name: str) -> dict[str, Any]:
    """The tables of a recipe, by its name or file. Raises UserError naming the file and the fault."""
    recipe = RECIPES / f"{name}.toml"
    try:
        values = tomllib.loads((recipe if recipe.is_file() else Path(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: {name} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {name} is not TOML ({error})") from error
    values = _underscored(values, name)
    for key in ON_THE_COMMAND_LINE:
        need(key not in values, f"--config: {name} sets {key}, which belongs on the command line")
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("chat_template_args"), dict):
        model["chat_template_args"] = list(settings_of(model["chat_template_args"]))
    return values


def _underscored(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The table with `_` for `-` in the names of settings and parts. Raises UserError for one that is set twice."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        need(key not in found, f"--config: {file} sets {key} twice, spelled with - and with _")
        is_part = isinstance(value, dict) and key != "chat_template_args"
        found[key] = _underscored(value, file) if is_part else value
    return found


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """The settings with the values of (nested) tables in their place.

    Args:
        config: what is kept where `values` says nothing.
        values: by part and name, as in a recipe.
        source: what messages name.

    Raises:
        UserError: for names that are no setting, values of another type, and settings that cannot work.
    """
    unknown = _unknown(config, values)
    need(not unknown, f"{source}: sets {', '.join(unknown)}, which is no setting of train")
    merged = _merge(dataclasses.asdict(config), values)
    try:
        text = json.dumps(merged, default=str, ensure_ascii=False).translate(STAND_INS)
        return _with_bytes(pydantic.TypeAdapter(Config).validate_json(text, strict=True))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":  # what a part says of itself
            raise UserError(f"{source}: {first['ctx']['error']!s}") from error
        found = first["input"]
        raise UserError(f"{source}: {name}: {first['msg'].lower()}, got {found!r:.80}") from error


def _with_bytes(config: Any) -> Any:
    """The settings with bytes of file names in the place of their stand-ins."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _with_bytes(value)
        elif isinstance(value, Path):
            changes[f.name] = Path(str(value).translate({stand_in: byte for byte, stand_in in STAND_INS.items()}))
    return dataclasses.replace(config, **changes)


def _unknown(config: Any, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of `values` that the settings do not have, and parts that are no tables."""
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = []
    for name, value in values.items():
        if name not in parts:
            found.append(prefix + name)
        elif dataclasses.is_dataclass(parts[name]):
            found += _unknown(parts[name], value, f"{name}.") if isinstance(value, dict) else []
    return sorted(found)


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `values` in its place, tables merged; "" stands for None where the setting has none by default."""
    merged = dict(base)
    for name, value in values.items():
        if isinstance(base.get(name), dict) and isinstance(value, dict):
            merged[name] = _merge(base[name], value)
        else:
            merged[name] = None if value == "" and base.get(name) is None else value
    return merged


def stored_config(folder: Path) -> Config:
    """The settings of the run in a folder.

    Raises:
        UserError: for a folder without a run, a damaged config.json, or one of an earlier version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--resume: {folder} holds no run (no config.json)")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["iterations"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); need the settings that the run has written") from error
    if "method" in stored:
        raise UserError(f"{path}: was written by proxmo-jax 0.1, whose settings had no parts; train the run again")
    config = with_values(Config(), {**stored, "resume": False}, str(path))
    return dataclasses.replace(config, output=dataclasses.replace(config.output, dir=folder), resume=True)


def resumed(asked: Config) -> tuple[Config, list[str]]:
    """The run to resume, and what was asked for that it does not take.

    A larger number of iterations makes it longer: its learning rate falls as planned and then stays where it ended.
    `TAKEN_BY_RESUME` is taken.

    Raises:
        UserError: for a longer run that would learn nothing.
    """
    stored = dataclasses.replace(stored_config(asked.output.dir), hosts=asked.hosts)
    config, taken = stored, {"resume", "output.dir", "config", *TAKEN_BY_RESUME}
    if asked.iterations > stored.iterations:
        taken.add("iterations")
        need(
            stored.optimizer.final_rate > 0,
            f"--iterations {asked.iterations}: with --optimizer.final-rate 0 the run learns nothing any more",
        )
        planned = stored.optimizer.decay_iterations or stored.iterations
        optimizer = dataclasses.replace(stored.optimizer, decay_iterations=planned)
        config = dataclasses.replace(stored, iterations=asked.iterations, optimizer=optimizer)
    for part, _, name in (setting.partition(".") for setting in TAKEN_BY_RESUME):
        changed = dataclasses.replace(getattr(config, part), **{name: getattr(getattr(asked, part), name)})
        config = dataclasses.replace(config, **{part: changed})
    had, wanted = flat(stored), flat(asked)
    return config, [
        f"{option(name)} {wanted[name]} (the run has {had[name]})"
        for name in had
        if had[name] != wanted[name] and name not in taken
    ]


def of_another_run(config: Config, progress: dict) -> str:
    """What tells that a checkpoint is not of this run: the settings that it learned with and that differ, or "".

    Args:
        config: the run's settings.
        progress: what the checkpoint holds beside the arrays.
    """
    free = {*TAKEN_BY_RESUME, "output.dir", "iterations", "optimizer.decay_iterations", "resume", "config"}
    own = json.loads(json.dumps(flat(config), default=str))
    other = progress.get("settings", {})  # checkpoints of version 0.1 have none
    compared = [name for name in own if name in other and name not in free and not name.startswith("hosts.")]
    differ = [name for name in compared if own[name] != other[name]]
    return ", ".join(f"{option(name)} {other[name]} instead of {own[name]}" for name in differ)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found |= flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return found


def open_folder(config: Config) -> None:
    """Make the run's folder and write its settings. Raises UserError if another run is there."""
    folder = config.output.dir
    path = folder / "config.json"
    if path.exists() and not config.resume:
        raise UserError(f"--out: {folder} holds another run; name a new folder, or add --resume to go on with it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a new folder")
    if folder.exists() and not config.resume and any(folder.iterdir()):
        raise UserError(f"--out: {folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    values = {**dataclasses.asdict(config), "resume": False}
    del values["hosts"]  # a run may go on on others
    write_whole(path, json.dumps(values, indent=1, default=str))
