"""The NBD machine without a socket: negotiation, requests, limits, and whatever bytes a client may send."""

from __future__ import annotations

import errno
import struct

import nbd_client as nbd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import ACK, FIXED, GO, INFO, NO_ZEROES, OptionReply, Parser, go, meta, option, request, text

from graincopy.views.nbd_handshake import REQUEST_LIMIT, Export, Tls
from graincopy.views.nbd_protocol import (
    OPTION_LIMIT,
    OPTION_SKIP_LIMIT,
    OPTIONS_LIMIT,
    Close,
    Connection,
    Event,
    Opened,
    Send,
    StartTls,
    State,
)
from graincopy.views.nbd_request import Request

MIB = 1 << 20
WEB, DATA = Export("web.raw", 10 * MIB, False, "the web"), Export("data.raw", 4097, True)
ALL = b"base:allocation", b"graincopy:source"


def flags(value: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", value)


def talk(machine: Connection, data: bytes) -> list[Event]:
    machine.receive(data)
    return list(machine.events())


def said(events: list[Event]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Send))


def replies(machine: Connection, data: bytes) -> list[OptionReply]:
    """Everything that is answered to options, and nothing else."""
    parser, found = Parser(said(talk(machine, data))), []
    while parser.data:
        found.append(parser.option_reply())
    return found


def kinds(machine: Connection, data: bytes) -> list[int]:
    return [reply.kind for reply in replies(machine, data)]


def haggler(*exports: Export, tls: Tls = Tls.NONE) -> Connection:
    """A connection on which options can be sent."""
    machine = Connection(exports or (WEB, DATA), tls)
    assert Parser(machine.greeting()).greeting() == 3
    assert talk(machine, flags()) == []
    return machine


def transmitting(export: Export = WEB, *contexts: bytes, structured: bool = True) -> Connection:
    machine = haggler()
    if structured:
        assert kinds(machine, option(nbd.STRUCTURED)) == [ACK]
    if contexts:
        talk(machine, meta(nbd.SET_META, export.wire_name, *contexts))
    events = talk(machine, go(export.wire_name))
    assert Opened(export, structured, tuple(name.decode() for name in contexts)) in events
    return machine


def closed(events: list[Event]) -> bool:
    return bool(events) and isinstance(events[-1], Close)


# --- negotiation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_it(value: int) -> None:
    assert closed(talk(Connection((WEB,)), flags(value)))


@pytest.mark.parametrize(("asked", "zeroes"), [(FIXED, 124), (FIXED | NO_ZEROES, 0), (0, 124), (NO_ZEROES, 0)])
def test_export_name_answers_with_124_zeroes_unless_they_are_declined(asked: int, zeroes: int) -> None:
    machine = Connection((WEB, DATA))
    talk(machine, flags(asked))
    events = talk(machine, option(nbd.EXPORT_NAME, b"web.raw"))
    size, bits = struct.unpack(">QH", said(events)[:10])
    assert (size, bits & 0b11) == (10 * MIB, 0b11)
    assert said(events)[10:] == bytes(zeroes)
    assert events[-1] == Opened(WEB, False, ())


def test_export_name_that_is_not_there_can_only_hang_up() -> None:
    assert talk(haggler(), option(nbd.EXPORT_NAME, b"nothing")) == [Close("an option that cannot be answered")]


def test_newstyle_that_is_not_fixed_knows_no_other_option() -> None:
    machine = Connection((WEB,))
    talk(machine, flags(0))
    assert closed(talk(machine, option(nbd.LIST)))


def test_list_names_every_export() -> None:
    found = replies(haggler(), option(nbd.LIST))
    assert [reply.kind for reply in found] == [nbd.SERVER, nbd.SERVER, ACK]
    assert found[0].data == text(b"web.raw") + b"the web"
    assert found[1].data == text(b"data.raw")


