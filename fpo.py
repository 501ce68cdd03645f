"""The method, as pure functions on tensors: stochastic interpolants, REPA, FPO, VRPO, VR-sampling, samplers.

Every function lifts out alone: torch and its arguments, nothing global. Where one calls a neighbour, its docstring says
"needs". Time runs from data to noise: t = 0 is data, t = 1 is noise, everywhere.

    x_t = alpha_t x + sigma_t eps      v_t = alpha'_t x + sigma'_t eps      eps ~ N(0, I)

Sources, as cited below:
    [FPO]   REPA-FPO: A Fisher Policy Optimization for Efficient Flow Matching Training
    [REPA]  Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think
    [VR]    VR-Sampling: Accelerating Flow Generative Model Training with Variance Reduction Sampling
            (its t is our 1 - t, its velocity is minus ours)
    [VRPO]  Improving Visual Representation Alignment Generation with GRPO
Letters: B batch, N samples that share one set of weights, C H W latent, T timesteps (or tokens), D width.
"""
import math

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------------
# Paths: t (B,) -> alpha, sigma, alpha', sigma', each (B,)


def linear(t):
    """Rectified flow: alpha = 1 - t, sigma = t, so v = eps - x for every t."""
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def cosine(t):
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2). [REPA App. A.2] prints cos twice: a typo."""
    a = math.pi / 2
    return torch.cos(a * t), torch.sin(a * t), -a * torch.sin(a * t), a * torch.cos(a * t)


def diffusion(t):
    """DDPM's path: alpha = exp(-0.5 int_0^t beta), sigma = sqrt(1 - alpha^2) [VR Table 1]; here beta(s) = 0.1 + 19.9 s.

    sigma' = 0.5 beta alpha^2 / sigma is infinite at t = 0. It is computed with sigma >= 1e-3 (t >= 1e-5), so that all
    is finite and the conversions below still invert each other.
    """
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t ** 2
    alpha, sigma = torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))
    return alpha, sigma, -beta * alpha / 2, beta * alpha ** 2 / (2 * sigma.clamp_min(1e-3))


PATHS = {"linear": linear, "cosine": cosine, "diffusion": diffusion}
FIRST_T = {"linear": 0.0, "cosine": 0.0, "diffusion": 1e-3}                       # train and sample on t >= this


def coefficients(t, x, path=linear):
    """path(t), each shaped (B, 1, ..., 1) to multiply x (B, ...): t (B,), or any first dimensions of x."""
    return [c.reshape(*c.shape, *[1] * (x.ndim - c.ndim)) for c in path(t)]


def interpolate(x, eps, t, path=linear):
    """x_t = alpha x + sigma eps and its velocity v = alpha' x + sigma' eps [REPA Eq. 1, 4].

    x, eps (B, ...), t (B,) in [0, 1] -> x_t, v, both (B, ...). Needs coefficients.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x, path)
    return alpha * x + sigma * eps, d_alpha * x + d_sigma * eps


# ------------------------------------------------------------------------------------------------------------------
# Conversions. (x_t, v) is an invertible linear map of (x, eps), with determinant alpha sigma' - alpha' sigma > 0:
# 1 for linear, pi/2 for cosine. Nothing below divides by alpha or sigma unless the quantity itself does. All of them
# take and give (B, ...), with t (B,).


def x_from_velocity(v, x_t, t, path=linear):
    """E[x | x_t] from v: x = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma). Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    return (d_sigma * x_t - sigma * v) / (alpha * d_sigma - d_alpha * sigma)


def eps_from_velocity(v, x_t, t, path=linear):
    """E[eps | x_t] from v: eps = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma). Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    return (alpha * v - d_alpha * x_t) / (alpha * d_sigma - d_alpha * sigma)


def score_from_velocity(v, x_t, t, path=linear, floor=1e-3):
    """grad log p_t(x_t) = -eps / sigma [REPA Eq. 6, 20], with sigma >= floor: at t = 0, v does not determine the score.

    Needs eps_from_velocity, coefficients.
    """
    return -eps_from_velocity(v, x_t, t, path) / coefficients(t, x_t, path)[1].clamp_min(floor)


