"""The comparison as a page of the documentation: docs/methods.md, with its plot beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods_cases import (
    BATCH,
    BESIDE,
    CLASSES,
    HELD_OUT,
    NEW,
    NOT_HERE,
    STEPS,
    TOLD,
    Case,
    cases,
)
from benchmarks.methods_plot import Point, plot
from benchmarks.methods_reasons import RATES, REASONS

Record = Mapping[str, Any]
Records = dict[tuple[str, str, str], dict[str, Any]]
"""By (base, case, task)."""
Low = tuple[str, str, float]
"""(base, task, accuracy)."""
NEARLY = 0.8
"""Of LoRA's accuracy. A method that stays below it has a reason in the text."""
SIZES = {"base": "2.4M parameters", "small": "0.65M parameters"}


def _steps() -> str:
    return "; ".join(f"on `{base}` {_of_tasks(steps)}" for base, steps in STEPS.items())


def _of_tasks(steps: Mapping[str, int]) -> str:
    usual = steps[TOLD]
    others = [f"{count} for `{task}`" for task, count in steps.items() if count != usual]
    return ", ".join([str(usual), *others])


INTRODUCTION = f"""\
# The training methods, compared

Written by `python -m benchmarks.methods`, which trains every method with its defaults by the public trainer, serves the
adapter with `Engine` and counts exact answers to {HELD_OUT} held-out inputs. Every run has steps of {BATCH} rows, none
seen twice ({_steps()}), a linear schedule with
10 steps of warm-up, float32, one seed: small differences say nothing, and rates were chosen on these tasks. The
learning rate and everything else are the method's defaults. No row holds an instruction.

* `{TOLD}`: the letters backwards. The base does it when it is told to ("base, told"); adapters learn to do it untold.
* `{NEW}`: backwards, and each letter's successor. The base was taught both, apart from each other, and never this.
* `{CLASSES}`: where the earliest of the letters stands, one of four classes, for methods with a classification head.

"of LoRA" is the share of LoRA's accuracy in the same column. Seconds are those of the training loop, of the processor
(one thread), so that what else ran on the machine counts little; a few percent of noise remain. Memory is the process's
peak above what it held before the run, base model included. Parameters are counted thrice, since comparisons mix them
up: *trained*; *changed*, the entries of the base's weights that differ once the adapter is merged in, where "beside"
says that it stands beside the weights and cannot be merged; and the *rank* of the change, its mean over the changed
matrices and what it could be at most. On such small bases a rank of 8 is a large share: methods that are said to train
a percent of a model train a tenth here.

`fusion` is AdapterFusion's second stage over two `pfeiffer` adapters, for the task and for `{BESIDE}`, which
`multitask-prompt` learns beside the task. "AdapterDrop" trains with random first layers left out and is served without
the first. "In the prompt": P-Tuning's tokens stand where an instruction would, after the opening of the user's turn.
"""


def write_report(records: Records, device: str, docs: Path) -> str:
    """The tables, as text; the page and its plot are written to `docs`."""
    bases = [base for base in SIZES if any(key[0] == base for key in records)]
    sections = [_section(base, records) for base in bases]
    docs.mkdir(parents=True, exist_ok=True)
    measured = f"Measured on: {device}.\n"
    picture = "![Accuracy against trained parameters](methods.svg)\n"
    page = "\n".join([INTRODUCTION, measured, picture, *sections, _reasons(records), RATES, _left_out(records)])
    (docs / "methods.md").write_text(page, encoding="utf-8")
    panels = {f"{base}, {SIZES[base]}: {TOLD}": _points(base, records) for base in bases}
    (docs / "methods.svg").write_text(plot(panels, "trained parameters", "exact answers"), encoding="utf-8")
    return "\n".join(sections)


def _section(base: str, records: Records) -> str:
    title = f"## {base}: {SIZES[base]}\n"
    generating = [case for case in cases() if case.kind == "generation"]
    columns = ["method", TOLD, "of LoRA", NEW, "of LoRA", "trained", "changed", "rank", "seconds", "peak MB"]
    rows = [_row(base, case, records) for case in generating if (base, case.name, TOLD) in records]
    parts = [title, *(_reached(base, task, records) for task in (TOLD, NEW)), "", _table(columns, rows)]
    classifiers = [case for case in cases() if case.kind == "sequence" and (base, case.name, CLASSES) in records]
    if classifiers:
        columns = ["classifier", CLASSES, "trained", "seconds", "peak MB"]
        parts += ["", _table(columns, [_classifier(base, case, records) for case in classifiers])]
    return "\n".join(parts) + "\n"


