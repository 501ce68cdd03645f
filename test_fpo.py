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
@pytest.mark.parametrize("r, beta, tau", [(0.8, 2.0, 1.0), (0.3, 5.0, 0.05), (1.0, 0.0, 0.2)])
def test_theorem_3_3_collapses_to_one_detached_weight_per_sample(r, beta, tau, mask):
    losses = some_losses().requires_grad_()
    gradient, = torch.autograd.grad(fpo.fpo_loss(losses, r, beta, tau, mask), losses)
    c = fpo.fpo_gradient_weights(losses, r, beta, tau, mask)
    torch.testing.assert_close(c, 40 * gradient)
    assert not c.requires_grad and abs(c.sum().item() - 40) < 1e-9
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


def test_a_constant_added_to_every_loss_changes_nothing():
    losses = some_losses()
    for shift in (-1.0, 1e4):
        torch.testing.assert_close(fpo.fpo_gradient_weights(losses + shift), fpo.fpo_gradient_weights(losses))


def test_the_boost_is_at_most_beta_out_of_n_plus_beta():
    for tau in (1e-3, 1.0, 1e3):
        moved, ess = fpo.weight_moved(fpo.fpo_weights(some_losses(), 0.8, 2.0, tau))
        assert moved <= 2 / 42 and 0 < ess <= 40


def test_fpo_centre_takes_what_t_explains_out_of_the_ranking_and_nothing_else():
    t, noise = torch.rand(1, 256, generator=seeded(90))[0], 0.3 * torch.randn(256, generator=seeded(91))
    weigh = lambda losses, **kw: train_sit.sample_weights(train_sit.Config(fpo="velocity", beta=128.0, **kw), losses[None], t)[0]
    moved = lambda c: (c - 1).abs().mean().item() / 2
    by_t = 4 * t                                                           # a loss that t alone decides
    assert moved(weigh(by_t)) > 0.2 and moved(weigh(by_t, fpo_centre=True)) < 0.35 * moved(weigh(by_t))
    with_t, without = weigh(by_t + noise, fpo_centre=True), weigh(noise, fpo_centre=True)
    assert torch.corrcoef(torch.stack([with_t, without]))[0, 1] > 0.85
    assert torch.corrcoef(torch.stack([with_t, noise]))[0, 1] > 0.6 > torch.corrcoef(torch.stack([weigh(by_t + noise), noise]))[0, 1]
    assert abs(with_t.sum() - 256) < 1e-2


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


@pytest.mark.parametrize("weights", [(0.3, 0.5, 0.2), None])
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


def test_a_fraction_of_the_stability_rewards_gives_the_full_loss_and_gradient_in_expectation():
    rewards, B, n = some_rewards(12, B=8).requires_grad_(), 8, 2
    moments = fpo.moving_moments(rewards.T)
    full = fpo.vrpo_loss(rewards, moments).mean()
    subsets = torch.combinations(torch.arange(B), n)                            # all 28: the expectation, exactly
    part = 0
    for subset in subsets:
        known = torch.zeros(B).double().index_fill(0, subset, B / n)
        unknown_is_anything = torch.cat([rewards[:2], torch.where(known > 0, rewards[2], 99.0)[None]])
        part = part + fpo.vrpo_loss(unknown_is_anything, moments, known=known).mean() / len(subsets)
    gradients = [torch.autograd.grad(loss, rewards, retain_graph=True)[0] for loss in (full, part)]
    assert torch.allclose(full, part) and torch.allclose(*gradients)
    statistics = fpo.moving_moments(unknown_is_anything.T, weight=known)
    assert all(torch.allclose(a, b) for a, b in zip(statistics, fpo.moving_moments(rewards[:, known > 0].T)))


def test_without_stability_the_other_two_weights_are_made_to_sum_to_1():
    w = fpo.vrpo_terms(fpo.moving_moments(some_rewards(13, K=2).T))[0]
    assert torch.allclose(w, torch.tensor([0.375, 0.625]).double())


def test_the_gradient_averaged_over_processes_is_that_of_one_process():
    B, world = 24, 3
    known = (torch.arange(B) % 5 == 0) * (B / 5)                                # 2, 2 and 1 of the slices
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
        moments = fpo.moving_moments(rewards.T, weight=known)                   # what all processes gather
        return torch.autograd.grad(fpo.vrpo_loss(rewards[:, mine], moments, known=known[mine]).mean(), h)[0]

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
               "vr_density": (snr, snr.flip(0) / 10), "sample_timesteps": (t, snr.flip(0), torch.ones(20)), "hard_sample_weights": (losses,),
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
    assert names <= {"torch", "math", "F", *needs, *default, *dir(builtins)}, names
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
    together = next(toy2d.train(DATA_2D["two moons"], [5, 6, 7], 12, *policy))
    for k, seed in enumerate((5, 6, 7)):
        alone = next(toy2d.train(DATA_2D["two moons"], [seed], 12, *policy))
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
    near, far = toy2d.energy_distance(x, y, torch.cdist(y, y).mean())
    assert near < 1e-2 < far


@pytest.mark.parametrize("arguments, says", [
    ("lottery", "known: fisher, variance, race, samplers"), ("--seeds 2", "--seeds at least 4"),
    ("--steps many", "invalid int"), ("race --out /dev/null/x", "Not a directory")])
