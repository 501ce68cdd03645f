"""The papers' claims as tests, in their order, then the plumbing. Run: python -m pytest -q   (-s shows what was measured)"""
import argparse
import builtins
import copy
import dis
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
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
import toy2d
import train_sit
from data import font_digits, imagenet

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "study"))
import ablation  # noqa: E402
import between  # noqa: E402
import measures  # noqa: E402
import race  # noqa: E402
import speed  # noqa: E402

paths = pytest.mark.parametrize("path", fpo.PATHS.values(), ids=fpo.PATHS)
ENDS = torch.tensor([0.0, 1e-4, 0.03, 0.3, 0.77, 0.999, 1.0], dtype=torch.float64)


def seeded(n):
    return torch.Generator().manual_seed(n)


class Mixture:
    """Oracle: a mixture of Gaussians in 2D; everything about x_t follows from its components' means and covariances."""
    means = torch.tensor([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.0]], dtype=torch.float64)
    variance, weights = 0.09, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def log_density(self, x, t, path):
        """log p_t(x) up to a constant: component k of x_t is N(alpha mean_k, alpha^2 variance + sigma^2)."""
        alpha, sigma, _, _ = (c[:, None] for c in path(t))
        total = alpha ** 2 * self.variance + sigma ** 2
        square = (x[:, None] - alpha[:, :, None] * self.means).square().sum(-1)
        return torch.logsumexp(self.weights.log() - square / (2 * total) - total.log(), 1)

    def velocity(self, x, t, path):
        """E[v | x_t = x], each component by the conditional mean of jointly Gaussian v and x_t."""
        alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path(t))
        total = alpha ** 2 * self.variance + sigma ** 2
        offset = x[:, None] - alpha * self.means
        logits = self.weights.log() - offset.square().sum(-1) / (2 * total[..., 0]) - total[..., 0].log()
        v = d_alpha * self.means + (alpha * d_alpha * self.variance + sigma * d_sigma) / total * offset
        return (torch.softmax(logits, 1)[..., None] * v).sum(1)


# ----------------------------------------------------------------------------------------------------------
# Interpolants


@paths
def test_path_derivatives_are_those_of_alpha_and_sigma(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = path(t)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative.detach())


@paths
def test_regression_on_gaussian_data_finds_the_marginal_velocity(path):
    n, variance = 400_000, 0.5
    x = variance ** 0.5 * torch.randn(n, 1, generator=seeded(0), dtype=torch.float64)
    eps, t = torch.randn(n, 1, generator=seeded(1), dtype=torch.float64), torch.full((n,), 0.4, dtype=torch.float64)
    x_t, v = fpo.interpolate(x, eps, t, path)
    slope = (x_t * v).sum() / (x_t * x_t).sum()                        # least squares: E[v | x_t] = slope x_t
    alpha, sigma, d_alpha, d_sigma = (c[0] for c in path(t))
    exact = (alpha * d_alpha * variance + sigma * d_sigma) / (alpha ** 2 * variance + sigma ** 2)
    assert abs(slope - exact) < 0.02 * max(1, abs(exact))


@paths
def test_score_from_velocity_is_the_gradient_of_the_log_density(path):
    t = torch.linspace(0.05, 1, 40, dtype=torch.float64)
    x = torch.randn(40, 2, generator=seeded(2), dtype=torch.float64).requires_grad_()
    score, = torch.autograd.grad(Mixture().log_density(x, t, path).sum(), x)
    torch.testing.assert_close(fpo.score_from_velocity(Mixture().velocity(x.detach(), t, path), x.detach(), t, path), score)


@paths
def test_conversions_invert_each_other_and_are_finite_at_both_ends(path):
    x, eps = torch.randn(2, len(ENDS), 3, 2, generator=seeded(3), dtype=torch.float64)
    x_t, v = fpo.interpolate(x, eps, ENDS, path)
    torch.testing.assert_close(fpo.x_from_velocity(v, x_t, ENDS, path), x)
    torch.testing.assert_close(fpo.eps_from_velocity(v, x_t, ENDS, path), eps)
    inside = slice(2, -2)
    for back in (fpo.velocity_from_x(x, x_t, ENDS, path), fpo.velocity_from_eps(eps, x_t, ENDS, path)):
        torch.testing.assert_close(back[inside], v[inside])
        assert back.isfinite().all()
    assert fpo.score_from_velocity(v, x_t, ENDS, path).isfinite().all()


# ----------------------------------------------------------------------------------------------------------
# Losses


def test_losses_are_per_sample_and_computed_in_float32():
    h, y = torch.randn(4, 9, 16, generator=seeded(4)), torch.randn(4, 9, 16, generator=seeded(5))
    by_hand = [-sum(F.cosine_similarity(a, b, dim=0) for a, b in zip(h[i], y[i])) / 9 for i in range(4)]
    torch.testing.assert_close(fpo.alignment_loss(h, 3 * y), torch.stack(by_hand))
    tiny = torch.full((1, 1, 64), 1e-30, dtype=torch.bfloat16)         # in bf16 its norm underflows
    assert fpo.alignment_loss(tiny, tiny).isfinite().all() and fpo.alignment_loss(tiny, tiny).dtype == torch.float32
    assert fpo.velocity_loss(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)).tolist() == [1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        under = fpo.nt_xent_loss(h, y)
    assert torch.equal(under, fpo.nt_xent_loss(h, y))


def test_nt_xent_of_a_slice_against_the_global_batch_is_the_slice_of_the_whole():
    h, y = torch.randn(6, 3, 8, generator=seeded(6)), torch.randn(6, 3, 8, generator=seeded(7))
    whole = fpo.nt_xent_loss(h, y, 0.2)
    torch.testing.assert_close(torch.cat([fpo.nt_xent_loss(h[:2], y, 0.2), fpo.nt_xent_loss(h[2:], y, 0.2, first=2)]), whole)
    k, i = F.normalize(h, dim=-1), F.normalize(y, dim=-1)
    token = [-math.log(math.exp(k[1, n] @ i[1, n] / 0.2) / sum(math.exp(k[1, n] @ i[j, n] / 0.2) for j in range(6))) for n in range(3)]
    assert abs(whole[1].item() - sum(token) / 3) < 1e-5


# ----------------------------------------------------------------------------------------------------------
# FPO


MASKS = {"all": None, "some": torch.rand(40, generator=seeded(8)) < 0.4, "none": torch.zeros(40, dtype=torch.bool)}


def some_losses(n=40):
    return torch.rand(n, generator=seeded(9), dtype=torch.float64) * 2


def test_weights_follow_equations_18_to_20_by_hand():
    w = fpo.fpo_weights(torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0]), r=0.4, beta=2.0, tau=1.0)      # H = {9, 3}
    p = math.exp(9) / (math.exp(9) + math.exp(3))
    torch.testing.assert_close(w, torch.tensor([1 + 2 * (1 - p), 1, 1, 1, 1 + 2 * p]) * 5 / 7)


@pytest.mark.parametrize("mask", [None, torch.arange(1000) % 3 > 0], ids=["all", "some"])
def test_losses_of_16_bits_get_weights_in_float32(mask):
    L = some_losses(1000).bfloat16()
    assert torch.equal(fpo.fpo_gradient_weights(L, mask=mask), fpo.fpo_gradient_weights(L.float(), mask=mask))
    w = fpo.fpo_weights(L, mask=mask)
    assert torch.equal(w, fpo.fpo_weights(L.float(), mask=mask)) and abs(w.sum() - 1000) < 1e-2


@pytest.mark.parametrize("r, n, top", [(0.29, 100, 29), (0.53, 100, 53), (0.8, 128, 102), (1.0, 7, 7), (0.01, 5, 1), (0.7, 10, 7)])
def test_the_boosted_set_has_floor_r_n_members_and_at_least_one(r, n, top):
    assert (fpo.fpo_policy(some_losses(n), r) > 0).sum() == top
    assert (fpo.fpo_policy(torch.ones(n), r) > 0).sum() == top                                   # ties too


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("r, beta, tau", [(0.8, 2.0, 1.0), (0.3, 5.0, 0.05), (1.0, 0.0, 0.2), (0.01, 2.0, 1.0)])
def test_theorem_3_3_collapses_to_one_detached_weight_per_sample(r, beta, tau, mask):
    losses = some_losses().requires_grad_()
    gradient, = torch.autograd.grad(fpo.fpo_loss(losses, r, beta, tau, mask), losses)
    c = fpo.fpo_gradient_weights(losses, r, beta, tau, mask)
    torch.testing.assert_close(c, 40 * gradient, rtol=1e-12, atol=1e-12)
    assert not c.requires_grad and abs(c.sum().item() - 40) < 1e-6
    assert mask is None or (c[~mask] == 1).all()


def test_gradient_through_a_network_is_that_of_theorem_3_3_term_by_term():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(3, 1).double(), torch.randn(12, 3, dtype=torch.float64)
    losses = net(x).square()[:, 0]
    per_sample = torch.stack([torch.autograd.grad(l, net.weight, retain_graph=True)[0].flatten() for l in losses])
    N, r, beta, tau = 12, 0.5, 3.0, 0.3
    H = losses.argsort(descending=True)[:6]
    p = torch.zeros(N, dtype=torch.float64)
    p[H] = torch.softmax(losses[H] / tau, 0).detach()
    d_p = p[:, None] / tau * (per_sample - p @ per_sample)                                       # [FPO Eq. 22]
    Z = 1 + beta / N
    expected = ((1 + beta * p) / Z) @ per_sample / N + losses.detach() @ (beta / Z * d_p) / N     # [FPO Eq. 21]
    torch.testing.assert_close(torch.autograd.grad(fpo.fpo_loss(losses, r, beta, tau), net.weight)[0].flatten(), expected)


def test_one_sample_that_competes_alone_has_a_constant_p():
    """Its softmax is exp(0) / exp(0): a clamp at its bound would have given it a gradient, or not, by torch's version."""
    losses = some_losses(7).requires_grad_()
    assert fpo.fpo_policy(losses, r=0.17).tolist() == (losses == losses.max()).tolist()
    gradient, = torch.autograd.grad(fpo.fpo_policy(losses, r=0.17).max(), losses)
    assert (gradient == 0).all()


def test_a_constant_added_to_every_loss_changes_nothing():
    losses = some_losses()
    for shift in (-1.0, 1e4):
        torch.testing.assert_close(fpo.fpo_gradient_weights(losses + shift), fpo.fpo_gradient_weights(losses))


def test_the_boost_is_at_most_beta_out_of_n_plus_beta():
    for tau in (1e-3, 1.0, 1e3):
        moved, ess = fpo.weight_moved(fpo.fpo_weights(some_losses(), 0.8, 2.0, tau))
        assert moved <= 2 / 42 and 0 < ess <= 40


def test_centring_takes_what_t_explains_out_of_the_ranking_and_nothing_else():
    t, noise = torch.rand(256, generator=seeded(90)), 0.3 * torch.randn(256, generator=seeded(91))
    weigh = lambda losses: fpo.fpo_gradient_weights(losses, beta=128.0)
    moved = lambda c: fpo.weight_moved(c)[0]
    by_t = 4 * t                                                           # a loss that t alone decides
    assert moved(weigh(by_t)) > 0.2 and moved(weigh(fpo.centred(by_t, t))) < 0.35 * moved(weigh(by_t))
    alike = lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1]
    with_t = weigh(fpo.centred(by_t + noise, t))
    assert alike(with_t, weigh(fpo.centred(noise, t))) > 0.85
    assert alike(with_t, noise) > 0.6 > alike(weigh(by_t + noise), noise)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_ranking_in_groups_is_the_algorithm_of_a_gpu_for_every_group(mask):
    losses = some_losses()
    c = fpo.fpo_gradient_weights(losses, 0.5, 2.0, 0.3, mask, group=8)
    for k in range(0, 40, 8):
        alone = fpo.fpo_gradient_weights(losses[k:k + 8], 0.5, 2.0, 0.3, None if mask is None else mask[k:k + 8])
        torch.testing.assert_close(c[k:k + 8], alone)
    torch.testing.assert_close(fpo.fpo_gradient_weights(losses, mask=mask, group=40), fpo.fpo_gradient_weights(losses, mask=mask))
    if mask is None:                                                    # few samples compete, so more weight moves
        assert fpo.weight_moved(c)[0] > 2 * fpo.weight_moved(fpo.fpo_gradient_weights(losses, 0.5, 2.0, 0.3))[0]


def test_early_weights_are_the_sigmoid_up_to_a_factor_and_sum_to_n():
    t = torch.tensor([0.0, 0.5, 0.7, 0.8, 1.0], dtype=torch.float64)
    w = fpo.early_weights(t)
    assert abs(w.sum() - 5) < 1e-12 and abs(w[0] / w[2] - 2) < 1e-5
    torch.testing.assert_close(w[3] / w[1], torch.tensor((1 + math.exp(-4)) / (1 + math.exp(2)), dtype=torch.float64))


def test_spatially_normalised_tokens_have_mean_0_and_standard_deviation_1_over_the_tokens():
    y = torch.randn(3, 16, 5, generator=seeded(98)) * 4 + 7
    z = fpo.spatially_normalised(y.to(torch.bfloat16))
    assert z.dtype == torch.float32 and z.mean(1).abs().max() < 1e-3
    np.testing.assert_allclose(np.std(z.numpy(), axis=1, ddof=1), 1, atol=1e-3)
    half = fpo.spatially_normalised(y, gamma=0.5)
    torch.testing.assert_close(half.mean(1), y.mean(1) / 2 / y.std(1), rtol=1e-4, atol=1e-4)


def test_hard_sample_weights_are_fpo_at_infinite_temperature_and_static_policies_sum_to_n():
    losses, t = some_losses(), torch.linspace(0, 1, 40, dtype=torch.float64)
    torch.testing.assert_close(fpo.hard_sample_weights(losses, 0.5, 2.0), fpo.fpo_weights(losses, 0.5, 2.0, 1e9))
    for path in fpo.PATHS.values():
        for w in (fpo.p2_weights(t, path), fpo.min_snr_weights(t, path)):
            assert w.isfinite().all() and (w >= 0).all() and abs(w.sum() - 40) < 1e-9
    snr = (torch.cos(math.pi / 2 * t) / torch.sin(math.pi / 2 * t).clamp_min(1e-9)) ** 2
    known = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + 1)            # min-SNR for v-prediction, as published
    torch.testing.assert_close(fpo.min_snr_weights(t, fpo.cosine), known * 40 / known.sum())


