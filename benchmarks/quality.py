"""Image and distribution metrics in numpy: how far one pipeline's pictures are from another's."""

from __future__ import annotations

import numpy as np

PSNR_CEILING_DB = 100.0  # equal images have no noise at all; a finite stand-in keeps means and JSON usable
CONSTANT_STD = 1.0  # in 8-bit steps; a picture flatter than this in every colour shows nothing


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each image: uint8 [N, H, W, C] twice -> [N], at most `PSNR_CEILING_DB`."""
    _same_shape(images, reference)
    error = images.astype(np.float64) - reference.astype(np.float64)
    mse = np.square(error).reshape(len(error), -1).mean(axis=1)
    floor = 255.0**2 / 10 ** (PSNR_CEILING_DB / 10)
    return 10 * np.log10(255.0**2 / np.maximum(mse, floor))


def gaussian_window(size: int = 11, sigma: float = 1.5) -> np.ndarray:
    """Normalised Gaussian weights [size]."""
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-np.square(offsets) / (2 * sigma**2))
    return weights / weights.sum()


def _filtered(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Separable filter over H and W of [N, H, W, C], only where the window lies inside the image."""
    for axis in (1, 2):
        length = values.shape[axis] - len(window) + 1
        slices = [np.take(values, range(k, k + length), axis=axis) for k in range(len(window))]
        values = np.tensordot(window, np.stack(slices), axes=1)
    return values


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity of each image, mean over channels: uint8 [N, H, W, C] twice -> [N].

    Wang et al. (2004), "Image quality assessment": Gaussian window of 11 with sigma 1.5, K1 = 0.01, K2 = 0.03,
    population covariance, only windows that lie inside the image. Raises ValueError for images smaller than those.
    """
    _same_shape(images, reference)
    window = gaussian_window()
    if min(images.shape[1:3]) < len(window):
        raise ValueError(f"SSIM needs images of {len(window)} pixels at least, got {images.shape[1:3]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for a, b in zip(images, reference, strict=True):  # one by one: float64 copies of many large images do not fit
        x, y = a[None].astype(np.float64), b[None].astype(np.float64)
        mean_x, mean_y = _filtered(x, window), _filtered(y, window)
        var_x = _filtered(x * x, window) - mean_x**2
        var_y = _filtered(y * y, window) - mean_y**2
        covariance = _filtered(x * y, window) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        found.append(float((luminance * structure).mean()))
    return np.array(found)


def relative_l2(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|values - reference| / |reference| of each row: [N, ...] twice -> [N]; no reference is shorter than 1e-12."""
    _same_shape(values, reference)
    flat = reference.astype(np.float64).reshape(len(reference), -1)
    error = values.astype(np.float64).reshape(len(values), -1) - flat
    return np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(flat, axis=1), 1e-12)


def _psd_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix; rounding below zero is cut off."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians, mean [D] and covariance [D, D] each (Dowson and Landau 1982).

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2): the symmetric form needs eigen decompositions only.
    """
    root = _psd_root(cov_a)
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)


def frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D] in float64 (Heusel et al. 2017).

    Biased upwards when N is not much larger than D: compare only values of equal N.
    """
    moments = []
    for rows in (features, reference):
        rows = rows.astype(np.float64)
        if len(rows) < 2:
            raise ValueError("a Fréchet distance needs two images at least")
        moments += [rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))]
    return gaussian_distance(*moments)


def faults(pixels: np.ndarray, latents: np.ndarray | None = None) -> list[str]:
    """Names what is broken, a line each: images of one colour, latents [N, C, H, W] that are not finite."""
    found = []
    if latents is not None:
        finite = np.isfinite(latents.reshape(len(latents), -1)).all(axis=1)
        found += [f"image {index}: latents are NaN or infinite" for index in np.flatnonzero(~finite)]
    colours = pixels.reshape(len(pixels), -1, pixels.shape[-1])
    spread = np.array([rows.std(axis=0, dtype=np.float64).max() for rows in colours])
    found += [f"image {index}: constant" for index in np.flatnonzero(spread < CONSTANT_STD)]
    return found


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
