"""Flow matching in two dimensions, where everything is known: what Fisher information, FPO and VR-sampling really do.

    python toy2d.py                     # all four experiments, one figure each in assets/
    python toy2d.py race --full         # one of them with all data sets and methods: README's table

Every data set is a Gaussian mixture, so the density of x_t, E[v | x_t] and the irreducible loss are known. Every
training runs S seeds at once, and all methods see the same seeds (initialisation, data, eps and u): paired comparisons.
Papers are named as in fpo.py. Letters: S seeds, N batch, T timesteps, K mixture components, n samples.
"""
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import fpo

N, WIDTH, RATE, EMA = 128, 64, 5e-3, 0.99          # batch; hidden width, learning rate and averaging of the networks
matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7, "figure.titlesize": 9,
                            "axes.spines.top": False, "axes.spines.right": False})
GRID = torch.linspace(1e-3, 0.999, 100, dtype=torch.float64)           # of t; at 0 the diffusion path's v is infinite
SAME, ONES = (lambda u: u), (lambda losses, t: torch.ones_like(losses))  # uniform: t = u and all weights 1


# ---- Data with exact answers -----------------------------------------------------------------------------------------
class Mixture:
    """sum_k w_k N(c_k, s^2 I) in 2D, centred and scaled to unit mean square: centres (K, 2), s, w (K,)."""

    def __init__(self, centres, s, w=None):
        c = torch.as_tensor(centres, dtype=torch.float64)
        self.w = torch.full((len(c),), 1 / len(c), dtype=c.dtype) if w is None else torch.as_tensor(w, dtype=c.dtype)
        c = c - self.w @ c
        scale = (self.w @ c.square().sum(1) / 2 + s ** 2).sqrt().item()
        self.c, self.s = c / scale, s / scale

    def sample(self, n, generator):
        k = torch.multinomial(self.w, n, replacement=True, generator=generator)
        return self.c[k].float() + self.s * torch.randn(n, 2, generator=generator)

    def posterior(self, x_t, alpha, sigma):
        """log p(x_t), E[x | x_t], E[eps | x_t], tr Cov[x | x_t] / 2: x_t (..., 2), alpha and sigma (...) or (1,).

        Of component k: x_t ~ N(alpha c_k, q^2), x | x_t ~ N((sigma^2 c_k + alpha s^2 x_t) / q^2, s^2 sigma^2 / q^2).
        """
        c, s2, alpha, sigma = self.c.to(x_t), self.s ** 2, alpha[..., None], sigma[..., None]
        q2 = alpha ** 2 * s2 + sigma ** 2
        square = x_t.square().sum(-1, True) - 2 * alpha * (x_t @ c.T) + alpha ** 2 * c.square().sum(1)     # (..., K)
        logits = self.w.to(x_t).log() - square / (2 * q2)
        r = torch.softmax(logits, -1)
        mean_c, gain = r @ c, sigma ** 2 / q2
        spread = (r @ c.square().sum(1) - mean_c.square().sum(-1)).clamp_min(0)[..., None]
        variance = (s2 * gain + gain ** 2 * spread / 2)[..., 0]
        log_p = logits.logsumexp(-1) - torch.log(2 * math.pi * q2[..., 0])
        return log_p, gain * mean_c + alpha * s2 / q2 * x_t, sigma / q2 * (x_t - alpha * mean_c), variance

    def velocity(self, x_t, t, path=fpo.linear):
        """E[v | x_t], what every method here is after: x_t (..., 2), t (x_t's first dimensions) -> (..., 2)."""
        t = t.reshape(*t.shape, *[1] * (x_t.ndim - 1 - t.ndim)).expand(x_t.shape[:-1])
        alpha, sigma, d_alpha, d_sigma = path(t)
        _, x, eps, _ = self.posterior(x_t, alpha, sigma)
        return d_alpha[..., None] * x + d_sigma[..., None] * eps

    def variance(self, t, path=fpo.linear, points=121):
        """V(t) = E tr Cov[x | x_t] / 2 by quadrature over x_t, exact to 1e-6: t (T,) -> (T,)."""
        V = []
        for alpha, sigma in zip(*path(t.double())[:2]):
            edge = (alpha * self.c.abs().max() + 5 * (alpha ** 2 * self.s ** 2 + sigma ** 2).sqrt()).item()
            axis = torch.linspace(-edge, edge, points, dtype=torch.float64)
            log_p, _, _, v = self.posterior(torch.cartesian_prod(axis, axis), alpha[None], sigma[None])
            V.append((log_p.exp() * v).sum() / log_p.exp().sum())
        return torch.stack(V)


def data_sets():
    """name -> Mixture. Curves and squares are rows of Gaussians, closer than they are wide: ripples below 1 %."""
    ring = torch.arange(8) * math.pi / 4
    side = (torch.arange(6) + 0.5) / 6
    board = torch.cat([torch.cartesian_prod(side + i, side + j) for i in range(4) for j in range(i % 2, 4, 2)])
    arc = torch.linspace(0, math.pi, 60)
    moons = torch.cat([torch.stack([arc.cos(), arc.sin()], 1), torch.stack([1 - arc.cos(), 0.5 - arc.sin()], 1)])
    a = 3 * math.pi * torch.linspace(1 / 6, 1, 150).sqrt()                         # nearly equal mass per length
    return {"8 Gaussians": Mixture(torch.stack([ring.cos(), ring.sin()], 1), 0.1),
            "checkerboard": Mixture(board, 0.1),
            "two moons": Mixture(moons, 0.08),
            "spiral": Mixture(torch.stack([a * a.cos(), a * a.sin()], 1), 0.25)}


