"""What the paths look like: numbers for the logs, never part of a loss.

Shapes: ``B`` batch, ``N`` paths, ``D`` embedding dim.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def path_cosine(paths: Tensor) -> Tensor:
    """Return the mean cosine ``[N, N]`` between the paths ``[B, N, D]`` of the same input.

    Off-diagonal entries near 1 mean that the paths have become one path.
    """
    with torch.autocast(device_type=paths.device.type, enabled=False):
        unit_BND = nn.functional.normalize(paths.to(torch.promote_types(paths.dtype, torch.float32)), dim=-1)
        return torch.einsum("bnd,bmd->nm", unit_BND, unit_BND) / len(paths)


@torch.no_grad()
def margin_correlation(margins: Tensor) -> Tensor:
    """Return the correlation ``[N, N]`` over queries between the paths' margins ``[N, B]``.

    A margin is what the positive scores above the best other target, so this compares the paths' errors:
    the mean of N paths with correlation rho has ``(1 + (N - 1) rho) / N`` of their variance. Queries without
    a rival (an infinite margin) are left out; a path with one margin for all, up to the rounding of cosines
    (1e-5), has correlation 0.
    """
    finite_NB = margins[:, margins.isfinite().all(dim=0)]
    deviation_NB = finite_NB - finite_NB.mean(dim=1, keepdim=True)
    deviation_NB = deviation_NB * (deviation_NB.norm(dim=1, keepdim=True) > 1e-5)
    unit_NB = nn.functional.normalize(deviation_NB, dim=1)
    return unit_NB @ unit_NB.T


@torch.no_grad()
def target_entropy(target_ids: Tensor) -> Tensor:
    """Return the entropy in nats of a batch's targets ``[B]``, 0-dim: log B if none repeats.

    Two paths with InfoNCE losses L1 and L2 on that batch share at least this minus L1 minus L2.
    """
    share_B = (target_ids.unsqueeze(1) == target_ids).float().mean(dim=1)
    return -share_B.log().mean()


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> Tensor:
    """Return the effective number of directions that embeddings ``[B, D]`` spread over.

    ``exp(entropy(s / sum(s)))`` with s the singular values of the centred matrix (Roy and
    Vetterli 2007). Values below rounding of the uncentred matrix count as zero, so that collapsed
    embeddings give 1 and not the rank of the noise. The result is between 1 and ``min(B - 1, D)``.
    """
    assert embeddings.ndim == 2, "[B, D]: one path at a time"
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        value_BD = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        singular = torch.linalg.svdvals(value_BD - value_BD.mean(dim=0))
        limits = torch.finfo(value_BD.dtype)
        singular = singular * (singular > limits.eps * value_BD.norm())
        share = singular / singular.sum().clamp_min(limits.tiny)
        entropy: Tensor = torch.special.entr(share).sum()
        return entropy.exp()
