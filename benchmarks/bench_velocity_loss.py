"""`velocity_loss` and its backward, against the same in eager PyTorch with autograd and torch.compile of that.

Upstream: `mean` takes the mean over the batch, so 1 / B arrives per row; `sum` has 1 / B in the rows' weights, as the
training loss does, so 1 arrives.
"""

import torch
from harness import Case, main

from twinflow_kernels import velocity_loss

INF = float("inf")
ROWS = ((50, 100, 1, 1.2), (1, 0, 1, 0.7), (1, 0, INF, 1), (20, 100, 1, 1.5))  # rollout, empty rollout, fake, rollout


def plain(v_pred, v_target, x_start, x_end, rows, upstream):
    """Equations 13 to 18 of docs/method.md: detached target sg(F - R), mean square, Barron weight, mean or sum."""
    a, b, clamp, weight = (column.view(-1, 1, 1, 1) for column in rows.unbind(1))
    velocity = v_pred.float()
    with torch.no_grad():
        residual = a * velocity - b * (x_start - x_end) - v_target
        target = velocity - torch.clamp(residual, -clamp, clamp)
    mse = (velocity - target).square().mean((1, 2, 3))
    barron = ((mse / (1e-3**2 + 1e-8) + 1) ** -0.5).detach()
    losses = weight.view(-1) * mse * barron / 1e-3
    return losses.mean() if upstream == "mean" else losses.sum()


def fused(v_pred, v_target, x_start, x_end, rows, upstream):
    losses = velocity_loss(v_pred, v_target, x_start, x_end, rows)
    return losses.mean() if upstream == "mean" else losses.sum()


def with_backward(loss_of, upstream):
    def run(inputs):
        loss = loss_of(*inputs, upstream)
        return loss.detach(), *torch.autograd.grad(loss, inputs[:1])

    return run


def case(shape, v_dtype, upstream, device):
    def make_inputs(i):
        v_pred, v_target, x_start, x_end = (torch.randn(shape, device=device) for _ in range(4))
        rows = torch.tensor(ROWS, device=device).repeat(-(-shape[0] // 4), 1)[: shape[0]]
        if upstream == "sum":
            rows[:, 3] /= shape[0]
        return v_pred.to(v_dtype).requires_grad_(), v_target, x_start, x_start + 0.01 * x_end, rows

    compiled = torch.compile(plain, dynamic=False)
    return Case(
        name=f"{shape} {str(v_dtype).removeprefix('torch.')} v_pred, {upstream}",
        make_inputs=make_inputs,
        run=with_backward(fused, upstream),
        reference=with_backward(plain, upstream),
        bytes_moved=torch.Size(shape).numel() * (12 + 2 * v_dtype.itemsize),
        peers={"eager": with_backward(plain, upstream), "torch.compile": with_backward(compiled, upstream)},
        rtol=1e-2 if v_dtype == torch.bfloat16 else 1e-4,
        atol=1e-9,  # a gradient is about 1 / row size / B
    )


def cases(device):
    shapes = [(4, 32, 32, 32), (8, 16, 128, 128)]
    return [case(shape, dtype, upstream, device) for shape in shapes
            for dtype in (torch.float32, torch.bfloat16) for upstream in ("mean", "sum")]  # fmt: skip


if __name__ == "__main__":
    main(cases, "velocity_loss")
