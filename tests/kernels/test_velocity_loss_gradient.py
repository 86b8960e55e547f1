"""`velocity_loss` and autograd: what is saved, handed out, traced and refused."""

import gc
import math
import weakref

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils.checkpoint
from helpers.velocity_loss_cases import BACKENDS, INF, both, check, inputs, plain_loss

from twinflow_kernels import _backend, velocity_loss

FORWARD, BACKWARD = torch.ops.twinflow.velocity_loss, torch.ops.twinflow.velocity_loss_backward


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradcheck(backend, device):
    """With a = 1, b = 0, l2 and no clamp the gradient is the derivative."""
    arguments = inputs((3, 5), (torch.float64,) * 4, device, rows=[[1, 0, INF, w] for w in (1, 0.3, 0)])
    with _backend.override(backend):
        assert torch.autograd.gradcheck(lambda v: velocity_loss(v, *arguments[1:], loss="l2"), arguments[:1])


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 1 / 6, 65536.0])
def test_upstream_gradients(backend, device, v_dtype, upstream):
    """65536: a gradient scaler must reach float16 before the rounding does."""
    check(inputs((6, 3000), (v_dtype, *(torch.float32,) * 3), device), backend, torch.full((6,), upstream))
    arguments = inputs((6, 3000), (v_dtype, *(torch.float32,) * 3), device)
    check(arguments, backend, torch.tensor(upstream, device=device).expand(6))
    check(arguments, backend, torch.tensor([1, 2, 0, -1, 1, 3.0], device=device).repeat_interleave(2)[::2])


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_retained_graph_gives_the_same_gradient_again(backend, device, reduce):
    """Accumulation adds in place to .grad, which must not be the memory that the graph reads again."""
    arguments = inputs((6, 500), device=device)
    v_pred = arguments[0]
    with _backend.override(backend):
        loss = reduce(velocity_loss(*arguments))
        (once,) = torch.autograd.grad(loss, v_pred, retain_graph=True)
        kept = once.clone()
        for _ in range(3):
            loss.backward(retain_graph=True)
        v_pred.grad.mul_(1.0)
        assert torch.equal(v_pred.grad, kept + kept + kept)
        v_pred.grad.zero_()
        loss.backward()
    assert torch.equal(v_pred.grad, kept) and torch.equal(once, kept)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradients_accumulate_over_micro_batches(backend, device):
    arguments = inputs((6, 500), device=device)
    weight = torch.ones(500, device=device, requires_grad=True)

    def loss_of(i):
        v_pred = arguments[0].detach()[i] * weight
        return velocity_loss(v_pred, *(x[i] for x in arguments[1:]))

    with _backend.override(backend):
        (expected,) = torch.autograd.grad(sum(loss_of(slice(i, i + 2)).sum() for i in (0, 2, 4)), weight)
        for i in (0, 2, 4):
            loss_of(slice(i, i + 2)).sum().backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_prediction_used_twice(backend, device):
    """Autograd sums both gradients, in place where it may."""
    v_pred, *rest = inputs((6, 500), device=device)
    with _backend.override(backend):
        alone = [both(velocity_loss, [v_pred, *rest], torch.full((6,), factor))[1] for factor in (1.0, 2.0)]
        (velocity_loss(v_pred, *rest).sum() + (2 * velocity_loss(v_pred, *rest)).sum()).backward()
    assert torch.equal(v_pred.grad, alone[0] + alone[1])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_what_is_saved(backend, device):
    """One float32 tensor of v_pred's shape when it requires grad, nothing otherwise, nothing after the backward."""
    arguments = inputs((6, 500), device=device)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with _backend.override(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        velocity_loss(*arguments)
        assert sorted(saved) == [6, 3000]
        velocity_loss(arguments[0].detach(), *arguments[1:])
        with torch.no_grad():
            assert not velocity_loss(*arguments).requires_grad
        assert len(saved) == 2
        assert FORWARD(*arguments, 1.0, 1e-3, False)[2].shape == (0,)
    with _backend.override(backend):
        losses = velocity_loss(*arguments)
        losses.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            losses.sum().backward()
        gradient, arguments[0].grad = weakref.ref(arguments[0].grad), None
        gc.collect()
        assert gradient() is None


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_saved_tensors_may_be_moved(backend, device):
    arguments = inputs((6, 500), device=device)
    with _backend.override(backend):
        expected = both(velocity_loss, arguments)
        with torch.autograd.graph.save_on_cpu():
            actual = both(velocity_loss, arguments)
        checkpointed = both(
            lambda *a: torch.utils.checkpoint.checkpoint(velocity_loss, *a, use_reentrant=False), arguments
        )
    for wanted, moved, recomputed in zip(expected, actual, checkpointed, strict=True):
        assert torch.equal(wanted, moved) and torch.equal(wanted, recomputed)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_second_derivative(backend, device):
    arguments = inputs((2, 8), device=device)
    with _backend.override(backend):
        (dv,) = torch.autograd.grad(velocity_loss(*arguments).sum(), arguments[0], create_graph=True)
        torch.testing.assert_close(dv.detach(), both(velocity_loss, arguments)[1])
        with pytest.raises(RuntimeError, match="velocity_loss: has no second derivative"):
            dv.square().sum().backward()
        loss = velocity_loss(*arguments).sum()
        (dv,) = torch.autograd.grad(loss, arguments[0], create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="velocity_loss: has no second derivative"):
            dv.sum().backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, device, v_dtype):
    arguments = inputs((6, 65), (v_dtype, *(torch.float32,) * 3), device)
    with _backend.override(backend):
        torch.library.opcheck(FORWARD, (*arguments, 1.0, 1e-3, True))
        torch.library.opcheck(FORWARD, (arguments[0].detach(), None, None, None, arguments[4], 2.0, 1.0, False))
        factor, residual = FORWARD(*arguments, 1.0, 1e-3, True)[1:]
        torch.library.opcheck(BACKWARD, (torch.rand(6, device=device), factor, residual, v_dtype))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_compile(backend, device, v_dtype):
    """Loss and backward in one compiled function without a graph break, of the same bits."""
    arguments = inputs((6, 65), (v_dtype, *(torch.float32,) * 3), device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def losses_of(v_pred, *rest):
        return velocity_loss(v_pred * 2, *rest).square()

    with _backend.override(backend):
        expected = both(lambda v_pred, *rest: velocity_loss(v_pred * 2, *rest).square(), arguments)
        actual = both(losses_of, arguments)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_traced_gradient_serves_other_inputs(backend, device):
    """Tracing with real tensors sees the backward as an operation, never as memory handed out behind its back."""
    first, second = inputs((6, 65), device=device), inputs((6, 65), device=device)

    def gradient(v_pred):
        return torch.autograd.grad(velocity_loss(v_pred, *second[1:]).mean(), v_pred)[0]

    with _backend.override(backend):
        traced = torch.fx.experimental.proxy_tensor.make_fx(gradient)(first[0])
        assert torch.equal(traced(second[0]), gradient(second[0]))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    arguments = inputs((6, 65), device=device)
    with _backend.override(backend):
        expected = both(velocity_loss, arguments)
        with torch.autocast(device, torch.bfloat16):
            losses = velocity_loss(*arguments)
    assert torch.equal(losses, expected[0])
    assert torch.equal(torch.autograd.grad(losses.sum(), arguments[0])[0], expected[1])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradient_has_factor_one_whatever_scale_pred_is(backend, device):
    """Property: rows whose residuals agree have equal gradients, though a differs (the target is sg(F - R))."""
    v_pred = torch.randn(1, 50, device=device).expand(3, 50).clone().requires_grad_()
    rows = torch.tensor([[a, 0, INF, 1] for a in (1.0, 4.0, 0.0)], device=device)
    v_target = (rows[:, :1] * v_pred - v_pred).detach()  # R = v_pred in every row
    with _backend.override(backend):
        losses, dv = both(velocity_loss, [v_pred, v_target, None, None, rows], loss="l2")
    torch.testing.assert_close(losses, losses[:1].expand(3))
    torch.testing.assert_close(dv, (2 / 50 * v_pred).detach())


def test_every_backend_splits_the_gradient_its_own_way():
    """factor * residual is the gradient at grad_loss = 1, so any backend's backward serves any forward's result."""
    arguments = inputs((6, 500))
    _, exact = both(plain_loss, [x.detach().double().requires_grad_(i == 0) for i, x in enumerate(arguments)])
    for backend, _ in (choice.values[:2] for choice in BACKENDS):
        with _backend.override(backend):
            _, factor, residual = FORWARD(*arguments, 1.0, 1e-3, True)
        torch.testing.assert_close((factor[:, None] * residual).double(), exact, rtol=1e-4, atol=1e-8)


def test_launch_config_covers_the_row():
    from twinflow_kernels.velocity_loss import launch_config

    for row_size in (1, 127, 128, 5000, 1 << 20):
        block, num_warps = launch_config(row_size)
        assert block & (block - 1) == 0 and 128 <= block <= 1024 and num_warps == 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"v_pred": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "v_pred must be float32"),
        ({"v_pred": [1.0]}, TypeError, "v_pred must be a tensor, got list"),
        ({"v_pred": torch.tensor(1.0)}, ValueError, r"v_pred must be of shape \(B, ...\)"),
        ({"v_pred": torch.ones(3, 0)}, ValueError, r"v_pred must be of shape \(B, ...\), rows not empty"),
        ({"v_target": torch.ones(3, 5)}, ValueError, r"v_target must be of v_pred's shape \(3, 4\), got \(3, 5\)"),
        ({"v_target": torch.ones(3, 4, dtype=torch.complex64)}, TypeError, "v_target must be float32"),
        ({"x_end": None}, ValueError, "x_start and x_end must be both given or both None, got one of them"),
        ({"x_start": torch.ones(3, 4, device="meta")}, ValueError, "x_start must be on v_pred's device cpu, got meta"),
        ({"rows": torch.ones(3, 3)}, ValueError, r"rows must be of shape \(B, 4\), .*, got \(3, 3\)"),
        ({"rows": torch.ones(3, 4, dtype=torch.bfloat16)}, TypeError, "rows must be float32, float64, got bfloat16"),
        ({"v_target": torch.ones(3, 4, requires_grad=True)}, ValueError, "v_target must be .* the target is a const"),
        ({"x_end": torch.ones(3, 4, requires_grad=True)}, ValueError, "x_end must be a tensor without requires_grad"),
        ({"rows": torch.ones(3, 4, requires_grad=True)}, ValueError, "rows must be a tensor without requires_grad"),
        ({"loss": "huber"}, ValueError, "loss must be barron or l2, got 'huber'"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"c": 0.0}, ValueError, "c must be positive and finite, got 0.0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(("v_pred", "v_target", "x_start", "x_end", "rows"), inputs((3, 4)), strict=True)) | change
    with pytest.raises(error, match="velocity_loss: " + message):
        velocity_loss(**arguments)
