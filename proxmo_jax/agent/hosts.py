"""One run on several hosts (JAX processes): start, agreement on the CPU side, and the end.

Every host runs the same program on its share of the groups. What the hosts must agree on (errors, words, numbers of a
rollout, whether to stop) is exchanged as bytes through JAX's coordination service, which host 0 runs: that compiles
nothing, does not wait for the devices, and has no time limit, however long one host's environments take. With one host
every function here returns what it is given.
"""

import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import cloud_tpu_init, distributed  # what is used has no public name; Orbax uses it, too

from envs_bridge.errors import UserError as EnvironmentUserError
from proxmo_jax.agent.settings import HostSettings
from proxmo_jax.errors import UserError

PART = 1 << 20  # bytes of a message of the coordination service
NOTICE = 60  # seconds of waiting for a host after which it is named
SHUTDOWN = 60  # seconds that a host waits for the others at its end
ERROR = "error"  # in the place of a value: a sentence of the host that cannot go on
_numbers = itertools.count()
_sent: list[str] = []  # keys of this host that are still in the coordination service


class OtherHostError(UserError):
    """The sentence of a host that cannot go on, which ends all of them."""


def index() -> int:
    """This host's number, from 0."""
    return distributed.global_state.process_id


def count() -> int:
    """The number of hosts."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this host writes the run's files and reports."""
    return index() == 0


def start(settings: HostSettings) -> None:
    """Join the other hosts of a run; call it before JAX starts. Does nothing for a run on one host.

    Args:
        settings: the coordinator's address, or nothing on a TPU pod, under Slurm or in a Kubernetes Job, which JAX
            recognises.

    Raises:
        UserError: if this host cannot join. If another host is missing after `settings.timeout` seconds, the process
            ends with a sentence and status 2.
    """
    if jax.distributed.is_initialized() or settings.count == 1 or not (settings.coordinator or _cluster()):
        return
    where = settings.coordinator or f"the address that {_cluster()} gives"
    if settings.index == 0:
        _check_port(settings.coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _explain_abort(where)
    too_late = threading.Timer(settings.timeout, _give_up, (settings, where))  # JAX itself would abort with a C++ trace
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            settings.coordinator or None,
            settings.count or None,
            settings.index,
            initialization_timeout=settings.timeout + 60,
            heartbeat_timeout_seconds=settings.heartbeat,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--hosts: this host cannot join the others at {where} ({str(error)[:300]})") from error
    finally:
        too_late.cancel()


def _cluster() -> str:
    """What starts the processes of several hosts here and tells JAX about them; "": nothing."""
    environment = os.environ
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if "," in environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", "")):
        return "GKE"
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes"
    metadata = cloud_tpu_init.running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in environment
    return "the TPU pod" if metadata and (environment.get("JAX_PLATFORMS") or "tpu").startswith("tpu") else ""


def _check_port(address: str) -> None:
    """Refuse a port of the coordinator that another program has (UserError)."""
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--hosts.coordinator {address}: host 0 cannot listen on port {port} ({error.strerror}); need one"
                " that is free"
            ) from error


