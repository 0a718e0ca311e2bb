"""The paper's filters: which samples are worth training on (MIGE, section on data construction).

A sample is kept where its target is at most MAX_ASPECT_RATIO times as wide as high, and where every score that it has
is high enough. A score that is not there says nothing.
"""

from collections.abc import Mapping

MAX_ASPECT_RATIO = 4  # width / height, as the published dataset class filters; it lets images of any height pass
ABOVE = {"aesthetic": 5.5, "annotation_match": 0.3}  # kept above
AT_LEAST = {"clip_t": 0.255}  # kept from there on
SCORES = (*ABOVE, *AT_LEAST)


def rejection(size: tuple[int, int] | None, scores: Mapping[str, float]) -> str | None:
    """Why a sample is left out; None for one that is kept.

    Args:
        size: (width, height) of the target in pixels; None: not known.
        scores: By name; others than SCORES are passed over.

    Returns:
        A few words, the same for all samples that are left out for this reason.
    """
    if size is not None and size[0] > MAX_ASPECT_RATIO * size[1]:
        return f"width more than {MAX_ASPECT_RATIO} times the height"
    for name, limit in ABOVE.items():
        if name in scores and not scores[name] > limit:
            return f"{name} not above {limit}"
    for name, limit in AT_LEAST.items():
        if name in scores and not scores[name] >= limit:
            return f"{name} below {limit}"
    return None
