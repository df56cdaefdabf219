# SPDX-License-Identifier: Apache-2.0
"""damo.PyInitializer: what a new row starts with. `python examples/seed/initializer.py`"""

import numpy as np

import damo

settings = {
    "zeros": {},
    "ones": {},
    "random_uniform": {"min": -0.5, "max": 0.5},
    "random_normal": {"mean": 1.0, "stddev": 0.1},
    "truncate_normal": {"mean": 0.0, "stddev": 0.5},
    "uniform": {},
    "xavier": {},
    "random": {},
}
bounds = {"random_uniform": 0.5, "truncate_normal": 1.0, "uniform": (1 / 16) ** 0.5, "xavier": (6 / 16) ** 0.5}
for name, values in settings.items():
    parameters = damo.Parameters()
    parameters.insert("name", name)
    for key, value in values.items():
        parameters.insert(key, value)
    initializer = damo.PyInitializer(parameters)
    array = np.full(16, np.nan, dtype=np.float32)
    initializer.call(array)
    print(f"{name:16}", array[:4])
    assert np.isfinite(array).all()
    assert np.abs(array).max() <= bounds.get(name, 10) * 1.000001
