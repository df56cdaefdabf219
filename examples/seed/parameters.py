# SPDX-License-Identifier: Apache-2.0
"""damo.Parameters: names with values. `python examples/seed/parameters.py`"""

import json

import damo

parameters = damo.Parameters()
parameters.insert("name", "adam")  # str
parameters.insert("gamma", 0.001)  # float
parameters.insert("decay_steps", 1000)  # int
parameters.insert("reload", True)  # bool
print(parameters.to_json())
assert json.loads(parameters.to_json()) == {"name": "adam", "gamma": 0.001, "decay_steps": 1000, "reload": True}
