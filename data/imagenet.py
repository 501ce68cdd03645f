"""A folder of images, or REPA's or fast-DiT's latents -> the data set that train_sit.py reads.

    torchrun --nproc_per_node 8 data/imagenet.py --images ILSVRC/train --out LATENTS    # 42 + 252 + 2 GB
    python data/imagenet.py --images REPA_OR_FASTDIT_FOLDER --out LATENTS               # repack

A stopped run goes on where it was, with any number of processes on one machine. The folder:
    latents.npy   (N, 8, H, W) float32   mean and standard deviation of the VAE's posterior, or
                  (N, 4, H, W) float32   latents of fast-DiT, or (N, 3, H, W) uint8 pixels
    labels.npy    (N,) int64             place among the sorted names of the class folders
    features.npy  (N, T, D) int8         encoder tokens, each token's largest entry being 127
    cls.npy       (N, D) float16         the encoder's class token as it is, for REG
    meta.json     scale, bias, moments, num_classes, vae, encoder; written last"""
import argparse
import io
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib import format as npy
from PIL import Image
from tqdm import tqdm

DINOV2 = "facebookresearch/dinov2:e1277af2ba9496fbadf7aec6eba56e8d882d1e35"
VAE_COMMIT = {"stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a"}
SUFFIXES = ".jpg .jpeg .png .bmp .webp .ppm .tif .tiff".split()
LEFT_OUT, TODO = -1, -2                       # in labels.npy until all is done
PARSING = threading.Lock()                    # numpy's parser of headers can fail in several threads at once


def make(cfg, rank=0, world=1, device="cpu"):
    """Make the data set, or what is left of it; process rank of world does rows rank, rank + world, ..."""
    out = Path(cfg.out)
    begun = out / ".begun.json"               # flags and files of the first start
    while rank > 0 and not begun.exists():
        time.sleep(1)                         # process 0 downloads the networks and makes the arrays
    if begun.exists():
        flags, meta, source = json.loads(begun.read_text())
        if dict(flags, batch=cfg.batch) != vars(cfg):
            raise SystemExit(f"{out} was begun with other flags: {flags}")
    else:
        meta, source = read_foreign(Path(cfg.images))
    convert = conversion(cfg, meta, source, device)
    read = lambda k: read_row(source, cfg.size, k)
    if not begun.exists():
        make_arrays(out, len(source["labels"]), convert([read(0)]))
        draft = out / ".draft"
        draft.write_text(json.dumps([vars(cfg), meta, source]))
        draft.replace(begun)
    arrays = {file.stem: np.load(file, mmap_mode="r+") for file in out.glob("[!.]*.npy")}
    labels = arrays["labels"] = arrays.pop("labels")             # the last one: it marks what is done
    todo = np.arange(rank, len(labels), world)
    todo = todo[labels[todo] == TODO]
    with ThreadPoolExecutor(16) as pool:
        following = pool.map(read, todo[:cfg.batch])
        for k in tqdm(range(0, len(todo), cfg.batch), disable=rank > 0):
            rows, after = np.split(todo[k:][:2 * cfg.batch], [cfg.batch])
            this, following = list(following), pool.map(read, after)
            part = convert(this)              # while the threads read the following ones
            for name, array in arrays.items():
                array[rows] = part[name]
                array.flush()
    if rank == 0:
        finish(out, arrays, meta)


