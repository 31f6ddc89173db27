"""The scheduler as a state machine, driven step by step."""

from __future__ import annotations

import sys
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.due import BEFORE_ALL_NEW
from chiasm.engine.local_encoder import choose
from chiasm.engine.shares import largest_share
from chiasm.errors import InvalidRequestError, OverloadedError
from chiasm.models.base import Prompt
from tests.engine.driver import Driver, chunks, prompt


def test_a_short_prompt_is_prefilled_in_one_step_and_then_decoded_token_by_token() -> None:
    driver = Driver()
    sequence = driver.add(prompt(10), max_tokens=3)
    assert chunks(driver.step()) == [(0, 10)]
    step = driver.step()
    assert (step.prefills, len(step.decodes)) == ([], 1)
    driver.step()
    assert sequence.num_output == 3
    assert driver.nothing_is_left()


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget() -> None:
    driver = Driver(budget=8)
    driver.add(prompt(20), max_tokens=1)
    assert [chunks(driver.step()) for _ in range(3)] == [[(0, 8)], [(8, 16)], [(16, 20)]]


def test_decodes_come_before_prefills_and_share_the_budget() -> None:
    driver = Driver(budget=8)
    driver.add(prompt(4), max_tokens=9)
    driver.step()
    driver.add(prompt(20), salt="other")
    step = driver.step()
    assert len(step.decodes) == 1
    assert chunks(step) == [(0, 7)]


def test_prefill_chunks_are_shorter_in_steps_that_also_decode() -> None:
    driver = Driver(budget=32, mixed=8)
    stream = driver.add(prompt(4), max_tokens=3)
    driver.step()
    driver.add(prompt(24), salt="other")
    assert chunks(driver.step()) == [(0, 8)]
    assert chunks(driver.step()) == [(8, 16)]
    assert stream.finished
    assert chunks(driver.step()) == [(16, 24)]


def test_several_prompts_share_a_step_in_order_of_arrival() -> None:
    driver = Driver(budget=16)
    driver.add(prompt(6))
    driver.add(prompt(6), salt="other")
    driver.add(prompt(6), salt="third")
    assert chunks(driver.step()) == [(0, 6), (0, 6), (0, 4)]


def test_at_most_max_num_seqs_sequences_are_admitted() -> None:
    driver = Driver(max_num_seqs=2)
    for salt in "abc":
        driver.add(prompt(4), salt=salt)
    driver.step()
    assert len(driver.scheduler.running) == 2
    assert len(driver.scheduler.waiting) == 1


def test_at_most_max_num_seqs_sequences_run_in_a_step_when_stalled_ones_continue_at_once() -> None:
    driver = Driver(max_num_seqs=2)
    for number in range(8):
        driver.add(prompt(3, (f"image {number}", 4), 2), salt=str(number))
        driver.step()
    assert len(driver.scheduler.running) == 8
    driver.stored.update(f"image {number}" for number in range(8))
    assert [part.sequence for part in driver.step().scheduled] == driver.sequences[:2]
    driver.run()


def test_a_sequence_that_must_wait_for_its_turn_takes_the_place_of_one_that_lacks_blocks() -> None:
    driver = Driver(max_num_seqs=1, blocks=4)
    first = driver.add(prompt(3, ("image", 4), 2), due=1)
    driver.step()
    second = driver.add(prompt(6), due=2, max_tokens=8)
    driver.run_until(lambda: driver.scheduler.block_manager.num_free == 0)
    driver.stored.add("image")
    driver.run_until(lambda: first.finished)
    assert not second.finished
    driver.run()


def test_an_answer_that_was_cut_off_elsewhere_goes_before_new_ones() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add(prompt(4), max_tokens=2)
    driver.step()
    new = driver.add(prompt(4), salt="new")
    resumed = driver.add(prompt(4), salt="resumed", outputs=(7,), due=BEFORE_ALL_NEW)
    driver.run_until(lambda: resumed.finished)
    assert not new.was_scheduled
    driver.run()


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    driver = Driver(max_queued=2)
    driver.add(prompt(4))
    driver.add(prompt(4))
    with pytest.raises(OverloadedError, match="2 is the limit"):
        driver.add(prompt(4))
    driver.run()


def test_an_item_that_can_never_fit_the_encoder_cache_is_refused() -> None:
    driver = Driver(cache_rows=4)
    driver.scheduler.items.check(prompt(1, ("a", 4)).items)
    with pytest.raises(InvalidRequestError, match="--encoder-cache-bytes"):
        driver.scheduler.items.check(prompt(1, ("a", 5)).items)


# ---- shares and turns ----------------------------------------------------------------------------------------------------


def add_many(driver: Driver, prompts: int, choices: int, name: str, *, key: str = "", max_tokens: int = 2000) -> int:
    """Add one request of several prompts; return how many of its sequences the queue took."""
    before = len(driver.sequences)
    for _ in range(prompts):
        salt = str(len(driver.sequences))
        try:
            driver.add(prompt(1), choices=choices, salt=salt, part_of=name, key=key, max_tokens=max_tokens)
        except OverloadedError:
            break
    return len(driver.sequences) - before


def running(driver: Driver, name: str) -> int:
    return sum(1 for sequence in driver.scheduler.running if name in (sequence.part_of, sequence.key))


def large_driver() -> Driver:
    return Driver(max_num_seqs=64, max_queued=256, budget=512, max_prefill=256, blocks=100_000)


