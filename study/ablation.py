"""What each part of the method does on the digits, and three open questions. README.md has the results.

    python study/ablation.py                # trains what ablation.csv lacks, then draws
    python study/ablation.py --draw         # the tables and figures from the csv files alone: seconds
    python study/ablation.py --speed        # writes ablation_speed.csv: 7 minutes of one core
    python study/between.py                 # writes between.csv: 20 minutes of one core
    python study/ablation.py --train FLAGS  # one run: train_sit.py with what only the study needs

All runs of a group share their seeds: the order of the data, the noise, u and, where they have
the same layers, the initialisation. A study that was stopped goes on where it was.
"""
import argparse
import collections
import csv
import functools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import between
import fpo
import measures
import sample
import toy2d
import train_sit
from data import font_digits

# ----------------------------------------------------------------------------------------------------------
# What is run: names and the flags of train_sit.py

NO_FPO = "--policy uniform --align_policy uniform"
REPA = f"{NO_FPO} --timesteps uniform"
FPO = "--timesteps uniform"
VELOCITY = "--timesteps uniform --align_policy uniform"
MAIN = {
    "plain SiT": f"{REPA} --align none",
    "REPA": REPA,
    "REPA + FPO": FPO,
    "REPA + VR": NO_FPO,
    "REPA + FPO + VR": "",
    # The table's VRPO runs took the stability reward from a quarter of the batch; it is now of all of it.
    "VRPO + FPO + VR": "--align vrpo --align_policy uniform",
    "REPA + logit-normal": f"{NO_FPO} --timesteps logit_normal",
    "REPA + VR (network)": f"{NO_FPO} --timesteps vr_loss",
}
# The second edition: with the batch, learning rate and steps that are the default of train_sit.py now.
SWITCHES = {
    "plain SiT": f"{REPA} --align none",
    "REPA": REPA,
    "REPA + logit-normal": f"{NO_FPO} --timesteps vr_logit_normal",
    "iREPA": f"{REPA} --align spatial --projector conv",
    "iREPA + logit-normal": f"{NO_FPO} --timesteps vr_logit_normal --align spatial --projector conv",
    "REG": f"{REPA} --reg_weight 0.03",
    "VRPO": f"{REPA} --align vrpo",
    "REPA + FPO": FPO,
    "REPA + FPO, groups of 32": f"{FPO} --group 32",
    "REPA + FPO, groups of 16": f"{FPO} --group 16",
    "REPA + FPO, groups of 8": f"{FPO} --group 8",
    "REPA + FPO + logit-normal": "--timesteps vr_logit_normal",
    "REG + FPO": f"{FPO} --reg_weight 0.03",
    "REPA, FPO at t ≥ 0.9 alone": f"{FPO} --policy uniform",
    "REPA, weighed away from noise": f"{REPA} --align_policy early",
    "REPA, stopped half-way": f"{REPA} --align_until 700",
}
BASE = {                                     # all others are compared with REPA
    "REPA": "plain SiT",
    "VRPO + FPO + VR": "REPA + FPO + VR",
    "REG + FPO": "REG",
    "REPA + FPO + logit-normal": "REPA + logit-normal",
    "iREPA + logit-normal": "REPA + logit-normal",
}
GRID = {
    "REPA": REPA,
    "VRPO": f"{REPA} --align vrpo",
    "logit-normal, m = 0": f"{NO_FPO} --timesteps logit_normal",
    "VR, Gaussian": NO_FPO,
    "VR, Monte Carlo": f"{NO_FPO} --timesteps vr_monte_carlo",
    "VR, network": f"{NO_FPO} --timesteps vr_loss",
    "logit-normal, m = 0.25": f"{NO_FPO} --timesteps logit_normal --logit_mean 0.25",
    "logit-normal, m = 2.25": f"{NO_FPO} --timesteps logit_normal --logit_mean 2.25",
    "REPA, λ = 2": f"{REPA} --repa_weight 2",
    "FPO velocity, β = 2": VELOCITY,
    "FPO alignment, β = 2": f"{FPO} --policy uniform",
    "FPO both, β = 2": FPO,
    "FPO both, β = N/8": f"{FPO} --beta 16",
    "FPO both, β = N/2": f"{FPO} --beta 64",
    "FPO velocity, β = N/2": f"{VELOCITY} --beta 64",
    "FPO velocity, β = N/2, minus mean at t": f"{VELOCITY} --beta 64 --policy fpo_centred",
    "FPO velocity, β = N/2, τ = 0.2": f"{VELOCITY} --beta 64 --tau 0.2",
    "FPO velocity, β = N/2, τ = 5": f"{VELOCITY} --beta 64 --tau 5",
    "hard samples, β = N/2": f"{VELOCITY} --beta 64 --policy hard_sample",
    "P2": f"{VELOCITY} --policy p2",
}
BATCH = {
    "REPA, N = 16": f"{REPA} --batch 16",
    "FPO, N = 16": f"{FPO} --batch 16",
    "REPA, N = 64": f"{REPA} --batch 64",
    "FPO, N = 64": f"{FPO} --batch 64",
    "REPA, N = 256": f"{REPA} --batch 256",
    "FPO, N = 256": f"{FPO} --batch 256",
}
# Two of the open questions: does FPO help where few samples compete, and at which end of t does it pay to
# draw fewer samples?
PARTS = {"both": FPO, "velocity": VELOCITY, "alignment": f"{FPO} --policy uniform"}
QUESTIONS = {
    "REPA": REPA,
    "logit-normal": f"{NO_FPO} --timesteps logit_normal",
    "fewer at the data": f"{NO_FPO} --timesteps fewer_at_data",
    "fewer at the noise": f"{NO_FPO} --timesteps fewer_at_noise",
}
SIZES_OF_GROUPS = 128, 32, 16, 8             # of a batch of 128; the alignment loss ranks a tenth of each
for part, flags in PARTS.items():
    for size in SIZES_OF_GROUPS:
        QUESTIONS[f"FPO {part}, groups of {size}"] = f"{flags} --group {size}"
