"""NRRD, MetaImage, PNG, JPEG and TIFF: read from files that other libraries wrote, written to files that other libraries read."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image as Pillow
from PIL import ImageOps

from medssm.errors import UserError
from medssm.segment.cases import cases_in
from medssm.segment.data import load_dataset
from medssm.segment.evaluate import evaluate
from medssm.segment.images import files_of, image, is_made_here, open_image, output_ending, read_image, read_label, write_image
from medssm.segment.volumes import load
from tests.segment.synthetic import write

RANDOM = np.random.default_rng(0)
TURN = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1.0]])
LPS = np.diag([-1, -1, 1, 1.0])


def itk_image(data, vector=False):
    """SimpleITK's image of data[z, y, x], oblique."""
    image = sitk.GetImageFromArray(data, isVector=vector)
    axes = image.GetDimension()
    image.SetSpacing([0.5, 0.7, 2.0][:axes])
    image.SetOrigin([10.0, -20.0, 30.0][:axes])
    image.SetDirection(TURN[:axes, :axes].ravel().tolist())
    return image


def same_places(image, other):
    """Whether voxels of our image lie where SimpleITK says: the first one, the last one and one beside."""
    for index in ((0, 0, 0), (1, 0, 0), tuple(size - 1 for size in image.shape)):
        point = other.TransformIndexToPhysicalPoint([int(i) for i in index[: other.GetDimension()]])
        ours = LPS @ image.affine @ [*index, 1]
        np.testing.assert_allclose(ours[: len(point)], point, atol=1e-4)


# -- ITK's formats


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.NRRD"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_itks_files_are_read_in_place(tmp_path, name, dtype):
    data = RANDOM.integers(0, 100, (3, 4, 5)).astype(dtype)
    sitk.WriteImage(itk_image(data), str(tmp_path / name), imageIO="NrrdImageIO" if "R" in name else "")
    found, file = read_image([tmp_path / name], 1)
    np.testing.assert_array_equal(found[0], data.T)
    assert file.shape == (5, 4, 3) and file.format == ("NRRD" if "n" in name.lower()[2:] else "MetaImage")
    np.testing.assert_allclose(file.spacing, [0.5, 0.7, 2.0])
    same_places(file, itk_image(data))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_itks_vectors_and_planes(tmp_path, name):
    data = RANDOM.normal(size=(3, 4, 5, 2)).astype(np.float32)
    sitk.WriteImage(itk_image(data, vector=True), str(tmp_path / name))
    np.testing.assert_array_equal(read_image([tmp_path / name], 2)[0], data.transpose(3, 2, 1, 0))
    last = sitk.JoinSeries([itk_image(np.ascontiguousarray(data[..., i])) for i in range(2)])  # channels on a fourth axis
    sitk.WriteImage(last, str(tmp_path / name))
    found, file = read_image([tmp_path / name], 2)
    np.testing.assert_array_equal(found, data.transpose(3, 2, 1, 0))
    same_places(file, itk_image(data[..., 0]))
    plane = itk_image(data[0, :, :, 0])
    sitk.WriteImage(plane, str(tmp_path / name))
    found, file = read_image([tmp_path / name], 1)
    np.testing.assert_array_equal(found[0, :, :, 0], data[0, :, :, 0].T)
    same_places(file, plane)
    write_image(tmp_path / f"out-{name}", np.ones((5, 4, 1), np.uint8), file)
    back = sitk.ReadImage(str(tmp_path / f"out-{name}"))
    assert back.GetSize() == (5, 4)
    same_places(file, back)


