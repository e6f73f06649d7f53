"""ImageBank: what it keeps, how it draws, and that it comes back from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsss_ops import ImageBank


def batch(numbers: list[int], tags: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images that hold their number everywhere."""
    images = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)
    valid = torch.ones(len(numbers), 4, 5, dtype=torch.bool)
    valid[:, 0] = False
    return images, torch.tensor(tags), valid


def drawn(bank: ImageBank, k: int) -> list[int]:
    return bank.sample(k).images[:, 0, 0, 0].int().tolist()


def test_keeps_the_last_image_of_each_class() -> None:
    bank = ImageBank(4)
    bank.update(*batch([1, 2], [[1, 1, 0, 0], [0, 1, 0, 0]]))
    assert len(bank) == 2
    assert sorted(drawn(bank, 2)) == [1, 2]
    bank.update(*batch([3], [[0, 0, 0, 5]]))
    assert sorted(drawn(bank, 3)) == [1, 2, 3]
    images, tags, valid = bank.sample(3)
    assert images.shape == (3, 3, 4, 5)
    assert valid.shape == (3, 4, 5)
    assert not valid[:, 0].any()
    assert valid[:, 1:].all()
    for image, row in zip(images, tags, strict=True):
        assert row.tolist() == {1: [1, 1, 0, 0], 2: [0, 1, 0, 0], 3: [0, 0, 0, 5]}[int(image[0, 0, 0])]


def test_draws_uniformly_and_repeats_only_where_it_must() -> None:
    bank = ImageBank(5)
    bank.update(*batch([0, 1, 2], [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]))
    counts = torch.zeros(3)
    for _ in range(1500):
        pair = drawn(bank, 2)
        assert len(set(pair)) == 2
        counts[pair] += 1
    assert (counts - 1000).abs().max() < 100
    many = drawn(bank, 300)
    assert all(60 < many.count(number) < 140 for number in range(3))
    generator = torch.Generator().manual_seed(3)
    first = bank.sample(2, generator).images
    assert torch.equal(bank.sample(2, generator.manual_seed(3)).images, first)


def test_holds_copies_of_the_images_alone() -> None:
    bank = ImageBank(2)
    images, tags, valid = batch(list(range(8)), [[1, 1]] + 7 * [[0, 0]])
    images = images.contiguous()
    bank.update(images, tags, valid)
    images.fill_(9)
    assert drawn(bank, 2) == [0, 0]
    stored = bank.get_extra_state()["images"]
    assert len(stored) == 1
    assert stored[0][0].untyped_storage().nbytes() == 3 * 4 * 5 * 4


def test_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"bank": ImageBank(4), "layer": torch.nn.Linear(2, 2)})
    model["bank"].update(*batch([1, 2], [[1, 1, 0, 0], [0, 0, 1, 0]]))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = torch.nn.ModuleDict({"bank": ImageBank(4), "layer": torch.nn.Linear(2, 2)})
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert len(again["bank"]) == 3
    torch.manual_seed(1)
    expected = model["bank"].sample(5)
    torch.manual_seed(1)
    assert all(map(torch.equal, again["bank"].sample(5), expected))
    assert len(again["bank"].get_extra_state()["images"]) == 2


def test_bad_input() -> None:
    bank = ImageBank(2)
    images, tags, valid = batch([1], [[1, 0]])
    with pytest.raises(ValueError, match="the bank is empty"):
        bank.sample(1)
    with pytest.raises(ValueError, match=r"num_classes must be at least 1, got 0"):
        ImageBank(0)
    with pytest.raises(ValueError, match=r"tags must have shape \[1, 2\], got \[1, 1\]"):
        bank.update(images, tags[:, :1], valid)
    with pytest.raises(TypeError, match=r"valid must be one of bool, got float32"):
        bank.update(images, tags, valid.float())
    bank.update(images, tags, valid)
    with pytest.raises(ValueError, match=r"size of those before, \[3, 4, 5\], got \[1, 3, 4, 4\]"):
        bank.update(images[..., :4], tags, valid[..., :4])
    with pytest.raises(ValueError, match=r"images must have shape \[1, 3, 4, 5\], got \[1, 2, 4, 5\]"):
        bank.update(images[:, :2], tags, valid)
    with pytest.raises(TypeError, match=r"images must have the bank's dtype float32, got float16"):
        bank.update(images.half(), tags, valid)
    with pytest.raises(ValueError, match=r"k must be at least 1, got 0"):
        bank.sample(0)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        bank.sample(1, 3)
    with pytest.raises(ValueError, match=r"num_classes of the state must be 3, as this bank's, got 2"):
        ImageBank(3).load_state_dict(bank.state_dict())