def velocity_from_x(x_hat, x_t, t, path=linear, floor=1e-3):
    """v = alpha' x + sigma' (x_t - alpha x) / sigma, with sigma >= floor: x does not determine v at t = 0.

    Needs coefficients.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    return d_alpha * x_hat + d_sigma * (x_t - alpha * x_hat) / sigma.clamp_min(floor)


def velocity_from_eps(eps_hat, x_t, t, path=linear, floor=1e-3):
    """v = alpha' (x_t - sigma eps) / alpha + sigma' eps, with alpha >= floor: eps does not determine v at t = 1.

    Needs coefficients.
    """
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    return d_alpha * (x_t - sigma * eps_hat) / alpha.clamp_min(floor) + d_sigma * eps_hat


# ------------------------------------------------------------------------------------------------------------------
# Losses, one number per sample, in float32 or wider whatever the autocast dtype


def velocity_loss(v_hat, v):
    """Mean over C, H, W of (v_hat - v)^2 [REPA Eq. 4]: (B, ...), (B, ...) -> (B,)."""
    error = v_hat.to(torch.promote_types(v_hat.dtype, torch.float32)) - v
    return error.square().flatten(1).mean(1)


def alignment_loss(h, y):
    """Minus the mean over tokens of cos(h, y) [REPA Eq. 8]: h, y (B, T, D) -> (B,) in [-1, 1].

    The normalisation is never done in 16 bits, where small tokens turn it into NaN.
    """
    h, y = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (h, y))
    return -F.cosine_similarity(h, y, dim=-1).mean(1)


def nt_xent_loss(h, y, tau=0.1, first=0):
    """NT-Xent, the other alignment objective of [REPA Table 2]: cross entropy of h against its own y: -> (B,), >= 0.

    h (B, T, D); y (B', T, D) may hold more images, the whole global batch, and y[first + i] belongs to h[i]. The paper
    does not say what the negatives are. Here: the tokens at the same place in the other images of the batch.
    """
    h, y = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1) for z in (h, y))
    logits = torch.einsum("btd,ktd->bkt", h, y) / tau                              # (B, B', T)
    own = torch.arange(first, first + len(h), device=h.device)
    return F.cross_entropy(logits, own[:, None].expand(-1, h.shape[1]), reduction="none").mean(1)


# ------------------------------------------------------------------------------------------------------------------
# Fisher Policy Optimization: reweight the samples of a batch by their losses [FPO Alg. 2]
#
# The paper gives no tau; 1.0 here is the plain softmax. All N losses must be those of the *global* batch: ranking a
# GPU's own slice would be another algorithm for every number of GPUs.


def fpo_check(r, beta, tau):
    """Raise ValueError unless 0 < r <= 1, beta >= 0 and tau > 0."""
    if not 0 < r <= 1:
        raise ValueError(f"FPO: r = {r}, but 0 < r <= 1 is needed")
    if not 0 <= beta < math.inf:
        raise ValueError(f"FPO: beta = {beta}, but a finite beta >= 0 is needed")
    if not 0 < tau < math.inf:
        raise ValueError(f"FPO: tau = {tau}, but a finite tau > 0 is needed")


def fpo_policy(losses, r=0.8, tau=1.0, mask=None):
    """p = softmax(L / tau) on H, the top floor(r N) losses (at least 1), and 0 elsewhere [FPO Eq. 18].

    losses (N,) -> p (N,), sums to 1, differentiable (H is not). mask (N,) bool: only these samples compete and N is
    their number; where the mask is empty, p = 0. No host synchronisation. Needs fpo_check.
    """
    fpo_check(r, 0, tau)
    if mask is None:
        mask = torch.ones_like(losses, dtype=torch.bool)
    M = (r * mask.sum() + 1e-3).floor().clamp_min(1)        # 1e-3: 0.53 * 100 must give 53
    fixed = losses.detach().masked_fill(~mask, -math.inf)
    rank = fixed.argsort(descending=True, stable=True).argsort()
    outside = ~mask | (rank >= M)
    e = ((losses - fixed.max()) / tau).masked_fill(outside, -math.inf).exp()
    return e / e.sum().clamp_min(1)                         # the sum is >= 1, exp(0) at the peak, unless H is empty


def fpo_weights(losses, r=0.8, beta=2.0, tau=1.0, mask=None):
    """w = (1 + beta p) N / sum(1 + beta p) [FPO Eq. 19, 20]: losses (N,) -> w (N,), sums to N, differentiable.

    sum(p) = 1, so the denominator is N + beta. Outside the mask w = 1. Needs fpo_policy, fpo_check.
    """
    fpo_check(r, beta, tau)
    N = len(losses) if mask is None else mask.sum().clamp_min(1).to(losses)
    w = (1 + beta * fpo_policy(losses, r, tau, mask)) * N / (N + beta)
    return w if mask is None else torch.where(mask, w, 1.0)


def fpo_loss(losses, r=0.8, beta=2.0, tau=1.0, mask=None):
    """J = (1/N) sum w_i L_i [FPO Alg. 2], with the gradient going through w too [FPO Thm. 3.3]: (N,) -> scalar.

    Needs fpo_weights, fpo_policy, fpo_check.
    """
    return (fpo_weights(losses, r, beta, tau, mask) * losses).mean()


def fpo_gradient_weights(losses, r=0.8, beta=2.0, tau=1.0, mask=None):
    """Detached c (N,) such that (c * losses).mean() has exactly the gradient of fpo_loss. Sums to N.

    J depends on the parameters only through L, so both terms of [FPO Thm. 3.3] are multiples of grad L_i:
        c_i = w_i + beta / (1 + beta / N) * p_i (L_i - sum_j p_j L_j) / tau
    This is what training uses: with c from an all-gathered (N,) vector every rank backpropagates just its own slice,
    and the sum over ranks is the gradient of the global objective. Needs fpo_weights, fpo_policy, fpo_check.
    """
    losses = losses.detach()
    p, w = fpo_policy(losses, r, tau, mask), fpo_weights(losses, r, beta, tau, mask)
    N = len(losses) if mask is None else mask.sum().clamp_min(1).to(losses)
    return w + beta / (1 + beta / N) * p * (losses - (p * losses).sum()) / tau


# Other policies, each (N,) and normalised to sum to N as Eq. 20 does; hard samples and P2 are [FPO Table 5]'s. P2 and
# min-SNR are defined on the loss in eps:  |eps_hat - eps|^2 = (alpha / (alpha sigma' - alpha' sigma))^2 |v_hat - v|^2.


def hard_sample_weights(losses, r=0.8, beta=2.0, mask=None):
    """The boost of FPO spread evenly over the top floor(r N) losses: FPO's limit tau -> infinity.

    Needs fpo_weights, fpo_policy, fpo_check.
    """
    return fpo_weights(losses.detach(), r, beta, 1e30, mask)


def p2_weights(t, path=linear, k=1.0, gamma=1.0):
    """P2 weighting: 1 / (k + SNR)^gamma on the loss in eps, carried over to velocity: t (N,) -> (N,)."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    w = (alpha / (alpha * d_sigma - d_alpha * sigma)) ** 2 / (k + (alpha / sigma.clamp_min(1e-6)) ** 2) ** gamma
    return w * len(w) / w.sum()


def min_snr_weights(t, path=linear, gamma=5.0):
    """Min-SNR weighting: min(SNR, gamma) / SNR on the loss in eps, carried over to velocity: t (N,) -> (N,)."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    w = torch.minimum(alpha ** 2, gamma * sigma ** 2) / (alpha * d_sigma - d_alpha * sigma) ** 2
    return w * len(w) / w.sum()


def centred(losses, t, width=0.05):
    """losses minus their mean near that t, by a Gaussian kernel: losses, t (..., N) -> (..., N).

    What FPO ranks by when it should not prefer some timesteps to others; not in [FPO].
    """
    near = torch.softmax(-((t[..., :, None] - t[..., None, :]) / width).square() / 2, -1)         # rows sum to 1
    return losses - (near @ losses[..., None])[..., 0]


def weight_moved(w):
    """Share of the batch's weight that w (N,), sum N, moves away from uniform, and its effective sample size."""
    return (w - 1).abs().sum() / (2 * len(w)), w.sum() ** 2 / w.square().sum()


# ------------------------------------------------------------------------------------------------------------------
# Visual Representation Policy Optimization: representation alignment as a reward
#
# [VRPO]'s equations are blank in its text. This is a reconstruction from its prose, propositions and appendix:
#     rewards r_ki   fidelity = frechet_reward - perceptual_distance, semantic = -alignment_loss(h, y), stability_reward
#     R_i = sum_k w_k r_ki                                 w = (0.3, 0.5, 0.2), or ~ 1 / Var r_k             [Eq. 5, 12]
#     L_i = -(1 + eta Var R) (R_i - mu_R) / sigma_R        minimised: velocity loss + lambda_0 mean(L_i)  [Eq. 7-11, 14]
# Chosen, where the text is silent: the gradient goes through the rewards (Prop. 2 and 5 need it, though the text also
# speaks of log-probabilities), not through w, mu, sigma, Var R. Var is total, within and across batches. FID compares
# pooled projected h with pooled y; it and LPIPS weigh 1 each. The values of decay, eta and the floors.
#
# Where mathematics, and the tests, disagree with the paper:
# - Thm. 6, the alignment gradient fades: it is (1 + eta Var R) / sigma_R times that of -R, so it *grows* as R settles,
#   up to the floor of sigma_R. Only a coefficient that falls faster than sigma_R would make the theorem true.
# - Eq. 7, the baseline: a constant added to a reward changes nothing. VRPO is three losses with moving coefficients.
# - Thm. 2 needs uncorrelated rewards; and w depends on their units: a reward that hardly varies takes all the weight.
# - App. 0.A, FID of a batch: B <= D white features are best at sqrt((B - 1) / D) of the right spread, or less.


def pooled(h):
    """The features that frechet_reward compares: mean over unit tokens, in float32 or wider: (B, T, D) -> (B, D)."""
    return F.normalize(h.to(torch.promote_types(h.dtype, torch.float32)), dim=-1).mean(1)


def frechet_reward(z, mean, cov):
    """-|m - mean|^2 - tr(S + cov - 2 (S cov)^(1/2)), m, S those of z [VRPO App. 0.A]: (B, D), (D,), (D, D) -> scalar.

    In float64; the root by eigenvalues of a symmetric matrix of size min(B, D), so the gradient exists where S is
    singular. z: of the *global* batch; where DistributedDataParallel averages, own rows need world times the gradient.
    """
    X, mean, cov = (a.to("cpu" if z.device.type == "mps" else z.device).double() for a in (z, mean, cov))
    distance = (X.mean(0) - mean).square().sum() + cov.trace()
    X = (X - X.mean(0)) / max(1, len(X) - 1) ** 0.5                              # S = X^T X
    if len(X) <= len(cov):
        gram = X @ cov @ X.T                                                     # (B, B)
    else:
        value, vector = torch.linalg.eigh(cov.nan_to_num(0, 0, 0))               # NaN reaches the result by distance
        root = vector * value.clamp_min(0).sqrt()
        gram = root.T @ (X.T @ X) @ root                                         # (D, D)
    lam = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0))
    tiny = (1e-12 * lam[-1].detach()).clamp_min(1e-60)                           # below: no value and no gradient
    cross = torch.where(lam > tiny, lam.clamp_min(tiny).sqrt(), 0).sum()
    return (2 * cross - distance - X.square().sum()).to(z)


