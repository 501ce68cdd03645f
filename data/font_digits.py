"""The embedded data set: digits 0-9 drawn from the fonts that ship with matplotlib. No download.

    python data/font_digits.py            # writes data/font_digits/ (train_sit.py does so itself when it is missing)

Each image: one digit, 20 faces, random size, rotation, slant and shift, 16 x 16 gray. The folder:
    latents.npy   (N, 1, 16, 16) uint8    what the model sees is (latents - bias) * scale
    labels.npy    (N,) int64
    features.npy  (N, 16, 64) int8        unit tokens of a small frozen encoder: the alignment target of REPA
    meta.json     scale, bias, feature_scale, num_classes, ...
    judge.pt      a classifier trained on other draws, used by sample.py --metrics and never in training
The same seed draws the same images everywhere; the two networks agree between machines up to float rounding.
"""
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent / "font_digits"
FACES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
         "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
         "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10"]
SIZE = 16                                   # pixels of an image
GLYPH, EXTENT = 64, 0.75                    # a glyph of height 1, centred, on 64 x 64 pixels that cover [-0.75, 0.75]


@functools.cache
def glyphs():
    """Every digit of every face, from its outline: (len(FACES), 10, GLYPH, GLYPH) float64 in [0, 1]."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Path2D
    from matplotlib.textpath import TextPath
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    axis = ((np.arange(2 * GLYPH) + 0.5) / GLYPH - 1) * EXTENT                  # 2 x 2 points per pixel
    points = np.stack(np.meshgrid(axis, -axis), -1).reshape(-1, 2)
    out = np.empty((len(FACES), 10, GLYPH, GLYPH))
    for f, face in enumerate(FACES):
        for digit in range(10):
            path = TextPath((0, 0), str(digit), size=100, prop=FontProperties(fname=str(fonts / f"{face}.ttf")))
            path = Path2D(np.round(path.vertices * 16) / 16, path.codes)       # FreeType's versions differ by 1/64
            box = path.get_extents()
            at = points * box.height + (box.min + box.max) / 2
            inside = np.logical_xor.reduce([Path2D(p).contains_points(at) for p in path.to_polygons()])   # holes: xor
            out[f, digit] = inside.reshape(GLYPH, 2, GLYPH, 2).mean((1, 3))
    return out


def draw(n, seed):
    """n digits with seed -> images (n, 1, 16, 16) uint8, labels (n,) int64."""
    random = np.random.RandomState(seed)                                       # its stream is frozen for ever
    labels, faces = random.randint(0, 10, n), random.randint(0, len(FACES), n)
    height = random.uniform(9, 13, n)                                          # pixels
    angle, slant = random.uniform(-0.25, 0.25, n), random.uniform(-0.3, 0.3, n)
    shift = random.uniform(-1.5, 1.5, (n, 2))
    masks, images = glyphs(), np.empty((n, SIZE, SIZE))
    axis = (np.arange(2 * SIZE) + 0.5) / 2 - SIZE / 2                          # 2 x 2 points per pixel
    column = lambda a: a[:, None, None]
    for part in np.array_split(np.arange(n), math.ceil(n / 1000)):
        # Where each point of the image lies in the glyph: undo shift, rotation, slant, scale. Rounded: libm's differ.
        cos, sin = column(np.round(np.cos(angle[part]), 9)), column(np.round(np.sin(angle[part]), 9))
        x, y = (axis - shift[part, :1])[:, None, :], (axis - shift[part, 1:])[:, :, None]
        zoom, down = column(GLYPH / (2 * EXTENT) / height[part]), y * cos - x * sin
        across = x * cos + y * sin + column(slant[part]) * down
        across, down = (np.clip(z * zoom + GLYPH / 2 - 0.5, 0, GLYPH - 1) for z in (across, down))
        i, j = (np.minimum(z.astype(int), GLYPH - 2) for z in (down, across))
        a, b, k = down - i, across - j, column(np.arange(len(part)))
        mask = masks[faces[part], labels[part]]                                # (part, GLYPH, GLYPH)
        ink = ((1 - a) * ((1 - b) * mask[k, i, j] + b * mask[k, i, j + 1])     # bilinear interpolation
               + a * ((1 - b) * mask[k, i + 1, j] + b * mask[k, i + 1, j + 1]))
        images[part] = ink.reshape(-1, SIZE, 2, SIZE, 2).mean((2, 4))
    return np.round(images * 255).astype(np.uint8)[:, None], labels.astype(np.int64)


class ConvNet(nn.Module):
    """A digit classifier whose last 4 x 4 feature map has the whole image in view: (B, 1, 16, 16) -> logits (B, 10)."""

    def __init__(self, width=64):
        super().__init__()
        layers, channels = [], 1
        for out, stride in ((width // 4, 1), (width // 2, 2), (width, 2), (width, 1), (width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body, self.head = nn.Sequential(*layers[:-1]), nn.Linear(width, 10)   # ends before the last ReLU: centred

    def tokens(self, x):
        return self.body(x).flatten(2).transpose(1, 2)                         # (B, 16, width)

    def embed(self, x):
        """What the head and the metrics see: the average over the 4 x 4 positions, (B, width)."""
        return F.relu(self.tokens(x)).mean(1)

    def forward(self, x):
        return self.head(self.embed(x))


def train_net(x, labels, seed, epochs=5, batch=128):
    """A ConvNet for x (N, 1, 16, 16) float and labels (N,), in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, steps = ConvNet(), epochs * (len(x) // batch)
        opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(x))[:len(x) // batch * batch].view(-1, batch):
                loss = F.cross_entropy(net(x[rows]), labels[rows], label_smoothing=0.1)
                opt.zero_grad()
                loss.backward()
                opt.step()
                schedule.step()
    return net.eval().requires_grad_(False)


def load_judge(folder):
    """The classifier that judges samples; it takes what the model sees, (B, 1, 16, 16)."""
    judge = ConvNet()
    judge.load_state_dict(torch.load(Path(folder) / "judge.pt", weights_only=True))
    return judge.eval().requires_grad_(False)


def make(folder, n=20_000, seed=0):
    """Write the whole data set into folder; all or nothing."""
    start, folder = time.time(), Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is in the way: delete it to make the data set anew")
    print(f"drawing {n} digits into {folder} ...", flush=True)
    images, labels = draw(n, seed)
    bias, scale = float(images.mean()), float(1 / images.std())
    see = lambda a: (torch.from_numpy(a).float() - bias) * scale
    encoder = train_net(see(images), torch.from_numpy(labels), seed)
    features = F.normalize(torch.cat([encoder.tokens(see(a)) for a in np.array_split(images, 20)]), dim=-1)
    feature_scale = features.abs().max().item() / 127
    other_images, other_labels = draw(n, seed + 1)                             # the judge's own draws
    judge = train_net(see(other_images), torch.from_numpy(other_labels), seed + 1)
    test_images, test_labels = draw(2000, seed + 2)
    accuracy = (judge(see(test_images)).argmax(1).numpy() == test_labels).mean()
    meta = dict(scale=scale, bias=bias, feature_scale=feature_scale, num_classes=10, vae=None, seed=seed,
                encoder="font_digits ConvNet, its last 4 x 4 feature map", judge_accuracy=float(accuracy))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".font_digits-"))
    try:
        np.save(draft / "latents.npy", images)
        np.save(draft / "labels.npy", labels)
        np.save(draft / "features.npy", (features / feature_scale).round().to(torch.int8).numpy())
        torch.save(judge.state_dict(), draft / "judge.pt")
        (draft / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        draft.chmod(0o755)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"made {folder} in {time.time() - start:.0f} s; the judge reads {accuracy:.1%} of 2000 unseen digits right")


def ensure(folder=FOLDER):
    """The folder of the data set, made first if it is not there."""
    if not (Path(folder) / "meta.json").exists():
        make(folder)
    return Path(folder)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    except ValueError as error:
        sys.exit(f"font_digits.py: {error}")
