"""The method, as pure functions on tensors: interpolants, REPA, FPO, VR-sampling, samplers, MeanFlow, VRPO.

Every function lifts out alone: the two imports, its arguments, and linear where that is the default path. One
that calls other neighbours says "Needs". Time runs from data (t = 0) to noise (t = 1), everywhere.

    x_t = alpha_t x + sigma_t eps      v_t = alpha'_t x + sigma'_t eps      eps ~ N(0, I)

Sources, as cited below:
    [FPO]   REPA-FPO: A Fisher Policy Optimization for Efficient Flow Matching Training
    [REPA]  Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think
    [VR]    VR-Sampling: Accelerating Flow Generative Model Training with Variance Reduction Sampling
            (its t is our 1 - t, its velocity is minus ours)
    [VRPO]  Improving Visual Representation Alignment Generation with GRPO
    [iREPA] What Matters for Representation Alignment: Global Information or Spatial Structure?
    [SV]    Stable Velocity         [REG] Representation Entanglement for Generation
    [JiT]   Back to Basics: Let Denoising Generative Models Denoise
    [MF]    Mean Flows for One-step Generative Modeling
    [LV]    On Variance Reduction in Learning Mean Flows (we have its abstract only)
Letters: B batch, N samples that share one set of weights, C H W latent, T timesteps (or tokens), D width.
"""
import math

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------
# Paths: t (B,) -> alpha, sigma, alpha', sigma', each (B,)


def linear(t):
    """Rectified flow: alpha = 1 - t, sigma = t, so v = eps - x for every t."""
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def cosine(t):
    """Variance preserving: alpha = cos(pi t / 2), sigma = sin(pi t / 2) [REPA App. A.2]."""
    a = math.pi / 2
    alpha, sigma = torch.cos(a * t), torch.sin(a * t)
    return alpha, sigma, -a * sigma, a * alpha


def diffusion(t):
    """DDPM's path: alpha = exp(-0.5 int_0^t beta), sigma = sqrt(1 - alpha^2) [VR Table 1].
    beta(s) = 0.1 + 19.9 s. sigma', infinite at t = 0, is computed with sigma >= 1e-3: all is finite."""
    beta = 0.1 + 19.9 * t
    integral = 0.1 * t + 9.95 * t ** 2
    alpha = torch.exp(-integral / 2)
    sigma = torch.sqrt(-torch.expm1(-integral))
    d_sigma = beta * alpha ** 2 / (2 * sigma.clamp_min(1e-3))
    return alpha, sigma, -beta * alpha / 2, d_sigma


PATHS = {"linear": linear, "cosine": cosine, "diffusion": diffusion}
FIRST_T = {"linear": 0.0, "cosine": 0.0, "diffusion": 1e-3}                  # train and sample on t >= this


def coefficients(t, x, path=linear):
    """path(t), each shaped (B, 1, ..., 1) to multiply x (B, ...): t (B,), or any first dimensions of x."""
    ones = [1] * (x.ndim - t.ndim)
    return [c.reshape(*t.shape, *ones) for c in path(t)]


def interpolate(x, eps, t, path=linear):
    """x_t = alpha x + sigma eps and its velocity v = alpha' x + sigma' eps [REPA Eq. 1, 4].
    x, eps (B, ...), t (B,) in [0, 1] -> x_t, v, both (B, ...). Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x, path)
    return alpha * x + sigma * eps, d_alpha * x + d_sigma * eps


# ----------------------------------------------------------------------------------------------------------
# Losses, one number for each sample, in float32 or wider whatever the autocast dtype


def in_float32(z):
    """z in float32, or in float64 if it is: what follows is never computed in 16 bits."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def velocity_loss(v_hat, v):
    """Mean over C, H, W of (v_hat - v)^2 [REPA Eq. 4]: (B, ...), (B, ...) -> (B,). Needs in_float32."""
    error = in_float32(v_hat) - v
    return error.square().flatten(1).mean(1)


def alignment_loss(h, y):
    """Minus the mean over tokens of cos(h, y) [REPA Eq. 8]: h, y (B, T, D) -> (B,) in [-1, 1].
    The norms are never taken in 16 bits, where small tokens turn into NaN. Needs in_float32."""
    similarity = F.cosine_similarity(in_float32(h), in_float32(y), dim=-1)   # (B, T)
    return -similarity.mean(1)


def spatially_normalised(y, gamma=1.0):
    """(y - gamma mean) / standard deviation, over tokens: (B, T, D) -> same [iREPA]. Needs in_float32."""
    y = in_float32(y)
    return (y - gamma * y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-6)


