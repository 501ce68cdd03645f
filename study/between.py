"""Why do logit-normal timesteps help on the digits and harm in two dimensions? What lies in between.

    python study/between.py         # writes between.csv for ablation.py --draw: 20 minutes of one core

The digits are projected on their first k principal components, with toy2d.py's two data sets beside them.
On each set one kind of network learns by four densities of t: uniform, logit-normal (m = 0), and two that are
logit-normal on one half of [0, 1] alone. They take samples from one end, and leave the other as it is."""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fpo
import toy2d
from data import font_digits

TABLE = Path(__file__).resolve().parent / "between.csv"
SEEDS, RATE, WIDTH = range(6), 2e-3, 256
STOPS = 100, 300, 1000                       # steps of training after which is measured
SAMPLES, HELD_OUT = 4096, 8192
DENSITIES = {                                # the median of t is 1/2 in all four
    "uniform": lambda u: u,
    "logit-normal": fpo.logit_normal_timesteps,
    "fewer at the data": lambda u: torch.where(u < 0.5, fpo.logit_normal_timesteps(u), u),
    "fewer at the noise": lambda u: torch.where(u < 0.5, u, fpo.logit_normal_timesteps(u)),
}


class Digits:
    """The digits on their first k principal components, scaled to unit mean square."""

    def __init__(self, k):
        pixels = torch.from_numpy(np.load(font_digits.ensure() / "latents.npy")).double().flatten(1)
        pixels = pixels[torch.randperm(len(pixels), generator=toy2d.seeded(0))]
        pixels = pixels - pixels.mean(0)
        _, axes = torch.linalg.eigh(pixels.T @ pixels)                   # the largest eigenvalue is last
        x = pixels @ axes[:, -k:]
        x = (x / x.square().mean().sqrt()).float()
        self.held_out, self.x = x[:HELD_OUT], x[HELD_OUT:]               # (HELD_OUT, k), the others

    def sample(self, n, generator):
        return self.x[torch.randint(len(self.x), (n,), generator=generator)]


def data_sets():
    sets = toy2d.data_sets()
    for data in sets.values():
        data.held_out = data.sample(8 * HELD_OUT, toy2d.seeded(5))
    return sets | {f"digits, k = {k}": Digits(k) for k in (2, 8, 32, 128)}


def distance(x, y):
    """Mean over 64 directions of the 1D Wasserstein distance: x (S, n, k), y (m, k), n divides m -> (S,)."""
    theta = torch.randn(x.shape[-1], 64, generator=toy2d.seeded(6))
    return toy2d.sliced_wasserstein(x, y, theta / theta.norm(dim=0))


@torch.no_grad()
def losses(params, data):
    """Velocity loss of held-out data in each tenth of t: (S, 10)."""
    x, g = data.held_out[:HELD_OUT], toy2d.seeded(7)
    t = (torch.arange(len(x)) + 0.5) / len(x)
    x_t, v = fpo.interpolate(x[torch.randperm(len(x), generator=g)], torch.randn(x.shape, generator=g), t)
    S = len(params[0])
    v_hat = toy2d.forward(params, x_t.expand(S, -1, -1), t.expand(S, -1))
    L = (v_hat - v).square().mean(-1)
    return torch.stack([part.mean(1) for part in L.tensor_split(10, 1)], 1)


def learn(data, timesteps):
    """Trains a network for every seed. Yields at STOPS the distance of its samples from held-out data (S,),
    and its losses (S, 10)."""
    k = data.held_out.shape[1]

    def loss(params, x, eps, u):
        t = timesteps(u)
        x_t, v = fpo.interpolate(x, eps, t)
        return (toy2d.forward(params, x_t, t) - v).square().mean((1, 2))

    u = torch.quasirandom.SobolEngine(k, True, 8).draw(SAMPLES)
    z = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).expand(len(SEEDS), -1, -1)
    nets = toy2d.new_nets(SEEDS, (5 * k + 8, WIDTH, WIDTH, WIDTH, k))
    stream = toy2d.batches(data, SEEDS, block=10)
    for step, (_, params) in enumerate(toy2d.fit(nets, stream, loss, STOPS[-1], rate=RATE), 1):
        if step in STOPS:
            with torch.no_grad():
                x = fpo.heun(lambda x, t: toy2d.forward(params, x, t), z, 25)
            yield step, distance(x, data.held_out), losses(params, data)


def floor(data):
    """What the data themselves get as samples: distances (S,), which no training can beat by much."""
    x = torch.stack([data.sample(SAMPLES, toy2d.seeded(9 + seed)) for seed in SEEDS])
    return distance(x, data.held_out)


def main():
    with open(TABLE, "w") as file:
        file.write("data,density,seed,step,distance," + ",".join(f"loss_t{k}" for k in range(10)) + "\n")
        for name, data in data_sets().items():
            for seed, far in zip(SEEDS, floor(data)):
                file.write(f'"{name}",none,{seed},0,{far:.6g}' + 10 * "," + "\n")
            for density, timesteps in DENSITIES.items():
                for step, far, L in learn(data, timesteps):
                    for seed, row in zip(SEEDS, torch.cat([far[:, None], L], 1).tolist()):
                        numbers = ",".join(f"{value:.6g}" for value in row)
                        file.write(f'"{name}",{density},{seed},{step},{numbers}\n')
                file.flush()
                print(f"{name}, {density}: distance {far.mean():.4f}, loss {L.mean():.4f}", flush=True)


if __name__ == "__main__":
    main()
