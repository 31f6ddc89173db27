"""Sequences whose KV comes from another instance, and sequences that leave theirs behind."""

from __future__ import annotations

import random

import pytest

from chiasm.engine.sequence import Sequence
from tests.engine.driver import Driver, chunks, prompt


def hand_over(driver: Driver, sequence: Sequence) -> None:
    """Run a sequence up to its first token, and end it as a prefill instance does."""
    while sequence.num_output == 0:
        driver.step()
    driver.scheduler.finish(sequence, leave_blocks=True)


def test_a_sequence_gets_all_its_blocks_and_runs_when_they_are_filled() -> None:
    driver = Driver(block_size=4)
    sequence = driver.add(prompt(10), outputs=(7,), remote=10)
    step = driver.step()
    assert step.load == [sequence]
    assert not step.scheduled
    assert len(sequence.block_ids) == 3
    assert not driver.step().load
    driver.scheduler.loaded(sequence)
    assert [(part.start, part.num_tokens) for part in driver.step().decodes] == [(10, 1)]
    driver.run()
    assert sequence.output_token_ids[0] == 7
    assert sequence.num_output == 4
    assert driver.nothing_is_left()


def test_the_blocks_include_room_for_the_next_token() -> None:
    driver = Driver(block_size=4)
    sequence = driver.add(prompt(8), outputs=(7,), remote=8)
    driver.step()
    assert len(sequence.block_ids) == 3


def test_blocks_in_the_prefix_cache_are_shared() -> None:
    driver = Driver(block_size=4)
    first = driver.add(prompt(10), outputs=(7,), remote=10)
    driver.step()
    driver.scheduler.loaded(first)
    second = driver.add(prompt(10), outputs=(7,), remote=10)
    step = driver.step()
    assert step.load == [second]
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.num_computed == 8
    assert second.num_cached == 8


def test_others_run_while_blocks_are_being_filled() -> None:
    driver = Driver()
    text = driver.add(prompt(5))
    driver.step()
    late = driver.add(prompt(10), outputs=(7,), remote=10)
    step = driver.step()
    assert step.load == [late]
    assert [part.sequence for part in step.decodes] == [text]


def test_a_sequence_without_room_waits_its_turn() -> None:
    driver = Driver(blocks=4, block_size=4)
    first = driver.add(prompt(10), outputs=(7,), remote=10, max_tokens=2)
    second = driver.add(prompt(("a", 1), 10), outputs=(7,), remote=11, max_tokens=2)
    assert driver.step().load == [first]
    assert driver.step().load == []
    driver.scheduler.loaded(first)
    driver.step()
    assert driver.step().load == [second]


def test_one_block_per_running_sequence_stays_free() -> None:
    driver = Driver(blocks=7, block_size=4)
    running = driver.add(prompt(10), outputs=(7,), remote=10, max_tokens=9)
    driver.step()
    driver.scheduler.loaded(running)
    late = driver.add(prompt(("a", 1), 11), outputs=(7,), remote=12)
    assert driver.step().load == []
    driver.run_until(lambda: running.finished)
    assert driver.step().load == [late]


def test_loading_sequences_count_as_running() -> None:
    driver = Driver(max_num_seqs=1)
    first = driver.add(prompt(10), outputs=(7,), remote=10)
    driver.add(prompt(("a", 1), 10), outputs=(7,), remote=11)
    assert driver.step().load == [first]
    assert driver.step().load == []


def test_a_sequence_that_ends_while_loading_keeps_its_blocks_until_the_load_is_broken_off() -> None:
    driver = Driver()
    sequence = driver.add(prompt(10), outputs=(7,), remote=10)
    driver.step()
    driver.scheduler.finish(sequence)
    assert sequence.block_ids
    driver.step()
    driver.scheduler.not_loaded(sequence)
    assert driver.nothing_is_left()


def test_a_sequence_that_ends_while_loading_frees_its_blocks_when_the_load_succeeds() -> None:
    driver = Driver()
    sequence = driver.add(prompt(10), outputs=(7,), remote=10)
    driver.step()
    driver.scheduler.finish(sequence)
    driver.scheduler.loaded(sequence)
    assert driver.nothing_is_left()


def test_a_load_that_failed_ends_the_sequence() -> None:
    driver = Driver()
    sequence = driver.add(prompt(10), outputs=(7,), remote=10)
    driver.step()
    driver.scheduler.not_loaded(sequence)
    assert sequence.finished
    assert driver.nothing_is_left()


def test_a_sequence_that_ends_before_it_got_blocks_holds_nothing() -> None:
    driver = Driver(blocks=4, block_size=4)
    driver.add(prompt(10), outputs=(7,), remote=10)
    second = driver.add(prompt(("a", 1), 10), outputs=(7,), remote=11)
    driver.step()
    driver.scheduler.finish(second)
    assert not second.block_ids


def test_several_choices_share_the_blocks_that_the_first_one_loaded() -> None:
    driver = Driver(block_size=4)
    leader = driver.add(prompt(10), choices=2, remote=9, max_tokens=3)
    follower = driver.sequences[1]
    assert driver.step().load == [leader]
    driver.scheduler.loaded(leader)
    step = driver.step()
    assert chunks(step) == [(9, 10)]
    assert driver.step().load == [follower]
    assert follower.block_ids[:2] == leader.block_ids[:2]
    driver.scheduler.loaded(follower)
    driver.run()
    assert driver.nothing_is_left()


