r"""Train a SiT by flow matching with representation alignment (REPA), FPO and VR-sampling.

    python train_sit.py                                    # the embedded digits, minutes on two CPU cores
    python train_sit.py --align none --policy uniform --timesteps uniform --out runs/plain    # plain SiT
    torchrun --nproc_per_node 8 train_sit.py --data LATENTS --out runs/xl --model SiT-XL/2 --lr 1e-4 \
        --batch 256 --steps 400000 --warmup 0 --ema 0.9999 --no-ema_warmup --timesteps uniform \
        --save_every 10000 --sample_every 10000 --keep_every 50000

The method is fpo.py's. Here stand, in this order, the flags, what is optimised, the training loop, and what
the loop calls: network, data, density of t, VRPO, checkpoints, log and pictures, processes, parsing.
Letters: b images of this process, N of all (the global batch), T tokens, D width. Everything random is
drawn for the global batch, from (seed, step), and every process takes its slice: a run does not depend on
the number of processes.
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fpo

# This process among torchrun's, or alone.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
# Products of matrices in bf16 are fast on GPUs from Ampere on, and on CPUs that have an instruction for them.
FAST_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()          # bool() is False
if torch.cuda.is_available():
    FAST_BF16 = torch.cuda.is_bf16_supported(including_emulation=False)


@dataclasses.dataclass
class Config:
    # Input and output
    out: str = "runs/digits"             # folder of the run; repeat the command, and it goes on where it was
    data: str = "data/font_digits"       # folder of the data set; the default is drawn if it is missing
    init: str = ""                       # checkpoint, ours or published, whose weights a new run starts from
    log_every: int = 20                  # steps between rows of log.csv
    sample_every: int = 700              # steps between pictures
    save_every: int = 350                # steps between checkpoints; the newest two are kept
    keep_every: int = 0                  # steps between kept averages, a multiple of save_every; 0: none
    # What is optimised
    model: str = "tiny"                  # network
    bottleneck: int = 0                  # width of a bottleneck in the patch embedding; 0: none
    path: str = "linear"                 # interpolant
    predict: str = "v"                   # what the network outputs
    loss: str = "v"                      # where its error is measured
    timesteps: str = "vr_logit_normal"   # how t is drawn
    logit_mean: float = 0.0              # location of logit-normal t (the papers' m is minus this)
    logit_std: float = 1.0               # standard deviation of its logit
    policy: str = "fpo"                  # weights of the samples in the velocity loss
    align_policy: str = "fpo"            # weights of the samples in the alignment loss
    r: float = 0.8                       # FPO: share of the batch that competes for the boost
    beta: float = 2.0                    # FPO: size of the boost, which is beta out of batch + beta
    tau: float = 1.0                     # FPO: temperature; not given in the paper
    group: int = 0                       # FPO: samples that are ranked together; 0: the whole batch
    align: str = "cosine"                # alignment loss; none: no REPA, no projector
    projector: str = "mlp"               # from the hidden tokens to the encoder's; conv: of iREPA
    repa_weight: float = 0.5             # lambda, the weight of the alignment loss
    align_until: int = 0                 # steps after which the alignment loss stops; 0: never
    reg_weight: float = 0.0              # REG: weight of the class token's loss, published 0.03; 0: no token
    label_dropout: float = 0.1           # share of labels replaced by the null label, for guidance
    # Optimiser
    steps: int = 1400                    # optimiser steps in all
    batch: int = 64                      # images per step over all processes
    lr: float = 3e-3                     # learning rate after warm-up, constant
    warmup: int = 100                    # steps of linear warm-up
    clip: float = 1.0                    # largest gradient norm; 0: any
    ema: float = 0.999                   # decay of the weight average
    ema_warmup: bool = True              # the decay is at first step / (9 + step)
    seed: int = 0                        # seed of everything
    # Hardware
    bf16: bool = FAST_BF16               # autocast to bfloat16
    fp32: bool = False                   # no TF32 in the float32 products of a GPU
    compile: bool = torch.cuda.is_available()    # compile the blocks
    checkpointing: bool = False          # recompute the blocks in the backward pass: slower, far less memory


def sizes(depth, width, heads, encoder_depth, projector_width, patch):
    return locals()


MODELS = {"tiny": sizes(6, 160, 5, 2, 256, 4), "micro": sizes(4, 64, 2, 2, 128, 4)}
for patch in (2, 4, 8, 16, 32):
    MODELS[f"SiT-S/{patch}"] = sizes(12, 384, 6, 4, 2048, patch)
    MODELS[f"SiT-B/{patch}"] = sizes(12, 768, 12, 4, 2048, patch)
    MODELS[f"SiT-L/{patch}"] = sizes(24, 1024, 16, 8, 2048, patch)
    MODELS[f"SiT-XL/{patch}"] = sizes(28, 1152, 16, 8, 2048, patch)

# ----------------------------------------------------------------------------------------------------------
# What is optimised: mean(c L) + repa_weight mean(a A), with the velocity losses L and the alignment losses A
# [REPA Eq. 9]. A policy turns losses and timesteps of the global batch, both (N,), into weights (N,) of
# mean 1, without gradient: c for L, a for A.

POLICIES = {
    "uniform": lambda L, t, cfg: torch.ones_like(L),
    "fpo": lambda L, t, cfg: fpo.fpo_gradient_weights(L, cfg.r, cfg.beta, cfg.tau, group=cfg.group),
    "hard_sample": lambda L, t, cfg: fpo.hard_sample_weights(L, cfg.r, cfg.beta),
    "p2": lambda L, t, cfg: fpo.p2_weights(t, fpo.PATHS[cfg.path]),
    "min_snr": lambda L, t, cfg: fpo.min_snr_weights(t, fpo.PATHS[cfg.path]),
}
ALIGN_POLICIES = {                           # FPO's at t >= 0.9 alone [FPO Sec. 3.3]
    "uniform": lambda A, t, cfg: torch.ones_like(A),
    "fpo": lambda A, t, cfg: fpo.fpo_gradient_weights(A, cfg.r, cfg.beta, cfg.tau, t >= 0.9, cfg.group),
    "early": lambda A, t, cfg: fpo.early_weights(t),
}
ALIGN = {                                    # projected tokens z, features (b, T, D) -> (b,)
    "none": lambda z, features, t, **more: torch.zeros_like(t),
    "cosine": lambda z, features, **more: fpo.alignment_loss(z, features),
    "spatial": lambda z, features, **more: fpo.alignment_loss(                       # lengths are not stored
        z, fpo.spatially_normalised(F.normalize(fpo.in_float32(features), dim=-1))),
    "nt_xent": lambda z, features, **more: fpo.nt_xent_loss(z, gather(features), first=RANK * len(z)),
    "vrpo": lambda z, features, **more: vrpo_losses(z, features, **more),
}
TIMESTEPS = {                                # u (N,) uniform in [0, 1), the run's density of t -> t (N,)
    "uniform": lambda u, density, cfg: u,
    "logit_normal": lambda u, density, cfg: fpo.logit_normal_timesteps(u, cfg.logit_mean, cfg.logit_std),
    "vr_logit_normal": lambda u, density, cfg: fpo.logit_normal_timesteps(u, density["mean"], cfg.logit_std),
    "vr_gaussian": lambda u, density, cfg: fpo.sample_timesteps(u, density["t"], density["pdf"]),
}
TIMESTEPS["vr_monte_carlo"] = TIMESTEPS["vr_loss"] = TIMESTEPS["vr_gaussian"]        # see start_density


def train(cfg, stop):
    """The whole run. stop: a Stop, which knows whether Ctrl-C or SIGTERM has come."""
    # Data, network, its average, optimiser
    device = start_processes(cfg.fp32)       # from here on gather() knows the other processes
    data = Latents(cfg.data, features=cfg.align != "none", cls=cfg.reg_weight > 0)
    say(data.describe())
    check(cfg, data)
    torch.manual_seed(cfg.seed)
    model = SiT(data.size, data.channels, data.classes, **MODELS[cfg.model], feature_dim=data.feature_dim,
                projector=cfg.projector, bottleneck=cfg.bottleneck, cls_dim=data.cls_dim).to(device)
    if cfg.init and not newest_checkpoint(cfg.out):          # before the lock: refused, it leaves no folder
        start_from(cfg.init, model, cfg)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.0, fused=True)

    # Start, or go on with the run in this folder. moments: of VRPO's features and rewards
    locked = lock(cfg.out)                   # as long as this function runs
    newest = newest_checkpoint(cfg.out)
    if newest:
        run = resume(newest, device, cfg, model, ema, opt)
    else:
        run = dict(step=0, density=start_density(cfg, data, device), moments={}, log=[])
    if len(set(gather(torch.tensor([run["step"]], device=device)).tolist())) > 1:
        raise Refused(f"--out {cfg.out} must be one folder that all processes share")
    model.checkpointing = cfg.checkpointing
    if cfg.compile:
        compile_blocks(model)
    net = model if WORLD == 1 else nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    path, first_t = fpo.PATHS[cfg.path], fpo.FIRST_T[cfg.path]
    b = cfg.batch // WORLD
    mine = slice(RANK * b, RANK * b + b)                 # this process's part of the global batch
    rows = (rows_of(k, cfg, len(data))[mine] for k in range(run["step"], cfg.steps))
    bar = tqdm(prefetched(data.batch, rows), total=cfg.steps, initial=run["step"], disable=RANK > 0)
    recent, since = [], time.time()
    for step, batch in enumerate(bar, run["step"] + 1):
        # The batch, and everything random
        latents, y, features, cls = (array.to(device, non_blocking=True) for array in batch)     # (b, ...)
        eps, u, drop, noise, eps_cls = draws(cfg, step, data, device)                            # (N, ...)
        x, eps, eps_cls = data.seen(latents, noise[mine]), eps[mine], eps_cls[mine]
        y = torch.where(drop[mine] < cfg.label_dropout, model.num_classes, y)
        lam = 0 if 0 < cfg.align_until < step else cfg.repa_weight

        # Losses of our samples
        t_all = TIMESTEPS[cfg.timesteps](u, run["density"], cfg).clamp_min(first_t)              # (N,)
        t = t_all[mine]                                      # (b,)
        x_t, v = fpo.interpolate(x, eps, t, path)
        cls_t, v_cls = fpo.interpolate(cls, eps_cls, t, path)            # (b, 0) without REG
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            out, z, out_cls = net(x_t, t, y, features=True, cls=cls_t)   # z (b, T, D): projected tokens
        target = {"v": v, "x": x, "eps": eps}[cfg.predict]
        L = fpo.velocity_loss(out, target) * fpo.loss_scale(t, cfg.predict, cfg.loss, path)      # (b,)
        if cfg.reg_weight:                                   # the class token has a loss, too
            L = L + cfg.reg_weight * fpo.velocity_loss(out_cls, v_cls)
        more = dict(out=out, x=x, eps=eps, cls=cls, eps_cls=eps_cls, t=t, y=y, model=model, run=run, cfg=cfg)
        A = ALIGN[cfg.align](z, features, **more)            # (b,)

        # Weights, by the losses of the whole global batch [FPO Alg. 2, Thm. 3.3]
        L_all, A_all = gather(torch.stack([L, A], 1)).T      # (N,), (N,)
        c = POLICIES[cfg.policy](L_all, t_all, cfg)
        a = ALIGN_POLICIES[cfg.align_policy](A_all, t_all, cfg)
        loss = (c[mine] * L).mean() + lam * (a[mine] * A).mean()                 # [REPA Eq. 9]

        # Update
        lr = cfg.lr * min(1, step / max(1, cfg.warmup))
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        loss.backward()                                      # DDP averages the processes' gradients
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        opt.step()
        update_average(ema, model, min(cfg.ema, step / (step + 9)) if cfg.ema_warmup else cfg.ema)
        if cfg.timesteps == "vr_loss":
            follow_losses(run["density"], t_all, L_all)

        # Once in a while, and (but for VRPO) only then is the GPU waited for: log, checkpoint, pictures
        run["step"] = step
        recent += [torch.stack([L_all.mean(), A_all.mean(), norm])]
        save = step % cfg.save_every == 0 or step == cfg.steps
        picture = step % cfg.sample_every == 0 or step == cfg.steps
        if step % cfg.log_every == 0 or save or picture:
            mean = log_row(cfg, run, recent, since, c, lr)
            bar.set_postfix(loss=mean)
            stopping = stop.anywhere(device)
            if RANK == 0 and (save or stopping):
                save_checkpoint(cfg, run, model, ema, opt, data.meta)
            if RANK == 0 and picture:
                write_pictures(ema, cfg, data.meta, step)
            if stopping:
                break
            recent, since = [], time.time()


# ----------------------------------------------------------------------------------------------------------
# The network: SiT as published, with the published state-dict names


def position_embedding(width, side):
    """Fixed 2D sin-cos code (side * side, width), in the official order: half the column, half the row."""
    omega = 10000.0 ** (-torch.arange(width // 4).double() / (width // 4))
    angle = torch.arange(side).double()[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)                      # (side, width / 2)
    return torch.cat([code.repeat(side, 1), code.repeat_interleave(side, 0)], 1).float()


def modulate(x, shift, scale):
    """LayerNorm without parameters, then adaLN's scale and shift (B, D): x (B, T, D) -> the same."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def time_frequencies(t):
    """The 128 frequencies of time_features, in t's dtype and on its device."""
    return 10000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)


