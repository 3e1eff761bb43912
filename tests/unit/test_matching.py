"""Matching: which packets arrived, and what became of the others."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from frames import ethernet, ipv4, pcap, tcp, write
from helpers import failure, offline, paired, sightings

import netweaver
from netweaver import NO_DELAY

SECOND = 10**9


def test_loss_does_not_end_the_matching() -> None:
    result = paired([("a", 0), ("b", 10), ("c", 20)], [("c", 25)])
    assert (result.counts.first, result.counts.second) == (3, 1)
    assert (result.counts.matched, result.counts.lost) == (1, 2)
    assert list(result.delays) == [NO_DELAY, NO_DELAY, 5]


def test_identical_packets_are_counted_but_not_timed() -> None:
    pif = [("a", 0), ("a", 10), ("b", 30)]
    result = paired(pif, [("a", 1), ("b", 31), ("a", 12)])
    assert list(result.delays) == [NO_DELAY, NO_DELAY, 1]
    assert (result.counts.matched, result.counts.ambiguous) == (3, 2)
    assert result.counts.lost == 0


def test_identical_packets_of_which_one_is_missing() -> None:
    pif = [("a", 0), ("a", 10), ("a", 20), ("b", 30)]
    result = paired(pif, [("a", 1), ("b", 31), ("a", 12)])
    assert result.samples() == [1]
    assert (result.counts.matched, result.counts.ambiguous) == (3, 2)
    assert (result.counts.lost, result.counts.duplicated) == (1, 0)
    assert result.arrivals == array("I", [3])


def test_identical_packets_that_are_all_lost() -> None:
    result = paired([("a", 0), ("a", 10), ("b", 30)], [("b", 31)])
    assert (result.counts.matched, result.counts.lost) == (1, 2)
    assert result.counts.ambiguous == 0


def test_further_arrivals_are_duplicates() -> None:
    pif = [("a", 0), ("a", 10), ("b", 20)]
    vif = [("a", 1), ("a", 11), ("a", 12), ("b", 21), ("b", 22), ("x", 9)]
    counts = paired(pif, vif).counts
    assert (counts.matched, counts.ambiguous, counts.lost) == (3, 2, 0)
    assert (counts.duplicated, counts.second_only) == (2, 1)
    assert counts.first == counts.matched + counts.lost
    assert counts.second == counts.matched + counts.duplicated + counts.second_only


def test_a_delay_of_zero_and_a_negative_one_are_delays() -> None:
    result = paired([("a", 5), ("b", 6)], [("a", 5), ("b", 4)])
    assert list(result.delays) == [0, -2]


def test_many_identical_packets_take_linear_time() -> None:
    many = [("same", i) for i in range(50_000)]
    assert paired(many, many).counts.matched == 50_000


def test_packets_sent_before_the_window_are_in_no_count() -> None:
    """Nor are their arrivals, even if they took longer than any packet that counts."""
    pif = [("a", 80), ("b", 90), ("c", 110), ("d", 120)]
    vif = [("a", 95), ("c", 115), ("d", 125), ("b", 190), ("x", 195)]
    counts = paired(pif, vif, netweaver.Window(100, 500, 500)).counts
    assert (counts.first, counts.matched, counts.lost) == (2, 2, 0)
    assert counts.second_only == 1


def test_the_set_ends_before_the_first_packet_that_may_have_been_under_way() -> None:
    pif = [("a", 0), ("lost", 100), ("slow", 200), ("late", 800), ("after", 950), ("z", 960)]
    vif = [("a", 300), ("slow", 500), ("z", 970)]
    result = paired(pif, vif, netweaver.Window(0, 900, 1000))
    counts = result.counts
    assert (counts.first, counts.matched, counts.lost) == (3, 2, 1)
    assert counts.undecided.under_way == 3
    assert result.samples() == [300, 300]
    assert len(result.sent) == len(result.classes) == 3


def test_a_stray_arrival_of_a_packet_that_does_not_count_is_in_no_count() -> None:
    pif = [("a", 0), ("late", 800), ("stray", 900)]
    vif = [("a", 300), ("stray", 3 * SECOND)]
    counts = paired(pif, vif, netweaver.Window(0, 900, 1000)).counts
    assert (counts.first, counts.undecided.under_way, counts.strays) == (1, 2, 0)


@pytest.mark.parametrize(("wait", "matched", "undecided"), [(0, 1, 0), (4 * SECOND, 2, 2)])
def test_a_late_arrival_is_of_another_packet(wait: int, matched: int, undecided: int) -> None:
    """A packet is waited for one second, or as long as the user wants."""
    pif = [("slow", 0), ("lost", SECOND), ("x", 2 * SECOND), ("y", 6 * SECOND), ("z", 7 * SECOND)]
    vif = [("x", 2 * SECOND + 1), ("slow", 4 * SECOND)]
    counts = paired(pif, vif, netweaver.Window(0, 8 * SECOND, 9 * SECOND, wait)).counts
    assert (counts.matched, counts.undecided.under_way) == (matched, undecided)
    assert counts.lost == 5 - matched - undecided
    assert counts.strays == 2 - matched
    assert (counts.duplicated, counts.second_only) == (0, 0)


def test_an_arrival_before_the_start_is_of_no_later_packet() -> None:
    """The first copy of a packet was sent before the first point was watched."""
    pif = [("a", 100), ("b", 110)]
    vif = [("a", 90), ("b", 115), ("a", 120)]
    result = paired(pif, vif, netweaver.Window(100, 500, 500))
    assert result.samples() == [20, 5]
    assert (result.counts.duplicated, result.counts.lost) == (0, 0)
    lost = paired(pif, vif[:2], netweaver.Window(100, 500, 500))
    assert (lost.samples(), lost.counts.lost) == ([5], 1)


def test_a_duplicate_after_the_captures_is_in_no_count() -> None:
    pif = [("a", 100), ("b", 110)]
    vif = [("a", 105), ("b", 115), ("b", 400), ("a", 501)]
    assert paired(pif, vif, netweaver.Window(100, 500, 500)).counts.duplicated == 1


def test_duplicates_of_identical_packets_after_the_set_are_in_no_count() -> None:
    pif = [("a", 100), ("under way", 200), ("b", 210), ("b", 220)]
    vif = [("a", 105), ("b", 215), ("b", 225), ("b", 226)]
    counts = paired(pif, vif, netweaver.Window(100, 200, 200)).counts
    assert (counts.matched, counts.duplicated, counts.undecided.total) == (1, 0, 3)


FILES = netweaver.Window(start=0, end=100, watched_from=20, watched_until=80, is_live=False)


def test_files_leave_undecided_what_was_not_watched() -> None:
    pif = [("a", 10), ("b", 15), ("c", 20), ("d", 50), ("e", 80), ("f", 81), ("g", 100)]
    vif = [("b", 21), ("d", 52), ("x", 60), ("y", 110)]
    result = paired(pif, vif, FILES)
    counts = result.counts
    assert (counts.matched, counts.lost, counts.second_only) == (2, 2, 1)
    assert counts.undecided == netweaver.Undecided(unwatched=3, unwatched_first=1)
    assert [result.identity(rank) for rank in result.ranks(netweaver.PacketClass.LOST)] == [
        b"\0c",
        b"\0e",
    ]


@pytest.mark.parametrize("later", [-3600, 3600])
@pytest.mark.parametrize("others", [0, 100])
def test_captures_of_different_times_are_named(later: int, others: int, tmp_path: Path) -> None:
    """They contain the same packets or others."""
    paths = []
    for point, seconds, first in (("pif", 4000, 0), ("vif", 4000 + later, others)):
        records = [
            (seconds * SECOND + number, ethernet(ipv4(tcp(seq=first + number))))
            for number in range(20)
        ]
        paths.append(write(tmp_path / point, pcap(records)))
    assert "overlap in time" in failure(offline("--pcaps", *paths), 6)


def test_missing_copies_are_undecided_rather_than_lost() -> None:
    """Which of them are missing is unknown."""
    pif = [("a", 10), ("a", 15), ("a", 30), ("a", 40), ("a", 50)]
    vif = [("a", 31), ("a", 41)]
    counts = paired(pif, vif, FILES).counts
    assert (counts.matched, counts.ambiguous) == (2, 2)
    assert (counts.lost, counts.undecided.unwatched) == (1, 2)


def test_copies_sent_after_the_first_capture_are_not_taken_for_others() -> None:
    """Both captures ended after as many packets, and one had been lost."""
    pif = [("u", 20), ("a", 40), ("a", 60), ("a", 80), ("a", 100)]
    vif = [("u", 22), ("a", 42), ("a", 82), ("a", 102), ("a", 122)]
    counts = paired(pif, vif, replace(FILES, watched_until=122)).counts
    assert (counts.matched, counts.ambiguous, counts.lost) == (4, 3, 1)
    assert (counts.duplicated, counts.undecided.unwatched_first) == (0, 1)


@pytest.mark.parametrize(("uncaptured", "lost"), [(1, 2), (3, 0), (9, 0)])
def test_packets_that_were_not_captured_are_not_lost(uncaptured: int, lost: int) -> None:
    pif = [(key, time) for time, key in enumerate("abcdef")]
    vif = [("a", 1), ("d", 4), ("f", 6)]
    result = netweaver.match(sightings(pif, vif), netweaver.ALWAYS, uncaptured)
    assert (result.counts.matched, result.counts.lost) == (3, lost)
    assert result.counts.undecided.uncaptured == 3 - lost
    assert len(result.ranks(netweaver.PacketClass.LOST)) == lost
    assert len(result.ranks(netweaver.PacketClass.UNDECIDED)) == 3 - lost


def test_packets_are_in_order_of_time() -> None:
    found = sightings([("b", 10), ("a", 0), ("c", 20)], [("c", 25), ("b", 15), ("a", 5)])
    for point in found.points.values():
        point.sort()
    result = netweaver.match(found)
    assert result.samples() == [5, 5, 5]
    assert netweaver.reordering(result) == {}


IDENTICAL = [("same", 1000 * i) for i in range(20)]


@pytest.mark.parametrize("delay", [100, 900])
@pytest.mark.parametrize("pif_begins", [0, 3500, 6000])
@pytest.mark.parametrize("vif_begins", [0, 3600, 6100])
def test_identical_packets_at_the_edge_of_the_window(
    delay: int, pif_begins: int, vif_begins: int
) -> None:
    """One capture begins before the other: packets that only it saw are in no count."""
    pif = [(key, time) for key, time in IDENTICAL if time >= pif_begins]
    vif = [(key, time + delay) for key, time in IDENTICAL if time + delay >= vif_begins]
    window = netweaver.Window(10_000, 19_000, 100_000)
    result = paired(pif, vif, window)
    assert (result.counts.first, result.counts.matched) == (10, 10)
    assert (result.counts.lost, result.counts.duplicated) == (0, 0)
    assert result.samples() == []
    counts = paired(pif, vif[:-4] + vif[-3:], window).counts
    assert counts.matched + counts.lost == 10
