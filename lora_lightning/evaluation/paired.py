"""Tests whether chance explains the difference of two models on the same samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DRAWS = 10_000
_MOST_DRAWN = 20_000
"""For more samples, the mean of a resample is normal to several digits."""


def mcnemar_p(fixed: int, broke: int) -> float:
    """Return the two-sided p-value of McNemar's exact test for equal error rates of two models.

    Under the null hypothesis, each sample that only one model classifies correctly is equally likely for both models
    (McNemar 1947, https://doi.org/10.1007/BF02295996). The exact form is a sign test.
    """
    changed = torch.tensor(float(fixed + broke), dtype=torch.float64)
    fewer = torch.arange(min(fixed, broke) + 1, dtype=torch.float64)
    choices = torch.lgamma(changed + 1) - torch.lgamma(fewer + 1) - torch.lgamma(changed - fewer + 1)
    tail = torch.logsumexp(choices - changed * torch.log(torch.tensor(2.0, dtype=torch.float64)), 0).exp()
    return min(1.0, float(2 * tail))


@dataclass(frozen=True)
class PairedBootstrap:
    """Holds the result of a paired bootstrap of a mean difference over samples.

    Args:
        difference: Mean difference, adapted minus base.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        p: Two-sided p-value for a difference of zero.
    """

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(differences: Tensor) -> PairedBootstrap | None:
    """Return the result of a paired bootstrap with 10,000 draws (Efron 1979, https://doi.org/10.1214/aos/1176344552).

    The result does not depend on the order of the samples. For more than 20,000 samples, the draws are replaced by
    their normal limit.

    Args:
        differences: Difference of each sample, of shape (N,).

    Returns:
        The result, or `None` for less than two samples.
    """
    values = differences.double().cpu().sort().values
    count = len(values)
    if count < 2:
        return None
    mean = float(values.mean())
    if count > _MOST_DRAWN:
        error = float(values.std()) / count**0.5
        p = 1.0 if not error else float(torch.special.erfc(torch.tensor(abs(mean) / error / 2**0.5)))
        return PairedBootstrap(mean, mean - 1.959964 * error, mean + 1.959964 * error, p if error or not mean else 0.0)
    generator = torch.Generator().manual_seed(0)
    at_once = max(1, 2_000_000 // count)
    means = torch.cat(
        [
            values[torch.randint(count, (min(at_once, _DRAWS - start), count), generator=generator)].mean(1)
            for start in range(0, _DRAWS, at_once)
        ]
    )
    low, high = (float(each) for each in means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    return PairedBootstrap(mean, low, high, min(1.0, 2 * (min(below, above) + 1) / (_DRAWS + 1)))