def nt_xent_loss(h, y, tau=0.1, first=0):
    """NT-Xent, the other alignment loss of [REPA Table 2]: cross entropy of h against its own y -> (B,).
    h (B, T, D); y (B', T, D), y[first + i] belongs to h[i]: it may be the whole global batch. The negatives,
    of which the paper is silent: the tokens at the same place in the other images. Needs in_float32."""
    h = F.normalize(in_float32(h), dim=-1)
    y = F.normalize(in_float32(y), dim=-1)
    with torch.autocast(h.device.type, enabled=False):       # or the product is in 16 bits
        logits = torch.einsum("btd,ktd->bkt", h, y) / tau    # (B, B', T)
    own = torch.arange(first, first + len(h), device=h.device)[:, None]
    return F.cross_entropy(logits, own.expand(h.shape[:2]), reduction="none").mean(1)    # of (B, T)


# ----------------------------------------------------------------------------------------------------------
# Fisher Policy Optimization: reweight the samples of a batch by their losses [FPO Alg. 2]
#
# The losses (N,) are those of the *global* batch: ranking each GPU's own slice would be another algorithm for
# every number of GPUs. With a mask (N,) only the samples inside it compete, N is their number, and the rest
# keep weight 1. The paper gives no tau; 1.0 is the plain softmax of losses that are means (Eq. 6: sums).


def fpo_check(r, beta, tau):
    """Raise ValueError unless 0 < r <= 1, beta >= 0 and tau > 0."""
    if not 0 < r <= 1:
        raise ValueError(f"FPO: r = {r}, but 0 < r <= 1 is needed")
    if not 0 <= beta < math.inf:
        raise ValueError(f"FPO: beta = {beta}, but a finite beta >= 0 is needed")
    if not 0 < tau < math.inf:
        raise ValueError(f"FPO: tau = {tau}, but a finite tau > 0 is needed")


def fpo_policy(losses, r=0.8, tau=1.0, mask=None):
    """p = softmax(L / tau) on H, the floor(r N) highest losses (at least 1), and 0 elsewhere [FPO Eq. 18].
    losses (N,) -> p (N,), sum 1, differentiable (H is not). An empty mask gives p = 0. Needs in_float32."""
    losses = in_float32(losses)                              # in 16 bits many would be equal
    if mask is None:
        mask = torch.ones_like(losses, dtype=torch.bool)
    M = (r * mask.sum() + 1e-3).floor().clamp_min(1)         # 1e-3: 0.53 * 100 must give 53
    fixed = losses.detach().masked_fill(~mask, -math.inf)
    rank = fixed.argsort(descending=True, stable=True).argsort()
    H = mask & (rank < M)
    e = ((losses - fixed.max()) / tau).masked_fill(~H, -math.inf).exp()
    total = e.sum()                                          # at least exp(0) = 1, or 0 where H is empty
    return e / torch.where(total > 0, total, 1.0)


def fpo_weights(losses, r=0.8, beta=2.0, tau=1.0, mask=None):
    """w = (1 + beta p) N / sum(1 + beta p) [FPO Eq. 19, 20]: losses (N,) -> w (N,), sums to N.
    p sums to 1, so the denominator is N + beta. Differentiable. Needs fpo_policy, fpo_check, in_float32."""
    fpo_check(r, beta, tau)
    p = fpo_policy(losses, r, tau, mask)
    N = len(losses) if mask is None else mask.sum().clamp_min(1).to(p)
    w = (1 + beta * p) * N / (N + beta)
    return w if mask is None else torch.where(mask, w, 1.0)


def fpo_loss(losses, r=0.8, beta=2.0, tau=1.0, mask=None):
    """J = mean of w_i L_i [FPO Alg. 2]: (N,) -> scalar. The gradient goes through w too [FPO Thm. 3.3].
    Needs fpo_weights, fpo_policy, fpo_check, in_float32."""
    return (fpo_weights(losses, r, beta, tau, mask) * losses).mean()


