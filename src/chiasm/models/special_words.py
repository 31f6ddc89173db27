"""Words that a tokenizer reads as one token with a meaning of its own, such as the end of a turn or the place of an image.

Only a chat template may write them. In a client's text they are text like any other: a :class:`Disguise` hides them while the
template is rendered, and :meth:`SpecialWords.encode` tokenizes the result as a whole, so that what stands beside them is
tokenized as ever.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

_LEAD = "\U0010fffe"
"""Begins the private names; no character of any language."""
_FIRST_COVER = 0xF0000
"""Covers are taken from here on, which is a plane of characters for private use."""


class SpecialWords:
    """The special words of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, others: Collection[int] = ()) -> None:
        """``others`` are token ids whose words count as special although the tokenizer doesn't mark them so."""
        tokens = {
            token_id: token
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or token_id in others
        }
        words = sorted((token.content for token in tokens.values()), key=len, reverse=True)
        self._pattern = _any_of(words)
        self._without_spaces = _any_of([_squeezed(word) for word in words])
        self.first_characters = frozenset(word[0] for word in words if not word[0].isalnum())
        # A twin of the tokenizer, which reads special words as text, and other names, which nobody can guess, as their tokens.
        secret = secrets.token_hex(8)
        self._names = {token.content: f"{_LEAD}{secret}{token_id}{_LEAD}" for token_id, token in tokens.items()}
        self._twin = Tokenizer.from_str(tokenizer.to_str())
        self._twin.add_special_tokens([AddedToken(token.content, special=True) for token in tokens.values()])
        self._twin.encode_special_tokens = True
        self._twin.add_tokens([_renamed(token, self._names[token.content]) for token in tokens.values()])
        self._ids = {self._twin.token_to_id(self._names[token.content]): token_id for token_id, token in tokens.items()}
        self._special_ids = frozenset(tokens)

    def find(self, text: str) -> list[str]:
        """Return the special words in a text, in order."""
        return self._pattern.findall(text)

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        """Return the text with each special word replaced by what ``replacement`` returns for it."""
        return self._pattern.sub(lambda match: replacement(match[0]), text)

    def may_come_of(self, texts: Iterable[str]) -> bool:
        """Whether a template that joins and strips these texts could write a special word."""
        return self._without_spaces.search(_squeezed("".join(texts))) is not None

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool,
        reveal: Callable[[str], str] = str,
        keep: Collection[str] = (),
    ) -> list[int] | None:
        """Return the token ids of a text some of whose special words are text: those in ``keep``, and those that ``reveal``
        makes readable again. None if the tokenizer can't read one of them as text.
        """
        named = self.replace(text, lambda word: word if word in keep else self._names[word])
        token_ids = self._twin.encode(reveal(named), add_special_tokens=add_special_tokens).ids
        own = sum(token_id in self._special_ids for token_id in token_ids)
        # The tokenizer itself may add some at both ends.
        if own > (self._twin.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0):
            return None
        return [self._ids.get(token_id, token_id) for token_id in token_ids]


class Disguise:
    """Stands for special words in the texts of one request: the first character of a word is covered by another one, which
    occurs in none of the texts."""

    def __init__(self, words: SpecialWords, texts: Iterable[str]) -> None:
        self._words = words
        taken = {character for text in texts for character in text if ord(character) >= _FIRST_COVER}
        free = (chr(code) for code in range(_FIRST_COVER, 0x10FFFE) if chr(code) not in taken)
        self._covers: dict[str, str] = {character: next(free) for character in sorted(words.first_characters)}
        self._free = free

    def hide(self, text: str) -> str:
        """Return the text without its special words."""
        return self._words.replace(text, lambda word: self._cover(word[0]) + word[1:])

    def hide_beginnings(self, text: str) -> str:
        """Return the text without any character with which a special word begins."""
        return self.hide(text).translate({ord(first): self._covers[first] for first in self._words.first_characters})

    def reveal(self, text: str) -> str:
        """Return what was hidden."""
        return text.translate({ord(cover): character for character, cover in self._covers.items()})

    def _cover(self, character: str) -> str:
        if character not in self._covers:
            self._covers[character] = next(self._free)
        return self._covers[character]


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """Return a pattern for any of the words; none of them is empty."""
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _renamed(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized
    )
