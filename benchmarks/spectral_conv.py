"""What the nuclear norm of convolutions as operators costs, against training steps of a residual network.

    python benchmarks/spectral_conv.py [--rounds 3]

A residual network of 18 layers for 32 x 32 images, batch 128, float32, one thread; a plain step is forward, backward
and SGD. "energy" is `ConvNuclear` with its default grid on all weights, which falls with the channels; as it looks at
the widest layers in some steps only, eight calls are timed together. "grid 5" and "grid 8" look at 25 and 64
frequencies of every layer. Each call draws a new shift. "matrix" is the nuclear norm of the reshaped kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from runner import compare, save
from torch import Tensor, nn
from torch.nn import functional

from groundstate import Regularizer
from groundstate.energies.base import Energy
from groundstate.energies.convolution import ConvNuclear
from groundstate.energies.spectral import Nuclear

_TOGETHER = 8


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output."""
        return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """Returns the network in its variant for small images: no pooling before the first block."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def conv_cases(rounds: int = 3, grids: bool = True) -> dict[str, Any]:
    """Times the energy against a training step.

    Args:
        rounds: Of all functions; each takes about five steps.
        grids: Time the grids of 5 and 8 points too, once; they take minutes.

    Returns:
        What `runner.compare` does, and ``per_step``: the median of each energy over that of a step.
    """
    torch.manual_seed(0)
    model = resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    def adding(energy: Energy) -> Callable[[], None]:
        return Regularizer(model, 1e-6 * energy).add_gradients

    energy = adding(ConvNuclear())

    def several() -> None:
        for _ in range(_TOGETHER):
            energy()

    step()
    functions: dict[str, Callable[[], None]] = {"step": step, "energy": several, "matrix": adding(Nuclear())}
    result = compare(functions, rounds=rounds, warmup=1)
    if grids:
        slow = {f"grid {n}": adding(ConvNuclear(grid=n)) for n in (5, 8)}
        result["milliseconds"] |= compare(slow, rounds=1, warmup=0)["milliseconds"]
    medians = {name: times["median"] for name, times in result["milliseconds"].items()}
    medians["energy"] /= _TOGETHER
    return {"per_step": {k: v / medians["step"] for k, v in medians.items() if k != "step"}, **result}


def main() -> None:
    """Measures and saves the result."""
    parser = argparse.ArgumentParser(description="cost of the nuclear norm of convolutions as operators")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    save("spectral_conv", {"resnet18": conv_cases(options.rounds)})


if __name__ == "__main__":
    main()