def fpo_gradient_weights(losses, r=0.8, beta=2.0, tau=1.0, mask=None, group=0):
    """Detached c (N,) such that (c * losses).mean() has exactly the gradient of fpo_loss. Sums to N.

    J depends on the parameters only through L, so both terms of [FPO Thm. 3.3] are multiples of grad L_i:
        c_i = (1 + beta p_i (1 + (L_i - sum_j p_j L_j) / tau)) / (1 + beta / N)
    With c from all losses every process backpropagates its own slice alone. group n > 0: within every n
    consecutive samples, as in each GPU's slice of other code. Needs fpo_policy, fpo_check, in_float32."""
    fpo_check(r, beta, tau)
    L = in_float32(losses.detach())
    if group > 0:
        mask = torch.ones_like(L, dtype=torch.bool) if mask is None else mask
        parts = zip(L.split(group), mask.split(group))
        return torch.cat([fpo_gradient_weights(part, r, beta, tau, inside) for part, inside in parts])
    p = fpo_policy(L, r, tau, mask)
    N = len(L) if mask is None else mask.sum().clamp_min(1).to(p)
    advantage = (L - (p * L).sum()) / tau
    c = (1 + beta * p * (1 + advantage)) / (1 + beta / N)
    return c if mask is None else torch.where(mask, c, 1.0)


def centred(losses, t, width=0.05):
    """losses minus their mean near that t, by a Gaussian kernel: losses, t (..., N) -> (..., N).
    What FPO ranks by when it should not prefer some timesteps to others; not in [FPO]."""
    distance = (t[..., :, None] - t[..., None, :]) / width
    near = torch.softmax(-distance.square() / 2, -1)         # rows sum to 1
    return losses - (near @ losses[..., None])[..., 0]


def weight_moved(w):
    """Share of the weight that w (N,), sum N, moves away from uniform, and the effective sample size."""
    moved = (w - 1).abs().mean() / 2
    return moved, w.sum() ** 2 / w.square().sum()


# ----------------------------------------------------------------------------------------------------------
# Other weights, each (N,) with sum N as in Eq. 20 [FPO Table 5]. P2, min-SNR are defined on the loss in eps,
# |eps_hat - eps|^2 = (alpha / (alpha sigma' - alpha' sigma))^2 |v_hat - v|^2.


def hard_sample_weights(losses, r=0.8, beta=2.0, mask=None):
    """The boost of FPO spread evenly over the floor(r N) highest losses: FPO's limit tau -> infinity.
    Needs fpo_weights, fpo_policy, fpo_check, in_float32."""
    return fpo_weights(losses.detach(), r, beta, 1e30, mask)


def p2_weights(t, path=linear, k=1.0, gamma=1.0):
    """P2 weighting: 1 / (k + SNR)^gamma on the loss in eps, carried over to velocity: (N,) -> (N,)."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    snr = (alpha / sigma.clamp_min(1e-6)) ** 2
    determinant = alpha * d_sigma - d_alpha * sigma
    w = (alpha / determinant) ** 2 / (k + snr) ** gamma
    return w * len(w) / w.sum()


def min_snr_weights(t, path=linear, gamma=5.0):
    """Min-SNR weighting: min(SNR, gamma) / SNR on the loss in eps, carried over to velocity: (N,) -> (N,)."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    w = torch.minimum(alpha ** 2, gamma * sigma ** 2) / determinant ** 2
    return w * len(w) / w.sum()


def early_weights(t, until=0.7, steepness=20.0):
    """sigmoid(20 (0.7 - t)): align where the image can still be seen [SV], unlike FPO's boost at t >= 0.9."""
    w = torch.sigmoid(steepness * (until - t))
    return w * len(w) / w.sum()


# ----------------------------------------------------------------------------------------------------------
# Timesteps: u (B,) uniform in [0, 1) -> t (B,)
#
# VR-sampling draws t by the irreducible velocity loss, below which no network can go: pi(t) ~ h^2 V(t)
# = (1/d) E |v - E[v | x_t]|^2, h = (alpha' sigma - alpha sigma') / sigma, V = (1/d) E tr Cov[x | x_t]. Three
# estimators: posterior_variance, gaussian_posterior_variance, and the measured loss of a network at each t.


