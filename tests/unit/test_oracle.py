"""Random pairs of captures, against counts and delays that are found another way.

The oracle knows only the rules: which packets count, which are lost, undecided or ambiguous.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from frames import ethernet, ipv4, pcap, tcp
from helpers import offline

from netweaver import iso_time

SECOND = 10**9
START = 1_700_000_000 * SECOND
Sighting = tuple[int, int]  # time (ns) and number of the packet; equal numbers: identical packets


@dataclass
class Pair:
    """Two captures, and what is known about them."""

    pif: list[Sighting]
    vif: list[Sighting]
    live: bool  # otherwise only the files are known
    start: int = START
    watched_until: int = START + 100 * SECOND
    wait: float = 0.1
    uncaptured: int = 0  # by the vif's capture


@dataclass
class Expected:
    """The numbers of packets, and the delays in order of sending."""

    lost: int = 0
    ambiguous: int = 0
    undecided: int = 0
    duplicated: int = 0
    vif_only: int = 0
    delays: list[int] = field(default_factory=list)
    overtaken: int = 0
    flows: int = 0


def random_pair(chance: random.Random, live: bool) -> Pair:
    """Return captures of one stream with delay, loss, duplicates and identical packets."""
    size = chance.randrange(1, 60)
    gap = chance.choice([1000, 50_000, 1_000_000])
    jitter = chance.choice([10, 40_000, 3_000_000])
    loss = chance.choice([0, 0.1, 0.5])
    identical = chance.choice([0, 0, 0.1, 0.6])
    pif: list[Sighting] = []
    vif: list[Sighting] = []
    time = START
    for rank in range(size):
        time += chance.randrange(1, 2 * gap)
        number = chance.randrange(1000, 1003) if chance.random() < identical else rank
        pif.append((time, number))
        arrivals = 0 if chance.random() < loss else 1 + (chance.random() < 0.05)
        for _ in range(arrivals):
            vif.append((time + 1000 + chance.randrange(jitter), number))
    for number in range(2000, 2000 + chance.randrange(3)):
        vif.append((START + chance.randrange(1, 2 * gap * size), number))
    pif.sort()
    vif.sort()
    pair = Pair(pif, vif, live)
    if live:
        span = time - START
        pair.start = START + chance.randrange(-10, max(1, span // 2))
        pair.watched_until = time + chance.randrange(-span // 2, 2 * jitter)
        pair.uncaptured = chance.choice([0, 0, 3])
    else:
        pair.pif = clipped(chance, pif)
        pair.vif = clipped(chance, vif)
    return pair


def clipped(chance: random.Random, sightings: list[Sighting]) -> list[Sighting]:
    """Return what a capture has that started late, or was stopped early."""
    begin = chance.choice([0, 0, len(sightings) // 4])
    end = chance.choice([len(sightings), len(sightings), len(sightings) * 3 // 4])
    return sightings[begin:end]


def expect(pair: Pair) -> Expected:  # noqa: C901  (rule after rule, as a text has them)
    """Apply the rules, one after the other, by brute force."""
    times_sent = Counter(number for _, number in pair.pif)
    first_from = pair.start
    if not pair.live:
        first_from = pair.pif[0][0] - 10_000  # the clocks of two processors may differ by so much
    sent = [sighting for sighting in pair.pif if sighting[0] >= first_from]
    seen = [sighting for sighting in pair.vif if sighting[0] >= first_from]
    early = times_sent - Counter(number for _, number in sent)
    arrivals = {number: [time for time, other in seen if other == number] for _, number in seen}

    unique = [(time, number) for time, number in sent if times_sent[number] == 1]
    delay_of = {number: arrivals[number][0] - time for time, number in unique if number in arrivals}
    longest = max(0, max(delay_of.values(), default=0))

    def is_undecided(time: int) -> bool:
        if pair.live:
            return time > pair.watched_until - longest
        return not pair.vif[0][0] <= time <= pair.vif[-1][0]

    expected = Expected()
    missing = [sighting for sighting in unique if sighting[1] not in delay_of]
    undecided = [sighting for sighting in missing if is_undecided(sighting[0])]
    lost = [sighting for sighting in missing if not is_undecided(sighting[0])]
    surplus: dict[int, int] = {}  # arrivals, by the time of the first of some identical packets
    for number in {number for _, number in sent if times_sent[number] > 1}:
        times = arrivals.get(number, [])
        if not pair.live:
            late = [time for time in times if time > pair.pif[-1][0] + longest]
            expected.undecided += len(late)
            times = times[: len(times) - len(late)]
        copies = [sighting for sighting in sent if sighting[1] == number]
        # A copy that was sent shortly before the vif was watched may be the one that was seen.
        unseen = [copy for copy in copies if is_undecided(copy[0])]
        if times and not pair.live:
            begin = pair.vif[0][0]
            unseen = [copy for copy in unseen if not begin - longest <= copy[0] < begin]
        likely = [copy for copy in copies if copy not in unseen] + unseen
        undecided += [copy for copy in likely[len(times) :] if copy in unseen]
        lost += [copy for copy in likely[len(times) :] if copy not in unseen]
        surplus[copies[0][0]] = max(0, len(times) - len(copies) - early[number])

    end = 1 << 62
    if pair.live:
        end = min((time for time, _ in undecided), default=end)
        expected.undecided = sum(time >= end for time, _ in sent)
    counted = [sighting for sighting in sent if sighting[0] < end]
    expected.duplicated += sum(copies for time, copies in surplus.items() if time < end)
    lost = [sighting for sighting in lost if sighting[0] < end]
    undecided = [sighting for sighting in undecided if sighting[0] < end]
    expected.lost = len(lost)
    expected.undecided += len(undecided)
    explained = min(expected.lost, pair.uncaptured)
    expected.lost -= explained
    expected.undecided += explained

    timed = [number for _, number in counted if number in delay_of]
    expected.delays = [delay_of[number] for number in timed]
    expected.ambiguous = len(counted) - len(timed) - len(lost) - len(undecided)
    for number in timed:
        further = arrivals[number][1:]
        if pair.live:
            further = [time for time in further if time <= pair.watched_until]
        expected.duplicated += len(further)
    order = sorted(timed, key=lambda number: arrivals[number][0])
    for position, number in enumerate(order):
        expected.overtaken += any(
            timed.index(other) > timed.index(number) for other in order[:position]
        )

    for time, number in seen:
        if times_sent[number]:
            continue
        if pair.live:
            expected.vif_only += first_from + longest <= time <= min(pair.watched_until, end - 1)
        elif first_from <= time <= pair.pif[-1][0]:
            expected.vif_only += 1
        else:
            expected.undecided += 1
    return expected


def write_run(directory: Path, pair: Pair) -> list[str]:
    """Write the captures, and the report of a run if it was live; return the arguments."""
    paths = []
    for point, sightings in (("pif", pair.pif), ("vif", pair.vif)):
        frames = [
            (time, ethernet(ipv4(tcp(seq=number), ident=number))) for time, number in sightings
        ]
        path = directory / f"{point}.pcap"
        path.write_bytes(pcap(frames))
        paths.append(str(path))
    if not pair.live:
        return ["--pcaps", *paths]
    config = {
        "direction": "in",
        "selection": {"sources": [], "destinations": [], "probes": None},
        "match_nat": False,
        "capture_limit": None,
        "labels": {},
        "sources": ["source"],
        "pif": "eth0",
        "vif": "vif5.0",
        "wait": pair.wait,
        "window": {
            "start": iso_time(pair.start),
            "end": iso_time(pair.watched_until),
            "watched_until": iso_time(pair.watched_until),
        },
    }
    capture = {"pif": {"dropped": 0}, "vif": {"dropped": pair.uncaptured}}
    (directory / "report.json").write_text(json.dumps({"config": config, "capture": capture}))
    return ["--pcaps", str(directory)]


@pytest.mark.parametrize("live", [False, True], ids=["files", "live"])
@pytest.mark.parametrize("tenth", range(10))
def test_random_pairs(tmp_path: Path, live: bool, tenth: int) -> None:
    for seed in range(15 * tenth, 15 * (tenth + 1)):
        pair = random_pair(random.Random(seed), live)
        if pair.pif and pair.vif:
            check_pair(tmp_path, pair, seed)


def check_pair(directory: Path, pair: Pair, seed: int) -> None:
    expected = expect(pair)
    done = offline("-q", *write_run(directory, pair))
    if not expected.delays:
        assert done.returncode == 6, seed
        return
    assert done.returncode == 0, (seed, done.stderr)
    document = json.loads(done.stdout)
    matched = len(expected.delays) + expected.ambiguous
    assert document["packets"] == {
        "pif": matched + expected.lost,
        "vif": matched + expected.duplicated + expected.vif_only,
        "matched": matched,
        "ambiguous": expected.ambiguous,
        "lost": expected.lost,
        "undecided": expected.undecided,
        "duplicated": expected.duplicated,
        "reordered": expected.overtaken,
        "vif_only": expected.vif_only,
    }, seed
    assert document["loss_ratio"] == expected.lost / (matched + expected.lost), seed
    assert document["minimum"] == min(expected.delays) / 1000, seed
    assert document["maximum"] == max(expected.delays) / 1000, seed
    mean = sum(expected.delays) / len(expected.delays)
    assert document["average"] == pytest.approx(mean / 1000, abs=1e-3), seed
    assert document["flows"]["count"] <= document["packets"]["pif"], seed
