"""What a plan holds, rule by rule. The properties that hold for every mix are in test_scheduler_properties.py."""

from __future__ import annotations

from collections import Counter

import pytest

from peftmux.runtime.errors import AdapterMemoryExhausted, InvalidRequest
from peftmux.runtime.params import OutputOptions, Readout, SamplingParams
from peftmux.runtime.scheduler import NewRow, RowResult, Scheduler, StepResult
from peftmux.runtime.scheduler.plan import ImageSpan
from peftmux.runtime.scheduler.row import Row

REPORT = OutputOptions(prompt_logprobs=0)


def shape(plan):
    return [(row.row, row.start, len(row.tokens), row.samples) for row in plan.rows]


def test_a_long_prompt_is_prefilled_in_chunks_and_then_decodes(serving):
    batch = serving(max_batch_tokens=4)
    batch.add(0, range(10), new_tokens=2)
    assert [shape(batch.step())[0] for _ in range(4)] == [
        (0, 0, 4, False),
        (0, 4, 4, False),
        (0, 8, 2, True),
        (0, 10, 1, True),
    ]
    assert batch.step() is None


def test_decodes_come_before_prefill_and_share_the_budget(serving):
    batch = serving(max_batch_tokens=6)
    batch.add(0, range(3))
    batch.step()
    batch.add(1, range(20, 40))
    assert shape(batch.step()) == [(0, 3, 1, True), (1, 0, 5, False)]


def test_rows_of_one_token_come_first_and_slots_are_adjacent(serving):
    batch = serving()
    prompts = [(5, 6), (7,), (5, 6), (7,), (8, 9), (7,)]
    for id, (prompt, slot) in enumerate(zip(prompts, (2, 1, 1, 0, 2, 1), strict=True)):
        batch.add(id, prompt, slot=slot)
    plan = batch.step()
    assert [row.row for row in plan.rows] == [3, 1, 5, 2, 0, 4]
    assert [len(row.tokens) for row in plan.rows] == [1, 1, 1, 2, 2, 2]
    assert plan.num_tokens == 9


def test_the_blocks_tuple_is_reused_until_it_grows(serving):
    batch = serving(block_size=4)
    batch.add(0, range(4), new_tokens=8)
    batch.step()
    tables = [batch.step().rows[0].blocks for _ in range(5)]
    assert tables[0] is tables[3]
    assert len(tables[4]) == len(tables[3]) + 1


def test_a_cache_hit_never_covers_the_whole_prompt(serving):
    batch = serving(block_size=4)
    batch.add(0, range(8))
    batch.run()
    batch.add(1, range(8))
    plan = batch.step()
    assert shape(plan) == [(1, 4, 4, True)]
    assert batch.scheduler.cached_tokens(1) == 4


def test_generated_blocks_are_found_too(serving):
    batch = serving(block_size=4)
    batch.add(0, range(3), new_tokens=10)
    batch.run()
    batch.add(1, [*range(3), *batch.outputs[0]])
    batch.step()
    assert batch.scheduler.cached_tokens(1) == 12


def test_blocks_are_shared_while_their_first_owner_still_runs(serving):
    batch = serving(block_size=4)
    batch.add(0, range(9))
    first = batch.step()
    batch.add(1, range(9))
    second = batch.step()
    sharing = next(row for row in second.rows if row.row == 1)
    assert sharing.blocks[:2] == first.rows[0].blocks[:2]


def test_without_caching_nothing_is_shared(serving):
    batch = serving(prefix_caching=False)
    for id in range(2):
        batch.add(id, range(12))
        batch.step()
    assert batch.scheduler.cached_tokens(1) == 0


def test_the_salt_and_the_position_offset_part_the_cache(serving):
    batch = serving(block_size=4)
    batch.add(0, range(9), salt=b"one", slot=1)
    batch.run()
    for id, fields in enumerate(
        [{"salt": b"two", "slot": 2}, {}, {"salt": b"one", "slot": 3, "position_offset": 2}], 1
    ):
        batch.add(id, range(9), **fields)
        batch.step()
        assert batch.scheduler.cached_tokens(id) == 0
    batch.add(9, range(9), salt=b"one", slot=5)
    batch.step()
    assert batch.scheduler.cached_tokens(9) == 8