@paths
def test_p2_and_min_snr_weigh_the_velocity_loss_as_they_do_the_loss_in_eps(path):
    """Oracle: the same error of the network, once in v and once, converted, in eps, where both are published."""
    t = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    x_t, v, error = torch.randn(3, 40, 2, generator=seeded(41), dtype=torch.float64)
    eps_error = fpo.eps_from_velocity(v + error, x_t, t, path) - fpo.eps_from_velocity(v, x_t, t, path)
    snr = (path(t)[0] / path(t)[1]) ** 2
    for w, published in ((fpo.p2_weights(t, path, 2.0, 0.5), (2 + snr) ** -0.5), (fpo.min_snr_weights(t, path), snr.clamp_max(5) / snr)):
        ratio = w * error.square().sum(1) / (published * eps_error.square().sum(1))
        torch.testing.assert_close(ratio, ratio.mean().expand(40))


@pytest.mark.parametrize("bad", [dict(r=0.0), dict(r=1.1), dict(r=math.nan), dict(beta=-1.0), dict(tau=0.0), dict(tau=-1.0)])
def test_bad_fpo_arguments_raise(bad):
    for function in (fpo.fpo_weights, fpo.fpo_loss, fpo.fpo_gradient_weights):
        with pytest.raises(ValueError, match=next(iter(bad))):
            function(some_losses(), **bad)


# ----------------------------------------------------------------------------------------------------------
# Visual Representation Policy Optimization


def some_tokens(seed, B=24, T=5, D=7):
    h, y = torch.randn(2, B, T, D, generator=seeded(seed), dtype=torch.float64)
    return h.requires_grad_(), y


def some_rewards(seed, K=3, B=32):
    spread = torch.tensor([[0.3], [0.2], [0.1]][:K], dtype=torch.float64)
    return spread * torch.randn(K, B, generator=seeded(seed), dtype=torch.float64) - torch.arange(K)[:, None]


@pytest.mark.parametrize("weights", [(0.3, 0.5), None])
def test_proposition_2_the_gradient_of_the_semantic_reward_is_that_of_repa_times_w_lambda_over_sigma(weights):
    h, y = some_tokens(0)
    fidelity = some_rewards(1, K=1, B=len(h))[0]                                # varies, without a gradient
    rewards = torch.stack([fidelity, -fpo.alignment_loss(h, y)])
    moments = fpo.moving_moments(rewards.T)
    loss = fpo.vrpo_loss(rewards, moments, weights, eta=0.7, floor=1e-3).mean()
    ours, = torch.autograd.grad(loss, h, retain_graph=True)
    repa, = torch.autograd.grad(-torch.cosine_similarity(h, y, dim=-1).mean(), h)
    r = rewards.detach()
    w = torch.tensor([0.375, 0.625]) if weights else 1 / r.var(1, unbiased=False).clamp_min(2.5e-3)
    w = (w / w.sum()).double()
    R = (w[:, None] * r).sum(0)
    scale = (1 + 0.7 * R.var(unbiased=False)) * w[1] / R.std(unbiased=False)
    assert torch.allclose(ours, scale * repa, rtol=1e-6, atol=1e-12)


def test_theorem_2_inverse_variance_weights_are_the_least_over_the_simplex_for_uncorrelated_rewards_only():
    variance = torch.tensor([0.04, 0.01, 0.09], dtype=torch.float64)
    a = torch.arange(0, 1.0001, 0.005, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(a, a, indexing="ij"), -1).reshape(-1, 2)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    grid = grid[grid[:, 2] > -1e-9]                                             # the simplex in steps of 0.005
    of = lambda w, cov: ((w @ cov) * w).sum(-1)
    w, independent = fpo.inverse_variance_weights(variance), variance.diag()
    assert abs(w.sum() - 1) < 1e-12
    best = grid[of(grid, independent).argmin()]
    assert (w - best).abs().max() <= 0.005 and of(w, independent) <= of(best, independent)
    correlated = independent + 0.9 * torch.outer(variance.sqrt(), variance.sqrt()) * (1 - torch.eye(3))
    assert of(w, correlated) > 1.3 * of(grid, correlated).min()


def test_a_reward_that_hardly_varies_takes_no_more_weight_than_the_floor_allows():
    w = fpo.inverse_variance_weights(torch.tensor([0.0, 0.04]), floor=0.01)
    assert torch.allclose(w, torch.tensor([0.8, 0.2]))


def frechet_by_square_roots(a, b):
    """Oracle: the distance with A^(1/2) B A^(1/2), both roots by eigenvectors."""
    A, B = torch.cov(a.T), torch.cov(b.T)
    value, vector = torch.linalg.eigh(A)
    root = vector * value.clamp_min(0).sqrt() @ vector.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


@pytest.mark.parametrize("B", [40, 6], ids=["B > D", "B < D"])
def test_the_frechet_reward_and_its_gradient_are_right_also_where_the_covariance_is_singular(B):
    D, double = 9, dict(dtype=torch.float64)
    real = torch.randn(60, D, generator=seeded(2), **double) @ torch.randn(D, D, generator=seeded(3), **double)
    z = (torch.randn(B, D, generator=seeded(4), **double) * 1.5 + 0.2).requires_grad_()
    reward = lambda z: fpo.frechet_reward(z, real.mean(0), torch.cov(real.T))
    assert abs(reward(z).item() + frechet_by_square_roots(z.detach(), real)) < 1e-6 * abs(reward(z).item())
    assert torch.autograd.gradcheck(reward, z, eps=1e-5, atol=1e-5)
    flat = torch.randn(60, 3, generator=seeded(5), **double) @ torch.randn(3, D, generator=seeded(3), **double)
    singular = fpo.frechet_reward(z, flat.mean(0), torch.cov(flat.T))           # real features of rank 3
    assert abs(singular.item() + frechet_by_square_roots(z.detach(), flat)) < 1e-5 * abs(singular.item())
    assert torch.autograd.grad(singular, z)[0].isfinite().all()


def test_the_frechet_reward_of_commuting_covariances_is_the_closed_form_and_zero_at_equality():
    a, b = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([3.0, 0.1, 0.7])
    cube = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()      # 8 points, covariance 8/7
    z = 2 + cube * (7 / 8 * a).sqrt()
    exact = -(3 * 2.0 ** 2 + (a.sqrt() - b.sqrt()).square().sum())
    assert abs(fpo.frechet_reward(z, torch.zeros(3), b.diag()) - exact) < 1e-5
    assert abs(fpo.frechet_reward(z, z.mean(0), torch.cov(z.T))) < 1e-12
    few = torch.randn(3, 8, generator=seeded(5), dtype=torch.float64)
    assert abs(fpo.frechet_reward(few, few.mean(0), torch.cov(few.T))) < 1e-7
    same = torch.ones(4, 3, requires_grad=True)                                 # no spread at all
    fpo.frechet_reward(same, torch.zeros(3), torch.eye(3)).backward()
    assert same.grad.isfinite().all()


def test_the_frechet_reward_of_fewer_white_features_than_dimensions_wants_too_small_a_spread():
    B, D = 16, 128
    z, scales = torch.randn(B, D, generator=seeded(6), dtype=torch.float64), torch.arange(0.05, 1.5, 0.01)
    rewards = torch.stack([fpo.frechet_reward(c * (z - z.mean(0)), torch.zeros(D), torch.eye(D)) for c in scales])
    assert abs(scales[rewards.argmax()] - math.sqrt((B - 1) / D)) < 0.03        # 0.34, where 1 is right


def test_pooled_features_are_means_of_unit_tokens_also_of_int8_and_16_bits():
    h = torch.tensor([[[3.0, 4.0], [0.0, -7.0]]])
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        z = fpo.pooled(h.to(dtype))
        assert torch.allclose(z, torch.tensor([[0.3, -0.1]])) and z.dtype == torch.float32


def test_perceptual_distance_sees_a_shift_at_every_scale_and_a_checkerboard_at_the_finest_only():
    x = torch.randn(2, 3, 8, 8, generator=seeded(7))
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    x_hat = x + torch.stack([0.5 * torch.ones(3, 8, 8), board.expand(3, 8, 8)])
    assert torch.allclose(fpo.perceptual_distance(x_hat, x), torch.tensor([0.5, 1 / 4]), atol=1e-6)  # of four scales


def test_stability_is_0_for_equal_directions_minus_2_for_orthogonal_tokens_and_has_a_gradient_on_one_side():
    h, _ = some_tokens(8)
    turned = torch.stack([-h[..., 1], h[..., 0]], -1).detach()
    assert fpo.stability_reward(h, 3 * h).abs().max() < 1e-12
    assert torch.allclose(fpo.stability_reward(h[..., :2], turned), torch.tensor(-2.0).double())
    assert torch.allclose(fpo.stability_reward(h, -h), torch.tensor(-4.0).double())
    near = torch.randn(h.shape, generator=seeded(9), dtype=torch.float64).requires_grad_()
    fpo.stability_reward(h, near).sum().backward()
    assert near.grad is None and h.grad.abs().sum() > 0
    a, b = h.detach()[0, :1], near.detach()[0, :1]
    drift = (a / a.norm() - b / b.norm()).square().sum()
    assert torch.allclose(fpo.stability_reward(a[None], b[None]), -drift)


def test_moving_moments_are_those_of_the_moving_first_and_second_moments_and_are_saved_safely():
    moments, first, second, decay = None, None, None, 0.9
    for step in range(20):
        x = some_rewards(step).T + 0.1 * step
        moments = fpo.moving_moments(x, moments, decay)
        one, two = x.mean(0), x.T @ x / 32
        first = one if step == 0 else decay * first + (1 - decay) * one
        second = two if step == 0 else decay * second + (1 - decay) * two
    assert torch.allclose(moments[0], first)
    assert torch.allclose(moments[1], second - torch.outer(first, first), atol=1e-9)
    file = io.BytesIO()
    torch.save(moments, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(moments, again, strict=True))


def test_a_reward_that_is_constant_within_a_batch_has_its_variance_across_steps():
    moments, values = None, torch.randn(4000, generator=seeded(10), dtype=torch.float64) * 0.2
    for value in values:
        moments = fpo.moving_moments(value.expand(4, 1), moments, decay=0.999)
    assert abs(moments[1].item() / 0.04 - 1) < 0.15


def test_the_terms_are_mean_deviation_and_scale_of_the_total_reward_with_its_correlations():
    rewards = some_rewards(11)
    rewards[1] += rewards[0]
    w, mu, sigma, scale = fpo.vrpo_terms(fpo.moving_moments(rewards.T), eta=0.5, floor=0.0)
    R = 0.3 * rewards[0] + 0.5 * rewards[1] + 0.2 * rewards[2]
    for ours, direct in zip((mu, sigma, scale), (R.mean(), R.std(unbiased=False), 1 + 0.5 * R.var(unbiased=False))):
        assert torch.allclose(ours, direct)
    still = fpo.moving_moments(torch.zeros(5, 3))
    assert fpo.vrpo_terms(still)[2] == 0.05 and fpo.vrpo_loss(torch.zeros(3, 5), still).isfinite().all()


def test_the_normalised_reward_is_bounded_whatever_the_rewards():
    moments, decay = None, 0.99
    for step in range(30):
        rewards = some_rewards(step, B=8)
        rewards[0, 3] = -10.0 ** (step % 7)                                     # an outlier that comes without warning
        moments = fpo.moving_moments(rewards.T, moments, decay)
        assert fpo.vrpo_loss(rewards, moments, eta=0.0, floor=0.0).abs().max() < math.sqrt(8 / (1 - decay))
    quiet = fpo.moving_moments(torch.zeros(8, 3).double())
    late = fpo.moving_moments(rewards.T * 1e9, quiet, decay)
    assert fpo.vrpo_loss(rewards * 1e9, late, eta=0.0).abs().max() > 10         # and the bound is not idle


def test_a_constant_added_to_the_rewards_changes_neither_loss_nor_gradient():
    shift, out = torch.tensor([[-3.0], [0.7], [2.0]]).double(), []
    for constant in (0 * shift, shift):
        moments = None
        for step in range(3):
            rewards = (some_rewards(step) + constant).requires_grad_()
            moments = fpo.moving_moments(rewards.T, moments)
        loss = fpo.vrpo_loss(rewards, moments)
        out.append(torch.cat([loss[None], torch.autograd.grad((loss ** 2).sum(), rewards)[0]]))
    assert torch.allclose(*out)


def test_the_gradient_averaged_over_processes_is_that_of_one_process():
    B, world = 24, 3
    y = some_tokens(14)[1]
    near, d = some_tokens(15)[1], torch.rand(B, generator=seeded(16), dtype=torch.float64)
    C = torch.cov(fpo.pooled(y).T)

    def gradient(mine, processes):
        h = some_tokens(14)[0]
        z = fpo.pooled(h[mine])
        own = processes * z - (processes - 1) * z.detach()                      # the value of z, its gradient times 3
        everyone = fpo.pooled(h).detach().index_copy(0, torch.arange(B)[mine], own)
        frechet = fpo.frechet_reward(everyone, fpo.pooled(y).mean(0), C)
        rewards = torch.stack([frechet - d, -fpo.alignment_loss(h, y), fpo.stability_reward(h, near)])
        moments = fpo.moving_moments(rewards.T)                                 # what all processes gather
        return torch.autograd.grad(fpo.vrpo_loss(rewards[:, mine], moments).mean(), h)[0]

    split = sum(gradient(slice(k * 8, k * 8 + 8), world) for k in range(world)) / world
    assert torch.allclose(split, gradient(slice(None), 1), atol=1e-12)


