"""`ssast`: the front door. Each verb is a module with `main(argv) -> exit status`."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn

from .errors import UserError
from .process import leave, settle_process


def _doctor(argv: list[str]) -> int:
    if argv:
        print("usage: ssast doctor\n\nShow the versions in use and which optional parts are there, or why not.")
        return 0 if argv in (["-h"], ["--help"]) else 2
    from .environment import describe_environment, optional_parts

    described = describe_environment()
    for key in ("platform", "python", "torch", "triton", "deepspeed", "cuda", "devices", "git_commit"):
        print(f"{key:18} {described.get(key)}")
    print()
    for part, state in optional_parts().items():
        print(f"{part:18} {state}")
    return 0


Verb = Callable[[list[str]], int]


def _main_of(module: str) -> Verb:
    """Imported when it is called: most verbs bring torch along."""
    return lambda argv: importlib.import_module(module, __package__).main(argv)


VERBS: dict[str, tuple[Verb, str]] = {
    "pretrain": (_main_of(".pretrain"), "pretrain on a folder or manifest of audio"),
    "finetune": (
        _main_of(".finetune.run"),
        "train a classifier on labelled audio, compare pretrained weights with none, and test it",
    ),
    "evaluate": (_main_of(".inference.evaluate"), "measure a fine-tuned model, or embeddings by a probe"),
    "embed": (_main_of(".inference.embed"), "embeddings of recordings, as .npz or .parquet"),
    "predict": (_main_of(".inference.predict"), "the most probable classes of recordings"),
    "export": (
        _main_of(".inference.export"),
        "write a model for other programs: Hugging Face, ONNX, torch.export, the official code",
    ),
    "prepare": (_main_of(".data.prepare"), "turn recordings of any kind into a folder of shards to train on"),
    "synth": (_main_of(".data.synth"), "write the synthetic corpus of the demo"),
    "doctor": (_doctor, "show versions, devices and which optional parts are there"),
}


def verbs() -> dict[str, tuple[Verb, str]]:
    """The engine's own, and what other packages register as entry points of the group "ssast.verbs": functions like
    `main`, whose first line of documentation says what they are for.
    """
    registered = {entry.name: (_loaded(entry), _purpose(entry)) for entry in entry_points(group="ssast.verbs")}
    return VERBS | registered


def _loaded(entry: EntryPoint) -> Verb:
    return lambda argv: entry.load()(argv)


def _purpose(entry: EntryPoint) -> str:
    """The first line of the function's documentation, read from its source: to import it may take seconds."""
    with contextlib.suppress(ImportError, OSError, SyntaxError, ValueError):  # of a package that is not whole
        spec = importlib.util.find_spec(entry.module)
        source = Path(spec.origin).read_bytes() if spec is not None and spec.origin is not None else b""
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
                return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    settle_process()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"ssast: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ssast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = None  # nobody reads it any more, so there is nothing to flush at the end
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: ssast VERB ...\n")
        print("\n".join(f"  {verb:10} {purpose}" for verb, (_, purpose) in verbs().items()))
        print("\n`ssast VERB --help` tells more.")
        return 0 if argv else 2
    available = VERBS if argv[0] in VERBS else verbs()
    if argv[0] not in available:
        print(f"ssast: unknown verb {argv[0]!r}; there are {', '.join(available)}", file=sys.stderr)
        return 2
    return available[argv[0]][0](argv[1:])


def command() -> NoReturn:
    """What the installed `ssast` runs."""
    try:
        status = main()
    except SystemExit as error:  # argparse's, after its message
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    leave(status)


if __name__ == "__main__":
    command()
