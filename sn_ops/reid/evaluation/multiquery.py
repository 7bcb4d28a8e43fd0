"""Multiple query: one feature for all images of a person under a camera."""

from __future__ import annotations

import torch
from torch import Tensor

from .matching import integer_vector


def multi_query_features(
    query_ids: Tensor, query_cameras: Tensor, images: Tensor, image_ids: Tensor, image_cameras: Tensor
) -> Tensor:
    """The mean feature of every query's (identity, camera), over the images of it (Market-1501: `gt_bbox`).

    Args:
        query_ids: identities, integer `[Q]`, any device.
        query_cameras: cameras, integer `[Q]`, any device.
        images: features `[M, D]`, floating point.
        image_ids: identities, integer `[M]`, any device.
        image_cameras: cameras, integer `[M]`, any device.

    Returns:
        `[Q, D]` of the images' dtype and device, the mean taken in float64. Means of unit rows are shorter than 1; that
        does not change a ranking of unit gallery rows, and "cosine" normalises anyway.

    Raises:
        TypeError: features or identities of another type.
        ValueError: lengths that differ, or a queried (identity, camera) without images.

    Source: multiple query of Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 2:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"sn_ops.reid: images: expected a floating point tensor [M, D], got {got}")
    device = images.device
    wanted = torch.stack(
        [
            integer_vector("query_ids", query_ids, None, device),
            integer_vector("query_cameras", query_cameras, len(query_ids), device),
        ],
        1,
    )
    given = torch.stack(
        [
            integer_vector("image_ids", image_ids, len(images), device),
            integer_vector("image_cameras", image_cameras, len(images), device),
        ],
        1,
    )
    _, group = torch.cat([wanted, given]).unique(dim=0, return_inverse=True)
    mine, theirs = group[: len(wanted)], group[len(wanted) :]
    counts = theirs.bincount(minlength=int(group.max()) + 1 if group.numel() else 0)
    missing = (counts[mine] == 0).nonzero()[:, 0]
    if missing.numel() > 0:
        pid, camera = wanted[missing[0]].tolist()
        raise ValueError(
            f"sn_ops.reid: images: expected at least one for every queried (identity, camera), got none for "
            f"{missing.numel()} queries, the first ({pid}, {camera})"
        )
    # Sums of consecutive rows in a fixed order: the result does not depend on the device's atomics.
    order = theirs.argsort(stable=True)
    ends = counts.cumsum(0)
    means = [
        images[order[end - count : end]].double().mean(0) if count else images.new_zeros(images.shape[1]).double()
        for count, end in zip(counts.tolist(), ends.tolist(), strict=True)
    ]
    return torch.stack(means)[mine].to(images.dtype) if means else images.new_zeros(0, images.shape[1])
