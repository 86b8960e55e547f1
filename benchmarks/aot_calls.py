"""Calls of every operation that has Triton kernels, in the dtypes and shapes to compile ahead of time.

A kernel that no call here reaches fails test_aot.py. Two sizes each: a multiple of 16 with the largest block, and an
odd one.
"""

import itertools

import torch

from twinflow_kernels import dual_time_embedding, ema_update_, rollout_start, rollout_step_, velocity_loss

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = (4096, 65)


def rollout_step():
    for size, state, velocity in itertools.product(SIZES, (F32, F64), (F32, BF16, F16, F64)):
        rollout_step_(torch.ones(2, size, dtype=state), torch.ones(2, size, dtype=velocity), torch.ones(2))


def start():
    for size, (target, x, cond) in itertools.product(
        SIZES, [(F32, F32, F32), (F32, BF16, BF16), (F32, F16, F16), (F32, BF16, None), (F64, F64, F64)]
    ):
        v_target, x_t = torch.ones(2, size, dtype=target), torch.ones(2, size, dtype=x)
        v = None if cond is None else torch.ones(2, size, dtype=cond)
        rollout_start(v_target, x_t, v, v, torch.ones(2), torch.ones(2))


def time_embedding():
    rows = [
        # width, times, embeddings, has r, sign table
        (3072, F32, F32, True, F32), (3072, F32, BF16, True, F32), (3072, F32, BF16, True, None),
        (3072, F32, BF16, False, BF16), (3072, F64, F64, True, F64), (65, F32, F16, True, F16),
        (65, F64, BF16, True, None),
    ]  # fmt: skip
    for width, time, dtype, has_r, table in rows:

        def embed(features, width=width, dtype=dtype):
            return torch.ones(features.shape[0], width, dtype=dtype, requires_grad=True)

        t, r = torch.ones(3, dtype=time), torch.zeros(3, dtype=time)
        signs = None if table is None else torch.ones(2, width, dtype=table, requires_grad=True)
        channels = 256 if width == 3072 else 33
        out = dual_time_embedding(t, r, signs, embed, embed if has_r else None, num_channels=channels, scale=1000.0)
        out.sum().backward()


def loss():
    dtypes = [
        (F32, F32, F32), (BF16, F32, F32), (F16, F32, F32), (BF16, F32, None), (BF16, None, None), (F64, F64, F64),
    ]  # fmt: skip
    for size, (pred, target, path) in itertools.product((*SIZES, 1 << 21), dtypes):
        v_pred = torch.ones(2, size, dtype=pred, requires_grad=True)
        v_target = None if target is None else torch.ones(2, size, dtype=target)
        x = None if path is None else torch.ones(2, size, dtype=path)
        for alpha in (1.0, 2.0):
            velocity_loss(v_pred, v_target, x, x, torch.ones(2, 4), alpha=alpha).sum().backward()
    with torch.no_grad():
        velocity_loss(v_pred, v_target, x, x, torch.ones(2, 4), loss="l2")


def ema():
    device_decay = torch.tensor(0.9)
    usual = [(F32, F32, None), (F32, BF16, BF16)]  # target, source, copy
    rare = [
        (F32, BF16, None), (F32, F16, None), (F32, F32, F16), (BF16, BF16, None), (BF16, F32, F32), (F16, F16, None),
        (F64, F64, F32), (F64, F32, BF16), (F16, F64, F64),
    ]  # fmt: skip
    rows = [
        *itertools.product(usual, (16384, 65), (0, 1), (0.9,)),
        *itertools.product(usual, (16384,), (0, 1), (device_decay,)),
    ]
    for (target, source, copy), size, offset, decay in [*rows, *itertools.product(rare, (16384,), (0, 1), (0.9,))]:
        targets, sources = [torch.ones(size + 1, dtype=target)], [torch.ones(size + 1, dtype=source)]
        copies = None if copy is None else [torch.ones(size, dtype=copy)]
        ema_update_([x[offset:][:size] for x in targets], [x[offset:][:size] for x in sources], decay, copies)


CALLS = [rollout_step, start, time_embedding, loss, ema]
