# SPDX-License-Identifier: Apache-2.0
"""What every part imports. Importing torch takes seconds, so `runner` has it done once, in the process that all parts
are forked from. No thread is started and no storage opened before the fork.
"""

import torch._dynamo  # noqa: F401  which the first torch.optim.Optimizer imports

from demo import forget, kill, oom, oov, outgrow, price, report, right, serve  # noqa: F401
