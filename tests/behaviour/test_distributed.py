"""Guidance in several processes: DistributedDataParallel, and sharded weights (FSDP2)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.processes import run_in_processes

WHOLE_BATCH = """
def work(rank, world, unused):
    import attnguide as ag
    from tests.helpers.models import batch, cnn
    from attnguide.testing import hooks

    torch.manual_seed(0)
    model = DDP(cnn().eval(), find_unused_parameters=unused == "unused")
    images, labels, masks = batch(8)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    guide = ag.Guide(model, weight=0.5)
    if rank == world - 1:
        # One process may look alone: nothing waits for the others.
        guide.check(images[part], labels[part], mask=masks[part])
        ag.explain(model, images[part])
        model.module(images[part])
        guide.loss(labels[part], mask=masks[part])
    for _ in range(3):
        model.zero_grad()
        logits = model(images[part])
        criterion = torch.nn.functional.cross_entropy(logits, labels[part])
        (criterion + guide.loss(labels[part], mask=masks[part])).backward()
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    guide.remove()
    assert not hooks(model.module)
    for name, gradient in found.items():
        assert same(gradient), name

    # The same in one process, without any wrapper.
    torch.manual_seed(0)
    alone = cnn().eval()
    guide = ag.Guide(alone, weight=0.5)
    logits = alone(images)
    (torch.nn.functional.cross_entropy(logits, labels) + guide.loss(labels, mask=masks)).backward()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)
    # A process without any annotation still takes part.
    guide = ag.Guide(model)
    model.zero_grad()
    logits = model(images[part])
    (logits.sum() + guide.loss(labels[part], mask=masks[part] if rank == 0 else None)).backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("world", "unused"), [(1, "used"), (1, "unused"), (2, "used"), (2, "unused")])
def test_gradients_are_those_of_the_whole_batch_on_every_rank(
    tmp_path: Path, world: int, unused: str
) -> None:
    run_in_processes(WHOLE_BATCH, tmp_path, world, unused)


UNEVEN = """
from contextlib import nullcontext
from torch.nn.functional import cross_entropy


def work(rank, world):
    import attnguide as ag
    from tests.helpers.models import batch, cnn

    class Outer(torch.nn.Module):
        \"\"\"What a trainer wraps: the guide knows the inner model alone.\"\"\"

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images)

    torch.manual_seed(0)
    plain = cnn().eval().double()
    images, labels, masks = batch(8)
    images, masks = images.double(), masks.double()
    trust = torch.rand(8) + 0.5
    weights = {name: value.clone() for name, value in plain.state_dict().items()}

    def gradients(model):
        return [p.grad.clone() for p in model.parameters()]

    def masks_of(samples, annotated):
        chosen = [masks[n] if n in annotated else None for n in samples]
        return chosen if any(mask is not None for mask in chosen) else None

    def terms(several):
        # Two layers in one term, and two terms.
        first = ag.Term(weight=0.5, layer=["block3", "block4"] if several else "block4")
        return [first, ag.Term(weight=2.0, loss="mse")] if several else [first]

    def joint(annotated, weight, several):
        model = cnn().eval().double()
        model.load_state_dict(weights)
        guide = ag.Guide(model, terms=terms(several))
        loss = cross_entropy(model(images), labels)
        mask = masks_of(range(8), annotated)
        (loss + guide.loss(labels, mask=mask, sample_weight=weight)).backward()
        return gradients(model)

    def accumulated(model, inner, annotated, weight, several, parts, **options):
        model.zero_grad()
        guide = ag.Guide(inner, terms=terms(several), **options)
        own = [n for n in range(4 * rank, 4 * rank + 4) if n in annotated]
        whole = float(len(own) if weight is None else weight[own].sum())
        for part in range(parts):
            samples = list(range(4 * rank + part * 4 // parts, 4 * rank + (part + 1) * 4 // parts))
            last = part == parts - 1 or not isinstance(model, DDP)
            with nullcontext() if last else model.no_sync():
                loss = cross_entropy(model(images[samples]), labels[samples]) / parts
                loss = loss + guide.loss(
                    labels[samples],
                    mask=masks_of(samples, annotated),
                    sample_weight=None if weight is None else weight[samples],
                    normalize_by=None if parts == 1 else whole,
                )
                loss.backward()
        guide.remove()
        return gradients(model)

    def assert_equal(found, expected, what):
        for gradient, right in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-9, msg=str(what))

    wrapped = DDP(plain)
    nested = DDP(Outer(cnn().eval().double()))
    nested.module.inner.load_state_dict(weights)
    for annotated in [(), (5,), (2, 5), (4, 5, 6, 7), (3, 4, 5, 6, 7), range(8)]:
        for weight in (None, trust):
            right = joint(annotated, weight, several=False)
            for parts in (1, 2, 4):
                found = accumulated(wrapped, wrapped, annotated, weight, False, parts)
                assert_equal(found, right, (annotated, weight, parts))
    annotated = (2, 4, 5, 6)
    right = joint(annotated, trust, several=True)
    for parts in (1, 4):
        assert_equal(accumulated(wrapped, wrapped, annotated, trust, True, parts), right, parts)
    assert_equal(accumulated(nested, nested.module.inner, annotated, trust, True, 2), right, "nested")
    # Another wrapper that averages gradients.
    other = cnn().eval().double()
    other.load_state_dict(weights)
    found = accumulated(other, other, annotated, trust, True, 2, process_group=dist.group.WORLD)
    for gradient in found:
        dist.all_reduce(gradient.div_(world))
    assert_equal(found, right, "by hand")
    with wrapped.join():
        guide = ag.Guide(wrapped)
        wrapped(images)
        try:
            guide.loss(labels, mask=masks)
        except ag.errors.GuidanceError as error:
            assert "join()" in str(error)
        else:
            raise AssertionError("guided inside join()")
"""


