r"""Train a SiT by flow matching with representation alignment (REPA), Fisher Policy Optimization (FPO) and VR-sampling.

    python train_sit.py                                     # the embedded digits: minutes on two CPU cores
    python train_sit.py --baseline --out runs/plain         # a plain SiT: no REPA, no FPO, uniform timesteps
    torchrun --nproc_per_node 8 train_sit.py --data LATENTS --out runs/xl --model SiT-XL/2 --lr 1e-4 --batch 256 \
        --steps 400000 --ema 0.9999

Read top to bottom: the flags, the network, the data, the timesteps, checkpoints, pictures, the training loop. What the
loop optimises is in fpo.py. The run does not depend on the number of processes: data order, noise, timesteps, label
drops and FPO's ranking belong to the global batch, and every process takes its slice. Letters as in fpo.py.
"""
import argparse
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
    align: str = "cosine"                 # alignment loss
    fpo: str = "both"                     # losses that FPO reweights
    r: float = 0.8                        # FPO: share of the batch that competes for the boost
    beta: float = 2.0                     # FPO: size of the boost, which is beta out of batch + beta
    tau: float = 1.0                      # FPO: temperature; not given in the paper
    fpo_align_from: float = 0.9           # FPO reweights the alignment loss only at t >= this
    weighting: str = "uniform"            # policy for the velocity loss when FPO is off there
    timesteps: str = "vr_gaussian"        # how t is drawn
    vr_uniform: float = 0.1               # uniform share of the VR density
    logit_mean: float = 0.0               # location of logit-normal t (the papers' m is minus this)
    label_dropout: float = 0.1            # share of labels replaced by the null label, for guidance
    steps: int = 1400                     # optimiser steps in all
    batch: int = 128                      # images per step over all processes
    lr: float = 2e-3                      # learning rate after warm-up, constant
    warmup: int = 100                     # steps of linear warm-up
    clip: float = 1.0                     # gradient norm clip
    ema: float = 0.999                    # decay of the weight average; in the first steps (1 + step) / (10 + step)
    amp: str = "auto"                     # auto: bf16 where this hardware runs it faster
    seed: int = 0                         # seed of everything
    log_every: int = 20                   # steps between rows of log.csv
    sample_every: int = 700               # steps between pictures
    save_every: int = 350                 # steps between checkpoints
    keep: int = 2                         # checkpoints kept
    guidance: float = 2.0                 # guidance of the pictures


SIZES = {"S": (12, 384, 6, 4), "B": (12, 768, 12, 4), "L": (24, 1024, 16, 8), "XL": (28, 1152, 16, 8)}
MODELS = {"tiny": dict(depth=6, width=160, heads=5, encoder_depth=2, patch=4, projector_width=256)}
MODELS |= {f"SiT-{size}/{patch}": dict(zip(("depth", "width", "heads", "encoder_depth"), SIZES[size]), patch=patch)
           for size in SIZES for patch in (2, 4, 8)}
SHARE, AMOUNT, COUNT = (0, 1), (0, math.inf), (1, math.inf)
ACCEPTED = dict(                          # a list of names, or the least and the largest value
    model=list(MODELS), path=list(fpo.PATHS), predict=["v", "x", "eps"], align=["cosine", "nt_xent"],
    fpo=["off", "velocity", "alignment", "both"], weighting=["uniform", "hard_sample", "p2", "min_snr"],
    timesteps=["uniform", "logit_normal", "vr_gaussian", "vr_monte_carlo", "vr_loss"], amp=["auto", "bf16", "fp32"],
    steps=COUNT, batch=COUNT, log_every=COUNT, sample_every=COUNT, save_every=COUNT, keep=COUNT, warmup=AMOUNT,
    lr=AMOUNT, clip=AMOUNT, repa_weight=AMOUNT, ema=SHARE, vr_uniform=SHARE, label_dropout=SHARE, fpo_align_from=SHARE,
    seed=(0, 2 ** 31))
FREE_ON_RESUME = "out data steps amp log_every sample_every save_every keep guidance baseline".split()
LOG = "step loss align grad_norm moved ess lr images_per_s".split()          # README says what they are


