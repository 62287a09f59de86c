"""What a row answers depends on nothing but the row: hypothesis looks for the batch that proves otherwise."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from peftmux.runtime.errors import AdapterMemoryExhausted, InvalidRequest
from peftmux.runtime.params import OutputOptions, Readout
from peftmux.runtime.scheduler import PrefixBlocks

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=30)
"""Three tokens only, so that prompts share beginnings."""
ADAPTERS = st.sampled_from([(0, b""), (1, b"one"), (2, b"two"), (3, b"")])
"""(slot, salt); slot 3 changes no keys or values and shares the base model's cache."""

ROWS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "new_tokens": st.integers(1, 12),
        "adapter": ADAPTERS,
        "virtual": st.integers(0, 9),
        "priority": st.integers(-1, 1),
        "key": st.sampled_from("abc"),
        "reports": st.booleans(),
        "readout": st.sampled_from([None, None, *Readout]),
        "wait": st.integers(0, 4),
    }
)
POOLS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(16, 40),
        "max_batch_tokens": st.integers(1, 40),
        "max_rows": st.integers(1, 8),
        "prefix_caching": st.booleans(),
    }
)


def add(serving: Any, id: int, row: dict[str, Any], prefix: PrefixBlocks | None = None) -> None:
    slot, salt = row["adapter"]
    serving.add(
        id,
        row["prompt"],
        1 if row["readout"] else row["new_tokens"],
        slot=slot,
        salt=salt,
        prefix=prefix,
        virtual_tokens=row["virtual"] if salt and not prefix else 0,
        output=OutputOptions(prompt_logprobs=0 if row["reports"] and not row["readout"] else None),
        readout=row["readout"],
        priority=row["priority"],
        fairness_key=row["key"],
    )


def check_answers(serving: Any) -> None:
    for id, out in serving.outputs.items():
        assert out == serving.expected(id, len(out)), f"row {id}"
        new = serving.rows[id]
        if new.output.prompt_logprobs is not None and id in serving.finished and out:
            assert serving.reported[id] == list(new.prompt[1:]), f"row {id}"
        if new.readout is not None and id in serving.finished and id not in serving.aborted:
            assert serving.states[id] == serving.expected_states(id), f"row {id}"


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=9), pool=POOLS, order=st.randoms(use_true_random=False))
def test_outputs_do_not_depend_on_batch_budget_cache_preemption_or_order(serving, rows, pool, order):
    order.shuffle(rows)
    batch = serving(block_size=4, **pool)
    for id, row in enumerate(rows):
        add(batch, id, row)
        for _ in range(row["wait"]):
            batch.step()
    batch.run()
    wanted = [0 if row["readout"] else row["new_tokens"] for row in rows]
    assert [len(batch.outputs[id]) for id in range(len(rows))] == wanted
    assert batch.finished == set(range(len(rows)))
    check_answers(batch)
    assert batch.scheduler.usage() == 0


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=9), pool=POOLS, endings=st.sampled_from([0, 0, 12]))
def test_outputs_do_not_depend_on_running_ahead(running_ahead, rows, pool, endings):
    batch = running_ahead(block_size=4, endings=endings, **pool)
    for id, row in enumerate(rows):
        add(batch, id, row)
        for _ in range(row["wait"]):
            batch.step()
    batch.run()
    assert batch.finished == set(range(len(rows)))
    check_answers(batch)
    for id, row in enumerate(rows):
        out = batch.outputs[id]
        ended = bool(out) and out[-1] < endings
        assert ended or len(out) == (0 if row["readout"] else row["new_tokens"])
        assert all(token >= endings for token in out[:-1])
    assert endings or not batch.wasted, "a row's last step is known beforehand"
    assert batch.scheduler.usage() == 0


def test_a_row_that_ends_by_surprise_wastes_one_step_and_no_block(running_ahead):
    batch = running_ahead(num_blocks=9, block_size=4, endings=97)
    batch.add(1, [1, 2, 0], 9)
    batch.add(2, [2, 2, 0], 9)
    batch.run()
    assert [len(out) for out in batch.outputs.values()] == [1, 1]
    assert batch.wasted == 2
    assert batch.scheduler.usage() == 0


