"""Synthetic cohorts in real file formats: the embedded default, and the tests' factory.

One configuration per modality; each has `write(folder)`, which writes the files whole or not at all, and
`layout(classes)`, the fields by which a catalogue entry reads them. The same configuration writes the same bytes.
"""

from typing import Annotated

from pydantic import Field, TypeAdapter

from cadx.phantom.xray import XrayPhantom

PhantomConfig = Annotated[XrayPhantom, Field(discriminator="modality")]
PHANTOM: TypeAdapter[XrayPhantom] = TypeAdapter(XrayPhantom)
