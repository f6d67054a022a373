"""`proxmo`: the command line. The only room that opens the experiments' doors."""

import dataclasses
import io
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from envs_bridge.errors import UserError as WorldUserError
from proxmo_jax.errors import UserError

USAGE = """usage: proxmo COMMAND [options]

  train             train an agent on household games
  eval RUN          success of a trained run by task type and split
  export RUN DIR    write a trained policy as a Hugging Face folder
  advantages        compute the advantages of a file of steps
  ablate estimator ROLLOUT   re-estimate a recorded batch under a grid of settings
  ablate train      train small agents under every setting of a study, from many seeds
  bench estimator   time the estimator, beside the official code if it is there
  bench env         time the household engines and the worker pool
  bench shop        time the shop engine and its search
  check-model MODEL compare our decoder with transformers on a checkpoint
  bench policy      time decoding and the train step, beside google-tunix if it is there
  bench ablation    time a grid and a study, beside one after the other
  verify-env household   play our engine and ALFWorld's own side by side
  verify-env shop   replay recorded episodes of the genuine WebShop in our engine

proxmo COMMAND --help lists the options."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one sentence on stderr and exit status 2, a bug in its traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show ends no run
    try:
        return _dispatch(arguments)
    except (UserError, WorldUserError, OSError, RuntimeError) as error:
        said, out_of_memory = str(error), str(error).startswith("RESOURCE_EXHAUSTED")  # as XLA says it
        if os.environ.get("PROXMO_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        if out_of_memory:
            said = (
                f"the device's memory does not suffice ({said[:200]}); smaller --decode-rows, --micro-batch-tokens,"
                " --groups or --chunk need less"
            )
        print(f"proxmo: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("proxmo: interrupted", file=sys.stderr)
        return 130


def _find_devices() -> None:
    """Start JAX on its devices. Raises UserError if it finds none of the platform that $JAX_PLATFORMS names."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a platform without its plugin is an assertion of JAX's
        name = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error) or "no plugin for it is installed"
        raise UserError(f"JAX_PLATFORMS={name}: JAX finds no such device ({reason}); cpu is always there") from error


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, *rest = arguments
    if command == "train":
        return _train(rest)
    if command in ("eval", "export"):
        return _with_run(command, rest)
    if command == "advantages":
        return _advantages(rest)
    if command == "check-model":
        return _check_model(rest)
    if command == "verify-env" and rest[:1] == ["household"]:
        return _verify_household(rest[1:])
    if command == "verify-env" and rest[:1] == ["shop"]:
        return _verify_shop(rest[1:])
    if command == "verify-env":
        raise UserError(f"unknown environment {' '.join(rest[:1])!r}; need household or shop")
    if command == "ablate" and rest[:1] in (["estimator"], ["train"]):
        return _ablate(*rest)
    if command == "ablate":
        raise UserError(f"unknown ablation {' '.join(rest[:1])!r}; need estimator or train")
    if command == "bench" and rest[:1] in (["estimator"], ["env"], ["shop"], ["policy"], ["ablation"]):
        return _bench(*rest)
    if command == "bench":
        raise UserError(f"unknown benchmark {' '.join(rest[:1])!r}; need estimator, env, shop, policy or ablation")
    raise UserError(
        f"unknown command {command!r}; need train, eval, export, advantages, ablate, bench, check-model or verify-env"
    )


@dataclass(frozen=True)
class AdvantagesOptions:
    """Advantages of another trainer's steps. The presets' own values hold where an option is not given."""

    source: tyro.conf.Positional[Path]
    """.npz or .jsonl with, per step: group, trajectory, step, reward, success, action_valid, texts, response_mask (may
    be left out)."""
    target: tyro.conf.Positional[Path]
    """.npz or .jsonl to write: discounted_return, episode_advantage, step_advantage, advantage, in the same order."""
    preset: str = "proxmo"
    """grpo, dr_grpo, rloo, gigpo, gigpo_similarity, proxmo, proxmo_without_modulation, proxmo_without_proximity,
    official."""
    discount: float | None = None
    invalid_penalty: float | None = None
    alpha: float | None = None
    modulation_range: float | None = None
    temperature: float | None = None
    step_weight: float | None = None
    epsilon: float | None = None
    aggregation: str | None = None
    episode_std: bool | None = None
    step_std: bool | None = None
    episode_over: str | None = None
    leave_one_out: bool | None = None
    success_rate: str | None = None
    lone_step: str | None = None
    exclude_self: bool | None = None
    kernel: str | None = None
    max_features: int | None = None
    similarity_threshold: float | None = None
    """difflib ratio from which on texts share an anchor; with gigpo_similarity 0.95 where it is not given."""


