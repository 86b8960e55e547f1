"""The host's part of a step: rows are planned as arrays, so more rows are not more Python."""

import sys

import pytest
from helpers.batches import toy_batch
from helpers.toy import ToyNet

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss


def python_operations(run):
    """The number of bytecode instructions that a call executes, its callees' among them."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given draws"])
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_python_does_not_grow_with_the_batch(recipe, given):
    """Thirty-two times the rows: the host executes less than 1.3 times the instructions."""
    criterion, counts = TwinFlowLoss(TwinFlowConfig(recipe=recipe, enhanced_ratio=0.5)), []
    student = ToyNet()
    teacher = EMATeacher(student, 0.9)
    for batch in (4, 128):
        latents, cond, uncond = toy_batch(batch)
        draws = criterion.draw(latents) if given else None

        def step(inputs=(latents, cond, uncond), draws=draws):
            criterion(student, *inputs, teacher=teacher, draws=draws).loss.backward()

        step()  # what is made once
        counts.append(python_operations(step))
    assert counts[1] < 1.3 * counts[0], f"{counts[0]} instructions for 4 rows, {counts[1]} for 128"
