"""Blocks of the KV cache: allocation, sharing by prefix, reuse."""

from chiasm.engine.block_manager import BlockHasher, BlockManager
from chiasm.models.base import ItemGeometry, PromptItem


def item(identifier: str, offset: int, length: int = 4, **metadata: list[int]) -> PromptItem:
    geometry = ItemGeometry((9,) * length, tuple(range(length)), metadata or {"image_grid_thw": [1, 4, 4]})
    return PromptItem(identifier, offset, length, geometry)


def hashes(tokens: list[int], items: list[PromptItem] | None = None, salt: str = "") -> list[bytes]:
    return list(BlockHasher(4, items or [], salt).hashes(tokens))


def test_blocks_for_rounds_up() -> None:
    blocks = BlockManager(8, 4)
    assert [blocks.blocks_for(tokens) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_remembered_block_is_found_after_its_release() -> None:
    blocks = BlockManager(4, 4)
    names = hashes(list(range(8)))
    taken = blocks.allocate(2)
    for block, name in zip(taken, names, strict=True):
        blocks.remember(block, name)
    blocks.release(taken)
    assert blocks.num_free == 4
    assert blocks.find(names) == taken


def test_a_shared_block_is_free_only_when_all_have_released_it() -> None:
    blocks = BlockManager(4, 4)
    names = hashes(list(range(4)))
    taken = blocks.allocate(1)
    blocks.remember(taken[0], names[0])
    blocks.share(blocks.find(names))
    blocks.release(taken)
    assert blocks.num_free == 3
    blocks.release(taken)
    assert blocks.num_free == 4


def test_sharing_a_free_block_takes_it_off_the_free_list() -> None:
    blocks = BlockManager(2, 4)
    names = hashes(list(range(4)))
    taken = blocks.allocate(1)
    blocks.remember(taken[0], names[0])
    blocks.release(taken)
    assert blocks.num_free_after_sharing(taken) == 1
    blocks.share(taken)
    assert blocks.num_free == 1


def test_a_block_handed_out_again_is_no_longer_found_under_its_old_content() -> None:
    blocks = BlockManager(1, 4)
    names = hashes(list(range(4)))
    taken = blocks.allocate(1)
    blocks.remember(taken[0], names[0])
    blocks.release(taken)
    blocks.allocate(1)
    assert blocks.find(names) == []


def test_the_end_of_a_released_sequence_is_reused_before_its_beginning() -> None:
    blocks = BlockManager(3, 4)
    names = hashes(list(range(12)))
    taken = blocks.allocate(3)
    for block, name in zip(taken, names, strict=True):
        blocks.remember(block, name)
    blocks.release(taken)
    blocks.allocate(1)
    assert blocks.find(names) == taken[:2]


def test_find_stops_at_the_first_unknown_block() -> None:
    blocks = BlockManager(3, 4)
    names = hashes(list(range(12)))
    taken = blocks.allocate(3)
    blocks.remember(taken[0], names[0])
    blocks.remember(taken[2], names[2])
    assert blocks.find(names) == taken[:1]


def test_a_block_hash_depends_on_everything_before_it() -> None:
    assert hashes([1, 2, 3, 4, 5, 6, 7, 8])[1] != hashes([0, 2, 3, 4, 5, 6, 7, 8])[1]


def test_two_images_behind_the_same_placeholders_have_different_blocks() -> None:
    tokens = [1, 9, 9, 9, 9, 2, 3, 4]
    assert hashes(tokens, [item("a" * 64, 1)]) != hashes(tokens, [item("b" * 64, 1)])
    assert hashes(tokens, [item("a" * 64, 1)]) == hashes(tokens, [item("a" * 64, 1)])


def test_one_image_in_two_shapes_has_different_blocks() -> None:
    tokens = [1, 9, 9, 9, 9, 2, 3, 4]
    wide, tall = item("a" * 64, 1, image_grid_thw=[1, 2, 8]), item("a" * 64, 1, image_grid_thw=[1, 8, 2])
    assert hashes(tokens, [wide]) != hashes(tokens, [tall])


def test_blocks_before_an_image_are_shared_by_prompts_that_differ_in_it() -> None:
    tokens = [1, 2, 3, 4, 9, 9, 9, 9]
    first, second = hashes(tokens, [item("a" * 64, 4)]), hashes(tokens, [item("b" * 64, 4)])
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_salts_share_nothing() -> None:
    assert hashes([1, 2, 3, 4], salt="one") != hashes([1, 2, 3, 4], salt="two")


def test_hashes_grow_with_the_sequence() -> None:
    hasher = BlockHasher(4, [], "")
    assert len(hasher.hashes([1, 2, 3])) == 0
    assert len(hasher.hashes([1, 2, 3, 4, 5])) == 1
    assert hasher.hashes([1, 2, 3, 4, 5, 6, 7, 8]) == hashes([1, 2, 3, 4, 5, 6, 7, 8])
