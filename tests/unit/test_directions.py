"""Both directions of captured traffic, and the time of the guest between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frames import ethernet, icmp, ipv4, ipv6, pcap, tcp, write
from helpers import T, analyzed, answers, captures, distinct, offline, through


def conversation(
    tmp_path: Path,
    probes: list[tuple[bytes, bytes | None]],
    *,
    into: int = 5000,
    guest: int = 20_000,
    out: int = 3000,
) -> list[str]:
    """Write captures of probes and the VM's answers, with constant times in ns."""
    pif, vif = [], []
    for number, (probe, answer) in enumerate(probes):
        start = T + number * 1_000_000
        pif.append((start, ethernet(probe)))
        vif.append((start + into, ethernet(probe)))
        if answer:
            vif.append((start + into + guest, ethernet(answer)))
            pif.append((start + into + guest + out, ethernet(answer)))
    return [
        write(tmp_path / f"{name}.pcap", pcap(sorted(records)))
        for name, records in (("pif", pif), ("vif", vif))
    ]


BACK: dict[str, Any] = {"source": "10.0.0.1", "destination": "10.0.0.2"}


def test_both_directions_and_the_guest(tmp_path: Path) -> None:
    probes: list[tuple[bytes, bytes | None]] = []
    for n in range(8):
        syn = ipv4(tcp(1000 + n, 80, seq=0xFFFFFFFF - n), ident=n)
        probes.append(
            (syn, ipv4(tcp(80, 1000 + n, seq=7, ack=-n % 2**32, flags=0x12), ident=50 + n, **BACK))
        )
        data = ipv4(tcp(2000 + n, 81, seq=100, payload=bytes(n)), ident=100 + n)
        probes.append(
            (data, ipv4(tcp(81, 2000 + n, ack=101 + n, flags=0x14), ident=150 + n, **BACK))
        )
        echo = ipv4(icmp(8, 0, 77, n, bytes(20)), 1, 200 + n)
        probes.append((echo, ipv4(icmp(0, 0, 77, n, bytes(20)), 1, 250 + n, **BACK)))
    probes.append((ipv4(tcp(3000, 82), ident=300), None))  # no answer
    probes.append((ipv4(tcp(3001, 82, flags=0x10), ident=301), None))  # no probe
    probes.append((ipv4(b"", 132, ident=302), None))  # nothing but a header
    document = analyzed(
        "--pcaps", *conversation(tmp_path, probes), "-d", "10.0.0.1", "--direction", "both"
    )
    assert document["config"]["direction"] == "both"
    assert document["packets"] == {
        "pif": 27,
        "vif": 27,
        "matched": 27,
        "ambiguous": 0,
        "lost": 0,
        "undecided": 0,
        "duplicated": 0,
        "reordered": 0,
        "vif_only": 0,
    }
    assert document["minimum"] == document["maximum"] == 5
    assert document["outbound"]["packets"] == {
        "vif": 24,
        "pif": 24,
        "matched": 24,
        "ambiguous": 0,
        "lost": 0,
        "undecided": 0,
        "duplicated": 0,
        "reordered": 0,
        "pif_only": 0,
    }
    assert document["outbound"]["minimum"] == document["outbound"]["maximum"] == 3
    assert document["outbound"]["unit"] == document["guest"]["unit"] == "microseconds"
    assert document["guest"]["minimum"] == document["guest"]["maximum"] == 20
    assert document["guest"]["packets"] == {
        "answered": 24,
        "unanswered": 1,
        "undecided": 0,
        "ambiguous": 0,
    }
    assert document["capture"]["pif"]["filtered"] == 0


def test_the_guest_over_ipv6(tmp_path: Path) -> None:
    back: dict[str, Any] = {"source": "fd00::1", "destination": "fd00::2"}
    probes: list[tuple[bytes, bytes | None]] = [
        (ipv6(icmp(128, 0, 9, n), 58), ipv6(icmp(129, 0, 9, n), 58, **back)) for n in range(4)
    ]
    probes += [
        (ipv6(tcp(n + 1, 80, seq=5, payload=b"x")), ipv6(tcp(80, n + 1, ack=6, flags=0x12), **back))
        for n in range(4)
    ]
    document = analyzed(
        "--pcaps", *conversation(tmp_path, probes), "-d", "fd00::1", "--direction", "both"
    )
    assert document["guest"]["packets"] == {
        "answered": 8,
        "unanswered": 0,
        "undecided": 0,
        "ambiguous": 0,
    }
    assert document["guest"]["average"] == 20


def test_negative_delays_of_answers_are_not_blamed_on_the_clock(tmp_path: Path) -> None:
    """Without -d both directions count as one, and answers pass the vif first."""
    packets = distinct(60)
    answered = answers(60, later=500_000)
    pif = sorted([*packets, *through(answered, [3000] * 60)])
    vif = sorted([*through(packets, [5000] * 60), *answered])
    paths = captures(tmp_path, pif, vif)
    [warning] = [text for text in analyzed("--pcaps", *paths)["warnings"] if "negative" in text]
    assert "60 delays" in warning
    assert "answers" in warning
    assert "-d" in warning
    assert analyzed("--pcaps", *paths, "-d", "10.0.0.1")["median"] == 5.0


