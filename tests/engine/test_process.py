import os
import pwd
import subprocess
import sys
import tempfile
from unittest import mock

import pytest

from ssast.engine.errors import UserError
from ssast.engine.files import expand_path
from ssast.engine.process import default_cache_folder, settle_process


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """As in a container that was started under a number that its passwd does not know."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with mock.patch.dict(os.environ):
        for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
            os.environ.pop(name, None)
        yield tmp_path / f"ssast-{os.getuid()}"


def test_without_a_home_caches_are_kept_in_the_temporary_folder(no_account, capsys):
    assert default_cache_folder() == no_account / ".cache" / "ssast"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data.cache_dir" in error
    assert no_account.stat().st_mode & 0o777 == 0o700
    assert os.environ["HOME"] == os.environ["TRITON_HOME"] == os.environ["MPLCONFIGDIR"] == str(no_account)
    assert os.environ["USER"] == f"user-{os.getuid()}"
    with pytest.raises(UserError, match="there is no home folder"):
        expand_path("~/audio")


@pytest.mark.parametrize("home", ["/proc", "relative"])
def test_a_home_that_cannot_be_written(no_account, home, capsys):
    os.environ["HOME"] = home
    assert default_cache_folder() == no_account / ".cache" / "ssast"
    assert "note: no home folder that can be written" in capsys.readouterr().err


def test_a_home_that_can_be_written_is_left_alone(no_account, tmp_path, capsys):
    os.environ["HOME"] = str(tmp_path / "me")
    (tmp_path / "me").mkdir()
    assert default_cache_folder() == tmp_path / "me" / ".cache" / "ssast"
    os.environ["HOME"], os.environ["XDG_CACHE_HOME"] = "/proc", str(tmp_path / "cache")
    assert default_cache_folder() == tmp_path / "cache" / "ssast"
    assert capsys.readouterr().err == "" and not no_account.exists() and "MPLCONFIGDIR" not in os.environ


def test_a_temporary_folder_of_someone_else_is_not_used(no_account):
    no_account.symlink_to("/etc")
    with pytest.raises(UserError, match=r"no home folder.*set data.cache_dir"):
        default_cache_folder()
    settle_process()
    assert "HOME" not in os.environ


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_terminal_can_show_any_name(encoding):
    """Of a file whose name is not UTF-8, and of one whose name the terminal's encoding lacks."""
    names = [b"na\xefve.yaml", "Žluťoučký.yaml".encode()]
    for name in names:
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "ssast.engine.cli", b"bench-" + name]
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == 2 and done.stderr.startswith(b"ssast: unknown verb") and done.stderr.count(b"\n") == 1