def test_a_name_that_is_no_utf8_is_escaped_and_found_again() -> None:
    odd = Export(b"caf\xe9\n.raw".decode("utf-8", "surrogateescape"), 1, False)
    machine = haggler(odd, WEB)
    assert replies(machine, option(nbd.LIST))[0].data == text(b"caf\\xe9\n.raw")
    assert talk(machine, go(b"caf\\xe9\n.raw"))[-1] == Opened(odd, False, ())


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_tell_size_flags_and_block_sizes(number: int) -> None:
    found = replies(haggler(), go(b"data.raw", number, (1, 2, 3, 99)))
    facts = {struct.unpack(">H", reply.data[:2])[0]: reply.data[2:] for reply in found[:-1]}
    size, bits = struct.unpack(">QH", facts[0])
    assert size == 4097
    assert bits & 0b10 == 0
    assert bits & 0b101101101 == 0b101101101  # flags, flush, FUA, trim, write zeroes, several connections
    assert facts[1] == b"data.raw"
    assert struct.unpack(">III", facts[3]) == (1, 65536, REQUEST_LIMIT)
    assert found[-1].kind == ACK


def test_read_only_exports_offer_nothing_that_writes_and_df_only_with_structured_replies() -> None:
    def bits(machine: Connection) -> int:
        return int(struct.unpack(">H", replies(machine, go(b"web.raw", INFO))[0].data[-2:])[0])

    machine = haggler()
    assert bits(machine) & (1 << 1 | 1 << 5 | 1 << 6 | 1 << 7) == 1 << 1
    talk(machine, option(nbd.STRUCTURED))
    assert bits(machine) & 1 << 7


def test_the_empty_name_is_the_only_export_or_none() -> None:
    assert kinds(haggler(), go(b"", INFO)) == [nbd.UNKNOWN]
    assert kinds(haggler(WEB), go(b"", INFO)) == [nbd.REP_INFO, nbd.REP_INFO, ACK]


def test_go_for_an_unknown_export_may_be_tried_again() -> None:
    machine = haggler()
    assert kinds(machine, go(b"web")) == [nbd.UNKNOWN]
    assert talk(machine, go(b"web.raw"))[-1] == Opened(WEB, False, ())


def test_abort_is_acknowledged_and_ends_it() -> None:
    events = talk(haggler(), option(nbd.ABORT))
    assert Parser(said(events)).option_reply().kind == ACK
    assert events[-1] == Close()


def test_unknown_options_are_refused_and_haggling_goes_on() -> None:
    machine = haggler()
    assert kinds(machine, option(4) + option(11, b"x") + option(77, bytes(OPTION_LIMIT))) == [nbd.UNSUP] * 3
    assert kinds(machine, option(nbd.LIST))[-1] == ACK


@pytest.mark.parametrize(
    "data",
    [
        option(nbd.LIST, b"x"),
        option(nbd.STRUCTURED, b"x"),
        option(GO, b""),
        option(GO, struct.pack(">I", 5) + b"web"),
        option(GO, struct.pack(">I", 0xFFFFFFFF)),
        option(GO, text(b"web.raw")),
        option(GO, text(b"web.raw") + struct.pack(">HH", 2, 0)),
        option(GO, text(b"web.raw") + struct.pack(">HH", 0, 0)),
        option(GO, text(b"n" * 4097) + struct.pack(">H", 0)),
        meta(nbd.LIST_META, b"web.raw"),
        meta(nbd.SET_META, b"web.raw", *ALL),
    ],
)
def test_options_out_of_form_or_order_are_invalid_and_haggling_goes_on(data: bytes) -> None:
    machine = haggler()
    assert kinds(machine, data) == [nbd.INVALID]
    assert kinds(machine, option(nbd.LIST))[-1] == ACK


@pytest.mark.parametrize(
    ("number", "queries", "found"),
    [
        (nbd.LIST_META, (), ALL),
        (nbd.LIST_META, (b"base:",), ALL[:1]),
        (nbd.LIST_META, (b"graincopy:", b"other:thing"), ALL[1:]),
        (nbd.LIST_META, (b"base:allocation",), ALL[:1]),
        (nbd.LIST_META, (b"qemu:dirty-bitmap:x",), ()),
        (nbd.SET_META, (), ()),
        (nbd.SET_META, (b"base:",), ()),
        (nbd.SET_META, (b"base:allocation", b"no:such", b"base:allocation"), ALL[:1]),
        (nbd.SET_META, (b"graincopy:source", b"base:allocation"), ALL),
        (nbd.SET_META, (b"\xff\xfe",), ()),
    ],
)
def test_metadata_contexts(number: int, queries: tuple[bytes, ...], found: tuple[bytes, ...]) -> None:
    machine = haggler()
    talk(machine, option(nbd.STRUCTURED))
    answers = replies(machine, meta(number, b"web.raw", *queries))
    assert tuple(answer.data[4:] for answer in answers[:-1]) == found
    assert answers[-1].kind == ACK
    ids = [struct.unpack(">I", answer.data[:4])[0] for answer in answers[:-1]]
    assert len(set(ids)) == len(ids) if number == nbd.SET_META else not any(ids)


