"""A curve over the training steps, as inline SVG."""
import html
import math
from collections.abc import Sequence

import numpy as np


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Means over up to `reach` values on each side.

    Near the start, where a curve is steep, over as many after a value as there are before it.
    """
    reaches = (min(reach, i) for i in range(len(values)))
    return [float(np.mean(values[i - r:i + r + 1])) for i, r in enumerate(reaches)]


def curve_svg(title: str, points: Sequence[tuple[float, float]], axis: str = "loss",
              reach: int = 0) -> str:
    """Draw points (step, value) as inline SVG, thin, and means over their neighbours.

    The axis of values is logarithmic if all are positive; that of a "score" goes from 0 to 1.
    """
    steps, values = np.array(points, float).T                                   # (n,) each
    is_log = axis != "score" and values.min() > 0
    heights = np.log(values) if is_log else values
    top = 1.0 if axis == "score" else heights.max()
    span = 1.0 if axis == "score" else max(np.ptp(heights), 1e-3)
    x = 50 + 360 * steps / steps.max()

    def line(heights: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, 20 + 155 * (top - heights) / span))

    means = np.array(smooth(values, reach))                                     # (n,)
    ticks = ""
    for part in (0.0, 0.5, 1.0):
        height, right = top - part * span, 50 + 360 * part
        y, value = 20 + 155 * part, math.exp(height) if is_log else height
        ticks += (f'<path d="M50,{y}H410"/><text x="46" y="{y + 4}" class="end">{value:.3g}</text>'
                  f'<text x="{right}" y="190" class="middle">{part * steps.max():.0f}</text>')
    return (
        f'<svg viewBox="-22 -14 454 226" role="img"><title>{html.escape(title)}</title>'
        f'<text x="-20" y="0">{html.escape(title)}</text>{ticks}'
        f'<text x="230" y="208" class="middle">step</text><text transform="translate(-10 98)'
        f' rotate(-90)" class="middle">{axis}{" (logarithmic)" if is_log else ""}</text>'
        f'<polyline class="raw" points="{line(heights)}"/>'
        f'<polyline points="{line(np.log(means) if is_log else means)}"/></svg>')