def test_a_small_request_starts_at_once_beside_one_of_many_sequences() -> None:
    driver = large_driver()
    assert add_many(driver, 8, 16, "large") == 128
    for _ in range(20):
        driver.step()
    small = driver.add(prompt(4), max_tokens=3, due=1.0)
    driver.step()
    assert small.was_scheduled
    driver.run_until(lambda: small.finished, limit=3)


def test_requests_of_many_sequences_leave_places_for_whoever_comes_next() -> None:
    driver = large_driver()
    for count, shares in enumerate([[32], [32, 16], [32, 16, 8]], start=1):
        name = f"r{count}"
        assert add_many(driver, 40, 1, name) == 40
        for _ in range(5):
            driver.step()
        assert [running(driver, f"r{number}") for number in range(1, count + 1)] == shares


def test_a_place_that_becomes_free_goes_to_the_request_with_its_share_left() -> None:
    driver = Driver(max_num_seqs=4, blocks=10_000)
    add_many(driver, 8, 1, "large", max_tokens=6)
    for _ in range(2):
        driver.step()
    assert running(driver, "large") == 2
    small = [driver.add(prompt(2), salt=str(number), due=9.0, max_tokens=3) for number in range(8)]
    driver.run_until(lambda: all(sequence.finished for sequence in small))
    assert any(not sequence.finished for sequence in driver.sequences[:8])
    driver.run()


def test_a_request_of_many_sequences_ends_although_small_ones_keep_coming() -> None:
    driver = Driver(max_num_seqs=2, max_queued=64, blocks=10_000)
    assert add_many(driver, 6, 2, "large", max_tokens=5) == 12
    for number in range(200):
        if all(sequence.finished for sequence in driver.sequences[:12]):
            return
        while len(driver.scheduler.waiting) < 20:
            driver.add(prompt(1), salt=f"small {len(driver.sequences)}", due=1.0 + number, max_tokens=2)
        driver.step()
    raise AssertionError("it starves")


def test_one_request_cannot_fill_the_queue() -> None:
    driver = Driver(max_num_seqs=1, max_queued=16)
    assert add_many(driver, 20, 1, "large") == largest_share(16) == 8
    assert add_many(driver, 20, 1, "second") == 4
    assert add_many(driver, 1, 3, "third") == 0
    assert [add_many(driver, 1, 1, f"small {number}") for number in range(5)] == [1, 1, 1, 1, 0]


def test_one_key_cannot_fill_the_queue() -> None:
    driver = Driver(max_num_seqs=1, max_queued=16)
    taken = [add_many(driver, 1, 1, f"greedy {number}", key="greedy") for number in range(16)]
    assert sum(taken) == 12
    assert add_many(driver, 1, 1, "other", key="other") == 1


def test_a_free_place_goes_to_the_key_that_has_the_fewest() -> None:
    driver = Driver(max_num_seqs=4, blocks=10_000)
    for number in range(10):
        driver.add(prompt(2), salt=str(number), key="greedy", max_tokens=4 + number)
    driver.step()
    assert running(driver, "greedy") == 4
    other = driver.add(prompt(2), salt="other", key="other", due=5.0, max_tokens=2)
    driver.run_until(lambda: running(driver, "greedy") < 4 or other.was_scheduled)
    driver.step()
    assert other.was_scheduled
    driver.run()


def test_keys_share_the_places_evenly_however_many_requests_they_have() -> None:
    driver = Driver(max_num_seqs=8, blocks=10_000)
    for number in range(20):
        driver.add(prompt(2), salt=f"a{number}", key="a", max_tokens=50)
    for number in range(4):
        driver.add(prompt(2), salt=f"b{number}", key="b", due=1.0, max_tokens=50)
    driver.step()
    assert (running(driver, "a"), running(driver, "b")) == (4, 4)
    driver.run()


def test_answers_that_were_cut_off_elsewhere_need_no_turn_of_their_key() -> None:
    driver = Driver(max_num_seqs=4, blocks=10_000)
    for number in range(3):
        driver.add(prompt(2), salt=f"a{number}", key="a", max_tokens=4)
    driver.step()
    new = [driver.add(prompt(2), salt=f"b{number}", key="b", max_tokens=4) for number in range(4)]
    resumed = [
        driver.add(prompt(2), salt=f"r{number}", key="a", due=BEFORE_ALL_NEW, outputs=(7,), max_tokens=9)
        for number in range(3)
    ]
    driver.run_until(lambda: all(sequence.was_scheduled for sequence in resumed))
    assert not any(sequence.was_scheduled for sequence in new[1:])
    driver.run()


def test_an_image_is_looked_for_behind_a_request_of_many_sequences() -> None:
    driver = Driver(max_num_seqs=2)
    add_many(driver, 8, 1, "large")
    driver.step()
    image = driver.add(prompt(1, ("a", 4)), due=1.0)
    assert [sequence for sequence, _ in driver.scheduler.wanted_items()] == [image]


def test_an_image_that_is_there_is_not_kept_waiting_by_requests_whose_images_never_come() -> None:
    driver = Driver(max_num_seqs=2, min_text_before_item=8)
    for name in ("never 1", "never 2"):
        driver.add(prompt(3, (name, 4)))
    driver.stored.add("here")
    here = driver.add(prompt(3, ("here", 4)))
    driver.run_until(lambda: here.finished, limit=10)
    assert not any(sequence.was_scheduled for sequence in driver.sequences[:2])


