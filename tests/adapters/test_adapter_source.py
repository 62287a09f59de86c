"""Sources resolve under the adapter root and nowhere else; names are what the API says."""

from __future__ import annotations

import os

import pytest

from peftmux.adapters.errors import SourceForbidden, SourceNotFound
from peftmux.adapters.source import resolve_source, valid_name


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "team" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "file").write_text("")
    os.symlink(root / "team", root / "inner")
    os.symlink(tmp_path / "outside", root / "leak")
    os.symlink("loop", root / "loop")
    return root


@pytest.mark.parametrize("source", ["team/a", "team/./a", "team/../team/a", "inner/a", "team/a/"])
def test_inside(source, root):
    assert resolve_source(source, root) == root / "team" / "a"


def test_absolute_path_inside(root):
    assert resolve_source(str(root / "team/a"), root) == root / "team" / "a"


@pytest.mark.parametrize(
    "source",
    ["..", "../outside", "team/../../outside", "/etc", "/", "leak", "leak/x", "../nothing", "", "a\0b", "x" * 5000],
)
def test_outside_is_forbidden_whether_it_exists_or_not(source, root):
    with pytest.raises(SourceForbidden):
        resolve_source(source, root)


@pytest.mark.parametrize("source", ["hf://org/repo@main", "s3://bucket/key", "file:///etc", "HTTP://x"])
def test_schemes_are_not_allowed(source, root):
    with pytest.raises(SourceForbidden, match=r"scheme.*not allowed"):
        resolve_source(source, root)


@pytest.mark.parametrize("source", ["nothing", "team/b", "file", "loop"])
def test_missing(source, root):
    with pytest.raises(SourceNotFound):
        resolve_source(source, root)


def test_a_root_with_a_longer_name_is_another(root, tmp_path):
    (tmp_path / "root2").mkdir()
    with pytest.raises(SourceForbidden):
        resolve_source("../root2", root)


def test_no_root(tmp_path):
    with pytest.raises(SourceForbidden, match="--adapters"):
        resolve_source("a", None)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "team/a", "x" * 128, "x" * 128 + "/" + "y" * 128])
def test_valid_names(name):
    assert valid_name(name)


@pytest.mark.parametrize(
    "name", ["", ".a", "-a", "a/", "/a", "a/b/c", "a//b", "a b", "a,b", "a@1", "é", "a\n", "x" * 129, "a/.b", "../a"]
)
def test_invalid_names(name):
    assert not valid_name(name)