def perceptual_distance(x_hat, x):
    """Mean of |x_hat - x| over pixels and over scales 1, 2, 4, ... of average pooling: (B, C, H, W) -> (B,).

    Stands for LPIPS [VRPO Sec. 3.2; App. 0.A has the noisy input in place of x]; any callable will do. x_hat comes
    detached, as its gradient would enter the later blocks, against [VRPO Thm. 5]: it moves mu, sigma, w, Var R only.
    """
    levels = [x_hat.to(torch.promote_types(x_hat.dtype, torch.float32)) - x]
    while min(levels[-1].shape[2:]) > 1:
        levels.append(F.avg_pool2d(levels[-1], 2))
    return torch.stack([d.abs().flatten(1).mean(1) for d in levels]).mean(0)


def stability_reward(h, h_near):
    """Minus the mean over tokens of |unit h - unit h_near|^2 = 2 - 2 cos [VRPO Sec. 3.2]: (B, T, D) -> (B,) in [-4, 0].

    h_near: from the same x and eps at a neighbouring t; no gradient goes into it. Needs alignment_loss.
    """
    return -2 - 2 * alignment_loss(h, h_near.detach())


def inverse_variance_weights(variance, floor=2.5e-3):
    """w_k ~ 1 / max(variance_k, floor) [VRPO Eq. 12, Thm. 2]: (K,) -> (K,), sums to 1."""
    w = 1 / variance.clamp_min(floor)
    return w / w.sum()


