r"""Train a SiT by flow matching with representation alignment (REPA), Fisher Policy Optimization (FPO) and VR-sampling.

    python train_sit.py                                     # the embedded digits: minutes on two CPU cores
    python train_sit.py --baseline --out runs/plain         # a plain SiT: no REPA, no FPO, uniform timesteps
    torchrun --nproc_per_node 8 train_sit.py --data LATENTS --out runs/xl --model SiT-XL/2 --lr 1e-4 --batch 256 \
        --steps 400000 --warmup 0 --ema 0.9999 --save_every 10000 --sample_every 10000

Read top to bottom: flags, network, data, timesteps, checkpoints, pictures, --bench, the training loop. What the loop
optimises is in fpo.py. The run does not depend on the number of processes: data order, noise, timesteps, label
drops and FPO's ranking belong to the global batch, and every process takes its slice. Letters as in fpo.py.
"""
import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import fpo

# ------------------------------------------------------------------------------------------------------------------
# Flags


@dataclasses.dataclass
class Config:
    out: str = "runs/digits"              # folder of the run; it goes on from the newest checkpoint in there
    data: str = "data/font_digits"        # folder of the data set; the default is drawn if it is missing
    model: str = "tiny"                   # network
    baseline: bool = False                # plain SiT: the same as --no-repa --fpo off --timesteps uniform
    path: str = "linear"                  # interpolant
    predict: str = "v"                    # what the network outputs and the loss compares
    repa: bool = True                     # align hidden tokens with the data's features
    repa_weight: float = 0.5              # lambda of the alignment loss
    align: str = "cosine"                 # alignment: a loss of REPA, or vrpo: as a reward
    vrpo_weights: str = "fixed"           # VRPO: 0.3, 0.5, 0.2, or by the inverse variance of each reward
    vrpo_stability: float = 0.25          # VRPO: share (0 or 1/k) of the batch seen at a neighbouring t, too
    vrpo_near: float = 0.02               # VRPO: how much smaller the neighbouring t is
    vrpo_eta: float = 0.1                 # VRPO: how much the coefficient grows with the variance of the reward
    fpo: str = "both"                     # losses that FPO reweights (VRPO has coefficients of its own)
    r: float = 0.8                        # FPO: share of the batch that competes for the boost
    beta: float = 2.0                     # FPO: size of the boost, which is beta out of batch + beta
    tau: float = 1.0                      # FPO: temperature; not given in the paper
    fpo_align_from: float = 0.9           # FPO reweights the alignment loss only at t >= this
    fpo_centre: bool = False              # FPO compares velocity losses after taking out their mean near that t
    weighting: str = "uniform"            # policy for the velocity loss when FPO is off there
    timesteps: str = "vr_gaussian"        # how t is drawn
    vr_uniform: float = 0.1               # uniform share of the VR density
    logit_mean: float = 0.0               # location of logit-normal t (the papers' m is minus this)
    label_dropout: float = 0.1            # share of labels replaced by the null label, for guidance
    steps: int = 1400                     # optimiser steps in all
    batch: int = 128                      # images per step over all processes
    lr: float = 2e-3                      # learning rate after warm-up, constant
    warmup: int = 100                     # steps of linear warm-up
    clip: float = 1.0                     # gradient norm clip; 0: none
    ema: float = 0.999                    # decay of the weight average; in the first steps (1 + step) / (10 + step)
    amp: str = "auto"                     # auto: bf16 where this hardware runs it faster
    seed: int = 0                         # seed of everything
    log_every: int = 20                   # steps between rows of log.csv
    sample_every: int = 700               # steps between pictures
    save_every: int = 350                 # steps between checkpoints
    keep: int = 2                         # checkpoints kept
    guidance: float = 2.0                 # guidance of the pictures
    init: str = ""                        # checkpoint, ours or published, whose weights a new run starts from
    encoder: str = ""                     # encoder run on the data's images in place of features: dinov2_vitb14
    accumulate: int = 1                   # parts that a process's batch is cut into; FPO then takes a forward pass more
    checkpointing: bool = False           # recompute the blocks in the backward pass: less memory, more time
    compile: str = "auto"                 # compile the blocks; auto: on CUDA
    bench: int = 0                        # time this many steps after as many others, and keep nothing


SIZES = {"S": (12, 384, 6, 4), "B": (12, 768, 12, 4), "L": (24, 1024, 16, 8), "XL": (28, 1152, 16, 8)}
MODELS = {"tiny": dict(depth=6, width=160, heads=5, encoder_depth=2, patch=4, projector_width=256),
          "micro": dict(depth=4, width=64, heads=2, encoder_depth=2, patch=4, projector_width=128)}
MODELS |= {f"SiT-{size}/{patch}": dict(zip(("depth", "width", "heads", "encoder_depth"), SIZES[size]), patch=patch)
           for size in SIZES for patch in (2, 4, 8)}
VRPO_WEIGHTS = {"fixed": (0.3, 0.5, 0.2), "inverse_variance": None}              # fidelity, semantic, stability
SHARE, AMOUNT, COUNT = (0, 1), (0, math.inf), (1, math.inf)
ACCEPTED = dict(                          # a list of names, or the least and the largest value
    model=list(MODELS), path=list(fpo.PATHS), predict=["v", "x", "eps"], align=["cosine", "nt_xent", "vrpo"],
    vrpo_weights=list(VRPO_WEIGHTS), vrpo_stability=SHARE, vrpo_near=SHARE, vrpo_eta=AMOUNT,
    fpo=["off", "velocity", "alignment", "both"], weighting=["uniform", "hard_sample", "p2", "min_snr"],
    timesteps=["uniform", "logit_normal", "vr_gaussian", "vr_monte_carlo", "vr_loss"], amp=["auto", "bf16", "fp32"],
    compile=["auto", "on", "off"], accumulate=COUNT, bench=AMOUNT, steps=(1, 9_999_999), batch=COUNT, log_every=COUNT,
    sample_every=COUNT, save_every=COUNT, keep=COUNT, warmup=AMOUNT, guidance=(0, 1000), logit_mean=(-100, 100),
    lr=AMOUNT, clip=AMOUNT, repa_weight=AMOUNT, ema=SHARE, vr_uniform=SHARE, label_dropout=SHARE, fpo_align_from=SHARE,
    seed=(0, 2 ** 31))
