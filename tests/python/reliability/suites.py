# SPDX-License-Identifier: Apache-2.0
"""All suites, by name."""

from __future__ import annotations

from reliability.any_order import AnyOrder
from reliability.bad_input import BadInput
from reliability.bad_input_damo import BadInputOfDamo
from reliability.bad_input_torch import BadInputOfTorch
from reliability.call_fails import CallFails
from reliability.disk_full import DiskFull
from reliability.flips import ColdFlips, Flips
from reliability.fuzz import Fuzz
from reliability.journaled_disk import JournaledDisk
from reliability.kills import Kills
from reliability.power_loss import PowerLoss
from reliability.suite import Suite
from reliability.torch_kills import TorchKills

_SUITES = (
    AnyOrder, Kills, TorchKills, PowerLoss, JournaledDisk, CallFails, DiskFull, Flips, ColdFlips, BadInput,
    BadInputOfTorch, BadInputOfDamo, Fuzz,
)  # fmt: skip
SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in _SUITES}