# Which output, and where is its error measured? Pixels in one wide patch, 256 numbers into a width of 64.
train_sit.MODELS["micro/16"] = dict(train_sit.MODELS["micro"], patch=16)
PAIRS = {f"{output}, loss in {place}": f"--predict {output} --loss {place}"
         for output in train_sit.TO_VELOCITY for place in train_sit.TO_VELOCITY}
WIDE = "--model micro/16 --align none --policy uniform --timesteps logit_normal --steps 2000 --lr 2e-3"
SMALL = "--model micro --lr 8e-3 --warmup 50 --steps 600 --save_every 600 --sample_every 9999"
STEPS = 350, 700, 1400
NOW = "--batch 64 --lr 3e-3 --bf16 --sample_every 9999"
GROUPS = {                                   # seeds, flags of all its runs, checkpoints measured, runs
    "switches": (5, NOW, STEPS, SWITCHES),
    "questions": (3, SMALL, [600], QUESTIONS),
    "default": (3, "--sample_every 9999", STEPS, MAIN),
    "grid": (3, SMALL, [600], GRID),
    "batch": (3, SMALL, [600], BATCH),
    "pairs": (3, f"{WIDE} --save_every 2000 --sample_every 9999", [2000], PAIRS),
}
# Of "switches", by step 3 of the rule in README.md.
TEN_SEEDS = ["plain SiT", "REPA", "REPA + logit-normal", "iREPA + logit-normal", "REPA + FPO, groups of 16"]
VR = ["VR, Gaussian", "VR, Monte Carlo", "VR, network"]
SIZES = {                                    # N -> group, run with FPO, run without
    16: ("batch", "FPO, N = 16", "REPA, N = 16"),
    64: ("batch", "FPO, N = 64", "REPA, N = 64"),
    128: ("grid", "FPO both, β = 2", "REPA"),
    256: ("batch", "FPO, N = 256", "REPA, N = 256"),
}
MEASURES = {                                 # title, digits
    "loss": ("velocity loss ↓", 4),
    "frechet": ("Fréchet ↓", 2),
    "accuracy": ("judge, % ↑", 1),
    "precision": ("precision ↑", 3),
    "recall": ("recall ↑", 3),
    "cosine": ("cosine ↑", 3),
    "cknna": ("CKNNA ↑", 3),
    "probe": ("probe, % ↑", 1),
}
SHARES = {"t_of_loss": "velocity loss", "t_of_align": "alignment loss", "t_of_c": "FPO's weights c"}
TENTHS = [f"loss_t{k}" for k in range(10)]   # the velocity loss in each tenth of t
NUMBERS = [*MEASURES, *SHARES, "moved", "grad_norm", "reward_std", *TENTHS]
IN_PERCENT = ["accuracy", "probe", *SHARES, "moved"]                     # when shown
TABLE, DENSITIES, SPEEDS = HERE / "ablation.csv", HERE / "ablation_density.csv", HERE / "ablation_speed.csv"
RUNS = ROOT / "runs/ablation"