def make_arrays(out, N, part):
    """Make the arrays, of N rows like that of part, and reserve their place on the disk."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"--out {out} holds something else: delete it, or choose another")
    reserve = getattr(os, "posix_fallocate", lambda *_: None)    # macOS has none
    try:
        for name, row in part.items():
            array = npy.open_memmap(out / f"{name}.npy", "w+", row.dtype, (N, *row.shape[1:]))
            with open(array.filename, "r+b") as file:
                reserve(file.fileno(), 0, array.offset + array.nbytes)
            if name == "labels":
                array[:] = TODO
    except OSError as error:
        for file in out.iterdir():
            file.unlink()
        raise SystemExit(f"{out} needs {N * sum(row.nbytes for row in part.values()) / 1e9:.3g} GB: {error}")


def finish(out, arrays, meta):
    """After the last process: the last rows take the place of what was left out, and meta.json is written."""
    while TODO in arrays["labels"]:
        time.sleep(1)
    there = arrays["labels"] != LEFT_OUT
    N = np.count_nonzero(there)
    gaps, last = np.flatnonzero(~there[:N]), N + np.flatnonzero(there[N:])
    for array in (array for array in arrays.values() if len(array) == len(there)):   # if it was stopped here
        array[gaps] = array[last]
        with open(array.filename, "r+b") as file:
            npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(array[:N]))
    (out / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"made {out}: {N} images of {meta['num_classes']} classes, {len(there) - N} left out")


def conversion(cfg, meta, source, device):
    """The function from what read_row gave to arrays (B, ...). Completes meta, too."""
    if cfg.pixels:
        if "images" not in source:
            raise SystemExit(f"{cfg.images} has no images, which --pixels needs")
        source.pop("latents", None)
        meta.update(scale=1 / 127.5, bias=127.5, moments=False)
    elif "latents" not in source:
        meta["vae"] = cfg.vae
        vae = load_vae(cfg.vae, device)
    if "images" in source and cfg.encoder != "none":
        meta["encoder"] = cfg.encoder
        encoder = load_encoder(cfg.encoder, cfg.size, device)

    def convert(rows):
        part = {name: torch.tensor(np.stack([row[name] for row in rows])) for name in source}
        images = part.pop("images", torch.empty(0)).to(device)
        if cfg.pixels:
            part["latents"] = images
        if meta["vae"]:
            posterior = vae.encode(images / 127.5 - 1).latent_dist
            part["latents"] = torch.cat([posterior.mean, posterior.std], 1)
        if meta["encoder"]:
            cls, tokens = tokens_of(encoder, images)
            part.update(cls=cls.half(), features=to_int8(tokens))
        return {name: array.cpu().numpy() for name, array in part.items()}
    return convert


def read_foreign(folder):
    """meta, and labels, latents, images as far as the folder has them: lists of numbers or of files."""
    meta = dict(scale=0.18215, bias=0.0, moments=True, vae=None, encoder=None)
    for latents in folder.glob("imagenet*_features"):      # 0.npy, ... (1, 4, h, h), scaled: of fast-DiT
        meta.update(scale=1.0, scaled_by=0.18215, moments=False, num_classes=1000)
        latents = [f"{latents}/{i}.npy" for i in range(len(os.listdir(latents)))]
        labels = ["_labels/".join(file.rsplit("_features/", 1)) for file in latents]     # (1,)
        return meta, dict(labels=labels, latents=latents)
    source = read_repa(folder) if (folder / "vae-sd").is_dir() else read_images(folder)
    return dict(meta, num_classes=max(source["labels"]) + 1), source


def read_repa(folder):
    """vae-sd/dataset.json, vae-sd/*/img-mean-std-*.npy (8, h, h), unscaled; perhaps images/*/img*.png."""
    file = folder / "vae-sd/dataset.json"
    names, labels = zip(*json.loads(file.read_text())["labels"])
    if any(name.startswith("/") or ".." in name for name in names):
        raise SystemExit(f"{file} names a file outside the folder")
    source = dict(labels=labels, latents=[f"{folder}/vae-sd/{name}" for name in names])
    if (folder / "images").is_dir():
        names = [name.replace("img-mean-std-", "img").replace(".npy", ".png") for name in names]
        source["images"] = [f"{folder}/images/{name}" for name in names]
    return source


def read_images(folder):
    files = sorted(file for file in folder.glob("[!.]*/*") if file.suffix.lower() in SUFFIXES)
    classes, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    empty = sorted({path.name for path in folder.glob("[!.]*") if path.is_dir()}.difference(classes))
    if empty or not files:
        raise SystemExit(f"--images {folder} has neither vae-sd/ (REPA) nor imagenet256_features/ (fast-DiT) "
                         f"nor one folder of images per class; without images: {empty[:3] or 'all'}")
    return dict(labels=labels.tolist(), images=[str(file) for file in files])


def read_row(source, size, k):
    """Row k of all that source lists. An image that was removed since is black, and its label LEFT_OUT."""
    row = {}
    for name, items in source.items():
        try:
            row[name] = read(items[k], size)
        except Exception as error:
            file = Path(items[k])
            if file.exists() or name != "images" or not file.parent.exists():
                raise SystemExit(f"{file} cannot be read: {error!r}. Replace it; images may be removed, too")
            row.update(labels=LEFT_OUT, images=np.zeros((3, size, size), np.uint8))
    return row


def read(item, size):
    """A number as it is; an array without fast-DiT's first axis of 1; an image, cropped, (3, size, size)."""
    if isinstance(item, int):
        return item
    if item.endswith(".npy"):
        data = io.BytesIO(Path(item).read_bytes())
        with PARSING:
            array = np.load(data)
        return array[0] if len(array) == 1 else array
    image = centre_crop(Image.open(item).convert("RGB"), size)
    return np.asarray(image).transpose(2, 0, 1)


