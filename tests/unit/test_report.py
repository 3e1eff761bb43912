"""The document on two captures: its warnings, and why there may be none."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from frames import ethernet, ipv4, ipv6, pcap, tcp, udp, write
from helpers import Packets, T, analyzed, captures, distinct, failure, offline, paired, through
from laboratory import NETWEAVER

import netweaver

UDP6 = ipv6(udp(payload=b"same"), 17)  # without an id, so that all are identical


def document(directory: Path, pif: Packets, vif: Packets, *arguments: str) -> dict[str, Any]:
    return analyzed("--pcaps", *captures(directory, pif, vif), *arguments)


def error(directory: Path, pif: Packets, vif: Packets, *arguments: str) -> str:
    return failure(offline("--pcaps", *captures(directory, pif, vif), *arguments), 6)


def packets(count: int, gap: int, make: Callable[[int], bytes]) -> Packets:
    """Return packets that a function makes by their number, `gap` nanoseconds apart."""
    return [(T + number * gap, make(number)) for number in range(count)]


def early(vif: Packets, by: int) -> Packets:
    """Return packets of which the first one came earlier."""
    time, content = vif[0]
    return [(time - by, content), *vif[1:]]


def last_is_late(vif: Packets) -> Packets:
    time, content = vif[-1]
    return [*vif[:-1], (time + 2_000_000_000, content)]


def others_follow(vif: Packets) -> Packets:
    """Return packets of which most are replaced by others."""
    other = ipv4(tcp(seq=9), ident=9, source="10.9.9.9")
    return [*vif[:100], *((time, other) for time, _ in vif[100:])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vif: early(vif, 9000), "1 delay is negative (down to -8 "),
        (lambda vif: early(vif, 1000), "1 delay is exactly 0"),
        (last_is_late, "1 packet is not matched: the times on the pif and the vif differ too much"),
        (others_follow, "most packets of each interface were not seen on the other"),
    ],
)
def test_warnings(change: Callable[[Packets], Packets], words: str, tmp_path: Path) -> None:
    pif = distinct(600)
    vif = through(pif, [1000] * 600)
    assert words in " ".join(document(tmp_path, pif, change(vif))["warnings"])
    assert document(tmp_path, pif, vif)["warnings"] == []


PLURAL = re.compile(
    r"(?<![\d.])1 (?:\w+ )?(?:packets|probes|delays|runs|bytes|records|events|places|sources)\b"
)
ONE = [(T, ipv4(tcp(seq=1), ident=1))]
SAME = [(T + number, UDP6) for number in (1, 900_000_000)]


@pytest.mark.parametrize(
    ("pif", "vif", "arguments", "words"),
    [
        (ONE, ONE, ["--fail-if", "p99>1s"], "with 1 packet p99 is close"),
        (ONE, ONE, ["--format", "text"], "1 on the pif"),
        (ONE, early(ONE, 1000), [], "every delay is negative (1 packet, "),
        (SAME, SAME[1:], [], "1 packet was seen on both interfaces"),
        (SAME + ONE, SAME[1:] + ONE, [], "1 matched packet can't be told apart"),
    ],
)
def test_one_is_no_plural(
    pif: Packets, vif: Packets, arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = offline("--pcaps", *captures(tmp_path, sorted(pif), sorted(vif)), *arguments)
    shown = done.stdout + done.stderr
    assert words in shown
    assert not PLURAL.search(shown)


def test_counts_are_written_by_the_function_for_them() -> None:
    """A number before a plural noun in the source would also be written where it is 1."""
    source = ast.unparse(ast.parse(NETWEAVER.read_text(encoding="utf-8")))
    nouns = "packets|probes|delays|runs|bytes|records|events|keys"
    found = re.findall(rf"{{([^{{}}!]+)}} (?:{nouns})\b", source)
    # Constants above 1, and totals that are shown only if they are above 1.
    assert {name for name in found if not name.isupper()} <= {"len(saved)", "total", "largest"}


def test_a_packet_that_is_seen_much_later_is_lost(tmp_path: Path) -> None:
    """It was sent again, and came by another way; RFC 7680 has a waiting time for this."""
    pif = distinct(10_000)
    delays: list[int | None] = [2000] * 10_000
    delays[5000] = 4_000_000_000
    report = document(tmp_path, pif, through(pif, delays))
    assert report["packets"]["matched"] == 9999
    assert report["packets"]["lost"] == 1
    assert report["maximum"] == report["median"] == 2


def test_identical_packets_are_counted_and_not_timed(tmp_path: Path) -> None:
    pif = packets(1000, 2_000_000, lambda number: UDP6)
    pif += distinct(600, source="10.0.0.7")
    delays: list[int | None] = [1_900_000] * 1600
    delays[300] = None
    delays[700] = None
    report = document(tmp_path, sorted(pif), through(pif, delays))
    assert report["packets"]["matched"] == 1598
    assert report["packets"]["lost"] == 2
    assert report["packets"]["ambiguous"] == 998
    assert report["minimum"] == report["maximum"] == 1900
    assert report["loss_ratio"] == 2 / 1600
    [warning] = [text for text in report["warnings"] if "998 matched packets" in text]
    assert "Capture packets that differ" in warning


def test_only_identical_packets_are_an_error(tmp_path: Path) -> None:
    pif = packets(100, 2_000_000, lambda number: UDP6)
    line = error(tmp_path, pif, through(pif, [None] + [2_000_000] * 99))
    assert "98 packets were seen on both interfaces, but no delay is certain" in line
    assert "Capture packets that differ" in line


def test_equal_packets_of_two_sources_behind_a_translation(tmp_path: Path) -> None:
    """Two hping3 of the same second send the same; without addresses they can't be told apart."""

    def syn(number: int, source: str) -> bytes:
        return ipv4(tcp(seq=number // 2), ident=number // 2, source=source)

    pif = packets(1200, 1000, lambda number: syn(number, f"192.0.2.{number % 2}"))
    vif = packets(1200, 1000, lambda number: syn(number, "10.0.0.9"))
    pif.append((T + 2_000_000, syn(10_000, "192.0.2.3")))
    vif.append((T + 2_000_000, syn(10_000, "10.0.0.9")))
    arrived = through(vif, [500] * 100 + [None] + [500] * 1100)
    report = document(tmp_path, pif, arrived, "--match-nat")
    assert report["packets"]["matched"] == 1200
    assert report["packets"]["lost"] == 1
    assert report["packets"]["ambiguous"] == 1199
    assert report["minimum"] == report["maximum"] == 0.5


def test_packets_of_other_streams_overtake_nobody(tmp_path: Path) -> None:
    """RFC 4737 knows reordering within a stream only; here one of three sources is slow."""
    streams = [f"10.0.0.{number}" for number in (2, 3, 4)]
    pif = packets(900, 1000, lambda i: ipv4(tcp(seq=i), ident=i, source=streams[i % 3]))
    slow = through(pif, [90_000, 50_000, 50_000] * 300)
    assert document(tmp_path, pif, slow)["packets"]["reordered"] == 0
    delays: list[int | None] = [50_000] * 900
    delays[300] = 90_000
    report = document(tmp_path, pif, through(pif, delays))
    assert report["packets"]["reordered"] == 1
    assert report["reordering"]["maximum_extent"] == 13


def segment(number: int, size: int, flags: int = 0) -> bytes:
    """Return a TCP segment with a time stamp option."""
    option = b"\1\1\x08\x0a" + bytes(8)
    header = tcp(80, 9000, number * 1000, 7, 0x10 | flags, option, bytes(size))
    return ipv4(header, ident=number)


@pytest.mark.parametrize("flags", [0x18, 0x10, 0x11, 0x90])
def test_merged_segments_are_recognised(flags: int, tmp_path: Path) -> None:
    """GRO gives ten segments the first one's number, and the last one's PSH or FIN."""
    pif = [(T - 10_000, segment(5000, 10))]
    vif = [(T - 5000, segment(5000, 10))]
    for number in range(0, 3000, 10):
        time = T + number * 10_000
        pif.append((time, segment(number, 10_000, flags)))
        for part in range(10):
            last = 0x18 if part == 9 else 0
            vif.append((time + part * 10_000 + 5000, segment(number + part, 1000, last)))
    for number in range(3000, 3040, 10):
        time = T + number * 10_000
        pif.append((time, segment(number, 10)))
        vif.append((time + 5000, segment(number, 10)))
    report = document(tmp_path, pif, vif)
    assert report["packets"]["lost"] == 300
    assert report["packets"]["matched"] == 5
    warnings = " ".join(report["warnings"])
    assert "300 packets are not matched" in warnings
    assert "GRO, TSO" in warnings
    assert "--match-nat" not in warnings


def moved(content: bytes) -> bytes:
    """Return an IPv4 packet whose destination was translated."""
    return content[:16] + bytes([192, 168, 122, 5]) + content[20:]


def test_merged_segments_behind_a_translated_address(tmp_path: Path) -> None:
    pif = [(T + n * 10_000, segment(10 * n, 2000, 0x18)) for n in range(100)]
    vif = []
    for number, (time, _) in enumerate(pif):
        for part, flags in enumerate((0x10, 0x18)):
            content = moved(segment(10 * number + part, 1000, flags))
            vif.append((time + 100 + part, content))
    line = failure(offline("--pcaps", *captures(tmp_path, pif, vif), "--match-nat"), 6)
    assert "GRO, TSO" in line


def test_datagrams_that_are_fragmented_behind_a_translated_address(tmp_path: Path) -> None:
    pif = packets(100, 1_000_000, lambda n: ipv4(udp(payload=bytes(1000)), 17, n + 1))
    vif = []
    for number, (time, content) in enumerate(pif):
        body = content[20:]
        parts = (ipv4(body[:504], 17, number + 1, fragment=0x2000), time + 5000)
        rest = (ipv4(body[504:], 17, number + 1, fragment=504 // 8), time + 5001)
        vif += [(when, moved(part)) for part, when in (parts, rest)]
    line = failure(offline("--pcaps", *captures(tmp_path, pif, vif), "--match-nat"), 6)
    assert "as fragments" in line


def test_other_packets_behind_a_translated_address(tmp_path: Path) -> None:
    pif = packets(60, 1_000_000, lambda n: ipv4(tcp(seq=n), ident=n))
    vif = packets(60, 1_000_000, lambda n: moved(ipv4(tcp(seq=n + 1000), ident=n)))
    line = failure(offline("--pcaps", *captures(tmp_path, pif, vif), "--match-nat"), 6)
    assert "Is there other traffic?" in line


def test_split_datagrams_are_recognised(tmp_path: Path) -> None:
    """By UDP's segmentation offload, as for QUIC: the first part keeps number and ports."""
    pif = packets(100, 1_000_000, lambda n: ipv4(udp(payload=bytes(2400)), 17, 2 * n + 1))
    vif = []
    for number, (time, _) in enumerate(pif):
        for part in range(2):
            content = ipv4(udp(payload=bytes(1200)), 17, 2 * number + 1 + part)
            vif.append((time + 5000 + part, content))
    line = failure(offline("--pcaps", *captures(tmp_path, pif, vif)), 6)
    assert "merged or split" in line


def test_other_datagrams_are_not_split_ones(tmp_path: Path) -> None:
    """They have no IP number, and begin alike, as lines of a log do."""
    sent = packets(60, 1_000_000, lambda n: ipv4(udp(payload=bytes(40) + bytes([n])), 17, n + 1))
    lost = (T + 500_000, ipv4(udp(payload=bytes(100)), 17, 0))
    other = (T + 900_000, ipv4(udp(payload=bytes(200)), 17, 0))
    vif = through(sent, [500] * 60)
    warnings = document(tmp_path, sorted([*sent, lost]), sorted([*vif, other]))["warnings"]
    assert not any("merged or split" in warning for warning in warnings)


def test_datagrams_that_are_whole_again(tmp_path: Path) -> None:
    """They came in as fragments: nothing was merged by GRO."""
    sent = packets(60, 1_000_000, lambda n: ipv4(tcp(seq=n), ident=n))
    pif = list(sent)
    vif = through(sent, [500] * 60)
    for number in range(100, 110):
        time = T + number * 10_000
        body = udp(payload=bytes(1000))
        pif.append((time, ipv4(body[:504], 17, number, fragment=0x2000)))
        pif.append((time + 1, ipv4(body[504:], 17, number, fragment=504 // 8)))
        vif.append((time + 500, ipv4(body, 17, number)))
    warnings = document(tmp_path, sorted(pif), sorted(vif))["warnings"]
    assert not any("merged or split" in warning for warning in warnings)


def test_all_frames_of_one_point_are_truncated(tmp_path: Path) -> None:
    records = [(time, ethernet(content)) for time, content in distinct(200)]
    whole, cut = pcap(records), pcap(records[:60], snaplen=30)
    line = failure(offline("--pcaps", write(tmp_path / "a", whole), write(tmp_path / "b", cut)), 6)
    assert "snap length was too short to identify 60 packets" in line


def test_a_truncated_frame_is_not_the_cause(tmp_path: Path) -> None:
    """One among many packets: the others would not match with a whole frame, either."""
    records = [(time, ethernet(content)) for time, content in distinct(60)]
    cut = pcap(records) + pcap(records[-1:], snaplen=30)[24:]  # without the file's header
    others = pcap([(time, ethernet(content)) for time, content in distinct(60, source="10.9.9.9")])
    paths = [write(tmp_path / "pif", cut), write(tmp_path / "vif", others)]
    line = failure(offline("--pcaps", *paths, "-d", "10.0.0.1"), 6)
    assert "snap length" not in line
    assert "--match-nat" in line


def test_a_packet_that_was_seen_long_before_it_was_sent(tmp_path: Path) -> None:
    """Its number came up earlier: that arrival is nobody's, and the packet is matched."""
    pif = packets(60, 100_000_000, lambda n: ipv4(tcp(seq=n), ident=n))
    early = (T + 10**9, pif[50][1])  # four seconds before the packet
    vif = sorted([early, *through(pif, [900] * 60)])
    report = document(tmp_path, pif, vif)
    assert report["packets"]["matched"] == 60
    assert not any("clock" in warning for warning in report["warnings"])


@pytest.mark.parametrize("coarse", ["pif", "vif"])
def test_stamps_of_two_precisions(coarse: str, tmp_path: Path) -> None:
    """A warning names both units."""
    paths = []
    units = []
    for side, shift in (("pif", 0), ("vif", 200)):
        records = [(time + shift, ethernet(ip)) for time, ip in distinct(600, 1_000_007)]
        data = pcap(records, nanoseconds=side != coarse)
        paths.append(write(tmp_path / side, data))
        units.append("microseconds" if side == coarse else "nanoseconds")
    document = analyzed("--pcaps", *paths)
    assert document["packets"]["matched"] == 600
    [warning] = [text for text in document["warnings"] if "time stamps of the pif" in text]
    assert warning.index(units[0]) < warning.index(units[1])


def test_swapped_captures(tmp_path: Path) -> None:
    pif = distinct(50)
    line = error(tmp_path, through(pif, [1000] * 50), pif)
    assert "every delay is negative (50 packets, -1 to -1 µs)" in line
    assert "swapped" in line


@pytest.mark.parametrize("direction", ["in", "both"])
def test_source_and_destination_are_swapped(direction: str) -> None:
    result = paired([("a", 5000), ("b", 9000)], [("a", 1000), ("b", 2000)])
    selection = netweaver.Selection(netweaver.DIRECTIONS[direction])
    info = netweaver.RunInfo("eth0", "vif5.0", selection, measured=True, sources=["10.0.0.1"])
    analysis = netweaver.Analysis([result], {"pif": {}, "vif": {}}, [], None)
    with pytest.raises(netweaver.NoMatchError, match="-s and -d swapped") as failure:
        netweaver.build_report(analysis, info, {"pif": {}, "vif": {}})
    assert ("--direction out" in str(failure.value)) == (direction == "in")


@pytest.mark.parametrize(
    ("count", "percentile", "words"),
    [
        (49, "p99", "with 49 packets p99 is close to the maximum"),
        (49, "p95", ""),
        (400, "p99.9", "with 400 packets p99.9 is close to the maximum"),
        (500, "p99.9", ""),
    ],
)
def test_percentiles_of_few_packets(
    count: int, percentile: str, words: str, tmp_path: Path
) -> None:
    """Only users who ask for a percentile are told."""
    paths = captures(tmp_path, distinct(count), through(distinct(count), [1000] * count))
    assert offline("--pcaps", *paths).stderr == ""
    errors = offline("--pcaps", *paths, "--fail-if", f"{percentile}>1s").stderr
    assert words in errors
    assert errors.count("\n") == bool(words)
    assert "-c" not in errors


def alone(tmp_path: Path, side: str) -> list[str]:
    """Return the paths of two captures, of which only one has packets."""
    packets = distinct(20)
    return captures(tmp_path, packets if side == "pif" else [], packets if side == "vif" else [])


@pytest.mark.parametrize("side", ["pif", "vif", ""])
@pytest.mark.parametrize("selection", [(), ("-d", "10.0.0.1"), ("-d", "10.9.9.9")])
def test_advice_on_files_is_accepted(side: str, selection: tuple[str, ...], tmp_path: Path) -> None:
    line = failure(offline("--pcaps", *alone(tmp_path, side), *selection), 6)
    for option in ("-i", "--overlay", "--num", "--vif", "-c", "--wait"):
        assert f"{option} " not in f"{line} ".replace(",", " ").replace(")", " ")


def test_advice_leaves_out_what_is_in_use(tmp_path: Path) -> None:
    packets = distinct(20)
    others = distinct(20, source="10.9.9.9", destination="10.9.9.8", gap=2_000_000)
    paths = captures(tmp_path, packets, [(time, ip[:4] + b"xx" + ip[6:]) for time, ip in others])
    assert "--match-nat" in failure(offline("--pcaps", *paths), 6)
    assert "--match-nat" not in failure(offline("--pcaps", *paths, "--match-nat"), 6)


@pytest.mark.parametrize(("times", "words"), [(2, "twice"), (3, "3 times")])
@pytest.mark.parametrize("lost", [0, 2])
def test_each_packet_was_captured_several_times_on_the_pif(
    lost: int, times: int, words: str, tmp_path: Path
) -> None:
    packets = distinct(50)
    pif = [(time + 5000 * copy, content) for time, content in packets for copy in range(times)]
    paths = captures(tmp_path, pif, through(packets[lost:], [19_000] * 50))
    line = failure(offline("--pcaps", *paths), 6)
    assert f"captured {words} on the pif" in line
    for cause in ("SPAN", "-i any", "bridge"):
        assert cause in line


def test_most_packets_were_captured_twice_on_the_pif(tmp_path: Path) -> None:
    packets = distinct(600)
    copies = [(time + 5000, content) for time, content in packets[:590]]
    paths = captures(tmp_path, sorted([*packets, *copies]), through(packets, [9000] * 600))
    document = analyzed("--pcaps", *paths)
    assert document["packets"]["matched"] - document["packets"]["ambiguous"] == 10
    assert "captured twice on the pif" in " ".join(document["warnings"])


def test_answers_were_captured_twice_on_the_pif(tmp_path: Path) -> None:
    packets = distinct(60)
    copies = [(time + 12_000, content) for time, content in packets]
    arrived = through(packets, [9000] * 60)
    paths = captures(tmp_path, sorted([*arrived, *copies]), packets)
    document = analyzed("--pcaps", *paths, "--direction", "out")
    assert "captured twice on the pif" in " ".join(document["warnings"])


def test_most_answers_were_captured_twice_and_one_more_often(tmp_path: Path) -> None:
    packets = distinct(60)
    copies = [(time + 12_000, content) for time, content in packets]
    copies += [(packets[7][0] + 13_000 + number, packets[7][1]) for number in range(11)]
    paths = captures(tmp_path, sorted([*through(packets, [9000] * 60), *copies]), packets)
    document = analyzed("--pcaps", *paths, "--direction", "out")
    assert "captured twice on the pif" in " ".join(document["warnings"])


def test_identical_answers_were_captured_twice_on_the_pif(tmp_path: Path) -> None:
    """Copies of identical packets are nobody's duplicates."""
    same, other, last = ipv4(udp(), 17, ident=0), ipv4(tcp(seq=1)), ipv4(tcp(seq=2))
    vif = [(T, same), (T + 10_000, same), (T + 20_000, other), (T + 30_000, last)]
    pif = [(T + 5_000 + number, same) for number in range(8)]
    pif += [(T + 25_000, other), (T + 35_000, last)]
    document = analyzed("--pcaps", *captures(tmp_path, pif, vif), "--direction", "out")
    assert document["packets"]["matched"] == 4
    assert document["packets"]["duplicated"] == 6


@pytest.mark.parametrize("retransmissions", [0, 2])
def test_fragments_that_can_not_be_told_apart(retransmissions: int, tmp_path: Path) -> None:
    """As hping3 sends them; they are named only if there is nothing else."""
    packets = distinct(20 + retransmissions)
    packets += [(T + 10**9 + number, packets[number][1]) for number in range(retransmissions)]
    later = ipv4(bytes(60), 17, fragment=185, ident=7)
    packets += [(T + 2 * 10**9 + 1000 * number, later) for number in range(20)]
    document = analyzed("--pcaps", *captures(tmp_path, packets, through(packets, [9000] * 50)))
    [warning] = [text for text in document["warnings"] if "told apart" in text]
    assert ("fragments" in warning) == (retransmissions == 0)
    assert "another run" not in warning


def test_retransmissions_were_not_captured_twice(tmp_path: Path) -> None:
    packets = distinct(50)
    again = sorted([*packets, *((time + 10**9, content) for time, content in packets)])
    line = failure(offline("--pcaps", *captures(tmp_path, again, through(again, [9000] * 100))), 6)
    assert "twice" not in line
    assert "told apart" in line


def test_the_document_has_a_value_for_each_figure(tmp_path: Path) -> None:
    pif = distinct(1000)
    report = document(tmp_path, pif, through(pif, [1000 + number for number in range(1000)]))
    missing = [figure.name for figure in netweaver.FIGURES if figure.find(report) is None]
    assert missing == ["dropped"]  # known only of captures that netweaver makes


@pytest.mark.parametrize(
    ("direction", "toolstack", "vif", "wanted", "unwanted"),
    [
        ("in", "xe", "vif5.0", ("--num", "--vif tap5.0", "(--match-nat)"), ()),
        ("in", "xl", "vif5.0", ("--num", "--vif vif5.0-emu"), ()),
        ("in", None, "vif5.0-emu", (), ("--num", "--vif")),
        ("in", "virsh", "vnet3", ("--num",), ("--vif",)),
        ("both", "xe", "vif5.0", ("--match-nat with --direction in",), ("(--match-nat)",)),
    ],
)
def test_advice_on_a_measurement_can_be_followed(
    direction: str,
    toolstack: str | None,
    vif: str,
    wanted: Sequence[str],
    unwanted: Sequence[str],
) -> None:
    """It names no option that is in use, and none that the command would refuse."""
    info = netweaver.RunInfo(
        pif="eth0",
        vif=vif,
        selection=netweaver.Selection(netweaver.DIRECTIONS[direction]),
        toolstack=toolstack,
    )
    advice = netweaver.measuring_advice(info)
    text = f"{advice.other_vif} {advice.other_pif} {advice.translation}"
    assert [words for words in wanted if words not in text] == []
    assert [words for words in unwanted if words in text] == []


@pytest.mark.parametrize(
    ("changes", "wanted", "unwanted"),
    [
        ({}, "TCP SYNs", "--filter"),
        ({"filter": "tcp"}, "does --filter match", "--overlay"),
        ({"traffic": netweaver.Traffic("syn")}, "another run", "TCP SYNs"),
        ({"traffic": netweaver.Traffic(command="x")}, "TCP SYNs", "another run"),
        ({"selection": netweaver.Selection(translated=True)}, "one source at a time", "TCP SYNs"),
        ({"overlay": True}, "(ESP)", "--overlay"),
        ({"route": netweaver.RouteKind.ROUTED}, "translated (--match-nat)?", "--filter"),
        ({"selection": netweaver.Selection(translated=True)}, "give --filter", "--match-nat)?"),
    ],
)
def test_advice_leaves_out_what_would_not_help(
    changes: dict[str, Any], wanted: str, unwanted: str
) -> None:
    info = netweaver.RunInfo(**{"pif": "eth0", "vif": "vif5.0", **changes})
    advice = netweaver.measuring_advice(info)
    text = f"{advice.other_vif} {advice.other_pif} {advice.distinct}"
    assert wanted in text
    assert unwanted not in text


def test_advice_on_files_leaves_out_the_address_that_is_given() -> None:
    for destinations, is_advised in (([], True), (["10.0.0.1"], False)):
        selection = netweaver.Selection(destinations=destinations)
        info = netweaver.RunInfo(pif="a", vif="b", selection=selection)
        advice = netweaver.file_advice(info)
        assert ("with -d" in advice.other_pif) == is_advised
        assert ("with -d" in advice.other_vif) == is_advised


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-d", "192.0.2.1"), "(--match-nat, without -s and -d)"),
        (("-d", "192.0.2.1", "--match-nat"), "leave out -s and -d"),
        (("-d", "10.0.0.1", "--match-nat"), "leave out -s and -d"),
    ],
)
def test_translated_addresses_that_are_given(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    """Captures of a DNAT have no destination in common."""
    sent = distinct(100, destination="192.0.2.1")
    arrived = [(time + 5000, content) for time, content in distinct(100)]
    paths = captures(tmp_path, sent, arrived)
    assert words in failure(offline("--pcaps", *paths, *arguments), 6)
    assert analyzed("--pcaps", *paths, "--match-nat")["packets"]["matched"] == 100


@pytest.mark.parametrize("intact", [0, 100])
def test_packets_that_are_fragmented_on_the_way(tmp_path: Path, intact: int) -> None:
    """They count as lost, and a warning or the error says that they aren't."""
    pif = packets(100 + intact, 1_000_000, lambda n: ipv4(udp(payload=bytes(992)), 17, n + 1))
    vif = [(time + 5000, content) for time, content in pif[:intact]]
    for number, (time, content) in enumerate(pif[intact:], intact):
        body = content[20:]
        vif.append((time + 5000, ipv4(body[:504], 17, number + 1, fragment=0x2000)))
        vif.append((time + 5001, ipv4(body[504:], 17, number + 1, fragment=504 // 8)))
    if not intact:
        assert "as fragments" in error(tmp_path, pif, vif)
        return
    report = document(tmp_path, pif, vif)
    [warning] = [text for text in report["warnings"] if "as fragments" in text]
    assert warning.startswith(f"{report['packets']['lost']} packets count as lost")


def test_segments_that_are_fragmented_on_the_way(tmp_path: Path) -> None:
    """They are not called merged or split, though their first fragments look like it."""
    pif = packets(60, 1_000_000, lambda n: ipv4(tcp(seq=n, flags=16, payload=bytes(980)), 6, n + 1))
    vif = [(time + 5000, content) for time, content in pif[:40]]
    for number, (time, content) in enumerate(pif[40:], 40):
        body = content[20:]
        vif.append((time + 5000, ipv4(body[:504], 6, number + 1, fragment=0x2000)))
        vif.append((time + 5001, ipv4(body[504:], 6, number + 1, fragment=504 // 8)))
    warnings = " ".join(document(tmp_path, pif, vif)["warnings"])
    assert "20 packets count as lost, but arrived on the vif as fragments" in warnings
    assert "GRO" not in warnings
