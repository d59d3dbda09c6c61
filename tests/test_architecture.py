"""The plan of docs/architecture.md, held: imports go down the floors, nothing imports in a circle, and the pictures are
those of this tree.
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
plan = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plan)

FLOOR = {room: number for number, floor in enumerate(plan.FLOORS) for room in floor}


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not go down, as "importer -> imported"."""
    return [
        f"{name} -> {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if target not in plan.PACKAGES
        and plan.room_of(name) != plan.room_of(target)
        and FLOOR[plan.room_of(name)] >= FLOOR[plan.room_of(target)]
    ]


def test_every_room_has_its_floor():
    assert {plan.room_of(name) for name in plan.modules()} == set(FLOOR) == set(plan.PURPOSE)


def test_arrows_point_down():
    """benchmarks -> engine -> kernels; inside the engine pretrain, inference, finetune -> training -> data -> model."""
    assert climbs(plan.module_graph()) == []


def test_nothing_imports_in_a_circle():
    assert plan.circles(plan.module_graph()) == []
    assert plan.circles(plan.room_graph()) == []


def test_a_climb_and_a_circle_would_be_seen():
    graph = {"kernels.fbank": {"engine.config"}, "engine.config": {"engine.model.config", "kernels.fbank"}}
    assert climbs(graph) == ["kernels.fbank -> engine.config"]
    assert plan.circles(graph) == [["engine.config", "kernels.fbank"]]


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("from ssast.engine.errors import UserError", "engine.errors"),
        ("from ssast.kernels import law", "kernels.law"),
        ("import ssast.kernels.law as x", "kernels.law"),
        ("from .config import ModelConfig", "engine.model.config"),
        ("from . import config", "engine.model.config"),
        ("from .. import files", "engine.files"),
        ("def f():\n    from ssast.engine.errors import UserError", "engine.errors"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .config import ModelConfig", None),
        ("import torch", None),
    ],
)
def test_imports_are_read(tmp_path, line, target):
    path = tmp_path / "ssast.py"
    path.write_text(line)
    assert plan.imports("engine.model.ssast", path, plan.modules()) == ({target} if target else set())


def test_the_stations_exist():
    known = plan.modules()
    for _, _, module, name in plan.STATIONS:
        source = known[module].read_text(encoding="utf-8")
        assert f"def {name}(" in source or f"class {name}" in source, f"{module} has no {name}"


@pytest.mark.parametrize("name", plan.PAGES)
def test_the_pictures_are_of_this_tree(name):
    committed = (plan.PICTURES / name).read_text(encoding="utf-8")
    assert committed == plan.PAGES[name](), "stale: run python docs/draw_architecture.py"