# ---- S networks at once, and their training --------------------------------------------------------------------------
def new_nets(seeds):
    """[W (S, in, out), b (S, 1, out), ...]: for every seed an MLP with three hidden layers, He's initialisation."""
    sizes, nets = [18, WIDTH, WIDTH, WIDTH, 2], []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        nets.append([p for i, o in zip(sizes, sizes[1:])
                     for p in (torch.randn(i, o, generator=g) * (2 / i) ** 0.5, torch.zeros(1, o))])
    return [torch.stack(p) for p in zip(*nets)]


def forward(params, x_t, t):
    """v_theta: x_t (S, n, 2), t (S, n) -> (S, n, 2)."""
    angle = torch.cat([2 * x_t, 4 * x_t, math.pi * t[..., None] * torch.tensor([1.0, 2, 4, 8])], -1)
    h = torch.cat([x_t, angle.sin(), angle.cos()], -1)                             # (S, n, 18)
    for k in range(0, len(params), 2):
        h = torch.baddbmm(params[k + 1], torch.nn.functional.silu(h) if k else h, params[k])
    return h


def batches(data, seeds, steps, n=N, block=50):
    """Yields x, eps (S, n, 2) and u (S, n), uniform in [0, 1). A seed's stream depends on nothing but the seed."""
    generators = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    for k in range(steps):
        if k % block == 0:                                                         # few large draws are faster
            draws = [(data.sample(block * n, g), torch.randn(block * n, 2, generator=g),
                      torch.rand(block * n, generator=g)) for g in generators]
            x, eps, u = (torch.stack(d).unflatten(1, (block, n)) for d in zip(*draws))
        yield x[:, k % block], eps[:, k % block], u[:, k % block]


def train(data, seeds, steps, timesteps=SAME, weights=ONES, path=fpo.linear, stops=None, ema=EMA, name=""):
    """Adam on (1/N) sum c_i L_i for every seed; yields the averaged parameters at the stops, by default the last step.

    timesteps maps u (S, N) to t; weights maps losses and t, both (S, N), to c. The seeds share no number: the gradient
    of the sum of their losses is each one's own, and Adam works element by element.
    """
    params = [p.requires_grad_() for p in new_nets(seeds)]
    average = [p.detach().clone() for p in params]
    adam = torch.optim.Adam(params, lr=RATE, fused=True)
    bar = tqdm(batches(data, seeds, steps), name[:30], steps, leave=False, mininterval=0.5)
    for step, (x, eps, u) in enumerate(bar, 1):
        t = timesteps(u)                                                           # (S, N)
        x_t, v = fpo.interpolate(x, eps, t, path)
        losses = (forward(params, x_t, t) - v).square().mean(-1)                   # (S, N)
        adam.zero_grad()
        (weights(losses.detach(), t) * losses).mean(1).sum().backward()
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - min(ema, step / (step + 9)))
        if step in (stops or (steps,)):
            yield [p.clone() for p in average]


def speed():
    """Milliseconds for a training step of one seed and of 16 at once."""
    took = {}
    for S in (1, 16, 1, 16):                                                       # the first of each warms up
        start = time.perf_counter()
        next(train(data_sets()["8 Gaussians"], range(S), 500, name=f"{S} seeds"))
        took[S] = (time.perf_counter() - start) * 2                                # ms, of 500 steps
    print(f"1 seed: {took[1]:.2f} ms a step; 16 at once: {took[16]:.2f} ms, {took[16] / took[1]:.1f} times as long")


# ---- Measures, tables and figures ------------------------------------------------------------------------------------
MEASURES = "sliced Wasserstein", "energy distance", "squared velocity error"


def sliced_wasserstein(x, y, directions=32):
    """Mean over directions of the 1D Wasserstein-1 distance: x (S, n, 2), y (m, 2), m a multiple of n -> (S,)."""
    angle = math.pi * torch.arange(directions) / directions
    theta = torch.stack([angle.cos(), angle.sin()]).to(x)                          # (2, directions)
    quantiles = (y @ theta).sort(0)[0].unflatten(0, (x.shape[1], -1)).mean(1)      # (n, directions)
    return ((x @ theta).sort(1)[0] - quantiles).abs().mean((1, 2))


def energy_distance(x, y, within_y):
    """(2 E|x - y| - E|x - x'| - E|y - y'|)^(1/2), the last mean given: x (S, n, 2), y (m, 2) -> (S,)."""
    square = [2 * torch.cdist(z, y).mean() - torch.cdist(z, z).mean() - within_y for z in x]
    return torch.stack(square).clamp_min(0).sqrt()


