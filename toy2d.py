"""Flow matching in two dimensions, where every answer is known. Five questions, a figure each:

    fisher      Do samples of high loss have a high Fisher trace, as FPO assumes?
    variance    Which estimator finds the irreducible loss, from which VR-sampling draws its timesteps?
    race        Does any policy beat uniform training, and what does FPO converge to?
    samplers    How far from the data does each sampler end, for how many evaluations of v?
    meanflow    What does the noise of MeanFlow's target cost, and which velocity takes it out?

    python toy2d.py                     # all five, figures in assets/
    python toy2d.py race                # one of them; study/race.py adds data sets and policies

The data are Gaussian mixtures, so p(x_t), E[v | x_t] and the irreducible loss have formulas. All methods
see the same initialisations, data, eps and u. Papers: see fpo.py.
Letters: S seeds, N batch, n samples, T timesteps, K mixture components."""
import argparse
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from tqdm import trange

import fpo

N = 128                                     # batch
SIZES = 18, 64, 64, 64, 2                   # widths of the networks
RATE, EMA = 5e-3, 0.99                      # learning rate, averaging of the weights
GRID = torch.linspace(1e-3, 0.999, 100, dtype=torch.float64)  # of t; v of the diffusion path is infinite at 0
FRACTIONS = 0.1, 0.2, 0.5, 0.8              # of the samples, in fisher
MEASURES = "sliced Wasserstein", "squared velocity error"               # in race
NFES = 4, 8, 16, 32, 64, 128                # evaluations of v, in samplers
WEIGHTINGS = "no weights", "adaptive", "adaptive by cell"               # in meanflow
SWEEP = [1, 0.75, 0.5, 0.25, 0]             # values of lambda, of which networks are trained
LAMBDAS = [*SWEEP, -0.25, -0.5, -0.75]      # and of which the gradient's variance is computed
matplotlib.rcParams.update({"font.size": 8, "legend.fontsize": 7, "figure.constrained_layout.use": True})

# A policy is two functions: timesteps, u (S, N) -> t (S, N); weights, losses and t (S, N) -> c (S, N).
SAME = lambda u: u
ONES = lambda losses, t: torch.ones_like(losses)
UNIFORM = SAME, ONES
seeded = lambda seed: torch.Generator().manual_seed(seed)
circle = lambda angle: torch.stack([angle.cos(), angle.sin()], 1)
DIRECTIONS = circle(math.pi * torch.arange(32) / 32).T                  # (2, 32)


# ---- Data with exact answers -----------------------------------------------------------------------------
class Mixture:
    """sum_k w_k N(c_k, s^2 I) in 2D, centred and scaled to unit mean square: centres (K, 2), s, w (K,)."""

    def __init__(self, centres, s, w=None):
        c = torch.as_tensor(centres, dtype=torch.float64)
        self.w = torch.tensor(w or [1 / len(c)] * len(c), dtype=c.dtype)
        c = c - self.w @ c
        mean_square = self.w @ c.square().sum(1) / 2 + s ** 2
        scale = mean_square.sqrt().item()
        self.c, self.s = c / scale, s / scale

    def sample(self, n, generator):
        k = torch.multinomial(self.w, n, replacement=True, generator=generator)
        z = torch.randn(n, 2, generator=generator)
        return self.c[k].float() + self.s * z

    def posterior(self, x_t, t, path=fpo.linear):
        """log p(x_t) + const, E[x | x_t], E[eps | x_t], tr Cov[x | x_t] / 2: x_t (..., 2), t (...) or (1,).
        Within component k, with q^2 = alpha^2 s^2 + sigma^2: x_t ~ N(alpha c_k, q^2), and x given x_t has
        mean (sigma^2 c_k + alpha s^2 x_t) / q^2 and variance s^2 sigma^2 / q^2."""
        c, s2 = self.c.to(x_t), self.s ** 2
        c2 = c.square().sum(1)                                          # (K,)
        alpha, sigma, _, _ = fpo.coefficients(t, x_t, path)
        q2 = alpha ** 2 * s2 + sigma ** 2
        cross = x_t @ c.T                                               # (..., K)
        distance2 = x_t.square().sum(-1, True) - 2 * alpha * cross + alpha ** 2 * c2
        logits = self.w.to(x_t).log() - distance2 / (2 * q2)
        r = torch.softmax(logits, -1)                                   # which component: (..., K)
        mean_c = r @ c
        spread = r @ c2 - mean_c.square().sum(-1)                       # tr Cov[c_k | x_t]
        gain = sigma ** 2 / q2
        variance = s2 * gain + gain ** 2 * spread.clamp_min(0)[..., None] / 2
        x = gain * mean_c + alpha * s2 / q2 * x_t
        eps = sigma / q2 * (x_t - alpha * mean_c)
        return logits.logsumexp(-1), x, eps, variance[..., 0]

    def velocity(self, x_t, t, path=fpo.linear):
        """E[v | x_t], the aim of every training: x_t (..., 2), t (x_t's first dimensions) -> (..., 2)."""
        _, x, eps, _ = self.posterior(x_t, t, path)
        _, _, d_alpha, d_sigma = fpo.coefficients(t, x_t, path)
        return d_alpha * x + d_sigma * eps

    def variance(self, t, path=fpo.linear, points=121):
        """V(t) = E tr Cov[x | x_t] / 2 by quadrature over x_t, exact to 1e-6: t (T,) -> (T,)."""
        V = []
        for one in t.double():
            alpha, sigma, _, _ = path(one)
            q = (alpha ** 2 * self.s ** 2 + sigma ** 2).sqrt()
            edge = (alpha * self.c.abs().max() + 5 * q).item()
            axis = torch.linspace(-edge, edge, points, dtype=torch.float64)
            x_t = torch.cartesian_prod(axis, axis)
            log_p, _, _, v = self.posterior(x_t, one, path)
            V.append(torch.softmax(log_p, 0) @ v)
        return torch.stack(V)


