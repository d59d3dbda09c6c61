import subprocess
import sys


def test_importing_the_kernels_leaves_the_compiler_alone():
    """torch._dynamo takes seconds, and nobody needs it before something is compiled."""
    code = "import sys, ssast.kernels; print({'torch._dynamo', 'torch._inductor'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