def test_theorem_6_fails_the_alignment_gradient_grows_as_the_reward_settles_and_the_bias_stays():
    y = torch.tensor([1.0, 0.0])
    target = torch.tensor([0.6, 0.8])                                       # what the velocity loss alone would find

    def train(alignment):
        """theta under |theta - target|^2 / 2 + alignment(theta + noise), the noise of the features falling to 1 %."""
        theta, ratios, generator = torch.tensor([0.0, 1.0], requires_grad=True), [], seeded(17)
        for step in range(800):
            h = theta + 0.3 * 0.99 ** min(step, 460) * torch.randn(64, 1, 2, generator=generator)
            r = -fpo.alignment_loss(h, y.expand_as(h))
            (static,) = torch.autograd.grad(-r.mean(), theta, retain_graph=True)
            (gradient,) = torch.autograd.grad(alignment(r), theta, retain_graph=True)
            ratios.append((gradient.norm() / static.norm()).item())
            with torch.no_grad():
                theta -= 0.02 * (theta - target + gradient)
        return theta.detach(), ratios

    history = []

    def vrpo(r):
        rewards = torch.stack([0 * r, r])
        history.append(fpo.moving_moments(rewards.T, history[-1] if history else None))
        return 0.1 * fpo.vrpo_loss(rewards, history[-1], weights=(0.0, 1.0), floor=0.05).mean()

    (ours, ratios), (repa, _) = train(vrpo), train(lambda r: -0.1 * r.mean())
    scales = [fpo.vrpo_terms(m, (0.0, 1.0))[3].item() for m in (history[20], history[-1])]
    print(f"\nsettling reward: gradient over REPA's {ratios[20]:.2f} -> {ratios[-1]:.2f}; lambda / lambda_0 "
          f"{scales[0]:.4f} -> {scales[1]:.4f}; bias {(ours - target).norm():.3f}, REPA {(repa - target).norm():.3f}")
    assert scales[0] > scales[1] > 1                                            # Eq. 14 does weaken, towards lambda_0
    assert ratios[-1] > 3 * ratios[20] and ratios[-1] == pytest.approx(0.1 / 0.05, rel=1e-2)     # Eq. 7 outweighs it
    assert (ours - target).norm() > 2 * (repa - target).norm() > 0.02


# ----------------------------------------------------------------------------------------------------------
# VR-sampling


def direct_posterior_variance(x, snr, eps):
    """The paper's way: form every x_t, compare it with every point, average (without Eq. 3.3's missing 1/K)."""
    V = []
    for s in (1 / snr).tolist():
        x_t = (x[:, None] + s * eps).reshape(-1, x.shape[1])                                     # x_t / alpha, (M K, d)
        w = torch.softmax(-torch.cdist(x_t, x).square() / (2 * s * s), 1)
        V.append((x.square().sum(1).mean() - (w @ x).square().sum(1).mean()) / x.shape[1])
    return torch.stack(V)


def test_posterior_variance_equals_the_direct_formula():
    x = torch.randn(60, 5, generator=seeded(10), dtype=torch.float64)
    x = x - x.mean(0)
    snr = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64).clamp_min(1e-6)
    eps = torch.randn(3000, 5, generator=seeded(11), dtype=torch.float64)
    ours = fpo.posterior_variance(x, snr, 3000, seeded(11))
    torch.testing.assert_close(ours, direct_posterior_variance(x, snr, eps), rtol=0.02, atol=3e-3)


def test_posterior_variance_equals_quadrature_in_one_dimension():
    x = torch.tensor([[-1.0], [-0.2], [0.3], [1.5]], dtype=torch.float64)
    snr = torch.tensor([0.2, 1.0, 3.0, 30.0], dtype=torch.float64)
    z = torch.linspace(-60, 60, 400_001, dtype=torch.float64)                                    # x_t / alpha
    for s, V in zip(1 / snr, fpo.posterior_variance(x, snr, 50_000, seeded(12))):
        density = torch.exp(-(z - x).square() / (2 * s * s)) / (s * math.sqrt(2 * math.pi))      # (4, z)
        w = density / density.sum(0).clamp_min(1e-300)
        variance = (w * x.square()).sum(0) - (w * x).sum(0).square()
        exact = torch.trapezoid(variance * density.mean(0), z)
        assert abs(V - exact) < 0.02 * exact + 1e-12


def test_posterior_variance_survives_tight_clusters_far_apart():
    pair = torch.tensor([[0.0, 0.0], [1e-3, 0.0]], dtype=torch.float64)
    both, snr = torch.cat([pair, pair + 50]), torch.tensor([1e3], dtype=torch.float64)           # 50 / s = 5e4: underflow
    alone = fpo.posterior_variance(pair, snr, 20_000, seeded(13))
    assert alone > 0
    torch.testing.assert_close(fpo.posterior_variance(both, snr, 20_000, seeded(13)), alone, rtol=0.02, atol=0)


def test_monte_carlo_is_at_most_the_gaussian_closed_form_which_is_exact_for_gaussian_data():
    x = torch.randn(400, 2, generator=seeded(14), dtype=torch.float64) * torch.tensor([1.0, 0.3])
    snr = torch.logspace(-2, 2, 30, dtype=torch.float64)
    mc, gaussian = fpo.posterior_variance(x, snr, 500, seeded(15)), fpo.gaussian_posterior_variance(x, snr)
    assert (mc >= 0).all() and (mc <= gaussian * 1.02).all()
    assert mc[-1] < 0.2 * gaussian[-1]                                                           # the points have separated
    lam = torch.tensor([1.0, 0.09], dtype=torch.float64)
    torch.testing.assert_close(gaussian, (lam / (1 + snr[:, None] ** 2 * lam)).mean(1), rtol=0.2, atol=0)
    assert fpo.gaussian_posterior_variance(x[:2].repeat(1, 9), torch.tensor([math.inf])) == 0      # at t = 0, of rank 1
    torch.testing.assert_close(fpo.gaussian_posterior_variance(x[:2].T, snr), fpo.gaussian_posterior_variance(x[:2].T.repeat(9, 1), snr))


