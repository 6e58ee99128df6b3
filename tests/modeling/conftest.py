"""One small model with random inputs, for the tests of the model itself."""

import pytest
import torch

from san_hf import SANForSemanticSegmentation
from tests.tiny import randomized


NUM_CLASSES = 4


@pytest.fixture
def model(config) -> SANForSemanticSegmentation:
    """In eval mode, with weights large enough that everything matters."""
    return randomized(config)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images whose sides no grid divides evenly."""
    return torch.randn(2, 3, 56, 88, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def class_embeds() -> torch.Tensor:
    return torch.randn(NUM_CLASSES, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def input_ids() -> torch.Tensor:
    """(classes, templates, tokens), with the begin and end that CLIP's text tower looks for."""
    ids = torch.randint(0, 512, (NUM_CLASSES, 3, 9), generator=torch.Generator().manual_seed(3))
    ids[..., 0], ids[..., -1] = 512, 513
    return ids


@pytest.fixture
def labels() -> torch.Tensor:
    """Semantic maps of the two images, with unlabelled pixels: all four classes, and only the second."""
    labels = torch.randint(0, NUM_CLASSES, (2, 56, 88), generator=torch.Generator().manual_seed(4))
    labels[1] = 1
    labels[:, :10] = 255
    return labels
