"""Flag over environment over file over default, and how each of them fails."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from peftmux.cli import values
from peftmux.cli.settings import Settings, parse


def make() -> tuple[argparse.ArgumentParser, Settings]:
    parser = argparse.ArgumentParser(prog="t")
    settings = Settings(parser)
    settings.add("model", nargs="?", metavar="MODEL", help="m")
    settings.add("--max-rows", type=values.positive, default=256, help="n")
    settings.add("--device", choices=("auto", "cpu"), default="auto", help="d")
    settings.add("--adapter", action="append", type=values.named_path, default=[], help="a")
    settings.add("--tls", action="store_true", default=False, help="t")
    settings.add("--prefix-caching", action=argparse.BooleanOptionalAction, default=True, help="p")
    return parser, settings


def resolve(*argv: str, **environ: str) -> argparse.Namespace:
    return parse(*make(), argv, environ)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: from-file\nmax-rows: 3\ndevice: cpu\nadapter: [a=x, b=y]\ntls: true\nprefix_caching: false\n"
    )
    return path


def test_defaults():
    args = resolve()
    assert (args.model, args.max_rows, args.device) == (None, 256, "auto")
    assert (args.adapter, args.tls, args.prefix_caching) == ([], False, True)


def test_the_file_is_over_the_default(file):
    for args in (resolve("--config", str(file)), resolve(PEFTMUX_CONFIG=str(file))):
        assert (args.model, args.max_rows, args.device) == ("from-file", 3, "cpu")
        assert args.adapter == [("a", "x"), ("b", "y")]
        assert (args.tls, args.prefix_caching) == (True, False)


def test_the_environment_is_over_the_file(file):
    environ = {
        "PEFTMUX_MODEL": "m",
        "PEFTMUX_MAX_ROWS": "4",
        "PEFTMUX_ADAPTER": "c=z,d=w",
        "PEFTMUX_TLS": "false",
        "PEFTMUX_PREFIX_CACHING": "on",
    }
    args = resolve("--config", str(file), **environ)
    assert (args.model, args.max_rows, args.device) == ("m", 4, "cpu")
    assert args.adapter == [("c", "z"), ("d", "w")]
    assert (args.tls, args.prefix_caching) == (False, True)


def test_the_flag_is_over_all(file):
    environ = {"PEFTMUX_MAX_ROWS": "4", "PEFTMUX_ADAPTER": "c=z", "PEFTMUX_PREFIX_CACHING": "on"}
    argv = ["flag", "--max-rows", "5", "--device", "auto", "--adapter", "e=v", "--no-prefix-caching"]
    args = resolve("--config", str(file), *argv, **environ)
    assert (args.model, args.max_rows, args.device) == ("flag", 5, "auto")
    assert args.adapter == [("e", "v")]
    assert args.prefix_caching is False


def test_an_empty_variable_is_none():
    assert resolve(PEFTMUX_MAX_ROWS="").max_rows == 256


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PEFTMUX_MAX_ROWS": "0"}, "PEFTMUX_MAX_ROWS: expected a whole number >= 1, got '0'"),
        ({"PEFTMUX_DEVICE": "tpu"}, "PEFTMUX_DEVICE: expected one of auto, cpu, got 'tpu'"),
        ({"PEFTMUX_TLS": "maybe"}, "PEFTMUX_TLS: expected true or false, got 'maybe'"),
        ({"PEFTMUX_ADAPTER": "a=x,b"}, "PEFTMUX_ADAPTER: expected NAME=PATH, got 'b'"),
        ({"PEFTMUX_CONFIG": "/none.yaml"}, "cannot read the config file /none.yaml"),
    ],
)
def test_a_bad_environment_is_bad_usage(environ, message, capsys):
    with pytest.raises(SystemExit) as caught:
        resolve(**environ)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rows: 3", "unknown option 'rows'; expected one of adapter, config, device"),
        ("- a", "expected a mapping of option names to values, got list"),
        ("max-rows: many", "max_rows: expected a whole number >= 1, got 'many'"),
        ("a: [", "cannot read the config file"),
    ],
)
def test_a_bad_file_is_bad_usage(content, message, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        resolve("--config", str(path))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("2GiB", 2**31),
        ("2Gi", 2**31),
        ("500MB", 500_000_000),
        ("1.5k", 1500),
        ("3 TiB", 3 * 2**40),
        ("64kib", 2**16),
    ],
)
def test_sizes(text, expected):
    assert values.size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 apples", "1e9", "2Gib2", "i", "5i"])
def test_bad_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 2GiB"):
        values.size(text)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:50051", "localhost:65535", "0.0.0.0:1"])
def test_addresses(text):
    assert values.address(text) == text
    assert values.address_or_off("off") is None


@pytest.mark.parametrize("text", ["", "50051", ":50051", "host:", "host:x", "host:65536", "host:-1"])
def test_bad_addresses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected HOST:PORT"):
        values.address(text)


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf"])
def test_bad_seconds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
        values.seconds(text)
