"""The embedded data set: digits 0-9 drawn from the fonts that ship with matplotlib. No download.

    python data/font_digits.py      # writes data/font_digits/ (train_sit.py does so itself if it is missing)

Each image shows one digit in one of 20 faces, with random size, rotation, slant and shift. The folder:
    latents.npy   (N, 1, 16, 16) uint8    gray images; what the model sees is (latents - bias) * scale
    labels.npy    (N,) int64
    features.npy  (N, 16, 64) int8        unit tokens of a small frozen encoder: the alignment target of REPA
    cls.npy       (N, 64) float16         its pooled embedding, with a mean square of 2 as DINOv2's: for REG
    meta.json     scale, bias, num_classes, ...; written last
    judge.pt      a classifier trained on other draws, used by sample.py --metrics and never in training
The same seed draws the same images everywhere; the two networks, being trained, depend on rounding, too."""
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent / "font_digits"
FACES = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono
    DejaVuSansMono-Bold DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold
    DejaVuSerif-Italic DejaVuSerif-BoldItalic STIXGeneral STIXGeneralBol STIXGeneralItalic
    STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10""".split()
SIZE = 16                                   # pixels of an image
GLYPH = 64                                  # pixels of a glyph; it has height 1 and lies in the middle
EXTENT = 0.75                               # of the square [-0.75, 0.75]^2 that these pixels cover


@functools.cache
def glyph(face, digit):
    """One digit of FACES[face], from its outline: (GLYPH, GLYPH) float64, the covered part of each pixel."""
    from matplotlib import font_manager, get_data_path, path, textpath
    font = font_manager.FontProperties(fname=f"{get_data_path()}/fonts/ttf/{FACES[face]}.ttf")
    outline = textpath.TextPath((0, 0), str(digit), size=100, prop=font)
    outline = path.Path(np.round(outline.vertices * 16) / 16, outline.codes)     # FreeTypes differ by 1/64
    box = outline.get_extents()
    axis = ((np.arange(2 * GLYPH) + 0.5) / GLYPH - 1) * EXTENT         # 2 x 2 points in each pixel
    points = np.stack(np.meshgrid(axis, -axis), -1).reshape(-1, 2)
    points = points * box.height + (box.min + box.max) / 2
    inside = [path.Path(polygon).contains_points(points) for polygon in outline.to_polygons()]
    covered = np.logical_xor.reduce(inside)                            # a polygon in another one is a hole
    return covered.reshape(GLYPH, 2, GLYPH, 2).mean((1, 3))


def render(face, digit, height, angle, slant, shift):
    """A digit, so many pixels high, slanted, turned and shifted: (SIZE, SIZE) in [0, 1]."""
    axis = (np.arange(2 * SIZE) + 0.5) / 2 - SIZE / 2                  # 2 x 2 points in each pixel
    x = axis - shift[0]             # shift, rotation, slant and size undone: where a point lies in the glyph
    y = axis[:, None] - shift[1]
    cos, sin = np.round([np.cos(angle), np.sin(angle)], 9)             # rounded: math libraries differ
    down = y * cos - x * sin                                           # (2 SIZE, 2 SIZE)
    across = x * cos + y * sin + slant * down
    zoom = GLYPH / (2 * EXTENT) / height
    place = (np.stack([down, across]) * zoom + GLYPH / 2 - 0.5).clip(0, GLYPH - 1)
    corner = np.minimum(place.astype(int), GLYPH - 2)
    i, j = corner
    a, b = place - corner
    mask = glyph(face, digit)
    upper = (1 - b) * mask[i, j] + b * mask[i, j + 1]                  # bilinear interpolation
    lower = (1 - b) * mask[i + 1, j] + b * mask[i + 1, j + 1]
    ink = (1 - a) * upper + a * lower
    return ink.reshape(SIZE, 2, SIZE, 2).mean((1, 3))


def draw(n, seed):
    """n random digits -> images (n, 1, SIZE, SIZE) uint8, labels (n,) int64."""
    random = np.random.RandomState(seed)                               # its stream is frozen for ever
    labels = random.randint(0, 10, n)
    faces = random.randint(0, len(FACES), n)
    height = random.uniform(9, 13, n)
    angle = random.uniform(-0.25, 0.25, n)
    slant = random.uniform(-0.3, 0.3, n)
    shift = random.uniform(-1.5, 1.5, (n, 2))
    images = np.array(list(map(render, faces, labels, height, angle, slant, shift)))
    return np.round(images * 255).astype(np.uint8)[:, None], labels


class ConvNet(nn.Module):
    """A digit classifier whose last 4 x 4 features see the whole image: (B, 1, 16, 16) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for out, stride in [(16, 1), (32, 2), (64, 2), (64, 1), (64, 1)]:
            convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers[:-1])                        # without the last ReLU: centred tokens
        self.head = nn.Linear(channels, 10)

    def tokens(self, x):
        return self.body(x).flatten(2).transpose(1, 2)                 # (B, 16, 64)

    def embed(self, x):
        return F.relu(self.tokens(x)).mean(1)                          # (B, 64): what head and metrics see

    def forward(self, x):
        return self.head(self.embed(x))


def train_net(x, labels, seed):
    """A ConvNet trained on x (N, 1, 16, 16) float and labels (N,), in eval mode."""
    labels = torch.from_numpy(labels)
    batches = len(x) // 128                                            # in each of five epochs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvNet()
        opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=5 * batches)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(128)[:batches]:
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
    if folder.exists():
        raise SystemExit(f"{folder} is in the way: delete it to make the data set anew")
    print(f"drawing {n} digits into {folder} ...")
    images, labels = draw(n, seed)
    others, other_labels = draw(n, seed + 1)
    bias, scale = float(images.mean()), float(1 / images.std())
    seen, others = [(torch.from_numpy(x).float() - bias) * scale for x in (images, others)]
    encoder = train_net(seen, labels, seed)
    judge = train_net(others, other_labels, seed + 1)
    tokens = torch.cat([encoder.tokens(part) for part in seen.split(1000)])
    features = F.normalize(tokens, dim=-1)
    features = (features / (features.abs().max().item() / 127)).round()
    cls = F.relu(tokens).mean(1)
    cls *= (2 / cls.square().mean()).sqrt()
    meta = dict(scale=scale, bias=bias, num_classes=10, seed=seed, encoder="font_digits.ConvNet")
    folder.mkdir(parents=True)
    arrays = dict(latents=images, labels=labels, features=features.to(torch.int8), cls=cls.half())
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    torch.save(judge.state_dict(), folder / "judge.pt")
    (folder / "draft").write_text(json.dumps(meta, indent=1) + "\n")
    (folder / "draft").rename(folder / "meta.json")          # what other processes wait for


def ensure(folder=FOLDER):
    """The folder of the data set, made first if it is missing; of torchrun's processes the first makes it."""
    ready = folder / "meta.json"
    if os.environ.get("RANK", "0") == "0" and not ready.exists():
        make(folder)
    while not ready.exists():
        time.sleep(1)
    return folder


if __name__ == "__main__":
    make(FOLDER)