def test_what_is_missing_is_known_behind_requests_whose_images_never_come() -> None:
    driver = Driver(max_num_seqs=2, min_text_before_item=8)
    for number in range(5):
        driver.add(prompt(3, (f"image {number}", 4)))
    driver.step()
    missing = [item.identifier for _, items in driver.scheduler.wanted_items() for item in items]
    assert missing == [f"image {number}" for number in range(5)]


def test_no_more_requests_get_room_for_images_than_can_run() -> None:
    driver = Driver(max_num_seqs=2)
    for number in range(2):
        driver.add(prompt(4), salt=str(number), max_tokens=9)
    driver.step()
    driver.stored.update(f"image {number}" for number in range(5))
    for number in range(5):
        driver.add(prompt(2, (f"image {number}", 4)))
    driver.step()
    driver.step()
    assert driver.scheduler.encoder_cache.identifiers == {"image 0", "image 1"}
    driver.run()


def test_requests_that_have_some_of_their_images_keep_no_room_from_one_that_could_end() -> None:
    driver = Driver(max_num_seqs=2, blocks=4)
    for name in "abcd":
        driver.add(prompt((name, 4), 8, (f"never {name}", 4)))
    driver.stored.update("abcd")
    for _ in range(4):
        driver.step()
    assert len(driver.scheduler.waiting) > 2
    driver.stored.add("here")
    here = driver.add(prompt(3, ("here", 4)), max_tokens=1)
    driver.run_until(lambda: here.finished, limit=4)


def test_requests_of_one_key_that_have_their_images_keep_no_room_from_another_key() -> None:
    driver = Driver(max_num_seqs=2)
    driver.stored.update(f"image {number}" for number in range(9))
    for number in range(8):
        driver.add(prompt(2, (f"image {number}", 4)), key="greedy", max_tokens=20)
    driver.step()
    other = driver.add(prompt(2, ("image 8", 4)), key="other", due=1.0)
    driver.run_until(lambda: driver.sequences[0].finished or other.was_scheduled)
    driver.step()
    assert other.was_scheduled
    driver.run()


# ---- the order of due ---------------------------------------------------------------------------------------------------


def test_the_prompt_that_is_due_first_goes_first() -> None:
    driver = Driver(budget=8)
    late = driver.add(prompt(8), due=9, salt="late")
    early = driver.add(prompt(12), due=3, salt="early")
    assert [part.sequence for part in driver.step().prefills] == [early]
    assert [part.sequence for part in driver.step().prefills] == [early, late]


def test_a_prompt_that_is_due_earlier_overtakes_one_whose_prefill_has_begun() -> None:
    driver = Driver(budget=8)
    long = driver.add(prompt(30), due=9)
    driver.step()
    short = driver.add(prompt(6), due=3, max_tokens=1, salt="short")
    step = driver.step()
    assert [part.sequence for part in step.prefills] == [short, long]
    assert chunks(step) == [(0, 6), (8, 10)]


def test_prompts_that_are_due_at_the_same_time_go_in_order_of_arrival() -> None:
    driver = Driver(budget=8)
    first, second = driver.add(prompt(8), due=1, salt="a"), driver.add(prompt(8), due=1, salt="b")
    assert [driver.step().prefills[0].sequence for _ in range(2)] == [first, second]


def test_a_request_that_is_overtaken_ends_although_shorter_ones_keep_coming() -> None:
    driver = Driver(budget=8)
    long = driver.add(prompt(40), due=20, max_tokens=1)
    for number in range(40):
        driver.add(prompt(8), due=number, max_tokens=1, salt=str(number))
        driver.step()
        if long.finished:
            return
    raise AssertionError("the long prompt starved")


def test_the_sequence_that_is_due_last_is_preempted_whenever_it_came() -> None:
    driver = Driver(blocks=4, block_size=4)
    late = driver.add(prompt(6), max_tokens=8, due=2, salt="a")
    early = driver.add(prompt(6), max_tokens=8, due=1, salt="b")
    driver.run_until(lambda: driver.scheduler.num_preemptions > 0)
    assert driver.scheduler.waiting == [late]
    driver.run()
    assert early.num_output == late.num_output == 8


def test_the_sequence_that_is_due_first_takes_room_in_the_encoder_cache_whenever_it_came() -> None:
    driver = Driver(cache_rows=4, budget=2)
    late = driver.add(prompt(2, ("a", 4), 1), max_tokens=1, due=2)
    early = driver.add(prompt(2, ("b", 4), 1), max_tokens=1, due=1)
    for _ in range(2):
        driver.step()
    driver.stored = {"a", "b"}
    driver.run_until(lambda: early.finished)
    assert not late.finished
    driver.run()


def test_later_prompts_do_not_overtake_one_that_needs_blocks() -> None:
    driver = Driver(blocks=6, block_size=4)
    running = driver.add(prompt(11), max_tokens=4, due=0)
    driver.step()
    large = driver.add(prompt(16), max_tokens=1, due=1, salt="large")
    small = driver.add(prompt(2), max_tokens=1, due=2, salt="small")
    driver.run_until(lambda: running.finished)
    assert not small.was_scheduled
    driver.run_until(lambda: large.finished)
    driver.run()


def test_prefill_chunks_have_a_limit_in_steps_without_decodes_too() -> None:
    driver = Driver(budget=32, max_prefill=16, mixed=8)
    driver.add(prompt(40), max_tokens=1)
    assert [chunks(driver.step()) for _ in range(3)] == [[(0, 16)], [(16, 32)], [(32, 40)]]


