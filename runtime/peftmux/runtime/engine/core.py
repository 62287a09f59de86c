"""The engine's core: schedule, run, update, publish. Plain calls with plain values, all in one thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from peftmux.runtime.engine.observer import EngineObserver
from peftmux.runtime.engine.placement import BASE
from peftmux.runtime.engine.request import ActiveRequest, Outcome
from peftmux.runtime.errors import DeadlineExceeded, InvalidRequest, NotFinite, QueueFull, RuntimeFailure, StepFailed
from peftmux.runtime.model.launched import Launched
from peftmux.runtime.model.runner import Runner
from peftmux.runtime.params import FinishReason
from peftmux.runtime.scheduler import NewRow, Scheduler, StepPlan, StepResult

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
"""Steps in a row that may fail before the engine gives up."""

Deliveries = list[tuple[ActiveRequest, Outcome]]


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    launched: Launched
    started: float


class EngineCore:
    """Owns the scheduler, the runner and the running requests. `release` gives back an ended request's adapter."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        observer: EngineObserver,
        release: Callable[[ActiveRequest], None],
        max_queued: int,
        ahead: bool = False,
    ) -> None:
        """ahead: launch a step before the last one's result is there, so that the device never waits for this thread.
        Requests get the same tokens; a request that ends may have one more step's work done for nothing."""
        self.scheduler = scheduler
        self._runner = runner
        self._observer = observer
        self._release = release
        self._max_queued = max_queued
        self._requests: dict[int, ActiveRequest] = {}
        self._timed: set[int] = set()
        """Requests with a deadline."""
        self._ahead = ahead
        self._behind: _Step | None = None
        """With `ahead`: launched and assumed, its result still to be taken."""
        self._taken = 0.0
        """When the last result was."""
        self._failed_steps = 0
        self._outbox: Deliveries = []

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def add(self, active: ActiveRequest) -> None:
        """Queue a request, or answer it with the error that says why not."""
        self._requests[active.id] = active
        try:
            self._check_queue()
            self.scheduler.add(self._row(active))
        except RuntimeFailure as error:
            self._end(active, error)
            return
        except Exception as error:
            self.abort(active.id, _broken(active, error))
            return
        if active.request.deadline is not None:
            self._timed.add(active.id)

    def abort(self, request_id: int, outcome: Outcome | None = None) -> None:
        """Free the row at once. Unknown ids have ended already."""
        active = self._requests.get(request_id)
        if active is not None:
            self.scheduler.abort(request_id)
            try:
                outcome = outcome or active.take(FinishReason.CANCELLED)
            except Exception as error:
                outcome = _broken(active, error)
            self._end(active, outcome)

    def abort_all(self, error: RuntimeFailure) -> None:
        for request_id in list(self._requests):
            self.abort(request_id, error)

    def warm_up(self) -> None:
        self._runner.warm_up()

    def close(self) -> None:
        """No step follows. In the thread that ran them."""
        self._runner.close()

    def step(self) -> None:
        """Run one step if there is work. Raises RuntimeError when the device fails again and again."""
        self._expire()
        if self._ahead:
            self._step_ahead()
            return
        plan = self.scheduler.plan()
        if plan is None:
            return
        started = time.monotonic()
        self._note_scheduled(plan, started)
        try:
            result = self._runner.run(plan)
        except Exception as error:
            self._fail_step(plan, error)
            return
        self._take(plan, result, started)

    def _step_ahead(self) -> None:
        """Launch a step, then take the one before it, which the device has been running meanwhile."""
        plan = self.scheduler.plan()
        before, self._behind = self._behind, None
        started = time.monotonic()
        launched: Launched | None = None
        failure: Exception | None = None
        if plan is not None:
            self._note_scheduled(plan, started)
            try:
                launched = self._runner.launch(plan, before.launched if before else None)
            except Exception as error:
                failure = error
        if before is not None:
            self._finish(before)
        if plan is None:
            return
        if launched is None:
            assert failure is not None
            self._fail_step(plan, failure)
            return
        step = _Step(plan, launched, started)
        if plan.is_foreseeable:
            self.scheduler.assume()
            self._behind = step
        else:
            self._finish(step)

    def _finish(self, step: _Step) -> None:
        """Wait for a launched step and take what it gives."""
        try:
            result = step.launched.result()
        except Exception as error:
            self.scheduler.forget()
            self._fail_step(step.plan, error)
            return
        self._take(step.plan, result, max(step.started, self._taken))

    def _take(self, plan: StepPlan, result: StepResult, started: float) -> None:
        self._failed_steps = 0
        self._taken = time.monotonic()
        if any(row.row in self._requests for row in plan.rows):  # else it may have lain there for long
            self._observer.step(self._taken - started, plan.num_tokens)
        self._update(plan, result, self._taken)

    def deliveries(self) -> Deliveries:
        """What has happened since the last call, in order."""
        out, self._outbox = self._outbox, []
        return out

    def _row(self, active: ActiveRequest) -> NewRow:
        request = active.request
        placed = active.revision.placement if active.revision else BASE
        prefix = placed.prefix(request.task)
        virtual = prefix.length if prefix else 0
        total = virtual + len(active.tokens) + active.max_tokens
        start = invocation_start(request.prompt, placed.invocation)
        slot, salt, active_from = placed.slot, placed.salt_of(request.task), 0
        if start is None:
            slot, salt = BASE.slot, BASE.salt
        elif placed.invocation:  # what stands before it depends on where it is
            salt, active_from = placed.salt + start.to_bytes(4), start
        if active.images:
            salt += active.images_digest
        return NewRow(
            id=active.id,
            slot=slot,
            prompt=active.tokens,
            max_total=total,
            sampling=request.sampling,
            output=request.output,
            salt=salt,
            prefix=prefix,
            inner_virtual=sum(token < 0 for token in active.tokens) if placed.template or active.images else 0,
            position_offset=placed.position_offset,
            min_tokens=request.stopping.min_tokens,
            end_token_ids=tuple(active.ends),
            priority=request.priority,
            fairness_key=active.adapter,
            weight=active.weight,
            arrival=active.submitted,
            active_from=active_from,
            readout=active.readout,
            images=active.images,
        )

    def _check_queue(self) -> None:
        room = self.scheduler.max_rows - self.scheduler.num_running
        if self.scheduler.num_waiting - room >= self._max_queued:
            raise QueueFull(f"{self._max_queued} requests are waiting already")

    def _expire(self) -> None:
        if self._timed:
            now = time.monotonic()
            for request_id in [i for i in self._timed if (self._requests[i].request.deadline or now) < now]:
                self.abort(request_id, DeadlineExceeded("the deadline passed before the request was finished"))

    def _note_scheduled(self, plan: StepPlan, now: float) -> None:
        for row in plan.rows:
            active = self._requests[row.row]
            if active.scheduled is None:
                active.scheduled = now
                active.cached_tokens = self.scheduler.cached_tokens(row.row)
                self._observer.scheduled(now - active.submitted)

    def _update(self, plan: StepPlan, result: StepResult, now: float) -> None:
        for planned, got in zip(plan.rows, result.rows, strict=True):
            if not got.answers(planned):
                error = NotFinite("the model's values for this request are not finite; it was ended")
                self.abort(planned.row, error)
        for row in self.scheduler.update(result):
            active = self._requests[row.row]
            try:
                finish = active.accept(row)
                if active.readout is not None and self.scheduler.is_read_out(row.row):
                    finish = FinishReason.STOP
                if row.token is not None:
                    self._note_token(active, now)
                if finish is not None:
                    self.scheduler.finish(row.row)
                    self._end(active, active.take(finish))
                elif active.request.stream and active.has_news:
                    self._outbox.append((active, active.take()))
            except Exception as error:  # the tokenizer's library, for one; the other rows go on
                self.abort(row.row, _broken(active, error))

    def _note_token(self, active: ActiveRequest, now: float) -> None:
        if active.last_token is None:
            self._observer.first_token(now - active.submitted)
        else:
            self._observer.inter_token(now - active.last_token)
        active.last_token = now

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        """Whose row it was cannot be told: all of the step's rows end, the others run on."""
        logger.error("a step of %d rows failed", len(plan.rows), exc_info=error)
        self._failed_steps += 1
        for row in plan.rows:
            self.abort(row.row, StepFailed("the step that this request was in failed on the device"))
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise RuntimeError(f"{self._failed_steps} steps in a row failed") from error

    def _end(self, active: ActiveRequest, outcome: Outcome) -> None:
        del self._requests[active.id]
        self._timed.discard(active.id)
        self._outbox.append((active, outcome))
        self._release(active)
        reason = "error"
        if not isinstance(outcome, RuntimeFailure) and outcome.finish_reason is not None:
            reason = outcome.finish_reason.value
        seconds = time.monotonic() - active.submitted
        self._observer.finished(reason, seconds, active.adapter, len(active.request.prompt), active.generated)


