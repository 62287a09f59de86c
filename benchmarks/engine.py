"""The engine over an 8B-shaped random Llama: steps without adapters and with 1, 8 and 64 of several ranks and kinds.

    python -m benchmarks.engine --out FOLDER [--budget SECONDS] [--dry]

from the repository's root with its source roots on PYTHONPATH (`make gpu` does both). Writes engine.json and engine.md.
What is measured is a whole step of the engine's core: schedule, run, sample, update. The floor is the bytes that the
step has to read (weights, keys and values, each distinct adapter once) at the rate at which a copy runs here.
Scenarios come in order of importance, and those that the budget does not reach are left out and named.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.engine_adapters import KINDS
from benchmarks.engine_model import LLAMA_8B, TINY, Floor, Shape, bandwidth, random_llama
from benchmarks.engine_opponents import ContinuousBatching, room_for, with_peft
from benchmarks.engine_session import Adapter, Session
from benchmarks.options import DTYPES, lacks_device, option_parser
from peftmux.runtime.model.load import fit_model

_GENERATED = 64
_OPPONENT_ROWS = 64
_PREFILLED = 8
"""The most rows that one prefill step is shared out over."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    shape: Shape
    rows: tuple[int, ...]
    """Of decode steps; the first is where adapters are compared."""
    adapters: tuple[int, ...]
    """How many, the most important first."""
    steps: int


FULL = Scale(LLAMA_8B, (64, 1, 32, 128), (64, 8, 1), 40)
DRY = Scale(TINY, (4, 1), (4, 1), 3)

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    run: Callable[[], Result]


def decode(session: Session, floor: Floor, base: dict[int, float], rows: int, kinds: tuple[str, ...], n: int) -> Result:
    """Rows of `n` adapters of these kinds in turn; 0 is the base alone, whose time the others are compared with."""
    adapters = session.adapters(kinds, n)
    placed = [adapters[i % n] if n else None for i in range(rows)]
    measured = session.decode(placed)
    held = adapter_bytes(adapters[:rows])
    seconds, least = measured.step_seconds, floor.decode_seconds(measured.contexts, held)
    result: Result = {
        "replayed": measured.replayed,
        "ms_step": 1e3 * seconds,
        "tokens_s": rows / seconds,
        "floor_ms": 1e3 * least,
        "times_floor": seconds / least,
    }
    if not n:
        base[rows] = seconds
    elif rows in base:
        result |= {
            "over_base": seconds / base[rows] - 1,
            "added_ms": 1e3 * (seconds - base[rows]),
            "added_floor_ms": 1e3 * held / floor.bytes_per_second,
        }
    return result


def adapter_bytes(adapters: Sequence[Adapter]) -> int:
    """What a step reads of them; a prefix is read as keys and values, which are counted as such."""
    return sum(adapter.bytes for adapter in adapters if not adapter.placement.prefixes)


def prefill(session: Session, shape: Shape, kinds: tuple[str, ...], n: int) -> Result:
    adapters: Sequence[Adapter | None] = session.adapters(kinds, n) if n else [None]
    seconds = session.prefill(adapters)
    return {"ms_step": 1e3 * seconds, "tokens_s": shape.prefill / seconds}


def generate(session: Session, rows: int, new_tokens: int) -> Result:
    return {"tokens_s": session.generate(rows, new_tokens)}


def opponent(session: Session, scale: Scale, dtype: torch.dtype, seconds: float, rank: int | None) -> Result:
    """transformers' continuous batching on the workload of "generate"; with one of PEFT's LoRAs of this rank."""
    shape, device = scale.shape, session.model.device
    module = random_llama(shape, device, dtype).eval()
    try:
        if not room_for(module):
            return {"note": "no room on the device beside the engine"}
        if rank is not None and with_peft(module, rank) is None:
            return {"note": "peft is not installed"}
        new_tokens = _GENERATED if scale is FULL else scale.steps
        rows = min(_OPPONENT_ROWS, max(scale.rows))
        engine = ContinuousBatching(module, rows, shape.prompt + new_tokens, shape.prefill)
        try:
            engine.generate([session.prompt(shape.prompt)], 2, seconds)  # start-up is not counted
            prompts = [session.prompt(shape.prompt) for _ in range(rows)]
            return {"tokens_s": engine.generate(prompts, new_tokens, seconds)}
        finally:
            engine.close()
    except (RuntimeError, ValueError, TypeError, AttributeError, TimeoutError) as error:
        return {"note": f"{type(error).__name__}: {error}"}