@paths
def test_h_squared_v_is_the_irreducible_velocity_loss(path):
    n, variance, t = 200_000, 0.5, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x = variance ** 0.5 * torch.randn(n, 1, generator=seeded(16), dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path(t)
    V = fpo.gaussian_posterior_variance(x[:50_000], alpha / sigma)
    curve = ((d_alpha * sigma - alpha * d_sigma) / sigma) ** 2 * V
    for k in range(3):
        x_t, v = fpo.interpolate(x, torch.randn(n, 1, generator=seeded(17), dtype=torch.float64), t[k].expand(n), path)
        residual = (v - (x_t * v).sum() / (x_t * x_t).sum() * x_t).square().mean()
        assert abs(residual / curve[k] - 1) < 0.02
    pdf = fpo.vr_density(V, t, path, uniform=0.2)
    flat = 0.2 / (t[-1] - t[0])
    torch.testing.assert_close((pdf - flat)[1:] / (pdf - flat)[:-1], curve[1:] / curve[:-1])      # the mixture's other part is curve
    assert abs(torch.trapezoid(pdf, t) - 1) < 1e-9


def test_inverse_cdf_draws_the_density_and_round_trips():
    t = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    pdf = 6 * t * (1 - t)                                                                       # Beta(2, 2): CDF 3 t^2 - 2 t^3
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    drawn = fpo.sample_timesteps(u, t, pdf)
    assert (drawn.diff() > 0).all() and drawn[0] == t[0] and drawn[-1] <= t[-1]
    torch.testing.assert_close(3 * drawn ** 2 - 2 * drawn ** 3, u, rtol=0, atol=1e-4)
    u = torch.rand(4000, generator=seeded(18))
    assert abs(fpo.sample_timesteps(u, t, pdf).mean() - 0.5) < 0.02 and fpo.sample_timesteps(u, t, pdf).dtype == torch.float32


def test_kolmogorov_smirnov_recovers_the_location_of_a_logit_normal():
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for m in (-1.25, 0.0, 0.75):
        pdf = torch.exp(-(torch.logit(t) - m) ** 2 / 2) / (t * (1 - t)) / math.sqrt(2 * math.pi)
        found, distance = fpo.logit_normal_location(t, pdf)
        assert found == m and distance < 0.01
        drawn = fpo.logit_normal_timesteps(torch.rand(20_000, generator=seeded(19)), m)
        assert abs(torch.logit(drawn).mean() - m) < 0.03 and abs(torch.logit(drawn).std() - 1) < 0.03
    assert fpo.logit_normal_timesteps(torch.tensor([0.0])).tolist() == [0]


def test_vr_density_is_200_times_cheaper_than_the_direct_formula():
    x = torch.randn(200, 4096, generator=seeded(20))
    alpha, sigma, _, _ = fpo.linear((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    start = time.perf_counter()
    fpo.posterior_variance(x, alpha / sigma, 500, seeded(21))
    ours = time.perf_counter() - start
    start = time.perf_counter()
    direct_posterior_variance(x, (alpha / sigma)[950:951], torch.randn(50, 4096, generator=seeded(22)))
    direct = (time.perf_counter() - start) * 10 * 1000                                           # 1 of 1000 timesteps, 50 of 500 noises
    print(f"\nVR density, M = 200, K = 500, 1000 timesteps, d = 4096: {ours:.1f} s; direct formula {direct:.0f} s: ratio {direct / ours:.0f}")
    assert direct > 200 * ours


# ----------------------------------------------------------------------------------------------------------
# Samplers


def end_error(sampler, v):
    z = torch.linspace(-2, 2, 64, dtype=torch.float64).repeat(2, 1).T.contiguous()
    z[:, 1] = z[:, 1].flip(0)
    exact = fpo.dopri5(v, z, 1e-10, 1e-10)
    return (sampler(z) - exact).abs().amax(1).median().item()


@pytest.mark.parametrize("path", [fpo.linear, fpo.cosine], ids=["linear", "cosine"])
def test_euler_converges_with_order_1_and_heun_with_order_2(path):
    v = lambda x, t: Mixture().velocity(x, t, path)
    for sampler, order in ((fpo.euler, 1), (fpo.heun, 2)):
        coarse, fine = (end_error(lambda z: sampler(v, z, n), v) for n in (100, 200))
        assert abs(math.log2(coarse / fine) - order) < 0.25


def test_dopri5_keeps_its_tolerance_and_does_not_depend_on_the_batch():
    v = fpo.counted(lambda x, t: Mixture().velocity(x, t, fpo.linear))
    errors = [end_error(lambda z: fpo.dopri5(v, z, tol, tol), v) for tol in (1e-3, 1e-5, 1e-7)]
    assert errors[0] < 1e-2 and errors[1] < 1e-4 and errors[2] < 1e-6
    z = torch.randn(9, 2, generator=seeded(23))
    v.nfe = 0
    whole = fpo.dopri5(v, z)
    assert 7 <= v.nfe < 300 and whole.dtype == torch.float32
    rounds = (v.nfe - 1) // 6
    assert torch.equal(fpo.dopri5(v, z, max_steps=rounds), whole)
    with pytest.raises(ArithmeticError, match=f"after {rounds - 1} steps"):
        fpo.dopri5(v, z, max_steps=rounds - 1)
    torch.testing.assert_close(torch.cat([fpo.dopri5(v, z[:2]), fpo.dopri5(v, z[2:])]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("w, last", [(0.0, 0.04), (1.0, 0.04), (2.0, 0.04), (2.0, 0.0)])
def test_the_sde_ends_with_the_mean_and_covariance_of_the_data(w, last):
    mean, root = torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([[0.8, 0.0], [0.5, 0.4]], dtype=torch.float64)
    cov, eye = root @ root.T, torch.eye(2, dtype=torch.float64)

    def v(x, t):                                                     # E[v | x_t] of Gaussian data, linear path
        a, s = 1 - t[0], t[0]
        return -mean + (x - a * mean) @ torch.linalg.solve(a * a * cov + s * s * eye, s * eye - a * cov)

    z = torch.randn(40_000, 2, generator=seeded(24), dtype=torch.float64)
    x = fpo.euler_maruyama(v, z, 400, fpo.linear, w, last, seeded(25))
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=0.025)


def test_without_noise_the_sde_sampler_is_euler():
    v, z = lambda x, t: Mixture().velocity(x, t, fpo.linear), torch.randn(5, 2, generator=seeded(26))
    torch.testing.assert_close(fpo.euler_maruyama(v, z, 20, w=0.0, last=0.0), fpo.euler(v, z, 20))
    with pytest.raises(RuntimeError):                                                            # one noise for all of them
        fpo.euler_maruyama(v, z, 20, generator=[seeded(0)])


def test_guidance_acts_in_its_interval_only_and_computes_nothing_outside():
    seen = []

    def model(x, t, y):
        seen.append((len(x), y.tolist()))
        return x * 0 + (y.float() + t)[:, None]

    x, y = torch.zeros(2, 1), torch.tensor([3, 5])
    v = fpo.guided(model, y, scale=2.0, interval=(0.2, 0.7), null=10)
    assert v(x, torch.tensor([0.9, 0.1])).flatten().tolist() == pytest.approx([3.9, 5.1]) and seen[-1] == (2, [3, 5])
    assert v(x, torch.tensor([0.9, 0.5])).flatten().tolist() == pytest.approx([3.9, 10.5 + 2 * (5.5 - 10.5)]) and seen[-1] == (3, [3, 5, 10])
    fpo.guided(model, y)(x, torch.tensor([0.5, 0.5]))
    assert seen[-1][0] == 2
    with pytest.raises(ValueError, match="null"):
        fpo.guided(model, y, 2.0)


# ----------------------------------------------------------------------------------------------------------
# MeanFlow: the average velocity, and which velocity belongs in the Jacobian-vector product [MF, LV]

SPREAD = torch.tensor([0.5, 2.0], dtype=torch.float64)                  # Gaussian data N(0, diag(SPREAD^2)): everything is a formula


def gaussian_velocity(x, t):
    t = t[:, None]
    return x * (t - (1 - t) * SPREAD ** 2) / ((1 - t) ** 2 * SPREAD ** 2 + t ** 2)


def gaussian_average_velocity(z, r, t):
    """The flow keeps x_t / q_t, the standard deviation: x_r = x_t q_r / q_t."""
    r, t = r[:, None], t[:, None]
    q_r, q_t = (((1 - s) ** 2 * SPREAD ** 2 + s ** 2).sqrt() for s in (r, t))
    return z * (1 - q_r / q_t) / (t - r)


def test_the_average_velocity_of_gaussian_data_obeys_meanflow_s_identity_and_is_the_flow_s_displacement_over_time():
    g = seeded(50)
    z, t = torch.randn(200, 2, generator=g).double(), 0.1 + 0.9 * torch.rand(200, generator=g).double()
    r = 0.9 * t * torch.rand(200, generator=g).double()
    v = gaussian_velocity(z, t)
    T, u = fpo.mean_flow_target(gaussian_average_velocity, z, r, t, v, v), gaussian_average_velocity(z, r, t)
    print(f"identity: {(T - u).abs().max():.1e}")
    torch.testing.assert_close(T, u, rtol=0, atol=1e-12)
    displacement = z - fpo.dopri5(gaussian_velocity, z, 1e-10, 1e-10, end=0.3)      # a second oracle: the integral itself
    u = gaussian_average_velocity(z, torch.full_like(t, 0.3), torch.ones_like(t))
    torch.testing.assert_close(displacement / 0.7, u, rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps_from_noise_gives_the_data_s_standard_deviations(steps):
    x = torch.randn(1000, 2, generator=seeded(51)).double()
    x = x / x.std(0)
    torch.testing.assert_close(fpo.mean_flow(gaussian_average_velocity, x, steps).std(0), SPREAD, rtol=0, atol=1e-12)


def test_the_target_takes_expanded_tensors_of_any_shape_and_has_no_gradient():
    z, r, t = torch.randn(1, 3, 4, generator=seeded(52)), torch.tensor([0.2]), torch.tensor([0.7])
    scale = torch.tensor(2.0, requires_grad=True)
    u = lambda z, r, t: scale * z.square() * (t * r)[:, None, None]
    T = fpo.mean_flow_target(u, z.expand(5, 3, 4), r.expand(5), t.expand(5), z.expand(5, 3, 4), z.expand(5, 3, 4))
    du = 2 * (2 * z * z * 0.14 + z.square() * 0.2)                      # d_z u z + d_t u by hand
    torch.testing.assert_close(T, (z - 0.5 * du).expand(5, 3, 4))
    assert not T.requires_grad


POINTS = [([0.3, 0.1], 0.1, 0.6), ([-0.8, 0.4], 0.0, 0.5), ([1.1, -0.2], 0.3, 0.8), ([0.2, -0.9], 0.0, 0.9)]


def any_u(z, r, t):
    """Neither symmetric nor monotone nor the average velocity of anything."""
    M = torch.tensor([[1.2, -0.7], [0.4, 0.9]], dtype=torch.float64)
    return torch.sin(z @ M.T + r[:, None]) * (1 + t[:, None] ** 2) + 0.3 * z


def at_a_point(z, r, t, n=400_000):
    """Draws of v given z on the 8 Gaussians, by component and then within it; E[v | z], Cov[v | z], A and E[T | z] by autograd."""
    data, g = DATA_2D["8 Gaussians"], seeded(53)
    z, r, t = (torch.tensor(a, dtype=torch.float64) for a in (z, r, t))
    q2 = (1 - t) ** 2 * data.s ** 2 + t ** 2
    weight = torch.softmax(-(z - (1 - t) * data.c).square().sum(1) / (2 * q2), 0)
    k = torch.multinomial(weight, n, replacement=True, generator=g)
    x = (t ** 2 * data.c[k] + (1 - t) * data.s ** 2 * z) / q2 + data.s * t / q2.sqrt() * torch.randn(n, 2, generator=g).double()
    velocity = lambda z: data.velocity(z[None], t[None])[0]
    u = lambda z, t: any_u(z[None], r[None], t[None])[0]
    jacobian, eye = torch.autograd.functional.jacobian, torch.eye(2, dtype=torch.float64)
    cov = (eye - t * jacobian(velocity, z)) / (1 - t)                   # on the linear path
    J, d_t = jacobian(u, (z, t))
    mean = velocity(z)
    many = z.expand(n, 2), r.expand(n), t.expand(n)
    return (z - x) / t, mean, cov, (t - r) * J, mean - (t - r) * (J @ mean + d_t), many    # eps - x = (z - x) / t


@pytest.mark.parametrize("point", POINTS)
def test_the_target_s_mean_does_not_depend_on_lambda_and_its_covariance_is_the_predicted_one(point):
    v, mean, cov, A, mean_T, many = at_a_point(*point)
    for lam in (1, 0.5, 0, -0.5):
        T = fpo.mean_flow_target(any_u, *many, v, mean + lam * (v - mean))
        error = (T.mean(0) - mean_T) / (T.std(0) / len(T) ** 0.5)
        assert error.abs().max() < 4, (lam, error)
        B = torch.eye(2, dtype=torch.float64) - lam * A
        predicted, measured = (B @ cov @ B.T).trace(), T.var(0).sum()
        print(f"z, r, t = {point}, lambda = {lam}: tr Cov T {measured:.4f}, predicted {predicted:.4f}")
        assert abs(measured / predicted - 1) < 0.01
    oracle = fpo.mean_flow_target(any_u, *(a[:1] for a in many), mean[None], mean[None])
    torch.testing.assert_close(oracle[0], mean_T)


@pytest.mark.parametrize("point", POINTS)
def test_lambda_star_is_where_the_target_s_variance_is_least(point):
    v, mean, cov, A, _, many = at_a_point(*point, n=100_000)
    variance = lambda lam: fpo.mean_flow_target(any_u, *many, v, mean + lam * (v - mean)).var(0).sum()
    low, high = -5.0, 5.0
    while high - low > 1e-3:                                            # ternary search, which knows no formula
        a, b = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, b) if variance(a) < variance(b) else (a, high)
    formula, found = (A @ cov).trace() / (A @ cov @ A.T).trace(), (low + high) / 2
    sampled = fpo.control_coefficient(v - mean, (v - mean) @ A.T)
    print(f"z, r, t = {point}: lambda* {formula:.3f}, by search {found:.3f}, from samples {sampled:.3f}")
    assert abs(formula - found) < 1e-2 and abs(formula - sampled) < 1e-2


def test_the_adaptive_weight_of_a_sample_biases_the_target_and_that_of_its_cell_does_not():
    """At u = E[T | z], where the gradient without weights is 0 on average, lambda = 0; in standard errors over batches of 1,000."""
    v, mean, _, _, mean_T, many = at_a_point([0.5, 0.1], 0.1, 0.6)
    T = fpo.mean_flow_target(any_u, *many, v, mean.expand_as(v))
    usual = toy2d.running(5)
    pulls = {"none": [], "sample": [], "cell": []}
    for T, r, t in zip(*(a.float().split(1000) for a in (T, *many[1:]))):
        L = (mean_T - T).square().sum(1)[None].float()
        by_cell = usual(L, torch.ones_like(L), r[None], t[None])
        for kind, scale in zip(pulls, (torch.ones_like(L), L, by_cell)):
            pulls[kind].append(((mean_T - T) / (scale[0, :, None] + 1e-3)).mean(0))
    z = {}
    for kind, pull in pulls.items():
        pull = torch.stack(pull)
        z[kind] = (pull.mean(0) / (pull.std(0) / len(pull) ** 0.5)).abs().max()
    print("bias in standard errors:", {kind: f"{a:.1f}" for kind, a in z.items()})
    assert z["none"] < 4 and z["cell"] < 4 and z["sample"] > 20


def test_running_ratios_come_from_earlier_batches_in_the_same_cell_alone():
    g = seeded(54)
    usual, sums = toy2d.running(2), torch.ones(3, 2, 2, 2)              # network, cell of r, cell of t, a or b
    for _ in range(5):
        a, b, r, t = torch.rand(4, 3, 8, generator=g)
        cell = [[(int(2 * r[s, i]), int(2 * t[s, i])) for i in range(8)] for s in range(3)]
        expected = [[sums[s][cell[s][i]][0] / sums[s][cell[s][i]][1] for i in range(8)] for s in range(3)]
        torch.testing.assert_close(usual(a, b, r, t), torch.tensor(expected))
        sums = 0.99 * sums
        for s, i in itertools.product(range(3), range(8)):
            sums[s][cell[s][i]] += torch.stack([a[s, i], b[s, i]])


def test_the_losses_of_meanflow_are_those_of_their_weighting_and_where_r_is_t_the_target_is_v():
    seeds = [3, 4] * 3
    batch, params = next(toy2d.pairs(DATA_2D["8 Gaussians"], seeds, 1)), toy2d.new_nets(range(6))
    z, r, t, v, mean = batch
    h = toy2d.N // 2
    assert (r[:, :h] == t[:, :h]).all() and (r[:, h:] < t[:, h:]).all() and torch.equal(z[:2], z[4:])
    u = lambda z, r, t: toy2d.forward(params, z, t, r)
    late = fpo.mean_flow_target(u, z[:, h:], r[:, h:], t[:, h:], v[:, h:], (v + mean)[:, h:] / 2)
    T = torch.cat([v[:, :h], late], 1)
    L = (u(z, r, t) - T).square().sum(-1).detach()
    usual, ours = toy2d.running(5), toy2d.running(5)
    for _ in range(2):                                                  # the second time the running mean is not 1 any more
        scale = usual(L, torch.ones_like(L), r, t)
        expected = torch.cat([L[:2] / 1.001, (L / (L + 1e-3))[2:4], (L / (scale + 1e-3))[4:]]).mean(1)
        loss = toy2d.mean_flow_loss(functools.partial(toy2d.at, 0.5), ours, params, *batch)
        torch.testing.assert_close(loss.detach(), expected)


def test_the_gradient_s_variance_is_that_of_gradients_at_each_lambda():
    seeds = [3, 4] * 3
    batches, params = list(toy2d.pairs(DATA_2D["8 Gaussians"], seeds, 5)), toy2d.new_nets(seeds)
    _, V = toy2d.gradient_variance(params, batches)
    direct = []
    for lam in (1, 0.5):
        g = []
        for batch in batches:
            L = toy2d.mean_flow_loss(functools.partial(toy2d.at, lam), toy2d.running(1), params, *batch)
            g.append(torch.cat([p[:2].flatten(1) for p in torch.autograd.grad(L.sum(), params)], 1))
        direct.append(torch.stack(g).var(0).sum(1))
    torch.testing.assert_close(V[:, toy2d.LAMBDAS.index(0.5)], direct[1] / direct[0], rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------------------------
# Every function of fpo.py lifts out alone


def lift_out_arguments(name):
    """Small arguments for any function of fpo.py."""
    g = seeded(95)
    x, t, losses, h = torch.randn(2, 4, 2, 4, 4, generator=g), torch.rand(4, generator=g), torch.rand(8, generator=g), torch.randn(2, 4, 5, 6, generator=g)
    snr, moments = torch.linspace(9, 0.1, 20), (torch.zeros(3), torch.eye(3))
    v = lambda x, t: -x
    u = lambda z, r, t: z.sin() * (t - r)[:, None, None, None]
    by_argument = dict(t=t, x=x[0], eps=x[1], v=x[1], v_hat=x[0], x_t=x[0], x_hat=x[1], eps_hat=x[1], h=h[0], y=h[1], h_near=h[1], losses=losses,
                       w=losses, r=0.8, beta=2.0, tau=1.0, z=h[0, :, 0], mean=torch.zeros(6), cov=torch.eye(6), variance=torch.rand(3, generator=g), u=t,
                       moments=moments, rewards=torch.randn(3, 8, generator=g), snr=snr, pdf=torch.ones(20), steps=3, model=lambda x, t, y: -x)
    special = {"pooled": (h[0],), "centred": (losses, losses), "moving_moments": (h[0, 0],), "posterior_variance": (h[0, :, 0], snr), "gaussian_posterior_variance": (h[0, :, 0], snr),
               "in_float32": (h[0],), "posterior_spread": (torch.eye(4), torch.ones(4), h[0, :, 0], 0.5), "loss_scale": (t, "x", "v"),
               "dopri5_step": (v, x[0], t, t / 9, -x[0]), "vr_density": (snr, snr.flip(0) / 10), "sample_timesteps": (t, snr.flip(0), torch.ones(20)), "hard_sample_weights": (losses,),
               "logit_normal_location": (snr.flip(0) / 10, torch.ones(20)), "counted": (v,), "guided": (lambda x, t, y: -x, torch.zeros(4)),
               "mean_flow_target": (u, x[0], t / 2, t, x[1], x[0]), "control_coefficient": (h[0], h[1]), "mean_flow": (u, x[0], 3)}
    if name in ("euler", "heun", "dopri5", "euler_maruyama", "widened"):
        return (v, x[0]) + (3,) * (name not in ("dopri5", "widened"))
    required = [p.name for p in inspect.signature(getattr(fpo, name)).parameters.values() if p.default is p.empty]
    return special.get(name) or tuple(by_argument[n] for n in required)


@pytest.mark.parametrize("name", [n for n, f in vars(fpo).items() if inspect.isfunction(f)])
def test_function_runs_from_its_own_source_torch_and_the_neighbours_its_docstring_names(name):
    function = getattr(fpo, name)
    text = " ".join(function.__doc__.split())
    needs = text.split("Needs ")[1].split(".")[0].split(", ") if "Needs " in text else []
    default = [p.default.__name__ for p in inspect.signature(function).parameters.values() if inspect.isfunction(p.default)]
    names, todo = set(), [inspect.unwrap(function).__code__]
    while todo:                                                       # the global names it and its inner functions use
        code = todo.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        todo += [c for c in code.co_consts if inspect.iscode(c)]
    assert names <= {"torch", "math", "F", name, *needs, *default, *dir(builtins)}, names
    alone = dict(torch=torch, math=math, F=F)
    for part in (*default, *reversed(needs), name):                   # sources alone: a neighbour's neighbour must be named, too
        exec(inspect.getsource(getattr(fpo, part)), alone)
    random, arguments = torch.get_rng_state(), lift_out_arguments(name)
    ours = alone[name](*arguments)
    torch.set_rng_state(random)
    theirs = function(*arguments)
    if name in ("counted", "guided"):
        ours, theirs = (f(arguments[1][:, None] if name == "guided" else torch.ones(2, 2), torch.ones(2)) for f in (ours, theirs))
    if name == "widened":
        ours, theirs = (f(x, 0.5) for f, x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------
# toy2d.py: the oracles and measures on which its figures rest


DATA_2D = race.data_sets()


def test_the_fisher_trace_is_e_J_JT_e():
    """[FPO Eq. 9] by the Jacobian of the network, a second derivation; with L = |e|^2 / 2 the constant M_F is 1."""
    params = toy2d.new_nets([3, 4])
    g = seeded(0)
    x_t, v, t = torch.randn(2, 5, 2, generator=g), torch.randn(2, 5, 2, generator=g), torch.rand(2, 5, generator=g)
    losses, traces = toy2d.fisher_traces(params, x_t, v, t)
    for s in range(2):
        for i in range(5):
            J = torch.autograd.functional.jacobian(
                lambda *p: toy2d.forward(p, x_t[s:s + 1, i:i + 1], t[s:s + 1, i:i + 1])[0, 0],
                tuple(p[s:s + 1] for p in params))
            J = torch.cat([j.reshape(2, -1) for j in J], 1)
            e = toy2d.forward([p[s:s + 1] for p in params], x_t[s:s + 1, i:i + 1], t[s:s + 1, i:i + 1])[0, 0] - v[s, i]
            torch.testing.assert_close(traces[s, i], e @ J @ J.T @ e, rtol=1e-4, atol=0)
            torch.testing.assert_close(losses[s, i], e @ e / 2)


def test_training_all_seeds_at_once_is_training_each_alone():
    policy = toy2d.fpo_of(64.0)                                  # ranks within a seed's batch: the seeds must not mix
    together = toy2d.train(DATA_2D["two moons"], [5, 6, 7], 12, *policy)
    for k, seed in enumerate((5, 6, 7)):
        alone = toy2d.train(DATA_2D["two moons"], [seed], 12, *policy)
        for a, b in zip(alone, together):
            torch.testing.assert_close(a[0], b[k], rtol=1e-3, atol=1e-4)


@paths
def test_the_exact_velocity_is_the_mean_of_v_given_x_t(path):
    """Oracle: self-normalised importance weights over samples, which knows nothing of the mixture's formulas."""
    data, g = DATA_2D["spiral"], seeded(0)
    x, t = data.sample(400_000, g).double(), torch.tensor(0.5, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path(t)
    for x_t in torch.tensor([[0.3, -0.5], [-0.8, 0.6]], dtype=torch.float64):
        eps = (x_t - alpha * x) / sigma
        w = torch.softmax(-eps.square().sum(1) / 2, 0)
        expected = w @ (d_alpha * x + d_sigma * eps)
        torch.testing.assert_close(data.velocity(x_t[None], t[None], path)[0], expected, rtol=0, atol=0.05)


@paths
def test_the_irreducible_loss_by_quadrature_is_that_of_samples(path):
    data, g, n = DATA_2D["8 Gaussians"], seeded(0), 100_000
    for t in (0.1, 0.4, 0.8):
        t = torch.tensor([t])
        x_t, v = fpo.interpolate(data.sample(n, g), torch.randn(n, 2, generator=g), t.expand(n), path)
        measured = fpo.velocity_loss(data.velocity(x_t, t.expand(n), path), v).mean().double()
        alpha, sigma, d_alpha, d_sigma = path(t.double())
        h = (d_alpha * sigma - alpha * d_sigma) / sigma
        torch.testing.assert_close((h ** 2 * data.variance(t, path))[0], measured, rtol=0.02, atol=0)


def test_random_sets_of_a_fraction_q_overlap_by_q_and_equal_ones_by_1():
    g = seeded(0)
    a, b = torch.randn(200, 1000, generator=g), torch.randn(200, 1000, generator=g)
    for q in toy2d.FRACTIONS:
        assert abs(toy2d.overlap(a, b, q).mean() - q) < 0.01
        assert toy2d.overlap(a, 3 * a + 1, q).min() == 1


def test_weights_1_over_pi_undo_the_density_of_t():
    V = DATA_2D["8 Gaussians"].variance(toy2d.GRID, points=61)
    timesteps, weights = race.unbiased(V)
    t = timesteps((torch.arange(100_000) + 0.5)[None] / 100_000)
    assert abs((weights(None, t) * torch.sin(3 * t)).mean() - (1 - math.cos(3)) / 3) < 2e-3    # integral of sin 3t


def test_the_study_s_race_has_eleven_policies_more_and_every_policy_gives_a_time_and_a_weight_to_each_sample(monkeypatch):
    monkeypatch.setattr(toy2d, "network_loss", lambda *_: 1 + 1 / toy2d.GRID)
    table, g = race.policies(DATA_2D["two moons"]), seeded(0)
    assert len(table) == len(toy2d.policies(DATA_2D["two moons"])) + 11
    u, losses = torch.rand(2, 3, toy2d.N, generator=g)
    for timesteps, weights in table.values():
        t = timesteps(u)
        c = weights(losses, t)
        assert t.shape == c.shape == u.shape and (0 <= t).all() and (t <= 1).all() and c.isfinite().all()


def test_distances_see_a_shift_as_large_as_it_is():
    g = seeded(0)
    y = torch.randn(2000, 2, generator=g)
    x = torch.stack([y, y + torch.tensor([0.3, 0.0])])
    near, far = toy2d.sliced_wasserstein(x, y)
    assert near < 1e-5 and abs(far - 0.3 * 2 / math.pi) < 2e-3                     # mean of |0.3 cos| over directions


@pytest.mark.parametrize("arguments, says", [("lottery", "'race'"), ("race --seeds 2", "4 or more"), ("race --steps many", "invalid int")])
def test_a_bad_toy2d_argument_is_answered_before_any_work(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *arguments.split()])
    with pytest.raises(SystemExit):
        toy2d.main(dict.fromkeys(toy2d.EXPERIMENTS), {}, "unused")
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_at_the_exact_velocity_fpo_still_pulls_towards_the_rare_blob_and_uniform_does_not():
    """E[c (v - v*) | x_t] would be 0 at FPO's minimiser if that were v*; no network is involved. Blobs of 80 % and 20 %."""
    data, g = toy2d.Mixture([[0.0, 0.0], [1.0, 0.0]], 0.15, [0.8, 0.2]), seeded(0)
    x, eps, t = data.sample(400_000, g), torch.randn(400_000, 2, generator=g), torch.full((400_000,), 0.7)
    x_t, v = fpo.interpolate(x, eps, t)
    pull = v - data.velocity(x_t, t)
    between = (x_t[:, 0].abs() < 0.5)
    means = {}
    for name, (_, weights) in {"uniform": (None, toy2d.ONES), "FPO": toy2d.fpo_of(2)}.items():
        c = weights(pull.square().mean(1).view(-1, toy2d.N), None).flatten()        # batches of N, ranked each by itself
        z = (c * pull[:, 0])[between]
        means[name] = z.mean() / (z.std() / len(z) ** 0.5)                         # in standard errors
    assert abs(means["uniform"]) < 3 and means["FPO"] < -8                         # v = eps - x: x is pulled to the right


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
    if changes.get("align") == "vrpo":
        changes["align_policy"] = "uniform"
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
    latents, labels, *_ = data.batch(np.array([3, 0, 3, 1]))
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
    monkeypatch.setattr(train_sit, "WORLD", 2)
    monkeypatch.setattr(train_sit.dist, "init_process_group", lambda *_, **__: None)
    assert "a multiple of" in run(training(folder, tmp_path, batch=7))


@pytest.mark.parametrize("changes", [
    {}, dict(timesteps="vr_loss", align="nt_xent"), dict(align="vrpo"),
    dict(predict="x", path="cosine", policy="uniform", align="none", timesteps="uniform")], ids=str)
def test_resume_is_exact(folder, tmp_path, changes):
    assert run(training(folder, tmp_path / "whole", **changes)) is None
    for steps in (3, 6):
        assert run(training(folder, tmp_path / "parts", steps=steps, **changes)) is None
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    for state in (whole, parts):
        state.pop("config")
        state["log"] = [row.rsplit(",", 1)[0] for row in state["log"]]       # without the speed
    leaves = list(zip(flat(whole), flat(parts), strict=True))
    assert len(leaves) > 200 and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in leaves)
    assert len(log_of(tmp_path / "parts")) == 6
    np.testing.assert_array_equal(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"))


def test_the_alignment_loss_stops_after_align_until(folder, tmp_path):
    for name, changes in (("until", dict(align_until=2)), ("weight_0", dict(repa_weight=0)), ("all", {})):
        assert run(training(folder, tmp_path / name, warmup=0, clip=0, **changes)) is None
    until, weight_0, all_ = (log_of(tmp_path / name)[:, 3] for name in ("until", "weight_0", "all"))     # gradient norms
    np.testing.assert_array_equal(until[:2], all_[:2])
    assert until[2] != all_[2] and abs(until[5] / weight_0[5] - 1) < abs(all_[5] / weight_0[5] - 1)


def test_a_bottleneck_in_the_patch_embedding_limits_its_rank_and_needs_no_other_change(folder, tmp_path):
    model = awake(train_sit.SiT(**MICRO, bottleneck=3))
    x = torch.randn(40, 1, 4, 4, generator=seeded(37))
    embed = lambda x: model.x_embedder(x).flatten(1)
    assert torch.linalg.matrix_rank(embed(x) - embed(0 * x[:1]), atol=1e-4) == 3
    assert run(training(folder, tmp_path, bottleneck=3)) is None
    assert run(sampling(tmp_path, tmp_path / "s"), sample) is None


def test_the_convolution_as_projector_sees_the_neighbours_of_a_token_and_no_others():
    model = awake(train_sit.SiT(**dict(train_sit.MODELS["micro"], size=20, channels=1, feature_dim=7, projector="conv")))
    h = torch.randn(2, 25, 64, generator=seeded(35))
    z = model.projectors[0](h)
    h[:, 12] += 1                                                    # the token in the middle of 5 x 5
    changed = (model.projectors[0](h) - z).abs().amax((0, 2)) > 1e-6
    assert z.shape == (2, 25, 7) and changed.view(5, 5)[1:4, 1:4].all() and changed.sum() == 9


def test_vr_logit_normal_draws_from_the_logit_normal_that_is_nearest_to_the_density(folder):
    cfg = train_sit.Config(data=folder, timesteps="vr_logit_normal", logit_std=0.8)
    density = train_sit.start_density(cfg, train_sit.Latents(folder), torch.device("cpu"))
    mean, _ = fpo.logit_normal_location(density["t"], density["pdf"], s=0.8)
    t = train_sit.TIMESTEPS[cfg.timesteps](torch.rand(20_000, generator=seeded(36)), density, cfg)
    assert abs(torch.logit(t).mean() - mean) < 0.03 and abs(torch.logit(t).std() - 0.8) < 0.03


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
    state, no_cls = dict(moments={}), torch.empty(3, 0)
    train_sit.vrpo_losses(z, features, state, cfg, model, out, x, eps, no_cls, no_cls, t, y).mean().backward()
    late = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.rsplit(".", 3)[0][:8] for name in late} == {"blocks.2", "blocks.3", "final_la"} and len(late) == 24
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name not in late)


# ----------------------------------------------------------------------------------------------------------
# REG: the class token denoised together with the image


REG = dict(MICRO, feature_dim=6, projector_width=32, cls_dim=6)
NEW_IN_REG = [f"{part}.{kind}" for part in ("cls_projectors2", "wg_norm", "final_layer.linear_cls")
              for kind in ("weight", "bias")]


def published_reg(state, x, t, y, c):
    """Oracle: REG's published network, micro, written from its state dict alone: v (B, 1, 8, 8), z, v_c (B, 6)."""
    linear = lambda h, name: h @ state[name + ".weight"].T + state[name + ".bias"]
    norm = lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    patches = x.reshape(-1, 1, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 16)
    h = patches @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"]
    first = norm(linear(c, "cls_projectors2")) * state["wg_norm.weight"] + state["wg_norm.bias"]
    h = torch.cat([first[:, None], h], 1) + state["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0"))
    condition = F.silu(linear(time, "t_embedder.mlp.2") + state["y_embedder.embedding_table.weight"][y])[:, None]
    for k in range(4):
        block = f"blocks.{k}."
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(condition, block + "adaLN_modulation.1").chunk(6, -1)
        q, k_, v = linear(norm(h) * (1 + scale_a) + shift_a, block + "attn.qkv").chunk(3, -1)
        heads = [torch.softmax(q[..., i] @ k_[..., i].mT / 32 ** 0.5, -1) @ v[..., i] for i in (slice(32), slice(32, 64))]
        h = h + gate_a * linear(torch.cat(heads, -1), block + "attn.proj")
        hidden = F.gelu(linear(norm(h) * (1 + scale_m) + shift_m, block + "mlp.fc1"), approximate="tanh")
        h = h + gate_m * linear(hidden, block + "mlp.fc2")
        if k == 1:
            z = linear(F.silu(linear(F.silu(linear(h, "projectors.0.0")), "projectors.0.2")), "projectors.0.4")
    shift, scale = linear(condition, "final_layer.adaLN_modulation.1").chunk(2, -1)
    h = norm(h) * (1 + scale) + shift
    image = linear(h[:, 1:], "final_layer.linear").reshape(-1, 2, 2, 4, 4).transpose(2, 3).reshape(-1, 1, 8, 8)
    return image, z, linear(h[:, 0], "final_layer.linear_cls")


@pytest.fixture(scope="session")
def reg_folder(folder, tmp_path_factory):
    """The folder above with the class tokens of REG."""
    new = shutil.copytree(folder, tmp_path_factory.mktemp("reg") / "data")
    np.save(new / "cls.npy", (1.4 * np.random.RandomState(1).randn(64, 8)).astype(np.float16))
    return new


def reg_flags(folder, out, **changes):
    return training(folder, out, reg_weight=0.03, timesteps="uniform", **changes)


def test_reg_s_state_dict_loads_from_its_file_and_gives_the_published_outputs(tmp_path):
    model = awake(train_sit.SiT(**REG))
    state = model.state_dict()
    assert sorted(state.keys() - train_sit.SiT(**{**REG, "cls_dim": 0}).state_dict().keys()) == sorted(NEW_IN_REG)
    assert state["pos_embed"].shape == (1, 5, 64) and (state["pos_embed"][0, 0] == 0).all()
    torch.save({"model": {}, "ema": state, "opt": {}, "steps": 9, "args": argparse.Namespace(cls=0.03)}, tmp_path / "reg.pt")
    loaded, config = train_sit.load_model(tmp_path / "reg.pt")
    (x, t, y), c = inputs(), torch.randn(3, 6, generator=seeded(90))
    for ours, theirs in zip(loaded(x, t, y, features=True, cls=c), published_reg(state, x, t, y, c), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert loaded(x, t, y, cls=c)[1] is None and config["step"] == 9


def test_a_new_reg_network_predicts_0_for_both_and_has_the_published_size():
    model, (x, t, y) = train_sit.SiT(**REG), inputs()
    v, _, v_cls = model(x, t, y, cls=torch.randn(3, 6))
    assert (v == 0).all() and (v_cls == 0).all() and v_cls.shape == (3, 6)
    with torch.device("meta"):
        xl = train_sit.SiT(**train_sit.MODELS["SiT-XL/2"], feature_dim=768, cls_dim=768)
    assert round(sum(p.numel() for name, p in xl.named_parameters() if "projectors.0" not in name) / 1e6) == 677


def test_reg_s_three_losses_are_means_with_one_t_and_noises_of_their_own(reg_folder, tmp_path):
    """A new network predicts 0, so the first row of the log is known; the alignment sees the class token first."""
    seen = []
    align = lambda z, features, x, eps, cls, eps_cls, t, **more: seen.append((x, eps, cls, eps_cls, t, z, features)) or (
        fpo.alignment_loss(z, features))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_sit.ALIGN, "watched", align)
        assert run(reg_flags(reg_folder, tmp_path, steps=2, align="watched")) is None
    x, eps, cls, eps_cls, t, z, features = seen[0]
    assert z.shape == (8, 5, 8) and torch.equal(features[:, 0], cls) and cls.dtype == torch.float16
    image, token = (eps - x).square().mean(), (eps_cls - cls.float()).square().mean()
    assert log_of(tmp_path)[0, 1] == pytest.approx((image + 0.03 * token).item(), rel=1e-5)
    assert eps_cls.flatten().std() > 0.7 and not torch.equal(eps_cls, seen[1][3])
    data = train_sit.Latents(reg_folder, features=True, cls=True)
    rows = train_sit.rows_of(0, train_sit.Config(batch=8), 64)
    np.testing.assert_array_equal(cls, np.load(reg_folder / "cls.npy")[rows])
    np.testing.assert_array_equal(features[:, 1:].float(), np.load(reg_folder / "features.npy")[rows])
    assert data.batch(rows)[3].shape == (8, 8)


@pytest.mark.parametrize("changes", [{}, dict(align="vrpo"), dict(align="none"), dict(align="nt_xent", bf16=True)], ids=str)
def test_reg_trains_with_every_alignment_resumes_exactly_and_samples(reg_folder, tmp_path, changes):
    assert run(reg_flags(reg_folder, tmp_path / "whole", **changes)) is None
    for steps in (3, 6):
        assert run(reg_flags(reg_folder, tmp_path / "parts", steps=steps, **changes)) is None
    whole, parts = saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole) and len(log_of(tmp_path / "parts")) == 6
    assert all((whole[name] != 0).any() for name in NEW_IN_REG)
    for sampler in sample.SAMPLERS:
        out = tmp_path / sampler
        assert run(sampling(tmp_path / "whole", out, sampler=sampler, guidance=2, cls_guidance=0.5), sample) is None
        assert np.load(out / "samples.npz")["arr_0"].shape == (10, 8, 8, 3)
        assert json.loads(str(np.load(out / "samples.npz")["settings"]))["cls_guidance"] == 0.5


@pytest.mark.parametrize("cls_guidance, theirs", [(-1, 2.3), (0, 1), (1.5, 1.5)])
def test_reg_s_guidance_has_a_scale_of_its_own_for_the_class_token(monkeypatch, cls_guidance, theirs):
    """Oracle: the SDE of the published script by hand, image and class token apart, on the same noises."""
    model, generators = awake(train_sit.SiT(**REG)), [seeded(train_sit.seed_of(5, -1 - k)) for k in range(3)]
    split, ends = train_sit.split_image, []
    monkeypatch.setattr(train_sit, "split_image", lambda *a: ends.append(split(*a)) or ends[-1])
    cfg = sample.Config(sampler="sde", steps=4, guidance=2.3, cls_guidance=cls_guidance, interval=(0, 0.85), seed=5)
    got, labels, _ = sample.generate(model, dict(predict="v", path="linear"), cfg, np.arange(3), torch.device("cpu"))
    rows = torch.stack([torch.randn(64 + 6, generator=g) for g in generators]).double()
    y = torch.cat([torch.randint(10, (1,), generator=g) for g in generators])
    assert y.tolist() == labels.tolist()
    x, c = rows[:, :64].reshape(3, 1, 8, 8), rows[:, 64:]
    times = [*torch.linspace(1, 0.04, 4, dtype=torch.float64).tolist(), 0.0]
    for now, then in zip(times, times[1:]):
        t = torch.full((3,), now)
        v, _, v_c = model(x.float(), t, y, cls=c.float())
        if now <= 0.85:
            u, _, u_c = model(x.float(), t, torch.full_like(y, 10), cls=c.float())
            v, v_c = u + 2.3 * (v - u), u_c + theirs * (v_c - u_c)
        noise = torch.stack([torch.randn(70, generator=g) for g in generators]).double() if then > 0 else torch.zeros(3, 70)
        new = []
        for state, slope, n in ((x, v.double(), noise[:, :64].view(3, 1, 8, 8)), (c, v_c.double(), noise[:, 64:])):
            score = -(state + (1 - now) * slope) / now
            drift = slope - now * score                              # v - w s / 2, w = 2 t
            new += [state + (then - now) * drift + math.sqrt(2 * now * (now - then)) * n]
        x, c = new
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[-1][1].double(), c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("says, changes, with_cls", [
    ("cls.npy", {}, False), ("--projector mlp", dict(projector="conv"), True), ("--predict v", dict(predict="x"), True)])
def test_what_reg_cannot_do_is_refused_in_one_line(folder, reg_folder, tmp_path, says, changes, with_cls):
    line = run(reg_flags(reg_folder if with_cls else folder, tmp_path, **changes))
    assert says in line and "\n" not in line


def test_a_reg_run_starts_from_repa_s_weights_with_its_own_parts_new(reg_folder, tmp_path, capsys):
    repa = awake(train_sit.SiT(**MICRO, feature_dim=8))
    torch.save({"ema": repa.state_dict()}, tmp_path / "repa.pt")
    assert run(reg_flags(reg_folder, tmp_path / "out", steps=1, lr=0, init=tmp_path / "repa.pt")) is None
    said, = re.findall("weights from .*; new or left out: (.*)", capsys.readouterr().out)
    assert sorted(said.split(", ")) == sorted([*NEW_IN_REG, "pos_embed"])
    theirs, ours = repa.state_dict(), saved(tmp_path / "out")["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "pos_embed")
    assert torch.equal(ours["pos_embed"][:, 1:], theirs["pos_embed"])


# ----------------------------------------------------------------------------------------------------------
# Real runs: reading, files, folders


def test_rows_are_read_from_the_disk_as_indexing_would_read_them(tmp_path):
    for k, kind in enumerate((np.uint8, np.float32, np.float16)):
        array = (100 * np.random.RandomState(k).randn(30, 3, 5)).astype(kind)
        np.save(tmp_path / "a.npy", array)
        rows = np.array([29, 0, 7, 7])
        read = train_sit.read_rows(np.load(tmp_path / "a.npy", mmap_mode="r"), rows)
        assert read.dtype == kind
        np.testing.assert_array_equal(read, array[rows])


def test_averages_are_kept_every_so_many_steps_and_can_be_sampled(folder, tmp_path):
    assert run(training(folder, tmp_path, save_every=1, keep_every=2)) is None
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == [f"average-{k:07d}.pt" for k in (2, 4, 6)] + [f"step-{k:07d}.pt" for k in (5, 6)]
    average, whole = (train_sit.load_model(tmp_path / f"{kind}-0000006.pt")[0] for kind in ("average", "step"))
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), whole.parameters()))
    assert run(sampling(tmp_path / "average-0000002.pt", tmp_path / "s"), sample) is None
    assert "a multiple of --save_every" in run(training(folder, tmp_path, save_every=4, keep_every=6))


