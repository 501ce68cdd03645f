"""A folder of images, or REPA's or fast-DiT's latents -> the data set that train_sit.py reads.

    python data/imagenet.py --images ILSVRC/train --out LATENTS          # one folder per class; ImageNet: 42 + 252 GB
    torchrun --nproc_per_node 8 data/imagenet.py --images ILSVRC/train --out LATENTS                # on one machine
    python data/imagenet.py --images REPA_OR_FASTDIT_FOLDER --out LATENTS                           # repack

A stopped run goes on where it was, with any number of processes. The folder:
    latents.npy   (N, 8, size / 8, size / 8) float32   mean and std of the VAE's posterior, unscaled
    labels.npy    (N,) int64                           place among the sorted names of the class folders
    features.npy  (N, T, D) int8                       encoder tokens, the alignment target of REPA
    images.npy    (N, 3, size, size) uint8             with --pixels
    meta.json     scale, bias, moments, num_classes, vae, encoder, size; written last
[ADM] is Diffusion Models Beat GANs, [REPA] the code behind that paper.
"""
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


@dataclasses.dataclass
class Config:
    images: str = ""                          # folder with one folder of images per class; or REPA's, or fast-DiT's
    out: str = ""                             # folder of the data set
    size: int = 256                           # side of the cropped images, pixels
    vae: str = "stabilityai/sd-vae-ft-ema"    # autoencoder in diffusers, one whose scale is 0.18215
    encoder: str = "dinov2_vitb14"            # encoder in facebookresearch/dinov2; none: no features
    pixels: bool = False                      # write the cropped images, too
    batch: int = 32                           # images at a time in each process


ACCEPTED = dict(size=[256, 512], batch=(1, 2 ** 16))
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def reason(error):
    """What an exception says, on one line."""
    return str(error).split("\n")[0][:200] or type(error).__name__


def centre_crop(image, size):
    """A PIL image -> its central square, size x size: halved as often as possible, then bicubic [ADM]."""
    from PIL.Image import Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size=None):
    """An image file -> uint8 (3, H, W), cropped if a size is given."""
    from PIL import Image
    with Image.open(path) as image:
        image = image.convert("RGB")
    return np.asarray(centre_crop(image, size) if size else image).transpose(2, 0, 1)


class Files:
    """Many files of one shape as one array: [rows (B,)] -> (B, ...), read by threads.

    .npy files share one header, so the first one's stands for all. A leading axis of 1 is dropped: fast-DiT's are
    (1, 4, 32, 32). ValueError names a file that is no good.
    """

    def __init__(self, folder, names, read=None):
        self.folder, self.names, self.pool, self.read = Path(folder), names, ThreadPoolExecutor(16), read or self.array
        self.array_shape = self.shape = self.dtype = None
        first = self.one(0)
        self.shape, self.dtype = (len(names), *first.shape), first.dtype

    def array(self, path):
        data = path.read_bytes()
        if self.array_shape is None:
            first = np.load(path, allow_pickle=False)
            if not first.flags.c_contiguous:
                raise ValueError("it is in Fortran's order")
            self.array_shape, self.array_dtype, self.header = first.shape, first.dtype, data[:len(data) - first.nbytes]
            self.bytes = len(data)
        if len(data) != self.bytes or not data.startswith(self.header):
            raise ValueError(f"of another shape or type than {self.names[0]}, {self.array_dtype} {self.array_shape}")
        array = np.frombuffer(data, self.array_dtype, offset=len(self.header)).reshape(self.array_shape)
        return array[0] if array.ndim > 1 and len(array) == 1 else array.reshape(()) if array.size == 1 else array

    def one(self, row):
        path = self.folder / self.names[row]
        try:
            item = self.read(path)
            if self.shape and item.shape != self.shape[1:]:
                raise ValueError(f"{item.shape}, but {self.names[0]} is {self.shape[1:]}")
            return item
        except Exception as error:
            raise ValueError(f"{path} cannot be used: {reason(error)}") from None

    def __len__(self):
        return len(self.names)

    def __getitem__(self, rows):
        return np.stack(list(self.pool.map(self.one, rows)))


