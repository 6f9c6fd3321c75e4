"""Which models can be ordered, and by which name the others are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate.errors import UsageError
from groundstate.layers import ordered_layers


class OutOfOrder(nn.Module):
    """Defined last to first, with functions, methods, dropout and a reshape by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.middle = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.1)
        self.first = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = F.relu(self.first(x))
        x = self.drop(self.middle(x).tanh())
        return F.log_softmax(self.last(x), dim=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(F.relu(self.cell(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.mixing = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.mixing)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.auxiliary = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


class Transposing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).transpose(1, 2)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in ordered_layers(model)]


# torch.compile imports torch.utils.mkldnn, which uses a function that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_sequential_nested_and_wrapped() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Dropout(0.5)), nn.Identity(), nn.Linear(5, 2)
    )
    expected = ["1.0.weight", "3.weight"]
    assert names(model) == expected
    assert [w is model.get_parameter(n) for n, w in ordered_layers(model)] == [True, True]
    assert names(nn.DataParallel(model)) == expected
    assert names(torch.compile(model)) == expected  # pyright: ignore[reportArgumentType]
    inner = nn.Sequential(torch.compile(nn.Linear(4, 3)), nn.Linear(3, 2))  # pyright: ignore[reportArgumentType]
    assert names(inner) == ["0.weight", "1.weight"]
    assert names(nn.Linear(3, 2)) == ["weight"]


def test_order_is_that_of_the_forward_pass() -> None:
    assert names(OutOfOrder()) == ["first.weight", "middle.weight", "last.weight"]


REFUSED = [
    (Residual(), r"operation 'add' joins x and fc2: a skip connection"),
    (nn.Sequential(Residual(), nn.Linear(4, 2)), r"operation 'add' in '0' joins"),
    (Recurrent(), r"'cell' \(Linear\) is used twice"),
    (shared(), r"'2' \(Linear\) shares its weight with '0'"),
    (Branching(), r"Branching cannot be traced \(TraceError"),
    (Functional(), r"'mixing' is used directly in the forward pass"),
    (Unused(), r"'auxiliary.weight' of shape \(2, 3\) takes no part"),
    (TwoHeads(), r"'right' \(Linear\) takes x although the last step gave left"),
    (Transposing(), r"operation 'transpose' is not an elementwise activation"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), r"'0' \(Conv2d\) is neither"),
    (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), r"'1' \(BatchNorm1d\) rescales the neurons"),
    (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), r"'1' \(LayerNorm\) rescales the neurons"),
    (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)), r"'0' \(Embedding\) is neither"),
    (nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.Linear(2, 2)), r"'1' \(Softmax\) mixes the neurons before '2'"),
    (nn.Sequential(OutOfOrder(), nn.Linear(2, 5)), r"operation 'log_softmax' in '0' mixes the neurons before '1'"),
    (nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2)), r"'1' \(Linear\) takes 4 inputs but '0' before it gives 3"),
    (nn.Sequential(ScaledLinear(3, 2)), r"'0' \(ScaledLinear\) has a forward pass of its own"),
    (nn.Sequential(nn.ReLU()), r"has no nn.Linear"),
    (nn.MultiheadAttention(8, 2), r"MultiheadAttention cannot be traced"),
    (nn.TransformerEncoderLayer(8, 2), r"TransformerEncoderLayer cannot be traced"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), r"'0' .*has a parametrized weight"),
]


@pytest.mark.parametrize(
    ("model", "reason"), REFUSED, ids=[type(m).__name__ + str(i) for i, (m, _) in enumerate(REFUSED)]
)
def test_refused_by_name(model: nn.Module, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        ordered_layers(model)
    assert "as a list" in str(caught.value)
    assert "\n" not in str(caught.value)