def test_a_token_that_is_awaited_is_named_in_the_plan(running_ahead):
    batch = running_ahead()
    batch.add(1, [5, 6], 3)
    plans = [batch.step() for _ in range(4)]
    assert [plan.rows[0].awaits for plan in plans[:3]] == [False, True, True]
    assert [plan.rows[0].generated for plan in plans[:3]] == [0, 1, 2]
    assert batch.outputs[1] == batch.expected(1, 3)


class ServerMachine(RuleBasedStateMachine):
    """Requests come and go, prefixes too; every block is accounted for after every step."""

    def __init__(self, serving: Any, prefix_caching: bool, answered: list[int]) -> None:
        super().__init__()
        self.serving = serving(num_blocks=24, block_size=4, max_batch_tokens=9, prefix_caching=prefix_caching)
        self.prefixes: list[tuple[PrefixBlocks, bytes]] = []
        self.loads = 0
        self.answered = answered
        """Rows that ended with an answer, of all machines that share the list."""

    @rule(row=ROWS)
    def add(self, row):
        self._add(row, None)

    @precondition(lambda self: self.prefixes)
    @rule(row=ROWS, data=st.data())
    def add_with_prefix(self, row, data):
        prefix, salt = data.draw(st.sampled_from(self.prefixes))
        self._add({**row, "adapter": (4, salt)}, prefix)

    def _add(self, row, prefix):
        try:
            add(self.serving, len(self.serving.rows), row, prefix)
        except InvalidRequest:
            assert self.prefixes  # only prefixes make this pool too small for a row

    @rule(length=st.integers(1, 11))
    def load_prefix(self, length):
        salt = f"prefix {self.loads}".encode()
        self.loads += 1
        try:
            self.prefixes.append((self.serving.load_prefix(length, salt), salt))
        except AdapterMemoryExhausted:
            assert self.prefixes or self.serving.scheduler.num_running + self.serving.scheduler.num_waiting

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data())
    def unload_prefix(self, data):
        chosen = data.draw(st.sampled_from(self.prefixes))
        self.prefixes.remove(chosen)
        self.serving.scheduler.free_prefix(chosen[0])

    @rule(data=st.data())
    def abort(self, data):
        live = [id for id in self.serving.rows if id not in self.serving.finished]
        if live:
            self.serving.abort(data.draw(st.sampled_from(live)))

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.serving.step()

    @rule(unlucky=st.integers(0, 2))
    def step_that_fails_for_some(self, unlucky):
        self.serving.step(lambda row: row % 3 == unlucky)

    @rule()
    def step_that_never_comes_back(self):
        self.serving.scheduler.plan()

    @invariant()
    def answers_are_right(self):
        self.serving.scheduler.check()
        check_answers(self.serving)

    def teardown(self):
        self.serving.run()
        check_answers(self.serving)
        self.answered += self.serving.finished - self.serving.aborted
        for prefix, _ in self.prefixes:
            self.serving.scheduler.free_prefix(prefix)
        self.serving.scheduler.check()
        assert self.serving.scheduler.usage() == 0
        assert not self.serving.scheduler.num_running
        assert not self.serving.scheduler.num_waiting


def run_machines(serving: Any, prefix_caching: bool, examples: int) -> int:
    """`ServerMachine` proves itself after each of its steps. -> rows that were answered, over all examples."""
    answered: list[int] = []
    run = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: ServerMachine(serving, prefix_caching, answered), settings=run)  # type: ignore[arg-type]
    return len(answered)


def test_a_server_stays_consistent_with_caching(serving):
    assert run_machines(serving, True, 80) > 0


def test_a_server_stays_consistent_without_caching(serving):
    assert run_machines(serving, False, 40) > 0


def test_a_server_that_runs_ahead_stays_consistent(running_ahead):
    assert run_machines(running_ahead, True, 80) > 0