def posterior_variance(x, snr, noises=500, generator=None):
    """V(t) = (1/d) E tr Cov[x | x_t] when the data are the rows of x: Monte Carlo over noises [VR Eq. 3.3].

    x (M, d), snr = alpha / sigma (T,) -> V (T,) float64. V is 0 once the points separate. With x_t / alpha
    = x_i + s eps_l, s = 1 / snr, the posterior weight of x_j is exp(-|x_i - x_j|^2 / 2 s^2 + x_j . eps_l / s)
    but for a factor: x is needed once, and a timestep costs the same whatever d. Needs posterior_spread."""
    x = x.double()
    x = x - x.mean(0)
    M, d = x.shape
    eps = torch.randn(noises, d, dtype=x.dtype, device=x.device, generator=generator)
    dots = x @ eps.T                                         # (M, K)  x_j . eps_l
    square = x.square().sum(1)
    D = (square[:, None] + square) / 2 - x @ x.T             # (M, M)  |x_i - x_j|^2 / 2
    D = D.clamp_min(0).fill_diagonal_(0)
    nearest = D.clone().fill_diagonal_(math.inf).amin(1)     # (M,)
    scales = (1 / snr.double()).clamp_min(1e-9).tolist()
    V = [posterior_spread(D, nearest, dots, s) for s in scales]
    return torch.stack(V) / (M * noises * d)


def posterior_spread(D, nearest, dots, s):
    """Sum over i, l of sum_j w_j D_ij at the noise s, with the names and weights of posterior_variance.
    x_i and x_j are independent draws of the posterior, so the mean of D_ij = |x_i - x_j|^2 / 2 is its
    variance: never negative, and without the cancellation of [VR Eq. 3.3]."""
    D = D[nearest < 800 * s ** 2]                            # the rest are alone: other weights < exp(-400)
    if len(D) == 0:
        return dots.new_zeros(())
    A = torch.exp(-D / s ** 2)                               # (near, M)
    E = torch.exp((dots - dots.amax(0)) / s)                 # (M, K), shifted for each noise
    Z = A @ E                                                # (near, K)
    if Z.min() > 1e-280:
        return (((A * D) @ E) / Z).sum()
    total = 0                                                # clusters far apart: shift in each row, too
    for row in D[:, :, None]:
        w = torch.softmax(dots / s - row / s ** 2, 0)
        total += (w * row).sum()
    return total


def gaussian_posterior_variance(x, snr):
    """V(t) if the data were Gaussian: mean over the covariance's eigenvalues of lam / (1 + snr^2 lam).
    x (M, d), M several times d or the spectrum comes out too steep; snr (T,) -> V (T,) float64. This is the
    error of the best *linear* denoiser, hence an upper bound for data of any shape."""
    x = x.double()
    x = x - x.mean(0)
    M, d = x.shape
    gram = x.T @ x if M >= d else x @ x.T                    # the same nonzero eigenvalues
    lam = torch.linalg.eigvalsh(gram / M).clamp_min(0)
    return (1 / (1 / lam + snr.double()[:, None] ** 2)).sum(1) / d       # 0 at t = 0


def vr_density(variance, t, path=linear, uniform=0.1):
    """pi(t) = (1 - uniform) h^2 V / integral + uniform / (t[-1] - t[0]) [VR Sec. 3.3]: V, t (T,) -> pdf (T,).
    t increasing, inside (0, 1]; V >= 0, not all 0; the pdf integrates to 1 by the trapezoid rule. The uniform
    part keeps every t alive: on few points in high dimension V is 0 almost everywhere."""
    t = t.double()
    alpha, sigma, d_alpha, d_sigma = path(t)
    h = (d_alpha * sigma - alpha * d_sigma) / sigma
    curve = h ** 2 * variance
    pdf = (1 - uniform) * curve / torch.trapezoid(curve, t)
    return pdf + uniform / (t[-1] - t[0])


def sample_timesteps(u, t, pdf):
    """Inverse CDF of a density on a grid [VR Sec. 3.3]: u (B,) in [0, 1), t and pdf (T,) -> t (B,)."""
    cdf = torch.cumulative_trapezoid(pdf, t.to(pdf)).to(u)
    cdf = F.pad(cdf / cdf[-1], (1, 0))
    t = t.to(u)
    k = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, len(t) - 1)
    low = cdf[k - 1]                                         # low <= u < cdf[k]
    share = (u - low) / (cdf[k] - low).clamp_min(1e-12)
    return t[k - 1] + share * (t[k] - t[k - 1])


def logit_normal_timesteps(u, m=0.0, s=1.0):
    """t = sigmoid(m + s z), z ~ N(0, 1) [VR Sec. 4.3; their m is -m here]. u = 0 gives t = 0, never NaN."""
    return torch.sigmoid(m + s * math.sqrt(2) * torch.erfinv(2 * u - 1))


