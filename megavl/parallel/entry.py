"""Products at the beginning of a parallel region, their collectives hidden behind matrix products.

| direction | sequence parallelism                                | without                     |
|-----------|-----------------------------------------------------|-----------------------------|
| forward   | all-gather x; y = x W^T                             | y = x W^T                   |
| backward  | all-gather x again, only where it is not kept       |                             |
|           | g = dy W                                            | g = dy W                    |
|           | reduce-scatter g starts                             | all-reduce g starts         |
|           | dW = dy^T x                                         | dW = dy^T x                 |
|           | reduce-scatter ends                                 | all-reduce ends             |

The second all-gather runs while g is computed. Separate autograd functions could not do this: autograd computes the
gradient of the input and of the weight in one node, and calls the collective's node after both.

Source: `LinearWithGradAccumulationAndAsyncCommunication` of Megatron-LM.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavl.parallel.collectives import enter_parallel
from megavl.parallel.groups import TensorAxis
from megavl.parallel.versions import all_gather_single, reduce_scatter_single
