import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import fpo
import sample
import train_sit
from data import font_digits, imagenet

HERE = Path(__file__).resolve().parent
paths = pytest.mark.parametrize("path", fpo.PATHS.values(), ids=fpo.PATHS)
ENDS = torch.tensor([0.0, 1e-4, 0.03, 0.3, 0.77, 0.999, 1.0], dtype=torch.float64)


def seeded(n):
    return torch.Generator().manual_seed(n)


# ----------------------------------------------------------------------------------------------------------
# The network

PUBLISHED = """pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight
blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias blocks.0.attn.proj.weight blocks.0.attn.proj.bias
blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
blocks.0.adaLN_modulation.1.weight blocks.0.adaLN_modulation.1.bias
final_layer.linear.weight final_layer.linear.bias
final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias""".split()
MICRO = dict(train_sit.MODELS["micro"], size=8, channels=1, num_classes=10)


def awake(model):
    """Random values where adaLN-Zero starts at 0, so that every weight matters."""
    for k, p in enumerate(model.parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=seeded(k))
    return model.eval()


def official(**more):
    """A network as SiT publishes it: twice as many outputs."""
    model = train_sit.SiT(**MICRO, **more)
    model.final_layer = train_sit.FinalLayer(64, 2 * 4 * 4)
    return awake(model)


def inputs():
    x, t = torch.randn(3, 1, 8, 8, generator=seeded(30)), torch.rand(3, generator=seeded(31))
    return x, t, torch.tensor([0, 4, 10])