# ----------------------------------------------------------------------------------------------------------
# Running and measuring


def train(argv):
    """train_sit.py with what only the study needs, and every checkpoint kept.

    It is FPO by losses minus their mean at t, and two densities of t."""
    centred = lambda L, t, cfg: fpo.fpo_gradient_weights(fpo.centred(L, t), cfg.r, cfg.beta, cfg.tau)
    train_sit.POLICIES["fpo_centred"] = centred
    for end in ("data", "noise"):
        density = between.DENSITIES[f"fewer at the {end}"]
        train_sit.TIMESTEPS[f"fewer_at_{end}"] = lambda u, run_density, cfg, density=density: density(u)
    train_sit.save_checkpoint = functools.partial(train_sit.save_checkpoint, keep=9)
    train_sit.main([*"--batch 128 --lr 2e-3 --steps 1400 --timesteps vr_gaussian".split(), *argv])   # of old


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows, mode):
    with open(path, mode, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def measured(path, data):
    """The NUMBERS of one checkpoint, from its weight average."""
    model, config = train_sit.load_model(path)
    settings, cpu = sample.Config(steps=10), torch.device("cpu")
    x, labels, _ = sample.generate(model, config, settings, np.arange(1000), cpu)
    images = train_sit.to_pixels(x, data.meta)
    quality = sample.measure(data, ROOT / train_sit.Config.data, images, x, labels)
    frechet, precision, recall, *_, accuracy = quality.values()
    hidden = measures.hidden_measures(model, data)
    t, L, A = measures.data_losses(model, data, 31 * 128, config["predict"])
    c = torch.cat([fpo.fpo_gradient_weights(part) for part in L.split(128)])
    shares = [measures.explained(t, y) for y in (L, A, c)]
    log = [row for row in read(path.parent / "log.csv") if int(row["step"]) <= config["step"]]
    logged = [np.mean([float(row[name]) for row in log[-5:]]) for name in ("moved", "grad_norm")]
    moments = train_sit.read_checkpoint(path)["moments"]
    reward_std = fpo.vrpo_terms(moments["reward"])[2] if moments else np.nan
    numbers = [L.mean(), frechet, accuracy, precision, recall, *hidden, *shares, *logged, reward_std]
    return numbers + [L[(10 * t).long() == k].mean() for k in range(10)]


def run(group, name, seed, data):
    """Train, or go on, on one core; the rows of its checkpoints."""
    _, common, steps, runs = GROUPS[group]
    out = RUNS / f"{group}-{list(runs).index(name)}-{seed}"
    flags = f"--no-bf16 {common} {runs[name]} --seed {seed}".split()
    command = [sys.executable, __file__, "--train", *flags, "--out", str(out)]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_core, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    rows = []
    for step in steps:
        numbers = measured(out / f"step-{step:07d}.pt", data)
        rows += [[group, name, seed, step, *(f"{number:.6g}" for number in numbers)]]
    return rows


def study(at_once):
    """Every run that the table lacks, seed by seed; then the densities of t that the VR runs ended with."""
    if not TABLE.exists():
        write(TABLE, [["group", "name", "seed", "step", *NUMBERS]], "w")
    have = {(row["group"], row["name"], int(row["seed"])) for row in read(TABLE)}
    jobs = [(group, name, seed) for group, (seeds, _, _, runs) in GROUPS.items()
            for seed in range(seeds) for name in runs]
    jobs += [("switches", name, seed) for seed in range(5, 10) for name in TEN_SEEDS]
    todo = [job for job in jobs if job not in have]
    data = train_sit.Latents(font_digits.ensure(ROOT / train_sit.Config.data), features=True, cls=True)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(at_once) as pool:                # after an error no other run begins
        for k, rows in enumerate(pool.map(lambda job: run(*job, data), todo), 1):
            write(TABLE, rows, "a")
            print(f"{k} of {len(todo)}: {rows[-1][:3]}", flush=True)
    ends = [RUNS / f"grid-{list(GRID).index(name)}-0/step-0000600.pt" for name in VR]
    if not all(end.exists() for end in ends):
        return
    rows = [["name", "t", "pdf"]]
    for name, end in zip(VR, ends):
        density = train_sit.read_checkpoint(end)["density"]
        rows += [[name, f"{t:.4f}", f"{p:.5g}"] for t, p in zip(density["t"], density["pdf"])]
    write(DENSITIES, rows, "w")


def measure_speed(rounds=8, steps=20):
    """Images per second of every switch on one core, by turns; the first half of the steps does not count."""
    torch.set_num_threads(1)
    rows = [["name", "round", "images_per_s"]]
    for k in range(rounds):
        for name, flags in SWITCHES.items():
            with tempfile.TemporaryDirectory() as out:
                train(f"{NOW} {flags} --steps {steps} --log_every {steps // 2} --out {out}".split())
                *_, last = read(Path(out, "log.csv"))
            rows += [[name, k, last["images_per_s"]]]
            print(*rows[-1], flush=True)
    write(SPEEDS, rows, "w")


# ----------------------------------------------------------------------------------------------------------
# Tables

# Student's t, 97.5 %, for so many seeds
QUANTILE = dict(zip(range(2, 11), [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]))
GAPS = {"loss": "velocity loss, %", "frechet": "Fréchet distance", "accuracy": "judge accuracy, points"}
GAPS_AND_COSINE = GAPS | {"cosine": "cosine"}


class Table:
    """What ablation.csv says of a group, run, measure and step (None: the last)."""

    def __init__(self):
        self.series = collections.defaultdict(dict)          # group, run, step, measure -> {seed: value}
        for row in read(TABLE):
            for measure in NUMBERS:
                series = self.series[row["group"], row["name"], int(row["step"]), measure]
                series[row["seed"]] = float(row[measure] or "nan") * (100 if measure in IN_PERCENT else 1)

    def seeds(self, group, name, measure, step=None):
        return self.series[group, name, step or GROUPS[group][2][-1], measure]

    def values(self, group, *which):
        """Those of the seeds that all runs of the group have, so that means compare."""
        series = self.seeds(group, *which)
        return np.array([value for seed, value in series.items() if int(seed) < GROUPS[group][0]])

    def gap(self, group, name, base, measure, step=None):
        """Mean and 95 % half width of the paired difference name - base, a loss in % of the base's."""
        a, b = self.seeds(group, name, measure, step), self.seeds(group, base, measure, step)
        a, b = np.array([(a[seed], b[seed]) for seed in a if seed in b]).T
        gaps = 100 * (a / b - 1) if measure.startswith("loss") else a - b
        return gaps.mean(), QUANTILE[len(gaps)] * gaps.std(ddof=1) / len(gaps) ** 0.5


def cell(mean, half, digits, sign=""):
    return "-" if np.isnan(mean) else f"{mean:{sign}.{digits}f} ±{half:.{digits}f}"


def gap_cells(table, runs, which, step=None):
    digits = {measure: digits for measure, (_, digits) in MEASURES.items()} | {"loss": 2}
    return [cell(*table.gap(*runs, measure, step), digits[measure], "+") for measure in which]


def finished(table, group):
    """The runs of a group that have three seeds: all, unless the study was stopped."""
    return [name for name in GROUPS[group][3] if len(table.values(group, name, "loss")) > 2]


def print_group(table, group, title, names=None, against=""):
    """Means of some runs, and the differences of all but the first from what they are compared with.

    names: those of which the means are printed."""
    head = ["", *(measure for measure, _ in MEASURES.values())]
    done = finished(table, group)
    seeds = [len(table.values(group, name, "loss")) for name in done]
    print(f"\n{title}: mean ± standard deviation over {' to '.join(map(str, sorted({*seeds})))} seeds")
    rows = [head]
    for name in done if names is None else names:
        values = {measure: table.values(group, name, measure) for measure in MEASURES}
        rows += [[name, *(cell(v.mean(), v.std(ddof=1), MEASURES[m][1]) for m, v in values.items())]]
    toy2d.print_table(rows)
    print(f"\n{title}: paired difference ± 95 % (the loss in %){against}")
    rows = [head]
    for name in done[1:]:
        base = BASE.get(name, "REPA")
        label = name if against else f"{name} vs {base}"
        rows += [[label, *gap_cells(table, (group, name, base), MEASURES)]]
    toy2d.print_table(rows)


def images_per_second():
    """name -> images per second of every round, from ablation_speed.csv."""
    speeds = collections.defaultdict(list)
    for row in read(SPEEDS):
        speeds[row["name"]] += [float(row["images_per_s"])]
    return {name: np.array(values) for name, values in speeds.items()}


def print_answer(table):
    """What to switch on: the rule of README.md, in one table."""
    print("\nwhat to switch on, batch 64, 1,400 steps: paired difference ± 95 %")
    rows = [["", *GAPS.values(), "samples", "Fréchet, 350 steps", "judge, 350 steps", "time of a step, ratio",
             "seeds"]]
    speeds, missed = images_per_second(), 0
    for name in finished(table, "switches")[1:]:
        runs = "switches", name, BASE.get(name, "REPA")
        gaps = [table.gap(*runs, measure) for measure in GAPS]
        missed += sum(abs(mean) > half for mean, half in gaps)
        mean, half = gaps[1]
        verdict = "no effect seen" if abs(mean) <= half else "helps" if mean < 0 else "harms"
        early = gap_cells(table, runs, ["frechet", "accuracy"], STEPS[0])
        ratio = toy2d.interval(torch.from_numpy(speeds[runs[2]] / speeds[name]).log()).exp()
        time = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
        seeds = len(table.seeds("switches", name, "loss"))
        cells = gap_cells(table, runs, GAPS)
        rows += [[f"{name} vs {runs[2]}", *cells, verdict, *early, time, str(seeds)]]
    toy2d.print_table(rows)
    count = len(GAPS) * (len(rows) - 1)
    print(f"of the {count} intervals at the end {missed} leave out 0; by chance {count / 20:.0f} would")


def print_questions(table):
    """Which of two guesses holds? Both in the small network, 600 steps."""
    print("\ntwo questions, --model micro, 600 steps: paired difference ± 95 % from REPA")
    rows = [["", "moved in the velocity loss, %", *GAPS_AND_COSINE.values()]]
    for name in finished(table, "questions")[1:]:
        moved = table.values("questions", name, "moved").mean()
        rows += [[name, f"{moved:.2f}", *gap_cells(table, ("questions", name, "REPA"), GAPS_AND_COSINE)]]
    toy2d.print_table(rows)


@functools.cache
def between_rows():
    return read(between.TABLE)


def between_values(data, density, step, columns):
    """Columns of between.csv for a data set, density of t and step: (S, columns)."""
    which = {"data": data, "density": density, "step": str(step)}
    rows = [row for row in between_rows() if which.items() <= row.items()]
    return torch.tensor([[float(row[column]) for column in columns] for row in rows])


def between_ratios():
    """data set -> density of t, step -> distances over those of uniform t: mean, low, high of 95 % (3,)."""
    ratios = collections.defaultdict(dict)
    for data in dict.fromkeys(row["data"] for row in between_rows()):
        for density in list(between.DENSITIES)[1:]:
            for step in between.STOPS:
                a, b = (between_values(data, name, step, ["distance"]) for name in (density, "uniform"))
                ratios[data][density, step] = toy2d.interval((a / b).log()).exp()[:, 0]
    return ratios


def print_between():
    last = between.STOPS[-1]
    print(f"\nbetween two dimensions and the digits, {last} steps: distance from held-out data; "
          "ratio to uniform t [95 %]")
    (_, *densities), earlier = between.DENSITIES, between.STOPS[:-1]
    columns = [(density, last) for density in densities] + [("logit-normal", step) for step in earlier]
    rows = [["", "of data", "uniform", *densities, *(f"logit-normal, {step}" for step in earlier)]]
    for data, ratios in between_ratios().items():
        ends = [between_values(data, *which, ["distance"]) for which in (("none", 0), ("uniform", last))]
        cells = [ratios[column].tolist() for column in columns]
        rows += [[data, *(f"{end.mean():.4f}" for end in ends),
                  *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in cells)]]
    toy2d.print_table(rows)