def test_the_end_of_a_prompt_gets_no_step_of_its_own_if_it_is_short() -> None:
    driver = Driver(max_prefill=16, max_rest=4)
    driver.add(prompt(20), max_tokens=1)
    assert chunks(driver.step()) == [(0, 20)]
    driver.add(prompt(21), salt="other", max_tokens=1)
    assert [chunks(driver.step()) for _ in range(2)] == [[(0, 16)], [(16, 21)]]
    driver.add(prompt(10), salt="third", max_tokens=1)
    driver.add(prompt(10), salt="fourth", max_tokens=1)
    driver.add(prompt(10), salt="fifth", max_tokens=1)
    assert [chunks(driver.step()) for _ in range(2)] == [[(0, 10), (0, 10)], [(0, 10)]]


def test_nor_does_the_last_of_what_can_run_before_an_embedding_is_there() -> None:
    driver = Driver(max_prefill=16, max_rest=4)
    driver.add(prompt(3, ("a", 16), ("b", 16)), max_tokens=1)
    driver.stored.add("a")
    assert chunks(driver.step()) == [(0, 19)]
    driver.stored.add("b")
    assert chunks(driver.step()) == [(19, 35)]


def test_running_streams_do_not_wait_for_the_end_of_a_prompt() -> None:
    driver = Driver(mixed=16, max_rest=4)
    driver.add(prompt(4), max_tokens=9)
    driver.step()
    driver.add(prompt(20), salt="other")
    assert chunks(driver.step()) == [(0, 16)]


def test_a_step_never_has_more_rows_than_the_engine_can_take() -> None:
    driver = Driver(budget=18, max_prefill=16, max_rest=4)
    driver.add(prompt(20), max_tokens=1)
    assert [chunks(driver.step()) for _ in range(2)] == [[(0, 16)], [(16, 20)]]
    driver.add(prompt(18), salt="other", max_tokens=1)
    assert chunks(driver.step()) == [(0, 18)]


# ---- prefix cache -------------------------------------------------------------------------------------------------------


def test_a_repeated_prompt_computes_only_what_follows_its_full_blocks() -> None:
    driver = Driver(block_size=4)
    driver.add(prompt(10), max_tokens=1)
    driver.run()
    again = driver.add(prompt(10), max_tokens=1)
    assert chunks(driver.step()) == [(8, 10)]
    assert again.num_cached == 8


def test_the_last_token_is_computed_even_if_all_blocks_are_known() -> None:
    driver = Driver(block_size=4)
    driver.add(prompt(8), max_tokens=1)
    driver.run()
    driver.add(prompt(8), max_tokens=1)
    assert chunks(driver.step()) == [(4, 8)]


def test_a_cached_item_needs_no_embedding() -> None:
    driver = Driver(block_size=4)
    driver.stored = {"a"}
    driver.add(prompt(2, ("a", 4), 6), max_tokens=1)
    driver.run()
    driver.scheduler.encoder_cache.remove("a")
    driver.stored = set()
    driver.add(prompt(2, ("a", 4), 6), max_tokens=1)
    assert chunks(driver.step()) == [(8, 12)]


def test_an_image_is_not_waited_for_once_an_answer_has_completed_its_last_block() -> None:
    """The block of the image's end is full only with tokens of the answer, which the waiting prompt repeats."""
    driver = Driver(max_num_seqs=1, min_text_before_item=8)
    driver.stored = {"a"}
    question = prompt(2, ("a", 4), 1)
    answered = driver.add(question, max_tokens=4)
    driver.run_until(lambda: answered.num_output == 1)
    history = Prompt([*question.token_ids, *range(1000, 1004), 7], question.items)
    driver.stored = set()
    driver.scheduler.item_lost("a")
    follow_up = driver.add(history, max_tokens=1, due=1.0)
    driver.run_until(lambda: answered.finished)
    assert not driver.scheduler.items.is_stalled(follow_up)
    driver.run()


def test_another_image_at_the_same_place_is_not_taken_for_the_cached_one() -> None:
    driver = Driver(block_size=4)
    driver.stored = {"a", "b"}
    driver.add(prompt(4, ("a", 4), 6), max_tokens=1)
    driver.run()
    driver.add(prompt(4, ("b", 4), 6), max_tokens=1)
    assert chunks(driver.step()) == [(4, 14)]


def test_further_choices_wait_for_the_first_and_share_its_prompt() -> None:
    driver = Driver(block_size=4)
    driver.add(prompt(9), max_tokens=2, choices=3)
    assert chunks(driver.step()) == [(0, 9)]
    step = driver.step()
    assert chunks(step) == [(8, 9), (8, 9)]
    assert len(step.decodes) == 1
    driver.run()
    assert driver.nothing_is_left()


def test_further_choices_continue_when_the_first_is_cancelled() -> None:
    driver = Driver()
    first = driver.add(prompt(9, ("late", 4)), choices=2)
    driver.step()
    driver.scheduler.finish(first)
    driver.stored = {"late"}
    driver.run()


# ---- late embeddings ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_up_to_the_first_missing_item_and_continues_when_it_arrives() -> None:
    driver = Driver()
    sequence = driver.add(prompt(5, ("a", 4), 3), max_tokens=1)
    assert chunks(driver.step()) == [(0, 5)]
    assert driver.scheduler.items.is_stalled(sequence)
    assert driver.step().scheduled == []
    driver.stored.add("a")
    assert chunks(driver.step()) == [(5, 12)]
    assert driver.nothing_is_left()