@pytest.mark.parametrize("source", ["nrrd", "nii.gz"])
@pytest.mark.parametrize("name", ["out.nrrd", "out.mha"])
def test_what_is_written_is_read_by_simpleitk_in_place(tmp_path, name, source):
    data = RANDOM.integers(0, 300, (3, 4, 5)).astype(np.int16)
    itk = itk_image(data)
    itk.SetMetaData("PatientName", "Doe^Jane")
    sitk.WriteImage(itk, str(tmp_path / f"a.{source}"))
    like = open_image(tmp_path / f"a.{source}")
    labels = RANDOM.integers(0, 300, (5, 4, 3)).astype(np.uint16)
    write_image(tmp_path / name, labels, like)
    back = sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), labels.T)
    same_places(like, back)
    np.testing.assert_array_equal(read_label(tmp_path / name, like)[0], labels)
    assert is_made_here(tmp_path / name) and b"Doe" not in (tmp_path / name).read_bytes()
    assert source == "nii.gz" or (b"Doe" in (tmp_path / "a.nrrd").read_bytes() and not is_made_here(tmp_path / "a.nrrd"))


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("um", 0.001), ("cm", 10)])
def test_units_of_length_of_nrrd_and_metaimage(tmp_path, unit, factor):
    image, moved = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), np.eye(4)
    moved[:3, 3] = 7, 8, 9
    image.SetOrigin([7.0, 8.0, 9.0])
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    sitk.WriteImage(image, str(tmp_path / "a.mha"))
    lines = {"a.nrrd": (f'space units: "{unit}" "{unit}" "{unit}"\n', b"kinds:"), "a.mha": (f"DistanceUnits = {unit}\n", b"DimSize")}
    for name, (line, before) in lines.items():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(before, line.encode() + before, 1))
        np.testing.assert_allclose(open_image(tmp_path / name).affine, LPS @ np.diag([factor] * 3 + [1]) @ moved)
    (tmp_path / "a.mha").write_bytes((tmp_path / "a.mha").read_bytes().replace(f"Units = {unit}".encode(), b"Units = ell"))
    with pytest.raises(UserError, match=r"a\.mha: lengths in an unknown unit, 'ell'"):
        open_image(tmp_path / "a.mha")


def test_what_itks_formats_cannot_hold(tmp_path):
    sheared = np.eye(4)
    sheared[0, 1] = 0.05
    like = open_image(write(tmp_path / "a.nii", np.zeros((5, 4, 3), np.float32), sheared))
    with pytest.raises(UserError, match=r"out\.nrrd: the axes of .*a\.nii are not perpendicular"):
        write_image(tmp_path / "out.nrrd", np.zeros((5, 4, 3), np.uint8), like)
    with pytest.raises(UserError, match=r"out\.mhd: two files at once .* name it out\.mha"):
        write_image(tmp_path / "out.mhd", np.zeros((5, 4, 3), np.uint8), like)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nii"]


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.png", "a.tif", "a.jpg", "a.dcm", "a.nii.zst"])
def test_a_file_of_another_kind_is_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"<!DOCTYPE html>" + b" " * 500)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}: ") as error:
        open_image(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(image.importlib, "import_module", missing)
    for name, what, package in (
        ("a.nrrd", "NRRD", "SimpleITK"),
        ("a.png", "PNG and JPEG", "PIL"),
        ("a.tif", "TIFF", "tifffile"),
        ("a.dcm", "DICOM", "pydicom"),
        ("a.nii.zst", "zstandard", "zstandard"),
    ):
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" + b" " * 200)
        with pytest.raises(UserError, match=rf"{name}: {what} needs the package {package}: pip install '\.\[io\]'"):
            open_image(tmp_path / name)


# -- pictures


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "A.PNG"])
def test_grey_pictures(tmp_path, name, dtype, largest):
    data = RANDOM.integers(0, largest, (4, 5)).astype(dtype)
    data[0, 0] = largest
    Pillow.fromarray(data).save(tmp_path / name)
    found, file = read_image([tmp_path / name], 1)
    np.testing.assert_array_equal(found[0, :, :, 0], data.T)
    assert file.shape == (5, 4, 1) and file.spacing.tolist() == [1, 1, 1] and not file.measured
    assert "the file does not say how large a pixel is: 1 x 1 mm" in file.notes[0]
    itk = sitk.ReadImage(str(tmp_path / name), imageIO="PNGImageIO" if "tif" not in name else "TIFFImageIO")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk), data)
    if "tif" not in name:
        same_places(file, itk)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colours_are_three_channels(tmp_path, name, dtype):
    data = RANDOM.integers(0, np.iinfo(dtype).max, (4, 5, 3)).astype(dtype)
    sitk.WriteImage(sitk.GetImageFromArray(data, isVector=True), str(tmp_path / name))
    np.testing.assert_array_equal(read_image([tmp_path / name], 3)[0][..., 0], data.transpose(2, 1, 0))
    with pytest.raises(UserError, match=r"expected one label map, got 3 channels: colours are no labels"):
        read_label(tmp_path / name)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_left_out_and_said(tmp_path, mode):
    data = RANDOM.integers(0, 255, (4, 5, len(mode))).astype(np.uint8)
    Pillow.fromarray(data, mode).save(tmp_path / "a.png")
    found, file = read_image([tmp_path / "a.png"], len(mode) - 1)
    np.testing.assert_array_equal(found[..., 0], data[..., :-1].transpose(2, 1, 0))
    assert file.notes[0] == "the alpha channel is left out"


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_palette_is_colours_of_an_image_and_values_of_a_label_map(tmp_path, name):
    labels = RANDOM.integers(0, 3, (4, 5)).astype(np.uint8)
    colours = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 40]], np.uint8)
    picture = Pillow.fromarray(labels, "P")
    picture.putpalette(colours.ravel().tolist())
    picture.save(tmp_path / name)
    np.testing.assert_array_equal(read_image([tmp_path / name], 3)[0][..., 0], colours[labels].transpose(2, 1, 0))
    np.testing.assert_array_equal(read_label(tmp_path / name)[0][..., 0], labels.T)