@torch.no_grad()
def moving_moments(x, before=None, decay=0.99, weight=None):
    """Exponential moving mean (D,) and covariance (D, D) of the rows of x (N, D), those of the *global* batch.

    before: what the last call returned; None starts from this batch, not from 0. weight (N,): of the rows. Exactly
    the covariance of the moving E[x x'] and E[x], without its cancellation.
    """
    p = torch.full_like(x[:, 0], 1 / len(x)) if weight is None else weight.to(x) / weight.sum()
    mean = p @ x
    cov = (x - mean).T @ (p[:, None] * (x - mean))
    if before is None:
        return mean, cov
    gap = mean - before[0]
    return mean - decay * gap, decay * before[1] + (1 - decay) * (cov + decay * torch.outer(gap, gap))


def vrpo_terms(moments, weights=(0.3, 0.5, 0.2), eta=0.1, floor=0.05):
    """w (K,), mu_R, sigma_R >= floor, 1 + eta Var R [VRPO Eq. 7, 12, 14]; weights=None: by inverse variance.

    K = 2 takes the first two weights: no stability. They are made to sum to 1. Needs inverse_variance_weights.
    """
    mean, cov = moments
    fixed = None if weights is None else mean.new_tensor(weights[:len(mean)])
    w = inverse_variance_weights(cov.diagonal(), floor ** 2) if fixed is None else fixed / fixed.sum()
    variance = w @ cov @ w                                                       # correlations included
    return w, w @ mean, variance.clamp_min(floor ** 2).sqrt(), 1 + eta * variance


