"""References that lie class by class: the same estimate from a fraction of the products."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cm_lightning.data import Digits, ImageDataModule, ReferenceSet
from cm_lightning.data.references import PARTS, class_layout
from cm_lightning.objective import ReferenceMean, posterior
from cm_lightning.types import Batch, References

COUNTS = {
    "digits": (64, 10),
    "one class": (5, 1),
    "more classes than rows": (8, 1000),
    "many": (300, 200),
    "one row": (1, 7),
}


@pytest.mark.parametrize(("rows", "classes"), COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("given", ["all classes", "those of the rows"])
def test_every_row_once_with_all_references_of_its_class(rows, classes, given):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, classes, rows)
    kept = range(classes) if given == "all classes" else np.unique(labels[labels >= 0]).tolist()
    sizes = {label: int(rng.integers(0, 9)) for label in kept}
    of_reference = np.repeat(list(sizes), list(sizes.values()))
    layout = class_layout(labels, sizes)
    assert sorted(layout.rows.tolist()) == np.flatnonzero(labels >= 0).tolist()
    assert len(layout.parts) <= PARTS
    ends = [0]
    for first, last, start, stop in layout.parts:
        assert ends[-1] == first < last
        ends.append(last)
        own = labels[layout.rows[first:last].numpy()]
        inside = np.zeros(len(of_reference), dtype=bool)
        inside[start:stop] = True
        assert np.isin(of_reference[~inside], own).sum() == 0
    assert ends[-1] == len(layout.rows)


def setting(rows: int, classes: int, size: int = 500):
    """Rows of which a tenth has no class, and references by class, float64."""
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.uniform(-1, 1, (size, 1, 4, 4)))
    found = np.sort(rng.integers(0, classes, size))
    labels = rng.choice(found, rows)
    labels[::10] = -1
    index = torch.from_numpy(np.where(labels < 0, 0, np.searchsorted(found, labels)))
    sizes = dict(enumerate(np.bincount(found, minlength=classes).tolist()))
    nearest = torch.from_numpy(rng.uniform(0, 4, rows))
    references = References(images, torch.from_numpy(found), torch.arange(size), nearest)
    batch = Batch(images[index], torch.from_numpy(labels), index, references)
    t = torch.from_numpy(np.exp(rng.normal(-0.5, 1, rows)))
    x_t = batch.x0 + t[:, None, None, None] * torch.from_numpy(rng.normal(size=(rows, 1, 4, 4)))
    return x_t, t, batch, references._replace(layout=class_layout(labels, sizes))


@pytest.mark.parametrize("skip", [8.0, 1.0, None])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(("rows", "classes"), [(64, 10), (40, 100), (3, 1)])
def test_the_estimate_is_the_same(rows, classes, device, chunk, skip, monkeypatch):
    """With rows picked, as on a CPU, and without, as on a GPU; values and notes."""
    monkeypatch.setattr(posterior, "may_pick", lambda _: device == "cpu")
    x_t, t, batch, arranged = setting(rows, classes)
    found = []
    for references in (batch.references, arranged):
        notes = {}
        asked = batch._replace(references=references, notes=notes)
        found.append(notes | {"mean": ReferenceMean(chunk, skip)(x_t, t, asked)})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1]["mean"][batch.labels < 0], batch.x0[batch.labels < 0])


def products(x_t, t, batch, references, skip=None) -> int:
    with FlopCounterMode(display=False) as counter:
        ReferenceMean(skip=skip)(x_t, t, batch._replace(references=references))
    return counter.get_total_flops()


def test_products_fall_with_the_classes_and_with_rows_that_keep_their_image(monkeypatch):
    x_t, t, batch, arranged = setting(200, 10)
    labelled = batch.labels >= 0
    every = 2 * 2 * 200 * 500 * 16
    sizes = torch.bincount(batch.references.labels)
    exact = 2 * 2 * 16 * int(sizes[batch.labels[labelled]].sum())
    assert products(x_t, t, batch, batch.references) == every * labelled.double().mean()
    assert products(x_t, t, batch, arranged) == exact
    assert exact < every / 9
    active = labelled & (arranged.nearest < t)
    some = 2 * 2 * 16 * int(sizes[batch.labels[active]].sum())
    assert products(x_t, t, batch, arranged, skip=1.0) == some < exact
    monkeypatch.setattr(posterior, "may_pick", lambda _: False)
    assert products(x_t, t, batch, arranged, skip=1.0) == exact
    assert products(x_t, t, batch, batch.references) == every


@pytest.mark.parametrize("n", [None, 40])
@pytest.mark.parametrize("resident", [False, True])
def test_batches_of_a_data_set_know_where_their_references_are(n, resident, tmp_path):
    """Whole classes and random subsets of them, mirrored images too; the own class only."""
    data = ImageDataModule(
        Digits(), global_batch=32, resident=resident, flip=True, cache=str(tmp_path)
    )
    data.prepare_data()
    data.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(position=0),
    )
    data.setup()
    data.use_references(ReferenceSet(n=n), skip=False)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    references = batch.references
    rows, parts = references.layout
    assert len(parts) == len(batch.labels.unique())
    for first, last, start, stop in parts:
        (label,) = batch.labels[rows[first:last]].unique().tolist()
        assert set(references.labels[start:stop].tolist()) == {label}
        assert stop - start == int((references.labels == label).sum())
    t = torch.full((32,), 2.0, dtype=torch.float64)
    x_t = batch.x0 + 2 * torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0))
    plain = batch._replace(references=references._replace(layout=None))
    means = [ReferenceMean(skip=None)(x_t, t, asked) for asked in (batch, plain)]
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-5)
    assert float((means[0] - batch.x0).abs().max()) > 0.1