def data_sets():
    """name -> Mixture. A square is rows of Gaussians, closer than they are wide."""
    ring = circle(torch.arange(8) * math.pi / 4)
    side = (torch.arange(6) + 0.5) / 6
    squares = [torch.cartesian_prod(side + i, side + j) for i in range(4) for j in range(i % 2, 4, 2)]
    return {"8 Gaussians": Mixture(ring, 0.1), "checkerboard": Mixture(torch.cat(squares), 0.1)}


# ---- S networks at once, and their training --------------------------------------------------------------
def new_nets(seeds, sizes=SIZES):
    """[W (S, in, out), b (S, 1, out), ...]: an MLP for every seed, He's initialisation."""
    generators = list(map(seeded, seeds))
    params = []
    for i, o in zip(sizes, sizes[1:]):
        W = torch.stack([torch.randn(i, o, generator=g) for g in generators])
        params += [W * (2 / i) ** 0.5, torch.zeros(len(W), 1, o)]
    return params


def forward(params, x_t, t, r=None):
    """v_theta, every seed by its own network: x_t (S, n, 2), t (S, n), (S,) or () -> (S, n, 2).
    With r, as t, it is u_theta(x_t, r, t), whose waves are slow: faster ones make du/dt unstable."""
    t = t.reshape(*t.shape, *[1] * (x_t.ndim - t.ndim))
    waves = math.pi * t * torch.tensor([1.0, 2, 4, 8])
    if r is not None:
        gap = t - r.reshape(t.shape)
        waves = math.pi * torch.cat([t / 2, t, gap / 2, gap], -1)
    angle = torch.cat([2 * x_t, 4 * x_t, waves.expand(*x_t.shape[:-1], 4)], -1)
    h = torch.cat([x_t, angle.sin(), angle.cos()], -1)                  # (S, n, 18)
    h = torch.baddbmm(params[1], h, params[0])
    for W, b in zip(params[2::2], params[3::2]):
        h = torch.baddbmm(b, torch.nn.functional.silu(h), W)
    return h


def batches(data, seeds, n=N, block=50):
    """Yields x, eps (S, n, 2) and u (S, n), uniform in [0, 1). A seed's stream depends on the seed alone."""
    generators = [seeded(10_000 + seed) for seed in seeds]
    m = block * n                                                       # few large draws are faster
    while True:
        x = torch.stack([data.sample(m, g) for g in generators])
        eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        u = torch.stack([torch.rand(m, generator=g) for g in generators])
        yield from zip(*(a.split(n, 1) for a in (x, eps, u)))


def fit(nets, stream, loss, steps, ema=EMA, rate=RATE):
    """Adam on loss(params, *batch) -> (S,), each network's own. Yields it, and the averaged parameters.
    The gradient of the sum is each network's own, and Adam works element by element: they do not mix."""
    params = [p.requires_grad_() for p in nets]
    average = [p.detach().clone() for p in params]
    adam = torch.optim.Adam(params, lr=rate, fused=True)
    bar = trange(1, steps + 1, leave=False)
    for step, batch in zip(bar, stream):
        L = loss(params, *batch)
        adam.zero_grad()
        L.sum().backward()
        adam.step()
        for a, p in zip(average, params):
            a.lerp_(p.detach(), 1 - min(ema, step / (step + 9)))        # a shorter average at first
        yield L.detach(), average