def _give_up(settings: HostSettings, where: str) -> None:
    """End the process, since a host is missing; JAX is waiting in C++, where no exception reaches it."""
    own = "this host" if settings.index is None else f"host {settings.index}"
    if settings.coordinator and settings.index and not _answers(settings.coordinator):
        found = f"no coordinator answers at {where} (host 0 runs it)"
    else:
        found = f"not all {settings.count or ''} hosts came to {where}".replace("  ", " ")
    command = "the same command"
    if settings.coordinator:
        command = "the same --hosts.coordinator and --hosts.count and its own --hosts.index"
    print(
        f"proxmo: {own} waited {settings.timeout} s (--hosts.timeout), but {found}; need every host started with"
        f" {command}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _answers(address: str) -> bool:
    """Whether something listens at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError:
        return False
    return True


def _explain_abort(where: str) -> None:
    """Say in a sentence what has happened when JAX's client aborts the process, since a host does not live any more.

    The client calls `abort` in a thread of its own. A C handler that does not return is the only way to have a word.
    """

    def handler(_: int) -> None:
        if not jax.distributed.is_initialized() or count() == 1:
            problem = f"this host cannot join the others at {where}; need one process for each --hosts.index"
        else:
            address = distributed.global_state.coordinator_address or ""
            lost = "another host" if is_first() or _answers(address) else f"the coordinator (host 0, {address})"
            problem = (
                f"host {index()} of {count()} stops, since it has lost {lost}; checkpoints stay: go on with --resume"
                " on all hosts"
            )
        print(f"proxmo: {problem}", file=sys.stderr, flush=True)
        os._exit(3)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _explain_abort.handler = kind(handler)  # type: ignore[attr-defined]  # C holds no reference to it
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, kind], ctypes.c_void_p
    set_handler(signal.SIGABRT, _explain_abort.handler)  # type: ignore[attr-defined]


def exchange(what: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every host a value and get those of all. Every host must call it at the same point of the program.

    Args:
        what: for messages.
        value: NumPy arrays and plain JSON by name.

    Returns:
        The values of all hosts, in their order.

    Raises:
        OtherHostError: the sentence of a host that cannot go on.
    """
    if count() == 1:
        return [dict(value)]
    number, keys = _post(value)
    found = []
    for host in range(count()):
        first = _wait(f"proxmo/{number}/{host}/0", host, what)
        parts = int.from_bytes(first[:4], "big")
        more = (_wait(f"proxmo/{number}/{host}/{i}", host, what) for i in range(1, parts))
        found.append(_unpack(first[4:] + b"".join(more)))
        if ERROR in found[-1]:
            raise OtherHostError(f"host {host}: {found[-1][ERROR]}")
    for key in _sent:  # all hosts have begun this exchange, so they have ended the one before
        distributed.global_state.client.key_value_delete(key)  # type: ignore[union-attr]
    _sent[:] = keys
    return found


def _post(value: Mapping[str, Any]) -> tuple[int, list[str]]:
    """This host's part of an exchange: its number, and the keys under which the value now is."""
    client, number = distributed.global_state.client, next(_numbers)
    assert client is not None
    data = _pack(value)
    parts = [data[i : i + PART] for i in range(0, len(data), PART)]
    keys = [f"proxmo/{number}/{index()}/{i}" for i in range(len(parts))]
    parts[0] = len(parts).to_bytes(4, "big") + parts[0]
    for key, part in zip(keys, parts, strict=True):
        client.key_value_set_bytes(key, part)
    return number, keys


def _wait(key: str, host: int, what: str) -> bytes:
    """A host's bytes. A host that does not live any more ends this process, too (`_explain_abort`)."""
    client = distributed.global_state.client
    assert client is not None
    for waited in itertools.count(0, NOTICE):
        if waited:
            print(f"Host {index()} has waited {waited} s for host {host}: {what}", file=sys.stderr, flush=True)
        try:
            return client.blocking_key_value_get_bytes(key, NOTICE * 1000)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("DEADLINE_EXCEEDED"):
                raise
    raise AssertionError


def _pack(value: Mapping[str, Any]) -> bytes:
    arrays = {f"array/{name}": x for name, x in value.items() if isinstance(x, np.ndarray)}
    plain = {name: x for name, x in value.items() if not isinstance(x, np.ndarray)}
    file = io.BytesIO()
    np.savez(file, json=np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpack(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name.removeprefix("array/"): found[name] for name in found.files if name != "json"}
        return {**json.loads(found["json"].tobytes()), **arrays}


def of_first(what: str, value: Any) -> Any:
    """Host 0's value, plain JSON."""
    return value if count() == 1 else exchange(what, {"value": value if is_first() else None})[0]["value"]


def any_host(flag: object) -> bool:
    """Whether a flag is true on any host: all hosts get the same answer at the same point of the program."""
    return any(value["flag"] for value in exchange("whether to stop", {"flag": bool(flag)}))


def share(number: int) -> slice:
    """This host's part of so many things: equal parts where `number` is a multiple of the hosts."""
    bounds = [number * host // count() for host in (index(), index() + 1)]
    return slice(*bounds)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Make a user's mistake on one host one on all: every host ends with its sentence, and none waits for it."""
    if count() == 1:
        yield
        return
    try:
        yield
    except OtherHostError:
        raise
    except Exception as error:
        if not isinstance(error, (UserError, EnvironmentUserError, OSError)):
            raise  # a bug: this host ends with its traceback, and the others when it does not live any more
        _post({ERROR: str(error)})
        raise OtherHostError(f"host {index()}: {error}") from error
    exchange(what, {})


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Let host 0 do something, such as writing files that the others then find, before they do it, too."""
    with together(what):
        if not is_first():
            exchange(what, {})
        try:
            yield
        finally:
            if is_first():
                exchange(what, {})


def check_same(settings: Mapping[str, Any]) -> None:
    """Refuse hosts whose settings, code or JAX differ from host 0's (UserError, the same on every host).

    Args:
        settings: by their names on the command line, except those that differ between hosts by their nature.
    """
    own = {"proxmo-jax's source, sha256": _code(), "JAX": jax.__version__, "devices": jax.local_device_count()}
    own |= {f"--{name.replace('_', '-')}": str(value) for name, value in settings.items()}
    every = [value["own"] for value in exchange("settings", {"own": own})]
    for host, other in enumerate(every):
        for name in every[0] | other:
            if other.get(name) != every[0].get(name):
                raise UserError(
                    f"host {host} has {name} {other.get(name)}, host 0 has {every[0].get(name)}; need the same on"
                    f" all {count()} hosts"
                )


def _code() -> str:
    """A digest of the package's source files."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("proxmo_jax", "envs_bridge"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def finish() -> None:
    """Leave the other hosts, when all have come to the end of the run; a host that left early would abort them."""
    if count() > 1:
        exchange("the end of the run", {})
        jax.distributed.shutdown()
