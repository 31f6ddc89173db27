"""What a reader wants and brings in, without sockets."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chiasm.ec_transfer.entry_file import HEADER_BYTES, EntryHeader
from chiasm.ec_transfer.offers import OfferTable
from chiasm.ec_transfer.peer_messages import Bad, Done, Forget, Here, Take, Want
from chiasm.ec_transfer.wants import MAX_PLACES, Read, Send, WantTable, Wish
from chiasm.wire import ECPlace

from .instance import identifier_of

HERE, THERE = (ECPlace(host="::1", port=port, engine_id="e") for port in (1, 2))
X, Y, Z = (identifier_of(name) for name in "xyz")


def table(capacity_bytes: int = 10) -> WantTable[str]:
    return WantTable(capacity_bytes, "5eed")


def here(name: str, size: int = 4, *, granted: bool = False) -> Here:
    return Here(name, 0, "U8", [size], "", granted)


def messages(wants: WantTable[str], place: ECPlace = HERE) -> list[object]:
    return [send.message for send in wants.take_sends() if send.place == place]


def arrive(wants: WantTable[str], name: str, size: int = 4, place: ECPlace = HERE) -> None:
    wants.here(place, here(name, size, granted=True))
    (read,) = wants.take_reads()
    wants.arrived(read, name)


def test_the_place_may_come_before_the_request_and_after_it() -> None:
    early, late = table(), table()
    early.expect({X: HERE})
    assert messages(early) == []
    early.want("r", [Wish(X, 4)])
    late.want("r", [Wish(X, 4)])
    late.expect({X: HERE})
    assert messages(early) == messages(late) == [Want(X, 0)]


def test_an_entry_is_coming_when_a_holder_has_it() -> None:
    wants = table()
    wants.want("r", [Wish(X, 4)])
    wants.expect({X: HERE})
    assert not wants.is_coming(X)
    wants.here(HERE, here(X))
    assert wants.is_coming(X)
    wants.gone(HERE, X)
    assert not wants.is_coming(X)


def test_once_the_size_of_a_row_is_known_room_is_given_in_advance() -> None:
    wants = table()
    wants.want("1", [Wish(X, 4)])
    wants.expect({X: HERE, Y: HERE})
    arrive(wants, X)
    wants.take_sends()
    wants.want("2", [Wish(Y, 5)])
    assert messages(wants) == [Want(Y, HEADER_BYTES + 5)]


def test_an_entry_of_known_size_is_granted_without_asking_again() -> None:
    wants = WantTable[str](10, "5eed", row_bytes=2)
    wants.want("r", [Wish(X, 4)])
    wants.expect({X: HERE})
    (want,) = wants.take_sends()
    offers = OfferTable[int](1, lambda num_bytes: 0, lambda piece: (0, 1), lambda piece: None, lambda piece: False)
    assert isinstance(want.message, Want)
    offers.want(1, X, want.message.room_bytes)
    header = EntryHeader(X, "5eed", "U8", (4, 2))
    offers.reserve(X, HEADER_BYTES + header.data_bytes)
    offers.publish(X, header)
    (notice,) = offers.take_notices()
    assert isinstance(notice.message, Here)
    assert notice.message.granted


def test_older_requests_get_room_first() -> None:
    wants = table(capacity_bytes=5)
    wants.want("1", [Wish(X, 4)])
    wants.want("2", [Wish(Y, 4)])
    wants.expect({X: HERE, Y: HERE})
    arrive(wants, X)
    wants.here(HERE, here(Y))
    assert Take(Y) not in messages(wants)
    wants.take(X)
    assert messages(wants) == [Take(Y)]


def test_what_is_needed_first_takes_the_room_of_what_is_ready() -> None:
    wants = table(capacity_bytes=5)
    wants.want("1", [Wish(X, 4)])
    wants.want("2", [Wish(Y, 4)])
    wants.expect({X: HERE, Y: HERE})
    arrive(wants, X)
    wants.here(HERE, here(Y))
    wants.take_sends()
    assert not wants.ask(Y)
    wants.end_round()
    assert wants.ready(X) is None
    assert Take(Y) in messages(wants)


def test_what_is_granted_after_its_room_has_gone_to_another_is_given_back_and_comes_later() -> None:
    wants = WantTable[str](10, "5eed", row_bytes=1)
    wants.expect({X: HERE, Y: HERE})
    wants.want("1", [Wish(X, 10)])
    wants.want("2", [Wish(Y, 10)])
    wants.ask(Y)
    wants.end_round()
    rooms = [message.room_bytes for message in messages(wants) if isinstance(message, Want)]
    assert rooms == [HEADER_BYTES + 10, 0]
    wants.here(HERE, here(Y, 10))
    (take,) = messages(wants)
    assert take == Take(Y)
    wants.here(HERE, here(X, 10, granted=True))
    assert messages(wants) == [Forget(X), Want(X)]
    assert wants.is_coming(X)
    arrive(wants, Y, 10)
    assert wants.held_bytes == 10
    wants.here(HERE, here(X, 10))
    wants.take(Y)
    assert Take(X) in messages(wants)
    arrive(wants, X, 10)


def test_what_never_fits_is_refused_whatever_size_a_holder_claims() -> None:
    wants = table()
    wants.want("r", [Wish(X, 4)])
    wants.expect({X: HERE})
    reason = wants.here(HERE, Here(X, 0, "F64", [2**31 - 1] * 8, "", True))
    assert reason is not None
    assert "--ec-receive-bytes" in reason
    assert not wants.is_coming(X)
    assert wants.take_reads() == []


def test_another_place_that_has_it_first_is_taken() -> None:
    wants = table()
    wants.want("r", [Wish(X, 4)])
    wants.expect({X: HERE})
    wants.expect({X: THERE})
    wants.here(THERE, here(X, granted=True))
    assert [read.place for read in wants.take_reads()] == [THERE]
    wants.here(HERE, here(X, granted=True))
    assert wants.take_reads() == []
    assert Forget(X) in messages(wants)


def test_a_place_that_is_lost_leaves_the_other() -> None:
    wants = table()
    wants.want("r", [Wish(X, 4)])
    wants.expect({X: HERE})
    wants.expect({X: THERE})
    assert wants.lose(HERE) == [X]
    wants.here(THERE, here(X, granted=True))
    assert len(wants.take_reads()) == 1


def test_a_bad_entry_is_reported_and_a_torn_one_given_back() -> None:
    for bad, message in ((True, Bad(X)), (False, Done(X))):
        wants = table()
        wants.want("r", [Wish(X, 4)])
        wants.expect({X: HERE})
        wants.here(HERE, here(X, granted=True))
        (read,) = wants.take_reads()
        assert wants.failed(read, bad=bad)
        assert message in messages(wants)
        assert not wants.is_coming(X)


def test_places_that_no_request_ever_wants_are_bounded() -> None:
    wants = table()
    for number in range(MAX_PLACES + 5):
        wants.expect({identifier_of(number): HERE})
    wants.want("r", [Wish(identifier_of(0), 4), Wish(identifier_of(MAX_PLACES), 4)])
    assert messages(wants) == [Want(identifier_of(MAX_PLACES), 0)]


NAMES = st.sampled_from([X, Y, Z])
REQUESTS = st.sampled_from("abc")
PLACES = st.sampled_from([HERE, THERE])
SIZES = {X: 3, Y: 4, Z: 5}
CAPACITY = 8


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: room is bounded, and in the end everything that is wanted comes."""

    def __init__(self) -> None:
        super().__init__()
        self.wants: WantTable[str] = table(CAPACITY)
        self.requests: dict[str, list[str]] = {}
        self.reads: deque[Read] = deque()
        self.sent: deque[Send] = deque()
        self.published: dict[ECPlace, set[str]] = {HERE: set(), THERE: set()}
        self.waiting: dict[ECPlace, dict[str, int]] = {HERE: {}, THERE: {}}

    @rule(request=REQUESTS, names=st.lists(NAMES, min_size=1, max_size=3, unique=True))
    def admit(self, request: str, names: list[str]) -> None:
        if request not in self.requests:
            self.requests[request] = names
            self.wants.want(request, [Wish(name, SIZES[name]) for name in names])

    @rule(request=REQUESTS)
    def finish(self, request: str) -> None:
        self.wants.finish(request, self.requests.pop(request, []))

    @rule(name=NAMES, place=PLACES)
    def expect(self, name: str, place: ECPlace) -> None:
        self.wants.expect({name: place})

    @rule(name=NAMES, place=PLACES)
    def publish(self, name: str, place: ECPlace) -> None:
        self.published[place].add(name)
        self._collect()
        if name in self.waiting[place]:
            self._say_here(place, name, self.waiting[place].pop(name) >= HEADER_BYTES + SIZES[name])

    @rule(name=NAMES, place=PLACES)
    def evict(self, name: str, place: ECPlace) -> None:
        self.published[place].discard(name)
        self.wants.gone(place, name)

    @rule(place=PLACES)
    def lose(self, place: ECPlace) -> None:
        self._collect()
        self.wants.lose(place)
        self.waiting[place].clear()
        self.sent = deque(send for send in self.sent if send.place != place)

    @rule(names=st.lists(NAMES, max_size=3, unique=True))
    def ask(self, names: list[str]) -> None:
        promised = [name for name in names if self.wants.ask(name)]
        assert all(self.wants.ready(name) == name for name in promised)

    @rule()
    def end_round(self) -> None:
        self.wants.end_round()

    @rule(name=NAMES)
    def take(self, name: str) -> None:
        self.wants.take(name)

    @rule(name=NAMES)
    def bring_back(self, name: str) -> None:
        self.wants.bring_back(name, name, SIZES[name])

    @rule()
    def answer_one(self) -> None:
        self._collect()
        if self.sent:
            self._answer(self.sent.popleft())

    @rule(whole=st.booleans(), bad=st.booleans())
    def end_one_read(self, whole: bool, bad: bool) -> None:
        self._collect()
        if self.reads:
            read = self.reads.popleft()
            if whole:
                self.wants.arrived(read, read.header.identifier)
            else:
                self.wants.failed(read, bad=bad)

    def _collect(self) -> None:
        self.sent += self.wants.take_sends()
        self.reads += self.wants.take_reads()

    def _answer(self, send: Send) -> None:
        """Do what a holder does."""
        name, place, message = send.message.identifier, send.place, send.message
        if isinstance(message, Want | Take) and name in self.published[place]:
            self._say_here(place, name, isinstance(message, Take) or message.room_bytes >= HEADER_BYTES + SIZES[name])
        elif isinstance(message, Want):
            self.waiting[place][name] = message.room_bytes
        elif isinstance(message, Take):
            self.wants.gone(place, name)
        else:
            self.waiting[place].pop(name, None)

    def _say_here(self, place: ECPlace, name: str, granted: bool) -> None:
        self.wants.here(place, here(name, SIZES[name], granted=granted))

    @invariant()
    def an_entry_is_read_once_at_a_time(self) -> None:
        self._collect()
        names = [read.header.identifier for read in self.reads]
        assert len(names) == len(set(names))

    def teardown(self) -> None:
        """From now on nothing fails: everything that any request wants comes, and an engine takes it."""
        self.published = {place: set(SIZES) for place in self.published}
        missing = {name for names in self.requests.values() for name in names}
        for _ in range(50):
            self._collect()
            while self.sent or self.reads:
                while self.sent:
                    self._answer(self.sent.popleft())
                while self.reads:
                    read = self.reads.popleft()
                    self.wants.arrived(read, read.header.identifier)
                self._collect()
            for name in sorted(missing):
                if self.wants.ask(name):
                    assert self.wants.take(name) == name
                    missing.discard(name)
                elif not self.wants.is_coming(name):
                    self.wants.expect({name: HERE})
            self.wants.end_round()
        assert not missing
        for request, names in self.requests.items():
            self.wants.finish(request, names)
        assert len(self.wants) == 0
        assert self.wants.held_bytes == 0


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
