"""What no file of the repository holds: one machine's paths, a package registry's host, secrets, links, huge files."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LARGEST = 8 << 20
# A home directory, or a folder that only some checkout's parent has.
MACHINE_PATHS = re.compile(r"(?<![\w.${}])/(?:home|Users|root|mnt|workspace|work)/[A-Za-z0-9._-]+")
# Which index to install from is the user's setting: no file names one.
INDEX_HOSTS = re.compile(
    r"(?:--(?:extra-)?index-url[ =]|find-links[ =]|index[_-]url\s*=\s*[\"'])\s*[\"']?(?:https?|file):"
    r"|https?://[^/\s]*(?:pypi|registry|mirror)[^/\s]*",
    re.IGNORECASE,
)
SECRETS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z0-9]{30,}|\bghp_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b")


def tracked() -> list[Path]:
    """Git's list of files and of new ones that are not ignored; without git (an unpacked archive), what is there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = listed.stdout.decode().rstrip("\0").split("\0")
        return [path for name in names if (path := REPOSITORY / name).is_file()]
    found = (path for path in REPOSITORY.rglob("*") if path.is_file())
    return [path for path in found if not {".git", ".venv"} & set(path.relative_to(REPOSITORY).parts)]


@pytest.fixture(scope="module")
def texts():
    """Relative name -> content of every text file except this one, which spells the patterns out."""
    found = {}
    for path in tracked():
        if path == Path(__file__):
            continue
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found[str(path.relative_to(REPOSITORY))] = content.decode("utf-8", errors="replace")
    assert "pyproject.toml" in found
    return found


def hits(pattern, texts):
    return [f"{name}: {match.group(0)!r}" for name, text in texts.items() for match in pattern.finditer(text)]


def test_no_paths_of_one_machine(texts):
    assert hits(MACHINE_PATHS, texts) == []


def test_no_package_index_is_named(texts):
    assert hits(INDEX_HOSTS, texts) == []


def test_no_secrets(texts):
    assert hits(SECRETS, texts) == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATHS, "open('/home/someone/model')"),
        (INDEX_HOSTS, "pip install --index-url https://index.example/simple torch"),
        (INDEX_HOSTS, "--extra-index-url=file:///packages"),
        (INDEX_HOSTS, "https://registry.example.org/simple"),
        (SECRETS, "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)
def test_patterns_find_what_they_are_for(pattern, text):
    assert pattern.search(text)


def test_files_are_small_and_plain():
    for path in tracked():
        assert path.stat().st_size <= LARGEST, path
        assert not path.is_symlink(), path


def test_scripts_with_a_shebang_are_executable():
    for path in tracked():
        with path.open("rb") as file:
            if file.read(2) == b"#!":
                assert os.access(path, os.X_OK), f"{path} has a #! line and is not executable"
