r"""Checkpoint in; a picture grid, an .npz for the ADM evaluator and, with --metrics, measurements out.

    python sample.py                                             # 100 digits from runs/digits
    python sample.py --count 1000 --guidance 2 --metrics
    torchrun --nproc_per_node 8 sample.py --checkpoint XL.pt --vae stabilityai/sd-vae-ft-ema --count 50000 \
        --sampler sde --steps 250 --guidance 1.8 --interval 0 0.7 --amp tf32

Image i depends on the seed and on i alone: neither on the batch size nor on the number of processes. The .npz holds
arr_0 (N, H, W, 3) uint8, the labels, and every setting it was sampled with.
"""
import contextlib
import dataclasses
import json
import math
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fpo
from data import imagenet
from train_sit import (Latents, as_velocity, data_folder, fail, load_model, newest_checkpoint, parse_flags, seed_of,
                       start_processes, together, writable)


@dataclasses.dataclass
class Config:
    checkpoint: str = "runs/digits"       # a checkpoint, or the folder of a run for its newest one
    out: str = "samples"                  # folder for grid.png, samples.npz, metrics.json
    count: int = 100                      # images
    batch: int = 100                      # images at a time in each process
    classes: tuple = ()                   # labels, in turn; without it every label is drawn uniformly
    seed: int = 0                         # seed of labels and noise
    ema: bool = True                      # sample from the weight average
    sampler: str = "heun"                 # integrator
    steps: int = 25                       # steps of euler, heun (2 evaluations each) and sde
    tolerance: float = 1e-4               # rtol and atol of dopri5
    w: float = 2.0                        # sde: diffusion coefficient w sigma_t; 2 as in the published runs
    last: float = 0.04                    # sde: the last, noiseless step runs from here; 0: equal steps
    guidance: float = 1.0                 # guidance scale; 1: none
    interval: tuple = (0.0, 1.0)          # timesteps at which guidance acts
    amp: str = "fp32"                     # precision of the network; tf32: fp32 with TF32 matrix products
    vae: str = ""                         # decoder of latents: a diffusers name or folder (stabilityai/sd-vae-ft-ema)
    metrics: bool = False                 # compare with the data
    data: str = "data/font_digits"        # the data for --metrics


SAMPLERS = {                              # v, noise, flags, path, one generator for each image, end -> images
    "euler": lambda v, x, cfg, path, g, end: fpo.euler(v, x, cfg.steps, end),
    "heun": lambda v, x, cfg, path, g, end: fpo.heun(v, x, cfg.steps, end),
    "dopri5": lambda v, x, cfg, path, g, end: fpo.dopri5(v, x, cfg.tolerance, cfg.tolerance, end),
    "sde": lambda v, x, cfg, path, g, end: fpo.euler_maruyama(v, x, cfg.steps, path, cfg.w, cfg.last, g, end),
}
ACCEPTED = dict(sampler=list(SAMPLERS), amp=["fp32", "tf32", "bf16"], count=(1, 10 ** 9), batch=(1, 10 ** 6),
                steps=(1, 10 ** 6), tolerance=(1e-12, 1), guidance=(0, 1000), w=(0, 100), last=(0, 0.99),
                seed=(0, 2 ** 31))


def image_noise(seed, rows, shape):
    """For every row its own CPU generator and its first draw: noise (B, C, H, W), the same in any batch."""
    generators = [torch.Generator().manual_seed(seed_of(seed, int(row))) for row in rows]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


@torch.no_grad()
def to_pixels(x, meta, vae=None):
    """What the model sees (B, C, H, W) -> uint8 (B, H', W', 3): decoded by the VAE, 8 at a time so that memory is flat.

    Without a VAE: gray if C = 1, else a rough look at three channels.
    """
    if vae:                                                            # scaled_by: fast-DiT's are scaled on the disk
        z = (x / meta["scale"] + meta["bias"]) / meta.get("scaled_by", 1)
        x = torch.cat([vae.decode(part).sample for part in z.split(8)])
        x = 127.5 * (x.float() + 1)
    else:
        x = x / meta["scale"] + meta["bias"] if x.shape[1] == 1 else 127.5 + 51 * x[:, [0, 1, 2 % x.shape[1]]]
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu()


