"""A folder of images, or REPA's or fast-DiT's latents -> the data set that train_sit.py reads.

    torchrun --nproc_per_node 8 data/imagenet.py --images ILSVRC/train --out LATENTS    # 42 + 252 GB
    python data/imagenet.py --images REPA_OR_FASTDIT_FOLDER --out LATENTS               # repack

A stopped run goes on where it was, with any number of processes on one machine. The folder:
    latents.npy   (N, 8, size / 8, size / 8) float32   mean and standard deviation of the VAE's posterior;
                  with --pixels (N, 3, size, size) uint8
    labels.npy    (N,) int64                           place among the sorted names of the class folders
    features.npy  (N, T, D) int8                       encoder tokens, each token's largest entry being 127
    meta.json     scale, bias, moments, num_classes, vae, encoder, size; written last
    .done-*.npy   which batches are done; of no use afterwards
[ADM] is Diffusion Models Beat GANs, [REPA] the code behind that paper.
"""
import argparse
import dataclasses
import inspect
import io
import json
import math
import os
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


@dataclasses.dataclass
class Config:
    images: str = ""                          # one folder of images per class, or REPA's, or fast-DiT's
    out: str = ""                             # folder of the data set
    size: int = 256                           # side of the cropped images, 256 or 512 pixels
    vae: str = "stabilityai/sd-vae-ft-ema"    # autoencoder in diffusers, one whose scale is 0.18215
    encoder: str = "dinov2_vitb14"            # encoder in facebookresearch/dinov2; none: no features
    pixels: bool = False                      # the cropped images themselves in place of latents
    batch: int = 32                           # images at a time in each process


def make(cfg, rank=0, world=1, device="cpu", vae=None, encoder=None):
    """Make the data set, or what is left of it; process rank of world converts chunks rank, rank + world, ...

    vae, encoder: functions from uint8 images (B, 3, H, H) to latents and to tokens; None: those of cfg."""
    out = Path(cfg.out)
    ready = out / "meta.json"
    if ready.exists():
        raise SystemExit(f"{out} is finished: delete it to make it anew")
    meta, source = read_foreign(Path(cfg.images))
    marks = out / f".done-{zlib.crc32(str((cfg, source)).encode())}.npy"     # for these flags and files
    while rank > 0 and not marks.exists():
        time.sleep(1)                         # process 0 downloads the networks and makes the arrays
    convert = conversion(cfg, meta, source, device, vae, encoder)
    arrays, done = begin(marks, len(source["labels"]), cfg.batch, convert)
    todo = [k for k in range(rank, len(done), world) if not done[k]]
    chunks = [slice(k * cfg.batch, (k + 1) * cfg.batch) for k in todo]
    for k, rows, part in zip(tqdm(todo, disable=rank > 0), chunks, ahead(convert, chunks)):
        for name, values in part.items():
            arrays[name][rows] = values
            arrays[name].flush()
        done[k] = 1                           # only now that the rows are on the disk
        done.flush()
    if done.all():                            # this process is the last one
        draft = out / ".meta.json"
        draft.write_text(json.dumps(meta, indent=1))
        draft.replace(ready)
        print(f"made {out}: {len(arrays['labels'])} images of {meta['num_classes']} classes; {[*arrays]}")


def ahead(function, jobs):
    """function(job) for every job; a thread works on the next one while this one is used."""
    following = None
    with ThreadPoolExecutor(1) as pool:
        for job in jobs:
            this, following = following, pool.submit(function, job)
            if this:
                yield this.result()
        if following:
            yield following.result()


