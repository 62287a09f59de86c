"""The command as a whole: its sub-commands, its flags (frozen), its exit statuses, and never a traceback."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from peftmux.cli import adapters, classify, embed, generate, main, serve
from peftmux.cli.errors import CommandError

CONNECTION = {
    "--server",
    "--token",
    "--tls",
    "--tls-ca-cert-path",
    "--tls-cert-path",
    "--tls-key-path",
    "--timeout",
    "--config",
}
ASKS = CONNECTION | {"--adapter", "--adapter-task", "--json"}
SERVE = {
    "--config",
    "--watch-adapters",
    "--watch-seconds",
    "--adapters",
    "--adapter",
    "--lora-modules",
    "--adapter-memory",
    "--max-loras",
    "--max-lora-rank",
    "--max-cpu-loras",
    "--grpc",
    "--metrics",
    "--grace-seconds",
    "--tls-cert-path",
    "--tls-key-path",
    "--tls-client-ca-cert-path",
    "--auth-tokens",
    "--log-level",
    "--device",
    "--dtype",
    "--quantization",
    "--max-batch-tokens",
    "--max-rows",
    "--max-queued-requests",
    "--kv-cache-memory",
    "--block-size",
    "--prefix-caching",
    "--no-prefix-caching",
    "--context-length",
    "--num-threads",
}
GENERATE = CONNECTION | {
    "--adapter",
    "--adapters",
    "--adapter-task",
    "--chat",
    "--system",
    "--stop",
    "--ignore-eos",
    "--json",
    "--temperature",
    "--top-p",
    "--top-k",
    "--min-p",
    "--seed",
    "--repetition-penalty",
    "--presence-penalty",
    "--frequency-penalty",
    "--max-tokens",
    "--min-tokens",
    "--logprobs",
    "--priority",
}


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return set(parser._option_string_actions) - {"-h", "--help"}


def test_commands_are_frozen():
    assert list(main.COMMANDS) == [
        "serve",
        "generate",
        "classify",
        "embed",
        "adapters",
        "train",
        "bench",
        "demo",
        "doctor",
    ]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_its_module(name):
    assert find_spec(main.COMMANDS[name][0]) is not None
    assert callable(import_module(main.COMMANDS[name][0]).main)


def test_flags_of_serve_are_frozen():
    assert flags(serve.build_parser()[0]) == SERVE


def test_flags_of_generate_are_frozen():
    assert flags(generate.build_parser()[0]) == GENERATE


def test_the_servers_adapter_folder_is_no_weighted_sum(monkeypatch):
    monkeypatch.setenv("PEFTMUX_ADAPTERS", "/srv/adapters")
    parser, settings = generate.build_parser()
    args = settings.resolve(parser.parse_args(["x", "--adapters", "a=0.5,b@0123=-1"]), os.environ)
    assert generate._options(args)["adapters"] == [("a", 0.5), ("b@0123", -1.0)]
    assert "adapters" not in generate._options(settings.resolve(parser.parse_args(["x"]), os.environ))


@pytest.mark.parametrize("command", [generate, classify, embed])
def test_what_the_server_loads_at_start_is_no_name_to_ask_for(command, monkeypatch):
    monkeypatch.setenv("PEFTMUX_ADAPTER", "mine=/srv/mine")
    monkeypatch.setenv("PEFTMUX_ADAPTER_NAME", "mine@0123")
    parser, settings = command.build_parser()
    assert settings.resolve(parser.parse_args(["x"]), os.environ).adapter_name == "mine@0123"
    monkeypatch.delenv("PEFTMUX_ADAPTER_NAME")
    assert settings.resolve(parser.parse_args(["x"]), os.environ).adapter_name is None


def test_flags_of_classify_and_embed_are_frozen():
    assert flags(classify.build_parser()[0]) == CONNECTION | {"--adapter", "--adapter-task", "--json"}
    assert flags(embed.build_parser()[0]) == CONNECTION | {
        "--adapter",
        "--adapter-task",
        "--pooling",
        "--normalize",
        "--json",
    }


def test_classify_needs_an_adapter(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["classify", "x"])
    assert caught.value.code == 2
    assert "expected --adapter NAME" in capsys.readouterr().err


def test_flags_of_adapters_are_frozen():
    parser, settings = adapters.build_parser()
    actions = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert isinstance(actions, dict)
    assert list(actions) == list(settings) == ["load", "unload", "list", "get", "convert", "inspect", "merge"]
    assert {name: flags(action) - CONNECTION - {"--json"} for name, action in actions.items()} == {
        "load": {"--revision", "--pinned", "--replace", "--wait", "--no-wait"},
        "unload": {"--wait", "--no-wait"},
        "list": set(),
        "get": set(),
        "convert": {"--out"},
        "inspect": {"--model"},
        "merge": {"--model", "--out", "--dtype"},
    }


def test_the_overview_names_every_command(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in main.COMMANDS)
    assert main.main([]) == 2
    assert "usage: peftmux COMMAND" in capsys.readouterr().err


def test_the_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("peftmux 0.")


def test_an_unknown_command_is_bad_usage(capsys):
    assert main.main(["serv"]) == 2
    assert "got 'serv'; did you mean 'serve'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate", "classify", "embed", "adapters", "doctor"])
def test_help_is_complete(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: peftmux {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve"], "expected MODEL"),
        (["serve", "m", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["serve", "m", "--grpc", "50051"], "expected HOST:PORT with a port of 0 to 65535, got '50051'"),
        (["serve", "m", "--kv-cache-memory", "lots"], "expected a size such as 2GiB, 500MB or 1073741824, got 'lots'"),
        (["serve", "m", "--adapter", "x"], "expected NAME=PATH, got 'x'"),
        (["serve", "m", "--adapters", "/none"], "expected a folder, got '/none'"),
        (["serve", "m", "--tls-cert-path", __file__], "--tls-cert-path and --tls-key-path together"),
        (["serve", "m", "--tls-client-ca-cert-path", __file__], "with --tls-client-ca-cert-path"),
        (["serve", "m", "--auth-tokens", "/none"], "expected a file, got '/none'"),
        (["serve", "m", "--grace-seconds", "-1"], "expected a number of seconds >= 0, got '-1'"),
        (["generate", "x", "--tls-key-path", __file__], "together, got only --tls-key-path"),
        (["adapters", "list", "--tls-cert-path", __file__], "together, got only --tls-cert-path"),
        (["generate", "x", "--adapters", "a=1,b"], "expected NAME=WEIGHT,NAME=WEIGHT,..., got 'a=1,b'"),
        (["generate", "x", "--adapters", "=1"], "expected NAME=WEIGHT,NAME=WEIGHT,..., got '=1'"),
        (["generate", "x", "--max-tokens", "0"], "expected a whole number >= 1, got '0'"),
        (["adapters"], "ACTION"),
        (["adapters", "load", "x"], "SOURCE"),
        (["adapters", "inspect", "x"], "expected --model MODEL, got none"),
        (["adapters", "merge", "x", "--model", "m"], "expected --out DIR, got none"),
    ],
)
def test_bad_usage_is_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def raising(error: BaseException):
    def run(argv: list[str]) -> int:
        raise error

    return SimpleNamespace(main=run)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CommandError("no luck"), 1, "peftmux doctor: no luck\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero (PEFTMUX_DEBUG=1 shows where)"),
        (ModuleNotFoundError("no", name="absent"), 1, "peftmux doctor: internal error"),
    ],
)
def test_a_command_that_fails_ends_in_a_line(error, status, message, monkeypatch, capsys):
    monkeypatch.setattr(main, "import_module", lambda name: raising(error))
    monkeypatch.delenv("PEFTMUX_DEBUG", raising=False)
    assert main.main(["doctor"]) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_debugging_shows_where(monkeypatch):
    monkeypatch.setattr(main, "import_module", lambda name: raising(ZeroDivisionError("x")))
    monkeypatch.setenv("PEFTMUX_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.main(["doctor"])


def test_a_missing_package_is_named(monkeypatch, capsys):
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr(main, "import_module", absent)
    assert main.main(["train"]) == 1
    assert "'accelerate', which is not installed (pip install 'peftmux[train]')" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "classify", "embed", "adapters"])
def test_asking_a_server_brings_no_torch(command):
    code = (
        "import sys; from peftmux.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, check=False)
    assert done.returncode == 0


def test_doctor_reports(capsys):
    assert main.main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    for what in ("python", "torch", "transformers", "grpcio", "cpu"):
        assert lines[what]
    assert "native" in lines
    assert any(line.startswith("cuda") for line in lines)
