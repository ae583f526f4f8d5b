"""Fixtures of several test files: a tiny configuration and its detector."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import tiny_settings

from lib import config
from lib.detector import ElasticSSD


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(head__predictor="plain")`: the tiny configuration with some keys changed."""
    return lambda **changes: config.from_dict(tiny_settings(**changes))


@pytest.fixture(scope="session")
def tiny_detector(tiny_config):
    """`tiny_detector(...)`: a detector whose every weight and statistic is random, so that none can be mistaken."""

    def make(num_classes: int = 3, **changes: object) -> ElasticSSD:
        torch.manual_seed(0)
        detector = ElasticSSD(tiny_config(**changes), num_classes).eval()
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in detector.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return detector

    return make
