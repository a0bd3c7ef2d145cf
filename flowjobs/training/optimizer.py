"""AdamW, used without loading the machinery of torch.compile."""

import inspect

import torch
from torch.optim import AdamW, Optimizer


class LightAdamW(AdamW):
    """AdamW as torch has it.

    Torch keeps these four methods out of compiled code by wrappers that import torch._dynamo when
    one is first called. That takes as long as importing torch, at every start of a run, and none of
    ours calls them from compiled code.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(AdamW.step))