def test_without_warm_up_the_weight_average_has_its_decay_from_the_first_step(folder, tmp_path):
    for name, changes in (("start", dict(steps=1, lr=0)), ("end", dict(steps=1, ema=0.75, ema_warmup=False))):
        assert run(training(folder, tmp_path / name, warmup=0, **changes)) is None
    before, after = saved(tmp_path / "start")["model"], saved(tmp_path / "end")
    for name, average in after["ema"].items():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after["model"][name])


@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_second_program_in_the_same_folder_ends_with_one_line(folder, trained, tmp_path, program):
    argv = training(folder, tmp_path) if program == "train" else sampling(trained, tmp_path)
    module = train_sit if program == "train" else sample
    held = train_sit.lock(tmp_path)
    line = run(argv, module)
    assert "another process is at work in" in line and "\n" not in line and len(list(tmp_path.iterdir())) == 1
    held.close()
    assert run(argv, module) is None


def test_a_disk_without_locks_is_good_enough(tmp_path, monkeypatch):
    import fcntl
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
    train_sit.lock(tmp_path).close()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    for other in (path, tmp_path / "never"):                         # two killed saves leave one draft
        with pytest.raises(ZeroDivisionError), train_sit.whole(other) as file:
            file.write(b"half")
            1 / 0
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    with train_sit.whole(path) as file:
        file.write(b"after")
    assert path.read_text() == "after" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_newest_checkpoint_is_named_with_the_one_to_go_on_from(folder, tmp_path):
    assert run(training(folder, tmp_path, save_every=3)) is None
    newest = tmp_path / "step-0000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    line = run(training(folder, tmp_path))
    assert f"{newest} (" in line and f"delete it to go on from {tmp_path / 'step-0000003.pt'}" in line
    newest.unlink()
    assert run(training(folder, tmp_path)) is None and len(log_of(tmp_path)) == 6


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


