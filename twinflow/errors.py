"""What is wrong with an argument, as "<function>: <argument> must be <wanted>, got <actual>"."""

from typing import Any


class _WrongArgument(Exception):
    """The parts of the message, for callers who know an argument by another name.

    Args:
        function: the public function that was called; "": none is named.
        argument: name of the argument.
        wanted: what it must be, after "must be".
        got: what was given instead, as it is to be read (a text that the user wrote: its repr).
        hint: what to do instead; "": nothing.
        verb: in place of "be", such as "have".
    """

    def __init__(
        self, function: str, argument: str, wanted: str, got: object, hint: str = "", verb: str = "be"
    ) -> None:
        super().__init__(function, argument, wanted, got, hint, verb)
        self.function, self.argument, self.wanted, self.got = function, argument, wanted, got
        self.hint, self.verb = hint, verb

    @property
    def without_function(self) -> str:
        """The message without the function's name."""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.argument} must {self.verb} {self.wanted}, got {self.got}{hint}"

    def __str__(self) -> str:
        return f"{self.function}: {self.without_function}" if self.function else self.without_function

    def renamed(self, function: str | None = None, argument: str | None = None, **others: Any) -> Any:
        """The same error of another function, argument, or with another part."""
        parts = {"wanted": self.wanted, "got": self.got, "hint": self.hint, "verb": self.verb, **others}
        parts["function"] = self.function if function is None else function
        parts["argument"] = self.argument if argument is None else argument
        return type(self)(**parts)


class ArgumentError(_WrongArgument, ValueError):
    """An argument of the right type with a wrong value."""


class ArgumentTypeError(_WrongArgument, TypeError):
    """An argument of a wrong type."""


def require(
    condition: object, function: str, argument: str, wanted: str, got: object, hint: str = "", verb: str = "be"
) -> None:
    """Raises ArgumentError unless the condition holds; for checks whose message costs nothing to make.

    Args:
        condition: what must hold.
        function, argument, wanted, got, hint, verb: as for `ArgumentError`.
    """
    if not condition:
        raise ArgumentError(function, argument, wanted, got, hint, verb)


def require_type(
    condition: object, function: str, argument: str, wanted: str, got: object, hint: str = "", verb: str = "be"
) -> None:
    """Raises ArgumentTypeError unless the condition holds; arguments as for `require`."""
    if not condition:
        raise ArgumentTypeError(function, argument, wanted, got, hint, verb)
