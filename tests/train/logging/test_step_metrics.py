"""What a step leaves on the device, and what is read of it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twinflow.train.logging.step_metrics import StepMetrics


class Copies(TorchDispatchMode):
    """Notes every tensor of the host that an operation is given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args):
            self.found.append(operation)
        return operation(*args, **kwargs or {})


def test_a_step_is_noted_without_a_copy_from_the_host():
    """Such a copy would wait for a GPU; the meta device stands for it, as it is another one."""
    device = torch.device("meta")
    metrics, value = StepMetrics(4, device), torch.zeros((), device=device)
    with Copies() as copies:
        metrics.add(1, value, {"rcgm": value}, value, 1e-4, [(0.5, 0.25)])
    assert copies.found == []


def test_terms_of_a_step_are_those_that_it_has():
    metrics = StepMetrics(4, torch.device("cpu"))
    for step, terms in ((1, {"rcgm": 0.0}), (2, {"velocity": 2.0, "rectify": 3.0})):
        tensors = {name: torch.tensor(value) for name, value in terms.items()}
        metrics.add(step, torch.tensor(5.0), tensors, torch.tensor(1.0), 1e-4, [])
    first, second = metrics.flush()
    assert (first["terms"], second["terms"]) == ({"rcgm": 0.0}, {"velocity": 2.0, "rectify": 3.0})
    assert (first["step"], second["loss"], metrics.flush()) == (1, 5.0, [])
