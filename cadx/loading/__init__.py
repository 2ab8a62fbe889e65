"""The registry of inputs: how each kind of sample becomes what a network takes."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from cadx.loading.patches import VolumePreprocessing
from cadx.loading.tiles import TilePreprocessing
from cadx.transforms import Preprocessing
from cadx.types import Config


class FeaturePreprocessing(Config):
    """A bag of feature vectors is the network's input as it is: `channels` numbers for each instance."""

    channels: int = Field(ge=1)


def input_text(made: "Input") -> str:
    """What a network takes of a sample, in words.

    >>> input_text(Preprocessing(height_px=224, width_px=224))
    '1 x 224 x 224 px, pad'
    """
    if isinstance(made, VolumePreprocessing):
        depth_px, height_px, width_px = made.patch_px
        spacing = f" of {' x '.join(f'{mm:g}' for mm in made.spacing_mm)} mm" if made.spacing_mm else ""
        return f"patches of {depth_px} x {height_px} x {width_px} voxels{spacing}"
    if isinstance(made, FeaturePreprocessing):
        return f"{made.channels} numbers for each instance"
    text = f"{made.channels} x {made.height_px} x {made.width_px} px, {made.fit}"
    if isinstance(made, TilePreprocessing):
        return f"tiles of {made.tile_px} px at {made.mpp:g} um per pixel, as {text}"
    return text


_FORMS = {
    "volume": {"patch_px", "spacing_mm", "window_hu"},
    "slide": {"tile_px", "mpp", "minimum_tissue"},
}


def _form(value: Any) -> str:
    """Which input a record describes: told by the fields that no other has; else it is an image."""
    fields = set(value if isinstance(value, Mapping) else getattr(type(value), "model_fields", {}))
    if fields == {"channels"}:
        return "features"
    return next((form for form, own in _FORMS.items() if fields & own), "image")


Input = Annotated[
    Annotated[Preprocessing, Tag("image")]
    | Annotated[VolumePreprocessing, Tag("volume")]
    | Annotated[TilePreprocessing, Tag("slide")]
    | Annotated[FeaturePreprocessing, Tag("features")],
    Discriminator(_form),
]

__all__ = [
    "FeaturePreprocessing",
    "Input",
    "Preprocessing",
    "TilePreprocessing",
    "VolumePreprocessing",
    "input_text",
]
