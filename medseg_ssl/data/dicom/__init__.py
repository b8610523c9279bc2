"""DICOM: headers, series, pixels, SUV and contours; the only room that knows pydicom."""