def fail(message):
    """End the program with one line, said by one process only."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}" if os.environ.get("RANK", "0") == "0" else 1)


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


def time_frequencies(t):
    """The 128 frequencies of time_features, on t's device and in its dtype."""
    return 10000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)


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
    z (B, T, feature_dim) of block encoder_depth. The projector runs only when asked.
    """

    def __init__(self, size=32, channels=4, num_classes=1000, depth=28, width=1152, heads=16, patch=2, encoder_depth=8,
                 feature_dim=None, projector_width=2048):
        super().__init__()
        if size % patch or width % heads or width % 4:
            raise ValueError(f"SiT: {size} x {size} latents do not cut into patches of {patch} or {width} into {heads}")
        self.arch = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.channels, self.encoder_depth, self.num_classes = patch, channels, encoder_depth, num_classes
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
        for depth, block in enumerate(self.blocks, 1):
            h = block(h, c)
            if features and depth == self.encoder_depth:
                z = self.projectors[0](h)                                               # (B, T, feature_dim)
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
    """latents.npy (N, C or 2C, H, W), labels.npy (N,), features.npy (N, T, D) if asked for, meta.json.

    What the model sees is (latents - bias) * scale; with meta["moments"] the channels are mean and std, sampled first.
    Raises ValueError, in one line, for a folder that no model should be trained on.
    """

    def __init__(self, folder, features=False):
        self.folder, arrays = Path(folder), {}
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            classes, _, _ = (self.meta[key] for key in ("num_classes", "scale", "bias"))
            for name in ["latents", "labels"] + ["features"] * features:
                arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"data folder {folder} lacks a part, or it cannot be read (--no-repa needs no features): "
                             f"{type(error).__name__} {error}") from None
        self.latents, self.labels, self.features = (arrays.get(name) for name in ("latents", "labels", "features"))
        shapes = {name: array.shape for name, array in arrays.items()}
        if (any(len(shape) != dict(latents=4, labels=1, features=3)[name] for name, shape in shapes.items())
                or len({shape[0] for shape in shapes.values()}) > 1 or shapes["latents"][2] != shapes["latents"][3]):
            raise ValueError(f"data folder {folder}: latents (N, C, H, H), labels (N,), features (N, T, D) if any are "
                             f"needed, not {shapes}")
        if self.labels.min() < 0 or self.labels.max() >= classes:
            raise ValueError(f"data folder {folder}: labels from {self.labels.min()} to {self.labels.max()}, but 0 to "
                             f"{classes - 1} are accepted (num_classes in meta.json)")
        self.moments = bool(self.meta.get("moments", False))
        self.channels, self.size = self.latents.shape[1] // (2 if self.moments else 1), self.latents.shape[2]

    def batch(self, rows):
        """Rows (B,) as they lie on disk: latents, labels, features or None."""
        take = lambda a: None if a is None else torch.from_numpy(a[rows])
        return take(self.latents), take(self.labels).long(), take(self.features)

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
        return self.see(self.batch(rows)[0], noise)

    def describe(self):
        """What the model will see, in one line; ValueError when its deviation is far from 1."""
        x = self.some(2048)
        if not 0.5 < x.std() < 2:
            raise ValueError(f"the model would see latents of deviation {x.std():.3g}, far from 1 (0.5 to 2 is "
                             f"accepted): is the scale {self.meta['scale']} in meta.json wrong?")
        mean, std = ([round(v, 3) for v in f(x, dim=(0, 2, 3)).tolist()] for f in (torch.mean, torch.std))
        tokens = "no features" if self.features is None else f"features {self.features.shape[1:]}"
        return (f"data: {len(self.labels)} latents {tuple(x.shape[1:])}, {self.meta['num_classes']} classes, {tokens}; "
                f"the model sees mean {mean} deviation {std}")


def data_folder(folder, rank, world):
    """The folder; the embedded digits, the default, are drawn by process 0 first where they are missing."""
    if folder != Config.data:
        return folder
    from data import font_digits
    if rank == 0:
        font_digits.ensure()
    if world > 1:
        dist.barrier()
    return font_digits.FOLDER


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

    def __init__(self, cfg, data, device):
        self.kind, self.uniform, self.mean = cfg.timesteps, cfg.vr_uniform, cfg.logit_mean
        self.least = 1e-3 if cfg.path == "diffusion" else 0.0                  # sigma' is infinite at 0 there
        bins, path = 100 if self.kind == "vr_loss" else 1000, fpo.PATHS[cfg.path]
        t = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins).clamp_min(self.least)
        alpha, sigma, _, _ = path(t)
        V, pdf = None, torch.ones_like(t)
        if self.kind == "vr_gaussian":
            V = fpo.gaussian_posterior_variance(data.some(8192).flatten(1), alpha / sigma)
        elif self.kind == "vr_monte_carlo":
            generator = torch.Generator().manual_seed(cfg.seed)
            V = fpo.posterior_variance(data.some(200, cfg.seed).flatten(1), alpha / sigma, 500, generator)
        if V is not None:
            pdf = fpo.vr_density(V, t, path, self.uniform)
        state = {"t": t, "pdf": pdf, "loss": torch.zeros_like(t), "count": torch.zeros_like(t)}
        self.state = {name: value.float().to(device) for name, value in state.items()}

    def draw(self, u):
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
        member = F.one_hot((t * bins).long().clamp(0, bins - 1), bins).float()          # (B, bins)
        s["loss"], s["count"] = decay * s["loss"] + losses @ member, decay * s["count"] + member.sum(0)
        mean = s["loss"].sum() / s["count"].sum()
        curve = torch.where(s["count"] > 0, s["loss"] / s["count"].clamp_min(1e-9), mean)
        s["pdf"] = (1 - self.uniform) * curve / curve.mean() + self.uniform


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(folder, state, keep):
    """Write folder/step-NNNNNNN.pt whole or not at all, and remove all but the newest keep. Returns its path."""
    path = Path(folder) / f"step-{state['step']:07d}.pt"
    draft = path.with_suffix(".tmp")
    with open(draft, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(draft, path)
    for old in (*sorted(Path(folder).glob("step-*.pt"))[:-keep], *Path(folder).glob("step-*.tmp")):
        old.unlink()
    return path


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
    unknown = dict(width=width, depth=arch["depth"], heads=max(1, width // 64), encoder_depth=arch["depth"] // 3)
    like = next((m for m in MODELS.values() if (m["width"], m["depth"]) == (width, arch["depth"])), unknown)
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


# ------------------------------------------------------------------------------------------------------------------
# Pictures


def write_curves(log, path):
    """log.csv -> a picture of its losses."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = list(csv.DictReader(open(log)))
    if not rows:
        return
    names = {"loss": "velocity loss", "align": "alignment loss", "grad_norm": "gradient norm"}
    columns = [name for name in names if rows[0][name]]
    figure, axes = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3), squeeze=False)
    for axis, column in zip(axes[0], columns):
        axis.plot([int(r["step"]) for r in rows], [float(r[column]) for r in rows])
        axis.set(xlabel="step", title=names[column])
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_samples(model, cfg, meta, path):
    """A grid of samples at cfg.guidance by sample.py: ten rows, one for each of the first ten classes."""
    import sample
    rows = np.arange(10 * min(10, model.num_classes))
    settings = sample.Config(seed=cfg.seed, guidance=cfg.guidance, steps=20, classes=tuple(rows // 10))
    x, _, _ = sample.generate(model, dataclasses.asdict(cfg), settings, rows, next(model.parameters()).device)
    sample.write_grid(sample.to_pixels(x, meta).numpy(), path)


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


def bf16_is_faster(device):
    """Whether bf16 autocast pays: yes on CUDA that has it, no on MPS, by a short measurement on a CPU."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()

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
        c[0] = fpo.fpo_gradient_weights(losses[0], cfg.r, cfg.beta, cfg.tau)
    elif cfg.weighting == "hard_sample":
        c[0] = fpo.hard_sample_weights(losses[0], cfg.r, cfg.beta)
    elif cfg.weighting in ("p2", "min_snr"):
        c[0] = {"p2": fpo.p2_weights, "min_snr": fpo.min_snr_weights}[cfg.weighting](t, path)
    if len(losses) == 2 and cfg.fpo in ("alignment", "both"):
        c[1] = fpo.fpo_gradient_weights(losses[1], cfg.r, cfg.beta, cfg.tau, mask=t >= cfg.fpo_align_from)
    return c


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


def prepare(cfg):
    """All that can refuse to start, before any work: flags, data, a writable folder, the checkpoint to resume from."""
    if cfg.baseline:
        cfg.repa, cfg.fpo, cfg.timesteps = False, "off", "uniform"
    fpo.fpo_check(cfg.r, cfg.beta, cfg.tau)
    if cfg.weighting != "uniform" and cfg.fpo in ("velocity", "both"):
        raise ValueError(f"--weighting {cfg.weighting} replaces FPO on the velocity loss: add --fpo off or alignment")
    rank, world, device = start_processes()
    if cfg.batch % world:
        raise ValueError(f"--batch {cfg.batch} is the global batch and must be a multiple of the {world} processes")
    data = Latents(data_folder(cfg.data, rank, world), features=cfg.repa)
    seen, tokens = data.describe(), (data.size // MODELS[cfg.model]["patch"]) ** 2
    if cfg.repa and data.features.shape[1] != tokens:
        raise ValueError(f"features.npy has {data.features.shape[1]} tokens an image, but --model {cfg.model} cuts "
                         f"{data.size} x {data.size} latents into {tokens} patches")
    torch.manual_seed(cfg.seed)
    model = SiT(data.size, data.channels, data.meta["num_classes"], **MODELS[cfg.model],
                feature_dim=data.features.shape[2] if cfg.repa else None)
    parameters = sum(p.numel() for p in model.parameters())
    out, need = writable(cfg.out, rank), 32 * parameters / 1e9            # two checkpoints of 4 float32 copies, in GB
    if (free := shutil.disk_usage(out).free / 1e9) < need:
        raise ValueError(f"--out {out} has {free:.1f} GB free, but two checkpoints take {need:.1f} GB")
    newest = newest_checkpoint(out)
    saved = read_checkpoint(newest) if newest else None
    if saved is not None and not (isinstance(saved, dict) and "config" in saved):
        raise ValueError(f"{newest} is no checkpoint of train_sit.py: choose another --out")
    for name, value in dataclasses.asdict(cfg).items():
        if saved and name not in FREE_ON_RESUME and saved["config"].get(name) != value:
            was = saved["config"].get(name)
            raise ValueError(f"{newest} was made with --{name} {was}, not {value}: choose another --out")
    if saved and saved["arch"] != model.arch:
        raise ValueError(f"{newest} was made for other data (size, channels, classes, features): choose another --out")
    if cfg.amp == "auto":
        choice = [saved["config"]["amp"] if saved else "bf16" if bf16_is_faster(device) else "fp32"]
        if world > 1:                                                  # a measurement: all take that of process 0
            dist.broadcast_object_list(choice, 0)
        cfg.amp = choice[0]
    if rank == 0:
        print(" ".join(f"--{k} {v}" for k, v in dataclasses.asdict(cfg).items()))
        print(f"{device.type}, {cfg.amp}; {parameters / 1e6:.1f} M parameters; "
              f"global batch {cfg.batch} = {world} processes x {cfg.batch // world}\n{seen}")
    return rank, world, device, data, model, saved


def train(cfg):
    """The whole run; returns the exit status: 0, or 128 + the signal that stopped it."""
    from tqdm import tqdm
    rank, world, device, data, model, saved = prepare(cfg)
    model, path, step = model.to(device), fpo.PATHS[cfg.path], 0
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    timesteps = Timesteps(cfg, data, device)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        opt.load_state_dict(saved["opt"])
        timesteps.state, step = {k: v.to(device) for k, v in saved["timesteps"].items()}, saved["step"]
    if rank == 0 and cfg.timesteps.startswith("vr"):
        print("VR density: the closest logit-normal has m = {:.2f} (KS distance {:.2f})".format(
            *fpo.logit_normal_location(timesteps.state["t"].cpu(), timesteps.state["pdf"].cpu())))
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    parameters, averages = list(model.parameters()), list(ema.parameters())

    out, shape, b = Path(cfg.out), (data.channels, data.size, data.size), cfg.batch // world
    mine = slice(rank * b, (rank + 1) * b)
    scale = torch.tensor([1.0, cfg.repa_weight][:1 + cfg.repa], device=device)                # [REPA Eq. 9]
    reader, signals = ThreadPoolExecutor(1), []
    load = lambda step: reader.submit(lambda: data.batch(rows_of(step, cfg.batch, cfg.seed, len(data.labels))[mine]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if rank == 0:                                          # rows after the checkpoint will be written again
        old = (out / "log.csv").read_text().splitlines() if step and (out / "log.csv").exists() else []
        rows = [row for row in old[1:] if int(row.split(",")[0]) <= step]
        (out / "log.csv").write_text("\n".join([",".join(LOG)] + rows) + "\n")
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=rank > 0, smoothing=0.05)
    never = 2 ** 62
    first_bad, running, since = torch.tensor(never, device=device), 0, time.time()
    upcoming, stopping = load(step), 0

    while step < cfg.steps and not stopping:
        latents, y, features = upcoming.result()
        upcoming = load(step + 1)
        # The whole global batch's randomness, from (seed, step); this process uses its slice.
        random = torch.Generator(device).manual_seed(cfg.seed * 2 ** 32 + step)
        eps = torch.randn(cfg.batch, *shape, generator=random, device=device)[mine]
        u, drop = torch.rand(2, cfg.batch, generator=random, device=device)
        noise = torch.randn(cfg.batch, *shape, generator=random, device=device)[mine] if data.moments else None
        t = timesteps.draw(u)                                                           # (B,), of the global batch
        y = torch.where(drop[mine] < cfg.label_dropout, model.num_classes, y.to(device))
        x = data.see(latents.to(device), noise)
        x_t, v = fpo.interpolate(x, eps, t[mine], path)

        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp == "bf16"):
            prediction = net(x_t, t[mine], y, features=cfg.repa)
        prediction, z = prediction if cfg.repa else (prediction, None)
        losses = [fpo.velocity_loss(prediction, {"v": v, "x": x, "eps": eps}[cfg.predict])]
        if cfg.repa and cfg.align == "cosine":
            losses.append(fpo.alignment_loss(z, features.to(device)))
        elif cfg.repa:
            losses.append(fpo.nt_xent_loss(z, gathered(features.to(device), world, 0), first=mine.start))
        losses = torch.stack(losses)                                                    # (2, b): velocity, alignment
        everyone = gathered(losses, world, 1)                                           # (2, B)
        c = sample_weights(cfg, everyone, t)                                            # [FPO Thm. 3.3], detached
        loss = (c[:, mine] * losses).mean(1) @ scale

        for group in opt.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip)
        opt.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        timesteps.update(t, everyone[0])
        step += 1

        means = torch.cat([everyone.mean(1), norm[None]])
        running = running + means
        first_bad = torch.where(means.isfinite().all(), first_bad, first_bad.clamp_max(step))
        log, save = step % cfg.log_every == 0, step % cfg.save_every == 0 or step == cfg.steps
        stopping = max(signals, default=0)
        if world > 1:                                                                   # all stop at the same step
            agreed = torch.tensor(stopping)
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            stopping = int(agreed)
        if (log or save or stopping) and first_bad < never:
            bar.close()
            raise ValueError(f"the loss is not finite at step {int(first_bad)}; the last good checkpoint is "
                             f"{newest_checkpoint(out)}")
        if rank > 0:
            continue
        bar.update()
        if log:
            values = (running / cfg.log_every).tolist()
            moved, ess = fpo.weight_moved(c[0])
            row = [step, values[0], values[1] if cfg.repa else "", values[-1], moved.item(), ess.item() / cfg.batch,
                   group["lr"], cfg.batch * cfg.log_every / (time.time() - since)]
            with open(out / "log.csv", "a", newline="") as f:
                csv.writer(f).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
            bar.set_postfix_str(f"loss {values[0]:.3f}" + f" align {values[1]:.3f}" * cfg.repa)
            running, since = 0, time.time()
        if save or stopping:
            save_checkpoint(out, dict(model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), step=step,
                                      timesteps=timesteps.state, config=dataclasses.asdict(cfg), arch=model.arch,
                                      meta=data.meta), cfg.keep)
        if step % cfg.sample_every == 0 and step < cfg.steps:
            write_samples(ema, cfg, data.meta, out / f"samples-{step:07d}.png")
            write_curves(out / "log.csv", out / "loss.png")

    bar.close()
    reader.shutdown(cancel_futures=True)
    if rank == 0 and not stopping:
        write_samples(ema, cfg, data.meta, out / "samples.png")
        write_curves(out / "log.csv", out / "loss.png")
        print(f"done: {step} steps. In {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    elif rank == 0:
        print(f"stopped at step {step}; wrote {newest_checkpoint(out)} and {out}/log.csv; the same command goes on")
    if world > 1:
        dist.destroy_process_group()
    return 128 + stopping if stopping else 0


def main(argv=None):
    cfg = parse_flags(Config, ACCEPTED, argv, __doc__.split("\n\nRead")[0])
    try:
        sys.exit(train(cfg))
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