def _reached(base: str, task: str, records: Records) -> str:
    """How many of the generative methods, their variants included, are level with LoRA, or nearly."""
    found = [records.get((base, case.name, task), {}) for case in cases() if case.method and case.kind == "generation"]
    accuracies = [record["accuracy"] for record in found if "accuracy" in record]
    lora = records.get((base, "lora", task), {}).get("accuracy")
    if lora is None:
        return ""
    reached = sum(accuracy >= NEARLY * lora for accuracy in accuracies)
    return f"`{task}`: {reached} of {len(accuracies)} rows reach {NEARLY:.0%} of LoRA's accuracy."


def _row(base: str, case: Case, records: Records) -> list[str]:
    record = records[base, case.name, TOLD]
    accuracies = []
    for task in (TOLD, NEW):
        own, lora = records.get((base, case.name, task)), records.get((base, "lora", task))
        accuracies += [_percent(own), _share(own, lora) if case.method else ""]
    if not case.method:
        return [case.name, *accuracies, *[""] * 5]
    return [case.name, *accuracies, _count(record, "trained"), _changed(record), _rank(record), *_cost(record)]


def _classifier(base: str, case: Case, records: Records) -> list[str]:
    record = records[base, case.name, CLASSES]
    return [case.name, _percent(record), _count(record, "trained"), *_cost(record)]


def _percent(record: Record | None) -> str:
    if record is None:
        return ""
    return "failed" if "failed" in record else f"{100 * record['accuracy']:.1f} %"


def _share(record: Record | None, lora: Record | None) -> str:
    if record is None or lora is None or "failed" in record or not lora.get("accuracy"):
        return ""
    return f"{record['accuracy'] / lora['accuracy']:.2f}"


def _count(record: Record, name: str) -> str:
    return f"{record[name]:,}" if name in record else ""


def _changed(record: Record) -> str:
    if "failed" in record:
        return ""
    return "beside" if record["changed"] is None else f"{record['changed']:,}"


def _rank(record: Record) -> str:
    return f"{record['rank']:g} of {record['full']:g}" if record.get("rank") is not None else ""


def _cost(record: Record) -> list[str]:
    if "failed" in record:
        return ["", ""]
    return [f"{record['cpu_seconds']:.0f}", f"{record['peak_bytes'] / 1e6:.0f}"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = line(["---", *["---:"] * (len(columns) - 1)])
    return "\n".join([line(columns), rule, *map(line, rows)])


def _points(base: str, records: Records) -> list[Point]:
    return [
        Point(case.name, record["trained"], record["accuracy"])
        for case in cases()
        if "trained" in (record := records.get((base, case.name, TOLD), {}))
    ]


def low(records: Records) -> dict[str, list[Low]]:
    """Methods below NEARLY of LoRA's accuracy: (base, task, accuracy) of each."""
    found: dict[str, list[Low]] = {}
    for case in cases():
        lora = "lora" if case.kind == "generation" else "lora, classifier"
        for (base, name, task), record in records.items():
            enough = NEARLY * records.get((base, lora, task), {}).get("accuracy", 0.0)
            if name == case.name and case.method and record.get("accuracy", 1.0) < enough:
                found.setdefault(name, []).append((base, task, record["accuracy"]))
    return found


def _reasons(records: Records) -> str:
    found = low(records)
    if not found:
        return f"No method stays below {NEARLY:.0%} of LoRA's accuracy.\n"
    lines = [f"## Below {NEARLY:.0%} of LoRA's accuracy, and why\n", *_spelled(found)]
    return "\n".join(lines) + "\n"


def _spelled(found: Mapping[str, Sequence[Low]]) -> Iterator[str]:
    left = {(name, place) for name, places in found.items() for place in places}
    for names, tasks, reason in REASONS:
        told = {(name, place) for name, place in left if name in names and place[1] in tasks}
        if told:
            where = {name: [place for place in found[name] if (name, place) in told] for name in names if name in found}
            yield f"* {'; '.join(f'`{name}` {_places(places)}' for name, places in where.items() if places)}. {reason}."
        left -= told
    for name, place in sorted(left):
        yield f"* `{name}` {_places([place])}: no reason is known."


def _places(places: Sequence[Low]) -> str:
    return ", ".join(f"{100 * accuracy:.0f} % ({base}, {task})" for base, task, accuracy in places)


def _left_out(records: Records) -> str:
    missing = {case.name: f"needs {case.needs}" for case in cases() if not case.installed}
    lines = [f"* `{name}`: {why}." for name, why in {**NOT_HERE, **missing}.items()]
    shown = {case.name for case in cases()}
    for (base, name, task), record in records.items():
        if "failed" in record and name in shown:
            lines.append(f"* `{name}` ({base}, {task}) failed: {record['failed']}.")
    return "\n".join(["## Not measured\n", *lines]) + "\n"