def test_a_bad_toy2d_argument_is_answered_in_one_line(arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        toy2d.main()
    assert says in end.value.code and "\n" not in end.value.code


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


# ------------------------------------------------------------------------------------------------------------------
# The network


PUBLISHED = """pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias
blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight
blocks.0.mlp.fc2.bias blocks.0.adaLN_modulation.1.weight blocks.0.adaLN_modulation.1.bias final_layer.linear.weight
final_layer.linear.bias final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias""".split()
SMALL = dict(size=8, channels=2, num_classes=5, depth=3, width=48, heads=3, patch=2, encoder_depth=2)


def awake(model):
    """Random values where adaLN-Zero starts at 0, so that every weight matters."""
    for k, p in enumerate(model.parameters()):
        p.data += 0.05 * torch.randn(p.shape, generator=seeded(k))
    return model.eval()


def inputs(B=3, size=8, channels=2):
    return torch.randn(B, channels, size, size, generator=seeded(30)), torch.rand(B, generator=seeded(31)), torch.tensor([0, 4, 5][:B])


@pytest.mark.parametrize("name, millions", [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)])
def test_published_models_have_their_published_sizes(name, millions):
    with torch.device("meta"):
        model = train_sit.SiT(**train_sit.MODELS[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_state_dict_has_the_published_names():
    state = train_sit.SiT(**SMALL, feature_dim=7).state_dict()
    expected = PUBLISHED + [f"projectors.0.{k}.{kind}" for k in (0, 2, 4) for kind in ("weight", "bias")]
    assert sorted(k for k in state if not k.startswith(("blocks.1", "blocks.2"))) == sorted(expected)


def test_adaln_zero_starts_as_the_identity_and_the_output_as_zero():
    torch.manual_seed(0)
    model, (x, t, y) = train_sit.SiT(**SMALL), inputs()
    tokens = torch.randn(3, 16, 48)
    assert torch.equal(model.blocks[1](tokens, torch.randn(3, 48)), tokens)
    assert (model(x, t, y) == 0).all()


def test_position_code_follows_the_official_element_order():
    code, width, side = train_sit.position_embedding(16, 3), 16, 3
    for row in range(side):
        for column in range(side):
            omega = [1 / 10000 ** (k / 4) for k in range(4)]
            expected = [f(p * o) for p in (column, row) for f in (math.sin, math.cos) for o in omega]
            torch.testing.assert_close(code[row * side + column], torch.tensor(expected))


def official_sit(model, x, t, y):
    """Oracle: the published forward pass, up to the tokens by hooks on our blocks, then its own unpatchify; 2C outputs."""
    kept = []
    hook = model.final_layer.register_forward_hook(lambda m, i, o: kept.append(o))
    try:
        model(x, t, y)
    except RuntimeError:                                              # ours cannot reshape 2C channels
        pass
    hook.remove()
    p, side, C = model.patch, x.shape[2] // model.patch, 2 * x.shape[1]
    image = torch.einsum("nhwpqc->nchpwq", kept[0].reshape(len(x), side, side, p, p, C))
    return image.reshape(len(x), C, side * p, side * p)[:, :C // 2]


def test_official_sit_weights_run_backwards_in_time_and_give_minus_v(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, (x, t, y) = train_sit.SiT(**SMALL), inputs()
    model.final_layer = train_sit.FinalLayer(48, 2 * 2 * 4)
    awake(model)
    torch.save(model.state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ValueError, match="width 48 and depth 3"):     # the number of heads could only be guessed
        train_sit.load_model(tmp_path / "sit.pt")
    monkeypatch.setitem(train_sit.MODELS, "small", SMALL)
    ours, config = train_sit.load_model(tmp_path / "sit.pt")
    assert config["path"] == "linear"
    torch.testing.assert_close(ours(x, t, y), -official_sit(model, x, 1 - t, y), rtol=1e-4, atol=1e-5)


def test_repa_checkpoints_load_with_ema_and_projector(tmp_path):
    torch.manual_seed(0)
    arch = {**train_sit.MODELS["SiT-S/2"], "size": 8, "channels": 4, "num_classes": 10, "feature_dim": 12, "projector_width": 32}
    model, other = awake(train_sit.SiT(**arch)), train_sit.SiT(**arch)
    torch.save({"model": other.state_dict(), "ema": model.state_dict(), "opt": {}, "args": argparse.Namespace(resolution=256),
                "steps": 7}, tmp_path / "repa.pt")
    loaded, config = train_sit.load_model(tmp_path / "repa.pt")
    x, t, y = inputs(2, 8, 4)
    for a, b in zip(loaded(x, t, y, features=True), model(x, t, y, features=True)):
        assert torch.equal(a, b)
    assert config["step"] == 7 and (train_sit.load_model(tmp_path / "repa.pt", ema=False)[0](x, t, y) == 0).all()


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("content", [b"no checkpoint", {"a": torch.ones(2)}, {"model": 3}, "evil", "missing", "other shape"])
def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "evil":
        torch.save(Evil(tmp_path / "evil"), path)
    elif content == "other shape":
        torch.save({**train_sit.SiT(**SMALL).state_dict(), "pos_embed": torch.ones(1, 10, 48)}, path)
    elif content != "missing":
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        train_sit.load_model(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------------------------
# Data, training, sampling: on a small folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """64 latents 1 x 8 x 8 with int8 feature tokens for 4 patches."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    np.save(folder / "latents.npy", random.randint(0, 256, (64, 1, 8, 8)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(64) % 10)
    np.save(folder / "features.npy", random.randint(-127, 128, (64, 4, 8)).astype(np.int8))
    (folder / "meta.json").write_text(json.dumps(dict(scale=1 / 74, bias=127.5, num_classes=10)))
    return folder


def flags(folder, out, **changes):
    settings = dict(data=folder, out=out, steps=6, batch=8, log_every=1, sample_every=1000, save_every=1000, amp="fp32", warmup=3, **changes)
    return [str(a) for k, v in settings.items() for a in ((f"--{k}", v) if not isinstance(v, bool) else (f"--{'' if v else 'no-'}{k}",))]


def run(argv, program=train_sit):
    """main(argv) in this process: its exit code, or its one line."""
    try:
        program.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """The folder of a finished run of 6 steps."""
    out = tmp_path_factory.mktemp("trained")
    assert run(flags(folder, out)) == 0
    return out


def log_of(out):
    return [[float(v or 0) for v in row.split(",")[:6]] for row in (Path(out) / "log.csv").read_text().splitlines()[1:]]


def flat(state):
    """Every tensor and number in a nested dict, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    return [leaf for item in state for leaf in flat(item)] if isinstance(state, (list, tuple)) else [state]


def test_fonts_draw_the_same_digits_from_the_same_seed():
    images, labels = font_digits.draw(50, 3)
    assert images.shape == (50, 1, 16, 16) and images.dtype == np.uint8 and images.max() > 200 and set(labels) <= set(range(10))
    assert (font_digits.draw(50, 3)[0] == images).all() and (font_digits.draw(50, 4)[0] != images).any()
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "34fb0e0a914c9b78"    # matplotlib 3.7 and 3.11, numpy 1.26 and 2.4
    assert images[:, 0, 0].mean() < 5 < images.mean()                                            # ink in the middle, on black


def test_every_epoch_shows_every_image_once():
    rows = np.concatenate([train_sit.rows_of(step, 12, 0, 40) for step in range(10)])
    assert all(sorted(rows[k:k + 40]) == list(range(40)) for k in (0, 40, 80)) and (rows[:40] != rows[40:80]).any()


def test_moments_are_sampled_and_scaled(folder, tmp_path):
    for name in ("labels.npy", "features.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    mean, std = torch.randn(64, 2, 8, 8, generator=seeded(32)), torch.rand(64, 2, 8, 8, generator=seeded(33))
    np.save(tmp_path / "latents.npy", torch.cat([mean, std], 1).numpy())
    (tmp_path / "meta.json").write_text(json.dumps(dict(scale=0.5, bias=0.25, num_classes=10, moments=True)))
    data = train_sit.Latents(tmp_path)
    noise, rows = torch.randn(4, 2, 8, 8, generator=seeded(34)), np.array([9, 2, 30, 2])
    seen = data.see(data.batch(rows)[0], noise)
    torch.testing.assert_close(seen, (mean[rows] + std[rows] * noise - 0.25) * 0.5)


def test_every_seed_draws_other_timesteps_and_other_noise_in_every_step_and_image(folder, tmp_path, monkeypatch):
    drawn, draw = [], train_sit.Timesteps.draw
    monkeypatch.setattr(train_sit.Timesteps, "draw", lambda self, u: drawn.append(u) or draw(self, u))
    for seed in range(3):
        assert run(flags(folder, tmp_path / str(seed), seed=seed) + ["--steps", 2]) == 0
    noise = torch.cat([sample.image_noise(seed, range(3), (1, 2, 2))[0] for seed in range(3)])
    assert len(drawn) == 6 and len(torch.cat(drawn).unique()) == 6 * 8 and len(noise.unique()) == noise.numel()


@pytest.mark.parametrize("changes", [{}, dict(timesteps="vr_loss", align="nt_xent"), dict(baseline=True, predict="x", path="cosine"),
                                     dict(align="vrpo", vrpo_weights="inverse_variance")], ids=["default", "vr_loss", "baseline", "vrpo"])
def test_resume_is_exact(folder, tmp_path, changes):
    assert run(flags(folder, tmp_path / "whole", **changes)) == 0
    assert run(flags(folder, tmp_path / "parts", **changes) + ["--steps", 3]) == 0
    assert run(flags(folder, tmp_path / "parts", **changes)) == 0
    whole, parts = (torch.load(train_sit.newest_checkpoint(tmp_path / k), weights_only=True) for k in ("whole", "parts"))
    whole.pop("config"), parts.pop("config")
    leaves = list(zip(flat(whole), flat(parts), strict=True))
    assert len(leaves) > 300 and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in leaves)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts") and len(log_of(tmp_path / "parts")) == 6


def test_a_row_after_a_resume_is_the_mean_over_the_steps_since(folder, trained, tmp_path):
    assert run(flags(folder, tmp_path) + ["--steps", 5, "--log_every", 3]) == 0
    assert run(flags(folder, tmp_path) + ["--log_every", 3]) == 0
    mean = lambda rows: np.mean([[float(v) for v in row[1:4]] for row in rows], 0)
    rows, steps = log_of(tmp_path), log_of(trained)                     # every step; steps 1 to 3, then 6 alone
    np.testing.assert_allclose([mean(rows[:1]), mean(rows[1:])], [mean(steps[:3]), mean(steps[5:])], rtol=1e-5)


@pytest.mark.parametrize("timesteps", train_sit.ACCEPTED["timesteps"])
def test_all_timestep_kinds_draw_inside_the_interval(folder, timesteps):
    for path in fpo.PATHS:
        draw = train_sit.Timesteps(train_sit.Config(timesteps=timesteps, path=path), train_sit.Latents(folder), "cpu")
        losses = torch.rand(500, generator=seeded(35))
        for _ in range(3):
            t = draw.draw(torch.cat([torch.zeros(1), torch.rand(499, generator=seeded(36))]))
            assert t.isfinite().all() and (t >= draw.least).all() and (t <= 1).all()
            draw.update(t, losses * t)
    if timesteps == "vr_loss":
        assert draw.state["pdf"][80:].mean() > 2 * draw.state["pdf"][:20].mean()                  # the loss was proportional to t


@pytest.mark.parametrize("changes", [dict(weighting="p2", fpo="off", path="diffusion"), dict(weighting="min_snr", fpo="alignment"),
                                     dict(weighting="hard_sample", fpo="off", timesteps="vr_monte_carlo", predict="eps", amp="bf16")], ids=["p2", "min_snr", "hard"])
def test_other_policies_paths_and_targets_train_and_sample(folder, tmp_path, changes):
    changes = {**changes}
    assert run(flags(folder, tmp_path, **{k: v for k, v in changes.items() if k != "amp"}) + ["--amp", changes.get("amp", "fp32")]) == 0
    assert all(np.isfinite(log_of(tmp_path)).flatten())
    assert run(["--checkpoint", tmp_path, "--out", tmp_path / "s", "--count", 4, "--steps", 3], sample) == 0
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].std() > 0


@pytest.mark.parametrize("predict", ["x", "eps"])
def test_vr_loss_follows_the_loss_in_velocity_whatever_the_network_predicts(folder, predict):
    data, (x, eps, guess) = train_sit.Latents(folder), torch.randn(3, 500, 6, generator=seeded(80))
    t = 0.1 + 0.8 * torch.rand(500, generator=seeded(81))             # away from where the conversion is floored
    x_t, v = fpo.interpolate(x, eps, t, fpo.cosine)
    v_hat = {"x": fpo.velocity_from_x, "eps": fpo.velocity_from_eps}[predict](guess, x_t, t, fpo.cosine)
    densities = []
    for kind, loss in (("v", fpo.velocity_loss(v_hat, v)), (predict, fpo.velocity_loss(guess, dict(x=x, eps=eps)[predict]))):
        draw = train_sit.Timesteps(train_sit.Config(timesteps="vr_loss", predict=kind, path="cosine"), data, "cpu")
        draw.update(t, loss)
        densities.append(draw.state["pdf"])
    torch.testing.assert_close(*densities, rtol=1e-4, atol=1e-5)


def test_the_weight_average_keeps_no_graph(folder, tmp_path, monkeypatch):
    lerp, graphs = torch._foreach_lerp_, []

    def watched(averages, parameters, weight):
        lerp(averages, parameters, weight)
        graphs.extend(a.grad_fn for a in averages)

    monkeypatch.setattr(torch, "_foreach_lerp_", watched)
    assert run(flags(folder, tmp_path) + ["--steps", 2]) == 0
    assert len(graphs) > 100 and not any(graphs)


def test_a_signal_before_the_first_step_saves_and_stops(folder, tmp_path, monkeypatch):
    batch = train_sit.Latents.batch

    def shot(*arguments):
        if threading.current_thread() is not threading.main_thread():  # a reader: the first batch of the loop
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return batch(*arguments)

    monkeypatch.setattr(train_sit.Latents, "batch", shot)
    assert run(flags(folder, tmp_path, repa=False, timesteps="uniform")) == 128 + signal.SIGTERM
    assert train_sit.newest_checkpoint(tmp_path).name == "step-0000000.pt"


def test_the_disk_must_hold_what_will_be_written_and_no_more(folder, tmp_path, monkeypatch, capsys):
    assert run(flags(folder, tmp_path) + ["--save_every", 3]) == 0    # 2 checkpoints
    size = 16 * 1e6 * float(capsys.readouterr().out.split(" M parameters")[0].split()[-1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1.5 * size))
    assert run(flags(folder, tmp_path) + ["--steps", 7]) == 0         # the third file, then one is removed
    assert "need 0.1 more" in run(flags(folder, tmp_path) + ["--steps", 8, "--keep", 4])


def test_a_broken_line_of_the_log_is_dropped_on_resuming(folder, tmp_path):
    assert run(flags(folder, tmp_path) + ["--steps", 3]) == 0
    with open(tmp_path / "log.csv", "a") as file:
        file.write("abc\n")
    assert run(flags(folder, tmp_path)) == 0 and len(log_of(tmp_path)) == 6


def launch(processes, program, argv, *options):
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    return subprocess.Popen([*command, str(HERE / program), *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_run_and_its_samples_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    assert run(flags(folder, tmp_path / "1")) == 0
    for n, steps in ((4, 3), (2, 6)):                                 # begun on 4 processes, ended on 2
        job = launch(n, "train_sit.py", flags(folder, tmp_path / "parts") + ["--steps", steps])
        assert job.wait(120) == 0, job.stdout.read()
    np.testing.assert_allclose(log_of(tmp_path / "parts"), log_of(tmp_path / "1"), rtol=2e-3)
    argv = ["--checkpoint", tmp_path / "1", "--count", 7, "--sampler", "sde", "--steps", 4, "--guidance", 1.5]
    assert run(argv + ["--out", tmp_path / "a"], sample) == 0
    assert run(argv + ["--out", tmp_path / "b", "--batch", 3], sample) == 0
    job = launch(2, "sample.py", argv + ["--out", tmp_path / "c"])
    assert job.wait(120) == 0, job.stdout.read()
    a, b, c = (np.load(tmp_path / k / "samples.npz", allow_pickle=False) for k in "abc")
    for other in (b, c):
        assert (a["labels"] == other["labels"]).all() and np.abs(a["arr_0"].astype(int) - other["arr_0"]).max() <= 1
    settings = json.loads(str(a["settings"]))
    assert a["arr_0"].shape == (7, 8, 8, 3) and a["arr_0"].dtype == np.uint8 and a.files[0] == "arr_0"
    assert settings["nfe"] == 4 and settings["sampler"] == "sde" and settings["w"] == 2 and settings["step"] == 6


def test_killed_at_any_moment_the_newest_checkpoint_loads_and_the_run_goes_on(folder, tmp_path):
    argv = flags(folder, tmp_path) + ["--save_every", 1, "--steps", 100_000]
    job = launch(0, "train_sit.py", argv)
    while train_sit.newest_checkpoint(tmp_path) is None and job.poll() is None:
        time.sleep(0.05)
    time.sleep(0.7)
    job.kill()
    job.wait()
    step = train_sit.load_model(train_sit.newest_checkpoint(tmp_path))[1]["step"]
    job = launch(0, "train_sit.py", argv)
    while (newest := train_sit.newest_checkpoint(tmp_path)) is None or int(newest.stem[5:]) < step + 2:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)                                   # saves first
    said = job.communicate(timeout=60)[0]
    stopped = int(train_sit.newest_checkpoint(tmp_path).stem[5:])
    assert job.returncode == 128 + signal.SIGTERM and f"stopped at step {stopped}" in said
    assert [int(row[0]) for row in log_of(tmp_path)] == list(range(1, stopped + 1))
    assert run(["--checkpoint", tmp_path, "--out", tmp_path / "s", "--count", 2, "--steps", 2], sample) == 0


def test_vrpo_is_the_same_run_on_two_processes_and_resumes_there(folder, tmp_path):
    changes = dict(align="vrpo", vrpo_stability=0.34)                  # rows 0, 3, 6 of 8: two of one process, one of the other
    assert run(flags(folder, tmp_path / "1", **changes)) == 0
    assert run(flags(folder, tmp_path / "2", **changes) + ["--steps", 2]) == 0
    job = launch(2, "train_sit.py", flags(folder, tmp_path / "2", **changes))
    assert job.wait(120) == 0, job.stdout.read()
    np.testing.assert_allclose(log_of(tmp_path / "2"), log_of(tmp_path / "1"), rtol=2e-3)
    logs = [np.genfromtxt(tmp_path / k / "log.csv", delimiter=",", names=True) for k in "12"]
    for column in ("reward", "reward_std"):
        np.testing.assert_allclose(logs[0][column], logs[1][column], rtol=2e-3)


@pytest.mark.parametrize("predict", ["v", "x", "eps"])
def test_theorem_5_vrpo_gives_the_later_blocks_no_gradient_at_all_and_the_first_ones_some(predict):
    model, (x, t, y) = awake(train_sit.SiT(**SMALL, feature_dim=6)), inputs()
    eps, features = torch.randn(x.shape, generator=seeded(60)), torch.randn(3, 16, 6, generator=seeded(61))
    x_t, v = fpo.interpolate(x, eps, t)
    prediction, z = model(x_t, t, y, features=True)
    cfg = train_sit.Config(align="vrpo", vrpo_stability=1.0, predict=predict)
    train_sit.vrpo_losses(cfg, model, z, prediction, x, eps, t, y, features, {}, 0, 1).mean().backward()
    early = [p for k, p in model.named_parameters() if k.startswith(("blocks.0", "blocks.1", "projectors", "x_embedder"))]
    late = [p for k, p in model.named_parameters() if k.startswith(("blocks.2", "final_layer"))]
    assert len(late) == 14 and all(p.grad is None for p in late)
    assert all(p.grad.abs().sum() > 0 for p in early)


def test_torchrun_restarts_after_a_killed_worker_and_goes_on_from_the_newest_checkpoint(folder, tmp_path, monkeypatch):
    """Process 1 kills itself in step 5 of the first attempt; a checkpoint was written after step 4."""
    (tmp_path / "main.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train_sit
update = train_sit.Timesteps.update
def mortal(self, *arguments):
    self.calls = getattr(self, "calls", 0) + 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] + os.environ["RANK"] == "01" and self.calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, *arguments)
train_sit.Timesteps.update = mortal
train_sit.main()
""")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")      # or torchrun finds the addresses of the dead at times
    job = launch(2, tmp_path / "main.py", flags(folder, tmp_path / "out") + ["--save_every", 2], "--max-restarts=1")
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and "done: 6 steps" in said, said
    assert run(flags(folder, tmp_path / "whole")) == 0
    np.testing.assert_allclose(log_of(tmp_path / "out"), log_of(tmp_path / "whole"), rtol=2e-3)


def test_a_label_that_is_no_class_is_refused_when_its_file_is_read(tmp_path):
    data = fast_dit_folder(tmp_path / "data", 64, side=8)
    np.save(data / "imagenet256_labels" / f"{train_sit.rows_of(3, 8, 0, 64)[5]}.npy", np.array([1000]))
    said = run(flags(data, tmp_path / "out", repa=False, timesteps="uniform"))
    assert "0 to 999 are accepted" in said and "\n" not in said


def test_data_lost_under_a_running_job_end_all_processes_with_one_line(tmp_path):
    data = fast_dit_folder(tmp_path / "data", 64, side=8)
    job = launch(2, "train_sit.py", flags(data, tmp_path / "out", repa=False, timesteps="uniform") + ["--save_every", 1, "--steps", 100_000])
    while train_sit.newest_checkpoint(tmp_path / "out") is None:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.02)
    for file in (data / "imagenet256_features").iterdir():
        if file.name != "0.npy" and int(file.stem) % 2:
            file.unlink()
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and said.count("No such file") == 1 and "Traceback" not in said.split("exitcode: 1")[0], said
    assert train_sit.load_model(train_sit.newest_checkpoint(tmp_path / "out"))[1]["step"] >= 1


def test_a_full_disk_ends_all_processes_with_one_line_and_keeps_the_last_whole_checkpoint(folder, tmp_path):
    import resource
    assert run(flags(folder, tmp_path)) == 0
    good = train_sit.newest_checkpoint(tmp_path)
    command = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6)); import train_sit; train_sit.main()"
    (tmp_path / "main.py").write_text(f"import sys; sys.path.insert(0, {str(HERE)!r}); {command}")
    job = launch(2, tmp_path / "main.py", flags(folder, tmp_path) + ["--steps", 9, "--save_every", 2])
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and said.count("cannot write") == 1 and f"checkpoint: {good}" in said, said
    assert "Traceback" not in said.split("exitcode: 1")[0], said       # the others end in silence
    assert train_sit.newest_checkpoint(tmp_path) == good and not list(tmp_path.glob("*.tmp"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("changes", [{}, dict(align="nt_xent", timesteps="vr_loss"), dict(fpo="off"), dict(repa=False, weighting="hard_sample", fpo="off")],
                         ids=["default", "nt_xent", "no FPO", "hard"])
def test_accumulation_is_the_same_run_and_only_a_ranking_costs_a_second_forward_pass(folder, tmp_path, changes, monkeypatch):
    forward, calls = train_sit.SiT.forward, []
    monkeypatch.setattr(train_sit.SiT, "forward", lambda self, x, *a, **k: calls.append(len(x)) or forward(self, x, *a, **k))
    monkeypatch.setattr(train_sit, "write_pictures", lambda *_: None)
    assert run(flags(folder, tmp_path / "1", **changes)) == 0
    assert calls == [8] * 6
    assert run(flags(folder, tmp_path / "4", **changes) + ["--accumulate", 4]) == 0
    assert calls[6:] == [2] * 6 * (4 if changes.get("fpo") == "off" and "weighting" not in changes else 8)
    np.testing.assert_allclose(log_of(tmp_path / "4"), log_of(tmp_path / "1"), rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, dict(align="nt_xent", timesteps="vr_loss"), dict(fpo="off", weighting="min_snr", accumulate=2),
                                     dict(align="vrpo", vrpo_weights="inverse_variance")], ids=["default", "vr_loss", "min_snr", "vrpo"])
def test_no_step_asks_a_tensor_for_its_value(folder, tmp_path, changes, monkeypatch):
    """On a GPU each such question waits for it. Only the ends of logging intervals ask: 4 and 8 steps ask equally often."""
    from torch.utils._python_dispatch import TorchDispatchMode
    asking, counts = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[-1] += function.overloadpacket in asking
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(train_sit, "write_pictures", lambda *_: None)
    for steps in (4, 8):
        counts.append(0)
        with Count():
            assert run(flags(folder, tmp_path / str(steps), **changes) + ["--steps", steps, "--log_every", steps]) == 0
    assert counts[0] == counts[1] > 0


def test_checkpointing_makes_the_same_run_and_runs_every_block_once_more(folder, tmp_path, trained, monkeypatch):
    modulate, calls = train_sit.modulate, []
    monkeypatch.setattr(train_sit, "modulate", lambda *a: calls.append(1) or modulate(*a))
    monkeypatch.setattr(train_sit, "write_pictures", lambda *_: None)
    assert run(flags(folder, tmp_path) + ["--checkpointing", "--steps", 3]) == 0
    np.testing.assert_allclose(log_of(tmp_path), log_of(trained)[:3], rtol=1e-3)
    assert len(calls) == 3 * (6 * 2 + 6 * 2 + 1)                      # six blocks, twice; the last layer


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_make_the_same_run_and_are_compiled_once_for_all(folder, tmp_path, trained):
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert run(flags(folder, tmp_path) + ["--compile", "on", "--steps", 3]) == 0
    np.testing.assert_allclose(log_of(tmp_path), log_of(trained)[:3], rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and train_sit.load_model(train_sit.newest_checkpoint(tmp_path))[1]["step"] == 3


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    for arch in ({**SMALL, "feature_dim": 7}, {**train_sit.MODELS["SiT-S/2"], "feature_dim": 768}):
        with torch.device("meta"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model = train_sit.SiT(**arch)
            size, channels = model.arch["size"], model.channels
            for features in (False, True):
                with FlopCounterMode(display=False) as counter:
                    model(torch.empty(1, channels, size, size), torch.empty(1), torch.empty(1, dtype=torch.long), features=features)
                assert train_sit.forward_flops(model, features) == counter.get_total_flops()


def test_bench_reports_and_keeps_nothing(folder, tmp_path, capsys):
    assert run(flags(folder, tmp_path) + ["--bench", 2]) == 0
    said = capsys.readouterr()
    assert "TFLOP/s" in said.out and "images/s from" in said.out and "4/4" in said.err and not list(tmp_path.iterdir())
    assert train_sit.matmul_rate(torch.device("cpu"), torch.float32) > 1e8


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """A data set of 4 x 8 x 8 latents with images and 16 feature tokens, and a network "nano" for it."""
    folder, random = tmp_path / "latents", np.random.RandomState(0)
    folder.mkdir()
    np.save(folder / "latents.npy", random.randn(64, 4, 8, 8).astype(np.float32) * 5)
    np.save(folder / "labels.npy", np.arange(64) % 10)
    np.save(folder / "features.npy", random.randint(-127, 128, (64, 16, 12)).astype(np.int8))
    np.save(folder / "images.npy", random.randint(0, 256, (64, 3, 64, 64)).astype(np.uint8))
    (folder / "meta.json").write_text(json.dumps(dict(scale=0.2, bias=0.0, num_classes=10, vae="some/vae")))
    monkeypatch.setitem(train_sit.MODELS, "nano", dict(depth=2, width=32, heads=4, encoder_depth=1, patch=2, projector_width=32))
    monkeypatch.setitem(train_sit.ACCEPTED, "model", list(train_sit.MODELS))
    return folder


@pytest.mark.parametrize("kind", ["REPA", "SiT"])
def test_a_new_run_starts_from_published_weights(latents, tmp_path, kind):
    torch.manual_seed(0)
    model = train_sit.SiT(8, 4, 10, **train_sit.MODELS["nano"], feature_dim=12 if kind == "REPA" else None)
    if kind == "SiT":
        model.final_layer = train_sit.FinalLayer(32, 2 * 2 * 8)
    state = awake(model).state_dict()
    torch.save({"model": {}, "ema": state, "args": argparse.Namespace()} if kind == "REPA" else state, tmp_path / "init.pt")
    argv = flags(latents, tmp_path / "out", model="nano", init=tmp_path / "init.pt") + ["--lr", 0, "--steps", 1]
    assert run(argv) == 0 and run(argv + ["--steps", 2]) == 0
    ours, _ = train_sit.load_model(train_sit.newest_checkpoint(tmp_path / "out"), ema=False)
    theirs, _ = train_sit.load_model(tmp_path / "init.pt")
    for a, b in zip(ours(*inputs(2, 8, 4)), theirs(*inputs(2, 8, 4))):
        torch.testing.assert_close(a, b)
    assert "trained with --path linear" in run(argv + ["--out", tmp_path / "other", "--path", "cosine"])
    assert "another architecture" in run(argv + ["--out", tmp_path / "other", "--model", "tiny", "--no-repa"])


def test_an_encoder_on_line_is_as_good_as_its_stored_features(latents, tmp_path, monkeypatch):
    project = torch.randn(3 * 16 * 16, 12, generator=seeded(50))
    encode = lambda images: F.unfold(images.float() / 255, 16, stride=16).transpose(1, 2) @ project             # (B, 16, 12)
    monkeypatch.setattr(imagenet, "load_encoder", lambda name, size, device: encode if (name, size) == ("mine", 64) else None)
    argv = flags(latents, tmp_path / "a", model="nano") + ["--steps", 2]
    assert run(argv + ["--encoder", "mine"]) == 0
    images = torch.from_numpy(np.load(latents / "images.npy"))
    np.save(latents / "features.npy", encode(images).numpy())
    assert run(argv + ["--out", tmp_path / "b"]) == 0
    np.testing.assert_allclose(log_of(tmp_path / "a"), log_of(tmp_path / "b"), rtol=1e-4)


def test_samples_are_decoded_a_few_at_a_time(latents, tmp_path, monkeypatch, capsys):
    sizes = []

    class Enlarge:                                                    # latent x 8 pixels, as the real one; scale undone first
        def decode(self, z):
            sizes.append(len(z))
            return argparse.Namespace(sample=F.interpolate(z[:, :3], scale_factor=8.0) / 20)

    monkeypatch.setattr(imagenet, "load_vae", lambda name, device: Enlarge())
    assert run(flags(latents, tmp_path / "run", model="nano", repa=False) + ["--steps", 1]) == 0
    argv = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "s", "--count", 19, "--steps", 1, "--vae", "some/vae", "--amp", "tf32"]
    assert run(argv, sample) == 0 and max(sizes) == 8
    said, kept = capsys.readouterr().out, np.load(tmp_path / "s" / "samples.npz")
    assert "evaluator.py" in said and kept["arr_0"].shape == (19, 64, 64, 3) and json.loads(str(kept["settings"]))["vae"] == "some/vae"
    x, _, _ = sample.generate(*train_sit.load_model(train_sit.newest_checkpoint(tmp_path / "run")), sample.Config(steps=1), np.arange(19), torch.device("cpu"))
    expected = (x[:, :3] / 0.2 / 20 + 1) * 127.5
    assert np.abs(kept["arr_0"][:, ::8, ::8].transpose(0, 3, 1, 2) - expected.clamp(0, 255).numpy()).max() <= 0.51


def test_images_that_are_not_finite_are_never_written(trained, tmp_path):
    state = torch.load(train_sit.newest_checkpoint(trained), weights_only=True)
    state["ema"]["final_layer.linear.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pt")
    for sampler in ("euler", "dopri5"):
        line = run(["--checkpoint", tmp_path / "nan.pt", "--out", tmp_path / "s", "--count", 3, "--sampler", sampler], sample)
        assert "not finite" in line and "\n" not in line and not list((tmp_path / "s").iterdir())


def test_samples_need_room_on_the_disk(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    assert "GB will be written" in run(["--checkpoint", trained, "--out", tmp_path, "--count", 30, "--steps", 1], sample)


def test_what_fails_in_one_process_of_sampling_is_said_once(trained, tmp_path):
    (tmp_path / "main.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import sample
def lost(*_):
    if os.environ["RANK"] == "1":
        raise OSError("the disk of machine 2 is gone")
sample.load_model_of = sample.load_model
sample.load_model = lambda *a: lost() or sample.load_model_of(*a)
sample.main()
""")
    job = launch(2, tmp_path / "main.py", ["--checkpoint", trained, "--out", tmp_path / "s", "--count", 4, "--steps", 1])
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and said.count("machine 2 is gone") == 1 and "Traceback" not in said.split("exitcode: 1")[0], said


def test_latents_that_were_scaled_on_the_disk_are_unscaled_for_the_vae():
    seen = []
    vae = types.SimpleNamespace(decode=lambda z: types.SimpleNamespace(sample=seen.append(z) or z[:, :3]))
    x = torch.randn(50, 4, 8, 8, generator=seeded(82))
    for meta in (dict(scale=0.18215, bias=0.0), dict(scale=1.0, bias=0.0, scaled_by=0.18215)):         # REPA's, fast-DiT's
        sample.to_pixels(x, meta, vae)
        assert abs(torch.cat(seen).std() - 1 / 0.18215) < 0.1
        seen.clear()


def test_sampling_never_runs_the_projector(trained):
    model, config = train_sit.load_model(train_sit.newest_checkpoint(trained))
    model.projectors[0].register_forward_hook(lambda *_: pytest.fail("the projector ran"))
    x, labels, nfe = sample.generate(model, config, sample.Config(steps=2, guidance=2.0, classes=(7, 1)), np.arange(3), torch.device("cpu"))
    assert x.shape == (3, 1, 8, 8) and labels.tolist() == [7, 1, 7] and nfe == 4


def test_frechet_distance_of_gaussians_and_precision_recall_of_known_sets():
    a = torch.randn(200_000, 3, generator=seeded(37), dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -1.0])
    assert abs(sample.frechet_distance(a, a * scale + shift) - (2 + 1 + 0.25)) < 0.03             # |shift|^2 + sum (1 - scale)^2
    real = torch.randn(500, 2, generator=seeded(38))
    assert sample.precision_recall(real, real) == (1, 1)
    near, far = real[:250] * 0.01, real[250:] + 100
    precision, recall = sample.precision_recall(real, torch.cat([near, far]))
    assert precision == 0.5 and recall < 0.05


def test_cknna_is_1_for_a_rotation_and_low_for_strangers_and_counts_mutual_neighbours_alone():
    a = torch.randn(300, 8, generator=seeded(70), dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=seeded(71), dtype=torch.float64)).Q
    stranger = torch.randn(300, 8, generator=seeded(72), dtype=torch.float64)
    assert abs(sample.cknna(a, a @ turn) - 1) < 1e-9 and abs(sample.cknna(a, stranger)) < 0.1
    total, norms = 0.0, [0.0, 0.0]                                                               # Eq. 23 by loops, n = 30
    a, b = a[:30], 0.7 * a[:30] + 0.3 * stranger[:30]
    K, L = a @ a.T, b @ b.T
    knn = lambda G, i: sorted((j for j in range(30) if j != i), key=lambda j: -G[i, j])[:10]
    for i in range(30):
        for j in knn(K, i):
            k = K[i, j] - K[i].mean()
            norms[0] += k * k
            if j in knn(L, i):
                total += k * (L[i, j] - L[i].mean())
        norms[1] += sum((L[i, j] - L[i].mean()) ** 2 for j in knn(L, i))
    assert abs(sample.cknna(a, b) - total / (norms[0] * norms[1]) ** 0.5) < 1e-9


def test_the_linear_probe_reads_what_is_linear_and_nothing_else():
    labels = torch.arange(2000) % 5
    z = torch.randn(2000, 12, generator=seeded(73)) + 7
    assert abs(sample.linear_probe(z, labels, 5) - 0.2) < 0.06
    z[:, :5] += 8 * F.one_hot(labels, 5)
    assert sample.linear_probe(1e-3 * z, labels, 5) > 0.99


def test_metrics_of_features_see_the_hidden_tokens_without_the_label(folder, trained):
    model, _ = train_sit.load_model(train_sit.newest_checkpoint(trained))
    data, seen = train_sit.Latents(folder, features=True), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args))
    result = sample.measure_features(model, {"path": "linear"}, data, t=0.3)
    x, t, y = seen[0]
    assert len(seen) == 1 and len(x) == 64 and (t == 0.3).all() and (y == 10).all() and len(result) == 3
    z = model(x, t, y, features=True)[1]
    rows = np.random.RandomState(1).permutation(64)
    cosine = F.cosine_similarity(z, torch.from_numpy(np.load(folder / "features.npy")[rows]).float(), dim=-1).mean()
    assert abs(result["alignment, cosine (t = 0.3)"] - cosine) < 1e-5


@pytest.mark.parametrize("predict, path", [("v", "linear"), ("x", "cosine")])
def test_the_losses_of_the_data_are_those_of_a_direct_loop_at_even_t_with_labels(folder, predict, path):
    model = awake(train_sit.SiT(8, 1, 10, **{k: v for k, v in SMALL.items() if k not in ("size", "channels", "num_classes", "patch")},
                                patch=4, feature_dim=8, projector_width=16)).eval()
    data, seen = train_sit.Latents(folder, features=True), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[:3]))
    t, losses, align = sample.data_losses(model, dict(predict=predict, path=path), data, n=1000)      # there are 64
    torch.testing.assert_close(t.sort().values, (torch.arange(64) + 0.5) / 64)
    rows, (x_t, seen_t, y) = np.random.RandomState(1).permutation(64), seen[0]
    assert len(seen) == 1 and torch.equal(seen_t, t) and y.tolist() == data.labels[rows].tolist()
    x = data.see(torch.from_numpy(data.latents[rows]), None)
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in fpo.PATHS[path](t))
    eps = (x_t - alpha * x) / sigma
    with torch.no_grad():
        out, z = model(x_t, t, y, features=True)
    v_hat = out if predict == "v" else d_alpha * out + d_sigma * (x_t - alpha * out) / sigma.clamp_min(0.05)
    torch.testing.assert_close(losses, (v_hat - d_alpha * x - d_sigma * eps).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    cosine = F.cosine_similarity(z, torch.from_numpy(data.targets[rows]).float(), dim=-1).mean(1)
    torch.testing.assert_close(align, -cosine)


# ------------------------------------------------------------------------------------------------------------------
# The study behind README's results


sys.path.append(str(HERE / "assets"))
import ablation  # noqa: E402


def test_the_variance_that_t_explains_is_all_for_a_function_of_t_and_none_for_noise():
    t, noise = (torch.randperm(4000, generator=seeded(96)) + 0.5) / 4000, torch.randn(4000, generator=seeded(97))
    assert ablation.explained(t, (t * 20).floor().square()) > 0.999 and abs(ablation.explained(t, noise)) < 0.02
    assert abs(ablation.explained(t, 12 ** 0.5 * t + noise) - 0.5) < 0.03


@pytest.mark.parametrize("n", ablation.QUANTILE)
def test_intervals_hold_95_percent_of_student_s_distribution(n):
    nu, x = n - 1, torch.linspace(-ablation.QUANTILE[n], ablation.QUANTILE[n], 20001, dtype=torch.float64)
    density = (1 + x ** 2 / nu) ** (-(nu + 1) / 2) * math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    assert abs(torch.trapezoid(density, x) - 0.95) < 1e-4


def test_paired_differences_pair_the_seeds_in_whatever_order_the_runs_ended_and_leave_out_the_rest(tmp_path, monkeypatch):
    rows = [("REPA", 1, 2.0, 0.5), ("VRPO", 0, 1.1, 0.7), ("VRPO", 3, 9.0, 0.1), ("REPA", 0, 1.0, 0.6), ("REPA", 2, 7.0, 0),
            ("VRPO", 1, 2.2, 0.9), ("P2", 0, 1.0, 0.5)]
    text = [f"grid,{name},{seed},600,{loss},1,{judge}" + ",0" * 11 for name, seed, loss, judge in rows]
    (tmp_path / "ablation.csv").write_text("\n".join([",".join(ablation.COLUMNS), *text]))
    monkeypatch.setattr(ablation, "HERE", tmp_path)
    mean, half = ablation.Table().gap("grid", "VRPO", "REPA", "loss")
    assert abs(mean - 10) < 1e-9 and abs(half) < 1e-9                                              # in % of the base's
    mean, half = ablation.Table().gap("grid", "VRPO", "REPA", "accuracy")
    assert abs(mean - 25) < 1e-9 and abs(half - 12.706 * 15) < 1e-2                                # 10 and 40 points
    with pytest.raises(SystemExit, match="has 1 seeds of 'P2'"):
        ablation.Table().gap("grid", "P2", "REPA", "loss")


def test_the_figures_and_tables_of_the_study_come_from_the_committed_table_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--draw", "--out", str(tmp_path)])
    ablation.main()
    printed = capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {"ablation.png", "ablation_fpo.png", "ablation_batch.png", "ablation_vr.png"}
    readme = " ".join((HERE / "README.md").read_text().split())
    for line in printed.splitlines():
        assert " ".join(line.split()) in readme, f"README lacks what the study prints: {line}"


def test_every_test_that_readme_names_exists():
    named = re.findall(r"\b(test_[a-z0-9_]{9,})(\.{3})?", (HERE / "README.md").read_text())
    assert len(named) > 20
    for name, cut in named:
        assert any(real.startswith(name) if cut else real == name for real in globals()), f"README names {name}"


def damaged(folder, tmp_path, what):
    """A copy of the data folder with one thing wrong."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    meta = json.loads((folder / "meta.json").read_text())
    if what == "no labels":
        (tmp_path / "labels.npy").unlink()
    elif what == "no features":
        (tmp_path / "features.npy").unlink()
    elif what == "label 10":
        np.save(tmp_path / "labels.npy", np.arange(64) % 11)
    elif what == "63 labels":
        np.save(tmp_path / "labels.npy", np.arange(63) % 10)
    elif what == "wrong scale":
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "scale": 1.0}))
    elif what == "a list":
        (tmp_path / "meta.json").write_text("[]")
    elif what == "two biases":
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "bias": [1.0, 2.0]}))
    elif what == "no scale":
        (tmp_path / "meta.json").write_text(json.dumps({"num_classes": 10}))
    elif what == "9 tokens":
        np.save(tmp_path / "features.npy", np.ones((64, 9, 8), np.int8))
    elif what == "no images":
        for name in ("latents", "labels", "features"):
            np.save(tmp_path / f"{name}.npy", np.load(folder / f"{name}.npy")[:0])
    elif what == "words":
        np.save(tmp_path / "latents.npy", np.full((64, 1, 16, 16), "one"))
    elif what == "an archive":
        np.savez(open(tmp_path / "latents.npy", "wb"), a=np.ones(3))
    elif what == "odd moments":
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "moments": True}))
    elif what == "pickled":
        np.save(tmp_path / "labels.npy", np.array([None] * 64), allow_pickle=True)
    return tmp_path