def read_repa(folder):
    """vae-sd/dataset.json, vae-sd/*/img-mean-std-*.npy (8, h, h) unscaled, and images/*/img*.png if there are any."""
    try:
        pairs = json.loads((folder / "vae-sd" / "dataset.json").read_text())["labels"]
        names, labels = [name for name, _ in pairs], np.array([label for _, label in pairs], np.int64)
        meta = dict(layout="REPA", scale=0.18215, bias=0.0, moments=True, num_classes=int(labels.max()) + 1, vae=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/vae-sd/dataset.json has no list of names and labels: {reason(error)}") from None
    arrays = dict(latents=Files(folder / "vae-sd", names), labels=labels)
    if (folder / "images").is_dir():
        pictures = [name.replace("img-mean-std-", "img").replace(".npy", ".png") for name in names]
        arrays["images"] = Files(folder / "images", pictures, read_image)
    return meta, arrays


def read_fast_dit(features, labels):
    """features/0.npy, 1.npy, ... (1, 4, h, h), already scaled; labels/0.npy, ... (1,)."""
    have = {entry.name for entry in os.scandir(features) if entry.name.endswith(".npy")}
    names = [f"{i}.npy" for i in range(len(have))]
    if not have or have != set(names):
        raise ValueError(f"{features} must hold 0.npy, 1.npy, ... without a gap; it has {len(have)} .npy files")
    meta = dict(layout="fast-DiT", scale=1.0, bias=0.0, scaled_by=0.18215, moments=False, num_classes=1000, vae=None)
    return meta, dict(latents=Files(features, names), labels=Files(labels, names))


def read_images(folder, size):
    """One folder of images per class: no latents yet."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    files = [sorted(f for f in os.listdir(folder / name) if f.lower().endswith(SUFFIXES)) for name in classes]
    empty = [name for name, inside in zip(classes, files) if not inside]
    if empty or not classes:
        raise ValueError(f"{folder} must hold one folder of images per class; without images: {empty[:3] or 'all'}")
    names = [f"{name}/{file}" for name, inside in zip(classes, files) for file in inside]
    labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in files])
    meta = dict(layout="images", scale=0.18215, bias=0.0, moments=True, num_classes=len(classes), vae=None)
    return meta, dict(images=Files(folder, names, functools.partial(read_image, size=size)), labels=labels)


def read_foreign(folder, size=None):
    """A folder in REPA's or fast-DiT's layout -> meta and arrays: latents, labels, images if there are any.

    array[rows (B,)] reads. With a size, one folder of images per class is accepted, too. ValueError for the rest.
    """
    folder = Path(folder)
    if (folder / "vae-sd" / "dataset.json").exists():
        return read_repa(folder)
    for n in (256, 512):
        if (folder / f"imagenet{n}_features").is_dir():
            return read_fast_dit(folder / f"imagenet{n}_features", folder / f"imagenet{n}_labels")
    if size and folder.is_dir():
        return read_images(folder, size)
    raise ValueError(f"{folder} has neither our meta.json, nor REPA's vae-sd/dataset.json, nor fast-DiT's "
                     f"imagenet256_features/ or imagenet512_features/{', and is no folder of images' if size else ''}")


def load(what, function):
    """The frozen network that function() returns."""
    try:
        return function().eval().requires_grad_(False)
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {reason(error)}") from None


def load_vae(name, device):
    """The autoencoder: vae.encode(x).latent_dist, vae.decode(z).sample."""
    def function():
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name)

    return load(f"VAE {name}, for which diffusers is needed (pip install diffusers),", function).to(device)


@torch.no_grad()
def latents_of(vae, images):
    """uint8 (B, 3, H, H) -> mean and std of the posterior (B, 2C, H / 8, H / 8), unscaled."""
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], 1)


def resample_positions(code, side):
    """Position embedding (1, 1 + n * n, D), class token first -> (1, 1 + side * side, D) [REPA]."""
    n = math.isqrt(code.shape[1] - 1)
    grid = code[:, 1:].float().transpose(1, 2).unflatten(2, (n, n))                     # (1, D, n, n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([code[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


def load_encoder(name, size, device):
    """DINOv2 for images of this size: a function from uint8 (B, 3, size, size) to tokens (B, T, D)."""
    encoder = load(f"encoder {name}", lambda: torch.hub.load("facebookresearch/dinov2", name))
    encoder.pos_embed.data = resample_positions(encoder.pos_embed.data, 16 * size // 256)
    return functools.partial(tokens_of, encoder.to(device))


@torch.no_grad()
def tokens_of(encoder, images):
    """uint8 (B, 3, H, H) -> tokens (B, (H / 16)^2, D): 14 pixels of its input are 16 of the image [REPA]."""
    mean_std = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))                       # ImageNet's red, green, blue
    x = torch.stack([(images[:, c] / 255 - mean) / std for c, (mean, std) in enumerate(mean_std)], 1)
    x = F.interpolate(x, 224 * images.shape[-1] // 256, mode="bicubic")
    return encoder.forward_features(x)["x_norm_patchtokens"]


def to_int8(tokens):
    """(..., D) -> int8, the largest entry of each token being 127: the cosine sees directions only. Zeros stay."""
    return (tokens * (127 / tokens.abs().amax(-1, keepdim=True).clamp_min(1e-30))).round().to(torch.int8)


def conversion(cfg, device, vae, encoder):
    """meta, the source's arrays, and for each array to write the one that it is made of, and how."""
    if (Path(cfg.out) / "meta.json").exists():
        raise ValueError(f"{cfg.out} is finished: delete it to make it anew")
    meta, source = read_foreign(cfg.images, cfg.size)
    if "images" not in source and cfg.pixels:
        raise ValueError(f"--pixels: there are no images in {cfg.images}")
    run = lambda network, images: network(torch.from_numpy(images).to(device)).cpu().numpy()
    plan = {name: (name, np.asarray) for name in source if name != "images" or cfg.pixels}
    if "latents" not in source:
        vae = vae or functools.partial(latents_of, load_vae(cfg.vae, device))
        plan["latents"], meta["vae"] = ("images", functools.partial(run, vae)), cfg.vae
    if "images" in source and cfg.encoder != "none":
        encoder = encoder or load_encoder(cfg.encoder, source["images"].shape[-1], device)
        plan["features"] = ("images", functools.partial(run, lambda images: to_int8(encoder(images))))
    return meta, source, plan


def open_folder(out, settings, specs):
    """Make the arrays in a new folder, or check that a stopped run's are those of settings and specs (shape, dtype)."""
    begun, new = out / ".begun.json", not (out / ".begun.json").exists()
    if new and any(out.glob("[!.]*")):
        raise ValueError(f"{out} is not empty: choose another --out")
    left = 1 if new else 1 - np.load(out / ".done.npy", allow_pickle=False).mean()
    need = left * sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()) / 1e9
    if (free := shutil.disk_usage(out).free / 1e9) < need:
        raise ValueError(f"--out {out} has {free:.1f} GB free, but {need:.1f} GB will be written")
    if new:
        for name, (shape, dtype) in specs.items():
            np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, shape).flush()
        begun.write_text(json.dumps(settings))
    for name, was in json.loads(begun.read_text()).items():
        if was != settings[name]:
            raise ValueError(f"{out} was begun with {name} {was}, not {settings[name]}: choose another --out")
    for name, (shape, dtype) in specs.items():
        array = np.load(out / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(f"{out}/{name}.npy is {array.dtype} {array.shape}, not as begun: choose another --out")
        print(f"{out}/{name}.npy: {array.dtype} {array.shape}, {array.nbytes / 1e9:.2f} GB")


def make(cfg, rank=0, world=1, device="cpu", vae=None, encoder=None):
    """Make the data set, or what is left of it; process rank of world converts chunks rank, rank + world, ...

    vae, encoder: functions from uint8 images (B, 3, H, H) to latents, tokens; by default cfg's are loaded.
    """
    from tqdm import tqdm
    from train_sit import together
    out, plans = Path(cfg.out), functools.cache(lambda: conversion(cfg, device, vae, encoder))
    if world > 1:
        together(lambda: rank or plans(), rank, world)     # process 0 first: it downloads the networks
    meta, source, plan = together(plans, rank, world)[0]
    N, names = len(source["labels"]), next(a.names for a in source.values() if isinstance(a, Files))
    chunks = np.split(np.arange(N), range(cfg.batch, N, cfg.batch))
    read = lambda rows: {name: source[name][rows] for name in {name for name, _ in plan.values()}}
    convert = lambda part: {name: function(part[of]) for name, (of, function) in plan.items()}
    specs = {name: ((N, *a.shape[1:]), a.dtype) for name, a in convert(read(chunks[0][:1])).items()}
    specs[".done"] = ((len(chunks),), np.dtype("uint8"))
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("images", "out")}
    settings["files"] = f"{N} of hash {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"
    together(lambda: rank or open_folder(out, settings, specs), rank, world)
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in specs}
    done = arrays.pop(".done")
    if rank == 0 and "features" not in arrays:
        print("no features:", "--encoder none" if cfg.encoder == "none" else f"there are no images in {cfg.images}")

    todo = [k for k in range(rank, len(chunks), world) if not done[k]]
    reader = ThreadPoolExecutor(1)                         # reads the next chunk while this one is converted
    later = lambda i: reader.submit(read, chunks[todo[i]]) if i < len(todo) else None
    upcoming = later(0)
    for i, k in enumerate(tqdm(todo, unit="chunk", disable=rank > 0)):
        part, upcoming = upcoming.result(), later(i + 1)
        for name, array in convert(part).items():
            arrays[name][chunks[k]] = array
            arrays[name].flush()
        done[k] = 1                                        # only now that the rows are on the disk
        done.flush()
    while rank == 0 and torch.distributed.is_initialized() and not done.all():
        time.sleep(1)                                      # a barrier would give up after half an hour
    if rank == 0 and done.all():
        meta.update(size=8 * arrays["latents"].shape[-1], made_from=meta.pop("layout"), encoder=None)
        if "features" in arrays:
            meta.update(encoder=cfg.encoder, feature_scale="the largest entry of each token is 127")
        (out / ".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        os.replace(out / ".meta.json", out / "meta.json")
        for name in (".done.npy", ".begun.json"):
            (out / name).unlink()
        print(f"made {out}: {N} images of {meta['num_classes']} classes")


def main(argv=None):
    from train_sit import fail, parse_flags, start_processes, writable
    cfg = parse_flags(Config, ACCEPTED, argv, __doc__)
    try:
        if not (cfg.images and cfg.out):
            raise ValueError("--images and --out are needed")
        rank, world, device = start_processes()
        writable(cfg.out, rank)
        make(cfg, rank, world, device)
    except (ValueError, OSError) as error:
        fail(error, anywhere=True)                         # a file that is no good is known to one process


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
