"""Text that comes token by token, and the stop strings in it."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chiasm.engine.outputs import Detokenizer
from chiasm.engine.request import SamplingParams

BROKEN = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte, so that a character may take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def run(tokenizer: Tokenizer, text: str, prompt: str = "", **params: Any) -> tuple[list[str], str | None]:
    """Return the pieces of text that the tokens of ``text`` yield, and the stop string that ended them."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000, **params), tokenizer.encode(prompt).ids)
    pieces: list[str] = []
    for token_id in tokenizer.encode(text).ids:
        step = detokenizer.add(token_id)
        pieces.append(step.text)
        if step.stop is not None:
            return pieces, step.stop
    text, stop = detokenizer.finish()
    return [*pieces, text], stop


@pytest.mark.parametrize(
    "text", ["hello world", "naïve café", "日本語 🙂 x", " leading", f"a{BROKEN}", f"{BROKEN} b{BROKEN}{BROKEN}"]
)
def test_the_pieces_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces, stop = run(tokenizer, text)
    assert "".join(pieces) == text
    assert stop is None


def test_an_incomplete_character_is_held_back(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "é")
    assert pieces[0] == ""
    assert "".join(pieces) == "é"


def test_a_character_that_stays_incomplete_is_given_out_at_the_end_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one \N{SNOWMAN}").ids[:-1]
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000), [])
    pieces = [detokenizer.add(token_id).text for token_id in token_ids]
    assert "".join(pieces) == "one "
    assert detokenizer.finish().text == tokenizer.decode(token_ids).removeprefix("one ") == BROKEN


def test_no_token_is_lost_where_the_next_one_changes_how_earlier_ones_decode() -> None:
    tokens = ["<0xE2>", "<0x98>", "<0x83>", "b"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000), [])
    pieces = [detokenizer.add(token_id).text for token_id in (0, 1, 2, 0, 3)]
    assert "".join(pieces) == f"\N{SNOWMAN}{BROKEN}b"


def test_the_prompt_is_not_repeated(tokenizer: Tokenizer) -> None:
    assert "".join(run(tokenizer, " there", prompt="hello")[0]) == " there"


def test_a_prompt_that_ends_with_a_replacement_character_is_not_repeated(tokenizer: Tokenizer) -> None:
    assert "".join(run(tokenizer, " there", prompt=f"hello {BROKEN}")[0]) == " there"


def test_a_prompt_of_tokens_that_ends_within_a_character_is_not_repeated(tokenizer: Tokenizer) -> None:
    *prompt_token_ids, last_byte = tokenizer.encode("hello \N{SNOWMAN}").ids
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000), prompt_token_ids)
    pieces = [detokenizer.add(token_id).text for token_id in [last_byte, *tokenizer.encode(" there").ids]]
    assert "".join(pieces) == f"{BROKEN} there"


def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    pieces, stop = run(tokenizer, "one STOP two", stop=("STOP",))
    assert "".join(pieces) == "one "
    assert stop == "STOP"


def test_a_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    pieces, _ = run(tokenizer, "one STOP two", stop=("STOP",), include_stop_str_in_output=True)
    assert "".join(pieces) == "one STOP"


def test_text_that_may_become_a_stop_string_is_held_back_until_it_cannot(tokenizer: Tokenizer) -> None:
    pieces, stop = run(tokenizer, "a STOx", stop=("STOP",))
    assert pieces[:5] == ["a", " ", "", "", ""]
    assert "".join(pieces) == "a STOx"
    assert stop is None


def test_an_incomplete_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    assert "".join(run(tokenizer, "a STO", stop=("STOP",))[0]) == "a STO"


@pytest.mark.parametrize("text", [f"a{BROKEN}", f"a{BROKEN}b"])
def test_a_replacement_character_is_a_stop_string_also_at_the_end(tokenizer: Tokenizer, text: str) -> None:
    pieces, stop = run(tokenizer, text, stop=(BROKEN,))
    assert ("".join(pieces), stop) == ("a", BROKEN)


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    pieces, stop = run(tokenizer, "x one two", stop=("two", "one"))
    assert ("".join(pieces), stop) == ("x ", "one")


def test_no_stop_before_min_tokens(tokenizer: Tokenizer) -> None:
    pieces, stop = run(tokenizer, "abab", stop=("ab",), min_tokens=3)
    assert stop == "ab"
    assert len(pieces) == 4


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    assert "".join(run(tokenizer, "a<end>b")[0]) == "ab"
    assert "".join(run(tokenizer, "a<end>b", skip_special_tokens=False)[0]) == "a<end>b"


def test_tokens_that_complete_no_character_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    """Each would cost more than the one before, since all that are held are decoded again."""
    first_byte = tokenizer.encode("\N{SNOWMAN}").ids[0]
    detokenizer = Detokenizer(tokenizer, SamplingParams(max_tokens=1000), [])
    pieces = [detokenizer.add(first_byte).text for _ in range(64)]
    assert [len(piece) for piece in pieces if piece] == [16] * 4
    assert set("".join(pieces)) == {BROKEN}
    assert (
        "".join(detokenizer.add(token_id).text for token_id in tokenizer.encode("ok \N{SNOWMAN}").ids)
        == "ok \N{SNOWMAN}"
    )
