# SPDX-License-Identifier: Apache-2.0
"""The main job of this project, shown on real data and at scale. `examples/demo.py` runs the parts in order.

Each part is a module whose `run` starts its `work` in processes of their own (`runner`, `part`, `preload`), and
puts all that was measured into a folder of the output directory. It prints nothing: `summary` and `report` say it to
people, and `scripts/recompute` computes it once more.

    right     DeepFM on MovieLens-100K beside the same model on torch.nn.Embedding with a vocabulary
    oov       the same ratings in time order: most users of the last fifth are new
    oom       a stream of events whose table outgrows the memory budget eight times; on it, `outgrow` is
              nn.Embedding under the same cap on memory, `forget` a table that loses every row it evicts
    price     samples a second beside nn.Embedding + SparseAdam, while the table fits
    kill      a training process killed with SIGKILL and resumed from its checkpoint, beside one left alone
    serve     the dump of the big table, read back

`movielens` and `stream` are the data, `model` and `training` what is trained, `metrics` and `memory` what is
measured.
"""