def centre_crop(image, size):
    """A PIL image -> its central square, size x size, as in ADM: halved while it can be, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def load_vae(name, device):
    """The autoencoder: vae.encode(x).latent_dist, vae.decode(z).sample."""
    try:
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained(name, revision=VAE_COMMIT.get(name))
    except Exception as error:
        raise SystemExit(f"VAE {name} cannot be loaded (it needs pip install diffusers): {error!r}")
    return vae.to(device).eval().requires_grad_(False)


def load_encoder(name, size, device):
    """DINOv2 with its position embedding, (1, 1 + 37 * 37, D), resampled for images of this size [REPA]."""
    try:
        encoder = torch.hub.load(DINOV2, name, skip_validation=True)     # or it wants a branch, not a commit
    except Exception as error:
        raise SystemExit(f"encoder {name} cannot be loaded: {error!r}")
    code = encoder.pos_embed.data
    grid = code[:, 1:].transpose(1, 2).unflatten(2, (37, 37))            # (1, D, 37, 37), no class token
    grid = F.interpolate(grid, (size // 16, size // 16), mode="bicubic", antialias=True)
    encoder.pos_embed.data = torch.cat([code[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    return encoder.to(device).eval().requires_grad_(False)


def tokens_of(encoder, images):
    """DINOv2's class tokens (B, D) and tokens (B, (H / 16)^2, D) of uint8 images (B, 3, H, H) [REPA]."""
    colours = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]             # ImageNet's
    mean, std = torch.tensor(colours, device=images.device)[..., None, None]
    x = (images / 255 - mean) / std
    side = 14 * (images.shape[-1] // 16)                                 # 14 of its pixels are 16 of ours
    found = encoder.forward_features(F.interpolate(x, (side, side), mode="bicubic"))
    return found["x_norm_clstoken"], found["x_norm_patchtokens"]


def to_int8(tokens):
    """(..., D) -> int8, each token's largest entry being 127: the cosine sees directions only. Zeros stay."""
    largest = tokens.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (tokens * (127 / largest)).round().to(torch.int8)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flag = parser.add_argument
    flag("--images", required=True, help="one folder of images per class, or REPA's, or fast-DiT's")
    flag("--out", required=True, help="folder of the data set")
    flag("--size", type=int, default=256, help="side of the images, 256 or 512 pixels; others are cropped")
    flag("--vae", default="stabilityai/sd-vae-ft-ema", help="in diffusers, one whose scale is 0.18215")
    flag("--encoder", default="dinov2_vitb14", help="in facebookresearch/dinov2; none: no features")
    flag("--pixels", action="store_true", help="the cropped images themselves in place of latents")
    flag("--batch", type=int, default=32, help="images at a time in each process")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    make(parser.parse_args(argv), rank, world, device)


if __name__ == "__main__":
    main()