def vrpo_loss(rewards, moments, weights=(0.3, 0.5, 0.2), eta=0.1, floor=0.05, known=None):
    """L_i = -(1 + eta Var R) (R_i - mu_R) / sigma_R [VRPO Eq. 8, 14]: rewards (K, B) -> (B,).

    moments: moving_moments of rewards.T *with* this batch. known (B,): 1 / (share known of the global batch) where the
    last reward is known, else 0: the expectation of mean(L_i) and of its gradient is the same.
    Needs vrpo_terms, inverse_variance_weights.
    """
    w, mu, sigma, scale = vrpo_terms(moments, weights, eta, floor)
    if known is not None:
        rewards = torch.cat([rewards[:-1], known * rewards[-1:]])
    return -scale * (w @ rewards - mu) / sigma


# ------------------------------------------------------------------------------------------------------------------
# Timesteps: u (B,) uniform in [0, 1) -> t (B,)
#
# VR-sampling draws t where the irreducible velocity loss is large: pi(t) ~ h^2 V(t), h = (alpha' sigma - alpha sigma')
# / sigma, V = (1/d) E tr Cov[x | x_t]. h^2 V = (1/d) E |v - E[v | x_t]|^2: the loss that no network can go below.
# Three estimators of that one curve: posterior_variance and gaussian_posterior_variance below, and the measured loss
# per t of a network in training.


