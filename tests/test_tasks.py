"""Tasks of asyncio that nobody awaits while they run."""

from __future__ import annotations

import asyncio

import pytest

from chiasm.tasks import Tasks, beside, end_tasks


async def for_ever() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise ValueError("no")


async def test_tasks_have_ended_after_end_tasks_whatever_they_do() -> None:
    tasks = [asyncio.create_task(for_ever()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    await end_tasks(*tasks)
    assert tasks[0].cancelled()
    assert isinstance(tasks[1].exception(), ValueError)


async def test_work_beside_a_block_ends_with_the_block() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await for_ever()
        finally:
            ended.set()

    async with beside(work()):
        await asyncio.sleep(0)
        assert not ended.is_set()
    assert ended.is_set()


async def test_what_work_beside_a_block_raises_is_raised_at_its_end() -> None:
    with pytest.raises(ValueError, match="no"):
        async with beside(fails()):
            await asyncio.sleep(0)


async def test_closing_tasks_ends_those_that_run_and_keeps_none() -> None:
    tasks = Tasks()
    running = tasks.start(for_ever())
    await tasks.start(asyncio.sleep(0))
    assert tasks
    await tasks.close()
    assert running.cancelled()
    assert not tasks
