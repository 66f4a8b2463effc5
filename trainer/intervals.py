"""95 % confidence intervals of a mean over episodes: for more episodes of the same classes, and for other classes."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mamldata.errors import RequestError

_NORMAL = NormalDist().inv_cdf(0.975)
# By degrees of freedom: where the expansion below is not accurate to four digits.
_FEWEST = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706}


def half_width(deviation: float, episodes: int) -> float:
    """Half the width of Student's interval; for 600 episodes it is 0.2 % wider than 1.96 standard errors.

    Args:
        deviation: the sample standard deviation over the episodes (divisor ``episodes - 1``).
        episodes: their number, at least 2.
    """
    return student_quantile(episodes - 1) * deviation / math.sqrt(episodes)


def class_half_width(shares: npt.NDArray[np.float64], classes: npt.NDArray[np.int64]) -> float:
    """Half the width of the interval for other classes from where these come from, as training or use would meet.

    Episodes that share a class are not independent: hard classes make all their episodes hard. The jackknife over
    classes leaves out each class with all its episodes (Quenouille 1956; Efron and Stein 1981, "The jackknife estimate
    of variance"), which is unbiased if class effects add up. What the drawing of episodes adds to it is subtracted,
    because it is estimated from all of them: with C classes, E episodes and variances A of the mean by classes and R
    of one episode beside that, the jackknife has the expectation A + k R / E, the episodes have the variance
    R + A (C - n) / n, and the result is A + R / E, never below R / E. Differences between the images of a class count,
    too, as part of its class. Lafargue et al. 2024, https://arxiv.org/abs/2409.02850, compare such intervals.

    Args:
        shares: of right answers in each of the E episodes, float64 ``[E]``.
        classes: of each episode, whole numbers from 0, int64 ``[E, n_way]``.

    Raises:
        RequestError: a class is in every episode, or there are not more episodes than classes.
    """
    episodes, count = len(shares), int(classes.max()) + 1
    present = np.zeros((episodes, count), dtype=np.bool_)
    present[np.arange(episodes)[:, None], classes] = True
    with_class = present.sum(0)
    present, with_class = present[:, with_class > 0], with_class[with_class > 0]
    count = len(with_class)
    if with_class.max() == episodes or episodes <= count:
        raise RequestError(
            f"{episodes} episodes of {count} classes do not show how accuracy varies with the classes: it takes more "
            "episodes than classes, and more classes than each episode has."
        )
    variance = shares.var(ddof=1)
    left_out = (shares.sum() - shares @ present) / (episodes - with_class)
    jackknife = (count - 1) / count * np.square(left_out - left_out.mean()).sum()
    noise = (count - 1) / count * (with_class / (episodes - with_class)).sum() / episodes
    odds = count * episodes / with_class.sum() - 1  # (C - n) / n
    of_classes = max(0.0, (jackknife - noise * variance) / (1 - noise * odds))
    of_episode = max(0.0, variance - of_classes * odds)
    return student_quantile(count - 1) * math.sqrt(of_classes + of_episode / episodes)


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with ``freedom`` degrees of freedom, to four digits.

    From 6 degrees on, by the expansion of Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, equation
    26.7.5.
    """
    if freedom in _FEWEST:
        return _FEWEST[freedom]
    x = _NORMAL
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