def test_blocks_left_behind_are_not_reused_until_they_have_been_read() -> None:
    driver = Driver(blocks=4, block_size=4)
    first = driver.add(prompt(10))
    hand_over(driver, first)
    assert driver.scheduler.block_manager.num_free == 1
    second = driver.add(prompt(("a", 1), 9))
    driver.stored.add("a")
    assert second not in [part.sequence for part in driver.step().scheduled]
    driver.scheduler.blocks_read(first.request_id)
    driver.run()
    assert second.num_output == 4
    assert driver.nothing_is_left()


def test_blocks_left_behind_stay_in_the_prefix_cache() -> None:
    driver = Driver(block_size=4)
    first = driver.add(prompt(10))
    hand_over(driver, first)
    second = driver.add(prompt(10))
    driver.step()
    assert second.num_cached == 8
    driver.scheduler.blocks_read(first.request_id)
    driver.run()
    assert driver.nothing_is_left()


def test_reporting_blocks_as_read_twice_changes_nothing() -> None:
    driver = Driver()
    first = driver.add(prompt(10))
    hand_over(driver, first)
    driver.scheduler.blocks_read(first.request_id)
    driver.scheduler.blocks_read(first.request_id)
    assert driver.nothing_is_left()


@pytest.mark.parametrize(("blocks", "recomputes_items"), [(24, True), (10, False)])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_arrivals_loads_and_ends_frees_everything(seed: int, blocks: int, recomputes_items: bool) -> None:
    rng = random.Random(seed)
    driver = Driver(blocks=blocks, block_size=4, max_num_seqs=4, budget=16, recomputes_items=recomputes_items)
    for number in range(40):
        for sequence in list(driver.scheduler.loading):
            if rng.random() < 0.5:
                rng.choice((driver.scheduler.loaded, driver.scheduler.not_loaded))(sequence)
        if rng.random() < 0.7:
            length = rng.randint(1, 20)
            driver.add(
                prompt((f"p{number % 5}", 1), length), outputs=(7,), remote=length + 1, max_tokens=rng.randint(2, 9)
            )
        if rng.random() < 0.2 and (alive := [one for one in driver.sequences if not one.finished]):
            driver.scheduler.finish(rng.choice(alive))
        driver.step()
    while any(not sequence.finished for sequence in driver.sequences):
        for sequence in list(driver.scheduler.loading):
            driver.scheduler.loaded(sequence)
        driver.step()
    for sequence in list(driver.scheduler.loading):
        driver.scheduler.not_loaded(sequence)
    assert driver.nothing_is_left()


def decoding(driver: Driver, *lengths: int, max_tokens: int) -> list[Sequence]:
    """Return sequences, each with an image and so many tokens, whose KV has come."""
    sequences = [
        driver.add(prompt((f"p{number}", 1), length - 1), outputs=(7,), remote=length, max_tokens=max_tokens)
        for number, length in enumerate(lengths)
    ]
    while driver.step().load:
        for sequence in list(driver.scheduler.loading):
            driver.scheduler.loaded(sequence)
    return sequences


def test_where_items_cannot_be_recomputed_a_sequence_waits_for_blocks_instead_of_preempting() -> None:
    driver = Driver(blocks=9, block_size=4, recomputes_items=False)
    first, second = decoding(driver, 8, 8, max_tokens=8)
    third = driver.add(prompt(("p3", 1), 3), outputs=(7,), remote=4, max_tokens=2)
    driver.run_until(lambda: third in driver.scheduler.loading)
    driver.scheduler.loaded(third)
    driver.run_until(lambda: first.finished and second.finished and third.finished)
    assert driver.scheduler.num_preemptions == 0


def test_the_youngest_is_preempted_only_when_no_sequence_can_continue() -> None:
    driver = Driver(blocks=6, block_size=4, recomputes_items=False)
    first, second = decoding(driver, 7, 7, max_tokens=15)
    while not (step := driver.step()).preempted:
        assert step.scheduled
    assert step.preempted == [second]
    driver.scheduler.finish(second)
    driver.run_until(lambda: first.finished)
    assert driver.nothing_is_left()


def test_the_kv_of_a_prompt_with_items_is_set_aside_until_there_is_room_for_all_of_the_answer_so_far() -> None:
    driver = Driver(blocks=6, block_size=4, recomputes_items=False)
    first, second = decoding(driver, 7, 7, max_tokens=15)
    while not (step := driver.step()).set_aside:
        assert not step.preempted
    ((sequence, block_ids),) = step.set_aside
    assert (sequence, len(block_ids)) == (second, 2)
    before = second.num_output
    while not (step := driver.step()).put_back:
        assert not step.set_aside
    assert first.finished
    assert chunks(driver.step()) == [(7, 7 + before)]
    driver.run_until(lambda: second.finished)
    assert second.num_output == 15
    assert driver.nothing_is_left()


def test_a_text_gives_its_blocks_to_an_older_sequence_and_is_recomputed() -> None:
    driver = Driver(blocks=8, block_size=4, recomputes_items=False)
    (first,) = decoding(driver, 7, max_tokens=18)
    text = driver.add(prompt(7), outputs=(7,), remote=7, max_tokens=12, salt="text")
    driver.run_until(lambda: text in driver.scheduler.loading)
    driver.scheduler.loaded(text)
    driver.run_until(lambda: first.finished)
    assert driver.scheduler.num_preemptions > 0
    driver.run_until(lambda: text.finished)
    assert text.num_output == 12
    assert driver.nothing_is_left()
