"""Normalisers: their inverse, constant dimensions, limits, images."""

import torch
from tensordict import TensorDict

from dprl.networks.normalizer import MinMax, normalizer


def test_data_fill_the_unit_range_and_the_inverse_restores_them():
    data = torch.randn(100, 3) * torch.tensor([1.0, 50.0, 1e-2]) + 7
    norm = MinMax(3)
    norm.fit(data)
    inside = norm(data)
    torch.testing.assert_close(inside.amin(0), torch.full((3,), -1.0))
    torch.testing.assert_close(inside.amax(0), torch.ones(3))
    torch.testing.assert_close(norm.inverse(inside), data)


def test_a_constant_dimension_is_shifted_not_scaled():
    norm = MinMax(2)
    norm.fit(torch.tensor([[5.0, 0.0], [5.0, 2.0]]))
    assert norm(torch.tensor([[5.5, 1.0]])).tolist() == [[0.5, 0.0]]


def test_the_limit_clamps_far_states():
    norm = MinMax(1, limit=5.0)
    norm.fit(torch.tensor([[0.0], [1.0]]))
    assert norm(torch.tensor([[100.0]])).item() == 5.0


def test_dictionaries_and_images():
    norm = normalizer({"state": [2], "camera": [3, 4, 4]}, limit=None)
    obs = TensorDict(
        state=torch.rand(5, 2), camera=torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), batch_size=[5]
    )
    norm.fit(obs)
    out = norm(obs)
    assert out["state"].abs().max() <= 1 + 1e-6
    assert out["camera"].dtype == torch.float
    assert out["camera"].abs().max() <= 1
