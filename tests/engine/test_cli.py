import subprocess
import sys

import pytest

from ssast.engine.cli import VERBS, main
from ssast.engine.environment import optional_parts


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert main([]) == 2


def test_help_is_given_without_torch():
    """It takes seconds to import, as do what other packages add as verbs, of which only the source is read."""
    code = (
        "import sys; from ssast.engine.cli import main; main(['--help']); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'ssast.benchmarks.bench') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "measure the training step of a config" in done.stdout


@pytest.mark.parametrize("argv", [["fly"], ["report", "/nowhere"], ["pretrain", "nowhere"], ["synth", "/proc/x"]])
def test_mistakes_are_one_line(argv, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssast: ") and error.count("\n") == 1


def test_doctor_judges_by_features(capsys, tmp_path, monkeypatch):
    """PyPI's `apex` is another project: its presence is not NVIDIA's."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert optional_parts()["NVIDIA apex"] == "no (apex.optimizers is installed but has no FusedAdam)"
    assert main(["doctor"]) == 0
    assert "DeepSpeed          yes" in capsys.readouterr().out


def test_loading_a_model_needs_neither_deepspeed_nor_dali():
    code = (
        "import sys, ssast.engine, ssast.kernels; print([m for m in ('deepspeed', 'nvidia.dali', 'matplotlib') if "
        "m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_rooms_know_only_the_rooms_below():
    """Arrows point one way: benchmarks -> engine -> kernels."""
    from pathlib import Path

    root = Path(__file__).parents[2]
    for room, forbidden in (("kernels", ("ssast.engine", "ssast.benchmarks")), ("engine", ("ssast.benchmarks",))):
        for file in (root / room).rglob("*.py"):
            for above in forbidden:
                assert above not in file.read_text(encoding="utf-8"), f"{file} knows {above}"


def test_short_names_are_not_importable_elsewhere(tmp_path):
    """Another well-known package is called `kernels`."""
    code = (
        "import importlib.util as u; print([n for n in ('engine', 'kernels', 'benchmarks', 'configs') if "
        "u.find_spec(n)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_a_reader_who_leaves_is_no_error():
    """As in `ssast --help | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ssast.engine.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 141 and error == b""