# Flags that may change when a run goes on
FREE_ON_RESUME = ("out data steps amp log_every sample_every save_every keep guidance baseline init accumulate "
                  "checkpointing compile bench").split()
LOG = "step loss align grad_norm moved ess lr images_per_s reward reward_std".split()      # README says what they are


def fail(message, anywhere=False):
    """End the program with one line, said by process 0 only unless anywhere."""
    speak = anywhere or os.environ.get("RANK", "0") == "0"
    sys.exit(f"{Path(sys.argv[0]).name}: {message}" if speak else 1)


def parse_flags(kind, accepted, argv=None, description=None):
    """An instance of the dataclass kind from the command line: a flag for each field, its comment as the help."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(kind), re.M))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for field in dataclasses.fields(kind):
        name, default, range_ = field.name, field.default, accepted.get(field.name)
        options = dict(default=default, help=f"{comments[name]} (default: {default})")
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options.update(nargs="*", type=type((default + (0,))[0]))
        else:
            options.update(type=type(default), choices=range_ if isinstance(range_, list) else None)
        parser.add_argument(f"--{name}", **options)
    values = vars(parser.parse_args(argv))
    for name, range_ in accepted.items():
        if isinstance(range_, tuple) and not range_[0] <= values[name] <= range_[1]:
            fail(f"--{name} {values[name]}: a number from {range_[0]} to {range_[1]} is accepted")
    return kind(**values)


# ------------------------------------------------------------------------------------------------------------------
# The network: SiT as published, with the published state-dict names


def position_embedding(width, side):
    """Fixed 2D sin-cos code (side * side, width), in the official element order: the column's half, then the row's."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (column, row)]                           # each (T, D / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1).float()


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def time_frequencies(like):
    """The 128 frequencies of time_features, on the device and in the dtype of a tensor."""
    return 10000.0 ** (-torch.arange(128, device=like.device, dtype=like.dtype) / 128)


