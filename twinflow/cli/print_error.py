"""`print_error()`: what went wrong, in a line on standard error."""

import re
import sys

from twinflow.cli.packages import pip_install

_FUNCTION = re.compile(r"^[A-Za-z_]+: (?=.* must )")


def print_error(command: str, error: object) -> None:
    """Prints an error, without the name of the function that found it or the number of an error of the system.

    Args:
        command: which was given; "": none.
        error: the error, or its message.
    """
    said = _FUNCTION.sub("", " ".join(_message(error).split()).removeprefix(f"{command}: "))
    print(f"{f'twinflow {command}'.strip()}: {said}", file=sys.stderr)


def _message(error: object) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} must be installed ({pip_install(error.name or '')})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "OutOfMemoryError":
        return f"no memory left: {str(error).split('. ')[0]}"  # torch goes on for a paragraph
    return str(error) or type(error).__name__
