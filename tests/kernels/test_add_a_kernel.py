"""The example of docs/add-a-kernel.md does what the page says: its kernel is loaded, and its tests are run, as they
stand there.
"""

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

from triton import knobs

import ssast.kernels

PAGE = Path(__file__).parents[2] / "docs" / "add-a-kernel.md"
EXAMPLES = re.findall(r"^## \d\. [\w ]+: (\S+).*?^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
FOLDER = tempfile.TemporaryDirectory()  # for as long as the tests run: Triton reads a kernel's source from its file


def load(path: str, source: str) -> None:
    """The page's kernel under the name that it would have."""
    file = Path(FOLDER.name, Path(path).name)
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"ssast.kernels.{file.stem}", file)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = os.environ.get("SSAST_TEST_DEVICE") != "cuda"
        spec.loader.exec_module(module)
    setattr(ssast.kernels, file.stem, getattr(module, file.stem))


load(*EXAMPLES[0])
exec(compile(EXAMPLES[1][1], EXAMPLES[1][0], "exec"))  # its tests become those of this file