def test_items_that_arrive_in_order_overlap_with_prefill() -> None:
    driver = Driver()
    driver.add(prompt(1, ("a", 4), 1, ("b", 4), 1, ("c", 4), 1), max_tokens=1)
    seen = [chunks(driver.step())]
    for name in "abc":
        driver.stored.add(name)
        seen.append(chunks(driver.step()))
    assert seen == [[(0, 1)], [(1, 6)], [(6, 11)], [(11, 16)]]


def test_an_item_that_arrives_before_its_predecessor_waits_its_turn() -> None:
    driver = Driver()
    driver.add(prompt(1, ("a", 4), ("b", 4), 2), max_tokens=1)
    driver.step()
    driver.stored.add("b")
    assert driver.step().scheduled == []
    assert "b" not in driver.scheduler.encoder_cache, "room is for what is needed next"
    driver.stored.add("a")
    assert chunks(driver.step()) == [(1, 11)]


def test_little_text_before_a_missing_item_waits_for_it_and_runs_in_the_same_step() -> None:
    driver = Driver(min_text_before_item=4)
    sequence = driver.add(prompt(3, ("a", 4), 2))
    assert not driver.step().scheduled
    driver.stored.add("a")
    driver.step()
    assert sequence.prompt_computed


def test_little_text_waits_for_its_item_and_runs_then_even_if_a_step_has_fewer_rows() -> None:
    driver = Driver(min_text_before_item=8, budget=4)
    driver.add(prompt(4, ("a", 4), 2), max_tokens=1)
    assert not driver.step().scheduled
    driver.stored.add("a")
    assert [chunks(driver.step()) for _ in range(3)] == [[(0, 4)], [(4, 8)], [(8, 10)]]


def test_much_text_before_a_missing_item_runs_without_it() -> None:
    driver = Driver(min_text_before_item=4)
    sequence = driver.add(prompt(4, ("a", 4), 2))
    driver.step()
    assert sequence.num_computed == 4


def test_little_text_between_items_runs_so_that_the_first_item_makes_room_for_the_second() -> None:
    driver = Driver(min_text_before_item=8, cache_rows=4)
    driver.stored |= {"a", "b"}
    driver.add(prompt(2, ("a", 4), 2, ("b", 4), 2))
    driver.run()


def test_a_prompt_that_begins_with_a_missing_item_holds_nothing() -> None:
    driver = Driver()
    sequence = driver.add(prompt(("a", 4), 2), max_tokens=1)
    assert driver.step().scheduled == []
    assert sequence.block_ids == []
    driver.stored.add("a")
    driver.run()


def test_a_stalled_request_delays_nobody() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add(prompt(3, ("never", 4), 2))
    driver.step()
    text = driver.add(prompt(6), max_tokens=2, salt="text")
    driver.step()
    driver.step()
    assert text.finished


def calls_of_a_step(*, stalled: int, min_text: int) -> int:
    """How many functions are called in a step of a text stream beside so many requests that wait for an embedding.

    With a ``min_text`` above 3, they wait to run; otherwise they hold blocks.
    """
    driver = Driver(
        max_queued=300, min_text_before_item=min_text, blocks=400, budget=1000, max_prefill=1000, mixed=1000
    )
    for number in range(stalled):
        driver.add(prompt(3, (f"image {number}", 4), 2))
    driver.add(prompt(3), max_tokens=100)
    for _ in range(30):
        driver.step()
    assert len(driver.scheduler.running) == 1 + (stalled if min_text == 0 else 0)
    return calls_of_planning(driver)


