import numpy as np
import pytest
from scipy import linalg
from skimage import metrics

from diffpress.benchmarks import quality


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    smooth = np.cumsum(random.normal(0, 6, (3, 40, 33, 3)), axis=2) + 128
    noisy = smooth + random.normal(0, 12, smooth.shape)
    return tuple(np.clip(image, 0, 255).astype(np.uint8) for image in (smooth, noisy))  # type: ignore[return-value]


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window, as the paper writes it."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(a.shape[2]):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = (image[y : y + 11, x : x + 11, channel].astype(float) for image in (a, b))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_psnr_of_a_known_error() -> None:
    reference = np.full((2, 8, 8, 3), 100, np.uint8)
    off = reference + np.array([5, 10], np.uint8)[:, None, None, None]
    assert quality.psnr(off, reference) == pytest.approx([20 * np.log10(255 / 5), 20 * np.log10(255 / 10)])


def test_equal_images_have_the_ceiling(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert quality.psnr(pair[0], pair[0]) == pytest.approx([quality.PSNR_CEILING_DB] * 3)
    assert quality.ssim(pair[0], pair[0]) == pytest.approx([1.0] * 3)


def test_ssim_equals_the_naive_one(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = quality.ssim(*pair)
    expected = [naive_ssim(a, b) for a, b in zip(*pair, strict=True)]
    assert found == pytest.approx(expected, abs=1e-9)
    assert min(found) > 0.1 and max(found) < 0.99


def test_psnr_equals_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    expected = [metrics.peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(*pair, strict=True)]
    assert quality.psnr(*pair) == pytest.approx(expected, abs=1e-9)


def test_ssim_equals_scikit_image(pair: tuple[np.ndarray, np.ndarray]) -> None:
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [metrics.structural_similarity(a, b, channel_axis=2, **settings) for a, b in zip(*pair, strict=True)]
    assert quality.ssim(*pair) == pytest.approx(expected, abs=1e-7)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    small = np.zeros((1, 10, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="11 pixels"):
        quality.ssim(small, small)


def test_relative_l2() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    assert quality.relative_l2(reference * 1.1, reference) == pytest.approx([0.1, 0.1])
    assert quality.relative_l2(reference, reference) == pytest.approx([0, 0])
    with pytest.raises(ValueError, match="shapes differ"):
        quality.relative_l2(reference, reference[:1])


def test_frechet_of_gaussians_with_known_distance() -> None:
    random = np.random.default_rng(1)
    a, b = random.uniform(0.1, 4, 6), random.uniform(0.1, 4, 6)
    shift = random.normal(size=6)
    rotation = np.linalg.qr(random.normal(size=(6, 6)))[0]
    # Covariances with common axes: the distance is that of the axes, one by one.
    cov_a, cov_b = (rotation @ np.diag(values) @ rotation.T for values in (a, b))
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert quality.gaussian_distance(np.zeros(6), cov_a, shift, cov_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_gaussians_whose_axes_differ() -> None:
    random = np.random.default_rng(2)
    cov_a, cov_b = (factor @ factor.T for factor in random.normal(size=(2, 5, 5)))
    # tr (A B)^1/2 by the eigenvalues of the product, which are those of A^1/2 B A^1/2.
    overlap = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    zero = np.zeros(5)
    assert quality.gaussian_distance(zero, cov_a, zero, cov_b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dimensions", [5, 96])
def test_frechet_equals_that_of_scipy_s_square_root(dimensions: int) -> None:
    random = np.random.default_rng(5)
    mixing = random.normal(size=(2, dimensions, dimensions)) / dimensions**0.5
    rows = [
        random.normal(size=(400, dimensions)) @ factor + shift for factor, shift in zip(mixing, (0, 0.3), strict=True)
    ]
    (mean_a, cov_a), (mean_b, cov_b) = ((one.mean(0), np.cov(one, rowvar=False)) for one in rows)
    # As Heusel et al. write it, and as pytorch-fid computes it.
    root = linalg.sqrtm(cov_a @ cov_b)
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert quality.frechet(*rows) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_features() -> None:
    rows = np.random.default_rng(3).normal(size=(200, 7)).astype(np.float32)
    assert quality.frechet(rows, rows) == pytest.approx(0, abs=1e-6)
    assert quality.frechet(rows + 0.5, rows) == pytest.approx(7 * 0.25, rel=1e-5)
    assert quality.frechet(2 * (rows - rows.mean(0)), rows - rows.mean(0)) == pytest.approx(
        np.trace(np.cov(rows, rowvar=False)), rel=1e-4
    )
    # Fewer rows than dimensions: the covariance is singular and rounding must not turn into NaN.
    assert np.isfinite(quality.frechet(rows[:4], rows[4:9]))
    with pytest.raises(ValueError, match="two images"):
        quality.frechet(rows[:1], rows)


def test_faults_are_named() -> None:
    pixels = np.random.default_rng(4).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    latents = np.zeros((3, 4, 2, 2), np.float32)
    assert quality.faults(pixels, latents) == []
    pixels[1], latents[2, 0, 0, 0] = 7, np.nan
    assert quality.faults(pixels, latents) == ["image 2: latents are NaN or infinite", "image 1: constant"]


def test_one_colour_is_constant_and_a_shade_of_it_is_not() -> None:
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    pixels[:, ..., 0] = 255  # red: its channels differ, its places do not
    pixels[1, 0, 0] += np.array([0, 1, 0], np.uint8)  # rounding
    pixels[2, :4, :, 2] = 40
    assert quality.faults(pixels) == ["image 0: constant", "image 1: constant"]