def write_grid(pixels, path):
    """uint8 (B, H, W, 3) -> one PNG, enlarged to about 48 pixels an image."""
    import matplotlib.image
    (B, H, W, _), columns = pixels.shape, 10
    rows, zoom = math.ceil(B / columns), max(1, 48 // H)
    sheet = np.zeros((rows * columns, H, W, 3), np.uint8)
    sheet[:B] = pixels
    sheet = sheet.reshape(rows, columns, H, W, 3).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3)
    matplotlib.image.imsave(path, sheet.repeat(zoom, 0).repeat(zoom, 1))


def generate(model, config, cfg, rows, device):
    """The images with numbers rows (B,) as the model sees them -> x (B, C, H, W), labels (B,), NFE.

    ValueError where they are not finite.
    """
    shape = (model.channels, model.arch["size"], model.arch["size"])
    x, generators = image_noise(cfg.seed, rows, shape)
    labels = [int(torch.randint(model.num_classes, (1,), generator=g)) for g in generators]
    if cfg.classes:
        labels = [cfg.classes[row % len(cfg.classes)] for row in rows]
    y, path = torch.tensor(labels, device=device), fpo.PATHS[config["path"]]
    v = as_velocity(model, config["predict"], config["path"])
    v = fpo.counted(fpo.guided(v, y, cfg.guidance, cfg.interval, model.num_classes))
    end = fpo.FIRST_T[config["path"]]
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp == "bf16"):
        x = SAMPLERS[cfg.sampler](v, x.to(device), cfg, path, generators, end)
    if not x.isfinite().all():
        raise ValueError(f"images {rows[0]} to {rows[-1]} came out with numbers that are not finite: what is wrong "
                         f"with the checkpoint, or with --guidance {cfg.guidance} --amp {cfg.amp}?")
    return x.float(), np.array(labels), v.nfe


