"""Every image is read into one record: array, affine in millimetres, channels. NIfTI with channels or colours, labels along other axes."""

import json
import logging
import warnings

import nibabel as nib
import numpy as np
import pytest
import zstandard
from PIL import Image as Pillow

from medssm.errors import UserError
from medssm.segment.cases import cases_in
from medssm.segment.data import load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.images import aligned, nifti, open_image, read_image, read_label, write_image
from medssm.segment.images.quiet import quiet_libraries
from medssm.segment.preprocess import load_label
from tests.segment.synthetic import nnunet_folder, write

SHAPE = (5, 4, 3)
OBLIQUE = np.array([[0.1, -1.9, 0.2, 7], [1.5, 0.1, 0, -3], [0, 0.3, 3.0, 11], [0, 0, 0, 1]])
RANDOM = np.random.default_rng(0).normal(size=(*SHAPE, 3)).astype(np.float32)


def turned(path, data, affine, order, flips):
    """Write the same voxels in the same places, with the file's axes in another order or direction."""
    ornt = np.array([[axis, flip] for axis, flip in zip(order, flips, strict=True)])
    return write(path, nib.apply_orientation(data, ornt), affine @ nib.orientations.inv_ornt_aff(ornt, data.shape))


# -- NIfTI with channels


def test_channels_on_a_fifth_axis(tmp_path):
    path = write(tmp_path / "a.nii.gz", RANDOM[:, :, :, None], OBLIQUE)
    data, image = read_image([path], 3)
    np.testing.assert_array_equal(data, np.moveaxis(RANDOM, -1, 0))
    assert (image.channels, image.shape) == (3, SHAPE)
    with pytest.raises(UserError, match=r"5 with one time\), got the shape \(5, 4, 3, 2, 3\)"):
        read_image([write(tmp_path / "b.nii.gz", np.stack([RANDOM, RANDOM], 3))])


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_colours_are_channels(tmp_path, names):
    data = np.zeros(SHAPE, [(name, "u1") for name in names])
    for i, name in enumerate(names):
        data[name] = np.arange(60).reshape(SHAPE) + i
    found, image = read_image([write(tmp_path / "a.nii.gz", data)], 3)
    np.testing.assert_array_equal(found, np.arange(60).reshape(SHAPE) + np.arange(3).reshape(3, 1, 1, 1))
    assert image.notes == (() if names == "RGB" else ("the alpha channel is left out",))
    write_image(tmp_path / "b.nii.gz", np.full(SHAPE, 3, np.int64), image)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.int64 and (read_label(tmp_path / "b.nii.gz", image)[0] == 3).all()


def test_nifti_in_zstandard_is_read_and_written(tmp_path):
    image = nib.Nifti1Image(RANDOM[..., 0], OBLIQUE)
    (tmp_path / "a.nii.zst").write_bytes(zstandard.compress(image.to_bytes()))
    data, found = read_image([tmp_path / "a.nii.zst"])
    np.testing.assert_array_equal(data[0], RANDOM[..., 0])
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-6)
    write_image(tmp_path / "b.nii.zst", np.arange(60, dtype=np.uint8).reshape(SHAPE), found)
    back = nib.Nifti1Image.from_bytes(zstandard.decompress((tmp_path / "b.nii.zst").read_bytes()))
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.arange(60).reshape(SHAPE))
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-6)