def calls_of_planning(driver: Driver) -> int:
    """How many functions are called to load what is wanted and to plan a step, while nothing has changed."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    looks = driver.looks
    sys.setprofile(count)
    try:
        driver.load()
        driver.scheduler.schedule()
    finally:
        sys.setprofile(None)
    assert driver.looks == looks
    return calls


@pytest.mark.parametrize("min_text", [0, 8])
def test_requests_that_wait_cost_a_step_nothing_while_nothing_changes(min_text: int) -> None:
    assert calls_of_a_step(stalled=256, min_text=min_text) == calls_of_a_step(stalled=1, min_text=min_text)


def calls_while_short(of: str, waiting: int) -> int:
    """How many functions are called to plan a step while so many requests wait for rows, places or blocks."""
    if of == "rows":
        driver = Driver(max_queued=2000, blocks=2000, max_prefill=4)
        driver.add(prompt(900), max_tokens=1)
    elif of == "places":
        driver = Driver(max_queued=2000, blocks=2000, max_num_seqs=2)
        for number in range(2):
            driver.add(prompt(4), salt=str(number), max_tokens=900)
    else:
        driver = Driver(max_queued=2000, blocks=12)
        driver.add(prompt(40), max_tokens=20)
    driver.step()
    for number in range(waiting):
        name = f"image {number}"
        if number % 2:
            driver.stored.add(name)
        driver.add(prompt(33, (name, 4), 3), due=1.0, key=str(number % 3), salt="waits")
    for _ in range(3):
        driver.step()
    assert len(driver.scheduler.waiting) == waiting
    return calls_of_planning(driver)


@pytest.mark.parametrize("of", ["rows", "places", "blocks"])
def test_requests_that_wait_because_something_is_short_cost_a_step_nothing_while_nothing_changes(of: str) -> None:
    assert calls_while_short(of, 256) == calls_while_short(of, 8)


def test_the_same_item_twice_in_a_prompt_is_loaded_once_and_kept_until_its_last_place() -> None:
    driver = Driver(budget=6)
    driver.stored = {"a"}
    sequence = driver.add(prompt(1, ("a", 4), 3, ("a", 4), 1), max_tokens=1)
    driver.step()
    assert sequence.num_computed == 6
    assert sequence.held == {"a"}
    driver.stored = set()
    driver.run()
    assert driver.nothing_is_left()


def test_an_item_that_is_needed_again_only_after_a_missing_one_keeps_no_room() -> None:
    driver = Driver(cache_rows=4)
    driver.stored = {"a"}
    first = driver.add(prompt(("a", 4), ("late", 4), ("a", 4)), max_tokens=1)
    driver.run_until(lambda: driver.scheduler.items.is_stalled(first))
    driver.stored.add("b")
    other = driver.add(prompt(("b", 4), 1), max_tokens=1)
    driver.run_until(lambda: other.finished, limit=4)
    driver.stored.add("late")
    driver.run()


def test_an_item_behind_long_text_that_another_request_computes_meanwhile_is_looked_for() -> None:
    driver = Driver(max_num_seqs=1, budget=16, max_prefill=16, min_text_before_item=8)
    driver.stored = {"a"}
    driver.add(prompt(41), max_tokens=1)
    late = driver.add(prompt(40, ("a", 4), 1), max_tokens=1, due=1.0)
    driver.run_until(lambda: late.finished, limit=10)


def test_two_requests_for_one_missing_item_both_continue_when_it_arrives() -> None:
    driver = Driver()
    driver.add(prompt(2, ("a", 4), 1), max_tokens=1)
    driver.add(prompt(3, ("a", 4), 1), max_tokens=1)
    driver.step()
    driver.stored.add("a")
    assert len(driver.step().prefills) == 2


def test_an_item_may_be_split_by_the_budget() -> None:
    driver = Driver(budget=4)
    driver.stored = {"a"}
    driver.add(prompt(2, ("a", 6), 1), max_tokens=1)
    assert [chunks(driver.step()) for _ in range(3)] == [[(0, 4)], [(4, 8)], [(8, 9)]]


def test_an_item_lost_after_it_was_found_is_waited_for_again() -> None:
    driver = Driver()
    sequence = driver.add(prompt(2, ("a", 4), 1), max_tokens=1)
    driver.stored.add("a")
    driver.load()
    driver.scheduler.item_lost("a")
    driver.stored.clear()
    assert chunks(driver.step()) == [(0, 2)]
    assert driver.scheduler.items.is_stalled(sequence)
    driver.stored.add("a")
    driver.run()
    assert driver.nothing_is_left()


def test_an_encoder_cache_of_one_item_serves_a_request_of_several() -> None:
    driver = Driver(cache_rows=4)
    driver.stored = {"a", "b", "c"}
    driver.add(prompt(1, ("a", 4), ("b", 4), ("c", 4), 1), max_tokens=1)
    driver.run()
    assert driver.nothing_is_left()


def test_an_older_request_continues_when_a_younger_one_fills_the_encoder_cache() -> None:
    driver = Driver(cache_rows=4)
    old = driver.add(prompt(2, ("a", 4), 1), max_tokens=1)
    driver.step()
    driver.stored = {"b"}
    young = driver.add(prompt(("b", 4), ("c", 4), 1), max_tokens=1)
    driver.load()
    assert "b" in driver.scheduler.encoder_cache
    driver.stored.add("a")
    driver.step()
    assert old.finished
    driver.stored.add("c")
    driver.run()
    assert young.finished


def test_cancelling_a_request_at_any_point_frees_all_that_it_holds() -> None:
    for steps in range(4):
        driver = Driver(budget=4)
        driver.stored = {"a"}
        sequence = driver.add(prompt(3, ("a", 4), 2))
        for _ in range(steps):
            driver.step()
        driver.scheduler.finish(sequence)
        driver.scheduler.finish(sequence)
        assert driver.nothing_is_left()


# ---- who gives way to whom ----------------------------------------------------------------------------------------------


def test_a_prompt_that_waits_for_an_image_takes_no_rows_from_one_that_can_run() -> None:
    driver = Driver(max_prefill=8)
    waits = driver.add(prompt(12, ("late", 4)), due=1)
    text = driver.add(prompt(6), due=2, salt="text")
    step = driver.step()
    assert [part.sequence for part in step.prefills] == [text, waits]
    assert chunks(step) == [(0, 6), (0, 2)]


def test_a_prompt_whose_prefill_has_begun_takes_no_rows_while_an_image_is_missing() -> None:
    driver = Driver(max_prefill=8)
    driver.add(prompt(20, ("late", 4)), due=1)
    driver.step()
    text = driver.add(prompt(8), due=2, salt="text")
    assert [part.sequence for part in driver.step().prefills] == [text]


def test_a_prompt_goes_in_its_order_again_once_its_images_are_there() -> None:
    driver = Driver(budget=8)
    first = driver.add(prompt(4, ("a", 4), 2), due=1)
    driver.add(prompt(6), due=2, salt="text")
    driver.stored.add("a")
    assert driver.step().prefills[0].sequence is first


def test_a_prompt_with_more_images_than_the_encoder_cache_holds_goes_in_its_order() -> None:
    driver = Driver(budget=6, cache_rows=4)
    driver.stored = {"a", "b"}
    first = driver.add(prompt(2, ("a", 4), ("b", 4)), max_tokens=1, due=1)
    for number in range(9):
        driver.add(prompt(6), max_tokens=1, due=2 + number, salt=str(number))
    driver.step()
    driver.step()
    assert first.finished


def test_a_prompt_that_can_run_takes_blocks_from_one_that_will_have_to_wait() -> None:
    driver = Driver(budget=8, blocks=4, block_size=4)
    waits = driver.add(prompt(14, ("late", 2)), max_tokens=1, due=1)
    driver.step()
    text = driver.add(prompt(12), max_tokens=1, due=2, salt="text")
    driver.run_until(lambda: text.finished)
    driver.stored.add("late")
    driver.run()
    assert waits.finished


def test_prompts_that_wait_for_images_do_not_take_blocks_from_each_other_in_turn() -> None:
    driver = Driver(blocks=4, block_size=4)
    for number, name in enumerate("abc"):
        driver.add(prompt(10, (name, 2)), max_tokens=1, due=number, salt=name)
    for _ in range(9):
        driver.step()
    assert driver.scheduler.num_preemptions == 0
    driver.stored = set("abc")
    driver.run()


def test_prompts_whose_images_are_far_off_do_not_take_blocks_from_each_other_in_turn() -> None:
    driver = Driver(budget=8, blocks=6, block_size=4)
    for name in "ab":
        driver.add(prompt(16, (name, 4)), max_tokens=1, salt=name)
    for _ in range(9):
        driver.step()
    assert driver.scheduler.num_preemptions == 0
    driver.stored = set("ab")
    driver.run()


def test_a_prompt_with_more_images_than_there_is_room_for_and_text_do_not_take_blocks_from_each_other_in_turn() -> None:
    driver = Driver(budget=7, blocks=6, block_size=4, cache_rows=12, max_finished=1)
    for salt in ("", "other"):
        driver.add(prompt(("a", 10), ("b", 4), ("c", 3), 1), max_tokens=1, salt=salt)
    driver.add(prompt(("b", 4), ("c", 3), ("d", 6), 1), max_tokens=1)
    driver.add(prompt(16), max_tokens=1)
    driver.run(limit=60)
    assert driver.nothing_is_left()


def test_text_gets_the_blocks_that_it_lacks_from_a_prompt_with_more_images_than_there_is_room_for() -> None:
    driver = Driver(max_prefill=5, blocks=3, block_size=8, cache_rows=4)
    driver.stored = {"a", "b", "c"}
    text = driver.add(prompt(9), max_tokens=1, due=2, salt="text")
    driver.step()
    images = driver.add(prompt(11, ("a", 3), ("b", 3), ("c", 4), 1), max_tokens=1, due=1)
    driver.run_until(lambda: text.finished, limit=10)
    assert not images.finished
    driver.run()


# ---- preemption ---------------------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_when_blocks_run_out_and_is_recomputed() -> None:
    driver = Driver(blocks=4, block_size=4)
    old = driver.add(prompt(6), max_tokens=8, salt="a")
    young = driver.add(prompt(6), max_tokens=8, salt="b")
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    assert old.num_output == young.num_output == 8
    assert driver.nothing_is_left()


def test_a_stalled_request_is_preempted_before_one_that_runs() -> None:
    driver = Driver(blocks=4, block_size=4)
    stalled = driver.add(prompt(8, ("late", 4)), max_tokens=1)
    driver.step()
    running = driver.add(prompt(6), max_tokens=6, salt="b")
    while not running.finished:
        driver.step()
    assert stalled in driver.scheduler.waiting or stalled in driver.scheduler.running
    driver.stored.add("late")
    driver.run()


def test_stalled_requests_give_up_their_blocks_for_text() -> None:
    driver = Driver(blocks=4, block_size=4)
    driver.add(prompt(12, ("late", 2)), max_tokens=1)
    driver.step()
    text = driver.add(prompt(10), max_tokens=1, salt="text")
    driver.step()
    assert text.finished


def test_a_preempted_sequence_keeps_its_tokens() -> None:
    driver = Driver(blocks=4, block_size=4)
    driver.add(prompt(6), max_tokens=10, salt="a")
    young = driver.add(prompt(6), max_tokens=10, salt="b")
    tokens: list[int] = []
    while not young.finished:
        driver.step()
        assert young.token_ids[: len(tokens)] == tokens
        tokens = list(young.token_ids)


# ---- an encoder beside the scheduler (aggregated) ---------------------------------------------------------------------------


def test_an_image_is_encoded_beside_the_prefill_of_what_comes_before_it() -> None:
    driver = Driver(max_finished=2)
    driver.add(prompt(2, ("a", 4), 6, ("b", 4), 1), max_tokens=1)
    seen = [(chunks(driver.step()), "".join(driver.encoded)) for _ in range(3)]
    assert seen == [([(0, 2)], "a"), ([(2, 12)], "ab"), ([(12, 17)], "ab")]


def test_an_image_that_several_places_need_is_encoded_once() -> None:
    driver = Driver(max_finished=2)
    driver.add(prompt(1, ("a", 4), 2, ("a", 4)), max_tokens=1)
    driver.add(prompt(2, ("a", 4)), max_tokens=1)
    driver.run()
    assert driver.encoded == ["a"]


def test_images_are_encoded_in_order_of_due() -> None:
    driver = Driver(max_finished=2)
    driver.add(prompt(1, ("a", 4), ("b", 4)), max_tokens=1, due=2)
    driver.add(prompt(2, ("c", 4)), max_tokens=1, due=1)
    driver.run()
    assert driver.encoded == ["c", "a", "b"]


def test_an_image_in_memory_is_not_encoded_again() -> None:
    driver = Driver(max_finished=2)
    driver.add(prompt(1, ("a", 4), 1), max_tokens=1)
    driver.run()
    driver.add(prompt(2, ("a", 4), 1), max_tokens=1)
    driver.run()
    assert driver.encoded == ["a"]


def test_images_of_a_request_that_ended_are_not_encoded() -> None:
    driver = Driver(max_finished=2)
    driver.scheduler.finish(driver.add(prompt(1, ("a", 4), 1)))
    assert driver.scheduler.items_to_encode() == []


def test_entries_that_find_no_room_do_not_keep_a_running_prompt_from_its_image() -> None:
    driver = Driver(max_finished=1, cache_rows=4, max_num_seqs=1)
    running = driver.add(prompt(1, ("a", 4), 1, ("b", 4), 1), max_tokens=1, due=9)
    driver.step()
    waiting = driver.add(prompt(("c", 4), 1), max_tokens=1, due=1)
    driver.run_until(lambda: running.finished)
    driver.run()
    assert waiting.finished


def test_a_finished_entry_without_room_makes_place_for_a_more_urgent_item() -> None:
    assert choose(["a", "b", "c"], {"b", "c"}, limit=2) == ("a", "c")
    assert choose(["a", "b", "c"], {"a", "b"}, limit=2) == (None, None)
    assert choose(["a", "b", "c"], {"b"}, limit=2) == ("a", None)
    assert choose(["a"], {"a"}, limit=2) == (None, None)


def test_an_encoder_cache_of_one_item_serves_requests_of_several_that_are_encoded_here() -> None:
    driver = Driver(max_finished=2, cache_rows=4)
    driver.add(prompt(1, ("a", 4), ("b", 4), ("c", 4), 1), max_tokens=2)
    driver.run()
    assert driver.encoded == ["a", "b", "c"]


# ---- everything at once -----------------------------------------------------------------------------------------------------

parts = st.lists(
    st.one_of(st.integers(1, 9), st.tuples(st.sampled_from("abcdef"), st.just(4))), min_size=1, max_size=6
).filter(lambda parts: 0 < len(prompt(*parts).token_ids) <= 30)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(parts, st.integers(1, 6), st.integers(1, 2), st.integers(0, 5)), min_size=1, max_size=8
    ),
    budget=st.integers(2, 24),
    max_prefill=st.integers(2, 24),
    max_rest=st.integers(0, 6),
    blocks=st.integers(10, 20),
    cache_rows=st.integers(4, 24),
    arrivals=st.permutations("abcdef"),
    cancelled=st.sets(st.integers(0, 7)),
    max_finished=st.integers(0, 3),
    max_num_seqs=st.sampled_from([1, 2, 16]),
)
def test_any_order_of_events_lets_all_requests_end_and_frees_everything(
    requests: list[tuple[list[int | tuple[str, int]], int, int, int]],
    budget: int,
    max_prefill: int,
    max_rest: int,
    blocks: int,
    cache_rows: int,
    arrivals: list[str],
    cancelled: set[int],
    max_finished: int,
    max_num_seqs: int,
) -> None:
    driver = Driver(
        budget=budget,
        max_prefill=max_prefill,
        max_rest=max_rest,
        blocks=blocks,
        cache_rows=cache_rows,
        max_finished=max_finished,
        max_num_seqs=max_num_seqs,
    )
    for number, (request, max_tokens, choices, due) in enumerate(requests):
        driver.add(prompt(*request), max_tokens=max_tokens, choices=choices, due=due, salt=str(number % 3))
        driver.step()
    for name in arrivals:
        if not max_finished:
            driver.stored.add(name)
        driver.step()
    for number in cancelled:
        if number < len(driver.sequences):
            driver.scheduler.finish(driver.sequences[number])
    driver.run()
    assert driver.nothing_is_left()
    for number, sequence in enumerate(driver.sequences):
        assert number in cancelled or sequence.num_output == sequence.sampling.max_tokens


late_parts = st.lists(
    st.one_of(st.integers(1, 9), st.tuples(st.sampled_from(["a", "b", "c", "never 1", "never 2"]), st.just(4))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(late_parts, st.integers(1, 3), st.integers(0, 5), st.sampled_from(["", "x", "y"])),
        min_size=1,
        max_size=10,
    ),
    budget=st.integers(4, 24),
    min_text=st.sampled_from([0, 8]),
    cache_rows=st.integers(4, 24),
    arrivals=st.permutations("abc"),
    max_num_seqs=st.sampled_from([1, 2, 16]),
)
def test_whatever_waits_for_embeddings_that_never_come_lets_all_others_end(
    requests: list[tuple[list[int | tuple[str, int]], int, int, str]],
    budget: int,
    min_text: int,
    cache_rows: int,
    arrivals: list[str],
    max_num_seqs: int,
) -> None:
    driver = Driver(
        budget=budget,
        min_text_before_item=min_text,
        blocks=128,
        cache_rows=cache_rows,
        max_num_seqs=max_num_seqs,
    )
    for number, (request, max_tokens, due, key) in enumerate(requests):
        driver.add(prompt(*request), max_tokens=max_tokens, due=due, key=key, salt=str(number % 3))
        driver.step()
    for name in arrivals:
        driver.stored.add(name)
        driver.step()
    stuck = [
        sequence for sequence in driver.sequences if any(item.identifier.startswith("never") for item in sequence.items)
    ]
    driver.run_until(lambda: all(sequence.finished for sequence in driver.sequences if sequence not in stuck))
    driver.stored.update(["never 1", "never 2"])
    driver.run()
    assert driver.nothing_is_left()