@pytest.mark.parametrize("what, expected", [
    ("no labels", "labels.npy"), ("no features", "features.npy"), ("label 10", "0 to 9"), ("63 labels", "63"), ("wrong scale", "scale"),
    ("9 tokens", "9 tokens"), ("pickled", "Python objects"), ("no scale", "'scale'"), ("a list", "TypeError"), ("two biases", "TypeError"), ("gone", "meta.json"),
    ("no images", "latents (N, C, H, H)"), ("words", "latents (N, C, H, H)"), ("an archive", "AttributeError"), ("odd moments", "C, H, H")])
def test_bad_data_is_refused_in_one_line(folder, tmp_path, what, expected):
    data = tmp_path / "gone" if what == "gone" else damaged(folder, tmp_path, what)
    line = run(flags(data, tmp_path / "out"))
    assert isinstance(line, str) and expected in line and "\n" not in line
    assert not list((tmp_path / "out").glob("step*"))


@pytest.mark.parametrize("argv, expected", [
    (["--model", "huge"], "SiT-XL/2"), (["--path", "curly"], "cosine"), (["--timesteps", "soon"], "vr_gaussian"),
    (["--weighting", "x"], "min_snr"), (["--weighting", "p2", "--fpo", "off", "--predict", "eps"], "--predict v"),
    (["--align", "vrpo", "--vrpo_stability", "0.1"], "of 8 images"), (["--align", "vrpo", "--accumulate", "2"], "--accumulate 1"), (["--r", "0"], "0 < r <= 1"), (["--tau", "0"], "tau > 0"), (["--beta", "-1"], "beta >= 0"),
    (["--steps", "0"], "from 1"), (["--lr", "-1"], "from 0"), (["--lr", "fast"], "--lr"), (["--weighting", "p2"], "--fpo"),
    (["--baseline", "--timesteps", "logit_normal"], "--baseline means --timesteps uniform"), (["--guidance", "nan"], "from 0"),
    (["--out", "/proc/nothing"], "/proc/nothing"), (["--model", "SiT-S/8"], "tokens"), (["--nonsense"], "--nonsense")])
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, argv, expected):
    line = run(flags(folder, tmp_path / "out") + argv)
    assert isinstance(line, str) and expected in line and "\n" not in line