def posterior_variance(x, snr, noises=500, generator=None):
    """V(t) = (1/d) E tr Cov[x | x_t] when the data are the rows of x: Monte Carlo over noises [VR Eq. 3.3].

    x (M, d), snr = alpha / sigma (T,) -> V (T,) float64. V is 0 once the points separate, and at most
    gaussian_posterior_variance(x, snr) up to the Monte Carlo error.
    With x_t / alpha = x_i + s eps_l, s = 1 / snr, the posterior weight of x_j is proportional to
        A_ij E_jl = exp(-|x_i - x_j|^2 / 2 s^2) exp(x_j . eps_l / s),
    so a timestep costs two (M, M) @ (M, K) products, whatever d. x_i and x_j are two independent posterior draws, so
    V = E sum_j w_j |x_i - x_j|^2 / 2d: no cancellation. (Eq. 3.3 lacks a factor 1/K; it also subtracts two numbers
    near 1, which then meet h^2 -> infinity.)
    """
    x = x.double() - x.double().mean(0)
    M, d = x.shape
    eps = torch.randn(noises, d, dtype=x.dtype, device=x.device, generator=generator)
    g = x @ eps.T                                                                # (M, K)  x_j . eps_l
    square = x.square().sum(1)
    D = ((square[:, None] + square) / 2 - x @ x.T).clamp_min(0).fill_diagonal_(0)  # (M, M)  |x_i - x_j|^2 / 2
    nearest = D.clone().fill_diagonal_(math.inf).amin(1)                         # (M,)
    V = torch.zeros(len(snr), dtype=x.dtype, device=x.device)
    for k, s in enumerate((1 / snr.double()).clamp_min(1e-9).tolist()):
        near = nearest < 800 * s ** 2                 # other rows are alone: every other weight is below exp(-400)
        if near.any():
            A, E = torch.exp(-D[near] / s ** 2), torch.exp((g - g.amax(0)) / s)  # shifted for each noise
            Z = A @ E                                                            # (near, K)
            if Z.min() > 1e-280:
                V[k] = (((A * D[near]) @ E) / Z).sum()
            else:                                     # clusters far apart: shift for each row and noise instead
                V[k] = sum((torch.softmax(g / s - row[:, None] / s ** 2, 0) * row[:, None]).sum() for row in D[near])
    return V / (M * noises * d)


def gaussian_posterior_variance(x, snr):
    """V(t) if the data were Gaussian with the covariance of x: mean over eigenvalues of lam / (1 + snr^2 lam).

    x (M, d), M several times d or the spectrum comes out too steep; snr (T,) -> V (T,) float64. The error of the best
    *linear* denoiser, hence an upper bound for data of any shape.
    """
    x = x.double() - x.double().mean(0)
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T            # the same nonzero eigenvalues
    lam = torch.linalg.eigvalsh(gram / len(x)).clamp_min(0)
    return (lam / (1 + snr.double()[:, None] ** 2 * lam)).sum(1) / x.shape[1]


def vr_density(variance, t, path=linear, uniform=0.1):
    """pi(t) = (1 - uniform) h^2 V / integral + uniform / (t[-1] - t[0]) [VR Sec. 3.3]: V, t (T,) -> pdf (T,).

    t increasing, inside (0, 1]; the pdf integrates to 1 by the trapezoid rule. The uniform part keeps every t alive:
    on few points in high dimension V is 0 almost everywhere.
    """
    alpha, sigma, d_alpha, d_sigma = path(t.double())
    curve = ((d_alpha * sigma - alpha * d_sigma) / sigma) ** 2 * variance
    return (1 - uniform) * curve / torch.trapezoid(curve, t.double()) + uniform / (t[-1] - t[0])


