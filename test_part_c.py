"""Tests of study/: its measures, its tables, and its README."""
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fpo
import train_sit

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "study"))
import ablation  # noqa: E402
import measures  # noqa: E402


def seeded(n):
    return torch.Generator().manual_seed(n)


# ----------------------------------------------------------------------------------------------------------
# The study's measures


def test_cknna_is_1_for_a_rotation_and_low_for_strangers_and_counts_mutual_neighbours_alone():
    a = torch.randn(300, 8, generator=seeded(70), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=seeded(71), dtype=torch.float64)).Q
    stranger = torch.randn(300, 8, generator=seeded(72), dtype=torch.float64)
    assert abs(measures.cknna(a, a @ turn) - 1) < 1e-9
    assert abs(measures.cknna(a, stranger)) < 0.1
    a, b = a[:30], 0.7 * a[:30] + 0.3 * stranger[:30]
    K, L = a @ a.T, b @ b.T
    nearest = lambda G, i: sorted((j for j in range(30) if j != i), key=lambda j: -G[i, j])[:10]
    total, norms = 0.0, [0.0, 0.0]                           # [REPA Eq. 23], by loops
    for i in range(30):
        for j in nearest(K, i):
            k = K[i, j] - K[i].mean()
            norms[0] += k * k
            if j in nearest(L, i):
                total += k * (L[i, j] - L[i].mean())
        norms[1] += sum((L[i, j] - L[i].mean()) ** 2 for j in nearest(L, i))
    assert abs(measures.cknna(a, b) - total / (norms[0] * norms[1]) ** 0.5) < 1e-9


def test_the_linear_probe_reads_what_is_linear_and_nothing_else():
    labels = torch.arange(2000) % 5
    z = torch.randn(2000, 12, generator=seeded(73)) + 7
    assert abs(measures.linear_probe(z, labels, 5) - 0.2) < 0.06
    z[:, :5] += 8 * F.one_hot(labels, 5)
    assert measures.linear_probe(1e-3 * z, labels, 5) > 0.99


def test_the_variance_that_t_explains_is_all_for_a_function_of_t_and_none_for_noise():
    t = (torch.randperm(4000, generator=seeded(96)) + 0.5) / 4000
    noise = torch.randn(4000, generator=seeded(97))
    assert measures.explained(t, (t * 20).floor().square()) > 0.999
    assert abs(measures.explained(t, noise)) < 0.02
    assert abs(measures.explained(t, 12 ** 0.5 * t + noise) - 0.5) < 0.03


