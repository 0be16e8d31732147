"""What a program is traced for, where that decides more than how a single operation is lowered."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str | None:
    """Returns the platform that the program which is being traced is for; None: for any."""
    return _platform.get()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """While it lasts, programs are traced for a platform, such as `tpu`."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def traced_for(function: Function, platform: str) -> Function:
    """Returns a function that is traced for a platform, to be compiled from outside.

    Within `tracing_for` it is traced for what that says.
    """

    @functools.wraps(function)
    def within(*arguments: object, **named: object) -> object:
        with tracing_for(_platform.get() or platform):
            return function(*arguments, **named)

    return within  # type: ignore[return-value]