def time_features(t):
    """256 sinusoids of raw t in [0, 1]: (B,) -> (B, 256)."""
    angles = t.float()[:, None] * time_frequencies(t.float())
    return torch.cat([torch.cos(angles), torch.sin(angles)], 1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # (B, heads, T, D / heads)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:        # there the fused kernel is several times slower
            out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Transformer block with adaLN-Zero: the identity at initialisation."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, 1)))


class SiT(nn.Module):
    """Scalable interpolant transformer. feature_dim: width D of the alignment targets; None: no projector.

    forward(x (B, C, H, W), t (B,), y (B,)) -> (B, C, H, W), the velocity; with features=True also the projected tokens
    z (B, T, feature_dim) of block encoder_depth; with features="only" just z. The projector runs only when asked.
    """

    def __init__(self, size=32, channels=4, num_classes=1000, depth=28, width=1152, heads=16, patch=2, encoder_depth=8,
                 feature_dim=None, projector_width=2048):
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ValueError(f"SiT: {size} x {size} latents do not cut into patches of {patch} or {width} into {heads}")
        self.arch = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.channels, self.encoder_depth, self.num_classes = patch, channels, encoder_depth, num_classes
        self.checkpointing = False                     # True: keep no activations of the blocks, recompute them
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.register_buffer("pos_embed", position_embedding(width, size // patch)[None])
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})  # last: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        P = projector_width
        self.projectors = nn.ModuleList() if feature_dim is None else nn.ModuleList([nn.Sequential(
            nn.Linear(width, P), nn.SiLU(), nn.Linear(P, P), nn.SiLU(), nn.Linear(P, feature_dim))])
        self.initialize()

    def initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches, time = self.x_embedder["proj"], self.t_embedder["mlp"]
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
        nn.init.zeros_(patches.bias)
        for layer in (time[0], time[2], self.y_embedder["embedding_table"]):
            nn.init.normal_(layer.weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y, features=False):
        B, C, H, W = x.shape
        p = self.patch
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed      # (B, T, D)
        c = self.t_embedder["mlp"](time_features(t)) + self.y_embedder["embedding_table"](y)   # (B, D)
        if recompute := self.checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint              # not at the top: in torch 2.6 it takes 0.3 s
        for depth, block in enumerate(self.blocks, 1):
            h = checkpoint(block, h, c, use_reentrant=False) if recompute else block(h, c)
            if features and depth == self.encoder_depth:
                z = self.projectors[0](h)                                               # (B, T, feature_dim)
                if features == "only":
                    return z
        out = self.final_layer(h, c).view(B, H // p, W // p, p, p, C)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return (out, z) if features else out


def as_velocity(model, predict="v", path="linear"):
    """The network as a velocity model(x, t, y), whichever of v, x and eps it outputs."""
    if predict == "v":
        return model
    convert = {"x": fpo.velocity_from_x, "eps": fpo.velocity_from_eps}[predict]
    return lambda x, t, y: convert(model(x, t, y), x, t, fpo.PATHS[path], floor=0.05)


# ------------------------------------------------------------------------------------------------------------------
# The data: one folder, memory-mapped


class Latents:
    """latents.npy (N, C or 2C, H, W), labels.npy (N,), features.npy (N, T, D) or images.npy if asked for, meta.json.

    REPA's and fast-DiT's folders are read as they lie (data/imagenet.py repacks them, which is faster to read).
    What the model sees is (latents - bias) * scale; with meta["moments"] the channels are mean and std, sampled first.
    Raises ValueError, in one line, for a folder that no model should be trained on.
    """

    def __init__(self, folder, features=False, images=False):
        self.folder = Path(folder)
        wanted = ["latents", "labels"] + ["features"] * features + ["images"] * images
        try:
            if (self.folder / "meta.json").exists():
                self.meta = json.loads((self.folder / "meta.json").read_text())
                arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                          for name in wanted}
            else:
                from data import imagenet
                self.meta, arrays = imagenet.read_foreign(self.folder)
                arrays = {name: arrays[name] for name in wanted}
            self.classes, _ = int(self.meta["num_classes"]), self.meta["scale"] + self.meta["bias"]           # numbers
            shapes = {name: array.shape for name, array in arrays.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data folder {folder} lacks a part, or it cannot be read (--no-repa needs no features, "
                             f"--encoder takes images): {type(error).__name__} {error}") from None
        self.latents, self.labels = arrays["latents"], arrays["labels"]
        self.targets = arrays.get("features", arrays.get("images"))          # REPA's, or what its encoder looks at
        self.moments = bool(self.meta.get("moments", False))
        accepted = dict(latents=(4, "iuf"), labels=(1, "iu"), features=(3, "iuf"), images=(4, "iu"))    # axes, dtypes
        wrong = [name for name, (axes, kinds) in accepted.items() if name in arrays
                 and (len(shapes[name]) != axes or arrays[name].dtype.kind not in kinds)]
        shape = shapes["latents"]
        if (wrong or len({lengths[0] for lengths in shapes.values()}) > 1 or 0 in shape or shape[2] != shape[3]
                or self.moments and shape[1] % 2):
            raise ValueError(f"data folder {folder}: latents (N, C, H, H), labels (N,) of whole numbers, features "
                             f"(N, T, D) and images (N, 3, S, S) if any are needed, not {shapes}")
        if isinstance(self.labels, np.ndarray):                              # files one by one: only as they are read
            self.check(self.labels)
        self.channels, self.size = self.latents.shape[1] // (2 if self.moments else 1), self.latents.shape[2]

    def check(self, labels):
        """ValueError for a label that is no class."""
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(f"data folder {self.folder}: labels from {labels.min()} to {labels.max()}, but 0 to "
                             f"{self.classes - 1} are accepted (num_classes in meta.json)")

    def batch(self, rows):
        """Rows (B,) as they lie on disk: latents, labels, and targets (features or images) or None."""
        take = lambda a: None if a is None else torch.from_numpy(a[rows])
        labels = self.labels[rows]
        self.check(labels)
        return take(self.latents), torch.from_numpy(labels).long(), take(self.targets)

    def see(self, latents, noise):
        """What the model sees: (B, C or 2C, H, W) from the disk, noise (B, C, H, W) -> (B, C, H, W) float32."""
        x = latents.float()
        if self.moments:
            mean, std = x.chunk(2, 1)
            x = mean + std * noise
        return (x - self.meta["bias"]) * self.meta["scale"]

    def some(self, n, seed=0):
        """n random images as the model sees them (fewer if there are fewer)."""
        rows = np.random.RandomState(seed).permutation(len(self.labels))[:n]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(rows), self.channels, self.size, self.size, generator=generator)
        return self.see(torch.from_numpy(self.latents[rows]), noise)

    def describe(self):
        """What the model will see, in one line; ValueError when its deviation is far from 1."""
        x = self.some(2048)
        if not 0.5 < x.std() < 2:
            raise ValueError(f"the model would see latents of deviation {x.std():.3g}, far from 1 (0.5 to 2 is "
                             f"accepted): is the scale {self.meta['scale']} in meta.json wrong?")
        mean, std = ([round(v, 3) for v in f(x, dim=(0, 2, 3)).tolist()] for f in (torch.mean, torch.std))
        targets = "none" if self.targets is None else tuple(self.targets.shape[1:])
        return (f"data: {len(self.labels)} latents {tuple(x.shape[1:])}, {self.classes} classes, targets {targets}; "
                f"the model sees mean {mean} deviation {std}")


def seed_of(seed, n):
    """The seed of the n-th step or image: 32 bits, all that a generator on a CPU keeps. n alone where seed = 0."""
    return (seed * 0x9E3779B1 + n) % 2 ** 32


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.RandomState([seed, epoch]).permutation(n)


def rows_of(step, batch, seed, n):
    """The rows (batch,) of the global batch at step: one endless stream of epochs, each in its own order."""
    position = step * batch + np.arange(batch)
    return np.array([permutation(seed, int(p // n), n)[p % n] for p in position])


# ------------------------------------------------------------------------------------------------------------------
# Timesteps


class Timesteps:
    """Draws t (B,) from uniform u (B,). The VR kinds hold a density on a grid; it is part of the checkpoint."""

    def __init__(self, cfg, data, device, state=None):
        self.kind, self.uniform, self.mean, self.predict = cfg.timesteps, cfg.vr_uniform, cfg.logit_mean, cfg.predict
        self.least = fpo.FIRST_T[cfg.path]
        bins, self.path = 100 if self.kind == "vr_loss" else 1000, fpo.PATHS[cfg.path]
        state = state or self.start(cfg, data, device, bins)
        self.state = {name: value.to(device) for name, value in state.items()}

    def start(self, cfg, data, device, bins):
        """The density of a new run, which may take a while: an eigenvalue problem of the size of the latents."""
        t = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins).clamp_min(self.least)
        alpha, sigma, _, _ = self.path(t)
        V, pdf = None, torch.ones_like(t)
        if self.kind == "vr_gaussian":
            crop = slice(max(0, data.size - 32) // 2, (data.size + 32) // 2)
            d = data.channels * min(32, data.size) ** 2                # a part sees less, so it stays an upper bound
            x = data.some(max(8192, 4 * d))[:, :, crop, crop].flatten(1)
            x = x.to("cpu" if torch.device(device).type == "mps" else device)
            V = fpo.gaussian_posterior_variance(x, (alpha / sigma).to(x.device)).cpu()
        elif self.kind == "vr_monte_carlo":
            generator = torch.Generator().manual_seed(cfg.seed)
            V = fpo.posterior_variance(data.some(200, cfg.seed).flatten(1), alpha / sigma, 500, generator)
        if V is not None:
            pdf = fpo.vr_density(V, t, self.path, self.uniform)
        state = {"t": t, "pdf": pdf, "loss": torch.zeros_like(t), "count": torch.zeros_like(t)}
        return {name: value.float() for name, value in state.items()}

    def draw(self, u):
        """u (B,) uniform in [0, 1) -> t (B,)."""
        if self.kind == "uniform":
            return u.clamp_min(self.least)
        if self.kind == "logit_normal":
            return fpo.logit_normal_timesteps(u, self.mean).clamp_min(self.least)
        return fpo.sample_timesteps(u, self.state["t"], self.state["pdf"])

    def update(self, t, losses, decay=0.99):
        """vr_loss: the density follows the mean loss at each t, the network's own estimate of h^2 V [VR Lemma 3.1]."""
        if self.kind != "vr_loss":
            return
        s, bins = self.state, len(self.state["t"])
        alpha, sigma, d_alpha, d_sigma = self.path(t)
        delta = alpha * d_sigma - d_alpha * sigma
        losses = losses * {"v": 1, "x": (delta / sigma.clamp_min(0.05)) ** 2,             # to the loss in velocity
                           "eps": (delta / alpha.clamp_min(0.05)) ** 2}[self.predict]
        bin = (t * bins).long().clamp(0, bins - 1)
        member = (bin[:, None] == torch.arange(bins, device=t.device)).float()          # (B, bins)
        s["loss"], s["count"] = decay * s["loss"] + losses @ member, decay * s["count"] + member.sum(0)
        mean = s["loss"].sum() / s["count"].sum()
        curve = torch.where(s["count"] > 0, s["loss"] / s["count"].clamp_min(1e-9), mean)
        s["pdf"] = (1 - self.uniform) * curve / curve.mean() + self.uniform


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(folder, state, keep):
    """Write folder/step-NNNNNNN.pt whole or not at all, and remove all but the newest keep."""
    path = Path(folder) / f"step-{state['step']:07d}.pt"
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:                           # a full disk: torch.save says RuntimeError
        draft.unlink(missing_ok=True)
        reason = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
        raise ValueError(f"cannot write {path} ({str(reason).splitlines()[0]}); the last whole checkpoint: "
                         f"{newest_checkpoint(folder) or 'none yet'}") from None
    for old in (*sorted(Path(folder).glob("step-*.pt"))[:-keep], *Path(folder).glob("step-*.tmp")):
        old.unlink()


def newest_checkpoint(folder):
    """The newest checkpoint of a run, or None."""
    return max(Path(folder).glob("step-*.pt"), default=None)


def read_checkpoint(path):
    """A checkpoint's content, read without running any code in it; ValueError if it is none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}") from None
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint that can be read ({type(error).__name__})") from None


def arch_of(state):
    """The SiT arguments that a state dict with the published names was made with."""
    out, width = state["final_layer.linear.bias"].numel(), state["pos_embed"].shape[-1]
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    arch = dict(size=math.isqrt(state["pos_embed"].shape[1]) * patch, channels=channels, width=width, patch=patch,
                depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
                num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
    like = next((m for m in MODELS.values() if (m["width"], m["depth"]) == (width, arch["depth"])), None)
    if like is None:                                                   # the number of heads cannot be told from weights
        raise KeyError(f"no known model has width {width} and depth {arch['depth']}")
    arch.update(heads=like["heads"], encoder_depth=like["encoder_depth"])
    if "projectors.0.4.weight" in state:
        arch.update(zip(("feature_dim", "projector_width"), state["projectors.0.4.weight"].shape))
    return arch, out // (patch * patch * channels)


def from_sit(state, arch):
    """Official SiT weights in our convention: v(x, t) = -v_SiT(x, 1 - t), first half of the 2C outputs, all exactly.

    cos and sin of w (1 - t) are a rotation of cos and sin of w t, so the reversal of time folds into mlp.0.
    """
    state, p, C = dict(state), arch["patch"], arch["channels"]
    for name in ("weight", "bias"):
        last = state[f"final_layer.linear.{name}"]
        state[f"final_layer.linear.{name}"] = -last.view(p * p, 2 * C, -1)[:, :C].reshape(p * p * C, *last.shape[1:])
    W = state["t_embedder.mlp.0.weight"].double()
    w, (on_cos, on_sin) = time_frequencies(W), W.chunk(2, 1)
    W = torch.cat([on_cos * w.cos() + on_sin * w.sin(), on_cos * w.sin() - on_sin * w.cos()], 1)
    state["t_embedder.mlp.0.weight"] = W.to(state["t_embedder.mlp.0.weight"].dtype)
    return state


def load_model(path, ema=True):
    """(model, config) from our checkpoint, REPA's or an official SiT state dict; the model in eval mode on the CPU.

    config: dict with path, predict, step and the data's meta where known. The model is always in our convention, t = 0
    data and v = alpha' x + sigma' eps (as_velocity gives v from a network that outputs x or eps). ValueError otherwise.
    """
    saved = read_checkpoint(path)
    config = {"path": "linear", "predict": "v", "meta": None, "step": None}
    try:
        if "config" in saved:                                                          # ours
            config.update(saved["config"], meta=saved["meta"], step=saved["step"])
            state, arch = saved["ema" if ema else "model"], saved["arch"]
        else:
            state = saved["ema" if ema else "model"] if "model" in saved else saved     # REPA, or the bare dict of SiT
            config["step"] = saved.get("steps")
            arch, doubled = arch_of(state)
            state = from_sit(state, arch) if doubled == 2 else state
        model = SiT(**arch)
        model.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        raise ValueError(f"{path} holds another architecture than SiT ({reason})") from None
    return model.eval().requires_grad_(False), config


def start_from(path, model, cfg):
    """Copy the weights of another checkpoint, its average, into model; only the projector may differ."""
    other, config = load_model(path)
    if (config["path"], config["predict"]) != (cfg.path, cfg.predict):
        raise ValueError(f"--init {path} was trained with --path {config['path']} --predict {config['predict']}")
    ours, theirs = model.state_dict(), other.state_dict()
    fits = {k: v for k, v in theirs.items() if k in ours and ours[k].shape == v.shape}
    differ = [k for k in ours.keys() | theirs.keys() if k not in fits and not k.startswith("projectors")]
    if differ or model.arch["heads"] != other.arch["heads"]:
        raise ValueError(f"--init {path} has another architecture or other data: {other.arch}, not {model.arch}")
    model.load_state_dict({**ours, **fits})


# ------------------------------------------------------------------------------------------------------------------
# Pictures


def write_curves(log, path):
    """log.csv -> a picture of its losses."""
    from matplotlib.figure import Figure
    rows = list(csv.DictReader(open(log)))
    if not rows:
        return
    names = {"loss": "velocity loss", "align": "alignment loss", "grad_norm": "gradient norm"}
    columns = [name for name in names if rows[0][name]]
    figure = Figure((4 * len(columns), 3), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        axis.plot([int(r["step"]) for r in rows], [float(r[column]) for r in rows])
        axis.set(xlabel="step", title=names[column])
    figure.savefig(path, dpi=100)


def write_pictures(model, cfg, meta, name):
    """The losses, and samples at cfg.guidance by sample.py: ten rows, one for each of the first ten classes."""
    import sample
    rows = np.arange(10 * min(10, model.num_classes))
    settings = sample.Config(seed=cfg.seed, guidance=cfg.guidance, steps=20, classes=tuple(rows // 10))
    x, _, _ = sample.generate(model, dataclasses.asdict(cfg), settings, rows, next(model.parameters()).device)
    sample.write_grid(sample.to_pixels(x, meta).numpy(), Path(cfg.out) / name)
    write_curves(Path(cfg.out) / "log.csv", Path(cfg.out) / "loss.png")


# ------------------------------------------------------------------------------------------------------------------
# --bench


def forward_flops(model, features):
    """Floating-point operations of one image's forward pass, matrix products alone, 2 for each multiply-add."""
    a, T = model.arch, model.pos_embed.shape[1]
    D, P, pixels = a["width"], a["projector_width"], a["patch"] ** 2 * a["channels"]
    block = 2 * T * 12 * D * D + 4 * T * T * D + 2 * 6 * D * D      # qkv, proj, mlp; attention's two products; adaLN
    ends = 2 * T * 2 * D * pixels + 2 * (256 * D + D * D) + 2 * 2 * D * D       # patches in and out; time; final adaLN
    return a["depth"] * block + ends + (2 * T * (D * P + P * P + P * a["feature_dim"]) if features else 0)


def matmul_rate(device, dtype):
    """Measured FLOP/s of large square matrix products: the roof of the device."""
    n = 8192 if device.type == "cuda" else 1024
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        (a @ a)[0, 0].item()                                           # waits for all of them
        best = min(best, time.perf_counter() - start)
    return 6 * 2 * n ** 3 / best


def bench_report(cfg, model, data, device, world, images_per_s):
    """Print images/s, model FLOP/s (3 forward passes a step), their share of the roof, and the speed of reading."""
    flops = 3 * forward_flops(model, cfg.repa) * images_per_s
    roof = world * matmul_rate(device, torch.bfloat16 if cfg.amp == "bf16" else torch.float32)
    start, n = time.time(), len(data.labels)
    for step in range(5):
        data.batch(rows_of(step, cfg.batch, cfg.seed + 1, n))
    memory = f"; peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB" if device.type == "cuda" else ""
    print(f"\n{images_per_s / cfg.batch:.2f} steps/s, {images_per_s:.0f} images/s; {flops / 1e12:.2f} TFLOP/s of the "
          f"model, {flops / roof:.0%} of {roof / 1e12:.2f} in large {cfg.amp} matrix products{memory}\n"
          f"reading: {5 * cfg.batch / (time.time() - start):.0f} images/s from {data.folder} by one thread (3 read)")


# ------------------------------------------------------------------------------------------------------------------
# Training


def start_processes():
    """rank, world, device: alone, or one of torchrun's."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


AGREED = torch.zeros(2, dtype=torch.long)      # kept: torch 2.6 can hang at the end while gloo frees its last tensor


def together(work, rank, world, signals=()):
    """work() in every process -> its result, and the highest signal that any process got.

    Where it raises OSError, ValueError or ArithmeticError in one process, all end: the first says why, in one line. A
    barrier.
    """
    result = error = None
    try:
        result = work()
    except (OSError, ValueError, ArithmeticError) as problem:
        error = ValueError(problem)
    AGREED.copy_(torch.tensor([max(signals, default=0), 0 if error is None else world - rank]))
    if dist.is_initialized():
        dist.all_reduce(AGREED, dist.ReduceOp.MAX)                     # between the CPUs: no GPU waits
    signal, first = AGREED.tolist()
    if first:
        if dist.is_initialized():
            dist.destroy_process_group()                               # or its threads may abort the exit
        raise error if first == world - rank else SystemExit(1)
    return result, signal


def data_folder(folder, rank, world):
    """The folder; the embedded digits, the default, are drawn by process 0 first where they are missing."""
    if folder != Config.data:
        return folder
    from data import font_digits
    together(lambda: rank or font_digits.ensure(), rank, world)
    return font_digits.FOLDER


def bf16_is_faster(device):
    """Whether bf16 autocast pays: yes on CUDA that has it, no on MPS, by a short measurement on a CPU."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def cost(dtype):
        a, b = torch.ones(2048, 160, dtype=dtype), torch.ones(160, 640, dtype=dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        return time.perf_counter() - start

    return cost(torch.bfloat16) < 0.8 * cost(torch.float32)


def gathered(x, world, dim):
    """x of every process, joined along dim in the order of the global batch. No gradient."""
    if world == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, dim)


def sample_weights(cfg, losses, t):
    """Every sample's weight: losses (1 or 2, B), t (B,) of the global batch -> (1 or 2, B), detached, rows sum to B."""
    path, c = fpo.PATHS[cfg.path], torch.ones_like(losses)
    if cfg.fpo in ("velocity", "both"):
        compared = fpo.centred(losses[0], t) if cfg.fpo_centre else losses[0]
        c[0] = fpo.fpo_gradient_weights(compared, cfg.r, cfg.beta, cfg.tau)
    elif cfg.weighting == "hard_sample":
        c[0] = fpo.hard_sample_weights(losses[0], cfg.r, cfg.beta)
    elif cfg.weighting in ("p2", "min_snr"):
        c[0] = {"p2": fpo.p2_weights, "min_snr": fpo.min_snr_weights}[cfg.weighting](t, path)
    if len(losses) == 2 and cfg.fpo in ("alignment", "both") and cfg.align != "vrpo":
        c[1] = fpo.fpo_gradient_weights(losses[1], cfg.r, cfg.beta, cfg.tau, mask=t >= cfg.fpo_align_from)
    return c


def vrpo_losses(cfg, model, z, prediction, x, eps, t, y, features, state, rank, world):
    """VRPO's losses of this process's batch (b,) in place of REPA's; updates state, a dict of moving moments.

    All arguments are this process's. Later blocks get no gradient: z ends before them, the prediction is detached.
    """
    path, b = fpo.PATHS[cfg.path], len(x)
    x_t, _ = fpo.interpolate(x, eps, t, path)
    v = as_velocity(lambda *_: prediction.detach().float(), cfg.predict, cfg.path)(x_t, t, y)
    distance = fpo.perceptual_distance(fpo.x_from_velocity(v, x_t, t, path), x)
    ours = fpo.pooled(z)
    everyone, real = gathered(torch.stack([ours, fpo.pooled(features)]), world, 1)                    # each (B, D)
    state["feature"] = fpo.moving_moments(real, state.get("feature"))
    ours = world * ours - (world - 1) * ours.detach()                                  # DDP averages: gradient x world
    everyone = torch.cat([everyone[:rank * b], ours, everyone[(rank + 1) * b:]])
    rewards = [fpo.frechet_reward(everyone, *state["feature"]) - distance, -fpo.alignment_loss(z, features)]
    known = torch.ones(world * b, device=x.device)
    if cfg.vrpo_stability > 0:
        every = round(1 / cfg.vrpo_stability)
        rows = slice(-rank * b % every, None, every)                              # 0, every, ... of the global batch
        t_near = (t[rows] - cfg.vrpo_near).clamp_min(fpo.FIRST_T[cfg.path])
        x_near, _ = fpo.interpolate(x[rows], eps[rows], t_near, path)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.amp == "bf16"):
            near = model(x_near, t_near, y[rows], features="only")
        stability = torch.zeros_like(distance)
        stability[rows] = fpo.stability_reward(z[rows], near)
        rewards.append(stability)
        known = torch.zeros_like(known)
        known[::every] = world * b / len(known[::every])
    rewards = torch.stack(rewards)                                                                # (K, b)
    state["reward"] = fpo.moving_moments(gathered(rewards, world, 1).T, state.get("reward"), weight=known)
    known = known[rank * b:(rank + 1) * b] if cfg.vrpo_stability > 0 else None
    return fpo.vrpo_loss(rewards, state["reward"], VRPO_WEIGHTS[cfg.vrpo_weights], cfg.vrpo_eta, known=known)


def writable(folder, rank):
    """The folder, made if missing; ValueError if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".write-{rank}").touch()
        (folder / f".write-{rank}").unlink()
    except OSError as error:
        raise ValueError(f"cannot write to --out {folder}: {error.strerror}") from None
    return folder


def prepare(cfg, folder, rank, world, device):
    """All that can refuse to start, before any work: flags, data, a writable folder, the checkpoint to resume from."""
    for name, off in dict(repa=False, fpo="off", timesteps="uniform").items() if cfg.baseline else ():
        if getattr(cfg, name) not in (off, getattr(Config, name)):
            raise ValueError(f"--baseline means --{name} {off}, not {getattr(cfg, name)}: leave one of the two out")
        setattr(cfg, name, off)
    fpo.fpo_check(cfg.r, cfg.beta, cfg.tau)
    if cfg.weighting != "uniform" and cfg.fpo in ("velocity", "both"):
        raise ValueError(f"--weighting {cfg.weighting} replaces FPO on the velocity loss: add --fpo off or alignment")
    if cfg.weighting in ("p2", "min_snr") and cfg.predict != "v":
        raise ValueError(f"--weighting {cfg.weighting} is meant for the velocity loss: --predict v alone is accepted")
    if cfg.batch % (world * cfg.accumulate):
        raise ValueError(f"--batch {cfg.batch} is the global batch and must be a multiple of the {world} processes"
                         + f" x {cfg.accumulate} parts" * (cfg.accumulate > 1))
    if cfg.repa and cfg.align == "vrpo" and cfg.accumulate > 1:
        raise ValueError("--align vrpo judges the whole batch at once: --accumulate 1 alone is accepted")
    if cfg.repa and cfg.align == "vrpo" and cfg.batch // world * cfg.vrpo_stability < 1 and cfg.vrpo_stability > 0:
        raise ValueError(f"--vrpo_stability {cfg.vrpo_stability} of {cfg.batch // world} images in a process is below "
                         f"one: 0, or more, or a larger --batch is accepted")
    if cfg.bench:
        cfg.steps, cfg.log_every = 2 * cfg.bench, cfg.bench
    on_line = cfg.encoder if cfg.repa else ""
    data = Latents(folder, features=cfg.repa and not on_line, images=bool(on_line))
    seen, tokens = data.describe(), (data.size // MODELS[cfg.model]["patch"]) ** 2
    encode = lambda targets: targets
    if on_line:
        from data import imagenet
        encode = imagenet.load_encoder(on_line, data.targets.shape[2], device)
    shape = tuple(encode(data.batch(np.arange(1))[2].to(device)).shape[1:]) if cfg.repa else (tokens, None)
    if shape[0] != tokens:
        raise ValueError(f"the data have features of {shape[0]} tokens an image, but --model {cfg.model} cuts "
                         f"{data.size} x {data.size} latents into {tokens} patches")
    torch.manual_seed(cfg.seed)
    model = SiT(data.size, data.channels, data.classes, **MODELS[cfg.model], feature_dim=shape[1])
    parameters = sum(p.numel() for p in model.parameters())
    out, size = writable(cfg.out, rank), 16 * parameters / 1e9             # of a checkpoint, 4 float32 copies, in GB
    need = size * max(1, cfg.keep + 1 - len(list(out.glob("step-*.pt"))))  # the oldest goes once the newest is whole
    if (free := shutil.disk_usage(out).free / 1e9) < need and not cfg.bench:
        raise ValueError(f"--out {out} has {free:.1f} GB free, but checkpoints of {size:.1f} GB need {need:.1f} more")
    newest = None if cfg.bench else newest_checkpoint(out)
    saved = read_checkpoint(newest) if newest else None
    if saved is not None and not (isinstance(saved, dict) and "config" in saved):
        raise ValueError(f"{newest} is no checkpoint of train_sit.py: choose another --out")
    for name, value in dataclasses.asdict(cfg).items():
        if saved and name not in FREE_ON_RESUME and (was := saved["config"].get(name, getattr(Config, name))) != value:
            raise ValueError(f"{newest} was made with --{name} {was}, not {value}: choose another --out")
    if saved and saved["arch"] != model.arch:
        raise ValueError(f"{newest} was made for other data (size, channels, classes, features): choose another --out")
    if cfg.init and not saved:
        start_from(cfg.init, model, cfg)
    if cfg.amp == "auto":
        cfg.amp = saved["config"]["amp"] if saved else "bf16" if bf16_is_faster(device) else "fp32"
    if rank == 0:
        print(" ".join(f"--{k} {v}" for k, v in dataclasses.asdict(cfg).items()))
        print(f"{device.type}; {parameters / 1e6:.1f} M parameters; global batch {cfg.batch} = {world} processes x "
              f"{cfg.accumulate} parts x {cfg.batch // world // cfg.accumulate}\n{seen}")
    return data, model, encode, saved


def same_start(step, first, out):
    if step != first:
        raise ValueError(f"process 0 starts at step {first}, another at {step}: --out {out} must be on a shared disk")


def train(cfg):
    """The whole run; returns the exit status: 0, or 128 + the signal that stopped it."""
    from tqdm import tqdm
    rank, world, device = start_processes()
    folder = data_folder(cfg.data, rank, world)
    if cfg.encoder and cfg.repa and world > 1:                         # process 0 downloads it before all load it
        from data import imagenet
        together(lambda: rank or imagenet.load_encoder(cfg.encoder, 256, "cpu"), rank, world)
    (data, model, encode, saved), _ = together(lambda: prepare(cfg, folder, rank, world, device), rank, world)
    model, path, step = model.to(device), fpo.PATHS[cfg.path], saved["step"] if saved else 0
    if world > 1:                                                      # auto is a measurement: all take process 0's
        dist.broadcast_object_list(first := [cfg.amp, step], 0)
        cfg.amp = first[0]
        together(lambda: same_start(step, first[1], cfg.out), rank, world)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    timesteps, vrpo = Timesteps(cfg, data, device, saved and saved["timesteps"]), {}
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        opt.load_state_dict(saved["opt"])
        vrpo = {k: tuple(v.to(device) for v in pair) for k, pair in saved.get("vrpo", {}).items()}
        saved = None                                                   # or its file stays open
    if rank == 0 and cfg.timesteps.startswith("vr"):
        print("VR density: the closest logit-normal has m = {:.2f} (KS distance {:.2f})".format(
            *fpo.logit_normal_location(timesteps.state["t"].cpu(), timesteps.state["pdf"].cpu())))
    model.checkpointing = cfg.checkpointing
    for block in model.blocks if cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda" else ():
        block.compile()                                                # one block is compiled, all share it
    model._ddp_params_and_buffers_to_ignore = ["pos_embed"]            # constant: not to be broadcast in every step
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    parameters, averages = list(model.parameters()), list(ema.parameters())

    out, shape, b = Path(cfg.out), (data.channels, data.size, data.size), cfg.batch // world
    mine = slice(rank * b, (rank + 1) * b)
    parts = [slice(k, k + b // cfg.accumulate) for k in range(0, b, b // cfg.accumulate)]
    ranked = cfg.fpo != "off" or cfg.weighting == "hard_sample"
    scale = torch.tensor([1.0, cfg.repa_weight][:1 + cfg.repa], device=device)                # [REPA Eq. 9]

    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp == "bf16")

    def fetch(step):
        arrays = data.batch(rows_of(step, cfg.batch, cfg.seed, len(data.labels))[mine])
        return [a.pin_memory() if device.type == "cuda" and a is not None else a for a in arrays]

    def losses_of(part):
        """The losses of one part of this process's batch: (1 or 2, part), velocity and alignment."""
        with autocast():
            prediction = net(x_t[part], t[mine][part], y[part], features=cfg.repa)
        prediction, z = prediction if cfg.repa else (prediction, None)
        losses = [fpo.velocity_loss(prediction, {"v": v, "x": x, "eps": eps}[cfg.predict][part])]
        if cfg.repa and cfg.align == "cosine":
            losses.append(fpo.alignment_loss(z, features[part]))
        elif cfg.repa and cfg.align == "vrpo":
            losses.append(vrpo_losses(cfg, model, z, prediction, x, eps, t[mine], y, features, vrpo, rank, world))
        elif cfg.repa:
            losses.append(fpo.nt_xent_loss(z, all_features, first=mine.start + part.start))
        return torch.stack(losses)

    def record():
        """Rows of log.csv, checkpoints and pictures, where due; ValueError for a loss that was not finite."""
        if first_bad < never:
            raise ValueError(f"the loss is not finite at step {int(first_bad)}; the last good checkpoint: "
                             f"{newest_checkpoint(out) or 'none yet'}")
        if rank > 0:
            return
        images_per_s = cfg.batch * len(window) / (time.time() - since)
        if cfg.bench:
            return step < cfg.steps or bench_report(cfg, ema, data, device, world, images_per_s)
        if log:
            values, (moved, ess), reward = torch.stack(window).mean(0).tolist(), fpo.weight_moved(c[0]), ("", "")
            if vrpo:                                                   # the mean of L_i is 0: log REPA's loss instead
                values[1] = -vrpo["reward"][0][1].item()
                reward = [v.item() for v in fpo.vrpo_terms(vrpo["reward"], VRPO_WEIGHTS[cfg.vrpo_weights])[1:3]]
            row = [step, values[0], values[1] if cfg.repa else "", values[-1], moved.item(), ess.item() / cfg.batch,
                   opt.param_groups[0]["lr"], images_per_s, *reward]
            with open(out / "log.csv", "a", newline="") as f:
                csv.writer(f).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
            bar.set_postfix_str(f"loss {values[0]:.3f}" + f" align {values[1]:.3f}" * cfg.repa)
        if save or stopping:
            save_checkpoint(out, dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step,
                                      timesteps=timesteps.state, vrpo=vrpo, config=dataclasses.asdict(cfg),
                                      arch=model.arch, meta=data.meta), cfg.keep)
        if picture:
            write_pictures(ema, cfg, data.meta, f"samples-{step:07d}.png")

    def agree(work):
        try:
            return together(work, rank, world, signals)
        except BaseException:
            bar.close()                                                # so that the error has a line of its own
            raise

    reader, signals = ThreadPoolExecutor(3), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if rank == 0 and not cfg.bench:                        # rows after the checkpoint will be written again
        old = (out / "log.csv").read_text().splitlines() if step and (out / "log.csv").exists() else []
        rows = [row for row in old[1:] if row.count(",") == len(LOG) - 1 and int(row.split(",")[0]) <= step]
        (out / "log.csv").write_text("\n".join([",".join(LOG)] + rows) + "\n")
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=rank > 0, smoothing=0.05)
    never = 2 ** 62
    first_bad, window, since = torch.tensor(never, device=device), [], time.time()
    stopping = log = save = picture = False
    upcoming = collections.deque(reader.submit(fetch, step + k) for k in range(3))

    while step < cfg.steps:
        batch, stopping = agree(upcoming.popleft().result)
        if stopping:
            break
        upcoming.append(reader.submit(fetch, step + 3))
        latents, y, targets = (a if a is None else a.to(device, non_blocking=True) for a in batch)
        # The whole global batch's randomness, from (seed, step); this process uses its slice.
        random = torch.Generator(device).manual_seed(seed_of(cfg.seed, step))
        eps = torch.randn(cfg.batch, *shape, generator=random, device=device)[mine]
        u, drop = torch.rand(2, cfg.batch, generator=random, device=device)
        noise = torch.randn(cfg.batch, *shape, generator=random, device=device)[mine] if data.moments else None
        t = timesteps.draw(u)                                                           # (B,), of the global batch
        y = torch.where(drop[mine] < cfg.label_dropout, model.num_classes, y)
        x = data.see(latents, noise)
        x_t, v = fpo.interpolate(x, eps, t[mine], path)
        with autocast():
            features = encode(targets)                                                  # (b, T, D)
        all_features = gathered(features, world, 0) if cfg.repa and cfg.align == "nt_xent" else None

        for group in opt.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        opt.zero_grad()
        if len(parts) == 1:
            losses = losses_of(parts[0])
        elif ranked:                  # FPO ranks the whole batch: its losses first, by a forward pass without gradients
            with torch.no_grad():
                losses = torch.cat([losses_of(part) for part in parts], 1)
        else:
            losses = torch.zeros(1 + cfg.repa, b, device=device)                        # the weights depend on t alone
        everyone = gathered(losses, world, 1)                                           # (1 or 2, B)
        c = sample_weights(cfg, everyone, t)                                            # [FPO Thm. 3.3], detached
        done = []
        for part in parts:
            with net.no_sync() if world > 1 and part != parts[-1] else contextlib.nullcontext():
                done.append(losses if len(parts) == 1 else losses_of(part))
                ((c[:, mine][:, part] * done[-1]).sum(1) / b @ scale).backward()
        if len(parts) > 1:
            everyone = gathered(torch.cat(done, 1), world, 1)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        timesteps.update(t, everyone[0])
        step += 1

        means = torch.cat([everyone.mean(1), norm[None]])
        window.append(means)
        first_bad = torch.where(means.isfinite().all(), first_bad, first_bad.clamp_max(step))
        log, save = step % cfg.log_every == 0, step % cfg.save_every == 0 or step == cfg.steps
        picture = step % cfg.sample_every == 0 and step < cfg.steps
        bar.update()
        if log or save or picture:
            agree(record)
        if log:
            window, since = [], time.time()

    bar.close()
    reader.shutdown(cancel_futures=True)
    if stopping:
        log = picture = False
        agree(record)
    elif not cfg.bench:
        agree(lambda: rank or write_pictures(ema, cfg, data.meta, "samples.png"))
    if rank == 0 and not cfg.bench:
        print(f"stopped at step {step}; wrote {newest_checkpoint(out)} and {out}/log.csv; the same command goes on"
              if stopping else
              f"done: {step} steps. In {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    if world > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0


def main(argv=None):
    cfg = parse_flags(Config, ACCEPTED, argv, __doc__.split("\n\nRead")[0])
    try:
        sys.exit(train(cfg))
    except ValueError as error:
        fail(error, anywhere=True)


if __name__ == "__main__":
    main()