def test_the_processes_agree_on_a_signal_by_gather_on_their_own_device_because_nccl_has_no_cpu_tensors(monkeypatch):
    source, devices = (HERE / "train_sit.py").read_text(), []
    used = re.findall(r"dist\.(\w*(?:all|reduce|gather|broadcast|scatter|send|recv)\w*)\(", source)
    assert used == ["all_gather"] and "stop.anywhere(device)" in source
    monkeypatch.setattr(train_sit, "gather", lambda x: devices.append(x.device.type) or torch.tensor([0, signal.SIGTERM]))
    with train_sit.Stop() as stop:
        assert stop.anywhere("meta") == stop.agreed == signal.SIGTERM and devices == ["meta"] and stop.signal == 0


def test_after_a_first_signal_a_second_sigterm_changes_nothing_and_ctrl_c_ends_at_once():
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it
    before = handlers()
    with train_sit.Stop() as stop:
        assert before[0] != signal.getsignal(signal.SIGINT) and stop.anywhere("cpu") == 0
        for _ in range(2):                                           # some job managers send it twice
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.anywhere("cpu") == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert handlers() == before
    signal.signal(signal.SIGINT, outside)


def test_processes_that_see_different_checkpoints_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sit, "gather", lambda x: torch.tensor([4, 0]))
    assert "one folder that all processes share" in run(training(folder, tmp_path))


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
def two_processes(folder, reg_folder, trained, tmp_path_factory):
    """One torchrun of two processes: a repacked folder, samples, a run with REG and VRPO, a default run.

    Process 1 is killed in step 5 of the default run."""
    tmp = tmp_path_factory.mktemp("two")
    repack = [f"--images={repa_folder(tmp / 'source', 40)}", f"--out={tmp}/repacked", "--batch=8", "--encoder=none"]
    argvs = [repack, sampling(trained, tmp / "samples", sampler="sde"),
             reg_flags(reg_folder, tmp / "reg", align="vrpo", lr=1e-4), training(folder, tmp / "default", save_every=2)]
    (tmp / "script.py").write_text(f"import sys; sys.path[0] = {str(HERE)!r}{SCRIPT.format(argvs=json.dumps(argvs))}")
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1 --monitor-interval=0.1"
    job = launch(*torchrun.split(), tmp / "script.py")
    assert job.returncode == 0 and f"made {tmp}/repacked: 40 images of 5 classes" in job.stdout, job.stdout
    assert "exitcode: -9" in job.stdout
    return tmp


def test_torchrun_goes_on_after_a_killed_worker_and_the_run_does_not_depend_on_the_number_of_processes(
        reg_folder, trained, tmp_path, two_processes):
    assert run(reg_flags(reg_folder, tmp_path, align="vrpo", lr=1e-4)) is None
    for ours, alone in (("default", trained), ("reg", tmp_path)):
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


def test_parts_of_unknown_settings_are_drawn_anew_and_those_of_a_checkpoint_since_rewritten_are_refused(
        trained, tmp_path, monkeypatch):
    checkpoint, out = tmp_path / "copy.pt", tmp_path / "out"
    shutil.copy(train_sit.newest_checkpoint(trained), checkpoint)
    monkeypatch.setattr(sample.shutil, "rmtree", lambda *_, **more: None)                  # as if killed before
    assert run(sampling(checkpoint, out, seed=1), sample) is None and len(list((out / "parts").glob("*.npz"))) == 5
    (out / "parts/settings.json").unlink()
    for folder in (out, tmp_path / "fresh"):
        assert run(sampling(checkpoint, folder), sample) is None
    again, fresh = (np.load(folder / "samples.npz")["arr_0"] for folder in (out, tmp_path / "fresh"))
    assert (again == fresh).all()
    os.utime(checkpoint, (1, 1))
    assert "begun with written" in run(sampling(checkpoint, out), sample)


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
    with pytest.raises(ArithmeticError, match="not finite"):
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


def test_no_sample_starts_from_a_noise_that_training_drew():
    cfg, data = train_sit.Config(batch=4), types.SimpleNamespace(channels=1, size=8, moments=False, cls_dim=0)
    drawn = torch.cat([train_sit.draws(cfg, step, data, torch.device("cpu"))[0] for step in range(1, 50)])
    model = types.SimpleNamespace(shape=(1, 8, 8), cls_dim=0, num_classes=10)
    starts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sample.SAMPLERS, "heun", lambda v, x, *_: starts.append(x) or x)
        sample.generate(model, dict(predict="v", path="linear"), sample.Config(), np.arange(50), torch.device("cpu"))
    assert torch.cdist(starts[0], drawn.flatten(1)).min() > 1


