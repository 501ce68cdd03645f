"""The ablation on the digits: train, measure, compare. Whatever is there already is not done again.

    python assets/ablation.py                  # trains into runs/ablation/ (6 minutes a run and core), then the table and figure
    python assets/ablation.py --seeds 3 --jobs 2
    python assets/ablation.py --draw           # table and figure from assets/ablation.csv alone

Every run is a command of train_sit.py with the flags below, every measurement one of sample.py. Runs are independent, on one
thread each, and resume where they were stopped. ablation.csv: a row for each run, seed and checkpoint.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RUNS = {                                             # name -> flags of train_sit.py
    "plain SiT": "--baseline",
    "REPA": "--fpo off --timesteps uniform",
    "REPA + FPO": "--timesteps uniform",
    "REPA + VR": "--fpo off",
    "REPA + FPO + VR": "",
    "VRPO": "--align vrpo --fpo off --timesteps uniform",
    "VRPO + FPO + VR": "--align vrpo",
}
PAIRS = [("REPA", "plain SiT"), ("REPA + FPO", "REPA"), ("REPA + VR", "REPA"), ("REPA + FPO + VR", "REPA"), ("VRPO", "REPA"),
         ("VRPO + FPO + VR", "REPA + FPO + VR")]
COLUMNS = {"judge accuracy": "judge accuracy", "Frechet": "Frechet distance in the judge's features", "precision": "precision",
           "recall": "recall", "cosine": "alignment, cosine", "CKNNA": "alignment, CKNNA", "probe": "linear probe"}
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}      # Student's t for n paired differences


def one(name, seed, folder):
    """Train and measure one run -> its rows of the csv."""
    out = folder / f"{name.replace(' ', '')}-{seed}"
    call = lambda *words: subprocess.run([sys.executable, *map(str, words)], cwd=HERE.parent, check=True,
                                         env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)
    if not (out / "step-0001400.pt").exists():
        call("train_sit.py", *RUNS[name].split(), "--seed", seed, "--amp", "bf16", "--keep", 4, "--sample_every", 10_000, "--out", out)
    log, rows = list(csv.DictReader(open(out / "log.csv"))), []
    for step in (350, 700, 1050, 1400):
        metrics = out / f"metrics-{step}" / "metrics.json"
        if not metrics.exists():
            call("sample.py", "--checkpoint", out / f"step-{step:07d}.pt", "--out", metrics.parent, "--count", 1000, "--steps", 10,
                 "--amp", "bf16", "--metrics")
        values = json.loads(metrics.read_text())
        pick = lambda key: next(v for k, v in values.items() if k.startswith(key))
        rows.append(dict(run=name, seed=seed, step=step, **{column: round(pick(key), 5) for column, key in COLUMNS.items()},
                         seconds_per_step=round(128 / np.median([float(r["images_per_s"]) for r in log]), 4)))
    return rows


def table(rows):
    """Mean and standard deviation over the seeds at the last step, then the paired differences with their intervals."""
    last = {(r["run"], r["seed"]): r for r in rows if int(r["step"]) == 1400}
    names, seeds = [n for n in RUNS if any(k[0] == n for k in last)], sorted({k[1] for k in last})
    value = lambda name, column: np.array([float(last[name, s][column]) for s in seeds if (name, s) in last])
    print(f"{'':18}" + "".join(f"{column:>18}" for column in COLUMNS))
    for name in names:
        print(f"{name:18}" + "".join(f"{value(name, c).mean():11.4f} +-{value(name, c).std(ddof=1):5.3f}" for c in COLUMNS))
    print("\npaired difference over the seeds, 95 % interval")
    for a, b in PAIRS:
        both = [s for s in seeds if (a, s) in last and (b, s) in last]
        if len(both) > 1:
            cells = []
            for c in COLUMNS:
                d = np.array([float(last[a, s][c]) - float(last[b, s][c]) for s in both])
                cells.append(f"{d.mean():+11.4f} +-{T95[len(d)] * d.std(ddof=1) / len(d) ** 0.5:5.3f}")
            print(f"{a + ' - ' + b:36}" + "".join(cells))


def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    for axis, column in zip(axes, ("judge accuracy", "Frechet", "cosine", "probe")):
        for k, name in enumerate(n for n in RUNS if any(r["run"] == n for r in rows)):
            steps = sorted({int(r["step"]) for r in rows})
            values = [[float(r[column]) for r in rows if r["run"] == name and int(r["step"]) == s] for s in steps]
            mean = [np.mean(v) for v in values]
            axis.plot(steps, mean, label=name, color=f"C{k}")
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=f"C{k}", alpha=0.15, lw=0)
        axis.set(xlabel="step", title={"Frechet": "Fréchet distance", "probe": "linear probe", "cosine": "alignment (cosine)"}.get(column, column))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "ablation.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 6))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="from assets/ablation.csv alone")
    args, path = parser.parse_args(), HERE / "ablation.csv"
    if not args.draw:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(one, name, seed, Path("runs/ablation")) for seed in range(args.seeds) for name in RUNS]
            rows = [row for job in jobs for row in job.result()]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    rows = list(csv.DictReader(open(path)))
    table(rows)
    draw(rows)


if __name__ == "__main__":
    main()