def logit_normal_location(t, pdf, s=1.0, grid=0.25):
    """The logit-normal nearest to a pdf by Kolmogorov-Smirnov [VR Sec. 4.3]: t, pdf (T,) -> (m, distance).
    m is a multiple of grid in [-4, 4]. The m of [VR Table 3] is minus ours."""
    t = t.double()
    cdf = torch.cumulative_trapezoid(pdf.double(), t)
    cdf = cdf / cdf[-1]
    steps = round(4 / grid)
    m = grid * torch.arange(-steps, steps + 1, device=t.device).double()
    z = (torch.logit(t[1:]) - m[:, None]) / s                # (number of m, T - 1)
    distance = (torch.special.ndtr(z) - cdf).abs().amax(1)
    best = distance.argmin()
    return m[best].item(), distance[best].item()


# ----------------------------------------------------------------------------------------------------------
# Conversions. (x_t, v) is an invertible linear map of (x, eps), with determinant alpha sigma' - alpha'
# sigma > 0: 1 for linear, pi/2 for cosine. Nothing below divides by alpha or sigma unless the quantity
# itself does: x does not determine v at t = 0, nor does eps at t = 1. All take and give (B, ...), t (B,).


def x_from_velocity(v, x_t, t, path=linear):
    """E[x | x_t] = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma). Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    determinant = alpha * d_sigma - d_alpha * sigma
    return (d_sigma * x_t - sigma * v) / determinant


def eps_from_velocity(v, x_t, t, path=linear):
    """E[eps | x_t] = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma). Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    determinant = alpha * d_sigma - d_alpha * sigma
    return (alpha * v - d_alpha * x_t) / determinant


def score_from_velocity(v, x_t, t, path=linear, floor=1e-3):
    """grad log p_t(x_t) = -eps / sigma, sigma >= floor: v does not determine it at t = 0 [REPA Eq. 6, 20].
    Needs eps_from_velocity, coefficients."""
    _, sigma, _, _ = coefficients(t, x_t, path)
    return -eps_from_velocity(v, x_t, t, path) / sigma.clamp_min(floor)


def velocity_from_x(x_hat, x_t, t, path=linear, floor=1e-3):
    """v = alpha' x + sigma' (x_t - alpha x) / sigma, where sigma >= floor. Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    eps_hat = (x_t - alpha * x_hat) / sigma.clamp_min(floor)
    return d_alpha * x_hat + d_sigma * eps_hat


def velocity_from_eps(eps_hat, x_t, t, path=linear, floor=1e-3):
    """v = alpha' (x_t - sigma eps) / alpha + sigma' eps, where alpha >= floor. Needs coefficients."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, x_t, path)
    x_hat = (x_t - sigma * eps_hat) / alpha.clamp_min(floor)
    return d_alpha * x_hat + d_sigma * eps_hat


def loss_scale(t, predicted, measured, path=linear, floor=0.05):
    """The factor that carries a squared error in one of v, x, eps over to another [JiT]: t (B,) -> (B,).
    e_v = -(delta / sigma) e_x = (delta / alpha) e_eps, with delta = alpha sigma' - alpha' sigma. alpha and
    sigma are taken as at least floor: on the linear path x's error in v is |x_hat - x|^2 / max(t, 0.05)^2."""
    alpha, sigma, d_alpha, d_sigma = path(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    in_v = {"v": torch.ones_like(t),
            "x": determinant / sigma.clamp_min(floor),
            "eps": determinant / alpha.clamp_min(floor)}
    return (in_v[predicted] / in_v[measured]) ** 2


# ----------------------------------------------------------------------------------------------------------
# Samplers: v is any callable v(x, t) with t (B,); x (B, ...) is noise at t = 1 -> x at t = end, in x's
# dtype. They integrate in float64 and call v in x's dtype. On the diffusion path, whose v is infinite at 0,
# pass end=1e-3.


def guided(model, y, scale=1.0, interval=(0.0, 1.0), null=None):
    """v(x, t) = v_u + scale (v_c - v_u) for t in the interval, v_c elsewhere [REPA Table 10].
    model(x, t, y) -> velocity; y (B,) labels; null: the label of no class (num_classes), which any scale
    other than 1 needs (ValueError). Outside the interval the unconditional half is not computed at all.
    scale: a number, or a tensor on x's device with one for each entry of x's last dimension."""
    plain = bool((torch.as_tensor(scale) == 1).all())
    if not plain and null is None:
        raise ValueError("guided: a scale other than 1 needs null, the label of no class (num_classes)")
    low, high = interval

    def v(x, t):
        if plain:
            return model(x, t, y)
        inside = ((t >= low) & (t <= high)).nonzero()[:, 0]
        if len(inside) == 0:
            return model(x, t, y)
        no_class = torch.full_like(y[inside], null)
        pairs = ((x, x[inside]), (t, t[inside]), (y, no_class))
        out = model(*map(torch.cat, pairs))
        v_c, v_u = out[:len(x)], out[len(x):]
        mixed = v_u + scale * (v_c[inside] - v_u)
        return v_c.index_copy(0, inside, mixed.to(v_c))

    return v


def counted(v):
    """v that counts its calls, the number of function evaluations, in .nfe."""
    def counter(x, t):
        counter.nfe += 1
        return v(x, t)

    counter.nfe = 0
    return counter


def widened(v, x):
    """v for x in float64 (float32 on MPS), and that x. v still runs in x's dtype; t is (B,) or one number."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64

    def field(z, t):
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        return v(z.to(x.dtype), t.expand(len(z))).to(wide)

    return field, x.to(wide)


def noise_like(x, generator=None):
    """N(0, 1) of x's shape (B, ...); generator: None, one, or a list with one for each sample."""
    if isinstance(generator, list):
        return torch.cat([noise_like(row[None], g) for row, g in zip(x, generator)]).view_as(x)
    device = generator.device if generator else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)