def print_batches(table):
    print("\nFPO both, β = 2, minus REPA, by batch: paired difference ± 95 %")
    rows = [["", "moved, %", "β / (N + β), %", *GAPS.values()]]
    for N, runs in SIZES.items():
        moved = table.values(*runs[:2], "moved").mean()
        rows += [[f"N = {N}", f"{moved:.2f}", f"{200 / (N + 2):.2f}", *gap_cells(table, runs, GAPS)]]
    toy2d.print_table(rows)


def print_shares(table):
    print("\nshare of the variance that t explains (REPA, first edition)")
    rows = [["", *SHARES.values()]]
    for step in STEPS:
        shares = [table.values("default", "REPA", share, step).mean() for share in SHARES]
        rows += [[f"step {step}", *(f"{round(share)} %" for share in shares)]]
    toy2d.print_table(rows)


def print_theorem_6(table):
    print("\nVRPO's Theorem 6, first edition: standard deviation of the reward, factor on its gradient, "
          "gradient norms")
    rows = [["", "σ_R", "(1 + 0.1 σ_R²)/σ_R", "norm, VRPO", "norm, REPA"]]
    for step in STEPS:
        sigma = table.values("default", "VRPO + FPO + VR", "reward_std", step).mean()
        vrpo = table.values("default", "VRPO + FPO + VR", "grad_norm", step).mean()
        repa = table.values("default", "REPA + FPO + VR", "grad_norm", step).mean()
        factor = (1 + 0.1 * sigma ** 2) / sigma
        rows += [[f"step {step}", f"{sigma:.2f}", f"{factor:.1f}", f"{vrpo:.2f}", f"{repa:.2f}"]]
    toy2d.print_table(rows)


