import json

import pytest

from ssast.engine.errors import UserError
from ssast.engine.files import atomic_write, encode_text, expand_path, write_whole


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "weights.bin"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as aside:
        aside.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path, suffix=".tmp.pt2") as aside:
        assert aside.name.endswith(".tmp.pt2") and aside.parent == tmp_path
        aside.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    for failing in (True, False):
        try:
            with atomic_write(tmp_path / "model") as aside:
                aside.mkdir()
                (aside / "config.json").write_text("{}")
                if failing:
                    raise OSError("disk full")
        except OSError:
            assert list(tmp_path.iterdir()) == []
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]


def test_text_keeps_the_bytes_of_file_names(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_whole(tmp_path / "names.csv", name)
    assert (tmp_path / "names.csv").read_bytes() == b"caf\xe9"
    assert encode_text(json.loads('"\\ud800"')) == b"?"


def test_paths_as_a_shell_would_expand_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("A", "/a$B")
    for text, expanded in (
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("~/$HOME/x", "/home/me//home/me/x"),
        ("$A/${HOME}", "/a$B//home/me"),
        ("x~/y", "x~/y"),
        ("costs 5$", "costs 5$"),
        ("plain", "plain"),
    ):
        assert expand_path(text) == expanded
    with pytest.raises(UserError, match="variable NOT_SET is not set"):
        expand_path("~/$NOT_SET")
    with pytest.raises(UserError, match="there is no user nobody-of-that-name"):
        expand_path("~nobody-of-that-name/x")
    for name in ("~", "$NOT_SET"):
        (tmp_path / name).write_text("")
        assert expand_path(name) == name
