"""Constants may be asked for in inference first; what is sent arrives."""

from __future__ import annotations

import torch

from cm_lightning.transfer import constant, send

CPU = torch.device("cpu")


def test_a_constant_made_in_inference_serves_gradients():
    constant.cache_clear()
    with torch.inference_mode():
        made = constant((2.0, 4.0), torch.float32, CPU)
    x = torch.ones(2, requires_grad=True)
    (x / constant((2.0, 4.0), torch.float32, CPU)).sum().backward()
    assert x.grad.tolist() == [0.5, 0.25]
    assert constant((2.0, 4.0), torch.float32, CPU) is made
    assert constant((2.0, 4.0), torch.float64, CPU).dtype == torch.float64


def test_what_is_sent_arrives():
    values = torch.arange(3)
    assert torch.equal(send(values, CPU), values)