def test_virtual_tokens_are_cached_but_not_counted(serving):
    batch = serving(block_size=4)
    for id in range(2):
        batch.add(id, range(6), salt=b"soft", slot=1, virtual_tokens=5)
        batch.step()
    plan = batch.scheduler.plan()
    assert plan is not None
    assert batch.scheduler.cached_tokens(1) == 8 - 5


def test_virtual_tokens_lead_the_row_as_negative_ids(serving):
    batch = serving(max_batch_tokens=4)
    batch.add(0, [7, 8], salt=b"soft", slot=1, virtual_tokens=3, output=REPORT)
    first, second = batch.step().rows[0], batch.step().rows[0]
    assert first.tokens == (-1, -2, -3, 7)
    assert (first.prompt_logprobs_from, first.next_tokens) == (3, (8,))
    assert (second.tokens, second.prompt_logprobs_from, second.next_tokens) == ((8,), 1, ())


def test_prefix_rows_share_full_blocks_and_copy_the_tail(serving):
    batch = serving(block_size=4)
    prefix = batch.load_prefix(6, b"prefix")
    assert (len(prefix.shared), prefix.tail) == (1, prefix.blocks[1])
    for id in range(2):
        batch.add(id, [id, 4, 5, 6], slot=1, salt=b"prefix", prefix=prefix)
    plan = batch.step()
    assert [row.start for row in plan.rows] == [6, 6]
    assert [row.blocks[0] for row in plan.rows] == list(prefix.shared) * 2
    assert set(plan.copies) == {(prefix.tail, row.blocks[1]) for row in plan.rows}
    assert batch.step().copies == ()


def test_a_cached_block_stands_in_for_the_tail_copy(serving):
    batch = serving(block_size=4)
    prefix = batch.load_prefix(6, b"prefix")
    for id in range(2):
        batch.add(id, [1, 2, 3, 4, 5], slot=1, salt=b"prefix", prefix=prefix)
        plan = batch.step()
        assert len(plan.copies) == 1 - id
    assert batch.scheduler.cached_tokens(1) == 2
    batch.run()
    assert batch.outputs[0] == batch.outputs[1] == batch.expected(1, 5)


def test_a_whole_number_of_prefix_blocks_needs_no_copy(serving):
    batch = serving(block_size=4)
    prefix = batch.load_prefix(8, b"prefix")
    assert prefix.tail is None
    batch.add(0, [1, 2], slot=1, salt=b"prefix", prefix=prefix)
    plan = batch.step()
    assert plan.copies == ()
    assert plan.rows[0].start == 8


def test_a_prefix_outlives_its_adapter_while_rows_use_it(serving):
    batch = serving(block_size=4)
    prefix = batch.load_prefix(6, b"prefix")
    batch.add(0, [1, 2], slot=1, salt=b"prefix", prefix=prefix)
    batch.scheduler.free_prefix(prefix)
    assert batch.scheduler.usage() > 0
    batch.run()
    assert batch.outputs[0] == batch.expected(0, 5)
    assert batch.scheduler.usage() == 0


def test_a_prefix_that_leaves_rows_no_room_is_refused(serving):
    batch = serving(num_blocks=9, block_size=4)
    batch.add(0, range(10), new_tokens=7)
    with pytest.raises(AdapterMemoryExhausted, match=r"needs 5 KV cache blocks of 4 tokens, 4 can be given"):
        batch.scheduler.allocate_prefix(17, "large")
    assert len(batch.scheduler.allocate_prefix(16, "fits").blocks) == 4
    with pytest.raises(ValueError, match="at least 1 token"):
        batch.scheduler.allocate_prefix(0, "empty")
    batch.run()
    assert batch.outputs[0] == batch.expected(0, 7)


def test_a_prefix_takes_blocks_from_running_rows(serving):
    batch = serving(num_blocks=9, block_size=4)
    for id in range(2):
        batch.add(id, range(10), new_tokens=3, salt=b"x%d" % id, slot=1)
    batch.step()
    batch.load_prefix(12, b"prefix")
    assert (batch.scheduler.num_running, batch.scheduler.num_waiting) == (1, 1)
    batch.run()
    assert [batch.outputs[id] for id in range(2)] == [batch.expected(id, 3) for id in range(2)]