def test_nothing_of_the_person_is_copied(tmp_path):
    image = nib.Nifti1Image(RANDOM[..., 0], OBLIQUE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    for field in ("descrip", "aux_file", "intent_name"):
        image.header[field] = b"Doe^Jane"
    nib.save(image, tmp_path / "a.nii")
    write_image(tmp_path / "b.nii", np.zeros(SHAPE, np.uint8), open_image(tmp_path / "a.nii"))
    assert b"Doe" in (tmp_path / "a.nii").read_bytes() and b"Doe" not in (tmp_path / "b.nii").read_bytes()


@pytest.mark.parametrize("name", ["A.NII", "A.NII.GZ"])
def test_capital_letters_in_an_ending(tmp_path, name):
    path = write(tmp_path / name, RANDOM[..., 0])
    assert read_image([path])[0].shape == (1, *SHAPE) and [case.name for case in cases_in(tmp_path, 1)] == [name.partition(".")[0]]


def test_capital_letters_in_the_name_of_an_output(tmp_path):
    like = open_image(write(tmp_path / "a.nii", RANDOM[..., 0]))
    for name in ("B.Nii", "B.NII.GZ", "B.NRRD", "B.MHA", "B.PNG"):
        with pytest.raises(UserError, match=rf"{name}: expected an ending in small letters, {name[1:].lower()}"):
            write_image(tmp_path / name, np.ones(SHAPE, np.uint8), like)
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii"]


def test_a_header_that_promises_more_than_memory_holds(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.float32)
    (tmp_path / "a.nii").write_bytes(header.binaryblock + b"\0" * 100)
    with pytest.raises(UserError, match=r"a\.nii: 30000 x 30000 x 30000 voxels, 1 channel\(s\), need 100582\.8 GiB of memory, more than is free"):
        read_image([tmp_path / "a.nii"])


def test_memory_is_asked_for_before_a_large_file_is_read(tmp_path, monkeypatch):
    header = nib.Nifti1Header()
    header.set_data_shape((512, 512, 512))
    (tmp_path / "a.nii").write_bytes(header.binaryblock + b"\0" * 100)
    for free, message in ((2**29 - 1, "need 0.5 GiB of memory, more than is free"), (2**29, "truncated or corrupt")):
        monkeypatch.setattr("medssm.machine.free_memory", lambda free=free: free)
        with pytest.raises(UserError, match=message):
            open_image(tmp_path / "a.nii").voxels(np.float32)


# -- the same places, other axes


@pytest.mark.parametrize(("order", "flips"), [((0, 1, 2), (-1, 1, 1)), ((1, 0, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 2, 0), (-1, -1, -1))])
@pytest.mark.parametrize("affine", [np.diag([1, 2, 3, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_a_label_map_along_other_axes_is_turned_to_its_image(tmp_path, order, flips, affine):
    labels = np.arange(60, dtype=np.uint8).reshape(SHAPE)
    image = open_image(write(tmp_path / "image.nii.gz", RANDOM[..., 0], affine))
    label = turned(tmp_path / "label.nii.gz", labels, affine, order, flips)
    found, file = read_label(label, image)
    np.testing.assert_array_equal(found, labels)
    np.testing.assert_allclose(file.affine, image.affine, atol=1e-5)
    assert file.notes == ("its axes are turned to those of its image",)


def test_a_palette_along_other_axes_is_turned_to_its_image(tmp_path):
    """Its indices are the labels, not its colours."""
    labels = np.random.default_rng(0).integers(0, 3, (5, 4)).astype(np.uint8)  # columns, rows
    picture = Pillow.fromarray(np.ascontiguousarray(labels.T), "P")
    picture.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 40])
    picture.save(tmp_path / "a.png")
    image = open_image(
        write(tmp_path / "a.nii", np.zeros((4, 5, 1), np.float32), np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    )
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", image)[0][..., 0], labels.T)


def test_a_channel_along_other_axes_is_turned_to_the_first_one(tmp_path):
    one = write(tmp_path / "a.nii.gz", RANDOM[..., 0], OBLIQUE)
    other = turned(tmp_path / "b.nii.gz", RANDOM[..., 1], OBLIQUE, (1, 0, 2), (1, -1, 1))
    np.testing.assert_array_equal(read_image([one, other], 2)[0], np.moveaxis(RANDOM[..., :2], -1, 0))


def test_a_flipped_array_in_the_same_header_lies_elsewhere(tmp_path):
    """Only voxels that lie in the same places are turned: a flip of the header alone is another grid."""
    image = open_image(write(tmp_path / "a.nii.gz", RANDOM[..., 0]))
    with pytest.raises(UserError, match=r"b\.nii\.gz: not on the grid of .*a\.nii\.gz: the affine puts a corner 8 mm away"):
        aligned(open_image(write(tmp_path / "b.nii.gz", RANDOM[..., 0], np.diag([-1, 1, 1, 1]))), image)
    half = np.diag([0.5, 1, 1, 1])
    with pytest.raises(UserError, match="not on the grid"):
        aligned(open_image(write(tmp_path / "c.nii.gz", RANDOM[..., 0], half)), image)


def test_training_and_evaluation_take_turned_labels_and_say_so(tmp_path, caplog):
    folder = nnunet_folder(tmp_path / "data", cases=3, shape=(8, 6, 4), affine=OBLIQUE)
    straight = [load_label(case, load_dataset(folder), (1.0, 1.0, 1.0)) for case in load_dataset(folder).cases]
    assert not caplog.text
    for i in (1, 2):
        path = folder / "labelsTr" / f"case_{i}.nii.gz"
        data = np.asarray(nib.load(path).dataobj)
        turned(path, data, OBLIQUE, (1, 0, 2), (-1, 1, 1))
    table = load_dataset(folder)
    assert caplog.text.count("turned") == 1 and "case_1.nii.gz and 1 other(s): its axes are turned to those of its image" in caplog.text
    for case, before in zip(table.cases, straight, strict=True):
        assert (load_label(case, table, (1.0, 1.0, 1.0)) == before).all()
    (tmp_path / "found").mkdir()
    for case in table.cases:
        write(tmp_path / "found" / case.label.name, read_label(case.label, open_image(case.images[0]))[0], OBLIQUE)
    caplog.clear()
    result = evaluate(tmp_path / "found", folder / "labelsTr", quiet=True)
    assert not result["failed"] and result["mean"]["dice"]["mean"] == 1 and caplog.text.count("turned") == 1


def test_one_datalist_says_each_note_once(tmp_path, caplog):
    data = np.zeros(SHAPE, [(name, "u1") for name in "RGBA"])
    for name in "ab":
        write(tmp_path / f"{name}.nii.gz", data)
        write(tmp_path / f"{name}-label.nii.gz", np.zeros(SHAPE, np.uint8))
    table = {"training": [{"image": f"{name}.nii.gz", "label": f"{name}-label.nii.gz"} for name in "ab"]}
    (tmp_path / "list.json").write_text(json.dumps(table))
    assert load_dataset(tmp_path / "list.json").channels == ("channel_0", "channel_1", "channel_2")
    assert caplog.text.count("a.nii.gz and 1 other(s): the alpha channel is left out") == 1


def test_a_record_of_an_image_in_memory():
    image = nifti.record(nib.Nifti1Image(RANDOM[..., 0], OBLIQUE))
    np.testing.assert_array_equal(image.voxels()[0], RANDOM[..., 0])
    np.testing.assert_allclose(image.spacing, np.linalg.norm(OBLIQUE[:3, :3], axis=0))


@pytest.mark.parametrize("name", ["nibabel.global", "pydicom", "pydicom.pixels.utils", "tifffile"])
def test_libraries_say_nothing_while_they_read_and_what_they_like_afterwards(name, caplog):
    logger = logging.getLogger(name)
    with pytest.raises(KeyError), quiet_libraries():
        logger.error("within")
        raise KeyError
    logger.error("afterwards")
    assert caplog.messages == ["afterwards"]


def test_readers_in_several_threads_leave_the_libraries_as_they_were():
    logger, filters = logging.getLogger("pydicom"), warnings.filters[:]
    first, second = quiet_libraries(), quiet_libraries()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the first to come is the first to leave, as threads do
    assert logger.disabled and warnings.filters != filters
    second.__exit__(None, None, None)
    assert not logger.disabled and warnings.filters == filters