def test_metrics_judge_the_pixels_that_were_written(folder, trained, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for name in ("latents averaged to 8 x 8", "the judge's features"):
        assert run(sampling(trained, tmp_path, count=20, metrics=True, data=data), sample) is None
        measured = json.loads((tmp_path / "metrics.json").read_text())
        assert {f"Frechet distance in {name}", "recall (k = 3, 20 real ones)"} < measured.keys()
        if not (data / "judge.pt").exists():
            torch.save(font_digits.ConvNet().state_dict(), data / "judge.pt")
    kept, judge = np.load(tmp_path / "samples.npz"), font_digits.load_judge(data)
    pixels = torch.from_numpy(kept["arr_0"][:, None, :, :, 0]).float()
    read = judge((pixels - 127.5) / 74).argmax(1).numpy()
    assert measured["judge accuracy"] == (read == kept["labels"]).mean()


@pytest.mark.parametrize("says, argv", [
    ("dopri5", "--sampler=magic"), ("1 to", "--steps=0"), ("0 to 9", "--classes 3 10"), ("0 to 9", "--classes 2.7"), ("0 to", "--guidance=nan"),
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


def test_the_digits_class_tokens_are_the_encoders_pooled_embedding_with_a_mean_square_of_2(tmp_path):
    font_digits.make(tmp_path / "new/digits", n=128, seed=5)
    arrays, data = content(tmp_path / "new/digits"), train_sit.Latents(tmp_path / "new/digits", features=True)
    images, labels = font_digits.draw(128, 5)
    assert (arrays["latents"] == images).all() and (arrays["labels"] == labels).all()
    seen = data.seen(torch.from_numpy(images), None)
    encoder = font_digits.train_net(seen, labels, 5)                 # once more
    pooled, cls = encoder.embed(seen).double(), torch.from_numpy(arrays["cls"]).double()
    assert arrays["cls"].dtype == np.float16 and cls.shape == (128, 64) and abs(cls.square().mean() - 2) < 0.01
    scale = (cls * pooled).sum() / pooled.square().sum()
    torch.testing.assert_close(cls, scale * pooled, rtol=2e-3, atol=1e-3)
    assert fpo.alignment_loss(encoder.tokens(seen), torch.from_numpy(arrays["features"])).max() < -0.999
    with pytest.raises(SystemExit, match="is in the way: delete it"):
        font_digits.make(tmp_path / "new/digits", n=128)


def test_a_folder_of_digits_without_class_tokens_is_used_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(font_digits, "make", lambda *_: pytest.fail("it draws"))
    assert not (folder / "cls.npy").exists() and font_digits.ensure(folder) == folder


def test_help_draws_nothing(monkeypatch):
    monkeypatch.setattr(font_digits, "ensure", lambda *_: pytest.fail("it draws"))
    assert run(["--help"]) == run(["--help"], sample) == 0


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
    encoder.calls = 0

    def forward_features(x):
        encoder.calls += 1
        tokens = encoder(x).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
        return dict(x_norm_clstoken=7 * x.mean((2, 3)), x_norm_patchtokens=tokens)

    encoder.forward_features = forward_features
    return encoder


@pytest.fixture
def hub(monkeypatch):
    """diffusers and torch.hub without a network: the names of what was loaded, of a revision that does not change."""
    loaded = []

    def from_pretrained(name, revision):
        assert re.fullmatch("[0-9a-f]{40}", revision)
        loaded.append(name)
        return tiny_vae()

    def load(repository, name, skip_validation):
        assert re.fullmatch("facebookresearch/dinov2:[0-9a-f]{40}", repository) and skip_validation
        loaded.append(name)
        return tiny_encoder()

    kind = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=kind))
    monkeypatch.setattr(torch.hub, "load", load)
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
    default = dict(vae="stabilityai/sd-vae-ft-ema", encoder="dinov2_vitb14", pixels=False, size=32, batch=5)
    return argparse.Namespace(images=str(images), out=str(out), **default | changes)


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
    imagenet.make(settings(images, out))
    assert hub == ["stabilityai/sd-vae-ft-ema", "dinov2_vitb14"]
    arrays, data = content(out), train_sit.Latents(out, features=True)
    files = [file for name in ("n01", "n02", "n10") for file in sorted((images / name).glob("[0-9]*"))]
    crops = [imagenet.centre_crop(Image.open(file).convert("RGB"), 32) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    assert arrays["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    mean, log_std = tiny_vae()(pixels / 127.5 - 1).chunk(2, 1)
    np.testing.assert_allclose(arrays["latents"], torch.cat([mean, log_std.exp()], 1), atol=1e-5)
    cls, tokens = imagenet.tokens_of(imagenet.load_encoder("dinov2_vitb14", 32, "cpu"), pixels)
    assert fpo.alignment_loss(tokens, torch.from_numpy(arrays["features"])).max() < -0.999
    assert (arrays["cls"] == cls.half().numpy()).all() and np.abs(arrays["cls"]).max() > 2       # as it is
    kinds = dict(latents="float32", labels="int64", features="int8", cls="float16")
    assert {name: array.dtype.name for name, array in arrays.items()} == kinds
    assert (data.channels, data.size, data.feature_dim, data.moments, data.classes) == (4, 4, 6, True, 3)
    expected = dict(scale=0.18215, bias=0, vae=hub[0], encoder="dinov2_vitb14")
    assert expected.items() <= data.meta.items()
    imagenet.make(settings(images, tmp_path / "pixels", pixels=True))
    data = train_sit.Latents(tmp_path / "pixels", features=True)
    assert data.latents.dtype == np.uint8 and (data.latents == pixels.numpy()).all() and len(hub) == 4    # no VAE
    seen = data.seen(torch.from_numpy(np.array(data.latents)), None)
    torch.testing.assert_close(seen, pixels / 127.5 - 1)
    assert (train_sit.to_pixels(seen, data.meta) == pixels.permute(0, 2, 3, 1).numpy()).all()             # true colours


@pytest.fixture
def watched(hub, monkeypatch):
    """The sizes of the batches that the VAE has seen. At watched.broken_at batches a network fails."""
    network = tiny_vae()

    class Watched(list):
        broken_at = None

        def encode(self, x):
            self.append(len(x))
            if len(self) == self.broken_at:
                raise ConnectionError("power cut")
            return network.encode(x)

    seen = Watched()
    monkeypatch.setattr(imagenet, "load_vae", lambda *_: seen)
    return seen


def test_stopped_in_the_middle_it_goes_on_and_does_nothing_twice(tmp_path, watched):
    images = draw_images(tmp_path / "images")
    whole, parts = (settings(images, tmp_path / name, batch=2) for name in ("whole", "parts"))
    imagenet.make(whole)
    assert watched == [1] + 6 * [2]                                  # the first image tells the shapes
    watched.clear()
    watched.broken_at = 5
    with pytest.raises(ConnectionError):
        imagenet.make(parts)
    with pytest.raises(train_sit.Refused):                           # not yet for training
        train_sit.Latents(parts.out)
    watched.clear()
    watched.broken_at = None
    imagenet.make(parts)
    assert watched == 3 * [2]                                        # three of six were done
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert whole.keys() == parts.keys() == {"latents", "labels", "features", "cls"}
    assert all((whole[name] == parts[name]).all() for name in whole)


@pytest.mark.parametrize("n", range(1, 9))
def test_stopped_between_two_arrays_it_makes_the_whole_batch_again(tmp_path, hub, monkeypatch, n):
    images, flush, calls = draw_images(tmp_path / "images"), np.memmap.flush, []
    imagenet.make(settings(images, tmp_path / "whole", batch=4))

    def mortal(array):
        flush(array)
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", mortal)
        with pytest.raises(KeyboardInterrupt):
            imagenet.make(settings(images, tmp_path / "parts", batch=4))
    imagenet.make(settings(images, tmp_path / "parts", batch=4))
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_the_encoder_runs_once_for_class_token_and_tokens(tmp_path, hub, monkeypatch):
    encoder = tiny_encoder()
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: encoder)
    imagenet.make(settings(draw_images(tmp_path / "images"), tmp_path / "out", batch=4, pixels=True))
    assert encoder.calls == 1 + 3


@pytest.mark.parametrize("removed", [[0], [5], [11], [10, 11], [0, 4, 11], [1, 2, 8]], ids=str)
def test_an_image_that_cannot_be_read_may_be_removed_and_the_others_are_kept(tmp_path, watched, removed):
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    imagenet.make(settings(images, tmp_path / "whole", batch=2))
    whole = content(tmp_path / "whole")
    files = [Path(file) for file in json.loads((tmp_path / "whole/.begun.json").read_text())[2]["images"]]
    files[5].write_bytes(b"none")
    watched.clear()
    with pytest.raises(SystemExit, match=f"{files[5]} cannot be read: .*may be removed"):
        imagenet.make(settings(images, out, batch=2))
    assert watched == [1, 2, 2]                                      # rows 0 to 3 are done
    Image.new("RGB", (40, 40), (200, 9, 77)).save(files[5], "PNG")   # another picture, which row_of does not know
    for k in removed:
        files[k].unlink()
    watched.clear()
    imagenet.make(settings(images, out, batch=2))
    assert watched == 4 * [2]
    made = content(out)
    kept = [k for k in range(12) if k not in removed or k < 4]
    row_of = {latents.tobytes(): k for k, latents in enumerate(whole["latents"])}
    rows = [row_of.get(latents.tobytes(), 5) for latents in made["latents"]]
    assert sorted(rows) == kept and rows[:4] == kept[:4]
    ours, theirs = zip(*[(k, row) for k, row in enumerate(rows) if row != 5])
    for name, rounding in dict(labels=0, features=1, cls=0.01).items():
        assert len(made[name]) == len(kept)
        np.testing.assert_allclose(made[name][[*ours]].astype(float), whole[name][[*theirs]], rtol=0, atol=rounding)
    assert train_sit.Latents(out).classes == 3


def test_a_stop_while_the_arrays_are_cut_is_no_end(tmp_path, watched, monkeypatch):
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    watched.broken_at = 4
    with pytest.raises(ConnectionError):
        imagenet.make(settings(images, out, batch=2))
    watched.broken_at = None
    Path(json.loads((out / ".begun.json").read_text())[2]["images"][11]).unlink()
    cuts, cut = iter([1, 0]), imagenet.npy.write_array_header_1_0
    with monkeypatch.context() as patch:                             # the second cut fails
        patch.setattr(imagenet.npy, "write_array_header_1_0", lambda *array: 1 / next(cuts) and cut(*array))
        with pytest.raises(ZeroDivisionError):
            imagenet.make(settings(images, out, batch=2))
    imagenet.make(settings(images, out, batch=2))
    assert {len(array) for array in content(out).values()} == {11}


def test_pixels_without_images_and_a_folder_named_as_fast_dit_s(tmp_path):
    source = fast_dit_folder(tmp_path / "my_features")
    with pytest.raises(SystemExit, match="has no images, which --pixels needs"):
        imagenet.make(settings(source, tmp_path / "out", pixels=True))
    imagenet.make(settings(source, tmp_path / "out"))
    assert len(train_sit.Latents(tmp_path / "out")) == 11


def test_a_data_set_whose_images_have_all_gone_is_not_cut_but_says_so(tmp_path, watched):
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    watched.broken_at = 4
    with pytest.raises(ConnectionError):
        imagenet.make(settings(images, out, batch=2))
    images.rename(tmp_path / "elsewhere")                            # as when a network drive is away
    with pytest.raises(SystemExit, match="cannot be read"):
        imagenet.make(settings(images, out, batch=2))
    (tmp_path / "elsewhere").rename(images)
    watched.broken_at = None
    imagenet.make(settings(images, out, batch=2))
    assert len(train_sit.Latents(out)) == 12


def test_a_full_disk_is_one_line_at_the_start_and_the_place_is_reserved(tmp_path, watched, monkeypatch):
    cfg = settings(draw_images(tmp_path / "images"), tmp_path / "out", batch=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))     # the kernel itself refuses larger files
    try:
        with pytest.raises(SystemExit, match="needs 6.*e-06 GB: ") as stop:
            imagenet.make(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(stop.value) and not list((tmp_path / "out").iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SystemExit, match="needs .* GB: .*No space left"):
            imagenet.make(cfg)
    watched.clear()
    watched.broken_at = 2
    with pytest.raises(ConnectionError):                             # once there is place
        imagenet.make(cfg)
    sizes = [file.stat() for file in Path(cfg.out).glob("*.npy")]
    assert len(sizes) == 4 and all(512 * size.st_blocks >= size.st_size for size in sizes)


@pytest.mark.parametrize("encoder", ["dinov2_vitb14", "none"])
def test_repa_folders_are_repacked_exactly(tmp_path, hub, encoder):
    source, out = repa_folder(tmp_path / "source"), tmp_path / "out"
    imagenet.make(settings(source, out, batch=3, encoder=encoder))
    assert hub == ["dinov2_vitb14"] * (encoder != "none")             # never a VAE
    assert (out / "cls.npy").exists() == (encoder != "none")
    data, arrays = train_sit.Latents(out, features=encoder != "none"), content(out)
    order = [int(name[-12:-4]) for name, _ in json.loads((source / "vae-sd/dataset.json").read_text())["labels"]]
    for i, latents, label in zip(order, arrays["latents"], arrays["labels"], strict=True):
        assert (latents == np.load(source / f"vae-sd/0000{i % 2}/img-mean-std-{i:08d}.npy")).all() and label == i % 5
    imagenet.make(settings(source, tmp_path / "pixels", encoder=encoder, pixels=True))
    images = content(tmp_path / "pixels")["latents"]
    assert (images[:, :, 3, 5] == [[i, 20 * i, 9] for i in order]).all()
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
    ("without images: ['n05']", lambda images, patch: (images / "n05").mkdir()),
    ("nor one folder of images per class", lambda images, patch: shutil.rmtree(images)),
    ("pip install diffusers", lambda images, patch: patch.setitem(sys.modules, "diffusers", None)),
    ("dinov2_vitb14 cannot be loaded", lambda images, patch: patch.setattr(torch.hub, "load", no_network))])
