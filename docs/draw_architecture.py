"""Draws docs/pictures/rooms.svg and docs/pictures/data.svg: the rooms of the tree with the imports between them, and
the way of the data.

    python docs/draw_architecture.py            # write the pictures
    python docs/draw_architecture.py --check    # exit 1 if they are not what the tree says

Rooms and arrows are read off the import statements, so the first picture cannot drift from the code; the second names
functions that must exist. tests/test_architecture.py holds both, and the direction of every arrow.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
PACKAGES = ("benchmarks", "engine", "kernels")

# Rooms from top to bottom: a room may import from those on lines below its own.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("benchmarks",),
    ("engine",),  # pretrain.py, cli.py: what launchers and people name
    ("engine.inference",),
    ("engine.finetune",),
    ("engine.report",),
    ("engine.training",),
    ("engine.data", "engine.distributed"),
    ("engine.config",),
    ("engine.model",),
    ("engine.base",),  # errors.py, files.py and the like
    ("kernels",),
)
BASE = ("errors", "files", "twins", "process", "spans", "environment", "random_streams", "mixture")
BASE += ("deepspeed_section",)
PURPOSE = {
    "benchmarks": "measures both; results are rows",
    "engine": "pretrain.py, cli.py: the doors",
    "engine.finetune": "labelled tasks",
    "engine.inference": "embed, predict, evaluate, export",
    "engine.report": "pages and pictures of a run",
    "engine.training": "the loop, the step, checkpoints",
    "engine.config": "every key of a run",
    "engine.data": "sources, order, decoding, shards",
    "engine.model": "network, front end, weights",
    "engine.distributed": "ranks, launching, stopping",
    "engine.base": "errors, files, seeds, environment ...",
    "kernels": "operators on tensors",
}


def modules() -> dict[str, Path]:
    """Every module of the three packages, named from the package on (`engine.training.step`), and its file."""
    named = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the tree that a module imports, at its top or in a function; not those for type checkers alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets: set[str] = set()
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("ssast.") for alias in node.names if alias.name.startswith("ssast.")]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").removeprefix("ssast.") if not node.level else _absolute(package, node)
            if not node.level and not (node.module or "").startswith("ssast"):
                continue
            base = "" if base == "ssast" else base
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
        else:
            continue
        for target in names:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                targets.add(target)
    return targets


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _run_time_nodes(node)


def _absolute(package: str, node: ast.ImportFrom) -> str:
    parts = package.split(".")
    return ".".join((*parts[: len(parts) - node.level + 1], *(node.module or "").split("."))).strip(".")


def room_of(module: str) -> str:
    """`engine.training.step` is in the room `engine.training`, `engine.errors` in `engine.base`."""
    parts = module.split(".")
    if parts[0] != "engine":
        return parts[0]
    if len(parts) > 1 and parts[1] in BASE:
        return "engine.base"
    room = ".".join(parts[:2])
    return room if room in PURPOSE else "engine"


@functools.cache
def module_graph() -> dict[str, set[str]]:
    """Each module and what it imports."""
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def room_graph() -> dict[str, set[str]]:
    """Each room and the other rooms it imports from."""
    graph: dict[str, set[str]] = defaultdict(set)
    for name, targets in module_graph().items():
        room = room_of(name)
        graph[room] |= {room_of(target) for target in targets if target not in PACKAGES} - {room}
    return dict(graph)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return groups


# --- the pictures -----------------------------------------------------------------------------------------------------

_STYLE = """<style>
  text { font-family: system-ui, sans-serif; fill: #1f2933; } .name { font-size: 15px; font-weight: 600; }
  .what { font-size: 12px; fill: #52606d; } .arrow { stroke: #9aa5b1; stroke-width: 1.4; fill: none; }
  rect { rx: 8; fill: #ffffff; stroke: #cbd2d9; } .kernels rect { fill: #e8f1ec; stroke: #3f7f5f; }
  .benchmarks rect { fill: #f4eefa; stroke: #8b5fa8; }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
  <path d="M0,0 L8,4 L0,8 z" fill="#9aa5b1"/></marker></defs>"""
_WIDTH, _BOX, _HIGH, _FLOOR = 860, 250, 50, 78


def draw_rooms() -> str:
    """SVG of all rooms by floor, and an arrow for each room that imports from another."""
    place = {
        room: (_WIDTH * (2 * at + 1) / (2 * len(floor)), 12 + number * _FLOOR)
        for number, floor in enumerate(FLOORS)
        for at, room in enumerate(floor)
    }
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {len(FLOORS) * _FLOOR}">', _STYLE]
    graph = room_graph()
    for room, targets in sorted(graph.items()):
        for target in sorted(_direct(graph, room, targets)):
            (x, y), (to_x, to_y) = place[room], place[target]
            start, end = y + _HIGH, to_y - 2
            bend = (start + end) / 2
            parts.append(
                f'<path class="arrow" marker-end="url(#tip)" d="M{x:.0f},{start} C{x:.0f},{bend:.0f} '
                f'{to_x:.0f},{bend:.0f} {to_x:.0f},{end}"/>'
            )
    for room, (x, y) in place.items():
        name = {"engine": "engine/", "engine.base": "engine/*.py"}.get(room, room.replace(".", "/") + "/")
        name = name.replace("config/", "config.py")
        parts.append(
            f'<g class="{room.split(".")[0]}"><rect x="{x - _BOX / 2:.0f}" y="{y}" width="{_BOX}" height="{_HIGH}"/>'
            f'<text class="name" x="{x:.0f}" y="{y + 20}" text-anchor="middle">{escape(name)}</text>'
            f'<text class="what" x="{x:.0f}" y="{y + 38}" text-anchor="middle">{escape(PURPOSE[room])}</text></g>'
        )
    return "\n".join((*parts, "</svg>", ""))


def _direct(graph: dict[str, set[str]], room: str, targets: set[str]) -> set[str]:
    """Without those that another target reaches as well: what is left still shows who may know whom."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            for target in graph.get(rest.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    rest.append(target)
        return seen

    return {target for target in targets if not any(target in reach(other) for other in targets - {target})}


# Each station of the data, what it does, and the module and name in which a reader finds it.
STATIONS: tuple[tuple[str, str, str, str], ...] = (
    ("sources", "folders, tables, tars, shards", "engine.data.dataset", "open_dataset"),
    ("order", "a permutation of (seed, epoch)", "engine.data.order", "SampleOrder"),
    ("decoder", "read, decode, crop, resample", "engine.data.decode", "AudioDecoder"),
    ("loader", "waveform [B, S] on the device", "engine.data.loader", "Prefetcher"),
    ("fbank", "log-mel patches [B, P, K]", "kernels.fbank", "fbank"),
    ("mask", "M of P patches [B, M]", "kernels.patch_mask", "sample_patch_mask"),
    ("embedding", "tokens [B, 2 + P, D]", "kernels.embed", "embed_patches"),
    ("encoder", "blocks with flash attention", "engine.model.ssast", "SSAST"),
    ("loss", "InfoNCE + MSE + accuracy", "kernels.mspm_loss", "mspm_loss"),
    ("step", "DeepSpeed ZeRO or DDP, Adam", "engine.training.trainer", "Trainer"),
    ("checkpoint", "weights, state, metrics, report", "engine.training.checkpoint", "save_checkpoint"),
)


def draw_data() -> str:
    """SVG of the way from a file to a checkpoint, with the function that does each part."""
    columns, wide, high = 4, 262, 112
    rows = -(-len(STATIONS) // columns)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * wide} {rows * high}">', _STYLE]
    for number, (name, what, module, function) in enumerate(STATIONS):
        row, column = divmod(number, columns)
        x, y = column * wide + 6, row * high + 10
        if number + 1 < len(STATIONS):
            if column + 1 < columns:
                path = f"M{x + wide - 28},{y + 36} L{x + wide - 2},{y + 36}"
            else:
                path = f"M{x + 90},{y + 74} C{x + 90},{y + 92} 96,{y + 74} 96,{y + high - 2}"
            parts.append(f'<path class="arrow" marker-end="url(#tip)" d="{path}"/>')
        room, file = module.split(".")[0], module.rpartition(".")[2]
        parts.append(
            f'<g class="{room}"><rect x="{x}" y="{y}" width="{wide - 30}" height="72"/>'
            f'<text class="name" x="{x + 12}" y="{y + 22}">{escape(name)}</text>'
            f'<text class="what" x="{x + 12}" y="{y + 41}">{escape(what)}</text>'
            f'<text class="what" x="{x + 12}" y="{y + 59}">{escape(file)}.py: {function}</text></g>'
        )
    return "\n".join((*parts, "</svg>", ""))


PAGES = {"rooms.svg": draw_rooms, "data.svg": draw_data}


def main() -> int:
    """Write the pictures, or say which are stale."""
    stale = []
    for name, draw in PAGES.items():
        path, picture = PICTURES / name, draw()
        if "--check" in sys.argv[1:]:
            if not path.is_file() or path.read_text(encoding="utf-8") != picture:
                stale.append(name)
        else:
            path.write_text(picture, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run python docs/draw_architecture.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