def train(data, seeds, steps, timesteps=SAME, weights=ONES, path=fpo.linear, ema=EMA):
    """Adam on (1/N) sum c_i L_i for every seed -> the averaged parameters."""
    def loss(params, x, eps, u):
        t = timesteps(u)                                                # (S, N)
        x_t, v = fpo.interpolate(x, eps, t, path)
        L = (forward(params, x_t, t) - v).square().mean(-1)             # (S, N)
        c = weights(L.detach(), t)
        return (c * L).mean(1)
    *_, (_, average) = fit(new_nets(seeds), batches(data, seeds), loss, steps, ema)
    return average


# ---- Measures and tables ---------------------------------------------------------------------------------
def sliced_wasserstein(x, y, theta=DIRECTIONS):
    """Mean of the 1D Wasserstein distances along theta (k, .): x (S, n, k), y (m, k), n divides m -> (S,)."""
    theta = theta.to(x)
    x = (x @ theta).sort(1)[0]
    y = (y @ theta).sort(0)[0]
    y = y.unflatten(0, (x.shape[1], -1)).mean(1)                        # as many quantiles as x has
    return (x - y).abs().mean((1, 2))


def noise(seeds, n=1024):
    """Normal points (S, n, 2) and (4 n, 2), evenly spread (scrambled Sobol): that makes distances sharp."""
    scrambles = [0] + [1 + seed for seed in seeds]
    engines = [torch.quasirandom.SobolEngine(2, True, k) for k in scrambles]
    u = torch.stack([engine.draw(4 * n) for engine in engines])
    z = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
    return z[1:, :n], z[0]


def interval(a):
    """Mean over seeds, low and high end of its 95 % interval: (S, ...) -> (3, ...)."""
    nu = len(a) - 1
    quantile = 1.96 + 2.372384 / nu + 2.822707 / nu ** 2                # Student's t, expanded in 1 / nu
    half = quantile * a.std(0) / len(a) ** 0.5
    mean = a.mean(0)
    return torch.stack([mean, mean - half, mean + half])


def print_means(title, columns, table):
    """A row for each label -> values (S, columns): mean, half of its 95 % interval. Gives the intervals."""
    intervals = {label: interval(values) for label, values in table.items()}
    rows = [["mean +- 95 %", *map(str, columns)]]
    for label, (mean, _, high) in intervals.items():
        rows += [[label, *(f"{m:.4f} +-{h - m:.4f}" for m, h in zip(mean, high))]]
    print("\n" + title)
    print_table(rows)
    return intervals


def print_ratios(base, columns, table):
    """Every row over the row base, seed by seed: label -> geometric mean, low, high end (3, columns)."""
    ratios = {}
    rows = [[f"ratio to {base} [95 %]", *columns]]
    for label, a in table.items():
        ratio = ratios[label] = interval((a / table[base]).log()).exp()
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in ratio.T]
        rows += [[label, *cells]]
    print_table(rows)
    return ratios


