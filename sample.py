r"""Checkpoint in; a picture, an .npz for the ADM evaluator and, with --metrics, measurements out.

    python sample.py                                             # 100 digits from runs/digits
    python sample.py --count 1000 --guidance 2 --metrics
    torchrun --nproc_per_node 8 sample.py --checkpoint XL.pt --vae stabilityai/sd-vae-ft-ema --count 50000 \
        --sampler sde --steps 250 --guidance 1.8 --interval 0 0.7 --amp tf32

Image i depends on the seed and on i alone, neither on the number of processes nor, but for rounding, on the
batch size. Every process saves its parts in OUT/parts, and process 0 joins them; a command that was stopped
goes on where it was. samples.npz holds arr_0 (N, H, W, 3) uint8, the labels, and every setting.
"""
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import fpo
import train_sit
from train_sit import RANK, WORLD, Latents, Refused


@dataclasses.dataclass
class Config:
    # Input and output
    checkpoint: str = "runs/digits"       # a checkpoint, or the folder of a run for its newest one
    out: str = "samples"                  # folder for grid.png, samples.npz, metrics.json
    count: int = 100                      # images
    batch: int = 100                      # images at a time in each process
    classes: tuple = ()                   # labels, in turn; without it every label is drawn uniformly
    seed: int = 0                         # seed of labels and noise
    ema: bool = True                      # sample from the weight average
    vae: str = ""                         # decoder of latents, of diffusers: stabilityai/sd-vae-ft-ema
    # Sampler
    sampler: str = "heun"                 # integrator
    steps: int = 25                       # steps of euler, heun (2 evaluations each) and sde
    tolerance: float = 1e-4               # rtol and atol of dopri5
    w: float = 2.0                        # sde: diffusion coefficient w sigma_t; 2 as in the published runs
    last: float = 0.04                    # sde: the last step, without noise, runs from here; 0: equal steps
    guidance: float = 1.0                 # guidance scale; 1: none
    cls_guidance: float = -1.0            # that of REG's class token; -1: the same; 0 or 1: none
    interval: tuple = (0.0, 1.0)          # timesteps at which guidance acts
    amp: str = "fp32"                     # precision of the network; tf32: fp32 with TF32 matrix products
    compile: bool = torch.cuda.is_available()    # compile the blocks
    # Metrics
    metrics: bool = False                 # compare with the data
    data: str = "data/font_digits"        # the data


SAMPLERS = {                              # v, noise, flags, path, one generator for each image, end -> images
    "euler": lambda v, x, cfg, path, g, end: fpo.euler(v, x, cfg.steps, end),
    "heun": lambda v, x, cfg, path, g, end: fpo.heun(v, x, cfg.steps, end),
    "dopri5": lambda v, x, cfg, path, g, end: fpo.dopri5(v, x, cfg.tolerance, cfg.tolerance, end),
    "sde": lambda v, x, cfg, path, g, end: fpo.euler_maruyama(v, x, cfg.steps, path, cfg.w, cfg.last, g, end),
}
CHOICES = dict(sampler=SAMPLERS, amp=("fp32", "tf32", "bf16"))
LOWEST = dict(count=1, batch=1, steps=1, tolerance=1e-12, cls_guidance=-1)
HIGHEST = dict(last=1)


# ----------------------------------------------------------------------------------------------------------
# Drawing


def generate(model, config, cfg, rows, device):
    """The images with numbers rows (B,) as the model sees them -> x (B, C, H, W), labels (B,), NFE.

    Every image has its own generator: for its noise, then its label, then the noise of the SDE."""
    pixels, D = math.prod(model.shape), model.cls_dim
    seeds = [train_sit.seed_of(cfg.seed, -1 - int(row)) for row in rows]     # training counts upwards
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(pixels + D, generator=g) for g in generators])
    labels = torch.cat([torch.randint(model.num_classes, (1,), generator=g) for g in generators])
    if cfg.classes:
        labels = torch.tensor(cfg.classes).long()[rows % len(cfg.classes)]
    y = labels.to(device)
    cls_guidance = {-1: cfg.guidance, 0: 1}.get(cfg.cls_guidance, cfg.cls_guidance)
    scale = torch.tensor([cfg.guidance] * pixels + [cls_guidance] * D, device=device)
    v = train_sit.as_velocity(model, config["predict"], config["path"])
    v = fpo.counted(fpo.guided(v, y, scale, cfg.interval, model.num_classes))
    path, end = fpo.PATHS[config["path"]], fpo.FIRST_T[config["path"]]
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp == "bf16"):
        x = SAMPLERS[cfg.sampler](v, x.to(device), cfg, path, generators, end)
    x, _ = train_sit.split_image(model, x.float())           # REG's class token has done its work
    if not x.isfinite().all():
        message = f"images {rows[0]} to {rows[-1]} are not finite: is the checkpoint, or --guidance, bad?"
        raise ArithmeticError(message)                       # said by whichever process finds it
    return x, labels.numpy(), v.nfe


