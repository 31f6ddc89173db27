"""One continuation of one prompt, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import TYPE_CHECKING

from chiasm.engine.block_manager import BlockHash, BlockHasher

if TYPE_CHECKING:
    from chiasm.engine.grammar import Grammar
    from chiasm.engine.request import SamplingParams
    from chiasm.models.base import Prompt, PromptItem


class Sequence:
    """Tokens, blocks and progress of one choice of a request. Only the scheduler changes its progress."""

    def __init__(
        self,
        *,
        request_id: str,
        index: int,
        arrival: int,
        part_of: str = "",
        key: str = "",
        due: float = 0.0,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int,
        block_size: int,
        cache_salt: str = "",
        hasher: BlockHasher | None = None,
        leader: Sequence | None = None,
        output_token_ids: AbstractSequence[int] = (),
        num_remote: int = 0,
    ) -> None:
        """``hasher`` is one of this sequence that has hashed its first tokens already; without it, they are hashed here."""
        self.request_id = request_id
        self.index = index
        self.sequence_id = f"{request_id}/{index}"
        self.part_of = part_of or request_id
        """Names the client's request, of which this is one of all continuations of all prompts."""
        self.key = key
        """Names the client's key; empty if there are none."""
        self.arrival = arrival
        """Number in order of arrival."""
        self.due = due
        """When its work should be done, on any clock that all sequences share (:mod:`chiasm.due`)."""
        self.prompt = prompt
        self.num_prompt = len(prompt.token_ids)
        self.sampling = sampling
        self.seed = seed
        self.leader = leader
        """The request's first choice; the others wait for its prefill, to share its blocks."""
        self.token_ids: list[int] = [*prompt.token_ids, *output_token_ids]
        self.block_ids: list[int] = []
        self.num_computed = 0
        """Number of tokens whose keys and values are in the blocks."""
        self.num_cached = 0
        """Prompt tokens that the prefix cache held when the sequence was first scheduled."""
        self.num_remote = num_remote
        """Number of tokens, from the first, whose KV is still to come from another instance, or from where it was set aside."""
        self.is_set_aside = False
        """Whether its blocks were taken, and the KV that can't be computed again is kept elsewhere in this instance."""
        self.was_scheduled = False
        self.is_running = False
        """Whether it is among those that run: admitted, and neither preempted nor at its end."""
        self.finished = False
        self.held: set[str] = set()
        """Identifiers of the entries that it holds in the encoder cache."""
        self._hasher = hasher or BlockHasher(block_size, prompt.items, cache_salt)

    @property
    def order(self) -> tuple[float, int]:
        """Its place among all sequences, which never changes: the lowest goes first."""
        return self.due, self.arrival

    @property
    def items(self) -> AbstractSequence[PromptItem]:
        return self.prompt.items

    @property
    def grammar(self) -> Grammar | None:
        return self.sampling.grammar

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def is_decoding(self) -> bool:
        """Whether all tokens but the last are computed, and the last was sampled."""
        return self.num_computed >= self.num_prompt and self.num_computed == len(self.token_ids) - 1

    @property
    def prompt_computed(self) -> bool:
        return self.num_computed >= self.num_prompt

    def block_hashes(self) -> list[BlockHash]:
        """Return the hashes of the full blocks of all tokens so far."""
        return self._hasher.hashes(self.token_ids)

    def digest(self, num_tokens: int) -> str:
        """Return hex that names the first ``num_tokens`` tokens, the items among them and the salt, equal in all instances."""
        return self._hasher.digest(self.token_ids[:num_tokens])

    def items_between(self, start: int, end: int) -> list[PromptItem]:
        """Return the items with a token in ``[start, end)``, in order."""
        return [item for item in self.prompt.items if item.offset < end and item.offset + item.length > start]