# ------------------------------------------------------------------------------------------------------------------
# Metrics: on features (N, D) of data and samples


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two feature sets (N, D), (N', D), in float64."""
    a, b = a.double(), b.double()
    return -fpo.frechet_reward(b, a.mean(0), torch.cov(a.T)).item()


def precision_recall(real, fake, k=3):
    """Share of fake inside the manifold of real, and the reverse: (N, D), (N, D) -> two numbers in [0, 1].

    A manifold is the union of the balls around its points that reach their k-th neighbour (Improved Precision and
    Recall Metric for Assessing Generative Models).
    """
    def covered(queries, points):
        radius = torch.cdist(points, points).kthvalue(k + 1, 1).values        # the nearest is the point itself
        return (torch.cdist(queries, points) <= radius).any(1).double().mean().item()

    return covered(fake, real), covered(real, fake)


def cknna(a, b, k=10):
    """Kernel alignment over mutual k nearest neighbours [REPA Eq. 21-24]: (N, D), (N, D') -> 1 for equal geometry."""
    kernels, near = [], []
    for z in (a.double(), b.double()):
        kernel = z @ z.T
        kernels.append(kernel - kernel.mean(1, keepdim=True))
        near.append(torch.zeros_like(kernel).scatter(1, kernel.fill_diagonal_(-math.inf).topk(k, 1).indices, 1.0))
    align = lambda i, j: (near[i] * near[j] * kernels[i] * kernels[j]).sum()
    return (align(0, 1) / (align(0, 0) * align(1, 1)).sqrt()).item()


def linear_probe(z, labels, classes, ridge=1e-2):
    """Accuracy on the second half of z (N, D), standardised, of ridge regression to one-hot labels on the first half.

    differs from [REPA App. C]: closed form, in place of 90 epochs of Adam on a logistic loss.
    """
    half = len(z) // 2
    z = torch.cat([(z - z[:half].mean(0)) / z[:half].std(0).clamp_min(1e-6), torch.ones(len(z), 1)], 1).double()
    train, target = z[:half], F.one_hot(labels[:half], classes).double()
    W = torch.linalg.solve(train.T @ train + ridge * half * torch.eye(z.shape[1]), train.T @ target)
    return ((z[half:] @ W).argmax(1) == labels[half:]).double().mean().item()


def noised(model, config, data, t):
    """len(t) images of the data at times t, 200 at a time, the same for every model: yields x_t, v, t, y, features."""
    rows, device = np.random.RandomState(1).permutation(len(data.labels))[:len(t)], next(model.parameters()).device
    latents, labels, features = data.batch(rows)
    random = torch.Generator().manual_seed(1)
    for x, y, f, t in zip(*(a.split(200) for a in (latents, labels, features, t))):
        noise, eps = torch.randn(2, len(x), model.channels, *x.shape[2:], generator=random)
        x_t, v = fpo.interpolate(data.see(x, noise), eps, t, fpo.PATHS[config["path"]])
        yield [a.to(device) for a in (x_t, v, t, y, f)]


@torch.no_grad()
def data_losses(model, config, data, n=4000):
    """t (n,), spread evenly over [0, 1], and the velocity and alignment losses (n,) of n images there, all on the CPU.

    Comparable between models, however they drew t in training. Without a projector the alignment losses are NaN.
    """
    n, losses = min(n, len(data.labels)), []
    t = (torch.randperm(n, generator=torch.Generator().manual_seed(1)) + 0.5) / n
    t = t.clamp_min(fpo.FIRST_T[config["path"]])
    for x_t, v, part, y, f in noised(model, config, data, t):
        out, z = model(x_t, part, y, features=True) if len(model.projectors) else (model(x_t, part, y), None)
        v_hat = as_velocity(lambda *_: out, config["predict"], config["path"])(x_t, part, y)
        velocity = fpo.velocity_loss(v_hat, v)
        losses.append(torch.stack([velocity, velocity * math.nan if z is None else fpo.alignment_loss(z, f)]).cpu())
    return t, *torch.cat(losses, 1)


@torch.no_grad()
def measure_features(model, config, data, t=0.1, n=4000):
    """What block encoder_depth knows of n images at time t without their labels, beside the data's encoder."""
    hidden, kept = [], []
    hook = model.blocks[model.encoder_depth - 1].register_forward_hook(lambda m, i, h: hidden.append(h.mean(1).cpu()))
    for x_t, _, part, y, f in noised(model, config, data, torch.full((min(n, len(data.labels)),), t)):
        null = torch.full_like(y, model.num_classes)
        z = model(x_t, part, null, features="only" if len(model.projectors) else False)
        cosine = -fpo.alignment_loss(z, f) if len(model.projectors) else torch.full((1,), math.nan)
        kept.append([a.cpu() for a in (cosine, fpo.pooled(f), y)])
    hook.remove()
    hidden, (cosine, pooled, labels) = torch.cat(hidden), (torch.cat(a) for a in zip(*kept))
    return {f"alignment, cosine (t = {t})": cosine.mean().item(),
            f"alignment, CKNNA (k = 10, t = {t})": cknna(hidden, pooled),
            f"linear probe of block {model.encoder_depth} (t = {t})": linear_probe(hidden, labels, data.classes)}


def measure(data, x, labels):
    """Everything that can be measured of samples x (N, C, H, W) against the data, under its full name."""
    folder = Path(data.folder)
    if (folder / "judge.pt").exists():
        from data.font_digits import load_judge
        judge, name = load_judge(folder), "the judge's features"
        x = (to_pixels(x, data.meta)[..., 0].float() - data.meta["bias"])[:, None] * data.meta["scale"]   # as written
        embed = lambda x: torch.cat([judge.embed(part) for part in x.split(1000)])
    else:
        judge, name = None, "latents averaged to 8 x 8"
        embed = lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1)
    real = embed(data.some(10_000 + len(x)))
    spare, real, fake = real[:len(real) // 2][:len(x)], real[len(real) // 2:], embed(x)
    result, n = {}, min(len(fake), len(real), 5000)
    for images, which in ((fake, ""), (spare, f" of {len(spare)} images of the data")):
        precision, recall = precision_recall(real[:n], images[:n])
        result |= {f"Frechet distance in {name}{which}": frechet_distance(real, images),
                   f"precision{which} (k = 3, {n} real ones)": precision,
                   f"recall{which} (k = 3, {n} real ones)": recall}
    if judge:
        result["judge accuracy"] = (judge.head(fake).argmax(1).numpy() == labels).mean()
    return {key: float(value) for key, value in result.items()}


# ------------------------------------------------------------------------------------------------------------------
# The program


def prepare(cfg, folder, device):
    """All that can refuse to start, but for the disk: model, config, meta, data or None, VAE or None."""
    path = newest_checkpoint(cfg.checkpoint) if Path(cfg.checkpoint).is_dir() else Path(cfg.checkpoint)
    if path is None:
        raise ValueError(f"no checkpoint in {cfg.checkpoint}")
    model, config = load_model(path, cfg.ema)
    if not all(0 <= label < model.num_classes for label in cfg.classes):
        raise ValueError(f"--classes {cfg.classes}: labels from 0 to {model.num_classes - 1} are accepted")
    if len(cfg.interval) != 2 or not 0 <= cfg.interval[0] <= cfg.interval[1] <= 1:
        raise ValueError(f"--interval {cfg.interval}: two numbers in [0, 1], the smaller first, are accepted")
    if cfg.metrics and cfg.count < 10:
        raise ValueError(f"--metrics needs --count 10 or more, not {cfg.count}")
    data = Latents(folder, features=(folder / "features.npy").exists()) if cfg.metrics else None
    if data and (data.channels, data.size) != (model.channels, model.arch["size"]):
        raise ValueError(f"--data {cfg.data} has {data.channels} x {data.size} x {data.size} latents, the checkpoint "
                         f"makes {model.channels} x {model.arch['size']} x {model.arch['size']}")
    if data and len(data.labels) < 20:
        raise ValueError(f"--metrics needs 20 images of data or more, but --data {cfg.data} has {len(data.labels)}")
    if data and data.targets is not None and len(model.projectors) and data.targets.shape[1:] != (
            wanted := (model.pos_embed.shape[1], model.arch["feature_dim"])):
        raise ValueError(f"--data {cfg.data} has features {data.targets.shape[1:]}, the checkpoint makes {wanted}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.amp == "tf32"
    vae = imagenet.load_vae(cfg.vae, device) if cfg.vae else None
    config.update(checkpoint=str(path), meta=config["meta"] or {"scale": 0.18215, "bias": 0.0})
    return model.to(device), config, config["meta"], data, vae


def allocate(out, files, shapes):
    """Arrays on the disk, for all processes: never in memory. They are sparse: later, a full disk would be a crash."""
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize / 1e9 for name, (shape, dtype) in shapes.items()}
    need = 2 * sizes["arr_0"] + sizes["x"]                             # the .npz holds it once more
    if (free := shutil.disk_usage(out).free / 1e9) < need:
        raise ValueError(f"--out {out} has {free:.1f} GB free, but {need:.1f} GB will be written")
    for name, (shape, dtype) in shapes.items():
        np.lib.format.open_memmap(files[name], "w+", dtype, shape).flush()


def sample(cfg, cleanup):
    """The whole program: images into memory-mapped drafts, then samples.npz, grid.png and metrics.json in cfg.out.

    cleanup: an ExitStack, which removes the drafts at the end, however it comes.
    """
    from tqdm import tqdm
    rank, world, device = start_processes()
    folder = Path(data_folder(cfg.data, rank, world)) if cfg.metrics else None
    if cfg.vae and world > 1:                                          # process 0 downloads it before all load it
        together(lambda: rank or imagenet.load_vae(cfg.vae, "cpu"), rank, world)
    (model, config, meta, data, vae), _ = together(lambda: prepare(cfg, folder, device), rank, world)
    out, _ = together(lambda: writable(cfg.out, rank), rank, world)
    latent, start = (model.channels, model.arch["size"], model.arch["size"]), time.time()
    pixels = to_pixels(torch.zeros(1, *latent, device=device), meta, vae).shape[1:]
    shapes = {"arr_0": ((cfg.count, *pixels), np.uint8), "labels": ((cfg.count,), np.int64),
              "x": ((cfg.count, *latent), np.float32)}
    files = {name: out / f".{name}.npy" for name in (*shapes, "settings")}
    for file in files.values() if rank == 0 else ():
        cleanup.callback(file.unlink, missing_ok=True)
    together(lambda: rank or allocate(out, files, shapes), rank, world)
    arrays = {name: np.load(files[name], mmap_mode="r+", allow_pickle=False) for name in shapes}
    mine = np.arange(cfg.count)[rank * cfg.count // world:(rank + 1) * cfg.count // world]

    def draw():
        nfe = 0
        for k in tqdm(range(0, len(mine), cfg.batch), unit="batch", disable=rank > 0):
            rows = mine[k:k + cfg.batch]
            x, labels, evaluations = generate(model, config, cfg, rows, device)
            arrays["x"][rows], arrays["labels"][rows], nfe = x.cpu().numpy(), labels, max(nfe, evaluations)
            arrays["arr_0"][rows] = to_pixels(x, meta, vae).numpy()
        for array in arrays.values():
            array.flush()
        return nfe

    nfe, _ = together(draw, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    settings = dict(dataclasses.asdict(cfg), checkpoint=config["checkpoint"], step=config["step"], path=config["path"],
                    predict=config["predict"], vae=cfg.vae or None, trained_on_vae=meta.get("vae"), nfe=nfe,
                    processes=world)
    np.save(files["settings"], json.dumps(settings))
    with zipfile.ZipFile(out / "samples.npz", "w") as archive:         # an .npz is a zip of .npy files
        for name in ("arr_0", "labels", "settings"):
            archive.write(files[name], f"{name}.npy")
    write_grid(arrays["arr_0"][:100], out / "grid.png")
    took = time.time() - start
    print(f"{cfg.count} images, {nfe} evaluations each, {took:.0f} s. Wrote {out}/grid.png and {out}/samples.npz")
    if vae:
        reference = "VIRTUAL_imagenet256_labeled.npz" if pixels[0] == 256 else "VIRTUAL_imagenet512.npz"
        print(f"FID: python evaluator.py {reference} {out}/samples.npz    # evaluations/ of openai/guided-diffusion")
    elif model.channels > 1:
        print("the pictures are a rough look at the latents; --vae stabilityai/sd-vae-ft-ema decodes them")
    if cfg.metrics:
        result = measure(data, torch.from_numpy(np.array(arrays["x"])), np.array(arrays["labels"]))
        if data.targets is not None:
            result |= measure_features(model, config, data)
            result["velocity loss at uniform t"] = data_losses(model, config, data)[1].mean().item()
        for key, value in result.items():
            print(f"{value:10.4f}  {key}")
        (out / "metrics.json").write_text(json.dumps({**result, "settings": settings}, indent=1) + "\n")


def main(argv=None):
    cfg = parse_flags(Config, ACCEPTED, argv, __doc__)
    try:
        with contextlib.ExitStack() as cleanup:
            sample(cfg, cleanup)
    except ValueError as error:
        fail(error, anywhere=True)
    except KeyboardInterrupt:
        fail("stopped; nothing was kept")


if __name__ == "__main__":
    main()