def print_pairs(table):
    seeds = len(table.values("pairs", "v, loss in v", "frechet"))
    print("\none wide patch: Fréchet distance ↓, judge accuracy in % ↑, "
          f"mean ± standard deviation over {seeds} seeds")
    rows = [["", *(f"loss in {place}" for place in train_sit.TO_VELOCITY)]]
    for output in train_sit.TO_VELOCITY:
        cells = []
        for place in train_sit.TO_VELOCITY:
            frechet, accuracy = (table.values("pairs", f"{output}, loss in {place}", measure)
                                 for measure in ("frechet", "accuracy"))
            cells += [cell(frechet.mean(), frechet.std(ddof=1), 1) + ", "
                      + cell(accuracy.mean(), accuracy.std(ddof=1), 1)]
        rows += [[f"{output} from the network", *cells]]
    toy2d.print_table(rows)


# ----------------------------------------------------------------------------------------------------------
# Figures

matplotlib.rcParams.update({
    "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7, "figure.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})


def figure(title, *size, **options):
    """A figure of these inches, its axes."""
    fig = Figure(size)
    fig.suptitle(title, weight="bold")
    return fig, fig.subplots(**options)


def log_scale(ax, which, ticks):
    ax.set(**{f"{which}scale": "log", f"{which}ticks": ticks, f"{which}ticklabels": ticks})
    ax.minorticks_off()


