"""Sharpness of losses whose maximum is known, and ranks of features, in float64; imports nothing of `timm_sam`."""
import numpy as np

WEIGHTS = np.array([0.5, -1.0, 2.0, 0.1])
CURVATURES = np.array([1.0, 2.0, 0.5, 8.0])


def linear_rise(slopes, scales, norm, radius):
    """The largest rise of a.w: the dual norm of T a."""
    moved = np.abs(slopes * scales)
    return radius * (moved.sum() if norm == 'linf' else np.sqrt((moved ** 2).sum()))


def quadratic_box(curvatures, weights, scales, radius):
    """The largest rise of sum h w^2 / 2 in a box around w: coordinate by coordinate at the side where |w| grows."""
    return sum(radius * t * abs(h * w) + h * (radius * t) ** 2 / 2
               for h, w, t in zip(curvatures, weights, scales))


def quadratic_ball(curvatures, grads, radius):
    """The largest rise of g.d + sum h d^2 / 2 with ||d|| = radius: d = g / (mu - h), mu > max h, by bisection."""
    low, high = curvatures.max(), curvatures.max() + np.linalg.norm(grads) / radius + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(grads / (middle - curvatures)) > radius else (low, middle)
    delta = grads / (high - curvatures)
    return float(grads @ delta + (curvatures * delta ** 2).sum() / 2)


def oscillating(w):
    """Loss B of the published code's golden values, of a numpy array."""
    return (np.array([1, 2, 0.5, 1]) * np.sin(np.array([3, 4, 5, 6]) * w)).sum() + 0.3 * np.sin(7 * w.sum())


# what the published code gives for these four weights as two parameters, after 1 and after 20 steps
RELEASED = {
    ('quadratic', 'linf', True, 0.1): (0.3369281, 0.4546495),
    ('quadratic', 'l2', True, 0.1): (0.2177100, 0.2798816),
    ('quadratic', 'l2', False, 0.1): (0.1886429, 0.2555171),
    ('oscillating', 'linf', True, 0.6): (0.0, 1.9333598),
    ('oscillating', 'l2', True, 0.6): (0.6205976, 2.0711477),
}
# APGD beside it
APGD = {
    ('quadratic', 'linf', True, 0.1): (0.45465, 0.45465),
    ('quadratic', 'l2', True, 0.1): (0.2939827, 0.2939871),
    ('quadratic', 'l2', False, 0.1): (0.2544674, 0.2555174),
    ('oscillating', 'linf', True, 0.6): (0.0, 1.9404341),
    ('oscillating', 'l2', True, 0.6): (0.0, 1.8453417),
}


def largest_normalized_loss_difference(classes):
    """Of the cross entropy of unit vectors without mean: the label's entry at its largest, and at its smallest."""
    z = np.full(classes, -1.0 / (classes - 1))
    z[0] = 1.0
    z /= np.linalg.norm(z)

    def loss(logits):
        return np.log(np.exp(logits).sum()) - logits[0]
    return loss(-z) - loss(z)


def squared_singular_values(phi, centring):
    """Of features (n, d) without their mean over images (`feature`) or each image's over features (`sample`)."""
    phi = np.asarray(phi, dtype=np.float64)
    return np.linalg.svd(phi - phi.mean(axis=0 if centring == 'feature' else 1, keepdims=True), compute_uv=False) ** 2


def feature_rank(phi, share, centring):
    """Directions in order of their variance, until more than a share of it is reached."""
    squares = squared_singular_values(phi, centring)
    total, reached = squares.sum(), 0.0
    for count, square in enumerate(squares, 1):
        reached += square
        if reached > share * total:
            return count
    return len(squares)


def parabola_along_sam(curvatures, weights, radius):
    """sum h (w + t e)^2 / 2 with e = rho g / |g|: what stands before 1, t and t^2."""
    grads = curvatures * weights
    eps = radius * grads / np.sqrt((grads ** 2).sum())
    return ((curvatures * weights ** 2).sum() / 2, (grads * eps).sum(), (curvatures * eps ** 2).sum() / 2)
