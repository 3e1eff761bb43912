"""Pairs of captures of generated traffic, whose truth is known."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from frames import (
    ARP,
    WRAPPINGS,
    ethernet,
    interface,
    ipv4,
    packet,
    pcap,
    pcapng,
    tcp,
    write,
)
from helpers import SeededPath, T, analyzed, paired, traffic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import netweaver


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_encapsulated_pif_against_a_plain_vif(wrapping: str, tmp_path: Path) -> None:
    path = SeededPath(traffic(3000), seed=2)
    wrap = WRAPPINGS[wrapping]
    pif = write(tmp_path / "pif", pcap([(time, wrap(content)) for time, content in path.pif]))
    vif = write(
        tmp_path / "vif", pcap([(time, ethernet(content)) for time, content in path.vif], ">")
    )
    path.check(analyzed("--pcaps", pif, vif))


@pytest.mark.parametrize("count", [1, 2, 33, 4000])
def test_runs_of_equal_packets(count: int, tmp_path: Path) -> None:
    """What hping3 sends, in less than what is read at once, and in more."""
    packets = [
        (T + i * 1000, ipv4(tcp(i % 60000, 0, i * 2654435761 % 2**32), ident=i % 65521))
        for i in range(count)
    ]
    path = SeededPath(packets, seed=3, loss=0.01 if count > 32 else 0, jitter=5000)
    pif = write(tmp_path / "pif", pcap([(time, ethernet(content)) for time, content in path.pif]))
    vif = write(
        tmp_path / "vif", pcap([(time, content) for time, content in path.vif], linktype=101)
    )
    path.check(analyzed("--pcaps", pif, vif))


def test_slaves_of_a_bond_are_merged_by_time(tmp_path: Path) -> None:
    path = SeededPath(traffic(2000), seed=4)
    chance = random.Random(5)
    slaves: list[list[tuple[int, bytes]]] = [[], [], []]
    for time, content in path.pif:
        chance.choice(slaves).append((time, ethernet(content)))
    pifs = ",".join(write(tmp_path / f"eth{i}", pcap(slave)) for i, slave in enumerate(slaves))
    vif = write(
        tmp_path / "vif,5.0", pcap([(time, ethernet(content)) for time, content in path.vif])
    )
    path.check(analyzed("--pcaps", pifs, vif))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_pair_gives_back_what_made_it(data: st.DataObject) -> None:
    """Any traffic with any loss, duplication, reordering, encapsulation and file format.

    In process.
    """
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    path = SeededPath(
        traffic(data.draw(st.integers(1, 300)), chance.getrandbits(32)),
        chance.getrandbits(32),
        data.draw(st.sampled_from([0, 0.03, 0.5])),
        data.draw(st.sampled_from([0, 0.1, 0.6])),
        data.draw(st.sampled_from([10, 60_000, 10_000_000])),
    )
    wraps = [WRAPPINGS[data.draw(st.sampled_from(sorted(WRAPPINGS)))] for _ in range(2)]
    noise = data.draw(st.booleans())

    def capture(packets: list[tuple[int, bytes]], wrap: Callable[[bytes], bytes]) -> Any:
        records = [(time, wrap(content)) for time, content in packets]
        if noise:
            records = [
                record
                for pair in records
                for record in (pair, (pair[0], ARP))[: 1 + chance.randrange(2)]
            ]
        order = chance.choice("<>")
        if data.draw(st.booleans()):
            return pcap(records, order)
        return pcapng(
            interface(1, 9, order=order),
            *(packet(0, *record, order) for record in records),
            order=order,
        )

    (found,) = netweaver.collect(
        {
            side: [netweaver.Capture(io.BytesIO(capture(packets, wrap)), side)]
            for side, packets, wrap in zip(("pif", "vif"), (path.pif, path.vif), wraps)
        },
        netweaver.Selection(),
    )
    result = netweaver.match(found)
    assert not result.counts.ambiguous
    assert {
        rank: delay for rank, delay in enumerate(result.delays) if delay != netweaver.NO_DELAY
    } == path.delays
    assert (result.counts.duplicated, result.counts.second_only) == (path.duplicated, 0)
    assert netweaver.reordering(result) == path.extents


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pv"), st.sampled_from("abcdefgh")), max_size=80))
def test_matching_follows_its_definition(sightings: list[tuple[str, str]]) -> None:
    """Any sightings: the counts are exact, and only packets that were sent once have a delay."""
    sides: dict[str, list[tuple[str, int]]] = {"p": [], "v": []}
    for time, (side, letter) in enumerate(sightings):
        sides[side].append((letter, time))
    result = paired(sides["p"], sides["v"])
    counts = result.counts
    pif, vif = (Counter(key for key, _ in sides[side]) for side in "pv")
    assert counts.matched == sum((pif & vif).values())
    assert counts.lost == sum((pif - vif).values())
    assert counts.duplicated == sum((vif - pif)[key] for key in pif)
    assert counts.second_only == sum(vif[key] for key in vif.keys() - pif.keys())
    assert counts.undecided.total == 0
    assert counts.ambiguous == sum(min(pif[key], vif[key]) for key in pif if pif[key] > 1)
    assert counts.first == len(sides["p"])
    assert counts.second == len(sides["v"])
    for (key, sent), delay in zip(sides["p"], result.delays):
        arrivals = [time for other, time in sides["v"] if other == key]
        if pif[key] == 1 and arrivals:
            assert delay == arrivals[0] - sent
        else:
            assert delay == netweaver.NO_DELAY