def test_a_label_map_saved_as_grey_colours_or_as_bits(tmp_path):
    labels = RANDOM.integers(0, 2, (4, 5)).astype(np.uint8)
    Pillow.fromarray(np.repeat(labels[..., None] * 255, 3, 2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label(tmp_path / "a.png")[0][..., 0], labels.T * 255)
    Pillow.fromarray(labels.astype(bool)).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read_label(tmp_path / "b.png")[0][..., 0], labels.T)


def test_jpeg_is_an_image_and_no_label_map(tmp_path):
    data = np.full((16, 24, 3), 120, np.uint8)
    Pillow.fromarray(data).save(tmp_path / "a.jpg")
    found, file = read_image([tmp_path / "a.jpg"], 3)
    assert found.shape == (3, 24, 16, 1) and abs(found - 120).max() < 3 and file.format == "JPEG"
    with pytest.raises(UserError, match=r"a\.jpg: JPEG changes values, so a label map in it cannot be trusted"):
        read_label(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    with pytest.raises(UserError, match=r"b\.png: JPEG changes values"):
        read_label(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"out\.jpg: JPEG changes values, so it cannot hold labels: name a file that ends in \.png"):
        write_image(tmp_path / "out.jpg", np.zeros((24, 16, 1), np.uint8), file)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    data = np.zeros((8, 16), np.uint8)
    data[:, 12:] = 200
    exif = Pillow.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Pillow.fromarray(data).save(tmp_path / "a.jpg", exif=exif, quality=100)
    found, file = read_image([tmp_path / "a.jpg"], 1)
    assert file.shape == (8, 16, 1) and (found[0, :, 12:, 0] > 190).all() and (found[0, :, :12, 0] < 10).all()
    assert file.notes[0] == "turned as its EXIF says"


@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_turn_of_exif(tmp_path, orientation):
    data, exif = RANDOM.integers(0, 255, (4, 5)).astype(np.uint8), Pillow.Exif()
    exif[0x0112] = orientation
    Pillow.fromarray(data).save(tmp_path / "a.png", exif=exif)
    found, file = read_image([tmp_path / "a.png"], 1)
    with Pillow.open(tmp_path / "a.png") as picture:
        wanted = np.asarray(ImageOps.exif_transpose(picture)).T
    np.testing.assert_array_equal(found[0, ..., 0], wanted)
    assert file.shape == (*wanted.shape, 1)


def test_moving_pictures_and_grey_with_alpha(tmp_path):
    pages = [Pillow.fromarray(np.full((4, 5), i, np.uint8)) for i in range(2)]
    pages[0].save(tmp_path / "a.png", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"a\.png: expected one picture, got 2"):
        open_image(tmp_path / "a.png")
    data = RANDOM.integers(0, 255, (4, 5, 2)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    found, file = read_image([tmp_path / "a.tif"], 1)
    np.testing.assert_array_equal(found[0, ..., 0], data[..., 0].T)
    assert file.notes[0] == "the alpha channel is left out"


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits"])
def test_pages_of_a_tiff_are_a_volume(tmp_path, compression):
    data = RANDOM.integers(0, 60000, (3, 4, 5)).astype(np.uint16)
    pages = [Pillow.fromarray(page) for page in data]
    names = {"zlib": "tiff_adobe_deflate", "lzw": "tiff_lzw", "packbits": "packbits", None: None}
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=names[compression])
    found, file = read_image([tmp_path / "a.tif"], 1)
    np.testing.assert_array_equal(found[0], data.T)
    write_image(tmp_path / "out.tif", data.T // 1000, file)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), data // 1000)
    np.testing.assert_array_equal(np.array(Pillow.open(tmp_path / "out.tif")), data[0] // 1000)
    assert is_made_here(tmp_path / "out.tif") and not is_made_here(tmp_path / "a.tif")


def test_channels_and_axes_of_a_tiff(tmp_path):
    data = RANDOM.integers(0, 255, (3, 2, 4, 5)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", data, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(read_image([tmp_path / "a.ome.tif"], 2)[0], data.transpose(1, 3, 2, 0))
    tifffile.imwrite(tmp_path / "t.ome.tif", data, metadata={"axes": "TCYX"})
    with pytest.raises(UserError, match=r"t\.ome\.tif: expected rows and columns, .* got the axes TCYX of \(3, 2, 4, 5\)"):
        open_image(tmp_path / "t.ome.tif")
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(data[0, 0])
        file.write(data[0, 0, 1:])
    with pytest.raises(UserError, match=r"two\.tif: expected pages of one kind, got 2 kinds"):
        open_image(tmp_path / "two.tif")
    tifffile.imwrite(tmp_path / "white.tif", data[0, 0], photometric="miniswhite")
    with pytest.raises(UserError, match="black as 0"):
        open_image(tmp_path / "white.tif")


@pytest.mark.parametrize(("spacing", "wanted"), [([3.0, 0.5, 0.25], [0.25, 0.5, 3]), ([0.5, 0.25], [0.25, 0.5, 1])])
@pytest.mark.parametrize("beside", ["a_0000.json", "a.json"])
def test_the_size_of_a_pixel_stands_beside_a_picture_as_in_nnunet(tmp_path, spacing, wanted, beside):
    Pillow.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a_0000.tif")
    (tmp_path / beside).write_text(json.dumps({"spacing": spacing}))
    file = open_image(tmp_path / "a_0000.tif")
    assert file.measured and file.spacing.tolist() == wanted and file.notes == ()
    for bad in ([0, 1], "1", [1, None], [1]):
        (tmp_path / beside).write_text(json.dumps({"spacing": bad}))
        with pytest.raises(UserError, match=rf"{beside}: spacing: expected 2 or 3 lengths in millimetres, z y x, got"):
            open_image(tmp_path / "a_0000.tif")


def test_a_mask_has_the_pixels_of_its_picture(tmp_path, caplog):
    """One line, where neither says how large they are; none, where the picture does."""
    pictures(tmp_path, "images/a.png", "images/b.png"), pictures(tmp_path, "masks/a.png", "masks/b.png", labels=1)
    load_dataset(tmp_path)
    assert caplog.text.count("how large a pixel is") == 1 and "images/a.png and 3 other(s): the file does not say" in caplog.text
    for name in "ab":
        (tmp_path / "images" / f"{name}.json").write_text(json.dumps({"spacing": [0.5, 0.25]}))
    caplog.clear()
    load_dataset(tmp_path)
    assert not caplog.text
    label, file = read_label(tmp_path / "masks" / "a.png", open_image(tmp_path / "images" / "a.png"))
    assert file.spacing.tolist() == [0.25, 0.5, 1] and label.shape == (6, 8, 1)
    result = evaluate(tmp_path / "masks", tmp_path / "masks", quiet=True)
    assert result["mean"]["dice"]["mean"] == 1 and caplog.text.count("how large a pixel is") == 1


@pytest.mark.parametrize(("largest", "bits"), [(3, 8), (255, 8), (256, 16), (65535, 16)])
def test_a_label_map_of_a_picture_has_its_size_and_as_few_bits_as_hold_it(tmp_path, largest, bits):
    Pillow.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.jpg")
    labels = RANDOM.integers(0, largest + 1, (5, 4, 1)).astype(np.int32)
    labels[0, 0] = largest
    write_image(tmp_path / "out.png", labels, open_image(tmp_path / "a.jpg"))
    with Pillow.open(tmp_path / "out.png") as back:
        assert back.size == (5, 4) and back.mode == {8: "L", 16: "I;16"}[bits]
        np.testing.assert_array_equal(np.array(back), labels[..., 0].T)
    assert is_made_here(tmp_path / "out.png") and not is_made_here(tmp_path / "a.jpg")


def test_what_a_picture_cannot_hold(tmp_path):
    Pillow.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    picture = open_image(tmp_path / "a.png")
    for value in (-1, 65536):
        with pytest.raises(UserError, match=r"out\.png: expected labels from 0 to 65535"):
            write_image(tmp_path / "out.png", np.full((5, 4, 1), value, np.int32), picture)
    volume = open_image(write(tmp_path / "a.nii", np.zeros((5, 4, 3), np.float32)))
    with pytest.raises(UserError, match=r"out\.png: a picture cannot say where .*a\.nii lies"):
        write_image(tmp_path / "out.png", np.zeros((5, 4, 3), np.uint8), volume)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4, 5), np.uint8), photometric="minisblack")
    with pytest.raises(UserError, match=r"out\.png: PNG holds one slice, .*a\.tif has 3"):
        write_image(tmp_path / "out.png", np.zeros((5, 4, 3), np.uint8), open_image(tmp_path / "a.tif"))
    assert not (tmp_path / "out.png").exists()


def test_a_picture_as_nifti_lies_where_itk_puts_it(tmp_path):
    data = RANDOM.integers(0, 9, (4, 5)).astype(np.uint8)
    Pillow.fromarray(data).save(tmp_path / "a.png")
    write_image(tmp_path / "out.nii.gz", data.T[..., None], open_image(tmp_path / "a.png"))
    back = sitk.ReadImage(str(tmp_path / "out.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back)[0], data)
    same_places(open_image(tmp_path / "a.png"), back)
    np.testing.assert_array_equal(read_label(tmp_path / "out.nii.gz", open_image(tmp_path / "a.png"))[0][..., 0], data.T)
    assert nib.load(tmp_path / "out.nii.gz").header.get_xyzt_units()[0] == "mm"


# -- data sets of pictures


def pictures(root, *names, colours=True, labels=None):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = (
            RANDOM.integers(0, 255, (8, 6, 3) if colours else (8, 6)).astype(np.uint8)
            if labels is None
            else (np.arange(48).reshape(8, 6) % 2) * labels
        )
        Pillow.fromarray(data.astype(np.uint8)).save(root / name)
    return root


def test_a_folder_of_images_with_a_folder_of_masks(tmp_path):
    pictures(tmp_path, "images/a.jpg", "images/b.png", "images/scan_0001.png")
    pictures(tmp_path, "masks/a_segmentation.png", "masks/b.png", "masks/scan_0001_mask.png", labels=255)
    table = load_dataset(tmp_path)
    assert table.channels == ("red", "green", "blue") and table.classes == {"background": 0, "class_255": 255}
    assert {case.name: (case.images[0].name, case.label.name) for case in table.cases} == {
        "a": ("a.jpg", "a_segmentation.png"),
        "b": ("b.png", "b.png"),
        "scan_0001": ("scan_0001.png", "scan_0001_mask.png"),
    }
    (tmp_path / "masks").rename(tmp_path / "labels")
    assert load_dataset(tmp_path).cases[1].label == tmp_path / "labels" / "b.png"


def test_images_and_masks_without_a_partner_are_named(tmp_path):
    pictures(tmp_path, "images/a.png", "images/b.png")
    pictures(tmp_path, "masks/b.png", "masks/c.png", labels=1)
    with pytest.raises(UserError) as error:
        load_dataset(tmp_path)
    assert len(str(error.value).splitlines()) == 2
    assert "images/a.png: no file of that name in" in str(error.value) and "masks/c.png: no image of that name in" in str(error.value)
    pictures(tmp_path, "images/c.png"), pictures(tmp_path, "masks/a.png", "masks/a_mask.png", labels=1)
    with pytest.raises(UserError, match=r"images/a\.png: a and a_mask in .*masks: expected one label map"):
        load_dataset(tmp_path)


def test_jpeg_masks_and_masks_of_another_size_are_named_before_training(tmp_path):
    pictures(tmp_path, "images/a.png", "images/b.png", "masks/a.jpg")
    pictures(tmp_path, "masks/b.png", labels=1)
    Pillow.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(UserError) as error:
        load_dataset(tmp_path)
    first, second = str(error.value).splitlines()
    assert "masks/a.jpg: JPEG changes values" in first and "masks/b.png: not on the grid of" in second and "expected (6, 8, 1)" in second


@pytest.mark.parametrize("colours", [True, False])
def test_nnunets_layout_of_pictures(tmp_path, colours):
    pictures(tmp_path, "imagesTr/a_0000.png", "imagesTr/b_0000.png", colours=colours)
    pictures(tmp_path, "labelsTr/a.png", "labelsTr/b.png", labels=1)
    names = {"0": "R", "1": "G", "2": "B"} if colours else {"0": "grey"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": {"background": 0, "cell": 1}, "file_ending": ".png"}))
    table = load_dataset(tmp_path)
    assert [(case.name, case.images[0].name, case.label.name) for case in table.cases] == [(n, f"{n}_0000.png", f"{n}.png") for n in "ab"]
    assert [case.name for case in cases_in(tmp_path / "imagesTr", len(names))] == ["a", "b"]


def test_numbered_pictures_in_colour_are_pictures(tmp_path):
    pictures(tmp_path, "frame_0000.png", "frame_0001.png")
    assert [case.name for case in cases_in(tmp_path, 3)] == ["frame_0000", "frame_0001"]


def test_a_label_map_has_the_format_of_its_image_or_one_that_holds_labels():
    own = {
        "a.nii.gz": ".nii.gz",
        "a.nii": ".nii.gz",
        "a.nii.zst": ".nii.gz",
        "ct": ".nii.gz",
        "a.dcm": ".nii.gz",
        "a.nrrd": ".nrrd",
        "a.nhdr": ".nrrd",
    }
    own |= {"a.mha": ".mha", "a.mhd": ".mha", "a.png": ".png", "a.jpg": ".png", "a.JPEG": ".png", "a.tif": ".tif", "a.tiff": ".tif"}
    assert {name: output_ending(Path(name)) for name in own} == own
    assert {output_ending(Path(name), "mha") for name in own} == {".mha"}


def test_what_belongs_to_an_image_is_part_of_it(tmp_path):
    """It is never written over, and a cache depends on it."""
    pictures(tmp_path, "a_0000.png")
    (tmp_path / "a.json").write_text("{}")
    assert files_of(tmp_path / "a_0000.png") == [tmp_path / "a_0000.png", tmp_path / "a.json"]
    for name, data in (("b.mhd", "b.raw"), ("c.nhdr", "c.raw")):
        sitk.WriteImage(itk_image(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / name))
        assert files_of(tmp_path / name) == [tmp_path / name, tmp_path / data]
    sitk.WriteImage(itk_image(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "d.mha"))
    assert files_of(tmp_path / "d.mha") == [tmp_path / "d.mha"]


def test_a_cache_is_made_anew_where_the_size_of_a_pixel_changed(tmp_path):
    pictures(tmp_path / "data", "images/a.png", "images/b.png")
    pictures(tmp_path / "data", "masks/a.png", "masks/b.png", labels=1)
    (case, _), spacing = load_dataset(tmp_path / "data").cases, (1.0, 1.0, 0.0)
    shapes = []
    for edge in (1.0, 2.0):
        (tmp_path / "data" / "images" / "a.json").write_text(json.dumps({"spacing": [edge, edge]}))
        shapes.append(tuple(load([case], load_dataset(tmp_path / "data"), spacing, tmp_path / "cache")[0][0].shape))
    assert shapes[0] == (3, 6, 8, 1) and shapes[1] == (3, 11, 15, 1)