def test_a_start_that_fails_says_why_in_one_line(tmp_path, hub, monkeypatch, says, spoil):
    images = draw_images(tmp_path / "images")
    spoil(images, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        imagenet.make(settings(images, tmp_path / "out"))
    assert says in str(stop.value) and "\n" not in str(stop.value)


def test_a_folder_that_other_flags_began_or_something_else_is_refused_in_one_line(tmp_path, hub):
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    imagenet.make(settings(images, out))
    before = content(out)
    imagenet.make(settings(images, out))                             # finished: nothing changes
    assert all((before[name] == array).all() for name, array in content(out).items())
    imagenet.make(settings(images, out, batch=7))                    # another batch may be what memory needs
    for cfg, says in [(settings(images, out, size=512), "was begun with other flags"),
                      (settings(images, images), "holds something else")]:
        with pytest.raises(SystemExit, match=says) as stop:
            imagenet.make(cfg)
        assert "\n" not in str(stop.value)


def test_damaged_foreign_folders_are_refused_in_one_line(tmp_path):
    repa, fast = repa_folder(tmp_path / "repa"), fast_dit_folder(tmp_path / "fast")
    (fast / "imagenet256_features/3.npy").write_bytes(b"none")
    (repa / "images/00001/img00000003.png").write_bytes(b"none")
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


def test_position_embeddings_are_resampled_and_the_class_token_is_kept(monkeypatch):
    row, column = torch.meshgrid(torch.arange(37.0), torch.arange(37.0), indexing="ij")
    code = torch.randn(1, 1 + 37 * 37, 3, generator=seeded(0))

    def resampled(side):
        encoder = tiny_encoder()
        encoder.pos_embed.data = code.clone()
        monkeypatch.setattr(torch.hub, "load", lambda *_, **__: encoder)
        return imagenet.load_encoder("dinov2_vitb14", 16 * side, "cpu").pos_embed.data

    assert torch.equal(resampled(37), code)
    code[0, 1:] = torch.stack([row, column, (row + column) % 2], -1).flatten(0, 1)    # the last: too fine to keep
    for side in (16, 32):
        out = resampled(side)
        assert out.shape == (1, 1 + side * side, 3) and torch.equal(out[:, 0], code[:, 0])
        place = ((torch.arange(side) + 0.5) * 37 / side - 0.5)[3:-3]
        row, column, fine = out[0, 1:].unflatten(0, (side, side))[3:-3, 3:-3].unbind(-1)
        assert (row - place[:, None]).abs().max() < 0.03 and (column - place).abs().max() < 0.03
        assert side == 32 or (fine - 0.5).abs().max() < 0.1


def test_the_encoder_sees_normalised_images_at_seven_eighths_of_their_size():
    encoder = types.SimpleNamespace(forward_features=lambda x: dict(x_norm_clstoken=-x, x_norm_patchtokens=x))
    images = torch.tensor([0, 128, 255], dtype=torch.uint8)[None, :, None, None]
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    for size, side in ((256, 224), (512, 448)):
        cls, x = imagenet.tokens_of(encoder, images.expand(2, 3, size, size))
        assert x.shape == (2, 3, side, side) and (x - expected[:, None, None]).abs().max() < 1e-4
        assert torch.equal(cls, -x)


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


def test_irepa_s_target_from_tokens_of_8_bits_is_that_of_the_encoder_s_own_also_for_reg_s_class_token():
    tokens = torch.randn(4, 1, 768, generator=seeded(41)) + torch.randn(4, 65, 768, generator=seeded(42))
    tokens = F.layer_norm(tokens, (768,))                              # the class token is the first
    stored = imagenet.to_int8(tokens[:, 1:])
    with_class = torch.cat([tokens[:, :1].half(), stored.half()], 1)   # as Latents.batch
    for own, features in ((tokens[:, 1:], stored), (tokens, with_class)):
        target = fpo.spatially_normalised(own)
        loss = train_sit.ALIGN["spatial"](target, features)
        assert (loss + 1).abs().max() < 2e-4


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

    c = model.t_embedder(train_sit.time_features(t)) + model.y_embedder(y)
    h = model.x_embedder(x).flatten(2).transpose(1, 2) + model.pos_embed
    for block in model.blocks[:2]:                           # encoder_depth = 2
        h = block(h, c)
    units = F.normalize(features, dim=-1).mean(1)
    assert abs(likeness - measures.cknna(h.mean(1), units)) < 1e-5
    labels = torch.from_numpy(data.labels[rows])
    assert accuracy == measures.linear_probe(h.mean(1), labels, 10)
    again, *_ = measures.noised(data, t)
    assert torch.equal(again, x)
    cosine, likeness, _ = measures.hidden_measures(small(None), data, t=0.3, n=64)
    assert math.isnan(cosine) and math.isfinite(likeness)


# ----------------------------------------------------------------------------------------------------------
# The study's runs, tables and README


def test_every_run_of_the_study_has_flags_that_train_sit_accepts(monkeypatch):
    monkeypatch.setitem(train_sit.POLICIES, "fpo_centred", None)
    for end in ("data", "noise"):
        monkeypatch.setitem(train_sit.TIMESTEPS, f"fewer_at_{end}", None)
    accepted = (train_sit.Config, train_sit.CHOICES, train_sit.LOWEST, train_sit.HIGHEST)
    assert {*ablation.TEN_SEEDS} < ablation.SWITCHES.keys()
    for seeds, common, steps, runs in ablation.GROUPS.values():
        argvs = [f"{common} {flags}".split() for flags in runs.values()]
        configs = [train_sit.parse_flags(*accepted, argv, "") for argv in argvs]
        assert len({str(cfg) for cfg in configs}) == len(configs)        # no two runs are the same
        assert seeds in ablation.QUANTILE
        for cfg in configs:
            assert cfg.steps == steps[-1] and all(step % cfg.save_every == 0 for step in steps)


def test_the_study_s_training_knows_centred_fpo_and_keeps_every_checkpoint(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sit, "save_checkpoint", train_sit.save_checkpoint)     # put back at the end
    monkeypatch.setitem(train_sit.POLICIES, "fpo_centred", None)
    for end in ("data", "noise"):
        monkeypatch.setitem(train_sit.TIMESTEPS, f"fewer_at_{end}", None)
    out = tmp_path / "run"
    flags = ("--model micro --batch 8 --steps 4 --save_every 1 --policy fpo_centred --beta 4 --no-bf16 "
             "--timesteps fewer_at_noise")
    ablation.train([*flags.split(), "--data", str(digits), "--out", str(out)])
    assert [path.name for path in train_sit.checkpoints(out)] == [f"step-{k:07d}.pt" for k in (1, 2, 3, 4)]
    L = torch.rand(8, generator=seeded(98))
    t = torch.rand(8, generator=seeded(99))
    cfg = train_sit.Config(beta=4.0, tau=0.5)
    kernel = torch.exp(-((t[:, None] - t) / 0.05) ** 2 / 2)
    left = L - (kernel * L).sum(1) / kernel.sum(1)
    expected = fpo.fpo_gradient_weights(left, 0.8, 4.0, 0.5)
    torch.testing.assert_close(train_sit.POLICIES["fpo_centred"](L, t, cfg), expected)
    u = torch.tensor([0.01, 0.99])
    at_data, at_noise = (train_sit.TIMESTEPS[f"fewer_at_{end}"](u, None, cfg) for end in ("data", "noise"))
    assert at_data[0] > 0.05 and at_data[1] == u[1] and at_noise[0] == u[0] and at_noise[1] < 0.95


@pytest.mark.parametrize("name", between.DENSITIES)
def test_the_densities_that_spare_one_end_of_t_keep_its_median_and_thin_out_the_end_that_they_name(name):
    t = between.DENSITIES[name]((torch.arange(100_000) + 0.5) / 100_000)
    assert abs(t.median() - 0.5) < 1e-4 and (t.diff() > 0).all()
    first, last = (t < 0.05).float().mean(), (t > 0.95).float().mean()
    thin = torch.special.ndtr(torch.tensor(0.05).logit())                # of a logit-normal: 0.0016
    assert abs(first - (thin if name in ("logit-normal", "fewer at the data") else 0.05)) < 1e-4
    assert abs(last - (thin if name in ("logit-normal", "fewer at the noise") else 0.05)) < 1e-4


def test_the_distance_in_k_dimensions_sees_a_shift_as_large_as_it_is():
    k, shift = 8, 0.3
    y = torch.randn(4000, k, generator=seeded(0))
    x = torch.stack([y[:2000], y[2000:] + shift * F.one_hot(torch.tensor(0), k)])
    near, far = between.distance(x, y)
    theta = torch.randn(k, 64, generator=seeded(6))
    assert near < 0.05 and abs(far - shift * (theta[0] / theta.norm(dim=0)).abs().mean()) < 0.03


@pytest.mark.parametrize("n", ablation.QUANTILE)
def test_intervals_hold_95_percent_of_student_s_distribution(n):
    nu, half = n - 1, ablation.QUANTILE[n]
    x = torch.linspace(-half, half, 20001, dtype=torch.float64)
    factor = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    density = factor * (1 + x ** 2 / nu) ** (-(nu + 1) / 2)
    assert abs(torch.trapezoid(density, x) - 0.95) < 1e-4


@pytest.mark.parametrize("std", [0.06, 0.12, 0.17, 0.3])
def test_the_rule_of_the_study_sees_an_effect_that_is_none_in_5_percent_of_the_rows(std):
    gaps = np.random.RandomState(0).normal(0, std, (40_000, 10))

    def mean_and_half(gaps):
        n = gaps.shape[1]
        return abs(gaps.mean(1)), ablation.QUANTILE[n] * gaps.std(1, ddof=1) / n ** 0.5

    (mean, half), (later, later_half) = mean_and_half(gaps[:, :5]), mean_and_half(gaps)
    go_on = (mean >= 0.1) & (mean <= 2 * half)                           # step 3, by the Fréchet distance
    wrong = np.where(go_on, later > later_half, mean > half)
    assert 0.035 < wrong.mean() < 0.055


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
    assert names == {f"ablation{end}.png" for end in ("", "_fpo", "_batch", "_vr", "_groups", "_ends", "_clock")}
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


# ----------------------------------------------------------------------------------------------------------
# README


def test_every_test_that_the_readmes_name_exists():
    text = "".join((HERE / name).read_text() for name in ("README.md", "study/README.md"))
    named = re.findall(r"\b(test_[a-z0-9_]{9,})(\.{3})?", text)
    assert len(named) > 20
    for name, cut in named:
        assert any(real.startswith(name) if cut else real == name for real in globals()), f"a README names {name}"


def test_the_core_in_readme_is_the_text_of_the_training_loop():
    readme, lines = (HERE / "README.md").read_text(), (HERE / "train_sit.py").read_text().splitlines()
    first, last = map(int, re.search(r"lines (\d+) to (\d+) of \[train_sit", readme).groups())
    core = readme.split("```python\n")[1].split("```")[0]
    assert textwrap.dedent("\n".join(lines[first - 1:last])) + "\n" == core and len(core.splitlines()) < 20


def test_the_two_lines_for_another_training_loop_run():
    code = (HERE / "README.md").read_text().split("```python\n")[2].split("```")[0]
    v_hat = torch.randn(8, 3, requires_grad=True, generator=seeded(40))
    exec(code, dict(fpo=fpo, v_hat=v_hat, v=torch.zeros(8, 3)))
    expected, = torch.autograd.grad(fpo.fpo_loss(v_hat.square().mean(1)), v_hat)
    torch.testing.assert_close(v_hat.grad, expected)


# ----------------------------------------------------------------------------------------------------------
# study/speed.py


def numbers_of(argv, monkeypatch, capsys):
    """What speed.py prints: dict of name -> number. What it changes in train_sit is put back afterwards."""
    for name in ("save_checkpoint", "write_pictures"):
        monkeypatch.setattr(train_sit, name, getattr(train_sit, name))
    speed.main([*map(str, argv)])
    lines = re.findall(r"^ +(\S+) (.*)$", capsys.readouterr().out, re.M)
    return {name: float(number) for number, name in lines}


def test_speed_prints_what_the_run_does_and_what_the_machine_could_do(folder, monkeypatch, capsys):
    clock, start = time.time, time.time()
    found = numbers_of(["--data", folder, "--model=micro", "--batch=8", "--steps=6"], monkeypatch, capsys)
    assert all(number > 0 for number in found.values()) and len(found) == 7, found
    names = ["steps/s", "images/s", "GFLOP/s of the model", "% of these", "GiB of memory at most"]
    steps, images, model, percent, memory = (found[name] for name in names)
    products = min(number for name, number in found.items() if "matrix products" in name)
    assert images == pytest.approx(8 * steps, rel=1e-3) and steps > 4 / (clock() - start)
    assert percent == pytest.approx(100 * model / products, rel=1e-2) and 0.1 < memory < 100
    T, D, P, F, patch = 4, 64, 128, 8, 16                            # tokens, widths, pixels of a patch
    block = 24 * T * D ** 2 + 4 * T ** 2 * D + 12 * D ** 2
    ends = 4 * T * D * patch + 2 * (256 * D + D ** 2) + 4 * D ** 2
    projector = 2 * T * (D * P + P * P + P * F)
    assert model * 1e9 == pytest.approx(3 * (4 * block + ends + projector) * images, rel=1e-3)


@pytest.mark.parametrize("reg", [False, True])
def test_speed_of_synthetic_latents_is_that_of_imagenets_shapes(monkeypatch, capsys, reg):
    monkeypatch.setattr(speed, "calls_a_second", lambda function: len(function()))
    flags = ["--synthetic=4", "--model=SiT-S/2", "--batch=1", "--steps=2", "--timesteps=uniform"]
    found = numbers_of(flags + ["--reg_weight=0.03"] * reg, monkeypatch, capsys)
    D, P, F, patch = 384, 2048, 768, 16
    T = 256 + reg                                                    # the class token is one token more
    block = 24 * T * D ** 2 + 4 * T ** 2 * D + 12 * D ** 2
    ends = 4 * 256 * D * patch + 2 * (256 * D + D ** 2) + 4 * D ** 2 + reg * 4 * D * F
    projector = 2 * T * (D * P + P * P + P * F)
    flops = 3 * (12 * block + ends + projector)
    assert found["GFLOP/s of the model"] * 1e9 == pytest.approx(flops * found["images/s"], rel=1.2e-3)