@pytest.mark.slow
def test_the_mean_is_that_of_all_processes_and_accumulated_batches(tmp_path: Path) -> None:
    run_in_processes(UNEVEN, tmp_path)


SHARDED = """
import timm
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy


def work(rank, world, kind):
    import attnguide as ag
    from tests.helpers.models import batch, tiny_vit

    # What differs is rounding: both parts of a batch without fully_shard differ as much from the whole.
    for kept, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):

        def build():
            torch.manual_seed(0)
            model = tiny_vit() if kind == "vit" else timm.create_model("resnet18", num_classes=4)
            return model.eval().to(kept)

        images, labels, masks = batch(4, 32 if kind == "vit" else 64)
        images = images.to(kept)
        masks[1:3] = torch.nan  # one in each process
        masks[3] = masks[0] if kind == "vit" else torch.nan  # or two in the first, none in the second
        part = slice(2 * rank, 2 * rank + 2)
        plain, model = build(), build()
        guide = ag.Guide(model, weight=2.0)
        guide.check(images[:2], labels[:2], mask=masks[:2])
        blocks = model.blocks if kind == "vit" else [model.layer1, model.layer2, model.layer3, model.layer4]
        for module in (*blocks, model):
            fully_shard(module)
        with ag.Guide(plain, weight=2.0) as other:
            for step in range(2 if kept == torch.float64 else 1):
                (cross_entropy(plain(images), labels) + other.loss(labels, mask=masks)).backward()
                loss = cross_entropy(model(images[part]), labels[part])
                (loss + guide.loss(labels[part], mask=masks[part])).backward()
                for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
                    if expected.grad is not None:
                        apart = found.grad.full_tensor() - expected.grad
                        assert apart.norm() <= bound * expected.grad.norm()
                        assert kept == torch.float32 or apart.abs().max() <= 1e-11
                for each in (plain, model):
                    torch.optim.SGD(each.parameters(), lr=0.1).step()
                    each.zero_grad()
    if kind == "vit":
        both = ag.Intervention(plain)(images, labels, mask=masks)
        both.loss.backward()
        ag.Intervention(model)(images[part], labels[part], mask=masks[part]).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    for action in (
        lambda: guide.check(images[part], labels[part], mask=masks[part]),
        lambda: ag.layers.find_layers(model, torch.rand(1, 3, 64, 32).double()),
    ):
        try:
            action()
        except ag.AttnGuideError as error:
            assert "before fully_shard" in str(error)
        else:
            raise AssertionError("weights in pieces were taken for whole ones")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "resnet18"])
def test_gradients_of_sharded_weights_are_the_plain_ones(tmp_path: Path, kind: str) -> None:
    run_in_processes(SHARDED, tmp_path, 2, kind)