def scenarios(session: Session, floor: Floor, scale: Scale, dtype: torch.dtype, seconds: float) -> Iterator[Scenario]:
    """The most important first."""
    first, *others = scale.rows
    most = max(scale.adapters)
    base: dict[int, float] = {}

    def decoded(rows: int, kinds: tuple[str, ...], n: int) -> Scenario:
        named = f"{n} x {' + '.join(kinds)}" if n else "base"
        return Scenario(f"decode {rows} rows, {named}", partial(decode, session, floor, base, rows, kinds, n))

    yield decoded(first, (), 0)
    for n in scale.adapters:
        yield decoded(first, ("lora",), n)
    for rows in others:
        yield decoded(rows, (), 0)
    yield decoded(first, ("dora",), most)
    yield decoded(first, tuple(KINDS), most)
    for n in (0, *(n for n in scale.adapters if n <= _PREFILLED)):
        name = f"prefill {scale.shape.prefill} tokens, {f'{n} x lora' if n else 'base'}"
        yield Scenario(name, partial(prefill, session, scale.shape, ("lora",), n))
    rows, new_tokens = min(_OPPONENT_ROWS, max(scale.rows)), _GENERATED if scale is FULL else scale.steps
    name = f"generate {rows} x {new_tokens} tokens"
    yield Scenario(f"{name}, base", partial(generate, session, rows, new_tokens))
    yield Scenario(f"{name}, transformers' batching", partial(opponent, session, scale, dtype, seconds, None))
    yield Scenario(f"{name}, transformers + 1 LoRA of PEFT", partial(opponent, session, scale, dtype, seconds, 16))
    for rows in others:
        for n in scale.adapters:
            yield decoded(rows, ("lora",), n)


def attempt(scenario: Scenario, session: Session) -> Result:
    """A scenario that fails leaves the others theirs."""
    try:
        return scenario.run()
    except Exception as error:
        traceback.print_exc()
        session.abandon()
        return {"note": f"failed: {type(error).__name__}: {error}", "failed": True}


def table(machine: Result, results: dict[str, Result]) -> str:
    """Markdown."""
    columns = {
        "ms_step": "ms a step",
        "tokens_s": "tokens/s",
        "floor_ms": "floor, ms",
        "times_floor": "x floor",
        "over_base": "over base",
        "added_ms": "added, ms",
        "added_floor_ms": "its floor, ms",
        "replayed": "graph",
    }
    lines = [
        f"Engine: {machine['parameters'] / 1e9:.2f}B parameters in {machine['dtype']} on {machine['device']}, "
        f"{machine['bytes_per_second'] / 1e12:.2f} TB/s",
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, result in results.items():
        cells = [_cell(key, result.get(key)) for key in columns]
        if "note" in result:
            cells[0] = result["note"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "replayed":
        return "yes" if value else "no"
    if key == "over_base":
        return f"{value:+.1%}"
    return f"{value:.0f}" if key == "tokens_s" else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = option_parser("engine", "The engine's steps against their floor.", budget=300)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if lacks_device(options.dry):
        return 3
    device = torch.device("cpu" if options.dry else "cuda")
    scale = DRY if options.dry else FULL
    dtype = DTYPES[options.dtype]
    model = fit_model(random_llama(scale.shape, device, dtype), None, "random", scale.shape.context)
    rate = bandwidth(device, scale.shape.copied)
    machine: Result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (dry)",
        "dtype": options.dtype,
        "parameters": model.parameters,
        "bytes_per_second": rate,
        "shape": asdict(scale.shape),
    }
    session = Session(model, scale.shape, max(scale.rows), scale.steps)
    machine["seconds_to_load"] = time.monotonic() - started
    session.warm_up()
    machine["seconds_to_warm_up"] = time.monotonic() - started - machine["seconds_to_load"]
    results: dict[str, Result] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for scenario in scenarios(session, Floor.of(model, rate), scale, dtype, options.budget / 4):
        if time.monotonic() - started < options.budget:
            results[scenario.name] = attempt(scenario, session)
        else:
            results[scenario.name] = {"note": "cut by the budget"}
        print(f"{scenario.name}: {json.dumps(results[scenario.name])}", flush=True)
        # Written each time: whoever stops this keeps what there is.
        graphs = {"captures": session.graphs.captures, "in_use": session.graphs.in_use} if session.graphs else None
        written = {**machine, "graphs": graphs, "results": results}
        (options.out / "engine.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        (options.out / "engine.md").write_text(table(machine, results), encoding="utf-8")
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