@torch.no_grad()
def euler(v, x, steps, end=0.0):
    """First order: x <- x + (s - t) v(x, t). NFE = steps. Needs widened."""
    dtype = x.dtype
    v, x = widened(v, x)
    times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        x = x + (s - t) * v(x, t)
    return x.to(dtype)


@torch.no_grad()
def heun(v, x, steps, end=0.0):
    """Second order: Euler, then the mean of the slopes at its two ends. NFE = 2 steps. Needs widened."""
    dtype = x.dtype
    v, x = widened(v, x)
    times = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times, times[1:]):
        slope = v(x, t)
        x = x + (s - t) * (slope + v(x + (s - t) * slope, s)) / 2
    return x.to(dtype)


def dopri5_step(v, x, t, h, slope):
    """One Dormand-Prince step to t - h: x (B, ...), t, h (B,), slope = v(x, t) -> x, slope there, error."""
    tableau = [                                              # node, weights of the slopes so far
        (1 / 5, [1 / 5]),
        (3 / 10, [3 / 40, 9 / 40]),
        (4 / 5, [44 / 45, -56 / 15, 32 / 9]),
        (8 / 9, [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729]),
        (1, [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656]),
        (1, [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84])]    # the step of 5th order
    difference = [71 / 57600, 0, -71 / 16695,                # 5th minus 4th order
                  71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]
    step = -h.reshape(-1, *[1] * (x.ndim - 1))
    slopes = [slope]
    for node, row in tableau:
        trial = x + step * sum(a * k for a, k in zip(row, slopes))
        slopes += [v(trial, t - node * h)]
    error = step * sum(e * k for e, k in zip(difference, slopes))
    return trial, slopes[-1], error


@torch.no_grad()
def dopri5(v, x, rtol=1e-4, atol=1e-4, end=0.0, max_steps=10_000):
    """Dormand-Prince with error control *for each sample*, so that an image does not depend on its batch.
    Every sample has its own t and step; a round is 6 evaluations (the first 7). Raises ArithmeticError after
    max_steps rounds, or where v is not finite. Needs dopri5_step, widened."""
    dtype = x.dtype
    v, x = widened(v, x)
    t = x.new_ones(len(x))
    h = 0.05 * t
    slope = v(x, t)
    for _ in range(max_steps):
        h = torch.minimum(h, t - end)                        # 0 for a sample that has arrived
        trial, trial_slope, error = dopri5_step(v, x, t, h, slope)
        error = error / (atol + rtol * torch.maximum(x.abs(), trial.abs()))
        error = error.square().flatten(1).mean(1).sqrt()     # (B,)
        if not error.isfinite().all():
            raise ArithmeticError("dopri5: v is not finite")
        accept = error <= 1
        keep = accept.reshape(-1, *[1] * (x.ndim - 1))
        x = torch.where(keep, trial, x)
        slope = torch.where(keep, trial_slope, slope)
        t = torch.where(accept, torch.where(h >= t - end, end, t - h), t)
        factor = 0.9 * error.clamp_min(1e-10) ** -0.2
        h = h.clamp_min(1e-6) * factor.clamp(0.2, 5)
        if (t <= end).all():
            return x.to(dtype)
    raise ArithmeticError(f"dopri5: not at t = {end} after {max_steps} steps; loosen rtol and atol")