def noise(n, seeds):
    """Normal points (S, n, 2), evenly spread (scrambled Sobol): distances between distributions come out sharp."""
    u = torch.stack([torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(n) for seed in seeds])
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def judge(data, seeds, n=1024):
    """A function that maps a velocity v(x, t), x (S, n, 2) and t (S, n), to its samples by Heun and MEASURES (S, 3).

    Distances are to the exact flow of other noise. Squared velocity error: E |v - E[v | x_t]|^2 / 2 over uniform t,
    which is the loss minus the irreducible loss.
    """
    g, z = torch.Generator().manual_seed(1), noise(n, [1 + seed for seed in seeds])
    y = fpo.heun(data.velocity, noise(4 * n, [0])[0], 100)
    within_y, t = torch.cdist(y, y).mean(), torch.rand(4 * n, generator=g)
    x_t, _ = fpo.interpolate(data.sample(4 * n, g), torch.randn(4 * n, 2, generator=g), t)
    exact = data.velocity(x_t, t)

    @torch.no_grad()
    def measure(v):
        x = fpo.heun(lambda x, t: v(x, t[:, None].expand(x.shape[:2])), z, 16)
        error = (v(x_t.expand(len(seeds), -1, 2), t.expand(len(seeds), -1)) - exact).square().mean((1, 2))
        return x, torch.stack([sliced_wasserstein(x, y), energy_distance(x, y, within_y), error], 1)

    return measure


def interval(a):
    """Mean over seeds, low and high end of its 95 % interval (Student's t, expanded in 1 / nu): (S, ...) -> (...)."""
    nu, z = len(a) - 1, 1.96
    quantile = z + (z ** 3 + z) / (4 * nu) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * nu ** 2)
    mean, half = a.mean(0), quantile * a.std(0) / len(a) ** 0.5
    return mean, mean - half, mean + half


def paired_ratio(a, b):
    """Geometric mean over seeds of a / b, lower and upper end of its 95 % interval: a, b (S, ...) -> three (...)."""
    return [z.exp() for z in interval((a / b).log())]


def plus_minus(a, digits=2):
    mean, _, high = interval(a)
    return f"{mean:.{digits}f} +-{high - mean:.{digits}f}"


def print_table(rows):
    """Lists of texts, the first a label: every column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for label, *cells in rows:
        print(label.ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(cells, widths[1:])))


def draw(ax, x, curves, chance, **settings):
    """Curves label -> (mean, low, high) with bands, dotted lines at chance (one, or one each), settings for ax.set."""
    for k, (label, (mean, low, high)) in enumerate(curves.items()):
        ax.plot(x, mean, color=f"C{k}", label=label)
        ax.fill_between(x, low, high, color=f"C{k}", alpha=0.2, lw=0)
    for k, y in enumerate(chance):
        ax.axhline(y, color=f"C{k}" if len(chance) > 1 else "k", ls=":", lw=1)
    ax.set(**{"xlabel": "training step", **settings})


def save(fig, args, name, title):
    fig.suptitle(title, weight="bold")
    fig.savefig(args.out / f"toy2d_{name}.png")
    print(f"\n{title}\n-> {args.out / f'toy2d_{name}.png'}")


# ---- 1. fisher -------------------------------------------------------------------------------------------------------
FRACTIONS = (0.1, 0.2, 0.5, 0.8)
WAYS = ("random t", "shared t", "random t, mean at each t taken out")


def fisher_traces(params, x_t, v, t):
    """Every sample's loss L and tr F = |grad L|^2, [FPO Eq. 9] but for a factor: x_t, v (S, n, 2) -> two (S, n)."""
    def loss(one, x_t, v, t):                                                      # one seed's network, one sample
        return (forward([p[None] for p in one], x_t[None, None], t[None, None])[0, 0] - v).square().mean()

    def trace(one, x_t, v, t):
        gradient, L = torch.func.grad_and_value(loss)(one, x_t, v, t)
        return L, sum(g.square().sum() for g in gradient)

    samples = torch.vmap(trace, in_dims=(None, 0, 0, 0))
    return torch.vmap(samples, chunk_size=1)([p.detach() for p in params], x_t, v, t)      # seed by seed: memory


def overlap(a, b, q):
    """Share of a's top fraction q that is also in b's, along the last axis. Two random sets overlap by q."""
    k = round(q * a.shape[-1])
    top_a, top_b = (torch.zeros_like(z).scatter(-1, z.topk(k)[1], 1.0) for z in (a, b))
    return (top_a * top_b).sum(-1) / k


def agreement(L, F):
    """Overlap at each of FRACTIONS, then Spearman's rho = 1 - 6 sum d^2 / (n^3 - n): (..., n) twice -> (..., 5)."""
    n, d = L.shape[-1], (L.argsort(-1).argsort(-1) - F.argsort(-1).argsort(-1)).double()
    return torch.stack([*(overlap(L, F, q) for q in FRACTIONS), 1 - 6 * d.square().sum(-1) / (n ** 3 - n)], -1)