def test_a_row_that_can_never_fit_is_refused(serving):
    batch = serving(num_blocks=5, block_size=4)
    assert batch.scheduler.can_ever_fit(17)
    assert not batch.scheduler.can_ever_fit(18)
    with pytest.raises(InvalidRequest, match=r"expected at most 17 tokens.* got 18") as refused:
        batch.add(0, range(8), new_tokens=10)
    assert refused.value.field == "stopping.max_tokens"
    batch.add(1, range(8), new_tokens=9)
    batch.run()
    assert batch.outputs[1] == batch.expected(1, 9)


def test_prompt_logprobs_do_not_read_the_cache_but_write_it(serving):
    batch = serving(block_size=4)
    batch.add(0, range(12))
    batch.run()
    batch.add(1, range(12), output=REPORT)
    plan = batch.step()
    assert shape(plan) == [(1, 0, 12, True)]
    assert plan.rows[0].next_tokens == tuple(range(1, 12))
    batch.run()
    batch.add(2, [*range(20, 32)], output=REPORT)
    batch.run()
    batch.add(3, [*range(20, 32)])
    batch.step()
    assert batch.scheduler.cached_tokens(3) == 8


def test_chunks_report_each_prompt_token_once(serving):
    batch = serving(max_batch_tokens=4)
    batch.add(0, range(9), output=REPORT)
    rows = [batch.step().rows[0] for _ in range(4)]
    assert [(row.prompt_logprobs_from, row.next_tokens) for row in rows] == [
        (0, (1, 2, 3, 4)),
        (0, (5, 6, 7, 8)),
        (1, ()),
        (1, ()),
    ]


def test_preemption_takes_the_last_in_and_repeats_nothing(serving):
    batch = serving(num_blocks=8, block_size=4, prefix_caching=False)
    for id in range(2):
        batch.add(id, [id, *range(7)], new_tokens=13, output=REPORT)
    resumed = []
    while plan := batch.step():
        resumed += [row for row in plan.rows if row.start == 0]
    assert [row.row for row in resumed] == [0, 1, 1]
    again = resumed[2]
    assert again.generated > 0
    assert len(again.tokens) == 8 + again.generated
    assert (again.prompt_logprobs_from, again.next_tokens) == (len(again.tokens), ())
    for id in range(2):
        assert batch.outputs[id] == batch.expected(id, 13)
        assert batch.reported[id] == list(range(7))


def until_preempted(batch):
    """Steps until one of the running rows waits again; returns the rows that then run."""
    running = 0
    while batch.scheduler.num_running >= running:
        running = batch.scheduler.num_running
        plan = batch.step()
    assert batch.scheduler.num_waiting
    return [row.row for row in plan.rows]


def test_resumption_changes_neither_what_was_cached_nor_what_was_charged(serving):
    batch = serving(num_blocks=8, block_size=4)
    for id in range(2):
        batch.add(id, [id, *range(7)], new_tokens=13, fairness_key=str(id))
    assert until_preempted(batch) == [0]
    while 1 not in {row.row for row in batch.step().rows}:
        pass
    assert batch.scheduler.cached_tokens(1) == 0
    batch.run()
    assert batch.scheduler._waiting.counter("0") == batch.scheduler._waiting.counter("1") == 8 + 2 * 13


def test_a_preempted_row_precedes_new_ones(serving):
    batch = serving(num_blocks=8, block_size=4)
    for id in range(2):
        batch.add(id, [id, *range(7)], new_tokens=13, fairness_key="served")
    assert until_preempted(batch) == [0]
    batch.add(2, [1, 2], new_tokens=13, fairness_key="fresh")
    order = []
    while plan := batch.step():
        order += [row.row for row in plan.rows if row.row not in order]
    assert order == [0, 1, 2]


