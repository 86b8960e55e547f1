"""The objective restated row by row in plain Python from the method's equations: an oracle that shares no code with it.

Every row is a network call of its own, every target is built explicitly as sg(F - R), and autograd differentiates.
"""

import math

import torch
from torch.func import functional_call


class PlainTeacher:
    """F- and its update: kappa 0 is the student, 1 the frozen first weights (guidance only), between them an EMA."""

    def __init__(self, student, kappa):
        self.student, self.kappa, self.decay = student, kappa, 0.0
        self.weights = {name: p.detach().clone() for name, p in student.named_parameters()}

    def update(self):
        if 0 < self.kappa < 1:
            for name, p in self.student.named_parameters():
                self.weights[name] = self.decay * self.weights[name] + (1 - self.decay) * p.detach()
            self.decay += (1 - self.decay) * (self.kappa - self.decay) / 2

    @torch.no_grad()
    def __call__(self, x, t, r, c, query):
        if self.kappa == 0 or (self.kappa == 1 and query == "rollout"):
            return run(self.student, x, t, r, c)
        return run(lambda *a: functional_call(self.student, self.weights, a), x, t, r, c)


def run(net, x, t, r, c):
    """F of one row: x (D,), times as numbers."""
    time = torch.tensor([t], dtype=x.dtype), torch.tensor([r], dtype=x.dtype)
    return net(x[None], *time, None if c is None else c[None])[0]


def clamp(residual, config):
    bound = config.target_clamp
    return residual if bound is None else torch.clamp(residual, -bound, bound)


def row_loss(f, residual, config, loss):
    """Per-row loss of regressing F onto sg(F - R), equations 17 and 18."""
    target = (f - residual).detach()
    mse = ((f - target) ** 2).mean()
    if loss == "l2":
        return mse
    alpha, c = config.barron_alpha, config.barron_c
    weight = torch.ones(())
    if abs(alpha - 2) >= 1e-5:
        weight = (mse.detach() / (c**2 + 1e-8) / abs(alpha - 2) + 1) ** ((alpha - 2) / 2)
    return mse * weight / c


def enhanced_target(config, teacher, v, x_t, t, c, e):
    """v* of one row, equations 8 and 9."""
    low, high = config.enhanced_range
    if config.enhanced_ratio == 0 or not low < t < high:
        return v
    with_c, with_e = teacher(x_t, t, t, c, "cfg"), teacher(x_t, t, t, e, "cfg")
    base = with_e if config.data_free and teacher.kappa == 1 else v
    return base + config.enhanced_ratio * (with_c - with_e)


def rcgm_residual(config, teacher, f, v_star, x_t, t, r, c):
    """R of one row, equations 10 to 14."""
    delta, order = config.delta_t, config.estimate_order
    middle = max(t - delta, r)
    x, total = x_t - delta * v_star, torch.zeros_like(x_t)
    for k in range(order):
        a, b = (middle + (r - middle) * j / order for j in (k, k + 1))
        velocity = teacher(x, a, b, c, "rollout")
        x, total = x - (a - b) * velocity, total + (a - b) * velocity
    residual = f.detach() - v_star if t < r + delta else ((t - r) * f.detach() - total) / delta - v_star
    return clamp(residual, config)


