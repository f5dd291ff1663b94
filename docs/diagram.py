"""Write the diagram of the lifecycle, for the README and for the site: `python docs/diagram.py`."""

import re
from pathlib import Path

from outbox.lifecycle import diagram, moves

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "lifecycle.svg"

# The centres of the statuses, and how far the line between two of them bends aside.
STATUSES = {
    "pending": (100, 120),
    "sending": (370, 120),
    "sent": (640, 120),
    "parked": (260, 300),
    "abandoned": (480, 300),
}
BENDS = {
    ("pending", "sending"): 30,
    ("sending", "pending"): 30,
    ("pending", "sent"): 88,
    ("sending", "parked"): 15,
    ("sending", "abandoned"): -15,
    ("abandoned", "pending"): 130,
    ("pending", "abandoned"): -75,
    ("parked", "abandoned"): 0,
    ("parked", "sent"): -30,
    ("abandoned", "sent"): -10,
    ("parked", "pending"): 10,
}
HALF_WIDTH, HALF_HEIGHT = 52, 19


def picture() -> str:
    """Return the moves as an SVG, which is shown where there is no Mermaid."""
    triggers_of: dict[tuple[str, str], list[str]] = {}
    for move in moves().values():
        for source in move.sources:
            triggers_of.setdefault((source.value, move.target.value), []).append(move.trigger)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 360" font-family="sans-serif" font-size="13">',
        "<defs>",
        '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>',
        '<rect width="740" height="360" fill="#fff"/>',
    ]
    words = []
    for (source, destination), triggers in triggers_of.items():
        path, (x, y) = _line(source, destination)
        told = ", ".join(triggers)
        lines.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#tip)"/>')
        left, width = x - 3.5 * len(told), 7 * len(told)
        words += [
            f'<rect x="{left:.0f}" y="{y - 9:.0f}" width="{width}" height="18" fill="#fff"/>',
            f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="#222">{told}</text>',
        ]
    lines += words
    for name, (x, y) in STATUSES.items():
        box = f'x="{x - HALF_WIDTH}" y="{y - HALF_HEIGHT}" width="{2 * HALF_WIDTH}" height="{2 * HALF_HEIGHT}"'
        lines += [
            f'<rect {box} rx="9" fill="#e8eef7" stroke="#335"/>',
            f'<text x="{x}" y="{y + 5}" text-anchor="middle" font-weight="bold" fill="#112">{name}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


def _line(source: str, destination: str) -> tuple[str, tuple[float, float]]:
    """Return a path between the edges of two statuses, and where its words stand."""
    (x1, y1), (x2, y2) = STATUSES[source], STATUSES[destination]
    if source == destination:
        top = y1 - HALF_HEIGHT
        return f"M{x1 - 18} {top}C{x1 - 40} {top - 55} {x1 + 40} {top - 55} {x1 + 18} {top}", (x1, top - 42)
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    bend = 2 * BENDS.get((source, destination), 0) / length
    turn_x, turn_y = (x1 + x2) / 2 + (y2 - y1) * bend, (y1 + y2) / 2 - (x2 - x1) * bend
    (start_x, start_y), (end_x, end_y) = _edge(source, turn_x, turn_y), _edge(destination, turn_x, turn_y)
    middle = (start_x + 2 * turn_x + end_x) / 4, (start_y + 2 * turn_y + end_y) / 4
    return f"M{start_x:.0f} {start_y:.0f}Q{turn_x:.0f} {turn_y:.0f} {end_x:.0f} {end_y:.0f}", middle


def _edge(status: str, x: float, y: float) -> tuple[float, float]:
    """Return where a line from the centre of a status towards this point leaves it."""
    centre_x, centre_y = STATUSES[status]
    part = 1 / max(abs(x - centre_x) / HALF_WIDTH, abs(y - centre_y) / HALF_HEIGHT)
    return centre_x + (x - centre_x) * part, centre_y + (y - centre_y) * part


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(
        re.sub(r"```mermaid\n.*?```", f"```mermaid\n{diagram()}\n```", text, flags=re.DOTALL), encoding="utf-8"
    )
