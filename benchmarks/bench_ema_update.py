"""`ema_update_` against the ways in use: the mul/add pair, `_foreach_lerp_`, diffusers' formula and torch.compile."""

import torch
from harness import Case, main

from twinflow_kernels import ema_update_
from twinflow_kernels.ema_update import ema_update_ref

DECAY = 0.99


def ours(inputs):
    targets, sources, copies = inputs
    ema_update_(targets, sources, DECAY, copies or None)
    return targets, copies


def reference(inputs):
    targets, sources, copies = inputs
    for target, source in zip(targets, sources, strict=True):
        target.copy_(ema_update_ref(target, source, DECAY))
    return targets, _copied(targets, copies)


def _copied(targets, copies):
    for target, copy in zip(targets, copies, strict=False):
        copy.copy_(target)
    return copies


def mul_add_pair(inputs):
    """The published loop; torch promotes the source tensor by tensor."""
    targets, sources, copies = inputs
    for target, source in zip(targets, sources, strict=True):
        target.mul_(DECAY).add_(source, alpha=1 - DECAY)
    return targets, _copied(targets, copies)


def difference(inputs):
    """s -= (1 - d)(s - p), the form of diffusers' EMAModel."""
    targets, sources, copies = inputs
    for target, source in zip(targets, sources, strict=True):
        target.sub_((1 - DECAY) * (target - source))
    return targets, _copied(targets, copies)


def foreach_lerp(inputs):
    """Equal dtypes only."""
    targets, sources, copies = inputs
    torch._foreach_lerp_(targets, sources, 1 - DECAY)
    if copies:
        torch._foreach_copy_(copies, targets)
    return targets, copies


@torch.compile(dynamic=False)
def compiled(inputs):
    targets, sources, copies = inputs
    for target, source in zip(targets, sources, strict=True):
        target.copy_(torch.lerp(target, source.float(), 1 - DECAY))
    return targets, _copied(targets, copies)


def case(count, shape, source_dtype, device, copy_dtype=None):
    def make_inputs(i):
        def tensors(dtype):
            return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]

        return tensors(torch.float32), tensors(source_dtype), tensors(copy_dtype) if copy_dtype else []

    peers = {"mul_/add_": mul_add_pair, "s -= (1-d)(s-p)": difference}
    if source_dtype == torch.float32:
        peers["_foreach_lerp_"] = foreach_lerp
    if count <= 64:
        peers["torch.compile"] = compiled
    elements = count * torch.Size(shape).numel()
    names = [str(d).removeprefix("torch.") for d in (source_dtype, copy_dtype) if d]
    return Case(
        name=f"{count} x {shape}, {names[0]} into float32" + (f" with {names[1]} copy" if copy_dtype else ""),
        make_inputs=make_inputs,
        run=ours,
        reference=reference,
        bytes_moved=elements * (8 + source_dtype.itemsize + (copy_dtype.itemsize if copy_dtype else 0)),
        peers=peers,
        rtol=1e-5 if copy_dtype is None else 8e-3,  # a bf16 copy may round the other way
        atol=1e-6,
    )


def cases(device):
    bf16, f32 = torch.bfloat16, torch.float32
    for count, shape in ((1, (8192, 8192)), (64, (1024, 1024)), (2000, (64, 64))):
        yield case(count, shape, f32, device)
        yield case(count, shape, bf16, device)
        yield case(count, shape, bf16, device, copy_dtype=bf16)


if __name__ == "__main__":
    main(cases, "ema_update")
