"""Real Open vSwitch: what it answers, and what leads through it from a vif to the pifs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import FAST, report
from openvswitch import LAYOUTS, OpenVSwitchLab

pytestmark = [pytest.mark.lab, pytest.mark.openvswitch]


@pytest.fixture(params=LAYOUTS)
def switched(request: pytest.FixtureRequest) -> Iterator[OpenVSwitchLab]:
    with OpenVSwitchLab(request.param) as built:
        yield built
        built.wait_clean()


def test_auto_finds_the_pifs(switched: OpenVSwitchLab) -> None:
    """Its datapath may lose packets on a busy machine; each of them is counted."""
    options = ("-c", "600", "--source-command", FAST, "-i", "auto", "--direction", "both")
    document = report(switched.netweaver(*switched.arguments(*options)))
    config = document["config"]
    assert config["pif"] == ",".join(switched.layout.pifs)
    assert config["vif"] == "vif5.0"
    assert config["overlay"] is (switched.layout.tunnel_port is not None)
    packets = document["packets"]
    assert packets["pif"] == 600
    assert packets["matched"] == packets["vif"] == 600 - packets["lost"] >= 590
    outbound = document["outbound"]["packets"]
    assert document["guest"]["packets"]["answered"] == outbound["vif"] == packets["vif"]
    assert outbound["lost"] < 10