def print_table(rows):
    """Lists of texts, the first a label: every column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for label, *cells in rows:
        cells = map(str.rjust, cells, widths[1:])
        print(label.ljust(widths[0]), *cells, sep="  ")


def band(ax, x, ends, label):
    """A line with its 95 % interval (3, k): x (k,)."""
    mean, low, high = ends
    line, = ax.plot(x, mean, label=label)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2)


def dots(ax, table, mark, xlabel):
    """A row for each label -> (mean, low, high), and a line at a value."""
    mean, low, high = zip(*table.values())
    ax.hlines(list(table), low, high)
    ax.plot(mean, list(table), "o")
    ax.axvline(mark, color="0.5", ls=":")
    ax.set(xlabel=xlabel)


# ---- 1. fisher -------------------------------------------------------------------------------------------
def fisher_traces(params, x_t, v, t):
    """Loss L and tr F = |grad L|^2 of every sample [FPO Eq. 9]: x_t, v (S, n, 2) -> two (S, n)."""
    def loss(params, x_t, v, t):                                        # one sample a seed: x_t, v (S, 1, 2)
        L = (forward(params, x_t, t) - v).square().mean((1, 2))
        return L.sum(), L                                               # each seed has its own gradient
    def trace(*sample):
        gradient, L = torch.func.grad(loss, has_aux=True)(params, *sample)
        return L, sum(g.square().flatten(1).sum(1) for g in gradient)
    by_sample = torch.vmap(trace, in_dims=1, out_dims=1, chunk_size=64)   # in chunks, to save memory
    return by_sample(*(a.unsqueeze(2) for a in (x_t, v, t)))


def overlap(a, b, q):
    """Share of a's top fraction q that is also in b's, along the last axis. Two random sets overlap by q."""
    k = round(q * a.shape[-1])
    in_a = a >= a.topk(k)[0][..., -1:]
    in_b = b >= b.topk(k)[0][..., -1:]
    return (in_a & in_b).sum(-1) / k


def fisher(args):
    """FPO's premise: high loss marks a high Fisher trace [FPO Prop. 3.1; Fig. 3: overlap above 70 %].
    Both depend on t, which alone would make them agree: hence the comparison at a shared t, too."""
    T, n = 16, 64
    t = (torch.arange(T) + 0.5) / T
    t = t.repeat_interleave(n).expand(len(args.seeds), -1)
    results = {}
    for name, data in args.sets.items():
        params = train(data, args.seeds, args.steps, ema=0)
        fresh_seeds = [7000 + seed for seed in args.seeds]
        x, eps, _ = next(batches(data, fresh_seeds, T * n, block=1))
        x_t, v = fpo.interpolate(x, eps, t)
        L, F = fisher_traces(params, x_t, v, t)
        table = {}
        for way, rows in ("random t", 1), ("shared t", T):              # every row is ranked by itself
            a, b = (one.unflatten(1, (rows, -1)) for one in (L, F))
            shares = [overlap(a, b, q).mean(1) for q in FRACTIONS]
            table[way] = torch.stack(shares, 1)
        results[name] = print_means(f"{name}: overlap of the top losses and the top traces", FRACTIONS, table)
    return fisher_figure(results)


def fisher_figure(results):
    fig = Figure((9, 4))
    for (name, shares), ax in zip(results.items(), fig.subplots(1, len(results))):
        for way, share in shares.items():
            band(ax, FRACTIONS, share, way)
        ax.plot(FRACTIONS, FRACTIONS, "k:", label="chance")
        ax.set(title=name, xlabel="q", ylabel="overlap of the top fractions q")
        ax.legend()
    _, twenty, _, eighty = shares["shared t"][0]
    return fig, (
        f"At a shared t the samples of highest loss and highest Fisher trace ({name})\n"
        f"overlap by {twenty:.0%} in the top 20 %, by {eighty:.0%} in the top 80 % (chance: 20 %, 80 %)")


# ---- 2. variance -----------------------------------------------------------------------------------------
def network_loss(data, path, seeds, steps, n=2048):
    """Mean loss of trained networks at every t of GRID -> (T,): an upper bound of the irreducible loss."""
    low, g, curve = GRID[0].item(), seeded(2), []
    timesteps = lambda u: low + (1 - low) * u
    params = train(data, seeds, steps, timesteps, path=path)
    for t in GRID.float():
        x, eps = data.sample(n, g), torch.randn(n, 2, generator=g)
        x_t, v = fpo.interpolate(x, eps, t.expand(n), path)
        v_hat = forward(params, x_t.expand(len(seeds), -1, 2), t)
        curve.append((v_hat - v).square().mean())
    return torch.stack(curve).double()


def variance(args):
    """VR draws t from pi(t) ~ h^2 V(t), the irreducible loss [VR Lemma 3.1]: which estimator finds it? At
    small t a noisy point still tells which of the M it came from: no variance there (see study/wide.py)."""
    data, g = data_sets()["8 Gaussians"], seeded(0)
    x = data.sample(2000, g)
    curves = {}                                                         # path -> label -> h^2 V (T,)
    for name, path in fpo.PATHS.items():
        alpha, sigma, d_alpha, d_sigma = path(GRID)
        snr, h2 = alpha / sigma, ((d_alpha * sigma - alpha * d_sigma) / sigma) ** 2
        V = {"exact": data.variance(GRID, path)}
        for M in (50, 200, 2000):
            V[f"Monte Carlo, M = {M}"] = fpo.posterior_variance(x[:M], snr, 40_000 // M, g)
        V["Gaussian"] = fpo.gaussian_posterior_variance(x, snr)
        V["network"] = network_loss(data, path, args.seeds[:4], args.steps) / h2
        curves[name] = {label: h2 * one for label, one in V.items()}
    print_locations(curves)
    return variance_figure(curves)


def print_locations(curves):
    """m of the logit-normal that is closest to each density of t: curves, path -> label -> h^2 V (T,)."""
    rows = [["m of the closest logit-normal (KS distance)", *curves]]
    for label in curves["linear"]:
        closest = [fpo.logit_normal_location(GRID, of_path[label]) for of_path in curves.values()]
        rows += [[label, *(f"{m:.2f} ({distance:.2f})" for m, distance in closest)]]
    print_table(rows)


def variance_figure(curves):
    fig = Figure((9, 3.6))
    for ax, (path, of_path) in zip(fig.subplots(1, 3), curves.items()):
        for label, curve in of_path.items():
            ax.plot(GRID, curve, label=label)
        ax.set(title=path, xlabel="t", ylabel="irreducible loss of 8 Gaussians")
        ax.set_ylim(0, 1.1 * of_path["exact"].max())
    ax.legend()
    share = {label: curve / curve.sum() for label, curve in curves["linear"].items()}
    wrong = lambda label: (share[label] - share["exact"]).abs().sum() / 2
    return fig, (
        f"Linear path: Monte Carlo on 200 points puts {wrong('Monte Carlo, M = 200'):.1%} "
        f"of the density of t at a wrong place,\nthe Gaussian closed form {wrong('Gaussian'):.1%}, "
        f"the loss of a trained network {wrong('network'):.1%}")


# ---- 3. race ---------------------------------------------------------------------------------------------
def fpo_of(beta, weigh=fpo.fpo_gradient_weights, **options):
    """FPO's policy; every seed ranks its own batch."""
    weigh = partial(weigh, beta=beta, **options)
    return SAME, lambda losses, t: torch.vmap(weigh)(losses)