def test_a_row_preempted_during_its_step_computes_it_again(serving):
    batch = serving(num_blocks=9, block_size=4)
    for id in range(2):
        batch.add(id, [id, 1, 2, 3], new_tokens=9)
    batch.step()
    plan = batch.scheduler.plan()
    batch.load_prefix(20, b"prefix")
    assert batch.scheduler.num_running == 1
    results = StepResult(tuple(batch._compute(row, False) for row in plan.rows))
    news = batch.scheduler.update(results)
    assert [got.row for got in news] == [0]
    batch.outputs[0].append(news[0].token)
    batch.run()
    assert [batch.outputs[id] for id in range(2)] == [batch.expected(id, 9) for id in range(2)]


def test_a_block_is_not_shared_before_its_last_token_is_computed(serving):
    batch = serving(block_size=4, max_batch_tokens=7)
    batch.add(0, range(12))
    batch.step()
    batch.abort(0)
    batch.add(1, range(12))
    batch.step()
    assert batch.scheduler.cached_tokens(1) == 4


def test_preemption_takes_the_lowest_priority_first(serving):
    batch = serving(num_blocks=9, block_size=4, prefix_caching=False)
    for id, priority in enumerate((0, -1, 0)):
        batch.add(id, [id, 1, 2, 3], new_tokens=9, priority=priority)
        batch.step()
    while batch.scheduler.num_running == 3:
        batch.step()
    assert {row.row for row in batch.scheduler.plan().rows} == {0, 2}
    assert batch.scheduler.waiting_by_key() == {"": 1}


def test_higher_priority_is_admitted_first(serving):
    batch = serving(max_rows=1)
    for id, priority in enumerate((0, 5, 1)):
        batch.add(id, [1, 2], new_tokens=1, priority=priority)
    assert [batch.step().rows[0].row for _ in range(3)] == [1, 2, 0]


def test_arrival_decides_inside_a_key(serving):
    batch = serving(max_rows=1)
    for id, arrival in enumerate((3.0, 1.0, 2.0)):
        batch.add(id, [1, 2], new_tokens=1, arrival=arrival)
    assert [batch.step().rows[0].row for _ in range(3)] == [1, 2, 0]


def test_a_large_row_is_not_overtaken_for_ever(serving):
    batch = serving(num_blocks=9, block_size=4, max_rows=4)
    batch.add(0, range(12), new_tokens=6)
    batch.step()
    batch.add(1, range(20, 40), new_tokens=2)
    batch.add(2, [1], new_tokens=1)
    while 0 not in batch.finished:
        assert [row.row for row in batch.step().rows] == [0]
    assert {row.row for row in batch.step().rows} >= {1}


def test_end_tokens_are_suppressed_until_min_tokens(serving):
    batch = serving()
    batch.add(0, [1, 2], new_tokens=4, min_tokens=2, end_token_ids=(7, 8))
    assert [batch.step().rows[0].suppressed for _ in range(4)] == [(7, 8), (7, 8), (), ()]


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (SamplingParams(), False),
        (SamplingParams(repetition_penalty=1.2), True),
        (SamplingParams(presence_penalty=-0.5), True),
        (SamplingParams(frequency_penalty=0.1), True),
    ],
)
def test_history_is_filled_where_a_penalty_needs_it(serving, sampling, wanted):
    batch = serving()
    batch.add(0, [4, 5], salt=b"soft", slot=1, virtual_tokens=2, sampling=sampling)
    batch.step()
    row = batch.step().rows[0]
    assert row.generated == 1
    assert (row.history is not None) == wanted
    if wanted:
        assert told(row.history) == ({4, 5, *batch.outputs[0]}, Counter(batch.outputs[0]))


def told(history):
    """-> (which ids it has seen, how often the output has each): lists without a second entry of any."""
    assert len(set(history.seen)) == len(history.seen)
    assert len(set(history.drawn)) == len(history.drawn)
    return set(history.seen), Counter(dict(zip(history.drawn, history.counts, strict=True)))