def forest(axes, table, names, group="grid"):
    """Paired differences from REPA, a panel for each measure; the better side is shaded."""
    for ax, (measure, title) in zip(axes, GAPS.items()):
        mean, half = zip(*(table.gap(group, name, "REPA", measure) for name in names))
        ax.errorbar(mean, range(len(names)), xerr=half, fmt="o", ms=3, color="C0", lw=1)
        low, high = ax.get_xlim()
        better = (0, max(high, 0)) if measure == "accuracy" else (min(low, 0), 0)
        ax.axvspan(*better, color="C2", alpha=0.12, lw=0)
        ax.axvline(0, color="k", lw=0.8)
        ax.set(yticks=range(len(names)), yticklabels=[], ylim=(len(names) - 0.5, -0.5), title=title)
    axes[0].set_yticklabels(names)


def draw_steps(table):
    title = "The first edition against steps: mean and range over the seeds"
    fig, axes = figure(title, 10, 4.6, nrows=2, ncols=4)
    for ax, (measure, (title, _)) in zip(axes.flat, MEASURES.items()):
        for k, name in enumerate(MAIN):
            values = np.stack([table.values("default", name, measure, step) for step in STEPS])
            ax.plot(STEPS, values.mean(1), f"C{k}o-", ms=3, lw=1, label=name)
            ax.fill_between(STEPS, values.min(1), values.max(1), color=f"C{k}", alpha=0.12, lw=0)
        log_scale(ax, "x", STEPS)
        ax.set_title(title)
        if measure == "frechet":
            log_scale(ax, "y", (1, 2, 5, 10))
    for ax in axes[1]:
        ax.set_xlabel("step")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=8, columnspacing=1,
               handlelength=1.2, fontsize="small")
    return fig