def vr(V):
    """VR-sampling's policy with V (T,) on GRID, a tenth of it uniform."""
    pdf = fpo.vr_density(V, GRID).float()
    return lambda u: fpo.sample_timesteps(u, GRID, pdf), ONES


def policies(data):
    """name -> policy. The paper's beta is 2; N / 2 is a third of all weight. More: study/race.py."""
    return {
        "uniform": UNIFORM,
        "FPO, β = 2": fpo_of(2),
        "FPO, β = N/2": fpo_of(N / 2),
        "logit-normal t, m = 0": (fpo.logit_normal_timesteps, ONES),
        "VR": vr(data.variance(GRID, points=81))}


def compete(data, seeds, steps, methods):
    """Trains by every method: name -> MEASURES (S, 2), name -> samples (S, n, 2). Distance to the exact flow
    of other noise; E |v - E[v | x_t]|^2 / 2 over uniform t, which is the loss minus the irreducible loss."""
    fields = {"exact velocity": data.velocity}
    for method, policy in methods.items():
        fields[method] = partial(forward, train(data, seeds, steps, *policy))
    S, g = len(seeds), seeded(1)
    z, other = noise(seeds)
    n = len(other)
    y = fpo.heun(data.velocity, other, 100)
    t = torch.rand(n, generator=g)
    x, eps = data.sample(n, g), torch.randn(n, 2, generator=g)
    x_t, _ = fpo.interpolate(x, eps, t)
    exact = data.velocity(x_t, t)
    x_t, t = x_t.expand(S, -1, 2), t.expand(S, -1)
    samples, scores = {}, {}
    for method, v in fields.items():
        samples[method] = fpo.heun(v, z, 16)
        error = (v(x_t, t) - exact).square().mean((1, 2))
        distance = sliced_wasserstein(samples[method], y)
        scores[method] = torch.stack([distance, error], 1)
    return scores, samples