@torch.no_grad()
def decoded(x, meta, vae):
    """What the model sees (B, C, H, W) -> uint8 (B, H', W', 3): by the VAE, 8 at a time to save memory."""
    if vae is None:
        return train_sit.to_pixels(x, meta)
    z = x / meta["scale"] + meta["bias"]
    z = z / meta.get("scaled_by", 1)                         # fast-DiT's are scaled on the disk
    images = torch.cat([vae.decode(part).sample for part in z.split(8)])
    images = (127.5 * (images.float() + 1)).clamp(0, 255).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


def draw_parts(model, config, cfg, meta, vae, device, files):
    """Draw those of part 0, 1, ... that are this process's and not there yet, each whole or not at all."""
    ours = range(RANK, len(files), WORLD)
    for k in tqdm(ours, unit="part", disable=RANK > 0):
        if files[k].exists():
            continue
        end = min(cfg.count, (k + 1) * cfg.batch)
        rows = np.arange(k * cfg.batch, end)
        x, labels, nfe = generate(model, config, cfg, rows, device)
        pixels = decoded(x, meta, vae)
        with train_sit.whole(files[k]) as file:
            np.savez(file, arr_0=pixels, x=x.cpu().numpy(), labels=labels, nfe=nfe)


def join_parts(files, count):
    """All parts, once they are there -> images (N, H, W, 3) on the disk, labels (N,), NFE."""
    while not all(file.exists() for file in files):
        time.sleep(1)                                        # the other processes are not done yet
    images, labels, nfe, start = None, [], 0, 0
    for file in files:
        with np.load(file) as part:                          # closed again: there may be thousands
            pixels = part["arr_0"]
            labels.append(part["labels"])
            nfe = max(nfe, int(part["nfe"]))
        if images is None:
            shape = count, *pixels.shape[1:]
            images = np.lib.format.open_memmap(file.parent / "arr_0.npy", "w+", np.uint8, shape)
        images[start:start + len(pixels)] = pixels
        start += len(pixels)
    return images, np.concatenate(labels), nfe


# ----------------------------------------------------------------------------------------------------------
# Metrics: on features (N, D) of data and samples


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two feature sets (N, D), (N', D) -> number, in float64."""
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(A @ B).real.clamp_min(0).sqrt()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return (shift + A.trace() + B.trace() - 2 * root.sum()).item()


def precision_recall(real, fake, k=3):
    """Share of fake inside the manifold of real, and the reverse: (N, D), (N', D) -> two numbers in [0, 1].

    A manifold is the union of the balls around its points that reach their k-th neighbour (Improved Precision
    and Recall Metric for Assessing Generative Models)."""
    def covered(queries, points):
        radius = torch.cdist(points, points).kthvalue(k + 1, 1).values       # the nearest is the point itself
        inside = torch.cdist(queries, points) <= radius
        return inside.any(1).double().mean().item()

    return covered(fake, real), covered(real, fake)


def measure(data, folder, images, x, labels):
    """Samples, images (N, H, W, 3), x (N, C, H, W), labels (N,), against the data: full name -> number."""
    judge, name = None, "latents averaged to 8 x 8"
    embed = lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1)
    if Path(folder, "judge.pt").exists():
        from data.font_digits import load_judge
        judge, name = load_judge(folder), "the judge's features"
        embed = lambda x: torch.cat([judge.embed(part) for part in x.split(1000)])
        gray = torch.from_numpy(images[:, None, :, :, 0])                    # the pixels as they were written
        x = data.seen(gray, None)
    real, fake = embed(data.some(10_000 + len(x))), embed(x)
    half = len(real) // 2
    spare, real = real[:half][:len(x)], real[half:]
    n, result = min(len(fake), len(real), 5000), {}
    for features, which in ((fake, ""), (spare, f" of {len(spare)} images of the data")):
        precision, recall = precision_recall(real[:n], features[:n])
        result[f"Frechet distance in {name}{which}"] = frechet_distance(real, features)
        result[f"precision{which} (k = 3, {n} real ones)"] = precision
        result[f"recall{which} (k = 3, {n} real ones)"] = recall
    if judge:
        read = judge.head(fake).argmax(1).numpy()
        result["judge accuracy"] = float((read == labels).mean())
    return result