@torch.no_grad()
def euler_maruyama(v, x, steps, path=linear, w=2.0, last=0.04, generator=None, end=0.0):
    """Reverse SDE dx = (v - w_t s / 2) dt + sqrt(w_t) dW, w_t = w sigma_t [REPA Eq. 5]. NFE = steps.

    w_t s = -w eps is finite at t = 0. [REPA] and [FPO] print w = 1; the code of REPA's numbers used w = 2.
    steps - 1 noisy steps from 1 to last, then one without noise to end; last <= end: equal steps. With a list
    of generators, one for each sample, a sample does not depend on its batch. Needs widened,
    eps_from_velocity, coefficients, noise_like."""
    dtype = x.dtype
    v, x = widened(v, x)
    if last <= end:
        last = end + (1 - end) / steps
    times = torch.linspace(1, last, steps, dtype=torch.float64).tolist() + [end]
    for t, s in zip(times, times[1:]):
        slope = v(x, t)
        batch_t = x.new_full((len(x),), t)
        x = x + (s - t) * (slope + w / 2 * eps_from_velocity(slope, x, batch_t, path))
        if s > end and w > 0:
            _, sigma, _, _ = path(batch_t[:1])
            x = x + torch.sqrt(w * sigma * (t - s)) * noise_like(x, generator)
    return x.to(dtype)


# ----------------------------------------------------------------------------------------------------------
# MeanFlow: the average velocity u(z_t, r, t) = (z_t - z_r) / (t - r), samples in one step [MF]. It obeys
# u = v - (t - r) du/dt along the flow. Here u is any callable u(z, r, t), r <= t (B,).


@torch.no_grad()
def mean_flow_target(u, z, r, t, v, tangent):
    """T = v - (t - r) (d_z u tangent + d_t u), for u to regress on [MF]: z, v, tangent (B, ...) -> (B, ...).

    At tangent = E[v | z] + lambda xi, xi = v - E[v | z], the noise of T is (I - lambda A) xi with
    A = (t - r) d_z u; E[T | z] is the same for every lambda [LV]. lambda = 1, tangent = v: [MF]. lambda = 0:
    improved MeanFlow, with its own u(z, t, t) for E[v | z], whose error b moves E[T | z] by -A b."""
    points = tuple(a.contiguous() for a in (z, r, t))        # jvp refuses expanded tensors
    _, du = torch.func.jvp(u, points, (tangent, torch.zeros_like(r), torch.ones_like(t)))
    h = (t - r).reshape(*t.shape, *[1] * (z.ndim - t.ndim))
    return v - h * du


def control_coefficient(xi, A_xi):
    """lambda* = sum xi . A xi / sum |A xi|^2, where sum |xi - lambda A xi|^2 is least [LV] -> scalar.
    Take it from earlier batches: that of the same batch would bias the target."""
    return (xi * A_xi).sum() / A_xi.square().sum()