@pytest.mark.parametrize("argv, expected", [
    (["--sampler", "magic"], "dopri5"), (["--steps", "0"], "from 1"), (["--classes", "3", "10"], "0 to 9"), (["--interval", "0.7", "0.2"], "interval"),
    (["--checkpoint", "/nowhere.pt"], "/nowhere.pt"), (["--metrics", "--data", "/nowhere"], "/nowhere"), (["--metrics"], "16 x 16"),
    (["--metrics", "--count", "3"], "--count 10"), (["--guidance", "nan"], "from 0"), (["--vae", "/nowhere"], "pip install diffusers")])
def test_bad_sampling_flags_are_refused_in_one_line(trained, tmp_path, argv, expected):
    line = run(["--checkpoint", trained, "--out", tmp_path / "s", *argv], sample)
    assert isinstance(line, str) and expected in line and "\n" not in line


def test_a_run_with_other_flags_does_not_resume(folder, tmp_path):
    assert run(flags(folder, tmp_path) + ["--steps", 1]) == 0
    assert "another --out" in run(flags(folder, tmp_path) + ["--beta", 3])


def test_a_run_does_not_resume_from_another_architecture_or_a_foreign_file(folder, tmp_path):
    for content in ({"model": {}}, {"config": {}, "arch": {"depth": 3}}, torch.ones(2)):
        torch.save(content, tmp_path / "step-0000001.pt")
        assert "another --out" in run(flags(folder, tmp_path))