def sample_timesteps(u, t, pdf):
    """Inverse CDF of a density on a grid [VR Sec. 3.3]: u (B,) in [0, 1), t and pdf (T,) -> (B,) in [t[0], t[-1]]."""
    cdf = torch.cumulative_trapezoid(pdf, t.to(pdf)).to(u)
    cdf, t = F.pad(cdf / cdf[-1], (1, 0)), t.to(u)
    k = torch.searchsorted(cdf, u, right=True).clamp(1, len(t) - 1)
    return t[k - 1] + (u - cdf[k - 1]) / (cdf[k] - cdf[k - 1]).clamp_min(1e-12) * (t[k] - t[k - 1])


def logit_normal_timesteps(u, m=0.0, s=1.0):
    """t = sigmoid(m + s z), z ~ N(0, 1) [VR Sec. 4.3; their m is -m here]. u = 0 gives t = 0, never NaN."""
    return torch.sigmoid(m + s * math.sqrt(2) * torch.erfinv(2 * u - 1))


def logit_normal_location(t, pdf, s=1.0, grid=0.25):
    """The m, a multiple of grid in [-4, 4], whose logit-normal CDF has the smallest Kolmogorov-Smirnov distance to pdf.

    t, pdf (T,) -> (m, distance) [VR Sec. 4.3]. The m of [VR Table 3] is minus ours.
    """
    t = t.double()
    cdf = torch.cumulative_trapezoid(pdf.double(), t)
    m = grid * torch.arange(-round(4 / grid), round(4 / grid) + 1, dtype=t.dtype, device=t.device)
    logit_normal = torch.special.ndtr((torch.logit(t[1:]) - m[:, None]) / s)     # (number of m, T - 1)
    distance, best = (logit_normal - cdf / cdf[-1]).abs().amax(1).min(0)
    return m[best].item(), distance.item()


# ------------------------------------------------------------------------------------------------------------------
# Samplers: v is any callable v(x, t) with t (B,); x (B, ...) is noise at t = 1 -> x at t = end, in x's dtype.
# They integrate in float64 and call v in x's dtype. On the diffusion path, whose v is infinite at 0, pass end=1e-3.


def guided(model, y, scale=1.0, interval=(0.0, 1.0), null=None):
    """v(x, t) = v_u + scale (v_c - v_u) for t in the interval, v_c elsewhere [REPA Table 10].

    model(x, t, y) -> velocity; y (B,) labels; null: the label that stands for no class (num_classes). Outside the
    interval, and at scale 1, the unconditional half is not computed at all.
    """
    if scale != 1 and null is None:
        raise ValueError("guided: a scale other than 1 needs null, the label that stands for no class (num_classes)")

    def v(x, t):
        inside = ((t >= interval[0]) & (t <= interval[1])).nonzero()[:, 0] if scale != 1 else ()
        if len(inside) == 0:
            return model(x, t, y)
        both = torch.cat([y, torch.full_like(y[inside], null)])
        out = model(torch.cat([x, x[inside]]), torch.cat([t, t[inside]]), both)
        v_c, v_u = out[:len(x)], out[len(x):]
        return v_c.index_copy(0, inside, v_u + scale * (v_c[inside] - v_u))

    return v


def counted(v):
    """v that counts its calls, the number of function evaluations, in .nfe."""
    def counter(x, t):
        counter.nfe += 1
        return v(x, t)

    counter.nfe = 0
    return counter


def widened(v, x):
    """x in float64 (float32 where the device has none) and a v for it that runs in x's own dtype; t: number or (B,)."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64

    def field(z, t):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(z))
        return v(z.to(x.dtype), t).to(wide)

    return field, x.to(wide)


def noise_like(x, generator=None):
    """N(0, 1) of x's shape (B, ...); generator: None, one, or a list with one for each sample, on any device."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(x.shape[1:], generator=g, device=g.device) for g in generator]).to(x)
    return torch.randn(x.shape, generator=generator, device=generator.device if generator else x.device).to(x)