def time_features(t):
    """256 sinusoids of raw t in [0, 1]: (B,) -> (B, 256)."""
    t = t.float()
    angle = t[:, None] * time_frequencies(t)
    return torch.cat([torch.cos(angle), torch.sin(angle)], 1)


def named(**modules):
    """Modules one after the other, with these names in the state dict."""
    return nn.Sequential(collections.OrderedDict(modules))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, heads, T, D / heads)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:     # where the fused kernel is far slower
            scores = q @ k.mT / q.shape[-1] ** 0.5
            out = scores.softmax(-1).to(v) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Transformer block with adaLN-Zero, the identity at first: x (B, T, D), c (B, D) -> (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = named(
            fc1=nn.Linear(width, 4 * width),
            act=nn.GELU("tanh"),
            fc2=nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """x (B, T, D), c (B, D) -> the patches (B, T, out); with cls_dim also the class token, x[:, 0]."""

    def __init__(self, width, out, cls_dim=0):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.linear_cls = nn.Linear(width, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        x = modulate(x, shift, scale)
        if self.linear_cls:
            return self.linear(x[:, 1:]), self.linear_cls(x[:, 0])
        return self.linear(x)


def mlp(*widths):
    """Linear layers of these widths with SiLU between them."""
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class ConvProjector(nn.Conv2d):
    """A convolution over the grid of tokens: (B, T, D) -> (B, T, feature_dim) [iREPA]."""

    def forward(self, h):
        side = math.isqrt(h.shape[1])
        image = h.mT.unflatten(2, (side, side))
        return super().forward(image).flatten(2).mT


PROJECTORS = {                               # width, hidden width, feature_dim -> module
    "mlp": lambda width, hidden, out: mlp(width, hidden, hidden, out),
    "conv": lambda width, hidden, out: ConvProjector(width, out, 3, padding=1),
}


class SiT(nn.Module):
    """Scalable interpolant transformer: x (B, C, H, W), t (B,), y (B,) -> velocity (B, C, H, W).

    features=True -> velocity, z (B, T, feature_dim), the projected tokens of block encoder_depth (None where
    feature_dim is 0); "only" -> z alone. With cls (B, cls_dim) -> velocity, z (None if not asked for), the
    velocity of cls, which REG makes the first of 1 + T tokens; without REG it is empty, (B, 0)."""

    def __init__(self, size=32, channels=4, num_classes=1000, depth=28, width=1152, heads=16, patch=2,
                 encoder_depth=8, feature_dim=0, projector_width=2048, projector="mlp", bottleneck=0,
                 cls_dim=0):
        super().__init__()
        self.arch = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        vars(self).update(self.arch, checkpointing=False)    # every argument is an attribute, too
        self.shape = channels, size, size
        self.x_embedder = named(proj=nn.Conv2d(channels, bottleneck or width, patch, patch))
        if bottleneck:
            self.x_embedder.widen = nn.Conv2d(bottleneck, width, 1)      # [JiT]
        self.t_embedder = named(mlp=mlp(256, width, width))
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, width))    # last: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels, cls_dim)
        self.projectors = nn.ModuleList()
        if feature_dim:
            self.projectors.append(PROJECTORS[projector](width, projector_width, feature_dim))
        code = position_embedding(width, size // patch)
        if cls_dim:                                          # [REG]
            self.cls_projectors2 = nn.Linear(cls_dim, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
            code = F.pad(code, (0, 0, 1, 0))                 # the class token's place is all zeros
        self.register_buffer("pos_embed", code[None])
        self.initialize()

    def initialize(self):
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in (*linear, *self.x_embedder):
            nn.init.xavier_uniform_(layer.weight.flatten(1))             # patches: as a linear layer of them
            nn.init.zeros_(layer.bias)
        time = self.t_embedder.mlp
        for layer in (time[0], time[2], self.y_embedder.embedding_table):
            nn.init.normal_(layer.weight, std=0.02)
        for name, weight in self.named_parameters():
            if "adaLN" in name or name.startswith("final_layer"):
                nn.init.zeros_(weight)

    def forward(self, x, t, y, features=False, cls=None):
        B, C, H, W = x.shape
        p, z, v_cls = self.patch, None, cls
        h = self.x_embedder(x).flatten(2).mT                 # (B, T, D)
        if self.cls_dim:
            token = self.wg_norm(self.cls_projectors2(cls))
            h = torch.cat([token[:, None], h], 1)            # (B, 1 + T, D)
        h = self.pos_embed + h                               # in this order the sum is contiguous
        with torch.autocast(x.device.type, enabled=False):   # bfloat16 is too coarse for t
            c = self.t_embedder(time_features(t)) + self.y_embedder(y)   # (B, D)
        for depth, block in enumerate(self.blocks, 1):
            h = checkpoint(block, h, c, use_reentrant=False) if self.checkpointing else block(h, c)
            if features and depth == self.encoder_depth and self.projectors:
                z = self.projectors[0](h)                    # (B, T, feature_dim), with REG 1 + T
                if features == "only":
                    return z
        v = self.final_layer(h, c)
        if self.cls_dim:
            v, v_cls = v
        v = v.view(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        if cls is not None:
            return v, z, v_cls
        return (v, z) if features else v


TO_VELOCITY = {                              # what the network outputs, x_t, t, path -> velocity
    "v": lambda out, x_t, t, path: out,
    "x": functools.partial(fpo.velocity_from_x, floor=0.05),
    "eps": functools.partial(fpo.velocity_from_eps, floor=0.05),
}


def as_velocity(model, predict="v", path="linear"):
    """The network as a velocity v(x, t, y), whichever of v, x and eps it outputs, for the samplers.

    x: the images (B, C, H, W) or, with REG, rows of image and class token, (B, C H W + cls_dim)."""

    def velocity(x, t, y):
        image, cls = split_image(model, x.flatten(1))
        out, _, out_cls = model(image, t, y, cls=cls)
        out = torch.cat([out.flatten(1), out_cls], 1).view_as(x)
        return TO_VELOCITY[predict](out, x, t, fpo.PATHS[path])

    return velocity


def split_image(model, x):
    """Rows (B, C H W + cls_dim) -> images (B, C, H, W), class tokens (B, cls_dim)."""
    image, cls = x.split([math.prod(model.shape), model.cls_dim], 1)
    return image.unflatten(1, model.shape), cls


# ----------------------------------------------------------------------------------------------------------
# The data: one folder of memory-mapped arrays, made by data/font_digits.py or data/imagenet.py


class Refused(ValueError):
    """What users get wrong every day. The program ends with its one line, without a traceback."""


def read_rows(array, rows):
    """Rows of a memory-mapped array, each by one read: page faults read far more of a cold disk."""
    if not isinstance(array, np.memmap):
        return array[rows]
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
    with open(array.filename, "rb", buffering=0) as file:
        for row, place in zip(rows, out):
            file.seek(array.offset + int(row) * place.nbytes)
            if file.readinto(place) < place.nbytes:
                raise OSError(f"{array.filename}: row {row} is cut off")
    return out


class Latents:
    """latents.npy (M, C or 2C, H, W), labels.npy (M,), meta.json; if asked for features.npy (M, T, D) and
    cls.npy (M, D), the class tokens of REG.

    What the model sees is (latents - bias) * scale; with meta["moments"] the channels are mean and standard
    deviation, sampled first. Raises Refused for a folder that no model should be trained on."""

    def __init__(self, folder, features=False, cls=False):
        load = lambda name: np.load(f"{folder}/{name}.npy", mmap_mode="r")
        try:
            self.meta = json.loads(Path(folder, "meta.json").read_text())
            self.latents, self.labels = load("latents"), np.array(load("labels"))
            nothing = np.empty((len(self.labels), 0), np.float32)
            self.features = load("features") if features else nothing
            self.cls = load("cls") if cls else nothing
        except (OSError, ValueError) as error:
            hint = "; --align none needs no features" if features else ""
            raise Refused(f"{folder}: {error}{hint}") from None
        self.arrays = self.latents, self.labels, self.features, self.cls
        self.classes, self.moments = self.meta["num_classes"], self.meta.get("moments", False)
        _, channels, self.size, _ = self.latents.shape
        self.channels = channels // 2 if self.moments else channels
        self.feature_dim, self.cls_dim = self.features.shape[-1], self.cls.shape[-1]
        rows = {len(array) for array in self.arrays}
        low, high = self.labels.min(), self.labels.max()
        if len(rows) > 1 or low < 0 or high >= self.classes:
            raise Refused(f"{folder}: arrays of {rows} rows, labels {low} to {high}; one number of rows and "
                          f"labels 0 to {self.classes - 1} are accepted")

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """Rows (b,) as on disk: latents, labels, features (with cls first), cls; (b, 0) if not asked for."""
        arrays = [torch.from_numpy(read_rows(array, rows)) for array in self.arrays]
        if self.feature_dim and self.cls_dim:                # REG aligns the class token, too
            _, _, features, cls = arrays
            arrays[2] = torch.cat([cls[:, None], features.to(cls)], 1)
        return [array.pin_memory() for array in arrays] if torch.cuda.is_available() else arrays

    def seen(self, latents, noise):
        """What the model sees: (B, C or 2C, H, W) from disk, noise (B, C, H, W) -> (B, C, H, W) float32."""
        x = latents.float()
        if self.moments:
            mean, std = x.chunk(2, 1)
            x = mean + std * noise
        return (x - self.meta["bias"]) * self.meta["scale"]

    def some(self, n, seed=0, side=slice(None)):
        """n random images, or that part of both their sides, as the model sees them; at most all."""
        rows = np.random.RandomState(seed).permutation(len(self))[:n]
        parts = np.array_split(rows, math.ceil(len(rows) / 500))         # to hold few whole images at a time
        latents = [read_rows(self.latents, part)[:, :, side, side].copy() for part in parts]
        latents, noise = torch.from_numpy(np.concatenate(latents)), None
        if self.moments:
            shape = len(rows), self.channels, *latents.shape[2:]
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return self.seen(latents, noise)

    def describe(self):
        """What the model sees, in one line. A wrong scale, the commonest silent mistake, raises Refused."""
        x = self.some(256)
        if not 0.5 < x.std() < 2:
            raise Refused(f"the model would see a standard deviation of {x.std():.3g}, and 0.5 to 2 "
                          f"is accepted: is the scale in meta.json, {self.meta['scale']}, wrong?")
        std, mean = torch.std_mean(x, (0, 2, 3))
        return (f"{len(self)} latents {tuple(x.shape[1:])}, {self.classes} classes, features "
                f"{self.features.shape[1:]}; the model sees mean {mean.numpy().round(3)}, "
                f"standard deviation {std.numpy().round(3)}")


def seed_of(seed, n):
    """The seed of step n >= 0 or of image -1 - n: 32 bits, all that a generator on a CPU keeps."""
    return (seed * 0x9E3779B1 + n) % 2 ** 32


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    return np.random.RandomState([seed, epoch]).permutation(n)


def rows_of(step, cfg, n):
    """The rows (N,) of the global batch after step steps: an endless stream of shuffled epochs."""
    position = step * cfg.batch + np.arange(cfg.batch)
    return np.array([permutation(cfg.seed, int(p // n), n)[p % n] for p in position])


def prefetched(read, jobs, ahead=8):
    """read(job) for every job, in order; threads work ahead of whoever uses the results."""
    waiting = collections.deque()
    with ThreadPoolExecutor(ahead) as threads:
        for job in jobs:
            waiting.append(threads.submit(read, job))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def draws(cfg, step, data, device):
    """All that is random in a step: eps (N, C, H, W) normal, u, drop (N,) uniform in [0, 1), noise for
    Latents.seen, used with moments alone, and the noise of the class token (N, cls_dim)."""
    random = dict(generator=torch.Generator(device).manual_seed(seed_of(cfg.seed, step - 1)), device=device)
    shape = cfg.batch, data.channels, data.size, data.size
    eps = torch.randn(shape, **random)
    u, drop = torch.rand(2, cfg.batch, **random)
    noise = torch.randn(shape, **random) if data.moments else eps        # unused without moments
    return eps, u, drop, noise, torch.randn(cfg.batch, data.cls_dim, **random)


# ----------------------------------------------------------------------------------------------------------
# The density of t of VR-sampling: a curve on a grid, drawn from by fpo.sample_timesteps


def start_density(cfg, data, device):
    """The density of t that a run starts with: t, pdf (T,), and the mean of the nearest logit-normal."""
    path = fpo.PATHS[cfg.path]
    bins = 100 if cfg.timesteps == "vr_loss" else 1000
    t = (torch.arange(bins, device=device).double() + 0.5) / bins
    t = t.clamp_min(fpo.FIRST_T[cfg.path])
    alpha, sigma, _, _ = path(t)
    V = None
    if cfg.timesteps in ("vr_gaussian", "vr_logit_normal"):
        # An eigenvalue problem of the size of the latents, or of their middle 32 x 32
        middle = slice(max(0, data.size - 32) // 2, (data.size + 32) // 2)
        x = data.some(max(8192, 4096 * data.channels), side=middle).flatten(1)
        V = fpo.gaussian_posterior_variance(x.to(device), alpha / sigma)
    if cfg.timesteps == "vr_monte_carlo":
        x, random = data.some(200, cfg.seed).flatten(1), torch.Generator(device).manual_seed(cfg.seed)
        V = fpo.posterior_variance(x.to(device), alpha / sigma, 500, random)
    pdf = torch.ones_like(t) if V is None else fpo.vr_density(V, t, path)
    mean, _ = fpo.logit_normal_location(t, pdf, cfg.logit_std)           # [VR Sec. 4.3]
    return dict(t=t.float(), pdf=pdf.float(), mean=mean)


def follow_losses(density, t, losses, decay=0.99, uniform=0.1):
    """vr_loss: the pdf follows the mean loss at each t, the network's estimate of h^2 V [VR Lemma 3.1].
    It ends at the centres of its first and last bin: t is drawn from 0.005 to 0.995."""
    bins = len(density["t"])
    bin = (t * bins).long().clamp_max(bins - 1)
    member = torch.eye(bins, device=t.device)[bin]                       # (N, bins)
    density["loss"] = loss = decay * density.get("loss", 0) + losses @ member
    density["count"] = count = decay * density.get("count", 0) + member.sum(0)
    curve = torch.where(count > 0, loss / count.clamp_min(1e-9), loss.sum() / count.sum())
    density["pdf"] = (1 - uniform) * curve / curve.mean() + uniform


# ----------------------------------------------------------------------------------------------------------
# VRPO: alignment as a reward, in place of REPA's loss


def vrpo_losses(z, features, run, cfg, model, out, x, eps, cls, eps_cls, t, y):
    """VRPO's losses of our images (b,); updates run["moments"], the moving moments of features and rewards.

    The blocks after encoder_depth get no gradient: z ends before them, and the prediction is detached."""
    path, moments = fpo.PATHS[cfg.path], run["moments"]
    x_t, _ = fpo.interpolate(x, eps, t, path)
    v_hat = TO_VELOCITY[cfg.predict](out.detach().float(), x_t, t, path)
    distance = fpo.perceptual_distance(fpo.x_from_velocity(v_hat, x_t, t, path), x)
    t_near = (t - 0.02).clamp_min(fpo.FIRST_T[cfg.path])
    x_near, _ = fpo.interpolate(x, eps, t_near, path)
    cls_near, _ = fpo.interpolate(cls, eps_cls, t_near, path)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.bf16):
        z_near = model(x_near, t_near, y, "only", cls_near)
    moments["feature"] = fpo.moving_moments(gather(fpo.pooled(features)), moments.get("feature"))
    frechet = fpo.frechet_reward(gather_with_grad(fpo.pooled(z)), *moments["feature"])
    semantic = -fpo.alignment_loss(z, features)
    rewards = torch.stack([frechet - distance, semantic, fpo.stability_reward(z, z_near)])       # (3, b)
    moments["reward"] = fpo.moving_moments(gather(rewards.T), moments.get("reward"))
    return fpo.vrpo_loss(rewards, moments["reward"])


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: ours, REPA's, official SiT's

FREE = ("out data init steps log_every sample_every save_every keep_every "     # flags that may change
        "bf16 fp32 compile checkpointing").split()


@contextlib.contextmanager
def whole(path):
    """A file to write in: it is at path when all of it is on the disk, and not before."""
    draft = Path(path).with_name(f".draft-{RANK}")       # a killed save leaves one, not more
    with open(draft, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def lock(folder):
    """Keep other runs out of a folder for as long as the file returned is open. Refused if one is in it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(f"{folder}/.lock-{RANK}", "w")
    try:
        import fcntl                         # its lock ends with the process, however that ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"another process is at work in {folder}: wait for its end, or stop it") from None
    except (ImportError, OSError):
        pass                                 # Windows and some network disks have no such lock
    return file


def checkpoints(folder):
    """The checkpoints of a run, the newest last."""
    return sorted(Path(folder).glob("step-" + 7 * "[0-9]" + ".pt"))


def newest_checkpoint(folder):
    """The newest checkpoint of a run, or None."""
    return max(checkpoints(folder), default=None)


def save_checkpoint(cfg, run, model, ema, opt, meta, keep=2):
    """Write out/step-NNNNNNN.pt, and remove all but the newest; average-NNNNNNN.pt every keep_every steps."""
    step = run["step"]
    average = dict(step=step, ema=ema.state_dict(), meta=meta, arch=model.arch, config=vars(cfg))
    state = dict(average, **run, model=model.state_dict(), opt=opt.state_dict())
    if cfg.keep_every and step % cfg.keep_every == 0:        # first: a run does not come back to this step
        with whole(f"{cfg.out}/average-{step:07d}.pt") as file:
            torch.save(average, file)
    with whole(f"{cfg.out}/step-{step:07d}.pt") as file:
        torch.save(state, file)
    for old in checkpoints(cfg.out)[:-keep]:
        old.unlink()


def read_checkpoint(path, device="cpu"):
    """A checkpoint's content, read without running any code in it. Raises Refused if it is none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):     # REPA's files hold one
            return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        older = [old for old in checkpoints(Path(path).parent) if old < Path(path)]
        advice = f": delete it to go on from {older[-1]}" if older else ""
        raise Refused(f"no checkpoint that can be read: {path} ({type(error).__name__}){advice}") from None


def resume(path, device, cfg, model, ema, opt):
    """Load a checkpoint into model, ema and opt -> the run's state. Refused if other flags made it."""
    saved = read_checkpoint(path, device)
    if "log" not in saved:
        raise Refused(f"{path} was not written by this train_sit.py: choose another --out")
    for name, value in vars(cfg).items():
        was = saved["config"].get(name, getattr(Config, name))
        if was != value and name not in FREE:
            raise Refused(f"{path} was made with --{name} {was}, not {value}: choose another --out")
    model.load_state_dict(saved["model"])
    ema.load_state_dict(saved["ema"])
    opt.load_state_dict(saved["opt"])
    return {name: saved[name] for name in ("step", "density", "moments", "log")}


NEW_PARTS = "projectors", "y_embedder", "cls_projectors2", "wg_norm", "final_layer.linear_cls", "pos_embed"


def start_from(path, model, cfg):
    """Take the weights of another checkpoint, its average. NEW_PARTS stay new where the two differ."""
    other, config = load_model(path)
    if (config["path"], config["predict"]) != (cfg.path, cfg.predict):
        raise Refused(f"--init {path} was trained with --path {config['path']} --predict {config['predict']}")
    ours, theirs = model.state_dict(), other.state_dict()
    fits = {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape}
    new = (ours.keys() | theirs.keys()) - fits.keys()
    if not all(name.startswith(NEW_PARTS) for name in new):
        raise Refused(f"--init {path} has another architecture: {other.arch}, not {model.arch}")
    model.load_state_dict(fits, strict=False)
    say(f"weights from {path}; new or left out: {', '.join(sorted(new)) or 'none'}")


def load_model(path, ema=True):
    """(model, config) of our checkpoint, REPA's or an official SiT state dict; in eval mode, on the CPU.

    config: dict with path, predict, step and the data's meta where known. The model is always in our time and
    sign (as_velocity gives v from a network that outputs x or eps). Raises Refused for any other file."""
    saved = read_checkpoint(path)
    key = "ema" if ema else "model"
    try:
        if "config" in saved:                                            # ours
            state, arch = saved[key], saved["arch"]
            config = {**saved["config"], "meta": saved["meta"], "step": saved["step"]}
        else:                                                            # REPA's, or SiT's bare state dict
            state, arch = from_published(saved.get(key, saved))
            config = dict(path="linear", predict="v", meta=None, step=saved.get("steps"))
        model = SiT(**arch)
        model.load_state_dict(state)
    except Exception as error:
        raise Refused(f"{path} is no SiT that we know ({type(error).__name__})") from None
    return model.eval().requires_grad_(False), config


def from_published(state):
    """REPA's, REG's or official SiT's state dict -> the state dict and the arguments of our SiT.

    SiT's time and sign run the other way: v(x, t) = -v_SiT(x, 1 - t), the first half of its 2C outputs.
    cos and sin of w (1 - t) are a rotation of cos and sin of w t: time is reversed in mlp.0, exactly."""
    state, last, first = dict(state), "final_layer.linear.", "t_embedder.mlp.0.weight"
    tokens, width = state["pos_embed"].shape[1:]
    C, p = state["x_embedder.proj.weight"].shape[1:3]
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    like = next(m for m in MODELS.values() if (m["width"], m["depth"]) == (width, depth))    # heads and more
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    arch = dict(like, size=math.isqrt(tokens) * p, channels=C, patch=p, num_classes=classes)
    if "projectors.0.4.weight" in state:
        arch["feature_dim"], arch["projector_width"] = state["projectors.0.4.weight"].shape
    if "wg_norm.weight" in state:                            # isqrt has left its token out of size
        arch["cls_dim"] = state["cls_projectors2.weight"].shape[1]
    if len(state[last + "bias"]) == 2 * C * p * p:
        for name in (last + "weight", last + "bias"):
            state[name] = -state[name].unflatten(0, (p * p, 2 * C))[:, :C].flatten(0, 1)
        W = state[first].double()
        w, (cos, sin) = time_frequencies(W), W.chunk(2, 1)
        turned = [cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()]
        state[first] = torch.cat(turned, 1).to(state[first])
    return state, arch


# ----------------------------------------------------------------------------------------------------------
# Log and pictures

COLUMNS = "step,loss,align,grad_norm,moved,ess,lr,images_per_s"              # README says what they are


def log_row(cfg, run, recent, since, c, lr):
    """A row more in out/log.csv, of the losses and norms since the last row, at the time since, and of the
    last weights c (N,) -> the mean loss. Refused if a number is not finite."""
    loss, align, norm = torch.stack(recent).mean(0).tolist()
    if not math.isfinite(loss + align + norm):
        raise Refused(f"the loss is not finite at step {run['step']} or shortly before; the last checkpoint: "
                      f"{newest_checkpoint(cfg.out)}")
    if run["moments"]:
        align = -run["moments"]["reward"][0][1]              # VRPO's own mean is 0: REPA's loss instead
    moved, ess = fpo.weight_moved(c)
    speed = cfg.batch * len(recent) / (time.time() - since)              # the GPU is done by now
    row = loss, align, norm, moved, ess / len(c), lr, speed
    run["log"] += [f"{run['step']}," + ",".join(f"{value:.6g}" for value in row)]
    if RANK == 0:
        with whole(f"{cfg.out}/log.csv") as file:
            file.write("\n".join([COLUMNS, *run["log"], ""]).encode())
    return loss


def to_pixels(x, meta):
    """What the model sees (B, C, H, W) -> uint8 (B, H, W, 3): pixels as they are, latents as a rough look."""
    x = x / meta["scale"] + meta["bias"] if x.shape[1] <= 3 else 127.5 + 51 * x[:, :3]
    x = x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)
    return x.expand(-1, -1, -1, 3).cpu().numpy()


def write_grid(pixels, path, columns=10):
    """uint8 (B, H, W, 3), B a multiple of columns -> one PNG, enlarged to about 48 pixels an image."""
    import matplotlib.image
    H, W = pixels.shape[1:3]
    sheet = pixels.reshape(-1, columns, H, W, 3).swapaxes(1, 2).reshape(-1, columns * W, 3)
    zoom = max(1, 48 // H)
    matplotlib.image.imsave(path, sheet.repeat(zoom, 0).repeat(zoom, 1))


def write_pictures(model, cfg, meta, step):
    """out/samples-NNNNNNN.png: ten samples of each of the first ten classes at guidance 2."""
    device = model.pos_embed.device
    y = torch.arange(100, device=device) // 10 % model.num_classes
    generator = torch.Generator().manual_seed(cfg.seed)
    x = torch.randn(100, math.prod(model.shape) + model.cls_dim, generator=generator)
    v = fpo.guided(as_velocity(model, cfg.predict, cfg.path), y, 2.0, null=model.num_classes)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
        x = fpo.heun(v, x.to(device), 20, fpo.FIRST_T[cfg.path])
    x, _ = split_image(model, x)
    write_grid(to_pixels(x, meta), f"{cfg.out}/samples-{step:07d}.png")


# ----------------------------------------------------------------------------------------------------------
# Processes and signals


def say(message):
    if RANK == 0:
        print(message, flush=True)


def start_processes(no_tf32):
    """The device of this process, alone or one of torchrun's. If one ends by an error, torchrun ends all."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # TF32 makes products of float32 several times faster, at 10 bits
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not no_tf32
    if WORLD > 1:
        dist.init_process_group(timeout=datetime.timedelta(hours=1))     # NCCL between GPUs, gloo on CPUs
    return device


def compile_blocks(model):
    torch._dynamo.config.optimize_ddp = False                # or it cuts the blocks at DDP's gradient buckets
    for block in model.blocks:
        block.compile(dynamic=False)         # sampling has two shapes, with and without guidance


def gather(x):
    """x (b, ...) of every process -> (N, ...), in the order of the global batch, without gradient."""
    x = x.detach().contiguous()
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def gather_with_grad(x):
    """gather, with a gradient to our own rows: WORLD times it, because DistributedDataParallel averages."""
    parts = list(gather(x).split(len(x)))
    parts[RANK] = WORLD * x - (WORLD - 1) * x.detach()
    return torch.cat(parts)


@torch.no_grad()
def update_average(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Stop:
    """Ctrl-C or SIGTERM: remembered until the next row of the log, where all processes save and end together.

    After the first, Ctrl-C ends at once; a second SIGTERM, as some job managers send, changes nothing. After
    the with statement both mean again what they meant before."""

    def __enter__(self):
        self.signal = self.agreed = 0
        numbers = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self.remember) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def anywhere(self, device):
        """The signal that any process has got by now, or 0: the same answer in all of them."""
        self.agreed = gather(torch.tensor([self.signal], device=device)).max().item()
        return self.agreed


# ----------------------------------------------------------------------------------------------------------
# Flags

CHOICES = dict(model=MODELS, path=fpo.PATHS, predict=TO_VELOCITY, loss=TO_VELOCITY, timesteps=TIMESTEPS,
               policy=POLICIES, align_policy=ALIGN_POLICIES, align=ALIGN, projector=PROJECTORS)
LOWEST = dict(log_every=1, sample_every=1, save_every=1, steps=1, batch=1, logit_mean=-100, logit_std=1e-9,
              r=1e-9, tau=1e-9)
HIGHEST = dict(r=1, label_dropout=1, ema=1)


def fail(message):
    """End the program with one line, said once on each machine."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    sys.exit(f"{Path(sys.argv[0]).name}: {message}" if first else 1)


def parse_flags(kind, choices, lowest, highest, argv, description):
    """An instance of the dataclass kind: a flag for each field, its comments as help and as headings.

    Numbers are finite, at least 0 or as lowest says, and at most as highest says."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=description,
        formatter_class=functools.partial(argparse.RawTextHelpFormatter, max_help_position=26))
    parser.error = fail
    lines = re.findall(r"^    (?:# (.*)|(\w+): .*  # (.*))$", inspect.getsource(kind), re.M)
    for heading, name, help in lines:
        if heading:
            group = parser.add_argument_group(heading)
            continue
        default, names = getattr(kind, name), choices.get(name, ())
        help = "; ".join([f"{help} (default: {default})", *names])
        options = dict(type=type(default), choices=names or None, metavar="")
        if isinstance(default, bool):
            options = dict(action=argparse.BooleanOptionalAction)
        if isinstance(default, tuple):
            options = dict(type=float, nargs="*")
        group.add_argument(f"--{name}", default=default, help=help, **options)
    cfg = kind(**vars(parser.parse_args(argv)))
    for name, value in vars(cfg).items():
        low, high = lowest.get(name, 0), highest.get(name, 1e9)
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"--{name} {value}: {low} to {high} is accepted")
    return cfg


def check(cfg, data):
    """Raise Refused for flags that do not fit the data, the processes or each other."""
    tokens = (data.size // MODELS[cfg.model]["patch"]) ** 2
    if cfg.align == "vrpo" and cfg.align_policy != "uniform":
        raise Refused("--align vrpo has weights of its own: add --align_policy uniform")
    if cfg.reg_weight and (cfg.predict, cfg.loss, cfg.projector) != ("v", "v", "mlp"):
        raise Refused("--reg_weight goes with --predict v, --loss v and --projector mlp")
    if cfg.keep_every % cfg.save_every:
        raise Refused(f"--keep_every {cfg.keep_every}: a multiple of --save_every is accepted")
    if cfg.batch % WORLD:
        raise Refused(f"--batch {cfg.batch} is of all processes: a multiple of {WORLD} is accepted")
    if data.feature_dim and data.features.shape[1] != tokens:
        raise Refused(f"the data have features of {data.features.shape[1]} tokens an image, but --model "
                      f"{cfg.model} cuts {data.size} x {data.size} latents into {tokens} patches")


def main(argv=None):
    cfg = parse_flags(Config, CHOICES, LOWEST, HIGHEST, argv, __doc__)
    if cfg.data == Config.data:
        from data import font_digits
        cfg.data = str(font_digits.ensure())
    try:
        with Stop() as stop:
            train(cfg, stop)
        end = "stopped; the same command goes on from" if stop.agreed else "done:"
        say(f"{end} {newest_checkpoint(cfg.out)}")
    except Refused as error:
        fail(error)
    if dist.is_initialized():
        dist.destroy_process_group()         # not after an error, when it would wait for the others
    if stop.agreed:
        sys.exit(128 + stop.agreed)


if __name__ == "__main__":
    main()