def test_a_batch_that_does_not_divide_is_refused_by_one_process(folder, tmp_path):
    job = launch(2, "train_sit.py", flags(folder, tmp_path) + ["--batch", 7])
    said = job.communicate(timeout=60)[0]
    assert job.returncode != 0 and said.count("must be a multiple of the 2 processes") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(folder, tmp_path):
    assert run(flags(folder, tmp_path)) == 0
    good = train_sit.newest_checkpoint(tmp_path)
    state = torch.load(good, weights_only=True)
    state["model"]["final_layer.linear.bias"].fill_(math.nan)
    torch.save(state, good)
    line = run(flags(folder, tmp_path) + ["--steps", 30])
    assert "not finite at step 7" in line and str(good) in line
    assert train_sit.newest_checkpoint(tmp_path) == good


def test_vrpo_that_diverges_ends_in_one_line_too(folder, tmp_path):
    line = run(flags(folder, tmp_path, align="vrpo", lr=1e30) + ["--warmup", 0])
    assert "not finite at step" in line and "none yet" in line


def test_clip_0_clips_nothing(folder, tmp_path):
    for clip in (0, 1e9):
        assert run(flags(folder, tmp_path / str(clip), clip=clip)) == 0
    assert log_of(tmp_path / "0") == log_of(tmp_path / str(1e9))


