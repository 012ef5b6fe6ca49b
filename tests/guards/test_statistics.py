"""The noise in numbers: it passes the tests that fresh normals pass, also where windows of the table overlap."""

import math

import pytest
import reference as ref
import torch

import flatlora
from flatlora import draw_noise, perturbed

COUNT, M, N = 200, 256, 192  # seeds, rows, columns


@torch.no_grad()
def from_the_table():
    """eps / std of a layer under many seeds, (COUNT, M, N). By eq. 7 each is of mean 0 and variance 1."""
    layer = ref.adapted_layer(M, N)
    draws = []
    for seed in range(COUNT):
        with perturbed(layer, 0.3, seed):
            std = layer.noise.signed_std.abs()
            draws.append(ref.eps_of(layer) / std)
    return torch.stack(draws)


def fresh():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, M, N, generator=generator)


@pytest.fixture(scope="module", params=[from_the_table, fresh])
def z(request):
    return request.param()


def assert_mean(values, expected, error):
    assert abs(values.double().mean().item() - expected) < error


# Five standard errors. The table has 4.2 million normals, whose own deviation counts beside that of the draws.
ERROR = 5 * math.sqrt(1 / (COUNT * M * N) + 1 / 2**22)


MOMENTS = {  # of z ** power under the normal law: mean and variance
    1: (0, 1),
    2: (1, 2),
    3: (0, 15),
    4: (3, 96),
}


@pytest.mark.parametrize("power", MOMENTS)
def test_moments(z, power):
    mean, variance = MOMENTS[power]
    assert_mean(z.pow(power), mean, ERROR * math.sqrt(variance))


@pytest.mark.parametrize("k", [2.0, 3.0, 4.0])
def test_tails(z, k):
    expected = math.erfc(k / math.sqrt(2)) / 2
    error = ERROR * math.sqrt(expected)
    assert_mean(z > k, expected, error)
    assert_mean(z < -k, expected, error)


def assert_identity_covariance(lines):
    """The lines (count, k): each covariance within six standard errors of the identity's."""
    count, k = lines.shape
    covariance = lines.T @ lines / count
    error = 6 * math.sqrt(2 / count)
    torch.testing.assert_close(covariance, torch.eye(k), rtol=0, atol=error)


def test_covariance_within_a_row(z):
    assert_identity_covariance(z.reshape(COUNT * M, N))


def test_covariance_between_rows(z):
    assert_identity_covariance(z.transpose(1, 2).reshape(COUNT * N, M))


POSITION = torch.arange(N)
DIRECTIONS = {
    "sum": torch.ones(N),
    "alternating": (-1.0) ** POSITION,
    "wave": torch.cos(POSITION / 30),
    "one": (POSITION == 7).float(),
}


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_second_moment_along_a_direction(z, direction):
    along = z @ (direction / direction.norm())  # (COUNT, M)
    assert_mean(along.square(), 1, 0.05)


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_second_moment_of_all_rows_together(z, direction):
    along = z @ (direction / direction.norm())  # (COUNT, M)
    together = along.sum(dim=1).square() / M  # (COUNT,)
    assert_mean(together, 1, 0.5)


# ---- The windows ----


@pytest.fixture(scope="module")
def noises():
    """The noise of 2,000 seeds for a weight of ones."""
    weight = torch.ones(8, 16)
    return [draw_noise(weight, 1.0, seed) for seed in range(2000)]


def test_starts_are_uniform_on_the_circle(noises):
    starts = torch.tensor([noise.normals.storage_offset() / 2**22 for noise in noises])
    assert starts.max() < 1
    spread = math.sqrt(1 / 12)  # of the uniform law
    assert_mean(starts, 0.5, 5 * spread / math.sqrt(2000))
    assert starts.std().item() == pytest.approx(spread, rel=0.05)


