"""A model of a kernel that forwards packets of one size on several processors, with its truth."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import netweaver
from netweaver import EventKind

SIZE = 40
DRIVER = 1_000_000  # added to the number of a processor that sends what another one has queued
NFT = netweaver.End(EventKind.DROPPED, 1, "NETFILTER_DROP")
QDISC = netweaver.End(EventKind.DROPPED, 2, "QDISC_DROP")
NO_SOCKET = netweaver.End(EventKind.DROPPED, 3, "NO_SOCKET")
TO_HOST = netweaver.End(EventKind.CONSUMED, 4, None)
GIVEN = netweaver.End(EventKind.DROPPED, 5, None)
SYMBOLS = {1: "nft", 2: "qdisc", 3: "udp", 4: "tcp", 5: "xenvif_rx_copy_flush"}


@dataclass
class Truth:
    """What really happened to the captured packets."""

    stages: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # by packet
    losses: Counter[tuple[str, str]] = field(default_factory=Counter)  # by stage and place


class KernelModel:
    """Packets of two sources, of which one is captured, in batches on each processor."""

    def __init__(
        self,
        seed: int,
        processors: int = 2,
        packets: int = 3000,
        gap: int = 8000,  # mean ns between packets
        batch: int = 8,
        foreign: float = 0.3,  # share of packets that aren't captured
        lost_events: float = 0.0,
        slow_queue: bool = False,  # sends later, and on any processor
    ) -> None:
        self.truth = Truth()
        self._chance = random.Random(seed)
        self._processors = processors
        self._events: list[netweaver.Event] = []
        self._sightings: dict[str, list[tuple[int, str]]] = {"pif": [], "vif": []}
        self._numbers = count()
        self._skbs = count(1)
        self._free: list[tuple[int, int]] = []  # when skbs of this processor became free
        self._queue: list[tuple[int, int, int, int, str, bool]] = []
        self._foreign = foreign
        for processor in range(processors):
            self._run(processor, packets // processors, gap, batch, slow_queue)
        if slow_queue:
            self._send_queue()
        self._lost = 0
        kept = []
        for event in sorted(self._events, key=lambda event: event.time):
            if self._chance.random() < lost_events:
                self._lost += 1
            else:
                kept.append(event)
        self._events = kept

    def _run(self, processor: int, packets: int, gap: int, batch: int, slow_queue: bool) -> None:
        chance = self._chance
        now = 1_000_000 + chance.randrange(1000)
        self._free = []
        while packets > 0:
            size = min(packets, 1 + int(chance.random() ** 2 * batch))
            packets -= size
            now += int(chance.expovariate(1 / (gap * size)))
            stamps = []
            for _ in range(size):
                now += chance.randrange(20, 120)
                stamps.append(now)
            for stamp in stamps:
                now = self._forward(processor, stamp, now, slow_queue)

    def _forward(self, processor: int, stamp: int, now: int, slow_queue: bool) -> int:
        """Process one packet of a batch, and return the time after that."""
        chance = self._chance
        foreign = chance.random() < self._foreign
        packet = f"{next(self._numbers):07d}"
        skb = self._take_skb(now)
        if not foreign:
            self._sightings["pif"].append((stamp, packet))
        now += chance.randrange(200, 600)
        received = now
        self._add(received, processor, EventKind.RECEIVED, skb, b"eth0", SIZE)
        now += chance.randrange(500, 3000)
        end = self._end_in_forwarding(foreign)
        if end:
            self._end(now, processor, skb, end)
            return now
        queued = now
        self._add(queued, processor, EventKind.QUEUED, skb, b"vif5.0", SIZE + 14)
        if chance.random() < 0.05:
            now += chance.randrange(100, 400)
            self._end(now, processor, skb, QDISC)
            self.truth.losses["queueing", "qdisc"] += not foreign
            return now
        if slow_queue:
            self._queue.append((queued, skb, stamp, received, packet, foreign))
            return now + 200
        seen = now + chance.randrange(100, 700)
        sent = seen + chance.randrange(100, 800)
        self._send(processor, skb, (stamp, received, queued, seen, sent), packet, foreign)
        return sent + chance.randrange(100, 500)

    def _end_in_forwarding(self, foreign: bool) -> netweaver.End | None:
        """Return the end of a packet that doesn't reach the vif."""
        fate = self._chance.random()
        if foreign and fate < 0.3:
            return self._chance.choice((TO_HOST, NO_SOCKET))
        if fate < 0.35 and self._chance.random() < 0.2:
            self.truth.losses["forwarding", "nft"] += not foreign
            return NFT
        return None

    def _send_queue(self) -> None:
        """Send the packets of all processors one after the other."""
        now = 0
        chance = self._chance
        for queued, skb, stamp, received, packet, foreign in sorted(self._queue):
            seen = max(now + chance.randrange(1500, 4000), queued + chance.randrange(100, 400))
            now = seen + chance.randrange(100, 800)
            processor = DRIVER + chance.randrange(self._processors)
            self._send(processor, skb, (stamp, received, queued, seen, now), packet, foreign)

    def _send(
        self,
        processor: int,
        skb: int,
        times: tuple[int, int, int, int, int],
        packet: str,
        foreign: bool,
    ) -> None:
        stamp, received, queued, seen, sent = times
        self._add(sent, processor, EventKind.SENT, skb, b"vif5.0", SIZE + 14)
        if not foreign:
            self._sightings["vif"].append((seen, packet))
            self.truth.stages[packet] = (received - stamp, queued - received, sent - queued)
        end = sent + self._chance.randrange(1000, 50_000)
        self._end(end, self._chance.randrange(self._processors), skb, GIVEN)

    def _take_skb(self, now: int) -> int:
        if self._free and self._free[0][0] <= now:
            return heapq.heappop(self._free)[1]
        return next(self._skbs)

    def _end(self, time_ns: int, processor: int, skb: int, end: netweaver.End) -> None:
        self._events.append(netweaver.Event(time_ns, processor, end.kind, skb, end=end))
        heapq.heappush(self._free, (time_ns, skb))

    def _add(
        self, time_ns: int, processor: int, kind: EventKind, skb: int, device: bytes, size: int
    ) -> None:
        self._events.append(netweaver.Event(time_ns, processor, kind, skb, device, size))

    def match(self) -> netweaver.DirectionResult:
        """Return what the captures show."""
        sightings = netweaver.Sightings(netweaver.IN)
        for point, seen in self._sightings.items():
            ordered = sorted(seen)
            head = b"\x04\x06" + SIZE.to_bytes(2, "big") + bytes(10)
            identities = [head + packet.encode() for _, packet in ordered]
            sightings.add(point, identities, [time_ns for time_ns, _ in ordered])
        return netweaver.match(sightings)

    def trace(self) -> netweaver.KernelTrace:
        """Return what the kernel's trace shows."""
        collector = netweaver.PassageCollector("vif5.0", ["eth0"])
        for event in self._events:
            collector.add(event)
        return netweaver.KernelTrace(
            passages=collector.passages,
            symbols=SYMBOLS,
            devices=collector.devices,
            lost=self._lost,
            ended_early=False,
            partly_read=False,
            clock_set=False,
        )
