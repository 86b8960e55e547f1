"""`complain()`: what went wrong, in a line on standard error."""

import sys

from twinflow.commands.packages import pip_install


def complain(command: str, error: object) -> None:
    """Prints an error without the name of the function that found it, and of errors of the system without its number.

    Args:
        command: which was given; "": none.
        error: the error, or its message.
    """
    said = " ".join(_message(error).split())
    print(f"{f'twinflow {command}'.strip()}: {said.removeprefix(f'{command}: ')}", file=sys.stderr)


def _message(error: object) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} must be installed ({pip_install(error.name or '')})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
