"""`ssast bench loader ...` and `ssast bench kernels ...`: how fast the parts are on this machine."""

from __future__ import annotations

import sys

USAGE = """usage: ssast bench loader|kernels ...

  loader     clips/s of the loader beside what is usual: soundfile, webdataset and torchcodec in a
             DataLoader, the official way
  kernels    times of the operators beside PyTorch's

`ssast bench loader --help` and `ssast bench kernels --help` tell more."""


def main(argv: list[str] | None = None) -> int:
    """measure the loader, or the operators, beside the usual ways"""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    what, *rest = argv
    if what == "loader":
        from .loader.command import main as bench_loader

        return bench_loader(rest)
    if what == "kernels":
        from .kernels import main as bench_kernels

        return bench_kernels(rest)
    print(f"ssast bench: unknown benchmark {what!r}; there are loader, kernels", file=sys.stderr)
    return 2