def test_rows_are_at_equal_distances(noises):
    for noise in noises:
        assert noise.normals.stride() == (2**22 // 8, 1)


def test_rows_begin_at_multiples_of_8():  # compiled kernels read 16 aligned bytes at once
    for m in (3, 5, 1000, 4096):
        normals = draw_noise(torch.ones(m, 16), 1.0, m).normals
        assert normals.storage_offset() % 8 == 0
        assert normals.stride(0) % 8 == 0


def test_the_circle_closes():
    normals = draw_noise(torch.ones(1, 2**22), 1.0, seed=0).normals
    start = normals.storage_offset()
    table = normals.as_strided((2**23,), (1,), 0)
    assert start > 0
    assert torch.equal(table[: 2**22], table[2**22 :])


def test_signs_are_fair(noises):
    signs = torch.cat([noise.signed_std.sign() for noise in noises])
    assert_mean(signs, 0, 5 / math.sqrt(len(signs)))


def test_signs_do_not_follow_the_normals(noises):  # they come from another stretch of the circle
    products = []
    for noise in noises:
        signs = noise.signed_std[:, 0].sign()  # (8,)
        products.append(signs * noise.normals[0, :8])
    assert_mean(torch.stack(products), 0, 5 / math.sqrt(8 * 2000))


def test_signs_of_two_rows_are_uncorrelated(noises):
    signs = torch.stack([noise.signed_std[:, 0].sign() for noise in noises])  # (2000, 8)
    correlation = torch.corrcoef(signs.T)
    torch.testing.assert_close(correlation, torch.eye(8), rtol=0, atol=5 / math.sqrt(2000))


def test_a_seed_gives_these_numbers():  # with each version of torch, so that a run can be repeated
    noise = draw_noise(torch.ones(2, 4), 1.0, seed=(0, 1), name="fc")
    first = [-0.8843323, 1.1595899, 0.2484875, 1.0102775]
    second = [-0.5108140, 0.1901307, 0.6659027, -0.0529747]
    torch.testing.assert_close(noise.signed_std * noise.normals, torch.tensor([first, second]))


# ---- Layers with more weights than the table has numbers: the windows of neighbours overlap ----


@pytest.fixture(scope="module")
def overlapping():
    """eps / std of a layer of 2^23 weights under 20 seeds."""
    weight = torch.ones(2048, 4096)
    return [draw_noise(weight, 1.0, seed) for seed in range(20)]


def test_second_moment_where_windows_overlap(overlapping):
    squares = [(noise.signed_std * noise.normals).square().mean() for noise in overlapping]
    assert_mean(torch.stack(squares), 1, 5 * math.sqrt(2 / 2**22))


def test_neighbours_overlap(overlapping):
    normals = overlapping[0].normals
    assert torch.equal(normals[0, 2048:], normals[1, :2048])


def test_covariance_where_windows_overlap(overlapping):
    covariances = []
    for noise in overlapping:
        eps = noise.signed_std * noise.normals
        product = eps[:-1, 2048:] * eps[1:, :2048]  # the same normals, with the signs of two rows
        covariances.append(product.mean())
    assert_mean(torch.stack(covariances), 0, 5 / math.sqrt(20 * 2047))


def test_covariance_within_rows_where_windows_overlap(overlapping):
    covariances = []
    for noise in overlapping:
        eps = noise.signed_std * noise.normals
        product = eps[:, :-1] * eps[:, 1:]
        covariances.append(product.mean())
    assert_mean(torch.stack(covariances), 0, 5 / math.sqrt(2**22))


LARGEST = [(2, 2**22), (2**19, 1), (2**19, 16)]  # rows, columns
TOO_LARGE = [(2**19 + 1, 1), (1, 2**22 + 1)]


@pytest.mark.parametrize(("m", "n"), LARGEST)
def test_the_largest_layers_find_their_windows(m, n):
    weight = torch.ones(1, 1).expand(m, n)
    for seed in range(20):
        normals = draw_noise(weight, 1.0, seed).normals
        assert normals.shape == (m, n)
    assert normals[-1, -1].isfinite()


@pytest.mark.parametrize(("m", "n"), TOO_LARGE)
def test_a_larger_layer_is_an_error(m, n):
    model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
    with pytest.raises(ValueError, match="must have 1 to 524288 rows and 1 to 4194304 columns"):
        flatlora.inject_lora(model, r=1)
