"""The OCR loss as masks and logsumexp over whole tensors, and the figures around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ocr_loss(
    logits: Tensor,
    tags: Tensor,
    *,
    prior: Tensor | None = None,
    threshold: float = 0.0,
    margin: float = 0.0,
    scale: float = 1.0,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    reduction: str = "mean",
    return_count: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As wsss_ops.ocr_loss."""
    scores = _scores(logits, size, align_corners)
    tagged = (tags != 0)[:, :, None, None]
    winner, candidate = _candidates(scores, tagged, ignore)

    inside = tagged
    if prior is not None or threshold > 0:
        relevance = scores.detach()
        if prior is not None:
            wide = prior.to(torch.promote_types(prior.dtype, torch.float32))
            log_prior = torch.where(wide > 0, wide, 0).log().to(scores.dtype)
            relevance = relevance + log_prior[winner].permute(0, 3, 1, 2)
        relevance = relevance.masked_fill(~tagged, -math.inf)
        best = relevance.amax(1, keepdim=True)
        cutoff = best + math.log(threshold) if threshold > 0 else -math.inf
        inside = torch.where(best > -math.inf, (relevance >= cutoff) & (relevance > -math.inf), tagged)

    # Pixels that do not count get numbers for which nothing is infinite.
    counts = candidate[:, None]
    outside_scores = torch.where(counts, (scale * scores).masked_fill(tagged, -math.inf), 0)
    inside_scores = torch.where(counts, (-scale * scores).masked_fill(~inside, -math.inf), 0)
    z = outside_scores.logsumexp(1) + inside_scores.logsumexp(1) + scale * margin
    loss = torch.where(candidate, torch.logaddexp(z, torch.zeros_like(z)), 0)
    loss = loss.masked_fill(candidate & scores.isnan().any(1), math.nan)
    count = candidate.sum()
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / count.clamp_min(1)
    return (loss, count) if return_count else loss


def annotation_correlation(tags: Tensor) -> Tensor:
    """As wsss_ops.annotation_correlation."""
    present = tags != 0
    together = (present[:, :, None] & present[:, None, :]).sum(0)
    return together / present.sum(0).clamp_min(1)[:, None]


def out_of_candidate_rate(
    logits: Tensor,
    tags: Tensor,
    *,
    ignore: Tensor | None = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """As wsss_ops.out_of_candidate_rate."""
    _, candidate = _candidates(_scores(logits, size, align_corners), (tags != 0)[:, :, None, None], ignore)
    pixels = torch.ones_like(candidate) if ignore is None else ~ignore
    return candidate.sum() / pixels.sum().clamp_min(1)


def _scores(logits: Tensor, size: Sequence[int] | None, align_corners: bool) -> Tensor:
    """In float32 or wider, at the size of the loss."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if size is None or tuple(size) == tuple(logits.shape[2:]):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _candidates(scores: Tensor, tagged: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per pixel the predicted class, and whether it is an out-of-candidate pixel."""
    winner = scores.argmax(1)
    outside = ~tagged[:, :, 0, 0].gather(1, winner.flatten(1)).view_as(winner)
    candidate = (outside | scores.isnan().any(1)) & tagged.any(1)
    return winner, candidate if ignore is None else candidate & ~ignore
