"""The law of repeated text: what a token is worth when it has been seen before.

Source: Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 7; in their code R_N counts from a base size U_N that the
unique tokens call for.

    L = E + A / N'^alpha + B / D'^beta
    D' = U + U R_D* (1 - exp(-R_D / R_D*)),        R_D = max(D / U - 1, 0), U the unique tokens
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),    R_N = max(N / U_N - 1, 0)
    U_N = min(N, (U G)^(beta/alpha) G),            G = (alpha A / beta B)^(1/(alpha+beta))

Everything is moved and differentiated in logs: N' = U_N saturate(N / U_N, R_N*), and so D'.
"""

import numpy as np

from results.laws import BY_D, BY_N, LAWS, Centred, Evaluation, FloatArray, Law, measure_shift


def evaluate_repeated(theta: FloatArray, cells: Centred) -> Evaluation:
    """Evaluate ln L and its slopes. Shapes: theta (m, 7) -> (m, n), (m, 7, n)."""
    e, a, b, alpha, beta, log_rd, log_rn = theta.T[:, :, None]
    log_n, log_d, log_u = cells.x + cells.mean[:, None]
    log_a, log_b = (theta[:, 1:3] + measure_shift(theta, cells)[:, 1:3]).T[:, :, None]
    both, ratio = alpha + beta, beta / alpha
    log_g = (np.log(alpha) + log_a - np.log(beta) - log_b) / both
    called = ratio * (log_u + log_g) + log_g
    is_large = log_n > called  # more parameters than the unique tokens call for
    base = np.where(is_large, called, log_n)
    worth_n, by_ratio_n, by_log_rn = saturate(np.where(is_large, log_n - base, 0.0), log_rn)
    worth_d, _, by_log_rd = saturate(np.maximum(log_d - log_u, 0.0), log_rd)
    x = base + worth_n - cells.mean[0]
    y = np.minimum(log_d, log_u) + worth_d - cells.mean[1]
    terms = np.stack(np.broadcast_arrays(e, a - alpha * x, b - beta * y), axis=1)
    top = terms.max(axis=1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=1, keepdims=True)
    shares /= total
    # How theta moves ln N' through U_N: the base itself, less what N / U_N loses.
    by_base = np.where(is_large, 1.0 - by_ratio_n, 0.0)
    by_log_g = 1 + ratio
    mean_n, mean_d = cells.mean[:2]
    g_alpha = (1 / alpha + mean_n - log_g) / both
    g_beta = (-1 / beta - mean_d - log_g) / both
    called_alpha = by_log_g * g_alpha - ratio / alpha * (log_u + log_g)
    called_beta = by_log_g * g_beta + (log_u + log_g) / alpha
    slopes = np.zeros((len(theta), 7, cells.x.shape[1]))
    slopes[:, :3] = shares
    pull = -alpha * shares[:, 1] * by_base  # of ln L, for each unit of ln U_N
    for i, by_called in ((1, by_log_g / both), (2, -by_log_g / both), (3, called_alpha), (4, called_beta)):
        slopes[:, i] += pull * by_called
    slopes[:, 3] -= shares[:, 1] * x
    slopes[:, 4] -= shares[:, 2] * y
    slopes[:, 5] = -beta * shares[:, 2] * by_log_rd
    slopes[:, 6] = -alpha * shares[:, 1] * by_log_rn
    return (top + np.log(total))[:, 0], slopes


def saturate(log_ratio: FloatArray, log_r: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return ln(1 + R*(1 - exp(-(ratio - 1) / R*))), its slope by ln ratio, and its slope by ln R*."""
    r, repeats = np.exp(log_r), np.expm1(np.minimum(log_ratio, 200.0))  # a stray step must not overflow
    spent = repeats / r
    gained = -r * np.expm1(-spent)
    worth = 1 + gained
    return np.log1p(gained), np.exp(-spent) * (repeats + 1) / worth, (gained - repeats * np.exp(-spent)) / worth


REPEATED = Law(
    "repeated",
    "L(N, D, U) = E + A / N'^alpha + B / D'^beta, N' = U_N + U_N R_N (1 - exp(-(N/U_N - 1) / R_N)), "
    "D' = U + U R_D (1 - exp(-(D/U - 1) / R_D))",
    "Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 7",
    (BY_N, BY_D),
    floor="E",
    extra=("R_D", "R_N"),
    extra_inputs=("unique_tokens",),
    evaluate=evaluate_repeated,
)
ALL_LAWS = LAWS | {REPEATED.name: REPEATED}
