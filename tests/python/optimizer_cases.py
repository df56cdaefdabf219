# SPDX-License-Identifier: Apache-2.0
"""Every optimizer with each of its parameters varied: what the tests and scripts/agreement run over."""

from __future__ import annotations

from typing import Any

from damo_embedding.optimizers import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    AMSGrad,
    Lion,
    Optimizer,
    RMSprop,
    RowWiseAdagrad,
)

# Beside the defaults. The last argument of each is what it varies, the ones before it are what that needs: a new
# field needs a line here, for an argument accepted is an argument used.
_ADAGRAD: list[dict[str, Any]] = [
    {"lr": 0.05},
    {"lr_decay": 0.01},
    {"weight_decay": 0.01},
    {"initial_accumulator_value": 0.1},
    {"eps": 1e-3},
    {"lr": 0.05, "lr_decay": 1e-3, "eps": 1e-6, "initial_accumulator_value": 0.1, "weight_decay": 0.01},
]
_ADAM: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"betas": (0.5, 0.999)},
    {"betas": (0.9, 0.9)},
    {"eps": 1e-3},
    {"weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.05},
]
VARIED: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [
        {"lr": 0.05},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"lr": 0.01, "momentum": 0.8, "dampening": 0.25, "weight_decay": 0.01},
        {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    ],
    Adagrad: _ADAGRAD,
    RowWiseAdagrad: _ADAGRAD,
    Adam: [
        *_ADAM,
        {"bias_correction": "global"},
        {"bias_correction": "global", "lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4},
    ],
    AMSGrad: _ADAM,
    AdamW: _ADAM,
    RMSprop: [
        {"lr": 0.05},
        {"alpha": 0.9},
        {"eps": 1e-3},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"centered": True},
        {"lr": 1e-3, "alpha": 0.95, "eps": 1e-6, "weight_decay": 0.01, "momentum": 0.8, "centered": True},
    ],
    Lion: [
        {"lr": 0.01},
        {"betas": (0.5, 0.99)},
        {"betas": (0.9, 0.5)},
        {"weight_decay": 0.1},
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.05},
    ],
    FTRL: [
        {"lr": 0.1},
        {"beta": 0.0},
        {"lambda1": 2.0},
        {"lambda2": 2.0},
        {"lr": 0.1, "beta": 0.5, "lambda2": 0.1, "lambda1": 0.5},
    ],
}

# Each optimizer with its defaults, then with each variation.
CASES: list[Any] = [cls(**arguments) for cls, varied in VARIED.items() for arguments in ({}, *varied)]