@torch.no_grad()
def mean_flow(u, x, steps=1):
    """x <- x - (t - r) u(x, r, t), from t = 1 to 0: no error at any number of steps if u is exact [MF]."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, r in zip(times, times[1:]):
        x = x - (t - r) * u(x, x.new_full((len(x),), r), x.new_full((len(x),), t))
    return x


# ----------------------------------------------------------------------------------------------------------
# Visual Representation Policy Optimization: representation alignment as a reward
#
# [VRPO]'s equations are blank in its text: this is a reconstruction from its prose, propositions, appendix.
#     r_ki: fidelity = frechet_reward - perceptual_distance, semantic = -alignment_loss, stability_reward
#     R_i = sum_k w_k r_ki                             w = (0.3, 0.5, 0.2), or ~ 1 / Var r_k     [Eq. 5, 12]
#     L_i = -(1 + eta Var R) (R_i - mu_R) / sigma_R    velocity loss + lambda_0 mean(L_i)    [Eq. 7-11, 14]
# Chosen, where the text is silent: the gradient goes through the rewards (Prop. 2 and 5 need it), not through
# w, mu, sigma, Var R. Var is total, within and across batches. FID compares pooled projected h with pooled y;
# it and LPIPS weigh 1 each. Ours, too: decay, eta, floors. Against App. 0.A the semantic reward is REPA's,
# token by token (there: [CLS] and the mean token), and LPIPS compares x_hat with x (there: with x_t).


def pooled(h):
    """What frechet_reward compares, the mean over unit tokens: (B, T, D) -> (B, D). Needs in_float32."""
    return F.normalize(in_float32(h), dim=-1).mean(1)


def frechet_reward(z, mean, cov):
    """-|m - mean|^2 - tr(S + cov - 2 (S cov)^(1/2)), with m, S those of z [VRPO App. 0.A] -> scalar.
    z (B, D) of the *global* batch, mean (D,), cov (D, D). In float64. The trace of the root comes from the
    eigenvalues of a symmetric matrix, so its gradient exists where S is singular."""
    device = "cpu" if z.device.type == "mps" else z.device
    X, mean, cov = (a.to(device).double() for a in (z, mean, cov))
    shift = (X.mean(0) - mean).square().sum()
    X = X - X.mean(0)
    X = X / max(1, len(X) - 1) ** 0.5                        # S = X^T X
    gram = X @ cov @ X.T                                     # (B, B), with the eigenvalues of S cov
    lam = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0))    # NaN reaches the result by shift
    tiny = (1e-12 * lam[-1].detach()).clamp_min(1e-60)       # below: no value and no gradient
    cross = torch.where(lam > tiny, lam.clamp_min(tiny).sqrt(), 0).sum()
    return (2 * cross - shift - X.square().sum() - cov.trace()).to(z)


def perceptual_distance(x_hat, x):
    """Mean of |x_hat - x| over pixels and over scales 1, 2, 4, ... of average pooling: (B, C, H, W) -> (B,).
    Stands for LPIPS [VRPO Sec. 3.2]; any callable will do. Pass x_hat detached: its gradient would enter
    the later blocks, against [VRPO Thm. 5]. Needs in_float32."""
    d = in_float32(x_hat) - x
    levels = [d.abs().flatten(1).mean(1)]
    while min(d.shape[2:]) > 1:
        d = F.avg_pool2d(d, 2)
        levels += [d.abs().flatten(1).mean(1)]
    return torch.stack(levels).mean(0)


def stability_reward(h, h_near):
    """Minus the mean over tokens of |unit h - unit h_near|^2 = 2 - 2 cos [VRPO Sec. 3.2]: (B, T, D) -> (B,).
    h_near: the same x and eps at a neighbouring t, without gradient. Needs alignment_loss, in_float32."""
    return -2 - 2 * alignment_loss(h, h_near.detach())


def inverse_variance_weights(variance, floor=2.5e-3):
    """w_k ~ 1 / max(variance_k, floor) [VRPO Eq. 12, Thm. 2]: (K,) -> (K,), sums to 1."""
    w = 1 / variance.clamp_min(floor)
    return w / w.sum()


@torch.no_grad()
def moving_moments(x, before=None, decay=0.99):
    """Exponential moving mean (D,) and covariance (D, D) of the rows of x (N, D), the *global* batch: exactly
    those of moving E[x], E[x x'], without cancellation. before: the last result; None starts from x."""
    p = torch.full_like(x[:, 0], 1 / len(x))
    mean = p @ x
    cov = (x - mean).T @ (p[:, None] * (x - mean))
    if before is None:
        return mean, cov
    gap = mean - before[0]
    cov = cov + decay * torch.outer(gap, gap)
    return mean - decay * gap, decay * before[1] + (1 - decay) * cov


def vrpo_terms(moments, weights=(0.3, 0.5, 0.2), eta=0.1, floor=0.05):
    """w (K,), mu_R, sigma_R >= floor, 1 + eta Var R [VRPO Eq. 7, 12, 14] of the moving_moments of K rewards.
    weights: made to sum to 1; None: by inverse variance. Needs inverse_variance_weights."""
    mean, cov = moments
    if weights is None:
        w = inverse_variance_weights(cov.diagonal(), floor ** 2)
    else:
        w = mean.new_tensor(weights) / sum(weights)
    variance = w @ cov @ w                                   # correlations included
    sigma = variance.clamp_min(floor ** 2).sqrt()
    return w, w @ mean, sigma, 1 + eta * variance


def vrpo_loss(rewards, moments, weights=(0.3, 0.5, 0.2), eta=0.1, floor=0.05):
    """L_i = -(1 + eta Var R) (R_i - mu_R) / sigma_R [VRPO Eq. 8, 14]: rewards (K, B) -> (B,).
    moments: moving_moments of rewards.T of the global batch, *with* this batch.
    Needs vrpo_terms, inverse_variance_weights."""
    w, mu, sigma, scale = vrpo_terms(moments, weights, eta, floor)
    return -scale * (w @ rewards - mu) / sigma
