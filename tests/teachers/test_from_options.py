"""Which teacher the options ask for: all eight rows of the rules, and students that have nothing to average."""

from itertools import product

import pytest
import torch
from helpers.batches import COND, DIM, toy_batch
from helpers.toy import ToyNet

from twinflow import EMATeacher, StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.teachers.teachers import teacher_from_options

NO_EMA = (
    "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
    "weights explicitly."
)
UNAVAILABLE = "EMA teacher weights are required but unavailable; enable use_ema or allow fallback."
UNTRAINED = "EMA teacher unavailable because no trainable component was found."

# use_ema, require_ema, allow_no_ema_teacher -> the teacher of a module, and of a callable that is none
RULES = {
    (False, False, False): (StudentTeacher, StudentTeacher),
    (False, False, True): (StudentTeacher, StudentTeacher),
    (False, True, False): (NO_EMA, NO_EMA),
    (False, True, True): (StudentTeacher, StudentTeacher),
    (True, False, False): (EMATeacher, StudentTeacher),
    (True, False, True): (EMATeacher, StudentTeacher),
    (True, True, False): (EMATeacher, UNAVAILABLE),
    (True, True, True): (EMATeacher, StudentTeacher),
}


def rest(require, allow):
    flags = {"twinflow_require_ema": require, "twinflow_allow_no_ema_teacher": allow}
    return TwinFlowConfig.from_flags(flags)[1]


def choose(student, use_ema, require, allow):
    """The kind of teacher, or the message of the refusal."""
    try:
        return type(teacher_from_options(student, rest(require, allow), use_ema=use_ema))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("rule", list(product([False, True], repeat=3)))
def test_the_eight_rules(rule):
    net = ToyNet(DIM, COND)
    of_module, of_callable = RULES[rule]
    assert choose(net, *rule) == of_module
    assert choose(lambda *given: net(*given), *rule) == of_callable


@pytest.mark.parametrize(("require", "allow"), list(product([False, True], repeat=2)))
def test_an_ema_of_nothing_is_refused_whatever_may_replace_it(require, allow):
    frozen = ToyNet(DIM, COND).requires_grad_(False)
    assert choose(frozen, True, require, allow) == UNTRAINED


def test_defaults_require_an_ema():
    net, (_, defaults) = ToyNet(DIM, COND), TwinFlowConfig.from_flags({})
    assert isinstance(teacher_from_options(net, defaults, use_ema=True), EMATeacher)
    with pytest.raises(ValueError, match="TwinFlow requires an EMA teacher"):
        teacher_from_options(net, {}, use_ema=False)


def test_options_are_read_as_config_files_give_them():
    """Text is no truth value: "false" forbids, and an empty text is the default."""
    net = ToyNet(DIM, COND)
    with pytest.raises(ValueError, match="TwinFlow requires an EMA teacher"):
        teacher_from_options(net, {"twinflow_allow_no_ema_teacher": "false"}, use_ema=False)
    with pytest.raises(ValueError, match="TwinFlow requires an EMA teacher"):
        teacher_from_options(net, {"twinflow_require_ema": ""}, use_ema=False)
    with pytest.raises(ValueError, match="known options, got 'twinflow_require_emma'"):
        teacher_from_options(net, {"twinflow_require_emma": False}, use_ema=False)
    with pytest.raises(TypeError, match="use_ema must be True or False, got 'false'"):
        teacher_from_options(net, {}, use_ema="false")


def test_the_teacher_follows_the_student_at_the_given_decay():
    net = ToyNet(DIM, COND)
    teacher = teacher_from_options(net, {}, use_ema=True, decay=0.5)
    assert teacher.decay == 0.5
    assert teacher_from_options(net, {}, use_ema=True).decay == 0.99
    TwinFlowLoss()(net, *toy_batch(4), teacher=teacher)
    assert teacher.updates == 1
    with pytest.raises(ValueError, match="use StudentTeacher"):
        teacher_from_options(net, {}, use_ema=True, decay=0)


def test_a_compiled_student_is_the_module_inside():
    net = ToyNet(DIM, COND)
    teacher = teacher_from_options(torch.compile(net, backend="eager"), {}, use_ema=True)
    assert isinstance(teacher, EMATeacher)
    teacher.check(net)
