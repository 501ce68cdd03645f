"""race and fisher of toy2d.py with two more data sets and eleven more policies; figures in runs/race/.

    python study/race.py race --seeds 20 --steps 2000           # 20 minutes of one core
    python study/race.py fisher --seeds 20 --steps 4000"""
import math
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fpo
import toy2d
from toy2d import GRID, N, SAME, Mixture, circle, fpo_of, seeded, vr


def data_sets():
    """toy2d's and two curves, which are rows of Gaussians, closer than they are wide."""
    arc = circle(torch.linspace(0, math.pi, 60))
    moons = torch.cat([arc, torch.tensor([1, 0.5]) - arc])
    a = 3 * math.pi * torch.linspace(1 / 6, 1, 150).sqrt()              # nearly even along the curve
    spiral = a[:, None] * circle(a)
    return toy2d.data_sets() | {"two moons": Mixture(moons, 0.08), "spiral": Mixture(spiral, 0.25)}


def unbiased(V):
    """VR-sampling's policy with every loss divided by the density of its t."""
    pdf = fpo.vr_density(V, GRID).float()
    cell = (pdf[1:] + pdf[:-1]) / 2                                     # density between two grid points

    def weights(losses, t):
        k = torch.searchsorted(GRID.float(), t) - 1
        return 1 / cell[k.clamp(0, len(cell) - 1)]

    timesteps, _ = vr(V)
    return timesteps, weights


def policies(data):
    """toy2d's and eleven: VR by estimators that can be had without the density, and other weights."""
    alpha, sigma, _, _ = fpo.linear(GRID)
    snr, x = alpha / sigma, data.sample(2000, seeded(0))
    loss = toy2d.network_loss(data, fpo.linear, range(4), 500)
    _, weights = fpo_of(N / 2)
    return toy2d.policies(data) | {
        "FPO, β = N/2, minus mean at t": (SAME, lambda losses, t: weights(fpo.centred(losses, t), t)),
        "FPO, β = N/2, τ = 5": fpo_of(N / 2, tau=5.0),
        "hard samples, β = N/2": fpo_of(N / 2, weigh=fpo.hard_sample_weights),
        "VR, weights 1/π": unbiased(data.variance(GRID, points=81)),
        "VR, Monte Carlo, M = 200": vr(fpo.posterior_variance(x[:200], snr, 200, seeded(0))),
        "VR, Gaussian": vr(fpo.gaussian_posterior_variance(x, snr)),
        "VR, network": vr(loss * GRID ** 2),                            # h = 1 / t on this path
        "FPO, β = N/8": fpo_of(N / 8),
        "FPO, β = N/2, w detached": fpo_of(N / 2, weigh=fpo.fpo_weights),
        "min-SNR": (SAME, lambda losses, t: torch.vmap(fpo.min_snr_weights)(t)),
        "P2": (SAME, lambda losses, t: torch.vmap(fpo.p2_weights)(t))}


if __name__ == "__main__":
    experiments = {"fisher": toy2d.fisher, "race": partial(toy2d.race, policies=policies)}
    toy2d.main(experiments, data_sets(), "runs/race")
