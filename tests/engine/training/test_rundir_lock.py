import subprocess
import sys

import pytest

from ssast.engine.errors import UserError
from ssast.engine.training import rundir

HOLD = "import sys, time\nfrom ssast.engine.training.rundir import locked\nfrom pathlib import Path\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"


def test_a_run_folder_is_of_one_process_until_that_has_ended(tmp_path, monkeypatch, capsys):
    """However it ends: here it is killed outright."""
    monkeypatch.setattr(rundir, "LOCK_PATIENCE_S", 0.2)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training in this run folder"), rundir.locked(tmp_path):
            pytest.fail("the folder is held")
        assert "waiting for another process" in capsys.readouterr().out
        monkeypatch.setattr(rundir, "LOCK_PATIENCE_S", 60.0)
        holder.kill()
        with rundir.locked(tmp_path):
            pass
        with rundir.locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match="cannot be made or locked"), rundir.locked(rundir.Path("/proc/run")):
        pytest.fail("there is no such folder")