# ----------------------------------------------------------------------------------------------------------
# The program


def prepare(cfg):
    """All that can be refused before any work: checkpoint, flags, data -> its path, model, config, data."""
    path = Path(cfg.checkpoint)
    if path.is_dir():
        path = train_sit.newest_checkpoint(path) or path / "step-*.pt"
    model, config = train_sit.load_model(path, cfg.ema)
    if not set(cfg.classes) <= set(range(model.num_classes)):
        raise Refused(f"--classes {cfg.classes}: labels from 0 to {model.num_classes - 1} are accepted")
    if len(cfg.interval) != 2 or not 0 <= cfg.interval[0] <= cfg.interval[1] <= 1:
        raise Refused(f"--interval {cfg.interval}: two numbers in [0, 1], the smaller first, are accepted")
    if not cfg.metrics:
        return path, model, config, None
    if cfg.count < 10:
        raise Refused(f"--metrics needs --count 10 or more, not {cfg.count}")
    data = Latents(cfg.data)
    theirs, ours = (data.channels, data.size), (model.channels, model.size)
    if theirs != ours:
        raise Refused(f"channels and side of the latents: {theirs} in {cfg.data}, {ours} in the checkpoint")
    return path, model, config, data


def begin(folder, settings):
    """Make the folder of the parts. Raise Refused if it holds parts that other settings made."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "settings.json"
    if not begun.exists():
        for part in folder.glob("*.npz"):                    # of settings that are not known
            part.unlink()
        with train_sit.whole(begun) as file:
            file.write(json.dumps(settings).encode())
    for name, was in json.loads(begun.read_text()).items():
        if was != settings[name]:
            raise Refused(f"{folder} was begun with {name} {was}, not {settings[name]}: finish or delete it")


def sample(cfg):
    """The whole program: parts, then samples.npz, grid.png and metrics.json in cfg.out."""
    device, out, started = train_sit.start_processes(cfg.amp == "fp32"), Path(cfg.out), time.time()
    path, model, config, data = prepare(cfg)
    if cfg.compile:
        train_sit.compile_blocks(model)
    vae = None
    if cfg.vae:
        from data.imagenet import load_vae
        vae = load_vae(cfg.vae, device)
    meta = config["meta"] or {"scale": 0.18215, "bias": 0.0}
    settings = {name: value for name, value in vars(cfg).items() if name not in ("out", "metrics", "data")}
    settings |= dict(checkpoint=str(path), written=path.stat().st_mtime_ns, step=config["step"],
                     path=config["path"], predict=config["predict"], classes=list(cfg.classes),
                     interval=list(cfg.interval), trained_on_vae=meta.get("vae"))

    folder, locked = out / "parts", train_sit.lock(out)
    if RANK == 0:
        begin(folder, settings)              # the others wait for it
    if WORLD > 1:
        dist.barrier()
    files = [folder / f"{k:06d}.npz" for k in range(math.ceil(cfg.count / cfg.batch))]
    draw_parts(model.to(device), config, cfg, meta, vae, device, files)
    if RANK > 0:
        return
    images, labels, settings["nfe"] = join_parts(files, cfg.count)
    with train_sit.whole(out / "samples.npz") as file:
        np.savez(file, arr_0=images, labels=labels, settings=json.dumps(settings))
    columns = min(10, cfg.count)
    shown = min(100, cfg.count // columns * columns)
    train_sit.write_grid(images[:shown], out / "grid.png", columns)
    print(f"wrote {out}/samples.npz: {cfg.count} images, {settings['nfe']} evaluations each, "
          f"{time.time() - started:.0f} s")
    if data:
        x = np.concatenate([np.load(file)["x"] for file in files])
        result = measure(data, cfg.data, images, torch.from_numpy(x), labels)
        for key, value in result.items():
            print(f"{value:10.4f}  {key}")
        result |= dict(data=cfg.data, settings=settings)
        (out / "metrics.json").write_text(json.dumps(result, indent=1))
    shutil.rmtree(folder, ignore_errors=True)                # some network disks keep a file that is open


def main(argv=None):
    cfg = train_sit.parse_flags(Config, CHOICES, LOWEST, HIGHEST, argv, __doc__)
    if cfg.metrics and cfg.data == Config.data:
        from data import font_digits
        cfg.data = str(font_digits.ensure())
    try:
        sample(cfg)
    except Refused as error:
        train_sit.fail(error)
    if dist.is_initialized():
        dist.destroy_process_group()         # not after an error, when it would wait for the others


if __name__ == "__main__":
    main()