def draw_shares(table):
    title = "How much of FPO is timestep reweighting?"
    fig, (left, *right) = figure(title, 10, 3, ncols=4, width_ratios=(1.2, 1, 1, 1))
    labels = {"t_of_loss": "velocity loss", "t_of_c": "FPO's weights on it", "t_of_align": "alignment loss"}
    for k, (share, label) in enumerate(labels.items()):
        values = [table.values("default", "REPA", share, step).mean() for step in STEPS]
        left.plot(STEPS, values, f"C{k}o-", ms=3, label=label)
    log_scale(left, "x", STEPS)
    left.set(ylim=(0, 100), xlabel="step", title="share of the variance that t explains, %")
    left.legend()
    forest(right, table, ["FPO velocity, β = 2", "FPO velocity, β = N/2",
                          "FPO velocity, β = N/2, minus mean at t", "hard samples, β = N/2", "P2"])
    return fig


def draw_batches(table):
    fig, (left, *right) = figure("FPO at β = 2 and the size of the batch", 10.5, 2.8, ncols=4)
    sizes = list(SIZES)
    moved = [table.values(*runs[:2], "moved").mean() for runs in SIZES.values()]
    left.plot(sizes, [200 / (N + 2) for N in sizes], "k:", label="β / (N + β)")
    left.plot(sizes, moved, "C0o-", ms=3, label="measured")
    log_scale(left, "y", (0.2, 0.5, 1, 2, 5, 10))
    left.set_title("gradient weight moved by FPO, %")
    left.legend()
    for ax, (measure, title) in zip(right, GAPS.items()):
        mean, half = zip(*(table.gap(*runs, measure) for runs in SIZES.values()))
        ax.errorbar(sizes, mean, half, fmt="C0o", ms=3, lw=1)
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(f"FPO - REPA: {title}")
    for ax in (left, *right):
        log_scale(ax, "x", sizes)
        ax.set_xlabel("batch N")
    return fig


def draw_groups(table):
    """FPO where few compete: whole batch, groups of 32, 16, 8; for either loss, and both."""
    title = "FPO at β = 2 where few samples compete: minus REPA, 95 % intervals"
    fig, (left, *right) = figure(title, 11, 2.8, ncols=5)
    moved = [table.values("questions", f"FPO velocity, groups of {size}", "moved").mean()
             for size in SIZES_OF_GROUPS]
    left.plot(SIZES_OF_GROUPS, [200 / (n + 2) for n in SIZES_OF_GROUPS], "k:", label="β / (n + β)")
    left.plot(SIZES_OF_GROUPS, moved, "C1o-", ms=3, label="measured")
    left.set_title("weight moved in the velocity loss, %")
    left.legend()
    log_scale(left, "y", (1, 2, 5, 10, 20))
    for k, part in enumerate(PARTS):
        names = [f"FPO {part}, groups of {size}" for size in SIZES_OF_GROUPS]
        beside = np.array(SIZES_OF_GROUPS) * 1.12 ** (k - 1)
        for ax, (measure, title) in zip(right, GAPS_AND_COSINE.items()):
            mean, half = zip(*(table.gap("questions", name, "REPA", measure) for name in names))
            ax.errorbar(beside, mean, half, fmt=f"C{k}o", ms=3, lw=1, label=part)
            ax.set_title(title)
    for ax in (left, *right):
        log_scale(ax, "x", SIZES_OF_GROUPS)
        ax.set_xlabel("samples in a group")
    for ax in right:
        ax.axhline(0, color="k", lw=0.8)
    right[0].legend()
    return fig


