"""L_simple by hand."""

import pytest
import torch

from ddpm.losses import simple_loss


def test_simple_loss_is_the_mean_square_of_each_sample() -> None:
    eps = torch.zeros(2, 1, 2, 2)
    eps_hat = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]]).reshape(2, 1, 2, 2)
    assert simple_loss(eps, eps_hat).tolist() == [7.5, 1.0]


def test_gradient_is_twice_the_error_over_the_size() -> None:
    eps_hat = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1).requires_grad_()
    simple_loss(torch.zeros(1, 2, 1, 1), eps_hat).sum().backward()  # type: ignore[no-untyped-call]
    assert eps_hat.grad is not None and eps_hat.grad.flatten().tolist() == [0.5, -1.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"^eps_hat: "):
        simple_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 1))
