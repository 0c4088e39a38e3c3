"""What importing the package brings with it: nothing that torch alone does not, and not a word."""

import subprocess
import sys

import pytest
import torch

BEGIN = """
import sys, torch
before = set(sys.modules)
sys.modules["triton"] = None  # as where it is not installed: torch then warns of that
import ssprop_patch as ssp

def brought():
    new = {n for n in set(sys.modules) - before if sys.modules[n] is not None}
    return sorted(n for n in new if n.partition(".")[0] not in sys.stdlib_module_names)
"""


def run(code):
    """Run code in a fresh process; return what it prints. It says nothing on standard error."""
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_import_alone_brings_the_package_alone():
    assert run("print(*brought())") == ["ssprop_patch"]


def test_all_public_names_bring_nothing_but_the_package():
    found = run("for name in ssp.__all__: getattr(ssp, name)\nprint(*brought())")
    assert [name for name in found if name.partition(".")[0] != "ssprop_patch"] == []
    assert "ssprop_patch.flops.count" in found


USE = """
model = ssp.convert(torch.nn.Conv2d(3, 8, 3), 0.5)
ssp.summary(model, input_size=(1, 3, 8, 8))
ssp.Meter(model, energy=False).close()
print("torch.utils.flop_counter" in sys.modules)
del sys.modules["triton"]
import torch.utils.flop_counter as counter
ssp.summary(model, input_size=(1, 3, 8, 8))
print(*sorted(str(op) for op in counter.flop_registry if "ssprop" in str(op)))
"""


def test_torchs_counter_is_told_of_the_operators_only_if_it_is_there():
    """Importing it brings Triton, or a warning that there is none."""
    assert run(USE) == ["False", "ssprop_patch.conv_backward", "ssprop_patch.linear_backward"]


TRAIN = """
model = ssp.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)), 0.5)
meter = ssp.Meter(model, energy=False)
for _ in range(3):
    model(torch.randn(2, 3, 8, 8)).sum().backward()
assert meter.network.saved > 0 and ssp.status(model).ran_sparse == 2
print("torch._dynamo" in sys.modules)
"""


def test_training_with_a_meter_does_not_import_dynamo():
    """Which takes seconds; torch.optim does import it, from some version on."""
    assert run(TRAIN) == ["False"]


COMPILES = """
del sys.modules["triton"]
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        product = torch.compile(lambda x: x @ x.transpose(-1, -2), backend="eager")
        return product(self.conv(x))

found = []
for _ in range(2):
    meter = ssp.Meter(ssp.convert(Net(), 0.5), energy=False)
    meter._model(torch.randn(2, 3, 8, 8)).sum().backward()
    found.append(meter.network)
assert found[0] == found[1] and found[0].saved > 0, found
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="a limit of torch 2.6, see docs/limits.md"
)
def test_what_is_compiled_first_while_a_meter_watches_is_counted_too():
    assert run(COMPILES) == ["True"]
