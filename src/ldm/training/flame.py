"""A flame graph: what called what, as wide as the time that it took."""

import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, LINE, LEAST = 1200, 18, 0.5  # pixels; frames narrower than the last are left out


@dataclass
class Frame:
    """Something that took time, by itself and in what it called."""

    name: str
    own: float = 0.0  # seconds
    calls: dict[str, "Frame"] = field(default_factory=dict)

    def add(self, names: Sequence[str], seconds: float) -> None:
        """Add time that was spent at the end of a chain of calls."""
        frame = self
        for name in names:
            frame = frame.calls.setdefault(name, Frame(name))
        frame.own += seconds

    @property
    def total(self) -> float:
        return self.own + sum(call.total for call in self.calls.values())


def flame_graph(root: Frame, title: str) -> str:
    """Draw frames as an SVG, the caller above; a frame tells its time and share when pointed at."""
    whole = root.total or 1.0
    shapes: list[str] = []

    def draw(frame: Frame, left: float, depth: int) -> int:
        width = frame.total / whole * WIDTH
        if width < LEAST:
            return depth
        told = f"{frame.name}: {1e3 * frame.total:.2f} ms, {frame.total / whole:.1%}"
        letters = int(width / 7)
        name = frame.name if len(frame.name) <= letters else frame.name[: letters - 1] + "…" if letters > 2 else ""
        hue = int(hashlib.sha256(frame.name.encode()).hexdigest()[:4], 16) % 60  # red to yellow, the same each time
        shapes.append(
            f'<g><title>{html.escape(told)}</title><rect x="{left:.1f}" y="{LINE * (depth + 2)}" width="{width:.1f}" '
            f'height="{LINE - 1}" fill="hsl({hue} 75% 68%)"/><text x="{left + 3:.1f}" y="{LINE * (depth + 3) - 5}">'
            f"{html.escape(name)}</text></g>"
        )
        deepest = depth
        for call in sorted(frame.calls.values(), key=lambda call: -call.total):
            deepest = max(deepest, draw(call, left, depth + 1))
            left += call.total / whole * WIDTH
        return deepest

    height = LINE * (draw(root, 0.0, 0) + 4)
    told = f"{html.escape(title)}: {1e3 * whole:.1f} ms under the profiler"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="11" '
        f'font-family="monospace"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="6" y="{LINE + 2}" font-size="14">{told}</text>'
    )
    return "\n".join([head, *shapes, "</svg>\n"])
