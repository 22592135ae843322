"""Turn benchmarks/results/*.json into the table and the plot of docs/performance.md.

    python benchmarks/render.py

Between its two marks the page is written anew, and docs/images/performance.svg; what stands around them is left alone.
What has not been measured says so. It needs nothing but Python.
"""

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "performance.svg"
BEGIN, END = "<!-- benchmarks: written by benchmarks/render.py -->", "<!-- end of benchmarks -->"
Results = Mapping[str, Mapping[str, Any]]


@dataclass
class Row:
    """One comparison; of a ratio above 1 we are better, but where less is better."""

    what: str
    setting: str
    ours: str = "open"
    peer: str = ""
    ratio: float | None = None
    goal: float | None = None
    less_is_better: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        sign = "≤" if self.less_is_better else "≥"
        if self.ratio is None:
            return f"{sign} {self.goal:g}, open"
        met = self.ratio <= self.goal if self.less_is_better else self.ratio >= self.goal
        return f"{sign} {self.goal:g}, {'met' if met else '**short**'}"

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return [self.what, self.setting, self.ours, self.peer, ratio, self.verdict]


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def rows(results: Results) -> list[Row]:
    def of(name: str) -> list[Mapping[str, Any]]:
        return list(results.get(name, {}).get("results", []))

    found = [*steps(of("train_step"), 1.15), *steps(of("train_step_gpu"), 1.2)]
    if "train_step_gpu" not in results:
        found.append(Row("training step", "sd15, a GPU, bf16, compiled", goal=1.2))
    found += program(of("program")) or [Row("training program", "shapes", goal=1.5)]
    found += list(sampling(of("sampling")))
    found += quality(of("quality")) or [Row("time to 90 % of prompts obeyed", "shapes", goal=2.0)]
    found += list(scaling(of("scaling"))) or [Row("processes", "gloo")]
    weighed = [*memory(of("memory")), *memory(of("memory_gpu"))]
    return found + (weighed or [Row("memory of a step", "tiny, small, base", goal=0.9, less_is_better=True)])


def best(values: Mapping[str, float], ours: bool) -> tuple[str, float]:
    return min(((n, v) for n, v in values.items() if n.startswith("ldm") == ours), key=lambda item: item[1])


def steps(found: list[Mapping[str, Any]], goal: float) -> Iterator[Row]:
    for each in found:
        device = "" if each.get("device", "cpu") == "cpu" else f", {each['device']}"
        setting = f"{each['preset']}, {each['batch']} × {each['latents']}², {each['precision']}{device}"
        mine, theirs = (best(each["milliseconds"], ours) for ours in (True, False))
        yield Row("training step", setting, f"{mine[1]:g} ms", f"{theirs[1]:g} ms", each["ratio"], goal)


def program(found: list[Mapping[str, Any]]) -> list[Row]:
    made = []
    for each in found:
        setting = f"{each['experiment']}, batch {each['batch']}, {each['precision']}"
        rate = {name: sum(values) / len(values) for name, values in each["images_per_second"].items()}
        ours, peer = (f"{rate[name]:.0f} images/s" for name in ("ldm", "diffusers"))
        made.append(Row("training program", setting, ours, peer, each["ratio"], 1.5))
        wall = each["wall_seconds"]
        for name, told in (("ldm, no cache yet", "cache built first"), ("ldm", "cache there")):
            setting = f"from start to end, {each['steps']} steps, {told}"
            ratio = round(wall["diffusers"] / wall[name], 3)
            made.append(Row("training program", setting, f"{wall[name]:g} s", f"{wall['diffusers']:g} s", ratio))
    return made


def sampling(found: list[Mapping[str, Any]]) -> Iterator[Row]:
    for each in found:
        setting = f"{each['preset']}, {each['batch']} × {each['side']}², {each['steps']} steps, {each['dtype']}"
        mine, theirs = (best(each["milliseconds"], ours) for ours in (True, False))
        yield Row("sampling", setting, f"{mine[1]:g} ms", f"{theirs[1]:g} ms", each["ratio"])


def quality(found: list[Mapping[str, Any]]) -> list[Row]:
    made = []
    for each in found:
        told = {}
        for name, seconds in each["seconds"].items():
            last = each["curves"][name][-1]
            told[name] = (
                f"{seconds:.0f} s, step {each['steps'][name]}"
                if seconds
                else f"not in {last['seconds']:.0f} s: {last['obeyed']:.0%}"
            )
        setting = f"{each['experiment']}, {each['prompts']} prompts"
        goal = f"time to {each['goal']:.0%} of prompts obeyed"
        made.append(Row(goal, setting, told["ldm"], told["diffusers"], each["ratio"], 2.0))
    return made


