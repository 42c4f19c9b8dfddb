import pytest
import torch
from torch.testing import assert_close

from onebyone.core.errors import OptionError, UnknownNameError
from onebyone.data.augment import AUGMENTATIONS, Augmentation, Draws, augment, cut_mixed, draw


def images(n: int = 6, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def draws(n: int, *, offset: tuple[int, int] = (0, 0), flip: bool = False) -> Draws:
    return Draws(torch.tensor([offset] * n), torch.full((n,), flip))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_keeps_shape_and_type_and_leaves_the_input_alone(name, dtype):
    before = images().to(dtype)
    copy = before.clone()
    how = Augmentation.named(name, shift=2)
    after = augment(before, how, draw(how, 6, torch.Generator().manual_seed(1)))
    assert after.shape == before.shape
    assert after.dtype == dtype
    assert_close(before, copy, rtol=0, atol=0)


def test_flip_twice_is_the_identity():
    how = Augmentation(flip=True)
    once = augment(images(), how, draws(6, flip=True))
    assert_close(once, images().flip(3), rtol=0, atol=0)
    assert_close(augment(once, how, draws(6, flip=True)), images(), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [(0, 0), (1, -2), (-2, 2)])
def test_a_black_shift_is_a_crop_of_the_padded_image(offset):
    how = Augmentation(shift=2)
    padded = torch.nn.functional.pad(images(), (2, 2, 2, 2))
    rows, columns = 2 + offset[0], 2 + offset[1]
    wanted = padded[:, :, rows : rows + 8, columns : columns + 8]
    assert_close(augment(images(), how, draws(6, offset=offset)), wanted, rtol=0, atol=0)


def test_a_reflected_shift_is_a_crop_of_the_reflected_image():
    how = Augmentation(shift=3, border="reflect")
    padded = torch.nn.functional.pad(images().float(), (3, 3, 3, 3), mode="reflect")
    wanted = padded[:, :, 0:8, 5:13].to(torch.uint8)
    assert_close(augment(images(), how, draws(6, offset=(-3, 2))), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("border", "added"), [("black", {0}), ("reflect", set())])
def test_a_shift_brings_in_no_new_pixel_values_but_the_border(border, added):
    how = Augmentation(shift=2, flip=True, border=border)
    before = images(20)
    after = augment(before, how, draw(how, 20, torch.Generator().manual_seed(3)))
    for old, new in zip(before, after, strict=True):
        assert set(new.unique().tolist()) <= set(old.unique().tolist()) | added


def test_draws_reach_both_ends_and_no_further():
    drawn = draw(Augmentation(shift=2, flip=True), 2000, torch.Generator().manual_seed(0))
    assert drawn.offsets.unique().tolist() == [-2, -1, 0, 1, 2]
    assert 0.45 < drawn.flips.float().mean() < 0.55


def test_a_seed_draws_the_same_again():
    how = Augmentation.named("crop-flip")
    first, second = (draw(how, 50, torch.Generator().manual_seed(5)) for _ in range(2))
    assert_close(first.offsets, second.offsets)
    assert_close(first.flips, second.flips)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'shift'"):
        Augmentation.named("shfit")


def test_a_negative_shift_is_refused():
    with pytest.raises(OptionError, match="`shift` must be a number of pixels from 0 up, got -1"):
        Augmentation(shift=-1)


def test_a_reflection_wider_than_the_image_is_refused():
    how = Augmentation(shift=8, border="reflect")
    with pytest.raises(OptionError, match="must be smaller than the 8×8 images, got 8"):
        augment(images(), how, draws(6))


def test_augmentations_say_what_they_do():
    assert str(Augmentation()) == "none"
    assert str(Augmentation.named("crop-flip")) == "flip + shift 4 px (reflect)"
    assert not Augmentation()


def mixed(n, share, seed=0):
    """Images of two channels, each its own number and that below zero, and what became of them."""
    own = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    images = torch.cat([own, -own], dim=1).expand(n, 2, 12, 17).contiguous()
    before = images.clone()
    made = cut_mixed(images, share, torch.Generator().manual_seed(seed))
    assert_close(images, before, rtol=0, atol=0)
    return before, made


def test_a_mixed_image_is_its_own_but_for_one_rectangle_of_one_other():
    before, made = mixed(400, 1.0)
    assert_close(made[:, 0], -made[:, 1], rtol=0, atol=0)
    cut = made[:, 0] != before[:, 0]
    for image, changed in zip(made[:, 0], cut, strict=True):
        if changed.any():
            rows, columns = changed.any(1), changed.any(0)
            assert_close(changed, rows[:, None] & columns[None, :])
            assert all(each.int().diff().abs().sum() <= 2 for each in (rows, columns))
            assert len(image[changed].unique()) == 1
    # A rectangle of half the image at the mean, of which what sticks out at the border is lost.
    area = cut.float().mean()
    assert 0.2 < area < 0.45


def test_so_many_images_are_mixed_as_asked_and_a_seed_means_the_same():
    before, none = mixed(300, 0.0)
    assert_close(none, before, rtol=0, atol=0)
    shares = [
        (made != before).flatten(1).any(1).float().mean()
        for before, made in (mixed(3000, share) for share in (0.3, 1.0))
    ]
    # Some rectangles are of the image itself, or of less than a pixel.
    assert shares[0] == pytest.approx(0.3, abs=0.04)
    assert shares[1] > 0.9
    assert_close(mixed(50, 0.5, seed=3)[1], mixed(50, 0.5, seed=3)[1], rtol=0, atol=0)
    assert not torch.equal(mixed(50, 0.5, seed=3)[1], mixed(50, 0.5, seed=4)[1])