def race(args, policies=policies):
    """Does any policy beat uniform [FPO Table 5, 6; VR Table 2]? Floor: the exact velocity."""
    results = {}
    for name, data in args.sets.items():
        scores, _ = compete(data, args.seeds, args.steps, policies(data))
        print_means(name, MEASURES, scores)
        del scores["exact velocity"]
        results[name] = print_ratios("uniform", MEASURES, scores)
    return race_figure(args.steps, results, bias(args.seeds, args.steps * 3 // 2))


def bias(seeds, steps):
    """What FPO converges to: E[c (v_theta - v)] = 0, and c grows with the loss: rare targets pull v_theta.
    Between blobs of 80 % and 20 % the loss stays above 0, where [FPO Prop. 3.4] assumes that it goes to 0."""
    data = Mixture([[0.0, 0.0], [1.0, 0.0]], 0.15, [0.8, 0.2])
    methods = {"uniform": UNIFORM, "FPO, β = 2": fpo_of(2), "FPO, β = N/2": fpo_of(N / 2)}
    _, samples = compete(data, seeds, steps, methods)
    middle = data.c[:, 0].mean()
    shares = {method: (x[..., 0] > middle).float().mean(1, True) for method, x in samples.items()}   # (S, 1)
    return print_means(f"two blobs, {steps} steps", ["share of the 20 %"], shares)


def race_figure(steps, results, shares):
    fig = Figure((9, 4))
    *panels, right = fig.subplots(1, len(results) + 1)
    ticks = [1, 2, 5, 10]
    for ax, (name, ratios) in zip(panels, results.items()):
        distances = {method: ratio[:, 0] for method, ratio in ratios.items()}
        dots(ax, distances, 1, f"{name}: distance, ratio to uniform")
        ax.set(xscale="log", xticks=ticks, xticklabels=ticks)
        ax.minorticks_off()
    dots(right, shares, 0.2, "share of the 20 %")
    at_2, of_vr = distances["FPO, β = 2"][0], distances["VR"][0]
    rare = shares["FPO, β = N/2"][0].item()
    return fig, (
        f"After {steps} steps FPO (β = 2) is {at_2:.2f} times as far from the {name} as uniform, "
        f"VR {of_vr:.2f} times;\nafter {steps * 3 // 2} FPO (β = N/2) puts {rare:.1%} of all where 20 % are")


# ---- 4. samplers -----------------------------------------------------------------------------------------
def samplers(args):
    """Samplers on the exact velocity: distance to the exact flow of other noise against NFE.
    Floors: the exact flow itself and, for the random samplers, independent exact samples."""
    S, g = 8, seeded(0)
    data = data_sets()["8 Gaussians"]
    v = data.velocity
    z, other = noise(range(S))
    z, other = z.flatten(0, 1).double(), other.double()
    flow, y = (fpo.dopri5(v, start, 1e-9, 1e-9) for start in (z, other))
    distance = lambda x: sliced_wasserstein(x.unflatten(0, (S, -1)), y)
    sde = partial(fpo.euler_maruyama, v, z, generator=g)
    ends = {
        "Euler": partial(fpo.euler, v, z),
        "Heun": lambda nfe: fpo.heun(v, z, nfe // 2),
        "Euler-Maruyama, w = 1": partial(sde, w=1.0),
        "Euler-Maruyama, w = 2": sde,
        "Euler-Maruyama, w = 2, equal steps": partial(sde, last=0.0),
        "exact flow": lambda nfe: flow}
    table = {label: torch.stack([distance(end(k)) for k in NFES], 1) for label, end in ends.items()}
    independent = distance(data.sample(len(z), g).double())
    table["independent exact samples"] = torch.stack([independent] * len(NFES), 1)
    table = print_means("Sliced Wasserstein distance to the data, by evaluations of v", NFES, table)
    adaptive = {}                                                       # NFE -> distances (S,)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        counted = fpo.counted(v)
        x = fpo.dopri5(counted, z, tolerance, tolerance)
        adaptive[counted.nfe] = distance(x)
    distances = torch.stack([*adaptive.values()], 1)
    exact = print_means("the same", adaptive, {"Dormand-Prince": distances})
    return sampler_figure(table, list(adaptive), exact["Dormand-Prince"])


def sampler_figure(table, nfes, adaptive):
    fig = Figure((9, 4))
    ax = fig.subplots()
    for label, distances in table.items():
        band(ax, NFES, distances, label)
    band(ax, nfes, adaptive, "Dormand-Prince")
    ax.set(xlabel="evaluations of v", ylabel="sliced Wasserstein distance to the data")
    ax.loglog()
    fig.legend(loc="outside center right")
    at_16 = {label: distances[0, 2] for label, distances in table.items()}
    return fig, (
        f"At 16 evaluations Heun is {at_16['Heun']:.3f} from the data and Euler {at_16['Euler']:.3f};\n"
        f"Euler-Maruyama (w = 2) is {at_16['Euler-Maruyama, w = 2']:.3f}, "
        f"independent exact samples are {at_16['independent exact samples']:.3f}")


# ---- 5. meanflow -----------------------------------------------------------------------------------------
def pairs(data, seeds, count):
    """Yields z (S, N, 2), r <= t (S, N), v, E[v | z], count times; r = t in the first half of every batch."""
    for x, eps, u in islice(batches(data, seeds), count):
        other = u[:, :N // 2].repeat(1, 2)                              # independent of u in the second half
        t = torch.maximum(u, other)
        z, v = fpo.interpolate(x, eps, t)
        yield z, torch.minimum(u, other), t, v, data.velocity(z, t)


def running(side):
    """sum a / sum b over earlier batches, older ones fading, in side x side cells of r and t; 1 at first."""
    sums = torch.ones(2, side ** 2)
    def ratio(a, b, r, t):                                              # (S, n) each -> (S, n)
        nonlocal sums
        cell = side * (side * r).long() + (side * t).long()
        inside = torch.nn.functional.one_hot(cell, side ** 2).to(a)
        above, below = (sums @ inside.mT).unbind(1)
        sums = 0.99 * sums + torch.stack([a, b], 1) @ inside
        return above / below
    return ratio


def at(lam, u, z, r, t, v, mean):
    """MeanFlow's target with the tangent mean + lam (v - mean), mean = E[v | z] exact."""
    return fpo.mean_flow_target(u, z, r, t, v, mean + lam * (v - mean))


def own(u, z, r, t, v, mean):
    """lam = 0, with the network's own velocity for the exact one, as improved MeanFlow has it."""
    return at(0, u, z, r, t, v, u(z, t, t).detach())


def best(earlier, u, z, r, t, v, mean):
    """The target with the least noise, by the coefficient lam* of earlier batches."""
    T = at(0, u, z, r, t, v, mean)
    xi, A_xi = v - mean, T - at(1, u, z, r, t, v, mean)
    lam = earlier((xi * A_xi).sum(-1), A_xi.square().sum(-1), r, t)
    return T - lam[..., None] * A_xi


def mean_flow_loss(target, usual, params, *batch):
    """Mean of w |u - T|^2 -> (3 S,): S networks for each of WEIGHTINGS. Adaptive [MF]: 1 / w is
    |u - T|^2 + 1e-3. By cell, the mean of earlier losses at about that r and t takes the place of its own."""
    u = lambda z, r, t: forward(params, z, t, r)
    late = target(u, *(part[:, N // 2:] for part in batch))
    z, r, t, v, _ = batch
    T = torch.cat([v[:, :N // 2], late], 1)                             # T = v where r = t
    L = (u(z, r, t) - T).square().sum(-1)                               # (3 S, N)
    own_loss, ones = L.detach(), torch.ones_like(L)
    scales = ones, own_loss, usual(own_loss, ones, r, t)                # in the order of WEIGHTINGS
    scale = torch.cat([one.chunk(3)[k] for k, one in enumerate(scales)])
    return (L / (scale + 1e-3)).mean(1)


def gradient_variance(params, stream):
    """Without weights: lam* of the gradient (S, 1), its variance at LAMBDAS over that at lam = 1 (S, 8)."""
    params = [p.requires_grad_() for p in params]
    rows = []
    for lam in (0, 1):                                                  # linear in lam: two are enough
        for batch in stream:
            L = mean_flow_loss(partial(at, lam), running(1), params, *batch)
            g = torch.autograd.grad(L.sum(), params)
            rows.append(torch.cat([p.flatten(1) for p in g], 1))
    g = torch.stack(rows, 1)[:len(L) // 3]                              # (S, 2 batches, P), unweighted
    zero, one = (part - part.mean(1, True) for part in g.chunk(2, 1))
    A_xi = zero - one
    best_lam = torch.vmap(fpo.control_coefficient)(zero, A_xi)
    V = torch.stack([(zero - lam * A_xi).square().sum((1, 2)) for lam in LAMBDAS], 1)
    return best_lam[:, None], V / V[:, :1]


def one_step(data, seeds, stops):
    """Trains by every method, each seed with three weightings -> samples (3 S, n, 2), distances (S, 3) and,
    without weights, distance at stops (S, 5), mean loss since the last stop, the gradient's variance."""
    S, steps = len(seeds) // 3, stops[-1]
    stream = list(pairs(data, seeds, steps + 64))
    exact = [(z, r, t, mean, mean) for z, r, t, _, mean in stream]      # E[v | z] in both places
    z, other = noise(seeds)
    y = fpo.heun(data.velocity, other, 100)
    methods = {f"λ = {lam}": partial(at, lam) for lam in SWEEP} | {
        "λ*": partial(best, running(1)),
        "λ* by cell": partial(best, running(5)),
        "own velocity": own,
        "oracle": partial(at, 0)}
    samples, curves = {}, {}
    for method, target in methods.items():
        loss = partial(mean_flow_loss, target, running(5))
        losses, distances = [], []
        source = exact if method == "oracle" else stream
        for L, params in fit(new_nets(seeds), source, loss, steps):
            losses.append(L[:S])
            if len(losses) in stops:
                x = fpo.mean_flow(lambda x, r, t: forward(params, x, t, r), z)
                distances.append(sliced_wasserstein(x[:S], y))
        samples[method] = x
        curves[f"distance, {method}"] = torch.stack(distances, 1)
        losses = torch.stack(losses, 1).unflatten(1, (len(stops), -1))
        curves[f"loss, {method}"] = losses.mean(2)
        if method == "λ = 1":
            variance = gradient_variance(params, stream[steps:])
    for k in (1, 2, 100):
        samples[f"Heun, {k} steps"] = fpo.heun(data.velocity, z, k)
    table = {label: sliced_wasserstein(x, y).unflatten(0, (3, S)).T for label, x in samples.items()}
    return samples, table, curves, variance


def meanflow(args):
    """MeanFlow's target has v twice, to regress on and as tangent of du/dt [LV]: what does the second cost?
    8 seeds, half of the steps. Floor: Heun on the exact velocity; with 100 steps exact."""
    stops = [max(1, args.steps // 10) * k for k in range(1, 6)]
    run = partial(one_step, seeds=[*args.seeds[:8]] * 3, stops=stops)
    spawn = multiprocessing.get_context("spawn")                        # a core for each data set
    with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
        results = dict(zip(args.sets, pool.map(run, args.sets.values())))
    ratios = {}
    for name, (_, table, curves, (lam, V)) in results.items():
        print_means(f"{name}, {stops[-1]} steps: sliced Wasserstein distance", WEIGHTINGS, table)
        ratios[name] = print_ratios("λ = 1", WEIGHTINGS, table)
        print_means(f"{name}, no weights: after steps", stops, curves)
        print_means(f"{name}: variance of the gradient over that at λ = 1", ["λ*", *LAMBDAS],
                    {"networks of λ = 1": torch.cat([lam, V], 1)})
    return meanflow_figure(stops, results, ratios)


def meanflow_figure(stops, results, ratios):
    fig = Figure((10, 5.8))
    top, (*panels, middle, right) = fig.subplots(2, 4)
    samples, _, curves, _ = results["8 Gaussians"]
    for ax, label in zip(top, ("Heun, 100 steps", "λ = 1", "own velocity", "oracle")):
        ax.plot(*samples[label][0].T, ".", ms=2)
        ax.set(title=label, aspect="equal", xticks=[], yticks=[], xlim=(-2, 2), ylim=(-2, 2))
    for k, (name, result) in enumerate(results.items()):
        best_lam, V = result[-1]
        sweep = torch.stack([ratios[name][f"λ = {lam}"] for lam in SWEEP], 1)   # (3, 5, 3)
        for label, ratio in zip(WEIGHTINGS, sweep.unbind(2)):
            band(panels[k], SWEEP, ratio, label)
        panels[k].set(title=name, xlabel="λ", ylabel="distance, ratio to λ = 1")
        band(middle, LAMBDAS, interval(V), name)
        middle.axvline(best_lam.mean(), color=f"C{k}", ls=":", label=f"λ* = {best_lam.mean():.2f}")
    middle.set(title="variance of the gradient", xlabel="λ", ylabel="ratio to λ = 1")
    for label in ("loss, λ = 1", "loss, λ = 0", "distance, λ = 1"):
        curve = curves[label] / curves[label][:, :1]
        band(right, stops, interval(curve), label)
    right.set(title="8 Gaussians", xlabel="steps", ylabel=f"over that at {stops[0]} steps")
    for ax in (panels[0], middle, right):
        ax.legend()
    plain, adaptive, by_cell = ratios["8 Gaussians"]["λ = 0"][0]
    noiseless = ratios["8 Gaussians"]["oracle"][0, 0]
    return fig, (
        f"8 Gaussians: λ = 0 ends {plain:.2f} times as far from the data as MeanFlow's λ = 1, "
        f"the oracle {noiseless:.2f} times;\n"
        f"with MeanFlow's adaptive weights λ = 0 ends {adaptive:.1f} times as far, "
        f"with the same weights by cell {by_cell:.2f} times")


# ---- The command line ------------------------------------------------------------------------------------
EXPERIMENTS = {
    "fisher": fisher, "variance": variance, "race": race, "samplers": samplers, "meanflow": meanflow}


def main(experiments, sets, out):
    """Runs those of experiments, name -> function(args) -> figure, title, that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment", nargs="*", default="all", choices=["all", *experiments])
    parser.add_argument("--out", type=Path, default=out, help="folder of the figures")
    parser.add_argument("--seeds", type=int, default=16, help="how many, at least 4; meanflow uses at most 8")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    args = parser.parse_args()
    if args.seeds < 4:
        parser.error("--seeds: 4 or more are needed for an interval")
    args.out.mkdir(parents=True, exist_ok=True)
    args.seeds, args.sets = range(args.seeds), sets
    for name in experiments if "all" in args.experiment else args.experiment:
        fig, title = experiments[name](args)
        fig.suptitle(title, weight="bold")
        path = args.out / f"toy2d_{name}.png"
        fig.savefig(path)
        print(f"\n{title}\n-> {path}")


if __name__ == "__main__":
    main(EXPERIMENTS, data_sets(), "assets")
