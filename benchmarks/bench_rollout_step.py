"""`rollout_step_` against the eager step and torch.compile of it."""

import torch
from harness import Case, main

from twinflow_kernels import rollout_step_
from twinflow_kernels.rollout_step import rollout_step_ref


def eager(inputs):
    x, v_pred, dt = inputs
    return x.sub_(dt.view(-1, 1, 1, 1) * v_pred)


def case(shape, v_dtype, device):
    def make_inputs(i):
        x, v_pred = (torch.randn(shape, device=device) for _ in range(2))
        return x, v_pred.to(v_dtype), torch.rand(shape[0], device=device)

    elements = torch.Size(shape).numel()
    return Case(
        name=f"{shape} {str(v_dtype).removeprefix('torch.')} velocity",
        make_inputs=make_inputs,
        run=lambda inputs: rollout_step_(*inputs),
        reference=lambda inputs: rollout_step_ref(*inputs),
        bytes_moved=elements * (8 + v_dtype.itemsize),
        peers={"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)},
    )


def cases(device):
    shapes = [(1, 16, 128, 128), (8, 16, 128, 128), (24, 16, 128, 128)]
    return [case(shape, dtype, device) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


if __name__ == "__main__":
    main(cases, "rollout_step")
