"""DICOM series for tests, written slice by slice with pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

ACROSS, DOWN = np.array([0.8, 0.6, 0.0]), np.array([-0.6, 0.8, 0.0])  # along a row and along a column, LPS
NORMAL = np.cross(ACROSS, DOWN)
FIRST = np.array([10.0, -20.0, 30.0])
PIXEL, STEP = (0.7, 0.5), 2.0  # from row to row and from column to column; from slice to slice


def slice_of(data: np.ndarray, index: float, study: dict[str, str], **changes) -> Dataset:
    """One CT slice (rows, columns) of int16, `index` steps from the first one."""
    table = Dataset()
    table.file_meta = FileMetaDataset()
    table.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    table.SOPClassUID = table.file_meta.MediaStorageSOPClassUID = CTImageStorage
    table.SOPInstanceUID = table.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for name, value in study.items():
        setattr(table, name, value)
    table.PatientName, table.PatientID, table.PatientBirthDate, table.PatientSex = "Doe^Jane", "P42", "19700101", "F"
    table.PatientAge, table.PatientAddress, table.Occupation = "053Y", "Elm Street 1", "astronaut"
    table.ReferringPhysicianName, table.InstitutionName, table.OperatorsName = "House^Gregory", "Princeton", "Nurse^Ann"
    table.StudyDate, table.StudyTime, table.StudyID, table.AccessionNumber = "20260101", "120000", "7", "A7"
    table.StudyDescription, table.SeriesDescription, table.Manufacturer = "thorax of Jane", "axial", "Acme"
    table.Modality, table.SeriesNumber, table.InstanceNumber = "CT", 1, int(index) + 1
    table.ImagePositionPatient = [float(v) for v in FIRST + index * STEP * NORMAL]
    table.ImageOrientationPatient = [*ACROSS.tolist(), *DOWN.tolist()]
    table.PixelSpacing, table.SliceThickness = list(PIXEL), 5.0
    table.Rows, table.Columns, table.SamplesPerPixel, table.PhotometricInterpretation = *data.shape, 1, "MONOCHROME2"
    table.BitsAllocated, table.BitsStored, table.HighBit, table.PixelRepresentation = 16, 16, 15, 1
    table.RescaleSlope, table.RescaleIntercept = 2.0, -1000.0
    table.PixelData = data.astype("<i2").tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(table, name)
        else:
            setattr(table, name, value)
    return table


def study() -> dict[str, str]:
    return {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}


def series(folder: Path, data: np.ndarray, edit=lambda index: {}, **names) -> Path:
    """Write data (z, rows, columns) with file names in another order; `edit(index)` changes tags of a slice, None leaves it out."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = study() | names
    for index, page in enumerate(data):
        changes = edit(index)
        if changes is not None:
            slice_of(page, changes.pop("index", index), tags, **changes).save_as(folder / f"IM{(index * 7) % 100:03d}", enforce_file_format=True)
    return folder
