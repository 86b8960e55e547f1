"""`dmd2_step()`, `sana_sprint_step()`: what peers run; `Heads`: the latter's discriminator."""

import torch
import torch.nn.functional as F
from torch import nn

from twinflow.memory.planner.peers.networks import PeerRun
from twinflow.memory.planner.simulation.meta_student import META

HEADS = 4  # of SANA-Sprint's discriminator


def _guided(run: PeerRun, name: str, x_t: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance, both conditions in one call."""
    both = {key: torch.cat([run.uncond[key], cond]) for key, cond in run.cond.items()}
    plain, told = run.call(name, torch.cat([x_t, x_t]), torch.cat([times, times]), both).chunk(2)
    return plain + 4.5 * (told - plain)


def dmd2_step(run: PeerRun) -> None:
    """DMD2: an update of the generator by distribution matching, then one of the fake score.

    Networks: `generator` and `fake score`, trained, and `real score`, frozen. The generator's graph is held while both
    scores answer. The GAN loss on a small head of the fake score, and its pass over real images, are left out.

    Source: DMD2 (arXiv 2405.14867).
    """
    t = run.times
    sample = run.noise - run.call("generator", run.noise, torch.ones_like(t), run.cond)
    with torch.no_grad():
        x_t = t * torch.empty_like(sample) + (1 - t) * sample
        real = x_t - t * _guided(run, "real score", x_t, t)
        fake = x_t - t * run.call("fake score", x_t, t, run.cond)
        target = sample - (fake - real) / (sample - real).abs().mean((1, 2, 3), keepdim=True)
        del x_t, real, fake
    loss = 0.5 * F.mse_loss(sample, target)
    sample = sample.detach()
    run.backward(loss)
    del loss, target
    run.forget("generator")
    noise = torch.empty_like(sample)
    x_t = t * noise + (1 - t) * sample
    loss = F.mse_loss(run.call("fake score", x_t, t, run.cond), noise - sample)
    run.backward(loss)


def sana_sprint_step(run: PeerRun) -> None:
    """SANA-Sprint: the student's update by sCM and LADD, then the discriminator's.

    Networks: `student`, trained, and `teacher`, a frozen copy that also makes the discriminator's features. As in the
    published configuration the adversarial loss is on a second sample at the largest time, with a graph of its own, and
    the discriminator sees rolled images beside the generated ones. All heads read the last block, the published ones
    four blocks; the change of variables to TrigFlow, embedded guidance and the learned loss weight, all small, are left
    out. Guidance weights and times change no byte.

    Source: SANA-Sprint (arXiv 2503.09641).
    """
    t, sine, cosine = run.times, run.times.sin(), run.times.cos()
    x_t = cosine * run.latents + sine * run.noise
    with torch.no_grad():
        field = _guided(run, "teacher", x_t, t)
        derivative = run.tangent("student", x_t, t, run.cond, (cosine * sine * field, cosine * sine))
    predicted = run.call("student", x_t, t, run.cond)
    with torch.no_grad():
        g = -cosine * cosine * (predicted - field) - (cosine * sine * x_t + derivative)
        target = predicted + g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + 0.1)
        del g, field, derivative
    consistency = ((predicted - target).square() / run.times.tan()).mean()
    del predicted, target
    x_t = cosine * run.latents + sine * torch.empty_like(run.noise)
    sample = cosine * x_t - sine * run.call("student", x_t, t, run.cond)
    noised = cosine * sample + sine * torch.empty_like(sample)
    adversarial = -run.judge(run.features("teacher", noised, t, run.cond)).mean()
    del x_t, sample, noised
    loss = consistency + 0.5 * adversarial
    del consistency, adversarial
    run.backward(loss)
    del loss
    run.forget("student")
    run.forget("heads")
    _discriminator_update(run)


def _discriminator_update(run: PeerRun) -> None:
    t, sine, cosine = run.times, run.times.sin(), run.times.cos()
    with torch.no_grad():
        x_t = cosine * run.latents + sine * run.noise
        sample = cosine * x_t - sine * run.call("student", x_t, t, run.cond)
        sample = cosine * sample + sine * torch.empty_like(sample)
        real = cosine * run.latents + sine * torch.empty_like(run.noise)
        wrong, times, cond = sample, t, run.cond
        if run.workload.batch > 1:
            wrong, times = torch.cat([sample, real.roll(1, 0)]), torch.cat([t, t])
            cond = {key: torch.cat([value, value]) for key, value in cond.items()}
        features = [run.features("teacher", wrong, times, cond), run.features("teacher", real, t, run.cond)]
    generated, true = map(run.judge, features)
    run.backward(0.5 * ((1 - true).relu().mean() + (1 + generated).relu().mean()))


class Heads(nn.Module):
    """The discriminator's heads on a teacher's features, with spectrally normalised convolutions.

    Source: SANA-Sprint (arXiv 2503.09641), whose heads are those of StyleGAN-T (arXiv 2301.09515).
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(_Layer(width, 1, dtype), _Residual(_Layer(width, 9, dtype)), _convolution(width, 1, 1, dtype))
            for _ in range(HEADS)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """A logit per head and token, (B, HEADS * N), of features (B, N, C)."""
        channels_first = features.transpose(1, 2)
        return torch.cat([head(channels_first).flatten(1) for head in self.heads], dim=1)


class _Layer(nn.Sequential):
    def __init__(self, width: int, kernel: int, dtype: torch.dtype) -> None:
        normalised = _BatchNorm(width, dtype)
        super().__init__(_convolution(width, width, kernel, dtype), normalised, nn.LeakyReLU(0.2, inplace=True))


class _Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + x) * 2**-0.5


class _BatchNorm(nn.Module):
    """Normalises channels over rows and tokens; the published one by eight rows apart, which takes as much memory."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, device=META, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, 1, device=META, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(spread + 1e-5) * self.weight + self.bias


def _convolution(width: int, outputs: int, kernel: int, dtype: torch.dtype) -> nn.Module:
    where = dict(device=META, dtype=dtype)
    layer = nn.Conv1d(width, outputs, kernel, padding=kernel // 2, padding_mode="circular", **where)  # type: ignore[arg-type]
    return nn.utils.parametrizations.spectral_norm(layer)
