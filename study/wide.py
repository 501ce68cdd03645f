"""variance of toy2d.py in high dimension: which estimator finds the density of t of VR-sampling there?

    python study/wide.py                # a table, and wide.png: 2 minutes of one core

At small t a noisy point still tells which of the M points it came from, and Monte Carlo finds no variance
there. The oracle is the closed form, exact for Gaussian data: white noise, and fields with the power spectrum
|f|^-2 of natural images, by their Fourier coefficients, which are independent. The digits stand beside them.
Real latents are neither Gaussian nor as steep."""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import fpo
import toy2d
from data import font_digits
from toy2d import GRID

FIELDS = (0, 4, 32), (1, 3, 32), (1, 4, 32), (1, 4, 64)                 # slope, channels, side


def wide_data(g):
    """label -> points (M, d), M = 200 unless it says otherwise, and eigenvalues of the covariance (d,)."""
    x = torch.from_numpy(np.load(font_digits.ensure() / "latents.npy")).double().flatten(1)
    x = x[torch.randperm(len(x), generator=g)]
    x = (x - x.mean(0)) / x.var(0).mean().sqrt()
    power = torch.linalg.eigvalsh(x.T @ x / len(x)).clamp_min(0)
    sets = {"digits, d = 256": (x[:200], power), "digits, d = 256, M = 2000": (x[:2000], power)}
    for slope, channels, side in FIELDS:
        f = torch.fft.fftfreq(side, 1 / side, dtype=x.dtype)
        f2 = f[:, None] ** 2 + f ** 2
        power = f2.clamp_min(1) ** -slope
        power = (power / power.mean()).flatten().repeat(channels)
        z = torch.randn(200, len(power), dtype=x.dtype, generator=g)
        sets[f"|f|^-{2 * slope}, d = {len(power)}"] = z * power.sqrt(), power
    return sets


def estimates(sets, path, g):
    """label -> h^2 V (T,) by both estimators."""
    alpha, sigma, d_alpha, d_sigma = path(GRID)
    snr, h2 = alpha / sigma, ((d_alpha * sigma - alpha * d_sigma) / sigma) ** 2
    curves = {}
    for label, (points, power) in sets.items():
        curves[f"{label}, Monte Carlo"] = h2 * fpo.posterior_variance(points, snr, 100_000 // len(points), g)
        curves[f"{label}, Gaussian"] = h2 * (power / (1 + snr[:, None] ** 2 * power)).mean(1)
    return curves


def main():
    g = toy2d.seeded(0)
    sets = wide_data(g)
    curves = {name: estimates(sets, path, g) for name, path in fpo.PATHS.items()}
    toy2d.print_locations(curves)
    fig, curves = Figure((6, 4.5)), curves["linear"]
    ax = fig.subplots()
    for k, (label, curve) in enumerate(curves.items()):
        density = curve / torch.trapezoid(curve, GRID)
        if label.endswith("Monte Carlo"):
            ax.plot(GRID, density, f"C{k // 2}", label=label)
        else:
            ax.plot(GRID, density, f"C{k // 2}--")
    ax.set(xlabel="t", ylabel="density of t (dashed: Gaussian)", ylim=(0, 10))
    ax.legend()
    late = GRID > 0.9
    share = {label: curve[late].sum() / curve.sum() for label, curve in curves.items()}
    mc, exact = (share[f"|f|^-0, d = 4096, {estimator}"] for estimator in ("Monte Carlo", "Gaussian"))
    title = ("Share of the density of t above 0.9, 200 points of white noise in d = 4096:\n"
             f"{mc:.0%} by Monte Carlo, {exact:.0%} by the closed form, which is exact")
    fig.suptitle(title, weight="bold")
    fig.savefig(HERE / "wide.png")
    print("\n" + title)


if __name__ == "__main__":
    main()
