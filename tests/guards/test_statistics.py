"""The noise in numbers, also where windows of the table overlap. More in test_2_noise.py."""

import math

import pytest
import torch

from flatlora import draw_noise, normal_table


def draws(m, n, count):
    """eps of a weight of ones, whose variance is 1, under each of `count` seeds."""
    ones = torch.ones(m, n)
    for seed in range(count):
        noise = draw_noise(ones, 1.0, seed)
        yield noise.scale * noise.normals


def assert_mean(values, expected, error):
    assert abs(values.double().mean().item() - expected) < error


POSITION = torch.arange(192)
DIRECTIONS = {
    "sum": torch.ones(192),
    "alternating": (-1.0) ** POSITION,
    "wave": torch.cos(POSITION / 30),
}


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_second_moments_along_a_direction_of_one_row_and_of_all_rows(direction):
    eps = torch.stack(list(draws(256, 192, count=200)))
    along = eps @ (direction / direction.norm())  # (200, 256)
    assert_mean(along.square(), 1, 0.05)
    together = along.sum(dim=1) / math.sqrt(256)  # (200,)
    assert_mean(together.square(), 1, 0.5)


# ---- The windows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noises():
    ones = torch.ones(8, 16)
    return [draw_noise(ones, 1.0, seed) for seed in range(2000)]


def test_starts_are_uniform(noises):
    starts = torch.tensor([noise.normals.storage_offset() for noise in noises]) / 2**22
    assert starts.min() < 0.01
    assert 0.99 < starts.max() < 1
    assert_mean(starts, 1 / 2, 5 * math.sqrt(1 / 12 / 2000))
    assert_mean(starts.square(), 1 / 3, 5 * math.sqrt(4 / 45 / 2000))


@pytest.mark.parametrize("m", [3, 5, 1000, 4096])
def test_rows_are_far_apart_and_begin_at_multiples_of_8(m):  # compiled kernels read 16 aligned bytes at once
    normals = draw_noise(torch.ones(m, 16), 1.0, seed=m).normals
    spacing = normals.stride(0)
    assert normals.storage_offset() % 8 == spacing % 8 == 0
    assert 2**22 / m - 8 < spacing <= 2**22 / m


def test_the_end_of_the_table_is_followed_by_its_beginning():
    table = normal_table(torch.float32, torch.device("cpu"))
    assert torch.equal(table[: 2**22], table[2**22 :])


def test_signs_are_fair_and_independent_of_one_another_and_of_the_normals(noises):
    signs = torch.cat([noise.scale.sign().T for noise in noises])  # (2000, 8)
    normals = torch.stack([noise.normals[0, :8] for noise in noises])  # (2000, 8)
    error = 5 / math.sqrt(8 * 2000)
    assert_mean(signs, 0, error)
    assert_mean(signs * normals, 0, error)
    assert_mean(signs[:, :-1] * signs[:, 1:], 0, error)


@pytest.mark.parametrize(("m", "n"), [(2, 2**20), (2, 2**22), (2**19, 1)])
def test_the_windows_of_the_largest_layers_are_inside_the_table(m, n):
    ones = torch.ones(1, 1).expand(m, n)
    for seed in range(50):
        normals = draw_noise(ones, 1.0, seed).normals
        end = normals.storage_offset() + (m - 1) * normals.stride(0) + n
        assert end <= 2**23


@pytest.mark.parametrize(("m", "n"), [(2**20 + 1, 1), (1, 2**23)])
def test_a_larger_layer_is_an_error(m, n):
    ones = torch.ones(1, 1).expand(m, n)
    with pytest.raises(ValueError, match="empty range"):
        draw_noise(ones, 1.0, seed=0)


# ---- Layers with more weights than the table has numbers: the windows of neighbours overlap ------------------


def test_neighbours_overlap():
    normals = draw_noise(torch.ones(2048, 4096), 1.0, seed=0).normals
    assert torch.equal(normals[0, 2048:], normals[1, :2048])


def test_covariances_where_windows_overlap():
    of_rows, of_columns = [], []
    for eps in draws(2048, 4096, count=20):
        assert_mean(eps.square(), 1, 5 * math.sqrt(2 / 2**22))
        of_rows.append((eps[:-1, 2048:] * eps[1:, :2048]).mean())  # the same normals, with the signs of two rows
        of_columns.append((eps[:, :-1] * eps[:, 1:]).mean())
    assert_mean(torch.stack(of_rows), 0, 5 / math.sqrt(20 * 2047))
    assert_mean(torch.stack(of_columns), 0, 5 / math.sqrt(2**22))