def scaling(found: list[Mapping[str, Any]]) -> Iterator[Row]:
    for each in found:
        if each["case"] == "one process":
            continue
        setting = f"{each['processes']}, gloo, batch {each['batch']} each; {each['at_most']} cores at most"
        over = f"{each['overhead_milliseconds']:g} ms a step over the work"
        yield Row("processes", setting, f"{each['images_per_second']:g} images/s", over, each["speed_up"])


def memory(found: list[Mapping[str, Any]]) -> Iterator[Row]:
    for each in found:
        mine, theirs = (best(each["mebibytes"], ours)[1] for ours in (True, False))
        setting = f"{each['preset']}, {each['batch']} × {each['latents']}²"
        yield Row("memory of a step", setting, f"{mine:g} MiB", f"{theirs:g} MiB", each["ratio"], 0.9, True)


def table(found: list[Row]) -> str:
    head = ["what", "setting", "ours", "beside", "ratio", "goal"]
    lines = [head, ["---", "---", "--:", "--:", "--:", "---"], *(row.cells() for row in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor(found: list[Mapping[str, Any]]) -> str:
    """Lay out milliseconds of a step by threads, memory format and precision."""
    kinds = [(memory, precision) for memory in ("contiguous", "channels_last") for precision in ("fp32", "bf16")]
    lines = [["step of", "threads", *(" ".join(kind) for kind in kinds)], ["---", "--:", *["--:"] * len(kinds)]]
    for preset, threads in dict.fromkeys((each["preset"], each["threads"]) for each in found):
        values = {
            (each["memory_format"], each["precision"]): each["milliseconds"]
            for each in found
            if (each["preset"], each["threads"]) == (preset, threads)
        }
        lines.append([preset, str(threads), *(f"{values[kind]:g} ms" for kind in kinds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machines(results: Results) -> str:
    """Say of each file of results where and with what it was measured."""
    lines = []
    for name, content in results.items():
        at = content["machine"]
        threads = f"{at['threads']} thread{'s' * (at['threads'] != 1)}"
        told = f"{at['cores']} cores of {at['processor']}, {threads}, torch {at['torch']}, diffusers {at['diffusers']}"
        lines.append(f"- [`{name}`](../benchmarks/results/{name}.json): {told}, commit {at['commit']}, {at['date']}")
    return "\n".join(lines)


def plot(found: list[Row]) -> str:
    """Draw the ratios as bars from 1, to the right where we are better; a stroke marks each goal."""
    drawn = [row for row in found if row.ratio is not None and row.what != "processes"]
    left, width, line = 400, 320, 22
    gains = [(1 / row.ratio if row.less_is_better else row.ratio) if row.ratio else 1.0 for row in drawn]
    goals = [(1 / row.goal if row.less_is_better else row.goal) if row.goal else None for row in drawn]
    most = max([*gains, *(goal for goal in goals if goal), 1.5])
    least = min([*gains, 1.0])

    def x(value: float) -> str:
        return f"{left + width * (value - least) / (most - least):.1f}"

    height = line * (len(drawn) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" font-size="12" '
        'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for i, (row, gain, goal) in enumerate(zip(drawn, gains, goals, strict=True)):
        y = line * i + 8
        color = "#2a7ab0" if goal is None or gain >= goal else "#c8773a"
        start, end = sorted((float(x(1.0)), float(x(gain))))
        parts.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(f"{row.what}: {row.setting}")}</text>'
            f'<rect x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="14" fill="{color}"/>'
            f'<text x="{end + 6:.1f}" y="{y + 12}">{gain:.2f}</text>'
        )
        if goal:
            parts.append(f'<path d="M{x(goal)} {y - 2}v18" stroke="#000" stroke-width="2"/>')
    bottom = line * len(drawn) + 8
    parts.append(f'<path d="M{x(1.0)} 4V{bottom}" stroke="#888"/>')
    told = "times as fast as diffusers, or as little memory; strokes are goals, orange falls short"
    parts.append(f'<text x="{left + width + 50}" y="{bottom + 20}" text-anchor="end" fill="#444">{told}</text></svg>\n')
    return "\n".join(parts)


def render(results: Results, page: str) -> tuple[str, str]:
    """Return the page with the table of these results between its marks, and the plot.

    Raises:
        ValueError: the page has not both marks, once each.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    found = rows(results)
    image = f"![ratios of all comparisons, with their goals](images/{PLOT.name})"
    parts = [table(found), image]
    if "cpu" in results:
        parts += ["On a processor, ours alone, by threads, memory format and precision:"]
        parts += [processor(results["cpu"]["results"])]
    body = "\n\n".join([*parts, machines(results)])
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", plot(found)


def main() -> None:
    page, image = render(read(), PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    PLOT.write_text(image, encoding="utf-8")
    print(f"written: {PAGE} and {PLOT}")


if __name__ == "__main__":
    main()
