"""What only the study measures of a trained network (--path linear), on images of the data."""
import math

import numpy as np
import torch
import torch.nn.functional as F

import fpo
import train_sit


def noised(data, t):
    """Images of the data at times t (n,), the same for every model -> x_t, v, labels, features, cls_t."""
    rows = np.random.RandomState(1).permutation(len(data))[:len(t)]
    latents, labels, features, cls = data.batch(rows)
    random = torch.Generator().manual_seed(1)
    shape = data.channels, data.size, data.size
    parts = [torch.randn(2, len(part), *shape, generator=random) for part in t.split(200)]
    noise, eps = torch.cat(parts, 1)
    x = data.seen(latents, noise)
    x_t, v = fpo.interpolate(x, eps, t)
    cls_t, _ = fpo.interpolate(cls, torch.randn(cls.shape, generator=random), t)
    return x_t, v, labels, patches(features, data), cls_t


def patches(tokens, data):
    """tokens (n, T, D) without REG's class token, if that is the first of them."""
    return tokens[:, -data.features.shape[1]:]


@torch.no_grad()
def data_losses(model, data, n, predict="v"):
    """t (n,), spread evenly over [0, 1], and the velocity and alignment losses (n,) of n images there.

    They compare models however those drew t in training. Without a projector the alignment losses are NaN."""
    t = (torch.randperm(n, generator=torch.Generator().manual_seed(1)) + 0.5) / n
    x_t, v, labels, features, cls_t = noised(data, t)
    out, z, _ = model(x_t, t, labels, features=True, cls=cls_t)
    v_hat = train_sit.TO_VELOCITY[predict](out, x_t, t, fpo.linear)
    A = t * math.nan if z is None else fpo.alignment_loss(patches(z, data), features)
    return t, fpo.velocity_loss(v_hat, v), A


@torch.no_grad()
def hidden_measures(model, data, t=0.1, n=4000):
    """What block encoder_depth knows of n images at time t, without their labels.

    -> the cosine of its projected tokens with the encoder's; CKNNA and linear probe of its mean tokens."""
    t = torch.full((n,), t)
    x_t, _, labels, features, cls_t = noised(data, t)
    hidden = []
    block = model.blocks[model.encoder_depth - 1]
    no_class = torch.full_like(labels, model.num_classes)
    with block.register_forward_hook(lambda block, inputs, h: hidden.append(patches(h, data).mean(1))):
        _, z, _ = model(x_t, t, no_class, features=True, cls=cls_t)
    cosine = math.nan if z is None else -fpo.alignment_loss(patches(z, data), features).mean().item()
    likeness = cknna(hidden[0], fpo.pooled(features))
    return cosine, likeness, linear_probe(hidden[0], labels, data.classes)


def cknna(a, b, k=10):
    """Kernel alignment over mutual k nearest neighbours [REPA Eq. 21-24]: (N, D), (N, D') -> at most 1."""
    kernels, near = [], []
    for z in (a.double(), b.double()):
        kernel = z @ z.T                                     # (N, N)
        kernels += [kernel - kernel.mean(1, keepdim=True)]
        nearest = kernel.fill_diagonal_(-math.inf).topk(k, 1).indices
        near += [torch.zeros_like(kernel).scatter(1, nearest, 1.0)]
    align = lambda i, j: (near[i] * near[j] * kernels[i] * kernels[j]).sum()
    return (align(0, 1) / (align(0, 0) * align(1, 1)).sqrt()).item()


def linear_probe(z, labels, classes, ridge=1e-2):
    """Accuracy of ridge regression from z (N, D) to the classes, fitted on the first half, on the second.

    differs from [REPA App. C]: a closed form, in place of 90 epochs of Adam on a logistic loss."""
    half = len(z) // 2
    z = (z - z[:half].mean(0)) / z[:half].std(0).clamp_min(1e-6)
    z = F.pad(z, (0, 1), value=1.0).double()                 # the last column is the bias
    train, test = z[:half], z[half:]
    target = F.one_hot(labels[:half], classes).double()
    penalty = ridge * half * torch.eye(z.shape[1])
    W = torch.linalg.solve(train.T @ train + penalty, train.T @ target)
    right = (test @ W).argmax(1) == labels[half:]
    return right.double().mean().item()


def explained(t, y, bins=20):
    """Share of the variance of y (n,) that t in [0, 1] explains: a mean in each bin; corrected for chance."""
    bin = (t * bins).long().clamp_max(bins - 1)
    count = torch.bincount(bin, minlength=bins)
    mean = torch.zeros(bins).index_add(0, bin, y) / count
    rest = (y - mean[bin]).square().sum() / (len(y) - bins)
    return (1 - rest / y.var()).item()
