"""The divergence of raw detections: zero for equal ones, and boxes count where objects are."""

import pytest
import torch

from onebyone.core.detector_measure import RawDetections

CLASSES = 3
ORDERS = {
    "ssd": RawDetections((("boxes", 4), ("classes", CLASSES)), exclusive=True),
    "retinanet": RawDetections((("classes", CLASSES), ("boxes", 4)), exclusive=False),
    "fcos": RawDetections((("classes", CLASSES), ("boxes", 4), ("quality", 1)), exclusive=False),
}


@pytest.fixture(params=sorted(ORDERS))
def measure(request):
    return ORDERS[request.param]


def drawn(measure, seed, n=5, anchors=7):
    values = sum(size for _, size in measure.order)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, anchors, values, generator=generator, dtype=torch.float64)


def test_equal_outputs_are_not_apart_and_others_are(measure):
    reference, others = drawn(measure, 0), drawn(measure, 1)
    scale = measure.scale_of(reference)
    assert measure.fits(reference)
    assert not measure.fits(reference[..., 1:])
    torch.testing.assert_close(
        measure.apart(reference, reference, scale), torch.zeros(5).double(), atol=1e-12, rtol=0
    )
    assert (measure.apart(reference, others, scale) > 0.01).all()


def test_a_box_counts_as_much_as_there_is_an_object(measure):
    reference = drawn(measure, 0)
    parts = measure._parts(reference)
    for anchor, score in ((0, 30.0), (1, -30.0)):
        parts["classes"][:, anchor] = score
        if measure.exclusive:
            parts["classes"][:, anchor, 0] = -score
    scale = measure.scale_of(reference)
    apart = []
    for anchor in (0, 1):
        moved = reference.clone()
        measure._parts(moved)["boxes"][:, anchor] += 1
        apart.append(measure.apart(reference, moved, scale))
    assert (apart[0] > 1e-3).all()
    assert (apart[1] < 1e-9).all()


def test_the_covariance_of_sampled_gradients_is_the_divergences_curvature(measure):
    reference = drawn(measure, 0, n=1, anchors=2)
    scale = measure.scale_of(reference)
    # A little beside the reference, where the divergence is above 0.
    wanted = torch.autograd.functional.hessian(
        lambda outputs: measure.imitation(reference, outputs, scale, 1.0), reference + 1e-4
    )
    size = reference.numel()
    wanted = wanted.reshape(size, size)
    many = reference.expand(100_000, -1, -1).clone().requires_grad_()
    loss = measure.sampled(many, scale, torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, many)
    rows = gradient.flatten(1)
    difference = (rows.T @ rows / len(rows) - wanted).norm() / wanted.norm()
    assert difference < 0.05