def _advantages(arguments: list[str]) -> int:
    from proxmo_jax.estimator.presets import PRESETS
    from proxmo_jax.estimator.steps_file import advantages_of_file

    options = tyro.cli(AdvantagesOptions, args=arguments, prog="proxmo advantages")
    _find_devices()
    knobs = {name: value for name, value in vars(options).items() if value is not None}
    source, target, preset = (knobs.pop(name) for name in ("source", "target", "preset"))
    threshold = knobs.pop("similarity_threshold", None)
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    count = advantages_of_file(source, target, PRESETS[preset](**knobs), similarity_threshold=threshold)
    print(f"{target}: advantages of {count} steps by {preset}")
    return 0


@dataclass(frozen=True)
class VerifyOptions:
    """Play random and expert-guided episodes in our household engine and in ALFWorld's own, and compare every turn."""

    games: Path
    """Folder with game.tw-pddl files, at any depth."""
    episodes: int = 100
    seed: int = 0
    python: str = sys.executable
    """Interpreter that has the packages alfworld and textworld."""
    stock: bool = False
    """ALFWorld's own engine as it is, without remembering its repeated work; many times slower."""


def _verify_household(arguments: list[str]) -> int:
    from envs_bridge.household.verify import lockstep, playable
    from envs_bridge.pool import Pool
    from proxmo_jax.agent.report import progress_bar, terminal

    options = tyro.cli(VerifyOptions, args=arguments, prog="proxmo verify-env household")
    files = sorted(str(path) for path in options.games.rglob("game.tw-pddl"))
    if not files:
        raise UserError(f"--games: {options.games} holds no game.tw-pddl file")
    if options.episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {options.episodes}")
    games, others = playable(files)
    if others:
        print(f"{len(others)} of {len(files)} files are not played by our engine; the first: {others[0]}")
    if not games:
        raise UserError(f"--games: {options.games} holds no game that our engine plays")
    engine = "textworld-stock" if options.stock else "textworld"
    with Pool(1, python=options.python, engine=engine, timeout=600) as pool, progress_bar(terminal()) as bar:
        task = bar.add_task("comparing", total=options.episodes, note="")
        found = lockstep(
            games,
            lambda game: pool.reset([(0, game)])[0],
            lambda command: pool.step([(0, command)])[0],
            episodes=options.episodes,
            seed=options.seed,
            on_episode=lambda done: bar.update(task, completed=done),
        )
    if found.difference is not None:
        print(found.difference)
    if found.unplayed:
        reason = f"ALFWorld's engine could not start {len(found.unplayed)} episodes; the last: {pool.fault}"
        if found.episodes == 0:
            raise UserError(reason)
        print(reason)
    print(found)
    return 0 if found.difference is None else 1


@dataclass(frozen=True)
class VerifyShopOptions:
    """Replay recorded episodes of the genuine WebShop in our engine: pages, what can be clicked, rewards and parts."""

    traces: Path
    """JSON file of episodes: a list, or an object that holds the catalogue they were recorded on."""
    catalogue: Path | None = None
    """Folder with WebShop's data files; needed for a list of episodes."""


def _verify_shop(arguments: list[str]) -> int:
    from envs_bridge.shop.verify import verify

    options = tyro.cli(VerifyShopOptions, args=arguments, prog="proxmo verify-env shop")
    found = verify(options.catalogue, options.traces)
    for difference in found.differences[:20]:
        print(difference)
    if len(found.differences) > 20:
        print(f"... and {len(found.differences) - 20} more")
    print(found)
    return 0 if not found.differences else 1


