"""The scanner's name: one machine has one name, however its maker writes itself."""

import pytest

from medseg_ssl.data.scanner import scanner_name


@pytest.mark.parametrize(
    ("maker", "model", "name"),
    [
        ("SIEMENS", "Biograph 64", "siemens biograph 64"),
        ("Siemens Healthineers AG", "biograph  64", "siemens biograph 64"),
        ("GE MEDICAL SYSTEMS", "Signa_HDxt", "ge signa hdxt"),
        ("Philips", "Philips Ingenia", "philips ingenia"),
        ("Philips", "Philips", "philips"),
        ("Hitachi, Ltd.", "Hitachi Oasis", "hitachi oasis"),
        ("Canon Medical Systems Co., Ltd.", "", "canon"),
        ("", "Discovery ST", "discovery st"),
        ("Medical Systems", "", "medical systems"),
        (None, ["a", "b"], ""),
        ("x" * 60, "y", "x" * 48),
    ],
)
def test_maker_and_model(maker, model, name):
    assert scanner_name(maker, model) == name
