"""Every dependency of a plain installation says its licence: no GPL of any kind; MPL, per file, is accepted."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|MPL|Mozilla|Zlib|CC0|ISC|Unlicense|HPND)\b", re.I
)
COPYLEFT = re.compile(r"\b([AL]?GPL|GNU (Affero |Lesser )?General Public|SSPL|CC[- ]BY[- ]NC)", re.I)
VENDOR = re.compile(r"^(nvidia-|cuda-)")
"""CUDA's own libraries: redistributable under NVIDIA's terms, and brought by torch's plain build alone."""


def licence(distribution: metadata.Distribution) -> str:
    about = distribution.metadata
    classified = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    return " ".join([about.get("License-Expression") or "", *classified, (about.get("License") or "")[:400]])


def installed(name: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The distribution and everything it needs, with the extras that are asked for."""
    todo, done = [(name, "")], set()
    while todo:
        name, extra = todo.pop()
        key = canonicalize_name(name)
        if (key, extra) in done:
            continue
        done.add((key, extra))
        try:
            found[key] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # asked for on other platforms only
            continue
        for text in found[key].requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, ""), *((needed.name, wanted) for wanted in needed.extras)]
    return found


def complaints(licences: dict[str, str]) -> list[str]:
    return [
        f"{name}: {text.strip()[:80] or 'says no licence'}"
        for name, text in licences.items()
        if not VENDOR.match(name) and (COPYLEFT.search(text) or not PERMISSIVE.search(text))
    ]


def test_no_copyleft_among_the_dependencies():
    found = installed("medseg-ssl", {})
    assert len(found) > 30, "the walk must reach the dependencies of dependencies"
    assert not complaints({name: licence(d) for name, d in found.items()})


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("GPL-3.0-only", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
        ("LGPL-2.1-or-later AND BSD-3-Clause", True),
        ("License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3) BSD", True),
        ("", True),
        ("MIT", False),
        ("BSD-3-Clause AND 0BSD", False),
    ],
)
def test_what_is_refused(text, refused):
    assert bool(complaints({"some-package": text})) is refused
