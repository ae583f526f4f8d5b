"""Training and scoring in yardsticks: one training step of torchvision's ssdlite320_mobilenet_v3_large as it comes.

    python bench/yardstick.py --out yardstick.json

The yardstick: weights=None, weights_backbone=None, num_classes=4 (3 and the background), 320 px, batch 8, loss and
optimizer included, in a process of its own, without channels_last and without the allocator's setting. Ours: the
reference space (configs/voc_mbv3.yaml with 3 classes), 300 px, batch 8, data apart: a supernet step over random
genotypes, plain and with distillation from the largest; a final step of the largest sub-network; the score of a
middling candidate on 36 cached pictures, BatchNorm re-estimation apart. All take turns. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.peer import SIZE, Peer
from bench.reference import (
    SupernetSteps,
    plain_step,
    random_batch,
    random_genotypes,
    reference,
)
from bench.score import ScoringRun
from bench.turns import add_options, begin, print_table, ratio, show, spread, take_turns, timed, write
