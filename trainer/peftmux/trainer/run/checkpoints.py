"""The checkpoints of a run: which one it goes on from, and whether that one can be gone on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import TrainingArguments

from peftmux.adapters.aside import folder_held
from peftmux.adapters.files import CHECKPOINT_FILE
from peftmux.trainer.errors import OptionError
from peftmux.trainer.methods import AttachedAdapter
from peftmux.trainer.run.base_identity import VERSION
from peftmux.trainer.settings.argument_checks import plain
from peftmux.trainer.settings.options import RunOptions

CHECKPOINT_RUN = "run.json"
CHECKPOINT_LOSS = "loss_so_far"
"""In the file of the run; nothing that runs have to share."""
CHECKPOINT_LAST = "trainer_state.json"
"""transformers writes it last: a checkpoint without it, or with half of it, was cut off."""
_LOOP = ("optimizer.pt", "scheduler.pt")
"""What --save-only-model leaves out, beside the states of the random numbers."""


@contextmanager
def checkpoints_held(args: TrainingArguments) -> Iterator[None]:
    """Within it no other run writes checkpoints beside this one's. Raises OptionError where one does already."""
    with ExitStack() as stack:
        if plain(args.save_strategy) != "no" and args.should_save:  # of several processes one writes
            folder = Path(args.output_dir or ".")
            try:
                stack.enter_context(folder_held(folder))
            except BlockingIOError:
                raise OptionError("output-dir", f"another run is writing checkpoints to {folder}") from None
        yield


def resume_point(options: RunOptions, args: TrainingArguments) -> Path | None:
    """The checkpoint that the run is to go on from: that of --resume-from-checkpoint, or the newest for --resume.

    Raises OptionError where there is none, or where it holds too little to go on as if the run had not ended.
    """
    if args.resume_from_checkpoint:
        option, folder = "resume-from-checkpoint", Path(args.resume_from_checkpoint)
        if options.resume:
            raise OptionError("resume", "takes the newest checkpoint: not with --resume-from-checkpoint")
        if not folder.is_dir():
            message = f"expected a checkpoint's folder, found nothing at {folder} (--resume takes this --out's newest)"
            raise OptionError(option, message)
    elif options.resume:
        parent = Path(args.output_dir or ".")
        newest = newest_checkpoint(parent)
        if newest is None:
            message = f"found no complete checkpoint in {parent}; --save-strategy steps writes them"
            raise OptionError("resume", message)
        option, folder = "resume", newest
    else:
        return None
    sharded = bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None))  # these have files of their own
    wanted = [CHECKPOINT_FILE, CHECKPOINT_RUN, CHECKPOINT_LAST, *(() if sharded else _LOOP)]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if not list(folder.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if missing:
        why = " (one of --save-only-model cannot be gone on from)" if _LOOP[0] in missing and len(missing) < 4 else ""
        raise OptionError(option, f"{folder} lacks {', '.join(missing)}{why}")
    return folder


def check_same_run(checkpoint: Path, run: Mapping[str, object]) -> None:
    """`run`: what the run that goes on must share with the one that wrote the checkpoint. Raises OptionError."""
    try:
        stored = json.loads((checkpoint / CHECKPOINT_RUN).read_text())
    except ValueError:
        raise OptionError("resume", f"{checkpoint / CHECKPOINT_RUN} is broken") from None
    for name, value in json.loads(json.dumps(run)).items():
        if _is_older(name, stored):
            message = (
                f"the checkpoint is of an older version, which did not note its {name} so: train again from the start"
            )
            raise OptionError("resume", message)
        if name == "model" and stored.get(name) != value:
            raise OptionError("resume", f"{checkpoint} was written with another base: its files differ")
        if stored.get(name) != value:
            raise OptionError("resume", f"the checkpoint was written with {name} {stored.get(name)!r}, got {value!r}")


def _is_older(name: str, stored: Mapping[str, object]) -> bool:
    """Whether a version wrote it that did not note this, or otherwise."""
    if name == "model" and isinstance(identity := stored.get(name), str):
        return not identity.startswith(f"{VERSION}:")
    return name not in stored and name in ("model", "learning_rate")


def check_length(checkpoint: Path, args: TrainingArguments, steps: int, adapter: AttachedAdapter) -> None:
    """steps: what the run that goes on has in all. Another number than before is exact only where no rate depends on
    it. Raises OptionError."""
    state = json.loads((checkpoint / CHECKPOINT_LAST).read_text())
    before, done = state["max_steps"], state["global_step"]
    schedule = plain(args.lr_scheduler_type)
    constant = schedule in ("constant", "constant_with_warmup") and not 0 < args.warmup_steps < 1
    if steps < done:
        raise OptionError("max-steps", f"expected {done} or more, which the checkpoint has done; got {steps}")
    if steps != before and (adapter.has_phases or not constant):
        why = f"{adapter.kind}'s steps depend" if constant else f"the schedule {schedule} depends"
        message = f"{why} on the run's length: expected {before} steps as in the checkpoint, got {steps}"
        raise OptionError("max-steps", message)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written, to its end. One of more steps may be an older run's."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKPOINT_LAST}") if _is_json(path)]
    numbered = [path for path in complete if path.name.rpartition("-")[2].isdecimal()]
    return max(numbered, key=_written, default=None)


def _written(checkpoint: Path) -> tuple[int, int]:
    """In ns, and its steps, which tell where a file system's clock does not."""
    return (checkpoint / CHECKPOINT_LAST).stat().st_mtime_ns, int(checkpoint.name.rpartition("-")[2])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