def test_histories_stand_preemption(serving, monkeypatch):
    """Rows of up to 14 tokens in 7 blocks of 4; ids that come again, and virtual ones among a prompt's own."""
    batch = serving(num_blocks=8)
    preempt, victims = batch.scheduler._preempt, []
    monkeypatch.setattr(batch.scheduler, "_preempt", lambda row: victims.append(row.new.id) or preempt(row))
    prompts = {0: (4, 5, 4), 1: (7, -1, 8, -2), 2: (9, 9, 9)}
    for id, prompt in prompts.items():
        inner = sum(token < 0 for token in prompt)
        batch.add(id, prompt, 10, salt=b"own", inner_virtual=inner, sampling=SamplingParams(presence_penalty=0.5))
    histories = {}
    while plan := batch.step():
        histories |= {row.row: row.history for row in plan.rows if row.row not in batch.finished}
        for id, history in histories.items():
            if id not in batch.finished:
                real = {token for token in prompts[id] if token >= 0}
                assert told(history) == (real | set(batch.outputs[id]), Counter(batch.outputs[id]))
    assert victims, "nobody was preempted"
    assert [len(batch.outputs[id]) for id in prompts] == [10, 10, 10]


def test_abort_frees_at_once_in_every_state(serving):
    batch = serving(max_rows=1, max_batch_tokens=4)
    batch.add(0, range(6))
    batch.add(1, range(6))
    batch.step()
    batch.abort(0)
    batch.abort(1)
    assert batch.scheduler.usage() == 0
    batch.scheduler.abort(0)
    assert batch.scheduler.plan() is None


def test_a_row_aborted_during_its_step_is_left_out_of_the_result():
    scheduler = Scheduler(16, 4)
    for id in range(2):
        scheduler.add(NewRow(id, 0, (1, 2), 5, SamplingParams(), OutputOptions()))
    plan = scheduler.plan()
    scheduler.abort(0)
    news = scheduler.update(StepResult(tuple(RowResult(row.row, 9) for row in plan.rows)))
    assert [got.row for got in news] == [1]
    scheduler.check()


def test_a_failed_step_is_planned_again_with_its_copies(serving):
    batch = serving(block_size=4)
    prefix = batch.load_prefix(6, b"prefix")
    batch.add(0, [1, 2], slot=1, salt=b"prefix", prefix=prefix)
    assert batch.scheduler.plan() == batch.scheduler.plan()
    assert batch.scheduler.plan().copies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "at least one prompt token"),
        ({"weight": 0.0}, "positive weight"),
        ({"virtual_tokens": 2}, "expected a salt"),
        ({"new_tokens": 0}, "max_total above"),
    ],
)
def test_refuses_rows_that_make_no_sense(serving, fields, message):
    with pytest.raises(ValueError, match=message):
        serving().add(0, **{"prompt": (1, 2), **fields})


def test_counts_by_fairness_key(serving):
    batch = serving(max_rows=2)
    for id, key in enumerate("aabb"):
        batch.add(id, [1], fairness_key=key)
    batch.step()
    scheduler = batch.scheduler
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    assert scheduler.running_by_key() == {"a": 1, "b": 1}
    assert scheduler.waiting_by_key() == {"a": 1, "b": 1}


def reads(plan):
    return [(row.row, row.start, row.reads, row.num_states) for row in plan.rows]


def test_a_row_with_a_readout_never_samples_and_ends_with_its_prompt(serving):
    batch = serving(max_batch_tokens=4)
    batch.add(0, range(10), new_tokens=1, readout=Readout.LAST)
    assert [reads(batch.step()) for _ in range(3)] == [
        [(0, 0, (), 0)],
        [(0, 4, (), 0)],
        [(0, 8, (1,), 1)],
    ]
    assert batch.finished == {0}
    assert batch.step() is None


@pytest.mark.parametrize(("readout", "states"), [(Readout.TOKENS, (4, 4, 2)), (Readout.MEAN, (1, 1, 1))])
def test_every_token_is_read_once_chunk_by_chunk(serving, readout, states):
    batch = serving(max_batch_tokens=4)
    batch.add(0, range(10), new_tokens=1, readout=readout)
    assert tuple(reads(batch.step())[0][3] for _ in range(3)) == states


