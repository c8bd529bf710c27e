"""UNIC's training beside ours: every piece written from its definition, image by image."""

from functools import partial

import pytest
import torch
from torch import nn

import mtkd.functional as F
from mtkd.nn import CosineMomentum, Ladder, TeacherNorm, TokenProjectors
from mtkd.reduction import cls_and_patches, reduce_matrix
from mtkd.testing import assert_close
from mtkd.weighting import teacher_dropping

DOUBLE = torch.float64
DIMS, WIDTH, BLOCKS, IMAGES, TOKENS, STEPS = (3, 5, 2), 4, 3, 4, 6, 3
OFFSETS = [sum(DIMS[:t]) for t in range(len(DIMS) + 1)]
COLUMNS = [slice(*OFFSETS[t : t + 2]) for t in range(len(DIMS))]


def projector(ladder, t, b):
    """One of UNIC's projectors: of a teacher and a block, with the ladder's weights.

    Theirs have a second bias in every block, of which only the sum counts: here the first has it.
    """
    state = {key: value.clone() for key, value in ladder.state_dict().items()}
    names = {"0.weight": "hidden.weight", "0.bias": "hidden.bias", "2.weight": "last.weight"}
    own = {key: state[f"teachers.{t}.blocks.{b}.{name}"] for key, name in names.items()}
    if b == 0:
        own["2.bias"] = state[f"teachers.{t}.bias"]
    width, units = own["2.weight"].shape
    layers = nn.Sequential(
        nn.Linear(WIDTH, units), nn.GELU(), nn.Linear(units, width, bias=b == 0)
    ).double()
    layers.load_state_dict(own)
    return layers


class Unic:
    """The authors' loss: teachers, token types and images one by one."""

    def __init__(self, projectors):
        kinds = (projectors.cls, projectors.patch)
        self.projectors = [
            [[projector(kind, t, b) for b in range(BLOCKS)] for t in range(len(DIMS))]
            for kind in kinds
        ]
        self.mean, self.std = torch.zeros(OFFSETS[-1]).double(), torch.ones(OFFSETS[-1]).double()
        self.updates = 0

    def standardised(self, target):
        """By the statistics before this batch, which it then moves."""
        rows = target.flatten(0, -2)
        out = (target - self.mean) / self.std
        momentum = CosineMomentum(STEPS)(torch.tensor(float(self.updates)).double())
        self.mean = (1 - momentum) * self.mean + momentum * rows.mean(0)
        self.std = (1 - momentum) * self.std + momentum * rows.std(0)
        self.updates += 1
        return out

    def loss(self, blocks, target, draws, p):
        target = self.standardised(target)
        total, count = 0.0, 0
        for image in range(IMAGES):
            losses = [self.teacher(t, image, blocks, target) for t in range(len(DIMS))]
            values = [loss.item() for loss in losses]
            for t, loss in enumerate(losses):
                if t == values.index(max(values)) or draws[image, t] >= p:
                    total, count = total + loss, count + 1
        return total / count

    def teacher(self, t, image, blocks, target):
        """The mean of the cls token's loss and of the patches' mean, for one image."""
        tokens = []
        for token in range(TOKENS):
            ladder = self.projectors[min(token, 1)][t]
            s = sum(layers(x[image, token]) for layers, x in zip(ladder, blocks, strict=True))
            g = target[image, token, COLUMNS[t]]
            cosine = 1 - s @ g / (s.norm() * g.norm())
            tokens.append(0.5 * cosine + 0.5 * nn.functional.smooth_l1_loss(s, g))
        return 0.5 * (tokens[0] + sum(tokens[1:]) / len(tokens[1:]))


def seeded(step):
    return torch.Generator().manual_seed(step)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_training_side_by_side(p, recompute):
    torch.manual_seed(0)
    kinds = (Ladder(WIDTH, DIMS, BLOCKS, 5, 7, recompute=recompute).double() for _ in range(2))
    projectors = TokenProjectors(*kinds)
    norm = TeacherNorm(DIMS, "running", momentum=CosineMomentum(STEPS), eps=1e-30).double()
    theirs = Unic(projectors)
    parameters = [
        x for kind in theirs.projectors for t in kind for layers in t for x in layers.parameters()
    ]
    optimisers = [torch.optim.SGD(x, lr=0.5) for x in (projectors.parameters(), parameters)]
    for step in range(STEPS):
        blocks = [torch.randn(IMAGES, TOKENS, WIDTH).double().requires_grad_() for _ in range(3)]
        target = 2 + 3 * torch.randn(IMAGES, TOKENS, OFFSETS[-1]).double()
        shift, scale = norm.affine(target)
        tokens = F.alignment(
            projectors(blocks), target, DIMS, shift=shift, scale=scale, reduction="none"
        )
        rule = partial(teacher_dropping, p=p, generator=seeded(step))
        ours = reduce_matrix(cls_and_patches(tokens), weight=rule)
        draws = torch.rand(IMAGES, len(DIMS), generator=seeded(step))
        loop = theirs.loss(blocks, target, draws, p)
        assert_close(ours, loop, torch.float32)  # the module keeps its scale in float32
        gradients = [torch.autograd.grad(x, blocks, retain_graph=True) for x in (ours, loop)]
        for got, want in zip(*gradients, strict=True):
            assert_close(got, want, torch.float32, 4)
        for loss, optimiser in zip((ours, loop), optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
