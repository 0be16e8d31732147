"""Several processes, on one machine or on many, that train one run together.

JAX's own service (`jax.distributed`) brings them together, and ends those that are left where one
is lost. The first process alone touches the run's folder, so that nothing but the data has to be
where the others are: what it reads there it tells them, and so it does with what is wrong.
"""

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np

from bmjax.config import DeviceConfig
from bmjax.errors import StorageError, UserError

T = TypeVar("T")

AUTO = "auto"
# A process that is gone is missed after so long where nothing else tells, such as a closed
# connection; JAX's own 100 s would be more than a minute.
_HEARTBEAT_SECONDS = 40
# Processes of a cluster begin minutes apart.
_WAIT_SECONDS = 300
_LAST_SECONDS = 3
# What `on_first` runs is alone with itself: the others wait for the outcome.
_inside: list[bool] = []


def wanted(config: DeviceConfig) -> bool:
    """Returns whether the settings ask for several processes."""
    return bool(config.coordinator)


def join(config: DeviceConfig) -> None:
    """Joins the other processes, where the settings ask for them and it was not done before.

    It comes before all else that JAX does.

    Raises:
        UserError: settings that don't fit each other, or an environment in which JAX finds no
            other processes.
    """
    check(config)
    if not wanted(config) or jax.distributed.is_initialized():
        return
    found = config.coordinator == AUTO
    try:
        jax.distributed.initialize(
            None if found else config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=_WAIT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    # What JAX's look at the environment raises depends on the environment.
    except (ValueError, TypeError, RuntimeError, OSError, KeyError) as error:
        raise UserError(_not_joined(config, error)) from error


def _not_joined(config: DeviceConfig, error: Exception) -> str:
    if config.coordinator == AUTO:
        return (
            f"--coordinator auto: JAX does not find the other processes ({error}). It knows TPU "
            "pod slices, SLURM, Open MPI and, with the package kubernetes, Kubernetes; elsewhere "
            "give --coordinator HOST:PORT, --num-processes and --process-id."
        )
    return (
        f"this process cannot join the others at {config.coordinator} ({error}). Give all the "
        "same --coordinator, an address and a free port of process 0, and "
        "--num-processes, and each its own --process-id."
    )


def check(config: DeviceConfig) -> None:
    """Raises UserError for settings of several processes that don't fit each other."""
    number, own = config.num_processes, config.process_id
    if not config.coordinator:
        if number is not None or own is not None:
            raise UserError(
                "--num-processes and --process-id belong to --coordinator: give the address of "
                "process 0 too, HOST:PORT."
            )
        return
    if config.coordinator != AUTO and not _is_address(config.coordinator):
        raise UserError(
            f"--coordinator is {config.coordinator!r}, but it must be HOST:PORT of process 0, with "
            "a port from 1 to 65535, or auto."
        )
    known = [value for value in (number, own) if value is not None]
    if min(known, default=0) < 0 or (number is not None and own is not None and own >= number):
        raise UserError(
            f"--process-id is {own} and --num-processes {number}: processes are numbered from 0 "
            "to one less than there are."
        )
    if config.parallel == "pmap":
        raise UserError(
            "--parallel pmap is for the devices of one process. Leave it out: jit gives the same "
            "numbers."
        )


def _is_address(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    return bool(host and colon) and port.isdecimal() and 0 < int(port) < 2**16


def several() -> bool:
    """Returns whether this is one of several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is the process that reads and writes the run's folder."""
    return not several() or jax.process_index() == 0


def share() -> tuple[int, int]:
    """Returns the number of this process, from 0, and how many there are."""
    return (jax.process_index(), jax.process_count()) if several() else (0, 1)


def on_first(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in the first process alone, and returns in all what it returned.

    Args:
        function: what it returns, pickle can carry. What it raises of a user's mistake, or of a
            disk that is full, is raised in every process.
        arguments: of the function.
    """
    if not several() or _inside:
        return function(*arguments)
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_first():
        try:
            with _alone():
                outcome = function(*arguments), None
        except (UserError, StorageError) as error:
            outcome = None, error
    told = _broadcast(pickle.dumps(outcome) if is_first() else b"")
    value, mistake = outcome if is_first() else pickle.loads(told)
    if mistake is not None:
        raise mistake
    return cast(T, value)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    _inside.append(True)
    try:
        yield
    finally:
        _inside.pop()


def _broadcast(content: bytes) -> bytes:
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content or bytes(length), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _gather(content: bytes) -> list[bytes]:
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.frombuffer(content.ljust(int(lengths.max()), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]


def largest(*numbers: int) -> tuple[int, ...]:
    """Returns the largest of each of these numbers over all processes, each below 2^31."""
    if not several():
        return numbers
    from jax.experimental import multihost_utils

    rows = multihost_utils.process_allgather(np.array(numbers, np.int32))
    return tuple(int(number) for number in rows.max(axis=0))


def check_same(what: str, values: dict[str, Any], remedy: str) -> None:
    """Raises UserError in every process where some differ in what they must have in common.

    Args:
        what: the values are, for the message.
        values: by name.
        remedy: the end of the message.
    """
    if not several():
        return
    first, *others = [pickle.loads(each) for each in _gather(pickle.dumps(values))]
    differing = [
        f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise UserError(f"the processes have other {what}: {'; '.join(differing)}. {remedy}")


def is_loss(error: BaseException) -> bool:
    """Returns whether an error of JAX says that another process, or the network to it, is gone."""
    text = str(error)
    marks = ("Gloo", "NCCL", "oordination", "UNAVAILABLE")
    # Some come as a JaxRuntimeError, some as a ValueError.
    return isinstance(error, RuntimeError | ValueError) and any(mark in text for mark in marks)


def leave(exit_code: int) -> NoReturn:
    """Ends the process, once the others have come to their end too where all went well.

    Python's own way out would wait for the others after an error, which wait for this one. The
    first is the last to leave: with it goes what holds the others together, and where all have the
    same to say, they shall have said it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(exit_code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if exit_code == 0:
        jax.distributed.shutdown()
    elif is_first():
        time.sleep(_LAST_SECONDS)
    os._exit(exit_code)