def fisher(args):
    """FPO's premise: samples of high loss have a high Fisher trace [FPO Prop. 3.1; Fig. 3: overlap above 70 %].

    Chance line: two random subsets of a fraction q overlap by q. Confounder: loss and trace both depend on t, hence the
    comparison at a shared t, and with the mean at each t taken out.
    """
    T, n, seeds, results = 16, 64, range(args.seed, args.seed + args.seeds), {}
    chance = (T - 1) / (T * n - 1)
    steps = args.steps or (4000 if args.full else 1500)
    stops = sorted({max(1, round(steps * f)) for f in (0, 0.03, 0.1, 0.2, 0.4, 0.7, 1)})
    t = ((torch.arange(T) + 0.5) / T).repeat_interleave(n).expand(len(seeds), -1)
    for name, data in list(data_sets().items())[:None if args.full else 1]:
        x, eps, _ = next(batches(data, [7000 + seed for seed in seeds], 1, T * n, block=1))
        (x_t, v), agree, explained = fpo.interpolate(x, eps, t), [], []
        for params in train(data, seeds, steps, stops=stops, ema=0, name=f"fisher, {name}"):
            L, F = (z.unflatten(1, (T, n)) for z in fisher_traces(params, x_t, v, t))
            centred = [(z - z.mean(-1, True)).flatten(1) for z in (L, F)]
            ways = agreement(L.flatten(1), F.flatten(1)), agreement(L, F).mean(1), agreement(*centred)
            agree.append(torch.stack(ways, 1))
            share = [z.mean(-1).var(-1, correction=0) / z.flatten(1).var(-1, correction=0) for z in (L, F)]
            explained.append(torch.stack(share, 1))
        agree, explained = results[name] = torch.stack(agree, 1), torch.stack(explained, 1)
        print(f"\n{name}, {steps} steps, {len(seeds)} seeds: overlap of top-loss and top-trace sets, mean +- 95 %")
        print_table([["", *(f"q = {q}" for q in FRACTIONS), "Spearman's rho"],
                     *([way, *map(plus_minus, agree[:, -1, w].T)] for w, way in enumerate(WAYS)),
                     ["chance", *(f"{q:.2f}" for q in (*FRACTIONS, 0))]])
        print(f"t explains {plus_minus(explained[:, -1, 0])} of the variance of the loss, "
              f"{plus_minus(explained[:, -1, 1])} of the trace's (chance {chance:.3f})")
    fisher_figure(args, stops, chance, *results["8 Gaussians"])


def fisher_figure(args, stops, chance, agree, explained):                          # (S, stops, 3, 5), (S, stops, 2)
    fig = Figure((9, 5.6), dpi=100, layout="constrained")
    *top, left, right = fig.subplot_mosaic("aabbcc;dddeee").values()
    for w, ax in enumerate(top):
        draw(ax, stops, {f"top {q:.0%}": interval(agree[:, :, w, k]) for k, q in enumerate(FRACTIONS)}, FRACTIONS,
             title=f"Overlap (dotted: chance),\n{WAYS[w]}", ylabel="overlap", ylim=(0, 1))
    draw(left, stops, {way: interval(agree[:, :, w, 4]) for w, way in enumerate(WAYS)}, [0],
         title="Rank correlation of loss and trace (chance: 0)", ylabel="Spearman's rho", ylim=(0, 1))
    draw(right, stops, {what: interval(explained[..., k]) for k, what in enumerate(("loss", "Fisher trace"))},
         [chance], title="Share of the variance that t alone explains (dotted: chance)", ylabel="share",
         ylim=(0, None))
    for ax in (top[0], left, right):
        ax.legend()
    m = agree[:, -1].mean(0)
    save(fig, args, "fisher", f"High loss marks a high Fisher trace, beyond chance: of the top 20 % the two share "
         f"{m[0, 1]:.0%} (random t), {m[1, 1]:.0%} (shared t),\n{m[2, 1]:.0%} (mean at t taken out); at q = 80 % they "
         f"share {m[0, 3]:.0%}, where chance alone gives 80 %")


# ---- 2. variance -----------------------------------------------------------------------------------------------------
VR_TABLE_3 = {"|f|^-2, d = 3072": ("-0.5..-0.25", "-0.5..-0.25", "-1.5..-1.25"),   # m, sign turned to our time
              "white, d = 4096": ("-0.25..0", "-0.25..0", "-1..-0.75"),
              "|f|^-2, d = 4096": ("-0.25..0", "-0.25..0", "-1..-0.75"),
              "|f|^-2, d = 16384": ("0.75..1", "0.75..1", "-0.5..-0.25")}


def snr_h2(path=fpo.linear):
    """alpha / sigma and h^2 on GRID: h^2 V is the irreducible loss."""
    alpha, sigma, d_alpha, d_sigma = path(GRID)
    return alpha / sigma, ((d_alpha * sigma - alpha * d_sigma) / sigma) ** 2


def network_loss(data, path, seeds, steps, n=2048):
    """Mean loss of trained networks at every t of GRID -> (T,): an upper bound of the irreducible loss."""
    low, g, curve = GRID[0].item(), torch.Generator().manual_seed(2), []
    params = next(train(data, seeds, steps, lambda u: low + (1 - low) * u, path=path, name="loss per t"))
    for t in GRID.float():
        x_t, v = fpo.interpolate(data.sample(n, g), torch.randn(n, 2, generator=g), t.expand(n), path)
        with torch.no_grad():
            v_hat = forward(params, x_t.expand(len(seeds), -1, 2), t.expand(len(seeds), n))
        curve.append((v_hat - v).square().mean())
    return torch.stack(curve).double()