def _check_model(arguments: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from proxmo_jax.agent import check_model

    options = tyro.cli(check_model.Config, args=arguments, prog="proxmo check-model", description=check_model.__doc__)
    _find_devices()
    return 0 if check_model.main(options) else 1


def _bench(name: str, *arguments: str) -> int:
    import importlib

    bench = importlib.import_module(f"experiments.bench_{name}")
    if name == "ablation":
        from proxmo_jax.ablation.runner import use_every_core

        use_every_core()
    options = tyro.cli(bench.Config, args=arguments, prog=f"proxmo bench {name}", description=bench.__doc__)
    _find_devices()
    bench.main(options)
    return 0


def _ablate(name: str, *arguments: str) -> int:
    import importlib

    from proxmo_jax.policy.sharding import keep_freed_memory

    keep_freed_memory()
    module = importlib.import_module(
        {"estimator": "proxmo_jax.ablation.grid", "train": "proxmo_jax.ablation.runner"}[name]
    )
    if name == "train":
        module.use_every_core()
    options = tyro.cli(module.Config, args=arguments, prog=f"proxmo ablate {name}", description=module.__doc__)
    _find_devices()
    module.main(options)
    return 0


def _train(arguments: list[str]) -> int:
    from proxmo_jax.policy.sharding import keep_freed_memory

    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would note that there is no PyTorch
    from proxmo_jax.agent import settings as setup
    from proxmo_jax.agent import train

    def parse(default):
        return tyro.cli(setup.Config, args=arguments, default=default, prog="proxmo train", description=train.__doc__)

    _find_devices()
    config = parse(_defaults(arguments, setup.Config))
    if config.resume:  # the settings are the run's, and what else is asked for is named; it can be made longer
        stored = setup.stored_config(config)
        asked = parse(dataclasses.replace(stored, **_recipe(arguments, setup.Config, named=True)))
        longer = _value_of(arguments, "--iterations") is not None and asked.iterations > stored.iterations
        if others := setup.not_taken(stored, asked, longer=longer):
            print(f"--resume goes on with the run's own settings; not taken: {', '.join(others)}", flush=True)
        config = dataclasses.replace(stored, iterations=asked.iterations if longer else stored.iterations)
    train.main(config)
    return 0


def _with_run(command: str, arguments: list[str]) -> int:
    import importlib

    from proxmo_jax.policy.sharding import keep_freed_memory

    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    module = importlib.import_module(
        {"eval": "proxmo_jax.agent.evaluate", "export": "proxmo_jax.agent.export"}[command]
    )
    options = tyro.cli(module.Config, args=arguments, prog=f"proxmo {command}", description=module.__doc__)
    _find_devices()
    module.main(options)
    return 0


def _value_of(arguments: list[str], option: str) -> str | None:
    """What an option is given, `--option VALUE` or `--option=VALUE`; None without it."""
    for i, word in enumerate(arguments):
        if word == option or word.startswith(f"{option}="):
            return word.partition("=")[2] or (arguments[i + 1] if i + 1 < len(arguments) else "")
    return None


def _defaults(arguments: list[str], cls):
    """The settings, with those of a recipe in their place. Raises UserError as `_recipe` does."""
    return cls(**_recipe(arguments, cls))


def _recipe(arguments: list[str], cls, *, named: bool = False) -> dict[str, Any]:
    """What the recipe or file named by --config sets, or else (unless `named`) the recipe of --env's name, if there is
    one. Raises UserError naming the file and the fault."""
    import experiments

    recipes = Path(experiments.__file__).parent / "configs"
    name, env = (_value_of(arguments, option) for option in ("--config", "--env"))
    if name is None:
        if named or env is None or not env.isalpha() or not (recipes / f"{env}.toml").is_file():
            return {}
        name = env
    recipe = recipes / f"{name}.toml"
    try:
        values = tomllib.loads((recipe if recipe.is_file() else Path(name)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config: {name} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {name} is not TOML ({error})") from error
    if isinstance(table := values.get("chat_template_args"), dict):
        from proxmo_jax.agent.chat import settings_of

        values["chat_template_args"] = list(settings_of(table))
    kinds = get_type_hints(cls)
    unknown = sorted(key for key in values if key.replace("-", "_") not in kinds)
    if unknown:
        raise UserError(f"--config: {name} sets {', '.join(unknown)}, which is no setting of train")
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    if len(settings) < len(values):
        raise UserError(f"--config: {name} sets a setting twice, spelled with - and with _")
    for key in ("config", "resume"):
        if key in settings:
            raise UserError(f"--config: {name} sets {key}, which belongs on the command line")
    return {key: _setting(key, value, kinds[key]) for key, value in settings.items()}


def _setting(key: str, value: Any, kind: Any) -> Any:
    """A TOML value as a setting of this type holds it; TOML has no paths, no tuples, and nothing for None (but "").
    Raises UserError for a value of another type."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    optional = type(None) in get_args(kind)
    if (kind is Path or Path in get_args(kind)) and isinstance(value, str) and (value or optional):
        return Path(value) if value else None
    named = {bool: "true or false", int: "int", float: "a finite float", str: "a string"}
    needed = {**named, tuple[str, ...]: "a list of strings"}.get(kind, "a string (a path)")
    raise UserError(f"--config: {key} must be {needed}, got {value!r}")
