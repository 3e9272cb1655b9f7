"""Float32 products are exact, whatever ran before in this process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fp32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
