"""Synthetic cohorts in real file formats: the embedded default, and the tests' factory.

One configuration per modality; each has `write(folder)`, which writes the files whole or not at all, and
`layout(classes)`, the fields by which a catalogue entry reads them. The same configuration writes the same bytes.
In each, what global statistics of the images and the table's columns say of the label stays at chance or little
above it (AUC at most 0.70; the tests hold it), except for `clinical` columns, which carry part of the signal.
"""

from typing import Annotated

from pydantic import Field, TypeAdapter

from cadx.phantom.lesion import LesionPhantom
from cadx.phantom.slide import SlidePhantom
from cadx.phantom.volume import VolumePhantom
from cadx.phantom.xray import XrayPhantom

PhantomConfig = Annotated[
    XrayPhantom | VolumePhantom | SlidePhantom | LesionPhantom, Field(discriminator="modality")
]
PHANTOM: TypeAdapter[XrayPhantom | VolumePhantom | SlidePhantom | LesionPhantom] = TypeAdapter(PhantomConfig)