def test_contexts_hold_for_the_export_they_were_set_for_and_the_last_set_counts() -> None:
    machine = haggler()
    talk(machine, option(nbd.STRUCTURED) + meta(nbd.SET_META, b"web.raw", *ALL))
    assert talk(machine, go(b"data.raw"))[-1] == Opened(DATA, True, ())
    machine = haggler()
    talk(machine, option(nbd.STRUCTURED) + meta(nbd.SET_META, b"web.raw", *ALL))
    assert kinds(machine, meta(nbd.SET_META, b"nothing", *ALL)) == [nbd.UNKNOWN]
    assert talk(machine, go(b"web.raw"))[-1] == Opened(WEB, True, ())


def test_limits_of_haggling() -> None:
    assert kinds(haggler(), option(GO, bytes(OPTION_LIMIT + 1))) == [nbd.TOO_BIG]
    assert closed(talk(haggler(), struct.pack(">8sII", b"IHAVEOPT", GO, OPTION_SKIP_LIMIT + 1)))
    assert closed(talk(haggler(), option(nbd.EXPORT_NAME, bytes(OPTION_LIMIT + 1))))
    assert closed(talk(haggler(), option(nbd.LIST) * (OPTIONS_LIMIT + 1)))
    machine = haggler()
    talk(machine, option(nbd.STRUCTURED))
    assert kinds(machine, meta(nbd.LIST_META, b"web.raw", *[b"a:"] * 65)) == [nbd.TOO_BIG]