def wide_data(g):
    """label -> points (M, d), eigenvalues of the covariance (d,).

    The digits are real. The rest are synthetic stand-ins of the dimensions of VR's data: Gaussian fields with the
    power spectrum of natural images, |f|^-2, and white noise. A field is independent in its Fourier basis and the
    estimators see distances only, so its coefficients will do. Real latents are neither Gaussian nor as steep.
    """
    from data.font_digits import ensure
    x = torch.from_numpy(np.load(ensure() / "latents.npy")).double().flatten(1)
    x = x[torch.randperm(len(x), generator=g)]
    x = (x - x.mean(0)) / x.var(0).mean().sqrt()                                   # whatever the stored scale and bias
    power = torch.linalg.eigvalsh(x.T @ x / len(x)).clamp_min(0)
    table = {f"digits, d = 256, M = {M}": (x[:M], power) for M in (200, 2000)}
    for exponent, channels, side in ((0, 4, 32), (2, 3, 32), (2, 4, 32), (2, 4, 64)):
        f = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
        power = (f[:, None] ** 2 + f ** 2).clamp_min(1).pow(-exponent / 2).flatten().repeat(channels)
        power = power / power.mean()
        points = torch.randn(200, len(power), dtype=power.dtype, generator=g) * power.sqrt()
        table[f"{'|f|^-2' if exponent else 'white'}, d = {len(power)}, M = 200"] = points, power
    return table