@torch.no_grad()
def euler(v, x, steps, end=0.0):
    """First order: x <- x + (s - t) v(x, t). NFE = steps. Needs widened."""
    dtype, (v, x) = x.dtype, widened(v, x)
    times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        x = x + (s - t) * v(x, t)
    return x.to(dtype)


@torch.no_grad()
def heun(v, x, steps, end=0.0):
    """Second order: an Euler step, then the mean of the slopes at both of its ends. NFE = 2 steps. Needs widened."""
    dtype, (v, x) = x.dtype, widened(v, x)
    times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        slope = v(x, t)
        x = x + (s - t) * (slope + v(x + (s - t) * slope, s)) / 2
    return x.to(dtype)


@torch.no_grad()
def dopri5(v, x, rtol=1e-4, atol=1e-4, end=0.0, max_steps=10_000):
    """Dormand-Prince 5(4) with error control *per sample*, so that an image does not depend on its batch.

    Every sample has its own t and step; each round is 6 evaluations for all (7 in the first). Raises
    ArithmeticError after max_steps rounds, or where v is not finite. Needs widened.
    """
    tableau = [[1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
               [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
               [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
               [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]]        # the last row is the 5th order
    nodes = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
    error_row = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]   # 5th minus 4th order
    dtype, (v, x) = x.dtype, widened(v, x)
    column = [-1] + [1] * (x.ndim - 1)
    t, h = x.new_ones(len(x)), x.new_full((len(x),), 0.05)
    slopes = [v(x, t)]
    for _ in range(max_steps):
        if (t <= end).all():
            return x.to(dtype)
        h = torch.minimum(h, t - end)                                              # 0 for a sample that has arrived
        step = -h.reshape(column)
        for row, node in zip(tableau, nodes):
            trial = x + step * sum(a * k for a, k in zip(row, slopes))
            slopes.append(v(trial, t - node * h))
        error = step * sum(e * k for e, k in zip(error_row, slopes))
        error = error / (atol + rtol * torch.maximum(x.abs(), trial.abs()))
        error = error.square().flatten(1).mean(1).sqrt()                           # (B,), accepted where <= 1
        if not error.isfinite().all():
            raise ArithmeticError("dopri5: v is not finite")
        accept = error <= 1
        keep = accept.reshape(column)
        x, slopes = torch.where(keep, trial, x), [torch.where(keep, slopes[-1], slopes[0])]
        t = torch.where(accept, torch.where(h >= t - end, t.new_tensor(end), t - h), t)
        h = h.clamp_min(1e-6) * (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 5)
    raise ArithmeticError(f"dopri5: not at t = {end} after {max_steps} steps; loosen rtol and atol, or check v for NaN")


@torch.no_grad()
def euler_maruyama(v, x, steps, path=linear, w=2.0, last=0.04, generator=None, end=0.0):
    """Reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW, w_t = w sigma_t [REPA Eq. 5]. NFE = steps.

    w_t s = -w eps has no division, so it is finite at t = 0. [REPA] and [FPO] print w = 1; the code behind REPA's
    numbers used w = 2. steps - 1 noisy steps from 1 to last, then one without noise from last to end; last <= end:
    equal steps, the final one without noise. generator: one for the batch, or a list with one for each sample, which
    makes a sample independent of its batch. Needs widened, eps_from_velocity, coefficients, noise_like.
    """
    dtype, (v, x) = x.dtype, widened(v, x)
    last = last if last > end else end + (1 - end) / steps
    times = torch.linspace(1, last, steps, dtype=torch.float64).tolist() + [end]
    for t, s in zip(times, times[1:]):
        slope, batch_t = v(x, t), x.new_full((len(x),), t)
        x = x + (s - t) * (slope + w / 2 * eps_from_velocity(slope, x, batch_t, path))
        if s > end and w > 0:
            x = x + torch.sqrt(w * path(batch_t[:1])[1] * (t - s)) * noise_like(x, generator)
    return x.to(dtype)