def test_what_only_looks_like_an_answer(tmp_path: Path) -> None:
    """Another port, another number, a plain ACK, an answer from before.

    And a probe that was sent twice.
    """
    probe = ipv4(tcp(1000, 80, seq=100), ident=1)
    again = ipv4(tcp(1001, 80, seq=100), ident=2), ipv4(tcp(1001, 80, seq=100), ident=3)
    wrong = [
        tcp(80, 1002, ack=101, flags=0x12),
        tcp(80, 1000, ack=102, flags=0x12),
        tcp(80, 1000, ack=101, flags=0x10),
        tcp(80, 1001, ack=101, flags=0x12),
    ]
    replies = [ipv4(content, ident=10 + n, **BACK) for n, content in enumerate(wrong)]
    early = ipv4(tcp(80, 1000, ack=101, flags=0x12), ident=30, **BACK)
    vif = [
        (T - 50, early),
        (T + 100, probe),
        (T + 200, again[0]),
        (T + 300, again[1]),
        *((T + 1000 + n, answer) for n, answer in enumerate(replies)),
    ]
    pif = [(time + (50 if packet in (early, *replies) else -50), packet) for time, packet in vif]
    paths = [
        write(
            tmp_path / f"{name}.pcap",
            pcap(sorted((time, ethernet(packet)) for time, packet in records)),
        )
        for name, records in (("pif", pif), ("vif", vif))
    ]
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert document["guest"] == {
        "packets": {"answered": 0, "unanswered": 1, "undecided": 0, "ambiguous": 2}
    }
    assert [text for text in document["warnings"] if text.startswith("guest: left out 2 probes")]


def test_a_vm_that_never_answers(tmp_path: Path) -> None:
    paths = conversation(tmp_path, [(ipv4(tcp(1000 + n), ident=n), None) for n in range(5)])
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert document["outbound"] is None
    assert document["guest"] == {
        "packets": {"answered": 0, "unanswered": 5, "undecided": 0, "ambiguous": 0}
    }
    assert any(
        text.startswith("outbound: no packet was seen on both interfaces (0 on ")
        for text in document["warnings"]
    )
    assert offline("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "out").returncode == 6


def test_out_alone(tmp_path: Path) -> None:
    pairs: list[tuple[bytes, bytes | None]] = [
        (
            ipv4(tcp(1000 + n), ident=n),
            ipv4(tcp(80, 1000 + n, ack=1, flags=0x14), ident=50 + n, **BACK),
        )
        for n in range(5)
    ]
    paths = conversation(tmp_path, pairs)
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "out")
    assert document["packets"] == {
        "vif": 5,
        "pif": 5,
        "matched": 5,
        "ambiguous": 0,
        "lost": 0,
        "undecided": 0,
        "duplicated": 0,
        "reordered": 0,
        "pif_only": 0,
    }
    assert document["average"] == 3
    assert document["capture"]["vif"]["filtered"] == 5
    done = offline("--pcaps", *paths, "--direction", "both")
    assert done.returncode == 2
    assert "requires the VM's address (-d)" in done.stderr


def test_a_probe_in_fragments_is_answered(tmp_path: Path) -> None:
    """The answer acknowledges the payload of all fragments."""
    payload = bytes(100)
    whole = tcp(1000, 80, seq=100, payload=payload)
    probe = [
        ipv4(whole[:56], ident=7, fragment=0x2000),
        ipv4(whole[56:], ident=7, fragment=56 // 8),
    ]
    answer = ipv4(tcp(80, 1000, ack=101 + len(payload), flags=0x14), ident=8, **BACK)
    vif = [(T, probe[0]), (T + 1000, probe[1]), (T + 50_000, answer)]
    pif = [(T - 5000, probe[0]), (T - 4000, probe[1]), (T + 55_000, answer)]
    paths = captures(tmp_path, pif, vif)
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert document["guest"]["packets"]["answered"] == 1
    assert document["guest"]["average"] == 50


def test_packets_the_other_way_are_told_without_mirrored_addresses(tmp_path: Path) -> None:
    """Such as broadcasts of another host, where packets go out."""
    sent = distinct(60)
    others = distinct(60, source="10.0.0.9", destination="10.0.0.255")
    pif = sorted([*sent, *through(others, [3000] * 60)])
    vif = sorted([*through(sent, [5000] * 60), *others])
    document = analyzed("--pcaps", *captures(tmp_path, pif, vif))
    [warning] = [text for text in document["warnings"] if "negative" in text]
    assert "answers" in warning


def test_all_answers_are_lost(tmp_path: Path) -> None:
    """The interfaces are right, since the probes have passed both."""
    probes = distinct(60)
    vif = sorted([*through(probes, [5000] * 60), *answers(60, later=500_000)])
    paths = captures(tmp_path, probes, vif)
    document = analyzed("--pcaps", *paths, "-d", "10.0.0.1", "--direction", "both")
    assert document["outbound"] is None
    [warning] = [text for text in document["warnings"] if text.startswith("outbound")]
    assert "firewall" in warning
    assert "interface that" not in warning


def test_a_clock_that_is_behind_for_one_source(tmp_path: Path) -> None:
    """Its packets go the same way as the others', to the same destination."""
    sent = distinct(60)
    others = distinct(60, source="10.0.0.9")
    pif = sorted([*sent, *others])
    vif = sorted([*through(sent, [5000] * 60), *through(others, [-3000] * 60)])
    document = analyzed("--pcaps", *captures(tmp_path, pif, vif))
    [warning] = [text for text in document["warnings"] if "negative" in text]
    assert "time stamps of two CPUs" in warning
