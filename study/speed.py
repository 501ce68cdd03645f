"""How fast train_sit.py trains here, for any of its flags, and how near that is to matrix products alone.

    python study/speed.py                                           # the default run
    python study/speed.py --synthetic 512 --model SiT-XL/2 --batch 32 --timesteps uniform

The first third of the steps does not count: the blocks are compiled then. --synthetic N takes N images of
noise as data, with latents, tokens and class tokens shaped like ImageNet's.
"""
import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_sit  # noqa: E402

CUDA = torch.cuda.is_available()


def make_synthetic(folder, N):
    random = np.random.RandomState(0)
    latents = random.randn(N, 8, 32, 32).astype(np.float32)
    latents[:, 4:] = 0.05                                           # the VAE's standard deviation
    np.save(folder / "latents.npy", latents)
    np.save(folder / "labels.npy", random.randint(0, 1000, N))
    np.save(folder / "features.npy", random.randint(-127, 128, (N, 256, 768), np.int8))
    np.save(folder / "cls.npy", random.randn(N, 768).astype(np.float16))
    meta = dict(scale=1.0, bias=0.0, moments=True, num_classes=1000)
    (folder / "meta.json").write_text(json.dumps(meta))


def run(flags, steps, out):
    """Train without checkpoints and pictures -> its flags, arguments of its network, images a second."""
    seen = []
    train_sit.save_checkpoint = lambda cfg, run, model, *more: seen.append((cfg, model.arch))
    train_sit.write_pictures = lambda *_: None
    third = max(1, steps // 3)
    train_sit.main([*flags, f"--steps={steps}", f"--log_every={third}", f"--out={out}"])
    log = np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True)
    return *seen[-1], log["images_per_s"][1:].mean()


def forward_flops(arch):
    """Floating-point operations for one image, forward."""
    model = train_sit.SiT(**arch)
    x, t, y = torch.zeros(1, *model.shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    cls = torch.zeros(1, model.cls_dim) if model.cls_dim else None
    # The fast kernels of attention are not counted on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, t, y, features=True, cls=cls)
    return counter.get_total_flops()


def calls_a_second(function):
    function()
    calls, start = 0, time.time()
    while time.time() - start < 1:
        function()
        calls += 1
        if CUDA:
            torch.cuda.synchronize()
    return calls / (time.time() - start)


def main(argv=None):
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=30, help="at least 2")
    parser.add_argument("--synthetic", type=int, metavar="N", help="images; other flags are train_sit.py's")
    ours, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if ours.synthetic:
            make_synthetic(Path(folder), ours.synthetic)
            flags += ["--data", folder]
        cfg, arch, images = run(flags, ours.steps, folder)
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if CUDA:
            memory = torch.cuda.max_memory_allocated()
        data = train_sit.Latents(cfg.data, features=cfg.align != "none", cls=cfg.reg_weight > 0)
        random = np.random.RandomState(0)
        batches = calls_a_second(lambda: data.batch(random.randint(0, len(data), cfg.batch)))
    n, dtype = 4096 if CUDA else 1024, torch.bfloat16 if cfg.bf16 else torch.float32
    a = torch.randn(n, n, device="cuda" if CUDA else "cpu").to(dtype)
    most = 10 * 2 * n ** 3 * calls_a_second(lambda: [a @ a for _ in range(10)])
    model = 3 * forward_flops(arch) * images                # backward takes twice what forward takes
    print(f"{images / cfg.batch:10.4g} steps/s")
    print(f"{images:10.4g} images/s")
    print(f"{model / 1e9:10.4g} GFLOP/s of the model")
    print(f"{most / 1e9:10.4g} GFLOP/s of matrix products in {dtype}")
    print(f"{100 * model / most:10.4g} % of these")
    print(f"{memory / 2 ** 30:10.4g} GiB of memory at most")
    print(f"{batches * cfg.batch:10.4g} images/s read by one thread")


if __name__ == "__main__":
    main()