def variance(args):
    """VR draws t from pi(t) ~ h^2 V(t), the irreducible loss [VR Lemma 3.1, Fig. 1-2]: which estimator finds it?

    Oracle in 2D: quadrature against the true density. In high dimension Monte Carlo on M points sees how far apart the
    points are; there the oracle is the closed form for a Gaussian, exact because the synthetic data are Gaussian.
    """
    data, g = data_sets()["8 Gaussians"], torch.Generator().manual_seed(args.seed)
    steps, seeds = args.steps or (6000 if args.full else 1500), range(args.seed, args.seed + 4)
    x, table, flat, wide = data.sample(2000, g), wide_data(g), {}, {}
    for name, path in tqdm(fpo.PATHS.items(), "variance", leave=False):
        snr, h2 = snr_h2(path)
        flat[name] = {
            "exact": h2 * data.variance(GRID, path),
            **{f"Monte Carlo, M = {M}": h2 * fpo.posterior_variance(x[:M], snr, 40_000 // M, g)
               for M in (50, 200, 2000)},
            "Gaussian, same covariance": h2 * fpo.gaussian_posterior_variance(x, snr),
            f"network, {steps} steps": network_loss(data, path, seeds, steps)}
        wide[name] = {label: (h2 * fpo.posterior_variance(points, snr, 100_000 // len(points), g),
                              h2 * (power / (1 + snr[:, None] ** 2 * power)).mean(1))
                      for label, (points, power) in table.items()}

    variance_table(flat, wide)
    variance_figure(args, flat, wide)


def variance_table(flat, wide):
    """The m that each curve recommends, by path, beside VR's."""
    nearest = lambda curve: "{:.2f} ({:.2f})".format(*fpo.logit_normal_location(GRID, curve))
    rows = [["m of the closest logit-normal (KS distance)", *fpo.PATHS]]
    rows += [[f"8 Gaussians, {label}", *(nearest(flat[name][label]) for name in flat)] for label in flat["linear"]]
    for label in wide["linear"]:
        of = label.rsplit(",", 1)[0]                                               # without M
        rows.append([f"{label}, Monte Carlo", *(nearest(wide[name][label][0]) for name in wide)])
        rows.append([f"{of}, Gaussian", *(nearest(wide[name][label][1]) for name in wide)])
        if of in VR_TABLE_3:
            rows.append(["    [VR Table 3], sign turned to our time", *VR_TABLE_3[of]])
    print()
    print_table(rows)


def variance_figure(args, flat, wide):
    fig = Figure((9, 8.4), dpi=100, layout="constrained")
    density = lambda curve: curve / torch.trapezoid(curve, GRID)
    for (top, middle, bottom), name in zip(fig.subplots(3, 3, sharex=True).T, fpo.PATHS):
        exact = flat[name]["exact"]
        for k, (label, curve) in enumerate(flat[name].items()):
            style = dict(color="0.7", lw=5) if k == 0 else dict(color=f"C{k - 1}", lw=1.2)
            top.plot(GRID, curve, label=label, **style)
            middle.plot(GRID, density(curve), **style)
        m, distance = fpo.logit_normal_location(GRID, exact)
        normal = torch.exp(-(torch.logit(GRID) - m) ** 2 / 2) / (2 * math.pi) ** 0.5 / (GRID * (1 - GRID))
        middle.plot(GRID, normal, "k:", label=f"logit-normal closest to exact:\nm = {m:g}, KS distance {distance:.2f}")
        for k, (label, (monte_carlo, gaussian)) in enumerate(wide[name].items()):
            bottom.plot(GRID, density(monte_carlo), f"C{k}", lw=1.2, label=label)
            bottom.plot(GRID, density(gaussian), f"C{k}--", lw=1.2)
        top.set(title=f"{name} path", ylim=(0, 1.25 * exact[GRID > 0.1].max()), ylabel="8 Gaussians: $h^2 V$")
        middle.set(ylim=(0, 4), ylabel="8 Gaussians: density $\\pi(t)$")
        middle.legend(loc="upper center")
        bottom.set(ylim=(0, 10), xlabel="t  (0 data, 1 noise)", ylabel="high dimension: density $\\pi(t)$")
        if name == "linear":
            top.legend(loc="lower right")
            bottom.legend(title="solid: Monte Carlo\ndashed: Gaussian", loc="upper left")
    late = [c[GRID > 0.9].sum() / c.sum() for c in wide["linear"]["white, d = 4096, M = 200"]]
    save(fig, args, "variance", "In 2D Monte Carlo and a network find the irreducible loss, except near the data;\n"
         f"in d = 4096 (white, linear path) Monte Carlo on 200 points puts {late[0]:.0%} of its density above t = 0.9, "
         f"the truth {late[1]:.0%}")


# ---- 3. race ---------------------------------------------------------------------------------------------------------
def fpo_of(beta, tau=1.0, centre=False, weights=fpo.fpo_gradient_weights):
    """(timesteps, weights) of FPO, every seed ranking its own batch; centre: by the loss minus its mean near that t."""
    def c(losses, t):                                                              # (S, N), (S, N) -> (S, N)
        losses = fpo.centred(losses, t) if centre else losses
        return torch.vmap(lambda L: weights(L, 0.8, beta, tau))(losses)

    return SAME, c


def vr(V, reweight=False):
    """(timesteps, weights) of VR-sampling with V (T,) on GRID, a tenth of it uniform; reweight: by 1 / pi, unbiased."""
    pdf = fpo.vr_density(V, GRID).float()
    cell = (pdf[1:] + pdf[:-1]) / 2                                                # density between two grid points
    inverse = lambda losses, t: 1 / cell[(torch.searchsorted(GRID.float(), t) - 1).clamp(0, len(cell) - 1)]
    return lambda u: fpo.sample_timesteps(u, GRID, pdf), inverse if reweight else ONES


def race_methods(data, args):
    """name -> (timesteps, weights), as train takes them. The paper's beta is 2; N / 2 is a third of all weight."""
    V = torch.from_numpy(np.interp(GRID, GRID[::3], data.variance(GRID[::3], points=81)))
    table = {"uniform": (SAME, ONES),
             "FPO, β = 2": fpo_of(2),
             "FPO, β = N/2": fpo_of(N / 2),
             "FPO, β = N/2, minus mean at t": fpo_of(N / 2, centre=True),
             "FPO, β = N/2, τ = 5": fpo_of(N / 2, tau=5.0),
             "hard samples, β = N/2": fpo_of(N / 2, weights=lambda L, r, beta, _: fpo.hard_sample_weights(L, r, beta)),
             "min-SNR": (SAME, lambda losses, t: torch.vmap(fpo.min_snr_weights)(t)),
             "logit-normal t, m = 0": (fpo.logit_normal_timesteps, ONES),
             "VR": vr(V),
             "VR, weights 1/π": vr(V, reweight=True)}
    if args.full:
        x, (snr, h2) = data.sample(2000, torch.Generator().manual_seed(args.seed)), snr_h2()
        loss = network_loss(data, fpo.linear, range(args.seed, args.seed + 4), 500)
        table |= {"FPO, β = 5": fpo_of(5),
                  "FPO, β = N/8": fpo_of(N / 8),
                  "FPO, β = N/2, τ = 0.2": fpo_of(N / 2, tau=0.2),
                  "FPO, β = N/2, w detached": fpo_of(N / 2, weights=fpo.fpo_weights),
                  "P2": (SAME, lambda losses, t: torch.vmap(fpo.p2_weights)(t)),
                  "VR, Monte Carlo M = 200": vr(fpo.posterior_variance(x[:200], snr, 200)),
                  "VR, Gaussian": vr(fpo.gaussian_posterior_variance(x, snr)),
                  "VR, network": vr(loss / h2)}
    return table


def race(args):
    """Does any policy beat uniform, in steps or in final quality [FPO Table 5, 6; VR Table 2]? And where does FPO end?

    Paired: all methods see the same initialisations, data, eps and u. Floor: the exact velocity with the same sampler.
    """
    seeds, results, pictures = range(args.seed, args.seed + args.seeds), {}, {}
    steps = args.steps or (2000 if args.full else 1000)
    stops = sorted({max(1, round(steps * f)) for f in (0.1, 0.25, 0.5, 0.75, 1)})
    for name, data in list(data_sets().items())[:None if args.full else 2]:
        measure, results[name] = judge(data, seeds), {}
        pictures[name] = {"exact": data.sample(len(seeds) * 1024, torch.Generator().manual_seed(3))}
        for method, policy in tqdm(race_methods(data, args).items(), f"race, {name}", leave=False):
            networks = train(data, seeds, steps, *policy, stops=stops, name=method)
            x, scores = zip(*[measure(partial(forward, params)) for params in networks])
            results[name][method], pictures[name][method] = torch.stack(scores, 1), x[-1].flatten(0, 1)
        race_table(name, stops, measure(data.velocity)[1].mean(0), results[name])
    race_figure(args, stops, results, pictures, *bias(args, seeds, steps * 3 // 2))


def race_table(name, stops, floor, results):
    """Ratios to uniform with 95 % intervals at the last stop, and the steps to reach uniform's final quality."""
    base = results["uniform"]
    print(f"\n{name}, {stops[-1]} steps, {len(base)} seeds; uniform | floor: " + ", ".join(
        f"{m} {v:.4f} | {f:.4f}" for m, v, f in zip(MEASURES, base[:, -1].mean(0), floor)))
    rows = [["ratio to uniform [95 %]", *MEASURES, "steps to uniform's end"]]
    for method, r in results.items():
        cells = [f"{m:.3f} [{a:.3f}, {b:.3f}]" for m, a, b in zip(*paired_ratio(r[:, -1], base[:, -1]))]
        rows.append([method, *cells, steps_to(stops, r[..., 0].log().mean(0), base[:, -1, 0].log().mean())])
    print_table(rows)


def steps_to(stops, curve, goal):
    """First step at which a log distance (stops,), interpolated between stops, is down to the goal."""
    if curve.min() > goal + 1e-4:
        return "not reached"
    k = (curve <= goal + 1e-4).int().argmax()                                      # the first
    return f"{np.interp(-goal, -curve[k - 1:k + 1], stops[k - 1:k + 1]):.0f}" if k else f"<= {stops[0]}"


def bias(args, seeds, steps):
    """What FPO converges to: where E[c (v_theta - v)] = 0 with c growing with the loss, so pulled to far, rare targets.

    Data: two blobs of 80 % and 20 %. Between them v given x_t is skewed and cannot be known: the loss does not go
    to 0, as [FPO Prop. 3.4] assumes. Oracle: the exact E[x | x_t] and the 20 %; control: uniform.
    """
    data = Mixture([[0.0, 0.0], [1.0, 0.0]], 0.15, [0.8, 0.2])
    betas = {"FPO, β = 2": 2, "FPO, β = N/8": N / 8, "FPO, β = N/2": N / 2}
    policies = {"uniform": (SAME, ONES)} | {name: fpo_of(beta) for name, beta in betas.items()}
    t, measure, shifts, shares = torch.tensor(0.7), judge(data, seeds), {}, {}
    line = torch.stack([torch.linspace(-2, 2, 81), torch.zeros(81)], 1)            # x_t, through both centres
    exact = data.posterior(line, (1 - t)[None], t[None])[1]
    print(f"\ntwo blobs of 80 % and 20 %, {steps} steps, {len(seeds)} seeds")
    for method, policy in tqdm(policies.items(), "race, bias", leave=False):
        params = next(train(data, seeds, steps, *policy, name=method))
        x, scores = measure(partial(forward, params))
        with torch.no_grad():
            v = forward(params, line.expand(len(seeds), -1, 2), t.expand(len(seeds), 81))
        shifts[method] = interval((line - t * v - exact)[..., 0])
        shares[method] = (x[..., 0] > data.c[:, 0].mean()).float().mean(1)
        tqdm.write(f"{method:14} share of the 20 % {plus_minus(shares[method], 3)}, "
                   f"squared velocity error {plus_minus(scores[:, 2], 4)}")
    return line[:, 0], shifts, shares


def race_figure(args, stops, results, pictures, line, shifts, shares):
    fig = Figure((9, 10.5), dpi=100, layout="constrained")
    curves, images, blobs = fig.subfigures(3, 1, height_ratios=[4.6, 3.4, 2.2])
    telling = list(results["8 Gaussians"])[1:10]
    for (name, r), axes in zip(results.items(), curves.subplots(2, 2, sharex=True).T):
        for k, ax in enumerate(axes):
            draw(ax, stops, {m: paired_ratio(r[m][..., k], r["uniform"][..., k]) for m in telling}, [1],
                 title=f"{name}: {MEASURES[k]}" + k * ", zoomed in" + " (below 1: better)",
                 ylabel="ratio to uniform", ylim=(0.8, 2.2) if k else (0, None))
    curves.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=5)
    for name, axes in zip(results, images.subplots(2, 5)):
        for ax, method in zip(axes, ("exact", "uniform", "FPO, β = 2", "FPO, β = N/2", "VR")):
            x = pictures[name][method]
            ax.hist2d(*x.T.numpy(), bins=80, range=[[-2.2, 2.2]] * 2, vmax=len(x) / 400, cmap="magma_r")
            ax.set(title=method, xticks=[], yticks=[], aspect="equal")
    draw(blobs.subplots(), line, shifts, [0], title="Two blobs, 80 % at the left, 20 % at the right; t = 0.7",
         xlabel="$x_t$, through both blobs", ylabel="learned minus exact $E[x|x_t]$\n(above 0: towards the 20 %)")
    blobs.legend(loc="outside right center")
    end = lambda method: " and ".join(
        f"{paired_ratio(r[method][:, -1, 0], r['uniform'][:, -1, 0])[0]:.2f}" for r in list(results.values())[:2])
    uniform, two, half = (f"{shares[method].mean():.1%}" for method in ("uniform", "FPO, β = 2", "FPO, β = N/2"))
    save(fig, args, "race", f"After {stops[-1]} steps FPO (β = 2) is {end('FPO, β = 2')} times as far from the data as "
         f"uniform, VR {end('VR')} times;\nwhere 20 % of the data lie uniform puts {uniform} of its samples, "
         f"FPO {two} (β = 2) and {half} (β = N/2)")


# ---- 4. samplers -----------------------------------------------------------------------------------------------------
def samplers(args):
    """Samplers on the exact velocity, so that nothing but the sampler is judged: error against NFE.

    ODE: root mean square distance to the exact end point from the same noise. All: sliced Wasserstein distance to the
    exact flow of other noise; floors: the exact flow itself, and, for random samples, independent exact samples.
    """
    S, n, nfes = 8, 1024, (4, 8, 16, 32, 64, 128)
    data, g = data_sets()["8 Gaussians"], torch.Generator().manual_seed(args.seed)
    v, z = fpo.counted(data.velocity), noise(n, range(1, 1 + S)).double().flatten(0, 1)
    truth = fpo.dopri5(v, z, 1e-9, 1e-9)
    reference = fpo.dopri5(v, noise(4 * n, [0])[0].double(), 1e-9, 1e-9)
    distance = lambda x: sliced_wasserstein(x.unflatten(0, (S, n)), reference)     # (S,)
    runs = {"Euler": [partial(fpo.euler, steps=k) for k in nfes],
            "Heun": [partial(fpo.heun, steps=k // 2) for k in nfes],
            "Dormand-Prince": [partial(fpo.dopri5, rtol=10.0 ** -e, atol=10.0 ** -e) for e in range(1, 7)]}
    for w, last in ((0, 0.04), (1, 0.04), (2, 0.04), (2, 0.0)):
        runs[f"Euler-Maruyama, w = {w}, last {last or '1/NFE'}"] = [
            partial(fpo.euler_maruyama, steps=k, w=w, last=last, generator=g) for k in nfes]
    points = {label: [] for label in runs}                                         # (NFE, rms error, distances (S,))
    for label, sampler in tqdm([(label, run) for label in runs for run in runs[label]], "samplers", leave=False):
        v.nfe = 0
        x = sampler(v, z)
        points[label].append((v.nfe, (x - truth).square().sum(1).mean().sqrt().item(), distance(x)))
    flow, exact = distance(truth), distance(data.sample(S * n, g).double())
    print(f"\nNFE: sliced Wasserstein distance +- 95 % (ODE: rms distance to the exact end point); "
          f"exact flow {flow.mean():.4f}, independent exact samples {plus_minus(exact, 4)}")
    print_table([[label, *(f"{nfe}: {plus_minus(d, 4)}" + ("" if "Maruyama" in label else f" ({e:.0e})")
                           for nfe, e, d in row)] for label, row in points.items()])
    sampler_figure(args, points, flow.mean(), exact.mean())


def sampler_figure(args, points, flow, exact):
    fig = Figure((9, 3.9), dpi=100, layout="constrained")
    left, right = fig.subplots(1, 2)
    for k, (label, row) in enumerate(points.items()):
        nfe, error, distances = zip(*row)
        mean, low, high = interval(torch.stack(distances, 1))
        if "Maruyama" not in label:
            left.plot(nfe, error, f"C{k}o-", ms=3)
        right.errorbar(nfe, mean, high - mean, fmt=f"C{k}o" + ("--" if "Maruyama" in label else "-"), ms=3, label=label)
    right.axhline(flow, color="k", ls=":", lw=1, label="exact flow")
    right.axhline(exact, color="0.5", ls=":", lw=1, label="independent exact samples")
    axes = dict(xlabel="NFE", xscale="log", yscale="log")
    left.set(title="ODE: distance to the exact end point", ylabel="root mean square", **axes)
    right.set(title="Distance to the data distribution", ylabel="sliced Wasserstein", **axes)
    fig.legend(loc="outside lower center", ncol=3)
    at_16 = {label: row[2][2].mean() for label, row in points.items()}
    save(fig, args, "samplers", f"At 16 evaluations Heun is {at_16['Heun']:.3f} from the data and Euler "
         f"{at_16['Euler']:.3f} (exact flow: {flow:.3f});\nEuler-Maruyama with w = 2 is "
         f"{at_16['Euler-Maruyama, w = 2, last 0.04']:.3f}, where independent exact samples are {exact:.3f}")


# ---- The command line ------------------------------------------------------------------------------------------------
EXPERIMENTS = {"fisher": fisher, "variance": variance, "race": race, "samplers": samplers}
SECONDS = {"fisher": 16, "variance": 66, "race": 168, "samplers": 14}                 # one thread of a slow CPU


def main():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.splitlines()[0],
        epilog="\n".join(f"{name}, about {SECONDS[name]} s\n    {run.__doc__}" for name, run in EXPERIMENTS.items()))
    parser.error = lambda message: sys.exit(f"toy2d.py: {message}")                # one line, exit status 1
    parser.add_argument("experiment", nargs="*", help="any of the four below; none: all of them")
    parser.add_argument("--full", action="store_true", help="fisher, race: all data sets and methods, README's tables; "
                        "variance: a longer training; samplers: the same as without")
    parser.add_argument("--speed", action="store_true", help="only measure what 16 seeds at once cost")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of the figures (default: assets)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seeds", type=int, help="how many, trained at once, >= 4 (default: 16; --full: 20)")
    parser.add_argument("--steps", type=int, help="training steps, >= 10, instead of each experiment's own")
    args = parser.parse_args()
    args.seeds = (20 if args.full else 16) if args.seeds is None else args.seeds
    for name in set(args.experiment) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    if not 0 <= args.seed < 10 ** 9 or args.seeds < 4 or (args.steps is not None and args.steps < 10):
        parser.error("--seed must be at least 0 and below 10^9, --seeds at least 4, --steps at least 10")
    if args.speed:
        return speed()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    try:
        for name in args.experiment or EXPERIMENTS:
            start = time.perf_counter()
            EXPERIMENTS[name](args)
            print(f"{name}: {time.perf_counter() - start:.0f} s")
    except (OSError, ValueError) as error:                                         # a figure or the digits' folder
        parser.error(error)
    except KeyboardInterrupt:
        parser.error("stopped")


if __name__ == "__main__":
    main()
