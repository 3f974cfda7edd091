import numpy as np
import pytest
import torch
from PIL import Image

from cm_lightning.evaluation import (
    count_nonfinite,
    grid_columns,
    image_grid,
    save_npz,
    save_png,
    to_uint8,
)
from cm_lightning.files import replacing
from cm_lightning.types import InputError


def test_quantisation_golden_values():
    x = torch.tensor([-2.0, -1.01, -1.0, -0.5, 0.0, 0.003, 0.004, 0.5, 0.9999, 1.0, 1.01, 7.0])
    expected = [0, 0, 0, 64, 128, 128, 128, 191, 255, 255, 255, 255]
    assert to_uint8(x).tolist() == expected
    assert to_uint8(x.double()).tolist() == expected
    assert to_uint8(torch.tensor([0.00393])).item() == 128  # floor(128.501)
    assert to_uint8(torch.tensor([0.00785])).item() == 129


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantisation_inverts_the_scaling_of_stored_images(dtype):
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels.to(torch.uint8))


def test_quantisation_of_values_that_are_no_numbers():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert to_uint8(x).tolist() == [0, 255, 0]


def test_a_row_of_a_grid_is_the_classes_or_16_of_them():
    assert [grid_columns(classes) for classes in (0, 1, 10, 16, 1000)] == [None, 1, 10, 16, 16]


def test_count_nonfinite_counts_images():
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0] = float("nan")
    x[3, 2, 1, 1] = float("inf")
    assert count_nonfinite(x) == 2
    assert count_nonfinite(torch.zeros(4, 1, 2, 2)) == 0


def test_grid_places_every_image():
    images = torch.arange(5 * 3 * 2 * 4, dtype=torch.uint8).reshape(5, 3, 2, 4)
    grid = image_grid(images, columns=3, padding=1, scale=1)
    assert grid.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    for i in range(5):
        top, left = 1 + i // 3 * 3, 1 + i % 3 * 5
        assert np.array_equal(grid[top : top + 2, left : left + 4].transpose(2, 0, 1), images[i])
    assert (grid[0] == 128).all()
    assert (grid[:, 0] == 128).all()
    assert (grid[4:, 11:] == 128).all()  # the sixth place stays empty


def test_grid_enlarges_small_images_by_repeating_pixels():
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    grid = image_grid(images, padding=0)
    assert grid.shape == (64, 64, 1)
    assert np.array_equal(grid[::4, ::4, 0][:8, 8:], images[1, 0])
    assert np.array_equal(grid[0::4], grid[3::4])
    assert image_grid(images[:, :, :5], padding=0, columns=4).shape == (35, 4 * 56, 1)
    assert image_grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), padding=0).shape == (64, 64, 3)


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"scale": 0}, {"padding": -1}])
def test_grid_refuses_arguments_out_of_range(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        image_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), **wrong)


def test_grid_refuses_floats():
    with pytest.raises(InputError, match="to_uint8"):
        image_grid(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    path = tmp_path / "deep" / "grid.png"
    save_png(path, array)
    with Image.open(path) as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        assert np.array_equal(np.asarray(image).reshape(array.shape), array)
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(InputError, match=r"\(5, 7, 2\)"):
        save_png(path, np.zeros((5, 7, 2), np.uint8))


def test_npz_has_the_layout_of_the_adm_evaluator(tmp_path):
    images = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    save_npz(tmp_path / "a.npz", images, torch.arange(6, dtype=torch.int32))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert sorted(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images.permute(0, 2, 3, 1))
        assert file["arr_1"].dtype == np.int64
        assert file["arr_1"].tolist() == list(range(6))
    save_npz(tmp_path / "b.npz", images[:, :1])
    with np.load(tmp_path / "b.npz", allow_pickle=False) as file:
        assert sorted(file) == ["arr_0"]
        assert np.array_equal(
            file["arr_0"], images[:, :1].expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        )
    with pytest.raises(InputError, match="6 images"):
        save_npz(tmp_path / "a.npz", images, torch.arange(5))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