def _broken(active: ActiveRequest, error: Exception) -> StepFailed:
    """What one request's own work has raised is for the log."""
    logger.error("request %d of adapter %r failed", active.id, active.adapter, exc_info=error)
    return StepFailed("the server failed at this request's own work beside the step")


def invocation_start(prompt: tuple[int, ...], invocation: tuple[int, ...]) -> int | None:
    """Where an adapter becomes active: at the last occurrence of its invocation, 0 without one, None if not found.

    Source: activated LoRA (Greenewald et al., 2025, arXiv 2504.12397), as PEFT reads a prompt.
    """
    if not invocation:
        return 0
    width = len(invocation)
    starts = range(len(prompt) - width, -1, -1)
    return next((i for i in starts if prompt[i : i + width] == invocation), None)


def max_new_tokens(prompt: int, virtual: int, wanted: int | None, context_length: int, capacity: int) -> int:
    """How many tokens a request may generate. InvalidRequest where prompt or max_tokens are past the context."""
    room = context_length - virtual - prompt
    beside = f" beside {virtual} virtual tokens" if virtual else ""
    if room < 1:
        raise InvalidRequest(
            "input", f"prompt: expected at most {context_length - virtual - 1} tokens{beside}, got {prompt}"
        )
    if wanted is None:
        return max(1, min(room, capacity - virtual - prompt))
    if wanted > room:
        raise InvalidRequest(
            "stopping.max_tokens",
            f"expected at most {room} (context {context_length}, prompt {prompt}{beside}), got {wanted}",
        )
    return wanted
