"""`rollout_start` against eager PyTorch with boolean row masks, as published, and torch.compile of the reference."""

import torch
from harness import Case, main

from twinflow_kernels import rollout_start


def plain(v_target, x_t, v_cond, v_uncond, ratio, delta):
    w, step = ratio.view(-1, 1, 1, 1), delta.view(-1, 1, 1, 1)
    v_star = torch.where(w == 0, v_target, v_target + w * (v_cond.float() - v_uncond.float()))
    return v_star, x_t - step * v_star


def masked(v_target, x_t, v_cond, v_uncond, ratio, delta):
    rows = ratio != 0
    v_star = v_target.clone()
    v_star[rows] = v_target[rows] + ratio[rows].view(-1, 1, 1, 1) * (v_cond[rows].float() - v_uncond[rows].float())
    return v_star, x_t - delta.view(-1, 1, 1, 1) * v_star


def case(shape, teacher_dtype, device):
    def make_inputs(i):
        v_target, x_t, v_cond, v_uncond = (torch.randn(shape, device=device) for _ in range(4))
        ratio, delta = torch.full((shape[0],), 0.5, device=device), torch.full((shape[0],), 0.01, device=device)
        ratio[::4] = 0  # one role of four is not enhanced
        return v_target, x_t, v_cond.to(teacher_dtype), v_uncond.to(teacher_dtype), ratio, delta

    elements, rows = torch.Size(shape).numel(), shape[0]
    enhanced = rows - -(-rows // 4)
    compiled = torch.compile(plain, dynamic=False)
    return Case(
        name=f"{shape} {str(teacher_dtype).removeprefix('torch.')} teacher",
        make_inputs=make_inputs,
        run=lambda inputs: rollout_start(*inputs),
        reference=lambda inputs: plain(*inputs),
        bytes_moved=elements * 16 + elements // rows * enhanced * 2 * teacher_dtype.itemsize,
        peers={"eager": lambda inputs: masked(*inputs), "torch.compile": lambda inputs: compiled(*inputs)},
    )


def cases(device):
    shapes = [(4, 32, 32, 32), (8, 16, 128, 128)]
    return [case(shape, dtype, device) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


if __name__ == "__main__":
    main(cases, "rollout_start")
