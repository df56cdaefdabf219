# SPDX-License-Identifier: Apache-2.0
"""damo.PyOptimizer: each one finds the bottom of a bowl. `python examples/seed/optimizer.py`"""

import numpy as np

import damo

settings = {
    "sgd": {"gamma": 0.1, "lambda": 0.0001},
    "ftrl": {"alpha": 0.5, "beta": 0.1, "lambda1": 0.001, "lambda2": 0.001},
    "adagrad": {"gamma": 0.5, "lambda": 0.0, "eta": 0.0, "epsilon": 1e-10},
    "adam": {"gamma": 0.05, "beta1": 0.9, "beta2": 0.999, "lambda": 0.0, "epsilon": 1e-8},
    "amsgrad": {"gamma": 0.05},
    "adamw": {"gamma": 0.05, "lambda": 0.001},
    "lion": {"eta": 0.01, "beta1": 0.9, "beta2": 0.99, "lambda": 0.001},
}
target = np.array([1.0, -2.0, 0.5], dtype=np.float32)
for name, values in settings.items():
    parameters = damo.Parameters()
    parameters.insert("name", name)
    for key, value in values.items():
        parameters.insert(key, value)
    optimizer = damo.PyOptimizer(parameters)
    weights = np.zeros(3, dtype=np.float32)
    for step in range(1, 501):
        gradients = weights - target
        optimizer.call(weights, gradients, step)  # in place
    print(f"{name:8}", weights)
    assert np.abs(weights - target).max() < 0.05
