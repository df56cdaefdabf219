# SPDX-License-Identifier: Apache-2.0
"""How "never a wrong row" is shown: an oracle, a workload, and the ways in which machines fail.

Each suite has cases that follow from a seed alone. tests/python/test_reliability.py runs a few of each, scripts/soak as
many as are asked for. Start with `suite.py` (what a suite is), `oracle.py` (what must hold) and `workload.py` (what is
done to a storage).
"""