def draw_ends(table):
    """Logit-normal t: what it does to the loss at each t, each of its ends alone, and fewer dimensions."""
    title = "Logit-normal t minus uniform t, 95 % intervals"
    fig, (left, second, *middle, right) = figure(title, 13.5, 3.2, ncols=6,
                                                 width_ratios=(1.2, 1.2, 0.6, 0.6, 0.6, 1.3))
    t = (np.arange(10) + 0.5) / 10
    for k, step in enumerate(STEPS):
        gaps = [table.gap("switches", "REPA + logit-normal", "REPA", tenth, step) for tenth in TENTHS]
        mean, half = zip(*gaps)
        left.errorbar(t, mean, half, fmt=f"C{k}o-", ms=3, lw=1, label=f"{step} steps")
    left.set_title("SiT, digits: velocity loss, %")
    ratios, (_, *densities), last = between_ratios(), between.DENSITIES, between.STOPS[-1]
    for k, data in enumerate(("8 Gaussians", "checkerboard", "digits, k = 32", "digits, k = 128")):
        normal = between_values(data, "logit-normal", last, TENTHS)
        uniform = between_values(data, "uniform", last, TENTHS)
        mean, low, high = toy2d.interval(100 * (normal / uniform - 1)).numpy()
        second.errorbar(t, mean, (mean - low, high - mean), fmt=f"C{k}o-", ms=3, lw=1, label=data)
    second.set_title(f"MLP, {last} steps: velocity loss, %")
    forest(middle, table, list(QUESTIONS)[1:4], "questions")
    for k, density in enumerate(densities):
        mean, low, high = torch.stack([of_data[density, last] for of_data in ratios.values()], 1).numpy()
        beside = np.arange(len(ratios)) + 0.15 * (k - 1)
        right.errorbar(beside, mean, (mean - low, high - mean), fmt=f"C{k}o", ms=3, lw=1, label=density)
    right.set(xticks=range(len(ratios)), ylim=(0.6, 2.1), title="MLP: distance of the samples, ratio")
    right.set_xticklabels(ratios, rotation=30, ha="right")
    right.axhline(1, color="k", lw=0.8)
    for ax in (left, second):
        ax.axhline(0, color="k", lw=0.8)
        ax.set_xlabel("t")
    for ax in (left, second, right):
        ax.legend()
    return fig


def draw_clock(table):
    """Quality against the time that training took on one core, by the speeds of measure_speed."""
    names, speeds = finished(table, "switches"), images_per_second()
    fig, axes = figure("Quality against time, not steps: means over the seeds", 10, 3.6, ncols=3)
    for k, name in enumerate(names):
        minutes = 64 * np.array(STEPS) / np.median(speeds[name]) / 60
        line = "o-" if k < 10 else "s--"
        for ax, measure in zip(axes, GAPS):
            values = [table.values("switches", name, measure, step).mean() for step in STEPS]
            ax.plot(minutes, values, line, color=f"C{k % 10}", ms=3, lw=1, label=name)
            ax.set(title=MEASURES[measure][0], xlabel="minutes of training on one core")
    log_scale(axes[1], "y", (1, 2, 5, 10))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=5)
    return fig


def draw_densities(table):
    title = "Three estimators of one curve: what they recommend, and what it does (against uniform t)"
    fig, (left, *right) = figure(title, 10, 2.8, ncols=4, width_ratios=(1.4, 1, 1, 1))
    for k, name in enumerate(VR):
        rows = [row for row in read(DENSITIES) if row["name"] == name]
        t, pdf = (np.array([float(row[column]) for row in rows]) for column in ("t", "pdf"))
        left.plot(t, pdf, f"C{k}", lw=1, label=name)
    t = (np.arange(1000) + 0.5) / 1000
    logit = np.log(t / (1 - t))
    pdf = np.exp(-logit ** 2 / 2) / ((2 * np.pi) ** 0.5 * t * (1 - t))
    left.plot(t, pdf, "k:", lw=1, label="logit-normal, m = 0")
    left.set(xlabel="t", yscale="log", ylim=(0.05, None), title="density of t (VR: a tenth uniform)")
    left.legend()
    forest(right, table, [*VR, "logit-normal, m = 0", "logit-normal, m = 0.25"])
    return fig


def draw(folder):
    """Print every table, and write every figure into a folder."""
    table = Table()
    print_answer(table)
    print_group(table, "switches", "the switches, batch 64, 1,400 steps")
    print_questions(table)
    print_between()
    print_group(table, "default", "batch 128, 1,400 steps")
    print_group(table, "grid", "the grid, --model micro, 600 steps", ["REPA"], " from REPA")
    print_batches(table)
    print_shares(table)
    print_theorem_6(table)
    print_pairs(table)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"": draw_steps, "_fpo": draw_shares, "_batch": draw_batches, "_vr": draw_densities,
               "_groups": draw_groups, "_ends": draw_ends, "_clock": draw_clock}
    for name, draw_figure in figures.items():
        draw_figure(table).savefig(folder / f"ablation{name}.png", dpi=100)


def main():
    if sys.argv[1:2] == ["--train"]:
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only tables and figures")
    parser.add_argument("--speed", action="store_true", help="only the speed of every switch")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: 2)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the figures (default: study)")
    args = parser.parse_args()
    if args.speed:
        train_sit.write_pictures = train_sit.save_checkpoint = lambda *_, **more: None
        return measure_speed()
    if not args.draw:
        study(args.jobs)
    draw(args.out)


if __name__ == "__main__":
    main()