def conversion(cfg, meta, source, device, vae, encoder):
    """The function that makes some rows of all arrays: slice -> dict of (B, ...). Completes meta, too."""
    if cfg.pixels and "images" not in source:
        raise SystemExit(f"--pixels: there are no images in {cfg.images}")
    size, networks = cfg.size, {}
    meta.update(vae=None, encoder=None)
    if cfg.pixels:
        source.pop("latents", None)
        networks["latents"] = lambda images: images
        meta.update(scale=1 / 127.5, bias=127.5, moments=False)
    elif "latents" in source:
        size = 8 * read(source["latents"][:1], size).shape[-1]
    else:
        networks["latents"] = vae or partial(latents_of, load_vae(cfg.vae, device))
        meta["vae"] = cfg.vae
    meta["size"] = size
    if "images" in source and cfg.encoder != "none":
        meta["encoder"] = cfg.encoder
        encoder = encoder or load_encoder(cfg.encoder, size, device)
        networks["features"] = lambda images: to_int8(encoder(images))

    def convert(rows):
        arrays = {name: read(items[rows], size) for name, items in source.items()}
        for name, network in networks.items():
            images = torch.from_numpy(arrays["images"]).to(device)
            arrays[name] = network(images).cpu().numpy()
        arrays.pop("images", None)
        return arrays
    return convert


def begin(marks, N, batch, convert):
    """Open the arrays of N rows and the marks, one a batch; unless a run was stopped, they are made first."""
    out = marks.parent
    out.mkdir(parents=True, exist_ok=True)
    if not marks.exists():
        if any(out.iterdir()):
            raise SystemExit(f"--out {out} holds something else, or was begun with other flags or files")
        for name, row in convert(slice(1)).items():
            np.lib.format.open_memmap(out / f"{name}.npy", "w+", row.dtype, (N, *row.shape[1:]))
        np.save(marks, np.zeros(math.ceil(N / batch), np.uint8))
    arrays = {file.stem: np.load(file, mmap_mode="r+") for file in out.glob("[!.]*.npy")}
    return arrays, np.load(marks, mmap_mode="r+")


def read_foreign(folder):
    """meta, and labels, latents, images as far as the folder has them: lists of files, or arrays (N, ...)."""
    if (folder / "vae-sd").is_dir():
        return read_repa(folder)
    for size in (256, 512):
        if (folder / f"imagenet{size}_features").is_dir():
            return read_fast_dit(f"{folder}/imagenet{size}")
    return read_images(folder)


def read_repa(folder):
    """vae-sd/dataset.json, vae-sd/*/img-mean-std-*.npy (8, h, h), unscaled; perhaps images/*/img*.png."""
    file = folder / "vae-sd/dataset.json"
    names, labels = zip(*json.loads(file.read_text())["labels"])
    if any(name.startswith("/") or ".." in name for name in names):
        raise SystemExit(f"{file} names a file outside the folder")
    source = dict(latents=[file.parent / name for name in names], labels=np.array(labels))
    if (folder / "images").is_dir():
        source["images"] = [folder / "images" / name.replace("img-mean-std-", "img").replace(".npy", ".png")
                            for name in names]
    return dict(scale=0.18215, bias=0.0, moments=True, num_classes=max(labels) + 1), source


def read_fast_dit(start):
    """start_features/0.npy, 1.npy, ... (1, 4, h, h), already scaled; start_labels/0.npy, 1.npy, ... (1,)."""
    N = len(os.listdir(f"{start}_features"))
    latents = [Path(f"{start}_features/{i}.npy") for i in range(N)]
    labels = [Path(f"{start}_labels/{i}.npy") for i in range(N)]
    source = dict(latents=latents, labels=labels)
    return dict(scale=1.0, bias=0.0, scaled_by=0.18215, moments=False, num_classes=1000), source


def read_images(folder):
    """One folder of images per class."""
    folders = {path.name for path in folder.glob("[!.]*") if path.is_dir()}
    suffixes = ".jpg .jpeg .png .bmp .webp .ppm .tif .tiff".split()
    files = sorted(path for path in folder.glob("[!.]*/*") if path.suffix.lower() in suffixes)
    classes, labels = np.unique([path.parent.name for path in files], return_inverse=True)
    empty = folders.difference(classes)
    if empty or not files:
        raise SystemExit(f"--images {folder} has neither vae-sd/ (REPA), nor imagenet256_features/ (fast-DiT) "
                         f"nor one folder of images per class; without images: {sorted(empty)[:3] or 'all'}")
    source = dict(images=files, labels=labels)
    return dict(scale=0.18215, bias=0.0, moments=True, num_classes=len(classes)), source