@pytest.fixture
def digits(tmp_path):
    """A data set of 64 random images of 8 x 8 in ten classes, with tokens for patches of 4 x 4."""
    random = np.random.RandomState(0)
    np.save(tmp_path / "latents.npy", random.randint(0, 256, (64, 1, 8, 8)).astype(np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(64) % 10)
    np.save(tmp_path / "features.npy", random.randint(-127, 128, (64, 4, 8)).astype(np.int8))
    (tmp_path / "meta.json").write_text('{"num_classes": 10, "scale": 0.0136, "bias": 127.5}')
    return tmp_path


def small(feature_dim):
    """A network whose last layers are not zero, so that its output depends on what it sees."""
    torch.manual_seed(0)
    model = train_sit.SiT(8, 1, 10, depth=3, width=32, heads=2, patch=4, encoder_depth=2,
                          feature_dim=feature_dim, projector_width=16).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_losses_of_the_data_are_those_of_a_direct_loop_at_even_t_with_labels(digits):
    model, data, seen = small(8), train_sit.Latents(digits, features=True), []
    model.register_forward_pre_hook(lambda model, args: seen.append(args[:3]))
    t, losses, align = measures.data_losses(model, data, 64)
    torch.testing.assert_close(t.sort().values, (torch.arange(64) + 0.5) / 64)
    rows = np.random.RandomState(1).permutation(64)
    (x_t, seen_t, y), = seen
    assert torch.equal(seen_t, t)
    assert y.tolist() == data.labels[rows].tolist()
    x = (torch.from_numpy(data.latents[rows]).float() - 127.5) * 0.0136
    eps = (x_t - (1 - t.view(-1, 1, 1, 1)) * x) / t.view(-1, 1, 1, 1)
    assert abs(eps.mean()) < 0.06 and abs(eps.std() - 1) < 0.05
    out, z = model(x_t, t, y, features=True)
    torch.testing.assert_close(losses, (out - (eps - x)).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    features = torch.from_numpy(data.features[rows]).float()
    torch.testing.assert_close(align, -F.cosine_similarity(z, features, dim=-1).mean(1))
    assert measures.data_losses(small(None), data, 64)[2].isnan().all()


def test_hidden_tokens_are_measured_without_the_label_and_with_the_same_noise_every_time(digits):
    model, data, seen = small(8), train_sit.Latents(digits, features=True), []
    model.register_forward_pre_hook(lambda model, args: seen.append(args[:3]))
    cosine, likeness, accuracy = measures.hidden_measures(model, data, t=0.3, n=64)
    (x, t, y), = seen
    assert len(x) == 64 and (t == 0.3).all() and (y == 10).all()
    _, z = model(x, t, y, features=True)
    rows = np.random.RandomState(1).permutation(64)
    features = torch.from_numpy(data.features[rows]).float()
    assert abs(cosine - F.cosine_similarity(z, features, dim=-1).mean()) < 1e-5

    c = model.t_embedder["mlp"](train_sit.time_features(t)) + model.y_embedder["embedding_table"](y)
    h = model.x_embedder["proj"](x).flatten(2).transpose(1, 2) + model.pos_embed
    for block in model.blocks[:2]:                           # encoder_depth = 2
        h = block(h, c)
    units = F.normalize(features, dim=-1).mean(1)
    assert abs(likeness - measures.cknna(h.mean(1), units)) < 1e-5
    labels = torch.from_numpy(data.labels[rows])
    assert accuracy == measures.linear_probe(h.mean(1), labels, 10)
    again, _, _, _ = measures.noised(data, t)
    assert torch.equal(again, x)
    cosine, likeness, _ = measures.hidden_measures(small(None), data, t=0.3, n=64)
    assert math.isnan(cosine) and math.isfinite(likeness)


# ----------------------------------------------------------------------------------------------------------
# The study's runs, tables and README


def test_every_run_of_the_study_has_flags_that_train_sit_accepts(monkeypatch):
    monkeypatch.setitem(train_sit.POLICIES, "fpo_centred", None)
    accepted = (train_sit.Config, train_sit.CHOICES, train_sit.LOWEST, train_sit.HIGHEST)
    for group, (common, steps, runs) in ablation.GROUPS.items():
        argvs = [f"{common} {flags}".split() for flags in runs.values()]
        configs = [train_sit.parse_flags(*accepted, argv, "") for argv in argvs]
        assert len({str(cfg) for cfg in configs}) == len(configs)        # no two runs are the same
        for cfg in configs:
            assert cfg.steps == steps[-1] and all(step % cfg.save_every == 0 for step in steps)


def test_the_study_s_training_knows_centred_fpo_and_keeps_every_checkpoint(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sit, "save_checkpoint", train_sit.save_checkpoint)     # put back at the end
    monkeypatch.setitem(train_sit.POLICIES, "fpo_centred", None)
    out = tmp_path / "run"
    flags = "--model micro --batch 8 --steps 4 --save_every 1 --policy fpo_centred --beta 4 --no-bf16"
    ablation.train([*flags.split(), "--data", str(digits), "--out", str(out)])
    assert [path.name for path in train_sit.checkpoints(out)] == [f"step-{k:07d}.pt" for k in (1, 2, 3, 4)]
    L = torch.rand(8, generator=seeded(98))
    t = torch.rand(8, generator=seeded(99))
    cfg = train_sit.Config(beta=4.0, tau=0.5)
    kernel = torch.exp(-((t[:, None] - t) / 0.05) ** 2 / 2)
    left = L - (kernel * L).sum(1) / kernel.sum(1)
    expected = fpo.fpo_gradient_weights(left, 0.8, 4.0, 0.5)
    torch.testing.assert_close(train_sit.POLICIES["fpo_centred"](L, t, cfg), expected)


@pytest.mark.parametrize("n", ablation.QUANTILE)
def test_intervals_hold_95_percent_of_student_s_distribution(n):
    nu, half = n - 1, ablation.QUANTILE[n]
    x = torch.linspace(-half, half, 20001, dtype=torch.float64)
    factor = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    density = factor * (1 + x ** 2 / nu) ** (-(nu + 1) / 2)
    assert abs(torch.trapezoid(density, x) - 0.95) < 1e-4


def test_paired_differences_pair_the_seeds_in_whatever_order_the_runs_ended_and_leave_out_the_rest(
        tmp_path, monkeypatch):
    rows = [("REPA", 1, 2.0, 0.5), ("VRPO", 0, 1.1, 0.7), ("VRPO", 3, 9.0, 0.1), ("REPA", 0, 1.0, 0.6),
            ("REPA", 2, 7.0, 0), ("VRPO", 1, 2.2, 0.9)]
    zeros = [0] * (len(ablation.NUMBERS) - 3)
    monkeypatch.setattr(ablation, "TABLE", tmp_path / "table.csv")
    head = ["group", "name", "seed", "step", *ablation.NUMBERS]
    lines = [["grid", name, seed, 600, loss, 1, judge, *zeros] for name, seed, loss, judge in rows]
    ablation.write(ablation.TABLE, [head, *lines], "w")
    mean, half = ablation.Table().gap("grid", "VRPO", "REPA", "loss")
    assert abs(mean - 10) < 1e-9 and abs(half) < 1e-9                                # in % of REPA's
    mean, half = ablation.Table().gap("grid", "VRPO", "REPA", "accuracy")
    assert abs(mean - 25) < 1e-9 and abs(half - 12.706 * 15) < 1e-2                  # 10 and 40 points


def test_every_line_that_the_study_prints_stands_in_its_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--draw", "--out", str(tmp_path)])
    ablation.main()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"ablation.png", "ablation_fpo.png", "ablation_batch.png", "ablation_vr.png"}
    readme = " ".join((HERE / "study/README.md").read_text().split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 50
    for line in lines:
        assert " ".join(line.split()) in readme, f"study/README.md lacks: {line}"


def test_every_figure_and_file_that_the_study_s_readme_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", (HERE / "study/README.md").read_text())
    assert len(links) > 8
    for link in links:
        assert (HERE / "study" / link).exists(), link