def partition_loss(net, teacher, config, x, cond, uncond, draws, step_rows=None):
    """The whole loss of recipe `partition`, section 2 of the method."""
    teacher.update()
    roles, t, r = draws.roles, draws.t.tolist(), draws.r.tolist()
    uncond = uncond if uncond is None or uncond.shape[0] == len(roles) else uncond.expand(len(roles), -1)
    total_share = sum(config.shares.values())
    share = {role: value / total_share for role, value in config.shares.items()}
    counts = {role: float(roles.count(role)) if step_rows is None else share[role] * step_rows for role in share}
    counting = [role for role in share if config.estimate_order > 0 or role in ("mul", "adv")]
    rows_in_mean, main, rectify = sum(counts[role] for role in counting), [], []
    fakes = rectified = 0
    for i, role in enumerate(roles):
        c, e = (None if a is None else a[i] for a in (cond, uncond))
        data = x[i]
        if role == "adv":
            z_fake, fakes = draws.z_fake[fakes], fakes + 1
            data = z_fake - run(net, z_fake, 1.0, 0.0, c).detach()
        elif config.data_free:
            data = draws.z_data[i] - run(net, draws.z_data[i], 1.0, 0.0, c).detach()
        z, time = draws.z[i], abs(t[i])
        x_t, v = time * z + (1 - time) * data, z - data
        f = run(net, x_t, t[i], r[i], c)
        if role == "adv":
            main.append(config.adversarial_weight * row_loss(f, f.detach() - v, config, config.loss))
            continue
        if role in counting:
            v_star = enhanced_target(config, teacher, v, x_t, t[i], c, e)
            if config.estimate_order == 0:
                residual = f.detach() - v_star
            else:
                residual = rcgm_residual(config, teacher, f, v_star, x_t, t[i], r[i], c)
            weight = math.tan((1 - (time - abs(r[i]))) * math.pi / 2.5) + 1 if config.time_weight else 1.0
            main.append(weight * row_loss(f, residual, config, config.loss))
        if role == "e2e" and config.adversarial and config.rectify_weight > 0:
            again, z_again = draws.t_rectify[rectified].item(), draws.z_rectify[rectified]
            rectified += 1
            x_hat = x_t - time * f.detach()
            x_again = again * z_again + (1 - again) * x_hat
            fake, real = (run(net, x_again, s * again, s * again, c).detach() for s in (-1, 1))
            rectify.append(row_loss(f, clamp(fake - real, config), config, config.rectify_loss))
    loss = sum(main) / rows_in_mean if main else torch.zeros((), dtype=x.dtype)
    return loss + (config.rectify_weight * sum(rectify) / counts["e2e"] if rectify else 0.0)


def all_terms_loss(net, teacher, config, x, cond, uncond, draws, step_rows=None):
    """The whole loss of recipe `all_terms`, section 3 of the method."""
    teacher.update()
    terms = []
    for i, (t, r) in enumerate(zip(draws.t.tolist(), draws.r.tolist(), strict=True)):
        c, e = cond[i], uncond[i]
        z, data = draws.z[i], x[i]
        if config.data_free:
            data = draws.z_data[i] - run(net, draws.z_data[i], 1.0, 0.0, c).detach()
        x_t, v = t * z + (1 - t) * data, z - data
        v_star = enhanced_target(config, teacher, v, x_t, t, c, e)

        def add(weight, f, residual):
            terms.append(weight * row_loss(f, residual.detach(), config, config.loss))

        f = run(net, x_t, t, r, c)
        weight = math.tan((1 - (t - r)) * math.pi / 2.5) + 1 if config.time_weight else 1.0
        add(weight, f, rcgm_residual(config, teacher, f, v_star, x_t, t, r, c))
        f = run(net, x_t, t, t, c)
        add(config.real_velocity_weight, f, f - v_star)
        if not config.adversarial:
            continue
        f_g = run(net, z, 1.0, 0.0, c)
        x_f = (z - f_g).detach()
        f = run(net, t * z + (1 - t) * x_f, -t, -t, c)
        add(config.adversarial_weight, f, f - (z - x_f))
        if config.rectify_weight > 0:
            again = draws.t_rectify[i].item()
            x_again = again * draws.z_rectify[i] + (1 - again) * x_f
            residual = run(net, x_again, -again, -again, c) - run(net, x_again, again, again, c)
            terms.append(config.rectify_weight * row_loss(f_g, residual.detach(), config, config.rectify_loss))
        add(config.consistency_weight, f_g, rcgm_residual(config, teacher, f_g, v_star, z, 1.0, 0.0, c))
    return sum(terms) / (step_rows or len(x))
