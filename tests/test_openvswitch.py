"""Real Open vSwitch: its answers, and what leads through it from a vif to the physical interfaces."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import FAST, report
from openvswitch import OpenVSwitchLab

pytestmark = [pytest.mark.lab, pytest.mark.openvswitch]


@pytest.fixture
def switched(request: pytest.FixtureRequest) -> Iterator[OpenVSwitchLab]:
    with OpenVSwitchLab(request.param) as built:
        yield built
        built.wait_clean()


@pytest.mark.parametrize(("switched", "pifs", "overlay"), [
    ("patch", "eth0", False), ("bond", "eth0,eth1", False), ("tag", "eth0", False), ("vxlan", "eth0", True),
], indirect=["switched"])
def test_auto_finds_the_pif_behind_open_vswitch(switched: OpenVSwitchLab, pifs: str, overlay: bool) -> None:
    """And all that is lost there, as its datapath may do on a busy machine, is told."""
    for direction in ("in", "both"):
        found = report(switched.netweaver(*switched.arguments(
            "-c", "600", "--source-command", FAST, "-i", "auto", "--direction", direction)))
        assert (found["config"]["pif"], found["config"]["vif"]) == (pifs, "vif5.0")
        assert found["config"]["overlay"] is overlay
        packets = found["packets"]
        assert packets["pif"] == 600
        assert packets["matched"] == packets["vif"] == 600 - packets["lost"] >= 590
    assert found["guest"]["packets"]["answered"] == found["outbound"]["packets"]["vif"] == packets["vif"]
    assert found["outbound"]["packets"]["lost"] < 10