def test_a_long_option_is_skipped_without_being_kept() -> None:
    machine = haggler()
    talk(machine, struct.pack(">8sII", b"IHAVEOPT", GO, OPTION_SKIP_LIMIT))
    for _ in range(16):
        talk(machine, bytes(OPTION_SKIP_LIMIT // 16))
        assert machine.held == 0
    assert kinds(machine, option(nbd.LIST))[-1] == ACK


def test_without_certificates_starttls_is_refused_by_policy() -> None:
    assert kinds(haggler(), option(nbd.STARTTLS)) == [nbd.POLICY]


def test_where_tls_is_required_nothing_is_told_before_it() -> None:
    machine = haggler(tls=Tls.REQUIRED)
    for data in (option(nbd.LIST), go(b"web.raw"), go(b"web.raw", INFO), option(nbd.STRUCTURED), option(99)):
        assert kinds(machine, data) == [nbd.TLS_REQD]
    events = talk(machine, option(nbd.STARTTLS))
    assert (Parser(said(events)).option_reply().kind, events[-1]) == (ACK, StartTls())
    machine.tls_started()
    assert kinds(machine, option(nbd.STARTTLS)) == [nbd.INVALID]
    assert talk(machine, go(b"web.raw"))[-1] == Opened(WEB, False, ())
    assert closed(talk(haggler(tls=Tls.REQUIRED), option(nbd.EXPORT_NAME, b"web.raw")))


def test_plain_bytes_behind_starttls_are_not_taken_for_the_clients_own() -> None:
    machine = haggler(tls=Tls.REQUIRED)
    assert closed(talk(machine, option(nbd.STARTTLS) + go(b"web.raw")))


def test_while_the_server_goes_down_options_are_refused_but_abort() -> None:
    machine = haggler()
    machine.shutting_down = True
    assert kinds(machine, go(b"web.raw")) == [nbd.SHUTDOWN]
    assert closed(talk(machine, option(nbd.ABORT)))


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("export", "data", "error"),
    [
        (WEB, request(99, 0, 1), errno.EINVAL),
        (WEB, request(nbd.READ, 0, 0), errno.EINVAL),
        (WEB, request(nbd.READ, 10 * MIB, 1), errno.EINVAL),
        (WEB, request(nbd.READ, 10 * MIB - 1, 2), errno.EINVAL),
        (WEB, request(nbd.READ, 2**64 - 1, 2), errno.EINVAL),
        (WEB, request(nbd.READ, 0, 1, flags=0x20), errno.EINVAL),
        (WEB, request(nbd.READ, 0, 1, flags=nbd.REQ_ONE), errno.EINVAL),
        (WEB, request(nbd.BLOCK_STATUS, 0, 1), errno.EINVAL),
        (WEB, request(nbd.FLUSH, 1, 0), errno.EINVAL),
        (WEB, request(nbd.TRIM, 0, 1), errno.EPERM),
        (WEB, request(nbd.WRITE_ZEROES, 0, 1), errno.EPERM),
        (WEB, request(nbd.WRITE, 0, 4, data=b"abcd"), errno.EPERM),
        (DATA, request(nbd.WRITE, 4096, 2, data=b"ab"), errno.ENOSPC),
        (DATA, request(nbd.TRIM, 4096, 2), errno.ENOSPC),
        (DATA, request(nbd.CACHE, 4096, 2), errno.EINVAL),
        (DATA, request(nbd.WRITE, 0, 0), errno.EINVAL),
    ],
)
def test_requests_out_of_order_are_answered_with_their_error_and_the_next_is_served(
    export: Export, data: bytes, error: int
) -> None:
    for structured in (True, False):
        machine = transmitting(export, structured=structured)
        events = talk(machine, data + request(nbd.READ, 0, 1, handle=8))
        reply = Parser(said(events)).reply()
        assert (reply.handle, reply.error) == (7, error)
        assert events[-1] == Request(nbd.READ, 0, 8, 0, 1)


def test_a_read_of_more_than_the_limit_is_refused_and_one_of_the_limit_is_not() -> None:
    big = Export("big", 1 << 40, True)
    machine = haggler(big)
    talk(machine, go())
    assert talk(machine, request(nbd.READ, 0, REQUEST_LIMIT)) == [Request(nbd.READ, 0, 7, 0, REQUEST_LIMIT)]
    assert Parser(said(talk(machine, request(nbd.READ, 0, REQUEST_LIMIT + 1)))).reply().error == errno.EINVAL
    assert talk(machine, request(nbd.WRITE_ZEROES, 0, 2**32 - 1)) == [Request(6, 0, 7, 0, 2**32 - 1)]
    assert closed(talk(machine, request(nbd.WRITE, 0, REQUEST_LIMIT + 1)))


def test_the_bytes_of_a_refused_write_are_not_kept() -> None:
    machine = transmitting(WEB)
    talk(machine, request(nbd.WRITE, 0, REQUEST_LIMIT))
    for _ in range(32):
        talk(machine, bytes(REQUEST_LIMIT // 32 - 1))
        assert machine.held == 0
    assert said(talk(machine, bytes(31))) == b""
    assert Parser(said(talk(machine, bytes(1)))).reply().error == errno.EPERM


def test_df_needs_structured_replies() -> None:
    data = request(nbd.READ, 0, 1, flags=nbd.DF)
    assert talk(transmitting(WEB), data) == [Request(nbd.READ, nbd.DF, 7, 0, 1)]
    assert Parser(said(talk(transmitting(WEB, structured=False), data))).reply().error == errno.EINVAL


def test_garbage_between_requests_ends_it_and_nothing_behind_it_is_read() -> None:
    machine = transmitting(WEB)
    events = talk(machine, b"\0" * 28 + request(nbd.READ, 0, 1))
    assert events == [Close("garbage where a request should begin")]
    assert machine.state is State.CLOSED
    assert talk(machine, request(nbd.READ, 0, 1)) == []
    assert machine.held == 0


def test_disconnect_is_the_last_word() -> None:
    assert talk(transmitting(WEB), request(nbd.DISC) + request(nbd.READ, 0, 1)) == [Close()]


def test_requests_after_the_shutdown_are_told() -> None:
    machine = transmitting(WEB)
    machine.shutting_down = True
    assert Parser(said(talk(machine, request(nbd.READ, 0, 1)))).reply().error == errno.ESHUTDOWN


def test_events_may_be_left_early_and_taken_up_again() -> None:
    machine = transmitting(WEB)
    machine.receive(b"".join(request(nbd.READ, at, 1, handle=at) for at in range(5)))
    first = next(iter(machine.events()))
    assert [first, *machine.events()] == [Request(nbd.READ, 0, at, at, 1) for at in range(5)]


# --- whatever bytes a client may send -------------------------------------------------------------

names = st.sampled_from([b"", b"web.raw", b"data.raw", b"web", b"\xff", b"n" * 4096, b"n" * 5000])
numbers = st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1))
queries = st.lists(st.sampled_from([*ALL, b"base:", b"graincopy:", b"", b"x:y", b"\xfe"]), max_size=3)
options = st.one_of(
    st.builds(option, numbers, st.binary(max_size=40)),
    st.builds(go, names, st.sampled_from([INFO, GO]), st.lists(st.integers(0, 9), max_size=3).map(tuple)),
    st.builds(lambda number, name, found: meta(number, name, *found), st.sampled_from([9, 10]), names, queries),
    st.just(option(nbd.STRUCTURED)),
    st.just(option(nbd.LIST)),
)
places = st.one_of(st.integers(0, 5000), st.sampled_from([4096, 4097, 10 * MIB - 1, 10 * MIB, 2**63, 2**64 - 1]))
lengths = st.one_of(st.integers(0, 5000), st.sampled_from([REQUEST_LIMIT, REQUEST_LIMIT + 1, 2**32 - 1]))
requests = st.builds(
    request, st.integers(0, 9), places, lengths, st.integers(0, 2**64 - 1), st.sampled_from([0, 0, 0, 1, 2, 4, 8, 255])
)
writes = st.builds(lambda at, data: request(nbd.WRITE, at, len(data), data=data), places, st.binary(max_size=64))
openings = st.sampled_from([flags(), flags(FIXED), flags(0), flags(NO_ZEROES)])
conversations = st.builds(
    lambda opening, haggled, chosen, asked, rest: opening + b"".join(haggled) + chosen + b"".join(asked) + rest,
    st.one_of(openings, openings, st.binary(max_size=4)),
    st.lists(options, max_size=4),
    st.sampled_from([b"", go(b"web.raw"), go(b"data.raw"), option(nbd.EXPORT_NAME, b"data.raw")]),
    st.lists(st.one_of(requests, requests, writes), max_size=5),
    st.one_of(st.just(b""), st.binary(max_size=60)),
)


def merged(events: list[Event]) -> list[Event]:
    """Sends joined, so that only what is said counts and not in how many pieces."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Send) and found and isinstance(found[-1], Send):
            event = Send(found.pop().data + event.data)
        found.append(event)
    return found


@settings(max_examples=400, deadline=None)
@given(conversations, st.lists(st.integers(1, 50), min_size=1, max_size=8), st.sampled_from(list(Tls)[:2]))
def test_how_the_bytes_arrive_makes_no_difference_and_nothing_raises(data: bytes, cuts: list[int], tls: Tls) -> None:
    whole, piecemeal = Connection((WEB, DATA), tls), Connection((WEB, DATA), tls)
    first = merged(talk(whole, data))
    second: list[Event] = []
    at = 0
    while at < len(data):
        size = cuts[at % len(cuts)]
        second += talk(piecemeal, data[at : at + size])
        at += size
    if StartTls() in first:  # bytes behind it are allowed when they come later: the shell reads no more of them
        return
    assert merged(second) == first or (tls is Tls.REQUIRED and closed(first))
    assert whole.held <= OPTION_LIMIT + REQUEST_LIMIT + 28


@settings(max_examples=400, deadline=None)
@given(conversations)
def test_every_answer_is_well_formed_and_every_request_that_passes_is_in_order(data: bytes) -> None:
    machine = Connection((WEB, DATA))
    events = talk(machine, data)
    haggled = Parser(b"")
    opened: Opened | None = None
    for event in events:
        if isinstance(event, Opened):
            opened = event
        elif isinstance(event, Send) and opened is not None:
            parser = Parser(event.data)
            assert parser.reply().error
            assert not parser.data
        elif isinstance(event, Send):
            haggled.data += event.data
        elif isinstance(event, Request):
            assert opened is not None
            assert event.command in range(8)
            assert event.offset + event.length <= opened.export.size
            assert len(event.payload) == (event.length if event.command == nbd.WRITE else 0)
            assert opened.export.writable or event.command not in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES)
    while haggled.data.startswith(struct.pack(">Q", 0x3E889045565A9)):
        haggled.option_reply()
    assert len(haggled.data) in (0, 10, 134)  # the answer to EXPORT_NAME
    assert [event for event in events if isinstance(event, Close)] == ([events[-1]] if closed(events) else [])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_bytes_without_any_sense_are_survived(data: bytes) -> None:
    machine = Connection((WEB,))
    talk(machine, data)
    machine = transmitting(DATA, *ALL)
    talk(machine, data)