# ------------------------------------------------------------------------------------------------------------------
# data/imagenet.py


def tiny_vae(seed=0):
    """A VAE of one random convolution, with the interface of diffusers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = nn.Conv2d(3, 8, 8, 8)
    moments = lambda x: vae(x).chunk(2, 1)
    vae.encode = lambda x: types.SimpleNamespace(
        latent_dist=types.SimpleNamespace(mean=moments(x)[0], std=moments(x)[1].exp()))
    return vae


def tiny_encoder(seed=0, width=6):
    """An encoder of one random convolution and a 37 x 37 position embedding, with the interface of DINOv2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = nn.Conv2d(3, width, 14, 14)
        encoder.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, width))
    encoder.forward_features = lambda x: {
        "x_norm_patchtokens": encoder(x).flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]}
    return encoder


@pytest.fixture
def hub(monkeypatch):
    """diffusers and torch.hub without a network: the names of what was loaded."""
    loaded = []
    kind = types.SimpleNamespace(from_pretrained=lambda name: loaded.append(name) or tiny_vae())
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=kind))
    monkeypatch.setattr(torch.hub, "load", lambda repo, name: loaded.append(f"{repo} {name}") or tiny_encoder())
    return loaded


def draw_images(folder, sizes=((70, 50), (33, 64), (40, 40), (90, 31)), modes=("RGB", "L", "P", "RGBA", "CMYK")):
    """Images of odd sizes, modes and formats, one folder per class."""
    random, classes = np.random.RandomState(0), ["n02", "n01", "n10"]
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            picture = Image.fromarray(random.randint(0, 256, (height // 4, width // 4, 3)).astype(np.uint8))
            mode = modes[(4 * c + i) % len(modes)]
            suffix = {"RGB": ".JPEG", "CMYK": ".jpg"}.get(mode, ".PNG" if i % 2 else ".png")
            picture.resize((width, height)).convert(mode).save(folder / name / f"{9 - i}{suffix}")
    (folder / classes[0] / "notes.txt").write_text("no image")
    (folder / ".trash").mkdir()
    return folder


def content(folder):
    return {file.name: np.load(file) for file in folder.glob("*.npy")}


def settings(images, out, **changes):
    out.mkdir(exist_ok=True)
    return imagenet.Config(**{**dict(images=str(images), out=str(out), size=32, batch=5), **changes})


def say(function, *arguments, **named):
    """The error of a call, which must be one line."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("width, height", [(300, 200), (131, 64), (333, 500), (48, 48), (40, 90), (37, 31), (97, 96), (95, 191)])
def test_the_crop_is_the_centre_of_the_image(width, height, size=48):
    """Every filter keeps a linear ramp, so each pixel of the crop tells which place of the image it shows."""
    x, y = np.arange(width), np.arange(height)
    ramp = np.stack(np.broadcast_arrays(x * 250 / width, (y * 250 / height)[:, None], 0.0), -1).round().astype(np.uint8)
    crop = np.asarray(imagenet.centre_crop(Image.fromarray(ramp), size)).astype(float)
    assert crop.shape == (size, size, 3)
    scale = size / min(width, height)
    for axis, length in ((0, width), (1, height)):
        resized = round(length * scale)
        place = ((resized - size) // 2 + np.arange(size) + 0.5) * length / resized - 0.5
        inner = slice(5, -5)                                        # at the border the filters see no ramp
        shown = crop[..., axis].mean(axis) * length / 250
        assert np.abs(shown - place)[inner].max() < 0.45 * length / resized, (axis, shown - place)


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


def test_a_folder_of_images_becomes_a_data_set(tmp_path, hub, monkeypatch):
    images = draw_images(tmp_path / "images")
    backwards = lambda name: lambda folder: sorted(getattr(os, name)(folder), key=os.fspath, reverse=True)
    unsorted = {**vars(os), "scandir": backwards("scandir"), "listdir": backwards("listdir")}
    monkeypatch.setattr(imagenet, "os", types.SimpleNamespace(**unsorted))
    cfg = settings(images, tmp_path / "out", pixels=True)
    imagenet.make(cfg)
    assert hub == ["stabilityai/sd-vae-ft-ema", "facebookresearch/dinov2 dinov2_vitb14"]
    arrays, meta = content(tmp_path / "out"), json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "features.npy", "images.npy", "labels.npy", "latents.npy", "meta.json"]
    files = [file for name in ("n01", "n02", "n10") for file in sorted((images / name).iterdir()) if file.suffix != ".txt"]
    assert len(files) == 12 and (arrays["labels.npy"] == np.repeat([0, 1, 2], 4)).all()
    crops = np.stack([np.asarray(imagenet.centre_crop(Image.open(file).convert("RGB"), 32)) for file in files])
    assert (arrays["images.npy"] == crops.transpose(0, 3, 1, 2)).all() and arrays["images.npy"].dtype == np.uint8
    mean, log_std = tiny_vae()(torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, 1)
    latents = torch.cat([mean, log_std.exp()], 1).detach().numpy()
    assert np.allclose(arrays["latents.npy"], latents, atol=1e-5) and arrays["latents.npy"].shape == (12, 8, 4, 4)
    tokens = imagenet.load_encoder("dinov2_vitb14", 32, "cpu")(torch.from_numpy(arrays["images.npy"]))
    assert arrays["features.npy"].shape == (12, 4, 6) and arrays["features.npy"].dtype == np.int8
    assert F.cosine_similarity(tokens, torch.from_numpy(arrays["features.npy"]).float(), dim=-1).min() > 0.9999
    assert (meta["scale"], meta["bias"], meta["moments"], meta["num_classes"], meta["size"]) == (0.18215, 0, True, 3, 32)
    assert (meta["vae"], meta["encoder"]) == (cfg.vae, cfg.encoder)
    data = train_sit.Latents(tmp_path / "out", features=True)
    assert (data.channels, data.size, data.moments) == (4, 4, True)


def test_stopped_in_the_middle_it_goes_on_and_does_nothing_twice(tmp_path, hub):
    images, encoder, seen = draw_images(tmp_path / "images"), imagenet.load_encoder("any", 32, "cpu"), []

    def vae(x, broken_at=None):
        seen.append(len(x))
        if len(seen) == broken_at:
            raise RuntimeError("power cut")
        return imagenet.latents_of(tiny_vae(), x)

    imagenet.make(settings(images, tmp_path / "whole", batch=2), vae=vae, encoder=encoder)
    assert seen == [1] + 6 * [2]                                    # the first image tells the shapes
    seen.clear()
    with pytest.raises(RuntimeError):
        imagenet.make(settings(images, tmp_path / "parts", batch=2), vae=functools.partial(vae, broken_at=5), encoder=encoder)
    assert not (tmp_path / "parts" / "meta.json").exists() and np.load(tmp_path / "parts" / ".done.npy").sum() == 3
    say(train_sit.Latents, tmp_path / "parts")                      # not yet for training
    seen.clear()
    imagenet.make(settings(images, tmp_path / "parts", batch=2), vae=vae, encoder=encoder)
    assert seen == [1] + 3 * [2]
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert whole.keys() == parts.keys() == {"latents.npy", "labels.npy", "features.npy"}
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_two_processes_share_the_work(tmp_path, hub):
    images, vae = draw_images(tmp_path / "images"), functools.partial(imagenet.latents_of, tiny_vae())
    imagenet.make(settings(images, tmp_path / "one"), vae=vae)
    cfg = settings(images, tmp_path / "two")
    imagenet.make(cfg, 0, 2, vae=vae)
    assert np.load(tmp_path / "two" / ".done.npy").tolist() == [1, 0, 1]
    imagenet.make(cfg, 1, 2, vae=vae)
    assert not (tmp_path / "two" / "meta.json").exists()            # process 0 says when it is finished
    imagenet.make(cfg, 0, 2, vae=vae)
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    assert (tmp_path / "one" / "meta.json").read_text() == (tmp_path / "two" / "meta.json").read_text()


def test_an_exception_without_words_gives_its_name():
    assert (imagenet.reason(EOFError()), imagenet.reason(OSError("a\nb"))) == ("EOFError", "a")


def no_network(*arguments, **named):
    raise OSError("no connection\nto anything")


def spoil(what, images, out, monkeypatch):
    """Damage one thing after a run was stopped; the flags with which it must refuse to go on."""
    if what == "corrupt image":
        file = max((images / "n10").iterdir())
        file.write_bytes(file.read_bytes()[:60])
    elif what == "other files":
        (images / "n01" / "9.JPEG").rename(images / "n01" / "99.JPEG")
    elif what == "finished":
        (out / "meta.json").write_text("{}")
    elif what == "other array":
        np.save(out / "latents.npy", np.zeros((12, 8, 4, 4), np.float16))
    elif what == "array gone":
        (out / "labels.npy").unlink()
    elif what == "full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    elif what == "no diffusers":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    elif what == "no such VAE":
        monkeypatch.setattr(sys.modules["diffusers"].AutoencoderKL, "from_pretrained", no_network)
    elif what == "offline":
        monkeypatch.setattr(torch.hub, "load", no_network)
    elif what == "empty class":
        (images / "n05").mkdir()
    elif what == "not empty":
        (out / ".begun.json").unlink()
    return {"other batch": dict(batch=3), "other vae": dict(vae="mine"), "no folder": dict(images=str(images / "none")),
            "their parent": dict(images=str(images.parent)), "no classes": dict(images=str(images / "n01"))}.get(what, {})


@pytest.mark.parametrize("what, says", [
    ("corrupt image", "images/n10/9.JPEG cannot be used"), ("other files", "files 12 of"), ("finished", "finished"),
    ("other array", "latents.npy is float16"), ("array gone", "labels.npy"), ("full disk", "0.0 GB free"),
    ("no diffusers", "pip install diffusers"), ("no such VAE", "cannot be loaded: no connection"),
    ("offline", "dinov2_vitb14 cannot be loaded: no connection"), ("empty class", "without images: ['n05']"),
    ("not empty", "not empty"), ("other batch", "batch 5, not 3"), ("other vae", "ft-ema, not mine"),
    ("no folder", "images/none has neither"), ("their parent", "without images: ['images'"), ("no classes", "one folder")])
def test_a_stopped_run_that_cannot_go_on_says_why_in_one_line(tmp_path, hub, monkeypatch, what, says):
    images, out = draw_images(tmp_path / "images", sizes=4 * [(33, 40)], modes=["RGB", "P"]), tmp_path / "out"
    with pytest.raises(ZeroDivisionError):                          # at the last chunk, of 2 images
        imagenet.make(settings(images, out), vae=lambda x: torch.zeros(len(x), 8, 4, 4) / (1 // (len(x) - 2)))
    changes = spoil(what, images, out, monkeypatch)
    assert says in say(imagenet.make, dataclasses.replace(settings(images, out), **changes))


def test_flags_of_imagenet_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["imagenet.py"])
    for argv, says in (([], "are needed"), (["--images", tmp_path], "are needed"), (["--size", 300], "256"), (["--batch", 0], "from 1"),
                       (["--images", "none", "--out", tmp_path], "none has neither"), (["--images", tmp_path, "--out", __file__], "--out")):
        with pytest.raises(SystemExit) as stop:
            imagenet.main([str(argument) for argument in argv])
        assert str(stop.value).startswith("imagenet.py: ") and says in str(stop.value) and "\n" not in str(stop.value)


def test_position_embeddings_are_resampled_and_the_class_token_is_kept():
    code = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(imagenet.resample_positions(code, 37), code)
    row, column = torch.meshgrid(*[torch.arange(37.0)] * 2, indexing="ij")
    code[0, 1:, 0], code[0, 1:, 1] = row.flatten(), column.flatten()      # what place a position says that it is
    code[0, 1:, 2] = (row + column).flatten() % 2                         # nothing that a coarser grid could show
    for size, side in ((256, 16), (512, 32)):
        out = imagenet.resample_positions(code, 16 * size // 256)
        assert out.shape == (1, 1 + side * side, 5) and torch.equal(out[:, 0], code[:, 0])
        place = (torch.arange(side) + 0.5) * 37 / side - 0.5
        row, column = out[0, 1:, :2].unflatten(0, (side, side)).unbind(-1)
        inner = slice(3, -3)
        assert (row - place[:, None])[inner, inner].abs().max() < 0.03
        assert (column - place)[inner, inner].abs().max() < 0.03
        if side == 16:
            assert (out[0, 1:, 2] - 0.5).abs().max() < 0.1


def test_the_encoder_sees_normalised_images_at_seven_eighths_of_their_size():
    seen = []
    encoder = types.SimpleNamespace(forward_features=lambda x: seen.append(x) or {"x_norm_patchtokens": x})
    images = torch.tensor([0, 128, 255], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 512, 512)
    imagenet.tokens_of(encoder, images)
    imagenet.tokens_of(encoder, images[..., :256, :256])
    assert [x.shape for x in seen] == [(2, 3, 448, 448), (2, 3, 224, 224)]
    expected = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    assert all((x - expected[:, None, None]).abs().max() < 1e-4 for x in seen)


def test_int8_tokens_change_the_alignment_loss_by_less_than_a_thousandth():
    """Tokens as DINOv2's, with tails and with dimensions ten times as large as the others; h at every angle to them."""
    random, B, T, D = torch.Generator().manual_seed(0), 4, 256, 768
    draw = lambda: torch.randn(B, T, D, generator=random)
    y, worst = draw() * (0.3 * draw()).exp(), 0.0
    y[..., :3] *= 10
    for cosine in torch.linspace(-1, 1, 9):
        away = draw()
        away = F.normalize(away - (away * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True) * y, dim=-1)
        h = cosine * F.normalize(y, dim=-1) + (1 - cosine ** 2).sqrt() * away
        exact, stored = fpo.alignment_loss(h, y), fpo.alignment_loss(h, imagenet.to_int8(y))
        assert torch.allclose(exact, -cosine.expand(B), atol=1e-4)
        worst = max(worst, (exact - stored).abs().max().item())
    print(f"int8 tokens: the alignment loss changes by at most {worst:.1e}")
    assert worst < 1e-3


def test_int8_tokens_use_the_whole_range_and_keep_zeros():
    y = torch.tensor([[0.0, 0.0, 0.0], [0.5, -2.0, 0.25], [3e4, 1.0, -3e4]])
    assert imagenet.to_int8(y).tolist() == [[0, 0, 0], [32, -127, 16], [127, 0, -127]]


# ------------------------------------------------------------------------------------------------------------------
# The layouts of REPA and fast-DiT


def repa_folder(folder, n=7, images=True):
    random, entries = np.random.RandomState(1), []
    for i in random.permutation(n):
        name = f"0000{i % 2}/img-mean-std-{i:08d}.npy"
        for part in ("vae-sd", "images"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, np.full((8, 4, 4), i, np.float32) + random.rand(8, 4, 4).astype(np.float32))
        Image.new("RGB", (32, 32), (int(i), 20 * int(i), 9)).save(folder / "images" / f"0000{i % 2}/img{i:08d}.png")
        entries.append([name, int(i) % 5])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": entries}))
    if not images:
        shutil.rmtree(folder / "images")
    return folder


def fast_dit_folder(folder, n=7, size=256, side=4):
    for part in ("features", "labels"):
        (folder / f"imagenet{size}_{part}").mkdir(parents=True)
    for i in range(n):
        latents = np.random.RandomState(i).randn(1, 4, side, side).astype(np.float32)
        np.save(folder / f"imagenet{size}_features" / f"{i}.npy", latents)
        np.save(folder / f"imagenet{size}_labels" / f"{i}.npy", np.array([90 * i % 1000]))
    return folder


def test_repa_folders_are_read_as_they_lie(tmp_path):
    meta, arrays = imagenet.read_foreign(repa_folder(tmp_path))
    assert (meta["scale"], meta["bias"], meta["moments"], meta["num_classes"], meta["vae"]) == (0.18215, 0, True, 5, None)
    assert meta["layout"] == "REPA" and arrays.keys() == {"latents", "labels", "images"}
    assert (arrays["latents"].shape, arrays["latents"].dtype, len(arrays["latents"])) == ((7, 8, 4, 4), np.float32, 7)
    assert (arrays["images"].shape, arrays["images"].dtype) == ((7, 3, 32, 32), np.uint8)
    rows = np.array([4, 0, 4, 6, 5, 1, 3, 2])
    latents, labels, images = (arrays[name][rows] for name in ("latents", "labels", "images"))
    numbers = images[:, 0, 0, 0]                                    # the picture says which image it is
    assert sorted(set(numbers)) == list(range(7)) and (images[:, 1, 3, 5] == 20 * numbers).all()
    assert (latents.astype(int) == numbers[:, None, None, None]).all() and (labels == numbers % 5).all()
    assert labels.dtype == np.int64


@pytest.mark.parametrize("size", [256, 512])
def test_fast_dit_folders_are_read_as_they_lie(tmp_path, size):
    meta, arrays = imagenet.read_foreign(fast_dit_folder(tmp_path, 11, size))
    assert (meta["scale"], meta["bias"], meta["moments"], meta["num_classes"], meta["vae"]) == (1, 0, False, 1000, None)
    assert meta["layout"] == "fast-DiT" and arrays.keys() == {"latents", "labels"}
    assert (arrays["latents"].shape, arrays["labels"].shape) == ((11, 4, 4, 4), (11,))
    rows = np.array([10, 2, 0, 2])
    assert (arrays["labels"][rows] == 90 * rows).all()
    assert (arrays["latents"][rows] == [np.random.RandomState(i).randn(4, 4, 4).astype(np.float32) for i in rows]).all()


@pytest.mark.parametrize("kind, encoder", [("REPA", "dinov2_vitb14"), ("REPA", "none"), ("REPA without images", "dinov2_vitb14"),
                                           ("fast-DiT", "dinov2_vitb14")])
def test_the_layouts_of_others_are_repacked_without_a_vae(tmp_path, hub, capsys, kind, encoder):
    make = fast_dit_folder if kind == "fast-DiT" else functools.partial(repa_folder, images="without" not in kind)
    source, out = make(tmp_path / "source"), tmp_path / "out"
    imagenet.make(settings(source, out, batch=3, encoder=encoder))
    with_features = (kind, encoder) == ("REPA", "dinov2_vitb14")
    assert hub == ["facebookresearch/dinov2 dinov2_vitb14"] * with_features
    assert ("no features" not in capsys.readouterr().out) == with_features == (out / "features.npy").exists()
    (meta, foreign), ours = imagenet.read_foreign(source), train_sit.Latents(out, features=with_features)
    assert {key: ours.meta[key] for key in ("scale", "bias", "moments", "num_classes", "vae")} == {
        key: meta[key] for key in ("scale", "bias", "moments", "num_classes", "vae")}
    assert ours.meta["made_from"] == meta["layout"]
    everything = np.arange(7)
    assert (ours.latents == foreign["latents"][everything]).all() and (ours.labels == foreign["labels"][everything]).all()
    if with_features:
        tokens = imagenet.load_encoder("any", 32, "cpu")(torch.from_numpy(foreign["images"][everything]))
        stored = torch.from_numpy(np.load(out / "features.npy")).float()
        assert F.cosine_similarity(tokens, stored, dim=-1).min() > 0.999


def test_torchrun_repacks_with_two_processes(tmp_path):
    source, out = repa_folder(tmp_path / "source", 40), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "data" / "imagenet.py",
               "--images", source, "--out", out, "--batch", "8", "--encoder", "none"]
    run = subprocess.run(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and f"made {out}: 40 images of 5 classes" in run.stdout, run.stdout
    _, arrays = imagenet.read_foreign(source)
    assert all(np.array_equal(np.load(out / f"{name}.npy"), arrays[name][np.arange(40)]) for name in ("latents", "labels"))


def test_every_process_names_the_file_that_it_cannot_read(tmp_path, monkeypatch):
    source, out = fast_dit_folder(tmp_path / "source"), tmp_path / "out"
    imagenet.make(settings(source, out, size=256, batch=2), 0, 2)
    (source / "imagenet256_features" / "6.npy").write_bytes(b"")      # of chunk 3, thus of process 1
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_sit, "start_processes", lambda: (1, 2, torch.device("cpu")))
    with pytest.raises(SystemExit) as stop:
        imagenet.main(["--images", str(source), "--out", str(out), "--batch", "2"])
    assert f"{source}/imagenet256_features/6.npy cannot be used" in str(stop.value) and "\n" not in str(stop.value)
    assert np.load(out / ".done.npy").tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("what, says", [
    ("missing latents", "imagenet256_features must hold"), ("missing label", "imagenet256_labels/3.npy cannot be used"),
    ("corrupt", "imagenet256_features/3.npy cannot be used"), ("pickle", "imagenet256_features/3.npy cannot be used"),
    ("Fortran", "Fortran's order"), ("shape", "another shape or type than 0.npy, float32 (1, 4, 4, 4)"), ("type", "another shape or type"), ("none", "must hold"),
    ("json", "dataset.json has no list"), ("no labels", "dataset.json has no list"), ("no picture", "img00000003.png"),
    ("empty", "REPA"), ("pixels", "--pixels: there are no images")])
def test_damaged_foreign_folders_are_refused_in_one_line(tmp_path, what, says):
    repa, fast = repa_folder(tmp_path / "repa"), fast_dit_folder(tmp_path / "fast")
    file, folder = fast / "imagenet256_features" / "3.npy", fast
    if what in ("missing latents", "missing label"):
        (file if what == "missing latents" else fast / "imagenet256_labels" / "3.npy").unlink()
    elif what == "corrupt":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "pickle":
        np.save(file, np.array([{}] * 2), allow_pickle=True)
    elif what == "Fortran":
        np.save(file.parent / "0.npy", np.asfortranarray(np.load(file.parent / "0.npy")))
    elif what in ("shape", "type"):
        np.save(file, np.zeros((1, 4, 4, 5), np.float32) if what == "shape" else np.zeros((1, 4, 4, 4)))
    elif what == "none":
        for file in file.parent.iterdir():
            file.unlink()
    elif what in ("json", "no labels", "no picture"):
        folder = repa
        if what == "no picture":
            (repa / "images" / "00001" / "img00000003.png").unlink()
        else:
            (repa / "vae-sd" / "dataset.json").write_text("{" if what == "json" else '{"labels": []}')
    elif what == "empty":
        folder = tmp_path

    def use():
        _, arrays = imagenet.read_foreign(folder)
        for array in arrays.values():
            array[np.arange(7)]
        imagenet.make(settings(folder, tmp_path / "out", pixels=True))

    assert says in say(use)


# ------------------------------------------------------------------------------------------------------------------
# Costs (python -m pytest -q -s -k cost prints them)


def seconds(function, repeat=20):
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def test_cost_of_the_method_in_a_training_step_of_the_tiny_model():
    torch.manual_seed(0)
    model = train_sit.SiT(16, 1, 10, **train_sit.MODELS["tiny"], feature_dim=64)
    opt, (x, t, y) = torch.optim.AdamW(model.parameters(), fused=True), (torch.randn(128, 1, 16, 16), torch.rand(128), torch.arange(128) % 10)
    features, cfg = torch.randint(-127, 128, (128, 16, 64), dtype=torch.int8), train_sit.Config(timesteps="vr_loss")
    draw, parameters = train_sit.Timesteps(cfg, None, "cpu"), list(model.parameters())
    ema, losses = [p.detach().clone() for p in parameters], torch.rand(2, 128)
    amp = train_sit.bf16_is_faster(torch.device("cpu"))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            v, z = model(x, t, y, features=True)
        opt.zero_grad()
        (fpo.velocity_loss(v, x) + 0.5 * fpo.alignment_loss(z, features)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()

    def log():
        means = torch.cat([losses.mean(1), losses.mean()[None]])
        torch.where(means.isfinite().all(), means, means).tolist(), fpo.weight_moved(losses[0])

    whole = seconds(step, 7)
    parts = {"FPO": seconds(lambda: train_sit.sample_weights(cfg, losses, t)),
             "timesteps": seconds(lambda: draw.update(draw.draw(t), losses[0])),
             "EMA": seconds(lambda: torch._foreach_lerp_(ema, [p.detach() for p in parameters], 0.01)), "log": seconds(log)}
    print(f"\nstep {1e3 * whole:.0f} ms; share of it: " + ", ".join(f"{k} {v / whole:.2%}" for k, v in parts.items()))
    assert parts["FPO"] < 0.01 * whole and sum(parts.values()) < 0.03 * whole


def test_cost_of_vrpo_beside_repa():
    torch.manual_seed(0)
    model = awake(train_sit.SiT(16, 1, 10, **train_sit.MODELS["tiny"], feature_dim=64)).train()
    x, t, y = torch.randn(128, 1, 16, 16), torch.rand(128), torch.arange(128) % 10
    eps, features = torch.randn(x.shape), torch.randint(-127, 128, (128, 16, 64), dtype=torch.int8)
    x_t, v = fpo.interpolate(x, eps, t)
    amp, states = train_sit.bf16_is_faster(torch.device("cpu")), {0.0: {}, 0.25: {}}

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            prediction, z = model(x_t, t, y, features=True)
        (fpo.velocity_loss(prediction, v) + 0.5 * fpo.alignment_loss(z, features)).mean().backward()
        return prediction.detach(), z.detach().requires_grad_()

    def vrpo(stability):
        cfg = train_sit.Config(align="vrpo", vrpo_stability=stability, amp="bf16" if amp else "fp32")
        train_sit.vrpo_losses(cfg, model, z, prediction, x, eps, t, y, features, states[stability], 0, 1).mean().backward()

    prediction, z = step()                                            # below z the gradient is as costly for both
    whole, repa = seconds(step, 7), seconds(lambda: fpo.alignment_loss(z, features).mean().backward())
    plain, quarter = (seconds(lambda: vrpo(share)) - repa for share in (0.0, 0.25))
    print(f"\nREPA {1e3 * whole:.0f} ms forward and backward; VRPO +{plain / whole:.1%} without stability, +{quarter / whole:.1%} on a quarter")
    assert plain < 0.03 * whole and quarter < 0.1 * whole


def test_cost_of_importing_is_that_of_torch():
    def launch(*command):
        return timeit.timeit(lambda: subprocess.run([sys.executable, *command], cwd=HERE, check=True, stdout=subprocess.DEVNULL), number=1)

    rounds = [(launch("-c", "import torch"), launch("-c", "import train_sit"), launch("train_sit.py", "--help")) for _ in range(4)]
    torch_alone, ours, help_ = map(min, zip(*rounds))                  # in turns: a busy moment of the machine meets all three
    print(f"\nimport torch {torch_alone:.2f} s; import train_sit {ours / torch_alone:.2f}x; --help {help_ / torch_alone:.2f}x")
    assert ours < 1.3 * torch_alone and help_ < 1.3 * torch_alone


def test_the_core_printed_in_the_readme_runs():
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    model = awake(train_sit.SiT(**SMALL, feature_dim=6))
    grid = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    namespace = dict(torch=torch, fpo=fpo, B=3, grid=grid, density=torch.ones(100), model=model, x=inputs()[0], y=inputs()[2],
                     features=torch.randn(3, 16, 6, generator=seeded(40)))
    exec(code, namespace)
    assert namespace["loss"].isfinite() and model.projectors[0][0].weight.grad.abs().sum() > 0