def read(items, size):
    """Some files -> (B, ...), by many threads; an array as it is."""
    if not isinstance(items, list):
        return items
    with ThreadPoolExecutor(16) as pool:
        return np.stack(list(pool.map(partial(read_file, size=size), items)))


PARSING = threading.Lock()                    # numpy's parser of headers can fail in several threads at once


def read_file(path, size):
    """An array, without fast-DiT's leading axis of 1; or an image, cropped, uint8 (3, size, size)."""
    try:
        if path.suffix == ".npy":
            data = io.BytesIO(path.read_bytes())
            with PARSING:
                array = np.load(data)
            return array[0] if len(array) == 1 else array
        from PIL import Image
        image = Image.open(path).convert("RGB")
        return np.asarray(centre_crop(image, size)).transpose(2, 0, 1)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install pillow")
    except Exception as error:
        raise SystemExit(f"{path} cannot be read: {error!r}")


def centre_crop(image, size):
    """A PIL image -> its central square, size x size: halved as often as possible, then bicubic [ADM]."""
    from PIL.Image import Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = [round(side * scale) for side in image.size]
    image = image.resize((width, height), Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_vae(name, device):
    """The autoencoder: vae.encode(x).latent_dist, vae.decode(z).sample."""
    try:
        from diffusers import AutoencoderKL
        return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)
    except Exception as error:
        raise SystemExit(f"VAE {name} cannot be loaded (it needs pip install diffusers): {error!r}")


@torch.no_grad()
def latents_of(vae, images):
    """uint8 (B, 3, H, H) -> mean and standard deviation of the posterior (B, 2C, H / 8, H / 8), unscaled."""
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], 1)


def load_encoder(name, size, device):
    """DINOv2 for images of this size: a function from uint8 (B, 3, size, size) to tokens (B, T, D)."""
    try:
        encoder = torch.hub.load("facebookresearch/dinov2", name)
    except Exception as error:
        raise SystemExit(f"encoder {name} cannot be loaded: {error!r}")
    encoder.pos_embed.data = resample_positions(encoder.pos_embed.data, 16 * size // 256)
    return partial(tokens_of, encoder.to(device).eval().requires_grad_(False))


def resample_positions(code, side):
    """Position embedding (1, 1 + n * n, D), class token first -> (1, 1 + side * side, D) [REPA]."""
    code = code.float()
    n = math.isqrt(code.shape[1] - 1)
    grid = code[:, 1:].transpose(1, 2).unflatten(2, (n, n))                          # (1, D, n, n)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([code[:, :1], grid.flatten(2).transpose(1, 2)], 1)


@torch.no_grad()
def tokens_of(encoder, images):
    """uint8 (B, 3, H, H) -> tokens (B, (H / 16)^2, D): 14 pixels of its input are 16 of the image [REPA]."""
    mean_std = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))        # ImageNet's red, green, blue
    x = [(images[:, c] / 255 - mean) / std for c, (mean, std) in enumerate(mean_std)]
    x = F.interpolate(torch.stack(x, 1), 224 * images.shape[-1] // 256, mode="bicubic")
    return encoder.forward_features(x)["x_norm_patchtokens"]


def to_int8(tokens):
    """(..., D) -> int8, each token's largest entry being 127: the cosine sees directions only. Zeros stay."""
    largest = tokens.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (tokens * (127 / largest)).round().to(torch.int8)


def main(argv=None):
    helps = dict(re.findall(r"    (\w+): .*  # (.*)", inspect.getsource(Config)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, help in helps.items():
        default = getattr(Config, name)
        options = dict(type=type(default), required=default == "")
        if default is False:
            options = dict(action="store_true")
        parser.add_argument(f"--{name}", default=default, help=help, **options)
    cfg = Config(**vars(parser.parse_args(argv)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    make(cfg, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)


if __name__ == "__main__":
    main()
