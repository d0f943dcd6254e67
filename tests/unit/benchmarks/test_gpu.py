import pytest
import torch

from benchmarks.gpu import measure_products, roofline_share


def test_the_roofline_is_the_longer_of_reading_and_multiplying() -> None:
    reading = roofline_share(step_s=0.010, read_s=0.006, operations=1e9, per_s=1e12)
    multiplying = roofline_share(step_s=0.010, read_s=0.006, operations=8e9, per_s=1e12)
    assert (reading, multiplying) == pytest.approx((0.6, 0.8))


def test_products_are_measured_on_the_device_itself() -> None:
    assert measure_products(torch.device("cpu"), torch.float32, width=64) > 1e6
