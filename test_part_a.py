"""The papers' claims as tests, in their order, then the plumbing. Run: python -m pytest -q   (with -s: the measured costs)"""
import argparse
import builtins
import dataclasses
import dis
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
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


# ------------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------------
# Losses


def test_losses_are_per_sample_and_computed_in_float32():
    h, y = torch.randn(4, 9, 16, generator=seeded(4)), torch.randn(4, 9, 16, generator=seeded(5))
    by_hand = [-sum(F.cosine_similarity(a, b, dim=0) for a, b in zip(h[i], y[i])) / 9 for i in range(4)]
    torch.testing.assert_close(fpo.alignment_loss(h, 3 * y), torch.stack(by_hand))
    tiny = torch.full((1, 1, 64), 1e-30, dtype=torch.bfloat16)         # in bf16 its norm underflows
    assert fpo.alignment_loss(tiny, tiny).isfinite().all() and fpo.alignment_loss(tiny, tiny).dtype == torch.float32
    assert fpo.velocity_loss(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)).tolist() == [1, 1]


def test_nt_xent_of_a_slice_against_the_global_batch_is_the_slice_of_the_whole():
    h, y = torch.randn(6, 3, 8, generator=seeded(6)), torch.randn(6, 3, 8, generator=seeded(7))
    whole = fpo.nt_xent_loss(h, y, 0.2)
    torch.testing.assert_close(torch.cat([fpo.nt_xent_loss(h[:2], y, 0.2), fpo.nt_xent_loss(h[2:], y, 0.2, first=2)]), whole)
    k, i = F.normalize(h, dim=-1), F.normalize(y, dim=-1)
    token = [-math.log(math.exp(k[1, n] @ i[1, n] / 0.2) / sum(math.exp(k[1, n] @ i[j, n] / 0.2) for j in range(6))) for n in range(3)]
    assert abs(whole[1].item() - sum(token) / 3) < 1e-5


# ------------------------------------------------------------------------------------------------------------------
# FPO


MASKS = {"all": None, "some": torch.rand(40, generator=seeded(8)) < 0.4, "none": torch.zeros(40, dtype=torch.bool)}


def some_losses(n=40):
    return torch.rand(n, generator=seeded(9), dtype=torch.float64) * 2


def test_weights_follow_equations_18_to_20_by_hand():
    w = fpo.fpo_weights(torch.tensor([3.0, 1.0, 2.0, 0.0, 9.0]), r=0.4, beta=2.0, tau=1.0)      # H = {9, 3}
    p = math.exp(9) / (math.exp(9) + math.exp(3))
    torch.testing.assert_close(w, torch.tensor([1 + 2 * (1 - p), 1, 1, 1, 1 + 2 * p]) * 5 / 7)


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
    torch.testing.assert_close(c, 40 * gradient)
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


# ------------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------------
# Every function of fpo.py lifts out alone


def lift_out_arguments(name):
    """Small arguments for any function of fpo.py."""
    g = seeded(95)
    x, t, losses, h = torch.randn(2, 4, 2, 4, 4, generator=g), torch.rand(4, generator=g), torch.rand(8, generator=g), torch.randn(2, 4, 5, 6, generator=g)
    snr, moments = torch.linspace(9, 0.1, 20), (torch.zeros(3), torch.eye(3))
    v = lambda x, t: -x
    by_argument = dict(t=t, x=x[0], eps=x[1], v=x[1], v_hat=x[0], x_t=x[0], x_hat=x[1], eps_hat=x[1], h=h[0], y=h[1], h_near=h[1], losses=losses,
                       w=losses, r=0.8, beta=2.0, tau=1.0, z=h[0, :, 0], mean=torch.zeros(6), cov=torch.eye(6), variance=torch.rand(3, generator=g), u=t,
                       moments=moments, rewards=torch.randn(3, 8, generator=g), snr=snr, pdf=torch.ones(20), steps=3, model=lambda x, t, y: -x)
    special = {"pooled": (h[0],), "centred": (losses, losses), "moving_moments": (h[0, 0],), "posterior_variance": (h[0, :, 0], snr), "gaussian_posterior_variance": (h[0, :, 0], snr),
               "in_float32": (h[0],), "posterior_spread": (torch.eye(4), torch.ones(4), h[0, :, 0], 0.5), "loss_scale": (t, "x", "v"),
               "dopri5_step": (v, x[0], t, t / 9, -x[0]), "vr_density": (snr, snr.flip(0) / 10), "sample_timesteps": (t, snr.flip(0), torch.ones(20)), "hard_sample_weights": (losses,),
               "logit_normal_location": (snr.flip(0) / 10, torch.ones(20)), "counted": (v,), "guided": (lambda x, t, y: -x, torch.zeros(4))}
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


# ------------------------------------------------------------------------------------------------------------------
# toy2d.py: the oracles and measures on which its figures rest


DATA_2D = toy2d.data_sets()


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
    timesteps, weights = toy2d.vr(V, reweight=True)
    t = timesteps((torch.arange(100_000) + 0.5)[None] / 100_000)
    assert abs((weights(None, t) * torch.sin(3 * t)).mean() - (1 - math.cos(3)) / 3) < 2e-3    # integral of sin 3t


def test_distances_see_a_shift_as_large_as_it_is():
    g = seeded(0)
    y = torch.randn(2000, 2, generator=g)
    x = torch.stack([y, y + torch.tensor([0.3, 0.0])])
    near, far = toy2d.sliced_wasserstein(x, y)
    assert near < 1e-5 and abs(far - 0.3 * 2 / math.pi) < 2e-3                     # mean of |0.3 cos| over directions


@pytest.mark.parametrize("arguments, says", [("lottery", "'race'"), ("race --seeds 2", "4 or more"), ("race --steps many", "invalid int")])
def test_a_bad_toy2d_argument_is_answered_before_any_work(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *arguments.split()])
    monkeypatch.setattr(toy2d, "EXPERIMENTS", dict.fromkeys(toy2d.EXPERIMENTS))
    with pytest.raises(SystemExit):
        toy2d.main()
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