@pytest.mark.parametrize("name, millions", [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_published_models_have_their_published_sizes(name, millions):
    with torch.device("meta"):
        model = train_sit.SiT(**train_sit.MODELS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_state_dict_has_the_published_names():
    state = train_sit.SiT(**{**MICRO, "depth": 1}, feature_dim=7).state_dict()
    projector = [f"projectors.0.{k}.{kind}" for k in (0, 2, 4) for kind in ("weight", "bias")]
    assert sorted(state) == sorted(PUBLISHED + projector)


def test_adaln_zero_starts_as_the_identity_and_the_output_as_zero():
    model, tokens = train_sit.SiT(**MICRO), torch.randn(3, 4, 64)
    assert torch.equal(model.blocks[1](tokens, torch.randn(3, 64)), tokens)
    assert (model(*inputs()) == 0).all()


def test_position_code_follows_the_official_element_order():
    omega = [1 / 10000 ** (k / 4) for k in range(4)]
    expected = [[f(p * o) for p in (column, row) for f in (math.sin, math.cos) for o in omega]
                for row in range(3) for column in range(3)]
    torch.testing.assert_close(train_sit.position_embedding(16, 3), torch.tensor(expected))


def published_output(model, x, t, y):
    """Oracle: the tokens that leave our last layer, put together by SiT's own unpatchify; the first C channels."""
    kept = []
    model.final_layer.register_forward_hook(lambda m, i, o: kept.append(o))
    with pytest.raises(RuntimeError):                                # ours cannot reshape 2C channels
        model(x, t, y)
    image = torch.einsum("nhwpqc->nchpwq", kept[0].reshape(3, 2, 2, 4, 4, 2))
    return image.reshape(3, 2, 8, 8)[:, :1]


def test_official_sit_weights_run_backwards_in_time_and_give_minus_v(tmp_path):
    model, (x, t, y) = official(), inputs()
    torch.save(model.state_dict(), tmp_path / "sit.pt")
    ours, config = train_sit.load_model(tmp_path / "sit.pt")
    assert (config["path"], config["predict"]) == ("linear", "v")
    torch.testing.assert_close(ours(x, t, y), -published_output(model, x, 1 - t, y), rtol=1e-4, atol=1e-5)


def test_repa_checkpoints_load_with_ema_and_projector(tmp_path):
    arch = dict(MICRO, feature_dim=12, projector_width=32)
    model, other = awake(train_sit.SiT(**arch)), train_sit.SiT(**arch)
    torch.save({"model": other.state_dict(), "ema": model.state_dict(), "opt": {}, "steps": 7,
                "args": argparse.Namespace(resolution=256)}, tmp_path / "repa.pt")
    loaded, config = train_sit.load_model(tmp_path / "repa.pt")
    for a, b in zip(loaded(*inputs(), features=True), model(*inputs(), features=True)):
        assert torch.equal(a, b)
    assert config["step"] == 7
    assert (train_sit.load_model(tmp_path / "repa.pt", ema=False)[0](*inputs()) == 0).all()


class Evil:
    """Unpickling it would make a folder."""
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("content", [b"none", {"a": torch.ones(2)}, {"model": 3}, Evil, "missing", "other shape"])
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "other shape":
        torch.save({**train_sit.SiT(**MICRO).state_dict(), "pos_embed": torch.ones(1, 10, 64)}, path)
    elif content != "missing":
        torch.save(Evil(tmp_path / "evil") if content is Evil else content, path)
    with pytest.raises(train_sit.Refused) as error:
        train_sit.load_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and not (tmp_path / "evil").exists()


# ----------------------------------------------------------------------------------------------------------
# Losses measured in v, x or eps


@paths
def test_an_error_in_one_of_v_x_eps_is_that_in_another_times_a_factor_of_t_and_so_is_its_gradient(path):
    t = torch.linspace(0.1, 0.7, 50, dtype=torch.float64)            # alpha and sigma of every path above 0.05
    x, eps, guess = torch.randn(3, 50, 4, generator=seeded(80), dtype=torch.float64)
    x_t, v = fpo.interpolate(x, eps, t, path)
    true = dict(v=v, x=x, eps=eps)
    to_v = dict(v=lambda v, *_: v, x=fpo.velocity_from_x, eps=fpo.velocity_from_eps)
    from_v = dict(v=lambda v, *_: v, x=fpo.x_from_velocity, eps=fpo.eps_from_velocity)
    for predicted, measured in itertools.product(true, true):
        out = guess.clone().requires_grad_()
        converted = from_v[measured](to_v[predicted](out, x_t, t, path), x_t, t, path)
        scale, back = fpo.loss_scale(t, predicted, measured, path), fpo.loss_scale(t, measured, predicted, path)
        losses = fpo.velocity_loss(out, true[predicted]) * scale, fpo.velocity_loss(converted, true[measured])
        gradients = [torch.autograd.grad(loss.sum(), out)[0] for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(scale * back, torch.ones_like(t))


@paths
def test_the_factors_are_finite_at_both_ends_and_1_from_v_to_v(path):
    for pair in itertools.product(("v", "x", "eps"), repeat=2):
        assert fpo.loss_scale(ENDS, *pair, path).isfinite().all()
    assert (fpo.loss_scale(ENDS, "v", "v", path) == 1).all()
    expected = 1 / torch.maximum(ENDS, torch.tensor(0.05)) ** 2
    torch.testing.assert_close(fpo.loss_scale(ENDS, "x", "v"), expected)      # on the linear path


# ----------------------------------------------------------------------------------------------------------
# Data, training, sampling: on a small folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For networks as small as these, many threads are slower, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train_sit, "write_pictures", lambda *_: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """64 latents 1 x 8 x 8 with int8 feature tokens for 4 patches."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    np.save(folder / "latents.npy", random.randint(0, 256, (64, 1, 8, 8)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(64) % 10)
    np.save(folder / "features.npy", random.randint(-127, 128, (64, 4, 8)).astype(np.int8))
    (folder / "meta.json").write_text(json.dumps(dict(scale=1 / 74, bias=127.5, num_classes=10)))
    return folder


def flags(settings):
    return [f"--{'' if v else 'no-'}{k}" if isinstance(v, bool) else f"--{k}={v}" for k, v in settings.items()]


def training(folder, out, **changes):
    """The flags of a short run."""
    short = dict(data=folder, out=out, model="micro", steps=6, batch=8, log_every=1, warmup=3, bf16=False)
    return flags(short | changes)


def sampling(run_folder, out, **changes):
    return flags(dict(checkpoint=run_folder, out=out, count=10, batch=2, steps=2) | changes)


def run(argv, program=train_sit):
    """main(argv) in this process: None, or its exit code or one line."""
    try:
        return program.main(argv)
    except SystemExit as stop:
        return stop.code


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained")
    assert run(training(folder, out, sample_every=100)) is None
    return out


def log_of(out):
    """The rows of the log, without the speed."""
    return np.loadtxt(Path(out, "log.csv"), delimiter=",", skiprows=1, ndmin=2)[:, :-1]


def step_of(out):
    return int(train_sit.newest_checkpoint(out).stem[5:])


def saved(out):
    return torch.load(train_sit.newest_checkpoint(out), weights_only=True)


def flat(state):
    """Every tensor and number in a nested dict, in order."""
    if isinstance(state, dict):
        state = list(state.values())
    return [leaf for item in state for leaf in flat(item)] if isinstance(state, (list, tuple)) else [state]


def test_every_epoch_shows_every_image_once():
    cfg = train_sit.Config(batch=12)
    rows = np.concatenate([train_sit.rows_of(step, cfg, 40) for step in range(10)])
    assert all(sorted(rows[k:k + 40]) == list(range(40)) for k in (0, 40, 80)) and (rows[:40] != rows[40:80]).any()


def test_moments_are_sampled_and_scaled(tmp_path):
    mean, std, noise = torch.randn(3, 4, 2, 8, 8, generator=seeded(32))
    np.save(tmp_path / "latents.npy", torch.cat([mean, std], 1).numpy())
    np.save(tmp_path / "labels.npy", np.arange(4))
    (tmp_path / "meta.json").write_text(json.dumps(dict(scale=0.5, bias=0.25, num_classes=10, moments=True)))
    data = train_sit.Latents(tmp_path)
    latents, labels, _ = data.batch(np.array([3, 0, 3, 1]))
    assert (data.channels, data.size) == (2, 8) and labels.tolist() == [3, 0, 3, 1]
    torch.testing.assert_close(data.seen(latents, noise), (mean[labels] + std[labels] * noise - 0.25) * 0.5)


@pytest.mark.parametrize("says, name, content", [
    ("labels.npy", "labels", None), ("--align none needs no features", "features", None), ("meta.json", "meta", None),
    ("labels 0 to 10", "labels", np.arange(64) % 11), ("labels -1 to 9", "labels", np.arange(64) % 11 - 1),
    ("Python objects", "labels", np.array([None] * 64)), ("9 tokens", "features", np.ones((64, 9, 8), np.int8)),
    ("is the scale", "meta", dict(scale=1.0, bias=127.5, num_classes=10))])
def test_bad_data_are_refused_in_one_line(folder, tmp_path, says, name, content):
    data = shutil.copytree(folder, tmp_path / "data")
    if content is None:
        min(data.glob(name + ".*")).unlink()
    elif name == "meta":
        (data / "meta.json").write_text(json.dumps(content))
    else:
        np.save(data / f"{name}.npy", content)
    line = run(training(data, tmp_path / "out"))
    assert isinstance(line, str) and says in line and "\n" not in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("says, flag", [
    ("SiT-XL/2", "--model=huge"), ("vr_gaussian", "--timesteps=soon"), ("min_snr", "--policy=x"), ("1 to", "--steps=0"),
    ("0 to", "--lr=-1"), ("0 to", "--lr=nan"), ("--lr", "--lr=fast"), ("to 1 is", "--r=0"), ("1e-", "--tau=0"),
    ("0 to 1 is", "--ema=2"), ("--oops", "--oops"),
    ("into 1 patches", "--model=SiT-S/8"), ("/nowhere.pt", "--init=/nowhere.pt")])
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, says, flag):
    line = run(training(folder, tmp_path) + [flag])
    assert isinstance(line, str) and says in line and "\n" not in line and not list(tmp_path.iterdir())


def test_a_batch_that_does_not_divide_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sit, "world", lambda: 2)
    assert "a multiple of" in run(training(folder, tmp_path, batch=7))


@pytest.mark.parametrize("changes", [
    {}, dict(timesteps="vr_loss", align="nt_xent"), dict(align="vrpo"),
    dict(predict="x", path="cosine", policy="uniform", align="none", timesteps="uniform")], ids=str)
def test_resume_is_exact(folder, tmp_path, changes):
    assert run(training(folder, tmp_path / "whole", **changes)) is None
    for steps in (3, 6):
        assert run(training(folder, tmp_path / "parts", steps=steps, **changes)) is None
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    whole.pop("config"), parts.pop("config")
    leaves = list(zip(flat(whole), flat(parts), strict=True))
    assert len(leaves) > 200 and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in leaves)
    assert len(log_of(tmp_path / "parts")) == 6
    np.testing.assert_array_equal(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"))


def test_other_flags_refuse_to_resume_by_name_and_those_that_change_nothing_do_not(folder, trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    assert "--beta 2.0, not 3.0" in run(training(folder, out, beta=3))
    assert "--model micro, not tiny" in run(training(folder, out, model="tiny"))
    assert run(training(folder, out, steps=7, save_every=1, log_every=5, checkpointing=True)) is None


def test_a_row_of_the_log_is_the_mean_over_the_steps_since_the_last(folder, trained, tmp_path):
    assert run(training(folder, tmp_path, log_every=4)) is None
    each = log_of(trained)[:, 1:4]                                   # every step; here steps 1 to 4, 5 and 6
    np.testing.assert_allclose(log_of(tmp_path)[:, 1:4], [each[:4].mean(0), each[4:].mean(0)], rtol=1e-4)


def pick(choices, k):
    return list(choices)[k % len(choices)]


@pytest.mark.parametrize("k, kind", [*enumerate(itertools.product(train_sit.TIMESTEPS, fpo.PATHS))], ids=str)
def test_every_timestep_path_policy_and_target_trains_and_samples(folder, tmp_path, k, kind, monkeypatch):
    """Also where u is 0 or almost 1. A new network's output is 0, so its first loss is known."""
    (timesteps, path), seen, draws, interpolate = kind, [], train_sit.draws, fpo.interpolate
    policy, align = pick(train_sit.POLICIES, k), pick(train_sit.ALIGN, k // 2)
    predict, loss = pick(train_sit.TO_VELOCITY, k + k // 3), pick(train_sit.TO_VELOCITY, k // 2)

    def extreme(*arguments):
        eps, u, *rest = draws(*arguments)
        u[:2] = torch.tensor([0, 1 - 2 ** -24])
        return eps, u, *rest

    monkeypatch.setattr(train_sit, "draws", extreme)
    monkeypatch.setattr(fpo, "interpolate", lambda *a: seen.append(a) or interpolate(*a))
    changes = dict(path=path, policy=policy, predict=predict, loss=loss, align=align, bf16=k % 2 > 0)
    changes |= dict(timesteps=timesteps, align_policy=pick(train_sit.ALIGN_POLICIES, k))
    assert run(training(folder, tmp_path, steps=2, **changes)) is None
    assert all((t >= fpo.FIRST_T[path]).all() and (t <= 1).all() for _, _, t, _ in seen)
    x, eps, t, _ = seen[0]
    true = dict(v=interpolate(*seen[0])[1], x=x, eps=eps)[predict]
    expected = true.square().mean((1, 2, 3)) * fpo.loss_scale(t, predict, loss, fpo.PATHS[path])
    rows = log_of(tmp_path)
    assert rows[0, 1] == pytest.approx(expected.mean().item(), rel=1e-4) and np.isfinite(rows).all()
    assert ((rows[:, 4] > 0) == (policy != "uniform")).all()
    assert run(sampling(tmp_path, tmp_path / "s", count=4), sample) is None
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].std() > 0


def test_the_density_of_vr_loss_follows_the_losses(folder):
    cfg = train_sit.Config(timesteps="vr_loss")
    density = train_sit.start_density(cfg, train_sit.Latents(folder), torch.device("cpu"))
    assert (density["pdf"] == 1).all()
    for seed in range(20):
        t = torch.rand(500, generator=seeded(seed))
        train_sit.follow_losses(density, t, 3 * t)
    torch.testing.assert_close(density["pdf"], 0.9 * 2 * density["t"] + 0.1, rtol=0.05, atol=0.02)


def test_a_new_policy_alignment_loss_or_kind_of_t_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(train_sit.POLICIES, "nothing", lambda L, t, cfg: torch.zeros_like(L))
    monkeypatch.setitem(train_sit.ALIGN, "of_t", lambda z, features, t, **more: 10 * t + 0 * z.mean((1, 2)))
    monkeypatch.setitem(train_sit.TIMESTEPS, "quarter", lambda u, density, cfg: 0.25 + 0 * u)
    mine = dict(policy="nothing", align="of_t", timesteps="quarter")
    assert run(training(folder, tmp_path, **mine)) is None
    loss, align, norm = log_of(tmp_path)[:, 1:4].T
    assert (loss > 0).all() and (align == 2.5).all() and (norm == 0).all()   # no weight, no gradient


def test_the_weight_average_keeps_no_graph_and_follows_the_weights():
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    expected = 0.75 * ema.weight + 0.25 * model.weight.detach()
    train_sit.update_average(ema, model, 0.75)
    torch.testing.assert_close(ema.weight, expected)
    assert ema.weight.grad_fn is None and not ema.weight.requires_grad


@pytest.mark.parametrize("align", ["cosine", "vrpo"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, tmp_path, align):
    assert run(training(folder, tmp_path, align=align)) is None
    good = train_sit.newest_checkpoint(tmp_path)
    state = saved(tmp_path)
    state["model"]["projectors.0.4.bias"].fill_(math.nan)
    torch.save(state, good)
    line = run(training(folder, tmp_path, align=align, steps=30))
    assert "not finite at step 7" in line and str(good) in line and "\n" not in line
    assert train_sit.newest_checkpoint(tmp_path) == good and len(log_of(tmp_path)) == 6


def test_clip_0_clips_nothing(folder, tmp_path):
    for clip in (0, 1e9):
        assert run(training(folder, tmp_path / str(clip), clip=clip)) is None
    np.testing.assert_array_equal(log_of(tmp_path / "0"), log_of(tmp_path / str(1e9)))


@pytest.mark.parametrize("kind, new", [
    ("REPA", "none"), ("SiT", "projectors.0.4.weight"), ("other classes", "y_embedder.embedding_table.weight")])
def test_a_new_run_starts_from_published_weights(folder, tmp_path, kind, new, capsys):
    arch = dict(MICRO, num_classes=5 if kind == "other classes" else 10, feature_dim=8)
    state = official().state_dict() if kind == "SiT" else {"ema": awake(train_sit.SiT(**arch)).state_dict()}
    torch.save(state, tmp_path / "init.pt")
    changes = dict(init=tmp_path / "init.pt", lr=0)
    assert run(training(folder, tmp_path / "out", steps=1, **changes)) is None
    said = re.findall("weights from .*", capsys.readouterr().out)
    theirs, ours = train_sit.load_model(tmp_path / "init.pt")[0].state_dict(), saved(tmp_path / "out")["model"]
    differ = {name for name in theirs if not torch.equal(theirs[name], ours[name])}
    assert differ == ({new} if kind == "other classes" else set()) and len(said) == 1 and said[0].endswith(new)
    assert run(training(folder, tmp_path / "out", steps=2, **changes)) is None       # goes on, does not start anew
    other = tmp_path / "other"
    assert "trained with --path linear" in run(training(folder, other, path="cosine", **changes))
    assert "another architecture" in run(training(folder, other, align="none", **changes) + ["--model=tiny"])


def test_checkpointing_makes_the_same_run_and_runs_every_block_once_more(folder, tmp_path, trained, monkeypatch):
    modulate, calls = train_sit.modulate, []
    monkeypatch.setattr(train_sit, "modulate", lambda *a: calls.append(1) or modulate(*a))
    assert run(training(folder, tmp_path, checkpointing=True)) is None
    np.testing.assert_allclose(log_of(tmp_path), log_of(trained), rtol=1e-3)
    assert len(calls) == 6 * (4 * 2 * 2 + 1)                         # four blocks, twice; the last layer


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_make_the_same_run_and_are_compiled_once_for_all(folder, tmp_path, trained):
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert run(training(folder, tmp_path, compile=True, steps=3)) is None
    np.testing.assert_allclose(log_of(tmp_path), log_of(trained)[:3], rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert saved(tmp_path)["model"].keys() == saved(trained)["model"].keys()


@pytest.mark.parametrize("changes", [
    {}, dict(align="nt_xent", timesteps="vr_loss"), dict(policy="min_snr"), dict(align="vrpo")], ids=str)
def test_no_step_asks_a_tensor_for_its_value(folder, tmp_path, changes):
    """On a GPU each such question waits for it. Only rows of the log ask: 4 and 8 steps ask equally often."""
    from torch.utils._python_dispatch import TorchDispatchMode
    asking = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += function.overloadpacket in asking
            return function(*args, **(kwargs or {}))

    for steps in (4, 8):
        counts.append(0)
        with Count():
            out = tmp_path / str(steps)
            assert run(training(folder, out, steps=steps, log_every=steps, **changes)) is None
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("predict", ["v", "x", "eps"])
def test_theorem_5_vrpo_gives_the_later_blocks_no_gradient_at_all_and_the_first_ones_some(predict):
    model, (x, t, y) = awake(train_sit.SiT(**MICRO, feature_dim=6)), inputs()
    eps, features = torch.randn(x.shape, generator=seeded(60)), torch.randn(3, 4, 6, generator=seeded(61))
    x_t, v = fpo.interpolate(x, eps, t)
    out, z = model(x_t, t, y, features=True)
    cfg = train_sit.Config(align="vrpo", predict=predict, bf16=False)
    train_sit.vrpo_losses(z, features, cfg, model, {}, out, x, eps, t, y).mean().backward()
    late = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.rsplit(".", 3)[0][:8] for name in late} == {"blocks.2", "blocks.3", "final_la"} and len(late) == 24
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name not in late)


# ----------------------------------------------------------------------------------------------------------
# Signals and several processes


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_saves_and_stops_and_handlers_come_back(folder, tmp_path, monkeypatch, number):
    before, batch, shots = handlers(), train_sit.Latents.batch, []

    def shot(*arguments):
        if not shots:                                                         # the first batch of the loop
            shots.append(os.kill(os.getpid(), number))
            time.sleep(0.2)
        return batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_sit.Latents, "batch", shot)
        assert run(training(folder, tmp_path)) == 128 + number and handlers() == before
    assert step_of(tmp_path) == len(log_of(tmp_path)) == 1
    assert run(training(folder, tmp_path)) is None and step_of(tmp_path) == 6 and handlers() == before
    assert "another --out" in run(training(folder, tmp_path, seed=1)) and handlers() == before
    monkeypatch.setattr(train_sit.Latents, "batch", None)                     # a fault in the program
    with pytest.raises(TypeError):
        run(training(folder, tmp_path, steps=7))
    assert handlers() == before


def test_a_second_signal_ends_at_once():
    before = handlers()
    with train_sit.Stop() as stop:
        assert before[0] != signal.getsignal(signal.SIGINT) and stop.anywhere() == 0
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert handlers() == before and stop.anywhere() == signal.SIGINT


def test_only_files_named_step_and_seven_digits_are_checkpoints(tmp_path):
    for name in ("step-0000002.pt", "step-0000010.pt", "step-0000011.tmp", "step-best.pt", "step-00000012.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in train_sit.checkpoints(tmp_path)] == ["step-0000002.pt", "step-0000010.pt"]


def forked(argv, program=train_sit):
    job = multiprocessing.get_context("fork").Process(target=run, args=(argv, program))
    job.start()
    return job


def launch(*command):
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    command = [sys.executable, *map(str, command)]         # not the shared store: it may keep dead addresses
    return subprocess.run(command, env=environment, stdout=-1, stderr=-2, text=True, cwd=HERE, timeout=120)


def test_killed_at_any_moment_the_newest_checkpoint_loads_and_the_run_goes_on(folder, tmp_path):
    for wait in (0.1, 0.23, 0.41):
        before = train_sit.newest_checkpoint(tmp_path)
        job = forked(training(folder, tmp_path, save_every=1, steps=10 ** 5))
        while train_sit.newest_checkpoint(tmp_path) == before:
            assert job.is_alive()
            time.sleep(0.01)
        time.sleep(wait)
        job.kill()
        job.join()
        step = step_of(tmp_path)
        assert train_sit.load_model(train_sit.newest_checkpoint(tmp_path))[1]["step"] == step
    assert run(training(folder, tmp_path, steps=step + 3)) is None
    assert log_of(tmp_path)[:, 0].tolist() == list(range(1, step + 4))
    assert len(train_sit.checkpoints(tmp_path)) == 2


SCRIPT = """
import functools, json, os, signal
import torch.distributed as dist
import sample, train_sit
from data import imagenet
dist.init_process_group = functools.cache(dist.init_process_group)     # a process of torchrun does so once
dist.destroy_process_group = train_sit.write_pictures = lambda *_: None
update, calls = train_sit.update_average, []
def mortal(*arguments):
    calls.append(1)
    if len(calls) == 6 + 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    update(*arguments)
train_sit.update_average = mortal
repack, draw, vrpo, default = json.loads({argvs!r})
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    imagenet.main(repack)
    sample.main(draw)
    train_sit.main(vrpo)
train_sit.main(default)
"""


@pytest.fixture(scope="session")
def two_processes(folder, trained, tmp_path_factory):
    """One torchrun of two processes: a repacked folder, samples, a run with VRPO, a default run.

    Process 1 is killed in step 5 of the default run."""
    tmp = tmp_path_factory.mktemp("two")
    repack = [f"--images={repa_folder(tmp / 'source', 40)}", f"--out={tmp}/repacked", "--batch=8", "--encoder=none"]
    argvs = [repack, sampling(trained, tmp / "samples", sampler="sde"),
             training(folder, tmp / "vrpo", align="vrpo", lr=1e-4), training(folder, tmp / "default", save_every=2)]
    (tmp / "script.py").write_text(f"import sys; sys.path[0] = {str(HERE)!r}{SCRIPT.format(argvs=json.dumps(argvs))}")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1 --monitor-interval=0.1"
    job = launch(*torchrun.split(), tmp / "script.py")
    assert job.returncode == 0 and f"made {tmp}/repacked: 40 images of 5 classes" in job.stdout, job.stdout
    assert "exitcode: -9" in job.stdout
    return tmp


def test_torchrun_goes_on_after_a_killed_worker_and_the_run_does_not_depend_on_the_number_of_processes(
        folder, trained, tmp_path, two_processes):
    assert run(training(folder, tmp_path, align="vrpo", lr=1e-4)) is None
    for ours, alone in (("default", trained), ("vrpo", tmp_path)):
        np.testing.assert_allclose(log_of(two_processes / ours), log_of(alone), rtol=2e-3)
    assert (trained / "samples-0000006.png").stat().st_size > 1000


def test_samples_depend_neither_on_the_batch_nor_on_the_processes(trained, tmp_path, two_processes):
    for batch in (2, 10):
        assert run(sampling(trained, tmp_path / str(batch), sampler="sde", batch=batch), sample) is None
    folders = tmp_path / "10", tmp_path / "2", two_processes / "samples"
    whole, *others = (np.load(out / "samples.npz") for out in folders)
    for other in others:
        assert (whole["labels"] == other["labels"]).all() and len(set(whole["labels"])) > 3
        assert np.abs(whole["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    assert whole["arr_0"].shape == (10, 8, 8, 3) and whole["arr_0"].dtype == np.uint8 and whole.files[0] == "arr_0"
    settings = json.loads(str(whole["settings"]))
    assert [settings[k] for k in "sampler steps w step nfe path".split()] == ["sde", 2, 2, 6, 2, "linear"]
    assert not (folders[0] / "parts").exists() and (folders[0] / "grid.png").exists()



# ----------------------------------------------------------------------------------------------------------
# sample.py


def test_killed_sampling_goes_on_with_the_same_settings_only(trained, tmp_path, monkeypatch):
    generate, parts, drawn = sample.generate, tmp_path / "parts/parts", []

    def watched(model, config, cfg, rows, device):
        drawn.append(rows[0])
        if len(drawn) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(model, config, cfg, rows, device)

    assert run(sampling(trained, tmp_path / "whole"), sample) is None
    monkeypatch.setattr(sample, "generate", watched)
    job = forked(sampling(trained, tmp_path / "parts"), sample)
    job.join(60)
    assert job.exitcode == -signal.SIGKILL and len(list(parts.glob("*.npz"))) == 3
    (parts / "000001.npz").rename(parts / "000001.tmp")              # as if killed while writing
    assert "begun with seed 0, not 1" in run(sampling(trained, tmp_path / "parts", seed=1), sample)
    assert run(sampling(trained, tmp_path / "parts"), sample) is None and drawn == [2, 6, 8]
    whole, parts = (np.load(tmp_path / name / "samples.npz") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in ("arr_0", "labels"))


def test_latents_are_decoded_a_few_at_a_time_and_unscaled_first(trained, tmp_path, monkeypatch):
    decoded = []
    answer = lambda z: types.SimpleNamespace(sample=z[:, :1].expand(-1, 3, -1, -1))
    vae = types.SimpleNamespace(decode=lambda z: decoded.append(z) or answer(z))
    z = torch.randn(19, 4, 8, 8, generator=seeded(82))
    repa, fast_dit = dict(scale=0.5, bias=0.25), dict(scale=1.0, bias=0.0, scaled_by=0.5)
    for x, meta in (((z - 0.25) * 0.5, repa), (z * 0.5, fast_dit)):
        pixels = sample.decoded(x, meta, vae)
        torch.testing.assert_close(torch.cat(decoded), z)
        assert [len(part) for part in decoded] == [8, 8, 3] and pixels.shape == (19, 8, 8, 3)
        assert pixels[z[:, 0] > 1].min() == 255 and pixels[z[:, 0] < -1].max() == 0
        decoded.clear()
    monkeypatch.setattr(imagenet, "load_vae", lambda name, device: vae)
    assert run(sampling(trained, tmp_path, vae="some/vae"), sample) is None
    assert len(decoded) == 5 and json.loads(str(np.load(tmp_path / "samples.npz")["settings"]))["vae"] == "some/vae"


@pytest.mark.parametrize("sampler", ["heun", "dopri5"])
def test_images_that_are_not_finite_are_never_written(trained, tmp_path, sampler):
    state = saved(trained)
    state["ema"]["final_layer.linear.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises((SystemExit, ArithmeticError), match="not finite"):
        sample.main(sampling(tmp_path / "nan.pt", tmp_path / "s", sampler=sampler))
    assert not list((tmp_path / "s").rglob("*.npz"))


def test_sampling_never_runs_the_projector(trained):
    model, config = train_sit.load_model(train_sit.newest_checkpoint(trained))
    model.projectors[0].register_forward_hook(lambda *_: pytest.fail("the projector ran"))
    cfg = sample.Config(steps=2, guidance=2.0, classes=(7, 1))
    x, labels, nfe = sample.generate(model, config, cfg, np.arange(3), torch.device("cpu"))
    assert x.shape == (3, 1, 8, 8) and labels.tolist() == [7, 1, 7] and nfe == 4


def test_frechet_distance_of_gaussians_and_precision_recall_of_known_sets():
    a = torch.randn(200_000, 3, generator=seeded(37), dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -1.0])
    distance = sample.frechet_distance(a, a * scale + shift)
    assert abs(distance - (2 + 1 + 0.25)) < 0.03                     # |shift|^2 + sum (1 - scale)^2
    real = torch.randn(500, 2, generator=seeded(38))
    assert sample.precision_recall(real, real) == (1, 1)
    precision, recall = sample.precision_recall(real, torch.cat([real[:250] * 0.01, real[250:] + 100]))
    assert precision == 0.5 and recall < 0.05


def test_metrics_judge_the_pixels_that_were_written(folder, trained, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for name in ("latents averaged to 8 x 8", "the judge's features"):
        assert run(sampling(trained, tmp_path, count=20, metrics=True, data=data), sample) is None
        measured = json.loads((tmp_path / "metrics.json").read_text())
        assert {f"Frechet distance in {name}", "recall (k = 3, 20 real ones)"} < measured.keys()
        torch.save(font_digits.ConvNet().state_dict(), data / "judge.pt")
    kept, judge = np.load(tmp_path / "samples.npz"), font_digits.load_judge(data)
    pixels = torch.from_numpy(kept["arr_0"][:, None, :, :, 0]).float()
    read = judge((pixels - 127.5) / 74).argmax(1).numpy()
    assert measured["judge accuracy"] == (read == kept["labels"]).mean()


@pytest.mark.parametrize("says, argv", [
    ("dopri5", "--sampler=magic"), ("1 to", "--steps=0"), ("0 to 9", "--classes 3 10"), ("0 to", "--guidance=nan"),
    ("the smaller first", "--interval 0.7 0.2"), ("/nowhere.pt", "--checkpoint=/nowhere.pt"),
    ("/nowhere", "--metrics --data=/nowhere"), ("--count 10", "--metrics --count=3 --data=."),
    ("pip install diffusers", "--vae=/nowhere")])
def test_bad_sampling_flags_are_refused_in_one_line(trained, tmp_path, says, argv):
    line = run(sampling(trained, tmp_path) + argv.split(), sample)
    assert isinstance(line, str) and says in line and "\n" not in line and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# data/font_digits.py


def test_fonts_draw_the_same_digits_from_the_same_seed():
    images, labels = font_digits.draw(50, 3)
    assert images.shape == (50, 1, 16, 16) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert set(labels) <= set(range(10)) and images.max() > 200 and (font_digits.draw(50, 4)[0] != images).any()
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "34fb0e0a914c9b78"
    assert images[:, 0, 0].mean() < 5 < images.mean()                # ink in the middle, on black


def test_help_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(font_digits, "ensure", lambda *_: pytest.fail("it draws"))
    assert run(["--help"]) == run(["--help"], sample) == 0
    monkeypatch.setattr(sys, "argv", ["font_digits.py", str(tmp_path / "new"), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / "data/font_digits.py"), run_name="__main__")
    assert stop.value.code == 0 and not list(tmp_path.iterdir()) and "a new folder" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# data/imagenet.py


def tiny_vae():
    """A VAE of one random convolution, with the interface of diffusers."""
    torch.manual_seed(0)
    vae = nn.Conv2d(3, 8, 8, 8).requires_grad_(False)

    def encode(x):
        mean, log_std = vae(x).chunk(2, 1)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=log_std.exp()))

    vae.encode = encode
    return vae


def tiny_encoder():
    """An encoder of one random convolution and a 37 x 37 position embedding, with the interface of DINOv2."""
    torch.manual_seed(1)
    encoder = nn.Conv2d(3, 6, 14, 14)
    encoder.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, 6))
    tokens = lambda x: encoder(x).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    encoder.forward_features = lambda x: {"x_norm_patchtokens": tokens(x)}
    return encoder


@pytest.fixture
def hub(monkeypatch):
    """diffusers and torch.hub without a network: the names of what was loaded."""
    loaded = []
    kind = types.SimpleNamespace(from_pretrained=lambda name: loaded.append(name) or tiny_vae())
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=kind))
    monkeypatch.setattr(torch.hub, "load", lambda repo, name: loaded.append(f"{repo} {name}") or tiny_encoder())
    return loaded


def draw_images(folder):
    """Twelve images of odd sizes, modes and formats, one folder per class."""
    random, sizes = np.random.RandomState(0), [(70, 50), (33, 64), (40, 40), (90, 31)]
    kinds = [("RGB", "JPEG"), ("L", "PNG"), ("P", "png"), ("RGBA", "PNG"), ("CMYK", "jpg")]
    for i in range(12):
        mode, suffix = kinds[i % 5]
        file = folder / ["n02", "n01", "n10"][i // 4] / f"{9 - i % 4}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(random.randint(0, 256, (8, 10, 3)).astype(np.uint8))
        picture.resize(sizes[i % 4]).convert(mode).save(file)
    (folder / "n01/notes.txt").write_text("no image")
    (folder / ".trash").mkdir()
    return folder


def repa_folder(folder, n=7):
    """REPA's layout; latents and picture both say which image they are."""
    random, entries = np.random.RandomState(1), []
    for i in map(int, random.permutation(n)):
        latents, image = f"0000{i % 2}/img-mean-std-{i:08d}.npy", f"0000{i % 2}/img{i:08d}.png"
        for part in ("vae-sd", "images"):
            (folder / part / latents).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / latents, i + random.rand(8, 4, 4).astype(np.float32))
        Image.new("RGB", (32, 32), (i, 20 * i % 256, 9)).save(folder / "images" / image)
        entries.append([latents, i % 5])
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def fast_dit_folder(folder, n=11, size=256):
    for part in ("features", "labels"):
        (folder / f"imagenet{size}_{part}").mkdir(parents=True)
    for i in range(n):
        latents = np.random.RandomState(i).randn(1, 4, 4, 4).astype(np.float32)
        np.save(folder / f"imagenet{size}_features/{i}.npy", latents)
        np.save(folder / f"imagenet{size}_labels/{i}.npy", np.array([90 * i % 1000]))
    return folder


def content(folder):
    return {file.stem: np.load(file) for file in folder.glob("[!.]*.npy")}


def settings(images, out, **changes):
    return imagenet.Config(**dict(images=str(images), out=str(out), size=32, batch=5) | changes)


@pytest.mark.parametrize("width, height", [(300, 200), (131, 64), (333, 500), (48, 48), (37, 31), (97, 96), (95, 191)])
def test_the_crop_is_the_centre_of_the_image(width, height, size=48):
    """Every filter keeps a linear ramp, so each pixel of the crop tells which place of the image it shows."""
    x, y = np.arange(width), np.arange(height)[:, None]
    ramp = np.stack(np.broadcast_arrays(x * 250 / width, y * 250 / height, 0.0), -1).round().astype(np.uint8)
    crop = np.asarray(imagenet.centre_crop(Image.fromarray(ramp), size)).astype(float)
    assert crop.shape == (size, size, 3)
    for axis, length in ((0, width), (1, height)):
        resized = round(length * size / min(width, height))
        place = ((resized - size) // 2 + np.arange(size) + 0.5) * length / resized - 0.5
        shown = crop[..., axis].mean(axis) * length / 250
        assert np.abs(shown - place)[5:-5].max() < 0.45 * length / resized         # at the border: no ramp


def test_the_crop_halves_by_box_and_only_while_the_short_side_is_twice_the_size():
    def crop_of_a_point(side):
        image = np.zeros((side, side, 3), np.uint8)
        image[side // 2, side // 2] = 255
        return np.asarray(imagenet.centre_crop(Image.fromarray(image), 16))[..., 0]

    point = crop_of_a_point(32)
    assert point.max() == 64 and (point > 0).sum() == 1            # the mean of four pixels, and no other sees it
    assert crop_of_a_point(64).max() == 16                         # twice
    assert (crop_of_a_point(31) > 0).sum() > 1                     # not at 31: bicubic, which spreads
    assert crop_of_a_point(16).max() == 255                        # nothing to do


def test_a_folder_of_images_becomes_a_data_set(tmp_path, hub):
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    imagenet.make(settings(images, out, pixels=True))
    assert hub == ["stabilityai/sd-vae-ft-ema", "facebookresearch/dinov2 dinov2_vitb14"]
    arrays, data = content(out), train_sit.Latents(out, features=True)
    files = [file for name in ("n01", "n02", "n10") for file in sorted((images / name).glob("[0-9]*"))]
    crops = [imagenet.centre_crop(Image.open(file).convert("RGB"), 32) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    assert arrays["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 and (arrays["images"] == pixels.numpy()).all()
    mean, log_std = tiny_vae()(pixels / 127.5 - 1).chunk(2, 1)
    np.testing.assert_allclose(arrays["latents"], torch.cat([mean, log_std.exp()], 1), atol=1e-5)
    tokens = imagenet.load_encoder("dinov2_vitb14", 32, "cpu")(pixels)
    assert fpo.alignment_loss(tokens, torch.from_numpy(arrays["features"])).max() < -0.999
    assert {array.dtype.name for array in arrays.values()} == {"int64", "uint8", "float32", "int8"}
    assert (data.channels, data.size, data.feature_dim, data.moments, data.classes) == (4, 4, 6, True, 3)
    expected = dict(scale=0.18215, bias=0, size=32, vae=hub[0], encoder="dinov2_vitb14")
    assert expected.items() <= data.meta.items()


def test_stopped_in_the_middle_it_goes_on_and_does_nothing_twice(tmp_path, hub):
    images, network, seen = draw_images(tmp_path / "images"), tiny_vae(), []

    def vae(x, broken_at=None):
        seen.append(len(x))
        if len(seen) == broken_at:
            raise ConnectionError("power cut")
        return imagenet.latents_of(network, x)

    whole, parts = (settings(images, tmp_path / name, batch=2) for name in ("whole", "parts"))
    imagenet.make(whole, vae=vae)
    assert seen == [1] + 6 * [2]                                     # the first image tells the shapes
    seen.clear()
    with pytest.raises(ConnectionError):
        imagenet.make(parts, vae=functools.partial(vae, broken_at=5))
    done = np.load(min(Path(parts.out).glob(".done-*"))).sum()
    with pytest.raises(train_sit.Refused):                           # not yet for training
        train_sit.Latents(parts.out)
    seen.clear()
    imagenet.make(parts, vae=vae)
    assert 1 <= done <= 4 and seen == (6 - done) * [2]
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert whole.keys() == parts.keys() == {"latents", "labels", "features"}
    assert all((whole[name] == parts[name]).all() for name in whole)


@pytest.mark.parametrize("encoder", ["dinov2_vitb14", "none"])
def test_repa_folders_are_repacked_exactly(tmp_path, hub, encoder):
    source, out = repa_folder(tmp_path / "source"), tmp_path / "out"
    imagenet.make(settings(source, out, batch=3, encoder=encoder, pixels=True))
    assert hub == ["facebookresearch/dinov2 dinov2_vitb14"] * (encoder != "none")            # never a VAE
    data, arrays = train_sit.Latents(out, features=encoder != "none"), content(out)
    order = [int(name[-12:-4]) for name, _ in json.loads((source / "vae-sd/dataset.json").read_text())["labels"]]
    for i, latents, image, label in zip(order, arrays["latents"], arrays["images"], arrays["labels"], strict=True):
        assert (latents == np.load(source / f"vae-sd/0000{i % 2}/img-mean-std-{i:08d}.npy")).all()
        assert (image[:, 3, 5] == [i, 20 * i, 9]).all() and label == i % 5
    assert (data.moments, data.classes, data.meta["scale"], data.meta["vae"]) == (True, 5, 0.18215, None)


@pytest.mark.parametrize("size", [256, 512])
def test_fast_dit_folders_are_repacked_exactly(tmp_path, hub, size):
    imagenet.make(settings(fast_dit_folder(tmp_path / "source", size=size), tmp_path / "out"))
    data = train_sit.Latents(tmp_path / "out")
    expected = [np.random.RandomState(i).randn(4, 4, 4).astype(np.float32) for i in range(11)]
    assert not hub and (data.latents == expected).all() and data.labels.tolist() == list(range(0, 990, 90))
    assert (data.moments, data.classes, data.meta["scale"], data.meta["scaled_by"]) == (False, 1000, 1, 0.18215)


def test_two_processes_share_the_work(two_processes):
    arrays = content(two_processes / "repacked")
    numbers = arrays["latents"][:, 0, 0, 0].astype(int)
    assert sorted(numbers) == list(range(40)) and (arrays["labels"] == numbers % 5).all()
    assert (arrays["latents"].astype(int) == numbers[:, None, None, None]).all()


def no_network(*_):
    raise OSError("no connection\nto anything")


@pytest.mark.parametrize("says, spoil", [
    ("n10/9.PNG cannot be read", lambda images, patch: (images / "n10/9.PNG").write_bytes(b"none")),
    ("other flags or files", lambda images, patch: (images / "n01/9.CMYK.png").write_bytes(b"none")),
    ("without images: ['n05']", lambda images, patch: (images / "n05").mkdir()),
    ("nor one folder of images per class", lambda images, patch: shutil.rmtree(images)),
    ("pip install diffusers", lambda images, patch: patch.setitem(sys.modules, "diffusers", None)),
    ("dinov2_vitb14 cannot be loaded", lambda images, patch: patch.setattr(torch.hub, "load", no_network))])
def test_a_stopped_run_that_cannot_go_on_says_why_in_one_line(tmp_path, hub, monkeypatch, says, spoil):
    images = draw_images(tmp_path / "images")
    cfg = settings(images, tmp_path / "out")
    with pytest.raises(ZeroDivisionError):                          # at the last chunk, of 2 images
        imagenet.make(cfg, vae=lambda x: torch.zeros(len(x), 8, 4, 4) / (1 // (len(x) - 2)))
    spoil(images, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        imagenet.make(cfg)
    assert says in str(stop.value) and "\n" not in str(stop.value)


def test_damaged_foreign_folders_are_refused_in_one_line(tmp_path):
    repa, fast = repa_folder(tmp_path / "repa"), fast_dit_folder(tmp_path / "fast")
    (fast / "imagenet256_features/3.npy").write_bytes(b"none")
    finished = settings(repa, tmp_path / "finished", encoder="none")
    imagenet.make(finished)
    (repa / "images/00001/img00000003.png").unlink()
    cases = [(fast, "imagenet256_features/3.npy cannot be read"), (repa, "img00000003.png cannot be read")]
    for name in ("../outside.npy", "/outside.npy", "a/../../outside.npy"):
        leaving = tmp_path / f"leaving{len(cases)}"
        (leaving / "vae-sd").mkdir(parents=True)
        (leaving / "vae-sd/dataset.json").write_text(json.dumps({"labels": [[name, 0]]}))
        cases.append((leaving, "names a file outside the folder"))
    for source, says in cases:
        with pytest.raises(SystemExit, match=says) as stop:
            imagenet.make(settings(source, tmp_path / f"out{source.name}", pixels=source == repa, encoder="none"))
        assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="is finished: delete it"):
        imagenet.make(finished)


def test_position_embeddings_are_resampled_and_the_class_token_is_kept():
    row, column = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    code = torch.randn(1, 1 + 37 * 37, 3, generator=seeded(0))
    assert torch.equal(imagenet.resample_positions(code, 37), code)
    code[0, 1:] = torch.stack([row, column, (row + column) % 2], -1).flatten(0, 1)    # the last: too fine to keep
    for side in (16, 32):
        out = imagenet.resample_positions(code, side)
        assert out.shape == (1, 1 + side * side, 3) and torch.equal(out[:, 0], code[:, 0])
        place = ((torch.arange(side) + 0.5) * 37 / side - 0.5)[3:-3]
        row, column, fine = out[0, 1:].unflatten(0, (side, side))[3:-3, 3:-3].unbind(-1)
        assert (row - place[:, None]).abs().max() < 0.03 and (column - place).abs().max() < 0.03
        assert side == 32 or (fine - 0.5).abs().max() < 0.1


def test_the_encoder_sees_normalised_images_at_seven_eighths_of_their_size():
    encoder = types.SimpleNamespace(forward_features=lambda x: {"x_norm_patchtokens": x})
    images = torch.tensor([0, 128, 255], dtype=torch.uint8)[None, :, None, None]
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    for size, side in ((256, 224), (512, 448)):
        x = imagenet.tokens_of(encoder, images.expand(2, 3, size, size))
        assert x.shape == (2, 3, side, side) and (x - expected[:, None, None]).abs().max() < 1e-4


def test_int8_tokens_use_the_whole_range_and_change_the_alignment_loss_by_less_than_a_thousandth():
    """Tokens as DINOv2's, with tails and with dimensions ten times the others; h at every angle to them."""
    y = torch.tensor([[0.0, 0.0, 0.0], [0.5, -2.0, 0.25], [3e4, 1.0, -3e4]])
    assert imagenet.to_int8(y).tolist() == [[0, 0, 0], [32, -127, 16], [127, 0, -127]]
    draw = functools.partial(torch.randn, 4, 256, 768, generator=seeded(0))
    y, h = draw() * (0.3 * draw()).exp(), draw()
    y[..., :3] *= 10
    unit, stored = F.normalize(y, dim=-1), imagenet.to_int8(y)
    away = F.normalize(h - (h * unit).sum(-1, keepdim=True) * unit, dim=-1)
    for cosine in torch.linspace(-1, 1, 9):
        loss = fpo.alignment_loss(cosine * unit + (1 - cosine ** 2).sqrt() * away, stored)
        assert (loss + cosine).abs().max() < 1e-3


# ----------------------------------------------------------------------------------------------------------
# Costs (python -m pytest -q -s -k cost prints them)


def seconds(function, repeat=20):
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def test_cost_of_the_method_in_a_training_step_of_the_tiny_model(folder):
    cfg = train_sit.Config(timesteps="vr_loss")
    model = train_sit.SiT(16, 1, 10, **train_sit.MODELS["tiny"])
    ema, opt = copy.deepcopy(model).requires_grad_(False), torch.optim.AdamW(model.parameters(), fused=True)
    x, t, y = torch.randn(128, 1, 16, 16), torch.rand(128), torch.arange(128) % 10
    density = train_sit.start_density(cfg, train_sit.Latents(folder), x.device)

    def step():
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            v = model(x, t, y)
        fpo.velocity_loss(v, x).mean().backward()
        opt.step()

    def method():
        train_sit.TIMESTEPS["vr_loss"](t, density, cfg)
        train_sit.POLICIES["fpo"](t, t, cfg)
        train_sit.ALIGN_POLICIES["fpo"](t, t, cfg)
        train_sit.update_average(ema, model, 0.99)
        train_sit.follow_losses(density, t, t)

    share = seconds(method) / seconds(step, 6)
    print(f"\nFPO, timesteps and the average: {share:.2%} of a step")
    assert share < 0.03


def test_cost_of_importing_and_of_help_is_that_of_torch():
    """Both in one process, so that a busy moment of the machine meets both."""
    code = """import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import train_sit
try: train_sit.main(["--help"])
except SystemExit: print("TIMES", (time.perf_counter() - a) / (b - a))"""
    ratio = min(float(launch("-c", code).stdout.split("TIMES")[1]) for _ in range(2))
    print(f"\nimport train_sit and --help: {ratio:.2f} times import torch")
    assert ratio < 1.3