@pytest.mark.parametrize(
    ("readout", "cached"),
    [(Readout.LAST, 8), (Readout.SEQUENCE, 8), (Readout.MEAN, 0), (Readout.TOKENS, 0)],
)
def test_only_tokens_that_nobody_reads_come_from_the_cache(serving, readout, cached):
    batch = serving(block_size=4)
    batch.add(0, range(9))
    batch.run()
    batch.add(1, range(9), new_tokens=1, readout=readout)
    assert shape(batch.scheduler.plan())[0][1] == batch.scheduler.cached_tokens(1) == cached
    batch.step()
    assert batch.finished == {0, 1}
    assert batch.states[1] == batch.expected_states(1)


@pytest.mark.parametrize("readout", [Readout.MEAN, Readout.TOKENS, Readout.LAST])
def test_a_preempted_readout_goes_on_where_it_was(serving, readout):
    """What it has read is not read again, though the cache may have lost it."""
    batch = serving(num_blocks=8, block_size=4, max_batch_tokens=9)
    batch.add(0, range(50, 57), new_tokens=15)
    batch.step()
    batch.add(1, range(16), new_tokens=1, readout=readout)
    batch.step()
    read = len(batch.states[1])
    batch.scheduler._preempt(batch.scheduler._running[-1])
    batch.run()
    assert read == (8 if readout is Readout.TOKENS else 1 if readout is Readout.MEAN else 0)
    assert batch.states[1] == batch.expected_states(1)


def test_virtual_tokens_inside_a_prompt_are_not_read(serving):
    new = serving().row(0, (5, -7, 6), 1, salt=b"a", readout=Readout.TOKENS)
    plan = Row(new, 4)
    plan.place([1], 0, 0, None)
    assert plan.plan(3).reads == (0, 2)


def test_a_readout_that_fails_does_not_move(serving):
    batch = serving()
    batch.add(0, range(5), new_tokens=1, readout=Readout.MEAN)
    batch.step(lambda row: True)
    assert not batch.finished
    batch.run()
    assert batch.states[0] == batch.expected_states(0)


def test_images_are_never_cut(serving):
    """Spans of 3 and 12 tokens under a budget of 8: the larger one over the budget, but beside no other prefill."""
    batch = serving(max_batch_tokens=8)
    spans = (ImageSpan(6, 9, (), True), ImageSpan(12, 24, (), True))
    prompt = [-1 if any(s.start <= i < s.stop for s in spans) else i for i in range(26)]
    batch.add(0, prompt, salt=b"image", images=spans)
    batch.add(1, range(40, 60))
    chunks, largest = [], 0
    while (plan := batch.step()) is not None:
        largest = max(largest, plan.num_tokens)
        for row in plan.rows:
            end = row.start + len(row.tokens)
            assert row.images == tuple(s for s in spans if row.row == 0 and s.start < end and row.start < s.stop)
            if row.row == 0 and row.generated == 0:
                chunks.append((row.start, end))
    assert chunks == [(0, 6), (6, 12), (12, 24), (24, 26)]
    assert largest == 12
    assert [batch.outputs[i] for i in (0, 1)] == [batch.expected(i, 5) for i in (0, 1)]


def test_two_large_images_take_turns(serving):
    """Neither waits for the other's rows to end, and a row without images goes on beside them."""
    batch = serving(max_batch_tokens=4)
    for i in (0, 1):
        batch.add(i, [-1] * 10, salt=bytes([i + 1]), images=(ImageSpan(0, 10, (), True),))
    batch.add(2, range(6))
    plans = [batch.step() for _ in range(3)]
    assert [[(row.row, len(row.tokens)) for row in plan.rows if len(row.tokens) > 1] for plan in plans[:2]] == [
        [(0, 10)],
        [(1, 10)],
    ]
    batch.run()
    assert batch.outputs == {i: batch.expected(i, 5) for i in range(3)}


def test_images_survive_preemption(serving):
    batch = serving(num_blocks=10, block_size=4, max_batch_tokens=6)
    for i in range(3):
        prompt = [i, -1, -1, -1, -1, -1, -1, -1, 9]
        batch.add(i, prompt, 12, salt=bytes([i + 1]), images=(ImageSpan(1, 8, (), True),))
    batch.run()
    assert batch.outputs == {i: batch.expected(i, 12) for i in range(3)}
