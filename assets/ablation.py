"""The study behind README's results: what each part of the method does on the digits, and three open questions.

    python assets/ablation.py --jobs 2          # trains what assets/ablation.csv lacks, a run per core, then draws
    python assets/ablation.py --draw            # README's tables and figures from the .csv files alone: seconds

Every run is train_sit.py with the flags below, and is judged by sample.py's measures; nothing is special-cased. All
runs of a group share seeds: order of the data, noise, u and, but for plain SiT (it has no projector), initialisation.
Interrupted, the study goes on where it was.
"""
import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import fpo
import sample
import toy2d
import train_sit

OFF = "--fpo off --timesteps uniform"
MAIN = {"plain SiT": "--baseline", "REPA": OFF, "REPA + FPO": "--timesteps uniform", "REPA + VR": "--fpo off",
        "REPA + FPO + VR": "", "VRPO + FPO + VR": "--align vrpo",
        "REPA + logit-normal": "--fpo off --timesteps logit_normal",
        "REPA + VR (network)": "--fpo off --timesteps vr_loss"}
MAIN_PAIRS = [("REPA", "plain SiT"), ("REPA + FPO", "REPA"), ("REPA + VR", "REPA"), ("REPA + FPO + VR", "REPA"),
              ("VRPO + FPO + VR", "REPA + FPO + VR"), ("REPA + logit-normal", "REPA"),
              ("REPA + VR (network)", "REPA")]
GRID = {"REPA": OFF, "VRPO": f"{OFF} --align vrpo", "logit-normal, m = 0": "--fpo off --timesteps logit_normal",
        "VR, Gaussian": "--fpo off", "VR, Monte Carlo": "--fpo off --timesteps vr_monte_carlo",
        "VR, network": "--fpo off --timesteps vr_loss",
        "logit-normal, m = 0.25": "--fpo off --timesteps logit_normal --logit_mean 0.25",
        "logit-normal, m = 2.25": "--fpo off --timesteps logit_normal --logit_mean 2.25",
        "REPA, λ = 2": f"{OFF} --repa_weight 2"}
GRID |= {name: f"--timesteps uniform {flags}" for name, flags in {
    "FPO velocity, β = 2": "--fpo velocity --beta 2", "FPO alignment, β = 2": "--fpo alignment --beta 2",
    "FPO both, β = 2": "--beta 2", "FPO both, β = N/8": "--beta 16", "FPO both, β = N/2": "--beta 64",
    "FPO velocity, β = N/2": "--fpo velocity --beta 64",
    "FPO velocity, β = N/2, minus mean at t": "--fpo velocity --beta 64 --fpo_centre",
    "FPO velocity, β = N/2, τ = 0.2": "--fpo velocity --beta 64 --tau 0.2",
    "FPO velocity, β = N/2, τ = 5": "--fpo velocity --beta 64 --tau 5",
    "hard samples, β = N/2": "--fpo off --weighting hard_sample --beta 64",
    "P2": "--fpo off --weighting p2"}.items()}
VR = [name for name in GRID if name.startswith("VR, ")]
SMALL = "--model micro --lr 8e-3 --warmup 50 --steps 600 --save_every 600 --sample_every 9999 --keep 9"
BATCHES = (16, 64, 256)
GROUPS = {                                # group -> flags of all its runs, checkpoints measured, name -> flags
    "default": ("--sample_every 9999 --keep 9", (350, 700, 1400), MAIN),
    "grid": (SMALL, (600,), GRID),
    "batch": (SMALL, (600,), {f"{name}, N = {N}": f"{GRID[like]} --batch {N}" for N in BATCHES for name, like in
                              (("REPA", "REPA"), ("FPO", "FPO both, β = 2"))})}
MEASURES = ("loss", "frechet", "accuracy", "precision", "recall", "cosine", "cknna", "probe")
LOGGED = ("moved", "grad_norm", "reward_std")                              # of log.csv, five rows up to the step
COLUMNS = ["group", "name", "seed", "step", *MEASURES, "t_of_loss", "t_of_align", "t_of_c", *LOGGED]


# ---- Running and measuring -------------------------------------------------------------------------------------------
def explained(t, y, bins=20):
    """Share of the variance of y (n,) that t in [0, 1] explains: a mean for each bin; corrected for chance."""
    bin = (t * bins).long().clamp_max(bins - 1)
    mean = torch.zeros(bins).index_add(0, bin, y) / torch.bincount(bin, minlength=bins)
    rest = (y - mean[bin]).square().sum() / (len(y) - bins)
    return (1 - rest / y.var()).item()


