"""`ArgumentError`: the one format of messages about arguments, and its parts."""

import pickle

import pytest

from twinflow.errors import ArgumentError, ArgumentTypeError, require, require_type


@pytest.mark.parametrize(("kind", "base"), [(ArgumentError, ValueError), (ArgumentTypeError, TypeError)])
def test_message_and_parts(kind, base):
    error = kind("load", "family", "one of a, b", repr("c"), "name it")
    assert isinstance(error, base) and str(error) == "load: family must be one of a, b, got 'c'; name it"
    assert (error.argument, error.wanted, error.without_function) == (
        "family", "one of a, b", "family must be one of a, b, got 'c'; name it",
    )  # fmt: skip


def test_no_function_no_hint_another_verb():
    assert str(ArgumentError("", "folder", "weights", None, verb="hold")) == "folder must hold weights, got None"


def test_renamed_keeps_kind_and_the_other_parts():
    error = ArgumentTypeError("train", "student", "a module", 3, "wrap it").renamed("sample", "model")
    assert type(error) is ArgumentTypeError and str(error) == "sample: model must be a module, got 3; wrap it"
    assert error.renamed(hint="").hint == ""


def test_an_error_survives_another_process():
    error = pickle.loads(pickle.dumps(ArgumentError("f", "x", "> 0", -1, "try 1", "be")))
    assert str(error) == "f: x must be > 0, got -1; try 1" and error.got == -1


def test_require():
    require([0], "f", "x", "filled", [])
    require_type(1, "f", "x", "filled", [])
    with pytest.raises(ArgumentError, match=r"^f: x must be filled, got \[\]$"):
        require([], "f", "x", "filled", [])
    with pytest.raises(ArgumentTypeError, match=r"^f: x must have y, got 2$"):
        require_type(False, "f", "x", "y", 2, verb="have")