def measured(checkpoint, data):
    """One row of the .csv, from the weight average."""
    model, config = train_sit.load_model(checkpoint)
    settings, device = sample.Config(steps=10), torch.device("cpu")
    parts = [sample.generate(model, config, settings, np.arange(k, k + 100), device)[:2] for k in range(0, 1000, 100)]
    x, labels = torch.cat([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    values = [*sample.measure(data, x, labels).values()]   # Fréchet, precision, recall, the data's own, judge
    cosine, cknna, probe = sample.measure_features(model, config, data).values()
    t, losses, align = sample.data_losses(model, config, data, 31 * 128)
    c = torch.cat([fpo.fpo_gradient_weights(part) for part in losses.split(128)])
    rows = [r for r in csv.DictReader(open(checkpoint.parent / "log.csv")) if int(r["step"]) <= config["step"]][-5:]
    logged = [np.mean([float(row[column] or "nan") for row in rows]) for column in LOGGED]
    return [losses.mean().item(), values[0], values[-1], *values[1:3], cosine, cknna, probe,
            explained(t, losses), explained(t, align), explained(t, c), *logged]


def run(group, name, seed, folder):
    """Train, or go on, on one core; the rows of the checkpoints. A folder that holds another run is an error."""
    common, steps, runs = GROUPS[group]
    out = folder / f"{group}-{list(runs).index(name)}-{seed}"
    command = [sys.executable, "train_sit.py", *f"--amp fp32 {common} {runs[name]} --seed {seed}".split()]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} --out {out}: {done.stderr.strip().splitlines()[-1]}")
    data = train_sit.Latents(ROOT / train_sit.Config.data, features=True)
    return [[group, name, seed, step, *(f"{v:.6g}" for v in measured(out / f"step-{step:07d}.pt", data))]
            for step in steps]


def study(args):
    """Every run that the table lacks, args.jobs at a time, seed by seed."""
    table = HERE / "ablation.csv"
    if not table.exists():
        table.write_text(",".join(COLUMNS) + "\n")
    have = {(r["group"], r["name"], int(r["seed"])) for r in csv.DictReader(open(table))}
    jobs = [(group, name, seed) for seed in range(args.seeds) for group in GROUPS for name in GROUPS[group][2]]
    train_sit.data_folder(train_sit.Config.data, 0, 1)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = [pool.submit(run, *job, args.runs) for job in jobs if job not in have]
        try:
            for k, done in enumerate(as_completed(todo), 1):
                with open(table, "a", newline="") as f:
                    csv.writer(f).writerows(done.result())
                print(f"{k} of {len(todo)}: {done.result()[-1][:3]}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)                         # a run that failed, Ctrl-C: start no other
    ends = {name: args.runs / f"grid-{list(GRID).index(name)}-0/step-{GROUPS['grid'][1][-1]:07d}.pt" for name in VR}
    if all(end.exists() for end in ends.values()):                     # the densities that training ended with, seed 0
        states = {name: train_sit.read_checkpoint(end)["timesteps"] for name, end in ends.items()}
        rows = [[name, f"{t:.4f}", f"{p:.5g}"] for name, s in states.items()
                for t, p in zip(s["t"].tolist(), s["pdf"].tolist())]
        with open(HERE / "ablation_density.csv", "w", newline="") as f:
            csv.writer(f).writerows([["name", "t", "pdf"], *rows])


# ---- Tables and figures ----------------------------------------------------------------------------------------------
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}       # 97.5 %
HEAD = dict(loss=("velocity loss ↓", 1, 4), frechet=("Fréchet ↓", 1, 2), accuracy=("judge, % ↑", 100, 1),
            precision=("precision ↑", 1, 3), recall=("recall ↑", 1, 3), cosine=("cosine ↑", 1, 3),
            cknna=("CKNNA ↑", 1, 3), probe=("probe, % ↑", 100, 1))         # measure -> title, factor, digits
GAPS = dict(loss="velocity loss, %", frechet="Fréchet distance", accuracy="judge accuracy, points")


class Table:
    """The .csv: seeds(group, name, measure, step) -> {seed: value}, of(...) -> their array; step None: the last one."""

    def __init__(self):
        self.rows = list(csv.DictReader(open(HERE / "ablation.csv")))

    def seeds(self, group, name, measure, step=None):
        group, name = {("batch", "REPA, N = 128"): ("grid", "REPA"),                    # N = 128 is in the grid
                       ("batch", "FPO, N = 128"): ("grid", "FPO both, β = 2")}.get((group, name), (group, name))
        step = step or GROUPS[group][1][-1]
        found = {int(r["seed"]): float(r[measure]) for r in self.rows
                 if (r["group"], r["name"], int(r["step"])) == (group, name, step)}
        if len(found) < 2:
            sys.exit(f"ablation.py: {HERE / 'ablation.csv'} has {len(found)} seeds of '{name}' ({group}), and 2 are "
                     "needed; without --draw, what is missing is trained")
        return found

    def of(self, *args):
        return np.array([value for _, value in sorted(self.seeds(*args).items())])

    def gap(self, group, name, base, measure):
        """Mean and 95 % half width of the paired difference name - base, the loss in % of the base's."""
        a, b = (self.seeds(group, n, measure) for n in (name, base))
        pairs = np.array([(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())])
        gaps = 100 * (pairs[:, 0] / pairs[:, 1] - 1) if measure == "loss" else HEAD[measure][1] * -np.diff(pairs)[:, 0]
        return gaps.mean(), QUANTILE[len(gaps)] * gaps.std(ddof=1) / len(gaps) ** 0.5


def print_rows(title, head, rows):
    print(f"\n{title}")
    toy2d.print_table([head, *rows])


def tables(table):
    head = [HEAD[m][0] for m in MEASURES]
    number = lambda mean, half, k, sign="": "-" if np.isnan(mean) else f"{mean:{sign}.{k}f} ±{half:.{k}f}"
    show = lambda v, m: number(HEAD[m][1] * v.mean(), HEAD[m][1] * v.std(ddof=1), HEAD[m][2])
    gap = lambda *names, m: number(*table.gap(*names, m), 2 if m == "loss" else HEAD[m][2], "+")
    for group, title, names in (("default", "the default run, 1,400 steps", MAIN),
                                ("grid", "the grid, --model micro, 600 steps", ["REPA"])):
        seeds = len(table.of(group, "REPA", "loss"))
        print_rows(f"{title}: mean ± standard deviation over {seeds} seeds", ["", *head],
                   [[name, *(show(table.of(group, name, m), m) for m in MEASURES)] for name in names])
        pairs = MAIN_PAIRS if group == "default" else [(name, "REPA") for name in GRID if name != "REPA"]
        against = " from REPA" * (group == "grid")
        print_rows(f"{title}: paired difference ± 95 % (the loss in %){against}", ["", *head],
                   [[f"{a} vs {b}" if group == "default" else a, *(gap(group, a, b, m=m) for m in MEASURES)]
                    for a, b in pairs])
    print_rows("FPO both, β = 2, minus REPA, by batch: paired difference ± 95 %",
               ["", "moved, %", "β / (N + β), %", *GAPS.values()],
               [[f"N = {N}", f"{100 * table.of('batch', f'FPO, N = {N}', 'moved').mean():.2f}", f"{200 / (N + 2):.2f}",
                 *(gap("batch", f"FPO, N = {N}", f"REPA, N = {N}", m=m) for m in GAPS)]
                for N in sorted((*BATCHES, 128))])
    print_rows("share of the variance that t explains (REPA, the default run)",
               ["", "velocity loss", "alignment loss", "FPO's weights c"],
               [[f"step {step}", *(f"{round(100 * table.of('default', 'REPA', k, step).mean())} %"
                                   for k in ("t_of_loss", "t_of_align", "t_of_c"))] for step in GROUPS["default"][1]])

    of = lambda align, column, step: table.of("default", f"{align} + FPO + VR", column, step).mean()
    sigma = {step: of("VRPO", "reward_std", step) for step in GROUPS["default"][1]}
    print_rows("VRPO's Theorem 6, the default run: deviation of the reward, factor on its gradient, gradient norms",
               ["", "σ_R", "(1 + 0.1 σ_R²)/σ_R", "norm, VRPO", "norm, REPA"],
               [[f"step {step}", f"{s:.2f}", f"{(1 + 0.1 * s * s) / s:.1f}",
                 *(f"{of(align, 'grad_norm', step):.2f}" for align in ("VRPO", "REPA"))] for step, s in sigma.items()])


def forest(axes, table, names):
    """Paired differences from REPA in the grid, a panel for each measure; the better side is shaded."""
    for ax, measure in zip(axes, GAPS):
        gaps = [table.gap("grid", name, "REPA", measure) for name in names]
        ax.errorbar(*zip(*[(mean, k) for k, (mean, _) in enumerate(gaps)]), xerr=[half for _, half in gaps], fmt="o",
                    ms=3, color="C0", lw=1)
        low, high = ax.get_xlim()
        ax.axvspan(*((0, max(high, 0)) if measure == "accuracy" else (min(low, 0), 0)), color="C2", alpha=0.12, lw=0)
        ax.axvline(0, color="k", lw=0.8)
        ax.set(yticks=range(len(names)), yticklabels=names if measure == "loss" else [], ylim=(len(names) - 0.5, -0.5),
               title=GAPS[measure])


def draw(args):
    table = Table()
    tables(table)

    def save(fig, name, title):
        fig.suptitle(title, weight="bold")
        fig.savefig(args.out / f"ablation{name}.png", dpi=100)

    fig, steps = Figure((10, 4.6), layout="constrained"), GROUPS["default"][1]
    for ax, measure in zip(fig.subplots(2, 4).flat, MEASURES):
        for k, name in enumerate(MAIN):
            values = np.stack([table.of("default", name, measure, step) for step in steps]) * HEAD[measure][1]
            ax.plot(steps, values.mean(1), f"C{k}o-", ms=3, lw=1, label=name)
            ax.fill_between(steps, values.min(1), values.max(1), color=f"C{k}", alpha=0.12, lw=0)
        ax.set(xscale="log", xticks=steps, xticklabels=steps, title=HEAD[measure][0])
        if measure == "frechet":
            ax.set(yscale="log", yticks=(1, 2, 5, 10), yticklabels=(1, 2, 5, 10))
        ax.minorticks_off()
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel("step")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=8, columnspacing=1, handlelength=1.2,
               fontsize="small")
    save(fig, "", "The default run against steps: mean and range over the seeds")

    fig = Figure((10, 3), layout="constrained")
    left, *right = fig.subplots(1, 4, width_ratios=(1.2, 1, 1, 1))
    for k, (column, label) in enumerate(dict(t_of_loss="velocity loss", t_of_c="FPO's weights on it",
                                             t_of_align="alignment loss").items()):
        values = np.stack([table.of("default", "REPA", column, step) for step in steps]) * 100
        left.plot(steps, values.mean(1), f"C{k}o-", ms=3, label=label)
    left.set(xscale="log", xticks=steps, xticklabels=steps, ylim=(0, 100), xlabel="step",
             title="share of the variance that t explains, %")
    left.minorticks_off()
    left.legend()
    forest(right, table, ["FPO velocity, β = 2", "FPO velocity, β = N/2", "FPO velocity, β = N/2, minus mean at t",
                          "hard samples, β = N/2", "P2"])
    save(fig, "_fpo", "How much of FPO is timestep reweighting?")

    fig, sizes = Figure((10.5, 2.8), layout="constrained"), sorted((*BATCHES, 128))
    left, *right = fig.subplots(1, 4)
    left.plot(sizes, [200 / (N + 2) for N in sizes], "k:", label="β / (N + β)")
    moved = [100 * table.of("batch", f"FPO, N = {N}", "moved").mean() for N in sizes]
    left.plot(sizes, moved, "C0o-", ms=3, label="measured")
    left.set(xscale="log", yscale="log", xlabel="batch N", title="gradient weight moved by FPO, %",
             yticks=(0.2, 0.5, 1, 2, 5, 10), yticklabels=(0.2, 0.5, 1, 2, 5, 10))
    left.legend()
    for ax, measure in zip(right, GAPS):
        mean, half = zip(*(table.gap("batch", f"FPO, N = {N}", f"REPA, N = {N}", measure) for N in sizes))
        ax.errorbar(sizes, mean, half, fmt="C0o", ms=3, lw=1)
        ax.axhline(0, color="k", lw=0.8)
        ax.set(xscale="log", xlabel="batch N", title=f"FPO - REPA: {GAPS[measure]}")
    for ax in (left, *right):
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
    save(fig, "_batch", "FPO at β = 2 and the size of the batch")

    fig = Figure((10, 2.8), layout="constrained")
    left, *right = fig.subplots(1, 4, width_ratios=(1.4, 1, 1, 1))
    for k, name in enumerate(VR):
        t, pdf = np.array([(float(r["t"]), float(r["pdf"])) for r in csv.DictReader(open(HERE / "ablation_density.csv"))
                           if r["name"] == name]).T
        left.plot(t, pdf, f"C{k}", lw=1, label=name)
    t = (np.arange(1000) + 0.5) / 1000
    left.plot(t, np.exp(-np.log(t / (1 - t)) ** 2 / 2) / ((2 * np.pi) ** 0.5 * t * (1 - t)), "k:", lw=1,
              label="logit-normal, m = 0")
    left.set(xlabel="t", yscale="log", ylim=(0.05, None), title="density of t (VR: a tenth uniform)")
    left.legend()
    forest(right, table, [*VR, "logit-normal, m = 0", "logit-normal, m = 0.25"])
    save(fig, "_vr", "Three estimators of one curve: what they recommend, and what it does (against uniform t)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"ablation.py: {message}")
    parser.add_argument("--draw", action="store_true", help="only tables and figures")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="how many, from 0 (default: 5)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ablation", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the figures (default: assets)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: 1 or more is accepted")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.draw:
            study(args)
        draw(args)
    except KeyboardInterrupt:
        parser.error("stopped; the same command goes on")
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
